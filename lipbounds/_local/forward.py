"""Logits, margins and pre-activations at given inputs, in float64 with their rounding errors enclosed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._activations import activations
from lipbounds._activations import intervals as I
from lipbounds._form.concrete import on_host
from lipbounds._form.lure import LureForm, multiplicity, proved_slopes
from lipbounds._form.program import Op, Tap
from lipbounds._form.steps import KINDS
from lipbounds._form.units import Units, check_units, dtype_error, shape_error
from lipbounds._form.walk import Algebra, walk
from lipbounds._gain.blocks import HostForm
from lipbounds._norms.cholesky import nonzeros_per_row
from lipbounds._norms.rounding import U, gamma
from lipbounds._text.arguments import as_labels
from lipbounds._text.progress import alive, stoppable
from lipbounds._text.threads import one_blas_thread
from lipbounds._triangle import recursion
from lipbounds._triangle.product_rounding import carriers

DECLARED_ACCURACY = 1e-9  # of float64 values of a declared activation that interval arithmetic does not know
_CHUNK = 2**21  # entries of the widest tensor of one chunk of examples


class NotFiniteError(ValueError):
    """Values of the network leave the range of float64."""


def check_inputs(form: LureForm, X: Any, units: Units | None = None) -> np.ndarray:
    """The examples (N, *in_shape) in float64, checked; with `units` also their range."""
    x = np.asarray(X)
    if x.dtype.kind not in "f" and x.dtype.name not in ("bfloat16", "float16"):
        raise ValueError(dtype_error(x.dtype, form.in_shape))
    if x.dtype.itemsize > 8:
        raise ValueError(
            f"X has more digits ({x.dtype}) than the float64 in which it is evaluated; round it first: "
            "X.astype('float64')"
        )
    if x.ndim != len(form.in_shape) + 1 or x.shape[1:] != form.in_shape:
        raise ValueError(shape_error("X", x.shape, form.in_shape))
    if form.is_traced:
        raise TypeError("concrete weights are needed, outside jit, grad and vmap")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("X holds NaN or infinite values")
    if units is not None:
        check_units(x, form.in_shape, units)
    return x


Seen = list[tuple[np.ndarray, np.ndarray]]


def logits(form: LureForm, x: np.ndarray, seen: Seen | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(z, error): float64 logits (N, K) and proved (N,) bounds of ||z - z_exact||_2.

    The same of every tap's pre-activations (N, n) is put into `seen`. Between taps the rounding errors of the linear
    steps are bounded entrywise; at each tap their 2-norm is carried to the output by the constants of the naive
    recursion,
        t_k = ||delta_k|| + sum_j ||D[k, j]|| (max|slope_j| t_j + ||eta_j||),
    with delta_k the error made since the last taps and eta_j that of evaluating tap j.
    """
    host, carried = recursion.host_form(form), carriers(form)
    z, error = np.zeros((len(x), form.num_outputs)), np.zeros(len(x))
    if seen is not None:
        seen += [(np.zeros((len(x), tap.size_in)), np.zeros(len(x))) for tap in form.taps]
    size = max(1, _CHUNK // max(1, *form.program.sizes))
    chunks = [slice(begin, begin + size) for begin in range(0, len(x), size)]

    def one(part: slice) -> None:
        alive()
        taps: Seen = []
        z[part], error[part] = _run(form, host, carried, x[part].reshape(len(x[part]), -1), taps)
        for here, (y, wrong) in zip(seen or [], taps, strict=False):
            here[0][part], here[1][part] = y, wrong

    _each(one, chunks)
    if not np.isfinite(z).all() or not np.isfinite(error).all():
        raise NotFiniteError("the network is not finite at some of these examples")
    return z, error


def _each(work: Callable[[slice], None], chunks: Sequence[slice]) -> None:
    """work(chunk) for all, side by side on the cores: most of it are sums that use one."""
    workers = min(os.cpu_count() or 1, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            work(chunk)
        return
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool, stoppable():
        for task in [pool.submit(copy_context().run, work, chunk) for chunk in chunks]:
            task.result()


def _run(
    form: LureForm, host: HostForm, carried: dict[tuple[int, int], float], x: np.ndarray, seen: Seen
) -> tuple[np.ndarray, np.ndarray]:
    rounded = _Rounded(form, host, carried, len(x), seen)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        held = walk(form.program, rounded, {0: (x.T, np.zeros_like(x.T))})
        z, error = held[form.program.output]
        return z.T, rounded.gather(-1, error)


class _Rounded(Algebra[tuple[np.ndarray, np.ndarray]]):
    """Registers as columns (entries, N) of values and bounds of their rounding error since the last taps."""

    affine = True

    def __init__(
        self, form: LureForm, host: HostForm, carried: dict[tuple[int, int], float], count: int, seen: Seen
    ) -> None:
        self.form, self.host, self.program, self.carried, self.seen = form, host, form.program, carried, seen
        self.count = count
        self.total: dict[int, np.ndarray] = {}
        self.evaluation: dict[int, np.ndarray] = {}
        self.values: dict[int, np.ndarray] = {}

    @staticmethod
    def length(entries: np.ndarray) -> np.ndarray:
        top = np.maximum(entries.max(axis=0, initial=0.0), 1e-300)
        return top * np.sqrt(np.square(entries / top).sum(axis=0)) * (1 + gamma(len(entries) + 8))

    def gather(self, target: int, delta: np.ndarray) -> np.ndarray:
        """t_k per example."""
        t = self.length(delta)
        for j, tap in enumerate(self.form.taps):
            if (target, j) in self.carried and j in self.total:
                slope = _largest_slope(self.form, j, tap)
                t = t + self.carried[target, j] * (slope * self.total[j] + self.evaluation[j])
        return t * (1 + gamma(4 * len(self.form.taps) + 8))

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> tuple[np.ndarray, np.ndarray]:
        offset = _offset(self.host, op, self.program.shapes) if self.affine else None
        size = self.program.sizes[op.output]
        # columns to begin with: sums have the order in memory of what is added
        out, error = np.zeros((2, size, 1)) if offset is None else (part[:, None] for part in offset)
        for m in self.host.step(place):
            if m.register not in held:
                continue
            value, wrong = held[m.register]
            if m.rows is not None and (m.rows >= 0).all():
                product, spread = value[m.rows], wrong[m.rows]
            else:
                # a convolution without its matrix, or the matrix; sums of the same terms, in some order
                times: Any = m.convolution or m.matrix.__matmul__
                absolute: Any = m.convolution.absolute if m.convolution else abs(m.matrix).__matmul__
                terms = m.convolution.terms if m.convolution else nonzeros_per_row(m.matrix)
                product = times(value)
                # two products that may be rounded to denormals, by half the least of them each
                small = np.abs(value) * (gamma(terms + 1) + m.relerr) + 2.0**-1074
                spread = absolute(wrong * (1 + 2 * m.relerr) + small)
                spread = spread * (1 + gamma(terms + 4)) + terms * 2.0**-1022
            out = out + product
            error = (error + spread + np.abs(out) * U) * (1 + 4 * U)
        if out.shape[1] < self.count:  # a constant
            out, error = (np.broadcast_to(part, (size, self.count)) for part in (out, error))
        return out, error

    def tap(self, k: int, value: Any) -> tuple[np.ndarray, np.ndarray]:
        (y, delta), tap = value, self.form.taps[k]
        self.total[k] = self.gather(k, delta * (np.sqrt(multiplicity(tap))[:, None] * (1 + 4 * U)))
        self.seen.append((y.T, self.total[k]))
        v, eta = _apply(self.host, tap, y)
        self.evaluation[k] = self.length(eta)
        self.values[k] = v
        return v, np.zeros_like(v)

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> tuple[np.ndarray, np.ndarray]:
        values, errors = zip(*(held[i] for i in registers), strict=True)
        return np.concatenate(values), np.concatenate(errors)

    def split(self, value: Any, registers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        begin = 0
        for i in registers:
            end = begin + self.program.sizes[i]
            yield i, (value[0][begin:end], value[1][begin:end])
            begin = end


class _Linear(_Rounded):
    """The same without offsets, from given values of the input and of the taps: (W u, bound of its rounding error)."""

    affine = False

    def __init__(self, source: _Rounded) -> None:
        super().__init__(source.form, source.host, source.carried, source.count, source.seen)
        self.values = source.values
        self.images: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def tap(self, k: int, value: Any) -> tuple[np.ndarray, np.ndarray]:
        if value is not None:
            self.images[k] = value
        return self.values[k], np.zeros_like(self.values[k])

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> tuple[np.ndarray, np.ndarray]:
        zeros = {i: (np.zeros((self.program.sizes[i], self.count)),) * 2 for i in registers if i not in held}
        return super().join(registers, {**held, **zeros} if zeros else held)


def layer_images(form: LureForm, x: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, Any]]:
    """The linear maps W_k between taps at examples x (N, *in_shape), for lower bounds of their norms.

    Returns:
        values u_j (N, n_j) in float64 of the taps j and of the input (-1), near those of the network; and for every tap
        k, and the output (the number of taps), (W_k u, e) with |W_k u - exact W_k u| <= e entrywise, (N, m_k) each,
        where u are exactly these values. Maps of nothing are left out.
    """
    host, flat = recursion.host_form(form), x.reshape(len(x), -1)
    real = _Rounded(form, host, carriers(form), len(x), [])
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        walk(form.program, real, {0: (flat.T, np.zeros_like(flat.T))})
        linear = _Linear(real)
        held = walk(form.program, linear, {0: (flat.T, np.zeros_like(flat.T))})
    if form.program.output in held:
        linear.images[len(form.taps)] = held[form.program.output]
    images = {k: (y.T, error.T) for k, (y, error) in linear.images.items()}
    return {-1: flat} | {j: v.T for j, v in real.values.items()}, images


def _offset(host: HostForm, step: Any, shapes: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """The constant part of an affine step, and an entrywise bound of its rounding error (constants that are summed)."""
    if not KINDS[step.kind].joint or all(i >= 0 for i in step.inputs):
        return None
    if step.kind == "scatter_add":
        target = dict(step.params)["target"].array.ravel()
        base, updates = (
            np.zeros(int(np.prod(shapes[i]))) if i >= 0 else host.consts[-1 - i].astype(np.float64).ravel()
            for i in step.inputs
        )
        total, size, kept = base.copy(), np.abs(base), target >= 0
        np.add.at(total, target[kept], updates[kept])
        np.add.at(size, target[kept], np.abs(updates[kept]))
        terms = int(np.bincount(target[kept]).max(initial=0))
        return total, gamma(terms) * size * (1 + gamma(terms + 4))
    args = [np.zeros(shapes[i]) if i >= 0 else host.consts[-1 - i].astype(np.float64) for i in step.inputs]
    if step.kind in ("add", "sub"):  # JAX would compile a program for every shape
        value = (np.add if step.kind == "add" else np.subtract)(*args)
    else:
        with jax.enable_x64(True), on_host():
            value = KINDS[step.kind].apply(dict(step.params), *map(jnp.asarray, args))
    value = np.asarray(value, np.float64).ravel()
    return value, np.zeros_like(value)


def _largest_slope(form: LureForm, k: int, tap: Tap) -> float:
    if tap.groups is not None:
        return 1.0
    lower, upper = proved_slopes(form, k)
    return float(max(np.abs(lower).max(initial=0.0), np.abs(upper).max(initial=0.0)))


def enclosable(host: HostForm, tap: Tap) -> bool:
    """False for a declared activation made of a primitive that interval arithmetic does not know."""
    if not tap.assumed:
        return True
    assert tap.expr is not None
    zero = np.zeros(tap.shapes[0])
    try:
        activations.enclose(tap.expr, tap.constants(host.consts), zero, zero)
    except activations.SlopeError:
        return False
    return True


def _apply(host: HostForm, tap: Tap, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(v, error): the tap at the columns of y (size_in, N), and an entrywise bound of its evaluation error."""
    if tap.expr is not None:
        consts = tap.constants(host.consts)
        point = y.T.reshape(y.shape[1], *tap.shapes[0])
        if not enclosable(host, tap):
            with jax.enable_x64(True), on_host():
                v = np.asarray(activations.evaluate(tap.expr, consts, jnp.asarray(point)), np.float64)
            v = np.broadcast_to(v, point.shape).reshape(y.shape[1], -1).T
            return v, DECLARED_ACCURACY * (1 + np.abs(v))
        low, high = activations.enclose(tap.expr, consts, point, point)
        return _middle(*(np.broadcast_to(a, point.shape).reshape(y.shape[1], -1).T for a in (low, high)))
    assert tap.groups is not None
    rows = y[tap.groups.array]  # (groups, width, N)
    if tap.kind == "sort":
        v = np.zeros((tap.size_out, y.shape[1]))
        v[tap.groups.array] = np.sort(rows, axis=1)
    elif tap.kind == "logsumexp":
        return _logsumexp(rows)
    else:
        v = {"max": np.max, "min": np.min}[tap.kind](rows, axis=1)
    return v, np.zeros_like(v)


def _logsumexp(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(v, error) of log(sum(exp(rows))) over axis 1: m + log(sum(exp(rows - m))), m the maximum, in intervals."""
    top = rows.max(axis=1, keepdims=True)
    with I.quiet():
        powers = I.exp(I.sub(I.point(rows), I.point(top)))
        slip = gamma(rows.shape[1] + 1)
        low, high = (end.sum(axis=1) * (1 + sign * slip) for end, sign in zip(powers, (-1, 1), strict=True))
        return _middle(*I.add(I.log((np.maximum(low, 1.0), high)), I.point(top[:, 0])))  # one power is exp(0)


def _middle(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle and radius of intervals, the radius rounded up."""
    middle = low + (high - low) / 2
    return middle, np.nextafter(np.maximum(high - middle, middle - low), np.inf) * (high > low)


# --- labelled examples -----------------------------------------------------------------------------------------------


def proved_gaps(z: np.ndarray, error: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, K) proved margins z_y - z_i, rounded down, inf for i = y; of one output f (N, 1), f for label 1, else -f."""
    rows = np.arange(len(labels))
    with np.errstate(over="ignore"):
        if z.shape[1] == 1:
            gaps = np.where(labels == 1, z[:, 0], -z[:, 0])[:, None]
            return gaps - (np.abs(gaps) * 4 * U + (error * (1 + 4 * U))[:, None])
        slack = error * (math.sqrt(2) * (1 + 8 * U))
        gaps = z[rows, labels][:, None] - z
        gaps = gaps - (np.abs(gaps) * 4 * U + slack[:, None])
    gaps[rows, labels] = np.inf
    return gaps


def check_examples(
    form: LureForm, X: Any, y: Any, units: Units | None = None
) -> tuple[np.ndarray, np.ndarray]:
    x = check_inputs(form, X, units)
    if form.num_outputs < 1:
        raise ValueError(
            "a radius needs outputs: the logits of the classes, or one output whose sign is the class"
        )
    return x, as_labels(y, len(x), form.num_outputs)
