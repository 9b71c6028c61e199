"""The bound of a trained network keeps to its time, and its programs are compiled while the epochs run."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_device_programs import compilations

import lipbounds as lb
from lipbounds._gain.side_by_side import side_by_side
from lipbounds._norms import device as proofs
from lipbounds._text import OutOfTime, device, hurried, say, within
from lipbounds._text.progress import Stopped, alive
from lipbounds.analysis import training_report
from lipbounds.training import Config, final_bound, fit, loop
from lipbounds.training.final_bound import Ahead, bound_within, seconds_for
from lipbounds.training.loop import Fitted

PLAIN = Config(
    arch="16-8-3", loss="cross-entropy", epochs=2, batch_size=32, warmup=0, validate_every=0, eps=0.1
)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU in the place of an accelerator that takes every block."""
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(device, "accelerator", lambda choice: cpu if choice != "cpu" else None)
    monkeypatch.setattr(proofs, "TILE", 8)
    monkeypatch.setattr(proofs, "SMALLEST", 1)
    monkeypatch.setattr(proofs, "_passed", {})


def images(count: int = 96) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(0, 1, (count, 4, 4, 1)).astype(np.float32), rng.integers(0, 3, count).astype(np.int32)


def trained(config: Config = PLAIN) -> Fitted:
    return fit(config, images(), progress=False)


def form_of(found: Fitted) -> lb.LureForm:
    return lb.trace(found.model, jax.ShapeDtypeStruct((4, 4, 1), jnp.float32))


def without_seconds(log: Any) -> list[Any]:
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in log]


def leaves(found: Fitted) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(found.state.weights)]


def same(a: Fitted, b: Fitted) -> bool:
    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs) and without_seconds(a.log) == without_seconds(b.log)


# --- compiled ahead --------------------------------------------------------------------------------------------------


def test_the_final_bound_compiles_nothing(there: None) -> None:
    found = trained()
    assert found.ahead is not None
    found.ahead.wait()
    assert found.ahead.error is None
    with compilations() as counted:
        bound = bound_within(form_of(found), PLAIN, found.state, math.inf).bound
    assert not counted
    assert (bound.method, bound.guarantee) == ("liplt", "verified")
    assert "residual on a GPU" in {part.how for part in bound.parts}


def test_training_is_the_same_with_programs_compiled_ahead_and_where_that_fails(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    alone = trained()
    assert alone.ahead is None
    request.getfixturevalue("there")
    ahead = trained()
    assert ahead.ahead is not None
    assert same(alone, ahead)

    def failing(*_: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(final_bound, "_compile", failing)
    failed = trained()
    assert failed.ahead is not None
    failed.ahead.wait()
    assert isinstance(failed.ahead.error, MemoryError)
    assert same(alone, failed)


def test_an_error_in_training_ends_the_compilation(there: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Ahead] = []

    def forever(*_: Any) -> None:
        while True:
            alive()
            time.sleep(0.01)

    def fail(record: Any) -> None:
        raise KeyboardInterrupt

    original = Ahead.__init__
    monkeypatch.setattr(Ahead, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    monkeypatch.setattr(final_bound, "_compile", forever)
    with pytest.raises(KeyboardInterrupt):
        fit(PLAIN, images(), progress=fail)
    made[0]._thread.join(20.0)
    ended = isinstance(made[0].error, Stopped)
    made[0]._stop.set()  # in any case, or the process of the tests waits for it
    assert ended


# --- in time ---------------------------------------------------------------------------------------------------------


def test_the_time_is_that_of_ten_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    log = [{"seconds": s} for s in (500.0, 90.0, 70.0, 300.0)]
    assert seconds_for(PLAIN, log) == 900.0
    assert seconds_for(dataclasses.replace(PLAIN, final_epochs=2), log) == final_bound.LEAST == 300.0
    assert seconds_for(dataclasses.replace(PLAIN, final_epochs=0), log) == math.inf
    assert seconds_for(PLAIN, log[:1]) == 5000.0
    assert seconds_for(PLAIN, []) == 300.0
    monkeypatch.setattr(final_bound, "on_accelerator", lambda: True)
    short = [{"seconds": s} for s in (24.0, 0.4, 0.48, 0.6)]
    assert seconds_for(PLAIN, short) == 5.0
    assert seconds_for(dataclasses.replace(PLAIN, loss="crm", constants="recursion"), short) == 300.0


@pytest.mark.parametrize("constants", ["naive", "liplt"])
def test_out_of_time_the_bound_is_probabilistic_and_the_record_says_so(
    constants: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = "crm" if constants == "naive" else "cross-entropy"
    config = dataclasses.replace(PLAIN, loss=loss, constants=constants)
    found = dataclasses.replace(trained(), config=config)
    form = form_of(found)
    whole = bound_within(form, config, found.state, 60.0)
    assert (whole.bound.guarantee, whole.instead) == ("verified", None)
    assert whole.record() == {"bound_seconds": whole.seconds, "budget_seconds": 60.0}
    monkeypatch.setattr(training_report, "seconds_for", lambda *_: 0.0)
    data = type("Data", (), dict(zip(("test_x", "test_y"), images(20), strict=True), input_shape=(4, 4, 1)))
    monkeypatch.setattr(training_report, "load", lambda *_: data)
    final = training_report.final_record(found)
    assert (final["method"], final["guarantee"], final["budget_seconds"]) == (constants, "probabilistic", 0.0)
    assert (
        whole.bound.value <= final["constant"] * (1 + 1e-9) and final["constant"] < 1.01 * whole.bound.value
    )
    assert "did not end within 0 s (final_epochs)" in final["remark"]
    assert final["remark"] in training_report.remarks(found, final)


def test_a_validation_out_of_time_says_so_and_its_bound_is_the_final_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "seconds_for", lambda *_: 0.0)
    monkeypatch.setattr(training_report, "bound_within", lambda *_: pytest.fail("proved again"))
    found = trained(dataclasses.replace(PLAIN, epochs=1, validate_every=1))
    assert found.log[0]["guarantee"] == "probabilistic"
    data = type("Data", (), dict(zip(("test_x", "test_y"), images(20), strict=True), input_shape=(4, 4, 1)))
    monkeypatch.setattr(training_report, "load", lambda *_: data)
    final = training_report.final_record(found)
    assert final["remark"] == found.log[0]["remark"] and "LipLT did not end" in final["remark"]


@pytest.mark.parametrize(
    ("slow", "expected", "instead"),
    [((), "search", None), ((None,), "trained", "LipSDP"), ((0, None), "liplt", "LipSDP")],
)
def test_the_trained_multipliers_take_the_place_of_a_search(
    slow: tuple[Any, ...], expected: str, instead: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(PLAIN, loss="crm", constants="recursion")
    some = lb.naive(lb.from_weights([[[2.0]]]))

    def proved(form: Any, config: Config, state: Any, iterations: Any = None, guarantee: Any = "auto") -> Any:
        if config.constants != "recursion":
            assert guarantee == "probabilistic"
            return dataclasses.replace(some, method="liplt")
        while iterations in slow:
            alive()
            time.sleep(0.005)
        return dataclasses.replace(some, method="search" if iterations is None else "trained")

    monkeypatch.setattr(final_bound, "proved_bound", proved)
    found = bound_within(None, config, None, 0.1)  # type: ignore[arg-type]
    assert (found.bound.method, found.instead) == (expected, instead)
    assert found.seconds < 5.0  # a busy machine


def test_work_under_within_ends_in_threads_as_well() -> None:
    def work(item: int) -> int:
        while True:
            alive()
            time.sleep(0.005)

    begin = time.perf_counter()
    with pytest.raises(OutOfTime), within(0.1), side_by_side(work, [1, 2, 3], seconds=10.0) as results:
        list(results)
    assert time.perf_counter() - begin < 5.0
    alive()
    with within(60.0), pytest.raises(OutOfTime), within(0.0):
        say("a line")


def test_a_hurried_search_has_a_bound_after_fewer_steps() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(s).astype(np.float32) for s in ((300, 200), (250, 300), (4, 250))]
    exact = lb.naive(lb.from_weights(weights)).value

    def steps(seconds: float) -> tuple[int, float]:
        with hurried(seconds):
            bound = lb.liplt(lb.from_weights(weights), guarantee="probabilistic")
        ways = [part.how for part in bound.parts if part.how.startswith("Golub-Kahan")]
        assert bound.guarantee == "probabilistic" and ways
        return sum(int(how.split()[1]) for how in ways), bound.value

    (few, loose), (many, tight) = steps(0.0), steps(60.0)
    assert few < many and tight <= loose < 2 * exact


def test_a_run_can_be_copied_while_its_programs_are_compiled(there: None) -> None:
    found = trained()
    assert found.ahead is not None
    again = copy.deepcopy(found)
    assert again.ahead is not None
    again.ahead.wait()
    for a, b in zip(leaves(found), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    found.ahead.wait()
