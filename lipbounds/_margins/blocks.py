"""Certification of many examples in blocks, so that it can be interrupted, resumed and shared by processes.

Local engines treat examples together, so a radius may depend on the others in its call. Blocks are cut by a rule of the
network's size alone: whoever certifies a block, and whenever, finds the same radii.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lipbounds._form.lure import LureForm
from lipbounds._margins.margins import WORDS
from lipbounds._margins.radius import OUTCOMES, Radii
from lipbounds._text.files import naming, parsed, write_atomically
from lipbounds.results import GUARANTEES, check_norm, weakest

_FORMAT = "lipbounds-unfinished"
_WORK = 2**24  # numbers in the ellipsoids of a block
_FEWEST, _MOST = 8, 1024  # examples of a block
_SLOW = 16  # where each takes seconds


def blocks(form: LureForm, count: int, local: bool, margins: bool = False) -> list[slice]:
    """The blocks of `count` examples; a single one for radii of the whole network's bound, which take no time."""
    widest = max([form.in_size, *(tap.size_in for tap in form.taps)])
    most = _SLOW if margins else _MOST
    size = max(_FEWEST, min(most, _WORK // widest**2)) if local else max(count, 1)
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]


def record_of(radii: Radii) -> dict[str, Any]:
    """Radii as plain data; "inf" for infinite ones."""
    return {
        "guarantee": radii.guarantee,
        "method": radii.method,
        "norm": "inf" if radii.norm == np.inf else int(radii.norm),
        "notes": list(radii.notes),
        "complete": radii.complete,
        "radius": ["inf" if r == np.inf else float(r) for r in radii.radius],
        "correct": radii.correct.tolist(),
        "outcome": [] if radii.outcome is None else radii.outcome.tolist(),
        "label": classes_of(radii.label),
        "prediction": classes_of(radii.prediction),
    }


def classes_of(column: np.ndarray | None) -> list[Any]:
    """Labels or predictions as whole numbers, None where one is not known (NaN); empty where none is."""
    given: list[Any] = [] if column is None else np.asarray(column).tolist()
    return [None if k is None or k != k else int(k) if k % 1 == 0 else k for k in given]


def radii_of(record: Mapping[str, Any]) -> Radii:
    """The radii of `record_of`. ValueError where the record is not complete, or does not fit together."""
    try:
        radius = np.array([float(r) for r in record["radius"]])
        correct = np.array(record["correct"], dtype=None if record["correct"] else bool)
        guarantee, method = record["guarantee"], str(record["method"])
        if guarantee not in GUARANTEES[:-1]:
            raise ValueError(f"their guarantee is {guarantee!r}, known are {', '.join(GUARANTEES[:-1])}")
        norm = check_norm(record["norm"])
        notes = tuple(str(note) for note in record["notes"])
        complete = record.get("complete", True)  # older files say nothing, as of the next three
        if not isinstance(complete, bool):
            raise ValueError(f"complete must be true or false, got {complete!r}")
        outcome = [str(word) for word in record.get("outcome", [])]
        classes = [_classes(record.get(name, [])) for name in ("label", "prediction")]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"no complete radii: {error!r}") from error
    fits = correct.dtype == bool and radius.shape == correct.shape == (radius.size,)
    fits &= len(outcome) in (0, radius.size) and set(outcome) <= {*OUTCOMES, ""}
    fits &= all(column.size in (0, radius.size) for column in classes)
    if not fits or not (radius >= 0).all() or radius[~correct].any():
        raise ValueError("radii that do not fit together")
    words = np.array(outcome, WORDS) if any(outcome) or not radius.size else None
    label, prediction = (column if column.size or not radius.size else None for column in classes)
    return Radii(radius, correct, norm, guarantee, method, notes, complete, words, label, prediction)


def _classes(given: list[Any]) -> np.ndarray:
    """Classes as int64, float64 with NaN where some are not known (None), empty where none is.

    ValueError for other than whole numbers >= 0.
    """
    known = [k for k in given if k is not None]
    for k in known:
        if type(k) is not int or not 0 <= k < 2**63:
            raise ValueError(f"a class must be a whole number >= 0, got {k!r}")
    partly = 0 < len(known) < len(given)
    return np.array(given, np.float64) if partly else np.array(known, np.int64)


def joined(parts: Iterable[Radii]) -> Radii:
    """The radii of several blocks in their order, with the weakest guarantee. Counts in equal notes are added."""
    parts = list(parts)
    counts: dict[str, list[tuple[int, int]]] = {}
    for note in (note for part in parts for note in part.notes):
        found = [(int(a), int(b)) for a, b in _COUNT.findall(note)]
        old = counts.setdefault(_COUNT.sub("\0", note), [(0, 0)] * len(found))
        old[:] = [(a + c, b + d) for (a, b), (c, d) in zip(old, found, strict=True)]
    notes = []
    for note, numbers in counts.items():
        for a, b in numbers:
            note = note.replace("\0", f"{a} of {b}", 1)
        notes.append(note)

    def column(name: str) -> np.ndarray | None:
        given = [getattr(part, name) for part in parts]
        return None if any(values is None for values in given) else np.concatenate(given)

    return Radii(
        np.concatenate([part.radius for part in parts]),
        np.concatenate([part.correct for part in parts]),
        parts[0].norm,
        weakest(part.guarantee for part in parts),
        parts[0].method,
        tuple(notes),
        all(part.complete for part in parts),
        outcome=column("outcome"),
        label=column("label"),
        prediction=column("prediction"),
    )


_COUNT = re.compile(r"\b(\d+) of (\d+)\b")


class Unfinished:
    """The blocks of a certification that are done, in a file beside its result (one line per block).

    Args:
        path: of the result; None keeps nothing.
        index: of the process, each of which has a file of its own and reads those of all.
        settings: everything that the radii depend on, as plain data.

    Raises:
        ValueError: there is an unfinished certification with other settings.
    """

    def __init__(self, path: Path | None, index: int, settings: Mapping[str, Any]) -> None:
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self.head = json.dumps({"format": _FORMAT, "key": self.key}) + "\n"
        self.done: dict[int, Radii] = {}
        self.path = None if path is None else path.with_name(f"{path.name}.unfinished-{index}")
        self.files = (
            [] if path is None else sorted(path.parent.glob(f"{glob.escape(path.name)}.unfinished-*"))
        )
        self.begun = False  # whether the own file has its first line
        for file in self.files:
            self._read(file)

    def _read(self, file: Path) -> None:
        first, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
        if not lines:
            return  # the write of the first line was cut off, and nothing was done
        try:
            ours = parsed(first) == parsed(self.head)
        except ValueError:
            ours = False
        if not ours:
            raise ValueError(
                f"{file} is the rest of a certification with another model, data or options: delete it, or write the "
                "result to another file"
            )
        self.begun |= file == self.path
        for place, line in enumerate(lines):
            try:
                record = parsed(line)
                self.done[int(record["block"])] = radii_of(record)
            except (KeyError, TypeError, ValueError):  # cut off while it was written
                if file == self.path:
                    write_atomically(file, "".join(f"{x}\n" for x in (first, *lines[:place])).encode())
                break

    def add(self, block: int, radii: Radii) -> None:
        """Keep a finished block."""
        self.done[block] = radii
        if self.path is None:
            return
        line = json.dumps({"block": block, **record_of(radii)}) + "\n"
        if self.begun:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(line)
            return
        write_atomically(self.path, (self.head + line).encode())
        self.begun = True
        if self.path not in self.files:
            self.files.append(self.path)

    def remove(self) -> None:
        """Delete the files, once the result is written: those of all processes that were found, and its own."""
        for file in self.files:
            file.unlink(missing_ok=True)
