"""Figures of single images: both sides of the robust accuracy, radii, constants of pairs, adversarial examples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lipbounds._text import entry
from lipbounds.analysis.experiment import Json
from lipbounds.analysis.figures import (
    ATTACKED_COLOUR,
    INK,
    LOCAL,
    MUTED,
    NORM_NAMES,
    dress,
    method_colour,
    new_figure,
)

_CERTIFIED = method_colour("lipsdp")  # of radii, whichever bound they are by


def both_sides_figure(
    certified: Json, images: Json, label: str, norm: str = "2", local: Json | None = None
) -> Figure:
    """Certified accuracy below, accuracy under attack above, and between them the band that holds the robust accuracy.

    Between two points of the grid the smaller certified and the larger attacked accuracy are drawn. The band ends at
    the accuracy that is certified by local bounds (`local`) where it is given.
    """
    figure = new_figure(7.6, 3.8)
    ax = figure.subplots()
    dress(ax, "both")
    over, upper = np.asarray(images["attacked"]["eps"]), np.asarray(images["attacked"]["accuracy"])
    records = [certified] if local is None else [certified, local]
    edges = np.unique(np.concatenate([over, *(record["eps"] for record in records)]))
    lows = [_certified_between(record, edges) for record in records]
    # no local radius is below the other one
    lows = [
        lows[0],
        *(np.maximum(lows[0], low) for low in lows[1:]),
    ]
    high = upper[np.maximum(np.searchsorted(over, edges, side="right") - 1, 0)]
    ax.fill_between(edges, lows[-1], high, step="post", color=MUTED, alpha=0.18, linewidth=0)
    ax.step(edges, high, where="post", color=ATTACKED_COLOUR, linewidth=1.9)
    kinds = list(
        zip(
            lows,
            (method_colour(label), method_colour(LOCAL)),
            (f"certified by {label}", "certified by local bounds"),
            strict=False,
        )
    )
    # the wider line below, so that equal curves are both seen
    for place, (low, colour, _) in enumerate(kinds):
        ax.step(edges, low, where="post", color=colour, linewidth=1.9 + place, zorder=2.5 - 0.1 * place)
    at = int(np.argmin(np.abs(high - 0.5 * high[0])))
    ax.annotate(
        "no adversarial example found",
        (edges[at], high[at]),
        xytext=(8, 6),
        textcoords="offset points",
        color=ATTACKED_COLOUR,
        fontsize=9,
    )
    for place, (low, colour, text) in enumerate(kinds):  # left of all curves, with a line to its own
        share = (0.5 - 0.2 * place) * low[0]
        at, first = (int(np.argmin(np.abs(values - share))) for values in (low, lows[0]))
        ax.annotate(
            text,
            (edges[at], low[at]),
            xytext=(edges[first] - 0.015 * edges[-1], share - 0.05),
            ha="right",
            va="center",
            color=colour,
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0},
        )
    ax.set_xlim(0, edges[-1])
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel(f"ε, {NORM_NAMES[norm]} norm, pixel values in [0, 1]", fontsize=9.5, color=INK)
    ax.set_ylabel("test images", fontsize=9.5, color=INK)
    return figure


def _certified_between(record: Json, edges: np.ndarray) -> np.ndarray:
    """The certified accuracy from every edge to the next one: that of the next point of its grid."""
    eps, accuracy = np.asarray(record["eps"]), np.asarray(record["accuracy"])
    low = np.append(accuracy[np.minimum(np.searchsorted(eps, edges[1:]), len(eps) - 1)], accuracy[-1])
    low[edges >= eps[-1]] = accuracy[-1]
    return low


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
        (_CERTIFIED, ATTACKED_COLOUR),
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
        radius = "∞" if one["radius"] is None else entry(one["radius"], "down", 3)
        above = f"{one['label']}\nr ≥ {radius}"
        below = f"{one['becomes']}\nat {entry(one['distance'], 'up', 3)}"
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
            ax.set_title(text, fontsize=9, color=(_CERTIFIED, ATTACKED_COLOUR)[row])
            ax.set_axis_off()
    return figure
