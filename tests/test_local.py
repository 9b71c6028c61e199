"""Local bounds: sound on sampled pairs in the ball, tight at eps -> 0, never worse than the global radius."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import in_ball, jacobians, largest_slopes, mlp, values
from gain import form_of
from zoo import NETS

import lipbounds as lb
from lipbounds._activations.slopes_on_intervals import anchored_slopes, pair_slopes
from lipbounds._form.lure import proved_slopes
from lipbounds._form.steps import StaticArray

FEW = ("relu", "gelu_exact", "maxmin_mlp", "max_pool_images", "linear")
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "leaky": lambda x: jax.nn.leaky_relu(x, 0.1),
    "abs": jnp.abs,
    "clip": lambda x: jnp.clip(x, -1, 1),
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "elu": jax.nn.elu,
    "hard_swish": jax.nn.hard_swish,
}


# --- slopes --------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_slopes_on_intervals(name):
    n, rng = 30, np.random.default_rng(1)
    form = lb.trace(ACTIVATIONS[name], jax.ShapeDtypeStruct((n,), jnp.float32))
    (tap,) = form.taps
    consts = [c.array if isinstance(c, StaticArray) else np.asarray(form.consts[c]) for c in tap.consts]
    known = proved_slopes(form, 0)
    y = 2 * rng.standard_normal((40, n))
    width = 10.0 ** rng.uniform(-3, 1, y.shape)
    lo, hi = y - width * rng.uniform(0, 1, y.shape), y + width
    pair = pair_slopes(tap.expr, consts, lo, hi, known)
    anchored = anchored_slopes(tap.expr, consts, (y, y), lo, hi, known)
    f = {t: values(form, at) for t, at in (("y", y), ("lo", lo), ("hi", hi))}
    assert (pair[0] >= known[0]).all() and (pair[1] <= known[1]).all()
    assert (anchored[0] >= pair[0]).all() and (anchored[1] <= pair[1]).all()
    assert (pair[1] - pair[0] < known[1] - known[0] - 1e-6).mean() > 0.5  # most intervals say something
    for _ in range(20):
        u, v = (lo + (hi - lo) * rng.uniform(0, 1, y.shape) for _ in range(2))
        fu, fv = values(form, u), values(form, v)
        for (a, b), slope, apart in (
            (pair, (fu - fv) / (u - v), np.abs(u - v)),
            (anchored, (fu - f["y"]) / (u - y), np.abs(u - y)),
        ):
            slack = 1e-14 * (1 + np.abs(fu)) / apart
            assert ((slope >= a - slack) & (slope <= b + slack)).all()
    if name in ("relu", "leaky", "abs"):  # attained at one of the ends
        for end in ("lo", "hi"):
            f[end + " slope"] = (f[end] - f["y"]) / ({"lo": lo, "hi": hi}[end] - y)
        ends = np.stack([f["lo slope"], f["hi slope"]])
        crossing = (lo < 0) & (hi > 0)
        np.testing.assert_allclose(anchored[0][crossing], ends.min(0)[crossing], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lo, hi", [(-np.inf, 5.0), (-1.7e308, 1.7e308), (-np.inf, np.inf), (-5.0, np.inf)])
def test_slopes_on_intervals_without_a_middle(lo: float, hi: float) -> None:
    """The ends may be infinite, or their difference; a part of the interval was left out, and the slope was 0.5."""
    form = lb.trace(jax.nn.silu, jnp.ones(1))
    (least,), (most,) = known = proved_slopes(form, 0)
    tap = form.taps[0]
    consts = [c.array if isinstance(c, StaticArray) else np.asarray(form.consts[c]) for c in tap.consts]
    a, b = pair_slopes(tap.expr, consts, np.array([[lo]]), np.array([[hi]]), known)
    assert (a[0, 0], b[0, 0]) == (least, most)


def test_balls_that_leave_the_range_of_float64() -> None:
    """The radius of the pre-activations overflows on the ball; 5.13e9 was returned for a slope of 1.0998e10."""
    weight = jnp.array([[1e10]])
    form = lb.trace(lambda x: jax.nn.silu(weight @ x), jnp.zeros(1))
    x = np.array([[5.0]], np.float32)
    assert lb.local(form, x, 1e300, input_range=(0, 10)).value[0] == pytest.approx(
        lb.liplt(form).value, rel=1e-9
    )


# --- constants -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(6)
@pytest.mark.parametrize("norm", [2, np.inf])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_bounds_hold_between_pairs_of_the_ball(activation, norm):
    form, rng = mlp(activation=activation), np.random.default_rng(2)
    x = rng.standard_normal((25, 12)).astype(np.float32)
    for eps in (0.01, 0.1, 0.5, 3.0):
        bound = lb.local(form, x, eps, norm=norm, pairwise=True)
        whole, pairs = largest_slopes(form, x, eps, norm, rng)
        assert (whole <= bound.value).all() and (pairs <= bound.pairwise + 1e-12).all()
        assert bound.guarantee == "verified" and (bound.value > 0).all()
        order = np.linalg.norm(jacobians(form, x), norm, axis=(1, 2))
        assert (order <= bound.value * (1 + 1e-7)).all()


@pytest.mark.parametrize("norm", [2, np.inf])
@pytest.mark.parametrize("activation", ["relu", "silu", "leaky_relu"])
def test_small_balls_give_the_jacobian(activation, norm):
    form = mlp(activation=activation, seed=3)
    x = np.random.default_rng(4).standard_normal((40, 12)).astype(np.float32)
    exact = jacobians(form, x)
    bound = lb.local(form, x, 1e-6, pairwise=True)
    ratio = bound.value / np.linalg.norm(exact, 2, axis=(1, 2))
    assert (ratio >= 1 - 1e-6).all() and (ratio <= 1.01).all()
    rows = np.linalg.norm(exact[:, :, None] - exact[:, None], axis=3)
    off = ~np.eye(6, dtype=bool)
    assert (bound.pairwise[:, off] <= 1.01 * rows[:, off]).all()
    if norm == np.inf:  # not exact there, but far below an l2 ball of radius eps sqrt(d)
        cube = lb.local(form, x, 1e-6, norm=norm)
        assert (cube.value <= np.sqrt(12) * bound.value).all()
        assert (cube.value >= np.abs(exact).sum(axis=2).max(axis=1) * (1 - 1e-6)).all()


@pytest.mark.parametrize("norm", [2, np.inf])
def test_a_neuron_that_can_just_switch(norm):
    """L is 0 as long as no point of the ball switches the neuron on, and ||w|| as soon as one does."""
    w = np.array([[0.6, 0.8]], np.float32)
    form = lb.from_weights(
        [w, np.ones((1, 1), np.float32)],
        [-np.ones(1, np.float32), np.zeros(1, np.float32)],
        activation="relu",
    )
    reach = 1 / (1.0 if norm == 2 else 1.4)  # how far 0 is from the edge
    x, slope = np.zeros((1, 2), np.float32), 1.0 if norm == 2 else 1.4
    for share, wanted in ((0.999, 0.0), (1.001, slope)):
        found = lb.local(form, x, share * reach, norm=norm).value[0]
        assert (found == pytest.approx(0, abs=1e-6)) if wanted == 0 else found >= wanted * (1 - 1e-6)
    # the second neuron switches at the same distance
    deep = lb.from_weights(
        [w, np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)],
        [np.ones(1, np.float32), -2 * np.ones(1, np.float32), np.zeros(1, np.float32)],
        activation="relu",
    )
    for share, wanted in ((0.999, 0.0), (1.001, slope)):
        found = lb.local(deep, x, share * reach, norm=norm).value[0]
        assert (found == pytest.approx(0, abs=1e-6)) if wanted == 0 else found >= wanted * (1 - 1e-6)


@pytest.mark.slow
def test_no_value_is_above_the_bound_of_the_whole_network():
    form = mlp()
    x = np.random.default_rng(5).standard_normal((10, 12)).astype(np.float32)
    whole = lb.lipsdp(form, pairwise=True)
    far = lb.local(form, x, 50.0, pairwise=True, bound=whole)
    assert (far.value == whole.value).any() and (far.value <= whole.value).all()
    assert (far.pairwise <= whole.pairwise).all()
    assert (lb.local(form, x, 50.0).value <= lb.liplt(form).value).all()
    with pytest.raises(ValueError, match="another network"):
        lb.local(form, x, 1.0, bound=lb.liplt(mlp(seed=1)))
    with pytest.raises(TypeError, match="UpperBound"):
        lb.local(form, x, 1.0, bound=lb.empirical(form))


def test_constants_grow_with_the_ball_and_items_are_bounds():
    form = mlp()
    x = np.random.default_rng(5).standard_normal((10, 12)).astype(np.float32)
    small, large = lb.local(form, x, 0.05), lb.local(form, x, np.full(10, 1.0))
    assert (small.value <= large.value * (1 + 1e-9)).all() and len(small) == len(list(small)) == 10
    one = small[3]
    assert isinstance(one, lb.UpperBound) and one.value == small.value[3] and "within 0.05" in one.notes[-1]
    with pytest.raises(ValueError, match="one example only"):
        lb.certified_radius(form, x, np.zeros(10, int), bound=one)
    assert "LocalBounds: 10 examples, l2, verified" in repr(small) and "one per example" not in repr(small)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted(NETS)]
)
def test_every_net_of_the_zoo(name):
    form, rng = form_of(name), np.random.default_rng(6)
    x = rng.standard_normal((4, *form.in_shape)).astype(np.float32)
    for eps in (0.02, 0.7):
        bound = lb.local(form, x, eps, pairwise=True)
        whole, pairs = largest_slopes(form, x, eps, 2, rng)
        assert (whole <= bound.value * (1 + 1e-9)).all()
        assert (pairs <= bound.pairwise * (1 + 1e-9) + 1e-10).all()
    if form.num_outputs > 1:
        y = values(form, x).argmax(axis=1)
        wide = lb.certified_radius(form, x, y)
        near = lb.certified_radius(form, x, y, local=True)
        assert (near.radius >= wide.radius).all()


@pytest.fixture
def wide_front(monkeypatch):
    """(form, x, rng) of a network whose first layer counts as wide, without ellipsoids of the whole."""
    module = sys.modules["lipbounds._local.engines"]
    monkeypatch.setattr(module, "TAIL", 26)
    monkeypatch.setattr(module, "_WORK", 0)
    form, rng = mlp(widths=(12, 30, 24, 20, 6)), np.random.default_rng(7)
    return form, rng.standard_normal((12, 12)).astype(np.float32), rng


def test_a_wide_front_is_bounded_as_a_whole(wide_front):
    form, x, rng = wide_front
    bound = lb.local(form, x, 0.2, pairwise=True, guarantee="verified")
    whole, pairs = largest_slopes(form, x, 0.2, 2, rng)
    assert "bounded as a whole" in bound.notes[0] and bound.guarantee == "verified"
    assert (whole <= bound.value).all() and (pairs <= bound.pairwise + 1e-12).all()
    assert (bound.value < lb.liplt(form).value).all()


def test_a_wide_front_in_linf_is_bounded_on_larger_l2_balls(wide_front):
    """B_inf(x, eps) lies in B_2(x, eps sqrt(12)), and |dx|_2 <= sqrt(12) |dx|_inf."""
    form, x, rng = wide_front
    for guarantee in ("verified", "auto"):
        bound = lb.local(form, x, 0.2, norm=np.inf, pairwise=True, guarantee=guarantee)
        whole, pairs = largest_slopes(form, x, 0.2, np.inf, rng)
        assert any("balls larger by sqrt(12)" in note for note in bound.notes)
        assert (whole <= bound.value).all() and (pairs <= bound.pairwise + 1e-12).all()
        assert (bound.value < lb.liplt(form, norm=np.inf).value).all()
        # what the same engines prove in l2 on these balls, of pairs times sqrt(12), no more and no less
        plain = lb.local(form, x, 0.2 * np.sqrt(12), pairwise=True, guarantee=guarantee)
        np.testing.assert_allclose(bound.pairwise, plain.pairwise * np.sqrt(12), rtol=1e-9)
        # six outputs: the largest of their constants is at least that of all of them in l2 divided by sqrt(6)
        assert (bound.value >= plain.value * np.sqrt(12 / 6) * (1 - 1e-9)).all()
        assert (bound.pairwise < lb.liplt(form, norm=np.inf, pairwise=True).pairwise + np.eye(6)).all()
        assert (plain.pairwise < lb.liplt(form, pairwise=True).pairwise + np.eye(6)).all()


@pytest.mark.parametrize("guarantee", ["verified", "auto"])
def test_radii_in_linf_behind_a_wide_front_are_those_in_l2_by_the_root(wide_front, guarantee):
    form, x, _ = wide_front
    y = values(form, x).argmax(axis=1)
    plain = lb.liplt(form, pairwise=True)
    radius = {}
    for bound in (plain, lb.in_norm(form, plain, norm=np.inf)):
        radius[bound.norm] = lb.certified_radius(
            form, x, y, bound=bound, local=True, guarantee=guarantee
        ).radius
    np.testing.assert_allclose(radius[np.inf] * np.sqrt(12), radius[2], rtol=1e-6)
    assert (radius[2] > 1.1 * lb.certified_radius(form, x, y, bound=plain).radius).any()


# --- radii ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [2, np.inf])
def test_local_radii_are_sound_and_never_below_the_global_ones(norm):
    form, rng = mlp(widths=(12, 40, 30, 5)), np.random.default_rng(8)
    x = rng.standard_normal((60, 12)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    y[:3] = (y[:3] + 1) % 5  # misclassified: no radius
    bound = (lb.lipsdp if norm == 2 else lb.liplt)(form, norm=norm, pairwise=True)
    wide = lb.certified_radius(form, x, y, bound=bound)
    near = lb.certified_radius(form, x, y, bound=bound, local=True)
    assert (near.radius >= wide.radius).all() and (near.radius[:3] == 0).all() and (near.radius[3:] > 0).all()
    assert np.median(near.radius[3:] / wide.radius[3:]) > 1.5 and near.guarantee == "verified"
    assert near.method == f"local, {bound.method}"
    points = in_ball(x, 1.0, norm, 200, rng) - x
    moved = x + points * near.radius.reshape(-1, 1) * (1 - 1e-9)
    answers = values(form, moved.reshape(-1, 12)).argmax(axis=1).reshape(200, -1)
    assert (answers[:, 3:] == y[3:]).all()


def test_more_tries_certify_no_less():
    form, rng = mlp(widths=(12, 40, 30, 5)), np.random.default_rng(9)
    x = rng.standard_normal((30, 12)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    radii = [lb.certified_radius(form, x, y, local=lb.Local(tries=t)).radius for t in (1, 2, 4, 8)]
    for fewer, more in itertools.pairwise(radii):
        assert (more >= fewer).all()


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "eps", "options", "why"),
    [
        (np.zeros((2, 12), np.float32), 0.0, {}, "finite numbers > 0"),
        (np.zeros((2, 12), np.float32), np.nan, {}, "finite numbers > 0"),
        (np.zeros((2, 12), np.float32), [1.0, 2.0, 3.0], {}, "hold 2 numbers"),
        (np.zeros((2, 11), np.float32), 1.0, {}, "must have shape"),
        (np.full((2, 12), np.nan, np.float32), 1.0, {}, "NaN"),
        (np.zeros((2, 12), int), 1.0, {}, "floating point"),
        (np.zeros((2, 12), np.float32), 1.0, {"norm": 1}, "norm 2 and inf"),
        (np.zeros((2, 12), np.float32), 1.0, {"guarantee": "estimate"}, "'auto' or 'verified'"),
    ],
)
def test_refusals(x, eps, options, why):
    with pytest.raises(ValueError, match=why):
        lb.local(mlp(), x, eps, **options)


def test_more_refusals():
    form, x = mlp(), np.zeros((2, 12), np.float32)
    with pytest.raises(TypeError, match="LureForm"):
        lb.local(lambda v: v, x, 1.0)
    with pytest.raises(ValueError, match="norm 2 and inf"):
        lb.certified_radius(form, x, np.zeros(2, int), bound=lb.liplt(form, norm=1), local=True)
    for tries in (0, True, 1.5):
        with pytest.raises(ValueError, match="tries"):
            lb.Local(tries=tries)
    with pytest.raises(ValueError, match="local must be True, False or a lb.Local, got 'yes'"):
        lb.certified_radius(form, x, np.zeros(2, int), local="yes")
    for old in ({"tries": 2}, {"box": (0, 1)}):
        with pytest.raises(TypeError, match=r"certified_radius: \w+=... is now local=lb.Local\(\w+=...\)"):
            lb.certified_radius(form, x, np.zeros(2, int), local=True, **old)
    assert len(lb.local(form, x[:0], 1.0)) == 0


def test_bounds_do_not_depend_on_the_unit_of_the_input_where_all_centres_are_zero():
    """At the kink of abs the slopes are [-1, 1] and no neuron has a linear part, from which D would be guessed."""
    rng = np.random.default_rng(0)
    w = [rng.standard_normal(size) for size in ((20, 7), (16, 20), (14, 16))]
    found = []
    for unit in (1.0, 2.0**8):
        form = lb.from_weights([w[0] / unit, *w[1:]], activation="abs")
        bound = lb.local(form, np.zeros((1, 7)), 0.3 * unit, norm=np.inf, progress=False)
        found.append(bound.value[0] * unit)
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("norm", [2, np.inf])
def test_pairs_are_finite_where_the_ellipsoids_are_not_and_the_bound_has_none(norm):
    """Squares of the middle layer leave the range of float64: what is left is the constant of the whole network."""
    rng = np.random.default_rng(0)
    w = [rng.standard_normal(size) for size in ((6, 3), (5, 6), (3, 5))]
    form = lb.from_weights([w[0], w[1] * 2.0**300, w[2] * 2.0**-300])
    bound = lb.liplt(form, norm=norm)
    found = lb.local(form, np.ones((1, 3)), 0.3, norm=norm, pairwise=True, bound=bound, progress=False)
    assert found[0].value == bound.value
    assert found[0].pairwise.max() == bound.any_pair() and not found[0].pairwise.diagonal().any()
