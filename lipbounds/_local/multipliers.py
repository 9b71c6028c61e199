"""The multipliers D of the ellipsoid recursion around inputs: a first guess, and better ones after every recursion.

For a direction a of the outputs let p be what S+ is asked for behind a tap, a' S_out a seen from there, q = G'p and
P = [G c, I]. With N = D - Q[A, A] and h = N^-1 Q[A, :] P'p,

    p'S+ p = (P'p)' Q (P'p) + h' N h + sum_i (r_i q_i)^2 D_i,
    d / dD_i = (r_i q_i)^2 - h_i^2,        d / dQ = v v',  v = P'p + h on the neurons A,

so one recursion is followed by one pass back of vectors, which gives the gradient of a' S_out a in every D for the
price of triangular solutions. It vanishes where |h_i| = r_i |q_i|; D_i <- D_i |h_i| / (r_i |q_i|), damped, is the step
that is taken. Several directions count by weights. Nothing here affects soundness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from lipbounds._local.maps import TINY
from lipbounds._norms.cholesky import top_eigenvalue
from lipbounds._norms.rounding import U, gamma
from lipbounds._norms.schur import gram, proves_floor

ROOM = 0.03  # I - D^-1/2 Q D^-1/2 >= 0.03 I is proved
_FIRST_ROOM = 0.3  # that much of a guess, which may be far from the best
# |dy| / |p| relative to the standard deviation of y: limit of the ratio, and the power that damps it
_APART, _TRUST = 30.0, 0.4
_LEAST, _MOST = 1e-4, 1e3  # of r in D, and of D r over the variance of y
_FLOOR = 0.1  # floor of p^2 relative to its mean, so that a zero gradient keeps D finite
_RAISED = 1.3  # factor on the stationary D, which is computed from guessed slopes
_MARGIN = 1.5  # otherwise factor on lambda_max
_EXACT = 300  # size up to which a largest eigenvalue is computed exactly
STEP, _FARTHEST = 0.5, 2.0  # power of the first step, and its largest factor
_SPARE = 1e-3  # floor of h^2 and (r q)^2, relative to their means
_SHARP = 1.5  # power of L^2 / gap^2 in the weight of a direction; with a larger one the steps swing


class Kept(NamedTuple):
    """What the pass back needs of one tap and example: active neurons A, D^-1/2, and the factor L and F = L^-1 C.

    rows (a, k): of a `Thin` state D^-1/2 B_A, else None; variance (a,): the diagonal of Q[A, A]. early: C is Q[A, :],
    before it is mapped to the next state.
    """

    at: np.ndarray
    scale: np.ndarray
    factor: np.ndarray
    solved: np.ndarray
    rows: np.ndarray | None
    variance: np.ndarray
    early: bool


def guess(
    fixed: np.ndarray,
    times: Callable[[np.ndarray], np.ndarray],
    variance: np.ndarray,
    r: np.ndarray,
    p: np.ndarray,
    effect: np.ndarray,
) -> np.ndarray:
    """D (m,) where a' S+ a is stationary, nearly: with u_i = (D - Q)^-1 Q (c p + u) it is |u_i| = r_i |p_i| there.

    So D_i = |dy_i| / (r_i |p_i|) with dy = Q (c p + u), the increment of y that is worst for a' z, and the signs of u
    those of dy; root mean squares over several directions a. fixed (J, m): Q (c p) on the neurons; times(a): a Q there;
    variance (m,): the diagonal of Q; p (J, m): a' dz/dv; effect (m,): `Stage.effect`. As p is a guess, |dy_i| / |p_i|
    is pulled towards the standard deviation of y_i over the effect, so that the unit of a neuron does not count.
    """
    dy = fixed
    for _ in range(3):
        dy = fixed + times(np.where(dy < 0, -1.0, 1.0) * r * np.abs(p))  # not 0 where every centre is 0
    usual = np.sqrt(np.maximum(variance, TINY))
    matters = np.square(p / effect).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(np.square(dy / usual).sum(axis=0) / (matters + _FLOOR * matters.mean()))
    middle = float(np.median(ratio))
    if not 0 < middle < np.inf:
        ratio = usual * effect  # so that D is in units of the variance
        middle = float(np.median(ratio))
    drawn = middle * np.clip(ratio / middle, 1 / _APART, _APART) ** _TRUST
    return np.asarray(usual * np.minimum(drawn / effect, _MOST * usual) / np.maximum(r, _LEAST))


def chosen(
    relative: np.ndarray, variance: np.ndarray, made: Callable[[], np.ndarray]
) -> tuple[np.ndarray, float]:
    """(D, factor to try first): `relative` D_i / Q_ii of an earlier recursion where known, else a guess."""
    known = np.isfinite(relative)
    if not known.any():
        return made(), _RAISED
    d = relative * np.maximum(variance, TINY)
    if not known.all():
        first = made()
        d = np.where(known, d, first * np.median(d[known] / first[known]))
    return d, 1.0


def _raised(d: np.ndarray, first: float, top: Callable[[np.ndarray], float]) -> Iterator[np.ndarray]:
    """Scales D^-1/2 to be tried, D multiples of d; top(scale): about the largest eigenvalue of scale Q scale."""
    root = 1 / np.sqrt(np.maximum(d, TINY))
    times = first
    for attempt in range(40):
        yield root / np.sqrt(times)
        if attempt == 0:
            times = max(times, (_MARGIN if first > 1 else 1.02 / (1 - ROOM)) * top(root))
        else:
            times = 2 * times + 1e-6
    raise ValueError("no multipliers could be proved at one of the inputs; use the global bound there")


def feasible(block: np.ndarray, d: np.ndarray, first: float) -> tuple[np.ndarray, np.ndarray]:
    """(D^-1/2, M): D a strictly feasible multiple of d, M = I - D^-1/2 Q D^-1/2 >= ROOM I; proved in float64."""

    def top(root: np.ndarray) -> float:
        if len(root) <= _EXACT:
            return float(np.linalg.eigvalsh(block * root[:, None] * root)[-1])
        return top_eigenvalue(
            lambda v: root * (block @ (root * v).astype(block.dtype)), len(root), 1e-3, 40, starts=1
        )

    room = _FIRST_ROOM if first > 1 else ROOM
    for scale in _raised(d, first, top):
        scale = scale.astype(block.dtype)
        m = block * -scale[:, None]
        m *= scale
        m.flat[:: len(m) + 1] += 1.0
        if proves_floor(m, room + 8 * U * (len(m) + 1)):
            return scale, m
    raise AssertionError


def feasible_thin(
    rows: np.ndarray, d: np.ndarray, first: float, relerr: float, error: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(D^-1/2, M, e): M = I - B_A' D^-1 B_A within e of the real one, which is >= ROOM I; errors as in `Thin`.

    In float64 both are proved, in float32 neither.
    """

    def top(root: np.ndarray) -> float:
        scaled = rows * root[:, None].astype(rows.dtype)
        return top_eigenvalue(
            lambda v: scaled.T @ (scaled @ v.astype(rows.dtype)), rows.shape[1], 1e-3, 40, starts=1
        )

    room = _FIRST_ROOM if first > 1 else ROOM
    for scale in _raised(d, first, top):
        scale = scale.astype(rows.dtype)
        scaled = rows * scale[:, None]
        m = gram(scaled, -1.0)
        m.flat[:: len(m) + 1] += 1.0
        length = float(np.sqrt(np.einsum("ij,ij->", scaled, scaled))) * (1 + gamma(scaled.size + 8))
        moved = float(scale.max()) * error * (1 + 4 * U)
        wrong = (gamma(len(rows) + 16) + 4 * relerr) * length**2 + (2 * length + moved) * moved
        wrong = wrong * (1 + 32 * U) + 4 * U
        if proves_floor(m, room + wrong):
            return scale, m, wrong
    raise AssertionError


def weights(squares: np.ndarray, gaps: np.ndarray | None) -> np.ndarray:
    """(N, J) of directions, from a' S_out a and the gaps that these are compared with; None: all count the same."""
    with np.errstate(all="ignore"):
        inverse = np.where(squares > 0, 1 / squares, 0.0)
        if gaps is None:
            return inverse
        sharp = np.where(squares > 0, _SHARP * np.log(squares / np.square(np.maximum(gaps, 1e-150))), -np.inf)
        return np.asarray(np.exp(sharp - sharp.max(axis=1, keepdims=True)) * inverse)


def balance(
    stages: Sequence[Any],
    kept: Sequence[Sequence[Kept | None]],
    slopes: Sequence[tuple[np.ndarray, np.ndarray]],
    directions: np.ndarray,
    weight: np.ndarray,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(D_i / Q_ii, |h_i| / (r_i |q_i|)), (N, n) each, per stage; NaN where a neuron was not active.

    Args:
        stages: of the recursion; kept: per stage and example; slopes: (c, r) per stage.
        directions: (N, J, K) of the outputs; weight (N, J).
    """
    p, found = directions, []
    for stage, own, (c, r) in zip(reversed(stages), reversed(kept), reversed(slopes), strict=True):
        q = stage.G.behind(p)
        back = c[:, None] * q
        before = stage.joined(back, p)
        relative, ratio = np.full(c.shape, np.nan), np.full(c.shape, np.nan)
        for i, one in enumerate(own):
            if one is None:
                continue
            seen = (before if one.early else p)[i].T.astype(one.solved.dtype)
            h = solve_triangular(one.factor, one.solved @ seen, lower=True, trans=1, check_finite=False)
            h = one.scale * np.asarray(h.T if one.rows is None else h.T @ one.rows.T, np.float64)
            gain, cost = (weight[i] @ np.square(a) for a in (h, r[i, one.at] * q[i][:, one.at]))
            with np.errstate(all="ignore"):
                ratio[i, one.at] = np.sqrt((gain + _SPARE * gain.mean()) / (cost + _SPARE * cost.mean()))
                relative[i, one.at] = 1 / one.scale**2 / np.maximum(one.variance, TINY)
            back[i][:, one.at] += h
        found.append((relative, ratio))
        p = stage.T.behind(stage.joined(back, p))
    return found[::-1]


def stepped(relative: np.ndarray, ratio: np.ndarray, power: np.ndarray) -> np.ndarray:
    """Better D_i / Q_ii (N, n): what is above 1, the least that is feasible for a neuron alone, times ratio^power."""
    with np.errstate(all="ignore"):
        factor = np.clip(ratio ** power[:, None], 1 / _FARTHEST, _FARTHEST)
        new = 1 + np.maximum(relative - 1, 0.0) * np.where(np.isfinite(factor), factor, 1.0)
    return np.asarray(np.where(np.isfinite(relative), new, np.nan))
