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
