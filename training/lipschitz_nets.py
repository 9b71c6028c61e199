"""Networks of constant 1 by construction: LipConvnets and 4C3F of orthogonal layers, AOL and SLL networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lipbounds.training.activations import maxmin
from lipbounds.training.blocks import Block
from lipbounds.training.layers import ORTHOGONAL, Convolution, Dense, downsample


class LipConvNet(nnx.Module):
    """Orthogonal convolutions with MaxMin on five scales; the last one of a scale halves the image.

    Singla and Feizi, Skew orthogonal convolutions, ICML 2021: `layers` is a multiple of 5 there, as the images have 32
    pixels; here of the number of times (at most 5) that the image can be halved. Channels double with every scale.

    Args:
        layers: convolutions in all.
        width: channels of the first scale.
        kind: of the convolutions, one of `layers.ORTHOGONAL` or "aol".
        mean, std: the input is (x - mean) / std.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        layers: int,
        width: int = 32,
        kind: str = "reflection",
        classes: int = 10,
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        height, wide, channels = input_shape
        scales = _halvings(height, wide)
        if scales == 0 or layers < 1 or layers % scales:
            raise ValueError(
                f"the number of layers is a multiple of {max(scales, 1)}, the times that an image of {height} x {wide} "
                f"can be halved, got {layers}"
            )
        if kind not in (*ORTHOGONAL, "aol"):
            raise ValueError(f"kind must be one of {', '.join((*ORTHOGONAL, 'aol'))}, got {kind!r}")
        self.mean, self.std = mean, std
        image, found = (height, wide), []
        for scale in range(scales):
            for number in range(layers // scales):
                stride = 2 if number == layers // scales - 1 else 1
                window = 3 if min(image) // stride >= 3 else 1
                out = width * 2**scale
                found.append(
                    Convolution(
                        channels, out, image=image, kind=kind, window=window, stride=stride, rngs=rngs
                    )
                )
                channels = out
            image = (image[0] // 2, image[1] // 2)
        self.convolutions = nnx.List(found)
        self.head = Dense(math.prod(image) * channels, classes, kind="unit", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (..., K) of raw pixels, one image (height, width, channels) or a batch of them."""
        if x.ndim == 3:
            return self(x[None])[0]
        h = (x - self.mean) / self.std
        for layer in self.convolutions:
            h = maxmin(layer(h))
        h = h.reshape(h.shape[0], -1)
        return self.head(h.astype(self.head.kernel.get_value().dtype))


class OrthogonalConvNet(nnx.Module):
    """Convolutions of one kind on images of one size or the next smaller ones, then dense layers, all with MaxMin.

    Args:
        convolutions: (channels, stride) of each; windows are 3 x 3 on the image that `downsample` makes, 1 x 1 where it
            has fewer rows or columns.
        dense: features of the hidden dense layers.
        kind: of all layers but the last, one of `layers.ORTHOGONAL` or "aol".
        mean, std: the input is (x - mean) / std.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        convolutions: Sequence[Sequence[int]],
        dense: Sequence[int],
        kind: str = "cholesky",
        classes: int = 10,
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        height, wide, channels = input_shape
        if kind not in (*ORTHOGONAL, "aol"):
            raise ValueError(f"kind must be one of {', '.join((*ORTHOGONAL, 'aol'))}, got {kind!r}")
        self.mean, self.std, found = mean, std, []
        for out, stride in convolutions:
            image = (height, wide)
            height, wide = height // stride, wide // stride
            window = 3 if min(height, wide) >= 3 else 1
            found.append(
                Convolution(channels, out, window=window, stride=stride, image=image, kind=kind, rngs=rngs)
            )
            channels = out
        self.convolutions = nnx.List(found)
        sizes = (height * wide * channels, *dense)
        self.dense = nnx.List([Dense(a, b, kind=kind, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.head = Dense(sizes[-1], classes, kind="unit", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (..., K) of raw pixels, one image (height, width, channels) or a batch of them."""
        if x.ndim == 3:
            return self(x[None])[0]
        h = (x - self.mean) / self.std
        for convolution in self.convolutions:
            h = maxmin(convolution(h))
        h = h.reshape(h.shape[0], -1)
        for layer in self.dense:
            h = maxmin(layer(h))
        return self.head(h.astype(self.head.kernel.get_value().dtype))


class ResidualLipschitzNet(nnx.Module):
    """SLL blocks, or AOL layers with MaxMin, on features or on images of half the size.

    Args:
        blocks: their number.
        width: features, or channels behind the first layer.
        kind: "sll" or "aol".
        convolutional: on images of half the size, whose windows of 2 x 2 pixels become channels first.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        blocks: int,
        width: int,
        kind: str = "sll",
        convolutional: bool = False,
        classes: int = 10,
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        height, wide, channels = input_shape
        if kind not in ("sll", "aol") or blocks < 1 or width < 2 or width % 2:
            raise ValueError(
                f"an sll or aol network needs blocks and an even width, got {kind!r}, {blocks}, {width}"
            )
        if convolutional and (height % 4 or wide % 4):
            raise ValueError(f"height and width must be multiples of 4, got {height} x {wide}")
        self.mean, self.std, self.convolutional = mean, std, convolutional
        window = 3 if convolutional else 0
        self.first: Dense | Convolution
        if convolutional:
            self.first = Convolution(channels, width, image=(height, wide), kind="aol", stride=2, rngs=rngs)
            flat = height // 4 * (wide // 4) * 4 * width
        else:
            self.first = Dense(height * wide * channels, width, kind="aol", rngs=rngs)
            flat = width
        if kind == "sll":
            layers: list[nnx.Module] = [Block(width, window=window, rngs=rngs) for _ in range(blocks)]
        elif convolutional:
            half = (height // 2, wide // 2)
            layers = [Convolution(width, width, image=half, kind="aol", rngs=rngs) for _ in range(blocks)]
        else:
            layers = [Dense(width, width, kind="aol", rngs=rngs) for _ in range(blocks)]
        self.kind, self.blocks = kind, nnx.List(layers)
        self.neck = Dense(flat, width, kind="aol", rngs=rngs)
        self.head = Dense(width, classes, kind="unit", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (..., K) of raw pixels, one image (height, width, channels) or a batch of them."""
        if x.ndim == 3:
            return self(x[None])[0]
        h = (x - self.mean) / self.std
        h = self.first(h if self.convolutional else h.reshape(h.shape[0], -1))
        for block in self.blocks:
            h = block(h) if self.kind == "sll" else maxmin(block(h))
        h = downsample(h, 2).reshape(h.shape[0], -1) if self.convolutional else h
        h = maxmin(self.neck(h))
        return self.head(h.astype(self.head.kernel.get_value().dtype))


def _halvings(height: int, width: int) -> int:
    count = 0
    while count < 5 and height % 2 == 0 and width % 2 == 0:
        height, width, count = height // 2, width // 2, count + 1
    return count


def parse(name: str) -> tuple[str, dict[str, Any]] | None:
    """(architecture, arguments) of "lipconvnet-10", "lipconvnet-5-cayley", "4C3F-cholesky", "sll-mlp-L4W256", ...

    None for names that do not begin like these. ValueError for those that do and are none.
    """
    parts = name.lower().split("-")
    try:
        if parts[0] == "lipconvnet":
            kind = {"kind": parts[2]} if len(parts) == 3 else {}
            if len(parts) > 3:
                raise ValueError
            return "lipconvnet", {"layers": int(parts[1]), **kind}
        if parts[0] == "4c3f" and len(parts) > 1:
            if len(parts) > 2:
                raise ValueError
            return "orthogonal_4C3F", {"kind": parts[1]}
        if parts[0] in ("sll", "aol"):
            depth, _, width = parts[2].removeprefix("l").partition("w")
            if len(parts) != 3 or parts[1] not in ("mlp", "cnn") or not parts[2].startswith("l"):
                raise ValueError
            sizes = {"blocks": int(depth), "width": int(width)}
            return "residual_lipschitz", {"kind": parts[0], "convolutional": parts[1] == "cnn", **sizes}
    except (ValueError, IndexError):
        raise ValueError(
            f'unknown architecture {name!r}: names are "lipconvnet-10" (layers; also "lipconvnet-10-cayley"), '
            '"4C3F-cholesky" (kind of the layers), '
            '"sll-mlp-L4W256", "aol-cnn-L4W32" (blocks and width)'
        ) from None
    return None
