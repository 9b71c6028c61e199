"""The jitted cores of `empirical`: lower bounds of Jacobian norms, and an ascent that increases them.

This module only chooses points; none of its numbers is a bound. The form is an argument of
every function (its weights are leaves), so another network of the same architecture compiles nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _dual(g: jax.Array, p: float) -> jax.Array:
    """A v with ||v||_p = 1 and <g, v> = ||g||_q, 1/p + 1/q = 1; of g's shape (0 for g = 0 and p = 2)."""
    flat = g.reshape(-1)
    if p == 2:
        peak = jnp.max(jnp.abs(flat), initial=0.0)
        scaled = flat / jnp.where(peak > 0, peak, 1.0)
        size = jnp.sqrt(jnp.sum(scaled * scaled))
        v = scaled / jnp.where(size > 0, size, 1.0)
    elif p == 1:
        k = jnp.argmax(jnp.abs(flat))
        v = jnp.where(jnp.arange(flat.size) == k, jnp.where(flat[k] < 0, -1.0, 1.0), 0.0).astype(flat.dtype)
    else:
        v = jnp.where(flat < 0, -1.0, 1.0).astype(flat.dtype)
    return v.reshape(g.shape)


def size(w: jax.Array, p: float) -> jax.Array:
    flat = jnp.abs(w.reshape(-1))
    if p == 1:
        return jnp.sum(flat)
    peak = jnp.max(flat, initial=0.0)
    if p == 2:
        scaled = flat / jnp.where(peak > 0, peak, 1.0)
        return peak * jnp.sqrt(jnp.sum(scaled * scaled))
    return peak


def conjugate(p: float) -> float:
    return math.inf if p == 1 else 2 if p == 2 else 1


def _objective(form: Any, functional: jax.Array | None):
    """The function to ascend on: all outputs, or one linear functional of them as a vector of length one."""

    def f(x: jax.Array) -> jax.Array:
        z = form.evaluate(x, dtype=jnp.float32).reshape(-1)
        return z if functional is None else jnp.sum(z * functional)[None]

    return f


def _steepest(f: Any, x: jax.Array, v: jax.Array, p: float, steps: int) -> tuple[jax.Array, jax.Array]:
    """Power method for ||J(x)||_p from direction v: (||J v||_p, v), ||v||_p = 1; -inf where not finite."""
    _, push = jax.linearize(f, x)
    _, pull = jax.vjp(f, x)

    def step(_, v):
        new = _dual(pull(_dual(push(v), conjugate(p)))[0], p)
        return jnp.where(jnp.any(new != 0), new, v)

    v = jax.lax.fori_loop(0, steps, step, v)
    score = size(push(v), p)
    return jnp.where(jnp.isfinite(score), score, -jnp.inf), v


@functools.partial(jax.jit, static_argnames=("p",))
def score(form: Any, xs: jax.Array, vs: jax.Array, p: float) -> tuple[jax.Array, jax.Array]:
    """Norm of the Jacobian (from below) at xs (N, *shape), from directions vs; scores (N,), directions."""
    return jax.vmap(lambda x, v: _steepest(_objective(form, None), x, v, p, 4))(xs, vs)


@functools.partial(jax.jit, static_argnames=("p", "steps", "single"))
def climb(
    form: Any,
    xs: jax.Array,
    vs: jax.Array,
    functionals: jax.Array,
    scale: jax.Array,
    key: jax.Array,
    region: Any,
    p: float,
    steps: int,
    single: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ascent from xs (S, *shape): points, directions and scores never below those of the starts.

    `single`: climb on functionals[s] . f (S, K) instead of on f. `scale`: l2 size of a usual input.
    `region`: None, or (centres (S, *shape), radius, low, high): points stay within the radius (in norm p) of their
    centre and between low and high.
    """

    def start(x, v, c):
        return _steepest(_objective(form, c if single else None), x, v, p, 4)

    scores, vs = jax.vmap(start)(xs, vs, functionals)
    # gaps from 0.5 to 0.002 of the scale
    cycle = jnp.asarray(0.5 * 0.6 ** (np.arange(steps) % 12), dtype=xs.dtype)
    unit = jnp.sqrt(jnp.asarray(max(xs[0].size, 1), dtype=xs.dtype))  # ||v||_2 <= unit for every p

    def inside(x, centre):
        if region is None:
            return x
        _, radius, low, high = region
        length = size(x - centre, p)
        return jnp.clip(
            centre + (x - centre) * jnp.minimum(1, radius / jnp.maximum(length, 1e-30)), low, high
        )

    def one(x, v, score, step, c, key, centre, gap, wild):
        f = _objective(form, c if single else None)
        h = gap * scale / (unit if p == math.inf else 1.0)
        ahead, pull_ahead = jax.vjp(f, x + h * v)
        behind, pull_behind = jax.vjp(f, x - h * v)
        u = _dual(ahead - behind, conjugate(p))
        uphill = _dual(pull_ahead(u)[0] - pull_behind(u)[0], 2)
        noise_key, length_key = jax.random.split(key)
        noise = _dual(jax.random.normal(noise_key, x.shape, x.dtype), 2)
        toward = _dual(uphill * (1.0 - wild) + noise * (0.3 + wild), 2)
        # wild moves leave a linear piece, whatever its size
        jump = 10.0 ** jax.random.uniform(length_key, (), x.dtype, -2.0, 1.0)
        length = jnp.where(wild > 0, jump, step)
        candidate = inside(x + length * scale * toward, centre)
        new_score, new_v = _steepest(f, candidate, v, p, 2)
        better = new_score > score
        tuned = jnp.clip(jnp.where(better, step * 1.5, step * 0.8), 1e-4, 3.0)
        step = jnp.where(wild > 0, step, jnp.where(tuned <= 1e-4, 0.3, tuned))
        return (
            jnp.where(better, candidate, x),
            jnp.where(better, new_v, v),
            jnp.where(better, new_score, score),
            step,
        )

    def body(carry, now):
        x, v, score, step, key = carry
        gap, wild = now
        key, sub = jax.random.split(key)
        keys = jax.random.split(sub, x.shape[0])
        centres = x if region is None else region[0]
        moved = jax.vmap(one, in_axes=(0, 0, 0, 0, 0, 0, 0, None, None))(
            x, v, score, step, functionals, keys, centres, gap, wild
        )
        return (*moved, key), None

    wild = jnp.asarray(np.arange(steps) % 3 == 2, dtype=xs.dtype)  # every third proposal is noise alone
    first = jnp.full(scores.shape, 0.1, xs.dtype)
    (xs, vs, scores, _, _), _ = jax.lax.scan(body, (xs, vs, scores, first, key), (cycle, wild))
    return xs, vs, scores


@jax.jit
def jacobian(form: Any, x: jax.Array) -> jax.Array:
    """All rows at one point, (K, n), by K vector-Jacobian products, or n Jacobian-vector products where n < K."""
    f = _objective(form, None)
    if x.size < form.num_outputs:
        _, push = jax.linearize(f, x)
        units = jnp.eye(x.size, dtype=x.dtype).reshape(-1, *x.shape)
        return jax.lax.map(push, units, batch_size=16).reshape(x.size, -1).T
    z, pull = jax.vjp(f, x)
    return jax.lax.map(lambda e: pull(e)[0].reshape(-1), jnp.eye(z.size, dtype=z.dtype), batch_size=16)


@jax.jit
def values64(form: Any, xs: jax.Array) -> jax.Array:
    """f at xs (P, *shape) in float64, (P, K); to be called inside jax.enable_x64(True)."""
    return jax.lax.map(lambda x: form.evaluate(x, dtype=jnp.float64).reshape(-1), xs, batch_size=16)
