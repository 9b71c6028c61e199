"""Certification in blocks: interrupted, resumed, and shared by processes, always with the same radii."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import run

import lipbounds as lb
from lipbounds._cli import certify
from lipbounds._margins import blocks as module
from lipbounds._margins.blocks import Unfinished, blocks, joined, radii_of, record_of
from lipbounds._margins.margins import WORDS

SETTINGS = {"seed": 0}


def some(radius: list[float], guarantee: str = "verified", notes: tuple[str, ...] = ()) -> lb.Radii:
    r = np.array(radius)
    return lb.Radii(r, r > 0, 2, guarantee, "liplt", notes)


def test_blocks_depend_on_sizes_alone() -> None:
    narrow = lb.from_weights([np.ones((4, 3)), np.ones((2, 4))])
    wide = lb.from_weights([np.ones((3000, 3)), np.ones((2, 3000))])
    assert blocks(narrow, 2000, True) == [slice(0, 1024), slice(1024, 2000)]
    assert blocks(narrow, 2000, False) == [slice(0, 2000)]
    assert blocks(wide, 20, True) == [slice(0, 8), slice(8, 16), slice(16, 20)]
    assert blocks(narrow, 0, True) == []
    assert blocks(narrow, 20, True, margins=True) == [slice(0, 16), slice(16, 20)]


def test_joined_radii() -> None:
    first = some([0.5, np.inf, 0.0], notes=("LipLT for 2 of 3 examples, with 4", "same"))
    second = some([0.25], "probabilistic", ("LipLT for 1 of 1 examples, with 4", "same", "other"))
    whole = joined([first, second])
    assert whole.radius.tolist() == [0.5, np.inf, 0.0, 0.25]
    assert whole.correct.tolist() == [True, True, False, True]
    assert whole.guarantee == "probabilistic"
    assert whole.notes == ("LipLT for 3 of 4 examples, with 4", "same", "other")
    assert whole.outcome is None and whole.counts == {}
    each = [
        dataclasses.replace(part, outcome=np.array(words, WORDS))
        for part, words in ((first, ["global", "dual", "wrong"]), (second, ["out of time"]))
    ]
    both = radii_of(json.loads(json.dumps(record_of(joined(each)))))
    assert both.outcome is not None and both.outcome.tolist() == ["global", "dual", "wrong", "out of time"]
    assert joined([first, each[1]]).outcome is None
    with pytest.raises(ValueError, match="do not fit together"):
        radii_of(record_of(whole) | {"outcome": ["global"]})
    again = radii_of(json.loads(json.dumps(record_of(whole))))
    assert again.radius.tolist() == whole.radius.tolist() and again.notes == whole.notes


def test_what_is_unfinished_is_kept_and_read_by_all_processes(tmp_path: Path) -> None:
    file = tmp_path / "radii.json"
    Unfinished(file, 0, SETTINGS).add(0, some([0.1, 0.2]))
    other = Unfinished(file, 1, SETTINGS)
    other.add(1, some([0.3]))
    other.add(3, some([0.4]))
    assert sorted(Unfinished(file, 0, SETTINGS).done) == [0, 1, 3]
    with pytest.raises(ValueError, match="unfinished-0 is the rest of a certification with another model"):
        Unfinished(file, 0, {"seed": 1})
    whole = Unfinished(file, 0, SETTINGS)
    whole.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_is_certified_again(tmp_path: Path) -> None:
    file = tmp_path / "radii.json"
    kept = Unfinished(file, 0, SETTINGS)
    for block in range(3):
        kept.add(block, some([0.1 * block + 0.1]))
    rest = tmp_path / "radii.json.unfinished-0"
    rest.write_text(rest.read_text()[:-20])
    again = Unfinished(file, 0, SETTINGS)
    assert sorted(again.done) == [0, 1]
    again.add(2, some([0.7]))
    found = Unfinished(file, 0, SETTINGS).done
    assert found[2].radius.tolist() == [0.7] and len(found) == 3


@pytest.mark.parametrize("rest", ["", '{"format": "lipbounds-unf', "{}"])
def test_a_first_line_that_was_cut_off_is_written_anew(tmp_path: Path, rest: str) -> None:
    file, other = tmp_path / "radii.json", tmp_path / "radii.json.unfinished-1"
    for path in (tmp_path / "radii.json.unfinished-0", other):
        path.write_text(rest)
    kept = Unfinished(file, 0, SETTINGS)
    assert kept.done == {}
    kept.add(0, some([0.1]))
    kept.add(1, some([0.2]))
    again = Unfinished(file, 0, SETTINGS)
    assert [again.done[block].radius.tolist() for block in (0, 1)] == [[0.1], [0.2]]
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_a_block_is_kept_names_the_file(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept = Unfinished(tmp_path / "radii.json", 0, SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left.*unfinished-0"):
        patch.setattr(os, "fsync", full)
        kept.add(0, some([0.1]))
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_is_nested_too_deeply_is_another_file(tmp_path: Path) -> None:
    (tmp_path / "radii.json.unfinished-0").write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="unfinished-0 is the rest of a certification with another model"):
        Unfinished(tmp_path / "radii.json", 0, SETTINGS)


def _rest(file: Path, form: lb.LureForm, bound: lb.UpperBound) -> Unfinished:
    x, y = np.ones((2, 4), np.float32), np.zeros(2, np.int64)
    return certify._kept(form, x, y, bound, lb.Local(), {"guarantee": "auto"}, file)


def test_nothing_is_taken_over_from_the_same_weights_in_another_order(tmp_path: Path) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 4, 4))
    first, second = lb.from_weights([a, b]), lb.from_weights([b, a])
    bounds = [lb.naive(form) for form in (first, second)]
    assert bounds[0].value == bounds[1].value  # the product of the same norms
    file = tmp_path / "radii.json"
    _rest(file, first, bounds[0]).add(0, some([0.1, 0.2]))
    assert list(_rest(file, lb.from_weights([a, b]), bounds[0]).done) == [0]
    with pytest.raises(ValueError, match="another model, data or options"):
        _rest(file, second, bounds[1])


@pytest.mark.parametrize(
    "change",
    [{"pairwise": None}, {"guarantee": "assumed"}, {"per_class": np.ones(4)}, {"norm": np.inf}],
    ids=str,
)
def test_nothing_is_taken_over_from_another_bound_of_the_same_value(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    form = lb.from_weights([np.eye(4), np.ones((4, 4))])
    bound, file = lb.naive(form, pairwise=True), tmp_path / "radii.json"
    _rest(file, form, bound).add(0, some([0.1, 0.2]))
    with pytest.raises(ValueError, match="another model, data or options"):
        _rest(file, form, dataclasses.replace(bound, **change))


def test_an_interrupted_certification_goes_on(model_file: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_MOST", 100)
    calls: list[int] = []
    original = lb.certified_radius

    def counted(form: Any, x: Any, y: Any, **options: Any) -> Any:
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(len(x))
        return original(form, x, y, **options)

    monkeypatch.setattr(certify.lb, "certified_radius", counted)
    whole, file, stop = tmp_path / "whole.json", tmp_path / "parts.json", -1
    arguments = ("certify", model_file, "--local", "--method", "naive", "--json")
    run(*arguments, whole)
    count, blocks_in_all = sum(calls), len(calls)
    assert blocks_in_all > 2
    calls.clear()
    stop = 2
    ended = run(*arguments, file, code=130)
    assert f"interrupted: 200 of {count} images are certified, median radius" in ended.stderr
    assert "give the same command again to go on" in ended.stderr
    assert not file.exists()
    calls.clear()
    stop = -1
    ended = run(*arguments, file)
    assert f"200 of {count} images were certified before" in ended.stderr
    assert len(calls) == blocks_in_all - 2
    assert json.loads(file.read_text()) == json.loads(whole.read_text())
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


@pytest.mark.slow
def test_two_processes_find_what_one_finds(model_file: Any, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = (
        "import sys; from lipbounds._margins import blocks; blocks._MOST = 50; "
        "from lipbounds._cli.main import app; app(sys.argv[1:])"
    )
    arguments = ["certify", str(model_file), "--local", "--method", "naive", "--json"]

    def start(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script, *arguments, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    together = ["--coordinator", f"localhost:{port}", "--processes", "2", "--process"]
    running = [start(str(tmp_path / "two.json"), *together, str(i)) for i in range(2)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert "certified" in said[0] and "certified" not in said[1]
    alone = start(str(tmp_path / "one.json"))
    assert alone.communicate(timeout=300) and alone.returncode == 0
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["one.json", "two.json"]
