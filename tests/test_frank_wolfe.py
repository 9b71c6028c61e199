"""Frank-Wolfe: exact where the answer is known, no iterate outside ball and box, gaps below their bound."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from lipbounds.analysis import fgsm, frank_wolfe, pgd
from lipbounds.analysis.attack_network import Model
from lipbounds.analysis.attack_search import unbroken
from lipbounds.analysis.frank_wolfe import descend, minimiser


def where_of(x, eps, low=0.0, high=1.0):
    return jnp.asarray(x), jnp.asarray(eps, jnp.float32), np.float32(low), np.float32(high)


def net(rng, n=10, hidden=8, classes=3):
    w = rng.normal(size=(n, hidden)).astype(np.float32), rng.normal(size=(hidden, classes)).astype(np.float32)
    return lambda b: jnp.abs((b - np.float32(0.5)) @ w[0]) @ w[1]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("p", [1.5, 1, 2, 3, math.inf])
@pytest.mark.slow
def test_the_extreme_point_is_the_best_of_ball_and_box(rng, p):
    x = rng.random((5, 6), np.float32)
    x[0, :3] = 0, 1, 0
    m = rng.normal(size=(5, 6)).astype(np.float32)
    m[1, 2], m[2] = 0, 0
    eps = np.array([0.2, 0.7, 0.3, 3.0, 0.05])
    found = np.asarray(minimiser(jnp.asarray(m), where_of(x, eps), p), np.float64)
    shift = found - x
    assert found.min() >= 0 and found.max() <= 1
    lengths = np.linalg.norm(shift, p, axis=1)
    assert (lengths <= eps * (1 + 1e-5)).all() and (shift[2] == 0).all() and shift[1, 2] == 0
    for row, at, radius, v in zip(m.astype(float), x.astype(float), eps, found, strict=True):
        ball = optimize.NonlinearConstraint(lambda s, r=radius: (r - np.linalg.norm(s, p)) / r, 0, np.inf)
        start = (v - at) * 0.5
        best = optimize.minimize(
            lambda s, row=row: s @ row, start, jac=lambda s, row=row: row, method="SLSQP", constraints=[ball],
            bounds=list(zip(-at, 1 - at, strict=True)), options={"ftol": 1e-12, "maxiter": 300},
        )  # fmt: skip
        assert (v - at) @ row <= best.fun + 1e-4 * max(abs(best.fun), radius)


@pytest.mark.slow
def test_one_full_step_is_the_fast_gradient_sign_method(rng):
    fn, x = net(rng), rng.random((30, 10), np.float32)
    y = np.asarray(fn(x)).argmax(1)
    for loss in ("ce", "margin"):
        one = frank_wolfe(fn, x, y, 0.07, norm=math.inf, steps=1, gamma=1.0, loss=loss)
        sign = fgsm(fn, x, y, 0.07, norm=math.inf, loss=loss)
        np.testing.assert_array_equal(one.success, sign.success)
        won = one.success
        np.testing.assert_allclose(one.adversarial[won], sign.adversarial[won], atol=1e-6)
        assert 3 < won.sum()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("norm", [1, 2, 3, math.inf])
def test_a_linear_classifier_is_broken_above_its_distance_and_never_below(rng, norm):
    w = rng.normal(size=(12, 2)).astype(np.float32)
    x = rng.random((20, 12), np.float32)
    row = (w[:, 0] - w[:, 1]).astype(np.float64)
    dual = {1: math.inf, 2: 2, 3: 1.5, math.inf: 1}[norm]
    size = np.linalg.norm(row, dual)
    exact, y = np.abs(x.astype(np.float64) @ row) / size, (x @ w).argmax(1)
    options = {"norm": norm, "low": -50.0, "high": 50.0}
    inside = frank_wolfe(lambda b: b @ w, x, y, 0.999 * exact, steps=3, gamma=1.0, **options)
    assert not inside.success.any() and (inside.steps == 3).all()
    outside = frank_wolfe(lambda b: b @ w, x, y, 1.001 * exact, steps=3, gamma=1.0, **options)
    assert outside.success.all() and (outside.steps == 1).all() and (outside.distance <= outside.eps).all()
    shift = outside.adversarial.astype(np.float64) - x
    np.testing.assert_allclose(np.linalg.norm(shift, norm, axis=1), outside.distance, rtol=1e-9)
    if norm == 1:
        assert ((shift != 0).sum(axis=1) == 1).all()  # one entry moves
    slow = frank_wolfe(lambda b: b @ w, x, y, 1.2 * exact, steps=20, gamma=0.5, momentum=0.9, **options)
    assert slow.success.all() and (slow.steps == 3).all()  # 1 - 0.5^3 = 0.875 of 1.2
    np.testing.assert_allclose(slow.distance, 0.875 * 1.2 * exact, rtol=1e-4)


def test_every_norm_is_told_by_its_name(rng):
    fn, x = net(rng), rng.random((2, 10), np.float32)
    y = np.asarray(fn(x)).argmax(1)
    assert "in l1.5, " in repr(frank_wolfe(fn, x, y, 0.1, norm=1.5, steps=1))
    with pytest.raises(
        ValueError, match="PGD is in norm 2 or inf, not 1.5; frank_wolfe and black_frank_wolfe"
    ):
        pgd(fn, x, y, 0.1, norm=1.5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("norm", "beta"), [(math.inf, 0.0), (2, 0.5)])
@pytest.mark.slow
def test_the_smallest_gap_of_a_quadratic_is_below_its_bound(rng, norm, beta):
    n, eps, steps = 8, 0.4, 50
    a = np.linspace(-2, 3, n).astype(np.float32)  # an indefinite diagonal: not convex
    c = rng.normal(size=n).astype(np.float32)
    x = rng.uniform(0.3, 0.7, (3, n)).astype(np.float32)

    def fn(b):  # the margin is f(x) = x'Ax/2 + c'x, and no class is ever left
        value = (a * b * b / 2 + c * b).sum(axis=1)
        return jnp.stack([value, jnp.zeros_like(value)], axis=1) + np.float32([50, 0])

    def least(at):  # of f over the box around `at`, entry by entry, which contains the l2 ball
        low, high = np.maximum(at - eps, 0), np.minimum(at + eps, 1)
        candidates = [low, high, np.clip(-c / a, low, high)]
        return min(np.inf, sum(np.min([a * v * v / 2 + c * v for v in candidates], axis=0)))

    smooth, width = 3.0, 2 * eps * (math.sqrt(n) if norm == math.inf else 1)
    heavy = (1 + beta) / (1 - beta)
    start = np.asarray(fn(x))[:, 0] - 50
    delta = max(float(s - least(at.astype(float))) for s, at in zip(start, x, strict=True))
    gamma = math.sqrt(2 * delta / (heavy * smooth * width**2 * steps))
    assert gamma <= 1
    where, labels = where_of(x, np.full(3, eps)), jnp.zeros(3, jnp.int32)
    state = where[0], jnp.zeros_like(where[0]), unbroken(where[0])
    how = np.float32(gamma), np.float32(beta)
    _, gaps = descend(
        Model(fn), None, where, labels, state, np.int32(0), how,
        norm=norm, loss="margin", steps=steps, targeted=False, gaps=True,
    )  # fmt: skip
    gaps = np.asarray(gaps)
    assert (gaps >= -1e-5).all() and (
        gaps.min(axis=0) <= math.sqrt(2 * heavy * smooth * width**2 * delta / steps)
    ).all()
    assert (gaps.min(axis=0) < 0.5 * gaps[0]).all()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.slow
def test_no_iterate_leaves_ball_or_box(rng, p):
    fn, x = net(rng), rng.random((12, 10), np.float32)
    x[:, :2] = 0, 1
    where, labels = where_of(x, np.full(12, 0.3)), jnp.zeros(12, jnp.int32)
    state = where[0], jnp.zeros_like(where[0]), unbroken(where[0])
    for k in range(6):
        how = np.float32(0.7), np.float32(0.5)
        state, _ = descend(
            Model(fn),
            None,
            where,
            labels,
            state,
            np.int32(k),
            how,
            norm=p,
            loss="ce",
            steps=1,
            targeted=False,
        )
        point = np.asarray(state[0], np.float64)
        assert point.min() >= 0 and point.max() <= 1
        assert (np.linalg.norm(point - x, p, axis=1) <= 0.3 * (1 + 1e-5)).all()


@pytest.mark.slow
def test_targets_and_batches(rng):
    fn, x = net(rng), rng.random((14, 10), np.float32)
    y = np.asarray(fn(x)).argmax(1)
    aim = (y + 1) % 3
    made = frank_wolfe(fn, x, y, 0.4, norm=math.inf, target=aim, loss="ce")
    won = made.success
    assert won.any() and (np.asarray(fn(made.adversarial)).argmax(1)[won] == aim[won]).all()
    split = frank_wolfe(fn, x, y, 0.4, norm=math.inf, target=aim, loss="ce", batch_size=5)
    np.testing.assert_array_equal(split.success, won)
    np.testing.assert_array_equal(split.steps, made.steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\]"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"loss": "dlr"}, "loss must be one of ce, margin"),
        ({"steps": 0}, "steps must be a whole number >= 1"),
    ],
)
def test_bad_input_is_refused(rng, change, message):
    with pytest.raises(ValueError, match=message):
        frank_wolfe(net(rng), rng.random((2, 10), np.float32), np.zeros(2, int), 0.1, **change)
