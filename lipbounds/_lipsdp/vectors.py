"""LipSDP by running the network on vectors: the search for multipliers of the dense form.

The dual of (LMI) in `dense_form` is: the largest tr(Gz X Gz') over X >= 0 with trace(X_xx) <= 1 and, for every neuron,
E w_i^2 <= E y_i^2, where (y, z) = G (x, w) and E is the second moment that X describes. With X = V V' the entries of
x and w become vectors of R^r,

    y = Gy (x, w),    w_i = |y_i| u_i,  |u_i| = 1,    |x|_F = 1,    value = |Gz (x, w)|_F^2

and x and the u_i are free: a smooth function on spheres, whose every value is a lower bound of rho. Its multipliers
come with the gradient, T_i = <u_i, d value / 2 d w_i> / |y_i|, and where A(T, value) >= 0 both are the optimum, so
rho(T) - value bounds the error (Burer and Monteiro, Mathematical Programming 2003; with r above the rank of X second
order points are global: Boumal, Voroninski and Bandeira, NeurIPS 2016).

L-BFGS climbs, preconditioned by the curvature of every sphere; near the optimum T leaves A(T, rho) with eigenvalues
slightly below 0, which `corrected` lifts. Several outputs C z of one network are climbed as one batch, as the products
then have more columns. Plain float64: whatever is found is proved elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy.linalg as sl

from lipbounds._lipsdp.matrix_inequality import Prepared, levels, live_neurons, prepare, smallest_rho
from lipbounds._text.progress import say

_RANK, _MORE = 8, 4  # columns r at first, and how many are added where they do not suffice
_MEMORY = 10
_ITERATIONS = 500
_NEAR = (3e-8, 1e-9, 1e-10, 1e-10)  # error of T at which it is worth correcting, round after round
_FLAT = 1e-8  # least curvature of a unit sphere that counts, relative to the largest
_LOW = 0.05  # eigenvalues of A, its diagonal scaled to 1, that a correction holds
_LEAST = 1e-12  # of |y_i|^2 and |U_i|^2, over N: where y_i is 0 at the optimum, T_i stays finite
_TINY = 1e-300
_QUIET = 2.0  # seconds without a word
TOLERANCE = 1e-8  # of rho


class Optimum(NamedTuple):
    """tau of a prepared problem, the steps taken, and (rho - optimum) / optimum at most (in float64, not proved)."""

    tau: np.ndarray
    steps: int
    gap: float


class _Point(NamedTuple):
    """A batch of P points: U (m, P, r) are vectors of any length, the others belong to it.

    value (P,); slope (m, P, r) of -log value; curvature (m, P): that of every sphere by size, never near 0;
    T (N, P); V (m, P, r) = (x, w).
    """

    U: np.ndarray
    value: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray
    T: np.ndarray
    V: np.ndarray

    def of(self, some: np.ndarray) -> _Point:
        """The points `some` (indices or booleans) of the batch."""
        return _Point(*(a[some] if a.ndim == 1 else a[:, some] for a in self))

    @property
    def error(self) -> np.ndarray:
        """(P,) about the relative error of T."""
        return np.sqrt(np.einsum("ipr,ipr,ip->p", self.slope, self.slope, 1 / self.curvature))


def _dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("ipr,ipr->p", a, b)


class Vectors:
    """The function of a prepared problem; neurons in the order of their levels."""

    def __init__(self, problem: Prepared):
        self.n, self.N, self.tied = problem.n, len(problem.Gy), problem.tie is not None
        label = levels(problem.Gy[:, self.n :]) if problem.tie is None else problem.tie
        self.order = np.argsort(label, kind="stable")
        ends = np.cumsum(np.bincount(label))
        self.parts = [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        columns = np.concatenate([np.arange(self.n), self.n + self.order])
        self.Gy, self.Gz = problem.Gy[np.ix_(self.order, columns)], problem.Gz[:, columns]
        self.rows = [np.ascontiguousarray(self.Gy[q, : self.n + q.start]) for q in self.parts]

    def _norms(self, vectors: np.ndarray) -> np.ndarray:
        """(k, P): of each vector, or of all vectors of a layer whose multipliers are tied."""
        squares = np.einsum("ipr,ipr->ip", vectors, vectors) + _LEAST / max(self.N, 1)
        return np.sqrt(np.broadcast_to(squares.sum(axis=0), squares.shape) if self.tied else squares)

    def at(self, U: np.ndarray, Q: np.ndarray) -> _Point:
        """The points U, for the objectives z'Q z, Q (P, K, K)."""
        n, m, (P, r) = self.n, len(U), U.shape[1:]
        size, V, Y = np.empty((m, P)), np.empty_like(U), np.empty((self.N, P, r))
        reach, along = np.ones((m, P)), np.empty((m, P))  # |y_i|, and the derivative along u_i
        size[:n] = np.sqrt(np.einsum("ipr,ipr->p", U[:n], U[:n]))
        for q in self.parts:
            size[n + q.start : n + q.stop] = self._norms(U[n + q.start : n + q.stop])
        unit = U / np.maximum(size, _TINY)[:, :, None]
        V[:n] = unit[:n]
        for q, rows in zip(self.parts, self.rows, strict=True):
            w = slice(n + q.start, n + q.stop)
            Y[q] = (rows @ V[: n + q.start].reshape(-1, P * r)).reshape(-1, P, r)
            reach[w] = self._norms(Y[q])
            np.multiply(unit[w], reach[w][:, :, None], out=V[w])
        z = (self.Gz @ V.reshape(m, P * r)).reshape(-1, P, r)
        weighed = np.ascontiguousarray((Q @ z.transpose(1, 0, 2)).transpose(1, 0, 2))
        value = _dots(z, weighed)
        back = (self.Gz.T @ weighed.reshape(-1, P * r)).reshape(m, P, r)
        T = np.empty((self.N, P))
        for q, rows in zip(reversed(self.parts), reversed(self.rows), strict=True):
            w = slice(n + q.start, n + q.stop)
            ahead = np.einsum("ipr,ipr->ip", back[w], unit[w])
            along[w] = ahead.sum(axis=0) if self.tied else ahead
            T[q] = along[w] / np.maximum(reach[w], _TINY)
            back[: n + q.start] += (rows.T @ (Y[q] * T[q][:, :, None]).reshape(-1, P * r)).reshape(-1, P, r)
        along[:n] = _dots(back[:n], unit[:n])
        back -= along[:, :, None] * unit
        share = 2 * reach / np.maximum(size * value, _TINY)
        back *= -share[:, :, None]
        # Where u_i points away from what it should, `along` < 0 and the sphere is curved the other way. Its size still
        # says how far to go; with 0 in its place u_i would be thrown so far that it never came back.
        bend = np.abs(along * share) * size
        bend = np.maximum(bend, _FLAT * bend.max(axis=0) + _TINY)
        return _Point(U, value, back, bend / np.maximum(size, _TINY) ** 2, T, V)


# --- the ascent ----------------------------------------------------------------------------------------------------


class _Memory:
    """L-BFGS for a batch; the inverse curvatures are its first guess of the inverse Hessian."""

    def __init__(self) -> None:
        self.moves: list[np.ndarray] = []
        self.changes: list[np.ndarray] = []
        self.inverse: list[np.ndarray] = []  # 1 / <step, change>, or 0 where a pair says nothing

    def keep(self, some: np.ndarray) -> None:
        self.moves = [a[:, some] for a in self.moves]
        self.changes = [a[:, some] for a in self.changes]
        self.inverse = [a[some] for a in self.inverse]

    def add(self, step: np.ndarray, change: np.ndarray) -> None:
        both = _dots(step, change)
        good = both > 1e-10 * np.sqrt(_dots(step, step) * _dots(change, change))
        self.moves.append(step)
        self.changes.append(change)
        self.inverse.append(np.where(good, 1 / np.where(good, both, 1), 0))
        del self.moves[:-_MEMORY], self.changes[:-_MEMORY], self.inverse[:-_MEMORY]

    def direction(self, point: _Point) -> np.ndarray:
        """H slope, H about the inverse Hessian."""
        found, first = point.slope.copy(), 1 / point.curvature
        shares = []
        for s, y, inverse in zip(
            *(reversed(a) for a in (self.moves, self.changes, self.inverse)), strict=True
        ):
            shares.append(inverse * _dots(s, found))
            found -= shares[-1][:, None] * y
        if self.moves:
            y, inverse = self.changes[-1], self.inverse[-1]
            scale = inverse * _dots(y * first[:, :, None], y)
            first = first / np.where(scale > 0, scale, 1)
        found *= first[:, :, None]
        for s, y, inverse in zip(self.moves, self.changes, self.inverse, strict=True):
            found += (shares.pop() - inverse * _dots(y, found))[:, None] * s
        return found


def _climbed(vectors: Vectors, Q: np.ndarray, start: _Point, error: float) -> tuple[_Point, int]:
    """The batch after L-BFGS, each point until its T has about the given error."""
    point, done = start, start
    where, memory, steps, began = np.arange(len(Q)), _Memory(), 0, time.monotonic()
    while True:
        open_ = (point.error > error) & (point.value > 0) & np.isfinite(point.value)
        if steps == _ITERATIONS:
            open_[:] = False
        if not open_.all():
            ended = where[~open_]
            done = _Point(*(_put(a, ended, b) for a, b in zip(done, point.of(~open_), strict=True)))
            where, point = where[open_], point.of(open_)
            memory.keep(open_)
            if not where.size:
                return done, steps
        moved = _line(vectors, Q[where], point, memory.direction(point))
        memory.add(moved.U - point.U, moved.slope - point.slope)
        point, steps = moved, steps + 1
        if steps % 50 == 0 and time.monotonic() - began > _QUIET:
            say(f"{steps} steps, {where.size} of {len(Q)} problems to go, error {point.error.max():.1e}")


def _put(whole: np.ndarray, at: np.ndarray, part: np.ndarray) -> np.ndarray:
    whole = whole.copy()
    if whole.ndim == 1:
        whole[at] = part
    else:
        whole[:, at] = part
    return whole


def _line(vectors: Vectors, Q: np.ndarray, point: _Point, direction: np.ndarray) -> _Point:
    """The batch moved against `direction` by the first step that climbs enough, if any does."""
    gain = _dots(point.slope, direction)
    plain = point.slope / point.curvature[:, :, None]
    turned = ~(gain > 0)
    direction = np.where(turned[:, None], plain, direction)
    gain = np.where(turned, _dots(point.slope, plain), gain)
    length = np.ones(len(gain))
    for _ in range(12):
        moved = vectors.at(point.U - length[:, None] * direction, Q)
        with np.errstate(divide="ignore"):
            enough = np.log(moved.value) >= np.log(point.value) + 1e-4 * length * gain - 1e-14
        if enough.all():
            return moved
        length = np.where(enough, length, 0.3 * length)
    return vectors.at(point.U - np.where(enough, length, 0)[:, None] * direction, Q)


# --- multipliers ---------------------------------------------------------------------------------------------------


def corrected(
    vectors: Vectors, C: np.ndarray, T: np.ndarray, value: float, V: np.ndarray, tolerance: float
) -> tuple[np.ndarray, float]:
    """(T, rho): T changed by as little as makes A(T, rho) >= 0, for the outputs C z.

    In units where A has diagonal 1, Z spans its eigenvectors of eigenvalues near 0, among them those of V. To first
    order Z' A Z depends linearly on the relative changes of T and rho; the smallest change that lifts eigenvalues
    below `_lift` there, and keeps the others, is taken, a few times. As X = V V' is orthogonal to dA/dT this leaves rho
    at `value`. Where it does not do, or multipliers are few, T is moved towards the inside instead. rho is inf where T
    or `value` is not in the range of floats.
    """
    n, Gy, rows, count = vectors.n, vectors.Gy, C @ vectors.Gz, len(T)
    if not (np.isfinite(T).all() and 0 < value < math.inf):
        return np.ones(count), math.inf
    T = np.maximum(T, T.max(initial=_TINY) * 1e-15)
    raw, best, rho, Z = T, (T, math.inf), value, None
    most = int(math.sqrt(count))  # eigenvectors, with about half as many conditions as there are multipliers
    lift = _lift(n + count)
    for _ in range(3):
        root = np.sqrt(np.concatenate([np.full(n, rho), T]))
        scaled = np.concatenate([root[n:, None] * Gy, rows]) / root
        A = -(scaled.T @ scaled)
        A.flat[:: n + count + 1] += 1
        if Z is None:
            extra = np.random.default_rng(1).standard_normal((n + count, 6))
            Z = np.linalg.qr(np.concatenate([V * root[:, None], 1e-3 * extra], axis=1))[0]
        eigen = _low_eigenvectors(A, Z)
        if eigen is None:
            break
        low, Z = eigen
        some = (low < _LOW) & (np.arange(low.size) < most)
        change = _lifting(vectors, T, rho, Z[:, some] / root[:, None], np.maximum(lift - low[some], 0))
        T = T * np.clip(1 + change[:-1], 0.5, 2.0)
        found = smallest_rho(Gy, rows, n, T)
        if found < best[1]:
            best = (T, found)
        if found <= value * (1 + tolerance):
            break
        rho = min(max(rho * (1 + change[-1]), value), found)
    if best[1] > value * (1 + tolerance):
        # The start of the prepared problem, T = 1, lies inside for all outputs z, so |C|^2 does for C z.
        inside = float(np.linalg.norm(C, 2)) ** 2
        for share in np.logspace(-10, 0, 21):
            mixed = (1 - share) * raw + share * inside
            found = smallest_rho(Gy, rows, n, mixed)
            if found < best[1]:
                best = (mixed, found)
            elif best[1] < math.inf:
                break
    return best


def _lift(size: int) -> float:
    """Least eigenvalue of A, of unit diagonal, that a proof by Cholesky in float64 can do with."""
    return max(1e-10, 1e-15 * size**2)


def _low_eigenvectors(A: np.ndarray, Z: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Eigenvalues near 0 and their eigenvectors: inverse iteration from the columns Z. None where A is far below 0."""
    shift = 1e-8
    while True:
        shifted = A.copy()
        shifted.flat[:: len(A) + 1] += shift
        factor, fail = sl.lapack.dpotrf(shifted, lower=1, overwrite_a=1)
        if not fail:
            break
        if not shift < 1e3:
            return None
        shift *= 4
    for _ in range(3):
        Z = np.linalg.qr(sl.cho_solve((factor, True), Z, check_finite=False))[0]
    low, turn = np.linalg.eigh(Z.T @ A @ Z)
    return low, Z @ turn


def _lifting(vectors: Vectors, T: np.ndarray, rho: float, W: np.ndarray, raise_by: np.ndarray) -> np.ndarray:
    """(N + 1,): the least relative changes of T, of a layer together where tied, and of rho that add diag(raise_by)."""
    n = vectors.n
    a, b = np.triu_indices(len(raise_by))
    y = vectors.Gy @ W
    each = T[:, None] * (W[n:, a] * W[n:, b] - y[:, a] * y[:, b])
    if vectors.tied:
        each = np.stack([each[q].sum(axis=0) for q in vectors.parts])
    whole = np.concatenate([each, rho * (W[:n, a] * W[:n, b]).sum(axis=0)[None]])
    change = np.linalg.lstsq(whole.T, np.where(a == b, raise_by[a], 0.0), rcond=1e-12)[0]
    if vectors.tied:
        sizes = [q.stop - q.start for q in vectors.parts]
        change = np.append(np.repeat(change[:-1], sizes), change[-1])
    return change


# --- together ------------------------------------------------------------------------------------------------------


class DenseSolution(NamedTuple):
    """T (N,) and rho of (LMI); steps of L-BFGS; `gap` bounds rho - optimum in float64 (not proved)."""

    T: np.ndarray
    rho: float
    iterations: int
    gap: float


def solve_dense(
    Gy: np.ndarray, Gz: np.ndarray, n: int, layers: np.ndarray | None = None, *, tolerance: float = TOLERANCE
) -> DenseSolution:
    """Minimise rho over (LMI): `solve_all` for the outputs Gz (x, w)."""
    return solve_all(Gy, Gz, n, [np.eye(len(Gz))], layers, tolerance=tolerance)[0]


def solve_all(
    Gy: np.ndarray,
    Gz: np.ndarray,
    n: int,
    outputs: Sequence[np.ndarray],
    layers: np.ndarray | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> list[DenseSolution]:
    """Minimise rho over (LMI) for each of the outputs C z, C (k, K), of one network.

    Args:
        Gy, Gz, n: as in (LMI), plain arrays (see `dense_form.reduce_input`).
        outputs: one C each.
        layers: (N,) ints, neurons of one label share a multiplier; None gives each neuron its own.
        tolerance: relative gap to stop at.

    rho is the smallest one for T; T is feasible also where the gap stays above `tolerance`. If no path leads from x
    through a neuron to the output, T is 1. An output of several for which no multipliers are found in float64 has T = 1
    and rho = inf, and leaves the others as they are.
    ValueError for wrong shapes, values that are not finite, cycles.
    """
    whole = prepare(Gy, Gz, n, layers)
    Gy, Gz, layers = whole.whole
    found: list[DenseSolution | None] = [None] * len(outputs)
    together = []
    for k, C in enumerate(outputs):
        if np.array_equal(live_neurons(Gy, C @ Gz, n, layers), whole.live):
            together.append(k)
        else:
            found[k] = _apart(Gy, C @ Gz, n, layers, tolerance)
    solved = [Optimum(np.ones(0), 0, 0.0)] * len(together)
    if whole.size and together:
        solved = optimise(whole, [outputs[k] for k in together], tolerance)
    for k, one in zip(together, solved, strict=True):
        C = outputs[k]
        T, rho = replace(whole, Gz=C @ whole.Gz, whole=(Gy, C @ Gz, layers)).multipliers(one.tau)
        found[k] = DenseSolution(T, rho, one.steps, one.gap * rho)
    return [one for one in found if one is not None]


def _apart(
    Gy: np.ndarray, Gz: np.ndarray, n: int, layers: np.ndarray | None, tolerance: float
) -> DenseSolution:
    """Of one output whose idle neurons are not those of the others."""
    try:
        return solve_dense(Gy, Gz, n, layers, tolerance=tolerance)
    except ValueError:  # of this output: the weights themselves have been checked
        return DenseSolution(np.ones(len(Gy)), math.inf, 0, math.inf)


def optimise(problem: Prepared, outputs: Sequence[np.ndarray], tolerance: float) -> list[Optimum]:
    """Multipliers of a prepared problem for each of the outputs C z, C (k, K), every one with a neuron before it.

    Climbs, corrects T, and goes on with the outputs whose gap is above `tolerance`: more exactly, then with more
    columns.
    """
    vectors = Vectors(problem)
    m, count = vectors.n + vectors.N, len(outputs)
    Q = np.stack([C.T @ C for C in outputs])
    start = np.random.default_rng(0).standard_normal((m, count, _RANK))
    point, open_ = vectors.at(start, Q), np.arange(count)
    tau, gap = np.ones((vectors.N, count)), np.full(count, math.inf)
    steps = np.zeros(count, int)
    for turn, error in enumerate(_NEAR):
        point, done = _climbed(vectors, Q[open_], point, error)
        steps[open_] += done
        for place, k in enumerate(open_):
            value = float(point.value[place] - point.T[:, place].sum() * _LEAST / vectors.N)
            T, rho = corrected(
                vectors, outputs[int(k)], point.T[:, place], value, point.V[:, place], tolerance
            )
            excess = max(rho / value - 1, 0.0) if value > 0 else math.inf
            if excess < gap[k]:
                gap[k], tau[vectors.order, k] = excess, T
        left = gap[open_] > (10 * tolerance if turn else tolerance)
        open_, U = open_[left], point.U[:, left]
        if not open_.size:
            break
        if turn:
            more = np.random.default_rng(turn).standard_normal((m, open_.size, _MORE))
            U = np.concatenate([U, 0.1 * more * np.sqrt((U**2).mean(axis=2))[:, :, None]], axis=2)
        point = vectors.at(U, Q[open_])
    tie = problem.tie
    first = None if tie is None else np.unique(tie, return_index=True)[1]
    return [
        Optimum(tau[:, k] if first is None else tau[first, k], int(steps[k]), float(gap[k]))
        for k in range(count)
    ]
