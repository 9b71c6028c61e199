"""docs/attacks.md: its examples run, its commands parse, and the names and fields that it lists exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from command import run

from lipbounds import analysis
from lipbounds._cli.certify import COLUMNS as CERTIFIED
from lipbounds._cli.main import app
from lipbounds.analysis.attack_report import COLUMNS, attack_record
from lipbounds.training.data import digits
from lipbounds.training.store import load_model

PAGE = (Path(__file__).parents[1] / "docs" / "attacks.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def first_column(text: str) -> set[str]:
    """The names in backticks in the first column of the tables."""
    cells = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    return {name.removesuffix("()") for cell in cells for name in re.findall(r"`([\w.()]+)`", cell)}


def test_the_functions_of_the_page_are_all_there_are() -> None:
    attacks = first_column(section("Which attack when"))
    assert attacks == {
        "autoattack", "apgd", "fab", "square", "pgd", "odi_pgd", "mi_fgsm", "fgsm", "frank_wolfe",
        "black_frank_wolfe", "nes_pgd", "rays", "adbd", "in_distribution",
    }  # fmt: skip
    for name in attacks | (first_column(section("Diagnostics")) - {"curve"}):
        assert callable(getattr(analysis, name)), name


def test_the_fields_of_the_page_are_those_that_are_written() -> None:
    text = section("What the commands write")
    named = set(re.findall(r"`(\w+)`", text))
    x = np.float32([[0.2, 0.7], [0.9, 0.1]])
    fn = lambda batch: batch  # noqa: E731
    record = attack_record(analysis.fgsm(fn, x, np.array([1, 0]), 0.1), fn, np.array([1, 0]))
    about = {"attack", "norm", "eps", "images"}  # what was asked for
    assert set(record) - about <= named and set(COLUMNS) <= named
    assert {"certified_radius", "attacked_distance"} <= named & set(CERTIFIED)


@pytest.mark.slow
def test_the_examples_run(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = digits()
    names: dict[str, Any] = {"model": load_model(model_file)[0], "x": data.test_x[:40], "y": data.test_y[:40]}
    assert len(blocks("python")) == 5
    for block in blocks("python"):
        exec(block, names)
    said = capsys.readouterr().out
    assert "white-box beats black-box" in said and said.count("lower bound") == 2


def test_the_commands_parse(model_file: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        _, command, *words = shlex.split(line, comments=True)
        given = [str(model_file) if word.startswith(("report/", "runs/")) else word for word in words]
        context = commands[command].make_context(command, given)
        if command == "certify":
            assert context.params["attack"] == "autoattack" and list(context.params["eps"]) == [0.1, 0.3]


@pytest.mark.slow
def test_both_sides_from_the_command_line_in_l1(model_file: Path) -> None:
    words = ("--norm", "1", "--method", "liplt", "--eps", "0.2", "--attack", "frank-wolfe")
    assert "certified <= robust <=" in run("certify", model_file, *words).stdout
