"""AutoAugment with the policy of CIFAR-10: to each image two operations of a sub-policy that is drawn for it.

Cubuk, Zoph, Mane, Vasudevan and Le, AutoAugment: Learning augmentation strategies from data, CVPR 2019 (arXiv
1805.09501), Table 7 for the policy. A magnitude m of 0..9 means, as in torchvision, the m-th of ten values with equal
distances in the ranges of Table 6, and + and - are equally likely where an operation has a direction:

| operation | with magnitude m |
|---|---|
| shear x, shear y | +-m/30, about the corner at the top left |
| translate x, translate y | +-m/9 of 150/331 of the width or height, less what is no whole pixel |
| rotate | +-10 m/3 degrees about the centre |
| colour, contrast, sharpness, brightness | enhancement by the factor 1 +- m/10 (1 is the image itself) |
| posterise | 8 - round(4 m/9) bits are kept |
| solarise | levels from 255 - 85 m/3 on are inverted |
| autocontrast, equalise, invert | without a magnitude |

The operations work on levels, integers (n, height, width, channels) of 0..255, and compute in integers alone. So every
device finds the same levels. They are those of Pillow: shears, translations and rotations read the nearest pixel by the
same fixed-point arithmetic, posterise, solarise, equalise and invert agree exactly; enhancements and autocontrast round
an exact quotient down where Pillow rounds one of floats, which is up to one level lower. Images have one channel or
three (red, green, blue); colour does nothing to a grey image, as in Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

#: The 25 sub-policies: two operations in their order, each with its probability and its magnitude.
POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear y", 0.5, 8), ("translate y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalise", 0.9, 2)),
    (("shear y", 0.2, 7), ("posterise", 0.3, 7)),
    (("colour", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalise", 0.6, 5), ("equalise", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("colour", 0.7, 7), ("translate x", 0.5, 8)),
    (("equalise", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("colour", 0.2, 8)),
    (("solarise", 0.5, 2), ("invert", 0.0, 3)),
    (("equalise", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalise", 0.2, 8), ("equalise", 0.6, 4)),
    (("colour", 0.9, 9), ("equalise", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarise", 0.2, 8)),
    (("brightness", 0.1, 3), ("colour", 0.7, 0)),
    (("solarise", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate y", 0.9, 9), ("translate y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarise", 0.8, 3)),
    (("equalise", 0.8, 8), ("invert", 0.1, 3)),
    (("translate y", 0.7, 9), ("autocontrast", 0.9, 1)),
)

_LEVELS = 256


def autoaugment(key: jax.Array, x: jax.Array, fill: float = 0.0) -> jax.Array:
    """Each image after the two operations of its sub-policy, or as many of them as its draws allow.

    A sub-policy is drawn for every image, then whether each of its operations takes place, and its direction.

    Args:
        key: random key. One key gives the same images everywhere, however the batch is sharded.
        x: (n, height, width, channels), floats in [0, 1], with 1 or 3 channels. They are rounded to 256 levels.
        fill: what stands outside the original image, in [0, 1].

    Returns:
        Images of the same shape and dtype. One without any operation is returned bit for bit.

    Raises:
        ValueError: for another shape or dtype.
    """
    if x.ndim != 4 or x.shape[-1] not in (1, 3) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            "AutoAugment needs a batch of floats (n, height, width, channels) with 1 or 3 channels, got "
            f"{x.dtype} {x.shape}"
        )
    n = len(x)
    blank = round(255 * min(max(fill, 0.0), 1.0))
    choosing, happening, turning = jax.random.split(key, 3)
    row = jax.random.randint(choosing, (n,), 0, len(POLICY), jnp.int32)
    draws = jax.random.uniform(happening, (2, n), jnp.float32)
    signs = jax.random.randint(turning, (2, n), 0, 2, jnp.int32)
    values = jnp.clip(x.astype(jnp.float32), 0, 1) * np.float32(255)
    levels = jnp.round(values).astype(jnp.int32)
    touched = jnp.zeros(n, bool)
    for place in (0, 1):
        chances = jnp.array([pair[place][1] for pair in POLICY], jnp.float32)
        happens = draws[place] < chances[row]
        touched = touched | happens
        levels = _operated(levels, place, row, signs[place], happens, blank)
    new = (levels.astype(jnp.float32) / np.float32(255)).astype(x.dtype)
    return jnp.where(touched[:, None, None, None], new, x)


def _operated(
    levels: jax.Array, place: int, row: jax.Array, sign: jax.Array, happens: jax.Array, fill: int
) -> jax.Array:
    """The first (place 0) or second (1) operation of these rows of the policy, where it takes place."""
    _, height, width, _ = levels.shape
    pairs = [pair[place] for pair in POLICY]
    names = list(dict.fromkeys(name for name, _, _ in pairs))
    kinds = jnp.array([names.index(name) for name, _, _ in pairs], jnp.int32)
    moves = [[_fixed(_matrix(name, s * m, height, width)) for s in (1, -1)] for name, _, m in pairs]
    move = jnp.where(
        happens[:, None], jnp.array(moves, jnp.int32)[row, sign], jnp.array(_fixed(_STILL), jnp.int32)
    )
    found = moved(levels, move, fill)
    amounts = jnp.array([[amount(name, s * m) for s in (1, -1)] for name, _, m in pairs], jnp.int32)[
        row, sign
    ]
    kind = jnp.where(happens, kinds[row], -1)
    for index, name in enumerate(names):  # an image has one operation, and those of no operation are kept
        if name in CHANGES:
            found = jnp.where(_each(kind == index), CHANGES[name](levels, amounts), found)
    return found


# ---------------------------------------------------------------------------------------------- places of the pixels
_STILL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def _matrix(name: str, magnitude: int, height: int, width: int) -> tuple[float, ...]:
    """(a, b, c, d, e, f): the new pixel at x, y shows what was at a x + b y + c, d x + e y + f, as in Pillow."""
    if name in ("shear x", "shear y"):
        level = magnitude / 30
        return (1.0, level, 0.0, 0.0, 1.0, 0.0) if name == "shear x" else (1.0, 0.0, 0.0, level, 1.0, 0.0)
    if name in ("translate x", "translate y"):
        size = width if name == "translate x" else height
        shift = float(int(150 / 331 * size * magnitude / 9))
        return (
            (1.0, 0.0, -shift, 0.0, 1.0, 0.0) if name == "translate x" else (1.0, 0.0, 0.0, 0.0, 1.0, -shift)
        )
    if name == "rotate":  # counter-clockwise
        angle = math.radians(-10 * magnitude / 3)
        cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
        return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    return _STILL


def _fixed(matrix: tuple[float, ...]) -> tuple[int, ...]:
    """A matrix in units of 2^-16, from the middle of pixel 0, as Pillow computes with it."""
    a, b, c, d, e, f = matrix
    return tuple(math.floor(v * 65536 + 0.5) for v in (a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2))


def moved(levels: jax.Array, matrices: jax.Array, fill: int) -> jax.Array:
    """The nearest old pixel of every new one by the image's affine map, or `fill` outside.

    Args:
        levels: (n, height, width, channels) of 0..255.
        matrices: (n, 6) in units of 2^-16, see `_fixed`.
        fill: level outside the image.
    """
    n, height, width, channels = levels.shape
    a, b, c, d, e, f = (m[:, None, None] for m in matrices.T)
    row, column = jnp.arange(height, dtype=jnp.int32)[:, None], jnp.arange(width, dtype=jnp.int32)
    x, y = (c + a * column + b * row) >> 16, (f + d * column + e * row) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    places = jnp.where(inside, y * width + x, 0).reshape(n, height * width)
    found = jax.vmap(lambda image, place: image[place])(levels.reshape(n, height * width, channels), places)
    return jnp.where(inside[..., None], found.reshape(levels.shape), jnp.int32(fill))


# ---------------------------------------------------------------------------------------------- values of the pixels
def amount(name: str, magnitude: int) -> int:
    """What an operation needs to know: the factor in tenths, the bits or the first level that is inverted."""
    if name in ("colour", "contrast", "sharpness", "brightness"):
        return 10 + magnitude
    if name == "posterise":
        return 8 - round(4 * abs(magnitude) / 9)
    return 255 - 85 * abs(magnitude) // 3 if name == "solarise" else 0


def _blended(other: jax.Array, levels: jax.Array, tenths: jax.Array) -> jax.Array:
    """The level `other + factor (levels - other)`, rounded down, in 0..255."""
    exact = 10 * other + _each(tenths) * (levels - other)
    return jnp.clip(exact, 0, 2550) // 10


def _grey(levels: jax.Array) -> jax.Array:
    """(n, height, width, 1) luminance of ITU-R 601, by the integers of Pillow."""
    if levels.shape[-1] == 1:
        return levels
    red, green, blue = (levels[..., i : i + 1] for i in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _colour(levels: jax.Array, tenths: jax.Array) -> jax.Array:
    return levels if levels.shape[-1] == 1 else _blended(_grey(levels), levels, tenths)


def _contrast(levels: jax.Array, tenths: jax.Array) -> jax.Array:
    """From the mean grey of the image, rounded to a level."""
    grey, pixels = _grey(levels), levels.shape[1] * levels.shape[2]
    mean = (2 * grey.sum(axis=(1, 2, 3), dtype=jnp.int32) + pixels) // (2 * pixels)
    return _blended(_each(mean), levels, tenths)


def _sharpness(levels: jax.Array, tenths: jax.Array) -> jax.Array:
    """From the image smoothed by ones around a five; the pixels at the border stay as they are."""
    _, height, width, _ = levels.shape
    if height < 3 or width < 3:
        return levels
    rows = levels[:, :-2] + levels[:, 1:-1] + levels[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * levels[:, 1:-1, 1:-1]
    inner = _blended((2 * total + 13) // 26, levels[:, 1:-1, 1:-1], tenths)
    return levels.at[:, 1:-1, 1:-1].set(inner)


def _brightness(levels: jax.Array, tenths: jax.Array) -> jax.Array:
    return _blended(jnp.zeros_like(levels), levels, tenths)


def _posterise(levels: jax.Array, bits: jax.Array) -> jax.Array:
    shift = 8 - _each(bits)
    return (levels >> shift) << shift


def _solarise(levels: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(levels < _each(threshold), levels, 255 - levels)


def _invert(levels: jax.Array, _: jax.Array) -> jax.Array:
    return 255 - levels


def _autocontrast(levels: jax.Array, _: jax.Array) -> jax.Array:
    """Each channel stretched to 0..255; one of a single level stays as it is."""
    low, high = (f(levels, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    return jnp.where(high > low, 255 * (levels - low) // jnp.maximum(high - low, 1), levels)


def _equalise(levels: jax.Array, _: jax.Array) -> jax.Array:
    """Each channel with a nearly uniform histogram; one that is of a single level, or too small, stays as it is."""
    n, height, width, channels = levels.shape
    values = jnp.moveaxis(levels, -1, 1).reshape(n, channels, height * width)

    def counted(values: jax.Array) -> jax.Array:
        return jnp.zeros(_LEVELS, jnp.int32).at[values].add(1)

    def looked_up(table: jax.Array, values: jax.Array) -> jax.Array:
        return table[values]

    histogram = jax.vmap(jax.vmap(counted))(values)
    below = jnp.cumsum(histogram, axis=-1, dtype=jnp.int32) - histogram  # pixels of lower levels
    step = jnp.max(jnp.where(histogram > 0, below, 0), axis=-1, keepdims=True) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    table = jnp.where(step > 0, table, jnp.arange(_LEVELS, dtype=jnp.int32))
    found = jax.vmap(jax.vmap(looked_up))(table, values)
    return jnp.moveaxis(found.reshape(n, channels, height, width), 1, -1)


def _each(values: jax.Array) -> jax.Array:
    """One value per image, in the shape that broadcasts against the images."""
    return values[:, None, None, None]


#: Operations on the values of pixels: f(levels, amounts), with an amount per image.
CHANGES: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "brightness": _brightness,
    "posterise": _posterise,
    "solarise": _solarise,
    "invert": _invert,
    "autocontrast": _autocontrast,
    "equalise": _equalise,
}
