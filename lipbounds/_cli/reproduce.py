"""`lipbounds reproduce`: the tables of the paper, trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lipbounds._cli import tables
from lipbounds._cli.common import Json, refusals
from lipbounds._cli.options import SeedOption, option
from lipbounds._text.files import check_folder


def reproduce(
    *,
    table: Annotated[
        Literal["table1", "robust"], typer.Argument(help="What is trained again.", show_default=False)
    ],
    data_dir: Annotated[
        Path | None,
        option("Folder of the data sets' files.", "DIR", file_okay=False, show_default="LIPBOUNDS_DATA"),
    ] = None,
    out: Annotated[
        Path | None,
        option(
            "Folder of the runs and tables.", "DIR", "--out", file_okay=False, show_default="needed to train"
        ),
    ] = None,
    rows: Annotated[
        str | None,
        option("Rows or data sets, separated by commas; --list shows them.", "NAMES", show_default="all"),
    ] = None,
    list_rows: Annotated[bool, option("Show the rows, and train nothing.", None, "--list")] = False,
    epochs: Annotated[int | None, option("Epochs of every row.", "N", min=1, show_default="by row")] = None,
    limit: Annotated[
        int | None, option("Use N training and test images, evenly spaced.", "N", min=8, show_default="all")
    ] = None,
    small: Annotated[
        bool, option("A trial: a small network for every row, whose figures mean nothing.", None, "--small")
    ] = False,
    settings: Annotated[str, option("Changes of every configuration, as a JSON object.", "JSON")] = "{}",
    images: Annotated[
        int | None, option("Attack and certify the first N test images.", "N", min=1, show_default="all")
    ] = None,
    pgd_steps: Annotated[int, option("Gradient steps of an attack.", "N", min=1)] = 100,
    guarantee: Annotated[Literal["auto", "verified"], option("Guarantee of the bounds.")] = "verified",
    seed: SeedOption = 0,
) -> None:
    """Train the rows of published tables again, and print ours beside the paper's.

    `table1` are Tables 1 and 2 of arXiv 2310.00116: MNIST 4C3F, CIFAR-10 6C2F and Tiny-ImageNet 8C2F by certified
    radius maximisation (CRM) and by its baselines, and networks of our own. Certified accuracies are proved, in pixel
    values and in the units of the published code. Writes table1.md, table1.csv, table1.json, table2.csv and a figure
    for every data set to the folder.

    `robust` are tables of training against attacks (Chen et al., AAAI 2022): ResNets and WRN-34-10 by adversarial
    training, its fast variants, TRADES and backward smoothing, attacked by PGD and AutoAttack, with the time of an
    epoch beside that of plain training. Writes robust.md, robust.csv and robust.json.

    Every row is a run that resumes: repeat the command after an interruption, and rows that are finished are not
    trained again.

    A row takes hours on a CPU, and minutes to hours on a GPU.

    Examples:
    - `lipbounds reproduce table1 --list`

    - `lipbounds reproduce table1 --data-dir data --out runs/table1 --rows mnist/crm,cifar10`

    - `lipbounds reproduce table1 --data-dir data --out runs/trial --rows mnist --small --epochs 2 --limit 512`

    - `lipbounds reproduce robust --data-dir data --out runs/robust --rows cifar10/plain,cifar10/fast-at --images 1000`
    """
    with refusals("give the same command again to go on"):
        from lipbounds.analysis import reproduction
        from lipbounds.analysis.demo import is_ours
        from lipbounds.analysis.robust_reproduction import ROBUST_KIND
        from lipbounds.analysis.robust_rows import ROBUST_ROWS
        from lipbounds.analysis.table1_rows import chosen
        from lipbounds.training.config import from_text

        robust = table == "robust"
        kind, known = (ROBUST_KIND, ROBUST_ROWS) if robust else (None, None)
        picked = chosen([name.strip() for name in rows.split(",")] if rows is not None else None, known)
        if list_rows:
            for row in picked:
                config = row.config(epochs)
                typer.echo(f"{row.name:<34}{row.method:<42}{config.arch}, {config.epochs} epochs")
            return
        if out is None:
            raise ValueError(
                "training needs a folder for runs and tables: add --out DIR, or --list to see the rows"
            )
        check_folder(out)
        if out.exists() and any(out.iterdir()) and not is_ours(out / f"{table}.json"):
            raise ValueError(
                f"{out} holds files that this command did not write: choose another folder with --out"
            )
        plan = reproduction.Plan(
            data_dir=None if data_dir is None else str(data_dir),
            epochs=epochs,
            limit=limit,
            small=small,
            settings=from_text(settings, "--settings"),
            images=images,
            pgd_steps=pgd_steps,
            guarantee=guarantee,
            seed=seed,
        )
        console = tables.console()
        with tables.training_rows([row.name for row in picked]) as bar:
            record = reproduction.reproduce(picked, out, plan, say=bar.say, progress=bar.epoch, kind=kind)
        tables.show_table(console, _table(record, table))
        for name in (f"{table}.md", f"{table}.json"):
            tables.say(console, f"written: {out / name}")


def _table(record: Json, table: str) -> Any:
    """The table for the terminal."""
    title = f"Table 1 of {record['paper']}" if table == "table1" else "Training against attacks"
    shown = tables.titled(f"{title}, in percent")
    columns = list(record[table][0])
    for column in columns:
        shown.add_column(
            column, justify="left" if column in ("data", "method", "loss", "network", "bound") else "right"
        )
    for line in record[table]:
        shown.add_row(*(line[column] for column in columns))
    return shown
