"""Pages of the site that are made from the program itself, and docstrings as reStructuredText."""

from __future__ import annotations

import importlib
import re
import textwrap
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import typer.main

import lipbounds as lb
from lipbounds._cli import main

_PAD = "    "
_SECTIONS = ("Args", "Returns", "Raises", "Yields", "Note", "Notes", "Example", "Examples", "Attributes")


def pages() -> dict[str, str]:
    """{file name: text} of every page that is made at build time."""
    return {"command-line.md": command_line(), "api.rst": public_names(), "refusals.md": refusals()}


# --- the command line ----------------------------------------------------------------------------------------------
def command_line() -> str:
    """Every command with its help, as the shell prints it, without colours and frames."""
    group: Any = typer.main.get_command(main.app)
    context = group.context_class(group, info_name="lipbounds")
    parts = ["# Command line", "`lipbounds COMMAND --help` prints the same.", _help(group, context)]
    for name in group.list_commands(context):
        parts += _command(group, name, context, 2)
    return "\n\n".join(parts) + "\n"


def _command(group: Any, name: str, above: Any, level: int) -> list[str]:
    _, command, _ = group.resolve_command(above, [name])
    context = command.context_class(command, info_name=name, parent=above)
    parts = [f"{'#' * level} {context.command_path}", _help(command, context)]
    for each in getattr(command, "list_commands", lambda _: [])(context):
        parts += _command(command, each, context, level + 1)
    return parts


def _help(command: Any, context: Any) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"Usage: {usage}", *_paragraphs(command.help or command.short_help or "")]
    rows = [row for each in command.get_params(context) if (row := _row(each, context))]
    parts += [
        f"{name}\n{textwrap.fill(text, 96, initial_indent=_PAD, subsequent_indent=_PAD)}"
        for name, text in rows
    ]
    return "```text\n" + "\n\n".join(part.rstrip() for part in parts) + "\n```"


def _paragraphs(text: str) -> list[str]:
    """Paragraphs of a help text, filled where they are prose."""
    found = re.split(r"\n\s*\n|\n(?=\s*- )", re.sub(r"[`*\b]", "", textwrap.dedent(text)).strip("\n"))
    return [
        p if p.startswith((" ", "-", "|")) else textwrap.fill(" ".join(p.split()), 100) for p in found if p
    ]


def _row(parameter: Any, context: Any) -> tuple[str, str] | None:
    if getattr(parameter, "hidden", False):
        return None
    record = parameter.get_help_record(context)
    if record is None:
        return None
    name, text = record
    return name, re.sub(r"[`*]", "", " ".join(text.split())) or "(no default)"


# --- the public names ----------------------------------------------------------------------------------------------
_ROOMS = {
    "lipbounds": "What most people need: tracing, bounds, radii, certificates.",
    "lipbounds.errors": "The errors that a caller may catch.",
    "lipbounds.examples": "Trained networks that are installed, with test images and certificates.",
    "lipbounds.interop": "Networks from other programs.",
    "lipbounds.training": "Training for the radius; the page Training explains the settings.",
    "lipbounds.analysis": "Attacks, evaluation, diagnostics.",
    "lipbounds.norms": "Proved norms of matrices and of maps.",
    "lipbounds.activations": "Proved slopes of elementwise functions.",
}


def public_names() -> str:
    """One entry for every public name of every public module."""
    parts = ["Public names", "============", ""]
    seen: list[object] = []
    for room, text in _ROOMS.items():
        module = importlib.import_module(room)
        names = [n for n in getattr(module, "__all__", vars(module)) if not n.startswith("_")]
        names.sort(key=lambda n: (not n[0].islower(), n))  # functions first
        parts += [room, "-" * len(room), "", text, ""]
        for name in names:
            value = getattr(module, name)
            if isinstance(value, types.ModuleType) or any(value is each for each in seen):
                continue
            seen.append(value)
            home = getattr(value, "__module__", None)
            if room == "lipbounds" or home is None or str(home).startswith("lipbounds"):
                parts += _entry(room, name, value)
    return "\n".join(parts) + "\n"


def _entry(room: str, name: str, value: object) -> list[str]:
    if isinstance(value, type):
        return [f".. autoclass:: {room}.{name}", "   :members:", ""]
    if callable(value):
        return [f".. autofunction:: {room}.{name}", ""]
    return [f".. py:data:: {room}.{name}", f"   :value: {value!r}"[:110], ""]


def restructured(lines: Sequence[str]) -> list[str]:
    """A docstring as reStructuredText: indented formulas are literal blocks, and no character is markup by accident."""
    out: list[str] = []
    literal, section = False, ""
    for number, line in enumerate(lines):
        bare, indent = line.strip(), len(line) - len(line.lstrip())
        if bare.rstrip(":") in _SECTIONS and bare.endswith(":") and indent == 0:
            section, literal = bare.rstrip(":"), False
            out.append(line)
            continue
        if section:
            out.append(line if section.startswith("Example") else _escaped(line))
            continue
        if not bare:
            out.append("")
            continue
        before = lines[number - 1].strip() if number else ""
        if indent >= 2 and not literal and not before.startswith(("-", "*")):
            out += ["", "::", ""] if out and out[-1] else ["::", ""]
            literal = True
        elif indent == 0:
            if literal and out and out[-1]:
                out.append("")
            literal = False
        out.append(line if literal else _escaped(line))
    return [*out, ""]


def _escaped(line: str) -> str:
    pieces = re.split(r"(``[^`]+``|`[^`]+`)", line)
    for k, piece in enumerate(pieces):
        if k % 2:
            pieces[k] = f"``{piece.strip('`')}``"
        else:
            pieces[k] = re.sub(r"([*|\\])|_(?=\W|$)", lambda m: "\\" + m.group(0), piece)
    return "".join(pieces)


# --- what is refused -----------------------------------------------------------------------------------------------
_REFUSED: dict[str, tuple[str, Callable[[], object]]] = {
    "A product of two things that depend on x": (
        "lb.trace(lambda x: x * jnp.tanh(x[::-1]), jnp.ones(4))",
        lambda: lb.trace(lambda x: x * jnp.tanh(x[::-1]), jnp.ones(4)),
    ),
    "Attention, a softmax times values": (
        "lb.trace(lambda x: jax.nn.softmax(x @ x.T) @ x @ jnp.ones(2), jnp.ones((3, 2)))",
        lambda: lb.trace(lambda x: jax.nn.softmax(x @ x.T) @ x @ jnp.ones(2), jnp.ones((3, 2))),
    ),
    "Normalisation by the statistics of the input": (
        "lb.trace(lambda x: (x - x.mean()) / x.std(), jnp.arange(4.0))",
        lambda: lb.trace(lambda x: (x - x.mean()) / x.std(), jnp.arange(4.0)),
    ),
    "A function that jumps": (
        "lb.trace(lambda x: jnp.round(x), jnp.ones(4))",
        lambda: lb.trace(lambda x: jnp.round(x), jnp.ones(4)),
    ),
    "Slopes without a bound": (
        "lb.trace(lambda x: jnp.exp(x), jnp.ones(4))",
        lambda: lb.trace(lambda x: jnp.exp(x), jnp.ones(4)),
    ),
    "An entry chosen by the input": (
        "lb.trace(lambda x: x[jnp.argmax(x)][None], jnp.arange(4.0))",
        lambda: lb.trace(lambda x: x[jnp.argmax(x)][None], jnp.arange(4.0)),
    ),
    "Dropout that is still on": (
        "lb.trace(lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), jnp.ones(4))",
        lambda: lb.trace(lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), jnp.ones(4)),
    ),
}


def refusals() -> str:
    """What is refused and what the error says, by asking for it."""
    parts = [
        "# Refused, why?",
        "A network that has no Lipschitz constant, or none that can be proved here, is refused by one error that lists "
        "everything unsupported, where it is, why, and what can be written instead. These messages were made by "
        "running the code beside them.",
    ]
    for title, (code, call) in _REFUSED.items():
        try:
            call()
        except lb.UnsupportedError as error:
            said = textwrap.dedent(str(error))
        else:
            raise AssertionError(f"{code} is not refused any more: take it from the gallery")
        said = re.sub(r" \([\w.]+\.py:\d+ \([^)]*\)\)", "", said)
        parts += [f"## {title}", f"```python\n{code}\n```", f"```text\n{said}\n```"]
    return "\n\n".join(parts) + "\n"
