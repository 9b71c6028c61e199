"""Bounds in one norm from bounds in others (`lb.in_norm`), and LipSDP in l-inf by way of l2."""

import itertools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import largest_slopes, mlp, values

import lipbounds as lb
from lipbounds._norms.between import enlarged, stretch
from lipbounds.analysis.experiment import triangle_bound

NORMS = (1, 2, math.inf)
PAIRS = list(itertools.product(NORMS, NORMS))
FIRST = np.array([[1.0, 0.0], [0.0, 2.0]])


def conv_net() -> lb.LureForm:
    rng = np.random.default_rng(0)
    kernel, head = (jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for s in ((3, 3, 2, 4), (144, 5)))

    def net(x):
        h = jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(h).reshape(-1) @ head

    return lb.trace(net, jnp.zeros((8, 8, 2)))


def induced(a: np.ndarray, p: float) -> float:
    return float(np.linalg.norm(a, p))


def dual(p: float) -> float:
    return {1: math.inf, 2: 2, math.inf: 1}[p]


@pytest.mark.parametrize(("of", "by"), PAIRS)
@pytest.mark.parametrize("size", [1, 3, 7, 3072])
def test_stretch_is_attained_and_no_smaller(of, by, size):
    unit, equal = np.eye(size)[0], np.ones(size)
    least = max(np.linalg.norm(v, of) / np.linalg.norm(v, by) for v in (unit, equal))
    assert least * (1 - 1e-15) <= stretch(size, of, by) <= least * (1 + 1e-14)


def test_enlarged_rounds_up():
    x = np.array([0.0, 5e-324, 1e-3, 1 / 3, 1e300])
    for factor in (math.sqrt(2), 3.0, 1.0 + 2.0**-52):
        exact = [v.as_integer_ratio() for v in x]
        scale = factor.as_integer_ratio()
        for (a, b), out in zip(exact, enlarged(x, factor), strict=True):
            c, d = float(out).as_integer_ratio()
            assert c * b * scale[1] >= a * scale[0] * d
    assert enlarged(x, 3.0)[0] == 0 and np.isinf(enlarged(1e308, 10.0))


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_bounds_of_linear_networks_hold_in_every_norm(p, q):
    """The truth of f(x) = A x is known: induced norms, and dual norms of rows and of their differences."""
    rng = np.random.default_rng(0)
    for k, n in ((4, 6), (3, 1), (1, 5), (2, 2)):
        for a in (rng.normal(size=(k, n)), np.ones((k, n)), np.eye(k, n)):
            form = lb.from_weights([a])
            for pairwise in (True, False):
                bound = lb.in_norm(form, lb.naive(form, norm=p, pairwise=pairwise), norm=q)
                assert bound.norm == q and bound.value >= induced(a, q) * (1 - 1e-14)
                if bound.per_class is not None:
                    assert (bound.per_class >= np.linalg.norm(a, dual(q), axis=1) * (1 - 1e-14)).all()
                if bound.pairwise is not None:
                    rows = np.linalg.norm(a[:, None] - a[None], dual(q), axis=2)
                    assert (bound.pairwise >= rows * (1 - 1e-14)).all()
                assert (bound.pairwise is not None) == (pairwise or (k > 1 and p != q))


@pytest.mark.parametrize("norm", [1, math.inf])
def test_nothing_that_data_attain_is_above(norm):
    form, rng = mlp(widths=(8, 20, 20, 4)), np.random.default_rng(1)
    x = rng.normal(size=(30, 8)).astype(np.float32)
    bound = lb.in_norm(form, lb.lipsdp(form, pairwise=True), norm=norm)
    assert bound.guarantee == "verified" and bound.certificate is None and bound.method == "lipsdp, from l2"
    whole, pairs = largest_slopes(form, x, 0.5, norm, rng)
    assert (whole <= bound.value).all() and (pairs <= bound.pairwise + 1e-9 * np.eye(4)).all()
    own = lb.liplt(form, norm=norm, pairwise=True)
    assert bound.average_pair() < 0.5 * own.average_pair()


def test_the_least_entry_by_entry():
    form = lb.from_weights([FIRST, np.array([[1.0, -1.0], [0.5, 3.0], [0.0, 0.1]])])
    own, plain = lb.liplt(form, norm="inf", pairwise=True), lb.liplt(form, pairwise=True)
    converted = lb.in_norm(form, plain, norm="inf")
    both = lb.in_norm(form, own, plain, norm="inf")
    np.testing.assert_array_equal(both.pairwise, np.minimum(own.pairwise, converted.pairwise))
    np.testing.assert_array_equal(both.per_class, np.minimum(own.per_class, converted.per_class))
    assert both.value == min(own.value, converted.value)
    assert lb.in_norm(form, own, norm="inf") is own
    worse = lb.naive(form, norm="inf", pairwise=True)
    assert lb.in_norm(form, own, worse, norm="inf") is own  # what gives nothing leaves no trace
    assert lb.in_norm(form, worse, own, norm="inf") is own
    x = np.ones((1, 2), np.float32)
    y = values(form, x).argmax(axis=1)
    assert lb.certified_radius(form, x, y, bound=both).radius[0] > 0


def test_guarantees_and_probabilities_of_those_that_count():
    form = lb.from_weights([FIRST])
    base = {"seconds": 1.0, "pairwise": np.array([[0.0, 3.0], [3.0, 0.0]]), "per_class": np.array([9.0, 1.0])}
    a = lb.UpperBound(9.0, 2, "verified", "a", **base)
    risky = {**base, "per_class": np.array([8.0, 2.0])}
    b = lb.UpperBound(9.5, 2, "probabilistic", "b", failure_probability=1e-9, **risky)
    both = lb.in_norm(form, a, b, norm=2)
    assert both.guarantee == "probabilistic" and both.failure_probability == 1e-9 and both.method == "a; b"
    assert both.per_class.tolist() == [8.0, 1.0] and both.value == 9.0


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_radii_in_l2_are_radii_in_l1_and_by_the_root_in_linf(kind):
    form = mlp(widths=(8, 20, 4)) if kind == "mlp" else conv_net()
    x = np.random.default_rng(2).normal(size=(6, *form.in_shape)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    plain = lb.liplt(form, pairwise=True)
    radius = lb.certified_radius(form, x, y, bound=plain).radius
    for norm, factor in ((1, 1.0), ("inf", math.sqrt(form.in_size))):
        found = lb.certified_radius(form, x, y, bound=lb.in_norm(form, plain, norm=norm)).radius
        np.testing.assert_allclose(found * factor, radius, rtol=1e-12)
        assert (found * factor <= radius * (1 + 1e-15)).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_triangle_bound_of_analysis_is_the_least_of_both_norms(norm):
    form = mlp(widths=(8, 20, 4))
    own, plain = lb.liplt(form, norm=norm, pairwise=True), lb.liplt(form, pairwise=True)
    found = triangle_bound(form, norm)
    least = np.minimum(own.pairwise, lb.in_norm(form, plain, norm=norm).pairwise)
    np.testing.assert_array_equal(found.pairwise, least)


def test_refusals():
    form, other = lb.from_weights([FIRST]), lb.from_weights([2 * FIRST])
    with pytest.raises(ValueError, match="at least one bound"):
        lb.in_norm(form, norm=1)
    with pytest.raises(ValueError, match="norm must be 1, 2 or inf"):
        lb.in_norm(form, lb.naive(form), norm=3)
    with pytest.raises(ValueError, match="another network"):
        lb.in_norm(form, lb.naive(other), norm=1)
    with pytest.raises(ValueError, match="around one example only"):
        lb.in_norm(form, lb.local(form, np.ones((1, 2)), 0.1)[0], norm=1)
    with pytest.raises(TypeError, match="upper bounds, got Estimate"):
        lb.in_norm(form, lb.naive(form, guarantee="estimate"), norm=1)
    with pytest.raises(TypeError, match="needs a LureForm"):
        lb.in_norm(lb.naive(form), norm=1)


# --- LipSDP --------------------------------------------------------------------------------------------------------


def test_lipsdp_in_linf_has_the_pairs_that_l2_proves():
    """Each pair has multipliers of its own in l2, all pairs have the same in l-inf."""
    form = mlp(widths=(12, 16, 4))
    plain = lb.lipsdp(form, pairwise=True, progress=False)
    bound = lb.lipsdp(form, norm="inf", pairwise=True, progress=False)
    assert (bound.pairwise <= plain.pairwise * math.sqrt(12) * (1 + 1e-6)).all()
    assert bound.value <= plain.per_class.max() * math.sqrt(12) * (1 + 1e-6)
    assert any(note.startswith("in l2: ") for note in bound.notes)


@pytest.mark.parametrize("pairwise", [False, True])
def test_lipsdp_of_wide_networks_in_linf(pairwise, monkeypatch, tmp_path):
    for name in ("search", "state_matrices"):
        monkeypatch.setattr(sys.modules[f"lipbounds._lipsdp.{name}"], "TAIL", 26)
    monkeypatch.setattr(sys.modules["lipbounds._lipsdp.search"], "DENSE", 10)
    form = mlp(widths=(12, 40, 30, 5))
    bound = lb.lipsdp(form, norm="inf", pairwise=pairwise, progress=False)
    own = lb.liplt(form, norm="inf", pairwise=pairwise)
    assert bound.value < 0.7 * own.value and bound.guarantee == "verified"
    rng = np.random.default_rng(3)
    whole, _ = largest_slopes(form, rng.normal(size=(30, 12)).astype(np.float32), 0.5, np.inf, rng)
    assert (whole <= bound.value).all()
    path = tmp_path / "certificate"
    lb.save_certificate(bound, path)
    assert lb.verify_certificate(path, form) and lb.load_certificate(path, form).norm == math.inf
    if pairwise:
        assert (bound.pairwise < own.pairwise + np.eye(5)).all()
