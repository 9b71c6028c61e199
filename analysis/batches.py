"""One pass over data: an array, or an iterable of batches that need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

Example = tuple[tuple[int, ...], str]  # shape and dtype of one example


def examples(batch: Any, example: Example | None = None) -> np.ndarray:
    """A batch (n, ...) in the dtype that JAX gives it.

    ValueError for entries that are not numbers or not finite in float32, and for a shape or dtype that differs.
    """
    rows = np.asarray(batch)
    if rows.dtype.kind not in "fiub" and rows.dtype.name != "bfloat16":
        raise ValueError(f"data must hold numbers, got dtype {rows.dtype}")
    if rows.dtype == np.uint8:
        raise ValueError(
            "data are bytes (uint8): scale them to the network's input units, such as pixels / 255"
        )
    with np.errstate(over="ignore"):
        rows = rows.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
        if rows.dtype.kind not in "iub" and not np.isfinite(rows.astype(np.float32)).all():
            raise ValueError("data hold values that are NaN or infinite in float32")
    if example is not None and (rows.shape[1:], str(rows.dtype)) != example:
        raise ValueError(
            f"every example must have shape {example[0]} and dtype {example[1]}, got {rows.shape[1:]}, {rows.dtype}"
        )
    return rows


def chunks(data: Any, size: int) -> Iterator[np.ndarray]:
    """The examples of `data` in arrays of `size` rows, the last one shorter.

    Data are an array (N, ...), or an iterable of batches (n, ...) or of pairs (x, y), of which x is taken. They are
    read once; no more than `size` rows and one batch are held.

    TypeError where data are neither, ValueError for batches that `examples` refuses and where there is no example.
    """
    if hasattr(data, "__array__"):
        data = [data]
    elif isinstance(data, str | bytes | Mapping) or not hasattr(data, "__iter__"):
        raise TypeError(
            f"data must be an array (N, ...) or an iterable of batches, got {type(data).__name__}"
        )
    held: list[np.ndarray] = []
    count, example = 0, None
    for item in data:
        batch = item[0] if isinstance(item, tuple | list) and len(item) == 2 else item
        if not hasattr(batch, "__array__"):
            raise ValueError(
                f"every batch must be an array (n, ...) or a pair (x, y), got {type(item).__name__}"
            )
        if not getattr(batch, "shape", ()):
            raise ValueError("every batch must be an array (n, ...), got a single number")
        for start in range(0, len(batch), size):
            rows = examples(batch[start : start + size], example)
            example = (rows.shape[1:], str(rows.dtype))
            held.append(rows)
            count += len(rows)
            if count >= size:
                full = np.concatenate(held)
                yield full[:size]
                held, count = [full[size:]], count - size
    if not held:
        raise ValueError("data hold no examples: pass an array (N, ...) or batches (n, ...) with N >= 1")
    if count:
        yield np.concatenate(held)


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """`size` rows: the last one is repeated, so that every chunk runs the same compiled program."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
