"""Attacks inside a training step: projected gradient ascent on any objective, in one program with the step itself.

The network is a function of points (B, *shape) whose weights are bound; nothing that is found here carries a gradient
to them. With the ball { x' : ||x' - x||_p <= eps, low <= x' <= high }, a step is

    x' <- projection of  x' + step * (direction of steepest ascent, of length 1 in the norm)

(Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018). The geometry is that of
`balls`, and so that of the attacks in `lipbounds.analysis`, which evaluate what these have trained.

All points are float32 whatever the network computes in: bfloat16 cannot tell a pixel from one that is 1/256 off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._text import whole
from lipbounds.results import check_norm
from lipbounds.training.balls import project, steepest, uniform_start

Network = Callable[[jax.Array], jax.Array]
Objective = Callable[[jax.Array], jax.Array]

STARTS = ("uniform", "near", "clean")
DIVERGENCES = ("js", "min")
_NEAR = 1e-3  # standard deviation of the noise of "near", as in the published code of TRADES


@dataclasses.dataclass(frozen=True)
class RobustSettings:
    """Settings of robust training; `robust_losses.usual(name)` has those of each loss. Units are those of the input.

    Args:
        eps: radius of the ball. May be traced.
        norm: of the ball, 2 or inf.
        step: length of a step of the attack, in the norm. May be traced.
        steps: of the attack.
        start: where the attack begins: "uniform" in the ball, "near" x (x + 0.001 times a normal draw), or x ("clean").
        low, high: the box of the inputs, [low, high] in every coordinate.
        beta: weight of the divergence between clean and attacked answers (TRADES and its kin). May be traced.
        lam: weight of the second term of generalised AT, GradAlign and consistency. May be traced.
        gamma: size of the noise on the logits of backward smoothing.
        tau: temperature of consistency.
        divergence: of consistency, "js" or "min".
        unrolled: write the steps of the attack one after the other instead of as a loop. It costs compilation, and
            avoids loops around convolutions, which XLA runs slowly on CPUs.
        measured: report the increase of the loss by the attack ("delta"), from every eighth example.

    Raises:
        ValueError: a value outside its range.
    """

    eps: Any = 8 / 255
    norm: Any = math.inf
    step: Any = 2 / 255
    steps: int = 10
    start: str = "uniform"
    low: float = 0.0
    high: float = 1.0
    beta: Any = 6.0
    lam: Any = 1.0
    gamma: float = 1.0
    tau: float = 0.5
    divergence: str = "js"
    unrolled: bool = False
    measured: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        if self.norm == 1:
            raise ValueError("robust training is in norm 2 or inf, not 1")
        whole("steps", self.steps, 0)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the box needs finite numbers low < high, got {self.low!r} and {self.high!r}")
        for name in ("eps", "step", "beta", "lam", "gamma"):
            value = getattr(self, name)
            if not isinstance(value, jax.Array) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"tau must be a number > 0, got {self.tau!r}")
        for name, known in (("start", STARTS), ("divergence", DIVERGENCES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def ball(self, x: jax.Array) -> Any:
        """`where` of `balls`: the balls around x (B, *shape) and the box."""
        radii = jnp.full(len(x), self.eps, jnp.float32)
        return x.astype(jnp.float32), radii, np.float32(self.low), np.float32(self.high)


def begin(key: jax.Array, where: Any, settings: RobustSettings) -> jax.Array:
    """The points (B, *shape) where an attack starts, in ball and box."""
    x = where[0]
    if settings.start == "clean":
        return x
    if settings.start == "uniform":
        return uniform_start(key, jnp.arange(len(x), dtype=jnp.int32), where, settings.norm)
    return project(x + _NEAR * jax.random.normal(key, x.shape, jnp.float32), where, settings.norm)


def ascend(objective: Objective, point: jax.Array, where: Any, settings: RobustSettings) -> jax.Array:
    """`steps` steps of ascent from the points: (B, *shape) in ball and box, without a gradient.

    objective: points (B, *shape) -> (B,) values, each of its own example.
    """

    def slope(point: jax.Array) -> jax.Array:
        return jax.grad(lambda p: objective(p).astype(jnp.float32).sum())(point)

    def step(point: jax.Array, _: None) -> tuple[jax.Array, None]:
        return moved(point, slope(point), where, settings), None

    point = jax.lax.stop_gradient(point)
    if settings.steps < 2:
        found = step(point, None)[0] if settings.steps else point
    else:
        found, _ = jax.lax.scan(
            step, point, length=settings.steps, unroll=settings.steps if settings.unrolled else 1
        )
    return jax.lax.stop_gradient(found)


def moved(point: jax.Array, gradient: jax.Array, where: Any, settings: RobustSettings) -> jax.Array:
    """The points after one step along the gradients (B, *shape), in ball and box."""
    direction = steepest(gradient, point, where, settings.norm)
    return project(point + jnp.asarray(settings.step, jnp.float32) * direction, where, settings.norm)


def slope_of(network: Network, x: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """(logits (B, K), function from cotangents (B, K) to the gradients (B, *shape) at x), in one forward pass."""
    logits, pull = jax.vjp(lambda p: network(p).astype(jnp.float32), x)
    return jax.lax.stop_gradient(logits), lambda along: jax.lax.stop_gradient(pull(along)[0])


def attacked(objective: Objective, x: jax.Array, key: jax.Array, settings: RobustSettings) -> jax.Array:
    """Points (B, *shape) in the balls around x, found by `ascend` from the start of the settings."""
    where = settings.ball(x)
    return ascend(objective, begin(key, where, settings), where, settings)
