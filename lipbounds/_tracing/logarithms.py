"""Recognise logarithms of sums of exponentials in a program and write them as one group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lipbounds._form.concrete import is_concrete
from lipbounds._form.windows import along, iota
from lipbounds._tracing.flat import Value
from lipbounds._tracing.writer import Outputs, Writer, origin, understood

_MOVING = frozenset("reshape squeeze expand_dims broadcast_in_dim transpose copy stop_gradient slice".split())


def _exponents(value: Value) -> tuple[Value, np.ndarray, np.ndarray] | None:
    """(z, table, b) with value = sum of b exp(z) over each row of the (entries, width) tables, b >= 0; else None."""
    value, index = origin(value)
    eqn = value.producer
    if eqn is None or not understood(eqn):
        return None
    inner = None
    if eqn.primitive == "exp":
        inner = eqn.inputs[0], iota(value.shape).reshape(-1, 1), np.ones((math.prod(value.shape), 1))
    elif eqn.primitive == "abs":
        inner = _exponents(eqn.inputs[0])  # a sum of exponentials is positive
    elif eqn.primitive == "mul":
        depending = [v for v in eqn.inputs if v.depends]
        others = [v for v in eqn.inputs if not v.depends]
        found = _exponents(depending[0]) if len(depending) == 1 and is_concrete(others[0].const) else None
        if found is not None:
            b = np.broadcast_to(np.asarray(others[0].const, np.float64), value.shape).reshape(-1, 1)
            rows = np.broadcast_to(iota(depending[0].shape), value.shape).reshape(-1)
            if np.isfinite(b).all() and (b >= 0).all() and not others[0].randomness:
                inner = found[0], found[1][rows], found[2][rows] * b
    elif eqn.primitive == "reduce_sum":
        found = _exponents(eqn.inputs[0])
        if found is not None:
            rows = along(eqn.inputs[0].shape, [int(a) for a in eqn.params["axes"]])
            inner = found[0], *(part[rows].reshape(len(rows), -1) for part in found[1:])
    if inner is None or not inner[1].size:
        return None
    return inner[0], *(part[index.reshape(-1)] for part in inner[1:])


def _weighted(write: Writer, a: Value, table: np.ndarray, b: np.ndarray, shape: Any) -> Value | None:
    """log(sum(b exp(a))) over the rows of the table, b >= 0: logsumexp of a + log(b) where b > 0.

    A short row repeats an entry, whose weight is shared equally among its copies. log(b) is subtracted in
    two parts, so that it is right to about twice the digits of a.
    """
    if (b == 1.0).all():
        return write.grouped("logsumexp", [a], table.astype(np.int32), shape)
    kept = b > 0.0
    width = kept.sum(axis=1)
    if not width.all():
        return None
    columns = np.argsort(~kept, axis=1, kind="stable")[:, : width.max()]
    filled = np.arange(width.max()) < width[:, None]
    columns = np.where(filled, columns, columns[:, :1])
    copies = np.where(columns == columns[:, :1], 1 + (~filled).sum(axis=1, keepdims=True), 1)
    logs = -np.log(np.take_along_axis(b, columns, 1).astype(np.longdouble)) + np.log(
        copies.astype(np.longdouble)
    )
    index = np.take_along_axis(table, columns, 1).astype(np.int32)
    value = write.entries([_case(a, index)], index)
    for _ in range(2):
        part = logs.astype(a.dtype)
        value = write.binary("sub", value, write.inliner.const(part))
        logs = logs - part.astype(np.longdouble)
    return write.grouped("logsumexp", [value], iota(index.shape), shape)


def _case(a: Value, index: np.ndarray) -> Value:
    """The tensor that a constant predicate selects for all of these entries of a; a if they differ."""
    eqn = a.producer
    if eqn is None or eqn.primitive != "select_n" or eqn.inputs[0].depends or not understood(eqn):
        return a
    which, *cases = eqn.inputs
    if not is_concrete(which.const) or which.randomness:
        return a
    chosen = np.unique(np.broadcast_to(np.asarray(which.const).astype(int), a.shape).reshape(-1)[index])
    case = cases[chosen[0]]
    return case if chosen.size == 1 and case.depends and case.shape == a.shape else a


def _sign(write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    """The sign of a sum of exponentials with weights >= 0, not all 0, which jax computes: 1."""
    found = _exponents(inputs[0])
    if found is None or not found[2].any(axis=1).all():
        return None
    return [write.inliner.const(np.ones(inputs[0].shape, inputs[0].dtype))]


def _shift(z: Value, table: np.ndarray) -> tuple[Value, np.ndarray, Value, np.ndarray] | None:
    """(a, table, c, index) with z = a - c where c does not change within a row of the table: c = o[index] per row."""
    eqn = z.producer
    if eqn is None or eqn.primitive != "sub" or not all(v.depends for v in eqn.inputs) or not understood(eqn):
        return None
    a, c = eqn.inputs
    source, index = origin(c)
    each = np.broadcast_to(index, z.shape).reshape(-1)[table]
    if (each != each[:, :1]).any():
        return None
    return a, np.broadcast_to(iota(a.shape), z.shape).reshape(-1)[table], source, each[:, 0]


def _log(write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    found = _exponents(inputs[0])
    if found is None:
        return None
    shape = inputs[0].shape
    z, table, weights = found
    shifted = _shift(z, table)
    if shifted is None:
        whole = _weighted(write, z, table, weights, shape)
        return None if whole is None else [whole]
    a, table, c, index = shifted
    whole = _weighted(write, a, table, weights, shape)
    return None if whole is None else [write.binary("sub", whole, write.entries([c], index.reshape(shape)))]


def _is_shifted(value: Value) -> bool:
    """Whether the value is a difference that `_log` wrote."""
    eqn = value.producer
    if eqn is None or eqn.primitive != "sub":
        return False
    whole = eqn.inputs[0].producer
    return whole is not None and whole.params.get("mode") == "logsumexp"


def _ends_shifted(value: Value) -> tuple[Value, np.ndarray] | None:
    """(d, index) with value = d[index], d a difference that `_log` wrote."""
    end = value
    while end.producer is not None and end.producer.primitive in _MOVING:  # most sums are ruled out here
        end = end.producer.inputs[0]
    if not _is_shifted(end):
        return None
    end, index = origin(value)
    return (end, index) if _is_shifted(end) else None


def _same(c: Value, index: np.ndarray, other: Value, shape: tuple[int, ...]) -> bool:
    """Whether c[index] = other, as tensors of this shape, because both move the same entries."""
    (first, there), (second, here) = origin(c), origin(other)
    return first is second and np.array_equal(there.reshape(-1)[index], np.broadcast_to(here, shape))


def _add(write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    """Write (l - c) + c, with the difference from `_log`, as l, so that c is not needed."""
    shape = tuple(eqn.outvars[0].aval.shape)
    for near, other in (inputs, inputs[::-1]):
        found = _ends_shifted(near) if near.depends and other.depends else None
        if found is None or found[0].producer is None:
            continue
        (whole, c), index = found[0].producer.inputs, np.broadcast_to(found[1], shape)
        if _same(c, index, other, shape):
            return [write.entries([whole], np.array(index))]
    return None


def _sub(write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    """Write (a - c) - (l - c), the last step of log_softmax, as a - l."""
    shape = tuple(eqn.outvars[0].aval.shape)
    first, second = inputs
    made = first.producer
    if made is None or made.primitive != "sub" or not understood(made):
        return None
    if not all(v.depends for v in (*made.inputs, second)):
        return None
    found = _ends_shifted(second)
    if found is None or found[0].producer is None or first.shape != shape:
        return None
    (whole, c), index = found[0].producer.inputs, np.broadcast_to(found[1], shape)
    a, taken = made.inputs
    if not _same(c, index, taken, shape):
        return None
    return [write.binary("sub", a, write.entries([whole], np.array(index)))]


MAKERS: dict[str, Callable[..., Outputs]] = {"log": _log, "sign": _sign, "add": _add, "sub": _sub}
"""Primitives that may end such an expression, with the functions that rewrite them."""
