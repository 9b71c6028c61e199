"""lipbounds.interop.load_onnx: every operator against onnxruntime, over opsets and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

import jax  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import lipbounds as lb  # noqa: E402
from lipbounds.interop import load_onnx  # noqa: E402

ort.set_default_logger_severity(4)
NEWEST = 25  # opset that this onnxruntime computes; newer ones are compared with onnx.reference


class Case(NamedTuple):
    """One operator: `inputs` after x are constants, None an absent one."""

    op: str
    opset: int
    shape: tuple[int, ...]
    inputs: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})
    first: bool = True  # x is the first operand; otherwise the last
    outputs: int = 1
    traced: bool = False  # whether lb.trace accepts it as a network


def _w(*shape: int) -> np.ndarray:
    return (np.random.default_rng(sum(shape) + len(shape)).standard_normal(shape) * 0.5).astype(np.float32)


def _i(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


def _f(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


def _scalar(value: float) -> np.ndarray:
    return np.asarray(value, np.float32)


V, M, C1, C2, C3 = (1, 12), (1, 3, 4), (1, 4, 9), (1, 4, 7, 8), (1, 2, 5, 4, 6)


def _elementwise() -> list[Case]:
    cases = []
    for op, first in {
        "Relu": 7, "LeakyRelu": 7, "Elu": 7, "Selu": 7, "Celu": 12, "Gelu": 20, "Sigmoid": 7, "Tanh": 7,
        "HardSigmoid": 7, "HardSwish": 14, "Softplus": 7, "Softsign": 7, "Mish": 18, "Neg": 7, "Abs": 7,
        "Identity": 7, "Erf": 9, "Sin": 7, "Cos": 7, "Swish": 24, "Clip": 7,
    }.items():  # fmt: skip
        versions = sorted({first, max(first, 13), max(first, 22)} if op != "Swish" else {first})
        cases += [Case(op, v, V, traced=True) for v in versions]
    cases += [Case(op, v, V) for op in ("Exp", "ThresholdedRelu") for v in (10, 22)]
    cases += [
        Case("LeakyRelu", 9, M, (), {"alpha": 0.3}, traced=True),
        Case("Elu", 9, M, (), {"alpha": 0.5}, traced=True),
        Case("Selu", 9, M, (), {"alpha": 1.5, "gamma": 1.2}, traced=True),
        Case("Celu", 12, M, (), {"alpha": 2.0}, traced=True),
        Case("Gelu", 20, M, (), {"approximate": "tanh"}, traced=True),
        Case("HardSigmoid", 9, M, (), {"alpha": 0.4, "beta": 0.3}, traced=True),
        Case("ThresholdedRelu", 10, M, (), {"alpha": 0.0}, traced=True),
        Case("Clip", 7, M, (), {"min": -0.2, "max": 0.4}, traced=True),
        Case("Clip", 7, M, (), {"max": 0.4}, traced=True),
        Case("Clip", 11, M, (_scalar(-0.2), _scalar(0.4)), traced=True),
        Case("Clip", 12, M, (None, _scalar(0.4)), traced=True),
        Case("Clip", 13, M, (_scalar(-0.2),), traced=True),
        *(Case("PRelu", v, C2, (_w(4, 1, 1),), traced=True) for v in (7, 9, 16)),
        Case("PRelu", 16, V, (_f(0.25),), traced=True),
        Case("Pow", 7, M, (_scalar(3),)),
        Case("Pow", 12, M, (_i(2),)),
        Case("Pow", 15, M, (_f(1, 2, 3, 2),)),
        Case("Max", 8, M, (_w(4),), traced=True),
        Case("Max", 13, M, (_w(4), _w(3, 1)), traced=True),
        Case("Min", 12, M, (_w(1),), traced=True),
        Case("Sum", 8, M, (_w(4), _w(3, 1)), traced=True),
        Case("Mean", 13, M, (_w(4), _w(3, 1)), traced=True),
        Case("Where", 9, M, (np.arange(4) % 2 == 0, _w(3, 4)), {}, False, traced=True),
        Case("Cast", 9, M, (), {"to": TensorProto.FLOAT}, traced=True),
        Case("Cast", 19, M, (), {"to": TensorProto.FLOAT}, traced=True),
        Case("CastLike", 15, M, (_w(1),), traced=True),
        Case("Softmax", 9, M),
        Case("Softmax", 11, M, (), {"axis": -1}),
        Case("Softmax", 13, M),
        Case("Softmax", 13, M, (), {"axis": 1}),
        Case("LogSoftmax", 9, M, (), {"axis": 2}),
        Case("LogSoftmax", 13, M),
    ]
    for op in ("Add", "Sub", "Mul", "Div"):
        for opset in (7, 13, 14):
            cases.append(Case(op, opset, M, (_w(3, 1) + 2,), traced=True))
        cases.append(Case(op, 14, M, (_w(2, 3, 1) + 2,), traced=True))  # x is broadcast
        cases.append(Case(op, 14, M, (_w(4),), {}, False, traced=op != "Div"))
    return cases


def _products() -> list[Case]:
    bn = (_w(4), _w(4), _w(4) + 1, np.abs(_w(4)) + 0.1)
    return [
        *(Case("Gemm", v, V, (_w(12, 5), _w(5)), traced=True) for v in (7, 9, 11, 13)),
        Case("Gemm", 11, V, (_w(12, 5),), traced=True),
        Case("Gemm", 13, V, (_w(5, 12), _w(1, 5)), {"alpha": 0.5, "beta": 2.0, "transB": 1}, traced=True),
        Case("Gemm", 13, V, (_w(1, 5), _w(12, 1)), {"transA": 1}, traced=True),
        *(Case("MatMul", v, V, (_w(12, 5),), traced=True) for v in (7, 9, 13)),
        Case("MatMul", 13, M, (_w(4, 5),), traced=True),
        Case("MatMul", 13, M, (_w(2, 3),), {}, False, traced=True),
        Case("MatMul", 13, M, (_w(4),), traced=True),
        *(
            Case("BatchNormalization", v, C2, bn, {"epsilon": 1e-3}, traced=True)
            for v in (7, 9, 14, 15, NEWEST)
        ),
        Case("BatchNormalization", 9, C1, bn, traced=True),
        Case("BatchNormalization", 15, (1, 4), bn, traced=True),
        *(Case("Dropout", v, V, traced=True) for v in (7, 10, 12, 13, 22)),
        Case("Dropout", 7, V, (), {"ratio": 0.4}, traced=True),
        Case("Dropout", 13, V, (_scalar(0.4), np.asarray(False)), traced=True),
    ]


def _convolutions() -> list[Case]:
    w1, w2, w3 = _w(6, 4, 3), _w(6, 4, 3, 2), _w(3, 2, 2, 3, 2)
    t1, t2, t3 = _w(4, 3, 3), _w(4, 3, 3, 2), _w(2, 3, 2, 3, 2)
    rows: list[tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = [
        ("Conv", C1, (w1, _w(6)), {"pads": [1, 2], "strides": [2]}),
        ("Conv", C2, (w2,), {}),
        ("Conv", C2, (w2, _w(6)), {"kernel_shape": [3, 2], "pads": [1, 0, 2, 1], "strides": [2, 1]}),
        ("Conv", C2, (w2,), {"dilations": [2, 3], "pads": [1, 1, 1, 1]}),
        ("Conv", C2, (_w(8, 1, 3, 3), _w(8)), {"group": 4, "pads": [1, 1, 1, 1]}),
        ("Conv", C2, (_w(6, 2, 3, 3),), {"group": 2}),
        ("Conv", C2, (w2,), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ("Conv", C2, (w2,), {"auto_pad": "SAME_LOWER", "strides": [2, 3]}),
        ("Conv", C2, (w2,), {"auto_pad": "VALID", "strides": [2, 2]}),
        ("Conv", C3, (w3, _w(3)), {"pads": [0, 1, 1, 1, 1, 0], "strides": [1, 1, 2]}),
        ("ConvTranspose", C1, (t1, _w(3)), {"strides": [2], "pads": [1, 0], "output_padding": [1]}),
        ("ConvTranspose", C2, (t2,), {}),
        ("ConvTranspose", C2, (t2, _w(3)), {"strides": [2, 3], "pads": [1, 0, 0, 1]}),
        ("ConvTranspose", C2, (t2,), {"strides": [3, 2], "output_padding": [2, 1], "dilations": [2, 1]}),
        ("ConvTranspose", C2, (_w(4, 3, 3, 3), _w(6)), {"group": 2, "strides": [2, 2]}),
        ("ConvTranspose", C2, (_w(4, 1, 2, 2),), {"group": 4, "strides": [2, 2]}),
        ("ConvTranspose", C2, (t2,), {"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
        ("ConvTranspose", C2, (t2,), {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
        ("ConvTranspose", C2, (t2,), {"auto_pad": "VALID", "strides": [2, 2]}),
        ("ConvTranspose", C2, (t2,), {"output_shape": [14, 8], "strides": [2, 1]}),
        ("ConvTranspose", C2, (t2,), {"output_shape": [14, 8], "strides": [2, 1], "auto_pad": "SAME_UPPER"}),
        ("ConvTranspose", C3, (t3,), {"strides": [1, 2, 1], "pads": [0, 1, 0, 0, 1, 1]}),
    ]
    cases = [Case(op, 11, shape, inputs, attributes, traced=True) for op, shape, inputs, attributes in rows]
    cases += [Case(op, v, C2, (_w(4, 4, 3, 3),), {"pads": [1] * 4}, traced=True)
              for op in ("Conv", "ConvTranspose") for v in (7, 22, NEWEST)]  # fmt: skip
    return cases


def _pools() -> list[Case]:
    two: dict[str, Any] = {"kernel_shape": [3, 2]}
    cases = []
    for op in ("MaxPool", "AveragePool"):
        rows: list[tuple[int, tuple[int, ...], dict[str, Any]]] = [
            *((v, C2, two) for v in (7, 8, 10, 11, 12, 19, 22)),
            (10, C2, {**two, "strides": [2, 2], "pads": [1, 0, 1, 1]}),
            (10, C2, {**two, "strides": [2, 3], "ceil_mode": 1}),
            (11, C2, {**two, "strides": [3, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}),
            (22, C2, {"kernel_shape": [2, 2], "strides": [3, 3], "pads": [1, 1, 0, 0], "ceil_mode": 1}),
            (11, C2, {**two, "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
            (11, C2, {**two, "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
            (11, C2, {**two, "strides": [2, 2], "auto_pad": "VALID"}),
            (19, C2, {**two, "dilations": [2, 3], "pads": [1, 1, 1, 0]}),
            (11, C1, {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
            (11, C3, {"kernel_shape": [2, 2, 3], "strides": [1, 2, 2]}),
        ]
        cases += [Case(op, v, shape, (), attributes, traced=True) for v, shape, attributes in rows]
    included = {"kernel_shape": [3, 3], "strides": [2, 2], "count_include_pad": 1}
    return [
        *cases,
        Case("AveragePool", 7, C2, (), {**included, "pads": [1, 1, 1, 1]}, traced=True),
        Case("AveragePool", 11, C2, (), {**included, "pads": [1, 0, 1, 0]}, traced=True),
        Case("AveragePool", 19, C2, (), {**included, "pads": [1, 1, 1, 1], "ceil_mode": 1}, traced=True),
        *(Case(op, v, s, traced=True) for op in ("GlobalAveragePool", "GlobalMaxPool")
          for v, s in ((7, C2), (22, C1), (11, C3))),
    ]  # fmt: skip


def _shapes() -> list[Case]:
    rows: list[tuple[str, int, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = [
        *(("Flatten", v, C2, (), {}) for v in (7, 9, 11, 13, 21, 25)),
        ("Flatten", 9, C2, (), {"axis": 0}),
        ("Flatten", 11, C2, (), {"axis": -1}),
        ("Flatten", 13, C2, (), {"axis": 4}),
        *(("Reshape", v, C2, (_i(0, -1, 8),), {}) for v in (7, 13, 14, 19, 25)),
        ("Reshape", 14, C2, (_i(1, -1),), {"allowzero": 1}),
        *(("Transpose", v, C2, (), {"perm": [0, 2, 3, 1]}) for v in (7, 13, 21)),
        ("Transpose", 13, C2, (), {}),
        ("Squeeze", 7, (1, 1, 5, 1), (), {"axes": [1, 3]}),
        ("Squeeze", 11, (1, 1, 5, 1), (), {"axes": [-1]}),
        ("Squeeze", 13, (1, 1, 5, 1), (_i(-1, 1),), {}),
        ("Squeeze", 21, (1, 1, 5, 1), (), {}),
        ("Unsqueeze", 7, V, (), {"axes": [0, 3]}),
        ("Unsqueeze", 11, V, (), {"axes": [-1]}),
        ("Unsqueeze", 13, V, (_i(1, -1),), {}),
        *(("Concat", v, C2, (_w(1, 2, 7, 8),), {"axis": 1}) for v in (7, 11, 13)),
        ("Concat", 11, C2, (_w(1, 4, 7, 1),), {"axis": -1}),
        ("Slice", 7, C2, (), {"starts": [1, -5], "ends": [3, 1000], "axes": [1, 3]}),
        ("Slice", 9, C2, (), {"starts": [0, 1], "ends": [1, -1]}),
        ("Slice", 10, C2, (_i(1, 7), _i(4, -1000), _i(1, 3), _i(2, -2)), {}),
        ("Slice", 13, C2, (_i(-1), _i(-(2**63)), _i(-1), _i(-1)), {}),
        ("Slice", 13, C2, (_i(2), _i(2**63 - 1), _i(2)), {}),
        ("Slice", 13, C2, (_i(-1000), _i(-1000), _i(3), _i(-1)), {}),
        ("Slice", 13, C2, (_i(0, 1), _i(1, 3)), {}),
        ("Expand", 8, M, (_i(2, 3, 4),), {}),
        ("Expand", 13, (1, 3, 1), (_i(3, 5),), {}),
        ("Tile", 13, M, (_i(1, 2, 3),), {}),
        ("Gather", 7, M, (_i(2, 0),), {"axis": 1}),
        ("Gather", 11, M, (np.asarray(-1),), {"axis": -1}),
        ("Gather", 13, M, (_i(0, 1, 1, 0).reshape(2, 2),), {"axis": 2}),
        ("DepthToSpace", 7, (1, 8, 3, 2), (), {"blocksize": 2}),
        ("DepthToSpace", 11, (1, 8, 3, 2), (), {"blocksize": 2, "mode": "CRD"}),
        ("DepthToSpace", 13, (1, 8, 3, 2), (), {"blocksize": 2, "mode": "DCR"}),
        ("SpaceToDepth", 13, (1, 2, 4, 6), (), {"blocksize": 2}),
        ("SpaceToDepth", 28, (1, 2, 4, 6), (), {"blocksize": 2, "mode": "CRD"}),
        ("DepthToSpace", 28, (1, 8, 3, 2), (), {"blocksize": 2, "mode": "CRD"}),
    ]
    for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"):
        since = 13 if op == "ReduceSum" else 18
        rows += [
            (op, 7, M, (), {"axes": [1]}),
            (op, 11, M, (), {"axes": [-1], "keepdims": 0}),
            (op, 11, M, (), {}),
            (op, since, M, (_i(1, 2),), {"keepdims": 0}),
            (op, since, M, (_i(-1),), {}),
            (op, since, M, (), {}),
            (op, since, M, (), {"noop_with_empty_axes": 1}),
            (op, 20, M, (_i(1),), {}),
        ]
    for mode in ("constant", "reflect", "edge"):
        pads = [0, 0, 1, 2, 0, 0, 2, 1]
        rows.append(("Pad", 7, C2, (), {"mode": mode, "pads": pads}))
        rows += [("Pad", v, C2, (_i(*pads),), {"mode": mode}) for v in (11, 13, 18, 21, 25)]
    rows += [
        ("Pad", 7, C2, (), {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "value": 0.5}),
        ("Pad", 11, C2, (_i(0, 0, -1, 2, 0, 0, 1, -3), _scalar(0.5)), {}),
        ("Pad", 18, C2, (_i(1, 2, 0, 1), None, _i(-1, 2)), {}),
        ("Pad", 19, C2, (_i(0, 0, 1, 2, 0, 0, 2, 1),), {"mode": "wrap"}),
    ]
    cases = [Case(op, v, shape, inputs, attributes, traced=True) for op, v, shape, inputs, attributes in rows]
    splits: list[tuple[int, int, tuple[Any, ...], dict[str, Any]]] = [
        (7, 2, (), {"axis": 1}),
        (7, 2, (), {"axis": 1, "split": [1, 3]}),
        (11, 2, (), {"axis": -1}),
        (13, 2, (_i(3, 1),), {"axis": 1}),
        (13, 4, (), {"axis": 1}),
        (18, 3, (), {"axis": 2, "num_outputs": 3}),
        (18, 2, (_i(5, 3),), {"axis": 3}),
    ]
    return cases + [Case("Split", v, C2, i, a, outputs=n, traced=True) for v, n, i, a in splits]


def _resizes() -> list[Case]:
    x = (1, 2, 3, 4)
    cases = []
    for mode in ("nearest", "linear"):
        cases += [
            Case("Upsample", 7, x, (), {"mode": mode, "scales": [1.0, 1.0, 2.0, 3.0]}, traced=True),
            Case("Upsample", 9, x, (_f(1, 1, 2, 2),), {"mode": mode}, traced=True),
            Case("Resize", 10, x, (_f(1, 1, 2, 3),), {"mode": mode}, traced=True),
            Case("Resize", 11, x, (_f(), _f(1, 1, 2, 2)), {"mode": mode}, traced=True),
            Case("Resize", 13, x, (None, None, _i(1, 2, 6, 12)), {"mode": mode}, traced=True),
            Case("Resize", 18, x, (None, _f(2, 3)), {"mode": mode, "axes": [2, 3]}, traced=True),
            Case("Resize", 19, x, (None, _f(1, 1, 0.5, 0.5)), {"mode": mode}, traced=True),
        ]
        for coordinate in ("half_pixel", "asymmetric", "pytorch_half_pixel"):
            for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"):
                if mode == "linear" and rounding != "floor":
                    continue
                attributes = {
                    "mode": mode,
                    "coordinate_transformation_mode": coordinate,
                    "nearest_mode": rounding,
                }
                cases.append(Case("Resize", 13, x, (None, _f(1, 1, 3, 2)), attributes, traced=True))
    align = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}
    return [
        *cases,
        Case("Resize", 13, x, (None, None, _i(1, 2, 5, 7)), align, traced=True),
        Case("Resize", 13, x, (None, None, _i(1, 2, 5, 7)), {"mode": "linear"}, traced=True),
        Case("Resize", 19, x, (None, _f(1, 1, 1.5, 1.7)),
             {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"}, traced=True),
    ]  # fmt: skip


def _name(case: Case) -> str:
    extra = "-".join(f"{k}={v}" for k, v in case.attributes.items())
    return f"{case.op}-{case.opset}-{len(case.inputs)}{'' if case.first else '-last'}{'-' + extra if extra else ''}"


def _traced_once(cases: list[Case]) -> list[Case]:
    """lb.trace sees no difference between opsets, and little between attributes: a few of each operator are traced."""
    seen: set[str] = set()
    kept = []
    for case in cases:
        key = f"{case.op} {len(case.inputs)} {case.first} {sorted(case.attributes)[:1]}"
        kept.append(case._replace(traced=case.traced and key not in seen))
        seen.add(key)
    return kept


CASES = _traced_once([*_elementwise(), *_products(), *_convolutions(), *_pools(), *_shapes(), *_resizes()])


def model(case: Case) -> Any:
    """The operator between x and y; of several outputs, those are concatenated, flat."""
    names, constants = [], []
    for i, value in enumerate(case.inputs):
        names.append("" if value is None else f"c{i}")
        if value is not None:
            constants.append(numpy_helper.from_array(value, f"c{i}"))
    names = ["x", *names] if case.first else [*names, "x"]
    parts = [f"y{i}" for i in range(case.outputs)]
    nodes = [helper.make_node(case.op, names, parts, name="node", **case.attributes)]
    if case.outputs > 1:
        nodes += [helper.make_node("Flatten", [p], [f"{p}f"], axis=0) for p in parts]
        nodes.append(helper.make_node("Concat", [f"{p}f" for p in parts], ["y"], axis=1))
    else:
        nodes.append(helper.make_node("Identity", parts, ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, case.shape)
    y = helper.make_empty_tensor_value_info("y")  # no shape: files without are read
    y.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph(nodes, "graph", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=8)


def _quick(case: Case, place: int) -> Any:
    """Of opsets that change nothing all but the first and the newest, and every other case, are slow tests."""
    alike = [c.opset for c in CASES if c.op == case.op and repr(c[2:]) == repr(case[2:])]
    between = case.opset not in (min(alike), max(alike))
    return pytest.param(case, marks=pytest.mark.slow if between or place % 3 else ())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", [_quick(case, i) for i, case in enumerate(CASES)], ids=_name)
def test_operator_agrees_with_onnxruntime(case: Case, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(model(case), path)
    x = (2 * rng.standard_normal(case.shape)).astype(np.float32)
    if case.opset <= NEWEST:
        (expected,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    else:
        (expected,) = ReferenceEvaluator(str(path)).run(None, {"x": x})
    fn, spec = load_onnx(path)
    assert spec.shape == case.shape[1:] and spec.batch and spec.opset == case.opset
    assert spec.outputs == expected.size
    found = np.asarray(fn(x[0]))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected.ravel(), rtol=2e-6, atol=2e-6 * max(1, np.abs(expected).max()))
    if case.traced:
        form = lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
        assert form.num_outputs == expected.size
