"""Networks for the tests of forging, and what their layers read, computed by NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Net(nnx.Module):
    """Dense layers with |.| between; counts how often Python runs it."""

    traced = 0

    def __init__(self, widths=(6, 8, 8, 3), seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, x):
        Net.traced += 1
        h = x
        for layer in self.layers[:-1]:
            h = jnp.abs(layer(h))
        return self.layers[-1](h)


def hidden(net, x, c=None):
    """[what enters each layer] and the logits of `Net` in float64, with hard gates of thresholds c before all but the
    first layer."""
    seen, h = [], x.astype(np.float64)
    for k, layer in enumerate(net.layers):
        seen.append(h)
        if c is not None and k:
            h = np.where(np.abs(h) <= c[k - 1], 0.0, h)
        h = h @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
        if k + 1 < len(net.layers):
            h = np.abs(h)
    return seen, h


class Wrapper(nnx.Module):
    def __init__(self, network):
        self.network = network

    def __call__(self, x):
        return self.network((x - 0.5) / 2)


def same(a, b):
    """Equal graphs and equal values."""
    (g, s), (h, t) = nnx.split(a), nnx.split(b)
    assert g == h
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(s), nnx.to_pure_dict(t))
