"""Data sets as arrays in raw pixel units, with a fixed split."""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import pathlib
import zlib

import numpy as np

FloatArray = np.ndarray
IntArray = np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images `(n, height, width, channels)` float32 in [0, 1], labels `(n,)` int32; two disjoint parts."""

    name: str
    train_x: FloatArray
    train_y: IntArray
    test_x: FloatArray
    test_y: IntArray

    @property
    def input_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.train_x.shape[1:]
        return int(height), int(width), int(channels)

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


def digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8x8 grey pixels divided by 16.

    One fifth, stratified, is the test set. The split does not depend on any seed of an experiment, so that no
    model is tested on what another one saw.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[..., None]
    y = bunch.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    return Dataset("digits", train_x, train_y, test_x, test_y)


_MNIST = {  # part -> (images, labels), the names of the official files
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def mnist(data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """MNIST from its four official IDX files (LeCun, Cortes, Burges), plain or .gz; pixels divided by 255.

    data_dir   the folder with the files, or one with them in `mnist/`; None: the environment's LIPBOUNDS_DATA

    The split is the official one. Nothing is downloaded. FileNotFoundError if a file, the folder or the
    variable is missing; ValueError, which names the file, if one is truncated, has bytes too many, is no IDX
    file of the wanted kind, or if images and labels do not fit together.
    """
    folder = _mnist_folder(data_dir)
    parts: dict[str, tuple[FloatArray, IntArray]] = {}
    for part, (images_name, labels_name) in _MNIST.items():
        images, images_path = _idx(folder, images_name, 3)
        labels, labels_path = _idx(folder, labels_name, 1)
        if len(images) != len(labels) or images.size == 0:
            raise ValueError(
                f"{images_path} holds {' x '.join(map(str, images.shape))} numbers and {labels_path} "
                f"{len(labels)} labels: as many images as labels are needed, and at least one"
            )
        if labels.max() > 9:
            raise ValueError(f"{labels_path}: labels must lie in 0..9, got {labels.max()}")
        parts[part] = (images / np.float32(255))[..., None], labels.astype(np.int32)
    (train_x, train_y), (test_x, test_y) = parts["train"], parts["test"]
    if train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(
            f"{folder}: training images of shape {train_x.shape[1:3]}, test images {test_x.shape[1:3]}"
        )
    return Dataset("mnist", train_x, train_y, test_x, test_y)


def _mnist_folder(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    given = os.environ.get("LIPBOUNDS_DATA") if data_dir is None else data_dir
    if given is None or not os.fspath(given):
        raise FileNotFoundError(
            "where is MNIST? Pass data_dir, or set LIPBOUNDS_DATA to the folder with the four IDX files"
        )
    folder = pathlib.Path(given)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder (MNIST's four IDX files are wanted there)")
    first = _MNIST["train"][0]
    for place in (folder, folder / "mnist"):
        if any((place / (first + end)).is_file() for end in ("", ".gz")):
            return place
    raise FileNotFoundError(f"no {first} or {first}.gz in {folder} or {folder / 'mnist'}")


def _idx(folder: pathlib.Path, name: str, dimensions: int) -> tuple[np.ndarray, pathlib.Path]:
    """The unsigned bytes of an IDX file, in its shape, and its path.

    Format: 0, 0, 8 (unsigned byte), the number of dimensions; sizes as big-endian 32-bit integers; the data.
    """
    path = folder / name
    if not path.is_file():
        path = folder / f"{name}.gz"
        if not path.is_file():
            raise FileNotFoundError(f"neither {name} nor {name}.gz in {folder}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is truncated or no gzip file: {error}") from error
    wanted = bytes((0, 0, 8, dimensions))
    if data[:4] != wanted:
        raise ValueError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions: "
            f"it starts with {data[:4].hex()}, not {wanted.hex()}"
        )
    start = 4 + 4 * dimensions
    if len(data) < start:
        raise ValueError(f"{path} is truncated: its header ends after {len(data)} of {start} bytes")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", dimensions, offset=4))
    if len(data) - start != math.prod(shape):
        trouble = "is truncated" if len(data) - start < math.prod(shape) else "holds bytes too many"
        raise ValueError(
            f"{path} {trouble}: "
            f"its header says {' x '.join(map(str, shape))} bytes, {len(data) - start} follow"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape), path
