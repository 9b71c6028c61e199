"""Recursions on balls around examples: in float32 those that choose what to prove, in float64 those that prove it.

A recursion in float32 costs half of one in float64. What it finds is an estimate and chooses three things: the radius
of the next ball, the slopes that the multipliers of the next recursion are guessed from, and on wide networks these
multipliers themselves, relative to the ellipsoid (`multipliers.balance`). None of them can make a bound wrong: the
recursion in float64 that ends every search computes ellipsoids, ranges and slopes anew, and proves that the multipliers
are feasible. Where it finds worse constants than float32 did, it is repeated with the multipliers that were the best so
far, and then the search itself is repeated in float64. An example whose recursion leaves the range of float32 is
searched in float64 from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lipbounds._form.lure import LureForm
from lipbounds._local import ellipsoids, multipliers
from lipbounds._local.ellipsoids import Passed, Range, Thin, Values
from lipbounds._local.stages import Stage
from lipbounds._text.progress import say

_PASSES = 4  # recursions on one ball for a wide network before the proof, each with better multipliers
# they end where the last one has lowered L^2 by a smaller share: before a proof, which is a step further, and else
_LAST, _GAIN = 0.3, 0.1
_NEAR = 0.4  # |log| of the ratio of two radii up to which multipliers of one ball are those to begin with in the other
_CLOSE = 2e-3  # a proof is repeated where its L^2 is above that of the search by a larger share
_LOST = 0.02  # and the search is repeated in float64 where it still is, by a larger one
_SURE = 0.98  # share of the largest constant at which a margin is positive, up to which nothing better is searched for
_DIRECTIONS = 12  # that D is chosen for

Start = np.ndarray | Thin


class Passes:
    """The recursions around N examples, and what each of them remembers for the next one.

    Args:
        view: the elementwise view; double, single: its stages and the first ellipsoid, in both precisions.
        values: of the examples; `slope` and `relative` are changed in place.
        z: (N, K) logits, approximate.
        first: (rows, eps) -> how far the first pre-activations can fall and rise, where better than the ellipsoid.
    """

    def __init__(
        self,
        view: LureForm,
        double: tuple[Sequence[Stage], Start],
        single: tuple[Sequence[Stage], Start],
        values: Values,
        z: np.ndarray,
        first: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray] | None],
    ) -> None:
        self.view, self.double, self.single = view, double, single
        self.values, self.z, self.first = values, z, first
        count = len(z)
        self.wide = bool(values.relative)  # multipliers are improved by their gradient
        self.refused = np.zeros(count, bool)  # examples that need float64
        self.eps, self.power = np.full(count, np.inf), np.full(count, multipliers.STEP)
        self.least = np.full(count, np.inf)  # the best score on the last ball
        # the multipliers that it had, and |h_i| / (r_i |q_i|) with them
        self.best = [(np.full_like(a, np.nan), np.full_like(a, np.nan)) for a in values.relative]

    def proved(
        self,
        rows: np.ndarray,
        eps: np.ndarray,
        labels: np.ndarray | None,
        ranges: list[Range] | None = None,
        *,
        search: bool = True,
        enough: bool = False,
    ) -> np.ndarray:
        """(N, K, K) with dz dz' <= eps^2 S in the balls around these rows, by a recursion in float64.

        Args:
            labels: (N,) classes whose margins matter, against the example; None for all outputs and pairs of points.
            ranges: a list that receives the ranges of the pre-activations.
            search: look for multipliers on this ball first; else those of the last one are taken.
            enough: nothing is improved where every margin is already positive by the estimates.
        """
        if not self.wide:
            return self._run(rows, eps, labels, True, ranges).s
        if search:
            self._improve(rows, eps, labels, _PASSES, _LAST, enough)
        wanted = self.least[rows] * np.maximum(eps / self.eps[rows], 1.0) ** 2  # a larger ball may have more
        say("ellipsoids: proof on a ball")
        passed = self._run(rows, eps, labels, True, ranges)
        self._learn(rows, passed)
        out, score = passed.s, passed.score
        for share in (_CLOSE, _LOST):
            worse = np.flatnonzero((wanted < np.inf) & ~(score <= wanted * (1 + share)))
            if not worse.size:
                break
            some, at, own = rows[worse], eps[worse], _some(labels, worse)
            if share == _LOST:
                self.refused[some], self.eps[some] = True, np.inf  # all anew
                self._improve(some, at, own, _PASSES, _LAST, enough)
            for known, (best, _) in zip(self.values.relative, self.best, strict=True):
                known[some] = best[some]
            passed = self._run(some, at, own, True)
            self._learn(some, passed)
            better = ~(score[worse] <= passed.score)
            out[worse[better]], score[worse[better]] = passed.s[better], passed.score[better]
        self.eps[rows] = eps
        return out

    def estimated(self, rows: np.ndarray, eps: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """(N, K, K) as `proved` would find, about, in float32: nothing is proved."""
        if not self.wide:
            return self._run(rows, eps, labels, False).s
        return self._improve(rows, eps, labels, np.where(self._far(rows, eps), _PASSES, 1), _GAIN, False)

    def _far(self, rows: np.ndarray, eps: np.ndarray) -> np.ndarray:
        return np.abs(np.log(eps / self.eps[rows])) > _NEAR

    def _improve(
        self,
        rows: np.ndarray,
        eps: np.ndarray,
        labels: np.ndarray | None,
        most: Any,
        gain: float,
        enough: bool,
    ) -> np.ndarray:
        """Blocks of the best of up to `most` passes in float32; `values.relative` is then a step further than it."""
        far, most = self._far(rows, eps), np.broadcast_to(most, len(rows))
        self.power[rows] = np.where(far, multipliers.STEP, self.power[rows])
        for known in self.values.relative:
            known[rows] = np.where(far[:, None], np.nan, known[rows])
        self.least[rows] = np.where(eps == self.eps[rows], self.least[rows], np.inf)  # of another ball
        self.eps[rows] = eps
        out = np.full((len(rows), self.z.shape[1], self.z.shape[1]), np.nan)
        live, number = np.arange(len(rows)), 0
        while live.size:
            some, number = rows[live], number + 1
            say(f"ellipsoids: recursion {number} on a ball, in float32")
            before = self.least[some]
            passed = self._run(some, eps[live], _some(labels, live), False)
            better = self._learn(some, passed)
            out[live[better]] = passed.s[better]
            least = self.least[some]
            sure = enough & (least * np.square(eps[live]) < _SURE)
            for known, (best, _) in zip(self.values.relative, self.best, strict=True):
                known[some[sure]] = best[some[sure]]
            on = (least < (1 - gain) * before) & ~sure & (number < most[live]) & np.isfinite(least)
            live = live[on]
        return out

    def _learn(self, rows: np.ndarray, passed: Passed) -> np.ndarray:
        """Which rows the recursion was better for than all before on this ball; their next multipliers."""
        better = passed.score < self.least[rows]
        self.least[rows[better]] = passed.score[better]
        power = np.where(better, np.minimum(2 * self.power[rows], multipliers.STEP), self.power[rows] / 3)
        self.power[rows] = power  # a step that was too far is repeated with a smaller one
        for known, best, found in zip(self.values.relative, self.best, passed.balance, strict=True):
            for a, b in zip(best, found, strict=True):
                a[rows[better]] = b[better]
            known[rows] = multipliers.stepped(best[0][rows], best[1][rows], power)
        return better

    def _run(
        self,
        rows: np.ndarray,
        eps: np.ndarray,
        labels: np.ndarray | None,
        proof: bool,
        ranges: list[Range] | None = None,
    ) -> Passed:
        """One recursion: in float64 for a proof, else in float32 around the examples that float32 is enough for."""
        if proof:
            return self._recursion(rows, eps, labels, self.double, ranges)
        parts: list[tuple[np.ndarray, Passed]] = []
        at = np.flatnonzero(~self.refused[rows])
        if at.size:
            passed = self._recursion(rows[at], eps[at], _some(labels, at), self.single)
            fine = np.isfinite(passed.s).all(axis=(1, 2)) & np.isfinite(passed.score) & _possible(passed.s)
            self.refused[rows[at[~fine]]] = True
            parts.append((at[fine], _rows(passed, fine)))
        at = np.flatnonzero(self.refused[rows])
        if at.size:
            parts.append((at, self._recursion(rows[at], eps[at], _some(labels, at), self.double)))
        order = np.argsort(np.concatenate([at for at, _ in parts]))
        return _rows(_joined([passed for _, passed in parts]), order)

    def _recursion(
        self,
        rows: np.ndarray,
        eps: np.ndarray,
        labels: np.ndarray | None,
        precision: tuple[Sequence[Stage], Start],
        ranges: list[Range] | None = None,
    ) -> Passed:
        directions, count = self._directions(labels, len(eps)), len(eps)
        passed = ellipsoids.ellipsoids(
            self.view,
            *precision,
            self.values.rows(rows),
            eps,
            anchored=labels is not None,
            directions=directions,
            gaps=None if labels is None else np.einsum("njk,nk->nj", directions, self.z[rows]),
            first=self.first(rows, eps),
            ranges=ranges,
        )
        for known, c in zip(self.values.slope, passed.middles, strict=True):
            known[rows] = c
        s = np.asarray(passed.s, np.float64)
        return passed._replace(s=np.repeat(s, count, axis=0) if len(s) < count else s)

    def _directions(self, labels: np.ndarray | None, count: int) -> np.ndarray:
        """(N, J, K): margins e_y - e_i, or all e_i; beyond a dozen, sums of them with random signs."""
        classes = self.view.num_outputs
        signs: np.ndarray = np.eye(classes)
        if classes > _DIRECTIONS:
            signs = np.random.default_rng(0).choice([-1.0, 1.0], (_DIRECTIONS, classes))
        if labels is None:
            return np.broadcast_to(signs, (count, *signs.shape))
        if classes == 1:
            return np.ones((count, 1, 1))
        own = np.zeros((count, 1, classes))
        own[np.arange(count), 0, labels] = 1.0
        return signs.sum(axis=1, keepdims=True) * own - signs


def _possible(s: np.ndarray) -> np.ndarray:
    """(N,) whether every output and every difference of two has a square of at least 0 (cancellation may take it)."""
    squares = np.einsum("nii->ni", s)
    differences = squares[:, :, None] + squares[:, None, :] - 2 * s
    return (squares >= 0).all(axis=1) & (differences >= 0).all(axis=(1, 2))


def _some(labels: np.ndarray | None, at: np.ndarray) -> np.ndarray | None:
    return None if labels is None else labels[at]


def _rows(passed: Passed, at: np.ndarray) -> Passed:
    balance = [(a[at], b[at]) for a, b in passed.balance]
    return Passed(passed.s[at], [c[at] for c in passed.middles], balance, passed.score[at])


def _joined(parts: list[Passed]) -> Passed:
    """The examples of all parts, behind each other."""
    if len(parts) == 1:
        return parts[0]
    s, score = (np.concatenate([getattr(p, name) for p in parts]) for name in ("s", "score"))
    middles = [np.concatenate(same) for same in zip(*(p.middles for p in parts), strict=True)]
    balance = [
        (np.concatenate([a for a, _ in same]), np.concatenate([b for _, b in same]))
        for same in zip(*(p.balance for p in parts), strict=True)
    ]
    return Passed(s, middles, balance, score)
