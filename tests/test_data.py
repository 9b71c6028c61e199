"""The data sets: the record, digits, CIFAR-10/100 from small files in the official layouts, mixed files, load.

The format of MNIST's files is tested in test_mnist.py, Tiny-ImageNet's in test_image_folders.py.
"""

import gzip
import pathlib
import re
import struct
import tracemalloc

import numpy as np
import pytest

from lipbounds.training import data as data_module
from lipbounds.training.data import DATASETS, Dataset, cifar10, cifar100, digits, load, mnist, tiny_imagenet

CIFAR10_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
CIFAR10_NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def records(rng, count, *largest_labels):
    """CIFAR records as an array of bytes (count, labels + 3072)."""
    labels = [rng.integers(0, largest + 1, count) for largest in largest_labels]
    return np.column_stack([*labels, rng.integers(0, 256, (count, 3072))]).astype(np.uint8)


@pytest.fixture
def cifar10_parts(rng):
    return {name: records(rng, 7 if name.startswith("data") else 4, 9) for name in CIFAR10_FILES}


@pytest.fixture
def cifar10_folder(tmp_path, cifar10_parts):
    for name, part in cifar10_parts.items():
        (tmp_path / name).write_bytes(part.tobytes())
    (tmp_path / "batches.meta.txt").write_text("\n".join(CIFAR10_NAMES) + "\n\n")
    return tmp_path


@pytest.fixture
def cifar100_folder(tmp_path, rng):
    (tmp_path / "train.bin").write_bytes(records(rng, 9, 19, 99).tobytes())
    (tmp_path / "test.bin").write_bytes(records(rng, 5, 19, 99).tobytes())
    (tmp_path / "fine_label_names.txt").write_text("".join(f"class{i}\n" for i in range(100)))
    return tmp_path


# ---------------------------------------------------------------------------------------------- the record


def dataset(**changes):
    arguments = {
        "name": "made up",
        "train_pixels": np.arange(24, dtype=np.uint8).reshape(3, 2, 4, 1),
        "train_y": np.int32([0, 1, 0]),
        "test_pixels": np.full((1, 2, 4, 1), 23, np.uint8),
        "test_y": np.int32([2]),
    }
    return Dataset(**(arguments | changes))


def test_float_views_are_the_pixels_over_levels_made_once_and_read_only():
    data = dataset(levels=23)
    assert data.train_x.dtype == np.float32 and data.train_x is data.train_x
    np.testing.assert_array_equal(data.train_x, data.train_pixels.astype(np.float32) / np.float32(23))
    assert data.test_x.max() == 1 and dataset().test_x.max() == np.float32(23) / np.float32(255)
    with pytest.raises(ValueError, match="read-only"):
        data.train_x[0] = 0
    assert data.input_shape == (2, 4, 1) and data != dataset(levels=23)


def test_classes_are_those_named_or_those_seen():
    assert dataset().classes == 3
    assert dataset(class_names=("a", "b", "c", "d")).classes == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 22}, "training pixels reach 23, levels is 22"),
        ({"levels": 0}, r"levels must lie in 1\.\.255, got 0"),
        ({"levels": 256}, r"levels must lie in 1\.\.255"),
        ({"test_pixels": np.zeros((1, 2, 4, 1), np.float32)}, "test images must be uint8 .*float32"),
        ({"test_pixels": np.zeros((1, 2, 4), np.uint8)}, r"test images must be .*uint8 \(1, 2, 4\)"),
        ({"test_pixels": np.zeros((0, 2, 4, 1), np.uint8)}, "at least one"),
        ({"test_pixels": np.zeros((1, 4, 2, 1), np.uint8)}, r"\(2, 4, 1\), test images \(4, 2, 1\)"),
        ({"train_y": np.int64([0, 1, 0])}, r"training labels must be int32 \(3,\), got int64"),
        ({"train_y": np.int32([0, 1])}, r"training labels must be int32 \(3,\), got int32 \(2,\)"),
        ({"train_y": np.int32([0, -1, 0])}, r"training labels must lie in 0\.\.2, got -1\.\.0"),
        ({"class_names": ("a", "b")}, r"test labels must lie in 0\.\.1, got 2\.\.2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


def test_digits_are_split_as_ever():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = digits()
    assert data.levels == 16 and data.classes == 10 and data.train_pixels.max() == 16
    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[..., None]
    split = train_test_split(x, bunch.target, test_size=0.2, stratify=bunch.target, random_state=0)
    for found, wanted in zip((data.train_x, data.test_x, data.train_y, data.test_y), split, strict=True):
        np.testing.assert_array_equal(found, wanted)


# ------------------------------------------------------------------------------------------------- by name


def test_load_by_name(cifar10_folder, monkeypatch):
    assert set(DATASETS) == {"digits", "mnist", "cifar10", "cifar100", "tiny-imagenet"}
    assert load("digits").name == "digits"
    monkeypatch.setenv("LIPBOUNDS_DATA", str(cifar10_folder))
    np.testing.assert_array_equal(load("cifar10").test_pixels, cifar10(cifar10_folder).test_pixels)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("mnist", "mnist"),
        ("cifar10", "cifar10"),
        ("cifar100", "cifar100"),
        ("tiny-imagenet", "tiny_imagenet"),
    ],
)
def test_each_name_goes_to_its_reader(name, reader, monkeypatch):
    monkeypatch.setattr(data_module, reader, lambda *arguments, **keywords: (reader, *arguments))
    assert load(name, "somewhere") == (reader, "somewhere")


@pytest.mark.parametrize("name", ["CIFAR10", "", "imagenet"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(
        ValueError, match=r"unknown data set '.*known: digits, mnist, cifar10, cifar100, tiny-image"
    ):
        load(name)


@pytest.mark.parametrize(
    ("name", "page", "file"),
    [
        ("mnist", "http://yann.lecun.com/exdb/mnist", "train-images-idx3-ubyte"),
        ("cifar10", CIFAR_PAGE, "data_batch_1.bin"),
        ("cifar100", CIFAR_PAGE, "train.bin"),
        ("tiny-imagenet", "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "wnids.txt"),
    ],
)
def test_missing_data_says_what_is_wanted_and_where_it_comes_from(name, page, file, tmp_path, monkeypatch):
    monkeypatch.delenv("LIPBOUNDS_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="data_dir, or set LIPBOUNDS_DATA") as no_variable:
        load(name)
    monkeypatch.setenv("LIPBOUNDS_DATA", "~/nowhere")
    there = re.escape(str(pathlib.Path.home() / "nowhere"))
    with pytest.raises(FileNotFoundError, match=f"{there}, to which LIPBOUNDS_DATA is set, is not a folder"):
        load(name)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder") as no_folder:
        load(name, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no files of") as no_files:
        load(name, tmp_path)
    for caught in (no_variable, no_folder, no_files):
        assert page in str(caught.value) and file in str(caught.value)
        assert "nothing is downloaded" in str(caught.value)


# --------------------------------------------------------------------------------------------------- CIFAR


@pytest.mark.parametrize("below", ["", "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"])
def test_cifar10(cifar10_folder, cifar10_parts, below, tmp_path):
    place = tmp_path / "root" / below
    place.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "elsewhere").mkdir()
    for path in [path for path in cifar10_folder.iterdir() if path.is_file()]:
        path.rename(tmp_path / "elsewhere" / path.name)
    (tmp_path / "elsewhere").rename(place)
    data = cifar10(tmp_path / "root")
    assert data.name == "cifar10" and data.class_names == tuple(CIFAR10_NAMES)
    assert data.train_pixels.shape == (35, 32, 32, 3) and data.test_pixels.shape == (4, 32, 32, 3)
    assert data.train_pixels.flags.c_contiguous and data.levels == 255
    train = np.concatenate([cifar10_parts[name] for name in CIFAR10_FILES[:5]])
    for pixels, labels, raw in (
        (data.train_pixels, data.train_y, train),
        (data.test_pixels, data.test_y, cifar10_parts["test_batch.bin"]),
    ):
        np.testing.assert_array_equal(labels, raw[:, 0])
        for channel in range(3):  # planes of 1024 bytes, row by row
            plane = raw[:, 1 + 1024 * channel : 1 + 1024 * (channel + 1)]
            np.testing.assert_array_equal(pixels[..., channel].reshape(len(raw), 1024), plane)


def test_cifar100_has_the_fine_labels(cifar100_folder):
    raw = np.frombuffer((cifar100_folder / "train.bin").read_bytes(), np.uint8).reshape(-1, 3074)
    data = cifar100(cifar100_folder)
    assert data.classes == 100 and data.class_names[42] == "class42" and len(data.test_y) == 5
    np.testing.assert_array_equal(data.train_y, raw[:, 1])
    assert (raw[:, 0] != raw[:, 1]).any()
    np.testing.assert_array_equal(data.train_pixels[:, 0, :5, 0], raw[:, 2:7])
    np.testing.assert_array_equal(data.train_pixels[:, 31, 31, 2], raw[:, -1])


def test_classes_without_a_names_file_have_their_numbers(cifar10_folder, cifar100_folder):
    (cifar10_folder / "batches.meta.txt").unlink()
    (cifar100_folder / "fine_label_names.txt").unlink()
    assert cifar10(cifar10_folder).class_names == tuple("0123456789")
    assert cifar100(cifar100_folder).class_names[-1] == "99" and cifar100(cifar100_folder).classes == 100


def test_a_complete_place_comes_before_a_partial_one(cifar10_folder):
    below = cifar10_folder / "cifar10"
    below.mkdir()
    for name in CIFAR10_FILES:
        (below / name).write_bytes((cifar10_folder / name).read_bytes())
    (cifar10_folder / "data_batch_4.bin").unlink()
    assert len(cifar10(cifar10_folder).train_y) == 35


@pytest.mark.parametrize("name", CIFAR10_FILES)
def test_a_missing_cifar_file_is_named(cifar10_folder, name):
    (cifar10_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"^no {name} in .*Needed: .*{CIFAR_PAGE}"):
        cifar10(cifar10_folder)


def assert_refused(reader, path, change, message):
    """The reader of a folder refuses the changed file by its name."""
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        reader(path.parent)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "data_batch_2.bin",
            lambda raw: raw[:-1],
            "truncated .*6 records of 3073 bytes and 3072 further bytes",
        ),
        (
            "test_batch.bin",
            lambda raw: raw + b"\0",
            "too long: 4 records of 3073 bytes and 1 further bytes",
        ),
        ("data_batch_3.bin", lambda raw: b"", "holds no records"),
        (
            "data_batch_1.bin",
            lambda raw: raw[: 3073 * 3] + b"\x0a" + raw[3073 * 3 + 1 :],
            "record 3 .* label 10",
        ),
        ("data_batch_5.bin", lambda raw: b"\1" * 3074 * 6, "records of 3074 bytes, those of CIFAR-100"),
    ],
)
def test_a_wrong_cifar10_file_is_one_plain_error(cifar10_folder, name, change, message):
    assert_refused(cifar10, cifar10_folder / name, change, message)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train.bin", lambda raw: raw[:-100], "8 records of 3074 bytes and 2974 further bytes"),
        ("train.bin", lambda raw: b"\x14" + raw[1:], "record 0 has the coarse label 20"),
        ("test.bin", lambda raw: raw[:1] + b"\x64" + raw[2:], "record 0 has the fine label 100"),
        ("test.bin", lambda raw: b"\1" * 3073 * 6, "records of 3073 bytes, those of CIFAR-10, not"),
        ("fine_label_names.txt", lambda raw: b"apple\nbear\n", "names 2 classes, not 100"),
        ("fine_label_names.txt", lambda raw: b"\xff\xfe", "is not a text file"),
    ],
)
def test_a_wrong_cifar100_file_is_one_plain_error(cifar100_folder, name, change, message):
    assert_refused(cifar100, cifar100_folder / name, change, message)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("data_batch_1.bin", 10_001, "holds 10001 records, the official file has 10000$"),
        ("test_batch.bin", 50_000, r"50000 records, .* has 10000 \(it looks like the training file\)"),
    ],
)
def test_more_records_than_the_official_file_has(cifar10_folder, name, count, message):
    with (cifar10_folder / name).open("wb") as file:
        file.truncate(3073 * count)
    with pytest.raises(ValueError, match=message):
        cifar10(cifar10_folder)


@pytest.mark.parametrize(("copy", "of"), [(1, 0), (4, 2), (5, 0), (0, 5)])
def test_a_copied_cifar10_file_is_refused(cifar10_folder, copy, of):
    copied, original = CIFAR10_FILES[copy], CIFAR10_FILES[of]
    (cifar10_folder / copied).write_bytes((cifar10_folder / original).read_bytes())
    with pytest.raises(ValueError, match="hold the same images") as caught:
        cifar10(cifar10_folder)
    assert copied in str(caught.value) and original in str(caught.value)


def test_the_cifar100_training_file_in_place_of_the_test_file(cifar100_folder):
    with (cifar100_folder / "test.bin").open("wb") as file:
        file.truncate(3074 * 50_000)
    with pytest.raises(
        ValueError, match=r"test\.bin holds 50000 records, .* \(it looks like the training file\)"
    ):
        cifar100(cifar100_folder)
    (cifar100_folder / "test.bin").write_bytes((cifar100_folder / "train.bin").read_bytes())
    with pytest.raises(ValueError, match=r"test\.bin and .*train\.bin hold the same images"):
        cifar100(cifar100_folder)


@pytest.mark.parametrize(
    ("reader", "found", "advice"),
    [
        (cifar10, "data_batch_1", "download the binary version"),
        (cifar10, "cifar-10-batches-py/data_batch_1", "download the binary version"),
        (cifar10, "cifar-10-python.tar.gz", "download the binary version"),
        (cifar10, "cifar-10-binary.tar.gz", "unpack it first"),
        (cifar100, "cifar-100-python/train", "download the binary version"),
        (cifar100, "cifar100/cifar-100-binary.tar.gz", "unpack it first"),
        (tiny_imagenet, "tiny-imagenet-200.zip", "unpack it first"),
    ],
)
def test_another_version_is_recognised(reader, found, advice, tmp_path):
    (tmp_path / found).parent.mkdir(exist_ok=True)
    (tmp_path / found).write_bytes(b"something")
    with pytest.raises(FileNotFoundError, match=advice) as caught:
        reader(tmp_path)
    assert str(tmp_path / found) in str(caught.value)


# ------------------------------------------------------------------------------------------ MNIST, mixed up


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist_folder(tmp_path, rng):
    for part, count in (("train", 5), ("t10k", 2)):
        images = rng.integers(0, 256, (count, 4, 4)).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    return tmp_path


def test_mnist_labels_in_place_of_images(mnist_folder):
    labels = (mnist_folder / "train-labels-idx1-ubyte").read_bytes()
    (mnist_folder / "train-images-idx3-ubyte").write_bytes(labels)
    with pytest.raises(ValueError, match=r"train-images.*it holds labels, and images are needed"):
        mnist(mnist_folder)


def test_mnist_files_are_gzipped_or_plain_whatever_their_names_say(mnist_folder):
    plain = mnist(mnist_folder)
    for part in ("train", "t10k"):  # gzip without .gz, and .gz without gzip
        file = mnist_folder / f"{part}-images-idx3-ubyte"
        file.write_bytes(gzip.compress(file.read_bytes()))
        labels = mnist_folder / f"{part}-labels-idx1-ubyte"
        labels.rename(labels.with_name(f"{labels.name}.gz"))
    read = mnist(mnist_folder)
    assert (read.train_pixels == plain.train_pixels).all() and (read.test_y == plain.test_y).all()


def test_mnist_training_files_in_place_of_the_test_files(mnist_folder):
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        content = (mnist_folder / f"train-{kind}").read_bytes()
        (mnist_folder / f"t10k-{kind}").unlink()
        (mnist_folder / f"t10k-{kind}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"t10k-images.*\.gz and .*train-images.* hold the same images"):
        mnist(mnist_folder)
    (mnist_folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((60_000, 1, 1), np.uint8)))
    with pytest.raises(ValueError, match="holds 60000 records.* 10000 .*looks like the training file"):
        mnist(mnist_folder)


# -------------------------------------------------------------------------------------------- the real files


@pytest.mark.slow
def test_the_real_cifar10(official):
    data = official(cifar10)
    assert data.train_pixels.shape == (50_000, 32, 32, 3) and data.test_pixels.shape == (10_000, 32, 32, 3)
    assert data.class_names == tuple(CIFAR10_NAMES)
    assert (np.bincount(data.train_y) == 5000).all() and (np.bincount(data.test_y) == 1000).all()
    # the channel means that everyone normalises with
    mean = data.train_pixels.mean((0, 1, 2), dtype=np.float64) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=1e-3)


@pytest.mark.slow
def test_the_real_cifar100(official):
    data = official(cifar100)
    assert data.train_pixels.shape == (50_000, 32, 32, 3) and data.test_pixels.shape == (10_000, 32, 32, 3)
    assert (np.bincount(data.train_y) == 500).all() and (np.bincount(data.test_y) == 100).all()


# --- promises that a file does not keep ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_that_unpacks_to_more_than_its_header_says_is_not_unpacked(mnist_folder, name):
    plain, packed = mnist_folder / name, mnist_folder / f"{name}.gz"
    content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    plain.unlink(missing_ok=True)
    packed.write_bytes(gzip.compress(content + bytes(10**8)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"{name}\.gz is too long: .*, more follow"):
            load("mnist", mnist_folder)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(60_000, 256, 256), (2, 2**31, 2**31), (2**32 - 1, 28, 28)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_header_that_promises_more_than_the_file_holds(mnist_folder, shape, packed):
    for file in mnist_folder.glob("train-images*"):
        file.unlink()
    content = bytes((0, 0, 8, 3)) + np.array(shape, ">u4").tobytes() + bytes(100)
    file = mnist_folder / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is truncated|no image of MNIST|the official file has"):
            load("mnist", mnist_folder)
        assert tracemalloc.get_traced_memory()[1] < 10**7
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tries", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_content_of_an_mnist_file_is_read_or_a_value_error(mnist_folder, tries, rng):
    plain = mnist_folder / "t10k-images-idx3-ubyte"
    (mnist_folder / f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    files = sorted(mnist_folder.iterdir())
    refused = 0
    for _ in range(tries):
        file = files[rng.integers(len(files))]
        raw = file.read_bytes()
        content = bytearray(raw)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(min(len(content), 40))] = rng.integers(256)
        file.write_bytes(raw[: rng.integers(len(raw))] if rng.random() < 0.3 else content)
        try:
            load("mnist", mnist_folder)
        except ValueError:
            refused += 1
        file.write_bytes(raw)
    assert refused > tries / 5
