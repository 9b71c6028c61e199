"""Operators that pick entries, and recurrence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipbounds.interop._onnx_graph import Apply, Node, Refused
from lipbounds.interop._onnx_ops import operator

_HIGHEST = lax.Precision.HIGHEST


@operator(13, "GatherND")
def _gather_nd(node: Node) -> Apply:
    index, shape, batch = node.constant(1, "indices"), node.shape(), int(node.attr("batch_dims", 0))
    depth = batch + index.shape[-1]
    if depth > len(shape) or index.shape[:batch] != shape[:batch] or index.ndim <= batch:
        raise ValueError(f"indices of shape {index.shape} with batch_dims={batch}")
    places = list(np.indices(index.shape[:-1]))[:batch] + list(np.moveaxis(index, -1, 0))
    for place, size in zip(places, shape, strict=False):
        if place.size and not (-size <= place.min() and place.max() < size):
            raise ValueError(f"an index from {place.min()} to {place.max()} is outside its {size} entries")
    wrapped = [np.where(p < 0, p + size, p) for p, size in zip(places, shape, strict=False)]
    rest = shape[depth:]
    entries = np.zeros(index.shape[:-1], np.int32)
    for place, size in zip(wrapped, shape, strict=False):
        entries = (entries * size + place).astype(np.int32)
    return lambda x: jnp.take(x.reshape(-1, *rest), entries, 0, mode="clip")


@operator(24, "TopK")
def _top_k(node: Node) -> Apply:
    count = node.ints(1, "k")[0] if node.version >= 10 else int(node.attr("k"))
    axis = node.axis(int(node.attr("axis", -1)))
    if not node.attr("sorted", 1):
        raise Refused("with sorted=0 the order of its outputs is not defined", "export with sorted=1")
    if not 0 <= count <= node.shape()[axis]:
        raise ValueError(f"k is {count}, of {node.shape()[axis]} entries")
    if node.attr("largest", 1):
        return lambda x: jnp.flip(
            lax.slice_in_dim(jnp.sort(x, axis), x.shape[axis] - count, None, axis=axis), axis
        )
    return lambda x: lax.slice_in_dim(jnp.sort(x, axis), 0, count, axis=axis)


# --- recurrence ----------------------------------------------------------------------------------------------------

_STATES: dict[str, Apply] = {
    "tanh": jnp.tanh,
    "relu": lambda x: jnp.maximum(x, 0),
    "sigmoid": jax.nn.sigmoid,
    "softsign": jax.nn.soft_sign,
    "softplus": jax.nn.softplus,
}
_LONGEST = 2**12  # steps of a recurrence, which is unrolled


@operator(22, "RNN")
def _rnn(node: Node) -> Apply:
    """h_t = f(W x_t + R h_(t-1) + W_b + R_b), in one or both directions; x (steps, batch, entries)."""
    steps, width, hidden = node.shape()[0], node.shape(0)[1], node.shape(2)[-1]
    way = node.choice("direction", "forward", "reverse", "bidirectional")
    backward = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[way]
    names = [(n.decode() if isinstance(n, bytes) else n).lower() for n in node.attr("activations", [])]
    names = names or ["tanh"] * len(backward)
    if len(names) != len(backward) or node.shape(1)[0] != len(backward):
        raise ValueError(
            f"it has {len(names)} activations and weights of shape {node.shape(1)}, direction {way}"
        )
    if unknown := [n for n in names if n not in _STATES]:
        raise Refused(f"its activation {unknown[0]!r} is not supported", f"use one of {', '.join(_STATES)}")
    if node.attr("clip") is not None or node.attr("layout", 0):
        raise Refused("RNN with clip, or with layout=1, is not supported", "export without them")
    if node.has(4) and set(node.ints(4, "sequence_lens")) != {steps}:
        raise Refused("its sequence_lens are not the whole sequence", "export with sequences of full length")
    if steps > _LONGEST:
        raise Refused(f"it has {steps} steps, more than {_LONGEST}", "export with a shorter sequence")
    biased, started = node.has(3), node.has(5)

    def apply(x: Any, w: Any, r: Any, *more: Any) -> tuple[Any, Any]:
        bias = more[0] if biased else jnp.zeros((len(backward), 2 * hidden), x.dtype)
        begin = more[-1] if started else jnp.zeros((len(backward), width, hidden), x.dtype)
        sequences, ends = [], []
        for i, (name, reverse) in enumerate(zip(names, backward, strict=True)):
            inward = jnp.matmul(x, w[i].T, precision=_HIGHEST) + (bias[i, :hidden] + bias[i, hidden:])
            state, found = begin[i], []
            for t in reversed(range(steps)) if reverse else range(steps):
                state = _STATES[name](inward[t] + jnp.matmul(state, r[i].T, precision=_HIGHEST))
                found.append(state)
            ends.append(state)
            sequences.append(jnp.stack(found[::-1] if reverse else found))
        return jnp.stack(sequences, axis=1), jnp.stack(ends)

    return apply
