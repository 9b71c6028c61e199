"""The static part of a form: linear steps and taps over registers, hashable by value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

import numpy as np

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

    @property
    def reads(self) -> tuple[int, ...]:
        """Its operands that are registers."""
        return tuple(i for i in self.inputs if i >= 0)

    @property
    def outputs(self) -> tuple[int, ...]:
        return (self.output,)


@dataclass(frozen=True)
class Tap:
    """One nonlinearity: flat pre-activations y (the registers `inputs`, concatenated) to flat outputs v.

    Args:
        kind: "elementwise", or one of `GROUPS` over the rows of `groups`: "max", "min", "sort", "logsumexp".
        name: for display only ("relu").
        path: the call path, for display only; not part of equality.
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
            raise ValueError(f"a tap of kind {self.kind!r} needs groups if and only if it is not elementwise")

    @property
    def reads(self) -> tuple[int, ...]:
        return self.inputs

    def constants(self, leaves: Sequence[Any]) -> list[Any]:
        """The constants of `expr`, from the leaves of a form."""
        return [c.array if isinstance(c, StaticArray) else leaves[c] for c in self.consts]

    def constants_by_entry(self, leaves: Sequence[Any]) -> list[Any]:
        """The same, arrays as (size_in,): an entry for each of y."""
        found = self.constants(leaves)
        return [np.broadcast_to(c, self.shapes[0]).reshape(-1) if np.ndim(c) else c for c in found]


@dataclass(frozen=True)
class Program:
    """The static part of a form: a straight list of linear steps and taps over registers; register 0 is x.

    Args:
        steps: in order; a register is written once, before it is read.
        shapes: of the registers.
        output: the register of z.
        half: the formats narrower than float32 that x passes through, for the notes of bounds.
    """

    steps: tuple[Op | Tap, ...]
    shapes: tuple[tuple[int, ...], ...]
    output: int
    half: tuple[str, ...] = ()

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """The taps in order: tap k is the k-th."""
        return tuple(step for step in self.steps if isinstance(step, Tap))

    @cached_property
    def tap_places(self) -> tuple[int, ...]:
        """Per tap, its place among the steps."""
        return tuple(place for place, step in enumerate(self.steps) if isinstance(step, Tap))

    @cached_property
    def tap_at(self) -> dict[int, int]:
        """{place: k} of the taps."""
        return {place: k for k, place in enumerate(self.tap_places)}

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of every register."""
        return tuple(int(np.prod(shape)) for shape in self.shapes)

    def places_of(self, registers: Iterable[int]) -> Iterator[tuple[int, slice]]:
        """(register, its entries) where registers stand side by side in one vector."""
        start = 0
        for r in registers:
            yield r, slice(start, start + self.sizes[r])
            start += self.sizes[r]

    @cached_property
    def written(self) -> dict[int, int]:
        """The place of the step that writes a register; -1 for x."""
        return {0: -1} | {r: place for place, step in enumerate(self.steps) for r in step.outputs}

    @cached_property
    def last_read(self) -> dict[int, int]:
        """The place of the last step that reads a register; the end for the output."""
        reads = {r: place for place, step in enumerate(self.steps) for r in step.reads}
        return reads | {self.output: len(self.steps)}

    @cached_property
    def released(self) -> tuple[tuple[int, ...], ...]:
        """Per place, the registers that are read there for the last time."""
        found: list[tuple[int, ...]] = [()] * (len(self.steps) + 1)
        for r, place in self.last_read.items():
            found[place] += (r,)
        return tuple(found)

    @cached_property
    def coefficients(self) -> frozenset[int]:
        """The leaves that linear steps read; the others belong to taps."""
        return frozenset(-1 - i for step in self.steps for i in step.inputs if i < 0)

    def alive(self, place: int) -> tuple[int, ...]:
        """The registers written before step `place` and read at or after it."""
        return tuple(r for r, at in sorted(self.written.items()) if at < place <= self.last_read.get(r, -1))

    @cached_property
    def _hash(self) -> int:
        return hash((self.steps, self.shapes, self.output))

    def __hash__(self) -> int:
        return self._hash


def described(value: Any) -> Iterator[bytes]:
    """A program, or a part of one, as bytes: the same for equal values, in every process.

    Python's own `hash` of strings differs between processes.
    """
    if isinstance(value, StaticArray):
        yield f"array{value.array.shape}{value.array.dtype.str}".encode()
        yield value.array.tobytes()
    elif isinstance(value, tuple):
        yield f"({len(value)}".encode()
        for one in value:
            yield from described(one)
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        for one in fields(value):
            if one.compare:
                yield from described(getattr(value, one.name))
    else:
        named = isinstance(value, type) or callable(value)
        text = f"{value.__module__}.{value.__qualname__}" if named else repr(value)
        yield f"{len(text)}{text}".encode()
