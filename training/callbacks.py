"""Callbacks of a training run: the protocol that `fit` calls, and writers for TensorBoard and trackio."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from lipbounds.training.config import Config

Record = Mapping[str, Any]


class Callback(Protocol):
    """An object that is told about a run: `fit(config, callbacks=[callback])`.

    The methods are called in the order of the epochs, on the leading process only. A class that inherits from this one
    needs to define only those that it uses. An exception that a method raises ends the run; a run with a folder saves a
    checkpoint of the last finished epoch first, so that `resume` continues behind it.
    """

    def on_start(self, config: Config, log: Sequence[Record]) -> None:
        """Called before the first epoch; `log` holds the records of the epochs that a resumed run has finished."""

    def on_epoch(self, record: Record) -> None:
        """Called after every epoch with its record, whose fields `fit` describes."""

    def on_end(self) -> None:
        """Called after the last epoch, when the weights are saved, and after an error that ends the run."""


class TensorBoard(Callback):
    """Writes every number of the records as a scalar of TensorBoard, and the configuration and warnings as text.

    A resumed run continues in the same folder; TensorBoard hides what was written of epochs that are trained again.

    Args:
        folder: where the event files go; `tensorboard --logdir FOLDER` shows them.

    Raises:
        ImportError: the package tensorboardX is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        self._library = _needed("tensorboardX", "tensorboard")
        self._writer: Any = None

    def on_start(self, config: Config, log: Sequence[Record]) -> None:
        """Open an event file, and write the configuration unless the run is resumed."""
        again: dict[str, Any] = {}
        if log:
            begin = log[-1]["epoch"] + 1
            again = {"purge_step": begin, "filename_suffix": f".{begin}"}
        self._writer = self._library.SummaryWriter(os.fspath(self.folder), **again)
        if not log:
            self._writer.add_text("config", f"```\n{json.dumps(config.to_json(), indent=1)}\n```", 0)

    def on_epoch(self, record: Record) -> None:
        """Write the numbers of an epoch, at the step of its number."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["epoch"])
        if "warning" in record:
            self._writer.add_text("warning", record["warning"], record["epoch"])
        self._writer.flush()

    def on_end(self) -> None:
        """Close the event file."""
        self._writer.close()


class Trackio(Callback):
    """Writes every number of the records to a run of trackio, which keeps it on this machine by default.

    A resumed run continues the newest run of trackio with its name; epochs that are trained again appear twice in it.

    Args:
        project: the project; `trackio show --project NAME` shows it.
        name: of the run, by default one that trackio chooses.
        options: further arguments of `trackio.init`.

    Raises:
        ImportError: the package trackio is missing.
    """

    def __init__(self, project: str = "lipbounds", name: str | None = None, **options: Any):
        self._library = _needed("trackio", "trackio")
        self._options = {"project": project, "name": name, **options}

    def on_start(self, config: Config, log: Sequence[Record]) -> None:
        """Open a run with this configuration, or the one to continue."""
        how = "allow" if log else "never"
        self._library.init(**{"config": config.to_json(), "resume": how, "embed": False, **self._options})

    def on_epoch(self, record: Record) -> None:
        """Write the numbers of an epoch, at the step of its number."""
        self._library.log(numbers(record), step=record["epoch"])

    def on_end(self) -> None:
        """Close the run."""
        self._library.finish()


def numbers(record: Record) -> dict[str, float]:
    """The figures of a record that are numbers, without the epoch."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "epoch"
    }


def writer(name: Literal["tensorboard", "trackio"], folder: pathlib.Path) -> Callback:
    """The callback of this name for a run folder: event files inside it, or a run of trackio of its name."""
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard")
    return Trackio(name=folder.resolve().name)


def _needed(package: str, extra: str) -> Any:
    """A package of an extra; ImportError with the line that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'the log needs the package {package}: pip install "lipbounds[{extra}]"') from error
