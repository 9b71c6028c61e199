"""RayS and ADBD: exact on linear networks, from labels alone, every query counted."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipbounds import certified_radius, naive, trace
from lipbounds.analysis import adbd, rays
from lipbounds.analysis.attack_network import Oracle

module = importlib.import_module("lipbounds.analysis.rays")  # the package exports the function of this name
WIDE = {"low": -10.0, "high": 10.0}


def linear(rng, n=11, count=20):
    """(weights, x, y, l-inf distance of every x) of a linear network with two classes and no box."""
    w = rng.normal(size=(n, 2)).astype(np.float32)
    x = rng.random((count, n), np.float32)
    row = (w[:, 0] - w[:, 1]).astype(np.float64)
    return w, x, (x @ w).argmax(1), np.abs(x.astype(np.float64) @ row) / np.abs(row).sum()


class Counted:
    """A network of which only the labels are told; it counts the rows that it was asked for."""

    def __init__(self, fn):
        self.fn, self.rows = fn, 0

    def __call__(self, batch):
        assert isinstance(batch, np.ndarray) and batch.dtype == np.float32
        self.rows += len(batch)
        return np.asarray(self.fn(batch)).argmax(1)


def test_a_linear_network_is_exact_after_one_pass_over_single_entries(rng):
    w, x, y, exact = linear(rng)
    found = adbd(lambda b: b @ w, x, y, queries=700, tol=1e-7, **WIDE)
    assert found.correct.all() and (found.distance >= exact * (1 - 1e-5)).all()
    np.testing.assert_allclose(found.distance, exact, rtol=1e-4)
    assert found.adbd == pytest.approx(exact.mean(), rel=1e-4) and found.accuracy(0.0) == 1.0
    grid, curve = found.curve()
    assert (
        (np.diff(curve) <= 0).all() and grid[-1] == 700 and curve[-1] == pytest.approx(found.adbd, rel=1e-6)
    )
    np.testing.assert_array_equal(found.queries, 700)
    assert "ADBD <= " in repr(found)


def test_an_attack_ends_within_eps_and_nothing_is_broken_below_the_distance(rng):
    w, x, y, exact = linear(rng)
    fn = lambda b: b @ w  # noqa: E731
    inside = rays(fn, x, y, 0.999 * exact, queries=300, tol=1e-7, **WIDE)
    assert not inside.success.any() and (inside.queries == 300).all()
    outside = rays(fn, x, y, 1.01 * exact, queries=700, tol=1e-7, **WIDE)
    assert outside.success.all() and (outside.distance <= outside.eps).all()
    assert (outside.queries < 700).all() and len(np.unique(outside.queries)) > 3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("attack", [rays, adbd])
def test_an_oracle_of_labels_gives_the_same_and_every_query_is_counted(rng, attack):
    w, x, y, exact = linear(rng)
    y = y.copy()
    y[3] = 1 - y[3]  # misclassified: never attacked
    given = (1.05 * exact,) if attack is rays else ()
    options = {"queries": 250, **WIDE}
    one = attack(lambda b: b @ w, x, y, *given, **options)
    oracle = Counted(lambda b: b @ w)
    two = attack(Oracle(oracle), x, y, *given, batch_size=7, **options)
    np.testing.assert_array_equal(two.adversarial, one.adversarial)
    np.testing.assert_array_equal(two.queries, one.queries)
    np.testing.assert_array_equal(two.distance, one.distance)
    assert one.queries[3] == 0 and not one.correct[3]
    # besides those counted: every x, and every point that is returned for an image that was attacked
    assert oracle.rows == two.queries.sum() + 20 + 19
    if attack is adbd:
        np.testing.assert_array_equal(two.history, one.history)
        assert one.distance[3] == 0


@pytest.mark.slow
def test_the_steps_are_those_of_the_algorithm(rng):
    """One image, against a plain implementation of the corrected algorithm."""
    w = rng.normal(size=(13, 6)).astype(np.float32), rng.normal(size=(6, 3)).astype(np.float32)
    fn = lambda b: jnp.abs((b - np.float32(0.5)) @ w[0]) @ w[1]  # noqa: E731
    x = rng.random((4, 13), np.float32)
    y = np.asarray(fn(x)).argmax(1)
    limit, tol = 320, np.float32(1e-3 / math.sqrt(13))
    found = adbd(fn, x, y, queries=limit)
    asked = jax.jit(lambda b: fn(b).argmax(1))

    for i in range(len(x)):
        count, nearest = 0, np.inf

        def flips(step, signs, i=i):
            nonlocal count, nearest
            if count >= limit:
                raise StopIteration
            count += 1
            point = np.clip(x[i] + step * signs, 0, 1).astype(np.float32)
            wrong = int(asked(point[None])[0]) != y[i]
            if wrong:
                nearest = min(nearest, np.abs(point - x[i]).max())
            return wrong

        signs, best, stage, block = np.ones(13, np.float32), np.float32(np.inf), 0, 0
        try:
            while True:
                size = -(-13 // min(2**stage, 13))
                trial = signs.copy()
                trial[block * size : (block + 1) * size] *= -1
                low, high = np.float32(0), min(best, np.float32(1))
                if flips(high, trial):
                    while high - low > tol:
                        middle = (low + high) / np.float32(2)
                        low, high = (low, middle) if flips(middle, trial) else (middle, high)
                    if high < best:
                        signs, best = trial, high
                block += 1
                if block * size >= 13:
                    stage, block = stage + 1, 0
        except StopIteration:
            pass
        if np.isfinite(nearest):
            assert found.distance[i] == pytest.approx(nearest, rel=1e-6), i
        else:
            assert found.distance[i] == np.inf
    assert np.isfinite(found.distance).sum() >= 2


@pytest.mark.slow
def test_no_distance_lies_below_a_certified_radius(rng):
    w = [(rng.normal(size=s) / math.sqrt(s[0])).astype(np.float32) for s in ((8, 12), (12, 3))]

    def fn(b):
        return jax.nn.relu((b - np.float32(0.5)) @ w[0]) @ w[1]

    x = rng.random((12, 8), np.float32)
    y = np.asarray(fn(x)).argmax(1)
    form = trace(fn, x[:2], batched=True)
    bound = naive(form, norm=math.inf, pairwise=True)
    radius = certified_radius(form, x, y, bound).radius
    found = adbd(fn, x, y, queries=300)
    assert (found.distance >= radius).all() and (radius > 0).any() and np.isfinite(found.distance).any()


@pytest.mark.slow
def test_chunks_and_scans_give_the_same(rng, monkeypatch):
    w, x, y, exact = linear(rng, count=40)
    fn = lambda b: b @ w  # noqa: E731
    usual = rays(fn, x, y, 1.02 * exact, queries=400, tol=1e-6, **WIDE)
    split = rays(fn, x, y, 1.02 * exact, queries=400, tol=1e-6, batch_size=9, **WIDE)
    monkeypatch.setattr(module, "stride", lambda steps: steps)
    scanned = rays(fn, x, y, 1.02 * exact, queries=400, tol=1e-6, **WIDE)
    for other in (split, scanned):
        np.testing.assert_array_equal(other.queries, usual.queries)
        # products of batches of other sizes may round otherwise, and so may the last steps of a bisection
        np.testing.assert_allclose(other.adversarial, usual.adversarial, atol=5e-6)


@pytest.mark.slow
def test_a_target_is_reached(rng):
    w = rng.normal(size=(9, 3)).astype(np.float32)
    x = rng.random((10, 9), np.float32)
    y = (x @ w).argmax(1)
    made = rays(lambda b: b @ w, x, y, 5.0, target=(y + 1) % 3, queries=300, **WIDE)
    assert made.success.any()
    won = made.success
    np.testing.assert_array_equal((made.adversarial @ w).argmax(1)[won], ((y + 1) % 3)[won])


def test_a_target_that_ties_is_not_reached_by_an_oracle_of_logits():
    def tie(b):
        return np.stack([np.ones(len(b)), np.zeros(len(b)), b[:, 0] > 0.5], axis=1).astype(np.float32)

    made = rays(Oracle(tie), np.full((1, 8), 0.3, np.float32), [0], 0.4, target=[2], queries=200)
    assert not made.success.any() and made.margin[0] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": 2}, "norm must be inf, got 2"),
        ({"tol": 0.0}, "tol must be a number > 0"),
        ({"queries": 0}, "queries must be a whole number >= 1"),
        ({"fn": Oracle(lambda b: np.zeros(3))}, "an oracle must answer with"),
    ],
)
def test_bad_input_is_refused(rng, change, message):
    w, x, y, _ = linear(rng)
    given = {"fn": lambda b: b @ w, "x": x, "y": y, "queries": 5, **WIDE} | change
    with pytest.raises(ValueError, match=message):
        adbd(given.pop("fn"), given.pop("x"), given.pop("y"), **given)
