"""Adversarial examples that a generator can make: the in-distribution attack, and what it measures.

For an image x with label y and a conditional generator G, latents z are sought that make

    ||G(z, y) - x||_2 + lambda max(margin of the label at G(z, y), 0)

small, with Adam and several lambda: J. Chen's thesis, section 4.7.2. A success is an image G(z, y) in the box and
within eps of x that is not classified as labelled. Such images are some of those in the ball, so

    in-distribution adversarial risk  <=  adversarial risk,

and what is found bounds the former from below. With G(z, y) = z it is a plain attack in l2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._text import as_labels, reporting, usual_settings, whole
from lipbounds.analysis.attack_network import Model, check_rows, margin_of
from lipbounds.analysis.attack_search import (
    Attack,
    Found,
    Problem,
    as_points,
    l2_of,
    per_example,
    search,
    stride,
)
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings
from lipbounds.analysis.batches import padded

Generator = Callable[[jax.Array, jax.Array], jax.Array]
_CHECKED = 16  # latents of the batch on which the generator's images must not depend on each other
_AT_ONCE = 50  # Adam steps between two looks at which examples are broken


@usual_settings()
def in_distribution(
    fn: Any,
    generator: Generator,
    x: Any,
    y: Any,
    eps: Any,
    latents: Any,
    settings: AttackSettings = DEFAULT,
    *,
    steps: int = 1000,
    rounds: int = 5,
    step_size: float = 0.01,
    **changes: Any,
) -> Attack:
    """Search the images of a generator within every l2 ball ||x' - x|| <= eps for one not classified as labelled.

    Args:
        fn, x, y, eps, settings, **changes: as those of `attacks.pgd`; the norm is 2.
        generator: latents (B, *latent), labels (B,) -> images (B, *shape), a JAX function. They are clipped to the box.
        latents: (N, *latent) where the search begins: those that made x, or `nearest_latents`.
        steps: of Adam, in every round.
        rounds: of the bisection of lambda, which begins at 1: a success lowers it, a failure raises it.
        step_size: of Adam.

    The search for an example ends with its first success. `adversarial` is x itself where there is none.

    Raises:
        TypeError: fn is not callable.
        ValueError: as `pgd`; another norm than 2; latents or images of another number or shape, or images that depend
            on the others in their batch.
    """
    settings = AttackSettings.changed(settings, changes)
    if settings.norm != 2:
        raise ValueError(f"the in-distribution attack is in l2: norm must be 2, got {settings.norm!r}")
    whole("rounds", rounds)
    _check_steps(steps, step_size)
    starts = _latents(generator, latents, x)
    generator = functools.partial(generator)  # a new one, so that what is compiled holds its weights of now

    def find(problem: Problem) -> Found:
        return _search(problem, generator, starts[np.asarray(problem.index)], steps, rounds, step_size)

    with reporting(settings.progress):
        return search("In-distribution attack", find, fn, x, y, eps, settings, "margin")


@usual_settings()
def nearest_latents(
    generator: Generator,
    x: Any,
    y: Any,
    latents: Any,
    *,
    steps: int = 1000,
    step_size: float = 0.01,
    batch_size: int = 256,
) -> np.ndarray:
    """(N, *latent) latents that make ||G(z, y) - x||_2 small, by Adam from `latents`; no worse than those.

    Arguments are those of `in_distribution`; `latents` are where the search begins.

    Raises:
        ValueError: latents or images of another number or shape, settings out of range.
    """
    _check_steps(steps, step_size)
    points = as_points(x)
    labels, starts = as_labels(y, len(points)), _latents(generator, latents, points)
    generator = functools.partial(generator)  # a new one, as in `in_distribution`
    found, size = [], min(whole("batch_size", batch_size), len(points))
    for start in range(0, len(points), size):
        rows = padded(np.arange(start, min(start + size, len(points))), size)
        target = jnp.asarray(points[rows]), jnp.asarray(labels[rows], jnp.int32)
        z = jnp.asarray(starts[rows])
        state = z, jnp.zeros_like(z), jnp.zeros_like(z), (z, jnp.full(len(z), jnp.inf, jnp.float32))
        for done in range(0, steps + 1, stride(_AT_ONCE)):
            clocks = jnp.arange(done, min(done + stride(_AT_ONCE), steps + 1), dtype=jnp.int32)
            state = _approach(generator, state, target, np.float32(step_size), clocks)
        found.append(np.asarray(state[3][0]))
    return np.concatenate(found)[: len(points)]


def _check_steps(steps: int, step_size: float) -> None:
    whole("steps", steps)
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a number > 0, got {step_size!r}")


def _latents(generator: Generator, latents: Any, x: Any) -> np.ndarray:
    starts, shape = np.asarray(latents, np.float32), as_points(x).shape
    if starts.ndim < 2 or len(starts) != shape[0]:
        raise ValueError(f"latents must hold {shape[0]} rows (N, ...), got shape {starts.shape}")
    if not np.isfinite(starts).all():
        raise ValueError("latents hold NaN or infinite values")
    made = jax.eval_shape(generator, jnp.asarray(starts[:1]), jnp.zeros(1, jnp.int32))
    if getattr(made, "shape", None) != (1, *shape[1:]):
        raise ValueError(
            f"the generator must make images (B, {', '.join(map(str, shape[1:]))}) from latents (B, ...), "
            f"got {getattr(made, 'shape', None)} for B = 1"
        )
    some = starts[:_CHECKED]
    check_rows(
        Model(lambda z: generator(z, jnp.zeros(len(some), jnp.int32)).reshape(len(some), -1)), None, some
    )
    return starts


def _search(
    problem: Problem, generator: Generator, starts: np.ndarray, steps: int, rounds: int, size: float
) -> Found:
    x = problem.where[0]
    z = jnp.asarray(starts)
    weight, low = jnp.ones(len(x), jnp.float32), jnp.zeros(len(x), jnp.float32)
    high = jnp.full(len(x), jnp.inf, jnp.float32)
    found, spent = (x, jnp.zeros(len(x), bool)), jnp.zeros(len(x), jnp.int32)
    once = stride(_AT_ONCE)
    for _ in range(rounds):
        crossed = jnp.zeros(len(x), bool)
        state = z, jnp.zeros_like(z), jnp.zeros_like(z), found, crossed, spent
        for done in range(0, steps + 1, once):
            if done % _AT_ONCE < once and bool(state[3][1].all()):
                break
            clocks = jnp.arange(done, min(done + once, steps + 1), dtype=jnp.int32)
            given = problem.model, problem.weights, problem.where, problem.labels
            state = _descend(*given, generator, state, weight, np.float32(size), clocks)
        _, _, _, found, crossed, spent = state
        if bool(found[1].all()):
            break
        high, low = jnp.where(crossed, weight, high), jnp.where(crossed, low, weight)
        weight = jnp.where(jnp.isfinite(high), (low + high) / 2, 10 * weight)
    return Found(found[0], steps=spent)


@functools.partial(jax.jit, static_argnames=("model", "generator"))
def _descend(
    model: Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    generator: Generator,
    state: Any,
    weight: jax.Array,
    size: Any,
    clocks: jax.Array,
) -> Any:
    """Adam steps from (z, m, v, (points, whether found), whether any class was left, steps spent)."""
    x, eps, low, high = where

    def objective(z: jax.Array) -> Any:
        image = jnp.clip(generator(z, labels).astype(jnp.float32), low, high)
        margin = margin_of(model(weights, image).astype(jnp.float32), labels)
        near = _distance(image, x)
        return (near + weight * jnp.maximum(margin, 0.0)).sum(), (image, margin)

    def step(state: Any, clock: jax.Array) -> Any:
        z, m, v, (points, done), crossed, spent = state
        gradient, (image, margin) = jax.grad(objective, has_aux=True)(z)
        new = ~done & (margin <= 0) & (l2_of(image - x) <= eps)
        points = jnp.where(per_example(new, x), image, points)
        z, m, v = _adam(z, m, v, gradient, size, clock)
        spent = spent + jnp.where(done | new, 0, 1)
        return (z, m, v, (points, done | new), crossed | (margin <= 0), spent), None

    return jax.lax.scan(step, state, clocks)[0]


@functools.partial(jax.jit, static_argnames=("generator",))
def _approach(generator: Generator, state: Any, target: Any, size: Any, clocks: jax.Array) -> Any:
    """Adam steps from (z, m, v, (the best z, its distance)) towards the target images."""
    x, labels = target

    def distance(z: jax.Array) -> Any:
        near = _distance(generator(z, labels).astype(jnp.float32), x)
        return near.sum(), near

    def step(state: Any, clock: jax.Array) -> Any:
        z, m, v, (best, least) = state
        gradient, near = jax.grad(distance, has_aux=True)(z)
        better = near < least
        kept = jnp.where(per_example(better, z), z, best), jnp.where(better, near, least)
        return (*_adam(z, m, v, gradient, size, clock), kept), None

    return jax.lax.scan(step, state, clocks)[0]


def _distance(image: jax.Array, x: jax.Array) -> jax.Array:
    """(B,) l2 distances, with a gradient where they are 0."""
    return jnp.sqrt(jnp.square(image - x).sum(axis=tuple(range(1, x.ndim))) + 1e-12)


def _adam(
    z: jax.Array, m: jax.Array, v: jax.Array, gradient: jax.Array, size: Any, clock: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(z, m, v) after a step of Adam with decays 0.9 and 0.999; gradients that are not finite count as 0."""
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * jnp.square(gradient)
    count = (clock + 1).astype(jnp.float32)
    scale = jnp.sqrt(v / (1 - jnp.float32(0.999) ** count)) + 1e-8
    return z - size * (m / (1 - jnp.float32(0.9) ** count)) / scale, m, v
