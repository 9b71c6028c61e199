"""`lipbounds attack`: what the library finds, as text, JSON, table and page."""

import csv
import json
import shlex

import numpy as np
import pytest
from command import run
from documented import differences

from lipbounds import analysis
from lipbounds._cli.options import Reading
from lipbounds.analysis.attack_report import picture
from lipbounds.training.data import digits
from lipbounds.training.store import load_model


def test_attack_writes_what_the_library_finds(model_file, tmp_path):
    files = {name: tmp_path / f"found.{name}" for name in ("json", "csv", "page")}
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    given = (
        "attack",
        model_file,
        "--method",
        "pgd",
        "--steps",
        "5",
        "--eps",
        "8/64",
        "--norm",
        "inf",
        "--images",
        "30",
    )
    text = run(*given, *words).stdout
    model, data = load_model(model_file)[0], digits()
    x, y = data.test_x[:30], data.test_y[:30]
    found = analysis.pgd(model, x, y, 0.125, norm="inf", steps=5)
    assert repr(found) in text and "no certificate" in text and 0 < found.success.sum() < 30
    record = json.loads(files["json"].read_text())
    assert differences("Attacks as JSON", record) == (set(), set())
    assert record["accuracy"] == found.accuracy and record["eps"] == 0.125 and record["norm"] == "inf"
    assert record["images"] == 30 and record["guarantee"] == "attained"
    rows = record["rows"]
    assert [row["success"] for row in rows] == found.success.tolist()
    said = np.asarray(model(found.adversarial)).argmax(1)
    for i, row in enumerate(rows):
        assert row["distance"] == (found.distance[i] if found.success[i] else None)
        assert row["class_found"] == (said[i] if found.success[i] else None)
        assert row["class_found"] != row["label"] and row["steps"] == found.steps[i]
    with files["csv"].open() as file:
        table = list(csv.DictReader(file))
    assert [row["success"] for row in table] == [str(row["success"]) for row in rows]
    assert [row["distance"] for row in table] == [
        "" if r["distance"] is None else repr(r["distance"]) for r in rows
    ]
    page = files["page"].read_text()
    assert page.count("<figcaption>") == min(24, found.success.sum())
    assert f"{100 * found.accuracy:.2f} %" in page and "attained" in page
    assert "exists" in run(*given, "--csv", files["csv"], code=1).stderr
    run(*given, "--csv", files["csv"], "--force")


@pytest.mark.slow
def test_autoattack_from_the_command_line(model_file, tmp_path):
    given = ("attack", model_file, "--eps", "0.1", "--images", "12", "--json", tmp_path / "a.json")
    text = run(*given, "--page", tmp_path / "a.html", "--mean", "0", "--std", "1").stdout
    record = json.loads((tmp_path / "a.json").read_text())
    shares = [record["clean"], *(stage["accuracy"] for stage in record["stages"])]
    assert differences("Attacks as JSON", record) == (set(), set())
    assert [s["name"] for s in record["stages"]] == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
    assert shares == sorted(shares, reverse=True) and shares[-1] == record["accuracy"]
    assert text.startswith("AutoAttack: 12 examples in l2: clean")
    assert "APGD-T" in (tmp_path / "a.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "fgsm", "--steps", "3"], "does not belong to --method fgsm"),
        (["--method", "square", "--restarts", "3"], "does not belong to --method square"),
        (["--targeted"], "autoattack has no targets"),
        (["--method", "zoo"], "zoo"),
        (["--method", "rays", "--norm", "2"], "rays measures distances in l-inf"),
        (["--method", "nes-pgd", "--steps", "3"], "does not belong to --method nes-pgd"),
        (["--method", "adbd"], "adbd measures distances and has no radius"),
        (["--box", "1"], "two numbers"),
    ],
)
def test_words_that_do_not_fit_are_refused(model_file, words, message):
    assert message in run("attack", model_file, "--eps", "0.1", *words, code=2).stderr


def test_the_command_of_a_record_repeats_the_attack(model_file, tmp_path):
    data, one, two = digits(), tmp_path / "one.json", tmp_path / "two.json"
    np.savez(tmp_path / "mine data.npz", x=1.00000011920929 * data.test_x[:12], y=data.test_y[:12])
    words = [
        "--data",
        tmp_path / "mine data.npz",
        "--method",
        "pgd",
        "--steps",
        2,
        "--restarts",
        2,
        "--eps",
        "8/255",
    ]
    words += [
        "--input-range",
        0,
        1.00000011920929,
        "--images",
        9,
        "--box=-0.1,1.2",
        "--targeted",
        "--seed",
        5,
    ]
    words += ["--batch-size", 4, "--mean", "0.1", "--std", "0.9"]
    run("attack", model_file, *words, "--json", one)
    first = json.loads(one.read_text())
    again = shlex.split(first["command"])
    assert again[:3] == ["lipbounds", "attack", str(model_file)] and first["eps"] == 8 / 255
    run(*again[1:], "--json", two)
    second = json.loads(two.read_text())
    assert first == second


def test_options_that_read_a_model_are_spelled_out():
    reading = Reading("1", "2,3", "softmax", (3, 8, 8), "logits", ["a=1", "b=c.npy"])
    assert reading.words() == (
        "--mean 1 --std 2,3 --drop softmax --shape 3,8,8 --output logits --constant a=1 --constant b=c.npy".split()
    )
    assert Reading().words() == []


def test_images_that_no_attack_takes(model_file, tmp_path):
    x, y = np.full((2, 8, 8, 1), 0.5, np.float32), np.zeros(2, int)
    for name, images, message in (
        ("wide", 3 * x, "--box LOW,HIGH"),
        ("nan", x * np.float32(np.nan), "NaN or"),
    ):
        np.savez(tmp_path / name, x=images, y=y)
        said = run("attack", model_file, "--eps", "0.1", "--data", tmp_path / f"{name}.npz", code=1).stderr
        assert message in said
    said = run("attack", model_file, "--eps", "0.1", "--data", "digist", code=1).stderr
    assert "there is no digist; give `digits`, an .npz file" in said and "(did you mean 'digits'?)" in said


def test_every_other_attack_needs_a_radius(model_file):
    assert "pgd needs a radius" in run("attack", model_file, "--method", "pgd", code=2).stderr


@pytest.mark.slow
def test_distances_to_the_boundary_from_the_command_line(model_file, tmp_path):
    files = [tmp_path / "d.json", tmp_path / "d.html"]
    words = ("--method", "adbd", "--queries", "64", "--images", "6", "--json", files[0], "--page", files[1])
    text = run("attack", model_file, *words).stdout
    assert text.startswith("BoundaryDistances: 6 images, l-inf, ADBD <= ") and "no certificate" in text
    record = json.loads(files[0].read_text())
    assert record["norm"] == "inf" and record["eps"] is None
    model, data = load_model(model_file)[0], digits()
    found = analysis.adbd(model, data.test_x[:6], data.test_y[:6], queries=64)
    assert record["adbd"] == found.adbd > 0
    for row, distance in zip(record["rows"], found.distance, strict=True):
        assert row["distance"] == (distance if row["success"] else None)
        assert row["class_found"] != row["label"] and row["queries"] <= 64
    assert "the whole box" in files[1].read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "words", "norm"),
    [
        ("rays", ["--queries", "300"], "inf"),
        ("frank-wolfe", ["--steps", "10"], "2"),
        ("black-frank-wolfe", ["--queries", "510"], "2"),
        ("nes-pgd", ["--queries", "510", "--norm", "inf"], "inf"),
        ("odi-pgd", ["--steps", "10", "--restarts", "2"], "2"),
    ],
)
def test_the_other_attacks_from_the_command_line(model_file, tmp_path, method, words, norm):
    given = ("--method", method, "--eps", "0.5", "--images", "12", *words)
    run("attack", model_file, *given, "--json", tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["norm"] == norm and record["accuracy"] < record["clean"]
    asked = [row["queries"] for row in record["rows"]]
    assert all(many is None for many in asked) if method in ("frank-wolfe", "odi-pgd") else max(asked) <= 510


@pytest.mark.slow
def test_targets_from_the_command_line(model_file, tmp_path):
    words = (
        "--method",
        "fgsm",
        "--eps",
        "0.2",
        "--images",
        "20",
        "--targeted",
        "--json",
        tmp_path / "t.json",
    )
    assert "with targets" in run("attack", model_file, *words).stdout
    rows = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert all(row["target"] != row["label"] for row in rows)
    assert all(row["class_found"] == row["target"] for row in rows if row["success"])


def test_what_is_a_picture():
    image = np.linspace(0, 1, 48, dtype=np.float32)
    for shape in ((6, 8), (6, 8, 1), (4, 4, 3), (3, 4, 4), (1, 6, 8)):
        assert picture(image[: int(np.prod(shape))].reshape(shape)) is not None
    for shape in ((48,), (4, 6, 2), (2, 2, 3, 4)):
        assert picture(image.reshape(shape)) is None
