"""Branching on the signs of neurons: a margin that the dual leaves open is proved on both halves of the ball.

A branch says of some neurons that they are on (r = 0: bottom is 0) or off (v = 0: top is 0). On either half the
constraints are stronger, so the bound is at least that of the whole; the margin is positive if it is on every leaf. The
branch with the least bound is split first, at the neuron with the largest M |v r| at the minimiser, several at a time.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lipbounds._margins import forms, search
from lipbounds._margins.found import Found
from lipbounds._text.device import Shared, on_each
from lipbounds._text.progress import alive, clock, remaining, say

_AT_ONCE = 4  # branches that are split together
_ROUNDS = 4  # of the search for a branch
_AGE = 4  # rounds by which the barrier of a branch is ahead
_FIRM = 1.0  # least root of the multiplier of r^2 (or v^2) of the neuron that a branch fixes


class Branch(NamedTuple):
    """A part of the ball: its item, parameters and scores."""

    item: search.Item
    x: search.Multipliers
    scores: tuple[Any, ...]


def certify_each(found: Found, rows: Sequence[int], rounds: int, seconds: float, verdict: np.ndarray) -> None:
    """`certify` of these rows into `verdict` (N,), for so many seconds each; every device takes one after the other."""
    waiting, began = Shared(enumerate(rows)), clock()

    def work() -> None:
        for place, row in waiting:
            alive()
            say(f"branching: {place} of {len(rows)} examples{remaining(began, place, len(rows))}")
            verdict[row] = certify(found, row, rounds, time.monotonic() + seconds)

    with found.threads():
        on_each(work)


def certify(found: Found, row: int, rounds: int, deadline: float) -> str:
    """Whether all margins of an image are proved positive, by branching until `deadline` (`time.monotonic`).

    "branching" if they are, else "out of time", or "not proved" where no branch can be split further.
    """
    found.failed[row] = False
    order = np.argsort(found.value[row]).tolist()
    for other in [k for k in order if found.value[row, k] <= 0]:
        if not _margin(found, row, other, rounds, deadline):
            return "out of time" if time.monotonic() >= deadline else "not proved"
    return "branching"


def _margin(found: Found, row: int, other: int, rounds: int, deadline: float) -> bool:
    """Whether the margin of one class is proved positive on the whole ball."""
    gap = float(found.problem.balls.gaps[row, other])
    alone = row if found.problem.apart(row) else None
    heap: list[tuple[float, int, Branch]] = []
    number, open_ = itertools.count(), 1  # branches whose search has not ended

    def done(job: search.Job, result: search.Result) -> None:
        nonlocal open_
        open_ -= 1
        if result.least > job.goal:
            low = found.proved(row, other, result.multipliers, job.item)
            if np.nextafter(gap + low, -np.inf) > 0:
                return
        scores = tuple(s * _whole(n) for s, n in zip(result.scores, job.item.taps, strict=True))
        least = result.least if np.isfinite(result.least) else -np.inf
        x = result.x if np.isfinite(result.least) else job.x
        heapq.heappush(heap, (least, next(number), Branch(job.item, x, scores)))

    if (row, other) in found.kept:
        done(*found.kept[row, other])
    else:
        made = found.problem.item(row, other)
        if made is None:
            return False
        found.searched([search.Job((row, other), *made, -gap, rounds)], done, 1, alone)
    while heap and time.monotonic() < deadline:
        jobs = []
        for _ in range(min(_AT_ONCE, len(heap))):
            branch = heapq.heappop(heap)[2]
            halves = _halves(branch)
            if not halves:
                return False  # no neuron is left, or the search has failed
            jobs += [search.Job((row, other), item, x, -gap, _ROUNDS, _AGE) for item, x in halves]
        open_ += len(jobs)
        found.searched(jobs, done, len(jobs), alone)
    return not heap and not open_


def _halves(branch: Branch) -> list[tuple[search.Item, search.Multipliers]]:
    """The branch with its worst neuron on, and off; empty where no neuron has a score."""
    best = [float(np.nan_to_num(s).max(initial=0.0)) for s in branch.scores]
    if not best or not max(best) > 0:
        return []
    k = int(np.argmax(best))
    i = int(np.argmax(np.nan_to_num(branch.scores[k])))
    halves = []
    for off in (False, True):
        item, x = branch.item, branch.x
        n, own = item.taps[k], np.array(branch.x.taps[k])
        cut = np.array(n.forms)
        top, bottom = (
            end[i : i + 1] * kept for end, kept in zip(forms.ends(cut), (not off, off), strict=True)
        )
        cut[..., i : i + 1] = forms.padded(forms.of_relu(top, bottom), len(cut))
        fixed = 1 if off else 2
        own[fixed, i] = max(abs(own[fixed, i]), _FIRM)
        own[3, i] = own[3, i] ** 2  # nu itself from here on
        taps = (*item.taps[:k], n._replace(forms=cut), *item.taps[k + 1 :])
        halves.append((item._replace(taps=taps), x._replace(taps=(*x.taps[:k], own, *x.taps[k + 1 :]))))
    return halves


def _whole(n: search.Neurons) -> np.ndarray:
    """(n,) which neurons no branch has fixed yet."""
    top, bottom = forms.ends(n.forms)
    return np.asarray(top * bottom > 0)
