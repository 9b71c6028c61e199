"""The report: one self-contained HTML page and its figures, made from the results alone."""

from __future__ import annotations

import base64
import importlib.resources
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from lipbounds._text import entry, percent, seconds_text, show, write_atomically
from lipbounds.analysis.experiment import best_certified
from lipbounds.analysis.figures import (
    NORM_NAMES,
    bounds_figure,
    certified_curves,
    certified_figure,
    contrast_figure,
    png,
)
from lipbounds.analysis.image_figures import (
    both_sides_figure,
    examples_figure,
    pairs_figure,
    radius_histogram,
)

Json = dict[str, Any]

MEANINGS = {
    "verified": "Holds for this network as it is, every rounding error of our own computation included.",
    "probabilistic": "Holds except with the stated probability over our own random start.",
    "assumed": "Rests on slopes that the user declared for an activation.",
    "estimate": "Neither an upper nor a lower bound: power iteration, for training and previews.",
    "attained": "A slope found between two explicit points: no Lipschitz constant can be smaller.",
}


#: eps at which shares of the images are printed.
LEVELS = (0.1, 0.25, 0.5, 1.0)
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
        drawn |= _of_single_images(model)
        figures[model["name"]] = {}
        for what, figure in drawn.items():
            data = png(figure)
            (folder / f"{model['name']}-{what}.png").write_bytes(data)
            figures[model["name"]][what] = embedded(data)
    rivals = contrast(results)
    if rivals:
        data = png(contrast_figure(rivals))
        (folder / "training-compared.png").write_bytes(data)
        figures["training-compared"] = {"l2": embedded(data)}
    return write_page(folder / "report.html", render(results, figures))


def _of_single_images(model: Json) -> dict[str, Figure]:
    """The figures of `single_images`, with the certified accuracy and the pairs of the best l2 bound."""
    if "images" not in model:
        return {}
    images, best = model["images"], best_certified(model)
    drawn = {
        "both-sides": both_sides_figure(best["certified"], images, best["label"], local=best.get("local")),
        "radii": radius_histogram(images),
    }
    if len(best.get("pairs", {}).get("values", ())) > 1:
        drawn["pairs"] = pairs_figure(best["pairs"]["values"])
    if images["shown"]:
        drawn["examples"] = examples_figure(images["shown"])
    return drawn


def render(results: Json, figures: dict[str, dict[str, str]]) -> str:
    """The page as text; every value is escaped, figures are embedded as base64 PNG."""
    summaries = [summary(model) for model in results["models"]]
    return fill(
        "report.html.j2",
        results=results,
        figures=figures,
        summaries=summaries,
        shares={model["name"]: shares(model) for model in results["models"] if "images" in model},
        rivals=contrast(results),
        how=HOW,
        norm_names=NORM_NAMES,
        meanings={word: text for word, text in MEANINGS.items() if word in _words(results)},
    )


def shares(model: Json, levels: Sequence[float] = LEVELS) -> Json:
    """Both sides of the robust accuracy at a few eps, by the best l2 bound and by local bounds where there are any."""
    best = best_certified(model)
    local = best.get("local")

    def share(values: list[float | None], eps: float) -> float:
        return float(np.mean([value is None or value > eps for value in values]))

    images = model["images"]
    found = [d if right else 0.0 for d, right in zip(images["distance"], images["correct"], strict=True)]
    return {
        "label": best["label"],
        "guarantee": best["certified"]["guarantee"],
        "local": None if local is None else local["guarantee"],
        "notes": [] if local is None else local["notes"],
        "rows": [
            {
                "eps": eps,
                "certified": share(best["certified"]["radius"], eps),
                "local": None if local is None else share(local["radius"], eps),
                "attacked": share(found, eps),
            }
            for eps in levels
        ],
    }


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
                    rows.append({"model": model, "bound": best, "local": _local(model)})
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
        **{way: _rounded(way) for way in ("up", "down", "near")},
        "setting": _setting,
        "seconds": seconds_text,
        "percent": lambda share, way="near": f"{percent(share, way, 1)} %",
        "percent2": lambda share, way="near": f"{percent(share, way)} %",
    }
    return found


def _setting(value: float, digits: int = 5) -> str:
    """A number that was given, without zeros at the end."""
    return show(value, "near", digits)


def _rounded(way: Any) -> Callable[..., str]:
    return lambda value, digits=5: entry(value, way, digits)


def fill(template: str, **values: Any) -> str:
    """The page that a template makes of these values."""
    return environment().get_template(template).render(**values)


def embedded(picture: bytes) -> str:
    """A PNG as base64 text, for a page that holds its figures."""
    return base64.b64encode(picture).decode("ascii")


def write_page(page: pathlib.Path, text: str) -> pathlib.Path:
    """Write a page as UTF-8 and return its path; characters that UTF-8 lacks become character references."""
    write_atomically(page, text.encode("utf-8", "xmlcharrefreplace"))
    return page


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
        "local": _local(model),
        "radius_by": best[0] if best else None,
        "radius_guarantee": best[1]["guarantee"] if best else None,
    }


def _local(model: Json) -> Json | None:
    return next((row["local"] for row in model["upper"] if "local" in row), None)


def _words(results: Json) -> set[str]:
    models = results["models"]
    words = {row["guarantee"] for model in models for row in model["upper"] + model["estimate"]}
    return words | ({"attained"} if any(model["lower"] for model in models) else set())
