"""Attacks one after the other on the same examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lipbounds.analysis.attack_search import Attack, Find, per_example, search
from lipbounds.analysis.attack_settings import AttackSettings


def in_turn(
    name: str,
    finds: Sequence[Find],
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings,
    loss: str,
    *,
    before: Attack | None = None,
    **options: Any,
) -> Attack:
    """Run several attacks one after the other, each on what is not broken yet; see `search` for the arguments.

    `before` is what an earlier attack found on the same examples: only what it left is attacked, its finds are kept.
    """
    for number, find in enumerate(finds, 1):
        title = name if len(finds) == 1 else f"{name}, run {number} of {len(finds)}"
        only = None if before is None else ~before.success
        if before is not None and not (before.correct & only).any():
            break
        found = search(title, find, fn, x, y, eps, settings, loss, only=only, **options)
        before = found if before is None else joined(before, found)
    assert before is not None
    return dataclasses.replace(before, name=name, loss=loss)


def nearest(
    name: str,
    finds: Sequence[Find],
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings,
    loss: str,
    **options: Any,
) -> Attack:
    """Run several attacks on all examples and keep the nearest success of each; see `search` for the arguments."""
    best: Attack | None = None
    for number, find in enumerate(finds, 1):
        title = name if len(finds) == 1 else f"{name}, run {number} of {len(finds)}"
        found = search(title, find, fn, x, y, eps, settings, loss, **options)
        best = found if best is None else joined(best, found, nearer=True)
    assert best is not None
    return dataclasses.replace(best, name=name)


def joined(first: Attack, second: Attack, nearer: bool = False) -> Attack:
    """Two attacks on the same examples: of every example the point of the first success, and all counts.

    With `nearer` it is the nearest success. Where there is none it is the point of the smaller margin.
    """
    better = ~first.success & (second.success | (second.margin < first.margin))
    if nearer:
        better |= second.distance < first.distance
    shaped = per_example(better, first.adversarial)

    def both(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
        return (b if a is None else a) if a is None or b is None else a + b

    return dataclasses.replace(
        second,
        success=first.success | second.success,
        distance=np.where(better, second.distance, first.distance),
        adversarial=np.where(shaped, second.adversarial, first.adversarial),
        margin=np.where(better, second.margin, first.margin),
        steps=both(first.steps, second.steps),
        queries=both(first.queries, second.queries),
    )
