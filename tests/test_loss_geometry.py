"""Slopes, curvature and landscapes of a loss: known answers, and every value attained."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lipbounds.analysis import gradient_lipschitz, hessian_eigenvalue, landscape, loss_increase
from lipbounds.analysis.loss_geometry import PLACES


def softmax_linear(rng, n=7, classes=4, count=5):
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.random((count, n), np.float32)
    return lambda b: b @ w, w.astype(np.float64), x, rng.integers(0, classes, count)


def probabilities(w, x):
    z = x.astype(np.float64) @ w
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(fn, x, y):
    return np.asarray(-jax.nn.log_softmax(fn(jnp.asarray(x)))[np.arange(len(x)), y])


@pytest.mark.parametrize("iterations", [pytest.param(20, marks=pytest.mark.slow), 3])
def test_the_eigenvalue_of_a_softmax_behind_a_linear_map(rng, iterations):
    fn, w, x, y = softmax_linear(rng)
    p = probabilities(w, x)
    exact = np.array([np.linalg.eigvalsh(w @ (np.diag(q) - np.outer(q, q)) @ w.T)[-1] for q in p])
    found = hessian_eigenvalue(fn, x, y, iterations=iterations, batch_size=3)
    assert (found.value <= exact * (1 + 1e-4)).all() and "lower bound" in repr(found)
    np.testing.assert_allclose(found.value, exact, rtol=1e-3 if iterations == 20 else 0.1)


@pytest.mark.slow
def test_the_eigenvalue_at_other_places(rng):
    fn, w, x, y = softmax_linear(rng)
    here, *others = (hessian_eigenvalue(fn, x, y, 0.3, at=place).value for place in PLACES)
    # at most |p - p'| changes the largest eigenvalue, which is below |w|^2 / 2
    for other in others:
        assert not np.allclose(other, here, rtol=1e-3)
        assert (other <= np.linalg.norm(w, 2) ** 2 / 2).all() and (other > 0).all()


def test_slopes_of_the_loss_are_attained_and_grow_with_the_ball(rng):
    fn, w, x, y = softmax_linear(rng)
    p = probabilities(w, x)
    p[np.arange(len(x)), y] -= 1
    at_x = p @ w.T
    small = gradient_lipschitz(fn, x, y, 0.0)
    np.testing.assert_allclose(small.value, np.abs(at_x).sum(axis=1), rtol=1e-4)
    large = gradient_lipschitz(fn, x, y, 0.2)
    assert (large.value >= small.value * (1 - 1e-5)).all()
    spread = np.abs(w[:, :, None] - w[:, None]).sum(axis=0)  # l1 norms of differences of classes
    assert (large.value <= spread.max(axis=1)[y] * (1 + 1e-5)).all()
    euclid = gradient_lipschitz(fn, x, y, 0.0, norm=2)
    np.testing.assert_allclose(euclid.value, np.linalg.norm(at_x, axis=1), rtol=1e-4)


def test_the_loss_rises_along_steps_and_falls_where_gradients_mislead(rng):
    fn, _, x, y = softmax_linear(rng)
    rise = loss_increase(fn, x, y, 0.1, steps=4)
    assert rise.shape == (4, 5) and (rise[-1] > 0).all() and rise[-1].mean() > rise[0].mean() - 1e-6

    def misleading(b):  # the gradient of the waves points anywhere, a full step lands in a dip
        return fn(b) * (
            1 + jnp.float32(5) * jnp.cos(jnp.float32(2 * math.pi / 0.1) * b.mean(axis=1, keepdims=True))
        )

    # two programs may round differently
    assert abs(loss_increase(misleading, x, y, 0.0, steps=1)).max() < 1e-6
    sharp = loss_increase(misleading, x, y, 0.1, steps=1)
    assert (sharp < 0).any()


class Deep(nnx.Module):
    """A network without biases: (1 + a) times the weights give (1 + a)^3 times the logits."""

    def __init__(self, rngs):
        sizes = (6, 9, 9, 3)
        self.layers = nnx.List(
            [nnx.Linear(i, o, use_bias=False, rngs=rngs) for i, o in itertools.pairwise(sizes)]
        )

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


@pytest.mark.slow
def test_logits_of_scaled_weights_grow_with_the_depth(rng):
    net = Deep(nnx.Rngs(0))
    x, y = rng.random((10, 6), np.float32), rng.integers(0, 3, 10)
    found = landscape(net, x, y, [-0.5, 0.0, 1.0], batch_size=4)
    z = np.asarray(net(jnp.asarray(x)), np.float64)
    for step, loss in zip(found.steps, found.loss, strict=True):
        assert loss == pytest.approx(cross_entropy(lambda b, s=step: z * (1 + s) ** 3, x, y).mean(), rel=1e-3)
    assert found.accuracy[0] == found.accuracy[2] == np.mean(z.argmax(1) == y) and "comparison" in repr(found)


def test_random_directions_have_filters_of_the_networks_own_length(rng):
    from lipbounds.analysis.attack_network import split
    from lipbounds.analysis.loss_geometry import _direction

    class Small(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (2, 2), rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    weights = split(Small(nnx.Rngs(0)))[1]
    way = _direction(weights, np.random.default_rng(0))
    pairs = list(zip(jax.tree.leaves(weights), jax.tree.leaves(way), strict=True))
    moved = [(np.asarray(w), np.asarray(d)) for w, d in pairs if np.asarray(d).any()]
    ((w, d),) = moved  # biases, scales and statistics stay
    np.testing.assert_allclose(
        np.linalg.norm(d.reshape(-1, 3), axis=0), np.linalg.norm(w.reshape(-1, 3), axis=0), rtol=1e-5
    )
    assert not np.allclose(w, d)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_chunks_are_of_one_size_and_change_nothing(rng, batch_size):
    fn, _, x, y = softmax_linear(rng)
    shapes = []

    def seen(b):
        shapes.append(b.shape)
        return fn(b)

    found = gradient_lipschitz(seen, x, y, 0.1, batch_size=batch_size)
    assert {shape[0] for shape in shapes} == {batch_size} and len(found.value) == 5
    np.testing.assert_allclose(found.value, gradient_lipschitz(fn, x, y, 0.1).value, rtol=1e-5)


@pytest.mark.slow
def test_a_network_that_mixes_the_examples_of_a_batch_is_refused(rng):
    fn, _, x, y = softmax_linear(rng)
    for measure in (gradient_lipschitz, loss_increase, hessian_eigenvalue):
        with pytest.raises(ValueError, match="rest of its batch changes"):
            measure(lambda b: fn(b - b.mean(axis=0)), x, y, 0.1)

    class Mixed(Deep):
        def __call__(self, b):
            return super().__call__(b - b.mean(axis=0))

    with pytest.raises(ValueError, match="rest of its batch changes"):
        landscape(Mixed(nnx.Rngs(0)), x[:, :6], y % 3, [0.0])


def test_a_plane_holds_its_lines(rng):
    net = Deep(nnx.Rngs(0))
    x, y = rng.random((10, 6), np.float32), rng.integers(0, 3, 10)
    steps = [-0.3, 0.0, 0.4]
    line, plane = (
        landscape(net, x, y, steps, directions=kind, batch_size=size)
        for kind, size in (("random", 4), ("plane", 10))
    )
    np.testing.assert_allclose(plane.loss[:, 1], line.loss, rtol=1e-5)
    assert plane.loss.shape == (3, 3) and plane.loss[1, 1] == pytest.approx(
        cross_entropy(net, x, y).mean(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda fn, x, y: hessian_eigenvalue(fn, x, y, at="z"), "at must be one of x, noise, output"),
        (lambda fn, x, y: gradient_lipschitz(fn, x, y, -1.0), "eps must be a number >= 0"),
        (lambda fn, x, y: landscape(fn, x, y, [0.0]), "a network with weights of its own"),
        (lambda fn, x, y: landscape(Deep(nnx.Rngs(0)), x, y, []), "steps must hold finite numbers"),
        (
            lambda fn, x, y: landscape(Deep(nnx.Rngs(0)), x[:, :6], y % 3, [0.0], batch_size=0),
            "batch_size must be",
        ),
        (lambda fn, x, y: loss_increase(fn, x, y, 0.1, step_size=-0.1), "step_size must be a number > 0"),
        (
            lambda fn, x, y: hessian_eigenvalue(
                lambda b: fn(jnp.sqrt(b)), x * (np.arange(5) != 3)[:, None], y, iterations=2
            ),
            "the Hessian of the loss is not finite at example 3",
        ),
        (
            lambda fn, x, y: gradient_lipschitz(
                lambda b: fn(jnp.where(b[:, :1] > 2, jnp.nan, b)),
                x + 3 * (np.arange(5) == 3)[:, None],
                y,
                0.1,
                high=9,
            ),
            "the loss or its gradient is not finite near example 3",
        ),
        (lambda fn, x, y: loss_increase(lambda b: fn(b) * jnp.nan, x, y, 0.1), "not finite near example 0"),
        (
            lambda fn, x, y: landscape(Deep(nnx.Rngs(0)), x[:, :6], y % 3, [1e30]),
            "not finite at some of the steps",
        ),
        (
            lambda fn, x, y: landscape(
                Deep(nnx.Rngs(0)), x[:, :6], y % 3, [0.0], seed=-1, directions="random"
            ),
            "seed must be",
        ),
    ],
)
def test_bad_input_is_refused(rng, call, message):
    fn, _, x, y = softmax_linear(rng)
    with pytest.raises(ValueError, match=message):
        call(fn, x, y)
