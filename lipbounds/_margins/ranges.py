"""Ranges of pre-activations by lines: every activation between two lines, put into the next ones, down to the input.

The ellipsoids bound all neurons of a layer together; lines bound one at a time, from the inputs that move it. In l-inf
above all that is narrower: of three networks 64-64-64-10 on digits the ranges of the second layer are 0.60 to 0.75 as
wide, in l2 0.86 to 0.94.

Of the neurons that are not stable on a ball `proof.Gain` has d = G (u, w) + eta with known errors. Between lines

    S' d_j + C' <= w_j <= S d_j + C,

each row of G is bounded from above by an affine function of u alone, one tap after the other from the last one, and
that over the ball and the box. What rounding leaves of a coefficient is multiplied by the largest |w_j| or |u|.

Source: Zhang et al., Efficient neural network robustness certification with general activation functions, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lipbounds._local import box as localbox
from lipbounds._margins.forms import Curve
from lipbounds._margins.proof import Gain
from lipbounds._norms.rounding import U, gamma

_UP = 1 + 2.0**-20
_TINY = 2.0**-500


class Lines(NamedTuple):
    """slope d + shift above (first) and below (second) of w, (2, n) each."""

    slope: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True, eq=False)
class Ball:
    """The moves u of the input: ||u|| <= eps in `norm` and -low <= u <= high (d,)."""

    eps: float
    norm: float
    low: np.ndarray
    high: np.ndarray

    @property
    def most(self) -> np.ndarray:
        """(d,) the largest |u|."""
        return np.minimum(np.maximum(self.low, self.high), self.eps)


def of_relu(lo: np.ndarray, h: np.ndarray, hi: np.ndarray) -> list[Lines]:
    """Lines of w = relu(h + d) - relu(h) where h and h + d are in [lo, hi].

    The one below is parallel to the chord above, or that of least area.
    """
    p, on = np.maximum(h, 0.0), (lo >= 0).astype(float)
    crosses = (lo < 0) & (hi > 0)
    chord = np.where(crosses, hi / np.where(crosses, hi - lo, 1.0), on)
    slack = 32 * U * np.maximum(hi, -lo)
    above = np.where(crosses, chord * (h - lo) - p + slack, 0.0)
    found = []
    for slope in (chord, (hi > -lo).astype(float)):
        below = np.where(crosses, slope, on)
        shift = np.where(crosses, below * h - p - slack, 0.0)  # s y <= relu(y) for s in [0, 1]
        found.append(Lines(np.stack([chord, below]), np.stack([above, shift])))
    return found


def of_curve(curve: Curve, middle: np.ndarray, reach: np.ndarray) -> list[Lines]:
    """Lines of w from those of a curve; the second ones are lowest (highest) at the `middle` of the range of d.

    reach (n,): the largest |d|.
    """
    pairs = []
    for both in (curve.forms[-4:-2], curve.forms[-2:]):
        slopes, shifts = [], []
        for sign, (left, right, one) in zip((1.0, -1.0), both[:, 3:], strict=True):
            # left v + right r + one <= 0, where v = w + p, r = w - d + q
            unit = sign * (left + right)
            safe = np.where(unit > 0, unit, 1.0)
            shift = -sign * (left * curve.p + right * curve.q + one) / safe
            size = (np.abs(left * curve.p) + np.abs(right * curve.q) + np.abs(one)) / safe + reach
            slopes.append(np.where(unit > 0, sign * right / safe, 0.0))
            shifts.append(np.where(unit > 0, shift + sign * 32 * U * size, sign * reach))
        pairs.append(Lines(np.stack(slopes), np.stack(shifts)))
    first, second = pairs
    at = [line.slope * middle + line.shift for line in pairs]
    better = np.stack([at[1][0] < at[0][0], at[1][1] > at[0][1]])
    best = Lines(*(np.where(better, b, a) for a, b in zip(first, second, strict=True)))
    return [first, best]


def converted(lines: Lines, new: Curve, old: Curve, reach: np.ndarray) -> Lines:
    """Lines of the w of one curve as lines of that of another one, of the same function around the same point."""
    gain = np.where(old.gain > 0, old.gain, 1.0)
    slope = (new.base - old.base + new.gain * lines.slope) / gain
    shift = new.gain * lines.shift / gain
    size = (np.abs(new.base) + np.abs(old.base) + new.gain) / gain * reach + np.abs(shift)
    return Lines(slope, shift + np.array([[1.0], [-1.0]]) * 16 * U * size)


def narrowed(
    gain: Gain,
    ranges: tuple[np.ndarray, np.ndarray, np.ndarray],
    lines_of: Callable[[int, np.ndarray, np.ndarray], list[Lines]],
    wrong: float,
    ball: Ball,
) -> tuple[np.ndarray, np.ndarray]:
    """(lo, hi), (n,): ranges of the pre-activations of the rows of G, within those that are given as (lo, h, hi).

    lines_of(tap, lo, hi): lines of the neurons of a tap that have these ranges.
    """
    lo, h, hi = ranges[0].copy(), ranges[1], ranges[2].copy()
    most = np.maximum(hi - h, h - lo) * (1 + 4 * U)
    kept = [Lines(np.zeros((2, h.size)), np.zeros((2, h.size))) for _ in range(2)]
    for tap in sorted(set(gain.tap.tolist())):
        rows = np.flatnonzero(gain.tap == tap)
        for lines in kept:
            up, down = reached(gain, rows, lines, wrong, most, ball)
            hi[rows] = np.fmin(hi[rows], np.maximum(np.nextafter(h[rows] + up, np.inf), h[rows]))
            lo[rows] = np.fmax(lo[rows], np.minimum(np.nextafter(h[rows] - down, -np.inf), h[rows]))
        for lines, own in zip(kept, lines_of(tap, lo[rows], hi[rows]), strict=True):
            lines.slope[:, rows], lines.shift[:, rows] = own
    return lo, hi


def reached(
    gain: Gain, rows: np.ndarray, lines: Lines, wrong: float, most: np.ndarray, ball: Ball
) -> np.ndarray:
    """(2, m) upper bounds of d and of -d for these rows of G, all of one tap.

    wrong: a bound of ||y - h||_2, as in `proof.Facts`; most (n,): the largest |w| and |d| of every neuron.
    """
    d, n = gain.inputs, len(gain.tap)
    first = int(rows[0])
    size = np.concatenate([ball.most, most])
    spread = np.abs(gain.G) @ size  # of a row: what its terms can add up to
    long = float(np.sqrt(np.square(size).sum()) * _UP)
    frobenius = float(np.sqrt(np.square(gain.G).sum()) * _UP)
    eta = (gain.error * long + wrong * (1 + frobenius + gain.error)) * _UP + _TINY
    out = []
    for sign in (1.0, -1.0):
        rest, inputs = sign * gain.G[rows][:, d:], sign * gain.G[rows][:, :d]
        total, terms, weight = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros((len(rows), n))
        for tap in sorted(set(gain.tap[:first].tolist()), reverse=True):
            at = np.flatnonzero(gain.tap == tap)
            up, down = np.maximum(rest[:, at], 0.0), np.minimum(rest[:, at], 0.0)
            weight[:, at] = up * lines.slope[0, at] + down * lines.slope[1, at]
            total += up @ lines.shift[0, at] + down @ lines.shift[1, at]
            terms += (up - down) @ (np.abs(lines.shift[:, at]).max(axis=0) + most[at])
            rest[:, : at[0]] += weight[:, at] @ gain.G[at][:, d : d + at[0]]
            inputs += weight[:, at] @ gain.G[at][:, :d]
        used = np.abs(weight)
        lost = gamma(4 * n + 32) * (spread[rows] + used @ spread + terms) + (1 + used.sum(axis=1)) * eta
        _, top = localbox.reach(inputs, 0.0, np.array([ball.eps]), ball.norm, ball.low[None], ball.high[None])
        out.append(top[0] + total + lost * _UP + gamma(8) * (np.abs(top[0]) + np.abs(total)) + _TINY)
    return np.stack(out)
