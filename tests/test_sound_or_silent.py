"""Functions that a careless tracer gets wrong: each is refused, or its bound is above every slope it attains.

The slopes are those of the user's own function (float32, no part of the library in between), between points
chosen to be nasty: ties, zeros, signs, and the two sides of a jump.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attained import vector_norm
from jax import nn
from tricks import TRICKS, C, N, W

import lipbounds as lb


# ------------------------------------------------------------------------------------ the assertion
def nasty_points() -> tuple[np.ndarray, np.ndarray]:
    """Pairs of points far apart, near one another, and on both sides of ties, zeros and special values."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(400, N)) * 10.0 ** rng.uniform(-1.5, 1.7, size=(400, 1))
    special = rng.choice([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 0.25], size=(400, N))
    tied = np.repeat(rng.normal(size=(200, N // 2)), 2, axis=1)[:, rng.permutation(N)]
    centres = np.concatenate([base, special, tied])
    directions = rng.normal(size=centres.shape)
    directions[::3] *= rng.random(size=directions[::3].shape) < 0.2
    directions += 1e-3 * (np.abs(directions).sum(axis=1, keepdims=True) == 0)
    lengths = 10.0 ** rng.uniform(-2.0, 0.5, size=(len(centres), 1))
    step = lengths * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    first = np.concatenate([centres + step, centres, base[:200]])
    second = np.concatenate([centres - step, centres + step, base[200:]])
    return first.astype(np.float32), second.astype(np.float32)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(TRICKS))
def test_sound_or_silent(name: str) -> None:
    case = TRICKS[name]
    try:
        form = lb.trace(case.fn, jnp.asarray(C))
        bounds = [(p, lb.liplt(form, norm=p).value) for p in (2, 1, np.inf)]
    except lb.UnsupportedError as error:
        assert not case.accept, f"refused: {error}"
        return
    first, second = nasty_points()
    f = jax.jit(jax.vmap(case.fn))
    a, b = (np.asarray(f(jnp.asarray(x)), np.float64) for x in (first, second))
    # floats overflow, the real function does not
    finite = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    assert finite.sum() > 500
    first, second, a, b = first[finite], second[finite], a[finite], b[finite]
    rounding = 4e-6 * (np.abs(a).max(axis=1) + np.abs(b).max(axis=1))
    for p, bound in bounds:
        distance = vector_norm(first.astype(np.float64) - second, p)
        excess = vector_norm(a - b, p) - rounding * N - bound * distance
        assert excess.max() <= 0, f"a slope above the bound {bound} in norm {p}"


def test_most_tricks_would_be_seen() -> None:
    """The points do show the jumps: slopes of the jumping tricks are large."""
    first, second = nasty_points()
    for name in (
        "through_integers",
        "where_with_shifted_predicate",
        "jump_far_away",
        "comparison_as_a_number",
    ):
        f = jax.jit(jax.vmap(TRICKS[name].fn))
        change = np.asarray(f(jnp.asarray(first))) - np.asarray(f(jnp.asarray(second)))
        assert (vector_norm(change, 2) / vector_norm(first - second, 2)).max() > 10.0


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", sorted(TRICKS))
def test_what_is_refused_is_refused_with_traced_weights_too(name: str) -> None:
    """Inside jit no values can be checked against the function: the tracer alone has to see the trick."""
    fn = TRICKS[name].fn

    def accepted(scale: jax.Array | float) -> bool:
        try:
            lb.trace(lambda x: fn(scale * x), C)
        except lb.UnsupportedError:
            return False
        return True

    seen: list[bool] = []
    jax.eval_shape(lambda scale: seen.append(accepted(scale)) or scale, jnp.float32(1.25))
    assert accepted(jnp.float32(1.25)) or not seen[0]


def test_debug_callbacks_do_not_matter() -> None:
    def watched(x: jax.Array) -> jax.Array:
        h = nn.relu(W @ x)
        jax.debug.callback(lambda h: None, h)
        return h

    plain = lb.liplt(lb.trace(lambda x: nn.relu(W @ x), C)).value
    assert lb.liplt(lb.trace(watched, C)).value == plain
