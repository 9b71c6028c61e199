"""The report: one self-contained HTML page and its figures, made from the results alone."""

from __future__ import annotations

import base64
import importlib.resources
import pathlib
from typing import Any

import jinja2

from lipbounds._text import seconds_text, show, write_atomically
from lipbounds.analysis.figures import (
    NORM_NAMES,
    bounds_figure,
    certified_curves,
    certified_figure,
    contrast_figure,
    png,
)

Json = dict[str, Any]

MEANINGS = {
    "verified": "Holds for this network as it is, every rounding error of our own computation included.",
    "probabilistic": "Holds except with the stated probability over our own random start.",
    "assumed": "Rests on slopes that the user declared for an activation.",
    "estimate": "Neither an upper nor a lower bound: power iteration, for training and previews.",
    "attained": "A slope found between two explicit points: no Lipschitz constant can be smaller.",
}


HOW = {"cross-entropy": "plain cross-entropy", "crm": "certified radius maximisation (CRM)"}


def write_report(results: Json, folder: pathlib.Path) -> pathlib.Path:
    """Write `report.html` and one PNG per figure to `folder` (which exists); return the page's path.

    `results` is what `results.json` holds: a page can be made again from the file alone.
    """
    figures: dict[str, dict[str, str]] = {}
    for model in results["models"]:
        drawn = {"bounds": bounds_figure(model), "certified-l2": certified_figure(model, ["2"])}
        others = [norm for norm in ("inf", "1") if certified_curves(model, norm)]
        if others:
            drawn["certified-others"] = certified_figure(model, others)
        figures[model["name"]] = {}
        for what, figure in drawn.items():
            data = png(figure)
            (folder / f"{model['name']}-{what}.png").write_bytes(data)
            figures[model["name"]][what] = base64.b64encode(data).decode("ascii")
    rivals = contrast(results)
    if rivals:
        data = png(contrast_figure(rivals))
        (folder / "training-compared.png").write_bytes(data)
        figures["training-compared"] = {"l2": base64.b64encode(data).decode("ascii")}
    page = folder / "report.html"
    write_page(page, render(results, figures))
    return page


def render(results: Json, figures: dict[str, dict[str, str]]) -> str:
    """The page as text; every value is escaped, figures are embedded as base64 PNG."""
    summaries = [summary(model) for model in results["models"]]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            figures=figures,
            summaries=summaries,
            rivals=contrast(results),
            how=HOW,
            norm_names=NORM_NAMES,
            meanings={word: text for word, text in MEANINGS.items() if word in _words(results)},
        )
    )


def contrast(results: Json) -> list[Json]:
    """Models of one architecture that were trained in different ways, each with its best l2 bound; [] for none."""
    groups: dict[str, list[Json]] = {}
    for model in results["models"]:
        if "with" in model["training"]:
            groups.setdefault(repr((model["architecture"], model["arguments"])), []).append(model)
    for models in groups.values():
        if len({model["training"]["with"] for model in models}) > 1:
            rows = []
            for model in models:
                certified = [
                    row
                    for row in model["upper"]
                    if row["norm"] == "2" and "certified" in row and "average" in row.get("pairs", {})
                ]
                if certified:
                    best = min(certified, key=lambda row: row["pairs"]["average"])
                    rows.append({"model": model, "bound": best})
            return rows if len(rows) > 1 else []
    return []


def environment() -> jinja2.Environment:
    """Our templates: every value is escaped, a missing one is an error."""
    templates = importlib.resources.files("lipbounds.analysis").joinpath("templates")
    found = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: templates.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "up": _up,
        "down": _down,
        "near": _near,
        "seconds": seconds_text,
        "percent": _percent,
        "percent2": lambda share: f"{100 * share:.2f} %",
    }
    return found


def write_page(page: pathlib.Path, text: str) -> None:
    """Write a page as UTF-8; what UTF-8 cannot hold (file names that are not text) becomes a character reference."""
    write_atomically(page, text.encode("utf-8", "xmlcharrefreplace"))


def _up(value: float, digits: int = 5) -> str:
    return show(value, "up", digits)


def _down(value: float, digits: int = 5) -> str:
    return show(value, "down", digits)


def _near(value: float, digits: int = 5) -> str:
    return show(value, "near", digits)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def summary(model: Json) -> Json:
    """The headline of one model: the best l2 bound, what is attained, and the best median radius."""
    upper = min((r for r in model["upper"] if r["norm"] == "2"), key=lambda r: r["value"], default=None)
    naive = next((r for r in model["upper"] if r["norm"] == "2" and r["label"] == "naive"), None)
    lower = max((r["value"] for r in model["lower"] if r["norm"] == "2"), default=None)
    certified = [(label, record) for label, record in certified_curves(model, "2") if record["images"]]
    best = max(certified, key=lambda item: item[1]["quartiles"][1] or float("inf"), default=None)
    return {
        "title": model["title"],
        "name": model["name"],
        "upper": upper,
        "lower": lower,
        "naive": naive,
        "ratio": upper["value"] / lower if upper and lower else None,
        "radius": best[1]["quartiles"][1] if best else None,
        "radius_by": best[0] if best else None,
        "radius_guarantee": best[1]["guarantee"] if best else None,
    }


def _words(results: Json) -> set[str]:
    words = {
        row["guarantee"]
        for model in results["models"]
        for kind in ("upper", "estimate")
        for row in model[kind]
    }
    return words | ({"attained"} if any(model["lower"] for model in results["models"]) else set())
