"""Losses of robust training as pure functions: adversarial training, TRADES, their fast variants, consistency.

Every loss has the signature

    loss(forward, frozen, stats, x, y, key, settings) -> (value, (stats, logits, report))

    forward(x, stats) -> (logits (B, K), stats)   the network in training, weights bound; stats is the state of its
                                                  batch normalisation, () where there is none
    frozen(x) -> logits                           the network with its running statistics, for the attacks
    x (B, *shape) float32, y (B,) integers, key, and a `RobustSettings`

`logits` are those of the images whose cross-entropy is taken, `report` holds scalars without a gradient:

    attack_accuracy   share of the attacked images that are still classified as labelled, by `forward`
    delta             mean cross-entropy of every eighth image attacked, less that of the image itself, by `frozen`: the
                      increase that the attack achieves. Negative under catastrophic overfitting
    natural, robust   the two terms of a loss that has two, before their weights

With s the softmax, CE the mean cross-entropy, KL(a | b) the mean of KL(s(a) || s(b)), and x' the point of the attack:

| name | loss | attack (usual settings, eps = 8/255) | source |
|---|---|---|---|
| at | CE(x') | 10 steps of eps/4 on CE | Madry et al., ICLR 2018 |
| fast-at, fast-at-2 | CE(x') | 1 step of 1.25 eps, or 2 of half that | Wong, Rice and Kolter, ICLR 2020 |
| generalised-at | CE(x) + lam mean of max(ce(x') - ce(x), 0) | as at | Wu et al., NeurIPS 2021 |
| trades | CE(x) + beta KL(f(x) | f(x')) | 10 steps of eps/4 on KL from near x | Zhang et al., ICML 2019 |
| fast-trades, fast-trades-2 | as trades | as fast-at, on KL | Chen, Cheng, Gan, Gu and Liu, AAAI 2022 |
| backward-smoothing | as trades | see `backward_smoothing` | the same |
| gradalign | CE(x') + lam mean of 1 - cos(g(x), g(x + u)) | 1 step of eps from x | Andriushchenko, Flammarion, 2020 |
| consistency | CE of two views + lam D | as at, on each view | Tack et al., AAAI 2022 |

With eps = 0 all but the last two are the plain cross-entropy. Beyond them: `adversarial_weights` (AWP, Wu, Xia and
Wang, NeurIPS 2020) and `adjusted`, the multiplier of width-adjusted regularisation (Wu et al., NeurIPS 2021).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lipbounds.training.inner_attacks import RobustSettings, attacked, begin, moved, slope_of
from lipbounds.training.losses import cross_entropy

Forward = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
Frozen = Callable[[jax.Array], jax.Array]
Result = tuple[jax.Array, tuple[Any, jax.Array, dict[str, jax.Array]]]
Loss = Callable[[Forward, Frozen, Any, jax.Array, jax.Array, jax.Array, RobustSettings], Result]

_WATCHED = 8  # "delta" is measured on every eighth example
_TINY = 1e-30


# ------------------------------------------------------------------------------------------------------ divergences
def nats(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,) cross-entropies of the labels (B,), in nats."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logs, labels[:, None], axis=1)[:, 0]


def kl(a: jax.Array, b: jax.Array) -> jax.Array:
    """(B,) KL(s(a) || s(b)) >= 0 of logits (B, K); its gradient by b is s(b) - s(a)."""
    a, b = (jax.nn.log_softmax(z.astype(jnp.float32)) for z in (a, b))
    return jnp.sum(jnp.exp(a) * (a - b), axis=1)


def h_divergence(a: jax.Array, b: jax.Array, kind: str = "js") -> jax.Array:
    """(B,) H-divergence of p = s(a) and q = s(b), logits (B, K), with the entropy H and m = (p + q) / 2.

    "js"   H(m) - (H(p) + H(q)) / 2, in [0, log 2], symmetric
    "min"  H(m) - min(H(p), H(q)), in [js, log 2 + |H(p) - H(q)| / 2]

    Both are 0 exactly where p = q, and log 2 where p and q are one-hot at two classes (Zhao et al., Comparing
    distributions by measuring differences that affect decision making, ICLR 2022).
    """
    a, b = (jax.nn.log_softmax(z.astype(jnp.float32)) for z in (a, b))
    first, second = entropy(a), entropy(b)
    middle = entropy(jnp.logaddexp(a, b) - math.log(2))
    return middle - (jnp.minimum(first, second) if kind == "min" else (first + second) / 2)


def entropy(logs: jax.Array) -> jax.Array:
    """(B,) entropies in nats, from log-probabilities (B, K)."""
    return -jnp.sum(jnp.exp(logs) * logs, axis=1)


# ----------------------------------------------------------------------------------------------------------- losses
def at(
    forward: Forward, frozen: Frozen, stats: Any, x: Any, y: Any, key: Any, settings: RobustSettings
) -> Result:
    """Adversarial training: the cross-entropy at the points that an ascent on it finds. Also "fast-at"."""
    point = attacked(lambda p: nats(frozen(p), y), x, key, settings)
    logits, stats = forward(point, stats)
    return cross_entropy(logits, y), (stats, logits, _report(frozen, x, point, y, logits, settings))


def generalised_at(
    forward: Forward, frozen: Frozen, stats: Any, x: Any, y: Any, key: Any, settings: RobustSettings
) -> Result:
    """CE(x) + lam times the mean of what the attack adds, where it adds something; with lam = 1 this is `at` there."""
    point = attacked(lambda p: nats(frozen(p), y), x, key, settings)
    logits, stats = forward(x, stats)
    hard, stats = forward(point, stats)
    natural = cross_entropy(logits, y)
    robust = jnp.mean(jax.nn.relu(nats(hard, y) - nats(logits, y)))
    report = _report(frozen, x, point, y, hard, settings, natural=natural, robust=robust)
    return natural + settings.lam * robust, (stats, logits, report)


def trades(
    forward: Forward, frozen: Frozen, stats: Any, x: Any, y: Any, key: Any, settings: RobustSettings
) -> Result:
    """TRADES: CE(x) + beta KL(f(x) | f(x')), x' by ascent on this divergence. Also "fast-trades".

    At x itself the divergence is 0 and flat, so an attack has to start elsewhere: the start "clean" would find nothing.
    """
    if settings.start == "clean":
        raise ValueError(
            'the divergence has no gradient at x: with this loss start must be "near" or "uniform", not "clean"'
        )
    clean = jax.lax.stop_gradient(frozen(x))
    point = attacked(lambda p: kl(clean, frozen(p)), x, key, settings)
    return _regularised(forward, frozen, stats, x, point, y, settings)


def backward_smoothing(
    forward: Forward, frozen: Frozen, stats: Any, x: Any, y: Any, key: Any, settings: RobustSettings
) -> Result:
    """TRADES with an attack of two steps, the first of which goes towards smoothed logits.

    With psi uniform in (-1, 1)^K, two steps of length `step`, each projected:

        xi     from x, descent on KL(s(f(x) + gamma psi) || s(f(x + xi)))
        delta  from x + xi, ascent on KL(s(f(x)) || s(f(x + xi + delta)))

    `steps` and `start` have no meaning here.
    """
    point = smoothed(frozen, x, key, settings)
    return _regularised(forward, frozen, stats, x, point, y, settings)


def smoothed(frozen: Frozen, x: jax.Array, key: jax.Array, settings: RobustSettings) -> jax.Array:
    """The points x + xi + delta of `backward_smoothing`; x where gamma is 0, as no divergence has a gradient then."""
    where = settings.ball(x)
    if settings.gamma == 0:  # the gradients would be rounding errors, whose signs make full steps
        return where[0]
    clean, pull = slope_of(frozen, where[0])
    noise = settings.gamma * jax.random.uniform(key, clean.shape, jnp.float32, -1.0, 1.0)
    # the gradient of the first divergence by the logits is s(z) - s(z + gamma psi)
    start = moved(where[0], pull(jax.nn.softmax(clean + noise) - jax.nn.softmax(clean)), where, settings)
    hard, pull = slope_of(frozen, start)
    return moved(start, pull(jax.nn.softmax(hard) - jax.nn.softmax(clean)), where, settings)


def gradalign(
    forward: Forward, frozen: Frozen, stats: Any, x: Any, y: Any, key: Any, settings: RobustSettings
) -> Result:
    """`at` + lam times the mean of 1 - cos(g(x), g(x + u)), g the gradient of the cross-entropy in x, u from the ball.

    The gradients are differentiated by the weights, so a step costs three to five times that of "fast-at".
    """
    first, second = jax.random.split(key)
    value, (after, logits, report) = at(forward, frozen, stats, x, y, first, settings)
    where = settings.ball(x)
    drawn = begin(second, where, dataclasses.replace(settings, start="uniform"))

    def slope(point: jax.Array) -> jax.Array:
        return jax.grad(lambda p: nats(forward(p, stats)[0], y).sum())(point).reshape(len(x), -1)

    apart = jnp.mean(1 - cosine(slope(where[0]), slope(drawn)))
    report = {**report, "natural": value, "robust": apart}
    return value + settings.lam * apart, (after, logits, _cut(report))


def consistency(
    forward: Forward, frozen: Frozen, stats: Any, x: Any, y: Any, key: Any, settings: RobustSettings
) -> Result:
    """The mean cross-entropy of two attacked views + lam times the mean H-divergence of their tempered answers.

    x (2, B, *shape): two augmentations of the same images, whose labels are y (B,). Each view is attacked in its own
    ball, and both go through the network as one batch of 2 B. The logits that come back are those of the first view.
    ValueError for another shape.
    """
    if x.ndim < 3 or len(x) != 2 or x.shape[1] != len(y):
        raise ValueError(
            f"consistency needs two views of {len(y)} images, an array (2, {len(y)}, ...), got {x.shape}"
        )
    count, flat, twice = len(y), x.reshape(-1, *x.shape[2:]), jnp.concatenate([y, y])
    point = attacked(lambda p: nats(frozen(p), twice), flat, key, settings)
    logits, stats = forward(point, stats)
    natural = cross_entropy(logits, twice)
    a, b = logits[:count], logits[count:]
    robust = jnp.mean(h_divergence(a / settings.tau, b / settings.tau, settings.divergence))
    report = _report(frozen, flat, point, twice, logits, settings, natural=natural, robust=robust)
    return natural + settings.lam * robust, (stats, a, report)


def _regularised(
    forward: Forward, frozen: Frozen, stats: Any, x: Any, point: Any, y: Any, settings: RobustSettings
) -> Result:
    """CE(x) + beta KL(f(x) | f(point)); the gradient goes through both sides."""
    logits, stats = forward(x, stats)
    hard, stats = forward(point, stats)
    natural, robust = cross_entropy(logits, y), jnp.mean(kl(logits, hard))
    report = _report(frozen, x, point, y, hard, settings, natural=natural, robust=robust)
    return natural + settings.beta * robust, (stats, logits, report)


def _report(
    frozen: Frozen, x: Any, point: Any, y: Any, hard: Any, settings: RobustSettings, **terms: Any
) -> dict[str, jax.Array]:
    """See the module; `hard` are the logits of the attacked images."""
    found = {"attack_accuracy": jnp.mean((jnp.argmax(hard, axis=-1) == y).astype(jnp.float32)), **terms}
    if settings.measured:
        some = slice(None, None, _WATCHED)
        before, after = nats(frozen(x[some]), y[some]), nats(frozen(point[some]), y[some])
        found["delta"] = jnp.mean(after - before)
    return _cut(found)


def _cut(report: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: jax.lax.stop_gradient(value) for name, value in report.items()}


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """(B,) cosines of the angles of vectors (B, n); 0, without a gradient, where one of them is 0."""
    # Gradients of a loss that is fitted are so small that their squares underflow.
    a, b = (
        v / jax.lax.stop_gradient(jnp.maximum(jnp.abs(v).max(axis=1, keepdims=True), _TINY)) for v in (a, b)
    )
    squares = jnp.sum(a * a, axis=1) * jnp.sum(b * b, axis=1)
    return jnp.sum(a * b, axis=1) * jax.lax.rsqrt(jnp.where(squares > 0, squares, 1.0))


#: Losses by name.
ROBUST: Mapping[str, Loss] = {
    "at": at,
    "fast-at": at,
    "fast-at-2": at,
    "generalised-at": generalised_at,
    "trades": trades,
    "fast-trades": trades,
    "fast-trades-2": trades,
    "backward-smoothing": backward_smoothing,
    "gradalign": gradalign,
    "consistency": consistency,
}

# The papers' settings for eps = 8/255, steps as shares of eps. They do not say how long the two steps of "fast-at-2"
# and "fast-trades-2" are: here both together are as long as the one step.
_ONE: dict[str, Any] = {"step": 1.25, "steps": 1, "start": "uniform"}
_TWO: dict[str, Any] = {"step": 0.625, "steps": 2, "start": "uniform"}
_TEN: dict[str, Any] = {"step": 0.25, "steps": 10, "start": "uniform"}
_USUAL: Mapping[str, dict[str, Any]] = {
    "at": _TEN,
    "fast-at": _ONE,
    "fast-at-2": _TWO,
    "generalised-at": {**_TEN, "lam": 2.0},
    "trades": {**_TEN, "start": "near", "beta": 6.0},
    "fast-trades": {**_ONE, "beta": 6.0},
    "fast-trades-2": {**_TWO, "beta": 6.0},
    "backward-smoothing": {"step": 1.0, "steps": 1, "gamma": 1.0, "beta": 10.0},
    "gradalign": {"step": 1.0, "steps": 1, "start": "clean", "lam": 0.2},
    "consistency": {**_TEN, "lam": 1.0, "tau": 0.5},
}


def usual(name: str, eps: float = 8 / 255, **changes: Any) -> RobustSettings:
    """The settings that the papers use with a loss, at any eps: steps scale with it. ValueError for an unknown name."""
    if name not in _USUAL:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(_USUAL)}")
    values = dict(_USUAL[name])
    return RobustSettings(**{**values, "step": values["step"] * eps, "eps": eps, **changes})


# ------------------------------------------------------------------------------- around the loss: weights, multiplier
def adversarial_weights(gradient_fn: Callable[[Any], Any], weights: Any, gamma: float) -> Any:
    """Adversarial weight perturbation: the weights w + gamma ||w|| g / ||g||, array by array, g the gradient at w.

    Train with the gradient at what this returns, applied to `weights`, which are not changed.

    Args:
        gradient_fn: weights -> gradient of the loss, the same tree.
        weights: pytree. Only arrays of two or more axes move: kernels, and not biases or normalisation, as in the
            published code.
        gamma: size of the perturbation relative to the weights; 0 returns them as they are.

    In front of a normalisation, batch or spectral, a kernel 1 + gamma times as large is the same network, so that part
    of the perturbation has no effect.
    """
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma must be a number >= 0, got {gamma!r}")
    if gamma == 0:
        return weights

    def shifted(weight: jax.Array, slope: jax.Array) -> jax.Array:
        if weight.ndim < 2:
            return weight
        slope = slope / jnp.maximum(jnp.abs(slope).max(), _TINY)  # squares of small gradients underflow
        size = jnp.sqrt(jnp.sum(slope * slope))
        change = gamma * jnp.sqrt(jnp.sum(weight * weight)) * slope / jnp.where(size > 0, size, 1)
        return jax.lax.stop_gradient(weight + jnp.where(jnp.isfinite(change), change, 0).astype(weight.dtype))

    return jax.tree.map(shifted, weights, gradient_fn(weights))


def adjusted(lam: Any, natural: Any, robust: Any, *, ratio: float = 30.0, rate: float = 0.1) -> jax.Array:
    """Width-adjusted regularisation: the weight of the robust term that follows `lam`, >= 0.

        max(lam + rate (ratio - natural / robust), 0)

    natural, robust: the two terms of the batch, before their weights, as a loss reports them; `ratio` is their quotient
    in a well-tuned thin network, where the weight no longer moves. Here natural / robust is at most 2 ratio, so that a
    batch on which the attack finds nothing lowers the weight by no more than an overwhelming one raises it; a term that
    is not finite leaves it. The first weight is 0 (algorithm 8 of Wu et al., NeurIPS 2021).
    """
    found = jnp.asarray(natural, jnp.float32) / jnp.maximum(jnp.asarray(robust, jnp.float32), _TINY)
    usable = jnp.isfinite(jnp.asarray(natural)) & jnp.isfinite(jnp.asarray(robust))
    step = rate * (ratio - jnp.clip(jnp.where(usable, found, ratio), 0.0, 2 * ratio))
    return jnp.maximum(jnp.asarray(lam, jnp.float32) + step, 0.0)
