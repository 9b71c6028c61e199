"""Linear maps of the state sequence, applied to columns: dense matrices, or sparse ones that are never made dense.

A convolution acts on the columns of S by its rows. Rows that read the same entries (the channels of a pixel) form one
small dense block, which is multiplied by the rows of S that it reads: M S M' is two such passes, at the price of the
convolution itself. Every entry is an inner product over the nonzeros of a row, in some order, so

    |fl(M X) - M X| <= gamma_t |M| |X| entrywise,    t the nonzeros of a row at most,

and the error is at most gamma_t || |M| ||_2 ||X||_F in the Frobenius norm.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from lipbounds._norms.banded_cholesky import classes
from lipbounds._norms.cholesky import nonzeros_per_row
from lipbounds._norms.enclosures import Enclosure, cheap_norm
from lipbounds._norms.matrices import is_identity
from lipbounds._norms.rounding import U, gamma
from lipbounds._text.progress import alive

TINY = 2.0**-900
_DENSE = 2**20  # entries of a matrix that is made dense in any case
_SPARE = 0.25  # share of nonzeros above which it is made dense, too
_TILE = 512  # columns that are symmetrised together
_TOGETHER = 4  # rows with the same columns that are multiplied as a block


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix M within `error` (normwise) of the real one; `absolute` >= || |M| ||_2, `terms` in its rows and columns.

    None is the identity, which is square, and never zero. Arrays are dense, or CSR.
    """

    array: Any
    error: float
    absolute: float
    terms: int

    @cached_property
    def single(self) -> Matrix:
        """The same in float32, for products of which nothing is proved."""
        return self if self.array is None else replace(self, array=self.array.astype(np.float32))

    @property
    def wrong(self) -> float:
        """||fl(M X) - M_real X||_F <= wrong ||X||_F, without what underflow may lose (`TINY`)."""
        if self.array is None:
            return 0.0
        return (gamma(self.terms + 6) * self.absolute + self.error) * (1 + 16 * U)

    @property
    def size(self) -> float:
        """An upper bound of ||M_real||_2."""
        return 1.0 if self.array is None else (self.absolute + self.error) * (1 + 4 * U)

    def ahead(self, x: np.ndarray) -> np.ndarray:
        """M x (..., m, k), for x (..., n, k)."""
        if self.array is None:
            return x
        if not sp.issparse(self.array):
            return np.matmul(self.array, x)
        flat = x.reshape(-1, *x.shape[-2:])
        out = np.empty((len(flat), self.array.shape[0], x.shape[-1]), x.dtype)
        for one, made in zip(flat, out, strict=True):
            self._columns(one, made)
        return out.reshape(*x.shape[:-2], *out.shape[1:])

    def both(self, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(M S M', e (N,)): every M_real S M_real' is at most that plus e I, for S (N, d, d) symmetric."""
        if self.array is None:
            return s, np.zeros(len(s))
        half = self.ahead(s)
        product = self.ahead(np.ascontiguousarray(half.transpose(0, 2, 1)))
        symmetrise(product)
        wrong = self.wrong * (2 * self.size + self.wrong) * (1 + 16 * U)
        return product, wrong * frobenius(s) * (1 + gamma(8)) + TINY

    def of_diagonal(self, ball: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `both`, of one diagonal matrix (n,) >= 0 that is never written out: arrays (1, m, m) and (1,)."""
        rows = self.shape(ball.size)[0]
        x = np.zeros((1, rows, ball.size))
        added = self.add_scaled(x, ball[None])
        s = self.ahead(np.ascontiguousarray(x.transpose(0, 2, 1)))
        symmetrise(s)
        wrong = self.wrong * added + self.size * (2 * U * added + self.error * float(ball.max(initial=0.0)))
        return s, (wrong + 2 * U * frobenius(s)) * (1 + 16 * U) + TINY

    def shape(self, size: int) -> tuple[int, int]:
        """(m, n); size: n of the identity."""
        return (size, size) if self.array is None else self.array.shape

    def dense(self, size: int) -> np.ndarray:
        """The array written out; size: n of the identity."""
        return np.eye(size) if self.written_out is None else self.written_out

    @property
    def written_out(self) -> np.ndarray | None:
        """The array, dense; None for the identity."""
        return self.array.toarray() if sp.issparse(self.array) else self.array

    def behind(self, a: np.ndarray) -> np.ndarray:
        """a M (..., n) in plain float64, for a (..., m)."""
        if self.array is None:
            return a
        if not sp.issparse(self.array):
            return np.asarray(a @ self.array)
        flat = a.reshape(-1, a.shape[-1])
        return np.asarray((self.array.T @ flat.T).T).reshape(*a.shape[:-1], self.array.shape[1])

    def add_scaled(self, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        """x[i] += M diag(d[i]) in place, for x (N, m, n) and d (N, n); (N,) the Frobenius norms of what was added."""
        d = d.astype(x.dtype, copy=False)
        if self.array is None:
            np.einsum("nii->ni", x)[:] += d
            return frobenius(d)
        if not sp.issparse(self.array):
            added = self.array * d[:, None, :]
            x += added
            return frobenius(added)
        rows = np.repeat(np.arange(self.array.shape[0]), np.diff(self.array.indptr))
        added = self.array.data * d[:, self.array.indices]
        for i, part in enumerate(added):
            x[i, rows, self.array.indices] += part  # no entry is stored twice
        return frobenius(added)

    def _columns(self, x: np.ndarray, out: np.ndarray) -> None:
        blocks, others, rest = self._blocks
        if rest is not None:
            out[others] = rest @ x
        for rows, columns, block in blocks:
            alive()
            out[rows] = block @ x[columns]

    @cached_property
    def _blocks(self) -> tuple[list[tuple[np.ndarray, np.ndarray, np.ndarray]], np.ndarray, Any]:
        """([(rows, columns, dense block)] of rows with the same columns, the other rows, these as CSR or None).

        Rows that share their columns with few others are multiplied one by one.
        """
        m = self.array
        first, which = classes(m)
        order = np.argsort(which, kind="stable")
        ends = np.searchsorted(which[order], np.arange(first.size + 1))
        blocks, others = [], [np.zeros(0, int)]
        for begin, end in itertools.pairwise(ends):
            rows = order[begin:end]
            if rows.size < _TOGETHER:
                others.append(rows)
                continue
            own = m[rows]
            columns = np.unique(own.indices)
            blocks.append((rows, columns, np.ascontiguousarray(own[:, columns].toarray())))
        left = np.sort(np.concatenate(others))
        return blocks, left, sp.csr_array(m[left]) if left.size else None


def frobenius(s: np.ndarray) -> np.ndarray:
    """(N,) ||S||_F, rounded up; squares below the range are counted as the least number in it. 0 of float32.

    Errors are proportional to such norms, and of what is computed in float32 nothing is proved.
    """
    if s.dtype == np.float32:
        return np.zeros(len(s))
    flat = s.reshape(len(s), -1)
    lost = np.sqrt(flat.shape[1]) * 2.0**-510
    return np.sqrt(np.einsum("ni,ni->n", flat, flat)) * (1 + gamma(flat.shape[1] + 8)) + lost


def symmetrise(s: np.ndarray) -> None:
    """Replace S (N, d, d) by (S + S') / 2, in place; every entry is rounded once."""
    for m in s:
        for lo in range(0, len(m), _TILE):
            hi = lo + _TILE
            lower = (m[lo:, lo:hi] + m[lo:hi, lo:].T) / 2
            m[lo:, lo:hi] = lower
            m[lo:hi, lo:] = lower.T


def column_norms(x: np.ndarray) -> np.ndarray:
    """(N, k) 2-norms of the columns of x (N, n, k), rounded up; 0 of float32, as for `frobenius`."""
    if x.dtype == np.float32:
        return np.zeros((len(x), x.shape[2]))
    lost = np.sqrt(x.shape[1]) * 2.0**-510
    return np.sqrt(np.einsum("nij,nij->nj", x, x)) * (1 + gamma(x.shape[1] + 8)) + lost


def matrix(m: Enclosure) -> Matrix:
    """The map of an enclosure; large sparse matrices stay sparse."""
    rows, columns = m.shape
    array, error = m.with_error()
    if sp.issparse(array) and (rows * columns <= _DENSE or array.nnz > _SPARE * rows * columns):
        array = array.toarray()
    if error == 0.0 and is_identity(array):
        return Matrix(None, 0.0, 1.0, 1)
    across = sp.csr_array(array.T) if sp.issparse(array) else array.T
    terms = max(nonzeros_per_row(array), nonzeros_per_row(across))
    return Matrix(array, error, float(cheap_norm(array)) * (1 + 4 * U), terms)
