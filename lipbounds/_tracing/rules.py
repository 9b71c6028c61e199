"""The table of rules: each primitive is linear, elementwise, a group, or refused.

Linearity is a property of *operands*, not of names: `mul`, `dot_general`, `conv_general_dilated` with one operand that
depends on x are linear, with two they are not; a gather whose index depends on x is not linear either.

A rule takes an equation, whose parameters `parameters` has checked, and returns one of

* `Alias`    the output is an operand (casts between floats, stop_gradient, optimization_barrier, ...);
* `Linear`   a step of the canonical program: its kind is a key of `steps.KINDS`, which says how to apply it;
* `Group`    max, min or sort over constant groups of entries;
* `Refused`  the reason and the remedy.

Elementwise functions have no rule: `ELEMENTWISE` names them, and `lowering` looks for the function of one variable
that they compose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipbounds._form.concrete import is_concrete
from lipbounds._form.steps import StaticArray
from lipbounds._form.windows import along, iota, windows
from lipbounds._tracing.flat import Eqn, Value
from lipbounds._tracing.indices import UNSORTED, checked_mode, landings, outside, unsorted


@dataclass(frozen=True)
class Alias:
    operand: int


@dataclass(frozen=True)
class Linear:
    """One output of an equation as a canonical linear step over some of its operands."""

    kind: str
    params: dict[str, Any]
    operands: tuple[int, ...]
    output: int = 0


@dataclass(frozen=True)
class Group:
    """`mode` is max, min, sort or logsumexp over the rows of `index`, a (groups, width) table into the operands."""

    mode: str
    index: np.ndarray


@dataclass(frozen=True)
class Refused:
    reason: str
    remedy: str


Rule = Callable[[Eqn], "Alias | Linear | Group | Refused | Sequence[Alias | Linear] | None"]

REWRITE = "rewrite it with supported operations, or bound the part of the network before it"
PRODUCT = Refused(
    "the product of two tensors that both depend on x cannot be bounded here: over the whole space such products "
    "(attention scores, gated units such as GLU) have no Lipschitz constant in general",
    "make one factor constant, or bound the part of the network before it",
)
DIVISION = Refused(
    "division by a term that depends on x cannot be bounded here",
    "divide by a constant, or bound the part of the network before it",
)
INDEX = Refused(
    "an index depends on x (argmax, top_k, sorting order): the output jumps when the index changes",
    "use constant indices, or reduce_max / sort, which are supported as groups",
)
JUMP = Refused(
    "the output takes discrete values, so it jumps as x moves: what is computed from it cannot be bounded here",
    "remove it from the traced function (trace the logits), or use a continuous function in its place",
)
RANDOM_MASK = Refused(
    "a random mask multiplies or selects entries of x: this looks like Dropout in training mode",
    "call model.eval() on a copy (or pass deterministic=True) before tracing",
)
TRACED = Refused(
    "a mask, an index or a predicate is being traced by jit, grad or vmap, so the linear map is not known",
    "make it a constant (a NumPy array, or a static argument)",
)
UNKNOWN = Refused(
    "there is no rule for this primitive",
    "rewrite it with supported operations, or add a rule in lipbounds/_tracing/rules.py",
)
NOT_FLOAT = Refused(
    "x becomes an integer, boolean or complex tensor here: it jumps or is not real, and cannot be bounded here",
    "keep everything that depends on x in floating point; a comparison is cast to it at once, (x > 0).astype(x.dtype)",
)

OUTSIDE = Refused("an index is out of range", "use indices within the tensor")
DISORDER = Refused(*UNSORTED)

# --- rules ---------------------------------------------------------------------------------------------------------


def _depends(eqn: Eqn) -> list[bool]:
    return [value.depends for value in eqn.inputs]


def _concrete(*values: Value) -> bool:
    return all(not v.depends and is_concrete(v.const) for v in values)


def _unary(kind: str, convert: Callable[[dict[str, Any], Eqn], dict[str, Any]]) -> Rule:
    return lambda eqn: Linear(kind, convert(eqn.params, eqn), (0,))


def _add(kind: str) -> Rule:
    return lambda eqn: Linear(kind, {}, (0, 1))


def _mul(eqn: Eqn) -> Linear | Refused | None:
    first, second = _depends(eqn)
    if first and second:
        return None
    other = eqn.inputs[1 if first else 0]
    if other.randomness == 2:
        return RANDOM_MASK
    return Linear("mul", {}, (0, 1) if first else (1, 0))


def _div(eqn: Eqn) -> Linear | None:
    return None if eqn.inputs[1].depends else Linear("div", {}, (0, 1))


def _dot_rule(eqn: Eqn) -> Linear | Refused:
    if all(_depends(eqn)):
        return PRODUCT
    return Linear("dot_general", {"dimension_numbers": eqn.params["dimension_numbers"]}, (0, 1))


def _conv_rule(eqn: Eqn) -> Linear | Refused:
    if all(_depends(eqn)):
        return PRODUCT
    names = "window_strides padding lhs_dilation rhs_dilation dimension_numbers".split()
    names += ["feature_group_count", "batch_group_count"]
    return Linear("conv", {name: eqn.params[name] for name in names}, (0, 1))


def _cast(eqn: Eqn) -> Alias | Refused | None:
    if not jnp.issubdtype(eqn.outputs[0].dtype, jnp.floating):
        return NOT_FLOAT
    if not jnp.issubdtype(eqn.inputs[0].dtype, jnp.floating):
        return None  # a comparison turned into 0/1: part of an elementwise function
    return Alias(0)


def _aliases(eqn: Eqn) -> Sequence[Alias]:
    return [Alias(i) for i in range(len(eqn.outputs))]


def _unusable(*indices: Value) -> Refused | None:
    """The refusal of indices that are not known; None where they are."""
    if any(v.depends for v in indices):
        return INDEX
    return None if _concrete(*indices) else TRACED


def _misplaced(eqn: Eqn, indices: Any, hits: np.ndarray) -> Refused | None:
    """The refusal of a scatter that breaks a promise about its indices."""
    if outside(hits, eqn.inputs[2].shape, eqn.params):
        return OUTSIDE
    return DISORDER if unsorted(indices, eqn.params) else None


def _moved(eqn: Eqn, operands: Sequence[int], move: Callable[..., Any]) -> Linear:
    """The step that moves entries as `move` moves integers."""
    shapes = [eqn.inputs[i].shape for i in operands]
    starts = itertools.accumulate(map(math.prod, shapes), initial=0)
    index = np.asarray(
        move(*(jnp.asarray(iota(s) + np.int32(n)) for s, n in zip(shapes, starts, strict=False)))
    )
    return Linear("take", {"index": StaticArray(index)}, tuple(operands))


def _gather(eqn: Eqn) -> Linear | Refused:
    if why := _unusable(eqn.inputs[1]):
        return why
    p = eqn.params
    indices = jnp.asarray(eqn.inputs[1].const)
    moved = _moved(
        eqn,
        (0,),
        lambda a: lax.gather(
            a, indices, p["dimension_numbers"], p["slice_sizes"], mode=checked_mode(p["mode"]), fill_value=-1
        ),
    )
    if (moved.params["index"].array < 0).any():
        return OUTSIDE
    if unsorted(indices, p):
        return DISORDER
    return moved


def _dynamic_slice(eqn: Eqn) -> Linear | Refused:
    starts = eqn.inputs[1:]
    if why := _unusable(*starts):
        return why
    sizes = eqn.params["slice_sizes"]
    shape = eqn.inputs[0].shape
    begin = [int(np.clip(int(s.const), 0, n - k)) for s, n, k in zip(starts, shape, sizes, strict=True)]
    end = [b + k for b, k in zip(begin, sizes, strict=True)]
    return Linear("slice", {"start": tuple(begin), "limit": tuple(end), "strides": None}, (0,))


def _reshape(eqn: Eqn) -> Linear:
    shape, order = eqn.outputs[0].shape, eqn.params.get("dimensions")
    if order is None or tuple(order) == tuple(range(len(order))):
        return Linear("reshape", {"shape": shape}, (0,))
    return _moved(eqn, (0,), lambda a: lax.reshape(lax.transpose(a, order), shape))


def _dynamic_update_slice(eqn: Eqn) -> Linear | Refused:
    starts = eqn.inputs[2:]
    if why := _unusable(*starts):
        return why
    room = [n - k for n, k in zip(eqn.inputs[0].shape, eqn.inputs[1].shape, strict=True)]
    begin = [int(np.clip(int(s.const), 0, most)) for s, most in zip(starts, room, strict=True)]
    return _moved(eqn, (0, 1), lambda a, b: lax.dynamic_update_slice(a, b, begin))


def _scatter(eqn: Eqn) -> Linear | Refused:
    if why := _unusable(eqn.inputs[1]):
        return why
    p, indices = eqn.params, jnp.asarray(eqn.inputs[1].const)
    hits = landings(eqn.inputs[0].shape, indices, eqn.inputs[2].shape, p)
    if why := _misplaced(eqn, indices, hits):
        return why
    if (hits > 1).any() and not _writes_one_number(eqn.inputs[2]):
        return Refused(
            "an index occurs twice, so it is not defined which of the updates is kept", "use each index once"
        )
    return _moved(
        eqn, (0, 2), lambda a, b: lax.scatter(a, indices, b, p["dimension_numbers"], mode=p["mode"])
    )


def _writes_one_number(updates: Value) -> bool:
    """A constant that is the same everywhere, so that it does not matter which of two updates is kept."""
    if not _concrete(updates):
        return False
    values = np.asarray(updates.const)
    return bool((values == values.flat[0]).all()) if values.size else True


def _scatter_add_rule(eqn: Eqn) -> Linear | Refused:
    if why := _unusable(eqn.inputs[1]):
        return why
    p, indices = eqn.params, jnp.asarray(eqn.inputs[1].const)
    operand, updates = eqn.inputs[0], eqn.inputs[2]
    hits = landings(operand.shape, indices, updates.shape, p)
    if why := _misplaced(eqn, indices, hits):
        return why
    if p["unique_indices"] and (hits > 1).any():
        return Refused("unique_indices=True was promised, but an index occurs twice", "drop the promise")
    size = math.prod(operand.shape)
    if size >= MOST_TARGETS:
        return Refused(f"a scatter-add over {size} entries is too large", "split it")
    target = targets(operand.shape, indices, updates.shape, p)
    return Linear("scatter_add", {"target": StaticArray(target)}, (0, 2))


MOST_TARGETS = 2**24  # entries that float32 can number


def targets(shape: Sequence[int], indices: Any, updates: Sequence[int], p: dict[str, Any]) -> np.ndarray:
    """Of the shape of the updates of a scatter: the flat entry of the operand where each lands, -1 if dropped."""
    with jax.ensure_compile_time_eval():
        _, pull = jax.vjp(
            lambda b: lax.scatter_add(
                jnp.zeros(shape, jnp.float32), indices, b, p["dimension_numbers"], mode=p["mode"]
            ),
            jnp.zeros(updates, jnp.float32),
        )
        # The transpose of scatter-add reads the cotangent where each update lands; 0 where it is dropped.
        (target,) = pull(jnp.arange(1, int(np.prod(shape)) + 1, dtype=jnp.float32).reshape(shape))
        return np.asarray(target).astype(np.int32) - 1


def _select(eqn: Eqn) -> Alias | Linear | Refused | None:
    predicate, *cases = eqn.inputs
    if predicate.depends:
        return None
    if predicate.randomness == 2:
        return RANDOM_MASK
    if not _concrete(predicate):
        return TRACED
    which = np.asarray(predicate.const)
    if which.dtype != np.bool_:
        which = np.clip(which, 0, len(cases) - 1)
    if which.size and (which == which.flat[0]).all() and cases[int(which.flat[0])].depends:
        return Alias(1 + int(which.flat[0]))
    return _moved(eqn, range(1, 1 + len(cases)), lambda *a: lax.select_n(jnp.asarray(which), *a))


def _split(eqn: Eqn) -> Sequence[Linear]:
    axis, start, out = eqn.params["axis"], 0, []
    shape = eqn.inputs[0].shape
    for i, size in enumerate(eqn.params["sizes"]):
        begin = tuple(start if d == axis else 0 for d in range(len(shape)))
        limit = tuple(start + int(size) if d == axis else n for d, n in enumerate(shape))
        out.append(Linear("slice", {"start": begin, "limit": limit, "strides": None}, (0,), i))
        start += int(size)
    return out


def _unstack(eqn: Eqn) -> Sequence[Linear]:
    index, axis = iota(eqn.inputs[0].shape), eqn.params["axis"]
    entries = (StaticArray(index.take(i, axis)) for i in range(len(eqn.outputs)))
    return [Linear("take", {"index": one}, (0,), i) for i, one in enumerate(entries)]


def _pool(mode: str, eqn: Eqn) -> Group | Refused:
    table = windows(eqn.inputs[0].shape, eqn.params)
    if (table.max(axis=1, initial=-1) < 0).any():
        return Refused("a pooling window reads padding only, so the output is infinite", "use less padding")
    # A padded entry never wins: repeat another entry of the same window in its place.
    return Group(mode, np.where(table < 0, table.max(axis=1, keepdims=True), table))


def _reduce(mode: str, eqn: Eqn) -> Group | Refused:
    table = along(eqn.inputs[0].shape, [int(a) for a in eqn.params["axes"]])
    if not table.shape[1]:
        return Refused("a maximum over no entries is infinite", "drop it")
    return Group(mode, table)


def _sort(eqn: Eqn) -> Group | Refused:
    if len(eqn.inputs) != 1:
        return INDEX
    return Group("sort", along(eqn.inputs[0].shape, [int(eqn.params["dimension"])]))


def _scattered(eqn: Eqn) -> Refused:
    """Refuse the scatters at[].max, at[].min and at[].multiply that `rewrites` could not rewrite."""
    operand, indices, updates = eqn.inputs
    if why := _unusable(indices):
        return why
    if eqn.primitive.endswith("mul") and updates.depends:
        return PRODUCT
    hits = landings(operand.shape, indices.const, updates.shape, eqn.params)
    return _misplaced(eqn, indices.const, hits) or Refused(
        "unique_indices=True was promised, but an index occurs twice, or the tensor has too many entries",
        "drop the promise, or split the tensor",
    )


def _refuse(refused: Refused) -> Rule:
    return lambda eqn: refused


RULES: dict[str, Rule] = {
    "add": _add("add"),
    "add_any": _add("add"),
    "sub": _add("sub"),
    "neg": _unary("neg", lambda p, e: {}),
    "mul": _mul,
    "div": _div,
    "dot_general": _dot_rule,
    "conv_general_dilated": _conv_rule,
    "convert_element_type": _cast,
    "integer_pow": lambda eqn: Alias(0) if eqn.params["y"] == 1 else None,
    "reshape": _reshape,
    "squeeze": _unary("reshape", lambda p, e: {"shape": e.outputs[0].shape}),
    "transpose": _unary("transpose", lambda p, e: {"permutation": p["permutation"]}),
    "broadcast_in_dim": _unary(
        "broadcast_in_dim", lambda p, e: {"shape": e.outputs[0].shape, "dims": p["broadcast_dimensions"]}
    ),
    "tile": _unary("tile", lambda p, e: {"reps": p["reps"]}),
    "rev": _unary("rev", lambda p, e: {"dimensions": p["dimensions"]}),
    "slice": _unary(
        "slice",
        lambda p, e: {"start": p["start_indices"], "limit": p["limit_indices"], "strides": p["strides"]},
    ),
    "pad": lambda eqn: Linear("pad", {"padding_config": eqn.params["padding_config"]}, (0, 1)),
    "concatenate": lambda eqn: Linear(
        "concatenate", {"dimension": eqn.params["dimension"]}, tuple(range(len(eqn.inputs)))
    ),
    "stack": lambda eqn: Linear("stack", {"axis": eqn.params["axis"]}, tuple(range(len(eqn.inputs)))),
    "reduce_sum": _unary("reduce_sum", lambda p, e: {"axes": p["axes"]}),
    "cumsum": _unary("cumsum", lambda p, e: {"axis": p["axis"], "reverse": p["reverse"]}),
    "reduce_window_sum": _unary("reduce_window_sum", lambda p, e: dict(p)),
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "scatter": _scatter,
    "scatter-add": _scatter_add_rule,
    "select_n": _select,
    "split": _split,
    "unstack": _unstack,
    "reduce_window_max": partial(_pool, "max"),
    "reduce_window_min": partial(_pool, "min"),
    "reduce_max": partial(_reduce, "max"),
    "reduce_min": partial(_reduce, "min"),
    "sort": _sort,
    "grouped": lambda eqn: Group(eqn.params["mode"], eqn.params["index"]),
    "entries": lambda eqn: Linear(
        "take", {"index": StaticArray(eqn.params["index"])}, tuple(range(len(eqn.inputs)))
    ),
    **{f"scatter-{name}": _scattered for name in ("max", "min", "mul")},
    **{name: _refuse(UNKNOWN) for name in ("cummax", "cummin")},  # always rewritten
    "cumlogsumexp": _refuse(
        Refused(
            "logsumexp of every prefix is not supported as one operation",
            "stack jax.nn.logsumexp(x[:i]) for the prefixes that are needed",
        )
    ),
    "argmax": _refuse(INDEX),
    "argmin": _refuse(INDEX),
    "top_k": _refuse(INDEX),
    **{name: _aliases for name in ("copy", "stop_gradient", "optimization_barrier", "reduce_precision")},
    **{name: _aliases for name in ("name", "sharding_constraint", "reshard", "device_put")},
}

#: Elementwise primitives: functions of one variable are composed of these, and proved in activations.py.
ELEMENTWISE = frozenset(
    """add sub mul div neg abs max min sign floor ceil round exp exp2 expm1 log log1p tanh logistic erf erfc erf_inv
    sqrt rsqrt cbrt square integer_pow pow sin cos tan atan asinh acosh sinh cosh asin acos atanh select_n lt le gt ge
    eq ne and or not xor clamp is_finite convert_element_type copy stop_gradient reduce_precision add_any atan2 rem
    lgamma digamma bessel_i0e bessel_i1e nextafter name optimization_barrier interp""".split()
)
