"""The state of NumPy's floating-point errors inside the library, whatever the caller has set."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def usual_floats(verb: Callable[P, R]) -> Callable[P, R]:
    """The verb under NumPy's default error state: what underflows or overflows on purpose inside a proof is no error
    of the caller's, even with `np.errstate(all="raise")`."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(divide="warn", over="warn", invalid="warn", under="ignore"):
            return verb(*args, **kwargs)

    return run
