"""Wrapper of every public function: default floating-point state, progress, and plain errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import numpy as np

from lipbounds._text.arguments import check_seed
from lipbounds._text.device import proofs_on, with_notes
from lipbounds._text.progress import reporting
from lipbounds._text.settings import usual_jax

#: Errors by which a method fails on one network: unsupported input, failed arithmetic, or too little memory.
FAILURES = (ValueError, ArithmeticError, MemoryError, jax.errors.JaxRuntimeError)

P = ParamSpec("P")
R = TypeVar("R")


def usual_floats(verb: Callable[P, R]) -> Callable[P, R]:
    """Run the function under NumPy's default error state.

    Proofs underflow and overflow on purpose, which must not become an error of the caller, even with
    `np.errstate(all="raise")`.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with np.errstate(divide="warn", over="warn", invalid="warn", under="ignore"):
            return verb(*args, **kwargs)

    return run


def public(verb: Callable[P, R]) -> Callable[P, R]:
    """Make a function public: fix its settings, report its progress and turn its failures into plain errors.

    Settings: `usual_floats` of NumPy and `usual_jax`.

    Progress: lines reported inside go where the keyword `progress` directs them (`lipbounds._text.progress`).

    Device: proofs inside are computed where the keyword `device` says (`lipbounds._text.device`), and a result that has
    notes says which device that was.

    Keywords: `pairwise` is a bool, and `seed` one of `check_seed`; ValueError otherwise.

    Errors: numerical failures and exceptions that only this library's own modules know become a ValueError with the
    reason; all other errors pass unchanged.
    """
    inner = usual_floats(verb)

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "seed" in kwargs:
            kwargs["seed"] = check_seed(kwargs["seed"])
        if not isinstance(kwargs.get("pairwise", False), bool | np.bool_):
            raise ValueError(f"pairwise must be True or False, got {kwargs['pairwise']!r}")
        try:
            with (
                usual_jax(),
                reporting(kwargs.get("progress", True)),  # type: ignore[arg-type]
                proofs_on(kwargs.get("device")) as notes,
            ):
                return with_notes(inner(*args, **kwargs), notes)
        except Exception as error:
            home = type(error).__module__
            own = home.startswith("lipbounds.") and home != "lipbounds.errors"
            if not own and not isinstance(error, (ArithmeticError, np.linalg.LinAlgError)):
                raise
            what = str(error) if own else f"the arithmetic failed ({reason(error)})"
            raise ValueError(what) from error

    return run


def moved(**places: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Raise one TypeError that gives the new spelling of keywords that the function no longer has."""

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
    """The message of an error, or its type's name if the message is empty."""
    return str(error) or type(error).__name__
