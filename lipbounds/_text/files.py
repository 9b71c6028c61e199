"""Atomic writes, and reading of untrusted .npz, .npy and .safetensors files."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lipbounds._text.memory import available_memory


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name this file in an OSError that names none, as that of a full disk, or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def check_folder(folder: Path) -> None:
    """OSError with the reason where a folder cannot be made, or no file can be written to it; nothing is made."""
    there = Path(os.path.realpath(folder))
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(
            f"{there} is a file, so that {folder} cannot be a folder: choose another one"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"there is no permission to write to the folder {there}: choose another one")


def is_special(path: Path) -> bool:
    """Whether a path is a pipe or a device, such as /dev/stdout: it holds nothing, and is written to directly."""
    return path.exists() and not path.is_file() and not path.is_dir()


def check_writable(path: Path) -> None:
    """OSError with the reason where no file can be written at this path; nothing is made. Links are followed."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file in it")
    if not is_special(path):
        parent = Path(os.path.realpath(path)).parent
        if not parent.is_dir():
            raise FileNotFoundError(f"there is no folder {parent} to write {path.name} to")
        check_folder(parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either complete or unchanged; symbolic links are followed.

    A pipe or a device is written to directly. Raises an OSError that names `path`, or its folder.
    """
    check_writable(path)
    if is_special(path):
        with naming(path), path.open("wb") as file:
            file.write(content)
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with naming(path):
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


_TORCH = (
    "is a PyTorch file, which only PyTorch reads: export the model in Python, torch.onnx.export(model.eval(), "
    '(torch.zeros(1, 3, 32, 32),), "net.onnx", dynamo=True) with the shape of one input, and give net.onnx'
)
_KERAS = (
    'is a Keras file, which only Keras reads: export the model in Python, model.export("net.onnx", format="onnx"), '
    "and give net.onnx"
)
_PICKLE = (
    "is a pickle, and loading it would run code: take the weights into an .npz file for lb.interop.load_weights, or "
    "export the model to ONNX"
)
_ORBAX = "is a checkpoint of weights without a network: restore it in Python and trace the model, lb.trace(model, x[0])"
_FOREIGN = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".pt2", ".torchscript"), _TORCH),
    **dict.fromkeys((".h5", ".hdf5", ".keras", ".pb", ".tflite"), _KERAS),
    **dict.fromkeys((".pkl", ".pickle", ".joblib"), _PICKLE),
    **dict.fromkeys((".msgpack", ".orbax"), _ORBAX),
}


def how_to_export(path: Path) -> str | None:
    """What a model file of another library is, and how it is brought here; None for other files."""
    return _FOREIGN.get(path.suffix.lower())


# --- untrusted files: reading gives arrays or a ValueError ---------------------------------------------------------

DEFLATE = 1032  # deflate expands one byte to at most this many
_KINDS = frozenset("F64 F32 F16 BF16 I64 I32 I16 I8 U64 U32 U16 U8 BOOL".split())


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError also where it is nested too deeply for the reader."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file; ValueError that names it where it is not UTF-8."""
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, each read only if the file can hold the size in its header.

    Raises:
        ValueError: not an .npz file, truncated, damaged, pickled objects, a header that declares too much data, or
            arrays that need more memory than is free.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
                if len({info.filename for info in members}) != len(members):
                    raise ValueError("two arrays have one name")
                size = path.stat().st_size
                _check_room([min(i.file_size, DEFLATE * min(i.compress_size, size)) for i in members])
                return {info.filename.removesuffix(".npy"): _member(archive, info, size) for info in members}
        except Exception as error:  # zipfile and NumPy raise nearly anything for a damaged file
            if isinstance(error, MemoryError):
                raise ValueError(f"{path}: {error or 'its arrays do not fit in memory'}") from error
            if "pickle" in str(error):
                raise ValueError(
                    f"{path}: holds pickled objects, which are not read; save plain arrays"
                ) from error
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{path}: not an .npz file, or cut off ({reason[0]}); save it again with numpy.savez"
            ) from error


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file; ValueError as `read_npz`."""
    with path.open("rb") as stream:
        try:
            return _array(stream, path.stat().st_size, DEFLATE * path.stat().st_size, repr(path.name))
        except Exception as error:  # NumPy raises nearly anything for a damaged file
            if "pickle" in str(error):
                raise ValueError(
                    f"{path}: holds pickled objects, which are not read; save a plain array"
                ) from error
            raise ValueError(f"{path}: not an .npy file of numbers, or cut off: {error}") from error


def _check_room(sizes: list[int]) -> None:
    """MemoryError where arrays of these bytes, one of them twice while it is read, exceed the memory that is free."""
    need, free = sum(sizes) + max(sizes, default=0), available_memory()
    if free is not None and need > free * 2**30:
        raise MemoryError(
            f"its arrays need {need / 2**30:.3g} GiB, but only {free:.3g} GiB of memory are free: keep fewer examples"
        )


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> np.ndarray:
    """One array of an archive of `size` bytes; ValueError before memory is allocated for a false header."""
    stored = info.compress_type == zipfile.ZIP_STORED
    room = min(info.compress_size, size) * (1 if stored else DEFLATE)
    with archive.open(info) as stream:
        array = _array(stream, info.file_size, room, repr(info.filename))
        stream.read(1)  # at the end the checksum is compared
    return array


def _array(stream: Any, size: int, room: int, what: str) -> np.ndarray:
    """The array of a stream in NumPy's format that declares `size` bytes and can hold at most `room`."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"{what} has the version {version} of the format")
    shape, fortran, dtype = readers[version](stream)
    promised, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if dtype.hasobject:
        raise ValueError("pickle")
    if min(shape, default=0) < 0 or promised != held or promised > room:
        raise ValueError(
            f"the header of {what} declares shape {tuple(shape)}, {promised} bytes, but the file holds "
            f"{min(held, room)}"
        )
    flat = np.frombuffer(bytearray(stream.read(promised)), dtype, math.prod(shape))
    return flat.reshape(shape, order="F" if fortran else "C")


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors by name, metadata) of a .safetensors file; ValueError if it is damaged or of a type NumPy lacks."""
    from safetensors import safe_open

    with path.open("rb"):  # raises OSError if the file cannot be opened, as the other readers do
        pass
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            strange = next((name for name in names if kinds[name] not in _KINDS), None)
            tensors = {} if strange else {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
    except Exception as error:  # its errors are of many kinds
        raise ValueError(f"{path}: not a complete .safetensors file, or cut off: {error}") from error
    if strange is not None:
        raise ValueError(
            f"{path}: the tensor {strange!r} is of type {kinds[strange]}, which NumPy does not have; save it as float32"
        )
    return tensors, metadata
