"""`lipbounds evaluate`: what a trained network is worth, as tables, JSON, a figure and a page."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lipbounds._cli import tables
from lipbounds._cli.common import Json, check_target, refusals
from lipbounds._cli.options import (
    DataDirOption,
    DatasetOption,
    ForceOption,
    JsonOption,
    ManyNumbers,
    RunPath,
    SeedOption,
    Verb,
    eps_of,
)

if TYPE_CHECKING:
    from rich.table import Table

RECORD = "evaluation.json"


class ManyValues(ManyNumbers):
    """Lets `--methods naive liplt` stand for `--methods naive --methods liplt`, and the same for `--eps`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        words = False
        for arg in args:
            if words and arg in Verb.__members__ and spread[-1] != "--methods":
                spread.append("--methods")
            elif arg not in Verb.__members__:
                words = arg == "--methods" or arg.startswith("--methods=")
            spread.append(arg)
        return super().parse_args(ctx, spread)


def evaluate(
    run: RunPath,
    data_dir: DataDirOption = None,
    dataset: DatasetOption = None,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            "--eps",
            metavar="NUMBER...",
            parser=eps_of,
            show_default="1.58 for MNIST, 36/255 for CIFAR and Tiny-ImageNet, 0.5 for digits",
            help="l2 radii in pixel values in [0, 1]; several may follow.",
        ),
    ] = None,
    methods: Annotated[
        list[Verb] | None,
        typer.Option(
            "--methods",
            metavar="NAME...",
            show_default="naive liplt lipsdp",
            help="The bounds that certify; several may follow.",
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default="all", help="So many test images, the first ones."),
    ] = None,
    pgd_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Gradient steps of an attack.")] = 100,
    pgd_restarts: Annotated[
        int, typer.Option(metavar="N", min=1, help="Attacks on an image, the first from the image itself.")
    ] = 1,
    paper_units: Annotated[
        bool,
        typer.Option(
            "--paper-units", help="Take eps in the units of the published code, and say what they are."
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            exists=True,
            show_default=False,
            help="Another run on the same data, whose radii are set against these.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            show_default="the run; nothing for a model file",
            help="Where evaluation.json, evaluation.html, radii.png and radii.svg are written.",
        ),
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Evaluate a trained network: clean accuracy, accuracy under attack, certified accuracy.

    Certified accuracy is proved and accuracy under attack is attained, both in the l2 norm and in pixel values;
    the robust accuracy lies between. The second table shows what the bounds say about pairs of classes.

    Examples:

    - `lipbounds evaluate runs/mnist --data-dir data --eps 1.58`

    - `lipbounds evaluate runs/crm --against runs/plain --pgd-steps 200 --pgd-restarts 5`

    - `lipbounds evaluate report/mlp.safetensors --dataset digits --methods liplt lipsdp --json mlp.json`
    """
    check_dataset(run, dataset)
    with refusals():
        folder = out if out is not None else run if run.is_dir() else None
        check_target(json, force)
        _check_folder(folder, force)
        from lipbounds._text.version import __version__
        from lipbounds.analysis import evaluation
        from lipbounds.analysis.demo import FORMAT, FORMAT_VERSION, write_json
        from lipbounds.analysis.evaluation_report import write_evaluation_report
        from lipbounds.training import data

        subject = open_subject(run, dataset)
        other = None if against is None else open_subject(against, subject.dataset)
        if other is not None and other.dataset != subject.dataset:
            raise ValueError(f"{against} is a run on {other.dataset}, {run} one on {subject.dataset}")
        factor, explanation = evaluation.paper_units(subject.dataset)
        levels = list(eps or [evaluation.USUAL_EPS[subject.dataset]])
        names = [method.value for method in methods or Verb]
        with tables.working() as tell:
            tell(f"reading {subject.dataset}")
            test = data.load(subject.dataset, data_dir if data_dir is not None else subject.data_dir)
            for one in (subject, other):
                check_images(one, test)
            options: Json = {"images": images, "seed": seed}
            found = evaluation.evaluate(
                subject.model,
                test.test_x,
                test.test_y,
                eps=levels,
                pgd_steps=pgd_steps,
                pgd_restarts=pgd_restarts,
                paper_units=factor if paper_units else None,
                methods=_bounds(subject, names, test, tell),
                progress=tell,
                **options,
            )
            if found["paper_units"] is not None:
                found["paper_units"]["text"] = explanation
            if other is not None:
                found["against"] = {
                    "model": other.record(),
                    **evaluation.certificates(
                        other.model,
                        test.test_x,
                        test.test_y,
                        eps=found["eps"],
                        methods=_bounds(other, names, test, tell),
                        progress=tell,
                        **options,
                    ),
                }
        record = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "lipbounds": __version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": _command(
                run,
                data_dir,
                dataset,
                levels,
                names,
                images,
                pgd_steps,
                pgd_restarts,
                paper_units,
                against,
                seed,
            ),
            "model": subject.record(),
            **found,
        }
        _print(record)
        if json is not None:
            write_json(json, record)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RECORD, record)
            page = write_evaluation_report(record, folder)
            tables.say(tables.console(), f"page: {page}")


# ------------------------------------------------------------------------------------------------- helpers
@dataclasses.dataclass(frozen=True)
class _Subject:
    """A network to be evaluated; `data_dir` is where its run found the data."""

    path: Path
    title: str
    dataset: str
    data_dir: str | None
    model: Any
    spec: Any

    def record(self) -> Json:
        return {
            "path": str(self.path),
            "title": self.title,
            "dataset": self.dataset,
            "architecture": self.spec.architecture,
            "arguments": dict(self.spec.arguments),
        }


def check_dataset(run: Path, dataset: str | None) -> None:
    if dataset is not None and run.is_dir():
        raise typer.BadParameter("a run knows its own data set", param_hint="--dataset")
    if dataset is None and not run.is_dir():
        raise typer.BadParameter("a model file needs one, such as digits", param_hint="--dataset")


def open_subject(path: Path, dataset: str | None) -> _Subject:
    """A run, or a model file of that data set."""
    from lipbounds.training.data import DATASETS
    from lipbounds.training.runs import open_run
    from lipbounds.training.store import load_model

    if path.is_dir():
        run = open_run(path)
        config = run.config
        if run.data != config.dataset:
            raise ValueError(
                f"{path} was trained on {run.data}, not on {config.dataset}: evaluate its model with your own images, "
                "lb.certified_radius(lb.trace(model, x[0]), x, y)"
            )
        how = f"CRM with {config.constants}" if config.loss == "crm" else config.loss
        return _Subject(path, f"{config.arch}, {how}", config.dataset, config.data_dir, run.model, run.spec)
    if dataset is None or dataset not in DATASETS:
        raise ValueError(f"there is no data set {dataset!r}; known are {', '.join(DATASETS)}")
    model, spec = load_model(path)
    return _Subject(path, path.stem, dataset, None, model, spec)


def _bounds(subject: _Subject, names: list[str], test: Any, tell: Any) -> list[Any]:
    """The methods; in the place of "lipsdp" the bound that the run's certificate proves, if there is one."""
    from lipbounds.analysis.evaluation import certified_bound
    from lipbounds.errors import CertificateError
    from lipbounds.training.runs import CERTIFICATE

    path = subject.path / CERTIFICATE
    if not path.is_file() or "lipsdp" not in names:
        return list(names)
    tell("proving the run's certificate again")
    try:
        bound = certified_bound(path, subject.model, test.test_x)
    except CertificateError as error:
        raise CertificateError(
            f"{path} is refused: {error} (without that file LipSDP is computed anew)"
        ) from error
    return [bound if name == "lipsdp" else name for name in names]


def check_images(subject: _Subject | None, test: Any) -> None:
    if subject is not None and tuple(subject.spec.input_shape) != tuple(test.input_shape):
        raise ValueError(
            f"{subject.path} takes images of shape {tuple(subject.spec.input_shape)}, {test.name} has "
            f"{tuple(test.input_shape)}"
        )


def _check_folder(folder: Path | None, force: bool) -> None:
    """ValueError before any work is done if our files would replace those of another program."""
    from lipbounds.analysis.demo import is_ours
    from lipbounds.analysis.evaluation_report import FIGURES, PAGE

    if folder is None or force or is_ours(folder / RECORD):
        return
    there = [name for name in (RECORD, PAGE, *FIGURES) if (folder / name).exists()]
    if there:
        raise ValueError(
            f"{folder} holds {', '.join(there)}, not written by `lipbounds evaluate`: choose another folder with "
            "--out, or pass --force"
        )


def _command(
    run: Path,
    data_dir: Path | None,
    dataset: str | None,
    eps: list[float],
    methods: list[str],
    images: int | None,
    steps: int,
    restarts: int,
    paper_units: bool,
    against: Path | None,
    seed: int,
) -> str:
    """The command that gives the same record, every setting spelled out."""
    words = ["lipbounds", "evaluate", str(run), "--eps", *map(repr, eps), "--methods", *methods]
    words += ["--pgd-steps", str(steps), "--pgd-restarts", str(restarts), "--seed", str(seed)]
    for name, value in (
        ("--data-dir", data_dir),
        ("--dataset", dataset),
        ("--images", images),
        ("--against", against),
    ):
        words += [] if value is None else [name, str(value)]
    return shlex.join([*words, *(["--paper-units"] if paper_units else [])])


def _print(record: Json) -> None:
    console = tables.console()
    console.print()
    console.print(accuracy_table(record))
    console.print(constants_table(record))
    if "against" in record:
        console.print(constants_table(record["against"]))
    inside = record["inside"]
    settings = record["pgd_settings"]
    starts = "1 start" if settings["restarts"] == 1 else f"{settings['restarts']} starts"
    lines = [
        f"PGD: {settings['steps']} steps, {starts}; l-inf within the ball that the l2 ball contains",
        f"attacked inside their radius: {inside['images']} images, {inside['broken']} broken",
    ]
    if record["rounding"]:
        lines.append(
            f"{record['rounding']} decisions within float32 rounding of a tie were settled in real arithmetic"
        )
    from lipbounds.analysis.evaluation import FROM_CERTIFICATE

    lines += [
        f"{name}: {FROM_CERTIFICATE}" for name, notes in record["notes"].items() if FROM_CERTIFICATE in notes
    ]
    lines += [f"{name} is not here: {reason}" for name, reason in record["refused"].items()]
    if record["paper_units"] is not None:
        lines.append(record["paper_units"]["text"])
        for pixel, given in record["paper_units"]["given"].items():
            lines.append(f"eps {given:.6g} as asked is {float(pixel):.6g} in pixel values")
    for line in lines:
        tables.say(console, line)


def accuracy_table(record: Json) -> Table:
    """Clean, attacked and certified accuracy (rows) at every eps (columns)."""
    from lipbounds.analysis.experiment import LABELS
    from lipbounds.results import NORM_NAMES, check_norm

    keys = [str(e) for e in record["eps"]]
    table = tables.titled(
        f"{record['model']['title']}: {record['images']} test images of {record['model']['dataset']}"
    )
    table.add_column("accuracy")
    table.add_column("guarantee", no_wrap=True)
    for e in record["eps"]:
        table.add_column(f"eps {e:.4g}", justify="right", no_wrap=True)
    table.add_row("clean", "", *(_percent(record["clean"]) for _ in keys))
    for norm, row in record["pgd"].items():
        table.add_row(
            f"PGD {NORM_NAMES[check_norm(norm)]}", "attained", *(_percent(row[key]) for key in keys)
        )
    for method, row in record["certified"].items():
        word = record["guarantee"][method]
        table.add_row(f"certified {LABELS.get(method, method)}", word, *(_percent(row[key]) for key in keys))
    return table


def constants_table(record: Json) -> Table:
    """Table 2 of arXiv 2310.00116: upper bounds of the constants of z_i - z_j, averaged over pairs of classes."""
    from lipbounds._text.tables import seconds_text, show
    from lipbounds.analysis.experiment import LABELS

    table = tables.titled(f"{record['model']['title']}: l2 constants, averaged over pairs of classes")
    table.add_column("method", no_wrap=True)
    for column in ("L_ij", "L_i + L_j", "sqrt(2) L", "median radius"):
        table.add_column(column, justify="right")
    table.add_column("guarantee")
    table.add_column("time", justify="right")
    for method, row in record["constants"].items():
        bounds = [f"≤ {show(row[key], 'up', 5)}" for key in ("average_pair", "average_sum", "average_sqrt2")]
        quartiles = record["radii"].get(method, {}).get("quartiles")
        radius = "" if not quartiles else "inf" if quartiles[1] is None else show(quartiles[1], "down", 4)
        time = seconds_text(record["seconds"][method])
        table.add_row(LABELS.get(method, method), *bounds, radius, record["guarantee"][method], time)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
