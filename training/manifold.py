"""Matrices that stay orthonormal while they are trained: steps along the Stiefel manifold, in products alone.

A matrix W (m, n), m >= n, with orthonormal columns (with m < n, rows) is moved by a step in the tangent space,
D = G - W sym(W'G), and brought back to the manifold. Nothing is constructed from unconstrained parameters, so that a
training step costs no factorisation, and the network is made of plain matrices (Hu, Hu and Fredrikson, LipNeXt, ICLR
2026, train so).

The step is orthogonalised, as that of Muon (Jordan et al., 2024): all of its singular values are about the learning
rate, which is the angle in radians by which W turns, whatever the size of W.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

# The quintic of Muon: it brings singular values from (0, 1] to about [0.7, 1.2] in few steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Orthonormal(nnx.Param):  # type: ignore[type-arg]
    """A matrix with orthonormal columns (or rows) that `fit` trains by `turns`."""


def orthonormal(weights: Any) -> Any:
    """For every array of a tree whether it is that of an `Orthonormal`."""
    return _by_variable(lambda variable, a: isinstance(variable, Orthonormal), weights)


def restored(weights: Any, steps: int = 12) -> Any:
    """The weights, with the matrices next to them in place of averages of orthonormal ones.

    The norm of an average is at most 1, but its singular values may be smaller. Those of less than 0.01 do not come
    close to 1 in so many steps, which no bound relies on.
    """

    def near(variable: Any, a: jax.Array) -> jax.Array:
        return orthonormalised(a, steps) if isinstance(variable, Orthonormal) else a

    return _by_variable(near, weights)


def _by_variable(function: Callable[[Any, jax.Array], Any], weights: Any) -> Any:
    """function(variable, array) of every array in a tree of flax's variables."""
    return jax.tree.map(
        lambda variable: jax.tree.map(partial(function, variable), variable),
        weights,
        is_leaf=lambda part: isinstance(part, nnx.Variable),
    )


def tangent(w: jax.Array, g: jax.Array) -> jax.Array:
    """The projection of G to the directions in which W, with orthonormal columns (or rows), can move."""
    if w.shape[0] < w.shape[1]:
        return tangent(w.T, g.T).T
    inner = w.T @ g
    return g - w @ ((inner + inner.T) / 2)


def orthonormalised(w: jax.Array, steps: int = 1) -> jax.Array:
    """The orthonormal matrix next to W, by steps of Newton and Schulz: W (3 I - W'W) / 2.

    Singular values s of W in (0, sqrt(3)) go to 1, with 1 - s falling to 3/2 (1 - s)^2 in each step, and are at most 1
    after the first one.
    """
    if w.shape[0] < w.shape[1]:
        return orthonormalised(w.T, steps).T
    one = jnp.eye(w.shape[1], dtype=w.dtype)
    for _ in range(steps):
        w = w + 0.5 * (w @ (one - _product(w.T, w)))  # only the difference needs every digit
    return w


def direction(g: jax.Array, steps: int = 6, kind: Any = None) -> jax.Array:
    """A matrix with the singular vectors of G whose singular values are about 1, whatever its size; zero where G is.

    With `kind` its products are in that dtype: bfloat16 has digits enough, and accelerators take half the time for it.
    """
    if g.shape[0] < g.shape[1]:
        return direction(g.T, steps, kind).T
    a, b, c = _QUINTIC
    tiny = jnp.finfo(g.dtype).tiny
    x = g / jnp.maximum(jnp.max(jnp.abs(g)), tiny)  # first, as squares may leave the range of floats
    x = (x / jnp.maximum(jnp.linalg.norm(x), tiny)).astype(kind or g.dtype)
    one = jnp.eye(x.shape[1], dtype=x.dtype)
    for _ in range(steps):
        gram = x.T @ x
        x = x @ (a * one + b * gram + c * (gram @ gram))
    return x.astype(g.dtype)


class Momentum(NamedTuple):
    """State of `turns`: the moving averages of the gradients, and the number of steps."""

    mean: Any
    steps: jax.Array


def averaged(mean: jax.Array, g: jax.Array, momentum: float = 0.9) -> jax.Array:
    """The next moving average of the gradients."""
    return momentum * mean + (1 - momentum) * g


def turned(
    w: jax.Array,
    mean: jax.Array,
    g: jax.Array,
    angle: Any,
    momentum: float = 0.9,
    corrections: int = 2,
    kind: Any = None,
) -> jax.Array:
    """W after a step, orthonormal up to rounding; `mean` includes the gradient g (momentum in Nesterov's form).

    A step of length a leaves singular values up to 1 + 0.7 a^2, and one correction those of about 1 - 0.8 a^4: for
    angles of at most 0.03 one is enough, for those of at most 0.2 two are.
    """
    along = tangent(w, direction(tangent(w, averaged(mean, g, momentum)), kind=kind))
    return orthonormalised(w - angle * along, corrections)


def all_turned(weights: Any, mean: Any, gradient: Any, angle: Any, **options: Any) -> Any:
    """`turned` of all matrices of a tree; those of one shape side by side, as accelerators want it."""
    leaves, tree = jax.tree.flatten(weights)
    columns = leaves, jax.tree.leaves(mean), jax.tree.leaves(gradient)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, leaf in enumerate(leaves):
        groups.setdefault(leaf.shape, []).append(number)
    turn = jax.vmap(partial(turned, angle=angle, **options))
    for numbers in groups.values():
        found = turn(*(jnp.stack([column[n] for n in numbers]) for column in columns))
        for n, one in zip(numbers, found, strict=True):
            leaves[n] = one
    return jax.tree.unflatten(tree, leaves)


def turns(rate: float | Callable[[Any], Any], momentum: float = 0.9) -> optax.GradientTransformation:
    """Steps for matrices with orthonormal columns or rows, which keep them orthonormal up to rounding.

    Args:
        rate: the angle of a step in radians, at most 0.2, or a schedule of it.
        momentum: of the moving average of the gradients.
    """

    def init(weights: Any) -> Momentum:
        return Momentum(jax.tree.map(jnp.zeros_like, weights), jnp.zeros((), jnp.int32))

    def update(gradient: Any, state: Momentum, weights: Any = None) -> tuple[Any, Momentum]:
        angle = rate(state.steps) if callable(rate) else rate
        mean = jax.tree.map(partial(averaged, momentum=momentum), state.mean, gradient)
        after = all_turned(weights, mean, gradient, angle, momentum=momentum)
        return jax.tree.map(jnp.subtract, after, weights), Momentum(mean, state.steps + 1)

    return optax.GradientTransformation(init, update)
