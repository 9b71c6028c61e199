"""Square: it finds by queries alone, never leaves ball or box, and draws what the paper says."""

import functools
import importlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lipbounds.analysis import attack_search
from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.square import square

module = importlib.import_module("lipbounds.analysis.square")  # the package exports the function of this name
NORMS = [2, math.inf]
SHAPE = (6, 5, 2)


def linear(rng, shape=SHAPE):
    """(fn, distances, x, y) of a classifier with two classes; distance of x in a norm, without a box."""
    w = rng.normal(size=(math.prod(shape), 2)).astype(np.float32)
    x = rng.random((24, *shape), np.float32)
    row = (w[:, 0] - w[:, 1]).astype(np.float64)
    y = (x.reshape(24, -1) @ w).argmax(1)
    gap = np.abs(x.reshape(24, -1).astype(np.float64) @ row)
    size = {2: np.linalg.norm(row), math.inf: np.abs(row).sum()}
    return lambda b: b.reshape(len(b), -1) @ w, {p: gap / size[p] for p in NORMS}, x, y


@pytest.fixture(scope="module")
def net():
    rngs = nnx.Rngs(0)
    first, last = nnx.Linear(60, 24, rngs=rngs), nnx.Linear(24, 4, rngs=rngs)
    return lambda x: last(jnp.abs(first(3 * x.reshape(len(x), -1))))


def images(rng, net, count=30):
    x = rng.random((count, *SHAPE), np.float32)
    return x, np.asarray(net(jnp.asarray(x))).argmax(1)


# ------------------------------------------------------------------------------------------- what must be found
@pytest.mark.sampled(4)
@pytest.mark.parametrize(("norm", "above"), [(2, 1.6), (math.inf, 1.15)])
@pytest.mark.parametrize("shape", [SHAPE, (30,)])
def test_a_linear_classifier_is_broken_above_its_distance_and_never_below(rng, norm, above, shape):
    fn, exact, x, y = linear(rng, shape)
    options = {"norm": norm, "low": -100.0, "high": 100.0, "queries": 1500}
    inside = square(fn, x, y, 0.999 * exact[norm], **options)
    assert inside.correct.all() and not inside.success.any()
    outside = square(fn, x, y, above * exact[norm], **options)
    assert outside.success.mean() > 0.95
    assert (outside.distance[outside.success] >= 0.999 * exact[norm][outside.success]).all()
    assert (outside.distance[outside.success] <= outside.eps[outside.success]).all()


@pytest.mark.slow
def test_a_network_without_gradients_is_broken(rng, net):
    x, y = images(rng, net)

    def steps(b):
        return net(jnp.round(b * 16) / 16)

    y = np.asarray(steps(jnp.asarray(x))).argmax(1)
    assert not pgd(steps, x, y, 0.15, norm=math.inf, steps=20).success.any()
    assert square(steps, x, y, 0.15, norm=math.inf, queries=300).success.mean() > 0.5


def test_gradients_are_never_asked_for(rng, net):
    @jax.custom_jvp
    def guarded(b):
        return net(b)

    @guarded.defjvp
    def _(primals, tangents):
        raise AssertionError("differentiated")

    x, y = images(rng, net)
    with pytest.raises(AssertionError, match="differentiated"):
        pgd(guarded, x, y, 0.1, steps=1)
    assert square(guarded, x, y, 0.1, norm=math.inf, queries=5).correct.all()


# ------------------------------------------------------------------------------------------------ ball and box
@pytest.mark.parametrize("norm", NORMS)
def test_every_point_lies_in_ball_and_box_exactly(rng, net, norm):
    box = 0.11, 0.91  # float32 rounds 0.11 down and 0.91 up
    x = np.float32(0.5) + np.float32(0.39) * (2 * images(rng, net)[0] - 1)
    y = rng.integers(0, 4, len(x))
    eps = rng.uniform(0, 0.6, len(x))
    eps[:3] = 0, 1e-7, np.inf
    attack = square(net, x, y, eps, norm=norm, queries=60, low=box[0], high=box[1])
    point = attack.adversarial.astype(np.float64)
    assert attack.adversarial.dtype == np.float32 and point.min() >= box[0] and point.max() <= box[1]
    shift = np.abs(point - x).reshape(len(x), -1)
    far = shift.max(1) if norm == math.inf else np.array([math.sqrt(math.fsum(row * row)) for row in shift])
    assert (far <= eps).all() and (far > 0).sum() > 5
    np.testing.assert_array_equal(point[~attack.correct], x[~attack.correct])
    assert not attack.success[~attack.correct].any() and not attack.correct.all()
    assert (attack.margin <= pgd(net, x, y, 0.0, steps=0, low=box[0], high=box[1]).margin + 1e-5).all()


# ------------------------------------------------------------------------------------------------ what is drawn
@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_drawn_depends_on_the_seed_and_on_no_batch(rng, net, norm):
    x, y = images(rng, net)
    options = {"norm": norm, "queries": 80}
    whole = square(net, x, y, 0.1, **options)
    np.testing.assert_array_equal(square(net, x, y, 0.1, **options).adversarial, whole.adversarial)
    np.testing.assert_allclose(
        square(net, x, y, 0.1, batch_size=7, **options).margin, whole.margin, atol=1e-5
    )
    assert not np.array_equal(square(net, x, y, 0.1, seed=1, **options).adversarial, whole.adversarial)
    both = square(net, x[[0, 0]], y[[0, 0]], 0.1, **options).adversarial
    assert not np.array_equal(both[0], both[1])


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_scan_of_accelerators_asks_the_same(rng, net, norm, monkeypatch):
    x, y = images(rng, net)
    stepwise = square(net, x, y, 0.1, norm=norm, queries=150)
    monkeypatch.setattr(attack_search.Problem, "stride", lambda problem, steps: 1)
    scanned = square(net, x, y, 0.1, norm=norm, queries=150)
    np.testing.assert_array_equal(scanned.success, stepwise.success)
    np.testing.assert_allclose(scanned.margin, stepwise.margin, atol=1e-4)
    assert 0 < scanned.success.sum() < len(x) or norm == 2


@pytest.mark.slow
def test_the_search_ends_with_the_first_success():
    def fn(x):  # about half of all stripes break it, and squares go on to break it by more
        total = (x - np.float32(0.5)).sum(axis=1, keepdims=True)
        return jnp.concatenate([np.float32(0.01) - total, jnp.zeros_like(total)], axis=1)

    x, y = np.full((40, 31), 0.5, np.float32), np.zeros(40, int)
    start, longer = (square(fn, x, y, 0.1, norm=math.inf, queries=n) for n in (1, 70))
    assert 5 < start.success.sum() < 35 and longer.success.all()
    np.testing.assert_array_equal(start.adversarial[start.success], longer.adversarial[start.success])
    calls = []
    counted = lambda b: fn(b) + jax.pure_callback(_count(calls), jnp.zeros((40, 2)), b)  # noqa: E731
    square(counted, x, y, 0.1, norm=math.inf, queries=1000)
    assert len(calls) < 200


def _count(calls):
    def tick(b):
        calls.append(1)
        return np.zeros((len(b), 2), np.float32)

    return tick


@pytest.mark.slow
def test_a_window_that_would_not_change_gets_the_opposite_signs(monkeypatch):
    def fn(x):
        total = x.sum(axis=(1, 2))
        return jnp.concatenate([total - np.float32(3), jnp.zeros_like(total)], axis=1)

    x = np.full((40, 6, 1, 1), 0.51, np.float32)  # all pixels go up together or down together
    monkeypatch.setattr(module, "_HALVINGS", ())  # every window is the whole image
    options = {"norm": math.inf, "p_init": 1.0}
    first = square(fn, x, np.zeros(40, int), 0.1, queries=1, **options).success
    assert 5 < first.sum() < 35
    assert square(fn, x, np.zeros(40, int), 0.1, queries=2, **options).success.all()


def test_a_start_in_stripes_and_a_start_in_bumps():
    x = jnp.full((50, *SHAPE), 0.5, jnp.float32)
    where = (x, jnp.full(50, 0.25, jnp.float32), np.float32(-9), np.float32(9))
    stripes = np.asarray(module._start(jax.random.key(0), jnp.arange(50), where, math.inf)) - 0.5
    np.testing.assert_allclose(np.abs(stripes), 0.25, rtol=1e-6)
    assert (stripes == stripes[:, :1]).all() and abs(stripes[:, 0].mean()) < 0.05
    bumps = np.asarray(module._start(jax.random.key(0), jnp.arange(50), where, 2.0)) - 0.5
    np.testing.assert_allclose(np.linalg.norm(bumps.reshape(50, -1), axis=1), 0.25, rtol=1e-5)


def test_a_square_changes_one_window_to_plus_or_minus_eps(rng):
    x = jnp.asarray(rng.random((9, 8, 3), np.float32))
    point = x + jnp.asarray(rng.uniform(-0.1, 0.1, (9, 8, 3)).astype(np.float32))
    drawn = module._uniform(jax.random.key(0), jnp.arange(500), 8)
    change = functools.partial(module._square, size=jnp.asarray([3, 2]))
    corners, signs = set(), set()
    for moved in np.asarray(
        jax.jit(jax.vmap(change, (0, None, None, None)))(drawn, x, point, jnp.float32(0.1))
    ):
        changed = np.argwhere((moved != np.asarray(point)).any(2))
        corners.add(tuple(int(c) for c in changed.min(0)))
        assert (changed.max(0) - changed.min(0) == [2, 1]).all() and len(changed) == 6
        shift = (moved - np.asarray(x))[tuple(changed.T)]
        np.testing.assert_allclose(np.abs(shift), 0.1, atol=1e-6)
        assert (np.sign(shift) == np.sign(shift[0])).all()
        signs.add(tuple(int(c) for c in np.sign(shift[0])))
    assert corners == {(i, j) for i in range(7) for j in range(7)} and len(signs) == 8


def test_mass_moves_from_one_window_to_another_and_fills_the_ball(rng):
    x = jnp.asarray(rng.random((9, 8, 3), np.float32))
    v = rng.normal(size=(9, 8, 3))
    point = x + jnp.asarray((0.6 * 0.4 * v / np.linalg.norm(v)).astype(np.float32))
    drawn = module._uniform(jax.random.key(0), jnp.arange(60), 8)
    change = functools.partial(module._moved_mass, size=jnp.asarray([3, 3]))
    emptied = 0
    for moved in np.asarray(
        jax.jit(jax.vmap(change, (0, None, None, None)))(drawn, x, point, jnp.float32(0.4))
    ):
        shift = (moved - np.asarray(x)).astype(np.float64)
        np.testing.assert_allclose(np.linalg.norm(shift), 0.4, rtol=1e-5)
        changed = (moved != np.asarray(point)).any(2)
        emptied += ((np.abs(shift).max(2) == 0) & changed).any()
        assert 9 <= changed.sum() <= 18
    assert emptied > 45  # the second window, except for what the first covers of it


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (6, 6), (7, 7), (1, 8), (5, 4)])
def test_bumps_are_those_of_the_paper(rows, columns):
    """eta = sum over k = 0..M of 1/(n + 1 - k)^2 with n = h1 // 2, of two halves with opposite signs."""

    def hump(r, s, h1, h2):  # 1-based, as in the paper
        n = max(h1, h2) // 2
        m = n - max(abs(r - h1 // 2 - 1), abs(s - h2 // 2 - 1))
        return sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))

    half = columns // 2
    expected = np.zeros((9, 9))
    for r in range(1, rows + 1):
        for s in range(1, columns + 1):
            left = s <= half
            expected[r, s + 0] = hump(r, s, rows, half) if left else -hump(r, s - half, rows, columns - half)
    at = jnp.arange(9, dtype=jnp.int32) - 1
    found = module._bump(at[:, None, None], at[None, :, None], rows, columns, jnp.bool_(True), 9)
    np.testing.assert_allclose(np.asarray(found)[:, :, 0], expected, rtol=1e-5, atol=1e-6)
    turned = module._bump(at[:, None, None], at[None, :, None], columns, rows, jnp.bool_(False), 9)
    if rows > 1:
        np.testing.assert_allclose(np.asarray(turned)[:, :, 0], expected.T, rtol=1e-5, atol=1e-6)


def test_windows_shrink_at_the_shares_of_the_paper():
    sizes = module._windows(28, 28, 10_000, 0.05, 1)
    at = [0, 9, 10, 50, 200, 1000, 2000, 4000, 6000, 8000]
    exact = [math.sqrt(0.05 * 784 / 2**k) for k in (0, 0, 1, 2, 3, 4, 5, 6, 7, 8)]
    np.testing.assert_array_equal(sizes[at, 0], [max(round(s), 1) for s in exact])
    assert (sizes[:, 0] == sizes[:, 1]).all()
    large = module._windows(280, 280, 10_000, 0.05, 1)[:, 0]  # where no two sides round to the same
    ends = [0, 10, 50, 200, 1000, 2000, 4000, 6000, 8000, 10_000]
    for k, (begin, end) in enumerate(itertools.pairwise(ends)):
        assert set(large[begin:end]) == {round(math.sqrt(0.05 * 280**2 / 2**k))}
    np.testing.assert_array_equal(
        module._windows(28, 28, 1000, 0.05, 1)[[0, 1, 5, 20]], sizes[[0, 10, 50, 200]]
    )
    assert module._windows(28, 28, 100, 0.05, 3).min() == 3
    np.testing.assert_array_equal(module._windows(1, 60, 10, 0.5, 1)[0], [1, 30])
    np.testing.assert_array_equal(module._windows(60, 2, 10, 0.5, 3)[0], [30, 2])


# ----------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries must be a whole number >= 1"),
        ({"p_init": 0.0}, r"p_init must be in \(0, 1\], got 0.0"),
        ({"p_init": math.nan}, "p_init must be in"),
        ({"norm": 1}, "norm 2 or inf, not 1"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"y": np.full(30, 4)}, "labels must lie in 0..3"),
        ({"x": np.full((30, 3, 2, 5, 2), 0.5, np.float32)}, r"images \(N, H, W, C\)"),
        ({"x": np.full((30, *SHAPE), 2.0, np.float32)}, "set low and high"),
    ],
)
def test_bad_input_is_refused(rng, net, change, message):
    x, y = images(rng, net)
    given = {"fn": net, "x": x, "y": y, "eps": 0.1, "queries": 2} | change
    with pytest.raises(ValueError, match=message):
        square(given.pop("fn"), given.pop("x"), given.pop("y"), given.pop("eps"), **given)


@pytest.mark.slow
def test_logits_that_are_not_finite_away_from_x_are_no_success():
    def fn(x):
        moved = jnp.abs(x - np.float32(0.5)).sum(axis=1, keepdims=True)
        return jnp.concatenate([jnp.where(moved > 0, jnp.nan, 1.0), jnp.zeros_like(moved)], axis=1)

    attack = square(fn, np.full((3, 8), 0.5, np.float32), np.zeros(3, int), 0.1, queries=20)
    assert attack.correct.all() and not attack.success.any() and (attack.margin == 1).all()
