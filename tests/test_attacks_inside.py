"""No attack succeeds inside a certified radius: benchmarks/attacks_inside.py in small, and that its check can fail."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import attacks_inside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "norm"), [(0, 2.0), (1, math.inf), (2, 2.0), (3, math.inf), (4, 2.0)], ids=str
)
def test_no_attack_succeeds_inside_a_radius(place: int, norm: float) -> None:
    name = list(attacks_inside.NETWORKS)[place]
    found = attacks_inside.inside(name, norm, 30, quick=True)
    assert found["images"] == 30 and len(found["attacks"]) == 12
    attacks_inside.check(found)
    assert found["broken_at_4_radii"] > 0.9  # the attacks can break it, a little farther out


def _record() -> dict:
    row = {"attack": "PGD", "images": 9, "successes": 0, "misclassified_float64": 0, "least_margin": 0.1}
    bracket = {"eps": 0.1, "certified": 0.5, "attacked": 0.6, "clean": 0.9}
    return {
        "images": 9,
        "attacks": [row],
        "least_distance_over_radius": {"FAB-T": 1.01},
        "bracket": [bracket],
    }


def test_the_check_fails_on_contradictions() -> None:
    attacks_inside.check(_record())
    changes = (
        ("attacks", {"successes": 1}),
        ("attacks", {"misclassified_float64": 1}),
        ("attacks", {"least_margin": 0.0}),
        ("attacks", {"images": 8}),
        ("bracket", {"certified": 0.7}),
        ("bracket", {"attacked": 0.95}),
    )
    for part, change in changes:
        wrong = copy.deepcopy(_record())
        wrong[part][0] |= change
        with pytest.raises(AssertionError):
            attacks_inside.check(wrong)
    with pytest.raises(AssertionError):
        attacks_inside.check(_record() | {"least_distance_over_radius": {"ADBD": 0.99}})
