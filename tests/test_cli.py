"""The command line and the report, on a model small enough to be quick."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import lipbounds as lb
from lipbounds._cli.main import app
from lipbounds.analysis.demo import run_demo
from lipbounds.analysis.experiment import measure
from lipbounds.analysis.report import render, write_report
from lipbounds.training.config import Config
from lipbounds.training.data import digits
from lipbounds.training.loop import accuracy, fit
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import load_model, save_model

SPEC = ModelSpec("mlp", (8, 8, 1), {"widths": "64-12-10", "mean": 0.3, "std": 0.4})


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    data = digits()
    plain = Config(
        loss="cross-entropy",
        epochs=6,
        batch_size=128,
        learning_rate=5e-3,
        schedule="constant",
        validate_every=0,
    )
    model = fit(plain, data, model=build(SPEC)).model
    return save_model(tmp_path_factory.mktemp("model") / "tiny.safetensors", model, SPEC)


@pytest.fixture(scope="session")
def form(model_file):
    model, spec = load_model(model_file)
    return lb.trace(model, np.zeros(spec.input_shape, np.float32))


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert code == 0 or (result.stderr.strip() and "Traceback" not in result.output)
    return result


@pytest.mark.parametrize("command", ["demo", "bounds", "certify", "verify"])
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


# ---------------------------------------------------------------------------------------------------- bounds
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
    usual = {"norm": 2, "pairwise": False, "guarantee": "auto", "seed": 0}
    usual |= {"solver": "recursion", "multipliers": "neuron", "refine": 0}
    asked.pop("progress")("15 iterations", 1.0)
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
    from lipbounds._lipsdp.certificate import load_certificate

    claims = dataclasses.replace(
        load_certificate(certificate),
        value=1.0000004,
        norm=np.inf,
        guarantee="probabilistic",
        failure_probability=1e-9,
        pairwise=None,
    )
    line = "L <= 1.00001 (l-inf, probabilistic, fails with probability <= 1e-09), proved again in 20 ms"
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
        assert reason in result.stderr and f"{bad} is refused" in result.stderr and not result.stdout
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


# ---------------------------------------------------------------------------------------------------- certify
def test_certify_agrees_with_the_library(model_file, form, tmp_path):
    file = tmp_path / "radii.json"
    text = run("certify", model_file, "--eps", "0.02", "0.1", "--json", file).stdout
    data = digits()
    radii = lb.certified_radius(form, data.test_x, data.test_y, bound=lb.lipsdp(form, pairwise=True))
    record = json.loads(file.read_text())
    assert [row["eps"] for row in record["certified_accuracy"]] == [0.02, 0.1]
    for row in record["certified_accuracy"]:
        assert row["accuracy"] == radii.accuracy(row["eps"])
        assert f"{100 * row['accuracy']:.1f} % certified" in text
    np.testing.assert_array_equal(record["radius"], radii.radius)
    assert record["guarantee"] == radii.guarantee and 0.3 < record["certified_accuracy"][0]["accuracy"] < 1


@pytest.mark.parametrize(
    "words",
    [
        ["--eps", "0.02", "0.1", "MODEL"],
        ["MODEL", "--eps", "0.02", "--eps", "0.1"],
        ["--eps=0.1", "0.02", "MODEL", "--seed", "3"],
    ],
)
def test_eps_in_every_spelling(model_file, words):
    words = [model_file if word == "MODEL" else word for word in words]
    text = run("certify", *words, "--method", "liplt").stdout
    assert re.findall(r"^eps ([\d.]+)", text, re.MULTILINE) == ["0.02", "0.1"]


def test_pairs_certify_at_least_as_much(model_file, tmp_path):
    radius = {}
    for flag in ("--pairwise", "--no-pairwise"):
        file = tmp_path / f"{flag}.json"
        run("certify", model_file, flag, "--method", "liplt", "--json", file)
        radius[flag] = np.array(json.loads(file.read_text())["radius"])
    assert (radius["--pairwise"] >= radius["--no-pairwise"]).all()
    assert radius["--pairwise"].sum() > radius["--no-pairwise"].sum()


def test_certify_own_data(model_file, tmp_path):
    data = digits()
    np.savez(tmp_path / "mine.npz", x=data.test_x[:20], y=data.test_y[:20])
    file = tmp_path / "r.json"
    run("certify", model_file, "--data", tmp_path / "mine.npz", "--json", file)
    assert json.loads(file.read_text())["images"] == 20


def test_the_box_reaches_the_check_of_values(model_file, monkeypatch):
    traced, seen = lb.trace, []

    def trace(*args, box=None):
        seen.append(box)
        return traced(*args, box=box)

    monkeypatch.setattr(lb, "trace", trace)
    run("certify", model_file, "--local", "--box", "0,1", "--method", "naive", "--no-pairwise")
    run("certify", model_file, "--local", "--box", "0,1", "--method", "naive", "--mean", "0.1", "--std", "2")
    run("certify", model_file, "--method", "naive", "--no-pairwise")
    assert seen == [(0.0, 1.0), (0.0, 1.0), None]


def test_certify_refuses_bad_data(model_file, tmp_path):
    data = digits()
    x, y = data.test_x[:4], data.test_y[:4]
    cases = {
        "shape": (dict(x=x[:, :7], y=y), "images of shape"),
        "dtype": (dict(x=(16 * x).astype(np.uint8), y=y), "must hold floats"),
        "keys": (dict(images=x, y=y), "arrays x and y"),
        "objects": (dict(x=np.array([object()]), y=y), "arrays x and y"),
        "labels": (dict(x=x, y=y + 10), "label"),
        "lengths": (dict(x=x, y=y[:3]), "4"),
        "nan": (dict(x=x * np.float32(np.nan), y=y), "finite"),
        "empty": (dict(x=x[:0], y=y[:0]), "no images"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        assert message in run("certify", model_file, "--data", tmp_path / f"{name}.npz", code=1).stderr, name
    (tmp_path / "text.npz").write_text("x, y")
    assert "arrays x and y" in run("certify", model_file, "--data", tmp_path / "text.npz", code=1).stderr
    assert "nowhere.npz" in run("certify", model_file, "--data", tmp_path / "nowhere.npz", code=1).stderr


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


def test_a_file_that_is_no_model_exits_1(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"nothing of the kind")
    assert "not a complete .safetensors file" in run("bounds", file, code=1).stderr


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


# ----------------------------------------------------------------------------------------------------- report
@pytest.fixture(scope="session")
def results(model_file, form):
    data = digits()
    rows = measure(
        form, data.test_x[:40], data.test_y[:40], norms=(2, np.inf), methods=("naive", "liplt", "empirical")
    )
    model = {
        "name": "tiny",
        "title": "MLP <64-12-10>",
        "file": model_file.name,
        "parameters": 64 * 12 + 12 + 12 * 10 + 10,
        "taps": len(form.taps),
        "training": {
            "epochs": 6,
            "seconds": 1.0,
            "train_accuracy": 1.0,
            "test_accuracy": accuracy(load_model(model_file)[0], data.test_x, data.test_y),
        },
        **rows,
    }
    program = {"lipbounds": "0", "jax": "0", "python": "3", "numpy": "2", "device": "cpu"}
    return {
        "command": "lipbounds demo",
        "created": "2025-01-01",
        "seconds": 2.0,
        "program": program,
        "data": {"name": "digits", "train": 1437, "test": 40},
        "unit": "pixel values in [0, 1]",
        "models": [model],
    }


def test_rows_are_typed_and_radii_follow_the_bounds(results):
    model = results["models"][0]
    assert [(row["label"], row["norm"]) for row in model["upper"]] == [
        ("naive", "2"),
        ("LipLT", "2"),
        ("naive", "inf"),
        ("LipLT", "inf"),
    ]
    assert [row["norm"] for row in model["lower"]] == ["2", "inf"] and not model["refused"]
    for norm in ("2", "inf"):
        (low,) = (row["value"] for row in model["lower"] if row["norm"] == norm)
        naive, liplt = (row for row in model["upper"] if row["norm"] == norm)
        assert 0 < low <= liplt["value"] <= naive["value"]
        curves = [row["certified"] for row in (liplt, naive, liplt["without_pairs"])]
        assert curves[0]["eps"] == curves[1]["eps"] == curves[2]["eps"]
        for worse in curves[1:]:
            assert (np.array(curves[0]["accuracy"]) >= worse["accuracy"]).all()
        assert curves[0]["accuracy"][0] > 0.8 and curves[0]["accuracy"][-1] == 0
    json.dumps(results, allow_nan=False)


def test_the_report_stands_alone(results, tmp_path):
    page = write_report(results, tmp_path).read_text(encoding="utf-8")
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == [
        "tiny-bounds.png",
        "tiny-certified-l2.png",
        "tiny-certified-others.png",
    ]
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert page.count('src="data:image/png;base64,') == 3 and page.count("<img") == 3
    assert not re.search(r"https?://|<script|<link|@import", page)
    assert "MLP &lt;64-12-10&gt;" in page and "<64-12-10>" not in page
    best = min(row["value"] for row in results["models"][0]["upper"] if row["norm"] == "2")
    shown = [float(text) for text in re.findall(r"≤ ([\d.]+)</dd>", page)]
    assert min(shown) >= best and min(shown) < best * 1.001  # printed bounds are rounded up


def test_the_report_is_made_from_the_json_alone(results):
    again = json.loads(json.dumps(results))
    figures = {"tiny": {"bounds": "", "certified-l2": "", "certified-others": ""}}
    assert render(again, figures) == render(results, figures)


def test_a_refusal_becomes_a_row(form, monkeypatch):
    from lipbounds.analysis import experiment

    def refuse(question):
        raise ValueError("this method is for dense nets")

    monkeypatch.setitem(experiment.METHODS, "naive", refuse)
    data = digits()
    rows = measure(form, data.test_x[:3], data.test_y[:3], norms=(2,), methods=("naive", "liplt"))
    assert rows["refused"] == [{"label": "naive", "norm": "2", "reason": "this method is for dense nets"}]
    assert len(rows["upper"]) == 1


@pytest.mark.slow
def test_demo_from_end_to_end(tmp_path):
    out = tmp_path / "report"
    text = run("demo", "--out", out, "--epochs", "3").stdout
    assert "report.html" in text
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "complete" and [m["name"] for m in results["models"]] == [
        "mlp",
        "mlp_crm",
        "residual_cnn",
    ]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What training for the radius does" in page and (out / "training-compared.png").exists()
    for model in results["models"]:
        assert (out / model["file"]).exists() and model["training"]["test_accuracy"] > 0.6
        assert (
            {row["norm"] for row in model["upper"]}
            == {"1", "2", "inf"}
            == {row["norm"] for row in model["lower"]}
        )
        assert {row["guarantee"] for row in model["upper"]} == {"verified"}
        (best,) = (row for row in model["upper"] if row["label"] == "LipSDP")
        assert best["value"] == min(row["value"] for row in model["upper"] if row["norm"] == "2")
        assert len(model["upper"]) == 10 and len(model["estimate"]) == 3 and not model["refused"]
    run("certify", out / "mlp.safetensors", "--eps", "0.1")
    run_demo(out, epochs=1, methods=("naive", "empirical"))  # our own folder is refreshed
    assert json.loads((out / "results.json").read_text())["models"][0]["training"]["epochs"] == 1
