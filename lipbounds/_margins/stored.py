"""`lb.load` reads models, certificates, radii and run folders back; `lb.save_radii` writes radii."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lipbounds._lipsdp.certificate import read_certificate
from lipbounds._lipsdp.certificate_file import existing, is_certificate
from lipbounds._margins.blocks import radii_of, record_of
from lipbounds._margins.radius import Radii
from lipbounds._margins.table import is_table, radii_of_table, table_of
from lipbounds._text.calls import usual_floats
from lipbounds._text.files import how_to_export, parsed, read_safetensors, read_text, write_atomically
from lipbounds._text.version import __version__

_FORMAT, _VERSION = "lipbounds-results", 1
_READ = (
    "a model (.safetensors, `lipbounds train` and `demo`), a certificate (`lb.save_certificate`), radii "
    "(`lb.save_radii`, `lipbounds certify --json` or `--csv`) or the folder of a run (`lipbounds train`)"
)


def load(path: str | os.PathLike[str]) -> Any:
    """Load a file or run folder that lipbounds wrote. Loading never runs code from a file.

    Args:
        path: a model (.safetensors), a certificate, radii (the JSON or CSV file of `lb.save_radii` or `lipbounds
            certify`), or a run folder.

    Returns:
        A flax nnx module for `lb.trace`, a `Certificate` (nothing of it proved yet: `lb.verify_certificate` does that),
        `Radii`, or a `lipbounds.training.Run`.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is none of these, or damaged; CertificateError for a certificate.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lb.save_certificate(lb.lipsdp(form), pathlib.Path(folder) / "bound")
        ...     lb.load(pathlib.Path(folder) / "bound")
        Certificate(L <= 2.00001 (l2), verified, 1 proof)
    """
    path = Path(path)
    if path.is_dir():
        return importlib.import_module("lipbounds.training").open_run(path)
    if is_certificate(existing(path)):
        return read_certificate(path)
    with path.open("rb") as file:
        begin = file.read(80)
    if is_table(begin.decode("utf-8-sig", "replace")):
        return _from(path, radii_of_table, read_text(path, "utf-8-sig"))
    if begin[8:9] == b"{":
        _, metadata = read_safetensors(path)
        if any(key.startswith("lipbounds-") for key in metadata):
            return importlib.import_module("lipbounds.training.store").load_model(path)[0]
    elif begin.lstrip()[:1] == b"{":
        found = _radii(path)
        if found is not None:
            return found
    other = how_to_export(path)
    raise ValueError(f"{path} {other}" if other else f"{path} is not a file that lb.load reads: {_READ}")


@usual_floats
def save_radii(radii: Radii, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write radii to a file that `lb.load` reads back, atomically.

    Args:
        radii: from `lb.certified_radius`.
        path: ending in .csv (a line per example: label, prediction, outcome, certified radius, norm, guarantee, method)
            or in .json (the same by columns, and the notes); docs/files.md describes both. Older radii are replaced.
        overwrite: replace any other file, too.

    Raises:
        TypeError: `radii` are not Radii.
        ValueError: another ending, radii that are not numbers >= 0, no examples and .csv, or there is another file at
            `path`.

    Example:
        >>> import tempfile, lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> radii = lb.certified_radius(form, [[1.0, 0.5], [0.0, 1.0]], [0, 0])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lb.save_radii(radii, f"{folder}/radii.csv")
        ...     again = lb.load(f"{folder}/radii.csv")
        >>> bool((again.radius == radii.radius).all()), again.label.tolist(), again.prediction.tolist()
        (True, [0, 0], [0, 1])
    """
    if not isinstance(radii, Radii):
        raise TypeError(f"save_radii needs Radii from lb.certified_radius, got {type(radii).__name__}")
    target = Path(path)
    kind = target.suffix.lower()
    if kind not in (".csv", ".json"):
        raise ValueError(f"radii are written to .csv or .json files, not to {target.name!r}")
    if target.exists() and not overwrite and not _holds_radii(target):
        raise ValueError(f"{target} exists and holds no radii; overwrite=True replaces it")
    columns = record_of(radii)
    try:
        radii_of(columns)
    except ValueError as error:
        raise ValueError(f"these radii cannot be saved, as nothing would read them back: {error}") from error
    if kind == ".csv" and not len(radii):
        raise ValueError("a table of no examples would not hold the norm of their radii: take a .json file")
    if kind == ".csv":
        text = table_of(radii)
    else:
        record = {"format": _FORMAT, "version": _VERSION, "lipbounds": __version__, **columns}
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(target, text.encode())


def _holds_radii(path: Path) -> bool:
    try:
        return isinstance(load(path), Radii)
    except (ValueError, OSError):
        return False


def _from(path: Path, read: Callable[[Any], Radii], content: Any) -> Radii:
    try:
        return read(content)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds {error}") from error


def _radii(path: Path) -> Radii | None:
    """The radii in a JSON file; None where it holds something else."""
    try:
        record = parsed(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is cut off, or is not JSON: {error}") from error
    if record.get("format") != _FORMAT or "radius" not in record:
        return None
    if type(record.get("version")) is not int or record["version"] != _VERSION:
        raise ValueError(
            f"{path} holds radii of version {record.get('version')!r}; this library reads version {_VERSION}"
        )
    return _from(path, radii_of, record)
