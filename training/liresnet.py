"""LiResNet: residual networks whose blocks are linear, so that a block's constant is the norm of one convolution.

Hu et al., Unlocking deterministic robustness certification on ImageNet, NeurIPS 2023, and A recipe for improved
certifiable robustness, ICLR 2024: a strided stem, L blocks act(x + conv(x)), a neck that maps windows of 4 x 4 pixels
and then the whole image to features, residual dense maps, and a last layer with columns of length 1. Bounds multiply
the norms of these maps, so that training may price them (`losses.emma`) while none is fixed.

Here the blocks may lie on several scales: from one to the next, windows of 2 x 2 pixels become channels, which keeps
every norm, so that most of the weights work on few pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lipbounds.training.activations import maxmin
from lipbounds.training.layers import Convolution, Dense, downsample


class Stem(nnx.Module):
    """A convolution with window 5, stride 2 and zero padding 2, orthogonal at first."""

    def __init__(self, colours: int, width: int, *, rngs: nnx.Rngs):
        start = nnx.initializers.orthogonal()(rngs.params(), (25 * colours, width), jnp.float32)
        self.kernel = nnx.Param(start.reshape(5, 5, colours, width))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features (B, height / 2, width / 2, channels) of images x."""
        kernel = self.kernel.get_value().astype(x.dtype)
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (2, 2), [(2, 2), (2, 2)], dimension_numbers=numbers)
        return y + self.bias.get_value().astype(x.dtype)


class LiResNet(nnx.Module):
    """A LiResNet on images whose height and width are multiples of 8 (of 2^(2 + scales) in general).

    Args:
        depths: number of blocks on each scale; the first has half the image's size.
        width: channels of the first scale; each further one has four times as many.
        features: of the dense part; twice the channels of the last scale if 0.
        dense: residual dense maps behind the neck.
        mean, std: the input is (x - mean) / std.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        depths: Sequence[int],
        width: int,
        features: int = 0,
        dense: int = 2,
        classes: int = 10,
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        height, wide, colours = input_shape
        unit = 4 * 2 ** len(depths)
        if not depths or min(depths) < 0 or width < 2 or width % 2:
            raise ValueError(f"a LiResNet needs depths and an even width, got {tuple(depths)} and {width}")
        if height % unit or wide % unit:
            raise ValueError(
                f"height and width must be multiples of {unit} for {len(depths)} scales, got {height} x {wide}"
            )
        self.mean, self.std = mean, std
        self.stem = Stem(colours, width, rngs=rngs)
        channels, image, scale = width, (height // 2, wide // 2), sum(depths) ** -0.5 if sum(depths) else 1.0
        scales = []
        for number, depth in enumerate(depths):
            if number:
                channels, image = 4 * channels, (image[0] // 2, image[1] // 2)
            blocks = [
                Convolution(channels, channels, image=image, kind="residual", scale=scale, rngs=rngs)
                for _ in range(depth)
            ]
            scales.append(nnx.List(blocks))
        self.scales = nnx.List(scales)
        features = features or 2 * channels
        flat = math.prod(image) // 16 * channels
        self.windows = Dense(16 * channels, channels, kind="plain", use_bias=False, rngs=rngs)
        self.neck = Dense(flat, features, kind="plain", rngs=rngs)
        self.dense = nnx.List(
            [Dense(features, features, kind="residual", scale=dense**-0.5, rngs=rngs) for _ in range(dense)]
        )
        self.head = Dense(features, classes, kind="unit", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (..., K) of raw pixels, one image (height, width, channels) or a batch of them."""
        if x.ndim == 3:
            return self(x[None])[0]
        h = maxmin(self.stem((x - self.mean) / self.std))
        for number, blocks in enumerate(self.scales):
            h = downsample(h, 2) if number else h
            for block in blocks:
                h = maxmin(block(h))
        h = self.windows(downsample(h, 4))
        h = maxmin(self.neck(h.reshape(h.shape[0], -1)))
        for layer in self.dense:
            h = maxmin(layer(h))
        # the last map in the precision of the weights: margins are differences of its outputs
        return self.head(h.astype(self.head.kernel.get_value().dtype))


def parse(name: str) -> dict[str, Any] | None:
    """The arguments that a name such as "liresnet-L6W64" or "liresnet-L4-8W96" stands for; None for other names.

    Raises:
        ValueError: a name that begins like one of these, but is none.
    """
    if not name.lower().startswith("liresnet"):
        return None
    try:
        head, _, rest = name.partition("-")
        depths, _, width = rest.upper().removeprefix("L").partition("W")
        if head.lower() != "liresnet" or not rest.upper().startswith("L"):
            raise ValueError
        return {"depths": [int(n) for n in depths.split("-")], "width": int(width)}
    except ValueError:
        raise ValueError(
            f'a LiResNet is named by its blocks and its width, as "liresnet-L6W64", or with blocks on several scales '
            f'"liresnet-L4-8W96", got {name!r}'
        ) from None
