"""The reader of MNIST's IDX files: made-up small files, and the real ones where they are."""

import gzip
import struct

import numpy as np
import pytest

from lipbounds.training.data import mnist

NAMES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def arrays(rng):
    images = {"train_x": (5, 4, 3), "test_x": (2, 4, 3)}
    drawn = {key: rng.integers(0, 256, shape).astype(np.uint8) for key, shape in images.items()}
    drawn["train_x"][0, 0, :2] = 0, 255
    return drawn | {"train_y": np.uint8([0, 9, 3, 3, 1]), "test_y": np.uint8([7, 2])}


@pytest.fixture
def folder(arrays, tmp_path):
    for key, name in NAMES.items():
        (tmp_path / name).write_bytes(idx(arrays[key]))
    return tmp_path


def check(data, arrays):
    assert data.name == "mnist" and data.input_shape == (4, 3, 1)
    for key in ("train_x", "test_x"):
        found = getattr(data, key)
        assert found.dtype == np.float32 and found.shape == (*arrays[key].shape, 1)
        np.testing.assert_array_equal(np.rint(found[..., 0] * 255), arrays[key])
        assert found.min() >= 0 and found.max() <= 1
    assert data.train_x[0, 0, 0, 0] == 0 and data.train_x[0, 0, 1, 0] == 1
    for key in ("train_y", "test_y"):
        assert getattr(data, key).dtype == np.int32
        np.testing.assert_array_equal(getattr(data, key), arrays[key])


def test_plain_files(folder, arrays):
    check(mnist(folder), arrays)


def test_gz_files_in_a_subfolder_named_by_the_environment(folder, arrays, tmp_path, monkeypatch):
    place = tmp_path / "data" / "mnist"
    place.mkdir(parents=True)
    for name in NAMES.values():
        (place / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    monkeypatch.setenv("LIPBOUNDS_DATA", str(tmp_path / "data"))
    check(mnist(), arrays)


def test_an_argument_comes_before_the_environment(folder, arrays, monkeypatch):
    monkeypatch.setenv("LIPBOUNDS_DATA", str(folder / "nowhere"))
    check(mnist(folder), arrays)
    with pytest.raises(FileNotFoundError, match="nowhere, to which LIPBOUNDS_DATA is set, is not a folder"):
        mnist()


@pytest.mark.parametrize("value", [None, ""])
def test_no_folder_given(monkeypatch, value):
    monkeypatch.delenv("LIPBOUNDS_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("LIPBOUNDS_DATA", value)
    with pytest.raises(FileNotFoundError, match="data_dir, or set LIPBOUNDS_DATA"):
        mnist()


@pytest.mark.parametrize("key", sorted(NAMES))
def test_a_missing_file_is_named(folder, key):
    (folder / NAMES[key]).unlink()
    with pytest.raises(FileNotFoundError, match=NAMES[key]):
        mnist(folder)


def swap(old, new):
    return lambda data: data.replace(old, new, 1)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("train_x", lambda data: data[:-1], "is truncated.*5 x 4 x 3 bytes, 59 follow"),
        ("train_x", lambda data: data + b"\0", "too long.*61 follow"),
        ("test_y", lambda data: data[:7], "is truncated: its header ends after 7 of 8 bytes"),
        ("test_y", lambda data: b"", "not an IDX file"),
        ("test_x", swap(b"\0\0\x08\x03", b"\0\0\x0d\x03"), "starts with 00000d03, not 00000803"),
        ("train_y", swap(b"\0\0\x08\x01", b"\0\0\x08\x03"), "starts with 00000803, not 00000801"),
        ("train_x", swap(b"\0\0\0\x05", b"\xff\xff\xff\xff"), "is truncated.*4294967295 x 4 x 3"),
        ("train_y", lambda data: idx(np.uint8([1, 2, 3, 4])), "5 x 4 x 3 numbers and .* 4 labels"),
        ("train_y", lambda data: idx(np.uint8([1, 2, 3, 4, 10])), "labels must lie in 0..9, got 10"),
        ("test_x", lambda data: idx(np.zeros((2, 3, 4), np.uint8)), r"shape \(4, 3\), test images \(3, 4\)"),
        ("test_x", lambda data: idx(np.zeros((2, 0, 4), np.uint8)), "at least one"),
    ],
)
def test_a_wrong_file_is_one_plain_error(folder, key, change, message):
    path = folder / NAMES[key]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        mnist(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:30], lambda data: b"no gzip", lambda data: b""])
def test_a_damaged_gz_file_is_one_plain_error(folder, damage):
    path = folder / NAMES["train_y"]
    packed = folder / f"{path.name}.gz"
    packed.write_bytes(damage(gzip.compress(path.read_bytes())))
    path.unlink()
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz"):
        mnist(folder)


def test_the_real_files(official):
    data = official(mnist)
    assert data.train_x.shape == (60000, 28, 28, 1) and data.test_x.shape == (10000, 28, 28, 1)
    assert data.train_x.max() == 1 and data.classes == 10
    # counts of the digits 0 and 1 in the official training and test sets
    assert np.bincount(data.train_y)[:2].tolist() == [5923, 6742]
    assert np.bincount(data.test_y)[:2].tolist() == [980, 1135]
