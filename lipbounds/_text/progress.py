"""Progress reports of public calls: `progress` means the same in all of them.

    progress=True      shown on stderr (the default): on a terminal once the call takes more than two seconds, with a
                       bar for proofs of norms that take longer; elsewhere (a file, a notebook) a line every 30 seconds
    progress=False     nothing
    progress=function  function(text) is called with every line of text

A nested call (LipLT inside `lipsdp`) reports where the outer one does.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Tell = Callable[[str], None]
Progress = bool | Tell | None  # None is False

_PATIENCE = 2.0  # seconds before anything is shown on a terminal, and before a rate is known
_EVERY = 30.0  # seconds between two lines where stderr is no terminal
_QUIET = 5.0  # seconds of estimated work below which no bar is shown
_TELLING = 0.1  # share of the estimated work after which its rate is measured
_ALWAYS = 60.0  # above this the estimate is printed (one line) even where stderr is no terminal
_RATE = 4e10  # float64 operations per second of Cholesky and dense products on two cores

_now = time.monotonic
Advance = Callable[[str, float], None]
_tell: ContextVar[Tell | None] = ContextVar("tell", default=None)  # None: outside any public call
_topic: ContextVar[str] = ContextVar("topic", default="")
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)
_end: ContextVar[float] = ContextVar("end", default=math.inf)  # by `clock`, of work under `within`
_late: ContextVar[float] = ContextVar("late", default=math.inf)  # and of work under `hurried`


def _drawn() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()  # notebooks set FORCE_COLOR, which rich believes


class Paced:
    """Prints what it is told on stderr, at most a line every 30 seconds: for output that no terminal shows."""

    def __init__(self) -> None:
        self.last = _now()

    def __call__(self, text: str) -> None:
        if sys.stderr is not None and _now() - self.last >= _EVERY:
            self.last = _now()
            print(f"lipbounds: {text}", file=sys.stderr, flush=True)


class _Terminal:
    """The last line on stderr, replaced by the next one; where stderr is no terminal, what `Paced` prints."""

    def __init__(self) -> None:
        self.started = _now()
        self.status: Any = None
        self.paced = Paced()
        self.lock = threading.Lock()  # of the status, which would be begun twice, and one of them never ended

    def __call__(self, text: str) -> None:
        if not _drawn():
            self.paced(text)
            return
        with self.lock:
            if self.status is None and _now() - self.started > _PATIENCE:
                self.status = self.console().status("")
                self.status.start()
            if self.status is not None:
                from rich.markup import escape

                self.status.update(escape(text))

    @staticmethod
    def console() -> Any:
        from rich.console import Console

        return Console(stderr=True)

    def clear(self) -> None:
        with self.lock:
            if self.status is not None:
                self.status.stop()
                self.status = None


@contextmanager
def reporting(progress: Progress) -> Iterator[None]:
    """Direct lines reported inside as `progress` says; ValueError unless it is a bool or a function."""
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ValueError(f"progress must be True, False or a function of one text, got {progress!r}")
    if progress is True and _tell.get() is not None:
        yield
        return
    screen = _Terminal()
    tell = screen if progress is True else progress or (lambda text: None)
    token = _tell.set(tell)
    try:
        yield
    finally:
        _tell.reset(token)
        screen.clear()


@contextmanager
def about(topic: str) -> Iterator[None]:
    """Prefix lines reported inside with the topic."""
    token = _topic.set(f"{_topic.get()}{topic}, ")
    try:
        yield
    finally:
        _topic.reset(token)


def say(text: str) -> None:
    """Report one line of progress."""
    alive()
    tell = _tell.get()
    if tell is not None:
        tell(_topic.get() + text)


def remaining(began: float, done: float, total: float) -> str:
    """How long the rest of `total` takes, ", about 12 s left", at the rate since `began` (`clock`).

    "" until a rate is known, and where less than a second is left.
    """
    spent = _now() - began
    left = spent * (total / done - 1.0) if done > 0 else 0.0
    return f", about {show_seconds(left)} left" if spent >= _PATIENCE and left >= 1.0 else ""


class Pace:
    """`remaining`, at the rate since the first call: what came before it, a first step, is mostly compilation."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None

    def __call__(self, done: float, total: float) -> str:
        began, first = self.first = self.first or (_now(), done)
        return remaining(began, done - first, total - first)


def clock() -> float:
    """Seconds since some moment: the clock of all progress."""
    return _now()


class Stopped(BaseException):
    """Raised by `alive` in the workers of a call that was interrupted."""


@contextmanager
def stoppable(event: threading.Event | None = None) -> Iterator[None]:
    """Let `alive` end the work that threads do in copies of this context, once the call is interrupted or fails.

    Or once the event is set, if one is given.
    """
    event = event or threading.Event()
    token = _stop.set(event)
    try:
        yield
    except BaseException:
        event.set()
        raise
    finally:
        _stop.reset(token)


class OutOfTime(BaseException):
    """Raised by `alive` where the time of `within` is over."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """End the work inside with OutOfTime at its first `alive`, or `say`, after so many seconds."""
    token = _end.set(min(_end.get(), _now() + seconds))
    try:
        yield
    finally:
        _end.reset(token)


@contextmanager
def hurried(seconds: float) -> Iterator[None]:
    """Let searches inside, each step of which has a bound, end with the one that they have after so many seconds."""
    token = _late.set(min(_late.get(), _now() + seconds))
    try:
        yield
    finally:
        _late.reset(token)


def late() -> bool:
    """Whether a search should end with the bound that it has."""
    return _now() >= _late.get()


def alive() -> None:
    """Raise `Stopped` in a worker of a call that has ended; long work calls this about every half second.

    OutOfTime where the time of the work is over.
    """
    event = _stop.get()
    if event is not None and event.is_set():
        raise Stopped
    if _now() >= _end.get():
        raise OutOfTime


def proof_seconds(rows: int, columns: int) -> float:
    """Estimated time to prove the norm of one block: its Gram matrix (often sparse) and Cholesky factor."""
    small, wide = sorted((float(rows), float(columns)))
    return (small**3 / 3 + small**2 * wide / 4) / _RATE


def show_seconds(seconds: float) -> str:
    """Seconds as "12 s", or as minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def meter(count: int, seconds: float) -> Iterator[Advance]:
    """Yields advance(what, seconds), to be called when a block is done.

    It moves a bar if the total is estimated above 5 seconds and stderr is a terminal, else it reports lines of text,
    which say how long the rest takes at the rate so far.
    """
    screen = _tell.get()
    console = screen.console() if isinstance(screen, _Terminal) and seconds >= _QUIET else None
    said = f"proving the norms of {count} blocks, about {show_seconds(seconds)} on two cores"
    if console is None or not (_drawn() and console.is_terminal):
        if console is not None and seconds >= _ALWAYS:
            print(f"lipbounds: {said}", file=sys.stderr)
        done, began = 0.0, _now()

        def tell(what: str, cost: float) -> None:
            nonlocal done
            done += cost
            # What is done first may be too little to tell a rate.
            known = done > 0.0 and done >= _TELLING * seconds
            left = (_now() - began) * (seconds / done - 1.0) if known else seconds - done
            say(f"{what}, about {show_seconds(left)} left" if seconds >= _QUIET and left >= 1.0 else what)

        yield tell
        return
    assert isinstance(screen, _Terminal)
    screen.clear()
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console.print(f"[dim]lipbounds: {said}; guarantee='probabilistic' needs seconds[/dim]", highlight=False)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("first block", total=seconds)

        def advance(what: str, cost: float) -> None:
            bar.update(task, advance=cost, description=what)

        yield advance
