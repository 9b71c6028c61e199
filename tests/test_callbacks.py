"""Callbacks of a training run: what they are told, in which order, what survives their failures, and the writers."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from lipbounds._cli.main import app
from lipbounds._text import reporting
from lipbounds.training import Callback, Config, TensorBoard, Trackio, fit, resume
from lipbounds.training.callbacks import numbers, writer
from lipbounds.training.data import digits

CONFIG = Config(
    loss="cross-entropy", arch="64-10", epochs=3, batch_size=512, validate_every=0, checkpoint_every=2
)
IMAGES = (digits().train_x[:512], digits().train_y[:512])


class Heard(Callback):
    """Keeps what it is told; fails in the epoch `fails`."""

    def __init__(self, fails: int | None = None):
        self.fails, self.calls = fails, list[Any]()

    def on_start(self, config: Config, log: Any) -> None:
        self.calls.append(("start", config, [record["epoch"] for record in log]))

    def on_epoch(self, record: Any) -> None:
        self.calls.append(record)
        if record["epoch"] == self.fails:
            raise OSError("the disk of the log is full")

    def on_end(self) -> None:
        self.calls.append("end")


class OnlyEpochs(Callback):
    """Inherits the other methods, which do nothing."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_epoch(self, record: Any) -> None:
        self.seen.append(record["epoch"])


def test_callbacks_are_told_and_a_failure_leaves_a_run_that_goes_on(tmp_path: pathlib.Path) -> None:
    failing, other, few = Heard(fails=1), Heard(), OnlyEpochs()
    with pytest.raises(OSError, match="disk of the log") as caught:
        fit(CONFIG, IMAGES, out=tmp_path / "run", callbacks=[other, failing])
    assert caught.value.__notes__ == [
        f"epoch 1 is saved: lipbounds train --resume {tmp_path / 'run'} goes on behind it"
    ]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]  # not due before 2
    assert failing.calls[-1] == "end" and other.calls[-1] == "end" and len(other.calls) == 3
    again = Heard()
    said: list[str] = []
    with reporting(said.append):  # of which `fit` is a part, as any other call
        fitted = resume(tmp_path / "run", data=IMAGES, callbacks=[again, few])
    assert [line.partition(":")[0] for line in said] == ["epoch 2 of 3", "epoch 3 of 3"]
    assert again.calls == [("start", CONFIG, [1]), *fitted.log[1:], "end"] and few.seen == [2, 3]
    assert [other.calls[1], *again.calls[1:-1]] == list(fitted.log)


RECORD: dict[str, Any] = {
    "epoch": 4,
    "loss": 0.5,
    "skipped": 0,
    "certified_estimate": None,
    "guarantee": "verified",
    "warning": "the radius term has lost its hold",
}


def test_numbers_of_a_record() -> None:
    assert numbers(RECORD) == {"loss": 0.5, "skipped": 0}


def events(folder: pathlib.Path) -> list[tuple[int, str, Any]]:
    """(step, tag, value) of every event of a folder; of texts the value is the text."""
    from tensorboardX.proto.event_pb2 import Event

    found: list[tuple[int, str, Any]] = []
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        while raw:
            # then a checksum of 4 bytes, the event, another checksum
            size = int.from_bytes(raw[:8], "little")
            event, raw = Event.FromString(raw[12 : 12 + size]), raw[16 + size :]
            for value in event.summary.value:
                text = value.HasField("tensor")
                kept = value.tensor.string_val[0].decode() if text else value.simple_value
                found.append((event.step, value.tag, kept))
    return found


def test_tensorboard_gets_every_number_warnings_and_the_configuration(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorboardX")
    callback = writer("tensorboard", tmp_path)
    callback.on_start(CONFIG, [])
    callback.on_epoch(RECORD)
    callback.on_end()
    (zero, tag, config), *rest = events(tmp_path / "tensorboard")
    assert (zero, tag) == (0, "config/text_summary") and json.loads(config.strip("`")) == CONFIG.to_json()
    assert rest == [(4, "loss", 0.5), (4, "skipped", 0.0), (4, "warning/text_summary", RECORD["warning"])]
    callback.on_start(CONFIG, [RECORD])  # resumed behind epoch 4
    callback.on_epoch({**RECORD, "epoch": 5})
    callback.on_end()
    assert {step for step, *_ in events(tmp_path / "tensorboard")} == {0, 4, 5}


class FakeTrackio:
    """What the writer uses of the package."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def init(self, **options: Any) -> None:
        self.calls.append(options)

    def log(self, metrics: Any, step: int) -> None:
        self.calls.append((step, metrics))

    def finish(self) -> None:
        self.calls.append("finished")


def test_trackio_gets_every_number(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)  # type: ignore[arg-type]
    callback = writer("trackio", tmp_path / "digits")
    callback.on_start(CONFIG, [])
    callback.on_epoch(RECORD)
    callback.on_end()
    begin = {"project": "lipbounds", "name": "digits", "config": CONFIG.to_json(), "embed": False}
    assert fake.calls == [{**begin, "resume": "never"}, (4, {"loss": 0.5, "skipped": 0}), "finished"]
    other = Trackio("mine", config={})
    other.on_start(CONFIG, [RECORD])
    assert fake.calls[-1] == {
        "project": "mine",
        "name": None,
        "config": {},
        "embed": False,
        "resume": "allow",
    }


@pytest.mark.slow
def test_trackio_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    pytest.importorskip("trackio")
    fit(CONFIG, IMAGES, out=tmp_path / "run", callbacks=[writer("trackio", tmp_path / "run")])
    from trackio import Api

    (run,) = Api().runs("lipbounds")
    assert run.name == "run" and run.config["loss"] == "cross-entropy"


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("trackio", "trackio")])
def test_a_missing_package_is_one_line(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    words = f'the log needs the package {package}: pip install "lipbounds[{name}]"'
    with pytest.raises(ImportError) as caught:
        {"tensorboard": lambda: TensorBoard(tmp_path), "trackio": Trackio}[name]()
    assert str(caught.value) == words
    said = CliRunner().invoke(
        app, ["train", "cross-entropy", "--out", str(tmp_path / "run"), "--log", name, "--epochs", "1"]
    )
    assert said.exit_code == 1 and said.stderr == f"lipbounds: {words}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_writes_a_log_also_behind_a_resumption(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tensorboardX")
    few = ["--arch", "64-10", "--batch-size", "512", "--epochs", "2", "--validate-every", "0"]
    out = str(tmp_path / "run")
    for arguments in (["cross-entropy", "--out", out, *few], ["--resume", out]):
        said = CliRunner().invoke(app, ["train", *arguments, "--log", "tensorboard"])
        assert said.exit_code == 0, said.output
    found = events(tmp_path / "run" / "tensorboard")
    assert [step for step, tag, _ in found if tag == "loss"] == [1, 2]
