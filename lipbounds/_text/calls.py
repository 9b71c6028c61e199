"""What surrounds every public verb: NumPy's usual floating-point state inside, plain errors outside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import numpy as np

from lipbounds._text.progress import reporting

#: How a method fails on one network: a refusal, a factorisation or a number out of range, memory that is not there.
FAILURES = (ValueError, ArithmeticError, MemoryError, jax.errors.JaxRuntimeError)

P = ParamSpec("P")
R = TypeVar("R")


def usual_floats(verb: Callable[P, R]) -> Callable[P, R]:
    """The verb under NumPy's default error state.

    What underflows or overflows on purpose inside a proof is no error of the caller's, even with
    `np.errstate(all="raise")`.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(divide="warn", over="warn", invalid="warn", under="ignore"):
            return verb(*args, **kwargs)

    return run


def public(verb: Callable[P, R]) -> Callable[P, R]:
    """The verb as users call it.

    Floats: `usual_floats`, and products of JAX arrays in their own precision whatever `jax_default_matmul_precision`
    says: with a preset such as "BF16_BF16_F32" even float64 operands would be rounded to bfloat16.

    Progress: what is said inside goes where the keyword `progress` says (`lipbounds._text.progress`).

    Errors: a plain ValueError, the reason in it, in place of numerical failures and of exceptions that only this
    library's own modules know; whatever `lipbounds.errors` defines, and every other error, passes unchanged.
    """
    inner = usual_floats(verb)

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with jax.default_matmul_precision("highest"), reporting(kwargs.get("progress", True)):  # type: ignore[arg-type]
                return inner(*args, **kwargs)
        except Exception as error:
            home = type(error).__module__
            own = home.startswith("lipbounds.") and home != "lipbounds.errors"
            if not own and not isinstance(error, (ArithmeticError, np.linalg.LinAlgError)):
                raise
            what = str(error) if own else f"the arithmetic failed ({reason(error)})"
            raise ValueError(what) from error

    return run


def moved(**places: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keywords that a verb no longer has, each with its new spelling, which one plain TypeError names."""

    def decorate(verb: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(verb)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            old = [f"{name}=... is now {places[name]}" for name in kwargs if name in places]
            if old:
                raise TypeError(f"{verb.__name__}: {'; '.join(old)}")
            return verb(*args, **kwargs)

        return run

    return decorate


def reason(error: BaseException) -> str:
    """What an error says, or its name where it says nothing."""
    return str(error) or type(error).__name__
