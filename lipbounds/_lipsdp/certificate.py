"""Certificates: what proves a LipSDP bound again, by someone else and however it was found.

A certificate holds inverse multipliers D of every tap and claims: the constant of the network, of pairs, of classes.
`check` rebuilds the state sequence (or the dense form) from the form, carries the ellipsoid through it with every
rounding bounded (`proof`), and compares what that proves with the claims; claims that follow from LipLT are recomputed.
Nothing rests on the stored numbers, on a hash, or on a solver. A probabilistic claim is checked with the seed of the
file, so it trusts whoever made it not to have searched for a lucky seed.

**The file** is a safetensors file of float64 tensors, so that loading runs no code: `proof{i}.D{k}` the inverse
multipliers of segment k, `proof{i}.weights` the weights p of an l-inf input, `pairwise` (K, K), `per_class` (K,).
Its metadata are `format` ("lipbounds-certificate"), `version` ("1"), `header` (JSON: norm, guarantee, method, value as
a hexadecimal float, failure_probability, seed, in_shape, num_outputs, sizes of the taps, network (the digest of the
constants), proofs) and `digest` (sha256 of header and tensors, against accidents).

Claims are `RESERVE` above what was proved when they were made: the last digits of a proof depend on the order in which
a machine sums, and a claim has to hold on all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm, check_weights
from lipbounds._lipsdp import proof as _proof
from lipbounds._lipsdp.certificate_file import is_certificate, pack, read, take, take_float, take_sizes
from lipbounds._lipsdp.chain import chain
from lipbounds._lipsdp.claims import check_fields
from lipbounds._lipsdp.dense_form import DenseGain, dense_gain
from lipbounds._lipsdp.state_matrices import hybrid_start, sequence
from lipbounds._lipsdp.wide_proof import propagate_chain
from lipbounds._norms.between import enlarged, stretch, value_from
from lipbounds._norms.rounding import add_up
from lipbounds._text.calls import FAILURES, public, reason, usual_floats
from lipbounds._text.files import write_atomically
from lipbounds._text.progress import Progress, clock, remaining, say
from lipbounds._text.records import frozen_array, put
from lipbounds._text.tables import counted, show
from lipbounds._text.version import __version__
from lipbounds._triangle.liplt import liplt
from lipbounds._triangle.recursion import Request
from lipbounds.errors import CertificateError
from lipbounds.results import GUARANTEES, NORM_NAMES, Guarantee, UpperBound, check_norm, weakest

KINDS = ("sequence", "dense", "chain")
RESERVE = 1e-9  # relative distance of a claim from what was proved when it was made


@dataclass(frozen=True, eq=False)
class Proof:
    """Multipliers that prove some constants.

    Args:
        D: inverse multipliers, per segment (n_k,); in the dense form per tap. Finite, > 0.
        start_at: the tap where the ellipsoid starts: 0 is the input; k > 0 a proved ellipsoid of the state there.
        weights: (n_in,) the p of an l-inf input; None for l2, whose constants are converted where l-inf is claimed.
        relative: D_i of a sequence is in units of (W S W')_ii (`proof.propagate_sequence`).
        kind: "sequence" (tap after tap), "dense" (one matrix) or "chain" (layers wider than their neighbours first).
    """

    D: tuple[np.ndarray, ...]
    start_at: int = 0
    weights: np.ndarray | None = None
    kind: str = "sequence"
    relative: bool = False

    def __post_init__(self) -> None:
        put(self, "D", tuple(frozen_array(d) for d in self.D))
        if self.weights is not None:
            put(self, "weights", frozen_array(self.weights))


@dataclass(frozen=True)
class Constants:
    """Proved constants: of the network, (K,) of classes, (K, K) of pairs, and how sure they are."""

    value: float
    per_class: np.ndarray = field(repr=False)
    pairwise: np.ndarray = field(repr=False)
    guarantee: str = "verified"
    failure: float = 0.0

    def in_norm(self, norm: float, inputs: int) -> Constants:
        """Constants in another norm than l2, from these in l2."""
        factor = stretch(inputs, 2, norm)
        value = float(enlarged(value_from(self.value, self.per_class, len(self.per_class), 2, norm), factor))
        return replace(
            self,
            value=value,
            per_class=enlarged(self.per_class, factor),
            pairwise=enlarged(self.pairwise, factor),
        )


@dataclass(frozen=True, eq=False)
class Certificate:
    """Claims about one network and what proves them.

    Args:
        proofs: each of them proves constants; the claims are the least of them and of LipLT.
        value, pairwise, per_class: L, L_ij (K, K) or None, L_i (K,) or None.
        norm: 2 or inf.
        guarantee, failure_probability: as in an `UpperBound`.
        method: how the multipliers were found; for people only.
        in_shape, num_outputs, sizes: of the network; sizes are those of the taps of its elementwise view.
        network: `parameter_digest` of the form.
        seed: of probabilistic norms.
    """

    proofs: tuple[Proof, ...]
    value: float
    pairwise: np.ndarray | None
    per_class: np.ndarray | None
    norm: float
    guarantee: str
    method: str
    in_shape: tuple[int, ...]
    num_outputs: int
    sizes: tuple[int, ...]
    network: str
    seed: int = 0
    failure_probability: float = 0.0

    def __post_init__(self) -> None:
        for name in ("pairwise", "per_class"):
            if getattr(self, name) is not None:
                put(self, name, frozen_array(getattr(self, name)))

    def __repr__(self) -> str:
        norm = NORM_NAMES.get(self.norm, self.norm)
        pairs = "" if self.pairwise is None else f", {self.num_outputs} x {self.num_outputs} pairs"
        proofs = counted(len(self.proofs), "proof")
        return f"Certificate(L <= {show(self.value, 'up')} ({norm}), {self.guarantee}, {proofs}{pairs})"


def parameter_digest(form: LureForm) -> str:
    """sha256 over the constants of a form, in any order: the same in every process. Nothing sound rests on it."""
    digests = []
    for leaf in form.consts:
        array = np.asarray(leaf)
        one = hashlib.sha256(f"{array.dtype.name}{array.shape}".encode())
        one.update(np.ascontiguousarray(array).tobytes())
        digests.append(one.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def tap_sizes(form: LureForm) -> tuple[int, ...]:
    """Sizes of the taps of the elementwise view."""
    return tuple(tap.size_out for tap in elementwise_view(form).taps)


def make_certificate(
    form: LureForm,
    proofs: tuple[Proof, ...],
    *,
    value: float,
    pairwise: np.ndarray | None = None,
    per_class: np.ndarray | None = None,
    norm: float = 2,
    guarantee: str = "verified",
    method: str = "lipsdp",
    seed: int = 0,
    failure_probability: float = 0.0,
) -> Certificate:
    """The certificate of proved constants, each claim `RESERVE` above the constant (zero stays zero).

    The constants are those of `proved_constants`, or of LipLT where it is smaller; nothing is proved here.
    """
    return Certificate(
        proofs=tuple(proofs),
        value=float(_reserve(value)),
        pairwise=None if pairwise is None else _reserve(pairwise),
        per_class=None if per_class is None else _reserve(per_class),
        norm=norm,
        guarantee=guarantee,
        method=method,
        in_shape=tuple(int(n) for n in form.in_shape),
        num_outputs=form.num_outputs,
        sizes=tap_sizes(form),
        network=parameter_digest(form),
        seed=int(seed),
        failure_probability=float(failure_probability),
    )


def _reserve(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return np.where(x > 0.0, np.nextafter(x * (1.0 + RESERVE), np.inf), 0.0)


def proved_constants(
    form: LureForm,
    proof: Proof,
    *,
    norm: float = 2,
    guarantee: str = "auto",
    seed: int = 0,
    gain: DenseGain | None = None,
) -> Constants:
    """What one proof shows about a form, every rounding included; `gain` is its dense form where that is known.

    `_proof.Infeasible` where the multipliers prove nothing, ValueError where their shapes are wrong or one is not > 0.
    """
    weights = proof.weights
    if proof.kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {proof.kind!r}")
    if weights is not None and norm == 2:
        raise ValueError("weights belong to norm inf")
    if weights is None and norm != 2:
        square = proved_constants(form, proof, guarantee=guarantee, seed=seed, gain=gain)
        return square.in_norm(norm, form.in_size)
    how, failure = "verified", 0.0
    if proof.kind == "dense":
        if proof.start_at != 0:
            raise ValueError("the dense form starts at the input")
        gain = dense_gain(form) if gain is None else gain
        counts = tuple(active.size for active in gain.active)
        _proof.check_counts(proof.D, counts)
        ellipsoid = _proof.propagate_dense(gain, np.concatenate([np.zeros(0), *proof.D]), weights)
    elif proof.kind == "chain":
        if proof.start_at != 0 or weights is not None:
            raise ValueError("the proof of a chain starts at the input and has no weights")
        own = chain(form)
        _proof.check_counts(proof.D, tuple(active.size for active in own.active))
        ellipsoid = propagate_chain(own, proof.D)
    elif proof.start_at == 0:
        seq = sequence(form)
        _proof.check_counts(proof.D, tuple(segment.active.size for segment in seq.segments))
        ellipsoid = _proof.propagate_sequence(seq, proof.D, weights=weights, relative=proof.relative)
    else:
        if weights is not None:
            raise ValueError("a proof that starts behind the input has no weights")
        seq, s, how, failure = hybrid_start(form, proof.start_at, Request(norm, guarantee, seed))
        _proof.check_counts(proof.D, tuple(segment.active.size for segment in seq.segments))
        ellipsoid = _proof.propagate_sequence(seq, proof.D, start=(s, 0), relative=proof.relative)
    classes = _proof.class_roots(*ellipsoid)
    value = _proof.largest_root(*ellipsoid) if norm == 2 else float(classes.max(initial=0.0))
    how = weakest([how, "assumed"]) if form.assumed else how
    return Constants(value, classes, _proof.pair_roots(*ellipsoid), how, failure)


# --- checking ------------------------------------------------------------------------------------------------------


def check(certificate: Certificate, form: LureForm) -> None:
    """Prove every claim of a certificate for this form again; CertificateError with the reason where that fails.

    TypeError for what is no concrete form.
    """
    if not isinstance(form, LureForm):
        raise TypeError(
            f"a certificate is checked against a LureForm from lb.trace, got {type(form).__name__}"
        )
    if form.is_traced:
        raise TypeError("a certificate is checked against concrete weights, not under jit, grad or vmap")
    try:
        check_weights(form)
    except ValueError as error:
        raise CertificateError(str(error)) from error
    form = replace(form)  # another object: nothing that was kept for the form is used
    c = certificate
    check_fields(c)
    mine = (tuple(int(n) for n in form.in_shape), form.num_outputs, tap_sizes(form))
    if (c.in_shape, c.num_outputs, c.sizes) != mine:
        raise CertificateError(
            f"the certificate is for another architecture: input {c.in_shape}, {c.num_outputs} outputs, taps of size "
            f"{_brief(c.sizes)}; this network has input {mine[0]}, {mine[1]} outputs, taps of size {_brief(mine[2])}"
        )
    if c.network != parameter_digest(form):
        raise CertificateError("the certificate was made for other weights: their digests differ")
    if c.guarantee == "verified":
        return _prove(c, form, "verified")
    try:
        return _prove(c, form, "auto")
    except CertificateError:
        # it may have been made with guarantee="probabilistic", whose norms are other ones
        with contextlib.suppress(CertificateError):
            return _prove(c, form, "probabilistic")
        raise


def _prove(c: Certificate, form: LureForm, request: str) -> None:
    found, began, count = [], clock(), len(c.proofs)
    for number, proof in enumerate(c.proofs):
        say(f"proof {number + 1} of {count}{remaining(began, number, count)}")
        try:
            found.append(proved_constants(form, proof, norm=c.norm, guarantee=request, seed=c.seed))
        except FAILURES as error:
            raise CertificateError(f"proof {number} fails: {reason(error)}") from error
    _compare(c, form, found, request)


def _compare(c: Certificate, form: LureForm, found: list[Constants], request: str) -> None:
    """Every claim is at least what was proved, here or by LipLT, under a guarantee at least as good as claimed."""
    names = ("value", "per_class", "pairwise")
    claims = {name: np.asarray(getattr(c, name)) for name in names if getattr(c, name) is not None}
    proved = {name: np.min([getattr(f, name) for f in found], axis=0) for name in claims}
    guarantee, failure = weakest(f.guarantee for f in found), add_up(*(f.failure for f in found))
    if any(np.any(proved[name] > claims[name]) for name in claims):
        pairs = "pairwise" in claims or "per_class" in claims
        try:
            word = cast(Guarantee, request)
            other = liplt(form, norm=c.norm, pairwise=pairs, guarantee=word, seed=c.seed)
        except FAILURES as error:
            raise CertificateError(f"LipLT, which it needs, fails: {reason(error)}") from error
        guarantee, failure = weakest([guarantee, other.guarantee]), add_up(failure, other.failure_probability)
        for name in claims:
            own, liplts = proved[name], np.asarray(getattr(other, name))
            wrong = np.minimum(own, liplts) > claims[name]
            if np.any(wrong):
                where = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
                place = "".join(f"[{i}]" for i in where)
                raise CertificateError(
                    f"{name}{place} <= {float(claims[name][where])!r} is claimed, but its multipliers prove only "
                    f"{float(own[where])!r}, and LipLT {float(liplts[where])!r}"
                )
    if GUARANTEES.index(guarantee) > GUARANTEES.index(c.guarantee):
        raise CertificateError(f"it claims to be {c.guarantee!r}, what can be shown is {guarantee!r}")
    if failure > c.failure_probability:
        raise CertificateError(
            f"it claims to fail with probability {c.failure_probability:.3g}, what can be shown is {failure:.3g}"
        )


def _brief(sizes: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, sizes[:8])) + (", ..." if len(sizes) > 8 else "") + ")"


@usual_floats
def save_certificate(bound: UpperBound, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the certificate of a bound to a file (format in the module's docstring), atomically.

    Args:
        bound: a bound that carries a certificate, as those of `lb.lipsdp` do.
        path: an older certificate there is replaced.
        overwrite: replace any other file, too.

    Raises:
        TypeError: `bound` is not an UpperBound.
        ValueError: it carries no certificate, or there is another file at `path`.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lb.save_certificate(lb.lipsdp(form), f"{folder}/bound")
        ...     lb.verify_certificate(f"{folder}/bound", form)
        True
    """
    if not isinstance(bound, UpperBound):
        raise TypeError(f"only an UpperBound has a certificate, got {type(bound).__name__}")
    certificate = bound.certificate
    if not isinstance(certificate, Certificate):
        raise ValueError(f"a bound by {bound.method!r} carries no certificate: use one by lb.lipsdp(form)")
    if not bound.value <= certificate.value <= math.nextafter(bound.value * (1.0 + 4.0 * RESERVE), math.inf):
        raise ValueError(
            f"the bound says {bound.value!r}, its certificate {certificate.value!r}: they do not belong together"
        )
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"{target} is a folder")
    if target.exists() and not overwrite and not is_certificate(target):
        raise ValueError(f"{target} exists and is no certificate; overwrite=True replaces it")
    write_atomically(target, pack(_header(certificate), _tensors(certificate)))


def read_certificate(path: str | os.PathLike[str]) -> Certificate:
    """The certificate in a file, its form checked but nothing proved; CertificateError with the reason, OSError."""
    return _certificate(*read(path))


@public
def verify_certificate(path: str | os.PathLike[str], form: LureForm, *, progress: Progress = True) -> bool:
    """True if the file proves its claims for this form, recomputed from the form; CertificateError otherwise.

    Args:
        path: a file that `lb.save_certificate` wrote.
        form: the network, from its weights.
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Raises:
        CertificateError: the reason: not a certificate, cut off, changed, for another network, or not proved.
        OSError: the file cannot be read. TypeError: no concrete form.

    Example:
        >>> import tempfile, lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> other = lb.from_weights([[[9.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lb.save_certificate(lb.lipsdp(form), f"{folder}/bound")
        ...     lb.verify_certificate(f"{folder}/bound", other)
        Traceback (most recent call last):
        lipbounds.errors.CertificateError: the certificate was made for other weights: their digests differ
    """
    check(read_certificate(path), form)
    return True


def _header(c: Certificate) -> dict[str, Any]:
    return {
        "norm": "inf" if c.norm == math.inf else str(c.norm),
        "guarantee": c.guarantee,
        "method": c.method,
        "value": c.value.hex(),
        "failure_probability": c.failure_probability.hex(),
        "seed": c.seed,
        "in_shape": list(c.in_shape),
        "num_outputs": c.num_outputs,
        "sizes": list(c.sizes),
        "network": c.network,
        "proofs": [_record(proof) for proof in c.proofs],
        "pairwise": c.pairwise is not None,
        "per_class": c.per_class is not None,
        "lipbounds": __version__,
    }


def _record(p: Proof) -> dict[str, Any]:
    own = {"kind": p.kind, "start_at": p.start_at, "relative": p.relative}
    return {**own, "taps": len(p.D), "weights": p.weights is not None}


def _tensors(c: Certificate) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    for i, proof in enumerate(c.proofs):
        out |= {f"proof{i}.D{k}": d for k, d in enumerate(proof.D)}
        if proof.weights is not None:
            out[f"proof{i}.weights"] = proof.weights
    for name, array in (("pairwise", c.pairwise), ("per_class", c.per_class)):
        if array is not None:
            out[name] = array
    return out


def _certificate(fields: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> Certificate:
    left = dict(tensors)

    def tensor(name: str) -> np.ndarray:
        if name not in left:
            raise CertificateError(f"it lacks the tensor {name!r}")
        array = left.pop(name)
        if array.dtype != np.float64:
            raise CertificateError(f"the tensor {name!r} has type {array.dtype}, not float64")
        return array

    proofs = []
    for i, record in enumerate(take(fields, "proofs", list)):
        if not isinstance(record, dict):
            raise CertificateError(f"proof {i} in its header is no JSON object")
        taps = take(record, "taps", int)
        weights = tensor(f"proof{i}.weights") if take(record, "weights", bool) else None
        relative = take(record, "relative", bool)
        d = tuple(tensor(f"proof{i}.D{k}") for k in range(taps))
        proofs.append(Proof(d, take(record, "start_at", int), weights, take(record, "kind", str), relative))
    pairwise = tensor("pairwise") if take(fields, "pairwise", bool) else None
    per_class = tensor("per_class") if take(fields, "per_class", bool) else None
    if left:
        raise CertificateError(f"it holds a tensor {min(left)!r} that its header does not name")
    try:
        norm = check_norm(take(fields, "norm", str))
    except ValueError as error:
        raise CertificateError(f"its {error}") from error
    return Certificate(
        proofs=tuple(proofs),
        value=take_float(fields, "value"),
        pairwise=pairwise,
        per_class=per_class,
        norm=norm,
        guarantee=take(fields, "guarantee", str),
        method=take(fields, "method", str),
        in_shape=take_sizes(fields, "in_shape"),
        num_outputs=take(fields, "num_outputs", int),
        sizes=take_sizes(fields, "sizes"),
        network=take(fields, "network", str),
        seed=take(fields, "seed", int),
        failure_probability=take_float(fields, "failure_probability"),
    )
