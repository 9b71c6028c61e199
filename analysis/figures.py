"""The report's figures, drawn from its records with matplotlib's object interface (no global state)."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from lipbounds._text import Direction, entry, label_text
from lipbounds.analysis.experiment import FROM_L2, LABELS
from lipbounds.results import GUARANTEE_COLOURS

Json = dict[str, Any]

INK, MUTED, RULE = "#1d2530", "#66707d", "#d9dee5"
NO_PAIRS, LOCAL = ", no pairs", "local"
_DASHES = ((0, (5, 1.5)), "-", (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))  # of networks that are compared
# From Paul Tol's colours, which stay apart for colour-blind readers. A method has the same one in every figure.
METHOD_COLOURS = {
    "naive": "#bbbbbb",
    "liplt": "#4477aa",
    "liplt-aol": "#66ccee",
    "liplt-sll": "#ccbb44",
    "liplt-optimized": "#ee7733",
    "lipsdp": "#228833",
    "lipsdp-layer": "#44aa99",
    "lipsdp-clarabel": "#332288",
    "lipsdp-scs": "#882255",
    LOCAL: "#aa3377",
}
ATTACKED_COLOUR = "#ee6677"  # of what attacks found, and of no method
_OTHERS = ("#999933", "#ddcc77", "#994455", "#997700")  # of methods that a user added
# Lines that are no methods: networks, attacks, epochs.
RADII_LINES = ("#4477aa", "#ccbb44", "#ee6677", "#228833", "#aa3377", "#66ccee")
NORM_NAMES = {"1": "ℓ₁", "2": "ℓ₂", "inf": "ℓ∞"}


def method_colour(method: str) -> str:
    """The colour of a method, by its name or by its label in `LABELS`."""
    method = method.removesuffix(FROM_L2)
    name = next((name for name, label in LABELS.items() if label == method), method)
    return METHOD_COLOURS.get(name) or _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def png(figure: Figure) -> bytes:
    """The figure as PNG, 160 dots per inch, without a date, so that equal figures are equal files."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as SVG, without a date and with fixed names inside, so that equal figures are equal files."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lipbounds"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, outside pyplot."""
    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def dress(ax: Axes, grid: str) -> None:
    """Apply the common style: two spines, muted ticks, and a grid along `grid` ("x", "y" or "both")."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(RULE)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, length=3)
    ax.tick_params(which="minor", length=0)
    ax.grid(axis=grid, color=RULE, linewidth=0.7)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def certified_figure(model: Json, norms: Sequence[str]) -> Figure:
    """Certified accuracy against eps, one panel per norm, one line per bound; clean accuracy as a rule.

    Between two points of the grid the smaller accuracy is drawn.
    """
    figure = new_figure(7.6 if len(norms) == 1 else 4.9 * len(norms), 4.4 if len(norms) == 1 else 3.9)
    axes = figure.subplots(1, len(norms), squeeze=False)[0]
    for ax, norm in zip(axes, norms, strict=True):
        dress(ax, "both")
        curves = certified_curves(model, norm)
        for label, record in curves:
            ax.step(
                record["eps"],
                record["accuracy"],
                where="pre",
                label=label_text(label, 40),
                color=method_colour(label.removesuffix(NO_PAIRS)),
                linestyle=(0, (2, 1.2)) if label.endswith(NO_PAIRS) else "-",
                linewidth=1.9,
            )
        clean = model["training"]["test_accuracy"]
        ax.axhline(clean, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        top = max((record["eps"][-1] for _, record in curves), default=1.0)
        ax.annotate(
            f"clean accuracy {100 * clean:.1f} %",
            (top, clean),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
            fontsize=8.5,
            color=MUTED,
        )
        ax.set_xlim(0, top)
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlabel(f"ε, {NORM_NAMES[norm]} norm, pixel values in [0, 1]", fontsize=9.5, color=INK)
        if curves:
            ax.legend(
                fontsize=8.5, frameon=False, loc="upper right", bbox_to_anchor=(1.0, clean / 1.02 - 0.03)
            )
    axes[0].set_ylabel("test images certified", fontsize=9.5, color=INK)
    return figure


def radii_figure(panels: Sequence[tuple[str, Json]], marks: Sequence[float]) -> Figure:
    """Distribution of certified radii, one panel per network (title, record of `evaluation`), one line per bound.

    A line is the share of the images that are classified correctly with a radius above eps (Figure 1 of arXiv
    2310.00116); between two points of the grid the smaller share is drawn. `marks` are eps to point out. The shaded
    band ends at the accuracy under attack, of which the larger share is drawn between two points.
    """
    figure = new_figure(7.6, 0.8 + 3.4 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    top = max((curve["eps"][-1] for _, record in panels for curve in record["radii"].values()), default=1.0)
    top = max(top, *(1.08 * mark for mark in marks))
    for ax, (title, record) in zip(axes, panels, strict=True):
        dress(ax, "both")
        for name, curve in record["radii"].items():
            # the grid ends beyond the largest finite radius, so nothing changes after it
            ax.step(
                [*curve["eps"], top],
                [*curve["accuracy"], curve["accuracy"][-1]],
                where="pre",
                label=f"{label_text(LABELS.get(name, name), 40)} ({record['guarantee'][name]})",
                color=method_colour(name),
                linewidth=1.9,
            )
        if "curve" in record.get("attacked", {}):
            edges, lower, upper = robust_band(record, top)
            ax.fill_between(
                edges,
                lower,
                upper,
                step="post",
                color=MUTED,
                alpha=0.18,
                linewidth=0,
                label="robust accuracy lies here",
            )
        ax.axhline(record["clean"], color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
        for mark in marks:
            ax.axvline(mark, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
        ax.set_title(
            f"{label_text(title)}: clean accuracy {100 * record['clean']:.1f} %",
            fontsize=10,
            loc="left",
            color=INK,
        )
        ax.set_xlim(0, top)
        ax.set_ylim(0, 1.02)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_ylabel("images with a larger radius", fontsize=9.5, color=INK)
        if record["radii"]:
            ax.legend(
                fontsize=8.5, frameon=False, loc="upper right", bbox_to_anchor=(1.0, record["clean"] / 1.02)
            )
    axes[-1].set_xlabel("ε, ℓ₂ norm, pixel values in [0, 1]", fontsize=9.5, color=INK)
    return figure


def robust_band(record: Json, top: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(edges, lower, upper): between an edge and the next, the robust accuracy lies from `lower` to `upper`.

    `lower` is the best certified accuracy at the next edge, `upper` the accuracy under attack at this one.
    """
    curves = [record["attacked"]["curve"], *record["radii"].values()]
    edges = np.unique([0.0, top, *(e for curve in curves for e in curve["eps"] if e <= top)])
    following = np.append(edges[1:], top)
    lower = np.zeros(len(edges))
    for curve in record["radii"].values():
        at = np.minimum(np.searchsorted(curve["eps"], following), len(curve["eps"]) - 1)
        lower = np.maximum(lower, np.asarray(curve["accuracy"])[at])
    attacked = record["attacked"]["curve"]
    at = np.maximum(np.searchsorted(attacked["eps"], edges, side="right") - 1, 0)
    return edges, lower, np.asarray(attacked["accuracy"])[at]


def contrast_figure(rivals: Sequence[Json]) -> Figure:
    """Certified accuracy against eps in l2 of networks that differ in how they were trained; dotted: clean accuracy.

    The colour is that of the bound, the dashes are those of the network.
    """
    figure = new_figure(7.6, 3.6)
    ax = figure.subplots()
    dress(ax, "both")
    for dashes, rival in zip(_DASHES, rivals, strict=False):
        model, bound = rival["model"], rival["bound"]
        colour = method_colour(bound["label"])
        ax.step(
            bound["certified"]["eps"],
            bound["certified"]["accuracy"],
            where="pre",
            color=colour,
            linestyle=dashes,
            linewidth=1.9,
            label=f"{label_text(model['title'], 40)}, {label_text(bound['label'], 40)}",
        )
        ax.axhline(model["training"]["test_accuracy"], color=colour, linewidth=1, linestyle=(0, (1, 2)))
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_xlabel("ε, pixel values in [0, 1], ℓ₂", color=INK)
    ax.legend(frameon=False, fontsize=9)
    return figure


def certified_curves(model: Json, norm: str) -> list[tuple[str, Json]]:
    """(label, certified record) of every upper bound in `norm`; bounds without pairs come last."""
    rows = [row for row in model["upper"] if row["norm"] == norm]
    curves = [(row["label"], row["certified"]) for row in rows if "certified" in row]
    extra = [
        (row["label"] + NO_PAIRS, row["without_pairs"]["certified"]) for row in rows if "without_pairs" in row
    ]
    return curves + extra


def bounds_figure(model: Json) -> Figure:
    """Bounds side by side, one panel per norm, logarithmic bars coloured by guarantee.

    What is attained is a vertical rule: the constant lies between it and the end of every filled bar.
    """
    norms = [norm for norm in ("2", "inf", "1") if any(row["norm"] == norm for row in model["upper"])]
    counts = [max(1, len(_bars(model, norm))) for norm in norms]
    figure = new_figure(7.6, 0.9 + sum(0.62 + 0.34 * n for n in counts))
    axes = figure.subplots(
        max(len(norms), 1), 1, squeeze=False, height_ratios=[n + 0.6 for n in counts] or None
    )
    used: dict[str, str] = {}
    for ax, norm in zip(axes[:, 0], norms, strict=False):
        dress(ax, "x")
        bars = _bars(model, norm)
        attained = max((r["value"] for r in model["lower"] if r["norm"] == norm), default=0.0)
        values = [v for v in (attained, *(row["value"] for _, row in bars)) if v > 0] or [1.0]
        low = min(values) / 1.6
        high = max(values) * (max(values) / low) ** 0.25  # room for the numbers
        for place, (kind, row) in enumerate(bars):
            word = row["guarantee"]
            colour = GUARANTEE_COLOURS[word]
            used[word] = colour
            estimate = kind == "estimate"
            look: dict[str, Any] = (
                {"facecolor": "white", "hatch": "////"} if estimate else {"facecolor": colour}
            )
            ax.barh(
                place,
                max(row["value"] - low, 0.0),
                left=low,
                height=0.62,
                edgecolor=colour,
                linewidth=0.8,
                **look,
            )
            way: Direction = "near" if estimate else "up"
            text = ("≈ " if estimate else "≤ ") + entry(row["value"], way, 4)
            ax.text(max(row["value"], low), place, f" {text}", va="center", fontsize=8.5, color=INK)
        if attained > 0:
            used["attained"] = GUARANTEE_COLOURS["attained"]
            ax.axvline(attained, color=used["attained"], linewidth=1.6)
            ax.text(
                attained,
                -0.72,
                f"≥ {entry(attained, 'down', 4)}",
                color=used["attained"],
                fontsize=8.5,
                ha="center",
                va="bottom",
            )
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 100 else (1.0,)))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlim(low, high)
        ax.set_yticks(range(len(bars)), [label_text(row["label"], 40) for _, row in bars])
        ax.set_ylim(len(bars) - 0.4, -0.75)
        ax.set_title(f"{NORM_NAMES[norm]} norm", fontsize=10, loc="left", color=INK, pad=12)
    handles = [
        Patch(
            label="attained (a lower bound)"
            if word == "attained"
            else "estimate (not a bound)"
            if word == "estimate"
            else word,
            facecolor="white" if word == "estimate" else colour,
            edgecolor=colour,
            hatch="////" if word == "estimate" else None,
        )
        for word, colour in GUARANTEE_COLOURS.items()
        if word in used
    ]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8.5, frameon=False
        )
    return figure


def _bars(model: Json, norm: str) -> list[tuple[str, Json]]:
    return [(kind, row) for kind in ("upper", "estimate") for row in model[kind] if row["norm"] == norm]
