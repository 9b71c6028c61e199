"""Layers with Lipschitz constants known by construction, for l2: dense maps, convolutions, blocks, activations.

    layer = Dense(64, 64, kind="reflection", rngs=rngs)              # orthogonal
    layer = Convolution(16, 32, image=(32, 32), kind="aol", stride=2, rngs=rngs)

Nothing believes these constants: a network of these layers is traced like any other, and its bound is proved.
`constant` is what the construction promises in real arithmetic, `export()` the weights without the construction.

| kind | map | constant | source |
|---|---|---|---|
| spectral | W / sigma, sigma by a kept power iteration | 1 as it converges | Miyato et al., ICLR 2018 |
| aol | W diag(d), d_j = (sum_i |W'W|_ij)^(-1/2) | 1 | Prach and Lampert, ECCV 2022 |
| cayley | (I + S)^-1 (I - S), S = A - A' | 1, orthogonal | Trockman and Kolter, ICLR 2021 |
| exponential | exp(A - A') (SOC), a series | 1 (+ 1 / terms!), orthogonal | Singla and Feizi, ICML 2021 |
| reflection | I - 2 V (V'V)^-1 V' (BRO) | 1, orthogonal | Lai et al., ICML 2025 |
| cholesky | W L^-*, L L* = W* W + d I, d tiny: orthonormal columns (or rows) | 1, orthogonal | Hu et al., ICLR 2024 |
| stiefel | W, orthonormal at first and kept so by `fit` (dense only) | 1, orthogonal | Hu et al., ICLR 2026 |
| residual | x + scale W x, one linear map (LiResNet) | none | Hu et al., NeurIPS 2023 |
| unit | columns of length 1, for the last layer | none; 1 per output | Singla and Feizi, ICLR 2022 |
| plain | W, orthogonal at first | none | |

A convolution with stride s reads the s x s pixels of each window as channels first (`downsample`), which keeps every
norm. Between different numbers of channels an orthogonal one is a part of a larger one, of constant 1.

The compute type follows the input: parameters and what is constructed from them are float32, and are cast to the type
of x. Blocks are in `blocks.py`, activations in `activations.py` of this folder, networks in `liresnet.py`,
`lipnext.py` and `lipschitz_nets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lipbounds._text import whole
from lipbounds.training import orthogonal
from lipbounds.training.manifold import Orthonormal

KINDS = (
    "spectral",
    "aol",
    "cayley",
    "exponential",
    "reflection",
    "cholesky",
    "stiefel",
    "residual",
    "unit",
    "plain",
)
ORTHOGONAL = ("cayley", "exponential", "reflection", "cholesky")
_CONSTRUCTED = {
    "cayley": orthogonal.cayley,
    "reflection": orthogonal.reflection,
    "cholesky": orthogonal.orthonormal,
}
_TINY = 1e-12


class Kept(nnx.Variable):  # type: ignore[type-arg]
    """A vector of a power iteration: state that is not trained but moves on with `iterate`."""


class Plain(NamedTuple):
    """Weights without their construction: y = x @ kernel + bias, or a convolution of the images x.

    kernel (n_in, n_out), or (k1, k2, cin, cout) with y(p) = sum_a x(p + a - k // 2) kernel(a) and `padding` "zero" or
    "circular" around an image that was read by `downsample(x, stride)` first.
    """

    kernel: jax.Array
    bias: jax.Array | None
    padding: str | None = None
    stride: int = 1

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer on x (B, n_in) or (B, height, width, channels)."""
        if self.padding is None:
            y = x @ self.kernel
        else:
            y = convolve(downsample(x, self.stride), self.kernel, self.padding)
        return y if self.bias is None else y + self.bias


class Centre(nnx.BatchNorm):
    """x - mean + b, the mean of each channel over a batch and, in evaluation mode, over batches; b is trained.

    BatchNorm without its division (Ioffe and Szegedy, ICML 2015), so that no constant changes. It is made in evaluation
    mode; `fit` trains by the means of the batches, taken in float32.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        super().__init__(channels, momentum=0.9, use_running_average=True, use_scale=False, rngs=rngs)

    def __call__(self, x: jax.Array, *args: Any, **options: Any) -> jax.Array:
        """x (..., channels), centred."""
        assert self.bias is not None  # the base class is told to make one
        mean = self.mean.get_value()
        if not self.use_running_average:
            batch = jnp.mean(x.astype(jnp.float32), axis=tuple(range(x.ndim - 1)))
            kept = self.momentum * mean + (1 - self.momentum) * batch
            self.mean.set_value(jax.lax.stop_gradient(kept))
            mean = batch
        return x + (self.bias.get_value() - mean).astype(x.dtype)


def as_input(values: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Input and weights in the type of the input, for layers of flax."""
    return tuple(None if v is None else jnp.asarray(v, values[0].dtype) for v in values)


def downsample(x: jax.Array, stride: int) -> jax.Array:
    """Windows of stride x stride pixels as channels: (..., h, w, c) to (..., h/s, w/s, s s c); a permutation."""
    if stride == 1:
        return x
    *batch, height, width, channels = x.shape
    if height % stride or width % stride:
        raise ValueError(f"height and width must be multiples of the stride {stride}, got {height} x {width}")
    x = x.reshape(*batch, height // stride, stride, width // stride, stride, channels)
    x = jnp.moveaxis(x, -4, -3)  # (..., h/s, w/s, s, s, c)
    return x.reshape(*batch, height // stride, width // stride, stride * stride * channels)


def convolve(x: jax.Array, kernel: jax.Array, padding: str = "zero") -> jax.Array:
    """y(p) = sum_a x(p + a - k // 2) kernel(a) on images x (B, height, width, cin); `padding` "zero" or "circular"."""
    sides = [(k // 2, k - 1 - k // 2) for k in kernel.shape[:2]]
    if padding == "circular":
        x = jnp.pad(x, [(0, 0), *sides, (0, 0)], mode="wrap")
        sides = [(0, 0), (0, 0)]
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), sides, dimension_numbers=numbers)


def transposed(kernel: jax.Array) -> jax.Array:
    """The kernel whose zero-padded convolution is the transpose of that of `kernel` (odd sizes)."""
    return jnp.swapaxes(kernel[::-1, ::-1], 2, 3)


def unit(v: jax.Array, axis: int | None = None) -> jax.Array:
    """v over its length, along an axis or as a whole; the zero vector stays."""
    return v / jnp.sqrt(jnp.maximum(jnp.sum(v * v, axis=axis, keepdims=axis is not None), _TINY**2))


def rescaled(kernel: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """d_j = (sum over inputs i and shifts of |W'W|_ij q_i / q_j)^(-1/2), (cin,): ||W diag(d)|| <= 1.

    kernel (n_in, n_out), or (k, k, cin, cout) of a convolution with zero or circular padding; q = 1 gives AOL.
    """
    if kernel.ndim == 2:
        sums = jnp.abs(kernel @ kernel.T)
    else:
        k = kernel.shape[0]
        images = jnp.transpose(kernel, (2, 0, 1, 3))  # one image per input channel
        filters = jnp.transpose(kernel, (0, 1, 3, 2))
        found = jax.lax.conv_general_dilated(
            images, filters, (1, 1), [(k - 1, k - 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        sums = jnp.sum(jnp.abs(found), axis=(1, 2))
    if weights is not None:
        sums = sums * weights[None, :] / weights[:, None]
    return jax.lax.rsqrt(jnp.maximum(jnp.sum(sums, axis=1), _TINY))


def iterate(module: nnx.Module, steps: int = 1) -> None:
    """Advance the power iterations of all spectrally normalised layers of a module, in place."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, (Dense, Convolution)) and part.kind == "spectral":
            part.iterate(steps)


class _Layer(nnx.Module):
    """What dense layers and convolutions share: parameters by kind, and the power iteration."""

    kind: str
    kernel: Any
    vector: Any
    terms: int
    scale: float

    def _parameters(
        self, kind: str, shape: Sequence[int], use_bias: bool, domain: tuple[int, ...], rngs: nnx.Rngs
    ) -> None:
        """Fresh parameters; `shape` is (n_in, n_out), or (k, k, cin, cout) of a convolution."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind of layer {kind!r}; known: {', '.join(KINDS)}")
        *window, n_in, n_out = shape
        if min(shape) < 1:
            raise ValueError(f"a layer needs sizes of at least 1, got {tuple(shape)}")
        if kind == "residual" and n_in != n_out:
            raise ValueError(f"a residual map keeps the number of features, got {n_in} and {n_out}")
        whole("terms", self.terms)
        self.kind, key, side = kind, rngs.params(), max(n_in, n_out)
        normal = partial(jax.random.normal, dtype=jnp.float32)  # whatever `jax_enable_x64` says, as all below
        fan = math.prod(window) * n_in
        if kind == "reflection":
            start = normal(key, (*window, side, max(side // 2, 1))) / math.sqrt(side)
        elif kind in ("cayley", "exponential"):
            start = normal(key, (*window, side, side)) / math.sqrt(4 * math.prod(window) * side)
        elif kind == "residual":
            start = normal(key, (*window, n_in, n_in)) / fan
        else:
            drawn = nnx.initializers.orthogonal()(key, (fan, n_out), jnp.float32)
            start = drawn.reshape(*window, n_in, n_out)
        self.kernel = (Orthonormal if kind == "stiefel" else nnx.Param)(start)
        self.bias = nnx.Param(jnp.zeros(n_out, jnp.float32)) if use_bias else None
        first = unit(normal(rngs.params(), domain)) if kind == "spectral" else None
        self.vector = nnx.data(None if first is None else Kept(first))

    @property
    def constant(self) -> float | None:
        """What the construction promises to bound the layer's norm by; None for residual, unit and plain maps.

        A "spectral" layer keeps its promise only as far as its power iteration has converged, a "stiefel" layer only
        while its kernel moves by `manifold.turns`; the series of "exponential" leaves out at most 1 / terms! of exp(S).
        No bound relies on any.
        """
        if self.kind == "exponential":
            return 1 + 1 / math.factorial(self.terms)
        return None if self.kind in ("residual", "unit", "plain") else 1.0

    def apply(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        """The linear map with these plain weights."""
        raise NotImplementedError

    def iterate(self, steps: int = 1) -> None:
        """Advance the power iteration by so many steps: v to W'W v, normalised; v stays where that vanishes."""
        kernel = self.kernel.get_value()

        def step(_: Any, v: jax.Array) -> jax.Array:
            image, back = jax.vjp(lambda u: self.apply(kernel, u[None])[0], v)
            found = unit(back(unit(image))[0])  # in two steps, as the square of a tiny W underflows
            return jnp.where(jnp.sum(found * found) > 0.5, found, v)

        self.vector.set_value(jax.lax.fori_loop(0, steps, step, self.vector.get_value()))

    def _normalised(self) -> jax.Array:
        """The weights over u'W v, u and v of the last iteration and constant in the gradient."""
        kernel, v = self.kernel.get_value(), jax.lax.stop_gradient(self.vector.get_value())
        image = self.apply(kernel, v[None])
        sigma = jnp.sum(jax.lax.stop_gradient(unit(image)) * image)
        return kernel / jnp.maximum(sigma, _TINY)

    def _plain(self) -> jax.Array | None:
        """The weights of "spectral", "aol", "stiefel" and "plain"; None for other kinds."""
        kernel = self.kernel.get_value()
        if self.kind == "spectral":
            return self._normalised()
        if self.kind == "aol":
            return kernel * rescaled(kernel)[:, None]
        return kernel if self.kind in ("plain", "stiefel") else None

    def _added(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Dense(_Layer):
    """A dense map of `kind` (see the table above) from n_in to n_out features, with a bias.

    Args:
        terms: of the series of "exponential".
        scale: of W in "residual".

    Raises:
        ValueError: an unknown kind, or sizes that do not fit it.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        kind: str,
        use_bias: bool = True,
        terms: int = 12,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.n_in, self.n_out, self.terms, self.scale = n_in, n_out, terms, scale
        self._parameters(kind, (n_in, n_out), use_bias, (n_in,), rngs)

    def weights(self) -> jax.Array:
        """The matrix (n_in, n_out) of the map."""
        kernel, plain = self.kernel.get_value(), self._plain()
        if plain is not None:
            return plain
        if self.kind == "unit":
            return unit(kernel, axis=0)
        if self.kind == "residual":
            return jnp.eye(self.n_in, dtype=kernel.dtype) + self.scale * kernel
        if self.kind == "exponential":
            return orthogonal.exponential(kernel, self.terms)[: self.n_in, : self.n_out]
        return _CONSTRUCTED[self.kind](kernel)[: self.n_in, : self.n_out]

    def apply(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        """x @ kernel."""
        return x @ kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer on x (..., n_in)."""
        return self._added(x @ self.weights().astype(x.dtype))

    def export(self) -> Plain:
        """The plain weights."""
        return Plain(self.weights(), None if self.bias is None else self.bias.get_value())


class Convolution(_Layer):
    """A convolution of `kind` (see the table above) on images of one size, with a bias.

    The input is read by `downsample(x, stride)`, the window is square and odd. Padding is zero for "spectral", "aol",
    "exponential" and "residual", and circular for "cayley", "reflection" and "cholesky", which are computed in the
    Fourier domain.

    Args:
        image: (height, width) of the input.
        terms: of the series of "exponential".
        scale: of W in "residual".

    Raises:
        ValueError: an unknown kind, or sizes that do not fit it; images of another size.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        image: tuple[int, int],
        kind: str,
        window: int = 3,
        stride: int = 1,
        use_bias: bool = True,
        terms: int = 12,
        scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if kind in ("unit", "stiefel"):
            raise ValueError(f"a {kind} map is a dense {'last ' if kind == 'unit' else ''}layer: use Dense")
        if window < 1 or window % 2 == 0 or stride < 1:
            raise ValueError(f"a window is odd and a stride at least 1, got {window} and {stride}")
        if image[0] % stride or image[1] % stride:
            raise ValueError(f"height and width must be multiples of the stride {stride}, got {image}")
        self.image = (image[0] // stride, image[1] // stride)
        self.n_in, self.n_out, self.stride = n_in * stride**2, n_out, stride
        self.terms, self.scale = terms, scale
        if kind in _CONSTRUCTED and window > min(self.image):
            raise ValueError(f"a window of {window} does not fit images of {self.image}")
        shape = (window, window, self.n_in, n_out)
        self._parameters(kind, shape, use_bias, (*self.image, self.n_in), rngs)

    def apply(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        """The convolution with a plain kernel."""
        return convolve(x, kernel)

    def weights(self) -> jax.Array:
        """The kernel of "spectral", "aol", "residual", and the skew one of "exponential"."""
        kernel, plain = self.kernel.get_value(), self._plain()
        if plain is not None:
            return plain
        if self.kind == "residual":
            middle = kernel.shape[0] // 2
            kernel = self.scale * kernel
            return kernel.at[middle, middle].add(jnp.eye(self.n_in, dtype=kernel.dtype))
        skew = kernel - transposed(kernel)
        # The norm of a convolution is at most the square root of the number of taps times that of its flat kernel.
        taps = kernel.shape[0] * kernel.shape[1]
        size = orthogonal.gram_bound(skew.reshape(-1, skew.shape[-1])) * math.sqrt(taps)
        return skew / jnp.maximum(size, 1)

    def blocks(self) -> jax.Array:
        """The unitary matrices of "cayley" and "reflection", one per frequency; of "cholesky" rectangular ones."""
        kernel = orthogonal.transform(self.kernel.get_value(), self.image)
        return _CONSTRUCTED[self.kind](kernel)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer on images x (B, height, width, channels)."""
        x = downsample(x, self.stride)
        if x.shape[1:] != (*self.image, self.n_in):
            raise ValueError(
                f"this layer was built for images of {self.image} with {self.n_in} channels after its stride, got "
                f"{x.shape[1:]}"
            )
        if self.kind not in ORTHOGONAL:
            return self._added(convolve(x, self.weights().astype(x.dtype)))
        side = self.n_in if self.kind == "cholesky" else max(self.n_in, self.n_out)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, side - self.n_in)))
        if self.kind == "exponential":
            y = self._series(x)
        else:
            y = orthogonal.multiply(x, self.blocks())
        return self._added(y[..., : self.n_out])

    def _series(self, x: jax.Array) -> jax.Array:
        """sum_k S^k x / k!, S the skew convolution."""
        skew = self.weights().astype(x.dtype)
        total = term = x
        for k in range(1, self.terms):
            term = convolve(term, skew) / k
            total = total + term
        return total

    def export(self) -> Plain:
        """The plain weights: of "cayley", "reflection" and "cholesky" a circular kernel as large as the image.

        Raises:
            ValueError: an exponential has no kernel of its own with zero padding, only its matrix.
        """
        bias = None if self.bias is None else self.bias.get_value()
        if self.kind == "exponential":
            raise ValueError(
                "the exponential of a zero-padded convolution is no convolution (its border differs), so that there is "
                "no kernel to export; trace the layer instead"
            )
        if self.kind not in ORTHOGONAL:
            return Plain(self.weights(), bias, "zero", self.stride)
        height, width = self.image
        kernel = orthogonal.kernel_of(self.blocks(), width)[..., : self.n_in, : self.n_out]
        # from x(p - a) kernel(a) to x(p + a - k // 2) kernel(a)
        kernel = jnp.roll(kernel[::-1, ::-1], (1 + height // 2, 1 + width // 2), axis=(0, 1))
        return Plain(kernel, bias, "circular", self.stride)
