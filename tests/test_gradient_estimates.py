"""Estimated gradients: their moments, and attacks that use them; every query is counted."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipbounds.analysis import black_frank_wolfe, nes_pgd
from lipbounds.analysis.attack_network import Model
from lipbounds.analysis.gradient_estimates import estimate

KINDS = ["sphere", "gaussian"]


def estimated(fn, x, kind, samples, delta, step=0):
    """(B, n) estimates of the gradient of the margin of class 0."""
    return np.asarray(
        estimate(
            Model(fn), None, jnp.asarray(x), jnp.zeros(len(x), jnp.int32), jax.random.key(1),
            jnp.arange(len(x)), np.int32(step), np.float32(delta),
            samples=samples, directions=kind, loss="margin", targeted=False,
        )
    )  # fmt: skip


def of(f):
    """The network whose margin of class 0 is f."""

    def fn(b):
        value = f(b)
        return jnp.stack([value, jnp.zeros_like(value)], axis=1)

    return fn


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_of_estimates_of_a_linear_function_is_its_gradient(rng, kind):
    a = rng.normal(size=6).astype(np.float32)
    q = estimated(of(lambda b: b @ a), np.zeros((4000, 6), np.float32), kind, 1, 0.5)
    spread = q.std(axis=0) / math.sqrt(len(q))
    assert (np.abs(q.mean(axis=0) - a) < 5 * spread).all() and (spread > 0).all()
    length = float(np.linalg.norm(a))
    if kind == "sphere":  # E |q - a|^2 = (d - 1) |a|^2, below 2 d |a|^2
        assert np.square(q - a).sum(axis=1).mean() == pytest.approx(5 * length**2, rel=0.1)
    many = estimated(of(lambda b: b @ a), np.zeros((300, 6), np.float32), kind, 20, 0.5)
    assert np.square(many - a).sum(axis=1).mean() < 0.12 * np.square(q - a).sum(axis=1).mean()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_of_a_quadratic_does_not_depend_on_delta(rng, kind):
    a, c = rng.normal(size=(5, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    fn = of(lambda b: ((b @ a) * b).sum(axis=1) / 2 + b @ c)
    x = rng.random((6, 5), np.float32)
    near, far = (estimated(fn, x, kind, 3, delta) for delta in (0.25, 2.0))
    np.testing.assert_allclose(near, far, rtol=1e-3, atol=1e-3)
    assert not np.allclose(near, estimated(fn, x, kind, 3, 0.25, step=1), atol=0.1)


@pytest.mark.slow
def test_an_estimate_depends_on_the_example_and_no_batch(rng):
    a = rng.normal(size=5).astype(np.float32)
    fn, x = of(lambda b: b @ a), np.zeros((4, 5), np.float32)
    every = estimated(fn, x, "sphere", 2, 0.1)
    assert len(np.unique(every[:, 0])) == 4
    np.testing.assert_allclose(estimated(fn, x[:2], "sphere", 2, 0.1), every[:2], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "norm"), [(black_frank_wolfe, math.inf), (nes_pgd, 2)])
def test_a_linear_network_is_broken_above_its_distance_and_never_below(rng, attack, norm):
    w = rng.normal(size=(8, 2)).astype(np.float32)
    x = rng.random((20, 8), np.float32)
    row = (w[:, 0] - w[:, 1]).astype(np.float64)
    size = np.abs(row).sum() if norm == math.inf else np.linalg.norm(row)
    exact, y = np.abs(x.astype(np.float64) @ row) / size, (x @ w).argmax(1)
    options = {"norm": norm, "low": -50.0, "high": 50.0, "queries": 900, "samples": 10}
    inside = attack(lambda b: b @ w, x, y, 0.999 * exact, **options)
    assert not inside.success.any() and (inside.queries == 900 // 21 * 21).all()
    outside = attack(lambda b: b @ w, x, y, 1.3 * exact, **options)
    assert (
        outside.success.mean() > 0.9
        and (outside.distance[outside.success] <= outside.eps[outside.success]).all()
    )
    assert (outside.queries % 21 == 0).all() and (outside.queries[outside.success] < 900).all()


def test_every_query_is_counted_and_no_gradient_is_asked_for(rng):
    w, rows = rng.normal(size=(8, 2)).astype(np.float32), []

    @jax.custom_jvp
    def fn(b):
        def tick(b):
            rows.append(len(b))
            return np.zeros((len(b), 2), np.float32)

        return b @ w + jax.pure_callback(tick, jax.ShapeDtypeStruct((len(b), 2), jnp.float32), b)

    @fn.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    x = rng.random((3, 8), np.float32)
    y = (x @ w).argmax(1)
    made = black_frank_wolfe(fn, x, y, 1e-4, norm=math.inf, samples=4, queries=50)
    assert not made.success.any() and (made.queries == 45).all()  # 5 steps of 2 * 4 + 1
    jax.effects_barrier()
    # and besides every x, before and within the attack, copies of the first one, and what is returned
    assert sum(rows) == made.queries.sum() + 4 * len(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_without_gradients_is_broken(rng, kind):
    w = rng.normal(size=(10, 9)).astype(np.float32), rng.normal(size=(9, 3)).astype(np.float32)

    def fn(b):
        return jnp.abs((jnp.round(b * 64) / 64 - np.float32(0.5)) @ w[0]) @ w[1]

    x = rng.random((24, 10), np.float32)
    y = np.asarray(fn(x)).argmax(1)
    options = {"norm": math.inf, "directions": kind, "delta": 0.1, "queries": 2000}
    made = black_frank_wolfe(fn, x, y, 0.2, **options)
    assert made.success.mean() > 0.6
    split = black_frank_wolfe(fn, x, y, 0.2, batch_size=7, **options)
    np.testing.assert_array_equal(split.success, made.success)
    np.testing.assert_array_equal(split.queries, made.queries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": "cube"}, "directions must be one of sphere, gaussian"),
        ({"delta": 0.0}, "delta must be a number > 0"),
        ({"queries": 50}, "queries must be a whole number >= 51"),
        ({"samples": 0}, "samples must be a whole number >= 1"),
    ],
)
def test_bad_input_is_refused(rng, change, message):
    with pytest.raises(ValueError, match=message):
        black_frank_wolfe(lambda b: b, rng.random((2, 3), np.float32), np.zeros(2, int), 0.1, **change)
