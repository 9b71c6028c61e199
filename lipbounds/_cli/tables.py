"""Output of the commands: progress, tables and lines of results."""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from lipbounds._text import Pace, clock, remaining
from lipbounds._text.progress import Paced

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = dict[str, Any]
_ASCII = {"\u2264": "<=", "\u2265": ">=", "\u2248": "~", "\u2026": "..."}


def console() -> Console:
    from rich.console import Console

    return Console()


def show_table(console: Console, table: Table) -> None:
    """Print a table, on lines longer than the window where entries would be cut off or broken otherwise."""
    from rich.console import Console
    from rich.measure import Measurement

    least = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    width = max(console.width, least)
    (console if width == console.width else Console(file=console.file, width=width)).print(table)


def print_anywhere() -> None:
    """Let stdout and stderr write what their encoding lacks in other letters, in place of an error at the end."""

    def letters(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        return "".join(_ASCII.get(sign, "?") for sign in error.object[error.start : error.end]), error.end

    codecs.register_error("lipbounds", letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lipbounds")


@contextlib.contextmanager
def afterwards(result: Callable[[], None]) -> Iterator[list[str]]:
    """Print a result once its files are written, or could not be; then the lines that were added to the list.

    In this order neither a full disk nor a closed pipe (`| head`) loses the other half.
    """
    lines: list[str] = []
    try:
        yield lines
    finally:
        result()
        for line in lines:
            say(console(), line)


def say(console: Console, text: str) -> None:
    """Print text literally, without interpreting names and paths as markup."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


def titled(title: str) -> Table:
    """An empty table under a literal title."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Yields tell(what is being done, share of the whole): a bar on a terminal, elsewhere lines on stderr (`Paced`)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    paced, began = Paced(), clock()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)

        def tell(what: str, share: float) -> None:
            bar.update(task, description=what, completed=share)
            if not console.is_terminal:
                paced(f"{what}; {100 * share:.0f} % done{remaining(began, share, 1.0)}")

        yield tell


@contextlib.contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """Yields tell(text), which shows the current activity on stderr: on a terminal, elsewhere as lines (`Paced`)."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    drawn = console.is_terminal and sys.stderr.isatty()  # notebooks set FORCE_COLOR
    with Progress(*columns, console=console, transient=True, disable=not drawn) as bar:
        task = bar.add_task("starting", total=None)
        yield (lambda text: bar.update(task, description=text)) if drawn else Paced()


@contextlib.contextmanager
def training(epochs: int, quiet: bool = False) -> Iterator[Callable[[Json, str], None]]:
    """Yields tell(record of an epoch, text): a bar on a terminal; elsewhere lines (`Paced`, and validated epochs).

    On both an epoch with a warning has a line where the one before it had none.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the data, compiling", total=epochs)
        paced, warned, pace = Paced(), False, Pace()

        def tell(record: Json, text: str) -> None:
            nonlocal warned
            epoch = record["epoch"]
            bar.update(task, completed=epoch, description=text)
            left = pace(epoch, epochs)  # from the first of these records on, as a run may be resumed
            own = "clean" in record or ("warning" in record and not warned)
            if console.is_terminal or quiet:
                line = f"epoch {epoch}: {text}"
            else:
                line = f"epoch {epoch} of {epochs}{left}: {text}"
            if own:
                say(console, line)
                paced.last = clock()
            elif not (console.is_terminal or quiet):
                paced(line)
            warned = "warning" in record

        yield tell


class Rows:
    """Progress over several training runs: a bar on a terminal, and a line for every row and every tenth epoch."""

    def __init__(self, names: list[str], console: Any, bar: Any):
        self.names, self.console, self.bar = names, console, bar
        self.task = bar.add_task("starting", total=None)
        self.told = ""
        self.paced = Paced()

    def say(self, text: str) -> None:
        """What is being done."""
        self.bar.update(self.task, description=text)
        if text.startswith(("training", "bounding and")):
            place = next((k for k, name in enumerate(self.names) if text.endswith(f" {name}")), 0)
            say(self.console, f"row {place + 1} of {len(self.names)}: {text}")

    def epoch(self, row: Any, record: Json, left: float | None) -> None:
        """An epoch of a row, and the seconds of training ahead in all rows."""
        text = f"{row.name}, epoch {record['epoch']}: {100 * record['accuracy']:.1f} % correct in training"
        if record.get("certified_estimate") is not None:
            text += f", {100 * record['certified_estimate']:.1f} % certified (estimate)"
        text += "" if left is None else f"; about {_duration(left)} of training left"
        self.bar.update(self.task, description=text)
        if not self.console.is_terminal:
            self.paced(text)
        if "warning" in record and self.told != row.name:
            self.told = row.name
            say(self.console, f"{row.name}, epoch {record['epoch']}: WARNING: {record['warning']}")
        elif record["epoch"] % 10 == 0 or record["epoch"] == 1:
            say(self.console, text)


def _duration(seconds: float) -> str:
    """Minutes, or hours and minutes."""
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if minutes < 2
        else f"{minutes // 60} h {minutes % 60} min"
        if minutes > 90
        else f"{minutes} min"
    )


@contextlib.contextmanager
def training_rows(names: list[str]) -> Iterator[Rows]:
    """Yields progress over the runs of these rows, on stderr."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Rows(names, console, bar)


def proved(certificate: Any, seconds: float) -> str:
    """One line with the claim of a certificate that was just proved again."""
    from lipbounds._text.tables import seconds_text, show
    from lipbounds.results import NORM_NAMES

    k = certificate.num_outputs
    pairs = "" if certificate.pairwise is None else f", {k * (k - 1) // 2} pairs"
    risk = certificate.failure_probability
    word = certificate.guarantee + (f", fails with probability <= {show(risk, digits=3)}" if risk else "")
    claim = f"L <= {show(certificate.value, 'up')} ({NORM_NAMES[certificate.norm]}, {word})"
    return f"{claim}{pairs}, proved again in {seconds_text(seconds)}"


def model_title(model: Json) -> str:
    training = model["training"]
    return f"{model['title']}: {100 * training['test_accuracy']:.1f} % of the test images correct"


def results_table(model: Json, title: str) -> Table:
    from rich.text import Text

    from lipbounds._text.tables import entry, seconds_text

    table = titled(title)
    table.show_edge = table.pad_edge = False  # to stay within 80 columns
    local = next((row["local"] for row in model["upper"] if "local" in row), None)
    table.caption = "radius: median of the certified radii, 0 where misclassified, in pixel units" + (
        f"; local: by bounds near each image, {local['guarantee']}" if local else ""
    )
    table.caption_justify = "left"
    table.add_column("method", no_wrap=True)
    table.add_column("norm")
    for column in ("bound", "worst pair", "radius", *(["local"] if local else [])):
        table.add_column(column, justify="right")
    table.add_column("guarantee", overflow="fold")
    table.add_column("time", justify="right")
    styles = dict(verified="green", probabilistic="cyan", assumed="yellow", estimate="dim", attained="red")
    signs = {"upper": ("≤ ", "up"), "estimate": ("≈ ", "near"), "lower": ("≥ ", "down")}
    for norm in ("2", "inf", "1"):
        for kind, (sign, way) in signs.items():
            for row in (r for r in model[kind] if r["norm"] == norm):
                word = row.get("guarantee", "attained")
                pair = row.get("pairs", {}).get("worst_value")
                table.add_row(
                    Text(row["label"]),
                    norm,
                    sign + entry(row["value"], way, 5),  # type: ignore[arg-type]
                    "" if pair is None else sign + entry(pair, way, 4),  # type: ignore[arg-type]
                    median_radius(row.get("certified", {}), 3),
                    *([median_radius(row.get("local", {}), 3)] if local else []),
                    Text(word, styles[word]),
                    seconds_text(row["seconds"]),
                )
        table.add_section()
    return table


def median_radius(record: Json, digits: int) -> str:
    """The median of the certified radii in a record, rounded down; "" where the record has none."""
    from lipbounds._text.tables import entry

    quartiles = record.get("quartiles")
    if not quartiles:
        return ""
    return "inf" if quartiles[1] is None else entry(quartiles[1], "down", digits)


def quartiles(radii: Any) -> list[float]:
    """The quartiles of the certified radii, 0 where misclassified, each one of the radii."""
    import numpy as np

    return [float(q) for q in np.quantile(radii.radius, (0.25, 0.5, 0.75), method="lower")]


def print_certified(bound: Any, radii: Any, shares: dict[float, float], assumed: bool = False) -> None:
    """Print what is certified; `assumed` where eps was given without its norm."""
    from lipbounds._margins.radius import listed
    from lipbounds._text.tables import entry, show
    from lipbounds.results import NORM_NAMES

    norm = NORM_NAMES[radii.norm]
    typer.echo(f"bound:     L <= {show(bound.value, 'up')} by {bound.method}, {bound.guarantee}")
    typer.echo(
        f"radii:     {radii.guarantee}, {len(radii.radius)} images, {norm}, units of the model's input"
    )
    typer.echo(f"clean:     {100 * radii.correct.mean():.1f} % classified as labelled")
    low, middle, high = (entry(q, "down", 4) for q in quartiles(radii))
    typer.echo(f"radius:    median {middle}, quartiles {low} and {high} (0 where misclassified)")
    for level, share in shares.items():
        tenths = 1000 * round(share * len(radii)) // max(len(radii), 1)  # a lower bound is rounded down
        typer.echo(f"eps {level:<7g} ({norm}) {tenths / 10:5.1f} % certified")
    if assumed:
        typer.echo(f"norm:      {norm}, as --norm was not given (choose 2, inf or 1)")
    if radii.counts:
        typer.echo(f"outcome:   {listed(radii.counts)}")
    for note in radii.notes:
        typer.echo(f"note:      {note}")


def print_bracket(both: Any) -> None:
    """Certified accuracy and accuracy under attack at every eps: the robust accuracy lies between them."""
    from lipbounds._text.tables import percent
    from lipbounds.results import NORM_NAMES

    norm = NORM_NAMES[both.norm]
    if any(both.attacked):
        told = f"{both.attack} in {norm}, on the images that are not certified; attained, no certificate"
    else:
        told = "not needed: every correctly classified image is certified at these eps"
    typer.echo(f"attack:    {told}")
    typer.echo(f"clean:     {100 * both.clean:.1f} % correct")
    for row in both.rows():
        ends = percent(row["certified"], "down"), percent(row["attacked"], "up")
        typer.echo(f"eps {row['eps']:<7g} {ends[0]} % certified <= robust <= {ends[1]} % under attack")
    for note in both.notes:
        typer.echo(f"note:      {note}")
