"""Radii as a table of text (CSV), a line per example, which `radii_of_table` reads back."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lipbounds._margins.blocks import classes_of, radii_of
from lipbounds._margins.radius import INTERRUPTED, Radii
from lipbounds._text.tables import printable

#: The columns; the last four are the same in all lines. Older tables lack the last one.
COLUMNS = (
    "image", "label", "prediction", "correct", "outcome", "certified_radius", "norm", "guarantee", "method", "complete",
)  # fmt: skip
_UNKNOWN = ("", "nan")
_TRUTH = {"true": True, "false": False}  # spreadsheets write capitals


def table_of(radii: Radii, **more: Sequence[str]) -> str:
    """The table, with `more` columns behind: radii in full precision, "inf" for infinite ones; notes are left out.

    A label, prediction or outcome that is not known is a blank cell.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow((*COLUMNS, *more))
    norm = "inf" if radii.norm == np.inf else int(radii.norm)
    common = (norm, radii.guarantee, printable(radii.method), radii.complete)
    label, prediction = classes_of(radii.label), classes_of(radii.prediction)
    outcome = [] if radii.outcome is None else radii.outcome.tolist()

    def cell(column: list[Any], i: int) -> Any:
        return column[i] if column else ""  # of None, csv writes a blank

    for i, (radius, correct) in enumerate(zip(radii.radius.tolist(), radii.correct.tolist(), strict=True)):
        own = (
            i,
            cell(label, i),
            cell(prediction, i),
            correct,
            cell(outcome, i),
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
    if not set(COLUMNS[:-1]) <= rows[0].keys():
        raise ValueError(f"a table without the columns {', '.join(COLUMNS[:-1])}")
    every: dict[str, set[Any]] = {name: {row.get(name, "True") for row in rows} for name in COLUMNS[-4:]}
    if any(len(values) != 1 for values in every.values()) or any(None in row.values() for row in rows):
        raise ValueError("a table whose lines are cut off, or of several networks")
    if [row["image"] for row in rows] != [str(i) for i in range(len(rows))]:
        raise ValueError("a table whose lines are not numbered from 0 on")
    for name in ("correct", "complete"):
        if not {row.get(name, "True").lower() for row in rows} <= _TRUTH.keys():
            raise ValueError(f"a table whose column {name} holds other than True and False")
    record: dict[str, Any] = {name: values.pop() for name, values in every.items()}
    record["complete"] = _TRUTH[record["complete"].lower()]
    record["norm"] = record["norm"] if record["norm"] == "inf" else float(record["norm"])
    columns: dict[str, list[Any]] = {
        name: [_class(row[name]) for row in rows] for name in ("label", "prediction")
    }
    outcome = ["" if row["outcome"].lower() in _UNKNOWN else row["outcome"] for row in rows]
    return radii_of(
        {
            **record,
            **columns,
            "outcome": outcome,
            "notes": [] if record["complete"] else [INTERRUPTED],
            "radius": [row["certified_radius"] for row in rows],
            "correct": [_TRUTH[row["correct"].lower()] for row in rows],
        }
    )


def _class(cell: str) -> Any:
    """A class, None where it is not known; other programs write 3.0 in a column where some are blank."""
    if cell.lower() in _UNKNOWN:
        return None
    found = re.fullmatch(r"([0-9]+)(\.0+)?", cell)
    return cell if found is None else int(found[1])
