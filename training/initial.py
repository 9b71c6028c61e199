"""Initial weights by name: how dense layers and convolutions begin decides how large the first constants are.

Over n layers a factor c in every layer's norm is a factor c^n in the constants, and certified radius maximisation
cannot hold a network whose constants have left the scale of its radii.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipbounds.training.models import ModelSpec, build

#: Names of `Config.initialisation`.
INITIALISATIONS = ("lecun", "published", "unit")
_GRID = 8  # frequencies per axis at which the norm of a convolution is taken


def fresh(spec: ModelSpec, initialisation: str = "lecun", seed: int = 0) -> nnx.Module:
    """A model with fresh weights: `build(spec, seed)`, initialised. ValueError as both raise it."""
    return initialise(build(spec, seed), initialisation, seed)


def initialise(model: nnx.Module, initialisation: str, seed: int = 0) -> nnx.Module:
    """The model, whose dense layers and convolutions are drawn anew in place.

    lecun       left as they are; flax draws a truncated normal, standard deviation 1/sqrt(fan_in), bias 0
    published   PyTorch's default, which the authors of arXiv 2310.00116 use: kernel and bias uniform on
                +-1/sqrt(fan_in), so the standard deviation is 1/sqrt(3 fan_in)
    unit        kernels orthogonal as matrices, a convolution's then divided by the norm of its operator, so that every
                layer has norm 1 to a few per cent; bias 0

    Only plain layers (`nnx.Linear`, two-dimensional `nnx.Conv`) are drawn anew: layers with a constant of their own
    keep theirs. ValueError for an unknown name.
    """
    if initialisation not in INITIALISATIONS:
        raise ValueError(
            f"initialisation must be one of {', '.join(INITIALISATIONS)}, got {initialisation!r}"
        )
    if initialisation == "lecun":
        return model
    rng = np.random.default_rng(seed)
    for _, layer in nnx.iter_modules(model):
        if type(layer) is nnx.Linear or (type(layer) is nnx.Conv and len(layer.kernel_size) == 2):
            _draw(layer, initialisation, rng)
    return model


def _draw(layer: Any, initialisation: str, rng: np.random.Generator) -> None:
    shape = layer.kernel.shape  # (..., inputs, outputs)
    fan_in = int(np.prod(shape[:-1]))
    size = () if layer.bias is None else layer.bias.shape
    if initialisation == "published":
        bias, kernel = (rng.uniform(-(fan_in**-0.5), fan_in**-0.5, s) for s in (size, shape))
    else:
        bias, kernel = np.zeros(size), _orthogonal(rng, fan_in, shape[-1]).reshape(shape)
        if isinstance(layer, nnx.Conv):
            kernel = kernel / _norm(kernel, layer)
    layer.kernel[...] = jnp.asarray(kernel, layer.kernel.dtype)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(bias, layer.bias.dtype)


def _orthogonal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A random matrix with orthonormal columns, or rows where those are fewer."""
    drawn = rng.standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(drawn)
    q = q * np.sign(np.diag(r))
    return q if rows >= columns else q.T


def _norm(kernel: np.ndarray, layer: nnx.Conv) -> float:
    """Norm of the convolution of an infinite image, on a grid of frequencies: an estimate, from below.

    With strides the phases of the kernel are so many input channels; a dilation only changes the frequencies.
    """
    strides = layer.strides if isinstance(layer.strides, tuple) else (layer.strides,) * 2
    rows, columns = (int(s or 1) for s in strides)
    phases = [kernel[i::rows, j::columns] for i in range(rows) for j in range(columns)]
    grid = tuple(max(_GRID, size) for size in kernel.shape[:2])
    transfer = np.concatenate([np.fft.fft2(phase, grid, axes=(0, 1)) for phase in phases], axis=2)
    groups = np.split(transfer, layer.feature_group_count, axis=-1)
    return max(float(np.linalg.svd(group, compute_uv=False).max()) for group in groups)
