"""No rule ignores a parameter: every parameter of every primitive that has a rule is named in `parameters`.

`EXAMPLES` builds each primitive by public functions. A jax version that brings a new parameter fails
`test_every_parameter_is_known` until somebody has thought about what it means.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from test_jaxpr_contract import equations

import lipbounds as lb
from lipbounds._tracing import jaxpr, parameters, rules
from lipbounds._tracing.lowering import lower

Fn = Callable[[jax.Array], Any]
X = jnp.asarray([0.3, -0.8, 1.2, 0.5])
SPEC = jax.ShapeDtypeStruct((4,), jnp.float32)
WHERE = np.array([2, 0])
KERNEL = jnp.ones((3, 2, 2, 2))


@jax.custom_vjp
def _custom_vjp(x: jax.Array) -> jax.Array:
    return 3.0 * x


_custom_vjp.defvjp(lambda x: (_custom_vjp(x), None), lambda _, g: (g,))


def _pooled(init: float, operation: Any) -> Fn:
    return lambda x: lax.reduce_window(x, init, operation, (2,), (1,), "VALID")


def _twice(operation: Any) -> Fn:
    return lambda x: operation(x, 2 * x)


def _signs(operation: Any) -> Fn:
    return lambda x: operation(x > 0, x < 1)


def _reshard(x: jax.Array) -> jax.Array:
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec("a"))


OWN = {"interp", "grouped", "entries"}  # equations that lipbounds writes, not primitives of jax
EXAMPLES: dict[str, Fn] = {
    "jit": lambda x: jax.jit(jnp.sin)(x),
    "custom_jvp_call": jax.nn.relu,
    "custom_vjp_call": _custom_vjp,
    "remat2": lambda x: jax.checkpoint(jnp.sin)(x),
    "scan": lambda x: lax.scan(lambda c, r: (c + r * x, c), x, jnp.ones((3, 4)), reverse=True),
    "cond": lambda x: lax.cond(x[0] > 0, jnp.sin, jnp.cos, x),
    "add_any": jax.grad(lambda x: jnp.sum(jnp.sin(x) * jnp.cos(x))),
    "select_n": lambda x: jnp.where(x > 0, x, 0.0),
    "clamp": lambda x: lax.clamp(0.0, x, 1.0),
    "mul": lambda x: x * 2.0,
    "not": lambda x: lax.bitwise_not(x > 0),
    "integer_pow": lambda x: x**3,
    "round": jnp.round,
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "copy": lambda x: jnp.array(x, copy=True),
    "stop_gradient": lax.stop_gradient,
    "optimization_barrier": lax.optimization_barrier,
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 7),
    "name": lambda x: checkpoint_name(x, "a"),
    "sharding_constraint": lambda x: lax.with_sharding_constraint(
        x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "reshard": _reshard,
    "device_put": jax.device_put,
    "dot_general": lambda x: jnp.ones((3, 4)) @ x,
    "conv_general_dilated": lambda x: lax.conv(jnp.broadcast_to(x, (1, 2, 5, 4)), KERNEL, (1, 1), "SAME"),
    "reshape": lambda x: x.reshape(2, 2),
    "squeeze": lambda x: x[None].squeeze(0),
    "transpose": lambda x: x.reshape(2, 2).T,
    "broadcast_in_dim": lambda x: jnp.broadcast_to(x, (3, 4)),
    "tile": lambda x: lax.tile(x, (2,)),
    "rev": lambda x: x[::-1],
    "slice": lambda x: lax.slice(x, (0,), (3,), (2,)),
    "pad": lambda x: lax.pad(x, 0.0, ((1, 1, 0),)),
    "concatenate": lambda x: jnp.concatenate([x, x]),
    "stack": lambda x: jnp.stack([x, x]),
    "unstack": jnp.unstack,
    "split": lambda x: jnp.split(x, 2),
    "reduce_sum": jnp.sum,
    "cumsum": lambda x: lax.cumsum(x, reverse=True),
    "gather": lambda x: x[WHERE],
    "dynamic_slice": lambda x: lax.dynamic_slice(x, (jnp.int32(1),), (2,)),
    "dynamic_update_slice": lambda x: lax.dynamic_update_slice(x, x[:2], (1,)),
    "scatter": lambda x: x.at[WHERE].set(x[:2]),
    "scatter-add": lambda x: x.at[WHERE].add(x[:2]),
    "reduce_max": jnp.max,
    "reduce_min": jnp.min,
    "reduce_window_sum": _pooled(0.0, lax.add),
    "reduce_window_max": _pooled(-np.inf, lax.max),
    "reduce_window_min": _pooled(np.inf, lax.min),
    "sort": jnp.sort,
    "argmax": jnp.argmax,
    "argmin": jnp.argmin,
    "cummax": lax.cummax,
    "cummin": lambda x: lax.cummin(x, reverse=True),
    "cumlogsumexp": lax.cumlogsumexp,
    "scatter-max": lambda x: x.at[WHERE].max(x[:2]),
    "scatter-min": lambda x: x.at[WHERE].min(x[:2]),
    "scatter-mul": lambda x: x.at[WHERE].multiply(x[:2]),
    "top_k": lambda x: lax.top_k(x, 2)[0],
    **{
        name: getattr(lax, name)
        for name in """neg abs sign floor ceil exp exp2 expm1 log log1p tanh logistic erf erfc erf_inv sqrt rsqrt cbrt
        square sin cos tan atan asinh acosh sinh cosh asin acos atanh is_finite lgamma digamma bessel_i0e
        bessel_i1e""".split()
    },
    **{
        name: _twice(getattr(lax, name))
        for name in "add sub div max min pow atan2 rem nextafter lt le gt ge eq ne".split()
    },
    **{
        name: _signs(getattr(lax, f"bitwise_{name}")) for name in ("and", "or", "xor")
    },
}  # fmt: skip


def example(name: str) -> Any:
    """The first equation of this primitive, as jax traces its example."""
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh) if name == "reshard" else nullcontext():
        found = [e for e in equations(jax.make_jaxpr(EXAMPLES[name])(SPEC)) if e.primitive.name == name]
    assert found, f"the example of {name} does not trace to it"
    return found[0]


def test_rules_and_rows_of_parameters_are_the_same_primitives() -> None:
    ruled = set(rules.RULES) | set(rules.ELEMENTWISE) | set(jaxpr._CALLS) | {"scan", "cond"}
    assert ruled == set(parameters.PARAMETERS), ruled ^ set(parameters.PARAMETERS)
    assert ruled == set(EXAMPLES) | OWN, ruled ^ set(EXAMPLES)


@pytest.mark.parametrize("name", sorted(set(parameters.PARAMETERS) - OWN))
def test_every_parameter_is_known(name: str) -> None:
    params = example(name).params
    unknown = set(params) - set(parameters.PARAMETERS[name])
    assert not unknown, (
        f"jax {jax.__version__} gives {name} the parameters {sorted(unknown)}: say in parameters.py what they mean"
    )
    if name != "cond":
        assert parameters.not_understood(name, params) is None, "the plain use of it is understood"


@pytest.mark.parametrize(
    "name", ["tanh", "add", "max", "dot_general", "reduce_max", "convert_element_type", "mul", "gather"]
)
def test_an_unknown_parameter_of_an_equation_is_refused(name: str) -> None:
    def fn(_: Any, x: jax.Array) -> jax.Array:
        y = jnp.maximum(jnp.tanh(jnp.ones((4, 4)) @ x + X), X) * X
        return jnp.max(y[WHERE].astype(jnp.bfloat16).reshape(2, 1), axis=1)

    flat = jaxpr.flatten(fn, (), SPEC)
    lower(flat)  # accepted as it is
    eqn = next(e for e in flat.eqns if e.primitive == name)
    eqn.params = {**eqn.params, "new_switch": 7}
    with pytest.raises(lb.UnsupportedError, match="new_switch=7 is not known") as caught:
        lower(flat)
    (item,) = caught.value.items
    assert item.primitive == name and "jax version" in item.remedy


@pytest.mark.parametrize("name", ["jit", "custom_jvp_call", "custom_vjp_call", "remat2", "scan"])
def test_an_unknown_parameter_of_a_call_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict(parameters.PARAMETERS[name])
    del row["length" if name == "scan" else next(k for k in row if "jaxpr" not in k)]
    fn = EXAMPLES[name] if name != "scan" else lambda x: lax.scan(lambda c, r: (c + r * x, None), x, X)[0]
    lb.trace(fn, X)
    monkeypatch.setitem(parameters.PARAMETERS, name, row)
    with pytest.raises(lb.UnsupportedError, match="is not known to this version"):
        lb.trace(fn, X)
    assert lb.trace(lambda x: x * jax.jit(jnp.sin)(X), X).num_outputs == 4, "constants are computed by jax"


@pytest.mark.parametrize(
    ("fn", "word"),
    [
        (lambda x: lax.exp(-abs(x), accuracy=lax.Tolerance(atol=1.0, rtol=0.5)), "accuracy"),
        (
            lambda x: lax.dot(jnp.ones((3, 4)), x, precision=lax.DotAlgorithmPreset.ANY_F8_ANY_F8_F32),
            "precision",
        ),
        (lambda x: lax.dot(jnp.ones((3, 4)), x, preferred_element_type=jnp.float8_e5m2), "preferred_element"),
    ],
    ids=["tolerance", "float8 products", "float8 result"],
)
def test_values_that_change_the_result_are_refused(fn: Fn, word: str) -> None:
    with pytest.raises(lb.UnsupportedError, match=f"with the parameter {word}"):
        lb.trace(lambda x: fn(x).astype(jnp.float32), X)


# ------------------------------------------------------------------------------------- scatters that apply a function
def kinked(x: jax.Array) -> jax.Array:
    h = x.at[0].apply(lambda a: 50.0 * jax.nn.relu(a - 128.0))
    return jnp.stack([h[0] + h[1], h[2] + 10.0])


def test_apply_at_an_index_has_the_slope_of_its_function() -> None:
    """The certificate used to be that of writing zeros: L = 1, where the slope 50 is attained between 140 and 141."""
    form = lb.trace(kinked, jnp.ones(3))
    bound = lb.lipsdp(form).value
    attained = float(kinked(jnp.array([141.0, 0, 0]))[0] - kinked(jnp.array([140.0, 0, 0]))[0])
    assert attained == 50.0 and 50.0 <= bound <= 50.03
    radius = float(lb.certified_radius(form, jnp.array([[127.9, 0.0, 90.0]]), [1]).radius[0])
    assert 0 < radius <= 2.5


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("fn", "slope"),
    [
        (lambda x: x.at[1:].apply(lambda a: 3.0 * a + 1.0), 3.0),
        (lambda x: x.at[WHERE].apply(jnp.sin), 1.0),
        (lambda x: jax.vmap(lambda r: r.at[0].apply(jnp.tanh))(x.reshape(2, 2)).ravel(), 1.0),
        (lambda x: x.at[np.array([1, 9])].apply(lambda a: 2.0 * jax.nn.relu(a)), 2.0),
        (lambda x: x.at[0].apply(lambda a: a * jnp.arange(5.0)[4]), 4.0),
    ],
    ids=["slice", "sin", "vmap", "out of range", "constants"],
)
def test_apply_is_supported_for_functions_of_the_entry(fn: Fn, slope: float) -> None:
    form = lb.trace(fn, X)
    draws = 3 * jax.random.normal(jax.random.key(0), (20, 4))
    for x in draws:
        assert np.allclose(form(x), fn(x), atol=1e-6)
    steps = jnp.stack([fn(X + 0.01 * e) - fn(X) for e in jnp.eye(4)]) / 0.01
    bound = lb.lipsdp(form).value
    assert float(jnp.linalg.norm(steps, 2)) * 0.999 <= bound <= slope * 1.01


@pytest.mark.parametrize(
    ("fn", "word"),
    [
        (lambda x: x.at[np.array([0, 0])].apply(jnp.tanh), "twice"),
        (lambda x: x.at[jnp.argmax(x)].apply(jnp.tanh), "depend on x"),
        (lambda x: x.at[0].apply(jnp.round), "jumps"),
        (lambda x: x.at[0].apply(lambda a: a * a), "unbounded"),
        (lambda x: x.at[np.array([1, 9])].apply(jnp.tanh, mode="promise_in_bounds"), "out of range"),
        (lambda x: x.at[np.array([0, 0])].set(x[:2]), "twice"),
        (lambda x: x.at[np.array([0, 0])].add(x[:2], unique_indices=True), "twice"),
        (lambda x: x.at[np.array([2, 0])].get(indices_are_sorted=True), "not sorted"),
        (lambda x: x.at[np.array([2, 0])].set(x[:2], indices_are_sorted=True), "not sorted"),
        (lambda x: x.at[np.array([2, 0])].add(x[:2], indices_are_sorted=True), "not sorted"),
        (lambda x: x.at[np.array([2, 0])].max(x[:2], indices_are_sorted=True), "not sorted"),
        (lambda x: x.at[np.array([2, 0])].apply(jnp.tanh, indices_are_sorted=True), "not sorted"),
        (
            lambda x: x.reshape(2, 2).at[np.array([1, 0]), np.array([0, 1])].get(indices_are_sorted=True),
            "not sorted",
        ),
        (lambda x: x.at[np.array([0, 9])].set(x[:2], mode="promise_in_bounds"), "out of range"),
        (lambda x: x.at[np.array([0, 9])].get(mode="promise_in_bounds"), "out of range"),
    ],
)
def test_scatters_that_are_not_one_function_are_refused(fn: Fn, word: str) -> None:
    with pytest.raises(lb.UnsupportedError, match=word):
        lb.trace(fn, X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.at[np.array([0, 2])].get(indices_are_sorted=True),
        lambda x: x.at[np.array([0, 0])].add(x[:2], indices_are_sorted=True),
        lambda x: x.at[np.array([1, 2])].max(x[:2], indices_are_sorted=True),
        lambda x: x.reshape(2, 2).at[np.array([0, 1]), np.array([1, 0])].get(indices_are_sorted=True),
        lambda x: jnp.append(x, x.at[np.zeros(0, np.int32)].get(indices_are_sorted=True)),
        # jax promises by itself that the indices of each row are sorted
        lambda x: jax.vmap(lambda row, i: row.at[i].add(1.0))(x.reshape(2, 2), np.array([1, 0])).ravel(),
        lambda x: jax.vmap(lambda i: x.at[i].set(2 * x[0]))(np.array([2, 0, 1])).ravel(),
    ],
)
def test_promises_about_the_order_of_indices_that_hold_are_believed(fn: Fn) -> None:
    assert np.allclose(lb.trace(fn, X)(X), fn(X))


def test_one_number_written_twice_is_one_number() -> None:
    form = lb.trace(lambda x: x.at[np.array([1, 1])].set(0.5), X)
    assert np.array_equal(form(X), X.at[1].set(0.5))


def test_a_function_of_two_variables_cannot_be_applied() -> None:
    """`scatter` with another computation than jax's own two: nothing public binds it, and nothing certifies it."""
    closed = jax.make_jaxpr(lambda x: x.at[0].apply(jnp.sin))(SPEC)
    (eqn,) = (e for e in closed.eqns if e.primitive.name == "scatter")
    product = jax.make_jaxpr(lambda a, b: a * b)(1.0, 1.0)
    bind = functools.partial(
        eqn.primitive.bind, **{**eqn.params, "update_jaxpr": getattr(product, "jaxpr", product)}
    )
    with pytest.raises(lb.UnsupportedError, match="more than the entry itself"):
        lb.trace(lambda x: bind(x, jnp.zeros(1, jnp.int32), jnp.float32(2.0)), X)
