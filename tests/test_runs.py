"""Run folders: what is in them, interruption and resumption bit for bit, damaged checkpoints, full disks, kill -9."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from lipbounds.training import loop, runs
from lipbounds.training.checkpoints import CheckpointError, Checkpoints
from lipbounds.training.config import Config
from lipbounds.training.data import digits
from lipbounds.training.loop import Fitted, fit, resume
from lipbounds.training.runs import RunError, open_run
from lipbounds.training.watch import FIGURES

# A reading that fails leaves a thread of orbax behind, which calls back into its closed event loop.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PLAIN = Config(
    loss="cross-entropy",
    arch="64-10",
    epochs=4,
    batch_size=128,
    learning_rate=5e-3,
    validate_every=0,
    average="ema",
    average_from=1,
)


class Stop(Exception):
    """What ends a run early in these tests."""


def until(epoch: int) -> Callable[[dict[str, Any]], None]:
    """Interrupts after the checkpoint of `epoch`."""

    def progress(record: dict[str, Any]) -> None:
        if record["epoch"] == epoch:
            raise Stop

    return progress


def same(a: Any, b: Any) -> bool:
    return all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def without_times(log: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in log]


def check_resumed(found: Fitted, whole: Fitted, folder: pathlib.Path) -> None:
    """All leaves of the state bit for bit, and the log without gaps or duplicates."""
    assert same(found.state, whole.state)
    assert without_times(found.log) == without_times(whole.log)
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == list(found.log)
    opened = open_run(folder)
    x = digits().test_x[:4]
    np.testing.assert_array_equal(opened.model(x), whole.model(x))  # type: ignore[operator]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fit(PLAIN, out=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run with checkpoints of epochs 1 and 2; not to be changed."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(Stop):
        fit(PLAIN, out=folder, progress=until(2))
    return folder


@pytest.fixture
def copied(half: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(half, tmp_path / "run")
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------- the folder
def test_a_finished_run(whole: Fitted) -> None:
    folder = whole.folder
    assert folder is not None
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "log.jsonl",
        "model.safetensors",
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["3", "4"]
    run = open_run(str(folder))
    assert (run.folder, run.config, run.spec) == (folder, PLAIN, whole.spec)
    assert run.log == list(whole.log) == runs.read_log(folder)
    assert [record["epoch"] for record in run.log] == [1, 2, 3, 4]
    keys = {
        *FIGURES,
        "epoch",
        "loss",
        "accuracy",
        "skipped",
        "failed",
        "learning_rate",
        "seconds",
    }
    assert all(set(record) == keys for record in run.log)
    x = digits().test_x[:4]
    np.testing.assert_array_equal(run.model(x), whole.model(x))  # type: ignore[operator]
    again = resume(folder)
    assert same(again.state, whole.state) and again.log == whole.log
    with pytest.raises(FileExistsError, match="is already a run: resume it with"):
        fit(PLAIN, out=folder)


def test_what_is_no_run(half: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(RunError, match=r"has no model.safetensors yet: .*lipbounds train --resume"):
        open_run(half)
    with pytest.raises(RunError, match=r"is not a run folder: there is no config.json in it"):
        open_run(tmp_path)
    with pytest.raises(RunError, match="is not a run folder"):
        resume(tmp_path / "nowhere")
    path = tmp_path / "config.json"
    good = json.loads((half / "config.json").read_text())
    for text, message in (
        ("{", r"config.json cannot be read"),
        ("[]", "was not written by `lipbounds train`"),
        (json.dumps({**good, "format": "other"}), "was not written by"),
        (json.dumps({**good, "version": 2}), "has version 2; this program reads 1"),
        (json.dumps({**good, "config": {"epoch": 3}}), r"unknown settings: 'epoch' \(did you mean 'epochs'"),
        (json.dumps({**good, "config": []}), "must be a JSON object of settings"),
    ):
        path.write_text(text)
        with pytest.raises(RunError, match=message):
            resume(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_torn_last_line_is_left_out_and_a_broken_one_refused(tmp_path: pathlib.Path) -> None:
    records = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]
    runs.write_log(tmp_path, records)
    assert runs.read_log(tmp_path) == records
    whole = (path := tmp_path / "log.jsonl").read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:-cut])
        # a line that lacks no more than its newline is whole
        assert runs.read_log(tmp_path) == records[: whole[:-cut].count(b"}")]
    broken = {b'{"epoch": 1, "lo\n' + whole: "1 is not JSON", whole + b"3": "3 is no record of an epoch"}
    for text, message in broken.items():
        path.write_bytes(text)
        with pytest.raises(RunError, match=f"log.jsonl, line {message}"):
            runs.read_log(tmp_path)
    path.unlink()
    assert runs.read_log(tmp_path) == []


# ----------------------------------------------------------------------------------------------- resumption
@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(copied: pathlib.Path, whole: Fitted) -> None:
    """Also with a log that is ahead of the checkpoint, and torn."""
    record = {**whole.log[2], "loss": 7.0}
    with (copied / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n" + '{"epoch": 4, "lo')
    seen: list[Any] = []
    check_resumed(resume(copied, progress=seen.append), whole, copied)
    assert [r["epoch"] for r in seen] == [3, 4]


RESUMED = [
    {"constants": "liplt", "ramp": 2, "initialisation": "unit", "g": "logarithm"},
    *(
        pytest.param(fields, marks=pytest.mark.slow)
        for fields in (
            {"constants": "recursion", "arch": "64-8-10", "validate_every": 2},
            {"constants": "recursion", "arch": "64-8-10", "precision": "float64", "autoaugment": True},
            {"constants": "recursion"},  # a linear network: no multipliers
            {"loss": "gloro", "constants": "naive", "average": "swa", "flip": True, "degrees": 10.0},
            {"constants": "liplt", "optimiser": "nadam", "lookahead": 3, "schedule": "multi-step"},
            {"constants": "naive", "optimiser": "nadam", "schedule": "cyclic", "average": "ema", "crop": 1},
            {"loss": "margin", "constants": "naive", "arch": "lipnext-L1W8", "average": "ema", "crop": 1},
            {"constants": "local", "arch": "64-8-10", "activation": "clipped-relu", "eps": 0.1, "refresh": 1},
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("fields", RESUMED)
def test_resumption_with_constants_in_the_loss(tmp_path: pathlib.Path, fields: dict[str, Any]) -> None:
    """In the middle of a refresh cycle: vectors, held constants and their gradient, multipliers come back."""
    rest: dict[str, Any] = {
        "loss": "crm",
        "warmup": 1,
        "refresh": 4,
        "checkpoint_every": 2,
    }
    config = Config.from_json({**PLAIN.to_json(), **rest, "epochs": 5, **fields})
    whole = fit(config)
    with pytest.raises(Stop):
        fit(config, out=tmp_path / "run", progress=until(3))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["2", "3"]  # an exception that ends a run leaves its last epoch
    shutil.rmtree(checkpoints / "3")  # as if it had been killed
    check_resumed(resume(tmp_path / "run"), whole, tmp_path / "run")
    assert {"4", "5"} <= set(os.listdir(checkpoints))  # and the best one


def test_a_run_killed_before_its_first_checkpoint_begins_anew(copied: pathlib.Path, whole: Fitted) -> None:
    shutil.rmtree(copied / "checkpoints")
    check_resumed(resume(copied), whole, copied)


def edited(folder: pathlib.Path, **changes: dict[str, Any]) -> None:
    """Change entries of config.json; None deletes one."""
    record = json.loads((folder / "config.json").read_text())
    for name, entries in changes.items():
        record[name] = {k: v for k, v in (record[name] | entries).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(record))


def test_a_run_resumes_only_with_the_log_and_the_settings_of_its_checkpoint(copied: pathlib.Path) -> None:
    before = (copied / "log.jsonl").read_text()
    edited(copied, config={"batch_size": 64})
    with pytest.raises(
        RunError, match="epoch 2 was written after 22 steps, which are 44 with these settings"
    ):
        resume(copied)
    edited(copied, config={"batch_size": 128})
    (copied / "log.jsonl").write_text(before.splitlines()[1] + "\n")
    with pytest.raises(RunError, match=r"log.jsonl has no record of epoch 1, and there is a checkpoint of"):
        resume(copied)
    assert not (copied / "model.safetensors").exists()


def test_a_run_resumes_only_with_images_of_the_same_shape_and_levels(copied: pathlib.Path) -> None:
    data = digits()
    flat = {part: getattr(data, part).reshape(-1, 4, 16, 1) for part in ("train_pixels", "test_pixels")}
    for other in (dataclasses.replace(data, **flat), dataclasses.replace(data, levels=255)):
        with pytest.raises(RunError, match="was started with other data"):
            resume(copied, data=other)
    # a run of an earlier version, which recorded neither, and milestones that its schedule did not use
    edited(copied, data={"shape": None, "levels": None}, config={"milestones": "2"})
    runs.check_data(copied, loop._images(data).record())
    assert runs.read(copied) == PLAIN


def test_another_network_than_that_of_the_checkpoint(copied: pathlib.Path) -> None:
    path = copied / "config.json"
    path.write_text(path.read_text().replace('"64-10"', '"64-8-10"'))
    with pytest.raises(CheckpointError, match=r"it holds \d+ arrays, this configuration has \d+"):
        resume(copied)
    assert sorted(os.listdir(copied / "checkpoints")) == ["1", "2"]


# --------------------------------------------------------------------------------------------- checkpoints
def state(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal((40, 8)),
        "b": rng.standard_normal(3).astype(np.float32),
        "c": np.array(seed, np.int32),
        "d": np.zeros((0, 4), np.float32),
        "e": np.array([True, False]),
        "f": np.array([np.nan, -0.0, 1e-310]),
    }


def is_state(found: Any, seed: int) -> bool:
    return all(
        found[k].tobytes() == v.tobytes() and found[k].dtype == v.dtype for k, v in state(seed).items()
    )


def test_values_come_back_as_they_were(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path / "c") as made:
        with pytest.raises(CheckpointError, match="there is no complete checkpoint"):
            made.load(state(0))
        for epoch in (2, 4, 6):
            made.save(epoch, state(epoch))
        assert made.epochs() == [4, 6]  # the older ones are deleted
    with Checkpoints(tmp_path / "c") as made:
        epoch, found = made.load(state(0))
        assert epoch == 6 and is_state(found, 6)
        with pytest.raises(
            CheckpointError, match=r"epoch 6: array 00001 is float32\[3\], .* needs float32\[4\]"
        ):
            made.load({**state(0), "b": np.zeros(4, np.float32)})
        with pytest.raises(CheckpointError, match="it holds 5 arrays, this configuration has 1"):
            made.load({"a": np.zeros(3)})


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def test_whatever_is_damaged_an_older_checkpoint_is_taken(tmp_path: pathlib.Path) -> None:
    """Every file of the newest checkpoint cut to half, or with a byte changed: never other values, never no values."""
    with Checkpoints(tmp_path / "good") as made:
        for epoch in (1, 2):
            made.save(epoch, state(epoch))
    older = 0
    relative = [path.relative_to(tmp_path / "good") for path in files_of(tmp_path / "good" / "2")]
    for number, name in enumerate(relative):
        data = (tmp_path / "good" / name).read_bytes()
        middle = len(data) // 2
        changed = data[:middle] + bytes([data[middle] ^ 0x5A]) + data[middle + 1 :]
        for kind, broken in (("cut", data[:middle]), ("changed", changed)):
            folder = tmp_path / f"{number}-{kind}"
            shutil.copytree(tmp_path / "good", folder)
            (folder / name).write_bytes(broken)
            with Checkpoints(folder) as made:
                epoch, found = made.load(state(0))
            assert is_state(found, epoch), (kind, name)
            older += epoch == 1
    assert older >= 4


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_run_goes_on_from_the_older_checkpoint_and_replaces_the_damaged_one(
    copied: pathlib.Path, whole: Fitted, damage: str
) -> None:
    if damage == "removed":
        shutil.rmtree(copied / "checkpoints" / "2" / "state")
    for path in files_of(copied / "checkpoints" / "2"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    seen: list[Any] = []
    check_resumed(resume(copied, progress=seen.append), whole, copied)
    assert [record["epoch"] for record in seen] == [2, 3, 4]


def test_nothing_but_damaged_checkpoints(copied: pathlib.Path) -> None:
    for epoch in (1, 2):
        shutil.rmtree(copied / "checkpoints" / str(epoch) / "state")
    with pytest.raises(CheckpointError, match=r"nothing to resume in .*: epoch 2: .*; epoch 1: "):
        resume(copied)


# ----------------------------------------------------------------------------------------------- full disks
FULL = textwrap.dedent("""
    import json, resource, signal, sys
    import numpy as np
    from lipbounds.training.checkpoints import Checkpoints, CheckpointError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing beyond the limit is an error, as on a full disk
    folder, limit = sys.argv[1], int(sys.argv[2])
    state = lambda n: {"a": np.random.default_rng(n).standard_normal(30_000)}
    with Checkpoints(__import__("pathlib").Path(folder)) as made:
        made.save(1, state(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            made.save(2, state(2))
            print("written")
        except CheckpointError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with Checkpoints(__import__("pathlib").Path(folder)) as made:
        epoch, found = made.load(state(0))
        assert epoch == 1 and np.array_equal(found["a"], state(1)["a"])
        made.save(2, state(2))
        assert np.array_equal(made.load(state(0))[1]["a"], state(2)["a"])
""")


def python(script: str, *arguments: Any, wait: bool = True) -> Any:
    """The script in a process of its own; its output."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    if not wait:
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
@pytest.mark.parametrize(
    "limit", [100_000, pytest.param(2000, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.slow)]
)
def test_a_disk_that_is_full(tmp_path: pathlib.Path, limit: int) -> None:
    said = python(FULL, tmp_path / "c", limit).strip()
    assert "the checkpoint of epoch 2 could not be written to " in said and str(tmp_path) in said
    assert said.endswith("; the checkpoint of epoch 1 is complete") and "\n" not in said


def test_a_run_whose_checkpoint_cannot_be_written(
    tmp_path: pathlib.Path, whole: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)

    with pytest.raises(
        CheckpointError, match=r"epoch 3 .*No space left.*; the checkpoint of epoch 2 is complete"
    ):
        fit(PLAIN, out=folder, progress=fill)
    monkeypatch.undo()
    check_resumed(resume(folder), whole, folder)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_run_whose_log_cannot_be_written(
    copied: pathlib.Path, whole: Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            (copied / "log.jsonl").unlink()
            (copied / "log.jsonl").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"log.jsonl cannot be written: .*No space left.* resume the run"):
        resume(copied, progress=fill)
    (copied / "log.jsonl").unlink()
    runs.write_log(copied, list(whole.log[:3]))
    check_resumed(resume(copied), whole, copied)


# ------------------------------------------------------------------------------------------------- kill -9
KILLED = textwrap.dedent("""
    import pathlib, sys
    from lipbounds.training.loop import resume
    import lipbounds.training.loop as loop
    import lipbounds.training.checkpoints as checkpoints
    save = checkpoints.Checkpoints.save
    def told(self, epoch, state, best):
        print("saving", epoch, flush=True)
        save(self, epoch, state, best)
    checkpoints.Checkpoints.save = told
    resume(sys.argv[1])
    print("done", flush=True)
""")


def killed(folder: pathlib.Path, delay: float) -> bool:
    """Resume in a process that is killed `delay` seconds after it begins its first checkpoint; False if it was done."""
    process = python(KILLED, folder, wait=False)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("saving"):
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), "".join(lines) + rest
    return process.returncode != 0


def test_kill_9_while_a_checkpoint_is_written(copied: pathlib.Path, whole: Fitted) -> None:
    assert killed(copied, 0.004)
    check_resumed(resume(copied), whole, copied)
    names = sorted(os.listdir(copied / "checkpoints"))
    assert names == ["3", "4"]  # what was half written is gone


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optimiser": "nadam", "lookahead": 6, "schedule": "multi-step"},
        {"optimiser": "nadam", "lookahead": 6, "schedule": "cyclic", "average": "ema"},
        {"arch": "lipnext-L1W8", "schedule": "cosine", "average": "ema"},
    ],
    ids=lambda fields: fields.get("schedule", "adam"),
)
def test_kill_9_again_and_again(tmp_path: pathlib.Path, fields: dict[str, Any]) -> None:
    config = Config.from_json(
        {**PLAIN.to_json(), "epochs": 60, "loss": "crm", "constants": "liplt", "warmup": 2, "ramp": 9}
        | {"initialisation": "unit", "eps": 0.1, **fields}
    )
    whole = fit(config)
    with pytest.raises(Stop):
        fit(config, out=tmp_path / "run", progress=until(1))
    draw = random.Random(0)
    kills = sum(killed(tmp_path / "run", draw.uniform(0, 0.4)) for _ in range(8))
    assert kills >= 3
    check_resumed(resume(tmp_path / "run"), whole, tmp_path / "run")
