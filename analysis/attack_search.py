"""What all attacks share: their input, their result, and the checks of both.

An attack is a function `find` from a `Problem` (a network, a batch of examples, their balls and the box) to `Found`
points. `search` cuts the examples into batches of one shape, runs `find` on those that the network classifies as
labelled, and checks every point that comes back on the host in float64, so an example that is reported lies within eps
and in the box exactly. An attack with a target succeeds where the network says the target, any other where it does not
say the label.

The network is evaluated as it is given, in float32 with matrix products at the highest precision (no TF32). A success
closer to the decision boundary than float32 resolves is thus one of the float32 program, and not necessarily of the
network in real arithmetic, which is what a certificate covers; `evaluation` distinguishes the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form import is_concrete
from lipbounds._text import Pace, as_labels, check_seed, say, whole
from lipbounds.analysis.attack_network import (
    MIXED,
    OTHER,
    Needs,
    Oracle,
    Outline,
    count_classes,
    margins,
    outline,
    split,
)
from lipbounds.analysis.attack_settings import AttackSettings, norm_name
from lipbounds.training.balls import l2_of as l2_of
from lipbounds.training.balls import per_example as per_example
from lipbounds.training.balls import project as project

INSIDE = 1 - 2e-6  # of eps on the device, so that float32 rounding seldom leaves the ball
_SHRINKS = 30


@dataclasses.dataclass(frozen=True, eq=False)
class Attack:
    """Result of an attack on N examples.

    correct      (N,) whether the example itself is classified as labelled; a tie of logits counts as wrong
    success      (N,) correct, and `adversarial` is not; with a target: correct, and `adversarial` is classified as it
    distance     (N,) float64, ||adversarial - x|| in `norm`, rounded up; inf where not `success`
    adversarial  (N, *shape) float32: the best point within eps that was found, also where it is no success; x itself
                 where the example is not correct
    margin       (N,) z_y - max over i != y of z_i at `adversarial`; <= 0 means that it is not classified as labelled.
                 With a target t: max over i != t of z_i - z_t, < 0 where it is classified as t. Of an `Oracle` that
                 gives labels only: 1 or -1
    eps          (N,) radii of the balls
    steps        (N,) gradient steps until the first success, or all that were made; 0 where the example is not
                 correct; None of an attack that makes none
    queries      (N,) the same of evaluations of the network by an attack that only asks for its output, else None
    target       (N,) the classes aimed at, or None
    """

    correct: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    adversarial: np.ndarray
    margin: np.ndarray
    eps: np.ndarray
    norm: float
    loss: str
    steps: np.ndarray | None = None
    queries: np.ndarray | None = None
    target: np.ndarray | None = None
    name: str = "attack"

    def __len__(self) -> int:
        return len(self.success)

    @property
    def accuracy(self) -> float:
        """Share of the examples that are neither misclassified nor flipped: an upper bound of robust accuracy.

        Of an attack with targets it is the share that was not moved to its target, which bounds nothing.
        """
        return float(np.mean(self.correct & ~self.success))

    @property
    def success_rate(self) -> float:
        """Share of the correct examples on which the attack succeeded; NaN where none is correct."""
        return float(self.success.sum() / self.correct.sum()) if self.correct.any() else math.nan

    def __repr__(self) -> str:
        counts = {"steps": self.steps, "queries": self.queries}
        spent = "".join(
            f", {many[self.success].mean():.1f} {what} per success"
            for what, many in counts.items()
            if many is not None and self.success.any()
        )
        return (
            f"Attack: {len(self)} examples, {self.name} in {norm_name(self.norm)}, {self.correct.mean():.2%} correct, "
            f"{self.accuracy:.2%} after the attack{'' if self.target is None else ' with targets'}{spent}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Input of an attack: a network and B examples that it classifies as labelled.

    where     x (B, *shape), radii (B,), finite and a little below those asked for, and low and high of the box
    labels    (B,) the classes to leave, or with `targeted` to reach
    index     (B,) numbers of the examples, so that what is random depends on no batch
    looped    whether loops over the network's gradients are fast on every device
    """

    model: Any
    weights: Any
    norm: float
    where: tuple[jax.Array, jax.Array, np.float32, np.float32]
    labels: jax.Array
    index: jax.Array
    targeted: bool = False
    looped: bool = False

    def stride(self, steps: int) -> int:
        """How many steps to take per call of a compiled program: see `stride`."""
        return max(steps, 1) if self.looped else stride(steps)

    def of(self, rows: np.ndarray) -> Problem:
        """The problem of some of the examples."""
        x, eps, low, high = self.where
        return dataclasses.replace(
            self, where=(x[rows], eps[rows], low, high), labels=self.labels[rows], index=self.index[rows]
        )

    def margins(self, points: Any, asked: np.ndarray | None = None) -> Any:
        """(B,) margins at points (B, *shape), positive as long as the attack has no success.

        Of an oracle only the rows of the mask `asked` are asked for; the others are NaN.
        """
        if not isinstance(self.model, Oracle):
            return margins(self.model, self.weights, points, self.labels, self.targeted)
        found = np.full(len(points), np.nan, np.float32)
        rows = np.flatnonzero(np.ones(len(points), bool) if asked is None else asked)
        if len(rows):
            found[rows] = self.model.margins(
                np.asarray(points)[rows], np.asarray(self.labels)[rows], self.targeted
            )
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Output of an attack: (B, *shape) points, in ball and box up to rounding, and what they took, (B,) each."""

    points: Any
    steps: Any = None
    queries: Any = None


Find = Callable[[Problem], Found]


def search(
    name: str,
    find: Find,
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings,
    loss: str,
    *,
    target: Any = None,
    needs: Needs = "gradients",
    only: np.ndarray | None = None,
    every_norm: bool = False,
) -> Attack:
    """Run the attack `find` on batches of the examples and check its results; all attacks use this.

    Args:
        name: of the attack, for people.
        find: the attack on one batch.
        fn: batch (B, *shape) -> logits (B, K): an nnx module in evaluation mode, a bound linen module or any function;
            or a network of one example that says so: a traced form or `interop.load_onnx`'s; or an `Oracle`.
        x, y, eps, settings: as of `pgd`.
        loss: what the attack minimises or maximises, for the record.
        target: (N,) classes to reach, none of them the label; None for any other class than the label.
        needs: of the network; an `Oracle` has no gradients and may have labels only.
        every_norm: whether the attack is in any norm from 1 to inf, and not in 2 and inf alone.
        only: (N,) the examples to attack; None for all. Those that are not classified as labelled never are.
    """
    if not every_norm:
        settings.need_a_usual_norm(name)
    model, weights = split(fn, needs)
    points = as_points(x)
    labels, radii = as_labels(y, len(points)), _radii(eps, len(points))
    aims, targeted = labels if target is None else _targets(target, labels), target is not None
    settings.check_inside(points)
    outlined = None
    if not isinstance(model, Oracle):
        outlined = outline(model, weights, (min(settings.batch_size, len(points)), *points.shape[1:]), None)
        model = outlined.model
    batches = _Batches(model, weights, settings, points, outlined)
    batches.check(labels, aims)
    before = batches.margins(points, labels, False)
    if not np.isfinite(before).all():
        raise ValueError(f"the logits of example {int(np.argmin(np.isfinite(before)))} are not finite")
    batches.check_rows(before, labels)
    correct = before > 0
    after = batches.margins(points, aims, True) if targeted else before.copy()
    found = points.copy()
    used: dict[str, list[Any]] = {"steps": [], "queries": []}
    rows = np.flatnonzero(correct if only is None else correct & only)
    done, pace = 0, Pace()
    for part, count in batches.parts(rows):
        made = find(batches.problem(part, radii, aims, targeted))
        part = part[:count]
        raw = np.asarray(made.points)[:count]
        found[part] = settle(points[part], raw, radii[part], settings.norm, settings.box)
        for what, parts in used.items():
            parts.append(getattr(made, what))
        done += count
        left = pace(done, len(rows))
        say(f"{name} in {norm_name(settings.norm)}: {done} of {len(rows)} examples{left}")
    after[rows] = batches.margins(found, aims, targeted, rows)
    success = np.isin(np.arange(len(points)), rows) & (after <= 0)
    distance = np.where(success, length(found, points, settings.norm), np.inf)
    return Attack(
        correct=correct,
        success=success,
        distance=distance,
        adversarial=found,
        margin=after,
        eps=radii,
        norm=settings.norm,
        loss=loss,
        **{what: _scattered(parts, rows, len(points)) for what, parts in used.items()},
        target=aims if targeted else None,
        name=name,
    )


def _scattered(parts: list[Any], rows: np.ndarray, count: int) -> np.ndarray | None:
    """(count,) the counts of the examples in `rows`, in batches of which the last may be padded, 0 elsewhere."""
    if any(part is None for part in parts):
        return None
    every = np.zeros(count, np.int64)
    if parts:
        every[rows] = np.concatenate([np.asarray(part) for part in parts])[: len(rows)]
    return every


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
    """Examples (N, *shape) of one network, in batches of one size, so that each program is compiled once."""

    model: Any
    weights: Any
    settings: AttackSettings
    points: np.ndarray
    outlined: Outline | None

    @property
    def size(self) -> int:
        return min(self.settings.batch_size, len(self.points))

    def check(self, labels: np.ndarray, aims: np.ndarray) -> None:
        """ValueError unless the network has logits of the classes that the labels and targets name."""
        if self.outlined is None:
            return
        classes = self.outlined.classes
        as_labels(labels, len(labels), classes)
        try:
            as_labels(aims, len(aims), classes)
        except ValueError as error:
            raise ValueError(f"target: {error}") from None

    def parts(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """(numbers of examples, how many there are) of every batch; the last batch repeats its last example."""
        for start in range(0, len(rows), self.size):
            part = rows[start : start + self.size]
            fill = 0 if isinstance(self.model, Oracle) else self.size - len(part)
            yield np.concatenate([part, np.repeat(part[-1:], fill)]), len(part)

    def problem(self, part: np.ndarray, radii: np.ndarray, aims: np.ndarray, targeted: bool) -> Problem:
        settings = self.settings
        # Beyond the box's diameter nothing changes, and float32 has no room for infinite steps.
        reach = np.minimum(radii[part], settings.diameter(self.points[0].shape))
        return Problem(
            self.model,
            self.weights,
            settings.norm,
            (
                jnp.asarray(self.points[part]),
                jnp.asarray((reach * INSIDE).astype(np.float32)),
                *settings.box,
            ),
            jnp.asarray(aims[part], jnp.int32),
            jnp.asarray(part, jnp.int32),
            targeted,
            self.looped,
        )

    @property
    def looped(self) -> bool:
        """Whether nothing convolves."""
        return self.outlined is not None and not self.outlined.convolves

    def margins(
        self, points: np.ndarray, labels: np.ndarray, targeted: bool, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Margins at points (N, *shape), of all examples or of those in `rows`."""
        made = [np.zeros(0, np.float32)]
        for part, count in self.parts(np.arange(len(points)) if rows is None else rows):
            if isinstance(self.model, Oracle):
                made.append(self.model.margins(points[part], labels[part], targeted))
                continue
            aims = jnp.asarray(labels[part], jnp.int32)
            made.append(np.asarray(margins(self.model, self.weights, points[part], aims, targeted))[:count])
        return np.concatenate(made)

    def check_rows(self, before: np.ndarray, labels: np.ndarray) -> None:
        """ValueError where the answer to an example depends on the others in its batch, or on chance."""
        if isinstance(self.model, Oracle) or not len(before):
            return
        place = int(np.abs(before - before.mean()).argmax())  # the most unusual one counts most in a mean
        points, own = (
            np.repeat(values[place : place + 1], self.size, axis=0) for values in (self.points, labels)
        )
        again = self.margins(points, own, False)
        if np.abs(again - before[place]).max() > OTHER * np.abs(before).max():
            raise ValueError(MIXED)


def _targets(target: Any, labels: np.ndarray) -> np.ndarray:
    """Targets (N,); ValueError for other shapes and where one is the label."""
    try:
        aims = as_labels(target, len(labels))
    except ValueError as error:
        raise ValueError(f"target: {str(error).removeprefix('y ')}") from None
    same = np.flatnonzero(aims == labels)
    if len(same):
        raise ValueError(
            f"the target of example {same[0]} is its own label, {labels[same[0]]}: choose another class"
        )
    return aims


def random_targets(y: Any, classes: int, seed: int = 0) -> np.ndarray:
    """(N,) targets drawn uniformly from the wrong classes 0..classes-1 of every example, by its number and the seed."""
    labels = as_labels(y, np.size(y), whole("classes", classes, 2))
    check_seed(seed)
    drawn = [np.random.default_rng([seed, i]).integers(1, classes) for i in range(len(labels))]
    return (labels + np.asarray(drawn, np.int64)) % classes


def length(a: np.ndarray, b: np.ndarray, norm: float) -> np.ndarray:
    """(N,) ||a - b|| of every example in float64, rounded up, so that it is never below the true distance."""
    difference = np.abs(a.astype(np.float64) - b.astype(np.float64)).reshape(len(a), -1)
    if norm == math.inf:
        return difference.max(axis=1, initial=0.0) * (1 + 2.0**-51)
    count = difference.shape[1] + 16
    if norm == 1:
        return difference.sum(axis=1) * (1 + count * 2.0**-53)
    top = np.maximum(difference.max(axis=1, initial=0.0), 1e-300)  # powers of small numbers underflow
    shares = difference / top[:, None]
    if norm == 2:
        size = top * np.sqrt(np.square(shares).sum(axis=1)) * (1 + count * 2.0**-53)
    else:  # a power may err by a few units in the last place
        size = top * (shares**norm).sum(axis=1) ** (1 / norm) * (1 + (count + norm) * 2.0**-51)
    return np.where(difference.any(axis=1), size, 0.0)


# ------------------------------------------------------------------------------------------------ on the device
def stride(steps: int) -> int:
    """Steps per call: all in one scan on accelerators, one on CPUs, whose convolutions are slow inside loops.

    Measured for the gradient of 4C3F on two cores: 4 (jax 0.10) and 8 times (jax 0.12) slower in a scan.
    """
    return 1 if jax.default_backend() == "cpu" else max(steps, 1)


@jax.jit
def keep(point: jax.Array, margin: jax.Array, best: Any, clock: Any) -> Any:
    """(point, margin, count) of the smaller margin so far, example by example.

    The count is the clock at the first margin <= 0, and the largest clock so far where there is none.
    """
    points, least, count = best
    count = jnp.where(least <= 0, count, clock)
    better = margin < least
    return jnp.where(per_example(better, point), point, points), jnp.where(better, margin, least), count


def unbroken(x: jax.Array) -> Any:
    """What `keep` starts from: x itself, of no margin yet, after 0 steps."""
    return x, jnp.full(len(x), jnp.inf, jnp.float32), jnp.zeros(len(x), jnp.int32)


# ------------------------------------------------------------------------------------------------- on the host
def settle(
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


def classes_on(fn: Any, x: Any, settings: AttackSettings) -> int:
    """K, the number of classes of a network on examples x; errors of `as_points`, `split` and `count_classes`."""
    model, weights = split(fn)
    shape = as_points(x).shape
    return count_classes(model, weights, (min(settings.batch_size, shape[0]), *shape[1:]), None)


def first_images(x: Any, y: Any, images: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first examples, or all, and their labels; ValueError unless there are as many labels as examples."""
    points = np.asarray(x)
    if points.ndim < 2 or not points.size:
        as_points(points)  # raises
    labels = as_labels(y, len(points))
    count = len(points) if images is None else whole("images", images)
    return points[:count], labels[:count]


def as_points(x: Any) -> np.ndarray:
    """Examples (N, *shape) in float32; ValueError unless they are floating point, finite and at least one.

    TypeError for an array that is being traced.
    """
    if not is_concrete(x):
        raise TypeError(
            "x must be an array of numbers, and it is being traced: call this outside jit, grad and vmap"
        )
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
    try:
        radii = np.asarray(eps, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"eps must be a number or hold {count} numbers, got {eps!r}") from None
    if radii.shape not in ((), (count,)):
        raise ValueError(f"eps must be a number or hold {count} numbers, got shape {radii.shape}")
    if not (radii >= 0).all():
        raise ValueError("eps must be >= 0 and not NaN")
    return np.broadcast_to(radii, count).copy()
