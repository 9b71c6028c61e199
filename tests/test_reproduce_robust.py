"""`lipbounds reproduce robust`: its rows, their table, and a miniature that trains, is attacked and resumes."""

from __future__ import annotations

import csv
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from command import run
from test_reproduce import SHAPES, SMALL_SHAPES, command

from lipbounds.analysis import reproduction, robust_reproduction
from lipbounds.analysis.robust_rows import PRINTED, ROBUST_ROWS, WIDE, plain_of, printed
from lipbounds.analysis.table1_rows import chosen

MORE = {"cifar100": ((32, 32, 3), 100)}
FEWER = {"cifar100": ((16, 16, 3), 100)}


def test_every_row_is_a_configuration_that_fits_its_images() -> None:
    for name, row in ROBUST_ROWS.items():
        config = row.config()
        assert (config.dataset, config.epochs, config.edges) == (row.group, 100, (50, 75)), name
        assert config.robust == ("plain" not in name) and config.attack_eps == pytest.approx(8 / 255)
        config.spec(*(SHAPES | MORE)[row.group])
        small = reproduction.Plan(small=True, epochs=2, limit=64).config(row)
        assert small.loss == config.loss and small.batch_size == 16 and small.edges == (1,)
        small.spec(*(SMALL_SHAPES | FEWER)[row.group])
        assert plain_of(row) in ROBUST_ROWS
    assert plain_of(ROBUST_ROWS["cifar10/wrn-at"]) == "cifar10/wrn-plain"
    assert ROBUST_ROWS["cifar10/wrn-war"].config().war == 30.0
    assert {row.config().arch for row in ROBUST_ROWS.values()} == {"resnet18", "resnet50", "wrn-34-10"}


def test_every_printed_figure_has_its_row() -> None:
    names = {f"{group}/{loss}" for group, losses in PRINTED.items() for loss in losses}
    names |= {f"cifar10/wrn-{loss}" for loss in (*WIDE, "war")}
    assert {name for name, row in ROBUST_ROWS.items() if any(vars(printed(row)).values())} == names
    found = printed(ROBUST_ROWS["cifar100/backward-smoothing"])
    assert (found.natural, found.pgd, found.autoattack, found.minutes) == (56.96, 30.50, None, 164)
    assert printed(ROBUST_ROWS["cifar10/wrn-war"]).autoattack == 54.73


def fake(seconds: float, loss: str = "") -> dict[str, Any]:
    shares = {"0.1": 0.5}
    return {
        "arch": "resnet18", "epochs": 3, "epoch_seconds": seconds, "natural": 0.8, "eps": [0.1], "images": 10,
        "PGD": shares, "AutoAttack": {"0.1": 0.25}, "training_seconds": 1.0, "evaluation_seconds": 2.0, "warning": loss,
    }  # fmt: skip


def test_times_stand_beside_plain_training_and_fast_at(tmp_path: pathlib.Path) -> None:
    rows = chosen(["cifar10/plain", "cifar10/fast-at", "cifar10/at", "cifar10/wrn-at"], ROBUST_ROWS)
    done = {"cifar10/plain": fake(2.0), "cifar10/fast-at": fake(4.0, "overfits"), "cifar10/at": fake(22.0)}
    record = robust_reproduction.write(tmp_path, rows, done, reproduction.Plan(epochs=3))
    lines = {(line["loss"], line["network"]): line for line in record["robust"]}
    at = lines["at", "resnet18"]
    assert (at["natural"], at["PGD"], at["AutoAttack"]) == ("80.00", "50.00", "25.00")
    assert (at["/ plain"], at["/ fast-at"], at["paper: / fast-at"]) == ("11.00", "5.50", "5.24")
    assert (at["paper: natural"], at["paper: PGD"], at["paper: minutes"]) == ("82.36", "51.14", "430")
    wide = lines["at", "wrn-34-10"]
    assert wide["epochs"] == "not run" and wide["paper: AutoAttack"] == "49.1"
    with (tmp_path / "robust.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == record["robust"]
    text = (tmp_path / "robust.md").read_text()
    assert "A trial" in text and "- cifar10/fast-at: overfits" in text and "is at most that under PGD" in text


def test_the_time_of_an_epoch_is_one_without_compilation_and_attacks() -> None:
    log: list[dict[str, Any]] = [{"seconds": 90.0}, {"seconds": 2.0}, {"seconds": 8.0, "pgd_accuracy": 0.1}]
    assert robust_reproduction.epoch_seconds([*log, {"seconds": 4.0}]) == 3.0
    assert robust_reproduction.epoch_seconds([log[0], log[2]]) == 8.0
    assert robust_reproduction.epoch_seconds(log[:1]) == 90.0


def test_the_rows_are_listed() -> None:
    shown = run("reproduce", "robust", "--list").output
    assert "tiny-imagenet/backward-smoothing  " in shown and "wrn-34-10, 100 epochs" in shown
    assert "mnist" not in shown


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    """A miniature of CIFAR-10 in its official layout: the class is how bright an image is."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        labels = np.arange(10, dtype=np.uint8)[:, None]
        pixels = rng.integers(0, 30, (10, 3072)) + 22 * labels
        (folder / f"{name}.bin").write_bytes(np.hstack([labels, pixels]).astype(np.uint8).tobytes())
    return folder


@pytest.mark.slow
def test_a_miniature_is_trained_attacked_and_left_alone(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    names = [f"cifar10/{name}" for name in ("plain", "fast-at")]
    more, out = ("--rows", ",".join(names), "--epochs", 3), tmp_path / "out"
    command(data, out, *more, table="robust")
    record = json.loads((out / "robust.json").read_text())
    assert set(record["rows"]) == set(names)
    for found in record["rows"].values():
        (eps,) = map(str, found["eps"])
        assert found["AutoAttack"][eps] <= found["PGD"][eps] <= found["natural"]
        assert found["epochs"] == 3 and found["epoch_seconds"] > 0 and found["images"] == 8
    assert record["robust"][0]["/ plain"] == "1.00"
    logs = [(out / name / "run" / "log.jsonl").stat().st_mtime_ns for name in names]
    command(data, out, *more, table="robust")
    assert logs == [(out / name / "run" / "log.jsonl").stat().st_mtime_ns for name in names]
