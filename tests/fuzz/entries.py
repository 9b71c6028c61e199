"""What the entries of the grammar draw with, and the table they are entered in."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

HOSTILE = "</code><img src=x onerror=alert(1)>"
Shape = tuple[int, ...]


@dataclass
class Context:
    """What an entry draws with: the values it may use are `shapes` and `dtypes`; {0} is the one it is for."""

    rng: random.Random
    shapes: list[Shape]
    dtypes: list[str]
    extreme: float = 1.0

    def pick(self, choices: Sequence[Any]) -> Any:
        return choices[self.integer(0, len(choices) - 1)]

    def integer(self, low: int, high: int) -> int:
        return self.rng.randint(low, high) if high > low else low

    def chance(self, percent: int) -> bool:
        return self.integer(0, 99) < percent

    @property
    def shape(self) -> Shape:
        return self.shapes[0]

    @property
    def rank(self) -> int:
        return len(self.shape)

    def axis(self) -> int:
        return self.integer(0, self.rank - 1)

    def scale(self) -> float:
        if self.extreme != 1.0:
            return self.extreme
        return self.pick([1.0, 1.0, 1.0, 0.5, 0.5, 2.0, 0.125, 1e-3, 30.0, 1e3])

    def const(
        self, shape: Sequence[int], scale: float | None = None, kind: str = "normal", dtype: str = ""
    ) -> str:
        dtype = dtype or self.dtypes[0]
        scale = self.scale() if scale is None else scale
        if dtype == "float16":
            scale = min(max(scale, 1e-2), 30.0)
        more = "" if kind == "normal" else f", {kind!r}"
        return f"const({self.integer(0, 9999)}, {tuple(shape)}, {scale!r}, {dtype!r}{more})"

    def weights(self, shape: Sequence[int], fan_in: int) -> str:
        return self.const(shape, float(f"{self.scale() / math.sqrt(max(fan_in, 1)):.3g}"))

    def axes(self) -> tuple[int, ...]:
        chosen = tuple(a for a in range(self.rank) if self.chance(50))
        return chosen or (self.axis(),)

    def order(self) -> tuple[int, ...]:
        return tuple(self.rng.sample(range(self.rank), self.rank))

    def indices(self, count: int, size: int) -> list[int]:
        return [self.integer(0, size - 1) for _ in range(count)]


Draw = Callable[[Context], "str | None"]


@dataclass(frozen=True)
class Entry:
    name: str
    draw: Draw
    operands: int = 1
    supported: bool = True
    rounded: bool = False
    weight: int = 1
    kind: str = "linear"


OPS: dict[str, Entry] = {}


def op(kind: str = "linear", **more: Any) -> Callable[[Draw], Draw]:
    def enter(draw: Draw) -> Draw:
        name = draw.__name__
        assert name not in OPS, name
        OPS[name] = Entry(name, draw, kind=kind, **more)
        return draw

    return enter


def ready(name: str, text: str, **more: Any) -> None:
    """An entry without parameters."""
    assert name not in OPS, name
    OPS[name] = Entry(name, lambda g: text, **more)
