"""Settings that all attacks share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import numpy as np

from lipbounds._text import Progress, check_seed, reporting, whole
from lipbounds.results import NORM_NAMES, check_norm

P = ParamSpec("P")
R = TypeVar("R")


def reports(verb: Callable[P, R]) -> Callable[P, R]:
    """Direct the function's progress lines as its keyword `progress` says: True, False or a function of one text."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with reporting(kwargs.get("progress", True)):  # type: ignore[arg-type]
            return verb(*args, **kwargs)

    return run


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """Settings that all attacks share.

    Args:
        norm: of the ball, 2 or inf; Frank-Wolfe takes any number from 1.
        low, high: the box of the inputs, [low, high] in every coordinate.
        batch_size: examples at once; all chunks run the same compiled programs.
        seed: of all random numbers, which otherwise depend on the example's index only.
        progress: True, False or a function of one text: a line after every chunk.

    Raises:
        ValueError: no norm, a box that is empty or not finite, a batch size below 1, a seed below 0 or from 2^63 on.
    """

    norm: Any = 2
    low: float = 0.0
    high: float = 1.0
    batch_size: int = 256
    seed: int = 0
    progress: Progress = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm", _norm(self.norm))
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"the box needs finite numbers low < high, got {self.low!r} and {self.high!r}")
        whole("batch_size", self.batch_size)
        check_seed(self.seed)

    def need_a_usual_norm(self, name: str) -> None:
        """ValueError unless the norm is 2 or inf."""
        if self.norm not in (2, math.inf):
            raise ValueError(
                f"{name} is in norm 2 or inf, not {self.norm:g}; frank_wolfe and black_frank_wolfe take any norm from "
                "1 to inf"
            )

    def changed(self, changes: Mapping[str, Any]) -> AttackSettings:
        """These settings with some of them changed.

        TypeError with the names that exist for any other name, and, called as `AttackSettings.changed(settings, ...)`,
        for settings of another type.
        """
        if not isinstance(self, AttackSettings):
            raise TypeError(
                f"settings must be AttackSettings, got {type(self).__name__}: give options by name, such as steps=100 "
                "or norm=2"
            )
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
        return (self.high - self.low) * math.prod(shape) ** (0.0 if math.isinf(self.norm) else 1 / self.norm)


def _norm(norm: Any) -> int | float:
    """1, 2, inf or another number from 1."""
    number = not isinstance(norm, bool) and isinstance(norm, int | float | np.number)
    if number and 1 <= norm < math.inf and norm not in (1, 2):
        return float(norm)
    try:
        return check_norm(norm)
    except ValueError:
        raise ValueError(
            f"norm must be 2 or inf (of Frank-Wolfe attacks also another number from 1), got {norm!r}"
        ) from None


def norm_name(norm: float) -> str:
    """The norm as people read it: l2, l-inf, l1.5."""
    return NORM_NAMES.get(norm, f"l{norm:g}")


DEFAULT, LINF = AttackSettings(), AttackSettings(norm=math.inf)
