"""Checks of arguments that several verbs take: counts and labels."""

from __future__ import annotations

from typing import Any

import numpy as np


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return the value if it is a whole number >= `least`, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return value


def as_labels(y: Any, count: int, classes: int | None = None) -> np.ndarray:
    """Labels (count,) as int64.

    They lie in 0..classes-1; of a network with one output, whose sign decides, they are 0 or 1. Without `classes` their
    range is not checked.

    Raises:
        ValueError: another shape, labels that are not integers or are out of range.
    """
    labels = np.asarray(y)
    if labels.shape != (count,) or (count and labels.dtype.kind not in "iu"):
        raise ValueError(
            f"y must hold {count} integer labels, got shape {labels.shape}, dtype {labels.dtype}"
        )
    if classes is not None and count:
        last = max(classes, 2) - 1
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > last:
            raise ValueError(f"labels must lie in 0..{last}, got {low}..{high}")
    return labels.astype(np.int64)
