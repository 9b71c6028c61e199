"""Enclosures: matrices known up to a normwise error, which `multiply`, `add`, `scale` and `stack` propagate."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from lipbounds._norms import banded_cholesky, cholesky
from lipbounds._norms.matrices import (
    as_matrix,
    check_order,
    entries,
    frobenius_norm,
    induced_norm,
    largest,
    pairwise_row_norms,
    row_norms,
    smallest,
    verified_norm,
    wide,
)
from lipbounds._norms.rounding import (
    UNDERFLOW,
    U,
    add_up,
    finite,
    gamma,
    mul_up,
    require_gradual_underflow,
    sqrt_up,
)
from lipbounds._text.progress import alive


@dataclass(frozen=True, eq=False)
class Enclosure:
    """The set of matrices {M + E : ||E||_F <= error}; M a float64 ndarray or csr_array.

    It contains the exact result of a rounded product. `error` is in the units of M. ValueError where M or error is not
    finite.

    M alone proves nothing about the exact matrix, so it cannot be read alone. A proof uses `with_error` and accounts
    for the error; `exact_or_none` and `support` hold for every member; a choice whose consequences are proved later (an
    optimiser, a heuristic) uses `midpoint_for_search`.
    """

    _midpoint: Any
    error: float = 0.0

    __array_ufunc__ = None  # NumPy must not treat an enclosure as an array

    def __post_init__(self) -> None:
        object.__setattr__(self, "_midpoint", as_matrix(self._midpoint))
        object.__setattr__(self, "error", finite(self.error, "error"))

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("an enclosure is a set of matrices, not one: take with_error() or exact_or_none()")

    @property
    def shape(self) -> tuple[int, int]:
        return self._midpoint.shape

    @property
    def sparse(self) -> bool:
        return bool(sp.issparse(self._midpoint))

    @property
    def stored(self) -> int:
        """How many entries of M are stored."""
        return int(entries(self._midpoint).size)

    @cached_property
    def size(self) -> float:
        """A bound of ||M||_F."""
        return frobenius_norm(self._midpoint)

    @cached_property
    def least(self) -> float:
        """The smallest nonzero |entry| of M, inf if there is none."""
        return smallest(self._midpoint)

    @property
    def T(self) -> Enclosure:
        return Enclosure(cholesky.transposed(self._midpoint), self.error)

    def with_error(self) -> tuple[Any, float]:
        """(M, error), for a proof that accounts for the error."""
        return self._midpoint, self.error

    def exact_or_none(self) -> Any:
        """The real matrix, if it is known; else None."""
        return self._midpoint if self.error == 0.0 else None

    def midpoint_for_search(self) -> Any:
        """M, for heuristic choices only: nothing may be proved from it."""
        return self._midpoint

    def support(self, axis: int) -> np.ndarray:
        """Which columns (axis 0) or rows (axis 1) are not zero in every member."""
        if self.error > 0.0:
            return np.ones(self.shape[1 - axis], bool)
        return np.asarray((self._midpoint != 0).sum(axis=axis)).reshape(-1) > 0

    def select(self, rows: Any = None, cols: Any = None) -> Enclosure:
        """The enclosure of some rows and columns, by slices or indices; rows and columns may be repeated."""
        matrix, error = self._midpoint, self.error
        for axis, chosen in enumerate((rows, cols)):
            if chosen is None:
                continue
            matrix = matrix[chosen] if axis == 0 else matrix[:, chosen]
            if error and not isinstance(chosen, slice):
                index = np.asarray(chosen)
                most = 1 if index.dtype == bool else int(np.bincount(index % self.shape[axis]).max(initial=0))
                error = mul_up(sqrt_up(float(most)) if most > 1 else 1.0, error)
        return Enclosure(matrix if sp.issparse(matrix) else np.ascontiguousarray(matrix), error)

    def dense(self) -> Enclosure:
        return Enclosure(self._midpoint.toarray(), self.error) if self.sparse else self


def cheap_norm(a: Any) -> float:
    """An upper bound of || |A| ||_2, hence of ||A||_2: min(sqrt(||A||_1 ||A||_inf), ||A||_F)."""
    column, row = sqrt_up(induced_norm(a, 1)), sqrt_up(induced_norm(a, math.inf))
    return min(mul_up(column, row), frobenius_norm(a))


_PATIENCE = 0.5  # estimated seconds of one product of sparse matrices
_SCANNED = 2**20  # entries of an inexact matrix up to which they are read to tell whether products underflow


class Factor:
    """A matrix A as the left factor of rounded products, with what `multiply` needs to know of it, found once.

    Attributes:
        nonzeros: at least the most nonzero products in one entry of A x.
        smallest: the smallest nonzero |entry|.
        absolute_norm: a bound of || |A| ||_2.
    """

    def __init__(self, matrix: Any) -> None:
        self._matrix = as_matrix(matrix)
        self.shape: tuple[int, int] = self._matrix.shape

    @property
    def matrix(self) -> Any:
        """A, finite float64, dense or CSR."""
        return self._matrix

    @cached_property
    def nonzeros(self) -> int:
        return cholesky.nonzeros_per_row(self.matrix)

    @cached_property
    def smallest(self) -> float:
        return smallest(self.matrix)

    @cached_property
    def absolute_norm(self) -> float:
        return cheap_norm(self.matrix)

    @cached_property
    def _one_each(self) -> bool:
        """Whether every row has one entry, as a product with a diagonal does."""
        a = self.matrix
        return bool(sp.issparse(a) and a.nnz == a.shape[0] and (np.diff(a.indptr) == 1).all())

    @cached_property
    def _diagonal(self) -> bool:
        a = self.matrix
        return bool(a.shape[0] == a.shape[1] and np.array_equal(a.indices, np.arange(a.shape[0])))

    def product(self, x: np.ndarray) -> np.ndarray:
        """fl(A x) for a vector or the columns of a dense x."""
        a = self.matrix
        if not self._one_each:
            return a @ x
        return a.data.reshape(-1, *[1] * (x.ndim - 1)) * (x if self._diagonal else x[a.indices])

    def times(self, b: Any) -> Any:
        """fl(A B), dense or CSR, by the cheaper of the dense and the sparse way; dense only where below 2 GB."""
        a = self.matrix
        if not sp.issparse(a) and not sp.issparse(b):
            return a @ b
        (rows, inner), cols = a.shape, b.shape[1]
        dense = 2.0 * rows * inner * cols / 4e10 + 4e-9 * (rows * inner + inner * cols)
        if sp.issparse(a) and sp.issparse(b):
            per_row = np.diff(b.indptr).astype(float)
            sparse = float(np.bincount(a.indices, minlength=inner).astype(float) @ per_row) / 1.5e8
        else:
            sparse = (a.nnz * cols if sp.issparse(a) else b.nnz * rows) / 1e9
        if dense < sparse and 8 * (rows * inner + inner * cols + rows * cols) < 2**31:
            a, b = map(cholesky.dense_array, (a, b))
        parts = max(1, min(int(sparse / _PATIENCE), rows))
        if not sp.issparse(a) or not sp.issparse(b) or parts == 1:
            return _tidy(a @ b)
        # an interruption is answered between the parts
        ends = np.linspace(0, rows, parts + 1).astype(np.int64)
        products = []
        for lo, hi in itertools.pairwise(ends):
            alive()
            products.append(a[lo:hi] @ b)
        return _tidy(sp.csr_array(sp.vstack(products, format="csr")))


def multiply(a: Any, m: Enclosure, relerr: float = 0.0, norm: float | None = None) -> Enclosure:
    """An enclosure of A_true M_true for M_true in `m` and |A_true - A| <= relerr |A| entrywise; A a matrix or `Factor`.

    With k the most nonzero terms of one inner product, e the error of `m` and N >= || |A| ||_2
    (`Factor.absolute_norm`),
        e' = (1 + relerr) N e + (gamma_k + relerr) N ||M||_F + k sqrt(rows cols) 2**-1022,
    since || |A| |M| ||_F <= || |A| ||_2 ||M||_F. `norm`, a proved bound of ||A_true||_2, replaces (1 +
    relerr) N in the first term: without it errors grow by N instead of ||A||_2 for each factor. The product
    is sparse while that is cheaper and its density is at most 1/4.
    """
    relerr = finite(relerr, "relerr")
    a = a if isinstance(a, Factor) else Factor(a)
    if a.shape[1] != m.shape[0]:
        raise ValueError(f"cannot multiply {a.shape} by {m.shape}")
    rows, cols = a.shape[0], m.shape[1]
    if 0 in (rows, cols, a.shape[1]):
        return Enclosure(np.zeros((rows, cols)))
    require_gradual_underflow()
    k = a.nonzeros
    scanned = m.sparse or m.stored <= _SCANNED
    if scanned:
        k = min(k, cholesky.nonzeros_per_row(cholesky.transposed(m._midpoint)))
    grown = add_up(1.0, relerr)
    carried = mul_up(finite(norm, "norm") if norm is not None else mul_up(grown, a.absolute_norm), m.error)
    rounding = mul_up(add_up(gamma(k), relerr), a.absolute_norm, m.size)
    underflow = 0.0
    if not scanned or not _stay_normal(a.smallest, m.least):
        underflow = mul_up(float(k), sqrt_up(float(rows) * float(cols)), UNDERFLOW)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        product = a.times(m._midpoint)
    return Enclosure(product, add_up(carried, rounding, underflow))


def _stay_normal(*smallest: float) -> bool:
    """Whether no product of two matrices' nonzero entries is below the normal range (zeros are exact)."""
    return math.inf in smallest or math.prod(smallest) >= 2 * UNDERFLOW


def _tidy(a: Any) -> Any:
    if sp.issparse(a) and (a.shape[0] * a.shape[1] <= 2**16 or a.nnz > 0.25 * a.shape[0] * a.shape[1]):
        return a.toarray()
    return a


def add(*terms: Enclosure) -> Enclosure:
    """An enclosure of the sum; each floating-point addition errs by at most U |result| entrywise."""
    if not terms:
        raise ValueError("nothing to add")
    if len(terms) == 1:
        return terms[0]
    total, error = terms[0]._midpoint, terms[0].error
    for term in terms[1:]:
        if term.shape != total.shape:
            raise ValueError(f"cannot add {total.shape} and {term.shape}")
        with np.errstate(over="ignore"):
            total = as_matrix(_tidy(total + term._midpoint))
        error = add_up(error, term.error, mul_up(U, frobenius_norm(total)))
    return Enclosure(total, error)


def scale(m: Enclosure, rows: Any = None, cols: Any = None) -> Enclosure:
    """An enclosure of diag(rows) M_true diag(cols), the factors exact.

    Each side gives e' = max|d| e + U ||result||_F + sqrt(m n) 2**-1022; factors that are zero or powers of two
    (slopes of 1/2) are not rounded, and the second term is left out; the last one where no product can underflow.
    Factors of one return the enclosure itself.
    """
    matrix, error = m._midpoint, m.error
    for axis, factors in enumerate((rows, cols)):
        if factors is None:
            continue
        d = as_matrix(np.atleast_2d(factors))[0]
        if d.shape != (matrix.shape[axis],):
            raise ValueError(f"{d.size} factors for a side of {matrix.shape[axis]}")
        if (d == 1.0).all():
            continue
        exact = bool(np.isin(np.abs(np.frexp(d)[0]), (0.0, 0.5)).all())
        # What underflow loses is added without a look at the entries of a large matrix.
        scanned = sp.issparse(matrix) or matrix.size <= _SCANNED
        safe = scanned and _stay_normal(smallest(matrix), smallest(d))
        with np.errstate(over="ignore", under="ignore"):
            if sp.issparse(matrix) and (d == 0.0).any():  # rows or columns of zeros are not stored
                matrix = as_matrix(sp.diags_array(d) @ matrix if axis == 0 else matrix @ sp.diags_array(d))
            elif sp.issparse(matrix):
                each = np.repeat(d, np.diff(matrix.indptr)) if axis == 0 else d[matrix.indices]
                parts = matrix.data * each, matrix.indices, matrix.indptr
                matrix = sp.csr_array(parts, shape=matrix.shape)
            else:
                matrix = matrix * (d[:, None] if axis == 0 else d)
        lost = 0.0 if safe else mul_up(sqrt_up(float(matrix.shape[0]) * float(matrix.shape[1])), UNDERFLOW)
        rounding = 0.0 if exact and (safe or not scanned) else mul_up(U, frobenius_norm(matrix))
        error = add_up(mul_up(largest(np.abs(d)), error), rounding, lost)
    return Enclosure(matrix, error)


def stack(blocks: list[Enclosure], axis: int = 0) -> Enclosure:
    """The enclosure of the blocks below (axis 0) or beside (axis 1) each other; errors add in squares."""
    if not blocks or axis not in (0, 1):
        raise ValueError("stack needs at least one block and axis 0 or 1")
    parts = [b._midpoint for b in blocks]
    joined: Any
    if all(sp.issparse(p) for p in parts):
        joined = sp.csr_array((sp.hstack if axis else sp.vstack)(parts, format="csr"))
    else:
        joined = np.concatenate([cholesky.dense_array(p) for p in parts], axis=axis)
    return Enclosure(joined, frobenius_norm(np.array([[b.error for b in blocks]])))


def enclosure_plan(m: Enclosure, memory: int | None = None) -> banded_cholesky.Plan:
    """`proof_plan` of the midpoint: a plan proves nothing."""
    return banded_cholesky.choose(wide(m._midpoint), memory)


def enclosure_norm(m: Enclosure, p: float = 2, start: float | None = None) -> float:
    """An upper bound of ||M_true||_p, p in {1, 2, inf}, for every M_true in the enclosure."""
    check_order(p, (1, 2, math.inf))
    return verified_norm(m._midpoint, m.error, start) if p == 2 else induced_norm(m._midpoint, p, m.error)


def enclosure_cheap_norm(m: Enclosure) -> float:
    """An upper bound of ||M_true||_2 without a factorisation: `cheap_norm` and the error."""
    return add_up(cheap_norm(m._midpoint), m.error)


def enclosure_row_norms(m: Enclosure, q: float) -> np.ndarray:
    """`row_norms` (m,) of every M_true in the enclosure."""
    found = row_norms(m._midpoint, q)
    if m.error == 0.0:
        return found
    slack = mul_up(sqrt_up(m.shape[1]) if q == 1 else 1.0, m.error)
    return np.asarray(np.nextafter(found + slack, np.inf))


def enclosure_pair_norms(m: Enclosure, q: float) -> np.ndarray:
    """`pairwise_row_norms` (m, m) of every M_true in the enclosure."""
    return pairwise_row_norms(m._midpoint, q, m.error)
