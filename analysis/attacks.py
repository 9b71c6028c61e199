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

Momentum, m = mu m + g / ||g||_1 in place of the gradient g, is that of Dong, Liao, Pang, Su, Zhu, Hu, Li, "Boosting
adversarial attacks with momentum", CVPR 2018. What all attacks share is in `attack_search`.
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

from lipbounds._text import reporting, usual_settings, whole
from lipbounds.analysis.attack_network import Model, margin_of
from lipbounds.analysis.attack_search import (
    Attack,
    Found,
    Problem,
    keep,
    per_example,
    project,
    search,
    unbroken,
)
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings
from lipbounds.training.balls import steepest as steepest
from lipbounds.training.balls import uniform_start as uniform_start

LOSSES = ("margin", "ce", "cw")


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
    target: Any = None,
    **changes: Any,
) -> Attack:
    """Search every ball ||x' - x|| <= eps for an x' in the box [low, high] that is not classified as labelled.

    Args:
        fn: batch (B, *shape) -> logits (B, K), each row on its own: an nnx module (in evaluation mode), a bound linen
            module or any function; or a traced form or a network of `interop.load_onnx`, which take one example each.
            Weights are arguments of what is compiled, except those that a function closes over: where these have
            changed, it is compiled again.
        x: (N, *shape) floating point in the box, taken in float32.
        y: (N,) integer labels.
        eps: radius, or (N,) radii, in the units of x; inf stands for the whole box.
        settings: norm, box, batch size, seed and progress.
        steps: gradient steps per restart.
        restarts: the first starts at x, the others uniformly in the ball.
        step_size: length of a step in `norm`, in the units of x; None is 2.5 eps / steps.
        loss: that is increased: "margin", the largest other logit minus the label's, also known as "cw" (see above),
            or "ce", the cross-entropy, whose gradient vanishes in float32 where the logits are far apart.
        target: (N,) classes to reach, none of them the label (see `random_targets`): the largest other logit minus the
            target's, or the cross-entropy of the target, is decreased. None: any class but the label will do.
        **changes: fields of `settings` by name, for this call.

    A tie of two logits counts as not classified as labelled, for x as for x', as it does in `certified_radius`.

    Raises:
        TypeError: fn is not callable.
        ValueError: shapes, labels or targets out of range, values that are not finite, x outside the box, negative or
            NaN eps, an unknown norm or loss, no example, logits that are not finite, answers to an example that depend
            on the others in its batch.
    """
    settings = AttackSettings.changed(settings, changes)
    name = "FGSM" if steps == 1 and step_size is None else "PGD"
    ascent = Ascent("ce" if loss == "ce" else "margin", steps, restarts, step_size)
    return gradient_attack(name, fn, x, y, eps, settings, ascent, loss, target)


def fgsm(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    loss: str = "ce",
    target: Any = None,
    **changes: Any,
) -> Attack:
    """One step of length eps from x, along the sign of the loss's gradient (norm inf) or along the gradient (norm 2).

    Coordinates that the step would push out of the box stay where they are: in norm inf as if clipped; in norm 2 the
    others make up for them. Arguments, errors and result are those of `pgd`, of which this is the case of one step;
    where the step does not lower the margin, `adversarial` is x itself.
    """
    return pgd(fn, x, y, eps, AttackSettings.changed(settings, changes), steps=1, loss=loss, target=target)


def mi_fgsm(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    steps: int = 10,
    step_size: float | None = None,
    momentum: float = 1.0,
    loss: str = "ce",
    target: Any = None,
    **changes: Any,
) -> Attack:
    """Steps along a running sum of gradients: m = momentum m + g / ||g||_1, then a step along m's steepest direction.

    Arguments, errors and result are those of `pgd`; `step_size` None is eps / steps, as in the paper, and with one step
    this is `fgsm`.
    """
    settings = AttackSettings.changed(settings, changes)
    ascent = Ascent("ce" if loss == "ce" else "margin", steps, 1, step_size, reach=1.0, momentum=momentum)
    return gradient_attack("MI-FGSM", fn, x, y, eps, settings, ascent, loss, target)


@usual_settings()
def gradient_attack(
    name: str,
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings,
    ascent: Ascent,
    loss: str,
    target: Any,
) -> Attack:
    """The attack that `ascent` describes; arguments and errors are those of `pgd`."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    whole("steps", ascent.steps, 0), whole("restarts", ascent.restarts)
    size = ascent.step_size
    if size is not None and not (math.isfinite(size) and size > 0):
        raise ValueError(f"step_size must be a number > 0, got {size!r}")
    if ascent.momentum is not None and not 0 <= ascent.momentum < math.inf:
        raise ValueError(f"momentum must be a number >= 0, got {ascent.momentum!r}")
    key = jax.random.key(settings.seed)
    with reporting(settings.progress):
        return search(
            name,
            lambda problem: _ascend(problem, ascent, key),
            fn,
            x,
            y,
            eps,
            settings,
            loss,
            target=target,
        )


@dataclasses.dataclass(frozen=True)
class Ascent:
    """How a gradient attack ascends.

    `step_size` None is `reach` eps / steps, and `momentum` None is none. `start` maps a problem and a key to the points
    where a restart begins; None is x for the first and uniform in the ball for the others.
    """

    loss: str
    steps: int
    restarts: int
    step_size: float | None
    reach: float = 2.5
    momentum: float | None = None
    start: Callable[[Problem, jax.Array], jax.Array] | None = None


def _ascend(problem: Problem, how: Ascent, key: jax.Array) -> Found:
    """The points of smallest margin over all restarts."""
    x, eps, _, _ = problem.where
    size = how.step_size
    lengths = jnp.full_like(eps, size) if size else eps * np.float32(how.reach / max(how.steps, 1))
    best, done = unbroken(x), 0
    for restart in range(how.restarts):
        drawn = jax.random.fold_in(key, restart)
        if how.start is not None:
            point = how.start(problem, drawn)
        else:
            point = x if not restart else uniform_start(drawn, problem.index, problem.where, problem.norm)
        state = point, jnp.zeros_like(x), best
        left = how.steps
        while left:
            now = min(problem.stride(how.steps), left)
            state = _advance(
                problem.model,
                problem.weights,
                problem.where,
                problem.labels,
                lengths,
                state,
                np.int32(done),
                np.float32(how.momentum or 0.0),
                norm=problem.norm,
                loss=how.loss,
                steps=now,
                targeted=problem.targeted,
                heavy=how.momentum is not None,
            )
            left, done = left - now, done + now
        point, _, best = state
        best = keep(point, problem.margins(point), best, np.int32(done))
    return Found(best[0], steps=best[2])


@functools.partial(jax.jit, static_argnames=("model", "norm", "loss", "steps", "targeted", "heavy"))
def _advance(
    model: Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    lengths: jax.Array,
    state: Any,
    done: Any,
    momentum: Any,
    *,
    norm: float,
    loss: str,
    steps: int,
    targeted: bool,
    heavy: bool,
) -> Any:
    """`steps` steps from `state`, after `done` of them: (point, velocity, best); every point on the way is kept."""

    def objective(point: jax.Array) -> Any:
        z = model(weights, point).astype(jnp.float32)
        margin = margin_of(z, labels, targeted)
        if loss != "ce":
            return -margin.sum(), margin
        own = jnp.take_along_axis(jax.nn.log_softmax(z), labels[:, None], axis=1).sum()
        return own if targeted else -own, margin

    def step(carry: Any, clock: jax.Array) -> Any:
        point, velocity, best = carry
        gradient, margin = jax.grad(objective, has_aux=True)(point)
        best = keep(point, margin, best, clock)
        if heavy:
            gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
            size = jnp.abs(gradient).sum(axis=tuple(range(1, point.ndim)), keepdims=True)
            velocity = gradient = momentum * velocity + gradient / jnp.maximum(size, 1e-37)
        moved = point + per_example(lengths, point) * steepest(gradient, point, where, norm)
        return (project(moved, where, norm), velocity, best), None

    return jax.lax.scan(step, state, done + jnp.arange(steps, dtype=jnp.int32))[0]
