"""The kinds of linear steps of a canonical program, and how each is applied to arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


class StaticArray:
    """A NumPy array hashed by value, so that index tables and masks can be part of the static program."""

    __slots__ = ("_hash", "array")

    def __init__(self, array: Any):
        self.array = np.asarray(array, order="C")
        self.array.setflags(write=False)
        self._hash = hash((self.array.shape, self.array.dtype.str, self.array.tobytes()))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return StaticArray, (self.array,)  # the hash of bytes is another one in every process

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, StaticArray)
            and self._hash == other._hash
            and self.array.dtype == other.array.dtype
            and np.array_equal(self.array, other.array)
        )

    def __repr__(self) -> str:
        return f"StaticArray(shape={self.array.shape}, dtype={self.array.dtype})"


def static(value: Any) -> Any:
    """Params as hashable plain values."""
    if isinstance(value, (np.integer, int)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, np.ndarray):
        return StaticArray(value)
    if type(value) in (list, tuple):
        return tuple(static(v) for v in value)
    return value


@dataclass(frozen=True)
class Kind:
    """How to apply a canonical linear step.

    Args:
        apply: (params, *arrays) -> array.
        joint: linear in all operands together; a constant operand is an offset that cancels in differences.
            Otherwise bilinear: the constant operand is a coefficient.
        moves: every output entry is one input entry or zero, so its action on an iota determines the step.
    """

    apply: Callable[..., Any]
    joint: bool = True
    moves: bool = False


def _take(p: dict[str, Any], *arrays: Any) -> Any:
    flat = jnp.concatenate([*(jnp.ravel(a) for a in arrays), jnp.zeros((1,), arrays[0].dtype)])
    return flat[p["index"].array]  # index -1 reads the zero at the end


def _scatter_add(p: dict[str, Any], operand: Any, updates: Any) -> Any:
    out = jnp.concatenate([jnp.ravel(operand), jnp.zeros((1,), operand.dtype)])
    out = out.at[p["target"].array.ravel()].add(jnp.ravel(updates))
    return out[:-1].reshape(operand.shape)  # target -1 is the last entry, which is dropped


def _dot(p: dict[str, Any], a: Any, b: Any) -> Any:
    return lax.dot_general(
        a, b, p["dimension_numbers"], precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype
    )


def _conv(p: dict[str, Any], a: Any, b: Any) -> Any:
    return lax.conv_general_dilated(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype, **p
    )


def _reduce_window_sum(p: dict[str, Any], a: Any) -> Any:
    zero = np.zeros((), a.dtype)  # concrete, so that jax sees a sum and can differentiate it
    return lax.reduce_window(
        a,
        zero,
        lax.add,
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
        base_dilation=p["base_dilation"],
        window_dilation=p["window_dilation"],
    )


KINDS: dict[str, Kind] = {
    "constant": Kind(lambda p, a: a),
    "add": Kind(lambda p, a, b: jnp.add(a, b)),
    "sub": Kind(lambda p, a, b: jnp.subtract(a, b)),
    "neg": Kind(lambda p, a: -a),
    "mul": Kind(lambda p, a, b: jnp.multiply(a, b), joint=False),
    "div": Kind(lambda p, a, b: jnp.divide(a, b), joint=False),
    "dot_general": Kind(_dot, joint=False),
    "conv": Kind(_conv, joint=False),
    "reduce_sum": Kind(lambda p, a: jnp.sum(a, axis=p["axes"])),
    "cumsum": Kind(lambda p, a: lax.cumsum(a, axis=p["axis"], reverse=p["reverse"])),
    "reduce_window_sum": Kind(_reduce_window_sum),
    "scatter_add": Kind(_scatter_add),
    "take": Kind(_take, moves=True),
    "reshape": Kind(lambda p, a: lax.reshape(a, p["shape"]), moves=True),
    "transpose": Kind(lambda p, a: lax.transpose(a, p["permutation"]), moves=True),
    "broadcast_in_dim": Kind(lambda p, a: lax.broadcast_in_dim(a, p["shape"], p["dims"]), moves=True),
    "tile": Kind(lambda p, a: jnp.tile(a, p["reps"]), moves=True),
    "rev": Kind(lambda p, a: lax.rev(a, p["dimensions"]), moves=True),
    "slice": Kind(lambda p, a: lax.slice(a, p["start"], p["limit"], p["strides"]), moves=True),
    "pad": Kind(lambda p, a, v: lax.pad(a, v, p["padding_config"]), moves=True),
    "stack": Kind(lambda p, *a: jnp.stack(a, p["axis"]), moves=True),
    "concatenate": Kind(lambda p, *a: lax.concatenate(a, p["dimension"]), moves=True),
}
