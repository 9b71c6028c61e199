"""Shared by `lipbounds evaluate` and `lipbounds forge`: a trained network, its data, the files about it."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from lipbounds._cli.common import Json, check_apart, check_json, header, write_json
from lipbounds._cli.options import Pages, Source
from lipbounds._text import near
from lipbounds._text.files import check_folder


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained network; `data_dir` is the data folder of its run, `eps` the radius of its validation."""

    path: Path
    title: str
    dataset: str
    data_dir: str | None
    model: Any
    spec: Any
    eps: float | None = None

    def record(self) -> Json:
        return {
            "path": str(self.path),
            "title": self.title,
            "dataset": self.dataset,
            "architecture": self.spec.architecture,
            "arguments": dict(self.spec.arguments),
        }

    def check(self, test: Any) -> None:
        """ValueError for images that the network does not take."""
        if tuple(self.spec.input_shape) != tuple(test.input_shape):
            raise ValueError(
                f"{self.path} takes images of shape {tuple(self.spec.input_shape)}, {test.name} has "
                f"{tuple(test.input_shape)}"
            )

    def data(self, data_dir: Path | None, tell: Callable[[str], None]) -> Any:
        """The data set, checked to fit the network."""
        from lipbounds.training import data
        from lipbounds.training.own_data import is_own

        if data_dir is not None and (self.dataset == "digits" or is_own(self.dataset)):
            raise ValueError(
                f"--data-dir has no effect, as {self.dataset} is read from elsewhere: leave it out"
            )
        tell(f"reading {self.dataset}")
        test = data.load(self.dataset, data_dir if data_dir is not None else self.data_dir)
        self.check(test)
        return test


def check_source(source: Source) -> None:
    """BadParameter unless a model file comes with --dataset, and a run folder without."""
    if source.run.is_dir() and source.dataset is not None:
        raise typer.BadParameter("a run records its own data set", param_hint="--dataset")
    if not source.run.is_dir() and source.dataset is None:
        raise typer.BadParameter("a model file needs one, such as digits", param_hint="--dataset")


def open_subject(path: Path, dataset: str | None) -> Subject:
    """A run, or a model file of that data set."""
    from lipbounds.training.data import DATASETS
    from lipbounds.training.own_data import is_own
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
        title = f"{config.arch}, {how}"
        return Subject(path, title, config.dataset, config.data_dir, run.model, run.spec, config.eps)
    if dataset is None or not (dataset in DATASETS or is_own(dataset)):
        raise ValueError(
            f"unknown data set {dataset!r}{near(str(dataset), DATASETS)}; known: {', '.join(DATASETS)}, or a path: an "
            ".npz file, or a folder such as ./images"
        )
    model, spec = load_model(path)
    return Subject(path, path.stem, dataset, None, model, spec)


def folder_of(
    source: Source, files: Pages, names: Sequence[str], command: str, against: Path | None = None
) -> Path | None:
    """The folder for the files `names` (record first). ValueError if it would overwrite other files.

    typer.BadParameter where --json is a page of the folder, or one of them is a file that is read. The record may be
    --json, as they are the same.
    """
    from lipbounds.analysis.demo import is_ours

    folder = files.out or (source.run if source.run.is_dir() else None)
    read = _files_of("the run", source.run) | ({} if against is None else _files_of("the other run", against))
    pages = {} if folder is None else {f"{name} in the folder": folder / name for name in names[1:]}
    check_apart({**pages, "--json": files.json}, read)
    check_json(files)
    if folder is not None:
        check_folder(folder)
    if folder is None or files.force or is_ours(folder / names[0]):
        return folder
    there = [name for name in names if (folder / name).exists()]
    if there:
        raise ValueError(
            f"{folder} holds {', '.join(there)}, not written by `lipbounds {command}`: choose another folder with "
            "--out, or pass --force"
        )
    return folder


def _files_of(name: str, run: Path) -> dict[str, Path | None]:
    """What is read of a run folder or model file, by its name in messages."""
    from lipbounds.training import runs

    if not run.is_dir():
        return {name: run}
    return {f"{file} of {name}": run / file for file in (runs.CONFIG, runs.MODEL, runs.LOG, runs.CERTIFICATE)}


def record_of(command: str, subject: Subject, source: Source, settings: Json) -> Json:
    """The header of a command's record, with a command line that spells out every setting."""
    words = ["lipbounds", command, str(source.run)]
    for name, value in {**settings, "dataset": source.dataset, "data_dir": source.data_dir}.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return {
        **header(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(words),
        "model": subject.record(),
    }


def write_files(
    files: Pages, folder: Path | None, name: str, record: Json, page: Callable[[Path], Path]
) -> list[str]:
    """Write the record to --json, and with its page to the folder; returns the lines that say so."""
    write_json(files.json, record)
    if folder is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / name, record)
    return [f"page: {page(folder)}"]
