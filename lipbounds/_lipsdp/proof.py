"""Proofs of LipSDP in floating point: an ellipsoid pushed through a whole network, tap after tap.

With multipliers D the ellipsoid {s: s s' <= S} of all increments over the unit ball of the input is carried through
the state sequence (`tap_proof.advance`), S kept as an exact matrix of floats times a power of four, so that depth
costs no digits. The start is S_0 = A_0 A_0' for |dx|_2 <= 1, and A_0 diag(p) A_0' with sum 1/p_i <= 1 for
|dx|_inf <= 1. The dense form is one step with the state (x, w): S = diag(I, D), A = Gz, W = Gy, B = 0, where (LMI)
says S_out >= Gz Q^-1 Gz', Q = diag(I, T) - Gy' T Gy, T = 1/D.

Everything is float64 on the host, every rounding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import cholesky, eigvalsh, solve_triangular

from lipbounds._lipsdp import tap_proof
from lipbounds._lipsdp.dense_form import DenseGain
from lipbounds._lipsdp.state_matrices import Segment, Sequence
from lipbounds._lipsdp.tap_proof import (
    CEILING,
    FLOOR,
    Infeasible,
    TapMatrices,
    advance,
    prove_psd,
)
from lipbounds._norms.cholesky import TINY, dense_array
from lipbounds._norms.matrices import is_identity
from lipbounds._norms.rounding import (
    U,
    require_gradual_underflow,
    roots_up,
    sqrt_up,
    squared_distances,
    unscale_up,
)

__all__ = [
    "Ellipsoid",
    "Infeasible",
    "ball",
    "class_roots",
    "first_state",
    "largest_root",
    "pair_roots",
    "propagate_dense",
    "propagate_sequence",
    "prove_psd",
    "repair",
    "repair_dense",
]


class Ellipsoid(NamedTuple):
    """All increments s of a state satisfy s s' <= 2**scale * matrix; matrix (d, d) symmetric, or (d,) a diagonal.

    Normalised to a largest entry in [1/4, 1) and an even scale. Entries may have lost less than `TINY` to underflow,
    which everything that uses the matrix covers; a zero on the diagonal is an exact zero.
    """

    matrix: np.ndarray
    scale: int


# --- the whole network ---------------------------------------------------------------------------------------------


def _exponent(x: np.ndarray) -> int:
    """The exponent that brings the largest entry into [1, 2); 0 if all are zero."""
    top = max(float(x.max(initial=0.0)), -float(x.min(initial=0.0)))
    return 0 if top == 0.0 else math.frexp(top)[1] - 1


def _shifted(x: np.ndarray, exponent: int) -> np.ndarray:
    """x * 2**exponent; entries that become denormal lose at most 2**-1074 (part of TINY)."""
    if exponent == 0:
        return x
    with np.errstate(under="ignore"):
        return np.ldexp(x, exponent) if abs(exponent) > 1000 else x * 2.0**exponent


def _lost(before: np.ndarray, after: np.ndarray) -> float:
    """An error that says so where `_shifted` made entries zero: then a zero is not an exact zero."""
    return 0.0 if np.count_nonzero(before) == np.count_nonzero(after) else 2.0**-1000 * math.sqrt(before.size)


def _normalised(s: np.ndarray, scale: int) -> Ellipsoid:
    """The matrix with its largest entry in [1/4, 1) and an even scale."""
    if not np.isfinite(s).all():
        raise ValueError("the bound is above the range of float64; rescale the problem")
    diagonal = s if s.ndim == 1 else s.diagonal()
    top = float(diagonal.max(initial=0.0))
    if top == 0.0:
        return Ellipsoid(np.zeros_like(s), 0)
    exponent = math.frexp(top)[1]
    exponent += (exponent + scale) % 2
    out = _shifted(s, -exponent)
    kept = np.where(diagonal > 0.0, np.maximum(_shifted(diagonal, -exponent), 2.0**-1022), 0.0)
    if s.ndim == 1:
        return Ellipsoid(kept, scale + exponent)
    out = out.copy() if out is s else out
    np.fill_diagonal(out, kept)
    return Ellipsoid(out, scale + exponent)


def _no_neurons(a: np.ndarray, error: float) -> TapMatrices:
    d = a.shape[1]
    return TapMatrices(
        a,
        None,
        np.zeros((0, d)),
        0.0,
        np.array([error]),
        np.zeros((1, 1)),
        np.zeros(0, int),
        np.zeros(d, int),
        error == 0.0,
    )


def _image(state: Ellipsoid, a: Any, error: float) -> Ellipsoid:
    """A S A' for all A within the error, rounded up."""
    matrix = dense_array(a)
    if error == 0.0 and is_identity(matrix):
        return state
    shift = _exponent(matrix)
    scaled = _shifted(matrix, -shift)
    tap = _no_neurons(scaled, float(unscale_up(error, -shift)) + _lost(matrix, scaled))
    s, _ = advance(state.matrix, tap, np.zeros(0), 0, False)
    return _normalised(s, state.scale + 2 * shift)


def ball(n: int, weights: np.ndarray | None = None) -> np.ndarray:
    """(n,) the diagonal of an ellipsoid that holds the unit ball: ones for l2, weights p, sum 1/p_i <= 1, for l-inf.

    |dx|_inf <= 1 gives sum dx_i^2 / p_i <= 1. Weights whose inverses sum to more than 1 are raised until they do not.
    """
    if weights is None:
        return np.ones(n)
    p = np.asarray(weights, np.float64)
    if p.shape != (n,):
        raise ValueError(f"weights have shape {p.shape}, expected ({n},)")
    if not (np.isfinite(p).all() and (p > 0.0).all()):
        raise ValueError("weights must be finite numbers > 0")
    if p.max() >= CEILING or p.min() <= FLOOR:
        raise ValueError("weights must lie between 2**-200 and 2**200")
    total = math.nextafter(math.fsum(np.nextafter(1.0 / p, np.inf)), math.inf)
    return p if total <= 1.0 else np.nextafter(p * total, np.inf)


def first_state(seq: Sequence, weights: np.ndarray | None = None) -> Ellipsoid:
    """S_0 of a sequence: all A_0 dx with |dx|_2 <= 1 (or |dx|_inf <= 1, for weights p) lie in it."""
    require_gradual_underflow()
    start = seq.start
    return _image(_normalised(ball(start.shape[1], weights), 0), *start.with_error())


def _scaled_tap(segment: Segment, keep: np.ndarray | None) -> tuple[TapMatrices, int, int]:
    """(tap, to_y, to_s): W = 2**to_y tap.w, A = 2**to_s tap.a, B = 2**(to_s - to_y) tap.b; only the neurons `keep`."""
    (a, e_a), (b, e_b), (w, e_w) = (m.with_error() for m in (segment.A, segment.B, segment.W))
    a, b, w = dense_array(a), dense_array(b), dense_array(w)
    if keep is not None:
        b, w = b[:, keep], w[keep]
    to_y = _exponent(w)
    sizes = [_exponent(a)] * bool(a.any()) + [_exponent(b) + to_y] * bool(b.any())
    to_s = max(sizes, default=0)
    moves = (-to_s, to_y - to_s, -to_y)
    before = (a, b, w)
    a, b, w = (_shifted(m, e) for m, e in zip(before, moves, strict=True))
    errors = [
        float(unscale_up(e, move)) + _lost(x, y)
        for e, move, x, y in zip((e_a, e_b, e_w), moves, before, (a, b, w), strict=True)
    ]
    groups = np.zeros(w.shape[0], int), np.zeros(w.shape[1], int)
    of_a, of_w = np.array([errors[0]]), np.array([[errors[2]]])
    return TapMatrices(a, b, w, errors[1], of_a, of_w, *groups, not any(errors)), to_y, to_s


def _check_multipliers(d: Any, count: int, place: int) -> np.ndarray:
    values = np.asarray(d, np.float64)
    if values.shape != (count,):
        raise ValueError(f"tap {place} needs {count} multipliers, got an array of shape {values.shape}")
    if not (np.isfinite(values).all() and (values > 0.0).all()):
        raise ValueError(f"the multipliers of tap {place} must be finite numbers > 0")
    return values


def _run(
    seq: Sequence,
    multipliers: Seq[np.ndarray],
    start: tuple[np.ndarray, int] | None,
    weights: Any,
    relative: bool,
    fix: bool,
) -> tuple[Ellipsoid, tuple[np.ndarray, ...]]:
    require_gradual_underflow()
    if len(multipliers) != len(seq.segments):
        raise ValueError(
            f"the sequence has {len(seq.segments)} taps, the multipliers are for {len(multipliers)}"
        )
    used = [
        _check_multipliers(d, s.active.size, k)
        for k, (d, s) in enumerate(zip(multipliers, seq.segments, strict=True))
    ]
    if start is not None and weights is not None:
        raise ValueError("weights belong to the input of the network, not to a given ellipsoid")
    if start is None:
        state = first_state(seq, weights)
    else:
        state = _image(_given(start, seq.start.shape[1]), *seq.start.with_error())
    for k, segment in enumerate(seq.segments):
        if not state.matrix.any():  # nothing moves here, nor behind
            state = Ellipsoid(np.zeros((seq.widths[k + 1],) * 2), 0)
            continue
        s, keep, w = state.matrix, None, segment.W.exact_or_none()
        if w is not None:
            moving = s != 0.0 if s.ndim == 1 else s.diagonal() != 0.0
            alive = (dense_array(w) != 0.0) @ moving.astype(float) > 0.0  # the others have y = 0, hence w = 0
            keep = None if alive.all() else alive
        tap, to_y, to_s = _scaled_tap(segment, keep)
        units = state.scale + 2 * to_y - 2 * (segment.units if keep is None else segment.units[keep])
        mine = used[k] if keep is None else used[k][keep]
        own = _variances(s, tap.w) if relative else np.ones(mine.size)
        with np.errstate(over="ignore", under="ignore"):
            scaled = mine * own if relative else np.ldexp(mine, -units)
        if not fix and scaled.size and not (scaled.max() < CEILING and scaled.min() > 0.0):
            raise Infeasible(k, "they are not of the size of the pre-activations")
        s, d = advance(s, tap, np.minimum(scaled, CEILING / 2), k, fix)
        if fix:
            with np.errstate(over="ignore", under="ignore"):
                back = d / own if relative else np.ldexp(d, units)
            new = used[k].copy()
            new[slice(None) if keep is None else keep] = back
            used[k] = _check_multipliers(np.maximum(new, 2.0**-1022), new.size, k)
        state = _normalised(s, state.scale + 2 * to_s)
    matrix = np.diag(state.matrix) if state.matrix.ndim == 1 else state.matrix
    return Ellipsoid(matrix, state.scale), tuple(used)


def _variances(s: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The diagonal of W S W', rounded somehow and > 0: it only chooses the units of D."""
    found = np.sum((w * s if s.ndim == 1 else w @ s) * w, axis=1)
    return np.maximum(found, max(float(found.max(initial=0.0)) * 1e-30, FLOOR))


def _given(start: tuple[np.ndarray, int], width: int) -> Ellipsoid:
    s, scale = np.asarray(start[0], np.float64), int(start[1])
    if s.shape not in ((width, width), (width,)):
        raise ValueError(f"the sequence begins with {width} entries, their ellipsoid has shape {s.shape}")
    if s.ndim == 2 and not np.array_equal(s, s.T):
        raise ValueError("the ellipsoid that the sequence begins with must be symmetric")
    return _normalised(s, scale)


def propagate_sequence(
    seq: Sequence,
    D: Seq[np.ndarray],
    start: tuple[np.ndarray, int] | None = None,
    weights: np.ndarray | None = None,
    *,
    relative: bool = False,
) -> Ellipsoid:
    """(S_out, scale): every output increment over the unit input ball satisfies dz dz' <= 2**scale S_out; proved.

    Args:
        seq: from `lipbounds._lipsdp.state_matrices.sequence`.
        D: per segment the inverse multipliers, (n_k,), finite > 0, in the units of W S W'.
        start: an ellipsoid (S, scale) that was proved elsewhere of the x in s_0 = A_0 x, (n, n) or a diagonal (n,).
        weights: p (n_in,) for inputs in the l-inf norm; None is l2.
        relative: D_i is in units of (W S W')_ii, with S the ellipsoid proved here. Any D > 0 is valid; with D fixed
            every rounding of S would grow at every tap behind, this way it only adds up.

    Raises:
        Infeasible: D is too small at a tap (`.place`), or too near to it for float64.
        ValueError: D of other shapes or not positive, or a result beyond float64.
    """
    return _run(seq, D, start, weights, relative, fix=False)[0]


def repair(
    seq: Sequence,
    D: Seq[np.ndarray],
    start: tuple[np.ndarray, int] | None = None,
    weights: np.ndarray | None = None,
    *,
    relative: bool = False,
) -> tuple[np.ndarray, ...]:
    """D with the taps that `propagate_sequence` calls infeasible scaled up by just enough, tap after tap."""
    return _run(seq, D, start, weights, relative, fix=True)[1]


# --- the dense form ------------------------------------------------------------------------------------------------


def propagate_dense(gain: DenseGain, D: np.ndarray, weights: np.ndarray | None = None) -> Ellipsoid:
    """(S_out, scale) of the dense form with the inverse multipliers D (N,) of the network: one (LMI) of size N + K.

    S = diag(p, D), A = Gz, W = Gy, so S_out >= Gz Q^-1 Gz'. Arguments and errors as in `propagate_sequence`.
    """
    require_gradual_underflow()
    count = gain.Gy.shape[0]
    d = _check_multipliers(gain.inner(_check_multipliers(D, count, 0)), count, 0)
    (gy, e_y), (gz, e_z) = gain.Gy.with_error(), gain.Gz.with_error()
    gy, gz = dense_array(gy), dense_array(gz)
    scale = _exponent(d) if count else 0
    to_y, to_z = _exponent(gy), _exponent(gz)
    diagonal = np.concatenate([ball(gain.n, weights), d])
    with np.errstate(over="ignore", under="ignore"):
        s, own = np.ldexp(diagonal, -scale), np.ldexp(d, -scale - 2 * to_y)
        kept = np.array_equal(np.ldexp(s, scale), diagonal) and np.array_equal(
            np.ldexp(own, scale + 2 * to_y), d
        )
    if not kept or s.max() >= CEILING or own.max(initial=0.0) >= CEILING:
        raise Infeasible(0, "they span more than the range of float64")
    errors, taps = gain.block_errors, gain.block_errors.shape[0] - 1
    e = np.array(
        [[float(unscale_up(x, -(to_y if k < taps else to_z))) for x in row] for k, row in enumerate(errors)]
    )
    small_y, small_z = _shifted(gy, -to_y), _shifted(gz, -to_z)
    lost = _lost(gy, small_y) + _lost(gz, small_z)
    e = e + lost
    columns = np.concatenate([np.zeros(gain.n, int), gain.labels + 1])
    tap = TapMatrices(
        small_z,
        None,
        small_y,
        0.0,
        e[-1],
        e[:-1].reshape(taps, taps + 1),
        gain.labels,
        columns,
        not errors.any() and e_y == e_z == lost == 0.0,
    )
    out, _ = advance(s, tap, own, 0, False)
    return _normalised(out, scale + 2 * to_z)


def repair_dense(gain: DenseGain, D: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """D (N,), or, where `propagate_dense` calls it infeasible, D with the taps scaled up where Q(T) > 0 fails.

    Of a few factors above the edge of feasibility the one whose proof gives the smallest S_out; Infeasible if none
    has a proof.
    """
    try:
        propagate_dense(gain, D, weights)
        return np.asarray(D, np.float64)
    except Infeasible as error:
        failed = error
    best, smallest = None, math.inf
    for growth in (1e-7, 1e-5, 1e-3, 1e-2, 0.1, 0.5, 1.0):
        try:
            tried = _raised_dense(gain, D, ball(gain.n, weights), growth)
            matrix, scale = propagate_dense(gain, tried, weights)
        except (Infeasible, np.linalg.LinAlgError):
            continue
        size = math.log2(max(float(np.trace(matrix)), TINY)) + scale
        if size < smallest:
            best, smallest = tried, size
    if best is None:
        raise failed
    return best


def _raised_dense(gain: DenseGain, D: np.ndarray, unit: np.ndarray, growth: float) -> np.ndarray:
    """D with every tap where Q(T) > 0 fails (nearly) scaled to (1 + growth) times the edge; plain float64."""
    d, gy, n = np.array(gain.inner(D), np.float64), dense_array(gain.Gy.midpoint_for_search()), gain.n
    lower = np.zeros((0, 0))  # Cholesky factor of D - Gy diag(p, D) Gy' on the taps so far
    for k in range(len(gain.active)):
        mine = np.flatnonzero(gain.labels == k)
        if mine.size == 0:
            continue
        before = mine[0]
        rows = gy[: mine[-1] + 1, : n + before]
        product = (rows[mine] * np.concatenate([unit, d[:before]])) @ rows.T
        cross = np.zeros((0, mine.size))
        if before:
            cross = solve_triangular(lower, -product[:, :before].T, lower=True)
        sy = product[:, before:] + cross.T @ cross
        root = 1.0 / np.sqrt(d[mine])
        top = float(eigvalsh(root[:, None] * sy * root)[-1])
        d[mine] *= max(1.0, top * (1.0 + growth))
        corner = cholesky(np.diag(d[mine]) - sy, lower=True)
        lower = np.block([[lower, np.zeros((before, mine.size))], [cross.T, corner]])
    return gain.outer(d)


def check_counts(D: tuple[np.ndarray, ...], counts: tuple[int, ...]) -> None:
    """ValueError unless there are as many multipliers as active neurons, tap by tap."""
    if len(D) != len(counts):
        raise ValueError(f"it holds multipliers of {len(D)} taps, the network has {len(counts)}")
    for k, (d, count) in enumerate(zip(D, counts, strict=True)):
        if d.shape != (count,):
            raise ValueError(f"tap {k} has {count} active neurons, it holds {d.shape} multipliers for them")


# --- constants from the last ellipsoid -----------------------------------------------------------------------------


def largest_root(matrix: np.ndarray, scale: int) -> float:
    """A proved upper bound of sqrt(2**scale lambda_max(S)), S (K, K): t I - S >= 0 by Cholesky. Scale even."""
    count = matrix.shape[0]
    if not matrix.any():
        return 0.0
    top = float(eigvalsh(matrix)[-1])
    c = tap_proof.cholesky_shift(count)
    for growth in (0.0, 1e-12, 1e-10, 1e-8, 1e-6, 1e-3, 1.0, float(count)):
        t = top * (1.0 + growth) * (1.0 + 2.0 * c + 16.0 * U)
        gap = -matrix
        gap.flat[:: count + 1] = t - matrix.diagonal()
        if prove_psd(gap, 2.0 * U * t + TINY):
            return float(unscale_up(sqrt_up(t), _half(scale)))
    raise ValueError("the largest eigenvalue of the output ellipsoid could not be bounded in float64")


def _half(scale: int) -> int:
    if scale % 2:
        raise ValueError("the scale of an ellipsoid must be even")
    return scale // 2


def class_roots(matrix: np.ndarray, scale: int) -> np.ndarray:
    """(K,) upper bounds of sqrt(2**scale S_ii): constants of the single outputs."""
    d = matrix.diagonal()
    return unscale_up(np.where(d > 0.0, roots_up(d), 0.0), _half(scale))


def pair_roots(matrix: np.ndarray, scale: int) -> np.ndarray:
    """(K, K) upper bounds of sqrt(2**scale (e_i - e_j)' S (e_i - e_j)), zero diagonal."""
    d = matrix.diagonal()
    both = d[:, None] + d[None, :]
    root = np.where(both > 0.0, roots_up(squared_distances(both, matrix)), 0.0)
    np.fill_diagonal(root, 0.0)
    return unscale_up(np.maximum(root, root.T), _half(scale))
