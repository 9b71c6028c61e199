"""From an ONNX graph to a list of steps: constants are evaluated, shapes are static, unsupported nodes are refused.

Every value of the graph is a NumPy array if it does not depend on the input, and a shape and dtype if it does. A node
of constants only is evaluated once: what moves entries and computes shapes by `onnx.reference`, in NumPy. Every other
node becomes a step, a JAX function of the operands that are arrays; attributes, and inputs that say *how* (axes,
shapes, pads, indices), are plain numbers in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from lipbounds.errors import Unsupported, UnsupportedError

Apply = Callable[..., Any]
Const = np.ndarray
MOST = 2**28  # entries of a tensor: a damaged file must not take all memory
FLOATS = ("float16", "bfloat16", "float32", "float64")
BOOLEAN = ("Where", "Not", "And", "Or", "Xor", "Cast", "Identity")  # take what a comparison gives


def check_size(shape: Sequence[int]) -> None:
    """ValueError for a tensor that only a damaged file would hold."""
    if math.prod(int(n) for n in shape) > MOST:
        raise ValueError(f"it makes a tensor of shape {tuple(shape)}, more than {MOST} entries")


class Refused(Exception):
    """A node that cannot be read: reason and remedy."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy


@dataclass
class Node:
    """One node as its operator reads it; `version` is the opset in which this form of the operator came."""

    proto: onnx.NodeProto
    version: int
    inputs: list[Const | jax.ShapeDtypeStruct | None]
    attributes: dict[str, Any]
    static: set[int] = field(default_factory=set)  # inputs that became plain numbers

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def choice(self, name: str, *allowed: str) -> str:
        """An attribute out of several words; the first is the default."""
        value = self.attr(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"its {name} is {value!r}, not one of {', '.join(allowed)}")
        return value

    def has(self, i: int) -> bool:
        return i < len(self.inputs) and self.inputs[i] is not None

    def outputs(self) -> int:
        """How many outputs are asked for."""
        return sum(1 for name in self.proto.output if name)

    def shape(self, i: int = 0) -> tuple[int, ...]:
        return tuple(int(n) for n in self._input(i).shape)

    def dtype(self, i: int = 0) -> np.dtype:
        return np.dtype(self._input(i).dtype)

    def constant(self, i: int, what: str) -> Const:
        """Input i as an array that is known now."""
        value = self._input(i)
        if isinstance(value, jax.ShapeDtypeStruct):
            raise Refused(
                f"its {what} depends on the network's input", f"export the model with a constant {what}"
            )
        self.static.add(i)
        return value

    def ints(self, i: int, what: str) -> tuple[int, ...]:
        return tuple(int(n) for n in self.constant(i, what).ravel())

    def scalar(self, i: int, what: str) -> float:
        value = self.constant(i, what)
        if value.size != 1:
            raise Refused(f"its {what} is not one number", "export the model again")
        return float(value.item())

    def axes(self, i: int, since: int) -> tuple[int, ...] | None:
        """The attribute `axes`, which is input i from version `since` on; None where there is none."""
        if self.version >= since:
            return self.ints(i, "axes") if self.has(i) else None
        axes = self.attr("axes")
        return None if axes is None else tuple(int(a) for a in axes)

    def axis(self, axis: int, rank: int | None = None) -> int:
        """An axis counted from the front."""
        rank = len(self.shape()) if rank is None else rank
        if not -rank <= axis < rank:
            raise ValueError(f"axis {axis} of {rank} axes")
        return axis % rank

    def _input(self, i: int) -> Const | jax.ShapeDtypeStruct:
        value = self.inputs[i] if i < len(self.inputs) else None
        if value is None:
            raise ValueError(f"input {i} is missing")
        return value


@dataclass(frozen=True)
class Operator:
    """How a node becomes a function of its operands. `newest`: the last version of the operator that was read."""

    build: Callable[[Node], Apply]
    newest: int


@dataclass(frozen=True, eq=False)
class Step:
    apply: Apply
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    scope: str


@dataclass(frozen=True, eq=False)
class Program:
    """The steps from the input to the output, in order; hashed by identity, so that jit compiles it once."""

    input: str
    output: str
    steps: tuple[Step, ...]
    double: bool  # holds float64


@partial(jax.jit, static_argnames="program")
def run(program: Program, weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """The output of the graph at x, in the shape of the graph."""
    values: dict[str, Any] = {**weights, program.input: x}
    for step in program.steps:
        with jax.named_scope(step.scope):
            out = step.apply(*(values[name] for name in step.inputs))
        values.update(zip(step.outputs, out if isinstance(out, (list, tuple)) else (out,), strict=False))
    return values[program.output]


@dataclass
class Builder:
    """Reads the nodes that the output needs, and collects all refusals."""

    graph: onnx.GraphProto
    opset: int
    operators: Mapping[str, Operator]
    evaluated: frozenset[str]  # operators that onnx.reference evaluates on constants
    # (operator, domain) -> why it is not supported, and what to do
    explain: Callable[[str, str], tuple[str, str]]
    values: dict[str, Const | jax.ShapeDtypeStruct] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    refused: list[Unsupported] = field(default_factory=list)
    used: set[str] = field(default_factory=set)  # names that some node reads
    context: Any = field(default_factory=onnx.checker.C.CheckerContext)

    def build(self, name: str, x: jax.ShapeDtypeStruct, output: str) -> tuple[Program, dict[str, Const]]:
        """(program, weights by name) of `output` as a function of the input `name`.

        Raises:
            UnsupportedError: everything that cannot be read, at once.
            ValueError: nodes whose inputs do not fit, or an output that does not depend on the input.
        """
        for tensor in self.graph.initializer:
            try:
                if min(tensor.dims, default=0) < 0:
                    raise ValueError(f"its shape is {list(tensor.dims)}")
                self.values[tensor.name] = onnx.numpy_helper.to_array(tensor)
            except Exception as error:  # to_array has no error of its own
                raise ValueError(
                    f"initializer {tensor.name!r} is corrupt: {error}; export the model again"
                ) from error
        self.values[name] = x
        self.context.ir_version, self.context.opset_imports = onnx.IR_VERSION, {"": self.opset}
        unread: set[str] = set()  # what a refused node would have made
        nodes = needed(self.graph.node, output)
        self.used = {output}.union(*(proto.input for proto in nodes))
        with jax.enable_x64(True):  # shapes are int64, and float64 graphs stay so
            for proto in nodes:
                if unread & set(proto.input):
                    unread.update(proto.output)
                    self.refuse_by_name(proto)
                elif not self.read(proto):
                    unread.update(proto.output)
        if self.refused:
            raise UnsupportedError(self.refused)
        if not isinstance(self.values.get(output), jax.ShapeDtypeStruct):
            raise ValueError(
                f"the output {output!r} does not depend on the input {name!r}; name another output"
            )
        if np.dtype(self.values[output].dtype).name not in FLOATS:
            raise ValueError(
                f"the output {output!r} holds {self.values[output].dtype}, which has no Lipschitz bounds; name another "
                "output"
            )
        steps = needed(self.steps, output)
        weights = {n: v for s in steps for n in s.inputs if isinstance(v := self.values[n], np.ndarray)}
        involved = [self.values[n] for s in steps for n in (*s.inputs, *s.outputs) if n in self.values]
        double = any(v.dtype == np.float64 for v in involved)
        return Program(name, output, tuple(steps), double), weights

    def refuse(self, proto: onnx.NodeProto, reason: str, remedy: str) -> None:
        domain = proto.domain or "ai.onnx"
        where = f"node {proto.name or proto.output[0]!r} (domain {domain}, opset {self.opset})"
        self.refused.append(Unsupported(proto.op_type, where, self.declared(proto.output[0]), reason, remedy))

    def declared(self, name: str) -> tuple[int, ...]:
        """The shape that the file declares for a value; () where it declares none, 0 for a free axis."""
        for info in (*self.graph.value_info, *self.graph.output):
            if info.name == name:
                return tuple(int(d.dim_value) for d in info.type.tensor_type.shape.dim)
        return ()

    def refuse_by_name(self, proto: onnx.NodeProto) -> bool:
        """Whether the operator is not supported, whatever its inputs are; then it is noted."""
        own = proto.domain in ("", "ai.onnx")
        if own and proto.op_type not in self.operators and proto.op_type in self.evaluated:
            return False
        known = self.operators.get(proto.op_type) if own else None
        if known is None or not onnx.defs.has(proto.op_type, self.opset, ""):
            self.refuse(proto, *self.explain(proto.op_type, proto.domain))
            return True
        schema = onnx.defs.get_schema(proto.op_type, self.opset, "")
        if schema.deprecated or schema.since_version > known.newest:
            new = f"has version {schema.since_version}, which is too new"
            reason = "is deprecated" if schema.deprecated else new
            self.refuse(proto, f"at opset {self.opset} this operator {reason}", "export with an older opset")
            return True
        return False

    def read(self, proto: onnx.NodeProto) -> bool:
        """Make the outputs of one node; False where it is refused."""
        if self.refuse_by_name(proto):
            return False
        label = f"node {proto.name or proto.output[0]!r} ({proto.op_type})"
        missing = [n for n in proto.input if n and n not in self.values]
        again = [n for n in proto.output if n in self.values]
        if again:
            raise ValueError(
                f"{label}: it makes {again[0]!r}, which the graph has already; the graph is not valid"
            )
        try:
            onnx.checker.check_node(proto, self.context)
        except onnx.checker.ValidationError as error:
            raise ValueError(f"{label}: {str(error).strip().splitlines()[0]}") from error
        if missing:
            raise ValueError(
                f"{label}: nothing makes its input {missing[0]!r}; the graph is incomplete or not sorted"
            )
        inputs = [self.values[n] if n else None for n in proto.input]
        if mixed := self.mixed(proto, inputs):
            raise ValueError(f"{label}: its inputs must hold one type, and hold {' and '.join(mixed)}")
        made: Sequence[Const | jax.ShapeDtypeStruct]
        free = [v for v in inputs if isinstance(v, jax.ShapeDtypeStruct)]
        try:
            if proto.op_type in ("Shape", "Size"):
                made = [_shape(proto, tuple(inputs[0].shape))] if inputs[0] is not None else []
            elif not free and proto.op_type in self.evaluated:
                made = evaluate(proto, self.opset, [v for v in inputs if isinstance(v, np.ndarray)])
            elif proto.op_type not in self.operators:
                raise Refused(*self.explain(proto.op_type, proto.domain))
            else:
                made = self.step(proto, inputs)
        except Refused as refused:
            self.refuse(proto, refused.reason, refused.remedy)
            return False
        except (TypeError, ValueError, LookupError, ArithmeticError, MemoryError) as error:
            shapes = ", ".join(str(tuple(v.shape)) for v in inputs if v is not None)
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{label}: it does not fit its inputs, of shapes {shapes}: {first}") from error
        if self.used.intersection(n for n in proto.output[len(made) :] if n):
            self.refuse(proto, "only its first output is read", "export the model without its other outputs")
            return False
        self.values.update((n, v) for n, v in zip(proto.output, made, strict=False) if n)
        return True

    def mixed(
        self, proto: onnx.NodeProto, inputs: Sequence[Const | jax.ShapeDtypeStruct | None]
    ) -> list[str]:
        """The types of inputs that ONNX wants to be of one type, which are promoted nowhere; [] where they are."""
        formal = onnx.defs.get_schema(proto.op_type, self.opset, "").inputs
        held: dict[str, set[str]] = {}
        for i, value in enumerate(inputs):
            declared = formal[min(i, len(formal) - 1)]
            if value is not None and declared.is_homogeneous:
                held.setdefault(declared.type_str, set()).add(np.dtype(value.dtype).name)
        return next((sorted(names) for names in held.values() if len(names) > 1), [])

    def step(
        self, proto: onnx.NodeProto, inputs: list[Const | jax.ShapeDtypeStruct | None]
    ) -> Sequence[Const | jax.ShapeDtypeStruct]:
        """A step of the program, or its value where nothing depends on the input."""
        version = onnx.defs.get_schema(proto.op_type, self.opset, "").since_version
        node = Node(proto, version, inputs, {a.name: _attribute(a) for a in proto.attribute})
        apply = self.operators[proto.op_type].build(node)
        named = enumerate(zip(proto.input, inputs, strict=True))
        present = [(n, v) for i, (n, v) in named if i not in node.static and v is not None]
        free = any(isinstance(v, jax.ShapeDtypeStruct) for _, v in present)
        known = (*FLOATS, "bool") if proto.op_type in BOOLEAN else FLOATS
        wrong = next((v.dtype for _, v in present if np.dtype(v.dtype).name not in known), None)
        if free and wrong is not None:
            reason = f"it computes with the network's input and {wrong}"
            raise Refused(reason, "keep the network in floating point")
        shapes = jax.eval_shape(apply, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for _, v in present))
        made = list(shapes) if isinstance(shapes, (list, tuple)) else [shapes]
        for value in made:
            check_size(value.shape)
        if not free:
            out = apply(*(jnp.asarray(v) for _, v in present))
            return [np.asarray(v) for v in (out if isinstance(out, (list, tuple)) else (out,))]
        scope = (proto.name or proto.output[0]).strip("/")
        names = tuple(n for n, _ in present)
        self.steps.append(Step(apply, names, tuple(proto.output), f"{scope}:{proto.op_type}"))
        return made


def needed(nodes: Sequence[Any], output: str) -> list[Any]:
    """The nodes that a value is made of, in order: onnx nodes by `.input` and `.output`, or steps."""
    names, kept = {output}, []
    for node in reversed(nodes):
        made, read = (node.outputs, node.inputs) if isinstance(node, Step) else (node.output, node.input)
        if names.intersection(n for n in made if n):
            names.update(n for n in read if n)
            kept.append(node)
    return kept[::-1]


def evaluate(proto: onnx.NodeProto, opset: int, inputs: Sequence[Const]) -> list[Const]:
    """The outputs of a node of constants."""
    if any(a.name == "sparse_value" for a in proto.attribute):
        raise Refused("it is a sparse constant", "export the model with dense constants")
    check_size(_grown(proto, inputs))
    names = dict.fromkeys(n for n in proto.input if n)
    graph = onnx.helper.make_graph(
        [proto],
        "constant",
        [onnx.helper.make_empty_tensor_value_info(n) for n in names],
        [onnx.helper.make_empty_tensor_value_info(n) for n in proto.output if n],
    )
    feeds = dict(zip((n for n in proto.input if n), inputs, strict=True))
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            # NumPy warns of constants that overflow, and trace refuses those that are not finite.
            warnings.simplefilter("ignore")
            made = ReferenceEvaluator(graph, opsets={"": opset}).run(None, feeds)
    except Exception as error:  # the evaluator has no error of its own
        raise ValueError(f"it cannot be evaluated on constants: {error}") from error
    found = [np.asarray(v) for v in made]
    if found[0].dtype.name in ("int4", "uint4", "int2", "uint2") and proto.op_type in ("Cast", "CastLike"):
        if not np.array_equal(found[0].astype(np.float64), inputs[0].astype(np.float64)):
            reason = f"the standard cuts constants off to {found[0].dtype.name}, and onnxruntime rounds them"
            raise Refused(reason, "export the model with constants that are whole numbers in range")
    return found


def _grown(proto: onnx.NodeProto, inputs: Sequence[Const]) -> Sequence[int]:
    """The shape that a node of constants makes, or one that is not smaller."""
    sizes = [v.size for v in inputs]
    if proto.op_type == "ConstantOfShape":
        return inputs[0].ravel().tolist()
    if proto.op_type == "Range":
        start, limit, delta = (float(v) for v in inputs)
        return (max(math.ceil((limit - start) / delta), 0),)
    if proto.op_type == "Gather":
        axis = next((a.i for a in proto.attribute if a.name == "axis"), 0)
        return (sizes[0] // max(inputs[0].shape[axis], 1), sizes[1])
    if proto.op_type == "Concat":
        return (sum(sizes),)
    try:
        return np.broadcast_shapes(*(v.shape for v in inputs))
    except ValueError:  # not an elementwise operator; the others make nothing larger
        return ()


def _shape(proto: onnx.NodeProto, shape: tuple[int, ...]) -> Const:
    if proto.op_type == "Size":
        return np.asarray(np.prod(shape, dtype=np.int64))
    attributes = {a.name: a.i for a in proto.attribute}
    return np.asarray(shape[slice(attributes.get("start", 0), attributes.get("end"))], np.int64)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return value
