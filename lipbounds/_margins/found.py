"""Searches and proofs of the margins of a problem together: what is found is kept where it is proved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from lipbounds._margins import proof, search
from lipbounds._margins.problem import Problem
from lipbounds._text.progress import say

_SMALL = 64  # neurons of a layer up to which the search is in float64, else in float32
_KEPT = 16  # images whose gain is kept
_TOLERANCE = 1e-3  # a search ends where a round gains less, relative to the bound by ellipsoids


class Found:
    """Margins of a problem, raised by proofs of what the search finds: value (N, K) is changed in place."""

    def __init__(self, problem: Problem, value: np.ndarray, count: int) -> None:
        self.problem, self.value, self.count, self.done = problem, value, count, 0
        self.failed = np.zeros(len(value), bool)
        self.gains: dict[int, tuple[proof.Gain, proof.Facts]] = {}
        self.kept: dict[tuple[int, int], tuple[search.Job, search.Result]] = {}

    def jobs(self, pairs: list[tuple[int, int]], goal: float, rounds: int) -> Iterator[search.Job]:
        for row, other in pairs:
            made = self.problem.item(row, other)
            if made is not None:
                above = goal - float(self.problem.balls.gaps[row, other])
                yield search.Job((row, other), *made, above, rounds)

    def run(self, pairs: list[tuple[int, int]], goal: float, rounds: int) -> None:
        """Search these margins and prove what is found."""
        self.searched(self.jobs(pairs, goal, rounds), self._prove)

    def searched(self, jobs: Iterable[search.Job], done: Callable[[search.Job, search.Result], None]) -> None:
        """`search.run` in the precision and with the threads that suit the network."""
        small = max((k.at.size for k in self.problem.kinks), default=0) <= _SMALL
        # BLAS threads that wait for busy cores cost more than they give: its matrices are small
        with jax.enable_x64(small), threadpool_limits(1, "blas"):
            width = self.problem.together
            search.run(self.problem.net, jobs, done, width=width, tolerance=_TOLERANCE, wanted=self.wanted)

    def best(self, row: int) -> float:
        """The least margin of a row that its searches found, in float arithmetic."""
        kept = [self.problem.balls.gaps[key] + r.least for key, (_, r) in self.kept.items() if key[0] == row]
        return float(min(kept, default=-np.inf))

    def wanted(self, key: tuple[int, int]) -> bool:
        return not self.failed[key[0]]

    def _prove(self, job: search.Job, result: search.Result) -> None:
        self._keep(job, result)
        self.done += 1
        say(f"margins: {self.done} of {self.count}")

    def _keep(self, job: search.Job, result: search.Result) -> None:
        row, other = job.key
        if job.goal < np.inf:
            self.kept[row, other] = job, result
        if job.goal < np.inf and not result.least > job.goal:
            self.failed[row] = True
            return
        low = self.proved(row, other, result.multipliers)
        total = np.nextafter(self.problem.balls.gaps[row, other] + low, -np.inf)
        self.value[row, other] = max(self.value[row, other], total)
        self.failed[row] |= job.goal < np.inf and not total > 0

    def proved(self, row: int, other: int, m: search.Multipliers, item: search.Item | None = None) -> float:
        """A lower bound of the change of a margin on the ball, or on the branch of it that `item` stands for."""
        if row not in self.gains:
            if len(self.gains) >= _KEPT:
                self.gains.pop(next(iter(self.gains)))
            gain = self.problem.gain(row)
            self.gains[row] = gain, self.problem.facts(row, gain)
        gain, facts = self.gains[row]
        if item is not None:
            facts = branch_facts(gain, facts, item)
        return proof.prove(gain, facts, self.problem.aim(row, other), self.problem.weights(gain, m))


def branch_facts(gain: proof.Gain, facts: proof.Facts, item: search.Item) -> proof.Facts:
    """The facts with top or bottom 0 where they are in the item: there w or r is 0."""
    top, bottom = (
        np.concatenate(
            [getattr(n, name)[at] for n, at in zip(item.taps, gain.at, strict=True)] or [np.zeros(0)]
        )
        for name in ("top", "bottom")
    )
    return replace(
        facts, top=np.where(top > 0, facts.top, 0.0), bottom=np.where(bottom > 0, facts.bottom, 0.0)
    )
