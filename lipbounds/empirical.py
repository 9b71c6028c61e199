"""Lower bounds: slopes that the network really attains, each shown by two points.

`empirical` looks for a steep place and then measures there, in three steps:

1. score the start points by the size of the Jacobian of the *traced form* (not of the user's
   function, whose custom derivative rules may lie), by the power method for the p -> p norm;
2. climb: every step proposes to move along the gradient of ||f(x + h v) - f(x - h v)|| (a finite h sees
   across the kinks of a ReLU network, where the gradient of the Jacobian's norm is zero) mixed
   with noise, and keeps the move if the Jacobian's norm grew. One jitted scan over a batch of starts;
3. confirm: difference quotients of the form in float64 between explicit points x + h v and x - h v.

Only step 3 decides the number that is returned: for any two points

    ||f(x) - f(x')||_p / ||x - x'||_p  <=  L ,   |(f_i - f_j)(x) - (f_i - f_j)(x')| / ||x - x'||_p  <=  L_ij ,

and derivatives only choose the points. The quotient is lowered by an allowance for the rounding of
the float64 evaluation (1e-10 of it, and 1000 units in the last place of the outputs over the distance),
which is far above what is seen but is not proved.

Norms are the p -> p norms of the whole (K, n) Jacobian: 2 spectral, 1 largest column sum, inf
largest row sum (Higham, "Estimating the matrix p-norm", 1992, for the power method).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds import _climb
from lipbounds._jaxpr import is_concrete
from lipbounds._tables import new_axes, show
from lipbounds.bound import NORM_NAMES, LowerBound, UpperBound, check_norm
from lipbounds.errors import GuaranteeError

_STARTS = 32  # points that climb
_FINALISTS = 8  # points whose whole Jacobian is computed
_PAIRS = 64  # pairs of classes that climb on their own
_CHUNK = 256  # data points scored at once
_DENSE_ENTRIES = 2e7  # largest Jacobian (K * n) that is computed whole without pairs
_DISTANCES = 10.0 ** -np.arange(0.0, 8.0)  # distances of step 3, in units of the inputs' scale
_RELATIVE, _ULPS = 1e-10, 1000.0  # the allowance of step 3


def values64(form: Any, points: np.ndarray) -> np.ndarray:
    """The traced form at points (P, *form.in_shape), evaluated in float64: (P, K)."""
    points = np.asarray(points, dtype=np.float64)
    spare = -len(points) % 128  # few distinct shapes, so few compilations
    padded = np.concatenate([points, np.zeros((spare, *points.shape[1:]))])
    with jax.enable_x64(True):
        return np.asarray(_climb.values64(form, jnp.asarray(padded, dtype=jnp.float64)))[: len(points)]


def _norm(a: np.ndarray, p: float) -> np.ndarray:
    """p-norm of the rows of a (..., m) in float64."""
    a = np.abs(a)
    if p == 1:
        return a.sum(-1)
    return np.sqrt((a * a).sum(-1)) if p == 2 else a.max(-1, initial=0.0)


def _best_direction(rows: np.ndarray, p: float) -> np.ndarray:
    """A flat v with ||J v||_p = ||J||_p ||v||_p for J = rows (K, n), up to float rounding."""
    rows = np.asarray(rows, dtype=np.float64)
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


def _lines(centres: np.ndarray, directions: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Points x + h v and x - h v (float64) for every centre and distance; zero directions are dropped."""
    directions = np.asarray(directions, dtype=np.float64)
    lengths = np.sqrt((directions**2).sum(1))
    keep = (lengths > 0) & np.isfinite(lengths)
    unit = directions[keep] / lengths[keep, None]
    half = 0.5 * scale * _DISTANCES
    centres = np.repeat(np.asarray(centres, dtype=np.float64)[keep], half.size, 0)
    shift = (unit[:, None, :] * half[None, :, None]).reshape(centres.shape)
    return centres + shift, centres - shift


@dataclass(frozen=True)
class _Quotients:
    """What step 3 found: the best slope, its two points (flat), and the best slope of every pair."""

    value: float
    witness: tuple[np.ndarray, np.ndarray] | None
    pairs: np.ndarray | None


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
    noise = _ULPS * unit_roundoff * (np.abs(a) + np.abs(b)).max(1, initial=0.0) / distance
    change = a - b
    # the allowance is per output: for norms 1 and 2 it grows with the number of outputs
    slopes = _norm(change, p) / distance * shrink - noise * (1.0 if p == math.inf else k ** (1.0 / p))
    slopes = np.where(np.isfinite(slopes), slopes, -np.inf)
    top = int(np.argmax(slopes))
    if best is not None:
        for d, length, error in zip(change, distance, noise, strict=True):
            step = np.abs(d[:, None] - d[None, :]) / length * shrink - 2 * error
            np.maximum(best, np.where(np.isfinite(step), step, 0.0), out=best)
        best = np.maximum(best, best.T)
        np.fill_diagonal(best, 0.0)
    witness = (first[top], second[top]) if math.isfinite(slopes[top]) else None
    return _Quotients(max(float(slopes[top]), 0.0), witness, best)


def _random(count: int, shape: tuple[int, ...], size: float, rng: np.random.Generator) -> np.ndarray:
    """Normal points (count, *shape) float32 of standard deviations size * (1, 0.1, 10)."""
    scales = np.resize([1.0, 0.1, 10.0], count).reshape(-1, *[1] * len(shape))
    return (rng.standard_normal((count, *shape)) * (size * scales)).astype(np.float32)


def _starts(form: Any, X: Any) -> np.ndarray | None:
    """The data as (N, *in_shape) float32, checked; None for None."""
    shape = tuple(form.in_shape)
    if X is None:
        return None
    points = np.asarray(X)
    if points.dtype.kind not in "fiu" and str(points.dtype) != "bfloat16":
        raise ValueError(f"X must hold real numbers, got dtype {points.dtype}")
    if points.ndim != len(shape) + 1 or points.shape[1:] != shape:
        raise ValueError(f"X must have shape (N, {', '.join(map(str, shape))}), got {points.shape}")
    if not len(points):
        raise ValueError("X holds no points: pass X=None for random points")
    with np.errstate(over="ignore"):
        points = points.astype(np.float32)
    if not np.isfinite(points).all():
        raise ValueError("X holds values that are not finite in float32")
    return points


def _best_starts(
    form: Any, points: np.ndarray, p: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """_STARTS of the points, most of them the steepest (repeated if fewer), and their directions."""
    size = min(_CHUNK, 1 << (len(points) - 1).bit_length())  # few distinct shapes, so few compilations
    scores, directions = [], []
    for begin in range(0, len(points), size):
        block = points[begin : begin + size]
        padded = np.concatenate([block, np.repeat(block[:1], size - len(block), 0)])
        v = rng.standard_normal(padded.shape).astype(np.float32)
        s, d = _climb.score(form, jnp.asarray(padded), jnp.asarray(v), p)
        scores.append(np.asarray(s)[: len(block)])
        directions.append(np.asarray(d)[: len(block)])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    steep = (
        _STARTS - _STARTS // 4
    )  # the others are spread over the rest, so that the climb does not see one place only
    spread = rng.permutation(order[steep:])[: _STARTS - steep]
    chosen = np.resize(np.concatenate([order[:steep], spread]), _STARTS)
    return points[chosen], np.concatenate(directions)[chosen]


def empirical(
    form: Any,
    X: Any = None,
    norm: Any = 2,
    pairwise: bool = False,
    steps: int = 100,
    seed: int = 0,
) -> LowerBound:
    """The largest slope found: L >= value, with the two points that show it (see the module's text).

    form      a traced form;  X  (N, *form.in_shape) points to start from, None for random points
              (with steps > 0 some random points of the data's size climb too)
    norm      1, 2 or inf
    pairwise  also lower bounds of L_ij, (K, K): the 64 pairs with the steepest Jacobian rows climb on
              their own, the others get the best of all point pairs tried
    steps     ascent steps per start (0: only the points themselves)
    seed      of directions, noise and random points

    The points are not restricted to the range of the data: this is a lower bound of the global constant.
    ValueError for wrong shapes, points that are not finite, an empty X, a wrong norm.
    """
    begin = time.perf_counter()
    p = check_norm(norm)
    if not all(is_concrete(leaf) for leaf in jax.tree_util.tree_leaves(form)):
        why = "empirical measures a concrete network, and this one is traced: call it outside jit and grad"
        raise TypeError(f"{why} (lb.liplt.core and lb.naive.core run inside)")
    if isinstance(steps, bool) or int(steps) != steps or steps < 0:
        raise ValueError(f"steps must be a whole number >= 0, got {steps!r}")
    k, shape = int(form.num_outputs), tuple(form.in_shape)
    rng = np.random.default_rng(seed)
    data = _starts(form, X)
    n = math.prod(shape)
    if n == 0 or k == 0:
        raise ValueError("a function without inputs or without outputs has no slope")
    points = _random(_CHUNK, shape, 1.0, rng) if data is None else data
    lengths = np.sqrt((points.reshape(len(points), n).astype(np.float64) ** 2).sum(1))
    scale = float(np.median(lengths)) or 1.0
    if data is not None and steps > 0:
        points = np.concatenate([data, _random(2 * _STARTS, shape, scale / math.sqrt(n), rng)])

    xs, vs = _best_starts(form, points, p, rng)
    key = jax.random.key(seed)
    none = jnp.zeros((_STARTS, k), jnp.float32)
    size = jnp.asarray(scale, jnp.float32)
    climbed = _climb.climb(form, jnp.asarray(xs), jnp.asarray(vs), none, size, key, p, int(steps), False)
    xs, vs, scores = (np.asarray(a) for a in climbed)
    order = np.argsort(-scores, kind="stable")
    final = xs[order[:_FINALISTS]]
    centres = [xs[order].reshape(-1, n)]
    directions = [vs[order].reshape(-1, n).astype(np.float64)]
    if k * n <= _DENSE_ENTRIES or pairwise:
        for x in final if k * n <= _DENSE_ENTRIES else final[:1]:
            rows = np.asarray(_climb.jacobian(form, jnp.asarray(x)))
            centres.append(x.reshape(1, n))
            directions.append(_best_direction(rows, p)[None])
    found = _quotients(form, *_lines(np.concatenate(centres), np.concatenate(directions), scale), p, pairwise)
    if pairwise and k > 1:
        extra = _climb_pairs(form, final, p, int(steps), size, key, scale)
        better = found if found.value >= extra.value else extra
        assert found.pairs is not None and extra.pairs is not None
        found = _Quotients(better.value, better.witness, np.maximum(found.pairs, extra.pairs))

    witness = None
    if found.witness is not None:
        witness = (found.witness[0].reshape(shape), found.witness[1].reshape(shape))
    notes = () if found.value > 0 else ("no slope above rounding was found at the points tried",)
    seconds = time.perf_counter() - begin
    return LowerBound(
        found.value, p, "empirical", seconds, witness=witness, notes=notes, pairwise=found.pairs
    )


def _climb_pairs(
    form: Any, final: np.ndarray, p: float, steps: int, size: jax.Array, key: jax.Array, scale: float
) -> _Quotients:
    """Difference quotients for the pairs with the largest Jacobian row differences, after their own climb."""
    k, n = int(form.num_outputs), final[0].size
    rows = np.asarray(_climb.jacobian(form, jnp.asarray(final[0])), dtype=np.float64)
    gram = rows @ rows.T  # only ranks the pairs: nothing is claimed from it
    square = np.diagonal(gram)
    i, j = np.triu_indices(k, 1)
    rank = np.argsort(-(square[i] + square[j] - 2 * gram[i, j]), kind="stable")[: min(_PAIRS, i.size)]
    i, j = i[rank], j[rank]
    functionals = np.zeros((i.size, k), np.float32)
    functionals[np.arange(i.size), i], functionals[np.arange(i.size), j] = 1.0, -1.0
    starts = final[np.arange(i.size) % len(final)]
    slopes = np.stack([_pair_direction(row, p) for row in rows[i] - rows[j]])
    lengths = np.maximum(_norm(slopes, p), np.finfo(np.float64).tiny)[:, None]
    v = jnp.asarray((slopes / lengths).reshape(starts.shape), jnp.float32)
    climbed = _climb.climb(form, jnp.asarray(starts), v, jnp.asarray(functionals), size, key, p, steps, True)
    xs, vs = (np.asarray(a).reshape(i.size, n) for a in climbed[:2])
    return _quotients(form, *_lines(xs, vs, scale), p, True)


@dataclass(frozen=True)
class Bracket:
    """lower.value <= L <= upper.value; `ratio` = upper / lower (0 / 0 is 1)."""

    lower: LowerBound
    upper: UpperBound

    def __post_init__(self) -> None:
        if not isinstance(self.lower, LowerBound) or not isinstance(self.upper, UpperBound):
            raise TypeError(
                f"a bracket is a LowerBound and an UpperBound, "
                f"got {type(self.lower).__name__} and {type(self.upper).__name__}"
            )
        check_order(self.lower, self.upper)

    @property
    def ratio(self) -> float:
        if self.lower.value == 0.0:
            return 1.0 if self.upper.value == 0.0 else math.inf
        return self.upper.value / self.lower.value

    def __repr__(self) -> str:
        low, high = show(self.lower.value, "down"), show(self.upper.value, "up")
        norm, ratio = NORM_NAMES[self.upper.norm], show(self.ratio, "up", 4)
        return (
            f"Bracket: {low} <= L <= {high}  ({norm}, ratio {ratio})\n"
            f"  lower  {self.lower.method}\n  upper  {self.upper.method}, {self.upper.guarantee}"
        )

    def plot(self, ax: Any = None) -> Any:
        """The interval as a bar; returns the matplotlib Axes."""
        ax = new_axes(height=2.0) if ax is None else ax
        ax.barh([0], [self.upper.value - self.lower.value], left=[self.lower.value], color="#4477aa")
        ax.set(yticks=[], xlabel=f"L ({NORM_NAMES[self.upper.norm]})", title=repr(self).splitlines()[0])
        return ax


def check_order(lower: LowerBound, upper: UpperBound) -> None:
    """GuaranteeError if an attained slope (or a pair's) exceeds the bound; ValueError if norms differ."""
    if lower.norm != upper.norm:
        a, b = NORM_NAMES[lower.norm], NORM_NAMES[upper.norm]
        raise ValueError(f"a lower bound in {a} and an upper bound in {b} say nothing about each other")
    clash = (
        ""
        if lower.value <= upper.value
        else f"L >= {lower.value!r} but {upper.method} says L <= {upper.value!r}"
    )
    if not clash and lower.pairwise is not None and upper.pairwise is not None:
        above = np.argwhere(lower.pairwise > upper.pairwise)
        if len(above):
            i, j = (int(c) for c in above[0])
            low, high = float(lower.pairwise[i, j]), float(upper.pairwise[i, j])
            clash = f"L_{i},{j} >= {low!r} but {upper.method} says L_{i},{j} <= {high!r}"
    if clash:
        cause = (
            "the slopes declared for a registered activation are false"
            if upper.guarantee == "assumed"
            else "this is a bug of lipbounds, please report it"
        )
        raise GuaranteeError(f"{clash} ({upper.guarantee}), and both cannot hold: {cause}")


def bracket(
    form: Any,
    X: Any = None,
    norm: Any = 2,
    pairwise: bool = False,
    guarantee: str = "auto",
    seed: int = 0,
    upper: UpperBound | None = None,
) -> Bracket:
    """A lower and an upper bound of L together, and their ratio.

    The lower one is `empirical(form, X)`, the upper one `liplt(form)` unless another `upper` is passed
    (its norm is used then). guarantee="estimate" is refused: an estimate bounds nothing.
    """
    if guarantee == "estimate":
        raise ValueError("a bracket needs a bound: guarantee='estimate' gives none")
    if upper is None:
        from lipbounds.liplt import liplt

        made = liplt(form, norm=check_norm(norm), pairwise=pairwise, guarantee=guarantee, seed=seed)
    else:
        made = upper
    if not isinstance(made, UpperBound):
        raise TypeError(f"a bracket needs an UpperBound, got {type(made).__name__}")
    return Bracket(empirical(form, X, made.norm, pairwise, seed=seed), made)
