"""ONNX files as JAX functions of one example. Needs the package `onnx`: pip install "lipbounds[onnx]"."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import onnx

    from lipbounds.interop._onnx_graph import Builder, Program

DROPS = ("softmax", "argmax")
_DROPPED = {"Softmax": "softmax", "LogSoftmax": "softmax", "ArgMax": "argmax"}


@dataclass(frozen=True)
class InputSpec:
    """Input and outputs of a network that was read from a file.

    name     of the graph's input
    shape    of one example, without a batch axis, in the layout of the graph
    dtype    of one example
    outputs  K, the number of outputs
    batch    whether the graph has a batch axis, which the function adds and removes
    opset    of the graph
    notes    changes to the graph and its layout, one sentence each
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    outputs: int
    batch: bool
    opset: int
    notes: tuple[str, ...] = ()


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["program", "spec"])
@dataclass(frozen=True, eq=False)
class OnnxNetwork:
    """One example of shape `spec.shape` -> outputs (K,), compiled once with the weights as arguments.

    A pytree whose leaves are the weights, by their names in the graph. Products and convolutions are computed at the
    highest precision (no TF32).
    """

    weights: dict[str, jax.Array]
    program: Program
    spec: InputSpec

    def __call__(self, x: Any) -> jax.Array:
        """Outputs (K,) of one example. ValueError for another shape or dtype."""
        from lipbounds.interop._onnx_graph import run

        if self.program.double and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
            raise ValueError(
                "this network computes in float64: use it, and trace it, within `with jax.enable_x64(True):`"
            )
        x = jnp.asarray(x)
        if tuple(x.shape) != self.spec.shape or x.dtype != self.spec.dtype:
            raise ValueError(
                f"the network takes one example of shape {self.spec.shape} and dtype {self.spec.dtype}, got "
                f"{tuple(x.shape)} and {x.dtype}; use jax.vmap for a batch"
            )
        return run(self.program, self.weights, x[None] if self.spec.batch else x).reshape(-1)


def load_onnx(
    path: str | os.PathLike[str],
    *,
    drop: str | Sequence[str] | None = None,
    shape: Sequence[int] | None = None,
    output: str | None = None,
    constants: Mapping[str, Any] | None = None,
) -> tuple[OnnxNetwork, InputSpec]:
    """The network of an ONNX file as a JAX function of one example, for `lb.trace` and anything else in JAX.

        fn, spec = load_onnx("net.onnx")
        form = lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))

    Opsets 7 and newer, up to those of the installed `onnx` whose operators this reader knows. Weights may lie in
    external files beside the model. No code is run. The graph is read in its own dtypes and layout, with a batch of one
    where it has a batch axis: a first axis that is free or 1, of an input with at least two axes. An output of another
    shape than (K,) is flattened in C order.

    Args:
        path: the file.
        drop: "softmax" or "argmax", or both: leave out the last operation if it is Softmax (or LogSoftmax) over all
            outputs, or ArgMax. Nothing is dropped unless asked. Softmax is refused by `lb.trace`, ArgMax here.
        shape: of one example, without the batch axis: needed where the file leaves axes of its input free.
        output: the name of the output, where the graph has several.
        constants: values of all inputs but one, by their names, where the graph has several: arrays in the shape of
            the graph, with a batch axis of 1 where it has one.

    Returns:
        (fn, spec). Weights are stored in `fn.weights`.

    Raises:
        ImportError: the package onnx is missing.
        FileNotFoundError: there is no such file.
        UnsupportedError: all unsupported operators at once, each with its node, reason and remedy.
        ValueError: not an ONNX file, cut off, external data missing or outside the model's folder, free axes,
            several inputs or outputs, constants that do not fit the graph's inputs, or nothing to drop.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError('load_onnx needs the package onnx: pip install "lipbounds[onnx]"') from error
    from lipbounds.interop import _onnx_file, _onnx_graph, _onnx_ops
    from lipbounds.interop._onnx_windows import OPERATORS  # those of _onnx_ops, and its own

    drops = [drop] if isinstance(drop, str) else list(drop or ())
    if unknown := [d for d in drops if d not in DROPS]:
        raise ValueError(f'drop must be "softmax", "argmax" or both, got {unknown[0]!r}')
    model, opset = _onnx_file.read_model(path)
    graph = model.graph
    _fix(graph, constants or {})
    source = _input(graph)
    dims = _sizes(source)
    if dims is None and shape is None:
        raise ValueError(
            f"the input {source.name!r} has no shape in the file: pass shape=, the shape of one example without the "
            "batch axis"
        )
    notes: list[str] = []
    target, dropped = _drop(graph, _output(graph, output), drops)
    batch, example = _example(graph, source, dims, shape, target)
    kind = source.type.tensor_type.elem_type
    known = kind in onnx.helper.get_all_tensor_dtypes()
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind) if known else object)
    if dtype.name not in _onnx_graph.FLOATS:
        raise ValueError(
            f"the input {source.name!r} holds {dtype.name}, which has no Lipschitz bounds: export with a float input"
        )
    builder = _onnx_graph.Builder(graph, opset, OPERATORS, _onnx_ops.EVALUATED, _onnx_ops.explain)
    whole = jax.ShapeDtypeStruct((1, *example) if batch else example, dtype)
    program, arrays = builder.build(source.name, whole, target)
    made = builder.values[target]
    if batch:
        notes.append(f"the batch axis of the input {source.name!r} {_text(dims)} is added and removed")
    notes += _layout(graph, source.name)
    notes += [_check_drop(node, builder, opset) for node in dropped]
    notes += _last(graph, target)
    kept = tuple(made.shape[1:]) if batch and made.shape[:1] == (1,) else tuple(made.shape)
    if len(kept) != 1:
        notes.append(f"the output {target!r} of shape {kept} is flattened")
    with jax.enable_x64(True):
        weights = {name: jnp.asarray(array) for name, array in arrays.items()}
    spec = InputSpec(source.name, example, dtype, math.prod(made.shape), batch, opset, tuple(notes))
    if not spec.outputs:
        raise ValueError(f"the output {target!r} has shape {tuple(made.shape)}: it is empty")
    return OnnxNetwork(weights, program, spec), spec


# --- inputs and outputs --------------------------------------------------------------------------------------------

Dims = list["int | str"]  # a size, or the name of a free axis ("" if it has none)


def _text(dims: Dims | None) -> str:
    return "(" + ", ".join(str(d) or "?" for d in dims or ()) + ")"


def _sizes(value: onnx.ValueInfoProto) -> Dims | None:
    """The declared axes; None where not even their number is declared."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [int(d.dim_value) if d.dim_value > 0 else str(d.dim_param) for d in kind.shape.dim]


def _fix(graph: onnx.GraphProto, constants: Mapping[str, Any]) -> None:
    """Make constants of the inputs that are given; ValueError where an array does not fit."""
    import onnx

    if not isinstance(constants, Mapping):
        raise TypeError(f"constants must be a mapping from names to arrays, got {type(constants).__name__}")
    inputs = {str(value.name): value for value in graph.input}
    for name, given in constants.items():
        if name not in inputs:
            raise ValueError(
                f"constants: the graph has no input {name!r}; it has {', '.join(map(repr, inputs))}"
            )
        kind = inputs[name].type.tensor_type.elem_type
        if kind not in onnx.helper.get_all_tensor_dtypes() or kind == onnx.TensorProto.STRING:
            raise ValueError(f"constants: the input {name!r} is not a tensor of numbers")
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
        value = np.asarray(given)
        dims = _sizes(inputs[name])
        if dims is not None and (
            len(dims) != value.ndim
            or any(isinstance(d, int) and d != n for d, n in zip(dims, value.shape, strict=True))
        ):
            raise ValueError(f"constants: {name!r} has shape {value.shape}, the graph takes {_text(dims)}")
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise ValueError(f"constants: {name!r} holds NaN")
        with np.errstate(all="ignore"):
            cast = value.astype(dtype) if value.dtype.kind in "biufV" else None
        if cast is None or not np.array_equal(cast.astype(value.dtype), value):
            raise ValueError(
                f"constants: {name!r} holds {value.dtype}, which are not exact in the graph's {dtype.name}"
            )
        for tensor in [t for t in graph.initializer if t.name == name]:
            graph.initializer.remove(tensor)
        graph.initializer.append(
            onnx.numpy_helper.from_array(np.ascontiguousarray(cast).reshape(value.shape), name)
        )


def _input(graph: onnx.GraphProto) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in graph.initializer}
    found = [value for value in graph.input if value.name not in constants]
    if not found:
        raise ValueError("every input of the graph is a constant: leave one of them free")
    if len(found) > 1:
        names = ", ".join(repr(value.name) for value in found)
        raise ValueError(
            f"one input is needed, the graph has {names}: give the others by constants={{name: array}} (--constant on "
            "the command line), or export with them as constants"
        )
    if not found[0].type.HasField("tensor_type"):
        raise ValueError(f"the input {found[0].name!r} is not a tensor: export with a tensor as input")
    return found[0]


def _output(graph: onnx.GraphProto, output: str | None) -> str:
    names = [str(value.name) for value in graph.output]
    if output is None and len(names) == 1:
        return names[0]
    if output is None or output not in names:
        if not names:
            raise ValueError("the graph has no outputs: export the model again")
        problem = "several outputs" if output is None else f"no output {output!r}"
        raise ValueError(
            f"the graph has {problem}: pass output= one of {', '.join(map(repr, names))} (--output on the command line)"
        )
    return output


def _example(
    graph: onnx.GraphProto,
    source: onnx.ValueInfoProto,
    dims: Dims | None,
    shape: Sequence[int] | None,
    target: str,
) -> tuple[bool, tuple[int, ...]]:
    """(whether there is a batch axis, the shape of one example)."""
    name = source.name
    if shape is not None:
        given = tuple(int(n) for n in shape)
        if any(n < 1 for n in given):
            raise ValueError(f"shape must hold positive numbers, got {given}")
        if dims is None:
            return True, given
        batch = len(dims) == len(given) + 1
        if len(dims[batch:]) != len(given) or any(
            isinstance(d, int) and d != n for d, n in zip(dims[batch:], given, strict=True)
        ):
            raise ValueError(
                f"shape={given} does not fit the input {name!r} {_text(dims)}, without its batch axis"
            )
        return batch, given
    assert dims is not None
    batch = len(dims) > 1 and (dims[0] == 1 or isinstance(dims[0], str))
    free = [i for i, d in enumerate(dims) if isinstance(d, str) and not (batch and i == 0)]
    if free:
        axis = f"axis {free[0]} ({dims[free[0]] or 'unnamed'!r})"
        known = ", ".join(str(d) or "?" for d in dims[batch:])
        raise ValueError(
            f"{axis} of the input {name!r} {_text(dims)} is free: pass shape=({known}) with numbers (--shape on the "
            "command line)"
        )
    sizes = [d for d in dims[batch:] if isinstance(d, int)]
    ends = [_sizes(value) or [] for value in graph.output]
    if not batch and len(sizes) > 1 and any(len(end) > 1 and end[0] == sizes[0] for end in ends):
        raise ValueError(
            f"the input {name!r} {_text(dims)} looks like a fixed batch of {sizes[0]}: pass shape={tuple(sizes[1:])} "
            f"if it is one, shape={tuple(sizes)} if it is not"
        )
    return batch, tuple(sizes)


# --- the last operation --------------------------------------------------------------------------------------------


def _maker(graph: onnx.GraphProto, name: str) -> onnx.NodeProto | None:
    """The node that makes a value, through Identity."""
    makers = {made: node for node in graph.node for made in node.output}
    node = makers.get(name)
    for _ in graph.node:  # a damaged graph may have a cycle
        if node is None or node.op_type != "Identity" or node.domain not in ("", "ai.onnx"):
            break
        node = makers.get(node.input[0]) if node.input else None
    return node


def _drop(graph: onnx.GraphProto, output: str, drops: list[str]) -> tuple[str, list[onnx.NodeProto]]:
    """(the value before the operations that are to be dropped, these operations)."""
    dropped: list[onnx.NodeProto] = []
    left = set(drops)
    while left:
        node = _maker(graph, output)
        kind = _DROPPED.get(node.op_type) if node is not None and node.domain in ("", "ai.onnx") else None
        if node is None or kind not in left or not node.input:
            last = "the input" if node is None else f"{node.op_type} (node {node.name or node.output[0]!r})"
            raise ValueError(f"drop={'+'.join(sorted(left))!r}: the last operation is {last}; leave drop out")
        left.remove(kind)
        dropped.append(node)
        output = str(node.input[0])
    return output, dropped


def _check_drop(node: onnx.NodeProto, builder: Builder, opset: int) -> str:
    """The note about a dropped node; ValueError if it did not act on all outputs together."""
    from lipbounds.interop import _onnx_ops

    shape = builder.values[node.input[0]].shape if node.input[0] in builder.values else None
    label = f"the last operation, {node.op_type} (node {node.name or node.output[0]!r}),"
    if shape is not None:
        axis = next((int(a.i) for a in node.attribute if a.name == "axis"), None)
        rank = len(shape)
        version = 13 if node.op_type == "ArgMax" else opset
        axes = _onnx_ops.softmax_axes(version, axis or 0 if node.op_type == "ArgMax" else axis, rank)
        if math.prod(shape[a] for a in axes) != math.prod(shape):
            raise ValueError(
                f"{label} acts along axes {axes} of shape {tuple(shape)}, not on all outputs: not dropped"
            )
    return f"{label} was dropped: the outputs are its inputs"


def _last(graph: onnx.GraphProto, target: str) -> list[str]:
    node = _maker(graph, target)
    if node is None or node.op_type not in ("Softmax", "LogSoftmax"):
        return []
    if node.op_type == "LogSoftmax":
        return [
            "the outputs are those of LogSoftmax: differences of classes are those of its inputs, "
            'each output alone has a larger constant; drop="softmax" leaves it out'
        ]
    return [f'the outputs are those of {node.op_type}, which lb.trace refuses: drop="softmax" leaves it out']


def _layout(graph: onnx.GraphProto, name: str) -> list[str]:
    """A note where the input is transposed before anything else."""
    readers = [node for node in graph.node if name in node.input]
    if len(readers) != 1 or readers[0].op_type != "Transpose":
        return []
    order = [list(a.ints) for a in readers[0].attribute if a.name == "perm"]
    return [f"the input is transposed first, by {tuple(order[0]) if order else 'reversing its axes'}"]
