"""The other view of group taps: max, min and sort as elementwise taps between linear maps, exactly.

    max(a, b) = b + relu(a - b),    min(a, b) = a - relu(a - b)

A maximum over a window becomes a tournament, a sort an odd-even transposition network; MaxMin needs one relu. The
triangle recursion uses the groups (an orthogonal MaxMin network has constant 1), LipSDP uses this rewriting.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lipbounds._kinds import StaticArray
from lipbounds._program import Op, Program, Tap
from lipbounds.activations import Expr, Node
from lipbounds.lure import LureForm

_RELU = Expr((Node("x"), Node("const", (), (0,)), Node("max", (0, 1))))
_ZERO = StaticArray(np.zeros((), np.float32))


def elementwise_view(form: LureForm) -> LureForm:
    """The same network with every group tap rewritten by relus; forms without groups are returned as they are.

    The constants and the function are unchanged; only its wiring is, so every bound of the result is one of `form`.
    """
    if all(tap.groups is None for tap in form.taps):
        return form
    return _Rewriter(form).run()


class _Rewriter:
    def __init__(self, form: LureForm):
        self.form = form
        old = form.program
        self.shapes: list[tuple[int, ...]] = [old.shapes[0]]
        self.places: dict[int, int] = {0: 0}
        self.levels: list[int] = [0]
        self.steps: list[Op | int] = []
        self.taps: list[Tap] = []
        self.slopes: list[Any] = []
        self.known: dict[Any, int] = {}
        self.relus: dict[int, int] = {}

    def register(self, shape: tuple[int, ...], level: int) -> int:
        self.shapes.append(shape)
        self.levels.append(level)
        return len(self.shapes) - 1

    def op(self, kind: str, inputs: tuple[int, ...], out: tuple[int, ...], **params: Any) -> int:
        """A linear step; one that was done before is not done again, so equal tensors share one register."""
        key = (kind, tuple(sorted(params.items())), inputs)
        if key not in self.known:
            level = max((self.levels[i] for i in inputs if i >= 0), default=0)
            self.known[key] = place = self.register(out, level)
            self.steps.append(Op(*key, place))
        return self.known[key]

    def take(self, inputs: tuple[int, ...], index: np.ndarray) -> int:
        return self.op("take", inputs, index.shape, index=StaticArray(index.astype(np.int32)))

    def relu(self, register: int, tap: Tap) -> int:
        """The relu of a register, shared by all that need it: max and min of one pair need one."""
        if register in self.relus:
            return self.relus[register]
        shape = self.shapes[register]
        level = self.levels[register]
        out = self.relus[register] = self.register(shape, level + 1)
        size = int(np.prod(shape))
        self.steps.append(len(self.taps))
        self.taps.append(
            Tap(
                kind="elementwise",
                name="relu",
                path=f"{tap.path} (rewritten {tap.name})",
                inputs=(register,),
                outputs=(out,),
                shapes=(shape,),
                size_in=size,
                size_out=size,
                expr=_RELU,
                consts=(_ZERO,),
                level=level,
            )
        )
        self.slopes.append((np.zeros(()), np.ones(())))
        return out

    def run(self) -> LureForm:
        old = self.form.program
        for step in old.steps:
            if isinstance(step, int):
                tap = old.taps[step]
                if tap.groups is None:
                    self.copy_tap(tap, self.form.slopes[step])
                elif tap.kind == "sort":
                    self.sort(tap)
                else:
                    self.tournament(tap)
            else:
                inputs = tuple(self.places[i] if i >= 0 else i for i in step.inputs)
                self.places[step.output] = self.op(
                    step.kind, inputs, old.shapes[step.output], **dict(step.params)
                )
        program = Program(
            tuple(self.steps), tuple(self.taps), tuple(self.shapes), self.places[old.output], old.half
        )
        return LureForm(program, self.form.consts, tuple(self.slopes))

    def copy_tap(self, tap: Tap, slopes: Any) -> None:
        inputs = tuple(self.places[i] for i in tap.inputs)
        level = max(self.levels[i] for i in inputs)
        outputs = tuple(self.register(shape, level + 1) for shape in tap.shapes)
        self.places.update(zip(tap.outputs, outputs, strict=True))
        self.steps.append(len(self.taps))
        fields = {name: getattr(tap, name) for name in tap.__dataclass_fields__}
        self.taps.append(Tap(**fields | {"inputs": inputs, "outputs": outputs, "level": level}))
        self.slopes.append(slopes)

    def tournament(self, tap: Tap) -> None:
        """Columns of the (groups, width) table, halved until one is left."""
        assert tap.groups is not None
        table = tap.groups.array
        count, width = table.shape
        current = self.take(tuple(self.places[i] for i in tap.inputs), table)
        while width > 1:
            half = width // 2
            index = np.arange(count * width).reshape(count, width)
            a = self.take((current,), index[:, :half])
            b = self.take((current,), index[:, half : 2 * half])
            won = self.relu(self.op("sub", (a, b), (count, half)), tap)
            if tap.kind == "max":
                best = self.op("add", (b, won), (count, half))
            else:
                best = self.op("sub", (a, won), (count, half))
            if width % 2:
                rest = self.take((current,), index[:, -1:])
                current = self.op("concatenate", (best, rest), (count, half + 1), dimension=1)
            else:
                current = best
            width = half + width % 2
        self.places[tap.outputs[0]] = self.op("reshape", (current,), tap.shapes[0], shape=tap.shapes[0])

    def sort(self, tap: Tap) -> None:
        """Odd-even transposition: `width` rounds of neighbours exchanged, one relu per pair (one round for width 2)."""
        assert tap.groups is not None
        table = tap.groups.array
        count, width = table.shape
        current = self.take(tuple(self.places[i] for i in tap.inputs), table)
        for turn in range(width if width > 2 else width - 1):
            low = np.arange(turn % 2, width - 1, 2)
            if not low.size:
                continue
            index = np.arange(count * width).reshape(count, width)
            a, b = (self.take((current,), index[:, low + shift]) for shift in (0, 1))
            won = self.relu(self.op("sub", (a, b), (count, low.size)), tap)
            small = self.op("sub", (a, won), (count, low.size))
            large = self.op("add", (b, won), (count, low.size))
            # Columns that were exchanged come from (small, large), the others stay.
            where = np.arange(2 * count * low.size, 2 * count * low.size + count * width).reshape(
                count, width
            )
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
