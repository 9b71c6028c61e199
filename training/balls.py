"""Balls in a box on the device: projection, steepest directions and random points, for attacks of every kind.

`where` is (x, eps, low, high): examples x (B, *shape), radii eps (B,) in `norm`, 2 or inf, and the ends of the box. All
functions work under jit; no point leaves ball or box by more than float32 rounding.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


def project(point: jax.Array, where: Any, norm: float) -> jax.Array:
    """Into the ball and then into the box, which keeps it in the ball: clipping moves every coordinate towards x.

    In l-inf this is the nearest point of both. In l2 it may lie deeper in the ball than need be, which the next steps
    make up for, since they no longer push against the box: the exact projection gives the same margins to three
    digits, at several times the cost of a step.
    """
    x, eps, low, high = where
    shift, radius = point - x, per_example(eps, point)
    if norm == math.inf:
        shift = jnp.clip(shift, -radius, radius)
    else:
        shift = shift * per_example(jnp.minimum(1.0, eps / jnp.maximum(l2_of(shift), 1e-37)), point)
    return jnp.clip(x + shift, low, high)


def l2_of(shift: jax.Array) -> jax.Array:
    """(B,) the l2 norm of every example."""
    return jnp.sqrt(jnp.square(shift).sum(axis=tuple(range(1, shift.ndim))))


def per_example(values: Any, like: Any) -> Any:
    """One value per example, in the shape that broadcasts against the examples."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def steepest(gradient: jax.Array, point: jax.Array, where: Any, norm: float) -> jax.Array:
    """The direction of length 1 in `norm` that increases the loss most and does not leave the box at once."""
    _, _, low, high = where
    blocked = ((point <= low) & (gradient < 0)) | ((point >= high) & (gradient > 0))
    g = jnp.where(blocked | ~jnp.isfinite(gradient), 0.0, gradient)
    if norm == math.inf:
        return jnp.sign(g)
    axes = tuple(range(1, g.ndim))
    g = g / jnp.maximum(jnp.abs(g).max(axis=axes, keepdims=True), 1e-37)  # squares of small numbers underflow
    return g / jnp.maximum(jnp.sqrt(jnp.square(g).sum(axis=axes, keepdims=True)), 1e-37)


@functools.partial(jax.jit, static_argnames=("norm",))
def uniform_start(key: jax.Array, index: jax.Array, where: Any, norm: float) -> jax.Array:
    """A point drawn uniformly from the ball of every example, clipped to the box."""
    x, eps, low, high = where

    def draw(number: jax.Array) -> jax.Array:
        direction, size = jax.random.split(jax.random.fold_in(key, number))
        if norm == math.inf:
            return jax.random.uniform(direction, x.shape[1:], jnp.float32, -1.0, 1.0)
        v = jax.random.normal(direction, x.shape[1:], jnp.float32)
        share = jax.random.uniform(size, (), jnp.float32) ** (1.0 / math.prod(x.shape[1:]))
        return v * (share / jnp.sqrt(jnp.square(v).sum()))

    return jnp.clip(x + per_example(eps, x) * jax.vmap(draw)(index), low, high)
