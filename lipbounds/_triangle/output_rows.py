"""The output rows of the gain, K vector-Jacobian products, as Gram matrices on the device. Estimates.

The rows of G[output, j] are wanted twice: for the norm of the block and for the distances between its rows, which are
the pairwise constants. Both follow from Gram matrices. Rows are taken of the centred outputs z_k - mean(z), which costs
nothing and keeps the digits of the distances, with one row more for the mean. Where the network has more outputs than
entries before its last linear steps, the Gram matrix is that of the entries (1000 classes cost as much as 512).

The program is run backward for a few rows at a time, small enough for a processor's cache, and its derivative runs it
forward once, on the cotangents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.batched_steps import apply_batched, fixed_operands
from lipbounds._form.concrete import is_concrete
from lipbounds._form.lure import LureForm
from lipbounds._form.program import Op, Program
from lipbounds._form.steps import KINDS

#: (c, q, e) per tap: v = c y + q w and ||w|| <= ||e y||; None is zero for c and one for e.
Scalings = tuple[tuple[Any, Any, Any], ...]
Batch = dict[int, jax.Array]  # register -> (rows, *shape); absent is zero
_CHUNK = 16  # rows at a time
_SMALLEST = (
    0.8  # rows are divided by their size, but not by less than this power of the smallest normal number
)


class RowGram(NamedTuple):
    """R R' of the (K, n) rows R of one block, divided by scale**2.

    whole: of the rows; centred: of the rows minus their mean; scale: a number, constant under differentiation.
    """

    whole: jax.Array
    centred: jax.Array
    scale: jax.Array


def row_grams(form: LureForm, sources: tuple[int, ...], scalings: Scalings, dtype: Any) -> list[RowGram]:
    """One `RowGram` per source; -1 is the input. Differentiable in the form and the scalings, in reverse mode."""
    if not sources:
        return []
    count = form.num_outputs
    seeds = np.concatenate([np.eye(count) - 1 / count, np.full((1, count), 1 / count)]).astype(dtype)
    neck, tail = _neck(form.program)
    head = None
    if tail:
        head = _through(form, tail, jnp.asarray(seeds))
        seeds = np.eye(head.shape[1], dtype=dtype)
    out = []
    for gram, scale in _grams(form, sources, scalings, seeds, neck):
        if head is not None:
            gram = head @ gram @ head.T
        centred, cross = gram[:count, :count], gram[:count, count]
        whole = centred + cross[:, None] + cross[None, :] + gram[count, count]
        out.append(RowGram(whole, centred, jax.lax.stop_gradient(scale)))
    return out


def _neck(program: Program) -> tuple[int, tuple[Op, ...]]:
    """(register, steps from it to the output): the narrowest register that everything passes before the output, with
    linear steps of one register after it; the output itself unless another has fewer entries than it has."""
    writers = {step.output: step for step in program.steps if not isinstance(step, int)}
    neck = place = program.output
    steps: tuple[Op, ...] = ()
    passed: tuple[Op, ...] = ()
    while place in writers:
        step = writers[place]
        before = [i for i in step.inputs if i >= 0]
        if len(before) != 1:
            break
        place, passed = before[0], (*passed, step)
        if np.prod(program.shapes[place]) < np.prod(program.shapes[neck]):
            neck, steps = place, passed
    return neck, steps


def _through(form: LureForm, tail: tuple[Op, ...], seeds: jax.Array) -> jax.Array:
    """Rows over the outputs taken back to rows over the neck, through the steps of `_neck` (last step first)."""
    rows = seeds.reshape(-1, *form.program.shapes[form.program.output])
    for step in tail:
        (rows,) = _pull(form, step, rows)
    return rows.reshape(seeds.shape[0], -1)


def _pull(form: LureForm, step: Op, out: jax.Array) -> tuple[jax.Array, ...]:
    """The transpose of a linear step on a batch of its outputs: one batch per operand that is a register."""
    shapes = [form.program.shapes[i] for i in step.inputs if i >= 0]
    fixed = fixed_operands(form, step, out.dtype)
    zeros = (jnp.zeros((out.shape[0], *shape), out.dtype) for shape in shapes)
    return jax.vjp(lambda *m: apply_batched(step, fixed, m), *zeros)[1](out)


def _grams(
    form: LureForm, sources: tuple[int, ...], scalings: Scalings, seeds: np.ndarray, neck: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Per source j (R R', s) with s R = seeds G[neck, j]; s is a number of the size of the rows, taken as constant.

    So the derivative for a cotangent A of R R' is that of sum_k seed_k' G[neck, j] g_k with g = (A + A') R / s:
    forward through the network with g, and at every step the product with the registers kept on the way back.
    """
    count, dtype = seeds.shape[0], seeds.dtype
    chunks = -(-count // _CHUNK)
    height = -(-count // chunks)
    padded = np.concatenate([seeds, np.zeros((chunks * height - count, seeds.shape[1]), dtype)])
    leaves, tree = jax.tree.flatten((form, scalings))
    moving = [not is_concrete(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def join(smooth: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[LureForm, Scalings]:
        a, b = iter(smooth), iter(other)
        return jax.tree.unflatten(tree, [next(a) if m else next(b) for m in moving])

    numbered_form, numbered_scalings = jax.tree.unflatten(tree, range(len(leaves)))
    kept = _places(numbered_form, numbered_scalings, {n for n, m in enumerate(moving) if m})

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda r: r.reshape(chunks, height, *r.shape[1:]), tree)

    def rows(form: LureForm, scalings: Scalings, places: Places) -> Any:
        if chunks == 1:
            found, registers = _run_back(form, scalings, sources, neck, places, jnp.asarray(padded))
            sizes = [_size(r) for r in found]
            return [r / size for r, size in zip(found, sizes, strict=True)], registers, sizes
        mixed = np.random.default_rng(0).standard_normal((1, count)).astype(dtype) @ seeds
        sample, _ = _run_back(form, scalings, sources, neck, Places({}, {}), jnp.asarray(mixed))
        sizes = [_size(r) for r in sample]
        found, registers = jax.lax.map(
            lambda part: _run_back(form, scalings, sources, neck, places, part, sizes),
            split(jnp.asarray(padded)),
        )
        return *jax.tree.map(lambda r: r.reshape(chunks * height, *r.shape[2:]), (found, registers)), sizes

    def outputs(found: Any, sizes: Any) -> Any:
        return [(r @ r.T)[:count, :count] for r in found], sizes

    @jax.custom_vjp
    def grams(smooth: Any, other: Any) -> Any:
        found, _, sizes = rows(*join(smooth, other), Places({}, {}))
        return outputs(found, sizes)

    def forward(smooth: Any, other: Any) -> Any:
        found, registers, sizes = rows(*join(smooth, other), kept)
        return outputs(found, sizes), (smooth, other, found, registers, sizes)

    def backward(residuals: Any, cotangents: Any) -> Any:
        smooth, other, found, registers, sizes = residuals
        form, scalings = join(smooth, other)
        vectors = []
        for r, size, g in zip(found, sizes, cotangents[0], strict=True):
            vectors.append(jnp.pad((g + g.T) / size, (0, r.shape[0] - count)) @ r)
        zero = {n: jnp.zeros_like(leaf) for n, leaf in zip(np.flatnonzero(moving), smooth, strict=True)}

        def part(total: Any, given: Any) -> Any:
            slopes = _run_forward(form, scalings, sources, kept, *given)
            return {n: total[n] + slopes[n] if n in slopes else total[n] for n in total}, None

        if chunks == 1:
            total, _ = part(zero, (vectors, registers))
        else:
            total, _ = jax.lax.scan(part, zero, split((vectors, registers)))
        return tuple(total[n] for n in zero), None

    grams.defvjp(forward, backward)
    smooth = tuple(jnp.asarray(leaf) for leaf, m in zip(leaves, moving, strict=True) if m)
    other = tuple(leaf for leaf, m in zip(leaves, moving, strict=True) if not m)
    return list(zip(*grams(smooth, other), strict=True))


def _size(rows: jax.Array) -> jax.Array:
    """The largest entry, or 1 where nothing is there to be scaled."""
    top = jnp.max(jnp.abs(rows), initial=0.0)
    least = float(jnp.finfo(rows.dtype).tiny) ** _SMALLEST
    return jnp.where(top > 0, jnp.maximum(top, least), 1)


# --- the program backward and forward ------------------------------------------------------------------------------


class Places(NamedTuple):
    """Where a coefficient that is differentiated enters, by the number of its leaf.

    ops: register -> leaf of the coefficient of the step that writes it; taps: tap -> leaves of (c, q), or None.
    """

    ops: dict[int, int]
    taps: dict[int, tuple[int | None, int | None]]


def _places(form: LureForm, scalings: Scalings, moving: set[int]) -> Places:
    """`form` and `scalings` hold the numbers of their leaves. Offsets cancel, so joint steps have none."""
    ops = {}
    for step in form.program.steps:
        if not isinstance(step, int) and not KINDS[step.kind].joint:
            for i in step.inputs:
                if i < 0 and form.consts[-1 - i] in moving:
                    ops[step.output] = form.consts[-1 - i]
    taps = {}
    for k, (c, q, _) in enumerate(scalings):
        leaves = (c if c in moving else None, q if q in moving else None)
        if leaves != (None, None):
            taps[k] = leaves
    return Places(ops, taps)


def _join(registers: Batch, names: tuple[int, ...], form: LureForm, batch: int, dtype: Any) -> Any:
    """The registers side by side, (batch, entries); None if all are zero."""
    if not any(i in registers for i in names):
        return None
    parts = [
        registers[i].reshape(batch, -1) if i in registers else jnp.zeros((batch, size), dtype)
        for i, size in ((i, int(np.prod(form.program.shapes[i]))) for i in names)
    ]
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _split(v: Any, names: tuple[int, ...], form: LureForm) -> Batch:
    out, start = {}, 0
    for i in names:
        shape = form.program.shapes[i]
        size = int(np.prod(shape))
        out[i] = v[:, start : start + size].reshape(v.shape[0], *shape)
        start += size
    return out


def _run_back(
    form: LureForm,
    scalings: Scalings,
    sources: tuple[int, ...],
    neck: int,
    places: Places,
    seeds: jax.Array,
    sizes: Sequence[Any] | None = None,
) -> tuple[list[jax.Array], Any]:
    """(seeds G[neck, j] / s_j for every source j, the registers at `places`) by the program run backward."""
    divisors = dict(zip(sources, sizes, strict=True)) if sizes is not None else {}
    program, (batch, dtype) = form.program, (seeds.shape[0], seeds.dtype)
    registers: Batch = {neck: seeds.reshape(batch, *program.shapes[neck])}
    found: dict[int, jax.Array] = {}
    kept_ops: Batch = {}
    kept_taps: Batch = {}

    def accumulate(parts: Batch) -> None:
        for i, part in parts.items():
            registers[i] = registers[i] + part if i in registers else part

    for step in reversed(program.steps):
        if isinstance(step, int):
            tap, (c, q, _) = program.taps[step], scalings[step]
            v = _join(registers, tap.outputs, form, batch, dtype)
            if v is None:
                continue
            if step in places.taps:
                kept_taps[step] = v
            if step in sources:
                found[step] = (q / divisors[step] if divisors else q) * v
            if c is not None:
                accumulate(_split(c * v, tap.inputs, form))
        elif step.output in registers:
            out = registers.pop(step.output)
            if step.output in places.ops:
                kept_ops[step.output] = out
            names = [i for i in step.inputs if i >= 0]
            for i, part in zip(names, _pull(form, step, out), strict=True):
                accumulate({i: part})
    if 0 in registers:
        v = registers[0].reshape(batch, -1)
        found[-1] = v / divisors[-1] if -1 in divisors else v
    widths = {j: form.in_size if j < 0 else program.taps[j].size_out for j in sources}
    rows = [found[j] if j in found else jnp.zeros((batch, widths[j]), dtype) for j in sources]
    return rows, (kept_ops, kept_taps)


def _run_forward(
    form: LureForm, scalings: Scalings, sources: tuple[int, ...], places: Places, vectors: Any, kept: Any
) -> dict[int, jax.Array]:
    """Derivatives of sum_k seed_k' G[neck, j] g_k in the coefficients at `places`, by leaf; the g are `vectors`."""
    given = dict(zip(sources, vectors, strict=True))
    program, (batch, dtype) = form.program, (vectors[0].shape[0], vectors[0].dtype)
    kept_ops, kept_taps = kept
    registers: Batch = {}
    slopes: dict[int, jax.Array] = {}

    def add(leaf: int, slope: jax.Array) -> None:
        slopes[leaf] = slopes[leaf] + slope if leaf in slopes else slope

    if -1 in given:
        registers[0] = given[-1].reshape(batch, *program.shapes[0])
    for step in program.steps:
        if isinstance(step, int):
            tap, (c, q, _) = program.taps[step], scalings[step]
            y = None if c is None else _join(registers, tap.inputs, form, batch, dtype)
            w = given.get(step)
            if step in kept_taps:
                for leaf, factor, value in zip(places.taps[step], (y, w), (c, q), strict=True):
                    if leaf is not None and factor is not None:
                        slope = jnp.sum(factor * kept_taps[step], axis=0)
                        add(leaf, slope if value.shape else jnp.sum(slope))
            terms = [] if y is None else [c * y]
            if w is not None:
                terms.append(q * w)
            if terms:
                registers.update(_split(sum(terms[1:], terms[0]), tap.outputs, form))
        elif any(i in registers for i in step.inputs if i >= 0):
            stacks = [
                registers[i] if i in registers else jnp.zeros((batch, *program.shapes[i]), dtype)
                for i in step.inputs
                if i >= 0
            ]
            fixed = fixed_operands(form, step, dtype)
            registers[step.output] = apply_batched(step, fixed, stacks)
            if step.output in kept_ops:
                place = next(j for j, i in enumerate(step.inputs) if i < 0)
                coefficient = jnp.asarray(form.consts[-1 - step.inputs[place]])

                def applied(a: Any, step: Any = step, stacks: Any = stacks, place: int = place) -> Any:
                    return apply_batched(
                        step, [a.astype(dtype) if j == place else None for j in range(2)], stacks
                    )

                _, pull = jax.vjp(applied, coefficient)
                add(places.ops[step.output], pull(kept_ops[step.output])[0])
    return slopes
