"""Blocks of the gain as matrices with an error: the host's side of a form.

The gain G of a form, after the loop transformation v = c y + q w, maps sources (the input x, or the w of taps) to
targets (the pre-activations y of taps, or the output z). A block G[target, source] is a product and sum of the steps'
matrices (`step_matrices`); `HostForm` multiplies them in float64 NumPy/SciPy and carries a normwise error
(`enclosures.Enclosure`), from the source or from the target, whichever side is smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from lipbounds._form.lure import LureForm
from lipbounds._form.program import Op
from lipbounds._gain.step_matrices import StepMatrix as StepMatrix
from lipbounds._gain.step_matrices import size_of
from lipbounds._gain.step_matrices import step_matrices as step_matrices
from lipbounds._norms import enclosures
from lipbounds._norms.enclosures import Enclosure

#: A source or target: () is the input (as a source) or the output (as a target), otherwise indices of taps.
Node = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TapScaling:
    """How a tap enters the gain: v = c y + q w and ||w|| <= ||e y|| for differences (vectors; q e covers the radius).

    Args:
        c: centre of the slope interval, per entry; None is zero.
        q: source coefficients, one per output entry.
        e: target coefficients, one per input entry.
    """

    c: np.ndarray | None
    q: np.ndarray
    e: np.ndarray


class HostForm:
    """A form with concrete constants, its steps as matrices, made when first needed."""

    def __init__(self, form: LureForm):
        if form.is_traced:
            raise TypeError("a form that is being traced has no matrices")
        self.program = form.program
        self.in_size = form.in_size
        self.num_outputs = form.num_outputs
        self.consts = [np.asarray(c) for c in form.consts]
        self._steps: dict[int, list[StepMatrix]] = {}
        self.proved: dict[Any, float] = {}  # norms already proved, by content

    def step(self, place: int) -> list[StepMatrix]:
        if place not in self._steps:
            op = self.program.steps[place]
            assert isinstance(op, Op)
            self._steps[place] = step_matrices(op, self.consts, self.program.shapes)
        return self._steps[place]

    def node_size(self, node: Node, *, source: bool) -> int:
        taps = self.program.taps
        if not node:
            return self.in_size if source else self.num_outputs
        return sum(taps[k].size_out if source else taps[k].size_in for k in node)

    # Sweeps keep, per register, an Enclosure of (register size, width), or nothing for zero.

    def forward(
        self, source: Node, targets: Iterable[Node], scalings: Sequence[TapScaling]
    ) -> dict[Node, Enclosure]:
        """{target: G[target, source]} by one pass from the source; targets that it does not reach are left out."""
        taps, wanted = self.program.taps, set(targets)
        alive = self._leading_to(wanted, scalings)
        width = self.node_size(source, source=True)
        registers: dict[int, Enclosure] = {}
        if not source:
            registers[0] = Enclosure(sp.eye_array(width, format="csr"))
        starts = self._starts(source, lambda k: taps[k].size_out)
        places = range(len(self.program.steps))
        seen = self._advance(places, registers, width, scalings, starts, alive)
        out: dict[Node, Enclosure] = {}
        for target in wanted:
            if not target:
                if self.program.output in registers:
                    out[target] = registers[self.program.output]
            elif any(k in seen for k in target):
                parts_ = [
                    enclosures.scale(seen[k], rows=scalings[k].e)
                    if k in seen
                    else Enclosure(sp.csr_array((taps[k].size_in, width)))
                    for k in target
                ]
                out[target] = enclosures.stack(parts_) if len(parts_) > 1 else parts_[0]
        return out

    def _advance(
        self,
        places: Iterable[int],
        registers: dict[int, Enclosure],
        width: int,
        scalings: Sequence[TapScaling],
        starts: dict[int, int],
        alive: set[int],
    ) -> dict[int, Enclosure]:
        """Run the steps on `registers`, which it changes; {tap: y}. `starts`: first column of a tap's own w."""
        seen: dict[int, Enclosure] = {}
        uses = self._last_uses()
        for place in places:
            step = self.program.steps[place]
            if isinstance(step, int):
                tap = self.program.taps[step]
                y = self._joined(
                    [registers.get(i) for i in tap.inputs], [self._rows(i) for i in tap.inputs], width
                )
                if y is not None:
                    seen[step] = y
                if any(r in alive for r in tap.outputs):
                    v = None
                    scaling = scalings[step]
                    if y is not None and scaling.c is not None:
                        v = enclosures.scale(y, rows=scaling.c)
                    if step in starts:
                        injected = sp.csr_array(
                            (scaling.q, (np.arange(tap.size_out), starts[step] + np.arange(tap.size_out))),
                            shape=(tap.size_out, width),
                        )
                        v = Enclosure(injected) if v is None else enclosures.add(v, Enclosure(injected))
                    self._split(v, tap.outputs, registers)
            elif step.output in alive:
                parts = [m.apply(registers[m.register]) for m in self.step(place) if m.register in registers]
                if parts:
                    registers[step.output] = enclosures.add(*parts)
            for r in uses.get(place, ()):
                if r != self.program.output:
                    registers.pop(r, None)
        return seen

    def between(
        self,
        registers: Sequence[int],
        ends: Sequence[int],
        places: Sequence[int],
        tap: int | None,
        scalings: Sequence[TapScaling],
    ) -> tuple[Enclosure, Enclosure | None, Enclosure | None]:
        """(A, B, W) of the stretch `places` from the state `registers` to the state `ends` across one tap.

        ends = A registers + B w and y = W registers for the tap's y and w (None without a tap): the linear maps of the
        state sequence, with v = c y + q w put in. Shapes (d+, d), (d+, n_out), (n_in, d).
        """
        alive = set(range(len(self.program.shapes)))
        passes: list[tuple[dict[int, Enclosure], int, dict[int, int]]] = []
        for r in registers:
            size = self._rows(r)
            passes.append(({r: Enclosure(sp.eye_array(size, format="csr"))}, size, {}))
        if tap is not None:
            passes.append(({}, self.program.taps[tap].size_out, {tap: 0}))
        arrived, inputs = [], []
        for start, width, starts in passes:
            held = dict(start)
            seen = self._advance(places, held, width, scalings, starts, alive)
            arrived.append(
                self._joined([held.get(r) for r in ends], [self._rows(r) for r in ends], width)
                or Enclosure(sp.csr_array((sum(self._rows(r) for r in ends), width)))
            )
            if tap is not None and not starts:
                size = self.program.taps[tap].size_in
                inputs.append(seen.get(tap, Enclosure(sp.csr_array((size, width)))))
        if tap is None:
            return enclosures.stack(arrived, axis=1), None, None
        return enclosures.stack(arrived[:-1], axis=1), arrived[-1], enclosures.stack(inputs, axis=1)

    def backward(
        self, target: Node, sources: Iterable[Node], scalings: Sequence[TapScaling]
    ) -> dict[Node, Enclosure]:
        """{source: G[target, source]'} (transposed) by one pass back from the target."""
        taps, wanted = self.program.taps, set(sources)
        reached = self._coming_from(wanted, scalings)
        width = self.node_size(target, source=False)
        registers: dict[int, Enclosure] = {}
        if not target:
            registers[self.program.output] = Enclosure(sp.eye_array(width, format="csr"))
        starts = self._starts(target, lambda k: taps[k].size_in)
        wanted_taps = {k for node in wanted for k in node}
        seen: dict[int, Enclosure] = {}
        for place in range(len(self.program.steps) - 1, -1, -1):
            step = self.program.steps[place]
            if isinstance(step, int):
                tap, scaling = taps[step], scalings[step]
                v = self._joined(
                    [registers.pop(r, None) for r in tap.outputs], [self._rows(r) for r in tap.outputs], width
                )
                y = None
                if v is not None:
                    if step in wanted_taps:
                        seen[step] = enclosures.scale(v, rows=scaling.q)
                    if scaling.c is not None:
                        y = enclosures.scale(v, rows=scaling.c)
                if step in starts:
                    start = sp.csr_array(
                        (scaling.e, (np.arange(tap.size_in), starts[step] + np.arange(tap.size_in))),
                        shape=(tap.size_in, width),
                    )
                    y = Enclosure(start) if y is None else enclosures.add(y, Enclosure(start))
                if y is not None:
                    begin = 0
                    for r in tap.inputs:
                        size = self._rows(r)
                        if r in reached:
                            part = y.select(rows=slice(begin, begin + size))
                            registers[r] = enclosures.add(registers[r], part) if r in registers else part
                        begin += size
            elif step.output in registers:
                out = registers.pop(step.output)
                for m in self.step(place):
                    if m.register in reached:
                        part = m.transposed.apply(out)
                        has = m.register in registers
                        registers[m.register] = enclosures.add(registers[m.register], part) if has else part
        result: dict[Node, Enclosure] = {}
        for source in wanted:
            if not source:
                if 0 in registers:
                    result[source] = registers[0]
            elif any(k in seen for k in source):
                parts = [
                    seen[k] if k in seen else Enclosure(sp.csr_array((taps[k].size_out, width)))
                    for k in source
                ]
                result[source] = enclosures.stack(parts) if len(parts) > 1 else parts[0]
        return result

    # -- which registers matter ---------------------------------------------------------------------------------------

    def _rows(self, register: int) -> int:
        return size_of(self.program.shapes[register])

    @staticmethod
    def _starts(node: Node, size: Any) -> dict[int, int]:
        starts, total = {}, 0
        for k in node:
            starts[k] = total
            total += size(k)
        return starts

    @staticmethod
    def _joined(parts: list[Enclosure | None], rows: list[int], width: int) -> Enclosure | None:
        if all(part is None for part in parts):
            return None
        if len(parts) == 1:
            return parts[0]
        return enclosures.stack(
            [
                Enclosure(sp.csr_array((n, width))) if part is None else part
                for part, n in zip(parts, rows, strict=True)
            ]
        )

    def _split(self, v: Enclosure | None, outputs: Sequence[int], registers: dict[int, Enclosure]) -> None:
        if v is None:
            return
        if len(outputs) == 1:
            registers[outputs[0]] = v
            return
        begin = 0
        for r in outputs:
            size = self._rows(r)
            registers[r] = v.select(rows=slice(begin, begin + size))
            begin += size

    def _last_uses(self) -> dict[int, list[int]]:
        last: dict[int, int] = {}
        for place, step in enumerate(self.program.steps):
            for i in self.program.taps[step].inputs if isinstance(step, int) else step.inputs:
                if i >= 0:
                    last[i] = place
        uses: dict[int, list[int]] = {}
        for register, place in last.items():
            uses.setdefault(place, []).append(register)
        return uses

    def _leading_to(self, targets: set[Node], scalings: Sequence[TapScaling]) -> set[int]:
        """Registers that influence one of the targets (through centres, where these are not zero)."""
        alive = {self.program.output} if () in targets else set()
        ends = {k for node in targets for k in node}
        for step in reversed(self.program.steps):
            if isinstance(step, int):
                tap = self.program.taps[step]
                through = scalings[step].c is not None and any(r in alive for r in tap.outputs)
                if step in ends or through:
                    alive.update(tap.inputs)
            elif step.output in alive:
                alive.update(i for i in step.inputs if i >= 0)
        return alive

    def _coming_from(self, sources: set[Node], scalings: Sequence[TapScaling]) -> set[int]:
        """Registers that one of the sources influences."""
        reached = {0} if () in sources else set()
        begins = {k for node in sources for k in node}
        for step in self.program.steps:
            if isinstance(step, int):
                tap = self.program.taps[step]
                through = scalings[step].c is not None and any(r in reached for r in tap.inputs)
                if step in begins or through:
                    reached.update(tap.outputs)
            elif any(i in reached for i in step.inputs if i >= 0):
                reached.add(step.output)
        return reached
