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
from lipbounds._gain.blocks import HostForm, Node, TapScaling, by_smaller_side
from lipbounds._gain.step_matrices import StepMatrix
from lipbounds._norms import device as proofs
from lipbounds._norms.rounding import UNDERFLOW, U, add_up, finite, gamma, mul_up, sqrt_up, unscale_up, up
from lipbounds._text import device as places

_PADDED = 2.0  # entries per nonzero up to which the rows of a sparse step are padded to one length
_LOOSE = 1e-9  # share of the norm up to which the error of a block is taken: the host may have a smaller one
_SMALL = 2.0**-900  # smaller weights could be lost to underflow


class _Declined(Exception):
    """The device cannot do this block."""


class _Columns(NamedTuple):
    """Columns within `error` (Frobenius) of the exact ones, and a bound of their Frobenius norm."""

    array: jax.Array
    error: float
    size: float


@jax.jit
def _squares(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x)


@jax.jit
def _selected(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(mode="fill", fill_value=0.0)


@jax.jit
def _scaled(x: jax.Array, factors: jax.Array) -> jax.Array:
    return x * factors[:, None]


@jax.jit
def _sum(a: jax.Array, b: jax.Array) -> jax.Array:
    return a + b


@partial(jax.jit, static_argnames="width")
def _unit(factors: jax.Array, begin: jax.Array, width: int) -> jax.Array:
    """diag(factors), shifted to the right by `begin`, its first columns."""
    rows, columns = jnp.arange(factors.size), jnp.arange(width)
    return jnp.where(rows[:, None] + begin == columns[None, :], factors[:, None], 0.0)


@partial(jax.jit, static_argnames="side")
def _tile(x: jax.Array, i: jax.Array, side: int) -> jax.Array:
    """Rows i, i + 1, ... of X, a tile; rows beyond the last are zero."""
    return x.at[i + jnp.arange(side)].get(mode="fill", fill_value=0.0)


@jax.jit
def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x))


@jax.jit
def _through_rows(values: jax.Array, columns: jax.Array, x: jax.Array) -> jax.Array:
    """M X for M whose i-th row has the entries values[i] in the columns columns[i]."""

    def add(total: jax.Array, entry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + entry[0][:, None] * x[entry[1]], None

    return jax.lax.scan(add, jnp.zeros((len(values), x.shape[1]), x.dtype), (values.T, columns.T))[0]


class DeviceForm:
    """The steps of a form on an accelerator, uploaded when first needed."""

    def __init__(self, host: HostForm, device: Any) -> None:
        self.host, self.device = host, device
        self.steps: dict[tuple[int, int, bool], Callable[[jax.Array], jax.Array]] = {}
        self.direct: dict[Any, float] = {}  # norms of blocks that no centre enters, by `_direct`

    def put(self, x: Any) -> jax.Array:
        return jax.device_put(x, self.device)

    def columns(self, array: jax.Array, error: float) -> _Columns:
        square = float(_squares(array))
        if not math.isfinite(square):
            raise _Declined
        size = math.sqrt(square) * (1.0 + 2.0 * gamma(array.size + 8)) + 2.0**-500 * math.sqrt(array.size)
        return _Columns(array, error, size)

    def apply(self, place: int, m: StepMatrix, x: _Columns, transposed: bool) -> _Columns:
        key = (place, m.register, transposed)
        if key not in self.steps:
            self.steps[key] = self._upload(m)
        out = self.steps[key](x.array)
        if m.rows is not None:
            most = int(np.bincount(m.rows[m.rows >= 0], minlength=1).max())
            return self.columns(out, mul_up(sqrt_up(float(most)), x.error))
        wrong = add_up(gamma(m.terms + 1), m.relerr)
        lost = UNDERFLOW * 8.0 * (m.terms + 2) * math.sqrt(out.size + x.array.size) * (1.0 + m.absolute_norm)
        passed = mul_up(m.quick_norm, x.error) if x.error else 0.0
        return self.columns(out, add_up(passed, mul_up(wrong, m.absolute_norm, x.size), lost))

    def _upload(self, m: StepMatrix) -> Callable[[jax.Array], jax.Array]:
        if m.rows is not None:
            rows = np.where(m.rows >= 0, m.rows, m.matrix.shape[1])
            return partial(_call, _selected, self.put(rows))
        entries = np.abs(m.matrix.data if sp.issparse(m.matrix) else m.matrix)
        if ((entries > 0.0) & (entries < _SMALL)).any():
            raise _Declined
        if not sp.issparse(m.matrix):
            if not proofs.trusted(self.device):
                raise _Declined
            tiles = proofs.tiles_of(np.asarray(m.matrix, np.float64).T, self.device)
            return partial(self._dense_product, tiles, m.matrix.shape)
        values, columns = _by_rows(m.matrix)
        return partial(_through_rows, self.put(values), self.put(columns))

    def tiles(self, x: jax.Array) -> list[jax.Array]:
        """The tiles of (rows, TILE) below each other."""
        return [_tile(x, np.int64(i), proofs.TILE) for i in range(0, x.shape[0], proofs.TILE)]

    def _dense_product(self, transposed: proofs.Tiles, shape: tuple[int, int], x: jax.Array) -> jax.Array:
        """M X for the tiles of M'."""
        parts = self.tiles(x)
        out = [proofs.zero_tile(self.device)] * (-(-shape[0] // proofs.TILE))
        for (k, i), tile in transposed.items():
            out[i] = proofs.plus(out[i], tile, parts[k])
        return _joined(out, shape[0])


@partial(jax.jit, static_argnames="rows")
def _joined(parts: list[jax.Array], rows: int) -> jax.Array:
    return jnp.concatenate(parts)[:rows]


def _call(kernel: Callable[..., jax.Array], last: jax.Array, x: jax.Array) -> jax.Array:
    return kernel(x, last)


def _by_rows(matrix: Any) -> tuple[np.ndarray, np.ndarray]:
    """(values, columns), both (rows, t): the entries of every row of a CSR matrix, then zeros where it has fewer."""
    counts = np.diff(matrix.indptr)
    longest, rows = int(counts.max(initial=0)), counts.size
    if longest * rows > _PADDED * matrix.nnz + 2**20:
        raise _Declined
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
        made = _unit(self.form.put(factors), np.int64(begin - self.lo), proofs.TILE)
        return self.form.columns(made, 0.0)

    def total(self, parts: Sequence[_Columns]) -> _Columns:
        out = parts[0]
        for part in parts[1:]:
            made = self.form.columns(_sum(out.array, part.array), 0.0)
            out = made._replace(error=add_up(out.error, part.error, mul_up(U, made.size)))
        return out

    def scaled(self, x: _Columns, factors: np.ndarray) -> _Columns:
        """diag(factors) X."""
        size = np.abs(factors)
        if ((size > 0.0) & (size < _SMALL)).any():
            raise _Declined
        made = self.form.columns(_scaled(x.array, self.form.put(factors)), 0.0)
        exact = bool(np.isin(np.frexp(size)[0], (0.0, 0.5)).all())
        lost = UNDERFLOW * 4.0 * math.sqrt(x.array.size) * (1.0 + float(size.max(initial=0.0)))
        rounding = 0.0 if exact else mul_up(U, made.size)
        return made._replace(error=add_up(mul_up(float(size.max(initial=0.0)), x.error), rounding, lost))

    def step(self, place: int, op: Op, held: Mapping[int, _Columns]) -> _Columns | None:
        if op.output not in self.alive:
            return None
        parts = [
            self.form.apply(place, m, held[m.register], False)
            for m in self.form.host.step(place)
            if m.register in held
        ]
        return self.total(parts) if parts else None

    def back(self, place: int, op: Op, out: _Columns) -> Iterator[tuple[int, _Columns]]:
        for m in self.form.host.step(place):
            if m.register in self.alive:
                yield m.register, self.form.apply(place, m.transposed, out, True)

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
        parts = [held.get(r) for r in registers]
        arrays = [
            jnp.zeros((self.program.sizes[r], proofs.TILE), device=self.form.device) if p is None else p.array
            for r, p in zip(registers, parts, strict=True)
        ]
        error = sqrt_up(add_up(*(mul_up(p.error, p.error) for p in parts if p is not None)))
        return self.form.columns(jnp.concatenate(arrays), error)

    def split(self, value: _Columns, registers: Sequence[int]) -> Iterator[tuple[int, _Columns]]:
        for r, place in self.program.places_of(registers):
            if r in self.alive:
                part = value if len(registers) == 1 else value._replace(array=value.array[place])
                yield r, part

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
        arrays = [
            jnp.zeros((n, proofs.TILE), device=self.form.device) if p is None else p.array
            for n, p in zip(sizes, parts, strict=True)
        ]
        error = sqrt_up(add_up(*(mul_up(p.error, p.error) for p in parts if p is not None)))
        return _Columns(jnp.concatenate(arrays), error, 0.0)


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
            found = proofs.on_device(partial(_formed, form, node, others, scalings, reverse)) or {}
        except _Declined:
            found = {}
        for other in others:
            parts = found.pop(other, None)
            yield other, None if parts is None else proofs.on_device(partial(_norm, form, *parts, width))


def _formed(
    form: DeviceForm, node: Node, others: Sequence[Node], scalings: Sequence[TapScaling], reverse: bool
) -> dict[Node, tuple[list[jax.Array], float]]:
    host = form.host
    width = host.node_size(node, source=not reverse)
    alive = (host.coming_from if reverse else host.leading_to)(others, scalings)
    found: dict[Node, tuple[list[jax.Array], list[float]]] = {other: ([], []) for other in others}
    for lo in range(0, width, proofs.TILE):
        sweep = _Sweep(form, scalings, alive, host.starts(node, not reverse), lo, reverse)
        begin = host.program.output if reverse else 0
        held = {} if node else {begin: sweep.unit(0, np.ones(width))}
        walk(host.program, sweep, held, reverse=reverse)
        for other in others:
            end = sweep.at(other, held)
            if end is None:
                rows = host.node_size(other, source=reverse)
                end = _Columns(jnp.zeros((rows, proofs.TILE), device=form.device), 0.0, 0.0)
            found[other][0].append(end.array)
            found[other][1].append(end.error)
    return {
        other: (arrays, sqrt_up(add_up(*(mul_up(e, e) for e in errors))))
        for other, (arrays, errors) in found.items()
    }


def _norm(form: DeviceForm, arrays: list[jax.Array], error: float, width: int) -> float | None:
    """A bound of the norm of the columns side by side, within `error` of the exact ones; `width` of them count."""
    rows = arrays[0].shape[0]
    top = max(float(_largest(a)) for a in arrays)
    if top == 0.0 or not math.isfinite(top):
        return error if top == 0.0 else None
    exponent = math.frexp(top)[1]
    if abs(exponent) > 400:
        return None
    tiles = {}
    for j in range(len(arrays)):
        for i, part in enumerate(form.tiles(arrays.pop(0))):
            tiles[i, j] = part * 2.0**-exponent
    t = proofs.norm_bound(tiles, (rows, width), form.device)
    if t is None:
        return None
    lost = UNDERFLOW * 2.0 * math.sqrt(rows * width)
    value = finite(add_up(float(unscale_up(up(sqrt_up(t) + lost), exponent)), error))
    return value if error <= _LOOSE * value else None


def proved_on_device(
    host: HostForm,
    pairs: Sequence[tuple[Node, Node]],
    scalings: Sequence[TapScaling],
    limit: float = math.inf,
) -> dict[tuple[Node, Node], float]:
    """Verified bounds of ||G[target, source]||_2 from the accelerator of the public call around this.

    Left out are small blocks, those that take more than `limit` bytes or the free memory there, and those without a
    proof; all of them where there is no accelerator.
    """
    device = places.chosen()
    if device is None:
        return {}
    form = places.kept().setdefault(("steps", host), DeviceForm(host, device))
    most = min(limit, proofs.free_bytes(device))
    found: dict[tuple[Node, Node], float] = {}
    todo, keys = [], {pair: _direct(host, pair, scalings) for pair in pairs}
    for pair, (key, exponent) in keys.items():
        if key in form.direct:
            found[pair] = math.ldexp(form.direct[key], exponent)
        elif min(_sides(host, pair)) >= proofs.SMALLEST and _need(host, pair) <= most:
            todo.append(pair)
    for node, others, reverse in by_smaller_side(host, todo):
        whole = sum(math.prod(_sides(host, (other, node) if reverse else (node, other))) for other in others)
        together = [others] if 8 * 2 * whole <= most // 2 else [[other] for other in others]
        for some in together:
            for other, value in _device_norms(form, node, some, scalings, reverse):
                if value is None:
                    continue
                pair = (other, node) if reverse else (node, other)
                found[pair], (key, exponent) = value, keys[pair]
                if key is not None and 2.0**-500 < value < 2.0**500:
                    form.direct[key] = math.ldexp(value, -exponent)
    return found


def _direct(host: HostForm, pair: tuple[Node, Node], scalings: Sequence[TapScaling]) -> tuple[Any, int]:
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


def _sides(host: HostForm, pair: tuple[Node, Node]) -> tuple[int, int]:
    return host.node_size(pair[0], source=True), host.node_size(pair[1], source=False)


def _need(host: HostForm, pair: tuple[Node, Node]) -> int:
    """Bytes on the device for the block, the sweep that forms it, and the proof of its norm."""
    small, large = sorted(_sides(host, pair))
    swept = 8 * proofs.TILE * (6 * max(host.program.sizes) + large)
    return proofs.proof_bytes(large, small) + swept
