"""What a certificate claims: whether it is a bound at all, whatever its multipliers prove."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lipbounds._text.tables import printable
from lipbounds.errors import CertificateError
from lipbounds.results import GUARANTEES, UpperBound

if TYPE_CHECKING:
    from lipbounds._lipsdp.certificate import Certificate


def bound_of(c: Certificate) -> UpperBound:
    """What a certificate claims, as an `UpperBound` that carries it; ValueError where there is no such bound."""
    return UpperBound(
        c.value,
        c.norm,
        c.guarantee,
        printable(c.method),
        0.0,
        pairwise=c.pairwise,
        per_class=c.per_class,
        certificate=c,
        failure_probability=c.failure_probability,
    )


def check_fields(c: Certificate) -> None:
    """CertificateError for claims that no network can fulfil, before anything is proved."""
    if c.norm not in (2, math.inf):
        raise CertificateError(f"its norm is {c.norm!r}; LipSDP bounds are for norm 2 and inf")
    if c.guarantee not in GUARANTEES[:-1]:
        raise CertificateError(f"its guarantee is {c.guarantee!r}, known are {', '.join(GUARANTEES[:-1])}")
    if not 0.0 <= c.failure_probability < 1.0:
        raise CertificateError(f"its probability of failure is {c.failure_probability}")
    if not 0 <= c.seed < 2**63:
        raise CertificateError(f"its seed is {c.seed}")
    if not c.proofs:
        raise CertificateError("it holds no multipliers")
    k = c.num_outputs
    claims = {"value": (c.value, ()), "pairwise": (c.pairwise, (k, k)), "per_class": (c.per_class, (k,))}
    for name, (claim, shape) in claims.items():
        if claim is None:
            continue
        numbers = np.asarray(claim)
        if numbers.shape != shape:
            raise CertificateError(f"{name} has shape {numbers.shape}, expected {shape}")
        if not np.isfinite(numbers).all() or (numbers < 0.0).any():
            raise CertificateError(f"{name} holds a number that is negative or not finite")
    if c.pairwise is not None and not np.array_equal(c.pairwise, c.pairwise.T):
        raise CertificateError("pairwise is not symmetric")
    try:
        bound_of(c)
    except ValueError as error:
        raise CertificateError(f"its claims are no bound: {error}") from error
    for proof in c.proofs:
        for place, d in enumerate(proof.D):
            if not (np.isfinite(d).all() and (d > 0.0).all()):
                raise CertificateError(f"the multipliers of tap {place} are not all finite and positive")
