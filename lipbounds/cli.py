"""The command line: `lipbounds demo`, `lipbounds bounds`, `lipbounds certify`.

Exit codes: 0 done, 1 the computation refused or failed (one message on stderr), 2 wrong usage.
Everything heavy is imported inside the commands.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from lipbounds._version import __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = dict[str, Any]


class Norm(enum.StrEnum):
    one = "1"
    two = "2"
    inf = "inf"


class Guarantee(enum.StrEnum):
    auto = "auto"
    verified = "verified"
    probabilistic = "probabilistic"
    estimate = "estimate"


class Proof(enum.StrEnum):
    """The guarantees that a radius can have."""

    auto = "auto"
    verified = "verified"
    probabilistic = "probabilistic"


class Verb(enum.StrEnum):
    naive = "naive"
    liplt = "liplt"


class AnyVerb(enum.StrEnum):
    naive = "naive"
    liplt = "liplt"
    all = "all"


class Scaling(enum.StrEnum):
    none = "none"
    aol = "aol"
    sll = "sll"
    optimized = "optimized"


class ManyNumbers(TyperCommand):
    """Lets `--eps 0.1 0.25` stand for `--eps 0.1 --eps 0.25`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        numbers = False
        for arg in args:
            if numbers and _is_number(arg) and spread[-1] != "--eps":
                spread.append("--eps")
            elif arg.startswith("-") and not _is_number(arg):
                numbers = arg == "--eps" or arg.startswith("--eps=")
            elif not _is_number(arg):
                numbers = False
            spread.append(arg)
        return super().parse_args(ctx, spread)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


app = typer.Typer(
    name="lipbounds",
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        exists=True,
        dir_okay=False,
        show_default=False,
        help="A model file of ours (.safetensors), such as the demo writes.",
    ),
]
NormOption = Annotated[Norm, typer.Option(help="Norm in which the input moves.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
ScalingOption = Annotated[
    Scaling,
    typer.Option(help="Diagonal scaling of LipLT: none is the paper's recursion, optimized the tightest."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Also write the result as JSON.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Write even where files of another program stand.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lipbounds {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """How far must an input move before a network's answer can change? With a proof.

    Start with the demo. It trains two small networks on real digits and leaves their weights beside the
    report, where the other commands can take them up:

    - `lipbounds demo` writes `report/report.html`

    - `lipbounds bounds report/mlp.safetensors --pairwise` bounds the Lipschitz constants

    - `lipbounds certify report/mlp.safetensors --eps 0.1 0.25` certifies the test images

    What a result is worth is part of it. **verified** holds with every rounding error included,
    **probabilistic** except with a stated probability, **assumed** if what you declared is true; an
    **estimate** is no bound.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", file_okay=False, help="Where to write.")
    ] = Path("report"),
    seed: SeedOption = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 40,
    force: ForceOption = False,
) -> None:
    """Train two small networks on digits, bound them every way, certify them, write a report.

    Takes a few minutes at most and downloads nothing. Writes to the folder: `report.html` (one page with
    everything in it), the figures as PNG, `results.json`, and the two models as `.safetensors`.

    Examples:

    - `lipbounds demo`

    - `lipbounds demo --out /tmp/digits --seed 1 --epochs 10`
    """
    with _refusals():
        from lipbounds.analysis.demo import RESULTS, is_ours, run_demo

        if out.exists() and any(out.iterdir()) and not is_ours(out / RESULTS) and not force:
            raise ValueError(
                f"{out} holds files that are not ours (no {RESULTS} written by lipbounds): "
                "choose another folder with --out, or pass --force to write there anyway"
            )
        console = _console()
        command = f"lipbounds demo --out {out} --seed {seed} --epochs {epochs}"
        with _progress(console) as bar:
            task = bar.add_task("starting", total=1.0)
            results = run_demo(
                out,
                seed=seed,
                epochs=epochs,
                command=command,
                progress=lambda what, share: bar.update(task, description=what, completed=share),
            )
            bar.update(task, description="done", completed=1.0)
        for model in results["models"]:
            console.print()
            console.print(_results_table(model, _model_title(model)))
        console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
        console.print(
            f"next:   lipbounds certify {out / 'mlp.safetensors'} --eps 0.1 0.25",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def bounds(
    model: ModelPath,
    norm: NormOption = Norm.two,
    pairwise: Annotated[
        bool, typer.Option("--pairwise", help="Also a constant for every pair of classes.")
    ] = False,
    guarantee: Annotated[Guarantee, typer.Option(help="What the bound must be worth.")] = Guarantee.auto,
    method: Annotated[AnyVerb, typer.Option(help="The bound, or every one side by side.")] = AnyVerb.liplt,
    scaling: ScalingOption = Scaling.none,
    seed: SeedOption = 0,
    json: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Bound the Lipschitz constants of a saved model.

    The constant says by how much the outputs can change for each unit that the input moves, in the norm
    chosen and in the model's own input units.

    Examples:

    - `lipbounds bounds report/mlp.safetensors`

    - `lipbounds bounds report/mlp.safetensors --pairwise --scaling optimized`

    - `lipbounds bounds report/residual_cnn.safetensors --norm inf --method all --json bounds.json`
    """
    _check_scaling(method.value, scaling)
    with _refusals():
        _check_target(json, force)
        import lipbounds as lb
        from lipbounds.analysis.experiment import result_kind, result_record

        form, _ = _load(model)
        options: Json = {
            "norm": _norm(norm),
            "pairwise": pairwise,
            "guarantee": guarantee.value,
            "seed": seed,
        }
        record: Json = {"upper": [], "lower": [], "estimate": [], "refused": []}
        if method is AnyVerb.all:
            comparison = lb.compare(form, **options)
            typer.echo(repr(comparison))
            for row in comparison:
                if row.kind == "none":
                    record["refused"].append({"label": row.method, "norm": norm.value, "reason": row.reason})
                else:
                    record[row.kind].append(result_record(row.method, row.result))
        else:
            result = _bound(form, method.value, scaling, options)
            typer.echo(repr(result))
            record[result_kind(result)].append(result_record(method.value, result))
        _write(json, {"model": str(model), **record})


@app.command(cls=ManyNumbers)
def certify(
    model: ModelPath,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            "--eps",
            metavar="NUMBER...",
            min=0.0,
            help="Radii to certify at, in input units; several may follow.",
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(help="`digits` (the demo's test images) or a .npz file with arrays x and y.")
    ] = "digits",
    norm: NormOption = Norm.two,
    method: Annotated[Verb, typer.Option(help="The bound that proves the radii.")] = Verb.liplt,
    scaling: ScalingOption = Scaling.none,
    guarantee: Annotated[Proof, typer.Option(help="What the bound must be worth.")] = Proof.auto,
    pairwise: Annotated[
        bool,
        typer.Option("--pairwise/--no-pairwise", help="One constant per pair of classes, or one for all."),
    ] = True,
    seed: SeedOption = 0,
    json: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Certify images: no input closer than eps changes the answer.

    An image counts if it is classified correctly and its certified radius exceeds eps. Radii are in the
    units of the model's own input: for the demo's models pixel values in [0, 1].

    Examples:

    - `lipbounds certify report/mlp.safetensors --eps 0.1 0.25 0.5`

    - `lipbounds certify report/mlp.safetensors --data mine.npz --scaling optimized --json radii.json`
    """
    _check_scaling(method.value, scaling)
    levels = sorted(set(eps or (0.05, 0.1, 0.25)))
    if not all(math.isfinite(level) for level in levels):
        raise typer.BadParameter("eps must be finite", param_hint="--eps")
    with _refusals():
        _check_target(json, force)
        import numpy as np

        import lipbounds as lb

        form, spec = _load(model)
        x, y = _read_data(data, spec)
        options: Json = {
            "norm": _norm(norm),
            "pairwise": pairwise,
            "guarantee": guarantee.value,
            "seed": seed,
        }
        bound = _bound(form, method.value, scaling, options)
        radii = lb.certified_radius(form, x, y, bound=bound)
        radius = np.asarray(radii.radius)
        if not len(radius):
            raise ValueError(f"{data} holds no images")
        shares = [float(radii.accuracy(level)) for level in levels]
        _print_certified(bound, radii, levels, shares)
        _write(
            json,
            {
                "model": str(model),
                "data": data,
                "norm": norm.value,
                "bound": {
                    "kind": "upper",
                    "method": bound.method,
                    "value": bound.value,
                    "guarantee": bound.guarantee,
                },
                "guarantee": radii.guarantee,
                "notes": list(radii.notes),
                "images": len(radius),
                "certified_accuracy": [
                    {"eps": e, "accuracy": a} for e, a in zip(levels, shares, strict=True)
                ],
                "radius": [float(r) if math.isfinite(r) else "inf" for r in radius],
            },
        )


# ------------------------------------------------------------------------------------------------- helpers
@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn refusals and failures of files into one message on stderr and exit code 1."""
    from lipbounds.errors import GuaranteeError

    try:
        yield
    except (
        ValueError,
        ArithmeticError,
        OSError,
        GuaranteeError,
    ) as error:  # the library's refusals are ValueErrors
        typer.echo(f"lipbounds: {error}", err=True)
        raise typer.Exit(1) from None


def _norm(norm: Norm) -> float:
    return math.inf if norm is Norm.inf else int(norm.value)


def _check_scaling(method: str, scaling: Scaling) -> None:
    if method != "liplt" and scaling is not Scaling.none:
        raise typer.BadParameter(f"only --method liplt has a scaling, not {method}", param_hint="--scaling")


def _bound(form: Any, method: str, scaling: Scaling, options: Json) -> Any:
    import lipbounds as lb

    if method == "naive":
        return lb.naive(form, **options)
    return lb.liplt(form, **options, scaling=None if scaling is Scaling.none else scaling.value)


def _load(path: Path) -> tuple[Any, Any]:
    import numpy as np

    import lipbounds as lb
    from lipbounds.training.store import load_model

    network, spec = load_model(path)
    return lb.trace(network, np.zeros(spec.input_shape, np.float32)), spec


def _read_data(data: str, spec: Any) -> tuple[Any, Any]:
    """Images (n, *input_shape) and labels (n,) of `digits` or an .npz file; ValueError for anything else."""
    import zipfile

    import numpy as np

    if data == "digits":
        from lipbounds.training.data import digits

        test = digits()
        x, y = test.test_x, test.test_y
    else:
        try:
            with np.load(data, allow_pickle=False) as file:
                x, y = file["x"], file["y"]
        except (zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{data} is not an .npz file with arrays x and y: {error}") from error
    if x.shape[1:] != tuple(spec.input_shape):
        raise ValueError(
            f"{data} holds images of shape {x.shape[1:]}, the model takes {tuple(spec.input_shape)}"
        )
    if x.dtype.kind != "f":
        raise ValueError(f"{data}: x must hold floats in the model's input units, got {x.dtype}")
    return x, y


def _check_target(path: Path | None, force: bool) -> None:
    """ValueError before any work is done if `path` holds something that we did not write."""
    from lipbounds.analysis.demo import is_ours

    if path is None or force or not path.exists() or is_ours(path):
        return
    raise ValueError(f"{path} exists and was not written by lipbounds: choose another name, or pass --force")


def _write(path: Path | None, record: Json) -> None:
    if path is None:
        return
    from lipbounds.analysis.demo import FORMAT, FORMAT_VERSION, write_json

    write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, "lipbounds": __version__, **record})


def _console() -> Console:
    from rich.console import Console

    return Console()


def _progress(console: Console) -> Any:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console, transient=not console.is_terminal)


def _model_title(model: Json) -> str:
    training = model["training"]
    return f"{model['title']}: {100 * training['test_accuracy']:.1f} % of the test images correct"


def _results_table(model: Json, title: str) -> Table:
    from rich import box
    from rich.table import Table

    from lipbounds._tables import seconds_text, show

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.caption = "radius: the median of the certified radii, in pixel units"
    table.caption_justify = "left"
    table.add_column("method", no_wrap=True)
    table.add_column("norm")
    for column in ("bound", "worst pair", "radius"):
        table.add_column(column, justify="right")
    table.add_column("guarantee")
    table.add_column("time", justify="right")
    styles = {
        "verified": "green",
        "probabilistic": "cyan",
        "assumed": "yellow",
        "estimate": "dim",
        "attained": "red",
    }
    signs = {"upper": ("≤ ", "up"), "estimate": ("≈ ", "near"), "lower": ("≥ ", "down")}
    for norm in ("2", "inf", "1"):
        for kind, (sign, way) in signs.items():
            for row in (r for r in model[kind] if r["norm"] == norm):
                word = row.get("guarantee", "attained")
                pair = row.get("pairs", {}).get("worst_value")
                quartiles = row.get("certified", {}).get("quartiles") or []
                radius = (
                    "" if not quartiles else "inf" if quartiles[1] is None else show(quartiles[1], "down", 3)
                )
                table.add_row(
                    row["label"],
                    norm,
                    sign + show(row["value"], way, 5),  # type: ignore[arg-type]
                    "" if pair is None else sign + show(pair, way, 4),  # type: ignore[arg-type]
                    radius,
                    f"[{styles[word]}]{word}[/]",
                    seconds_text(row["seconds"]),
                )
        table.add_section()
    return table


def _print_certified(bound: Any, radii: Any, levels: list[float], shares: list[float]) -> None:
    from lipbounds._tables import show

    typer.echo(f"bound:     L <= {show(bound.value, 'up')} by {bound.method}, {bound.guarantee}")
    typer.echo(f"radii:     {radii.guarantee}, {len(radii.radius)} images, units of the model's input")
    for level, share in zip(levels, shares, strict=True):
        typer.echo(f"eps {level:<7g} {100 * share:5.1f} % certified")
    for note in radii.notes:
        typer.echo(f"note:      {note}")


def main() -> None:
    """Entry point of the `lipbounds` script."""
    app()


if __name__ == "__main__":
    main()
