"""The supported operators: elementwise, products, shapes, reductions. Windows stand in `_onnx_windows.py`.

A builder takes a node and returns the function of its operands. It may refuse (`Refused`), and it may fail with a
ValueError or TypeError where the node does not fit its inputs. Definitions: the operator specifications of ONNX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax import lax

from lipbounds.interop._onnx_graph import FLOATS, Apply, Node, Operator, Refused

OPERATORS: dict[str, Operator] = {}
_HIGHEST = lax.Precision.HIGHEST


def operator(newest: int, *names: str) -> Callable[[Callable[[Node], Apply]], Callable[[Node], Apply]]:
    """Put a builder into the table; `newest` is the last version of the operator that it was written for."""

    def enter(build: Callable[[Node], Apply]) -> Callable[[Node], Apply]:
        OPERATORS.update((name, Operator(build, newest)) for name in names)
        return build

    return enter


# --- elementwise ---------------------------------------------------------------------------------------------------


def _fixed(**table: tuple[int, Apply]) -> None:
    for name, (newest, apply) in table.items():
        OPERATORS[name] = Operator(functools.partial(_constant, apply), newest)


def _constant(apply: Apply, node: Node) -> Apply:
    return apply


def _numbers(newest: int, name: str, apply: Callable[..., Any], **defaults: float) -> None:
    """A function of one tensor and of attributes that are numbers."""
    operator(newest, name)(
        lambda node: functools.partial(apply, **{k: float(node.attr(k, d)) for k, d in defaults.items()})
    )


def _fold(function: Callable[[Any, Any], Any]) -> Apply:
    return lambda *operands: functools.reduce(function, operands)


def _hard_sigmoid(x: Any, alpha: float, beta: float) -> Any:
    return jnp.minimum(jnp.maximum(alpha * x + beta, 0), 1)


_fixed(
    Relu=(14, lambda x: jnp.maximum(x, 0)),
    Sigmoid=(13, jax.nn.sigmoid),
    Tanh=(13, jnp.tanh),
    Softplus=(22, jax.nn.softplus),
    Softsign=(22, jax.nn.soft_sign),
    Mish=(22, jax.nn.mish),
    HardSwish=(22, lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5)),
    PRelu=(16, lambda x, slope: jnp.where(x >= 0, x, slope * x)),
    Add=(14, jnp.add),
    Sub=(14, jnp.subtract),
    Mul=(14, jnp.multiply),
    Div=(14, jnp.divide),
    Neg=(13, jnp.negative),
    Abs=(13, jnp.abs),
    Sum=(13, _fold(jnp.add)),
    Mean=(13, lambda *operands: functools.reduce(jnp.add, operands) / len(operands)),
    Max=(13, _fold(jnp.maximum)),
    Min=(13, _fold(jnp.minimum)),
    Identity=(25, lambda x: x),
    Erf=(13, lax.erf),
    Exp=(13, jnp.exp),
    Log=(13, jnp.log),
    Sqrt=(13, jnp.sqrt),
    Reciprocal=(13, lambda x: 1 / x),
    Sin=(22, jnp.sin),
    Cos=(22, jnp.cos),
    Atan=(22, jnp.arctan),
    # Whether a choice by them is continuous is decided where the network is traced.
    Greater=(13, jnp.greater),
    Less=(13, jnp.less),
    GreaterOrEqual=(16, jnp.greater_equal),
    LessOrEqual=(16, jnp.less_equal),
    Not=(1, jnp.logical_not),
    And=(7, jnp.logical_and),
    Or=(7, jnp.logical_or),
    Xor=(7, jnp.logical_xor),
)
_numbers(16, "LeakyRelu", lambda x, alpha: jnp.where(x >= 0, x, alpha * x), alpha=0.01)
_numbers(22, "Elu", lambda x, alpha: jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0))), alpha=1.0)
_numbers(
    22,
    "Selu",
    lambda x, alpha, gamma: gamma * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0))),
    alpha=1.67326319217681884765625,
    gamma=1.05070102214813232421875,
)
_numbers(22, "HardSigmoid", _hard_sigmoid, alpha=0.2, beta=0.5)
_numbers(22, "ThresholdedRelu", lambda x, alpha: jnp.where(x > alpha, x, 0), alpha=1.0)
_numbers(24, "Swish", lambda x, alpha: x * jax.nn.sigmoid(alpha * x), alpha=1.0)


@operator(28, "Celu")
def _celu(node: Node) -> Apply:
    alpha = float(node.attr("alpha", 1.0))
    if not alpha > 0:
        raise Refused(f"its alpha is {alpha}, and the function is not continuous", "use alpha > 0")
    return lambda x: jnp.maximum(x, 0) + alpha * jnp.expm1(jnp.minimum(x, 0) / alpha)


@operator(20, "Gelu")
def _gelu(node: Node) -> Apply:
    return functools.partial(jax.nn.gelu, approximate=node.choice("approximate", "none", "tanh") == "tanh")


@operator(13, "Clip")
def _clip(node: Node) -> Apply:
    low: float | None
    high: float | None
    if node.version < 11:
        low, high = node.attr("min"), node.attr("max")
    else:
        low = node.scalar(1, "minimum") if node.has(1) else None
        high = node.scalar(2, "maximum") if node.has(2) else None

    def apply(x: Any) -> Any:
        x = x if low is None else jnp.maximum(x, low)
        return x if high is None else jnp.minimum(x, high)

    return apply


@operator(15, "Pow")
def _pow(node: Node) -> Apply:
    if isinstance(node.inputs[1], np.ndarray) and node.inputs[1].size == 1:
        exponent = node.scalar(1, "exponent")
        shape = np.broadcast_shapes(node.shape(0), node.shape(1))
        power = int(exponent) if exponent.is_integer() and abs(exponent) < 64 else exponent
        return lambda x: jnp.broadcast_to(x**power, shape)
    return lambda x, y: jnp.power(x, y.astype(x.dtype))


@operator(28, "Cast")
def _cast(node: Node) -> Apply:
    return _casting(onnx.helper.tensor_dtype_to_np_dtype(int(node.attr("to"))))


@operator(25, "CastLike")
def _cast_like(node: Node) -> Apply:
    node.static.add(1)
    return _casting(node.dtype(1))


def _casting(to: np.dtype) -> Apply:
    if to.name not in FLOATS:
        raise Refused(
            f"x becomes {to.name} here: the output jumps or is not a number",
            "keep the network in floating point",
        )
    return lambda x: x.astype(to)


@operator(22, "Dropout")
def _dropout(node: Node) -> Apply:
    if node.has(1):
        node.static.add(1)
    if node.has(2) and node.constant(2, "training mode").any():
        remedy = "export in evaluation mode: model.eval()"
        raise Refused("Dropout in training mode draws a random mask", remedy)
    return lambda x: x


@operator(15, "BatchNormalization")
def _batch_normalization(node: Node) -> Apply:
    if node.attr("training_mode", 0) if node.version >= 14 else node.outputs() > 1:
        raise Refused(
            "BatchNormalization in training mode divides by statistics of its input",
            "export in evaluation mode: model.eval()",
        )
    if not node.attr("spatial", 1):
        raise Refused("BatchNormalization with spatial=0 is not supported", "export with opset 9 or newer")
    eps = float(node.attr("epsilon", 1e-5))
    if any(node.shape(i) != node.shape()[1:2] for i in range(1, 5)):
        raise ValueError(f"its statistics do not have the {node.shape()[1:2]} channels of its input")
    channels = (-1,) + (1,) * (len(node.shape()) - 2)

    def apply(x: Any, scale: Any, bias: Any, mean: Any, variance: Any) -> Any:
        wide = jnp.result_type(x, scale, bias, mean, variance)
        x_, scale, bias, mean, variance = (a.astype(wide) for a in (x, scale, bias, mean, variance))
        factor = scale / jnp.sqrt(variance + eps)
        offset = bias - mean * factor
        return (x_ * factor.reshape(channels) + offset.reshape(channels)).astype(x.dtype)

    return apply


@operator(16, "Where")
def _where(node: Node) -> Apply:
    if not isinstance(node.inputs[0], np.ndarray):
        return jnp.where
    condition = node.constant(0, "condition")
    return lambda x, y: jnp.where(condition, x, y)


# --- products ------------------------------------------------------------------------------------------------------


@operator(13, "MatMul")
def _matmul(node: Node) -> Apply:
    return functools.partial(jnp.matmul, precision=_HIGHEST)


@operator(13, "Gemm")
def _gemm(node: Node) -> Apply:
    alpha, beta = float(node.attr("alpha", 1.0)), float(node.attr("beta", 1.0))
    left, right = bool(node.attr("transA", 0)), bool(node.attr("transB", 0))
    if len(node.shape(0)) != 2 or len(node.shape(1)) != 2:
        raise ValueError("its factors are not matrices")

    def apply(a: Any, b: Any, c: Any = None) -> Any:
        out = jnp.matmul(a.T if left else a, b.T if right else b, precision=_HIGHEST)
        out = out if alpha == 1 else alpha * out
        return out if c is None else out + (c if beta == 1 else beta * c)

    return apply


# --- shapes --------------------------------------------------------------------------------------------------------


@operator(25, "Flatten")
def _flatten(node: Node) -> Apply:
    shape, axis = node.shape(), int(node.attr("axis", 1))
    axis = axis if axis == len(shape) else node.axis(axis)
    return lambda x: x.reshape(int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))


@operator(25, "Reshape")
def _reshape(node: Node) -> Apply:
    wanted, shape = node.ints(1, "shape"), node.shape()
    if not node.attr("allowzero", 0):
        wanted = tuple(shape[i] if n == 0 else n for i, n in enumerate(wanted))
    return lambda x: x.reshape(wanted)


@operator(25, "Transpose")
def _transpose(node: Node) -> Apply:
    order = node.attr("perm")
    return lambda x: jnp.transpose(x, None if order is None else tuple(int(i) for i in order))


@operator(25, "Squeeze")
def _squeeze(node: Node) -> Apply:
    axes = node.axes(1, 13)
    return lambda x: jnp.squeeze(x, axes)


@operator(25, "Unsqueeze")
def _unsqueeze(node: Node) -> Apply:
    axes = node.axes(1, 13)
    if axes is None:
        raise ValueError("its axes are missing")
    return lambda x: jnp.expand_dims(x, axes)


@operator(13, "Concat")
def _concat(node: Node) -> Apply:
    axis = int(node.attr("axis"))
    return lambda *operands: jnp.concatenate(operands, axis)


@operator(13, "Slice")
def _slice(node: Node) -> Apply:
    if node.version < 10:
        starts, ends, axes, steps = (node.attr(name) for name in ("starts", "ends", "axes", "steps"))
    else:
        starts, ends = node.ints(1, "starts"), node.ints(2, "ends")
        axes = node.ints(3, "axes") if node.has(3) else None
        steps = node.ints(4, "steps") if node.has(4) else None
    axes = range(len(starts)) if axes is None else axes
    window = [slice(None)] * len(node.shape())
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        place = node.axis(int(axis))
        if window[place] != slice(None):
            raise ValueError(f"axis {place} is sliced twice")
        # a start before the first entry is the first entry, also backwards, where NumPy takes nothing
        window[place] = slice(max(int(start), -node.shape()[place]), int(end), int(step))
    return lambda x: x[tuple(window)]


@operator(18, "Split")
def _split(node: Node) -> Apply:
    axis, count = node.axis(int(node.attr("axis", 0))), len(node.proto.output)
    size = node.shape()[axis]
    sizes: Sequence[int] | None = node.attr("split")
    if node.has(1):  # an attribute up to version 11
        sizes = node.ints(1, "split")
    if sizes is None:
        width = -(-size // count)  # from version 18 on the last part may be smaller
        if node.version < 18 and size % count:
            raise ValueError(f"{size} entries cannot be split into {count} equal parts")
        sizes = [width] * (count - 1) + [size - width * (count - 1)]
    if sum(sizes) != size or min(sizes) < 0 or len(sizes) != count:
        raise ValueError(f"{size} entries cannot be split into {list(sizes)} for {count} outputs")
    return lambda x: jnp.split(x, np.cumsum(sizes)[:-1].tolist(), axis)


@operator(13, "Expand")
def _expand(node: Node) -> Apply:
    shape = np.broadcast_shapes(node.shape(), node.ints(1, "shape"))
    return lambda x: jnp.broadcast_to(x, shape)


@operator(13, "Tile")
def _tile(node: Node) -> Apply:
    repeats = node.ints(1, "repeats")
    if min(repeats, default=0) < 0:
        raise ValueError(f"repeats are {list(repeats)}")
    return lambda x: jnp.tile(x, repeats)


@operator(13, "Gather")
def _gather(node: Node) -> Apply:
    axis = node.axis(int(node.attr("axis", 0)))
    index, size = node.constant(1, "indices"), node.shape()[axis]
    if index.size and not (-size <= index.min() and index.max() < size):
        raise ValueError(f"an index from {index.min()} to {index.max()} is outside its {size} entries")
    entries = np.where(index < 0, index + size, index).astype(np.int32)
    return lambda x: jnp.take(x, entries, axis, mode="clip")


# --- reductions ----------------------------------------------------------------------------------------------------


def _reduction(newest: int, name: str, function: Callable[..., Any], axes_since: int) -> None:
    def build(node: Node) -> Apply:
        axes = node.axes(1, axes_since)
        if not axes and node.attr("noop_with_empty_axes", 0):
            return lambda x: x
        return lambda x: function(x, axis=axes or None, keepdims=bool(node.attr("keepdims", 1)))

    operator(newest, name)(build)


_reduction(18, "ReduceMean", jnp.mean, 18)
_reduction(13, "ReduceSum", jnp.sum, 13)
_reduction(20, "ReduceMax", jnp.max, 18)
_reduction(20, "ReduceMin", jnp.min, 18)


def softmax_axes(version: int, axis: int | None, rank: int) -> tuple[int, ...]:
    """The axes over which Softmax and LogSoftmax normalise: one from version 13 on, all from `axis` on before."""
    axis = (-1 if version >= 13 else 1) if axis is None else axis
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of {rank} axes")
    return (axis % rank,) if version >= 13 else tuple(range(axis % rank, rank))


@operator(13, "Softmax", "LogSoftmax")
def _softmax(node: Node) -> Apply:
    function = jax.nn.softmax if node.proto.op_type == "Softmax" else jax.nn.log_softmax
    axes = softmax_axes(node.version, node.attr("axis"), len(node.shape()))
    return lambda x: function(x, axis=axes)


# --- constants and unsupported operators ------------------------------------------------------------------------------

#: Evaluated by onnx.reference where nothing depends on the input; integers divide as integers there.
EVALUATED = frozenset(
    """Shape Size Constant ConstantOfShape Range Gather GatherElements ScatterND ScatterElements Concat Split
    Reshape Squeeze Unsqueeze Transpose Flatten Identity Cast CastLike Where Equal Greater Less GreaterOrEqual
    LessOrEqual Not And Or Xor Add Sub Mul Div Mod Neg Abs Sign Floor Ceil Round Sqrt Reciprocal Pow Exp Log Max Min Sum
    ReduceSum ReduceProd ReduceMax ReduceMin ReduceMean NonZero CumSum Trilu
    """.split()
)
_CUT = "cut the network off before this node with onnx.utils.extract_model"
_JUMPS = (
    "where its operands depend on the network's input its output jumps, so it has no Lipschitz constant",
    f"use it on constants only, or {_CUT}",
)
_REASONS: dict[tuple[str, ...], tuple[str, str]] = {
    ("If", "Loop", "Scan", "SequenceMap"): (
        "control flow is not supported",
        "unroll it: export by tracing with a fixed input shape",
    ),
    (
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
        "ConvInteger", "MatMulInteger",
    ): ("quantised arithmetic rounds, so its output jumps", "use the model before quantisation"),
    (
        "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "LRN",
        "LpNormalization", "MeanVarianceNormalization",
    ): (
        "it divides by statistics of its input, so it has no Lipschitz constant over the whole space",
        "use BatchNormalization in evaluation mode, or no normalisation",
    ),
    ("LSTM", "GRU", "Attention", "LinearAttention", "SwiGLU"): (
        "gates and attention multiply tensors that both depend on the input",
        f"{_CUT}, or use a network without it",
    ),
    (
        "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial",
    ): ("it draws random numbers", "export in evaluation mode: model.eval()"),
    (
        "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
        "SplitToSequence", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement",
    ): ("sequences and optional values are not supported", "export with plain tensors"),
    ("ArgMax", "ArgMin", "Hardmax"): (
        "it gives positions or picks by them, and jumps when the order of its entries changes",
        'export the logits; where ArgMax is the last operation, pass drop="argmax"',
    ),
    (
        "Equal", "Mod", "Sign", "Floor",
        "Ceil", "Round", "NonZero", "OneHot", "IsNaN", "IsInf", "Range", "ConstantOfShape",
    ): _JUMPS,
}  # fmt: skip
_EXPLAINED = {name: text for names, text in _REASONS.items() for name in names}


def explain(name: str, domain: str) -> tuple[str, str]:
    """(reason, remedy) of an operator that is not supported."""
    if domain not in ("", "ai.onnx"):
        remedy = "export with ONNX's own operators, without fusing them"
        return f"operators of the domain {domain} are not supported", remedy
    remedy = "replace it by supported operators, or write the network in JAX"
    return _EXPLAINED.get(name, ("there is no rule for this operator", remedy))
