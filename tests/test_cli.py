"""The command line: help, `bounds`, certificates, wrong usage, files that are not overwritten."""

import dataclasses
import json
import re
import string
import sys
import typing

import numpy as np
import pytest
import typer
from command import SPEC, run

import lipbounds as lb
from lipbounds._cli import options, train
from lipbounds._cli.main import app
from lipbounds.results import Guarantee
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import save_model


@pytest.mark.parametrize(
    "command", ["demo", "bounds", "certify", "verify", "attack", "train", "evaluate", "forge", "reproduce"]
)
def test_help_teaches_by_examples(command):
    text = run(command, "--help").stdout
    assert "Examples:" in text and text.count(f"lipbounds {command}") >= 2


def test_root_help_names_the_words_and_the_exit_codes():
    text = run("--help").stdout
    for word in (
        "verified",
        "probabilistic",
        "assumed",
        "estimate",
        "Exit codes",
        "demo",
        "bounds",
        "certify",
        "verify",
    ):
        assert word in text
    assert run("--version").stdout == f"lipbounds {lb.__version__}\n"


def commands():
    group = typer.main.get_command(app)
    return {**group.commands, "train": train.command()}


@pytest.mark.parametrize(
    "name", ["demo", "bounds", "certify", "verify", "attack", "train", "evaluate", "forge", "reproduce"]
)
def test_every_option_is_explained_in_a_sentence(name):
    parameters = [p for p in commands()[name].params if p.name != "help"]
    assert len(parameters) > 3
    for parameter in parameters:
        text = parameter.help or ""
        assert text[:1] in "`" + string.ascii_uppercase and text.endswith(".") and len(text) > 9, (
            parameter.name
        )


def test_the_words_of_the_options_are_those_of_the_library(monkeypatch):
    from lipbounds.analysis.forging import KINDS
    from lipbounds.interop.onnx import DROPS

    monkeypatch.setenv("COLUMNS", "200")
    text = {name: " ".join(run(name, "--help").stdout.split()) for name in ("bounds", "forge")}
    for words in (
        typing.get_args(Guarantee),
        ("none", "aol", "sll", "optimized"),
        ("recursion", "clarabel", "scs"),
        ("neuron", "layer"),
        DROPS,
    ):
        assert f"<{'|'.join(words)}>" in text["bounds"]
    assert f"<{'|'.join(KINDS)}>" in text["forge"]
    assert typing.get_args(options.words(lb.liplt, "scaling", "none")) == ("none", "aol", "sll", "optimized")


def test_options_are_called_like_their_parameters():
    """Typer 0.27 takes a metavar for the name where it is the parameter in capitals."""
    renamed = {"json_out": "--json", "c_r": "--c-r", "list_rows": "--list"}
    for name, command in commands().items():
        for p in command.params:
            if p.param_type_name == "option":
                wanted = renamed.get(p.name, "--" + p.name.replace("_", "-"))
                assert wanted in p.opts, f"{name}: {p.name} is called {p.opts}"


@pytest.mark.parametrize(
    ("command", "words", "name", "values"),
    [
        ("certify", ["--eps", "0.1", "8/255", "FILE"], "eps", [0.1, 8 / 255]),
        ("forge", ["FILE", "--c-r=0", "2^-7", "2**-5", "--tau", "1"], "c_r", [0.0, 2**-7, 2**-5]),
        (
            "evaluate",
            ["FILE", "--methods", "naive", "liplt", "--eps", "1", "2"],
            "methods",
            ["naive", "liplt"],
        ),
        ("evaluate", ["FILE", "--methods", "naive", "--methods", "lipsdp"], "methods", ["naive", "lipsdp"]),
        ("evaluate", ["--eps", "0.1", "0.2", "--methods", "naive", "--", "FILE"], "eps", [0.1, 0.2]),
    ],
)
def test_several_values_follow_an_option(command, words, name, values, model_file):
    words = [str(model_file) if word == "FILE" else word for word in words]
    context = commands()[command].make_context(command, words)
    assert list(context.params[name]) == values
    assert str(context.params["model" if command == "certify" else "run"]) == str(model_file)


def test_only_options_that_may_be_repeated_take_several_values(model_file):
    words = ("forge", model_file, "--dataset", "digits", "--eps", "0.1", "0.2")
    assert "unexpected extra argument" in run(*words, code=2).stderr
    assert "unexpected extra argument" in run("bounds", model_file, "0.1", code=2).stderr


# ----------------------------------------------------------------------------------------------------- bounds
def test_bounds_prints_and_writes_what_the_library_says(model_file, form, tmp_path):
    file = tmp_path / "bounds.json"
    text = run("bounds", model_file, "--pairwise", "--json", file).stdout
    bound = lb.lipsdp(form, pairwise=True)
    record = json.loads(file.read_text())
    assert record["lower"] == record["estimate"] == [] and len(record["upper"]) == 1
    row = record["upper"][0]
    assert row["value"] == bound.value and row["guarantee"] == "verified" and row["norm"] == "2"
    assert row["label"] == row["method"] == "lipsdp" and row["notes"] == list(bound.notes)
    np.testing.assert_array_equal(row["pairs"]["values"], bound.pairwise)
    assert tuple(row["pairs"]["worst"]) == bound.worst_pair
    assert "verified" in text and text.startswith("UpperBound: L <= ")
    shown = float(re.search(r"L <= ([\d.]+)", text).group(1))
    assert bound.value <= shown <= bound.value * 1.001


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ([], "lipsdp"),
        (["--scaling", "sll"], "liplt"),
        (["--norm", "1"], "liplt"),
        (["--multipliers", "layer"], "lipsdp-layer"),
        (["--method", "liplt"], "liplt"),
    ],
)
def test_the_method_follows_from_what_is_asked(model_file, tmp_path, words, method):
    file = tmp_path / "b.json"
    run("bounds", model_file, *words, "--json", file)
    assert json.loads(file.read_text())["upper"][0]["method"].startswith(method)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--solver", "scs", "--multipliers", "layer"], {"solver": "scs", "multipliers": "layer"}),
        (["--pairwise", "--refine", "3", "--norm", "inf"], {"pairwise": True, "refine": 3, "norm": np.inf}),
        (["--guarantee", "verified", "--seed", "5"], {"guarantee": "verified", "seed": 5}),
    ],
)
def test_options_of_lipsdp_reach_the_library(model_file, monkeypatch, words, options):
    asked = {}

    def fake(form, **options):
        asked.update(options)
        return lb.naive(form)

    monkeypatch.setattr(lb, "lipsdp", fake)
    run("bounds", model_file, *words)
    usual = {"norm": 2, "pairwise": False, "guarantee": "auto", "seed": 0, "device": "auto"}
    usual |= {"solver": "recursion", "multipliers": "neuron"}
    asked.pop("progress")("15 iterations")
    refine = options.pop("refine", None)
    if refine is not None:
        assert asked.pop("solver").refine == refine
        usual.pop("solver")
    assert asked == usual | options


def test_working_shows_what_is_done_on_a_terminal_only(monkeypatch, capfd):
    from lipbounds._cli import tables

    with tables.working() as tell:
        tell("15 iterations")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal; notebooks set it
    with tables.working() as tell:
        tell("15 iterations")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with tables.working() as tell:
        tell("15 [iterations]")
    shown = capfd.readouterr()
    assert shown.out == "" and "15 [iterations]" in shown.err


@pytest.mark.parametrize(("norm", "value"), [("1", 1), ("2", 2), ("inf", np.inf)])
def test_bounds_in_every_norm(model_file, form, tmp_path, norm, value):
    file = tmp_path / "b.json"
    run("bounds", model_file, "--norm", norm, "--method", "naive", "--json", file)
    assert json.loads(file.read_text())["upper"][0]["value"] == lb.naive(form, norm=value).value


def test_scaling_reaches_the_library(model_file, form, tmp_path):
    file = tmp_path / "b.json"
    run("bounds", model_file, "--scaling", "sll", "--json", file)
    assert json.loads(file.read_text())["upper"][0]["value"] == lb.liplt(form, scaling="sll").value


def test_an_estimate_stands_under_its_own_key(model_file, tmp_path):
    file = tmp_path / "b.json"
    words = ("--method", "liplt", "--guarantee", "estimate")
    text = run("bounds", model_file, *words, "--json", file).stdout
    record = json.loads(file.read_text())
    assert record["upper"] == record["lower"] == [] and len(record["estimate"]) == 1
    assert "not a bound" in text


@pytest.mark.slow
def test_all_methods_side_by_side(model_file, tmp_path):
    file = tmp_path / "b.json"
    text = run("bounds", model_file, "--method", "all", "--json", file).stdout
    record = json.loads(file.read_text())
    assert {row["label"] for row in record["refused"]} <= {"lipsdp-clarabel", "lipsdp-scs"}  # without CVXPY
    assert len(record["upper"]) + len(record["refused"]) == 9 and record["lower"] and record["estimate"]
    assert max(r["value"] for r in record["lower"]) <= min(r["value"] for r in record["upper"])
    value = {row["label"]: row["value"] for row in record["upper"]}
    assert value["lipsdp"] <= value["lipsdp-layer"] <= value["liplt"] <= value["naive"]
    for method in ("naive", "liplt", "lipsdp", "lipsdp-layer", "lipsdp-clarabel", "lipsdp-scs"):
        assert re.search(rf"^{method} ", text, re.MULTILINE)


# ----------------------------------------------------------------------------------------------- certificates
@pytest.fixture(scope="session")
def certificate(model_file):
    file = model_file.with_name("tiny.certificate")
    run("bounds", model_file, "--pairwise", "--certificate", file)
    return file


def test_a_saved_certificate_is_proved_again(model_file, form, certificate):
    assert lb.verify_certificate(certificate, form)
    text = run("verify", certificate, "--model", model_file).stdout
    found = re.fullmatch(r"L <= ([\d.]+) \(l2, verified\), 45 pairs, proved again in [\d.]+ m?s\n", text)
    bound = lb.lipsdp(form)
    assert bound.value < float(found.group(1)) < bound.value * 1.0001


def test_the_line_of_a_certificate_without_pairs_that_may_fail(certificate):
    from lipbounds._cli.tables import proved
    from lipbounds._lipsdp.certificate import read_certificate

    claims = dataclasses.replace(
        read_certificate(certificate),
        value=1.0000004,
        norm=np.inf,
        guarantee="probabilistic",
        failure_probability=1e-9,
        pairwise=None,
    )
    line = "L <= 1.00001 (l-inf, probabilistic, fails with probability <= 1e-09), proved again in 20.0 ms"
    assert proved(claims, 0.02) == line


def test_verify_refuses_with_the_reason(model_file, certificate, tmp_path):
    other = save_model(tmp_path / "other.safetensors", build(SPEC, seed=3), SPEC)
    assert "made for other weights" in run("verify", certificate, "--model", other, code=1).stderr
    larger = ModelSpec("mlp", (8, 8, 1), {"widths": "64-13-10", "mean": 0.3, "std": 0.4})
    file = save_model(tmp_path / "larger.safetensors", build(larger), larger)
    assert "another architecture" in run("verify", certificate, "--model", file, code=1).stderr
    raw = certificate.read_bytes()
    for name, content, reason in (
        ("cut", raw[:-9], "cut off"),
        ("changed", raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:], "digest"),
        ("text", b"L <= 1", "not a safetensors file"),
    ):
        bad = tmp_path / f"{name}.certificate"
        bad.write_bytes(content)
        result = run("verify", bad, "--model", model_file, code=1)
        assert reason in result.stderr and f"{bad} is rejected" in result.stderr and not result.stdout
    assert "no certificate" in run("verify", model_file, "--model", model_file, code=1).stderr
    run("verify", tmp_path / "none", "--model", model_file, code=2)
    run("verify", certificate, code=2)


def test_verify_computes_the_claims_anew(model_file, form, certificate, tmp_path):
    bound = lb.lipsdp(form)
    smaller = dataclasses.replace(
        bound,
        value=bound.value * 0.99,
        certificate=dataclasses.replace(bound.certificate, value=bound.certificate.value * 0.99),
    )
    lb.save_certificate(smaller, tmp_path / "forged.certificate")  # its digest is right
    stderr = run("verify", tmp_path / "forged.certificate", "--model", model_file, code=1).stderr
    assert "is claimed, but its multipliers prove only" in stderr


def test_certificates_belong_to_lipsdp(model_file, tmp_path):
    file = tmp_path / "c.certificate"
    for words in (
        ("--method", "liplt"),
        ("--method", "naive"),
        ("--method", "all"),
        ("--guarantee", "estimate"),
    ):
        assert "--certificate" in run("bounds", model_file, "--certificate", file, *words, code=2).stderr
    run("bounds", model_file, "--certificate", file, "--scaling", "sll", code=2)
    assert not file.exists()


def test_certificates_do_not_overwrite_other_files(model_file, certificate, tmp_path, monkeypatch):
    thesis = tmp_path / "thesis"
    thesis.write_text("chapter 1")
    with monkeypatch.context() as patch:  # refused before anything is computed
        patch.setattr(lb, "lipsdp", None)
        words = ("bounds", model_file, "--certificate")
        assert "is not a certificate" in run(*words, thesis, code=1).stderr
        assert "no folder" in run(*words, tmp_path / "a" / "b", code=1).stderr
        assert "no folder" in run("bounds", model_file, "--json", tmp_path / "a" / "b", code=1).stderr
    assert thesis.read_text() == "chapter 1"
    before = certificate.read_bytes()
    run("bounds", model_file, "--certificate", thesis, "--force")
    run("verify", thesis, "--model", model_file)
    run("bounds", model_file, "--certificate", thesis)  # a certificate now
    assert certificate.read_bytes() == before


# ----------------------------------------------------------------------------------------- refusals and usage
def test_wrong_usage_exits_2(model_file, tmp_path):
    assert "does not exist" in run("bounds", tmp_path / "none.safetensors", code=2).stderr
    run("bounds", model_file, "--norm", "3", code=2)
    run("bounds", model_file, "--guarantee", "sure", code=2)
    run("bounds", model_file, "--method", "naive", "--scaling", "sll", code=2)
    run("bounds", model_file, "--method", "lipsdp", "--scaling", "sll", code=2)
    run("bounds", model_file, "--method", "naive", "--solver", "scs", code=2)
    run("bounds", model_file, "--method", "all", "--multipliers", "layer", code=2)
    run("bounds", model_file, "--refine", "1", code=2)  # without pairs there is nothing to refine
    run("bounds", model_file, "--refine", "-1", "--pairwise", code=2)
    run("bounds", model_file, "--refine", "1", "--pairwise", "--solver", "scs", code=2)
    run("bounds", model_file, "--solver", "mosek", code=2)
    run("certify", model_file, "--method", "lipsdp", "--scaling", "sll", code=2)
    run("certify", model_file, "--eps", "-0.1", code=2)
    run("certify", model_file, "--eps", "nan", code=2)
    run("certify", model_file, "--guarantee", "estimate", code=2)
    run("demo", "--epochs", "0", code=2)
    run("frobnicate", code=2)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "bounds MODEL --method lipspd",
            "'lipspd' is not one of naive, liplt, lipsdp, all (did you mean 'lipsdp'?)",
        ),
        (
            "evaluate MODEL --dataset digits --attack autoatack",
            "pgd, autoattack (did you mean 'autoattack'?)",
        ),
        (
            "evaluate MODEL --dataset digits --methods liplt lipsdb",
            "naive, liplt, lipsdp (did you mean 'lipsdp'?)",
        ),
        ("train crmm --out x", "consistency (did you mean 'crm'?)"),
        (
            "train crm --activation rleu --out x",
            "relu, maxmin, clipped-relu, tanh, gelu (did you mean 'relu'?)",
        ),
        ("bounds MODEL --norm 3", "'3' is not one of 1, 2, inf "),
    ],
)
def test_a_misspelled_word_is_answered_with_the_nearest_one(words, message, model_file):
    said = run(*(model_file if word == "MODEL" else word for word in words.split()), code=2).stderr
    said = " ".join(said.replace("\u2502", " ").split())
    assert message in said and "Value error" not in said


@pytest.mark.parametrize(
    "words, message",
    [
        ("bounds MODEL --certificate one --json ./one", "--json: would overwrite --certificate"),
        ("bounds MODEL --json link --force", "--json: would overwrite the model, which this command reads"),
        ("bounds MODEL --constant t=x.npy --json x.npy", "--json: would overwrite --constant t=x.npy"),
        ("certify MODEL --csv one --json one", "--csv: would overwrite --json, which is the same file"),
        ("certify MODEL --data d.npz --json d.npz", "--json: would overwrite the data"),
        ("certify MODEL --images x.npy --labels y.npy --csv y.npy", "--csv: would overwrite the labels"),
        ("certify MODEL --certificate c --csv c --force", "--csv: would overwrite the certificate"),
        ("attack MODEL --eps 0.1 --csv one --page one", "--page: would overwrite --csv"),
        ("attack MODEL --eps 0.1 --data d.npz --page d.npz --force", "--page: would overwrite the data"),
        ("evaluate MODEL --dataset digits --json MODEL --force", "--json: would overwrite the run"),
        ("evaluate MODEL --dataset digits --against link --json link", "would overwrite the other run"),
        ("evaluate run --json run/config.json --force", "would overwrite config.json of the run"),
        ("evaluate run --json run/evaluation.html", "would overwrite evaluation.html in the folder"),
        ("forge run --json run/model.safetensors --force", "would overwrite model.safetensors of the run"),
        (
            "forge MODEL --dataset digits --out . --json ./forged.html",
            "would overwrite forged.html in the folder",
        ),
    ],
)
def test_no_output_replaces_another_one_or_a_file_that_is_read(
    tmp_path, monkeypatch, model_file, words, message
):
    monkeypatch.chdir(tmp_path)
    for file in ("x.npy", "y.npy", "d.npz", "c"):
        (tmp_path / file).write_bytes(b"read")
    (tmp_path / "run").mkdir()
    (tmp_path / "m").write_bytes(model_file.read_bytes())
    (tmp_path / "link").symlink_to("m")
    before = sorted(tmp_path.iterdir())
    said = run(*words.replace("MODEL", "m").split(), code=2).stderr
    assert message in " ".join(line.strip("│ ") for line in said.splitlines())
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("seed", ["-1", "9223372036854775808", "1.5"])
@pytest.mark.parametrize("command", ["bounds", "certify"])
def test_seeds_that_no_certificate_holds_are_refused(model_file, command, seed):
    said = run(command, model_file, "--seed", seed, code=2).stderr
    assert "is not a whole number >= 0 and below 2^63" in " ".join(
        line.strip("│ ") for line in said.splitlines()
    )


def test_the_largest_seed(model_file, tmp_path):
    file = tmp_path / "certificate"
    run("bounds", model_file, "--seed", str(2**63 - 1), "--certificate", file)
    assert run("verify", file, "--model", model_file).stdout.startswith("L <= ")


def test_a_file_that_is_no_model_exits_1(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"nothing of the kind")
    assert "not a complete .safetensors file" in run("bounds", file, code=1).stderr


def test_a_deeply_nested_file_is_not_overwritten(model_file, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"a":' * 100_000)
    said = run("bounds", model_file, "--method", "naive", "--json", file, code=1).stderr
    assert "mine.json exists and was not written by lipbounds" in said


def test_foreign_files_are_not_overwritten(model_file, tmp_path):
    file = tmp_path / "thesis.json"
    file.write_text('{"chapter": 1}')
    assert "was not written by lipbounds" in run("bounds", model_file, "--json", file, code=1).stderr
    assert file.read_text() == '{"chapter": 1}'
    run("bounds", model_file, "--json", file, "--force")
    assert "upper" in json.loads(file.read_text())
    run("bounds", model_file, "--json", file)  # ours now


def test_demo_keeps_out_of_foreign_folders(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    message = run("demo", "--out", tmp_path, code=1).stderr
    assert "files that lipbounds did not create" in message
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
