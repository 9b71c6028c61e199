"""Golub-Kahan from several random starts at once, step by step: bounds that are refined where it matters."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lipbounds._norms.lanczos import ALLOWANCE, Run, overlap
from lipbounds._norms.rounding import up

STARTS = 4
CHECKED = 8  # steps after which `SharedStarts` note their bounds
"""Starts that share a failure probability p: each may fail with p^(1/4), so it needs less than half of the steps."""


class Starts:
    """Bounds of ||A||_2 from independent starts, the largest of which fails with probability at most `failure`.

    The inequality, the probability and the rounding are those of `lanczos.golub_kahan`: a bound from a start whose
    component along the top singular vector is at least delta holds after every number of steps, and all starts miss
    delta with probability at most p^m where each does with p = failure^(1/m). `matvec` and `rmatvec` take columns, one
    per start, so that a product with all of them costs little more than one. Only right vectors are kept, so n should
    be the smaller side, unless the matrix is so close to one of low rank that the left ones are needed.
    """

    def __init__(
        self,
        matvec: Callable[[np.ndarray], np.ndarray],
        rmatvec: Callable[[np.ndarray], np.ndarray],
        n: int,
        *,
        seed: int,
        failure: float,
        rounding: float,
        max_steps: int,
        noise: float = 2.0**-50,
    ) -> None:
        self.matvec, self.rmatvec, self.rounding = matvec, rmatvec, rounding
        self.delta = overlap(failure ** (1.0 / STARTS), n)
        self.n, self.seed, self.noise, self.most = n, seed, noise, min(max_steps, n)
        self.runs: list[Run] = []
        self.lower, self.upper, self.steps = 0.0, math.inf, 0
        self.ended = self.both = False

    @property
    def nbytes(self) -> int:
        """Of the vectors that are kept."""
        return sum(basis.nbytes for run in self.runs for basis in (run.right, run.left))

    def release(self) -> None:
        """Drop the vectors; `advance` does the same steps again."""
        self.runs = []

    def _begin(self) -> None:
        vectors = np.random.default_rng(self.seed).standard_normal((STARTS, self.n))
        self.runs = [Run(self.matvec, self.rmatvec, v, self.noise, self.most, self.both) for v in vectors]

    def advance(self, steps: int) -> None:
        """Do up to so many more steps, and renew `lower` and `upper`.

        Products with few columns gain little from more threads of BLAS: searches may run side by side, one thread each.
        """
        if steps <= 0 or self.ended:
            return
        before = self.steps, self.both
        try:
            if not self.runs:
                self._begin()
                steps, self.steps = steps + self.steps, 0
            self._step(steps)
            if self.ended and not self.both and not self._bound() < math.inf:
                self.both, steps, self.steps = True, self.steps, 0
                self._begin()
                self._step(steps)
            found = self._bound()
        except BaseException:  # half a step must not be continued
            self.release()
            (self.steps, self.both), self.ended = before, False
            raise
        self.lower = max(run.lower * (1.0 - ALLOWANCE) * run.unit for run in self.runs)
        if found < self.upper:
            self.upper = min(self.upper, up(up(found * (1.0 + ALLOWANCE))))

    def _bound(self) -> float:
        return max(run.bound(self.delta, self.rounding) for run in self.runs)

    def _step(self, steps: int) -> None:
        for _ in range(steps):
            going = [run for run in self.runs if not run.ended]
            if not going:
                break
            self.steps += 1
            images = _finite(self.matvec(np.stack([run.v for run in going]).T))
            going = [run for run, image in zip(going, images.T, strict=True) if run.forward(image)]
            if going:
                images = _finite(self.rmatvec(np.stack([run.u for run in going]).T))
                for run, image in zip(going, images.T, strict=True):
                    run.backward(image)
        self.ended = all(run.ended for run in self.runs)


class Known(NamedTuple):
    """Bounds after a number of steps, and whether there are no more."""

    steps: int = 0
    lower: float = 0.0
    upper: float = math.inf
    ended: bool = False

    @property
    def excess(self) -> float:
        """Upper over lower bound, minus 1."""
        return self.upper / self.lower - 1.0 if self.lower > 0.0 else math.inf if self.upper else 0.0


class SharedStarts:
    """Starts for several calls, in any threads: what is known at a place does not depend on who asked, or when."""

    def __init__(self, starts: Starts) -> None:
        self._starts, self._lock, self._known = starts, threading.Lock(), [Known()]

    def at(self, place: int) -> Known:
        """What is known after `CHECKED` steps `place` times, or at the end."""
        with self._lock:
            while place >= len(self._known) and not self._known[-1].ended:
                starts, upper = self._starts, 0.0
                try:
                    starts.advance(CHECKED)
                except ValueError:  # products that are not finite
                    starts.ended, upper = True, math.inf
                self._known.append(Known(starts.steps, starts.lower, max(upper, starts.upper), starts.ended))
            return self._known[min(place, len(self._known) - 1)]

    @property
    def nbytes(self) -> int:
        """Of the vectors that are kept."""
        return self._starts.nbytes

    def release(self) -> None:
        """Drop the vectors; steps beyond what is known do all of them again."""
        with self._lock:
            self._starts.release()


def _finite(images: np.ndarray) -> np.ndarray:
    if not np.all(np.isfinite(images)):
        raise ValueError("a product has NaN or infinite entries")
    return images
