"""lipbounds.interop.load_weights: matrices from .npz, .mat and .safetensors, and everything that is refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.io import savemat
from typer.testing import CliRunner

import lipbounds as lb
from lipbounds._cli.main import app
from lipbounds._text import files
from lipbounds.interop import load_weights

SIZES = (5, 4, 7, 3)


def _layers(sizes: tuple[int, ...] = SIZES) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((b, a)).astype(np.float32) for a, b in itertools.pairwise(sizes)]
    return weights, [rng.standard_normal(b).astype(np.float32) for b in sizes[1:]]


def _named(
    weight: str, bias: str, sizes: tuple[int, ...] = SIZES, start: int = 0, step: int = 1
) -> dict[str, Any]:
    weights, biases = _layers(sizes)
    names = range(start, start + step * len(weights), step)
    found = {weight.format(i): w for i, w in zip(names, weights, strict=True)}
    return found | {bias.format(i): b for i, b in zip(names, biases, strict=True)}


def _save(path: Path, tensors: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    elif path.suffix == ".mat":
        savemat(path, tensors)
    else:
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path)
    return path


def _same(
    found: tuple[list[np.ndarray], list[np.ndarray] | None], weights: list[Any], biases: list[Any]
) -> None:
    assert found[1] is not None and len(found[0]) == len(weights) and len(found[1]) == len(biases)
    for a, b in zip((*found[0], *found[1]), (*weights, *biases), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("end", [".npz", ".mat", ".safetensors"])
@pytest.mark.parametrize(
    ("weight", "bias"),
    [("W{}", "b{}"), ("weights_{}", "biases_{}"), ("layers_{}_weight", "layers_{}_bias"), ("w{}", "b{}")],
)
def test_names(end: str, weight: str, bias: str, tmp_path: Path) -> None:
    weights, biases = _layers()
    found = load_weights(_save(tmp_path / f"mlp{end}", _named(weight, bias)))
    _same(found, weights, biases)
    form = lb.from_weights(*found)
    x = np.ones(5, np.float32)
    y = np.maximum(weights[1] @ np.maximum(weights[0] @ x + biases[0], 0) + biases[1], 0)
    np.testing.assert_allclose(form(x), weights[2] @ y + biases[2], rtol=1e-4)


def test_pytorch_names_and_numbers_above_nine(tmp_path: Path) -> None:
    sizes = (3,) * 14  # square matrices: only the numbers tell the order
    weights, biases = _layers(sizes)
    path = _save(tmp_path / "mlp.safetensors", _named("net.{}.weight", "net.{}.bias", sizes, step=2))
    _same(load_weights(path), weights, biases)


def test_flax_names_are_transposed_only_when_asked(tmp_path: Path) -> None:
    weights, biases = _layers()
    tensors = {f"Dense_{i}/kernel": w.T for i, w in enumerate(weights)}
    tensors |= {f"Dense_{i}/bias": b for i, b in enumerate(biases)}
    path = _save(tmp_path / "mlp.npz", tensors)
    _same(load_weights(path, transposed=True), weights, biases)
    with pytest.raises(ValueError, match=r"the matrices are \(in, out\): pass transposed=True"):
        load_weights(path)
    with pytest.raises(ValueError, match=r"the matrices are \(out, in\): leave transposed out"):
        load_weights(_save(tmp_path / "right.npz", _named("W{}", "b{}")), transposed=True)
    one = _save(tmp_path / "one.npz", {"W": weights[0].T, "b": biases[0]})
    with pytest.raises(
        ValueError, match=r"has shape \(4,\), the weight gives 5 outputs; for matrices \(in, out\)"
    ):
        load_weights(one)
    assert load_weights(one, transposed=True)[0][0].shape == (4, 5)


def test_matlab_cells_and_column_vectors(tmp_path: Path) -> None:
    weights, biases = _layers()
    cells: dict[str, Any] = {"weights": np.empty(3, object), "biases": np.empty(3, object)}
    for i in range(3):
        cells["weights"][i], cells["biases"][i] = weights[i].astype(float), biases[i].astype(float)[:, None]
    _same(load_weights(_save(tmp_path / "cells.mat", cells)), weights, biases)
    raw = bytearray(_save(tmp_path / "bytes.mat", {"W": np.array([[1, 2]], np.uint8)}).read_bytes())
    raw[128 + 16] = 6  # the class of the array: double, as MATLAB stores matrices of small whole numbers
    (tmp_path / "bytes.mat").write_bytes(raw)
    (matrix,), _ = load_weights(tmp_path / "bytes.mat")
    assert matrix.dtype == np.float64 and matrix.tolist() == [[1.0, 2.0]]
    whole = {"W1": np.array([[1.0, 2.0]]), "b1": np.array([[3.0]]), "W2": np.array([[4.0], [5.0]])}
    found, offsets = load_weights(_save(tmp_path / "whole.mat", whole))
    assert found[0].dtype == np.float64 and offsets is not None
    np.testing.assert_array_equal(offsets[0], [3.0])
    np.testing.assert_array_equal(offsets[1], [0.0, 0.0])


def test_biases_may_be_missing(tmp_path: Path) -> None:
    tensors = _named("W{}", "b{}")
    del tensors["b1"]
    _, biases = load_weights(_save(tmp_path / "some.npz", tensors))
    assert biases is not None
    np.testing.assert_array_equal(biases[1], np.zeros(7))
    assert load_weights(_save(tmp_path / "none.npz", {"W0": tensors["W0"]}))[1] is None


def test_order(tmp_path: Path) -> None:
    weights, biases = _layers()
    names = ["trunk.fc", "neck", "head"]
    tensors = {f"{n}.weight": w for n, w in zip(names, weights, strict=True)}
    tensors |= {f"{n}.bias": b for n, b in zip(names, biases, strict=True)}
    path = _save(tmp_path / "mlp.safetensors", tensors)
    with pytest.raises(
        ValueError, match=r"the names do not order the layers: pass order=, the names head\.weight, neck"
    ):
        load_weights(path)
    _same(load_weights(path, order=[f"{n}.weight" for n in names]), weights, biases)
    with pytest.raises(ValueError, match="order must name every weight once"):
        load_weights(path, order=["neck.weight"])


def _with(**changes: Any) -> dict[str, Any]:
    return _named("W{}", "b{}") | changes


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_with(mean=np.ones(5)), "'mean' is neither a weight nor a bias by its name"),
        (_with(W0=np.ones((4, 3, 2))), r"'W0' has shape \(4, 3, 2\), not that of a matrix: only multilayer"),
        (_with(b0=np.ones((4, 1))), r"'b0' has shape \(4, 1\), not that of a vector"),
        (_with(W0=np.ones((4, 5), np.int32)), "'W0' holds int32, not floating point numbers"),
        (_with(W0=np.full((4, 5), np.nan)), "'W0' holds NaN or infinity"),
        (_with(W0=np.ones((0, 5))), r"'W0' of shape \(0, 5\) is empty"),
        (_with(W0=np.ones((6, 5)), b0=np.ones(6)), "'W1' has 4 inputs, but 'W0' has 6 outputs$"),
        (_with(b1=np.ones(8)), r"the bias of 'W1' has shape \(8,\), the weight gives 7 outputs"),
        (_with(b7=np.ones(8)), "'b7' is the bias of no weight"),
        (_with(w0=np.ones((4, 5))) | {"W_0": np.ones((4, 5))}, "name the same weight"),
        ({"b0": np.ones(3)}, "holds no weights"),
        ({}, "holds no weights"),
    ],
)
def test_refused(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_weights(_save(tmp_path / "mlp.npz", tensors))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    np.savez(tmp_path / "mlp.npz", W0=np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds pickled objects, which are not read"):
        load_weights(tmp_path / "mlp.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("end", [".npz", ".mat", ".safetensors"])
def test_damaged_files(end: str, tmp_path: Path) -> None:
    path = _save(tmp_path / f"mlp{end}", _named("W{}", "b{}"))
    raw = path.read_bytes()
    for content in (b"", b"junk" * 50, raw[: len(raw) // 2], raw[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"mlp\{end}: not an? (complete )?\{end} file, or cut off"):
            load_weights(path)
    with pytest.raises(FileNotFoundError, match="absent.* is not a file"):
        load_weights(tmp_path / f"absent{end}")
    (tmp_path / "mlp.pt").write_bytes(raw)
    with pytest.raises(
        ValueError, match=r"the ending must be one of \.npz, \.mat, \.safetensors, got '\.pt'"
    ):
        load_weights(tmp_path / "mlp.pt")


# --- promises that a file does not keep ----------------------------------------------------------------------------


def _header(shape: str, descr: str = "<f8") -> bytes:
    """The first bytes of an .npy file."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


@pytest.mark.parametrize("shape", ["(10000000, 1000000)", "(2, 3)", "(-2, -3)", f"({2**62}, 4)"])
@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_larger_than_its_file_is_refused_before_it_is_allocated(
    shape: str, packed: int, tmp_path: Path
) -> None:
    path = tmp_path / "mlp.npz"
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("W0.npy", _header(shape) + bytes(40))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"mlp\.npz: .* declares shape .*, but the file holds 40"):
            load_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


def test_an_archive_that_lies_about_its_own_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mlp.npz"
    shape = "(10000000, 1000000)"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W0.npy", _header(shape))
        (info,) = archive.infolist()
        info.file_size = len(_header(shape)) + 8 * 10**13  # in the central directory, which is what is read
    with pytest.raises(ValueError, match="declares shape .* 80000000000000 bytes, but the file holds"):
        load_weights(path)


def _tensor(kind: str, size: int) -> bytes:
    header = json.dumps({"W0": {"dtype": kind, "shape": [2, 2], "data_offsets": [0, 4 * size]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * size)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_float8_is_one_plain_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mlp.safetensors"
    path.write_bytes(_tensor(kind, 1))
    with pytest.raises(ValueError, match=f"'W0' is of type {kind}, which NumPy does not have"):
        load_weights(path)
    path.write_bytes(_tensor("BF16", 2))
    assert load_weights(path)[0][0].dtype.name == "bfloat16"


def _changed(raw: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, or with some bytes replaced."""
    content = bytearray(raw)
    if rng.random() < 0.3:
        return raw[: rng.integers(len(raw))]
    for _ in range(rng.integers(1, 5)):
        content[rng.integers(len(content))] = rng.integers(256)
    return bytes(content)


@pytest.mark.parametrize("tries", [150, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("end", [".npz", ".mat", ".safetensors"])
def test_any_content_is_read_or_a_value_error(end: str, tries: int, tmp_path: Path) -> None:
    path = _save(tmp_path / f"mlp{end}", _named("W{}", "b{}", (2, 3, 2)))
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(tries):
        path.write_bytes(_changed(raw, rng))
        try:
            load_weights(path)
        except ValueError:
            refused += 1
    assert refused > tries / 5


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    from lipbounds.training.models import ModelSpec, build
    from lipbounds.training.store import save_model

    spec = ModelSpec("mlp", (2, 2, 1), {"widths": "4-3-2"})
    model, bad = tmp_path / "m.safetensors", tmp_path / "f8.safetensors"
    save_model(model, build(spec), spec)
    bad.write_bytes(_tensor("F8_E4M3", 1))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", _header("(10000000, 1000000)") + bytes(40))
    for words, why in (
        (("bounds", bad), "of type F8_E4M3, which NumPy does not have"),
        (("certify", model, "--data", tmp_path / "d.npz"), "declares shape (10000000, 1000000)"),
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 1 and why in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("tries", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_content_of_a_model_file_is_read_or_a_value_error(tries: int, tmp_path: Path) -> None:
    from lipbounds.training.models import ModelSpec, build
    from lipbounds.training.store import load_model, save_model

    spec = ModelSpec("mlp", (2, 2, 1), {"widths": "4-3-2"})
    path = tmp_path / "m.safetensors"
    save_model(path, build(spec), spec)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    for old, new in (
        ("4-3-2", "4-3-x"),
        ('\\"4-3-2\\"', "[4,3,2]"),
        ('\\"4-3-2\\"', "null   "),
        ("[2, 2, 1]", "[2, 2, {}"),
    ):
        assert old.encode() in raw, raw
        path.write_bytes(raw.replace(old.encode(), new.encode().ljust(len(old))))
        with pytest.raises(ValueError, match=r"m\.safetensors"):
            load_model(path)
    for _ in range(tries):
        content = bytearray(_changed(raw, rng))
        if len(content) == len(raw) and rng.random() < 0.8:  # mostly in the header
            content[rng.integers(8, 400)] = rng.integers(32, 127)
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            load_model(path)


def test_arrays_that_exceed_the_free_memory(tmp_path, monkeypatch):
    """A small file may really hold what does not fit: it is not unpacked."""
    path = tmp_path / "zeros.npz"
    np.savez_compressed(path, W0=np.zeros((2000, 500)), W1=np.zeros((3, 2000)))
    assert path.stat().st_size < 30_000
    assert [w.shape for w in load_weights(path)[0]] == [(2000, 500), (3, 2000)]
    monkeypatch.setattr(files, "available_memory", lambda: 2.0**-7)
    monkeypatch.setattr(np, "frombuffer", None)
    with pytest.raises(ValueError, match=r"zeros\.npz: its arrays need 0.0149 GiB, but only 0.00781 GiB"):
        load_weights(path)
