"""The search for local radii: among the balls around an example, find the one that certifies the most.

With m(eps) = min_i gap_i / L_yi(eps), falling in eps, every ball of radius eps certifies min(eps, m(eps)), as L_yi(eps)
holds inside it; the best is the eps at which m(eps) = eps.

Around wide layers the balls are tried by estimates in float32 (`Around.estimates`), and only the one that they lead to
is proved. Where its proof certifies less than was estimated, the best of the balls that were tried is proved, and where
that certifies less, too, or a proof leaves more room than the estimates did, the whole search is repeated by proofs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from lipbounds._local.engines import Around
from lipbounds._norms.between import enlarged
from lipbounds._norms.rounding import U, gamma, roots_up, squared_distances

_ROOM = 4.0  # a search continues while the last ball was certified and the radius may grow by a larger factor
_SAID = 1.5  # a note reports searches that ended although the radius may grow by a larger factor
_STEP, _PATIENCE = 16.0, 16  # the next ball is at most that much larger; after so many, its fourth power
_FARTHEST = 1e100  # no larger ball is tried
# -d log m / d log eps before two balls are known, where the first one was too large or too small
_FALL, _RISE = 0.1, 0.6
_HOPE = 0.9  # share of the goal from which a second try with better multipliers may reach it
_STEEPEST = 4.0  # where it is larger than that, there is a cliff between the two balls
_BETTER = 1.1  # m may be above the end of the interval by that factor, as multipliers improve
_BEYOND, _INSIDE = 1.002, 0.02  # a ball is a little too large, and keeps away from the ends of the interval
_SPARE = 1.003  # and more so the ball of the proof, whose multipliers are the best of all
# the next ball divides an interval whose log is longer than that, and than that share of the one before
_SHORT, _SLOW = 0.03, 0.5
# shares of the estimate: below them the best ball is proved, and the search repeated
_MISSED, _ANEW = 0.99, 0.97


def ratios(gaps: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(N,) the least gap over its constant, rounded down; a constant of 0 never lets the margin vanish.

    Among denormals division and product err by half the least of them each. Above the range of float64 its largest
    number is a lower bound.
    """
    zero = scale == 0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        ratio = gaps / np.where(zero, 1.0, scale) * (1 - 4 * U)
    ratio = np.where((ratio > 0) & (ratio < 2.0**-1000), np.nextafter(ratio, 0.0), ratio)
    ratio = np.minimum(ratio, np.finfo(np.float64).max)
    return np.asarray(np.where(zero & (gaps > 0), np.inf, ratio).min(axis=1, initial=np.inf))


class Interval:
    """Intervals [low, high] that hold the best radii of N examples, and the balls to try next, eps (N,).

    log m is nearly linear in log eps: the next ball is where the line through the last two balls says that m(eps) =
    eps, and a little larger, as m falls slowly. Where that has left more than half of the interval, the next ball
    divides it. ball: the one that certifies low; whole: whether the last one was certified as a whole.
    """

    def __init__(self, start: np.ndarray) -> None:
        self.low, self.high, self.eps = start.copy(), np.full(len(start), np.inf), 1.5 * start
        self.ball, self.whole, self.used = start.copy(), np.zeros(len(start), bool), np.zeros(len(start), int)
        self.last, self.width = np.full((2, len(start)), np.nan), np.full(len(start), np.inf)
        self.calls = 0

    def left(self, tries: int) -> np.ndarray:
        """The examples that are not done."""
        return np.flatnonzero((self.high > 1.01 * self.low) & (self.used < tries) & (self.eps < _FARTHEST))

    @np.errstate(all="ignore")
    def tried(self, rows: np.ndarray, m: np.ndarray) -> None:
        """m (len(rows),) on the balls `eps` of these rows; balls that are certified while m is larger count as none."""
        eps = self.eps[rows]
        self.whole[rows] = m >= eps
        self.ball[rows] = np.where(np.minimum(eps, m) > self.low[rows], eps, self.ball[rows])
        low = self.low[rows] = np.maximum(self.low[rows], np.minimum(eps, m))
        old = self.high[rows]
        old = np.where(m < _BETTER * old, np.maximum(old, m), old)  # it was found with worse multipliers
        high = self.high[rows] = np.minimum(old, np.maximum(eps, m))
        self.used[rows] += ~(self.whole[rows] & (high > _ROOM * low))
        here = np.log([eps, m])
        along, down = here - self.last[:, rows]
        steep = -down / along
        guess = np.where(m < eps, _FALL, _RISE)
        fall = np.where(np.isfinite(steep), np.maximum(steep, 0.0), guess)
        root = _BEYOND * np.exp((here[1] + fall * here[0]) / (1 + fall))
        top = np.minimum(high, (_STEP if self.calls < _PATIENCE else _STEP**4) * low)
        inner = _INSIDE * (top - low)
        width = np.log(high / low)
        quick = (width < np.maximum(_SLOW * self.width[rows], _SHORT)) & (fall < _STEEPEST)
        quick &= (root > 0) & (root < np.inf)
        self.eps[rows] = np.where(quick, np.clip(root, low + inner, top - inner), low + 0.6 * (top - low))
        self.last[:, rows], self.width[rows] = here, width
        self.calls += 1


class Search:
    """Radii of N examples, raised by one engine after another.

    Args:
        labels: (N,); gaps: (N, K) proved margins, of one output (N, 1).
        start: (N,) the global radii, where the search of every engine begins.
        tries: balls per example and engine. A ball that is certified as a whole does not count while the radius may
            still grow much.
        goal: a radius that is enough. Only this ball is tried, twice at most, around examples below it.

    best (N,) are the radii so far, and by (N,) the engines that gave those above the global ones, "" elsewhere; results
    of an engine stay if it fails later. An engine takes the same steps as it would alone, every try narrowing the
    `Interval` of a radius, and stops before them only where all the intervals of a chunk end below the best: so no
    engine alone finds more. (Examples cannot leave one by one: local LipLT takes as many Lanczos steps as the slowest
    example of a call needs.)
    """

    def __init__(
        self,
        labels: np.ndarray,
        gaps: np.ndarray,
        start: np.ndarray,
        tries: int,
        goal: float | None = None,
    ) -> None:
        self.labels, self.gaps, self.start, self.tries, self.goal = labels, gaps, start, tries, goal
        self.by = np.full(len(start), "", "<U14")
        self.best, self.todo = start.copy(), np.flatnonzero((start > 0) & np.isfinite(start))
        self.interrupted = False
        if goal is not None:
            self.todo = self.open()
        self._open = np.zeros(len(start))  # largest radius still possible where the last ball was certified

    def open(self) -> np.ndarray:
        """The examples that are classified as labelled and not certified at the goal."""
        assert self.goal is not None
        return np.flatnonzero((self.best > 0) & (self.best < self.goal))

    def run(self, around: Around) -> None:
        """Raise the radii by an engine, which is around the examples `todo`."""
        around.each(self._certify if self.goal is None else self._reach, "local radii")

    def _radii(
        self,
        near: Around,
        bounds: Callable[..., np.ndarray],
        at: np.ndarray,
        rows: np.ndarray,
        eps: np.ndarray,
        **options: Any,
    ) -> np.ndarray:
        """m(eps) for some rows of a chunk with the examples `at`, 0 without a bound.

        bounds: `near.outputs`; with `near.estimates` m is an estimate.
        """
        labels, gaps = self.labels[at[rows]], self.gaps[at[rows]]
        scale = enlarged(row_roots(bounds(rows, eps, labels=labels, **options), labels), near.stretch)
        return np.where(np.isfinite(scale).all(axis=1), ratios(gaps, scale), 0.0)

    def _reach(self, near: Around, part: slice) -> None:
        at, goal = self.todo[part], float(self.goal or 0.0)
        options = {"enough": True} if near.improves else {}
        left = np.flatnonzero(self.best[at] < goal)
        for call in range(min(self.tries, 2)):
            if not left.size:
                return
            eps = np.full(left.size, goal)
            m = self._radii(near, near.outputs, at, left, eps, call=call, **options)
            self._keep(near, at, left, np.minimum(m, goal))
            # better multipliers of a wide network add a few per cent
            left = left[(m < goal) & ((m > _HOPE * goal) | (not near.improves))]

    def _keep(self, near: Around, at: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        """Radii that an engine found for some rows of a chunk with the examples `at`."""
        better = found > self.best[at[rows]]
        near.used[rows] |= better
        self.by[at[rows][better]] = near.way
        self.best[at[rows]] = np.maximum(found, self.best[at[rows]])

    def _certify(self, near: Around, part: slice) -> None:
        at = self.todo[part]
        rows = self._estimated(near, at) if near.in_single else np.arange(len(at))
        if not rows.size:
            return
        found = Interval(self.start[at[rows]])
        for call in itertools.count():
            left = found.left(self.tries)
            if not (found.high > self.best[at[rows]])[left].any():
                break
            found.tried(left, self._radii(near, near.outputs, at, rows[left], found.eps[left], call=call))
            self._keep(near, at, rows, found.low)
        self.leave(at[rows], np.where(found.whole, found.high, 0.0))

    def _estimated(self, near: Around, at: np.ndarray) -> np.ndarray:
        """The rows of a chunk whose radius is another one by one or two proofs than by estimates."""
        found, best = Interval(self.start[at]), self.best[at]
        while True:
            left = found.left(self.tries)
            left = left[found.high[left] > best[left]]
            if not left.size:
                break
            found.tried(left, self._radii(near, near.estimates, at, left, found.eps[left]))
        rows = np.flatnonzero(found.high > best)
        more = np.zeros(len(at), bool)
        last = found.eps * (_SPARE if near.improves else 1.0)
        for balls, share in ((last, _MISSED), (found.ball, _ANEW)):
            if not rows.size:
                break
            eps = balls[rows]
            m = self._radii(near, near.outputs, at, rows, eps, search=False)
            self._keep(near, at, rows, np.minimum(m, eps))
            self.leave(at[rows], np.where(m >= eps, np.minimum(m, found.high[rows]), 0.0))
            more[rows] |= (m >= eps) & (_ANEW * m > found.high[rows])  # the estimates were too large
            rows = rows[self.best[at[rows]] < share * found.low[rows]]
        more[rows] = True
        return np.flatnonzero(more)

    def leave(self, at: np.ndarray, possible: np.ndarray) -> None:
        """Note how far the radii of some examples may still grow, 0 where the last ball was not certified."""
        self._open[at] = np.maximum(self._open[at], possible)

    def limit(self, at: np.ndarray, largest: np.ndarray) -> None:
        """Note that the search of some examples would find no radius above these."""
        self._open[at] = np.minimum(self._open[at], largest)

    def notes(self) -> tuple[str, ...]:
        """Notes about searches that ended early."""
        unfinished = int((self._open > _SAID * self.best).sum())
        if not unfinished:
            return ()
        return (
            f"for {unfinished} of {len(self.best)} examples the search ended while the whole ball was still certified: "
            f"their radii may be more than {_SAID:g} times larger; take more tries than {self.tries}: "
            "local=lb.Local(tries=...)",
        )


def row_roots(out: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, K) upper bounds of the constants of z_y - z_i from blocks (N, J, K, K) (`Around.outputs`).

    Of one output (N, 1) its own constant; inf where the blocks are not finite.
    """
    rows = np.arange(len(out))
    diagonal = np.einsum("njii->nji", out)
    with np.errstate(over="ignore", invalid="ignore"):
        if out.shape[-1] == 1:
            square = diagonal * (1 + 4 * U)
        else:
            both = diagonal + diagonal[rows, :, labels][:, :, None]
            square = squared_distances(both, out[rows, :, labels])
        total = roots_up(square).sum(axis=1) * (1 + gamma(out.shape[1]))
    total[~np.isfinite(out).all(axis=(1, 2, 3))] = np.inf
    if out.shape[-1] > 1:
        own = total[rows, labels]
        total[rows, labels] = np.where(np.isinf(own), np.inf, 1.0)  # its gap is inf
    return total
