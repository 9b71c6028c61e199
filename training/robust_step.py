"""A step with a robust loss: the settings of its attack, its value and gradient, weights moved against it.

The attack sees the network in evaluation mode, with the running statistics that the step begins with; the loss is that
of the network in training mode, as usual in adversarial training with BatchNorm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from lipbounds.training.config import Config
from lipbounds.training.inner_attacks import RobustSettings
from lipbounds.training.inner_attacks import attacked as points
from lipbounds.training.robust_losses import ROBUST, adjusted, adversarial_weights, nats, usual

if TYPE_CHECKING:
    from lipbounds.training.step import Trainer, TrainState

#: Names in the log of what a loss reports.
REPORTED = {
    "attack_accuracy": "attack_accuracy",
    "delta": "delta_loss",
    "natural": "natural_loss",
    "robust": "robust_loss",
}


class Passed(NamedTuple):
    """The forward pass of a step.

    Args:
        value: a loss of its own beside that of the logits; None where there is none.
        logits: (B, K).
        pull: from the gradient by the logits to that by the weights, with that of `value`.
        statistics: of BatchNorm, afterwards.
        report: scalars for the log.
        factor: see `TrainState.factor`.
    """

    value: Any
    logits: jax.Array
    pull: Callable[[jax.Array], Any]
    statistics: Any
    report: dict[str, jax.Array]
    factor: Any


def settings_of(
    config: Config, unrolled: bool = False, factor: Any = None, share: Any = None
) -> RobustSettings:
    """The settings of the loss: the usual ones where the configuration does not say more.

    factor: the weight of the robust term, where it moves (`Config.war`).
    share: of the radius and of the steps of the attack, in the ramp; None for all of them.
    """
    changes: dict[str, Any] = {
        "norm": math.inf if config.attack_norm == "linf" else 2,
        "unrolled": unrolled,
        "gamma": config.gamma,
        "tau": config.tau,
        "divergence": config.divergence,
    }
    if config.attack_step:
        changes["step"] = config.attack_step
    if config.attack_steps:
        changes["steps"] = config.attack_steps
    if config.attack_start != "usual":
        changes["start"] = config.attack_start
    weight = factor if factor is not None else config.robust_weight or None
    if weight is not None:
        changes["beta" if config.regularises else "lam"] = weight
    settings = usual(config.loss, config.attack_eps, **changes)
    if share is None:
        return settings
    return dataclasses.replace(settings, eps=share * settings.eps, step=share * settings.step)


def passed(made: Trainer, state: TrainState, x: jax.Array, labels: jax.Array, key: jax.Array) -> Passed:
    """The robust loss of a batch; x (B, *shape), or (2, B, *shape) of two views (`Config.views`)."""
    config, loss = made.config, ROBUST[made.config.loss]
    factor = state.factor if config.war else None
    settings = settings_of(config, made.one_by_one, factor, made.ramp(state.step) if config.ramp else None)

    def frozen(images: jax.Array) -> jax.Array:
        fixed = jax.lax.stop_gradient(state.weights)
        return made.network(fixed, images.astype(config.forward)).astype(jnp.float32)

    def whole(weights: Any) -> Any:
        def forward(images: jax.Array, statistics: Any) -> tuple[jax.Array, Any]:
            logits, after = made.trained(weights, statistics, images.astype(config.forward))
            return logits.astype(jnp.float32), after

        value, (after, logits, report) = loss(forward, frozen, made.statistics, x, labels, key, settings)
        return (value, logits), (after, report)

    weights = state.weights
    if config.awp:
        slope = jax.grad(lambda w: whole(w)[0][0])
        weights = adversarial_weights(slope, weights, config.awp)
    (value, logits), pull, (after, report) = jax.vjp(whole, weights, has_aux=True)

    def back(along: jax.Array) -> Any:
        return pull((jnp.ones_like(value), along))

    if config.war:
        factor = adjusted(factor, report["natural"], report["robust"], ratio=config.war)
    named = {REPORTED[name]: found for name, found in report.items()}
    return Passed(value, logits, back, after, named, () if factor is None else factor)


def pgd(made: Trainer, weights: Any, x: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Points (B, *shape) that ten steps of eps / 4 on the cross-entropy find from a random start."""
    config = made.config
    norm = math.inf if config.attack_norm == "linf" else 2
    settings = usual("at", config.attack_eps, norm=norm, unrolled=made.one_by_one)
    return points(lambda p: nats(made.network(weights, p), labels), x, key, settings)
