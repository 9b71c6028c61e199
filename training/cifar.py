"""CIFAR-10 and CIFAR-100 from their official binary files (Krizhevsky, 2009)."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from lipbounds.training.dataset import (
    ByteArray,
    Dataset,
    IntArray,
    Source,
    check_count,
    read_lines,
    refuse_copies,
)

_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
_PIXELS = 3 * 32 * 32
_PYTHON = "this is the Python version; download the binary version"
_PACKED = "unpack it first (tar -xzf)"

_CIFAR10 = Source(
    title="CIFAR-10 (binary version)",
    page=_PAGE,
    places=("", "cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"),
    files=(*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"),
    mistakes={
        "data_batch_1": _PYTHON,
        "cifar-10-batches-py/data_batch_1": _PYTHON,
        "cifar-10-python.tar.gz": _PYTHON,
        "cifar-10-binary.tar.gz": _PACKED,
    },
)
_CIFAR100 = Source(
    title="CIFAR-100 (binary version)",
    page=_PAGE,
    places=("", "cifar100", "cifar-100-binary", "cifar100/cifar-100-binary"),
    files=("train.bin", "test.bin"),
    mistakes={
        "train": _PYTHON,
        "cifar-100-python/train": _PYTHON,
        "cifar-100-python.tar.gz": _PYTHON,
        "cifar-100-binary.tar.gz": _PACKED,
    },
)


def cifar10(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """CIFAR-10 from `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`; pixels 0..255.

    data_dir   the folder with the files, or one with them in `cifar10/` or `cifar-10-batches-bin/`; None: the
               environment's LIPBOUNDS_DATA

    A record is a label byte and the red, green and blue planes, row by row. `batches.meta.txt` names the
    classes; without it they are called by their numbers. Files with fewer records than the official 10 000 are
    read as they are. FileNotFoundError if the folder or a file is missing; ValueError, which names the file,
    for one that is cut off, too long, from another data set, or a copy of another one.
    """
    place = _CIFAR10.find(data_dir)
    paths = [_CIFAR10.path(place, name) for name in _CIFAR10.files]
    parts = [_read(path, labels=(9,), most=10_000, in_training=50_000) for path in paths]
    refuse_copies([(path, pixels) for path, (pixels, _) in zip(paths, parts, strict=True)])
    *train, (test_pixels, test_y) = parts
    return Dataset(
        "cifar10",
        np.concatenate([pixels for pixels, _ in train]),
        np.concatenate([labels for _, labels in train]),
        test_pixels,
        test_y,
        class_names=_names(place / "batches.meta.txt", 10),
    )


def cifar100(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """CIFAR-100 with its 100 fine labels, from `train.bin` and `test.bin`; pixels 0..255.

    data_dir   the folder with the files, or one with them in `cifar100/` or `cifar-100-binary/`; None: the
               environment's LIPBOUNDS_DATA

    A record is a coarse label, a fine label and the pixels as in `cifar10`; `fine_label_names.txt` names the
    classes. Fewer records than the official 50 000 and 10 000 are read as they are. Errors as in `cifar10`.
    """
    place = _CIFAR100.find(data_dir)
    train_path, test_path = (_CIFAR100.path(place, name) for name in _CIFAR100.files)
    train_pixels, train_y = _read(train_path, labels=(19, 99), most=50_000, in_training=50_000)
    test_pixels, test_y = _read(test_path, labels=(19, 99), most=10_000, in_training=50_000)
    refuse_copies([(train_path, train_pixels), (test_path, test_pixels)])
    names = _names(place / "fine_label_names.txt", 100)
    return Dataset("cifar100", train_pixels, train_y, test_pixels, test_y, class_names=names)


def _read(
    path: pathlib.Path, *, labels: tuple[int, ...], most: int, in_training: int
) -> tuple[ByteArray, IntArray]:
    """Pixels (n, 32, 32, 3) and the last label byte (n,) of a file; `labels` are the largest ones allowed."""
    size, record = path.stat().st_size, len(labels) + _PIXELS
    count, rest = divmod(size, record)
    if rest:
        other, name = (_PIXELS + 2, "CIFAR-100") if len(labels) == 1 else (_PIXELS + 1, "CIFAR-10")
        if size % other == 0:
            raise ValueError(f"{path} holds records of {other} bytes, those of {name}, not of {record} bytes")
        raise ValueError(
            f"{path} is truncated or too long: {count} records of {record} bytes and {rest} further bytes"
        )
    check_count(path, count, most, in_training)
    records = np.fromfile(path, np.uint8).reshape(-1, record)
    for column, largest in enumerate(labels):
        wrong = np.flatnonzero(records[:, column] > largest)
        if len(wrong):
            what = ("coarse label", "fine label")[column] if len(labels) == 2 else "label"
            raise ValueError(
                f"{path}: record {wrong[0]} has the {what} {records[wrong[0], column]}, not one of 0..{largest}: "
                "a damaged file, or another kind of file"
            )
    planes = records[:, len(labels) :].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, len(labels) - 1].astype(np.int32)


def _names(path: pathlib.Path, classes: int) -> tuple[str, ...]:
    """The class names, one a line; the numbers if there is no such file."""
    if not path.is_file():
        return tuple(map(str, range(classes)))
    names = tuple(read_lines(path))
    if len(names) != classes:
        raise ValueError(f"{path} names {len(names)} classes, not {classes}")
    return names
