"""One pass over data of any length: the starting points of `empirical`, and the best example of every layer.

This module only chooses points; none of its numbers is a bound. The batches have one shape, so the pass is
compiled once, and memory holds one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._empirical import ascent
from lipbounds._form.lure import LureForm, apply_tap, propagate
from lipbounds._form.program import Program
from lipbounds._form.units import Units, check_units, shape_error
from lipbounds._text.progress import say

BATCH = 256  # points at once
_CLOSE = 1e-4  # relative distance below which float32 does not resolve a difference quotient


@dataclass
class Survey:
    """Result of a pass over the data, on the host.

    starts, directions  (S, *shape) float32: the steepest points and some others, with their steepest directions
    pairs               (Q, 2, *shape): pairs of points with the largest difference quotients seen within a batch
    layers, examples    (T + 1, *shape) the point with the largest ||W u|| / ||u|| of every layer, and its number
    count, size         number of points; median of their l2 lengths
    low, high           elementwise range of the points
    """

    starts: np.ndarray
    directions: np.ndarray
    pairs: np.ndarray
    layers: np.ndarray
    examples: np.ndarray
    count: int
    size: float
    low: np.ndarray
    high: np.ndarray


def batches(X: Any, shape: tuple[int, ...], units: Units | None = None) -> Iterator[np.ndarray]:
    """X, an array (N, *shape) or an iterable of batches (n, *shape) or of pairs (x, y), in float32, checked.

    With `units` the range is checked, too: where none is declared, that of the first batch.
    """
    whole = isinstance(X, (list, tuple, np.ndarray)) or hasattr(X, "__array__") or not isinstance(X, Iterable)
    for number, item in enumerate((X,) if whole else X):
        points = np.asarray(item[0] if isinstance(item, (tuple, list)) and not whole else item)
        if points.dtype.kind not in "fiu" and str(points.dtype) != "bfloat16":
            raise ValueError(f"X must hold real numbers, got dtype {points.dtype}")
        if points.ndim != len(shape) + 1 or points.shape[1:] != shape:
            raise ValueError(shape_error("X" if whole else "every batch of X", points.shape, shape))
        with np.errstate(over="ignore"):
            points = points.astype(np.float32)
        if not np.isfinite(points).all():
            raise ValueError("X holds values that are not finite in float32")
        if units is not None and (number == 0 or units.input_range is not None):
            check_units(points, shape, units)
        if len(points):
            yield points


def survey(
    form: Any,
    X: Any,
    p: float,
    starts: int,
    pairs: int,
    layers: bool,
    rng: np.random.Generator,
    units: Units | None = None,
) -> Survey:
    """One pass over X, whose range is checked with `units`; ValueError if it holds no points."""
    shape = tuple(form.in_shape)
    found = _Pool(shape, starts, pairs, len(form.taps) + 1 if layers else 0, rng)
    for block in _blocks(batches(X, shape, units)):
        size = BATCH if len(block) == BATCH or found.count else 1 << (len(block) - 1).bit_length()
        padded = np.concatenate([block, np.repeat(block[:1], size - len(block), 0)])
        v = rng.standard_normal(padded.shape).astype(np.float32)
        seen = look(form, jnp.asarray(padded), jnp.asarray(v), len(block), p, layers)
        found.add(block, *(np.asarray(a) for a in seen))
        say(f"{found.count} points read")
    if not found.count:
        raise ValueError("X holds no points: pass X=None for random points")
    return found.result()


def _blocks(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same points in blocks of BATCH, the last one shorter."""
    kept: list[np.ndarray] = []
    for part in parts:
        for begin in range(0, len(part), BATCH):
            kept.append(part[begin : begin + BATCH])
            if sum(map(len, kept)) >= BATCH:
                joined = np.concatenate(kept)
                yield joined[:BATCH]
                kept = [joined[BATCH:]]
    rest = np.concatenate(kept) if kept else np.zeros(0)
    if len(rest):
        yield rest


class _Pool:
    """The points kept so far."""

    def __init__(
        self, shape: tuple[int, ...], starts: int, pairs: int, layers: int, rng: np.random.Generator
    ):
        self.starts = starts
        self.steep = starts - starts // 4  # the other starts are drawn at random, for variety
        self.rng, self.count = rng, 0
        self.points = self.directions = np.zeros((0, *shape), np.float32)
        self.scores = self.lots = np.zeros(0)
        self.pairs, self.quotients, self.most = np.zeros((0, 2, *shape), np.float32), np.zeros(0), pairs
        self.layers = np.zeros((layers, *shape), np.float32)
        self.ratios, self.examples = np.full(layers, -np.inf), np.zeros(layers, np.int64)
        self.lengths: list[np.ndarray] = []
        self.low, self.high = np.full(shape, np.inf), np.full(shape, -np.inf)

    def add(
        self,
        block: np.ndarray,
        scores: np.ndarray,
        directions: np.ndarray,
        quotients: np.ndarray,
        partners: np.ndarray,
        ratios: np.ndarray,
    ) -> None:
        n = len(block)
        self.points = np.concatenate([self.points, block])
        self.directions = np.concatenate([self.directions, directions[:n]])
        self.scores = np.concatenate([self.scores, scores[:n]])
        self.lots = np.concatenate([self.lots, self.rng.random(n)])
        order = np.argsort(-self.scores, kind="stable")
        rest = order[self.steep :]
        rest = rest[np.argsort(self.lots[rest], kind="stable")][: self.starts - self.steep]
        kept = np.concatenate([order[: self.steep], rest])
        self.points, self.directions = self.points[kept], self.directions[kept]
        self.scores, self.lots = self.scores[kept], self.lots[kept]

        best = np.argsort(-quotients[:n], kind="stable")[: self.most]
        best = best[quotients[best] > 0]
        self.pairs = np.concatenate([self.pairs, np.stack([block[best], block[partners[best]]], axis=1)])
        self.quotients = np.concatenate([self.quotients, quotients[best]])
        kept = np.argsort(-self.quotients, kind="stable")[: self.most]
        self.pairs, self.quotients = self.pairs[kept], self.quotients[kept]

        for k in range(len(self.ratios)):
            top = int(np.argmax(ratios[:n, k]))
            if ratios[top, k] > self.ratios[k]:
                self.ratios[k], self.layers[k] = ratios[top, k], block[top]
                self.examples[k] = self.count + top
        self.lengths.append(np.sqrt(np.square(block.reshape(n, -1), dtype=np.float64).sum(1)))
        self.low, self.high = np.minimum(self.low, block.min(0)), np.maximum(self.high, block.max(0))
        self.count += n

    def result(self) -> Survey:
        chosen = np.resize(np.arange(len(self.points)), self.starts)
        return Survey(
            self.points[chosen],
            self.directions[chosen],
            self.pairs,
            self.layers,
            self.examples,
            self.count,
            float(np.median(np.concatenate(self.lengths))) or 1.0,
            self.low,
            self.high,
        )


@functools.partial(jax.jit, static_argnames=("p", "layers"))
def look(form: Any, xs: jax.Array, vs: jax.Array, count: Any, p: float, layers: bool) -> Any:
    """Slopes at the first `count` examples of a batch xs (B, *shape).

    Returns:
        Jacobian norms (B,) from below, and their directions; the largest l2 difference quotient of every point to
        another one (B,), and to which; ratios of the layers (B, T + 1).
    """
    scores, directions = ascent.score(form, xs, vs, p)
    z = jax.vmap(lambda x: form.evaluate(x, dtype=jnp.float32).reshape(-1))(xs)
    flat = xs.reshape(len(xs), -1)

    def squares(a: jax.Array) -> jax.Array:  # inaccurate for near points, which are left out
        own = jnp.sum(a * a, axis=1)
        return jnp.maximum(own[:, None] + own - 2 * (a @ a.T), 0)

    distance, length = squares(flat), jnp.sum(flat * flat, axis=1)
    real = jnp.arange(len(xs)) < count
    apart = distance > _CLOSE**2 * jnp.maximum(length[:, None] + length, 1e-30)
    table = jnp.where(apart & real & real[:, None], squares(z) / jnp.where(apart, distance, 1), -1.0)
    ratios = jnp.zeros((len(xs), 0))
    if layers:
        ratios = jax.vmap(lambda x: layer_ratios(form, x, p))(xs)
    return scores, directions, table.max(axis=1), table.argmax(axis=1), ratios


# --- layers ------------------------------------------------------------------------------------------------------


def direct_sources(program: Program) -> tuple[tuple[int, ...], ...]:
    """Direct sources of every tap and of the output, with no tap in between; -1 is the input."""
    none: frozenset[int] = frozenset()
    reads = {0: frozenset({-1})}
    found = []
    for place, step in enumerate(program.steps):
        sources = none.union(*(reads.get(i, none) for i in step.reads))
        if place in program.tap_at:
            found.append(tuple(sorted(sources)))
            sources = frozenset({program.tap_at[place]})
        reads |= dict.fromkeys(step.outputs, sources)
    return (*found, tuple(sorted(reads.get(program.output, none))))


def layer_ratios(form: LureForm, x: jax.Array, p: float) -> jax.Array:
    """(T + 1,) ||W_k u_k||_p / ||u_k||_p at x, in float32; 0 where u_k = 0.

    u_k is what tap k (or the output) reads directly, stacked, and W_k the linear map from there to its pre-activation,
    offsets left out.
    """
    dtype = jnp.float32
    seen: dict[int, jax.Array] = {-1: x.astype(dtype).ravel()}

    def real(k: int, y: Any) -> jax.Array:
        seen[k] = apply_tap(form.taps[k], form.consts, y)
        return seen[k]

    propagate(form, seen[-1], real, dtype=dtype, affine=True)
    images: dict[int, Any] = {}

    def linear(k: int, y: Any) -> jax.Array:
        images[k] = y
        return seen[k]

    images[len(form.taps)] = propagate(form, seen[-1], linear, dtype=dtype)
    ratios = []
    for k, sources in enumerate(direct_sources(form.program)):
        if images[k] is None or not sources:
            ratios.append(jnp.zeros((), dtype))
            continue
        length = ascent.size(jnp.concatenate([seen[j] for j in sources]), p)
        ratios.append(jnp.where(length > 0, ascent.size(images[k], p) / jnp.where(length > 0, length, 1), 0))
    return jnp.stack(ratios)
