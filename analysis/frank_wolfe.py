"""The Frank-Wolfe attack: steps towards the point of the ball and the box that a linear model of the loss likes best.

Chen, Zhou, Yi, Gu, "A Frank-Wolfe framework for efficient and effective adversarial attacks", AAAI 2020, arXiv
1811.10828. Of f, the loss to be decreased, and X the intersection of ball and box,

    m = beta m + (1 - beta) grad f(x),    v = argmin over X of <v, m>,    x = x + gamma (v - x),

from the example itself, with m = grad f there. In the paper X is the ball, and every step is clipped to the box, which
is a projection; here v lies in the box already, so that every iterate is a convex combination of points of X and none
is projected. One step with gamma = 1 is the fast gradient sign method in l-inf.

The gap max over X of <grad f(x), x - v> is 0 exactly where x is stationary. For f with an L-Lipschitz gradient, D the
diameter of X, Delta = f(x_0) - min f and gamma = sqrt(2 Delta / (C L D^2 T)) <= 1, the smallest of the gaps at the
first T iterates is at most sqrt(2 C L D^2 Delta / T) with C = (1 + beta) / (1 - beta): Theorem 2.4.4 of J. Chen's
thesis, which prints the minimum over 1..T instead.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._text import reporting, usual_settings, whole
from lipbounds.analysis.attack_network import Model, margin_of
from lipbounds.analysis.attack_search import (
    Attack,
    Found,
    Problem,
    keep,
    search,
    stride,
    unbroken,
)
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings

LOSSES = ("ce", "margin")


@usual_settings()
def frank_wolfe(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    steps: int = 20,
    gamma: float = 0.5,
    momentum: float = 0.0,
    loss: str = "margin",
    target: Any = None,
    **changes: Any,
) -> Attack:
    """Search every ball ||x' - x|| <= eps by Frank-Wolfe steps for an x' in the box that is not classified as labelled.

    Args:
        fn, x, y, eps, settings, target, **changes: as those of `attacks.pgd`; the norm is any from 1 to inf.
        steps: gradient steps at most; the search for an example ends with its first success.
        gamma: length of a step, in (0, 1], as a share of the way to the extreme point v.
        momentum: beta in [0, 1).
        loss: f is the margin z_y - max over i != y of z_i ("margin"), or the log-probability of the label ("ce"); with
            a target their counterparts.

    The first success is returned, so distances tend to be smaller than those of `pgd`, whose steps end at the sphere.

    Raises:
        TypeError: fn is not callable.
        ValueError: as `pgd`; gamma or momentum out of range.
    """
    settings = AttackSettings.changed(settings, changes)
    check_steps(steps, gamma, momentum, loss)

    def find(problem: Problem) -> Found:
        x = problem.where[0]
        state, done = (x, jnp.zeros_like(x), unbroken(x)), 0
        while done < steps and bool((state[2][1] > 0).any()):
            now = min(stride(steps), steps - done)
            state, _ = descend(
                problem.model,
                problem.weights,
                problem.where,
                problem.labels,
                state,
                np.int32(done),
                (np.float32(gamma), np.float32(momentum)),
                norm=problem.norm,
                loss=loss,
                steps=now,
                targeted=problem.targeted,
            )
            done += now
        point, _, best = state
        best = first(point, problem.margins(point), best, np.int32(done))
        return Found(best[0], steps=best[2])

    with reporting(settings.progress):
        return search("Frank-Wolfe", find, fn, x, y, eps, settings, loss, target=target, every_norm=True)


def check_steps(steps: int, gamma: float, momentum: float, loss: str = "margin") -> None:
    """ValueError unless these are settings of a Frank-Wolfe attack."""
    whole("steps", steps)
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")


def score(z: jax.Array, labels: jax.Array, targeted: bool, loss: str) -> tuple[jax.Array, jax.Array]:
    """(f, margin), (B,) each, from logits (B, K)."""
    margin = margin_of(z, labels, targeted)
    if loss == "margin":
        return margin, margin
    own = jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1)[:, 0]
    return (-own if targeted else own), margin


@jax.jit
def first(point: jax.Array, margin: jax.Array, best: Any, clock: Any) -> Any:
    """`keep`, but nothing changes after the first margin <= 0."""
    return keep(point, jnp.where(best[1] > 0, margin, jnp.inf), best, clock)


@functools.partial(jax.jit, static_argnames=("model", "norm", "loss", "steps", "targeted", "gaps"))
def descend(
    model: Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    state: Any,
    done: Any,
    how: Any,
    *,
    norm: float,
    loss: str,
    steps: int,
    targeted: bool,
    gaps: bool = False,
) -> Any:
    """`steps` steps from `state` = (point, m, best), after `done` of them; and the gaps (steps, B) if asked for."""
    gamma, beta = how

    def objective(point: jax.Array) -> Any:
        value, margin = score(model(weights, point).astype(jnp.float32), labels, targeted, loss)
        return value.sum(), margin

    def step(state: Any, clock: jax.Array) -> Any:
        point, velocity, best = state
        gradient, margin = jax.grad(objective, has_aux=True)(point)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        best = first(point, margin, best, clock)
        velocity = jnp.where(clock == 0, gradient, beta * velocity + (1 - beta) * gradient)
        extreme = minimiser(velocity, where, norm)
        moved = point + gamma * (extreme - point)
        gap = None
        if gaps:
            best_by_model = minimiser(gradient, where, norm)
            gap = (gradient * (point - best_by_model)).sum(axis=tuple(range(1, point.ndim)))
        return (jnp.clip(moved, where[2], where[3]), velocity, best), gap

    return jax.lax.scan(step, state, done + jnp.arange(steps, dtype=jnp.int32))


def minimiser(m: jax.Array, where: Any, norm: float) -> jax.Array:
    """(B, *shape) the v that minimises <v, m> on { ||v - x||_p <= eps, low <= v <= high }, for any p from 1 to inf.

    Every entry moves against the sign of m, by at most the room it has in the box. In l-inf by that or by eps; in l1
    entries of the largest |m| move first, until eps is spent; else entry i by min(room_i, t |m_i|^(q - 1)) with
    1/p + 1/q = 1 and the t that spends eps: raising t to what the entries without a full step allow, until no more of
    them fill their room, finds it.
    """
    x, eps, low, high = where
    room = jnp.where(m > 0, x - low, high - x).reshape(len(x), -1)
    room = jnp.where(m.reshape(room.shape) == 0, 0.0, room)
    size = jnp.abs(m).reshape(room.shape)
    size = size / jnp.maximum(size.max(axis=1, keepdims=True), 1e-37)
    budget = eps[:, None]
    if norm == math.inf:
        length = jnp.minimum(room, budget)
    elif norm == 1:
        order = jnp.argsort(-size, axis=1)
        ordered = jnp.take_along_axis(room, order, axis=1)
        before = jnp.cumsum(ordered, axis=1) - ordered
        length = jnp.take_along_axis(
            jnp.clip(budget - before, 0.0, ordered), jnp.argsort(order, axis=1), axis=1
        )
    else:
        length = _filled(size ** (1 / (norm - 1)), room, budget, norm)
    return x - jnp.sign(m) * length.reshape(x.shape)


def _filled(share: jax.Array, room: jax.Array, budget: jax.Array, p: float) -> jax.Array:
    """min(room, t share) with the t for which its l_p norm is the budget (B, 1); room where that is shorter."""
    scale = jnp.maximum(budget, 1e-37)
    room = room / scale  # in units of the budget

    def full_at(t: jax.Array) -> jax.Array:
        return t * share >= room

    def fill(full: jax.Array) -> jax.Array:
        left = jnp.maximum(1 - jnp.where(full, room**p, 0.0).sum(axis=1, keepdims=True), 0.0)
        return (left / jnp.maximum(jnp.where(full, 0.0, share**p).sum(axis=1, keepdims=True), 1e-37)) ** (
            1 / p
        )

    def grow(state: Any) -> Any:
        full, _ = state
        now = full | full_at(fill(full))
        return now, (now != full).any()

    full, _ = jax.lax.while_loop(lambda state: state[1], grow, (full_at(fill(room <= 0)), jnp.bool_(True)))
    return jnp.where(full, room, jnp.minimum(fill(full) * share, room)) * scale
