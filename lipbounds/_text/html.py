"""Writes all HTML outside the templates: text is escaped, and finished HTML has its own type."""

from __future__ import annotations

import html


class Html(str):
    """Finished HTML. Jinja2 reads `__html__` and does not escape it again."""

    __slots__ = ()

    def __html__(self) -> str:
        return str(self)


def element(tag: str, *children: str, **attributes: str) -> Html:
    """`<tag attributes>children</tag>`; children that are not `Html`, and all attribute values, are escaped.

    `tag` and the names of the attributes are literals of this package.
    """
    names = "".join(f' {name}="{html.escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{names}>{together(*children)}</{tag}>")


def together(*children: str) -> Html:
    """Concatenate children, escaping those that are not `Html`."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def lines(text: str) -> Html:
    """Text with its line breaks."""
    return Html(html.escape(text).replace("\n", "<br>"))
