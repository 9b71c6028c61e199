"""Diagonal scalings of LipLT: S_k G[k, j] S_j^-1 for positive diagonal S_k, with which elementwise taps commute.

S = I is the CRM paper's choice SN; T = S^2 with T >= B'B its AOL and SLL (Theorem 3.2), here taken backward over the
taps with B the stacked column of scaled blocks below a tap. `optimize` descends on log S. Any positive S is valid, so
nothing here needs a proof; the blocks are scaled by the exact floats and proved afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse as sp

from lipbounds import _triangle, norms
from lipbounds._triangle import BlockNorm, Request, Triangle
from lipbounds.linmap import Node, TapScaling
from lipbounds.lure import LureForm
from lipbounds.norms import Enclosure

Blocks = dict[tuple[Node, Node], Enclosure]
_GRAM_LIMIT = 3000  # up to this size |B'B| is formed; above it |B|'(|B| 1) stands in
_STEPS = 400
_RATE = 0.03


def stored_blocks(form: LureForm, nodes: Sequence[Node], scalings: Sequence[TapScaling]) -> Blocks:
    """All blocks of the gain at once, the output rows among them."""
    host = _triangle.host_form(form)
    pairs = _triangle.structure(host, nodes, scalings)
    entries = sum(host.node_size(s, source=True) * host.node_size(t, source=False) for s, t in pairs)
    if entries > _triangle._STORED_ENTRIES:
        raise ValueError(
            "a scaling keeps all blocks of the gain in memory; "
            f"this network needs {8 * entries / 1e9:.1f} GB, more than {8 * _triangle._STORED_ENTRIES / 1e9:.1f} GB: "
            "use scaling=None"
        )
    blocks = dict(_triangle.matrices(host, pairs, scalings))
    for source, block in host.backward((), [(), *nodes], scalings).items():
        blocks[source, ()] = block.T
    return {pair: Enclosure(_dense(b.matrix), b.error) for pair, b in blocks.items()}


def _dense(matrix: Any) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else matrix


def factors(form: LureForm, nodes: Sequence[Node], blocks: Blocks, rule: str) -> dict[Node, np.ndarray]:
    """f_j = 1/S_j per node by AOL or SLL, backward over the taps; 0 where a neuron reaches nothing."""
    found: dict[Node, np.ndarray] = {}
    for node in reversed(nodes):
        column = []
        for (source, target), block in blocks.items():
            if source == node:
                rows = 1.0 if not target else _rows(form, target, found[target])[:, None]
                column.append(rows * block.matrix)
        size = sum(form.taps[k].size_out for k in node)
        b = np.concatenate(column) if column else np.zeros((1, size))
        if _grouped(form, node):
            found[node] = np.ones(size)
            continue
        if size <= _GRAM_LIMIT:
            gram = np.abs(b.T @ b)
        else:
            gram = None
        if rule == "aol":
            t = gram.sum(axis=1) if gram is not None else np.abs(b).T @ np.abs(b).sum(axis=1)
        else:
            weight = np.sqrt(np.einsum("ij,ij->j", b, b))
            safe = np.where(weight > 0, weight, 1.0)
            t = (gram @ weight if gram is not None else np.abs(b).T @ (np.abs(b) @ weight)) / safe
        with np.errstate(divide="ignore"):
            found[node] = np.where(t > 0, 1 / np.sqrt(t), 0.0)
    return found


def _grouped(form: LureForm, node: Node) -> bool:
    """Groups and elementwise taps stacked in one node are left unscaled: scalings act through groups differently."""
    return any(form.taps[k].groups is not None for k in node)


def _rows(form: LureForm, target: Node, f: np.ndarray) -> np.ndarray:
    """S of a target's rows, at least 1/f in real arithmetic; f = 0 drops the neuron."""
    if _grouped(form, target):
        return np.ones(sum(form.taps[k].size_in for k in target))
    with np.errstate(divide="ignore"):
        return np.where(f > 0, np.nextafter(1 / f, np.inf), 0.0)


def scaled(form: LureForm, blocks: Blocks, f: Mapping[Node, np.ndarray]) -> Blocks:
    """The blocks S_k G[k, j] S_j^-1, errors carried."""
    out = {}
    for (source, target), block in blocks.items():
        rows = _rows(form, target, f[target]) if target else None
        out[source, target] = norms.scale(block, rows=rows, cols=f[source] if source else None)
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
    host = _triangle.host_form(form)
    found, rows = {}, {}
    for (source, target), block in scaled(form, blocks, f).items():
        if not target:
            rows[source] = block
        else:
            value = _triangle.block_norm(host, block, 2)
            found[source, target] = BlockNorm(value, "verified", "Cholesky", block.shape)
    return _triangle.recursion(form, nodes, scalings, request, pairwise=pairwise, found=found, rows=rows)


# --- optimised -----------------------------------------------------------------------------------------------------


def optimize(
    form: LureForm, nodes: Sequence[Node], blocks: Blocks, start: Mapping[Node, np.ndarray]
) -> dict[Node, np.ndarray]:
    """log S by Adam on the recursion with power-iterated norms, in float32 on scaled blocks; the last iterate."""
    free = [node for node in nodes if not _grouped(form, node)]
    if not free:
        return dict(start)
    order = tuple(sorted(blocks, key=lambda p: (nodes.index(p[1]) if p[1] else len(nodes), len(p[0]), p[0])))
    # Blocks relative to their norms, and the norms apart, so that float32 holds networks of any scale.
    sizes = [max(float(np.linalg.norm(blocks[p].matrix)), 1e-300) for p in order]
    arrays = tuple(jnp.asarray(blocks[p].matrix / s, jnp.float32) for p, s in zip(order, sizes, strict=True))
    logs = tuple(
        jnp.asarray(np.log(np.where(start[n] > 0, start[n], np.max(start[n], initial=1.0))), jnp.float32) for n in free
    )
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        result = _descend(arrays, jnp.log(jnp.asarray(sizes)).astype(jnp.float32), logs, order, tuple(free))
    out = dict(start)
    for node, log in zip(free, result, strict=True):
        f = np.exp(np.asarray(log, np.float64))
        out[node] = np.where(start[node] > 0, f, 0.0) if np.isfinite(f).all() else start[node]
    return out


def _objective(logs: Any, vectors: Any, arrays: Any, sizes: Any, order: Any, free: Any) -> tuple[Any, Any]:
    """log of the recursion's value, with two power steps per block from `vectors`; and the new vectors."""
    place = {node: i for i, node in enumerate(free)}
    terms: dict[Node | None, list[Any]] = {}
    fresh = []
    for i, (source, target) in enumerate(order):  # by target: the terms of a source are complete when it is read
        col = logs[place[source]] if source in place else None
        row = logs[place[target]] if target in place else None
        top_col = 0.0 if col is None else jax.lax.stop_gradient(col.max())
        low_row = 0.0 if row is None else jax.lax.stop_gradient(row.min())
        matrix = arrays[i]
        if col is not None:
            matrix = matrix * jnp.exp(col - top_col)
        if row is not None:
            matrix = matrix * jnp.exp(low_row - row)[:, None]
        fixed = jax.lax.stop_gradient(matrix)
        u = vectors[i]
        for _ in range(2):
            v = fixed.T @ (fixed @ u)
            u = v / jnp.maximum(jnp.linalg.norm(v), 1e-30)
        fresh.append(u)
        image = matrix @ u
        size = 0.5 * jnp.log(jnp.sum(image * image) + 1e-30)
        reach = jax.nn.logsumexp(jnp.stack(terms[source])) if source in terms else 0.0 if not source else -1e9
        terms.setdefault(target or None, []).append(size + sizes[i] + top_col - low_row + reach)
    return jax.nn.logsumexp(jnp.stack(terms[None])) if None in terms else jnp.zeros(()), tuple(fresh)


@partial(jax.jit, static_argnames=("order", "free"))
def _descend(arrays: Any, sizes: Any, logs: Any, order: Any, free: Any) -> Any:
    tool = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS, alpha=0.02))
    keys = jax.random.split(jax.random.key(0), len(arrays))
    vectors = tuple(
        jax.random.normal(k, (a.shape[1],), jnp.float32) for k, a in zip(keys, arrays, strict=True)
    )
    vectors = tuple(v / jnp.linalg.norm(v) for v in vectors)

    def step(carry: Any, _: Any) -> Any:
        logs, vectors, state, best, best_value = carry
        (value, vectors), grad = jax.value_and_grad(_objective, has_aux=True)(
            logs, vectors, arrays, sizes, order, free
        )
        better = value < best_value
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), logs, best)
        best_value = jnp.minimum(value, best_value)
        updates, state = tool.update(grad, state)
        return (optax.apply_updates(logs, updates), vectors, state, best, best_value), value

    # Warm the vectors up before the values are compared.
    def warm(_: Any, current: Any) -> Any:
        return _objective(logs, current, arrays, sizes, order, free)[1]

    vectors = jax.lax.fori_loop(0, 20, warm, vectors)
    carry = (logs, vectors, tool.init(logs), logs, jnp.asarray(jnp.inf, jnp.float32))
    carry, _ = jax.lax.scan(step, carry, None, length=_STEPS)
    return carry[0]
