"""Capacity terms, the robust gap, perturbation stability and the figures of attacks."""

import math

import numpy as np
import pytest

import lipbounds as lb
from lipbounds.analysis import adbd, pac_bayes, perturbation_stability, rays, robust_gap
from lipbounds.analysis.attack_figures import (
    bracket_figure,
    distance_figure,
    landscape_figure,
    success_curve,
    success_figure,
)
from lipbounds.analysis.figures import png
from lipbounds.analysis.loss_geometry import Landscape

USUAL = {"kappa": 0.5, "steps": 3, "size": 2.0, "eps": 0.1, "margin": 0.3, "count": 1000}


def test_capacity_terms_by_hand(rng):
    weights = [rng.normal(size=(4, 3)), rng.normal(size=(2, 4))]
    a, b = (np.linalg.norm(w, 2) for w in weights)
    found = pac_bayes(weights, alpha=0.2, **USUAL)
    lip = a * b * (a + a * b)
    shares = sum(np.linalg.norm(w) ** 2 / s**2 for w, s in zip(weights, (a, b), strict=True))
    q = 2 * 0.2 * lip / 0.5
    phi = (a * b * (1 + 0.2 / 0.5 * (1 + q + q * q) * lip)) ** 2 * shares
    assert found.robust == pytest.approx(phi) and found.clean == pytest.approx((a * b) ** 2 * shares)
    assert found.complexity == pytest.approx(2.1**2 * 4 * 4 * math.log(8) * phi / (0.09 * 1000))
    assert found.confidence == pytest.approx(2 * math.log(3 * 2 * 1000 * math.log(2) / 0.05) / 90)
    none = pac_bayes(weights, alpha=0.0, **USUAL)
    assert none.robust == none.clean == pytest.approx(found.clean) and "no bounds" in repr(none)
    for changes, message in (
        ({"kappa": 0.0}, "kappa must be a number > 0"),
        ({"failure_probability": 1.0}, r"failure_probability must be in \(0, 1\)"),
        ({"steps": 400, "kappa": 1e-9, "alpha": 1.0}, "beyond float64"),
    ):
        with pytest.raises(ValueError, match=message):
            pac_bayes(weights, **{"alpha": 0.0, **USUAL, **changes})


@pytest.fixture
def linear(rng):
    """(form, fn, x, y, l-inf distances) of a linear network with two classes."""
    w = rng.normal(size=(6, 2)).astype(np.float32)
    x = rng.uniform(0.3, 0.7, (24, 6)).astype(np.float32)
    row = (w[:, 0] - w[:, 1]).astype(np.float64)
    shift = np.float32(0.5)

    def fn(b):
        return (b - shift) @ w

    exact = np.abs((x.astype(np.float64) - 0.5) @ row) / np.abs(row).sum()
    return lb.trace(fn, x[:2], batched=True), fn, x, np.asarray(fn(x)).argmax(1), exact


def test_stability_has_two_sides_that_meet_on_a_linear_network(linear):
    form, fn, x, y, exact = linear
    eps = float(np.median(exact)) * 1.0001
    labels = y.copy()
    labels[:5] = 1 - labels[:5]
    found = perturbation_stability(form, x, eps, norm=math.inf, y=labels, fn=fn, steps=20)
    np.testing.assert_array_equal(found.predicted, y)
    np.testing.assert_array_equal(found.certified, exact > eps)
    np.testing.assert_array_equal(found.broken, exact < eps)
    assert found.lower == found.upper == np.mean(exact > eps) and "<= stable <=" in repr(found)
    low, high = found.robust
    clean = found.correct.mean()
    assert low == high == np.mean((exact > eps) & (np.arange(24) >= 5))
    assert clean + found.upper - 1 <= high + 1e-12 and high <= min(clean, found.upper)
    with pytest.raises(ValueError, match="needs labels"):
        _ = perturbation_stability(form, x, eps, norm=math.inf, fn=fn, steps=1).robust


def test_a_wrong_radius_is_found_out(linear):
    form, fn, x, _, exact = linear
    true = lb.liplt(form, norm=math.inf, pairwise=True, progress=False)
    wrong = lb.UpperBound(
        true.value / 2, math.inf, "assumed", "wrong", 0.0, pairwise=true.pairwise / 2, network=true.network
    )
    with pytest.raises(lb.errors.GuaranteeError, match="inside their certified radius"):
        perturbation_stability(form, x, float(exact.max()), norm=math.inf, fn=fn, bound=wrong, steps=20)


def test_a_bound_in_another_norm_proves_no_stability(linear):
    """An l2 radius above eps says nothing about the l-inf ball of radius eps, which is larger."""
    form, fn, x, y, exact = linear
    bound = lb.naive(form, pairwise=True)
    assert (lb.certified_radius(form, x, y, bound=bound).radius > 1.1 * exact).any()
    with pytest.raises(ValueError, match="the bound is in l2 and the settings in l-inf"):
        perturbation_stability(form, x, 0.01, norm=math.inf, fn=fn, bound=bound, steps=1)


def test_stability_of_bad_input(linear):
    form, fn, x, y, _ = linear
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1"):
        perturbation_stability(form, x, 0.01, y=y + 2, steps=1)
    with pytest.raises(TypeError, match="needs a LureForm from lb.trace, got function"):
        perturbation_stability(fn, x, 0.01)


def test_the_gap_between_training_and_test_data(linear):
    _, fn, x, y, exact = linear
    eps = float(np.median(exact))
    far, near = exact > eps, exact <= eps
    found = robust_gap(fn, (x[far], y[far]), (x, y), eps * 0.999, norm=math.inf, steps=20)
    assert found.train == 1.0 and found.test == np.mean(exact > 0.999 * eps)
    assert found.gap == 1 - found.test and found.error == pytest.approx(
        math.sqrt(found.test * (1 - found.test) / 24)
    )
    assert near.any() and "an estimate" in repr(found)


@pytest.mark.slow
def test_curves_and_figures(linear):
    form, fn, x, y, exact = linear
    broken = rays(fn, x, y, 1.05 * exact, queries=150)
    counts, shares = success_curve(broken)
    assert counts[0] == 0 and shares[0] == 0 and shares[-1] == broken.success_rate
    for count, share in zip(counts, shares, strict=True):
        assert share == pytest.approx(np.mean(broken.success & (broken.queries <= count)))
    distances = adbd(fn, x, y, queries=150)
    bound = lb.naive(form, norm=math.inf, pairwise=True, progress=False)
    radius = lb.certified_radius(form, x, y, bound, progress=False).radius
    line = Landscape(np.array([-1.0, 0, 1]), np.array([2.0, 1, 2]), np.ones(3), "weights")
    plane = Landscape(np.array([-1.0, 1]), np.ones((2, 2)) + np.eye(2), np.ones((2, 2)), "plane")
    for figure in (
        success_figure({"RayS": broken}),
        distance_figure({"linear": distances}),
        bracket_figure(distances, radius),
        landscape_figure({"net": line}),
        landscape_figure({"net": plane}),
    ):
        assert png(figure)[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="exceeds the distance"):
        bracket_figure(distances, radius + 10)
