"""The page and the figure of an evaluation, made from its record alone."""

from __future__ import annotations

import pathlib

from lipbounds.analysis.experiment import LABELS, Json
from lipbounds.analysis.figures import NORM_NAMES, png, radii_figure, svg
from lipbounds.analysis.report import MEANINGS, embedded, fill, write_page

PAGE = "evaluation.html"
FIGURES = ("radii.png", "radii.svg")


def write_evaluation_report(record: Json, folder: pathlib.Path) -> pathlib.Path:
    """Write `evaluation.html`, `radii.png` and `radii.svg` to `folder` (which exists); return the page's path.

    `record` is what `evaluation.json` holds: a page can be made again from the file alone.
    """
    figure = radii_figure(_parts(record), record["eps"])
    picture = png(figure)
    for name, data in zip(FIGURES, (picture, svg(figure)), strict=True):
        (folder / name).write_bytes(data)
    return write_page(folder / PAGE, render_evaluation(record, picture))


def render_evaluation(record: Json, picture: bytes) -> str:
    """The page as text; every value is escaped, the figure (PNG) is embedded."""
    parts = _parts(record)
    words = {word for _, part in parts for word in part["guarantee"].values()}
    names = [name for _, part in parts for key in ("guarantee", "refused") for name in part[key]]
    return fill(
        "evaluation.html.j2",
        record=record,
        parts=parts,
        figure=embedded(picture),
        labels={name: LABELS.get(name, name) for name in names},
        norm_names=NORM_NAMES,
        meanings={word: text for word, text in MEANINGS.items() if word in words},
    )


def _parts(record: Json) -> list[tuple[str, Json]]:
    """(title, record) of the network, and of the one it is compared with."""
    other = record.get("against")
    mine = (record["model"]["title"], record)
    return [mine] if other is None else [mine, (other["model"]["title"], other)]
