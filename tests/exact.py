"""Norms in rational arithmetic, for tests."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np


def fractions(a: np.ndarray) -> list[list[Fraction]]:
    return [[Fraction(float(x)) for x in row] for row in np.asarray(a, dtype=np.float64)]


def product(a: list[list[Fraction]], b: list[list[Fraction]]) -> list[list[Fraction]]:
    return [
        [sum((x * y for x, y in zip(row, col, strict=True)), Fraction(0)) for col in zip(*b, strict=True)]
        for row in a
    ]


def exceeds(s: Fraction, a: list[list[Fraction]]) -> bool:
    """s > ||A||_2, over the integers: all leading minors of s^2 I - A A' are positive (Bareiss)."""
    if len(a) > len(a[0]):
        a = [list(col) for col in zip(*a, strict=True)]
    shared = math.lcm(s.denominator, *(x.denominator for row in a for x in row))
    rows = [[int(x * shared) for x in row] for row in a]
    top = int(s * shared)
    n = len(rows)
    m = [[-sum(x * y for x, y in zip(rows[i], rows[j], strict=True)) for j in range(n)] for i in range(n)]
    for i in range(n):
        m[i][i] += top * top
    previous = 1
    for k in range(n):
        if m[k][k] <= 0:
            return False
        for i in range(k + 1, n):
            for j in range(k + 1, n):
                m[i][j] = (m[i][j] * m[k][k] - m[i][k] * m[k][j]) // previous
        previous = m[k][k]
    return True


def power_norm(row: list[Fraction], q: float) -> Fraction:
    """The q-norm for q = 1, inf; its square for q = 2."""
    if not row:
        return Fraction(0)
    return (
        sum((abs(x) for x in row), Fraction(0))
        if q == 1
        else max(map(abs, row))
        if q == math.inf
        else sum((x * x for x in row), Fraction(0))
    )


def encloses(bound: float, row: list[Fraction], q: float, slack: float = 1e-12) -> bool:
    """exact <= bound <= (1 + slack) exact, with a few denormal steps to spare."""
    value = Fraction(float(bound))
    low = max(Fraction(0), value * (1 - Fraction(slack)) - Fraction(2.0**-1070))
    exact = power_norm(row, q)
    return (low**2 <= exact <= value**2) if q == 2 else (low <= exact <= value)
