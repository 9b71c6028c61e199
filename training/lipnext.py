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
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lipbounds.training import mirrored
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

    def weights(self) -> jax.Array:
        """W."""
        return self.dense.weights()

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer on x (..., n_in)."""
        return maxmin(self.centre(self.dense(x)))


class LipNeXt(nnx.Module):
    """A LipNeXt on images whose height and width are multiples of 2^scales.

    Args:
        depths: layers on each scale; the first has half the image's size.
        width: channels of the first scale; each further one has four times as many. Even, and a multiple of 4 if
            symmetric, as `features` is.
        features: of the dense part; twice the channels of the last scale if 0.
        dense: dense layers behind the map of windows to features.
        kind: of all matrices but the last, one of `KINDS`.
        symmetric: the outputs are the same for an image and its mirror image. The last layer sees half the features.
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
        symmetric: bool = False,
        classes: int = 10,
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        height, wide, colours = input_shape
        unit = 2 ** len(depths)
        even = 4 if symmetric else 2
        if not depths or min(depths) < 1 or width < even or width % even or features % even:
            raise ValueError(
                f"a LipNeXt needs depths, and an even width and even features (multiples of 4 if symmetric), got "
                f"{tuple(depths)}, {width} and {features}"
            )
        if height % unit or wide % unit:
            raise ValueError(
                f"height and width must be multiples of {unit} for {len(depths)} scales, got {height} x {wide}"
            )
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.mean, self.std, self.symmetric = mean, std, symmetric
        mixer = partial(mirrored.SymmetricMixer if symmetric else Mixer, kind=kind, rngs=rngs)
        scales, channels, image = [], colours, (height, wide)
        for number, depth in enumerate(depths):
            n_in, channels, image = 4 * channels, width * 4**number, (image[0] // 2, image[1] // 2)
            sizes = [(n_in if layer == 0 else channels, channels) for layer in range(depth)]
            scales.append(nnx.List([mixer(*size) for size in sizes]))
        self.scales = nnx.List(scales)
        self.window = _window(*image)
        features = features or 2 * channels
        self.windows = mixer(self.window**2 * channels, features)
        n_in = math.prod(image) // self.window**2 * features
        self.dense = nnx.List([mixer(features if layer else n_in, features) for layer in range(dense)])
        seen = (features if dense else n_in) // (2 if symmetric else 1)
        self.head = Dense(seen, classes, kind="unit", rngs=rngs)

    @property
    def mixers(self) -> list[Mixer | mirrored.SymmetricMixer]:
        """All layers but the last, from the first on."""
        return [*(layer for scale in self.scales for layer in scale), self.windows, *self.dense]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (..., K) of raw pixels, one image (height, width, channels) or a batch of them."""
        if x.ndim == 3:
            return self(x[None])[0]
        h = (x - self.mean) / self.std
        on_images = mirrored.both if self.symmetric else _on_images
        for scale, layers in enumerate(self.scales):
            h = mirrored.halves(h) if self.symmetric and scale == 0 else on_images(_quarter, h)
            for number, layer in enumerate(layers):
                h = layer(on_images(shift, h) if number else h)
        h = self.windows(on_images(partial(downsample, stride=self.window), h))
        h = mirrored.flat(h) if self.symmetric else h.reshape(h.shape[0], -1)
        for layer in self.dense:
            h = layer(h)
        h = mirrored.even(h) if self.symmetric else h
        return self.head(h.astype(self.head.kernel.get_value().dtype))


def _on_images(f: Callable[[jax.Array], jax.Array], h: jax.Array) -> jax.Array:
    return f(h)


def _quarter(h: jax.Array) -> jax.Array:
    return downsample(h, 2)


def _window(height: int, width: int) -> int:
    """The side of the windows that the last scale is divided into: the largest of which at least two fit, if any."""
    sides = [n for n in range(1, min(height, width) + 1) if height % n == 0 and width % n == 0]
    several = [n for n in sides if min(height, width) >= 2 * n]
    return max(several) if several and max(several) > 1 else max(sides)


def parse(name: str) -> dict[str, Any] | None:
    """The arguments that "lipnext-L6W64", "lipnext-L2-4W32F256-symmetric" and the like stand for; None for other names.

    Raises:
        ValueError: a name that begins like one of these, but is none.
    """
    if not name.lower().startswith("lipnext"):
        return None
    found = re.fullmatch(
        r"lipnext-l(\d+(?:-\d+)*)w(\d+)(?:f(\d+))?(?:-([a-z]+))??(-symmetric)?", name.lower()
    )
    if found is None:
        raise ValueError(
            f'a LipNeXt is named by its layers and its width, as "lipnext-L6W64", or with layers on several scales '
            f'"lipnext-L2-4W32"; behind them may stand its features, the kind of its matrices and that mirroring does '
            f'not change its outputs, as in "lipnext-L2-4W32F256-cayley-symmetric"; got {name!r}'
        )
    depths, width, features, kind, symmetric = found.groups()
    return {
        "depths": [int(n) for n in depths.split("-")],
        "width": int(width),
        **({"features": int(features)} if features else {}),
        **({"kind": kind} if kind else {}),
        **({"symmetric": True} if symmetric else {}),
    }
