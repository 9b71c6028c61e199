"""`lipbounds certify`: radii, own data, units, several eps."""

import json
import re

import numpy as np
import pytest
from command import run

import lipbounds as lb
from lipbounds._cli import common
from lipbounds.training.data import digits


def test_certify_agrees_with_the_library(model_file, form, tmp_path):
    file = tmp_path / "radii.json"
    text = run("certify", model_file, "--eps", "0.02", "0.1", "--json", file).stdout
    data = digits()
    radii = lb.certified_radius(form, data.test_x, data.test_y, bound=lb.lipsdp(form, pairwise=True))
    record = json.loads(file.read_text())
    assert [row["eps"] for row in record["certified_accuracy"]] == [0.02, 0.1]
    for row in record["certified_accuracy"]:
        assert row["accuracy"] == radii.accuracy(row["eps"])
        tenths = 1000 * round(row["accuracy"] * len(radii)) // len(radii)  # a lower bound is rounded down
        assert f"{tenths / 10:.1f} % certified" in text
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


def test_the_bound_of_a_large_network_is_liplt_unless_another_is_asked_for(model_file, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "QUICK_LIPSDP", 10)
    for words, method in ((), "liplt"), (["--method", "lipsdp"], "lipsdp"):
        said = run("certify", model_file, *words, "--json", tmp_path / "r.json")
        assert json.loads((tmp_path / "r.json").read_text())["method"] == method
        assert ("--method lipsdp is tighter" in said.stderr) == (method == "liplt")


@pytest.mark.parametrize(("norm", "root"), [("1", 1.0), ("inf", 8.0)])
def test_other_norms_have_what_l2_proves_in_them(model_file, form, tmp_path, norm, root):
    """By default LipSDP's l2 bound in l1, and of named methods the least of both norms; 64 inputs."""
    for words, verb in (([], lb.lipsdp), (["--method", "naive"], lb.naive)):
        run("certify", model_file, "--norm", norm, *words, "--json", tmp_path / "r.json")
        found = np.array(json.loads((tmp_path / "r.json").read_text())["radius"])
        data = digits()
        plain = lb.certified_radius(form, data.test_x, data.test_y, bound=verb(form, pairwise=True)).radius
        assert (found >= plain / root * (1 - 1e-6)).all() and (found > 0).mean() > 0.3


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


def test_certify_refuses_bad_data(model_file, tmp_path, monkeypatch):
    def bounded(*_):
        raise AssertionError("the bound is not computed for data that are refused")

    data = digits()
    x, y = data.test_x[:4], data.test_y[:4]
    cases = {
        "shape": (dict(x=x[:, :7], y=y), "images of shape"),
        "dtype": (dict(x=(16 * x).astype(np.uint8), y=y), "must hold floats"),
        "keys": (dict(a=x, b=x, c=y), "arrays x and y, or two arrays of other names: it holds a, b, c"),
        "objects": (dict(x=np.array([object()]), y=y), "arrays x and y"),
        "labels": (dict(x=x, y=y + 10), "label"),
        "no shape": (dict(x=x, y=np.int64(3)), "y must hold 4 integer labels, got shape ()"),
        "fractions": (dict(x=x, y=y.astype(float)), "y must hold 4 integer labels"),
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


def test_labels_are_looked_at_before_the_bound_is_computed(model_file, tmp_path, monkeypatch):
    def bounded(*_):
        raise AssertionError("computed")

    monkeypatch.setattr(common, "bound_of", bounded)
    np.savez(tmp_path / "bad.npz", x=digits().test_x[:4], y=np.array([0, 1, 2, 10]))
    said = run("certify", model_file, "--data", tmp_path / "bad.npz", code=1).stderr
    assert "bad.npz: labels must lie in 0..9, got 0..10" in said


@pytest.mark.parametrize(
    "label, message",
    [
        ("1e30", "'label' must hold whole numbers below 2^53, not 1e+30"),
        ("inf", "not inf"),
        ("nan", "not nan"),
        ("0.5", "not 0.5"),
        ("\udcff", "data.csv is not a text in UTF-8"),
    ],
)
def test_labels_of_a_table(model_file, tmp_path, label, message):
    header, line = ",".join(f"p{i}" for i in range(64)), ",".join(["0.5"] * 64)
    file = tmp_path / "data.csv"
    file.write_bytes(f"label,{header}\n{label},{line}\n".encode(errors="surrogateescape"))
    assert message in run("certify", model_file, "--data", file, code=1).stderr


def test_a_table_that_cannot_be_read_is_not_overwritten(model_file, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("image,label,prediction,correct,outcome,certified_radius\n" + "g" * 200_000 + "\n")
    assert "mine.csv exists and holds no radii" in run("certify", model_file, "--csv", file, code=1).stderr


@pytest.mark.slow
def test_at_eps_uses_every_engine(model_file, tmp_path):
    shares = {}
    for flags in ((), ("--at-eps",)):
        file = tmp_path / f"{len(flags)}.json"
        run(
            "certify",
            model_file,
            "--method",
            "naive",
            "--no-pairwise",
            "--local",
            "--eps",
            "0.3",
            *flags,
            "--json",
            file,
        )
        shares[flags] = json.loads(file.read_text())["certified_accuracy"][0]["accuracy"]
    assert shares["--at-eps",] >= shares[()]
    assert "needs --local and --eps" in run("certify", model_file, "--at-eps", "--eps", "0.3", code=2).stderr


def test_margins_are_those_of_the_library(model_file, form, tmp_path):
    data, files = digits(), (tmp_path / "few.npz", tmp_path / "radii.json")
    x, y = data.test_x[:4], data.test_y[:4]
    np.savez(files[0], x=x, y=y)
    words = ["--data", files[0], "--local", "--margins", "--box", "0,1", "--eps", "0.02", "--json", files[1]]
    text = run("certify", model_file, *words).stdout
    near = lb.Local(box=(0.0, 1.0), margins=True)
    radii = lb.certified_radius(form, x, y, bound=lb.lipsdp(form, pairwise=True), local=near)
    np.testing.assert_allclose(json.loads(files[1].read_text())["radius"], radii.radius, rtol=1e-6)
    assert "dual" in radii.counts and "the dual of lb.margins raises" in " ".join(text.split())


def test_at_eps_needs_a_radius_above_0(model_file):
    said = run("certify", model_file, "--local", "--at-eps", "--eps", "0", code=2).stderr
    assert "needs --local and --eps above 0" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--norm", "1", "--local"], "--local: bounds the network in norm 2 or inf, not 1"),
        (
            ["--local", "--at-eps", "--eps", "0.1", "--seconds-per-image", "inf"],
            "must be a number of seconds",
        ),
        (["--margins"], "--margins: needs --local"),
        (["--local", "--at-eps", "--eps", "0.1", "--margins"], "--margins: is part of --at-eps"),
        (["--local", "--seconds-per-image", "1"], "belongs to --at-eps and --margins"),
    ],
)
def test_local_bounds_that_cannot_be_are_refused_before_any_work(model_file, monkeypatch, words, said):
    monkeypatch.setattr(common, "load_both", lambda *given: pytest.fail("the model was read"))
    assert said in " ".join(run("certify", model_file, *words, code=2).stderr.replace("│", " ").split())
