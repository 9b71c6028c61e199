"""What was decided of every equation, which the emitter writes down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from lipbounds._activations.expression import Expr
from lipbounds._tracing.flat import Flat, Value
from lipbounds._tracing.rules import Group, Linear


@dataclass(eq=False)
class Elementwise:
    """A tap to be: `expr` of the tensor `base`."""

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
        """The value that this one is another name of."""
        ...

    def half_formats(self) -> tuple[str, ...]:
        """The narrow formats through which values that reach the output are cast."""
        ...
