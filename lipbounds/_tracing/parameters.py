"""The table of parameters that each rule supports, with the values that it allows.

A primitive says what it computes through its parameters, and a new jax version may add one that changes the result. So
no equation is accepted by its name alone: every parameter must be in `PARAMETERS` with a value that is allowed there,
or the equation is refused. A rule that supports a primitive has a row here as well
(tests/test_parameters.py compares the two, and builds every primitive on the installed jax).

Each parameter is mapped to one of

* `READ`    the rule takes its value into account, whatever it is;
* `FREE`    it does not change the value in real arithmetic (placement, derivatives, scheduling);
* a test    value -> bool: the values for which the rule is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from lipbounds._form.precision import half_or_wider

Allowed = Callable[[Any], bool]


def READ(value: Any) -> bool:
    """The rule takes the value into account."""
    return True


def FREE(value: Any) -> bool:
    """No value of it changes the result in real arithmetic."""
    return True


def _placement(sharding: Any) -> bool:
    """Where an array is placed; an "unreduced" array does not hold its final value."""
    return not getattr(getattr(sharding, "spec", None), "unreduced", ())


def _accuracy(value: Any) -> bool:
    """The usual rounding; with a `Tolerance` the user permits an error of any size."""
    return value is None or isinstance(value, lax.AccuracyMode)


def _precision(value: Any) -> bool:
    """How products are rounded: anything that keeps half precision."""
    if isinstance(value, tuple):
        return all(map(_precision, value))
    if isinstance(value, lax.DotAlgorithmPreset):
        return "F8" not in value.name
    return value is None or isinstance(value, lax.Precision)


def _float(dtype: Any) -> bool:
    """A result in floating point of at least half precision; None: that of the operands."""
    return dtype is None or (jnp.issubdtype(dtype, jnp.floating) and half_or_wider(jnp.dtype(dtype)))


def _mode(value: Any) -> bool:
    modes = lax.GatherScatterMode
    return value in (modes.CLIP, modes.FILL_OR_DROP, modes.PROMISE_IN_BOUNDS)


def combines_by(name: str) -> Allowed:
    """The scalar function of a scatter is (old, new) -> `name`(old, new), in either order."""

    def test(jaxpr: Any) -> bool:
        if jaxpr is None:
            return True
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        if len(inner.eqns) != 1 or inner.eqns[0].primitive.name != name:
            return False
        (eqn,) = inner.eqns
        return set(eqn.invars) == set(inner.invars) and list(inner.outvars) == list(eqn.outvars)

    return test


def _empty(value: Any) -> bool:
    return value is None or len(value) == 0


_ROUNDED = "cbrt cos erfc exp exp2 expm1 log log1p logistic rsqrt sin sqrt tan tanh".split()
_PLAIN = """add sub div neg abs max min sign floor ceil erf erf_inv square pow atan asinh acosh sinh cosh asin acos
    atanh select_n lt le gt ge eq ne and or not xor clamp is_finite copy stop_gradient add_any atan2 rem lgamma digamma
    bessel_i0e bessel_i1e nextafter optimization_barrier dynamic_update_slice""".split()
_WINDOW: dict[str, Allowed] = dict.fromkeys(
    "window_dimensions window_strides padding base_dilation window_dilation".split(), READ
)
_PRODUCT: dict[str, Allowed] = {
    "dimension_numbers": READ,
    "precision": _precision,
    "preferred_element_type": _float,
    "out_sharding": _placement,
}
_INDEXED: dict[str, Allowed] = {
    "dimension_numbers": READ,
    "indices_are_sorted": READ,  # a promise: a false one is refused
    "unique_indices": READ,
    "mode": _mode,
}
_REDUCE: dict[str, Allowed] = {"axes": READ, "out_sharding": _placement}
_ARG: dict[str, Allowed] = {"axes": READ, "index_dtype": READ}
_DERIVATIVE: dict[str, Allowed] = {"num_consts": FREE, "symbolic_zeros": FREE}

PARAMETERS: dict[str, dict[str, Allowed]] = {
    # calls and control flow, taken apart in jaxpr.py
    "jit": {
        "jaxpr": READ,
        "name": FREE,
        **dict.fromkeys("in_layouts out_layouts donated_invars ctx_mesh keep_unused inline".split(), FREE),
        "compiler_options_kvs": FREE,
        "in_shardings": lambda value: all(map(_placement, value)),
        "out_shardings": lambda value: all(map(_placement, value)),
    },
    "custom_jvp_call": {"call_jaxpr": READ, "jvp_jaxpr_fun": FREE, **_DERIVATIVE},
    "custom_vjp_call": {
        "call_jaxpr": READ,
        **dict.fromkeys("fwd_jaxpr_thunk bwd out_trees".split(), FREE),
        **_DERIVATIVE,
    },
    "remat2": {"jaxpr": READ, "prevent_cse": FREE, "differentiated": FREE, "policy": FREE},
    "scan": {
        **dict.fromkeys("jaxpr length reverse num_consts num_carry ft_in ft_out".split(), READ),
        "unroll": FREE,
    },
    "cond": {"branches": READ},
    # elementwise functions
    **{name: {} for name in _PLAIN},
    **{name: {"accuracy": _accuracy} for name in _ROUNDED},
    "mul": {"out_dtype": _float},
    "integer_pow": {"y": READ},
    "round": {"rounding_method": READ},
    "convert_element_type": {"new_dtype": READ, "weak_type": FREE, "sharding": _placement},
    "interp": {"xp": READ, "fp": READ, "extrapolate": READ},  # jnp.interp, recognised in piecewise.py
    # identities
    "reduce_precision": {"exponent_bits": READ, "mantissa_bits": READ},
    "name": {"name": FREE},
    "sharding_constraint": {
        "sharding": _placement,
        **dict.fromkeys("layout context_mesh unconstrained_dims".split(), FREE),
    },
    "reshard": {"dst_sharding": _placement, "concrete_mesh": FREE},
    "device_put": {"devices": FREE, "srcs": FREE, "copy_semantics": FREE},
    # linear steps
    "dot_general": _PRODUCT,
    "conv_general_dilated": {
        **_PRODUCT,
        **dict.fromkeys("window_strides padding lhs_dilation rhs_dilation".split(), READ),
        **dict.fromkeys("feature_group_count batch_group_count".split(), READ),
    },
    "reshape": {"new_sizes": READ, "dimensions": READ, "sharding": _placement},
    "squeeze": {"dimensions": READ},
    "transpose": {"permutation": READ},
    "broadcast_in_dim": {"shape": READ, "broadcast_dimensions": READ, "sharding": _placement},
    "tile": {"reps": READ},
    "rev": {"dimensions": READ},
    "slice": {"start_indices": READ, "limit_indices": READ, "strides": READ},
    "pad": {"padding_config": READ},
    "concatenate": {"dimension": READ},
    "stack": {"axis": READ},
    "unstack": {"axis": READ},
    "split": {"axis": READ, "sizes": READ},
    "reduce_sum": _REDUCE,
    "cumsum": {"axis": READ, "reverse": READ},
    "reduce_window_sum": _WINDOW,
    "gather": {**_INDEXED, "slice_sizes": READ, "unique_indices": FREE, "fill_value": READ},
    "dynamic_slice": {"slice_sizes": READ},
    # a scatter with an `update_jaxpr` (`x.at[i].apply(f)`) is rewritten in jaxpr.py before its rule is asked
    "scatter": {**_INDEXED, "update_jaxpr": lambda jaxpr: jaxpr is None, "update_consts": _empty},
    "scatter-add": {**_INDEXED, "update_jaxpr": combines_by("add"), "update_consts": _empty},
    # groups
    "reduce_max": _REDUCE,
    "reduce_min": _REDUCE,
    "reduce_window_max": _WINDOW,
    "reduce_window_min": _WINDOW,
    "sort": {
        "dimension": READ,
        "is_stable": FREE,  # equal entries are equal
        "num_keys": lambda count: count == 1,
    },
    # written as simpler equations in rewrites.py; the last two are the ones it writes
    "cummax": {"axis": READ, "reverse": READ},
    "cummin": {"axis": READ, "reverse": READ},
    "scatter-max": {**_INDEXED, "update_jaxpr": combines_by("max"), "update_consts": _empty},
    "scatter-min": {**_INDEXED, "update_jaxpr": combines_by("min"), "update_consts": _empty},
    "scatter-mul": {**_INDEXED, "update_jaxpr": combines_by("mul"), "update_consts": _empty},
    "grouped": {"mode": READ, "index": READ, "shape": READ},
    "entries": {"index": READ},
    # refused by their rule
    "cumlogsumexp": {"axis": READ, "reverse": READ},
    "argmax": _ARG,
    "argmin": _ARG,
    "top_k": {"k": READ, "axis": READ, "is_stable": FREE},
}


def not_understood(primitive: str, params: dict[str, Any]) -> tuple[str, str] | None:
    """(reason, remedy) where an equation has a parameter or a value that its row does not allow; None: all are known.

    A primitive without a row has no rule either, or must not have one.
    """
    row = PARAMETERS.get(primitive, {})
    for name, value in params.items():
        if name not in row:
            return (
                f"its parameter {name}={_short(value)} is not known to this version of lipbounds, "
                "so what it computes is not known either",
                "leave that option out, or use a jax version that this release of lipbounds was tested with",
            )
        if not row[name](value):
            return (
                f"it is not supported with the parameter {name}={_short(value)}",
                "leave that option at its default, or write the same function with other operations",
            )
    return None


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
