"""Orthogonal matrices from unconstrained parameters, and the maps that compute with them in the Fourier domain.

Every function takes stacks `(..., n, n)` (or `(..., n, r)`), real or complex, and is differentiable. A circular
convolution is one such matrix per frequency: orthogonal (unitary) ones make the whole convolution orthogonal
(Trockman and Kolter, Orthogonalizing convolutional layers with the Cayley transform, ICLR 2021).

The Fourier transform is written as products with cosines and sines: an image has few rows and columns, products are
what accelerators are fast at, and `lipbounds.trace` reads them as the linear maps that they are.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._norms import inverse, inverse_factor


def adjoint(a: jax.Array) -> jax.Array:
    """The conjugate transposes of a stack of matrices."""
    return jnp.conj(jnp.swapaxes(a, -1, -2))


def cayley(a: jax.Array) -> jax.Array:
    """(I + S)^-1 (I - S) with S = A - A*: unitary (orthogonal where A is real)."""
    skew, one = a - adjoint(a), jnp.eye(a.shape[-1], dtype=a.dtype)
    return 2 * inverse(one + skew) - one


def exponential(a: jax.Array, terms: int = 12) -> jax.Array:
    """exp(S) with S = A - A*, cut off after `terms` terms: unitary up to r^terms / terms!, r <= 1.

    S is scaled down where its norm may exceed 1, by a bound of that norm that is never too small (`gram_bound`).
    """
    skew = a - adjoint(a)
    skew = skew / jnp.maximum(gram_bound(skew), 1).astype(a.dtype)[..., None, None]
    total = term = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    for k in range(1, terms):
        term = term @ skew / k
        total = total + term
    return total


def reflection(v: jax.Array) -> jax.Array:
    """I - 2 V (V* V)^-1 V*, the reflection in the complement of the columns of V (..., n, r): unitary and Hermitian.

    Lai et al., Enhancing certified robustness via block reflector orthogonal layers and logit annealing loss, ICML
    2025. It is I - 2 Q Q* with Q from `orthonormal` and a step of Newton and Schulz, Q (3 I - Q* Q) / 2: Q has norm at
    most 1 also where V* V is singular, and so has the result. It is unitary where V* V is regular in floating point.
    """
    q = orthonormal(v)
    q = q @ (1.5 * jnp.eye(v.shape[-1], dtype=v.dtype) - 0.5 * (adjoint(q) @ q))
    return jnp.eye(v.shape[-2], dtype=v.dtype) - 2 * (q @ adjoint(q))


def orthonormal(a: jax.Array) -> jax.Array:
    """A L^-*, L L* = A* A + d I: the columns of A (..., n, r), r <= n, made orthonormal; for r > n its rows.

    The triangular factor of a QR factorisation, taken from the Gram matrix (Hu, Leino, Wang and Fredrikson, A recipe
    for improved certifiable robustness, ICLR 2024). d is 100 units of rounding of the mean squared length of a column:
    more than the rounding of the Gram matrix, so that the norm stays at most 1 however small the least singular value
    s is, and the factor exists. A singular value s becomes s / sqrt(s^2 + d).
    """
    if a.shape[-1] > a.shape[-2]:
        return adjoint(orthonormal(adjoint(a)))
    gram, n = adjoint(a) @ a, a.shape[-1]
    kind = jnp.finfo(gram.dtype)
    shift = jnp.trace(gram, axis1=-2, axis2=-1) * (100 * float(kind.eps) / n)
    # a zero matrix stays zero, and where products underflow the sum of what they lose stays below
    least = 4 * a.shape[-2] * n * float(kind.tiny)
    shift = jnp.maximum(shift.real, least).astype(gram.dtype)
    return a @ adjoint(inverse_factor(gram + shift[..., None, None] * jnp.eye(n, dtype=gram.dtype)))


def gram_bound(a: jax.Array, squarings: int = 5) -> jax.Array:
    """(...) upper bounds of the 2-norms of matrices, by ||A||^(2^k) <= ||(A*A)^(2^(k-1))||_F, in floating point.

    At most n^(2^-(k+1)) times the norm, n the smaller side (Delattre et al., Efficient bound of Lipschitz constant for
    convolutional layers by Gram iteration, ICML 2023). Powers are scaled to norm 1, so they do not overflow.
    """
    if a.shape[-1] > a.shape[-2]:
        a = adjoint(a)
    gram, logarithm = adjoint(a) @ a, jnp.zeros(a.shape[:-2], jnp.finfo(a.dtype).dtype)
    for k in range(1, squarings + 1):
        size = _frobenius(gram)
        logarithm = logarithm + jnp.log(size) / 2**k
        gram = gram / size.astype(gram.dtype)[..., None, None]
        if k < squarings:
            gram = gram @ gram
    return jnp.exp(logarithm)


def _frobenius(a: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.real(a * jnp.conj(a)), axis=(-2, -1)), 1e-30))


# --- circular convolutions -----------------------------------------------------------------------------------------


def waves(n: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of 2 pi j f / n, (n, count): points j by frequencies f."""
    angles = np.outer(np.arange(n), np.arange(n if count is None else count)) % n * (2 * np.pi / n)
    return np.cos(angles), np.sin(angles)


def transform(kernel: jax.Array, image: tuple[int, int]) -> jax.Array:
    """The complex matrices (height, width // 2 + 1, cin, cout) of a circular convolution, kernel (k, k, cin, cout).

    Frequencies beyond width // 2 are conjugates of these.
    """
    (height, width), dtype = image, kernel.dtype
    complex_ = jnp.complex128 if dtype == jnp.float64 else jnp.complex64
    rows, columns = (
        jnp.asarray(cos[:k] - 1j * sin[:k], complex_)
        for (cos, sin), k in (
            (waves(height), kernel.shape[0]),
            (waves(width, width // 2 + 1), kernel.shape[1]),
        )
    )
    return jnp.einsum("abio,af,bg->fgio", kernel.astype(complex_), rows, columns)


def multiply(x: jax.Array, blocks: jax.Array) -> jax.Array:
    """The circular convolution of images x (B, height, width, cin) with the matrices of `transform`.

    y(p) = sum_a x(p - a) kernel(a). All arithmetic is real, and nothing but products.
    """
    height, width, dtype = x.shape[1], x.shape[2], x.dtype
    half = width // 2 + 1
    cos_w, sin_w = (jnp.asarray(a / math.sqrt(width), dtype) for a in waves(width, half))
    cos_h, sin_h = (jnp.asarray(a / math.sqrt(height), dtype) for a in waves(height))
    real = jnp.einsum("bhwc,wg->bhgc", x, cos_w)
    imag = -jnp.einsum("bhwc,wg->bhgc", x, sin_w)
    # rows: multiplied with cos - i sin; real and imaginary parts side by side in the channels
    turn = jnp.concatenate([cos_h, sin_h], axis=0), jnp.concatenate([-sin_h, cos_h], axis=0)
    both = jnp.concatenate([real, imag], axis=1)
    spectrum = jnp.concatenate([jnp.einsum("bhgc,hf->bfgc", both, t) for t in turn], axis=-1)
    re, im = jnp.real(blocks).astype(dtype), jnp.imag(blocks).astype(dtype)
    matrices = jnp.concatenate(
        [jnp.concatenate([re, im], axis=-1), jnp.concatenate([-im, re], axis=-1)], axis=-2
    )
    spectrum = jnp.einsum("bfgc,fgcd->bfgd", spectrum, matrices)
    re, im = jnp.split(spectrum, 2, axis=-1)
    both = jnp.concatenate([re, im], axis=1)
    back = jnp.concatenate([cos_h, -sin_h], axis=1), jnp.concatenate([sin_h, cos_h], axis=1)
    re, im = (jnp.einsum("bfgc,hf->bhgc", both, t) for t in back)
    # columns: every frequency but 0 and width / 2 stands for its conjugate, too
    twice = np.where(np.isin(np.arange(half), (0, width / 2)), 1.0, 2.0)
    cos_w, sin_w = cos_w * jnp.asarray(twice, dtype), sin_w * jnp.asarray(twice, dtype)
    return jnp.einsum("bhgc,wg->bhwc", re, cos_w) - jnp.einsum("bhgc,wg->bhwc", im, sin_w)


def kernel_of(blocks: jax.Array, width: int) -> jax.Array:
    """The real kernel (height, width, cin, cout) that has these matrices: y(p) = sum_a x(p - a) kernel(a)."""
    return jnp.fft.irfft2(blocks, s=(blocks.shape[0], width), axes=(0, 1))
