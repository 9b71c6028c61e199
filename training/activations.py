"""Activations that permute or reflect, so that they keep norms: MaxMin, GroupSort, Householder; and a clipped ReLU."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx


def maxmin(x: jax.Array) -> jax.Array:
    """Sort channel k against channel k + c/2 of the last axis (c even): permutes, so it keeps every norm."""
    if x.shape[-1] % 2:
        raise ValueError(f"maxmin needs an even number of channels, got {x.shape[-1]}")
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=-1)


def groupsort(x: jax.Array, size: int = 4) -> jax.Array:
    """Sort groups of `size` neighbouring channels of the last axis (Anil, Lucas and Grosse, ICML 2019)."""
    if size < 1 or x.shape[-1] % size:
        raise ValueError(f"groups of {size} need a multiple of {size} channels, got {x.shape[-1]}")
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    return jnp.sort(groups, axis=-1).reshape(x.shape)


class ClippedRelu(nnx.Module):
    """min(max(y, 0), theta) with a trained theta >= 0 (clipped at 0): constant above theta, too.

    Huang et al., Training certifiably robust neural networks with efficient local Lipschitz bounds, NeurIPS 2021, where
    theta belongs to a layer. It starts at 1, which is a choice of ours.
    """

    def __init__(self, start: float = 1.0):
        self.theta = nnx.Param(jnp.asarray(start, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The activation of every entry of x."""
        top = jnp.maximum(self.theta.get_value(), 0).astype(x.dtype)
        return jnp.minimum(jnp.maximum(x, 0), top)


class Householder(nnx.Module):
    """z if v'z > 0, else its mirror image z - 2 v v'z, for the pair of channels k, k + c/2 and v at a trained angle.

    Singla, Singla and Feizi, Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100, ICLR 2022. Written as
    MaxMin between a rotation and its inverse, which are two orthogonal maps and a permutation: MaxMin is the case
    v = (1, -1) / sqrt(2), where the angle is 0 and training starts.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs | None = None):
        if channels < 2 or channels % 2:
            raise ValueError(f"Householder needs an even number of channels, got {channels}")
        self.angles = nnx.Param(jnp.zeros(channels // 2, jnp.float32))

    @property
    def normals(self) -> jax.Array:
        """The unit vectors v, (c/2, 2)."""
        angles = self.angles.get_value() - math.pi / 4
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The activation on the last axis of x."""
        angles = self.angles.get_value()
        cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
        a, b = jnp.split(x, 2, axis=-1)
        a, b = cos * a + sin * b, cos * b - sin * a
        a, b = jnp.maximum(a, b), jnp.minimum(a, b)
        return jnp.concatenate([cos * a - sin * b, sin * a + cos * b], axis=-1)
