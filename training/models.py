"""Network architectures by name.

Every model maps one image `(height, width, channels)` in raw pixel units, or a batch of them, to logits
`(..., classes)`. Normalisation `(x - mean) / std` is part of the model, so that a radius computed for it is
in pixel units. A `ModelSpec` is plain data: with it and the weights a model can be rebuilt anywhere.

The layer tables of 2C2F, 4C3F (MNIST), 6C2F (CIFAR-10) and 8C2F (Tiny-ImageNet) are those used by Fazlyab et al.,
NeurIPS 2023 (arXiv 2310.00116), as in the authors' released code; convolutions are written (channels, kernel, stride,
padding).
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lipbounds._text import usual_programs
from lipbounds.training import batch_norm_nets, lipnext, lipschitz_nets, liresnet
from lipbounds.training.activations import ClippedRelu
from lipbounds.training.activations import maxmin as maxmin
from lipbounds.training.batch_norm_nets import BatchNormNet
from lipbounds.training.layers import as_input
from lipbounds.training.lipnext import LipNeXt
from lipbounds.training.lipschitz_nets import LipConvNet, OrthogonalConvNet, ResidualLipschitzNet
from lipbounds.training.liresnet import LiResNet

Activation = Callable[[jax.Array], jax.Array]


#: Functions, and classes of activations with parameters, of which every layer has one.
ACTIVATIONS: Mapping[str, Activation | type[nnx.Module]] = {
    "relu": jax.nn.relu,
    "maxmin": maxmin,
    "clipped-relu": ClippedRelu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model without its weights: `architecture` is a key of `ARCHITECTURES`, `arguments` its keywords."""

    architecture: str
    input_shape: tuple[int, int, int]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _activations(name: str, count: int) -> Any:
    """The activations of so many layers."""
    try:
        found = ACTIVATIONS[name]
    except KeyError:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}") from None
    return nnx.List([found() for _ in range(count)]) if isinstance(found, type) else (found,) * count


def _flatten_image(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-3], -1)


def _halve(x: jax.Array) -> jax.Array:
    """Average over 2x2 windows of (..., height, width, channels), both sizes even."""
    height, width, channels = x.shape[-3:]
    return x.reshape(*x.shape[:-3], height // 2, 2, width // 2, 2, channels).mean(axis=(-4, -2))


# Products in the type of the images; the last map, which promotes them, in that of the weights: margins are differences
# of its outputs.
_conv = partial(nnx.Conv, promote_dtype=as_input)


def _linears(sizes: Sequence[int], rngs: nnx.Rngs) -> nnx.List:
    """Dense layers from one size to the next."""
    pairs = list(itertools.pairwise(sizes))
    hidden = [nnx.Linear(a, b, promote_dtype=as_input, rngs=rngs) for a, b in pairs[:-1]]
    return nnx.List([*hidden, nnx.Linear(*pairs[-1], rngs=rngs)])


class MLP(nnx.Module):
    """Dense layers of the given widths: `"64-32-10"` has 64 inputs, one hidden layer of 32 and 10 classes."""

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        widths: str,
        activation: str = "relu",
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        sizes = _parse_widths(widths)
        if sizes[0] != math.prod(input_shape):
            raise ValueError(
                f"widths {widths!r} start with {sizes[0]}, but an input has {math.prod(input_shape)} pixels"
            )
        self.mean, self.std = mean, std
        self.activations = _activations(activation, len(sizes) - 2)
        self.layers = _linears(sizes, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (B, K) of raw pixels (B, height, width, channels)."""
        h = _flatten_image((x - self.mean) / self.std)
        for layer, activation in zip(self.layers[:-1], self.activations, strict=True):
            h = activation(layer(h))
        return self.layers[-1](h)


def _parse_widths(widths: str) -> list[int]:
    try:
        sizes = [int(part) for part in widths.split("-")]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f'widths must be at least two positive numbers such as "64-32-10", got {widths!r}')
    return sizes


class ResidualBlock(nnx.Module):
    """`x + conv(act(conv(act(x))))`, channels and size kept (pre-activation, He et al. 2016)."""

    def __init__(self, channels: int, activation: str, *, rngs: nnx.Rngs):
        self.first = _conv(channels, channels, (3, 3), padding=1, rngs=rngs)
        self.second = _conv(channels, channels, (3, 3), padding=1, rngs=rngs)
        self.activations = _activations(activation, 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The block on x (B, height, width, channels): its convolutions added to x."""
        before, between = self.activations
        return x + self.second(between(self.first(before(x))))


class ResidualCNN(nnx.Module):
    """Convolution with stride 2, residual blocks, activation, average over 2x2 windows, dense."""

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        channels: int = 12,
        blocks: int = 2,
        classes: int = 10,
        activation: str = "relu",
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        height, width, colours = input_shape
        if height % 4 or width % 4:
            raise ValueError(f"height and width must be multiples of 4, got {height} x {width}")
        self.mean, self.std = mean, std
        self.stem = _conv(colours, channels, (3, 3), strides=2, padding=1, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(channels, activation, rngs=rngs) for _ in range(blocks)])
        self.activations = _activations(activation, 1)
        self.head = nnx.Linear((height // 4) * (width // 4) * channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (B, K) of raw pixels (B, height, width, channels)."""
        h = self.stem((x - self.mean) / self.std)
        for block in self.blocks:
            h = block(h)
        return self.head(_flatten_image(_halve(self.activations[0](h))))


class ConvNet(nnx.Module):
    """Convolutions `(channels, kernel, stride, padding)`, then dense layers."""

    def __init__(
        self,
        input_shape: Sequence[int],
        *,
        convolutions: Sequence[Sequence[int]],
        dense: Sequence[int],
        classes: int = 10,
        activation: str = "relu",
        mean: float = 0.0,
        std: float = 1.0,
        rngs: nnx.Rngs,
    ):
        height, width, channels = input_shape
        convs = []
        for n_out, kernel, stride, padding in convolutions:
            height, width = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
            if min(height, width) < 1:
                raise ValueError(f"inputs of shape {tuple(input_shape)} are too small for these layers")
            convs.append(_conv(channels, n_out, (kernel, kernel), strides=stride, padding=padding, rngs=rngs))
            channels = n_out
        sizes = (height * width * channels, *dense, classes)
        self.mean, self.std = mean, std
        self.activations = _activations(activation, len(convs) + len(dense))
        self.convs = nnx.List(convs)
        self.dense = _linears(sizes, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (B, K) of raw pixels (B, height, width, channels)."""
        h = (x - self.mean) / self.std
        count = len(self.convs)
        for conv, activation in zip(self.convs, self.activations[:count], strict=True):
            h = activation(conv(h))
        h = _flatten_image(h)
        for layer, activation in zip(self.dense[:-1], self.activations[count:], strict=True):
            h = activation(layer(h))
        return self.dense[-1](h)


def _convnet(convolutions: Sequence[Sequence[int]], dense: Sequence[int]) -> tuple[Any, Mapping[str, Any]]:
    return ConvNet, {"convolutions": convolutions, "dense": dense}


_4C = [(32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)]
_8C = [(64, 3, 1, 1), (64, 3, 1, 0), (64, 4, 2, 0), (128, 3, 1, 1), (128, 3, 1, 1), (128, 4, 2, 0)]

#: Name -> (class, the arguments that the name fixes).
ARCHITECTURES: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "mlp": (MLP, {}),
    "residual_cnn": (ResidualCNN, {}),
    "2C2F": _convnet([(16, 4, 2, 1), (32, 4, 2, 1)], [100]),
    "4C3F": _convnet(_4C, [512, 512]),
    "6C2F": _convnet([*_4C, (64, 3, 1, 1), (64, 4, 2, 1)], [512]),
    "8C2F": _convnet([*_8C, (256, 3, 1, 1), (256, 4, 2, 0)], [256]),
    "liresnet": (LiResNet, {}),
    "lipnext": (LipNeXt, {}),
    "lipconvnet": (LipConvNet, {}),
    "orthogonal_4C3F": (OrthogonalConvNet, {"convolutions": [c[::2] for c in _4C], "dense": [512, 512]}),
    "residual_lipschitz": (ResidualLipschitzNet, {}),
    "batch_norm": (BatchNormNet, {}),
}

#: Architectures that are named with their sizes, and how.
NAMED = (
    "liresnet-L6W64, lipnext-L2-4W32, lipnext-L2-4W32F256-symmetric, lipconvnet-10, 4C3F-cholesky, sll-mlp-L4W256, "
    "sll-cnn-L4W32, aol-mlp-L4W256, aol-cnn-L4W32, resnet18, resnet50-w0.5, wrn-28-4, densenet-bc-40-12"
)
_WITH_SIZES = (
    "mlp",
    "liresnet",
    "lipnext",
    "lipconvnet",
    "orthogonal_4C3F",
    "residual_lipschitz",
    "batch_norm",
)
#: Architectures that a word alone names.
SIMPLE = tuple(name for name in ARCHITECTURES if name not in _WITH_SIZES)


def prescribed(arch: str) -> tuple[str, dict[str, Any]] | None:
    """(architecture, arguments) of a name with sizes, whose activations its layers prescribe; None for other names.

    ValueError for a name that begins like one of `NAMED`, and is none.
    """
    found = lipschitz_nets.parse(arch)
    for name, part in (("liresnet", liresnet), ("lipnext", lipnext), ("batch_norm", batch_norm_nets)):
        if (sizes := part.parse(arch)) is not None:
            found = name, sizes
    return found


def spec_for(
    arch: str,
    input_shape: Sequence[int],
    classes: int,
    *,
    activation: str = "relu",
    mean: float = 0.0,
    std: float = 1.0,
) -> ModelSpec:
    """The spec of an architecture named as on the command line.

    The name is widths such as "784-512-10", one of `SIMPLE`, or one with sizes such as those in `NAMED`, for which
    `activation` has no effect. ValueError where it is unknown or does not fit images of this shape or this number of
    classes.
    """
    height, width, channels = (int(n) for n in input_shape)
    common = {"activation": activation, "mean": mean, "std": std}
    found = prescribed(arch)
    if found is not None:  # these have MaxMin, ReLU or what their layers prescribe
        arguments = {**found[1], "classes": classes, "mean": mean, "std": std}
        return ModelSpec(found[0], (height, width, channels), arguments)
    if "-" not in arch:
        if arch not in SIMPLE:
            known = ", ".join((*SIMPLE, NAMED))
            raise ValueError(
                f'unknown architecture {arch!r}: give widths such as "784-512-10", or one of {known}'
            )
        return ModelSpec(arch, (height, width, channels), {"classes": classes, **common})
    sizes = _parse_widths(arch)
    pixels = height * width * channels
    if sizes[0] != pixels or sizes[-1] != classes:
        raise ValueError(
            f"{arch} does not fit: an image has {height} x {width} x {channels} = {pixels} pixels and there are "
            f"{classes} classes, so widths start with {pixels} and end with {classes}"
        )
    return ModelSpec("mlp", (height, width, channels), {"widths": arch, **common})


@usual_programs()
def build(spec: ModelSpec, seed: int = 0) -> nnx.Module:
    """A model with fresh weights, which JAX's settings do not change.

    Raises ValueError for an unknown architecture or unsuitable arguments.
    """
    try:
        make, fixed = ARCHITECTURES[spec.architecture]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"unknown architecture {spec.architecture!r}; known: {known}") from None
    # of __init__, as flax gives its classes the signature (*args, **kwargs)
    allowed = set(inspect.signature(make.__init__).parameters) - {"input_shape", "rngs", "self", *fixed}
    unknown = set(spec.arguments) - allowed
    if unknown:
        raise ValueError(
            f"{spec.architecture} has no argument {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(allowed))}"
        )
    if len(spec.input_shape) != 3 or not all(isinstance(n, int) and n > 0 for n in spec.input_shape):
        raise ValueError(f"an input shape is (height, width, channels), got {spec.input_shape!r}")
    try:
        return make(tuple(spec.input_shape), **fixed, **spec.arguments, rngs=nnx.Rngs(seed))
    except TypeError as error:  # a missing or wrongly typed argument
        raise ValueError(
            f"{spec.architecture} cannot be built with {dict(spec.arguments)}: {error}"
        ) from error
