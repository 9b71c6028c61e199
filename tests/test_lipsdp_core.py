"""The training core of LipSDP: its values against the proved bound, gradients, failures, and a training loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_cache import compilations
from zoo import NETS
from zoo_core import gauss

import lipbounds as lb
from lipbounds._lipsdp import core as core_module
from lipbounds._lipsdp import core_states
from lipbounds.training.data import digits
from lipbounds.training.models import maxmin

CORE = lb.lipsdp.core


@partial(jax.jit, static_argnames=("steps", "pairwise"))
def run(form: Any, state: Any, steps: int, pairwise: bool = False) -> Any:
    return CORE(form, state, steps=steps, pairwise=pairwise)


@partial(jax.jit, static_argnames="dtype")
def begin(form: Any, dtype: Any = jnp.float32) -> Any:
    return CORE.init(form, jax.random.key(0), dtype)


def trace(name: str, seed: int = 0) -> Any:
    net = NETS[name]
    fn, x = net.make(seed)
    return lb.trace(fn, x, batched=net.batched)


def forward(weights: Any, activation: Callable[..., Any] = jax.nn.relu) -> Callable[[Any], Any]:
    def net(x: Any) -> Any:
        for w in weights[:-1]:
            x = activation(w @ x)
        return weights[-1] @ x

    return net


def traced(weights: Any, activation: Callable[..., Any] = jax.nn.relu) -> Any:
    return lb.trace(
        forward(weights, activation), jax.ShapeDtypeStruct((weights[0].shape[1],), weights[0].dtype)
    )


def mlp(rng: np.random.Generator, *sizes: int, gain: float = 1.4) -> list[jax.Array]:
    return [gauss(rng, b, a, gain=gain) for a, b in itertools.pairwise(sizes)]


def upper(a: Any) -> np.ndarray:
    return np.asarray(a, np.float64)[np.triu_indices(len(a), 1)]


# ------------------------------------------------------------------------------------------- values
SHOWN = ["relu", "absolute", "gelu_exact", "maxmin_mlp", "two_branches"]


@pytest.mark.parametrize(
    "name", [n if n == "relu" else pytest.param(n, marks=pytest.mark.slow) for n in SHOWN]
)
@pytest.mark.slow
def test_many_steps_come_to_the_proved_bound(name: str) -> None:
    form = trace(name)
    proved = lb.lipsdp(form).value
    with jax.enable_x64(True):
        exact, state = run(form, begin(form, jnp.float64), 400)
        assert not state.failed and exact.per_class is None and exact.pairwise is None
        start = float(run(form, begin(form, jnp.float64), 0)[0].value)
    assert proved * (1 - 1e-6) <= float(exact.value) <= proved * 1.01
    single, state = run(form, begin(form), 400)
    assert single.value.dtype == jnp.float32 and not state.failed
    assert proved * 0.999 <= float(single.value) <= proved * 1.02
    assert float(exact.value) * (1 - 1e-9) <= start <= 1.5 * lb.liplt(form).value


@pytest.mark.parametrize("name", ["relu", pytest.param("two_branches", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_pairs_come_to_the_recursions(name: str) -> None:
    """Against the verb's recursion, which has one D for all pairs too, and above the optimum of each pair."""
    form = trace(name)
    common = lb.lipsdp(form, solver=lb.Recursion(iterations=200), pairwise=True)
    best = lb.lipsdp(form, pairwise=True)
    with jax.enable_x64(True):
        found, state = run(form, begin(form, jnp.float64), 400, pairwise=True)
    pairs = upper(found.pairwise)
    assert not state.failed and found.per_class.shape == (form.num_outputs,)
    assert (pairs >= upper(best.pairwise) * (1 - 1e-6)).all()
    assert np.log(pairs).mean() <= np.log(upper(common.pairwise)).mean() + 0.01
    assert np.array_equal(found.pairwise, found.pairwise.T) and not np.diagonal(found.pairwise).any()


def test_float64_weights_outside_of_x64_give_no_warning(rng: np.random.Generator) -> None:
    """`lb.from_weights` of NumPy matrices; a warning is an error in these tests."""
    form = lb.from_weights([rng.normal(size=(4, 3)), rng.normal(size=(2, 4))])
    found, state = run(form, begin(form), 100)
    assert not state.failed and found.value.dtype == jnp.float32
    assert float(found.value) == pytest.approx(lb.lipsdp(form).value, rel=0.05)


@pytest.mark.slow
def test_one_output_and_no_tap(rng: np.random.Generator) -> None:
    one = traced(mlp(rng, 5, 7, 1))
    found, _ = run(one, begin(one), 200, pairwise=True)
    assert float(found.value) == pytest.approx(lb.lipsdp(one).value, rel=2e-2)
    assert found.per_class.shape == (1,) and found.pairwise.shape == (1, 1)
    assert float(found.per_class[0]) == pytest.approx(float(found.value), rel=1e-5)
    matrix = np.asarray(gauss(rng, 4, 6), np.float64)
    linear = traced([jnp.asarray(matrix, jnp.float32)])
    found, state = run(linear, begin(linear), 3, pairwise=True)
    assert state.multipliers == () and not state.failed
    assert float(found.value) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-5)
    assert upper(found.pairwise)[0] == pytest.approx(np.linalg.norm(matrix[0] - matrix[1]), rel=1e-5)


@pytest.mark.slow
def test_slopes_that_are_traced_or_almost_linear(rng: np.random.Generator) -> None:
    """Three ways to write a stage: slopes from 0, wide slopes, any slopes (traced, or nearly linear neurons)."""
    weights = mlp(rng, 6, 9, 9, 4)
    thin = jnp.linspace(0.2, 1.0, 9).at[3].set(1 - 1e-6)
    for slope, kind in [(jnp.zeros(9), "zero"), (jnp.full(9, 0.3), "wide"), (thin, "any")]:
        form = traced(weights, lambda x, s=slope: jnp.where(x >= 0, x, s * x))
        with jax.enable_x64(True):
            assert {r.slopes for r in core_states.stages(form, jnp.float64)[1]} == {kind}
            outside, _ = CORE(form, begin(form, jnp.float64), steps=0)
            inside, _ = run(form, begin(form, jnp.float64), 0)  # the slopes are tracers here
            assert float(inside.value) == pytest.approx(float(outside.value), rel=1e-9)
            found, state = run(form, begin(form, jnp.float64), 400)
        assert not state.failed
        assert 1 - 1e-6 <= float(found.value) / lb.lipsdp(form).value <= 1.01


@pytest.mark.parametrize(
    "name", ["max_pool_overlapping", pytest.param("cnn_batch_norm", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_wide_fronts_are_left_to_liplt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = trace(name)
    whole, plain = lb.lipsdp(form).value, lb.liplt(form).value
    widths = [tap.size_out for tap in form.taps]
    monkeypatch.setattr(core_module, "TAIL", max(widths) - 1)
    state = begin(form)
    assert state.front != () and len(jax.tree.leaves(state.multipliers)) < len(form.taps)
    for _ in range(6):
        found, state = run(form, state, 40, pairwise=True)
    assert not state.failed
    assert whole * 0.99 <= float(found.value) <= plain * 1.02

    def loss(consts: Any) -> jax.Array:
        other = type(form)(form.program, consts, form.slopes)
        return CORE(other, state, steps=0)[0].value

    grads = jax.grad(loss)(form.consts)
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)
    assert any(np.abs(np.asarray(g)).max() > 0 for g in grads)


# ---------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize(
    "activation",
    [
        pytest.param(jax.nn.relu, marks=pytest.mark.slow),
        pytest.param(jnp.abs, marks=pytest.mark.slow),
        pytest.param(lambda x: x + jax.nn.relu(-2 * x), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_difference_quotients(activation: Any, rng: np.random.Generator) -> None:
    """With steps=0 in the weights and in the multipliers: the same function of both."""
    with jax.enable_x64(True):
        weights = [jnp.asarray(w, jnp.float64) for w in mlp(rng, 5, 8, 7, 4)]
        state = begin(traced(weights, activation), jnp.float64)
        for _ in range(3):
            _, state = CORE(traced(weights, activation), state, steps=2, pairwise=True)

        @jax.jit
        def loss(weights: Any, multipliers: Any) -> jax.Array:
            given = state._replace(multipliers=multipliers)
            found, _ = CORE(traced(weights, activation), given, steps=0, pairwise=True)
            return found.value + jnp.sum(jnp.cos(found.pairwise)) + found.per_class[0]

        point = (weights, state.multipliers)
        grads = jax.jit(jax.grad(loss, (0, 1)))(*point)
        leaves, tree = jax.tree.flatten(point)
        for place, gradient in enumerate(jax.tree.leaves(grads)):
            direction = rng.normal(size=gradient.shape)

            def at(t: float, place: int = place, direction: Any = direction) -> float:
                moved = [leaf + t * direction if i == place else leaf for i, leaf in enumerate(leaves)]
                return float(loss(*jax.tree.unflatten(tree, moved)))

            h = 1e-5
            quotient = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
            assert float(np.sum(np.asarray(gradient) * direction)) == pytest.approx(
                quotient, rel=1e-5, abs=1e-7
            )


@pytest.mark.slow
def test_the_gradient_does_not_pass_through_the_steps(rng: np.random.Generator) -> None:
    """Danskin: with steps the gradient is that at the new multipliers, taken as constant, and 0 in the old ones."""
    weights = mlp(rng, 5, 8, 3)
    state = begin(traced(weights))

    def loss(weights: Any, multipliers: Any, steps: int) -> jax.Array:
        found, new = CORE(traced(weights), state._replace(multipliers=multipliers), steps=steps)
        return found.value, new

    improved, old = jax.grad(partial(loss, steps=3), (0, 1), has_aux=True)(weights, state.multipliers)[0]
    new = loss(weights, state.multipliers, 3)[1]
    fixed, there = jax.grad(partial(loss, steps=0), (0, 1), has_aux=True)(weights, new.multipliers)[0]
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(old))
    assert any(np.asarray(g).any() for g in jax.tree.leaves(there))
    for a, b in zip(improved, fixed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_networks_side_by_side(rng: np.random.Generator) -> None:
    stacks = [jnp.stack([w, 2 * w, -w]) for w in mlp(rng, 5, 8, 8, 3)]

    def loss(weights: Any) -> jax.Array:
        form = traced(weights)
        return CORE(form, CORE.init(form, jax.random.key(0)), steps=2)[0].value

    together, grads = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacks)
    alone = [jax.value_and_grad(loss)([w[i] for w in stacks]) for i in range(3)]
    np.testing.assert_allclose(together, [value for value, _ in alone], rtol=1e-4)
    for i, (_, g) in enumerate(alone):
        for a, b in zip(grads, g, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-3 * float(together[i]))
    assert float(together[1]) == pytest.approx(8 * float(together[0]), rel=1e-3)


# ---------------------------------------------------------------------------------------- failures
def gradient_and_state(weights: Any, state: Any, steps: int = 1) -> tuple[Any, Any, Any]:
    def loss(weights: Any) -> tuple[jax.Array, Any]:
        found, new = CORE(traced(weights), state, steps=steps, pairwise=True)
        return found.value + jnp.sum(found.pairwise), (found, new)

    grads, (found, new) = jax.jit(jax.grad(loss, has_aux=True))(weights)
    return grads, found, new


def finite(tree: Any) -> bool:
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dead", ["all", *(pytest.param(name, marks=pytest.mark.slow) for name in ("first", "neuron"))]
)
def test_dead_networks_and_neurons(dead: str, rng: np.random.Generator) -> None:
    weights = mlp(rng, 5, 8, 8, 3)
    if dead == "all":
        weights = [jnp.zeros_like(w) for w in weights]
    elif dead == "first":
        weights[0] = jnp.zeros_like(weights[0])
    else:
        weights[0] = weights[0].at[2].set(0)
        weights[2] = weights[2].at[:, 5].set(0)
    state = begin(traced(weights))
    grads, found, state = gradient_and_state(weights, state)
    assert finite((grads, found, state)) and not state.failed
    if dead != "neuron":
        assert float(found.value) == 0 and not np.asarray(found.pairwise).any()
    else:
        alive = [weights[0][np.arange(8) != 2], weights[1][np.arange(8) != 5][:, np.arange(8) != 2]]
        alive.append(weights[2][:, np.arange(8) != 5])
        smaller = run(traced(alive), begin(traced(alive)), 200)[0].value
        assert float(run(traced(weights), state, 200)[0].value) == pytest.approx(float(smaller), rel=1e-2)


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        (1e15, 1e-15, 1.0),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((1e-25, 1e-5, 1e12), (1e-18, 1e18, 1e-18))),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_huge_and_tiny_weights(sizes: tuple[float, ...], residual: bool, rng: np.random.Generator) -> None:
    weights = mlp(rng, 6, 6, 6, 6)

    def net(scales: Any) -> Any:
        def fn(x: Any) -> Any:
            for w, s in zip(weights, scales, strict=True):
                w = np.float32(s) * w
                x = x + jax.nn.relu(w @ x) * np.float32(1 / s) if residual else jax.nn.relu(w @ x)
            return x

        return lb.trace(fn, jax.ShapeDtypeStruct((6,), jnp.float32))

    scaled, plain = net(sizes), net((1.0, 1.0, 1.0))
    found, state = run(scaled, begin(scaled), 5)
    wanted = float(run(plain, begin(plain), 5)[0].value) * (1.0 if residual else float(np.prod(sizes)))
    assert not state.failed and float(found.value) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_deep_networks_in_float32(rng: np.random.Generator) -> None:
    weights = mlp(rng, 8, *[12] * 65, 4)
    form = traced(weights, lambda x: jax.nn.leaky_relu(x, 0.1))
    state = begin(form)
    assert [q.shape for q in state.multipliers][-2:] == [(63, 12), (12,)]
    single, state = run(form, state, 30, pairwise=True)
    assert finite(single) and not state.failed
    with jax.enable_x64(True):
        double, _ = run(form, begin(form, jnp.float64), 30, pairwise=True)
    assert float(single.value) == pytest.approx(float(double.value), rel=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, 1e38))])
def test_weights_that_are_not_finite(bad: float, rng: np.random.Generator) -> None:
    """The last constants come back without gradient, the state says so, and goes on when the weights are well again."""
    weights = mlp(rng, 5, 8, 8, 3)
    state = begin(traced(weights))
    before, state = run(traced(weights), state, 1, pairwise=True)
    broken = [weights[0], weights[1].at[1, 2].set(bad), weights[2]]
    if bad == 1e38:
        broken = [bad * w for w in weights]
    grads, found, after = gradient_and_state(broken, state)
    assert bool(after.failed) and finite((grads, after))
    assert all(not np.asarray(g).any() for g in grads)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
    again, well = run(traced(weights), after, 1, pairwise=True)
    assert not well.failed and float(again.value) <= 2 * float(before.value)
    first = jax.jit(lambda w: CORE.init(traced(w), jax.random.key(0)))(broken)
    assert finite(first.multipliers)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [-3.0, pytest.param(40.0, marks=pytest.mark.slow)])
def test_multipliers_that_are_not_feasible_are_repaired(shift: float, rng: np.random.Generator) -> None:
    weights = mlp(rng, 5, 8, 8, 3)
    form = traced(weights)
    state = begin(form)
    state = state._replace(multipliers=jax.tree.map(lambda q: q + shift, state.multipliers))
    grads, found, new = gradient_and_state(weights, state, steps=0)
    assert finite((grads, found, new)) and not new.failed
    assert float(found.value) >= lb.lipsdp(form).value * (1 - 1e-4)
    if shift < 0:  # the least multiple that is feasible
        assert float(found.value) < 1e4 * lb.lipsdp(form).value
    for value in (np.nan, np.inf):
        state = state._replace(multipliers=jax.tree.map(lambda q: q + value, state.multipliers))  # noqa: B023
        _, found, new = gradient_and_state(weights, state, steps=0)
        assert finite((found, new)) and bool(new.failed)
        assert not run(form, new, 0)[1].failed, "multipliers begin anew"


# ------------------------------------------------------------------------------------ compilation
@pytest.mark.slow
def test_new_weights_compile_nothing(rng: np.random.Generator) -> None:
    forms = [traced(mlp(rng, 5, 8, 8, 3)) for _ in range(3)]
    state = begin(forms[0])
    jax.block_until_ready(run(forms[0], state, 1))
    with compilations() as names:
        for form in forms:
            jax.block_until_ready(run(form, state, 1))
    assert names == []


def test_depth_does_not_cost_compilation(rng: np.random.Generator) -> None:
    """Stages of one shape are one loop: the program of 40 layers is hardly longer than that of 10."""

    def length(depth: int) -> int:
        weights = mlp(rng, 8, *[8] * depth, 4)
        state = jax.eval_shape(begin, traced(weights))

        def loss(weights: Any, state: Any) -> jax.Array:
            return CORE(traced(weights), state)[0].value

        return str(jax.make_jaxpr(jax.grad(loss))(weights, state)).count("\n")

    assert length(40) < 1.5 * length(10)


# --------------------------------------------------------------------------------------- training
def crm(logits: jax.Array, labels: jax.Array, pairs: jax.Array) -> jax.Array:
    """Cross-entropy minus the soft certified radius of what is right and closer than 1.5."""
    mine = labels[:, None] == jnp.arange(10)[None]
    gaps = jnp.take_along_axis(logits, labels[:, None], 1) - logits
    radii = gaps / jnp.where(mine, 1, pairs[labels])
    soft = -jax.nn.logsumexp(jnp.where(mine, -jnp.inf, -20 * radii), axis=1) / 20
    least = jnp.where(mine, jnp.inf, radii).min(axis=1)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(loss - 4 * jnp.where((least > 0) & (least < 1.5), soft, 0))


def train(core: Any, rng: np.random.Generator, joint: bool, count: int = 300) -> tuple[Any, bool]:
    """(form after `count` steps of Adam, did the core ever fail?)"""
    data = digits()
    images, labels = data.train_x.reshape(-1, 64), data.train_y.astype(np.int32)
    weights = mlp(rng, 64, 32, 32, 10)
    state = core.init(traced(weights), jax.random.key(0))
    options: dict[str, Any] = {"steps": 0} if joint else {}
    params = (weights, state.multipliers if joint else ())
    solver = optax.multi_transform({"w": optax.adam(3e-3), "q": optax.adam(2e-2)}, ("w", "q"))

    def loss(params: Any, state: Any, x: Any, y: Any) -> tuple[jax.Array, Any]:
        weights, multipliers = params
        state = state._replace(multipliers=multipliers) if joint else state
        found, state = core(traced(weights), state, pairwise=True, **options)
        return crm(jax.vmap(forward(weights))(x), y, found.pairwise), state

    @jax.jit
    def step(params: Any, memory: Any, state: Any, x: Any, y: Any) -> Any:
        grads, state = jax.grad(loss, has_aux=True)(params, state, x, y)
        with jax.numpy_dtype_promotion("standard"):
            updates, memory = solver.update(grads, memory, params)
        return optax.apply_updates(params, updates), memory, state

    memory, failed = solver.init(params), False
    for _ in range(count):
        rows = rng.integers(0, len(images), 128)
        params, memory, state = step(params, memory, state, images[rows], labels[rows])
        failed |= bool(getattr(state, "failed", False))
    return traced(params[0]), failed


def mean_radius(form: Any) -> float:
    data = digits()
    bound = lb.lipsdp(form, solver=lb.Recursion(iterations=100), pairwise=True)
    assert bound.guarantee == "verified"
    return float(
        lb.certified_radius(form, data.test_x.reshape(-1, 64), data.test_y, bound=bound).radius.mean()
    )


@pytest.mark.slow
def test_training_with_the_core_certifies_more_than_with_liplts() -> None:
    with jax.numpy_dtype_promotion("standard"):
        found = {
            name: train(core, np.random.default_rng(0), joint)
            for name, core, joint in [
                ("liplt", lb.liplt.core, False),
                ("steps", CORE, False),
                ("joint", CORE, True),
            ]
        }
    assert not any(failed for _, failed in found.values())
    radius = {name: mean_radius(form) for name, (form, _) in found.items()}
    assert radius["steps"] > 1.01 * radius["liplt"] and radius["joint"] > 1.01 * radius["liplt"]


@pytest.mark.slow
@pytest.mark.parametrize("activation", [maxmin, pytest.param(jax.nn.relu, marks=pytest.mark.slow)])
def test_trained_multipliers_prove_what_the_core_says(activation: Callable[..., Any]) -> None:
    """With the core's margins: multipliers of neurons without a centre (MaxMin) are trained beyond the edge."""
    weights = mlp(np.random.default_rng(0), 12, 16, 16, 5)
    form = traced(weights, activation)
    state = begin(form)
    for _ in range(60):
        _, state = run(form, state, 1, True)
    said, _ = run(form, state, 0, True)
    proved = lb.lipsdp(form, solver=lb.Recursion(initial=state, iterations=0), pairwise=True)
    best = lb.lipsdp(form, pairwise=True)
    off = ~np.eye(5, dtype=bool)
    assert proved.guarantee == "verified"
    assert (proved.pairwise[off] <= (1 + 1e-3) * np.asarray(said.pairwise)[off]).all()
    assert (proved.pairwise[off] >= (1 - 1e-9) * best.pairwise[off]).all()
    assert proved.pairwise[off].mean() < 0.99 * lb.liplt(form, pairwise=True).pairwise[off].mean()
