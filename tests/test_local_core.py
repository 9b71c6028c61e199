"""The core of local constants in the loss: by hand, against sampled changes, and in training."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipbounds as lb
from lipbounds._local.core import _row_norms, moving
from lipbounds.training import Config, fit, losses
from lipbounds.training.activations import ClippedRelu
from lipbounds.training.data import digits
from lipbounds.training.final_bound import proved_bound
from lipbounds.training.models import build, spec_for

RNG = np.random.default_rng(0)
W = [RNG.standard_normal(shape).astype(np.float32) for shape in ((6, 8), (8, 7), (7, 3))]
B = [RNG.standard_normal(n).astype(np.float32) for n in (8, 7)]
TOPS = (1.0, 1.5)
X = (0.3 * RNG.standard_normal((4, 6))).astype(np.float32)


def net(weights: Any, tops: Any, x: Any, module: Any = jnp) -> tuple[Any, list[Any]]:
    """Clipped ReLUs behind a normalisation; (logits, pre-activations)."""
    h, seen = (x - 0.1) / 0.5, []
    for w, b, top in zip(weights, B, tops, strict=False):
        seen.append(h @ w + b)
        h = module.minimum(module.maximum(seen[-1], 0), top)
    return h @ weights[-1], seen


def form(weights: Any, tops: Any) -> Any:
    one = jax.ShapeDtypeStruct((1, 6), jnp.float32)
    return lb.trace(lambda x: net(weights, tops, x)[0], one, batched=True)


@jax.jit
def constants(weights: Any, tops: Any, state: Any, x: Any, eps: Any) -> Any:
    return lb.local.core(form(weights, tops), state, x, eps=eps, steps=60, own=60, pairwise=True)


STATE = lb.local.core.init(form(W, TOPS), jax.random.key(0))


@pytest.mark.slow
def test_constants_are_norms_without_the_constant_neurons() -> None:
    """By NumPy's norms, with the neurons that the core keeps; none of those it drops changes in 20 000 samples."""
    naive = lb.naive(form(W, TOPS), pairwise=True)
    reach = np.array(
        [1.0, np.linalg.norm(W[0], 2) / 0.5, np.linalg.norm(W[1], 2) * np.linalg.norm(W[0], 2) / 0.5]
    )
    dropped = 0
    for eps in (0.02, 0.1, 5.0):
        found, _ = constants(W, TOPS, STATE, X, eps)
        masks = moving(form(W, TOPS), jnp.asarray(X), eps, jnp.asarray(reach, jnp.float32))
        for b, x in enumerate(X):
            first, second = (np.asarray(mask[b]) for mask in masks)
            chain = np.linalg.norm(first[:, None] * W[0].T / 0.5, 2)
            chain *= np.linalg.norm(first[:, None] * W[1] * second, 2)
            assert float(found.value[b]) == pytest.approx(
                chain * np.linalg.norm(second[:, None] * W[2], 2), rel=1e-4
            )
            apart = np.linalg.norm(second * (W[2][:, 0] - W[2][:, 2]))
            assert float(found.pairwise[b, 0, 2]) == pytest.approx(chain * apart, rel=1e-4)
            assert (found.pairwise[b] <= naive.pairwise * (1 + 1e-5)).all()
            change = RNG.standard_normal((5000, 6))
            change *= eps * RNG.random((5000, 1)) ** (1 / 6) / np.linalg.norm(change, axis=1, keepdims=True)
            _, seen = net(W, TOPS, x + change, np)
            for y, top, mask in zip(seen, TOPS, (first, second), strict=True):
                v = np.clip(y, 0, top)
                assert ((v.max(axis=0) == v.min(axis=0)) | (mask == 1)).all()
            dropped += int((first == 0).sum() + (second == 0).sum())
    assert dropped > 20
    np.testing.assert_allclose(found.value, naive.value, rtol=1e-4)  # in a large ball nothing is constant


@pytest.mark.slow
def test_row_norms_are_those_of_the_maps_between_activations() -> None:
    """Exact behind a normalisation for a product and a convolution, else not too small."""
    found = _row_norms(form(W, TOPS), jnp.float32)
    np.testing.assert_allclose(found[-1, 0], np.linalg.norm(W[0], axis=0) / 0.5, rtol=1e-5)
    np.testing.assert_allclose(found[0, 1], np.linalg.norm(W[1], axis=0), rtol=1e-5)
    spec = spec_for("2C2F", (8, 8, 1), 10, activation="clipped-relu", mean=0.3, std=0.4)
    model = build(spec)
    two = lb.trace(model, jnp.zeros((8, 8, 1)))
    jacobian = jax.jacobian(lambda x: model.convs[0](((x - 0.3) / 0.4)[None])[0].ravel())(
        jnp.zeros((8, 8, 1))
    )
    exact = np.linalg.norm(np.asarray(jacobian).reshape(len(jacobian), -1), axis=1)
    np.testing.assert_allclose(_row_norms(two, jnp.float32)[-1, 0], exact, rtol=1e-5)
    mixed = lb.trace(lambda x: jax.nn.relu(W[1].T @ (W[0].T @ x) - x.sum()), jnp.zeros(6))
    rows = np.linalg.norm(W[1].T @ W[0].T - 1, axis=1)
    assert (_row_norms(mixed, jnp.float32)[-1, 0] >= rows * (1 - 1e-6)).all()


@pytest.mark.slow
def test_gradients_are_finite_and_those_of_the_norms() -> None:
    def total(weights: Any) -> jax.Array:
        return constants(weights, TOPS, STATE, X, 0.1)[0].value.sum()

    gradient = jax.grad(total)(W)
    for place, direction in itertools.product(range(3), range(2)):
        step = np.random.default_rng(direction).standard_normal(W[place].shape).astype(np.float32)
        ends = []
        for sign in (-1, 1):
            moved = list(W)
            moved[place] = W[place] + sign * 1e-3 * step
            ends.append(float(total(moved)))
        assert (ends[1] - ends[0]) / 2e-3 == pytest.approx(
            float(jnp.sum(gradient[place] * step)), rel=0.02, abs=0.5
        )


def test_losses_take_constants_of_every_image() -> None:
    z, y = jnp.asarray(RNG.standard_normal((5, 3)), jnp.float32), jnp.asarray([0, 1, 2, 0, 1])
    near = jnp.asarray(RNG.random((5, 3, 3)) + 0.5, jnp.float32)
    for function in (losses.gloro, losses.lipschitz_margin, losses.emma, losses.margin):
        together = function(z, y, near, eps=0.3)
        alone = [function(z[b : b + 1], y[b : b + 1], near[b], eps=0.3) for b in range(5)]
        assert float(together) == pytest.approx(float(jnp.mean(jnp.stack(alone))), rel=1e-5)
    same = jnp.broadcast_to(near[0], near.shape)
    np.testing.assert_allclose(losses.radius(z, y, same), losses.radius(z, y, near[0]), rtol=1e-6)


def test_a_clipped_relu_can_be_traced_with_its_end_being_trained() -> None:
    with pytest.raises(ValueError, match="local needs eps above 0, and refresh=1"):
        Config(constants="local", refresh=2)
    assert (
        float(ClippedRelu(0.5)(jnp.asarray(2.0))) == 0.5 and float(ClippedRelu(-1.0)(jnp.asarray(2.0))) == 0.0
    )

    def slopes(top: jax.Array) -> jax.Array:
        traced = lb.trace(lambda x: jnp.minimum(jnp.maximum(x, 0), top) - jnp.maximum(x, -top), jnp.zeros(3))
        return jnp.asarray([s for pair in traced.slopes for s in pair])

    assert jax.jit(slopes)(jnp.asarray(1.0)).tolist() == [-1.0, 1.0]
    with pytest.raises(lb.UnsupportedError, match="being traced"):
        jax.jit(lambda a: lb.trace(lambda x: x * jax.nn.sigmoid(a * x), jnp.zeros(3)) and a)(jnp.asarray(1.0))


@pytest.mark.slow
def test_training_certifies_and_compiles_once() -> None:
    """Local-Lip on digits: more is certified, by proved bounds, than without constants; theta moves."""
    fields: dict[str, Any] = {
        "arch": "64-32-32-10", "loss": "gloro", "constants": "local", "pairs": "whole", "activation": "clipped-relu",
        "eps": 0.3, "epochs": 12, "batch_size": 64, "warmup": 1, "ramp": 4, "learning_rate": 4e-3,
        "initialisation": "unit", "validate_every": 12,
    }  # fmt: skip
    fitted = fit(Config(**fields))
    plain = fit(Config(**{**fields, "loss": "cross-entropy"}))
    last, other = fitted.log[-1], plain.log[-1]
    assert last["guarantee"] == "verified" and last["certified"] > other["certified"] + 0.2, (last, other)
    data = digits()
    form = lb.trace(fitted.model, data.train_x[0])
    whole = lb.certified_radius(form, data.train_x, data.train_y, bound=lb.naive(form)).accuracy(0.3)
    assert last["certified_estimate"] >= whole - 0.02  # near an image they are smaller
    thetas = [float(a.theta.get_value()) for a in fitted.model.activations]  # type: ignore[attr-defined]
    assert all(theta != 1.0 for theta in thetas)
    assert isinstance(
        proved_bound(lb.trace(fitted.model, jnp.zeros((8, 8, 1))), fitted.config, fitted.state), lb.UpperBound
    )


@pytest.mark.slow
def test_the_dense_layers_behind_a_convolution_have_multipliers_in_training() -> None:
    """recursion with a front that LipLT bounds: its estimate is close to the proved hybrid, and below LipLT's."""
    model = build(spec_for("2C2F", (16, 16, 1), 10), 0)
    traced = lb.trace(model, jnp.zeros((16, 16, 1)))
    core = lb.lipsdp.core
    state = core.init(traced, jax.random.key(0))
    found, state = jax.jit(lambda s: core(traced, s, steps=200, pairwise=True))(state)
    assert state.front == () or len(jax.tree.leaves(state.front))
    proved = lb.lipsdp(traced, pairwise=True)
    assert isinstance(proved, lb.UpperBound) and proved.pairwise is not None
    liplt = lb.liplt(traced, pairwise=True)
    assert float(found.value) <= liplt.value * 1.001
    np.testing.assert_allclose(found.pairwise, proved.pairwise, rtol=0.1, atol=1e-6)


def test_every_layer_has_its_own_end() -> None:
    model = build(spec_for("2C2F", (8, 8, 1), 10, activation="clipped-relu"))
    thetas = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if "theta" in path]
    assert len(thetas) == 3
    plain = build(spec_for("2C2F", (8, 8, 1), 10))
    x = jnp.full((2, 8, 8, 1), 0.01)  # too small for any end
    np.testing.assert_array_equal(model(x), plain(x))
