"""The dense form of LipSDP: the gain of any form as one matrix, and a barrier method for its multipliers.

With the loop transformation v = c y + r w, |w_i| <= |y_i|, a form is a gain from (x, w) to (y, z),

    y = Gy (x, w),    z = Gz (x, w)          (the w-columns of Gy are strictly lower triangular)

and L is a Lipschitz constant if some diagonal T > 0 satisfies

    A(T, rho) = diag(rho I, T) - Gy' diag(T) Gy - Gz' Gz >= 0,      rho = L^2                          (LMI)

because then |z|^2 <= rho |x|^2 - sum T_i (y_i^2 - w_i^2). (LMI) forces T > 0 by itself: its diagonal reads
T_i >= |Gz e_i|^2 + sum over later j of T_j Gy_ji^2.

`solve_dense` minimises rho over (LMI) in plain float64: it is the search for multipliers, not the proof. Use
it where the states of a sequence are wider than the whole, and as a reference without CVXPY.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.linalg as sl

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm
from lipbounds._lipsdp.matrix_inequality import Prepared, closure, prepare
from lipbounds._norms import matrices as norms
from lipbounds._norms.enclosures import Enclosure
from lipbounds._triangle.recursion import host_form, loop_transform, matrices, structure

#: Entries of (Gy; Gz) above which the dense form is refused: 1 GB.
MAX_ENTRIES = 2**27
_CENTRED = 0.8  # Newton decrement below which t may grow


@dataclass(frozen=True, eq=False)
class DenseGain:
    """y = Gy (x, w) over the active neurons of all taps, z = Gz (x, w), as matrices with a normwise error.

    Args:
        Gy: (N, n + N), the first n columns belong to x. Gz: (K, n + N).
        active: per tap of the elementwise view the neurons that have a multiplier, sorted.
        n: entries of x.
        kappa: (N,), |c_i| / r_i of the active neurons.
        block_errors: (taps + 1, taps + 1), Frobenius errors of the single blocks: row k is tap k, the last
            one the output; column 0 is x, column j + 1 tap j. Together they give the errors of Gy and Gz.
    """

    Gy: Enclosure
    Gz: Enclosure
    active: tuple[np.ndarray, ...]
    n: int
    kappa: np.ndarray
    block_errors: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(N,), the tap of each active neuron: the `layers` of one multiplier per layer."""
        return np.repeat(np.arange(len(self.active)), [a.size for a in self.active])


def dense_gain(form: LureForm) -> DenseGain:
    """The gain of the elementwise view of a concrete form: blocks multiplied on the host, with their errors.

    Left out are neurons with radius r = 0 (they have no w) and, repeatedly, those that are proved to be never
    moved (a row of zeros, no error) or to move nothing (a column of zeros, no error).
    ValueError where the matrices would need more than 1 GB.
    """
    view = elementwise_view(form)
    scalings = loop_transform(view, 2, centred=True)
    host = host_form(view)
    nodes = tuple((k,) for k in range(len(view.taps)))
    wide = [np.flatnonzero(s.q > 0) for s in scalings]
    n, rows, outputs = view.in_size, sum(a.size for a in wide), view.num_outputs
    if (rows + outputs) * (n + rows) > MAX_ENTRIES:
        raise ValueError(
            f"the dense form of this network has {rows} neurons and {n} inputs, a matrix of "
            f"{(rows + outputs) * (n + rows) * 8 / 1e9:.1f} GB; at most {MAX_ENTRIES * 8 / 1e9:.1f} GB are "
            "formed: "
            "use solver='recursion'"
        )
    starts = np.cumsum([0, *(a.size for a in wide)])
    whole = np.zeros((rows + outputs, n + rows))
    errors = np.zeros((len(nodes) + 1, len(nodes) + 1))

    def place(target: int | None, source: int | None, block: Enclosure) -> None:
        dense, error = block.dense().with_error()
        into = slice(rows, rows + outputs) if target is None else slice(starts[target], starts[target + 1])
        out_of = slice(0, n) if source is None else slice(n + starts[source], n + starts[source + 1])
        dense = dense if target is None else dense[wide[target]]
        whole[into, out_of] = dense if source is None else dense[:, wide[source]]
        errors[-1 if target is None else target, 0 if source is None else source + 1] = error

    for (source, target), block in matrices(host, structure(host, nodes, scalings), scalings):
        place(target[0], source[0] if source else None, block)
    for source, block in host.backward((), [(), *nodes], scalings).items():
        place(None, source[0] if source else None, block.T)
    taps = np.repeat(np.arange(len(nodes)), [a.size for a in wide])
    keep = _moving(whole, rows, n, errors, taps)
    columns = np.concatenate([np.arange(n), n + np.flatnonzero(keep)])
    chosen = [a[keep[starts[k] : starts[k + 1]]] for k, a in enumerate(wide)]
    kappa = [_kappa(scalings[k].c, scalings[k].q, a) for k, a in enumerate(chosen)]
    return DenseGain(
        Enclosure(whole[:rows][np.ix_(keep, columns)], norms.frobenius_norm(errors[:-1])),
        Enclosure(whole[rows:][:, columns], norms.frobenius_norm(errors[-1:])),
        tuple(chosen),
        n,
        np.concatenate([np.zeros(0), *kappa]),
        errors,
    )


def _kappa(c: np.ndarray | None, r: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.zeros(chosen.size) if c is None else np.abs(c[chosen]) / r[chosen]


def _moving(whole: np.ndarray, rows: int, n: int, errors: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Neurons that x may move and that may move the output; blocks with an error count as full."""
    pattern = whole != 0
    blurred = errors > 0
    into = np.concatenate([taps, np.full(len(whole) - rows, len(errors) - 1)])
    out_of = np.concatenate([np.zeros(n, int), taps + 1])
    pattern |= blurred[np.ix_(into, out_of)]
    between = pattern[:rows, n:]
    return closure(pattern[:rows, :n].any(axis=1), between) & closure(
        pattern[rows:, n:].any(axis=0), between.T
    )


def reduce_input(gain: DenseGain) -> tuple[np.ndarray, np.ndarray]:
    """(Gy, Gz) in plain float64 with the x-columns Gx replaced by as many columns as their rank.

    Gx Gx' does not change (up to rounding, relative to each row), so neither do rho and T of (LMI). For solvers: what
    they find is proved with the gain itself.
    """
    Gy, Gz, n = gain.Gy.midpoint_for_search(), gain.Gz.midpoint_for_search(), gain.n
    Gx = np.concatenate([Gy[:, :n], Gz[:, :n]])
    size = np.sqrt(np.einsum("ij,ij->i", Gx, Gx))
    size[size == 0] = 1.0
    unit = Gx / size[:, None]
    if n > len(unit):  # L of unit = L Q: the singular values of a square matrix are quicker
        unit = np.asarray(np.linalg.qr(unit.T, mode="r")).T
    u, s, _ = np.linalg.svd(unit, full_matrices=False)
    rank = int(np.sum(s > 1e-14 * s.max(initial=0.0) * math.sqrt(len(unit))))
    short = size[:, None] * (u[:, :rank] * s[:rank])
    split = len(Gy)
    return np.hstack([short[:split], Gy[:, n:]]), np.hstack([short[split:], Gz[:, n:]])


# --- the barrier method --------------------------------------------------------------------------------------------


class DenseSolution(NamedTuple):
    """T (N,) and rho of (LMI); Newton steps taken; `gap` bounds rho - optimum in float64 (not proved)."""

    T: np.ndarray
    rho: float
    iterations: int
    gap: float


class _Barrier:
    """A(T, rho) of a prepared problem and the derivatives of its log det; columns are ordered (w, x) here."""

    def __init__(self, problem: Prepared):
        self.problem, self.n, self.N = problem, problem.n, len(problem.T0)
        order = np.concatenate([self.n + np.arange(self.N), np.arange(self.n)])
        self.Gy = problem.Gy[:, order]
        self.C = problem.Gz[:, order].T @ problem.Gz[:, order]

    def factor(self, v: np.ndarray) -> np.ndarray | None:
        """The Cholesky factor of A at v = (tau, s), or None where A is not positive definite."""
        T = self.problem.spread(v[:-1])
        if not (T > 0).all():
            return None
        B = np.sqrt(T)[:, None] * self.Gy
        A = -self.C - B.T @ B
        A[np.diag_indices_from(A)] += np.concatenate([T, np.full(self.n, v[-1])])
        factor, fail = sl.lapack.dpotrf(A, lower=1, clean=1, overwrite_a=1)
        return None if fail else factor

    def derivatives(self, L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gradient and Hessian of -log det A in (tau, s).

        A_i = dA/dT_i = e_i e_i' - g_i g_i' (g_i' row i of Gy) has rank two, so with u_i = L^-1 e_i and v_i =
        L^-1 g_i tr(A^-1 A_i A^-1 A_j) = (u_i.u_j)^2 - (u_i.v_j)^2 - (v_i.u_j)^2 + (v_i.v_j)^2.
        """
        N, n, tie = self.N, self.n, self.problem.tie
        V = sl.blas.dtrsm(1.0, L, self.Gy.T, lower=1)
        U = np.zeros((N + n, N))
        U[:N] = sl.lapack.dtrtri(L[:N, :N], lower=1)[0]
        X = np.zeros((0, 0))
        if n:
            X = sl.lapack.dtrtri(L[N:, N:], lower=1)[0]
            U[N:] = -X @ (L[N:, :N] @ U[:N])
        uu, vv, uv = U.T @ U, V.T @ V, U.T @ V
        gradient = np.diagonal(vv) - np.diagonal(uu)
        uu *= uu
        vv *= vv
        uv *= uv
        hessian = uu
        hessian += vv
        hessian -= uv
        hessian -= uv.T
        left, right = X.T @ U[N:], X.T @ V[N:]
        mixed = (left**2).sum(axis=0) - (right**2).sum(axis=0)
        pure = X.T @ X
        if tie is not None:
            hessian = np.array([np.bincount(tie, row) for row in hessian])
            hessian = np.array([np.bincount(tie, row) for row in hessian.T])
        size = len(hessian)
        full = np.empty((size + 1, size + 1))
        full[:size, :size] = hessian
        full[:size, size] = full[size, :size] = self.problem.gather(mixed)
        full[size, size] = (pure**2).sum()
        return np.append(self.problem.gather(gradient), -np.trace(pure)), full


class _Newton:
    """H^-1 of a nearly singular Hessian: unit diagonal, and a ridge only where Cholesky asks for one."""

    def __init__(self, hessian: np.ndarray):
        diagonal = np.maximum(np.diagonal(hessian), 1e-300)
        self.d = 1 / np.sqrt(diagonal)
        scaled = hessian * self.d[:, None] * self.d
        ridge = 0.0
        for _ in range(12):
            self.factor, fail = sl.lapack.dpotrf(scaled + ridge * np.eye(len(scaled)), lower=1)
            if not fail:
                return
            ridge = max(10 * ridge, 1e-14)
        raise ValueError("the barrier method lost its digits: the Hessian is not positive definite")

    def __call__(self, b: np.ndarray) -> np.ndarray:
        return self.d * sl.cho_solve((self.factor, True), self.d * b, check_finite=False)


def solve_dense(
    Gy: np.ndarray,
    Gz: np.ndarray,
    n: int,
    layers: np.ndarray | None = None,
    *,
    start: np.ndarray | None = None,
    tolerance: float = 1e-9,
    max_steps: int = 300,
) -> DenseSolution:
    """Minimise rho over (LMI): a primal barrier method with Newton steps of O((n + N)^3) operations.

    Follows the minimisers of t rho - log det A(T, rho) with t growing; there rho - optimum = (n + N) / t.

    Args:
        Gy, Gz, n: as in (LMI), plain arrays (see `reduce_input`).
        layers: (N,) ints, neurons of one label share a multiplier; None gives each neuron its own.
        start: (N,) multipliers to begin with; ignored where they are not feasible or not better than LipLT's.
        tolerance: relative gap to stop at.

    Returns (T, rho, iterations, gap): rho is the smallest one for T, gap is infinite if `max_steps` came too
    early (T is feasible all the same). If no path leads from x to the output, T is 1 and rho 0.
    ValueError for wrong shapes, values that are not finite, cycles.
    """
    problem = prepare(Gy, Gz, n, layers, start)
    tau, steps, gap = _follow(problem, tolerance, max_steps) if problem.size else (np.ones(0), 0, 0.0)
    T, rho = problem.multipliers(tau)
    return DenseSolution(T, rho, steps, gap)


def _follow(problem: Prepared, tolerance: float, max_steps: int) -> tuple[np.ndarray, int, float]:
    """(tau, steps, gap of rho) along the central path to relative gap `tolerance`."""
    barrier = _Barrier(problem)
    v = np.ones(problem.size + 1)
    aim = np.zeros_like(v)
    aim[-1] = 1.0
    L = barrier.factor(v)
    if L is None:
        raise ValueError("the start of the barrier method is not feasible in float64")
    size = float(len(problem.Gy) + problem.n)
    t, jump, waited, gap = 0.0, 5.0, 0, math.inf
    for steps in range(max_steps + 1):
        gradient, hessian = barrier.derivatives(L)
        newton = _Newton(hessian)
        toward = newton(aim)
        if t == 0.0:  # the t whose central point is nearest in the metric of the Hessian
            t = max(-(toward @ gradient) / (toward @ aim), size)
        move = -newton(t * aim + gradient)
        decrement = math.sqrt(max(-(t * aim + gradient) @ move, 0.0))
        waited += 1
        if decrement < _CENTRED:
            gap = (size + decrement * math.sqrt(size)) / t
            if gap <= tolerance * v[-1]:
                break
            # A Newton step and the tangent of the path, which is nearly straight in 1/t.
            jump = min(2 * jump, 20.0) if waited <= 2 else max(jump / 2, 4.0) if waited > 4 else jump
            stride = min(jump, 1.2 * size / (tolerance * v[-1] * t) + 1)
            move -= (t - t / stride) * toward
            t *= stride
            waited = 0
        moved = _advance(barrier, v, L, move, t)
        if moved is None or steps == max_steps:
            break
        v, L = moved
    return v[:-1], steps, gap * problem.rho0


def _advance(
    barrier: _Barrier, v: np.ndarray, L: np.ndarray, move: np.ndarray, t: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """v and its factor after a step to about the least t rho - log det A along `move`; None: not feasible."""
    best: tuple[np.ndarray, np.ndarray] | None = None
    least, step = math.inf, 1.0
    for _ in range(40):
        trial = v + step * move
        factor = barrier.factor(trial)
        if factor is not None:
            # Relative to v: both terms are large at the end.
            value = t * (trial[-1] - v[-1]) - 2 * np.log(np.diagonal(factor) / np.diagonal(L)).sum()
            if value >= least:
                break
            best, least = (trial, factor), value
        elif best is not None:
            break
        step = 2 * step if best is not None and step >= 1 else step / 2
    return best
