"""Settings of JAX and the functions around a call: bounds do not depend on them, and nothing fails by them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb

RNG = np.random.default_rng(0)
FORM = lb.from_weights([RNG.standard_normal(shape).astype(np.float32) for shape in ((8, 4), (6, 8), (3, 6))])
X = RNG.standard_normal((4, 4)).astype(np.float32)
Y = np.argmax([np.asarray(FORM(x)) for x in X], axis=1)

SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "ranks must agree": lambda: jax.numpy_rank_promotion("raise"),
    "nothing moves": lambda: jax.transfer_guard("disallow_explicit"),
}


def estimate() -> float:
    """A value that is computed on arrays of JAX."""
    return lb.liplt(FORM, guarantee="estimate").value


@pytest.mark.parametrize("setting", SETTINGS)
def test_estimates_do_not_depend_on_settings_for_debugging(setting: str) -> None:
    usual = estimate()
    with SETTINGS[setting]():
        assert estimate() == usual


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


@pytest.mark.slow
def test_margins_do_not_depend_on_settings_for_debugging() -> None:
    with jax.debug_infs(True):
        again = lb.margins(FORM, X, Y, eps=0.05)
    found = lb.margins(FORM, X, Y, eps=0.05)
    assert np.array_equal(again.value, found.value)
