"""Shared by all rooms: tables, HTML, progress, files, the wrapper of public calls, the version."""

from lipbounds._text.arguments import as_labels, check_seed, near, whole
from lipbounds._text.files import (
    DEFLATE,
    is_special,
    parsed,
    read_npz,
    read_safetensors,
    read_text,
    write_atomically,
)
from lipbounds._text.html import Html, element, together
from lipbounds._text.progress import (
    OutOfTime,
    Pace,
    Progress,
    clock,
    hurried,
    remaining,
    reporting,
    say,
    stoppable,
    within,
)  # fmt: skip
from lipbounds._text.settings import usual_programs, usual_settings
from lipbounds._text.tables import (
    Direction,
    entry,
    html_table,
    label_text,
    markdown_table,
    markdown_text,
    new_axes,
    percent,
    printable,
    seconds_text,
    show,
    text_table,
)  # fmt: skip

__all__ = [
    "DEFLATE", "Direction", "Html", "OutOfTime", "Pace", "Progress", "as_labels", "check_seed", "clock", "element",
    "entry", "html_table", "hurried", "is_special", "label_text", "markdown_table", "markdown_text", "near",
    "new_axes", "parsed", "percent", "printable", "read_npz", "read_safetensors", "read_text", "remaining",
    "reporting", "say", "seconds_text", "show", "stoppable", "text_table", "together", "usual_programs",
    "usual_settings", "whole", "within", "write_atomically",
]  # fmt: skip
