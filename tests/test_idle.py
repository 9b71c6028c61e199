"""The same function in other parameters: with neurons that have no effect (pruned networks), or in other units."""

import itertools

import jax
import numpy as np
import pytest
from attained import Search

import lipbounds as lb
from lipbounds._triangle.recursion import live_masks

WIDTHS = (4, 8, 8, 3)


@pytest.fixture(scope="module")
def nets():
    """A network, the same with three neurons that are never moved, with three not read, and in other units."""
    rng = np.random.default_rng(3)
    W = [1.3 * rng.standard_normal((b, a)) / a**0.5 for a, b in itertools.pairwise(WIDTHS)]
    b = [0.3 * rng.standard_normal(n) for n in WIDTHS[1:]]
    x, more = rng.standard_normal((5, 4)), [np.append(b[0], np.zeros(3)), *b[1:]]
    zeros = [np.vstack([W[0], np.zeros((3, 4))]), np.hstack([W[1], rng.standard_normal((8, 3))]), W[2]]
    unread = [np.vstack([W[0], rng.standard_normal((3, 4))]), np.hstack([W[1], np.zeros((8, 3))]), W[2]]
    a, c = 2.0 ** rng.uniform(-5, 5, (2, 8))
    units = [W[0] * a[:, None], W[1] * c[:, None] / a, W[2] / c], [b[0] * a, b[1] * c, b[2]]
    with jax.enable_x64(True):
        return x, [lb.from_weights(*net) for net in ((W, b), (zeros, more), (unread, more), units)]


@pytest.mark.parametrize("norm", [2, np.inf])
@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_local_bounds_of_the_same_function(nets, norm, eps):
    x, forms = nets
    plain, *others = (lb.local(form, x, eps, norm=norm).value for form in forms)
    for value in others:
        np.testing.assert_allclose(value, plain, rtol=1e-6)


def in_units(most):
    """A network, and the same with rows times 2^u and columns times 2^-u, |u| <= most."""
    rng = np.random.default_rng(0)
    W = [1.3 * rng.standard_normal((b, a)) / a**0.5 for a, b in itertools.pairwise(WIDTHS)]
    a, c = 2.0 ** np.round(rng.uniform(-most, most, (2, 8)))
    with jax.enable_x64(True):
        return [lb.from_weights(V) for V in (W, [W[0] * a[:, None], W[1] * c[:, None] / a, W[2] / c])]


def test_lipsdp_of_neurons_in_units_of_their_own(tmp_path):
    plain, form = in_units(8)
    bound = lb.lipsdp(form)
    assert bound.value == pytest.approx(lb.lipsdp(plain).value, rel=1e-4)
    lb.save_certificate(bound, tmp_path / "proof.npz")
    assert lb.verify_certificate(tmp_path / "proof.npz", form)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [2, np.inf])
def test_the_recursion_of_neurons_in_far_units(norm):
    plain, form = in_units(30)
    short = lb.Recursion(iterations=100)
    found, known = (lb.lipsdp(net, solver=short, norm=norm).value for net in (form, plain))
    assert found == pytest.approx(known, rel=1e-3)


def test_margins_do_not_see_idle_neurons(nets):
    x, forms = nets[0][:2], nets[1][:3]
    y = np.argmax([forms[0](one) for one in x], axis=1)
    plain, *padded = (lb.margins(form, x, y, eps=0.5, progress=False).value for form in forms)
    for value in padded:
        np.testing.assert_allclose(value, plain, atol=2e-3)


def test_one_multiplier_per_layer_does_not_see_idle_neurons(nets):
    plain, *padded = (lb.lipsdp(form, multipliers="layer").value for form in nets[1][:3])
    np.testing.assert_allclose(padded, plain, rtol=1e-9)


def test_pruned_networks_attain_no_slope_above_their_bounds():
    rng, eps = np.random.default_rng(0), 0.5
    for _ in range(3):
        W = [rng.standard_normal((b, a)) * (rng.random((b, a)) < 0.3) for a, b in ((3, 7), (7, 7), (7, 2))]
        form = lb.from_weights(W, [0.3 * rng.standard_normal(7), np.zeros(7), np.zeros(2)])
        assert any(live is not None for live in live_masks(form))
        x, search = rng.standard_normal((2, 3)), Search(form)
        bound = lb.local(form, x, eps).value
        for centre, most in zip(x, bound, strict=True):
            step = rng.standard_normal((2, 4000, 3))
            step *= eps * rng.random((2, 4000, 1)) ** (1 / 3) / np.linalg.norm(step, axis=2, keepdims=True)
            near = step[0] + 1e-4 * rng.standard_normal((4000, 3))
            for there in (step[1], near * np.minimum(1, eps / np.linalg.norm(near, axis=1))[:, None]):
                moved = search.values(centre + step[0]) - search.values(centre + there)
                slopes = np.linalg.norm(moved, axis=1) / np.linalg.norm(step[0] - there, axis=1)
                assert slopes.max() <= most * (1 + 1e-9)


def test_the_effect_of_a_neuron_is_found_at_any_scale() -> None:
    """Its square leaves the range of float64 here; the bounds on balls are at most the global one, and finite."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in ((8, 5), (8, 8), (3, 8))]
    x = rng.standard_normal((2, 5))
    with jax.enable_x64(True):
        for scales in ((1e160, 1e-160, 1.0), (1.0, 1e160, 1e-160), (1e200, 1.0, 1e-200), (1e-200, 1.0, 1.0)):
            form = lb.from_weights([w * s for w, s in zip(weights, scales, strict=True)], activation="relu")
            for norm in (2, np.inf):
                with np.errstate(over="raise", invalid="raise"):
                    found = lb.local(form, x, eps=0.3, norm=norm).value
                assert (found > 0).all() and (found <= lb.liplt(form, norm=norm).value * (1 + 1e-9)).all()
