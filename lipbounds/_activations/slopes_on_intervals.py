"""Slopes of activations on intervals, for bounds that hold near one input.

Two kinds, both with every rounding included, for f on [lo, hi]:

    pairs     a <= (f(u) - f(v)) / (u - v) <= b     for all u, v in [lo, hi]
    anchored  a <= (f(u) - f(y)) / (u - y) <= b     for all u in [lo, hi], y in [y_lo, y_hi] the value at the input
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from lipbounds._activations import intervals as I
from lipbounds._activations.activations import constant_columns
from lipbounds._activations.enclosure import enclose
from lipbounds._activations.expression import Expr
from lipbounds._activations.pieces import Piece, pieces
from lipbounds._activations.slope_range import jets
from lipbounds._activations.terms import Terms
from lipbounds._norms.rounding import U

_BOXES = 8  # parts of an interval on which a smooth piece is enclosed
_PARTS = 4  # on either side of the input's own value
FAR = 2.0**1000  # beyond it a part reaches to the end of the interval, and nothing is sampled


@functools.lru_cache(maxsize=4096)
def _pieces(expr: Expr, consts: tuple[Any, ...]) -> tuple[Terms, list[Piece]]:
    terms = Terms()
    exact = tuple(c if isinstance(c, bool) or np.isinf(c) else Fraction(c) for c in consts)
    return terms, pieces(terms, expr, exact)[0]


def pair_slopes(
    expr: Expr,
    consts: Sequence[Any],
    lo: np.ndarray,
    hi: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
    *,
    boxes: int = _BOXES,
) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of the shape of lo (N, n), within the slopes `known` (n,) on the whole line.

    boxes: the parts on which smooth functions are enclosed.
    """
    values, which = constant_columns(expr, consts, lo.shape[1:])
    a, b = np.empty_like(lo), np.empty_like(hi)
    for k, column in enumerate(values):
        at = np.flatnonzero(which == k)
        a[:, at], b[:, at] = _pairs(*_pieces(expr, column), lo[:, at], hi[:, at], boxes)
    a, b = np.maximum(a, known[0]), np.minimum(b, known[1])
    unclear = ~(a <= b)  # NaN, too
    return np.where(unclear, known[0], a), np.where(unclear, known[1], b)


def _pairs(
    terms: Terms, parts: list[Piece], lo: np.ndarray, hi: np.ndarray, boxes: int = _BOXES
) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.full(lo.shape, np.inf), np.full(lo.shape, -np.inf)
    with I.quiet():
        for part in parts:
            left, right = _ends(part)
            touched = (hi > left[0]) & (lo < right[1])  # a part that only ends there has nothing of the piece
            touched |= (lo == hi) & (hi >= left[0]) & (lo <= right[1])
            if not touched.any():
                continue
            low, high = np.maximum(lo[touched], left[0]), np.minimum(hi[touched], right[1])
            slopes = _slopes_of(terms, part, low, high, boxes)
            a[touched] = np.minimum(a[touched], np.where(np.isnan(slopes[0]), -np.inf, slopes[0]))
            b[touched] = np.maximum(b[touched], np.where(np.isnan(slopes[1]), np.inf, slopes[1]))
    return a, b


def _ends(part: Piece) -> tuple[I.Interval, I.Interval]:
    left, right = part.domain.left, part.domain.right
    return (
        (-np.inf, -np.inf) if left is None else I.from_fraction(left),
        (np.inf, np.inf) if right is None else I.from_fraction(right),
    )


def _slopes_of(terms: Terms, part: Piece, low: np.ndarray, high: np.ndarray, boxes: int) -> tuple[Any, Any]:
    """f'([low, high]) of one piece: exact where it is affine, else enclosed on parts of the interval."""
    affine = terms.coefficients(part.term)
    if affine is not None and len(affine) <= 2:
        slope = I.from_fraction(affine[1]) if len(affine) == 2 else (0.0, 0.0)
        return np.full(low.shape, slope[0]), np.full(low.shape, slope[1])
    share = np.arange(boxes + 1) / boxes
    begin, end = (np.clip(side, -FAR, FAR)[:, None] for side in (low, high))  # infinite ends have no middle
    cuts = begin + (end - begin) * share
    cuts[:, 0], cuts[:, -1] = low, high
    cuts = np.maximum.accumulate(np.minimum(cuts, high[:, None]), axis=1)
    jet = jets(terms, part.term, (cuts[:, :-1], cuts[:, 1:]), bend=False)[part.term]
    bad = np.broadcast_to(jet.bad, cuts[:, 1:].shape)
    d_lo, d_hi = (np.broadcast_to(d, bad.shape) for d in jet.d)
    return np.where(bad, np.nan, d_lo).min(axis=1), np.where(bad, np.nan, d_hi).max(axis=1)


def anchored_slopes(
    expr: Expr,
    consts: Sequence[Any],
    y: tuple[np.ndarray, np.ndarray],
    lo: np.ndarray,
    hi: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of the shape of lo (N, n), with lo <= y[0] <= y[1] <= hi; within `pair_slopes`.

    Of a piecewise affine f the chord from y to u is monotone in u on every piece that does not hold y: its extremes are
    the slopes at y and the chords to lo, hi and the breakpoints between them. Other functions are enclosed on parts.
    """
    values, which = constant_columns(expr, consts, lo.shape[1:])
    found = [_pieces(expr, column) for column in values]
    lines_of = [[terms.coefficients(part.term) for part in parts] for terms, parts in found]
    affine = [all(line is not None and len(line) <= 2 for line in lines) for lines in lines_of]
    if not all(affine):
        with I.quiet():
            a, b = _anchored(expr, consts, y, lo, hi, known)
    else:
        a, b = pair_slopes(expr, consts, lo, hi, known)
    for k, ((terms, parts), lines) in enumerate(zip(found, lines_of, strict=True)):
        if not affine[k]:
            continue
        at = np.flatnonzero(which == k)
        box = lo[:, at], hi[:, at]
        here = y[0][:, at], y[1][:, at]
        low, high = _pairs(terms, parts, *here)
        with I.quiet():
            base = _affine(parts, lines, here)
            for spot in (*box, *(_ends(part)[1] for part in parts[:-1])):
                t = spot if isinstance(spot, tuple) else (spot, spot)
                t = tuple(np.broadcast_to(end, here[0].shape) for end in t)
                inside = (t[1] >= box[0]) & (t[0] <= box[1])
                apart = (t[0] > here[1]) | (t[1] < here[0])
                chord = I.div(I.sub(_affine(parts, lines, t), base), I.sub(t, here))
                use = inside & apart
                low = np.where(use, np.minimum(low, chord[0]), low)
                high = np.where(use, np.maximum(high, chord[1]), high)
                # too close to separate: take the pair slopes
                low = np.where(inside & ~apart, a[:, at], low)
                high = np.where(inside & ~apart, b[:, at], high)
        unclear = (box[0] == box[1]) | ~(low <= high)
        low, high = np.where(unclear, a[:, at], low), np.where(unclear, b[:, at], high)
        a[:, at], b[:, at] = np.maximum(a[:, at], low), np.minimum(b[:, at], high)
    return a, b


def _anchored(
    expr: Expr, consts: Sequence[Any], y: I.Interval, lo: np.ndarray, hi: np.ndarray, known: I.Interval
) -> I.Interval:
    """`anchored_slopes` of any function, by samples where the interval is not too long."""
    finite = (lo > -FAR) & (hi < FAR)
    left, right = np.where(finite, lo, y[0]), np.where(finite, hi, y[1])
    a, b = sampled(expr, consts, left, y, right, known, _PARTS).chords(_PARTS, _PARTS + 1)
    if finite.all():
        return a, b
    pairs = pair_slopes(expr, consts, lo, hi, known)
    return np.where(finite, a, pairs[0]), np.where(finite, b, pairs[1])


class Samples(NamedTuple):
    """f at points of intervals: cuts (2 P + 2, n), enclosures of f there, and of its slopes (2 P + 1, n) between them.

    `cuts[P]` and `cuts[P + 1]` are the ends of the middle. Slopes are those of all pairs within a part.
    """

    cuts: np.ndarray
    values: I.Interval
    slopes: I.Interval

    @property
    def middle(self) -> int:
        return len(self.cuts) // 2 - 1

    def chords(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(a, b), (n,): slopes between any point of [cuts[first], cuts[last]] and any other point of the interval.

        The chord to a point of a part is a mean of the chord to the part's nearer end and a slope of the part, with at
        most the weight that it has at the farther end.
        """
        here = self._value(first)
        low, high = np.full_like(here[0], np.inf), np.full_like(here[0], -np.inf)
        if first < last:
            low, high = self.slopes[0][first:last].min(axis=0), self.slopes[1][first:last].max(axis=0)
            width = I.sub(I.point(self.cuts[last]), I.point(self.cuts[first]))
            here = I.add(here, I.hull(I.mul((low, high), width), (0.0, 0.0)))
        middle = low, high
        for side, node in ((1, last), (-1, first)):
            stop = len(self.cuts) - 1 if side > 0 else 0
            most = middle
            for near in range(node, stop, side):
                far, part = near + side, near if side > 0 else near - 1
                s = self.slopes[0][part], self.slopes[1][part]
                if near == node:
                    a, b = s
                else:
                    gap = I.sub(I.point(self.cuts[near]), (self.cuts[first], self.cuts[last]))
                    chord = I.div(I.sub(self._value(near), here), gap)
                    start = tuple(
                        np.where(np.isnan(c), m, np.clip(c, *most)) for c, m in zip(chord, most, strict=True)
                    )
                    length = np.abs(self.cuts[far] - self.cuts[node])
                    share = np.abs(self.cuts[far] - self.cuts[near]) / np.where(length > 0, length, 1.0)
                    share = np.where(length > 0, np.minimum(share * (1 + 8 * U), 1.0), 1.0)
                    room = 8 * U * (np.abs(start[0]) + np.abs(start[1]) + np.abs(s[0]) + np.abs(s[1]))
                    a = np.minimum(start[0], start[0] + share * (s[0] - start[0]) - room)
                    b = np.maximum(start[1], start[1] + share * (s[1] - start[1]) + room)
                most = np.minimum(most[0], s[0]), np.maximum(most[1], s[1])
                low, high = np.minimum(low, a), np.maximum(high, b)
        whole = self.slopes[0].min(axis=0), self.slopes[1].max(axis=0)
        return np.clip(low, *whole), np.clip(high, *whole)

    def _value(self, node: int) -> I.Interval:
        return self.values[0][node], self.values[1][node]


def turn(parts: int) -> int:
    """How many of the parts of one side lie between the middle and the point where f turns, if it has one."""
    return max(1, parts // 4)


def _divided(lo: np.ndarray, turn: np.ndarray, hi: np.ndarray, at: int, parts: int) -> np.ndarray:
    """lo <= hi and points between them that divide it into parts; the point `at` is `turn` where that is not NaN."""
    middle = np.where(np.isnan(turn), lo + (hi - lo) * (at / parts), turn)
    share = np.arange(parts + 1).reshape(-1, *[1] * lo.ndim)
    cuts = np.where(
        share < at, lo + (middle - lo) * (share / at), middle + (hi - middle) * ((share - at) / (parts - at))
    )
    cuts[0], cuts[-1] = lo, hi
    return np.clip(cuts, lo, hi)


def _turns(
    expr: Expr, consts: Sequence[Any], lo: np.ndarray, middle: tuple[np.ndarray, np.ndarray], hi: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The breakpoints of f in (lo, middle[0]) and (middle[1], hi), about, that are nearest to the middle, or NaN."""
    left, right = np.full_like(lo, np.nan), np.full_like(hi, np.nan)
    values, which = constant_columns(expr, consts, lo.shape[-1:])
    for k, column in enumerate(values):
        at = np.flatnonzero(which == k)
        for part in _pieces(expr, column)[1][:-1]:
            spot = float(_ends(part)[1][0])
            inside = (spot > lo[..., at]) & (spot < middle[0][..., at])
            left[..., at] = np.where(inside, np.fmax(left[..., at], spot), left[..., at])
            inside = (spot > middle[1][..., at]) & (spot < hi[..., at])
            right[..., at] = np.where(inside, np.fmin(right[..., at], spot), right[..., at])
    return left, right


def sampled(
    expr: Expr,
    consts: Sequence[Any],
    lo: np.ndarray,
    middle: tuple[np.ndarray, np.ndarray],
    hi: np.ndarray,
    known: tuple[np.ndarray, np.ndarray],
    parts: int,
) -> Samples:
    """f on lo <= middle[0] <= middle[1] <= hi, (n,) each or (N, n), with `parts` on either side of the middle.

    Values are infinite where nothing is known; slopes are within `known`.
    """
    turns = _turns(expr, consts, lo, middle, hi)
    left = _divided(lo, turns[0], middle[0], parts - turn(parts), parts)
    right = _divided(middle[1], turns[1], hi, turn(parts), parts)
    cuts = np.maximum.accumulate(np.concatenate([left, right]), axis=0)
    flat = cuts.reshape(-1, lo.shape[-1])
    each = len(flat) // len(cuts)
    a, b = pair_slopes(expr, consts, flat[:-each], flat[each:], known, boxes=2)
    low, high = (v.reshape(cuts.shape) for v in enclose(expr, consts, flat, flat))
    return Samples(cuts, (low, high), (a.reshape(-1, *lo.shape), b.reshape(-1, *lo.shape)))


def kink(
    expr: Expr, consts: Sequence[Any], shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """(t, a, b), arrays of `shape`, where f is continuous with slope a up to t and b from t on; None elsewhere.

    Exact: None, too, where t, a, b or b - a is no float64. An affine f has a = b and t = 0.
    """
    values, which = constant_columns(expr, consts, shape)
    found = np.zeros((3, len(values)))
    for k, column in enumerate(values):
        terms, parts = _pieces(expr, column)
        lines = [terms.coefficients(part.term) for part in parts]
        if len(parts) > 2 or any(line is None or len(line) > 2 for line in lines):
            return None
        slopes = [line[1] if len(line) == 2 else Fraction(0) for line in lines if line is not None]
        at = parts[0].domain.right if len(parts) == 2 else Fraction(0)
        if at is None:
            return None
        exact = (at, slopes[0], slopes[-1], slopes[-1] - slopes[0])
        if any(abs(q) > 1e100 or Fraction(float(q)) != q for q in exact):
            return None
        found[:, k] = [float(q) for q in exact[:3]]
    t, a, b = (row[which].reshape(shape) for row in found)
    return t, a, b


def _affine(parts: list[Piece], lines: list[Any], t: I.Interval) -> I.Interval:
    """f([t]) of a piecewise affine f: the hull over the pieces that meet the interval."""
    low, high = np.full(np.shape(t[0]), np.inf), np.full(np.shape(t[0]), -np.inf)
    for part, line in zip(parts, lines, strict=True):
        left, right = _ends(part)
        met = (t[1] >= left[0]) & (t[0] <= right[1])
        clipped = np.clip(t[0], left[0], right[1]), np.clip(t[1], left[0], right[1])
        value: I.Interval = I.from_fraction(line[0]) if line else (0.0, 0.0)
        if len(line) == 2:
            value = I.add(value, I.mul(I.from_fraction(line[1]), clipped))
        low = np.where(met, np.minimum(low, value[0]), low)
        high = np.where(met, np.maximum(high, value[1]), high)
    return low, high
