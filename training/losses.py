"""Training losses as pure functions of logits (n, K), labels (n,) and Lipschitz constants.

Certified radius maximisation (CRM) is Fazlyab et al., NeurIPS 2023, arXiv 2310.00116, equation 8: with the margins
z_y - z_i, the constants L_yi of z_y - z_i and

    R(x, y)      = min_{i != y} (z_y - z_i) / L_yi                               the certified radius (equation 5)
    R_soft(x, y) = -(1/t) log sum_{i != y} exp(-t (z_y - z_i) / L_yi)            its smooth lower bound (equation 7)

the loss is cross-entropy + lambda (1/n) sum of g(R_soft) over the examples that are classified correctly and whose
radius is below r0; R_soft <= R <= R_soft + log(K - 1) / t (Proposition 2.1). Constants may be tracers: the gradient
reaches them. Radii are in the units of the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

Transform = Callable[[jax.Array], jax.Array]

# constants below are not divided by: a constant of 0 (a dead network) has no gradient to follow
_LEAST = 1e-12

_SMALLEST = 1e-6  # share of r0 below which the logarithm is constant: rounding hides smaller radii

# Decreasing g of equation 8 of (R_soft, r0, log(K - 1) / t). R is in input units; exponential and hinge take their
# scale from r0. The logarithm is of R_soft + log(K - 1) / t >= R, which is positive for correct answers: its slope
# grows as R falls, so its force does not vanish.
TRANSFORMS: Mapping[str, Callable[[jax.Array, float, float], jax.Array]] = {
    "negative": lambda radius, r0, offset: -radius,
    "exponential": lambda radius, r0, offset: jnp.exp(-radius / r0),
    "hinge": lambda radius, r0, offset: jnp.maximum(r0 - radius, 0),
    "logarithm": lambda radius, r0, offset: -jnp.log(jnp.maximum(radius + offset, _SMALLEST * r0) / r0),
}


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean cross-entropy in nats; `smoothing` in [0, 1) is the share of the target spread over all classes."""
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def nothing(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """0 for all logits, where a robust loss stands in the place of the cross-entropy."""
    return jnp.zeros((), logits.dtype)


def of_class(pairs: jax.Array, rows: jax.Array, logits: jax.Array) -> jax.Array:
    """(n, K) constants between the classes `rows` (n,) and all others.

    pairs: (K, K) of all images, (n, K, K) of each, or a number.
    """
    classes = logits.shape[-1]
    pairs = jnp.asarray(pairs, logits.dtype)
    if pairs.ndim == 3:
        return jnp.take_along_axis(pairs, rows[:, None, None], axis=1)[:, 0]
    return jnp.broadcast_to(pairs, (classes, classes))[rows]


def scaled_margins(logits: jax.Array, labels: jax.Array, pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """((n, K) values of (z_y - z_i) / L_yi, (n, K) mask of i != y). Entries i = y are 0 and carry no gradient.

    pairs: (K, K) constants L_ij, or (n, K, K) of every image; a scalar stands for the constant of every pair.
    """
    classes = logits.shape[-1]
    others = labels[:, None] != jnp.arange(classes, dtype=labels.dtype)
    rows = jnp.where(others, jnp.maximum(of_class(pairs, labels, logits), _LEAST), 1)
    margins = jnp.take_along_axis(logits, labels[:, None], axis=1) - logits
    return jnp.where(others, margins / rows, 0), others


def radius(logits: jax.Array, labels: jax.Array, pairs: jax.Array) -> jax.Array:
    """(n,) R: positive for correct answers; negative values measure by how much an answer is wrong."""
    scaled, others = scaled_margins(logits, labels, pairs)
    return jnp.min(jnp.where(others, scaled, jnp.inf), axis=1)


def soft_radius(logits: jax.Array, labels: jax.Array, pairs: jax.Array, t: float) -> jax.Array:
    """(n,) R_soft: R - log(K - 1) / t <= R_soft <= R."""
    scaled, others = scaled_margins(logits, labels, pairs)
    return -jax.nn.logsumexp(-t * scaled, axis=1, where=others) / t


def crm_penalty(
    logits: jax.Array, labels: jax.Array, pairs: jax.Array, *, t: float, r0: float, g: str = "negative"
) -> jax.Array:
    """The second term of equation 8 without lambda: sum of g(R_soft) over 0 < R < r0, divided by the batch size."""
    hard = radius(logits, labels, pairs)
    chosen = (hard > 0) & (hard < r0)
    # Masked before g, too: exp(-R / r0) of a wrong answer overflows, and 0 times its infinite slope is not a number.
    soft = jnp.where(chosen, soft_radius(logits, labels, pairs, t), r0)
    value = TRANSFORMS[g](soft, r0, math.log(max(logits.shape[-1] - 1, 1)) / t)
    return jnp.sum(jnp.where(chosen, value, 0)) / len(labels)


def gloro(logits: jax.Array, labels: jax.Array, pairs: jax.Array, *, eps: float | jax.Array) -> jax.Array:
    """Cross-entropy of GloRo nets with their extra class (Leino, Wang and Fredrikson, ICML 2021, arXiv 2102.08452).

    With the predicted class j the logit of the extra class is max_{i != j} (z_i + eps L_ij): an example whose
    certified radius is below eps counts as not classified.
    """
    extra = rival(logits, pairs, eps)
    return cross_entropy(jnp.concatenate([logits, extra[:, None]], axis=1), labels)


def rival(logits: jax.Array, pairs: jax.Array, eps: float | jax.Array) -> jax.Array:
    """(n,) the largest logit z_i + eps L_ij of a class i other than the predicted class j."""
    classes = logits.shape[-1]
    top = jnp.argmax(logits, axis=1)
    others = top[:, None] != jnp.arange(classes, dtype=top.dtype)
    reach = eps * of_class(pairs, top, logits)
    return jnp.max(jnp.where(others, logits + reach, -jnp.inf), axis=1)


def lipschitz_margin(
    logits: jax.Array, labels: jax.Array, pairs: jax.Array, *, eps: float | jax.Array
) -> jax.Array:
    """Cross-entropy of logits with eps L_yi added to every wrong class (Tsuzuku, Sato and Sugiyama, NeurIPS 2018).

    With L_yi = sqrt(2) L for all pairs this is Lipschitz-margin training, arXiv 1802.04034, section 4.
    """
    classes = logits.shape[-1]
    others = labels[:, None] != jnp.arange(classes, dtype=labels.dtype)
    return cross_entropy(logits + eps * jnp.where(others, of_class(pairs, labels, logits), 0), labels)


def by_name(
    c: Any, logits: jax.Array, labels: jax.Array, pairs: jax.Array, share: float | jax.Array = 1.0
) -> jax.Array:
    """The loss that a `Config` names, with a share of lam (CRM) or of eps (the others) in force."""
    eps = c.eps * share
    weight = c.radius_weight if c.robust else c.lam
    if c.robust:  # its own value is not a function of these logits
        value = jnp.zeros((), logits.dtype)
    elif c.loss == "crm" or not c.uses_constants:
        value = cross_entropy(logits, labels, c.smoothing)
    elif c.loss == "gloro-trades":
        value = gloro_trades(logits, labels, pairs, eps=eps, weight=c.trades)
    elif c.loss == "margin":
        value = margin(logits, labels, pairs, eps=eps, temperature=c.temperature)
    else:
        value = {"gloro": gloro, "lipschitz-margin": lipschitz_margin, "emma": emma}[c.loss](
            logits, labels, pairs, eps=eps
        )
    if (c.loss == "crm" or c.robust) and c.uses_constants and weight:
        value = value + weight * share * crm_penalty(logits, labels, pairs, t=c.t, r0=c.r0, g=c.g)
    if c.certificate:
        value = value + c.certificate * share * certificate_penalty(logits, labels, pairs, eps=c.eps)
    return value


def emma(logits: jax.Array, labels: jax.Array, pairs: jax.Array, *, eps: float | jax.Array) -> jax.Array:
    """The EMMA loss: every wrong class gets the radius that it just needs to overtake the label's, at most eps.

    Cross-entropy of z_i + r_i L_yi for i != y with r_i = min(eps, (z_y - z_i) / L_yi), at least eps / 100 and constant
    in the gradient, so that no wrong class is helped past a tie: all classes are pushed away at once, by as much as
    each attack can use (Hu et al., Unlocking deterministic robustness certification on ImageNet, NeurIPS 2023, section
    4).
    """
    scaled, others = scaled_margins(logits, labels, pairs)
    reach = jax.lax.stop_gradient(jnp.clip(scaled, 0.01 * eps, eps))
    return cross_entropy(logits + jnp.where(others, reach * of_class(pairs, labels, logits), 0), labels)


def margin(
    logits: jax.Array,
    labels: jax.Array,
    pairs: jax.Array,
    *,
    eps: float | jax.Array,
    temperature: float = 0.25,
) -> jax.Array:
    """Cross-entropy with an offset, as 1-Lipschitz networks use it (Prach and Lampert, ECCV 2022), for any constants.

    temperature * CE((z_i - z_y) / L_yi + eps, over the temperature): margins are in units of the input, whatever the
    network's constant, every wrong class is eps ahead, and the temperature says how far below 0 a margin still counts.
    """
    scaled, others = scaled_margins(logits, labels, pairs)
    return temperature * cross_entropy(jnp.where(others, eps - scaled, 0) / temperature, labels)


def gloro_trades(
    logits: jax.Array, labels: jax.Array, pairs: jax.Array, *, eps: float | jax.Array, weight: float
) -> jax.Array:
    """Cross-entropy + weight KL(s | s'), s the softmax with the extra class of `gloro` at logit -inf, s' with it.

    KL is log(1 + exp(z_extra) / sum_i exp(z_i)), what the extra class takes from the others (Leino, Wang and
    Fredrikson, ICML 2021, section 5, with the loss of Zhang et al., ICML 2019).
    """
    extra = rival(logits, pairs, eps)
    total = jax.nn.logsumexp(logits, axis=1)
    return cross_entropy(logits, labels) + weight * jnp.mean(jax.nn.softplus(extra - total))


def certificate_penalty(
    logits: jax.Array, labels: jax.Array, pairs: jax.Array, *, eps: float | jax.Array
) -> jax.Array:
    """Certificate regularisation: the mean over right answers of max(0, 1 - R / eps) (Singla et al., ICLR 2022)."""
    hard = radius(logits, labels, pairs)
    short = jax.nn.relu(1 - jnp.where(hard > 0, hard, eps) / eps)
    return jnp.sum(jnp.where(hard > 0, short, 0)) / len(labels)
