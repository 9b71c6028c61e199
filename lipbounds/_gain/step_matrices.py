"""The linear steps of a form as matrices on the host, exact or with a stated relative error.

Convolutions, dot products, sums and selections are built entry by entry in NumPy, so their entries are the program's
constants, unrounded; a division has the relative error of one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from lipbounds._form import windows
from lipbounds._form.concrete import on_host
from lipbounds._form.program import Op
from lipbounds._form.steps import KINDS
from lipbounds._gain.convolution import Convolution, convolution
from lipbounds._norms import cholesky, enclosures
from lipbounds._norms import matrices as norms
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.fourier import conv_fft_bound
from lipbounds._norms.rounding import U, add_up, gamma, mul_up, sqrt_up, unscale_up

_COARSE = 12  # points per axis for the quick norm of a convolution
# nonzero entries above which a convolution is applied to columns and its matrix built only on demand
_APPLIED = 2**18
_FULL = 0.15  # share of nonzero entries above which an operand of a convolution is taken as dense
_QUICK = 2e9  # operations of a factorisation for a quick norm
_VERIFY_STEP = 1100  # steps up to this size get a proved spectral norm, larger ones sqrt(||A||_1 ||A||_inf)


@dataclass(frozen=True, eq=False)
class StepMatrix:
    """The contribution of one register to a step's output: out += matrix @ register.

    Args:
        register: which register.
        given: csr_array or ndarray (out, in), or a function that builds it; see `matrix`.
        rows: for a pure selection, the input entry each output entry copies (-1: zero).
        relerr: entrywise relative error of the entries.
        bound: a proved bound of the spectral norm that is cheaper than one from the matrix, if there is one;
            called with a number, a looser one from that many points per axis.
        convolution: the same map applied to columns, where that is faster than the matrix.
    """

    register: int
    given: Any
    rows: np.ndarray | None = None
    relerr: float = 0.0
    bound: Callable[..., float] | None = None
    convolution: Convolution | None = None

    @cached_property
    def matrix(self) -> Any:
        """csr_array or ndarray (out, in)."""
        return self.given() if callable(self.given) else self.given

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.matrix.shape if self.convolution is None else self.convolution.shape

    @cached_property
    def transposed(self) -> StepMatrix:
        rows = None
        if self.rows is not None:
            used = self.rows[self.rows >= 0]
            if np.unique(used).size == used.size:
                rows = np.full(self.matrix.shape[1], -1, np.int64)
                rows[used] = np.flatnonzero(self.rows >= 0)
        turned = None if self.convolution is None else self.convolution.transposed
        return StepMatrix(
            self.register, lambda: cholesky.transposed(self.matrix), rows, self.relerr, self.bound, turned
        )

    @cached_property
    def norm(self) -> float:
        """A proved bound of the spectral norm."""
        if self.convolution is not None and self.bound is not None:
            return self.quick_norm
        small = min(self.shape) <= _VERIFY_STEP
        if small and self.rows is None:
            return norms.verified_norm(self.matrix) * (1 + 4 * self.relerr)
        cheap = self.factor.absolute_norm
        if self.bound is not None:
            cheap = min(cheap, self.bound())
        return cheap * (1 + 4 * self.relerr)

    @cached_property
    def moves_nothing(self) -> bool:
        """Whether it is the identity."""
        rows = self.rows
        return rows is not None and rows.size == self.shape[1] and np.array_equal(rows, np.arange(rows.size))

    @cached_property
    def terms(self) -> int:
        """The longest inner product with the matrix or its transpose."""
        if self.convolution is not None:
            return max(self.convolution.terms, self.convolution.transposed.terms)
        if not sp.issparse(self.matrix):
            return max(map(cholesky.nonzeros_per_row, (self.matrix, self.matrix.T)))
        columns = np.bincount(self.matrix.indices, minlength=1)
        return max(cholesky.nonzeros_per_row(self.matrix), int(columns.max()) if self.matrix.nnz else 0)

    @cached_property
    def quick_norm(self) -> float:
        """A proved bound of the spectral norm that costs little: a factorisation only where it is small."""
        if self.bound is not None:
            return min(self.absolute_norm, self.bound(_COARSE) * (1 + 4 * self.relerr))
        small, large = sorted(self.shape)
        cheap = self.rows is None and small <= _VERIFY_STEP and small * small * large <= _QUICK
        return self.norm if cheap and small > 1 else self.absolute_norm

    @cached_property
    def absolute_norm(self) -> float:
        """A proved bound of the spectral norm of the absolute values."""
        return self.factor.absolute_norm * (1 + 4 * self.relerr)

    @cached_property
    def factor(self) -> enclosures.Factor:
        """What a rounded product with the matrix needs to know of it."""
        if self.convolution is None:
            return enclosures.Factor(self.matrix)
        return _AppliedFactor(self)

    def reached(self, entries: np.ndarray, *, back: bool = False) -> np.ndarray:
        """Which outputs depend on one of these entries (a mask), or which entries one of these outputs depends on.

        From the pattern of the nonzero weights, so that nothing underflows.
        """
        if self.convolution is not None:
            pattern = self.convolution.pattern.transposed if back else self.convolution.pattern
            return np.asarray(pattern(entries.astype(np.float64)) > 0)
        matrix = self.matrix.T if back else self.matrix
        if not sp.issparse(matrix):
            columns = matrix if entries.all() else matrix[:, entries]
            return np.asarray((columns != 0).any(axis=1))
        return np.asarray((matrix != 0).astype(np.float64) @ entries.astype(np.float64) > 0)

    def product(self, x: np.ndarray) -> np.ndarray:
        """matrix @ x in float64, for a vector or columns x."""
        if self.rows is not None:
            if self.moves_nothing:
                return x
            if (self.rows >= 0).all():
                return x[self.rows]
            return np.where((self.rows >= 0).reshape(-1, *[1] * (x.ndim - 1)), x[self.rows], 0.0)
        return self.factor.product(x)

    def apply(self, m: Enclosure) -> Enclosure:
        """matrix @ m, with its error."""
        exact = m.exact_or_none()
        if sp.issparse(exact) and norms.is_identity(exact):  # where a sweep starts: a product is not rounded
            wrong = norms.frobenius_norm(self.matrix) if self.relerr else 0.0
            return Enclosure(self.matrix, mul_up(self.relerr, wrong))
        if self.rows is not None:
            if self.moves_nothing:
                return m
            if (self.rows >= 0).all():
                return m.select(rows=self.rows)
        return enclosures.multiply(self.factor, m, self.relerr, self.norm if m.error else None)


class _AppliedFactor(enclosures.Factor):
    """A convolution as a factor: dense operands never meet its matrix, which sparse ones build."""

    def __init__(self, step: StepMatrix) -> None:
        assert step.convolution is not None
        self._step, self.convolution, self.shape = step, step.convolution, step.convolution.shape
        self.nonzeros = self.convolution.terms

    @property
    def matrix(self) -> Any:
        return self._step.matrix

    @cached_property
    def smallest(self) -> float:
        sizes = self.convolution.absolute.weights
        return float(sizes.min(where=sizes > 0, initial=np.inf))

    @cached_property
    def absolute_norm(self) -> float:
        """min(sqrt(||A||_1 ||A||_inf), ||A||_F) from sums of the absolute weights."""
        sizes = self.convolution.absolute
        exponent = int(np.frexp(sizes.weights.max(initial=0.0))[1])
        with np.errstate(under="ignore"):
            sizes = Convolution(np.ldexp(sizes.weights, -exponent), sizes.moves, sizes.source, sizes.target)
            squares = Convolution(np.square(sizes.weights), sizes.moves, sizes.source, sizes.target)
        lost = 2.0**-1000 * sizes.terms
        rows = float(sizes(np.ones(self.shape[1])).max(initial=0.0)) + lost
        columns = float(sizes.transposed(np.ones(self.shape[0])).max(initial=0.0)) + lost
        whole = float(squares(np.ones(self.shape[1])).sum()) + lost * self.shape[0]
        grown = add_up(1.0, 2.0 * gamma(sum(self.shape) + sizes.terms + sizes.transposed.terms + 8))
        least = min(sqrt_up(mul_up(rows, columns)), sqrt_up(whole))
        return float(unscale_up(mul_up(grown, least), exponent))

    def product(self, x: np.ndarray) -> np.ndarray:
        return self.convolution(x)

    def times(self, b: Any) -> Any:
        if sp.issparse(b) and b.nnz <= _FULL * b.shape[0] * b.shape[1]:
            return super().times(b)
        return self.convolution(cholesky.dense_array(b))


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
    return matrix.toarray() if matrix.nnz > 0.3 * shape[0] * shape[1] else matrix


def step_matrices(
    op: Op, consts: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]
) -> list[StepMatrix]:
    """One `StepMatrix` per operand of a linear step that is a register."""
    made = _moves if KINDS[op.kind].moves else _step_matrix
    return [
        made(op, place, register, consts, shapes) for place, register in enumerate(op.inputs) if register >= 0
    ]


def _step_matrix(
    op: Op, place: int, register: int, consts: Sequence[np.ndarray], shapes: Sequence[tuple[int, ...]]
) -> StepMatrix:
    """Of the operand `place`, which is this register; of a product, the other operand is a constant."""
    params, shape, out_shape = dict(op.params), shapes[register], shapes[op.output]
    n = math.prod(shape)
    index = np.arange(n).reshape(shape)

    def constant(of: int) -> np.ndarray:
        return consts[-1 - op.inputs[of]].astype(np.float64)

    if op.kind in ("add", "sub", "neg"):
        step = _selection(register, np.broadcast_to(index, out_shape), n)
        negative = op.kind == "neg" or (op.kind == "sub" and place == 1)
        return StepMatrix(register, -step.matrix) if negative else step
    if op.kind in ("mul", "div"):
        factor, relerr = constant(1 - place), 0.0
        if op.kind == "div":
            factor, relerr = _reciprocals(factor)
        values, cols = np.broadcast_to(factor, out_shape), np.broadcast_to(index, out_shape)
        at = np.arange(values.size), cols.ravel()
        return StepMatrix(register, sp.csr_array((values.ravel(), at), shape=(values.size, n)), None, relerr)
    if op.kind == "dot_general":
        return StepMatrix(
            register, _dot_matrix(params["dimension_numbers"], place, index, constant(1 - place))
        )
    if op.kind == "conv" and place == 0 and params["batch_group_count"] == 1:
        return _convolved(register, params, shape, constant(1), out_shape)
    if op.kind == "reduce_sum":
        return _table(register, windows.along(shape, params["axes"]), n)
    if op.kind == "reduce_window_sum":
        return _table(register, windows.windows(shape, params), n)
    if op.kind == "cumsum":
        return _cumsum(register, params, shape)
    if op.kind == "scatter_add" and place == 0:
        return _selection(register, index, n)
    if op.kind == "scatter_add":
        target = params["target"].array.ravel()
        kept = np.flatnonzero(target >= 0)
        at = target[kept], kept
        return StepMatrix(register, sp.csr_array((np.ones(kept.size), at), shape=(math.prod(out_shape), n)))
    return _probed(op, place, register, consts, shapes)


def _reciprocals(divisors: np.ndarray) -> tuple[np.ndarray, float]:
    """(1 / c, its relative error); ValueError where c is zero, or so small that 1 / c is infinite."""
    if (divisors == 0).any():
        raise ValueError("the network divides by a constant that is zero")
    # below the normal range 1/c is rounded to a multiple of 2^-1074
    relerr = mul_up(2 * U, max(1.0, float(np.abs(divisors).max(initial=0.0)) * 2.0**-1022))
    with np.errstate(over="ignore", under="ignore"):
        found = 1.0 / divisors
    if not np.isfinite(found).all():
        raise ValueError("the network divides by a constant too close to zero")
    return found, relerr


def _convolved(
    register: int,
    params: dict[str, Any],
    shape: tuple[int, ...],
    kernel: np.ndarray,
    out_shape: tuple[int, ...],
) -> StepMatrix:
    """A convolution in its first operand; a large one is applied to columns, and its matrix built on demand."""
    applied: Convolution | None = convolution(params, shape, kernel, out_shape)
    assert applied is not None
    matrix = partial(_conv_matrix, params, shape, kernel, out_shape)
    bound = _conv_bound(params, shape, kernel)
    if applied.entries <= _APPLIED:
        return StepMatrix(register, matrix(), bound=bound)
    return StepMatrix(register, matrix, bound=bound, convolution=applied)


# What moves entries, in NumPy: JAX would compile a program for every shape.
_IN_NUMPY: dict[str, Callable[..., Any]] = {
    "reshape": lambda p, a: a.reshape(p["shape"]),
    "transpose": lambda p, a: a.transpose(p["permutation"]),
    "rev": lambda p, a: np.flip(a, p["dimensions"]),
    "tile": lambda p, a: np.tile(a, p["reps"]),
    "stack": lambda p, *a: np.stack(a, p["axis"]),
    "concatenate": lambda p, *a: np.concatenate(a, p["dimension"]),
    "slice": lambda p, a: a[tuple(map(slice, p["start"], p["limit"], p["strides"] or (None,) * a.ndim))],
    "broadcast_in_dim": lambda p, a: np.broadcast_to(
        a.reshape([a.shape[p["dims"].index(d)] if d in p["dims"] else 1 for d in range(len(p["shape"]))]),
        p["shape"],
    ),
    "take": lambda p, *a: np.concatenate([*map(np.ravel, a), np.zeros(1, a[0].dtype)])[p["index"].array],
}


def _moves(op: Op, place: int, register: int, consts: Sequence[Any], shapes: Any) -> StepMatrix:
    """A selection, found by moving an iota counted from 1."""
    params, n = dict(op.params), math.prod(shapes[register])
    args = []
    for j, i in enumerate(op.inputs):
        shape = shapes[i] if i >= 0 else np.shape(consts[-1 - i])
        args.append(
            np.arange(1, n + 1, dtype=np.int32).reshape(shape) if j == place else np.zeros(shape, np.int32)
        )
    if op.kind in _IN_NUMPY:
        moved = _IN_NUMPY[op.kind](params, *args)
    else:
        with on_host():
            moved = np.asarray(KINDS[op.kind].apply(params, *map(jnp.asarray, args)))
    return _selection(register, moved.astype(np.int64) - 1, n)


def _table(register: int, table: np.ndarray, n: int) -> StepMatrix:
    rows = np.broadcast_to(np.arange(table.shape[0])[:, None], table.shape)
    return StepMatrix(register, _coo(np.ones(table.shape), rows, table, (table.shape[0], n)))


def _cumsum(register: int, params: dict[str, Any], shape: tuple[int, ...]) -> StepMatrix:
    lines = windows.along(shape, [params["axis"]])  # (lines, length)
    length, n = lines.shape[1], math.prod(shape)
    keep = np.tri(length, dtype=bool)
    out, into = np.nonzero(keep.T if params["reverse"] else keep)
    return StepMatrix(register, _coo(1.0, lines[:, out], lines[:, into], (n, n)))


def _dot_matrix(dimension_numbers: Any, place: int, index: np.ndarray, other: np.ndarray) -> Any:
    """Matrix of lax.dot_general in its operand `place`; `index` counts that operand's entries."""
    contract, batch = dimension_numbers

    def grouped(a: np.ndarray, which: int) -> np.ndarray:
        free = [d for d in range(a.ndim) if d not in contract[which] and d not in batch[which]]
        a = a.transpose([*batch[which], *free, *contract[which]])
        sizes = a.shape
        nb, nf = len(batch[which]), len(free)
        return a.reshape(math.prod(sizes[:nb]), math.prod(sizes[nb : nb + nf]), math.prod(sizes[nb + nf :]))

    cols = grouped(index, place)  # (batch, my free, contracted)
    values = grouped(other, 1 - place)  # (batch, their free, contracted)
    (nb, f, _), g = cols.shape, values.shape[1]
    if nb == 1 and f == 1:
        dense = np.zeros((g, index.size))
        dense[:, cols[0, 0]] = values[0]
        return dense
    row = np.arange(nb * f * g)
    row = row.reshape(nb, f, g) if place == 0 else row.reshape(nb, g, f).transpose(0, 2, 1)
    return _coo(values[:, None], row[..., None], cols[:, :, None], (nb * f * g, index.size))


def _conv_matrix(
    p: dict[str, Any], shape: tuple[int, ...], kernel: np.ndarray, out_shape: tuple[int, ...]
) -> Any:
    """Matrix of lax.conv_general_dilated in its first operand."""
    numbers = p["dimension_numbers"]
    # (batch, channel, *space) and (batch, feature, *space)
    index = np.arange(math.prod(shape)).reshape(shape).transpose(numbers.lhs_spec)
    row = np.arange(math.prod(out_shape)).reshape(out_shape).transpose(numbers.out_spec)
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
    o, k = np.nonzero(valid.reshape(math.prod(out_space), math.prod(window)))
    position = where.reshape(math.prod(out_space), math.prod(window))[o, k]
    channel = (np.arange(features) // (features // groups))[:, None] * channels + np.arange(channels)[None, :]
    flat_index = index.reshape(*index.shape[:2], -1)
    flat_row = row.reshape(*row.shape[:2], -1)
    rows = flat_row[:, :, None, o]  # (batch, feature, 1, entries)
    cols = flat_index[:, channel][..., position]  # (batch, feature, channel, entries)
    values = weights.reshape(features, channels, -1)[None][..., k]
    return _coo(values, rows, cols, (math.prod(out_shape), math.prod(shape)))


def _conv_bound(p: dict[str, Any], shape: tuple[int, ...], kernel: np.ndarray) -> Callable[..., float] | None:
    """The Fourier bound of a convolution, its strides made 1.

    Output o reads input s o + a - pad at window position a. With a - pad = s b + f, 0 <= f < s, this is entry o + b of
    phase f of the input: a convolution of stride 1 at window position b, with s times the channels.
    """
    if p["feature_group_count"] != 1 or {*p["lhs_dilation"], *p["rhs_dilation"]} != {1}:
        return None

    def bound(most: int | None = None) -> float:
        numbers = p["dimension_numbers"]
        weights = kernel.transpose([*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]])
        sizes = [shape[d] for d in numbers.lhs_spec[2:]]
        for axis, stride in enumerate(p["window_strides"]):
            shifts = np.arange(weights.shape[axis]) - p["padding"][axis][0]
            place, phase = shifts // stride, shifts % stride
            window = np.moveaxis(weights, axis, 0)
            folded = np.zeros((place[-1] - place[0] + 1, stride, *window.shape[1:]))
            folded[place - place[0], phase] = window
            # The window goes back to its place, and the phase before the channels.
            phases = np.moveaxis(np.moveaxis(folded, 0, axis + 1), 0, -3)
            weights = phases.reshape(*phases.shape[:-3], stride * phases.shape[-2], phases.shape[-1])
            sizes[axis] = -(-sizes[axis] // stride)
        return conv_fft_bound(weights, tuple(sizes), most)

    return cache(bound)


def _probed(op: Op, place: int, register: int, consts: Sequence[Any], shapes: Any) -> StepMatrix:
    """A step's matrix by unit vectors: each output is one product plus zeros, so nothing is rounded."""
    params = dict(op.params)
    n, out = math.prod(shapes[register]), math.prod(shapes[op.output])
    if n * out > 2**28:
        raise ValueError(
            f"a {op.kind} step of size {out} x {n} is too large to verify; use guarantee='probabilistic'"
        )
    others = [None if i >= 0 else consts[-1 - i].astype(np.float64) for i in op.inputs]
    for const in others:
        if const is not None and ((const != 0) & (np.abs(const) < np.finfo(np.float64).tiny)).any():
            raise ValueError(f"a {op.kind} step has subnormal weights, which the device flushes to zero")
    with jax.enable_x64(True), on_host():

        def column(unit: Any) -> Any:
            args = [
                unit.reshape(shapes[i])
                if j == place
                else jnp.zeros(shapes[i])
                if i >= 0
                else jnp.asarray(others[j])
                for j, i in enumerate(op.inputs)
            ]
            return KINDS[op.kind].apply(params, *args).ravel()

        columns = np.asarray(jax.lax.map(column, jnp.eye(n)))
    rows, cols = np.indices((out, n))
    return StepMatrix(register, _coo(columns.T, rows, cols, (out, n)))
