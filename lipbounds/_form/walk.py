"""Walk over a program, forward or in reverse, with the values and operations of an algebra.

A register without a value is zero, and a step whose inputs are all zero is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping, Sequence
from typing import Generic, TypeVar

from lipbounds._form.program import Op, Program

V = TypeVar("V")
Parts = Iterable[tuple[int, V]]


class Algebra(Generic[V]):
    """The operations of a walk on register values V; None is zero.

    A forward walk calls `step`, `tap`, `join` and `split`. A reverse walk calls `back`, `add`, and `tap`, `join` and
    `split` from the outputs of a tap to its inputs.
    """

    affine = False  #: Whether constants count, so that no step is skipped.

    def step(self, place: int, op: Op, held: Mapping[int, V]) -> V | None:
        """The output of a linear step."""
        raise NotImplementedError

    def back(self, place: int, op: Op, out: V) -> Parts[V]:
        """The transposed step: its contribution to each register that it reads."""
        raise NotImplementedError

    def tap(self, k: int, value: V | None) -> V | None:
        """Tap k on its joined inputs; in reverse on its joined outputs."""
        raise NotImplementedError

    def join(self, registers: Sequence[int], held: Mapping[int, V]) -> V:
        """The registers side by side, at least one of which holds a value."""
        raise NotImplementedError

    def split(self, value: V, registers: Sequence[int]) -> Parts[V]:
        """Split a joined value into its registers."""
        raise NotImplementedError

    def add(self, a: V, b: V) -> V:
        """The sum of two contributions to one register."""
        raise NotImplementedError


def walk(
    program: Program,
    algebra: Algebra[V],
    held: MutableMapping[int, V],
    *,
    places: range | None = None,
    reverse: bool = False,
    keep: bool = False,
) -> MutableMapping[int, V]:
    """Run the steps at `places` (all by default) on what the registers hold, and return `held`, which is changed.

    A forward walk drops registers after their last use unless `keep`; a reverse walk drops them once they are read.
    """
    places = range(len(program.steps)) if places is None else places
    for place in reversed(places) if reverse else places:
        op = program.steps[place]
        sources, targets = (op.outputs, op.reads) if reverse else (op.reads, op.outputs)
        arrived = any(r in held for r in sources)
        parts: Parts[V] = ()
        if place in program.tap_at:
            value = algebra.tap(program.tap_at[place], algebra.join(sources, held) if arrived else None)
            parts = () if value is None else algebra.split(value, targets)
        elif isinstance(op, Op) and (arrived or algebra.affine):
            if reverse:
                parts = algebra.back(place, op, held[op.output])
            else:
                value = algebra.step(place, op, held)
                parts = () if value is None else ((op.output, value),)
        for r in sources if reverse else ():
            held.pop(r, None)
        for r, part in parts:
            held[r] = algebra.add(held[r], part) if reverse and r in held else part
        for r in program.released[place] if not (reverse or keep) else ():
            held.pop(r, None)
    return held


def connected(
    program: Program,
    starts: Iterable[int],
    taps: Container[int],
    through: Callable[[int], bool],
    *,
    reverse: bool = False,
) -> set[int]:
    """The registers that depend on the registers `starts` or on the outputs of `taps`.

    In reverse: the registers that `starts` or the inputs of `taps` depend on. `through(k)` says whether a dependence
    passes tap k.
    """
    found = set(starts)
    for place in range(len(program.steps))[:: -1 if reverse else 1]:
        step, k = program.steps[place], program.tap_at.get(place)
        near, far = (step.outputs, step.reads) if reverse else (step.reads, step.outputs)
        if (k is not None and k in taps) or (any(r in found for r in near) and (k is None or through(k))):
            found.update(far)
    return found
