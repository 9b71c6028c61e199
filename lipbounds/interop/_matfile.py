"""MATLAB files of version 5 (saved with -v6 or -v7): matrices and cell arrays of matrices, nothing else.

Format: "MAT-File Format" (MathWorks). A header of 128 bytes, then elements: a tag of type and number of bytes, then the
data. SciPy's reader is not used, as damaged files can crash it and take the process with them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lipbounds._text.files import DEFLATE

_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_MATRIX, _COMPRESSED, _CELL, _COMPLEX = 14, 15, 1, 0x800


def read_mat(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .mat file by name; a cell array is an array of objects.

    Raises:
        ValueError: MATLAB version 7.3 or 4, not a .mat file, cut off, or variables that are not matrices.
        OSError: the file cannot be opened.
    """
    raw = path.read_bytes()
    if raw[:8] == b"\x89HDF\r\n\x1a\n" or raw[512:520] == b"\x89HDF\r\n\x1a\n":
        raise ValueError(f"{path}: is of MATLAB version 7.3; save it with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(raw[126:128])
    if order is None or int.from_bytes(raw[124:126], "little" if order == "<" else "big") >> 8 != 1:
        raise ValueError(f"{path}: not a .mat file, or cut off, or not of version 5; save it again with -v7")
    found: dict[str, np.ndarray] = {}
    try:
        for kind, data in _elements(raw[128:], order):
            if kind == _COMPRESSED:
                ((kind, data),) = _elements(_inflated(data, order), order)
            if kind != _MATRIX:
                raise ValueError(f"an element of type {kind} stands where a variable should")
            name, array = _matrix(data, order, top=True)
            if name:  # MATLAB keeps what belongs to functions in a variable without a name
                if name in found:
                    raise ValueError(f"two variables have the name {name!r}")
                found[name] = array
    except (ValueError, TypeError, LookupError, ArithmeticError, MemoryError, zlib.error) as error:
        raise ValueError(f"{path}: not a .mat file, or cut off ({error}); save it again with -v7") from error
    return found


def _elements(raw: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, data) of the elements that stand one after the other."""
    place = 0
    while place < len(raw):
        tag = raw[place : place + 8]
        if len(tag) < 8:
            raise ValueError("a tag is cut off")
        kind, size = (int(n) for n in np.frombuffer(tag, f"{order}u4"))
        if kind >> 16:  # a small element holds its data in the tag
            kind, size, begin, end = kind & 0xFFFF, kind >> 16, place + 4, place + 8
            if size > 4:
                raise ValueError("a small element is too large")
        else:
            begin = place + 8
            end = begin + size + (-size % 8 if kind != _COMPRESSED else 0)
        if begin + size > len(raw):
            raise ValueError(f"an element promises {size} bytes, {len(raw) - begin} are left")
        yield kind, raw[begin : begin + size]
        place = end


def _inflated(data: bytes, order: str) -> bytes:
    """The element in a compressed one; ValueError if it is not as long as its tag says."""
    tag = zlib.decompressobj().decompress(data, 8)
    if len(tag) < 8:
        raise ValueError("a compressed element is cut off")
    size = 8 + int(np.frombuffer(tag, f"{order}u4")[1])
    if size > DEFLATE * len(data) + 8:
        raise ValueError(f"a compressed element promises {size} bytes, more than it can hold")
    whole = zlib.decompressobj().decompress(data, size + 1)
    if len(whole) != size:
        raise ValueError(f"a compressed element does not hold the {size} bytes that it promises")
    return whole


def _matrix(data: bytes, order: str, *, top: bool) -> tuple[str, np.ndarray]:
    """(name, array) of a variable, or of an entry of a cell array."""
    parts = _elements(data, order)
    (_, flags), (_, sizes), (_, name) = (next(parts, (0, b"")) for _ in range(3))
    word = int(np.frombuffer(flags, f"{order}u4")[0])
    shape = tuple(int(n) for n in np.frombuffer(sizes, f"{order}i4"))
    kind, title = word & 0xFF, name.decode("latin1")
    if kind not in _CLASSES and (kind != _CELL or not top):
        if top and not title:
            return "", np.empty(0)
        raise ValueError(
            f"{title or 'an entry of a cell array'} is not a matrix, and no cell array of matrices"
        )
    if word & _COMPLEX:
        raise ValueError(f"{title or 'an entry of a cell array'} is complex")
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"{title or 'an entry of a cell array'} has the shape {shape}")
    count = math.prod(shape)
    if kind == _CELL:
        if 8 * count > len(data):
            raise ValueError(f"{title} promises {count} cells, more than it can hold")
        cells = np.empty(count, object)
        for i in range(count):
            entry, content = next(parts, (0, b""))
            if entry != _MATRIX:
                raise ValueError(f"{title} has a cell that is not a matrix")
            cells[i] = _matrix(content, order, top=False)[1]
        return title, cells.reshape(shape, order="F")
    stored, content = next(parts, (0, b""))
    values = np.frombuffer(content, order + _STORED[stored])
    if values.size != count:
        raise ValueError(f"{title} has the shape {shape}, and {values.size} numbers")
    return title, values.astype(_CLASSES[kind]).reshape(shape, order="F")
