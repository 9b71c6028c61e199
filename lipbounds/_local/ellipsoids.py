"""The ellipsoid recursion around single inputs, batched, every rounding included (NumPy and LAPACK, float64).

S (N, d, d) bounds every increment ds of the state between the input x and any x' in its ball: ds ds' <= eps^2 S. At a
tap, with T = [W; H] (pre-activations y = W s, and what of the state lives on),

    Q = T S T',    |dy_i| <= eps sqrt(Q_ii),    slopes [c - r, c + r] on that range,
    V = Q + Q[:, A] (D - Q[A, A])^-1 Q[A, :],   A the neurons with r > 0,  D > Q[A, A] diagonal,
    S+ = [G c, I] V [G c, I]' + G r D r G',

the recursion of `ellipsoid` with c and r of this input: a neuron whose slope is known is linear and has no multiplier.

Rounding is covered by adding e I, e a normwise bound: of a product T S T' 3 gamma ||T||_F^2 ||S||_F; of the inverse,
with any Y, C' M^-1 C = C'Y + C' M^-1 (C - M Y), so ||C||_F ||C - M Y||_F / lambda covers it, M >= lambda I proved by
Cholesky. M and C are scaled by D^-1/2 first, which makes M well conditioned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs

from lipbounds._activations.slopes_on_intervals import anchored_slopes, pair_slopes
from lipbounds._form.lure import LureForm, proved_slopes
from lipbounds._form.steps import StaticArray
from lipbounds._gain.blocks import TapScaling
from lipbounds._lipsdp.tap_proof import is_identity, prove_psd
from lipbounds._norms import enclosures
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.rounding import U, gamma
from lipbounds._triangle import recursion

_TINY = 2.0**-900
# |dy| / |p| relative to the standard deviation of y: limit of the ratio, and the power that damps it
_APART, _TRUST = 30.0, 0.4
_LEAST, _MOST = 1e-4, 1e3  # of r in D, and of D r over the variance of y
_DEAD = 0.1  # least slope assumed of a neuron in a' dz/dv, as a dead neuron may become active in the ball
_FLOOR = 0.1  # floor of p^2 relative to its mean, so that a zero gradient keeps D finite
_RAISED = 1.3  # factor on the stationary D, which is computed from guessed slopes
_MARGIN, _ROOM = 1.5, 0.3  # otherwise factor on lambda_max; I - D^-1/2 Q D^-1/2 >= 0.3 I is proved


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix M within `error` (normwise) of the real one, with an upper bound of ||M||_F.

    None is the identity, which is square, and never zero.
    """

    array: np.ndarray | None
    error: float
    size: float

    def map(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(M S M', e (N,)): every M S M' of the enclosure is at most that plus e I, S (N, d, d) symmetric."""
        if self.array is None:
            return s, np.zeros(len(s))
        m = self.array
        product = np.matmul(np.matmul(m, s), m.T)
        length = frobenius(s)
        inner = m.shape[1] + 4
        wrong = 4 * gamma(inner) * self.size**2 + (2 * self.size + self.error) * self.error
        return (product + product.transpose(0, 2, 1)) / 2, wrong * length * (1 + gamma(8)) + _TINY

    def behind(self, a: np.ndarray) -> np.ndarray:
        """a M (..., n) in plain float64, for a (..., m)."""
        return a if self.array is None else a @ self.array

    def ahead(self, a: np.ndarray) -> np.ndarray:
        """M a (..., m, k) in plain float64, for a (..., n, k)."""
        return a if self.array is None else np.matmul(self.array, a)

    def map_diagonal(self, ball: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `map`, of one diagonal matrix (n,) >= 0 that is never written out."""
        if self.array is None:
            return np.diag(ball)[None], np.zeros(1)
        product = (self.array * ball) @ self.array.T
        inner = self.array.shape[1] + 4
        wrong = 4 * gamma(inner) * self.size**2 + (2 * self.size + self.error) * self.error
        e = wrong * float(ball.max(initial=0.0)) * (1 + gamma(8)) + _TINY
        return ((product + product.T) / 2)[None], np.array([e])


def frobenius(s: np.ndarray) -> np.ndarray:
    """(N,) ||S||_F, rounded up; squares below the range are counted as the least number in it."""
    flat = s.reshape(len(s), -1)
    lost = np.sqrt(flat.shape[1]) * 2.0**-510
    return np.sqrt(np.einsum("ni,ni->n", flat, flat)) * (1 + gamma(flat.shape[1] + 8)) + lost


def _matrix(m: Enclosure) -> Matrix:
    array, error = m.dense().with_error()
    if error == 0.0 and array.shape[0] == array.shape[1] and is_identity(array):
        return Matrix(None, 0.0, float(np.sqrt(len(array))) * (1 + U))
    return Matrix(array, error, float(frobenius(array[None])[0]))


@dataclass(frozen=True, eq=False)
class Stage:
    """One tap between two states: y = W s, s+ = H s + G v, v = phi(y). T = [W; H], or W alone where H = 0."""

    tap: int
    neurons: int
    T: Matrix
    G: Matrix
    lives_on: bool


def stages(view: LureForm) -> tuple[Matrix, tuple[Stage, ...]]:
    """(A_0, stages) of an elementwise view; s_0 = A_0 x."""
    host = recursion.host_form(view)
    plain = [TapScaling(None, np.ones(tap.size_out), np.ones(tap.size_in)) for tap in view.taps]
    (start, _, _), *maps = host.state_maps(plain)
    made = []
    for k, (h, g, w) in enumerate(maps):
        assert g is not None and w is not None
        lives_on = bool(h.support(axis=0).any())
        both = enclosures.stack([w.dense(), h.dense()]) if lives_on else w
        made.append(Stage(k, view.taps[k].size_in, _matrix(both), _matrix(g), lives_on))
    return _matrix(start), tuple(made)


@dataclass(frozen=True, eq=False)
class Values:
    """Pre-activations of the network at N inputs.

    Args:
        y: (N, n) per tap; error (N,): ||y - y_exact||_2 is at most that.
        slope: (N, n) per tap of the elementwise view, approximate slopes in the ball; they do not affect soundness.
    """

    y: tuple[np.ndarray, ...]
    error: tuple[np.ndarray, ...]
    slope: tuple[np.ndarray, ...] = ()

    def rows(self, at: Any) -> Values:
        return Values(*(tuple(a[at] for a in part) for part in (self.y, self.error, self.slope)))


class Range(NamedTuple):
    """What the recursion found at one stage, (N, n) each.

    The pre-activations stay in [y - down, y + up] up to `Values.error`, with slopes [c - r, c + r]; rd is r D r.
    """

    down: np.ndarray
    up: np.ndarray
    c: np.ndarray
    r: np.ndarray
    rd: np.ndarray


def ellipsoids(
    view: LureForm,
    steps: Sequence[Stage],
    s: np.ndarray,
    values: Values,
    eps: np.ndarray,
    *,
    anchored: bool,
    directions: np.ndarray,
    first: tuple[np.ndarray, np.ndarray] | None = None,
    ranges: list[Range] | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """((N, K, K), c): dz dz' <= eps^2 times that, for all pairs of inputs in the ball, or all pairs with its centre.

    c (N, n) per stage are the middles of the slopes: better than `values.slope` for another run.

    Args:
        s: (N or 1, d, d) of the first state, for the unit ball of the input.
        eps: (N,) radii > 0.
        anchored: the centre is one of the two inputs.
        directions: (N, J, K), the outputs a' z whose constants D is chosen for; any are sound.
        first: (N, n) twice, how far the first pre-activations can fall and rise, where better than the ellipsoid.
        ranges: a list that receives the `Range` of every stage.
    """
    aims, middles = _adjoints(steps, values, directions), []
    for place, stage in enumerate(steps):
        n = stage.neurons
        q, e = stage.T.map(s)
        if len(q) < len(eps):
            q, e = np.repeat(q, len(eps), axis=0), np.repeat(e, len(eps))
        elif q is s:
            q = q.copy()
        diagonal = np.einsum("nii->ni", q)
        diagonal += e[:, None] * (1 + 4 * U)  # a view: q + e I
        diagonal[:] = np.maximum(diagonal, 0) * (1 + 4 * U)
        down = np.sqrt(diagonal[:, :n]) * eps[:, None] * (1 + 8 * U)
        down = up = np.where(np.isnan(down), np.inf, down)  # beyond the range of float64
        if place == 0 and first is not None:
            down, up = np.minimum(down, first[0]), np.minimum(up, first[1])
        c, r = centre_and_radius(view, stage.tap, values, down, up, anchored)
        middles.append(c)
        v, rd = _through(q, n, c, r, aims[place])
        if ranges is not None:
            ranges.append(Range(down, up, c, r, rd))
        inner = c[:, :, None] * v[:, :n, :n] * c[:, None, :]
        wrong = 4 * U * frobenius(inner)
        np.einsum("nii->ni", inner)[:] += rd * (1 + 4 * U)
        wrong = wrong + 2 * U * frobenius(inner)
        s, more = stage.G.map(inner)
        total = more + wrong * (stage.G.size if stage.G.array is not None else 1.0) ** 2
        if stage.lives_on:
            cross = c[:, :, None] * v[:, :n, n:]
            block, slip = stage.G.ahead(cross), 2 * U * frobenius(cross)
            if stage.G.array is not None:
                slip = (2 * gamma(n + 4) * stage.G.size + stage.G.error) * frobenius(cross)
            s = s + (block + block.transpose(0, 2, 1)) + v[:, n:, n:]
            total = total + 2 * slip + 4 * U * frobenius(s)
        s = s.copy() if s is inner else s
        np.einsum("nii->ni", s)[:] += total[:, None] * (1 + 8 * U)
        # the sum on the diagonal is rounded once more
        np.einsum("nii->ni", s)[:] += np.abs(np.einsum("nii->ni", s)) * 4 * U
    return s, middles


def centre_and_radius(
    view: LureForm, k: int, values: Values, down: np.ndarray, up: np.ndarray, anchored: bool
) -> tuple[np.ndarray, np.ndarray]:
    """c and r (N, n) with every slope on [y - down, y + up] in [c - r, c + r]; r = 0 only where it is exact."""
    y, wrong = values.y[k], values.error[k][:, None]
    low, high = np.nextafter(y - wrong, -np.inf), np.nextafter(y + wrong, np.inf)
    lo, hi = np.nextafter(low - down, -np.inf), np.nextafter(high + up, np.inf)
    a, b = slopes_between(view, k, lo, hi, (low, high) if anchored else None)
    c = (a + b) / 2
    r = np.maximum(b - c, c - a)
    return c, np.where(a == b, 0.0, np.nextafter(r, np.inf))


def slopes_between(
    view: LureForm,
    k: int,
    lo: np.ndarray,
    hi: np.ndarray,
    anchor: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) (N, n) of tap k on [lo, hi], between all pairs or with a point of the `anchor` intervals."""
    tap, known = view.taps[k], proved_slopes(view, k)
    if tap.assumed or tap.expr is None:
        return np.broadcast_to(known[0], lo.shape), np.broadcast_to(known[1], lo.shape)
    host = recursion.host_form(view)
    consts = [c.array if isinstance(c, StaticArray) else host.consts[c] for c in tap.consts]
    columns = [np.broadcast_to(c, tap.shapes[0]).reshape(-1) if np.ndim(c) else c for c in consts]
    if anchor is not None:
        return anchored_slopes(tap.expr, columns, anchor, lo, hi, known)
    return pair_slopes(tap.expr, columns, lo, hi, known)


Aim = tuple[np.ndarray, np.ndarray | None]


def _adjoints(steps: Sequence[Stage], values: Values, directions: np.ndarray) -> list[Aim]:
    """Per stage a' dz/dv (N, J, n) and, where the state lives on, a' dz/ds+ (N, J, d+), by `values.slope`."""
    found: list[Aim] = []
    for stage in reversed(steps):
        p = stage.G.behind(directions)
        found.append((p, directions if stage.lives_on else None))
        slope = values.slope[stage.tap]
        slope = np.where(np.abs(slope) < _DEAD, _DEAD, slope)
        back = slope[:, None] * p
        directions = stage.T.behind(np.concatenate([back, directions], axis=2) if stage.lives_on else back)
    return found[::-1]


def _through(q: np.ndarray, n: int, c: np.ndarray, r: np.ndarray, aim: Aim) -> tuple[np.ndarray, np.ndarray]:
    """(V, r D r): V (N, m, m) >= Q + Q[:, A] (D - Q[A, A])^-1 Q[A, :], and the diagonal r_i D_i r_i (N, n)."""
    v, rd = q.copy(), np.zeros_like(r)
    linear = c[:, None] * aim[0]
    if aim[1] is not None:
        linear = np.concatenate([linear, aim[1]], axis=2)
    for i in range(len(q)):
        at = np.flatnonzero(r[i] > 0)
        if not at.size:
            continue
        if not np.isfinite(q[i]).all():
            v[i] = np.inf  # beyond the range of float64: no bound
            continue
        d = _multipliers(q[i], at, r[i, at], aim[0][i][:, at], linear[i])
        z, extra, d = _eliminate(q[i], at, d)
        v[i] += z
        v[i].flat[:: len(z) + 1] += extra * (1 + 4 * U)
        rd[i, at] = r[i, at] ** 2 * d * (1 + 4 * U)
    return v, rd


def _multipliers(
    q: np.ndarray, at: np.ndarray, r: np.ndarray, p: np.ndarray, linear: np.ndarray
) -> np.ndarray:
    """D (m,) where a' S+ a is stationary, nearly: with u_i = (D - Q)^-1 Q (c p + u) it is |u_i| = r_i |p_i| there.

    So D_i = |dy_i| / (r_i |p_i|) with dy = Q (c p + u), the increment of y that is worst for a' z, and the signs of u
    those of dy; root mean squares over several directions a. p (J, m): a' dz/dv; linear (J, size of q): c p, and the
    part of the state that is kept. As p is a guess, |dy_i| / |p_i| is pulled towards the standard deviation of y_i.
    """
    fixed, block = linear @ q[:, at], q[np.ix_(at, at)]
    dy = fixed
    for _ in range(3):
        dy = fixed + (np.sign(dy) * r * np.abs(p)) @ block
    usual = np.sqrt(np.maximum(q.flat[:: len(q) + 1][at], _TINY))
    matters = np.square(p).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt(np.square(dy).sum(axis=0) / (matters + _FLOOR * matters.mean())) / usual
    middle = float(np.median(ratio))
    if not 0 < middle < np.inf:
        ratio, middle = np.ones_like(usual), 1.0
    drawn = middle * np.clip(ratio / middle, 1 / _APART, _APART) ** _TRUST
    return np.asarray(usual * np.minimum(drawn, _MOST * usual) / np.maximum(r, _LEAST))


def _eliminate(q: np.ndarray, at: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """(Z, e, D): Z + e I >= Q[:, A] (D - Q[A, A])^-1 Q[A, :], D a strictly feasible multiple of d."""
    root = 1 / np.sqrt(np.maximum(d, _TINY))
    block = q[np.ix_(at, at)] * root[:, None] * root
    times = _RAISED
    for attempt in range(40):
        scale = root / np.sqrt(times)
        m = -(q[np.ix_(at, at)] * scale[:, None] * scale)
        m.flat[:: at.size + 1] += 1.0
        shifted = m.copy()
        shifted.flat[:: at.size + 1] -= _ROOM
        if prove_psd(shifted, 8 * U * (at.size + 1)):
            break
        if attempt == 0:
            times = max(times, _MARGIN * float(np.linalg.eigvalsh(block)[-1]))
        else:
            times = 2 * times + 1e-6
    else:
        raise ValueError("no multipliers could be proved at one of the inputs; use the global bound there")
    columns = q[at] * scale[:, None]
    factor, info = dpotrf(m, lower=1)
    y = dpotrs(factor, columns, lower=1)[0] if info == 0 else np.zeros_like(columns)
    length, found = (float(frobenius(a[None])[0]) for a in (columns, y))
    size = float(frobenius(m[None])[0])
    rest = float(frobenius((columns - m @ y)[None])[0])
    rounding = gamma(at.size + 8) * (length + (size + 1) * found) * 4
    z = columns.T @ y
    z = (z + z.T) / 2
    extra = length * (rest + rounding) / _ROOM + 4 * gamma(at.size + 8) * length * found
    extra += 4 * U * float(frobenius((np.abs(q) + np.abs(z))[None])[0])
    d = 1 / scale**2 * (1 + 8 * U)  # D is 1 / scale^2 exactly; rounded up where it is used
    return z, extra * (1 + 1e-10), d
