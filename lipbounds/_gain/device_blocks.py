"""Norms of gain blocks on an accelerator: blocks formed there column by column in float64, and proved by residual.

A block has n columns (its smaller side) that go through the steps of the network one tile at a time, as dense arrays;
steps are the exact matrices of `step_matrices`, applied by sums of products over the entries of a row. Errors are
carried as in `enclosures`: for a step M with at most k terms in a row, N >= || |M| ||_2, and columns X within e of the
exact ones in the Frobenius norm,

    e' = ||M|| e + (gamma_k + relerr) N ||X||_F + what underflow may lose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from lipbounds._form.program import Op
from lipbounds._form.walk import Algebra, walk
from lipbounds._gain.blocks import HostForm, Node, Pair, Sweep, TapScaling, by_smaller_side
from lipbounds._gain.step_matrices import StepMatrix
from lipbounds._norms import device as proofs
from lipbounds._norms.rounding import UNDERFLOW, U, add_up, finite, gamma, mul_up, sqrt_up, unscale_up, up
from lipbounds._text import device as places
from lipbounds._text.progress import alive

_PADDED = 2.0  # entries per nonzero up to which the rows of a sparse step are padded to one length
_LOOSE = 1e-9  # share of the norm up to which the error of a block is taken: the host may have a smaller one
_SMALL = 2.0**-900  # smaller weights could be lost to underflow
_FEW = 8  # entries of a row whose products are added at a time: each reads and writes the sum once


class Declined(Exception):
    """The device cannot do this block."""


class _Made(NamedTuple):
    """Columns as a program gives them, with the sum of their squares."""

    array: jax.Array
    square: jax.Array


class _Columns(NamedTuple):
    """Columns within `error` (Frobenius) of the exact ones, and a bound of their Frobenius norm."""

    array: jax.Array
    error: float
    size: float


def _made(x: jax.Array) -> _Made:
    return _Made(x, jnp.sum(x * x))


@jax.jit
def _selected(x: jax.Array, rows: jax.Array) -> _Made:
    return _made(x.at[rows].get(mode="fill", fill_value=0.0))


@jax.jit
def _scaled(x: jax.Array, factors: jax.Array) -> _Made:
    return _made(x * factors[:, None])


@jax.jit
def _sum(a: jax.Array, b: jax.Array) -> _Made:
    return _made(a + b)


@partial(jax.jit, static_argnames="width")
def _unit(factors: jax.Array, begin: jax.Array, *, width: int) -> _Made:
    """diag(factors), shifted to the right by `begin`, its first columns."""
    rows, columns = jnp.arange(factors.size), jnp.arange(width)
    return _made(jnp.where(rows[:, None] + begin == columns[None, :], factors[:, None], 0.0))


@partial(jax.jit, static_argnames="side")
def _tile(x: jax.Array, i: jax.Array, factor: jax.Array, *, side: int) -> jax.Array:
    """Rows i, i + 1, ... of X times a power of two, a tile; rows beyond the last are zero."""
    return factor * x.at[i + jnp.arange(side)].get(mode="fill", fill_value=0.0)


@jax.jit
def _through_rows(values: jax.Array, columns: jax.Array, x: jax.Array) -> _Made:
    """M X for M whose i-th row has the entries values[:, i] in the columns columns[:, i], both (s, rows, few)."""

    def add(total: jax.Array, entries: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        for k in range(_FEW):  # one loop over the rows, where a sum along an axis would store every product
            total = total + entries[0][:, k, None] * x[entries[1][:, k]]
        return total, None

    zero = jnp.zeros((values.shape[1], x.shape[1]), x.dtype)
    return _made(jax.lax.scan(add, zero, (values, columns))[0])


@partial(jax.jit, static_argnames="rows")
def _joined(parts: list[jax.Array], *, rows: int) -> _Made:
    return _made(jnp.concatenate(parts)[:rows])


@jax.jit
def _stacked(parts: list[jax.Array]) -> _Made:
    return _made(jnp.concatenate(parts))


@partial(jax.jit, static_argnames=("rows", "width"))
def _zeros(zero: jax.Array, *, rows: int, width: int) -> jax.Array:
    return jnp.broadcast_to(zero, (rows, width))


@partial(jax.jit, static_argnames=("begin", "end"))
def _part(x: jax.Array, *, begin: int, end: int) -> jax.Array:
    return x[begin:end]


class DeviceForm:
    """The steps of a form on an accelerator, uploaded when first needed."""

    def __init__(self, host: HostForm, device: Any) -> None:
        self.host, self.device = host, device
        # A step may read a register several times, by another matrix each.
        self.steps: dict[StepMatrix, Callable[[jax.Array], _Made]] = {}
        self.direct: dict[Any, float] = {}  # norms of blocks that no centre enters, by `_direct`

    def put(self, x: Any) -> Any:
        return jax.device_put(x, self.device)

    def call(self, program: Any, *args: Any, **options: int) -> Any:
        """What a program gives on the device."""
        return program(*args, **options)

    def trusted(self) -> bool:
        return proofs.trusted(self.device)

    def dense_tiles(self, a: np.ndarray) -> proofs.Tiles:
        return proofs.tiles_of(a, self.device)

    def begins(self, width: int) -> range:
        """The first columns of the tiles that are swept one after the other."""
        return range(0, width, proofs.TILE)

    def columns(self, made: _Made, error: float) -> _Columns:
        alive()
        square = self.number(made.square)
        if not math.isfinite(square):
            raise Declined
        entries = made.array.size
        size = math.sqrt(square) * (1.0 + 2.0 * gamma(entries + 8)) + 2.0**-500 * math.sqrt(entries)
        return _Columns(made.array, error, size)

    def number(self, x: jax.Array) -> float:
        return float(x)

    def zeros(self, rows: int) -> _Columns:
        return _Columns(self.call(_zeros, self.put(np.float64(0.0)), rows=rows, width=proofs.TILE), 0.0, 0.0)

    def apply(self, m: StepMatrix, x: _Columns) -> _Columns:
        if m.moves_nothing:
            return x
        if m not in self.steps:
            self.steps[m] = self._upload(m)
        out = self.steps[m](x.array)
        if m.rows is not None:
            most = int(np.bincount(m.rows[m.rows >= 0], minlength=1).max())
            return self.columns(out, mul_up(sqrt_up(float(most)), x.error))
        wrong = add_up(gamma(m.terms + 1), m.relerr)
        entries = out.array.size + x.array.size
        lost = UNDERFLOW * 8.0 * (m.terms + 2) * math.sqrt(entries) * (1.0 + m.absolute_norm)
        passed = mul_up(m.quick_norm, x.error) if x.error else 0.0
        return self.columns(out, add_up(passed, mul_up(wrong, m.absolute_norm, x.size), lost))

    def _upload(self, m: StepMatrix) -> Callable[[jax.Array], _Made]:
        if m.rows is not None:
            rows = self.put(np.where(m.rows >= 0, m.rows, m.matrix.shape[1]))
            return lambda x: self.call(_selected, x, rows)
        by_rows = None if m.convolution is None else m.convolution.by_rows()
        if by_rows is None:
            entries = m.matrix.data if sp.issparse(m.matrix) else m.matrix
        else:
            entries = by_rows[0]
        sizes = np.abs(entries)
        if ((sizes > 0.0) & (sizes < _SMALL)).any():
            raise Declined
        if by_rows is None and not sp.issparse(m.matrix):
            if not self.trusted():
                raise Declined
            tiles, height = self.dense_tiles(np.asarray(m.matrix, np.float64).T), m.matrix.shape[0]
            return lambda x: self._dense_product(tiles, height, x)
        values, columns = (self.put(a) for a in _in_steps(*(by_rows or _by_rows(m.matrix))))
        return lambda x: self.call(_through_rows, values, columns, x)

    def tiles(self, x: jax.Array, factor: float = 1.0) -> list[jax.Array]:
        """The tiles of (rows, TILE) below each other, times a power of two."""
        places, number = range(0, x.shape[0], proofs.TILE), np.float64(factor)
        return [self.call(_tile, x, np.int64(i), number, side=proofs.TILE) for i in places]

    def _dense_product(self, transposed: proofs.Tiles, height: int, x: jax.Array) -> _Made:
        """M X for the tiles of M', `height` rows."""
        parts = self.tiles(x)
        out = [proofs.zero_tile(self.device)] * (-(-height // proofs.TILE))
        for (k, i), tile in transposed.items():
            out[i] = self.call(proofs.plus, out[i], tile, parts[k])
        return self.call(_joined, out, rows=height)


def _in_steps(values: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of entries (rows, t) as (s, rows, FEW), filled with zeros: what `_through_rows` adds at a time."""
    rows, longest = values.shape
    steps = -(-longest // _FEW)

    def cut(a: np.ndarray) -> np.ndarray:
        padded = np.zeros((rows, steps * _FEW), a.dtype)
        padded[:, :longest] = a
        return np.ascontiguousarray(padded.reshape(rows, steps, _FEW).swapaxes(0, 1))

    return cut(values), cut(columns)


def _by_rows(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """(values, columns), both (rows, t): the entries of every row of a CSR matrix, then zeros where it has fewer."""
    counts = np.diff(matrix.indptr)
    longest, rows = int(counts.max(initial=0)), counts.size
    if longest * rows > _PADDED * matrix.nnz + 2**20:
        raise Declined
    row = np.repeat(np.arange(rows), counts)
    place = np.arange(matrix.nnz) - np.repeat(matrix.indptr[:-1], counts)
    values, columns = np.zeros((rows, longest)), np.zeros((rows, longest), np.int32)
    values[row, place], columns[row, place] = matrix.data, matrix.indices
    return values, columns


class _Sweep(Algebra[_Columns]):
    """Columns lo, lo + 1, ... of G from a source, or, in reverse, of G' from a target. `seen` as in `blocks`."""

    def __init__(
        self,
        form: DeviceForm,
        scalings: Sequence[TapScaling],
        alive: set[int],
        starts: dict[int, int],
        lo: int,
        reverse: bool,
    ) -> None:
        self.form, self.program, self.scalings, self.alive = form, form.host.program, scalings, alive
        self.starts, self.lo, self.reverse = starts, lo, reverse
        self.seen: dict[int, _Columns] = {}

    def unit(self, begin: int, factors: np.ndarray) -> _Columns:
        """diag(factors) in the columns from `begin` on, as far as they are among those swept."""
        made = self.form.call(_unit, self.form.put(factors), np.int64(begin - self.lo), width=proofs.TILE)
        return self.form.columns(made, 0.0)

    def total(self, parts: Sequence[_Columns]) -> _Columns:
        out = parts[0]
        for part in parts[1:]:
            made = self.form.columns(self.form.call(_sum, out.array, part.array), 0.0)
            out = made._replace(error=add_up(out.error, part.error, mul_up(U, made.size)))
        return out

    def scaled(self, x: _Columns, factors: np.ndarray) -> _Columns:
        """diag(factors) X."""
        size = np.abs(factors)
        if ((size > 0.0) & (size < _SMALL)).any():
            raise Declined
        made = self.form.columns(self.form.call(_scaled, x.array, self.form.put(factors)), 0.0)
        exact = bool(np.isin(np.frexp(size)[0], (0.0, 0.5)).all())
        lost = UNDERFLOW * 4.0 * math.sqrt(x.array.size) * (1.0 + float(size.max(initial=0.0)))
        rounding = 0.0 if exact else mul_up(U, made.size)
        return made._replace(error=add_up(mul_up(float(size.max(initial=0.0)), x.error), rounding, lost))

    def step(self, place: int, op: Op, held: Mapping[int, _Columns]) -> _Columns | None:
        if op.output not in self.alive:
            return None
        parts = [
            self.form.apply(m, held[m.register]) for m in self.form.host.step(place) if m.register in held
        ]
        return self.total(parts) if parts else None

    def back(self, place: int, op: Op, out: _Columns) -> Iterator[tuple[int, _Columns]]:
        for m in self.form.host.step(place):
            if m.register in self.alive:
                yield m.register, self.form.apply(m.transposed, out)

    def tap(self, k: int, value: _Columns | None) -> _Columns | None:
        c, q, e = self.scalings[k].c, self.scalings[k].q, self.scalings[k].e
        if value is not None:
            self.seen[k] = value
        after = self.program.taps[k].inputs if self.reverse else self.program.taps[k].outputs
        if not any(r in self.alive for r in after):
            return None
        through = None if value is None or c is None else self.scaled(value, c)
        if k not in self.starts:
            return through
        factors = e if self.reverse else q
        own = self.unit(self.starts[k], factors)
        return own if through is None else self.total([through, own])

    def join(self, registers: Sequence[int], held: Mapping[int, _Columns]) -> _Columns:
        if len(registers) == 1:
            return held[registers[0]]
        sizes = [self.program.sizes[r] for r in registers]
        return self.stacked([held.get(r) for r in registers], sizes)

    def stacked(self, parts: Sequence[_Columns | None], sizes: Sequence[int]) -> _Columns:
        """Columns below each other, None for zero."""
        whole = [self.form.zeros(n) if p is None else p for n, p in zip(sizes, parts, strict=True)]
        error = sqrt_up(add_up(*(mul_up(p.error, p.error) for p in whole)))
        return self.form.columns(self.form.call(_stacked, [p.array for p in whole]), error)

    def split(self, value: _Columns, registers: Sequence[int]) -> Iterator[tuple[int, _Columns]]:
        for r, place in self.program.places_of(registers):
            if r in self.alive:
                if len(registers) > 1:
                    taken = self.form.call(_part, value.array, begin=place.start, end=place.stop)
                    yield r, value._replace(array=taken)
                else:
                    yield r, value

    def add(self, a: _Columns, b: _Columns) -> _Columns:
        return self.total([a, b])

    def at(self, node: Node, held: Mapping[int, _Columns]) -> _Columns | None:
        """The part of the node in G (G' in reverse); None for zero. Taps with several parts are stacked."""
        if not node:
            return held.get(0 if self.reverse else self.program.output)
        parts = []
        for k in node:
            factors = self.scalings[k].q if self.reverse else self.scalings[k].e
            parts.append(self.scaled(self.seen[k], factors) if k in self.seen else None)
        if all(part is None for part in parts):
            return None
        sizes = [self.scalings[k].q.size if self.reverse else self.scalings[k].e.size for k in node]
        return parts[0] if len(parts) == 1 else self.stacked(parts, sizes)


# --- norms ---------------------------------------------------------------------------------------------------------


def _device_norms(
    form: DeviceForm, node: Node, others: Sequence[Node], scalings: Sequence[TapScaling], reverse: bool
) -> Iterator[tuple[Node, float | None]]:
    """(other, a verified bound of the block's norm) for blocks from one source, or, in reverse, to one target.

    The node is the smaller side of every block. None where the device has no proof; the host has to do these.
    """
    width = form.host.node_size(node, source=not reverse)
    with proofs.exactly():
        try:
            found = proofs.on_device(partial(formed, form, node, others, scalings, reverse)) or {}
        except Declined:
            found = {}
        for other in others:
            parts = found.pop(other, None)
            yield other, None if parts is None else proofs.on_device(partial(_norm, form, *parts, width))


def formed(
    form: DeviceForm, node: Node, others: Sequence[Node], scalings: Sequence[TapScaling], reverse: bool
) -> dict[Node, tuple[list[_Columns], float]]:
    """{other: (its columns, a tile each, their error)}."""
    host = form.host
    width = host.node_size(node, source=not reverse)
    alive_ = (host.coming_from if reverse else host.leading_to)(others, scalings)
    found: dict[Node, list[_Columns]] = {other: [] for other in others}
    for lo in form.begins(width):
        sweep = _Sweep(form, scalings, alive_, host.starts(node, not reverse), lo, reverse)
        begin = host.program.output if reverse else 0
        held = {} if node else {begin: sweep.unit(0, np.ones(width))}
        walk(host.program, sweep, held, reverse=reverse)
        for other in others:
            end = sweep.at(other, held)
            found[other].append(form.zeros(host.node_size(other, source=reverse)) if end is None else end)
    return {
        other: (columns, sqrt_up(add_up(*(mul_up(c.error, c.error) for c in columns))))
        for other, columns in found.items()
    }


def _norm(form: DeviceForm, columns: list[_Columns], error: float, width: int) -> float | None:
    """A bound of the norm of the columns side by side, within `error` of the exact ones; `width` of them count."""
    rows = columns[0].array.shape[0]
    top = max(each.size for each in columns)  # at most the square root of the entries above the largest
    if top == 0.0:
        return error
    exponent = math.frexp(top)[1]
    if abs(exponent) > 400:
        return None
    tiles = {}
    for j in range(len(columns)):
        for i, part in enumerate(form.tiles(columns.pop(0).array, 2.0**-exponent)):
            tiles[i, j] = part
    t = proofs.norm_bound(tiles, (rows, width), form.device)
    if t is None:
        return None
    lost = UNDERFLOW * 2.0 * math.sqrt(rows * width)
    value = finite(add_up(float(unscale_up(up(sqrt_up(t) + lost), exponent)), error))
    return value if error <= _LOOSE * value else None


def proved_on_device(
    host: HostForm,
    pairs: Sequence[Pair],
    scalings: Sequence[TapScaling],
    limit: float = math.inf,
) -> dict[Pair, float]:
    """Verified bounds of ||G[target, source]||_2 from the accelerator of the public call around this.

    Left out are small blocks, those that take more than `limit` bytes or the free memory there, and those without a
    proof; all of them where there is no accelerator.
    """
    device = places.chosen()
    if device is None:
        return {}
    form = places.kept().setdefault(("steps", host), DeviceForm(host, device))
    most = min(limit, proofs.free_bytes(device))
    found: dict[Pair, float] = {}
    todo, keys = [], {pair: _direct(host, pair, scalings) for pair in pairs}
    for pair, (key, exponent) in keys.items():
        if key in form.direct:
            found[pair] = float(unscale_up(form.direct[key], exponent))
        else:
            todo.append(pair)
    for node, some, reverse in sweeps(host, todo, most):
        for other, value in _device_norms(form, node, some, scalings, reverse):
            if value is None:
                continue
            pair = (other, node) if reverse else (node, other)
            found[pair], (key, exponent) = value, keys[pair]
            if key is not None and 2.0**-500 < value < 2.0**500:
                form.direct[key] = math.ldexp(value, -exponent)
    return found


def sweeps(host: HostForm, pairs: Sequence[Pair], most: float) -> Iterator[Sweep]:
    """`by_smaller_side` of the blocks that a device with so much memory takes, as many at a time as fit."""
    large = [
        pair for pair in pairs if min(host.block_shape(pair)) >= proofs.SMALLEST and _need(host, pair) <= most
    ]
    for node, others, reverse in by_smaller_side(host, large):
        whole = sum(
            math.prod(host.block_shape((other, node) if reverse else (node, other))) for other in others
        )
        together = [others] if 8 * 2 * whole <= most // 2 else [[other] for other in others]
        yield from ((node, some, reverse) for some in together)


def _direct(host: HostForm, pair: Pair, scalings: Sequence[TapScaling]) -> tuple[Any, int]:
    """(key, k): 2**-k times the block depends on the key alone, where no tap between its ends has a centre; else None.

    The naive bound and LipLT share these blocks, up to the factor 1/2 of the slopes' radius.
    """
    source, target = pair
    reached = host.coming_from([source], scalings) & host.leading_to([target], scalings)
    for k, tap in enumerate(host.program.taps):
        inside = scalings[k].c is not None and k not in source and k not in target
        if inside and any(r in reached for r in tap.inputs):
            return None, 0
    key, shift = [source, target], 0
    for ends in ([scalings[k].q for k in source], [scalings[k].e for k in target]):
        exponents = {math.frexp(float(x.max(initial=0.0)))[1] for x in ends}
        if len(exponents) > 1 or max(map(abs, exponents), default=0) > 200:
            return None, 0
        shift += sum(exponents)
        key += [np.ldexp(x, -e).tobytes() for x in ends for e in exponents]
    return tuple(key), shift


def _need(host: HostForm, pair: Pair) -> int:
    """Bytes on the device for the block, the sweep that forms it, and the proof of its norm."""
    small, large = sorted(host.block_shape(pair))
    swept = 8 * proofs.TILE * (6 * max(host.program.sizes) + large)
    return proofs.proof_bytes(large, small) + swept
