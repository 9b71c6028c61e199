"""Breaks that the fuzzer found, each as the program it printed, made small."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

import lipbounds as lb


@pytest.mark.slow
def test_inputs_without_effect_keep_the_weights_of_an_linf_ball_in_range() -> None:
    """The weights of inputs that do nothing grew beyond what a proof takes, and LipSDP fell back to LipLT."""
    with jax.enable_x64(True):
        form = lb.trace(lambda v: jnp.abs(v)[2:3], jax.ShapeDtypeStruct((4,), "float64"))
        bound = lb.lipsdp(form, norm=math.inf)
    assert bound.certificate is not None, bound.notes
    assert 1.0 <= bound.value <= 1.0 + 1e-6


def test_interp_in_float64_under_strict_promotion() -> None:
    """The dtype of the knots was found by a promotion that strict mode refuses (a JAX error reached the user)."""

    def fn(v: jax.Array) -> jax.Array:
        return jnp.interp(v, jnp.array([-1, -0.25, 2], v.dtype), jnp.array([0.5, -2, 1], v.dtype))

    with jax.enable_x64(True):
        bound = lb.liplt(lb.trace(fn, jax.ShapeDtypeStruct((1,), "float64")))
    assert 10 / 3 <= bound.value <= 10 / 3 * (1 + 1e-9)
