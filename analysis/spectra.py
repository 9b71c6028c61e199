"""Eigenvalues and Gershgorin discs of A = W'W and of the forged matrix A' of one input, for matrices in NumPy.

A forged layer computes W f(x), where f sets the entries of x with |x_j| <= c to zero. With D the diagonal 0/1 matrix of
the entries kept, A f(x) = A' x for A' = A D: the columns of A that belong to zeroed entries are zero (Lemma 2 and
eq. 12 of arXiv 2406.19622). A' is not symmetric and depends on x. What holds for every D:

- The nonzero eigenvalues of A D are those of D A D = (W D)'(W D), which is A restricted to the kept rows and columns.
  They are real, lambda_max(A') = ||W D||_2^2, and Cauchy's interlacing theorem gives lambda_max(A') <= lambda_max(A).
- Disc bounds max |centre| + radius, of rows and of columns, do not grow, and ||A'||_2 <= ||A||_2.

The following do not follow, with counterexamples below:

- "The radii of all discs are shrunk": columns that are kept do not change at all, nor do centres of kept rows; where a
  zeroed entry is orthogonal to the others no radius changes, by row or by column (`DISCS_STAY`).
- Anything about |W f(x) - W f(y)| / |x - y|, since A' changes with x. At the threshold f jumps and the quotient grows
  without bound; max ||W f(x)|| / ||x|| over data can fall while the quotient rises (`SLOPE_RISES`, `amplification`). A
  smooth gate x sigmoid((|x| - c) / t) has the slope 1/2 + c / (4 t) at c, which is above 1 for t < c / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.linalg

from lipbounds._norms import as_matrix, finite, gamma, mul_up, unscale_up
from lipbounds._text import Html, html_table, markdown_table, new_axes, show, text_table
from lipbounds.norms import frobenius_norm, row_norms

By = Literal["row", "column"]
_SHOWN = 10  # discs in a table

#: (W, mask): zeroing the third entry leaves all radii 4, 4, 0 as they were, by row and by column, and lambda_max = 9.
DISCS_STAY = (np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]), np.array([True, True, False]))

#: (W, X, threshold) with three inputs (rows of X): max ||W f(x)|| / ||x|| falls from 1.18 to 1, and the largest
#: ||W f(x) - W f(y)|| / ||x - y|| rises from 1 to 3.
SLOPE_RISES = (np.array([[1.0, 1.0]]), np.array([[2.0, 0.4], [0.0, 0.6], [0.0, 0.4]]), 0.5)


@dataclass(frozen=True, eq=False)
class Discs:
    """Gershgorin's discs |z - centers_i| <= radii_i of a matrix: every eigenvalue lies in one of them.

    centers  (n,) the diagonal, real or complex
    radii    (n,) float64, sums of |off-diagonal entries| of the row or column, rounded upwards
    by       "row" or "column"
    """

    centers: np.ndarray
    radii: np.ndarray
    by: By

    def __len__(self) -> int:
        return len(self.radii)

    @property
    def reach(self) -> np.ndarray:
        """(n,) |centers_i| + radii_i, rounded upwards."""
        size = np.abs(self.centers)
        if np.iscomplexobj(self.centers):
            size = np.nextafter(np.nextafter(size, np.inf), np.inf)
        return np.where(self.radii > 0, np.nextafter(size + self.radii, np.inf), size)

    @property
    def bound(self) -> float:
        """max |centers_i| + radii_i: |lambda| <= bound for every eigenvalue."""
        return finite(self.reach.max())

    def contains(self, eigenvalues: Any, slack: float = 0.0) -> np.ndarray:
        """Which of the numbers (k,) lie in a disc whose radius is enlarged by `slack`, the error of the numbers."""
        values = np.atleast_1d(np.asarray(eigenvalues))
        slack = finite(slack, "slack")
        if values.ndim != 1 or values.dtype.kind not in "iufc" or not np.isfinite(values).all():
            raise ValueError(f"eigenvalues must be finite numbers of shape (k,), got shape {values.shape}")
        inside = np.zeros(len(values), bool)
        step = max(1, 2**22 // len(self))
        for at in range(0, len(values), step):
            distance = np.abs(values[at : at + step, None] - self.centers)
            inside[at : at + step] = (distance <= self.radii + slack).any(axis=1)
        return inside

    def plot(self, ax: Any = None, eigenvalues: Any = None, color: str = "#4477aa") -> Any:
        """The discs in the complex plane, and eigenvalues as crosses; returns the matplotlib Axes."""
        from matplotlib.collections import EllipseCollection

        ax = new_axes() if ax is None else ax
        centers = self.centers.astype(np.complex128)
        places = np.stack([centers.real, centers.imag], axis=1)
        width = 2 * self.radii
        angles = np.zeros(len(self))
        alpha = max(0.02, 0.5 / math.sqrt(len(self)))  # so that many discs do not become one
        look: dict[str, Any] = {"facecolors": color, "edgecolors": color, "alpha": alpha, "linewidths": 0.7}
        ax.add_collection(
            EllipseCollection(
                width, width, angles, units="xy", offsets=places, offset_transform=ax.transData, **look
            )
        )
        ax.plot(places[:, 0], places[:, 1], ".", color=color, markersize=2)
        if eigenvalues is not None:
            values = np.atleast_1d(np.asarray(eigenvalues)).astype(np.complex128)
            ax.plot(values.real, values.imag, "x", color="#1d2530", markersize=4)
        ax.update_datalim(np.concatenate([places - self.radii[:, None], places + self.radii[:, None]]))
        ax.autoscale_view()
        ax.set(xlabel="real part", ylabel="imaginary part")
        return ax

    def _table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        order = np.argsort(-self.reach, kind="stable")[:_SHOWN]
        rows: list[tuple[str, ...]] = [
            (str(i), _number(self.centers[i]), show(self.radii[i], "up"), show(self.reach[i], "up"))
            for i in order
        ]
        return (self.by, "centre", "radius <=", "|eigenvalue| <="), rows

    def __repr__(self) -> str:
        more = f", the {_SHOWN} that reach farthest" if len(self) > _SHOWN else ""
        head = f"Discs by {self.by}: {len(self)}, |eigenvalues| <= {show(self.bound, 'up')}{more}"
        return f"{head}\n{text_table(*self._table(), right=(0, 1, 2, 3))}"

    def _repr_markdown_(self) -> str:
        return markdown_table(*self._table(), right=(0, 1, 2, 3))

    def _repr_html_(self) -> Html:
        return html_table(*self._table(), right=(0, 1, 2, 3))


def _number(z: Any) -> str:
    if not np.iscomplexobj(z):
        return show(z)
    return f"{show(z.real)}{'-' if z.imag < 0 else '+'}{show(abs(z.imag))}i"


def gershgorin_discs(A: Any, by: By = "row") -> Discs:
    """The Gershgorin discs of a square matrix A (n, n), real or complex.

    Their centres are a_ii, their radii the sums over j != i of |a_ij| ("row") or |a_ji| ("column"), in float64 and
    rounded upwards, so that they hold for A as it is stored.

    Source: Gershgorin's theorem (Horn and Johnson, Matrix Analysis, 6.1.1); Theorem 1 of arXiv 2406.19622. ValueError
    for a matrix that is not square, is empty or has NaN or infinite entries, and for results beyond float64.
    """
    if by not in ("row", "column"):
        raise ValueError(f'by must be "row" or "column", got {by!r}')
    matrix = np.asarray(A)
    real = as_matrix(matrix.real if matrix.dtype.kind == "c" else matrix)
    if real.shape[0] != real.shape[1] or not real.size:
        raise ValueError(
            f"Gershgorin's discs need a square matrix (n, n) with n >= 1, got shape {real.shape}"
        )
    if matrix.dtype.kind == "c":
        whole = real + 1j * as_matrix(matrix.imag)
        size = np.abs(whole)
        # hypot errs by 1 ulp
        size = np.where(size > 0, np.nextafter(np.nextafter(size, np.inf), np.inf), 0.0)
    else:
        whole, size = real, np.abs(real)
    np.fill_diagonal(size, 0.0)
    return Discs(np.diagonal(whole).copy(), row_norms(size if by == "row" else size.T, 1), by)


def forged_matrix(W: Any, mask: Any) -> np.ndarray:
    """A' (n, n), the columns of A = W'W where `mask` is False set to zero (eq. 12 of arXiv 2406.19622); float64.

    W (m, n); mask (n,) booleans, True where the input's entry is kept. ValueError for other shapes and types.
    """
    matrix, kept = _layer(W, mask)
    with np.errstate(over="ignore", invalid="ignore"):
        return as_matrix(np.where(kept, matrix.T @ matrix, 0.0))


def largest_eigenvalue(W: Any, mask: Any = None) -> float:
    """lambda_max(A') = ||W diag(mask)||_2^2 for W (m, n), to rounding (relative error about max(m, n) 1e-16).

    With D = diag(mask) idempotent, A' = A D and D A D = (W D)'(W D) have the same nonzero eigenvalues (those of X Y are
    those of Y X, X = A D and Y = D): A's principal submatrix at the entries that are kept. LAPACK on the smaller side.
    """
    matrix, kept = _layer(W, mask)
    return _squared_norm(matrix[:, kept])


def spectral_norm_forged(W: Any, mask: Any = None) -> float:
    """||A'||_2, to rounding; at least lambda_max(A'), since A' is not symmetric, and at most ||A||_2."""
    matrix, kept = _layer(W, mask)
    # W' = Q R with orthonormal columns of Q, so ||W' (W D)||_2 = ||R (W D)||_2, of size (m, n) where m < n
    left = np.linalg.qr(matrix.T, mode="r") if matrix.shape[0] < matrix.shape[1] else matrix.T
    with np.errstate(over="ignore", invalid="ignore"):
        return math.sqrt(_squared_norm(as_matrix(left @ matrix[:, kept])))


@dataclass(frozen=True, eq=False)
class Interlacing:
    """Cauchy: with n - k entries zeroed, lambda_i(A) <= lambda_i(A_kept) <= lambda_(i+n-k)(A), ascending, i = 1..k.

    eigenvalues  (n,) of A = W'W, ascending, at least 0
    kept         (k,) of the principal submatrix at the entries kept; with n - k zeros, the eigenvalues of A'
    allowance    absolute, for the rounding of both: of the products m U and of LAPACK 10 n U, times ||W||_F^2, twice
    """

    eigenvalues: np.ndarray
    kept: np.ndarray
    allowance: float

    @property
    def violation(self) -> float:
        """The largest amount by which an inequality fails, 0 if none does."""
        gone = len(self.eigenvalues) - len(self.kept)
        below = self.eigenvalues[: len(self.kept)] - self.kept
        above = self.kept - self.eigenvalues[gone:]
        return float(max(below.max(initial=0.0), above.max(initial=0.0)))

    @property
    def holds(self) -> bool:
        """Whether all inequalities hold up to the allowance."""
        return self.violation <= self.allowance

    def __repr__(self) -> str:
        top = show(float(self.kept.max(initial=0.0)))
        return (
            f"Interlacing: {len(self.kept)} of {len(self.eigenvalues)} entries kept, lambda_max {top} of "
            f"{show(float(self.eigenvalues[-1]))}, {'holds' if self.holds else 'VIOLATED'} "
            f"(violation {show(self.violation, 'up', 2)}, allowance {show(self.allowance, 'up', 2)})"
        )


def interlacing(W: Any, mask: Any) -> Interlacing:
    """The eigenvalues of A = W'W and of its principal submatrix at mask, W (m, n), and whether they interlace."""
    matrix, kept = _layer(W, mask)
    m, n = matrix.shape
    size = frobenius_norm(matrix)
    allowance = mul_up(2.0, gamma(m + 10 * n), size, size)
    return Interlacing(_spectrum(matrix), _spectrum(matrix[:, kept]), allowance)


@dataclass(frozen=True)
class Amplification:
    """How much x -> W x and x -> W f(x) amplify N given inputs: all four are attained values, so lower bounds.

    constant         max ||W x|| / ||x||       (the empirical constant, Definition 1 of arXiv 2406.19622)
    constant_forged  max ||W f(x)|| / ||x||
    slope            max ||W x - W y|| / ||x - y||
    slope_forged     max ||W f(x) - W f(y)|| / ||x - y||
    """

    constant: float
    constant_forged: float
    slope: float
    slope_forged: float


def amplification(W: Any, X: Any, threshold: float) -> Amplification:
    """Of W (m, n) and the hard gate f(x) = 0 where |x| <= threshold, on the rows of X (N, n), all pairs of them.

    One input c e_j and one (c + h) e_j show that slope_forged >= ||W e_j|| (c + h) / h, which has no bound.
    """
    matrix, _ = _layer(W, None)
    points = as_matrix(X)
    if points.shape[1] != matrix.shape[1] or not len(points):
        raise ValueError(f"X must have shape (N, {matrix.shape[1]}) with N >= 1, got {points.shape}")
    threshold = finite(threshold, "threshold")
    plain, forged = points @ matrix.T, np.where(np.abs(points) <= threshold, 0.0, points) @ matrix.T
    first, second = np.triu_indices(len(points), 1)

    def largest(change: np.ndarray, distance: np.ndarray) -> float:
        length = np.linalg.norm(distance, axis=1)
        moved = length > 0
        return float((np.linalg.norm(change[moved], axis=1) / length[moved]).max(initial=0.0))

    apart = points[first] - points[second]
    return Amplification(
        largest(plain, points),
        largest(forged, points),
        largest(plain[first] - plain[second], apart),
        largest(forged[first] - forged[second], apart),
    )


def _layer(W: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """W (m, n) in float64 and the mask, all True for None."""
    matrix = as_matrix(np.asarray(W))
    if not matrix.size:
        raise ValueError(f"W must have rows and columns, got shape {matrix.shape}")
    n = matrix.shape[1]
    kept = np.ones(n, bool) if mask is None else np.asarray(mask)
    if kept.dtype != np.bool_ or kept.shape != (n,):
        raise ValueError(
            f"mask must hold {n} booleans (True = kept), one per column of W, got {kept.dtype} of shape {kept.shape}"
        )
    return matrix, kept


def _scaled(matrix: np.ndarray) -> tuple[np.ndarray, int]:
    """(B, e) with matrix = 2**e B and entries of B at most 1, so that products stay in range."""
    exponent = math.frexp(float(np.abs(matrix).max(initial=0.0)))[1]
    with np.errstate(under="ignore"):
        return np.ldexp(matrix, -exponent), exponent


def _gram(matrix: np.ndarray) -> np.ndarray:
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _squared_norm(matrix: np.ndarray) -> float:
    """||B||_2^2 by the largest eigenvalue of the smaller Gram matrix."""
    if not matrix.size:
        return 0.0
    scaled, exponent = _scaled(matrix)
    gram = _gram(scaled)
    last = len(gram) - 1
    top = scipy.linalg.eigvalsh(gram, subset_by_index=(last, last), check_finite=False)[0]
    return float(unscale_up(max(float(top), 0.0), 2 * exponent))


def _spectrum(matrix: np.ndarray) -> np.ndarray:
    """(n,) eigenvalues of B'B ascending, those that the smaller side leaves out being zero."""
    n = matrix.shape[1]
    if not matrix.size:
        return np.zeros(n)
    scaled, exponent = _scaled(matrix)
    found = np.maximum(scipy.linalg.eigvalsh(_gram(scaled), check_finite=False), 0.0)
    return np.concatenate([np.zeros(n - len(found)), unscale_up(found, 2 * exponent)])
