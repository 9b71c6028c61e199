"""The decision about each equation, from which the emitter writes the program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from lipbounds._activations.expression import Expr
from lipbounds._tracing.flat import Flat, Value
from lipbounds._tracing.rules import Group, Linear


@dataclass(eq=False)
class Elementwise:
    """A future tap: `expr` applied to the tensor `base`."""

    base: Value
    expr: Expr
    consts: list[Value]
    slopes: tuple[Any, Any]
    assumed: bool


class Decided(Protocol):
    """A flat program, and by index of each value the linear step or the tap that makes it."""

    flat: Flat
    linear: dict[int, Linear]
    taps: dict[int, Elementwise | Group]

    def resolve(self, value: Value) -> Value:
        """The value of which this one is an alias."""
        ...

    def half_formats(self) -> tuple[str, ...]:
        """The narrow formats through which values that reach the output are cast."""
        ...
