"""The candidates of crm_convergence.py: settings of certified radius maximisation, small networks, initial weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

NEGATIVE, LOGARITHM = 0.0, 1.0  # the penalty: -R_soft, or -log((R_soft + log(K - 1) / t) / r0)

# A candidate is what it changes of these. lam is the factor of the radius term. margin adds margin * L_yi to every
# wrong class in the cross-entropy (Lipschitz-margin training). With scale > 0 the data term is scale-free: the
# cross-entropy of scale * (z_i - z_y + margin L_yi) / L_yi. lam and margin rise from 0 over `ramp` epochs after the
# warm-up. With bounding the warm-up adds bounding * L_yi to the wrong classes, which keeps the constants small. On a
# proxy r0, margin and bounding are multiples of eps there, 1/t and 1/lam too.
PUBLISHED: Mapping[str, Any] = {
    "init": "lecun",
    "warmup": 10,
    "ramp": 0,
    "lam": 30.0,
    "r0": 0.1,
    "t": 10.0,
    "penalty": NEGATIVE,
    "margin": 0.0,
    "scale": 0.0,
    "bounding": 0.0,
}
EPS = 36 / 255
_NOW = {"warmup": 0}
_WIDE = {"r0": 0.2, "lam": 15.0}
_LOG = {"penalty": LOGARITHM, "r0": 0.2, "lam": 1.0}
_MARGIN = {"warmup": 0, "lam": 0.0, "margin": EPS}
FULL: Mapping[str, Mapping[str, Any]] = {
    "Lipschitz margin, ramp 5": {**_MARGIN, "ramp": 5},
    "no warm-up, r0 .2": {**_NOW, **_WIDE},
    "unit norm, warm-up 1, ramp 5, r0 .2": {"init": "unit", **_WIDE, "warmup": 1, "ramp": 5},
    "Lipschitz margin + log penalty, ramp 5": {**_NOW, **_LOG, "margin": EPS / 2, "ramp": 5},
    "torch, r0 .2": {"init": "torch", **_WIDE},
    "no warm-up, ramp 5, log penalty x3, r0 .2": {**_NOW, **_LOG, "lam": 3.0, "ramp": 5},
    "torch, log penalty, r0 .2": {"init": "torch", **_LOG},
    "torch": {"init": "torch"},
    "published": {},
    "unit norm, warm-up 1, log penalty, r0 .2": {"init": "unit", **_LOG, "warmup": 1},
    "torch, warm-up 2, ramp 5, r0 .2": {"init": "torch", "warmup": 2, **_WIDE, "ramp": 5},
    "log penalty x3, r0 .2": {**_LOG, "lam": 3.0},
    "no warm-up, log penalty, r0 .2": {**_NOW, **_LOG},
    "scale-free 20, unit norm, ramp 5": {"init": "unit", **_MARGIN, "scale": 20.0, "ramp": 5},
    "Lipschitz margin x1.4, ramp 5": {**_MARGIN, "margin": 1.4 * EPS, "ramp": 5},
    "no warm-up": {**_NOW},
    "scale-free 8, unit norm, ramp 5": {"init": "unit", **_MARGIN, "scale": 8.0, "ramp": 5},
    "torch, no warm-up, r0 .2": {"init": "torch", **_NOW, **_WIDE},
}
# For the proxies, with eps as the unit.
_SHORT = {"warmup": 1, "ramp": 5}
_LOGS = {"penalty": LOGARITHM, "lam": 1.0}
PROXY_LIST: Mapping[str, Mapping[str, Any]] = {
    f"{init}, {name}": {"init": init, **terms}
    for init in ("lecun", "torch", "unit")
    for name, terms in {
        "long warm-up": {},
        "no warm-up": _NOW,
        "no warm-up, ramp 5": {**_NOW, "ramp": 5},
        "warm-up 1, ramp 5": _SHORT,
        "long warm-up, log penalty": _LOGS,
        "warm-up 1, ramp 5, log penalty": {**_SHORT, **_LOGS},
        "long bounding warm-up": {"bounding": 0.5},
        "scale-free, ramp 5": {"warmup": 0, "ramp": 5, "lam": 0.0, "margin": 1.0, "scale": 4.0},
        "Lipschitz margin, ramp 5": {"warmup": 0, "ramp": 5, "lam": 0.0, "margin": 1.0},
        "cross-entropy": {"lam": 0.0},
    }.items()
}


class Proxy(NamedTuple):
    """A small network and a part of a data set; CRM settings in units of eps, and how long the long warm-up is."""

    dataset: str
    convolutions: Sequence[Sequence[int]]
    dense: Sequence[int]
    every: int  # n-th image
    batch: int
    epochs: int
    warmup: int
    eps: float
    lam: float
    r0: float
    t: float
    rate: float


PROXIES: Mapping[str, Proxy] = {
    "digits-2C2F": Proxy(
        "digits", [(16, 4, 2, 1), (32, 4, 2, 1)], [100], 1, 64, 40, 15, 0.5, 2.5, 2.0, 5.0, 4e-3
    ),
    "mnist-2C2F": Proxy(
        "mnist", [(16, 4, 2, 1), (32, 4, 2, 1)], [100], 10, 128, 40, 15, 1.58, 24.0, 1.4, 8.0, 2e-3
    ),
    "mnist-4C3F": Proxy(
        "mnist",
        [(8, 3, 1, 1), (8, 4, 2, 1), (16, 3, 1, 1), (16, 4, 2, 1)],
        [128, 128],
        20,
        64,
        24,
        10,
        1.58,
        24.0,
        1.4,
        8.0,
        2e-3,
    ),
    "cifar10-6C2F": Proxy(
        "cifar10",
        [(8, 3, 1, 1), (8, 4, 2, 1), (16, 3, 1, 1), (16, 4, 2, 1), (16, 3, 1, 1), (16, 4, 2, 1)],
        [128],
        20,
        64,
        20,
        10,
        EPS,
        2.1,
        1.42,
        1.4,
        1e-3,
    ),
}


def in_pixels(candidate: Mapping[str, Any], proxy: Proxy) -> dict[str, Any]:
    """A candidate of `PROXY_LIST` with its radii in pixel units."""
    found = {**PUBLISHED, "warmup": proxy.warmup, "lam": proxy.lam, "r0": proxy.r0, "t": proxy.t, **candidate}
    for name in ("r0", "margin", "bounding"):
        found[name] *= proxy.eps
    found["t"] /= proxy.eps
    if found["penalty"] == NEGATIVE:
        found["lam"] /= proxy.eps
    return found


def initial(shapes: Any, layers: Sequence[Any], kind: str, seed: int) -> Any:
    """Parameters of such shapes as NumPy arrays, which need no compilation.

    lecun       the distribution of flax: truncated normal, standard deviation 1/sqrt(fan_in), bias 0
    torch       PyTorch's default: kernel and bias uniform on +-1/sqrt(fan_in), so the standard deviation is
                1/sqrt(3 fan_in)
    unit        orthogonal (kernel as a matrix), then scaled so that each layer's operator has about norm 1; bias 0
    """
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(shapes)  # bias and kernel of each layer
    values = []
    for layer, bias, kernel in zip(layers, leaves[::2], leaves[1::2], strict=True):
        shape, fan_in = kernel.shape, int(np.prod(kernel.shape[:-1]))
        b = np.zeros(bias.shape)
        if kind == "lecun":
            k = rng.standard_normal(shape)
            while (far := np.abs(k) > 2).any():
                k[far] = rng.standard_normal(int(far.sum()))
            k *= fan_in**-0.5 / 0.87962566  # the standard deviation of what is left within +-2
        elif kind == "torch":
            b, k = (rng.uniform(-(fan_in**-0.5), fan_in**-0.5, size) for size in (bias.shape, shape))
        else:
            u, _, v = np.linalg.svd(rng.standard_normal((fan_in, shape[-1])), full_matrices=False)
            k = (u @ v).reshape(shape)
            k = k / operator_norm(k, np.max(layer.strides)) if k.ndim == 4 else k
        values += [b.astype(np.float32), k.astype(np.float32)]
    return jax.tree.unflatten(tree, values)


def operator_norm(kernel: np.ndarray, stride: int, grid: int = 8) -> float:
    """Of the convolution of an infinite image: largest singular value of its transfer function on a grid."""
    phases = [kernel[i::stride, j::stride] for i in range(stride) for j in range(stride)]
    transfer = np.concatenate([np.fft.fft2(phase, (grid, grid), axes=(0, 1)) for phase in phases], axis=2)
    return float(np.linalg.svd(transfer, compute_uv=False).max())
