"""The report of the demo, on a model small enough to be quick, and the demo itself."""

import json
import pathlib
import re

import numpy as np
import pytest
from command import run
from documented import differences, documented

import lipbounds as lb
from lipbounds.analysis import figures, report
from lipbounds.analysis.demo import run_demo
from lipbounds.analysis.experiment import measure
from lipbounds.analysis.report import render, write_report
from lipbounds.training.data import digits
from lipbounds.training.loop import accuracy
from lipbounds.training.store import load_model


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
        ("LipLT, from l2", "inf"),
    ]
    assert [row["norm"] for row in model["lower"]] == ["2", "inf"] and not model["refused"]
    for norm in ("2", "inf"):
        (low,) = (row["value"] for row in model["lower"] if row["norm"] == norm)
        naive, liplt, *others = (row for row in model["upper"] if row["norm"] == norm)
        assert len(others) == (norm == "inf")
        assert all(row["pairs"]["average"] < 0.8 * liplt["pairs"]["average"] for row in others)
        assert 0 < low <= liplt["value"] <= naive["value"]
        curves = [row["certified"] for row in (liplt, naive, liplt["without_pairs"])]
        assert curves[0]["eps"] == curves[1]["eps"] == curves[2]["eps"]
        assert ("local" in max(liplt, naive, key=lambda row: row["certified"]["quartiles"][1])) == (
            norm == "2"
        )
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


def test_a_method_has_one_colour_in_all_figures(results):
    full = results["models"][0]
    few = {**full, "upper": [row for row in full["upper"] if row["label"] == "LipLT"]}
    bound = few["upper"][0]
    record = {"radii": {"liplt": bound["certified"]}, "clean": 0.5, "guarantee": {"liplt": "verified"}}
    drawn = [
        figures.certified_figure(full, ["2", "inf"]),
        figures.certified_figure(few, ["2"]),
        figures.contrast_figure([{"model": full, "bound": bound}] * 2),
        figures.radii_figure([("tiny", record)], [0.1]),
    ]
    lines = [line for figure in drawn for ax in figure.axes for line in ax.lines]
    colours = [
        {line.get_color() for line in lines if method in re.split(r", | \(", line.get_label())}
        for method in ("naive", "LipLT")
    ]
    assert colours == [{figures.METHOD_COLOURS["naive"]}, {figures.METHOD_COLOURS["liplt"]}]
    templates = pathlib.Path(report.__file__).parent / "templates"
    for page in templates.iterdir():  # captions say where a line is, as its colour depends on the method
        assert not re.search(r"\b(green|blue|red|purple|yellow) line", page.read_text(encoding="utf-8")), page
    assert len({*figures.METHOD_COLOURS.values(), figures.ATTACKED_COLOUR}) == len(figures.METHOD_COLOURS) + 1


def test_a_refusal_becomes_a_row(form, monkeypatch):
    def refuse(question):
        raise ValueError("this method is for dense nets")

    monkeypatch.setitem(lb.METHODS, "naive", refuse)
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
        "cnn_crm",
    ]
    assert differences("The demo as JSON", results) == (set(), set())
    results_of, radii = documented("Bounds as JSON"), documented("Evaluations as JSON")
    fields = {name.removeprefix("radii.METHOD.") for name in radii if name.startswith("radii.METHOD.")}
    for row in (row for model in results["models"] for row in model["upper"]):
        assert row.keys() <= {*results_of, "certified", "without_pairs", "local"}
        inner = [row["certified"], *([row["without_pairs"]["certified"]] if "without_pairs" in row else [])]
        inner += [row["local"]] if "local" in row else []
        assert all(each.keys() - {"radius"} == fields for each in inner)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("median local radius</th>") == 7 and page.count("Median local radius, <span") == 3
    assert "What training for the radius does" in page and (out / "training-compared.png").exists()
    for model in results["models"]:
        assert (out / model["file"]).exists() and model["training"]["test_accuracy"] > 0.6
        assert {row["norm"] for row in model["upper"]} == {"1", "2", "inf"}
        assert {row["norm"] for row in model["lower"]} == {"2"}
        assert {row["guarantee"] for row in model["upper"]} == {"verified"}
        (best,) = (row for row in model["upper"] if row["label"] == "LipSDP")
        (local,) = (row["local"] for row in model["upper"] if "local" in row)
        assert best["local"] == local and local["guarantee"] == "verified" and local["images"] == 360
        pairs = list(zip(best["certified"]["radius"], local["radius"], strict=True))
        assert all(near >= far for far, near in pairs) and any(near > far for far, near in pairs)
        assert best["value"] == min(row["value"] for row in model["upper"] if row["norm"] == "2")
        small = model["name"] != "cnn_crm"
        assert len(model["upper"]) == (10 if small else 7) and len(model["estimate"]) == small
        assert not model["refused"]
    run("certify", out / "mlp.safetensors", "--eps", "0.1")
    run_demo(out, epochs=1, methods=("naive", "empirical"))  # our own folder is refreshed
    assert json.loads((out / "results.json").read_text())["models"][0]["training"]["epochs"] == 1
