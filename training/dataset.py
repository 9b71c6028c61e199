"""The type `Dataset`, and the search for the official files of a data set."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

FloatArray = np.ndarray
IntArray = np.ndarray
ByteArray = np.ndarray

Progress = Callable[[str, float], None]  # what is being read, share of the whole in [0, 1]

VARIABLE = "LIPBOUNDS_DATA"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images as stored, with their labels; both parts hold at least one image.

    `*_pixels`     uint8 `(n, height, width, channels)`
    `*_y`          int32 `(n,)`, each in 0..classes-1
    `levels`       the pixel value that means 1.0
    `class_names`  one per class, or (), and then the largest label gives the number of classes

    ValueError for arrays that do not fit this description or each other.
    """

    name: str
    train_pixels: ByteArray = dataclasses.field(repr=False)
    train_y: IntArray = dataclasses.field(repr=False)
    test_pixels: ByteArray = dataclasses.field(repr=False)
    test_y: IntArray = dataclasses.field(repr=False)
    levels: int = 255
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 255:
            raise ValueError(f"{self.name}: levels must lie in 1..255, got {self.levels}")
        for part, pixels, labels in (
            ("training", self.train_pixels, self.train_y),
            ("test", self.test_pixels, self.test_y),
        ):
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.size == 0:
                raise ValueError(
                    f"{self.name}: {part} images must be uint8 (n, height, width, channels), at least one; "
                    f"got {pixels.dtype} {pixels.shape}"
                )
            if labels.dtype != np.int32 or labels.shape != pixels.shape[:1]:
                raise ValueError(
                    f"{self.name}: {part} labels must be int32 ({len(pixels)},), got {labels.dtype} {labels.shape}"
                )
            if self.levels < 255 and pixels.max() > self.levels:
                raise ValueError(f"{self.name}: {part} pixels reach {pixels.max()}, levels is {self.levels}")
            if labels.min() < 0 or labels.max() >= self.classes:
                raise ValueError(
                    f"{self.name}: {part} labels must lie in 0..{self.classes - 1}, "
                    f"got {labels.min()}..{labels.max()}"
                )
        if self.train_pixels.shape[1:] != self.test_pixels.shape[1:]:
            raise ValueError(
                f"{self.name}: training images of shape {self.train_pixels.shape[1:]}, "
                f"test images {self.test_pixels.shape[1:]}"
            )

    @functools.cached_property
    def train_x(self) -> FloatArray:
        """Training images, float32 in [0, 1], made once and read-only: the pixels divided by `levels`."""
        return self._scaled(self.train_pixels)

    @functools.cached_property
    def test_x(self) -> FloatArray:
        """Test images, as `train_x`."""
        return self._scaled(self.test_pixels)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        height, width, channels = self.train_pixels.shape[1:]
        return int(height), int(width), int(channels)

    @functools.cached_property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names) or 1 + int(max(self.train_y.max(), self.test_y.max()))

    def _scaled(self, pixels: ByteArray) -> FloatArray:
        images = pixels / np.float32(self.levels)
        # The cached array is shared, also with JAX arrays that are made from it without a copy.
        images.flags.writeable = False
        return images


@dataclasses.dataclass(frozen=True)
class Source:
    """The official files of a data set, and their possible places below the data folder.

    `places`   folders relative to the data folder, the most preferred first
    `files`    paths relative to a place; each may also end in one of `endings`
    `mistakes` a file that is often there instead -> what to do
    """

    title: str
    page: str
    places: tuple[str, ...]
    files: tuple[str, ...]
    endings: tuple[str, ...] = ("",)
    mistakes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def find(self, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
        """The first place that holds every file. `data_dir` None: the environment's LIPBOUNDS_DATA.

        Nothing is downloaded. FileNotFoundError, which names the files and their source, if there
        is no such folder or files are missing.
        """
        given = os.environ.get(VARIABLE) if data_dir is None else data_dir
        if given is None or not os.fspath(given):
            raise FileNotFoundError(
                f"{self.title} not found: pass data_dir, or set {VARIABLE} to its folder. {self._wanted()}"
            )
        folder = pathlib.Path(given).expanduser()
        if not folder.is_dir():
            said = f", to which {VARIABLE} is set," if data_dir is None else ""
            raise FileNotFoundError(f"{folder}{said} is not a folder. {self._wanted()}")
        candidates = [folder / place for place in self.places]
        missing = {place: self._missing(place) for place in candidates}
        best = min(candidates, key=lambda place: len(missing[place]))
        if not missing[best]:
            return best
        reasons = [f"no {', '.join(missing[best])} in {best}."]
        if len(missing[best]) == len(self.files):
            reasons = [f"no files of {self.title} in {' or '.join(map(str, candidates))}."]
        reasons += [
            f"There is {place / name}: {advice}."
            for place in candidates
            for name, advice in self.mistakes.items()
            if (place / name).is_file()
        ]
        raise FileNotFoundError(" ".join([*reasons, self._wanted()]))

    def path(self, place: pathlib.Path, name: str) -> pathlib.Path:
        """The file `name` of a place, with whichever ending it has there."""
        for end in self.endings:
            if (place / (name + end)).is_file():
                return place / (name + end)
        raise FileNotFoundError(f"no {name} in {place}. {self._wanted()}")

    def _missing(self, place: pathlib.Path) -> list[str]:
        return [
            " or ".join(name + end for end in self.endings)
            for name in self.files
            if not any((place / (name + end)).is_file() for end in self.endings)
        ]

    def _wanted(self) -> str:
        files = ", ".join(self.files)
        gzipped = " (plain or .gz)" if ".gz" in self.endings else ""
        return f"Needed: {files}{gzipped} of {self.title}, from {self.page}; nothing is downloaded"


def check_count(path: pathlib.Path, records: int, most: int, in_training: int) -> None:
    """ValueError if a file holds no records, or more than the official one, `most`.

    `in_training` is the number in the official training file, so that a training file in the place of a
    test file is recognised by its count.
    """
    if records == 0:
        raise ValueError(f"{path} holds no records")
    if records > most:
        instead = " (it looks like the training file)" if records == in_training else ""
        raise ValueError(f"{path} holds {records} records, the official file has {most}{instead}")


def refuse_copies(contents: Sequence[tuple[pathlib.Path, ByteArray]]) -> None:
    """ValueError if two files hold the same images: duplicates, or test images among the training images."""
    seen: dict[bytes, pathlib.Path] = {}
    for path, array in contents:
        digest = hashlib.blake2b(np.ascontiguousarray(array).data).digest()
        if digest in seen:
            raise ValueError(f"{path} and {seen[digest]} hold the same images: one of them is a copy")
        seen[digest] = path


def read_lines(path: pathlib.Path) -> list[str]:
    """The lines of a text file that are not empty; ValueError if it is not UTF-8 text."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
