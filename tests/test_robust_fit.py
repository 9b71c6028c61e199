"""Robust losses in `fit`: what a step computes, what the loop tells, when it stops, what is refused."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_batch_norm import ONE, PLAIN, SGD, Normed, ahead, few, made

from lipbounds.analysis import pgd
from lipbounds.training import losses, parallel, robust_losses, robust_step, robust_watch, watch
from lipbounds.training.config import Config
from lipbounds.training.data import digits
from lipbounds.training.loop import fit, resume
from lipbounds.training.models import ConvNet
from lipbounds.training.runs import open_run
from lipbounds.training.step import Trainer

SMALL: dict[str, Any] = {**SGD, "attack_eps": 0.1, "robust_every": 0}


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def settings(**changes: Any) -> Config:
    return Config(**{**SMALL, **changes})


@pytest.mark.slow
def test_without_a_radius_adversarial_training_is_plain_training() -> None:
    """To rounding, in weights and statistics, though every step makes an attack."""
    plain, robust = (made(settings(loss=loss, attack_eps=0.0)) for loss in ("cross-entropy", "fast-at"))
    one, other = (ahead(each, each.init(), 2) for each in (plain, robust))
    for a, b in zip(leaves((one.weights, one.kept)), leaves((other.weights, other.kept)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_step_follows_the_loss_its_multiplier_and_the_radius_term() -> None:
    """TRADES with a weight that moves and CRM's term: one step, against the pure functions."""
    fields: dict[str, Any] = {"constants": "naive", "r0": 5.0, "power_iterations": 50}
    one = made(settings(loss="fast-trades", war=4.0, radius_weight=0.5, momentum=0.0, **fields))
    x, y = (jnp.asarray(a) for a in few())
    before = one.init()
    rows, keys = one.planned(before.step)
    key = jax.random.fold_in(keys[0], 1)
    state = before._replace(factor=jnp.float32(2.0))
    own, picked = one.at(state.kept), (x[rows[0]], y[rows[0]])
    chosen = robust_losses.usual("fast-trades", 0.1, beta=jnp.float32(2.0))
    pairs, _ = own.constants((state.weights, ()), state.bound)

    def whole(weights: Any) -> Any:
        value, (_, logits, report) = robust_losses.trades(
            lambda p, s: own.trained(weights, s, p),
            lambda p: own.network(state.weights, p),
            own.statistics,
            *picked,
            key,
            chosen,
        )
        found, _ = own.constants((weights, ()), state.bound)
        term = losses.crm_penalty(logits, picked[1], found, t=one.config.t, r0=5.0)
        return value + 0.5 * term, report

    with jax.numpy_dtype_promotion("standard"):
        (value, report), slope = jax.value_and_grad(whole, has_aux=True)(state.weights)
        wanted = jax.tree.map(lambda w, g: w - 0.1 * g, state.weights, slope)
        after, metrics = one.epoch(jax.tree.map(jnp.copy, state), x, y)
    assert float(metrics.loss) == pytest.approx(float(value), rel=1e-4)
    for a, b in zip(leaves(after.weights), leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    factor = robust_losses.adjusted(2.0, report["natural"], report["robust"], ratio=4.0)
    assert float(after.factor) == pytest.approx(float(factor), rel=1e-3) and float(factor) != 2.0
    assert set(metrics.report) == {"attack_accuracy", "delta_loss", "natural_loss", "robust_loss"}
    assert np.abs(pairs).max() > 0


def record(epoch: int, accuracy: float, attack: float) -> dict[str, Any]:
    return {"epoch": epoch, "pgd_accuracy": accuracy, "attack_accuracy": attack}


def test_overfitting_to_ones_own_attack_is_told_and_stops_a_run() -> None:
    one = Config(loss="fast-at", stop_if_overfitted=True)
    log = [record(1, 0.3, 0.4), record(2, 0.4, 0.5), {**record(3, 0.4, 0.5), "pgd_accuracy": None}]
    assert robust_watch.overfitting(log) is None and robust_watch.overfitting(log[:2]) is None
    worse = [*log, record(4, 0.19, 0.7)]
    text = robust_watch.overfitting(worse)
    assert text is not None
    assert text.startswith(
        "catastrophic overfitting: PGD accuracy fell from 40.0 % in epoch 2 to 19.0 %, while"
    )
    assert robust_watch.stopped(worse, one)
    assert not robust_watch.stopped(worse, dataclasses.replace(one, stop_if_overfitted=False))
    assert robust_watch.overfitting([*log, record(4, 0.19, 0.45)]) is None  # everything got worse
    assert robust_watch.overfitting([*log, record(4, 0.21, 0.7)]) is None
    assert robust_watch.overfitting([record(1, 0.1, 0.3)]) is None  # a third of what its own attack leaves
    early = robust_watch.overfitting([record(1, 0.07, 0.3)])
    assert early is not None and "PGD accuracy is 7.0 %, while training under its own attack" in early
    assert watch.best(worse, one) == 2 and watch.judged(Config()) == "certified_estimate"


def test_a_network_that_has_not_learned_anything_overfits_nothing() -> None:
    """Ten classes: constant answers are right for a tenth, and PGD may move all of them or none."""
    log = [{**record(1, 0.11, 0.08), "majority": 0.1}, {**record(2, 0.004, 0.12), "majority": 0.1}]
    assert robust_watch.overfitting(log) is None and robust_watch.overfitting(log[1:]) is None
    log = [{**record(1, 0.2, 0.08), "majority": 0.1}, {**record(2, 0.09, 0.12), "majority": 0.1}]
    assert robust_watch.overfitting(log) is not None
    assert robust_watch.overfitting([{**record(2, 0.004, 0.2), "majority": 0.1}]) is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "trades", "attack_start": "clean"}, "attack_start=clean does not go with trades"),
        ({"loss": "at", "war": 30.0}, "war moves the weight of trades, .*, and at is none"),
        ({"loss": "trades", "war": 30.0, "robust_weight": 6.0}, "leave robust_weight at 0"),
        (
            {"loss": "crm", "radius_weight": 1.0},
            "radius_weight stands beside a robust loss, .*; crm has lam",
        ),
        (
            {"loss": "cross-entropy", "awp": 0.01},
            "awp stands beside a robust loss, and cross-entropy is none",
        ),
        ({"loss": "at", "smoothing": 0.1}, "smoothing applies to cross-entropy and crm, not to at"),
        (
            {"loss": "at", "certificate": 1.0, "eps": 0.0},
            "certificate needs a loss with constants, and eps above 0",
        ),
    ],
)
def test_settings_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**fields)


def test_the_usual_attack_is_changed_by_what_is_set() -> None:
    found = robust_step.settings_of(
        settings(loss="trades", attack_norm="l2", attack_steps=3, robust_weight=2.0)
    )
    assert (found.norm, found.steps, found.beta, found.start) == (2, 3, 2.0, "near")
    assert found.step == pytest.approx(0.025) and found.eps == 0.1
    found = robust_step.settings_of(
        settings(loss="consistency", attack_step=0.05, robust_weight=3.0, tau=2.0)
    )
    assert (found.norm, found.step, found.lam, found.tau) == (math.inf, 0.05, 3.0, 2.0)
    assert not Config(loss="at").uses_constants and Config(loss="at", radius_weight=1.0).uses_constants


def test_the_attack_rises_with_the_ramp() -> None:
    """One epoch of warm-up, two of the ramp, four steps each: the radius and its step together."""
    config = settings(loss="fast-at", epochs=4, warmup=1, ramp=2)
    one = made(config)
    shares = [
        float(one.ramp(jnp.int32(step))) for step in (0, one.steps - 1, one.steps, 3 * one.steps - 1, 99)
    ]
    assert shares == pytest.approx([0, 0, 1 / (2 * one.steps), 1, 1])
    found = robust_step.settings_of(config, share=jnp.float32(0.5))
    assert (float(found.eps), float(found.step)) == pytest.approx((0.05, 0.0625))
    assert config.attack_rises == 3 and settings(loss="fast-at").attack_rises == 0
    log = [record(1, 0.6, 0.9), record(3, 0.1, 0.95), record(4, 0.1, 0.95)]
    told = [robust_watch.overfitting(log[: n + 1], 3) for n in range(3)]
    assert told[:2] == [None, None] and "PGD accuracy is 10.0 %" in str(told[2])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["trades", "backward-smoothing", "consistency", "gradalign"])
def test_a_warm_up_with_a_ramp_is_plain_training(loss: str) -> None:
    """The step with a radius of 0 that is traced is that with eps=0."""
    rising, never = (
        made(settings(loss=loss, epochs=4, **more))
        for more in ({"warmup": 1, "ramp": 2}, {"attack_eps": 0.0})
    )
    one, other = (ahead(each, each.init(), 1) for each in (rising, never))
    for a, b in zip(leaves(one.weights), leaves(other.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_images_outside_the_box_are_refused() -> None:
    x, y = few()
    with pytest.raises(
        ValueError, match=r"at attacks images in the box \[0, 1\], and these reach from 0 to 2"
    ):
        fit(settings(loss="at", epochs=1), (2 * x, y), model=Normed())
    with pytest.raises(ValueError, match=r"AutoAugment changes images in the box \[0, 1\], and these reach"):
        fit(settings(loss="cross-entropy", autoaugment=True, epochs=1), (2 * x, y), model=Normed())
    with pytest.raises(ValueError, match=r"jitter changes images in the box \[0, 1\], and these reach"):
        fit(settings(loss="cross-entropy", jitter=0.1, epochs=1), (2 * x, y), model=Normed())


def test_the_second_view_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that the augmentation of the first view draws from."""
    keys: list[Any] = []
    monkeypatch.setattr(Trainer, "batch", lambda self, pixels, rows, key: keys.append(key) or jnp.zeros(4))
    monkeypatch.setattr(Trainer, "_step", lambda *given: None)
    rows = np.arange(4)
    made(settings(loss="consistency"))._visit(None, None, rows, rows, jax.random.key(0))
    drawn = jax.random.key_data(jax.random.split(keys[0], 3)).tolist()
    assert len(keys) == 2 and jax.random.key_data(keys[1]).tolist() not in drawn


# ---------------------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["at", "trades"])
def test_every_loss_without_a_radius_is_plain_training(loss: str) -> None:
    plain, robust = (made(settings(loss=name, attack_eps=0.0)) for name in ("cross-entropy", loss))
    one, other = (ahead(each, each.init(), 3) for each in (plain, robust))
    for a, b in zip(leaves(one.weights), leaves(other.weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", sorted(robust_losses.ROBUST))
def test_every_loss_trains(loss: str) -> None:
    x, y = few()
    config = settings(loss=loss, epochs=2, batch_size=ONE // 4, robust_every=2, holdout=0.25, awp=0.005)
    fitted = fit(config, (x, y), model=Normed())
    last = fitted.log[-1]
    assert last["skipped"] == 0 and last["delta_loss"] > 0 and 0 <= last["attack_accuracy"] <= 1
    assert 0 <= last["pgd_accuracy"] <= last["sample_accuracy"] and last["robust_gap"] is not None
    assert np.isfinite(last["loss"]) and fitted.log[0]["loss"] > last["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "consistency", "attack_steps": 2, "autoaugment": True},
        {"loss": "fast-trades", "war": 30.0, "awp": 0.005},
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    fields: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """With convolutions, BatchNorm, two views, averaged weights and a weight of the second term that moves."""
    plain = {**PLAIN, "arch": "wrn-10-0.25", "optimiser": "sgd", "learning_rate": 0.1, "batch_size": 128}
    rest = {"epochs": 2, "attack_eps": 0.1, "average": "ema", "crop": 1, "holdout": 0.6}
    config = Config(**{**plain, **rest, **fields})

    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 1:
            raise Stop

    whole = fit(config)
    with pytest.raises(Stop):
        fit(config, out=tmp_path / "run", progress=stop)
    again = resume(tmp_path / "run")
    for a, b in zip(leaves(again.state), leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)
    run = open_run(tmp_path / "run")
    assert [line["pgd_accuracy"] for line in run.log] == [line["pgd_accuracy"] for line in whole.log]


@pytest.mark.slow
def test_robust_training_beats_plain_training_under_attack() -> None:
    """Digits, l-inf 0.1, AutoAttack on all test images."""
    from lipbounds.analysis import autoattack

    data, found = digits(), {}
    for loss in ("cross-entropy", "at", "trades"):
        config = Config.usual("digits", loss=loss, epochs=30, validate_every=0, warmup=0)
        model = fit(config, data).model
        found[loss] = autoattack(model, data.test_x, data.test_y, 0.1, norm=math.inf).accuracy
    assert min(found["at"], found["trades"]) > found["cross-entropy"] + 0.1, found


@pytest.mark.slow
def test_the_figure_of_the_log_is_that_of_an_attack() -> None:
    x, y = few()
    config = settings(loss="at", epochs=3, robust_every=3)
    fitted = fit(config, (x, y), model=Normed(), devices=parallel.devices(1))
    assert ["pgd_accuracy" in line for line in fitted.log] == [False, False, True]
    found = pgd(fitted.model, x, y, 0.1, norm=math.inf, steps=10, step_size=0.025, loss="ce").accuracy
    assert fitted.log[-1]["pgd_accuracy"] == pytest.approx(found, abs=3 / ONE)


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.15, 0.25])
def test_one_step_from_the_image_overfits_and_is_warned_of(eps: float) -> None:
    """Fast AT from the image, on digits of three times the size: at 0.25 PGD breaks nearly all, at 0.15 it does not."""
    data = digits()
    parts = ("train_pixels", "test_pixels")
    wide = {name: np.kron(getattr(data, name), np.ones((1, 3, 3, 1), np.uint8)) for name in parts}
    rest: dict[str, Any] = {"attack_step": eps, "schedule": "constant", "epochs": 16, "robust_every": 4}
    config = settings(loss="fast-at", attack_eps=eps, attack_start="clean", holdout=0.1, **rest)
    config = dataclasses.replace(config, optimiser="adam", learning_rate=4e-3, batch_size=64)
    convolutions = [(8, 4, 2, 1), (16, 4, 2, 1)]
    model = ConvNet((24, 24, 1), convolutions=convolutions, dense=[64], rngs=nnx.Rngs(0))
    model.train()
    log = fit(config, dataclasses.replace(data, **wide), model=model).log
    own, left = log[-1]["attack_accuracy"], log[-1]["pgd_accuracy"]
    assert ("catastrophic overfitting" in log[-1].get("warning", "")) == (eps == 0.25)
    assert own > 0.35 and (left < 0.15 if eps == 0.25 else left > 0.5), (own, left)
