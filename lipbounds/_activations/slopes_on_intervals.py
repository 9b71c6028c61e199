"""Slopes of activations on intervals, for bounds that hold near one input.

Two kinds, both with every rounding included, for f on [lo, hi]:

    pairs     a <= (f(u) - f(v)) / (u - v) <= b     for all u, v in [lo, hi]
    anchored  a <= (f(u) - f(y)) / (u - y) <= b     for all u in [lo, hi], y in [y_lo, y_hi] the value at the input
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lipbounds._activations import intervals as I
from lipbounds._activations.activations import constant_columns
from lipbounds._activations.expression import Expr
from lipbounds._activations.pieces import Piece, pieces
from lipbounds._activations.slope_range import jets
from lipbounds._activations.terms import Terms

_BOXES = 8  # parts of an interval on which a smooth piece is enclosed
_FAR = 2.0**1000  # beyond it a part reaches to the end of the interval


@functools.lru_cache(maxsize=4096)
def _pieces(expr: Expr, consts: tuple[Any, ...]) -> tuple[Terms, list[Piece]]:
    terms = Terms()
    exact = tuple(c if isinstance(c, bool) or np.isinf(c) else Fraction(c) for c in consts)
    return terms, pieces(terms, expr, exact)[0]


def pair_slopes(
    expr: Expr, consts: Sequence[Any], lo: np.ndarray, hi: np.ndarray, known: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) of the shape of lo (N, n), within the slopes `known` (n,) on the whole line."""
    values, which = constant_columns(expr, consts, lo.shape[1:])
    a, b = np.empty_like(lo), np.empty_like(hi)
    for k, column in enumerate(values):
        at = np.flatnonzero(which == k)
        a[:, at], b[:, at] = _pairs(*_pieces(expr, column), lo[:, at], hi[:, at])
    a, b = np.maximum(a, known[0]), np.minimum(b, known[1])
    unclear = ~(a <= b)  # NaN, too
    return np.where(unclear, known[0], a), np.where(unclear, known[1], b)


def _pairs(terms: Terms, parts: list[Piece], lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.full(lo.shape, np.inf), np.full(lo.shape, -np.inf)
    with I.quiet():
        for part in parts:
            left, right = _ends(part)
            touched = (hi >= left[0]) & (lo <= right[1])
            if not touched.any():
                continue
            low, high = np.maximum(lo[touched], left[0]), np.minimum(hi[touched], right[1])
            slopes = _slopes_of(terms, part, low, high)
            a[touched] = np.minimum(a[touched], np.where(np.isnan(slopes[0]), -np.inf, slopes[0]))
            b[touched] = np.maximum(b[touched], np.where(np.isnan(slopes[1]), np.inf, slopes[1]))
    return a, b


def _ends(part: Piece) -> tuple[I.Interval, I.Interval]:
    left, right = part.domain.left, part.domain.right
    return (
        (-np.inf, -np.inf) if left is None else I.from_fraction(left),
        (np.inf, np.inf) if right is None else I.from_fraction(right),
    )


def _slopes_of(terms: Terms, part: Piece, low: np.ndarray, high: np.ndarray) -> tuple[Any, Any]:
    """f'([low, high]) of one piece: exact where it is affine, else enclosed on parts of the interval."""
    affine = terms.coefficients(part.term)
    if affine is not None and len(affine) <= 2:
        slope = I.from_fraction(affine[1]) if len(affine) == 2 else (0.0, 0.0)
        return np.full(low.shape, slope[0]), np.full(low.shape, slope[1])
    share = np.arange(_BOXES + 1) / _BOXES
    begin, end = (np.clip(side, -_FAR, _FAR)[:, None] for side in (low, high))  # infinite ends have no middle
    cuts = begin + (end - begin) * share
    cuts[:, 0], cuts[:, -1] = low, high
    cuts = np.maximum.accumulate(np.minimum(cuts, high[:, None]), axis=1)
    jet = jets(terms, part.term, (cuts[:, :-1], cuts[:, 1:]))[part.term]
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
    the slopes at y and the chords to lo, hi and the breakpoints between them. Other functions get `pair_slopes`.
    """
    a, b = pair_slopes(expr, consts, lo, hi, known)
    values, which = constant_columns(expr, consts, lo.shape[1:])
    for k, column in enumerate(values):
        terms, parts = _pieces(expr, column)
        lines = [terms.coefficients(part.term) for part in parts]
        if any(line is None or len(line) > 2 for line in lines):
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
