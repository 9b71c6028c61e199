"""Products and factorisations for the search on chains: NumPy in blocks on the host, or JAX on an accelerator.

Both offer the same few operations, in floats of `dtype`. Matrices are arrays of their own; vectors and the few columns
of a pass back are NumPy arrays in any case. Nothing here is a proof.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from lipbounds._norms import schur
from lipbounds._norms.banded_cholesky import classes
from lipbounds._text.progress import alive

_TOGETHER = 4  # rows with the same columns on the average, for products by blocks
_COLUMNS = 512  # of a product that is formed at once
_UNTUNED = {"xla_gpu_autotune_level": 0}  # trying every algorithm for a product takes seconds


class Host:
    """NumPy and LAPACK, in float32, in blocks that take less than about a second."""

    dtype: Any = np.float32

    def map(self, m: Any) -> Any:
        """A matrix, dense or sparse, for products with vectors."""
        return sp.csr_array(m, dtype=self.dtype) if sp.issparse(m) else np.asarray(m, self.dtype)

    def dense(self, m: Any) -> np.ndarray:
        return (m.toarray() if sp.issparse(m) else np.asarray(m)).astype(self.dtype)

    def weighed(self, m: Any, transposed: bool) -> Callable[[np.ndarray], np.ndarray]:
        """t -> M' diag(t) M, or M diag(t) M' if transposed."""
        own = m.T if transposed else m
        if not sp.issparse(own):
            dense = np.ascontiguousarray(own, self.dtype)
            return lambda t: self.gram(dense * np.sqrt(t)[:, None])
        parts = blocks(sp.csr_array(own, dtype=self.dtype))
        size = own.shape[1]

        def product(t: np.ndarray) -> np.ndarray:
            out = np.zeros((size, size), self.dtype)
            for rows, columns, block in parts:
                alive()
                out[np.ix_(columns, columns)] += (block * t[rows, None]).T @ block
            return out

        return product

    def gram(self, f: np.ndarray) -> np.ndarray:
        """F'F."""
        out = np.empty((f.shape[1], f.shape[1]), self.dtype)
        for lo in range(0, f.shape[1], _COLUMNS):
            alive()
            out[lo : lo + _COLUMNS, lo:] = f[:, lo : lo + _COLUMNS].T @ f[:, lo:]
            out[lo:, lo : lo + _COLUMNS] = out[lo : lo + _COLUMNS, lo:].T
        return out

    def add_scaled(self, c: Any, m: np.ndarray, r: np.ndarray) -> np.ndarray:
        """C - diag(r) M diag(r), in the place of M; C None is the identity."""
        for lo in range(0, len(m), _COLUMNS):
            rows = m[lo : lo + _COLUMNS]
            rows *= -r[lo : lo + _COLUMNS, None]
            rows *= r
            if c is not None:
                rows += c[lo : lo + _COLUMNS]
        if c is None:
            m.flat[:: len(m) + 1] += 1.0
        return m

    def factor(self, c: np.ndarray) -> np.ndarray | None:
        """The lower triangle L of C, C = L L'; None where there is none."""
        work = np.array(c)
        return work if np.isfinite(work.diagonal()).all() and schur.factorise(work) else None

    def solve_wide(self, factor: Any, x: np.ndarray) -> np.ndarray:
        """L^-1 X for a matrix X."""
        return self.solve(factor, x)

    def solve(self, factor: Any, x: np.ndarray, turned: bool = False) -> np.ndarray:
        """L^-1 x, or L'^-1 x if turned, for a few columns x; x itself where L is None, the identity."""
        if factor is None:
            return x
        out = np.array(x, order="C")
        if turned:
            schur.solve_back(factor, out)
        else:
            schur.solve(factor, out)
        return out

    def times(self, m: Any, x: Any, turned: bool = False) -> Any:
        """M x or M'x, for a few columns x."""
        return (m.T if turned else m) @ x

    def scaled(self, m: Any, rows: np.ndarray) -> Any:
        """diag(rows) M."""
        return m * rows[:, None]


def blocks(m: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(rows, columns, dense block): M (CSR) as blocks of rows that read the same columns, or of a few rows each."""
    first, which = classes(m)
    order = np.argsort(which, kind="stable")
    ends = np.searchsorted(which[order], np.arange(first.size + 1))
    if first.size * _TOGETHER > m.shape[0]:
        order, ends = np.arange(m.shape[0]), np.append(np.arange(0, m.shape[0], 256), m.shape[0])
    out = []
    for begin, end in itertools.pairwise(ends):
        rows = order[begin:end]
        own = m[rows]
        columns = np.unique(own.indices)
        if columns.size:
            out.append((rows, columns, np.ascontiguousarray(own[:, columns].toarray())))
    return out


# --- on an accelerator ---------------------------------------------------------------------------------------------


def _program(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(fn, compiler_options=_UNTUNED)


_HIGHEST = jax.lax.Precision.HIGHEST


@_program
def _weighed(m: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.matmul((m * t[:, None]).T, m, precision=_HIGHEST)


@_program
def _weighed_rows(m: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.matmul(m * t, m.T, precision=_HIGHEST)


@_program
def _gram(f: jax.Array) -> jax.Array:
    return jnp.matmul(f.T, f, precision=_HIGHEST)


@_program
def _add_scaled(c: Any, m: jax.Array, r: jax.Array) -> jax.Array:
    less = m * r[:, None] * r
    if c is None:
        i = jnp.arange(len(m))
        return jnp.where(i[:, None] == i, 1.0, 0.0) - less
    return c - less


@jax.jit
def _scaled(m: jax.Array, rows: jax.Array) -> jax.Array:
    return m * rows[:, None]


@_program
def _factor(c: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(c, symmetrize_input=False)


@jax.jit
def _solve(factor: jax.Array, x: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(factor, x, lower=True)


@jax.jit
def _solve_turned(factor: jax.Array, x: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(factor, x, lower=True, trans=1)


@_program
def _times(m: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.matmul(m, x, precision=_HIGHEST)


@_program
def _times_turned(m: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.matmul(m.T, x, precision=_HIGHEST)


_TOGETHER_DEVICE = 16  # columns are padded to a multiple of this, as every shape is a program


class Accelerator:
    """JAX on one device, in float64, every matrix dense: a GPU multiplies faster than it finds what is zero."""

    dtype: Any = np.float64

    def __init__(self, device: Any) -> None:
        self.device = device
        self._kept: dict[int, tuple[Any, jax.Array]] = {}

    def _put(self, x: np.ndarray) -> jax.Array:
        return jax.device_put(np.asarray(x, self.dtype), self.device)

    def map(self, m: Any) -> jax.Array:
        """The matrix on the device, once."""
        if id(m) not in self._kept:
            self._kept[id(m)] = m, self._put(m.toarray() if sp.issparse(m) else m)
        return self._kept[id(m)][1]

    def dense(self, m: Any) -> jax.Array:
        return self.map(m)

    def weighed(self, m: Any, transposed: bool) -> Callable[[Any], jax.Array]:
        own, product = self.map(m), _weighed_rows if transposed else _weighed
        return lambda t: product(own, self._put(t))

    def gram(self, f: jax.Array) -> jax.Array:
        return _gram(f)

    def add_scaled(self, c: Any, m: jax.Array, r: np.ndarray) -> jax.Array:
        return _add_scaled(c, m, self._put(r))

    def factor(self, c: jax.Array) -> jax.Array | None:
        found = _factor(c)
        return found if np.isfinite(np.asarray(found[-1, -1])) else None

    def solve_wide(self, factor: Any, x: jax.Array) -> jax.Array:
        return x if factor is None else _solve(factor, x)

    def solve(self, factor: Any, x: np.ndarray, turned: bool = False) -> np.ndarray:
        if factor is None:
            return x
        return self._columns(_solve_turned if turned else _solve, factor, x)

    def times(self, m: jax.Array, x: np.ndarray, turned: bool = False) -> np.ndarray:
        return self._columns(_times_turned if turned else _times, m, x)

    def _columns(self, product: Callable[..., Any], m: jax.Array, x: np.ndarray) -> np.ndarray:
        count = x.shape[1]
        if count > 1 and count % _TOGETHER_DEVICE:
            x = np.pad(x, ((0, 0), (0, -count % _TOGETHER_DEVICE)))
        return np.asarray(product(m, self._put(x)))[:, :count]

    def scaled(self, m: jax.Array, rows: np.ndarray) -> jax.Array:
        return _scaled(m, self._put(rows))
