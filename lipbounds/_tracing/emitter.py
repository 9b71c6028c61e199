"""Write the decided equations as a program, in order, with registers and leaves counted from 0."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._activations import activations
from lipbounds._form.concrete import is_concrete
from lipbounds._form.program import Op, Program, Tap
from lipbounds._form.steps import StaticArray, static
from lipbounds._tracing.decided import Decided, Elementwise
from lipbounds._tracing.flat import Eqn, Value
from lipbounds._tracing.rules import Group, Linear


def constant_key(value: Value) -> tuple[str, Any]:
    """Equal scalars are one constant; arrays are distinguished by identity."""
    if value.shape == () and is_concrete(value.const) and jnp.issubdtype(value.dtype, jnp.floating):
        scalar = np.asarray(value.const)
        return ("scalar", (scalar.dtype.name, scalar.tobytes()))
    return ("array", id(value.const))


class Emitter:
    """Writes the decided equations in order, with registers and leaves counted from 0."""

    def __init__(self, lowering: Decided, needed: set[int]):
        self.low = lowering
        self.needed = needed
        self.registers: dict[int, int] = {lowering.flat.input.index: 0}
        self.shapes: list[tuple[int, ...]] = [lowering.flat.input.shape]
        self.levels: list[int] = [0]
        self.steps: list[Op | Tap] = []
        self.leaves: list[Any] = []
        self.leaf_places: dict[tuple[str, Any], int] = {}
        self.slopes: list[Any] = []
        self.pairs: dict[tuple[int, int], int] = {}

    def register(self, value: Value | None, shape: tuple[int, ...], level: int) -> int:
        place = len(self.shapes)
        if value is not None:
            self.registers[value.index] = place
        self.shapes.append(shape)
        self.levels.append(level)
        return place

    def leaf(self, value: Value) -> int:
        key = constant_key(value)
        if key not in self.leaf_places:
            self.leaf_places[key] = len(self.leaves)
            const = value.const
            if is_concrete(const) and not isinstance(const, jax.Array):
                const = np.array(const)  # the caller may modify its array later
            self.leaves.append(const)
        return self.leaf_places[key]

    def operand(self, value: Value) -> int:
        if value.depends:
            return self.registers[self.low.resolve(value).index]
        return -1 - self.leaf(value)

    def run(self, output: Value) -> tuple[Program, tuple[Any, ...], tuple[Any, ...], dict[int, int]]:
        """Program, leaves, slopes, and the register of each flat value that has one."""
        for eqn in self.low.flat.eqns:
            for value in eqn.outputs:
                if value.index not in self.needed or value.index in self.registers:
                    continue
                if value.index in self.low.linear:
                    self.emit_linear(self.low.linear[value.index], eqn, value)
                elif value.index in self.low.taps:
                    self.emit_tap(self.low.taps[value.index], eqn, value)
        if output.depends:
            last = self.registers[self.low.resolve(output).index]
        else:
            last = self.register(output, output.shape, 0)
            self.steps.append(Op("constant", (), (-1 - self.leaf(output),), last))
        program = Program(tuple(self.steps), tuple(self.shapes), last, self.low.half_formats())
        return program, tuple(self.leaves), tuple(self.slopes), self.registers

    def emit_linear(self, part: Linear, eqn: Eqn, value: Value) -> None:
        inputs = tuple(self.operand(eqn.inputs[j]) for j in part.operands)
        level = max((self.levels[i] for i in inputs if i >= 0), default=0)
        params = tuple(sorted((k, static(v)) for k, v in part.params.items()))
        self.steps.append(Op(part.kind, params, inputs, self.register(value, value.shape, level)))

    def emit_tap(self, found: Elementwise | Group, eqn: Eqn, value: Value) -> None:
        if not isinstance(found, Group):
            fields: dict[str, Any] = dict.fromkeys(("size_in", "size_out"), math.prod(value.shape))
            consts = [v.const for v in found.consts]
            known = all(map(is_concrete, consts))
            fields |= dict(kind="elementwise", expr=found.expr, assumed=found.assumed)
            fields["name"] = activations.known_name(found.expr, consts) if known else "prelu"
            fields["consts"] = tuple(self.tap_constant(v) for v in found.consts)
            source = self.registers[self.low.resolve(found.base).index]
            self.add_tap(fields, (source,), [value], eqn, found.slopes)
            return
        sources = tuple(self.registers[self.low.resolve(v).index] for v in eqn.inputs)
        size_in = sum(int(np.prod(self.shapes[s])) for s in sources)
        mode, name, values = found.mode, eqn.primitive, [value]
        if name in ("max", "min") and len(sources) == 2 and found.index.size == size_in:
            twin = self.twin(eqn, sources)
            if twin is not None:  # max and min of one pair are one permutation: 1-Lipschitz together
                values = [twin, value] if name == "max" else [value, twin]
                mode, name = "sort", "maxmin"
        size_out = found.index.size if mode == "sort" else len(found.index)
        fields = dict(
            kind=mode, name=name, size_in=size_in, size_out=size_out, groups=StaticArray(found.index)
        )
        self.add_tap(fields, sources, values, eqn, ())

    def twin(self, eqn: Eqn, sources: tuple[int, ...]) -> Value | None:
        """The min beside this max (or the reverse) over the same two tensors."""
        other = "min" if eqn.primitive == "max" else "max"
        for candidate in self.low.flat.eqns:
            if candidate.primitive != other or candidate.outputs[0].index not in self.needed:
                continue
            if not isinstance(self.low.taps.get(candidate.outputs[0].index), Group):
                continue
            operands = {self.low.resolve(v).index for v in candidate.inputs}
            if {self.registers.get(i) for i in operands} == set(sources):
                return candidate.outputs[0]
        return None

    def tap_constant(self, value: Value) -> int | StaticArray:
        if is_concrete(value.const) and not jnp.issubdtype(value.dtype, jnp.floating):
            return StaticArray(np.asarray(value.const))
        return self.leaf(value)

    def add_tap(
        self, fields: dict[str, Any], sources: tuple[int, ...], values: list[Value], eqn: Eqn, slopes: Any
    ) -> None:
        level = max(self.levels[s] for s in sources)
        outputs = tuple(self.register(v, v.shape, level + 1) for v in values)
        shapes = tuple(v.shape for v in values)
        self.steps.append(
            Tap(path=eqn.path, inputs=sources, outputs=outputs, shapes=shapes, level=level, **fields)
        )
        self.slopes.append(slopes)
