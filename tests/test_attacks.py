"""PGD: it finds what must be found, never leaves ball or box, and says so exactly."""

import itertools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from flax import nnx

from lipbounds.analysis import apgd, attack_search, attacks, fab, random_targets
from lipbounds.analysis.attacks import fgsm, pgd

NORMS = [2, math.inf]


def linear(rng, n=(3, 2, 1), classes=3):
    """(fn, w, b): logits of a linear classifier, weights (size, K)."""
    w = rng.normal(size=(math.prod(n), classes)).astype(np.float32)
    b = rng.normal(size=classes).astype(np.float32)
    return lambda x: x.reshape(len(x), -1) @ w + b, w.astype(np.float64), b.astype(np.float64)


def distances(w, b, x, y, norm):
    """The exact distance of every x (N, size) to the nearest point that is not classified y, without a box."""
    z = x @ w + b
    rows = w.T[:, None] - w.T[None]
    size = np.abs(rows).sum(-1) if norm == math.inf else np.sqrt(np.square(rows).sum(-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (z[np.arange(len(x)), y][:, None] - z) / size[y]
    return np.where(np.arange(w.shape[1]) == y[:, None], np.inf, ratio).min(1)


def network(seed=0, widths=(12, 16, 16, 4)):
    rngs = nnx.Rngs(seed)

    class Net(nnx.Module):
        traced = 0

        def __init__(self):
            self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

        def __call__(self, x):
            Net.traced += 1
            h = x.reshape(len(x), -1) * 3
            for layer in self.layers[:-1]:
                h = jnp.abs(layer(h))
            return self.layers[-1](h)

    return Net()


@pytest.fixture(scope="module")
def net():
    return network()


def images(rng, count=40, model=None):
    x = rng.random((count, 2, 6, 1), np.float32)
    return (x, np.asarray(model(jnp.asarray(x))).argmax(1)) if model is not None else x


# ------------------------------------------------------------------------------------------- what must be found
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("loss", "classes", "above"), [("margin", 2, 1.005), ("ce", 2, 1.005), ("margin", 3, 1.3)]
)
def test_a_linear_classifier_is_broken_just_above_its_distance_and_never_below(
    rng, norm, loss, classes, above
):
    fn, w, b = linear(rng, classes=classes)
    x = rng.random((30, 3, 2, 1), np.float32)
    y = (x.reshape(30, -1) @ w + b).argmax(1)
    exact = distances(w, b, x.reshape(30, -1).astype(np.float64), y, norm)
    options = {"norm": norm, "loss": loss, "low": -100.0, "high": 100.0, "steps": 60}
    inside = pgd(fn, x, y, 0.999 * exact, **options)
    assert inside.correct.all() and not inside.success.any() and inside.accuracy == 1.0
    assert np.isinf(inside.distance).all() and (inside.margin > 0).all()
    outside = pgd(fn, x, y, above * exact, **options)
    won = outside.success
    # of several classes, the one of the smallest margin need not be the nearest
    assert won.all() if classes == 2 else won.mean() > 0.9
    assert (outside.distance[won] >= 0.999 * exact[won]).all() and (
        outside.distance[won] <= outside.eps[won]
    ).all()
    assert np.isinf(outside.distance[~won]).all() and outside.accuracy == 1 - won.mean()
    np.testing.assert_array_equal(
        attack_search.length(outside.adversarial, x, norm)[won], outside.distance[won]
    )


def test_the_box_is_part_of_the_problem(rng):
    """Two classes and an active box: the least change is clip(t w), found by bisection here."""
    n = 24
    w = rng.normal(size=n)
    x = rng.choice([0.0, 1.0, 0.5], size=(20, n)).astype(np.float32)
    reach = np.array([(np.clip(row - 50 * w, 0, 1) - row) @ -w for row in x.astype(np.float64)])
    b = -(x @ w) + 0.6 * reach  # margin 0.6 of what the box allows to take away
    weights = np.stack([w, np.zeros(n)], 1).astype(np.float32)

    def distance(row, margin):
        low, high = 0.0, 50.0
        for _ in range(80):
            t = (low + high) / 2
            low, high = (t, high) if (row - np.clip(row - t * w, 0, 1)) @ w < margin else (low, t)
        return np.linalg.norm(np.clip(row - high * w, 0, 1) - row)

    exact = np.array([distance(row, 0.6 * r) for row, r in zip(x.astype(np.float64), reach, strict=True)])
    names = np.eye(20, dtype=np.float32)  # says which image it is, so that every one has an offset of its own

    def fn(batch):
        own = jax.lax.stop_gradient(batch[:, n:] @ b.astype(np.float32))
        return batch[:, :n] @ weights + jnp.stack([own, jnp.zeros_like(own)], axis=1)

    batch = np.concatenate([x, names], axis=1)
    for factor, broken in ((0.995, False), (1.01, True)):
        attack = pgd(fn, batch, np.zeros(20, int), factor * exact)
        assert attack.correct.all() and (attack.success == broken).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [(0.0, 1.0), (0.11, 0.91)])  # float32 rounds 0.11 down and 0.91 up
def test_every_point_lies_in_ball_and_box_exactly(rng, net, norm, box):
    x = np.float32(0.5) + np.float32(0.39) * (2 * images(rng) - 1)
    y = rng.integers(0, 4, len(x))
    eps = rng.uniform(0, 0.5, len(x))
    eps[:3] = 0, 1e-7, np.inf
    attack = pgd(net, x, y, eps, norm=norm, steps=15, restarts=2, step_size=0.3, low=box[0], high=box[1])
    point = attack.adversarial
    assert (
        point.dtype == np.float32
        and point.astype(float).min() >= box[0]
        and point.astype(float).max() <= box[1]
    )
    shift = np.abs(point.astype(np.float64) - x).reshape(len(x), -1)
    far = shift.max(1) if norm == math.inf else np.array([math.sqrt(math.fsum(row * row)) for row in shift])
    assert (far <= eps).all() and (attack.correct & (far > 0.9 * eps)).sum() > 5
    np.testing.assert_array_equal(point[~attack.correct], x[~attack.correct])
    assert not attack.success[~attack.correct].any()
    assert attack.accuracy == np.mean(attack.correct & ~attack.success)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_goes_along_the_box_and_ends_in_ball_and_box(rng, norm):
    x = rng.random((20, 9), np.float32)
    x[:, :3], x[:, 3:6] = 0, 1
    where = (jnp.asarray(x), jnp.full(20, 0.3, jnp.float32), np.float32(0), np.float32(1))
    gradient = rng.normal(size=x.shape).astype(np.float32) * np.float32(1e-25)
    direction = np.asarray(attacks.steepest(jnp.asarray(gradient), where[0], where, norm))
    free = ((x > 0) | (gradient > 0)) & ((x < 1) | (gradient < 0))
    assert not direction[~free].any() and (np.sign(direction) == np.sign(gradient))[free].all()
    size = np.abs(direction).max(1) if norm == math.inf else np.linalg.norm(direction, axis=1)
    np.testing.assert_allclose(size, 1, rtol=1e-5)
    moved = (
        x + rng.normal(size=x.shape).astype(np.float32) * np.logspace(-3, 1, 20, dtype=np.float32)[:, None]
    )
    point = np.asarray(attack_search.project(jnp.asarray(moved), where, norm))
    assert (
        point.min() >= 0
        and point.max() <= 1
        and (attack_search.length(point, x, norm) <= 0.3 * (1 + 1e-5)).all()
    )
    near = attack_search.length(moved, x, norm) <= 0.3
    np.testing.assert_allclose(point[near], moved[near].clip(0, 1), atol=1e-6)
    assert near.any() and not near.all()


def test_points_that_rounding_left_outside_are_brought_back(rng, monkeypatch):
    x = rng.random((50, 300), np.float32)
    v = rng.normal(size=(50, 300))
    eps = rng.uniform(1e-3, 0.2, 50)
    outside = (x + v / np.linalg.norm(v, axis=1)[:, None] * (eps * (1 + 1e-6))[:, None]).astype(np.float32)
    box = (np.float32(-9), np.float32(9))
    settled = attack_search.settle(x, outside, eps, 2, box)
    far = np.array([math.sqrt(math.fsum(row * row)) for row in settled.astype(np.float64) - x])
    assert (far <= eps).all() and (far > 0.999 * eps).all()
    unit, far = (np.float32(0), np.float32(1)), np.full(50, 9999.0)
    np.testing.assert_array_equal(attack_search.settle(x, x + np.sign(v) * 2, far, 2, unit), v > 0)
    broken = np.full_like(x, np.nan)
    np.testing.assert_array_equal(attack_search.settle(x, broken, eps, 2, box), x)
    monkeypatch.setattr(attack_search, "_SHRINKS", 0)  # where no shrinking helps, x itself is the point
    np.testing.assert_array_equal(attack_search.settle(x, outside, eps, 2, box), x)


def test_a_tie_is_a_success_and_no_correct_answer():
    def fn(x):  # tied wherever x <= 1/2
        return jnp.concatenate([jax.nn.relu(x - np.float32(0.5)), jnp.zeros_like(x)], axis=1)

    attack = pgd(fn, np.float32([[1.0], [1.0], [0.25]]), np.zeros(3, int), np.array([0.4, 0.6, 0.6]))
    assert attack.correct.tolist() == [True, True, False]
    assert attack.success.tolist() == [False, True, False]
    assert attack.margin[1] == 0.0 and attack.accuracy == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------ how it searches
@pytest.mark.parametrize("norm", NORMS)
def test_restarts_help_or_equal(rng, net, norm):
    x, y = images(rng, 60, net)
    eps = 0.25 if norm == 2 else 0.1
    found = [pgd(net, x, y, eps, norm=norm, steps=10, restarts=r, seed=4) for r in (1, 2, 5)]
    for few, many in itertools.pairwise(found):
        assert (many.margin <= few.margin).all()
    assert (found[2].margin < found[0].margin - 1e-3).sum() > 5
    other = pgd(net, x, y, eps, norm=norm, steps=10, restarts=2, seed=5)
    assert not np.array_equal(other.adversarial, found[1].adversarial)


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_is_uniform_in_the_ball(norm):
    x = jnp.zeros((4000, 2), jnp.float32)
    where = (x, jnp.full(4000, 2.0, jnp.float32), np.float32(-9), np.float32(9))
    point = np.asarray(attacks.uniform_start(jax.random.key(1), jnp.arange(4000), where, norm), np.float64)
    far = np.abs(point).max(1) if norm == math.inf else np.linalg.norm(point, axis=1)
    assert far.max() <= 2.0 + 1e-6 and np.abs(point.mean(0)).max() < 0.1
    # a ball of half the radius, a quarter of the area
    np.testing.assert_allclose(np.mean(far < 1.0), 0.25, atol=0.03)


def test_the_best_point_is_kept_not_the_last(rng, net):
    x, y = images(rng, 40, net)
    short, long = (pgd(net, x, y, 0.2, steps=n, step_size=0.15) for n in (6, 7))
    assert (long.margin <= short.margin + 1e-5).all()  # six steps of seven are the same
    assert (pgd(net, x, y, 0.0).margin >= short.margin).all()


def test_radii_of_their_own(rng, net):
    x, y = images(rng, 12, net)
    eps = np.linspace(0.05, 0.6, 12)
    together = pgd(net, x, y, eps, steps=12)
    assert 0 < together.success.sum() < 12
    for i in (0, 5, 11):
        alone = pgd(net, x[i : i + 1], y[i : i + 1], float(eps[i]), steps=12)
        assert alone.success[0] == together.success[i]
        np.testing.assert_allclose(alone.margin[0], together.margin[i], atol=1e-5)


@pytest.mark.slow
def test_one_program_for_all_chunks(rng):
    model = network(1)
    x, y = images(rng, 11, model)
    options = {"steps": 4, "restarts": 2}
    whole = pgd(model, x, y, 0.3, batch_size=4, **options)
    type(model).traced = 0
    again = pgd(model, x[::-1], y[::-1], 0.2, batch_size=4, **options)
    assert type(model).traced == 1  # for the shape of the logits; nothing is compiled
    np.testing.assert_array_equal(again.correct, whole.correct)
    other = pgd(model, x, y, 0.3, batch_size=16, **options)
    np.testing.assert_allclose(other.margin, whole.margin, atol=1e-5)  # starts depend on no batch


def test_weights_are_arguments_of_the_program(rng):
    model = network(2)
    x, y = images(rng, 4, model)
    before = pgd(model, x, y, 0.1, steps=3)
    state = nnx.state(model)
    type(model).traced = 0
    nnx.update(model, jax.tree.map(lambda leaf: 2 * leaf, state))
    after = pgd(model, x, y, 0.1, steps=3)
    assert type(model).traced == 1 and not np.allclose(before.margin, after.margin)
    nnx.update(model, state)


def test_the_scan_of_accelerators_takes_the_same_steps(rng, net, monkeypatch):
    x, y = images(rng, 20, net)
    stepwise = pgd(net, x, y, 0.3, steps=12, restarts=2)
    monkeypatch.setattr(attack_search.Problem, "stride", lambda problem, steps: 5)  # 5 + 5 + 2
    scanned = pgd(net, x, y, 0.3, steps=12, restarts=2)
    np.testing.assert_allclose(scanned.margin, stepwise.margin, atol=1e-4)
    np.testing.assert_allclose(scanned.adversarial, stepwise.adversarial, atol=1e-3)


def test_progress_counts_examples(rng, net):
    lines = []
    x, y = images(rng, 10, net)
    pgd(net, x, y, 0.1, steps=2, batch_size=4, progress=lines.append)
    assert [line.split(": ")[1].split(",")[0] for line in lines] == [
        f"{n} of 10 examples" for n in (4, 8, 10)
    ]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_length_is_never_below_the_truth(rng, count, scale):
    a = (rng.normal(size=(count, 500)) * scale).astype(np.float32)
    found = attack_search.length(a, np.zeros_like(a), 2)
    exact = [math.sqrt(math.fsum((row / scale) ** 2)) * scale for row in a.astype(np.float64)]
    np.testing.assert_allclose(found, exact, rtol=1e-12)
    assert (found >= np.float64(exact) * (1 - 1e-15)).all()
    assert (
        attack_search.length(a, a, 2).tolist()
        == attack_search.length(a, a, math.inf).tolist()
        == [0.0] * count
    )


@pytest.mark.parametrize("norm", [1, 1.5, 3, 40.5])
@pytest.mark.parametrize("scale", [1e-30, 1.0])
def test_length_is_never_below_the_truth_in_any_norm(rng, norm, scale):
    a = (rng.normal(size=(6, 50)) * scale).astype(np.float32)
    with mpmath.workdps(40):
        exact = [
            mpmath.fsum(mpmath.mpf(abs(float(v))) ** norm for v in row) ** (1 / mpmath.mpf(norm)) for row in a
        ]
        found = attack_search.length(a, np.zeros_like(a), norm)
        for length, truth in zip(found.tolist(), exact, strict=True):
            assert truth <= length <= truth * (1 + mpmath.mpf("1e-12"))
    assert attack_search.length(a, a, norm).tolist() == [0.0] * 6


# ------------------------------------------------------------------------------------------ one step, and the CW loss
@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", ["margin", "ce"])
@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_one_full_step_along_the_gradient(rng, net, norm, loss):
    x = np.float32(0.3) + np.float32(0.4) * images(rng)
    y = np.asarray(net(jnp.asarray(x))).argmax(1)
    eps = np.linspace(0.01, 0.29, len(x))

    def objective(point):
        z = net(point)
        own = jnp.take_along_axis(z, jnp.asarray(y)[:, None], 1)[:, 0]
        others = jnp.where(jax.nn.one_hot(y, z.shape[1], dtype=bool), -jnp.inf, z).max(1)
        return ((others - own) if loss == "margin" else jax.nn.logsumexp(z, axis=1) - own).sum()

    g = np.asarray(jax.grad(objective)(jnp.asarray(x)), np.float64).reshape(len(x), -1)
    direction = np.sign(g) if norm == math.inf else g / np.linalg.norm(g, axis=1, keepdims=True)
    expected = x + (eps[:, None] * direction).reshape(x.shape)
    attack = fgsm(net, x, y, eps, norm=norm, loss=loss)
    moved = (attack.adversarial != x).any(axis=(1, 2, 3))  # elsewhere the step made the margin larger
    assert moved.sum() > 30 and attack.success.sum() > 3
    np.testing.assert_allclose(attack.adversarial[moved], expected[moved], atol=2e-6)
    far = attack_search.length(attack.adversarial, x, norm)[moved]
    assert (far <= eps[moved]).all() and (far > (1 - 1e-5) * eps[moved]).all()
    assert attack.loss == loss and (attack.margin <= pgd(net, x, y, 0.0, steps=0).margin).all()


def test_fgsm_in_the_whole_box_stays_in_it(rng, net):
    x, y = images(rng, 20, net)
    attack = fgsm(net, x, y, np.inf, norm=math.inf)
    changed = attack.adversarial[(attack.adversarial != x).any(axis=(1, 2, 3))]
    assert len(changed) > 10 and set(np.unique(changed)) <= {0.0, 1.0} | set(np.unique(x))


@pytest.mark.parametrize("norm", NORMS)
def test_cw_is_margin_and_breaks_what_the_clamped_loss_breaks(rng, net, norm):
    x, y = images(rng, 40, net)
    eps = 0.25 if norm == 2 else 0.08
    margin, cw = (pgd(net, x, y, eps, norm=norm, loss=loss, steps=12) for loss in ("margin", "cw"))
    np.testing.assert_array_equal(margin.adversarial, cw.adversarial)
    assert (margin.loss, cw.loss) == ("margin", "cw") and 5 < cw.success.sum() < 35

    def clamped(point):  # f6 with kappa = 0, written out
        z = net(point)
        own = jnp.take_along_axis(z, jnp.asarray(y)[:, None], 1)[:, 0]
        others = jnp.where(jax.nn.one_hot(y, z.shape[1], dtype=bool), -jnp.inf, z).max(1)
        left = jnp.maximum(own - others, 0.0)
        return -left.sum(), left

    where = (
        jnp.asarray(x),
        jnp.full(40, eps * attack_search.INSIDE, jnp.float32),
        np.float32(0),
        np.float32(1),
    )
    point, broken = where[0], np.zeros(40, bool)
    for _ in range(13):
        gradient, left = jax.grad(clamped, has_aux=True)(point)
        broken |= np.asarray(left) == 0
        step = np.float32(2.5 / 12) * where[1].reshape(-1, 1, 1, 1)
        point = attack_search.project(
            point + step * attacks.steepest(gradient, point, where, norm), where, norm
        )
    np.testing.assert_array_equal(broken, cw.success)


def test_the_name_of_a_loss_compiles_nothing(rng):
    model = network(3)
    x, y = images(rng, 4, model)
    pgd(model, x, y, 0.1, steps=3)
    type(model).traced = 0
    pgd(model, x, y, 0.1, steps=3, loss="cw")
    assert type(model).traced == 1  # for the shape of the logits


# ----------------------------------------------------------------------------------------------------- bad input
X, Y = np.full((4, 2, 6, 1), 0.5, np.float32), np.zeros(4, int)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps must be >= 0"),
        ({"eps": np.nan}, "not NaN"),
        ({"eps": np.ones(3)}, "hold 4 numbers, got shape"),
        ({"eps": "8/255"}, "eps must be a number or hold 4 numbers, got '8/255'"),
        ({"target": np.full(4, 4)}, r"target: labels must lie in 0\.\.3, got 4\.\.4"),
        ({"steps": np.int64(2)}, "got np.int64.2.; cast it: steps=2"),
        ({"y": np.full(4, 4)}, "labels must lie in 0..3, got 4..4"),
        ({"y": np.full(4, -1)}, "labels must lie in 0..3"),
        ({"y": np.zeros(3, int)}, "4 integer labels"),
        ({"y": np.zeros(4)}, "integer labels.*float64"),
        ({"x": X + 1}, r"box \[0, 1\], got values from 1.5 to 1.5: set low and high"),
        ({"x": X * np.float32(np.nan)}, "NaN or infinite"),
        ({"x": (X * 255).astype(np.uint8)}, "floating point.*uint8"),
        ({"x": X[:0], "y": Y[:0]}, "at least one, got shape"),
        ({"low": 1.0}, "low < high"),
        ({"high": np.inf}, "finite numbers low < high"),
        ({"norm": 1}, "norm 2 or inf, not 1"),
        ({"norm": 3}, "norm 2 or inf, not 3; frank_wolfe"),
        ({"loss": "hinge"}, "margin, ce, cw, got 'hinge'"),
        ({"steps": -1}, "steps must be a whole number >= 0"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"restarts": 0}, "restarts must be a whole number >= 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"step_size": 0.0}, "step_size must be a number > 0"),
        ({"fn": lambda x: x.reshape(len(x), -1)[:, :1]}, "K >= 2, got"),
        ({"fn": lambda x: x}, "to logits"),
        ({"fn": lambda x: jnp.log(x.reshape(len(x), -1) - 1)}, "logits of example 0 are not finite"),
    ],
)
def test_bad_input_is_refused(net, change, message):
    given = {"fn": net, "x": X, "y": Y, "eps": 0.1, "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        pgd(given.pop("fn"), given.pop("x"), given.pop("y"), given.pop("eps"), **given)


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="from a batch to logits, got ndarray"):
        pgd(X, X, Y, 0.1)


def test_examples_that_a_network_cannot_take_are_named(net):
    with pytest.raises(TypeError) as caught:
        pgd(lambda b: b @ np.ones((3, 4), np.float32), X[:, 0, :, 0], Y, 0.1)
    assert caught.value.__notes__[-1:] == [
        "The network was called with a batch of shape (4, 6), examples of shape (6,)."
    ]


@pytest.mark.parametrize("attack", [apgd, fab])
def test_attacks_that_count_the_classes_first_refuse_no_examples(net, attack):
    with pytest.raises(ValueError, match="at least one, got shape"):
        attack(net, X[:0], Y[:0], 0.1)


def test_a_network_that_mixes_the_examples_of_a_batch_is_refused(rng):
    fn, _, _ = linear(rng)
    x, y = rng.uniform(size=(6, 3, 2, 1)).astype(np.float32), np.arange(6) % 3
    for mixed in (lambda x: fn(x - x.mean(axis=0)), lambda x: jnp.cumsum(fn(x), axis=0)):
        for attack in (pgd, fgsm, apgd):
            with pytest.raises(ValueError, match=r"rest of its batch changes: .*evaluation mode"):
                attack(mixed, x, y, 0.1)
    assert len(pgd(fn, x, y, 0.1).success) == 6


def test_random_targets_of_bad_input():
    for given, message in (((Y, 1), "classes must be a whole number >= 2"), ((Y, 4, -1), "seed must be")):
        with pytest.raises(ValueError, match=message):
            random_targets(*given)


def test_the_settings_of_an_attack_are_checked_once_and_can_be_shared(rng, net):
    settings = attacks.AttackSettings(norm="inf", high=2.0, batch_size=3, seed=5)
    assert settings.norm == math.inf and settings.diameter((2, 3)) == 2.0
    assert settings.changed({"norm": 2, "low": 1.0}).diameter((2, 2)) == 2.0
    assert settings.changed({"norm": 1}).diameter((2, 3)) == 12.0
    for change, message in (
        ({"norm": 0.5}, "norm must be 2 or inf .*, got 0.5"),
        ({"norm": "l2"}, "norm must be 2 or inf .*, got 'l2'"),
        ({"low": 2.0}, "low < high, got 2.0 and 2.0"),
        ({"batch_size": True}, "batch_size must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            settings.changed(change)
    by_object = pgd(net, X, Y, 0.1, settings, steps=2)
    by_name = pgd(net, X, Y, 0.1, norm=math.inf, high=2.0, batch_size=3, seed=5, steps=2)
    np.testing.assert_array_equal(by_object.adversarial, by_name.adversarial)
    with pytest.raises(
        TypeError, match="unknown option 'clip'; the settings that all attacks share are norm, low, high"
    ):
        pgd(net, X, Y, 0.1, clip=True)
    with pytest.raises(TypeError, match="settings must be AttackSettings, got int: give options by name"):
        pgd(net, X, Y, 0.1, 100)


def test_progress_means_what_it_means_in_every_bound(net, capfd):
    pgd(net, X, Y, 0.1, steps=1, progress=True)
    assert capfd.readouterr() == ("", "")  # stderr is no terminal
    with pytest.raises(ValueError, match="progress must be True, False or a function of one text, got 3"):
        pgd(net, X, Y, 0.1, steps=1, progress=3)
