"""nnx modules that a call changes are refused, unless it changes nothing of their outputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipbounds as lb


@pytest.mark.parametrize("batched", [False, True])
def test_modules_that_every_call_changes_are_refused(batched: bool) -> None:
    model, x = (
        nnx.SpectralNorm(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)),
        np.ones((2, 4), np.float32),
    )
    with pytest.raises(lb.UnsupportedError, match=r"every call changes the module(.|\n)*model\.eval"):
        lb.trace(model, x if batched else x[0], batched=batched)
    model.eval()
    form = lb.trace(model, x if batched else x[0], batched=batched)
    np.testing.assert_allclose(form(x[0]), model(x)[0], rtol=1e-5)


class Counting(nnx.Module):
    """A linear map, times 1 + `drift` in the second call, 1 + 2 `drift` in the third, ..."""

    def __init__(self, drift: float) -> None:
        self.linear, self.drift = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), drift
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = 1 + self.drift * self.calls[...]
        self.calls[...] += 1
        return self.linear(x) * scale


@pytest.mark.parametrize("batched", [False, True])
def test_the_smallest_change_of_a_module_is_refused_and_a_counter_is_not(batched: bool) -> None:
    x = np.ones((2, 4), np.float32)
    with pytest.raises(lb.UnsupportedError, match="every call changes the module"):
        lb.trace(Counting(1e-5), x if batched else x[0], batched=batched)
    model = Counting(0.0)
    form = lb.trace(model, x if batched else x[0], batched=batched)
    np.testing.assert_allclose(form(x[0]), model(x)[0], rtol=1e-5)
    assert int(model.calls[...]) == 1
