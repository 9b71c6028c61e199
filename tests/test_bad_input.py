"""Bad input gets a plain error or the one defined answer: never NaN, never a bound that means nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo_core import gauss, mlp

import lipbounds as lb

VERBS: list[Callable[..., Any]] = [lb.naive, lb.liplt]


@pytest.fixture(scope="module")
def form() -> Any:
    """Six inputs, four classes."""
    fn, x = mlp(np.random.default_rng(0), jax.nn.relu, jax.nn.relu)
    return lb.trace(fn, x)


# ------------------------------------------------------------------------------------------ weights
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_weights_that_are_not_finite(bad: float, where: int, rng: np.random.Generator) -> None:
    weights = [np.array(gauss(rng, 8, 6)), np.array(gauss(rng, 4, 8))]
    weights[where][1, 2] = bad
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        lb.from_weights(weights, activation="relu")
    w0, w1 = (jnp.asarray(w) for w in weights)
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        lb.liplt(lb.trace(lambda x: w1 @ jnp.tanh(w0 @ x), jnp.zeros(6)))


def test_a_nan_weight_behind_a_dead_relu_is_not_hidden() -> None:
    """nan_to_num hides a NaN from every evaluation: the weights themselves are looked at."""
    w = jnp.ones((3, 3)).at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"(?i)nan|finite"):
        lb.liplt(lb.trace(lambda x: jnp.nan_to_num(w @ x), jnp.ones(3)))


@pytest.mark.parametrize(
    "weights",
    [
        [],
        [np.ones(3, np.float32)],
        [np.ones((4, 3), np.float32), np.ones((2, 5), np.float32)],
        [np.ones((4, 3), np.complex64)],
        [np.full((4, 3), "a")],
        ["not a matrix"],
        [np.ones((0, 3), np.float32)],
    ],
    ids=["none", "vector", "mismatch", "complex", "strings", "str", "no outputs"],
)
def test_from_weights_refuses_what_is_not_a_chain(weights: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        lb.from_weights(weights, activation="relu")


def test_from_weights_refuses_wrong_biases_and_activations() -> None:
    w = [np.ones((4, 3), np.float32), np.ones((2, 4), np.float32)]
    with pytest.raises((ValueError, TypeError)):
        lb.from_weights(w, biases=[np.ones(4, np.float32)], activation="relu")
    with pytest.raises((ValueError, TypeError)):
        lb.from_weights(w, biases=[np.ones(5, np.float32), np.ones(2, np.float32)], activation="relu")
    with pytest.raises(ValueError, match="no_such_activation"):
        lb.from_weights(w, activation="no_such_activation")


def test_huge_weights_overflow_into_an_error_or_a_finite_bound() -> None:
    w = jnp.full((3, 3), 1e30)
    with pytest.raises((ValueError, OverflowError)):
        value = lb.liplt(lb.trace(lambda x: w @ jnp.tanh(w @ jnp.tanh(w @ x)), jnp.zeros(3))).value
        assert math.isfinite(value) and value >= 0.9e91
        raise ValueError("a finite bound is fine too")


# ------------------------------------------------------------------------------- what can be traced
@pytest.mark.parametrize("fn", [None, 3, "model", np.ones((3, 3)), [jnp.tanh]])
def test_not_a_function(fn: Any) -> None:
    with pytest.raises(TypeError, match=r"(?i)function|call"):
        lb.trace(fn, jnp.ones(3))


@pytest.mark.parametrize("x", ["image", None, [1.0, 2.0], {"x": jnp.ones(3)}, object()])
def test_not_an_array(x: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"(?i)array|ShapeDtypeStruct"):
        lb.trace(lambda x: x, x)


@pytest.mark.parametrize("x", [jnp.ones(3, jnp.int32), np.ones(3, np.int64), jnp.ones(3, bool)])
def test_integer_input(x: Any) -> None:
    with pytest.raises(ValueError, match=r"(?i)float"):
        lb.trace(lambda x: x * 2, x)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.reshape(2, 2),
        lambda x: (x, x),
        lambda x: {"logits": x},
        lambda x: None,
        lambda x: "label",
        lambda x: x[:0],
    ],
    ids=["matrix", "tuple", "dict", "none", "str", "empty"],
)
def test_output_is_not_a_vector(fn: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        lb.trace(fn, jnp.ones(4))


def test_integer_output() -> None:
    with pytest.raises((ValueError, TypeError)):
        lb.trace(lambda x: jnp.argsort(x), jnp.ones(4))


def test_errors_of_the_users_function_pass_through() -> None:
    with pytest.raises(ZeroDivisionError):
        lb.trace(lambda x: x * (1 // 0), jnp.ones(4))


def test_wrong_example_shape_is_the_users_own_error() -> None:
    w = jnp.ones((3, 4))
    with pytest.raises((TypeError, ValueError), match="shape"):
        lb.trace(lambda x: w @ x, jnp.ones(5))


def test_a_function_that_is_not_pure() -> None:
    """The trace sees one function, evaluation another: the check against the function finds it."""
    count = 0

    def fn(x: jax.Array) -> jax.Array:
        nonlocal count
        count += 1
        return x * float(count)

    with pytest.raises((ValueError, RuntimeError), match="pure|agree"):
        lb.trace(fn, jnp.ones(3))


# ------------------------------------------------------------------------------------------ batches
def test_batched_needs_a_batch_axis() -> None:
    with pytest.raises(ValueError, match="batch"):
        lb.trace(lambda x: x, jnp.asarray(1.0), batched=True)
    with pytest.raises(ValueError):
        lb.trace(lambda x: jnp.sum(x, axis=0), jnp.ones((4, 3)), batched=True)
    with pytest.raises(ValueError):
        lb.trace(lambda x: x[:2], jnp.ones((4, 3)), batched=True)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x - x.mean(axis=0),
        lambda x: x[::-1],
        lambda x: x + 1e-3 * jnp.roll(x, 1, axis=0),
        lambda x: jnp.tanh(jnp.cumsum(x, axis=0)),
        lambda x: x + jnp.concatenate([x[1:], x[-1:]]),
        lambda x: x + jnp.concatenate([jnp.zeros((1, 3)), x[:-1]]),
        lambda x: x + (x[2:3] if x.shape[0] > 2 else 0.0),
    ],
    ids=["mean", "reversed", "rolled", "cumsum", "next row", "row before", "third row"],
)
def test_rows_that_see_each_other_are_refused(fn: Any) -> None:
    with pytest.raises(ValueError, match=r"(?i)row|batch|example"):
        lb.trace(fn, jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32), batched=True)


def test_a_batch_of_one_cannot_hide_dependence_between_rows() -> None:
    """x - mean(x) over a batch of one is 0, with bound 0: nothing true about the model."""
    with pytest.raises(ValueError, match=r"(?i)row|batch|example"):
        lb.trace(lambda x: x - x.mean(axis=0, keepdims=True), jnp.ones((1, 3)), batched=True)


def test_batched_bound_is_that_of_one_example(rng: np.random.Generator) -> None:
    w = gauss(rng, 6, 4)
    form = lb.trace(lambda x: jnp.tanh(x @ w), jnp.ones((5, 6)), batched=True)
    assert tuple(form.in_shape) == (6,) and form.num_outputs == 4
    assert math.isclose(
        lb.liplt(form).value, float(np.linalg.norm(np.asarray(w, np.float64), 2)), rel_tol=1e-6
    )


# ------------------------------------------------------------------------------- arguments of verbs
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("norm", [3, 0, -1, "two", None, math.nan, 1.5, (2,), True])
def test_unknown_norm(verb: Callable[..., Any], norm: Any, form: Any) -> None:
    with pytest.raises(ValueError, match="norm"):
        verb(form, norm=norm)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("guarantee", ["foo", None, "Verified", "assumed"])
def test_unknown_guarantee(verb: Callable[..., Any], guarantee: Any, form: Any) -> None:
    with pytest.raises(ValueError, match="guarantee"):
        verb(form, guarantee=guarantee)


@pytest.mark.parametrize("scaling", ["foo", 3, True])
def test_unknown_scaling(scaling: Any, form: Any) -> None:
    with pytest.raises(ValueError, match="scaling"):
        lb.liplt(form, scaling=scaling)


@pytest.mark.parametrize("verb", VERBS)
def test_a_function_instead_of_a_form(verb: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="trace"):
        verb(lambda x: x)


def test_form_at_a_point_of_the_wrong_shape(form: Any) -> None:
    for x in (jnp.ones(5), jnp.ones((2, 6)), jnp.asarray(1.0)):
        with pytest.raises((ValueError, TypeError), match="shape"):
            form(x)


# --------------------------------------------------------------------------------- certified radius
@pytest.mark.parametrize("shape", [(6,), (3, 5), (3, 6, 1), (3, 7)])
def test_points_of_the_wrong_shape(shape: tuple[int, ...], form: Any) -> None:
    with pytest.raises(ValueError, match="shape"):
        lb.certified_radius(form, np.zeros(shape, np.float32), np.zeros(shape[0], int))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_points_that_are_not_finite(value: float, form: Any) -> None:
    X = np.zeros((3, 6), np.float32)
    X[1, 1] = value
    with pytest.raises(ValueError, match=r"(?i)nan|inf|finite"):
        lb.certified_radius(form, X, np.zeros(3, int))


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 1, 4]),
        np.array([-1, 0, 1]),
        np.array([0.5, 1.0, 2.0]),
        np.array([0.0, 1.0, 2.0]),
        np.array([True, False, True]),
        np.array(["0", "1", "2"]),
        np.array([0, 1]),
        np.array([[0], [1], [2]]),
        np.eye(4)[:3],
        np.array([0, np.nan, 1]),
    ],
    ids=["too large", "negative", "half", "float", "bool", "str", "too few", "column", "one-hot", "nan"],
)
def test_labels_that_are_no_classes(labels: np.ndarray, form: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?i)label|class|\by\b"):
        lb.certified_radius(form, np.zeros((3, 6), np.float32), labels)


def test_an_empty_batch_has_empty_radii(form: Any) -> None:
    radii = lb.certified_radius(form, np.zeros((0, 6), np.float32), np.zeros(0, int))
    assert radii.radius.shape == (0,) and radii.certified(0.1).shape == (0,)


def test_a_tie_has_radius_zero() -> None:
    form = lb.trace(lambda x: jnp.stack([x[0], x[1], x[1]]), jnp.ones(2))
    X = np.array([[1.0, 1.0], [0.0, 1.0], [2.0, 1.0], [0.0, 0.0]], np.float32)
    radius = lb.certified_radius(form, X, np.array([0, 1, 0, 2])).radius
    assert radius[0] == radius[1] == radius[3] == 0.0, (
        "classes 1 and 2 always tie, and at the first point 0 ties too"
    )
    # z_0 - z_1 = 1 there and L = sqrt(2): the radius is 1/sqrt(2)
    assert radius[2] == pytest.approx(1 / math.sqrt(2), rel=1e-5) and radius[2] <= 1 / math.sqrt(2)


def test_wrongly_classified_points_have_radius_zero(form: Any, rng: np.random.Generator) -> None:
    X = rng.normal(size=(40, 6)).astype(np.float32)
    logits = np.stack([np.asarray(form(jnp.asarray(x))) for x in X])
    radii = lb.certified_radius(form, X, (logits.argmax(axis=1) + 1) % 4)
    assert (radii.radius == 0).all() and not radii.certified(0.0).any() and radii.accuracy(0.0) == 0.0
    right = lb.certified_radius(form, X, logits.argmax(axis=1))
    assert (right.radius > 0).all() and right.accuracy(0.0) == 1.0


def test_radii_hold_and_are_strict(form: Any, rng: np.random.Generator) -> None:
    """No point closer than the radius changes the class (random directions and towards the runner-up)."""
    X = rng.normal(size=(30, 6)).astype(np.float32)
    f = jax.jit(jax.vmap(form))
    y = np.asarray(f(jnp.asarray(X))).argmax(axis=1)
    bound = lb.liplt(form, pairwise=True)
    radii = lb.certified_radius(form, X, y, bound=bound)
    jac = np.asarray(jax.vmap(jax.jacrev(form))(jnp.asarray(X)), np.float64)
    for k in range(4):
        toward = jac[:, k] - jac[np.arange(30), y]
        for d in (toward, rng.normal(size=toward.shape)):
            length = np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-12)
            moved = X + 0.999 * radii.radius[:, None] * d / length
            assert (np.asarray(f(jnp.asarray(moved, jnp.float32))).argmax(axis=1) == y).all()
    r = float(np.median(radii.radius))
    assert np.array_equal(radii.certified(r), radii.radius > r)
    assert not radii.certified(float(radii.radius.max())).any()
    loose = lb.certified_radius(form, X, y, bound=lb.liplt(form))
    assert (loose.radius <= radii.radius * (1 + 1e-9)).all(), "sqrt(2) L cannot beat the pair constants"
    assert loose.notes, "radii from sqrt(2) L say so"


def test_a_constant_network_has_bound_zero_and_infinite_radius() -> None:
    bias = jnp.array([0.0, 3.0, 1.0])
    form = lb.trace(lambda x: jnp.zeros((3, 4)) @ jax.nn.relu(x) + bias, jnp.ones(4))
    for verb in VERBS:
        bound = verb(form, pairwise=True)
        assert bound.value == 0.0 and not bound.pairwise.any()
    radii = lb.certified_radius(form, np.ones((2, 4), np.float32), np.array([1, 0]))
    assert radii.radius[0] == math.inf and radii.radius[1] == 0.0
    assert lb.liplt(form, scaling="optimized").value == 0.0


def test_a_function_that_ignores_its_input() -> None:
    form = lb.trace(lambda x: jnp.array([1.0, 2.0]), jnp.ones(4))
    for verb in VERBS:
        for norm in (1, 2, math.inf):
            assert verb(form, norm=norm, pairwise=True).value == 0.0


def test_one_output_has_no_pairs() -> None:
    form = lb.trace(lambda x: jnp.sum(jnp.tanh(x))[None], jnp.ones(4))
    for verb in VERBS:
        bound = verb(form, pairwise=True)
        assert bound.pairwise.shape == (1, 1) and bound.worst_pair is None
        assert bound.value == pytest.approx(2.0, rel=1e-6)
    radii = lb.certified_radius(form, np.ones((2, 4), np.float32), np.array([1, 0]))  # the sign decides
    assert radii.radius == pytest.approx([2 * np.tanh(1.0), 0.0], rel=1e-5)
    with pytest.raises(ValueError, match="labels"):
        lb.certified_radius(form, np.ones((1, 4), np.float32), np.array([2]))


def test_a_bound_of_another_network_is_refused(form: Any) -> None:
    other = lb.liplt(lb.trace(lambda x: x, jnp.ones(3)), pairwise=True)
    with pytest.raises(ValueError):
        lb.certified_radius(form, np.zeros((2, 6), np.float32), np.array([0, 1]), bound=other)


@pytest.mark.slow
def test_only_upper_bounds_certify(form: Any) -> None:
    X, y = np.zeros((2, 6), np.float32), np.array([0, 1])
    for wrong in (lb.empirical(form), lb.liplt(form, guarantee="estimate"), 3.0, "liplt"):
        with pytest.raises((TypeError, ValueError)):
            lb.certified_radius(form, X, y, bound=wrong)


# --------------------------------------------------------------------------- the results themselves
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_results_hold_finite_numbers_only(value: float) -> None:
    with pytest.raises(ValueError):
        lb.UpperBound(value, 2, "verified", "test", 0.0)
    with pytest.raises(ValueError):
        lb.LowerBound(value, 2, "test", 0.0)


@pytest.mark.slow
def test_the_three_kinds_do_not_mix(form: Any) -> None:
    upper, lower, guess = lb.liplt(form), lb.empirical(form), lb.liplt(form, guarantee="estimate")
    assert len({type(upper), type(lower), type(guess)}) == 3
    assert not isinstance(guess, lb.UpperBound) and not isinstance(lower, lb.UpperBound)
    for a, b in [(upper, lower), (upper, guess), (lower, guess)]:
        with pytest.raises(TypeError):
            _ = a < b
    assert lower.value <= upper.value


# ------------------------------------------------------------------------------------------ tracers
@pytest.mark.parametrize("verb", VERBS)
def test_public_verbs_on_tracers_name_the_core(verb: Callable[..., Any]) -> None:
    @jax.jit
    def bound(w: jax.Array) -> jax.Array:
        return jnp.asarray(verb(lb.trace(lambda x: jnp.tanh(w @ x), jnp.ones(3))).value)

    with pytest.raises((TypeError, ValueError), match="core"):
        bound(jnp.eye(3))


# ------------------------------------------------------------------------------------------ seeds, pairs, boxes, slopes
@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "0", None, True], ids=repr)
def test_seeds(form: Any, seed: Any) -> None:
    x, y = np.zeros((1, 6)), np.zeros(1, int)
    calls = [*((verb, form) for verb in (lb.naive, lb.liplt, lb.lipsdp, lb.compare))]
    calls += [(lb.local, form, x, 0.1), (lb.certified_radius, form, x, y), (lb.empirical, form, x)]
    for verb, *given in calls:
        with pytest.raises(ValueError, match="seed must be a whole number >= 0 and below 2\\^63, got"):
            verb(*given, seed=seed)


def test_a_seed_of_numpy(form: Any) -> None:
    assert lb.naive(form, seed=np.int64(3)).value == lb.naive(form, seed=3).value


@pytest.mark.parametrize("pairwise", ["no", 1, None, [True]], ids=repr)
@pytest.mark.parametrize("verb", [lb.naive, lb.liplt, lb.lipsdp, lb.compare, lb.empirical])
def test_pairwise_is_yes_or_no(form: Any, verb: Any, pairwise: Any) -> None:
    given = (np.zeros((1, 6)),) if verb is lb.empirical else ()
    with pytest.raises(ValueError, match="pairwise must be True or False, got"):
        verb(form, *given, pairwise=pairwise)


@pytest.mark.parametrize("box", [(0, 1, 2), 1, ("a", "b"), (1, 0), (0, math.nan)], ids=repr)
def test_boxes_are_looked_at_when_they_are_given(box: Any) -> None:
    with pytest.raises(ValueError, match=r"box must be \(lower, upper\)"):
        lb.Local(box=box)


@pytest.mark.parametrize("slopes", [(1, 0), (np.array([0.0, 1.0]), 0.5)], ids=str)
def test_slopes_in_the_wrong_order(slopes: Any) -> None:
    with pytest.raises(ValueError, match=r"slopes\[0\] must be \(lower, upper\) with lower <= upper"):
        lb.from_weights([np.eye(2), np.eye(2)], slopes=[slopes])
