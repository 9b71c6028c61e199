"""`lipbounds forge` and what stands behind it: the study, the paper's claims, the page."""

import importlib
import json
import math

import numpy as np
import pytest
from command import run

from lipbounds.analysis.forging import load_forged
from lipbounds.analysis.forging_study import DOES_NOT, HOLDS, OPEN, claims, claims_table, study
from lipbounds.analysis.masking import gradient_masking
from lipbounds.training.config import Config
from lipbounds.training.data import digits
from lipbounds.training.loop import fit
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import load_model, save_model

SPEC = ModelSpec("mlp", (8, 8, 1), {"widths": "64-24-16-10", "mean": 0.3, "std": 0.4})
QUICK = ("--images", "40", "--pgd-steps", "3", "--queries", "10")


@pytest.fixture(scope="module")
def model():
    plain = Config(loss="cross-entropy", epochs=15, batch_size=64, learning_rate=5e-3, validate_every=0)
    return fit(plain, digits(), model=build(SPEC)).model


@pytest.fixture(scope="module")
def model_file(model, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "net.safetensors", model, SPEC)


@pytest.fixture(scope="module")
def found(model):
    data = digits()
    return study(
        model, data.test_x[:60], data.test_y[:60], data=data.train_x, candidates=(2**-6, 0.3, 0.9),
        eps=0.05, steps=3, queries=10, examples=16,
    )  # fmt: skip


@pytest.mark.slow
def test_the_study_measures_every_threshold(found, model):
    data = digits()
    assert [row.c_r for row in found.rows] == [0.0, 2**-6, 0.3, 0.9]
    for row in found.rows:
        network = found.forged.with_c_r(row.c_r)
        logits = np.asarray(network(data.test_x[:60]))
        assert row.clean == np.mean(logits.argmax(1) == data.test_y[:60])
        assert row.pgd <= row.clean and row.square <= row.clean and row.zeroed >= row.zero
    plain, *_, most = found.rows
    assert plain.zeroed == plain.zero and plain.constant == plain.constant_forged
    assert most.zeroed > 0.9 and most.clean < 0.5 < plain.clean  # nearly everything is gone
    text = repr(found)
    assert "2^-6" in text and "upper bounds of robust accuracy" in text and ">=" in text
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.slow
def test_claims_follow_from_the_figures(found):
    said = {claim.claim: claim for claim in claims(found)}
    lemma = next(c for name, c in said.items() if "Lemma 2)" in name and name.startswith("lambda_max"))
    assert lemma.verdict == HOLDS
    standard = next(c for name, c in said.items() if "standard accuracy" in name)
    points = [100 * (row.clean - found.rows[0].clean) for row in found.rows[1:]]
    assert all(f"{p:+.2f}" in standard.figures for p in points)
    assert standard.verdict == DOES_NOT or max(points) > 0
    armed = next(c for name, c in said.items() if "AutoAttack" in name)
    assert armed.verdict == OPEN and armed.figures.startswith("AutoAttack was not run")
    assert next(c for name, c in said.items() if "fifth" in name).verdict == HOLDS  # 0.9 zeroes nearly all
    assert "radii of all discs" in claims_table(tuple(said.values()))
    with pytest.raises(ValueError, match="nothing to compare"):
        claims(type(found)(found.rows[:1], found.forged, found.settings))


@pytest.mark.slow
def test_autoattack_closes_the_claim_about_the_tables(model, monkeypatch):
    module = importlib.import_module("lipbounds.analysis.autoattack")
    monkeypatch.setattr(module, "STEPS", 10)
    monkeypatch.setattr(module, "QUERIES", 30)
    data = digits()
    x, y = data.test_x[:40], data.test_y[:40]
    options = {"eps": 0.08, "steps": 2, "queries": 5, "examples": 4, "candidates": (0.9,)}
    made = study(model, x, y, data=data.train_x[:200], auto=True, **options)
    plain, gone = made.rows
    assert gone.clean < 0.5 < plain.clean
    for row in made.rows:
        found = module.autoattack(made.forged.with_c_r(row.c_r), x, y, 0.08, norm=math.inf)
        np.testing.assert_array_equal(row.withstood_all, row.withstood & ~found.success)
    assert plain.autoattack < plain.pgd  # it breaks more than 2 steps of PGD
    claim = next(c for c in claims(made) if "AutoAttack" in c.claim)
    missed = f"PGD less AutoAttack 0: {100 * (plain.pgd - plain.autoattack):.2f}, 0.9: "
    assert claim.verdict != HOLDS and missed in claim.figures and "points" in claim.figures
    assert "AutoAttack" in repr(made) and made.to_json()["rows"][0]["autoattack"] == plain.autoattack


@pytest.mark.slow
def test_claims_with_signs_of_masking(found, model):
    data = digits()
    signs = gradient_masking(
        found.forged.with_c_r(2**-6), model, data.test_x[:40], data.test_y[:40], eps=0.05, steps=3, restarts=1,
        queries=10, samples=60,
    )  # fmt: skip
    verdicts = {c.claim: c.verdict for c in claims(found, signs)}
    gradients = [c.verdict for c in signs]
    wanted = HOLDS if all(v == "passes" for v in gradients) else DOES_NOT if "fails" in gradients else OPEN
    assert verdicts["gradients are not masked (4.2.4)"] == wanted


@pytest.mark.slow
def test_the_command_writes_a_page_a_record_and_thresholds(model_file, tmp_path):
    out = tmp_path / "out"
    words = ("forge", model_file, "--dataset", "digits", "--c-r", "0", "2^-6", "0.05", *QUICK)
    text = run(*words, "--out", out, "--json", tmp_path / "r.json").stdout
    record = json.loads((out / "forged.json").read_text())
    assert record == json.loads((tmp_path / "r.json").read_text())
    assert [row["c_r"] for row in record["rows"]] == [0.0, 2**-6, 0.05]
    chosen = record["chosen"]["c_r"]
    assert "training images" in record["chosen"]["on"] and chosen in (0.0, 2**-6, 0.05)
    network, _ = load_model(model_file)
    again = load_forged(network, out / "forged.safetensors")
    assert all(math.isclose(r, chosen, rel_tol=1e-6) for r in again.c_r.values())
    page = (out / "forged.html").read_text()
    assert "What does forging change?" in page and page.count("data:image/png;base64,") == 2
    assert ("The claims of arXiv 2406.19622" in text and "MaskingChecks" in text) or chosen == 0.0
    assert run(*record["command"].split()[1:]).stdout.splitlines()[1] == text.splitlines()[1]
    run(*words[:-6], "--no-checks", *QUICK, "--out", out)  # our own folder is refreshed


@pytest.mark.slow
def test_one_ratio_and_the_smooth_gate(model_file, tmp_path):
    out = tmp_path / "out"
    words = ("forge", model_file, "--dataset", "digits", "--c-r", "2**-5", "--kind", "smooth", "--no-checks")
    run(*words, *QUICK, "--out", out)
    record = json.loads((out / "forged.json").read_text())
    assert record["chosen"] == {"c_r": 2**-5, "on": "the one asked for"} and record["masking"] is None
    assert record["settings"]["kind"] == "smooth"


def test_refusals(model_file, tmp_path):
    words = ("forge", model_file, "--dataset", "digits")
    for wrong in ("1", "-0.1", "two", "nan", "2^2"):
        assert "not a number in [0, 1)" in run(*words, f"--c-r={wrong}", code=2).stderr
    for wrong in ("0", "8", "-1", "8/0", "x"):
        assert "eps" in run(*words, "--eps", wrong, code=2).stderr
    assert "needs one" in run("forge", model_file, code=2).stderr
    assert "tau" in run(*words, "--kind", "smooth", "--tau", "0", *QUICK, code=1).stderr
    assert "belongs to --kind smooth" in run(*words, "--tau", "0.1", code=2).stderr
    assert "0 alone changes nothing: add one above 0" in " ".join(
        run(*words, "--c-r", "0", code=2).stderr.split()
    )
    assert "no effect" in run(*words, "--data-dir", tmp_path, *QUICK, code=1).stderr
    assert (
        "unknown data set 'digist' (did you mean 'digits'?)"
        in run("forge", model_file, "--dataset", "digist", code=1).stderr
    )
    (tmp_path / "forged.html").write_text("my thesis")
    assert "not written by" in run(*words, "--out", tmp_path, code=1).stderr
    assert (tmp_path / "forged.html").read_text() == "my thesis"
