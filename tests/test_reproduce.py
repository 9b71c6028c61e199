"""`lipbounds reproduce`: its rows, a miniature of every data set, resumption, tables with the paper's figures."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import pathlib
import struct
from typing import Any

import numpy as np
import pytest
from command import run
from PIL import Image

from lipbounds._cli import tables
from lipbounds.analysis import reproduction
from lipbounds.analysis.table1_rows import CONSTANTS, PUBLISHED, ROWS, chosen, others
from lipbounds.training import fit
from lipbounds.training.runs import open_run

SHAPES = {"mnist": ((28, 28, 1), 10), "cifar10": ((32, 32, 3), 10), "tiny-imagenet": ((64, 64, 3), 200)}

SMALL_SHAPES = {"mnist": ((14, 14, 1), 10), "cifar10": ((16, 16, 3), 10), "tiny-imagenet": ((16, 16, 3), 200)}
#: One row of each kind of network and loss.
KINDS = ("mnist/crm", "mnist/local-lip", "mnist/crm-mlp", "tiny-imagenet/gloro", "tiny-imagenet/liresnet")


def test_every_row_is_a_configuration_that_fits_its_images() -> None:
    for name, row in ROWS.items():
        config = row.config(40)
        assert config.dataset == row.group and config.epochs == 40, name
        assert config.eps == pytest.approx(1.58 if row.group == "mnist" else 36 / 255)
        config.spec(*SHAPES[row.group])
        small = reproduction.Plan(small=True, epochs=2, limit=64).config(row)
        assert small.batch_size == 16 and small.loss == config.loss and small.constants == config.constants
        small.spec(*SMALL_SHAPES[row.group])
    kinds = {(row.config().loss, row.config().constants) for row in ROWS.values()}
    assert {("crm", "liplt"), ("crm", "naive"), ("crm", "recursion"), ("emma", "naive")} <= kinds
    assert {row.config().loss for row in ROWS.values()} >= {
        "cross-entropy",
        "gloro-trades",
        "lipschitz-margin",
    }


def test_settings_of_a_plan_go_before_its_other_ones() -> None:
    row = ROWS["mnist/standard"]
    settings = {"arch": "4C3F", "seed": 3, "epochs": 5, "batch_size": 7}
    plan = reproduction.Plan(small=True, epochs=2, limit=64, settings=settings)
    found = plan.config(row).to_json()
    assert {name: found[name] for name in settings} == settings
    with pytest.raises(ValueError, match="epochs must be a whole number >= 1, got 'two'"):
        reproduction.Plan(settings={"epochs": "two"}).config(row)
    whole = dataclasses.replace(plan, small=False)  # other images, whatever the configuration is
    assert reproduction._settings(plan.config(row), plan) != reproduction._settings(plan.config(row), whole)


def test_the_printed_figures_are_those_of_the_paper() -> None:
    """Typed in again from Tables 1 and 2, row by row."""
    printed = {
        "mnist": [(99.0, 45.4, 0.0), (92.9, 68.9, 50.1), (96.3, 78.2, 55.8), (96.27, 88.04, 63.37)],
        "cifar10": [
            (87.5, 32.5, 0.0), (77.0, 69.2, 58.4), (76.4, 69.2, 51.3), (70.7, 64.8, 54.3), (77.4, 70.4, 60.7),
            (75.31, None, 60.37), (76.23, None, 62.57), (76.39, None, 62.96), (71.2, None, 62.6),
            (69.8, None, 62.0), (71.1, None, 63.8), (74.82, 72.31, 64.16),
        ],
        "tiny-imagenet": [
            (35.9, 19.4, 0.0), (37.4, 34.2, 13.2), (30.8, 28.4, 20.7), (35.5, 32.3, 22.4), (36.9, 33.3, 23.4),
            (26.6, None, 19.5), (23.97, 23.04, 17.98),
        ],
    }  # fmt: skip
    assert {g: [(p.clean, p.pgd, p.certified) for p in rows] for g, rows in PUBLISHED.items()} == printed
    assert [CONSTANTS[g]["liplt"][0] for g in printed] == [64.10, 11.26, 9.46]
    assert [CONSTANTS[g]["naive"][2] for g in printed] == [2759.63, 139.75, 2057.00]
    crm = {g: ROWS[f"{g}/crm"].published for g in printed}
    assert [(p.certified if p else None) for p in crm.values()] == [63.37, 64.16, 17.98]


def test_rows_are_chosen_by_name_or_by_data_set() -> None:
    assert [row.name for row in chosen(["mnist/crm", "mnist/crm"])] == ["mnist/crm"]
    assert {row.group for row in chosen(["cifar10"])} == {"cifar10"} and len(chosen(None)) == len(ROWS)
    with pytest.raises(ValueError, match="unknown row 'svhn'; known: mnist, cifar10"):
        chosen(["svhn"])
    with pytest.raises(ValueError, match=r"unknown row 'mnist/crmm' \(did you mean 'mnist/crm'\?\)"):
        chosen(["mnist/crmm"])
    assert run("reproduce", "table1", "--list", "--rows", "mnist/crm, mnist/lmt").stdout.count("mnist/") == 2
    assert "unknown row ''" in run("reproduce", "table1", "--list", "--rows", "", code=1).stderr
    left = others("mnist", chosen(["mnist/crm"]))
    assert [published.method for published in left] == ["Standard", "GloRo", "Local-Lip"]


def test_a_row_whose_bounds_are_all_refused_keeps_its_other_figures() -> None:
    at = {"eps_pixels": 1.58, "eps_paper": 1.58, "clean": 0.9, "pgd": {"2": {"1.58": 0.5}}, "epochs": 2}
    record: dict[str, Any] = at | {"certified": {}, "constants": {}, "guarantee": {}, "radii": {}}
    assert reproduction.best_method(record) is None
    (line, *_) = reproduction.accuracy_rows(chosen(["mnist/crm"]), {"mnist/crm": record})
    assert line[3:10] == ["2", "90.00", "50.00", "", "", "none", ""]
    assert len(line) == len(reproduction.COLUMNS)
    reproduction.radii_of_rows("mnist", {"CRM": record})  # no curve, no legend


def test_what_is_left_is_estimated_from_rows_on_the_same_images() -> None:
    rows = chosen(["mnist/crm", "mnist/gloro", "cifar10/crm"])
    clock = reproduction.Clock({row.name: row.config(10) for row in rows})
    assert clock.remaining() is None
    clock.epoch("mnist/crm", 2.0, 9)
    assert clock.remaining() == pytest.approx(2 * (9 + 10 + 10))
    clock.epoch("mnist/crm", 4.0, 0)
    clock.epoch("cifar10/crm", 10.0, 9)
    assert clock.remaining() == pytest.approx(3 * 10 + 10 * 9)
    assert tables._duration(7384) == "2 h 3 min" and tables._duration(600) == "10 min"


def fake(row: Any, certified: float) -> Any:
    eps = row.config().eps
    factor = 2 if row.group == "cifar10" else 1
    shares = {str(eps): certified, str(eps / factor): certified + 0.1}
    constants = {"value": 1.0, "average_pair": 1.23456789, "average_sum": 2.0, "average_sqrt2": 3.0}
    radii = {"eps": [0.0, 1.0], "accuracy": [0.8, 0.0]}
    return {
        "eps_pixels": eps, "eps_paper": eps / factor, "units": "u", "epochs": 3, "training_seconds": 1.0,
        "evaluation_seconds": 2.0, "warnings": None, "local": None, "clean": 0.8, "images": 10, "refused": {},
        "pgd": {"2": {str(eps): 0.7, str(eps / factor): 0.75}},
        "certified": {"naive": dict.fromkeys(shares, 0.0), "liplt": shares},
        "guarantee": {"naive": "verified", "liplt": "verified"},
        "constants": {"naive": constants, "liplt": constants}, "radii": {"naive": radii, "liplt": radii},
    }  # fmt: skip


def test_tables_show_both_units_and_the_paper_beside_ours(tmp_path: pathlib.Path) -> None:
    rows = chosen(["mnist/crm", "cifar10/crm", "cifar10/gloro"])
    done = {row.name: fake(row, 0.6) for row in rows[:2]}
    record = reproduction._write(tmp_path, rows, done, reproduction.Plan())
    by_name = {(line["data"], line["method"]): line for line in record["table1"]}
    ours = by_name["cifar10", "CRM (LipLT)"]
    assert (ours["certified"], ours["certified, paper's units"], ours["bound"]) == ("60.00", "70.00", "LipLT")
    assert (ours["PGD"], ours["paper: certified"], ours["paper: PGD"]) == ("70.00", "64.16", "72.31")
    assert by_name["cifar10", "GloRo (naive)"]["epochs"] == "not run"
    assert by_name["cifar10", "SLL"]["paper: PGD"] == "—" and by_name["cifar10", "SLL"]["clean"] == ""
    assert {path.name for path in tmp_path.iterdir()} == {
        "table1.json", "table1.csv", "table2.csv", "table1.md", "mnist.png", "cifar10.png",
    }  # fmt: skip
    with (tmp_path / "table1.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == record["table1"]
    text = (tmp_path / "table1.md").read_text()
    assert "| 64.16 |" in text and "1.2346" in text and "A trial" not in text
    assert "A trial" in reproduction.page(rows, done, reproduction.Plan(small=True))


def idx(path: pathlib.Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Miniatures of MNIST and Tiny-ImageNet in their official layouts: the class is how bright an image is."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 96), ("t10k", 24)):
        labels = np.arange(count) % 10
        bright = rng.integers(0, 30, (count, 28, 28)) + 22 * labels[:, None, None]
        idx(folder / f"{part}-images-idx3-ubyte.gz", bright)
        idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    tiny, wnids = folder / "tiny-imagenet-200", [f"n{k:02}" for k in range(3)]
    lines = []
    for part, per_class in (("train", 16), ("val", 4)):
        for number, wnid in enumerate(wnids):
            for k in range(per_class):
                name = f"{wnid}_{k}.JPEG" if part == "train" else f"val_{4 * number + k}.JPEG"
                place = tiny / part / wnid / "images" if part == "train" else tiny / part / "images"
                place.mkdir(parents=True, exist_ok=True)
                noise = rng.integers(0, 40, (64, 64, 3)) + 90 * number
                Image.fromarray(np.minimum(noise, 255).astype(np.uint8)).save(place / name)
                lines += [f"{name}\t{wnid}\t0\t0\t5\t5"] if part == "val" else []
    (tiny / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (tiny / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return folder


def command(data: pathlib.Path, out: pathlib.Path, *more: Any, code: int = 0, table: str = "table1") -> Any:
    options = ["--small", "--epochs", 2, "--limit", 32, "--pgd-steps", 2, "--images", 8]
    return run("reproduce", table, "--data-dir", data, "--out", out, *options, *more, code=code)


class Stop(Exception):
    """Ends a run after its first epoch."""


def stop(record: Any) -> None:
    raise Stop


@pytest.mark.slow
def test_a_miniature_of_every_kind_of_row_resumes(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A run that stopped after one epoch goes on as if it had not, a finished row is left alone."""
    out, row = tmp_path / "out", ROWS[KINDS[0]]
    plan = reproduction.Plan(str(data), epochs=2, limit=32, small=True, pgd_steps=2, images=8)
    whole = fit(plan.config(row), plan.data("mnist"), out=tmp_path / "whole")
    with pytest.raises(Stop):
        fit(plan.config(row), plan.data("mnist"), out=out / row.name / "run", progress=stop)
    (out / "table1.json").write_text(json.dumps({"format": "lipbounds-results"}))
    result = command(data, out, "--rows", ",".join(KINDS))
    assert "of training left" in result.output
    assert [r["loss"] for r in open_run(out / row.name / "run").log] == [r["loss"] for r in whole.log]
    record = json.loads((out / "table1.json").read_text())
    assert set(record["rows"]) == set(KINDS) and all(record["rows"].values())
    for name, found in record["rows"].items():
        assert found["epochs"] == 2 and set(found["guarantee"].values()) == {"verified"}, name
        assert (found["local"] is not None) == ("local" in name)
        if found["local"]:
            assert found["local"]["global"] <= found["local"]["local"] <= 1
        assert ("lipsdp" in found["certified"]) == ("mlp" in name)
        eps = str(found["eps_pixels"])
        assert found["certified"]["liplt"][eps] <= found["pgd"]["2"][eps]
    assert "A trial" in (out / "table1.md").read_text()
    logs = [(out / name / "run" / "log.jsonl").stat().st_mtime_ns for name in KINDS]
    command(data, out, "--rows", ",".join(KINDS))
    assert logs == [(out / name / "run" / "log.jsonl").stat().st_mtime_ns for name in KINDS]
    message = command(data, out, "--rows", row.name, "--seed", 1, code=1).stderr
    assert "was trained with other settings (seed)" in message


def test_what_is_wrong_is_said_before_anything_is_trained(tmp_path: pathlib.Path) -> None:
    shown = run("reproduce", "table1", "--list", "--out", tmp_path / "none").output
    assert "mnist/crm" in shown and "liresnet-L6W64" in shown and not (tmp_path / "none").exists()
    (tmp_path / "notes.txt").write_text("mine")
    assert "did not write" in run("reproduce", "table1", "--out", tmp_path, code=1).stderr
    bad = run("reproduce", "table1", "--out", tmp_path / "a", "--settings", '{"lamda": 1}', code=1).stderr
    assert "unknown settings: 'lamda'" in bad
    empty = tmp_path / "empty"
    empty.mkdir()
    said = run(
        "reproduce", "table1", "--data-dir", empty, "--out", tmp_path / "b", "--rows", "mnist", code=1
    ).stderr
    assert "no files of MNIST" in said and not (tmp_path / "b").exists()


def test_rows_are_listed_without_a_folder_and_training_asks_for_one() -> None:
    assert "mnist/" in run("reproduce", "table1", "--list").output
    assert "add --out DIR" in run("reproduce", "table1", code=1).output
