"""PGD from starts that are diverse in the network's output (output diversified initialisation, ODI).

Tashiro, Song, Ermon, "Diversity can be transferred: output diversification for white- and black-box attacks", NeurIPS
2020, arXiv 2003.06878. A start is drawn uniformly from the ball and then moved, in a few steps of steepest ascent, so
that psi' f(x') grows, with psi uniform in [-1, 1]^K drawn for every example and restart: starts that are far apart in
the input often have nearly the same output, these have not.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lipbounds._text import usual_settings, whole
from lipbounds.analysis import attacks
from lipbounds.analysis.attack_network import Model
from lipbounds.analysis.attack_search import Attack, Problem, per_example, project
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings


@usual_settings()
def odi_pgd(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    steps: int = 100,
    restarts: int = 10,
    step_size: float | None = None,
    start_steps: int = 2,
    start_size: float | None = None,
    loss: str = "margin",
    target: Any = None,
    **changes: Any,
) -> Attack:
    """`pgd` of which every restart begins at a point of diverse output.

    Arguments, errors and result are those of `pgd`, and

        start_steps: steps that make a start, at least 1.
        start_size: their length, in the units of x; None is eps.
    """
    whole("start_steps", start_steps)
    if start_size is not None and not (math.isfinite(start_size) and start_size > 0):
        raise ValueError(f"start_size must be a number > 0, got {start_size!r}")

    def start(problem: Problem, key: jax.Array) -> jax.Array:
        eps = problem.where[1]
        lengths = eps if start_size is None else jnp.full_like(eps, start_size)
        return diverse(problem, key, lengths, start_steps)

    ascent = attacks.Ascent("ce" if loss == "ce" else "margin", steps, restarts, step_size, start=start)
    settings = AttackSettings.changed(settings, changes)
    return attacks.gradient_attack("ODI-PGD", fn, x, y, eps, settings, ascent, loss, target)


def diverse(problem: Problem, key: jax.Array, lengths: jax.Array, steps: int) -> jax.Array:
    """Starts (B, *shape) in ball and box; of an example they depend on its number and the key only."""
    inside, output = jax.random.split(key)
    point = attacks.uniform_start(inside, problem.index, problem.where, problem.norm)
    for _ in range(steps):
        point = _step(
            problem.model,
            problem.weights,
            point,
            problem.where,
            output,
            problem.index,
            lengths,
            norm=problem.norm,
        )
    return point


@functools.partial(jax.jit, static_argnames=("model", "norm"))
def _step(
    model: Model,
    weights: Any,
    point: jax.Array,
    where: Any,
    key: jax.Array,
    index: jax.Array,
    lengths: jax.Array,
    *,
    norm: float,
) -> jax.Array:
    def weighted(point: jax.Array) -> jax.Array:
        z = model(weights, point).astype(jnp.float32)
        draw = functools.partial(jax.random.uniform, shape=z.shape[1:], minval=-1.0, maxval=1.0)
        psi = jax.vmap(lambda n: draw(jax.random.fold_in(key, n), dtype=jnp.float32))(index)
        return (psi * z).sum()

    direction = attacks.steepest(jax.grad(weighted)(point), point, where, norm)
    return project(point + per_example(lengths, point) * direction, where, norm)
