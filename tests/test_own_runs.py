"""Networks that were trained on a user's own images go through the commands about trained networks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from command import run

import lipbounds._cli.evaluate as command_evaluate
from lipbounds._cli.trained import open_subject
from lipbounds.training import Config, runs
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import save_model

SPEC = ModelSpec("mlp", (4, 4, 1), {"widths": "16-4-2"})


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    file = tmp_path / "mine.npz"
    np.savez(file, x=rng.integers(0, 256, (40, 4, 4, 1), np.uint8), y=np.arange(40) % 2)
    return file


@pytest.fixture
def folder(mine: Path, tmp_path: Path) -> Path:
    config = dataclasses.replace(Config.usual(str(mine), arch="16-4-2"), eps=0.25)
    runs.create(tmp_path / "run", config, {"name": str(mine)})
    runs.write_model(tmp_path / "run", build(SPEC), SPEC)
    return tmp_path / "run"


def test_a_run_on_own_images_has_the_radius_of_its_validation(folder: Path) -> None:
    assert command_evaluate._usual_eps(open_subject(folder, None)) == 0.25


@pytest.mark.slow
def test_a_run_on_own_images_is_evaluated(folder: Path) -> None:
    run("evaluate", folder, "--methods", "naive", "--pgd-steps", "2")
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["eps"] == [0.25] and record["images"] == 8


def test_a_model_file_with_own_images_needs_a_radius(mine: Path, tmp_path: Path) -> None:
    file = save_model(tmp_path / "net.safetensors", build(SPEC), SPEC)
    said = run("evaluate", file, "--dataset", mine, "--methods", "naive", code=1).stderr
    assert "mine.npz has no usual radius: add --eps" in said
