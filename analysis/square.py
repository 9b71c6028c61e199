"""The Square attack: random search in square windows, which asks the network for logits and never for gradients.

Written from the description of Andriushchenko, Croce, Flammarion, Hein, "Square attack: a query-efficient black-box
adversarial attack via random search", ECCV 2020, arXiv 1912.00049 (Algorithms 1 to 3): a window of the perturbation is
replaced, and the change is kept if the margin z_y - max over i != y of z_i falls, until it is at most 0.

Since it uses no gradient, it also breaks networks whose gradients mislead: where it finds more than PGD, the gradients
are masked (`lipbounds.analysis.masking`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

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
    keep,
    per_example,
    project,
    search,
)
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings

#: Queries of 10 000, after each of which the window's share of the image is halved (section 5 of the paper).
_HALVINGS = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)
_AT_ONCE = 64  # between two looks at whether every example is broken


@usual_settings()
def square(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    queries: int = 1000,
    p_init: float | None = None,
    target: Any = None,
    **changes: Any,
) -> Attack:
    """Search every ball ||x' - x|| <= eps by random squares for an x' in the box that is not classified as labelled.

    Args:
        fn, x, y, eps, settings, target, **changes: as those of `attacks.pgd`; what is drawn also depends on the number
            of the query. x holds images (N, H, W, C) or (N, H, W), or vectors (N, d), which are images of one row.
        queries: perturbations tried per example at most; x itself and what is returned are evaluated besides.
        p_init: share of the pixels in the first windows, in (0, 1]; None is 0.05 in norm inf and 0.1 in norm 2. It is
            halved 8 times, at the paper's shares of `queries`. In norm 2 no window has a side of fewer than 3 pixels.

    The search for an example ends with its first success, so `adversarial` is that point and not one of smaller margin.
    In norm inf, a window that would not change is given the opposite signs, as if it were drawn again.

    Raises:
        TypeError: fn is not callable.
        ValueError: as `pgd`, a p_init out of range, or examples that are neither images nor vectors.
    """
    settings = AttackSettings.changed(settings, changes)
    whole("queries", queries)
    share = (0.05 if settings.norm == math.inf else 0.1) if p_init is None else p_init
    if not 0 < share <= 1:
        raise ValueError(f"p_init must be in (0, 1], got {p_init!r}")
    find = run(settings, queries, share)
    with reporting(settings.progress):
        return search(
            "Square",
            find,
            fn,
            x,
            y,
            eps,
            settings,
            "margin",
            target=target,
            needs="logits",
        )


def run(settings: AttackSettings, queries: int, share: float) -> Find:
    """The attack on one batch, with first windows of this share of the image."""
    key = jax.random.key(settings.seed)
    return lambda problem: _search(problem, queries, share, key)


def _search(problem: Problem, queries: int, share: float, key: jax.Array) -> Found:
    """The perturbed examples after all queries, or once all of them are broken."""
    where, x = problem.where, problem.where[0]
    height, width, _ = _image_shape(x.shape[1:])
    sizes = _windows(height, width, queries, share, least=1 if problem.norm == math.inf else 3)
    start = _start(jax.random.fold_in(key, 0), problem.index, where, problem.norm)
    margin = problem.margins(start)
    best = (start, jnp.where(jnp.isnan(margin), jnp.inf, margin), jnp.ones(len(x), jnp.int32))
    stride = min(_AT_ONCE, problem.stride(queries))
    for done in range(1, queries, stride):
        if (done - 1) % _AT_ONCE < stride and not bool((best[1] > 0).any()):
            break
        # Of one length, so that one program serves all; those beyond the last are not asked.
        numbers = np.arange(done, done + stride, dtype=np.int32)
        asked, numbers = numbers < queries, numbers.clip(max=queries - 1)
        best = _ask(
            problem.model,
            problem.weights,
            where,
            problem.labels,
            key,
            problem.index,
            best,
            (jnp.asarray(numbers), jnp.asarray(sizes[numbers]), jnp.asarray(asked)),
            norm=problem.norm,
            targeted=problem.targeted,
        )
    clean = problem.margins(x)
    return Found(keep(x, clean, best, best[2])[0], queries=best[2])


@functools.partial(jax.jit, static_argnames=("model", "norm", "targeted"))
def _ask(
    model: Model,
    weights: Any,
    where: Any,
    labels: jax.Array,
    key: jax.Array,
    index: jax.Array,
    best: Any,
    given: Any,
    *,
    norm: float,
    targeted: bool,
) -> Any:
    """One query of every example for every number and window size in `given`; what is broken stays as it is."""
    x, eps, _, _ = where
    image = (len(x), *_image_shape(x.shape[1:]))
    change = _square if norm == math.inf else _moved_mass

    def query(best: Any, given: Any) -> Any:
        number, size, asked = given
        drawn = _uniform(jax.random.fold_in(key, number), index, 5 + image[3])
        point, left, _ = best

        def proposal(sign: float) -> jax.Array:
            changed = functools.partial(change, size=size, sign=sign)
            moved = jax.vmap(changed)(drawn, x.reshape(image), point.reshape(image), eps)
            return project(moved.reshape(x.shape), where, norm)

        moved = proposal(1.0)
        if norm == math.inf:
            same = (moved == point).all(axis=tuple(range(1, x.ndim)))
            moved = jnp.where(per_example(same, x), proposal(-1.0), moved)
        margin = margin_of(model(weights, moved).astype(jnp.float32), labels, targeted)
        return keep(moved, jnp.where((left > 0) & asked, margin, jnp.inf), best, number + 1), None

    return jax.lax.scan(query, best, given)[0]


# ------------------------------------------------------------------------------- of one example, as an image (H, W, C)
# `drawn` (5 + C,) is uniform in [0, 1): two corners, the direction of a split, and a sign for every colour channel.
def _square(
    drawn: jax.Array, x: jax.Array, point: jax.Array, eps: jax.Array, *, size: jax.Array, sign: float = 1.0
) -> jax.Array:
    """Norm inf (Algorithm 2): a window of x + eps or x - eps, by colour channel."""
    window = _inside(*_offsets(drawn[:2], x, size), *size)
    return jnp.where(window, x + sign * eps * _signs(drawn[5:]), point)


def _moved_mass(
    drawn: jax.Array, x: jax.Array, point: jax.Array, eps: jax.Array, *, size: jax.Array, sign: float = 1.0
) -> jax.Array:
    """Norm 2 (Algorithm 3): the mass of a second window, and what is unused of eps, goes to a bump in the first."""
    shift = point - x
    at = _offsets(drawn[:2], x, size)
    into, out = _inside(*at, *size), _inside(*_offsets(drawn[2:4], x, size), *size)

    def length(part: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(part).sum(axis=(0, 1)))

    bump = _bump(at[0], at[1], size[0], size[1], drawn[4] < 0.5, max(x.shape[:2]))
    bump = bump / jnp.maximum(length(bump), 1e-37)
    own = jnp.where(into, shift, 0.0)
    mixed = sign * _signs(drawn[5:]) * bump + own / jnp.maximum(length(own), 1e-37)
    unused = jnp.maximum(jnp.square(eps) - jnp.square(shift).sum(), 0.0) / x.shape[2]
    mass = jnp.sqrt(jnp.square(length(jnp.where(into | out, shift, 0.0))) + unused)
    return x + jnp.where(into, mixed / jnp.maximum(length(mixed), 1e-37) * mass, jnp.where(out, 0.0, shift))


def _bump(i: jax.Array, j: jax.Array, rows: Any, columns: Any, across: Any, longest: int) -> jax.Array:
    """(H, W, 1) the paper's eta of a window whose halves, left and right if `across`, have opposite signs.

    eta = sum over k = 0..M of 1/(n + 1 - k)^2, which grows towards the middle of each half in M + 1 rings.
    """
    sums = jnp.asarray(np.cumsum([0.0, *(1 / np.arange(1, longest // 2 + 2) ** 2)]), jnp.float32)
    across = across | (rows < 2)
    along, other = jnp.where(across, j, i), jnp.where(across, i, j)
    length, width = jnp.where(across, columns, rows), jnp.where(across, rows, columns)

    def hump(along: jax.Array, length: Any) -> jax.Array:
        n = jnp.maximum(length, width) // 2
        ring = jnp.maximum(jnp.abs(along - length // 2), jnp.abs(other - width // 2))
        return jnp.where(_inside(along, other, length, width), sums[n + 1] - sums[jnp.minimum(ring, n)], 0.0)

    half = length // 2
    return hump(along, half) - hump(along - half, length - half)


def _inside(i: jax.Array, j: jax.Array, rows: Any, columns: Any) -> jax.Array:
    return (i >= 0) & (i < rows) & (j >= 0) & (j < columns)


def _offsets(corner: jax.Array, x: jax.Array, size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of every pixel as seen from a corner drawn in [0, 1)^2: (H, 1, 1) and (1, W, 1)."""
    height, width = x.shape[:2]
    room = jnp.asarray([height + 1, width + 1], jnp.int32) - size  # places for a window inside the image
    at = jnp.floor(corner * room.astype(jnp.float32)).astype(jnp.int32)
    i, j = jnp.arange(height, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    return (i - at[0])[:, None, None], (j - at[1])[None, :, None]


def _signs(drawn: jax.Array) -> jax.Array:
    return jnp.where(drawn < 0.5, jnp.float32(-1), jnp.float32(1))


def _uniform(key: jax.Array, index: jax.Array, count: int) -> jax.Array:
    """(B, count) in [0, 1), a row for every example's number."""
    return jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n), (count,), jnp.float32))(index)


# ------------------------------------------------------------------------------------------- start, sizes of windows
@functools.partial(jax.jit, static_argnames=("norm",))
def _start(key: jax.Array, index: jax.Array, where: Any, norm: float) -> jax.Array:
    """Norm inf: stripes of one column, +-eps by colour channel. Norm 2: a grid of 5 x 5 bumps of total length eps."""
    x, eps, _, _ = where
    height, width, channels = _image_shape(x.shape[1:])
    if norm == math.inf:
        shift = _signs(_uniform(key, index, width * channels).reshape(-1, 1, width, channels))
        shift = jnp.broadcast_to(shift, (len(x), height, width, channels))
    else:
        i = jnp.arange(height, dtype=jnp.int32)[:, None, None]
        j = jnp.arange(width, dtype=jnp.int32)[None, :, None]
        tall, wide = max(height // 5, 1), max(width // 5, 1)
        tiles = (-(-height // tall), -(-width // wide), channels)
        drawn = _uniform(key, index, 1 + math.prod(tiles))
        signs = _signs(drawn[:, 1:]).reshape(-1, *tiles)[:, i[:, :, 0] // tall, j[:, :, 0] // wide]
        across = (drawn[:, 0] < 0.5)[:, None, None, None]
        shift = signs * _bump(i % tall, j % wide, tall, wide, across, max(height, width))
        shift = shift / jnp.sqrt(jnp.square(shift).sum(axis=(1, 2, 3), keepdims=True))
    return project(x + per_example(eps, x) * shift.reshape(x.shape), where, norm)


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) > 3:
        raise ValueError(
            f"square needs images (N, H, W, C) or (N, H, W), or vectors (N, d), got examples {shape}"
        )
    return ((1, *shape, 1), (*shape, 1), shape)[len(shape) - 1]  # type: ignore[return-value]


def _windows(height: int, width: int, queries: int, share: float, least: int) -> np.ndarray:
    """(queries, 2) rows and columns of the window of every query: squares, as far as they fit into the image."""
    halvings = np.searchsorted(_HALVINGS, np.arange(queries) * (10_000 / queries), side="right")
    area = share * height * width / 2.0**halvings
    side = np.rint(np.sqrt(area))
    rows = np.where(side > width, np.rint(area / width), side)
    columns = np.where(side > height, np.rint(area / height), side)
    return np.stack(
        [rows.clip(min(least, height), height), columns.clip(min(least, width), width)], axis=1
    ).astype(np.int32)
