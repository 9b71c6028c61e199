"""Checks of what `trace` and `from_weights` are given, with what to write instead."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

_TORCH = (
    "is a PyTorch module: export it, torch.onnx.export(model.eval(), (x[None],), 'net.onnx', dynamo=True) with one "
    "example x, then fn, spec = lipbounds.interop.load_onnx('net.onnx') and lb.trace(fn, "
    "jax.ShapeDtypeStruct(spec.shape, spec.dtype))"
)
_KERAS = (
    "is a Keras model: export it, model.export('net.onnx', format='onnx'), then fn, spec = "
    "lipbounds.interop.load_onnx('net.onnx')"
)
_LINEN = (
    "is a linen module without its parameters: close over them, "
    "lb.trace(lambda x: model.apply(variables, x[None])[0], X[0])"
)


def check_function(fn: Any) -> None:
    """TypeError where `fn` is no function of one example, with what to write instead."""
    what = _foreign(fn) or (None if callable(fn) else _not_callable(fn))
    if what is not None:
        raise TypeError(f"trace needs a function of one example, got {_named(fn)}, which {what}")


def check_example(x: Any) -> None:
    """TypeError where x is no array, with what to write instead."""
    if isinstance(x, tuple | list) and x and all(hasattr(each, "shape") for each in x):
        first = int(np.prod(x[0].shape)) if len(x[0].shape) != 1 else x[0].shape[0]
        raise TypeError(
            f"x is a {type(x).__name__} of {len(x)} arrays: bound one input with the others fixed, "
            "lambda x: fn(x, other), or all of them as one vector, "
            f"lambda x: fn(x[:{first}], x[{first}:])"
        )
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"x must be an array or a jax.ShapeDtypeStruct, got {type(x).__name__}")
    if type(x).__module__.partition(".")[0] == "torch":
        raise TypeError("x is a PyTorch tensor: pass x.numpy()")


@contextlib.contextmanager
def explained(fn: Any, spec: Any) -> Iterator[None]:
    """Add to an error that the function itself raises what it was called with, and what to write for a batch.

    TypeError where the function takes several arguments.
    """
    try:
        yield
    except Exception as error:
        needed = _arguments(fn)
        if isinstance(error, TypeError) and "positional argument" in str(error) and len(needed) > 1:
            names = ", ".join(needed)
            raise TypeError(
                f"trace needs a function of one example, and {_named(fn)} takes {len(needed)} arguments ({names}): fix "
                f"all but the input in a function around it, such as lambda x: fn({names})"
            ) from error
        if _is_ours(error):
            raise
        error.add_note(
            f"lb.trace called the function with one example of shape {tuple(spec.shape)}; of a batch pass one row, "
            "X[0], and if it takes batches, trace lambda x: fn(x[None])[0]"
        )
        raise


def _is_ours(error: Exception) -> bool:
    """Whether this library raised the error."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals.get("__name__", "").startswith("lipbounds.")


def _foreign(fn: Any) -> str | None:
    """What a model of another library is, if it is callable and not of JAX."""
    torch, linen = sys.modules.get("torch.nn"), sys.modules.get("flax.linen")
    if torch is not None and isinstance(fn, torch.Module):
        return _TORCH
    if linen is not None and isinstance(fn, linen.Module) and fn.scope is None:
        return _LINEN
    if type(fn).__module__.partition(".")[0] in ("keras", "tensorflow"):
        return _KERAS
    return None


def _not_callable(fn: Any) -> str | None:
    if isinstance(fn, tuple) and hasattr(fn, "init") and hasattr(fn, "apply"):
        return (
            "holds init and apply, as haiku.transform returns them: lb.trace(lambda x: net.apply(params, None, "
            "x[None])[0], X[0])"
        )
    if isinstance(fn, tuple) and len(fn) == 2 and callable(fn[0]):
        return (
            "is a pair (fn, spec), as load_onnx returns it: fn, spec = load_onnx(path), then lb.trace(fn, "
            "jax.ShapeDtypeStruct(spec.shape, spec.dtype))"
        )
    if isinstance(fn, Mapping):
        return (
            "is a dict of parameters, not a function of one example: lb.trace(lambda x: model.apply(variables, "
            "x[None])[0], X[0]), or lb.from_weights for matrices"
        )
    if isinstance(fn, tuple | list) and any(hasattr(each, "shape") for each in fn):
        return "holds matrices: lb.from_weights(weights, biases)"
    return "is not callable"


def _arguments(fn: Any) -> list[str]:
    """The names of the arguments that a call must give by position; [] where they are not known."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def _named(fn: Any) -> str:
    return getattr(fn, "__name__", None) or type(fn).__name__


def check_layers(
    matrices: Sequence[Any], biases: Sequence[Any | None] | None, slopes: Sequence[Any] | None
) -> None:
    """ValueError unless the matrices, biases and slopes of `from_weights` fit together."""
    if not matrices:
        raise ValueError("from_weights needs at least one matrix")
    for i, w in enumerate(matrices):
        if w.ndim != 2:
            raise ValueError(f"weights[{i}] must be a matrix (out, in), got shape {w.shape}")
        if i and w.shape[1] != (before := matrices[i - 1].shape[0]):
            raise ValueError(
                f"weights[{i}] has {w.shape[1]} inputs, but weights[{i - 1}] has {before} outputs"
            )
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise ValueError(f"weights[{i}] must hold floating point numbers, got {w.dtype}")
    if biases is not None:
        if len(biases) != len(matrices):
            raise ValueError(f"{len(matrices)} matrices need {len(matrices)} biases, got {len(biases)}")
        for i, (w, b) in enumerate(zip(matrices, biases, strict=True)):
            if b is not None and np.shape(b) != w.shape[:1]:
                raise ValueError(f"biases[{i}] must have shape ({w.shape[0]},), got {np.shape(b)}")
    if slopes is not None and len(slopes) != len(matrices) - 1:
        raise ValueError(f"{len(matrices) - 1} hidden layers need as many slope pairs, got {len(slopes)}")
