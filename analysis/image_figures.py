"""Figures of single images: both sides of the robust accuracy, radii, constants of pairs, adversarial examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lipbounds._text import show
from lipbounds.analysis.experiment import Json
from lipbounds.analysis.figures import INK, MUTED, NORM_NAMES, dress, new_figure

_CERTIFIED, _ATTACKED = "#228833", "#ee6677"


def both_sides_figure(certified: Json, images: Json, label: str, norm: str = "2") -> Figure:
    """Certified accuracy below, accuracy under attack above, and between them the band that holds the robust accuracy.

    Between two points of the grid the smaller certified and the larger attacked accuracy are drawn.
    """
    figure = new_figure(7.6, 3.8)
    ax = figure.subplots()
    dress(ax, "both")
    eps, lower = np.asarray(certified["eps"]), np.asarray(certified["accuracy"])
    over, upper = np.asarray(images["attacked"]["eps"]), np.asarray(images["attacked"]["accuracy"])
    edges = np.unique(np.concatenate([eps, over]))
    low = np.append(lower[np.minimum(np.searchsorted(eps, edges[1:]), len(eps) - 1)], lower[-1])
    low[edges >= eps[-1]] = lower[-1]
    high = upper[np.maximum(np.searchsorted(over, edges, side="right") - 1, 0)]
    ax.fill_between(edges, low, high, step="post", color=MUTED, alpha=0.18, linewidth=0)
    ax.step(edges, high, where="post", color=_ATTACKED, linewidth=1.9)
    ax.step(edges, low, where="post", color=_CERTIFIED, linewidth=1.9)
    for values, text, colour, side in (
        (high, "no adversarial example found", _ATTACKED, "left"),
        (low, f"certified by {label}", _CERTIFIED, "right"),
    ):
        at = int(np.argmin(np.abs(values - 0.5 * values[0])))
        ax.annotate(
            text,
            (edges[at], values[at]),
            xytext=(8, 6) if side == "left" else (-8, -10),
            textcoords="offset points",
            ha=side,
            color=colour,
            fontsize=9,
        )
    ax.set_xlim(0, edges[-1])
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel(f"ε, {NORM_NAMES[norm]} norm, pixel values in [0, 1]", fontsize=9.5, color=INK)
    ax.set_ylabel("test images", fontsize=9.5, color=INK)
    return figure


def radius_histogram(images: Json, norm: str = "2") -> Figure:
    """How many correctly classified images have which certified radius, and which distance to the example found."""
    figure = new_figure(7.6, 3.2)
    ax = figure.subplots()
    dress(ax, "y")
    right = np.asarray(images["correct"], bool)
    sides = [
        np.asarray([np.inf if v is None else v for v in images[k]])[right] for k in ("radius", "distance")
    ]
    finite = [side[np.isfinite(side)] for side in sides]
    top = max((float(side.max()) for side in finite if side.size), default=1.0) or 1.0
    bins = np.linspace(0, top, 41)
    for values, colour, text in zip(
        finite,
        (_CERTIFIED, _ATTACKED),
        ("certified radius", "distance of the nearest example found"),
        strict=True,
    ):
        ax.hist(values, bins=bins.tolist(), color=colour, alpha=0.55, label=text)
    ax.set_xlim(0, top)
    ax.set_xlabel(f"{NORM_NAMES[norm]} norm, pixel values in [0, 1]", fontsize=9.5, color=INK)
    ax.set_ylabel("images classified correctly", fontsize=9.5, color=INK)
    ax.legend(frameon=False, fontsize=8.5)
    return figure


def pairs_figure(pairs: Any) -> Figure:
    """Constants L_ij of the differences of two logits as a heat map, upper bounds rounded up."""
    values = np.asarray(pairs, np.float64)
    count = len(values)
    figure = new_figure(5.2, 4.6)
    ax = figure.subplots()
    shown = np.where(np.eye(count, dtype=bool), np.nan, values)
    image = ax.imshow(shown, cmap="viridis")
    if count <= 12:
        places = max(0, 2 - math.floor(math.log10(max(float(np.nanmax(shown)), 1e-9)))) if count > 1 else 0
        middle = 0.5 * (np.nanmin(shown) + np.nanmax(shown))
        for i in range(count):
            for j in range(count):
                if i != j:
                    colour = "white" if values[i, j] < middle else "black"
                    text = f"{math.ceil(values[i, j] * 10**places) / 10**places:.{places}f}"
                    ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
    ax.set_xticks(range(count)) if count <= 20 else None
    ax.set_yticks(range(count)) if count <= 20 else None
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.5, length=0)
    ax.set_xlabel("class j", fontsize=9.5, color=INK)
    ax.set_ylabel("class i", fontsize=9.5, color=INK)
    for side in ax.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, shrink=0.8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("L_ij, an upper bound", fontsize=9, color=INK)
    return figure


def examples_figure(shown: list[Json]) -> Figure:
    """Images with their certified radius, and below each the nearest adversarial example that was found."""
    figure = new_figure(max(1.25 * len(shown), 2.5), 3.4)
    axes = figure.subplots(2, len(shown), squeeze=False)
    for place, one in enumerate(shown):
        above = f"{one['label']}\nr ≥ {show(one['radius'], 'down', 3) if one['radius'] is not None else '∞'}"
        below = f"{one['becomes']}\nat {show(one['distance'], 'up', 3)}"
        for row, (pixels, text) in enumerate(((one["pixels"], above), (one["adversarial"], below))):
            ax = axes[row, place]
            picture = np.asarray(pixels, np.float64)
            grey = picture.ndim == 2 or picture.shape[-1] == 1
            ax.imshow(
                picture.reshape(picture.shape[:2]) if grey else picture,
                cmap="gray_r" if grey else None,
                vmin=0,
                vmax=1,
            )
            ax.set_title(text, fontsize=9, color=(_CERTIFIED, _ATTACKED)[row])
            ax.set_axis_off()
    return figure
