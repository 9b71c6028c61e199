"""`progress` means the same in every public call: True shows on stderr, False is silent, a function gets lines."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lipbounds as lb
from lipbounds._cli import tables
from lipbounds._lipsdp import ellipsoid
from lipbounds._text import progress
from lipbounds.analysis.attack_settings import AttackSettings
from lipbounds.analysis.evaluation import evaluate
from lipbounds.analysis.robust_accuracy import robust_accuracy
from lipbounds.training import fit, resume

RNG = np.random.default_rng(0)
WEIGHTS = [RNG.standard_normal(s) for s in ((6, 4), (5, 6), (3, 5))]
FORM = lb.from_weights(WEIGHTS)
X = RNG.standard_normal((3, 4)).astype(np.float32)
Y = np.array([int(np.argmax(np.asarray(FORM(x)))) for x in X])


def fresh() -> lb.LureForm:
    """FORM, of which no norm has been proved yet: those of a form are kept."""
    return lb.from_weights(WEIGHTS)


CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "naive": (lambda **o: lb.naive(fresh(), **o), "norm of input to relu[0]"),
    "liplt": (lambda **o: lb.liplt(fresh(), **o), "norm of relu[0] to relu[1]"),
    "lipsdp": (lambda **o: lb.lipsdp(FORM, **o), "network: "),
    "local": (lambda **o: lb.local(FORM, X, 0.1, **o), "local bounds: 3 of 3 examples"),
    "certified_radius": (
        lambda **o: lb.certified_radius(FORM, X, Y, local=True, **o),
        "local radii: 3 of 3 examples",
    ),
    "compare": (lambda **o: lb.compare(fresh(), methods=["liplt"], **o), "liplt, norm of input to relu[0]"),
    "bracket": (lambda **o: lb.bracket(FORM, X, **o), "3 points read"),
    "empirical": (lambda **o: lb.empirical(FORM, X, steps=2, **o), "2 steps of ascent"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_gets_every_line(name: str) -> None:
    call, line = CALLS[name]
    seen: list[str] = []
    call(progress=seen.append)
    assert any(text.startswith(line) for text in seen), seen


def test_a_certificate_is_verified_with_progress(tmp_path: Path) -> None:
    lb.save_certificate(lb.lipsdp(FORM), tmp_path / "c")
    seen: list[str] = []
    assert lb.verify_certificate(tmp_path / "c", FORM, progress=seen.append)
    assert seen[0] == "proof 1 of 1"


def test_every_public_call_that_works_long_has_it() -> None:
    for name in (*CALLS, "verify_certificate"):
        parameter = inspect.signature(getattr(lb, name)).parameters["progress"]
        assert parameter.default is True and parameter.kind is parameter.KEYWORD_ONLY, name
    for verb in (fit, resume, evaluate, robust_accuracy, AttackSettings):
        assert inspect.signature(verb).parameters["progress"].default is True, verb


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    monkeypatch.setattr(progress, "_drawn", lambda: True)
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)


def test_a_terminal_shows_what_is_done_unless_told_not_to(
    terminal: None, capfd: pytest.CaptureFixture[str]
) -> None:
    lb.lipsdp(FORM, progress=False)
    assert capfd.readouterr() == ("", "")
    lb.lipsdp(fresh())
    out, err = capfd.readouterr()
    assert out == "" and "norm of relu[0] to relu[1]" in err


def test_threads_share_one_line_of_a_terminal(terminal: None, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    with progress.reporting(True), ThreadPoolExecutor(4) as pool:
        ready = threading.Barrier(4)

        def tell(i: int) -> None:
            ready.wait()
            progress.say(f"part {i}")

        for task in [pool.submit(copy_context().run, tell, i) for i in range(4)]:
            task.result()
    for drawing in set(threading.enumerate()) - before:
        drawing.join(2.0)
        assert not drawing.is_alive()
    assert "part" in capfd.readouterr().err


def test_nothing_is_shown_within_two_seconds(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", 60.0)
    lb.lipsdp(FORM)
    assert capfd.readouterr() == ("", "")


def test_nothing_is_shown_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PATIENCE", -1.0)
    lb.liplt(FORM)
    assert capfd.readouterr() == ("", "")


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(progress, "_now", lambda: self.seconds)

    def at(self, seconds: float) -> None:
        self.seconds = 1000.0 + seconds


def test_where_stderr_is_no_terminal_there_is_a_line_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with progress.reporting(True), progress.about("local radii"):
        began = progress.clock()
        for seconds in (1, 29, 31, 45, 60, 62, 100):
            clock.at(seconds)
            progress.say(f"{seconds} of 120{progress.remaining(began, seconds, 120)}")
    assert capfd.readouterr() == (
        "",
        "lipbounds: local radii, 31 of 120, about 89 s left\n"
        "lipbounds: local radii, 62 of 120, about 58 s left\n"
        "lipbounds: local radii, 100 of 120, about 20 s left\n",
    )


def test_the_time_left_is_told_once_a_rate_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    began = progress.clock()
    clock.at(1.0)
    assert progress.remaining(began, 1, 100) == ""  # within two seconds
    clock.at(4.0)
    assert progress.remaining(began, 0, 100) == "" and progress.remaining(began, 100, 100) == ""
    assert progress.remaining(began, 25, 100) == ", about 12 s left"
    assert progress.remaining(began, 0.01, 1.0) == ", about 7 min left"


def test_the_time_left_leaves_out_the_first_step_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seconds, lines = Clock(monkeypatch), iter(range(20, 200, 5)), list[str]()

    def slow_at_first(start: Any, runs: Any, current: Any, state: Any, *rest: Any) -> Any:
        clock.at(next(seconds))  # 20 s with compilation, then 5 s a step
        return current, state, np.array([1.0, 0.0])

    monkeypatch.setattr(ellipsoid, "improve", slow_at_first)
    lb.lipsdp(FORM, solver=lb.Recursion(iterations=60), progress=lines.append)
    said = [line for line in lines if "of at most 60" in line]
    assert "15 of at most 60 iterations: " in said[0]
    assert "30 of at most 60 iterations, about 10 s left: " in said[1]


def test_the_bars_of_the_commands_are_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with tables.working() as tell, tables.progress(tables.console()) as share, tables.training(40) as epoch:
        clock.at(10)
        epoch({"epoch": 1}, "loss 2")
        clock.at(40)
        tell("attacking")
        share("bounding", 0.25)
        epoch({"epoch": 11}, "loss 1")
        clock.at(69)
        tell("still attacking")
        epoch({"epoch": 20}, "loss 0.5")
        clock.at(110)  # a validated epoch has its own line, and no second one
        epoch({"epoch": 30, "clean": 0.5}, "loss 0.4, 50.0 % clean")
        clock.at(112)
        epoch({"epoch": 31}, "loss 0.3")
    assert capfd.readouterr() == (
        "",
        "lipbounds: attacking\nlipbounds: bounding; 25 % done, about 2 min left\n"
        "lipbounds: epoch 11 of 40, about 87 s left: loss 1\n"
        "epoch 30 of 40, about 34 s left: loss 0.4, 50.0 % clean\n",
    )


def test_long_proofs_get_a_bar_with_their_cost(
    terminal: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_RATE", 10.0)  # operations per second
    lb.naive(fresh())
    assert "proving the norms of 2 blocks, about" in " ".join(capfd.readouterr().err.split())
    seen: list[str] = []
    lb.naive(fresh(), progress=seen.append)
    assert [line.split(" ", 1)[0] for line in seen] == ["forming", "norm", "norm"] and capfd.readouterr() == (
        "",
        "",
    )


def test_notebooks_that_force_colours_get_no_bar(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.reporting(True), progress.meter(2, 10.0) as advance:
        advance("first block", 5.0)
    assert capfd.readouterr() == ("", "")


def test_a_call_inside_another_one_is_as_loud_as_that_unless_it_is_silent_itself() -> None:
    seen: list[str] = []
    with progress.reporting(seen.append):
        with progress.reporting(True), progress.about("inside"):
            progress.say("one")
        with progress.reporting(False):
            progress.say("two")
        progress.say("three")
    progress.say("four")
    assert seen == ["inside, one", "three"]


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match="progress must be True, False or a function of one text, got 3"):
        lb.naive(FORM, progress=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda: lb.compare(FORM, X, Y, None, 2),  # type: ignore[misc]
        lambda: lb.bracket(FORM, X, 2),  # type: ignore[misc]
        lambda: lb.empirical(FORM, X, 2),  # type: ignore[misc]
    ],
)
def test_options_are_keywords(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        call()
