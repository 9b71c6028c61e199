"""An ONNX file as a model: its bytes, its external data, its functions inlined. Loading runs no code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.inliner

OLDEST = 7  # broadcasting is NumPy's from here on


def read_model(path: str | os.PathLike[str]) -> tuple[onnx.ModelProto, int]:
    """(model, opset of the domain ai.onnx): external data read, local functions inlined.

    Raises:
        ValueError: not an ONNX file, cut off, an opset that cannot be read, external data that are missing,
            too short or outside the folder of the model.
    """
    path = Path(path)
    raw = path.read_bytes()
    try:
        model = onnx.load_model_from_string(raw)
    except Exception as error:  # DecodeError of protobuf, which is not a dependency
        raise ValueError(f"{path}: not an ONNX file, or cut off; export or download it again") from error
    if not model.HasField("graph") or not model.graph.node or not model.opset_import:
        raise ValueError(
            f"{path}: not an ONNX file, or cut off: it lacks a graph or its opset; export or download it again"
        )
    opset = _opset(path, model)
    if model.functions:
        try:
            model = onnx.inliner.inline_local_functions(model)
        except Exception as error:  # the inliner, in C++, raises RuntimeErrors and worse
            raise ValueError(f"{path}: its local functions cannot be inlined: {error}") from error
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise ValueError(f"{path}: the initializer {name!r} is sparse; export the model with dense ones")
    for tensor in _tensors(model.graph):
        _read_external(path, tensor)
    return model, opset


def _opset(path: Path, model: onnx.ModelProto) -> int:
    # ONNX's checker and onnxruntime accept a duplicate entry
    found = sorted({int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")})
    newest = int(onnx.defs.onnx_opset_version())
    if len(found) != 1:
        raise ValueError(
            f"{path}: one opset of the domain ai.onnx is needed, the file names {found or 'none'}"
        )
    if found[0] < OLDEST:
        raise ValueError(
            f"{path}: opset {found[0]} is older than {OLDEST}; convert it with onnx.version_converter, or export again"
        )
    if found[0] > newest or model.ir_version > onnx.IR_VERSION:
        raise ValueError(
            f"{path}: opset {found[0]} or IR version {model.ir_version} is newer than {newest} or {onnx.IR_VERSION}, "
            "those of the installed onnx: pip install -U onnx"
        )
    return found[0]


# --- external data -------------------------------------------------------------------------------------------------


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _read_external(path: Path, tensor: onnx.TensorProto) -> None:
    """Move the external data of a tensor into it."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    what = f"{path}: the external data of tensor {tensor.name!r}"
    folder = Path(os.path.realpath(path.parent))
    file = Path(os.path.realpath(folder / location))
    if not location or os.path.isabs(location) or not file.is_relative_to(folder):
        raise ValueError(
            f"{what} are at {location!r}, outside the folder of the model; refused, put them beside it"
        )
    if not file.is_file():
        raise ValueError(
            f"{what} are in {location!r}, which is missing: it must lie in {folder}, beside the model"
        )
    try:
        offset = int(entries.get("offset") or 0)
        length = int(entries["length"]) if entries.get("length") else file.stat().st_size - offset
    except ValueError as error:
        raise ValueError(
            f"{what} have an offset or a length that is not a number; export the model again"
        ) from error
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise ValueError(
            f"{what} end at byte {offset + length}, but {location!r} has {file.stat().st_size}: it is cut off or "
            "belongs to another model"
        )
    with file.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(length)
    del tensor.external_data[:]
    tensor.ClearField("data_location")
