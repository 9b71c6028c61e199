"""One tap of a LipSDP proof in floating point: an ellipsoid pushed through it, proved by one Cholesky.

An ellipsoid S holds a set of increments s where s s' <= S, that is (u's)^2 <= u'S u for every u. One tap

    y = W s,    s+ = A s + B w,    |w_i| <= |y_i|

maps the ellipsoid S into S+ if, for some diagonal D > 0 (the inverse multipliers),

    [[ S+ - A S A' - B D B',   A S W'     ],
     [ W S A',                 D - W S W' ]]  >= 0                                                             (LMI)

Proof. With J = [A; -W] (LMI) reads J S J' + [B; 0] D [B; 0]' <= diag(S+, D). Let T = 1/D, s = S^1/2 x, |x| <= 1, and
take any u and v = -t T y, t >= 0. By Cauchy-Schwarz
(u's+ + t y'T y)^2 = ((u, v)'(J s + [B w; 0]))^2 <= (u'S+ u + t^2 y'T y) (|x|^2 + w'T w), and w'T w <= y'T y =: Y. With
t = p = u's+ >= 0 this gives p^2 (1 + Y)^2 <= (u'S+ u + p^2 Y)(1 + Y), hence p^2 <= u'S+ u.
Nothing needs D > W S W' to be strict.

Everything is float64 on the host. S is an exact matrix of floats times a power of four; products are bounded by
|fl(XY) - XY| <= gamma_k |X||Y| in any order of summation (Higham, section 3.5), an entrywise bound N turns into a
diagonal by -diag(N t / t) <= E <= diag(N t / t) for any t > 0, and (LMI) minus these diagonals is proved by Cholesky.
Matrices known with an error (Enclosure) enter by norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import eigvalsh
from scipy.linalg.lapack import dpotrf, dtrtrs

from lipbounds._norms import device
from lipbounds._norms.cholesky import TINY, nonzeros_per_row
from lipbounds._norms.matrices import is_identity
from lipbounds._norms.rounding import U, gamma, require_gradual_underflow
from lipbounds._norms.schur import cholesky_shift

FLOOR = 2.0**-200  # multipliers below this share of the largest state are raised by `repair`
CEILING = 2.0**200
_LOST = TINY * 2.0**220  # underflow of one entry times the largest ratio of weights t
_UP = 1.0 + 2.0**-20  # covers the rounding of computed error bounds (sums of at most 2**30 terms >= 0)
_MARGINS = (2.0, 8.0, 64.0, 512.0)


class Infeasible(ValueError):
    """The multipliers of one tap (`place`, index of the segment; 0 in the dense form) do not prove anything."""

    def __init__(self, place: int, reason: str) -> None:
        self.place, self.reason = place, reason
        super().__init__(place, reason)

    def __str__(self) -> str:
        return f"the multipliers of tap {self.place} prove nothing: {self.reason}"


# --- positive semidefinite matrices --------------------------------------------------------------------------------


def prove_psd(m: np.ndarray, slack: Any = 0.0) -> bool:
    """True only if M - diag(slack) >= 0: then M + E >= 0 for every symmetric E >= -diag(slack). False proves nothing.

    M (n, n) is taken as exact, its lower triangle alone is read; `slack` >= 0 is a number (a bound of ||E||_2) or a
    vector (n,). Rows of zeros with zero slack are left out. Cholesky is not changed by a diagonal scaling, nor is the
    shift c m_ii of `cholesky_shift`: a matrix of any grading is treated as if it were scaled to unit diagonal.
    """
    require_gradual_underflow()
    m = np.asarray(m, np.float64)
    slack = np.broadcast_to(np.asarray(slack, np.float64), (m.shape[0],))
    diagonal = m.diagonal()
    still = (diagonal == 0.0) & (slack == 0.0)
    if still.any():
        lower = np.tril(m)
        if lower[still].any() or lower[:, still].any():
            return False
        m, slack = lower[np.ix_(~still, ~still)], slack[~still]
        diagonal = m.diagonal()
    n = m.shape[0]
    if n == 0:
        return True
    if not (np.isfinite(diagonal).all() and np.isfinite(slack).all() and diagonal.min() > 0.0):
        return False
    if slack.min() < 0.0:
        return False
    exponent = int(np.frexp(diagonal.max())[1])
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        work = np.ldexp(m, -exponent) if abs(exponent) > 1000 else m * 2.0**-exponent
        work = np.ascontiguousarray(work)
        d, less = work.diagonal().copy(), np.ldexp(slack, -exponent)
        pivots = d - less - (cholesky_shift(n) * d + 4.0 * U * (d + less) + n * TINY)
    if not pivots.min() > 0.0:
        return False
    work.flat[:: n + 1] = pivots
    # The shift of the host's proof stays, so that what a device proves can be proved again on any host.
    found = device.positive(work)
    if found is not None:
        return found
    factor, info = dpotrf(work.T, lower=0, clean=0, overwrite_a=1)
    ends = factor.diagonal()
    return bool(info == 0 and np.isfinite(ends).all() and (ends > 0.0).all())


# --- one tap -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TapMatrices:
    """A, B, W of one tap and their errors by blocks: e_a (c,), e_w (g, c) for c column and g row groups.

    More than one column group needs an S that is diagonal.
    """

    a: np.ndarray
    b: np.ndarray | None
    w: np.ndarray
    e_b: float
    e_a: np.ndarray
    e_w: np.ndarray
    rows: np.ndarray  # (n,) group of every row of W
    columns: np.ndarray  # (d,) group of every column of A and W
    exact: bool  # no errors at all


def _times(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """X S for S full or, as a vector, diagonal."""
    return x * s if s.ndim == 1 else x @ s


def _apply(s: np.ndarray, v: np.ndarray) -> np.ndarray:
    return s * v if s.ndim == 1 else s @ v


def _block_norms(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Upper bounds of the Frobenius norms of the blocks of X."""
    total = np.zeros((x.shape[0], shape[1]))
    for j in range(shape[1]):
        part = x[:, columns == j]
        total[:, j] = np.einsum("ij,ij->i", part, part)
    out = np.zeros(shape)
    np.add.at(out, rows, total)
    return np.sqrt(out * _UP + x.size * TINY) * _UP


def _enclosure_slack(
    tap: TapMatrices, s: np.ndarray, d: np.ndarray, near_a: np.ndarray, near_w: np.ndarray
) -> tuple[float, np.ndarray]:
    """What the errors of A, B and W can take from the two diagonals of (LMI); the second one per neuron.

    Block (k, l) of J_true S J_true' - J S J', J = [A; -W], has 2-norm at most
    N_kl = sum_j s_j (e_kj f_lj + f_kj e_lj + e_kj e_lj), f the norms of blocks of J, s_j the norm of S on group j.
    With weights t > 0 a symmetric matrix with these block norms is at most diag(N t / t).
    """
    n = tap.w.shape[0]
    if tap.exact:
        return 0.0, np.zeros(n)
    groups, shape = tap.columns, tap.e_w.shape
    size = np.array([_norm_of(s, groups == j) for j in range(shape[1])])
    f = np.vstack(
        [
            _block_norms(tap.a, np.zeros(tap.a.shape[0], int), groups, (1, shape[1])),
            _block_norms(tap.w, tap.rows, groups, shape),
        ]
    )
    e = np.vstack([tap.e_a[None, :], tap.e_w])
    cross = (e * size) @ f.T
    bound = cross + cross.T + (e * size) @ e.T
    weights = np.ones(1 + shape[0])
    weights[0] = 1.0 / math.sqrt(max(float(near_a.max(initial=0.0)), FLOOR))
    for g in range(shape[0]):
        weights[1 + g] = 1.0 / math.sqrt(max(float(near_w[tap.rows == g].max(initial=0.0)), FLOOR))
    loss = (bound @ weights) / weights * _UP
    if tap.b is not None and tap.e_b > 0.0:
        norm = math.sqrt(float(np.sum((tap.b * d) ** 2)) * _UP + tap.b.size * TINY) * _UP
        loss[0] += (2.0 * tap.e_b * norm + tap.e_b**2 * float(d.max(initial=0.0))) * _UP
    return float(loss[0]), loss[1:][tap.rows]


def _norm_of(s: np.ndarray, group: np.ndarray) -> float:
    if s.ndim == 1:
        return float(s[group].max(initial=0.0))
    return float(np.abs(s[np.ix_(group, group)]).sum(axis=1).max(initial=0.0)) * _UP


def _inverse_root(x: np.ndarray) -> np.ndarray:
    return 1.0 / np.sqrt(np.maximum(x, FLOOR))


def advance(
    s: np.ndarray, tap: TapMatrices, d: np.ndarray, place: int, fix: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(S+, D): (LMI) proved for S, the matrices of `tap` within their errors, and D (n,), raised if `fix` allows.

    S has entries up to about 1, A, B and W up to 2, D lies in [0, 2**200]. `Infeasible` where there is no proof.
    """
    a, b, w = tap.a, tap.b, tap.w
    n, outs = w.shape[0], a.shape[0]
    same = is_identity(w)
    through = bool(a.any() or tap.e_a.any())  # otherwise A S W' = 0
    ws = (np.diag(s) if s.ndim == 1 else s) if same else _times(w, s)
    sy = ws if same else ws @ w.T
    ahead = _times(a, s)
    k_a, k_w = nonzeros_per_row(a), 0 if same else nonzeros_per_row(w)
    g = gamma((max(k_a, k_w) if s.ndim == 2 else 1) + max(k_a, k_w) + 8) * _UP
    live = a.any(axis=1) | bool(tap.e_a.any() or (n and tap.e_b))
    if b is not None:
        live |= b.any(axis=1)
        k_b = nonzeros_per_row(b)
    size_a, size_w, size_s = np.abs(a), np.abs(w), np.abs(s)

    def losses(d: np.ndarray, r: np.ndarray, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Diagonals that cover every rounding and error in the blocks of (LMI), by weights 1/sqrt(r), 1/sqrt(near)."""
        t_a, t_w = _inverse_root(r.diagonal()), _inverse_root(near)
        mixed = size_a.T @ t_a
        both = mixed + size_w.T @ t_w if through and n else mixed
        first = g * (size_a @ _apply(size_s, both)) + 4.0 * U * (np.abs(r) @ t_a)
        if b is not None and n:
            first += gamma(k_b + 8) * _UP * (np.abs(b) @ (d * (np.abs(b).T @ t_a)))
        second = g * (size_w @ _apply(size_s, both if through else size_w.T @ t_w))
        lost = _LOST * (n + outs + s.shape[0]) ** 3 * (1.0 + float(d.max(initial=0.0)))
        fixed, each = _enclosure_slack(tap, s, d, r.diagonal(), near)
        first = (first / t_a * _UP + lost + fixed) * live
        return first, second / t_w * _UP + 2.0 * U * np.abs(near) + lost + each

    def spread(d: np.ndarray) -> np.ndarray:
        r = ahead @ a.T
        return r + (b * d) @ b.T if b is not None and n else r

    r = spread(d)
    if n == 0:
        first, _ = losses(d, r, np.zeros(0))
        return _symmetric(r, 2.0 * first), d
    p = (ahead if same else ahead @ w.T) if through else None
    for attempt in range(6 if fix else 1):
        if attempt > 0:
            room = 4.0 ** (attempt - 1) * losses(d, r, sy.diagonal())[1]
            least = (1e-9 + 16.0 * cholesky_shift(n + outs)) * 100.0 ** (attempt - 1)
            d = _raised(d, sy, p, spread, room, least)
            r = spread(d)
        q = np.diag(d) - sy
        if d.max() >= CEILING or q.diagonal().min() <= 0.0:
            continue
        first, second = losses(d, r, q.diagonal())
        found = _close(r, p, q, first, second)
        if found is not None:
            return found, d
    raise Infeasible(place, "D - W S W' is not positive definite, or too nearly singular for float64")


def _raised(
    d: np.ndarray, sy: np.ndarray, p: np.ndarray | None, spread: Any, room: np.ndarray, least: float
) -> np.ndarray:
    """D raised above W S W' by a factor, the least one (1 + `least`) or, of a few, the one with the smallest S+."""
    raised = np.maximum(np.maximum(d, 8.0 * room), FLOOR)
    root = 1.0 / np.sqrt(raised)
    low = np.tril(sy)
    full = low + np.tril(sy, -1).T + np.diag(4.0 * room)
    top = float(eigvalsh(root[:, None] * full * root, check_finite=False)[-1])
    best, smallest = raised * max(1.0, top * (1.0 + least)), math.inf
    for growth in (least, 1e-7, 1e-5, 1e-3, 1e-2, 0.1, 0.5) if p is not None else ():
        tried = raised * max(1.0, top * (1.0 + max(growth, least)))
        factor, info = dpotrf((np.diag(tried) - sy).T, lower=0)
        if info == 0 and p is not None:
            y, _ = dtrtrs(factor, p.T, lower=0, trans=1)
            size = float(np.sum(spread(tried).diagonal() + np.einsum("ij,ij->j", y, y)))
            if size < smallest:
                best, smallest = tried, size
    return best


def _symmetric(m: np.ndarray, raise_by: np.ndarray) -> np.ndarray:
    """The lower triangle of M mirrored, its diagonal raised."""
    low = np.tril(m, -1)
    out = low + low.T
    out.flat[:: m.shape[0] + 1] = m.diagonal() + raise_by
    return out


def _close(
    r: np.ndarray, p: np.ndarray | None, q: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray | None:
    """S+ >= R + P Q^-1 P' with (LMI) proved, or None. `first`, `second`: what the blocks may have lost."""
    n, outs = q.shape[0], r.shape[0]
    if p is None:
        return _symmetric(r, 2.0 * first) if prove_psd(q, second) else None
    c = cholesky_shift(n + outs)
    for margin in _MARGINS:
        reduced = q.copy()
        reduced.flat[:: n + 1] -= margin * (second + c * q.diagonal())
        factor, info = dpotrf(reduced.T, lower=0, clean=0, overwrite_a=1)  # upper R, R'R = Q
        if info != 0:
            return None
        y, info = dtrtrs(factor, p.T, lower=0, trans=1)
        if info != 0 or not np.isfinite(y).all():
            return None
        f = y.T @ y
        t = _inverse_root(r.diagonal() + f.diagonal())
        last = 4.0 * U * (np.abs(f) @ t) / t
        out = _symmetric(r + f, margin * (first + last + c * f.diagonal()))
        whole = np.empty((n + outs, n + outs))
        whole[:n, :n] = q
        whole[:n, n:] = 0.0
        whole[n:, :n] = p
        gap = out - r
        whole[n:, n:] = gap
        rounding = 2.0 * U * (np.abs(gap) @ t) / t
        if prove_psd(whole, np.concatenate([second, first + rounding])):
            return out
    return None
