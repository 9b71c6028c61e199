"""Searches and proofs of the margins of a problem together: what is found is kept where it is proved."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._margins import forms, merged, proof, search
from lipbounds._margins.problem import Problem
from lipbounds._text.device import Shared, on_each, sharing
from lipbounds._text.progress import alive, say, show_seconds
from lipbounds._text.threads import one_blas_thread

_LARGE = 1e10  # operations of an evaluation above which proofs take all BLAS threads
_CALL = 2e10  # operations of one call on a device, which cannot be interrupted
_PATIENCE = 5.0  # seconds before the time left is estimated
_SMALL = 64  # neurons of a layer up to which the search is in float64, else in float32
_AGAIN, _AGED = 4, 8  # rounds in float64 of a search whose proof has failed, and the age of its barrier
_KEPT = 16  # images whose gain is kept
_TOLERANCE = 1e-3  # a search ends where a round gains less, relative to the bound by ellipsoids


class Found:
    """Margins of a problem, raised by proofs of what the search finds: value (N, K) is changed in place."""

    def __init__(self, problem: Problem, value: np.ndarray, count: int) -> None:
        self.problem, self.value, self.count, self.done = problem, value, count, 0
        self.failed = np.zeros(len(value), bool)
        self.gains: dict[int, tuple[proof.Gain, proof.Facts]] = {}
        self.kept: dict[tuple[int, int], tuple[search.Job, search.Result]] = {}
        self.again: list[search.Job] = []  # to be searched in float64, as the proof has failed
        self.lock = threading.Lock()  # of the gains
        self.began: float | None = None  # when the first call on a device had ended, which compiles
        self.evaluated, self.left = 0, 0

    def jobs(self, pairs: list[tuple[int, int]], goal: float, rounds: int) -> Iterator[search.Job]:
        for row, other in pairs:
            made = self.problem.item(row, other)
            if made is not None:
                above = goal - float(self.problem.balls.gaps[row, other])
                yield search.Job((row, other), *made, above, rounds)

    def run(self, pairs: list[tuple[int, int]], goal: float, rounds: int) -> None:
        """Search these margins and prove what is found; examples whose open neurons are searched alone come last."""
        self.began, self.evaluated = None, 0
        self.left = len(pairs) * rounds * search.ROUND  # evaluations at most
        examples = list(dict.fromkeys(row for row, _ in pairs))
        with self.threads():
            for place, row in enumerate(examples):
                alive()
                say(f"ranges: {place} of {len(examples)} examples")
                self.problem.narrow(row)
            alone = {row for row in examples if self.problem.apart(row)}
            common = [pair for pair in pairs if pair[0] not in alone]
            self.searched(self.jobs(common, goal, rounds), self._prove, len(common))
            rows = Shared(alone)

            def work() -> None:
                for row in rows:
                    own = [pair for pair in pairs if pair[0] == row]
                    self.searched(self.jobs(own, goal, rounds), self._prove, len(own), row)

            if alone:
                on_each(work)
            again, self.again = self.again, []
            for job in again:  # few
                single = job.key[0] if job.key[0] in alone else None
                self.searched([job], self._prove, 1, single, double=True)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """One BLAS thread for small networks: those that wait for busy cores cost more than they give."""
        with one_blas_thread(self.problem.layered[1] <= _LARGE):
            yield

    def searched(
        self,
        jobs: Iterable[search.Job],
        done: Callable[[search.Job, search.Result], None],
        count: int,
        row: int | None = None,
        *,
        double: bool = False,
    ) -> None:
        """`search.run`, in float32 where that is faster; all devices take from the `count` jobs.

        row: of the example that all jobs are of, where its open neurons are searched alone. double: in float64.
        """
        if not count:
            return
        waiting, ending, devices = Shared(jobs), threading.Lock(), len(sharing())
        problem, each = self.problem, self.problem.work(row) * self.problem.together(row)

        def ended(job: search.Job, result: search.Result) -> None:
            with ending:
                done(job, result)

        def work() -> None:
            net = problem.net if row is None else merged.network(self.gain(row)[0], dtype)
            net = jax.tree.map(jnp.asarray, net)  # once, not for every call
            search.run(
                net,
                waiting,
                ended,
                width=problem.together(row),
                filled=-(-count // devices),
                stride=next((n for n in (search.ROUND, 5) if n * each < _CALL), 1),
                tolerance=_TOLERANCE,
                wanted=self.wanted,
                after=self._after,
            )

        double = double or (row is None and self.in_double)
        dtype = np.float64 if double else np.float32
        with jax.enable_x64(double):
            on_each(work)

    @property
    def in_double(self) -> bool:
        """Whether the first search is in float64: of small networks on a CPU, which is no slower there."""
        widest = max((tap.size_in for tap in self.problem.view.taps), default=0)
        return widest <= _SMALL and sharing()[0].platform == "cpu"

    def _after(self, evaluations: int) -> None:
        """Say how long the rest takes at most, at the rate so far."""
        self.left -= evaluations
        if self.began is None:
            self.began = time.monotonic()
            return
        self.evaluated += evaluations
        spent = time.monotonic() - self.began
        left = spent * self.left / self.evaluated
        if spent > _PATIENCE and left > _PATIENCE:
            say(f"margins: {self.done} of {self.count}, at most about {show_seconds(left)} left")

    def best(self, row: int) -> float:
        """The least margin of a row that its searches found, in float arithmetic."""
        kept = [self.problem.balls.gaps[key] + r.least for key, (_, r) in self.kept.items() if key[0] == row]
        return float(min(kept, default=-np.inf))

    def wanted(self, key: tuple[int, int]) -> bool:
        return not self.failed[key[0]]

    def _prove(self, job: search.Job, result: search.Result) -> None:
        """Keep what is proved; a float32 search whose multipliers prove less than it found goes on in float64."""
        row, other = job.key
        certifies = job.goal < np.inf
        if certifies:
            self.kept[row, other] = job, result
        if certifies and not result.least > job.goal:
            self.failed[row] = True
        else:
            low = self.proved(row, other, result.multipliers)
            total = np.nextafter(self.problem.balls.gaps[row, other] + low, -np.inf)
            self.value[row, other] = max(self.value[row, other], total)
            if not (total > 0 if certifies else low > -np.inf):
                single = np.asarray(result.x.ball).dtype == np.float32
                if single and np.isfinite(result.least):
                    x = jax.tree.map(lambda a: np.asarray(a, np.float64), result.x)
                    self.again.append(job._replace(x=x, rounds=_AGAIN, age=_AGED))
                    return
                self.failed[row] |= certifies
        self.done += 1
        say(f"margins: {self.done} of {self.count}")

    def proved(self, row: int, other: int, m: search.Multipliers, item: search.Item | None = None) -> float:
        """A lower bound of the change of a margin on the ball, or on the branch of it that `item` stands for."""
        gain, facts = self.gain(row)
        if item is not None:
            facts = self.branch_facts(row, gain, facts, item)
        return proof.prove(gain, facts, self.problem.aim(row, other), self.problem.weights(row, gain, m))

    def gain(self, row: int) -> tuple[proof.Gain, proof.Facts]:
        """The linear map of a row and what is proved of it, kept for the next of its margins."""
        with self.lock:
            if row not in self.gains:
                if len(self.gains) >= _KEPT:
                    self.gains.pop(next(iter(self.gains)))
                gain = self.problem.gain(row)
                self.gains[row] = gain, self.problem.facts(row, gain)
            return self.gains[row]

    def branch_facts(self, row: int, gain: proof.Gain, facts: proof.Facts, item: search.Item) -> proof.Facts:
        """The facts with those of a branch where top or bottom is 0 in the item: there v or r is 0."""
        own = self.problem.chosen(row, gain, [n.forms for n in item.taps])
        top, bottom = forms.ends(own)
        cut = np.flatnonzero((top == 0) | (bottom == 0))
        first, second = forms.ends(facts.forms[..., cut])
        changed, free = facts.forms.copy(), facts.free.copy()
        one = forms.of_relu(np.where(top[cut] > 0, first, 0.0), np.where(bottom[cut] > 0, second, 0.0))
        changed[..., cut] = forms.padded(one, len(changed))
        free[3, cut] = True
        return replace(facts, forms=changed, free=free)
