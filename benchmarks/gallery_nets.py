"""The gallery's networks: flax nnx modules of published architectures, at two sizes (`gallery` measures them)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import nn

Activation = Callable[[jax.Array], jax.Array]

CLASSES = 10


@dataclass(frozen=True)
class Size:
    """Images side x side x colours; `width` channels in the first layer."""

    side: int
    colours: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.side, self.side, self.colours


SIZES: Mapping[str, Size] = {"small": Size(8, 1, 4), "full": Size(32, 3, 12)}


# --------------------------------------------------------------------------------------------- parts
def conv(n_in: int, n_out: int, kernel: int, rngs: nnx.Rngs, stride: int = 1, groups: int = 1) -> nnx.Conv:
    """Padding kernel // 2 as PyTorch's models write it; a bias is harmless before BatchNorm, and needed elsewhere."""
    return nnx.Conv(
        n_in, n_out, (kernel, kernel), stride, padding=kernel // 2, feature_group_count=groups, rngs=rngs
    )


def scales(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
    """Initial scales of BatchNorm away from 1, some of them negative as in trained nets."""
    return 1 + 0.5 * jax.random.normal(key, shape, dtype)


def norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """BatchNorm whose running statistics are those of the last batch: `trained` ends with a pass over many images."""
    return nnx.BatchNorm(
        channels, momentum=0.0, scale_init=scales, bias_init=nnx.initializers.normal(0.2), rngs=rngs
    )


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-3], -1)


def over_pixels(x: jax.Array) -> jax.Array:
    return x.mean(axis=(-3, -2))


def halve(x: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # flax divides by an integer here
        return nnx.avg_pool(x, (2, 2), strides=(2, 2))


class ConvNorm(nnx.Module):
    """Convolution, BatchNorm, activation if there is one."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int,
        rngs: nnx.Rngs,
        activation: Activation | None = None,
        **how: int,
    ) -> None:
        self.conv, self.norm = conv(n_in, n_out, kernel, rngs, **how), norm(n_out, rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(self.conv(x))
        return h if self.activation is None else self.activation(h)


class Network(nnx.Module):
    """Raw pixels (..., side, side, colours) in [0, 1] to logits (..., classes): normalisation, then `logits`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.logits((x - 0.3) / 0.4)

    def logits(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError


GALLERY: dict[str, Callable[[Size, nnx.Rngs], Network]] = {}


def member(name: str, **options: Any) -> Callable[[type], type]:
    """Enter a class `(size, rngs, **options)` into the gallery."""

    def enter(made: type) -> type:
        GALLERY[name] = functools.partial(made, **options)
        return made

    return enter


# -------------------------------------------------------------------------------- plain convolutions
@member("lenet5")
class LeNet5(Network):
    """tanh and average pooling; padded convolutions where images are smaller than the original's 32 x 32."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        padding, side = ("VALID", (size.side - 12) // 4) if size.side >= 32 else ("SAME", size.side // 4)
        self.conv1 = nnx.Conv(size.colours, 6, (5, 5), padding=padding, rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding=padding, rngs=rngs)
        self.dense1 = nnx.Linear(16 * side * side, 120, rngs=rngs)
        self.dense2 = nnx.Linear(120, 84, rngs=rngs)
        self.head = nnx.Linear(84, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = halve(jnp.tanh(self.conv1(x)))
        x = halve(jnp.tanh(self.conv2(x)))
        return self.head(jnp.tanh(self.dense2(jnp.tanh(self.dense1(flat(x))))))


def overlapping_max(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")


@member("cnn_average_pooling", pool=halve)
@member("cnn_max_pooling", pool=overlapping_max)
class PooledCNN(Network):
    """Two times convolution, relu, pooling; then two dense layers."""

    def __init__(self, size: Size, rngs: nnx.Rngs, pool: Activation) -> None:
        w = size.width
        self.conv1, self.conv2 = conv(size.colours, w, 3, rngs), conv(w, 2 * w, 3, rngs)
        self.dense = nnx.Linear((size.side // 4) ** 2 * 2 * w, 8 * w, rngs=rngs)
        self.head = nnx.Linear(8 * w, CLASSES, rngs=rngs)
        self.pool = pool

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.pool(nn.relu(self.conv1(x)))
        x = self.pool(nn.relu(self.conv2(x)))
        return self.head(nn.relu(self.dense(flat(x))))


@member("cnn_strided")
class StridedCNN(Network):
    """Strides in place of pooling, leaky relu."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        w = size.width
        self.convs = nnx.List(
            [conv(a, b, 4, rngs, stride=2) for a, b in ((size.colours, w), (w, 2 * w), (2 * w, 4 * w))]
        )
        self.head = nnx.Linear((size.side // 8 + 1) ** 2 * 4 * w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        for layer in self.convs:
            x = nn.leaky_relu(layer(x), 0.1)
        return self.head(flat(x))


@member("silu_csp")
class SiluCSP(Network):
    """Convolution, BatchNorm, silu throughout; a cross-stage partial block: half of the channels skip a bottleneck."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        w, block = size.width, functools.partial(ConvNorm, rngs=rngs, activation=nn.silu)
        self.stem = block(size.colours, w, 3, stride=2)
        self.first, self.second = block(w, w // 2, 1), block(w, w // 2, 1)
        self.narrow, self.wide = block(w // 2, w // 2, 1), block(w // 2, w // 2, 3)
        self.join, self.last = block(w, w, 1), block(w, 2 * w, 3, stride=2)
        self.head = nnx.Linear(2 * w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        h = self.first(x)
        h = h + self.wide(self.narrow(h))
        x = self.join(jnp.concatenate([h, self.second(x)], axis=-1))
        return self.head(over_pixels(self.last(x)))


# ------------------------------------------------------------------------------------ residual blocks
class PreBlock(nnx.Module):
    """Pre-activation (He et al. 2016, "Identity mappings"): BatchNorm and relu before each convolution."""

    def __init__(self, n_in: int, n_out: int, stride: int, rngs: nnx.Rngs) -> None:
        self.norm1, self.conv1 = norm(n_in, rngs), conv(n_in, n_out, 3, rngs, stride)
        self.norm2, self.conv2 = norm(n_out, rngs), conv(n_out, n_out, 3, rngs)
        self.shortcut = conv(n_in, n_out, 1, rngs, stride) if (n_in, stride) != (n_out, 1) else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return skip + self.conv2(nn.relu(self.norm2(self.conv1(h))))


@member("resnet_preactivation")
class PreActivationResNet(Network):
    """About 120 000 parameters at full size, six convolutions and one on a shortcut."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        w = 40 if size.side == 32 else size.width
        self.stem = conv(size.colours, w, 3, rngs, stride=2)
        self.blocks = nnx.List([PreBlock(w, w, 1, rngs), PreBlock(w, 2 * w, 2, rngs)])
        self.norm, self.head = norm(2 * w, rngs), nnx.Linear(2 * w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(over_pixels(nn.relu(self.norm(x))))


class PostBlock(nnx.Module):
    """Post-activation (He et al. 2016): relu after the sum; with `groups` ResNeXt's bottleneck (Xie et al. 2017)."""

    def __init__(self, n_in: int, n_out: int, stride: int, groups: int, rngs: nnx.Rngs) -> None:
        block = functools.partial(ConvNorm, rngs=rngs)
        if groups:
            path = [
                block(n_in, n_out // 2, 1, activation=nn.relu),
                block(n_out // 2, n_out // 2, 3, activation=nn.relu, stride=stride, groups=groups),
                block(n_out // 2, n_out, 1),
            ]
        else:
            path = [block(n_in, n_out, 3, activation=nn.relu, stride=stride), block(n_out, n_out, 3)]
        self.path = nnx.List(path)
        self.shortcut = block(n_in, n_out, 1, stride=stride) if (n_in, stride) != (n_out, 1) else None

    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for layer in self.path:
            h = layer(h)
        return nn.relu(h + (x if self.shortcut is None else self.shortcut(x)))


@member("resnet_postactivation", groups=0)
@member("resnext", groups=2)
class PostActivationResNet(Network):
    def __init__(self, size: Size, rngs: nnx.Rngs, groups: int) -> None:
        w = size.width
        self.stem = ConvNorm(size.colours, w, 3, rngs, nn.relu)
        self.blocks = nnx.List([PostBlock(w, w, 1, groups, rngs), PostBlock(w, 2 * w, 2, groups, rngs)])
        self.head = nnx.Linear(2 * w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(over_pixels(x))


class InvertedResidual(nnx.Module):
    """1 x 1 convolution to four times the channels, depthwise 3 x 3, 1 x 1 back (Sandler et al. 2018)."""

    def __init__(self, n_in: int, n_out: int, stride: int, activation: Activation, rngs: nnx.Rngs) -> None:
        wide = 4 * n_in
        self.expand = ConvNorm(n_in, wide, 1, rngs, activation)
        self.depthwise = ConvNorm(wide, wide, 3, rngs, activation, stride=stride, groups=wide)
        self.project = ConvNorm(wide, n_out, 1, rngs)
        self.residual = (n_in, stride) == (n_out, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.project(self.depthwise(self.expand(x)))
        return x + h if self.residual else h


@member("mobilenet_relu6", activation=nn.relu6)
@member("mobilenet_hard_swish", activation=nn.hard_swish)
class MobileNet(Network):
    """Depthwise separable convolutions; MobileNetV2's activation, or V3's."""

    def __init__(self, size: Size, rngs: nnx.Rngs, activation: Activation) -> None:
        w = size.width // 2
        self.stem = ConvNorm(size.colours, w, 3, rngs, activation, stride=2)
        self.blocks = nnx.List(
            [InvertedResidual(w, w, 1, activation, rngs), InvertedResidual(w, 2 * w, 2, activation, rngs)]
        )
        self.last = ConvNorm(2 * w, 4 * w, 1, rngs, activation)
        self.head = nnx.Linear(4 * w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(over_pixels(self.last(x)))


class ConvNextBlock(nnx.Module):
    """x + 1x1(gelu(1x1(BatchNorm(depthwise(x))))): ConvNeXt (Liu et al. 2022), BatchNorm for its LayerNorm."""

    def __init__(self, channels: int, rngs: nnx.Rngs) -> None:
        self.depthwise = ConvNorm(channels, channels, 5, rngs, groups=channels)
        self.up, self.down = conv(channels, 4 * channels, 1, rngs), conv(4 * channels, channels, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nn.gelu(self.up(self.depthwise(x))))


@member("gelu_convnext")
class GeluConvNext(Network):
    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        w = size.width
        self.stem = nnx.Conv(size.colours, w, (2, 2), 2, padding="VALID", rngs=rngs)
        self.blocks = nnx.List([ConvNextBlock(w, rngs) for _ in range(2)])
        self.head = nnx.Linear(w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(over_pixels(x))


# ------------------------------------------------------------------------------------- concatenation
class DenseLayer(nnx.Module):
    """Its input, and `growth` new channels."""

    def __init__(self, channels: int, growth: int, rngs: nnx.Rngs) -> None:
        self.norm, self.conv = norm(channels, rngs), conv(channels, growth, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, self.conv(nn.relu(self.norm(x)))], axis=-1)


@member("densenet")
class DenseNet(Network):
    """Two dense blocks of two layers (Huang et al. 2017), a transition of 1 x 1 convolution and pooling between."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        w, growth = size.width, size.width // 2
        self.stem = conv(size.colours, w, 3, rngs, stride=2)
        self.block1 = nnx.List([DenseLayer(w + i * growth, growth, rngs) for i in range(2)])
        self.norm1, self.transition = norm(2 * w, rngs), conv(2 * w, w, 1, rngs)
        self.block2 = nnx.List([DenseLayer(w + i * growth, growth, rngs) for i in range(2)])
        self.norm2, self.head = norm(2 * w, rngs), nnx.Linear(2 * w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for layer in self.block1:
            x = layer(x)
        x = halve(self.transition(nn.relu(self.norm1(x))))
        for layer in self.block2:
            x = layer(x)
        return self.head(over_pixels(nn.relu(self.norm2(x))))


@member("squeezenet")
class SqueezeNet(Network):
    """Two fire modules (Iandola et al. 2016): 1 x 1 to few channels, then 1 x 1 and 3 x 3 side by side."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        w = size.width
        self.stem = conv(size.colours, w, 3, rngs, stride=2)
        self.squeeze = nnx.List([conv(n, w // 2, 1, rngs) for n in (w, 2 * w)])
        self.narrow = nnx.List([conv(w // 2, w, 1, rngs) for _ in range(2)])
        self.wide = nnx.List([conv(w // 2, w, 3, rngs) for _ in range(2)])
        self.head = conv(2 * w, CLASSES, 1, rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.stem(x))
        for squeeze, narrow, wide in zip(self.squeeze, self.narrow, self.wide, strict=True):
            h = nn.relu(squeeze(x))
            x = nn.relu(jnp.concatenate([narrow(h), wide(h)], axis=-1))
        return over_pixels(self.head(x))


# ------------------------------------------------------------------------------ transposed convolution
def doubled(n_in: int, n_out: int, rngs: nnx.Rngs) -> nnx.ConvTranspose:
    return nnx.ConvTranspose(n_in, n_out, (4, 4), strides=(2, 2), padding="SAME", rngs=rngs)


@member("decoder")
class Decoder(Network):
    """A dense code, decoded to an image by transposed convolutions as in DCGAN's generator; a dense head on that."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        self.start, w = size.side // 4, size.width
        self.code = nnx.Linear(int(np.prod(size.shape)), 2 * w, rngs=rngs)
        self.project = nnx.Linear(2 * w, self.start**2 * 2 * w, rngs=rngs)
        self.up1, self.up2 = doubled(2 * w, w, rngs), doubled(w, size.colours, rngs)
        self.norm = norm(w, rngs)
        self.head = nnx.Linear(int(np.prod(size.shape)), CLASSES, rngs=rngs)

    def image(self, x: jax.Array) -> jax.Array:
        h = nn.relu(self.project(jnp.tanh(self.code(flat(x)))))
        h = h.reshape(*h.shape[:-1], self.start, self.start, -1)
        return jnp.tanh(self.up2(nn.relu(self.norm(self.up1(h)))))

    def logits(self, x: jax.Array) -> jax.Array:
        return self.head(flat(self.image(x)))


@member("u_net")
class UNet(Network):
    """One scale down and up again with a skip (Ronneberger et al. 2015); `maps` has logits for every pixel."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        w = size.width // 2
        self.down = ConvNorm(size.colours, w, 3, rngs, nn.relu)
        self.bottom1 = ConvNorm(w, 2 * w, 3, rngs, nn.relu, stride=2)
        self.bottom2 = ConvNorm(2 * w, 2 * w, 3, rngs, nn.relu)
        self.up = doubled(2 * w, w, rngs)
        self.join = ConvNorm(2 * w, w, 3, rngs, nn.relu)
        self.head = conv(w, CLASSES, 1, rngs)

    def maps(self, x: jax.Array) -> jax.Array:
        """(..., side, side, classes) of normalised images."""
        skip = self.down(x)
        up = self.up(self.bottom2(self.bottom1(skip)))
        return self.head(self.join(jnp.concatenate([skip, up], axis=-1)))

    def logits(self, x: jax.Array) -> jax.Array:
        return over_pixels(self.maps(x))


# -------------------------------------------------------------------------------------------- mixing
class MixerBlock(nnx.Module):
    def __init__(self, tokens: int, channels: int, rngs: nnx.Rngs) -> None:
        self.tokens1, self.tokens2 = (
            nnx.Linear(tokens, tokens, rngs=rngs),
            nnx.Linear(tokens, tokens, rngs=rngs),
        )
        self.mix1 = nnx.Linear(channels, 2 * channels, rngs=rngs)
        self.mix2 = nnx.Linear(2 * channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.tokens2(nn.gelu(self.tokens1(x.swapaxes(-1, -2)))).swapaxes(-1, -2)
        x = x + h
        return x + self.mix2(nn.gelu(self.mix1(x)))


@member("mlp_mixer")
class MLPMixer(Network):
    """Tolstikhin et al. 2021, without its LayerNorm, which has no Lipschitz constant that is of use."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        patch, w = max(size.side // 8, 2), 2 * size.width
        self.stem = nnx.Conv(size.colours, w, (patch, patch), patch, padding="VALID", rngs=rngs)
        self.blocks = nnx.List([MixerBlock((size.side // patch) ** 2, w, rngs) for _ in range(2)])
        self.head = nnx.Linear(w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=-2))


@member("squeeze_excitation")
class SqueezeExcitation(Network):
    """Channels gated by a function of their own means (Hu et al. 2018): a product of two parts of x, to be refused."""

    def __init__(self, size: Size, rngs: nnx.Rngs) -> None:
        w = size.width
        self.stem = ConvNorm(size.colours, w, 3, rngs, nn.relu, stride=2)
        self.gate, self.head = nnx.Linear(w, w, rngs=rngs), nnx.Linear(w, CLASSES, rngs=rngs)

    def logits(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        gate = nn.sigmoid(self.gate(over_pixels(x)))
        return self.head(over_pixels(x * gate[..., None, None, :]))
