"""lipbounds.interop.load_onnx: comparisons, picking, recurrence, constant inputs; against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

import jax  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_nets import Net, mlp, saved  # noqa: E402

import lipbounds as lb  # noqa: E402
from lipbounds.interop import load_onnx  # noqa: E402

ort.set_default_logger_severity(4)


def agree(path: Path, rng: np.random.Generator, **options: Any) -> float:
    """LipLT's bound of the file, after a comparison with onnxruntime in values and slopes."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    fn, spec = load_onnx(path, **options)
    form = lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    upper = lb.liplt(form).value
    given = {name: np.asarray(value) for name, value in options.get("constants", {}).items()}
    for scale in (0.3, 1.0, 4.0):
        x, y = (scale * rng.standard_normal((2, *spec.shape))).astype(spec.dtype)
        ends = [session.run([options["output"]] if "output" in options else None,
                            {spec.name: v[None] if spec.batch else v, **given})[0].ravel() for v in (x, y)]  # fmt: skip
        np.testing.assert_allclose(fn(x), ends[0], rtol=1e-5, atol=1e-5)
        assert np.linalg.norm(ends[0] - ends[1]) <= upper * np.linalg.norm(x - y)
    return float(upper)


# --- comparisons ---------------------------------------------------------------------------------------------------


def _number(net: Net, value: float) -> str:
    return net.const(np.float32(value))


def soft_shrink(net: Net) -> str:
    high, low = net.Greater("x", _number(net, 0.5)), net.Less("x", _number(net, -0.5))
    inner = net.Where(low, net.Add("x", _number(net, 0.5)), _number(net, 0))
    return net.Where(high, net.Sub("x", _number(net, 0.5)), inner)


def leaky(net: Net) -> str:
    return net.Where(net.GreaterOrEqual("x", _number(net, 0)), "x", net.Mul("x", _number(net, 0.1)))


def leaky_turned(net: Net) -> str:
    negative = net.Not(net.Less(_number(net, 0), "x"))
    return net.Where(negative, net.Mul("x", _number(net, 0.1)), "x")


def clipped(net: Net) -> str:
    return net.Where(net.LessOrEqual("x", _number(net, 1)), "x", _number(net, 1))


def arctangent(net: Net) -> str:
    return net.Atan("x")


@pytest.mark.parametrize("build", [soft_shrink, leaky, leaky_turned, clipped, arctangent])
def test_continuous_choices(build: Callable[[Net], str], tmp_path: Path, rng: np.random.Generator) -> None:
    net = Net(("N", 6))
    assert agree(saved(tmp_path, net.done(build(net))), rng) == pytest.approx(1, abs=1e-6)


def test_choices_that_jump_are_refused_by_trace(tmp_path: Path) -> None:
    net = Net(("N", 6))
    jump = net.Where(net.Greater("x", _number(net, 0.5)), "x", _number(net, 0))
    fn, spec = load_onnx(saved(tmp_path, net.done(jump)))
    with pytest.raises(lb.UnsupportedError, match="jumps"):
        lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    net = Net(("N", 6))
    model = net.done(net.Greater("x", _number(net, 0.5)))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    with pytest.raises(ValueError, match="holds bool, which has no Lipschitz bounds"):
        load_onnx(saved(tmp_path, model))


# --- picking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "batch", "opset"),
    [
        ([[0, 1], [1, -1]], 0, 11),
        ([[[0, 1, 2]], [[1, -2, 3]]], 0, 12),
        ([[[0, 1], [2, -1]]], 1, 12),
        ([[1, 2, 3, 4]], 1, 13),
    ],
)
def test_gather_nd(index: Any, batch: int, opset: int, tmp_path: Path, rng: np.random.Generator) -> None:
    array = np.asarray(index)
    if batch == 0:  # the first axis is that of the batch, which has one entry
        array = np.concatenate([np.zeros((*array.shape[:-1], 1), int), array], axis=-1)[..., :4]
    else:
        array = array[..., :3]
    net = Net((1, 3, 4, 5), opset)
    attributes = {"batch_dims": batch} if opset > 11 else {}
    assert agree(saved(tmp_path, net.done(net.GatherND("x", net.const(array), **attributes))), rng) >= 1


def test_gather_nd_outside_its_input_is_refused(tmp_path: Path) -> None:
    net = Net((1, 3))
    path = saved(tmp_path, net.done(net.GatherND("x", net.const(np.array([[0, 3]])))))
    with pytest.raises(ValueError, match="an index from 3 to 3 is outside its 3 entries"):
        load_onnx(path)


def _top(opset: int, k: int, outputs: tuple[str, ...], **attributes: Any) -> Net:
    net = Net(("N", 4, 5), opset)
    counts = [net.const(np.array([k]))] if opset > 9 else []
    attributes |= {} if opset > 9 else {"k": k}
    net.nodes.append(helper.make_node("TopK", ["x", *counts], outputs, **attributes))
    return net


@pytest.mark.parametrize(("opset", "k", "attributes"), [
    (9, 2, {}), (10, 3, {}), (11, 3, {"axis": 1}), (17, 5, {"largest": 0}), (24, 1, {"axis": -1}),
])  # fmt: skip
def test_top_k_values(
    opset: int, k: int, attributes: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    net = _top(opset, k, ("v", "i"), **attributes)
    assert agree(saved(tmp_path, net.done("v", None)), rng) == pytest.approx(1, abs=1e-6)


def test_top_k_positions_are_refused(tmp_path: Path) -> None:
    net = _top(17, 2, ("v", "i"))
    path = saved(tmp_path, net.done(net.Add("v", net.Cast("i", to=TensorProto.FLOAT))))
    with pytest.raises(lb.UnsupportedError, match="only its first output is read"):
        load_onnx(path)
    with pytest.raises(lb.UnsupportedError, match="with sorted=0 the order"):
        load_onnx(saved(tmp_path, _top(17, 2, ("v", "i"), sorted=0).done("v")))


# --- recurrence ----------------------------------------------------------------------------------------------------


def _rnn(direction: str, *, bias: bool = True, start: bool = False, last: bool = False, opset: int = 17,
         lengths: list[int] | None = None, **attributes: Any) -> Net:  # fmt: skip
    net, count = Net((1, 4, 3), opset), 2 if direction == "bidirectional" else 1
    names = [net.Transpose("x", perm=[1, 0, 2]), net.w(count, 5, 3), net.w(count, 5, 5)]
    names.append(net.w(count, 10) if bias else "")
    names.append("" if lengths is None else net.const(np.array(lengths, np.int32)))
    names.append(net.w(count, 1, 5) if start else "")
    ends = ["", "y"] if last else ["y"]
    net.nodes.append(helper.make_node("RNN", names, ends, hidden_size=5, direction=direction, **attributes))
    return net


@pytest.mark.sampled(8)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("options", [
    {}, {"bias": False, "last": True}, {"start": True, "last": True}, {"lengths": [4], "opset": 11},
    {"activations": ["Relu"]}, {"activations": ["Softsign"], "opset": 22},
])  # fmt: skip
def test_rnn(direction: str, options: dict[str, Any], tmp_path: Path, rng: np.random.Generator) -> None:
    if "activations" in options and direction == "bidirectional":
        options = options | {"activations": [*options["activations"], "Sigmoid"]}
    net = _rnn(direction, **options)
    assert agree(saved(tmp_path, net.done("y", None)), rng) > 0


@pytest.mark.parametrize(("options", "reason"), [
    ({"lengths": [3]}, "sequence_lens are not the whole sequence"),
    ({"clip": 1.0}, "RNN with clip"),
    ({"layout": 1}, "layout=1, is not supported"),
    ({"activations": ["ThresholdedRelu"]}, "activation 'thresholdedrelu' is not supported"),
])  # fmt: skip
def test_rnn_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(lb.UnsupportedError, match=reason):
        load_onnx(saved(tmp_path, _rnn("forward", **options).done("y", None)))


# --- files ---------------------------------------------------------------------------------------------------------


def test_an_opset_that_is_named_twice(tmp_path: Path, rng: np.random.Generator) -> None:
    model = mlp()
    model.opset_import.append(helper.make_opsetid("", 17))
    onnx.checker.check_model(model)
    agree(saved(tmp_path, model), rng)
    model.opset_import.append(helper.make_opsetid("ai.onnx", 17))
    assert load_onnx(saved(tmp_path, model))[1].opset == 17
    model.opset_import.append(helper.make_opsetid("", 18))
    with pytest.raises(
        ValueError, match=r"one opset of the domain ai\.onnx is needed, the file names \[17, 18\]"
    ):
        load_onnx(saved(tmp_path, model))


def test_inputs_that_are_given_as_constants(tmp_path: Path, rng: np.random.Generator) -> None:
    net = Net(("N", 5))
    model = net.done(net.Mul(net.Relu(net.Add("x", "shift")), "scale"))
    for name, shape in (("shift", ("N", 5)), ("scale", ())):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    path = saved(tmp_path, model)
    with pytest.raises(
        ValueError, match=r"the graph has 'x', 'shift', 'scale': give the others by constants="
    ):
        load_onnx(path)
    shift = rng.standard_normal((1, 5)).astype(np.float32)
    constants = {"shift": shift, "scale": np.float32(2.5)}
    assert agree(path, rng, constants=constants) == pytest.approx(2.5)
    assert load_onnx(path, constants={"shift": shift, "scale": 3})[0](np.ones(5, np.float32)).shape == (5,)
    for wrong, message in (
        ({"shift": shift[0], "scale": 2.0}, r"'shift' has shape \(5,\), the graph takes \(N, 5\)"),
        ({"shift": shift, "scale": 1 + 2**-30}, "holds float64, which are not exact in the graph's float32"),
        ({"shift": shift, "scale": "2"}, "not exact"),
        ({"shift": shift, "size": 2.0}, "the graph has no input 'size'"),
        ({"shift": shift * np.float32(np.nan), "scale": 2.0}, "'shift' holds NaN"),
        (
            {"x": shift, "shift": shift, "scale": 2.0},
            "every input of the graph is a constant: leave one of them free",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_onnx(path, constants=wrong)
    with pytest.raises(TypeError, match="constants must be a mapping from names to arrays, got list"):
        load_onnx(path, constants=[("shift", shift)])  # type: ignore[arg-type]


def test_a_remedy_names_the_tool_that_cuts(tmp_path: Path) -> None:
    net = Net(("N", 6))
    with pytest.raises(lb.UnsupportedError, match=r"onnx\.utils\.extract_model"):
        load_onnx(saved(tmp_path, net.done(net.Floor("x"))))
