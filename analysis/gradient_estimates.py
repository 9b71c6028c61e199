"""Attacks by gradients estimated from differences of the network's logits: Frank-Wolfe and NES-PGD without gradients.

For a smooth f and directions u_1..u_b that are drawn anew at every step,

    q = d / (2 delta b) sum over i of (f(x + delta u_i) - f(x - delta u_i)) u_i,    u uniform on the unit sphere of R^d,

or without the factor d for standard normal u (Chen, Zhou, Yi, Gu, arXiv 1811.10828, Algorithms 2 and 3). For linear f
the mean of q is the gradient, and for quadratic f no q depends on delta. With u on the sphere its mean is the gradient
of the average of f over the ball of radius delta around x, and the variance is at most
(2 d G^2 + delta^2 L^2 d^2 / 2) / b for gradients of length at most G and an L-Lipschitz gradient.

`black_frank_wolfe` is `frank_wolfe` with q in place of the gradient, `nes_pgd` moves by its sign in l-inf and along it
in l2 (Ilyas, Engstrom, Athalye, Lin, "Black-box adversarial attacks with limited queries and information", ICML 2018).

Points x +- delta u at which f is asked may lie up to delta |u| outside the box; the iterates do not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._text import reporting, usual_settings, whole
from lipbounds.analysis.attack_network import Model
from lipbounds.analysis.attack_search import (
    Attack,
    Found,
    Problem,
    per_example,
    project,
    search,
    stride,
)
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings
from lipbounds.analysis.attacks import steepest
from lipbounds.analysis.frank_wolfe import check_steps, minimiser, score

DIRECTIONS = ("sphere", "gaussian")
_LEAST = 8  # images, below which a chunk is not halved


@dataclasses.dataclass(frozen=True)
class _Way:
    """How gradients are estimated, as of `black_frank_wolfe`, and what is done with them.

    move: "frank-wolfe" or "ascent". step_size: gamma of Frank-Wolfe; of the ascent in the units of x, a negative one in
    shares of -eps.
    """

    move: str
    loss: str
    queries: int
    samples: int
    directions: str
    delta: float
    step_size: float
    momentum: float

    def __post_init__(self) -> None:
        whole("samples", self.samples)
        whole("queries", self.queries, 2 * self.samples + 1)  # those of one step
        if self.directions not in DIRECTIONS:
            raise ValueError(f"directions must be one of {', '.join(DIRECTIONS)}, got {self.directions!r}")
        delta = float(np.float32(self.delta))
        if not (math.isfinite(delta) and delta > 0):
            raise ValueError(f"delta must be a number > 0, got {delta!r}")

    @property
    def sizes(self) -> tuple[np.float32, np.float32]:
        """(step size, momentum)."""
        return np.float32(self.step_size), np.float32(self.momentum)


@usual_settings()
def black_frank_wolfe(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    queries: int = 50_000,
    samples: int = 25,
    delta: float = 0.01,
    directions: str = "sphere",
    gamma: float = 0.5,
    momentum: float = 0.9,
    loss: str = "margin",
    target: Any = None,
    **changes: Any,
) -> Attack:
    """Search every ball ||x' - x|| <= eps by Frank-Wolfe with estimated gradients; only logits are asked for.

    Args:
        fn, x, y, eps, settings, target, **changes: as those of `attacks.pgd`; the norm is any from 1 to inf.
        queries: of every image at most; a step costs 2 `samples`, and one more to see whether it was a success.
        samples: b, directions of a step.
        delta: of the differences, in the units of x.
        directions: "sphere" or "gaussian".
        gamma, momentum, loss: as of `frank_wolfe`.

    Raises:
        TypeError: fn is not callable.
        ValueError: as `pgd`; a setting out of range.
    """
    settings = AttackSettings.changed(settings, changes)
    check_steps(1, gamma, momentum, loss)
    way = _Way("frank-wolfe", loss, queries, samples, directions, delta, gamma, momentum)
    return _estimated("Frank-Wolfe by queries", fn, x, y, eps, settings, way, target)


@usual_settings()
def nes_pgd(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    queries: int = 50_000,
    samples: int = 25,
    delta: float = 0.01,
    directions: str = "gaussian",
    step_size: float | None = None,
    momentum: float = 0.0,
    loss: str = "margin",
    target: Any = None,
    **changes: Any,
) -> Attack:
    """Search every ball ||x' - x|| <= eps by steps along the sign of an estimated gradient (norm 2: along it).

    The norm is 2 or inf. `step_size`, in the units of x, is eps / 10 if None; the other arguments are those of
    `black_frank_wolfe`.
    """
    settings = AttackSettings.changed(settings, changes)
    check_steps(1, 1.0, momentum, loss)
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a number > 0, got {step_size!r}")
    way = _Way("ascent", loss, queries, samples, directions, delta, step_size or -0.1, momentum)
    return _estimated("NES-PGD", fn, x, y, eps, settings, way, target)


def _estimated(
    name: str,
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings,
    way: _Way,
    target: Any,
) -> Attack:
    key, any_norm = jax.random.key(settings.seed), way.move == "frank-wolfe"

    def find(problem: Problem) -> Found:
        return _search(problem, way, key)

    with reporting(settings.progress):
        return search(
            name, find, fn, x, y, eps, settings, way.loss, target=target, needs="logits", every_norm=any_norm
        )


def _search(problem: Problem, way: _Way, key: jax.Array) -> Found:
    """The first points of margin <= 0, or the last iterates. A chunk of which half is done goes on at half the size."""
    point = problem.where[0]
    velocity, margin = jnp.zeros_like(point), problem.margins(point)
    cost = 2 * way.samples + 1
    rows = np.arange(len(point))
    points, spent = np.array(point), np.zeros(len(point), np.int64)
    for step in range(way.queries // cost):
        open_ = np.asarray(~(margin <= 0))
        if 2 * open_.sum() <= len(rows) and (len(rows) > _LEAST or not open_.any()):
            points[rows] = np.asarray(point)
            if not open_.any():
                break
            chosen = np.argsort(~open_, kind="stable")[: -(-len(rows) // 2)]
            rows, problem = rows[chosen], problem.of(chosen)
            point, velocity, margin = point[chosen], velocity[chosen], margin[chosen]
            open_ = open_[chosen]
        given = (problem.model, problem.weights, point, problem.labels)
        clock = np.int32(step)
        q = estimate(
            *given,
            key,
            problem.index,
            clock,
            np.float32(way.delta),
            samples=way.samples,
            directions=way.directions,
            loss=way.loss,
            targeted=problem.targeted,
        )
        state = point, velocity, margin
        point, velocity = _moved(state, q, problem.where, clock, way.sizes, norm=problem.norm, move=way.move)
        new = problem.margins(point)
        margin = jnp.where(margin <= 0, margin, new)
        spent[rows[open_]] += cost
    points[rows] = np.asarray(point)
    return Found(points, queries=spent)


def estimate(
    model: Model,
    weights: Any,
    point: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    index: jax.Array,
    step: Any,
    delta: Any,
    *,
    samples: int,
    directions: str,
    loss: str,
    targeted: bool,
) -> jax.Array:
    """(B, *shape) the estimates q; directions depend on the example's number, the step and the sample."""
    q = jnp.zeros_like(point)
    once = stride(samples)
    for start in range(0, samples, once):
        numbers = jnp.arange(start, min(start + once, samples), dtype=jnp.int32)
        q = _added(
            model, weights, point, labels, key, index, step, delta, q, numbers,
            directions=directions, loss=loss, targeted=targeted,
        )  # fmt: skip
    factor = math.prod(point.shape[1:]) if directions == "sphere" else 1
    return q * (factor / (2 * delta * samples))


@functools.partial(jax.jit, static_argnames=("model", "directions", "loss", "targeted"))
def _added(
    model: Model,
    weights: Any,
    point: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    index: jax.Array,
    step: Any,
    delta: Any,
    q: jax.Array,
    numbers: jax.Array,
    *,
    directions: str,
    loss: str,
    targeted: bool,
) -> jax.Array:
    """`q` and the terms of some samples."""

    def draw(example: jax.Array, number: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, step), example), number)
        u = jax.random.normal(own, point.shape[1:], jnp.float32)
        return u / jnp.sqrt(jnp.square(u).sum()) if directions == "sphere" else u

    def sample(q: jax.Array, number: jax.Array) -> Any:
        u = jax.vmap(draw, (0, None))(index, number)
        both = jnp.concatenate([point + delta * u, point - delta * u])
        z = model(weights, both).astype(jnp.float32)
        value, _ = score(z, jnp.concatenate([labels, labels]), targeted, loss)
        ahead, behind = jnp.split(value, 2)
        change = jnp.where(jnp.isfinite(ahead - behind), ahead - behind, 0.0)
        return q + per_example(change, u) * u, None

    return jax.lax.scan(sample, q, numbers)[0]


@functools.partial(jax.jit, static_argnames=("norm", "move"))
def _moved(state: Any, q: jax.Array, where: Any, clock: Any, sizes: Any, *, norm: float, move: str) -> Any:
    """(point, velocity) after one step; examples with a margin <= 0 stay."""
    point, velocity, margin = state
    size, beta = sizes
    heavy = jnp.where(clock == 0, q, beta * velocity + (1 - beta) * q)
    if move == "frank-wolfe":
        new = jnp.clip(point + size * (minimiser(heavy, where, norm) - point), where[2], where[3])
    else:
        lengths = jnp.where(size > 0, size, -size * where[1])  # a share of eps is negative
        new = project(point + per_example(lengths, point) * steepest(-heavy, point, where, norm), where, norm)
    still = per_example(margin <= 0, point)
    return jnp.where(still, point, new), jnp.where(still, velocity, heavy)
