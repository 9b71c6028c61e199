"""The proof of `cholesky` for large sparse matrices: a banded Cholesky that never holds the Gram matrix.

Let B be r x n and G the computed B B', its rows reordered so that g_ij = 0 for |i - j| > w. If the Cholesky of
fl(t I - G - c I) runs to completion, block column by block column within the band, then ||B||_2 <= sqrt(t).

*Why the same proof holds.* Whatever the order of the sums and however they are blocked, every computed entry of the
factor satisfies (Higham, Lemma 8.4)

    | m_ij - sum_{k <= j} l_ik l_jk |  <=  gamma_{p+2} sum_{k <= j} |l_ik| |l_jk| ,

p the number of k with l_ik l_jk != 0, since zero terms are added without rounding. Outside the band everything is
exactly zero, so p <= w + 1. A triangular solve that multiplies by reciprocals of the pivots rounds once more. Hence
|M - L L'| <= g |L| |L|' entrywise with g = gamma_{w+4}. The diagonal gives ||l_i||^2 <= m_ii / (1 - g), and
Cauchy-Schwarz |M - L L'|_ij <= g / (1 - g) sqrt(m_ii m_jj), zero outside the band. A symmetric matrix has its 2-norm
below its largest row sum, so

    lambda_min(M) >= -||M - L L'||_2 >= -g / (1 - g) min(trace(M), (2 w + 1) max m_ii) ,

which is the Cholesky term of the shift c (`cholesky.rounding_shift`, a factor 2 above it). The Gram and diagonal terms
of c are those of `cholesky`: they do not depend on how G is blocked. The order of rows needs no proof. As there, BLAS
is taken to form ordinary inner products (no Strassen) and to solve triangular systems by substitution.

*Memory.* Block rows of G are formed when they are needed; of the factor the last w columns are kept, about w^2 to
1.3 w^2 doubles, and of B the rows within the band, as dense tiles of the columns that they touch. The work is r w^2 and
about as much for G.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.linalg.blas import dtrsm
from scipy.linalg.lapack import dpotrf
from scipy.sparse.csgraph import reverse_cuthill_mckee

from lipbounds._norms import cholesky
from lipbounds._text.progress import alive

#: Below this smaller side the dense proof takes less time than the search for an order.
LEAST = 1024
_MARGIN = 6.0  # a banded proof must save this factor of operations, as its smaller products are slower
_LANCZOS = 161  # vectors of the estimate of the norm


# --- orders and bandwidths -----------------------------------------------------------------------------------------


def _reduced(by: Any, values: np.ndarray, starts: np.ndarray, empty: Any) -> np.ndarray:
    """`by.reduceat` over the rows of a CSR pattern; `empty` for rows without entries."""
    full = np.diff(starts) > 0
    out = np.full(full.size, empty, values.dtype)
    if full.any():
        out[full] = by.reduceat(values, starts[:-1][full])
    return out


def bandwidth(columns: Any, position: np.ndarray | None = None) -> int:
    """max |i - j| over the nonzero g_ij of B B', row i of B placed at position[i].

    `columns` is the CSR pattern of B': g_ij != 0 only if rows i and j share a column, so no Gram matrix is needed.
    """
    where = columns.indices if position is None else position[columns.indices]
    highest = _reduced(np.maximum, where, columns.indptr, 0)
    return int((highest - _reduced(np.minimum, where, columns.indptr, 0)).max(initial=0))


def classes(pattern: Any) -> tuple[np.ndarray, np.ndarray]:
    """(first, which): rows with the same columns (channels of a pixel) form a class, found by hash."""
    labels = np.random.default_rng(0).integers(1, 2**63, pattern.shape[1], dtype=np.uint64)
    sums = _reduced(np.add, labels[pattern.indices], pattern.indptr, 0)
    _, first, which = np.unique(sums, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # classes in the order of their first rows
    return np.sort(first), rank[which]


def _pattern(b: Any) -> Any:
    return sp.csr_array((np.ones(b.nnz, np.int8), b.indices, b.indptr), shape=b.shape)


def row_order(b: Any) -> tuple[np.ndarray | None, int]:
    """(order, bandwidth): the order of the rows of B (CSR) with the least bandwidth of B B' among those tried.

    Tried are: the order given (None); rows with equal columns brought together (an image stored channels first);
    rows by the middle of the columns that they read (several taps side by side); reverse Cuthill-McKee on the
    bipartite graph of those classes.
    """
    pattern = _pattern(b)
    columns = pattern.T.tocsr()
    best: tuple[np.ndarray | None, int] = None, bandwidth(columns)
    first, which = classes(pattern)
    first_column, _ = classes(columns)
    small = sp.csr_array(pattern[first][:, first_column])
    count = small.shape[0]
    middle = _reduced(np.minimum, small.indices, small.indptr, 0).astype(np.int64)
    middle += _reduced(np.maximum, small.indices, small.indptr, 0)
    graph = sp.csr_array(sp.block_array([[None, small], [small.T, None]], format="csr"))
    found = reverse_cuthill_mckee(graph, symmetric_mode=True)
    rank = np.empty(count, np.int64)
    rank[found[found < count]] = np.arange(count)
    for key in (np.arange(count), middle, rank):
        order = np.argsort(key[which], kind="stable")
        position = np.empty(order.size, columns.indices.dtype)
        position[order] = np.arange(order.size, dtype=position.dtype)
        width = bandwidth(columns, position)
        if width < best[1]:
            best = order, width
    return best


# --- the cost of a proof -------------------------------------------------------------------------------------------


def _height(w: int) -> int:
    """Columns of the factor that are computed together."""
    return int(np.clip(w // 8, 32, 256))


@dataclass(frozen=True, eq=False)
class Plan:
    """How ||B||_2 is proved: `way` is "dense" or "banded".

    Args:
        memory: bytes of all arrays of the proof, the matrix itself included; an upper estimate.
        flops: of the factorisation and the Gram matrix, an estimate.
        order, width: of a banded proof.
        keep: whether the band of the Gram matrix is kept, for the estimate of the norm and every factorisation.
    """

    way: str
    memory: int
    flops: float
    order: np.ndarray | None = None
    width: int = 0
    keep: bool = False

    @property
    def name(self) -> str:
        return "Cholesky" if self.way == "dense" else "banded Cholesky"


def stored(a: Any) -> int:
    """Bytes of a matrix."""
    return int(a.data.nbytes + a.indices.nbytes + a.indptr.nbytes) if sp.issparse(a) else int(a.nbytes)


def plans(b: Any, memory: int | None = None) -> list[Plan]:
    """The proofs of ||B||_2 to choose from, B (r, n) with r <= n, cheapest first; a rule of sizes and patterns only.

    A small matrix gets a banded one only where the dense one does not fit the memory.
    """
    r, n = b.shape
    own = stored(b)
    lanczos = 8 * _LANCZOS * r
    block = min(r, cholesky.BLOCK)
    # a dense matrix is read in blocks of rows; a sparse one is transposed, and its absolute values are taken
    work = (3 if sp.issparse(b) else 1) * own + lanczos
    whole = 8 * (r * r + 2 * block * n + 4 * block * block)
    dense = Plan("dense", work + whole, r**3 / 3 + float(r) * r * min(n, r))
    if not sp.issparse(b) or (r < LEAST and (memory is None or dense.memory <= memory)):
        return [dense]
    order, w = row_order(b)
    nb = _height(w)
    window = 8 * (w + nb) * (w + 4 * nb) + 8 * (w + 2 * nb) * _most_columns(b, order, nb)
    copy = 0 if order is None else own
    flops, band = 2.0 * r * (w + nb) ** 2, 8 * r * (w + nb)
    banded = [Plan("banded", work + copy + window, flops, order, w)]
    if band < own:  # then a product with the band costs less than two with the matrix
        banded = [Plan("banded", work + copy + window + band, flops, order, w, True), *banded]
    return [*banded, dense] if _MARGIN * (w + nb) ** 2 < r * r else [dense, *banded]


def choose(b: Any, memory: int | None) -> Plan:
    """The cheapest proof within the memory; where none fits (or without a limit), the cheapest or the smallest."""
    ways = plans(b, memory)
    if memory is None:
        return ways[0]
    return next((plan for plan in ways if plan.memory <= memory), min(ways, key=lambda plan: plan.memory))


# --- the proof -----------------------------------------------------------------------------------------------------


def _most_columns(b: Any, order: np.ndarray | None, height: int) -> int:
    """The most columns that so many rows in a row touch."""
    r = b.shape[0]
    places = np.arange(r) if order is None else order
    tiles = sp.csr_array((np.ones(r, bool), (np.arange(r) // height, places)), shape=(-(-r // height), r))
    pattern = sp.csr_array((np.ones(b.nnz, bool), b.indices, b.indptr), shape=b.shape)
    return int(np.diff((tiles @ pattern).indptr).max(initial=0))


class BandedCholesky:
    """Proofs on B (CSR), with the interface of `cholesky.ShiftedCholesky`."""

    def __init__(self, b: Any, k: int, absolute_gram: float, plan: Plan) -> None:
        self.b = b if plan.order is None else b[plan.order]
        every = plan.order is None or np.array_equal(np.sort(plan.order), np.arange(b.shape[0]))
        if not every or bandwidth(_pattern(self.b).T.tocsr()) > plan.width:
            raise ValueError("the plan is for another matrix: it leaves out rows, or entries beside the band")
        self.k, self.absolute_gram, self.width, self.keep = k, absolute_gram, plan.width, plan.keep
        squares = _reduced(np.add, self.b.data * self.b.data, self.b.indptr, 0.0)
        self.diagonal = squares  # within gamma_k of the computed g_ii, which the factor 2 of the shift covers
        self.counts = np.bincount(self.b.indices, minlength=self.b.shape[1]).astype(np.float64)
        self._tiles: dict[int, _Tile] = {}

    def shift(self, t: float) -> float:
        r, n = self.b.shape
        return cholesky.rounding_shift(r, self.k, n, t, self.diagonal, self.absolute_gram, self.width)

    def restore(self) -> None:
        """Do nothing: a proof leaves the Gram matrix as it is."""

    def estimate(self) -> float:
        """An estimate of lambda_max(B B')."""
        if self.keep:
            return cholesky.top_eigenvalue(self._gram_product, self.b.shape[0])
        return cholesky.top_eigenvalue(lambda v: self.b @ (self._transposed @ v), self.b.shape[0])

    @cached_property
    def _transposed(self) -> Any:
        return self.b.T

    def _panels(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(lo, hi, G[lo:top, lo:hi]) of all columns, top the end of the band."""
        r, nb = self.b.shape[0], _height(self.width)
        for lo in range(0, r, nb):
            alive()
            hi = min(lo + nb, r)
            yield lo, hi, self._gram_rows(lo, hi, min(hi + self.width, r))
            self._tiles.pop(lo, None)
        self._tiles.clear()

    @cached_property
    def _kept(self) -> list[tuple[int, int, np.ndarray]]:
        return list(self._panels())

    def _gram_product(self, v: np.ndarray) -> np.ndarray:
        """G v."""
        out = np.zeros(v.size)
        for lo, hi, part in self._kept:
            out[lo : lo + len(part)] += part @ v[lo:hi]
            out[lo:hi] += v[hi : lo + len(part)] @ part[hi - lo :]
        return out

    def proves(self, t: float) -> bool:
        """True only if ||B||_2**2 <= t (module docstring); False proves nothing."""
        shift = self.shift(t)
        if not (t - self.diagonal - shift).min() > 0.0:
            return False
        panels: deque[tuple[int, np.ndarray]] = deque()  # (first row, its rows of the factor)
        for lo, hi, part in self._kept if self.keep else self._panels():
            alive()
            m, top = -part, lo + len(part)
            corner = m[: hi - lo]
            np.fill_diagonal(corner, (t + corner.diagonal()) - shift)
            while panels and panels[0][0] + panels[0][1].shape[0] <= lo:
                panels.popleft()
            for begin, panel in panels:
                known = panel[lo - begin :]
                ahead = known[: hi - lo]
                m[: known.shape[0], : ahead.shape[0]] -= known @ ahead.T
            # rows of C order are columns of LAPACK's: the lower triangle of `corner` is the upper one of its transpose
            factor, info = dpotrf(corner.T, lower=0, clean=0, overwrite_a=0)
            pivots = factor.diagonal()
            if info != 0 or not (np.all(np.isfinite(pivots)) and np.all(pivots > 0.0)):
                return False
            if top > hi:
                m = dtrsm(1.0, factor, m[hi - lo :].T, side=0, lower=0, trans_a=1, overwrite_b=1).T
                panels.append((hi, m))
        return True

    def _gram_rows(self, lo: int, hi: int, top: int) -> np.ndarray:
        """G[lo:top, lo:hi], each entry an inner product over the columns that both rows touch.

        Rows are taken in tiles as high as the panels. In one or two dimensions two tiles share few of their columns
        (the windows of two rows of an image overlap in part), and only these are multiplied.
        """
        b = self.b
        first, middle = int(b.indptr[lo]), int(b.indptr[hi])
        here = self._tile(lo)
        others = [self._tile(start) for start in range(hi, top, hi - lo)] if top > hi else []
        shared = [np.intersect1d(here.columns, tile.columns, True, True)[1:] for tile in others]
        height, width = top - lo, hi - lo
        dense = 2.0 * width * width * (here.columns.size + sum(mine.size for mine, _ in shared))
        dense = dense / cholesky.DENSE_FLOPS + 4e-9 * height * width
        if float(self.counts[b.indices[first:middle]].sum()) / cholesky.SPARSE_FLOPS < dense:
            return (b[lo:top] @ b[lo:hi].T.tocsr()).toarray()
        g = np.zeros((height, width))
        g[:width] = here.rows.T @ here.rows
        at = width
        for tile, (mine, its) in zip(others, shared, strict=True):
            end = min(at + tile.rows.shape[1], height)
            if mine.size:
                g[at:end] = (tile.rows[its].T @ here.rows[mine])[: end - at]
            at = end
        return g

    def _tile(self, lo: int) -> _Tile:
        """The tile of rows that begins at `lo`; those before it are no longer kept where a panel begins."""
        if lo not in self._tiles:
            b = self.b
            hi = min(lo + _height(self.width), b.shape[0])
            first, end = int(b.indptr[lo]), int(b.indptr[hi])
            indices = b.indices[first:end]
            seen = np.zeros(b.shape[1], bool)
            seen[indices] = True
            columns = np.flatnonzero(seen)
            place = np.zeros(b.shape[1], np.int64)
            place[columns] = np.arange(columns.size)
            rows = np.zeros((columns.size, hi - lo))
            rows[place[indices], np.repeat(np.arange(hi - lo), np.diff(b.indptr[lo : hi + 1]))] = b.data[
                first:end
            ]
            self._tiles[lo] = _Tile(columns, rows)
        return self._tiles[lo]


class _Tile(NamedTuple):
    """Some rows of B as a dense array (its columns that are not zero, rows)."""

    columns: np.ndarray
    rows: np.ndarray
