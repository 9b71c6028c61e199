"""The top eigenvalue of a symmetric matrix in tiles on an accelerator, by block Lanczos in a few programs: an estimate.

The recurrence and its stopping rule are those of `cholesky.top_eigenvalue`. The device does `STRIDE` block steps per
call, so that the host waits for it once in so many steps and sees no vector of the matrix's size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._norms.cholesky import missed
from lipbounds._text.progress import alive

#: Nothing depends on the fastest algorithm for a product, and trying them all takes seconds.
UNTUNED = {"xla_gpu_autotune_level": 0}
STRIDE = 8
_STARTS = 2  # vectors of a block: why, says `cholesky.top_eigenvalue`
_STEPS, _ROUNDS = 80, 4
#: Up to this size the host has the eigenvalue sooner.
_SMALL = 256


@jax.jit
def stacked(tiles: list[jax.Array]) -> jax.Array:
    return jnp.stack(tiles)


@partial(jax.jit, compiler_options=UNTUNED)
def begun(coefficients: jax.Array, basis: jax.Array) -> jax.Array:
    """A basis that begins with the orthonormalised combinations (p, s) of the s rows of another; the rest is zero."""
    first = _orthonormal(coefficients @ basis)[0]
    return jnp.zeros_like(basis).at[: len(coefficients)].set(first)


@partial(jax.jit, compiler_options=UNTUNED)
def advanced(
    tiles: jax.Array, rows: jax.Array, columns: jax.Array, basis: jax.Array, begin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`STRIDE` block steps from block `begin` on: (basis, diagonal blocks, blocks below them), both (STRIDE, p, p).

    Args:
        tiles: (q, t, t), the upper ones of the matrix, at the places (rows, columns).
        basis: (s, n), orthonormal rows, p a step; those of later steps are zero.
    """
    p = _STARTS

    def step(basis: jax.Array, j: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        here = jax.lax.dynamic_slice_in_dim(basis, j * p, p)
        w = _symmetric_product(tiles, rows, columns, here)
        diagonal = here @ w.T
        for _ in range(2):
            w = w - (w @ basis.T) @ basis
        ahead, below = _orthonormal(w)
        # What is left after a near breakdown is rounding, which is not orthogonal to the basis.
        ahead = _orthonormal(ahead - (ahead @ basis.T) @ basis)[0]
        return jax.lax.dynamic_update_slice_in_dim(basis, ahead, (j + 1) * p, 0), (diagonal, below)

    basis, (diagonal, below) = jax.lax.scan(step, basis, begin + jnp.arange(STRIDE))
    return basis, diagonal, below


def _orthonormal(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Q, R) with W' = Q'R for two rows W: Gram-Schmidt, twice. Rows of zeros stay zero."""
    least = jnp.finfo(w.dtype).tiny
    first_length = jnp.linalg.norm(w[0])
    first = w[0] / jnp.maximum(first_length, least)
    part = first @ w[1]
    rest = w[1] - part * first
    again = first @ rest
    rest = rest - again * first
    length = jnp.linalg.norm(rest)
    second = rest / jnp.maximum(length, least)
    zero = jnp.zeros_like(length)
    r = jnp.stack([jnp.stack([first_length, part + again]), jnp.stack([zero, length])])
    return jnp.stack([first, second]), r


def _symmetric_product(tiles: jax.Array, rows: jax.Array, columns: jax.Array, v: jax.Array) -> jax.Array:
    """V G for the rows of V (p, n) and the symmetric G with these upper tiles."""
    parts = v.reshape(len(v), -1, tiles.shape[1])

    def add(total: jax.Array, entry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        g, i, j = entry
        total = total.at[:, i].add(parts[:, j] @ g.T)
        return total.at[:, j].add(jnp.where(i == j, 0.0, parts[:, i] @ g)), None

    return jax.lax.scan(add, jnp.zeros_like(parts), (tiles, rows, columns))[0].reshape(v.shape)


def basis_shape(n: int) -> tuple[int, int]:
    """The shape of the basis for a matrix of size n; (0, n) where the host has the eigenvalue sooner."""
    steps = min(_STEPS, n // _STARTS // STRIDE * STRIDE)
    return (0 if n <= _SMALL else _STARTS * (steps + 1)), n


def top_eigenvalue(tiles: dict[tuple[int, int], jax.Array], n: int, device: Any, tol: float) -> float:
    """An estimate (no bound) of lambda_max of the symmetric positive semidefinite matrix with these upper tiles."""
    order = sorted(tiles)
    length, p = basis_shape(n)[0], _STARTS
    if not length:
        whole = np.zeros((n, n))
        for i, j in order:
            tile = np.asarray(tiles[i, j])
            side = len(tile)
            whole[j * side : (j + 1) * side, i * side : (i + 1) * side] = tile.T
        return float(np.linalg.eigvalsh(whole)[-1])
    held = stacked([tiles[place] for place in order])
    rows, columns = (jax.device_put(np.array(x), device) for x in zip(*order, strict=True))
    coefficients = np.eye(p, length)
    vectors = np.zeros((length, n))
    vectors[:p] = np.random.default_rng(0).standard_normal((p, n))
    basis = jax.device_put(vectors, device)
    for _ in range(_ROUNDS):
        basis = begun(coefficients, basis)
        t = np.zeros((length, length))
        for begin in range(0, length // p - 1, STRIDE):
            alive()
            basis, diagonal, below = advanced(held, rows, columns, basis, np.int64(begin))
            estimate, miss, found = _entered(t, begin, np.asarray(diagonal), np.asarray(below))
            if miss <= tol * estimate:
                return estimate + miss
        coefficients = np.zeros((p, length))
        coefficients[:, : len(found)] = found[:, -p:].T
    return estimate + miss


def _entered(
    t: np.ndarray, begin: int, diagonal: np.ndarray, below: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """(the top Ritz value, what it may miss, Ritz vectors in the basis) after these steps, which are entered in T."""
    p = diagonal.shape[1]
    gone = False
    for k, (d, r) in enumerate(zip(diagonal, below, strict=True)):
        here, end = slice((begin + k) * p, (begin + k + 1) * p), (begin + k + 1) * p
        t[here, here] = (d + d.T) / 2
        gone = bool(np.abs(r).max() <= 1e-14 * np.abs(t[:end, :end].diagonal()).max())
        if gone:
            break
        if end < len(t):
            t[end : end + p, here], t[here, end : end + p] = r, r.T
    values, vectors = np.linalg.eigh(t[:end, :end])
    miss = 0.0 if gone else missed(values, r @ vectors[-p:, -p:])
    return float(values[-1]), miss, vectors
