"""LipNeXt: orthogonal maps of the channels between shifts of the image, with constant 1 and without convolutions.

Hu, Hu and Fredrikson, LipNeXt: scaling up Lipschitz-based certified robustness to billion-parameter models, ICLR 2026:
a part of the channels moves by one pixel in each direction, then one orthogonal matrix mixes the channels of every
pixel. A network is products of matrices and permutations, which is what accelerators are fast at, and orthogonal
matrices are as cheap to keep as dense layers: no Fourier transform, no power iteration.

Its matrices are trained on the manifold of orthonormal ones (`manifold.py`), which is cheaper than any construction and
needs fewer steps here, too. Other than there: windows of pixels become channels between scales (and before the first),
the nonlinearity is MaxMin, windows of pixels and then the image are mapped to features by matrices with orthonormal
columns, where the paper takes the norm over all pixels, and channels are centred: each has its mean over the images and
pixels subtracted, which changes no constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lipbounds.training.activations import maxmin
from lipbounds.training.layers import ORTHOGONAL, Centre, Dense, downsample

KINDS = ("stiefel", *ORTHOGONAL, "aol")
_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def shift(x: jax.Array, share: float = 0.25) -> jax.Array:
    """Images (..., h, w, c) with a share of the channels moved by one pixel, a quarter of it each way; a permutation.

    Pixels that leave the image come back on the other side. Each direction has an even number of channels.
    """
    size = int(x.shape[-1] * share) // 8 * 2
    if size == 0:
        return x
    *moved, rest = jnp.split(x, [size, 2 * size, 3 * size, 4 * size], axis=-1)
    turned = [jnp.roll(part, way, axis=(-3, -2)) for part, way in zip(moved, _DIRECTIONS, strict=True)]
    return jnp.concatenate([*turned, rest], axis=-1)


class Mixer(nnx.Module):
    """maxmin(x W + b - mean), W (n_in, n_out) of the given kind and the mean over a batch or, later, over batches."""

    def __init__(self, n_in: int, n_out: int, kind: str, *, rngs: nnx.Rngs):
        self.dense = Dense(n_in, n_out, kind=kind, use_bias=False, rngs=rngs)
        self.centre = Centre(n_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer on x (..., n_in)."""
        return maxmin(self.centre(self.dense(x)))


class LipNeXt(nnx.Module):
    """A LipNeXt on images whose height and width are multiples of 2^scales.

    Args:
        depths: layers on each scale; the first has half the image's size.
        width: channels of the first scale; each further one has four times as many.
        features: of the dense part; twice the channels of the last scale if 0.
        dense: dense layers behind the map of windows to features.
        kind: of all matrices but the last, one of `KINDS`.
        mean, std: the input is (x - mean) / std.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        depths: Sequence[int],
        width: int,
        features: int = 0,
        dense: int = 1,
        kind: str = "stiefel",
        classes: int = 10,
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        height, wide, colours = input_shape
        unit = 2 ** len(depths)
        if not depths or min(depths) < 1 or width < 2 or width % 2:
            raise ValueError(f"a LipNeXt needs depths and an even width, got {tuple(depths)} and {width}")
        if height % unit or wide % unit:
            raise ValueError(
                f"height and width must be multiples of {unit} for {len(depths)} scales, got {height} x {wide}"
            )
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.mean, self.std = mean, std
        scales, channels, image = [], colours, (height, wide)
        for number, depth in enumerate(depths):
            n_in, channels, image = 4 * channels, width * 4**number, (image[0] // 2, image[1] // 2)
            sizes = [(n_in if layer == 0 else channels, channels) for layer in range(depth)]
            scales.append(nnx.List([Mixer(*size, kind, rngs=rngs) for size in sizes]))
        self.scales = nnx.List(scales)
        self.window = _window(*image)
        features = features or 2 * channels
        self.windows = Mixer(self.window**2 * channels, features, kind, rngs=rngs)
        n_in = math.prod(image) // self.window**2 * features
        self.dense = nnx.List(
            [Mixer(features if layer else n_in, features, kind, rngs=rngs) for layer in range(dense)]
        )
        self.head = Dense(features if dense else n_in, classes, kind="unit", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (..., K) of raw pixels, one image (height, width, channels) or a batch of them."""
        if x.ndim == 3:
            return self(x[None])[0]
        h = (x - self.mean) / self.std
        for layers in self.scales:
            h = downsample(h, 2)
            for number, layer in enumerate(layers):
                h = layer(shift(h) if number else h)
        h = self.windows(downsample(h, self.window))
        h = h.reshape(h.shape[0], -1)
        for layer in self.dense:
            h = layer(h)
        return self.head(h.astype(self.head.kernel.get_value().dtype))


def _window(height: int, width: int) -> int:
    """The side of the windows that the last scale is divided into: the largest of which at least two fit, if any."""
    sides = [n for n in range(1, min(height, width) + 1) if height % n == 0 and width % n == 0]
    several = [n for n in sides if min(height, width) >= 2 * n]
    return max(several) if several and max(several) > 1 else max(sides)


def parse(name: str) -> dict[str, Any] | None:
    """The arguments that a name such as "lipnext-L6W64" or "lipnext-L2-4W32-cayley" stands for; None for other names.

    Raises:
        ValueError: a name that begins like one of these, but is none.
    """
    if not name.lower().startswith("lipnext"):
        return None
    try:
        head, _, rest = name.lower().partition("-")
        depths, _, width = rest.removeprefix("l").partition("w")
        width, _, kind = width.partition("-")
        if head != "lipnext" or not rest.startswith("l"):
            raise ValueError
        return {
            "depths": [int(n) for n in depths.split("-")],
            "width": int(width),
            **({"kind": kind} if kind else {}),
        }
    except ValueError:
        raise ValueError(
            f'a LipNeXt is named by its layers and its width, as "lipnext-L6W64", or with layers on several scales '
            f'"lipnext-L2-4W32" (also with the kind of its matrices, "lipnext-L2-4W32-cayley"), got {name!r}'
        ) from None
