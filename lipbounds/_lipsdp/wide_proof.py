"""Proof of multipliers on a chain: the inequality of `chain` with every rounding, no matrix wider than a core.

The proof is about T = 1 / s^2, s = fl(sqrt(D) / 2) being exact floats. Scaled to a unit diagonal (s_0 = 1) the matrix
of `chain` has the blocks N_k = diag(1 / s_k) W_{k-1} diag(s_{k-1}) / 2 below its diagonal, and N = W_K diag(s_K) in the
rows of S. With the diagonal beta = 1 - delta in the place of 1, eliminated layers leave

    C_j = beta I - N_j N_j' / beta - N_{j+1}' N_{j+1} / beta,      K = N_{j+1} N_j / beta

at their neighbours: local sums, rounded normwise by gamma || |N| ||^2. What remains is block tridiagonal and goes to
`bordered.eliminate`. A symmetric matrix whose blocks have norms e_kl lies above -diag(sum_l e_kl), so the proof holds
where in every block row the errors of N, C, K and of the elimination sum up to at most delta; those of the last row are
added to S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp

from lipbounds._lipsdp.chain import Chain, cores
from lipbounds._lipsdp.proof import Ellipsoid
from lipbounds._lipsdp.tap_proof import Infeasible
from lipbounds._lipsdp.wide_arithmetic import blocks
from lipbounds._norms import bordered, schur
from lipbounds._norms.cholesky import nonzeros_per_row
from lipbounds._norms.enclosures import Enclosure, Factor, cheap_norm
from lipbounds._norms.rounding import U, add_up, gamma, mul_up, require_gradual_underflow
from lipbounds._text.progress import alive, say

_FARTHEST = 2.0**200  # s lies between this and its inverse
_LOST = 2.0**-700  # what underflow may lose in one entry, products with `_FARTHEST` included
_MORE = (1.05, 1.5, 3.0)  # times the errors of the attempt before: one proof costs as much as all others


class Scaled:
    """N of one map with its error: ||N_real - N||_2 <= wrong, || |N| ||_2 <= size, `terms` in its rows and columns."""

    def __init__(self, m: Enclosure, rows: np.ndarray | None, cols: np.ndarray | None) -> None:
        array, error = m.with_error()
        array = sp.csr_array(array, copy=True) if sp.issparse(array) else np.array(array, order="C")
        factor = 1.0
        with np.errstate(under="ignore"):
            if cols is not None:
                array = _times_columns(array, cols)
                factor = float(cols.max(initial=0.0))
            if rows is not None:
                array = _times_columns(array.T, 0.5 / rows).T  # 0.5 / s is rounded once
                factor = mul_up(factor, 0.5 / float(rows.min(initial=math.inf)) * (1 + 4 * U))
                array = sp.csr_array(array) if sp.issparse(array) else np.ascontiguousarray(array)
        self.array = array
        across = sp.csr_array(array.T) if sp.issparse(array) else array.T
        self.terms = max(nonzeros_per_row(array), nonzeros_per_row(across))
        self.size = cheap_norm(array)
        count = math.sqrt(float(array.shape[0]) * array.shape[1])
        self.wrong = add_up(mul_up(gamma(4), self.size), mul_up(factor, error), count * _LOST)

    def gram(self, turned: bool) -> tuple[Any, float]:
        """(N'N or, turned, N N', its error in the 2-norm)."""
        m = self.array.T if turned else self.array
        found = _gram(sp.csr_array(m)) if sp.issparse(m) else schur.gram(np.ascontiguousarray(m))
        lost = m.shape[1] * self.terms * 2.0**-1022
        return found, add_up(mul_up(gamma(self.terms + 8), self.size, self.size), lost)


def _times_columns(a: Any, d: np.ndarray) -> Any:
    if not sp.issparse(a):
        return a * d
    a = sp.csr_array(a)
    return sp.csr_array((a.data * d[a.indices], a.indices, a.indptr), shape=a.shape)


def _gram(m: Any) -> np.ndarray:
    """M'M (n, n) of a sparse M, both triangles equal, from blocks of rows."""
    out = np.zeros((m.shape[1],) * 2)
    for _, columns, block in blocks(m):
        alive()
        product = block.T @ block
        lower = np.tril(product)
        out[np.ix_(columns, columns)] += lower + np.tril(product, -1).T
    return out


def scales(chain: Chain, D: Sequence[np.ndarray]) -> list[np.ndarray]:
    """s per tap; Infeasible where one leaves the range that the proof covers."""
    out = []
    for k, d in enumerate(D):
        s = np.sqrt(d) / 2
        if s.size and not (s.max() <= _FARTHEST and s.min() >= 1 / _FARTHEST):
            raise Infeasible(k, "they span more than the range of the proof")
        out.append(s)
    return out


def propagate_chain(chain: Chain, D: Sequence[np.ndarray]) -> Ellipsoid:
    """S_out with dz dz' <= 2^scale S_out |dx|^2 for all pairs of inputs, from inverse multipliers D per tap (n_k,).

    Raises:
        Infeasible: the multipliers prove nothing, or too little room is left for rounding.
    """
    require_gradual_underflow()
    s = scales(chain, D)
    array, error = chain.maps[-1].with_error()
    top = float(np.abs(array).max(axis=0).max() if array.shape[1] else 0.0) if array.size else 0.0
    if (top == 0.0 and error == 0.0) or not min(chain.widths):
        return Ellipsoid(np.zeros((chain.outputs,) * 2), 0)
    exponent = math.frexp(max(top, error))[1] + math.frexp(float(s[-1].max()))[1]
    if not abs(exponent) < 800:  # so that s times a power of two stays in the normal range
        raise Infeasible(len(s) - 1, "they span more than the range of the proof")
    before = [None, *s[:-1], np.ldexp(s[-1], -exponent)]
    maps = [Scaled(m, own, cols) for m, own, cols in zip(chain.maps, [*s, None], before, strict=True)]
    chosen = cores(chain.widths, chain.outputs)
    delta = _exact(bordered.usual_error([chain.widths[j] for j in chosen]))
    for attempt, more in enumerate((*_MORE, math.inf), 1):
        say(f"proof by {len(chosen)} factorisations, attempt {attempt}")
        found = _attempt(chain, maps, chosen, delta)
        if found is None:
            break
        sigma, need = found
        if need <= delta:
            return Ellipsoid(sigma, 2 * exponent)
        if not more * need < 0.1:
            break
        delta = _exact(more * need)
    raise Infeasible(
        0, "the matrix of the chain is not positive definite, or too nearly singular for float64"
    )


def _exact(x: float) -> float:
    """At least x, 0 < x < 0.5, by one part in 2^52 at most, so that 1 - x is exact."""
    return math.ldexp(math.ceil(math.ldexp(x, 52)), -52)


def _attempt(
    chain: Chain, maps: Sequence[Scaled], chosen: tuple[int, ...], delta: float
) -> tuple[np.ndarray, float] | None:
    """(S, the largest sum of errors in a block row of a layer) with this delta; None where there is no factor."""
    count = len(chain.widths)
    beta = 1.0 - delta
    inverse = mul_up(1.0, 1.0 / beta)
    rows = [0.0] * (count + 1)  # errors by block rows: layers, then the output
    for k, m in enumerate(maps):
        rows[k], rows[k + 1] = add_up(rows[k], m.wrong), add_up(rows[k + 1], m.wrong)
    diagonal, couplings = [], []
    border: tuple[Any, float] | None = None
    for j in chosen:
        c = np.zeros((chain.widths[j],) * 2)
        if j - 1 >= 0 and j - 1 not in chosen:
            rows[j] = add_up(rows[j], _less(c, maps[j - 1].gram(True), inverse))
        if j + 1 < count and j + 1 not in chosen:
            rows[j] = add_up(rows[j], _less(c, maps[j].gram(False), inverse))
        c.flat[:: len(c) + 1] += beta
        rows[j] = add_up(rows[j], 4 * U * (1.0 + float(np.abs(c.diagonal()).max(initial=0.0))))
        diagonal.append(c)
    if count - 1 not in chosen:
        border = maps[-1].gram(True)
    for j, after in zip(chosen, (*chosen[1:], count), strict=True):
        if after == j + 1:
            couplings.append(maps[j].array)
            continue
        first, second = maps[j], maps[j + 1]
        product = Factor(second.array).times(first.array)
        couplings.append(product * (1.0 / beta))
        wrong = mul_up(gamma(min(first.terms, chain.widths[j + 1]) + 8), first.size, second.size, inverse)
        wrong = add_up(wrong, float(sum(product.shape)) * first.terms * 2.0**-1000)
        rows[j], rows[after] = add_up(rows[j], wrong), add_up(rows[after], wrong)
    found = bordered.eliminate(diagonal, couplings)
    if found is None:
        return None
    sigma, errors = found
    for j, e in zip((*chosen, count), errors, strict=True):
        rows[j] = add_up(rows[j], e)
    if border is not None:
        part, wrong = border
        sigma = sigma + part * (1.0 / beta)
        rows[count] = add_up(rows[count], mul_up(wrong, inverse), 8 * U * float(np.abs(sigma).sum()))
    top = rows[count] * (1 + 16 * U) + 4 * U * float(np.abs(sigma.diagonal()).max(initial=0.0))
    sigma.flat[:: len(sigma) + 1] += top
    return sigma, max(rows[:count])


def _less(c: np.ndarray, gram: tuple[Any, float], inverse: float) -> float:
    """C -= G / beta in place; the error in the 2-norm."""
    product, wrong = gram
    product *= inverse
    c -= product
    return mul_up(wrong, inverse) * (1 + 16 * U)
