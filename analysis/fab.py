"""FAB: adversarial examples of small distance, by projections on the linearised decision boundary.

Croce, Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020, arXiv
1907.02044, in its version with targets (FAB-T), one start. At x_k the margin f = z_y - z_t is replaced by its
linearisation, whose zeros are a hyperplane. With d and d0 the shortest shifts in the norm that take x_k and x onto it
within the box (or as near as the box lets them), and a = min(||d|| / (||d|| + ||d0||), 0.1),

    x_{k+1} = clip((1 - a) (x_k + 1.05 d) + a (x + 1.05 d0)),

and where x_{k+1} is adversarial, it counts by its distance, and the search goes on from 0.9 x_{k+1} + 0.1 x. In the end
the segment from x to the nearest example found is bisected, so that its point lies at the boundary.

The shortest shift onto {v: <w, v> = b} in the box moves every coordinate against the sign of w_i by min(t s_i, room_i),
s_i = 1 in norm inf and |w_i| in norm 2: what that takes away from <w, v> - b is concave, increasing and piecewise
linear in t, and Newton's method from 0 solves for t in finitely many steps.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._text import reporting, usual_settings, whole
from lipbounds.analysis.apgd import ranked
from lipbounds.analysis.attack_network import Model, margin_of
from lipbounds.analysis.attack_search import (
    Attack,
    Find,
    Found,
    Problem,
    classes_on,
    l2_of,
    per_example,
)
from lipbounds.analysis.attack_sequence import nearest
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings

_MOST_OF_ORIGINAL, _BEYOND, _BACK = 0.1, 1.05, 0.9
_NEWTON, _HALVINGS = 40, 12
_AT_ONCE = 25


@usual_settings()
def fab(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any = math.inf,
    settings: AttackSettings = DEFAULT,
    *,
    steps: int = 100,
    targets: int = 9,
    target: Any = None,
    **changes: Any,
) -> Attack:
    """The nearest point to every x, in the box, that FAB-T finds not to be classified as labelled.

    Args:
        fn, x, y, settings, target, **changes: as those of `attacks.pgd`. With `target` only that class counts.
        eps: radius, or (N,) radii: only examples as near as this are a success; inf, the default, keeps every one.
        steps: per target.
        targets: so many of the largest other logits at x are the classes t, one after the other; at most one less than
            there are classes. All of them are tried, whatever was found before, and `steps` counts them all.

    `distance` is an upper bound of the distance to the decision boundary.

    Raises:
        TypeError: fn is not callable.
        ValueError: as `pgd`.
    """
    settings = AttackSettings.changed(settings, changes)
    finds = runs(fn, x, settings, steps, targets, target)
    with reporting(settings.progress):
        return nearest("FAB-T", finds, fn, x, y, eps, settings, "margin", target=target)


def runs(
    fn: Any, x: Any, settings: AttackSettings, steps: int, targets: int, target: Any = None
) -> list[Find]:
    """The runs of `fab`, one for each target."""
    whole("steps", steps), whole("targets", targets)
    classes = classes_on(fn, x, settings)

    def run(rank: int) -> Find:
        return lambda problem: _approach(problem, rank, steps)

    return [run(rank) for rank in range(1 if target is not None else min(targets, classes - 1))]


def _approach(problem: Problem, rank: int, steps: int) -> Found:
    """One run, towards the class of this rank at x, or to the problem's target from the largest other logit."""
    x = problem.where[0]
    rival = ranked(problem)[:, rank]
    state = x, (x, jnp.full(len(x), jnp.inf, jnp.float32)), jnp.zeros(len(x), jnp.int32)
    given = problem.model, problem.weights, problem.where, problem.labels, rival
    fixed = {"norm": problem.norm, "targeted": problem.targeted}
    now = min(problem.stride(steps), _AT_ONCE)
    for done in range(0, steps, now):
        clocks = np.arange(done, min(done + now, steps), dtype=np.int32)
        state = _advance(*given, state, clocks + 1, **fixed)
    _, best, count = state
    return Found(
        _bisected(problem.model, problem.weights, x, problem.labels, best, targeted=problem.targeted), count
    )


@functools.partial(jax.jit, static_argnames=("model", "norm", "targeted"))
def _advance(
    model: Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    rival: jax.Array,
    state: Any,
    clocks: Any,
    *,
    norm: float,
    targeted: bool,
) -> Any:
    """Steps of these numbers: (point, (nearest example, its distance), count until the first within eps)."""
    x, eps, low, high = where

    def logits(point: jax.Array) -> jax.Array:
        return model(weights, point).astype(jnp.float32)

    def gap(point: jax.Array) -> Any:
        z = logits(point)
        value = margin_of(z, labels, targeted)
        if not targeted:
            own, other = (jnp.take_along_axis(z, each[:, None], axis=1)[:, 0] for each in (labels, rival))
            value = own - other
        return value.sum(), value

    def step(state: Any, clock: jax.Array) -> Any:
        point, (example, distance), count = state
        normal, value = jax.grad(gap, has_aux=True)(point)
        normal = jnp.where(jnp.isfinite(normal), normal, 0.0)
        # <w, v> - b at v = point is the value, and at x what the linearisation says there
        there = value + (normal * (x - point)).reshape(len(x), -1).sum(axis=1)
        moves = [shift(v, normal, excess, (low, high), norm) for v, excess in ((point, value), (x, there))]
        sizes = [jnp.maximum(_size(move, norm), 1e-8) for move in moves]
        share = per_example(jnp.minimum(sizes[0] / (sizes[0] + sizes[1]), _MOST_OF_ORIGINAL), x)
        new = (1 - share) * (point + _BEYOND * moves[0]) + share * (x + _BEYOND * moves[1])
        new = jnp.clip(new, low, high)
        won = margin_of(logits(new), labels, targeted) <= 0
        far = _size(new - x, norm)
        nearer = won & (far < distance)
        example = jnp.where(per_example(nearer, x), new, example)
        count = jnp.where(distance <= eps, count, clock)
        distance = jnp.where(nearer, far, distance)
        return (jnp.where(per_example(won, x), x + _BACK * (new - x), new), (example, distance), count), None

    return jax.lax.scan(step, state, clocks)[0]


def shift(point: jax.Array, normal: jax.Array, excess: jax.Array, box: Any, norm: float) -> jax.Array:
    """(B, *shape) the shortest d in the norm with <normal, d> = -excess and point + d in the box.

    Where the box does not let <normal, d> go so far, the corner where it is closest.
    """
    low, high = box
    flat = normal.reshape(len(normal), -1) * jnp.where(excess < 0, -1, 1).astype(jnp.float32)[:, None]
    v = point.reshape(flat.shape)
    room = jnp.where(flat > 0, v - low, high - v)
    size, goal = jnp.abs(flat), jnp.abs(excess)
    pace = jnp.where(size > 0, 1.0, 0.0) if norm == math.inf else size
    rate = size * pace
    # entries so large that all coordinates reach the box, and 0 where nothing moves
    last = jnp.where(pace > 0, room / jnp.maximum(pace, 1e-30), 0.0).max(axis=1)

    def behind(state: Any) -> jax.Array:
        _, open_, number = state
        return open_.any() & (number < _NEWTON)

    def newton(state: Any) -> Any:
        t, open_, number = state
        free = pace * t[:, None] < room
        done = jnp.where(free, rate * t[:, None], size * room).sum(axis=1)
        slope = jnp.where(free, rate, 0.0).sum(axis=1)
        new = jnp.where(slope > 0, t + (goal - done) / jnp.maximum(slope, 1e-37), last)
        new = jnp.clip(new, t, last)
        return jnp.where(open_, new, t), open_ & (new > t * (1 + 1e-6)), number + 1

    start = jnp.zeros_like(goal), goal > 0, 0
    t = jax.lax.while_loop(behind, newton, start)[0]
    moved = jnp.minimum(pace * t[:, None], room)
    return (-jnp.sign(flat) * moved).reshape(point.shape)


def _size(move: jax.Array, norm: float) -> jax.Array:
    if norm == math.inf:
        return jnp.abs(move).reshape(len(move), -1).max(axis=1)
    return l2_of(move)


@functools.partial(jax.jit, static_argnames=("model", "targeted"))
def _bisected(
    model: Model, weights: Any, x: jax.Array, labels: jax.Array, best: Any, *, targeted: bool
) -> jax.Array:
    """(B, *shape) the nearest point on the segment from x to each example that bisection finds adversarial, else x."""
    example, distance = best
    low, high = jnp.zeros(len(x), jnp.float32), jnp.ones(len(x), jnp.float32)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        point = x + per_example(middle, x) * (example - x)
        won = margin_of(model(weights, point).astype(jnp.float32), labels, targeted) <= 0
        low, high = jnp.where(won, low, middle), jnp.where(won, middle, high)
    found = jnp.where(per_example(high < 1, x), x + per_example(high, x) * (example - x), example)
    return jnp.where(per_example(jnp.isfinite(distance), x), found, x)
