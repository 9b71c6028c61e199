"""Promises about the indices of gather and scatter, and the entries that they reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def checked_mode(mode: Any) -> Any:
    """The out-of-range mode, with a promise that indices are in range replaced by a mode that shows violations."""
    modes = lax.GatherScatterMode
    return modes.FILL_OR_DROP if mode == modes.PROMISE_IN_BOUNDS else mode


def landings(
    shape: Sequence[int], indices: Any, updates: Sequence[int], params: dict[str, Any]
) -> np.ndarray:
    """How many updates of a scatter land on each entry of its operand of this shape."""
    with jax.ensure_compile_time_eval():
        hits = lax.scatter_add(
            jnp.zeros(shape, jnp.int32),
            jnp.asarray(indices),
            jnp.ones(updates, jnp.int32),
            params["dimension_numbers"],
            mode=checked_mode(params["mode"]),
        )
        return np.asarray(hits)


def outside(hits: np.ndarray, updates: Sequence[int], params: dict[str, Any]) -> bool:
    """Whether an update lies out of range although it was promised that none does: anything may happen then."""
    promised = params["mode"] == lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return promised and int(hits.sum()) != int(np.prod(updates))


#: (reason, remedy) for `unsorted` indices.
UNSORTED = (
    "indices_are_sorted=True was promised, but the indices are not sorted",
    "drop the promise, or sort them",
)


def unsorted(indices: Any, params: dict[str, Any]) -> bool:
    """Whether the indices of a gather or scatter are not in order although that was promised.

    A device may then compute anything. The order is that of the places in the operand, batch by batch.
    """
    numbers, array = params["dimension_numbers"], np.asarray(indices)
    if not params["indices_are_sorted"] or not array.size:
        return False
    if isinstance(numbers, lax.GatherDimensionNumbers):
        columns, batches = numbers.start_index_map, numbers.start_indices_batching_dims
    else:
        columns, batches = numbers.scatter_dims_to_operand_dims, numbers.scatter_indices_batching_dims
    rest = [d for d in range(array.ndim - 1) if d not in batches]
    array = array.transpose(*batches, *rest, array.ndim - 1)
    ordered = array[..., np.argsort(columns, kind="stable")]
    rows = ordered.reshape(int(np.prod(array.shape[: len(batches)])), -1, array.shape[-1])
    ahead, behind = rows[:, :-1], rows[:, 1:]
    first = np.argmax(ahead != behind, axis=-1)[..., None]
    smaller = np.take_along_axis(behind, first, -1) < np.take_along_axis(ahead, first, -1)
    return bool(smaller.any())
