"""Evaluation of a trained network: figures that agree with the library, contradictions that are caught, the command."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented import differences
from typer.testing import CliRunner

import lipbounds as lb
from lipbounds._cli.main import app
from lipbounds._comparison.compare import METHODS as BOUNDS
from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.evaluation import USUAL_EPS, certificates, evaluate, paper_units
from lipbounds.analysis.evaluation_report import write_evaluation_report
from lipbounds.analysis.figures import radii_figure, robust_band
from lipbounds.errors import GuaranteeError
from lipbounds.training import data, runs
from lipbounds.training.config import Config
from lipbounds.training.data import Dataset, digits
from lipbounds.training.loop import accuracy, fit
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import save_model

CONFIG = Config(
    dataset="digits",
    arch="64-16-16-10",
    mean=0.3,
    std=0.4,
    constants="liplt",
    lam=3.0,
    r0=0.5,
    t=10.0,
    epochs=25,
    batch_size=128,
    learning_rate=5e-3,
    decay_from=15,
    validate_every=0,
)
SPEC = CONFIG.spec((8, 8, 1), 10)
EPS = [0.1, 0.3]
COUNT = 100
METHODS = ("naive", "liplt", "lipsdp")


@pytest.fixture(scope="module")
def test_set():
    d = digits()
    return d.test_x[:COUNT], d.test_y[:COUNT]


@pytest.fixture(scope="module")
def model():
    return fit(CONFIG).model


@pytest.fixture(scope="module")
def record(model, test_set):
    return evaluate(model, *test_set, eps=EPS[::-1], pgd_steps=30)


# ---------------------------------------------------------------------------------------------------- the figures
def test_certified_is_below_attacked_is_below_clean(record):
    for e in map(str, EPS):
        attacked = record["pgd"]["2"][e]
        assert attacked < record["clean"]
        assert attacked <= record["pgd"]["inf"][e] <= record["clean"]  # the l-inf ball lies in the l2 ball
        proved = [record["certified"][name][e] for name in METHODS]
        assert 0 < proved[0] <= proved[1] <= proved[2] <= attacked
    assert record["pgd"]["2"]["0.3"] < record["pgd"]["2"]["0.1"]
    assert record["certified"]["naive"]["0.3"] < record["certified"]["lipsdp"]["0.3"]


@pytest.mark.slow
def test_the_figures_are_those_of_the_library(record, model, test_set):
    x, y = test_set
    assert record["clean"] == pytest.approx(accuracy(model, x, y), abs=1e-12)
    assert record["eps"] == EPS and record["images"] == COUNT and record["unit"] == "pixel values in [0, 1]"
    form = lb.trace(model, x[0])
    bound = lb.liplt(form, pairwise=True)
    radii = lb.certified_radius(form, x, y, bound=bound)
    assert record["certified"]["liplt"] == {str(e): radii.accuracy(e) for e in EPS}
    assert record["guarantee"] == dict.fromkeys(METHODS, "verified")
    assert record["failure_probability"] == dict.fromkeys(METHODS, 0.0)
    pairs, classes = bound.pairwise[np.triu_indices(10, 1)], bound.per_class
    constants = record["constants"]["liplt"]
    assert constants["value"] == bound.value
    assert constants["average_pair"] == pytest.approx(pairs.mean(), rel=1e-12)
    sums = (classes[:, None] + classes)[np.triu_indices(10, 1)]
    assert constants["average_sum"] == pytest.approx(sums.mean(), rel=1e-12)
    assert constants["average_sqrt2"] == pytest.approx(math.sqrt(2) * bound.value, rel=1e-12)
    curve = record["radii"]["liplt"]
    assert curve["accuracy"] == [radii.accuracy(e) for e in curve["eps"]] and len(curve["quartiles"]) == 3
    assert curve["accuracy"][0] > 0 == curve["accuracy"][-1]


def test_the_order_of_table_2(record):
    constants = record["constants"]
    for column in ("value", "average_pair", "average_sum", "average_sqrt2"):
        assert constants["naive"][column] > constants["liplt"][column] > constants["lipsdp"][column]
    for name in ("naive", "liplt"):  # the paper's two rows
        row = constants[name]
        assert row["average_pair"] < row["average_sum"] < row["average_sqrt2"]
    assert constants["lipsdp"]["average_pair"] < constants["lipsdp"]["average_sum"]


@pytest.mark.slow
def test_attacks_at_both_norms(record, model, test_set):
    for e in EPS:
        alone = pgd(model, *test_set, e, steps=30)
        assert record["pgd"]["2"][str(e)] <= alone.accuracy  # what another attack found counts too
        inner = record["pgd_settings"]["eps_inf"][str(e)]
        assert inner * 8 <= e and inner * 8 == pytest.approx(e, rel=1e-12)
        assert record["pgd"]["inf"][str(e)] <= pgd(model, *test_set, inner, norm=math.inf, steps=30).accuracy


def test_no_attack_succeeds_inside_a_certified_radius(record, model, test_set):
    x, y = test_set
    form = lb.trace(model, x[0])
    radii = lb.certified_radius(form, x, y, bound=lb.lipsdp(form, pairwise=True))
    assert record["inside"] == {"images": int((radii.radius > 0).sum()), "broken": 0}
    assert not pgd(model, x, y, radii.radius, steps=60, restarts=3).success.any()
    assert pgd(model, x, y, 3 * radii.radius, steps=60).success.mean() > 0.5  # it can break them


def test_a_record_is_strict_json_also_where_nothing_moves(test_set):
    def constant(batch):
        return (
            jnp.zeros((len(batch), 64), batch.dtype) @ jnp.ones((64, 10), batch.dtype) + jnp.eye(10)[0] * 2.0
        )

    x, y = test_set
    found = evaluate(constant, x, y, eps=[0.5], pgd_steps=2, methods=("naive",))
    share = float(np.mean(y == 0))
    assert found["clean"] == found["pgd"]["2"]["0.5"] == found["certified"]["naive"]["0.5"] == share > 0
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_first_images(model, test_set, record):
    found = evaluate(
        model, *test_set, eps=EPS[:1], methods=("naive",), pgd_steps=1, pgd_norms=(2,), images=30
    )
    assert found["images"] == 30 == found["radii"]["naive"]["images"]
    assert found["clean"] == accuracy(model, test_set[0][:30], test_set[1][:30])
    assert list(found["pgd"]) == ["2"] and list(found["certified"]) == ["naive"]
    same = certificates(model, *test_set, eps=EPS[:1], methods=("naive",), images=30)
    for key in ("clean", "images", "certified", "radii", "constants", "guarantee"):
        assert same[key] == found[key]


def test_a_function_of_a_batch_is_as_good_as_a_module(model, test_set, record):
    found = certificates(lambda batch: model(batch), *test_set, eps=EPS, methods=("liplt",))
    assert found["clean"] == record["clean"]
    assert found["constants"]["liplt"] == pytest.approx(record["constants"]["liplt"], rel=1e-9)


def test_a_method_that_refuses_says_why(model, test_set, monkeypatch):
    def refuse(question):
        raise ValueError("this network is too large")

    monkeypatch.setitem(BOUNDS, "lipsdp", refuse)
    found = certificates(model, *test_set, eps=EPS, methods=("naive", "lipsdp"))
    assert found["refused"] == {"lipsdp": "this network is too large"}
    assert list(found["certified"]) == list(found["constants"]) == ["naive"]


# ------------------------------------------------------------------------------------------------ contradictions
def test_a_wrong_bound_is_caught(model, test_set):
    bound = lb.liplt(lb.trace(model, test_set[0][0]), pairwise=True)
    wrong = dataclasses.replace(
        bound,
        value=0.3 * bound.value,
        pairwise=0.3 * bound.pairwise,
        per_class=0.3 * bound.per_class,
        parts=(),
    )
    with pytest.raises(
        GuaranteeError, match=r"inside their certified radius, image \d+ .* by liplt: this bound"
    ):
        evaluate(model, *test_set, eps=[0.2], methods=("naive", wrong), pgd_steps=20)
    # every attack looks inside the radii, also where no eps was asked for that reaches them
    with pytest.raises(GuaranteeError):
        evaluate(model, *test_set, eps=[0.0], methods=(wrong,), pgd_steps=20)


def test_rounding_of_the_float32_program_is_told_from_a_contradiction():
    """relu(t + 10000) - 10000 rounds t to multiples of 1/1024; in real arithmetic, which is certified, it is t."""

    def fn(batch):
        t = jax.nn.relu(batch[:, 0] - batch[:, 1] + np.float32(1e4)) - np.float32(1e4)
        return jnp.stack([t, jnp.zeros_like(t)], axis=1)

    t = np.float32([4e-4, 8e-4, 0.5])  # rounded to 0, 1/1024 and 0.5
    x = np.stack([np.float32(0.25) + t, np.full(3, 0.25, np.float32)], axis=1)
    y = np.zeros(3, int)
    alone = pgd(fn, x, y, 4e-4)
    assert alone.correct.tolist() == [False, True, True] and alone.success.tolist() == [False, True, False]
    found = evaluate(fn, x, y, eps=[1e-4, 4e-4, 0.1], methods=("liplt",), pgd_norms=(2,))
    assert found["clean"] == 1.0 and found["rounding"] >= 2
    assert found["pgd"]["2"]["0.0001"] == found["certified"]["liplt"]["0.0001"] == 1.0
    assert found["certified"]["liplt"]["0.0004"] == pytest.approx(2 / 3)
    assert found["pgd"]["2"]["0.0004"] >= 2 / 3
    assert found["certified"]["liplt"]["0.1"] == pytest.approx(1 / 3)
    # not broken from x, which float32 finds tied already
    assert found["pgd"]["2"]["0.1"] == pytest.approx(2 / 3)


# --------------------------------------------------------------------------------------------------------- units
def test_paper_units_halve_eps_on_cifar_only(model, test_set):
    for name in ("cifar10", "cifar100"):
        factor, text = paper_units(name)
        assert factor == 2.0 and "18/255" in text and "[-1, 1]" in text
    for name in ("mnist", "tiny-imagenet", "digits", "mine.npz"):
        factor, text = paper_units(name)
        assert factor == 1.0 and name in text and "nothing changes" in text
        assert ("no published figures" in text) == (name in ("digits", "mine.npz"))
    assert set(USUAL_EPS) == set(data.DATASETS)
    options = {"methods": ("naive",), "pgd_steps": 1, "pgd_norms": (2,), "images": 20}
    plain = evaluate(model, *test_set, eps=[0.1], **options)
    halved = evaluate(model, *test_set, eps=[0.2], paper_units=2.0, **options)
    assert plain["paper_units"] is None
    assert halved["paper_units"] == {"factor": 2.0, "given": {"0.1": 0.2}}
    assert halved["eps"] == [0.1] and halved["certified"] == plain["certified"]


# ----------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": []}, "at least one, got"),
        ({"eps": [np.nan]}, "finite numbers >= 0"),
        ({"eps": [-1.0]}, "finite numbers >= 0"),
        ({"images": 0}, "images must be a whole number >= 1"),
        ({"images": 2.5}, "images must be a whole number >= 1"),
        ({"images": 2, "y": np.zeros(COUNT - 1, int)}, f"y must hold {COUNT} integer labels"),
        ({"methods": ()}, "got none"),
        ({"methods": ("liplt", "guess")}, "upper bounds out of lipsdp.*; got guess"),
        ({"methods": ("empirical",)}, "got empirical"),
        ({"methods": ("liplt", "liplt")}, "each method may be named only once, got liplt, liplt"),
        ({"pgd_norms": (1,)}, "norm 2 or inf"),
        ({"pgd_steps": -1}, "steps must be"),
        ({"paper_units": 0.0}, "paper_units must be a factor > 0"),
        ({"y": np.full(COUNT, 10)}, "labels must lie in 0..9"),
        ({"x": np.full((COUNT, 8, 8, 1), 1.5, np.float32)}, "box"),
        ({"x": np.float32(0.0)}, "at least one, got shape"),
    ],
)
def test_bad_input_is_refused(model, test_set, change, message):
    given = {"x": test_set[0], "y": test_set[1], "eps": [0.1], "methods": ("naive",), "pgd_steps": 1} | change
    with pytest.raises(ValueError, match=message):
        evaluate(model, given.pop("x"), given.pop("y"), **given)


def test_an_estimate_certifies_nothing(model, test_set):
    guess = lb.liplt(lb.trace(model, test_set[0][0]), pairwise=True, guarantee="estimate")
    with pytest.raises(ValueError, match="must be upper bounds"):
        certificates(model, *test_set, eps=[0.1], methods=(guess,))


# --------------------------------------------------------------------------------------------- figure and page
def page_record(record, **more):
    described = {
        "path": "r",
        "title": "<b>mine</b>",
        "dataset": "digits",
        "architecture": "mlp",
        "arguments": {},
    }
    rest = {"command": "lipbounds evaluate r", "created": "today", "lipbounds": "0", "model": described}
    return {**record, **rest, **more}


def test_the_page_is_one_file_with_the_figures_in_it(record, tmp_path):
    other = {"model": {"title": "plain"}, **{k: v for k, v in record.items() if k != "pgd"}}
    whole = page_record(record, against=other)
    text = write_evaluation_report(whole, tmp_path).read_text()
    assert "&lt;b&gt;mine" in text and "<b>mine" not in text and "plain" in text
    for row in (*record["pgd"].values(), *record["certified"].values()):
        for share in row.values():
            assert f"{100 * share:.2f} %" in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "LipSDP" in text and "verified" in text
    first = {name: (tmp_path / name).read_bytes() for name in ("radii.png", "radii.svg")}
    assert first["radii.png"].startswith(b"\x89PNG") and b"<svg" in first["radii.svg"]
    write_evaluation_report(whole, tmp_path)
    assert first == {name: (tmp_path / name).read_bytes() for name in first}


def test_the_figure_shows_the_shares_of_the_record(record):
    other = record | {"clean": 0.5}
    figure = radii_figure([("mine", record), ("other", other)], EPS)
    assert [ax.get_title(loc="left")[:5] for ax in figure.axes] == ["mine:", "other"]
    for ax in figure.axes:
        lines = {line.get_label(): line for line in ax.get_lines()}
        for name, label in (("naive", "naive (verified)"), ("lipsdp", "LipSDP (verified)")):
            shown = lines[label].get_ydata()
            np.testing.assert_array_equal(shown[:-1], record["radii"][name]["accuracy"])
        marks = [line.get_xdata()[0] for line in ax.get_lines() if len(set(line.get_xdata())) == 1]
        assert marks == EPS


def test_the_band_holds_both_sides_at_every_eps(record):
    """`lower` <= every certified share and `upper` >= the attained one, on the whole of each interval."""
    curve, best = record["attacked"]["curve"], record["robust"]
    edges, lower, upper = robust_band(record, 2.0)
    assert (lower <= upper).all() and (np.diff(upper) <= 0).all() and upper[0] <= record["clean"]
    for eps in (0.01, *EPS, 0.77, 1.9):
        at = np.searchsorted(edges, eps, side="right") - 1
        for radii in record["radii"].values():
            if eps in radii["eps"]:
                assert lower[at] <= max(r["accuracy"][r["eps"].index(eps)] for r in record["radii"].values())
        known = [share for e, share in zip(curve["eps"], curve["accuracy"], strict=True) if e <= eps]
        assert upper[at] == known[-1]
    for e in EPS:
        row = best[str(e)]
        assert row["certified"] == max(each[str(e)] for each in record["certified"].values())
        assert row["certified"] == record["certified"][row["by"]][str(e)] <= row["attacked"]
        assert row["attacked"] == record["attacked"]["2"][str(e)] == record["pgd"]["2"][str(e)]
        at = np.searchsorted(edges, e, side="right") - 1
        assert lower[at] <= row["certified"] and upper[at] >= row["attacked"]
    figure = radii_figure([("mine", record)], EPS)
    assert len(figure.axes[0].collections) == 1
    assert (
        not radii_figure([("old", {k: v for k, v in record.items() if k != "attacked"})], EPS)
        .axes[0]
        .collections
    )


@pytest.mark.slow
def test_autoattack_beside_pgd(model, test_set, tmp_path):
    options = {"eps": EPS, "methods": ("naive", "liplt"), "pgd_steps": 3, "images": 20}
    found = evaluate(model, *test_set, attack="autoattack", **options)
    assert found["attacked"]["by"] == ["PGD", "AutoAttack"]
    for norm, row in found["pgd"].items():
        for e, share in row.items():
            assert found["attacked"][norm][e] <= share
    for row in found["robust"].values():
        assert row["certified"] <= row["attacked"] <= found["clean"]
    assert "PGD and AutoAttack" in write_evaluation_report(page_record(found), tmp_path).read_text()


def test_an_attack_that_cannot_run_is_refused_at_once(model, test_set):
    with pytest.raises(ValueError, match="attack must be one of pgd, autoattack, got 'zoo'"):
        evaluate(model, *test_set, eps=EPS, attack="zoo")
    with pytest.raises(ValueError, match="at least 4 classes"):
        evaluate(lambda b: b.reshape(len(b), -1)[:, :3], *test_set, eps=EPS, attack="autoattack")


# ------------------------------------------------------------------------------------------------- the command
def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    if code == 1:
        assert result.stderr.startswith("lipbounds: ") and result.stderr.count("\n") == 1
    return result


@pytest.fixture
def folder(model, tmp_path):
    place = tmp_path / "run"
    runs.create(place, CONFIG, {"name": "digits"})
    runs.write_model(place, model, SPEC)
    return place


QUICK = ("--pgd-steps", 3, "--methods", "naive", "liplt", "--images", 40)


def test_a_run_is_evaluated_with_one_command(folder, tmp_path):
    text = run(folder, *QUICK, "--eps", 0.1, 0.3, "--against", folder, "--json", tmp_path / "r.json").stdout
    found = json.loads((folder / "evaluation.json").read_text())
    assert found == json.loads((tmp_path / "r.json").read_text())
    assert {"clean", "pgd", "certified", "guarantee", "constants", "radii", "seconds", "refused"} <= set(
        found
    )
    assert differences("Evaluations as JSON", found) == (set(), set())
    assert (
        found["eps"] == [0.1, 0.3]
        and found["images"] == 40
        and list(found["certified"]) == ["naive", "liplt"]
    )
    assert found["model"]["title"] == "64-16-16-10, CRM with liplt" and found["pgd_settings"]["steps"] == 3
    assert found["against"]["certified"] == found["certified"]
    for share in (found["clean"], *found["pgd"]["2"].values(), *found["certified"]["liplt"].values()):
        assert f"{100 * share:.2f} %" in text
    assert re.search(r"certified LipLT +verified", text) and re.search(r"PGD l2 +attained", text)
    mean = found["constants"]["liplt"]["average_pair"]
    shown = float(re.search(r"LipLT +≤ ([\d.]+)", text).group(1))
    assert mean <= shown <= 1.001 * mean
    assert {"evaluation.html", "radii.png", "radii.svg"} <= {path.name for path in folder.iterdir()}
    assert "--eps 0.1 0.3 --methods naive liplt" in found["command"]
    run(folder, *QUICK)  # what it wrote itself may be replaced
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["eps"] == [0.5] and again["paper_units"] is None


def test_a_model_file_writes_only_where_it_is_told(model, tmp_path):
    file = save_model(tmp_path / "net.safetensors", model, SPEC)
    run(file, "--dataset", "digits", *QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]
    run(file, "--dataset", "digits", *QUICK, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "evaluation.html").is_file()


@pytest.mark.slow
def test_paper_units_on_cifar10(tmp_path, monkeypatch, rng):
    pixels = rng.integers(0, 256, (6, 4, 4, 3), np.uint8)
    labels = np.arange(6, dtype=np.int32) % 3
    asked = []

    def load(name, data_dir=None):
        asked.append((name, data_dir))
        return Dataset(name, pixels, labels, pixels, labels)

    monkeypatch.setattr(data, "load", load)
    spec = ModelSpec("mlp", (4, 4, 3), {"widths": "48-5-3"})
    file = save_model(tmp_path / "net.safetensors", build(spec), spec)
    options = ("--data-dir", tmp_path, "--pgd-steps", 1, "--methods", "naive", "--json", tmp_path / "r.json")
    text = " ".join(run(file, "--dataset", "cifar10", *options, "--paper-units").stdout.split())
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["eps"] == [18 / 255] and found["paper_units"]["given"] == {str(18 / 255): 36 / 255}
    assert differences("Evaluations as JSON", found) == (set(), set())
    assert found["paper_units"]["text"] == paper_units("cifar10")[1]
    assert "its 36/255 is 18/255 in pixel values" in text and "eps 0.141176 as asked is 0.0705882" in text
    run(file, "--dataset", "cifar10", *options)
    assert json.loads((tmp_path / "r.json").read_text())["eps"] == [36 / 255]
    assert asked == [("cifar10", tmp_path)] * 2


def test_refusals_are_one_line(folder, model, tmp_path):
    file = save_model(tmp_path / "net.safetensors", model, SPEC)
    other = tmp_path / "other"
    runs.create(other, Config(dataset="mnist", arch="784-10"), {"name": "mnist"})
    assert "was interrupted" in run(other, *QUICK, code=1).stderr
    wide = ModelSpec("mlp", (28, 28, 1), {"widths": "784-10"})
    runs.write_model(other, build(wide), wide)
    assert "was trained on mnist" in run(folder, "--against", other, code=1).stderr
    assert "unknown data set 'svhn'" in run(file, "--dataset", "svhn", code=1).stderr
    save_model(file, build(wide), wide)
    assert (
        "takes images of shape (28, 28, 1), digits has (8, 8, 1)"
        in run(file, "--dataset", "digits", code=1).stderr
    )
    assert "not a run folder" in run(tmp_path, code=1).stderr
    run(file, code=2)
    run(folder, "--dataset", "digits", code=2)
    run(folder, "--eps", "nan", code=2)
    run(folder, "--methods", "guess", code=2)


def test_files_of_others_are_left_alone(folder):
    (folder / "radii.png").write_text("mine")
    assert "radii.png, not written by" in run(folder, *QUICK, code=1).stderr
    assert (folder / "radii.png").read_text() == "mine"
    run(folder, *QUICK, "--force")
    assert (folder / "radii.png").read_bytes().startswith(b"\x89PNG")


def test_a_contradiction_ends_the_command(folder, monkeypatch):
    honest = BOUNDS["liplt"]

    def wrong(question):
        bound = honest(question)
        return dataclasses.replace(bound, value=0.2 * bound.value, pairwise=0.2 * bound.pairwise, parts=())

    monkeypatch.setitem(BOUNDS, "liplt", wrong)
    message = run(folder, "--methods", "liplt", "--pgd-steps", 20, code=1).stderr
    assert "inside their certified radius" in message and not (folder / "evaluation.json").exists()


# ---------------------------------------------------------------------------------------------------- the long one
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_no_attack_of_1000_steps_succeeds_inside_a_radius(seed):
    arch = ["64-128-128-10", "64-32-10", "64-40-40-40-10", "2C2F", "64-64-10"][seed]
    chosen = {"arch": arch, "activation": ["relu", "maxmin"][seed == 1], "seed": seed}
    if seed == 4:
        chosen |= {"loss": "cross-entropy"}
    model, d = fit(dataclasses.replace(CONFIG, **chosen)).model, digits()
    images = 40 if arch == "2C2F" else 300  # convolutions take long on a CPU
    attack = {"pgd_steps": 1000, "pgd_restarts": 2, "pgd_norms": (2,)}
    found = evaluate(model, d.test_x, d.test_y, eps=[0.1], images=images, seed=seed, **attack)
    assert found["inside"]["images"] > 0.8 * images and found["inside"]["broken"] == 0
    assert found["certified"]["lipsdp"]["0.1"] <= found["pgd"]["2"]["0.1"] <= found["clean"]
    assert jax.tree.leaves(found["refused"]) == []
