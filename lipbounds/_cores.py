"""Estimates of the triangle recursion on the device: jit-able, differentiable, warm-started. For training and previews.

All blocks of the gain are iterated at once: one run of the program carries, at every register, a batch with one vector
per block (source, target) that passes there, so that a step is one batched convolution or product; its transpose comes
from `jax.vjp`. Power iteration gives a lower bound of each block's norm, so the result is neither an upper nor a lower
bound of the network's constant: an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._lower import Program
from lipbounds.lure import LureForm, apply_op, flat_slopes, multiplicity, propagate

Pair = tuple[int, int]  # (source, target) taps; source -1 is the input


class State(NamedTuple):
    """Warm start of the power iterations: one vector per block, one (K,) vector per source for the output rows."""

    blocks: tuple[jax.Array, ...]
    rows: tuple[jax.Array, ...]


class Constants(NamedTuple):
    """Estimated constants: value (), per_class (K,), pairwise (K, K) with zero diagonal (None unless asked for)."""

    value: jax.Array
    per_class: jax.Array | None
    pairwise: jax.Array | None


@dataclass(frozen=True)
class Plan:
    """Which blocks exist, and which of them pass each register."""

    pairs: tuple[Pair, ...]
    alive: tuple[tuple[int, ...], ...]
    sources: tuple[int, ...]


@lru_cache(maxsize=256)
def plan(program: Program, centred: bool) -> Plan:
    taps = program.taps
    through = [centred and tap.groups is None for tap in taps]

    def reached(source: int) -> set[int]:
        found = {0} if source < 0 else set()
        for step in program.steps:
            if isinstance(step, int):
                if step == source or (through[step] and any(i in found for i in taps[step].inputs)):
                    found.update(taps[step].outputs)
            elif any(i in found for i in step.inputs if i >= 0):
                found.add(step.output)
        return found

    def leading(target: int) -> set[int]:
        found: set[int] = {program.output} if target < 0 else set()
        for step in reversed(program.steps):
            if isinstance(step, int):
                if step == target or (through[step] and any(o in found for o in taps[step].outputs)):
                    found.update(taps[step].inputs)
            elif step.output in found:
                found.update(i for i in step.inputs if i >= 0)
        return found

    from_ = {j: reached(j) for j in range(-1, len(taps))}
    to = {k: leading(k) for k in range(len(taps))}
    pairs = [
        (j, k) for k in range(len(taps)) for j in range(-1, k) if any(i in from_[j] and i in to[k] for i in taps[k].inputs)
    ]
    alive = tuple(
        tuple(p for p, (j, k) in enumerate(pairs) if r in from_[j] and r in to[k]) for r in range(len(program.shapes))
    )
    sources = tuple(j for j in range(-1, len(taps)) if program.output in from_[j])
    return Plan(tuple(pairs), alive, sources)


def _scalings(form: LureForm, centred: bool, dtype: Any) -> list[tuple[Any, Any, Any]]:
    """(c, q, e) per tap as in linmap.TapScaling, on the device and differentiable in the slopes."""
    out: list[tuple[Any, Any, Any]] = []
    for k, tap in enumerate(form.taps):
        if tap.groups is not None:
            out.append((None, jnp.ones((), dtype), jnp.asarray(np.sqrt(multiplicity(tap)).astype(dtype))))
            continue
        lower, upper = (jnp.asarray(s).astype(dtype) for s in flat_slopes(form, k))
        if centred:
            out.append(((lower + upper) / 2, (upper - lower) / 2, None))
        else:
            out.append((None, jnp.maximum(jnp.abs(lower), jnp.abs(upper)), None))
    return out


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _pick(batch: Any, have: tuple[int, ...], want: tuple[int, ...], shape: tuple[int, ...], dtype: Any) -> Any:
    """Rows `want` of a batch whose rows are `have`; zero where missing."""
    if have == want:
        return batch
    if not any(p in have for p in want):
        return jnp.zeros((len(want), *shape), dtype)
    if all(p in have for p in want):
        return batch[np.array([have.index(p) for p in want])]
    padded = jnp.concatenate([batch, jnp.zeros((1, *shape), dtype)])
    return padded[np.array([have.index(p) if p in have else len(have) for p in want])]


def all_blocks(
    form: LureForm, layout: Plan, scalings: list[tuple[Any, Any, Any]], vectors: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """(G[k, j] u_p) for every block p = (j, k): linear in the vectors, block diagonal."""
    program = form.program
    dtype = vectors[0].dtype
    shapes, alive, pairs = program.shapes, layout.alive, layout.pairs
    batches: dict[int, Any] = {}
    if alive[0]:
        batches[0] = jnp.stack([vectors[p].reshape(shapes[0]) for p in alive[0]])
    out: dict[int, jax.Array] = {}
    for step in program.steps:
        if isinstance(step, int):
            tap, (c, q, e) = program.taps[step], scalings[step]
            arriving = tuple(sorted({p for i in tap.inputs for p in alive[i]}))
            y = None
            if arriving:
                parts = [
                    _pick(batches.get(i), alive[i], arriving, shapes[i], dtype).reshape(len(arriving), -1)
                    for i in tap.inputs
                ]
                y = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
                for row, p in enumerate(arriving):
                    if pairs[p][1] == step:
                        out[p] = y[row] if e is None else e * y[row]
            start = 0
            for register, shape in zip(tap.outputs, tap.shapes, strict=True):
                size = _size(shape)
                want = alive[register]
                if want:
                    passing = tuple(p for p in want if pairs[p][0] != step)
                    pieces = []
                    if passing:
                        assert y is not None and c is not None
                        pieces.append(_pick(c * y, arriving, passing, (tap.size_in,), dtype)[:, start : start + size])
                    begun = tuple(p for p in want if pairs[p][0] == step)
                    if begun:
                        w = jnp.stack([vectors[p] for p in begun]) * q
                        pieces.append(w[:, start : start + size])
                    order = (*passing, *begun)
                    joined = jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]
                    batches[register] = _pick(joined, order, want, (size,), dtype).reshape(len(want), *shape)
                start += size
            continue
        want = alive[step.output]
        if not want:
            continue
        places = [j for j, i in enumerate(step.inputs) if i >= 0]
        stacks = [_pick(batches.get(step.inputs[j]), alive[step.inputs[j]], want, shapes[step.inputs[j]], dtype) for j in places]
        fixed = _fixed_operands(form, step, dtype)

        def one(*moving: Any, step: Any = step, places: Any = places, fixed: Any = fixed) -> Any:
            args = list(fixed)
            for j, value in zip(places, moving, strict=True):
                args[j] = value
            return apply_op(step, args)

        batches[step.output] = jax.vmap(one)(*stacks)
    return tuple(out[p] for p in range(len(pairs)))


def _fixed_operands(form: LureForm, step: Any, dtype: Any) -> list[Any]:
    from lipbounds._rules import KINDS

    joint = KINDS[step.kind].joint
    args: list[Any] = []
    for i in step.inputs:
        if i >= 0:
            args.append(None)
        else:
            const = jnp.asarray(form.consts[-1 - i])
            args.append(jnp.zeros(const.shape, dtype) if joint else const.astype(dtype))
    return args


def output_rows(
    form: LureForm, layout: Plan, scalings: list[tuple[Any, Any, Any]], dtype: Any
) -> tuple[jax.Array, ...]:
    """(K, n_j) rows of G[output, j] for every source j that reaches the output: K vector-Jacobian products in one."""
    sizes = [form.in_size if j < 0 else form.taps[j].size_out for j in layout.sources]

    def network(*sources: jax.Array) -> jax.Array:
        given = dict(zip(layout.sources, sources, strict=True))

        def tap(k: int, y: Any) -> Any:
            c, q, _ = scalings[k]
            v = None if y is None or c is None else c * y
            if k in given:
                w = q * given[k]
                v = w if v is None else v + w
            return v

        out = propagate(form, given.get(-1), tap, dtype=dtype)
        return jnp.zeros(form.num_outputs, dtype) if out is None else out

    if not sizes:
        return ()
    _, pull = jax.vjp(network, *(jnp.zeros(n, dtype) for n in sizes))
    return jax.vmap(pull)(jnp.eye(form.num_outputs, dtype=dtype))


def _length(v: jax.Array) -> jax.Array:
    """l2 norm with gradient 0 at 0, scaled so that squares neither overflow nor vanish."""
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(v), initial=0.0))
    scale = jnp.where(top > 0, top, 1)
    total = jnp.sum(jnp.square(v / scale))
    return scale * jnp.where(top > 0, jnp.sqrt(jnp.where(top > 0, total, 1)), 0)


def _unit(v: jax.Array, fallback: jax.Array) -> jax.Array:
    length = _length(v)
    return jnp.where(length > 0, v / jnp.where(length > 0, length, 1), fallback)


def pair_distances(rows: jax.Array) -> jax.Array:
    """(K, K) Euclidean distances between rows by the Gram matrix: an estimate (it cancels), safe to differentiate."""
    centred = rows - rows.mean(axis=0)
    gram = centred @ centred.T
    squares = jnp.diagonal(gram)
    distance = squares[:, None] + squares[None, :] - 2 * gram
    positive = (distance > 0) & ~jnp.eye(rows.shape[0], dtype=bool)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, distance, 1)), 0)


@dataclass(frozen=True)
class Core:
    """The jit-able core of a verb: `core(form, state) -> (Constants, state)`; `core.init(form, key) -> state`.

    Works on tracers, under jit, grad and vmap; only the l2 norm. Computes in the dtype of the state.
    """

    centred: bool

    def init(self, form: LureForm, key: Any, dtype: Any = jnp.float32) -> State:
        """Random unit vectors to start from."""
        layout = plan(form.program, self.centred)
        sizes = [form.in_size if j < 0 else form.taps[j].size_out for j, _ in layout.pairs]
        keys = jax.random.split(key, len(sizes) + len(layout.sources) + 1)

        def start(n: int, k: Any) -> jax.Array:
            return _unit(jax.random.normal(k, (n,), dtype), jnp.zeros((n,), dtype))

        blocks = tuple(start(n, k) for n, k in zip(sizes, keys, strict=False))
        rows = tuple(start(form.num_outputs, k) for k in keys[len(sizes) : len(sizes) + len(layout.sources)])
        return State(blocks, rows)

    def __call__(
        self, form: LureForm, state: State, *, steps: int = 5, pairwise: bool = False
    ) -> tuple[Constants, State]:
        """Estimated constants after `steps` power iterations per block, and the vectors for the next call.

        The gradient takes the iterated vectors as constant (Danskin).
        """
        layout = plan(form.program, self.centred)
        dtype = state.rows[0].dtype if state.rows else jnp.result_type(float)
        scalings = _scalings(form, self.centred, dtype)
        vectors = tuple(jax.lax.stop_gradient(v) for v in state.blocks)
        frozen, frozen_scalings = jax.lax.stop_gradient((form, scalings))
        sigma: dict[Pair, jax.Array] = {}
        if layout.pairs:

            def iterate(_: Any, current: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                images, pull = jax.vjp(lambda u: all_blocks(frozen, layout, frozen_scalings, u), current)
                (back,) = pull(tuple(_unit(y, y) for y in images))
                return tuple(_unit(b, u) for b, u in zip(back, current, strict=True))

            vectors = jax.lax.fori_loop(0, steps, iterate, vectors)
            images = all_blocks(form, layout, scalings, vectors)
            sigma = {pair: _length(y) for pair, y in zip(layout.pairs, images, strict=True)}
        rows = output_rows(form, layout, scalings, dtype)
        reach: dict[int, jax.Array] = {-1: jnp.ones((), dtype)}
        for k in range(len(form.taps)):
            terms = [sigma[j, k] * reach[j] for j in range(-1, k) if (j, k) in sigma]
            reach[k] = sum(terms, jnp.zeros((), dtype))
        value = jnp.zeros((), dtype)
        classes = jnp.zeros(form.num_outputs, dtype)
        pairs = jnp.zeros((form.num_outputs,) * 2, dtype)
        tops = []
        for j, block, start in zip(layout.sources, rows, state.rows, strict=True):
            top, image = _top_of_rows(block, start, 2 * steps)
            tops.append(top)
            value = value + _length(image) * reach[j]
            if pairwise:
                classes = classes + jax.vmap(_length)(block) * reach[j]
                pairs = pairs + pair_distances(block) * reach[j]
        constants = Constants(value, classes if pairwise else None, pairs if pairwise else None)
        return constants, State(vectors, tuple(tops))


def _top_of_rows(rows: jax.Array, start: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Power iteration on the (K, n) rows from the left: (u, rows' u) with u constant."""
    fixed = jax.lax.stop_gradient(rows)
    u = jax.lax.fori_loop(
        0, steps, lambda _, v: _unit(fixed @ _unit(v @ fixed, v @ fixed), v), jax.lax.stop_gradient(start)
    )
    return u, u @ rows


@partial(jax.jit, static_argnames=("core", "steps", "pairwise"))
def run_core(core: Core, form: LureForm, key: Any, steps: int, pairwise: bool) -> Constants:
    """The core from a random start, compiled once per architecture."""
    return core(form, core.init(form, key), steps=steps, pairwise=pairwise)[0]
