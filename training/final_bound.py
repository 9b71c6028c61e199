"""The proved bound of a trained network, in a share of the time that training took, its programs compiled ahead.

The final bound of a run, and that of a validation, may take as long as `config.final_epochs` epochs of the run. What
proves the best bound has most of this time. Where it does not end in it, a cheaper bound takes its place: that of the
trained multipliers as they are (LipSDP), which are proved first, or else norms by Golub-Kahan, which are probabilistic
(LipLT, naive). The record says which bound it is, and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lipbounds as lb
from lipbounds._text import OutOfTime, clock, hurried, stoppable, within
from lipbounds._triangle import compile_ahead, on_accelerator
from lipbounds.training import parallel
from lipbounds.training.config import Config
from lipbounds.training.step import Trainer, TrainState

#: Seconds that a bound may take however short the epochs are, so that those of small networks always end.
LEAST = 300.0
#: The same for LipLT and naive where they are proved on an accelerator, which is as fast at epochs as at proofs.
LEAST_THERE = 5.0
# Shares of the time after which the proof of the trained multipliers, which takes seconds, and the best bound are given
# up; Golub-Kahan has the rest.
_TRAINED, _BEST = 0.5, 0.7


@dataclasses.dataclass(frozen=True)
class Found:
    """A proved bound, the seconds it took, and those it was given (inf: any); `instead`: of what it took the place."""

    bound: lb.UpperBound
    seconds: float
    given: float
    instead: str | None = None

    def record(self) -> dict[str, Any]:
        """bound_seconds, budget_seconds (None: any), and a remark where a better bound did not end in time."""
        found: dict[str, Any] = {
            "bound_seconds": self.seconds,
            "budget_seconds": self.given if self.given < math.inf else None,
        }
        if self.instead is not None:
            found["remark"] = (
                f"{self.instead} did not end within {self.given:.3g} s (final_epochs), so the bound is "
                f"{self.bound.method}, {self.bound.guarantee}; `lipbounds evaluate` has no such limit"
            )
        return found


def seconds_for(config: Config, log: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that a bound of this run may take: `config.final_epochs` median epochs, or the least; inf for any.

    The first epoch of a run does not count where there are others: most of it is compilation.
    """
    if not config.final_epochs:
        return math.inf
    epochs = [record["seconds"] for record in log[1:] or log]
    there = on_accelerator() and method(config) != "recursion"
    return max(LEAST_THERE if there else LEAST, config.final_epochs * float(np.median(epochs or [0.0])))


def method(config: Config) -> str:
    """The bound that stands in the loss, "naive" or "recursion", and "liplt" for all other runs."""
    return (
        config.constants if config.uses_constants and config.constants in ("naive", "recursion") else "liplt"
    )


def proved_bound(
    form: Any, config: Config, state: TrainState, iterations: int | None = None, guarantee: Any = "auto"
) -> lb.UpperBound:
    """A proved bound of all pairs by the method whose constants are in the loss (LipLT for plain training).

    The recursion starts from the trained multipliers; iterations=0 proves these without further optimisation.
    """
    if method(config) == "naive":
        found = lb.naive(form, pairwise=True, guarantee=guarantee)
    elif method(config) == "recursion":
        initial = state.bound._replace(multipliers=state.multipliers)
        found = lb.lipsdp(form, pairwise=True, solver=lb.Recursion(initial=initial, iterations=iterations))
    else:
        found = lb.liplt(form, pairwise=True, guarantee=guarantee)
    assert isinstance(found, lb.UpperBound)
    return found


def bound_within(
    form: Any, config: Config, state: TrainState, seconds: float, iterations: int | None = None
) -> Found:
    """The best of the bounds of `proved_bound` that ends in time; a probabilistic one where none does."""
    begin, name = clock(), _NAMES[method(config)]

    def until(share: float, steps: int | None) -> lb.UpperBound | None:
        with contextlib.suppress(OutOfTime), within(begin + share * seconds - clock()):
            return proved_bound(form, config, state, steps)
        return None

    trained = None
    if method(config) == "recursion" and iterations != 0 and seconds < math.inf:
        with contextlib.suppress(ValueError):  # they prove nothing yet
            trained = until(_TRAINED, 0)
    best = until(_BEST, iterations)
    proved = [found for found in (best, trained) if found is not None]
    bound, instead = min(proved, key=lambda found: found.value, default=None), None if best else name
    if bound is None:
        cheap = dataclasses.replace(config, constants="liplt") if method(config) == "recursion" else config
        with hurried(begin + seconds - clock()):
            bound = proved_bound(form, cheap, state, guarantee="probabilistic")
    return Found(bound, clock() - begin, seconds, instead)


_NAMES = {"naive": "the product of norms", "liplt": "LipLT", "recursion": "LipSDP"}


def compiled_ahead(trainer: Trainer, state: TrainState, shape: tuple[int, ...]) -> Ahead | None:
    """Begin to compile the programs of the bound, where there is an accelerator."""
    if not on_accelerator():
        return None
    return Ahead(trainer, parallel.local(state), shape)  # a copy, as training gives its arrays away


class Ahead:
    """The programs of the bound, compiled in a thread while the epochs run.

    They depend on the shapes alone. Whatever goes wrong there (`error`) means that they are compiled when they are
    needed, and nothing else.
    """

    def __init__(self, trainer: Trainer, state: TrainState, shape: tuple[int, ...]) -> None:
        self.error: BaseException | None = None
        self._stop = _Stop()
        with stoppable(self._stop):
            context = copy_context()

        def work() -> None:
            try:
                context.run(_compile, trainer, state, shape)
            except BaseException as error:  # a thread has nobody to tell, and training goes on
                self.error = error

        self._thread: threading.Thread | None = threading.Thread(target=work, name="lipbounds-ahead")
        self._thread.start()

    def __reduce__(self) -> Any:
        """A copy of a run has nothing to wait for."""
        return _nothing_to_wait_for, ()

    def wait(self) -> None:
        """Wait until all is compiled; in slices, so that an interruption is heard."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.2)

    def interrupted(self, kind: type[BaseException] | None, *_: Any) -> None:
        """End it before its next program where the training ends with an error: the exit of a context."""
        if kind is not None:
            self._stop.set()


def _nothing_to_wait_for() -> Ahead:
    made = Ahead.__new__(Ahead)
    made.error, made._stop, made._thread = None, _Stop(), None
    return made


class _Stop(threading.Event):
    """Also set once the interpreter is about to end: it waits for the program that is being compiled, no longer."""

    def is_set(self) -> bool:
        return super().is_set() or not threading.main_thread().is_alive()


def _compile(trainer: Trainer, state: TrainState, shape: tuple[int, ...]) -> None:
    form = lb.trace(trainer.model(state), jax.ShapeDtypeStruct(shape, jnp.float32))
    compile_ahead(form, progress=False)
