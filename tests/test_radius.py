"""Certified radii: closed forms, no attack inside, and logits whose rounding error is proved.

The logits are checked against exact rationals (relu) and 60-digit arithmetic (tanh, gelu), evaluated from formulas
written here. Bad labels, shapes and types are in test_bad_input.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from gain import form_of

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds._local import forward, radius, radius_search
from lipbounds._triangle import product_rounding, recursion

NORMS = (2, 1, math.inf)
DUAL = {2: 2, 1: math.inf, math.inf: 1}


def chain(
    rng: np.random.Generator, widths: Sequence[int], activation: Any = "relu"
) -> tuple[LureForm, Any, Any]:
    """(form, weights, biases), float32."""
    weights = [
        (1.5 * rng.normal(size=(b, a)) / a**0.5).astype(np.float32) for a, b in itertools.pairwise(widths)
    ]
    biases = [rng.normal(size=b).astype(np.float32) for b in widths[1:]]
    return lb.from_weights(weights, biases=biases, activation=activation), weights, biases


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


# --------------------------------------------------------------------------- logits and their proved error
def rational_relu(weights: Any, biases: Any, x: np.ndarray) -> list[Fraction]:
    h = [Fraction(float(v)) for v in x]
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = [
            sum((Fraction(float(a)) * v for a, v in zip(row, h, strict=True)), Fraction(float(c)))
            for row, c in zip(w, b, strict=True)
        ]
        if k < len(weights) - 1:
            h = [max(v, Fraction(0)) for v in h]
    return h


def within(z: np.ndarray, error: float, exact: Sequence[Fraction]) -> bool:
    """||z - exact||_2 <= error, in rationals."""
    distance = sum(((Fraction(float(a)) - b) ** 2 for a, b in zip(z, exact, strict=True)), Fraction(0))
    return distance <= Fraction(float(error)) ** 2


NETS = [(4, 6, 3), (5, 8, 8, 4), (3, 7, 7, 7, 2), (9, 2)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("widths", NETS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_relu_logits_hold_in_exact_rationals(widths: tuple[int, ...], scale: float) -> None:
    rng = np.random.default_rng([len(widths), int(scale)])
    form, weights, biases = chain(rng, widths)
    x = scale * rng.normal(size=(20, widths[0]))
    z, error = forward.logits(form, x)
    for k in range(20):
        assert within(z[k], error[k], rational_relu(weights, biases, x[k]))
    assert (error <= 1e-12 * (1 + np.abs(z).max(axis=1))).all(), "the bound is so wide that it shows nothing"


def test_without_its_rounding_term_the_error_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with unit roundoff 0 the bound of the error is too small nearly everywhere."""
    form, weights, biases = chain(np.random.default_rng(0), (5, 8, 8, 4))
    x = np.random.default_rng(1).normal(size=(20, 5))
    exact = [rational_relu(weights, biases, v) for v in x]
    for module in (radius, forward):
        monkeypatch.setattr(module, "U", 0.0)
    monkeypatch.setattr(forward, "gamma", lambda n: 0.0)
    z, error = forward.logits(form, x)
    assert sum(not within(z[k], error[k], exact[k]) for k in range(20)) >= 15


def test_an_error_made_early_is_carried_to_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 cancels (error about 1e-8 of a result near 1), the later ones are exact: only the carried part of the
    error covers that. Without it the same check fails."""
    first, second = np.array([[1e9 / 7, 1e9 / 3, 1.0], [1.0, 2.0, 0.0]]), np.eye(2)
    zero = [np.zeros(2), np.zeros(2)]
    form = lb.from_weights([first, second], biases=zero)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    x[:, 2] = rng.uniform(1, 2, 40) - x[:, :2] @ first[0, :2]
    exact = [rational_relu([first, second], zero, v) for v in x]
    z, error = forward.logits(form, x)
    assert all(within(z[k], error[k], exact[k]) for k in range(40))
    monkeypatch.setitem(product_rounding._CARRIED, form, {})
    z, error = forward.logits(form, x)
    assert not all(within(z[k], error[k], exact[k]) for k in range(40))


def test_sums_of_constants_are_part_of_the_error() -> None:
    """A scatter-add of constants on x: 2^60 + 1 - 2^60 is 1 in real arithmetic, not 0."""
    updates = np.array([2.0**60, 1.0, -(2.0**60), 0.25], np.float32)
    form = lb.trace(lambda x: x.at[jnp.array([0, 0, 0, 1])].add(updates), jnp.zeros(2))
    x = np.array([[0.0, 0.0], [0.5, 1.0]])
    z, error = forward.logits(form, x)
    for k in range(2):
        assert within(
            z[k], error[k], [Fraction(float(x[k, 0])) + 1, Fraction(float(x[k, 1])) + Fraction(1, 4)]
        )
    radii = lb.certified_radius(form, x, np.array([1, 1]), bound=lb.liplt(form))
    assert (radii.radius == 0).all(), "z is (1, 1/4) and (3/2, 5/4) in truth: class 1 never wins"


def test_an_answer_that_rounding_decides_is_not_certified() -> None:
    """x = (1e16, 3, -1e16) sums to 3, against a constant 3.5; floating point may say 4 or 2, by the order of terms."""
    form = lb.from_weights([np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])], biases=[np.array([0.0, 3.5])])
    x = np.array(list(itertools.permutations([1e16, 3.0, -1e16])))
    z, _ = forward.logits(form, x)
    assert (z[:, 0] != 3).any(), "rounding decides nothing here, so this test shows nothing"
    for label in (0, 1):
        radii = lb.certified_radius(form, x, np.full(len(x), label))
        assert (radii.radius == 0).all()


def transcendental(activation: Any, weights: Any, biases: Any, x: np.ndarray) -> list[Any]:
    h = [mpmath.mpf(float(v)) for v in x]
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = [
            mpmath.fsum([mpmath.mpf(float(a)) * v for a, v in zip(row, h, strict=True)])
            + mpmath.mpf(float(c))
            for row, c in zip(w, b, strict=True)
        ]
        if k < len(weights) - 1:
            h = [activation(v) for v in h]
    return h


def single(value: float) -> Any:
    """A constant of the program: float32."""
    return mpmath.mpf(float(np.float32(value)))


def gelu_tanh(v: Any) -> Any:
    inner = single(math.sqrt(2 / math.pi)) * (v + single(0.044715) * v**3)
    return v * (1 + mpmath.tanh(inner)) / 2


SMOOTH: dict[str, tuple[Any, Any]] = {
    "tanh": (jnp.tanh, mpmath.tanh),
    "gelu_exact": (
        lambda v: jax.nn.gelu(v, approximate=False),
        lambda v: v / 2 * mpmath.erfc(-v * single(math.sqrt(0.5))),
    ),
    "gelu_tanh": (lambda v: jax.nn.gelu(v, approximate=True), gelu_tanh),
    "silu": (jax.nn.silu, lambda v: v / (1 + mpmath.exp(-v))),
    "softplus": (jax.nn.softplus, lambda v: mpmath.log(1 + mpmath.exp(v))),
    "leaky_relu": (jax.nn.leaky_relu, lambda v: v if v >= 0 else single(0.01) * v),
    "elu": (jax.nn.elu, lambda v: v if v > 0 else mpmath.expm1(v)),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_smooth_logits_hold_in_60_digits(name: str) -> None:
    program, formula = SMOOTH[name]
    form, weights, biases = chain(np.random.default_rng(len(name)), (5, 7, 6, 3), program)
    x = np.random.default_rng(2).normal(size=(12, 5)) * np.array([1.0, 8.0])[np.arange(12) % 2, None]
    z, error = forward.logits(form, x)
    with mpmath.workdps(60):
        for k in range(12):
            exact = transcendental(formula, weights, biases, x[k])
            gap = mpmath.sqrt(
                mpmath.fsum([(mpmath.mpf(float(a)) - b) ** 2 for a, b in zip(z[k], exact, strict=True)])
            )
            assert gap <= mpmath.mpf(float(error[k]))
            assert gap > 0, "exact by chance: this point shows nothing"
    assert (error <= 1e-10 * (1 + np.abs(z).max(axis=1))).all(), "the bound is so wide that it shows nothing"


@pytest.mark.parametrize("name", ["group_sort", "max_pool_overlapping", "u_net", "dense_net", "reshuffle"])
def test_logits_of_the_zoo_agree_with_jax_in_float64(name: str) -> None:
    """Another evaluation in float64 lies within the error, up to its own rounding."""
    form = form_of(name)
    x = np.random.default_rng(0).normal(size=(8, *form.in_shape))
    z, error = forward.logits(form, x)
    with jax.enable_x64(True):
        other = np.asarray(jax.jit(jax.vmap(lambda v: form.evaluate(v, jnp.float64)))(jnp.asarray(x)))
    assert (np.linalg.norm(z - other, axis=1) <= 2 * error + 1e-15).all()
    assert (error > 0).all() and (error <= 1e-11 * (1 + np.abs(z).max(axis=1))).all()


def test_examples_in_chunks_and_together_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    form, *_ = chain(np.random.default_rng(0), (5, 8, 4))
    x = np.random.default_rng(1).normal(size=(11, 5))
    z, error = forward.logits(form, x)
    monkeypatch.setattr(forward, "_CHUNK", 16)  # two examples at a time
    chunked, errors = forward.logits(form, x)
    assert chunked == pytest.approx(z, rel=1e-14, abs=1e-14) and errors == pytest.approx(error, rel=1e-9)


def test_large_blocks_are_carried_by_a_cheaper_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    form, weights, biases = chain(np.random.default_rng(0), (5, 8, 8, 4))
    x = np.random.default_rng(1).normal(size=(5, 5))
    _, tight = forward.logits(form, x)
    monkeypatch.setattr(recursion, "DENSE_LIMIT", 4)
    product_rounding._CARRIED.clear()  # the norms of a form are kept
    z, error = forward.logits(form, x)
    assert (error >= tight).all() and (error > tight).any()
    assert all(within(z[k], error[k], rational_relu(weights, biases, x[k])) for k in range(5))


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
    form, x = far_away(1e6), np.array([[1.0]], np.float32)
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

    monkeypatch.setattr(
        Around, "_outputs", lambda self, rows, eps, labels, call: np.full((len(eps), 1, 2, 2), broken)
    )
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
