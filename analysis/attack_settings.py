"""Settings that all attacks share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np

from lipbounds._text import Progress, reporting, whole
from lipbounds.results import check_norm

P = ParamSpec("P")
R = TypeVar("R")


def reports(verb: Callable[P, R]) -> Callable[P, R]:
    """Direct the function's progress lines as its keyword `progress` says: True, False or a function of one text."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with reporting(kwargs.get("progress")):  # type: ignore[arg-type]
            return verb(*args, **kwargs)

    return run


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """Settings that all attacks share.

    Args:
        norm: of the ball, 2 or inf.
        low, high: the box of the inputs, [low, high] in every coordinate.
        batch_size: examples at once; all chunks run the same compiled programs.
        seed: of all random numbers, which otherwise depend on the example's index only.
        progress: True, False or a function of one text: a line after every chunk.

    Raises:
        ValueError: another norm, a box that is empty or not finite, a batch size below 1.
    """

    norm: Any = 2
    low: float = 0.0
    high: float = 1.0
    batch_size: int = 256
    seed: int = 0
    progress: Progress = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", check_norm(self.norm))
        if self.norm == 1:
            raise ValueError("attacks are in norm 2 or inf, not 1")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the box needs finite numbers low < high, got {self.low!r} and {self.high!r}")
        whole("batch_size", self.batch_size)

    def changed(self, changes: Mapping[str, Any]) -> AttackSettings:
        """These settings with some of them changed; TypeError with the names that exist for any other name."""
        names = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            raise TypeError(
                f"unknown option {unknown[0]!r}; the settings that all attacks share are {', '.join(names)}, and the "
                "options of one attack are in its own help"
            )
        return dataclasses.replace(self, **changes)

    @property
    def box(self) -> tuple[np.float32, np.float32]:
        """The box in float32, rounded inwards."""
        bottom, top = np.float32(self.low), np.float32(self.high)
        if float(bottom) < self.low:  # NumPy would compare the two in float32
            bottom = np.nextafter(bottom, np.float32(np.inf))
        if float(top) > self.high:
            top = np.nextafter(top, np.float32(-np.inf))
        return bottom, top

    def check_inside(self, points: np.ndarray) -> None:
        """ValueError unless the points lie in the box."""
        bottom, top = self.box
        if points.min() < bottom or points.max() > top:
            raise ValueError(
                f"x must lie in the box [{bottom:g}, {top:g}], got values from {points.min():g} to {points.max():g}: "
                "set low and high"
            )

    def diameter(self, shape: tuple[int, ...]) -> float:
        """Diameter in `norm` of the box of examples of this shape; larger radii give the same ball."""
        return (self.high - self.low) * (math.sqrt(math.prod(shape)) if self.norm == 2 else 1.0)


DEFAULT, LINF = AttackSettings(), AttackSettings(norm=math.inf)
