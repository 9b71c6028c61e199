"""AutoAttack: four attacks without parameters, each on what the ones before it left.

Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", ICML
2020, arXiv 2003.01690. The standard version, with the authors' settings:

    APGD-CE   100 steps, one start
    APGD-T    the loss dlr-t, 100 steps for each of the 9 largest other logits
    FAB-T     100 steps for each of them
    Square    5000 queries, first windows of 0.8 of the image
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from lipbounds._text import reporting, show, usual_settings
from lipbounds.analysis.apgd import runs as apgd_runs
from lipbounds.analysis.apgd import slopes
from lipbounds.analysis.attack_network import logits_of, outline, split
from lipbounds.analysis.attack_search import Attack, Find, as_points
from lipbounds.analysis.attack_sequence import in_turn
from lipbounds.analysis.attack_settings import DEFAULT, AttackSettings
from lipbounds.analysis.fab import runs as fab_runs
from lipbounds.analysis.square import run as square_run
from lipbounds.results import NORM_NAMES

STEPS, TARGETS, QUERIES, FIRST_WINDOWS = 100, 9, 5000, 0.8
STAGES = ("APGD-CE", "APGD-T", "FAB-T", "Square")
_CPU_BATCH = 64  # what is left of the examples fills batches of this size better
_MUCH = 0.01  # share of the examples that Square may break of what gradients left


@dataclasses.dataclass(frozen=True)
class Stage:
    """One attack of the sequence: examples it was run on and broke, accuracy after it, seconds."""

    name: str
    attacked: int
    broken: int
    accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class AutoAttack(Attack):
    """An `Attack` with the accuracy after each of its stages, which never rises, and remarks on the network."""

    stages: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()
    version: str = "standard"

    @property
    def columns(self) -> dict[str, float]:
        """Accuracy of the network, and after each attack together with those before it."""
        return {"clean": float(self.correct.mean()), **{stage.name: stage.accuracy for stage in self.stages}}

    def __repr__(self) -> str:
        after = ", ".join(f"{name} {share:.2%}" for name, share in self.columns.items())
        lines = [f"AutoAttack: {len(self)} examples in {NORM_NAMES[self.norm]}: {after}", *self.notes]
        return "\n".join(lines)


@usual_settings()
def autoattack(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = DEFAULT,
    *,
    version: str = "standard",
    **changes: Any,
) -> AutoAttack:
    """Search every ball ||x' - x|| <= eps by AutoAttack for an x' in the box that is not classified as labelled.

    Args:
        fn, x, y, eps, settings, **changes: as those of `attacks.pgd`. On CPUs at most 64 examples are taken at once.
            Square needs images (N, H, W, C) or (N, H, W), or vectors (N, d).
        version: "standard", the only one.

    The result is an `Attack` with `columns`, the cumulative accuracies, and `notes`, which say where Square breaks much
    that gradients do not, or gradients vanish: signs that they mislead, so that the accuracy says little.

    Raises:
        TypeError: fn is not callable.
        ValueError: as `pgd`; fewer than 4 classes; a network whose outputs are random or are probabilities.
    """
    if version != "standard":
        raise ValueError(f"version must be 'standard', got {version!r}")
    settings = AttackSettings.changed(settings, changes)
    if jax.default_backend() == "cpu":
        settings = settings.changed({"batch_size": min(settings.batch_size, _CPU_BATCH)})
    stages: list[Stage] = []
    found: Attack | None = None
    with reporting(settings.progress):
        notes = list(checked(fn, x, settings))
        for name, finds in _stages(fn, x, y, settings):
            begin = time.perf_counter()
            before = found
            found = in_turn(name, finds, fn, x, y, eps, settings, "ce", before=before)
            attacked = found.correct if before is None else before.correct & ~before.success
            broken = int((attacked & found.success).sum())
            spent = time.perf_counter() - begin
            stages.append(Stage(name, int(attacked.sum()), broken, found.accuracy, spent))
    assert found is not None
    if stages[-1].broken > max(1, _MUCH * len(found)):
        notes.append(
            f"Square, which uses no gradients, broke {stages[-1].broken} of the {stages[-1].attacked} examples "
            "that the attacks by gradients left: gradients seem to be masked (see gradient_masking), and the robust "
            "accuracy may be lower still"
        )
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(Attack)}
    values |= {"name": "AutoAttack", "loss": "autoattack"}
    return AutoAttack(**values, stages=tuple(stages), notes=tuple(notes), version=version)


def _stages(fn: Any, x: Any, y: Any, settings: AttackSettings) -> Iterator[tuple[str, list[Find]]]:
    finds = (
        apgd_runs(fn, x, y, settings, STEPS, 1, "ce"),
        apgd_runs(fn, x, y, settings, STEPS, 1, "dlr-t", TARGETS),
        fab_runs(fn, x, settings, STEPS, TARGETS),
        [square_run(settings, QUERIES, FIRST_WINDOWS)],
    )
    yield from zip(STAGES, finds, strict=True)


def checked(fn: Any, x: Any, settings: AttackSettings) -> Iterator[str]:
    """Remarks on the network. ValueError where AutoAttack would misjudge it."""
    model, weights = split(fn)
    points = as_points(x)
    settings.check_inside(points)
    first = points[: settings.batch_size]
    model, classes, _ = outline(model, weights, first.shape, None)
    if classes < 4:
        raise ValueError(
            f"AutoAttack needs at least 4 classes, for the loss of APGD-T, and the network has {classes}: run "
            "apgd(loss='ce'), fab and square one by one"
        )
    with jax.default_matmul_precision("highest"):
        z, again = (np.asarray(logits_of(model, weights, jnp.asarray(first))) for _ in range(2))
    if not np.array_equal(z, again, equal_nan=True):
        raise ValueError(
            f"the network is randomised: its logits at the same input differ by up to {show(np.abs(z - again).max())}. "
            "AutoAttack would count luck as robustness: fix the random numbers, or certify it by smooth"
        )
    if (z >= 0).all() and np.abs(z.sum(axis=1) - 1).max() < 1e-3:
        raise ValueError(
            "the network's outputs are probabilities, not logits, and their gradients vanish where it is sure: leave "
            "out the softmax at its end"
        )
    if np.abs(logsumexp(z.astype(np.float64), axis=1)).max() < 1e-3:
        yield "the outputs are log-probabilities: logits, before log_softmax, lose fewer digits"
    steepness = np.asarray(
        slopes(model, weights, jnp.asarray(first), jnp.asarray(z.argmax(axis=1), jnp.int32))
    )
    flat = float((steepness == 0).mean())
    if flat > 0.1:
        yield (
            f"the gradient of the cross-entropy is exactly 0 at {flat:.0%} of the first {len(first)} examples: attacks "
            "by gradients are blind there"
        )
