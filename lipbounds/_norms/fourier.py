"""A verified bound of one zero-padded convolution through the Fourier transform."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lipbounds._norms import cholesky
from lipbounds._norms.rounding import U, add_up, finite, require_gradual_underflow, sqrt_up, unscale_up, up
from lipbounds._text.threads import one_blas_thread

_CHUNK = 2**22


def conv_fft_bound(kernel: Any, input_shape: tuple[int, ...], most: int | None = None) -> float:
    """An upper bound of the l2 norm of a zero-padded convolution, rounding included.

    `kernel` is (k_1, .., k_d, cin, cout) (HWIO for images), `input_shape` the spatial input sizes (n_1, ..,
    n_d). On the torus of N_i = n_i + k_i - 1 points the zero-extended input does not wrap around, so the
    circular convolution contains the full linear one, and the convolution with any zero padding is a
    compression of it: rows are dropped (or are zero), columns are dropped. Striding drops rows too. Hence
        ||conv||_2 <= max over frequencies f of || sum_a kernel[a] exp(-2 pi i f.a / N) ||_2   (cout x cin
        blocks).
    The grid of n points is not enough: kernel (-2, 4, -2), n = 3 has norm 4 + 2 sqrt(2) = 6.83, its 3
    frequencies reach 6.0. Not valid for padding that wraps or reflects. Dilated kernels: insert the zeros
    first.

    `most` limits the points of an axis to N_i = max(most, 3 k_i) + k_i - 1, where the bound is raised by the factor
    cos((k_i - 1) pi / N_i)^(-1/2): for unit vectors u and v, |u' F(f) v|^2 is a trigonometric polynomial of degree
    k_i - 1 in each frequency, and one of degree m whose maximum M lies at t is at least M cos(m s) at t + s for
    |s| <= pi / m (M. Riesz, 1914); the next point of the grid is at most pi / N_i away.

    The transform is a direct sum with twiddles from the C library (assumed within 4 units in the last place),
    its rounding error is bounded by 2-norms of sum_a |kernel[a]|; the blocks, as real matrices of twice the
    size, are proved by the shifted Cholesky of `lipbounds._norms.cholesky`. Slack above the maximum over frequencies:
    below 1e-9 relative. Cost: prod(N)/2 Cholesky factorisations of order 2 min(cin, cout).

    Raises:
        ValueError: shapes that do not fit, NaN or infinite weights, a bound beyond float64.
    """
    weights = np.asarray(kernel)
    d = len(input_shape)
    if weights.ndim != d + 2 or d < 1:
        raise ValueError(
            f"kernel of shape {weights.shape} does not fit {d} spatial sizes: expected {d + 2} axes"
        )
    if any(int(n) != n or n < 1 for n in input_shape) or 0 in weights.shape[:d]:
        raise ValueError(
            f"spatial sizes must be positive integers, got {input_shape} and kernel {weights.shape}"
        )
    if weights.dtype.kind not in "biuf" or weights.dtype.itemsize > 8:
        raise ValueError(f"kernel entries of type {weights.dtype} do not convert to float64 exactly")
    weights = weights.astype(np.float64)
    if not np.all(np.isfinite(weights)):
        raise ValueError("the kernel has NaN or infinite entries")
    require_gradual_underflow()
    top = float(np.abs(weights).max()) if weights.size else 0.0
    if top == 0.0:
        return 0.0
    exponent = math.frexp(top)[1]
    with np.errstate(under="ignore"):
        weights = np.ldexp(weights, -exponent)
    sizes, raised = [int(n) for n in input_shape], 1.0
    for axis, taps in enumerate(weights.shape[:d]):
        if most is not None and max(most, 3 * taps) < sizes[axis]:
            sizes[axis] = max(most, 3 * taps)
            between = math.cos((taps - 1) * math.pi / (sizes[axis] + taps - 1))
            raised *= (1.0 + 1e-12) / math.sqrt(between)
    with one_blas_thread():  # many small factorisations, where more threads only wait for each other
        blocks, eta = _frequency_blocks(weights, tuple(sizes))
        spread = np.abs(weights).sum(axis=tuple(range(d))) * (1.0 + 1e-9)
        error = up(eta * math.sqrt(float((spread * spread).sum())) * (1.0 + 1e-9))
        bound = add_up(sqrt_up(_largest_block(blocks)), error)
    return finite(float(unscale_up(up(up(bound) * raised), exponent)))


def _frequency_blocks(weights: np.ndarray, sizes: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """(blocks (F, cin, cout) complex, eta): each entry within eta * sum_a |w[a]| of the exact transform.

    One axis of length k costs at most (32 + 4 (k + 4)) U relative to the absolute sum: twiddles within 32 U,
    complex products and sums within 4 (k + 4) U; the sum over axes is doubled for the products of these
    terms. Of conjugate frequencies one half of the last axis is kept (equal singular values).
    """
    d = len(sizes)
    result = weights.astype(np.complex128)
    eta = 0.0
    for axis in range(d):
        taps = weights.shape[axis]
        grid = sizes[axis] + taps - 1
        kept = grid // 2 + 1 if axis == d - 1 else grid
        circle = np.array([_root(j, grid) for j in range(grid)])
        twiddles = circle[np.outer(np.arange(kept), np.arange(taps)) % grid]
        result = np.moveaxis(np.tensordot(twiddles, result, axes=(1, axis)), 0, axis)
        eta += (32.0 + 4.0 * (taps + 4)) * U
    return result.reshape(-1, *weights.shape[d:]), 2.0 * eta


def _root(j: int, grid: int) -> complex:
    """exp(-2 pi i j / grid), the angle taken in (-pi, pi] so that its rounding error stays below 10 U."""
    angle = -2.0 * math.pi * ((j - grid if 2 * j > grid else j) / grid)
    return complex(math.cos(angle), math.sin(angle))


def _largest_block(blocks: np.ndarray) -> float:
    """t >= max_f ||block_f||_2**2, proved block by block at one common t."""
    if blocks.shape[1] > blocks.shape[2]:
        blocks = blocks.transpose(0, 2, 1)
    count, r, n = blocks.shape
    step = max(1, _CHUNK // (4 * r * max(r, n)))
    starts = range(0, count, step)
    parts = (blocks[i : i + step] for i in starts)
    t = max(float(np.linalg.eigvalsh(part @ part.conj().transpose(0, 2, 1))[:, -1].max()) for part in parts)
    for i in starts:
        part = blocks[i : i + step]
        real = np.block([[part.real, -part.imag], [part.imag, part.real]])
        absolute = np.abs(real)
        sums = np.matmul(absolute, absolute.sum(axis=1)[:, :, None])
        gram = np.matmul(real, real.transpose(0, 2, 1))
        diagonal = np.einsum("fii->fi", gram)
        worst = diagonal[np.argmax(diagonal.sum(axis=1))]
        t = _prove(gram, worst, 2 * n, float(sums.max()), t, first=i == 0)
    return t


def _prove(gram: np.ndarray, diagonal: np.ndarray, n: int, absolute: float, t: float, first: bool) -> float:
    r = gram.shape[1]
    if first:
        t = t + 4.0 * cholesky.rounding_shift(r, n, n, t, diagonal, absolute)
    for growth in (0.0, 1e-11, 1e-9, 1e-7, 1e-5, 1e-3, 1e-1, 10.0):
        raised = t * (1.0 + growth)
        shift = cholesky.rounding_shift(r, n, n, raised, diagonal, absolute) + 4.0 * U * raised
        matrix = -gram
        np.einsum("fii->fi", matrix)[...] += raised - shift
        try:
            factors = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            continue
        if np.all(np.isfinite(np.einsum("fii->fi", factors))):
            return raised
    raise ValueError("no bound could be proved for this convolution")
