"""Helpers of frozen records: checked numbers, read-only arrays, and the heat map of pairs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def put(record: Any, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass while it is made."""
    object.__setattr__(record, name, value)


def nonnegative(value: Any, what: str) -> float:
    """The value as a finite number >= 0; ValueError names `what` otherwise."""
    number = float(value)
    if not math.isfinite(number) or number < 0.0:
        raise ValueError(f"{what} must be a finite number >= 0, got {number}")
    return number + 0.0  # -0.0 becomes 0.0


def frozen_array(array: Any) -> np.ndarray:
    """A float64 copy that cannot be written to."""
    copy = np.array(array, dtype=np.float64)
    copy.setflags(write=False)
    return copy


def worst_pair(pairs: np.ndarray | None) -> tuple[int, int] | None:
    """(i, j), i < j, of the largest constant of a pair."""
    if pairs is None or len(pairs) < 2:
        return None
    i, j = np.triu_indices(len(pairs), 1)
    worst = int(np.argmax(pairs[i, j]))
    return int(i[worst]), int(j[worst])


def draw_pairs(ax: Any, pairs: np.ndarray, kind: str) -> None:
    """The (K, K) constants as a heat map with its scale."""
    image = ax.imshow(pairs, cmap="viridis", interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label=f"{kind} of L_ij")
    ax.set(xlabel="class j", ylabel="class i")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)


def pair_array(array: Any) -> np.ndarray:
    """A symmetric (K, K) array of finite numbers >= 0 with a zero diagonal; ValueError otherwise."""
    pairs = frozen_array(array)
    if pairs.ndim != 2 or pairs.shape[0] != pairs.shape[1]:
        raise ValueError(f"pairwise must have shape (K, K), got {pairs.shape}")
    if not np.isfinite(pairs).all() or (pairs < 0).any():
        raise ValueError("pairwise must hold finite numbers >= 0")
    if not np.array_equal(pairs, pairs.T) or np.diagonal(pairs).any():
        raise ValueError("pairwise must be symmetric with a zero diagonal")
    return pairs


def class_array(array: Any, pairs: np.ndarray | None) -> np.ndarray:
    """(K,) finite numbers >= 0, as many as `pairs` has rows; ValueError otherwise."""
    classes = frozen_array(array)
    if classes.ndim != 1 or (pairs is not None and len(pairs) != len(classes)):
        raise ValueError(
            f"per_class must have shape (K,), one number per class of pairwise, got {classes.shape}"
        )
    if not np.isfinite(classes).all() or (classes < 0).any():
        raise ValueError("per_class must hold finite numbers >= 0")
    return classes
