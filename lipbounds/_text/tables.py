"""Tables as text, Markdown and HTML, and numbers printed so that the printed statement stays true."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Any, Literal

from lipbounds._text.html import Html, element, lines, together

Direction = Literal["up", "down", "near"]
_ROUNDING = {"up": ROUND_CEILING, "down": ROUND_FLOOR, "near": ROUND_HALF_EVEN}


def show(value: float | None, direction: Direction = "near", digits: int = 6) -> str:
    """`value` in at most `digits` significant digits, rounded up for upper bounds and down for lower ones."""
    return _shown(value, direction, digits, zeros=False)


def percent(share: float, direction: Direction = "near", places: int = 2) -> str:
    """A share of some examples in percent: certified ones are rounded down, those that an attack leaves up.

    100 times the float of a share such as 57/100 is not a whole number; what lies beyond the ninth place is no share.
    """
    exact = Decimal(round(100 * float(share), 9)).quantize(Decimal(1).scaleb(-9), rounding=ROUND_HALF_EVEN)
    return str(exact.quantize(Decimal(1).scaleb(-places), rounding=_ROUNDING[direction]))


def entry(value: float | None, direction: Direction = "near", digits: int = 6) -> str:
    """`show` with zeros at the end, for a column or a figure, whose numbers have equal digits."""
    return _shown(value, direction, digits, zeros=True)


def _shown(value: float | None, direction: Direction, digits: int, zeros: bool) -> str:
    if value is None:
        return ""
    value = float(value)
    if not math.isfinite(value):
        return "inf" if value > 0 else ("-inf" if value < 0 else "nan")
    if value == 0.0:
        return "0"
    exact = Decimal(value)
    unit = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    shown = exact.quantize(unit, rounding=_ROUNDING[direction])
    if not shown:
        return "0"
    if shown.adjusted() > exact.adjusted():  # rounded up to a power of ten
        shown = shown.quantize(unit.scaleb(1))
    if -5 <= shown.adjusted() < 7:
        return _number(format(shown, "f"), zeros)
    mantissa, _, exponent = format(shown, "E").partition("E")
    return f"{_number(mantissa, zeros)}e{int(exponent):+03d}"


def _number(text: str, zeros: bool) -> str:
    return text if zeros or "." not in text else text.rstrip("0").rstrip(".")


def seconds_text(seconds: float) -> str:
    """Wall time for people, in three digits: milliseconds below one second."""
    value, unit = (1000 * seconds, "ms") if seconds < 1 else (seconds, "s")
    return f"{entry(value, digits=3)} {unit}"


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 tap", "2 taps"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Text on one line without control characters, which could move a terminal's cursor: they become escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns, two spaces apart; the columns in `right` are set flush right; a row is one line."""
    cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * w for w in widths), *(line(row) for row in cells[1:])])


def markdown_text(text: str) -> str:
    """Text as one line of Markdown: tags, entities, links, code, emphasis and bars in it are escaped."""
    return re.sub(r"[\\`*|$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<=\])\(", r"\\\g<0>", printable(text))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A Markdown table; markup and cell separators in the text are escaped."""

    def line(row: Sequence[str]) -> str:
        cells = (lines("\n").join(markdown_text(part) for part in cell.split("\n")) for cell in row)
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("---:" if i in right else "---" for i in range(len(header))) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Html:
    """An HTML table; every cell is escaped, so names out of a user's program cannot break the page."""

    def line(row: Sequence[str], tag: str) -> Html:
        cells = (
            element(tag, lines(c), style=f"text-align:{'right' if i in right else 'left'};padding:2px 10px")
            for i, c in enumerate(row)
        )
        return element("tr", *cells)

    head = element("thead", line(header, "th")) if any(header) else together()
    body = element("tbody", *(line(row, "td") for row in rows))
    return element("table", head, body, style="border-collapse:collapse")


def label_text(text: str, longest: int = 80) -> str:
    """Text for a matplotlib label: long text is shortened in the middle, a dollar sign does not begin a formula."""
    text = printable(text)
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[len(text) - longest // 2 + 1 :]}"
    return text.replace("$", r"\$")


def new_axes(width: float = 6.4, height: float = 4.0) -> Any:
    """Axes on a new figure, without pyplot, so that no global state changes and nothing has to be closed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()
