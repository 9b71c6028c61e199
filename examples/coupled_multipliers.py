"""Why LipSDP-Network is not offered: a coupled "bound" below a slope that the network attains.

    python examples/coupled_multipliers.py

LipSDP for a network z = w relu(W x + b) with one hidden layer looks for the smallest rho and a matrix T with

    A(T, rho) = [[rho I, -W'T], [-T W, 2 T - w'w]] >= 0 ,        the "bound" is sqrt(rho) .

With increments dx, dy = W dx and dv of x, of the pre-activations and of the relus, A >= 0 says

    |w dv|^2 <= rho |dx|^2 - 2 dv'T (dy - dv) .

A positive diagonal T proves |dz| <= sqrt(rho) |dx|, since relu has slopes in [0, 1]: dv_i (dy_i - dv_i) >= 0
for every neuron. Fazlyab et al. (NeurIPS 2019, arXiv 1906.04893, Theorem 1) also allow coupled terms

    T = sum_i l_i e_i e_i' + sum_{i<j} l_ij (e_i - e_j)(e_i - e_j)' ,   l_i, l_ij >= 0 ,

which need (dv_i - dv_j)((dy_i - dy_j) - (dv_i - dv_j)) >= 0. That fails when one neuron is on and the other
off: dy_i = 1, dv_i = 1, dy_j = 2, dv_j = 0 gives 1 (-1 - 1) = -2. Hence the "bound" proves nothing, as Pauli,
Koch, Berberich, Kohler and Allgoewer found (arXiv 2005.02929).

Here each coupled SDP is solved with CVXPY, its multipliers are rounded to fractions, and everything that the
conclusion rests on is then computed exactly: A(T, rho) >= 0 by LDL', and the slope between two points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

import lipbounds as lb

Matrix = list[list[Fraction]]


@dataclass(frozen=True)
class Example:
    """z = w relu(W x), all integers, without biases; first and second are two points, also integers."""

    name: str
    W: tuple[tuple[int, ...], ...]
    w: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]


EXAMPLES = (
    # Where both relus are on, z depends on x_2 alone; the coupled multiplier takes this for the whole truth.
    Example("by hand", ((4, 0), (4, 1)), (1, -1), (0, 17), (-4, 16)),
    # The worst found in a search over random integers.
    Example("found by search", ((2, 2, -3), (1, 2, -3), (-1, 0, -3)), (2, -3, 1), (-15, 22, 5), (-16, 20, 8)),
)


@dataclass(frozen=True)
class Verdict:
    """A(T, coupled_squared) >= 0 is proved, slope_squared attained, exactly; `bound` is LipSDP's, valid."""

    coupled_squared: Fraction
    slope_squared: Fraction
    bound: float


def relu_net(example: Example, x: Sequence[int]) -> int:
    """z at an integer point, in integer arithmetic."""
    y = [sum(a * b for a, b in zip(row, x, strict=True)) for row in example.W]
    return sum(c * max(t, 0) for c, t in zip(example.w, y, strict=True))


def slope_squared(example: Example) -> Fraction:
    """(|dz| / |dx|)^2 between the two points of the example, exactly."""
    dz = relu_net(example, example.second) - relu_net(example, example.first)
    return Fraction(dz**2, sum((b - a) ** 2 for a, b in zip(example.first, example.second, strict=True)))


def lmi(example: Example, T: Matrix, rho: Fraction) -> Matrix:
    """A(T, rho), exactly."""
    W, w = example.W, example.w
    n, m = len(W), len(W[0])
    TW = [[sum((T[i][k] * W[k][j] for k in range(n)), Fraction()) for j in range(m)] for i in range(n)]
    top = [[rho * (i == j) for j in range(m)] + [-TW[k][i] for k in range(n)] for i in range(m)]
    return top + [[-t for t in TW[i]] + [2 * T[i][k] - w[i] * w[k] for k in range(n)] for i in range(n)]


def is_positive_semidefinite(matrix: Matrix) -> bool:
    """Exactly, by elimination of one row and column after another; a zero pivot needs a zero row."""
    a = [list(row) for row in matrix]
    for k in range(len(a)):
        if a[k][k] < 0 or (a[k][k] == 0 and any(a[k][k:])):
            return False
        for i in range(k + 1, len(a)):
            if a[k][k] and a[i][k]:
                factor = a[i][k] / a[k][k]
                a[i] = [p - factor * q for p, q in zip(a[i], a[k], strict=True)]
    return True


def multipliers(own: Sequence[Fraction], coupled: Sequence[Fraction]) -> Matrix:
    """T = sum_i own_i e_i e_i' + sum_{i<j} coupled_ij (e_i - e_j)(e_i - e_j)'."""
    n = len(own)
    T = [[own[i] * (i == j) for j in range(n)] for i in range(n)]
    for (i, j), value in zip(itertools.combinations(range(n), 2), coupled, strict=True):
        T[i][i] += value
        T[j][j] += value
        T[i][j] -= value
        T[j][i] -= value
    return T


def solve(example: Example) -> tuple[Matrix, Fraction]:
    """Coupled multipliers T with non-negative weights, and rho: the optimum of the SDP, as fractions."""
    import cvxpy as cp

    W, w = np.array(example.W, float), np.array([example.w], float)
    n, m = W.shape
    own, coupled, rho = cp.Variable(n), cp.Variable(n * (n - 1) // 2), cp.Variable()
    T = cp.diag(own)
    for k, (i, j) in enumerate(itertools.combinations(range(n), 2)):
        d = np.eye(n)[[i]] - np.eye(n)[[j]]
        T = T + coupled[k] * (d.T @ d)
    A = cp.bmat([[rho * np.eye(m), -W.T @ T], [-T @ W, 2 * T - w.T @ w]])
    margin = 1e-6  # room for the rounding to fractions
    problem = cp.Problem(cp.Minimize(rho), [A >> margin * np.eye(n + m), own >= margin, coupled >= margin])
    problem.solve(solver="CLARABEL")
    if problem.status != "optimal":
        raise RuntimeError(f"Clarabel: {problem.status}")

    def fractions(variable: cp.Variable) -> list[Fraction]:
        return [Fraction(round(float(v) * 2**30), 2**30) for v in np.ravel(np.asarray(variable.value))]

    return multipliers(fractions(own), fractions(coupled)), fractions(rho)[0]


def judge(example: Example, T: Matrix, rho: Fraction) -> Verdict:
    """The coupled "bound" against the attained slope. ValueError unless A(T, rho) >= 0."""
    if not is_positive_semidefinite(lmi(example, T, rho)):
        raise ValueError(f"{example.name}: these multipliers do not satisfy the linear matrix inequality")
    net = lb.from_weights([np.array(example.W, np.float64), np.array([example.w], np.float64)])
    return Verdict(rho, slope_squared(example), lb.lipsdp(net).value)


def main() -> None:
    for example in EXAMPLES:
        verdict = judge(example, *solve(example))
        coupled, slope = math.sqrt(verdict.coupled_squared), math.sqrt(verdict.slope_squared)
        print(f"{example.name}: z = {list(example.w)} relu({[list(row) for row in example.W]} x)")
        print(f"  coupled multipliers (LipSDP-Network) claim  L <= {coupled:.6f}   LMI proved in fractions")
        print(
            f"  but |dz| / |dx| is                               {slope:.6f}   "
            f"between {example.first} and {example.second}"
        )
        print(f"  one multiplier per neuron (lb.lipsdp)       L <= {verdict.bound:.6f}")
        if verdict.coupled_squared >= verdict.slope_squared:
            raise SystemExit("  no contradiction: this is not a counterexample")


if __name__ == "__main__":
    main()
