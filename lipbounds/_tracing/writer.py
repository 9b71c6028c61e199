"""Write equations into a flat program, and find where the entries of a value come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._form.concrete import at_once
from lipbounds._form.steps import KINDS
from lipbounds._form.windows import iota
from lipbounds._tracing import rules
from lipbounds._tracing.flat import Eqn, Path, Value
from lipbounds._tracing.parameters import not_understood

Outputs = list[Value] | None


class Emits(Protocol):
    """The owner of the flat program, which appends equations to it."""

    def const(self, const: Any, randomness: int = 0) -> Value: ...

    def record(self, eqn: Any, inputs: Sequence[Value], path: Path) -> list[Value]: ...

    def emit(
        self,
        primitive: str,
        params: dict[str, Any],
        inputs: Sequence[Value],
        shape: tuple[int, ...],
        path: Path,
    ) -> Value: ...


class Writer:
    """Writes equations into the flat program at one place."""

    def __init__(self, inliner: Emits, path: Path, where: str):
        self.inliner, self.path, self.where = inliner, path, where

    def emit(
        self,
        name: str,
        params: dict[str, Any],
        inputs: Sequence[Value],
        shape: tuple[int, ...],
        bind: Callable[..., Any],
    ) -> Value:
        out = self.inliner.emit(name, params, inputs, shape, (self.where,))
        assert out.producer is not None
        out.producer.bind = bind
        return out

    def entries(self, values: Sequence[Value], index: np.ndarray) -> Value:
        """The tensor of the shape of `index` that reads these entries of the values, laid end to end."""
        return self.emit("entries", {"index": index}, values, index.shape, _take)

    def grouped(self, mode: str, values: Sequence[Value], index: np.ndarray, shape: tuple[int, ...]) -> Value:
        """max, min or logsumexp over every row of `index` (a sort of them: of the shape of the one operand)."""
        if len(values) > 1:
            values = [self.entries(values, iota([sum(math.prod(v.shape) for v in values)]))]
        return self.emit("grouped", {"mode": mode, "index": index, "shape": shape}, values, shape, _group)

    def binary(self, name: str, a: Value, b: Value) -> Value:
        shape = np.broadcast_shapes(a.shape, b.shape)
        return self.emit(name, {}, [a, b], shape, {"mul": jnp.multiply, "sub": jnp.subtract}[name])


def _take(*arrays: Any, index: np.ndarray) -> Any:
    return jnp.concatenate([jnp.ravel(a) for a in arrays])[index]


def _group(a: Any, *, mode: str, index: np.ndarray, shape: tuple[int, ...]) -> Any:
    rows = jnp.ravel(a)[index]
    if mode == "sort":
        return jnp.zeros(a.size, a.dtype).at[index].set(jnp.sort(rows, axis=1)).reshape(shape)
    of_rows: dict[str, Callable[..., Any]] = {"max": jnp.max, "min": jnp.min, "logsumexp": jax.nn.logsumexp}
    return of_rows[mode](rows, axis=1).reshape(shape)


def understood(eqn: Eqn) -> bool:
    return not_understood(eqn.primitive, eqn.params) is None


def _moved(value: Value) -> tuple[Value, np.ndarray | None]:
    """(operand, index) where `value` only moves entries of one operand that depends on x: value = operand[index].

    (value, None) where it does more than that.
    """
    eqn = value.producer
    if eqn is None or sum(v.depends for v in eqn.inputs) != 1 or not understood(eqn):
        return value, None
    rule = rules.RULES.get(eqn.primitive)
    with at_once():
        part = rule(eqn) if rule is not None else None
    if isinstance(part, (list, tuple)):
        part = part[eqn.outputs.index(value)]
    if isinstance(part, rules.Alias):
        operand = eqn.inputs[part.operand]
        same = operand.depends and operand.shape == value.shape
        return (operand, iota(operand.shape)) if same else (value, None)
    if not isinstance(part, rules.Linear) or not KINDS[part.kind].moves or len(part.operands) != 1:
        return value, None
    operand = eqn.inputs[part.operands[0]]
    with at_once():
        moved = KINDS[part.kind].apply(dict(part.params), jnp.asarray(iota(operand.shape) + 1))
    index = np.asarray(moved) - 1
    return (operand, index) if operand.depends and (index >= 0).all() else (value, None)


def origin(value: Value) -> tuple[Value, np.ndarray]:
    """(o, index) with value = o[index] (flat), as far back as entries are only moved."""
    index = iota(value.shape)
    while True:
        value, step = _moved(value)
        if step is None:
            return value, index
        index = step.reshape(-1)[index]
