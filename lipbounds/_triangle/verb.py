"""Shared by the bounds of a whole network: the decorator that adds a jit-able core, and checks of options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast, get_args

from lipbounds._form.lure import LureForm, check_weights
from lipbounds._gain import memory_budget
from lipbounds._text.calls import public
from lipbounds.results import Guarantee, check_norm

P = ParamSpec("P")
R = TypeVar("R")
Result = TypeVar("Result", covariant=True)


class Verb(Protocol[P, Result]):
    """A public bound: `verb(form, ...)`, and under jit `verb.core(form, state)` with `verb.init(form, key)`."""

    core: Any
    init: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Result: ...


def with_core(core: Any) -> Callable[[Callable[P, R]], Verb[P, R]]:
    """Decorate a bound: plain errors, products in full precision, and its core as an attribute."""

    def decorate(bound: Callable[P, R]) -> Verb[P, R]:
        verb = cast(Any, public(bound))
        verb.core, verb.init = core, core.init
        return cast(Verb[P, R], verb)

    return decorate


def check(form: Any, norm: Any, guarantee: str, verb: str) -> Any:
    """Check the arguments of a bound and return the norm."""
    if not isinstance(form, LureForm):
        raise TypeError(
            f"lb.{verb} needs a LureForm from lb.trace or lb.from_weights, got {type(form).__name__}"
        )
    norm = check_norm(norm)
    if guarantee not in get_args(Guarantee):
        raise ValueError(f"guarantee must be one of {', '.join(get_args(Guarantee))}, got {guarantee!r}")
    if form.is_traced:
        raise TypeError(
            f"lb.{verb} works on concrete weights; under jit, grad or vmap use lb.{verb}.core(form, state) with "
            f"state = lb.{verb}.core.init(form, key), which gives estimates"
        )
    check_weights(form)
    return norm


def budget_of(memory: Any, norm: Any, guarantee: str) -> memory_budget.Budget | None:
    """The budget of one call; ValueError where it has nothing to limit."""
    limit = memory_budget.parse(memory)
    if limit is None:
        return None
    if norm != 2:
        raise ValueError("memory applies to norm=2 only (norms 1 and inf are sums of entries): leave it out")
    if guarantee == "estimate":
        raise ValueError(
            "memory limits proofs, and guarantee='estimate' proves nothing: leave one of them out"
        )
    return memory_budget.Budget(limit)
