"""Compilations are counted: a second call, and a new trace with new weights, compile nothing.

Also the cores beside the verbs, which run under jit, grad and vmap.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import NETS
from zoo_core import gauss

import lipbounds as lb

ARCHITECTURES = ["relu", "cnn_batch_norm", "nnx_scan", "max_pool_overlapping"]
CORES = {"naive": lb.naive, "liplt": lb.liplt}


class _Compilations(logging.Handler):
    """Collects what jax logs when XLA compiles."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.names: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("Finished XLA compilation of"):
            self.names.append(message.split()[4])


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of all functions that XLA compiles inside the block."""
    logger, handler = logging.getLogger("jax"), _Compilations()
    others, propagate = logger.handlers[:], logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        with jax.log_compiles():
            yield handler.names
    finally:
        logger.handlers, logger.propagate = others, propagate


def trace(name: str, seed: int) -> Any:
    net = NETS[name]
    fn, x = net.make(seed)
    return lb.trace(fn, x, batched=net.batched)


def every_verb(form: Any) -> list[float]:
    results = [
        lb.naive(form),
        lb.liplt(form, pairwise=True),
        lb.liplt(form, norm=math.inf),
        lb.liplt(form, guarantee="estimate"),
        lb.liplt(form, guarantee="probabilistic"),
        lb.liplt(form, scaling="optimized"),
        lb.empirical(form),
    ]
    X = np.zeros((3, *form.in_shape), np.float32)
    radii = lb.certified_radius(form, X, np.arange(3) % form.num_outputs)
    return [r.value for r in results] + list(radii.radius)


def test_the_counter_counts() -> None:
    with compilations() as names:
        jax.jit(lambda x: 3.0 * x)(jnp.ones(3)).block_until_ready()
    assert len(names) >= 1


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.slow
def test_a_second_call_compiles_nothing(name: str) -> None:
    form = trace(name, 0)
    first = every_verb(form)
    with compilations() as names:
        second = every_verb(form)
    assert names == [] and first == second


@pytest.mark.parametrize(
    "name",
    [n if n == "relu" else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES],
)
def test_new_weights_compile_nothing(name: str) -> None:
    """A new trace of the same architecture has an equal static part: compiled functions are found again."""
    old = every_verb(trace(name, 0))
    new_form = trace(name, 1)
    with compilations() as names:
        new = every_verb(new_form)
    assert names == []
    assert new != old, "the cached result of the old weights was returned"


@pytest.mark.parametrize("name", ["relu", "cnn_batch_norm"])
def test_the_trace_itself_compiles_nothing_the_second_time(name: str) -> None:
    trace(name, 0)
    net = NETS[name]
    fn, x = net.make(1)
    with compilations() as names:
        lb.trace(fn, x, batched=net.batched)
    assert names == []


def test_forms_are_pytrees_with_equal_structure() -> None:
    a, b, other = trace("relu", 0), trace("relu", 1), trace("tanh", 0)
    leaves, structure = jax.tree.flatten(a)
    assert leaves and structure == jax.tree.structure(b) and hash(structure) == hash(jax.tree.structure(b))
    assert structure != jax.tree.structure(other)
    again = jax.tree.unflatten(structure, leaves)
    assert lb.liplt(again).value == lb.liplt(a).value


def test_forms_pass_through_jit() -> None:
    form = trace("cnn_batch_norm", 0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=form.in_shape), jnp.float32)
    inside = jax.jit(lambda form, x: form(x))(form, x)
    assert np.allclose(inside, form(x), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------- cores
def scalar(constants: Any) -> jax.Array:
    """The whole-network constant among the constants that a core returns."""
    return constants.value if hasattr(constants, "value") else constants


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", ["relu", "cnn_batch_norm", "max_pool_overlapping", "nnx_scan"])
@pytest.mark.parametrize("verb", sorted(CORES))
def test_cores_converge_to_the_verified_value(verb: str, name: str) -> None:
    form, core = trace(name, 0), CORES[verb].core
    step = jax.jit(core)
    state = core.init(form, jax.random.key(0))
    for _ in range(40):
        constants, state = step(form, state)
    verified = CORES[verb](form, guarantee="verified").value
    assert float(scalar(constants)) == pytest.approx(verified, rel=2e-2)


@pytest.mark.parametrize("verb", sorted(CORES))
def test_cores_compile_once_for_all_weights(verb: str) -> None:
    core = CORES[verb].core
    step, forms = jax.jit(core), [trace("relu", seed) for seed in range(3)]
    state = core.init(forms[0], jax.random.key(0))
    jax.block_until_ready(step(forms[0], state))
    with compilations() as names:
        for form in forms:
            jax.block_until_ready(step(form, state))
    assert names == []


def train_bound(core: Callable[..., Any], x: jax.Array) -> Callable[[Any, Any], jax.Array]:
    """params -> constant, the trace inside: what a training loss does."""

    def loss(params: Any, state: Any) -> jax.Array:
        w1, w2 = params
        form = lb.trace(lambda x: w2 @ jax.nn.relu(w1 @ x), x)
        return scalar(core(form, state)[0])

    return loss


@pytest.mark.parametrize("verb", sorted(CORES))
def test_gradients_through_the_trace(verb: str, rng: np.random.Generator) -> None:
    """The gradient of the constant agrees with difference quotients of the converged constant."""
    core, x = CORES[verb].core, jnp.ones(6)
    params = (gauss(rng, 8, 6), gauss(rng, 3, 8))
    form = lb.trace(lambda x: params[1] @ jax.nn.relu(params[0] @ x), x)
    state, step = core.init(form, jax.random.key(0)), jax.jit(core)
    for _ in range(60):
        _, state = step(form, state)
    loss = train_bound(core, x)
    value, grads = jax.jit(jax.value_and_grad(loss))(params, state)
    assert float(value) == pytest.approx(CORES[verb](form).value, rel=1e-3)
    assert all(np.isfinite(np.asarray(g)).all() and np.abs(np.asarray(g)).max() > 0 for g in grads)

    def exact(w1: np.ndarray, w2: np.ndarray) -> float:
        return CORES[verb](lb.from_weights([w1, w2], activation="relu"), guarantee="verified").value

    w1, w2 = (np.asarray(p, np.float32) for p in params)
    d1 = rng.normal(size=w1.shape).astype(np.float32)
    slope = float(np.sum(np.asarray(grads[0]) * d1))
    quotient = (exact(w1 + 1e-2 * d1, w2) - exact(w1 - 1e-2 * d1, w2)) / 2e-2
    assert slope == pytest.approx(quotient, rel=0.05, abs=0.02 * float(value))


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("verb", sorted(CORES))
def test_cores_under_vmap(verb: str, rng: np.random.Generator) -> None:
    """Several networks of one architecture at once give the same constants as one after the other."""
    core, x = CORES[verb].core, jnp.ones(6)
    stacked = (gauss(rng, 4, 8, 6), gauss(rng, 4, 3, 8))
    first = lb.trace(lambda x: stacked[1][0] @ jax.nn.relu(stacked[0][0] @ x), x)
    state = core.init(first, jax.random.key(0))
    loss = train_bound(core, x)
    together = jax.jit(jax.vmap(loss, in_axes=(0, None)))(stacked, state)
    alone = [float(loss((stacked[0][k], stacked[1][k]), state)) for k in range(4)]
    assert together.shape == (4,) and np.allclose(together, alone, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("verb", sorted(CORES))
def test_cores_of_a_dead_network_have_finite_gradients(verb: str) -> None:
    core, x = CORES[verb].core, jnp.ones(6)
    params = (jnp.zeros((8, 6)), jnp.zeros((3, 8)))
    form = lb.trace(lambda x: params[1] @ jax.nn.relu(params[0] @ x), x)
    state = core.init(form, jax.random.key(0))
    value, grads = jax.value_and_grad(train_bound(core, x))(params, state)
    assert float(value) == 0.0
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)


# ------------------------------------------------------------------------------- the global setting
@pytest.mark.slow
def test_float64_setting_is_left_alone() -> None:
    """After every verb, whether the user has float64 off (the default) or on."""
    form = trace("relu", 0)
    assert not jax.config.jax_enable_x64
    every_verb(form)
    assert not jax.config.jax_enable_x64
    with jax.enable_x64(True):
        lb.liplt(form)
        lb.empirical(form)
        assert jax.config.jax_enable_x64


def test_bounds_do_not_depend_on_the_float64_setting() -> None:
    form = trace("relu", 0)
    outside = lb.liplt(form).value
    with jax.enable_x64(True):
        inside = lb.liplt(form).value
    assert inside == pytest.approx(outside, rel=1e-12)
