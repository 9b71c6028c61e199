"""Radii as a table of text (CSV), a line per example, which `radii_of_table` reads back."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from lipbounds._margins.blocks import radii_of
from lipbounds._margins.radius import Radii
from lipbounds._text.tables import printable

#: The columns; the last three are the same in all lines.
COLUMNS = (
    "image", "label", "prediction", "correct", "outcome", "certified_radius", "norm", "guarantee", "method",
)  # fmt: skip


def table_of(radii: Radii, **more: Sequence[str]) -> str:
    """The table, with `more` columns behind: radii in full precision, "inf" for infinite ones; notes are left out."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow((*COLUMNS, *more))
    norm = "inf" if radii.norm == np.inf else int(radii.norm)
    common = (norm, radii.guarantee, printable(radii.method))

    def cell(column: Any, i: int) -> Any:
        return "" if column is None else column[i]

    for i, (radius, correct) in enumerate(zip(radii.radius.tolist(), radii.correct.tolist(), strict=True)):
        own = (
            i,
            cell(radii.label, i),
            cell(radii.prediction, i),
            correct,
            cell(radii.outcome, i),
            repr(radius),
        )
        lines.writerow((*own, *common, *(column[i] for column in more.values())))
    return text.getvalue()


def is_table(begin: str) -> bool:
    """Whether text begins as such a table does."""
    return begin.startswith(",".join(COLUMNS[:6]))


def radii_of_table(text: str) -> Radii:
    """The radii in a table; ValueError where it is not complete, or its lines do not fit together."""
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(f"a table that cannot be read: {error}") from error
    if not rows:
        raise ValueError("a table without a line")
    if not set(COLUMNS) <= rows[0].keys():
        raise ValueError(f"a table without the columns {', '.join(COLUMNS)}")
    every: dict[str, set[Any]] = {name: {row[name] for row in rows} for name in COLUMNS[-3:]}
    if any(len(values) != 1 for values in every.values()) or any(None in row.values() for row in rows):
        raise ValueError("a table whose lines are cut off, or of several networks")
    if [row["image"] for row in rows] != [str(i) for i in range(len(rows))]:
        raise ValueError("a table whose lines are not numbered from 0 on")
    if not {row["correct"] for row in rows} <= {"True", "False"}:
        raise ValueError("a table whose column correct holds other than True and False")
    record = {name: values.pop() for name, values in every.items()}
    record["norm"] = record["norm"] if record["norm"] == "inf" else float(record["norm"])
    columns: dict[str, list[Any]] = {
        name: [row[name] for row in rows] if all(row[name] for row in rows) else []
        for name in ("label", "prediction", "outcome")
    }
    for name in ("label", "prediction"):
        columns[name] = [int(word) if word.isdecimal() else word for word in columns[name]]
    return radii_of(
        {
            **record,
            **columns,
            "notes": [],
            "radius": [row["certified_radius"] for row in rows],
            "correct": [row["correct"] == "True" for row in rows],
        }
    )
