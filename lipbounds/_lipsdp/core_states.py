"""The state sequence of a form as arrays on the device, differentiable in its constants, for the core of LipSDP.

After the loop transformation v = c y + r w every tap is  y = W s,  s+ = H s + G (c y + r w). Where a tap is all there
is (H = 0) or reads the state as it is (W = I) that is known before any number is, and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.batched_steps import apply_batched, fixed_operands
from lipbounds._form.concrete import is_concrete
from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm, flat_slopes, state_sequence

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
    """Consecutive stages of one shape and kind. slopes: "zero" if every lower slope is known to be 0 (c = r), "wide" if
    r is known to be at least c / 2, else "any".
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


def stages(form: LureForm, dtype: Any) -> tuple[jax.Array, list[Run]]:
    """(A_0, runs): s_0 = A_0 x, then all taps of the elementwise view of `form`."""
    view = elementwise_view(form)
    program = view.program
    cuts = state_sequence(program)
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


def _block(view: LureForm, k: int, dtype: Any) -> tuple[Any, Any]:
    """(H, W) of tap k with v = 0; for k = -1 (A_0, None). _Identity only as A_0, W is None for it, and H for zero."""
    shapes, cuts = view.program.shapes, state_sequence(view.program)
    first, names = (0, (0,)) if k < 0 else (cuts[k].step, cuts[k].registers)
    columns, inputs = [], []
    for name in names:
        y, registers = _advance(view, k, first, {name: _Identity(shapes[name])}, dtype)
        width = int(np.prod(shapes[name]))
        columns.append(
            _joined(
                [registers.get(i) for i in cuts[k + 1].registers], cuts[k + 1].registers, width, view, dtype
            )
        )
        if k >= 0:
            inputs.append(y if y is not None else jnp.zeros((view.taps[k].size_in, width), dtype))
    if k < 0:
        return columns[0], None
    H = None
    if any(block is not None for block in columns):
        widths = [int(np.prod(shapes[name])) for name in names]
        blocks = [
            jnp.zeros((cuts[k + 1].width, width), dtype) if b is None else _dense(b, dtype)
            for b, width in zip(columns, widths, strict=True)
        ]
        H = jnp.concatenate(blocks, axis=1)
    whole = len(inputs) == 1 and isinstance(inputs[0], _Identity)
    W = None if whole else jnp.concatenate([_dense(y, dtype) for y in inputs], axis=1)
    return H, W


def _from_tap(view: LureForm, k: int, dtype: Any) -> jax.Array:
    """G (d+, n) of tap k."""
    tap, cuts = view.taps[k], state_sequence(view.program)
    given: dict[int, Any] = {}
    if len(tap.outputs) == 1:
        given[tap.outputs[0]] = _Identity(tap.shapes[0])
    else:
        eye, start = jnp.eye(tap.size_out, dtype=dtype), 0
        for register, shape in zip(tap.outputs, tap.shapes, strict=True):
            size = int(np.prod(shape))
            given[register] = eye[:, start : start + size].reshape(tap.size_out, *shape)
            start += size
    place = view.program.steps.index(k) + 1
    _, registers = _advance(view, k, place, given, dtype)
    after = cuts[k + 1]
    out = _joined([registers.get(i) for i in after.registers], after.registers, tap.size_out, view, dtype)
    return jnp.zeros((after.width, tap.size_out), dtype) if out is None else _dense(out, dtype)


def _dense(block: Any, dtype: Any) -> jax.Array:
    return jnp.eye(int(np.prod(block.shape)), dtype=dtype) if isinstance(block, _Identity) else block


def _joined(parts: list[Any], names: Any, width: int, view: LureForm, dtype: Any) -> Any:
    """Batches of registers below each other as one matrix (rows, width); None for zero."""
    if all(part is None for part in parts):
        return None
    if len(parts) == 1 and isinstance(parts[0], _Identity):
        return _Identity((width,))
    rows = []
    for part, name in zip(parts, names, strict=True):
        if part is None:
            rows.append(jnp.zeros((int(np.prod(view.program.shapes[name])), width), dtype))
        else:
            stack = part.stack(dtype) if isinstance(part, _Identity) else part
            rows.append(stack.reshape(width, -1).T)
    return jnp.concatenate(rows) if len(rows) > 1 else rows[0]


def _advance(
    view: LureForm, k: int, first: int, registers: dict[int, Any], dtype: Any
) -> tuple[Any, dict[int, Any]]:
    """(y_k as a matrix or None, registers): the steps from `first` to the next cut, on batches (columns, *shape)."""
    program = view.program
    shapes = program.shapes
    (width,) = {_columns(batch) for batch in registers.values()}
    y = None
    for place in range(first, state_sequence(program)[k + 1].step):
        step = program.steps[place]
        if isinstance(step, int):
            tap = program.taps[step]
            y = _joined([registers.get(i) for i in tap.inputs], tap.inputs, width, view, dtype)
            continue
        moving = [i for i in step.inputs if i >= 0]
        if all(registers.get(i) is None for i in moving):
            continue
        fixed = fixed_operands(view, step, dtype)
        if len(moving) == 1 and isinstance(registers[moving[0]], _Identity):
            known = _of_identity(step, fixed, shapes[moving[0]], shapes[step.output])
            if known is not None:
                registers[step.output] = known
                continue
        stacks = []
        for i in moving:
            batch = registers.get(i)
            if batch is None:
                batch = jnp.zeros((width, *shapes[i]), dtype)
            stacks.append(batch.stack(dtype) if isinstance(batch, _Identity) else batch)
        registers[step.output] = apply_batched(step, fixed, stacks)
    return y, registers


def _columns(batch: Any) -> int:
    return int(np.prod(batch.shape)) if isinstance(batch, _Identity) else batch.shape[0]


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
