"""Directed rounding for host float64 arithmetic.

Every helper returns a float64 that is at least the real-number result of the operation it is named after, for
finite operands >= 0. The model is IEEE 754 double with rounding to nearest, `U` the unit roundoff: fl(x op y)
= (x op y)(1 + d), |d| <= U, plus at most half the least denormal where a product underflows (Higham, Accuracy
and Stability of Numerical Algorithms, sections 2.2 and 3.1). Results that leave the double range raise
ValueError: an infinity is never a bound.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

U = 2.0**-53
"""Unit roundoff of float64."""

UNDERFLOW = 2.0**-1022
"""Least normal double: bounds the underflow error of one product, abrupt underflow included."""

_DENORMAL = np.float64(2.0**-1060)


def require_gradual_underflow() -> None:
    """Raise RuntimeError where this thread flushes denormals to zero (the analysis below would not hold)."""
    if not float(_DENORMAL * np.float64(0.5)) > 0.0:
        raise RuntimeError(
            "this process flushes denormal numbers to zero (a library built with -ffast-math does that), "
            "so rounding cannot be bounded; unload it, or start a process without it"
        )


def finite(x: float, what: str = "the bound") -> float:
    """`x` as a float; ValueError where it is not a finite number >= 0."""
    value = float(x)
    if math.isnan(value) or value < 0.0:
        raise ValueError(f"{what} is {value}, not a number >= 0")
    if math.isinf(value):
        raise ValueError(f"{what} is above the range of float64; rescale the problem")
    return value


def up(x: float) -> float:
    """The next double above `x`; zero stays zero (used only where an exact zero means zero)."""
    return 0.0 if x == 0.0 else finite(math.nextafter(x, math.inf))


def add_up(*terms: float) -> float:
    """An upper bound of the sum of terms >= 0."""
    total = 0.0
    for term in terms:
        if term != 0.0:
            total = float(term) if total == 0.0 else up(total + float(term))
    return finite(total)


def mul_up(*factors: float) -> float:
    """An upper bound of the product of factors >= 0; zero only if a factor is zero."""
    product = 1.0
    for factor in factors:
        if factor == 0.0:
            return 0.0
        product = finite(math.nextafter(product * float(factor), math.inf))
    return product


def products_up(a: Any, b: Any) -> np.ndarray:
    """Upper bounds of the products of entries >= 0, arrays or floats; zero only where an entry is zero."""
    with np.errstate(under="ignore", over="ignore"):
        product = np.nextafter(np.multiply(a, b), np.inf)
    return np.where(np.logical_and(np.greater(a, 0), np.greater(b, 0)), product, 0.0)


def sqrt_up(x: float) -> float:
    """An upper bound of the square root of x >= 0."""
    return up(math.sqrt(x))


def roots_up(x: np.ndarray) -> np.ndarray:
    """Upper bounds of the square roots of entries >= 0."""
    return np.asarray(np.nextafter(np.sqrt(np.nextafter(x, np.inf)), np.inf))


def squared_distances(both: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Upper bounds of s_ii + s_jj - 2 s_ij, from float64 sums `both` = fl(s_ii + s_jj) and `product` = s_ij.

    The difference errs by at most u (s_ii + s_jj) + u |result|: where it cancels, this allowance is what remains of it.
    """
    return np.asarray(np.maximum(both - 2.0 * product, 0.0) * (1.0 + 4.0 * U) + 4.0 * U * both)


def gamma(n: int) -> float:
    """An upper bound of n U / (1 - n U), the relative error of n roundings in any order (Higham, 3.1)."""
    if n >= 2**50:
        raise ValueError(f"{n} roundings in one sum are too many for an error bound in float64")
    return 0.0 if n == 0 else up(n * U / (1.0 - n * U))


def unscale_up(x: Any, exponent: Any) -> Any:
    """An upper bound of x * 2**exponent for arrays (or floats) x >= 0; ValueError on overflow."""
    with np.errstate(over="ignore", under="ignore"):
        result = np.ldexp(x, exponent)
        if not np.all(np.isfinite(result)):
            raise ValueError("the bound is above the range of float64; rescale the problem")
        lost = np.ldexp(result, -np.asarray(exponent)) < x
    return np.where(lost, np.nextafter(result, np.inf), result)
