"""Robust accuracy from both sides: exact on linear networks, contradictions caught, the command."""

import csv
import dataclasses
import functools
import json
import math
import re

import numpy as np
import pytest
from command import run

import lipbounds as lb
from lipbounds import analysis
from lipbounds.errors import GuaranteeError
from lipbounds.training.data import digits
from lipbounds.training.store import load_model

PGD = functools.partial(analysis.pgd, steps=1)  # exact where the margin is linear
W = np.random.default_rng(5).normal(size=(2, 6)).astype(np.float32)


def linear(batch):
    return batch @ W.T


@pytest.fixture(scope="module")
def case():
    """(form, x, y, radii): of a linear network the certified radius is the distance to the boundary."""
    x = (0.3 + 0.4 * np.random.default_rng(6).random((40, 6))).astype(np.float32)
    y = linear(x).argmax(1)
    y[:3] = 1 - y[:3]
    form = lb.from_weights([W])
    return form, x, y, lb.certified_radius(form, x, y, bound=lb.naive(form, pairwise=True))


def test_both_sides_meet_on_a_linear_network(case):
    form, x, y, radii = case
    eps = float(np.median(radii.radius))
    seen = []

    def attack(fn, points, labels, level, settings):
        found = PGD(fn, points, labels, level, settings)
        seen.append((level, int(found.correct.sum())))
        return found

    both = analysis.robust_accuracy(form, radii, x, y, [1.01 * eps, eps / 2, 0.0], attack=attack, fn=linear)
    assert both.eps == (0.0, eps / 2, 1.01 * eps) and both.clean == 37 / 40
    for e, row in zip(both.eps, both.rows(), strict=True):
        assert row == {"eps": e, "certified": radii.accuracy(e), "attacked": both.upper(e)}
        assert row["certified"] == row["attacked"]
    assert both.lower(1.01 * eps) < both.lower(eps / 2) < both.clean
    # only what is open is attacked: correct, not certified, not broken at a smaller eps
    right = radii.radius > 0
    first = int((right & (radii.radius <= eps / 2)).sum())
    second = int((right & (radii.radius > eps / 2) & (radii.radius <= 1.01 * eps)).sum())
    assert both.attacked == (0, first, second) and seen == [(eps / 2, first), (1.01 * eps, second)]
    found = np.isfinite(both.distance) & right
    assert (both.distance[found] >= radii.radius[found]).all() and not both.distance[:3].any()
    assert "<= robust <=" in repr(both) and "FGSM" in repr(both)


def test_the_others_do_not_matter(case):
    form, x, y, radii = case
    eps = 1.2 * float(np.median(radii.radius))
    two = functools.partial(PGD, restarts=2, step_size=0.4 * eps)
    both = analysis.robust_accuracy(form, radii, x, y, eps, attack=two, fn=linear, seed=4)
    alone = two(linear, x, y, eps, seed=4)
    open_ = radii.radius <= eps
    np.testing.assert_array_equal(both.distance[open_ & alone.correct], alone.distance[open_ & alone.correct])
    assert np.isfinite(both.distance[open_]).any()


def test_a_radius_that_is_too_large_is_a_contradiction(case):
    form, x, y, radii = case
    wrong = lb.Radii(1.5 * radii.radius, radii.correct, 2.0, "verified", "guessed")
    nearest = functools.partial(analysis.frank_wolfe, steps=80, gamma=0.05)  # the first success on the way
    with pytest.raises(GuaranteeError, match=r"image \d+ at l2 distance .* by guessed: this bound is wrong"):
        analysis.robust_accuracy(form, wrong, x, y, 1.6 * float(radii.radius.max()), attack=nearest)


def test_what_is_refused(case):
    form, x, y, radii = case
    for eps, message in (([], "at least one"), (math.inf, "finite numbers >= 0"), (-0.1, "finite numbers")):
        with pytest.raises(ValueError, match=message):
            analysis.robust_accuracy(form, radii, x, y, eps)
    with pytest.raises(ValueError, match="40 radii and 30 examples"):
        analysis.robust_accuracy(form, radii, x[:30], y[:30], 0.1)
    with pytest.raises(ValueError, match="the radii are in l2"):
        analysis.robust_accuracy(form, radii, x, y, 0.1, norm=math.inf)
    with pytest.raises(
        TypeError, match="a form from lb.trace and radii from lb.certified_radius, got function and"
    ):
        analysis.robust_accuracy(linear, radii, x, y, 0.1)
    with pytest.raises(TypeError, match="got LureForm and ndarray"):
        analysis.robust_accuracy(form, radii.radius, x, y, 0.1)


def test_radii_of_other_labels_are_refused(case):
    """They would count every certified example as classified as labelled, whatever its label is."""
    form, x, y, radii = case
    other = y.copy()
    other[7] = 1 - y[7]
    with pytest.raises(ValueError, match="other labels: that of example 7 is . there and . in y"):
        analysis.robust_accuracy(form, radii, x, other, 0.0)
    blank = np.arange(len(y)) == 7  # in a table whose label is blank there
    some = dataclasses.replace(radii, label=np.where(blank, np.nan, y))
    analysis.robust_accuracy(form, some, x, other, 0.0)
    one = dataclasses.replace(radii, label=np.where(blank, y, np.nan))
    with pytest.raises(ValueError, match="other labels: that of example 7 is . there and . in y"):
        analysis.robust_accuracy(form, one, x, other, 0.0)


# ------------------------------------------------------------------------------------------------------- the command
def test_certify_with_an_attack(model_file, tmp_path):
    files = {name: tmp_path / f"both.{name}" for name in ("json", "csv")}
    words = ("--method", "liplt", "--eps", "0.3", "0.1", "--attack", "fgsm", "--seed", "2")
    text = run("certify", model_file, *words, "--json", files["json"], "--csv", files["csv"]).stdout
    record = json.loads(files["json"].read_text())
    assert record["attack"]["method"] == "fgsm" and record["attack"]["guarantee"] == "attained"
    certified = {row["eps"]: row["accuracy"] for row in record["certified_accuracy"]}
    assert [row["eps"] for row in record["robust"]] == [0.1, 0.3]
    data = digits()
    model = load_model(model_file)[0]
    for row in record["robust"]:
        assert row["certified"] == certified[row["eps"]] < row["attacked"] < record["clean"]
    alone = analysis.fgsm(model, data.test_x, data.test_y, 0.1)
    # at the smallest eps nothing else has been tried
    assert record["robust"][0]["attacked"] == alone.accuracy
    lines = re.findall(r"^eps ([\d.]+) +([\d.]+) % certified <= robust <= ([\d.]+) % under", text, re.M)
    assert [float(line[0]) for line in lines] == [0.1, 0.3]
    for line, row in zip(lines, record["robust"], strict=True):
        assert float(line[1]) <= 100 * row["certified"] <= 100 * row["attacked"] <= float(line[2])
    assert lb.load(files["json"]).radius.tolist() == record["radius"]
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["certified_radius"]) for row in rows] == record["radius"]
    found = [float(row["attacked_distance"]) if row["attacked_distance"] else None for row in rows]
    assert found == record["attacked_distance"] and None in found
    near = [(r, d) for r, d in zip(record["radius"], found, strict=True) if d is not None]
    assert len(near) > 50 and all(r <= d for r, d in near)
    assert lb.load(files["csv"]).radius.tolist() == record["radius"]
    thesis = tmp_path / "thesis.csv"
    thesis.write_text("chapter,1")
    assert "exists" in run("certify", model_file, "--csv", thesis, code=1).stderr


@pytest.mark.slow
def test_attack_without_a_method_is_autoattack(model_file, tmp_path):
    data = digits()
    np.savez(tmp_path / "few.npz", x=data.test_x[:12], y=data.test_y[:12])
    file = tmp_path / "a.json"
    words = ("--data", tmp_path / "few.npz", "--method", "liplt", "--eps", "0.2", "--json", file)
    text = run("certify", "--attack", model_file, *words).stdout
    record = json.loads(file.read_text())
    assert record["attack"]["method"] == "autoattack" and "AutoAttack in l2" in text
    (row,) = record["robust"]
    assert row["certified"] <= row["attacked"] <= record["clean"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--norm", "1", "--attack"], "autoattack is in norm 2 or inf, not 1: take frank-wolfe"),
        (["--attack", "rays"], "rays measures distances in l-inf"),
        (["--attack", "adbd"], "'adbd' is not one of"),
        (["--attack", "--coordinator", "x:1"], "runs in one process"),
        (["--box", "0,1"], "belongs to --local and --attack"),
    ],
)
def test_words_that_do_not_fit(model_file, words, message):
    said = run("certify", model_file, *words, code=2).stderr
    assert message in re.sub(r"[\s│]+", " ", said)


def test_images_outside_the_box_say_what_to_do(model_file, tmp_path):
    data = digits()
    np.savez(tmp_path / "mine.npz", x=2 * data.test_x[:4] - 1, y=data.test_y[:4])
    words = ("certify", model_file, "--data", tmp_path / "mine.npz", "--method", "naive", "--attack", "fgsm")
    assert "give the range of the inputs, --box LOW,HIGH" in run(*words, code=1).stderr
    assert "certified <= robust <=" in run(*words, "--box", "-1,1").stdout


def test_certify_says_that_no_attack_was_needed(model_file, tmp_path):
    words = ("--method", "liplt", "--eps", "1e-6", "--attack", "fgsm", "--json", tmp_path / "b.json")
    text = run("certify", model_file, *words).stdout
    assert "attack:    not needed: every correctly classified image is certified at these eps\n" in text
    record = json.loads((tmp_path / "b.json").read_text())["attack"]
    assert record["name"] == "no attack" and record["attacked"] == [0]
