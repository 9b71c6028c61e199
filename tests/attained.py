"""Slopes that a function really attains, found by search: what every upper bound is held against.

Independent of `lb.empirical`: float64 difference quotients of the evaluation of the form between
explicit points. Derivatives (of the form, never of the user's function, whose custom rules may lie) only say
where to look.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STARTS, CHAINS, ROUNDS = 192, 24, 30


def vector_norm(a: np.ndarray, p: float) -> np.ndarray:
    """p-norm over the last axis, p in {1, 2, inf}."""
    return np.linalg.norm(a, ord=p, axis=-1)


def operator_norm(jacobians: np.ndarray, p: float) -> np.ndarray:
    """Induced p -> p norm of (..., K, n) matrices."""
    if p == 2:
        return np.linalg.norm(jacobians, ord=2, axis=(-2, -1))
    return np.abs(jacobians).sum(axis=-2 if p == 1 else -1).max(axis=-1)


@dataclass(frozen=True)
class Attained:
    """value: the largest ||dz||_p / ||dx||_p seen; pairs[i, j]: the largest |dz_i - dz_j| / ||dx||_p seen."""

    value: float
    pairs: np.ndarray


class Search:
    """Compiled float64 evaluation and Jacobian of one form (flat inputs), shared by all searches."""

    def __init__(self, form: Any) -> None:
        self.shape, self.outputs = tuple(form.in_shape), int(form.num_outputs)
        self.size = math.prod(self.shape)

        def flat(x: jax.Array) -> jax.Array:
            return form.evaluate(x.reshape(self.shape), dtype=jnp.float64)

        self._values = jax.jit(jax.vmap(flat))
        self._jacobians = jax.jit(jax.vmap(jax.jacrev(flat)))

    def values(self, x: np.ndarray) -> np.ndarray:
        """Outputs (N, K) at flat points (N, n)."""
        with jax.enable_x64(True):
            z = np.asarray(self._values(jnp.asarray(x, jnp.float64)))
        assert z.dtype == np.float64 and np.isfinite(z).all()
        return z

    def jacobians(self, x: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(self._jacobians(jnp.asarray(x, jnp.float64)))


def _best_direction(jacobian: np.ndarray, p: float) -> np.ndarray:
    """v with ||J v||_p = ||J||_p ||v||_p."""
    if p == 2:
        return np.linalg.svd(jacobian)[2][0]
    if p == 1:
        return np.eye(jacobian.shape[1])[np.argmax(np.abs(jacobian).sum(axis=0))]
    return _signs(jacobian[np.argmax(np.abs(jacobian).sum(axis=1))])


def _signs(row: np.ndarray) -> np.ndarray:
    return np.where(row < 0, -1.0, 1.0)


def _best_row_direction(row: np.ndarray, p: float) -> np.ndarray:
    """v with <row, v> = ||row||_q ||v||_p, q dual to p."""
    if p == 2:
        return row if np.any(row) else np.ones_like(row)
    return np.eye(row.size)[np.argmax(np.abs(row))] if p == 1 else _signs(row)


def _climb(search: Search, p: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random points at four scales, then hill climbing of the Jacobian norm; everything seen."""
    scales = np.array([0.1, 0.5, 2.0, 8.0])[np.arange(STARTS) % 4, None]
    x = rng.normal(size=(STARTS, search.size)) * scales
    jac = search.jacobians(x)
    seen_x, seen_j = [x], [jac]
    best = np.argsort(-operator_norm(jac, p))[:CHAINS]
    x, jac = x[best], jac[best]
    for _ in range(ROUNDS):
        step = 10.0 ** rng.uniform(-2.0, 0.7, size=(CHAINS, 1))
        noise = rng.normal(size=x.shape) / math.sqrt(search.size)
        along = np.stack([_best_direction(j, p) for j in jac]) * rng.choice(
            [-1.0, 0.0, 1.0], size=(CHAINS, 1)
        )
        proposal = x + step * (noise + along)
        proposed = search.jacobians(proposal)
        seen_x.append(proposal)
        seen_j.append(proposed)
        better = operator_norm(proposed, p) > operator_norm(jac, p)
        x, jac = np.where(better[:, None], proposal, x), np.where(better[:, None, None], proposed, jac)
    return np.concatenate(seen_x), np.concatenate(seen_j)


def attained(search: Search, norm: float = 2, seed: int = 0) -> Attained:
    """The steepest slopes between explicit pairs of points, for the network and for every pair of outputs."""
    rng = np.random.default_rng(seed)
    points, jacobians = _climb(search, norm, rng)
    base, direction = [], []
    for k in np.argsort(-operator_norm(jacobians, norm))[:12]:
        base.append(points[k])
        direction.append(_best_direction(jacobians[k], norm))
    for i in range(search.outputs):
        for j in range(i):
            rows = jacobians[:, i] - jacobians[:, j]
            dual = {1: math.inf, 2: 2}.get(norm, 1)
            k = int(np.argmax(vector_norm(rows, dual)))
            base.append(points[k])
            direction.append(_best_row_direction(rows[k], norm))
    centres, lines = np.array(base), np.array(direction)
    lines = lines / np.linalg.norm(lines, axis=1, keepdims=True)
    steps = [1e-5, 1e-3, 0.1]
    far = rng.normal(size=(2, 128, search.size)) * np.array([0.5, 4.0])[np.arange(128) % 2, None]
    first = np.concatenate([centres + h * lines for h in steps] + [far[0]])
    second = np.concatenate([centres - h * lines for h in steps] + [far[1]])
    change, distance = search.values(first) - search.values(second), vector_norm(first - second, norm)
    gaps = np.abs(change[:, :, None] - change[:, None, :]) / distance[:, None, None]
    return Attained(float((vector_norm(change, norm) / distance).max()), gaps.max(axis=0))


def attained_slope(form: Any, norm: float = 2, seed: int = 0) -> float:
    """The largest slope found for one form."""
    return attained(Search(form), norm, seed).value
