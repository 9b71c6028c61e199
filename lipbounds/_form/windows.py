"""Windows of pooling and lines along axes, as tables of indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def windows(shape: tuple[int, ...], p: dict[str, Any]) -> np.ndarray:
    """(number of windows, window size) table of flat input indices of a pooling window; -1 where it reads padding."""
    index = iota(shape)
    for axis, dilation in enumerate(p["base_dilation"]):
        if dilation != 1 and index.shape[axis]:
            wide = list(index.shape)
            wide[axis] = (wide[axis] - 1) * dilation + 1
            spread = np.full(wide, -1, np.int32)
            np.moveaxis(spread, axis, 0)[::dilation] = np.moveaxis(index, axis, 0)
            index = spread
    index = np.pad(index, [(max(a, 0), max(b, 0)) for a, b in p["padding"]], constant_values=-1)
    index = index[
        tuple(slice(max(-a, 0), n - max(-b, 0)) for (a, b), n in zip(p["padding"], index.shape, strict=True))
    ]
    reach = tuple((w - 1) * d + 1 for w, d in zip(p["window_dimensions"], p["window_dilation"], strict=True))
    view = np.lib.stride_tricks.sliding_window_view(index, reach)
    rank = len(shape)
    view = view[tuple(slice(None, None, s) for s in p["window_strides"])]
    view = view[(slice(None),) * rank + tuple(slice(None, None, d) for d in p["window_dilation"])]
    return view.reshape(int(np.prod(view.shape[:rank])), -1)


def iota(shape: Sequence[int]) -> np.ndarray:
    """The flat index of every entry of a tensor of this shape."""
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def pairs(first: tuple[int, ...], second: tuple[int, ...]) -> np.ndarray:
    """(outputs, 2) table of the entries that a binary operation reads, of its operands laid end to end."""
    columns = np.broadcast_arrays(iota(first), iota(second) + np.int32(math.prod(first)))
    return np.stack([c.ravel() for c in columns], axis=1)


def along(shape: tuple[int, ...], axes: Sequence[int]) -> np.ndarray:
    """(outputs, size) table of the flat indices reduced over `axes` for each output."""
    index = iota(shape)
    kept = [a for a in range(len(shape)) if a not in axes]
    return index.transpose([*kept, *axes]).reshape(int(np.prod([shape[a] for a in kept])), -1)
