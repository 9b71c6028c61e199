"""Intrinsic robustness: the tables of the thesis, equality for half-spaces, constants that are proved."""

import math

import numpy as np
import pytest
from scipy import stats

import lipbounds as lb
from lipbounds.analysis import generator_constants, intrinsic_robustness, risk_bound

NORMAL = stats.norm


@pytest.mark.parametrize(
    ("alpha", "constant", "table"), [(0.015, 11.0, (98.2, 97.8, 97.2)), (0.15, 14.9, (83.5, 81.8, 79.9))]
)
def test_the_table_of_the_thesis(alpha, constant, table):
    for eps, percent in zip((1, 2, 3), table, strict=True):
        found = intrinsic_robustness(alpha, eps, constant, each=True, delta=0.001, radius=0.5)
        assert 100 * found == pytest.approx(percent, abs=0.05)


def test_ten_equal_classes_of_risk_in_one_of_them():
    """Remark 4.4.5's 75 % needs the risk in every class; with the risk anywhere it is 91.6 %."""
    shift = NORMAL.ppf(0.25) - NORMAL.ppf(0.05)
    assert intrinsic_robustness(0.05, shift, 1.0, each=True) == pytest.approx(0.75)
    assert intrinsic_robustness(0.05, shift, 1.0) == pytest.approx(1 - 0.1 * NORMAL.cdf(shift))
    assert intrinsic_robustness(0.05, shift, 1.0) == pytest.approx(0.9166, abs=1e-4)


def test_the_minimum_is_attained_with_the_risk_in_one_class(rng):
    shares = np.array([0.2, 0.3, 0.5])
    bound = 1 - intrinsic_robustness(0.1, 0.8, 1.0, classes=shares.tolist())
    drawn = rng.dirichlet(np.ones(3), size=2000) * 0.1 / shares  # risks of classes, overall 0.1
    drawn = drawn[(drawn <= 1).all(axis=1)]
    risks = [risk_bound(one.tolist(), 0.8, 1.0, shares=shares.tolist()) for one in drawn]
    assert min(risks) >= bound - 1e-9 and min(risks) < 1.15 * bound


def test_a_half_space_and_a_linear_generator_attain_the_bound(rng):
    """g = L z, f errs where z_1 > t: the risk is Phi(-t), and moving by eps reaches z_1 > t - eps / L."""
    t, constant, eps = 1.2, 3.0, 1.5
    assert risk_bound([NORMAL.cdf(-t)], eps, constant) == pytest.approx(NORMAL.cdf(-t + eps / constant))
    z = rng.standard_normal(200_000)
    assert risk_bound([np.mean(z > t)], eps, constant) == pytest.approx(
        np.mean(z > t - eps / constant), abs=0.005
    )
    assert risk_bound([0.0, 1.0], eps, constant) == 0.5


def test_constants_of_a_generator_are_proved_and_stated_with_confidence(rng):
    form = lb.from_weights([(rng.normal(size=(5, 3)) / 2).tolist(), (rng.normal(size=(4, 5)) / 2).tolist()])
    found = generator_constants(form, 0.5, chosen=12, samples=30, failure_probability=0.01)
    held = 1 - found.delta
    assert found.exceeded <= 6 and found.samples == 30 and "with confidence 0.99" in repr(found)
    assert stats.binom.sf(30 - found.exceeded - 1, 30, held) == pytest.approx(0.01, rel=1e-3)
    z = np.random.default_rng(0).standard_normal((42, 3))
    proved = lb.local(form, z, np.full(42, 0.5), progress=False).value
    assert found.value == proved[:12].max() and found.exceeded == (proved[12:] > found.value).sum()
    assert found.value <= lb.liplt(form, progress=False).value * (1 + 1e-9)
    bound = intrinsic_robustness(0.05, 0.3, found, each=True)
    assert (
        bound == pytest.approx(1 + found.delta - NORMAL.cdf(NORMAL.ppf(0.05) + 0.3 / found.value), abs=1e-12)
        or bound == 1.0
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intrinsic_robustness(0.15, 1, 14.9), "alpha 0.15 exceeds the probability 0.1 of a class"),
        (lambda: intrinsic_robustness(0.05, 6, 10, radius=0.5), "eps 6 exceeds radius"),
        (lambda: intrinsic_robustness(0.1, 1, 10, classes=np.int64(10)), "cast it: classes=10"),
        (lambda: intrinsic_robustness(0.0, 1, 10), r"alpha must be in \(0, 1\)"),
        (lambda: intrinsic_robustness(0.1, 1, -1), "constants must be one number > 0"),
        (lambda: risk_bound([0.1, 0.1], 1, 2, shares=[0.5, 0.6]), "sum to 1"),
        (lambda: risk_bound([1.1], 1, 2), r"risks must lie in \[0, 1\]"),
        (lambda: risk_bound([0.1], math.inf, 2), "eps must be a number >= 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
