"""Figures of discs, eigenvalues and forged layers, drawn from the records of `spectra` and `diagnostics`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lipbounds._text import label_text, show
from lipbounds.analysis.diagnostics import Diagnosis
from lipbounds.analysis.figures import INK, MUTED, dress, new_figure
from lipbounds.analysis.spectra import Discs, Interlacing

BEFORE, AFTER = "#4477aa", "#ee6677"


def discs_figure(before: Discs, after: Discs, title: str = "") -> Figure:
    """Gershgorin's discs of A and of A', one panel each on one scale; dotted: the disc bounds.

    The upper half planes say everything where the centres are real; complex matrices are drawn whole.
    """
    real = not (np.iscomplexobj(before.centers) or np.iscomplexobj(after.centers))
    figure = new_figure(7.6, 5.2)
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    for ax, discs, name, colour in ((axes[0], before, "A", BEFORE), (axes[1], after, "A'", AFTER)):
        discs.plot(ax, color=colour)
        ax.set(xlabel="", ylabel="")
        dress(ax, "x")
        ax.axvline(discs.bound, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        words = f"{name} by {discs.by}: |eigenvalues| ≤ {show(discs.bound, 'up', 4)}"
        ax.set_title(words, fontsize=10, loc="left", color=INK)
    if real:
        axes[0].set_ylim(bottom=0)
    axes[1].set_xlabel("real part", fontsize=9.5, color=INK)
    if title:
        figure.suptitle(label_text(title), fontsize=10.5, color=INK)
    return figure


def eigenvalues_figure(found: Interlacing, title: str = "") -> Figure:
    """Histograms of the eigenvalues of A and of the nonzero part of A' on common bins; dotted: the largest of each."""
    figure = new_figure(7.6, 3.6)
    ax = figure.subplots()
    dress(ax, "y")
    bins = np.linspace(0.0, float(found.eigenvalues[-1]) or 1.0, 41)
    for values, name, colour in ((found.eigenvalues, "A", BEFORE), (found.kept, "A', entries kept", AFTER)):
        top = float(values.max(initial=0.0))
        words = f"{name}: {len(values)}, largest {show(top, digits=4)}"
        ax.hist(values, bins=bins.tolist(), histtype="step", color=colour, linewidth=1.7, label=words)
        ax.axvline(top, color=colour, linewidth=1, linestyle=(0, (1, 2)))
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xlabel("eigenvalue", fontsize=9.5, color=INK)
    ax.set_ylabel("how many", fontsize=9.5, color=INK)
    figure.legend(loc="outside upper right", ncols=2, fontsize=8.5, frameon=False)
    if title:
        ax.set_title(label_text(title), fontsize=10, loc="left", color=INK)
    return figure


def ratios_figure(diagnosis: Diagnosis) -> Figure:
    """lambda_max(A'(x)) / lambda_max(A) over the sample, one box per layer.

    A bar marks the worst input; a ring marks the worst one for the mask x != 0, the effect of zeros that were there
    before.
    """
    figure = new_figure(7.6, 1.1 + 0.34 * len(diagnosis.layers))
    ax = figure.subplots()
    dress(ax, "x")
    places = range(len(diagnosis.layers))
    look: dict[str, Any] = {"color": AFTER}
    ax.boxplot(
        [layer.ratios for layer in diagnosis.layers],
        positions=list(places),
        orientation="horizontal",
        showfliers=False,
        manage_ticks=False,
        widths=0.5,
        boxprops=look,
        whiskerprops=look,
        capprops=look,
        medianprops={"color": INK},
    )
    worst = [float(layer.ratios.max()) for layer in diagnosis.layers]
    support = [float(layer.support_ratios.max()) for layer in diagnosis.layers]
    ax.plot(worst, places, "|", color=AFTER, markersize=13, markeredgewidth=2, label="worst input")
    ax.plot(
        support, places, "o", color=BEFORE, markersize=5, fillstyle="none", label="worst input, mask x ≠ 0"
    )
    ax.set_yticks(list(places), [label_text(layer.path, 40) for layer in diagnosis.layers])
    ax.set_ylim(len(diagnosis.layers) - 0.4, -0.6)
    ax.set_xlim(right=1.02)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel(f"λ_max(A'(x)) / λ_max(A), {diagnosis.sample} inputs", fontsize=9.5, color=INK)
    figure.legend(loc="outside upper right", ncols=2, fontsize=8.5, frameon=False)
    return figure


def zeroed_figure(diagnosis: Diagnosis) -> Figure:
    """Mean share of entries that the gates zero, by depth (Figure 4 of arXiv 2406.19622), and what was zero before."""
    figure = new_figure(7.6, 3.6)
    ax = figure.subplots()
    dress(ax, "y")
    places = range(len(diagnosis.layers))
    for name, colour, label in (
        ("zeroed", AFTER, "zeroed by the gate"),
        ("zero", BEFORE, "zero before the gate"),
    ):
        shares = [getattr(layer, name) for layer in diagnosis.layers]
        ax.bar(places, shares, color=colour, label=label, width=0.7)
    ax.set_xticks(
        list(places), [label_text(layer.path, 40) for layer in diagnosis.layers], rotation=30, ha="right"
    )
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylabel(f"share of entries, {diagnosis.examples} examples", fontsize=9.5, color=INK)
    figure.legend(loc="outside upper right", ncols=2, fontsize=8.5, frameon=False)
    return figure
