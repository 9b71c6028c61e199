"""Quadratic forms that are not positive where a neuron is: what the Lagrangian knows of activations.

f(y) moves by base d + gain w over the range of the pre-activation, d = y - h, with slopes of w(d) in [0, 1]. With
v = w + p and r = w - d + q, 0 <= v <= top and 0 <= r <= bottom are the ends of the range. Forms (F, 6, n) are the
coefficients of v^2, v r, r^2, v, r and 1; each form is at most 0 at every point of the range, as real arithmetic has
it for these floats. The first one has v r with the coefficient 1, the next two are v (v - top) and r (r - bottom).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lipbounds._activations import intervals as I
from lipbounds._activations.expression import Expr
from lipbounds._activations.slopes_on_intervals import Samples, sampled
from lipbounds._norms.rounding import U

_TINY = 2.0**-1000  # covers what underflows
FEWEST = 4  # forms of a tap: those of a relu
_PARTS = 8  # of either side of the centre
_ANCHORS = 3, 6, 11, 14  # nodes of `sampled` that have a form of their own


class Curve(NamedTuple):
    """One tap on a ball, (n,) each; forms (F, 6, n). sector: slopes (2, n) of w between h and any point."""

    base: np.ndarray
    gain: np.ndarray
    p: np.ndarray
    q: np.ndarray
    forms: np.ndarray
    sector: np.ndarray


def of_relu(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """(4, 6, n): v r = 0, v (v - top), r (r - bottom) and the chord top r + bottom v <= top bottom."""
    forms = np.zeros((4, 6, len(top)))
    forms[0, 1] = forms[1, 0] = forms[2, 2] = 1.0
    forms[1, 3], forms[2, 4] = -top, -bottom
    with np.errstate(over="ignore"):
        most = np.where((top > 0) & (bottom > 0), np.nextafter(top * bottom, np.inf), 0.0)
    forms[3, 3:] = bottom, top, -most
    return forms


def ends(forms: Any) -> tuple[Any, Any]:
    """(top, bottom), (n,) each."""
    return -forms[1, 3], -forms[2, 4]


def padded(part: np.ndarray, count: int) -> np.ndarray:
    """Forms (F, 6, n) or their multipliers (F, n) with zeros up to F = count."""
    return np.pad(part, ((0, count - len(part)), *[(0, 0)] * (part.ndim - 1)))


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Forms, or their multipliers, of several taps side by side, padded to the same number."""
    most = max(len(part) for part in parts)
    return np.concatenate([padded(part, most) for part in parts], axis=-1)


def of_curve(
    expr: Expr,
    consts: Sequence[Any],
    h: np.ndarray,
    lo: np.ndarray,
    hi: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
) -> Curve:
    """Any function with slopes within `known` (n,), on lo <= h <= hi (n,), finite."""
    with I.quiet():
        found = sampled(expr, consts, lo, (h, h), hi, known, _PARTS)
        base = found.slopes[0].min(axis=0)
        gain = np.nextafter(found.slopes[1].max(axis=0) - base, np.inf)
        gain = np.where(found.slopes[1].max(axis=0) == base, 0.0, gain)
        unit = I.point(np.where(gain > 0, gain, 1.0))
        rise = tuple(np.clip(s, 0.0, 1.0) for s in I.div(I.sub(found.slopes, I.point(base)), unit))
        d = I.sub(I.point(found.cuts), I.point(h))
        w = I.sub(found.values, tuple(end[_PARTS] for end in found.values))
        w = I.div(I.sub(w, I.mul(I.point(base), d)), unit)
        own = Samples(found.cuts, _integrated(w, rise, found.cuts), rise)
        return Curve(base, gain, *_forms(own, d))


def _forms(own: Samples, d: I.Interval) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(p, q, forms, sector) of w at the cuts, where the pre-activation moves by d."""
    w = own.values
    p = np.nextafter(np.maximum(-w[0][0], 0.0), np.inf)
    q = np.nextafter(np.maximum(I.sub(d, w)[1][-1], 0.0), np.inf)
    v, r = I.add(w, I.point(p)), I.add(I.sub(w, d), I.point(q))
    top, bottom = v[1][-1], r[1][0]
    zero, one = np.zeros_like(p), np.ones_like(p)
    forms = [_product(zero, one, I.point(p), I.point(q), top, bottom), *of_relu(top, bottom)[1:3]]
    sector = own.chords(_PARTS, _PARTS)
    forms.append(_product(*sector, I.point(p), I.point(q), top, bottom))
    for node in _ANCHORS:
        at = tuple(end[node] for end in v), tuple(end[node] for end in r)
        forms.append(_product(*own.chords(node, node), *at, top, bottom))
    for slope in _tangents(w, d, own.slopes):
        forms += [_line(sign, slope, v, r, own, top + bottom) for sign in (1.0, -1.0)]
    return p, q, np.stack(forms), np.stack(sector)


def _integrated(w: I.Interval, rise: I.Interval, cuts: np.ndarray) -> I.Interval:
    """w at the cuts, within what the slopes say from h, where it is 0."""
    low, high = (np.where(np.isnan(end), far, end) for end, far in zip(w, (-np.inf, np.inf), strict=True))
    moves = I.mul(rise, I.sub(I.point(cuts[1:]), I.point(cuts[:-1])))
    zero = np.zeros_like(low[0])
    for middle, side in ((_PARTS + 1, 1), (_PARTS, -1)):
        low[middle] = high[middle] = zero
        for j in range(middle, len(cuts) - 1 if side > 0 else 0, side):
            part = j if side > 0 else j - 1
            move = moves[0][part], moves[1][part]
            ahead = (I.add if side > 0 else I.sub)((low[j], high[j]), move)
            low[j + side] = np.maximum(low[j + side], ahead[0])
            high[j + side] = np.minimum(high[j + side], ahead[1])
    return low, high


def _product(
    a: np.ndarray, b: np.ndarray, v: I.Interval, r: I.Interval, top: np.ndarray, bottom: np.ndarray
) -> np.ndarray:
    """(6, n): the sector ((1-b)(v - V) + b (r - R)) ((1-a)(v - V) + a (r - R)) <= 0 around a point (V, R) of the curve.

    With V and R known to e, and factors that are off by e as well, the product is at most 2 e (top + bottom) + e^2.
    """
    V, R = (np.clip((end[0] + end[1]) / 2, 0.0, m) for end, m in ((v, top), (r, bottom)))
    size = top + bottom
    e = (v[1] - v[0]) + (r[1] - r[0]) + 8 * U * size
    vv, vr, rr = (1 - b) * (1 - a), (1 - b) * a + b * (1 - a), a * b
    slack = (2 * e * size + np.square(e) + 64 * U * np.square(size)) * (1 + 8 * U) + _TINY
    one = vv * V * V + vr * V * R + rr * R * R - slack
    return np.stack([vv, vr, rr, -(2 * vv * V + vr * R), -(2 * rr * R + vr * V), one])


def _tangents(w: I.Interval, d: I.Interval, rise: I.Interval) -> list[np.ndarray]:
    """Slopes of the lines that bound the curve: that of the chord, and that at the centre."""
    climb, run = ((end[0] + end[1])[-1] - (end[0] + end[1])[0] for end in (w, d))
    here = (rise[0] + rise[1])[_PARTS] / 2
    return [np.clip(np.nan_to_num(slope, nan=0.5), 0.0, 1.0) for slope in (climb / run, here)]


def _line(
    sign: float,
    slope: np.ndarray,
    v: I.Interval,
    r: I.Interval,
    own: Samples,
    unit: np.ndarray,
) -> np.ndarray:
    """(6, n): sign ((1 - s) v + s r) <= its largest value on the curve, all times `unit`."""
    left, right = sign * (1 - slope), sign * slope
    g = I.add(I.mul(I.point(left), v), I.mul(I.point(right), r))
    bend = I.sub(I.mul(I.add(I.point(left), I.point(right)), own.slopes), I.point(right))
    a, b = np.minimum(bend[0], 0.0), np.maximum(bend[1], 0.0)
    size = np.nextafter(np.diff(own.cuts, axis=0), np.inf)
    begin, end = g[1][:-1], g[1][1:]
    # rising by at most b from the left end and by at most -a from the right one
    share = b / np.where(b > a, b - a, 1.0)
    peak = share * end + (1 - share) * begin - share * a * size
    peak = peak + 32 * U * (np.abs(begin) + np.abs(end) + np.maximum(-a, b) * size)
    peak = np.where((a < 0) & (b > 0), np.where(np.isnan(peak), np.inf, peak), -np.inf)
    most = np.maximum(np.maximum(begin, end), peak).max(axis=0) + 16 * U * unit + _TINY
    zero = np.zeros_like(slope)
    return np.stack([zero, zero, zero, left * unit, right * unit, -np.nextafter(most * unit, np.inf)])
