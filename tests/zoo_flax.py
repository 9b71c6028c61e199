"""The nets of the zoo that are flax modules (nnx, and linen through ``apply``), and convolutions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import lax, nn
from zoo_core import Fn, gauss, net, point

Made = tuple[Fn, jax.Array]
Rng = np.random.Generator


def rngs(rng: Rng) -> nnx.Rngs:
    return nnx.Rngs(int(rng.integers(2**31)))


def trained_statistics(rng: Rng, norm: nnx.BatchNorm) -> nnx.BatchNorm:
    """Give a fresh BatchNorm the running statistics, scales and shifts of a trained one."""
    n = norm.num_features

    def draw(low: float, high: float) -> jax.Array:
        return jnp.asarray(rng.uniform(low, high, size=n), jnp.float32)

    # mypy: flax declares these attributes as optional
    values: dict[str, Any] = {
        "mean": draw(-0.5, 0.5),
        "var": draw(0.4, 1.5),
        "scale": draw(0.6, 1.3),
        "bias": draw(-0.3, 0.3),
    }
    for key, value in values.items():
        getattr(norm, key)[...] = value
    return norm


def batch_norm(rng: Rng, features: int) -> nnx.BatchNorm:
    return trained_statistics(rng, nnx.BatchNorm(features, rngs=rngs(rng)))


class ConvBatchNorm(nnx.Module):
    """Two convolutions with BatchNorm and relu, dropout (off in evaluation), a dense head."""

    def __init__(self, rng: Rng) -> None:
        self.conv1 = nnx.Conv(1, 2, (3, 3), rngs=rngs(rng))
        self.norm1 = batch_norm(rng, 2)
        self.conv2 = nnx.Conv(2, 3, (3, 3), strides=(2, 2), rngs=rngs(rng))
        self.norm2 = batch_norm(rng, 3)
        self.dropout = nnx.Dropout(0.5, rngs=rngs(rng))
        self.head = nnx.Linear(27, 4, rngs=rngs(rng))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(self.norm1(self.conv1(x)))
        x = nn.relu(self.norm2(self.conv2(x)))
        return self.head(self.dropout(x.reshape(*x.shape[:-3], -1)))


@net(77, 2, "flax")
def cnn_batch_norm(rng: Rng) -> Made:
    model = ConvBatchNorm(rng)
    model.eval()
    return model, point(rng, 5, 5, 1)


@net(77, 2, "flax", "batched")
def cnn_batched(rng: Rng) -> Made:
    model = ConvBatchNorm(rng)
    model.eval()
    return model, point(rng, 3, 5, 5, 1)


class PreBlock(nnx.Module):
    """h + conv(relu(norm(conv(relu(norm(h)))))): the pre-activation residual block."""

    def __init__(self, rng: Rng, channels: int) -> None:
        self.norm1, self.norm2 = batch_norm(rng, channels), batch_norm(rng, channels)
        self.conv1 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs(rng))
        self.conv2 = nnx.Conv(channels, channels, (3, 3), rngs=rngs(rng))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(nn.relu(self.norm1(x)))
        return x + self.conv2(nn.relu(self.norm2(h)))


class PreActivationResNet(nnx.Module):
    def __init__(self, rng: Rng) -> None:
        self.stem = nnx.Conv(1, 2, (3, 3), rngs=rngs(rng))
        self.blocks = nnx.List([PreBlock(rng, 2)])
        self.head = nnx.Linear(2, 3, rngs=rngs(rng))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nn.relu(x).mean(axis=(-3, -2)))


@net(96, 3, "flax")
def preactivation_resnet(rng: Rng) -> Made:
    model = PreActivationResNet(rng)
    model.eval()
    return model, point(rng, 4, 4, 1)


class PostActivationResNet(nnx.Module):
    """relu after the sum, a strided projection on the shortcut, average pooling at the end."""

    def __init__(self, rng: Rng) -> None:
        self.conv1 = nnx.Conv(1, 3, (3, 3), strides=2, padding="SAME", rngs=rngs(rng))
        self.conv2 = nnx.Conv(3, 3, (3, 3), padding="SAME", rngs=rngs(rng))
        self.norm = batch_norm(rng, 3)
        self.shortcut = nnx.Conv(1, 3, (1, 1), strides=2, rngs=rngs(rng))
        self.head = nnx.Linear(12, 3, rngs=rngs(rng))

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(self.conv2(nn.relu(self.conv1(x))))
        h = nn.relu(self.shortcut(x) + h)
        with jax.numpy_dtype_promotion("standard"):  # flax divides by an integer here
            h = nnx.avg_pool(h, (2, 2), strides=(1, 1))
        return self.head(h.reshape(-1))


@net(54, 2, "flax")
def postactivation_resnet(rng: Rng) -> Made:
    model = PostActivationResNet(rng)
    model.eval()
    return model, point(rng, 5, 5, 1)


@net(40, 2, "flax", "group")
def max_pool_images(rng: Rng) -> Made:
    """Non-overlapping 2 x 2 max-pooling by nnx on images."""
    conv = nnx.Conv(1, 2, (3, 3), padding="VALID", rngs=rngs(rng))
    head = nnx.Linear(8, 3, rngs=rngs(rng))
    return (lambda x: head(nnx.max_pool(jnp.tanh(conv(x)), (2, 2), strides=(2, 2)).reshape(-1))), point(
        rng, 6, 6, 1
    )


@net(12, 1, "flax")
def batch_norm_after_relu(rng: Rng) -> Made:
    """Per-neuron BatchNorm between the activation and the next layer, negative scales included."""
    first, last = nnx.Linear(12, 12, rngs=rngs(rng)), nnx.Linear(12, 3, rngs=rngs(rng))
    norm = batch_norm(rng, 12)
    assert norm.scale is not None
    norm.scale[...] = jnp.asarray(rng.normal(size=12), jnp.float32)
    norm.eval()
    return (lambda x: last(norm(nn.relu(first(x))))), point(rng, 12)


class Residual(nnx.Module):
    def __init__(self, width: int, keys: nnx.Rngs) -> None:
        self.inner = nnx.Linear(width, 6, rngs=keys)
        self.outer = nnx.Linear(6, width, rngs=keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.outer(nn.relu(self.inner(x)))


class Scanned(nnx.Module):
    """Three residual blocks with stacked parameters, run by nnx.scan."""

    def __init__(self, rng: Rng) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(keys: nnx.Rngs) -> Residual:
            return Residual(5, keys)

        self.blocks = stack(rngs(rng))
        self.head = nnx.Linear(5, 3, rngs=rngs(rng))

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(h: jax.Array, block: Residual) -> jax.Array:
            return block(h)

        return self.head(run(x, self.blocks))


@net(18, 3, "flax")
def nnx_scan(rng: Rng) -> Made:
    return Scanned(rng), point(rng, 5)


class Wrapped(nnx.Module):
    """One block under nnx.remat, one under nnx.jit, the same parameters used by both."""

    def __init__(self, rng: Rng) -> None:
        self.block = Residual(5, rngs(rng))
        self.head = nnx.Linear(5, 3, rngs=rngs(rng))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.remat(lambda block, h: block(h))(self.block, x)
        return self.head(nnx.jit(lambda block, h: jnp.tanh(block(h)))(self.block, x))


@net(17, 3, "flax")
def nnx_remat_jit(rng: Rng) -> Made:
    return Wrapped(rng), point(rng, 5)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Conv(2, (3,), padding="CIRCULAR")(x)
        with jax.numpy_dtype_promotion("standard"):  # flax divides by an integer here
            x = linen.avg_pool(linen.elu(x), (2,), strides=(2,))
        x = linen.BatchNorm(use_running_average=True)(x).reshape(-1)
        return linen.Dense(3)(linen.PReLU()(linen.Dense(8)(x)))


@net(24, 2, "flax")
def linen_apply(rng: Rng) -> Made:
    model, x = LinenNet(), point(rng, 8, 1)
    variables = model.init(jax.random.key(int(rng.integers(2**31))), x)
    return (lambda x: model.apply(variables, x)), x  # type: ignore[return-value,unused-ignore]


# ----------------------------------------------------------------------------- kinds of convolution
@net(32, 1, "flax")
def transposed_convolution(rng: Rng) -> Made:
    up = nnx.ConvTranspose(1, 2, (3, 3), strides=(2, 2), padding="SAME", rngs=rngs(rng))
    head = nnx.Linear(32, 3, rngs=rngs(rng))
    return (lambda x: head(nn.leaky_relu(up(x[:, ::-1])).reshape(-1))), point(rng, 2, 2, 1)


@net(36, 1)
def grouped_convolution(rng: Rng) -> Made:
    """Two groups in NCHW layout, asymmetric padding."""
    kernel, w = gauss(rng, 4, 1, 2, 2, fan_in=4), gauss(rng, 3, 36)

    def fn(x: jax.Array) -> jax.Array:
        h = lax.conv_general_dilated(x[None], kernel, (1, 1), ((0, 1), (1, 0)), feature_group_count=2)
        return w @ nn.relu(h - 0.1).reshape(-1)

    return fn, point(rng, 2, 3, 3)


@net(39, 2, "flax")
def depthwise_separable(rng: Rng) -> Made:
    depthwise = nnx.Conv(3, 3, (3, 3), feature_group_count=3, use_bias=False, rngs=rngs(rng))
    pointwise = nnx.Conv(3, 2, (1, 1), rngs=rngs(rng))
    head = nnx.Linear(12, 3, rngs=rngs(rng))

    def fn(x: jax.Array) -> jax.Array:
        h = pointwise(nn.relu6(depthwise(x)))[:, :2]
        return head(nn.silu(h.reshape(-1)))

    return fn, point(rng, 3, 3, 3)


@net(24, 2)
def dilated_convolution(rng: Rng) -> Made:
    """Dilation of the kernel (causal, as in WaveNet), two layers."""
    dims = ("NWC", "WIO", "NWC")
    k1, k2, w = gauss(rng, 2, 1, 2, fan_in=2), gauss(rng, 2, 2, 1, fan_in=4), gauss(rng, 3, 8)

    def fn(x: jax.Array) -> jax.Array:
        h = x[None, :, None]
        h = jnp.tanh(
            lax.conv_general_dilated(h, k1, (1,), [(1, 0)], rhs_dilation=(1,), dimension_numbers=dims)
        )
        h = jnp.tanh(
            lax.conv_general_dilated(h, k2, (1,), [(2, 0)], rhs_dilation=(2,), dimension_numbers=dims)
        )
        return w @ h.reshape(-1)

    return fn, point(rng, 8)
