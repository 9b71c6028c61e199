"""Checks of user input other than networks."""

from __future__ import annotations

from typing import Any

import numpy as np

Box = tuple[np.ndarray, np.ndarray]


def box_ends(box: Any) -> Box:
    """(lower, upper) in float64, in their own shapes; ValueError unless the box is two, with lower <= upper."""
    try:
        low, high = (np.asarray(end, np.float64) for end in box)
        ordered = bool((low <= high).all())
    except (TypeError, ValueError):
        raise ValueError(f"box must be (lower, upper), two numbers or arrays, got {box!r}") from None
    if not ordered:
        raise ValueError("box must be (lower, upper) with lower <= upper, not NaN")
    return low, high


def check_box(box: Any, x: np.ndarray) -> Box | None:
    """Return the box (lower, upper) in float64 after checking that it contains every row of x."""
    if box is None:
        return None
    ends = box_ends(box)
    try:
        low, high = (np.broadcast_to(end, x.shape[1:]) for end in ends)
    except ValueError:
        raise ValueError(f"box must be (lower, upper), numbers or arrays of shape {x.shape[1:]}") from None
    outside = ((x < low) | (x > high)).any(axis=tuple(range(1, x.ndim)))
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} of {len(x)} examples lie outside the box (the first is {int(outside.argmax())})"
        )
    return low, high
