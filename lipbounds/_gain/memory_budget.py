"""Parse a memory budget, choose proofs of block norms that fit, report their use.

A budget covers the arrays of one proof at a time: the block as it is formed and stored, its copies, the Gram matrix or
the window of the banded factor, the vectors of Golub-Kahan. It does not cover Python, JAX, the network and its own
steps as sparse matrices, which every mode holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp

from lipbounds._form.lure import LureForm, state_sequence
from lipbounds._form.program import Op, Program
from lipbounds._form.walk import walk
from lipbounds._gain.blocks import Forward, HostForm, Node, Pair, TapScaling
from lipbounds._norms import banded_cholesky, enclosures
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.rounding import mul_up

#: With a budget and guarantee="auto", a proof of more operations than this is left to Golub-Kahan.
MOST_FLOPS = 5e12
MOST_STEPS = 300  # of Golub-Kahan
_LEAST_STEPS, _SPARE_VECTORS = 8, 8
_PILOT = 64  # columns from which the size of a block is estimated
_ENTRY = 16  # bytes of a stored nonzero with the widest index
_NAMED = 4  # blocks that a note names
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse(memory: Any) -> int | None:
    """Bytes of a budget: None, an int of bytes, or a text such as "2GB", "500 MB", "1.5GiB"; else ValueError."""
    if memory is None:
        return None
    size = None
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)b\s*", memory.lower())
        if match is not None and not (match[3] and not match[2]):
            size = float(match[1]) * (1024.0 if match[3] else 1000.0) ** _UNITS[match[2]]
    elif isinstance(memory, (int, np.integer)) and not isinstance(memory, bool):
        size = float(memory)
    if size is None or not 1 <= size < 2.0**63:
        raise ValueError(
            f"memory must be a number of bytes >= 1 or a text such as '2GB', '500 MB' or '1.5GiB', got {memory!r}"
        )
    return int(size)


def show(size: float) -> str:
    """Bytes as "1.1 GB", rounded up to two digits (three from 100 on)."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B" or value > 9.9:
        return f"{math.ceil(value - 1e-9)} {unit}"
    return f"{math.ceil(10 * value - 1e-9) / 10:.1f} {unit}"


#: Bytes of the pairs of all classes where no budget is given.
_PAIRS = 2**32


def check_pairs(count: int, budget: Budget | None) -> None:
    """ValueError where arrays over all pairs of classes, about four at a time, do not fit the budget."""
    need, limit = 4 * 8 * count * count, _PAIRS if budget is None else budget.limit
    if need > limit:
        raise ValueError(
            f"the pairs of {count} outputs take about {show(need)}, more than {show(limit)}"
            + (": " if budget is None else " (memory): ")
            + "leave pairwise=True out (sqrt2() or any_pair() of the bound holds for every pair), or keep fewer outputs"
        )


def of_ellipsoids(view: LureForm) -> tuple[int, float]:
    """(bytes, operations) of the ellipsoid recursion around one example, on an elementwise view; upper estimates.

    At a tap with n neurons, m of them and of the state that lives on, and d entries behind it, the largest arrays are
    Q (m, m), P Q (d, m) and two of the size of the active neurons (n, n), or two of (n, d) and one of (d, d). A factor
    (n, n) and a solution (n, d) are kept to the end. The operations are those of the proof, without products with the
    layers.
    """
    cuts = state_sequence(view.program)
    most, kept, work = 0, 0, 0.0
    for tap, here, behind in zip(view.taps, cuts, cuts[1:], strict=False):
        n, d = tap.size_in, behind.width
        m = n if here.width == n else n + d
        kept += n * n + n * d
        most = max(most, kept + m * m + d * m + max(n * m, 2 * n * n, n * d + d * d))
        work += 2 * n**3 / 3 + float(n) * n * d + float(n) * d * d
    return 8 * most, work


@dataclass(eq=False)
class Budget:
    """The limit in bytes, and its use so far."""

    limit: int
    largest: int = 0  # need of the largest proof that was done
    refused: dict[str, str] = field(default_factory=dict)  # block: why it was not proved

    def spend(self, need: int) -> str:
        self.largest = max(self.largest, need)
        return show(need)

    def rows(self, need: int) -> str:
        """Charge the rows to the outputs, which every mode forms and proves."""
        if need > self.limit:
            raise ValueError(
                f"memory={show(self.limit)} is too small: the rows to the outputs take {show(need)} in every mode"
            )
        return self.spend(need)

    def steps(self, vector: int) -> int:
        """The number of Golub-Kahan steps that fit, at `vector` entries each; ValueError if there are too few."""
        steps = min(MOST_STEPS, self.limit // (8 * vector) - _SPARE_VECTORS)
        if steps < _LEAST_STEPS:
            least = self.vectors(vector, _LEAST_STEPS)
            raise ValueError(
                f"memory={show(self.limit)} is too small for any bound of this network: {_LEAST_STEPS} steps of "
                f"Golub-Kahan on a block of {vector} inputs and outputs take {show(least)}; give at least that"
            )
        return steps

    @staticmethod
    def vectors(vector: int, steps: int) -> int:
        return 8 * vector * (steps + _SPARE_VECTORS)

    def notes(self, host: HostForm) -> tuple[str, ...]:
        steps = sum(banded_cholesky.stored(m.matrix) for each in host.built.values() for m in each)
        said = [
            f"memory budget {show(self.limit)}, largest need {show(self.largest)} (without the network's steps as "
            f"matrices, {show(steps)})"
        ]
        if self.refused:
            some = [f"{name} {why}" for name, why in list(self.refused.items())[:_NAMED]]
            more = len(self.refused) - len(some)
            some += [f"{more} more"] * (more > 0)
            said.append(f"without a Cholesky proof ({len(self.refused)} blocks): " + "; ".join(some))
        return tuple(said)


# --- forming a block within a budget -------------------------------------------------------------------------------


class TooLarge(Exception):
    pass


class Watched(dict[int, Enclosure]):
    """Registers of a sweep with their peak size in bytes; raises TooLarge above the limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit, self.peak = limit, 0

    def __setitem__(self, register: int, value: Enclosure) -> None:
        super().__setitem__(register, value)
        self.peak = max(self.peak, sum(_bytes(m) for m in self.values()))
        if self.peak > self.limit:
            raise TooLarge


def _bytes(m: Enclosure) -> int:
    """Entries of a matrix in bytes, without the row pointers, which slices of columns all share."""
    return (_ENTRY if m.sparse else 8) * m.stored


def _columns(
    host: HostForm,
    source: Node,
    target: Node,
    scalings: Sequence[TapScaling],
    chosen: np.ndarray,
    limit: float,
) -> tuple[Enclosure, int]:
    """(G[target, source] in the columns `chosen`, bytes that its sweep held)."""
    width, place = chosen.size, np.arange(chosen.size)
    sweep = Forward(host, width, scalings, host.leading_to([target], scalings), {})
    held = Watched(limit)
    if not source:
        held[0] = Enclosure(sp.csr_array((np.ones(width), (chosen, place)), shape=(host.in_size, width)))
    for k, begin in host.starts(source, True).items():
        q = scalings[k].q
        mine = (chosen >= begin) & (chosen < begin + q.size)
        rows = chosen[mine] - begin
        start = Enclosure(sp.csr_array((q[rows], (rows, place[mine])), shape=(q.size, width)))
        for register, part in sweep.split(start, host.program.taps[k].outputs):
            held[register] = part
    walk(host.program, sweep, held)
    return sweep.at(target, held) or sweep.zero(host.node_size(target, source=False)), held.peak


def formed(
    host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling], limit: int
) -> tuple[Enclosure | None, str]:
    """(G[target, source], ""), or (None, what a proof needs in words) where that exceeds the limit.

    Blocks that fit as dense arrays are swept at once, from the smaller side. Otherwise the bytes of a column, stored
    and during the sweep, are estimated from a few columns. The block is then formed by slices of columns, until it is
    complete or exceeds the budget.
    """
    m, n = host.block_shape((source, target))
    largest = max(host.program.sizes)
    if 8 * 3 * min(m, n) * largest <= limit // 2:
        if n <= m:
            whole = host.forward(source, [target], scalings).get(target)
        else:
            columns = host.backward(target, [source], scalings).get(source)
            whole = None if columns is None else columns.T
        return whole or Enclosure(sp.csr_array((m, n))), ""
    pilot = np.unique(np.linspace(0, n - 1, min(n, _PILOT)).astype(np.int64))
    try:
        block, peak = _columns(host, source, target, scalings, pilot, limit / 2)
        total = _bytes(block) * n // pilot.size
        if 3 * total > limit:
            return None, f"about {show(3 * total)}"
        width = max(1, min(n, int(limit / 4 * pilot.size / max(peak, 1))))
        slices, held = [], 0
        for lo in range(0, n, width):
            chosen = np.arange(lo, min(lo + width, n))
            block, _ = _columns(host, source, target, scalings, chosen, limit / 2)
            slices.append(block)
            held += _bytes(block)
            if 3 * held > limit:
                return None, f"about {show(3 * held * n / min(lo + width, n))}"
    except TooLarge:
        return None, f"more than {show(limit)}"
    return enclosures.stack(slices, axis=1), ""


@dataclass(frozen=True)
class Proved:
    """The norm of a block by a proof that the budget allowed; `error` is the block's own."""

    value: float
    how: str
    shape: tuple[int, int]
    error: float


def proofs(
    host: HostForm,
    pairs: Sequence[Pair],
    scalings: Sequence[TapScaling],
    budget: Budget,
    *,
    forced: bool,
    prove: Callable[[Enclosure, banded_cholesky.Plan], float],
    name: Callable[[Pair], str],
) -> tuple[dict[Pair, Proved], dict[Pair, tuple[float, int] | None]]:
    """(proved, left): the blocks whose proof fits the budget, and the others with their `convolution` bound or None.

    The largest blocks come first, so that a budget that is too small fails early. A proof of more than
    `MOST_FLOPS` operations is left too, unless proofs are `forced`; then a block without any is a ValueError.
    """
    proved: dict[Pair, Proved] = {}
    left: dict[Pair, tuple[float, int] | None] = {}
    needs: dict[Pair, str] = {}
    for pair in sorted(pairs, key=lambda pair: math.prod(host.block_shape(pair)), reverse=True):
        block, need = formed(host, *pair, scalings, budget.limit)
        if block is not None:
            plan = enclosures.enclosure_plan(block, budget.limit)
            need = show(plan.memory)
            if plan.memory <= budget.limit and (forced or plan.flops <= MOST_FLOPS):
                if not (forced and needs):
                    how = f"{plan.name}, {budget.spend(plan.memory)}"
                    proved[pair] = Proved(prove(block, plan), how, block.shape, block.error)
                continue
            if plan.memory <= budget.limit:
                need = f"{plan.flops:.1g} operations, more than {MOST_FLOPS:.0g}"
        block = None
        left[pair] = convolution(host, *pair, scalings, budget.limit)
        budget.refused[name(pair)] = f"needs {need}"
        if left[pair] is None:
            needs[pair] = need
    if forced and needs:
        listed = "; ".join(f"{name(pair)} needs {need}" for pair, need in needs.items())
        raise ValueError(
            f"guarantee='verified' with memory={show(budget.limit)}: no proof fits for {len(needs)} of {len(pairs)} "
            f"blocks: {listed}. Give a larger memory, or ask for guarantee='probabilistic' (or 'auto')"
        )
    return proved, left


# --- one convolution -----------------------------------------------------------------------------------------------


def convolution(
    host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling], limit: int
) -> tuple[float, int] | None:
    """(bound, bytes): a verified bound of a block that is one zero-padded convolution, by its Fourier transform.

    The block must be e A S q with one number q (or 0) at the source, one number e (or 0) at the target, A the
    convolution and S steps that select or move entries, each at most once (||S|| <= 1); else None, also where the bytes
    exceed the limit.
    """
    taps, program = host.program.taps, host.program
    if len(target) != 1 or len(source) > 1:
        return None
    factors = [np.ones(1) if not source else scalings[source[0]].q, scalings[target[0]].e]
    sizes = [np.abs(f[f != 0.0]) for f in factors]
    if any(f.size == 0 or f.min() != f.max() for f in sizes):
        return None
    ends = set(taps[source[0]].outputs) if source else {0}
    reached = host.coming_from({source}, scalings)
    moved = _Moved.whole(program, [i for i in taps[target[0]].inputs if i in reached])
    bound, need = None, 0
    while left := moved.registers - ends:
        register = max(left, key=lambda i: program.written[i] if i else -1)
        op = program.steps[program.written[register]] if register else None
        if not isinstance(op, Op):
            return None
        parts = [part for part in host.step(program.written[register]) if part.register in reached]
        if len(parts) == 1 and parts[0].bound is not None:
            if bound is not None or moved.registers != {register} or moved.repeats:
                return None
            bound, need = parts[0].bound, _transform_bytes(host, op)
            moved = _Moved.whole(program, [parts[0].register])
            continue
        before = moved.before(register, {part.register: part.rows for part in parts})
        if before is None or len({part.register for part in parts}) < len(parts):
            return None
        moved = before
    if bound is None or need > limit or moved.repeats:
        return None
    return mul_up(*(float(f[0]) for f in sizes), bound()), need


@dataclass(frozen=True, eq=False)
class _Moved:
    """A vector whose entries are entries of registers: `indices[i]` of register `origins[i]`."""

    origins: np.ndarray
    indices: np.ndarray

    @classmethod
    def whole(cls, program: Program, registers: Sequence[int]) -> _Moved:
        """All entries of these registers."""
        sizes = [program.sizes[i] for i in registers]
        indices = [np.arange(n) for n in sizes] or [np.zeros(0, int)]
        return cls(np.repeat(np.array(registers, int), sizes), np.concatenate(indices))

    @property
    def registers(self) -> set[int]:
        return set(np.unique(self.origins).tolist())

    @property
    def repeats(self) -> bool:
        """Whether an entry stands twice; if not, moving the entries has norm at most 1."""
        return len(np.unique(np.stack([self.origins, self.indices]), axis=1).T) < self.origins.size

    def before(self, register: int, parts: dict[int, np.ndarray | None]) -> _Moved | None:
        """The same vector before a step that wrote `register` by copying rows; None for other steps, or sums."""
        here = self.origins == register
        kept = [(self.origins[~here], self.indices[~here])]
        taken = np.zeros(int(here.sum()), int)
        for origin, rows in parts.items():
            if rows is None:
                return None
            read = rows[self.indices[here]]
            taken += read >= 0
            read = read[read >= 0]
            kept.append((np.full(read.size, origin), read))
        if taken.max(initial=0) > 1:
            return None
        origins, indices = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
        return _Moved(origins, indices)


def _transform_bytes(host: HostForm, op: Op) -> int:
    """About what `fourier.conv_fft_bound` holds: complex blocks per frequency, and one chunk of real ones."""
    kernel = np.shape(host.consts[-1 - op.inputs[1]])
    spec = dict(op.params)["dimension_numbers"].rhs_spec
    space = host.program.shapes[op.inputs[0]]
    where = dict(op.params)["dimension_numbers"].lhs_spec
    points = math.prod(space[a] + kernel[b] for a, b in zip(where[2:], spec[2:], strict=True))
    entries = points * kernel[spec[0]] * kernel[spec[1]]
    return 2 * 16 * entries + 5 * 8 * min(2**22, 4 * entries)
