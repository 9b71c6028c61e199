"""The registry of the zoo and the helpers its nets are built with (import `zoo`, which fills the registry).

``NETS`` maps a name to a `Net`. ``net.make(seed)`` gives ``(fn, x)``: a function of one example (of a batch
where ``net.batched``) with outputs ``(K,)`` (``(batch, K)``), and an example input. Weights are random and
depend on the seed only, so one seed always gives the same network.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Fn = Callable[[jax.Array], jax.Array]
Build = Callable[[np.random.Generator], tuple[Fn, jax.Array]]


@dataclass(frozen=True)
class Net:
    """One architecture.

    Attributes:
        name: its key in ``NETS``.
        build: random generator -> ``(fn, x)``.
        neurons: scalar nonlinearities in the network (for a group tap: its outputs).
        depth: the largest number of nonlinear taps on one path from input to output.
        tags: words the tests select by: "linear", "batched", "half", "lies", "flax", "group".
    """

    name: str
    build: Build
    neurons: int
    depth: int
    tags: frozenset[str]

    @property
    def batched(self) -> bool:
        return "batched" in self.tags

    def make(self, seed: int = 0) -> tuple[Fn, jax.Array]:
        """The network with the weights of this seed, and an example input."""
        return self.build(np.random.default_rng([seed, zlib.crc32(self.name.encode())]))


NETS: dict[str, Net] = {}


def net(neurons: int, depth: int, *tags: str) -> Callable[[Build], Build]:
    """Enter a builder into the zoo under its own name."""

    def enter(build: Build) -> Build:
        name = build.__name__
        if name in NETS:
            raise ValueError(f"two nets are called {name}")
        NETS[name] = Net(name, build, neurons, depth, frozenset(tags))
        return build

    return enter


def enter_many(neurons: int, depth: int, builders: dict[str, Build]) -> None:
    for name, build in builders.items():
        NETS[name] = Net(name, build, neurons, depth, frozenset())


def gauss(rng: np.random.Generator, *shape: int, fan_in: int | None = None, gain: float = 1.4) -> jax.Array:
    """Normal weights of standard deviation gain / sqrt(fan_in); fan_in is the last axis unless given."""
    fan = fan_in if fan_in is not None else shape[-1]
    return jnp.asarray(rng.normal(size=shape) * gain / np.sqrt(fan), jnp.float32)


def bias(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)


def point(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def mlp(
    rng: np.random.Generator, *activations: Fn, widths: tuple[int, ...] = (6, 12, 12, 4)
) -> tuple[Fn, jax.Array]:
    """Dense layers of these widths with the given activations between them (the last layer has none)."""
    weights = [gauss(rng, n_out, n_in) for n_in, n_out in itertools.pairwise(widths)]
    biases = [bias(rng, n) for n in widths[1:]]

    def fn(x: jax.Array) -> jax.Array:
        for w, b, activation in zip(weights[:-1], biases[:-1], activations, strict=True):
            x = activation(w @ x + b)
        return weights[-1] @ x + biases[-1]

    return fn, point(rng, widths[0])


def twice(activation: Callable[..., Any]) -> Build:
    """The builder of an MLP with two hidden layers of this activation."""
    return lambda rng: mlp(rng, activation, activation)
