"""The folder of a run: config.json, log.jsonl (one line per epoch), checkpoints/, and finally model.safetensors.

Where an earlier checkpoint certifies more, by the estimates of the log, its weights are in best.safetensors. A run with
the recursion in its loss also writes lipsdp.certificate, which proves the constants of the last weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

from flax import nnx

from lipbounds import __version__
from lipbounds._text import parsed, read_text, write_atomically
from lipbounds.training.config import Config
from lipbounds.training.models import ModelSpec
from lipbounds.training.store import load_model, save_model

CONFIG, LOG, CHECKPOINTS, MODEL = "config.json", "log.jsonl", "checkpoints", "model.safetensors"
BEST = "best.safetensors"
CERTIFICATE = "lipsdp.certificate"
FORMAT = "lipbounds-run"
FORMAT_VERSION = 1


class RunError(ValueError):
    """The folder is not a run, or the run is not finished."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Its configuration, the network with its final weights, one log record per epoch, and the name of the data that it
    was trained on.
    """

    folder: pathlib.Path
    config: Config
    model: nnx.Module
    spec: ModelSpec
    log: list[dict[str, Any]]
    data: str

    def __repr__(self) -> str:
        c = self.config
        return f"Run({str(self.folder)!r}: {c.loss}, {c.arch} on {self.data}, {len(self.log)} epochs)"


def create(folder: pathlib.Path, config: Config, data: dict[str, Any]) -> None:
    """Create a run folder with its configuration and the digest of its data.

    FileExistsError if the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = (
            f"is already a run: resume it with `lipbounds train --resume {folder}` (resume(folder) in Python), or"
            if (folder / CONFIG).exists()
            else "is not empty:"
        )
        raise FileExistsError(f"{folder} {what} choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "lipbounds": __version__,
        "config": config.to_json(),
        "data": data,
    }
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG, text.encode())


def read(folder: pathlib.Path) -> Config:
    """The configuration of a run. RunError for anything else."""
    path = folder / CONFIG
    fields = _record(folder).get("config", {})
    if isinstance(fields, dict) and fields.get("schedule") != "multi-step":
        fields = {**fields, "milestones": ""}  # earlier versions accepted some, and did not use them
    try:
        return Config.from_json(fields, str(path))
    except ValueError as error:
        raise error if isinstance(error, RunError) else RunError(str(error)) from error


def check_data(folder: pathlib.Path, data: dict[str, Any]) -> None:
    """RunError unless the run was started with these data.

    Runs of earlier versions recorded neither shape nor levels, which are not compared then.
    """
    mine = _record(folder).get("data")
    later = ("shape", "levels")
    if not isinstance(mine, dict) or mine != {k: v for k, v in data.items() if k in mine or k not in later}:
        name = mine.get("name") if isinstance(mine, dict) else None
        raise RunError(
            f"{folder} was started with other data ({name}): a run resumes only with the same images and labels; pass "
            "them as data, or pass their folder as data_dir"
        )


def check_progress(
    folder: pathlib.Path, log: list[dict[str, Any]], done: int, taken: int, steps: int
) -> None:
    """RunError unless log and settings fit the checkpoint of epoch `done`, behind so many steps taken.

    steps: those of an epoch, by the settings.
    """
    if taken != done * steps:
        raise RunError(
            f"{folder}: the checkpoint of epoch {done} was written after {taken} steps, which are {done * steps} "
            f"with these settings: give batch_size and holdout in {CONFIG} the values that the run was started with"
        )
    missing = sorted(set(range(1, done + 1)) - {record["epoch"] for record in log})
    if missing:
        raise RunError(
            f"{folder / LOG} has no record of epoch {missing[0]}, and there is a checkpoint of epoch {done}: "
            "restore the log, or begin a new run in another folder"
        )


def _record(folder: pathlib.Path) -> dict[str, Any]:
    """What config.json holds."""
    path = folder / CONFIG
    try:
        record = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder} is not a run folder: there is no {CONFIG} in it") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RunError(f"{path} was not written by `lipbounds train`")
    if record.get("version") != FORMAT_VERSION:
        raise RunError(f"{path} has version {record.get('version')!r}; this program reads {FORMAT_VERSION}")
    return record


def open_run(folder: str | os.PathLike[str]) -> Run:
    """Open a finished run. RunError if the folder is not a run or has no final weights yet."""
    folder = pathlib.Path(folder)
    config = read(folder)
    if not (folder / MODEL).is_file():
        raise RunError(
            f"{folder} has no {MODEL} yet: the run was interrupted; finish it with `lipbounds train --resume {folder}`"
        )
    model, spec = load_model(folder / MODEL)
    data = _record(folder).get("data") or {}
    return Run(folder, config, model, spec, read_log(folder), str(data.get("name", config.dataset)))


def read_log(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of log.jsonl; a last line that was cut off by a crash is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    records = []
    lines = read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = parsed(line)
        except ValueError as error:
            if number == len(lines):  # without a newline: its write was interrupted
                break
            raise RunError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or type(record.get("epoch")) is not int:
            raise RunError(f"{path}, line {number} is no record of an epoch")
        records.append(record)
    return records


def write_log(folder: pathlib.Path, records: list[dict[str, Any]]) -> None:
    """Replace the whole log atomically."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    write_atomically(folder / LOG, text.encode())


def append_log(folder: pathlib.Path, record: dict[str, Any]) -> None:
    """Append one record to the log of a run."""
    path = folder / LOG
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error}; the records so far are safe: resume the run once there is room"
        ) from error


def write_model(folder: pathlib.Path, model: nnx.Module, spec: ModelSpec, name: str = MODEL) -> None:
    """Write the final weights of a run, or others under another name."""
    save_model(folder / name, model, spec)
