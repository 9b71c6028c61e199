"""Estimates of the triangle recursion on the device, jit-able, differentiable and warm-started, for training.

All blocks of the gain are iterated at once: one run of the program carries, at every register, a batch with one vector
per block (source, target) that passes there, so that a step is one batched convolution or product; its transpose comes
from `jax.vjp`. Power iteration gives a lower bound of each block's norm, so the result is neither an upper nor a lower
bound of the network's constant: an estimate.

The output rows are K vector-Jacobian products in chunks small enough for a processor's cache (`output_rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.batched_steps import apply_batched, einsum, product
from lipbounds._form.concrete import is_concrete
from lipbounds._form.lure import LureForm, fixed_operands, flat_slopes, multiplicity
from lipbounds._form.program import Op, Program
from lipbounds._form.walk import Algebra, connected, walk
from lipbounds._text.settings import debugging_off
from lipbounds._triangle.output_rows import Scalings, row_grams

Pair = tuple[int, int]  # (source, target) taps; source -1 is the input


class State(NamedTuple):
    """Warm start of the power iterations.

    blocks: per source j with blocks (`Plan.groups`) its vectors, (targets, n_j).
    rows: per source that reaches the output one (K,) vector.
    """

    blocks: tuple[jax.Array, ...]
    rows: tuple[jax.Array, ...]


class Constants(NamedTuple):
    """Estimated constants: value (), per_class (K,), pairwise (K, K) with zero diagonal (None unless asked for)."""

    value: jax.Array
    per_class: jax.Array | None
    pairwise: jax.Array | None


@dataclass(frozen=True)
class Plan:
    """The blocks that exist, and those that pass each register.

    Args:
        pairs: the blocks, by source and then by target.
        groups: (source, first, last + 1): the range of `pairs` with one source.
        alive: per register, the indices of the blocks that pass it, ascending.
        sources: which reach the output.
    """

    pairs: tuple[Pair, ...]
    groups: tuple[tuple[int, int, int], ...]
    alive: tuple[tuple[int, ...], ...]
    sources: tuple[int, ...]


@lru_cache(maxsize=256)
def plan(program: Program, centred: bool) -> Plan:
    taps = program.taps

    def through(k: int) -> bool:
        return centred and taps[k].groups is None

    from_ = {j: connected(program, {0} if j < 0 else (), (j,), through) for j in range(-1, len(taps))}
    to = {k: connected(program, (), (k,), through, reverse=True) for k in range(len(taps))}
    pairs = [
        (j, k)
        for j in range(-1, len(taps))
        for k in range(max(j, -1) + 1, len(taps))
        if any(i in from_[j] and i in to[k] for i in taps[k].inputs)
    ]
    alive = tuple(
        tuple(p for p, (j, k) in enumerate(pairs) if r in from_[j] and r in to[k])
        for r in range(len(program.shapes))
    )
    firsts: dict[int, list[int]] = {}
    for p, (j, _) in enumerate(pairs):
        firsts.setdefault(j, []).append(p)
    groups = tuple((j, places[0], places[-1] + 1) for j, places in firsts.items())
    sources = tuple(j for j in range(-1, len(taps)) if program.output in from_[j])
    return Plan(tuple(pairs), groups, alive, sources)


def loop_transform(form: LureForm, centred: bool, dtype: Any) -> Scalings:
    """(c, q, e) per tap as in `TapScaling`, on the device and differentiable in the slopes."""
    out: list[tuple[Any, Any, Any]] = []
    for k, tap in enumerate(form.taps):
        if tap.groups is not None:
            out.append((None, np.ones((), dtype), np.sqrt(multiplicity(tap)).astype(dtype)))
            continue
        lower, upper = (_single(s.astype(dtype)) for s in flat_slopes(form, k))
        if centred:
            out.append(((lower + upper) / 2, (upper - lower) / 2, None))
        else:
            out.append((None, _larger(lower, upper), None))
    return tuple(out)


def _single(slopes: Any) -> Any:
    """A constant as a number, so that it is neither stored nor read as an array."""
    if is_concrete(slopes) and slopes.size and (slopes == slopes[0]).all():
        return slopes[0]
    return slopes


def _larger(a: Any, b: Any) -> Any:
    if is_concrete(a) and is_concrete(b):
        return np.maximum(np.abs(a), np.abs(b))
    return jnp.maximum(jnp.abs(a), jnp.abs(b))


# --- all blocks at once --------------------------------------------------------------------------------------------


def _pick(
    batch: Any, have: tuple[int, ...], want: tuple[int, ...], shape: tuple[int, ...], dtype: Any
) -> Any:
    """Rows `want` of a batch whose rows are `have`; zero where missing."""
    if have == want:
        return batch
    place = {p: row for row, p in enumerate(have)}
    rows = [place.get(p, -1) for p in want]
    found = [row for row in rows if row >= 0]
    if not found:
        return jnp.zeros((len(want), *shape), dtype)
    if len(found) == len(rows):
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return batch[rows[0] : rows[0] + len(rows)]
        return batch[np.array(rows)]
    padded = jnp.concatenate([batch, jnp.zeros((1, *shape), dtype)])
    return padded[np.array(rows)]


class _Blocks(Algebra[Any]):
    """Vectors of all blocks at once.

    A register holds a batch with one row for each of its `alive` blocks. Joined, a tap's inputs are (blocks, rows), and
    its outputs (tap, blocks and rows of y, rows of w).
    """

    def __init__(
        self, form: LureForm, layout: Plan, scalings: Scalings, given: dict[int, Any], dtype: Any
    ) -> None:
        self.form, self.program, self.layout, self.scalings = form, form.program, layout, scalings
        self.given, self.dtype, self.alive = given, dtype, layout.alive
        self.out: dict[int, jax.Array] = {}

    def pick(self, register: int, held: Mapping[int, Any], want: tuple[int, ...]) -> Any:
        shape = self.program.shapes[register]
        return _pick(held.get(register), self.alive[register], want, shape, self.dtype)

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        want = self.alive[op.output]
        if not want:
            return None
        stacks = [self.pick(i, held, want) for i in op.reads]
        return apply_batched(op, fixed_operands(self.form.consts, op, self.dtype), stacks)

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> Any:
        arriving = tuple(sorted({p for i in registers for p in self.alive[i]}))
        parts = [self.pick(i, held, arriving).reshape(len(arriving), -1) for i in registers]
        return arriving, jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def tap(self, k: int, value: Any) -> Any:
        arriving, y = value or ((), None)
        _, q, e = self.scalings[k]
        ends = tuple(p for p in arriving if self.layout.pairs[p][1] == k)
        if ends:
            ended = _pick(y, arriving, ends, (self.program.taps[k].size_in,), self.dtype)
            self.out[k] = ended if e is None else e * ended
        return k, arriving, y, self.given[k][0] * q if k in self.given else None

    def split(self, value: Any, registers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        k, arriving, y, begun = value
        c = self.scalings[k][0]
        for register, part in self.program.places_of(registers):
            want, size = self.alive[register], self.program.sizes[register]
            if not want:
                continue
            pieces: list[Any] = []
            order: tuple[int, ...] = ()
            passing = tuple(p for p in want if self.layout.pairs[p][0] != k)
            if passing:
                piece = _pick(y, arriving, passing, (y.shape[1],), self.dtype)[:, part]
                pieces.append(piece * (c[part] if c.ndim else c))
                order = passing
            if len(passing) < len(want):
                pieces.append(begun[:, part])
                order = (*order, *self.given[k][1])
            joined = jnp.concatenate(pieces) if len(pieces) > 1 else pieces[0]
            shape = self.program.shapes[register]
            yield register, _pick(joined, order, want, (size,), self.dtype).reshape(len(want), *shape)


def all_blocks(
    form: LureForm, layout: Plan, scalings: Scalings, vectors: tuple[jax.Array, ...]
) -> dict[int, jax.Array]:
    """{target k: G[k, j] u_p for its blocks p = (j, k), by source, (blocks, n_k)}: linear in the vectors."""
    dtype = vectors[0].dtype
    given = {
        j: (batch, tuple(range(first, last)))
        for (j, first, last), batch in zip(layout.groups, vectors, strict=True)
    }
    blocks = _Blocks(form, layout, scalings, given, dtype)
    held, first = {}, layout.alive[0]
    if first:
        batch, names = given[-1]
        whole = _pick(batch, names, first, (form.in_size,), dtype)
        held[0] = whole.reshape(len(first), *form.program.shapes[0])
    walk(form.program, blocks, held)
    return blocks.out


def _lengths(v: jax.Array) -> jax.Array:
    """l2 norms of the rows (last axis) with gradient 0 at 0, scaled so that squares neither overflow nor vanish."""
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(v), axis=-1, initial=0.0))
    scale = jnp.where(top > 0, top, 1)
    total = jnp.sum(jnp.square(v / scale[..., None]), axis=-1)
    return scale * jnp.where(top > 0, jnp.sqrt(jnp.where(top > 0, total, 1)), 0)


def _unit(v: jax.Array, fallback: jax.Array) -> jax.Array:
    length = _lengths(v)[..., None]
    return jnp.where(length > 0, v / jnp.where(length > 0, length, 1), fallback)


# --- the core ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Core:
    """The jit-able core of a verb: `core(form, state) -> (Constants, state)`; `core.init(form, key) -> state`.

    Works on tracers, under jit, grad and vmap; only the l2 norm. Computes in the dtype of the state.
    """

    centred: bool

    @debugging_off()
    def init(self, form: LureForm, key: Any, dtype: Any = jnp.float32) -> State:
        """Random unit vectors to start from."""
        layout = plan(form.program, self.centred)
        sizes = {j: form.in_size if j < 0 else form.taps[j].size_out for j, _, _ in layout.groups}
        shapes = [(last - first, sizes[j]) for j, first, last in layout.groups]
        keys = list(jax.random.split(key, len(shapes) + len(layout.sources) + 1))

        def start(shape: tuple[int, ...], k: Any) -> jax.Array:
            return _unit(jax.random.normal(k, shape, dtype), jnp.zeros(shape, dtype))

        blocks = tuple(start(shape, k) for shape, k in zip(shapes, keys, strict=False))
        rows = tuple(start((form.num_outputs,), k) for k in keys[len(shapes) : -1])
        return State(blocks, rows)

    @debugging_off()
    def __call__(
        self,
        form: LureForm,
        state: State,
        *,
        steps: int = 5,
        pairwise: bool = False,
        scalings: Scalings | None = None,
    ) -> tuple[Constants, State]:
        """Estimated constants after `steps` power iterations per block, and the vectors for the next call.

        The gradient takes the iterated vectors as constant (Danskin). Other `scalings` than those of the form's slopes
        are for slopes that are known to be smaller, as they are near one input.
        """
        layout = plan(form.program, self.centred)
        dtype = state.rows[0].dtype if state.rows else jnp.result_type(float)
        if scalings is None:
            scalings = loop_transform(form, self.centred, dtype)
        vectors, reach = self.reach(form, scalings, state, steps)
        value, classes, pairs, tops = self._outputs(form, layout, scalings, reach, state, steps)
        constants = Constants(value, classes if pairwise else None, pairs if pairwise else None)
        return constants, State(vectors, tuple(tops))

    def reach(
        self, form: LureForm, scalings: Scalings, state: State, steps: int
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """(iterated vectors, estimated constants of x -> y_k: 1 for the input, then one per tap)."""
        layout = plan(form.program, self.centred)
        dtype = state.rows[0].dtype if state.rows else jnp.result_type(float)
        vectors = tuple(jax.lax.stop_gradient(v) for v in state.blocks)
        frozen, frozen_scalings = jax.lax.stop_gradient((form, scalings))
        lengths: dict[int, jax.Array] = {}  # per target, the norms of its blocks by source
        if layout.pairs:

            def iterate(_: Any, current: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                images, pull = jax.vjp(lambda u: all_blocks(frozen, layout, frozen_scalings, u), current)
                (back,) = pull({k: _unit(y, y) for k, y in images.items()})
                return tuple(_unit(b, u) for b, u in zip(back, current, strict=True))

            vectors = jax.lax.fori_loop(0, steps, iterate, vectors)
            images = all_blocks(form, layout, scalings, vectors)
            lengths = {target: _lengths(image) for target, image in images.items()}
        reach = [jnp.ones((), dtype)]  # of the input, then of every tap
        for k in range(len(form.taps)):
            sources = np.array([1 + j for j, target in layout.pairs if target == k], int)
            total = product(lengths[k], jnp.stack(reach)[sources]) if k in lengths else jnp.zeros((), dtype)
            reach.append(total)
        return vectors, jnp.stack(reach)

    @staticmethod
    def _outputs(
        form: LureForm, layout: Plan, scalings: Scalings, reach: jax.Array, state: State, steps: int
    ) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """(value, per class, pairwise, vectors) from the output rows of all sources at once."""
        count, dtype = form.num_outputs, reach.dtype
        grams = row_grams(form, layout.sources, scalings, dtype)
        if not grams:
            return jnp.zeros((), dtype), jnp.zeros(count, dtype), jnp.zeros((count, count), dtype), ()
        whole = jnp.stack([gram.whole for gram in grams])  # (sources, K, K)
        weight = jnp.stack([gram.scale for gram in grams]) * reach[1 + np.array(layout.sources)]
        fixed = jax.lax.stop_gradient(whole)
        start = jax.lax.stop_gradient(jnp.stack(state.rows))
        u = jax.lax.fori_loop(0, 2 * steps, lambda _, v: _unit(einsum("sij,sj->si", fixed, v), v), start)
        value = product(weight, root(einsum("si,sij,sj->s", u, whole, u)))
        classes = product(weight, root(jnp.diagonal(whole, axis1=1, axis2=2)))
        apart = jax.vmap(distances)(jnp.stack([gram.centred for gram in grams]))
        return value, classes, symmetric(einsum("s,sij->ij", weight, apart)), tuple(u)


def root(x: jax.Array) -> jax.Array:
    """The square root, 0 with gradient 0 where x is not positive."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def pair_squares(gram: jax.Array) -> jax.Array:
    """(K, K) of (e_i - e_j)' S (e_i - e_j): an estimate, it cancels."""
    diagonal = jnp.diagonal(gram)
    return diagonal[:, None] + diagonal[None, :] - 2 * gram


def symmetric(pairs: jax.Array) -> jax.Array:
    """The mean of a matrix and its transpose: the last digits of a product depend on the place of an entry."""
    return (pairs + pairs.T) / 2


def distances(gram: jax.Array) -> jax.Array:
    """(K, K) distances between rows from their Gram matrix: an estimate, safe to differentiate."""
    return root(pair_squares(gram) * (1 - jnp.eye(gram.shape[0], dtype=gram.dtype)))


@partial(jax.jit, static_argnames=("core", "steps", "pairwise", "dtype"))
def run_core(
    core: Core, form: LureForm, key: Any, steps: int, pairwise: bool, dtype: Any = np.float32
) -> Constants:
    """The core from a random start, compiled once per architecture."""
    return core(form, core.init(form, key, dtype), steps=steps, pairwise=pairwise)[0]
