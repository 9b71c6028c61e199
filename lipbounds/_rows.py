"""The output rows of the gain, K vector-Jacobian products, and their Gram matrices, on the device. Estimates.

The rows of G[output, j] are wanted twice: for the norm of the block and for the distances between its rows, which are
the pairwise constants. Both follow from Gram matrices. Rows are taken of the centred outputs z_k - mean(z), which costs
nothing and keeps the digits of the distances, with one row more for the mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._batched import apply_batched, fixed_operands
from lipbounds.lure import LureForm

#: (c, q, e) per tap: v = c y + q w and ||w|| <= ||e y||; None is zero for c and one for e.
Scalings = tuple[tuple[Any, Any, Any], ...]
_CHUNK = 24  # rows at a time: a register of all of them should stay in the cache
_SMALLEST = 1e-30  # rows are divided by their largest entry, but not by less


class RowGram(NamedTuple):
    """R R' of the (K, n) rows R of one block, divided by scale**2.

    whole: of the rows; centred: of the rows minus their mean; scale: a number, constant under differentiation.
    """

    whole: jax.Array
    centred: jax.Array
    scale: jax.Array


def row_grams(form: LureForm, sources: tuple[int, ...], scalings: Scalings, dtype: Any) -> list[RowGram]:
    """One `RowGram` per source; -1 is the input."""
    if not sources:
        return []
    count = form.num_outputs
    seeds = np.concatenate([np.eye(count) - 1 / count, np.full((1, count), 1 / count)])
    out = []
    for rows, size in _rows(form, sources, scalings, jnp.asarray(seeds.astype(dtype))):
        scale = jnp.max(size)
        relative = size / scale
        gram = _gram(rows)[: count + 1, : count + 1] * relative[:, None] * relative[None, :]
        centred, cross = gram[:count, :count], gram[:count, count]
        whole = centred + cross[:, None] + cross[None, :] + gram[count, count]
        out.append(RowGram(whole, centred, scale))
    return out


@jax.custom_vjp
def _gram(rows: jax.Array) -> jax.Array:
    """R R'; its derivative is one product, not two."""
    return rows @ rows.T


_gram.defvjp(lambda rows: (_gram(rows), rows), lambda rows, g: ((g + g.T) @ rows,))


def _rows(
    form: LureForm, sources: tuple[int, ...], scalings: Scalings, seeds: jax.Array
) -> list[tuple[jax.Array, jax.Array]]:
    """Per source j (R, s) with diag(s) R = seeds G[output, j], every row of R with largest entry 1 (or zero).

    R has rows of zeros at the end, to fill the last chunk; s has as many entries as there are seeds. Differentiable in
    the form and the scalings, with s constant: the derivative is that of sum_k seed_k' G[output, j] g_k / s_k for the
    cotangents g_k, that is, of the network run forward.
    """
    dtype = seeds.dtype
    count = seeds.shape[0]
    chunks = -(-count // _CHUNK)
    height = -(-count // chunks)
    seeds = jnp.concatenate([seeds, jnp.zeros((chunks * height - count, seeds.shape[1]), dtype)])
    leaves, tree = jax.tree.flatten((form, scalings))
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    moving = tuple(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves)

    def join(smooth: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[LureForm, Scalings]:
        a, b = iter(smooth), iter(other)
        return jax.tree.unflatten(tree, [next(a) if m else next(b) for m in moving])

    def chunked(f: Any, *rows: jax.Array) -> Any:
        """f over chunks of rows, results stacked."""
        if chunks == 1:
            return f(*rows)
        split = tuple(r.reshape(chunks, height, *r.shape[1:]) for r in rows)
        results = jax.lax.map(lambda part: f(*part), split)
        return jax.tree.map(lambda r: r.reshape(chunks * height, *r.shape[2:]), results)

    @jax.custom_vjp
    def rows_of(smooth: Any, other: Any, seeds: jax.Array) -> Any:
        form, scalings = join(smooth, other)
        sizes = [form.in_size if j < 0 else form.taps[j].size_out for j in sources]
        zeros = (jnp.zeros((height, n), dtype) for n in sizes)
        _, pull = jax.vjp(lambda *w: _network(form, scalings, sources, w), *zeros)

        def part(seeds: jax.Array) -> Any:
            rows = pull(seeds)
            tops = [jnp.max(jnp.abs(r), axis=1) for r in rows]
            tops = [jnp.where(top > 0, jnp.maximum(top, _SMALLEST), 1) for top in tops]
            return tuple((r / top[:, None], top) for r, top in zip(rows, tops, strict=True))

        return chunked(part, seeds)

    def forward(smooth: Any, other: Any, seeds: jax.Array) -> Any:
        out = rows_of(smooth, other, seeds)
        return out, (smooth, other, seeds, tuple(top for _, top in out))

    def backward(kept: Any, cotangents: Any) -> Any:
        smooth, other, seeds, tops = kept
        split = (chunks, height)

        def part(total: Any, given: Any) -> Any:
            seeds, tops, vectors = given
            scaled = tuple(v / top[:, None] for v, top in zip(vectors, tops, strict=True))

            def paired(smooth: Any) -> jax.Array:
                form, scalings = join(smooth, other)
                images = _network(form, scalings, sources, scaled)
                return jnp.sum(images * seeds)

            return jax.tree.map(jnp.add, total, jax.grad(paired)(smooth)), None

        given = (seeds, tops, tuple(g for g, _ in cotangents))
        given = jax.tree.map(lambda r: r.reshape(*split, *r.shape[1:]), given)
        zero = jax.tree.map(jnp.zeros_like, smooth)
        total, _ = jax.lax.scan(part, zero, given)
        return total, None, None

    rows_of.defvjp(forward, backward)
    smooth = tuple(leaf for leaf, m in zip(leaves, moving, strict=True) if m)
    other = tuple(leaf for leaf, m in zip(leaves, moving, strict=True) if not m)
    return [(rows, jax.lax.stop_gradient(top)[:count]) for rows, top in rows_of(smooth, other, seeds)]


def _network(form: LureForm, scalings: Scalings, sources: tuple[int, ...], vectors: tuple[jax.Array, ...]) -> jax.Array:
    """sum_j G[output, j] w_j, (batch, K), for vectors w_j (batch, n_j): the loop-transformed network run forward."""
    given = dict(zip(sources, vectors, strict=True))
    batch, dtype = vectors[0].shape[0], vectors[0].dtype
    program = form.program
    registers: dict[int, Any] = {}
    if -1 in given:
        registers[0] = given[-1].reshape(batch, *program.shapes[0])
    for step in program.steps:
        if not isinstance(step, int):
            if any(i in registers for i in step.inputs if i >= 0):
                stacks = [
                    registers[i] if i in registers else jnp.zeros((batch, *program.shapes[i]), dtype)
                    for i in step.inputs
                    if i >= 0
                ]
                registers[step.output] = apply_batched(step, fixed_operands(form, step, dtype), stacks)
            continue
        tap, (c, q, _) = program.taps[step], scalings[step]
        v = None
        if c is not None and any(i in registers for i in tap.inputs):
            parts = [
                registers[i].reshape(batch, -1)
                if i in registers
                else jnp.zeros((batch, int(np.prod(program.shapes[i]))), dtype)
                for i in tap.inputs
            ]
            v = c * (jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])
        if step in given:
            w = q * given[step]
            v = w if v is None else v + w
        if v is not None:
            start = 0
            for register, shape in zip(tap.outputs, tap.shapes, strict=True):
                size = int(np.prod(shape))
                registers[register] = v[:, start : start + size].reshape(batch, *shape)
                start += size
    out = registers.get(program.output)
    return jnp.zeros((batch, form.num_outputs), dtype) if out is None else out.reshape(batch, -1)
