"""`lb.load`: read models, certificates, radii and run folders back."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from lipbounds._lipsdp.certificate import load_certificate
from lipbounds._lipsdp.certificate_file import existing, is_certificate
from lipbounds._margins.blocks import radii_of
from lipbounds._margins.radius import Radii
from lipbounds._text.files import read_safetensors

_READ = (
    "a model (.safetensors, `lipbounds train` and `demo`), a certificate (`lb.save_certificate`), radii (`lipbounds "
    "certify --json`) or the folder of a run (`lipbounds train`)"
)


def load(path: str | os.PathLike[str]) -> Any:
    """Load a file or run folder that lipbounds wrote. Loading never runs code from a file.

    Args:
        path: a model (.safetensors), a certificate, the JSON file of `lipbounds certify --json`, or a run folder.

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
        return load_certificate(path)
    with path.open("rb") as file:
        begin = file.read(9)
    if begin[8:] == b"{":
        _, metadata = read_safetensors(path)
        if any(key.startswith("lipbounds-") for key in metadata):
            return importlib.import_module("lipbounds.training.store").load_model(path)[0]
    elif begin.lstrip()[:1] == b"{":
        found = _radii(path)
        if found is not None:
            return found
    raise ValueError(f"{path} is not a file that lb.load reads: {_READ}")


def _radii(path: Path) -> Radii | None:
    """The radii in a JSON file; None where it holds something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut off, or is not JSON: {error}") from error
    if record.get("format") != "lipbounds-results" or "radius" not in record:
        return None
    try:
        return radii_of(record)
    except ValueError as error:
        raise ValueError(f"{path} holds {error}") from error
