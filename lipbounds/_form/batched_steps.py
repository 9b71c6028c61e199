"""Linear steps on batches, written so that XLA compiles them well on a CPU even inside loops.

Outside loops XLA converts convolutions to the layout of its fast CPU kernels (channels last, kernel as height, width,
in, out). Inside a loop it does not, and any other layout, such as that of a transposed convolution, is 20 times slower
(jax 0.10 and 0.12). Convolutions and their derivatives are therefore written in that layout here.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lipbounds._form.lure import LureForm, apply_op, fixed_operands
from lipbounds._form.program import Op
from lipbounds._form.walk import Algebra

_HIGHEST = lax.Precision.HIGHEST
#: Products and sums of products in full precision, where a GPU would round float32 operands to TF32.
product = partial(jnp.matmul, precision=_HIGHEST)
einsum = partial(jnp.einsum, precision=_HIGHEST)


def apply_batched(step: Any, fixed: Sequence[Any], stacks: Sequence[Any]) -> Any:
    """Apply a step to stacks (batch, *shape), one per None among the fixed operands; for reverse mode only."""
    params = dict(step.params)
    grouped = step.kind == "conv" and (params["feature_group_count"], params["batch_group_count"]) != (1, 1)
    if step.kind == "conv" and fixed[0] is None and not grouped:
        return _convolution(params, stacks[0], fixed[1])
    places = [place for place, value in enumerate(fixed) if value is None]

    def one(*moving: Any) -> Any:
        args = list(fixed)
        for place, value in zip(places, moving, strict=True):
            args[place] = value
        return apply_op(step, args)

    return jax.vmap(one)(*stacks)


class Batches(Algebra[Any]):
    """Walk with batches (count, *shape) in the registers, joined to (count, entries); offsets are dropped."""

    def __init__(self, form: LureForm, count: int, dtype: Any) -> None:
        self.form, self.program, self.count, self.dtype = form, form.program, count, dtype

    def zeros(self, shape: Sequence[int]) -> jax.Array:
        return jnp.zeros((self.count, *shape), self.dtype)

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        stacks = [held[i] if i in held else self.zeros(self.program.shapes[i]) for i in op.reads]
        return apply_batched(op, fixed_operands(self.form.consts, op, self.dtype), stacks)

    def back(self, place: int, op: Op, out: Any) -> Iterator[tuple[int, Any]]:
        fixed = fixed_operands(self.form.consts, op, self.dtype)
        zeros = (self.zeros(self.program.shapes[i]) for i in op.reads)
        return zip(op.reads, jax.vjp(lambda *m: apply_batched(op, fixed, m), *zeros)[1](out), strict=True)

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> Any:
        sizes = ((i, self.program.sizes[i]) for i in registers)
        parts = [held[i].reshape(self.count, -1) if i in held else self.zeros((n,)) for i, n in sizes]
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def split(self, value: Any, registers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for i, place in self.program.places_of(registers):
            yield i, value[:, place].reshape(self.count, *self.program.shapes[i])

    def add(self, a: Any, b: Any) -> Any:
        return a + b


# --- convolutions --------------------------------------------------------------------------------------------------


def _convolution(params: dict[str, Any], stack: Any, kernel: Any) -> Any:
    numbers = params["dimension_numbers"]
    batch, size = stack.shape[0], stack.shape[1:]

    def last(spec: Sequence[int]) -> list[int]:  # (first, *space, second) from (first, second, *space)
        return [spec[0], *spec[2:], spec[1]]

    into = last(numbers.lhs_spec)
    x = stack.transpose([0, *(1 + d for d in into)]).reshape(
        batch * size[into[0]], *(size[d] for d in into[1:])
    )
    weights = kernel.transpose([*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]])
    geometry = tuple(
        tuple(params[name]) for name in ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    )
    y = _channels_last(geometry, x, weights)
    y = y.reshape(batch, -1, *y.shape[1:])
    out = last(numbers.out_spec)
    return y.transpose([0, *(1 + out.index(d) for d in range(len(out)))])


def _plain(x: Any, w: Any, strides: Any, padding: Any, dilation: Any, kernel_dilation: Any) -> Any:
    space = string.ascii_lowercase[: x.ndim - 2]
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        dilation,
        kernel_dilation,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        precision=_HIGHEST,
        preferred_element_type=x.dtype,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _channels_last(geometry: Any, x: Any, w: Any) -> Any:
    """Convolve x (batch, *space, channels) with w (*window, channels, features).

    geometry: strides, padding, two dilations.
    """
    return _plain(x, w, *geometry)


def _forward(geometry: Any, x: Any, w: Any) -> Any:
    return _channels_last(geometry, x, w), (x, w)


def _backward(geometry: Any, kept: Any, g: Any) -> Any:
    strides, padding, dilation, kernel_dilation = geometry
    x, w = kept
    rank = len(strides)

    def spread(n: int, step: int) -> int:
        return 0 if n == 0 else 1 + step * (n - 1)

    before, after, weights_padding = [], [], []
    for d in range(rank):
        read, written = spread(x.shape[1 + d], dilation[d]), spread(g.shape[1 + d], strides[d])
        reach = spread(w.shape[d], kernel_dilation[d])
        low = padding[d][0]
        before.append(reach - 1 - low)
        after.append(read + reach - 1 - written - before[-1])
        weights_padding.append((low, written + reach - 1 - read - low))
    turned = jnp.flip(w, range(rank)).swapaxes(-1, -2)
    dx = _plain(g, turned, dilation, list(zip(before, after, strict=True)), strides, kernel_dilation)
    # In the gradient of the weights, channels and batch change roles.
    dw = _plain(
        jnp.moveaxis(x, (0, -1), (-1, 0)),
        jnp.moveaxis(g, 0, -2),
        kernel_dilation,
        weights_padding,
        dilation,
        strides,
    )
    return dx, jnp.moveaxis(dw, 0, -2)


_channels_last.defvjp(_forward, _backward)
