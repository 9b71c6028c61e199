"""Projected gradient descent: adversarial examples, and with them an upper bound of the robust accuracy.

Every step moves along the steepest ascent direction of the loss and projects onto

    { x' : ||x' - x||_p <= eps,  low <= x' <= high }

(Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards deep learning models resistant to adversarial attacks", ICLR 2018;
the margin loss is that of Carlini and Wagner, "Towards evaluating the robustness of neural networks", 2017, without
its penalty). What is returned is checked again on the host in float64, so an example that is reported lies within eps
and in the box, exactly.

The network is evaluated as it is given, in float32 with matrix products at the highest precision (no TF32). A success
closer to the decision boundary than float32 resolves is thus one of the float32 program, and not necessarily of the
network in real arithmetic that a certificate speaks of; `evaluation` tells the two apart.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipbounds.bound import NORM_NAMES, check_norm

LOSSES = ("margin", "ce")
Progress = Callable[[str], None]

_INSIDE = 1 - 2e-6  # of eps on the device, so that float32 rounding seldom leaves the ball
_SHRINKS = 30


@dataclasses.dataclass(frozen=True, eq=False)
class Attack:
    """What an attack on N examples found.

    correct      (N,) whether the example itself is classified as labelled; a tie of logits is not
    success      (N,) correct, and `adversarial` is not
    distance     (N,) float64, ||adversarial - x|| in `norm`, rounded up; inf where not `success`
    adversarial  (N, *shape) float32: the point of smallest margin within eps that was found, also where it is no
                 success; x itself where the example is not correct
    margin       (N,) z_y - max over i != y of z_i at `adversarial`; <= 0 means that it is not classified as labelled
    eps          (N,) radii of the balls
    """

    correct: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    adversarial: np.ndarray
    margin: np.ndarray
    eps: np.ndarray
    norm: float
    loss: str

    def __len__(self) -> int:
        return len(self.success)

    @property
    def accuracy(self) -> float:
        """Share of the examples that are neither misclassified nor flipped: an upper bound of robust accuracy."""
        return float(np.mean(self.correct & ~self.success))

    def __repr__(self) -> str:
        return (
            f"Attack: {len(self)} examples, {NORM_NAMES[self.norm]}, {self.correct.mean():.2%} correct, "
            f"{self.accuracy:.2%} after the attack"
        )


def pgd(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    *,
    norm: Any = 2,
    steps: int = 100,
    restarts: int = 1,
    step_size: float | None = None,
    loss: str = "margin",
    seed: int = 0,
    low: float = 0.0,
    high: float = 1.0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Attack:
    """Search every ball ||x' - x|| <= eps for an x' in the box [low, high] that is not classified as labelled.

    Args:
        fn: batch (B, *shape) -> logits (B, K), each row on its own. The weights of an nnx module (in evaluation mode)
            are arguments of what is compiled; those that another callable closes over are its constants.
        x: (N, *shape) floating point, taken in float32.
        y: (N,) integer labels.
        eps: radius, or (N,) radii, in the units of x; inf stands for the whole box.
        norm: 2 or inf.
        steps: gradient steps per restart.
        restarts: the first starts at x, the others uniformly in the ball.
        step_size: length of a step in `norm`, in the units of x; None is 2.5 eps / steps.
        loss: that is increased: "margin", the largest other logit minus the label's, or "ce", the cross-entropy.
        seed: of the random starts, which depend on nothing else but the example's index and the restart.
        low, high: the box, which holds x.
        batch_size: examples at once; all chunks run the same compiled programs.
        progress: called with a line of text after every chunk.

    A tie of two logits counts as not classified as labelled, for x as for x', as it does in `certified_radius`.

    Raises:
        TypeError: fn is not callable.
        ValueError: shapes, labels out of range, values that are not finite, x outside the box, negative or NaN eps, an
            unknown norm or loss, no example, logits that are not finite.
    """
    p = check_norm(norm)
    if p == 1:
        raise ValueError("pgd attacks in norm 2 or inf, not 1")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    for name, value, least in (("steps", steps, 0), ("restarts", restarts, 1), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a number > 0, got {step_size!r}")
    model, weights = _split(fn)
    box = _box(low, high)
    points, labels = _examples(x, y, box)
    radii = _radii(eps, len(points))
    size = min(batch_size, len(points))
    _check_logits(model, weights, points, labels, size)
    # Beyond the box's diameter nothing changes, and float32 has no room for infinite steps.
    reach = np.minimum(radii, float(box[1] - box[0]) * (math.sqrt(points[0].size) if p == 2 else 1.0))
    pace = np.full(len(points), step_size) if step_size else 2.5 * reach / max(steps, 1)
    run = _Run(model, weights, p, loss, int(steps), int(restarts), box, jax.random.key(seed))

    found = np.empty_like(points)
    before, after = np.empty(len(points), np.float32), np.empty(len(points), np.float32)
    for start in range(0, len(points), size):
        rows = np.arange(start, start + size).clip(
            max=len(points) - 1
        )  # the last chunk repeats its last example
        kept = slice(start, min(start + size, len(points)))
        count = kept.stop - kept.start
        with jax.default_matmul_precision("highest"):
            before[kept] = run.margins(points[rows], labels[rows])[:count]
            raw = run.attack(points[rows], labels[rows], reach[rows], pace[rows], rows)
            found[kept] = _settle(points[kept], raw[:count], radii[kept], p, box)
            after[kept] = run.margins(found[rows], labels[rows])[:count]
        if progress is not None:
            progress(f"PGD in {NORM_NAMES[p]}: {kept.stop} of {len(points)} examples")
    if not np.isfinite(before).all():
        raise ValueError(f"the logits of example {int(np.argmin(np.isfinite(before)))} are not finite")
    correct = before > 0
    found[~correct] = points[~correct]
    success = correct & (after <= 0)
    distance = np.where(success, length(found, points, p), np.inf)
    return Attack(correct, success, distance, found, np.where(correct, after, before), radii, p, loss)


def length(a: np.ndarray, b: np.ndarray, norm: float) -> np.ndarray:
    """(N,) ||a - b|| of every example in float64, rounded up, so that it is never below the true distance."""
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).reshape(len(a), -1)
    if norm == math.inf:
        return difference.max(axis=1, initial=0.0) * (1 + 2.0**-51)
    top = np.maximum(difference.max(axis=1, initial=0.0), 1e-300)  # squares of small numbers underflow
    size = top * np.sqrt(np.square(difference / top[:, None]).sum(axis=1))
    return np.where(difference.any(axis=1), size * (1 + (difference.shape[1] + 16) * 2.0**-53), 0.0)


# ------------------------------------------------------------------------------------------------ on the device
@dataclasses.dataclass(frozen=True)
class _Model:
    """An nnx module without its weights, or any other callable; equal ones share what is compiled."""

    graph: Any

    def __call__(self, weights: Any, batch: jax.Array) -> jax.Array:
        if weights is None:
            return self.graph(batch)
        return nnx.merge(self.graph, weights, copy=True)(batch)


def _split(fn: Any) -> tuple[_Model, Any]:
    if isinstance(fn, nnx.Module):
        graph, weights = nnx.split(fn)
        return _Model(graph), weights
    if not callable(fn):
        raise TypeError(f"pgd attacks a function from a batch to logits, got {type(fn).__name__}")
    return _Model(fn), None


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """One attack on chunks of one size: what is compiled, and in which order it runs."""

    model: _Model
    weights: Any
    norm: float
    loss: str
    steps: int
    restarts: int
    box: tuple[np.float32, np.float32]
    key: jax.Array

    def margins(self, points: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.asarray(_margins(self.model, self.weights, points, labels))

    def attack(
        self, x: np.ndarray, y: np.ndarray, eps: np.ndarray, pace: np.ndarray, index: np.ndarray
    ) -> np.ndarray:
        """(B, *shape): the points of smallest margin, up to rounding inside ball and box."""
        where = (jnp.asarray(x), jnp.asarray(eps * _INSIDE, jnp.float32), *self.box)
        lengths, labels = jnp.asarray(pace, jnp.float32), jnp.asarray(y)
        best = (where[0], jnp.full(len(x), jnp.inf, jnp.float32))
        stride = _stride(self.steps)
        for restart in range(self.restarts):
            point = where[0]
            if restart:
                point = _start(jax.random.fold_in(self.key, restart), jnp.asarray(index), where, self.norm)
            left = self.steps
            while left:
                now = min(stride, left)
                point, best = _advance(
                    self.model, self.weights, where, labels, lengths, point, best, self.norm, self.loss, now
                )
                left -= now
            best = _keep(point, _margins(self.model, self.weights, point, labels), best)
        return np.asarray(best[0])


def _stride(steps: int) -> int:
    """Steps per call: all in one scan on accelerators, one on CPUs, whose convolutions are slow inside loops.

    Measured for the gradient of 4C3F on two cores: 4 (jax 0.10) and 8 times (jax 0.12) slower in a scan.
    """
    return 1 if jax.default_backend() == "cpu" else max(steps, 1)


def _margin(z: jax.Array, y: jax.Array) -> jax.Array:
    """(B,) z_y - max over i != y of z_i."""
    own = jnp.take_along_axis(z, y[:, None], axis=1)[:, 0]
    others = jnp.where(jnp.arange(z.shape[1]) == y[:, None], -jnp.inf, z)
    return own - others.max(axis=1)


@functools.partial(jax.jit, static_argnames=("model",))
def _margins(model: _Model, weights: Any, points: jax.Array, labels: jax.Array) -> jax.Array:
    return _margin(model(weights, points).astype(jnp.float32), labels)


@jax.jit
def _keep(point: jax.Array, margin: jax.Array, best: Any) -> Any:
    better = margin < best[1]
    return jnp.where(_as(better, point), point, best[0]), jnp.where(better, margin, best[1])


@functools.partial(jax.jit, static_argnames=("model", "norm", "loss", "steps"))
def _advance(
    model: _Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    lengths: jax.Array,
    point: jax.Array,
    best: Any,
    norm: float,
    loss: str,
    steps: int,
) -> Any:
    """`steps` steps from `point`; every point left behind is compared with `best` (points, margins)."""

    def objective(point: jax.Array) -> Any:
        z = model(weights, point).astype(jnp.float32)
        margin = _margin(z, labels)
        if loss == "margin":
            return -margin.sum(), margin
        own = jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1)
        return -own.sum(), margin

    def step(carry: Any, _: None) -> Any:
        point, best = carry
        gradient, margin = jax.grad(objective, has_aux=True)(point)
        best = _keep(point, margin, best)
        moved = point + _as(lengths, point) * _steepest(gradient, point, where, norm)
        return (_project(moved, where, norm), best), None

    return jax.lax.scan(step, (point, best), None, length=steps)[0]


def _steepest(gradient: jax.Array, point: jax.Array, where: Any, norm: float) -> jax.Array:
    """The direction of length 1 in `norm` that increases the loss most and does not leave the box at once."""
    _, _, low, high = where
    blocked = ((point <= low) & (gradient < 0)) | ((point >= high) & (gradient > 0))
    g = jnp.where(blocked | ~jnp.isfinite(gradient), 0.0, gradient)
    if norm == math.inf:
        return jnp.sign(g)
    axes = tuple(range(1, g.ndim))
    g = g / jnp.maximum(jnp.abs(g).max(axis=axes, keepdims=True), 1e-37)  # squares of small numbers underflow
    return g / jnp.maximum(jnp.sqrt(jnp.square(g).sum(axis=axes, keepdims=True)), 1e-37)


def _project(point: jax.Array, where: Any, norm: float) -> jax.Array:
    """Into the ball and then into the box, which keeps it in the ball: clipping moves every coordinate towards x.

    In l-inf this is the nearest point of both. In l2 it may lie deeper in the ball than need be, which the next steps
    make up for, since they no longer push against the box: the exact projection gives the same margins to three
    digits, at several times the cost of a step.
    """
    x, eps, low, high = where
    shift, radius = point - x, _as(eps, point)
    if norm == math.inf:
        shift = jnp.clip(shift, -radius, radius)
    else:
        shift = shift * _as(jnp.minimum(1.0, eps / jnp.maximum(_l2(shift), 1e-37)), point)
    return jnp.clip(x + shift, low, high)


def _l2(shift: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(shift).sum(axis=tuple(range(1, shift.ndim))))


@functools.partial(jax.jit, static_argnames=("norm",))
def _start(key: jax.Array, index: jax.Array, where: Any, norm: float) -> jax.Array:
    """A point drawn uniformly from the ball of every example, clipped to the box."""
    x, eps, low, high = where

    def draw(number: jax.Array) -> jax.Array:
        direction, size = jax.random.split(jax.random.fold_in(key, number))
        if norm == math.inf:
            return jax.random.uniform(direction, x.shape[1:], jnp.float32, -1.0, 1.0)
        v = jax.random.normal(direction, x.shape[1:], jnp.float32)
        share = jax.random.uniform(size, (), jnp.float32) ** (1.0 / math.prod(x.shape[1:]))
        return v * (share / jnp.sqrt(jnp.square(v).sum()))

    return jnp.clip(x + _as(eps, x) * jax.vmap(draw)(index), low, high)


def _as(values: Any, like: Any) -> Any:
    """One value per example, in the shape that broadcasts against the examples."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


# ------------------------------------------------------------------------------------------------- on the host
def _settle(
    x: np.ndarray, found: np.ndarray, eps: np.ndarray, norm: float, box: tuple[np.float32, np.float32]
) -> np.ndarray:
    """The points moved towards x, where need be, until float64 says that they lie in ball and box."""
    settled = np.where(np.isfinite(found), found, x).clip(*box)
    for power in range(_SHRINKS):
        far = length(settled, x, norm)
        over = far > eps
        if not over.any():
            return settled
        scale = _as(eps[over] / far[over] * (1 - 2.0 ** (power - _SHRINKS)), x)
        exact = x[over].astype(np.float64)
        settled[over] = (exact + scale * (settled[over] - exact)).astype(np.float32)
    return np.where(_as(length(settled, x, norm) > eps, x), x, settled)


def _box(low: Any, high: Any) -> tuple[np.float32, np.float32]:
    """The box in float32, rounded inwards."""
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"the box needs finite numbers low < high, got {low!r} and {high!r}")
    bottom, top = np.float32(low), np.float32(high)
    if float(bottom) < low:  # NumPy would compare the two in float32
        bottom = np.nextafter(bottom, np.float32(np.inf))
    if float(top) > high:
        top = np.nextafter(top, np.float32(-np.inf))
    return bottom, top


def _examples(x: Any, y: Any, box: tuple[np.float32, np.float32]) -> tuple[np.ndarray, np.ndarray]:
    points, labels = np.asarray(x), np.asarray(y)
    if points.dtype.kind != "f" and points.dtype.name != "bfloat16":
        raise ValueError(f"x must be floating point in the units of the network's input, got {points.dtype}")
    if points.ndim < 2 or not points.size:
        raise ValueError(f"x must hold examples of shape (N, ...), at least one, got shape {points.shape}")
    if labels.shape != points.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"y must hold {len(points)} integer labels, got shape {labels.shape}, dtype {labels.dtype}"
        )
    points = points.astype(np.float32)
    if not np.isfinite(points).all():
        raise ValueError("x holds NaN or infinite values")
    if points.min() < box[0] or points.max() > box[1]:
        raise ValueError(
            f"x must lie in the box [{box[0]:g}, {box[1]:g}], got values from {points.min():g} to {points.max():g}: "
            "set low and high"
        )
    return points, labels.astype(np.int32)


def _radii(eps: Any, count: int) -> np.ndarray:
    radii = np.asarray(eps, dtype=np.float64)
    if radii.shape not in ((), (count,)):
        raise ValueError(f"eps must be a number or hold {count} numbers, got shape {radii.shape}")
    if not (radii >= 0).all():
        raise ValueError("eps must be >= 0 and not NaN")
    return np.broadcast_to(radii, count).copy()


def _check_logits(model: _Model, weights: Any, x: np.ndarray, y: np.ndarray, size: int) -> None:
    batch = jax.ShapeDtypeStruct((size, *x.shape[1:]), jnp.float32)
    z = jax.eval_shape(lambda w, b: model(w, b), weights, batch)
    shape = getattr(z, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != size or shape[1] < 2:
        raise ValueError(f"fn must map {batch.shape} to logits ({size}, K) with K >= 2, got {shape}")
    if y.min() < 0 or y.max() >= shape[1]:
        raise ValueError(f"labels must lie in 0..{shape[1] - 1}, got {y.min()}..{y.max()}")
