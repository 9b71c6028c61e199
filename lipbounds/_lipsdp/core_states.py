"""The state sequence of a form as arrays on the device, differentiable in its constants, for the core of LipSDP.

After the loop transformation v = c y + r w every tap is  y = W s,  s+ = H s + G (c y + r w). Where a tap is all there
is (H = 0) or reads the state as it is (W = I) that is known before any number is, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.batched_steps import Batches, apply_batched
from lipbounds._form.concrete import is_concrete
from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import Cut, LureForm, fixed_operands, flat_slopes, state_sequence
from lipbounds._form.program import Op
from lipbounds._form.walk import walk

_THINNEST = 1e-6  # radius relative to the centre below which a neuron counts as this wide


class Stage(NamedTuple):
    """One tap, or taps of one shape stacked along a new first axis.

    Args:
        W: (n, d), None for the identity.
        H: (d+, d), None for zero.
        G: (d+, n).
        c, r: (n,) centre and radius of the slopes.
    """

    W: Any
    H: Any
    G: Any
    c: Any
    r: Any


@dataclass(frozen=True)
class Run:
    """Consecutive stages of one shape and kind.

    Args:
        stage: the stages, stacked where there are several.
        count: how many they are.
        slopes: "zero" if every lower slope is known to be 0 (c = r), "wide" if r is known to be at least c / 2, else
            "any".
    """

    stage: Stage
    count: int
    slopes: str


@dataclass(frozen=True)
class _Identity:
    """The columns of an identity matrix, laid out in the shape of a register."""

    shape: tuple[int, ...]

    def stack(self, dtype: Any) -> jax.Array:
        size = int(np.prod(self.shape))
        return jnp.eye(size, dtype=dtype).reshape(size, *self.shape)


# Layers of one width: a state behind a product needs it once, one in front of it a second time, for the identity.
_cuts = partial(state_sequence, late=True)


def stages(form: LureForm, dtype: Any) -> tuple[jax.Array, list[Run]]:
    """(A_0, runs): s_0 = A_0 x, then all taps of the elementwise view of `form`."""
    view = elementwise_view(form)
    program = view.program
    cuts = _cuts(program)
    start = _block(view, -1, dtype)[0]
    found: list[tuple[Stage, str]] = []
    for k in range(len(program.taps)):
        (H, W), G = _block(view, k, dtype), _from_tap(view, k, dtype)
        lower, upper = flat_slopes(view, k)
        c, r, slopes = _slopes(lower, upper, dtype)
        found.append((Stage(W, H, G, c, r), slopes))
    runs: list[list[tuple[Stage, str]]] = []
    for k, one in enumerate(found):
        if k and cuts[k].width == cuts[k + 1].width and _kind(runs[-1][0]) == _kind(one):
            runs[-1].append(one)
        else:
            runs.append([one])
    if isinstance(start, _Identity):
        start = start.stack(dtype)
    return start, [
        Run(
            group[0][0] if len(group) == 1 else jax.tree.map(lambda *a: jnp.stack(a), *(s for s, _ in group)),
            len(group),
            group[0][1],
        )
        for group in runs
    ]


def _kind(one: tuple[Stage, str]) -> Any:
    stage, slopes = one
    return jax.tree.structure(stage), tuple(a.shape for a in jax.tree.leaves(stage)), slopes


def _slopes(lower: Any, upper: Any, dtype: Any) -> tuple[Any, Any, str]:
    known = "any"
    if is_concrete(lower) and is_concrete(upper):
        low, high = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
        centre, radius = np.abs(low + high), high - low
        known = "zero" if (low == 0).all() else "wide" if (2 * radius >= centre).all() else "any"
    lower, upper = (jnp.asarray(a).astype(dtype) for a in (lower, upper))
    return (lower + upper) / 2, (upper - lower) / 2, known


def ratio(stage: Stage) -> jax.Array:
    """|c| / r, at most 1 / _THINNEST."""
    size = jnp.abs(stage.c)
    return size / jnp.maximum(stage.r, _THINNEST * size + jnp.finfo(size.dtype).tiny)


# --- from one cut to the next --------------------------------------------------------------------------------------


class _Columns(Batches):
    """Registers as batches of columns (columns, *shape), or `_Identity`; joined they are a matrix (rows, columns).

    `y` is what arrives at a tap, and nothing passes one.
    """

    y: Any = None

    def stack(self, i: int, held: Mapping[int, Any]) -> Any:
        if i not in held:
            return self.zeros(self.program.shapes[i])
        return held[i].stack(self.dtype) if isinstance(held[i], _Identity) else held[i]

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        fixed, shapes = fixed_operands(self.form.consts, op, self.dtype), self.program.shapes
        if len(op.reads) == 1 and isinstance(held[op.reads[0]], _Identity):
            known = _of_identity(op, fixed, shapes[op.reads[0]], shapes[op.output])
            if known is not None:
                return known
        return apply_batched(op, fixed, [self.stack(i, held) for i in op.reads])

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> Any:
        if len(registers) == 1 and isinstance(held[registers[0]], _Identity):
            return _Identity((self.count,))
        rows = [self.stack(i, held).reshape(self.count, -1).T for i in registers]
        return jnp.concatenate(rows) if len(rows) > 1 else rows[0]

    def tap(self, k: int, value: Any) -> None:
        self.y = value

    def reach(self, held: dict[int, Any], first: int, end: Cut) -> Any:
        """The state at a cut after the steps from `first` on; None for zero."""
        walk(self.program, self, held, places=range(first, end.step))
        return self.join(end.registers, held) if any(i in held for i in end.registers) else None


def _block(view: LureForm, k: int, dtype: Any) -> tuple[Any, Any]:
    """(H, W) of tap k with v = 0; for k = -1 (A_0, None). _Identity only as A_0, W is None for it, and H for zero."""
    program, cuts = view.program, _cuts(view.program)
    first, names = (0, (0,)) if k < 0 else (cuts[k].step, cuts[k].registers)
    blocks, inputs = [], []
    for name in names:
        columns = _Columns(view, program.sizes[name], dtype)
        blocks.append(columns.reach({name: _Identity(program.shapes[name])}, first, cuts[k + 1]))
        if k >= 0:
            inputs.append(columns.zeros((view.taps[k].size_in,)).T if columns.y is None else columns.y)
    if k < 0:
        return blocks[0], None
    H = None
    if any(block is not None for block in blocks):
        widths = [program.sizes[name] for name in names]
        whole = [
            jnp.zeros((cuts[k + 1].width, width), dtype) if b is None else _dense(b, dtype)
            for b, width in zip(blocks, widths, strict=True)
        ]
        H = jnp.concatenate(whole, axis=1)
    unchanged = len(inputs) == 1 and isinstance(inputs[0], _Identity)
    W = None if unchanged else jnp.concatenate([_dense(y, dtype) for y in inputs], axis=1)
    return H, W


def _from_tap(view: LureForm, k: int, dtype: Any) -> jax.Array:
    """G (d+, n) of tap k."""
    tap, end = view.taps[k], _cuts(view.program)[k + 1]
    columns = _Columns(view, tap.size_out, dtype)
    if len(tap.outputs) == 1:
        given: dict[int, Any] = {tap.outputs[0]: _Identity(tap.shapes[0])}
    else:
        given = dict(columns.split(jnp.eye(tap.size_out, dtype=dtype), tap.outputs))
    out = columns.reach(given, view.program.tap_places[k] + 1, end)
    return columns.zeros((end.width,)).T if out is None else _dense(out, dtype)


def _dense(block: Any, dtype: Any) -> jax.Array:
    return jnp.eye(int(np.prod(block.shape)), dtype=dtype) if isinstance(block, _Identity) else block


def _of_identity(step: Any, fixed: list[Any], shape: tuple[int, ...], out: tuple[int, ...]) -> Any:
    """A step on the identity where that needs no arithmetic: a product with weights is the weights. None otherwise."""
    size = int(np.prod(shape))
    if step.kind in ("add", "constant", "reshape", "broadcast_in_dim") and int(np.prod(out)) == size:
        return _Identity(out)  # with a constant that cancels
    if step.kind != "dot_general":
        return None
    (left, right), (batch, _) = dict(step.params)["dimension_numbers"]
    mine, other = (left, right) if fixed[0] is None else (right, left)
    if batch or len(mine) != 1 or shape[mine[0]] != size:
        return None
    weights = fixed[1] if fixed[0] is None else fixed[0]
    return jnp.moveaxis(weights, other[0], 0).reshape(size, *out)
