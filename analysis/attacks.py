"""Gradient attacks: adversarial examples, and with them an upper bound of the robust accuracy.

Every step of projected gradient descent moves along the steepest ascent direction of the loss and projects onto

    { x' : ||x' - x||_p <= eps,  low <= x' <= high }

(Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards deep learning models resistant to adversarial attacks", ICLR 2018).
One full step from x is the fast gradient sign method (Goodfellow, Shlens, Szegedy, "Explaining and harnessing
adversarial examples", ICLR 2015).

The margin loss is that of Carlini and Wagner, "Towards evaluating the robustness of neural networks", 2017: their f6
for an attack without a target is max(z_y - max over i != y of z_i, -kappa), which is decreased; here kappa is infinite
and their penalty on the distance is the ball. With kappa = 0 the steps are the same up to the first success and end
there, so the same examples are broken: "cw" is another name of "margin".

All adversarial examples are checked on the host in float64, so an example that is reported lies within eps and in
the box exactly; `search` does this for all attacks.

The network is evaluated as it is given, in float32 with matrix products at the highest precision (no TF32). A success
closer to the decision boundary than float32 resolves is thus one of the float32 program, and not necessarily of the
network in real arithmetic, which is what a certificate covers; `evaluation` distinguishes the two.
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

from lipbounds._text import as_labels, reporting, say, whole
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings
from lipbounds.results import NORM_NAMES

LOSSES = ("margin", "ce", "cw")

_INSIDE = 1 - 2e-6  # of eps on the device, so that float32 rounding seldom leaves the ball
_SHRINKS = 30


@dataclasses.dataclass(frozen=True, eq=False)
class Attack:
    """Result of an attack on N examples.

    correct      (N,) whether the example itself is classified as labelled; a tie of logits counts as wrong
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
    settings: AttackSettings = DEFAULT,
    *,
    steps: int = 100,
    restarts: int = 1,
    step_size: float | None = None,
    loss: str = "margin",
    **changes: Any,
) -> Attack:
    """Search every ball ||x' - x|| <= eps for an x' in the box [low, high] that is not classified as labelled.

    Args:
        fn: batch (B, *shape) -> logits (B, K), each row on its own. The weights of an nnx module (in evaluation mode)
            are arguments of what is compiled; those that another callable closes over are its constants.
        x: (N, *shape) floating point in the box, taken in float32.
        y: (N,) integer labels.
        eps: radius, or (N,) radii, in the units of x; inf stands for the whole box.
        settings: norm, box, batch size, seed and progress.
        steps: gradient steps per restart.
        restarts: the first starts at x, the others uniformly in the ball.
        step_size: length of a step in `norm`, in the units of x; None is 2.5 eps / steps.
        loss: that is increased: "margin", the largest other logit minus the label's, also known as "cw" (see above),
            or "ce", the cross-entropy, whose gradient vanishes in float32 where the logits are far apart.
        **changes: fields of `settings` by name, for this call.

    A tie of two logits counts as not classified as labelled, for x as for x', as it does in `certified_radius`.

    Raises:
        TypeError: fn is not callable.
        ValueError: shapes, labels out of range, values that are not finite, x outside the box, negative or NaN eps, an
            unknown norm or loss, no example, logits that are not finite.
    """
    settings = settings.changed(changes)
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    steps, restarts = whole("steps", steps, 0), whole("restarts", restarts)
    if step_size is not None and not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be a number > 0, got {step_size!r}")
    key = jax.random.key(settings.seed)

    def find(problem: Problem) -> jax.Array:
        return _ascend(problem, "ce" if loss == "ce" else "margin", steps, restarts, step_size, key)

    name = "FGSM" if steps == 1 and step_size is None else "PGD"
    with reporting(settings.progress):
        return search(name, find, fn, x, y, eps, settings, loss)


def fgsm(
    fn: Any, x: Any, y: Any, eps: Any, settings: AttackSettings = DEFAULT, *, loss: str = "ce", **changes: Any
) -> Attack:
    """One step of length eps from x, along the sign of the loss's gradient (norm inf) or along the gradient (norm 2).

    Coordinates that the step would push out of the box stay where they are: in norm inf as if clipped; in norm 2 the
    others make up for them. Arguments, errors and result are those of `pgd`, of which this is the case of one step;
    where the step does not lower the margin, `adversarial` is x itself.
    """
    return pgd(fn, x, y, eps, settings.changed(changes), steps=1, loss=loss)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Input of an attack: a network and B examples.

    where   x (B, *shape), radii (B,), finite and a little below those asked for, and low and high of the box
    labels  (B,);  index  (B,) numbers of the examples, so that what is random depends on no batch
    """

    model: Model
    weights: Any
    norm: float
    where: tuple[jax.Array, jax.Array, np.float32, np.float32]
    labels: jax.Array
    index: jax.Array


def search(
    name: str,
    find: Callable[[Problem], Any],
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings,
    loss: str,
) -> Attack:
    """Run the attack `find` in chunks and check its results; all attacks use this.

    `find` returns (B, *shape) points of small margin, up to rounding in ball and box.
    """
    p, box = settings.norm, settings.box
    model, weights = split(fn)
    points = as_points(x)
    labels = as_labels(y, len(points))
    if points.min() < box[0] or points.max() > box[1]:
        raise ValueError(
            f"x must lie in the box [{box[0]:g}, {box[1]:g}], got values from {points.min():g} to {points.max():g}: "
            "set low and high"
        )
    radii = _radii(eps, len(points))
    size = min(settings.batch_size, len(points))
    count_classes(model, weights, (size, *points.shape[1:]), labels)
    # Beyond the box's diameter nothing changes, and float32 has no room for infinite steps.
    inner = (np.minimum(radii, settings.diameter(points[0].shape)) * _INSIDE).astype(np.float32)

    found = np.empty_like(points)
    before, after = np.empty(len(points), np.float32), np.empty(len(points), np.float32)
    for start in range(0, len(points), size):
        # the last chunk repeats its last example
        rows = np.arange(start, start + size).clip(max=len(points) - 1)
        kept = slice(start, min(start + size, len(points)))
        count = kept.stop - kept.start
        where = (jnp.asarray(points[rows]), jnp.asarray(inner[rows]), *box)
        problem = Problem(
            model, weights, p, where, jnp.asarray(labels[rows], jnp.int32), jnp.asarray(rows, jnp.int32)
        )
        with jax.default_matmul_precision("highest"):
            before[kept] = np.asarray(margins(model, weights, where[0], problem.labels))[:count]
            raw = np.asarray(find(problem))
            found[kept] = _settle(points[kept], raw[:count], radii[kept], p, box)
            after[kept] = np.asarray(margins(model, weights, found[rows], problem.labels))[:count]
        say(f"{name} in {NORM_NAMES[p]}: {kept.stop} of {len(points)} examples")
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
class Model:
    """An nnx module without its weights, or any other callable; equal ones share what is compiled."""

    graph: Any

    def __call__(self, weights: Any, batch: jax.Array) -> jax.Array:
        """Logits (B, K) of a batch."""
        if weights is None:
            return self.graph(batch)
        return nnx.merge(self.graph, weights, copy=True)(batch)


def split(fn: Any) -> tuple[Model, Any]:
    """(model, its weights or None), so that weights are arguments of what is compiled. TypeError if not callable."""
    if isinstance(fn, nnx.Module):
        graph, weights = nnx.split(fn)
        return Model(graph), weights
    if not callable(fn):
        raise TypeError(f"a network is a function from a batch to logits, got {type(fn).__name__}")
    return Model(fn), None


def _ascend(
    problem: Problem, loss: str, steps: int, restarts: int, step_size: float | None, key: jax.Array
) -> jax.Array:
    """(B, *shape): the points of smallest margin over all restarts."""
    model, weights, where, labels = problem.model, problem.weights, problem.where, problem.labels
    (x, eps, _, _), norm = where, problem.norm
    lengths = jnp.full_like(eps, step_size) if step_size else eps * np.float32(2.5 / max(steps, 1))
    best = (x, jnp.full(len(x), jnp.inf, jnp.float32))
    for restart in range(restarts):
        point = x if not restart else _start(jax.random.fold_in(key, restart), problem.index, where, norm)
        left = steps
        while left:
            now = min(stride(steps), left)
            point, best = _advance(model, weights, where, labels, lengths, point, best, norm, loss, now)
            left -= now
        best = keep(point, margins(model, weights, point, labels), best)
    return best[0]


def stride(steps: int) -> int:
    """Steps per call: all in one scan on accelerators, one on CPUs, whose convolutions are slow inside loops.

    Measured for the gradient of 4C3F on two cores: 4 (jax 0.10) and 8 times (jax 0.12) slower in a scan.
    """
    return 1 if jax.default_backend() == "cpu" else max(steps, 1)


def margin_of(z: jax.Array, y: jax.Array) -> jax.Array:
    """(B,) z_y - max over i != y of z_i."""
    own = jnp.take_along_axis(z, y[:, None], axis=1)[:, 0]
    others = jnp.where(jnp.arange(z.shape[1]) == y[:, None], -jnp.inf, z)
    return own - others.max(axis=1)


@functools.partial(jax.jit, static_argnames=("model",))
def margins(model: Model, weights: Any, points: jax.Array, labels: jax.Array) -> jax.Array:
    """Logit margins (B,) of a model at points."""
    return margin_of(model(weights, points).astype(jnp.float32), labels)


@jax.jit
def keep(point: jax.Array, margin: jax.Array, best: Any) -> Any:
    """(point, margin) of the smaller margin so far, example by example."""
    better = margin < best[1]
    return jnp.where(per_example(better, point), point, best[0]), jnp.where(better, margin, best[1])


@functools.partial(jax.jit, static_argnames=("model", "norm", "loss", "steps"))
def _advance(
    model: Model,
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
    """`steps` steps from `point`; every point on the way is compared with `best` (points, margins)."""

    def objective(point: jax.Array) -> Any:
        z = model(weights, point).astype(jnp.float32)
        margin = margin_of(z, labels)
        if loss == "margin":
            return -margin.sum(), margin
        own = jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1)
        return -own.sum(), margin

    def step(carry: Any, _: None) -> Any:
        point, best = carry
        gradient, margin = jax.grad(objective, has_aux=True)(point)
        best = keep(point, margin, best)
        moved = point + per_example(lengths, point) * _steepest(gradient, point, where, norm)
        return (project(moved, where, norm), best), None

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


def project(point: jax.Array, where: Any, norm: float) -> jax.Array:
    """Into the ball and then into the box, which keeps it in the ball: clipping moves every coordinate towards x.

    In l-inf this is the nearest point of both. In l2 it may lie deeper in the ball than need be, which the next steps
    make up for, since they no longer push against the box: the exact projection gives the same margins to three
    digits, at several times the cost of a step.
    """
    x, eps, low, high = where
    shift, radius = point - x, per_example(eps, point)
    if norm == math.inf:
        shift = jnp.clip(shift, -radius, radius)
    else:
        shift = shift * per_example(jnp.minimum(1.0, eps / jnp.maximum(_l2(shift), 1e-37)), point)
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

    return jnp.clip(x + per_example(eps, x) * jax.vmap(draw)(index), low, high)


def per_example(values: Any, like: Any) -> Any:
    """One value per example, in the shape that broadcasts against the examples."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


# ------------------------------------------------------------------------------------------------- on the host
def _settle(
    x: np.ndarray, found: np.ndarray, eps: np.ndarray, norm: float, box: tuple[np.float32, np.float32]
) -> np.ndarray:
    """Move points towards x, where needed, until they lie in ball and box in float64."""
    settled = np.where(np.isfinite(found), found, x).clip(*box)
    for power in range(_SHRINKS):
        far = length(settled, x, norm)
        over = far > eps
        if not over.any():
            return settled
        scale = per_example(eps[over] / far[over] * (1 - 2.0 ** (power - _SHRINKS)), x)
        exact = x[over].astype(np.float64)
        settled[over] = (exact + scale * (settled[over] - exact)).astype(np.float32)
    return np.where(per_example(length(settled, x, norm) > eps, x), x, settled)


def as_points(x: Any) -> np.ndarray:
    """Examples (N, *shape) in float32; ValueError unless they are floating point, finite and at least one."""
    points = np.asarray(x)
    if points.dtype.kind != "f" and points.dtype.name != "bfloat16":
        raise ValueError(f"x must be floating point in the units of the network's input, got {points.dtype}")
    if points.ndim < 2 or not points.size:
        raise ValueError(f"x must hold examples of shape (N, ...), at least one, got shape {points.shape}")
    points = points.astype(np.float32)
    if not np.isfinite(points).all():
        raise ValueError("x holds NaN or infinite values")
    return points


def _radii(eps: Any, count: int) -> np.ndarray:
    radii = np.asarray(eps, dtype=np.float64)
    if radii.shape not in ((), (count,)):
        raise ValueError(f"eps must be a number or hold {count} numbers, got shape {radii.shape}")
    if not (radii >= 0).all():
        raise ValueError("eps must be >= 0 and not NaN")
    return np.broadcast_to(radii, count).copy()


def count_classes(model: Model, weights: Any, shape: tuple[int, ...], labels: np.ndarray | None) -> int:
    """K, if batches of this shape are mapped to logits (B, K) and the labels lie in 0..K-1; else ValueError."""
    z = jax.eval_shape(lambda w, b: model(w, b), weights, jax.ShapeDtypeStruct(shape, jnp.float32))
    found = getattr(z, "shape", None)
    if found is None or len(found) != 2 or found[0] != shape[0] or found[1] < 2:
        raise ValueError(f"fn must map {shape} to logits ({shape[0]}, K) with K >= 2, got {found}")
    if labels is not None:
        as_labels(labels, len(labels), found[1])
    return int(found[1])
