"""The shape of a network's loss around data: slopes and curvature in the input, landscapes in the weights.

The loss is the cross-entropy of the label, in float32. What each number is:

`gradient_lipschitz`   attained: a lower bound of the local Lipschitz constant of the loss
`hessian_eigenvalue`   attained (a Rayleigh quotient): a lower bound of the largest eigenvalue at that point
`loss_increase`        attained: a lower bound of the largest increase within eps
`landscape`            a comparison: nothing is bounded

Networks of relu have no curvature between their kinks: at almost every point the Hessian is that of the softmax behind
a linear map.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy import linalg

from lipbounds._text import as_labels, check_seed, show, usual_settings, whole
from lipbounds.analysis.attack_network import Model, check_rows, outline, split
from lipbounds.analysis.attack_search import INSIDE, Problem, as_points, project
from lipbounds.analysis.attack_settings import DEFAULT, LINF, AttackSettings
from lipbounds.analysis.attacks import steepest, uniform_start
from lipbounds.analysis.batches import padded
from lipbounds.analysis.odi import diverse

PLACES = ("x", "noise", "output")


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """(N,) numbers, one for every example: `what` they are, and what that is worth (`meaning`)."""

    value: np.ndarray
    what: str
    meaning: str

    @property
    def mean(self) -> float:
        """Mean over the examples."""
        return float(self.value.mean())

    def __repr__(self) -> str:
        return (
            f"{self.what}: mean {show(self.mean)}, largest {show(float(self.value.max()))}, "
            f"{len(self.value)} examples ({self.meaning})"
        )


def _cross_entropy(z: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,) from logits (B, K)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(z.astype(jnp.float32)), labels[:, None], axis=1)[:, 0]


def _problems(
    fn: Any, x: Any, y: Any, eps: float, settings: AttackSettings
) -> Iterator[tuple[Problem, slice]]:
    """The examples in chunks of one size, and the rows that count: the last chunk repeats its last example."""
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
    settings.need_a_usual_norm("the ball")
    model, weights = split(fn)
    points = as_points(x)
    labels = as_labels(y, len(points))
    settings.check_inside(points)
    size = min(settings.batch_size, len(points))
    model = outline(model, weights, (size, *points.shape[1:]), labels).model
    check_rows(model, weights, points[:size])
    for start in range(0, len(points), size):
        rows = padded(np.arange(start, min(start + size, len(points))), size)
        radii = jnp.full(size, eps * INSIDE, jnp.float32)
        where = jnp.asarray(points[rows]), radii, *settings.box
        index, own = jnp.asarray(rows, jnp.int32), jnp.asarray(labels[rows], jnp.int32)
        yield Problem(model, weights, settings.norm, where, own, index), slice(len(points) - start)


# --------------------------------------------------------------------------------------------- slopes in the input
@usual_settings()
def gradient_lipschitz(
    fn: Any, x: Any, y: Any, eps: float, settings: AttackSettings = LINF, *, steps: int = 10, **changes: Any
) -> Measured:
    """Largest dual norm of the gradient of the loss at the points of PGD: a lower bound of its local constant.

    The Lipschitz constant of the loss on the ball { ||x' - x||_p <= eps } and the box is at least ||grad loss(x')||_q
    at every x' in it, 1/p + 1/q = 1: the l1 norm for p = inf. It is taken at x and at `steps` points of steepest ascent
    of length eps / 4. Other arguments and errors are those of `attacks.pgd`.
    """
    settings = AttackSettings.changed(settings, changes)
    whole("steps", steps)
    found = []
    for problem, rows in _problems(fn, x, y, eps, settings):
        slopes, losses = _walk(problem, np.float32(eps / 4), steps)
        found.append(np.where(np.isfinite(losses), slopes, np.nan)[:, rows])
    value = _finite(np.concatenate(found, axis=1)).max(axis=0)
    return Measured(
        value.astype(np.float64), "Local Lipschitz constant of the loss", "attained: a lower bound"
    )


@usual_settings()
def loss_increase(
    fn: Any,
    x: Any,
    y: Any,
    eps: float,
    settings: AttackSettings = LINF,
    *,
    steps: int = 10,
    step_size: float | None = None,
    **changes: Any,
) -> np.ndarray:
    """(steps, N) the loss at the points of PGD, from a random start, less the loss at x.

    Each is attained, so a lower bound of the largest increase within eps. A negative mean after the single step of
    adversarial training is a sign of catastrophic overfitting: the step no longer increases the loss. `step_size` is
    2.5 eps / steps if None. Other arguments and errors are those of `attacks.pgd`.
    """
    settings = AttackSettings.changed(settings, changes)
    size = 2.5 * eps / whole("steps", steps) if step_size is None else step_size
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a number > 0, got {step_size!r}")
    key = jax.random.key(settings.seed)
    made = []
    for problem, rows in _problems(fn, x, y, eps, settings):
        start = uniform_start(key, problem.index, problem.where, problem.norm)
        losses = np.asarray(_walk(problem, np.float32(size), steps, start)[1])
        clean = np.asarray(_losses(problem.model, problem.weights, problem.where[0], problem.labels))
        made.append((losses[1:] - clean)[:, rows])
    return _finite(np.concatenate(made, axis=1)).astype(np.float64)


def _finite(value: np.ndarray) -> np.ndarray:
    """The numbers (..., N); ValueError that names the first example where one is not finite."""
    broken = ~np.isfinite(value).all(axis=tuple(range(value.ndim - 1)))
    if broken.any():
        raise ValueError(f"the loss or its gradient is not finite near example {int(np.argmax(broken))}")
    return value


@functools.partial(jax.jit, static_argnames=("model",))
def _losses(model: Model, weights: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,) losses at x."""
    return _cross_entropy(model(weights, x), labels)


def _walk(problem: Problem, size: Any, steps: int, start: Any = None) -> tuple[jax.Array, jax.Array]:
    given = problem.model, problem.weights, problem.where, problem.labels
    first = problem.where[0] if start is None else start
    return _ascent(*given, first, size, norm=problem.norm, steps=steps + 1)


@functools.partial(jax.jit, static_argnames=("model", "norm", "steps"))
def _ascent(
    model: Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    point: jax.Array,
    size: Any,
    *,
    norm: float,
    steps: int,
) -> tuple[jax.Array, jax.Array]:
    """Dual norms of the gradient and losses, (steps, B) each, at the start and behind every step but the last."""

    def objective(point: jax.Array) -> Any:
        loss = _cross_entropy(model(weights, point), labels)
        return loss.sum(), loss

    def step(point: jax.Array, _: None) -> Any:
        gradient, loss = jax.grad(objective, has_aux=True)(point)
        flat = gradient.reshape(len(gradient), -1)
        dual = jnp.abs(flat).sum(axis=1) if norm == math.inf else jnp.sqrt(jnp.square(flat).sum(axis=1))
        moved = project(point + size * steepest(gradient, point, where, norm), where, norm)
        return moved, (dual, loss)

    return jax.lax.scan(step, point, None, length=steps)[1]


# ------------------------------------------------------------------------------------------- curvature in the input
@usual_settings()
def hessian_eigenvalue(
    fn: Any,
    x: Any,
    y: Any,
    eps: float = 0.0,
    settings: AttackSettings = DEFAULT,
    *,
    at: str = "x",
    iterations: int = 20,
    **changes: Any,
) -> Measured:
    """The largest eigenvalue of the Hessian of the loss in the input, by Lanczos on Hessian-vector products.

    Args:
        fn, x, y, settings, **changes: as those of `attacks.pgd`.
        eps: radius of the ball for the places that are not x.
        at: "x"; "noise", a point drawn uniformly from the ball; "output", a point of the ball moved so that the output
            changes in a random direction (`odi`).
        iterations: of Lanczos, with full reorthogonalisation.

    The value is the Rayleigh quotient of the vector found, which the Hessian attains: at most its largest eigenvalue,
    up to float32 rounding.
    """
    settings = AttackSettings.changed(settings, changes)
    whole("iterations", iterations)
    if at not in PLACES:
        raise ValueError(f"at must be one of {', '.join(PLACES)}, got {at!r}")
    key, found = jax.random.key(settings.seed), []
    for problem, rows in _problems(fn, x, y, eps, settings):
        point = problem.where[0]
        if at == "noise":
            point = uniform_start(key, problem.index, problem.where, problem.norm)
        elif at == "output":
            point = diverse(problem, key, problem.where[1], 2)
        size = math.prod(point.shape[1:])
        v = jax.vmap(
            lambda n, size=size: jax.random.normal(jax.random.fold_in(key, n), (size,), jnp.float32)
        )(problem.index)
        given = problem.model, problem.weights, point, problem.labels
        diagonal, beside, basis = map(np.asarray, _lanczos(*given, v, count=min(iterations, size)))
        broken = ~np.isfinite(diagonal + beside).all(axis=1)
        if broken.any():
            number = int(problem.index[np.argmax(broken)])
            raise ValueError(f"the Hessian of the loss is not finite at example {number} (place {at})")
        best = [_top(*each) for each in zip(diagonal, beside, basis, strict=True)]
        u = np.stack(best).astype(np.float32)
        image = np.asarray(_curved(*given, jnp.asarray(u)), np.float64)
        quotient = (u * image).sum(axis=1) / np.square(u.astype(np.float64)).sum(axis=1)
        found.append(quotient[rows])
    what = (
        "Largest eigenvalue of the Hessian of the loss"
        + {"x": "", "noise": ", noise", "output": ", output"}[at]
    )
    return Measured(np.concatenate(found), what, "attained: a lower bound")


def _top(diagonal: np.ndarray, beside: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The Ritz vector of the largest Ritz value; the process ends where an off-diagonal entry vanishes."""
    scale = float(np.abs(diagonal).max() + np.abs(beside).max())
    small = np.flatnonzero(beside <= 1e-6 * scale)
    count = int(small[0]) + 1 if len(small) else len(diagonal)
    _, vectors = linalg.eigh_tridiagonal(
        diagonal[:count].astype(np.float64), beside[: count - 1].astype(np.float64), select="i",
        select_range=(count - 1, count - 1),
    )  # fmt: skip
    return vectors[:, 0] @ basis[:count]


def _product(model: Model, weights: Any, point: jax.Array, labels: jax.Array, v: jax.Array) -> jax.Array:
    """(B, n) Hessians of the loss times v (B, n)."""

    def loss(point: jax.Array) -> jax.Array:
        return _cross_entropy(model(weights, point), labels).sum()

    return jax.jvp(jax.grad(loss), (point,), (v.reshape(point.shape),))[1].reshape(v.shape)


_curved = jax.jit(_product, static_argnames=("model",))


@functools.partial(jax.jit, static_argnames=("model", "count"))
def _lanczos(
    model: Model, weights: Any, point: jax.Array, labels: jax.Array, v: jax.Array, *, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Diagonals (B, count), entries beside them (B, count) and bases (B, count, n)."""

    def norm(v: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(v).sum(axis=1, keepdims=True))

    def step(state: Any, k: jax.Array) -> Any:
        basis, v = state
        basis = basis.at[:, k].set(v)
        w = _product(model, weights, point, labels, v)
        diagonal = (v * w).sum(axis=1)
        for _ in range(2):
            w = w - jnp.einsum("bk,bkn->bn", jnp.einsum("bkn,bn->bk", basis, w), basis)
        beside = norm(w)
        return (basis, w / jnp.maximum(beside, 1e-30)), (diagonal, beside[:, 0])

    empty = jnp.zeros((len(v), count, v.shape[1]), jnp.float32)
    steps = jnp.arange(count, dtype=jnp.int32)
    (basis, _), (diagonal, beside) = jax.lax.scan(step, (empty, v / norm(v)), steps)
    return diagonal.T, beside.T, basis


# ------------------------------------------------------------------------------------------ landscapes in the weights
@dataclasses.dataclass(frozen=True, eq=False)
class Landscape:
    """Mean loss and accuracy at weights w + a d (+ b e), (A,) or (A, B), for a, b in `steps`: a comparison."""

    steps: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    directions: str

    def __repr__(self) -> str:
        return (
            f"Landscape ({self.directions}): mean loss from {show(float(self.loss.min()))} to "
            f"{show(float(self.loss.max()))} for steps from {self.steps[0]:g} to {self.steps[-1]:g} (a comparison)"
        )


@usual_settings()
def landscape(
    fn: Any,
    x: Any,
    y: Any,
    steps: Sequence[float],
    *,
    directions: str = "weights",
    batch_size: int = 256,
    seed: int = 0,
) -> Landscape:
    """Mean loss and accuracy on data while the weights of a network are changed.

    Args:
        fn: an nnx module, a bound linen module, a traced form or an ONNX network: what has weights of its own.
        x: (N, *shape) floating point.
        y: (N,) integer labels.
        steps: (A,) the shares a.
        directions: "weights": (1 + a) w. "random" or "plane": along one or two random directions with every filter (the
            last axis of an array with two axes or more) scaled to the length of the network's own, other parameters
            left as they are (Li, Xu, Taylor, Studer, Goldstein, "Visualizing the loss landscape of neural nets", 2018).
        batch_size: examples at once.
        seed: of the directions.

    The weights in front of a normalisation do not change a network if they are scaled, so flat directions of "weights"
    may say nothing about the minimum. Batch statistics are left as they are.

    Raises:
        ValueError: a function without weights, an unknown kind of directions, bad data.
    """
    if directions not in ("weights", "random", "plane"):
        raise ValueError(f"directions must be weights, random or plane, got {directions!r}")
    grid = np.asarray(steps, np.float64)
    if grid.ndim != 1 or not len(grid) or not np.isfinite(grid).all():
        raise ValueError(f"steps must hold finite numbers, at least one, got {steps!r}")
    model, weights = split(fn)
    if weights is None or not jax.tree.leaves(weights):
        raise ValueError("a landscape needs a network with weights of its own, such as an nnx module")
    points = as_points(x)
    labels = as_labels(y, len(points))
    size = min(whole("batch_size", batch_size), len(points))
    model = outline(model, weights, (size, *points.shape[1:]), labels).model
    check_rows(model, weights, points[:size])
    rng = np.random.default_rng(check_seed(seed))
    ways = [
        _direction(weights, None if directions == "weights" else rng)
        for _ in range(1 + (directions == "plane"))
    ]
    places = [(a,) for a in grid] if len(ways) == 1 else [(a, b) for a in grid for b in grid]
    sums = np.zeros((len(places), 2))
    for start in range(0, len(points), size):
        rows = padded(np.arange(start, min(start + size, len(points))), size)
        batch = jnp.asarray(points[rows]), jnp.asarray(labels[rows], jnp.int32)
        for k, place in enumerate(places):
            at = tuple(np.float32(a) for a in place)
            made = _at(model, weights, tuple(ways), at, *batch)
            sums[k] += np.asarray(made, np.float64)[:, : len(points) - start].sum(axis=1)
    means = (sums / len(points)).reshape((*(len(grid),) * len(ways), 2))
    if not np.isfinite(means).all():
        raise ValueError("the loss is not finite at some of the steps: take smaller ones")
    return Landscape(grid, means[..., 0], means[..., 1], directions)


def _direction(weights: Any, rng: np.random.Generator | None) -> Any:
    """A tree like the weights: they themselves, or normal entries scaled by filter; 0 for what is not trained."""

    def of(array: Any, trained: bool) -> Any:
        if not trained or not jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.zeros_like(array)
        if rng is None:
            return array
        if array.ndim < 2:
            return jnp.zeros_like(array)
        own, drawn = np.asarray(array, np.float64), rng.standard_normal(array.shape)
        axes = tuple(range(array.ndim - 1))
        length = np.sqrt(np.square(own).sum(axis=axes)) / np.sqrt(np.square(drawn).sum(axis=axes))
        return jnp.asarray(drawn * length, array.dtype)

    def leaf(path: Any, value: Any) -> Any:
        if isinstance(value, nnx.Variable):
            return jax.tree.map(lambda array: of(array, isinstance(value, nnx.Param)), value)
        return of(value, not (path and getattr(path[0], "key", None) == "batch_stats"))

    return jax.tree_util.tree_map_with_path(leaf, weights, is_leaf=lambda v: isinstance(v, nnx.Variable))


@functools.partial(jax.jit, static_argnames=("model",))
def _at(
    model: Model, weights: Any, ways: tuple[Any, ...], place: tuple[Any, ...], x: jax.Array, y: jax.Array
) -> jax.Array:
    """(2, B) losses and whether the answers are correct at the weights moved."""
    for way, step in zip(ways, place, strict=True):
        weights = jax.tree.map(
            lambda w, d, step=step: (
                w + step.astype(w.dtype) * d if jnp.issubdtype(w.dtype, jnp.floating) else w
            ),
            weights,
            way,
        )
    z = model(weights, x)
    return jnp.stack([_cross_entropy(z, y), (z.argmax(axis=1) == y).astype(jnp.float32)])
