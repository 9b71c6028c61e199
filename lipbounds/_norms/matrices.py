"""Proved upper bounds of norms of matrices (NumPy arrays, scipy.sparse), rounding included.

- `verified_norm`: spectral norm of a matrix, an upper bound in real arithmetic (Gram, shifted Cholesky), dense
  or banded as `proof_plan` chooses, or by residual on an accelerator
- `induced_norm`: 1 and infinity norm, sums rounded up
- `row_norms`, `pairwise_row_norms`: vector norms of rows and of all row differences, rounded up

Inputs are taken as exact real numbers; float32 and small integers convert exactly. Entries that a sparse matrix holds
several times are the float64 sums that SciPy makes of them. NaN, infinities, complex numbers and results beyond the
float64 range raise ValueError. Verified work runs on the host in NumPy/SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp

from lipbounds._norms import banded_cholesky, cholesky, device
from lipbounds._norms.rounding import (
    U,
    add_up,
    finite,
    gamma,
    mul_up,
    require_gradual_underflow,
    sqrt_up,
    unscale_up,
    up,
)

_CHUNK = 2**22  # entries of a temporary array
_MANY_DIFFERENCES = 2.0**33  # entries of all differences of rows above which Gram matrices are used
_MOST_CLOSE = 2**16  # pairs of close rows, of some rows with all, that get differences
_NO_SCALING = 100  # |exponent| up to which squares of entries neither overflow nor lose digits


def as_matrix(a: Any) -> Any:
    """`a` as a finite float64 ndarray (2-D) or canonical csr_array, converted exactly; else ValueError."""
    matrix: Any
    values: Any
    if sp.issparse(a):
        if a.ndim != 2:
            raise ValueError(f"a matrix must have two dimensions, not {a.ndim}")
        matrix = sp.csr_array(a)
        values = matrix.data
    else:
        matrix = values = np.asarray(a)
        if matrix.ndim != 2:
            raise ValueError(f"a matrix must have two dimensions, not {matrix.ndim}")
    if values.dtype != np.float64:
        if values.dtype.kind not in "biuf" or (values.dtype.kind == "f" and values.dtype.itemsize > 8):
            raise ValueError(f"entries of type {values.dtype} do not convert to float64 exactly")
        if values.dtype.kind in "iu" and values.size and max(int(values.max()), -int(values.min())) > 2**53:
            raise ValueError("integer entries above 2**53 do not convert to float64 exactly")
        matrix = matrix.astype(np.float64)
    if sp.issparse(matrix) and not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    if not _all_finite(entries(matrix)):
        raise ValueError("the matrix has NaN or infinite entries")
    return matrix


def _all_finite(values: np.ndarray) -> bool:
    if values.size <= _CHUNK:
        return bool(np.isfinite(values).all())
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum that is finite has finite terms, and needs no array of truth values.
        return all(
            bool(np.isfinite(part.sum())) or bool(np.isfinite(part).all())
            for part in _parts(values, _CHUNK // 8)
        )


def _parts(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Blocks of about `size` entries of an array, flat where it lies in one piece."""
    if values.flags.f_contiguous and not values.flags.c_contiguous:
        values = values.T
    if values.flags.c_contiguous:
        values = values.reshape(-1)
    step = max(1, size * values.shape[0] // max(values.size, 1))
    return (values[lo : lo + step] for lo in range(0, values.shape[0], step))


def is_identity(a: Any) -> bool:
    n = a.shape[0]
    nonzero = a.nnz if sp.issparse(a) else np.count_nonzero(a)
    return a.shape == (n, n) and nonzero == n and bool((a.diagonal() == 1.0).all())


def entries(a: Any) -> np.ndarray:
    return a.data if sp.issparse(a) else a


def largest(a: Any) -> float:
    values = entries(a)
    return 0.0 if values.size == 0 else max(float(values.max()), -float(values.min()), 0.0)


def _scaled(a: Any) -> tuple[Any, int]:
    """(B, e), A = 2**e B up to underflow of entries below 2**-1022 max|b|; e = 0, B = A for usual sizes."""
    require_gradual_underflow()
    exponent = math.frexp(largest(a))[1]
    if abs(exponent) <= _NO_SCALING:
        return a, 0
    with np.errstate(under="ignore"):
        if sp.issparse(a):
            return sp.csr_array((np.ldexp(a.data, -exponent), a.indices, a.indptr), shape=a.shape), exponent
        return np.ldexp(a, -exponent), exponent


def smallest(a: Any) -> float:
    """The smallest nonzero |entry|, inf if there is none."""
    sizes = np.abs(entries(a))
    return float(sizes.min(where=sizes > 0, initial=math.inf))


# --------------------------------------------------------------------------------------- vector norms of rows


def row_norms(a: Any, q: float) -> np.ndarray:
    """Upper bounds (m,) of the q-norms of the rows of A (m, n), q in {1, 2, inf}, in real arithmetic.

    A sum of n terms >= 0 in any order is at least (1 - gamma_n) times the exact one (Higham, section 4.2).
    Rows whose largest entry is outside 2**+-100 are scaled by a power of two first. q = inf is exact.
    """
    check_order(q, (1, 2, math.inf))
    a = as_matrix(a)
    require_gradual_underflow()
    if sp.issparse(a):
        return _row_norms_sparse(a, q)
    m, n = a.shape
    out = np.zeros(m)
    if n == 0:
        return out
    step = max(1, _CHUNK // n)
    for lo in range(0, m, step):
        x = np.abs(a[lo : lo + step])
        top = x.max(axis=1)
        exponent = _exponents(top)
        if np.any(exponent):
            with np.errstate(under="ignore"):
                x = np.ldexp(x, -exponent[:, None])
        sums = None if q == math.inf else x.sum(axis=1) if q == 1 else np.einsum("ij,ij->i", x, x)
        out[lo : lo + step] = _close_rows(top, exponent, sums, n, q)
    return out


def _row_norms_sparse(a: Any, q: float) -> np.ndarray:
    out = np.zeros(a.shape[0])
    counts = np.diff(a.indptr)
    full = counts > 0
    if not np.any(full):
        return out
    starts = a.indptr[:-1][full]
    x = np.abs(a.data)
    top = np.maximum.reduceat(x, starts)
    exponent = _exponents(top)
    if np.any(exponent):
        with np.errstate(under="ignore"):
            x = np.ldexp(x, -np.repeat(exponent, counts[full]))
    sums = None if q == math.inf else np.add.reduceat(x if q == 1 else x * x, starts)
    out[full] = _close_rows(top, exponent, sums, int(counts.max()), q)
    return out


def _exponents(top: np.ndarray) -> np.ndarray:
    exponent = np.frexp(top)[1]
    return np.where(np.abs(exponent) <= _NO_SCALING, 0, exponent)


def _close_rows(
    top: np.ndarray, exponent: np.ndarray, sums: np.ndarray | None, n: int, q: float
) -> np.ndarray:
    """Sums of n terms rounded up; rows of zeros stay zero. Terms lost to underflow fall in the factor 2."""
    if sums is None:
        return top
    if q == 2:
        sums = np.sqrt(sums)
    grown = np.nextafter(sums * (1.0 + 2.0 * gamma(n + 8)), np.inf)
    return np.where(top > 0.0, unscale_up(grown, exponent), 0.0)


def frobenius_norm(a: Any) -> float:
    """An upper bound of the Frobenius norm of A in real arithmetic."""
    values = entries(a)
    if values.size > _CHUNK and values.dtype == np.float64:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            total = sum(float(np.vdot(part, part)) for part in _parts(values, _CHUNK // 8))
        if 2.0**-800 < total < 2.0**1000:  # what underflow loses of the squares is far below one rounding
            require_gradual_underflow()
            return up(sqrt_up(total) * (1.0 + 2.0 * gamma(values.size + 8)))
    rows = row_norms(a, 2)
    return float(row_norms(rows[None, :], 2)[0])


def induced_norm(a: Any, p: float, error: float = 0.0) -> float:
    """An upper bound of ||A + E||_p for p in {1, inf} and every E with ||E||_F <= error, in real arithmetic.

    p = 1 is the largest column sum of |A|, p = inf the largest row sum. ||E||_1 <= sqrt(m) ||E||_F and
    ||E||_inf <= sqrt(n) ||E||_F for E of shape (m, n).
    """
    check_order(p, (1, math.inf))
    a = as_matrix(a)
    error = finite(error, "error")
    if p == 1:
        a = cholesky.transposed(a)
    if 0 in a.shape:
        return 0.0
    return add_up(float(row_norms(a, 1).max()), mul_up(sqrt_up(a.shape[1]), error))


def pairwise_row_norms(rows: Any, q: float, error: float | np.ndarray = 0.0) -> np.ndarray:
    """Symmetric (K, K) upper bounds of ||(R_i + E_i) - (R_j + E_j)||_q, zero diagonal, q in {1, 2, inf}.

    `rows` R is (K, n); `error` bounds ||E||_F, or, as an array (K,), each ||E_i||_2. For q = 2 and inf it
    adds e_i + e_j (sqrt(2) error where it is a scalar), for q = 1 sqrt(n) times that. Differences are formed
    entry by entry, each within one rounding. Beside R there is a buffer of 2 MB and the result; no (K, K, n) array
    exists. The Gram matrix cancels below the truth: for many long rows and q = 2 it is used with its rounding added
    (`_pairs_by_gram`), and pairs of close rows still get differences.
    """
    check_order(q, (1, 2, math.inf))
    r = cholesky.dense_array(as_matrix(rows))
    count, n = r.shape
    allowance = _pair_errors(error, count, n, q)
    scaled, exponent = _scaled(r)
    if q == 2 and float(count) ** 2 * n > _MANY_DIFFERENCES:
        out = _pairs_by_gram(r, scaled, exponent)
    else:
        out = _pairs_by_differences(r, scaled, exponent, q)
    if np.any(allowance):
        out = np.nextafter(out + allowance, np.inf)
        if not np.all(np.isfinite(out)):
            raise ValueError("the bound is above the range of float64; rescale the problem")
    out = np.triu(out, 1)
    return out + out.T


def _pairs_by_gram(r: np.ndarray, scaled: np.ndarray, exponent: int) -> np.ndarray:
    """The upper triangle for q = 2 through Gram matrices of some rows at a time.

    Computed inner products s_ij err by at most gamma_n ||r_i|| ||r_j||, so with sizes N_i >= ||r_i||
        ||r_i - r_j||^2 <= fl(s_ii + s_jj - 2 s_ij) + (gamma_n + 6 U) (N_i + N_j)^2 + 2^-900.
    Where the added term is more than 2e-9 of the result, the difference is formed, of the unscaled rows where it is
    so small that it may have underflowed.
    """
    count, n = scaled.shape
    out = np.zeros((count, count))
    sizes = row_norms(scaled, 2)
    squares = np.einsum("ij,ij->i", scaled, scaled)
    share = 2.0 * gamma(n) + 8.0 * U
    height = max(1, min(256, int(1e10 / (2.0 * count * max(n, 1)))))
    for lo in range(0, count, height):
        hi = min(lo + height, count)
        product = scaled[lo:hi] @ scaled[lo:].T
        distance = np.maximum((squares[lo:hi, None] + squares[None, lo:]) - 2.0 * product, 0.0)
        added = share * np.square(sizes[lo:hi, None] + sizes[None, lo:]) + 2.0**-900
        near = np.argwhere(added > 2e-9 * distance)
        distance += added
        roots = np.sqrt(distance * (1.0 + 8.0 * U)) * (1.0 + 4.0 * U)
        near = near[near[:, 1] > near[:, 0]][:_MOST_CLOSE]
        for start in range(0, len(near), 256):
            i, j = near[start : start + 256].T
            roots[i, j] = np.minimum(roots[i, j], _difference_norms(scaled[lo + i], scaled[lo + j]))
        tiny = near[roots[near[:, 0], near[:, 1]] < 2.0**-300] if exponent else near[:0]
        out[lo:hi, lo:] = unscale_up(np.where(roots > 0.0, np.nextafter(roots, np.inf), 0.0), exponent)
        for start in range(0, len(tiny), 256):
            i, j = lo + tiny[start : start + 256].T
            out[i, j] = _difference_norms(r[i], r[j])
    return out


def _difference_norms(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper bounds of the 2-norms of the rows of A - B; the difference of two floats is rounded once."""
    found = row_norms(a - b, 2)
    return np.asarray(np.nextafter(found * (1.0 + 4.0 * U), np.inf) * (found > 0.0))


def _pairs_by_differences(r: np.ndarray, scaled: np.ndarray, exponent: int, q: float) -> np.ndarray:
    """The upper triangle from all differences."""
    count, n = r.shape
    out = np.zeros((count, count))
    width, height = min(max(n, 1), 2048), 128
    buffer = np.empty((height, width))
    for i in range(count - 1):
        for lo in range(i + 1, count, height):
            hi = min(lo + height, count)
            total = np.zeros(hi - lo)
            for c in range(0, n, width):
                d = buffer[: hi - lo, : min(width, n - c)]
                np.subtract(scaled[lo:hi, c : c + width], scaled[i, c : c + width], out=d)
                if q == 2:
                    total += np.einsum("ij,ij->i", d, d)
                else:
                    np.abs(d, out=d)
                    total = total + d.sum(axis=1) if q == 1 else np.maximum(total, d.max(axis=1))
            size = np.sqrt(total) if q == 2 else total
            values = unscale_up(np.nextafter(size * (1.0 + 2.0 * gamma(n + 8)), np.inf), exponent)
            # Scaling or squaring may have underflowed in tiny sums: these are computed one by one, unscaled.
            for j in np.flatnonzero(total < 2.0**-600):
                gap = r[lo + j] - r[i]
                values[j] = mul_up(float(row_norms(gap[None, :], q)[0]), 1.0 + 4.0 * U)
            out[i, lo:hi] = values
    return out


def _pair_errors(error: float | np.ndarray, count: int, n: int, q: float) -> np.ndarray:
    root = sqrt_up(n) if q == 1 else 1.0
    if np.ndim(error) == 0:
        return np.full((count, count), mul_up(sqrt_up(2.0), finite(float(error), "error"), root))
    each = np.asarray(error, dtype=np.float64)
    if each.shape != (count,):
        raise ValueError(f"error has shape {each.shape}, expected a number or ({count},)")
    for e in each:
        finite(float(e), "error")
    total = each[:, None] + each[None, :]
    return np.where(total > 0.0, np.nextafter(np.nextafter(total, np.inf) * root, np.inf), 0.0)


def check_order(q: float, allowed: tuple[float, ...]) -> None:
    if q not in allowed:
        raise ValueError(f"norm {q!r} is not one of {allowed}")


# ---------------------------------------------------------------------------------------------- spectral norm


def wide(a: Any) -> Any:
    """A or its transpose, whichever has the smaller side first (CSR where sparse)."""
    return a if a.shape[0] <= a.shape[1] else cholesky.transposed(a)


def proof_plan(a: Any) -> banded_cholesky.Plan:
    """How `verified_norm` proves ||A||_2: dense or banded, the bytes of all its arrays and its operations.

    The cheapest proof, by a rule of sizes and patterns (no wall time).
    """
    return banded_cholesky.choose(wide(as_matrix(a)), None)


def _ceiling(b: Any) -> tuple[float, float]:
    """(an upper bound of ||B||_2**2 from sums of absolute values, the float value of max(|B| (|B|' 1)))."""
    if entries(b).size <= _CHUNK:
        column, row, whole = induced_norm(b, 1), induced_norm(b, math.inf), frobenius_norm(b)
        return min(mul_up(column, row), mul_up(whole, whole)), cholesky.absolute_gram_norm(b)
    absolute_gram, column, row = cholesky.absolute_sums(b)
    grown = 1.0 + 2.0 * gamma(sum(b.shape) + 8)
    return min(up(up(column * grown) * up(row * grown)), mul_up(*[frobenius_norm(b)] * 2)), absolute_gram


def verified_norm(
    a: Any,
    error: float = 0.0,
    start: float | None = None,
    plan: banded_cholesky.Plan | None = None,
    estimate: Callable[[], float] | None = None,
) -> float:
    """An upper bound s >= ||A + E||_2 in real arithmetic, for every E with ||E||_2 <= error.

    A is (m, n), dense or scipy.sparse. It is scaled by a power of two, and a completed Cholesky factorisation
    of s**2 I - G - c I, G the Gram matrix on the smaller side, with the shift c of `lipbounds._norms.cholesky` proves
    the bound; s is raised until that succeeds, and never exceeds sqrt(||A||_1 ||A||_inf) or ||A||_F. Usually
    one factorisation is needed. Where G has a narrow band in some order of its rows (convolutions, pooling,
    their products), it is never formed as a whole: `banded_cholesky`. With r the smaller side, k the most
    nonzeros in a row of it and w the bandwidth, the slack is about (r + k/4) r U relative for the dense proof
    (1e-9 at r = 3000) and (2 w + k/4) w U for the banded one.

    Args:
        a: the matrix. Memory beside it: r**2 doubles and a block of 1024 rows, or about 1.3 w**2 doubles and
            copies of A (`proof_plan`).
        error: bound of the norm of what is missing from A, in the units of A.
        start: a guess of ||A||_2 (say, from an earlier run); it saves the Lanczos estimate. Any positive
            value is safe; one that is too large may make the result that large, one too small costs another
            factorisation.
        plan: from `proof_plan` for this matrix; None chooses without a limit of memory.
        estimate: gives an estimate of ||A||_2 at a lower cost than products with A; any value is safe, as for `start`.

    Raises:
        ValueError: NaN, infinite, complex or non-matrix input, a bad `error` or `start`, a bound beyond
        float64. RuntimeError: the process flushes denormal numbers to zero.
    """
    a = as_matrix(a)
    error = finite(error, "error")
    if start is not None and not 0.0 < start < math.inf:
        raise ValueError(f"start is {start}, not a finite number > 0")
    if 0 in a.shape or largest(a) == 0.0:
        return error
    b, exponent = _scaled(a)
    b = wide(b)
    ceiling, absolute_gram = _ceiling(b)
    guess = 0.0
    if start is not None:
        with np.errstate(over="ignore", under="ignore"):
            guess = min(float(np.ldexp(start, -exponent)), 2.0**400) ** 2

    def known() -> float:
        assert estimate is not None
        return min(math.ldexp(estimate(), -exponent), 2.0**400) ** 2

    if plan is None:
        plan = banded_cholesky.choose(b, None)
    t = device.norm_bound_of(b, plan.flops)
    k = cholesky.nonzeros_per_row(b)
    if t is not None:
        t = min(t, ceiling)
    elif plan.way == "banded":
        banded = banded_cholesky.BandedCholesky(b, k, absolute_gram, plan)
        t = cholesky.certify(banded, guess, ceiling, banded.estimate if estimate is None else known)
    else:
        g = cholesky.gram(b)
        dense = cholesky.ShiftedCholesky(g, k, b.shape[1], absolute_gram)
        t = cholesky.certify(dense, guess, ceiling, lambda: cholesky.estimate_gram_norm(g, b))
    s = up(sqrt_up(t))  # the second step covers entries lost in the scaling
    return add_up(float(unscale_up(s, exponent)), error)
