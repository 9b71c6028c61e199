"""The linear steps of a form as matrices on the host, exact or with a stated relative error, and blocks of the gain.

The gain G of a form, after the loop transformation v = c y + w-part, maps sources (the input x, or the w of taps) to
targets (the pre-activations y of taps, or the output z). A block G[target, source] is a product and sum of the steps'
matrices; `HostForm.blocks` multiplies them in float64 NumPy/SciPy and carries a normwise error (`norms.Enclosure`), from
the source or from the target, whichever side is smaller.

Steps: convolutions, dot products, sums and selections are built entry by entry in NumPy, so their entries are the
program's constants, unrounded; a division has the relative error of one rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from lipbounds import _rules, norms
from lipbounds._kinds import KINDS
from lipbounds._program import Op
from lipbounds._rounding import U, mul_up
from lipbounds.lure import LureForm
from lipbounds.norms import Enclosure

#: A source or target: () is the input (as a source) or the output (as a target), otherwise indices of taps.
Node = tuple[int, ...]
_VERIFY_STEP = 1100  # steps up to this size get a proved spectral norm, larger ones sqrt(||A||_1 ||A||_inf)


@dataclass(frozen=True, eq=False)
class StepMatrix:
    """What one register contributes to a step's output: out += matrix @ register.

    Args:
        register: which register.
        matrix: csr_array or ndarray (out, in), or None where `rows` says all.
        rows: for a pure selection, the input entry each output entry copies (-1: zero).
        relerr: entrywise relative error of the entries.
    """

    register: int
    matrix: Any
    rows: np.ndarray | None = None
    relerr: float = 0.0

    @cached_property
    def transposed(self) -> StepMatrix:
        rows = None
        if self.rows is not None:
            used = self.rows[self.rows >= 0]
            if np.unique(used).size == used.size:
                rows = np.full(self.matrix.shape[1], -1, np.int64)
                rows[used] = np.flatnonzero(self.rows >= 0)
        matrix = self.matrix.T.tocsr() if sp.issparse(self.matrix) else self.matrix.T
        return StepMatrix(self.register, matrix, rows, self.relerr)

    @cached_property
    def norm(self) -> float:
        """A proved bound of the spectral norm."""
        small = min(self.matrix.shape) <= _VERIFY_STEP
        if small and self.rows is None:
            return norms.verified_norm(self.matrix) * (1 + 4 * self.relerr)
        return norms._cheap_norm(self.matrix) * (1 + 4 * self.relerr)

    def apply(self, m: Enclosure) -> Enclosure:
        """matrix @ m, with its error."""
        if _is_identity(m):
            wrong = norms.frobenius_norm(self.matrix) if self.relerr else 0.0
            return Enclosure(self.matrix, mul_up(self.relerr, wrong))
        if self.rows is not None:
            if self.rows.size == m.shape[0] and np.array_equal(self.rows, np.arange(self.rows.size)):
                return m
            if (self.rows >= 0).all():
                most = int(np.bincount(self.rows).max(initial=0))
                return Enclosure(m.matrix[self.rows], mul_up(norms.sqrt_up(float(most)), m.error))
        return norms.multiply(self.matrix, m, self.relerr, self.norm if m.error else None)


def _is_identity(m: Enclosure) -> bool:
    """Exactly the identity, where a sweep starts: a product with it is not rounded."""
    matrix = m.matrix
    if m.error or not sp.issparse(matrix) or matrix.shape[0] != matrix.shape[1] or matrix.nnz != matrix.shape[0]:
        return False
    ones = np.arange(matrix.shape[0])
    return bool((matrix.data == 1).all() and (matrix.indices == ones).all() and (matrix.indptr[:-1] == ones).all())


def _selection(register: int, rows: np.ndarray, n: int) -> StepMatrix:
    """Output entry i copies input entry rows[i]; -1 is zero."""
    rows = np.asarray(rows).ravel().astype(np.int64)
    kept = np.flatnonzero(rows >= 0)
    matrix = sp.csr_array((np.ones(kept.size), (kept, rows[kept])), shape=(rows.size, n))
    return StepMatrix(register, matrix, rows)


def _coo(values: Any, rows: Any, cols: Any, shape: tuple[int, int]) -> Any:
    values, rows, cols = (np.asarray(a).ravel() for a in np.broadcast_arrays(values, rows, cols))
    keep = cols >= 0
    matrix = sp.csr_array((values[keep].astype(np.float64), (rows[keep], cols[keep])), shape=shape)
    matrix.sum_duplicates()
    if matrix.nnz > 0.3 * shape[0] * shape[1]:
        return matrix.toarray()
    return matrix


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape))


def step_matrices(op: Op, consts: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]) -> list[StepMatrix]:
    """One `StepMatrix` per operand of a linear step that is a register."""
    params = dict(op.params)
    out_shape = shapes[op.output]
    places = [(j, i) for j, i in enumerate(op.inputs) if i >= 0]
    if KINDS[op.kind].moves:
        return [_moves(op, params, place, register, consts, shapes) for place, register in places]
    out_size = _size(out_shape)
    result = []
    for place, register in places:
        shape, n = shapes[register], _size(shapes[register])
        index = np.arange(n).reshape(shape)
        if op.kind in ("add", "sub", "neg"):
            step = _selection(register, np.broadcast_to(index, out_shape), n)
            negative = op.kind == "neg" or (op.kind == "sub" and place == 1)
            result.append(StepMatrix(register, -step.matrix) if negative else step)
        elif op.kind in ("mul", "div"):
            factor = consts[-1 - op.inputs[1 - place]].astype(np.float64)
            relerr = 0.0
            if op.kind == "div":
                if (factor == 0).any():
                    raise ValueError("the network divides by a constant that is zero")
                # below the normal range 1/c is rounded to a multiple of 2^-1074
                relerr = mul_up(2 * U, max(1.0, float(np.abs(factor).max(initial=0.0)) * 2.0**-1022))
                with np.errstate(over="ignore", under="ignore"):
                    factor = 1.0 / factor
                if not np.isfinite(factor).all():
                    raise ValueError("the network divides by a constant too close to zero")
            values = np.broadcast_to(factor, out_shape)
            cols = np.broadcast_to(index, out_shape)
            matrix = sp.csr_array((values.ravel(), (np.arange(out_size), cols.ravel())), shape=(out_size, n))
            result.append(StepMatrix(register, matrix, None, relerr))
        elif op.kind == "dot_general":
            other = consts[-1 - op.inputs[1 - place]].astype(np.float64)
            result.append(StepMatrix(register, _dot_matrix(params["dimension_numbers"], place, index, other)))
        elif op.kind == "conv" and place == 0 and params["batch_group_count"] == 1:
            kernel = consts[-1 - op.inputs[1]].astype(np.float64)
            result.append(StepMatrix(register, _conv_matrix(params, shape, kernel, out_shape)))
        elif op.kind == "reduce_sum":
            table = _rules.along(shape, params["axes"])
            result.append(_table(register, table, n))
        elif op.kind == "reduce_window_sum":
            result.append(_table(register, _rules.windows(shape, params), n))
        elif op.kind == "cumsum":
            result.append(_cumsum(register, params, shape))
        elif op.kind == "scatter_add":
            if place == 0:
                result.append(_selection(register, index, n))
            else:
                target = params["target"].array.ravel()
                kept = np.flatnonzero(target >= 0)
                matrix = sp.csr_array((np.ones(kept.size), (target[kept], kept)), shape=(out_size, n))
                result.append(StepMatrix(register, matrix))
        else:
            result.append(_probed(op, params, place, register, consts, shapes))
    return result


def _moves(
    op: Op, params: dict[str, Any], place: int, register: int, consts: Sequence[Any], shapes: Any
) -> StepMatrix:
    """A selection, found by moving an iota counted from 1."""
    n = _size(shapes[register])
    args = []
    for j, i in enumerate(op.inputs):
        shape = shapes[i] if i >= 0 else np.shape(consts[-1 - i])
        iota = np.arange(1, n + 1, dtype=np.int32).reshape(shape) if j == place else np.zeros(shape, np.int32)
        args.append(jnp.asarray(iota))
    with jax.default_device(jax.devices("cpu")[0]):
        moved = np.asarray(KINDS[op.kind].apply(params, *args))
    return _selection(register, moved.astype(np.int64) - 1, n)


def _table(register: int, table: np.ndarray, n: int) -> StepMatrix:
    rows = np.broadcast_to(np.arange(table.shape[0])[:, None], table.shape)
    return StepMatrix(register, _coo(np.ones(table.shape), rows, table, (table.shape[0], n)))


def _cumsum(register: int, params: dict[str, Any], shape: tuple[int, ...]) -> StepMatrix:
    lines = _rules.along(shape, [params["axis"]])  # (lines, length)
    length, n = lines.shape[1], _size(shape)
    keep = np.triu(np.ones((length, length), bool)) if params["reverse"] else np.tril(np.ones((length, length), bool))
    out, into = np.nonzero(keep)
    return StepMatrix(register, _coo(1.0, lines[:, out], lines[:, into], (n, n)))


def _dot_matrix(dimension_numbers: Any, place: int, index: np.ndarray, other: np.ndarray) -> Any:
    """Matrix of lax.dot_general in its operand `place`; `index` counts that operand's entries."""
    contract, batch = dimension_numbers
    mine, theirs = place, 1 - place

    def grouped(a: np.ndarray, which: int) -> np.ndarray:
        free = [d for d in range(a.ndim) if d not in contract[which] and d not in batch[which]]
        a = a.transpose([*batch[which], *free, *contract[which]])
        sizes = a.shape
        nb, nf = len(batch[which]), len(free)
        return a.reshape(_size(sizes[:nb]), _size(sizes[nb : nb + nf]), _size(sizes[nb + nf :]))

    cols = grouped(index, mine)  # (batch, my free, contracted)
    values = grouped(other, theirs)  # (batch, their free, contracted)
    (nb, f, c), g = cols.shape, values.shape[1]
    if nb == 1 and f == 1:
        dense = np.zeros((g, index.size))
        dense[:, cols[0, 0]] = values[0]
        return dense
    row = np.arange(nb * f * g)
    row = row.reshape(nb, f, g) if place == 0 else row.reshape(nb, g, f).transpose(0, 2, 1)
    return _coo(values[:, None], row[..., None], cols[:, :, None], (nb * f * g, index.size))


def _conv_matrix(p: dict[str, Any], shape: tuple[int, ...], kernel: np.ndarray, out_shape: tuple[int, ...]) -> Any:
    """Matrix of lax.conv_general_dilated in its first operand."""
    numbers = p["dimension_numbers"]
    index = np.arange(_size(shape)).reshape(shape).transpose(numbers.lhs_spec)  # (batch, channel, *space)
    row = np.arange(_size(out_shape)).reshape(out_shape).transpose(numbers.out_spec)  # (batch, feature, *space)
    weights = kernel.transpose(numbers.rhs_spec)  # (feature, channel in group, *window)
    groups = p["feature_group_count"]
    features, channels = weights.shape[:2]
    window = weights.shape[2:]
    space, out_space = index.shape[2:], row.shape[2:]
    rank = len(space)
    parts = []
    for axis in range(rank):
        reach = np.arange(out_space[axis])[:, None] * p["window_strides"][axis]
        reach = reach + np.arange(window[axis])[None, :] * p["rhs_dilation"][axis] - p["padding"][axis][0]
        dilation = p["lhs_dilation"][axis]
        inside = (reach >= 0) & (reach % dilation == 0) & (reach // dilation < space[axis])
        parts.append(np.where(inside, reach // dilation, -1))
    # where[o.., k..]: flat position in space read by output position o through window position k, or -1
    where = np.zeros((1,) * (2 * rank), np.int64)
    valid = np.ones((1,) * (2 * rank), bool)
    for axis, part in enumerate(parts):
        form = [1] * (2 * rank)
        form[axis], form[rank + axis] = part.shape
        where = where * space[axis] + np.maximum(part, 0).reshape(form)
        valid = valid & (part >= 0).reshape(form)
    o, k = np.nonzero(valid.reshape(_size(out_space), _size(window)))
    position = where.reshape(_size(out_space), _size(window))[o, k]
    channel = (np.arange(features) // (features // groups))[:, None] * channels + np.arange(channels)[None, :]
    flat_index = index.reshape(*index.shape[:2], -1)
    flat_row = row.reshape(*row.shape[:2], -1)
    rows = flat_row[:, :, None, o]  # (batch, feature, 1, entries)
    cols = flat_index[:, channel][..., position]  # (batch, feature, channel, entries)
    values = weights.reshape(features, channels, -1)[None][..., k]
    return _coo(values, rows, cols, (_size(out_shape), _size(shape)))


def _probed(
    op: Op, params: dict[str, Any], place: int, register: int, consts: Sequence[Any], shapes: Any
) -> StepMatrix:
    """A step's matrix by unit vectors: each output is one product plus zeros, so nothing is rounded."""
    n, out = _size(shapes[register]), _size(shapes[op.output])
    if n * out > 2**28:
        raise ValueError(f"a {op.kind} step of size {out} x {n} is too large to verify; use guarantee='probabilistic'")
    others = [None if i >= 0 else consts[-1 - i].astype(np.float64) for i in op.inputs]
    for const in others:
        if const is not None and ((const != 0) & (np.abs(const) < np.finfo(np.float64).tiny)).any():
            raise ValueError(f"a {op.kind} step has subnormal weights, which the device flushes to zero")
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):

        def column(unit: Any) -> Any:
            args = [
                unit.reshape(shapes[i]) if j == place else jnp.zeros(shapes[i]) if i >= 0 else jnp.asarray(others[j])
                for j, i in enumerate(op.inputs)
            ]
            return KINDS[op.kind].apply(params, *args).ravel()

        columns = np.asarray(jax.lax.map(column, jnp.eye(n)))
    rows, cols = np.indices((out, n))
    return StepMatrix(register, _coo(columns.T, rows, cols, (out, n)))


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
        seen: dict[int, Enclosure] = {}
        uses = self._last_uses()
        for place, step in enumerate(self.program.steps):
            if isinstance(step, int):
                tap = taps[step]
                y = self._joined([registers.get(i) for i in tap.inputs], [self._rows(i) for i in tap.inputs], width)
                if y is not None:
                    seen[step] = y
                if any(r in alive for r in tap.outputs):
                    v = None
                    scaling = scalings[step]
                    if y is not None and scaling.c is not None:
                        v = norms.scale(y, rows=scaling.c)
                    if step in starts:
                        injected = sp.csr_array(
                            (scaling.q, (np.arange(tap.size_out), starts[step] + np.arange(tap.size_out))),
                            shape=(tap.size_out, width),
                        )
                        v = Enclosure(injected) if v is None else norms.add(v, Enclosure(injected))
                    self._split(v, tap.outputs, registers)
            elif step.output in alive:
                parts = [m.apply(registers[m.register]) for m in self.step(place) if m.register in registers]
                if parts:
                    registers[step.output] = norms.add(*parts)
            for r in uses.get(place, ()):
                if r != self.program.output:
                    registers.pop(r, None)
        out: dict[Node, Enclosure] = {}
        for target in wanted:
            if not target:
                if self.program.output in registers:
                    out[target] = registers[self.program.output]
            elif any(k in seen for k in target):
                parts_ = [
                    norms.scale(seen[k], rows=scalings[k].e)
                    if k in seen
                    else Enclosure(sp.csr_array((taps[k].size_in, width)))
                    for k in target
                ]
                out[target] = norms.stack(parts_) if len(parts_) > 1 else parts_[0]
        return out

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
                        seen[step] = norms.scale(v, rows=scaling.q)
                    if scaling.c is not None:
                        y = norms.scale(v, rows=scaling.c)
                if step in starts:
                    start = sp.csr_array(
                        (scaling.e, (np.arange(tap.size_in), starts[step] + np.arange(tap.size_in))),
                        shape=(tap.size_in, width),
                    )
                    y = Enclosure(start) if y is None else norms.add(y, Enclosure(start))
                if y is not None:
                    begin = 0
                    for r in tap.inputs:
                        size = self._rows(r)
                        if r in reached:
                            part = Enclosure(y.matrix[begin : begin + size], y.error)
                            registers[r] = norms.add(registers[r], part) if r in registers else part
                        begin += size
            elif step.output in registers:
                out = registers.pop(step.output)
                for m in self.step(place):
                    if m.register in reached:
                        part = m.transposed.apply(out)
                        has = m.register in registers
                        registers[m.register] = norms.add(registers[m.register], part) if has else part
        result: dict[Node, Enclosure] = {}
        for source in wanted:
            if not source:
                if 0 in registers:
                    result[source] = registers[0]
            elif any(k in seen for k in source):
                parts = [
                    seen[k] if k in seen else Enclosure(sp.csr_array((taps[k].size_out, width))) for k in source
                ]
                result[source] = norms.stack(parts) if len(parts) > 1 else parts[0]
        return result

    # -- which registers matter ---------------------------------------------------------------------------------------

    def _rows(self, register: int) -> int:
        return _size(self.program.shapes[register])

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
        return norms.stack(
            [Enclosure(sp.csr_array((n, width))) if part is None else part for part, n in zip(parts, rows, strict=True)]
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
            registers[r] = Enclosure(v.matrix[begin : begin + size], v.error)
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
