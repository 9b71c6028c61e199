"""The training losses: Proposition 2.1, gradients against finite differences, masks, and slow direct versions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from lipbounds.training.losses import (
    TRANSFORMS,
    crm_penalty,
    cross_entropy,
    gloro,
    lipschitz_margin,
    radius,
    soft_radius,
)

Array = np.ndarray
Case = tuple[Array, Array, Array]


def case(rng: np.random.Generator, classes: int, n: int = 12, dtype: Any = np.float32) -> Case:
    """Logits (most of them right, of margins near the constants), labels, symmetric constants with zero diagonal."""
    labels = rng.integers(0, classes, n).astype(np.int32)
    logits = rng.standard_normal((n, classes))
    logits[np.arange(n), labels] += rng.choice([0.0, 4.0], n, p=[0.3, 0.7])
    pairs = np.exp(rng.standard_normal((classes, classes)))
    pairs = np.triu(pairs, 1) + np.triu(pairs, 1).T
    return logits.astype(dtype), labels, pairs.astype(dtype)


def slow_radius(logits: Array, labels: Array, pairs: Array) -> Array:
    """Equation 5 of arXiv 2310.00116, entry by entry."""
    return np.array(
        [
            min((z[y] - z[i]) / pairs[y, i] for i in range(len(z)) if i != y)
            for z, y in zip(logits.astype(np.float64), labels, strict=True)
        ]
    )


def slow_soft(logits: Array, labels: Array, pairs: Array, t: float) -> Array:
    """Equation 7, with the largest term taken out of the sum."""
    found = []
    for z, y, hard in zip(logits.astype(np.float64), labels, slow_radius(logits, labels, pairs), strict=True):
        scaled = [(z[y] - z[i]) / pairs[y, i] for i in range(len(z)) if i != y]
        found.append(hard - math.log(sum(math.exp(-t * (s - hard)) for s in scaled)) / t)
    return np.array(found)


# ---------------------------------------------------------------------------------------------------- radii
both_radii = jax.jit(lambda z, y, p, t: (radius(z, y, p), soft_radius(z, y, p, t)))


@pytest.mark.parametrize("t", [0.1, 5.0, 1000.0])
@pytest.mark.parametrize("classes", [2, 3, 10, 200])
def test_proposition_2_1(rng: np.random.Generator, classes: int, t: float) -> None:
    logits, labels, pairs = case(rng, classes, 50)
    hard, soft = (np.asarray(a) for a in both_radii(logits, labels, pairs, t))
    slack = 1e-5 * (1 + np.abs(hard) + 1 / t)
    assert (soft <= hard + slack).all()
    assert (hard <= soft + math.log(classes - 1) / t + slack).all()
    np.testing.assert_allclose(hard, slow_radius(logits, labels, pairs), rtol=1e-5)
    np.testing.assert_allclose(soft, slow_soft(logits, labels, pairs, t), rtol=1e-4, atol=1e-5 / t)
    if classes == 2:
        np.testing.assert_allclose(soft, hard, rtol=1e-6, atol=1e-6 / t)
    elif t == 5:
        assert (hard - soft).max() > 1e-3  # the two are not the same thing


def test_equal_margins_attain_the_upper_side_of_proposition_2_1() -> None:
    logits, labels = np.float32([[3, 1, 1, 1, 1]]), np.int32([0])
    soft = soft_radius(logits, labels, np.float32(2), 4.0)
    np.testing.assert_allclose(soft, 1 - math.log(4) / 4, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ gradients
def differences(function: Callable[[Array], Any], at: Array, step: float = 1e-6) -> Array:
    """Central differences of a scalar function, entry by entry."""
    out = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        out[place] = (float(function(up)) - float(function(down))) / (2 * step)
    return out


LOSSES: dict[str, Callable[..., Any]] = {
    **{
        g: lambda z, y, p, g=g: cross_entropy(z, y) + 3.0 * crm_penalty(z, y, p, t=5.0, r0=1.7, g=g)
        for g in TRANSFORMS
    },
    "gloro": lambda z, y, p: gloro(z, y, p, eps=0.3),
    "lipschitz-margin": lambda z, y, p: lipschitz_margin(z, y, p, eps=0.3),
    "smoothed": lambda z, y, p: cross_entropy(z, y, 0.2),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(rng: np.random.Generator, name: str) -> None:
    logits, labels, pairs = case(rng, 4, 6, np.float64)
    with jax.enable_x64(True):
        loss = jax.jit(LOSSES[name])
        along, toward = jax.grad(loss, argnums=(0, 2))(logits, labels, pairs)
        wanted = differences(lambda z: loss(z, labels, pairs), logits)
        np.testing.assert_allclose(along, wanted, rtol=1e-5, atol=1e-8)
        wanted = differences(lambda p: loss(logits, labels, p), pairs)
        np.testing.assert_allclose(toward, wanted, rtol=1e-5, atol=1e-8)
        assert along.dtype == toward.dtype == np.float64
    assert np.abs(np.asarray(along)).max() > 1e-3
    assert (np.abs(np.asarray(toward)).max() > 1e-3) == (name != "smoothed")
    assert not np.diagonal(np.asarray(toward)).any()  # L_yy takes no part


EXTREME = {
    "tied": (np.zeros((3, 4)), 1.0),
    "constants 0": (np.float64([[5, 1, 2, 3], [1, 5, 2, 3], [9, 1, 2, 3]]), 0.0),
    "tied, constants 0": (np.zeros((3, 4)), 0.0),
    "huge margins": (np.float64([[1e15, 0, 0, 0], [-1e15, 0, 0, 1e15], [0, 0, 0, 1e15]]), 1.0),
    "huge margins, small constants": (
        np.float64([[1e15, 0, 0, 0], [-1e15, 0, 0, 1e15], [0, 0, 0, 1e15]]),
        1e-15,
    ),
    "wrong by far": (np.float64([[-900, 0, 0, 0], [0, -900, 0, 0], [0, 0, 3, 2]]), 0.01),
    "infinite constants": (np.float64([[5, 1, 2, 3], [1, 5, 2, 3], [9, 1, 2, 3]]), np.inf),
}


PENALTY_GRADIENTS = {
    g: jax.jit(
        jax.value_and_grad(lambda z, y, p, g=g: crm_penalty(z, y, p, t=5.0, r0=2.2, g=g), argnums=(0, 2))
    )
    for g in TRANSFORMS
}


@pytest.mark.parametrize("g", TRANSFORMS)
@pytest.mark.parametrize("name", EXTREME)
def test_crm_and_its_gradient_stay_finite(name: str, g: str) -> None:
    logits, constant = EXTREME[name]
    pairs = np.full((4, 4), constant, np.float32)
    np.fill_diagonal(pairs, 0)
    labels = np.int32([0, 1, 2])
    value, gradients = PENALTY_GRADIENTS[g](logits.astype(np.float32), labels, pairs)
    for found in (value, *gradients):
        assert np.isfinite(np.asarray(found)).all()


def test_zeros_and_garbage_on_the_diagonal_change_nothing(rng: np.random.Generator) -> None:
    logits, labels, pairs = case(rng, 5)
    garbage = pairs.copy()
    np.fill_diagonal(garbage, np.nan)
    for g in TRANSFORMS:
        plain, odd = (PENALTY_GRADIENTS[g](logits, labels, p) for p in (pairs, garbage))
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(odd), strict=True):
            np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------- what the penalty sums
def test_the_penalty_is_a_sum_over_chosen_examples_over_all_of_them(rng: np.random.Generator) -> None:
    logits, labels, pairs = case(rng, 6, 40)
    hard, soft = slow_radius(logits, labels, pairs), slow_soft(logits, labels, pairs, 5.0)
    positive = np.sort(hard[hard > 0])
    # between two radii, not on one that rounding moves
    r0 = float(positive[len(positive) // 2 - 1 :][:2].mean())
    chosen = (hard > 0) & (hard < r0)
    assert chosen.sum() > 3 and (hard <= 0).sum() > 3 and (hard >= r0).sum() > 3
    above = np.where(chosen, soft + np.log(pairs.shape[0] - 1) / 5.0, r0)
    transforms = {"negative": -soft, "exponential": np.exp(-soft / r0), "hinge": np.maximum(r0 - soft, 0)}
    transforms["logarithm"] = -np.log(above / r0)
    assert set(transforms) == set(TRANSFORMS)
    for g, values in transforms.items():
        found = jax.jit(partial(crm_penalty, t=5.0, r0=r0, g=g))(logits, labels, pairs)
        np.testing.assert_allclose(found, values[chosen].sum() / 40, rtol=1e-4)
    gradient = jax.jit(jax.grad(partial(crm_penalty, t=5.0, r0=r0)))(logits, labels, pairs)
    np.testing.assert_array_equal(np.abs(np.asarray(gradient)).max(axis=1) > 0, chosen)


@pytest.mark.parametrize("g", TRANSFORMS)
def test_every_g_falls_with_the_radius(g: str) -> None:
    radii = np.linspace(-3, 2.2, 50, dtype=np.float32)
    values = np.asarray(TRANSFORMS[g](radii, 2.2, 3.1))
    assert (np.diff(values) < 0).all()


def test_the_force_of_the_logarithm_does_not_vanish_with_the_radius(rng: np.random.Generator) -> None:
    """Constants c times as large divide -R_soft's gradient by c, and not the logarithm's."""
    logits, labels, pairs = case(rng, 5, 40)

    def force(g: str, factor: float) -> float:
        slope = jax.jit(jax.grad(partial(crm_penalty, t=5.0 * factor, r0=9.0 / factor, g=g)))
        return float(np.abs(slope(logits, labels, factor * pairs)).sum())

    assert force("logarithm", 1e3) == pytest.approx(force("logarithm", 1.0), rel=1e-3)
    assert force("negative", 1e3) == pytest.approx(1e-3 * force("negative", 1.0), rel=1e-3)


# ---------------------------------------------------------------------------------------------------- baselines
def slow_cross_entropy(logits: Array, target: Array) -> float:
    z = logits.astype(np.float64)
    logs = z - z.max(axis=1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
    return float(-(target * logs).sum(axis=1).mean())


def test_gloro_is_cross_entropy_with_one_more_class(rng: np.random.Generator) -> None:
    logits, labels, pairs = case(rng, 5, 30)
    rows = []
    for z in logits.astype(np.float64):
        top = int(np.argmax(z))
        rows.append([*z, max(z[i] + 0.4 * pairs[top, i] for i in range(5) if i != top)])
    wanted = slow_cross_entropy(np.array(rows), np.eye(6)[labels])
    np.testing.assert_allclose(jax.jit(partial(gloro, eps=0.4))(logits, labels, pairs), wanted, rtol=1e-5)


def test_lipschitz_margin_adds_to_every_wrong_class(rng: np.random.Generator) -> None:
    logits, labels, pairs = case(rng, 5, 30)
    np.fill_diagonal(pairs, 7)  # must not reach the label's own logit
    raised = logits.astype(np.float64)
    for row, y in zip(raised, labels, strict=True):
        for i in range(5):
            row[i] += 0 if i == y else 0.4 * pairs[y, i]
    wanted = slow_cross_entropy(raised, np.eye(5)[labels])
    np.testing.assert_allclose(
        jax.jit(partial(lipschitz_margin, eps=0.4))(logits, labels, pairs), wanted, rtol=1e-5
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing(rng: np.random.Generator, smoothing: float) -> None:
    logits, labels, _ = case(rng, 7, 20)
    target = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    found = jax.jit(partial(cross_entropy, smoothing=smoothing))(logits, labels)
    np.testing.assert_allclose(found, slow_cross_entropy(logits, target), rtol=1e-5)


# ------------------------------------------------------------------------------------------- shapes and types
@pytest.mark.parametrize("name", LOSSES)
def test_a_scalar_stands_for_every_pair(rng: np.random.Generator, name: str) -> None:
    logits, labels, _ = case(rng, 5)
    whole = np.full((5, 5), 1.3, np.float32)
    loss = jax.jit(LOSSES[name])
    np.testing.assert_array_equal(loss(logits, labels, np.float32(1.3)), loss(logits, labels, whole))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", LOSSES)
def test_types_and_vmap(rng: np.random.Generator, name: str) -> None:
    logits, labels, pairs = case(rng, 5, 12)
    loss = jax.jit(LOSSES[name])
    parts = [(logits[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]
    single = [loss(z, y, pairs) for z, y in parts]
    assert single[0].dtype == np.float32 and single[0].shape == ()
    together = jax.vmap(loss, in_axes=(0, 0, None))(logits.reshape(3, 4, 5), labels.reshape(3, 4), pairs)
    np.testing.assert_allclose(together, single, rtol=1e-5)
    with jax.enable_x64(True):
        double = loss(parts[0][0].astype(np.float64), parts[0][1], pairs.astype(np.float64))
    assert double.dtype == np.float64
    np.testing.assert_allclose(single[0], double, rtol=1e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_without_jit(rng: np.random.Generator, name: str) -> None:
    logits, labels, pairs = case(rng, 5, 12)
    loss = LOSSES[name]
    np.testing.assert_allclose(loss(logits, labels, pairs), jax.jit(loss)(logits, labels, pairs), rtol=1e-5)
