"""The training loop: what one step computes, warm-up, refreshes, guards, averages and refusals.

A batch as large as the data makes every epoch one step, whose state can be looked at.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_cache import compilations

import lipbounds as lb
from lipbounds.analysis import training_report
from lipbounds.training import loop, losses, parallel
from lipbounds.training.config import Config
from lipbounds.training.data import digits
from lipbounds.training.layers import Dense
from lipbounds.training.loop import accuracy, fit, split
from lipbounds.training.models import build
from lipbounds.training.step import Trainer, TrainState, pair_constants, trainer

ONE = 128  # images of the tests that look at single steps
HUGE = np.float32(3e38)  # finite, and no logit of it is


def config(**fields: Any) -> Config:
    plain = {"loss": "cross-entropy", "constants": "liplt", "arch": "64-10", "validate_every": 0, "warmup": 0}
    rest = {"batch_size": 128, "learning_rate": 5e-3, "schedule": "constant", "epochs": 50, "r0": 1.0}
    return Config(**{**plain, **rest, **fields})


def few(count: int = ONE) -> tuple[np.ndarray, np.ndarray]:
    data = digits()
    return data.train_x[:count].copy(), data.train_y[:count]


def trainer_of(one: Config, images: int = ONE) -> Trainer:
    return trainer(one, build(one.spec((8, 8, 1), 10), one.seed), (8, 8, 1), 1, images, parallel.devices(1))


def steps(made: Trainer, *batches: np.ndarray, start: TrainState | None = None) -> list[TrainState]:
    """Host copies of the state before the first and after each of some steps, one an epoch, on ONE images."""
    labels = made.devices.put(few()[1])
    state = made.devices.put(made.init() if start is None else start)
    seen = [parallel.host(state)]
    for x in batches:
        state, _ = made.epoch(state, made.devices.put(x), labels)
        seen.append(parallel.host(state))
    return seen


def same(a: Any, b: Any) -> bool:
    return all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def weights_of(model: nnx.Module) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


# ---------------------------------------------------------------------------------------------- as a whole
def test_training_learns_and_repeats_itself() -> None:
    data = digits()
    one = config(arch="64-32-10", epochs=8)
    seen: list[Any] = []
    first = fit(one, progress=seen.append)
    again = fit(one, (data.train_x, data.train_y))  # the same images as floats
    other = fit(config(arch="64-32-10", epochs=8, seed=1))
    assert tuple(seen) == first.log and [r["epoch"] for r in seen] == list(range(1, 9))
    assert seen[-1]["loss"] < 0.3 * seen[0]["loss"] and seen[-1]["accuracy"] > 0.9
    assert seen[-1]["certified_estimate"] is None and seen[-1]["skipped"] == 0
    fresh = build(first.spec, 0)  # type: ignore[arg-type]
    assert (
        accuracy(first.model, data.test_x, data.test_y)
        > 0.9
        > 0.3
        > accuracy(fresh, data.test_x, data.test_y)
    )
    assert same(first.state, again.state)
    assert (
        max(np.abs(a - b).max() for a, b in zip(*map(weights_of, (first.model, other.model)), strict=True))
        > 1e-3
    )


class Flat(nnx.Module):
    """Reads batches only."""

    def __init__(self) -> None:
        self.first = nnx.Linear(64, 12, rngs=nnx.Rngs(3))
        self.last = nnx.Linear(12, 10, rngs=nnx.Rngs(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jax.nn.relu(self.first(x.reshape(len(x), 64))))


@pytest.mark.slow
def test_a_model_of_ones_own_is_copied_trained_and_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Flat()
    before = weights_of(model)
    with compilations() as names:
        found = fit(
            config(loss="crm", epochs=3, warmup=1, refresh=2, holdout=0.25, validate_every=2, eps=0.05),
            model=model,
        )
    assert len([name for name in names if "_epoch" in name]) == 1
    assert same(before, weights_of(model)) and isinstance(found.model, Flat) and found.spec is None
    assert not same(before, weights_of(found.model))
    assert ["clean" in record for record in found.log] == [False, True, True]
    last = found.log[-1]
    assert (last["method"], last["guarantee"], last["part"]) == ("liplt", "verified", "held-out")
    assert last["images"] == round(0.25 * 1437)
    _, held = split(1437, 0.25)
    data = digits()
    x, y = data.train_x[held], data.train_y[held]
    assert last["clean"] == pytest.approx(accuracy(found.model, x, y))
    form = lb.trace(found.model, x[:1], batched=True)
    radii = lb.certified_radius(form, x, y, bound=lb.liplt(form, pairwise=True))
    assert last["certified"] == pytest.approx(float(radii.accuracy(0.05)))
    assert 0 < last["certified"] <= last["clean"] and 0 < found.log[-1]["certified_estimate"] < 1
    # the final figures are by the bound that the last validation has proved
    monkeypatch.setattr(training_report, "bound_within", lambda *_: pytest.fail("proved again"))
    final = training_report.final_record(found)
    radii = lb.certified_radius(form, data.test_x, data.test_y, bound=lb.liplt(form, pairwise=True))
    assert final["certified"] == pytest.approx(radii.accuracy(0.05))
    assert (final["method"], final["guarantee"], final["images"]) == ("liplt", "verified", len(data.test_y))


# ------------------------------------------------------------------------------------------------- one step
def direct(made: Trainer, x: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
    """(loss, gradient by (weights, multipliers)) of the first step, written as one function."""
    one = made.config
    state = made.init()

    def loss(trained: Any) -> jax.Array:
        weights, multipliers = trained
        bound, options = state.bound, {"steps": one.power_iterations}
        if one.constants == "recursion":
            bound, options = bound._replace(multipliers=multipliers), {"steps": 0}
        core = {"naive": lb.naive.core, "liplt": lb.liplt.core, "recursion": lb.lipsdp.core}[one.constants]
        model = nnx.merge(made.graph, weights, made.rest)
        form = lb.trace(lambda image: model(image[None])[0], jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
        found, _ = core(form, bound, pairwise=True, **options)
        pairs = pair_constants(found, one.pairs).astype(jnp.float32)
        logits = model(x)
        if one.loss == "gloro":
            return losses.gloro(logits, labels, pairs, eps=one.eps)
        if one.loss == "lipschitz-margin":
            return losses.lipschitz_margin(logits, labels, pairs, eps=one.eps)
        penalty = losses.crm_penalty(logits, labels, pairs, t=one.t, r0=one.r0, g=one.g)
        return losses.cross_entropy(logits, labels, one.smoothing) + one.lam * penalty

    with jax.enable_x64(one.precision == "float64"), jax.numpy_dtype_promotion("standard"):
        return jax.jit(jax.value_and_grad(loss))((state.weights, state.multipliers))


CRM = {"loss": "crm", "arch": "64-8-10", "lam": 5.0}
FIRST_STEPS = [
    pytest.param(CRM, id="crm, liplt"),
    *(
        pytest.param(CRM | fields, id=", ".join(map(str, fields.values())), marks=pytest.mark.slow)
        for fields in (
            {"constants": "recursion"},
            {"constants": "recursion", "precision": "float64", "g": "hinge"},
            {"constants": "naive", "pairs": "per-class", "smoothing": 0.1},
            {"loss": "gloro", "pairs": "whole", "eps": 0.2},
            {"loss": "lipschitz-margin", "constants": "naive", "precision": "float64", "eps": 0.2},
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIRST_STEPS)
def test_the_first_step_follows_the_gradient_of_the_whole_loss(fields: dict[str, Any]) -> None:
    """The split where loss, network and bound meet changes nothing; the weights are then Adam's."""
    one = config(**fields)
    made = trainer_of(one)
    x, labels = few()
    before, after = steps(made, x)
    loss, gradient = direct(made, x, labels)
    moments = after.moments.inner_states
    parts = {"weights": (0, one.learning_rate), "multipliers": (1, one.multiplier_rate)}
    for name, (place, rate) in parts.items():
        wanted = [np.asarray(g) for g in jax.tree.leaves(gradient[place])]
        # beta_1 = 0.9
        found = [np.asarray(m) / 0.1 for m in jax.tree.leaves(moments[name].inner_state[0].mu)]
        assert len(found) == len(wanted) and (wanted or name == "multipliers")
        size = max((np.abs(g).max() for g in wanted), default=1)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * size)
        adam = optax.adam(rate)
        old = getattr(before, name)
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            updates, _ = adam.update(gradient[place], adam.init(old), old)
            new = optax.apply_updates(old, updates)
        for a, b, g in zip(*map(jax.tree.leaves, (getattr(after, name), new, gradient[place])), strict=True):
            steep = np.abs(np.asarray(g)) > 1e-4 * size  # where Adam's first step, lr * sign(g), has a sign
            np.testing.assert_allclose(np.asarray(a)[steep], np.asarray(b)[steep], rtol=1e-4, atol=1e-6)
    _, metrics = made.epoch(made.devices.put(before), made.devices.put(x), made.devices.put(labels))
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-4)
    plain = losses.cross_entropy(made.network(before.weights, x), labels, one.smoothing)
    assert float(metrics.loss) > float(plain) * 1.001 or one.loss == "crm"


@pytest.fixture(scope="module")
def refreshed() -> Trainer:
    return trainer_of(config(**CRM, refresh=3, warmup=1, average="ema"))


@pytest.mark.slow
def test_constants_and_their_gradient_are_kept_between_refreshes(refreshed: Trainer) -> None:
    x, _ = few()
    seen = steps(refreshed, *[x] * 8)
    held = [state.held for state in seen]
    assert same(held[0], held[1]) and not held[0].pairs.any()  # the first epoch is warm-up
    for begin in (2, 5):
        assert not same(held[begin - 1].pairs, held[begin].pairs)
        assert not same(held[begin - 1].gradient, held[begin].gradient)
        assert same(held[begin], held[begin + 1]) and same(held[begin], held[begin + 2])
        assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(held[begin].gradient))
    assert not same(held[7].pairs, held[8].pairs)
    assert not any(same(a.weights, b.weights) for a, b in itertools.pairwise(seen))
    bounds = [same(a.bound, b.bound) for a, b in itertools.pairwise(seen)]
    assert bounds == [True, False, True, True, False, True, True, False]


@pytest.mark.slow
def test_between_refreshes_the_kept_gradient_has_the_length_of_the_new_batch(refreshed: Trainer) -> None:
    x, labels = few()
    other = np.clip(x[::-1] * np.float32(0.7), 0, 1)
    seen = steps(refreshed, x, x, other)
    fresh, kept = seen[2:]

    @jax.jit
    def by_both(weights: Any, images: Any, pairs: Any) -> Any:
        return jax.grad(lambda w, c: refreshed.loss(refreshed.network(w, images), labels, c), (0, 1))(
            weights, pairs
        )

    direct, toward = by_both(fresh.weights, other, fresh.held.pairs)
    _, before = by_both(seen[1].weights, x, fresh.held.pairs)
    share = float(jnp.sum(toward * fresh.held.pairs) / jnp.sum(before * fresh.held.pairs))
    assert share > 0 and abs(share - 1) > 0.01
    old, new = (state.moments.inner_states["weights"].inner_state[0].mu[0] for state in (fresh, kept))
    leaves = map(jax.tree.leaves, (old, new, direct, fresh.held.gradient[0]))
    for a, b, plain, held in zip(*leaves, strict=True):
        wanted = np.asarray(plain) + share * np.asarray(held)
        np.testing.assert_allclose((b - 0.9 * a) / 0.1, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(fresh.held.gradient[0])) > 1e-3


@pytest.fixture(scope="module")
def warming() -> Trainer:
    return trainer_of(config(**CRM, warmup=3))


@pytest.mark.slow
def test_warm_up_is_cross_entropy_training_bit_for_bit(warming: Trainer) -> None:
    x, _ = few()
    crm, plain = steps(warming, *[x] * 4), steps(trainer_of(config(arch="64-8-10")), *[x] * 4)
    for a, b in zip(crm[:4], plain[:4], strict=True):
        assert same(a.weights, b.weights) and same(a.moments, b.moments)
    assert not same(crm[4].weights, plain[4].weights)


@pytest.mark.slow
def test_a_refresh_every_step_is_no_refresh_rule(refreshed: Trainer, warming: Trainer) -> None:
    """The step with new constants is the same with refresh = 3 as with refresh = 1, to rounding."""
    x, _ = few()
    first = steps(refreshed, x, x)
    begin = steps(warming, x, x, x)[-1]  # past warm-up
    begin = begin._replace(weights=first[1].weights, moments=first[1].moments, bound=first[1].bound)
    found = steps(warming, x, start=begin)[-1]
    for a, b in zip(jax.tree.leaves(found.weights), jax.tree.leaves(first[2].weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------- the guard
@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(refreshed: Trainer) -> None:
    x, labels = few()
    poisoned = x.copy()
    poisoned[17] = HUGE
    before = steps(refreshed, x, x, x)[-1]
    for bad in (poisoned, np.full_like(x, np.nan)):
        state, metrics = refreshed.epoch(
            refreshed.devices.put(before), refreshed.devices.put(bad), refreshed.devices.put(labels)
        )
        after = parallel.host(state)
        assert int(metrics.skipped) == 1 and int(after.step) == int(before.step) + 1
        assert same(after._replace(step=before.step), before)
        assert np.isfinite(float(metrics.loss))
        good = steps(refreshed, x, start=after)[-1]
        assert (
            not same(good.weights, after.weights)
            and np.isfinite(good.weights["layers"][0]["kernel"][...]).all()
        )


def test_a_loss_that_is_finite_with_a_gradient_that_is_not_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with the square root at 0: the value is fine, the slope is infinite."""
    plain = losses.cross_entropy

    def steep(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
        return plain(logits, labels, smoothing) + jnp.sqrt(0 * logits[0, 0])

    monkeypatch.setattr(losses, "cross_entropy", steep)
    x, _ = few()
    before, after = steps(trainer_of(config()), x)
    assert same(after._replace(step=before.step), before)


def test_constants_whose_first_step_is_skipped_are_computed_in_the_next_one() -> None:
    x, _ = few()
    one = config(loss="margin", constants="naive", refresh=5)
    _, skipped, second, third = (
        state.held.pairs for state in steps(trainer_of(one), np.full_like(x, np.nan), x, x)
    )
    assert not skipped.any() and second.max() > 0.1
    np.testing.assert_array_equal(second, third)


def test_skipped_steps_are_counted_and_too_many_stop_training() -> None:
    x, y = few(512)
    x[100] = HUGE
    found = fit(config(epochs=3, max_skipped=1), (x, y))
    assert [record["skipped"] for record in found.log] == [1, 1, 1]
    assert all(np.isfinite(record["loss"]) and record["accuracy"] > 0 for record in found.log)
    with pytest.raises(
        FloatingPointError, match="1 of 4 steps of epoch 1 had .* not finite .*: lower learning_rate"
    ):
        fit(config(epochs=3, max_skipped=0), (x, y))


def test_an_epoch_without_any_good_step_stops_training() -> None:
    x, y = few()
    with pytest.raises(FloatingPointError, match="1 of 1 steps of epoch 1"):
        fit(config(epochs=3, max_skipped=100), (np.full_like(x, HUGE), y))


# ------------------------------------------------------------------------------------------------- averages
@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_are_those_computed_directly(kind: str) -> None:
    made = trainer_of(config(average=kind, ema_decay=0.6, average_from=2))
    x, _ = few()
    seen = steps(made, *[x] * 6)
    history = [np.asarray(state.weights["layers"][0]["kernel"][...]) for state in seen]
    mean = history[0]
    for n, state in enumerate(seen[1:], start=1):
        counted = history[3 : n + 1]  # of epochs 2 and later, counted from 0
        if kind == "swa":
            mean = np.mean(counted, axis=0) if counted else history[n]
        else:
            share = max(0.4, 1 / len(counted)) if counted else 1.0
            mean = mean + share * (history[n] - mean)
        found = np.asarray(state.average["layers"][0]["kernel"][...])
        np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-6)
        final = np.asarray(made.final_weights(state)["layers"][0]["kernel"][...])
        np.testing.assert_array_equal(final, found)
    assert np.abs(history[6] - mean).max() > 1e-3


# ------------------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_trained_is_refused(tmp_path: Any) -> None:
    x, y = few()
    model = Flat()
    one, two = config(epochs=1), np.concatenate([x, x], axis=-1)
    cases: list[tuple[str, Any]] = [
        ("pass out without model", lambda: fit(one, (x, y), model=model, out=tmp_path / "run")),
        ("finite floats .* got float32 \\(128, 8, 8\\)", lambda: fit(one, (x[..., 0], y))),
        ("finite floats .* got uint8", lambda: fit(one, (x.astype(np.uint8), y))),
        ("finite floats", lambda: fit(one, (x * np.nan, y))),
        ("at least one; got float32 \\(0, 8, 8, 1\\)", lambda: fit(one, (x[:0], y[:0]))),
        ("labels must be integers \\(128,\\).*\\(100,\\)", lambda: fit(one, (x, y[:100]))),
        ("labels must be integers", lambda: fit(one, (x, y - 1))),
        ("labels must be integers", lambda: fit(one, (x, y.astype(np.float32)))),
        ("has 12 classes, and the network 10 outputs", lambda: fit(one, (x, y + 2), model=model)),
        ("there are 12 classes", lambda: fit(one, (x, y + 2))),
        ("widths start with 64", lambda: fit(config(arch="784-10"), (x, y))),
        ("batch_size 256 is more than the 128 images", lambda: fit(config(batch_size=256), (x, y))),
        (
            "1 or 3 channels",
            lambda: fit(config(arch="128-10", autoaugment=True), (two, y), out=tmp_path / "run"),
        ),
        (
            "have no 8 pixels to mirror",
            lambda: fit(config(crop=8, border="mirror"), (x, y), out=tmp_path / "run"),
        ),
        ("is more than the 64 images to train on", lambda: fit(config(holdout=0.5), (x, y))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="3 devices were asked for, and there are 1"):
        parallel.devices(3)
    with pytest.raises(ValueError, match="not defined"):
        accuracy(model, x[:0], y[:0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty: choose another folder"):
        fit(one, (x, y), out=tmp_path)
    with pytest.raises(FileExistsError, match="choose another folder"):
        fit(one, (x, y), out=tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileNotFoundError, match="MNIST"):
        fit(Config(dataset="mnist", arch="784-10", data_dir=str(tmp_path)))


def test_validation_sees_images_of_all_classes_and_a_holdout_of_none_is_refused() -> None:
    y = np.sort(np.arange(4000) % 10)
    x = np.zeros((4000, 2, 2, 1), np.float32)
    plain = Config(arch="4-10", loss="cross-entropy", epochs=1)
    run = loop._Run(
        plain, loop._images((x, y)), build(plain.spec((2, 2, 1), 10)), None, parallel.devices(1), None, ()
    )
    counts = np.bincount(run.images.labels[run.sample], minlength=10)
    assert len(run.sample) == 1000 and counts.min() > 70
    with pytest.raises(ValueError, match="holdout 0.0001 of 1437 images holds out no image"):
        split(1437, 1e-4)


class Spectral(nnx.Module):
    """A spectral layer between two plain ones."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = Dense(64, 16, kind="spectral", rngs=rngs)
        self.last = Dense(16, 10, kind="unit", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jax.nn.relu(self.first(x.reshape(*x.shape[:-3], -1))))


@pytest.mark.slow
def test_vectors_of_spectral_layers_move_on_with_the_weights() -> None:
    """With the vectors of the beginning the norm of the trained layer is above 1; `fit` returns one of norm 1."""
    model = Spectral()
    config = Config(loss="cross-entropy", epochs=3, batch_size=64, learning_rate=2e-2, validate_every=3)
    fitted = fit(config, model=model)
    trained: Any = fitted.model
    assert np.linalg.norm(np.asarray(trained.first.weights()), 2) == pytest.approx(1, abs=1e-4)
    trained.first.vector.set_value(model.first.vector.get_value())
    assert np.linalg.norm(np.asarray(trained.first.weights()), 2) > 1.1
    kept = jax.tree.leaves(fitted.state.kept)
    assert len(kept) == 1 and kept[0].shape == (64,) and fitted.log[-1]["clean"] > 0.5


@pytest.mark.slow
def test_a_validation_bounds_the_network_that_is_returned() -> None:
    rest: Any = {"learning_rate": 3e-2, "epochs": 1, "validate_every": 1}
    fitted = fit(config(**rest), few(), model=Spectral())
    own = lb.liplt(lb.trace(fitted.model, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)), progress=False)
    assert fitted.proved is not None
    assert fitted.proved[1].bound.value == pytest.approx(own.value, rel=1e-6)


def test_what_is_no_network_of_images_is_refused() -> None:
    class First(Spectral):
        def __call__(self, x: jax.Array) -> jax.Array:
            return super().__call__(x)[:, 0]

    with pytest.raises(ValueError, match=r"must map images \(1, 8, 8, 1\) to logits \(1, K\), got \(1,\)"):
        fit(config(epochs=1), few(), model=First())
    with pytest.raises(TypeError, match="model must be a flax nnx module, got function"):
        fit(config(epochs=1), few(), model=few)  # type: ignore[arg-type]


def test_dropout_in_training_mode_is_refused() -> None:
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), Spectral())
    with pytest.raises(ValueError, match=r"layers.0 \(Dropout\) draws random numbers in training.*rate to 0"):
        fit(config(epochs=1), few(), model=model)
