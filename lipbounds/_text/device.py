"""Where proofs are computed: the choice of a public call, the accelerator it means, and the note about its use.

    device="auto"    large proofs on a GPU where JAX has one by default, everything else on the host (the default)
    device="cpu"     everything on the host
    device="gpu"     as "auto"; ValueError where JAX has no GPU

A nested call (LipLT inside `lipsdp`) takes the choice of the outer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import jax

Device = Literal["auto", "cpu", "gpu"]


@dataclass
class _Call:
    """The choice of one public call, what its proofs have said so far, and what they keep on the device."""

    choice: Device
    notes: list[str] = field(default_factory=list)
    kept: dict[Any, Any] = field(default_factory=dict)


_call: ContextVar[_Call | None] = ContextVar("device", default=None)
_heard: ContextVar[list[str] | None] = ContextVar("notes", default=None)
R = TypeVar("R")


@contextmanager
def proofs_on(choice: Any) -> Iterator[list[str]]:
    """Compute proofs inside where `choice` says (None: where the call around it says); yields the notes about it."""
    if choice is not None and choice not in get_args(Device):
        raise ValueError(f"device must be 'auto', 'cpu' or 'gpu', got {choice!r}")
    outer = _call.get()
    if choice is None and outer is not None:
        yield []  # the outer call has the notes
        return
    call = _Call(choice or "auto")
    if call.choice == "gpu" and accelerator(call.choice) is None:
        raise ValueError(
            "device='gpu', and JAX has no GPU: install the build of jax for your GPU, or leave device out"
        )
    token = _call.set(call)
    try:
        yield call.notes
    finally:
        _call.reset(token)
        if outer is not None:
            outer.notes += [note for note in call.notes if note not in outer.notes]


def accelerator(choice: str) -> Any:
    """The GPU (a `jax.Device`) for proofs, or None. "auto" takes one only if it is JAX's default backend."""
    if choice == "cpu" or (choice == "auto" and jax.default_backend() != "gpu"):
        return None
    try:
        return next(iter(jax.local_devices(backend="gpu")), None)
    except RuntimeError:
        return None


def chosen() -> Any:
    """The accelerator of the public call around this, or None for the host."""
    call = _call.get()
    return None if call is None else accelerator(call.choice)


def kept() -> dict[Any, Any]:
    """What proofs want to keep on the device until the public call around this ends."""
    call = _call.get()
    return {} if call is None else call.kept


def note(text: str) -> None:
    """Add a note, once, to the result of the public call around this."""
    call, heard = _call.get(), _heard.get()
    if heard is not None and text not in heard:
        heard.append(text)
    if call is not None and text not in call.notes:
        call.notes.append(text)


@contextmanager
def hearing() -> Iterator[list[str]]:
    """The notes that are made inside, which go to the result as well."""
    outer, heard = _heard.get(), list[str]()
    token = _heard.set(heard)
    try:
        yield heard
    finally:
        _heard.reset(token)
        if outer is not None:
            outer += [text for text in heard if text not in outer]


def remembered(store: dict[Any, tuple[Any, list[str]]], key: Any, make: Callable[[], R]) -> R:
    """store[key], made once. Where it serves again, in a later call, the notes about its proof are made again."""
    if key not in store:
        with hearing() as heard:
            store[key] = make(), heard
    value, heard = store[key]
    for text in heard:
        note(text)
    return value  # type: ignore[no-any-return]


def with_notes(result: Any, notes: list[str]) -> Any:
    """The result of a public call with the notes that it lacks; results without notes pass unchanged."""
    if not notes or not is_dataclass(result) or isinstance(result, type) or not hasattr(result, "notes"):
        return result
    old: tuple[str, ...] = result.notes  # type: ignore[attr-defined]
    new = tuple(note for note in notes if note not in old)
    return replace(result, notes=(*old, *new)) if new else result  # type: ignore[type-var]
