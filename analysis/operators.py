"""A convolution or dense layer as a linear map W of one input: products, eigenvalues and discs of A = W'W, matrix-free.

For a batch of masks (entries of the input that a forged layer keeps, D = diag(mask)): lambda_max(A'), ||A'||_2 and the
disc bounds of A' = A D, as `spectra` defines them for matrices. Small maps are written out as a matrix. Of a large
convolution

- eigenvalues come from restarted Lanczos on D A D for the whole batch, with a Rayleigh quotient in float64 at its end:
  what is returned is attained, so a lower bound of lambda_max(A'), and the residual says how close an eigenvalue is;
- entries |A_ij| come from probes: A applied to a lattice of unit vectors, spaced so that their images do not overlap.
  Two inputs i, j meet in A only if one window holds both, so |i - j| <= r = (k - 1) dilation / input dilation along
  every axis, whatever stride and padding are, and the spacing 2 r + 1 is enough. Every image entry is then one |A_ij|
  with a known j, and the row sums of |A| D follow for all masks at once.

The map is the layer in real arithmetic with the weights as stored, whatever dtype it computes in; the bias is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lipbounds as lb
from lipbounds._norms import gamma
from lipbounds.analysis.spectra import By, Discs, largest_eigenvalue, spectral_norm_forged
from lipbounds.results import Guarantee

DENSE_ENTRIES = 2**22  # largest matrix (m n) that a convolution is written out as
EXACT_SIDE = 512  # largest smaller side of a matrix whose eigenvalues LAPACK finds for every mask
_STEPS = 16  # Lanczos steps per round
_PROBED = 2**23  # entries of the images of one batch of probes
_MASKED = 2**24  # entries of the masks that share one pass of probes


@dataclasses.dataclass(frozen=True, eq=False)
class _Axis:
    """One spatial axis: its length, the reach r of A along it, and the spacing of probes."""

    length: int
    reach: int
    spacing: int


@dataclasses.dataclass(frozen=True, eq=False)
class Operator:
    """W of a layer, for one input of shape `in_shape` (n entries) and output of shape `out_shape` (m entries).

    matrix  (m, n) float64 where it is written out, else None
    terms   the most products in one entry of A
    """

    layer: nnx.Module
    graph: Any
    weights: Any
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    terms: int
    matrix: np.ndarray | None

    @property
    def size(self) -> tuple[int, int]:
        """(m, n)."""
        return math.prod(self.out_shape), math.prod(self.in_shape)

    def matvec(self, x: Any) -> np.ndarray:
        """W x in float64 for a batch x (B, *in_shape): (B, *out_shape)."""
        with jax.enable_x64(True):
            return np.asarray(_apply(self.graph, self.weights, jnp.asarray(_batch(x, self.in_shape))))

    def rmatvec(self, y: Any) -> np.ndarray:
        """W' y in float64 for a batch y (B, *out_shape): (B, *in_shape)."""
        with jax.enable_x64(True):
            values = jnp.asarray(_batch(y, self.out_shape))
            return np.asarray(_transpose(self.graph, self.weights, values, self.in_shape))

    def dense(self) -> np.ndarray:
        """The matrix (m, n) in float64, also where it is large."""
        if self.matrix is not None:
            return self.matrix
        m, n = self.size
        return self.matvec(np.eye(n).reshape(n, *self.in_shape)).reshape(n, m).T


def plain_layer(layer: Any) -> nnx.Module:
    """A copy of an nnx.Conv or nnx.Linear without bias, with products at the highest precision.

    It computes in the dtype of its weights, at least float32. ValueError for other modules and for layers with a
    product of their own.
    """
    if type(layer) not in (nnx.Conv, nnx.Linear):
        raise ValueError(f"diagnostics read nnx.Conv and nnx.Linear, not {type(layer).__name__}")
    product = "conv_general_dilated" if isinstance(layer, nnx.Conv) else "dot_general"
    if getattr(layer, product) is not getattr(jax.lax, product):
        raise ValueError(f"the layer computes with its own {product}: its matrix is not known")
    kernel = jnp.asarray(layer.kernel[...])
    kernel = kernel if kernel.dtype.itemsize >= 4 else kernel.astype(jnp.float32)
    plain: Any = nnx.clone(layer)
    if getattr(layer, "mask", None) is not None:
        kernel, plain.mask = kernel * jnp.asarray(layer.mask).astype(kernel.dtype), None
    plain.kernel = nnx.Param(kernel)
    plain.bias, plain.use_bias = None, False
    plain.dtype, plain.preferred_element_type, plain.precision = None, None, jax.lax.Precision.HIGHEST
    return plain


def input_rank(layer: Any) -> int:
    """Axes of one input: (*space, channels) of a convolution, (features,) of a dense layer."""
    return len(layer.kernel_size) + 1 if isinstance(layer, nnx.Conv) else 1


def operator(layer: Any, in_shape: tuple[int, ...], *, dense_entries: int = DENSE_ENTRIES) -> Operator:
    """The linear map of an nnx.Conv on inputs (*space, channels) or of an nnx.Linear on inputs (features,).

    Convolutions of at most `dense_entries` = m n entries are written out. ValueError as in `plain_layer`, for shapes
    that do not fit and for weights that are not finite.
    """
    plain: Any = plain_layer(layer)
    convolution = isinstance(plain, nnx.Conv)
    shape = tuple(int(n) for n in in_shape)
    rank = input_rank(plain)
    if len(shape) != rank or shape[-1] != plain.in_features or min(shape) < 1:
        raise ValueError(
            f"one input of this layer has {rank} axes, the last of {plain.in_features} entries; got shape {shape}"
        )
    graph, state = nnx.split(plain)
    weights = jax.tree.map(lambda a: np.asarray(a).astype(np.float64), state)
    if not all(np.isfinite(a).all() for a in jax.tree.leaves(weights)):
        raise ValueError("the layer's weights are not finite")
    with jax.enable_x64(True):
        out = jax.eval_shape(
            functools.partial(_apply, graph), weights, jax.ShapeDtypeStruct((1, *shape), jnp.float64)
        )
    window = math.prod(plain.kernel_size) if convolution else 1
    found = Operator(plain, graph, weights, shape, out.shape[1:], window * plain.out_features, None)
    if not math.prod(found.size):
        raise ValueError(f"inputs of shape {shape} are too small for this layer: its output is empty")
    if not convolution:
        matrix = np.asarray(plain.kernel[...]).astype(np.float64).T
    elif math.prod(found.size) <= dense_entries:
        matrix = found.dense()
    else:
        return found
    return dataclasses.replace(found, matrix=matrix)


def norm_bound(op: Operator, *, guarantee: Guarantee = "auto", seed: int = 0) -> lb.UpperBound:
    """An upper bound of ||W||_2 with its guarantee, by `lb.naive` on the layer alone."""
    layer: Any = op.layer
    form = lb.trace(lambda x: layer(x).reshape(-1), jax.ShapeDtypeStruct(op.in_shape, jnp.float32))
    bound = lb.naive(form, guarantee=guarantee, seed=seed)
    if not isinstance(bound, lb.UpperBound):
        raise ValueError("guarantee='estimate' gives no upper bound")
    return bound


# ---------------------------------------------------------------------------------------------------- eigenvalues
@dataclasses.dataclass(frozen=True, eq=False)
class Top:
    """Largest eigenvalues (or norms) for B masks.

    value     (B,) attained: at most the true ones, up to float64 rounding, and equal to them where `exact`
    residual  (B,) ||S v - rho v|| / rho at the vector v found, S symmetric: a true eigenvalue of S is that close to
              rho, relatively. S = D A D, rho = value, or D A A D and rho = value^2 for norms. 0 where `exact`
    exact     LAPACK on the matrix, to rounding
    """

    value: np.ndarray
    residual: np.ndarray
    exact: bool


def largest_eigenvalues(
    op: Operator, masks: Any, *, norm: bool = False, tolerance: float = 1e-3, rounds: int = 8, seed: int = 0
) -> Top:
    """lambda_max(A') for every mask (B, *in_shape) of booleans, True = kept; with `norm` ||A'||_2 instead.

    By LAPACK where the matrix is written out and its smaller side is at most EXACT_SIDE. Else Lanczos with full
    reorthogonalisation from random starts, in float32, 16 steps a round and restarted from the best vector until the
    residual of every mask is below `tolerance` or `rounds` are done.
    """
    kept = _masks(op, masks)
    if op.matrix is not None and min(op.size) <= EXACT_SIDE:
        measure = spectral_norm_forged if norm else largest_eigenvalue
        values = np.array([measure(op.matrix, mask) for mask in kept])
        return Top(values, np.zeros(len(kept)), True)
    n = op.size[1]
    limit = 2**24 if jax.default_backend() == "cpu" else 2**28
    count = min(len(kept), max(1, limit // ((_STEPS + 1) * n)))
    value, residual = np.zeros(len(kept)), np.zeros(len(kept))
    key = jax.random.key(seed)
    for at in range(0, len(kept), count):
        part = kept[at : at + count]
        padded = np.concatenate([part, np.zeros((count - len(part), n), bool)])
        found = _lanczos(op, padded, norm, tolerance, rounds, jax.random.fold_in(key, at))
        value[at : at + count], residual[at : at + count] = (a[: len(part)] for a in found)
    return Top(value, residual, False)


def _lanczos(
    op: Operator, masks: np.ndarray, norm: bool, tolerance: float, rounds: int, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    weights = jax.tree.map(lambda a: a.astype(np.float32), op.weights)
    kept = jnp.asarray(masks)
    vector = jax.random.normal(key, masks.shape, jnp.float32)
    for _ in range(rounds):
        basis = _begin(vector, kept)
        diagonal, beside = [], []
        for k in range(_STEPS):  # one step a call: loops of convolutions are slow on CPUs
            basis, alpha, beta = _step(op.graph, weights, kept, basis, k, op.in_shape, norm)
            diagonal.append(alpha)
            beside.append(beta)
        a, b = np.asarray(jnp.stack(diagonal, 1), np.float64), np.asarray(jnp.stack(beside, 1), np.float64)
        places = np.arange(_STEPS)
        small = np.zeros((len(masks), _STEPS, _STEPS))
        small[:, places, places] = a
        small[:, places[1:], places[:-1]] = b[:, :-1]  # eigh reads the lower triangle
        ritz, vectors = np.linalg.eigh(small)
        vector = _combine(basis, jnp.asarray(vectors[:, :, -1], jnp.float32))
        if (b[:, -1] * np.abs(vectors[:, -1, -1]) <= tolerance * ritz[:, -1]).all():
            break
    with jax.enable_x64(True):
        final = jnp.asarray(np.asarray(vector, np.float64))
        value, residual = _rayleigh(op.graph, op.weights, kept, final, op.in_shape, norm)
        return np.asarray(value), np.asarray(residual)


@functools.partial(jax.jit, static_argnames=("graph",))
def _apply(graph: Any, weights: Any, x: jax.Array) -> jax.Array:
    """W x: the derivative of the layer, which drops a bias and is what `_transpose` transposes."""
    return jax.jvp(nnx.merge(graph, weights, copy=True), (jnp.zeros_like(x),), (x,))[1]


@functools.partial(jax.jit, static_argnames=("graph", "in_shape"))
def _transpose(graph: Any, weights: Any, y: jax.Array, in_shape: tuple[int, ...]) -> jax.Array:
    start = jax.ShapeDtypeStruct((len(y), *in_shape), y.dtype)
    return jax.linear_transpose(functools.partial(_apply, graph, weights), start)(y)[0]


def _gram(graph: Any, weights: Any, x: jax.Array, in_shape: tuple[int, ...]) -> jax.Array:
    """A x for a batch of flat x (B, n)."""
    image = _apply(graph, weights, x.reshape(-1, *in_shape))
    return _transpose(graph, weights, image, in_shape).reshape(x.shape)


def _symmetric(
    graph: Any, weights: Any, kept: jax.Array, x: jax.Array, in_shape: tuple[int, ...], norm: bool
) -> jax.Array:
    """D A D x, or D A A D x."""
    image = _gram(graph, weights, jnp.where(kept, x, 0.0), in_shape)
    if norm:
        image = _gram(graph, weights, image, in_shape)
    return jnp.where(kept, image, 0.0)


def _unit(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x / ||x||, ||x||) of every row, zero rows staying zero."""
    top = jnp.maximum(jnp.abs(x).max(axis=-1), jnp.finfo(x.dtype).tiny)
    length = top * jnp.sqrt(jnp.square(x / top[:, None]).sum(axis=-1))
    return x / jnp.maximum(length, jnp.finfo(x.dtype).tiny)[:, None], length


@jax.jit
def _begin(vector: jax.Array, kept: jax.Array) -> jax.Array:
    """The basis (steps + 1, B, n), its first vector set."""
    first, _ = _unit(jnp.where(kept, vector, 0.0))
    return jnp.zeros((_STEPS + 1, *vector.shape), vector.dtype).at[0].set(first)


@functools.partial(jax.jit, static_argnames=("graph", "in_shape", "norm"))
def _step(
    graph: Any, weights: Any, kept: jax.Array, basis: jax.Array, k: int, in_shape: tuple[int, ...], norm: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Basis vector k + 1, and the entries (k, k) and (k + 1, k) of the tridiagonal matrix."""
    image = _symmetric(graph, weights, kept, basis[k], in_shape, norm)
    alpha = (basis[k] * image).sum(axis=-1)
    rest = image
    for _ in range(2):
        rest = rest - jnp.einsum("kb,kbn->bn", jnp.einsum("kbn,bn->kb", basis, rest), basis)
    vector, beta = _unit(rest)
    # in an invariant subspace, what is left is rounding
    ended = beta <= 1e-6 * jnp.sqrt(jnp.square(image).sum(axis=-1))
    vector = jnp.where(ended[:, None], 0.0, vector)
    return basis.at[k + 1].set(vector), alpha, jnp.where(ended, 0.0, beta)


@jax.jit
def _combine(basis: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("kbn,bk->bn", basis[:-1], weights)


@functools.partial(jax.jit, static_argnames=("graph", "in_shape", "norm"))
def _rayleigh(
    graph: Any, weights: Any, kept: jax.Array, x: jax.Array, in_shape: tuple[int, ...], norm: bool
) -> tuple[jax.Array, jax.Array]:
    unit, _ = _unit(jnp.where(kept, x, 0.0))
    image = _symmetric(graph, weights, kept, unit, in_shape, norm)
    if norm:
        half = _gram(graph, weights, unit, in_shape)
    else:
        half = _apply(graph, weights, unit.reshape(-1, *in_shape)).reshape(len(unit), -1)
    rho = jnp.square(half).sum(axis=-1)
    gap = jnp.sqrt(jnp.square(image - rho[:, None] * unit).sum(axis=-1))
    relative = jnp.where(rho > 0, gap / jnp.where(rho > 0, rho, 1.0), 0.0)
    return jnp.sqrt(rho) if norm else rho, relative


# ---------------------------------------------------------------------------------------------------------- discs
def discs(op: Operator, mask: Any = None, by: By = "row") -> Discs:
    """Gershgorin's discs of A' at one mask (*in_shape) of booleans, of A at None; radii rounded upwards.

    Equal to `gershgorin_discs(forged_matrix(W, mask), by)` up to rounding, which is added to the radii (at most
    gamma_k (|W|'|W| 1)_i for k terms in a sum, in float64).
    """
    if by not in ("row", "column"):
        raise ValueError(f'by must be "row" or "column", got {by!r}')
    kept = np.ones(op.in_shape, bool) if mask is None else np.asarray(mask)
    kept = _masks(op, kept[None])
    used = kept if by == "row" else np.ones_like(kept)
    centers, radii = next(iter(_sums(op, used)))
    if by == "column":  # A is symmetric, so its columns are its rows; those of zeroed entries are zero
        return Discs(np.where(kept[0], centers, 0.0), np.where(kept[0], radii[0], 0.0), by)
    return Discs(np.where(kept[0], centers, 0.0), radii[0], by)


def disc_bounds(op: Operator, masks: Any) -> tuple[float, np.ndarray, np.ndarray]:
    """The disc bounds of A, and those of A' by row (B,) and by column (B,) for masks (B, *in_shape) of booleans.

    A is symmetric: its bound is the same by row and by column.
    """
    kept = np.concatenate([np.ones((1, op.size[1]), bool), _masks(op, masks)])
    rows, columns = [], []
    whole, at = np.empty(0), 0
    for centers, radii in _sums(op, kept):
        part = kept[at : at + len(radii)]
        reach = np.where(
            radii > 0, np.nextafter(np.where(part, centers, 0.0) + radii, np.inf), centers * part
        )
        if not at:
            whole = reach[0]
        rows.append(reach.max(axis=1))
        columns.append(np.where(part, whole, 0.0).max(axis=1))
        at += len(radii)
    by_row, by_column = np.concatenate(rows), np.concatenate(columns)
    # sums in another order may end a rounding above the bound of A, which bounds A' too; more would be an error
    by_row = np.where(by_row <= by_row[0] * (1 + 1e-12), np.minimum(by_row, by_row[0]), by_row)
    return float(by_row[0]), by_row[1:], by_column[1:]


def _sums(op: Operator, masks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(n,) a_ii and (b, n) upper bounds of the sums over kept j != i of |a_ij|, for consecutive parts of the masks."""
    n = op.size[1]
    absolute = dataclasses.replace(op, weights=jax.tree.map(np.abs, op.weights))
    ones = np.ones((1, *op.in_shape))
    largest = absolute.rmatvec(absolute.matvec(ones)).reshape(n)
    allowance = largest * gamma(2 * (op.terms + n) + 16)
    step = max(1, _MASKED // n)
    for at in range(0, len(masks), step):
        part = masks[at : at + step].astype(np.float64)
        diagonal, sums = _matrix_sums(op.matrix, part) if op.matrix is not None else _probe(op, part)
        yield diagonal, np.where(largest > 0, sums + allowance, 0.0)


def _matrix_sums(w: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = w.shape[1]
    diagonal, sums = np.square(w).sum(axis=0), np.empty((len(masks), n))
    step = max(1, _PROBED // n)
    for at in range(0, n, step):
        block = np.abs(w[:, at : at + step].T @ w)
        rows = np.arange(len(block))
        block[rows, at + rows] = 0.0
        sums[:, at : at + step] = masks @ block.T
    return diagonal, sums


def _axes(op: Operator) -> tuple[_Axis, ...]:
    layer: Any = op.layer
    found = []
    for axis, length in enumerate(op.in_shape[:-1]):
        window, dilation, gaps = (
            (value or 1) if isinstance(value, int) or value is None else value[axis]
            for value in (layer.kernel_size, layer.kernel_dilation, layer.input_dilation)
        )
        reach = (window - 1) * dilation // gaps
        spacing = min(2 * reach + 1, length)
        if isinstance(layer.padding, str) and layer.padding.upper() == "CIRCULAR":
            while length % spacing:  # around the ring too
                spacing += 1
        found.append(_Axis(length, reach, spacing))
    return tuple(found)


def _probe(op: Operator, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `_matrix_sums`, by probes: for every lattice offset and batch of channels of a group one product with A."""
    axes, channels = _axes(op), op.in_shape[-1]
    groups = op.layer.feature_group_count  # type: ignore[attr-defined]
    width, space = channels // groups, math.prod(op.in_shape[:-1])
    most = max(1, _PROBED // max(op.size))
    batch = max(d for d in range(1, width + 1) if width % d == 0 and d <= most)
    index = np.arange(space).reshape(op.in_shape[:-1])
    with jax.enable_x64(True):
        kept = jnp.asarray(masks).reshape(len(masks), space, groups, width)
        diagonal = jnp.zeros((space, groups, width))
        sums = jnp.zeros(kept.shape)
        for offset in itertools.product(*(range(a.spacing) for a in axes)):
            lattice = np.ones(op.in_shape[:-1], bool)
            source = np.zeros_like(index)
            for d, (axis, start) in enumerate(zip(axes, offset, strict=True)):
                place = np.arange(axis.length)
                near = start + axis.spacing * ((place - start + axis.reach) // axis.spacing)
                shape = [1] * len(axes)
                shape[d] = axis.length
                lattice &= (place % axis.spacing == start).reshape(shape)
                # beyond the end there is no source and the image is zero; around a ring, or with one source, it is this
                source = source * axis.length + (near % axis.length).reshape(shape)
            where = (lattice.ravel(), source.ravel())
            for first in range(0, width, batch):
                diagonal, sums = _colour(
                    op.graph, op.weights, kept, diagonal, sums, where, first, batch, op.in_shape
                )
        return np.asarray(diagonal).ravel(), np.asarray(sums).reshape(len(masks), -1)


@functools.partial(jax.jit, static_argnames=("graph", "batch", "in_shape"))
def _colour(
    graph: Any,
    weights: Any,
    kept: jax.Array,
    diagonal: jax.Array,
    sums: jax.Array,
    where: tuple[jax.Array, jax.Array],
    first: int,
    batch: int,
    in_shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Add what `batch` probes see: unit vectors on the lattice, in channels first, first + 1, .. of every group."""
    lattice, source = where
    space, groups, width = diagonal.shape
    mine = jnp.arange(width) == first + jnp.arange(batch)[:, None]  # (batch, width)
    probes = jnp.where(mine[:, None, None, :] & lattice[:, None, None], 1.0, 0.0)
    probes = jnp.broadcast_to(probes, (batch, space, groups, width)).reshape(batch, -1)
    image = jnp.abs(_gram(graph, weights, probes, in_shape)).reshape(batch, space, groups, width)
    own = mine[:, None, None, :] & (source == jnp.arange(space))[:, None, None]
    diagonal = diagonal + jnp.where(own, image, 0.0).sum(axis=0)
    chosen = jax.lax.dynamic_slice_in_dim(kept, first, batch, axis=3)[:, source]  # (b, space, groups, batch)
    return diagonal, sums + jnp.einsum("bsgq,qsgc->bsgc", chosen, jnp.where(own, 0.0, image))


def _masks(op: Operator, masks: Any) -> np.ndarray:
    """(B, n) booleans."""
    kept = np.asarray(masks)
    if kept.dtype != np.bool_ or kept.shape[1:] != op.in_shape or not len(kept):
        raise ValueError(
            f"masks must be booleans (True = kept) of shape (B, {', '.join(map(str, op.in_shape))}), B >= 1; "
            f"got {kept.dtype} of shape {kept.shape}"
        )
    return kept.reshape(len(kept), -1)


def _batch(x: Any, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(x)
    if values.shape[1:] != shape or values.dtype.kind not in "fiu":
        raise ValueError(
            f"expected a batch of real numbers (B, {', '.join(map(str, shape))}), got {values.shape}"
        )
    return values.astype(np.float64)
