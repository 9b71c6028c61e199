"""The jit-able core of local constants for training: the naive product near every image of a batch. Estimates.

Where a monotone activation takes one value on the whole range of a neuron in the ball B(x, eps), the neuron is constant
there, and its row and column drop out of the product around it: with 0/1 matrices D_k(x)

    L(x) = ||W_n D_{n-1}|| ||D_{n-1} W_{n-1} D_{n-2}|| ... ||D_1 W_1||  <=  the naive product,

Huang, Zhang, Shi, Kolter and Anandkumar, Training certifiably robust neural networks with efficient local Lipschitz
bounds, NeurIPS 2021. Activations with an upper end, such as min(max(y, 0), t), have more constant neurons than ReLU.
The range of a neuron is y +- min(sum_j ||row_j|| m_j, sum_j |row_j| rho_j) over the sources j that it reads, with m_j
bounding the change of the source's outputs in l2 and rho_j that of each of them.

Everything is computed in float arithmetic with norms by power iteration, so that nothing is proved: `lb.local` proves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.batched_steps import Batches, apply_batched
from lipbounds._form.lure import LureForm, apply_op, apply_tap, fixed_operands, flat_slopes, propagate
from lipbounds._form.program import Op
from lipbounds._form.walk import Algebra, walk
from lipbounds._text.settings import debugging_off
from lipbounds._triangle import core
from lipbounds._triangle.core import Constants, State
from lipbounds._triangle.output_rows import Scalings

_NAIVE = core.Core(centred=False)
# Steps after which every entry is one entry of the source times a number, or zero, and no two are the same entry.
_DIAGONAL = (
    *("add", "sub", "neg", "mul", "div", "constant"),
    *("reshape", "transpose", "rev", "slice", "pad", "broadcast_in_dim"),
)


@dataclass(frozen=True)
class LocalCore:
    """The core of `local`: `core(form, state, x, eps=...) -> (Constants with a leading axis of images, state)`.

    Works on tracers, under jit and grad; l2 norm; the state is that of the core of `naive`.
    """

    def init(self, form: LureForm, key: Any, dtype: Any = jnp.float32) -> State:
        """Random unit vectors to start from."""
        return _NAIVE.init(form, key, dtype)

    @debugging_off()
    def __call__(
        self,
        form: LureForm,
        state: State,
        x: jax.Array,
        *,
        eps: float,
        steps: int = 5,
        own: int = 2,
        pairwise: bool = False,
    ) -> tuple[Constants, State]:
        """Estimated constants on the balls of radius eps around images x (B, *in_shape): value (B,), pairs (B, K, K).

        The vectors of the whole network, which the state keeps, are iterated `steps` times, and from them `own` times
        for every image. The gradient takes vectors and which neurons are constant as given.
        """
        still, images = jax.lax.stop_gradient((form, x))
        whole = core.loop_transform(still, False, state.rows[0].dtype)
        vectors, reach = _NAIVE.reach(still, whole, state, steps)
        masks = moving(still, images.reshape(len(x), -1), eps, reach)
        scalings = core.loop_transform(form, False, state.rows[0].dtype)
        begin = State(vectors, state.rows)

        def one(mask: tuple[Any, ...]) -> tuple[Constants, State]:
            near: Scalings = tuple(
                (c, q * m, m if e is None else e) if m is not None else (c, q, e)
                for (c, q, e), m in zip(scalings, mask, strict=True)
            )
            return _NAIVE(form, begin, steps=own, pairwise=pairwise, scalings=near)

        found, after = jax.vmap(one)(masks)
        rows = tuple(u[0] for u in after.rows)
        return found, jax.lax.stop_gradient(State(vectors, rows))


def moving(form: LureForm, x: jax.Array, eps: Any, reach: jax.Array) -> tuple[jax.Array | None, ...]:
    """Per tap (B, n): 1 where a neuron may change in the ball around an image, 0 where it is constant; None for groups.

    reach: constants of x -> y_k over the whole space, as `Core.reach` has them.
    """
    dtype = reach.dtype
    x = x.astype(dtype)
    rows = _row_norms(form, dtype)
    centres = jax.vmap(lambda one: _centres(form, one, dtype))(x)
    ranges = _Ranges(form, centres, rows, eps, reach)
    size = jnp.full((len(x), *form.program.shapes[0]), eps, dtype)
    walk(form.program, ranges, {0: size})
    return tuple(ranges.masks.get(k) for k in range(len(form.taps)))


def _centres(form: LureForm, x: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    """Pre-activations of every tap at one image."""
    seen: list[jax.Array] = []

    def tap(k: int, y: jax.Array) -> jax.Array:
        seen.append(y)
        return apply_tap(form.taps[k], form.consts, y)

    propagate(form, x, tap, dtype=dtype, affine=True)
    return tuple(seen)


def _sizes(op: Op, fixed: Sequence[Any]) -> tuple[Op, list[Any]]:
    """The step with coefficients in absolute value: sizes of its output from sizes of its inputs."""
    fixed = [a if a is None else jnp.abs(a) for a in fixed]
    return (Op("add", (), op.inputs, op.output) if op.kind == "sub" else op), fixed


class _Ranges(Batches):
    """Entrywise bounds of changes, (B, *shape), through the network; at every tap the neurons that may change."""

    def __init__(
        self,
        form: LureForm,
        centres: tuple[jax.Array, ...],
        rows: Mapping[tuple[int, int], jax.Array],
        eps: Any,
        reach: jax.Array,
    ) -> None:
        count = len(centres[0]) if centres else 0
        super().__init__(form, count, reach.dtype)
        self.centres, self.rows, self.reach, self.eps = centres, rows, reach, eps
        # l2 bounds of a source's change
        self.lengths: dict[int, Any] = {-1: jnp.full(count, eps, reach.dtype)}
        self.masks: dict[int, jax.Array] = {}

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        stacks = [held[i] if i in held else self.zeros(self.program.shapes[i]) for i in op.reads]
        step, fixed = _sizes(op, fixed_operands(self.form.consts, op, self.dtype))
        return stacks[0] if op.kind == "neg" else apply_batched(step, fixed, stacks)

    def tap(self, k: int, value: Any) -> Any:
        tap, y = self.form.taps[k], self.centres[k]
        if value is None:
            return None
        length = jnp.zeros(self.count, self.dtype)
        straight = jnp.zeros_like(y)
        for (source, target), norms in self.rows.items():
            if target == k:
                straight = straight + norms * self.lengths[source][:, None]
        radius = jnp.minimum(value, straight)
        if tap.groups is not None:
            change = jnp.max(radius[:, tap.groups.array], axis=2)
            out = change if tap.kind != "sort" else jnp.zeros((self.count, tap.size_out), self.dtype)
            if tap.kind == "sort":
                spread = jnp.broadcast_to(change[:, :, None], (*change.shape, tap.groups.array.shape[1]))
                out = out.at[:, tap.groups.array].set(spread)
            slope: Any = float(np.sqrt(core.multiplicity(tap).max(initial=1.0)))
        else:
            lower, upper = (jnp.asarray(s, self.dtype) for s in flat_slopes(self.form, k))
            slope = jnp.max(jnp.maximum(jnp.abs(lower), jnp.abs(upper)), initial=0.0)
            low, middle, high = (
                jax.vmap(lambda v: apply_tap(tap, self.form.consts, v))(y + sign * radius)
                for sign in (-1, 0, 1)
            )
            monotone = lower >= 0
            out = jnp.where(monotone, jnp.maximum(high - middle, middle - low), slope * radius)
            self.masks[k] = jnp.where(monotone & (high <= low), 0, 1).astype(self.dtype)
        length = jnp.minimum(slope * self.reach[1 + k] * self.eps, jnp.sqrt(jnp.sum(out * out, axis=1)))
        self.lengths[k] = length
        return out


class _Rows(Algebra[tuple[jax.Array, bool]]):
    """Bounds of the row norms of the direct linear maps from one source, and whether entries are entries of it."""

    def __init__(self, form: LureForm, source: int, dtype: Any) -> None:
        self.form, self.program, self.source, self.dtype = form, form.program, source, dtype
        self.out: dict[tuple[int, int], jax.Array] = {}

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> tuple[jax.Array, bool]:
        shapes, sizes = self.program.shapes, self.program.sizes
        values = [held[i][0] if i in held else jnp.zeros(shapes[i], self.dtype) for i in op.reads]
        straight = len(op.reads) == 1 and held[op.reads[0]][1]
        step, fixed = _sizes(op, fixed_operands(self.form.consts, op, self.dtype))
        if op.kind == "neg":
            return values[0], straight
        squared = straight and op.kind in ("dot_general", "conv")
        if squared:
            fixed, values = [a if a is None else a * a for a in fixed], [v * v for v in values]
        moving = iter(values)
        out = apply_op(step, [next(moving) if a is None else a for a in fixed])
        if squared:
            return jnp.sqrt(out), False
        known = op.kind in _DIAGONAL and (op.kind == "pad" or sizes[op.output] <= sizes[op.reads[0]])
        return out, straight and known

    def tap(self, k: int, value: Any) -> Any:
        if value is not None:
            self.out[self.source, k] = value[0]
        return (jnp.ones(self.form.taps[k].size_out, self.dtype), True) if k == self.source else None

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> Any:
        zeros = ((i, self.program.sizes[i]) for i in registers)
        parts = [held[i][0].ravel() if i in held else jnp.zeros(n, self.dtype) for i, n in zeros]
        return jnp.concatenate(parts), False

    def split(self, value: Any, registers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for i, place in self.program.places_of(registers):
            yield i, (value[0][place].reshape(self.program.shapes[i]), value[1])


def _row_norms(form: LureForm, dtype: Any) -> dict[tuple[int, int], jax.Array]:
    """(source, tap) -> (n,) upper bounds of ||row_i|| of the direct linear map, up to rounding; -1 is the input.

    Exact where the map is one product or convolution between diagonal steps; otherwise ||e_i' B A|| <= sum_j |B_ij|
    ||e_j' A||.
    """
    found: dict[tuple[int, int], jax.Array] = {}
    for source in range(-1, len(form.taps)):
        rows = _Rows(form, source, dtype)
        begin = {0: (jnp.ones(form.program.shapes[0], dtype), True)} if source < 0 else {}
        walk(form.program, rows, begin)
        found |= rows.out
    return found
