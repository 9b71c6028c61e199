"""A user's own images as a data set: an .npz file, or a folder with one folder of images per class."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from lipbounds._text import read_npz
from lipbounds.training.dataset import ByteArray, Dataset, IntArray
from lipbounds.training.image_folders import class_folders

_TEST = 5  # every fifth image of a class is a test image where no split is given
_PAIRS = (("x", "y"), ("images", "labels"), ("train_images", "train_labels"), ("x_train", "y_train"))
_SPLITS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_x", "train_y", "test_x", "test_y"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)


def is_own(name: str) -> bool:
    """Whether a data set's name is a path: an .npz file, or a folder, whose path has a slash."""
    return name.lower().endswith(".npz") or "/" in name or os.sep in name


def own(path: str | os.PathLike[str]) -> Dataset:
    """The images of a file or folder, as a data set of that name.

    An .npz file holds x_train, y_train, x_test and y_test, or x and y (or any two arrays), of which every fifth image
    of a class becomes a test image; images are bytes (n, height, width) or (n, height, width, channels), or floats that
    are bytes divided by 255. A folder holds one folder of images per class, or two such folders, `train` and `test`.

    FileNotFoundError where there is nothing; ValueError for arrays or images that do not fit this description.
    """
    place = pathlib.Path(path)
    if not place.exists():
        raise FileNotFoundError(f"there is no file or folder {place}")
    parts = _of_folder(place) if place.is_dir() else _of_file(place)
    names: tuple[str, ...] = ()
    if len(parts) == 3:  # without a split
        pixels, labels, names = parts
        test = _every_fifth(labels)
        parts = (pixels[~test], labels[~test], pixels[test], labels[test], names)
    train_x, train_y, test_x, test_y, names = parts
    return Dataset(str(path), train_x, train_y, test_x, test_y, class_names=names)


def _every_fifth(labels: IntArray) -> np.ndarray:
    """(n,) bool: every fifth image of each class, the fifth one first."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chosen[np.flatnonzero(labels == label)[_TEST - 1 :: _TEST]] = True
    if not chosen.any():
        raise ValueError(f"no class has {_TEST} images, of which one would be a test image: give a split")
    return chosen


def _of_folder(place: pathlib.Path) -> tuple[Any, ...]:
    if {"train", "test"} <= {entry.name for entry in place.iterdir() if entry.is_dir()}:
        train_x, train_y, names = class_folders(place / "train", 3)
        test_x, test_y, others = class_folders(place / "test", 3)
        if names != others:
            raise ValueError(f"{place}: train has the classes {', '.join(names)}, test {', '.join(others)}")
        return *_grey(train_x, test_x, (train_y, test_y)), names
    pixels, labels, names = class_folders(place, 3)
    return _grey(pixels, pixels, (labels, labels))[0], labels, names


def _grey(train: ByteArray, test: ByteArray, labels: tuple[IntArray, IntArray]) -> tuple[Any, ...]:
    """Both parts with one channel where no image has colours."""
    if all((part == part[..., :1]).all() for part in (train, test)):
        train, test = train[..., :1], test[..., :1]
    return train, labels[0], test, labels[1]


def _of_file(place: pathlib.Path) -> tuple[Any, ...]:
    arrays = read_npz(place)
    for names in _SPLITS:
        if set(names) <= arrays.keys():
            a, b, c, d = (arrays[name] for name in names)
            return _bytes(place, a), _labels(place, b), _bytes(place, c), _labels(place, d), ()
    for pair in _PAIRS:
        if set(pair) <= arrays.keys():
            return _bytes(place, arrays[pair[0]]), _labels(place, arrays[pair[1]]), ()
    if len(arrays) == 2:
        y, x = sorted(arrays.values(), key=lambda a: (a.ndim, a.dtype.kind == "f"))
        return _bytes(place, x), _labels(place, y), ()
    there = ", ".join(sorted(arrays)) or "none"
    raise ValueError(f"{place} must hold x and y, or x_train, y_train, x_test and y_test; it holds {there}")


def _labels(place: pathlib.Path, labels: np.ndarray) -> IntArray:
    flat = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or flat.dtype.kind not in "iu":
        raise ValueError(f"{place}: labels must be integers (n,), got {labels.dtype} {labels.shape}")
    return flat.astype(np.int32)


def _bytes(place: pathlib.Path, images: np.ndarray) -> ByteArray:
    """Bytes (n, height, width, channels)."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3):
        raise ValueError(
            f"{place}: images must be (n, height, width, channels), got {images.shape}: save "
            "x.transpose(0, 2, 3, 1)"
        )
    if images.dtype.kind == "f" and images.size:
        scaled = np.asarray(images, np.float64) * 255
        rounded = np.round(scaled)
        if not (np.abs(scaled - rounded) < 1e-2).all() or rounded.min() < 0 or rounded.max() > 255:
            inside = 0 <= images.min() and images.max() <= 1
            raise ValueError(
                f"{place}: images must be bytes, or bytes divided by 255 (in [0, 1]); its values reach from "
                f"{images.min():.4g} to {images.max():.4g}"
                f"{', and not all of them are multiples of 1/255' if inside else ''}. Floats of other units go to "
                "lipbounds.training.fit(config, (x, y)) in Python"
            )
        images = rounded.astype(np.uint8)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(
            f"{place}: images must be bytes (n, height, width, channels), got {images.dtype} {images.shape}"
        )
    return np.ascontiguousarray(images)
