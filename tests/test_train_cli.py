"""`lipbounds train`: files and lines, resumption, presets, configurations, plain errors and their exit codes."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lipbounds._cli import train as cli
from lipbounds._cli.main import app
from lipbounds.training.config import Config, defaults
from lipbounds.training.data import digits
from lipbounds.training.loop import fit
from lipbounds.training.presets import PRESETS
from lipbounds.training.runs import open_run

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
TINY = ["--arch", "64-10", "--batch-size", "128", "--constants", "liplt", "--warmup", "0"]


def run(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert code == 0 or result.stderr.strip()
    return result


def refused(*arguments: Any, code: int = 1) -> str:
    """The message, without the frame and line breaks of usage errors."""
    text = run(*arguments, code=code).stderr
    return " ".join(word for word in text.split() if word != "│")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cli") / "run"
    return folder, run("crm", "--epochs", 2, "--validate-every", 2, "--lam", 3, "--out", folder, *TINY)


def test_a_run(trained: Any) -> None:
    folder, result = trained
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.json",
        "log.jsonl",
        "model.safetensors",
        "report.html",
    }
    opened = open_run(folder)
    assert opened.config.to_json() == {
        **Config.from_json(defaults("digits")).to_json(),
        "arch": "64-10",
        "batch_size": 128,
        "constants": "liplt",
        "warmup": 0,
        "epochs": 2,
        "validate_every": 2,
        "lam": 3.0,
    }
    data = digits()
    right = np.mean(np.argmax(opened.model(data.test_x), axis=1) == data.test_y)  # type: ignore[operator]
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"360 test images: {100 * right:.2f} % clean, ")
    assert lines[0].endswith("certified at eps 0.5 (liplt, verified)")
    assert (
        lines[1] == f"report: {folder / 'report.html'}" and lines[2] == f"next:   lipbounds evaluate {folder}"
    )
    assert len(lines) == 3
    progress = [line for line in result.stderr.splitlines() if line.startswith("epoch 2 of 2: ")]
    assert (
        len(progress) == 1 and "1000 training images" in progress[0] and "certified at eps 0.5" in progress[0]
    )
    page = (folder / "report.html").read_text()
    assert "64-10" in page and f"{100 * right:.2f}" in page


def test_help_teaches_by_examples() -> None:
    text = run("--help").stdout
    assert "Examples:" in text and text.count("lipbounds train crm") >= 3 and "--resume runs/mnist" in text
    assert "same weights bit for bit" in " ".join(text.split())


@pytest.mark.slow
def test_an_interrupted_run_goes_on(trained: Any, tmp_path: pathlib.Path) -> None:
    folder, _ = trained

    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        fit(open_run(folder).config, out=tmp_path / "run", progress=stop)
    result = run("--resume", tmp_path / "run")
    assert result.stdout.splitlines()[0].startswith("360 test images: ")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "run" / "report.html").exists()


def test_resuming_takes_no_other_settings(trained: Any) -> None:
    folder, _ = trained
    text = refused("--resume", folder, "--lam", 3, "--epochs", 9, "--preset", "mnist-4C3F", code=2)
    assert "a run has its own settings; leave out epochs, lam, preset" in text
    assert "leave out loss" in refused("crm", "--resume", folder, code=2)
    assert "leave out out" in refused("--resume", folder, "--out", "x", code=2)


def test_options_stand_above_the_file_above_the_preset(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"epochs": 7, "eps": 0.5, "dataset": "mnist"}))
    seen: list[Config] = []

    def stop(config: Config, **_: Any) -> None:
        seen.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("lipbounds.training.loop.fit", stop)
    for name in PRESETS:
        assert refused("--preset", name, "--out", tmp_path / "run") == "lipbounds: enough"
        asked = dict(PRESETS[name])
        assert seen[-1] == Config(**asked)  # what the data set suggests does not mix with a published run
    refused("gloro", "--preset", "cifar10-6C2F", "--config", file, "--epochs", 300, "--out", tmp_path / "run")
    found = seen[-1]
    assert (found.loss, found.arch, found.dataset) == ("gloro", "6C2F", "mnist")
    assert (found.epochs, found.eps, found.flip) == (300, 0.5, True)
    refused("crm", "--no-flip", "--preset", "cifar10-6C2F", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert not seen[-1].flip and seen[-1].data_dir == str(tmp_path)
    refused("cross-entropy", "--dataset", "mnist", "--seed", 3, "--out", tmp_path / "run")
    assert (seen[-1].arch, seen[-1].seed) == ("784-512-512-10", 3)


def test_the_options_are_the_settings() -> None:
    options = {parameter.name: parameter for parameter in cli.command().params}
    rest = {"resume", "out", "preset", "config", "log", "coordinator", "processes", "process"}
    assert options.keys() - rest == FIELDS.keys()
    for field in FIELDS.values():
        option = options[field.name]
        assert option.help.startswith(field.metadata["help"]) and option.default is None
        assert option.param_type_name == ("argument" if field.name == "loss" else "option")
        word = field.name.replace("_", "-")
        wanted = [f"--{word}", f"--no-{word}"] if isinstance(field.default, bool) else [f"--{word}"]
        wanted = ["loss"] if field.name == "loss" else wanted
        assert [*option.opts, *option.secondary_opts] == wanted


def test_help_shows_sections_choices_limits_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = " ".join(run("--help").stdout.split())
    places = [text.index(f"─ {title} ─") for title in ("Data", "Network", "Loss", "Optimiser", "Run")]
    assert places == sorted(places)
    for name, field in FIELDS.items():
        assert field.metadata["help"] in text.replace(" │ │", ""), name
        if field.metadata["choices"] and name != "dataset":
            assert f"<{'|'.join(field.metadata['choices'])}>" in text
    assert "[default: (by data set)]" in text and "[default: (LIPBOUNDS_DATA)]" in text
    assert "--smoothing NUMBER" in text and "--epochs N [x>=1]" in text and "[default: (0.999)]" in text


def test_other_commands_do_not_wait_for_the_settings() -> None:
    code = (
        "import sys; from lipbounds._cli.main import app; app(['bounds', '--help'], standalone_mode=False); "
        "assert 'lipbounds.training.config' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_what_is_wrong_is_said_and_nothing_is_left(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.delenv("LIPBOUNDS_DATA", raising=False)
    out = tmp_path / "run"
    file = tmp_path / "settings.json"
    cases: list[tuple[list[Any], str]] = [
        ([{"lamda": 3}], "unknown settings: 'lamda' (did you mean 'lam'?)"),
        ([{"epochs": "3"}], "epochs must be int, got '3'"),
        ([{"dataset": [1]}], "dataset must be str, got [1]"),
        (["{"], "is not JSON"),
        ([[1]], "must be a JSON object of settings, got list"),
    ]
    for (content,), message in cases:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        assert message in refused("crm", "--config", file, "--out", out)
    file.write_bytes(b"\xff{")
    assert "settings.json is not a text in UTF-8" in refused("crm", "--config", file, "--out", out)
    options: list[tuple[list[Any], str]] = [
        (["--arch", "784-10"], "784-10 does not fit: an image has 8 x 8 x 1 = 64 pixels"),
        (["--arch", "7C7F"], "unknown architecture '7C7F'"),
        (["--dataset", "mnits"], "dataset must be one of digits, mnist, cifar10, cifar100, tiny-imagenet"),
        (["--dataset", "mnist"], "LIPBOUNDS_DATA"),
        (["--dataset", "cifar10", "--data-dir", tmp_path / "nowhere"], "nowhere"),
        (["--dataset", "mnist", "--data-dir", tmp_path], "train-images-idx3-ubyte"),
        (["--preset", "mnist"], "unknown preset 'mnist'"),
        (["--batch-size", 5000], "batch_size 5000 is more than the 1437 images"),
        (["--eps", -1], "eps must be at least 0, got -1"),
        (["--holdout", 1], "holdout must be between 0 and 0.9, got 1"),
        (["--learning-rate", 1e-7], "final_learning_rate"),
        (["--processes", 2], "several processes need all of coordinator"),
    ]
    for given, message in options:
        assert message in refused("crm", "--out", out, *given), given
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "is not empty: choose another folder" in refused("crm", *TINY, "--out", tmp_path / "full")
    assert not out.exists()
    assert "is not a run folder: there is no config.json" in refused("--resume", out)
    usage: list[tuple[list[Any], str]] = [
        (["crm"], "give a loss and an output folder"),
        (["--out", out], "give a loss and an output folder"),
        ([], "give a loss and an output folder"),
        (["hinge", "--out", out], "'hinge' is not one of"),
        (["crm", "--out", out, "--constants", "sdp"], "'sdp' is not one of"),
        (["crm", "--out", out, "--epochs", 0], "Invalid value for '--epochs'"),
        (["crm", "--out", out, "--config", tmp_path / "none.json"], "does not exist"),
        (["crm", "--out", out, "--lamda", 3], "No such option"),
    ]
    for given, message in usage:
        assert message in refused(*given, code=2), given
    assert not out.exists() and sorted(os.listdir(tmp_path)) == ["full", "settings.json"]


def test_an_existing_run_is_not_overwritten(trained: Any) -> None:
    folder, _ = trained
    before = (folder / "model.safetensors").read_bytes()
    text = refused("crm", *TINY, "--out", folder)
    assert "is already a run: resume it with" in text
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_another_architecture_in_a_run_is_refused(trained: Any, tmp_path: pathlib.Path) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace("64-10", "64-8-10"))
    assert "nothing to resume in" in refused("--resume", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "idle"),
    [
        (["cross-entropy", "--lam", 5], "--lam has no effect"),
        (
            ["cross-entropy", "--constants", "liplt", "--refresh", 4],
            "--constants, --refresh has no effect",
        ),
        (["gloro", "--r0", 1, "--g", "hinge"], "--r0, --g has no effect"),
        (["crm", "--power-iterations", 3], "--power-iterations has no effect"),
        (["crm", "--angle", 0.1], "--angle has no effect"),
        (["crm", "--border", "mirror"], "--border has no effect without --crop"),
        (["at", "--eps", 0.1], "--eps has no effect without a proof"),
        (["crm", "--epochs", 5, "--warmup", 5], "--warmup is as long as the run of 5 epochs"),
        (
            ["crm", "--epochs", 9, "--warmup", 3, "--ramp", 2, "--stop-if-uncertified", 5],
            "--stop-if-uncertified has no effect without more than 9 epochs, as warm-up, ramp and those",
        ),
        (["margin", "--arch", "lipnext-L2W8-cayley", "--angle", 0.1], "--angle has no effect"),
        (["crm", "--constants", "liplt", "--multiplier-rate", 0.1], "--multiplier-rate has no effect"),
        (["crm", "--ema-decay", 0.9], "--ema-decay has no effect"),
        (["crm", "--average-from", 3], "--average-from has no effect"),
        (["crm", "--schedule", "constant", "--decay-from", 1], "--decay-from has no effect"),
        (["gloro", "--smoothing", 0.1], "smoothing applies to cross-entropy and crm"),
        (["gloro", "--eps", 0], "--eps is 0, so that the constants count for nothing in the loss gloro"),
        (["trades", "--attack-eps", 0], "--attack-eps is 0, so that nothing is attacked in the loss trades"),
        (["fast-at", "--robust-every", 0, "--stop-if-overfitted"], "--stop-if-overfitted has no effect"),
        (["at", "--precision", "float64"], "--precision has no effect without a loss with constants"),
        (
            ["crm", "--constants", "liplt", "--precision", "float64", "--multiplier-rate", 0.1],
            "--multiplier-rate has no effect",
        ),
        (["crm", "--arch", "lipnext-L1W8", "--activation", "maxmin"], "--activation has no effect"),
        (["crm", "--arch", "sll-mlp-L1W16", "--initialisation", "unit"], "--initialisation has no effect"),
        (["crm", "--optimiser", "sgd", "--momentum", 0, "--nesterov"], "--nesterov has no effect"),
        (["crm", "--data-dir", "here"], "--data-dir has no effect"),
        (["crm", "--lam", 0, "--r0", 2], "--r0 has no effect without the loss crm with --lam above 0"),
        (["crm", "--lam", 0, "--ramp", 3], "--ramp has no effect"),
        (["crm", "--lam", 0, "--refresh", 3], "--refresh has no effect"),
        (
            ["crm", "--epochs", 5, "--decay-from", 5, "--final-learning-rate", 1e-6],
            "--final-learning-rate has no effect",
        ),
        (["crm", "--crop", 8, "--border", "mirror"], "images of 8 x 8 pixels have no 8 pixels to mirror"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    arguments: list[Any], idle: str, tmp_path: pathlib.Path
) -> None:
    assert idle in refused(*arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_of_a_file_that_would_do_nothing_are_refused_unless_they_are_the_usual_ones(
    tmp_path: pathlib.Path,
) -> None:
    file = tmp_path / "settings.json"
    idle = {"loss": "gloro", "lam": 3.0, "r0": 0.7, "schedule": "constant", "learning_rate": 5e-6}
    file.write_text(json.dumps(idle))
    assert f"lam of {file} has no effect without the loss crm" in refused("--config", file, "--out", "x")
    del idle["lam"]
    file.write_text(json.dumps(idle))
    assert f"r0 of {file}, --g has no effect" in refused(
        "gloro", "--g", "hinge", "--config", file, "--out", "x"
    )
    usual = Config(**defaults("digits") | {"loss": "gloro"})
    file.write_text(json.dumps(usual.to_json()))
    assert cli._settings({}, None, file) == usual


def test_another_schedule_takes_the_place_of_that_of_a_preset() -> None:
    found = cli._settings({"loss": "at", "schedule": "cosine"}, "cifar10-resnet18", None)
    assert (found.schedule, found.milestones) == ("cosine", "")


def test_a_run_on_other_data_is_neither_resumed_nor_evaluated(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8, 8, 1), np.float32), np.arange(64) % 10
    own = Config(arch="64-10", loss="cross-entropy", epochs=1, batch_size=32, validate_every=0)
    folder = tmp_path / "run"
    fit(own, (x, y), out=folder)
    assert "was started with other data (the data given)" in refused("--resume", folder)
    result = CliRunner().invoke(app, ["evaluate", str(folder)])
    assert result.exit_code == 1 and "was trained on the data given, not on digits" in result.stderr
