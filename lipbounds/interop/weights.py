"""Matrices and biases of a multilayer perceptron from a file: .npz, .mat or .safetensors. Never pickle."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lipbounds._text.files import read_npz, read_safetensors
from lipbounds.interop._matfile import read_mat

_KINDS = {
    **dict.fromkeys(("weight", "weights", "w", "kernel"), "weight"),
    **dict.fromkeys(("bias", "biases", "b"), "bias"),
}
_FLOATS = ("float16", "bfloat16", "float32", "float64")
Key = tuple[str, tuple[int, ...]]  # words without the kind, numbers


def load_weights(
    path: str | os.PathLike[str], *, transposed: bool = False, order: Sequence[str] | None = None
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Weights (out, in) and biases (out,) in the order of the layers, for `lb.from_weights`.

    Names are split into words and numbers. One word says what the tensor is: weight, weights, w or kernel; bias, biases
    or b. The other words must be the same for all layers, and the numbers order them, as numbers: W0 b0 W1 b1,
    weights_0, layers.0.weight, fc1/kernel. A MATLAB cell array holds all layers under one name: `weights`, `biases`.
    Where the names do not order the layers (fc, head, out), `order` does.

    Args:
        path: the file; its suffix determines the format.
        transposed: the matrices of the file are (in, out), as in Keras and flax. Never guessed.
        order: names of all weights of the file, first layer first.

    Returns:
        (weights, biases); biases are None if the file holds none, and zero for a layer that alone has none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, a file that is cut off, names or shapes that make no chain of layers, tensors that
            are no matrices, integers, NaN or infinity, or pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    readers = {".npz": read_npz, ".mat": _mat, ".safetensors": lambda file: read_safetensors(file)[0]}
    if path.suffix not in readers:
        raise ValueError(
            f"{path}: the ending must be one of {', '.join(readers)}, got {path.suffix or 'none'!r}"
        )
    tensors = readers[path.suffix](path)
    weights, biases = _sorted(path, tensors, order)
    if transposed:
        weights = {name: w.T for name, w in weights.items()}
    _check_chain(path, weights, transposed)
    found = [biases.get(name) for name in weights]
    for (name, w), b in zip(weights.items(), found, strict=True):
        if b is not None and b.shape != (w.shape[0],):
            raise ValueError(
                f"{path}: the bias of {name!r} has shape {b.shape}, the weight gives {w.shape[0]} outputs"
                + ("" if transposed else "; for matrices (in, out) pass transposed=True")
            )
    if all(b is None for b in found):
        return list(weights.values()), None
    both = zip(weights.values(), found, strict=True)
    return list(weights.values()), [np.zeros(w.shape[0], w.dtype) if b is None else b for w, b in both]


# --- files ---------------------------------------------------------------------------------------------------------


def _mat(path: Path) -> dict[str, np.ndarray]:
    """The matrices of a .mat file by name; the entries of a cell array are numbered."""
    tensors: dict[str, np.ndarray] = {}
    for name, value in read_mat(path).items():
        cells = {name: value}
        if value.dtype == object:
            cells = {f"{name}{i}": cell for i, cell in enumerate(value.ravel())}
        for place, cell in cells.items():
            words = _words(place)
            vector = words is not None and words[0] == "bias" and cell.ndim == 2 and 1 in cell.shape
            tensors[place] = cell.ravel() if vector else cell  # MATLAB has no vectors
    return tensors


# --- layers --------------------------------------------------------------------------------------------------------


def _words(name: str) -> tuple[str, Key] | None:
    """(kind, the rest of the name) of a tensor; None if the name says nothing, or both."""
    parts = re.findall(r"[A-Za-z]+|\d+", name)
    kinds = [_KINDS[p.lower()] for p in parts if p.lower() in _KINDS]
    if len(kinds) != 1:
        return None
    rest = [p for p in parts if p.lower() not in _KINDS]
    words = ".".join("#" if p.isdigit() else p for p in rest)
    return kinds[0], (words, tuple(int(p) for p in rest if p.isdigit()))


def _sorted(
    path: Path, tensors: Mapping[str, np.ndarray], order: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights by name, in the order of the layers, and biases by the name of their weight."""
    found: dict[str, dict[Key, str]] = {"weight": {}, "bias": {}}
    for name, tensor in tensors.items():
        read = _words(name)
        if read is None:
            raise ValueError(
                f"{path}: {name!r} is neither a weight nor a bias by its name; use names such as W0, b0 or "
                "layers.0.weight, layers.0.bias, and nothing else in the file"
            )
        kind, key = read
        if key in found[kind]:
            raise ValueError(f"{path}: {found[kind][key]!r} and {name!r} name the same {kind}")
        found[kind][key] = name
        _check_tensor(path, name, tensor, 2 if kind == "weight" else 1)
    if not found["weight"]:
        raise ValueError(f"{path}: holds no weights")
    if lost := [name for key, name in found["bias"].items() if key not in found["weight"]]:
        raise ValueError(f"{path}: {lost[0]!r} is the bias of no weight in the file")
    keys = {name: key for key, name in found["weight"].items()}
    if order is not None:
        if sorted(order) != sorted(keys):
            raise ValueError(f"{path}: order must name every weight once: {', '.join(sorted(keys))}")
        names = list(order)
    else:
        if len({words for words, _ in keys.values()}) > 1:
            raise ValueError(
                f"{path}: the names do not order the layers: pass order=, the names {', '.join(sorted(keys))} from "
                "the first layer to the last"
            )
        names = sorted(keys, key=lambda name: keys[name][1])
    biases = {name: tensors[found["bias"][keys[name]]] for name in names if keys[name] in found["bias"]}
    return {name: tensors[name] for name in names}, biases


def _check_tensor(path: Path, name: str, tensor: Any, rank: int) -> None:
    if tensor.ndim != rank:
        what = "a matrix" if rank == 2 else "a vector"
        raise ValueError(
            f"{path}: {name!r} has shape {tensor.shape}, not that of {what}: only multilayer perceptrons are read; "
            "export other networks to ONNX"
        )
    if tensor.dtype.name not in _FLOATS:
        raise ValueError(f"{path}: {name!r} holds {tensor.dtype}, not floating point numbers")
    if not tensor.size:
        raise ValueError(f"{path}: {name!r} of shape {tensor.shape} is empty")
    if not np.isfinite(tensor.astype(np.float64)).all():
        raise ValueError(f"{path}: {name!r} holds NaN or infinity")


def _chains(shapes: Sequence[tuple[int, int]]) -> int | None:
    """The first layer whose inputs are not the outputs of the layer before it."""
    return next((i for i in range(1, len(shapes)) if shapes[i][1] != shapes[i - 1][0]), None)


def _check_chain(path: Path, weights: Mapping[str, np.ndarray], transposed: bool) -> None:
    names, shapes = list(weights), [(w.shape[0], w.shape[1]) for w in weights.values()]
    broken = _chains(shapes)
    if broken is None:
        return
    text = (
        f"{path}: {names[broken]!r} has {shapes[broken][1]} inputs, but {names[broken - 1]!r} has "
        f"{shapes[broken - 1][0]} outputs"
    )
    if _chains([shape[::-1] for shape in shapes]) is None:
        layout = "(out, in): leave transposed out" if transposed else "(in, out): pass transposed=True"
        text += f"; the matrices are {layout}"
    raise ValueError(text)
