"""`lipbounds forge`: small activations of a trained network are zeroed, and what that does is measured."""

from __future__ import annotations

import datetime
import enum
import math
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from lipbounds._cli import tables
from lipbounds._cli.common import Json, check_target, refusals
from lipbounds._cli.evaluate import check_dataset, check_images, open_subject
from lipbounds._cli.options import (
    DataDirOption,
    DatasetOption,
    ForceOption,
    JsonOption,
    ManyNumbers,
    RunPath,
    SeedOption,
    eps_of,
    number,
)

SEARCHED = 500  # training images that c_r is chosen on


class Kind(enum.StrEnum):
    hard = "hard"
    smooth = "smooth"


class ManyRatios(ManyNumbers):
    """Lets `--c-r 0 2^-7` stand for `--c-r 0 --c-r 2^-7`."""

    many = "--c-r"


def forge(
    run: RunPath,
    c_r: Annotated[
        list[str] | None,
        typer.Option(
            "--c-r",
            metavar="NUMBER...",
            show_default="2^-8 to 2^-4",
            help="Thresholds as shares of the largest activation, such as 2^-7; several may follow.",
        ),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="The gate: it jumps, or has slopes.")] = Kind.hard,
    tau: Annotated[float, typer.Option(metavar="NUMBER", help="Width of the smooth gate.")] = 0.1,
    quantile: Annotated[
        float, typer.Option(metavar="NUMBER", help="Of the images' largest activations; 1 is the maximum.")
    ] = 1.0,
    data_dir: DataDirOption = None,
    dataset: DatasetOption = None,
    eps: Annotated[
        float | None,
        typer.Option(
            metavar="NUMBER",
            parser=eps_of,
            show_default="8/255; 0.1 for MNIST",
            help="l-inf radius of attacks, in pixel values in [0, 1].",
        ),
    ] = None,
    images: Annotated[int, typer.Option(metavar="N", min=1, help="Test images, the first ones.")] = 500,
    pgd_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Gradient steps of an attack.")] = 20,
    queries: Annotated[int, typer.Option(metavar="N", min=1, help="Queries of the Square attack.")] = 300,
    checks: Annotated[
        bool, typer.Option("--checks/--no-checks", help="Look for signs of gradient masking.")
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            file_okay=False,
            show_default="the run; nothing for a model file",
            help="Where forged.safetensors, forged.json and forged.html are written.",
        ),
    ] = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Zero small activations of a trained network (forged layers), and measure what that does.

    In front of convolutional and linear layers everything below c_r times the largest activation becomes zero
    (arXiv 2406.19622). Reports accuracy, under attack too, and for every layer empirical constants, eigenvalues and
    Gershgorin discs. Nothing of that is a certificate. Of several c_r the best under PGD on training images is saved.

    Examples:

    - `lipbounds forge runs/digits`

    - `lipbounds forge runs/mnist --data-dir data --c-r 0 2^-7 2^-5 --eps 0.1`

    - `lipbounds forge report/residual_cnn.safetensors --dataset digits --c-r 2^-6 --out forged`
    """
    values = [_ratio(text) for text in c_r] if c_r else [2.0**-k for k in range(8, 3, -1)]
    check_dataset(run, dataset)
    if eps is not None and not 0 < eps <= 1:
        raise typer.BadParameter(
            f"eps must be > 0 and at most 1, as pixel values lie in [0, 1], got {eps:g}: such as 8/255",
            param_hint="--eps",
        )
    with refusals():
        folder = out if out is not None else run if run.is_dir() else None
        check_target(json, force)
        from lipbounds._text.version import __version__
        from lipbounds.analysis.demo import FORMAT, FORMAT_VERSION, is_ours, write_json
        from lipbounds.analysis.forge_search import search_c_r
        from lipbounds.analysis.forging_report import (
            PAGE,
            RECORD,
            THRESHOLDS,
            forging_record,
            write_forging_report,
        )
        from lipbounds.analysis.forging_study import claims, study
        from lipbounds.analysis.masking import gradient_masking
        from lipbounds.training import data

        if folder is not None and not force and not is_ours(folder / RECORD):
            there = [name for name in (RECORD, PAGE, THRESHOLDS) if (folder / name).exists()]
            if there:
                raise ValueError(
                    f"{folder} holds {', '.join(there)}, not written by `lipbounds forge`: choose another folder with "
                    "--out, or pass --force"
                )
        subject = open_subject(run, dataset)
        radius = eps if eps is not None else 0.1 if subject.dataset == "mnist" else 8 / 255
        gates: Json = {"kind": kind.value, "tau": tau, "quantile": quantile}
        with tables.working() as tell:
            tell(f"reading {subject.dataset}")
            test = data.load(subject.dataset, data_dir if data_dir is not None else subject.data_dir)
            check_images(subject, test)
            x, y = test.test_x[:images], test.test_y[:images]
            attack: Json = {"eps": radius, "seed": seed, "progress": tell}
            if len(set(values) - {0.0}) > 1:
                picked = search_c_r(
                    subject.model,
                    test.train_x[:SEARCHED],
                    test.train_y[:SEARCHED],
                    sorted({*values}),
                    data=test.train_x,
                    steps=pgd_steps,
                    **attack,
                    **gates,
                )
                chosen = picked.best.c_r
                on = f"the best under PGD on {min(SEARCHED, len(test.train_y))} training images"
            else:
                chosen, on = max(values), "the one asked for"
            found = study(
                subject.model,
                x,
                y,
                data=test.train_x,
                candidates=values,
                steps=pgd_steps,
                queries=queries,
                **attack,
                **gates,
            )
            network = found.forged.with_c_r(chosen)
            signs = None
            if checks and chosen > 0:
                signs = gradient_masking(
                    network, subject.model, x, y, steps=pgd_steps, queries=queries, **attack
                )
            rows = claims(found, signs)
        record: Json = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "lipbounds": __version__,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": _command(run, locals()),
            "model": subject.record(),
            **forging_record(found, chosen, on, rows, signs),
        }
        console = tables.console()
        shown = [repr(found), repr(next(row for row in found.rows if row.c_r == chosen).diagnosis)]
        for text in [*shown, *([] if signs is None else [repr(signs)]), _claims(rows)]:
            tables.say(console, f"\n{text}")
        if json is not None:
            write_json(json, record)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            network.save(folder / THRESHOLDS)
            write_json(folder / RECORD, record)
            page = write_forging_report(record, found, signs, folder)
            tables.say(console, f"\npage: {page}")


def _ratio(text: str) -> float:
    """A number such as 0.01, 2^-7 or 2**-7."""
    try:
        value = number(text)
    except (ValueError, OverflowError, ZeroDivisionError):
        value = math.nan
    if not (isinstance(value, float) and 0 <= value < 1):
        raise typer.BadParameter(f"{text} is no number in [0, 1), such as 0.01 or 2^-7", param_hint="--c-r")
    return value


def _claims(rows: Any) -> str:
    from lipbounds.analysis.forging_study import claims_table

    return f"The claims of arXiv 2406.19622, on these images\n{claims_table(rows)}"


def _command(run: Path, given: Json) -> str:
    """The command that gives the same record, every setting spelled out."""
    words = [
        "lipbounds",
        "forge",
        str(run),
        "--c-r",
        *map(repr, given["values"]),
        "--eps",
        repr(given["radius"]),
    ]
    for name in ("tau", "quantile", "images", "pgd_steps", "queries", "seed"):
        words += [f"--{name.replace('_', '-')}", str(given[name])]
    words += ["--kind", given["kind"].value, "--checks" if given["checks"] else "--no-checks"]
    for name in ("data_dir", "dataset"):
        words += [] if given[name] is None else [f"--{name.replace('_', '-')}", str(given[name])]
    return shlex.join(words)
