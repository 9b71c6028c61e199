"""Local bounds of graphs: several taps that read one tensor, skips around taps, outputs that are the input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import in_ball, jacobians, largest_slopes, values

import lipbounds as lb

_RNG = np.random.default_rng(0)
V, W = (_RNG.standard_normal(s).astype(np.float32) for s in ((3, 5), (5, 5)))
relu, tanh, silu = jax.nn.relu, jnp.tanh, jax.nn.silu


def _share(h):
    return jnp.stack([relu(h).sum(), tanh(h).sum(), jnp.abs(h).sum(), silu(h).sum()])


def _join(a, b):
    return V @ relu(W @ a + b)


GRAPHS = {
    "two taps read the input": lambda x: V @ relu(x) + 2 * (V @ tanh(x)),
    "three taps read the input": lambda x: V @ relu(x) + 2 * (V @ tanh(x)) + V @ jnp.abs(x),
    "two taps read a layer": lambda x: V @ relu(W @ x) + V @ tanh(W @ x),
    "four taps read a layer": lambda x: _share(W @ x),
    "one tap, read twice": lambda x: V @ relu(x) + V[::-1] @ relu(x),
    "a tap that does not count": lambda x: V @ relu(x) + 0 * (V @ tanh(x)),
    "skip around a tap": lambda x: V @ (relu(W @ x) + x),
    "skip around two taps": lambda x: V @ (tanh(W @ relu(W @ x)) + x),
    "branches that join later": lambda x: _join(relu(x), tanh(x)),
    "a branch with one tap more": lambda x: V @ relu(W @ relu(x)) + V @ tanh(x),
    "a tap of a tap and its input": lambda x: tanh(relu(x)) + x,
    "reversed": lambda x: relu(x[::-1]) + tanh(x),
    "halves": lambda x: V @ jnp.concatenate([relu(x[:3]), tanh(x[3:])]),
    "one half passes": lambda x: jnp.concatenate([relu(x[:3]), x[3:]]),
    "the input is an output": lambda x: jnp.concatenate([x, relu(x)]),
    "outputs are taps": lambda x: jnp.concatenate([relu(x), tanh(x)]),
    "the output is the input": lambda x: x,
    "a maximum beside a tap": lambda x: V @ relu(x) + jnp.maximum(x[:3], x[2:]),
}


FEW = (
    "two taps read the input",
    "one tap, read twice",
    "skip around two taps",
    "branches that join later",
    "one half passes",
    "the input is an output",
)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted(GRAPHS)]
)
def test_graphs(name):
    form, rng = lb.trace(GRAPHS[name], jax.ShapeDtypeStruct((5,), jnp.float32)), np.random.default_rng(1)
    x = rng.standard_normal((4, 5)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    for norm, eps in ((2, 0.3), (np.inf, 0.2)):
        whole, pairs = largest_slopes(form, x, eps, norm, rng)
        bound = lb.local(form, x, eps, norm=norm, pairwise=True)
        assert (whole <= bound.value * (1 + 1e-9)).all() and (pairs <= bound.pairwise + 1e-9).all()
        globally = lb.liplt(form, norm=norm, pairwise=True)
        assert (bound.value <= globally.value).all()
        near = lb.certified_radius(form, x, y, bound=globally, local=True)
        assert (near.radius >= lb.certified_radius(form, x, y, bound=globally).radius).all()
        usable = np.where(np.isfinite(near.radius), near.radius, 0.0)[:, None] * (1 - 1e-9)
        moved = x + (in_ball(x, 1.0, norm, 60, rng) - x) * usable
        same = values(form, moved.reshape(-1, 5)).argmax(axis=1).reshape(60, -1) == y
        assert same[:, near.radius > 0].all()
    small = lb.local(form, x, 1e-7)
    exact = np.linalg.norm(jacobians(form, x), 2, axis=(1, 2))
    assert (small.value >= exact * (1 - 1e-9)).all() and (small.value <= 1.02 * exact + 1e-6).all()
