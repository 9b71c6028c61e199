"""Certified radii: closed forms, no attack inside, local searches and networks of one output.

Logits and their errors are in test_logits; bad labels, shapes and types in test_bad_input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import chain
from gain import form_of

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds._local import forward, radius_search

NORMS = (2, 1, math.inf)
DUAL = {2: 2, 1: math.inf, math.inf: 1}


# ------------------------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("norm", NORMS)
def test_linear_networks_have_the_distance_to_the_boundary(norm: float, rng: np.random.Generator) -> None:
    """min_i (z_y - z_i) / ||w_y - w_i||_* is the distance to the boundary: below it within 1e-6, and attained."""
    w, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 7), (5,)))
    form = lb.from_weights([w], biases=[b])
    x = rng.normal(size=(30, 7)).astype(np.float32)
    weights, exact = w.astype(float), x.astype(float) @ w.astype(float).T + b
    label = exact.argmax(axis=1)
    radii = lb.certified_radius(form, x, label, bound=lb.liplt(form, norm=norm, pairwise=True))
    assert radii.norm == norm and radii.guarantee == "verified" and not radii.notes
    for k in range(30):
        y, truth, closest = label[k], math.inf, -1
        for i in set(range(5)) - {y}:
            gap = np.linalg.norm(weights[y] - weights[i], DUAL[norm])
            if (exact[k, y] - exact[k, i]) / gap < truth:
                truth, closest = (exact[k, y] - exact[k, i]) / gap, i
        assert truth * (1 - 1e-6) <= radii.radius[k] <= truth
        # the step of that length which attains the dual norm changes the answer, and is not certified
        d = weights[closest] - weights[y]
        step = {2: d / np.linalg.norm(d), math.inf: np.sign(d), 1: np.sign(d) * (abs(d) == abs(d).max())}[
            norm
        ]
        moved = weights @ (x[k] + (1 + 1e-6) * truth * step) + b
        assert moved[closest] > moved[y]


def test_one_dimension_by_hand() -> None:
    """z = (2x, 0): at x = 3 the margin is 6, L = 2, the radius 3; at x = -1 class 1 wins with radius 1."""
    form = lb.from_weights([np.array([[2.0], [0.0]])])
    radii = lb.certified_radius(form, np.array([[3.0], [-1.0], [0.0], [3.0]]), np.array([0, 1, 0, 1]))
    assert radii.radius == pytest.approx([3.0, 1.0, 0.0, 0.0], rel=1e-12)
    assert (radii.radius <= [3.0, 1.0, 0.0, 0.0]).all()
    assert radii.correct.tolist() == [True, True, False, False]


def test_radii_scale_with_the_units_of_the_input(rng: np.random.Generator) -> None:
    """The network of x/4 at 4x has four times the radii."""
    form, weights, biases = chain(rng, (5, 8, 3))
    far = lb.from_weights([weights[0] / np.float32(4), weights[1]], biases=biases)
    x = rng.normal(size=(20, 5)).astype(np.float32)
    y = np.asarray(jax.vmap(form)(jnp.asarray(x))).argmax(axis=1)
    one, four = lb.certified_radius(form, x, y), lb.certified_radius(far, 4 * x, y)
    assert (one.radius > 0).any()
    assert four.radius == pytest.approx(4 * one.radius, rel=1e-12)


# ------------------------------------------------------------------------------------- the defined answers
def head(*rows: Sequence[float], bias: Sequence[float] | None = None) -> LureForm:
    return lb.from_weights([np.array(rows, float)], biases=None if bias is None else [np.array(bias, float)])


def test_a_tie_has_radius_zero_even_where_no_class_can_ever_win() -> None:
    form = head([1.0, 0.0], [1.0, 0.0], [0.0, 1.0], bias=[0.0, 0.0, -1.0])
    radii = lb.certified_radius(form, np.array([[1.0, 0.0], [0.0, 5.0], [0.0, 1.0]]), np.array([0, 2, 2]))
    assert radii.radius[0] == 0.0 and not radii.correct[0], "classes 0 and 1 always tie"
    assert radii.radius[1] > 2.8
    assert radii.radius[2] == 0.0


def test_parallel_classes_have_infinite_radius() -> None:
    """z_0 - z_1 = 1 everywhere: L_01 = 0 and nothing can change the answer."""
    form = head([1.0, 2.0], [1.0, 2.0], bias=[1.0, 0.0])
    radii = lb.certified_radius(form, np.array([[3.0, -4.0]] * 2), np.array([0, 1]))
    assert radii.radius[0] == math.inf and radii.certified(1e300).tolist() == [True, False]
    assert radii.radius[1] == 0.0
    three = head([1.0, 2.0], [1.0, 2.0], [0.0, 0.0], bias=[1.0, 0.0, 0.0])
    finite = lb.certified_radius(three, np.array([[3.0, 0.0]]), np.array([0]))
    assert finite.radius[0] == pytest.approx(4 / math.sqrt(5), rel=1e-12), "the other class still counts"


def test_certified_means_strictly_more() -> None:
    radii = lb.certified_radius(head([1.0], [0.0]), np.array([[1.0], [2.0], [-1.0]]), np.array([0, 0, 0]))
    first = float(radii.radius[0])
    assert radii.certified(first).tolist() == [False, True, False], "r > eps, not r >= eps"
    assert radii.certified(math.nextafter(first, 0)).tolist() == [True, True, False]
    assert radii.certified(0.0).tolist() == [True, True, False]
    assert radii.accuracy(0.0) == 2 / 3 and radii.accuracy(first) == 1 / 3 and radii.accuracy(1e9) == 0.0
    for eps in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="eps must be a number >= 0"):
            radii.certified(eps)


def test_an_empty_batch(rng: np.random.Generator) -> None:
    form, *_ = chain(rng, (5, 8, 3))
    radii = lb.certified_radius(form, np.zeros((0, 5), np.float32), np.zeros(0, np.int64))
    assert len(radii) == 0 and radii.radius.shape == radii.correct.shape == radii.certified(1.0).shape == (0,)
    assert "0 examples" in repr(radii)
    with pytest.raises(ValueError, match="accuracy of an empty batch"):
        radii.accuracy(0.1)


@pytest.mark.parametrize(
    ("norm", "factor", "said"), [(2, math.sqrt(2), "sqrt(2) L"), (1, 1.0, " L ="), (math.inf, 2.0, "2 L")]
)
def test_without_pairs(norm: float, factor: float, said: str, rng: np.random.Generator) -> None:
    """Every pair gets sqrt(2) L (norm 2), L (1) or 2 L (inf); the radii say so, and pairs are never worse."""
    form, *_ = chain(rng, (6, 10, 4))
    x = rng.normal(size=(25, 6)).astype(np.float32)
    z, _ = forward.logits(form, x.astype(float))
    y = z.argmax(axis=1)
    bound = lb.liplt(form, norm=norm)
    loose = lb.certified_radius(form, x, y, bound=bound)
    assert len(loose.notes) == 1 and said in loose.notes[0] and "without pairwise" in loose.notes[0]
    second = np.sort(z, axis=1)[:, -2]
    wanted = (z.max(axis=1) - second) / (factor * bound.value)
    assert loose.radius == pytest.approx(wanted, rel=1e-9) and (loose.radius <= wanted).all()
    tight = lb.certified_radius(form, x, y, bound=lb.liplt(form, norm=norm, pairwise=True))
    assert not tight.notes and (loose.radius <= tight.radius * (1 + 1e-9)).all()
    assert (loose.radius < tight.radius * 0.99).any(), "pairs bring nothing here, so this test shows nothing"
    assert (tight.radius > 0).all()


def test_a_smaller_bound_gives_larger_radii(rng: np.random.Generator) -> None:
    form, *_ = chain(rng, (6, 10, 10, 4))
    x = rng.normal(size=(25, 6)).astype(np.float32)
    y = np.asarray(jax.vmap(form)(jnp.asarray(x))).argmax(axis=1)
    radii = [
        lb.certified_radius(form, x, y, bound=bound).radius
        for bound in (lb.naive(form, pairwise=True), lb.liplt(form, pairwise=True), None)
    ]
    assert (radii[0] < radii[1]).all() and np.array_equal(radii[1], radii[2]), "None is liplt with pairs"


def test_the_guarantee_is_that_of_the_bound(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    form, *_ = chain(rng, (6, 10, 4))
    x, y = rng.normal(size=(3, 6)).astype(np.float32), np.zeros(3, int)
    for guarantee in ("verified", "probabilistic"):
        bound = lb.liplt(form, guarantee=guarantee, pairwise=True)
        assert lb.certified_radius(form, x, y, bound=bound).guarantee == bound.guarantee == guarantee


# --------------------------------------------------------------------------------------- no attack inside
ATTACKED = ["relu", "two_branches", "gelu_exact", "max_pool_overlapping", "dense_net", "reduce_max_head"]


@functools.cache
def attacked(name: str, norm: float) -> tuple[Callable[[float], int], np.ndarray]:
    """(scale -> how many of the examples change their label within scale times their radius, radii)."""
    form = form_of(name)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, form.in_size)).astype(np.float32).astype(float)
    with jax.enable_x64(True):
        flat = jax.jit(jax.vmap(lambda v: form.evaluate(v.reshape(form.in_shape), jnp.float64)))
        jac = jax.jit(jax.vmap(jax.jacrev(lambda v: form.evaluate(v.reshape(form.in_shape), jnp.float64))))

        def values(f: Any, v: np.ndarray) -> np.ndarray:
            with jax.enable_x64(True):
                return np.asarray(f(jnp.asarray(v)))

        y = values(flat, x).argmax(axis=1)
    shaped = x.astype(np.float32).reshape(-1, *form.in_shape)
    radii = lb.certified_radius(form, shaped, y, bound=lb.liplt(form, norm=norm, pairwise=True)).radius
    rows = np.arange(len(x))

    def ball(d: np.ndarray, size: np.ndarray) -> np.ndarray:
        """d brought into the ball of each example (by scaling, which is enough for an attack)."""
        length = np.linalg.norm(d, norm, axis=1)
        return d * np.minimum(1, size / np.maximum(length, 1e-300))[:, None]

    def steepest(g: np.ndarray) -> np.ndarray:
        if norm == 2:
            return g / np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-300)
        if norm == math.inf:
            return np.sign(g)
        return np.sign(g) * (abs(g) == abs(g).max(axis=1, keepdims=True))

    def changed(scale: float) -> int:
        size = scale * radii
        flipped = np.zeros(len(x), bool)
        for target in range(form.num_outputs):
            d = ball(1e-3 * rng.normal(size=x.shape), size)
            for step in range(12):
                g = values(jac, x + d)
                d = ball(d + size[:, None] / (1 + step / 4) * steepest(g[rows, target] - g[rows, y]), size)
                flipped |= values(flat, x + d).argmax(axis=1) != y
        for _ in range(20):
            d = rng.normal(size=x.shape)
            d = d * (size / np.linalg.norm(d, norm, axis=1))[:, None]
            flipped |= values(flat, x + d).argmax(axis=1) != y
        return int(flipped.sum())

    return changed, radii


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ATTACKED)
@pytest.mark.parametrize("norm", [2])
def test_no_attack_succeeds_within_the_radius(name: str, norm: float) -> None:
    changed, radii = attacked(name, norm)
    assert (radii > 0).sum() >= 35 and np.isfinite(radii).all()
    assert changed(0.9999) == 0
    assert changed(8.0) >= 10, "the attack is too weak to show anything"


@pytest.mark.parametrize("norm", [1, math.inf])
def test_no_attack_succeeds_within_the_radius_in_other_norms(norm: float) -> None:
    changed, _ = attacked("relu", norm)
    assert changed(0.9999) == 0
    assert changed(40.0) >= 5, "the attack is too weak to show anything"


# --- the search of local radii -------------------------------------------------------------------------------------


def far_away(slope: float) -> LureForm:
    """z = (x, slope relu(x - 100)): the class changes at 0, and again far behind 100."""
    weights = [np.array([[1], [-1], [1]], np.float32), np.array([[1, -1, 0], [0, 0, slope]], np.float32)]
    return lb.from_weights(weights, biases=[np.array([0, 0, -100], np.float32), np.zeros(2, np.float32)])


@pytest.mark.parametrize("slope", [1e3, 1e6])
def test_a_local_search_goes_on_while_whole_balls_are_certified(slope: float) -> None:
    form, x = far_away(slope), np.array([[1.0], [50.0]], np.float32)
    bound = lb.liplt(form, pairwise=True)
    globally = lb.certified_radius(form, x, [0, 0], bound=bound).radius
    found = lb.certified_radius(form, x, [0, 0], bound=bound, local=True)
    assert globally[0] < 2 / slope
    assert 0.9 < found.radius[0] <= 1 and 45 < found.radius[1] <= 50 and found.notes == ()
    short = lb.certified_radius(form, x, [0, 0], bound=bound, local=lb.Local(tries=1))
    assert (short.radius <= found.radius).all() and (short.radius > 0.5 * found.radius).all()


def test_a_search_that_stops_early_says_so() -> None:
    form, x = far_away(3.0), np.array([[1.0]], np.float32)
    found = lb.certified_radius(form, x, [0], local=lb.Local(tries=1))
    assert found.radius[0] < 0.7 and any(
        "for 1 of 1 examples the search ended" in note for note in found.notes
    )


def test_a_search_without_an_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near x the network is constant, and very large balls are certified; the largest one that is tried is a limit."""
    dead = [np.array([[1e-30]], np.float32), np.array([[1], [0]], np.float32)]
    form = lb.from_weights(dead, biases=[np.array([-1e6], np.float32), np.array([0, 1], np.float32)])
    found = lb.certified_radius(form, np.array([[1.0]], np.float32), [1], local=True)
    assert 0.5e36 < found.radius[0] <= 1.00001e36
    monkeypatch.setattr(radius_search, "_FARTHEST", 1e33)
    short = lb.certified_radius(form, np.array([[1.0]], np.float32), [1], local=True)
    assert 1e32 < short.radius[0] < 2e34 and any("the search ended" in note for note in short.notes)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_local_bound_that_is_not_finite_is_no_bound(broken: float, monkeypatch: pytest.MonkeyPatch) -> None:
    form, x = far_away(10.0), np.array([[1.0], [50.0]], np.float32)
    bound = lb.liplt(form, pairwise=True)
    globally = lb.certified_radius(form, x, [0, 0], bound=bound)
    from lipbounds._local.engines import Around

    monkeypatch.setattr(Around, "outputs", lambda self, rows, eps, **_: np.full((len(eps), 1, 2, 2), broken))
    found = lb.certified_radius(form, x, [0, 0], bound=bound, local=True)
    assert np.array_equal(found.radius, globally.radius)
    near = lb.local(form, x, 0.1, pairwise=True)
    assert (near.value == lb.liplt(form).value).all() and np.array_equal(near.pairwise[0], bound.pairwise)


# --- one output ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_one_output_is_a_binary_classifier(norm: float) -> None:
    rng = np.random.default_rng(3)
    form, weights, biases = chain(rng, (6, 20, 20, 1), "tanh")
    x = rng.normal(size=(40, 6)).astype(np.float32)

    def value(points: np.ndarray) -> np.ndarray:
        h = points.astype(np.float64)
        for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
            h = h @ w.T.astype(np.float64) + b
            h = np.tanh(h) if k < 2 else h
        return h[:, 0]

    f = value(x)
    y = (f > 0).astype(int)
    y[:5] = 1 - y[:5]
    bound = lb.liplt(form, norm=norm)
    found = lb.certified_radius(form, x, y, bound=bound)
    assert np.array_equal(found.correct, np.arange(40) >= 5) and (found.radius[:5] == 0).all()
    assert np.allclose(found.radius[5:], np.abs(f[5:]) / bound.value, rtol=1e-9)
    assert any("one output" in note for note in found.notes)
    with_pairs = lb.certified_radius(form, x, y, bound=lb.liplt(form, norm=norm, pairwise=True))
    assert np.allclose(with_pairs.radius, found.radius, rtol=1e-9)
    radii = [found.radius]
    if norm != 1:
        radii.append(lb.certified_radius(form, x, y, bound=bound, local=True).radius)
        assert (radii[1] >= radii[0]).all() and radii[1].sum() > 1.3 * radii[0].sum()
    for within_it in radii:
        for _ in range(50):
            step = rng.normal(size=x.shape)
            step /= np.linalg.norm(step, norm, axis=1, keepdims=True)
            moved = value(x + step * within_it[:, None] * (1 - 1e-9))
            assert ((moved > 0) == y)[5:].all()


def test_one_output_at_its_edges() -> None:
    scalar = lb.trace(lambda x: jnp.sum(x) - 1, jax.ShapeDtypeStruct((2,), jnp.float32))
    x = np.array([[1, 0], [0, 0], [2, 0], [np.nextafter(np.float32(1), np.float32(2)), 0]], np.float32)
    for local in (False, True):
        found = lb.certified_radius(scalar, x, [1, 0, 1, 1], local=local)
        assert found.correct.tolist() == [False, True, True, True] and found.radius[0] == 0  # f = 0 is a tie
        assert np.allclose(found.radius[1:], np.array([1, 1, 2.0**-23]) / 2**0.5, rtol=1e-6)
    for wrong in ([0, 1, 2, 1], [0, 1, -1, 1]):
        with pytest.raises(ValueError, match="0..1"):
            lb.certified_radius(scalar, x, wrong)
    found = lb.local(scalar, x, 0.1, pairwise=True)
    assert np.allclose(found.value, 2**0.5) and found.pairwise.shape == (4, 1, 1) and not found.pairwise.any()
