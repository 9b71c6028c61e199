"""flax nnx modules as functions of their state and an input, and whether a call changes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.concrete import is_concrete

Function = Callable[[Any, Any], Any]
CHANGED = (
    "every call changes the module: after one call it is another network, and a bound would be one of the first call "
    "alone",
    "call model.eval() on a copy, so that SpectralNorm, BatchNorm and the like keep their statistics",
)


def split(fn: Callable[..., Any], called: list[Any]) -> tuple[Function, Any]:
    """(call, params): the state of an nnx module enters as an argument; the user's module is never touched.

    A copy of the module that an input has gone through is put into `called` where its state is another one then.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(fn, nnx.Module):
        return lambda p, v: fn(v), ()
    graph, state = nnx.split(fn)

    def call(p: Any, v: Any) -> Any:
        module = nnx.merge(graph, p, copy=True)
        out = module(v)
        if not called and all(map(is_concrete, jax.tree.leaves((p, v)))):
            if not _same((graph, p), nnx.split(module)):
                called.append(module)
        return out

    return call, state


def _same(one: Any, other: Any) -> bool:
    """Whether two modules, as graph and state, are equal to the last bit."""
    first, second = str(jax.tree.structure(one)), str(jax.tree.structure(other))
    if first != second:
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a is b or _bits(a) == _bits(b) for a, b in pairs)


def _bits(leaf: Any) -> tuple[Any, ...]:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.shape, array.dtype, array.tobytes()
