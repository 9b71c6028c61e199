"""`certified_radius(..., eps=...)`: every engine, only for what is open, and never less than any engine alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from balls import mlp, values
from test_margins import attained, certified

import lipbounds as lb
from lipbounds._local import engines
from lipbounds._margins import radius

EPS = 0.4


@pytest.fixture(scope="module")
def case() -> tuple[Any, np.ndarray, np.ndarray, lb.UpperBound]:
    form = mlp()
    x = np.random.default_rng(5).normal(size=(14, 12))
    return form, x, values(form, x).argmax(axis=1), lb.liplt(form, pairwise=True)


@pytest.mark.slow
def test_all_engines_certify_at_least_what_each_does(case: Any) -> None:
    form, x, y, bound = case
    found = lb.certified_radius(form, x, y, bound=bound, local=True, eps=EPS)
    alone = [
        lb.certified_radius(form, x, y, bound=bound).certified(EPS),
        lb.certified_radius(form, x, y, bound=bound, local=lb.Local(tries=8)).certified(EPS),
        certified(form, x, y, EPS),
    ]
    for sure in alone:
        assert not (sure & ~found.certified(EPS)).any()
    assert found.certified(EPS).sum() > max(alone[0].sum(), alone[1].sum())
    assert found.guarantee == "verified" and found.complete
    proofs = ("global", "ellipsoids", "dual")
    assert (np.isin(found.outcome, proofs) == found.certified(EPS)).all()
    assert found.counts["dual"] and found.counts["counterexample"]
    assert found.counts.get("global", 0) == alone[0].sum()
    assert found.counts.get("global", 0) + found.counts["ellipsoids"] <= alone[1].sum()
    assert any("the dual of lb.margins certifies" in note for note in found.notes)
    least = attained(form, x, y, EPS, 2, steps=20, count=8).min(axis=1)
    assert (least[found.certified(EPS)] > 0).all()


def test_radii_below_eps_hold_too(case: Any) -> None:
    form, x, y, bound = case
    found = lb.certified_radius(form, x, y, bound=bound, local=True, eps=2.0)
    assert ((found.radius > 0) & (found.radius < 2.0)).any()
    for row in np.flatnonzero(found.radius > 0)[:3]:
        r = float(found.radius[row])
        assert attained(form, x[row : row + 1], y[row : row + 1], r, 2, steps=20, count=8).min() > -1e-9


@pytest.mark.slow
def test_engines_see_open_examples_only(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    form, x, y, bound = case
    start = lb.certified_radius(form, x, y, bound=bound).radius
    asked: list[int] = []
    outputs, dual = engines.Around.outputs, radius.prepare

    def counted(self: Any, rows: Any, eps: np.ndarray, **options: Any) -> Any:
        asked.append(len(eps))
        assert (eps > EPS).all() and (eps < EPS * (1 + 1e-9)).all()
        return outputs(self, rows, eps, **options)

    def open_only(form: Any, x: Any, y: Any, eps: Any, **options: Any) -> Any:
        asked.append(len(x))
        return dual(form, x, y, eps, **options)

    monkeypatch.setattr(engines.Around, "outputs", counted)
    monkeypatch.setattr(radius, "prepare", open_only)
    lb.certified_radius(form, x, y, bound=bound, local=True, eps=EPS)
    assert asked[0] == ((start > 0) & (start <= EPS)).sum()
    assert asked == sorted(asked, reverse=True) and asked[0] > asked[-1] > 0


def test_a_failing_dual_is_a_note(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    form, x, y, bound = case

    def fail(*args: Any, **options: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setattr(radius, "decide", fail)
    found = lb.certified_radius(form, x, y, bound=bound, local=True, eps=EPS)
    assert "without the dual of lb.margins: no" in found.notes and found.certified(EPS).any()
    assert found.counts["failed"] == (~found.certified(EPS)).sum()
    assert f"failed {found.counts['failed']}" in repr(found)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_proved(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    form, x, y, bound = case
    whole = lb.certified_radius(form, x, y, bound=bound, local=True, eps=EPS)
    before = lb.certified_radius(form, x, y, bound=bound)

    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(radius, "decide", stop)
    part = lb.certified_radius(form, x, y, bound=bound, local=True, eps=EPS)
    assert not part.complete and "interrupted: radii are as far as they were proved" in part.notes
    assert before.certified(EPS).sum() < part.certified(EPS).sum() < whole.certified(EPS).sum()
    monkeypatch.setattr(radius, "bounded", stop)
    part = lb.certified_radius(form, x, y, bound=bound, local=True)
    assert not part.complete and part.radius.tolist() == before.radius.tolist()


def test_eps_needs_local_bounds(case: Any) -> None:
    form, x, y, bound = case
    with pytest.raises(ValueError, match="pass local=True"):
        lb.certified_radius(form, x, y, bound=bound, eps=0.1)
    with pytest.raises(ValueError, match="needs eps= or lb.Local\\(margins=True\\)"):
        lb.certified_radius(form, x, y, bound=bound, local=lb.Local(seconds_per_image=1.0))
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="eps must be finite numbers > 0"):
            lb.certified_radius(form, x, y, bound=bound, local=True, eps=bad)
