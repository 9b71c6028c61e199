"""Networks traced inside jit: what they compute from constants stays constant; slopes of activations of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb
from lipbounds._form.lure import flat_slopes, proved_slopes

Network = Callable[[jax.Array, jax.Array], jax.Array]
#: (weights, x) -> outputs, with masks, indices and offsets that are computed from constants inside
NETWORKS: dict[str, Network] = {
    "half_line": lambda w, x: w @ jnp.where(x > 0, w[0, 0] * x, 0.0),
    "mask": lambda w, x: w @ jnp.where(jnp.arange(4) < 2, x, -x),
    "order": lambda w, x: w @ x[jnp.argsort(jnp.array([3, 1, 2, 0]))],
    "indices": lambda w, x: w @ x[np.array([2, 0, 1, 3])],
    "start": lambda w, x: w[:, :2] @ lax.dynamic_slice(x, (jnp.argmax(jnp.array([1, 2, 0])),), (2,)),
    "set": lambda w, x: w @ x.at[jnp.array([1, 2])].set(0.0),
    "add": lambda w, x: w @ x.at[jnp.array([1, 1])].add(x[:2]),
    "scan": lambda w, x: lax.scan(
        lambda h, i: (jnp.where(i > 0, jax.nn.relu(w @ h), h), None), x, jnp.arange(3)
    )[0],
    "select": lambda w, x: w @ jnp.select([x < 0, x < 1], [0.25 * x, x], 1.5 * x - 0.5),
    "logsumexp": lambda w, x: jax.nn.logsumexp(w @ x)[None],
}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_a_network_is_the_same_inside_jit(name: str, rng: np.random.Generator) -> None:
    weights, network = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32), NETWORKS[name]

    def traced(w: jax.Array) -> lb.LureForm:
        return lb.trace(lambda x: network(w, x), jnp.zeros(4))

    inside, outside = jax.jit(traced)(weights), traced(weights)
    assert [tap.kind for tap in inside.taps] == [tap.kind for tap in outside.taps]
    for k, tap in enumerate(outside.taps):
        if tap.expr is not None:
            np.testing.assert_allclose(proved_slopes(inside, k), proved_slopes(outside, k), rtol=1e-6)
    for x in rng.standard_normal((3, 4)).astype(np.float32):
        np.testing.assert_allclose(inside(x), network(weights, jnp.asarray(x)), rtol=1e-5, atol=1e-6)


def test_slopes_of_traced_constants_of_two_dtypes() -> None:
    """The slope of one constant was rounded to the dtype of another, to 8 bits here."""

    def network(a: jax.Array, x: jax.Array) -> jax.Array:
        positive = (jnp.bfloat16(3) * x.astype(jnp.bfloat16)) > 0
        return jnp.where(positive, x, a * x)

    @jax.jit
    def traced(a: jax.Array) -> Any:
        form = lb.trace(lambda x: network(a, x), jnp.zeros(2))
        return flat_slopes(form, 0), form

    slopes, form = traced(jnp.float32(0.1))
    assert form.taps[0].expr is not None and len(form.taps) == 1
    np.testing.assert_allclose(slopes, proved_slopes(form, 0), rtol=1e-6)
