"""Optimisers and learning rates of a run: Adam, NAdam or SGD, weight decay, Lookahead, schedules by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lipbounds.training import manifold
from lipbounds.training.config import Config

_SLOW = 0.5  # share of the way to the fast weights that the slow ones go (Zhang et al., NeurIPS 2019)
_TOP = 0.4  # share of a cyclic schedule in which the rate rises


class Lookahead(NamedTuple):
    """State of `lookahead`: that of the inner optimiser, the slow weights, number of steps."""

    inner: Any
    slow: Any
    steps: jax.Array


def lookahead(inner: optax.GradientTransformation, period: int) -> optax.GradientTransformation:
    """Every `period` steps the weights return to slow ones, which have gone half the way to them.

    Zhang et al., Lookahead optimizer: k steps forward, 1 step back, NeurIPS 2019. The slow weights are part of the
    optimiser's state, so that a resumed run goes on as it was.
    """

    def init(weights: Any) -> Lookahead:
        slow = jax.tree.map(jnp.array, weights)  # a copy: states are donated
        return Lookahead(inner.init(weights), slow, jnp.zeros((), jnp.int32))

    def update(gradient: Any, state: Lookahead, weights: Any = None) -> tuple[Any, Lookahead]:
        updates, after = inner.update(gradient, state.inner, weights)
        count = state.steps + 1
        meets = count % period == 0

        def slower(slow: jax.Array, weight: jax.Array, change: jax.Array) -> jax.Array:
            return jnp.where(meets, slow + _SLOW * (weight + change - slow), slow)

        slow = jax.tree.map(slower, state.slow, weights, updates)
        updates = jax.tree.map(lambda s, w, u: jnp.where(meets, s - w, u), slow, weights, updates)
        return updates, Lookahead(after, slow, count)

    return optax.GradientTransformation(init, update)


def optimiser(config: Config, steps: int, turned: bool = False) -> optax.GradientTransformation:
    """The optimiser of (weights, multipliers): multipliers have Adam with a rate of their own.

    turned: there are matrices that are `manifold.Orthonormal`. These have steps of their own, without decay, clipping
    and Lookahead.
    """
    rate = schedule(config, steps, config.learning_rate, config.final_learning_rate)
    ratio = config.multiplier_rate / config.learning_rate
    last = max(config.final_learning_rate * ratio, 0.01 * config.multiplier_rate)
    quick = schedule(config, steps, config.multiplier_rate, last)
    of_weights = _of_weights(config, rate)
    if config.clip:
        of_weights = optax.chain(optax.clip_by_global_norm(config.clip), of_weights)
    if config.lookahead:
        of_weights = lookahead(of_weights, config.lookahead)
    if turned:
        end = config.angle * config.final_learning_rate / config.learning_rate
        of_matrices = manifold.turns(schedule(config, steps, config.angle, end))
        of_weights = optax.partition({True: of_matrices, False: of_weights}, manifold.orthonormal)
    return optax.partition(
        {"weights": of_weights, "multipliers": optax.adam(quick)}, ("weights", "multipliers")
    )


def _of_weights(config: Config, rate: Any) -> optax.GradientTransformation:
    """SGD takes the gradient of weight_decay / 2 times the squared kernels with that of the loss, before its momentum.

    Adam and NAdam shrink kernels by the learning rate times weight_decay, apart from their steps (Loshchilov and
    Hutter, ICLR 2019). Vectors have no decay: biases, scales and shifts of BatchNorm, parameters of activations.
    """
    decay = config.weight_decay
    if config.optimiser == "sgd":
        steps = optax.sgd(rate, momentum=config.momentum or None, nesterov=config.nesterov)
        return optax.chain(optax.add_decayed_weights(decay, _kernels), steps) if decay else steps
    nesterov = config.optimiser == "nadam"
    if decay:
        return optax.adamw(rate, weight_decay=decay, mask=_kernels, nesterov=nesterov)
    return optax.nadam(rate) if nesterov else optax.adam(rate)


def _kernels(weights: Any) -> Any:
    return jax.tree.map(lambda a: a.ndim > 1, weights)


def schedule(config: Config, steps: int, first: float, last: float) -> Any:
    """Learning rate by step: `first` until epoch `decay_from`, then down to `last` at the end.

    "multi-step" divides by 10 after the epochs of `milestones`, whatever `decay_from` is, without them at one half and
    at three quarters of the decay; "cyclic" rises from `last` to `first` in the first 40 % of the steps from
    `decay_from` on, and falls again, both linearly. "halving" halves the rate at `decay_from` and after every further
    epoch, and does not stop at `last`.
    """
    begin, total = config.decay_from * steps, config.epochs * steps
    if config.edges:
        return _steps(first, [epoch * steps for epoch in config.edges])
    if config.schedule == "constant" or begin >= total or first == 0:
        return optax.constant_schedule(first)
    length = total - begin
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(first, length, alpha=last / first)
        return optax.join_schedules([optax.constant_schedule(first), fall], [begin])
    if config.schedule == "multi-step":
        return _steps(first, [begin + length // 2, begin + 3 * length // 4])
    if config.schedule == "halving":
        return lambda step: first * jnp.float32(0.5) ** jnp.maximum((step - begin) // steps + 1, 0)
    if config.schedule == "cyclic":
        top = begin + max(1, round(_TOP * length))
        rise = optax.linear_schedule(last, first, top - begin)
        fall = optax.linear_schedule(first, last, max(1, total - top))
        return optax.join_schedules([optax.constant_schedule(first), rise, fall], [begin, top])
    return optax.exponential_decay(first, length, max(last, 1e-12) / first, transition_begin=begin)


def _steps(first: float, edges: list[int]) -> Any:
    """The rate that falls to a tenth at every edge."""
    return optax.piecewise_constant_schedule(first, dict.fromkeys(edges, 0.1))
