"""APGD: projected gradient ascent that chooses its own step sizes, on the cross-entropy or on the DLR loss.

Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
ICML 2020, arXiv 2003.01690. A step z = P(x + eta d) of length eta = 2 eps first is averaged with the last one,

    x' = P(x + 3/4 (z - x) + 1/4 (x - x_before)),

and at checkpoints eta is halved and the search goes back to the best point so far, where either the loss rose in at
most 3/4 of the steps since the last checkpoint, or eta was not halved there and the best loss is no better since. The
checkpoints are 0.22 N steps apart at first, then each 0.03 N closer, but not below 0.06 N.

With z the logits, in falling order z_(1), z_(2), ..., and t another class than y, the losses are

    dlr    -(z_y - max over i != y of z_i) / (z_(1) - z_(3))
    dlr-t  -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)

which do not change if all logits are multiplied by a > 0 or shifted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._text import reporting, usual_settings, whole
from lipbounds.analysis.attack_network import Model, margin_of
from lipbounds.analysis.attack_search import (
    Attack,
    Find,
    Found,
    Problem,
    classes_on,
    keep,
    l2_of,
    per_example,
    project,
    unbroken,
)
from lipbounds.analysis.attack_sequence import in_turn
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings
from lipbounds.analysis.attacks import steepest

LOSSES = ("ce", "dlr", "dlr-t")
_LEAST = {"ce": 2, "dlr": 3, "dlr-t": 4}  # classes
_AT_ONCE = 25  # steps between two looks at whether every example is broken
_EASE = 1e-12


@usual_settings()
def apgd(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    steps: int = 100,
    restarts: int = 1,
    loss: str = "ce",
    targets: int = 9,
    target: Any = None,
    **changes: Any,
) -> Attack:
    """Search every ball ||x' - x|| <= eps by APGD for an x' in the box that is not classified as labelled.

    Args:
        fn, x, y, eps, settings, target, **changes: as those of `attacks.pgd`.
        steps: per run.
        restarts: runs on what is not broken yet, each from a random point at distance eps, clipped to the box.
        loss: that is increased: "ce", the cross-entropy; "dlr"; or "dlr-t" (APGD-T), a run for each of the `targets`
            largest other logits at x as t. With `target`, the target's cross-entropy is decreased, or dlr-t increased.
        targets: of "dlr-t", at most one less than there are classes.

    Raises:
        TypeError: fn is not callable.
        ValueError: as `pgd`; fewer than 3 classes for "dlr", 4 for "dlr-t" or for "dlr" with a target.
    """
    settings = AttackSettings.changed(settings, changes)
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    whole("steps", steps), whole("restarts", restarts), whole("targets", targets)
    finds = runs(fn, x, y, settings, steps, restarts, loss, targets, target)
    name = "APGD-T" if loss == "dlr-t" else f"APGD-{loss.upper()}"
    with reporting(settings.progress):
        return in_turn(name, finds, fn, x, y, eps, settings, loss, target=target)


def runs(
    fn: Any,
    x: Any,
    y: Any,
    settings: AttackSettings,
    steps: int,
    restarts: int,
    loss: str,
    targets: int = 9,
    target: Any = None,
) -> list[Find]:
    """The runs of `apgd`, each on one batch."""
    classes = classes_on(fn, x, settings)
    needed = _LEAST["dlr-t" if target is not None and loss == "dlr" else loss]
    if classes < needed:
        raise ValueError(
            f"the loss {loss!r} compares {needed} logits, and the network has {classes}: take apgd(loss='ce'), fab and "
            "square"
        )
    key = jax.random.key(settings.seed)
    ranks: Sequence[int | None] = (
        range(min(targets, classes - 1)) if loss == "dlr-t" and target is None else [None]
    )
    labels = np.asarray(y)

    def run(number: int, rank: int | None) -> Find:
        drawn = jax.random.fold_in(key, number)
        kind = "dlr-t" if target is not None and loss == "dlr" else loss

        def find(problem: Problem) -> Found:
            pair = None
            if kind == "dlr-t":
                own = jnp.asarray(labels[np.asarray(problem.index)], jnp.int32)
                pair = own, problem.labels if rank is None else ranked(problem)[:, rank]
            return climb(problem, kind, pair, steps, drawn)

        return find

    return [run(i * len(ranks) + j, rank) for i in range(restarts) for j, rank in enumerate(ranks)]


def ranked(problem: Problem) -> jax.Array:
    """(B, K - 1) the other classes than the label, in falling order of their logits at x."""
    return _ranked(problem.model, problem.weights, problem.where[0], problem.labels)


@functools.partial(jax.jit, static_argnames=("model",))
def _ranked(model: Model, weights: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    z = model(weights, x).astype(jnp.float32)
    others = jnp.where(np.arange(z.shape[1], dtype=np.int32) == labels[:, None], -jnp.inf, z)
    return jnp.argsort(-others, axis=1)[:, :-1].astype(jnp.int32)


def checkpoints(steps: int) -> np.ndarray:
    """(steps,) the number of steps since the last checkpoint where there is one after the step, else 0."""
    length, least, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, at = np.zeros(steps, np.int32), length
    while at <= steps:
        found[at - 1] = length
        length = max(length - less, least)
        at += length
    return found


# ----------------------------------------------------------------------------------------------------- on the device
class State(NamedTuple):
    """Where the ascent stands; losses are to be increased.

    point, before, gradient, loss    the iterate, the one before it, and at the iterate
    best                             (point, gradient, loss) of the largest loss so far
    checked                          best loss at the last checkpoint
    rises, halved, size              (B,) steps with a rising loss since then, whether eta was halved there, eta
    won                              (point, margin, count) of the smallest margin so far (see `keep`)
    """

    point: jax.Array
    before: jax.Array
    gradient: jax.Array
    loss: jax.Array
    best: tuple[jax.Array, jax.Array, jax.Array]
    checked: jax.Array
    rises: jax.Array
    halved: jax.Array
    size: jax.Array
    won: Any


def climb(
    problem: Problem, loss: str, pair: Any, steps: int, key: jax.Array, trace: list[Any] | None = None
) -> Found:
    """One run; `pair` holds the label and the target of dlr-t. The states at each look are added to `trace`."""
    fixed = {"norm": problem.norm, "loss": loss, "targeted": problem.targeted}
    given = problem.model, problem.weights, problem.where, problem.labels, pair
    state = _begin(*given, key, problem.index, **fixed)
    lengths = checkpoints(steps)
    now = min(problem.stride(steps), _AT_ONCE)
    for done in range(0, steps, now):
        if done and done % _AT_ONCE < now and not bool((state.won[1] > 0).any()):
            break
        clocks = np.arange(done, min(done + now, steps), dtype=np.int32)
        state = _advance(*given, state, (clocks + 1, lengths[clocks]), **fixed)
        if trace is not None:
            trace.append(state)
    return Found(state.won[0], steps=state.won[2])


def _rated(
    model: Model, weights: Any, labels: jax.Array, pair: Any, point: jax.Array, loss: str, targeted: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(gradient, loss, margin) at points, the last two (B,)."""

    def objective(point: jax.Array) -> Any:
        z = model(weights, point).astype(jnp.float32)
        each = losses(z, labels, pair, loss, targeted)
        return each.sum(), (each, margin_of(z, labels, targeted))

    gradient, (each, margin) = jax.grad(objective, has_aux=True)(point)
    return gradient, each, margin


def losses(z: jax.Array, labels: jax.Array, pair: Any, loss: str, targeted: bool) -> jax.Array:
    """(B,) the loss of logits (B, K)."""

    def logit(of: jax.Array, values: jax.Array = z) -> jax.Array:
        return jnp.take_along_axis(values, of[:, None], axis=1)[:, 0]

    if loss == "ce":
        own = logit(labels, jax.nn.log_softmax(z))
        return own if targeted else -own
    top = jax.lax.top_k(z, _LEAST[loss])[0]
    if loss == "dlr":
        return -margin_of(z, labels) / (top[:, 0] - top[:, 2] + _EASE)
    return (logit(pair[1]) - logit(pair[0])) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + _EASE)


@functools.partial(jax.jit, static_argnames=("model",))
def slopes(model: Model, weights: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,) the largest entry of the gradient of the cross-entropy at x, in size."""
    gradient = _rated(model, weights, labels, None, x, "ce", False)[0]
    return jnp.abs(gradient).reshape(len(x), -1).max(axis=1)


@functools.partial(jax.jit, static_argnames=("model", "norm", "loss", "targeted"))
def _begin(
    model: Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    pair: Any,
    key: jax.Array,
    index: jax.Array,
    *,
    norm: float,
    loss: str,
    targeted: bool,
) -> State:
    """The state at random points at distance eps, clipped to the box."""
    x, eps, _, _ = where

    def draw(number: jax.Array) -> jax.Array:
        drawn = jax.random.fold_in(key, number)
        if norm == math.inf:
            return jax.random.uniform(drawn, x.shape[1:], jnp.float32, -1.0, 1.0)
        return jax.random.normal(drawn, x.shape[1:], jnp.float32)

    shift = jax.vmap(draw)(index)
    size = jnp.abs(shift).reshape(len(x), -1).max(axis=1) if norm == math.inf else l2_of(shift)
    point = project(x + per_example(eps / jnp.maximum(size, 1e-37), x) * shift, where, norm)
    gradient, each, margin = _rated(model, weights, labels, pair, point, loss, targeted)
    none, yes = jnp.zeros(len(x), jnp.int32), jnp.ones(len(x), bool)
    won = keep(point, margin, unbroken(x), 0)
    return State(point, point, gradient, each, (point, gradient, each), each, none, yes, 2 * eps, won)


@functools.partial(jax.jit, static_argnames=("model", "norm", "loss", "targeted"))
def _advance(
    model: Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    pair: Any,
    state: State,
    given: Any,
    *,
    norm: float,
    loss: str,
    targeted: bool,
) -> State:
    """The steps of which `given` holds the numbers, counted from 1, and the lengths that `checkpoints` gives."""

    def step(state: State, given: Any) -> Any:
        clock, length = given
        at = state.point
        moved = project(
            at + per_example(state.size, at) * steepest(state.gradient, at, where, norm), where, norm
        )
        share = jnp.where(clock == 1, jnp.float32(1), jnp.float32(0.75))
        point = project(at + share * (moved - at) + (1 - share) * (at - state.before), where, norm)
        gradient, each, margin = _rated(model, weights, labels, pair, point, loss, targeted)
        better = each > state.best[2]
        best = _chosen(better, (point, gradient, each), state.best)
        rises = state.rises + (each > state.loss).astype(jnp.int32)
        few = 4 * rises <= 3 * length
        cut = (few | (~state.halved & (state.checked >= best[2]))) & (length > 0)
        checked = length > 0
        return State(
            point=_chosen(cut, best[:1], (point,))[0],
            before=at,
            gradient=_chosen(cut, best[1:2], (gradient,))[0],
            loss=each,
            best=best,
            checked=jnp.where(checked, best[2], state.checked),
            rises=jnp.where(checked, 0, rises),
            halved=jnp.where(checked, cut, state.halved),
            size=jnp.where(cut, state.size / 2, state.size),
            won=keep(point, margin, state.won, clock),
        ), None

    return jax.lax.scan(step, state, given)[0]


def _chosen(mask: jax.Array, first: Any, second: Any) -> Any:
    """Rows of the first where the mask is true, else of the second."""
    return tuple(jnp.where(per_example(mask, a), a, b) for a, b in zip(first, second, strict=True))
