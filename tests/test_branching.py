"""Branching on the signs of neurons: it certifies more than the dual, and never a ball that an attack has lost."""

import time

import numpy as np
import pytest
from balls import in_ball, mlp, values
from test_margins import attained, certified, ended, gaps, one_problem

import lipbounds as lb
from lipbounds._local.forward import logits
from lipbounds._margins import branching, search
from lipbounds._margins.forms import ends
from lipbounds._margins.found import Found


def attack_radii(form, x, y, low=0.05, high=0.6):
    """(N,) about the least eps at which `attained` finds a margin <= 0 (or `high`)."""
    low, high = np.full(len(x), low), np.full(len(x), high)
    for _ in range(6):
        middle = (low + high) / 2
        lost = np.array(
            [
                attained(form, x[i : i + 1], y[i : i + 1], e, 2, steps=25, count=8).min() <= 0
                for i, e in enumerate(middle)
            ]
        )
        low, high = np.where(lost, low, middle), np.where(lost, middle, high)
    return high


@pytest.mark.slow  # its budgets are seconds
def test_branching_certifies_more_and_never_an_attacked_ball():
    form = mlp((6, 12, 10, 3), seed=3)
    x = np.random.default_rng(2).random((6, 6))
    y = values(form, x).argmax(axis=1)
    radii = attack_radii(form, x, y)
    lost = np.array(
        [attained(form, x[i : i + 1], y[i : i + 1], e, 2).min() <= 0 for i, e in enumerate(radii)]
    )
    assert lost.sum() >= 3
    assert not certified(form, x, y, radii, seconds_per_image=0.7)[lost].any()
    share = []
    for seconds in (0.0, 2.0):
        share.append(certified(form, x[lost], y[lost], 0.93 * radii[lost], seconds_per_image=seconds))
    assert (share[1] >= share[0]).all() and share[1].sum() > share[0].sum()
    i = np.flatnonzero(lost)[np.flatnonzero(share[1] & ~share[0])[:1]]
    for seconds in (0.0, 4.0):
        near = lb.Local(seconds_per_image=seconds)
        eps = float(0.93 * radii[i][0])
        assert (lb.certified_radius(form, x[i], y[i], eps=eps, local=near).radius[0] >= eps) == (seconds > 0)
    with pytest.raises(ValueError, match="seconds_per_image must be a number >= 0"):
        lb.Local(seconds_per_image=-1.0)


def test_a_branch_is_below_the_margins_of_its_part_of_the_ball():
    form, x, y, problem, *_ = one_problem(0)
    other = int((y[0] + 1) % 3)
    found = Found(problem, problem.balls.local.copy(), 1)
    item, start = problem.item(0, other)
    ((_, first),) = ended(problem, [search.Job((0, other), item, start, np.inf, 4)])
    root = branching.Branch(item, first.x, first.scores)
    halves = branching._halves(root)
    (on, _), (off, _) = halves
    split = [ends(a.forms)[1] != ends(b.forms)[1] for a, b in zip(on.taps, item.taps, strict=True)]
    (k,) = [k for k, changed in enumerate(split) if changed.any()]
    (i,) = np.flatnonzero(split[k])
    assert ends(off.taps[k].forms)[0][i] == 0 and ends(on.taps[k].forms)[1][i] == 0
    rng = np.random.default_rng(0)
    points = np.clip(in_ball(x, 0.3, 2, 4000, rng)[:, 0], 0.0, 1.0)
    points = points[np.linalg.norm(points - x, axis=1) <= 0.3]
    seen = []
    logits(form, points, seen)
    margin = gaps(values(form, points), np.full(len(points), y[0]))[:, other]
    both = ended(problem, [search.Job((0, other), *half, np.inf, 6, 4) for half in halves])
    whole = found.proved(0, other, both[0][1].multipliers)
    least = {}
    for job, result in both:
        is_on = bool(ends(job.item.taps[k].forms)[1][i] == 0)
        part = seen[k][0][:, i] >= 0 if is_on else seen[k][0][:, i] <= 0
        low = problem.balls.gaps[0, other] + found.proved(0, other, result.multipliers, job.item)
        assert part.any() and low <= margin[part].min()
        least[is_on] = low
    # nu of either sign proves nothing of the whole
    assert max(least.values()) > whole + problem.balls.gaps[0, other]


def test_a_search_that_never_ends_is_no_proof(monkeypatch):
    """Searches of rows that have failed are dropped; a margin whose branch was dropped is not proved."""
    problem = one_problem(0)[3]
    other = int((problem.labels[0] + 1) % 3)
    found = Found(problem, problem.balls.local.copy(), 1)
    monkeypatch.setattr(Found, "wanted", lambda self, key: False)
    assert not branching._margin(found, 0, other, 2, time.monotonic() + 5.0)
