"""Counterexamples: misclassified points near an example, where no proof of a larger ball needs to be tried.

Projected gradient descent on the margin in float32, as in Madry et al., Towards deep learning models resistant to
adversarial attacks, ICLR 2018; what it finds is checked in float64 against the errors of the logits, so that a
counterexample is one of the network in exact arithmetic.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.inputs import Box
from lipbounds._form.lure import LureForm
from lipbounds._local import box as localbox
from lipbounds._local.forward import logits, proved_gaps
from lipbounds._text.progress import about, say

_STARTS = 4  # of the descent: x, and random points of the ball
_STEPS, _FALL = 20, 0.85  # steps of the descent; each is that much shorter than the one before, from eps on
_AT_ONCE = 64  # examples of one call, always as many, so that it is compiled once
_INSIDE = 1 - 1e-6  # of eps, so that rounding does not leave the ball
_DOUBLINGS, _HALVINGS = 20, 5  # of the ball in which the nearest counterexample is searched


@partial(jax.jit, static_argnames="round_")
def _descend(form: LureForm, x: Any, labels: Any, eps: Any, low: Any, high: Any, *, round_: bool) -> Any:
    """(N, n) moves u, low <= u <= high, ||u|| <= eps, where the margins are smallest on the ways. x is flat."""

    def margin(u: Any, centre: Any, label: Any) -> Any:
        z = form.evaluate((centre + u).reshape(form.in_shape), x.dtype)
        if form.num_outputs == 1:
            return z[0] * jnp.where(label == 1, 1.0, -1.0).astype(z.dtype)
        return z[label] - jnp.max(jnp.where(jnp.arange(len(z)) == label, -jnp.inf, z))

    def one(centre: Any, label: Any, reach: Any, lo: Any, hi: Any) -> Any:
        def inside(u: Any) -> Any:
            u = jnp.clip(u, lo, hi)
            if not round_:
                return u
            return u * jnp.minimum(1, reach / jnp.maximum(jnp.sqrt(u @ u), jnp.finfo(u.dtype).tiny))

        def step(state: Any, size: Any) -> Any:
            u, best, least = state
            m, g = jax.value_and_grad(margin)(u, centre, label)
            best, least = jnp.where(m < least, u, best), jnp.minimum(m, least)
            length = jnp.sqrt(g @ g)
            way = g / jnp.where(length > 0, length, 1) if round_ else jnp.sign(g)
            return (inside(u - reach * size * way), best, least), None

        def from_start(u: Any) -> Any:
            sizes = _FALL ** jnp.arange(_STEPS, dtype=x.dtype)
            (u, best, least), _ = jax.lax.scan(step, (u, u, jnp.full((), jnp.inf, x.dtype)), sizes)
            last = margin(u, centre, label)
            return jnp.where(last < least, u, best), jnp.minimum(last, least)

        spread = jax.random.normal(jax.random.key(0), (_STARTS, len(centre)), x.dtype)
        scale = reach / jnp.sqrt(jnp.asarray(len(centre), x.dtype)) if round_ else reach
        starts = jax.vmap(inside)(scale * spread.at[0].set(0))
        ends, least = jax.vmap(from_start)(starts)
        return ends[jnp.argmin(least)]

    return jax.vmap(one)(x, labels, eps, low, high)


def counterexamples(
    form: LureForm,
    x: np.ndarray,
    labels: np.ndarray,
    eps: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    norm: float,
) -> np.ndarray:
    """(N,) the distance of a misclassified point with ||u|| <= eps and low <= u <= high; inf where none was found.

    x (N, *in_shape), labels (N,), eps (N,), low and high (N, n). Nothing depends on it but which proofs are tried.
    """
    count, flat = len(x), x.reshape(len(x), -1)
    moves = np.zeros_like(flat)
    for begin in range(0, count, _AT_ONCE):
        rows = np.minimum(np.arange(begin, begin + _AT_ONCE), count - 1)
        given = (flat[rows], labels[rows], eps[rows] * _INSIDE, low[rows], high[rows])
        with np.errstate(over="ignore"):  # what float32 does not hold has no descent
            args = [jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32) for a in given]
        found = np.asarray(_descend(form, *args, round_=norm == 2), np.float64)
        moves[rows] = np.nan_to_num(found, posinf=0.0, neginf=0.0)
    points = flat + np.clip(moves, low * _INSIDE, high * _INSIDE)
    size = np.linalg.norm(points - flat, norm, axis=1)
    z, error = logits(form, points.reshape(x.shape))
    if z.shape[1] == 1:
        rival, at = 1 - labels, np.zeros(count, int)
    else:
        others = z.copy()
        others[np.arange(count), labels] = -np.inf
        rival, at = others.argmax(axis=1), labels
    ahead = proved_gaps(z, error, rival)[np.arange(count), at]
    return np.where((size <= eps * (1 - 1e-9)) & (ahead > 0), size, np.inf)


def extent(x: np.ndarray, norm: float, box: Box | None) -> np.ndarray:
    """(N,) no point of the box is farther from x; inf without a box."""
    with np.errstate(over="ignore"):
        return np.linalg.norm(np.maximum(*localbox.rooms(x, box)), norm, axis=1) * (1 + 1e-9)


def nearest(
    form: LureForm, x: np.ndarray, labels: np.ndarray, start: np.ndarray, norm: float, box: Box | None
) -> np.ndarray:
    """(N,) the distance of a misclassified point of the box, the nearest that was found; inf where there is none.

    start: (N,) > 0, radii that are certified. The balls are doubled until one holds a counterexample, and then the
    interval is halved on a logarithmic scale.
    """
    low, high = localbox.rooms(x, box)
    whole = extent(x, norm, box)
    inside, found = start.copy(), np.full(len(x), np.inf)
    for step in range(_DOUBLINGS + _HALVINGS):
        missing = np.isinf(found)
        rows = np.flatnonzero(missing & (inside < whole) if step < _DOUBLINGS else ~missing)
        if not rows.size:
            continue
        eps = np.where(missing, 2 * inside, np.sqrt(inside) * np.sqrt(found))[rows]
        room = eps[:, None]
        bounds = -np.minimum(low[rows], room), np.minimum(high[rows], room)
        with about("nearest misclassified points"):
            say(f"step {step + 1} of at most {_DOUBLINGS + _HALVINGS}")
            size = counterexamples(form, x[rows], labels[rows], eps, *bounds, norm)
        found[rows] = np.minimum(found[rows], size)
        inside[rows] = np.where(np.isinf(size), eps, inside[rows])
    return found
