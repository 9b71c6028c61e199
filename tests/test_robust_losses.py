"""Losses of robust training: known answers on linear networks, limits, and that no gradient goes through an attack."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lipbounds.training import robust_losses
from lipbounds.training.ensembles import Ensemble
from lipbounds.training.inner_attacks import RobustSettings, ascend, attacked, begin
from lipbounds.training.losses import cross_entropy
from lipbounds.training.robust_losses import (
    ROBUST,
    adjusted,
    adversarial_weights,
    cosine,
    h_divergence,
    kl,
    nats,
    smoothed,
    usual,
)

Array = np.ndarray
BOX = {"low": -50.0, "high": 50.0}
KEY = jax.random.key(3)


def linear(w: Any, x: Any) -> Any:
    return x @ w


def perceptron(w: Any, x: Any) -> Any:
    return jnp.tanh(x @ w[0]) @ w[1]


def weights(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def value(
    name: str, net: Callable[..., Any], w: Any, x: Any, y: Any, settings: RobustSettings
) -> tuple[Any, Any]:
    """(loss, (count of forward passes, logits, report)), with a state that counts what passes through `forward`."""
    return ROBUST[name](lambda p, stats: (net(w, p), stats + 1), lambda p: net(w, p), 0, x, y, KEY, settings)


def batch(rng: np.random.Generator, classes: int, n: int = 9, size: int = 4) -> tuple[Array, Array]:
    return weights(rng, n, size), rng.integers(0, classes, n).astype(np.int32)


# ------------------------------------------------------------------------------------------------------ limits
PLAIN = ("at", "generalised-at", "trades", "backward-smoothing")  # the fast ones are the first and the third


def test_with_eps_0_every_attack_is_plain_training(rng: np.random.Generator) -> None:
    x, y = batch(rng, 3)
    w = [weights(rng, 4, 5), weights(rng, 5, 3)]

    @jax.jit
    def both(w: Any) -> Any:
        wanted = jax.value_and_grad(lambda w: cross_entropy(perceptron(w, x), y))(w)
        found = {
            name: jax.value_and_grad(
                lambda w, name=name: value(
                    name, perceptron, w, x, y, usual(name, 0.0, step=0.3, steps=1, measured=False, **BOX)
                )[0]
            )(w)
            for name in PLAIN
        }
        return wanted, found

    (loss, slope), found = both(w)
    assert set(PLAIN) | {"gradalign", "consistency"} == {loss for loss in ROBUST if "fast" not in loss}
    for fast, slow in (
        ("fast-at", "at"),
        ("fast-at-2", "at"),
        ("fast-trades", "trades"),
        ("fast-trades-2", "trades"),
    ):
        assert ROBUST[fast] is ROBUST[slow]
    for name, (other, along) in found.items():
        np.testing.assert_allclose(other, loss, rtol=1e-6, err_msg=name)
        for a, b in zip(jax.tree.leaves(along), jax.tree.leaves(slope), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=name)


def test_views_that_agree_cost_nothing_and_neither_do_parallel_gradients(rng: np.random.Generator) -> None:
    x, y = batch(rng, 2)
    w = weights(rng, 4, 2)

    @jax.jit
    def run(w: Any) -> Any:
        two = jnp.stack([x, x])
        same = value(
            "consistency", linear, w, two, y, usual("consistency", 0.0, steps=0, measured=False, **BOX)
        )
        straight = value("gradalign", linear, w, x, y, usual("gradalign", 0.3, measured=False, **BOX))
        plain = value("at", linear, w, x, y, usual("gradalign", 0.3, measured=False, **BOX))
        return cross_entropy(linear(w, x), y), same, straight, plain

    clean, same, straight, plain = run(w)
    np.testing.assert_allclose(same[0], clean, rtol=1e-5)
    assert same[1][1].shape == (9, 2)
    # a linear network of two classes has one direction
    np.testing.assert_allclose(straight[0], plain[0], rtol=1e-5)


# ------------------------------------------------------------------------------------------ linear, two classes
@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", [math.inf, 2])
def test_the_inner_maximum_of_a_linear_network_is_attained(rng: np.random.Generator, norm: float) -> None:
    """CE(m - eps ||w||_*), m the margin, w the difference of the columns, and its dual norm."""
    x, y = batch(rng, 2)
    w, eps = weights(rng, 4, 2), 0.4
    settings = {name: usual(name, eps, norm=norm, **BOX) for name in ("at", "fast-at", "generalised-at")}
    settings["fast-at"] = dataclasses.replace(settings["fast-at"], step=2 * eps)
    settings["generalised-at"] = dataclasses.replace(settings["generalised-at"], lam=1.0)
    settings["at"] = dataclasses.replace(settings["at"], steps=10 if norm == math.inf else 40)
    if norm == 2:  # one step from a random point ends on the sphere, but not at its end
        del settings["fast-at"], settings["generalised-at"]
    found = jax.jit(lambda w: {name: value(name, linear, w, x, y, each) for name, each in settings.items()})(
        w
    )
    across = (w[:, 1] - w[:, 0]).astype(np.float64)
    margin = (x @ across) * np.where(y == 1, 1, -1)
    dual = np.abs(across).sum() if norm == math.inf else np.sqrt((across**2).sum())
    wanted = np.log1p(np.exp(-(margin - eps * dual)))
    for name, (loss, (passes, logits, report)) in found.items():
        np.testing.assert_allclose(loss, wanted.mean(), rtol=1e-4, err_msg=name)
        assert passes == (2 if name == "generalised-at" else 1) and logits.shape == (9, 2)
        increase = wanted - np.log1p(np.exp(-margin))
        np.testing.assert_allclose(report["delta"], increase[::8].mean(), rtol=1e-3)
        np.testing.assert_allclose(report["attack_accuracy"], np.mean(margin > eps * dual))


def test_the_inner_maximum_of_trades_is_at_a_vertex(rng: np.random.Generator) -> None:
    x, _ = batch(rng, 2)
    w, eps = weights(rng, 4, 2), 0.4
    point = np.asarray(
        jax.jit(
            lambda w: attacked(lambda p: kl(linear(w, x), linear(w, p)), x, KEY, usual("trades", eps, **BOX))
        )(w)
    )
    signs = (point - x) / eps * np.sign(w[:, 1] - w[:, 0])
    np.testing.assert_allclose(np.abs(signs), 1, rtol=1e-4)
    assert (
        np.abs(signs.sum(axis=1)) > 3.99
    ).all()  # all coordinates on one side: the two vertices that matter


def test_trades_refuses_a_start_where_nothing_moves(rng: np.random.Generator) -> None:
    x, y = batch(rng, 2)
    with pytest.raises(ValueError, match='start must be "near" or "uniform"'):
        value("trades", linear, weights(rng, 4, 2), x, y, usual("trades", 0.1, start="clean"))


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_steps_of_backward_smoothing(rng: np.random.Generator, gamma: float) -> None:
    x, _ = batch(rng, 3)
    w = weights(rng, 4, 3)
    settings = usual("backward-smoothing", 0.3, gamma=gamma, **BOX)
    point = np.asarray(jax.jit(lambda w: smoothed(lambda p: linear(w, p), x, KEY, settings))(w))
    z = x @ w
    noise = gamma * np.asarray(jax.random.uniform(KEY, z.shape, jnp.float32, -1.0, 1.0))
    soft = jax.nn.softmax
    towards = np.asarray(soft(z + noise) - soft(z)) @ w.T
    shift = settings.step * np.sign(towards)
    if gamma == 0:
        np.testing.assert_array_equal(point, x)
        return
    start = x + np.clip(shift, -0.3, 0.3)
    away = np.asarray(soft(start @ w) - soft(z)) @ w.T
    end = x + np.clip(start - x + settings.step * np.sign(away), -0.3, 0.3)
    np.testing.assert_allclose(point, end, rtol=1e-5, atol=1e-6)
    assert (np.abs(away) > 1e-4).all() and (np.abs(towards) > 1e-4).all()  # no sign is a matter of rounding


# ---------------------------------------------------------------------------------------------------- the attacks
@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", [math.inf, 2])
def test_points_stay_in_ball_and_box(rng: np.random.Generator, norm: float) -> None:
    x = rng.random((6, 3, 3, 1)).astype(np.float32)
    y, w = rng.integers(0, 3, 6), [weights(rng, 9, 5), weights(rng, 5, 3)]
    settings = usual("at", 0.25, norm=norm)

    def lost(p: Any) -> Any:
        return nats(perceptron(w, p.reshape(6, -1)), y)

    point = np.asarray(jax.jit(lambda: attacked(lost, jnp.asarray(x), KEY, settings))())
    far = np.linalg.norm((point - x).reshape(6, -1), ord=norm, axis=1)
    assert far.max() <= 0.25 * (1 + 1e-5) and far.min() > 0.1
    assert point.min() >= 0 and point.max() <= 1
    assert (np.asarray(lost(point)) > np.asarray(lost(x))).all()


def test_loops_unroll(rng: np.random.Generator) -> None:
    x, w, where = batch(rng, 2)[0], weights(rng, 4, 1), usual("at", 0.2, **BOX)

    def run(settings: RobustSettings) -> Any:
        return jax.jit(lambda x: ascend(lambda p: jnp.tanh(p @ w)[:, 0], x, where.ball(x), settings))

    looped, unrolled = (run(dataclasses.replace(where, unrolled=u)) for u in (False, True))
    assert "while" in looped.lower(x).as_text() and "while" not in unrolled.lower(x).as_text()
    np.testing.assert_allclose(looped(x), unrolled(x), rtol=1e-6)


def test_starts() -> None:
    x, settings = jnp.full((500, 6), 0.5), usual("at", 0.2)

    @jax.jit
    def drawn() -> Any:
        each = [dataclasses.replace(settings, start=start) for start in ("uniform", "near", "clean")]
        return [begin(KEY, settings.ball(x), one) - 0.5 for one in each]

    uniform, near, clean = (np.asarray(part) for part in drawn())
    assert np.abs(uniform).max() <= 0.2 and abs(uniform.std() - 0.2 / math.sqrt(3)) < 0.01
    assert 0 < np.abs(near).max() < 0.01
    np.testing.assert_array_equal(clean, 0)


def test_no_gradient_goes_through_an_attack(rng: np.random.Generator) -> None:
    x, y = batch(rng, 3)
    w = [weights(rng, 4, 5), weights(rng, 5, 3)]
    settings = usual("at", 0.3, steps=2, norm=2, **BOX)  # in l2, where steps are differentiable

    @jax.jit
    def slopes(w: Any) -> Any:
        straight = jax.grad(lambda w: attacked(lambda p: nats(perceptron(w, p), y), x, KEY, settings).sum())
        smooth = jax.grad(lambda w: smoothed(lambda p: perceptron(w, p), x, KEY, settings).sum())
        report = jax.grad(lambda w: sum(value("trades", perceptron, w, x, y, settings)[1][2].values()))
        return straight(w), smooth(w), report(w)

    for leaf in jax.tree.leaves(slopes(w)):
        np.testing.assert_array_equal(leaf, 0)


def test_gradients_are_finite_where_logits_are_far_apart() -> None:
    far = 1e4 * np.eye(4, dtype=np.float32)
    other = np.roll(far, 1, axis=0)

    def total(z: Any) -> Any:
        return (kl(z, other) + kl(other, z) + h_divergence(z, other) + h_divergence(z, other, "min")).sum()

    for leaf in jax.jit(jax.value_and_grad(total))(far):
        assert np.isfinite(np.asarray(leaf)).all()


# ---------------------------------------------------------------------------------------------------- divergences
def test_ranges_of_the_divergences(rng: np.random.Generator) -> None:
    a, b = 3 * weights(rng, 40, 5), 3 * weights(rng, 40, 5)
    both = jax.jit(lambda a, b: [h_divergence(a, b, kind) for kind in ("js", "min")])
    js, least = (np.asarray(d) for d in both(a, b))
    p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (a.astype(np.float64), b))

    def h(p: Array) -> Array:
        return -(p * np.log(p)).sum(axis=1)

    np.testing.assert_allclose(js, h((p + q) / 2) - (h(p) + h(q)) / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(least, h((p + q) / 2) - np.minimum(h(p), h(q)), rtol=1e-4, atol=1e-6)
    slack = 1e-6
    assert (js >= -slack).all() and (js <= least + slack).all() and (js <= math.log(2)).all()
    assert (least <= math.log(2) + np.abs(h(p) - h(q)) / 2 + slack).all() and (js < 0.9 * least).any()
    hot = 300 * np.eye(5, dtype=np.float32).repeat(8, 0)
    np.testing.assert_allclose([*both(hot, hot), *both(a, a)], 0, atol=2e-6)
    np.testing.assert_allclose(both(hot, np.roll(hot, 8, 0)), math.log(2), rtol=1e-6)


def test_kl_and_its_gradient(rng: np.random.Generator) -> None:
    a, b = weights(rng, 7, 4), weights(rng, 7, 4)
    p, q = (np.asarray(jax.nn.softmax(z)) for z in (a, b))
    both = jax.jit(lambda b: (kl(a, b), jax.grad(lambda b: kl(a, b).sum())(b)))
    found, slope = both(b)
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(slope, q - p, atol=1e-6)
    np.testing.assert_allclose(both(a)[0], 0, atol=1e-7)


def test_the_cosine_of_gradients_that_vanish(rng: np.random.Generator) -> None:
    a = weights(rng, 3, 6)
    scaled = np.stack([a[0] * 1e-28, np.zeros(6, np.float32), -a[2]])
    found, slope = jax.jit(lambda b: (cosine(a, b), jax.grad(lambda b: cosine(a, b).sum())(b)))(scaled)
    np.testing.assert_allclose(found, [1, 0, -1], atol=1e-6)
    assert np.isfinite(np.asarray(slope)).all()


# ------------------------------------------------------------------------------------------- multiplier and weights
def test_the_adjusted_weight_is_stationary_at_its_ratio_alone() -> None:
    next_of = jax.jit(adjusted)
    assert next_of(4.0, 3.0, 0.1) == 4.0
    # the robust term is too large: weigh it more
    np.testing.assert_allclose(next_of(4.0, 2.0, 0.1), 5.0, rtol=1e-6)
    np.testing.assert_allclose(next_of(4.0, 4.0, 0.1), 3.0, rtol=1e-6)
    assert next_of(0.5, 4.0, 0.1) == 0.0
    for robust in (0.0, 1e-38, -1.0):
        np.testing.assert_allclose(next_of(10.0, 1.0, robust), 7.0, rtol=1e-6)
    for bad in (math.nan, math.inf):
        assert next_of(4.0, bad, 0.1) == next_of(4.0, 1.0, bad) == 4.0


def test_adversarial_weights(rng: np.random.Generator) -> None:
    w = {"kernel": weights(rng, 3, 4), "bias": weights(rng, 4), "dead": weights(rng, 2, 2)}
    kept = {name: value.copy() for name, value in w.items()}
    slope = {
        "kernel": weights(rng, 3, 4) * 1e-25,
        "bias": weights(rng, 4),
        "dead": np.zeros((2, 2), np.float32),
    }
    assert adversarial_weights(lambda w: slope, w, 0.0) is w
    perturb = jax.jit(lambda w, slope: adversarial_weights(lambda w: slope, w, 0.01))
    moved = perturb(w, slope)
    change = np.asarray(moved["kernel"]) - w["kernel"]
    np.testing.assert_allclose(np.linalg.norm(change), 0.01 * np.linalg.norm(w["kernel"]), rtol=1e-4)
    wanted = slope["kernel"].astype(np.float64)
    np.testing.assert_allclose(change / np.linalg.norm(change), wanted / np.linalg.norm(wanted), atol=1e-4)
    for name, value in kept.items():
        np.testing.assert_array_equal(w[name], value)  # nothing was changed in place
        if name != "kernel":
            np.testing.assert_array_equal(moved[name], value)
    broken = {**slope, "kernel": np.full((3, 4), np.nan, np.float32)}
    np.testing.assert_array_equal(perturb(w, broken)["kernel"], w["kernel"])
    with pytest.raises(ValueError, match="gamma must be a number >= 0"):
        adversarial_weights(lambda w: slope, w, -0.1)


def test_identical_members_change_nothing_and_others_are_averaged(rng: np.random.Generator) -> None:
    one, other = (nnx.Linear(4, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    x = weights(rng, 5, 4)
    np.testing.assert_array_equal(Ensemble([one, one])(x), one(x))
    np.testing.assert_allclose(Ensemble([one, other])(x), (one(x) + other(x)) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="at least one network"):
        Ensemble([])


# ---------------------------------------------------------------------------------------------------- plain errors
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": 1}, "norm 2 or inf"),
        ({"steps": -1}, "steps must be a whole number"),
        ({"step": math.nan}, "step must be a number >= 0"),
        ({"eps": -0.1}, "eps must be a number >= 0"),
        ({"tau": 0.0}, "tau must be a number > 0"),
        ({"low": 1.0}, "low < high"),
        ({"start": "here"}, "start must be one of uniform, near, clean"),
        ({"divergence": "kl"}, "divergence must be one of js, min"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RobustSettings(**changes)


def test_unknown_names_and_shapes(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="unknown loss 'free-at'; known: at, fast-at"):
        usual("free-at")
    assert set(robust_losses._USUAL) == set(ROBUST)
    x, y = batch(rng, 3)
    with pytest.raises(ValueError, match="two views of 9 images"):
        value("consistency", linear, weights(rng, 4, 3), x, y, usual("consistency"))
    settings = dataclasses.replace(usual("at"), steps=0)
    np.testing.assert_array_equal(ascend(lambda p: p.sum(axis=1), x, settings.ball(x), settings), x)
