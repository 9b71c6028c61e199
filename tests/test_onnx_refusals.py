"""lipbounds.interop.load_onnx: what is dropped when asked, and everything that is refused."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_nets import NETS, Net, mlp, saved  # noqa: E402

import lipbounds as lb  # noqa: E402
from lipbounds.interop import load_onnx  # noqa: E402

# --- the last operation --------------------------------------------------------------------------------------------


def _ending(*ops: tuple[str, dict[str, Any]], shape: tuple[int | str, ...] = ("N", 5)) -> Any:
    net = Net(shape, opset=13)
    h = net.MatMul("x", net.w(5, 3))
    for op, attributes in ops:
        h = getattr(net, op)(h, **attributes)
    model = net.done(h)
    if ops[-1][0] == "ArgMax":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


def test_softmax_stays_unless_dropped(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 5).astype(np.float32)
    plain, _ = load_onnx(saved(tmp_path, _ending(("Identity", {}))))
    for name, power in (("Softmax", np.exp), ("LogSoftmax", lambda v: v)):
        path = saved(tmp_path, _ending((name, {}), ("Identity", {})))
        fn, spec = load_onnx(path)
        logits = np.asarray(plain(x), np.float64)
        np.testing.assert_allclose(fn(x), power(logits - np.log(np.exp(logits).sum())), rtol=1e-5)
        assert f"the outputs are those of {name}" in spec.notes[-1] and 'drop="softmax"' in spec.notes[-1]
        if name == "Softmax":
            with pytest.raises(lb.UnsupportedError, match="div"):
                lb.trace(fn, x)
        else:
            both = (lb.liplt(lb.trace(f, x), pairwise=True).pairwise for f in (fn, plain))
            assert np.allclose(*both, rtol=1e-6), "differences of log-probabilities are those of the logits"
        fn, spec = load_onnx(path, drop="softmax")
        np.testing.assert_array_equal(fn(x), plain(x))
        assert (
            spec.notes[-1]
            == f"the last operation, {name} (node '/{name}_1'), was dropped: the outputs are its inputs"
        )
        assert lb.liplt(lb.trace(fn, x)).value > 0


def test_argmax_is_refused_unless_dropped(tmp_path: Path) -> None:
    path = saved(tmp_path, _ending(("Softmax", {}), ("ArgMax", {"axis": 1, "keepdims": 0})))
    with pytest.raises(lb.UnsupportedError, match='where ArgMax is the last operation, pass drop="argmax"'):
        load_onnx(path)
    assert load_onnx(path, drop="argmax")[1].outputs == 3
    fn, spec = load_onnx(path, drop=("softmax", "argmax"))
    assert lb.trace(fn, np.zeros(5, np.float32)).num_outputs == 3 and len(spec.notes) == 3


def test_nothing_else_is_dropped(tmp_path: Path) -> None:
    sigmoid = saved(tmp_path, _ending(("Softmax", {}), ("Sigmoid", {})))
    with pytest.raises(
        ValueError, match=r"drop='softmax': the last operation is Sigmoid \(node '/Sigmoid_2'\)"
    ):
        load_onnx(sigmoid, drop="softmax")
    with pytest.raises(ValueError, match='drop must be "softmax", "argmax" or both, got \'sigmoid\''):
        load_onnx(sigmoid, drop="sigmoid")
    for name in ("Softmax", "ArgMax"):
        # over the batch: argmax of the logits is another thing
        rows = saved(tmp_path, _ending((name, {"axis": 0})))
        with pytest.raises(ValueError, match=r"acts along axes \(0,\) of shape \(1, 3\), not on all outputs"):
            load_onnx(rows, drop=name.lower())


# --- refusals ------------------------------------------------------------------------------------------------------


def test_everything_unsupported_is_named_at_once(tmp_path: Path) -> None:
    net = Net(("N", 2, 4, 4))
    h = net.InstanceNormalization("x", net.w(2), net.w(2))
    h = net.FusedConv(h, net.w(2, 2, 1, 1), domain="com.microsoft")
    h = net.LpPool(h, kernel_shape=[2, 2])
    h = net.Relu(h)
    h = net.QuantizeLinear(h, net.const(np.float32(1)), net.const(np.int8(0)))
    h = net.Frobnicate(h)
    model = net.done(net.Flatten(h))
    model.graph.value_info.append(helper.make_tensor_value_info("LpPool_2", TensorProto.FLOAT, (1, 2, 3, 3)))
    with pytest.raises(lb.UnsupportedError) as caught:
        load_onnx(saved(tmp_path, model))
    assert [item.primitive for item in caught.value.items] == [
        "InstanceNormalization", "FusedConv", "LpPool", "QuantizeLinear", "Frobnicate",
    ]  # fmt: skip
    assert caught.value.items[2].shape == (1, 2, 3, 3)
    text = str(caught.value)
    assert "FusedConv at node '/FusedConv_1' (domain com.microsoft, opset 17)" in text
    assert "operators of the domain com.microsoft are not supported" in text
    assert "quantised arithmetic rounds" in text and "remedy: use the model before quantisation" in text
    assert "it divides by statistics of its input" in text and "there is no rule for this operator" in text


def _one(
    op: str, *constants: Any, shape: tuple[int, ...] = (1, 2, 4, 4), opset: int = 17, **attributes: Any
) -> Any:
    net = Net(shape, opset)
    names = ["" if c is None else net.const(c) for c in constants]
    return net.done(getattr(net, op)("x", *names, **attributes))


def _scales(*factors: float) -> np.ndarray:
    return np.asarray(factors, np.float32)


_BN = [np.ones(2, np.float32)] * 4


def _cast() -> Any:
    net = Net(("N", 3), opset=21)
    whole = net.Cast(net.const(np.array([1, 3.3, -3.7], np.float32)), to=TensorProto.INT4)
    return net.done(net.Mul("x", net.Cast(whole, to=TensorProto.FLOAT)))


REFUSED: list[tuple[Any, str]] = [
    (_cast(), "cuts constants off to int4, and onnxruntime rounds them"),
    (_one("BatchNormalization", *_BN, training_mode=1), "training mode divides by statistics"),
    (_one("BatchNormalization", *_BN, opset=7, spatial=0), "spatial=0 is not supported"),
    (_one("Dropout", np.float32(0.5), np.array(True)), "training mode draws a random mask"),
    (_one("Cast", to=TensorProto.INT64), "x becomes int64 here"),
    (_one("Upsample", _scales(1, 1, 2, 2), opset=10, mode="nearest"), "at opset 10 this operator is deprecated"),
    (_one("Resize", None, _scales(1, 1, 2, 2), mode="cubic"), "mode='cubic' is not supported"),
    (_one("Resize", None, _scales(1, 1, 1.5, 2), mode="nearest"), "by the factor 1.5 .* depends on rounding"),
    (_one("Resize", None, _scales(1, 1, 0.5, 0.5), opset=18, antialias=1, mode="linear"), "antialias"),
    (_one("Resize", None, _scales(1, 1, 2, 2), coordinate_transformation_mode="tf_crop_and_resize", mode="linear"),
     "tf_crop_and_resize' is not supported"),
    (_one("Celu", alpha=-1.0), "its alpha is -1.0"),
    (_one("Pad", np.array([0, 0, -1, 0, 0, 0, 0, 0]), mode="edge"), "in mode 'edge' is not supported"),
    (_one("AveragePool", kernel_shape=[1, 1], pads=[1, 1, 1, 1]), "a window reads padding only"),
    (_one("MaxPool", kernel_shape=[2, 1], pads=[1, 1, 0, 0]), "a window over padding only has no maximum"),
    (_one("Floor"), "its output jumps"),
    (_one("RandomNormalLike"), "draws random numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused(model: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(lb.UnsupportedError, match=reason) as caught:
        load_onnx(saved(tmp_path, model))
    assert len(caught.value.items) == 1 and caught.value.items[0].remedy


def test_refused_for_what_depends_on_the_input(tmp_path: Path) -> None:
    net = Net(("N", 6))
    masked = net.Where(net.Equal("x", net.const(np.float32(0))), "x", net.const(np.float32(0)))
    shaped = net.Reshape("x", net.Cast(net.ReduceSum("x"), to=TensorProto.INT64))
    pooled = Net(("N", 2, 4, 4))
    pooled.nodes.append(helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2]))
    branch = helper.make_graph(
        [], "branch", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 6))]
    )
    control = Net(("N", 6))
    choice = control.If(control.const(np.array(True)), then_branch=branch, else_branch=branch)
    training = Net(("N", 2, 4), opset=9)
    ones = [training.const(np.ones(2, np.float32)) for _ in range(4)]
    training.nodes.append(helper.make_node("BatchNormalization", ["x", *ones], ["y", "m", "v", "sm", "sv"]))
    for model, reason in (
        (net.done(masked), "1. Equal at .* its output jumps"),
        (net.done(shaped), "1. Cast at "),
        (pooled.done("i"), "only its first output is read"),
        (control.done(choice), "control flow is not supported"),
        (training.done("y"), "in training mode divides"),
    ):
        with pytest.raises(lb.UnsupportedError, match="(?s)" + reason):
            load_onnx(saved(tmp_path, model))


def test_newer_versions_of_an_operator_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lipbounds.interop._onnx_graph import Operator
    from lipbounds.interop._onnx_windows import OPERATORS

    monkeypatch.setitem(OPERATORS, "Relu", Operator(OPERATORS["Relu"].build, 13))
    with pytest.raises(lb.UnsupportedError, match="has version 14, which is too new"):
        load_onnx(saved(tmp_path, _one("Relu")))


def test_the_table_is_up_to_date() -> None:
    """Every operator was read in its newest version, up to the opset against which this reader was written."""
    from lipbounds.interop._onnx_windows import OPERATORS

    for name, operator in OPERATORS.items():
        newest = onnx.defs.get_schema(name, min(28, onnx.defs.onnx_opset_version()), "").since_version
        assert newest <= operator.newest or name == "Upsample", name


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_one("Reshape", np.array([5, 5])), r"node '/Reshape_0' \(Reshape\): it does not fit its inputs, of shapes"),
        (_one("MatMul", np.ones((3, 3), np.float32)), r"\(MatMul\): it .*, of shapes \(1, 2, 4, 4\)"),
        (_one("Gather", np.array([7]), axis=1), "an index from 7 to 7 is outside its 2 entries"),
        (_one("Transpose", perm=[0, 1]), r"\(Transpose\): it does not fit"),
        (_one("Conv", np.ones((2, 2, 3, 3), np.float32), kernel_shape=[5, 5]), "kernel_shape is"),
        (_one("Pad", np.array([0, 0, 9, 0, 0, 0, 0, 0]), mode="reflect"), "reflects more than the input holds"),
        (_one("Relu", np.ones(3, np.float32)), r"\(Relu\): Node\(.* has input size 2 not in range"),
        (_one("LeakyRelu", alpha="steep"), r"\(LeakyRelu\): Mismatched attribute type"),
        (_one("DepthToSpace", blocksize=1, mode="ABC"), "its mode is 'ABC', not one of DCR, CRD"),
        (_one("ConvTranspose", np.ones((2, 2, 1, 1), np.float32), auto_pad="EVEN"), "its auto_pad is 'EVEN'"),
        (_one("Pad", np.array([0, 0, 0, 0, 0, 2**40, 0, 0])), "more than 268435456 entries"),
        (_one("Slice", *map(np.array, ([0, 1], [2, 2], [1, -3]))), "axis 1 is sliced twice"),
        (_one("Tile", np.array([1, 1, -1, 1])), r"repeats are \[1, 1, -1, 1\]"),
        (_one("ConvTranspose", np.ones((2, 2, 1, 1), np.float32), strides=[2**62, 1]), "more than 268435456 entries"),
        (_one("Tile", np.array([1, 1, 2**20, 2**20])), "more than 268435456 entries"),
        (_one("Resize", None, None, np.array([1, 2, 2**40, 4])), r"shape \(1099511627776, 4\), more than"),
        (_one("Pad", np.array([1, 2, 1, 2]), None, np.array([3, -1]), opset=18), r"for the axes \[3, 3\]"),
        (_one("Gemm", np.ones((4, 4), np.float32)), "its factors are not matrices"),
        (_one("BatchNormalization", *[np.ones(1, np.float32)] * 4), r"do not have the \(2,\) channels"),
        (_one("Mul", np.ones(4)), r"\(Mul\): its inputs must hold one type, and hold float32 and float64"),
        (_one("Relu", opset=6), "opset 6 is older than 7"),
        (_one("Relu", opset=99), "those of the installed onnx: pip install -U onnx"),
    ],
)  # fmt: skip
def test_graphs_that_do_not_fit(model: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_onnx(saved(tmp_path, model))


def test_graphs_that_are_not_sound(tmp_path: Path) -> None:
    lost = Net(("N", 6))
    twice = Net(("N", 6))
    twice.nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]
    integer = Net(("N", 6), dtype=np.uint8)
    corrupt = mlp()
    corrupt.graph.initializer[0].raw_data = bytes(8)
    negative = mlp()
    negative.graph.initializer[0].dims[0] = -16
    nowhere = Net(("N", 6))
    huge = Net(("N", 6))
    endless = Net(("N", 6))
    line = endless.Range(*(endless.const(np.int64(n)) for n in (0, 2**60, 1)))
    doubled = Net(("N", 6))
    grown = doubled.w(1)
    for _ in range(40):
        grown = doubled.Concat(grown, grown, axis=0)
    sparse = mlp()
    tensor = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "c0"), numpy_helper.from_array(np.array([0])), [192]
    )
    sparse.graph.sparse_initializer.append(tensor)
    for model, message in (
        (sparse, r"net\.onnx: the initializer 'c0' is sparse"),
        (lost.done(lost.Add("x", "ghost")), "nothing makes its input 'ghost'"),
        (twice.done("y"), "it makes 'y', which the graph has already"),
        (integer.done(integer.Identity("x")), "the input 'x' holds uint8, which has no Lipschitz bounds"),
        (corrupt, "initializer 'c0' is corrupt"),
        (negative, "initializer 'c0' is corrupt"),
        (nowhere.done(nowhere.Neg(nowhere.w(3))), "does not depend on the input 'x'"),
        (
            huge.done(huge.Add("x", huge.ConstantOfShape(huge.const(np.array([2**40]))))),
            "more than 268435456",
        ),
        (endless.done(endless.Gather("x", line)), "more than 268435456"),
        (doubled.done(doubled.Add("x", grown)), "more than 268435456"),
    ):
        with pytest.raises(ValueError, match=message):
            load_onnx(saved(tmp_path, model))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    raw = mlp().SerializeToString()
    for content in (b"", b"not a model at all", bytes(100), os.urandom(64)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"net\.onnx: "):
            load_onnx(path)
    for end in range(len(raw) - 1, 0, -97):
        path.write_bytes(raw[:end])
        with pytest.raises(ValueError, match=r"net\.onnx: .*cut off|one opset"):
            load_onnx(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.onnx"):
        load_onnx(tmp_path / "absent.onnx")


def test_cycles_and_missing_ends(tmp_path: Path) -> None:
    """A cycle of Identities before a dropped Softmax never ended."""
    cycle, foreign, empty = Net(("N", 6)), Net(("N", 6)), mlp()
    cycle.nodes = [helper.make_node("Identity", [a], [b]) for a, b in (("b", "a"), ("a", "b"))]
    foreign_end = foreign.Identity(foreign.Softmax("x"), domain="local")
    del empty.graph.output[:]
    for model, message in (
        (cycle.done("a"), "the last operation is Identity"),
        (foreign.done(foreign_end), "the last operation is Identity"),
        (_ending(("Softmax", {"axis": 7})), "axis 7 of 2 axes"),
        (empty, "the graph has no outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            load_onnx(saved(tmp_path, model), drop="softmax")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnx":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "lipbounds\[onnx\]"'):
        load_onnx("net.onnx")


@pytest.mark.parametrize("tries", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_content_is_read_or_a_value_error(tries: int, tmp_path: Path, rng: np.random.Generator) -> None:
    raws = [build().SerializeToString() for build in NETS]
    path, refused = tmp_path / "net.onnx", 0
    for _ in range(tries):
        content = bytearray(raws[rng.integers(len(raws))])
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(min(len(content), 2500))] = rng.integers(256)
        path.write_bytes(content if rng.random() < 0.8 else content[: rng.integers(len(content))])
        try:
            load_onnx(path)
        except ValueError:
            refused += 1
    assert refused > tries / 5
