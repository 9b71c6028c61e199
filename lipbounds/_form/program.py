"""The static part of a form: linear steps and taps over registers, hashable by value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lipbounds._activations.expression import Expr
from lipbounds._form.steps import StaticArray

Params = tuple[tuple[str, Any], ...]
#: Kinds of group taps. Of each group, v is 1-Lipschitz in l1, l2 and l-inf: where it is differentiable the gradient of
#: max, min and logsumexp is nonnegative with sum 1, and a sort is a permutation.
GROUPS = ("max", "min", "sort", "logsumexp")


@dataclass(frozen=True)
class Op:
    """One linear step: `kind` is a key of `KINDS`. An operand i >= 0 is a register, -1 - j the leaf j."""

    kind: str
    params: Params
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Tap:
    """One nonlinearity: flat pre-activations y (the registers `inputs`, concatenated) to flat outputs v.

    Args:
        kind: "elementwise", or one of `GROUPS` over the rows of `groups`: "max", "min", "sort", "logsumexp".
        name: for people only ("relu").
        path: the call path, for people only; not part of equality.
        inputs, outputs: registers.
        shapes: of the outputs.
        size_in, size_out: lengths of y and v.
        expr, consts: elementwise only: the function, and its constants (leaf j as j, or a StaticArray).
        groups: (groups, width) table of indices into y.
        assumed: the slopes were declared by the user (`register_activation`).
        level: taps of one level do not depend on each other.
    """

    kind: str
    name: str
    path: str = field(compare=False)
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    size_in: int
    size_out: int
    expr: Expr | None = None
    consts: tuple[int | StaticArray, ...] = ()
    groups: StaticArray | None = None
    assumed: bool = False
    level: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("elementwise", *GROUPS):
            raise ValueError(f"there is no kind of tap called {self.kind!r}")
        if (self.groups is None) != (self.kind == "elementwise"):
            raise ValueError(f"a tap of kind {self.kind!r} has the wrong parts")


@dataclass(frozen=True)
class Program:
    """The static part of a form: a straight list of linear steps and taps over registers; register 0 is x.

    `half` names the formats narrower than float32 that x passes through, for the notes of bounds.
    """

    steps: tuple[Op | int, ...]  # an int k stands for tap k
    taps: tuple[Tap, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the registers
    output: int
    half: tuple[str, ...] = ()

    def __hash__(self) -> int:
        try:
            return self._hash  # type: ignore[attr-defined]
        except AttributeError:
            object.__setattr__(self, "_hash", hash((self.steps, self.taps, self.shapes, self.output)))
            return self._hash  # type: ignore[attr-defined]
