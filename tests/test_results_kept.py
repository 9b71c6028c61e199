"""Radii in files of their own, and bounds from certificates: read back as they were, and nothing is paid twice."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from command import run
from documented import documented

import lipbounds as lb
from lipbounds._cli.certify import bound_in
from lipbounds._margins.blocks import joined
from lipbounds._margins.table import COLUMNS

FORM = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
X, Y = np.array([[1.0, 0.5], [0.0, 1.0], [3.0, 0.0]]), np.array([0, 0, 0])
RADII = lb.certified_radius(FORM, X, Y)


def same(a: lb.Radii, b: lb.Radii) -> None:
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_radii_hold_labels_and_predictions() -> None:
    assert RADII.label is not None and RADII.prediction is not None
    assert RADII.label.tolist() == [0, 0, 0] and RADII.prediction.tolist() == [0, 1, 0]
    one = lb.certified_radius(lb.from_weights([[[1.0]]]), [[2.0], [-2.0]], [1, 1])
    assert (
        one.prediction is not None
        and one.prediction.tolist() == [1, 0]
        and one.correct.tolist() == [True, False]
    )
    assert joined([RADII, RADII]).prediction.tolist() == [0, 1, 0, 0, 1, 0]  # type: ignore[union-attr]


@pytest.mark.parametrize("end", ["csv", "json"])
def test_radii_are_read_back(end: str, tmp_path: pathlib.Path) -> None:
    endless = dataclasses.replace(RADII, radius=np.array([np.inf, 0.0, 1 / 3]), norm=np.inf)
    older = dataclasses.replace(RADII, label=None, prediction=None, outcome=None)
    for radii in (RADII, endless, older):
        path = tmp_path / f"radii.{end}"
        lb.save_radii(radii, path)
        notes = radii.notes if end == "json" else ()
        same(lb.load(path), dataclasses.replace(radii, notes=notes))


@pytest.mark.parametrize("end", ["csv", "json"])
def test_radii_of_an_interrupted_search_are_read_back_as_such(end: str, tmp_path: pathlib.Path) -> None:
    early = dataclasses.replace(
        RADII, complete=False, notes=("interrupted: radii are as far as they were proved",)
    )
    lb.save_radii(early, tmp_path / f"radii.{end}")
    same(lb.load(tmp_path / f"radii.{end}"), early)
    assert not joined([RADII, early]).complete and joined([RADII, RADII]).complete


def test_files_that_do_not_say_complete_are_read(tmp_path: pathlib.Path) -> None:
    for end in ("csv", "json"):
        lb.save_radii(RADII, tmp_path / f"radii.{end}")
    table, record = tmp_path / "radii.csv", tmp_path / "radii.json"
    table.write_text(table.read_text().replace(",complete\n", "\n").replace(",True\n", "\n"))
    old = json.loads(record.read_text())
    assert old.pop("complete") is True and "complete" not in table.read_text()
    record.write_text(json.dumps(old))
    for path in (table, record):
        assert lb.load(path).complete and lb.load(path).radius.tolist() == RADII.radius.tolist()
    record.write_text(json.dumps(old | {"complete": "yes"}))
    with pytest.raises(ValueError, match="complete must be true or false, got 'yes'"):
        lb.load(record)


@pytest.mark.parametrize("end", ["csv", "json"])
def test_labels_that_are_known_in_part_are_kept(end: str, tmp_path: pathlib.Path) -> None:
    some = dataclasses.replace(
        RADII,
        label=np.array([0.0, np.nan, 0.0]),
        prediction=np.array([np.nan, np.nan, 7.0]),
        outcome=np.array(["global", "", ""], RADII.outcome.dtype),  # type: ignore[union-attr]
        notes=(),
    )
    path = tmp_path / f"radii.{end}"
    lb.save_radii(some, path)
    assert "nan" not in path.read_text().lower()
    same(lb.load(path), some)
    nothing = dataclasses.replace(some, label=np.full(3, np.nan))
    lb.save_radii(nothing, path)
    assert lb.load(path).label is None


def test_tables_of_spreadsheets_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "radii.csv"
    lb.save_radii(RADII, path)
    lines = path.read_text().splitlines()
    assert lines[1].startswith("0,0,0,True,global,") and lines[2].startswith("1,0,1,False,wrong,")
    lines[1] = lines[1].replace("0,0,0,True,", "0,0.0,NaN,TRUE,")
    lines[2] = lines[2].replace("1,0,1,False,wrong,", "1,,1.0,FALSE,nan,")
    path.write_bytes("\r\n".join(["\ufeff" + lines[0], *lines[1:], ""]).encode())
    found = lb.load(path)
    assert found.label.dtype == float and np.array_equal(found.label, [0, np.nan, 0], equal_nan=True)
    assert np.array_equal(found.prediction, [np.nan, 1, 0], equal_nan=True)
    assert found.correct.tolist() == [True, False, True] and found.counts == {"global": 2}
    assert found.radius.tolist() == RADII.radius.tolist()


def test_radii_that_nothing_would_read_back_are_not_written(tmp_path: pathlib.Path) -> None:
    wrong = dataclasses.replace(RADII, radius=np.array([1.0, np.nan, 0.0]))
    empty = lb.certified_radius(FORM, X[:0], Y[:0])
    for end in ("csv", "json"):
        with pytest.raises(ValueError, match="cannot be saved, as nothing would read them back"):
            lb.save_radii(wrong, tmp_path / f"radii.{end}")
    with pytest.raises(ValueError, match=r"take a \.json file"):
        lb.save_radii(empty, tmp_path / "radii.csv")
    assert not list(tmp_path.iterdir())
    lb.save_radii(empty, tmp_path / "radii.json")
    assert len(lb.load(tmp_path / "radii.json")) == 0


def test_radii_overwrite_only_radii(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "radii.csv"
    path.write_text("my thesis")
    with pytest.raises(ValueError, match="exists and holds no radii; overwrite=True replaces it"):
        lb.save_radii(RADII, path)
    lb.save_radii(RADII, path, overwrite=True)
    lb.save_radii(RADII, path)
    with pytest.raises(ValueError, match=r"\.csv or \.json files, not to 'radii\.txt'"):
        lb.save_radii(RADII, tmp_path / "radii.txt")
    with pytest.raises(TypeError, match="needs Radii"):
        lb.save_radii(RADII.radius, path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("0,0,0,True,", "0,0,0,2,", "column correct holds other than True and False"),
        (",True\n", ",yes\n", "of several networks"),
        ("\n1,", "\n7,", "not numbered from 0 on"),
        (",l2", ",l2", ""),
        ("verified", "certain", "no complete radii"),
        (",2,verified", ",2,assumed", "of several networks"),
        ("global", "nothing", "do not fit together"),
    ],
)
def test_damaged_tables_are_refused(old: str, new: str, words: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "radii.csv"
    lb.save_radii(RADII, path)
    text = path.read_text()
    if not words:
        path.write_text(text[: text.index("\n") + 1])
        words = "a table without a line"
    else:
        assert old in text
        path.write_text(text.replace(old, new, text.count(old) if new == "certain" else 1))
    with pytest.raises(ValueError, match=words):
        lb.load(path)


# ------------------------------------------------------------------------------------------ certificates
def test_a_certificate_is_a_bound_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = lb.lipsdp(FORM, pairwise=True)
    lb.save_certificate(bound, tmp_path / "c")
    monkeypatch.setattr("lipbounds._lipsdp.lipsdp.search", None, raising=False)
    again = lb.load_certificate(tmp_path / "c", FORM)
    assert isinstance(again, lb.UpperBound) and again.guarantee == bound.guarantee == "verified"
    assert bound.value <= again.value <= bound.value * (1 + 2e-9)
    assert (again.pairwise >= bound.pairwise).all() and again.network == bound.network
    radii = lb.certified_radius(FORM, X, Y, bound=again)
    np.testing.assert_allclose(radii.radius, lb.certified_radius(FORM, X, Y, bound=bound).radius, rtol=4e-9)
    lb.save_certificate(again, tmp_path / "d")
    assert lb.verify_certificate(tmp_path / "d", FORM)


def test_a_certificate_that_proves_nothing_is_no_bound(tmp_path: pathlib.Path) -> None:
    bound = lb.lipsdp(FORM)
    smaller = dataclasses.replace(
        bound,
        value=bound.value / 2,
        certificate=dataclasses.replace(bound.certificate, value=bound.certificate.value / 2),
    )
    lb.save_certificate(smaller, tmp_path / "c")
    with pytest.raises(lb.CertificateError, match="is claimed, but its multipliers prove only"):
        lb.load_certificate(tmp_path / "c", FORM)
    with pytest.raises(TypeError, match=r"needs a LureForm"):
        lb.load_certificate(tmp_path / "c", lambda x: x)  # type: ignore[arg-type]


def test_certify_with_a_certificate_and_a_table(model_file: Any, form: Any, tmp_path: pathlib.Path) -> None:
    bound = lb.lipsdp(form, pairwise=True)
    for name in "cd":
        lb.save_certificate(bound, tmp_path / name)
    words = ("certify", model_file, "--certificate", tmp_path / "c", "--eps", "0.1")
    said = run(*words, "--csv", tmp_path / "r.csv", "--json", tmp_path / "r.json").stdout
    assert "norm:      l2, as --norm was not given" in said
    table, record = lb.load(tmp_path / "r.csv"), lb.load(tmp_path / "r.json")
    np.testing.assert_array_equal(table.radius, record.radius)
    direct = lb.certified_radius(form, lb.examples.digits().x, lb.examples.digits().y, bound=bound)
    np.testing.assert_allclose(table.radius, direct.radius, rtol=4e-9)
    np.testing.assert_array_equal(table.prediction, direct.prediction)
    for more, code, message in (
        (("--norm", "inf"), 1, "bounds the network in norm 2: leave out --norm inf"),
        (("--method", "liplt"), 2, "the bound is that of --certificate"),
        (("--no-pairwise",), 2, "the bound is that of --certificate"),
        (("--memory", "1GB"), 2, "for --memory: the bound is that of"),
        (("--csv", tmp_path / "c"), 2, "would overwrite the certificate"),
        (("--csv", tmp_path / "d"), 1, "holds no radii, and --csv would"),
    ):
        assert message in run(*words, *more, code=code).stderr


def test_a_certificate_of_a_weaker_guarantee_is_not_what_was_asked_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weaker = lb.UpperBound(2.0, 2, "probabilistic", "lipsdp", 0.0, failure_probability=1e-9)
    monkeypatch.setattr(lb, "load_certificate", lambda *given, **more: weaker)
    with pytest.raises(ValueError, match="c is probabilistic: leave out --guarantee verified"):
        bound_in(tmp_path / "c", FORM, None, "verified")
    assert bound_in(tmp_path / "c", FORM, None, "probabilistic") == (weaker, "2")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs devices")
def test_a_certificate_goes_to_a_device_that_is_full(model_file: Any) -> None:
    said = run("bounds", model_file, "--certificate", "/dev/full", code=1)
    assert "No space left on device: '/dev/full'" in said.stderr and "UpperBound" in said.stdout


# ------------------------------------------------------------------------------------------ docs/files.md
def test_files_are_documented(model_file: Any, tmp_path: pathlib.Path) -> None:
    run(
        "certify",
        model_file,
        "--method",
        "naive",
        "--no-pairwise",
        "--json",
        tmp_path / "r.json",
        "--csv",
        tmp_path / "r.csv",
    )
    assert set(documented("Radii as JSON")) == set(json.loads((tmp_path / "r.json").read_text()))
    with (tmp_path / "r.csv").open() as file:
        assert (
            set(documented("Radii as CSV")) == set(next(csv.reader(file))) == {*COLUMNS, "attacked_distance"}
        )
    run("bounds", model_file, "--method", "liplt", "--pairwise", "--json", tmp_path / "b.json")
    record = json.loads((tmp_path / "b.json").read_text())
    assert set(documented("Bounds as JSON")) == {*record, *record["upper"][0], *record["upper"][0]["pairs"]}
