"""Margins of activations that are curves: their forms hold in rationals, and bounds below every attained margin."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import in_ball, mlp, values
from test_margins import attained, check, gaps
from test_register import digamma_like
from zoo import NETS

import lipbounds as lb
from lipbounds._activations.activations import evaluate
from lipbounds._activations.slopes_on_intervals import anchored_slopes, pair_slopes, sampled
from lipbounds._form.lure import proved_slopes
from lipbounds._margins import forms
from lipbounds._triangle import recursion

#: Rational functions, which Python's own numbers evaluate exactly.
RATIONAL = {
    "relu6": (jax.nn.relu6, lambda t: min(max(t, Fraction(0)), Fraction(6))),
    "hard_tanh": (jax.nn.hard_tanh, lambda t: min(max(t, Fraction(-1)), Fraction(1))),
    "soft_sign": (jax.nn.soft_sign, lambda t: t / (1 + abs(t))),
    "quadratic": (
        lambda t: jnp.clip(t, 0.0, 2.0) * jnp.clip(t, 0.0, 2.0),
        lambda t: min(max(t, Fraction(0)), Fraction(2)) ** 2,
    ),
}
SMOOTH = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda t: jax.nn.gelu(t, approximate=False),
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "hard_swish": jax.nn.hard_swish,
    "mish": jax.nn.mish,
    "sin": jnp.sin,
}
CURVED = (
    "max_pool_images nnx_remat_jit linen_apply depthwise_separable dilated_convolution tanh sigmoid gelu_exact "
    "gelu_tanh silu softplus elu_celu selu hard_swish relu6_clip hard_tanh_hard_sigmoid mish_softsign log_sigmoid "
    "squareplus_sparse_plus homemade soft_shrink_interp cases_log_sigmoid arctan_arcsinh log_sum_exp two_branches "
    "u_net mlp_mixer fori_loop rematerialised"
).split()


def tap_of(activation, dtype=np.float32):
    """(expr, constants, slopes on the whole line) of an activation of one number."""
    form = lb.trace(activation, np.zeros(1, dtype))
    tap = form.taps[0]
    return tap.expr, tap.constants_by_entry(recursion.host_form(form).consts), proved_slopes(form, 0)


def ranges(n, rng):
    """(h, lo, hi) of n neurons, of all sizes, some of them without any width to one side."""
    h, size = rng.normal(size=n) * 3, 10.0 ** rng.uniform(-6, 1, n)
    left, right = rng.uniform(0, 1, (2, n)) * (rng.uniform(size=(2, n)) > 0.1)
    return h, h - size * left, h + size * right


def curve_of(activation, h, lo, hi, dtype=np.float32):
    expr, consts, known = tap_of(activation, dtype)
    return forms.of_curve(expr, consts, h, lo, hi, tuple(np.repeat(end, len(h)) for end in known))


def exactly(curve, i, f, h, y):
    """(v, r) of neuron i at y, in rationals."""
    base, gain, p, q = (Fraction(float(part[i])) for part in (curve.base, curve.gain, curve.p, curve.q))
    w = (f(y) - f(h) - base * (y - h)) / gain if gain else Fraction(0)
    return w + p, w - (y - h) + q


def largest(curve, i, v, r):
    """(F,) the forms of neuron i at (v, r), in rationals; all are <= 0."""
    parts = v * v, v * r, r * r, v, r, Fraction(1)
    return [
        sum(Fraction(float(c)) * t for c, t in zip(form, parts, strict=True)) for form in curve.forms[..., i]
    ]


@pytest.mark.parametrize("name", RATIONAL)
def test_forms_hold_in_rationals(name):
    """On points of the range, its ends and the breakpoints: every rounding of the coefficients is covered."""
    activation, f = RATIONAL[name]
    h, lo, hi = ranges(60, np.random.default_rng(0))
    curve = curve_of(activation, h, lo, hi)
    bent, touched = int((curve.gain > 0).sum()), 0
    for i, (centre, low, high) in enumerate(
        tuple(Fraction(float(part)) for part in row) for row in zip(h, lo, hi, strict=True)
    ):
        spots = {low + (high - low) * Fraction(k, 24) for k in range(25)} | {
            Fraction(b) for b in (-1, 0, 1, 2, 6)
        }
        worst = [Fraction(-(10**9))] * len(curve.forms)
        for y in sorted(s for s in spots | {centre} if low <= s <= high):
            v, r = exactly(curve, i, f, centre, y)
            if curve.gain[i] == 0:
                assert f(y) - f(centre) == Fraction(float(curve.base[i])) * (y - centre)
                continue
            assert v >= 0 and r >= 0
            worst = [max(a, b) for a, b in zip(worst, largest(curve, i, v, r), strict=True)]
        assert all(a <= 0 for a in worst)
        top, bottom = (float(end[i]) for end in forms.ends(curve.forms))
        # the first ones are attained at the centre or the ends
        touched += all(float(a) > -1e-2 * (top + bottom) ** 2 for a in worst[:4])
    assert 10 < bent <= touched


@pytest.mark.parametrize("name", SMOOTH)
def test_forms_hold_and_are_nearly_attained(name):
    """In float64, up to what its values are known: and the lines touch the curve within a hundredth of its size."""
    h, lo, hi = ranges(200, np.random.default_rng(1))
    curve = curve_of(SMOOTH[name], h, lo, hi)
    expr, consts, _ = tap_of(SMOOTH[name])
    with jax.enable_x64(True):
        y = lo + (hi - lo) * np.linspace(0, 1, 201)[:, None]
        at, here = (
            np.asarray(evaluate(expr, [np.float64(c) for c in consts], jnp.asarray(t))) for t in (y, h)
        )
    bent = curve.gain > 0
    top, bottom = forms.ends(curve.forms)
    known = (
        2e-15
        * (np.abs(at).max(axis=0) + np.abs(h) + np.abs(hi - lo))
        / np.where(bent, curve.gain, 1)
        / (top + bottom)
    )
    use = bent & (known < 1e-6)
    assert use.sum() > 50
    w = (at - here - curve.base * (y - h))[:, use] / curve.gain[use]
    v, r = w + curve.p[use], w - (y - h)[:, use] + curve.q[use]
    parts = np.stack([v * v, v * r, r * r, v, r, np.ones_like(v)])
    worst = np.einsum("fcn,cpn->fpn", curve.forms[..., use], parts).max(axis=1) / np.square(top + bottom)[use]
    assert (worst <= known[use]).all()
    assert (np.median(worst, axis=1) > -2e-3).all()


@pytest.mark.parametrize("scale", [1e-140, 1e-110, 1e-30, 1e30, 1e90])
def test_forms_of_tiny_and_huge_ranges_hold_in_rationals(scale):
    """Products of three of its numbers leave the range of float64 there."""
    low, high = 0.2 * scale, 1.3 * scale
    rng = np.random.default_rng(0)
    h = scale * rng.uniform(-0.5, 2, 30)
    lo, hi = h - scale * rng.uniform(0.1, 2, 30), h + scale * rng.uniform(0.1, 2, 30)
    with jax.enable_x64(True):
        curve = curve_of(lambda t: jnp.clip(t, low, high), h, lo, hi, np.float64)

    def f(t):
        return min(max(t, Fraction(low)), Fraction(high))

    for i in range(30):
        centre, begin, end = (Fraction(float(a[i])) for a in (h, lo, hi))
        spots = {begin + (end - begin) * Fraction(k, 60) for k in range(61)} | {Fraction(low), Fraction(high)}
        for y in (s for s in spots if begin <= s <= end and curve.gain[i]):
            v, r = exactly(curve, i, f, centre, y)
            assert v >= 0 and r >= 0 and max(largest(curve, i, v, r)) <= 0


def test_lines_are_parallel_to_the_chord_and_to_the_curve_at_its_centre():
    h, lo, hi = np.array([0.0, 0.5, -1.0]), np.array([-1.0, -1.0, -3.0]), np.array([2.0, 1.0, 0.0])
    curve = curve_of(jnp.tanh, h, lo, hi)
    left, right = curve.forms[-4:, 3], curve.forms[-4:, 4]
    slopes = curve.base + curve.gain * right / (left + right)
    chord, here = (np.tanh(hi) - np.tanh(lo)) / (hi - lo), 1 - np.tanh(h) ** 2
    np.testing.assert_allclose(slopes, [chord, chord, here, here], rtol=2e-2)
    np.testing.assert_allclose(slopes[:2], [chord, chord], rtol=1e-9)


def test_an_example_without_finite_ranges_leaves_the_others_theirs(monkeypatch):
    """Also where open neurons would be searched alone."""
    form = mlp((6, 12, 10, 3), activation="silu")
    x = np.random.default_rng(0).random((2, 6))
    y = values(form, x).argmax(axis=1)
    monkeypatch.setattr("lipbounds._margins.problem._MANY", 0)
    found = lb.margins(form, x, y, [0.1, 1e305])
    alone = lb.margins(form, x[:1], y[:1], 0.1)
    np.testing.assert_allclose(found.value[0], alone.value[0], rtol=1e-3)
    assert (found.value[1] < 0).sum() == 2


def test_ranges_beyond_float64_prove_nothing():
    """Forms that overflow are not finite, and their proofs are refused."""
    form = mlp((2, 3, 2), activation="tanh")
    wide = lb.from_weights([1e200 * np.eye(2), np.eye(2)], activation="tanh")
    for net, eps in ((form, 1e160), (wide, 1.0)):
        with np.errstate(all="raise"):
            found = lb.margins(net, [[0.5, 0.25]], [0], eps, iterations=25)
        assert found.value[0, 1] < 1e-3


@pytest.mark.parametrize("wide", [1e-7, 0.2])
@pytest.mark.parametrize("name", [*RATIONAL, *SMOOTH])
def test_anchored_slopes_hold_every_chord_and_are_narrower_than_those_of_pairs(name, wide):
    """Of the values at the input that are known up to so much of the range."""
    activation = RATIONAL[name][0] if name in RATIONAL else SMOOTH[name]
    expr, consts, known = tap_of(activation)
    h, lo, hi = ranges(300, np.random.default_rng(2))
    known = tuple(np.repeat(end, len(h)) for end in known)
    wrong = wide * np.abs(hi - lo)
    y = np.maximum(h - wrong, lo)[None], np.minimum(h + wrong, hi)[None]
    a, b = anchored_slopes(expr, consts, y, lo[None], hi[None], known)
    c, d = pair_slopes(expr, consts, lo[None], hi[None], known)
    points = lo + (hi - lo) * np.linspace(0, 1, 101)[:, None]
    with jax.enable_x64(True):
        numbers = [np.float64(c) for c in consts]
        at = np.asarray(evaluate(expr, numbers, jnp.asarray(points)))
        for centre in (y[0][0], h, y[1][0]):
            gap = np.where(np.abs(points - centre) > 1e-3 * (hi - lo), points - centre, np.nan)
            here = np.asarray(evaluate(expr, numbers, jnp.asarray(centre)))
            noise = 4e-15 * (np.abs(at) + np.abs(points)) / np.abs(gap)
            chord = (at - here) / gap
            assert not (chord < a - noise).any() and not (chord > b + noise).any()
    if wide < 0.1:
        assert (b - a <= (d - c) * 1.1 + 1e-9).all() and (b - a).mean() < 0.8 * (d - c).mean()


def test_chords_from_a_wide_centre():
    """The steepest and the flattest chord lie inside the centre, which has two slopes."""
    knots, heights = [0.0, 0.5, 0.75, 1.0, 2.0, 3.0], [0.0, 0.25, 0.5, 0.5, 0.9, 1.5]
    expr, consts, known = tap_of(lambda t: jnp.interp(t, jnp.array(knots), jnp.array(heights)))
    lo, hi = np.array([[0.0]]), np.array([[3.0]])
    y = np.array([[0.5]]), np.array([[1.0]])
    found = sampled(expr, consts, lo, y, hi, known, 4).chords(4, 5)
    u, v = np.meshgrid(np.linspace(0.5, 1.0, 51), np.linspace(0.0, 3.0, 301))
    gap = np.where(np.abs(u - v) > 1e-9, u - v, np.nan)
    chord = (np.interp(u, knots, heights) - np.interp(v, knots, heights)) / gap
    assert found[0][0, 0] <= np.nanmin(chord) and found[1][0, 0] >= np.nanmax(chord)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "relu6"])
def test_never_above_an_attained_margin_and_at_least_the_ellipsoids(activation):
    check(mlp((6, 12, 10, 3), activation={"relu6": jax.nn.relu6}.get(activation, activation)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CURVED)
def test_the_zoo(name):
    fn, x = NETS[name].make(0)
    check(lb.trace(fn, x, batched=NETS[name].batched))


def test_kinks_and_curves_of_one_network_by_open_neurons_alone(monkeypatch):
    """Taps with and without a kink: the search on open neurons proves what that of all layers does."""
    rng = np.random.default_rng(0)
    w = [
        jnp.asarray(1.5 * rng.standard_normal(s) / s[1] ** 0.5, jnp.float32)
        for s in ((12, 6), (10, 12), (3, 10))
    ]
    form = lb.trace(lambda x: w[2] @ jax.nn.relu(w[1] @ jax.nn.silu(w[0] @ x) + 0.1), jnp.zeros(6))
    x = rng.uniform(size=(2, 6))
    y = values(form, x).argmax(axis=1)
    usual = lb.margins(form, x, y, 0.2)
    monkeypatch.setattr("lipbounds._margins.problem.Problem.apart", lambda self, row: True)
    alone = lb.margins(form, x, y, 0.2)
    others = np.isfinite(usual.value)
    np.testing.assert_allclose(alone.value[others], usual.value[others], rtol=5e-2, atol=2e-2)
    worst = attained(form, x, y, 0.2, 2)
    assert (alone.value <= worst).all() and (usual.value <= worst).all()


def test_branching_splits_kinks_alone():
    """A network of curves has nothing to split: what the dual leaves open stays so, at once."""
    form, rng = mlp((6, 12, 10, 3), seed=3, activation="tanh"), np.random.default_rng(2)
    x = rng.random((6, 6))
    y = values(form, x).argmax(axis=1)
    found = [
        lb.certified_radius(form, x, y, eps=0.25, local=lb.Local(seconds_per_image=s, box=(0.0, 1.0)))
        for s in (0.0, 5.0)
    ]
    assert (found[0].radius == found[1].radius).all()
    assert "not proved" in found[1].outcome.tolist() and "out of time" not in found[1].outcome.tolist()


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_radii_by_the_dual(activation):
    """Far above local radii, and no misclassified point inside."""
    form, rng = mlp((6, 12, 10, 3), seed=3, activation=activation), np.random.default_rng(1)
    x = rng.random((5, 6))
    y = values(form, x).argmax(axis=1)
    bound = lb.liplt(form, pairwise=True)
    before, found = (
        lb.certified_radius(form, x, y, bound=bound, local=lb.Local(margins=m)) for m in (False, True)
    )
    assert (found.radius >= before.radius).all() and np.median(found.radius / before.radius) > 1.1
    assert found.guarantee == "verified"
    points = in_ball(x, found.radius[:, None] * 0.999, 2, 4000, rng).reshape(-1, 6)
    assert (gaps(values(form, points), np.tile(y, 4000)) > 0).all()
    worst = [
        attained(form, x[i : i + 1], y[i : i + 1], found.radius[i] * 0.999, 2).min() for i in range(len(x))
    ]
    assert min(worst) > 0


def test_functions_that_are_declared_have_no_dual():
    fn = digamma_like(3.4375)
    lb.register_activation(fn, slopes=(-3.0, 3.0))
    w = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    form = lb.trace(lambda x: w @ fn(x), jnp.zeros(6))
    x, y = np.full((2, 6), 0.5), [0, 1]
    with pytest.raises(ValueError, match="elementwise activations whose slopes are proved.*certified_radius"):
        lb.margins(form, x, y, 0.1)
    bound = lb.liplt(form)
    found = lb.certified_radius(form, x, y, bound=bound, local=lb.Local(margins=True))
    assert any(note.startswith("without the dual of lb.margins: margins are for") for note in found.notes)


def test_a_form_that_is_too_small_is_seen(monkeypatch):
    """The tests above do fail: a line drawn through the curve proves more than is attained."""
    usual = forms._line

    def lower(*args):
        line = usual(*args)
        line[5] += 0.2 * args[-1] ** 2
        return line

    monkeypatch.setattr(forms, "_line", lower)
    with pytest.raises(AssertionError):
        check(mlp((6, 12, 10, 3), activation="tanh"))
