"""`lb.load` opens every file that the program writes, and says what it can read where it cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import lipbounds as lb
from lipbounds._cli.main import app
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import save_model

SPEC = ModelSpec("mlp", (8, 8, 1), {"widths": "64-8-10"})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("files") / "mlp.safetensors", build(SPEC), SPEC)


def test_a_model(model: Path) -> None:
    x = np.random.default_rng(0).random((2, 8, 8, 1), np.float32)
    np.testing.assert_array_equal(lb.load(model)(x), build(SPEC)(jnp.asarray(x)))


def test_a_certificate(model: Path, tmp_path: Path) -> None:
    bound = lb.lipsdp(lb.from_weights([np.eye(3), np.ones((2, 3))]))
    lb.save_certificate(bound, tmp_path / "any name")
    found = lb.load(str(tmp_path / "any name"))
    assert found.value == bound.certificate.value and repr(found) == repr(bound.certificate)


@pytest.fixture(scope="module")
def radii(model: Path) -> tuple[Path, lb.Radii]:
    """The command's file, and what the library says."""
    rng = np.random.default_rng(1)
    x = rng.random((6, 8, 8, 1), np.float32)
    form = lb.trace(lb.load(model), jnp.zeros((8, 8, 1)))
    z = np.stack([np.asarray(form(image)) for image in x])
    y = z.argmax(1)
    y[0] = (y[0] + 1) % 10
    data, out = model.with_name("data.npz"), model.with_name("radii.json")
    np.savez(data, x=x, y=y)
    words = ["certify", model, "--data", data, "--method", "liplt", "--pairwise", "--json", out]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return out, lb.certified_radius(form, x, y, bound=lb.liplt(form, pairwise=True))


def test_radii(radii: tuple[Path, lb.Radii]) -> None:
    found, expected = lb.load(radii[0]), radii[1]
    assert isinstance(found, lb.Radii) and repr(found) == repr(expected)
    np.testing.assert_array_equal(found.radius, expected.radius)
    np.testing.assert_array_equal(found.correct, expected.correct)
    assert not found.correct[0] and found.correct[1:].all()


@pytest.mark.parametrize(
    "change, why",
    [
        ({"correct": None}, "do not fit together"),
        ({"correct": ["yes"] * 6}, "do not fit together"),
        ({"correct": [True]}, "do not fit together"),
        ({"correct": [True] * 6, "radius": [-1.0] * 6}, "do not fit together"),
        ({"correct": [False] * 6}, "do not fit together"),
        ({"radius": ["nan"] * 6}, "do not fit together"),
        ({"norm": "7"}, "no complete radii"),
        ({"guarantee": "certain"}, "no complete radii"),
        ({"format": "other"}, "not a file that lb.load reads"),
    ],
    ids=str,
)
def test_radii_that_were_changed(
    radii: tuple[Path, lb.Radii], tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    path = tmp_path / "radii.json"
    path.write_text(json.dumps(json.loads(radii[0].read_text()) | change))
    with pytest.raises(ValueError, match=why):
        lb.load(path)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"version": 2}, "radii of version 2; this library reads version 1"),
        ({"version": True}, "version True"),
        ({"version": None}, "version None"),
        (
            {"guarantee": "estimate"},
            "their guarantee is 'estimate', known are verified, probabilistic, assumed",
        ),
        ({"label": [0.5] * 6}, "a class must be a whole number >= 0, got 0.5"),
        ({"label": [-1] * 6}, "a class must be a whole number >= 0, got -1"),
        ({"prediction": [10**30] * 6}, "a class must be a whole number"),
        ({"label": [float("inf")] * 6}, "a class must be a whole number"),
        ({"radius": [10**400] * 6}, "no complete radii: OverflowError"),
        ({"norm": 10**400}, "no complete radii"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_radii_that_say_what_no_radii_say(
    radii: tuple[Path, lb.Radii], tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    path = tmp_path / "radii.json"
    path.write_text(json.dumps(json.loads(radii[0].read_text()) | change))
    with pytest.raises(ValueError, match=f"radii.json holds .*{why}"):
        lb.load(path)
    with pytest.raises(ValueError, match=r"radii.json exists and holds no radii"):
        lb.save_radii(radii[1], path)


def test_radii_without_a_version_are_refused(radii: tuple[Path, lb.Radii], tmp_path: Path) -> None:
    record = json.loads(radii[0].read_text())
    del record["version"]
    (tmp_path / "radii.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="version None; this library reads version 1"):
        lb.load(tmp_path / "radii.json")


@pytest.mark.parametrize(
    "old, new, why",
    [
        ("verified", '"' + "g" * 200_000 + '"', "a table that cannot be read: field larger than field limit"),
        ("verified", "estimate", "their guarantee is 'estimate'"),
        ("\n0,0,", "\n0,-5,", "a class must be a whole number >= 0, got '-5'"),
        ("\n0,0,", "\n0,0.5,", "a class must be a whole number >= 0, got '0.5'"),
        ("\n0,0,", "\n0,99999999999999999999,", "a class must be a whole number"),
        ("verified", "\udcff", "is not a text in UTF-8"),
    ],
    ids=["enormous field", "estimate", "negative", "fraction", "large", "no UTF-8"],
)
def test_tables_that_were_changed(tmp_path: Path, old: str, new: str, why: str) -> None:
    form = lb.from_weights([np.eye(2)])
    radii = lb.certified_radius(form, [[1.0, 0.5]], [0], bound=lb.naive(form))
    path = tmp_path / "radii.csv"
    lb.save_radii(radii, path)
    assert old in path.read_text()
    path.write_bytes(path.read_text().replace(old, new).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"radii.csv .*{why}"):
        lb.load(path)
    with pytest.raises(ValueError, match=r"radii.csv exists and holds no radii"):
        lb.save_radii(radii, path)


def test_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        lb.load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x80pickle", b"{", b"{}", b"\x02\0\0\0\0\0\0\0{}", b"[1]"], ids=str
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a file that lb.load reads: a model .*radii|cut off"):
        lb.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lb.load(tmp_path / "nothing")


@pytest.mark.parametrize("radius", [np.nan, -np.inf])
def test_numbers_that_are_no_radii_are_not_saved_as_infinite_ones(tmp_path: Path, radius: float) -> None:
    wrong = lb.Radii(np.array([radius]), np.array([True]), 2, "verified", "naive")
    with pytest.raises(ValueError, match="cannot be saved"):
        lb.save_radii(wrong, tmp_path / "radii.json")
