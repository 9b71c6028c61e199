"""Equations that are written as simpler ones while a program is inlined.

Each is an identity of real arithmetic, so the certified network is the same:

    cummax, cummin      maxima over prefixes: groups of prefixes, or, where their table is too large, log2(n) rounds of
                        x_i <- max(x_i, x_(i-d)), d = 1, 2, 4, ...
    top_k               its values are the last k entries of a sort (its indices stay what they were)
    scatter-max, -min   an entry is the extreme of what was there and of all updates that land there
    scatter-mul         with constant factors, one product per entry and round; linear
    logaddexp(x, y)     log(e^x + e^y), recognised because its jaxpr is the one that jax makes for `jnp.logaddexp`
    log(sum(b exp(z)))  logsumexp of z + log(b) over constant groups, b constants >= 0; with z = a - c and c constant in
                        each group it is that of a, less c, and log(sum(b exp(a - c))) + c is that of a, whatever c is

The equations made here have names of their own, with rules in `rules`: `grouped` (max, min, sort or logsumexp over the
rows of an index table, -1 nowhere) and `entries` (the output reads entries of the operands, laid end to end).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.concrete import is_concrete
from lipbounds._form.steps import KINDS
from lipbounds._tracing import rules
from lipbounds._tracing.jaxpr import Eqn, Path, Value, landings, opened, outside, unsorted
from lipbounds._tracing.jaxpr import _where as place_of
from lipbounds._tracing.parameters import not_understood

if TYPE_CHECKING:
    from lipbounds._tracing.jaxpr import _Inliner

_PREFIX_ENTRIES = 2**22  # of a table of prefixes; longer ones go round by round
_TABLE_ENTRIES = 2**24

Outputs = list[Value] | None


def rewrite(inliner: _Inliner, eqn: Any, inputs: Sequence[Value], path: Path) -> Outputs:
    """The outputs of an equation that depends on x, made by simpler ones; None where nothing is known here."""
    name = eqn.primitive.name
    maker = _MAKERS.get(name)
    if maker is None or not_understood(name, eqn.params) is not None:
        return None
    return maker(_Writer(inliner, path, place_of(eqn, path)), eqn, inputs)


class _Writer:
    """Writes equations into the flat program at one place."""

    def __init__(self, inliner: _Inliner, path: Path, where: str):
        self.inliner, self.path, self.where = inliner, path, where

    def emit(
        self,
        name: str,
        params: dict[str, Any],
        inputs: Sequence[Value],
        shape: tuple[int, ...],
        bind: Callable[..., Any],
    ) -> Value:
        out = self.inliner.emit(name, params, inputs, shape, (self.where,))
        assert out.producer is not None
        out.producer.bind = bind
        return out

    def entries(self, values: Sequence[Value], index: np.ndarray) -> Value:
        """The tensor of the shape of `index` that reads these entries of the values, laid end to end."""
        return self.emit("entries", {"index": index}, values, index.shape, _take)

    def grouped(self, mode: str, values: Sequence[Value], index: np.ndarray, shape: tuple[int, ...]) -> Value:
        """max, min or logsumexp over every row of `index` (a sort of them: of the shape of the one operand)."""
        if len(values) > 1:
            values = [self.entries(values, np.arange(sum(map(_size, values)), dtype=np.int32))]
        return self.emit("grouped", {"mode": mode, "index": index, "shape": shape}, values, shape, _group)

    def binary(self, name: str, a: Value, b: Value) -> Value:
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self.emit(name, {}, [a, b], shape, {"mul": jnp.multiply, "sub": jnp.subtract}[name])


def _size(value: Value) -> int:
    return int(np.prod(value.shape))


def _take(*arrays: Any, index: np.ndarray) -> Any:
    return jnp.concatenate([jnp.ravel(a) for a in arrays])[index]


def _group(a: Any, *, mode: str, index: np.ndarray, shape: tuple[int, ...]) -> Any:
    rows = jnp.ravel(a)[index]
    if mode == "sort":
        return jnp.zeros(a.size, a.dtype).at[index].set(jnp.sort(rows, axis=1)).reshape(shape)
    of_rows: dict[str, Callable[..., Any]] = {"max": jnp.max, "min": jnp.min, "logsumexp": jax.nn.logsumexp}
    return of_rows[mode](rows, axis=1).reshape(shape)


# --- prefixes ------------------------------------------------------------------------------------------------------


def prefixes(n: int) -> np.ndarray:
    """(n, n): row i holds 0..i, and i again to the end."""
    return np.minimum(np.arange(n)[:, None], np.arange(n)).astype(np.int32)


def _cumulative(mode: str) -> Callable[..., Outputs]:
    def make(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
        return [running(write, mode, inputs[0], int(eqn.params["axis"]), bool(eqn.params["reverse"]))]

    return make


def running(write: _Writer, mode: str, value: Value, axis: int, reverse: bool) -> Value:
    """The maxima (minima) of all prefixes along an axis."""
    n = value.shape[axis]
    places = np.moveaxis(np.arange(_size(value), dtype=np.int32).reshape(value.shape), axis, -1)
    if reverse:
        places = places[..., ::-1]
    lines = places.reshape(-1, n)
    if lines.size * n <= _PREFIX_ENTRIES:
        first = write.entries([value], lines.reshape(-1))
        table = (n * np.arange(len(lines), dtype=np.int32)[:, None, None] + prefixes(n)).reshape(-1, n)
        flat = write.grouped(mode, [first], table, (lines.size,))
    else:
        flat = write.entries([value], lines.reshape(-1))
        at = np.arange(lines.size, dtype=np.int32).reshape(lines.shape)
        distance = 1
        while distance < n:
            before = at.copy()
            before[:, distance:] = at[:, :-distance]
            flat = write.grouped(
                mode, [flat], np.stack([at.reshape(-1), before.reshape(-1)], 1), (lines.size,)
            )
            distance *= 2
    back = np.empty(lines.size, np.int32)
    back[lines.reshape(-1)] = np.arange(lines.size, dtype=np.int32)
    return write.entries([flat], back.reshape(value.shape))


def _accumulate(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    """jnp.maximum.accumulate is a scan; its jaxpr is compared with the one that jax makes for it."""
    if eqn.params.get("name") != "accumulate" or len(inputs) != 1 or not inputs[0].depends:
        return None
    value = inputs[0]
    for ufunc, mode in ((jnp.maximum, "max"), (jnp.minimum, "min")):
        for axis in range(len(value.shape)):
            one = _template("accumulate", lambda v, f=ufunc, a=axis: f.accumulate(v, axis=a), value)
            if one is not None and one == _text(eqn.params["jaxpr"]):
                return [running(write, mode, value, axis, False)]
    return None


# --- recognised by their jaxpr ---------------------------------------------------------------------------------------


def _text(jaxpr: Any) -> str | None:
    """A jaxpr as text, the same for equal programs; None where it holds arrays, which the text does not show."""
    inner, consts = opened(jaxpr)
    return None if consts or inner.constvars else str(inner)


def _template(name: str, fn: Callable[..., Any], *values: Value) -> str | None:
    """The text of the first call that jax traces for `fn` at operands of these shapes; `name` is the call's own, or its
    primitive's."""
    specs = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values]
    try:
        traced = jax.make_jaxpr(fn)(*specs)
    except (TypeError, ValueError):
        return None
    for eqn in opened(traced)[0].eqns:
        for key in ("call_jaxpr", "jaxpr"):
            if name in (eqn.primitive.name, eqn.params.get("name")) and key in eqn.params:
                return _text(eqn.params[key])
    return None


def _logaddexp(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    if len(inputs) != 2 or not all(v.depends for v in inputs):
        return None
    text = _text(eqn.params["call_jaxpr"])
    if text is None or text != _template("custom_jvp_call", jnp.logaddexp, *inputs):
        return None
    shape = np.broadcast_shapes(inputs[0].shape, inputs[1].shape)
    return [write.grouped("logsumexp", inputs, pairs(*(v.shape for v in inputs)), shape)]


def pairs(first: tuple[int, ...], second: tuple[int, ...]) -> np.ndarray:
    """(outputs, 2) table of the entries that a binary operation reads, of its operands laid end to end."""
    sizes = [int(np.prod(shape)) for shape in (first, second)]
    index = [np.arange(n, dtype=np.int32).reshape(s) for n, s in zip(sizes, (first, second), strict=True)]
    columns = np.broadcast_arrays(index[0], index[1] + np.int32(sizes[0]))
    return np.stack([c.ravel() for c in columns], axis=1)


# --- top_k ---------------------------------------------------------------------------------------------------------


def _top_k(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    params, value = eqn.params, inputs[0]
    k, axis = int(params["k"]), int(params.get("axis", -1)) % len(value.shape)
    index = np.arange(_size(value), dtype=np.int32).reshape(value.shape)
    table = np.moveaxis(index, axis, -1).reshape(-1, value.shape[axis])
    outs = write.inliner.record(eqn, inputs, write.path)  # its indices are refused where they are used
    if k == 1:
        shape = tuple(1 if d == axis else n for d, n in enumerate(value.shape))
        return [write.grouped("max", [value], table, shape), outs[1]]
    ordered = write.grouped("sort", [value], table, value.shape)
    last = np.flip(index, axis).take(np.arange(k), axis)
    return [write.entries([ordered], last), outs[1]]


# --- scatters ------------------------------------------------------------------------------------------------------


def _rounds(eqn: Any, inputs: Sequence[Value]) -> list[np.ndarray] | None:
    """The updates by rounds, (operand size,) places in the updates or -1: no entry gets two in one round."""
    operand, indices, updates = inputs
    size = _size(operand)
    if indices.depends or not is_concrete(indices.const) or size >= rules.MOST_TARGETS:
        return None
    places = jnp.asarray(indices.const)
    if outside(landings(operand.shape, places, updates.shape, eqn.params), updates.shape, eqn.params):
        return None
    if unsorted(places, eqn.params):
        return None
    flat = rules.targets(operand.shape, places, updates.shape, eqn.params).reshape(-1)
    landed = np.flatnonzero(flat >= 0)
    landed = landed[np.argsort(flat[landed], kind="stable")]
    where = flat[landed]
    fresh = np.ones(len(where), bool)
    fresh[1:] = where[1:] != where[:-1]
    starts = np.flatnonzero(fresh)
    turn = np.arange(len(where)) - np.repeat(starts, np.diff(np.append(starts, len(where))))
    count = int(turn.max(initial=-1)) + 1
    if (count > 1 and eqn.params.get("unique_indices")) or count * size > _TABLE_ENTRIES:
        return None
    out = []
    for r in range(count):
        chosen = np.full(size, -1, np.int32)
        chosen[where[turn == r]] = landed[turn == r]
        out.append(chosen)
    return out


def _scatter_extreme(mode: str) -> Callable[..., Outputs]:
    def make(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
        rounds = _rounds(eqn, inputs)
        if rounds is None:
            return None
        operand, _, updates = inputs
        own = np.arange(_size(operand), dtype=np.int32)
        columns = [own, *(np.where(r >= 0, r + np.int32(len(own)), own) for r in rounds)]
        return [write.grouped(mode, [operand, updates], np.stack(columns, axis=1), operand.shape)]

    return make


def _scatter_mul(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    operand, _, updates = inputs
    if operand.depends and updates.depends:
        return None
    rounds = _rounds(eqn, inputs)
    if rounds is None or (updates.depends and len(rounds) > 1):
        return None
    if updates.depends:
        places = rounds[0].reshape(operand.shape) if rounds else np.full(operand.shape, -1, np.int32)
        product = write.binary("mul", write.entries([updates], np.maximum(places, 0)), operand)
        here = np.arange(_size(operand), dtype=np.int32).reshape(operand.shape)
        return [write.entries([operand, product], np.where(places >= 0, here + np.int32(here.size), here))]
    out = operand
    for places in rounds:
        factors = jnp.where(
            jnp.asarray(places >= 0), jnp.ravel(updates.const)[np.maximum(places, 0)], 1
        ).astype(operand.dtype)
        out = write.binary(
            "mul", out, write.inliner.const(factors.reshape(operand.shape), updates.randomness)
        )
    return [out]


# --- log(sum(exp(.))) ----------------------------------------------------------------------------------------------


def _understood(eqn: Eqn) -> bool:
    return not_understood(eqn.primitive, eqn.params) is None


def _moved(value: Value) -> tuple[Value, np.ndarray | None]:
    """(operand, index) where `value` only moves entries of one operand that depends on x: value = operand[index].

    (value, None) where it does more than that.
    """
    eqn = value.producer
    if eqn is None or sum(v.depends for v in eqn.inputs) != 1 or not _understood(eqn):
        return value, None
    rule = rules.RULES.get(eqn.primitive)
    part = rule(eqn) if rule is not None else None
    if isinstance(part, (list, tuple)):
        part = part[eqn.outputs.index(value)]
    if isinstance(part, rules.Alias):
        operand = eqn.inputs[part.operand]
        same = operand.depends and operand.shape == value.shape
        return (operand, _iota(operand.shape)) if same else (value, None)
    if not isinstance(part, rules.Linear) or not KINDS[part.kind].moves or len(part.operands) != 1:
        return value, None
    operand = eqn.inputs[part.operands[0]]
    index = np.asarray(KINDS[part.kind].apply(dict(part.params), jnp.asarray(_iota(operand.shape) + 1))) - 1
    return (operand, index) if operand.depends and (index >= 0).all() else (value, None)


def _iota(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)


def origin(value: Value) -> tuple[Value, np.ndarray]:
    """(o, index) with value = o[index] (flat), as far back as entries are only moved."""
    index = _iota(value.shape)
    while True:
        value, step = _moved(value)
        if step is None:
            return value, index
        index = step.reshape(-1)[index]


def _exponents(value: Value) -> tuple[Value, np.ndarray, np.ndarray] | None:
    """(z, table, b) with value = sum over each row of the (entries, width) tables of b exp(z), b >= 0 constants; else
    None."""
    value, index = origin(value)
    eqn = value.producer
    if eqn is None or not _understood(eqn):
        return None
    inner = None
    if eqn.primitive == "exp":
        inner = eqn.inputs[0], _iota(value.shape).reshape(-1, 1), np.ones((_size(value), 1))
    elif eqn.primitive == "abs":
        inner = _exponents(eqn.inputs[0])  # a sum of exponentials is positive
    elif eqn.primitive == "mul":
        depending = [v for v in eqn.inputs if v.depends]
        others = [v for v in eqn.inputs if not v.depends]
        found = _exponents(depending[0]) if len(depending) == 1 and is_concrete(others[0].const) else None
        if found is not None:
            b = np.broadcast_to(np.asarray(others[0].const, np.float64), value.shape).reshape(-1, 1)
            rows = np.broadcast_to(_iota(depending[0].shape), value.shape).reshape(-1)
            if np.isfinite(b).all() and (b >= 0).all() and not others[0].randomness:
                inner = found[0], found[1][rows], found[2][rows] * b
    elif eqn.primitive == "reduce_sum":
        found = _exponents(eqn.inputs[0])
        if found is not None:
            rows = rules.along(eqn.inputs[0].shape, [int(a) for a in eqn.params["axes"]])
            inner = found[0], *(part[rows].reshape(len(rows), -1) for part in found[1:])
    if inner is None or not inner[1].size:
        return None
    return inner[0], *(part[index.reshape(-1)] for part in inner[1:])


def _weighted(write: _Writer, a: Value, table: np.ndarray, b: np.ndarray, shape: Any) -> Value | None:
    """log(sum(b exp(a))) over the rows of the table, b >= 0: logsumexp of a + log(b) where b > 0.

    An entry that fills up a short row is there several times, with equal shares of its weight. log(b) is subtracted in
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
    return write.grouped("logsumexp", [value], _iota(index.shape), shape)


def _case(a: Value, index: np.ndarray) -> Value:
    """What a is read from where a constant predicate chooses the same tensor for all of these entries; else a."""
    eqn = a.producer
    if eqn is None or eqn.primitive != "select_n" or eqn.inputs[0].depends or not _understood(eqn):
        return a
    which, *cases = eqn.inputs
    if not is_concrete(which.const) or which.randomness:
        return a
    chosen = np.unique(np.broadcast_to(np.asarray(which.const).astype(int), a.shape).reshape(-1)[index])
    case = cases[chosen[0]]
    return case if chosen.size == 1 and case.depends and case.shape == a.shape else a


def _sign(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    """The sign of a sum of exponentials with weights >= 0, not all 0, as jax asks for it: 1."""
    found = _exponents(inputs[0])
    if found is None or not found[2].any(axis=1).all():
        return None
    return [write.inliner.const(np.ones(inputs[0].shape, inputs[0].dtype))]


def _shift(z: Value, table: np.ndarray) -> tuple[Value, np.ndarray, Value, np.ndarray] | None:
    """(a, table, c, index) with z = a - c where c does not change within a row of the table: c = o[index] per row."""
    eqn = z.producer
    if (
        eqn is None
        or eqn.primitive != "sub"
        or not all(v.depends for v in eqn.inputs)
        or not _understood(eqn)
    ):
        return None
    a, c = eqn.inputs
    source, index = origin(c)
    each = np.broadcast_to(index, z.shape).reshape(-1)[table]
    if (each != each[:, :1]).any():
        return None
    return a, np.broadcast_to(_iota(a.shape), z.shape).reshape(-1)[table], source, each[:, 0]


_MOVING = frozenset("reshape squeeze expand_dims broadcast_in_dim transpose copy stop_gradient slice".split())


def _log(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
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
    """A difference that `_log` wrote?"""
    eqn = value.producer
    if eqn is None or eqn.primitive != "sub":
        return False
    whole = eqn.inputs[0].producer
    return whole is not None and whole.params.get("mode") == "logsumexp"


def _ends_shifted(value: Value) -> tuple[Value, np.ndarray] | None:
    """(d, index) with value = d[index], d a difference that `_log` wrote."""
    end = value
    while end.producer is not None and end.producer.primitive in _MOVING:  # most sums are told here
        end = end.producer.inputs[0]
    if not _is_shifted(end):
        return None
    end, index = origin(value)
    return (end, index) if _is_shifted(end) else None


def _same(c: Value, index: np.ndarray, other: Value, shape: tuple[int, ...]) -> bool:
    """c[index] = other, as tensors of this shape, because both move the same entries?"""
    (first, there), (second, here) = origin(c), origin(other)
    return first is second and np.array_equal(there.reshape(-1)[index], np.broadcast_to(here, shape))


def _add(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    """(l - c) + c, as it is left by `_log`: l alone, so that c need not be made."""
    shape = tuple(eqn.outvars[0].aval.shape)
    for near, other in (inputs, inputs[::-1]):
        found = _ends_shifted(near) if near.depends and other.depends else None
        if found is None or found[0].producer is None:
            continue
        (whole, c), index = found[0].producer.inputs, np.broadcast_to(found[1], shape)
        if _same(c, index, other, shape):
            return [write.entries([whole], np.array(index))]
    return None


def _sub(write: _Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    """(a - c) - (l - c), the last step of log_softmax: a - l."""
    shape = tuple(eqn.outvars[0].aval.shape)
    first, second = inputs
    made = first.producer
    if made is None or made.primitive != "sub" or not all(v.depends for v in (*made.inputs, second)):
        return None
    if not _understood(made):
        return None
    found = _ends_shifted(second)
    if found is None or found[0].producer is None or first.shape != shape:
        return None
    (whole, c), index = found[0].producer.inputs, np.broadcast_to(found[1], shape)
    a, taken = made.inputs
    if not _same(c, index, taken, shape):
        return None
    return [write.binary("sub", a, write.entries([whole], np.array(index)))]


_MAKERS: dict[str, Callable[..., Outputs]] = {
    "cummax": _cumulative("max"),
    "cummin": _cumulative("min"),
    "top_k": _top_k,
    "scatter-max": _scatter_extreme("max"),
    "scatter-min": _scatter_extreme("min"),
    "scatter-mul": _scatter_mul,
    "jit": _accumulate,
    "custom_jvp_call": _logaddexp,
    "log": _log,
    "sign": _sign,
    "add": _add,
    "sub": _sub,
}
