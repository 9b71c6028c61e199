"""Block tridiagonal matrices with a border, proved nearly positive semidefinite: on the host, or on an accelerator.

Given symmetric blocks C_1, ..., C_m and couplings K_i (n_{i+1}, n_i) from each to the next, the last one to a border of
a few rows, all taken as exact, `eliminate` finds S with

    M(S) = [[C_1, -K_1'], [-K_1, C_2, ...], ..., [..., C_m, -K_m'], [-K_m, S]]  >=  -diag(e_1 I, ..., e_m I, e I).

*On the host*: with L_i the computed factor, F_i the computed solution of L_i F_i = K_i', fl(C_{i+1} - F_i'F_i) in the
place of C_{i+1}, the errors of each step are those of an exact factorisation of a matrix with other blocks (Higham,
Theorems 10.3, 8.5 and section 3.5):

    ||L L' - C||_2 <= `cholesky_shift`(n) max c_ii,        ||L F - K'||_F <= 2 gamma_{n+4} ||L||_F ||F||_F,
    ||fl(C - F'F) - (C - F'F)||_2 <= gamma_{n+8} min(||F||_F^2, max(|F|'(|F| 1))) + 2 u ||C||_F.

They do not grow along the chain: a block row has the sum of its own. *On an accelerator*: the residual of the whole
computed factor, tile by tile (`device`), zero tiles left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse as sp

from lipbounds._norms import device, schur
from lipbounds._norms.cholesky import TINY
from lipbounds._norms.rounding import U, add_up, gamma, mul_up, require_gradual_underflow
from lipbounds._text import device as places

Blocks = Sequence[Any]  # float64, dense or CSR


def _dense(m: Any) -> np.ndarray:
    return np.array(m.toarray() if sp.issparse(m) else m, np.float64, order="C")


def device_bytes(widths: Sequence[int]) -> int:
    """Bytes of `eliminate` on an accelerator for these widths, the border last: tiles of the matrix and its factor."""
    steps = itertools.pairwise(widths)
    return sum(2 * 8 * device.padded(n) * (device.padded(n) + device.padded(m)) for n, m in steps)


def _wanted(widths: Sequence[int]) -> Any:
    """The accelerator of the public call around this if there is one with memory enough, and a gain; else None."""
    place = places.chosen() if max(widths) >= device.SMALLEST else None
    return None if place is None or device_bytes(widths) > device.free_bytes(place) else place


def usual_error(widths: Sequence[int]) -> float:
    """About the largest e of `eliminate` for blocks of these widths on a diagonal of about 1."""
    if _wanted(widths) is not None:
        return 64.0 * U * sum(map(device.padded, widths))
    return 8.0 * schur.cholesky_shift(max(widths)) + 64.0 * U


def eliminate(diagonal: Blocks, couplings: Blocks) -> tuple[np.ndarray, list[float]] | None:
    """(S, [e_1, ..., e_m, e]) as above; None where a block is not positive definite in floats."""
    require_gradual_underflow()
    place = _wanted([c.shape[0] for c in diagonal] + [couplings[-1].shape[0]])
    if place is not None:
        found = device.on_device(lambda: on_accelerator(diagonal, couplings, place))
        if found is not None:
            return found
    return _on_host(diagonal, couplings)


def _on_host(diagonal: Blocks, couplings: Blocks) -> tuple[np.ndarray, list[float]] | None:
    wrong = [0.0] * (len(diagonal) + 1)
    before: np.ndarray | None = None
    for i, coupling in enumerate(couplings):
        c = _dense(diagonal[i])
        n = len(c)
        if before is not None:
            wrong[i] = add_up(wrong[i], _subtracted(c, before))
        tops = c.diagonal()
        if not np.isfinite(tops).all() or not tops.min(initial=1.0) > 0.0:
            return None
        wrong[i] = add_up(wrong[i], mul_up(schur.cholesky_shift(n), float(tops.max())), n * n * TINY)
        length = math.sqrt(float(tops.sum())) * (1 + gamma(n + 8))  # of L: ||l_i||^2 <= c_ii / (1 - g)
        if not schur.factorise(c):
            return None
        before = np.ascontiguousarray(_dense(coupling).T)
        schur.solve(c, before)
        if not np.isfinite(before).all():
            return None
        moved = mul_up(2 * gamma(n + 4), length, _frobenius(before))
        moved = add_up(moved, before.size * TINY)
        wrong[i], wrong[i + 1] = add_up(wrong[i], moved), add_up(wrong[i + 1], moved)
    assert before is not None
    s = np.zeros((before.shape[1],) * 2)
    wrong[-1] = add_up(wrong[-1], _subtracted(s, before))
    return -s, wrong


def _frobenius(x: np.ndarray) -> float:
    return math.sqrt(float(np.einsum("ij,ij->", x, x))) * (1 + gamma(x.size + 8)) + x.size * TINY


def _subtracted(c: np.ndarray, f: np.ndarray) -> float:
    """C -= F'F in place, exactly symmetric; a bound of the error in the 2-norm."""
    size = np.abs(f)
    spread = float((size.T @ size.sum(axis=1)).max(initial=0.0)) * (1 + gamma(sum(f.shape) + 8))
    weight = min(mul_up(_frobenius(f), _frobenius(f)), spread)
    rounded = mul_up(2 * U, add_up(_frobenius(c), weight))
    c -= schur.gram(f)
    return add_up(mul_up(gamma(len(f) + 8), weight), rounded, c.size * TINY)


# --- on an accelerator ---------------------------------------------------------------------------------------------


def on_accelerator(diagonal: Blocks, couplings: Blocks, place: Any) -> tuple[np.ndarray, list[float]] | None:
    """`eliminate` by the residual; None where the device fails its self-test or a block is not positive definite."""
    tile, border = device.TILE, couplings[-1].shape[0]
    if border > tile:
        return None
    inner = sp.block_array(_rows(diagonal, couplings), format="csr")
    n = inner.shape[0]
    blocks = device.padded(n) // tile
    with device.exactly():
        if not device.trusted(place):
            return None
        m = device.tiles_of(inner, place, upper=True)
        for i in range(blocks):  # the padding gets a diagonal of ones; a symmetric tile stays one
            m.setdefault((i, i), device.zero_tile(place))
        rest = np.diag((np.arange(tile) >= n - (blocks - 1) * tile).astype(np.float64))
        m[blocks - 1, blocks - 1] += jax.device_put(rest, place)
        last = sp.csr_array((n, border)) + sp.vstack(
            [sp.csr_array((n - couplings[-1].shape[1], border)), sp.csr_array(-couplings[-1].T)]
        )
        m |= {(i, blocks): t for (i, _), t in device.tiles_of(sp.csr_array(last), place).items()}
        m[blocks, blocks] = device.zero_tile(place)
        r, left = device.factor_but_last(m, blocks)
        s = -np.asarray(left)[:border, :border]
        if not np.isfinite(s).all():
            return None
        s = (s + s.T) / 2
        corner = np.eye(tile)
        corner[:border, :border] = s
        m[blocks, blocks] = jax.device_put(corner, place)
        root = np.eye(tile)
        root[:border, :border] = 0.0  # S is what is subtracted there
        r[blocks, blocks] = jax.device_put(root, place)
        e = device.residual(m, r, blocks + 1, place)
        if e == math.inf:
            return None
        places.note(device.said(place))
    return s, [e] * (len(diagonal) + 1)


def _rows(diagonal: Blocks, couplings: Blocks) -> list[list[Any]]:
    count = len(diagonal)
    rows: list[list[Any]] = [[None] * count for _ in range(count)]
    for i, c in enumerate(diagonal):
        rows[i][i] = sp.csr_array(c)
        if i + 1 < count:
            rows[i][i + 1], rows[i + 1][i] = sp.csr_array(-couplings[i].T), sp.csr_array(-couplings[i])
    return rows
