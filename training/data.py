"""The data sets by name: images in raw pixel units, with a fixed split. Nothing is downloaded.

    load("cifar10", data_dir)      one of DATASETS

Each reader, and its errors, say where to download the files and where to put them.
"""

from __future__ import annotations

import gzip
import math
import os
import pathlib
import zlib
from collections.abc import Callable

import numpy as np

from lipbounds._text import DEFLATE
from lipbounds.training.cifar import cifar10, cifar100
from lipbounds.training.dataset import Dataset, Progress, Source, check_count, refuse_copies
from lipbounds.training.image_folders import tiny_imagenet
from lipbounds.training.own_data import is_own, own

__all__ = ["DATASETS", "Dataset", "cifar10", "cifar100", "digits", "load", "mnist", "own", "tiny_imagenet"]

_NUMERALS = tuple("0123456789")


def digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8x8 grey pixels in 0..16.

    One fifth, stratified, is the test set. The split does not depend on the seed of an experiment, so that no
    model is tested on training images of another one.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x = bunch.images.astype(np.uint8)[..., None]
    y = bunch.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    return Dataset("digits", train_x, train_y, test_x, test_y, levels=16, class_names=_NUMERALS)


_MNIST = Source(
    title="MNIST",
    page="http://yann.lecun.com/exdb/mnist",
    places=("", "mnist"),
    files=(
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ),
    endings=("", ".gz"),
)


def mnist(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """MNIST from its four official IDX files (LeCun, Cortes, Burges), plain or gzipped; pixels 0..255.

    data_dir   the folder with the files, or one with them in `mnist/`; None: the environment's LIPBOUNDS_DATA

    The split is the official one; fewer images than the official 60 000 and 10 000 are read as they are.
    Nothing is downloaded. FileNotFoundError if a file, the folder or the variable is missing; ValueError,
    which names the file, if one is truncated, too long or not an IDX file of the right kind, if
    training and test files are mixed up, or if images and labels do not fit together.
    """
    place = _MNIST.find(data_dir)
    train_images, train_labels, test_images, test_labels = (_MNIST.path(place, name) for name in _MNIST.files)
    train_pixels, train_y = _images_and_labels(train_images, train_labels, 60_000)
    test_pixels, test_y = _images_and_labels(test_images, test_labels, 10_000)
    if train_pixels.shape[1:] != test_pixels.shape[1:]:
        raise ValueError(
            f"{place}: training images of shape {train_pixels.shape[1:3]}, test images {test_pixels.shape[1:3]}: "
            "these files do not belong together"
        )
    refuse_copies([(train_images, train_pixels), (test_images, test_pixels)])
    return Dataset("mnist", train_pixels, train_y, test_pixels, test_y, class_names=_NUMERALS)


def _images_and_labels(
    images_path: pathlib.Path, labels_path: pathlib.Path, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """One part of MNIST: uint8 (n, height, width, 1) and int32 (n,), n at most `most`."""
    images, labels = _idx(images_path, 3, most), _idx(labels_path, 1, most)
    if len(images) != len(labels) or images.size == 0:
        raise ValueError(
            f"{images_path} holds {' x '.join(map(str, images.shape))} numbers and {labels_path} "
            f"{len(labels)} labels: as many images as labels are needed, and at least one"
        )
    if labels.max() > 9:
        raise ValueError(f"{labels_path}: labels must lie in 0..9, got {labels.max()}")
    return images[..., None], labels.astype(np.int32)


_IDX_KINDS = {bytes((0, 0, 8, 3)): "images", bytes((0, 0, 8, 1)): "labels"}


# the first two bytes of a gzip file; programs that unpack a file may leave .gz in its name, or take it away
_GZIP = b"\x1f\x8b"
_WIDEST = 256  # pixels of a side; the official images have 28


def _idx(path: pathlib.Path, dimensions: int, most: int) -> np.ndarray:
    """The unsigned bytes of an IDX file of at most `most` records, in its shape.

    Format: 0, 0, 8 (unsigned byte), the number of dimensions; sizes as big-endian 32-bit integers; the data.
    From a compressed file only the header, the data that it declares and one further byte are unpacked.
    """
    size, start = path.stat().st_size, 4 + 4 * dimensions
    with path.open("rb") as stream:
        packed = stream.read(len(_GZIP)) == _GZIP
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            shape = _idx_shape(path, stream.read(start), dimensions)
            promised = math.prod(shape)
            text = f"its header says {' x '.join(map(str, shape))} bytes"
            if promised > (size * DEFLATE if packed else size - start):
                follow = f"at most {size * DEFLATE}" if packed else size - start
                raise ValueError(f"{path} is truncated: {text}, {follow} follow")
            check_count(path, shape[0], most, in_training=60_000)
            if max(shape[1:], default=0) > _WIDEST:
                raise ValueError(
                    f"{path}: {text}, and no image of MNIST has more than {_WIDEST} pixels a side"
                )
            data = stream.read(promised + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a gzip file that is truncated or damaged: {error}") from error
    if len(data) < promised:
        raise ValueError(f"{path} is truncated: {text}, {len(data)} follow")
    if len(data) > promised:
        raise ValueError(f"{path} is too long: {text}, {'more' if packed else size - start} follow")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _idx_shape(path: pathlib.Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    """The shape that an IDX header declares."""
    wanted = bytes((0, 0, 8, dimensions))
    if header[:4] != wanted:
        kind = _IDX_KINDS.get(header[:4])
        raise ValueError(
            f"{path} is not an IDX file of bytes in {dimensions} dimensions: "
            f"it starts with {header[:4].hex()}, not {wanted.hex()}"
            + (f" (it holds {kind}, and {_IDX_KINDS[wanted]} are needed)" if kind else "")
        )
    start = 4 + 4 * dimensions
    if len(header) < start:
        raise ValueError(f"{path} is truncated: its header ends after {len(header)} of {start} bytes")
    return tuple(int(n) for n in np.frombuffer(header, ">u4", dimensions, offset=4))


Reader = Callable[[str | os.PathLike[str] | None, Progress | None], Dataset]

DATASETS: dict[str, Reader] = {
    "digits": lambda data_dir, progress: digits(),
    "mnist": lambda data_dir, progress: mnist(data_dir),
    "cifar10": lambda data_dir, progress: cifar10(data_dir),
    "cifar100": lambda data_dir, progress: cifar100(data_dir),
    "tiny-imagenet": lambda data_dir, progress: tiny_imagenet(data_dir, progress=progress),
}


def load(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Dataset:
    """The data set of that name, one of `DATASETS`, or a path to images of one's own (`own`); ValueError for any other.

    data_dir   the folder with its files; None: the environment's LIPBOUNDS_DATA. digits need none.
    progress   called with what is being read and the share that is done, by readers that take long
    """
    if name not in DATASETS:
        if is_own(name):
            return own(name)
        raise ValueError(
            f"unknown data set {name!r}; known: {', '.join(DATASETS)}, or a path: an .npz file, or a folder of images "
            "with a slash in its path"
        )
    return DATASETS[name](data_dir, progress)
