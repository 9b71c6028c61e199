"""A progress bar on stderr for proofs that take long, with their estimated cost said beforehand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_QUIET = 5.0  # seconds of estimated work below which nothing is shown
_ALWAYS = 60.0  # above this the estimate is printed (one line) even where stderr is no terminal
_RATE = 4e10  # float64 operations per second of Cholesky and dense products on two cores

Advance = Callable[[str, float], None]


def proof_seconds(rows: int, columns: int) -> float:
    """About how long a proof of the norm of one block takes: its Gram matrix (often sparse) and its Cholesky factor."""
    small, wide = sorted((float(rows), float(columns)))
    return (small**3 / 3 + small**2 * wide / 4) / _RATE


def _text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@contextmanager
def meter(count: int, seconds: float, hook: Callable[[str], None] | None = None) -> Iterator[Advance]:
    """Yields advance(what, seconds), to be called when a block is done.

    Where the whole is estimated below 5 seconds, or stderr is no terminal, nothing is drawn. With a `hook` it is called
    with every `what` instead.
    """
    if hook is not None:
        yield lambda what, _: hook(what)
        return
    if seconds < _QUIET:
        yield lambda what, _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    drawn = console.is_terminal or console.is_jupyter
    said = f"proving the norms of {count} blocks, about {_text(seconds)} on two cores"
    if not drawn:
        if seconds >= _ALWAYS:
            print(f"lipbounds: {said}", file=sys.stderr)
        yield lambda what, _: None
        return
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
