"""Calls in several threads, and interrupted ones: the same values as alone, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import lipbounds as lb
from lipbounds._gain.wide_blocks import Search
from lipbounds._norms.starts import SharedStarts, Starts
from lipbounds._text.threads import one_blas_thread

RNG = np.random.default_rng(0)
WEIGHTS = [RNG.standard_normal(shape).astype(np.float32) for shape in ((60, 50), (55, 60), (5, 55))]


def fresh() -> lb.LureForm:
    """A form of which no norm is known."""
    return lb.from_weights(WEIGHTS)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that begin at the same time, each in a thread of its own."""
    begin = threading.Barrier(len(calls))

    def one(call: Callable[[], Any]) -> Any:
        begin.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [task.result() for task in [pool.submit(one, call) for call in calls]]


def probabilistic(verb: Any, form: lb.LureForm, **options: Any) -> tuple[float, Any]:
    bound = verb(form, guarantee="probabilistic", **options)
    return bound.value, [part.how for part in bound.parts]


def test_probabilistic_norms_do_not_depend_on_other_calls() -> None:
    alone = [probabilistic(verb, fresh()) for verb in (lb.naive, lb.liplt)]
    for _ in range(4):
        form = fresh()
        found = together(
            *2
            * [
                lambda form=form: probabilistic(lb.naive, form),
                lambda form=form: probabilistic(lb.liplt, form),
            ]
        )
        assert found == alone * 2
    form = fresh()
    assert [probabilistic(verb, form) for verb in (lb.liplt, lb.naive, lb.liplt)] == [*alone[::-1], alone[1]]


def starts_of(a: np.ndarray, there: Callable[[np.ndarray], np.ndarray]) -> SharedStarts:
    options: dict[str, Any] = dict(seed=1, failure=1e-9, rounding=1e-13, max_steps=99)
    return SharedStarts(Starts(there, lambda y: a.T @ y, a.shape[1], **options))


@pytest.mark.parametrize("when", [1, 9, 12, 16, 17, 30])
def test_an_interrupted_step_is_done_again(when: int) -> None:
    a = np.random.default_rng(0).standard_normal((60, 40))
    calls = 0

    def interrupted(x: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == when:
            raise KeyboardInterrupt
        return a @ x

    broken, whole = starts_of(a, interrupted), starts_of(a, lambda x: a @ x)
    for place in range(6):
        try:
            broken.at(place)
        except KeyboardInterrupt:
            pass
        assert broken.at(place) == whole.at(place)
    assert calls > when and whole.at(5).ended


def test_the_number_of_blas_threads_is_there_again_in_whatever_order_calls_end() -> None:
    def threads() -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = threads()
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert set(threads()) == {1}
    second.__exit__(None, None, None)
    assert threads() == before


def test_searches_run_in_the_context_of_the_call_and_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here: ContextVar[str] = ContextVar("here", default="nowhere")
    here.set("the call")
    places, advance = [], Search.advance

    def noted(self: Search, steps: int) -> None:
        places.append(here.get())
        advance(self, steps)

    monkeypatch.setattr(Search, "advance", noted)
    lb.liplt(fresh(), guarantee="probabilistic")
    assert set(places) == {"the call"}

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    places.clear()
    layers = [RNG.standard_normal((6, 6)) for _ in range(12)]
    with pytest.raises(KeyboardInterrupt):
        lb.liplt(lb.from_weights(layers), guarantee="probabilistic", progress=stop)
    assert len(places) < 60
