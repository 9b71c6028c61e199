"""Proof of a lower bound of the Lagrangian for given multipliers, every rounding included (NumPy, float64).

The variables are z = (u, w): the move of the input and w_i = v_i - p_i of the neurons that are not stable, where v has
slopes in [0, 1] and is p at h, for any floats h near the pre-activations at the centre (relu(y) with p = relu(h)).
Stable neurons are part of the linear map d = y - h = G z + eta, where G is known up to a Frobenius norm and eta, small,
comes from h. With v = w + p and r = w - d + q the Lagrangian is the quadratic

    L(z) = aim' dz + lambda (||u||^2 - eps^2) + sum beta (u - low)(u - high) + sum m f (v^2, v r, r^2, v, r, 1)

over all forms f of all neurons (`forms`), of multipliers m,

with the Hessian 2 Q. If Q - diag(alpha) >= 0 is proved, alpha > 0, then for any z

    min L >= L(z) - sum_i (dL/dz_i)^2 / (4 alpha_i).

z is a float solution of Q z = -g / 2, so the last term is of the size of squared roundings. In wide networks these are
large enough to matter: a larger alpha makes it smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs

from lipbounds._activations import intervals as I
from lipbounds._form.lure import LureForm
from lipbounds._gain.blocks import TapScaling
from lipbounds._lipsdp.tap_proof import prove_psd
from lipbounds._norms.rounding import U, gamma
from lipbounds._triangle import recursion

#: alpha relative to the diagonal of Q: the least, and larger ones where it leaves too much of the gradient.
_ALPHAS = (2.0**-24, 2.0**-8, 2.0**-11, 2.0**-14, 2.0**-18)
_NEGLIGIBLE = 1e-6  # of the Lagrangian
_LEAST = 2.0**-900
_UP = 1 + 2.0**-20  # covers the rounding of computed error bounds
#: By how much multipliers are weakened (`Weights.weakened`) where they are not feasible as they are.
REPAIRS = (0.0, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, eq=False)
class Gain:
    """d = G z of the neurons of one image that are not stable, and the outputs, dz_out = O z.

    Args:
        G: (n, d + n); error: its Frobenius error. O: (K, d + n); error_out.
        at: per tap, the entries that are not stable; their rows of G follow each other.
        tap: (n,) the tap of every row.
    """

    G: np.ndarray
    error: float
    O: np.ndarray  # noqa: E741
    error_out: float
    at: tuple[np.ndarray, ...]
    tap: np.ndarray

    @property
    def inputs(self) -> int:
        return self.G.shape[1] - self.G.shape[0]


def gain(
    view: LureForm,
    opened: Sequence[np.ndarray],
    slopes: Sequence[np.ndarray],
    gains: Sequence[np.ndarray],
) -> Gain:
    """The gain for one image. Per tap (n,): which neurons are not stable, slopes of v = slope y + gain w.

    `slopes` holds the slope of a stable neuron, and of the others the one below the kink; gains are exact floats.
    """
    host = recursion.host_form(view)
    scalings = [
        TapScaling(c if c.any() else None, np.where(live, g, 0.0), np.ones(len(c)))
        for live, c, g in zip(opened, slopes, gains, strict=True)
    ]
    at = tuple(np.flatnonzero(live) for live in opened)
    places = [k for k, rows in enumerate(at) if rows.size]
    begins = dict(zip(places, np.cumsum([0, *(at[k].size for k in places)]), strict=False))
    n, d = sum(rows.size for rows in at), view.in_size
    G, O = np.zeros((n, d + n)), np.zeros((view.num_outputs, d + n))  # noqa: E741
    errors, errors_out = [], []
    for source in ((), *((k,) for k in places)):
        targets = [(), *((k,) for k in places)]
        columns = (
            slice(0, d)
            if not source
            else slice(d + begins[source[0]], d + begins[source[0]] + at[source[0]].size)
        )
        for target, block in host.forward(source, targets, scalings).items():
            part = block.select(
                rows=at[target[0]] if target else None, cols=at[source[0]] if source else None
            )
            array, error = part.dense().with_error()
            if target:
                begin = begins[target[0]]
                G[begin : begin + len(array), columns] = array
                errors.append(error)
            else:
                O[:, columns] = array
                errors_out.append(error)
    tap = np.concatenate([np.full(at[k].size, k) for k in places]) if places else np.zeros(0, int)
    return Gain(G, _length(np.array(errors)), O, _length(np.array(errors_out)), at, tap)


@dataclass(frozen=True, eq=False)
class Facts:
    """What is proved about one image, for its neurons that are not stable, (n,) each, and for its ball.

    Args:
        p, q: v and r at h; wrong: a bound of ||y - h||_2 over all of them.
        forms: (F, 6, n), f (v^2, v r, r^2, v, r, 1) <= 0 on the ball, or on the part of it that a branch stands for.
        free: (F, n) where that is an equation.
        low, high: (d,) every input of the ball has low <= u <= high; eps: ||u||_2 <= eps, inf for no such bound.
    """

    p: np.ndarray
    q: np.ndarray
    wrong: float
    forms: np.ndarray
    free: np.ndarray
    low: np.ndarray
    high: np.ndarray
    eps: float


@dataclass(frozen=True, eq=False)
class Weights:
    """Multipliers: lambda, beta (d,), and (F, n) of the forms; at least 0 where `Facts.free` does not say otherwise."""

    ball: float
    box: np.ndarray
    forms: np.ndarray

    def weakened(self, t: float, tap: np.ndarray) -> Weights:
        """Multipliers with a larger Q: those of the input raised by t, later taps ever weaker against earlier ones."""
        if t == 0:
            return self
        factors = (1 - t) ** (1.0 + tap)
        box = self.box + t * float(self.box.max(initial=0.0))
        return Weights(self.ball * (1 + t), box, self.forms * factors)


def _length(a: np.ndarray) -> float:
    """||a||_2, rounded up."""
    return float(np.sqrt(np.square(a).sum()) * _UP) + 2.0**-500


def prove(gain: Gain, facts: Facts, aim: np.ndarray, m: Weights) -> float:
    """A lower bound of aim' dz on the ball, -inf where the multipliers prove none even when they are weakened.

    aim (K,) holds entries of -1, 0 and 1.
    """
    valid = np.isfinite(m.ball) and all(np.isfinite(a).all() for a in (m.box, m.forms, facts.forms))
    signs = m.ball >= 0 and (m.box >= 0).all() and ((m.forms >= 0) | facts.free).all()
    if not (valid and signs):
        return -np.inf
    if not np.isfinite(facts.eps) and m.ball > 0:
        return -np.inf
    with np.errstate(all="ignore"):
        for t in REPAIRS:
            found = _attempt(gain, facts, aim, m.weakened(t, gain.tap))
            if found > -np.inf:
                return found
    return -np.inf


def _attempt(gain: Gain, facts: Facts, aim: np.ndarray, m: Weights) -> float:
    d, n = gain.inputs, len(gain.tap)
    R = -gain.G  # r = R z + q - eta, exact: R z = w - G z
    R[np.arange(n), d + np.arange(n)] += 1.0
    total = _total(facts.forms, m.forms)
    Q = _hessian(R, total, m, d)
    slack = _hessian_slack(R, gain.error, total, m, d, Q.diagonal(), len(facts.forms))
    found, z = -np.inf, None
    for share in _ALPHAS:
        alpha = np.maximum(Q.diagonal() * share, _LEAST)
        if not prove_psd(Q, (slack + alpha) * _UP):
            if share == _ALPHAS[0]:
                return -np.inf
            continue
        if z is None:
            row = aim @ gain.O
            z = _minimiser(R, Q, row, facts, total, m, d)
            if z is None:
                return -np.inf
            low, slopes = _lagrangian(gain, R, facts, row, aim, total, m, z)
            worst = np.maximum(np.abs(slopes[0]), np.abs(slopes[1]))
        lost = float((np.square(worst) / alpha).sum() / 4 * _UP) + 2.0**-500
        least = np.nextafter(low - lost, -np.inf)
        found = max(found, float(least) if np.isfinite(least) else -np.inf)
        if share != _ALPHAS[0] or not lost > _NEGLIGIBLE * abs(low):
            break
    return found


class _Total(NamedTuple):
    """The sum of all forms with their multipliers: coefficients (6, n) between low and high; size of their terms."""

    low: np.ndarray
    high: np.ndarray
    middle: np.ndarray
    size: np.ndarray


def _total(forms: np.ndarray, m: np.ndarray) -> _Total:
    middle = np.einsum("fcn,fn->cn", forms, m)
    size = np.einsum("fcn,fn->cn", np.abs(forms), np.abs(m))
    spread = gamma(len(m) + 4) * _UP * size + 2.0**-1000
    return _Total(np.nextafter(middle - spread, -np.inf), np.nextafter(middle + spread, np.inf), middle, size)


def _hessian(R: np.ndarray, total: _Total, m: Weights, d: int) -> np.ndarray:
    """Q: diag(lambda + beta, c_vv) + R' c_rr R + (E' c_vr R + R' c_vr E) / 2, where E z = w."""
    vv, vr, rr = total.middle[:3]
    half = (rr / 2)[:, None] * R
    half[np.arange(len(R)), d + np.arange(len(R))] += vr / 2
    Q = half.T @ R
    Q = Q + Q.T
    Q.flat[:: len(Q) + 1] += np.concatenate([m.ball + m.box, vv])
    return Q


def _hessian_slack(
    R: np.ndarray, error: float, total: _Total, m: Weights, d: int, diagonal: np.ndarray, count: int
) -> np.ndarray:
    """A diagonal that covers the difference of Q and its computed value, from `count` forms.

    A symmetric matrix with entries at most N is at most diag(N t / t), t > 0; the error of G enters by norms.
    """
    n = len(R)
    vv, vr, rr = total.size[:3] * _UP
    t = 1 / np.sqrt(np.maximum(diagonal, _LEAST))
    size = np.abs(R)
    half = (rr / 2)[:, None] * size
    half[np.arange(n), d + np.arange(n)] += vr / 2
    own = np.concatenate([m.ball + m.box, vv])
    spread = half.T @ (size @ t) + size.T @ (half @ t) + own * t
    rounding = gamma(n + 16 + count) * _UP * spread / t
    grown = 2 * _length(R) * error + error**2
    by_norm = float(vr.max(initial=0.0)) * error + float(rr.max(initial=0.0)) * grown
    return (rounding + by_norm) * _UP + 2.0**-800


def _minimiser(
    R: np.ndarray, Q: np.ndarray, row: np.ndarray, facts: Facts, total: _Total, m: Weights, d: int
) -> np.ndarray | None:
    """A float approximation of the minimiser, refined once."""
    factor, info = dpotrf(Q, lower=1)
    if info != 0:
        return None
    z = np.zeros(len(Q))
    vv, vr, rr, own_v, own_r, _ = total.middle
    for _ in range(2):
        u, w = z[:d], z[d:]
        v, r = w + facts.p, R @ z + facts.q
        dv = vr * r + 2 * vv * v + own_v
        dr = vr * v + 2 * rr * r + own_r
        slope = row + R.T @ dr
        slope[:d] += 2 * m.ball * u + m.box * (2 * u - facts.low - facts.high)
        slope[d:] += dv
        z = z - dpotrs(factor, slope, lower=1)[0] / 2
    return z if np.isfinite(z).all() else None


def _lagrangian(
    gain: Gain,
    R: np.ndarray,
    facts: Facts,
    row: np.ndarray,
    aim: np.ndarray,
    total: _Total,
    m: Weights,
    z: np.ndarray,
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """(lower bound of L(z), enclosure of its gradient)."""
    d, n = gain.inputs, len(gain.tap)
    u, w = z[:d], z[d:]
    long = _length(z)
    # ||eta|| <= (1 + ||G||) ||y - h||
    moved = gain.error * long + facts.wrong * (1 + _length(gain.G) + gain.error)
    spread = (gamma(len(z) + 4) * (np.abs(R) @ np.abs(z)) + moved) * _UP + 2.0**-800
    rz = R @ z
    r = I.add((np.nextafter(rz - spread, -np.inf), np.nextafter(rz + spread, np.inf)), I.point(facts.q))
    v = I.add(I.point(w), I.point(facts.p))
    vv, vr, rr, own_v, own_r, one = zip(total.low, total.high, strict=True)
    each = I.mul(I.add(I.add(I.mul(vv, v), I.mul(vr, r)), own_v), v)
    each = I.add(I.add(each, I.mul(I.add(I.mul(rr, r), own_r), r)), one)
    at, low, high, two = I.point(u), I.point(facts.low), I.point(facts.high), I.point(2.0)
    boxes = I.mul(I.point(m.box), I.mul(I.sub(at, low), I.sub(at, high)))
    ball = I.mul(I.point(m.ball), I.point(u))
    below = [each[0], boxes[0], I.mul(ball, at)[0]]
    if np.isfinite(facts.eps):
        below.append(
            I.neg(I.mul(I.point(m.ball), I.mul(I.point(facts.eps), I.point(facts.eps))))[0].reshape(1)
        )
    of_row = np.abs(aim) @ np.abs(gain.O)
    row_error = gain.error_out * _length(aim) + _length(of_row) * gamma(len(aim) + 2)
    linear = float(row @ z) - float(gamma(len(z) + 4) * (np.abs(row) @ np.abs(z)) * _UP)
    # a margin moves by at most ||O_w|| ||y - h|| more
    linear -= (row_error * long + (_length(of_row) + row_error) * facts.wrong) * _UP
    terms = np.concatenate([*below, [np.nextafter(linear, -np.inf)]])
    least = float(terms.sum()) - float(gamma(len(terms) + 2) * np.abs(terms).sum() * _UP) - 2.0**-500
    # gradient
    dv = I.add(I.add(I.mul(vr, r), I.mul(two, I.mul(vv, v))), own_v)
    dr = I.add(I.add(I.mul(vr, v), I.mul(two, I.mul(rr, r))), own_r)
    middle, radius = (dr[0] + dr[1]) / 2, (dr[1] - dr[0]) * _UP
    size = np.abs(middle) + radius
    pulled = R.T @ middle
    spread = np.abs(R).T @ (radius + gamma(n + 4) * size) + gain.error * _length(size) + row_error
    spread = (spread + 4 * U * (np.abs(pulled) + np.abs(row))) * _UP + 2.0**-800
    base = pulled + row
    slopes = (np.nextafter(base - spread, -np.inf), np.nextafter(base + spread, np.inf))
    own = I.add(I.mul(two, ball), I.mul(I.point(m.box), I.sub(I.mul(two, at), I.add(low, high))))
    more = np.concatenate([own[0], dv[0]]), np.concatenate([own[1], dv[1]])
    return least, I.add(slopes, more)
