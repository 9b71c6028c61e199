"""Small networks with certificates: proofs that are feasible and bounds that carry them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

import lipbounds as lb
from lipbounds._lipsdp import certificate
from lipbounds._lipsdp import proof as _proof
from lipbounds._lipsdp.certificate import Proof
from lipbounds._lipsdp.dense_form import dense_gain
from lipbounds._lipsdp.state_matrices import hybrid_start, sequence
from lipbounds._triangle.recursion import Request
from lipbounds.results import UpperBound

WIDTHS = (5, 8, 7, 4)


def weights(seed: int = 0, widths: tuple[int, ...] = WIDTHS) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((m, n)).astype(np.float32) for n, m in pairwise(widths)]


def network(seed: int = 0, widths: tuple[int, ...] = WIDTHS) -> lb.LureForm:
    return lb.from_weights(weights(seed, widths), activation="relu")


def edge(states: Any, start: tuple[np.ndarray, int] | None = None, p: np.ndarray | None = None) -> Any:
    """Multipliers that are feasible for any network: what `repair` makes of tiny ones, half as much again."""
    tiny = tuple(np.full(s.active.size, 1e-200) for s in states.segments)
    return tuple(1.5 * d for d in _proof.repair(states, tiny, start, p))


def multipliers(form: lb.LureForm, norm: float = 2, start_at: int = 0, kind: str = "sequence") -> Proof:
    if kind == "dense":
        gain = dense_gain(form)
        d = _proof.repair_dense(gain, np.full(gain.Gy.shape[0], 1e-6))
        return Proof(tuple(d[gain.labels == k] for k in range(len(gain.active))), kind="dense")
    p = np.full(form.in_size, float(form.in_size)) if norm == math.inf else None
    if start_at:
        states, s, _, _ = hybrid_start(form, start_at, Request(norm))
        return Proof(edge(states, (s, 0)), start_at)
    return Proof(edge(sequence(form), p=p), 0, p)


def bound_of(form: lb.LureForm, proof: Proof, norm: float = 2, **fields: Any) -> UpperBound:
    found = certificate.proved_constants(form, proof, norm=norm)
    fields = {"guarantee": found.guarantee} | fields
    made = certificate.make_certificate(
        form,
        (proof,),
        value=found.value,
        pairwise=found.pairwise,
        per_class=found.per_class,
        norm=norm,
        **fields,
    )
    return UpperBound(
        value=found.value,
        norm=norm,
        method="lipsdp",
        seconds=0.0,
        pairwise=found.pairwise,
        per_class=found.per_class,
        certificate=made,
        **fields,
    )
