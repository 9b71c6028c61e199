"""Diagonal scalings of LipLT: S_k G[k, j] S_j^-1 for positive diagonal S_k, with which elementwise taps commute.

S = I is the CRM paper's choice SN; T = S^2 with T >= B'B its AOL and SLL (Theorem 3.2), here taken backward over the
taps with B the stacked column of scaled blocks below a tap. `optimize` descends on log S. Any positive S is valid, so
nothing here needs a proof: the norms of the scaled blocks are proved afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lipbounds._form.lure import LureForm
from lipbounds._gain.blocks import Node, Pair, TapScaling
from lipbounds._norms import enclosures
from lipbounds._norms.enclosures import Enclosure
from lipbounds._triangle import recursion
from lipbounds._triangle.formed_blocks import BlockNorm, block_norm, matrices
from lipbounds._triangle.recursion import Request, Triangle

Blocks = dict[Pair, Enclosure]
_GRAM_LIMIT = 3000  # up to this size |B'B| is formed; above it |B|'(|B| 1) stands in
_ZERO_COLUMN = 2.0**27
_STEPS = 400
_RATE = 0.03


def stored_blocks(form: LureForm, nodes: Sequence[Node], scalings: Sequence[TapScaling]) -> Blocks:
    """All blocks of the gain at once, the output rows among them."""
    host = recursion.host_form(form)
    pairs = recursion.structure(host, nodes, scalings)
    entries = sum(host.node_size(s, source=True) * host.node_size(t, source=False) for s, t in pairs)
    if entries > recursion.STORED_ENTRIES:
        raise ValueError(
            "a scaling keeps all blocks of the gain in memory; "
            f"this network needs {8 * entries / 1e9:.1f} GB, more than {8 * recursion.STORED_ENTRIES / 1e9:.1f} GB: "
            "use scaling=None"
        )
    blocks = dict(matrices(host, pairs, scalings))
    for source, block in host.backward((), [(), *nodes], scalings).items():
        blocks[source, ()] = block.T
    return {pair: block.dense() for pair, block in blocks.items()}


def factors(form: LureForm, nodes: Sequence[Node], blocks: Blocks, rule: str) -> dict[Node, np.ndarray]:
    """f_j = 1/S_j > 0 per node by AOL or SLL, backward over the taps; 0 where a neuron provably reaches nothing."""
    found: dict[Node, np.ndarray] = {}
    for node in reversed(nodes):
        column = []
        size = sum(form.taps[k].size_out for k in node)
        # dead: the neuron reaches nothing, a zero column without error in the rows that count
        dead = np.ones(size, bool)
        for (source, target), block in blocks.items():
            if source == node:
                rows = np.ones(block.shape[0]) if not target else _rows(form, target, found[target])
                with np.errstate(over="ignore", invalid="ignore", under="ignore"):
                    column.append(rows[:, None] * block.midpoint_for_search())
                dead &= ~block.select(rows=rows > 0.0).support(axis=0)
        b = np.concatenate(column) if column else np.zeros((1, size))
        if not np.isfinite(b).all():
            found[node] = np.ones(size)
            continue
        zero = ~b.any(axis=0)  # also where products underflow
        top = float(np.abs(b).max(initial=0.0)) or 1.0
        b = b / top
        if _grouped(form, node):
            found[node] = np.ones(size)
            continue
        gram = np.abs(b.T @ b) if size <= _GRAM_LIMIT else None
        if rule == "aol":
            t = gram.sum(axis=1) if gram is not None else np.abs(b).T @ np.abs(b).sum(axis=1)
        else:
            weight = np.sqrt(np.einsum("ij,ij->j", b, b))
            safe = np.where(weight > 0, weight, 1.0)
            t = (gram @ weight if gram is not None else np.abs(b).T @ (np.abs(b) @ weight)) / safe
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            f = 1 / (np.sqrt(t) * top)
        usable = np.isfinite(f) & (f > 1e-290) & (f < 1e290)
        spare = float(np.median(f[usable])) if usable.any() else 1.0  # any positive scaling is valid
        # A column that is zero up to the blocks' error or underflow gets little weight as a target; its error grows.
        found[node] = np.where(dead, 0.0, np.where(zero, spare * _ZERO_COLUMN, np.where(usable, f, spare)))
    return found


def _grouped(form: LureForm, node: Node) -> bool:
    """Whether a node contains group taps, with which scalings do not commute: it is left unscaled."""
    return any(form.taps[k].groups is not None for k in node)


def _rows(form: LureForm, target: Node, f: np.ndarray) -> np.ndarray:
    """S of a target's rows, at least 1/f in real arithmetic; f = 0 drops the neuron."""
    if _grouped(form, target):
        return np.ones(sum(form.taps[k].size_in for k in target))
    if not (np.isfinite(f).all() and (f >= 0).all()):
        raise ValueError("a scaling must be finite and not negative")
    with np.errstate(divide="ignore"):
        return np.where(f > 0, np.nextafter(1 / f, np.inf), 0.0)


def scaled(form: LureForm, blocks: Blocks, f: Mapping[Node, np.ndarray]) -> Blocks:
    """The blocks S_k G[k, j] S_j^-1, errors carried."""
    out = {}
    for (source, target), block in blocks.items():
        rows = _rows(form, target, f[target]) if target else None
        out[source, target] = enclosures.scale(block, rows=rows, cols=f[source] if source else None)
    return out


def run(
    form: LureForm,
    nodes: Sequence[Node],
    scalings: Sequence[TapScaling],
    blocks: Blocks,
    f: Mapping[Node, np.ndarray],
    request: Request,
    *,
    pairwise: bool,
) -> Triangle:
    """The proved recursion on scaled blocks."""
    host = recursion.host_form(form)
    found, rows = {}, {}
    for (source, target), block in scaled(form, blocks, f).items():
        if not target:
            rows[source] = block
        else:
            value = block_norm(host, block, 2)
            found[source, target] = BlockNorm(value, "verified", "Cholesky", block.shape)
    return recursion.recursion(form, nodes, scalings, request, pairwise=pairwise, found=found, rows=rows)


# --- optimised -----------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """The B blocks of one shape: relative matrices (B, m, n), rows in the tables of logarithms, index of each pair."""

    matrices: jax.Array
    cols: np.ndarray
    rows: np.ndarray
    pairs: np.ndarray


def optimize(
    form: LureForm, nodes: Sequence[Node], blocks: Blocks, start: Mapping[Node, np.ndarray]
) -> dict[Node, np.ndarray]:
    """f = 1/S from `start` by Adam on log f, on the recursion with power-iterated norms in float32.

    Blocks of one shape are one batch and the recursion is a scan: deep networks compile as fast as shallow ones.
    """
    free = [node for node in nodes if not _grouped(form, node)]
    if not free:
        return dict(start)
    places: dict[Node, tuple[int, int]] = {}  # node -> (size, row in the table of that size)
    tables: dict[int, list[np.ndarray]] = {}
    for node in free:
        f = start[node]
        rows = tables.setdefault(f.size, [])
        places[node] = (f.size, len(rows))
        rows.append(np.log(np.where(f > 0, f, np.max(f, initial=0.0) or 1.0)))
    logs = {size: jnp.asarray(np.stack(rows), jnp.float32) for size, rows in tables.items()}

    # Blocks are held relative to their norms, and the norms apart, so that float32 holds networks of any scale.
    order = list(blocks)
    sizes = np.array([max(_frobenius(blocks[p].midpoint_for_search()), 1e-300) for p in order])
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, pair in enumerate(order):
        shapes.setdefault(blocks[pair].shape, []).append(i)

    def batch(members: list[int]) -> _Batch:
        relative = np.stack([blocks[order[i]].midpoint_for_search() / sizes[i] for i in members])
        cols, rows = (np.array([places.get(order[i][s], (0, -1))[1] for i in members]) for s in (0, 1))
        return _Batch(jnp.asarray(relative, jnp.float32), cols, rows, np.array(members))

    batches = [batch(members) for members in shapes.values()]
    index = {node: i for i, node in enumerate(nodes)}
    table = np.full((len(nodes) + 1, len(nodes) + 1), -1)  # [target, source]: input first, output last
    for i, (source, target) in enumerate(order):
        table[index[target] if target else len(nodes), 1 + index[source] if source else 0] = i
    with jax.numpy_dtype_promotion("standard"), jax.enable_x64(False):  # optax mixes dtypes
        result = _descend(logs, batches, table, jnp.asarray(np.log(sizes), jnp.float32))
    out = dict(start)
    for node in free:
        size, row = places[node]
        f = np.exp(np.asarray(result[size][row], np.float64))
        usable = np.isfinite(f) & (f > 1e-290)
        out[node] = np.where(start[node] > 0, np.where(usable, f, start[node]), 0.0)
    return out


def _frobenius(matrix: np.ndarray) -> float:
    top = float(np.abs(matrix).max(initial=0.0)) or 1.0
    return top * float(np.linalg.norm(matrix / top))


def _objective(logs: Any, vectors: Any, batches: Any, table: Any, sizes: Any) -> tuple[Any, Any]:
    """log of the recursion's value, with two power steps per block from `vectors`; and the new vectors."""
    norms_ = sizes
    fresh = []
    for batch, u in zip(batches, vectors, strict=True):
        _, m, n = batch.matrices.shape
        cols = jnp.concatenate([logs.get(n, jnp.zeros((0, n))), jnp.zeros((1, n))])[batch.cols]
        rows = jnp.concatenate([logs.get(m, jnp.zeros((0, m))), jnp.zeros((1, m))])[batch.rows]
        top = jax.lax.stop_gradient(cols.max(axis=1, initial=-1e30))
        low = jax.lax.stop_gradient(rows.min(axis=1, initial=1e30))
        left, right = jnp.exp(low[:, None] - rows), jnp.exp(cols - top[:, None])
        matrices = batch.matrices * right[:, None, :] * left[:, :, None]
        fixed = jax.lax.stop_gradient(matrices)
        for _ in range(2):
            v = jnp.einsum("bmn,bm->bn", fixed, jnp.einsum("bmn,bn->bm", fixed, u))
            u = v / jnp.maximum(jnp.linalg.norm(v, axis=1, keepdims=True), 1e-30)
        fresh.append(u)
        image = jnp.einsum("bmn,bn->bm", matrices, u)
        size = 0.5 * jnp.log(jnp.sum(image * image, axis=1) + 1e-30)
        norms_ = norms_.at[batch.pairs].add(size + top - low)
    logarithms = jnp.where(table >= 0, norms_[table], -1e30)

    def reach(known: Any, row_and_place: Any) -> Any:
        row, place = row_and_place
        return known.at[place].set(jax.nn.logsumexp(row + known)), None

    count = table.shape[0]
    known = jnp.full(count, -1e30).at[0].set(0.0)
    known, _ = jax.lax.scan(reach, known, (logarithms[:-1], jnp.arange(1, count)))
    return jax.nn.logsumexp(logarithms[-1] + known), fresh


@jax.jit
def _descend(logs: Any, batches: Any, table: Any, sizes: Any) -> Any:
    tool = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS, alpha=0.02))
    keys = jax.random.split(jax.random.key(0), len(batches))
    shapes = [(b.matrices.shape[0], b.matrices.shape[2]) for b in batches]
    vectors = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

    def step(carry: Any, _: Any) -> Any:
        logs, vectors, state = carry
        grad, vectors = jax.grad(_objective, has_aux=True)(logs, vectors, batches, table, sizes)
        updates, state = tool.update(grad, state)
        return (optax.apply_updates(logs, updates), vectors, state), None

    def warm(_: Any, current: Any) -> Any:
        return _objective(logs, current, batches, table, sizes)[1]

    vectors = jax.lax.fori_loop(0, 20, warm, vectors)
    carry, _ = jax.lax.scan(step, (logs, vectors, tool.init(logs)), None, length=_STEPS)
    return carry[0]
