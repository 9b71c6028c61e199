"""APGD, FAB and AutoAttack: exact on linear networks, and what the papers say of each."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipbounds import analysis
from lipbounds.analysis.attack_search import Problem, length, search, unbroken

apgd, fab, auto = (
    importlib.import_module(f"lipbounds.analysis.{name}") for name in ("apgd", "fab", "autoattack")
)
NORMS = [2, math.inf]
W = np.random.default_rng(1).normal(size=(12, 5)).astype(np.float32)
FREE = {"low": -100.0, "high": 100.0}


def linear(batch):
    return batch.reshape(len(batch), -1) @ W


def case(norm, count=24):
    """(x, y, distances): of linear nets min over i of |m_i| / ||w_y - w_i||_q, without a box."""
    x = np.random.default_rng(2).random((count, 12), np.float32)
    z = (x @ W).astype(np.float64)
    y = z.argmax(1)
    size = np.linalg.norm(W.T[:, None] - W.T[None], axis=2, ord=1 if norm == math.inf else 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        each = (z[np.arange(count), y][:, None] - z) / size[y]
    return x, y, np.where(np.arange(5) == y[:, None], np.inf, each).min(1)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("loss", "factor", "least"), [("dlr-t", 1.002, 1.0), ("ce", 2.5, 0.7), ("dlr", 1.002, 0.7)]
)
def test_apgd_breaks_linear_networks_just_above_their_distance_and_never_below(norm, loss, factor, least):
    x, y, exact = case(norm)
    options = {"norm": norm, "loss": loss, "steps": 40, **FREE}
    assert not analysis.apgd(linear, x, y, 0.999 * exact, **options).success.any()
    above = analysis.apgd(linear, x, y, factor * exact, **options)
    assert above.success.mean() >= least  # without targets it may walk to a class that is not the nearest
    assert (above.distance[above.success] >= 0.999 * exact[above.success]).all()
    assert (above.steps <= 40 * 4).all() and above.queries is None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_distance_of_a_linear_network(norm):
    x, y, exact = case(norm)
    found = analysis.fab(linear, x, y, norm=norm, steps=12, **FREE)
    assert found.success.all()
    assert (found.distance >= exact * (1 - 1e-5)).all() and (found.distance <= exact * (1 + 5e-4)).all()
    boxed = analysis.fab(linear, x, y, norm=norm, steps=12)
    assert (boxed.distance >= found.distance * (1 - 1e-4)).all() and boxed.success.mean() > 0.9
    assert boxed.adversarial.min() >= 0 and boxed.adversarial.max() <= 1
    limited = analysis.fab(linear, x, y, 1.5 * np.median(exact), norm=norm, steps=12, **FREE)
    np.testing.assert_array_equal(limited.success, exact <= 1.5 * np.median(exact))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.slow
def test_the_shift_to_a_hyperplane_in_the_box_is_the_shortest(rng, norm):
    """Against the same by sorting: breakpoints in turn until the hyperplane is reached."""

    def by_sorting(point, normal, excess):
        if excess < 0:
            normal, excess = -normal, -excess
        room = np.where(normal > 0, point, 1 - point)
        size = np.abs(normal)
        pace = (size > 0) * 1.0 if norm == math.inf else size
        limits = np.sort(np.where(pace > 0, room / np.where(pace > 0, pace, 1), 0))
        low = 0.0
        for high in limits:
            if size @ np.minimum(pace * high, room) >= excess:
                for _ in range(100):
                    middle = (low + high) / 2
                    low, high = (
                        (middle, high) if size @ np.minimum(pace * middle, room) < excess else (low, middle)
                    )
                break
            low = high
        return -np.sign(normal) * np.minimum(pace * high, room)

    point = rng.random((60, 9), np.float32)
    normal = rng.normal(size=(60, 9)).astype(np.float32)
    normal[:6, 2] = 0
    normal[7] = 0
    excess = (rng.normal(size=60) * np.linspace(0.1, 4, 60)).astype(np.float32)
    excess[8] = 0
    box = (np.float32(0), np.float32(1))
    found = np.asarray(fab.shift(*map(jnp.asarray, (point, normal, excess)), box, norm))
    expected = np.array(
        [by_sorting(*each) for each in zip(point.astype(float), normal.astype(float), excess, strict=True)]
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    reached = np.abs((normal * found).sum(1) + excess) < 1e-4
    assert 30 < reached.sum() < 60 and not found[7].any() and not found[8].any()


# ------------------------------------------------------------------------------------------------- losses, schedule
@pytest.mark.parametrize("loss", ["dlr", "dlr-t"])
@pytest.mark.slow
def test_dlr_does_not_change_with_scale_and_shift(rng, loss):
    z = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 6, 30), jnp.int32)
    t = (y + jnp.asarray(rng.integers(1, 6, 30), jnp.int32)) % 6
    found = np.asarray(apgd.losses(z, y, (y, t), loss, False))
    moved = apgd.losses(np.float32(7.5) * z - np.float32(3), y, (y, t), loss, False)
    np.testing.assert_allclose(found, moved, rtol=1e-4, atol=1e-5)
    for row in range(30):
        top = np.sort(np.asarray(z[row], float))[::-1]
        own, rest = float(z[row, y[row]]), np.delete(np.asarray(z[row]), int(y[row])).max()
        wanted = -(own - rest) / (top[0] - top[2])
        if loss == "dlr-t":
            wanted = -(own - float(z[row, t[row]])) / (top[0] - (top[2] + top[3]) / 2)
        assert found[row] == pytest.approx(wanted, rel=1e-4)


def test_checkpoints_are_those_of_the_paper():
    lengths = apgd.checkpoints(100)
    assert (np.flatnonzero(lengths) + 1).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert lengths[lengths > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
    assert apgd.checkpoints(1).tolist() == [1] and (apgd.checkpoints(10) > 0).sum() == 9


def curved(batch):
    return jnp.sin(4 * linear(batch))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.slow
def test_the_best_loss_never_falls_and_the_step_is_only_ever_halved(norm, monkeypatch):
    x, _, _ = case(norm)
    y = np.asarray(curved(x)).argmax(1)
    traces = []
    monkeypatch.setattr(Problem, "stride", lambda problem, steps: 1)

    def find(problem):
        states = []
        found = apgd.climb(problem, "ce", None, 60, jax.random.key(0), states)
        traces.append(states)
        return found

    eps = 0.02 if norm == math.inf else 0.05
    settings = analysis.AttackSettings(norm=norm)
    found = search("APGD", find, curved, x, y, eps, settings, "ce")
    states = traces[0]
    assert len(states) == 60 and 0 < found.success.sum() < len(x)
    best = np.array([state.best[2] for state in states])
    size = np.array([state.size for state in states]) / (2 * eps)
    assert (np.diff(best, axis=0) >= 0).all() and (best[-1] > best[0]).any()
    assert set(np.round(np.log2(size[-1] / size[0])).astype(int)) - {0} and (np.diff(size, axis=0) <= 0).all()
    np.testing.assert_allclose(np.log2(size), np.round(np.log2(size)), atol=1e-4)
    for state in states[::7]:
        assert (length(np.asarray(state.point), x, norm) <= eps).all()


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_the_steps_are_those_of_the_algorithm(norm, monkeypatch):
    """Every iterate, against a plain loop over the examples that is written from the paper."""
    monkeypatch.setattr(Problem, "stride", lambda problem, steps: 1)
    x, _, _ = case(norm, 5)
    y, steps = np.asarray(curved(x)).argmax(1), 25  # no look at whether all are broken before
    eps = 0.02 if norm == math.inf else 0.06
    states = []

    def find(problem):
        return apgd.climb(problem, "ce", None, steps, jax.random.key(0), states)

    search("APGD", find, curved, x, y, eps, analysis.AttackSettings(norm=norm), "ce")
    assert len(states) == steps
    lengths, compared = apgd.checkpoints(steps), 0
    rate = jax.jit(jax.value_and_grad(lambda p, own: -jax.nn.log_softmax(curved(p[None]))[0, own]))
    for i in range(len(x)):

        def inside(point, at=x[i]):
            shift = np.clip(point - at, -eps, eps)
            if norm == 2:
                shift = (point - at) * min(1.0, eps / max(np.linalg.norm(point - at), 1e-30))
            return np.clip(at + shift, 0, 1)

        def uphill(gradient, point):
            free = np.where(((point <= 0) & (gradient < 0)) | ((point >= 1) & (gradient > 0)), 0, gradient)
            return np.sign(free) if norm == math.inf else free / np.linalg.norm(free)

        def rated(point, own=y[i]):
            loss, gradient = rate(jnp.asarray(point, jnp.float32), own)
            return float(loss), np.asarray(gradient, float)

        before = point = np.asarray(states[0].before[i], float)
        size, checked, rises, halved = 2 * eps, rated(point)[0], 0, True
        loss, gradient = rated(point)
        best = point, gradient, loss
        for k in range(1, steps + 1):
            z, a = inside(point + size * uphill(gradient, point)), 1.0 if k == 1 else 0.75
            new = inside(point + a * (z - point) + (1 - a) * (point - before))
            before, point, old = point, new, loss
            loss, gradient = rated(point)
            best = (point, gradient, loss) if loss > best[2] else best
            rises += loss > old
            if lengths[k - 1]:
                cut = rises <= 0.75 * lengths[k - 1] or (not halved and checked >= best[2])
                if cut:
                    size, point, gradient = size / 2, *best[:2]
                checked, rises, halved = best[2], 0, cut
            if 0 < abs(loss - old) < 1e-5:
                break  # at the top, where rounding decides what counts as a rise
            np.testing.assert_allclose(states[k - 1].point[i], point, atol=1e-5)
            assert states[k - 1].size[i] == pytest.approx(size, rel=1e-4)
            compared += 1
    assert compared > steps


@pytest.mark.slow
def test_apgd_takes_the_same_steps_in_a_scan(monkeypatch):
    x, _, _ = case(2)
    y = np.asarray(curved(x)).argmax(1)
    scanned = analysis.apgd(curved, x, y, 0.05, steps=30)
    monkeypatch.setattr(Problem, "stride", lambda problem, steps: 1)
    stepwise = analysis.apgd(curved, x, y, 0.05, steps=30)
    np.testing.assert_array_equal(scanned.success, stepwise.success)
    np.testing.assert_allclose(scanned.margin, stepwise.margin, atol=1e-4)


@pytest.mark.slow
def test_a_class_is_reached_by_every_attack_that_takes_targets():
    x, y, exact = case(2)
    target = analysis.random_targets(y, 5)
    for attack, options in ((analysis.apgd, {"loss": "dlr"}), (analysis.apgd, {}), (analysis.fab, {})):
        found = attack(linear, x, y, 6 * exact.max(), target=target, steps=20, **options, **FREE)
        assert found.success.mean() > 0.9
        assert (linear(found.adversarial).argmax(1) == target)[found.success].all()


# ---------------------------------------------------------------------------------------------------------- the whole
@pytest.fixture
def shortened(monkeypatch):
    module = importlib.import_module("lipbounds.analysis.autoattack")
    monkeypatch.setattr(module, "STEPS", 20)
    monkeypatch.setattr(module, "QUERIES", 60)
    return module


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", [math.inf, 2])
def test_columns_never_rise_and_a_seed_repeats(shortened, norm):
    x, y, exact = case(norm)
    y[0] = (y[0] + 1) % 5
    eps = float(np.median(exact))
    found = analysis.autoattack(linear, x, y, eps, norm=norm, **FREE)
    assert list(found.columns) == ["clean", "APGD-CE", "APGD-T", "FAB-T", "Square"]
    shares = list(found.columns.values())
    assert shares[0] == 23 / 24 and shares == sorted(shares, reverse=True) and shares[-1] == found.accuracy
    right = np.arange(24) > 0
    np.testing.assert_array_equal(found.success, right & (exact < eps))
    left = [stage.attacked for stage in found.stages]
    assert left[0] == 23 and left[1:] == [a - s.broken for a, s in zip(left, found.stages, strict=True)][:-1]
    assert found.notes == () and (found.steps[found.correct & ~found.success] == 180).all()
    assert (found.queries[found.correct & ~found.success] == 60).all()
    lines = []
    again = analysis.autoattack(linear, x, y, eps, norm=norm, progress=lines.append, **FREE)
    asked = {re.split(r", run| in ", line)[0]: int(line.split(" of ")[-1].split()[0]) for line in lines[::-1]}
    assert [asked[stage.name] for stage in found.stages] == left  # each stage is given what is left, no more
    np.testing.assert_array_equal(again.adversarial, found.adversarial)
    assert "APGD-CE" in repr(found)


@pytest.mark.slow
def test_square_tells_of_masked_gradients(shortened):
    def masked(batch):  # steps: every gradient is 0
        return jnp.round(batch * 16) @ W

    x, _, _ = case(math.inf, 60)
    y = np.asarray(masked(x)).argmax(1)
    found = analysis.autoattack(masked, x, y, 0.12, norm=math.inf)
    assert found.stages[-1].broken > 5
    assert "gradients seem to be masked" in found.notes[1] and "exactly 0 at 100%" in found.notes[0]
    assert "masked" in repr(found)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda b: jax.nn.softmax(linear(b)), "outputs are probabilities, not logits"),
        (lambda b: linear(b)[:, :3], "at least 4 classes, for the loss of APGD-T, and the network has 3"),
    ],
)
def test_networks_that_it_would_misjudge_are_refused(fn, message):
    x, y, _ = case(2)
    with pytest.raises(ValueError, match=message):
        analysis.autoattack(fn, x, np.minimum(y, 2), 0.1)


def test_a_randomised_network_is_refused():
    draws = np.random.default_rng(0)

    def noisy(batch):
        noise = jax.pure_callback(
            lambda: draws.normal(size=(len(batch), 1)).astype(np.float32),
            jax.ShapeDtypeStruct((len(batch), 1), np.float32),
        )
        return linear(batch) + noise * np.float32([1, 0, 0, 0, 0])

    x, y, _ = case(2)
    with pytest.raises(ValueError, match="the network is randomised: its logits at the same input differ"):
        analysis.autoattack(noisy, x, y, 0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: analysis.apgd(linear, x, y, 0.1, loss="margin"), "ce, dlr, dlr-t, got 'margin'"),
        (lambda x, y: analysis.apgd(linear, x, y, 0.1, steps=0), "steps must be a whole number >= 1"),
        (
            lambda x, y: analysis.apgd(lambda b: linear(b)[:, :3], x, y * 0, 0.1, loss="dlr-t"),
            "compares 4 logits",
        ),
        (
            lambda x, y: analysis.apgd(lambda b: linear(b)[:, :2], x, y * 0, 0.1, loss="dlr"),
            "compares 3 logits",
        ),
        (lambda x, y: analysis.fab(linear, x, y, targets=0), "targets must be a whole number >= 1"),
        (lambda x, y: analysis.autoattack(linear, x, y, 0.1, version="plus"), "version must be 'standard'"),
    ],
)
def test_bad_settings_are_refused(call, message):
    x, y, _ = case(2)
    with pytest.raises(ValueError, match=message):
        call(x, y)


def test_nothing_is_attacked_that_is_wrong_already():
    x, y, _ = case(2)
    found = analysis.apgd(linear, x, (y + 1) % 5, 0.1, loss="dlr-t")
    assert not found.correct.any() and found.accuracy == 0 and not found.steps.any()
    assert np.isinf(unbroken(jnp.asarray(x))[1]).all()


def test_large_logits_are_no_overflow():
    x, _, _ = case(2, 4)
    settings = analysis.AttackSettings(**FREE)
    assert not [
        note for note in auto.checked(lambda b: 100 * linear(b) + 1e4, x, settings) if "log-prob" in note
    ]
