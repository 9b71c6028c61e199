"""Figures of attacks: success against queries, distances against queries and against certified radii, landscapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lipbounds._text import label_text
from lipbounds.analysis.attack_search import Attack
from lipbounds.analysis.figures import INK, MUTED, RADII_LINES, dress, new_figure
from lipbounds.analysis.loss_geometry import Landscape
from lipbounds.analysis.rays import BoundaryDistances


def success_curve(attack: Attack) -> tuple[np.ndarray, np.ndarray]:
    """(queries (M,), share (M,) of the correct examples broken with at most so many), a step at every success.

    Each share is attained, so it bounds the share of examples that are not robust from below. ValueError for an attack
    that counts neither queries nor steps, and where no example is correct.
    """
    spent = attack.steps if attack.queries is None else attack.queries
    if spent is None:
        raise ValueError("this attack counts neither queries nor steps")
    if not attack.correct.any():
        raise ValueError("no example is classified as labelled, so there is nothing to break")
    order = np.sort(spent[attack.success])
    counts = np.unique(order)
    shares = np.searchsorted(order, counts, side="right") / attack.correct.sum()
    return np.concatenate([[0], counts]), np.concatenate([[0.0], shares])


def success_figure(attacks: Mapping[str, Attack]) -> Figure:
    """Share of the correct examples broken against queries (or steps), one line per attack, logarithmic axis."""
    figure = new_figure(7.6, 3.6)
    ax = figure.subplots()
    dress(ax, "both")
    last = 1
    curves = {name: success_curve(attack) for name, attack in attacks.items()}
    for counts, _ in curves.values():
        last = max(last, int(counts[-1]))
    for colour, (name, (counts, shares)) in zip(_colours(), curves.items(), strict=False):
        ax.step(
            np.maximum([*counts, last], 0.8),
            [*shares, shares[-1]],
            where="post",
            color=colour,
            linewidth=1.9,
            label=label_text(name, 40),
        )
    ax.set_xscale("log")
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    what = "queries" if all(a.queries is not None for a in attacks.values()) else "queries or steps"
    ax.set_xlabel(what, fontsize=9.5, color=INK)
    ax.set_ylabel("correct examples broken", fontsize=9.5, color=INK)
    ax.legend(fontsize=8.5, frameon=False)
    return figure


def distance_figure(found: Mapping[str, BoundaryDistances]) -> Figure:
    """Average decision boundary distance against queries, one line per network: upper bounds that fall."""
    figure = new_figure(7.6, 3.6)
    ax = figure.subplots()
    dress(ax, "both")
    for colour, (name, distances) in zip(_colours(), found.items(), strict=False):
        grid, mean = distances.curve()
        known = np.isfinite(mean)
        ax.plot(grid[known], mean[known], color=colour, linewidth=1.9, label=label_text(name, 40))
    ax.set_xscale("log")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("queries of every image", fontsize=9.5, color=INK)
    ax.set_ylabel("average distance found, ℓ∞ (≥ the true one)", fontsize=9.5, color=INK)
    ax.legend(fontsize=8.5, frameon=False)
    return figure


def bracket_figure(found: BoundaryDistances, radii: Any) -> Figure:
    """Distance found (above) and certified l-inf radius (below) of every image, sorted: the truth lies in the band.

    `radii` (N,) are those of `certified_radius` in norm inf. ValueError for another number of them, and where a radius
    exceeds the distance found, which cannot be.
    """
    below = np.asarray(radii, float)
    if below.shape != found.distance.shape:
        raise ValueError(f"radii must hold {len(found)} numbers, got shape {below.shape}")
    over = found.correct & (below > found.distance)
    if over.any():
        place = int(np.argmax(over))
        raise ValueError(
            f"the radius of image {place}, {below[place]:.6g}, exceeds the distance {found.distance[place]:.6g} at "
            "which it was broken: the radii are not of this network, norm or unit"
        )
    below = np.where(found.correct, below, 0.0)
    order = np.argsort(found.distance, kind="stable")
    places = np.arange(len(order))
    top = np.where(np.isfinite(found.distance), found.distance, np.nan)[order]
    figure = new_figure(7.6, 3.6)
    ax = figure.subplots()
    dress(ax, "y")
    ax.fill_between(places, below[order], top, color="#4477aa", alpha=0.2, linewidth=0, label="true distance")
    ax.plot(places, top, color="#ee6677", linewidth=1.5, label="found by ADBD")
    ax.plot(places, below[order], ".", color="#228833", markersize=3, label="certified")
    ax.set_xlabel("images, by the distance found", fontsize=9.5, color=INK)
    ax.set_ylabel("ℓ∞ distance", fontsize=9.5, color=INK)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8.5, frameon=False)
    return figure


def landscape_figure(found: Mapping[str, Landscape]) -> Figure:
    """Mean loss along one direction of the weights, one line per network; a plane of one network in levels."""
    figure = new_figure(7.6, 4.2)
    ax = figure.subplots()
    planes = [one for one in found.values() if one.loss.ndim == 2]
    if planes:
        if len(found) > 1:
            raise ValueError("a plane is drawn by itself: pass one landscape")
        dress(ax, "both")
        drawn = ax.contourf(planes[0].steps, planes[0].steps, planes[0].loss.T, levels=20, cmap="viridis")
        figure.colorbar(drawn, label="mean loss")
        ax.set_aspect("equal")
        return figure
    dress(ax, "both")
    for colour, (name, one) in zip(_colours(), found.items(), strict=False):
        ax.plot(one.steps, one.loss, color=colour, linewidth=1.9, label=label_text(name, 40))
    ax.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
    ax.set_xlabel("step γ along the direction", fontsize=9.5, color=INK)
    ax.set_ylabel("mean loss (a comparison)", fontsize=9.5, color=INK)
    ax.legend(fontsize=8.5, frameon=False)
    return figure


def _colours() -> list[str]:
    return list(RADII_LINES) * 4
