"""Perturbation stability: on how many examples the answer does not change within eps, right or wrong, from both sides.

An example is stable if every x' within eps is classified as x is. An attack on the class that is predicted bounds the
share of stable examples from above, and a certified radius of that class bounds it from below. An example is robust
exactly where it is correct and stable, so with clean accuracy c and stability s

    c + s - 1  <=  robust accuracy  <=  min(c, s).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import lipbounds as lb
from lipbounds._local import logits
from lipbounds._text import Progress, as_labels, percent, show
from lipbounds.analysis.attack_search import Attack, as_points
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings, norm_name, reports
from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.experiment import triangle_bound
from lipbounds.analysis.robust_accuracy import really_broken
from lipbounds.results import NORM_NAMES


@dataclasses.dataclass(frozen=True, eq=False)
class Stability:
    """Which of N examples keep their class within eps, as far as it is known.

    certified  (N,) proved stable: the certified radius of the class predicted exceeds eps
    broken     (N,) proved unstable: a point within eps of another class was found
    predicted  (N,) the classes predicted
    correct    (N,) whether they are the labels, or None
    """

    certified: np.ndarray
    broken: np.ndarray
    predicted: np.ndarray
    eps: float
    norm: float
    correct: np.ndarray | None = None

    @property
    def lower(self) -> float:
        """Share of the examples that are certified: at most the stability."""
        return float(self.certified.mean())

    @property
    def upper(self) -> float:
        """Share of the examples that were not broken: at least the stability."""
        return float((~self.broken).mean())

    @property
    def robust(self) -> tuple[float, float]:
        """(lower, upper) bounds of the robust accuracy, from the examples that are correct and stable.

        ValueError without labels.
        """
        if self.correct is None:
            raise ValueError("robust accuracy needs labels: call perturbation_stability(..., y=labels)")
        return float((self.correct & self.certified).mean()), float((self.correct & ~self.broken).mean())

    def __repr__(self) -> str:
        ends = f"{percent(self.lower, 'down')} % <= stable <= {percent(self.upper, 'up')} %"
        return f"Stability: {len(self.certified)} examples, {NORM_NAMES[self.norm]}, eps {show(self.eps)}: {ends}"


@reports
def perturbation_stability(
    form: lb.LureForm,
    x: Any,
    eps: float,
    settings: AttackSettings = DEFAULT,
    *,
    y: Any = None,
    bound: lb.UpperBound | None = None,
    local: bool | lb.Local = False,
    attack: Callable[..., Attack] = pgd,
    fn: Any = None,
    progress: Progress = None,
    **changes: Any,
) -> Stability:
    """Bound the share of examples whose class does not change within eps, from both sides.

    Args:
        form: the network, from `lb.trace`.
        x: (N, *shape) floating point in the box.
        eps: a number >= 0 in the units of x.
        settings, **changes: norm, box and so on, and options of the attack.
        y: (N,) labels, for the robust accuracy.
        bound, local: as of `lb.certified_radius`; the bound in the norm of the settings, LipLT with pairs if None.
        attack: `pgd`, `square`, `rays` or another with the same arguments; it leaves the class that is predicted.
        fn: the function that was traced, for the attack; None attacks the form.
        progress: True, False or a function of one text.

    Raises:
        TypeError: form of another type.
        ValueError: shapes or labels, a bound in another norm, an example without a unique largest logit, and what the
            attack and `certified_radius` raise.
        GuaranteeError: an example was broken below its certified radius, also in real arithmetic.
    """
    if not isinstance(form, lb.LureForm):
        raise TypeError(f"perturbation_stability needs a LureForm from lb.trace, got {type(form).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a number >= 0, got {eps!r}")
    points = as_points(x)
    predicted = logits(form, points.astype(np.float64))[0].argmax(axis=1)
    names = {field.name for field in dataclasses.fields(AttackSettings)}
    settings = AttackSettings.changed(
        settings, {name: changes.pop(name) for name in list(changes) if name in names}
    )
    labels = None if y is None else as_labels(y, len(points), form.num_outputs)
    if bound is None:
        bound = triangle_bound(form, settings.norm, progress=progress)
    if isinstance(bound, lb.UpperBound) and bound.norm != settings.norm:
        raise ValueError(
            f"the bound is in {NORM_NAMES[bound.norm]} and the settings in {norm_name(settings.norm)}: give both the "
            "same norm"
        )
    radius = lb.certified_radius(form, points, predicted, bound, local, progress=progress).radius
    made = attack(form if fn is None else fn, points, predicted, eps, settings, **changes)
    other = ~made.correct & (radius <= 0)
    if other.any():
        raise ValueError(
            f"the largest logit of example {int(np.argmax(other))} is not unique to rounding, so no class is predicted"
        )
    method = bound.method
    broken, _ = really_broken(form, made, points, predicted, radius, settings.norm, lambda _: method)
    correct = None if labels is None else labels == predicted
    return Stability(radius > eps, broken, predicted, float(eps), settings.norm, correct)
