"""Rewrite group activations (max, min, sort, logsumexp) exactly as elementwise ones between linear maps.

    max(a, b) = b + relu(a - b),    min(a, b) = a - relu(a - b),    log(e^a + e^b) = b + softplus(a - b)

A maximum over a window becomes a tournament, the maxima of all prefixes of n entries take n/2 log2(n) comparisons, and
a sort becomes an odd-even transposition network; MaxMin needs one relu. LipSDP uses this rewriting. The triangle
recursion works on the groups, which give an orthogonal MaxMin network the constant 1.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from lipbounds._activations.expression import Expr, Node
from lipbounds._form.lure import LureForm
from lipbounds._form.program import Op, Program, Tap
from lipbounds._form.steps import StaticArray

Made = TypeVar("Made")

_RELU = Expr((Node("x"), Node("const", (), (0,)), Node("max", (0, 1))))
_ZERO = StaticArray(np.zeros((), np.float32))
_SOFTPLUS = Expr(  # max(x, 0) + log1p(exp(-|x|))
    (
        *_RELU.nodes,
        Node("abs", (0,)),
        Node("neg", (3,)),
        Node("exp", (4,)),
        Node("log1p", (5,)),
        Node("add", (2, 6)),
    )
)
_RAMPS = {"relu": _RELU, "softplus": _SOFTPLUS}


def elementwise_view(form: LureForm, *, shared: bool = True) -> LureForm:
    """Return the same network with group taps rewritten by relu or softplus, or `form` itself if it has none.

    The function is unchanged, so every bound of the result is a bound of `form`.

    Args:
        shared: taps of the same differences share their relu or softplus. Without it each has its own, so that the taps
            of a part of a network are as many as those that the part has in the view of the whole.
    """
    if all(tap.groups is None for tap in form.taps):
        return form
    return _Rewriter(form, shared).run()


class _Rewriter:
    def __init__(self, form: LureForm, shared: bool):
        self.form, self.shared = form, shared
        old = form.program
        self.shapes: list[tuple[int, ...]] = [old.shapes[0]]
        self.places: dict[int, int] = {0: 0}
        self.levels: list[int] = [0]
        self.steps: list[Op | Tap] = []
        self.slopes: list[Any] = []
        self.known: dict[Any, int] = {}
        self.ramps: dict[tuple[str, int], int] = {}

    def register(self, shape: tuple[int, ...], level: int) -> int:
        self.shapes.append(shape)
        self.levels.append(level)
        return len(self.shapes) - 1

    def op(self, kind: str, inputs: tuple[int, ...], out: tuple[int, ...], **params: Any) -> int:
        """Add a linear step and return its register, or return that of an equal step."""
        key = (kind, tuple(sorted(params.items())), inputs)
        if key not in self.known:
            level = max((self.levels[i] for i in inputs if i >= 0), default=0)
            self.known[key] = place = self.register(out, level)
            self.steps.append(Op(*key, place))
        return self.known[key]

    def take(self, inputs: tuple[int, ...], index: np.ndarray) -> int:
        return self.op("take", inputs, index.shape, index=StaticArray(index.astype(np.int32)))

    def ramp(self, name: str, register: int, tap: Tap) -> int:
        """Return the relu or softplus of a register; max and min of one pair share it, if anything is shared."""
        if self.shared and (name, register) in self.ramps:
            return self.ramps[name, register]
        shape = self.shapes[register]
        level = self.levels[register]
        out = self.ramps[name, register] = self.register(shape, level + 1)
        size = int(np.prod(shape))
        self.steps.append(
            Tap(
                kind="elementwise",
                name=name,
                path=f"{tap.path} (rewritten {tap.name})",
                inputs=(register,),
                outputs=(out,),
                shapes=(shape,),
                size_in=size,
                size_out=size,
                expr=_RAMPS[name],
                consts=(_ZERO,),
                level=level,
            )
        )
        self.slopes.append((np.zeros(()), np.ones(())))
        return out

    def run(self) -> LureForm:
        old = self.form.program
        slopes = iter(self.form.slopes)
        for step in old.steps:
            if isinstance(step, Op):
                inputs = tuple(self.places[i] if i >= 0 else i for i in step.inputs)
                self.places[step.output] = self.op(
                    step.kind, inputs, old.shapes[step.output], **dict(step.params)
                )
            elif step.groups is None:
                self.copy_tap(step, next(slopes))
            else:
                next(slopes)
                self.rewrite(step)
        program = Program(tuple(self.steps), tuple(self.shapes), self.places[old.output], old.half)
        return LureForm(program, self.form.consts, tuple(self.slopes))

    def copy_tap(self, tap: Tap, slopes: Any) -> None:
        inputs = tuple(self.places[i] for i in tap.inputs)
        level = max(self.levels[i] for i in inputs)
        outputs = tuple(self.register(shape, level + 1) for shape in tap.shapes)
        self.places.update(zip(tap.outputs, outputs, strict=True))
        self.steps.append(replace(tap, inputs=inputs, outputs=outputs, level=level))
        self.slopes.append(slopes)

    def rewrite(self, tap: Tap) -> None:
        assert tap.groups is not None
        inputs, table = tuple(self.places[i] for i in tap.inputs), tap.groups.array
        if tap.kind == "sort":
            self.sort(tap, self.take(inputs, table), table)
            return
        prefixes = tap.kind != "logsumexp" and _is_prefixes(table)
        found = (
            self.running(tap, inputs, table) if prefixes else self.tournament(tap, self.take(inputs, table))
        )
        self.places[tap.outputs[0]] = self.op("reshape", (found,), tap.shapes[0], shape=tap.shapes[0])

    def better(self, tap: Tap, a: int, b: int) -> int:
        """max(a, b), min(a, b) or logaddexp(a, b), entry by entry."""
        shape = self.shapes[a]
        won = self.ramp("softplus" if tap.kind == "logsumexp" else "relu", self.op("sub", (a, b), shape), tap)
        return self.op("sub", (a, won), shape) if tap.kind == "min" else self.op("add", (b, won), shape)

    def running(self, tap: Tap, inputs: tuple[int, ...], table: np.ndarray) -> int:
        """Extremes of all prefixes of lines of n entries, in rounds; each round doubles the blocks that are done."""
        n = table.shape[1]
        lines = table[n - 1 :: n]
        current = self.take(inputs, lines)
        here = np.arange(lines.size).reshape(lines.shape)
        at = np.arange(n)
        half = 1
        while half < n:
            upper = at[at // half % 2 == 1]
            last = upper // half * half - 1  # of the lower half of its block
            best = self.better(
                tap, self.take((current,), here[:, upper]), self.take((current,), here[:, last])
            )
            index = here.copy()
            index[:, upper] = lines.size + np.arange(lines.shape[0] * upper.size).reshape(-1, upper.size)
            current = self.take((current, best), index)
            half *= 2
        return current

    def tournament(self, tap: Tap, current: int) -> int:
        """Extremes of the rows of the (groups, width) table, by halving its columns until one is left."""
        count, width = self.shapes[current]
        while width > 1:
            half = width // 2
            index = np.arange(count * width).reshape(count, width)
            a = self.take((current,), index[:, :half])
            b = self.take((current,), index[:, half : 2 * half])
            best = self.better(tap, a, b)
            if width % 2:
                rest = self.take((current,), index[:, -1:])
                current = self.op("concatenate", (best, rest), (count, half + 1), dimension=1)
            else:
                current = best
            width = half + width % 2
        return current

    def sort(self, tap: Tap, current: int, table: np.ndarray) -> None:
        """Sort rows by odd-even transposition: `width` rounds of exchanges of neighbours, with one relu per pair."""
        count, width = table.shape
        for turn in range(width if width > 2 else width - 1):
            low = np.arange(turn % 2, width - 1, 2)
            if not low.size:
                continue
            index = np.arange(count * width).reshape(count, width)
            a, b = (self.take((current,), index[:, low + shift]) for shift in (0, 1))
            won = self.ramp("relu", self.op("sub", (a, b), (count, low.size)), tap)
            small = self.op("sub", (a, won), (count, low.size))
            large = self.op("add", (b, won), (count, low.size))
            # Columns that were exchanged come from (small, large), the others stay.
            where = 2 * count * low.size + index
            pairs = np.arange(count * low.size).reshape(count, low.size)
            where[:, low] = pairs
            where[:, low + 1] = count * low.size + pairs
            current = self.take((small, large, current), where)
        back = np.empty(count * width, np.int64)
        back[table.ravel()] = np.arange(count * width)  # flat output v[table] = sorted rows
        start = 0
        for register, shape in zip(tap.outputs, tap.shapes, strict=True):
            size = int(np.prod(shape))
            self.places[register] = self.take((current,), back[start : start + size].reshape(shape))
            start += size


def _is_prefixes(table: np.ndarray) -> bool:
    """Whether the rows are the prefixes of lines of n = width > 2 entries, as `rewrites` writes them."""
    count, n = table.shape
    if n < 3 or count % n:
        return False
    lines = table[n - 1 :: n]
    row = np.minimum(np.arange(n)[:, None], np.arange(n))
    return all(np.array_equal(table[i::n], lines[:, row[i]]) for i in range(n))


def kept_with_form(make: Callable[[LureForm], Made]) -> Callable[[LureForm], Made]:
    """make(elementwise view) as a function of the form, whose result is kept as long as the form lives."""
    kept: weakref.WeakKeyDictionary[LureForm, Made] = weakref.WeakKeyDictionary()

    @wraps(make)
    def found(form: LureForm) -> Made:
        if form.assumed:  # a declaration may be corrected while the form lives
            return make(elementwise_view(form))
        if form not in kept:
            kept[form] = make(elementwise_view(form))
        return kept[form]

    return found
