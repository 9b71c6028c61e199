"""Steps along the Stiefel manifold: tangent, orthonormal afterwards, and as long as they say."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lipbounds.training.manifold import direction, orthonormalised, tangent, turned, turns

SHAPES = [(6, 6), (9, 4), (4, 9)]


def orthonormal(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(max(shape), min(shape))))
    return np.asarray(q if shape[0] >= shape[1] else q.T, np.float32)


def excess(w: Any) -> float:
    """How far the singular values are from 1."""
    return float(np.abs(np.linalg.svd(np.asarray(w, np.float64), compute_uv=False) - 1).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_tangents_keep_the_gram_matrix_to_first_order(shape: tuple[int, int]) -> None:
    w, g = orthonormal(shape), np.random.default_rng(1).normal(size=shape).astype(np.float32)
    moved = np.asarray(tangent(w, g))
    cross = w.T @ moved if shape[0] >= shape[1] else w @ moved.T
    np.testing.assert_allclose(cross + cross.T, 0, atol=2e-6)
    np.testing.assert_allclose(tangent(w, moved), moved, atol=2e-6)  # a projection
    assert np.linalg.norm(moved - g) > 0.1  # which the gradient is not
    # the nearest one: what is left over is orthogonal to every tangent
    other = np.asarray(tangent(w, np.random.default_rng(2).normal(size=shape).astype(np.float32)))
    assert abs(np.sum((g - moved) * other)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_finds_the_polar_factor(shape: tuple[int, int]) -> None:
    near = orthonormal(shape) + 0.02 * np.random.default_rng(3).normal(size=shape).astype(np.float32)
    left, _, right = np.linalg.svd(near, full_matrices=False)
    np.testing.assert_allclose(orthonormalised(near, 5), left @ right, atol=2e-6)
    assert excess(orthonormalised(near, 1)) < excess(near) ** 2 * 2
    assert np.linalg.norm(np.asarray(orthonormalised(near, 1)), 2) <= 1 + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_one_correction_is_enough_for_small_angles(shape: tuple[int, int]) -> None:
    w, g = orthonormal(shape), np.random.default_rng(5).normal(size=shape).astype(np.float32)
    assert excess(turned(w, g, g, 0.03, corrections=1)) < 3e-6
    assert excess(turned(w, g, g, 0.2, corrections=1)) > 1e-4 and excess(turned(w, g, g, 0.2)) < 3e-6


@pytest.mark.parametrize("size", [1e-34, 1e-20, 1e-5, 1e20])
@pytest.mark.parametrize("shape", SHAPES)
def test_directions_have_the_singular_vectors_of_the_gradient(shape: tuple[int, int], size: float) -> None:
    g = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    found = np.asarray(direction(np.float32(size) * g))
    values = np.linalg.svd(found, compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3
    small = min(shape)
    left, _, right = np.linalg.svd(g, full_matrices=False)
    inside = left.T @ found @ right.T
    np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=2e-4)
    assert inside.shape == (small, small)
    np.testing.assert_array_equal(direction(np.zeros(shape, np.float32)), 0)
    rough = np.asarray(direction(np.float32(size) * g, kind=jnp.bfloat16))
    assert rough.dtype == np.float32 and np.abs(rough - found).max() > 0
    assert np.vdot(rough, found) > 0.99 * np.linalg.norm(rough) * np.linalg.norm(found)
    assert 0.5 < np.linalg.svd(rough, compute_uv=False).min() and np.linalg.norm(rough, 2) < 1.4


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_stay_orthonormal_and_reach_the_minimum(shape: tuple[int, int]) -> None:
    """The nearest orthonormal matrix to A, by steps from another one, is the polar factor of A."""
    a, w = 2 * orthonormal(shape, 5), jnp.asarray(orthonormal(shape, 6))
    if shape[0] == shape[1] and np.linalg.det(a) * np.linalg.det(w) < 0:
        a[0] *= -1  # rotations do not reach reflections
    optimiser = turns(optax.linear_schedule(0.15, 0.0, 300))
    state = optimiser.init(w)
    step = jax.jit(lambda w, state: optimiser.update(w - a, state, w))
    for _ in range(300):
        change, state = step(w, state)
        assert np.linalg.norm(change, 2) < 0.25
        w = w + change
        assert excess(w) < 1e-5
    np.testing.assert_allclose(w, a / 2, atol=0.05)
    assert int(state.steps) == 300


def test_a_step_turns_by_its_rate() -> None:
    w, g = jnp.asarray(orthonormal((40, 40))), jnp.asarray(orthonormal((40, 40), 7))
    optimiser = turns(0.05)
    change, _ = optimiser.update(g, optimiser.init(w), w)
    assert 0.03 < np.linalg.norm(change, 2) < 0.08
    assert float(jnp.sum(change * g)) < 0  # downhill
