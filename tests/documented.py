"""Comparison of JSON files with the tables of docs/files.md."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from typing import Any

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "files.md"


def documented(heading: str) -> dict[str, bool]:
    """{field: whether every file has it} of the table below a heading of docs/files.md."""
    page = PAGE.read_text(encoding="utf-8")
    part = page[page.index(f"\n## {heading}\n") + 1 :].partition("\n## ")[0]
    return {
        name: "if any" not in kind
        for line, kind in re.findall(r"^\| (`[^|]*) \|([^|]*)\|", part, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", line)
    }


def differences(heading: str, record: Any) -> tuple[set[str], set[str]]:
    """(fields of a record that the table lacks, fields that every file should have and this one lacks).

    A field of an object is written `object.field`, also where the object stands in a list; a component in capitals
    stands for any name.
    """
    known = documented(heading)
    found = set(_fields(record, "", known))
    return found - known.keys(), {name for name, always in known.items() if always} - found


def _fields(value: Any, path: str, known: dict[str, bool]) -> Iterator[str]:
    if path in known:  # documented as a whole
        yield path
        return
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, dict):
            yield path
            return
        for key, inner in item.items():
            yield from _fields(inner, _place(f"{path}.{key}".lstrip("."), path, known), known)


def _place(name: str, path: str, known: dict[str, bool]) -> str:
    """The name, or the documented one with capitals in the place of its last component."""
    if any(each == name or each.startswith(f"{name}.") for each in known):
        return name
    depth = path.count(".") + 1 if path else 0
    for each in known:
        parts = each.split(".")
        if len(parts) > depth and ".".join(parts[:depth]) == path and parts[depth].isupper():
            return ".".join(parts[: depth + 1])
    return name
