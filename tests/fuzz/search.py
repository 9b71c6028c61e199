"""Slopes and flips that a program attains: float64 evaluations of the user's own function, never of the traced form.

Derivatives only say where to look (a stop_gradient makes them lie); what counts are differences between two points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .program import Program

POINTS = 48  # in every call, so that each function is compiled once
SCALES = np.array([0.1, 1.0, 1.0, 3.0, 10.0, 0.01, 100.0, 1e4])


def length(a: np.ndarray, p: float) -> np.ndarray:
    return np.linalg.norm(a, ord=p, axis=-1) if a.shape[-1] else np.zeros(a.shape[:-1])


def steepest(row: np.ndarray, p: float) -> np.ndarray:
    """v, |v|_p = 1, with the largest <row, v>."""
    if p == 2:
        n = np.linalg.norm(row)
        return row / n if n > 0 else np.eye(len(row))[0]
    signs = np.where(row < 0, -1.0, 1.0)
    if p == math.inf:
        return signs
    k = int(np.argmax(np.abs(row)))
    return np.eye(len(row))[k] * signs[k]


def best_direction(jacobian: np.ndarray, p: float) -> np.ndarray:
    """v, |v|_p = 1, with |J v|_p = |J|_p."""
    if p == 2:
        return np.linalg.svd(jacobian)[2][0]
    if p == 1:
        return np.eye(jacobian.shape[1])[int(np.argmax(np.abs(jacobian).sum(axis=0)))]
    return steepest(jacobian[int(np.argmax(np.abs(jacobian).sum(axis=1)))], p)


@dataclass
class Pairs:
    """Points a, b (N, n), the change of the outputs (N, K), and the rounding error that it may have (N,)."""

    a: np.ndarray
    b: np.ndarray
    change: np.ndarray
    noise: np.ndarray

    def joined(self, other: Pairs) -> Pairs:
        names = ("a", "b", "change", "noise")
        return Pairs(*(np.concatenate([getattr(self, n), getattr(other, n)]) for n in names))

    def slope(self, p: float) -> float:
        """The largest |change|_p / |a - b|_p, rounding subtracted."""
        far = length(self.a - self.b, p)
        noise = self.noise * (self.change.shape[1] if p == 1 else math.sqrt(self.change.shape[1]))
        return float(np.max((length(self.change, p) - noise) / np.where(far > 0, far, np.inf), initial=0.0))

    def pair_slopes(self, p: float) -> np.ndarray:
        """(K, K): the largest |change_i - change_j| / |a - b|_p, rounding subtracted."""
        far = length(self.a - self.b, p)
        gaps = np.abs(self.change[:, :, None] - self.change[:, None, :]) - 2.0 * self.noise[:, None, None]
        return np.max(gaps / np.where(far > 0, far, np.inf)[:, None, None], axis=0, initial=0.0)


class Reference:
    """The user's function in float64, and its search.

    Args:
        growth: about how much of an input or constant can arrive at the output (a bound of the constant): rounding
            errors are of that size times the inputs. It only decides how much rounding is forgiven.
    """

    def __init__(self, program: Program, growth: float, seed: int) -> None:
        fn = program.function(exact=True)
        self.shape, self.size = program.shape, math.prod(program.shape)
        self.rng = np.random.default_rng(seed)
        self.growth, self.constant = growth, program.largest_constant

        def flat(v: jax.Array) -> jax.Array:
            return fn(v.reshape(self.shape))

        self._both = jax.jit(jax.vmap(lambda v: (flat(v), jax.jacfwd(flat)(v))))
        self._values = jax.jit(jax.vmap(flat))

    def _call(self, fn: Any, x: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = []
        for start in range(0, len(x), POINTS):
            part = x[start : start + POINTS]
            full = np.concatenate([part, np.zeros((POINTS - len(part), self.size))])
            with jax.enable_x64(True), jax.default_matmul_precision("highest"):
                out = fn(jnp.asarray(full, jnp.float64))
                out = out if isinstance(out, tuple) else (out,)
                parts.append([np.asarray(o)[: len(part)] for o in out])
        results = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
        assert all(r.dtype == np.float64 for r in results)
        return results

    def values(self, x: np.ndarray) -> np.ndarray:
        return self._call(self._values, x)[0]

    def both(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(outputs (N, K), Jacobians (N, K, n)) at flat points (N, n)."""
        try:
            z, jac = self._call(self._both, x)
        except NotImplementedError:  # at[].apply has no derivative in JAX
            step = 1e-5 * (1.0 + np.abs(x).max(axis=1, keepdims=True))
            around = [(self.values(x + step * e), self.values(x - step * e)) for e in np.eye(self.size)]
            jac = np.stack([(a - b) / (2.0 * step) for a, b in around], axis=-1)
            z = self.values(x)
        return z, jac.reshape(len(x), z.shape[1], self.size)

    def noise(self, *points: np.ndarray) -> np.ndarray:
        """What rounding may have done to outputs at these points."""
        size = sum(np.abs(p).max(axis=1, initial=0.0) for p in points)
        return 2e-15 * self.growth * self.constant * (1.0 + size * math.sqrt(self.size))

    def pairs(self, a: np.ndarray, b: np.ndarray) -> Pairs:
        za, zb = self.values(a), self.values(b)
        noise = self.noise(a, b) + 1e-15 * (np.abs(za).max(axis=1) + np.abs(zb).max(axis=1))
        good = np.isfinite(za).all(axis=1) & np.isfinite(zb).all(axis=1) & np.isfinite(noise)
        return Pairs(a[good], b[good], (za - zb)[good], noise[good])

    def points(self, count: int = POINTS) -> np.ndarray:
        x = self.rng.normal(size=(count, self.size)) * SCALES[np.arange(count) % len(SCALES), None]
        x[::7] = np.abs(x[::7])
        return x

    def search(self, rounds: int = 4) -> Pairs:
        """Steep pairs: climbing on the Jacobian's norm, short steps where it is largest, and bisection of long ones."""
        x = self.points()
        _, jac = self.both(x)
        for _ in range(rounds):
            order = np.argsort(-np.nan_to_num(np.abs(jac).sum(axis=(1, 2))))[:8]
            x, jac = x[order], jac[order]
            many = np.repeat(x, POINTS // 8, axis=0)
            step = 10.0 ** self.rng.uniform(-2, 0.5, size=(POINTS, 1)) * (
                0.3 + np.abs(many).max(axis=1, keepdims=True)
            )
            step[::6] *= 10.0
            new = many + step * self.rng.normal(size=many.shape) / math.sqrt(self.size)
            _, found = self.both(new)
            x, jac = np.concatenate([x, new]), np.concatenate([jac, found])
        order = np.argsort(-np.nan_to_num(np.abs(jac).sum(axis=(1, 2))))[:6]
        near = self.along(x[order], jac[order])
        return near.joined(self.bisected())

    def along(self, x: np.ndarray, jac: np.ndarray, reach: float = 1e-3) -> Pairs:
        a, b = [], []
        for point, j in zip(x, np.nan_to_num(jac), strict=True):
            rows = [j[i] - j[k] for i in range(len(j)) for k in range(i)][:6] + list(j[:3])
            lines = [best_direction(j, p) for p in (1, 2, math.inf)]
            lines += [steepest(row, p) for row in rows for p in (1, 2, math.inf)]
            for line in lines:
                a.append(point + reach * line)
                b.append(point - reach * line)
        return self.pairs(np.array(a), np.array(b))

    def bisected(self, rounds: int = 10) -> Pairs:
        """Long pairs, and again and again the steeper half: a slope between two points never falls, and jumps show."""
        a, b = self.points(), self.points()
        seen = self.pairs(a, b)
        za, zb = self.values(a), self.values(b)
        for _ in range(rounds):
            m = 0.5 * (a + b)
            zm = self.values(m)
            first = np.nan_to_num(length(za - zm, 2)) >= np.nan_to_num(length(zm - zb, 2))
            a, za = np.where(first[:, None], a, m), np.where(first[:, None], za, zm)
            b, zb = np.where(first[:, None], m, b), np.where(first[:, None], zm, zb)
        return seen.joined(self.pairs(a, b))

    def inside(self, x: np.ndarray, eps: float, p: float) -> Pairs:
        """Steep pairs within the ball of radius eps about one flat point."""
        d = self.rng.normal(size=(POINTS, self.size))
        d /= np.maximum(length(d, p), 1e-300)[:, None]
        d *= eps * self.rng.uniform(0.0, 1.0, size=(POINTS, 1)) ** (1 / self.size)
        d[0] = 0.0
        points = x + 0.99 * d
        _, jac = self.both(points)
        order = np.argsort(-np.nan_to_num(np.abs(jac).sum(axis=(1, 2))))[:4]
        found = self.along(points[order], jac[order], 0.005 * eps / max(1.0, math.sqrt(self.size)))
        rest = self.rng.permutation(POINTS)
        return found.joined(self.pairs(points, points[rest]))

    def attack(
        self, x: np.ndarray, label: int, radius: float, p: float, rounds: int = 4
    ) -> tuple[float, np.ndarray]:
        """(the least margin z_label - max of the others, noise subtracted, and where) within the radius."""
        d = self.rng.normal(size=(POINTS, self.size))
        d /= np.maximum(length(d, p), 1e-300)[:, None]
        d *= radius * np.where(np.arange(POINTS) % 3, self.rng.uniform(size=POINTS), 1.0)[:, None]
        d[0] = 0.0
        least, where = math.inf, x
        for turn in range(rounds + 1):
            points = x + d
            z, jac = self.both(points)
            others = np.delete(np.arange(z.shape[1]), label)
            gaps = z[:, [label]] - z[:, others]
            margins = gaps.min(axis=1) + 2.0 * self.noise(points) + 1e-14 * np.abs(z).max(axis=1)
            k = int(np.argmin(np.where(np.isfinite(margins), margins, np.inf)))
            if margins[k] < least:
                least, where = float(margins[k]), points[k]
            for i in range(POINTS):
                rival = others[i % len(others)] if turn % 2 else others[int(np.argmin(gaps[i]))]
                line = -steepest(np.nan_to_num(jac[i, label] - jac[i, rival]), p)
                d[i] = radius * line if i % 2 else d[i] + 0.5 * radius * line
            size = length(d, p)[:, None]
            d *= np.minimum(1.0, radius / np.maximum(size, 1e-300)) * (1 - 1e-12)
        return least, where
