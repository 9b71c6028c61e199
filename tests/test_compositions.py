"""Functions of functions that have slopes one by one and not as a whole: one tap each, the second on the first."""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import nn

import lipbounds as lb
from lipbounds._tracing import lowering
from lipbounds._tracing.jaxpr import flatten

Fn = Callable[[jax.Array], jax.Array]


def guarded(y: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(y), 0.0, y)


COMPOSITIONS: dict[str, tuple[Fn, int, float]] = {
    # the function, its taps, and the product of their largest slopes
    "leaky_tanh": (lambda x: nn.leaky_relu(jnp.tanh(x)), 2, 1.0),
    "elu_gelu": (lambda x: nn.elu(nn.gelu(x)), 2, 1.1290),
    "silu_gelu": (lambda x: nn.silu(nn.gelu(x)), 2, 1.0999 * 1.1290),
    "three": (lambda x: nn.leaky_relu(nn.elu(2.0 * jnp.tanh(nn.elu(x)))), 3, 2.0),
    "guarded": (lambda x: guarded(nn.elu(jnp.sin(x))), 2, 1.0),
}


@pytest.mark.parametrize("name", sorted(COMPOSITIONS))
def test_each_function_is_a_tap(name: str) -> None:
    fn, taps, most = COMPOSITIONS[name]
    form = lb.trace(fn, jnp.zeros(3))
    bound = lb.naive(form)
    assert len(form.taps) == taps and bound.guarantee == "verified"
    with jax.enable_x64(True):
        slopes = jax.vmap(jax.grad(lambda t: fn(t[None])[0]))(jnp.linspace(-5.0, 5.0, 2001) + 1e-4)
    assert np.abs(slopes).max() <= bound.value <= most * (1 + 1e-4)


def test_declared_functions_of_functions(rng: np.random.Generator) -> None:
    def declared(h: jax.Array) -> jax.Array:
        return 0.5 * jax.lax.lgamma(jnp.tanh(h) + 4.125)

    lb.register_activation(declared, slopes=(-2.0, 2.0))
    for fn, taps, value in (
        (lambda x: declared(jnp.sin(x)), 2, 2.0),
        (lambda x: nn.leaky_relu(declared(x)), 2, 2.0),
        (lambda x: declared(declared(x)), 2, 4.0),
    ):
        form = lb.trace(fn, jnp.zeros(3))
        assert len(form.taps) == taps and form.assumed
        assert lb.naive(form).value == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    "fn",
    [lambda x: nn.elu(jnp.sqrt(jnp.abs(x))), lambda x: nn.leaky_relu(x * x), lambda x: nn.elu(jnp.sign(x))],
    ids=["root", "square", "sign"],
)
def test_functions_of_unbounded_functions_are_refused(fn: Fn) -> None:
    with pytest.raises(lb.UnsupportedError, match="1 operation of this function"):
        lb.trace(fn, jnp.zeros(3))


def test_chains_longer_than_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of more activations than Python nests calls; the search back is short, to be cheap."""
    monkeypatch.setattr(lowering, "_MOST_EXPANDED", 6)
    length = sys.getrecursionlimit() + 100

    def chain(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, _: (jnp.tanh(y), None), x, length=length)[0]

    program, _, _, _ = lowering.lower(
        flatten(lambda _, x: chain(x), (), jax.ShapeDtypeStruct((2,), jnp.float32))
    )
    assert len(program.taps) > 1000
