"""Breaks that the fuzzer found, each as the program it printed, made small."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

import lipbounds as lb


def test_inputs_without_effect_keep_the_weights_of_an_linf_ball_in_range() -> None:
    """The weights of inputs that do nothing grew beyond what a proof takes, and LipSDP fell back to LipLT."""
    with jax.enable_x64(True):
        form = lb.trace(lambda v: jnp.abs(v)[2:3], jax.ShapeDtypeStruct((4,), "float64"))
        bound = lb.lipsdp(form, norm=math.inf)
    assert bound.certificate is not None, bound.notes
    assert 1.0 <= bound.value <= 1.0 + 1e-6
