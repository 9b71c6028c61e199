"""Robust accuracy from both sides: certified radii below it, and an attack above it.

    certified accuracy at eps  <=  robust accuracy at eps  <=  accuracy under attack at eps  <=  clean accuracy

The first is proved and the third is attained. An attack that breaks an example inside its certified radius contradicts
the certificate, unless float32 rounding alone decided: `really_broken` tells the two apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import lipbounds as lb
from lipbounds._local import logits
from lipbounds._text import Progress, as_labels, percent, show, usual_settings
from lipbounds.analysis.attack_search import Attack, as_points, length
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings, reports
from lipbounds.analysis.attacks import pgd
from lipbounds.errors import GuaranteeError
from lipbounds.results import NORM_NAMES, check_norm


@dataclasses.dataclass(frozen=True, eq=False)
class RobustAccuracy:
    """What is known of the robust accuracy on N examples.

    eps       the radii that were asked for, ascending, in the units of x
    correct   (N,) whether the example itself is classified as labelled
    radius    (N,) certified: no point nearer than this is misclassified
    distance  (N,) float64, of the nearest misclassified point that was found, rounded up; 0 where the example itself is
              misclassified, inf where none was found
    attack    what the attack is called; "no attack" where it had nothing to do at any eps
    attacked  how many examples were attacked at each eps: those that were still open there
    rounding  how many decisions of the float32 program differ from the network in real arithmetic, which is what is
              certified; they count as the latter says
    notes     remarks of the attack
    """

    eps: tuple[float, ...]
    correct: np.ndarray
    radius: np.ndarray
    distance: np.ndarray
    norm: float
    attack: str
    attacked: tuple[int, ...]
    rounding: int = 0
    notes: tuple[str, ...] = ()

    @property
    def clean(self) -> float:
        """Share of the examples that are classified as labelled."""
        return float(self.correct.mean())

    def lower(self, eps: float) -> float:
        """Share of the examples that are certified at eps: at most the robust accuracy."""
        return float((self.radius > eps).mean())

    def upper(self, eps: float) -> float:
        """Share of the examples that are correct and not broken within eps: at least the robust accuracy."""
        return float((self.correct & (self.distance > eps)).mean())

    def rows(self) -> list[dict[str, float]]:
        """Plain data for every eps: `certified` is the lower bound and `attacked` the upper one."""
        return [{"eps": e, "certified": self.lower(e), "attacked": self.upper(e)} for e in self.eps]

    def __repr__(self) -> str:
        lines = [
            f"RobustAccuracy: {len(self.radius)} examples, {NORM_NAMES[self.norm]}, {self.attack}, "
            f"{self.clean:.2%} correct"
        ]
        for e in self.eps:
            ends = percent(self.lower(e), "down"), percent(self.upper(e), "up")
            lines.append(f"  eps {show(e)}: {ends[0]} % <= robust <= {ends[1]} %")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@usual_settings()
@reports
def robust_accuracy(
    form: lb.LureForm,
    radii: lb.Radii,
    x: Any,
    y: Any,
    eps: Sequence[float] | float,
    settings: AttackSettings = DEFAULT,
    *,
    attack: Callable[..., Attack] = pgd,
    fn: Any = None,
    progress: Progress = True,
    **changes: Any,
) -> RobustAccuracy:
    """Bound the robust accuracy at every eps from both sides.

    An attack runs at each eps, in ascending order, on the examples whose fate is still open there: classified as
    labelled, not certified, and not broken at a smaller eps. What it says of an example does not depend on the others.

    Args:
        form: the network, from `lb.trace`.
        radii: of the same examples, from `lb.certified_radius`; attacks are in their norm.
        x: (N, *shape) floating point in the box.
        y: (N,) integer labels.
        eps: a radius or several, in the units of x.
        settings, **changes: box, batch size, seed and so on, and options of the attack.
        attack: `pgd`, `autoattack`, `rays` or another with the same arguments.
        fn: the function that was traced, for the attack; None attacks the form.
        progress: True, False or a function of one text.

    Raises:
        TypeError: form or radii of another type.
        ValueError: radii of another number of examples, of other labels or in another norm than the settings, eps that
            are not finite numbers >= 0, and what the attack raises.
        GuaranteeError: an example was broken below its certified radius, also in real arithmetic.
    """
    if not isinstance(form, lb.LureForm) or not isinstance(radii, lb.Radii):
        raise TypeError(
            "robust_accuracy needs a form from lb.trace and radii from lb.certified_radius, got "
            f"{type(form).__name__} and {type(radii).__name__}"
        )
    levels = sorted({float(e) for e in np.atleast_1d(np.asarray(eps, float))})
    if not levels or not all(math.isfinite(e) and e >= 0 for e in levels):
        raise ValueError(f"eps must hold finite numbers >= 0, at least one, got {levels}")
    points = as_points(x)
    labels, exact = as_labels(y, len(points)), np.asarray(x, np.float64)
    if len(radii) != len(points):
        raise ValueError(f"there are {len(radii)} radii and {len(points)} examples")
    known = labels if radii.label is None else radii.label
    other = (known != labels) & ~np.isnan(known)  # NaN where a file does not say
    if other.any():
        place = int(np.argmax(other))
        raise ValueError(
            f"the radii are about other labels: that of example {place} is {int(known[place])} there and "
            f"{labels[place]} in y; certify these examples again, lb.certified_radius(form, x, y)"
        )
    names = {field.name for field in dataclasses.fields(AttackSettings)}
    own = {name: changes.pop(name) for name in list(changes) if name in names}
    settings = AttackSettings.changed(settings, {**own, "norm": own.get("norm", radii.norm)})
    if settings.norm != radii.norm:
        raise ValueError(f"the radii are in {NORM_NAMES[radii.norm]}: attacks are in the same norm")
    target = form if fn is None else fn
    clean = pgd(target, points, labels, 0.0, settings.changed({"norm": 2}), steps=0).correct
    correct = clean | (radii.radius > 0)
    distance = np.where(correct, np.inf, 0.0)
    rounding, counts, notes = int((correct & ~clean).sum()), [], []
    name = "no attack"
    for e in levels:
        open_ = clean & (radii.radius <= e) & (distance > e)
        counts.append(int(open_.sum()) if e > 0 else 0)
        if not counts[-1]:
            continue
        # What is not classified as labelled is not attacked: another label takes an example out, and the batches and
        # random numbers of the others are those of an attack on all.
        given = np.where(clean & ~open_, (labels + 1) % form.num_outputs, labels)
        made = attack(target, points, given, e, settings, **changes)
        broken, rounded = really_broken(
            form, made, exact, labels, radii.radius, radii.norm, lambda _: radii.method
        )
        rounding += rounded
        distance = np.minimum(distance, np.where(broken, length(made.adversarial, exact, radii.norm), np.inf))
        notes += [note for note in getattr(made, "notes", ()) if note not in notes]
        name = made.name
    return RobustAccuracy(
        tuple(levels), correct, radii.radius, distance, radii.norm, name, tuple(counts), rounding,
        tuple(notes),
    )  # fmt: skip


def really_broken(
    form: Any,
    attack: Attack,
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    norm: float,
    by: Callable[[int], str],
) -> tuple[np.ndarray, int]:
    """(N,) which examples the attack broke, and how many only float32 rounding broke.

    An adversarial example closer than the certified radius, in the norm of the radius, contradicts the certificate,
    unless float32 rounding alone decided: its logits in real arithmetic, known with a proved error, tell.
    GuaranteeError if they agree with the attack; `by` names the bound behind the radius of an example.
    """
    inside = attack.success & (length(attack.adversarial, x, norm) < radius)
    at = np.flatnonzero(inside)
    if not len(at):
        return attack.success, 0
    lost = certainly_lost(form, attack.adversarial[at], y[at])
    if lost.any():
        place = int(at[np.argmax(lost)])
        distance = float(length(attack.adversarial[place : place + 1], x[place : place + 1], norm)[0])
        raise GuaranteeError(
            f"{int(lost.sum())} images were broken inside their certified radius, image {place} at "
            f"{NORM_NAMES[check_norm(norm)]} distance {distance:.6g} with radius {radius[place]:.6g} by {by(place)}: "
            "this bound is wrong"
        )
    return attack.success & ~inside, len(at)


def certainly_lost(form: Any, points: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) where another class than y has the larger logit in real arithmetic, beyond the proved error of logits."""
    z, error = logits(form, points.astype(np.float64))
    rows = np.arange(len(points))
    own = z[rows, y]
    z[rows, y] = -np.inf
    return z.max(axis=1) - own > 2 * error  # the proved error of a difference is sqrt(2) times `error`
