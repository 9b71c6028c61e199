"""Generalisation of robustness: the gap that was measured, and the capacity terms of a PAC-Bayes bound.

The terms have no constant and rest on a condition that is not checked, so they compare networks and bound nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lipbounds._text import show, usual_settings, whole
from lipbounds.analysis.attack_search import Attack
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings
from lipbounds.analysis.attacks import pgd


@dataclasses.dataclass(frozen=True)
class RobustGap:
    """Accuracy under attack on training and on test data, and their difference: an estimate.

    Both are upper bounds of robust accuracies, so the difference bounds nothing; `error` is its standard error over the
    draw of the examples.
    """

    train: float
    test: float
    error: float

    @property
    def gap(self) -> float:
        """Train less test."""
        return self.train - self.test

    def __repr__(self) -> str:
        return (
            f"RobustGap: {self.train:.2%} on training data, {self.test:.2%} on test data under attack, gap "
            f"{100 * self.gap:.2f} +- {100 * self.error:.2f} points (an estimate)"
        )


@usual_settings()
def robust_gap(
    fn: Any,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    eps: float,
    settings: AttackSettings = DEFAULT,
    *,
    attack: Callable[..., Attack] = pgd,
    **changes: Any,
) -> RobustGap:
    """Robust generalisation gap: accuracy under attack on training data less that on test data.

    `train` and `test` are pairs (x, y); other arguments, options and errors are those of the attack.
    """
    one, two = (attack(fn, *pair, eps, settings, **changes) for pair in (train, test))
    shares = one.accuracy, two.accuracy
    spread = [a * (1 - a) / len(made) for a, made in zip(shares, (one, two), strict=True)]
    return RobustGap(*shares, math.sqrt(sum(spread)))


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Capacity terms: comparisons between networks of one architecture on one data set, no bounds.

    product     prod ||W_i||_2
    frobenius   sum ||W_i||_F^2 / ||W_i||_2^2
    clean       product^2 frobenius, that of the bound without an attack (alpha = 0)
    robust      the same of the bound with an attack
    complexity, confidence   the two parts under the root of the bound, without its constant
    """

    product: float
    frobenius: float
    clean: float
    robust: float
    complexity: float
    confidence: float

    def __repr__(self) -> str:
        return (
            f"Capacity: clean {show(self.clean)}, robust {show(self.robust)}, parts under the root "
            f"{show(self.complexity)} and {show(self.confidence)} (comparisons, no bounds)"
        )


def pac_bayes(
    weights: Sequence[Any],
    *,
    alpha: float,
    kappa: float,
    steps: int,
    size: float,
    eps: float,
    margin: float,
    count: int,
    spread: float = 2.0,
    failure_probability: float = 0.05,
) -> Capacity:
    """Capacity terms of a network W_d relu(... relu(W_1 x)) under a gradient attack.

    With Lip = (prod ||W_i||) sum over i of prod over j <= i of ||W_j|| and q = 2 alpha Lip / kappa,

        Phi = { prod ||W_i|| [1 + (alpha / kappa) (1 - q^r) / (1 - q) Lip] }^2  sum over i of ||W_i||_F^2 / ||W_i||^2

    (Farnia, Zhang, Tse, "Generalizable adversarial training via spectral normalization", ICLR 2019; the version printed
    in a later paper has its exponents swapped). The generalisation error is O(sqrt(complexity + confidence)) with

        complexity = (size + eps)^2 d^2 h log(d h) Phi / (margin^2 n),
        confidence = d log(r d n log(M) / failure_probability) / (margin^2 n).

    Args:
        weights: matrices W_1 to W_d, (out, in) or (in, out).
        alpha: step size of the attack; 0 for none.
        kappa: lower bound of ||grad loss(x)|| on the data, which the theorem assumes and nothing here checks.
        steps: r, of the attack.
        size: B, a bound of ||x||_2;  eps: radius of the attack, in the same units.
        margin: gamma;  count: n, training examples.
        spread: M > 1 with 1/M <= ||W_i|| / (prod ||W_j||)^(1/d) <= M.
        failure_probability: of the bound.

    Raises:
        ValueError: no matrices, or numbers out of range.
    """
    matrices = [np.asarray(w, np.float64) for w in weights]
    if not matrices or any(w.ndim != 2 or not np.isfinite(w).all() or not w.any() for w in matrices):
        raise ValueError("weights must hold finite matrices that are not 0, at least one")
    positive = {"kappa": kappa, "margin": margin, "size": size}
    for name, number in positive.items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be a number > 0, got {number!r}")
    if not (math.isfinite(alpha) and alpha >= 0 and math.isfinite(eps) and eps >= 0 and spread > 1):
        raise ValueError("alpha and eps must be numbers >= 0, and spread a number > 1")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be in (0, 1), got {failure_probability!r}")
    r, n, depth = whole("steps", steps), whole("count", count), len(matrices)
    norms = np.array([np.linalg.norm(w, 2) for w in matrices])
    shares = float(sum(np.square(w / s).sum() for w, s in zip(matrices, norms, strict=True)))
    with np.errstate(over="ignore"):  # inf is told below
        product = norms.prod()
        lip = product * np.cumprod(norms).sum()
        q = 2 * alpha * lip / kappa
        grown = (q ** np.arange(r)).sum()  # (1 - q^r) / (1 - q), also at q = 1
        clean = float(product**2 * shares)
        robust = float((product * (1 + alpha / kappa * grown * lip)) ** 2 * shares)
    if not math.isfinite(robust):
        raise ValueError(
            "the terms are beyond float64: scale the weights, or take a smaller alpha or fewer steps"
        )
    width = max(max(w.shape) for w in matrices)
    below = margin**2 * n
    complexity = (size + eps) ** 2 * depth**2 * width * math.log(depth * width) * robust / below
    inside = r * depth * n * math.log(spread) / failure_probability
    return Capacity(float(product), shares, clean, robust, complexity, depth * math.log(inside) / below)
