"""Checks of arguments that several verbs take: counts, seeds and labels."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np


def near(word: Any, known: Iterable[str]) -> str:
    """A question whether the closest of the known words was meant; empty where none is close."""
    found = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return the value if it is a whole number >= `least`, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        whole_ = isinstance(value, np.integer) or (isinstance(value, float) and value.is_integer())
        cast = f"; cast it: {name}={int(value)}" if whole_ and value >= least else ""
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}{cast}")
    return value


def check_seed(seed: Any) -> int:
    """The seed as an int; ValueError unless it is a whole number >= 0 and below 2^63, as certificates keep it."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number >= 0 and below 2^63, got {seed!r}")
    return int(seed)


def as_labels(y: Any, count: int, classes: int | None = None) -> np.ndarray:
    """Labels (count,) as int64.

    They lie in 0..classes-1; of a network with one output, whose sign decides, they are 0 or 1. Without `classes` their
    range is not checked.

    Raises:
        ValueError: another shape, labels that are not integers or are out of range.
    """
    labels = np.asarray(y)
    if labels.shape != (count,) or (count and labels.dtype.kind not in "iu"):
        rows = labels.ndim == 2 and len(labels) == count
        column = rows and labels.shape[1] == 1
        one_hot = (
            "; take y.reshape(-1)" if column else "; of one-hot rows take y.argmax(axis=1)" if rows else ""
        )
        floats = "; cast them: y.astype(int)" if labels.shape == (count,) and labels.dtype.kind == "f" else ""
        raise ValueError(
            f"y must hold {count} integer labels, got shape {labels.shape}, dtype {labels.dtype}{one_hot}{floats}"
        )
    if classes is not None and count:
        last = max(classes, 2) - 1
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > last:
            counted = (
                "; subtract 1 where the classes are counted from 1" if (low, high) == (1, last + 1) else ""
            )
            raise ValueError(f"labels must lie in 0..{last}, got {low}..{high}{counted}")
    return labels.astype(np.int64)
