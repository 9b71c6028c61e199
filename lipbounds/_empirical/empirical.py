"""Lower bounds: difference quotients that the network attains between two explicit points.

`empirical` looks for a steep place and then measures there, in three steps:

1. read the data once, in batches, and score the points by the size of the Jacobian of the *traced form*
   (not of the user's function, whose custom derivative rules may be wrong), by the power method for p -> p;
2. climb: every step proposes to move along the gradient of ||f(x + h v) - f(x - h v)|| (a finite h sees
   across the kinks of a ReLU network, where the gradient of the Jacobian's norm is zero) mixed
   with noise, and keeps the move if the Jacobian's norm grew. One jitted scan over a batch of starts;
3. confirm: difference quotients of the form in float64 between explicit points x + h v and x - h v.

Only step 3 decides the number that is returned: for any two points

    ||f(x) - f(x')||_p / ||x - x'||_p  <=  L ,   |(f_i - f_j)(x) - (f_i - f_j)(x')| / ||x - x'||_p  <=  L_ij ,

and derivatives only choose the points. All are compared by an allowance for rounding (1e-10 of the quotient, and that
of a few of them over the distance); those that win are evaluated again with proved bounds of their rounding errors
(`forward.logits`), by which the returned quotients are lowered.

Norms are the p -> p norms of the whole (K, n) Jacobian: 2 spectral, 1 largest column sum, inf
largest row sum (Higham, "Estimating the matrix p-norm", 1992, for the power method).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._empirical import ascent
from lipbounds._empirical.survey import BATCH, Survey, direct_sources, survey
from lipbounds._form.concrete import is_concrete
from lipbounds._form.lure import LureForm
from lipbounds._form.units import Units
from lipbounds._local import forward
from lipbounds._norms.rounding import U, gamma
from lipbounds._text.calls import public
from lipbounds._text.progress import Progress, say
from lipbounds.results import NORM_NAMES, LayerBound, LowerBound, Norm, check_norm

_STARTS = 32  # points that climb
_FINALISTS = 8  # points whose whole Jacobian is computed
_PAIRS = 64  # pairs of classes that climb on their own
_DENSE_ENTRIES = 2e7  # largest Jacobian (K * n) that is computed whole without pairs
_DISTANCES = 10.0 ** -np.arange(0.0, 8.0)  # distances of step 3, in units of the inputs' scale
_SPARE = 1e-3  # relative distance of the climb from the edge of a region, so that short lines stay inside
_RELATIVE = 1e-10  # the share by which quotients of step 3 are lowered
_SAMPLE = 8  # quotients whose errors are proved first
_PROVED = 4  # quotients of every decade of distances whose errors are proved, besides those that win a pair of classes


def values64(form: Any, points: np.ndarray) -> np.ndarray:
    """The traced form at points (P, *form.in_shape), evaluated in float64: (P, K)."""
    points = np.asarray(points, dtype=np.float64)
    spare = -len(points) % 128  # few distinct shapes, so few compilations
    padded = np.concatenate([points, np.zeros((spare, *points.shape[1:]))])
    with jax.enable_x64(True):
        return np.asarray(ascent.values64(form, jnp.asarray(padded, dtype=jnp.float64)))[: len(points)]


def _norm(a: np.ndarray, p: float) -> np.ndarray:
    """p-norm of the rows of a (..., m) in float64."""
    a = np.abs(a)
    if p == 1:
        return a.sum(-1)
    return np.sqrt((a * a).sum(-1)) if p == 2 else a.max(-1, initial=0.0)


def _directions(rows: np.ndarray) -> np.ndarray:
    """The rows of a Jacobian up to a factor, in the range in which squares are safe: float32 may have overflowed."""
    rows = np.nan_to_num(rows.astype(np.float64))
    return np.asarray(rows / max(float(np.abs(rows).max(initial=0.0)), 1e-300))


def _best_direction(rows: np.ndarray, p: float) -> np.ndarray:
    """A flat v with ||J v||_p = ||J||_p ||v||_p for J = rows (K, n), up to float rounding."""
    rows = np.asarray(rows, dtype=np.float64)
    if p == 2 and len(rows) > rows.shape[1]:  # the smaller of the two Gram matrices
        return np.asarray(np.linalg.eigh(rows.T @ rows)[1][:, -1])
    if p == 2:
        _, vectors = np.linalg.eigh(rows @ rows.T)
        return rows.T @ vectors[:, -1]
    if p == 1:
        return np.eye(1, rows.shape[1], int(np.argmax(np.abs(rows).sum(0))))[0]
    return np.where(rows[int(np.argmax(np.abs(rows).sum(1)))] < 0, -1.0, 1.0)


def _pair_direction(row: np.ndarray, p: float) -> np.ndarray:
    """A flat v with <row, v> = ||row||_q ||v||_p."""
    if p == 2:
        return row
    if p == 1:
        return np.eye(1, row.size, int(np.argmax(np.abs(row))))[0] * row
    return np.where(row < 0, -1.0, 1.0)


def _lines(
    centres: np.ndarray, directions: np.ndarray, scale: float, member: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points x + h v and x - h v (float64) for every centre and distance, and the `member` of the centre.

    Zero directions are dropped.
    """
    directions = np.asarray(directions, dtype=np.float64)
    lengths = np.sqrt((directions**2).sum(1))
    keep = (lengths > 0) & np.isfinite(lengths)
    unit = directions[keep] / lengths[keep, None]
    half = 0.5 * scale * _DISTANCES
    centres = np.repeat(np.asarray(centres, dtype=np.float64)[keep], half.size, 0)
    shift = (unit[:, None, :] * half[None, :, None]).reshape(centres.shape)
    return centres + shift, centres - shift, np.repeat(member[keep], half.size, 0)


@dataclass(frozen=True)
class _Quotients:
    """Result of step 3: the largest slope, its two points (flat), and the largest slope of every pair."""

    value: float
    witness: tuple[np.ndarray, np.ndarray] | None
    pairs: np.ndarray | None

    def with_(self, other: _Quotients) -> _Quotients:
        """The larger of both, pair by pair."""
        better = self if self.value >= other.value else other
        pairs = None
        if self.pairs is not None and other.pairs is not None:
            pairs = np.maximum(self.pairs, other.pairs)
        return _Quotients(better.value, better.witness, pairs)


def _quotients(form: Any, first: np.ndarray, second: np.ndarray, p: float, pairs: bool) -> _Quotients:
    """Lowered difference quotients of the form in float64 between first[i] and second[i], (P, n) each."""
    moved = ~np.all(first == second, axis=1)
    first, second = first[moved], second[moved]
    shape = tuple(form.in_shape)
    k = int(form.num_outputs)
    best = np.zeros((k, k)) if pairs else None
    if not len(first):
        return _Quotients(0.0, None, best)
    z = values64(form, np.concatenate([first, second]).reshape(-1, *shape))
    a, b = z[: len(first)], z[len(first) :]
    distance = _norm(first - second, p)
    unit_roundoff = 2.0**-53
    shrink = 1.0 - _RELATIVE - 2 * (first.shape[1] + k) * unit_roundoff
    sample = np.linspace(0, len(first) - 1, _SAMPLE).astype(int)
    noise = np.median(_proved_changes(form, first[sample], second[sample])[1]) / distance
    change = a - b
    slopes = (_norm(change, p) / distance - noise * (k**0.5 if p == 1 else 1.0)) * shrink
    chosen = _winners(np.where(np.isfinite(slopes), slopes, -np.inf), distance)
    if best is not None:
        by = np.zeros((k, k), int)
        for place, (d, length, error) in enumerate(zip(change, distance, noise, strict=True)):
            step = (np.abs(d[:, None] - d[None, :]) / length - 2**0.5 * error) * shrink
            better = np.isfinite(step) & (step > best)
            best[better], by[better] = step[better], place
        chosen = np.union1d(chosen, by[best > 0])
    first, second, distance = first[chosen], second[chosen], distance[chosen]
    change, error = _proved_changes(form, first, second)
    slopes = (_norm(change, p) - error * (k**0.5 if p == 1 else 1.0)) / distance * shrink
    top = int(np.argmax(slopes)) if len(slopes) else 0
    if best is not None:
        best[...] = 0.0
        for d, length, wrong in zip(change, distance, error, strict=True):
            step = (np.abs(d[:, None] - d[None, :]) - 2**0.5 * wrong) / length * shrink
            np.maximum(best, step, out=best)
        np.fill_diagonal(best, 0.0)
    if not len(slopes) or slopes[top] <= 0:
        return _Quotients(0.0, None, best)
    return _Quotients(float(slopes[top]), (first[top], second[top]), best)


def _winners(slopes: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Places of the largest slopes of every decade of distances: proved errors weigh more at small ones."""
    order = np.argsort(-slopes, kind="stable")
    order = order[slopes[order] > 0]
    decades = np.floor(np.log10(distance[order]))
    return np.concatenate([order[decades == d][:_PROVED] for d in np.unique(decades)] or [order])


def _proved_changes(form: Any, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(f(x) - f(x') in float64 (P, K), proved bounds (P,) of its error in the 2-norm); 0 where it is not finite."""
    shape, count = tuple(form.in_shape), len(first)
    if not count:
        return np.zeros((0, int(form.num_outputs))), np.zeros(0)
    try:
        z, error = forward.logits(form, np.concatenate([first, second]).reshape(-1, *shape))
    except forward.NotFiniteError:  # at one of the points
        if count == 1:
            return np.zeros((1, int(form.num_outputs))), np.zeros(1)
        parts = [_proved_changes(form, first[i : i + 1], second[i : i + 1]) for i in range(count)]
        return np.concatenate([c for c, _ in parts]), np.concatenate([e for _, e in parts])
    change = z[:count] - z[count:]
    # the difference is rounded once more
    rounding = 2.0**-53 * np.sqrt(np.square(change).sum(axis=1)) * (1 + 1e-9)
    return change, (error[:count] + error[count:] + rounding) * (1 + 4 * 2.0**-53)


def _random(count: int, shape: tuple[int, ...], size: float, rng: np.random.Generator) -> np.ndarray:
    """Normal points (count, *shape) float32 of standard deviations size * (1, 0.1, 10)."""
    scales = np.resize([1.0, 0.1, 10.0], count).reshape(-1, *[1] * len(shape))
    return (rng.standard_normal((count, *shape)) * (size * scales)).astype(np.float32)


@public
def empirical(
    form: Any,
    X: Any = None,
    *,
    norm: Norm = 2,
    pairwise: bool = False,
    steps: int = 100,
    seed: int = 0,
    within: float | Literal["range"] | None = None,
    layers: bool = False,
    input_range: tuple[float, float] | None = None,
    progress: Progress = True,
) -> LowerBound:
    """Find a lower bound of L: the largest slope found, with the two points that attain it.

    Whatever `within` is, this is a lower bound of the global constant. Pairs of data points count, too: those with the
    largest difference quotient within a batch of 256.

    Args:
        form: a traced form.
        X: (N, *form.in_shape) points to start from, or an iterable of batches (n, *form.in_shape) or of pairs (x, y),
            read once, so that data need not fit into memory; None for random points (with steps > 0 some random points
            of the data's size climb too).
        norm: 1, 2 or inf.
        pairwise: also lower bounds of L_ij, (K, K): the 64 pairs with the steepest Jacobian rows climb on their own,
            the others get the largest slope of all point pairs tried.
        steps: ascent steps per start (0: only the points themselves).
        seed: of directions, noise and random points.
        within: where the slope is attained: None for anywhere, "range" for between the least and the largest value of
            every input entry over the data, a number r for within distance r (in `norm`) of a data point.
        layers: also return `.layers`: max ||W u|| / ||u|| <= ||W|| over the data, for every linear map W between taps.
        input_range: (low, high), the range of the entries of X, which are held to it then; None warns
            (`lb.UnitsWarning`) where X looks like images in other units than [0, 1].
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Raises:
        TypeError: not a form, or one whose weights are being traced.
        ValueError: wrong shapes, points that are not finite, an empty X, a wrong norm, `within` or `layers` without X.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> found = lb.empirical(form, [[1.0, 1.0], [-1.0, 2.0]])
        >>> 1.99 < found.value <= 2.0
        True
    """
    begin = time.perf_counter()
    p = check_norm(norm)
    if not isinstance(form, LureForm):
        raise TypeError(f"empirical needs a LureForm from lb.trace, got {type(form).__name__}")
    if not all(is_concrete(leaf) for leaf in jax.tree_util.tree_leaves(form)):
        why = "empirical needs concrete weights, and these are being traced: call it outside jit and grad"
        raise TypeError(f"{why} (lb.liplt.core and lb.naive.core run inside)")
    if isinstance(steps, bool) or int(steps) != steps or steps < 0:
        raise ValueError(f"steps must be a whole number >= 0, got {steps!r}")
    if (within is not None or layers) and X is None:
        raise ValueError("`within` and `layers` need data: pass X")
    k, shape = int(form.num_outputs), tuple(form.in_shape)
    n = math.prod(shape)
    if n == 0 or k == 0:
        raise ValueError("a function without inputs or without outputs has no slope")
    rng = np.random.default_rng(seed)
    points = _random(BATCH, shape, 1.0, rng) if X is None else X
    units = None if X is None else Units(input_range, in_units=isinstance(within, float | int))
    data = survey(form, points, p, _STARTS, _FINALISTS, layers, rng, units)
    xs, vs = data.starts, data.directions
    if X is not None and steps > 0 and within is None:  # add a few random starts
        other = survey(
            form, _random(2 * _STARTS, shape, data.size / math.sqrt(n), rng), p, _STARTS // 4, 0, False, rng
        )
        xs = np.concatenate([xs[: _STARTS - len(other.starts)], other.starts])
        vs = np.concatenate([vs[: _STARTS - len(other.starts)], other.directions])
    region = _region(within, p, data, xs)

    key = jax.random.key(seed)
    none = jnp.zeros((_STARTS, k), jnp.float32)
    size = jnp.asarray(data.size, jnp.float32)
    say(f"{steps} steps of ascent from {_STARTS} points")
    climbed = ascent.climb(
        form, jnp.asarray(xs), jnp.asarray(vs), none, size, key, region.device(), p, int(steps), False
    )
    xs, vs, scores = (np.asarray(a) for a in climbed)
    order = np.argsort(-scores, kind="stable")
    final = order[:_FINALISTS]
    dense = final if k * n <= _DENSE_ENTRIES else final[: int(pairwise)]
    lines = _confirming(form, xs, vs, order, dense, p, data.size)
    found = _quotients(form, *region.hold(*lines), p, pairwise)
    if len(data.pairs):
        first, second = data.pairs.astype(np.float64).reshape(-1, 2, n).swapaxes(0, 1)
        found = found.with_(_quotients(form, first, second, p, pairwise))
    if pairwise and k > 1:
        say("pairs of classes")
        found = found.with_(_climb_pairs(form, xs, final, region, p, int(steps), size, key, data.size))

    witness = None
    if found.witness is not None:
        witness = (found.witness[0].reshape(shape), found.witness[1].reshape(shape))
    nothing = "no slope larger than the rounding allowance was found"
    if not len(lines[0]):
        nothing = "no pair of points was tried: the search is in float32, whose range this network leaves"
    notes = () if found.value > 0 else (nothing,)
    if within is not None:
        near = "the range" if within == "range" else f"distance {within:g} ({NORM_NAMES[p]})"
        notes = (*notes, f"attained within {near} of the data")
    return LowerBound(
        found.value,
        p,
        "empirical",
        time.perf_counter() - begin,
        witness=witness,
        notes=notes,
        pairwise=found.pairs,
        layers=_layers(form, data, p) if layers else (),
    )


def _confirming(
    form: Any, xs: np.ndarray, vs: np.ndarray, order: np.ndarray, dense: np.ndarray, p: float, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The point pairs of step 3 (see `_lines`).

    Along the directions that climbed, and from the starts `dense` along the best direction of the whole Jacobian.
    """
    n = xs[0].size
    centres, members = [xs[order].reshape(-1, n)], [order]
    directions = [vs[order].reshape(-1, n).astype(np.float64)]
    for s in dense:
        rows = _directions(np.asarray(ascent.jacobian(form, jnp.asarray(xs[s]))))
        centres.append(xs[s].reshape(1, n))
        members.append(np.array([s]))
        directions.append(_best_direction(rows, p)[None])
    return _lines(np.concatenate(centres), np.concatenate(directions), scale, np.concatenate(members))


def _layers(form: Any, data: Survey, p: float) -> tuple[LayerBound, ...]:
    """The ratios at the points chosen in the pass, in float64, lowered by proved bounds of their rounding errors."""
    values, images = forward.layer_images(form, data.layers.astype(np.float64))
    names = {-1: "x"} | {k: f"tap {k} ({tap.name})" for k, tap in enumerate(form.taps)}
    names[len(form.taps)] = "output"
    made = []
    for k, sources in enumerate(direct_sources(form.program)):
        columns = sum(form.in_size if j < 0 else form.taps[j].size_out for j in sources)
        rows = form.num_outputs if k == len(form.taps) else form.taps[k].size_in
        value = 0.0
        if sources and k in images:
            u = np.concatenate([values[j][k] for j in sources])
            image, error = (a[k] for a in images[k])
            value = _lowered_ratio(image, error, u, p)
        source = ", ".join(names[j] for j in sources) or "nothing"
        path = "" if k == len(form.taps) else form.taps[k].path
        made.append(LayerBound(source, names[k], (rows, columns), value, int(data.examples[k]), path))
    return tuple(made)


def _lowered_ratio(image: np.ndarray, error: np.ndarray, u: np.ndarray, p: float) -> float:
    """(||image||_p - ||error||_p) / ||u||_p, rounded down; 0 where it says nothing."""
    sizes = [float(np.abs(a).max(initial=0.0)) for a in (image, error, u)]
    if not all(size < 1e150 for size in sizes) or sizes[2] < 1e-130:  # NaN, or squares overflow or underflow
        return 0.0
    slip = gamma(len(image) + len(u) + 16)
    ratio = (_norm(image, p) * (1 - slip) - _norm(error, p) * (1 + slip)) / (_norm(u, p) * (1 + slip))
    return max(float(ratio) * (1 - 4 * U), 0.0)


@dataclass(frozen=True)
class _Region:
    """Where points may lie: low <= x <= high, and ||x - centres[s]||_p <= radius for start s; flat float64."""

    p: float
    radius: float
    centres: np.ndarray
    low: np.ndarray
    high: np.ndarray
    shape: tuple[int, ...]

    def device(self) -> Any:
        """(centres, radius, low, high) for `ascent.climb`, or None where every point is allowed."""
        if math.isinf(self.radius) and np.isinf(self.low).all():
            return None
        spare = _SPARE * (self.high - self.low) if np.isfinite(self.low).all() else 0.0
        box = (jnp.asarray(a.reshape(self.shape), jnp.float32) for a in (self.low + spare, self.high - spare))
        centres = jnp.asarray(self.centres.reshape(-1, *self.shape), jnp.float32)
        return (centres, jnp.asarray((1 - _SPARE) * self.radius, jnp.float32), *box)

    def hold(
        self, first: np.ndarray, second: np.ndarray, member: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Point pairs whose two ends lie in the region of their start; clipped to the range first."""
        if math.isinf(self.radius) and np.isinf(self.low).all():
            return first, second
        first, second = (np.clip(a, self.low, self.high) for a in (first, second))
        near = [_norm(a - self.centres[member], self.p) <= self.radius for a in (first, second)]
        return first[near[0] & near[1]], second[near[0] & near[1]]


def _region(within: float | str | None, p: float, data: Survey, starts: np.ndarray) -> _Region:
    n = data.low.size
    radius, low, high = math.inf, np.full(n, -np.inf), np.full(n, np.inf)
    if isinstance(within, str) and within == "range":
        low, high = data.low.ravel(), data.high.ravel()
    elif isinstance(within, str) or isinstance(within, bool):
        raise ValueError(f'within must be None, "range" or a radius > 0, got {within!r}')
    elif within is not None:
        radius = float(within)
        if not (math.isfinite(radius) and radius > 0):
            raise ValueError(f'within must be None, "range" or a radius > 0, got {within!r}')
    return _Region(p, radius, starts.reshape(-1, n).astype(np.float64), low, high, data.low.shape)


def _climb_pairs(
    form: Any,
    xs: np.ndarray,
    final: np.ndarray,
    region: _Region,
    p: float,
    steps: int,
    size: jax.Array,
    key: jax.Array,
    scale: float,
) -> _Quotients:
    """Difference quotients for the pairs with the largest Jacobian row differences, after their own climb."""
    k, n = int(form.num_outputs), xs[0].size
    rows = _directions(np.asarray(ascent.jacobian(form, jnp.asarray(xs[final[0]]))))
    gram = rows @ rows.T  # only ranks the pairs: nothing is claimed from it
    square = np.diagonal(gram)
    i, j = np.triu_indices(k, 1)
    rank = np.argsort(-(square[i] + square[j] - 2 * gram[i, j]), kind="stable")[: min(_PAIRS, i.size)]
    i, j = i[rank], j[rank]
    functionals = np.zeros((i.size, k), np.float32)
    functionals[np.arange(i.size), i], functionals[np.arange(i.size), j] = 1.0, -1.0
    member = final[np.arange(i.size) % len(final)]
    starts = xs[member]
    slopes = np.stack([_pair_direction(row, p) for row in rows[i] - rows[j]])
    lengths = np.maximum(_norm(slopes, p), np.finfo(np.float64).tiny)[:, None]
    v = jnp.asarray((slopes / lengths).reshape(starts.shape), jnp.float32)
    here = replace(region, centres=region.centres[member])
    climbed = ascent.climb(
        form, jnp.asarray(starts), v, jnp.asarray(functionals), size, key, here.device(), p, steps, True
    )
    ends, vs = (np.asarray(a).reshape(i.size, n) for a in climbed[:2])
    return _quotients(form, *here.hold(*_lines(ends, vs, scale, np.arange(i.size))), p, True)
