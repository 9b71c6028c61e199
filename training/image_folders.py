"""Tiny-ImageNet-200 from its official folders of JPEG files (Stanford CS231n)."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from lipbounds.training.dataset import ByteArray, Dataset, IntArray, Progress, Source, read_lines

_WIDEST = 1024  # pixels of a side; the official images have 64
_TINY = Source(
    title="Tiny-ImageNet-200 (with the folders train/<wnid>/images and val/images)",
    page="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    places=("", "tiny-imagenet", "tiny-imagenet-200", "tiny-imagenet/tiny-imagenet-200"),
    files=("wnids.txt", "val/val_annotations.txt"),
    mistakes={"tiny-imagenet-200.zip": "unpack it first (unzip)"},
)


def tiny_imagenet(
    data_dir: str | os.PathLike[str] | None = None, *, progress: Progress | None = None
) -> Dataset:
    """Tiny-ImageNet-200: the folders `train/<wnid>/images` and, as the test part, `val/images`; pixels 0..255.

    data_dir   the folder with `wnids.txt`, or one with it in `tiny-imagenet/` or `tiny-imagenet-200/`; None:
               the environment's LIPBOUNDS_DATA
    progress   called now and then with what is being read and the share that is done

    A class is a line of `wnids.txt`, its number that of the line (from 0), its name what `words.txt` says.
    The official test folder has no labels and is not read. Grey images become RGB. Fewer classes or images
    than the official ones are read as they are. The 110 000 images take 1.4 GB and some ten
    seconds, more from a slow disk.
    FileNotFoundError if a folder or file is missing, also one that `val_annotations.txt` lists; ValueError,
    which names the file, for a JPEG that cannot be decoded or has another size, for images that no
    annotation or class belongs to, and for malformed lists.
    """
    place = _TINY.find(data_dir)
    wnids = read_lines(place / "wnids.txt")
    if not wnids or len(set(wnids)) != len(wnids):
        raise ValueError(f"{place / 'wnids.txt'} must list at least one class, and none twice")
    if any(not re.fullmatch(r"[\w.-]{1,100}", wnid) or wnid.startswith(".") for wnid in wnids):
        raise ValueError(f"{place / 'wnids.txt'} lists something that is no name of a class")
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    train = _training_files(place / "train", numbers)
    test = _validation_files(place / "val", numbers)
    report = progress or (lambda what, share: None)
    done, total = 0, len(train) + len(test)
    pixels: list[ByteArray] = []
    for part, files in (("training", train), ("validation", test)):
        images = _decode([path for path, _ in files], part, report, done, total)
        done += len(files)
        pixels.append(images)
    names = _class_names(place / "words.txt", wnids)
    return Dataset("tiny-imagenet", pixels[0], _labels(train), pixels[1], _labels(test), class_names=names)


#: Endings of images that `class_folders` reads.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm")


def class_folders(folder: pathlib.Path, channels: int) -> tuple[ByteArray, IntArray, tuple[str, ...]]:
    """(images (n, height, width, channels), labels, class names) of a folder with one folder of images per class.

    The classes are the names of the folders in sorted order, numbers in the order of their size. Images become grey or
    RGB, as `channels` (1 or 3) says; all of them must have one size. Hidden folders and files are left out.
    FileNotFoundError where there are no folders or no images in one; ValueError for an image that cannot be decoded.
    """
    if channels not in (1, 3):
        raise ValueError(f"{folder}: images have 1 or 3 channels, the network takes {channels}")
    names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    names.sort(key=lambda name: (int(name) if name.isdecimal() else -1, name))
    if not names:
        raise FileNotFoundError(f"{folder} must hold one folder of images per class, named like the class")
    files: list[tuple[pathlib.Path, int]] = []
    for number, name in enumerate(names):
        there = (path for path in (folder / name).iterdir() if not path.name.startswith("."))
        found = sorted(path for path in there if path.suffix.lower() in ENDINGS)
        if not found:
            raise FileNotFoundError(f"{folder / name} holds no images ({', '.join(ENDINGS)})")
        files += [(path, number) for path in found]
    mode, kinds = "L" if channels == 1 else "RGB", ("PNG", "JPEG", "BMP", "PPM")
    images = _decode([path for path, _ in files], "the", lambda what, share: None, 0, len(files), mode, kinds)
    return images.reshape(*images.shape[:3], channels), _labels(files), tuple(names)


def _labels(files: Sequence[tuple[pathlib.Path, int]]) -> IntArray:
    return np.array([label for _, label in files], np.int32)


def _training_files(folder: pathlib.Path, numbers: dict[str, int]) -> list[tuple[pathlib.Path, int]]:
    """Every training image with its label, class after class, sorted by name."""
    missing = [wnid for wnid in numbers if not (folder / wnid / "images").is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the folders of {len(missing)} of {len(numbers)} classes that wnids.txt lists, "
            f"such as {missing[0]}/images; the whole archive is at {_TINY.page}"
        )
    strange = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in numbers)
    if strange:
        raise ValueError(
            f"{folder} holds {len(strange)} folders that wnids.txt does not list, such as {strange[0]}: "
            "files of another data set are mixed in"
        )
    files = []
    for wnid, number in numbers.items():
        images = sorted((folder / wnid / "images").glob("*.JPEG"))
        if not images:
            raise FileNotFoundError(f"no *.JPEG in {folder / wnid / 'images'}")
        files += [(path, number) for path in images]
    return files


def _validation_files(folder: pathlib.Path, numbers: dict[str, int]) -> list[tuple[pathlib.Path, int]]:
    """Every validation image with its label, in the order of the annotations: name, wnid, box, by tabs."""
    annotations = folder / "val_annotations.txt"
    files: dict[pathlib.Path, int] = {}
    for number, line in enumerate(read_lines(annotations), start=1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in numbers:
            raise ValueError(f"{annotations}, line {number}: no file and class of wnids.txt in {line[:80]!r}")
        path = folder / "images" / fields[0]
        if path in files:
            raise ValueError(f"{annotations}, line {number}: {fields[0]} is listed twice")
        files[path] = numbers[fields[1]]
    there = set((folder / "images").glob("*.JPEG"))
    missing = [path for path in files if path not in there]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images that {annotations} lists are missing, such as {missing[0]} "
            "(val must be as in the archive, not sorted into folders)"
        )
    if strange := sorted(there - files.keys()):
        raise ValueError(f"{annotations} does not list {len(strange)} images, such as {strange[0]}")
    if not files:
        raise ValueError(f"{annotations} lists no image")
    return list(files.items())


def _decode(
    paths: Sequence[pathlib.Path],
    part: str,
    report: Progress,
    done: int,
    total: int,
    mode: str = "RGB",
    kinds: tuple[str, ...] = ("JPEG",),
) -> ByteArray:
    """The images as (n, height, width, 3), in the mode "L" (n, height, width); each must be as large as the first."""
    from PIL import Image

    colours = (3,) if mode == "RGB" else ()
    images = np.empty((0, 0, 0, *colours), np.uint8)
    for row, path in enumerate(paths):
        if row % 500 == 0:
            report(f"reading {part} images", (done + row) / total)
        try:
            with Image.open(path, formats=kinds) as image:
                width, height = image.size
                if image.mode[0] in "IF":  # Pillow would clip its values, not scale them
                    raise ValueError("its pixels have more than 8 bits, save it with 8")
                if row == 0:
                    if max(width, height) > _WIDEST:
                        raise ValueError(f"{height} x {width} pixels, more than {_WIDEST} a side")
                    images = np.empty((len(paths), height, width, *colours), np.uint8)
                if (height, width) == images.shape[1:3]:
                    images[row] = np.asarray(image.convert(mode))
        except Exception as error:  # Pillow raises many kinds for a damaged file
            what = "a JPEG" if kinds == ("JPEG",) else "an image"
            raise ValueError(f"{path} is not {what} that can be decoded: {error}") from error
        if (height, width) != images.shape[1:3]:
            raise ValueError(
                f"{path} has {height} x {width} pixels, {paths[0]} has {images.shape[1]} x {images.shape[2]}: "
                "all images must have one size"
            )
    return images


def _class_names(path: pathlib.Path, wnids: Sequence[str]) -> tuple[str, ...]:
    """What words.txt calls each class (wnid, tab, words); the wnid itself where it says nothing."""
    lines = read_lines(path) if path.is_file() else []
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return tuple(words.get(wnid, wnid) for wnid in wnids)
