"""The proof behind a verified spectral norm: Gram matrix, rounding shift, Cholesky.

Let B be r x n (r the smaller side), k the largest number of nonzeros in a row, G the computed B B', t > 0. If
LAPACK's Cholesky of fl(t I - G - c I) runs to completion with c = `rounding_shift(...)`, then t I - B B' is
positive semidefinite, that is ||B||_2 <= sqrt(t). Three roundings enter c:

- the Gram: |G - B B'| <= gamma_k |B| |B|' entrywise in any summation order, so its 2-norm is at most
  gamma_k max(|B| (|B|' 1)) (zeros add no rounding, hence k and not n);
- the Cholesky: completion proves lambda_min(M) >= -gamma_{r+1} / (1 - gamma_{r+1}) trace(M) for the
  floating-point matrix M it was given (Demmel; Higham, Theorem 10.3 and 10.7; Rump, BIT 46 (2006) 433-452);
- the diagonal t - g_ii - c, two roundings each.

All constants carry a factor 2, which covers the rounding of c itself and kernels that multiply by reciprocal
pivots.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from scipy.linalg.blas import dtrsm
from scipy.linalg.lapack import dpotrf

from lipbounds._norms.rounding import U
from lipbounds._text.progress import alive

TINY = 2.0**-800
"""Covers every underflow in a Gram or Cholesky step of matrices with 2**-100 <= max|a| <= 2**100."""

BLOCK = 1024  # rows of a dense block
_SMALL = 2**22
_CALL = 2e10  # operations of one call to BLAS, less than a second
DENSE_FLOPS = 4e10  # operations per second, estimated
SPARSE_FLOPS = 1.5e8
_EXACT_EIGENVALUES = 192


def transposed(a: Any) -> Any:
    """The transpose, CSR where sparse."""
    return a.T.tocsr() if sp.issparse(a) else a.T


def dense_array(a: Any) -> Any:
    """The matrix as an ndarray."""
    return a.toarray() if sp.issparse(a) else a


def rounding_shift(
    r: int,
    k: int,
    n: int,
    t: float,
    diagonal: np.ndarray,
    absolute_gram: float,
    band: int | None = None,
) -> float:
    """The shift c of the module docstring; `absolute_gram` is the computed max(|B| (|B|' 1)).

    With `band`, g_ij = 0 for |i - j| > band, and the Cholesky respects it (`banded_cholesky`).
    """
    size = np.abs(diagonal)
    gram = 2.0 * (k + 3) * U * absolute_gram + 4.0 * r * n * TINY
    terms, weight = r, r * t + float(size.sum())
    if band is not None:
        terms, weight = min(r, band + 1), min(weight, (2.0 * band + 1.0) * (t + float(size.max())))
    cholesky = 2.0 * (terms + 4) * U * weight + r * r * TINY
    diagonal_rounding = 4.0 * U * (t + float(size.max()))
    return gram + cholesky + diagonal_rounding


def nonzeros_per_row(b: Any) -> int:
    """The largest number of nonzero (stored) entries in a row."""
    if b.shape[0] == 0 or b.shape[1] == 0:
        return 0
    if sp.issparse(b):
        return int(np.diff(b.indptr).max())
    return max(int(np.count_nonzero(b[i : i + BLOCK], axis=1).max()) for i in range(0, b.shape[0], BLOCK))


def absolute(b: Any) -> Any:
    """|B| entrywise, dense or CSR."""
    return sp.csr_array((np.abs(b.data), b.indices, b.indptr), shape=b.shape) if sp.issparse(b) else np.abs(b)


def absolute_gram_norm(b: Any) -> float:
    """max(|B| (|B|' 1)) in float64, dense in row blocks."""
    return absolute_sums(b)[0]


def absolute_sums(b: Any) -> tuple[float, float, float]:
    """(max(|B| (|B|' 1)), largest column sum and largest row sum of |B|) in float64, dense in row blocks."""
    blocks = [b] if sp.issparse(b) else [b[i : i + BLOCK] for i in range(0, b.shape[0], BLOCK)]
    columns = np.zeros(b.shape[1])
    most = 0.0
    for block in blocks:
        sizes = absolute(block)
        columns += sizes.T @ np.ones(block.shape[0])
        most = max(most, float(np.max(sizes @ np.ones(b.shape[1]))))
    return max(float(np.max(absolute(block) @ columns)) for block in blocks), float(columns.max()), most


def gram(b: Any) -> np.ndarray:
    """The full r x r array B B' (C order, both triangles); each entry is a float64 inner product.

    Sparse B: scipy's sparse product, or dense products of row blocks restricted to the columns that both
    touch, by estimated cost. Beside the result it holds one dense row block (1024 x its nonempty columns).
    """
    if not sp.issparse(b):
        return np.ascontiguousarray(b @ b.T) if b.shape[0] ** 2 * b.shape[1] <= _CALL else _gram_dense(b)
    r, n = b.shape
    if r * n <= _SMALL:
        dense = b.toarray()
        return np.ascontiguousarray(dense @ dense.T)
    starts = list(range(0, r, BLOCK))
    touched = np.zeros((len(starts), n), dtype=bool)
    for i, lo in enumerate(starts):
        touched[i, b[lo : lo + BLOCK].indices] = True
    weight = touched.astype(np.float64)
    overlap = weight @ weight.T
    rows = float(min(BLOCK, r))
    dense_cost = float(np.triu(overlap).sum()) * (2.0 * rows * rows / DENSE_FLOPS + 4e-9 * rows)
    columns = np.bincount(b.indices, minlength=n).astype(np.float64)
    if float(columns @ columns) / SPARSE_FLOPS < dense_cost:
        return _gram_sparse(b, starts)
    return _gram_blocks(b, starts, touched)


def _gram_dense(b: np.ndarray) -> np.ndarray:
    """B B' of a dense B, a few rows and columns at a time."""
    r, n = b.shape
    g = np.empty((r, r))
    step = max(256, int(_CALL / (2.0 * BLOCK * BLOCK)))
    for lo in range(0, r, BLOCK):
        for low in range(lo, r, BLOCK):
            alive()
            left, right = b[lo : lo + BLOCK], b[low : low + BLOCK]
            part = left[:, :step] @ right[:, :step].T
            for start in range(step, n, step):
                part += left[:, start : start + step] @ right[:, start : start + step].T
            g[lo : lo + BLOCK, low : low + BLOCK] = part
            if low != lo:
                g[low : low + BLOCK, lo : lo + BLOCK] = part.T
    return g


def _gram_sparse(b: Any, starts: list[int]) -> np.ndarray:
    g = np.zeros((b.shape[0], b.shape[0]))
    transposed = b.T.tocsr()
    for lo in starts:
        (b[lo : lo + BLOCK] @ transposed).toarray(out=g[lo : lo + BLOCK])
    return g


def _gram_blocks(b: Any, starts: list[int], touched: np.ndarray) -> np.ndarray:
    g = np.zeros((b.shape[0], b.shape[0]))
    for i, lo in enumerate(starts):
        columns = np.flatnonzero(touched[i])
        if columns.size == 0:
            continue
        left = b[lo : lo + BLOCK][:, columns].toarray()
        for j in range(i, len(starts)):
            alive()
            if not np.any(touched[j] & touched[i]):
                continue
            low = starts[j]
            right = left if j == i else b[low : low + BLOCK][:, columns].toarray()
            product = left @ right.T
            g[lo : lo + BLOCK, low : low + BLOCK] = product
            if j != i:
                g[low : low + BLOCK, lo : lo + BLOCK] = product.T
    return g


def _mirror(g: np.ndarray) -> None:
    """Copy the strict lower triangle onto the upper one, in place."""
    n = g.shape[0]
    for lo in range(0, n, BLOCK):
        hi = min(lo + BLOCK, n)
        corner = np.tril(g[lo:hi, lo:hi], -1)
        g[lo:hi, lo:hi] = corner + corner.T
        g[lo:hi, hi:] = g[hi:, lo:hi].T


def _factorised(m: np.ndarray) -> bool:
    """Whether the Cholesky factorisation M = U'U runs to completion; it takes the place of the upper triangle of M.

    M (C order) is given by its upper triangle, and its strict lower triangle is left as it is. Rows of U are found a
    block at a time, so that no call to BLAS takes much more than half a second and an interruption is answered; the
    proof does not depend on the order of the sums (`banded_cholesky`).
    """
    size = m.shape[0]
    if size <= 2 * BLOCK:
        factor, info = dpotrf(m.T, lower=1, clean=0, overwrite_a=1)
        ends = factor.diagonal()
        return info == 0 and bool(np.all(np.isfinite(ends)) and np.all(ends > 0.0))
    height = int(np.clip(_CALL / (size * size), 64, BLOCK))
    for lo in range(0, size, height):
        alive()
        hi = min(lo + height, size)
        above = m[:lo, lo:hi]
        corner = m[lo:hi, lo:hi] - above.T @ above
        factor, info = dpotrf(corner, lower=0, clean=1)
        ends = factor.diagonal()
        if info != 0 or not (np.all(np.isfinite(ends)) and np.all(ends > 0.0)):
            return False
        upper = np.triu_indices(hi - lo)
        m[lo:hi, lo:hi][upper] = factor[upper]
        if hi < size:
            rest = m[lo:hi, hi:] - above.T @ m[:lo, hi:]
            m[lo:hi, hi:] = dtrsm(1.0, factor, rest.T, side=1, lower=0, overwrite_b=1).T
    return True


class Proof(Protocol):
    """What `certify` needs of a proof of ||B||_2**2 <= t."""

    diagonal: np.ndarray

    def shift(self, t: float) -> float: ...

    def restore(self) -> None: ...

    def proves(self, t: float) -> bool: ...


class ShiftedCholesky:
    """Proofs on one Gram matrix G, kept in its lower triangle and factored in place in the upper one."""

    def __init__(self, g: np.ndarray, k: int, n: int, absolute_gram: float) -> None:
        self.g, self.k, self.n, self.absolute_gram = g, k, n, absolute_gram
        self.diagonal = g.diagonal().copy()
        self.dirty = False

    def shift(self, t: float) -> float:
        return rounding_shift(self.g.shape[0], self.k, self.n, t, self.diagonal, self.absolute_gram)

    def restore(self) -> None:
        """Bring back G after a factorisation in its place."""
        if self.dirty:
            _mirror(self.g)
            self.g.flat[:: self.g.shape[0] + 1] = self.diagonal
            self.dirty = False

    def proves(self, t: float) -> bool:
        """True only if ||B||_2**2 <= t (module docstring); False proves nothing."""
        pivots = t - self.diagonal - self.shift(t)
        if not (np.all(np.isfinite(pivots)) and pivots.min() > 0.0):
            return False
        self.restore()
        self.dirty = True
        size = self.g.shape[0]
        for lo in range(0, size, BLOCK):  # M = t I - G: only the triangle that LAPACK reads is negated
            part = self.g[lo : lo + BLOCK, lo:]
            height = part.shape[0]
            keep = np.tril(part[:, :height], -1)
            np.negative(part, out=part)
            part[:, :height] = np.triu(part[:, :height], 1) + keep
        self.g.flat[:: size + 1] = pivots
        return _factorised(self.g)


def top_eigenvalue(
    matvec: Any, n: int, tol: float = 1e-11, steps: int = 80, rounds: int = 4, starts: int = 2
) -> float:
    """An estimate (no bound) of the top eigenvalue of a symmetric PSD map on R^n: block Lanczos, seed fixed.

    The top eigenvalues of a real convolution come in pairs, of frequencies f and -f, which differ by little. One start
    finds a mixture of both and nothing tells that the larger one is missed: there are two.
    Where that has not converged after `steps` it goes on from the Ritz vectors: a factorisation at an estimate that is
    too low costs more.
    """
    if n <= 8 * starts:
        return float(np.linalg.eigvalsh(np.stack([matvec(unit) for unit in np.eye(n)]))[-1])
    v = np.random.default_rng(0).standard_normal((starts, n))
    for _ in range(rounds):
        estimate, v, miss = _lanczos(matvec, v, tol, min(steps, n // starts))
        if miss <= tol * estimate:
            break
    return estimate


def _lanczos(matvec: Any, start: np.ndarray, tol: float, steps: int) -> tuple[float, np.ndarray, float]:
    """(estimate, Ritz vectors (p, n), what the Ritz value may miss) of the top eigenvalue, from `start` (p, n)."""
    p, n = start.shape
    basis = np.zeros((p * steps, n))
    basis[:p] = np.linalg.qr(start.T)[0].T
    t = np.zeros((p * steps, p * steps))
    for j in range(steps):
        alive()
        here, end = slice(j * p, (j + 1) * p), (j + 1) * p
        w = np.stack([matvec(v) for v in basis[here]])  # products with two columns are slower
        t[here, here] = basis[here] @ w.T
        w = _without(w, basis[max(j - 1, 0) * p : end])
        w = _without(w, basis[:end])
        ahead, r = np.linalg.qr(w.T)
        size = float(np.abs(t[:end, :end].diagonal()).max())
        gone = bool(np.abs(r).max() <= 1e-14 * size)
        last = gone or j + 1 == steps
        if j % 8 == 7 or last:
            values, vectors = np.linalg.eigh(t[:end, :end])
            miss = 0.0 if gone else missed(values, r @ vectors[-p:, -p:])
            if last or miss <= tol * values[-1]:
                break
        if np.abs(r.diagonal()).min() <= 1e-8 * size:  # rounding, which is not orthogonal to the basis
            ahead = np.linalg.qr(_without(ahead.T, basis[:end]).T)[0]
        basis[end : end + p] = ahead.T
        t[end : end + p, here] = r
        t[here, end : end + p] = r.T
    return float(values[-1]) + miss, vectors[:, -p:].T @ basis[:end], miss


def _without(rows: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Rows less their components along those of the basis."""
    return np.stack([v - (basis @ v) @ basis for v in rows])


def missed(values: np.ndarray, residuals: np.ndarray) -> float:
    """About how far the top Ritz value is below an eigenvalue, from the residuals (columns) of the top Ritz vectors.

    It is at most the norm of its own residual, and about the square of the residuals of a cluster over the gap below.
    """
    p = residuals.shape[1]
    found = float(np.linalg.norm(residuals[:, -1]))
    for size in range(1, p + 1):
        gap = float(values[-1] - values[-1 - size]) if len(values) > size else 0.0
        if gap > 0.0:
            found = min(found, float(np.linalg.norm(residuals[:, -size:])) ** 2 / gap)
    return found


def estimate_gram_norm(g: np.ndarray, b: Any) -> float:
    """An estimate of lambda_max(B B') from G or B, whichever is cheaper to apply."""
    r = g.shape[0]
    if r == 1:
        return float(g[0, 0])
    if r <= _EXACT_EIGENVALUES:
        return float(np.linalg.eigvalsh(g)[-1])
    if sp.issparse(b) and 4 * b.nnz < r * r:
        transposed = b.T
        return top_eigenvalue(lambda v: b @ (transposed @ v), r)
    return top_eigenvalue(lambda v: g @ v, r)


def certify(proof: Proof, guess: float, ceiling: float, estimate: Any) -> float:
    """The smallest tried t >= ||B||_2**2 with a proof; `ceiling` (already proved) where none succeeds.

    `guess` is tried first; `estimate()` gives lambda_max where the guess fails or is 0.
    """
    if guess > 0.0:
        t = guess + 2.0 * proof.shift(guess)
        if t < ceiling and proof.proves(t):
            return t
    proof.restore()
    top = max(float(estimate()), float(proof.diagonal.max()))
    for growth in (0.0, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1.0):
        raised = top * (1.0 + growth)
        t = raised + 2.0 * proof.shift(raised)
        if not math.isfinite(t) or t >= ceiling:
            return ceiling
        if proof.proves(t):
            return t
    return ceiling
