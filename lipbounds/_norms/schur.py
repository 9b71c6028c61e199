"""Schur complements C' M^-1 C bounded from above, in blocks of rows, every rounding included.

M (a, a) is a symmetric matrix of floats and lambda > 0 a proved lower bound of its eigenvalues (`proves_floor`); the
matrix that matters may differ from it by `wrong_m` in the 2-norm, and C (a, k) by `wrong_c` in the Frobenius norm.
L is the computed Cholesky factor and F the computed solution of L F = C. Whatever the order of the sums,

    L L' = M + E,    ||E||_2 <= e = `cholesky_shift`(a) max m_ii              (Higham, Theorems 10.3 and 10.7)
    L F  = C + R,    |R| <= gamma_{a+2} |L| |F|,  ||R||_F <= gamma_{a+2} ||L||_F ||F||_F    (Higham, Theorem 8.5)

so with N = L L', d = e + wrong_m and rho = ||R||_F + wrong_c

    M_true^-1 <= (1 + d / (lambda - d)) N^-1,      N >= (lambda - e) I,
    C_true' N^-1 C_true <= F'F + (2 ||F||_F rho / sqrt(lambda - e) + rho^2 / (lambda - e)) I.

As in `cholesky`, BLAS is taken to form ordinary inner products and to solve triangular systems by substitution; a
kernel that multiplies by reciprocal pivots rounds once more, which the factors 2 cover.

Work of the factor and the solution, a^3 / 3 + a^2 k, and of F'F, a k^2, runs in blocks that take less than about half
a second each up to a = k = 8192, so that an interruption is answered between two of them.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import get_blas_funcs, get_lapack_funcs

from lipbounds._norms.cholesky import TINY
from lipbounds._norms.rounding import U, gamma
from lipbounds._text.progress import alive

_ROWS = 256  # of a block of the factor
_SQUARE = 512  # rows of a block of F'F


def cholesky_shift(n: int) -> float:
    """c such that a completed Cholesky factorisation of M (n, n) obeys ||L L' - M||_2 <= c max m_ii.

    |E_ij| <= g sqrt(m_ii m_jj) with g = gamma_{n+1} / (1 - gamma_{n+1}) (Demmel; Higham, Theorem 10.3), so |x'E x| <=
    g (sum sqrt(m_ii) |x_i|)^2 <= g n sum m_ii x_i^2. The factor 2 covers the rounding of the shift itself and kernels
    that multiply by reciprocal pivots.
    """
    return 2.0 * (n + 4) * U * n


def factorise(m: np.ndarray) -> bool:
    """Overwrite the lower triangle of M (C order, it alone is read) by its Cholesky factor; False if there is none.

    float64, or float32 for a search.
    """
    n, potrf, trsm = len(m), get_lapack_funcs("potrf", (m,)), get_blas_funcs("trsm", (m,))
    for lo in range(0, n, _ROWS):
        alive()
        hi = min(lo + _ROWS, n)
        panel = m[lo:, lo:hi]
        if lo:
            panel -= m[lo:, :lo] @ m[lo:hi, :lo].T
        # rows of C order are columns of LAPACK's: the lower triangle is the upper one of its transpose
        factor, info = potrf(panel[: hi - lo].T, lower=0, clean=0)
        pivots = factor.diagonal()
        if info != 0 or not (np.isfinite(pivots).all() and (pivots > 0.0).all()):
            return False
        panel[: hi - lo] = factor.T
        if hi < n:
            panel[hi - lo :] = trsm(1.0, factor, panel[hi - lo :].T, side=0, lower=0, trans_a=1).T
    return True


def proves_floor(m: np.ndarray, least: float) -> bool:
    """True only if M >= least I, M symmetric (its lower triangle is read) and taken as exact; False proves nothing.

    Entries of M are at most about 1. The proof is that of `cholesky`, on M - least I, in float64. For the search there
    are float32 matrices, too: of those True proves nothing.
    """
    n, d = len(m), m.diagonal()
    if not np.isfinite(d).all():
        return False
    pivots = d - least - (cholesky_shift(n) * d + 4.0 * U * (np.abs(d) + least) + n * TINY)
    if not (pivots > 0.0).all():
        return False
    work = np.array(m, order="C")
    work.flat[:: n + 1] = pivots
    return factorise(work)


def schur_complement(
    m: np.ndarray, c: np.ndarray, *, floor: float, wrong_m: float, wrong_c: float
) -> tuple[np.ndarray, float] | None:
    """(Z, e): C' M^-1 C <= Z + e I for all symmetric M and all C within the errors of those given; None without proof.

    Args:
        m: (a, a), entries up to about 1, its lower triangle is read; overwritten.
        c: (a, k) in C order; overwritten.
        floor: lambda > 0 with M >= lambda I, proved.
        wrong_m: 2-norm of the error of M; wrong_c: Frobenius norm of that of C.

    Z (k, k) is symmetric. None where M has no factor in floats or lambda is within the rounding.
    """
    n, k = c.shape
    if not np.isfinite(m.diagonal()).all() or m.diagonal().min(initial=1.0) < 0.0:
        return None
    slack = cholesky_shift(n) * float(m.diagonal().max(initial=0.0)) + n * n * TINY
    length_l = float(np.sqrt(m.diagonal().sum())) * (1 + gamma(n + 8))  # ||l_i||^2 <= m_ii / (1 - g)
    off = slack + wrong_m
    if not off < floor / 4 or not factorise(m):
        return None
    solve(m, c)
    length = float(np.sqrt(np.einsum("ij,ij->", c, c))) + n * k * TINY
    rest = (2 * gamma(n + 4) * length_l * length + n * k * TINY) * (1 + gamma(n * k + n * n + 16)) + wrong_c
    grown = 1.0 + off / (floor - off) * (1 + 16 * U)
    z = gram(c, grown)
    margin = (floor - slack) * (1 - 8 * U)
    extra = 2 * length * rest / np.sqrt(margin) + rest * rest / margin
    rounding = (2 * gamma(n + 8) + 4 * U) * length * length + n * k * TINY
    e = (grown * extra + grown * rounding) * (1 + gamma(n * k + 64))
    return (z, float(e)) if np.isfinite(e) else None


def solve(factor: np.ndarray, c: np.ndarray) -> None:
    """Overwrite C (n, k) by L^-1 C, L the lower triangle of `factor`."""
    n, trsm = len(c), get_blas_funcs("trsm", (c,))
    for lo in range(0, n, _ROWS):
        alive()
        hi = min(lo + _ROWS, n)
        rows = c[lo:hi]
        if lo:
            rows -= factor[lo:hi, :lo] @ c[:lo]
        # L X = R is X' L' = R', and L' is what LAPACK reads of a C array; the side is swapped with the order
        corner = factor[lo:hi, lo:hi]
        c[lo:hi] = trsm(1.0, corner.T, rows.T, side=1, lower=0, trans_a=0).T


def solve_back(factor: np.ndarray, c: np.ndarray) -> None:
    """Overwrite C (n, k) by L'^-1 C, L the lower triangle of `factor`."""
    n, trsm = len(c), get_blas_funcs("trsm", (c,))
    for lo in reversed(range(0, n, _ROWS)):
        alive()
        hi = min(lo + _ROWS, n)
        rows = c[lo:hi]
        if hi < n:
            rows -= factor[hi:, lo:hi].T @ c[hi:]
        c[lo:hi] = trsm(1.0, factor[lo:hi, lo:hi].T, rows.T, side=1, lower=0, trans_a=1).T


def gram(f: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """factor F'F (k, k), both triangles equal."""
    k = f.shape[1]
    z = np.empty((k, k), f.dtype)
    for lo in range(0, k, _SQUARE):
        alive()
        hi = min(lo + _SQUARE, k)
        rows = f[:, lo:hi].T @ f[:, :hi]
        if factor != 1.0:
            rows *= factor
        corner = np.tril(rows[:, lo:], -1)
        rows[:, lo:] = corner + corner.T + np.diag(rows[:, lo:].diagonal())
        z[lo:hi, :hi] = rows
        z[:lo, lo:hi] = rows[:, :lo].T
    return z
