"""Searches in float32 for multipliers and radii around inputs: no proof trusts them, and float64 takes over."""

import weakref

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from balls import in_ball, jacobians, values
from test_local_columns import conv_net, exact, least_eigenvalue

import lipbounds as lb
from lipbounds._local import ellipsoids, engines, multipliers, passes, stages
from lipbounds._local.radius_search import ratios, row_roots
from lipbounds._norms.enclosures import Enclosure

EPS = 0.3


@pytest.fixture(autouse=True)
def single(monkeypatch):
    """Every network is wide and searched in float32, by ellipsoids alone."""
    monkeypatch.setattr(engines, "_READY", weakref.WeakKeyDictionary())
    monkeypatch.setattr(engines, "TAIL", 0)
    monkeypatch.setattr(engines, "_SINGLE", 0)
    monkeypatch.setattr(engines, "ways", lambda *_: ("ellipsoids",))


def case(skip=False, count=4):
    form = conv_net(skip)
    x = np.random.default_rng(4).standard_normal((count, 8, 8, 2)).astype(np.float32)
    return form, x, values(form, x).argmax(axis=1), lb.liplt(form, pairwise=True)


def radii(form, x, y, bound, **options):
    return lb.certified_radius(form, x, y, bound=bound, local=True, guarantee="verified", **options).radius


def around(form, x):
    return engines.Around(form, 2, np.asarray(x, np.float64), way="ellipsoids")


def constants(near, y, eps=EPS):
    """(N,) roots of the largest eigenvalues of what is proved on balls of radius eps."""
    out = near.outputs(slice(None), np.full(len(y), eps), labels=y)[:, 0]
    return np.sqrt(np.linalg.eigvalsh(out)[:, -1])


def counted(monkeypatch):
    """The precision of every recursion."""
    real, seen = ellipsoids.ellipsoids, []

    def look(view, steps, start, *args, **options):
        passed = real(view, steps, start, *args, **options)
        assert passed.s.dtype == getattr(start, "b", start).dtype
        seen.append(passed.s.dtype.name)
        return passed

    monkeypatch.setattr(ellipsoids, "ellipsoids", look)
    return seen


@pytest.mark.parametrize("skip", [False, True])
def test_one_proof_ends_a_search_in_float32(skip, monkeypatch):
    form, x, y, bound = case(skip, 1)
    monkeypatch.setattr(engines, "_SINGLE", 10**6)
    by_proofs = radii(form, x, y, bound)
    monkeypatch.setattr(engines, "_SINGLE", 0)
    seen = counted(monkeypatch)
    found = radii(form, x, y, bound)
    assert seen.count("float64") == 1 and seen[-1] == "float64" and seen.count("float32") > 3
    assert (found > 0.995 * by_proofs).all() and (found < 1.03 * by_proofs).all()


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_radii_by_wrong_estimates_are_found_again_by_proofs(factor, monkeypatch):
    """Constants are said to be much smaller, so that the ball to be proved is too large; or much larger."""
    net = case()
    honest, real = radii(*net), engines.Around.estimates
    monkeypatch.setattr(engines.Around, "estimates", lambda *args, **options: factor * real(*args, **options))
    found = radii(*net)
    assert (found > 0.98 * honest).all() and (found < 1.02 * honest).all()


def test_a_radius_is_what_the_proof_says(monkeypatch):
    """Where the proofs give larger constants than all estimates, radii are smaller."""
    net = case()
    honest, real = radii(*net), engines.Around.outputs
    monkeypatch.setattr(engines.Around, "outputs", lambda *args, **options: 4.0 * real(*args, **options))
    found = radii(*net)
    assert (found < 0.7 * honest).all()


@pytest.mark.parametrize("wrong", [0.0, 0.5, 1e9, np.nan, -1.0])
def test_constants_hold_with_any_multipliers(wrong, monkeypatch):
    """D below Q, which is not feasible, far too large, or nothing at all."""
    form, x, y, _ = case()
    honest = constants(around(form, x), y)
    monkeypatch.setattr(multipliers, "stepped", lambda relative, *_: np.full_like(relative, wrong))
    found = constants(around(form, x), y)
    slopes = np.linalg.norm(jacobians(form, x), 2, axis=(1, 2))
    assert (found >= slopes * (1 - 1e-9)).all()
    assert (found < 3 * honest).all()  # the multipliers of the first recursion were good


def test_a_search_that_misleads_is_repeated_in_float64(monkeypatch):
    """Float32 says that far too small ellipsoids are proved: the multipliers are searched for again."""
    form, x, y, _ = case()
    honest, real = constants(around(form, x), y), ellipsoids.ellipsoids

    def wrong(view, steps, start, *args, **options):
        passed = real(view, steps, start, *args, **options)
        if passed.s.dtype == np.float64:
            return passed
        balance = [(np.full_like(a, 1e6), b) for a, b in passed.balance]
        return passed._replace(s=passed.s / 100, score=passed.score / 100, balance=balance)

    monkeypatch.setattr(ellipsoids, "ellipsoids", wrong)
    near = around(form, x)
    found = constants(near, y)
    assert near.passes.refused.all()
    assert (found < 1.02 * honest).all()
    monkeypatch.setattr(passes, "_LOST", np.inf)
    assert (constants(around(form, x), y) > 1.5 * honest).all()


def scaled_net(scale):
    """Of one function for every scale: weights of the first layer times it, of the second over it."""
    rng = np.random.default_rng(5)
    w1, w2, w3 = (rng.standard_normal(s) / np.sqrt(s[1]) for s in ((30, 12), (20, 30), (4, 20)))
    b1, b2 = rng.standard_normal(30), rng.standard_normal(20)
    return lb.from_weights([w1 * scale, w2 / scale, w3], biases=[b1 * scale, b2, np.zeros(4)])


def test_what_float32_cannot_hold_is_searched_in_float64(monkeypatch):
    x = np.random.default_rng(6).standard_normal((3, 12))
    plain, large = scaled_net(1.0), scaled_net(2.0**70)
    y = values(plain, x).argmax(axis=1)
    seen = counted(monkeypatch)
    want = [constants(around(plain, x), y), radii(plain, x, y, lb.liplt(plain, pairwise=True))]
    assert "float32" in seen
    seen.clear()
    near = around(large, x)
    found = [constants(near, y), radii(large, x, y, lb.liplt(large, pairwise=True))]
    assert near.passes.refused.all() and seen.count("float64") > seen.count("float32")
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.01)


def test_an_image_does_not_depend_on_its_batch(monkeypatch):
    """Up to the order of a few sums; one example of the batch needs float64, and the others do not notice."""
    form, x, y, bound = case(count=5)
    real, centre = ellipsoids.ellipsoids, around(form, x).values.y[0][1, 0]

    def refuse(view, steps, start, values, *args, **options):
        passed = real(view, steps, start, values, *args, **options)
        if passed.s.dtype == np.float32:
            passed.s[values.y[0][:, 0] == centre] = np.nan
        return passed

    monkeypatch.setattr(ellipsoids, "ellipsoids", refuse)
    together, near = radii(form, x, y, bound), around(form, x)
    values_together = constants(near, y)
    assert near.passes.refused.tolist() == [False, True, False, False, False]
    monkeypatch.setattr(engines, "_CHUNK", 1)
    np.testing.assert_allclose(radii(form, x, y, bound), together, rtol=1e-12)
    for i in range(5):
        alone = constants(around(form, x[i : i + 1]), y[i : i + 1])
        np.testing.assert_allclose(alone, values_together[i : i + 1], rtol=1e-12)


def test_a_later_pass_never_takes_anything_away(monkeypatch):
    form = conv_net()
    x = np.random.default_rng(4).standard_normal((5, 8, 8, 2)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    eps = np.full(5, 0.3)

    def ratios_of(count):
        monkeypatch.setattr(passes, "_PASSES", count)
        around = engines.Around(form, 2, x, way="ellipsoids")
        roots = row_roots(around.outputs(slice(None), eps, labels=y), y)
        gaps = around.z[np.arange(5), y][:, None] - around.z
        gaps[np.arange(5), y] = np.inf
        return ratios(gaps, roots)

    one, three = ratios_of(1), ratios_of(3)
    assert (three >= one).all() and (three > 1.01 * one).any()


@pytest.mark.parametrize("skip", [False, True])
def test_no_point_of_a_ball_changes_the_class(skip):
    form, x, y, bound = case(skip)
    found = radii(form, x, y, bound)
    step = in_ball(x, 1.0, 2, 200, np.random.default_rng(2)) - x
    moved = x + step * found.reshape(-1, 1, 1, 1) * (1 - 1e-9)
    assert (values(form, moved.reshape(-1, 8, 8, 2)).argmax(axis=1).reshape(200, -1) == y).all()


def test_recursions_end_where_every_margin_is_positive(monkeypatch):
    form, x, y, _ = case(count=2)
    seen, small = counted(monkeypatch), np.full(2, 1e-3)
    for enough in (True, False):
        around(form, x).outputs(slice(None), small, labels=y, enough=enough)
    assert seen == ["float32", "float64", *seen[2:]] and len(seen) > 4


# --- what lives on -------------------------------------------------------------------------------------------------


def residual_net(scale):
    """Blocks h + W relu(h): what lives on is what the activation reads. A scale that is no power of two rounds."""
    rng = np.random.default_rng(7)
    w = [
        jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), jnp.float32)
        for s in ((6, 9), (9, 9), (9, 9), (9, 4))
    ]

    def net(x):
        h = (x if scale == 1.0 else x / scale) @ w[0]
        for k in (1, 2):
            h = h + jax.nn.relu(h) @ w[k]
        return jax.nn.relu(h) @ w[3]

    return lb.trace(net, jax.ShapeDtypeStruct((6,), jnp.float32))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_rows_that_live_on_are_carried_once(scale, monkeypatch):
    form = residual_net(scale)
    x = np.random.default_rng(8).standard_normal((3, 6)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    near = around(form, x)
    assert [s.rows for s in near.ready.stages] == [9, 9, 9] and near.ready.stages[1].lives_on
    assert (near.ready.stages[0].gap > 0) == (scale == 3.0)
    got = constants(near, y)

    def apart(w, h):
        to = np.arange(h.shape[0])
        return stages.enclosures.stack([w, h]), w.shape[0] + to, to, 0.0

    engines._READY.clear()
    monkeypatch.setattr(stages, "_distinct", apart)
    near = around(form, x)
    assert near.ready.stages[0].rows > 9
    np.testing.assert_allclose(got, constants(near, y), rtol=1e-4)


def test_what_rounding_keeps_apart_is_covered():
    """(E T_real s + (H_real - E T_real) s) of every s s' <= S_before, with the difference as bad as `gap` allows."""
    rng = np.random.default_rng(9)
    w, shape, error = rng.standard_normal((3, 5)), (4, 5), 1e-3
    h = np.zeros(shape)
    h[[0, 1, 3]] = w[[2, 0, 2]]
    both, of, to, gap = stages._distinct(Enclosure(w, error), Enclosure(h, error))
    assert both.shape == w.shape and of.tolist() == [2, 0, 2] and to.tolist() == [0, 1, 3]
    off_h, off_t = rng.standard_normal(shape), rng.standard_normal(w.shape)
    off_h, off_t = (a * error / np.linalg.norm(a) for a in (off_h, off_t))
    carried = np.zeros(shape)
    carried[to] = (w + off_t)[of]
    assert np.linalg.norm(h + off_h - carried, 2) < gap < 10 * error
    root = rng.standard_normal((5, 5))
    before = root @ root.T
    s = (carried @ before @ carried.T)[None].copy()
    ellipsoids._widen(s, gap, np.array([np.linalg.norm(before, 2) * 1.01]))
    with mpmath.workdps(40):
        # the increments ds+ = carried ds + d of ds = root u, d = gap |ds| v, that are worst for some directions
        for a in rng.standard_normal((50, 4)):
            straight = a @ carried @ root
            u = straight / np.linalg.norm(straight)
            worst = abs(straight @ u) + gap * np.linalg.norm(root @ u) * np.linalg.norm(a)
            assert exact(a[None] @ s[0] @ a[:, None])[0] >= worst**2
    assert least_eigenvalue(exact(s[0])) > 0


@pytest.mark.parametrize("outputs", [1, 2])
def test_outputs_that_cancel_in_float32_are_searched_in_float64(outputs):
    """Two copies of every neuron whose weights nearly cancel: in float32 the square of a constant may be negative."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((300, 20)).astype(np.float32) / 4
    last = rng.standard_normal((outputs, 300)).astype(np.float32)
    rest = 1e-5 * rng.standard_normal((outputs, 300)).astype(np.float32)
    start = rng.standard_normal((20, 10)).astype(np.float32)
    w = [start, np.concatenate([first, first]), np.concatenate([last, rest - last], axis=1)]
    biases = [np.full(20, 0.1), np.full(600, 0.3), 1e-3 * np.arange(1, outputs + 1)]
    form = lb.from_weights(w, biases=biases, activation="relu")
    x = rng.standard_normal((4, 10)).astype(np.float32)
    z = values(form, x)
    y = np.ones(4, int) if outputs == 1 else z.argmax(axis=1)
    bound = lb.liplt(form, pairwise=outputs > 1)
    alone = lb.certified_radius(form, x, y, bound=bound).radius
    right = alone > 0
    assert right.sum() >= 2
    assert (radii(form, x, y, bound)[right] > 50 * alone[right]).all()
