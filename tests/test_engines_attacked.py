"""Every engine of certified radii, forced in turn, under attack on trained networks; none beats all of them together.

The five networks are those of test_local_attacks that become narrower towards the outputs, so that each engine applies:
the front of `hybrid` and the width from which ellipsoids take their other path are set by the test.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_local_attacks import NEAR, SLACK, broken, case, used
from test_margins import certified

import lipbounds as lb
from lipbounds._lipsdp.state_matrices import first_tap
from lipbounds._local import engines
from lipbounds._margins.margins import decide, prepare
from lipbounds._margins.problem import Problem
from lipbounds.analysis.attacks import pgd

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gallery
from gallery_nets import GALLERY, SIZES

pytestmark = pytest.mark.slow

MANY, SOME = 200, 60  # images; of local LipLT and of the dual, which take longer
FEW = 20  # of the dual in l-inf on the CNN: 18 to 30 CPU seconds an image
# what is wider belongs to the front
FRONT = {
    "mlp": 45,
    "cnn": 100,
    "resnet": 30,
    "gelu": 30,
    "groupsort": 40,
}
GLOBAL = {"liplt": lb.liplt, "lipsdp": lb.lipsdp}
LOCAL = {
    2: ("ellipsoids", "wide ellipsoids", "hybrid", "LipLT"),
    math.inf: ("ellipsoids", "wide ellipsoids"),
}
RUNS = [(net, norm, way) for net in FRONT for norm, ways in LOCAL.items() for way in (*GLOBAL, *ways)]


@contextlib.contextmanager
def forced(way: str, front: int) -> Iterator[None]:
    """One engine alone, on a network where what is wider than `front` counts as wide."""
    with pytest.MonkeyPatch.context() as patch:
        if way != "ellipsoids":
            patch.setattr(engines, "TAIL", front)
        patch.setattr(engines, "_READY", weakref.WeakKeyDictionary())
        patch.setattr(engines, "ways", lambda *_: (way.removeprefix("wide "),))
        yield


@functools.cache
def bound(net: str, norm: float) -> lb.UpperBound:
    return lb.liplt(case(net, MANY).form, norm=norm, pairwise=True)


def count(way: str) -> int:
    return SOME if way == "LipLT" else MANY


@functools.cache
def radii(net: str, norm: float, way: str) -> np.ndarray:
    given = case(net, count(way))
    examples = given.form, given.x, given.y
    if way in GLOBAL:
        return lb.certified_radius(*examples, bound=GLOBAL[way](given.form, norm=norm, pairwise=True)).radius
    with forced(way, FRONT[net]):
        found = lb.certified_radius(*examples, bound=bound(net, norm), local=lb.Local(tries=6))
    assert found.guarantee == ("probabilistic" if way == "LipLT" else "verified")
    return found.radius


@pytest.mark.parametrize(("net", "norm", "way"), RUNS)
def test_no_attack_succeeds_inside_a_radius_of_any_engine(net: str, norm: float, way: str) -> None:
    given, found = case(net, count(way)), radii(net, norm, way)
    wide = radii(net, norm, "liplt")[: len(found)]
    assert (found > 0).all()
    if way not in GLOBAL:
        # other batches round logits differently; local LipLT gains on fewer images of smooth networks
        assert (found >= (1 - 1e-13) * wide).all()
        assert (found > 1.02 * wide).mean() > (0.02 if way == "LipLT" else 0.5), "the engine was hardly used"
    for loss in ("margin", "ce"):
        assert not broken(given, NEAR * found, norm, steps=60, restarts=3, loss=loss).any()
    assert used(given, found, norm).max() <= 1 + SLACK


# ------------------------------------------------------------------------------------- the dual and branching
PIECEWISE = [net for net in FRONT if net != "gelu"]
BALLS = [(2, None), (2, (0.0, 1.0)), (math.inf, (0.0, 1.0))]


def attacked(net: str, rows: Any, eps: np.ndarray, norm: float, box: Any) -> np.ndarray:
    """Which balls hold a point that the network in float64 does not classify as labelled, by PGD."""
    given, (low, high) = case(net, MANY), box or (-9.0, 10.0)
    lost = np.zeros(len(eps), bool)
    for loss in ("margin", "ce"):
        found = pgd(
            given.model,
            given.x[rows],
            given.y[rows],
            eps,
            norm=norm,
            steps=60,
            restarts=3,
            loss=loss,
            low=low,
            high=high,
        )
        z = given.climber.values(found.adversarial)
        at = np.arange(len(z))
        own = z[at, given.y[rows]]
        z[at, given.y[rows]] = -np.inf
        lost |= own <= z.max(axis=1)
    return lost


@pytest.fixture
def without_counterexamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """`decide` gives balls up that hold one, which would hide a proof that is wrong."""
    monkeypatch.setattr(Problem, "counterexamples", lambda self, rows: np.zeros(len(rows), bool))


@pytest.mark.usefixtures("without_counterexamples")
@pytest.mark.parametrize(("norm", "box"), BALLS)
@pytest.mark.parametrize("net", PIECEWISE)
def test_no_attack_succeeds_in_a_ball_that_the_dual_certifies(net: str, norm: float, box: Any) -> None:
    some = FEW if (net, norm) == ("cnn", math.inf) else SOME
    given, near = case(net, MANY), radii(net, norm, "ellipsoids")[:some]
    x, y, shares = given.x[:some], given.y[:some], []
    for factor in (1.2, 1.8 if norm == 2 else 3.0):
        sure = certified(given.form, x, y, factor * near, norm=norm, box=box)
        lost = attacked(net, slice(some), factor * near, norm, box)
        assert not (sure & lost).any()
        shares.append((sure.mean(), lost.mean()))
    assert shares[0][0] > 0.1, "nothing was certified beyond the ellipsoids"
    assert shares[1][1] > 0.1, "balls that hold no attack show nothing"


@pytest.mark.usefixtures("without_counterexamples")
@pytest.mark.parametrize("net", PIECEWISE)
def test_no_attack_succeeds_in_a_ball_that_branching_certifies(net: str) -> None:
    given, norm, box = case(net, MANY), 2, (0.0, 1.0)
    eps = 1.5 * radii(net, norm, "ellipsoids")[:SOME]
    x, y = given.x[:SOME], given.y[:SOME]
    lost = np.flatnonzero(attacked(net, slice(SOME), eps, norm, box))[:8]
    problem = prepare(given.form, x[lost], y[lost], eps[lost], norm=norm, box=box)
    verdict = decide(problem, seconds_per_image=2.0)
    assert len(lost) and set(verdict) <= {"not proved", "out of time"}


# ------------------------------------------------------------------------------------------------ all together
def front_of(form: lb.LureForm) -> int:
    """The largest width at which every engine applies; 0 where there is none."""
    widths = sorted({tap.size_in for tap in form.taps}, reverse=True)
    return next((w for w in widths if 0 < first_tap(form, w) < len(form.taps)), 0)


@pytest.mark.parametrize("name", [name for name in GALLERY if name != "squeeze_excitation"])
def test_no_engine_alone_beats_all_together_in_the_gallery(name: str) -> None:
    size = SIZES["small"]
    model, x = gallery.trained(name, size, 0), gallery.images(size)[2][:4]
    form = lb.trace(model, x[0])
    y = np.asarray(model(x)).argmax(axis=1)
    whole, front = lb.liplt(form, pairwise=True), front_of(form)
    near = lb.Local(tries=3)
    ways = ("hybrid", "ellipsoids", "LipLT") if front else ("ellipsoids",)
    with pytest.MonkeyPatch.context() as patch:
        if front:
            patch.setattr(engines, "TAIL", front)
        patch.setattr(engines, "_READY", weakref.WeakKeyDictionary())
        assert engines.ways(form, 2, "auto") == ways
        found = lb.certified_radius(form, x, y, bound=whole, local=near)
    alone = {"global": lb.certified_radius(form, x, y, bound=whole)}
    for way in ways:
        with forced(way if not front else f"wide {way}", front):
            alone[way] = lb.certified_radius(form, x, y, bound=whole, local=near)
    for way, each in alone.items():
        assert (found.radius >= each.radius).all(), way
    assert any((each.radius > alone["global"].radius).any() for each in alone.values())
