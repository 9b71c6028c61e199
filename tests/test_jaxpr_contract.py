"""What lipbounds/_tracing/jaxpr.py and the rules believe about jax. Fails first, and names the fact, when jax changes.

Public API only, so that a new jax version is judged by what it does. Each message starts with the fact that fell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb
from lipbounds._tracing import jaxpr as _jaxpr
from lipbounds._tracing import rules

VERSION = tuple(int(part) for part in jax.__version__.split(".")[:2])
X = jax.ShapeDtypeStruct((4,), jnp.float32)


def opened(jaxpr: Any) -> Any:
    """The equations' holder: once, never "while it has .jaxpr"."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations, those of calls inside included, outermost first."""
    for eqn in opened(jaxpr).eqns:
        yield eqn
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple | list) else (param,):
                if hasattr(opened(inner), "eqns"):
                    yield from equations(inner)


def primitives(fn: Callable[..., Any], *args: Any) -> list[str]:
    return [eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*(args or (X,))))]


def find(fn: Callable[..., Any], name: str, *args: Any) -> Any:
    """The first equation of this primitive."""
    found = [eqn for eqn in equations(jax.make_jaxpr(fn)(*(args or (X,)))) if eqn.primitive.name == name]
    assert found, f"FACT: this function traces to a `{name}` equation; it is {primitives(fn, *args)} now"
    return found[0]


# -------------------------------------------------------------------------------------- jaxprs themselves
def test_the_version_is_one_that_was_tried() -> None:
    assert (0, 10) <= VERSION < (0, 13), (
        "FACT: jax is between 0.10 and 0.12. Measure the facts of this file on the new version, then raise the ceiling "
        "in pyproject.toml and here"
    )


def test_opening_a_jaxpr_ends_and_opening_twice_changes_nothing() -> None:
    closed = jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) + np.ones(4, np.float32))(X)
    inner, consts = _jaxpr.opened(closed)
    again, _ = _jaxpr.opened(inner)
    assert inner.eqns and again is inner, "FACT: .jaxpr of an open jaxpr is missing or the jaxpr itself"
    if VERSION >= (0, 11):
        assert closed.jaxpr is closed, "FACT: from 0.11 Jaxpr is ClosedJaxpr, and j.jaxpr is j"
    else:
        assert closed.jaxpr is not closed, "FACT: up to 0.10 a ClosedJaxpr holds an open Jaxpr"
    assert len(consts) == len(inner.constvars), "FACT: .consts belong to .constvars one to one"


def test_arrays_that_are_closed_over_are_found() -> None:
    """Whether they are consts, literals or arguments of inner calls: the flat program has their values."""
    w, v = np.arange(12.0, dtype=np.float32).reshape(3, 4), jnp.full((3,), 7.0)
    flat = _jaxpr.flatten(lambda p, x: jax.jit(lambda h: w @ h + v)(x), (), X)
    values = [np.asarray(value.const) for value in flat.values if not value.depends]
    for array in (w, v):
        assert any(np.array_equal(array, value) for value in values), (
            "FACT: constants sit in constvars or literals"
        )


def test_calls_of_one_jitted_function_share_their_jaxpr() -> None:
    f = jax.jit(lambda h: jnp.tanh(h) + 1.0)
    calls = [
        e for e in opened(jax.make_jaxpr(lambda x: f(f(x)))(X)).eqns if e.primitive.name in ("jit", "pjit")
    ]
    assert len(calls) == 2, "FACT: a jitted call is one equation named jit (or pjit)"
    one, two = (opened(e.params["jaxpr"]) for e in calls)
    assert one is two and one.invars[0] is two.invars[0], (
        "FACT: two calls of one jitted function share the sub-jaxpr and its Vars (if no longer: the environment per "
        "call of _jaxpr.py is more than needed, nothing is wrong)"
    )
    flat = _jaxpr.flatten(lambda _, x: f(f(x)), (), X)
    tanhs = [e for e in flat.eqns if e.primitive == "tanh"]
    assert len(tanhs) == 2 and tanhs[0].outputs[0] is not tanhs[1].outputs[0], "one environment per call"


@pytest.mark.parametrize(
    ("call", "name", "key"),
    [
        (jax.jit(jnp.sin), "jit", "jaxpr"),
        (jax.nn.relu, "custom_jvp_call", "call_jaxpr"),
        (jax.checkpoint(jnp.sin), "remat2", "jaxpr"),
    ],
    ids=["jit", "custom_jvp", "checkpoint"],
)
def test_call_primitives_and_where_they_keep_their_jaxpr(call: Any, name: str, key: str) -> None:
    eqn = next(e for e in equations(jax.make_jaxpr(lambda x: call(x))(X)))
    names = {name, "pjit"} if name == "jit" else {name, "checkpoint", "remat"} if name == "remat2" else {name}
    assert eqn.primitive.name in names, (
        f"FACT: this call is the primitive {name}, it is {eqn.primitive.name} now"
    )
    assert hasattr(opened(eqn.params[key]), "eqns"), f"FACT: {name} keeps its jaxpr in params[{key!r}]"
    assert eqn.primitive.name in _jaxpr._CALLS, f"{eqn.primitive.name} is missing from _jaxpr._CALLS"


def test_custom_vjp_is_inlined_to_its_primal() -> None:
    @jax.custom_vjp
    def f(x: jax.Array) -> jax.Array:
        return 3.0 * x

    f.defvjp(lambda x: (f(x), None), lambda _, g: (g * 0.0,))
    (eqn,) = opened(jax.make_jaxpr(lambda x: f(x))(X)).eqns
    name = eqn.primitive.name
    assert name in _jaxpr._CALLS and _jaxpr._CALLS[name] in eqn.params, (
        f"FACT: custom_vjp is one of the calls of _jaxpr._CALLS; it is {name} with {sorted(eqn.params)} now"
    )
    assert [e.primitive for e in _jaxpr.flatten(lambda _, x: f(x), (), X).eqns] == ["mul"]


def test_custom_vjp_of_weights_keeps_its_derivative() -> None:
    """Inlined, a network whose weights are computed by one would be differentiated by the derivative of its primal."""

    @jax.custom_vjp
    def f(w: jax.Array) -> jax.Array:
        return 3.0 * w

    f.defvjp(lambda w: (f(w), None), lambda _, g: (7.0 * g,))

    def factor(w: jax.Array) -> jax.Array:
        (eqn,) = _jaxpr.flatten(lambda w, x: f(w) * x, w, X).eqns
        return jnp.sum(eqn.inputs[0].const)

    assert jax.value_and_grad(factor)(jnp.float32(2.0)) == (6.0, 7.0)


def test_custom_jvp_of_weights_keeps_its_derivative() -> None:
    """Rounding with a straight-through derivative; and a form whose constants are no longer being traced."""

    @jax.custom_jvp
    def f(w: jax.Array) -> jax.Array:
        return jnp.round(w)

    f.defjvp(lambda primals, tangents: (f(*primals), 7.0 * tangents[0]))

    def bound(w: jax.Array, rounded: Callable[[jax.Array], jax.Array]) -> jax.Array:
        form = lb.trace(lambda x: rounded(w) * x, X)
        return jnp.sum(jnp.asarray(form.consts[0]))

    assert jax.value_and_grad(bound)(jnp.float32(2.2), f) == (2.0, 7.0)
    assert jax.value_and_grad(bound)(jnp.float32(2.2), jnp.round) == (2.0, 0.0)


def test_jit_carries_a_name_and_custom_jvp_does_not() -> None:
    eqns = list(equations(jax.make_jaxpr(jax.nn.relu)(X)))
    assert [e.primitive.name for e in eqns] == ["custom_jvp_call", "jit", "max"], (
        "FACT: relu is custom_jvp_call > jit > max; it is "
        + " > ".join(e.primitive.name for e in eqns)
        + " now"
    )
    assert "name" not in eqns[0].params, "FACT: custom_jvp_call has no name param"
    assert eqns[1].params["name"] == "relu", "FACT: jit keeps the function's name in params['name']"


def test_disabling_jit_leaves_custom_jvp_calls() -> None:
    with jax.disable_jit():
        names = primitives(jax.nn.relu)
    assert names == ["custom_jvp_call", "max"], f"FACT: disable_jit removes jit only; it is {names} now"


def test_scan_params() -> None:
    def fn(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            return carry + row * x, carry

        total, _ = lax.scan(body, x, jnp.ones((3, 4)), reverse=True)
        return total

    params = find(fn, "scan").params
    if "ft_in" in params:
        sizes = tuple(len(part) for part in params["ft_in"].unpack())
    else:
        sizes = (params["num_consts"], params["num_carry"], 1)
    assert sizes == (1, 1, 1), (
        f"FACT: scan says how many operands are (consts, carry, xs); it says {sizes} now"
    )
    assert "ft_in" in params or VERSION < (0, 12), "FACT: `ft_in` came with 0.11.2"
    assert int(params["length"]) == 3 and params["reverse"] is True, "FACT: scan has length and reverse"


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_unrolled_to_what_it_computes(reverse: bool) -> None:
    rows, x = np.arange(12.0, dtype=np.float32).reshape(3, 4), jnp.arange(4.0) + 1

    def fn(_: Any, x: jax.Array) -> jax.Array:
        last, seen = lax.scan(lambda c, r: (2 * c + r, c * r), x, rows, reverse=reverse)
        return jnp.concatenate([last, seen.ravel()])

    flat = _jaxpr.flatten(fn, (), X)
    assert not flat.refused and not any(e.primitive == "scan" for e in flat.eqns)
    env = {flat.input.index: x}
    for eqn in flat.eqns:
        args = [env[v.index] if v.depends else v.const for v in eqn.inputs]
        if eqn.bind is None:  # equations of our own: slice, reshape, concatenate
            out: Any = {
                "slice": lambda p, a: lax.slice(a, p["start_indices"], p["limit_indices"]),
                "reshape": lambda p, a: a.reshape(p["new_sizes"]),
                "concatenate": lambda p, *a: jnp.concatenate([jnp.asarray(v) for v in a], p["dimension"]),
            }[eqn.primitive](eqn.params, *args)
        else:
            out = eqn.bind(*args, **eqn.params)
        env[eqn.outputs[0].index] = out
    assert np.array_equal(env[flat.outputs[0].index], fn(None, x))


def test_fori_loops_with_static_bounds_are_scans() -> None:
    names = primitives(lambda x: lax.fori_loop(0, 3, lambda _, h: h * 2.0, x))
    assert "scan" in names and "while" not in names, (
        f"FACT: a fori_loop with static bounds is a scan; it is {names}"
    )


def test_cond_params() -> None:
    eqn = find(lambda p, x: lax.cond(p, jnp.sin, jnp.cos, x), "cond", jnp.array(True), X)
    branches = eqn.params["branches"]
    assert [opened(b).eqns[0].primitive.name for b in branches] == ["cos", "sin"], (
        "FACT: cond keeps its branches in params['branches'], the false one first"
    )
    assert opened(jax.make_jaxpr(lambda p, x: lax.cond(p, jnp.sin, jnp.cos, x))(True, X)).eqns[-1].invars[
        0
    ].aval.dtype in (np.int32, np.bool_), "FACT: the first operand of cond is the index of the branch"


def test_constants_are_evaluated_and_dependence_is_followed() -> None:
    flat = _jaxpr.flatten(lambda p, x: x * jnp.floor(p + 0.5)[::2], (jnp.arange(8.0)), X)
    assert [e.primitive for e in flat.eqns] == ["mul"]
    constant = next(v for v in flat.eqns[0].inputs if not v.depends)
    assert np.array_equal(constant.const, np.floor(np.arange(8.0) + 0.5)[::2])


def test_binary_primitives_broadcast_dimensions_of_size_one() -> None:
    names = primitives(lambda x: x * jnp.ones((3, 1)), jax.ShapeDtypeStruct((3, 4), jnp.float32))
    shapes = [v.aval.shape for v in find(lambda x: x * jnp.ones((3, 1)), "mul", jnp.ones((3, 4))).invars]
    assert "mul" in names
    if "broadcast_in_dim" not in names[names.index("mul") - 1 : names.index("mul")]:
        assert (3, 1) in shapes, "FACT: mul takes operands with dimensions of size one as they are"


# --------------------------------------------------------------------- what functions of the field trace to
@pytest.mark.parametrize(
    ("fn", "wanted"),
    [
        (jnp.tanh, {"tanh"}),
        (jnp.abs, {"abs"}),
        (jax.nn.sigmoid, {"logistic"}),
        (jax.nn.leaky_relu, {"ge", "mul", "select_n"}),
        (jax.nn.silu, {"logistic", "mul"}),
        (lambda x: jax.nn.gelu(x, approximate=True), {"tanh", "mul"}),
        (lambda x: jax.nn.gelu(x, approximate=False), {"erfc", "mul"}),
        (lambda x: jnp.clip(x, -1, 1), {"max", "min"}),
        (jax.nn.elu, {"gt", "select_n", "expm1"}),
        (jax.nn.hard_tanh, {"select_n", "gt", "lt"}),
        (lambda x: jnp.sort(x), {"sort"}),
        (lambda x: jnp.max(x), {"reduce_max"}),
        (lambda x: jnp.sum(x), {"reduce_sum"}),
        (lambda x: jnp.cumsum(x), {"cumsum"}),
        (lambda x: x[jnp.argmax(x)], {"argmax", "dynamic_slice"}),
        (lambda x: x.at[jnp.array([1, 1])].add(1.0), {"scatter-add"}),
        (lambda x: x.at[jnp.array([1, 2])].set(1.0), {"scatter"}),
        (lambda x: x[jnp.array([1, 2])], {"gather"}),
        (lambda x: jnp.where(jnp.isnan(x), 0.0, x), {"ne", "select_n"}),
        (lambda x: x.astype(jnp.bfloat16), {"convert_element_type"}),
        (lambda x: lax.stop_gradient(x) * 2, {"mul"}),
        (lambda x: jnp.flip(x), {"rev"}),
        (lambda x: jnp.split(x, 2), {"split"}),
    ],
    ids=lambda v: "-".join(sorted(v)) if isinstance(v, set) else "",
)
def test_primitives_of_common_functions(fn: Any, wanted: set[str]) -> None:
    names = set(primitives(fn))
    assert wanted <= names, (
        f"FACT: this function has the primitives {sorted(wanted)}; it has {sorted(names)} now"
    )
    known = set(rules.RULES) | set(rules.ELEMENTWISE) | set(_jaxpr._CALLS)
    assert names <= known | {"iota"}, f"no rule for {sorted(names - known)}"


def test_pooling_primitives() -> None:
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    largest = find(
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID"), "reduce_window_max", x
    )
    total = find(
        lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (2, 2), "VALID"), "reduce_window_sum", x
    )
    names = {"window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"}
    for eqn in (largest, total):
        assert names <= set(eqn.params), f"FACT: {eqn.primitive.name} has the params {sorted(names)}"


def params_of(fn: Any, primitive: str, names: str, *args: Any) -> None:
    params = find(fn, primitive, *args).params
    missing = set(names.split()) - set(params)
    assert not missing, (
        f"FACT: {primitive} has the params {names}; {sorted(missing)} of {sorted(params)} is missing"
    )


def test_params_that_the_rules_read() -> None:
    image, kernel = jnp.ones((1, 2, 5, 5)), jnp.ones((3, 2, 2, 2))
    params_of(
        lambda x: lax.dot_general(jnp.ones((3, 4)), x, (((1,), (0,)), ((), ()))),
        "dot_general",
        "dimension_numbers precision preferred_element_type",
    )
    params_of(
        lambda x: lax.conv(x, kernel, (1, 1), "SAME"),
        "conv_general_dilated",
        "window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count "
        "batch_group_count",
        image,
    )
    params_of(lambda x: x[None, ::2, None][:, :, 0], "squeeze", "dimensions")
    params_of(lambda x: x.reshape(2, 2), "reshape", "new_sizes")
    params_of(lambda x: lax.transpose(x, (1, 0)), "transpose", "permutation", jnp.ones((2, 3)))
    params_of(lambda x: jnp.broadcast_to(x, (3, 4)), "broadcast_in_dim", "shape broadcast_dimensions")
    params_of(lambda x: lax.rev(x, (0,)), "rev", "dimensions")
    params_of(lambda x: lax.slice(x, (0,), (3,), (2,)), "slice", "start_indices limit_indices strides")
    params_of(lambda x: lax.pad(x, 0.0, ((1, 1, 0),)), "pad", "padding_config")
    params_of(lambda x: jnp.concatenate([x, x]), "concatenate", "dimension")
    params_of(lambda x: jnp.sum(x), "reduce_sum", "axes")
    params_of(lambda x: lax.cumsum(x, reverse=True), "cumsum", "axis reverse")
    params_of(lambda x: x[jnp.array([1, 2])], "gather", "dimension_numbers slice_sizes mode fill_value")
    params_of(lambda x: x.at[jnp.array([1])].add(1.0), "scatter-add", "dimension_numbers mode")
    params_of(lambda x: x.at[jnp.array([1])].set(1.0), "scatter", "dimension_numbers mode")
    params_of(lambda i, x: lax.dynamic_slice(x, (i,), (2,)), "dynamic_slice", "slice_sizes", 1, X)
    params_of(lambda x: jnp.split(x, 2), "split", "axis sizes")
    params_of(lambda x: jnp.sort(x), "sort", "dimension num_keys")
    params_of(lambda x: x**3, "integer_pow", "y")
    params_of(lambda x: jnp.round(x), "round", "rounding_method")
    if hasattr(lax, "tile"):
        params_of(lambda x: lax.tile(x, (2,)), "tile", "reps")


# ------------------------------------------------------------------------------- behaviour we lean on elsewhere
def test_sort_inside_linear_transpose_is_an_error() -> None:
    with pytest.raises(Exception, match="(?i)transpose|linear|sort"):
        jax.linear_transpose(jnp.sort, X)(jnp.ones(4))


def test_float64_arrays_outside_enable_x64_become_float32() -> None:
    with jax.enable_x64(True):
        inside = jnp.asarray(np.float64(1) / 3)
        assert inside.dtype == np.float64, "FACT: enable_x64(True) is a context manager that gives float64"
    assert not jax.config.jax_enable_x64
    assert jnp.asarray(np.float64(1) / 3).dtype == np.float32, (
        "FACT: outside, float64 becomes float32 silently"
    )


def test_a_precision_context_has_no_effect_on_a_traced_jaxpr() -> None:
    traced = jax.make_jaxpr(lambda x: jnp.ones((3, 4)) @ x)(X)
    with jax.default_matmul_precision("highest"):
        kept = [e for e in equations(traced) if e.primitive.name == "dot_general"]
    assert kept and kept[0].params["precision"] is None, "FACT: precision is fixed when a function is traced"


def test_tracers_are_recognised() -> None:
    def inside(x: jax.Array) -> jax.Array:
        assert not _jaxpr.is_concrete(x)
        return x

    jax.jit(inside)(jnp.ones(2))
    assert _jaxpr.is_concrete(jnp.ones(2)) and _jaxpr.is_concrete(np.ones(2)) and _jaxpr.is_concrete(1.0)


def test_a_call_path_names_the_functions_called_and_the_users_line() -> None:
    @jax.jit
    def inner(h: jax.Array) -> jax.Array:
        return jnp.tanh(h)

    def outer(_: Any, x: jax.Array) -> jax.Array:
        with jax.named_scope("scope"):
            return inner(x)

    (path,) = (e.path for e in _jaxpr.flatten(outer, (), X).eqns if e.primitive == "tanh")
    assert "scope" in path and "inner" in path, (
        f"FACT: name stacks hold named scopes; the path is {path!r} now"
    )
    assert "test_jaxpr_contract.py" in path, (
        f"FACT: source_info has the user's file and line; the path is {path!r} now"
    )
