"""Evaluation of a trained network: clean accuracy, accuracy under attack and certified accuracy.

    certified accuracy at eps  <=  robust accuracy at eps  <=  accuracy under attack at eps  <=  clean accuracy

The first is proved and the third is attained. `evaluate` measures both on the same images and
raises GuaranteeError if they contradict each other.

All distances are in pixel values in [0, 1]. Certified accuracies are in the l2 norm. An l-inf attack runs in the ball
of radius eps / sqrt(n) (n pixel values), the largest that the l2 ball of radius eps contains.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx

import lipbounds as lb
from lipbounds._form import fingerprint
from lipbounds._lipsdp import check_certificate, read_certificate
from lipbounds._text import Progress
from lipbounds.analysis.attack_search import Attack, first_images, length
from lipbounds.analysis.attack_settings import AttackSettings
from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.autoattack import autoattack, checked
from lipbounds.analysis.experiment import Json, eps_grid, norm_key, radii_record
from lipbounds.analysis.robust_accuracy import really_broken
from lipbounds.results import Guarantee, Part, check_norm

UNIT = "pixel values in [0, 1]"
FROM_CERTIFICATE = "from the run's certificate, proved again: its time is that of the proof"
ATTACKS = ("pgd", "autoattack")
NOT_UPPER = ("empirical", "liplt-estimate")

#: Radii at which the field reports certified accuracy, in pixel values; of the digits, our own choice.
USUAL_EPS: Mapping[str, float] = {
    "mnist": 1.58,
    "cifar10": 36 / 255,
    "cifar100": 36 / 255,
    "tiny-imagenet": 36 / 255,
    "digits": 0.5,
}
_CIFAR_UNITS = (
    "The published code of arXiv 2310.00116 rescales these images to [-1, 1], (x - 0.5) / 0.5, and compares radii in "
    "those units with an eps that is not rescaled. A distance there is twice the distance in pixel values, so its eps "
    "is divided by 2 here: its 36/255 is 18/255 in pixel values."
)
_PIXEL_UNITS = "The published figures for {} are in pixel values already: with --paper-units nothing changes."


def paper_units(dataset: str) -> tuple[float, str]:
    """(factor, what it is): an eps of the published code is `factor` times the same distance in pixel values."""
    if dataset in ("cifar10", "cifar100"):
        return 2.0, _CIFAR_UNITS
    if dataset not in USUAL_EPS.keys() - {"digits"}:
        return 1.0, f"There are no published figures for {dataset}: with --paper-units nothing changes."
    return 1.0, _PIXEL_UNITS.format(dataset)


@dataclasses.dataclass(frozen=True, eq=False)
class Certified:
    """Bounds of one network and the radii that they prove for N images, by method; `refused` holds the failures."""

    form: Any
    bounds: Mapping[str, lb.UpperBound]
    radii: Mapping[str, lb.Radii]
    refused: Mapping[str, str]

    def radius(self, count: int) -> np.ndarray:
        """(N,) the largest radius that any of the methods proves; 0 where none does."""
        return np.max([np.zeros(count), *(radii.radius for radii in self.radii.values())], axis=0)

    def by(self, place: int) -> str:
        """Names of the methods that prove the largest radius of an image."""
        best = max(radii.radius[place] for radii in self.radii.values())
        return ", ".join(name for name, radii in self.radii.items() if radii.radius[place] == best)

    def record(self, eps: Sequence[float]) -> Json:
        """As plain data; the columns of Table 2 of arXiv 2310.00116 are upper bounds with the method's guarantee."""
        grid = eps_grid(list(self.radii.values()))
        return {
            "certified": {
                name: {str(e): float(radii.accuracy(e)) for e in eps} for name, radii in self.radii.items()
            },
            "guarantee": {name: bound.guarantee for name, bound in self.bounds.items()},
            "failure_probability": {name: bound.failure_probability for name, bound in self.bounds.items()},
            "constants": {
                name: {
                    "value": bound.value,
                    "average_pair": bound.average_pair(),
                    "average_sum": bound.average_sum(),
                    "average_sqrt2": bound.sqrt2(),
                }
                for name, bound in self.bounds.items()
            },
            "radii": {name: radii_record(radii, grid) for name, radii in self.radii.items()},
            "seconds": {name: bound.seconds for name, bound in self.bounds.items()},
            "notes": {name: list(bound.notes) for name, bound in self.bounds.items()},
            "refused": dict(self.refused),
        }


def certify(
    model: Any,
    x: np.ndarray,
    y: np.ndarray,
    *,
    methods: Sequence[str | lb.UpperBound] = ("naive", "liplt", "lipsdp"),
    guarantee: Guarantee = "auto",
    seed: int = 0,
    progress: Progress = True,
) -> Certified:
    """Bound a network by several methods, pairs of classes each, and certify images x (N, *shape) in l2.

    `model` is an nnx module of one image or a batch, or any function of a batch. `methods` are names out of
    `lb.METHODS`, or upper bounds of this network. A method that refuses is not an error.

    Raises ValueError for an unknown method, one that gives no upper bound or is named twice, and for bad images.
    """
    names = [m if isinstance(m, str) else getattr(m, "method", repr(m)) for m in methods]
    usable = [name for name in lb.METHODS if name not in NOT_UPPER]
    pairs = zip(names, methods, strict=True)
    wrong = [name for name, m in pairs if not isinstance(m, lb.UpperBound) and m not in usable]
    if wrong or not names:
        raise ValueError(
            f"methods must be upper bounds out of {', '.join(usable)}; got {', '.join(wrong) or 'none'}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"each method may be named only once, got {', '.join(names)}")
    single = isinstance(model, nnx.Module)
    form = lb.trace(model, x[0]) if single else lb.trace(model, x[:2], batched=True)
    options: Json = {"pairwise": True, "guarantee": guarantee, "seed": seed, "progress": progress}
    rows = lb.compare(form, x, y, methods=list(methods), **options)
    return Certified(
        form,
        {row.method: row.result for row in rows if row.result is not None},
        {row.method: row.radii for row in rows if row.radii is not None},
        {row.method: row.reason for row in rows if row.radii is None},
    )


def certified_bound(path: os.PathLike[str], model: Any, x: np.ndarray) -> lb.UpperBound:
    """The bound in a certificate, proved again for this network; CertificateError with the reason where it is not."""
    begin = time.perf_counter()
    form = lb.trace(model, x[0])
    claims = read_certificate(path)
    check_certificate(claims, form)
    shape = (form.num_outputs, form.in_size)
    return lb.UpperBound(
        value=claims.value,
        norm=claims.norm,
        guarantee=claims.guarantee,
        method="lipsdp",
        seconds=time.perf_counter() - begin,
        pairwise=claims.pairwise,
        per_class=claims.per_class,
        parts=(Part("input", "output", shape, claims.value, claims.guarantee, "certificate proved again"),),
        failure_probability=claims.failure_probability,
        notes=(FROM_CERTIFICATE,),
        network=fingerprint(form),
    )


def certificates(
    model: Any,
    x: np.ndarray,
    y: np.ndarray,
    *,
    eps: Sequence[float],
    methods: Sequence[str | lb.UpperBound] = ("naive", "liplt", "lipsdp"),
    images: int | None = None,
    seed: int = 0,
    progress: Progress = True,
) -> Json:
    """The part of the record of `evaluate` that needs no attack on a ball: clean and certified accuracy."""
    x, y = _first(x, y, images)
    levels = _levels(eps, 1.0)
    correct = pgd(model, x, y, 0.0, steps=0).correct
    found = certify(model, x, y, methods=methods, seed=seed, progress=progress)
    correct = correct | (found.radius(len(x)) > 0)
    return {"clean": float(correct.mean()), "images": len(x), "eps": levels, **found.record(levels)}


def evaluate(
    model: Any,
    x: np.ndarray,
    y: np.ndarray,
    *,
    eps: Sequence[float],
    methods: Sequence[str | lb.UpperBound] = ("naive", "liplt", "lipsdp"),
    pgd_steps: int = 100,
    pgd_restarts: int = 1,
    pgd_norms: Sequence[Any] = (2, math.inf),
    paper_units: float | None = None,
    attack: str = "pgd",
    images: int | None = None,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    progress: Progress = True,
) -> Json:
    """Clean accuracy, accuracy under attack and certified accuracy of a network, as plain data.

    Args:
        model: an nnx module of one image or a batch, or any function from a batch to logits.
        x: (N, *shape) floating point in [0, 1].
        y: (N,) integer labels.
        eps: l2 radii in pixel values; with `paper_units` they are divided by it first (see the function of that name).
        methods: the bounds, by name or as they are (see `certify`).
        pgd_steps, pgd_restarts, pgd_norms: of the attacks, one for every norm and eps. A further one in l2 searches
            inside every certified radius, where nothing can be found.
        attack: "pgd", or "autoattack" to run AutoAttack, too, for the same norms and eps.
        images: so many of the images, the first ones; None for all.
        guarantee: of the bounds that are computed here.
        seed: of everything random.
        progress: True, False or a function of one text.

    Returns a dict with the keys (every `by eps` has str(eps) in pixel values as keys)
        clean, images, eps, unit, seed     accuracy in [0, 1], number of images, radii in pixel values
        pgd            norm "2" or "inf" -> accuracy under attack, by eps: the share that is classified correctly and
                       for which no attack found an example this close, so that it never grows with eps
        pgd_settings   steps, restarts, loss; `eps_inf`: the l-inf radius that belongs to eps, by eps
        attacked       `by`: names of the attacks;  norm -> accuracy under all of them together, by eps: upper bounds of
                       the robust accuracy;  `curve`: the same in l2 on a grid of eps
        robust         by eps in l2: `certified`, the largest certified accuracy, by the method `by`, and `attacked`;
                       the robust accuracy lies between them
        inside         how many images were attacked inside their radius, and the number broken, which is 0
        rounding       decisions of the float32 program that differ from the network in real arithmetic, which is
                       what is certified; they lie within float32 rounding of a tie and count as the latter says
        certified      method -> accuracy by eps;  guarantee, failure_probability, seconds: by method
        constants      method -> value (L), average_pair (mean L_ij), average_sum (mean L_i + L_j), average_sqrt2
        radii          method -> quartiles and certified accuracy on a grid
        refused        method -> reason, of those that have no bound or no radii here
        paper_units    None, or factor and `given`: the eps that was asked for, by eps

    Raises:
        ValueError: bad images, labels, eps, methods or settings of the attack.
        GuaranteeError: an attack broke an image inside its certified radius, also in real arithmetic.
    """
    x, y = _first(x, y, images)
    levels = _levels(eps, 1.0 if paper_units is None else paper_units)
    attacks = {p: AttackSettings(p, seed=seed, progress=progress) for p in map(check_norm, pgd_norms)}
    for settings in attacks.values():
        settings.need_a_usual_norm("PGD")
    if attack not in ATTACKS:
        raise ValueError(f"attack must be one of {', '.join(ATTACKS)}, got {attack!r}")
    if attack == "autoattack":
        tuple(checked(model, x, AttackSettings()))
    clean = pgd(model, x, y, 0.0, steps=0)  # bad images are refused before the bounds take their time
    found = certify(model, x, y, methods=methods, guarantee=guarantee, seed=seed, progress=progress)
    radius = found.radius(len(x))
    correct = clean.correct | (radius > 0)
    # rounded down, so that the l2 ball contains the l-inf ball
    shrink = {2.0: 1.0, math.inf: (1 - 2.0**-48) / math.sqrt(x[0].size)}
    inside: list[tuple[AttackSettings, Any]] = [(AttackSettings(seed=seed, progress=progress), radius)]
    balls = [(settings, e * shrink[p]) for p, settings in attacks.items() for e in levels]
    ascent: Json = {"steps": pgd_steps, "restarts": pgd_restarts}
    by_pgd = functools.partial(pgd, model, x, y, **ascent)
    nearest, rounded = _nearest(by_pgd, found, x, y, inside + balls, list(attacks))
    by_all, names = nearest, ["PGD"]
    if attack == "autoattack":
        balls = [(settings, ball) for settings, ball in balls if ball > 0]
        also, more = _nearest(functools.partial(autoattack, model, x, y), found, x, y, balls, list(attacks))
        by_all, rounded = {p: np.minimum(nearest[p], also[p]) for p in attacks}, rounded + more
        names.append("AutoAttack")
    rounding = int((correct & ~clean.correct).sum()) + rounded

    def left(distance: np.ndarray, e: float) -> float:
        return float(np.mean(correct & (distance > e)))

    def by_eps(distances: Mapping[float, np.ndarray]) -> Json:
        return {norm_key(p): {str(e): left(distances[p], e * shrink[p]) for e in levels} for p in attacks}

    certified = found.record(levels)
    together: Json = {"by": names, **by_eps(by_all)}
    if 2.0 in by_all:
        grid = sorted({*eps_grid(list(found.radii.values())), *levels})
        together["curve"] = {"eps": grid, "accuracy": [left(by_all[2.0], e) for e in grid]}
    factor = 1.0 if paper_units is None else float(paper_units)
    given = {str(e / factor): e for e in sorted({float(e) for e in eps})}
    return {
        "clean": float(correct.mean()),
        "images": len(x),
        "eps": levels,
        "unit": UNIT,
        "seed": seed,
        "pgd": by_eps(nearest),
        "attacked": together,
        "robust": _brackets(certified["certified"], together.get("2"), levels),
        "pgd_settings": ascent
        | {"loss": clean.loss, "eps_inf": {str(e): e * shrink[math.inf] for e in levels}},
        "inside": {"images": int((radius > 0).sum()), "broken": 0},
        "rounding": rounding,
        **certified,
        "paper_units": None if paper_units is None else {"factor": factor, "given": given},
    }


def _brackets(certified: Json, attacked: Json | None, levels: Sequence[float]) -> Json:
    """By eps: the largest certified accuracy, the method it is by, and the accuracy under attack."""
    made: Json = {}
    if attacked is None:
        return made
    for e in map(str, levels):
        by = max(certified, key=lambda name: certified[name][e], default=None)
        made[e] = {"certified": 0.0 if by is None else certified[by][e], "by": by, "attacked": attacked[e]}
    return made


def _nearest(
    run: Callable[..., Attack],
    found: Certified,
    x: np.ndarray,
    y: np.ndarray,
    balls: Sequence[tuple[AttackSettings, Any]],
    norms: Sequence[float],
) -> tuple[dict[float, np.ndarray], int]:
    """{norm: (N,) distance of the nearest adversarial example that was found}, and how many only rounding broke.

    The attack, run(eps, settings), runs in every ball (settings, eps); the distance is inf where it found none.
    """
    radius, rounding = found.radius(len(x)), 0
    nearest = {p: np.full(len(x), np.inf) for p in norms}
    for settings, ball in balls:
        attack = run(ball, settings)
        broken, rounded = really_broken(found.form, attack, x, y, radius, 2, found.by)
        rounding += rounded
        for p in norms:
            nearest[p] = np.minimum(nearest[p], np.where(broken, length(attack.adversarial, x, p), np.inf))
    return nearest, rounding


def _first(x: Any, y: Any, images: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first images in float32 and their labels; `attacks` checks the rest."""
    points, labels = first_images(x, y, images)
    return (points.astype(np.float32) if points.dtype.kind == "f" else points), labels


def _levels(eps: Sequence[float], factor: float) -> list[float]:
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"paper_units must be a factor > 0, got {factor}")
    levels = [float(e) for e in eps]
    if not levels or not all(math.isfinite(e) and e >= 0 for e in levels):
        raise ValueError(f"eps must hold finite numbers >= 0, at least one, got {levels}")
    return [e / factor for e in sorted(set(levels))]
