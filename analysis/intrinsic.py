"""Intrinsic robustness: how robust any classifier of given risk can be on the images of a generator.

Images of class i are g_i(z) for standard normal latents z, classes have probabilities p_i, and with probability at
least 1 - delta over z the generator is L_i-Lipschitz on the ball of radius r around z. By Gaussian isoperimetry, for
eps <= r L_i (J. Chen's thesis, Theorems 4.4.3 and 4.4.4, after Mahloujifar, Zhang, Mahmoody, Evans, arXiv 2003.00378),

    AdvRisk(f, eps)  >=  sum over i of p_i Phi(Phi^-1(Risk_i) + eps / L_i) - delta,

with equality for a linear g and a half-space. Hence for all classifiers of overall risk at least alpha, whatever the
risks of single classes, and for those of risk at least alpha in every class,

    accuracy under attack  <=  1 + delta - min over i of p_i Phi(Phi^-1(alpha / p_i) + eps / L),
    accuracy under attack  <=  1 + delta - sum over i of p_i Phi(Phi^-1(alpha) + eps / L).

The first needs alpha <= min p_i, since one class carries all of the risk where the minimum is attained.

A constant L estimated from slopes between points is too small, and what follows from it is no bound. Here
`generator_constants` takes L from proved local constants (`lb.local`) at drawn latents, and delta from other drawn
latents: the Clopper-Pearson bound of the share at which the proved constant exceeds L. What follows holds with the
stated confidence.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

import lipbounds as lb
from lipbounds._text import Progress, check_seed, say, show, whole
from lipbounds.analysis.attack_settings import reports
from lipbounds.analysis.smoothing import clopper_pearson_lower


@dataclasses.dataclass(frozen=True)
class GeneratorConstant:
    """With confidence 1 - `failure_probability`: P[ g is `value`-Lipschitz (l2) on B(z, radius) ] >= 1 - `delta`.

    value, radius         L and r
    delta                 upper confidence bound of the share of latents where L does not hold
    exceeded, samples     latents that decide, and at how many of them the proved constant was larger than L
    guarantee             of the local constants; the statement itself is probabilistic
    """

    value: float
    radius: float
    delta: float
    exceeded: int
    samples: int
    failure_probability: float
    guarantee: str

    def __repr__(self) -> str:
        return (
            f"GeneratorConstant: L <= {show(self.value, 'up')} on balls of radius {show(self.radius)} around all but "
            f"{show(self.delta, 'up', 3)} of the latents, with confidence {1 - self.failure_probability:.6g}"
        )


@reports
def generator_constants(
    form: lb.LureForm,
    radius: float = 0.5,
    *,
    chosen: int = 100,
    samples: int = 1000,
    failure_probability: float = 0.001,
    seed: int = 0,
    progress: Progress = None,
) -> GeneratorConstant:
    """A Lipschitz constant of a generator on balls around most latents, with confidence.

    Args:
        form: of the generator, from `lb.trace`: a vector z to an image; of one class where it is conditional.
        radius: r, of the balls in the latent space.
        chosen: latents, from the standard normal distribution, that choose L: the largest of their proved constants.
        samples: other latents that decide how often L is exceeded. With none exceeded, delta is about
            ln(1 / failure_probability) / samples.
        failure_probability: that the statement about delta is false.
        seed: of the latents.
        progress: True, False or a function of one text.

    Raises:
        ValueError: a form that is not of a vector, numbers out of range, or what `lb.local` raises.
    """
    if not isinstance(form, lb.LureForm):
        raise TypeError(f"generator_constants needs a LureForm from lb.trace, got {type(form).__name__}")
    whole("chosen", chosen), whole("samples", samples), check_seed(seed)
    if len(form.in_shape) != 1:
        raise ValueError(f"a generator takes a vector of latents, got inputs of shape {form.in_shape}")
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be a number > 0, got {radius!r}")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be in (0, 1), got {failure_probability!r}")
    z = np.random.default_rng(seed).standard_normal((chosen + samples, form.in_shape[0]))
    found = lb.local(form, z, np.full(len(z), float(radius)), progress=False)
    value = float(found.value[:chosen].max())
    exceeded = int((found.value[chosen:] > value).sum())
    say(f"generator: L {show(value, 'up')} at {chosen} latents, exceeded at {exceeded} of {samples} others")
    risk = found.failure_probability
    if risk >= failure_probability:
        raise ValueError(
            f"the local constants fail with probability <= {risk:g}, which is not below {failure_probability:g}: "
            "pass a larger failure_probability"
        )
    held = clopper_pearson_lower(np.asarray(samples - exceeded), samples, failure_probability - risk)
    return GeneratorConstant(
        value, float(radius), 1 - float(held), exceeded, samples, float(failure_probability), found.guarantee
    )


def risk_bound(
    risks: Sequence[float],
    eps: float,
    constants: Sequence[float] | float,
    *,
    shares: Sequence[float] | None = None,
    delta: float = 0.0,
    radius: float = math.inf,
) -> float:
    """Lower bound of the adversarial risk in l2 of a classifier with these risks, one for every class.

    Args:
        risks: Risk_i; a lower confidence bound keeps the inequality.
        eps: radius of the attack, in the units of the images.
        constants: L_i, or one for all classes.
        shares: p_i; None for equal ones.
        delta: probability that L does not hold.
        radius: r, on which L holds.

    Raises:
        ValueError: numbers out of range, shares that do not sum to 1, or eps > radius * L.
    """
    weights = _shares(shares, len(risks))
    scale = _scale(eps, constants, len(risks), delta, radius)
    alpha = np.asarray(risks, float)
    if not ((alpha >= 0) & (alpha <= 1)).all():
        raise ValueError(f"risks must lie in [0, 1], got {alpha.tolist()}")
    return max(float((weights * _grown(alpha, scale)).sum()) - delta, 0.0)


def intrinsic_robustness(
    alpha: float,
    eps: float,
    constant: Sequence[float] | float | GeneratorConstant,
    *,
    classes: int | Sequence[float] = 10,
    each: bool = False,
    delta: float | None = None,
    radius: float | None = None,
) -> float:
    """Upper bound of the accuracy under attack in l2 of every classifier with risk at least alpha.

    Args:
        alpha: the least risk, in (0, 1).
        eps: radius of the attack, in the units of the images.
        constant: L, L_i by class, or a `GeneratorConstant`, from which delta and radius are taken.
        classes: how many equally likely ones, or their probabilities.
        each: whether the risk is at least alpha in every class, and not only overall.
        delta, radius: as of `risk_bound`; 0 and no limit if not given.

    The bound is one only if the constant is: slopes between points, as in the papers' tables, do not give one.

    Raises:
        ValueError: as `risk_bound`; alpha above the probability of a class, without `each`.
    """
    if isinstance(constant, GeneratorConstant):
        if delta is not None or radius is not None:
            raise ValueError("delta and radius come with a GeneratorConstant: leave them out")
        delta, radius, constant = constant.delta, constant.radius, constant.value
    delta, radius = delta or 0.0, math.inf if radius is None else radius
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be in (0, 1), got {alpha!r}")
    shares = _shares(None if isinstance(classes, int | np.integer) else classes, classes)
    scale = _scale(eps, constant, len(shares), delta, radius)
    if each:
        least = float((shares * _grown(np.full(len(shares), alpha), scale)).sum())
    else:
        if alpha > shares.min():
            raise ValueError(
                f"alpha {alpha:g} exceeds the probability {shares.min():g} of a class, for which this bound does not "
                "hold: use each=True if every class has this risk"
            )
        least = float((shares * _grown(alpha / shares, scale)).min())
    return min(1 + delta - least, 1.0)


def _grown(risk: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Phi(Phi^-1(risk) + shift): 0 stays 0 and 1 stays 1."""
    return np.asarray(stats.norm.cdf(stats.norm.ppf(risk) + shift))


def _shares(given: Any, count: Any) -> np.ndarray:
    if given is None:
        return np.full(whole("classes", count), 1 / count)
    shares = np.asarray(given, float)
    if isinstance(count, int) and shares.shape != (count,):
        raise ValueError(f"shares must hold {count} numbers, got shape {shares.shape}")
    if shares.ndim != 1 or not (shares > 0).all() or abs(shares.sum() - 1) > 1e-9:
        raise ValueError(f"the probabilities of the classes must be > 0 and sum to 1, got {shares.tolist()}")
    return shares


def _scale(eps: float, constants: Any, count: int, delta: float, radius: float) -> np.ndarray:
    """(count,) eps / L_i."""
    values = np.asarray(constants, float)
    if values.shape not in ((), (count,)) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"constants must be one number > 0 or {count} of them, got {constants!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta!r}")
    if eps > radius * values.min():
        raise ValueError(
            f"eps {eps:g} exceeds radius * L = {radius * values.min():g}, up to which the bound holds: take a larger "
            "radius"
        )
    return np.broadcast_to(eps / values, count)
