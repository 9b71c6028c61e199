"""Proofs on an accelerator by residual: whatever a library's Cholesky does inside, one product checks its factor.

*Positive semidefinite matrices.* M (n, n) symmetric floats, R any matrix (the computed factor), P = fl(R'R), E = fl(M -
P). In any order of summation, with or without FMA, |P - R'R| <= gamma_n |R|'|R| entrywise (Higham, section 3.5), and
forming E rounds once, so

    M = R'R + (M - R'R) >= -e I,     e = (1 + 4 u) ||E||_F + gamma_n min(||R||_F^2, max(|R|'(|R| 1))) + tiny.

With M = fl((t - c) I - G), G the computed A'A of A (m, n), this proves ||A||_2^2 <= t as soon as

    e + gamma_m max(|A|'(|A| 1)) + 4 u (t + max g_ii) + tiny <= c,

since a symmetric matrix that is entrywise at most N has 2-norm at most its largest row sum. The slack is about
(m + n) n u relative to t at worst, and a few n u where the factor is nearly diagonal.

*Tiles.* Matrices are cut into squares of `TILE` rows, padded with zeros, and of symmetric and triangular ones the upper
tiles alone are kept. So a handful of programs serves every size, and one self-test every product.

*What is assumed of the device*: float64 sums, products and comparisons are rounded once each (IEEE 754), underflow may
be flushed to zero (covered by `tiny`). Strassen's algorithm, TF32 and sliced-integer emulations of float64 products
break that; `trusted` refuses them by a product whose entries span 2**+-200 and have one term each that is not zero, so
that the right result is known to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from lipbounds._norms import device_lanczos as lanczos
from lipbounds._norms.cholesky import TINY
from lipbounds._norms.rounding import U, add_up, gamma, mul_up
from lipbounds._text import device as places
from lipbounds._text.memory import available_memory

TILE = 2048
#: Sizes below this stay on the host, whose LAPACK is faster there than the way to a device and back.
SMALLEST = 512
_FASTER = 300.0  # dense float64 operations on a GPU in the time of one on the host
_GROWTHS = (0.0, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-4, 1e-2, 1.0)
_passed: dict[Any, bool] = {}

R = TypeVar("R")
Tiles = Mapping[tuple[int, int], jax.Array]  # by (row, column); absent is zero, or follows by symmetry


def free_bytes(device: Any) -> int:
    """80 % of the memory that is free on a device; that of the host where the device does not tell."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return int((available_memory() or 0.0) * 2**30)
    return int(0.8 * (stats["bytes_limit"] - stats["bytes_in_use"]))


def padded(n: int) -> int:
    """The side of a matrix in whole tiles."""
    return -(-n // TILE) * TILE


def proof_bytes(m: int, n: int) -> int:
    """Bytes on the device for a proof of the norm of an m x n matrix that lies there, n <= m; m = 0 for `positive`."""
    return 8 * (padded(m) * padded(n) + 2 * padded(n) * (padded(n) + TILE) + 4 * TILE * TILE)


@contextmanager
def exactly() -> Iterator[None]:
    """float64, products of full precision, and failed factorisations that give NaN in place of an error."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"), jax.debug_nans(False):
        with jax.debug_infs(False):
            yield


def on_device(proof: Callable[[], R]) -> R | None:
    """The result of a proof on a device; None, with a note, where the device fails (too little memory, say)."""
    try:
        return proof()
    except jax.errors.JaxRuntimeError as error:
        places.note(
            f"a proof on the device failed and was done on the host ({str(error).splitlines()[0][:80]})"
        )
        return None


# --- kernels: everything that a proof computes on the device -------------------------------------------------------


@partial(jax.jit, compiler_options=lanczos.UNTUNED)
def plus(c: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """C + A'B, tiles: the one product that proofs rely on."""
    return c + jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)


@partial(jax.jit, compiler_options=lanczos.UNTUNED)
def _less(c: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """C - A'B, for a factor, of which nothing is assumed."""
    return c - jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def mirrored(m: jax.Array) -> jax.Array:
    """The upper triangle and its mirror image: symmetric to the last bit."""
    # A sum with zeros is exact. (XLA of jax 0.10 compiles `where(i >= j, m, m.T)` for minutes on a CPU.)
    return jnp.triu(m) + jnp.triu(m, 1).T


@jax.jit
def _from_identity(g: jax.Array, d: jax.Array) -> jax.Array:
    """d I - G."""
    i = jnp.arange(g.shape[0])
    return jnp.where(i[:, None] == i[None, :], d - g, -g)


@jax.jit
def _root(m: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(m, symmetrize_input=False).T


@jax.jit
def _solved(r: jax.Array, m: jax.Array) -> jax.Array:
    """X with R'X = M."""
    return jax.scipy.linalg.solve_triangular(r, m, trans=1)


@jax.jit
def _residual(total: jax.Array, m: jax.Array, p: jax.Array, times: jax.Array) -> jax.Array:
    """Add times ||fl(M - P)||_F^2 to the total."""
    e = m - p
    return total + times * jnp.sum(e * e)


@jax.jit
def _sizes(square: jax.Array, sums: jax.Array, a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add (||A||_F^2, |A| 1)."""
    size = jnp.abs(a)
    return square + jnp.sum(size * size), sums + jnp.sum(size, axis=1)


@jax.jit
def _absolute_columns(total: jax.Array, a: jax.Array, s: jax.Array) -> jax.Array:
    """Add |A|'s, by sums and not by a product."""
    return total + jnp.sum(jnp.abs(a) * s[:, None], axis=0)


@jax.jit
def _highest(m: jax.Array) -> jax.Array:
    """The largest entry of the diagonal."""
    return jnp.max(jnp.diagonal(m))


@jax.jit
def _negative(m: jax.Array) -> jax.Array:
    return -m


@jax.jit
def _empty(m: jax.Array) -> jax.Array:
    return jnp.zeros_like(m)


def zero_tile(device: Any) -> jax.Array:
    """A tile of zeros, kept for the public call around this."""
    kept = places.kept()
    if ("zero", device) not in kept:
        kept["zero", device] = jax.device_put(np.zeros((TILE, TILE)), device)
    return kept["zero", device]


def programs(device: Any, blocks: int) -> list[tuple[Any, tuple[Any, ...]]]:
    """What `norm_bound` computes for a matrix with so many columns of tiles: programs, with the shapes they are given.

    A program that is compiled for these in advance (`lower(*shapes).compile()`, inside `exactly`) is found compiled.
    """

    def of(*shape: int, dtype: Any = np.float64) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    tile, line, number = of(TILE, TILE), of(TILE), of()
    found: list[tuple[Any, tuple[Any, ...]]] = [
        (plus, (tile, tile, tile)),
        (_less, (tile, tile, tile)),
        (mirrored, (tile,)),
        (_from_identity, (tile, np.float64(1.0))),
        (_root, (tile,)),
        (_solved, (tile, tile)),
        (_residual, (number, tile, tile, np.float64(1.0))),
        (_sizes, (number, line, tile)),
        (_absolute_columns, (line, tile, line)),
        (_highest, (tile,)),
        (_negative, (tile,)),
        (_empty, (tile,)),
    ]
    length, n = lanczos.basis_shape(blocks * TILE)
    if length:
        count = blocks * (blocks + 1) // 2
        places_ = (of(count, dtype=np.int64), of(count, dtype=np.int64))
        found += [
            (lanczos.stacked, ([tile] * count,)),
            (lanczos.begun, (np.zeros((2, length)), of(length, n))),
            (lanczos.advanced, (of(count, TILE, TILE), *places_, of(length, n), np.int64(0))),
        ]
    return found


def tiles_of(a: Any, device: Any, upper: bool = False) -> dict[tuple[int, int], jax.Array]:
    """The tiles of a host matrix, dense or sparse, on the device; tiles of zeros are left out."""
    rows, columns = (range(-(-n // TILE)) for n in a.shape)
    out = {}
    for i in rows:
        strip = a[i * TILE : (i + 1) * TILE]
        strip = strip.toarray() if sp.issparse(strip) else strip
        for j in columns:
            part = strip[:, j * TILE : (j + 1) * TILE]
            if (upper and j < i) or not part.any():
                continue
            tile = np.zeros((TILE, TILE))
            tile[: part.shape[0], : part.shape[1]] = part
            out[i, j] = jax.device_put(tile, device)
    return out


# --- the self-test -------------------------------------------------------------------------------------------------


def trusted(device: Any) -> bool:
    """Whether the product of tiles is an IEEE product on this device; once per process, with a note if it is not."""
    if device not in _passed:
        _passed[device] = _is_ieee(device)
    if not _passed[device]:
        places.note(
            f"{device.device_kind} failed the self-test of float64 products: proofs were done on the host"
        )
    return _passed[device]


def _is_ieee(device: Any) -> bool:
    """Compare one product with its exact entries.

    A and B have one row of numbers v and w near 2**-200 with all of their 53 bits; every column has, in another row,
    an entry of 2**200 that meets zeros only. So (A'B)_ij = v_i w_j is a sum with one term, rounded once. Whatever cuts
    numbers into slices below the largest of a row or column loses v and w, and what multiplies in a lower precision
    loses their last bits.
    """
    rng = np.random.default_rng(0)
    v, w = (np.ldexp(rng.uniform(1.0, 2.0, TILE) * rng.choice([-1.0, 1.0], TILE), -200) for _ in range(2))
    a, b = np.zeros((2, TILE, TILE))
    middle, columns = TILE // 2, np.arange(TILE)
    free = np.delete(columns, middle)
    mine, theirs = free[::2], free[1::2]
    a[mine[columns % mine.size], columns] = 2.0**200
    b[theirs[columns % theirs.size], columns] = -(2.0**200)
    a[middle], b[middle] = v, w
    found = plus(zero_tile(device), jax.device_put(a, device), jax.device_put(b, device))
    return bool((np.asarray(found) == v[:, None] * w[None, :]).all())


# --- proofs --------------------------------------------------------------------------------------------------------


def _gram(a: Tiles, blocks: int, device: Any) -> dict[tuple[int, int], jax.Array]:
    """fl(A'A), its upper tiles, for A with so many columns of tiles."""
    by_row: dict[int, list[int]] = {}
    for k, j in sorted(a):
        by_row.setdefault(k, []).append(j)
    zero, out = zero_tile(device), {}
    for j in range(blocks):
        for i in range(j + 1):
            total = zero
            for k, present in by_row.items():
                if i in present and j in present:
                    total = plus(total, a[k, i], a[k, j])
            out[i, j] = mirrored(total) if i == j else total
    return out


def factor_but_last(m: Tiles, blocks: int) -> tuple[dict[tuple[int, int], jax.Array], Any]:
    """(R, X): R with R'R close to M in its upper tiles, without the last one where there are more than `blocks`.

    X is what is left of that one. NaN where M is not positive definite. Tiles that stay zero are left out.
    """
    left, out = dict(m), {}
    for k in range(blocks):
        out[k, k] = _root(left.pop((k, k)))
        after = sorted(j for i, j in left if i == k)
        for j in after:
            out[k, j] = _solved(out[k, k], left.pop((k, j)))
        for place, j in enumerate(after):
            for i in after[: place + 1]:
                if (i, j) not in left:
                    left[i, j] = _empty(out[k, k])
                left[i, j] = _less(left[i, j], out[k, i], out[k, j])
    return out, left.get((blocks, blocks))


def _absolute(a: Tiles, n: int, device: Any) -> tuple[float, float]:
    """Upper bounds of (||A||_F^2, || |A|'|A| ||_2), the latter by max(|A|'(|A| 1)); n entries in a row and a column."""
    square, none = (jax.device_put(np.zeros(shape), device) for shape in ((), TILE))
    rows: dict[int, Any] = {}
    for (i, _), tile in a.items():
        square, rows[i] = _sizes(square, rows.get(i, none), tile)
    columns: dict[int, Any] = {}
    for (i, j), tile in a.items():
        columns[j] = _absolute_columns(columns.get(j, none), tile, rows[i])
    top = float(np.max([np.asarray(c) for c in columns.values()], initial=0.0))
    loose = 1.0 + 2.0 * gamma(n * n + 8)
    return float(square) * loose, top * loose


def _shortfall(m: Tiles, blocks: int, device: Any) -> float:
    """e >= 0 with M >= -e I, proved by the residual of a computed factor; inf where there is none.

    M is given by its upper tiles, those on the diagonal symmetric.
    """
    return residual(m, factor_but_last(m, blocks)[0], blocks, device)


def residual(m: Tiles, r: Tiles, blocks: int, device: Any) -> float:
    """e >= 0 with M >= R'R - e I, whatever the upper tiles R are; inf where they are not finite."""
    n = blocks * TILE
    total, zero = jax.device_put(np.float64(0.0), device), zero_tile(device)
    for i, j in sorted(m.keys() | r.keys()):
        p = zero
        for k in range(i + 1):
            if (k, i) in r and (k, j) in r:
                p = plus(p, r[k, i], r[k, j])
        total = _residual(total, m.get((i, j), zero), p, np.float64(1.0 if i == j else 2.0))
    length = math.sqrt(max(float(total), 0.0)) if float(total) < math.inf else math.inf  # NaN: inf
    weight = min(_absolute(r, n, device))
    if not math.isfinite(weight) or length == math.inf:
        return math.inf
    loose = 1.0 + 2.0 * gamma(n * n + 8)
    return add_up(mul_up(length + 2.0**-500 * n, loose), mul_up(gamma(n + 4), weight), n * n * TINY)


def norm_bound(a: Tiles, shape: tuple[int, int], device: Any) -> float | None:
    """A bound t >= ||A||_2^2 with max|a| in [2**-100, 2**100]; None where there is no proof.

    Args:
        a: the tiles of A, float64 on the device; taken as exact.
        shape: (m, n) of A without the padding, n the smaller side.
        device: where the tiles are.
    """
    m, n = map(padded, shape)
    blocks = n // TILE
    with exactly():
        if not trusted(device):
            return None
        g = _gram(a, blocks, device)
        absolute = _absolute(a, max(m, n), device)[1]
        highest = float(np.max([float(_highest(g[j, j])) for j in range(blocks)]))
        if not (math.isfinite(absolute) and math.isfinite(highest)):
            return None
        of_gram = add_up(mul_up(gamma(m + 4), absolute), m * n * TINY)
        top = max(lanczos.top_eigenvalue(g, n, device, tol=1e-10), highest)
        c = 2.0 * of_gram + 16.0 * U * n * top
        for growth in _GROWTHS:
            for _ in range(3):
                t = top * (1.0 + growth) + 2.0 * c
                d = np.float64(t - c)
                shifted = {
                    (i, j): _from_identity(tile, d) if i == j else _negative(tile)
                    for (i, j), tile in g.items()
                }
                e = _shortfall(shifted, blocks, device)
                if e == math.inf:
                    break
                need = add_up(e, of_gram, 4.0 * U * (t + highest))
                if need <= c:
                    places.note(said(device))
                    return t
                c = 1.25 * need
    return None


def wanted(n: int) -> Any:
    """The accelerator of the public call around this if a proof on n x n matrices fits and pays there, else None."""
    device = places.chosen() if n >= SMALLEST else None
    return None if device is None or proof_bytes(0, n) > free_bytes(device) else device


def norm_bound_of(b: Any, flops: float) -> float | None:
    """`norm_bound` of B (r, n), r <= n, dense or sparse on the host, on the accelerator of the public call around this.

    None where there is no accelerator, no memory on it, or no gain over `flops` operations on the host.
    """
    r, n = b.shape
    device = wanted(r)
    if device is None or float(r) * r * (r + n) > _FASTER * flops or proof_bytes(n, r) > free_bytes(device):
        return None

    def proof() -> float | None:
        with exactly():
            return norm_bound(tiles_of(b.T.tocsr() if sp.issparse(b) else b.T, device), (n, r), device)

    return on_device(proof)


def positive(m: np.ndarray) -> bool | None:
    """Whether M >= 0 was proved on the accelerator of the public call around this; None: the host has to do it.

    M (n, n) float64 on the host, its lower triangle is read. It is scaled to a diagonal between 1 and 4, by powers of
    two: M >= 0 if and only if diag(d) M diag(d) >= 0.
    """
    device = wanted(m.shape[0])
    if device is None:
        return None
    half = -((np.frexp(m.diagonal())[1] - 1) // 2)
    with np.errstate(under="ignore"):
        scaled = np.ldexp(m, half[:, None] + half[None, :])
    return on_device(lambda: _positive(scaled.T, device))


def _positive(m: np.ndarray, device: Any) -> bool | None:
    """`positive`, by the upper triangle, for a diagonal of about the same size everywhere: one shift c I serves it."""
    n = m.shape[0]
    blocks = padded(n) // TILE
    with exactly():
        if not trusted(device):
            return None
        whole = {(i, j): zero_tile(device) for j in range(blocks) for i in range(j + 1)}
        whole.update(tiles_of(m, device, upper=True))
        # The padding gets a diagonal of ones, which changes nothing for the others.
        rest = np.zeros((TILE, TILE))
        np.fill_diagonal(rest, np.arange(TILE) >= n - (blocks - 1) * TILE)
        last = (blocks - 1, blocks - 1)
        whole[last] = whole[last] + jax.device_put(rest, device)
        top = max(float(np.abs(m.diagonal()).max()), 1.0)
        c = 16.0 * U * n * top
        for _ in range(3):
            d = np.float64(c)
            shifted = {
                (i, j): _negative(_from_identity(mirrored(tile), d)) if i == j else tile
                for (i, j), tile in whole.items()
            }
            e = _shortfall(shifted, blocks, device)
            if e == math.inf:
                return False
            need = add_up(e, 4.0 * U * (top + c), n * n * TINY)
            if need <= c:
                places.note(said(device))
                return True
            c = 1.25 * need
    return False


def said(device: Any) -> str:
    return f"large proofs by residual in float64 on {device.device_kind}"
