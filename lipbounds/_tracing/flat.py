"""A program without calls: its values and equations, and where they come from in the user's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax._src import source_info_util

from lipbounds._text.tables import printable
from lipbounds.errors import Unsupported

Path = tuple[str, ...]


@dataclass(eq=False)
class Value:
    """One tensor of the flat program: a constant (perhaps a tracer), or something that depends on x.

    Args:
        randomness: 0, 1 (computed from random bits), 2 (a random mask: a comparison of such numbers).
        bounds: the range of a small integer that depends on x by comparisons only (which case of jnp.select holds).
    """

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype
    const: Any = None
    depends: bool = False
    randomness: int = 0
    producer: Eqn | None = None
    bounds: tuple[int, int] | None = None


@dataclass(eq=False)
class Eqn:
    """One primitive with at least one operand that depends on x."""

    primitive: str
    params: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    path: str
    bind: Callable[..., Any] | None = None
    many: bool = False


@dataclass
class Flat:
    """The inlined program of one traced function."""

    input: Value
    outputs: tuple[Value, ...]
    eqns: list[Eqn]
    refused: list[Unsupported]
    values: list[Value] = field(default_factory=list)


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and its constants, for open and closed jaxprs of every supported jax."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def stack_of(eqn: Any) -> Path:
    text = str(getattr(eqn.source_info, "name_stack", ""))
    return (text,) if text else ()


def place_of(eqn: Any, path: Path) -> str:
    """The call path of an equation with the user's line, for messages."""
    parts = printable("/".join(part for part in (*path, *stack_of(eqn)) if part)) or "top level"
    try:
        line = source_info_util.summarize(eqn.source_info)
    except Exception:  # internals of jax: a message must never fail because of them
        return parts
    file, _, rest = line.partition(":")
    return f"{parts} ({file.rsplit('/', 1)[-1]}:{rest.strip()})" if rest else parts
