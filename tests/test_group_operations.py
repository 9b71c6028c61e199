"""Operations over groups of entries beyond max, min and sort: exact constants, refusals, and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import lipbounds as lb
from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.program import Tap
from lipbounds._form.steps import StaticArray
from lipbounds._local.forward import logits
from lipbounds._local.liplt import _Groups
from lipbounds._tracing import rewrites

Fn = Callable[[jax.Array], jax.Array]
X6 = jnp.linspace(-1.0, 1.5, 6)


def values64(form: Any, points: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(jax.vmap(lambda p: form.evaluate(p, jnp.float64))(jnp.asarray(points)))


@pytest.mark.slow
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "fn",
    [
        lax.cummax,
        lambda x: lax.cummin(x, reverse=True),
        jnp.maximum.accumulate,
        jnp.minimum.accumulate,
    ],
)
@pytest.mark.parametrize("norm, truth", [(2, math.sqrt(6)), (1, 6), (math.inf, 1)])
def test_running_extremes_have_their_exact_constant(fn: Fn, norm: float, truth: float) -> None:
    """All six outputs follow one input that rises above the others from the start: sqrt(n), n and 1 are attained."""
    form = lb.trace(fn, X6)
    bound = lb.liplt(form, norm=norm)
    assert bound.guarantee == "verified"
    assert truth * (1 - 1e-12) <= bound.value <= truth * (1 + 1e-6)
    first = np.array([[9.0, 0, 0, 0, 0, 0], [10.0, 0, 0, 0, 0, 0]])
    (tap,) = form.taps
    for points in (first, -first, first[:, ::-1], -first[:, ::-1]):
        change = np.abs(np.diff(values64(form, points), axis=0)[0])
        if change.all():
            break
    attained = change.sum() if norm == 1 else change.max() if norm == math.inf else np.linalg.norm(change)
    assert abs(attained - truth) < 1e-9
    assert tap.kind in ("max", "min")


def test_long_running_extremes_need_no_table_of_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.sin(jnp.arange(11.0)).reshape(1, 11)
    short = lb.trace(lambda x: lax.cummax(x, axis=1)[0], x)
    monkeypatch.setattr(rewrites, "_PREFIX_ENTRIES", 100)
    form = lb.trace(lambda x: lax.cummax(x, axis=1)[0], x)
    assert len(form.taps) == 4 and all(tap.groups.array.shape == (11, 2) for tap in form.taps)
    assert np.array_equal(form(x), lax.cummax(x, axis=1)[0]) and np.array_equal(short(x), form(x))
    for norm, most in [(2, 4.0), (1, 16.0), (math.inf, 1.0)]:
        value = lb.liplt(form, norm=norm).value
        assert lb.liplt(short, norm=norm).value <= value * (1 + 1e-9) and value <= most * (1 + 1e-6)


SHIFTED = [
    lambda x: nn.logsumexp(x),
    lambda x: jax.scipy.special.logsumexp(x),
    lambda x: jnp.log(jnp.sum(jnp.exp(x))),
    lambda x: jnp.log(jnp.sum(jnp.exp(x - jnp.mean(x)))) + jnp.mean(x),
    lambda x: jnp.logaddexp.reduce(x),
    lambda x: jnp.squeeze(nn.logsumexp(x.reshape(2, 3), axis=(0, 1), keepdims=True)),
]


@pytest.mark.slow
@pytest.mark.sampled(10)
@pytest.mark.parametrize("fn", SHIFTED)
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_logsumexp_has_constant_one_in_every_norm(fn: Fn, norm: float) -> None:
    form = lb.trace(lambda x: fn(x)[None], X6)
    mean_is_live = sum(tap.kind == "logsumexp" for tap in form.taps)
    assert mean_is_live == 1 and len(form.taps) == 1, "the shift is gone"
    assert 1.0 <= lb.liplt(form, norm=norm).value <= 1 + 1e-9
    point = np.array([[0.0, 1, 2, 3, -1, 700.0], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    assert np.allclose(values64(form, point)[:, 0], np.logaddexp.reduce(point, axis=1), rtol=1e-14)


@pytest.mark.slow
def test_a_shift_that_does_not_cancel_stays() -> None:
    """log(sum(exp(x - c))) + d is not logsumexp(x) where d is another function of x."""
    x = jnp.asarray([0.3, -0.2, 0.9, 0.1]).reshape(2, 2)

    def other(x: jax.Array) -> jax.Array:
        c = jnp.max(x, axis=1, keepdims=True)
        return (jnp.log(jnp.sum(jnp.exp(x - c), axis=1)) + c[::-1, 0]).reshape(-1)

    def along_the_group(x: jax.Array) -> jax.Array:
        c = jnp.max(x, axis=0, keepdims=True)  # differs within the rows that are summed
        return jnp.log(jnp.sum(jnp.exp(x - c), axis=1)) + c[0]

    for fn in (other, along_the_group):
        form = lb.trace(fn, x)
        assert np.allclose(form(x), fn(x), atol=1e-6)
        assert np.allclose(form(3 - x), fn(3 - x), atol=1e-6)
        assert any(tap.kind == "max" for tap in form.taps)


def test_log_softmax_is_the_logits_minus_one_logsumexp() -> None:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    logits_only = lb.liplt(lb.trace(lambda x: w @ x, X6), pairwise=True)
    form = lb.trace(lambda x: nn.log_softmax(w @ x), X6)
    assert [tap.kind for tap in form.taps] == ["logsumexp"]
    bound = lb.liplt(form, pairwise=True)
    assert np.allclose(bound.pairwise, logits_only.pairwise, rtol=1e-6), (
        "differences of classes do not change"
    )


def test_logaddexp_of_two_branches_is_one_group() -> None:
    form = lb.trace(lambda x: jnp.logaddexp(x[:3], x[3:]), X6)
    assert [tap.kind for tap in form.taps] == ["logsumexp"]
    for norm in (1, 2, math.inf):
        assert 1.0 <= lb.liplt(form, norm=norm).value <= 1 + 1e-9
    with_max = lb.trace(
        lambda x: jnp.concatenate([jnp.logaddexp(x[:3], x[3:]), jnp.maximum(x[:3], x[3:])]), X6
    )
    assert sorted(tap.kind for tap in with_max.taps) == ["logsumexp", "max"], "not a sort of two"
    constant = lb.trace(lambda x: jnp.logaddexp(x, 1.5), X6)
    assert [tap.kind for tap in constant.taps] == ["elementwise"]


def test_logits_of_a_logsumexp_are_enclosed() -> None:
    """The proved error covers the exact value, computed with 50 digits."""
    mpmath = pytest.importorskip("mpmath")
    form = lb.trace(lambda x: nn.logsumexp(x.reshape(2, 3), axis=1), X6)
    x = np.array([[0.1, 0.2, 0.3, 800.0, 1e-3, 799.5], [-5.0, -40.0, 3.0, 1e4, 0.0, -1e4]])
    z, error = logits(form, x)
    with mpmath.workdps(50):
        for row, got, wrong in zip(x, z, error, strict=True):
            exact = [mpmath.log(sum(mpmath.exp(mpmath.mpf(v)) for v in part)) for part in row.reshape(2, 3)]
            gap = mpmath.sqrt(sum((mpmath.mpf(float(g)) - e) ** 2 for g, e in zip(got, exact, strict=True)))
            assert gap <= wrong < 1e-10


@pytest.mark.sampled(3)
@pytest.mark.slow
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: nn.logsumexp(x.reshape(3, 5), axis=1),
        lambda x: lax.cummax(x.reshape(3, 5), axis=0).reshape(-1),
        lambda x: lax.cummin(x),
        lambda x: lax.top_k(x.reshape(3, 5), 2)[0].reshape(-1),
        lambda x: jnp.quantile(x.reshape(3, 5), jnp.array([0.2, 0.7]), axis=1).reshape(-1),
        lambda x: x.at[jnp.array([0, 0, 4, 40])].min(2 * x[1:5]),
    ],
)
def test_the_elementwise_view_is_the_same_function(fn: Fn) -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=15), jnp.float32)
    form = lb.trace(fn, x)
    view = elementwise_view(form)
    assert all(tap.kind == "elementwise" for tap in view.taps)
    points = 3 * np.random.default_rng(2).normal(size=(5, 15))
    assert np.allclose(values64(view, points), values64(form, points), rtol=1e-12, atol=1e-12)
    assert np.allclose(form(x), fn(x), atol=1e-5)


METHODS = ["linear", "lower", "higher", "nearest", "midpoint"]


@pytest.mark.parametrize("method", METHODS)
def test_quantiles_are_sorted_entries(method: str) -> None:
    form = lb.trace(lambda x: jnp.quantile(x, 0.3, keepdims=True, method=method), X6)
    assert {tap.kind for tap in form.taps} == {"sort"}
    assert lb.liplt(form).value <= 1 + 1e-6
    assert np.isclose(form(X6)[0], jnp.quantile(X6, 0.3, method=method), atol=1e-6)


def test_factors_multiply_exactly_once_per_landing() -> None:
    form = lb.trace(lambda x: x.at[jnp.array([0, 0, 3, 99])].multiply(jnp.array([3.0, 5.0, -2.0, 1e3])), X6)
    assert not form.taps
    assert 15.0 <= lb.liplt(form).value <= 15.0 * (1 + 1e-9)
    swapped = lb.trace(lambda x: jnp.arange(6.0).at[jnp.array([2, 4])].multiply(x[:2]), X6)
    assert 4.0 <= lb.liplt(swapped).value <= 4.0 * (1 + 1e-9)


def test_extremes_at_indices_hold_for_every_update() -> None:
    form = lb.trace(lambda x: x[:2].at[jnp.array([1, 1, 1, 7])].max(x[2:]), X6)
    (tap,) = form.taps
    assert tap.groups.array.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert 1.0 <= lb.liplt(form).value <= 1 + 1e-9
    assert np.array_equal(form(X6), [-1.0, 1.0])


_RNG = np.random.default_rng(5)
_B = _RNG.uniform(0.1, 5.0, (3, 6)).astype(np.float32)
_MASKED = np.where(_RNG.uniform(size=_B.shape) < 0.5, np.float32(0), _B) + np.eye(3, 6, dtype=np.float32)
_W = _RNG.normal(size=(6, 6)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: nn.logsumexp(x, b=7.0)[None],
        lambda x: nn.logsumexp(jnp.broadcast_to(x, (3, 6)), axis=1, b=_B),
        lambda x: nn.logsumexp(
            jnp.broadcast_to(_W @ x, (3, 6)), axis=1, b=_MASKED
        ),  # rows of different lengths
        lambda x: nn.logsumexp(jnp.broadcast_to(x, (3, 6)), axis=1, b=_MASKED, return_sign=True)[0],
        lambda x: nn.logsumexp(_W @ x, b=_B[0], keepdims=True),
        lambda x: jnp.log((_MASKED * jnp.exp(x)).sum(1)),
        lambda x: jnp.log(3 * jnp.exp(_W @ x).reshape(2, 3).sum(0)),
    ],
)
def test_constant_weights_of_a_logsumexp(fn: Fn) -> None:
    """logsumexp(x, b) = logsumexp(x + log b), to more digits than float32 has; entries of weight 0 drop out."""
    form = lb.trace(fn, X6)
    whole = lb.liplt(form).value
    points = 3 * np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    near = lb.local(form, points, 0.01).value
    for x, bound in zip(points, near, strict=True):
        assert np.allclose(form(x), fn(x), atol=1e-5)
        slope = float(np.linalg.norm(jax.jacobian(fn)(x), 2))
        assert slope * (1 - 1e-5) <= bound <= whole * (1 + 1e-9)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        exact = fn(points[0].astype(np.float64))
        assert np.allclose(form(points[0].astype(np.float64)), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("b", ["x", "negative", "zero"])
def test_other_weights_of_a_logsumexp_are_one_entry(b: str) -> None:
    weights = {"x": None, "negative": np.arange(-2.0, 4.0), "zero": np.zeros(6)}[b]
    with pytest.raises(lb.UnsupportedError, match="weighted or masked sum") as caught:
        lb.trace(lambda x: nn.logsumexp(x, b=x if weights is None else weights)[None], X6)
    assert str(caught.value).count("why:") == 1 and "constant weights b >= 0" in str(caught.value)


@pytest.mark.parametrize(
    "fn, word",
    [
        (lambda x: x.at[jnp.array([0, 1])].multiply(x[:2]), "product of two tensors"),
        (lambda x: jnp.ones(3).at[jnp.array([1, 1])].multiply(x[:2]), "product of two tensors"),
        (lambda x: x.at[jnp.argmax(x)].max(0.0), "index depends on x"),
        (lambda x: x.at[jnp.array([0, 0])].max(x[1:3], unique_indices=True), "an index occurs twice"),
        (lambda x: lax.top_k(x, 2)[1].astype(jnp.float32), "index depends on x"),
        (lax.cumlogsumexp, "logsumexp of every prefix"),
        (lambda x: nn.logsumexp(x, b=jnp.arange(-2.0, 4.0))[None], "weighted or masked sum of exponentials"),
        (lambda x: nn.logsumexp(x, b=x)[None], "log"),
        (lambda x: jnp.where(jnp.any(jnp.isnan(jnp.exp(x))), 0.0, x), "slope is unbounded"),
        (nn.softmax, "div"),
    ],
)
def test_what_stays_refused(fn: Fn, word: str) -> None:
    with pytest.raises(lb.UnsupportedError, match=word):
        lb.trace(fn, X6)


def test_a_guard_against_nan_is_an_identity_of_finite_numbers() -> None:
    form = lb.trace(lambda x: jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, 2 * x), X6)
    assert not form.taps and 2.0 <= lb.liplt(form).value <= 2 * (1 + 1e-9)


def test_there_are_no_other_kinds_of_taps() -> None:
    with pytest.raises(ValueError, match="no kind of tap called 'median'"):
        Tap("median", "", "", (0,), (1,), ((1,),), 3, 1)


def test_householder_is_tight_in_l2_and_honest_elsewhere() -> None:
    v = jnp.full(4, 0.5)
    form = lb.trace(lambda x: x + 2 * v * nn.relu(-(v @ x)), jnp.ones(4))
    bound = lb.lipsdp(form)
    assert 1.0 <= bound.value <= 1 + 1e-6
    for norm in (1, math.inf):
        # below the plane it is the reflection I - 2 v v', whose entries are 1/2 and -1/2
        assert 2.0 * (1 - 1e-9) <= lb.liplt(form, norm=norm).value
        below = np.array([[-1.0, -1, -1, -1], [-1.0, -1, -1, -1]])
        below[1] += 0.1 * (np.eye(4)[0] if norm == 1 else np.array([1, -1, -1, -1.0]))
        change = np.diff(values64(form, below), axis=0)[0]
        top = np.abs(change).sum() / 0.1 if norm == 1 else np.abs(change).max() / 0.1
        assert abs(top - 2.0) < 1e-9


@pytest.mark.parametrize("spread", [1e-3, 1.0, 40.0, 2000.0])
def test_softmax_weights_in_a_ball(spread: float) -> None:
    """What local LipLT says of a logsumexp holds for pairs of points: dv = C dy + q within its bounds."""
    table = np.array([[0, 1, 2, 3], [3, 4, 5, 6], [0, 2, 2, 7], [8, 8, 8, 8]])
    fields = {"groups": StaticArray(table), "level": 0}
    tap = Tap("logsumexp", "", "", (0,), (1,), ((4,),), 9, 4, **fields)
    rng = np.random.default_rng(0)
    y = rng.normal(size=(6, 9)) * np.array([0.1, 1, 10, 100, 1000, 0])[:, None]
    half = spread * rng.random((6, 9))
    near = _Groups(tap).near(y, half, 2 * half)
    for _ in range(300):
        ends = y[:, None] + half[:, None] * rng.choice([-1.0, 1.0, 0.3], size=(6, 2, 9))
        dy = ends[:, 0] - ends[:, 1]
        v = np.logaddexp.reduce(ends[:, :, table], axis=3)
        dv = v[:, 0] - v[:, 1]
        q = dv - (near.linear["share"] * dy[:, table]).sum(axis=2)
        slack = 1e-12 * (np.abs(y).max(axis=1) + spread)
        size = np.linalg.norm(near.passes * dy, axis=1)
        assert (np.linalg.norm(dv, axis=1) <= near.gain * size * (1 + 1e-9) + slack).all()
        assert (np.abs(dv) <= near.reach * (1 + 1e-9) + slack[:, None]).all()
        assert (np.abs(q) <= near.entries * (1 + 1e-9) + slack[:, None]).all()
        assert (np.abs(q) <= near.weights * size[:, None] * (1 + 1e-9) + slack[:, None]).all()


def test_a_softmax_weight_that_seems_certain_is_not() -> None:
    """With y0 in [-30, 30] and y1 in [-68, -8] the first weight may be 1 + 3e-17 rounded, and 3e-10."""
    tap = Tap("logsumexp", "", "", (0,), (1,), ((1,),), 2, 1, groups=StaticArray(np.array([[0, 1]])))
    y = np.array([[0.0, -38.0]])
    near = _Groups(tap).near(y, np.full((1, 2), 30.0), np.full((1, 2), 60.0))
    a, b = np.array([-21.0, -17.0]), np.array([-20.0, -17.0])
    q = np.logaddexp(*b) - np.logaddexp(*a) - near.linear["share"][0, 0] @ (b - a)
    assert abs(q) > 0.1
    assert abs(q) <= near.weights[0, 0] * np.linalg.norm(near.passes[0] * (b - a))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.stack([nn.logsumexp(x) - x[0], x[1]]),
        lambda x: -nn.logsumexp(-x)[None],
        lambda x: nn.logsumexp(x, return_sign=True)[0][None],
    ],
)
def test_a_single_number_keeps_its_shape(fn: Fn) -> None:
    form = lb.trace(fn, X6)
    assert [tap.kind for tap in form.taps] == ["logsumexp"] and np.allclose(form(X6), fn(X6), atol=1e-6)


@pytest.mark.parametrize("width", [2, 3, 6])
def test_group_sort_of_any_width_is_a_group(width: int) -> None:
    form = lb.trace(lambda x: jnp.sort(x.reshape(-1, width), axis=1).reshape(6), X6)
    assert [tap.kind for tap in form.taps] == ["sort"]
    for norm in (1, 2, math.inf):
        assert 1.0 <= lb.liplt(form, norm=norm).value <= 1 + 1e-9


# --- layers without neurons ----------------------------------------------------------------------------------------


def through_nothing(x: jax.Array) -> jax.Array:
    return jnp.ones((3, 0)) @ nn.relu(jnp.ones((0, 4)) @ nn.relu(jnp.ones((4, 6)) @ x)) + jnp.arange(3.0)


def beside_nothing(x: jax.Array) -> jax.Array:
    h = jnp.sort((jnp.ones((0, 6)) @ x).reshape(0, 2), axis=1).reshape(-1)
    return jnp.concatenate([jnp.ones((2, 0)) @ h, nn.relu(2 * x[:1])])


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("fn, truth, label", [(through_nothing, 0.0, 2), (beside_nothing, 2.0, 2)])
def test_layers_of_no_neurons(fn: Fn, truth: float, label: int) -> None:
    form = lb.trace(fn, X6)
    x = np.ones((1, 6), np.float32)
    for bound in (
        lb.naive(form),
        lb.liplt(form, pairwise=True),
        lb.liplt(form, guarantee="estimate"),
        lb.lipsdp(form),
    ):
        assert truth <= bound.value * (1 + 1e-6) and bound.value <= truth * (1 + 1e-6)
    assert lb.local(form, x, 0.1).value[0] <= truth * (1 + 1e-6)
    for local in (False, True):
        radius = lb.certified_radius(form, x, [label], local=local).radius[0]
        assert radius == math.inf if truth == 0 else 0 < radius <= 1
    assert lb.empirical(form, x, steps=2).value <= truth
    if truth == 0:
        assert all(row.kind != "upper" or row.value == 0 for row in lb.compare(form).rows)


def test_weights_of_no_neurons() -> None:
    form = lb.from_weights([np.ones((0, 4), np.float32), np.ones((2, 0), np.float32)])
    assert lb.lipsdp(form).value == lb.local(form, np.ones((1, 4)), 0.5).value[0] == 0.0
