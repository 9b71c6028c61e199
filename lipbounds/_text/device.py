"""Where proofs are computed: the choice of a public call, the accelerator it means, and the note about its use.

    device="auto"    large proofs on a GPU where JAX has one by default, everything else on the host (the default)
    device="cpu"     everything on the host
    device="gpu"     as "auto"; ValueError where JAX has no GPU

A nested call (LipLT inside `lipsdp`) takes the choice of the outer one.

Searches, of which nothing needs a proof, are shared by all devices of the process (`on_each`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import jax

from lipbounds._text.progress import stoppable
from lipbounds._text.settings import usual_jax

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


def _setting(name: str) -> Any:
    """A setting of JAX as it is in this thread."""
    return getattr(jax.config, name)


def sharing() -> tuple[Any, ...]:
    """The devices (`jax.Device`) that share the searches of the public call around this.

    All of this process that JAX uses by default, and with device="cpu" its CPUs; one alone where `jax.default_device`
    names it.
    """
    call = _call.get()
    given = _setting("jax_default_device")
    if given is not None and not isinstance(given, str):
        return (given,)
    backend = "cpu" if call is not None and call.choice == "cpu" else given
    return tuple(jax.local_devices(backend=backend))


@contextmanager
def placed(device: Any) -> Iterator[None]:
    """Compute on this device what is inside."""
    if device is _setting("jax_default_device") or device is jax.local_devices()[0]:
        yield  # where it is in any case: nothing is compiled again
        return
    with jax.default_device(device):
        yield


def on_each(work: Callable[[], None]) -> None:
    """work() side by side on every device of `sharing`, each in a thread of its own; on one device in this thread.

    The first error ends the others at their next `alive`.
    """
    devices = sharing()
    if len(devices) == 1:
        with placed(devices[0]):
            work()
        return
    wide = bool(_setting("jax_enable_x64"))  # which is per thread

    def one(device: Any) -> None:
        with usual_jax(), jax.enable_x64(wide), jax.default_device(device):
            work()

    with ThreadPoolExecutor(len(devices)) as pool, stoppable():
        for task in as_completed([pool.submit(copy_context().run, one, device) for device in devices]):
            task.result()


class Shared(Iterator[R]):
    """The items of an iterable for several threads: each is given to one of them."""

    def __init__(self, items: Iterable[R]) -> None:
        self._waiting, self._lock = iter(items), threading.Lock()

    def __next__(self) -> R:
        with self._lock:
            return next(self._waiting)


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
