"""jnp.interp, jnp.piecewise, jnp.select and switches under vmap are elementwise functions, exact where continuous."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

import lipbounds as lb
from lipbounds._activations.activations import enclose, slope_range
from lipbounds._activations.slopes_on_intervals import anchored_slopes, pair_slopes

Fn = Callable[[Any], Any]
XP = np.array([-1.0, -0.25, 0.1, 2.0], np.float32)
FP = np.array([0.5, 1.0, -0.3, 0.7], np.float32)
SLOPES = [(Fraction(float(b)) - Fraction(float(a))) for a, b in pairwise(FP)]
SLOPES = [
    q / (Fraction(float(b)) - Fraction(float(a))) for q, (a, b) in zip(SLOPES, pairwise(XP), strict=True)
]


def line(x: Fraction, left: bool = False, right: bool = False) -> Fraction:
    """The interpolant in rational arithmetic."""
    points, values = [Fraction(float(t)) for t in XP], [Fraction(float(t)) for t in FP]
    if x < points[0] and not left:
        return values[0]
    if x > points[-1] and not right:
        return values[-1]
    k = min(max(sum(p <= x for p in points) - 1, 0), len(points) - 2)
    return values[k] + (x - points[k]) * SLOPES[k]


def only_tap(fn: Fn, n: int = 6) -> tuple[lb.LureForm, Any, list[Any]]:
    form = lb.trace(fn, jnp.zeros(n))
    assert len(form.taps) == 1
    (tap,) = form.taps
    consts = [c.array if hasattr(c, "array") else np.asarray(form.consts[c]) for c in tap.consts]
    return form, tap, consts


ENDS: list[tuple[dict[str, Any], bool, bool]] = [
    ({}, False, False),
    ({"left": "extrapolate"}, True, False),
    ({"left": "extrapolate", "right": "extrapolate"}, True, True),
    ({"left": 0.5, "right": FP[-1]}, False, False),
    ({"right": jnp.float32(0.7)}, False, False),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("options", "left", "right"), ENDS)
def test_interp_is_exact(options: dict[str, Any], left: bool, right: bool) -> None:
    form, tap, consts = only_tap(lambda x: jnp.interp(x, XP, FP, **options))
    slopes = SLOPES + ([] if left and right else [Fraction(0)])
    low, high = slope_range(tap.expr, consts)
    assert float(min(slopes)) * (1 + 1e-15) <= low <= min(slopes) and max(slopes) <= high <= max(slopes) * (
        1 + 1e-15
    )
    x = np.concatenate([np.linspace(-4, 5, 400), XP, np.nextafter(XP, 9), np.nextafter(XP, -9)])
    inner, outer = enclose(tap.expr, consts, x, x)
    truth = [line(Fraction(float(t)), left, right) for t in x]
    assert all(a <= t <= b for a, t, b in zip(inner, truth, outer, strict=True))
    assert np.max(outer - inner) < 1e-14
    wide = enclose(tap.expr, consts, x - 0.3, x + 0.2)
    for shift in (-0.3, -0.1, 0.0, 0.2):
        moved = [line(Fraction(float(t)), left, right) for t in x + shift]
        assert all(a - 1e-15 <= t <= b + 1e-15 for a, t, b in zip(wide[0], moved, wide[1], strict=True))
    x32 = x[: 6 * (len(x) // 6)].astype(np.float32).reshape(-1, 6)
    ours = jax.vmap(lambda v: form.evaluate(v))(x32)
    assert np.allclose(ours, jnp.interp(x32, XP, FP, **options), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_interp_of_interp_under_vmap_and_jit() -> None:
    one = lambda x: jnp.interp(x, XP, FP)  # noqa: E731
    for fn in (jax.vmap(one), jax.jit(one), lambda x: jax.vmap(one)(x.reshape(2, 3)).reshape(6)):
        assert lb.liplt(only_tap(fn)[0]).value == pytest.approx(float(max(map(abs, SLOPES))), rel=1e-6)
    _, tap, consts = only_tap(lambda x: one(0.5 * one(2.0 * x)))
    low, high = slope_range(tap.expr, consts)
    x = np.linspace(-3, 3, 60001)
    y = np.array([float(line(line(Fraction(t)) / 2)) for t in x])
    quotient = np.diff(y) / np.diff(x)
    assert low - 1e-6 <= quotient.min() <= low + 1e-3 and high - 1e-3 <= quotient.max() <= high + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_knots_wider_than_x(dtype: Any) -> None:
    """jax goes on in the dtype of the knots."""
    spec = jax.ShapeDtypeStruct((6,), dtype)
    with jax.numpy_dtype_promotion("standard"):
        form = lb.trace(lambda x: 2.0 * jnp.interp(x, XP, FP) + jnp.asarray(FP[0]), spec)
    assert lb.liplt(form).value == pytest.approx(2 * float(max(map(abs, SLOPES))), rel=1e-6)
    assert form.taps[0].expr.nodes[-1].params[:2] == (tuple(map(float, XP)), tuple(map(float, FP)))


def test_local_slopes_of_interp() -> None:
    _, tap, consts = only_tap(lambda x: jnp.interp(x, XP, FP), 1)
    known = tuple(np.broadcast_to(s, (1,)) for s in slope_range(tap.expr, consts))
    rng = np.random.default_rng(0)
    y = rng.uniform(-2, 3, size=(200, 1))
    lo, hi = y - rng.uniform(0, 1, size=y.shape), y + rng.uniform(0, 1, size=y.shape)
    pairs = pair_slopes(tap.expr, consts, lo, hi, known)
    anchored = anchored_slopes(tap.expr, consts, (y, y), lo, hi, known)
    f = np.vectorize(lambda t: float(line(Fraction(float(t)))))
    for t, s in rng.uniform(size=(40, 2)):
        u, v = lo + (hi - lo) * t, lo + (hi - lo) * s
        quotient = (f(u) - f(v)) / (u - v)
        assert np.all(pairs[0] - 1e-9 <= quotient) and np.all(quotient <= pairs[1] + 1e-9)
        quotient = (f(u) - f(y)) / (u - y)
        assert np.all(anchored[0] - 1e-9 <= quotient) and np.all(quotient <= anchored[1] + 1e-9)
    assert np.mean(pairs[1] - pairs[0]) < 0.8 * float(known[1][0] - known[0][0])


PIECEWISE: dict[str, tuple[Fn, Fn, float, float]] = {
    # fn, the same by NumPy, least and largest slope
    "piecewise": (
        lambda x: jnp.piecewise(x, [x < 0, x >= 1], [lambda t: -t, lambda t: t * t * t * 0 + 2 * t - 1]),
        lambda x: np.where(x < 0, -x, np.where(x >= 1, 2 * x - 1, 0.0)),
        0.0,
        0.0,
    ),
    "piecewise_default": (
        lambda x: jnp.piecewise(x, [x < 0, x >= 1], [lambda t: -t, lambda t: 2 * t - 1, lambda t: t]),
        lambda x: np.where(x < 0, -x, np.where(x >= 1, 2 * x - 1, x)),
        -1.0,
        2.0,
    ),
    "piecewise_overlap": (  # where several hold, the last counts
        lambda x: jnp.piecewise(x, [x > 0, x > 1, x > 2], [lambda t: t, lambda t: 3 * t - 2, 4.0, 0.0]),
        lambda x: np.where(x > 2, 4.0, np.where(x > 1, 3 * x - 2, np.where(x > 0, x, 0.0))),
        0.0,
        3.0,
    ),
    "select": (  # where several hold, the first counts
        lambda x: jnp.select([x < 0, x < 1, x < 2], [0.0 * x, x, 3 * x - 2], 4.0),
        lambda x: np.where(x < 0, 0.0, np.where(x < 1, x, np.where(x < 2, 3 * x - 2, 4.0))),
        0.0,
        3.0,
    ),
    "switch": (
        jax.vmap(
            lambda t: lax.switch(
                (t > 0).astype(int) + (t > 1).astype(int), [lambda t: -t, lambda t: 4 * t, lambda t: 3 + t], t
            )
        ),
        lambda x: np.where(x > 1, 3 + x, np.where(x > 0, 4 * x, -x)),
        -1.0,
        4.0,
    ),
    "cond": (
        jax.vmap(lambda t: lax.cond(t > 0, lambda t: t, lambda t: 0.25 * t, t)),
        lambda x: np.where(x > 0, x, 0.25 * x),
        0.25,
        1.0,
    ),
    "select_n": (
        lambda x: lax.select_n((x > 0).astype(jnp.int8) + (x > 1).astype(jnp.int8), 0 * x, x, 2 * x - 1),
        lambda x: np.where(x > 1, 2 * x - 1, np.maximum(x, 0)),
        0.0,
        2.0,
    ),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", [n for n in PIECEWISE if n != "piecewise"])
def test_cases_chosen_by_an_integer(name: str) -> None:
    fn, other, low, high = PIECEWISE[name]
    form, tap, consts = only_tap(fn)
    lower, upper = (float(s.flat[0]) for s in slope_range(tap.expr, consts))
    assert low - 1e-7 <= lower <= low and high <= upper <= high + 1e-7
    x = np.linspace(-3, 3, 600).reshape(-1, 6).astype(np.float32)
    assert np.allclose(jax.vmap(form.evaluate)(x), other(x.astype(np.float64)), rtol=1e-6, atol=1e-6)
    quotient = np.diff(other(np.linspace(-3, 3, 6001))) / 1e-3
    assert lower - 1e-9 <= quotient.min() and quotient.max() <= upper + 1e-9


ULP = float(np.float32(2.0**-23))
REFUSED: dict[str, tuple[Fn, str]] = {
    "one_ulp": (
        lambda x: jnp.where(x >= 1, x + np.float32(ULP), x),
        r"jumps at 1: the branches differ by 1\.19e-07 at x = 1 .*no Lipschitz constant",
    ),
    "piecewise_zero_default": (PIECEWISE["piecewise"][0], "jumps at 1: the branches differ by 1 at x = 1 "),
    "piecewise_one_ulp": (
        lambda x: jnp.piecewise(x, [x < 1], [lambda t: t, lambda t: t + np.float32(ULP)]),
        r"the branches differ by 1\.19e-07 at x = 1 ",
    ),
    "select": (
        lambda x: jnp.select([x < 0, x < 1], [0 * x, x], 1.5),
        r"the branches differ by 0\.5 at x = 1 ",
    ),
    "count_of_comparisons": (
        lambda x: ((x > 0).astype(int) + (x > 1).astype(int)).astype(x.dtype),
        "the branches differ by 1 at x = 0 ",
    ),
    "interp_left": (lambda x: jnp.interp(x, XP, FP, left=0.25), r"jumps by 0\.25 at x = -1.*no Lipschitz"),
    "interp_right": (lambda x: jnp.interp(x, XP, FP, right=0.7001), r"jumps by 0\.0001 at x = 2"),
    "interp_equal_knots": (
        lambda x: jnp.interp(x, np.float32([0, 1, 1, 2]), FP),
        r"do not increase: xp\[1\] = 1 and xp\[2\] = 1, where the function jumps",
    ),
    "interp_decreasing": (lambda x: jnp.interp(x, XP[::-1], FP), "do not increase"),
    "interp_period": (lambda x: jnp.interp(x, XP, FP, period=4.0), "infinitely many pieces"),
    "interp_knots_of_x": (lambda x: jnp.interp(x, jnp.sort(x), jnp.arange(6.0)), "knots .* depend on x"),
    "interp_one_knot": (lambda x: jnp.interp(x, XP[:1], FP[:1]), "fewer than two knots"),
    "interp_too_close": (
        lambda x: jnp.interp(x, np.float32([0, 1e-14, 1]), FP[:3]),
        "so close that it jumps",
    ),
    "interp_infinite": (lambda x: jnp.interp(x, XP, np.float32([0, np.inf, 1, 2])), "not finite"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_with_the_size_of_the_jump(name: str) -> None:
    fn, reason = REFUSED[name]
    with pytest.raises(lb.UnsupportedError, match=reason) as caught:
        lb.trace(fn, jnp.zeros(6))
    assert "register_activation" not in str(caught.value)


def test_knots_that_are_rounded_to_floats_are_refused() -> None:
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(lb.UnsupportedError, match="dtype holds exactly"),
    ):
        lb.trace(lambda x: jnp.interp(x, np.array([0, 2**24 + 1]), FP[:2]), jnp.zeros(6))


def test_a_function_called_interp_is_not_taken_for_that_of_jax() -> None:
    @jax.jit
    def _interp(x: Any, xp: Any, fp: Any) -> Any:
        return 3.0 * nn.relu(x) + xp[0] + fp[0]

    form = lb.trace(lambda x: _interp(x, jnp.asarray(XP), jnp.asarray(FP)), jnp.zeros(6))
    assert lb.liplt(form).value == pytest.approx(3.0)


def test_the_argmax_of_stacked_predicates_keeps_its_dtype() -> None:
    fn = lambda x: jnp.where(jnp.argmax(jnp.stack([x > 0, x > 1]), 0) == 1, x * 0, x)  # noqa: E731
    for wide in (False, True):
        with jax.enable_x64(wide):
            form = lb.trace(fn, jnp.zeros(6))
        assert lb.liplt(form).value == pytest.approx(1.0)


def test_integers_that_could_wrap_are_refused() -> None:
    """Without wrapping, the first two would be constant; with it, they jump at 0."""
    for fn in (
        lambda x: jnp.where((x > 0).astype(jnp.int8) + jnp.int8(127) > 0, 0 * x, 5.0),
        lambda x: jnp.where((x > 0).astype(jnp.uint8) - jnp.uint8(1) < 1, 0 * x, 5.0),
        lambda x: (x.astype(int) * 0).astype(x.dtype),
    ):
        with pytest.raises(lb.UnsupportedError):
            lb.trace(fn, jnp.zeros(6))


def guarded_sinc(x: Any) -> Any:
    safe = jnp.where(x == 0, 1.0, x)
    return jnp.where(x == 0, 1.0, jnp.sin(safe) / safe)


@pytest.mark.parametrize(
    ("fn", "word", "declare"),
    [
        (lambda x: x * x, "grows like x\\*\\*2", False),
        (jnp.exp, "at least .* at x = ", False),
        (lambda x: jnp.sqrt(jnp.abs(x)), "at least .* at x = ", False),
        (lambda x: 1 / (x - 0.1), "a divisor that vanishes", False),
        (jnp.log, "log outside its domain", False),
        (jnp.tan, "tan outside its domain", False),
        (guarded_sinc, "what a branch tends to at x = 0", True),
        (lax.lgamma, "no slope rule", False),
        pytest.param(lambda x: jnp.abs(jnp.mod(x, 2.0) - 1), "no slope rule", False, marks=pytest.mark.slow),
    ],
)
def test_slopes_are_asked_for_only_where_they_may_be_bounded(fn: Fn, word: str, declare: bool) -> None:
    with pytest.raises(lb.UnsupportedError, match=word) as caught:
        lb.trace(fn, jnp.zeros(6))
    assert ("register_activation" in str(caught.value)) is declare
