"""Certificate files as bytes: a safetensors file whose metadata hold a JSON header. Loading runs no code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lipbounds._text.files import parsed
from lipbounds.errors import CertificateError

FORMAT = "lipbounds-certificate"
VERSION = "1"
_MAX_HEADER = 10**8


def digest(header: str, tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over the header and the tensors."""
    total = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        array = tensors[name]
        total.update(f"{name}{array.dtype.name}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def pack(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a certificate file."""
    from safetensors.numpy import save

    header = json.dumps(fields, sort_keys=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    metadata = {"format": FORMAT, "version": VERSION, "header": header, "digest": digest(header, arrays)}
    return _sorted(save(arrays, metadata))


def _sorted(raw: bytes) -> bytes:
    """The same safetensors file with its index in order: the library writes the metadata in a random one."""
    end = 8 + int.from_bytes(raw[:8], "little")
    index = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    index += b" " * (-len(index) % 8)  # data are aligned to 8 bytes
    return len(index).to_bytes(8, "little") + index + raw[end:]


def _metadata(raw: bytes) -> tuple[dict[str, Any], int]:
    """(the JSON index of a safetensors file, where its data begin)."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > _MAX_HEADER or raw[8:9] != b"{":
        raise CertificateError("it is not a safetensors file")
    if len(raw) < 8 + length:
        raise CertificateError("the file is cut off: its index is incomplete")
    try:
        index = parsed(raw[8 : 8 + length])
    except ValueError as error:
        raise CertificateError("it is not a safetensors file: its index is no JSON") from error
    return index, 8 + length


def read(path: str | os.PathLike[str]) -> tuple[Any, dict[str, np.ndarray]]:
    """`unpack` the file at `path`."""
    return unpack(existing(path).read_bytes())


def unpack(raw: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    """(header, tensors) of a certificate file; CertificateError says what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    index, begin = _metadata(raw)
    metadata = index.get("__metadata__", {})
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CertificateError("it is a safetensors file, but no certificate of lipbounds")
    if metadata.get("version") != VERSION:
        raise CertificateError(
            f"it has version {metadata.get('version')!r}; this library reads version {VERSION}"
        )
    missing = [name for name in ("header", "digest") if not isinstance(metadata.get(name), str)]
    if missing:
        raise CertificateError(f"its metadata lack {' and '.join(missing)}")
    try:
        ends = [entry["data_offsets"][1] for name, entry in index.items() if name != "__metadata__"]
        if begin + max(ends, default=0) > len(raw):
            raise CertificateError("the file is cut off: tensors are incomplete")
        tensors = load(raw)
    except CertificateError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise CertificateError(f"its tensors cannot be read: {error}") from error
    if metadata["digest"] != digest(metadata["header"], tensors):
        raise CertificateError("the file was changed after it was written: its digest does not fit")
    try:
        fields = parsed(metadata["header"])
    except ValueError as error:
        raise CertificateError("its header is no JSON") from error
    if not isinstance(fields, dict):
        raise CertificateError("its header is no JSON object")
    return fields, tensors


def existing(path: str | os.PathLike[str]) -> Path:
    """The path of a file; FileNotFoundError where there is none."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}")
    return Path(path)


def is_certificate(path: Path) -> bool:
    """Whether a file looks like a certificate of any version; it may be replaced then."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            index, _ = _metadata(start + file.read(min(int.from_bytes(start, "little"), _MAX_HEADER)))
    except CertificateError:
        return False
    metadata = index.get("__metadata__") if isinstance(index, dict) else None
    return isinstance(metadata, dict) and metadata.get("format") == FORMAT


def take(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """The field `name` of a header, of the type it has to be."""
    if name not in fields:
        raise CertificateError(f"its header lacks {name!r}")
    value = fields[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CertificateError(f"{name!r} in its header is {value!r}, not of type {kind.__name__}")
    return value


def take_float(fields: Mapping[str, Any], name: str) -> float:
    """A hexadecimal float (float.hex)."""
    text = take(fields, name, str)
    try:
        return float.fromhex(text)
    except (ValueError, OverflowError) as error:
        raise CertificateError(f"{name!r} in its header is no hexadecimal float") from error


def take_sizes(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """A list of integers >= 0."""
    sizes = take(fields, name, list)
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise CertificateError(f"{name!r} in its header holds something else than sizes")
    return tuple(sizes)
