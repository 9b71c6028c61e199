"""Random augmentation of image batches in JAX: reflections, rotations, translations, crops, colours and cutouts.

Every function maps a key and a batch `(n, height, width, channels)` of floats to a batch of the same shape and dtype,
works under jit, scan and vmap, and draws its random numbers in float32 whatever `jax_enable_x64` says, so that a
key gives the same images everywhere, however the batch is sharded. Images in [0, 1] stay in [0, 1]: each new pixel
is a weighted mean, with weights from 0 to 1, of old ones and of `fill`, or one of the 256 levels of AutoAugment.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from lipbounds.training.autoaugment import autoaugment


def flip(key: jax.Array, x: jax.Array) -> jax.Array:
    """Each image, with probability 1/2, mirrored left to right."""
    _check_batch(x)
    mirrored = jax.random.uniform(key, x.shape[:1], jnp.float32) < 0.5
    return jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)


def affine(x: jax.Array, angles: jax.Array, shifts: jax.Array, fill: float = 0.0) -> jax.Array:
    """Rotate each image about its centre, then translate it; bilinear in one pass, `fill` outside the image.

    x       (n, height, width, channels), floats
    angles  (n,) in degrees, counter-clockwise with row 0 on top; 90 is `numpy.rot90`
    shifts  (n, 2) in pixels, down and to the right

    The value at a new pixel is read at the point it comes from, between the four pixels around that point. With
    angle 0 and whole shifts the old pixels are returned exactly.
    """
    _check_batch(x)
    n, height, width, channels = x.shape
    radians = jnp.asarray(angles, jnp.float32) * (math.pi / 180)
    cos, sin = jnp.cos(radians)[:, None, None], jnp.sin(radians)[:, None, None]
    shifts = jnp.asarray(shifts, jnp.float32)
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    row = (jnp.arange(height, dtype=jnp.float32) - middle_row)[None, :, None] - shifts[:, 0, None, None]
    column = (jnp.arange(width, dtype=jnp.float32) - middle_column)[None, None, :] - shifts[:, 1, None, None]
    top, down = _cell(cos * row + sin * column + middle_row, height)
    left, across = _cell(cos * column - sin * row + middle_column, width)

    # One gather for each of the four neighbours, in a rim of `fill`. For three channels this is two to three times
    # as fast on a CPU as jax.scipy.ndimage.map_coordinates, for one channel equally fast; and nested means cannot
    # leave the range of the pixels by rounding, whereas a sum of four products can.
    rim = ((0, 0), (1, 1), (1, 1), (0, 0))
    flat = jnp.pad(x, rim, constant_values=fill).reshape(n, (height + 2) * (width + 2), channels)
    corner = (top * (width + 2) + left).reshape(n, height * width)

    def neighbour(offset: int) -> jax.Array:
        return jax.vmap(lambda image, places: image[places])(flat, corner + offset)

    down, across = (part.astype(x.dtype).reshape(n, height * width, 1) for part in (down, across))
    above = (1 - across) * neighbour(0) + across * neighbour(1)
    below = (1 - across) * neighbour(width + 2) + across * neighbour(width + 3)
    return ((1 - down) * above + down * below).reshape(x.shape)


def crop(key: jax.Array, x: jax.Array, pad: int, fill: float = 0.0, mirrored: bool = False) -> jax.Array:
    """A part of each image's own size from the image in a rim of `pad` pixels: a shift by whole pixels.

    The rim has the value `fill` or, mirrored, the pixels inside the border; pad is less than the image's size then.
    """
    _check_batch(x)
    n, height, width, channels = x.shape
    sides = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    if mirrored and pad >= min(height, width):
        raise ValueError(
            f"images of {height} x {width} pixels have no {pad} pixels to mirror at their border"
        )
    rim = jnp.pad(x, sides, "reflect") if mirrored else jnp.pad(x, sides, constant_values=fill)
    corners = jax.random.randint(key, (n, 2), 0, 2 * pad + 1, jnp.int32)

    def cut(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], jnp.int32(0)), (height, width, channels))

    return jax.vmap(cut)(rim, corners)


def jitter(key: jax.Array, x: jax.Array, share: float) -> jax.Array:
    """Images (n, height, width, channels) in [0, 1] with other brightness, contrast and saturation, clipped to [0, 1].

    x + b first; then its difference from the image's mean times 1 + c; then that of every pixel's channels from their
    mean times 1 + 2 s. Each of b, c and s is uniform in [-share, share], for every image anew.
    """
    _check_batch(x)
    draws = jax.random.uniform(key, (3, x.shape[0], 1, 1, 1), jnp.float32, -share, share).astype(x.dtype)
    x = x + draws[0]
    middle = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    x = middle + (x - middle) * (1 + draws[1])
    grey = jnp.mean(x, axis=3, keepdims=True)
    return jnp.clip(grey + (x - grey) * (1 + 2 * draws[2]), 0, 1)


def cutout(key: jax.Array, x: jax.Array, size: int, fill: float = 0.0) -> jax.Array:
    """A square of `size` pixels around a random pixel of each image becomes `fill`; it may reach over the border.

    DeVries and Taylor, Improved regularization of convolutional neural networks with Cutout, 2017.
    """
    _check_batch(x)
    n, height, width, _ = x.shape
    centres = jax.random.uniform(key, (n, 2), jnp.float32) * jnp.array([height, width], jnp.float32)
    first = jnp.floor(centres).astype(jnp.int32) - size // 2

    def inside(axis: int, length: int) -> jax.Array:
        places = jnp.arange(length, dtype=jnp.int32)[None] - first[:, axis, None]
        return (places >= 0) & (places < size)

    blank = inside(0, height)[:, :, None] & inside(1, width)[:, None, :]
    return jnp.where(blank[..., None], jnp.asarray(fill, x.dtype), x)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """`augmentation(key, x)`: flip, rotation and translation in one resampling, crop, AutoAugment, jitter, cutout.

    flip         mirror each image left to right with probability 1/2
    degrees      largest angle of the rotation, 0..180; angles are uniform
    translate    largest shift as a share of height and width, 0..1; shifts are uniform and rounded to whole pixels,
                 as torchvision's RandomAffine rounds them
    crop         shift by up to this many whole pixels, as a crop from the image in a rim of them
    cutout       side in pixels of a square that is blanked out
    fill         the pixel value outside the original image, in the units of the images
    jitter       share by which brightness and contrast change at most, saturation by twice as much, 0..0.4;
                 images lie in [0, 1] then
    mirrored     whether `crop` shows the image mirrored at its border, in place of `fill`
    autoaugment  whether two random operations change each image, see `autoaugment`; images lie in [0, 1] then

    By default a batch is returned unchanged. ValueError for arguments outside these ranges.
    """

    flip: bool = False
    degrees: float = 0.0
    translate: float = 0.0
    fill: float = 0.0
    crop: int = 0
    cutout: int = 0
    autoaugment: bool = False
    mirrored: bool = False
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees must lie in 0..180, got {self.degrees}")
        if not 0 <= self.translate <= 1:
            raise ValueError(f"translate is a share of the image and must lie in 0..1, got {self.translate}")
        if self.crop < 0 or self.cutout < 0:
            raise ValueError(f"crop and cutout are numbers of pixels, got {self.crop} and {self.cutout}")
        if not 0 <= self.jitter <= 0.4:
            raise ValueError(f"jitter is a share of brightness and must lie in 0..0.4, got {self.jitter}")
        if not math.isfinite(self.fill):
            raise ValueError(f"fill must be finite, got {self.fill}")

    def __call__(self, key: jax.Array, x: jax.Array) -> jax.Array:
        """A batch x (B, height, width, channels) changed at random."""
        # Always three keys, so that the draws of one change do not depend on which others are enabled.
        mirror, angle, shift = jax.random.split(key, 3)
        if self.flip:
            x = flip(mirror, x)
        if self.degrees or self.translate:
            angles = self.degrees * jax.random.uniform(angle, x.shape[:1], jnp.float32, -1.0, 1.0)
            draws = jax.random.uniform(shift, (x.shape[0], 2), jnp.float32, -1.0, 1.0)
            shifts = jnp.round(self.translate * jnp.array(x.shape[1:3], jnp.float32) * draws)
            x = affine(x, angles, shifts, self.fill)
        if self.crop:
            x = crop(jax.random.fold_in(shift, 1), x, self.crop, self.fill, self.mirrored)
        if self.autoaugment:
            x = autoaugment(jax.random.fold_in(shift, 3), x, self.fill)
        if self.jitter:
            x = jitter(jax.random.fold_in(shift, 4), x, self.jitter)
        if self.cutout:
            x = cutout(jax.random.fold_in(shift, 2), x, self.cutout, self.fill)
        return x


def _check_batch(x: jax.Array) -> None:
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expected a batch of floats (n, height, width, channels), got {x.dtype} {x.shape}")


def _cell(position: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """The last pixel at or before each position on an axis of `size` pixels, and the distance from it in [0, 1].

    Pixels are counted in an image with a rim of one pixel, which makes pixel 0 number 1. Positions outside end on the
    rim.
    """
    position = jnp.clip(position, -1.0, float(size))
    before = jnp.minimum(jnp.floor(position), size - 1.0)
    return before.astype(jnp.int32) + 1, position - before
