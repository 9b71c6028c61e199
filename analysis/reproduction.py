"""Tables 1 and 2 of arXiv 2310.00116 trained again: every row is a run that resumes, evaluated by proved bounds.

    results = reproduce([row, ...], folder, data_dir=...)

A row has a folder of its own with its run and evaluation.json. Radii are in pixel values in [0, 1], certified at the
paper's eps in these units and in the units of the published code (`evaluation.paper_units`).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import lipbounds as lb
from lipbounds._text import markdown_table, percent, seconds_text, show, whole, write_atomically
from lipbounds.analysis import evaluation
from lipbounds.analysis.demo import FORMAT, FORMAT_VERSION, is_ours, read_json, write_json
from lipbounds.analysis.experiment import LABELS, Json
from lipbounds.analysis.figures import RADII_LINES, dress, new_figure, png
from lipbounds.analysis.table1_rows import CONSTANTS, PAPER, Published, Row, model_of, others
from lipbounds.training import Config, Fitted, fit, resume
from lipbounds.training.data import Dataset, load
from lipbounds.training.final_bound import proved_bound
from lipbounds.training.runs import CONFIG, read
from lipbounds.training.watch import troubled

RECORD = "table1.json"
EVALUATION = "evaluation.json"
_SIDE = 16  # pixels at most in small
_SMALL: Json = {
    "mnist": "2C2F",
    "cifar10": "2C2F",
    "tiny-imagenet": "2C2F",
    "mnist/crm-mlp": "196-16-10",
    "cifar10/lipconvnet-5": "lipconvnet-4",
    "cifar10/lipconvnet-10": "lipconvnet-4",
    "cifar10/lipconvnet-15": "lipconvnet-4",
    "cifar10/liresnet": "liresnet-L1W4",
    "tiny-imagenet/liresnet": "liresnet-L1W4",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How rows are trained and evaluated.

    Args:
        data_dir: the folder of all data sets, as `training.data.load` takes it.
        epochs: instead of those of the row, with the shape of its schedule.
        limit: use only so many training and test images, evenly spaced, as some files are sorted by class.
        small: for trials: a small network of each kind, few constants, and images of at most 16 x 16 pixels, which are
            every second or fourth one of the data set's; its figures mean nothing.
        settings: changes of every configuration, before all others.
        images: attack and certify only the first so many test images.
        local_images: of a row with local constants in its loss so many test images are certified by local bounds, too.
        pgd_steps: steps of the l2 attack.
        guarantee: of the bounds.
        seed: of training and evaluation.
    """

    data_dir: str | None = None
    epochs: int | None = None
    limit: int | None = None
    small: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images: int | None = None
    local_images: int = 100
    pgd_steps: int = 100
    guarantee: str = "verified"
    seed: int = 0

    def config(self, row: Any) -> Config:
        """The configuration of a row. ValueError where settings do not fit it."""
        changes: Json = {"data_dir": self.data_dir, "validate_every": 0, "seed": self.seed}
        if self.limit is not None:
            usual = row.config(self.epochs).batch_size
            changes["batch_size"] = max(1, min(usual, self.limit // 4))
        if self.small:
            changes["arch"] = row.small or _SMALL.get(row.name, _SMALL[row.group])
            changes["refresh"] = 1 if row.settings.get("constants") == "local" else 4
            changes |= {"degrees": 0.0, "translate": 0.0}
        changes |= self.settings
        epochs = whole("epochs", changes.pop("epochs")) if "epochs" in changes else self.epochs
        return row.config(epochs, **changes)

    def data(self, dataset: str) -> Dataset:
        """The data set, cut to the limit, and in small its images with fewer pixels."""
        every = load(dataset, self.data_dir)
        if self.small:
            apart = -(-max(every.train_pixels.shape[1:3]) // _SIDE)
            fewer = {
                name: getattr(every, name)[:, ::apart, ::apart] for name in ("train_pixels", "test_pixels")
            }
            every = dataclasses.replace(every, **fewer)
        if self.limit is None:
            return every
        parts = {}
        for name in ("train_pixels", "train_y", "test_pixels", "test_y"):
            part = getattr(every, name)
            parts[name] = part[
                np.arange(min(self.limit, len(part))) * len(part) // min(self.limit, len(part))
            ]
        # all classes, whatever is left of them
        names = every.class_names or tuple(map(str, range(every.classes)))
        return dataclasses.replace(every, **parts, class_names=names)


class Clock:
    """Seconds that rows have taken, and an estimate of those that the others still take."""

    def __init__(self, configs: Mapping[str, Config]):
        self.left = {name: config.epochs for name, config in configs.items()}
        self.group = {name: config.dataset for name, config in configs.items()}
        self.seen: dict[str, list[float]] = {}

    def epoch(self, name: str, seconds: float, left: int) -> None:
        """An epoch of a row took so long, and so many are left."""
        self.left[name] = left
        self.seen.setdefault(name, []).append(seconds)

    def remaining(self) -> float | None:
        """Seconds of training ahead; None before the first epoch.

        An epoch of a row that has not begun is taken to last as long as the mean of the rows on the same data, or of
        all rows. Evaluation is not included.
        """
        means = {name: sum(took[-20:]) / len(took[-20:]) for name, took in self.seen.items()}
        if not means:
            return None

        def expected(name: str) -> float:
            same = [mean for other, mean in means.items() if self.group[other] == self.group[name]]
            some = [means[name]] if name in means else same or list(means.values())
            return sum(some) / len(some)

        return sum(count * expected(name) for name, count in self.left.items() if count)


Tell = Callable[[Row, Json, float | None], None]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is done with trained rows.

    Args:
        evaluate: (row, run, its data, plan, say) -> record of the row, as plain data.
        write: (folder, rows, records of the rows that are done, plan) -> record of the table, which is also written.
    """

    evaluate: Callable[[Any, Fitted, Dataset, Plan, Say], Json]
    write: Callable[[pathlib.Path, Sequence[Any], Mapping[str, Json], Plan], Json]


def reproduce(
    rows: Sequence[Any],
    folder: pathlib.Path,
    plan: Plan | None = None,
    *,
    kind: Kind | None = None,
    say: Say = lambda text: None,
    progress: Tell = lambda row, record, left: None,
) -> Json:
    """Train and evaluate the rows, one folder each, and write the tables after every row; returns the record.

    A row that is evaluated is not run again, one whose training was interrupted goes on from its last checkpoint.

    Args:
        rows: `table1_rows.Row`, or others with the same name, group, small and config.
        kind: what is measured and written; Tables 1 and 2 by default.
        say: called with what is being done.
        progress: called after every epoch with the row, its record and the seconds of training ahead in all.

    Raises:
        FileNotFoundError: the files of a data set are missing; nothing is trained before all are read.
        ValueError: a row's folder holds a run with other settings, and whatever `fit` refuses.
    """
    plan, kind = plan or Plan(), kind or Kind(_evaluate, _write)
    configs = {row.name: plan.config(row) for row in rows}
    for row in rows:
        _check_run(folder / row.name, configs[row.name])
    done = {
        row.name: found for row in rows if (found := _evaluated(folder / row.name, configs[row.name], plan))
    }
    open_rows = [row for row in rows if row.name not in done]
    data: dict[str, Dataset] = {}
    for name in dict.fromkeys(configs[row.name].dataset for row in open_rows):
        say(f"reading {name}")
        data[name] = plan.data(name)
    clock = Clock({row.name: configs[row.name] for row in open_rows})
    result = kind.write(folder, rows, done, plan)
    for row in open_rows:
        config = configs[row.name]
        images = data[config.dataset]

        def tell(record: Json, row: Row = row, config: Config = config) -> None:
            clock.epoch(row.name, record["seconds"], config.epochs - record["epoch"])
            progress(row, record, clock.remaining())

        place = folder / row.name / "run"
        say(f"training {row.name}")
        if (place / CONFIG).exists():
            fitted = resume(place, data=images, data_dir=plan.data_dir, progress=tell)
        else:
            fitted = fit(config, images, out=place, progress=tell)
        clock.left[row.name] = 0
        say(f"evaluating {row.name}")
        found = kind.evaluate(row, fitted, images, plan, say)
        done[row.name] = {**found, "settings": _settings(config, plan)}
        write_json(folder / row.name / EVALUATION, done[row.name])
        result = kind.write(folder, rows, done, plan)
    return result


def _check_run(place: pathlib.Path, config: Config) -> None:
    """ValueError where the folder holds a run with other settings; where the data lie does not matter."""
    if not (place / "run" / CONFIG).exists():
        return
    there, here = ({**c.to_json(), "data_dir": None} for c in (read(place / "run"), config))
    if there != here:
        names = ", ".join(name for name in here if here[name] != there[name])
        raise ValueError(f"{place} was trained with other settings ({names}): choose another output folder")


def _settings(config: Config, plan: Plan) -> Json:
    """What an evaluation depends on; one with other settings is made again."""
    of_plan = {
        name: getattr(plan, name)
        for name in ("limit", "images", "local_images", "pgd_steps", "guarantee", "seed")
    }
    fewer = {"small": True} if plan.small else {}  # other pixels
    return {**config.to_json(), **of_plan, **fewer, "data_dir": None}


def _evaluated(place: pathlib.Path, config: Config, plan: Plan) -> Json | None:
    path = place / EVALUATION
    if not is_ours(path):
        return None
    record: Json = read_json(path)
    return record if record.get("settings") == _settings(config, plan) else None


def _evaluate(row: Row, fitted: Fitted, data: Dataset, plan: Plan, say: Callable[[str], None]) -> Json:
    """Accuracies and constants of a trained row, by naive and LipLT, and by LipSDP where it stood in the loss."""
    begin = time.perf_counter()
    config = fitted.config
    factor, units = evaluation.paper_units(config.dataset)
    methods: list[Any] = ["naive", "liplt"]
    if config.uses_constants and config.constants == "recursion":
        form = lb.trace(fitted.model, data.test_x[0])
        methods.append(proved_bound(form, config, fitted.state))
    found = evaluation.evaluate(
        fitted.model,
        data.test_x,
        data.test_y,
        eps=[config.eps, config.eps / factor],
        methods=methods,
        pgd_steps=plan.pgd_steps,
        pgd_norms=(2,),
        images=plan.images,
        guarantee=plan.guarantee,  # type: ignore[arg-type]
        seed=plan.seed,
        progress=say,
    )
    near = None
    if config.uses_constants and config.constants == "local":
        near = _by_local_bounds(fitted, data, plan)
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "row": row.name,
        "local": near,
        "eps_pixels": config.eps,
        "eps_paper": config.eps / factor,
        "units": units,
        "epochs": len(fitted.log),
        "training_seconds": sum(record["seconds"] for record in fitted.log),
        "evaluation_seconds": time.perf_counter() - begin,
        "warnings": troubled(fitted.log),
        **found,
    }


def _by_local_bounds(fitted: Fitted, data: Dataset, plan: Plan) -> Json:
    """Certified accuracy of the first images at eps by global and by local bounds."""
    form = lb.trace(fitted.model, data.test_x[0])
    x, y = data.test_x[: plan.local_images], data.test_y[: plan.local_images]
    eps = fitted.config.eps
    bound = lb.liplt(form, pairwise=True, guarantee=plan.guarantee)  # type: ignore[arg-type]
    assert isinstance(bound, lb.UpperBound)
    radii = [lb.certified_radius(form, x, y, bound=bound)]
    radii.append(lb.certified_radius(form, x, y, bound=bound, local=True, eps=eps))
    shares = dict(zip(("global", "local"), (float(found.accuracy(eps)) for found in radii), strict=True))
    return {"images": len(y), **shares, "guarantee": radii[1].guarantee}


# --- tables --------------------------------------------------------------------------------------------------------

COLUMNS = (
    "data",
    "method",
    "network",
    "epochs",
    "clean",
    "PGD",
    "certified",
    "certified, paper's units",
    "bound",
    "guarantee",
    "paper: clean",
    "paper: PGD",
    "paper: certified",
)


def best_method(record: Json) -> str | None:
    """The bound that certifies most of a row's images at its eps; of equals the one with the smaller constants.

    None where no bound has radii, as each may be refused.
    """
    eps = str(record["eps_pixels"])
    key = {
        name: (row[eps], -record["constants"][name]["average_pair"])
        for name, row in record["certified"].items()
    }
    return max(key, key=lambda name: key[name], default=None)


def accuracy_rows(rows: Sequence[Row], done: Mapping[str, Json]) -> list[list[str]]:
    """Table 1, ours beside the paper's; a row of the paper that no run stands beside has its figures only."""
    table: list[list[str]] = []
    for group in dict.fromkeys(row.group for row in rows):
        some = [row for row in rows if row.group == group]
        for row in some:
            table.append(
                [group, row.method, model_of(row), *_ours(done.get(row.name)), *_printed(row.published)]
            )
        for published in others(group, some):
            table.append([group, published.method, published.model, *[""] * 7, *_printed(published)])
    return table


def _ours(record: Json | None) -> list[str]:
    if record is None:
        return ["not run", *[""] * 6]
    name, near, paper = best_method(record), str(record["eps_pixels"]), str(record["eps_paper"])
    seen = [str(record["epochs"]), percent(record["clean"]), percent(record["pgd"]["2"][near], "up")]
    if name is None:
        return [*seen, "", "", "none", ""]
    return [
        *seen,
        *(percent(record["certified"][name][eps], "down") for eps in (near, paper)),
        LABELS.get(name, name),
        record["guarantee"][name],
    ]


def _printed(published: Published | None) -> list[str]:
    if published is None:
        return ["", "", ""]
    return ["—" if v is None else f"{v:g}" for v in (published.clean, published.pgd, published.certified)]


CONSTANT_COLUMNS = ("data", "method", "bound", "guarantee", "L_ij", "L_i + L_j", "sqrt(2) L")


def constant_rows(rows: Sequence[Row], done: Mapping[str, Json]) -> list[list[str]]:
    """Table 2: upper bounds of constants, averaged over pairs of classes, and the paper's beside them."""
    table = []
    for row in rows:
        record = done.get(row.name)
        for name, found in record["constants"].items() if record else ():
            values = (found[key] for key in ("average_pair", "average_sum", "average_sqrt2"))
            word = record["guarantee"][name] if record else ""
            shown = (show(value, "up", 5) for value in values)
            table.append([row.group, row.method, LABELS.get(name, name), word, *shown])
        if row.published is not None and row.published.method == "CRM":
            for name, printed in CONSTANTS[row.group].items():
                values = (f"{value:g}" for value in printed)
                table.append([row.group, "CRM as printed", LABELS[name], "", *values])
    return table


def _write(folder: pathlib.Path, rows: Sequence[Row], done: Mapping[str, Json], plan: Plan) -> Json:
    """Write table1.json, .csv, .md and .png; returns the record."""
    folder.mkdir(parents=True, exist_ok=True)
    first, second = accuracy_rows(rows, done), constant_rows(rows, done)
    record: Json = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "lipbounds": lb.__version__,
        "paper": PAPER,
        "plan": {**dataclasses.asdict(plan), "data_dir": None, "settings": dict(plan.settings)},
        "rows": {row.name: done.get(row.name) for row in rows},
        "table1": [dict(zip(COLUMNS, line, strict=True)) for line in first],
        "table2": [dict(zip(CONSTANT_COLUMNS, line, strict=True)) for line in second],
    }
    write_json(folder / RECORD, record)
    for name, header, lines in (("table1", COLUMNS, first), ("table2", CONSTANT_COLUMNS, second)):
        write_csv(folder / f"{name}.csv", header, lines)
    write_atomically(folder / "table1.md", page(rows, done, plan).encode())
    for group in dict.fromkeys(row.group for row in rows):
        curves = {row.method: done[row.name] for row in rows if row.group == group and row.name in done}
        if curves:
            (folder / f"{group}.png").write_bytes(png(radii_of_rows(group, curves)))
    return record


def write_csv(path: pathlib.Path, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Write a table as a file of comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    write_atomically(path, text.getvalue().encode())


def trial(plan: Plan) -> list[str]:
    """The lines of a page that say that its rows are not those of the paper, where they are not."""
    if not (plan.small or plan.limit or plan.settings or plan.epochs):
        return []
    return ["**A trial**: networks, images, epochs or settings are not those of the rows.", ""]


def page(rows: Sequence[Row], done: Mapping[str, Json], plan: Plan) -> str:
    """Both tables as Markdown, and what their figures are."""
    lines = [
        f"# Tables 1 and 2 of {PAPER}, trained again",
        "",
        "Accuracies in percent. Certified accuracy is proved, by the bound that is named and with its guarantee;",
        f"accuracy under PGD ({plan.pgd_steps} steps, l2) is attained. Radii are l2 distances of pixel values in",
        "[0, 1]: 1.58 for MNIST and 36/255 for the others; PGD attacks at this radius. The columns of the paper are as",
        "printed.",
        "",
    ]
    lines += [
        *trial(plan),
        markdown_table(COLUMNS, accuracy_rows(rows, done), right=(3, 4, 5, 6, 7, 10, 11, 12)),
        "",
    ]
    lines += [f"- {text}" for text in dict.fromkeys(record["units"] for record in done.values())]
    for row in rows:
        record = done.get(row.name)
        if record is None:
            continue
        took, proof = (seconds_text(record[f"{key}_seconds"]) for key in ("training", "evaluation"))
        lines.append(f"- {row.name}: {took} of training, {proof} of evaluation on {record['images']} images")
        if near := record["local"]:
            shares = [percent(near[by], "down", 1) for by in ("global", "local")]
            lines.append(
                f"- {row.name}: of the first {near['images']} images {shares[0]} % are certified by LipLT, "
                f"{shares[1]} % by local bounds ({near['guarantee']})"
            )
        if record["warnings"]:
            lines.append(f"- {row.name}: {record['warnings']}")
        lines += [f"- {row.name}: {name} is missing: {reason}" for name, reason in record["refused"].items()]
    lines += ["", "Constants averaged over pairs of classes, upper bounds rounded up:", ""]
    lines += [markdown_table(CONSTANT_COLUMNS, constant_rows(rows, done), right=(4, 5, 6)), ""]
    return "\n".join(lines)


def radii_of_rows(group: str, records: Mapping[str, Json]) -> Figure:
    """Certified accuracy against eps of every row of a data set, by its best bound."""
    figure = new_figure(7.6, 4.4)
    ax = figure.subplots()
    for place, (method, record) in enumerate(records.items()):
        name = best_method(record)
        if name is None:
            continue
        radii = record["radii"][name]
        colour, dashes = (
            RADII_LINES[place % len(RADII_LINES)],
            ("-", "--", ":")[place // len(RADII_LINES) % 3],
        )
        ax.step(
            radii["eps"],
            radii["accuracy"],
            where="pre",
            label=method,
            color=colour,
            linestyle=dashes,
            linewidth=1.4,
        )
    eps = next(iter(records.values()))["eps_pixels"]
    ax.axvline(eps, color="#66707d", linewidth=0.8, linestyle=(0, (1, 2)))
    ax.set_xlim(0, 3 * eps)
    ax.set_ylim(0, 1.02)
    ax.set_title(f"{group}: certified accuracy", loc="left", fontsize=9)
    ax.set_xlabel("ε, ℓ₂ norm, pixel values in [0, 1]", fontsize=9)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, frameon=False)
    dress(ax, "both")
    return figure
