"""Networks with BatchNorm for small images: ResNets, Wide ResNets and DenseNets, as robust training uses them.

| name | network | source |
|---|---|---|
| resnet18, resnet34, resnet50 | basic or bottleneck blocks on four scales | He et al., CVPR 2016 |
| wrn-28-10 | pre-activation blocks on three scales, depth 6n + 4, widths 16, 32 and 64 times the last number | \
Zagoruyko and Komodakis, BMVC 2016 |
| densenet-bc-40-12 | bottlenecks whose outputs are kept, depth 6n + 4, growth, transitions to half the channels | \
Huang et al., CVPR 2017 |

The stem is a convolution with window 3 and stride 1, as is usual for images of 32 or 64 pixels, and the mean over the
pixels stands before the last layer. A suffix such as "-w0.25" scales the channels of a ResNet; the last number of a
Wide ResNet need not be whole.

A network is built in evaluation mode, in which BatchNorm is an affine map that every bound reads; `fit` trains one by
name in training mode, by the moments of the batches. Weights are cast to the type of the images, and moments are taken
in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipbounds.training.layers import as_input

_KEPT = 0.9  # share of the running moments that a step keeps
_RESNETS: dict[int, tuple[int, ...]] = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
}
_BOTTLENECKS = (50, 101)
_WIDER = 4  # channels out of a bottleneck of a ResNet, and between the two maps of a DenseNet's, over its own


def _drawn(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
    """Normal numbers of standard deviation 1 / sqrt(fan_in).

    NumPy draws them, as JAX would compile a program for each of the many shapes; under jit JAX does all the same.
    """
    scale = math.prod(shape[:-1]) ** -0.5
    if isinstance(key, jax.core.Tracer):
        return scale * jax.random.normal(key, tuple(shape), dtype)
    seed = np.asarray(jax.random.key_data(key))
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(tuple(shape)), dtype)


def _conv(n_in: int, n_out: int, window: int, stride: int = 1, *, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        n_in,
        n_out,
        (window, window),
        strides=stride,
        padding=window // 2,
        use_bias=False,
        kernel_init=_drawn,
        promote_dtype=as_input,
        rngs=rngs,
    )


class Norm(nnx.BatchNorm):
    """BatchNorm in evaluation mode, whose result has the type of its input."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        super().__init__(channels, momentum=_KEPT, use_running_average=True, rngs=rngs)

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """x (..., channels), normalised."""
        # in float32 by an explicit cast, as types are not mixed where JAX is set to strict promotion
        return super().__call__(x.astype(jnp.float32), *args, **options).astype(x.dtype)


class Block(nnx.Module):
    """relu(x' + f(x)), x' = x or a strided 1 x 1 convolution of it: two maps, or three with a bottleneck."""

    def __init__(self, n_in: int, channels: int, stride: int, bottleneck: bool, *, rngs: nnx.Rngs):
        self.channels = _WIDER * channels if bottleneck else channels
        widths = (n_in, channels, channels, self.channels) if bottleneck else (n_in, channels, channels)
        windows, strides = ((1, 3, 1), (1, stride, 1)) if bottleneck else ((3, 3), (stride, 1))
        shape = zip(itertools.pairwise(widths), windows, strides, strict=True)
        self.convs = nnx.List([_conv(a, b, window, s, rngs=rngs) for (a, b), window, s in shape])
        self.norms = nnx.List([Norm(width, rngs=rngs) for width in widths[1:]])
        changes = stride > 1 or n_in != self.channels
        self.short = _conv(n_in, self.channels, 1, stride, rngs=rngs) if changes else None
        self.short_norm = Norm(self.channels, rngs=rngs) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The block on x (B, height, width, channels)."""
        h = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(jax.nn.relu(h) if number else h))
        if self.short is not None and self.short_norm is not None:
            x = self.short_norm(self.short(x))
        return jax.nn.relu(x + h)


class PreActivationBlock(nnx.Module):
    """x' + conv(relu(norm(conv(relu(norm(x)))))), x' = x, or a strided 1 x 1 convolution of relu(norm(x))."""

    def __init__(self, n_in: int, channels: int, stride: int, *, rngs: nnx.Rngs):
        self.channels = channels
        self.norms = nnx.List([Norm(n_in, rngs=rngs), Norm(channels, rngs=rngs)])
        self.convs = nnx.List(
            [_conv(n_in, channels, 3, stride, rngs=rngs), _conv(channels, channels, 3, rngs=rngs)]
        )
        self.short = _conv(n_in, channels, 1, stride, rngs=rngs) if n_in != channels else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The block on x (B, height, width, channels)."""
        h = jax.nn.relu(self.norms[0](x))
        if self.short is not None:
            x = self.short(h)
        return x + self.convs[1](jax.nn.relu(self.norms[1](self.convs[0](h))))


class DenseBlock(nnx.Module):
    """x and `growth` more channels of it: a 1 x 1 convolution to four times as many, then a 3 x 3 one."""

    def __init__(self, n_in: int, growth: int, *, rngs: nnx.Rngs):
        self.channels = n_in + growth
        self.norms = nnx.List([Norm(n_in, rngs=rngs), Norm(_WIDER * growth, rngs=rngs)])
        self.convs = nnx.List(
            [_conv(n_in, _WIDER * growth, 1, rngs=rngs), _conv(_WIDER * growth, growth, 3, rngs=rngs)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """The block on x (B, height, width, channels)."""
        h = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = conv(jax.nn.relu(norm(h)))
        return jnp.concatenate([x, h], axis=-1)


class Transition(nnx.Module):
    """A 1 x 1 convolution to half the channels, then the mean over 2 x 2 pixels."""

    def __init__(self, n_in: int, *, rngs: nnx.Rngs):
        self.channels = n_in // 2
        self.norm = Norm(n_in, rngs=rngs)
        self.conv = _conv(n_in, self.channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The map on x (B, height, width, channels), height and width even."""
        h = self.conv(jax.nn.relu(self.norm(x)))
        batch, height, width, channels = h.shape
        return h.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


class BatchNormNet(nnx.Module):
    """Stem, blocks, mean over the pixels, one dense layer.

    Args:
        kind: "resnet", "wide" or "densenet".
        depth: as in the name.
        width: factor of the channels, for a DenseNet the growth.
        mean, std: the input is (x - mean) / std.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        kind: str,
        depth: int,
        width: float = 1.0,
        classes: int = 10,
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        make = {"resnet": _resnet, "wide": _wide, "densenet": _densenet}.get(kind)
        if make is None:
            raise ValueError(f"kind must be resnet, wide or densenet, got {kind!r}")
        height, wide, colours = input_shape
        halvings = 3 if kind == "resnet" else 2
        if height % 2**halvings or wide % 2**halvings:
            raise ValueError(
                f"height and width must be multiples of {2**halvings} for this network, got {height} x {wide}"
            )
        self.mean, self.std = mean, std
        stem, blocks = make(depth, width, rngs)
        self.stem = _conv(colours, stem, 3, rngs=rngs)
        # the first norm of a ResNet stands behind its stem, that of the others behind their blocks
        self.first = kind == "resnet"
        self.blocks = nnx.List(blocks)
        last = blocks[-1].channels
        self.norm = Norm(stem if self.first else last, rngs=rngs)
        self.head = nnx.Linear(last, classes, kernel_init=_drawn, promote_dtype=as_input, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (..., K) of raw pixels, one image (height, width, channels) or a batch of them."""
        if x.ndim == 3:
            return self(x[None])[0]
        h = self.stem((x - self.mean) / self.std)
        h = jax.nn.relu(self.norm(h)) if self.first else h
        for block in self.blocks:
            h = block(h)
        h = h if self.first else jax.nn.relu(self.norm(h))
        return self.head(h.mean(axis=(1, 2)))


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _resnet(depth: int, width: float, rngs: nnx.Rngs) -> tuple[int, list[Any]]:
    if depth not in _RESNETS:
        raise ValueError(f"a ResNet has depth {', '.join(map(str, _RESNETS))}, got {depth}")
    stem = channels = _scaled(64, width)
    blocks = []
    for scale, count in enumerate(_RESNETS[depth]):
        for number in range(count):
            stride = 2 if scale and not number else 1
            block = Block(channels, _scaled(64 * 2**scale, width), stride, depth in _BOTTLENECKS, rngs=rngs)
            channels = block.channels
            blocks.append(block)
    return stem, blocks


def _sixths(depth: int, name: str) -> int:
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"the depth of a {name} is 6 n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}")
    return depth // 6


def _wide(depth: int, width: float, rngs: nnx.Rngs) -> tuple[int, list[Any]]:
    count, channels, blocks = _sixths(depth, "Wide ResNet"), 16, []
    for scale in range(3):
        for number in range(count):
            stride = 2 if scale and not number else 1
            block = PreActivationBlock(channels, _scaled(16 * 2**scale, width), stride, rngs=rngs)
            channels = block.channels
            blocks.append(block)
    return 16, blocks


def _densenet(depth: int, growth: float, rngs: nnx.Rngs) -> tuple[int, list[Any]]:
    count = _sixths(depth, "DenseNet-BC")
    if growth != int(growth):
        raise ValueError(f"the growth of a DenseNet is a whole number, got {growth:g}")
    stem = channels = 2 * int(growth)
    blocks: list[Any] = []
    for scale in range(3):
        if scale:
            blocks.append(Transition(channels, rngs=rngs))
            channels = blocks[-1].channels
        for _ in range(count):
            blocks.append(DenseBlock(channels, int(growth), rngs=rngs))
            channels = blocks[-1].channels
    return stem, blocks


def parse(name: str) -> dict[str, Any] | None:
    """The arguments of "resnet18", "resnet18-w0.25", "wrn-28-4", "densenet-bc-40-12"; None for other names.

    Raises:
        ValueError: a name that begins like one of these, but is none.
    """
    lower = name.lower()
    if not lower.startswith(("resnet", "wrn", "densenet")):
        return None
    try:
        first, *rest = lower.split("-")
        if first.startswith("resnet"):
            if len(rest) > 1 or (rest and not rest[0].startswith("w")):
                raise ValueError
            found = ("resnet", int(first.removeprefix("resnet")), float(rest[0][1:]) if rest else 1.0)
        elif first == "wrn":
            depth, width = rest
            found = ("wide", int(depth), float(width))
        else:
            bottleneck, depth, growth = rest
            if first != "densenet" or bottleneck != "bc":
                raise ValueError
            found = ("densenet", int(depth), float(growth.removeprefix("k")))
        if not 0 < found[2] < 1e4:
            raise ValueError
    except ValueError:
        raise ValueError(
            f'unknown architecture {name!r}: networks with BatchNorm are named "resnet18", "resnet18-w0.25" (factor of '
            'the channels), "wrn-28-4" (depth, factor) or "densenet-bc-40-12" (depth, growth)'
        ) from None
    return dict(zip(("kind", "depth", "width"), found, strict=True))
