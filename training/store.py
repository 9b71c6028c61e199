"""Models on disk: one `.safetensors` file, weights as tensors, the architecture as JSON in its header.

Loading never runs code from the file: tensors are raw numbers, the header is data, and an architecture is a
name that `training.models` knows.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from lipbounds._text import parsed, read_safetensors, write_atomically
from lipbounds.training.models import ModelSpec, build

FORMAT = "lipbounds-model"
FORMAT_VERSION = 1


class StoreError(ValueError):
    """The file is not a model that lipbounds wrote, or a model cannot be written."""


def save_model(path: str | os.PathLike[str], model: nnx.Module, spec: ModelSpec) -> pathlib.Path:
    """Write `model`, built from `spec`, to `path`; a failed write leaves what was there untouched.

    Raises StoreError if the weights do not fit `spec`, so that every file written can be read back.
    """
    path = pathlib.Path(path)
    tensors = {name: np.asarray(value) for name, value in _tensors(model).items()}
    _check_fit(path, tensors, _tensors(_shapes(spec)))
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "architecture": spec.architecture,
        "arguments": dict(spec.arguments),
        "input_shape": list(spec.input_shape),
    }
    write_atomically(path, save(tensors, metadata={FORMAT: json.dumps(header, allow_nan=False)}))
    return path


def load_model(path: str | os.PathLike[str]) -> tuple[nnx.Module, ModelSpec]:
    """Read a file of `save_model`. StoreError for any other file, FileNotFoundError if there is none."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        tensors, metadata = read_safetensors(path)
    except (ValueError, OSError) as error:
        raise StoreError(str(error)) from error
    header = metadata.get(FORMAT)
    if header is None:
        if "lipbounds-forged" in metadata:
            raise StoreError(
                f"{path} holds forged thresholds, not a network: take the run's model.safetensors, and for the forged "
                "network lipbounds.analysis.load_forged(model, path), which has no certificate"
            )
        raise StoreError(f"{path} was not written by lipbounds: its header has no {FORMAT!r} entry")
    spec = _spec_from(path, header)
    try:
        model = _shapes(spec)
    except Exception as error:  # the header can hold arguments of any kind
        raise StoreError(f"{path}: {error}") from error
    _check_fit(path, tensors, _tensors(model))
    graph, state = nnx.split(model)
    flat = {key: leaf.replace(jnp.asarray(tensors[_name(key)])) for key, leaf in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(flat)), spec


def _shapes(spec: ModelSpec) -> nnx.Module:
    """The model with shapes instead of weights, so that a header cannot cause an allocation."""
    return nnx.eval_shape(lambda: build(spec))


def _name(key: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in key)


def _tensors(model: nnx.Module) -> dict[str, Any]:
    return {_name(key): leaf.get_value() for key, leaf in nnx.to_flat_state(nnx.state(model))}


def _check_fit(path: pathlib.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))
        raise StoreError(f"{path}: the weights do not fit the architecture: {', '.join(odd)}")
    for name, is_, needed in unlike(found, wanted):
        raise StoreError(f"{path}: {name} is {is_}, the architecture needs {needed}")


def unlike(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, dtype and shape found, those wanted) of every array that differs from `wanted`."""
    for name, one in wanted.items():
        if found[name].shape != one.shape or found[name].dtype != one.dtype:
            is_, needed = (f"{a.dtype}{list(a.shape)}" for a in (found[name], one))
            yield name, is_, needed


def _spec_from(path: pathlib.Path, header: str) -> ModelSpec:
    try:
        fields = parsed(header)
    except ValueError as error:
        raise StoreError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise StoreError(f"{path} is not a {FORMAT} file")
    if fields.get("version") != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {fields.get('version')!r}; this program reads {FORMAT_VERSION}"
        )
    architecture, arguments, shape = (fields.get(key) for key in ("architecture", "arguments", "input_shape"))
    if not isinstance(architecture, str) or not isinstance(arguments, dict):
        raise StoreError(f"{path}: the header names no architecture or no arguments")
    if not isinstance(shape, list) or len(shape) != 3:
        raise StoreError(f"{path}: the header has no input shape of three numbers")
    return ModelSpec(architecture, (shape[0], shape[1], shape[2]), arguments)
