"""Rewrite equations as simpler ones while a program is inlined.

Each is an identity of real arithmetic, so the certified network is the same:

    cummax, cummin      maxima over prefixes: groups of prefixes, or, where their table is too large, log2(n) rounds of
                        x_i <- max(x_i, x_(i-d)), d = 1, 2, 4, ...
    top_k               its values are the last k entries of a sort (its indices are not changed)
    scatter-max, -min   an entry is the extreme of its old value and of all updates that land on it
    scatter-mul         with constant factors, one product per entry and round; linear
    logaddexp(x, y)     log(e^x + e^y), recognised because its jaxpr is the one that jax makes for `jnp.logaddexp`
    log(sum(b exp(z)))  logsumexp of z + log(b) over constant groups, b constants >= 0; with z = a - c and c constant in
                        each group it is that of a, less c, and log(sum(b exp(a - c))) + c is that of a, whatever c is

The equations made here have names of their own, with rules in `rules`: `grouped` (max, min, sort or logsumexp over the
rows of an index table, -1 nowhere) and `entries` (the output reads entries of the operands, laid end to end).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.concrete import is_concrete
from lipbounds._form.windows import iota, pairs
from lipbounds._tracing import logarithms, rules
from lipbounds._tracing.flat import Path, Value, opened, place_of
from lipbounds._tracing.indices import landings, outside, unsorted
from lipbounds._tracing.parameters import not_understood
from lipbounds._tracing.writer import Emits, Outputs, Writer

_PREFIX_ENTRIES = 2**22  # of a table of prefixes; longer ones go round by round
_TABLE_ENTRIES = 2**24


def rewrite(inliner: Emits, eqn: Any, inputs: Sequence[Value], path: Path) -> Outputs:
    """The outputs of an equation that depends on x, computed by simpler ones; None if there is no rewrite."""
    name = eqn.primitive.name
    maker = _MAKERS.get(name)
    if maker is None or not_understood(name, eqn.params) is not None:
        return None
    return maker(Writer(inliner, path, place_of(eqn, path)), eqn, inputs)


# --- prefixes ------------------------------------------------------------------------------------------------------


def prefixes(n: int) -> np.ndarray:
    """(n, n): row i holds 0..i, and i again to the end."""
    return np.minimum(np.arange(n)[:, None], np.arange(n)).astype(np.int32)


def _cumulative(mode: str, write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    return [running(write, mode, inputs[0], int(eqn.params["axis"]), bool(eqn.params["reverse"]))]


def running(write: Writer, mode: str, value: Value, axis: int, reverse: bool) -> Value:
    """The maxima (minima) of all prefixes along an axis."""
    n = value.shape[axis]
    places = np.moveaxis(iota(value.shape), axis, -1)
    if reverse:
        places = places[..., ::-1]
    lines = places.reshape(-1, n)
    flat = write.entries([value], lines.reshape(-1))
    if lines.size * n <= _PREFIX_ENTRIES:
        table = (n * np.arange(len(lines), dtype=np.int32)[:, None, None] + prefixes(n)).reshape(-1, n)
        flat = write.grouped(mode, [flat], table, (lines.size,))
    else:
        at, distance = iota(lines.shape), 1
        while distance < n:
            before = at.copy()
            before[:, distance:] = at[:, :-distance]
            table = np.stack([at.reshape(-1), before.reshape(-1)], 1)
            flat = write.grouped(mode, [flat], table, (lines.size,))
            distance *= 2
    back = np.empty(lines.size, np.int32)
    back[lines.reshape(-1)] = np.arange(lines.size, dtype=np.int32)
    return write.entries([flat], back.reshape(value.shape))


def _accumulate(write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
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
    """The text of the first call that jax traces for `fn` at operands of these shapes.

    `name` is the call's own, or its primitive's.
    """
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


def _logaddexp(write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    if len(inputs) != 2 or not all(v.depends for v in inputs):
        return None
    text = _text(eqn.params["call_jaxpr"])
    if text is None or text != _template("custom_jvp_call", jnp.logaddexp, *inputs):
        return None
    shape = np.broadcast_shapes(inputs[0].shape, inputs[1].shape)
    return [write.grouped("logsumexp", inputs, pairs(*(v.shape for v in inputs)), shape)]


# --- top_k ---------------------------------------------------------------------------------------------------------


def _top_k(write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    params, value = eqn.params, inputs[0]
    k, axis = int(params["k"]), int(params.get("axis", -1)) % len(value.shape)
    index = iota(value.shape)
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
    size = math.prod(operand.shape)
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


def _scatter_extreme(mode: str, write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    rounds = _rounds(eqn, inputs)
    if rounds is None:
        return None
    operand, _, updates = inputs
    own = iota(operand.shape).reshape(-1)
    columns = [own, *(np.where(r >= 0, r + np.int32(len(own)), own) for r in rounds)]
    return [write.grouped(mode, [operand, updates], np.stack(columns, axis=1), operand.shape)]


def _scatter_mul(write: Writer, eqn: Any, inputs: Sequence[Value]) -> Outputs:
    operand, _, updates = inputs
    if operand.depends and updates.depends:
        return None
    rounds = _rounds(eqn, inputs)
    if rounds is None or (updates.depends and len(rounds) > 1):
        return None
    if updates.depends:
        places = rounds[0].reshape(operand.shape) if rounds else np.full(operand.shape, -1, np.int32)
        product = write.binary("mul", write.entries([updates], np.maximum(places, 0)), operand)
        here = iota(operand.shape)
        return [write.entries([operand, product], np.where(places >= 0, here + np.int32(here.size), here))]
    out = operand
    for places in rounds:
        factors = jnp.where(jnp.asarray(places >= 0), jnp.ravel(updates.const)[np.maximum(places, 0)], 1)
        factors = factors.astype(operand.dtype).reshape(operand.shape)
        out = write.binary("mul", out, write.inliner.const(factors, updates.randomness))
    return [out]


_MAKERS: dict[str, Callable[..., Outputs]] = {
    "cummax": partial(_cumulative, "max"),
    "cummin": partial(_cumulative, "min"),
    "top_k": _top_k,
    "scatter-max": partial(_scatter_extreme, "max"),
    "scatter-min": partial(_scatter_extreme, "min"),
    "scatter-mul": _scatter_mul,
    "jit": _accumulate,
    "custom_jvp_call": _logaddexp,
    **logarithms.MAKERS,
}
