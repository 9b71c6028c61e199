"""Examples of the commands: images and labels of files of many kinds, in the units of the network's input."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from lipbounds._cli.options import digits, option
from lipbounds._form.units import check_range, doubts, shape_mend
from lipbounds._text.arguments import as_labels, near
from lipbounds._text.files import read_npy, read_npz, read_text

LABELS = ("label", "labels", "class", "target", "y")  # names of the column of a CSV file
_KINDS = (
    "`digits`, an .npz file of images and labels, a .csv file with a column `label`, or a folder with one folder of "
    "images per class"
)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Where the examples come from, and the range of their values."""

    data: Annotated[str | None, option(f"Examples: {_KINDS}.", "DATA", "--data", show_default="digits")] = (
        None
    )
    input_range: Annotated[
        tuple[float, float] | None,
        option(
            "Range of the values that the network takes: bytes are scaled to it, other values are held to it.",
            "LOW HIGH",
            "--input-range",
            show_default="0 1 for folders of images, else not checked",
        ),
    ] = None

    @property
    def name(self) -> str:
        """What records call these examples."""
        return self.data or "digits"

    def words(self) -> list[str]:
        """The options that give these examples again."""
        span = [] if self.input_range is None else ["--input-range", *map(digits, self.input_range)]
        return ["--data", self.name, *span]

    def check(self) -> None:
        """BadParameter for options that exclude each other."""
        if self.input_range is not None and not self.input_range[0] < self.input_range[1]:
            raise typer.BadParameter("needs LOW < HIGH, such as 0 1", param_hint="--input-range")

    def arrays(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Images and labels that were given as two files."""
        return None

    def files(self) -> dict[str, Path | None]:
        """The files that are read, by what they are called."""
        return {"data": None if self.data is None else Path(self.data)}

    def read(self, shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
        """Images (n, *shape) in the units of the network, and labels (n,) of its classes; else ValueError.

        Values in units that look wrong are a warning on stderr.
        """
        name, given = self.name, self.input_range
        if (arrays := self.arrays()) is not None:
            x, y = arrays
        elif name == "digits":
            from lipbounds.training.data import digits

            test = digits()
            x, y = test.test_x, test.test_y
        elif not Path(name).exists():
            raise ValueError(f"--data: there is no {name}; give {_KINDS}{near(name, ['digits'])}")
        elif Path(name).is_dir():
            x, y = _from_folder(Path(name), shape, classes)
            given = given or (0.0, 1.0)
        elif Path(name).suffix.lower() == ".csv":
            x, y = _from_csv(Path(name), shape)
        else:
            x, y = _from_npz(Path(name))
        if x.shape[1:] != tuple(shape):
            mend = shape_mend("x", x.shape, shape)
            raise ValueError(
                f"{name} holds images of shape {x.shape[1:]}, the model takes {tuple(shape)}{mend}"
            )
        try:
            labels = as_labels(y.reshape(-1) if y.shape == (len(x), 1) else y, len(x), classes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return _in_units(name, x, shape, given), labels


@dataclasses.dataclass(frozen=True)
class ExampleFiles(Examples):
    """Examples that may also be given as two files."""

    images: Annotated[
        Path | None, option("Images as an .npy file, with --labels.", "FILE", exists=True, dir_okay=False)
    ] = None
    labels: Annotated[
        Path | None, option("Labels of --images as an .npy file.", "FILE", exists=True, dir_okay=False)
    ] = None

    @property
    def name(self) -> str:
        return super().name if self.images is None else str(self.images)

    def words(self) -> list[str]:
        if self.images is None:
            return super().words()
        return ["--images", str(self.images), "--labels", str(self.labels), *super().words()[2:]]

    def check(self) -> None:
        super().check()
        if (self.images is None) != (self.labels is None):
            missing = "--labels" if self.labels is None else "--images"
            raise typer.BadParameter("images and labels belong together", param_hint=missing)
        if self.images is not None and self.data is not None:
            raise typer.BadParameter("give --data, or --images and --labels", param_hint="--data")

    def files(self) -> dict[str, Path | None]:
        return {**super().files(), "images": self.images, "labels": self.labels}

    def arrays(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self.images is None or self.labels is None:
            return None
        return read_npy(self.images), read_npy(self.labels)


def check_inside(x: np.ndarray, low: float, high: float) -> None:
    """ValueError unless the images lie in the box of an attack."""
    if not np.isfinite(x).all():
        raise ValueError("the images hold NaN or infinite values")
    if x.size and not (low <= x.min() and x.max() <= high):
        raise ValueError(
            f"attacks stay in the box [{low:g}, {high:g}], and the images hold values from {x.min():g} to "
            f"{x.max():g}: give the range of the inputs, --box LOW,HIGH"
        )


def _in_units(
    name: str, x: np.ndarray, shape: tuple[int, ...], given: tuple[float, float] | None
) -> np.ndarray:
    """The images as floats: bytes scaled to the range, floats held to it."""
    if x.dtype == np.uint8:
        if given is None:
            raise ValueError(
                f"{name}: x must hold floats in the model's input units, got uint8: pass --input-range 0 1 to divide "
                "the bytes by 255, or --input-range 0 255 if the network takes them as they are"
            )
        if not np.isfinite(given).all():
            raise ValueError(f"{name} holds bytes: --input-range needs two finite numbers, such as 0 1")
        low, high = map(np.float32, given)
        return np.asarray(low + x / np.float32(255) * (high - low), np.float32)
    if x.dtype.kind != "f":
        raise ValueError(f"{name}: x must hold floats in the model's input units, got {x.dtype}")
    if given is not None:
        try:
            check_range(x, given, "x")
        except ValueError as error:
            raise ValueError(f"{name}: {error}".replace("input_range=", "--input-range ")) from None
    elif (said := doubts(x, shape, mend="x / 255")) is not None:
        typer.echo(f"warning: {name}: {_on_the_command_line(said)}", err=True)
    return x


def _on_the_command_line(said: str) -> str:
    """What `doubts` says, with the options in place of the Python that mends it."""
    place = said.find(" Put the normalisation into the function")
    if place >= 0:
        return (
            f"{said[:place]} Give pixels in [0, 1] and the normalisation by --mean and --std, or --input-range LOW "
            "HIGH if these units are meant"
        )
    return f"{said}, or give --input-range LOW HIGH if these units are meant"


def _from_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of an .npz file: x and y, the test part of a split, or its only two arrays."""
    try:
        arrays = read_npz(path)
    except ValueError as error:
        raise ValueError(f"{path} is not an .npz file with arrays x and y: {error}") from error
    for pair in (("x", "y"), ("x_test", "y_test"), ("test_x", "test_y"), ("test_images", "test_labels")):
        if set(pair) <= arrays.keys():
            return arrays[pair[0]], arrays[pair[1]]
    if len(arrays) == 2:
        y, x = sorted(arrays.values(), key=lambda a: (a.ndim, a.dtype.kind == "f"))
        if y.ndim in (1, 2) and x.ndim > 1:
            return x, y
    raise ValueError(
        f"{path} is not an .npz file with arrays x and y, or two arrays of other names: it holds "
        f"{', '.join(sorted(arrays)) or 'none'}; keep the images and the labels, np.savez(file, x=..., y=...)"
    )


def _from_csv(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The examples of a CSV file, one a line, in C order, with a header that names the column of the labels."""
    text = read_text(path, "utf-8-sig")
    begin = text.partition("\n")[0].strip()[:60]
    try:
        read = csv.reader(text.splitlines())
        header, *lines = [line for line in read if line[1:] or "".join(line).strip()] or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from None
    header = [word.strip().lower() for word in header]
    column = next((header.index(name) for name in LABELS if name in header), None)
    if column is None:
        raise ValueError(
            f"{path}: its first line must name the columns, that of the labels `label`, such as "
            f"label,pixel0,pixel1; it is {begin!r}"
        )
    if len(header) != math.prod(shape) + 1:
        raise ValueError(
            f"{path} must have {math.prod(shape)} columns of an example of shape {tuple(shape)} and one of labels, "
            f"not {len(header)}"
        )
    odd = next((k for k, line in enumerate(lines) if len(line) != len(header)), None)
    if odd is not None:
        raise ValueError(
            f"{path} must hold numbers, as many in every line as there are names in the first, {len(header)}: example "
            f"{odd} (from 0) has {len(lines[odd])}"
        )
    try:
        table = np.array(lines, np.float64).reshape(-1, len(header))
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers, as many in every line: {error}") from None
    labels, values = table[:, column], np.delete(table, column, axis=1)
    strange = labels[(labels != np.round(labels)) | (np.abs(labels) >= 2.0**53)]  # NaN among them
    if strange.size:
        raise ValueError(
            f"{path}: the column {header[column]!r} must hold whole numbers below 2^53, not {strange[0]:g}"
        )
    # 5e-1 is no byte, though it has no point
    whole = "." not in text.partition("\n")[2] and values.size > 0
    whole = whole and bool(
        (values == np.floor(values)).all() and values.min() >= 0 and 1 < values.max() <= 255
    )
    with np.errstate(over="ignore"):  # what becomes infinite is refused like every infinite value
        x = values.astype(np.uint8 if whole else np.float32)
    return x.reshape(-1, *shape), labels.astype(np.int64)


def _from_folder(path: Path, shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of a folder with one folder per class, in the layout of the network.

    A warning where it lacks classes of the network, as folders are counted in their order.
    """
    from lipbounds.training.image_folders import class_folders

    if len(shape) not in (2, 3):
        raise ValueError(
            f"{path} holds images, the model takes inputs of shape {tuple(shape)}: give an .npz file"
        )
    first = len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3)  # (C, H, W)
    channels = 1 if len(shape) == 2 else shape[0] if first else shape[2]
    pixels, labels, names = class_folders(path, channels)
    if len(names) < max(classes, 2):
        taken = ", ".join(f"{name} is class {k}" for k, name in enumerate(names[:3]))
        typer.echo(
            f"warning: {path} has {len(names)} folders, the network has {max(classes, 2)} classes: {taken}"
            f"{', ...' if len(names) > 3 else ''}; give an .npz file if these are other classes of the network",
            err=True,
        )
    if len(shape) == 2:
        return pixels[..., 0], labels
    return pixels.transpose(0, 3, 1, 2) if first else pixels, labels
