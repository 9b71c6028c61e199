"""Blocks of the gain as matrices with an error bound, computed on the host.

The gain G of a form, after the loop transformation v = c y + q w, maps sources (the input x, or the w of taps) to
targets (the pre-activations y of taps, or the output z). A block G[target, source] is a product and sum of the steps'
matrices (`step_matrices`); `HostForm` multiplies them in float64 NumPy/SciPy and carries a normwise error
(`enclosures.Enclosure`), from the source or from the target, whichever side is smaller.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from lipbounds._form.lure import LureForm, state_sequence
from lipbounds._form.program import Op
from lipbounds._form.walk import Algebra, connected, walk
from lipbounds._gain.step_matrices import StepMatrix, step_matrices
from lipbounds._norms import enclosures
from lipbounds._norms.enclosures import Enclosure
from lipbounds._text.progress import alive

#: A source or target: () is the input (as a source) or the output (as a target), otherwise indices of taps.
Node = tuple[int, ...]
Pair = tuple[Node, Node]  # (source, target) of a block
Sweep = tuple[Node, list[Node], bool]  # a node, its partners, and whether it is their target


@dataclass(frozen=True, eq=False)
class TapScaling:
    """Loop transformation of a tap: v = c y + q w with ||w|| <= ||e y|| for differences (q e covers the radius).

    Args:
        c: centre of the slope interval, per entry; None is zero.
        q: source coefficients, one per output entry.
        e: target coefficients, one per input entry.
    """

    c: np.ndarray | None
    q: np.ndarray
    e: np.ndarray


def by_smaller_side(host: HostForm, pairs: Sequence[Pair]) -> list[Sweep]:
    """The sweeps that give these blocks, each from its smaller side."""
    groups: dict[tuple[Node, bool], list[Node]] = {}
    for source, target in pairs:
        rows, columns = host.block_shape((source, target))
        reverse = columns > rows
        groups.setdefault((target, True) if reverse else (source, False), []).append(
            source if reverse else target
        )
    ordered = sorted(groups.items(), key=lambda group: group[0][1])
    return [(node, others, reverse) for (node, reverse), others in ordered]


class HostForm:
    """A form with concrete constants and its steps as matrices, built when first needed."""

    def __init__(self, form: LureForm):
        if form.is_traced:
            raise TypeError("a form that is being traced has no matrices")
        self.program = form.program
        self.in_size = form.in_size
        self.num_outputs = form.num_outputs
        self.consts = [np.asarray(c) for c in form.consts]
        self.built: dict[int, list[StepMatrix]] = {}
        self.live: list[np.ndarray] | None = None  # per tap, a mask of the outputs that matter
        # Each with the notes about its proof (`_text.device.remembered`), by content: norms that were proved,
        self.proved: dict[Any, tuple[Any, list[str]]] = {}
        self.formed: dict[Any, tuple[Any, list[str]]] = {}  # those of blocks that were formed,
        self.quick: dict[Any, tuple[Any, list[str]]] = {}  # and quick proofs of wide blocks.
        self.searches: dict[Any, Any] = {}  # norms of wide blocks that steps may still refine, by content

    def step(self, place: int) -> list[StepMatrix]:
        if place not in self.built:
            op = self.program.steps[place]
            assert isinstance(op, Op)
            self.built[place] = step_matrices(op, self.consts, self.program.shapes)
        return self.built[place]

    def node_size(self, node: Node, *, source: bool) -> int:
        taps = self.program.taps
        if not node:
            return self.in_size if source else self.num_outputs
        return sum(taps[k].size_out if source else taps[k].size_in for k in node)

    def block_shape(self, pair: Pair) -> tuple[int, int]:
        return self.node_size(pair[1], source=False), self.node_size(pair[0], source=True)

    # -- sweeps ------------------------------------------------------------------------------------------------------

    def forward(
        self, source: Node, targets: Iterable[Node], scalings: Sequence[TapScaling]
    ) -> dict[Node, Enclosure]:
        """{target: G[target, source]} by one pass from the source; targets that it does not reach are left out."""
        wanted = set(targets)
        width = self.node_size(source, source=True)
        held = {} if source else {0: Enclosure(sp.eye_array(width, format="csr"))}
        sweep = Forward(self, width, scalings, self.leading_to(wanted, scalings), self.starts(source, True))
        walk(self.program, sweep, held)
        ends = ((target, sweep.at(target, held)) for target in wanted)
        return {target: block for target, block in ends if block is not None}

    def backward(
        self, target: Node, sources: Iterable[Node], scalings: Sequence[TapScaling]
    ) -> dict[Node, Enclosure]:
        """{source: G[target, source]'} (transposed) by one pass back from the target."""
        wanted = set(sources)
        width = self.node_size(target, source=False)
        held = {} if target else {self.program.output: Enclosure(sp.eye_array(width, format="csr"))}
        sweep = Backward(
            self, width, scalings, self.coming_from(wanted, scalings), self.starts(target, False)
        )
        sweep.wanted = {k for node in wanted for k in node}
        walk(self.program, sweep, held, reverse=True)
        ends = ((source, sweep.at(source, held)) for source in wanted)
        return {source: block for source, block in ends if block is not None}

    def state_maps(
        self, scalings: Sequence[TapScaling]
    ) -> Iterator[tuple[Enclosure, Enclosure | None, Enclosure | None]]:
        """(A, B, W) of the state sequence: s_0 = A x first, then s_{k+1} = A s_k + B w_k and y_k = W s_k per tap k.

        The taps are v = c y + q w. B and W of the first are None. Shapes (d+, d), (d+, n_out), (n_in, d).
        """
        cuts = state_sequence(self.program)
        yield self._between((0,), cuts[0].registers, range(cuts[0].step), None, scalings)
        for k, (here, there) in enumerate(itertools.pairwise(cuts)):
            places = range(here.step, there.step)
            yield self._between(here.registers, there.registers, places, k, scalings)

    def _between(
        self,
        registers: Sequence[int],
        ends: Sequence[int],
        places: range,
        tap: int | None,
        scalings: Sequence[TapScaling],
    ) -> tuple[Enclosure, Enclosure | None, Enclosure | None]:
        everything = set(range(len(self.program.shapes)))

        def arrive(held: dict[int, Enclosure], width: int, starts: dict[int, int]) -> tuple[Enclosure, Any]:
            sweep = Forward(self, width, scalings, everything, starts)
            walk(self.program, sweep, held, places=places)
            sizes = [self.program.sizes[r] for r in ends]
            return sweep.stacked([held.get(r) for r in ends], sizes) or sweep.zero(sum(sizes)), sweep.seen

        arrived, inputs = [], []
        for r in registers:
            width = self.program.sizes[r]
            end, seen = arrive({r: Enclosure(sp.eye_array(width, format="csr"))}, width, {})
            arrived.append(end)
            if tap is not None:
                none = Enclosure(sp.csr_array((self.program.taps[tap].size_in, width)))
                inputs.append(seen.get(tap, none))
        whole = enclosures.stack(arrived, axis=1)
        if tap is None:
            return whole, None, None
        own, _ = arrive({}, self.program.taps[tap].size_out, {tap: 0})
        return whole, own, enclosures.stack(inputs, axis=1)

    # -- which registers matter ---------------------------------------------------------------------------------------

    def starts(self, node: Node, source: bool) -> dict[int, int]:
        """{tap: its first entry} of a node's taps."""
        sizes = [self.node_size((k,), source=source) for k in node]
        return dict(zip(node, itertools.accumulate([0, *sizes]), strict=False))

    def leading_to(self, targets: Iterable[Node], scalings: Sequence[TapScaling]) -> set[int]:
        """Registers that influence one of the targets (through centres, where these are not zero)."""
        targets = set(targets)
        ends = {k for node in targets for k in node}
        start = {self.program.output} if () in targets else ()
        return connected(self.program, start, ends, lambda k: scalings[k].c is not None, reverse=True)

    def coming_from(self, sources: Iterable[Node], scalings: Sequence[TapScaling]) -> set[int]:
        """Registers that one of the sources influences."""
        sources = set(sources)
        begins = {k for node in sources for k in node}
        start = {0} if () in sources else ()
        return connected(self.program, start, begins, lambda k: scalings[k].c is not None)


class _Sweep(Algebra[Enclosure]):
    """Registers as enclosures of (register size, width); those not in `alive` are left out.

    w (in reverse y) of the taps in `starts` is put into the columns from their start on.
    """

    def __init__(
        self,
        host: HostForm,
        width: int,
        scalings: Sequence[TapScaling],
        alive: set[int],
        starts: dict[int, int],
    ) -> None:
        self.host, self.program, self.width = host, host.program, width
        self.scalings, self.alive, self.starts = scalings, alive, starts
        self.seen: dict[int, Enclosure] = {}

    def zero(self, rows: int) -> Enclosure:
        return Enclosure(sp.csr_array((rows, self.width)))

    def join(self, registers: Sequence[int], held: Mapping[int, Enclosure]) -> Enclosure:
        whole = self.stacked([held.get(r) for r in registers], [self.program.sizes[r] for r in registers])
        assert whole is not None
        return whole

    def split(self, value: Enclosure, registers: Sequence[int]) -> Iterator[tuple[int, Enclosure]]:
        for r, place in self.program.places_of(registers):
            if r in self.alive:
                yield r, value if len(registers) == 1 else value.select(rows=place)

    def add(self, a: Enclosure, b: Enclosure) -> Enclosure:
        return enclosures.add(a, b)

    def own(self, k: int, through: Enclosure | None, factors: np.ndarray) -> Enclosure | None:
        """`through`, with diag(factors) added in the columns of tap k where it is a start."""
        if k not in self.starts:
            return through
        rows = np.arange(factors.size)
        entries = (factors, (rows, self.starts[k] + rows))
        begun = Enclosure(sp.csr_array(entries, shape=(factors.size, self.width)))
        return begun if through is None else enclosures.add(through, begun)

    def stacked(self, parts: Sequence[Enclosure | None], sizes: Sequence[int]) -> Enclosure | None:
        """Blocks below each other, None for zero."""
        if all(part is None for part in parts):
            return None
        whole = [self.zero(n) if part is None else part for part, n in zip(parts, sizes, strict=True)]
        return enclosures.stack(whole) if len(whole) > 1 else whole[0]


class Forward(_Sweep):
    """G from a source. `seen`: {tap: y}."""

    def step(self, place: int, op: Op, held: Mapping[int, Enclosure]) -> Enclosure | None:
        alive()
        if op.output not in self.alive:
            return None
        parts = [m.apply(held[m.register]) for m in self.host.step(place) if m.register in held]
        return enclosures.add(*parts) if parts else None

    def tap(self, k: int, value: Enclosure | None) -> Enclosure | None:
        if value is not None:
            self.seen[k] = value
        if not any(r in self.alive for r in self.program.taps[k].outputs):
            return None
        c, q = self.scalings[k].c, self.scalings[k].q
        return self.own(k, None if value is None or c is None else enclosures.scale(value, rows=c), q)

    def at(self, target: Node, held: Mapping[int, Enclosure]) -> Enclosure | None:
        """G[target, source] after the walk; None for zero."""
        if not target:
            return held.get(self.program.output)
        ends = [
            enclosures.scale(self.seen[k], rows=self.scalings[k].e) if k in self.seen else None
            for k in target
        ]
        return self.stacked(ends, [self.program.taps[k].size_in for k in target])


class Backward(_Sweep):
    """G' from a target. `seen`: {tap: its part of G'} of the taps `wanted`."""

    wanted: set[int]

    def back(self, place: int, op: Op, out: Enclosure) -> Iterator[tuple[int, Enclosure]]:
        for m in self.host.step(place):
            alive()
            if m.register in self.alive:
                yield m.register, m.transposed.apply(out)

    def tap(self, k: int, value: Enclosure | None) -> Enclosure | None:
        c, q, e = self.scalings[k].c, self.scalings[k].q, self.scalings[k].e
        if value is not None and k in self.wanted:
            self.seen[k] = enclosures.scale(value, rows=q)
        return self.own(k, None if value is None or c is None else enclosures.scale(value, rows=c), e)

    def at(self, source: Node, held: Mapping[int, Enclosure]) -> Enclosure | None:
        """G[target, source]' after the walk; None for zero."""
        if not source:
            return held.get(0)
        return self.stacked(
            [self.seen.get(k) for k in source], [self.program.taps[k].size_out for k in source]
        )
