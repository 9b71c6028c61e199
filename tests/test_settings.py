"""Settings of JAX and the functions around a call: bounds do not depend on them, and nothing fails by them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb
from lipbounds import analysis
from lipbounds._text import settings
from lipbounds.training.config import Config
from lipbounds.training.loop import fit, resume
from lipbounds.training.step import TrainState

RNG = np.random.default_rng(0)
FORM = lb.from_weights([RNG.standard_normal(shape).astype(np.float32) for shape in ((8, 4), (6, 8), (3, 6))])
X = RNG.standard_normal((4, 4)).astype(np.float32)
Y = np.argmax([np.asarray(FORM(x)) for x in X], axis=1)


@contextmanager
def strict() -> Iterator[None]:
    """Float64 where nothing else is asked for, and every key used once; types must agree in all tests."""
    with jax.enable_x64(True), jax.debug_key_reuse(True):
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "ranks must agree": lambda: jax.numpy_rank_promotion("raise"),
    "64 bits": strict,
    "nothing moves": lambda: jax.transfer_guard("disallow_explicit"),
    "other random numbers": lambda: jax.default_prng_impl("rbg"),
    "older random numbers": lambda: jax.threefry_partitionable(False),
}


def estimate() -> float:
    """A value that is computed on arrays of JAX."""
    return lb.liplt(FORM, guarantee="estimate").value


def trained() -> TrainState:
    """The state after an epoch of two steps."""
    images, labels = np.linspace(0, 1, 32, dtype=np.float32).reshape(8, 2, 2, 1), np.arange(8) % 2
    config = Config(arch="4-2", constants="naive", epochs=1, batch_size=4, warmup=0, validate_every=0)
    return fit(config, (images, labels), progress=False).state


@pytest.mark.parametrize("setting", SETTINGS)
def test_estimates_do_not_depend_on_settings(setting: str) -> None:
    usual = estimate()
    with SETTINGS[setting]():
        assert estimate() == usual


@pytest.mark.parametrize("setting", ["other random numbers", "older random numbers"])
def test_searches_draw_the_same_numbers_whatever_the_settings(setting: str) -> None:
    usual = lb.empirical(FORM, steps=2)
    with SETTINGS[setting]():
        again = lb.empirical(FORM, steps=2)
    assert again.value == usual.value
    assert np.array_equal(again.witness, usual.witness)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("attack", ["pgd", pytest.param("square", marks=pytest.mark.slow)])
def test_attacks_do_not_depend_on_settings(attack: str, setting: str) -> None:
    def found() -> np.ndarray:
        run = getattr(analysis, attack)(network, X, Y, 0.5, low=-9, high=9, progress=False)
        return np.asarray(run.adversarial)

    network = jax.vmap(FORM)
    usual = found()
    assert not np.array_equal(usual, X)
    with SETTINGS[setting]():
        assert np.array_equal(found(), usual)


def test_a_run_goes_on_with_the_same_random_numbers_whatever_the_settings(tmp_path: Path) -> None:
    def stop(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    data = np.random.default_rng(0).random((16, 2, 2, 1)).astype(np.float32), np.arange(16) % 2
    config = Config(arch="4-2", loss="cross-entropy", epochs=2, batch_size=2, validate_every=0)
    usual = fit(config, data, progress=False).state
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False), pytest.raises(KeyboardInterrupt):
        fit(config, data, out=tmp_path / "run", progress=stop)
    with jax.default_prng_impl("unsafe_rbg"):
        again = resume(tmp_path / "run", data=data, progress=False).state
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(usual)))


@pytest.mark.slow
def test_training_does_not_depend_on_settings_for_debugging() -> None:
    usual = trained()
    with SETTINGS["ranks must agree"](), SETTINGS["nothing moves"]():
        again = trained()
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(usual)))


def test_attacks_inside_a_function_that_is_traced_are_refused() -> None:
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda x: analysis.pgd(jax.vmap(FORM), x, Y, 0.5, low=-9, high=9).margin)(X)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_networks_are_traced_and_cores_run_under_any_settings(setting: str) -> None:
    def key() -> jax.Array:
        with jax.transfer_guard("allow"):  # the seed moves to the device
            return jax.random.key(0)

    def value() -> float:
        form = lb.trace(lambda x: jax.nn.relu(x @ kernel + 1), np.zeros(4, np.float32))
        cores = (lb.liplt.core, lb.lipsdp.core)
        found = [core(form, core.init(form, key()), steps=50)[0].value for core in cores]
        core, x = lb.local.core, np.zeros((1, 4), np.float32)
        return sum(
            map(
                float,
                (*found, core(form, core.init(form, key()), x, eps=0.1, steps=50)[0].value[0]),
            )
        )

    kernel = jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)
    usual = value()
    with SETTINGS[setting]():
        assert value() == pytest.approx(usual, rel=1e-3)


def test_calls_inside_a_function_that_is_traced() -> None:
    found: list[float] = []

    def traced(x: jax.Array) -> jax.Array:
        found.append(estimate())
        return jnp.sum(x)

    jax.jit(traced)(jnp.ones(2))
    assert found == [estimate()]


def test_functions_are_compiled_inside_a_call() -> None:
    seen: list[bool] = []
    with jax.disable_jit():
        lb.local(FORM, X, 0.1, progress=lambda text: seen.append(jax.config.jax_disable_jit))
    assert seen and not any(seen)


def test_calls_in_a_fork_of_a_process_that_has_computed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork in earnest is in tests/test_other_process.py."""
    monkeypatch.setattr(settings, "_home", os.getpid() + 1)
    for call in (estimate, trained, lambda: analysis.pgd(jax.vmap(FORM), X, Y, 0.5, low=-9, high=9)):
        with pytest.raises(RuntimeError, match="forked from one in which JAX had computed"):
            call()


@pytest.mark.slow
def test_margins_do_not_depend_on_settings_for_debugging() -> None:
    with jax.debug_infs(True):
        again = lb.margins(FORM, X, Y, eps=0.05)
    found = lb.margins(FORM, X, Y, eps=0.05)
    assert np.array_equal(again.value, found.value)
