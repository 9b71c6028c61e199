"""The output rows of the gain, K vector-Jacobian products, as Gram matrices on the device. Estimates.

The rows of G[output, j] are wanted twice: for the norm of the block and for the distances between its rows, which are
the pairwise constants. Both follow from Gram matrices. Rows are taken of the centred outputs z_k - mean(z), which costs
nothing and keeps the digits of the distances, with one row more for the mean. Where the network has more outputs than
entries before its last linear steps, the Gram matrix is that of the entries (1000 classes cost as much as 512).

The program is run backward for a few rows at a time, small enough for a processor's cache, and its derivative runs it
forward once, on the cotangents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.batched_steps import Batches, apply_batched, product
from lipbounds._form.concrete import is_concrete
from lipbounds._form.lure import LureForm
from lipbounds._form.program import Op, Program
from lipbounds._form.steps import KINDS
from lipbounds._form.walk import walk

#: (c, q, e) per tap: v = c y + q w and ||w|| <= ||e y||; None is zero for c and one for e.
Scalings = tuple[tuple[Any, Any, Any], ...]
Batch = dict[int, jax.Array]  # register -> (rows, *shape); absent is zero
_CHUNK = 16  # rows at a time
_SMALLEST = 0.8  # rows are divided by at least this power of the smallest normal number


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
            gram = product(product(head, gram), head.T)
        centred, cross = gram[:count, :count], gram[:count, count]
        whole = centred + cross[:, None] + cross[None, :] + gram[count, count]
        out.append(RowGram(whole, centred, jax.lax.stop_gradient(scale)))
    return out


def _neck(program: Program) -> tuple[int, tuple[Op, ...]]:
    """(register, steps from it to the output): the narrowest register that everything passes before the output.

    Only linear steps of one register come after it. It is the output itself unless another has fewer entries.
    """
    neck = place = program.output
    steps: tuple[Op, ...] = ()
    passed: tuple[Op, ...] = ()
    while place:
        step = program.steps[program.written[place]]
        if not isinstance(step, Op) or len(step.reads) != 1:
            break
        place, passed = step.reads[0], (*passed, step)
        if program.sizes[place] < program.sizes[neck]:
            neck, steps = place, passed
    return neck, steps


def _through(form: LureForm, tail: tuple[Op, ...], seeds: jax.Array) -> jax.Array:
    """Rows over the outputs taken back to rows over the neck, through the steps of `_neck` (last step first)."""
    batches = Batches(form, len(seeds), seeds.dtype)
    rows = seeds.reshape(-1, *form.program.shapes[form.program.output])
    for step in tail:
        ((_, rows),) = batches.back(0, step, rows)
    return rows.reshape(seeds.shape[0], -1)


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
        return [product(r, r.T)[:count, :count] for r in found], sizes

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
            vectors.append(product(jnp.pad((g + g.T) / size, (0, r.shape[0] - count)), r))
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
        if isinstance(step, Op) and not KINDS[step.kind].joint:
            for i in step.inputs:
                if i < 0 and form.consts[-1 - i] in moving:
                    ops[step.output] = form.consts[-1 - i]
    taps = {}
    for k, (c, q, _) in enumerate(scalings):
        leaves = (c if c in moving else None, q if q in moving else None)
        if leaves != (None, None):
            taps[k] = leaves
    return Places(ops, taps)


class _Back(Batches):
    """From the neck to the sources; keeps the registers at `places`."""

    def __init__(
        self, form: LureForm, scalings: Scalings, divisors: dict[int, Any], places: Places, seeds: jax.Array
    ) -> None:
        super().__init__(form, len(seeds), seeds.dtype)
        self.scalings, self.divisors, self.places = scalings, divisors, places
        self.found: dict[int, jax.Array] = {}
        self.kept_ops: Batch = {}
        self.kept_taps: Batch = {}

    def back(self, place: int, op: Op, out: Any) -> Iterator[tuple[int, Any]]:
        if op.output in self.places.ops:
            self.kept_ops[op.output] = out
        return super().back(place, op, out)

    def tap(self, k: int, value: Any) -> Any:
        if value is None:
            return None
        c, q, _ = self.scalings[k]
        if k in self.places.taps:
            self.kept_taps[k] = value
        if k in self.divisors:
            self.found[k] = q / self.divisors[k] * value
        return None if c is None else c * value


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
    divisors = dict(zip(sources, sizes or [1] * len(sources), strict=True))
    back = _Back(form, scalings, divisors, places, seeds)
    held = walk(form.program, back, {neck: seeds.reshape(-1, *form.program.shapes[neck])}, reverse=True)
    if 0 in held and -1 in divisors:
        back.found[-1] = held[0].reshape(len(seeds), -1) / divisors[-1]
    widths = {j: form.in_size if j < 0 else form.taps[j].size_out for j in sources}
    rows = [back.found[j] if j in back.found else back.zeros((widths[j],)) for j in sources]
    return rows, (back.kept_ops, back.kept_taps)


class _Slopes(Batches):
    """From the sources, with vectors `given`, to derivatives in the coefficients at `places`, by leaf."""

    def __init__(
        self, form: LureForm, scalings: Scalings, given: dict[int, jax.Array], places: Places, kept: Any
    ) -> None:
        first = next(iter(given.values()))
        super().__init__(form, len(first), first.dtype)
        self.scalings, self.given, self.places = scalings, given, places
        self.kept_ops, self.kept_taps = kept
        self.slopes: dict[int, jax.Array] = {}

    def put(self, leaf: int, slope: jax.Array) -> None:
        self.slopes[leaf] = self.slopes[leaf] + slope if leaf in self.slopes else slope

    def tap(self, k: int, value: Any) -> Any:
        c, q, _ = self.scalings[k]
        y, w = None if c is None else value, self.given.get(k)
        if k in self.kept_taps:
            for leaf, factor, slope in zip(self.places.taps[k], (y, w), (c, q), strict=True):
                if leaf is not None and factor is not None:
                    total = jnp.sum(factor * self.kept_taps[k], axis=0)
                    self.put(leaf, total if slope.shape else jnp.sum(total))
        terms = [] if y is None else [c * y]
        if w is not None:
            terms.append(q * w)
        return sum(terms[1:], terms[0]) if terms else None

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        if op.output in self.kept_ops:
            (i,) = (j for j, leaf in enumerate(op.inputs) if leaf < 0)
            coefficient = jnp.asarray(self.form.consts[-1 - op.inputs[i]])

            def applied(a: Any) -> Any:
                stacks = [held[r] for r in op.reads]
                return apply_batched(op, [a.astype(self.dtype) if j == i else None for j in range(2)], stacks)

            _, pull = jax.vjp(applied, coefficient)
            self.put(self.places.ops[op.output], pull(self.kept_ops[op.output])[0])
        return super().step(place, op, held)


def _run_forward(
    form: LureForm, scalings: Scalings, sources: tuple[int, ...], places: Places, vectors: Any, kept: Any
) -> dict[int, jax.Array]:
    """Derivatives of sum_k seed_k' G[neck, j] g_k in the coefficients at `places`, by leaf; the g are `vectors`."""
    given = dict(zip(sources, vectors, strict=True))
    forward = _Slopes(form, scalings, given, places, kept)
    start = {0: given[-1].reshape(-1, *form.program.shapes[0])} if -1 in given else {}
    walk(form.program, forward, start)
    return forward.slopes
