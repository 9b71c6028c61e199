"""Norms of one vector against each other, for constants in one norm that are wanted in another.

|v|_p <= n^max(0, 1/p - 1/q) |v|_q      for v in R^n     (Hoelder; attained by equal entries, or by a single one)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lipbounds._norms.matrices import row_norms
from lipbounds._norms.rounding import sqrt_up


def stretch(size: int, of: float, by: float) -> float:
    """An upper bound of sup |v|_of / |v|_by over v in R^size; of, by: 1, 2 or inf."""
    power = max(0.0, 1.0 / of - 1.0 / by)
    return 1.0 if power == 0.0 or size == 0 else float(size) if power == 1.0 else sqrt_up(float(size))


def enlarged(x: Any, factor: float) -> np.ndarray:
    """x >= 0 times a factor >= 1, rounded up; zero stays zero, and what leaves the range of float64 is inf."""
    x = np.asarray(x, np.float64)
    if factor == 1.0:
        return x
    with np.errstate(over="ignore"):
        return np.where(x > 0.0, np.nextafter(x * factor, np.inf), 0.0)


def value_from(value: float, classes: np.ndarray | None, outputs: int, of: float, to: float) -> float:
    """An upper bound of sup |f(x) - f(x')|_to / |x - x'|_of from that of |f(x) - f(x')|_of.

    classes: (K,) constants of the single outputs, where known: the differences of f are at most as long as these
    constants, times |x - x'|_of.
    """
    if of == to:
        return value
    whole = float(enlarged(value, stretch(outputs, to, of)))
    return whole if classes is None else min(whole, float(row_norms(classes[None], to)[0]))
