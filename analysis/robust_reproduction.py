"""The tables of robust training trained again: natural, PGD and AutoAttack accuracy, time beside plain training.

    reproduce(chosen(["cifar10"], ROBUST_ROWS), folder, plan, kind=ROBUST_KIND)

Accuracies under attack are upper estimates of the robust accuracy. The papers' minutes are of another machine, so their
quotients are to be compared, not they.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lipbounds as lb
from lipbounds._text import markdown_table, seconds_text, write_atomically
from lipbounds.analysis.demo import FORMAT, FORMAT_VERSION, write_json
from lipbounds.analysis.experiment import Json
from lipbounds.analysis.reproduction import Kind, Plan, trial, write_csv
from lipbounds.analysis.robust_rows import PRINTED, plain_of, printed
from lipbounds.analysis.robust_table import robust_record
from lipbounds.analysis.table1_rows import Row
from lipbounds.training import Fitted
from lipbounds.training.data import Dataset

COLUMNS = (
    "data",
    "loss",
    "network",
    "epochs",
    "natural",
    "PGD",
    "AutoAttack",
    "s per epoch",
    "/ plain",
    "/ fast-at",
    "paper: natural",
    "paper: PGD",
    "paper: AutoAttack",
    "paper: minutes",
    "paper: / fast-at",
)


def epoch_seconds(log: Sequence[Mapping[str, Any]]) -> float:
    """The median time of an epoch: of those without PGD accuracies behind the first one, which compiles, if any."""
    later = [line["seconds"] for line in log[1:] if "pgd_accuracy" not in line]
    return statistics.median(later or [line["seconds"] for line in log[1:] or log])


def evaluate(row: Row, fitted: Fitted, data: Dataset, plan: Plan, say: Callable[[str], None]) -> Json:
    """Accuracies of a trained row in the ball of its attack."""
    begin, config = time.perf_counter(), fitted.config
    found = robust_record(
        fitted.model,
        data.test_x,
        data.test_y,
        eps=[config.attack_eps],
        norm=math.inf if config.attack_norm == "linf" else 2,
        steps=plan.pgd_steps,
        certify=False,
        images=plan.images,
        seed=plan.seed,
        progress=say,
    )
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "row": row.name,
        "arch": config.arch,
        "epochs": len(fitted.log),
        "epoch_seconds": epoch_seconds(fitted.log),
        "training_seconds": sum(record["seconds"] for record in fitted.log),
        "evaluation_seconds": time.perf_counter() - begin,
        "warning": fitted.log[-1].get("warning"),
        **found,
    }


def lines(rows: Sequence[Row], done: Mapping[str, Json]) -> list[list[str]]:
    """The table: ours beside what is printed; "-" where nothing is known."""
    table = []
    for row in rows:
        record, theirs = done.get(row.name), printed(row)
        fast = PRINTED[row.group]["fast-at"][2]
        paper = [theirs.natural, theirs.pgd, theirs.autoattack, theirs.minutes]
        ratio = f"{theirs.minutes / fast:.2f}" if theirs.minutes else "-"
        table.append(
            [
                row.group,
                row.method,
                record["arch"] if record else row.config().arch,
                *_ours(row, record, done),
                *("-" if value is None else f"{value:g}" for value in paper),
                ratio,
            ]
        )
    return table


def _ours(row: Row, record: Json | None, done: Mapping[str, Json]) -> list[str]:
    if record is None:
        return ["not run", *["-"] * 6]
    (eps,) = record["eps"]
    shares = (record["natural"], record["PGD"][str(eps)], record["AutoAttack"][str(eps)])
    plain = plain_of(row)
    others = (done.get(name) for name in (plain, plain.replace("plain", "fast-at")))
    ratios = (f"{record['epoch_seconds'] / other['epoch_seconds']:.2f}" if other else "-" for other in others)
    accuracies = (f"{100 * share:.2f}" for share in shares)
    return [str(record["epochs"]), *accuracies, f"{record['epoch_seconds']:.3g}", *ratios]


def write(folder: pathlib.Path, rows: Sequence[Row], done: Mapping[str, Json], plan: Plan) -> Json:
    """Write robust.json, .csv and .md; returns the record."""
    folder.mkdir(parents=True, exist_ok=True)
    table = lines(rows, done)
    record: Json = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "lipbounds": lb.__version__,
        "plan": {**dataclasses.asdict(plan), "data_dir": None, "settings": dict(plan.settings)},
        "rows": {row.name: done.get(row.name) for row in rows},
        "robust": [dict(zip(COLUMNS, line, strict=True)) for line in table],
    }
    write_json(folder / "robust.json", record)
    write_csv(folder / "robust.csv", COLUMNS, table)
    write_atomically(folder / "robust.md", page(rows, done, plan).encode())
    return record


def page(rows: Sequence[Row], done: Mapping[str, Json], plan: Plan) -> str:
    """The table as Markdown, and what its figures are."""
    text = [
        "# Tables of robust training, trained again",
        "",
        "Accuracies in percent, l-inf. The robust accuracy of these images is at most that under PGD",
        f"({plan.pgd_steps} steps) or AutoAttack, which are attained. Seconds are the median of the epochs, of this",
        "machine, the papers' minutes of another one: compare their quotients.",
        "",
    ]
    text += [*trial(plan), markdown_table(COLUMNS, lines(rows, done), right=range(3, len(COLUMNS))), ""]
    for row in rows:
        if record := done.get(row.name):
            took, proof = (seconds_text(record[f"{key}_seconds"]) for key in ("training", "evaluation"))
            text.append(f"- {row.name}: {took} of training, {proof} of attacks on {record['images']} images")
            text += [f"- {row.name}: {record['warning']}"] if record["warning"] else []
    return "\n".join([*text, ""])


ROBUST_KIND = Kind(evaluate, write)
