"""Where results go: folders that cannot be written to, pipes, narrow windows, other encodings, full disks."""

from __future__ import annotations

import io
import json
import os
import pathlib
import signal
import sys
import threading
from typing import Any

import pytest
import typer
from command import run

from lipbounds._cli import main, tables
from lipbounds._cli.common import refusals
from lipbounds._margins.blocks import Unfinished
from lipbounds._text.files import check_folder, write_atomically
from lipbounds.analysis import evaluation, forge_search
from lipbounds.analysis.demo import is_ours
from lipbounds.training.runs import read_log

DIGITS = ("--dataset", "digits")


def _never(*given: Any, **more: Any) -> Any:
    raise AssertionError("work was begun")


@pytest.mark.parametrize("command", ["evaluate", "forge", "demo", "reproduce"])
def test_a_folder_that_cannot_be_made_is_said_before_the_work(
    command: str, model_file: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "evaluate", _never)
    monkeypatch.setattr(forge_search, "search_c_r", _never)
    (tmp_path / "notes").write_text("mine")
    words = {"demo": [], "reproduce": ["table1"]}.get(command, [model_file, *DIGITS])
    said = run(command, *words, "--out", tmp_path / "notes" / "x", code=1).stderr
    assert f"{tmp_path / 'notes'} is a file" in said and "choose another one" in said
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [("bounds", "--json"), ("certify", "--csv"), ("attack", "--eps", "0.1", "--page")],
    ids=lambda w: w[0],
)
def test_a_file_without_permission_is_said_before_the_work(
    words: tuple[str, ...], model_file: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lipbounds._cli.common._load", _never)
    monkeypatch.setattr(os, "access", lambda path, mode: pathlib.Path(path) != tmp_path)
    command, *options = words
    said = run(command, model_file, *options, tmp_path / "out", code=1).stderr
    assert f"no permission to write to the folder {tmp_path}" in said


def test_files_that_cannot_be_written_are_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "x")
    for path, message in (
        (tmp_path / "gone" / "x", f"there is no folder {tmp_path / 'gone'} to write x to"),
        (tmp_path / "link", f"there is no folder {tmp_path / 'gone'} to write link to"),
        (tmp_path / "folder", "folder is a folder: give the name of a file in it"),
    ):
        with pytest.raises(OSError, match="folder") as caught:
            write_atomically(path, b"x")
        assert message in str(caught.value)
    with pytest.raises(NotADirectoryError, match="is a file"):
        (tmp_path / "file").write_bytes(b"")
        check_folder(tmp_path / "file" / "a" / "b")
    check_folder(tmp_path / "new" / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_to_and_never_read_or_replaced(tmp_path: pathlib.Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    assert not is_ours(pipe)  # it would wait for a writer for ever
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"content")
    reader.join(timeout=20)
    assert got == [b"content"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_neither_a_closed_pipe_nor_a_full_disk_loses_the_other_half(
    model_file: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, words = tmp_path / "bounds.json", ("bounds", model_file, "--method", "naive", "--json")

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr("lipbounds._cli.common.write_json", full)
        result = run(*words, file, code=1)
        assert "method    naive" in result.stdout and "No space left on device" in result.stderr
    echo = typer.echo

    def closed(text: str, **more: Any) -> None:
        if "method    naive" in text:
            raise BrokenPipeError(32, "Broken pipe")
        echo(text, **more)

    monkeypatch.setattr(typer, "echo", closed)
    with pytest.raises(AssertionError, match=r"^$"):  # no message at all
        run(*words, file, code=1)
    assert json.loads(file.read_text())["upper"][0]["label"] == "naive"


def test_a_closed_pipe_is_no_error_of_ours() -> None:
    with pytest.raises(BrokenPipeError), refusals():
        raise BrokenPipeError(32, "Broken pipe")


def test_ctrl_c_is_one_line_that_says_how_to_go_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lipbounds._cli.train._run", interrupted)
    said = run("train", "crm", "--out", tmp_path / "my run", code=130).stderr
    assert (
        said.startswith("interrupted: ")
        and f"lipbounds train --resume '{tmp_path / 'my run'}' goes on" in said
    )


def test_a_demo_that_is_interrupted_does_not_say_that_nothing_was_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("lipbounds.analysis.demo.run_demo", interrupted)
    said = run("demo", "--out", tmp_path, code=130).stderr
    assert said == f"interrupted: the report in {tmp_path} is not finished; give the same command again\n"


def test_an_interrupted_demo_leaves_a_finished_report_as_it_was(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    kept = {
        "results.json": '{"format": "lipbounds-results", "status": "complete"}',
        "mlp.safetensors": "model",
    }
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    # while the first network is measured, and before it is trained
    for place in (
        "single_images",
        "example",
    ):
        monkeypatch.setattr(f"lipbounds.analysis.demo.{place}", interrupted)
        said = run("demo", "--out", tmp_path, "--epochs", "1", code=130).stderr
        assert f"interrupted: the finished report in {tmp_path} is kept; give the same command" in said
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == kept
    (tmp_path / "results.json").unlink()
    assert "is not finished" in run("demo", "--out", tmp_path, "--force", code=130).stderr
    assert '"running"' in (tmp_path / "results.json").read_text()


def test_ctrl_c_while_garbage_is_collected_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class Garbage:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    others: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", others.append)
    main.keep_interrupts()
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            Garbage()
            threading.Event().wait(10.0)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not others


def test_after_ctrl_c_no_thread_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the interpreter the threads of XLA crashed (exit code 139)."""
    ended: list[int] = []
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for code in (1, 130):
        monkeypatch.setattr(main, "app", lambda code=code: sys.exit(code))
        monkeypatch.setattr(os, "_exit", ended.append)
        with pytest.raises(SystemExit):
            main.main()
    assert ended == [130]


@pytest.mark.parametrize("columns", ["0", "40"])
def test_a_narrow_window_cuts_off_no_number(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    table = tables.titled("many")
    for eps in range(9):
        table.add_column(f"eps {eps}", justify="right")
    table.add_row(*(f"≤ {eps}.123456" for eps in range(9)))
    tables.show_table(tables.console(), table)
    said = capsys.readouterr().out
    assert all(f"≤ {eps}.123456" in said for eps in range(9)) and "…" not in said


def test_signs_that_an_encoding_lacks_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    tables.print_anywhere()
    print("≤ 5.2 ü")
    assert raw.getvalue() == b"<= 5.2 ?\n"


def test_an_unfinished_file_is_found_by_its_very_name(tmp_path: pathlib.Path) -> None:
    """Brackets in a name are no pattern: `r[1].json` is not `r1.json`."""
    other = tmp_path / "r1.json.unfinished-0"
    other.write_text('{"format": "lipbounds-unfinished", "key": "of another command"}\n{}\n')
    kept = Unfinished(tmp_path / "r[1].json", 0, {"a": 1})
    assert kept.files == [] and other.exists()


def test_a_log_that_is_no_text_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"log\.jsonl is not a text in UTF-8"):
        read_log(tmp_path)
