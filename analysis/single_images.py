"""What a report shows of single images: their certified radii, the nearest adversarial examples found, both by class.

The robust accuracy at eps lies between the share of the images whose certified radius is above eps, and the share for
which no adversarial example within eps was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lipbounds.analysis.attack_network import answers
from lipbounds.analysis.attack_search import Attack
from lipbounds.analysis.experiment import GRID, Json, finite
from lipbounds.analysis.fab import fab

STEPS, TARGETS = 30, 3  # of FAB, for one image
_SHOWN = 8


def single_images(
    model: Any,
    x: np.ndarray,
    y: np.ndarray,
    radii: np.ndarray,
    grid: Sequence[float] | None = None,
    *,
    local: np.ndarray | None = None,
    shown: int = _SHOWN,
    norm: float = 2,
) -> Json:
    """Both sides of every image, as plain data; infinity is None.

    Args:
        model: a function of a batch (N, ...) of pixels in [0, 1] to logits (N, K).
        x, y: images and labels.
        radii: (N,) certified radii, 0 where an image is not classified as labelled.
        grid: eps of the curve of the accuracy under attack; None goes to the largest distance found.
        local: (N,) radii by local bounds, of which the classes then have a median, too.
        shown: so many images are kept with their pixels, from the least to the largest radius.
        norm: that of the radii, 2 or inf.

    Returns:
        A record: "attack" (how examples were sought), "radius" and "distance" (one number per image), "attacked" (the
        accuracy at every eps of the grid, an upper bound of the robust accuracy), "classes" (a row per class), "shown".
    """
    found = fab(model, x, y, norm=norm, steps=STEPS, targets=TARGETS, progress=False)
    if grid is None:
        near = found.distance[np.isfinite(found.distance)]
        grid = np.linspace(0.0, 1.02 * float(near.max()) if near.size else 1.0, GRID).tolist()
    accuracy = [float((found.correct & (found.distance > eps)).mean()) for eps in grid]
    medians = {"radius": radii, "distance": found.distance} | ({} if local is None else {"local": local})
    return {
        "attack": f"FAB, {TARGETS} targets of {STEPS} steps",
        "radius": [finite(r) for r in radii],
        "distance": [finite(d) for d in found.distance],
        "correct": found.correct.tolist(),
        "attacked": {"eps": [float(eps) for eps in grid], "accuracy": accuracy},
        "classes": [_class_row(int(label), y, medians, found.correct) for label in np.unique(y)],
        "shown": _shown(model, x, y, radii, found, shown),
    }


def _class_row(label: int, y: np.ndarray, medians: Mapping[str, np.ndarray], correct: np.ndarray) -> Json:
    """Images, how many are classified correctly, and medians over these."""
    right = (y == label) & correct
    row: Json = {"label": label, "images": int((y == label).sum()), "correct": int(right.sum())}
    for name, values in medians.items():
        row[name] = finite(np.quantile(values[right], 0.5, method="lower")) if right.any() else None
    return row


def _shown(
    model: Any, x: np.ndarray, y: np.ndarray, radii: np.ndarray, found: Attack, count: int
) -> list[Json]:
    """Images for which an example was found, spread evenly over the ranks of their radii."""
    candidates = np.flatnonzero(found.success)
    candidates = candidates[np.argsort(radii[candidates], kind="stable")]
    if not len(candidates):
        return []
    chosen = candidates[np.unique(np.linspace(0, len(candidates) - 1, count).round().astype(int))]
    classes = answers(model, found.adversarial[chosen])
    return [
        {
            "index": int(i),
            "label": int(y[i]),
            "radius": finite(radii[i]),
            "distance": finite(found.distance[i]),
            "becomes": int(new),
            "pixels": np.asarray(x[i], np.float64).round(4).tolist(),
            "adversarial": np.asarray(found.adversarial[i], np.float64).round(4).tolist(),
        }
        for i, new in zip(chosen, classes, strict=True)
    ]
