"""Multipliers of LipSDP as a plain matrix problem: checked, started and scaled; knows no networks.

    A(T, rho) = diag(rho I, T) - Gy' diag(T) Gy - Gz' Gz >= 0,      T > 0 diagonal                       (LMI)

Gy is (N, n + N) with strictly lower triangular w-columns (the last N), Gz is (K, n + N); see `barrier`.
`prepare` leaves out neurons without influence and scales the rest around a feasible point in closed form, so
that weights of any size are the same problem for a solver. Float64 without proof.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg as sl

_SLACK = 1.1  # by which norms of blocks grow, so that a start is strictly feasible


def closure(some: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Everything reached from `some` (booleans) along edges[target, source]."""
    reached = some.copy()
    fresh = some
    while fresh.any():
        fresh = edges[:, fresh].any(axis=1) & ~reached
        reached |= fresh
    return reached


# --- a feasible start ----------------------------------------------------------------------------------------------


def levels(between: np.ndarray) -> np.ndarray:
    """(N,) labels 0, 1, ...: the longest path that ends in each neuron, between[target, source] != 0 an edge.

    ValueError where there is a cycle.
    """
    pattern = between != 0
    label = np.full(len(pattern), -1)
    open_ = np.ones(len(pattern), bool)
    level = 0
    while open_.any():
        ready = open_ & ~pattern[:, open_].any(axis=1)
        if not ready.any():
            raise ValueError("the w-columns of Gy are not strictly lower triangular: the form has a cycle")
        label[ready] = level
        open_ &= ~ready
        level += 1
    return label


def feasible_start(
    Gy: np.ndarray, Gz: np.ndarray, n: int, nodes: np.ndarray, tied: bool = False
) -> tuple[np.ndarray, float]:
    """(T, rho) strictly inside (LMI), one T per node up to a scaling per neuron; rho is LipLT's with a slack.

    For any scaling S of the neurons let n_kj bound the norms of the scaled blocks between nodes (x, the
    labels in `nodes`, the output), m_k = sum_j n_kj m_j, m_x = 1, and u_j = sum_k u_k n_kj, u_out = 1. By
    Cauchy's inequality |S_k y_k|^2 <= m_k sum_j n_kj |S_j w_j|^2 / m_j, so T_k = S_k^2 u_k m_out / m_k and
    rho = m_out^2 satisfy (LMI). Two scalings are tried, S = 1 and the norms of columns, and the smaller rho
    is kept.
    """
    best: tuple[np.ndarray, float] | None = None
    count = int(nodes.max()) + 1
    groups = [np.flatnonzero(nodes == k) for k in range(count)]
    for columns in (False,) if tied else (False, True):
        S = np.ones(len(Gy))
        if columns:
            for k in reversed(range(count)):  # a neuron's column reads later nodes only
                at = n + groups[k]
                square = (Gz[:, at] ** 2).sum(axis=0) + ((S[:, None] * Gy[:, at]) ** 2).sum(axis=0)
                S[groups[k]] = np.sqrt(square)
                S[groups[k]] /= max(S[groups[k]].max(), 1e-300)
                S[groups[k]] = np.maximum(S[groups[k]], 1e-150)
        value = _triangle_start(Gy, Gz, n, groups, S)
        if value is not None and (best is None or value[1] < best[1]):
            best = value
    if best is None:
        raise ValueError("no feasible multipliers found in float64; rescale the weights")
    return best


def _triangle_start(
    Gy: np.ndarray, Gz: np.ndarray, n: int, groups: list[np.ndarray], S: np.ndarray
) -> tuple[np.ndarray, float] | None:
    count = len(groups)
    inverse = np.concatenate([np.ones(n), 1 / S])
    sources = [np.arange(n), *(n + g for g in groups)]
    block = np.zeros((count + 1, count + 1))  # target k or the output (last), source x or j + 1
    for k in range(count + 1):
        scaled = (Gz if k == count else S[groups[k], None] * Gy[groups[k]]) * inverse
        for j in range(k + 1):
            part = scaled[:, sources[j]]
            block[k, j] = _SLACK * _norm(part)
        if k < count and any(scaled[:, sources[j]].any() for j in range(k + 1, count + 1)):
            raise ValueError(
                "the w-columns of Gy are not strictly lower triangular in the order of the layers"
            )
    m = np.ones(count + 2)
    for k in range(count + 1):
        m[k + 1] = block[k] @ m[: count + 1]
    u = np.zeros(count + 1)
    u[count] = 1.0
    for j in reversed(range(count)):
        u[j] = u[j + 1 :] @ block[j + 1 :, j + 1]
    with np.errstate(all="ignore"):
        T = np.empty(len(S))
        for k, g in enumerate(groups):
            T[g] = S[g] ** 2 * (u[k] * m[-1] / m[k + 1])
        rho = m[-1] ** 2
    good = np.isfinite(T).all() and (T > 0).all() and math.isfinite(rho) and rho > 0
    return (T, float(rho)) if good else None


def _norm(a: np.ndarray) -> float:
    """||A||_2, from the Gram matrix of the smaller side; not proved."""
    top = float(np.abs(a).max(initial=0.0))
    if top == 0.0:
        return 0.0
    a = a / top
    gram = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    return top * math.sqrt(max(float(np.linalg.eigvalsh(gram)[-1]), 0.0))


# --- the problem, scaled ----------------------------------------------------------------------------------------------


def smallest_rho(Gy: np.ndarray, Gz: np.ndarray, n: int, T: np.ndarray) -> float:
    """The smallest rho of (LMI) for given T in float64, inf where T is not feasible for any rho.

    With M = Gy' T Gy + Gz' Gz it is the largest eigenvalue of M_xx + M_xw (T - M_ww)^-1 M_wx.
    """
    rows = np.concatenate([np.sqrt(T)[:, None] * Gy, Gz])
    left, right = rows[:, :n], rows[:, n:]
    Q = np.diag(T) - right.T @ right
    d = 1 / np.sqrt(T)
    factor, fail = sl.lapack.dpotrf(Q * d[:, None] * d, lower=1)
    if fail:
        return math.inf
    half = sl.solve_triangular(factor, d[:, None] * (right.T @ left), lower=True)
    return float(np.linalg.eigvalsh(left.T @ left + half.T @ half).max(initial=0.0))


@dataclass(frozen=True, eq=False)
class Prepared:
    """(LMI) without idle neurons, in variables relative to a strictly feasible point T0, rho0.

    With T = T0 (E tau) and rho = rho0 s it is the (LMI) of Gy, Gz here in (E tau, s), and (1, ..., 1) is
    strictly feasible, whatever the scale of the weights. E ties neurons to their labels `tie` (None: one
    each).

    Args:
        live: neurons of the whole problem on a path from x to the output; only these have a tau.
    """

    Gy: np.ndarray
    Gz: np.ndarray
    n: int
    tie: np.ndarray | None
    live: np.ndarray
    T0: np.ndarray
    rho0: float
    whole: tuple[np.ndarray, np.ndarray, np.ndarray | None]

    @property
    def size(self) -> int:
        """Number of multipliers tau; 0 where the output does not depend on a neuron."""
        return len(self.T0) if self.tie is None else int(self.tie.max(initial=-1)) + 1

    def spread(self, tau: np.ndarray) -> np.ndarray:
        return tau if self.tie is None else tau[self.tie]

    def gather(self, v: np.ndarray) -> np.ndarray:
        return v if self.tie is None else np.bincount(self.tie, v)

    def multipliers(self, tau: np.ndarray) -> tuple[np.ndarray, float]:
        """(T, rho) of the whole problem: T of all neurons, idle ones filled in, and the smallest rho for it.

        rho is inf where T is not feasible in float64.
        """
        Gy, Gz, layers = self.whole
        T = np.ones(len(Gy))
        T[self.live] = self.T0 * self.spread(tau)
        columns = np.concatenate([np.arange(self.n), self.n + np.flatnonzero(self.live)])
        rho = smallest_rho(Gy[np.ix_(self.live, columns)], Gz[:, columns], self.n, T[self.live])
        if not self.live.all() and 0 < rho < math.inf:
            _set_idle(Gy, Gz, self.n, T, rho, self.live, layers)
            rho = smallest_rho(Gy, Gz, self.n, T)
        return T, rho


def prepare(Gy: np.ndarray, Gz: np.ndarray, n: int, layers: np.ndarray | None = None) -> Prepared:
    """Check the problem, leave out idle neurons and scale it.

    `layers` (N,) ints tie the multipliers of equal labels; labels must be in the order of the network.
    ValueError for wrong shapes, values that are not finite, cycles.
    """
    Gy, Gz, layers = _checked(Gy, Gz, n, layers)
    live = live_neurons(Gy, Gz, n, layers)
    columns = np.concatenate([np.arange(n), n + np.flatnonzero(live)])
    small_y, small_z = Gy[np.ix_(live, columns)], Gz[:, columns]
    tie = None if layers is None else np.unique(layers[live], return_inverse=True)[1]
    T0, rho0 = np.ones(0), _norm(small_z) ** 2 or 1.0
    if live.any():
        nodes = levels(small_y[:, n:]) if tie is None else tie
        T0, rho0 = feasible_start(small_y, small_z, n, nodes, tie is not None)
    a = np.sqrt(T0)
    columns_ = np.concatenate([np.full(n, math.sqrt(rho0)), a])
    return Prepared(
        a[:, None] * small_y / columns_, small_z / columns_, n, tie, live, T0, rho0, (Gy, Gz, layers)
    )


def _checked(
    Gy: np.ndarray, Gz: np.ndarray, n: int, layers: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    Gy, Gz = np.asarray(Gy, np.float64), np.asarray(Gz, np.float64)
    N = len(Gy)
    if Gy.ndim != 2 or Gz.ndim != 2 or Gy.shape[1] != n + N or Gz.shape[1] != n + N:
        raise ValueError(f"Gy {Gy.shape} and Gz {Gz.shape} do not have {n} + {N} columns")
    if not (np.isfinite(Gy).all() and np.isfinite(Gz).all()):
        raise ValueError("the gain has NaN or infinite entries")
    if layers is not None:
        layers = np.unique(np.asarray(layers), return_inverse=True)[1]
        if layers.shape != (N,):
            raise ValueError(f"{layers.size} layer labels for {N} neurons")
    return Gy, Gz, layers


def _reached(Gy: np.ndarray, n: int, layers: np.ndarray | None) -> np.ndarray:
    reached = closure((Gy[:, :n] != 0).any(axis=1), Gy[:, n:] != 0)
    return reached if layers is None else np.isin(layers, np.unique(layers[reached]))


def live_neurons(Gy: np.ndarray, Gz: np.ndarray, n: int, layers: np.ndarray | None) -> np.ndarray:
    """Neurons on a path from x to the output; by whole layers where these are tied."""
    between = Gy[:, n:] != 0
    live = closure((Gy[:, :n] != 0).any(axis=1), between)
    live &= closure((Gz[:, n:] != 0).any(axis=0), between.T)
    # A neuron that rests still bounds the multiplier of its layer.
    return live if layers is None else np.isin(layers, np.unique(layers[live]))


def _set_idle(
    Gy: np.ndarray,
    Gz: np.ndarray,
    n: int,
    T: np.ndarray,
    rho: float,
    live: np.ndarray,
    layers: np.ndarray | None,
) -> None:
    """Fill in T of neurons on no path from x to the output, so that they cost about 1e-9 of the others.

    One that moves nothing (a dead end) gets a small T, one that nothing moves a large T.
    """
    reached = _reached(Gy, n, layers)
    for group, end in ((reached & ~live, True), (~reached, False)):
        if not group.any():
            continue
        inside = Gy[np.ix_(group, n + np.flatnonzero(group))]
        size = len(inside)
        ones = np.eye(size)
        nodes = levels(inside) if layers is None else np.unique(layers[group], return_inverse=True)[1]
        base, _ = feasible_start(
            np.hstack([ones, inside]), np.hstack([0 * ones, ones]), size, nodes, layers is not None
        )
        others = live if end else live | reached
        if end:
            cost = np.concatenate([np.full(n, math.sqrt(rho)), np.sqrt(T[live])])
            columns = np.concatenate([np.arange(n), n + np.flatnonzero(live)])
            size_ = _norm(np.sqrt(base)[:, None] * Gy[np.ix_(group, columns)] / cost)
            T[group] = base * (1e-9 / size_**2 if size_ else 1.0)
        else:
            columns = n + np.flatnonzero(group)
            rows = np.concatenate([np.sqrt(T[others])[:, None] * Gy[np.ix_(others, columns)], Gz[:, columns]])
            size_ = _norm(rows / np.sqrt(base))
            T[group] = base * (1e9 * size_**2 if size_ else 1.0)
