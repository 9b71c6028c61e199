"""lipbounds.interop.load_onnx: whole networks against onnxruntime, and what is told about them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

import jax  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from onnx_nets import NETS, Net, channels_last, double, mlp, resnet, saved, unet, vector  # noqa: E402

import lipbounds as lb  # noqa: E402
from lipbounds.interop import load_onnx  # noqa: E402

ort.set_default_logger_severity(4)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("build", NETS, ids=lambda build: build.__name__)
def test_network_agrees_with_onnxruntime_and_is_bounded(
    build: Callable[[], Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    """Also: the slopes of onnxruntime's own outputs are below the bound."""
    path = tmp_path / "net.onnx"
    onnx.save(build(), path)
    fn, spec = load_onnx(path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    wide = spec.dtype == np.float64

    def run(x: np.ndarray) -> np.ndarray:
        return session.run(None, {spec.name: x[None] if spec.batch else x})[0].ravel()

    with jax.enable_x64(True) if wide else nullcontext():
        form = lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
        upper = lb.liplt(form).value
        for _ in range(4):
            x, y = rng.standard_normal((2, *spec.shape)).astype(spec.dtype)
            found, expected, other = np.asarray(fn(x)), run(x), run(y)
            assert found.dtype == spec.dtype and found.shape == (spec.outputs,)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(found, expected, rtol=0, atol=(1e-14 if wide else 3e-6) * scale)
            assert 0 < np.linalg.norm(expected - other) / np.linalg.norm(x - y) <= upper < np.inf


@pytest.mark.slow
@pytest.mark.parametrize("build", NETS, ids=lambda build: build.__name__)
def test_bound_of_a_network_is_above_every_slope_found(build: Callable[[], Any], tmp_path: Path) -> None:
    fn, spec = load_onnx(saved(tmp_path, build()))
    with jax.enable_x64(True) if spec.dtype == np.float64 else nullcontext():
        form = lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    upper, lower = lb.liplt(form), lb.empirical(form, steps=20)
    assert 0 < lower.value <= upper.value < np.inf


def test_external_data(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside.onnx", tmp_path / "outside.onnx"
    onnx.save(resnet(), inside)
    onnx.save(resnet(), outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    (one, spec), (other, _) = load_onnx(inside), load_onnx(outside)
    x = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)
    np.testing.assert_array_equal(one(x), other(x))
    data = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"'w\.bin' has \d+: it is cut off or belongs to another model"):
        load_onnx(outside)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ValueError, match=r"'c\d+' are in 'w\.bin', which is missing: it must lie in"):
        load_onnx(outside)


@pytest.mark.parametrize("location", ["../w.bin", "{folder}/w.bin", "link/w.bin", ""])
def test_external_data_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(4000))
    os.symlink(tmp_path, folder / "link")
    model = mlp()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location.format(folder=tmp_path))
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="outside the folder of the model; refused"):
        load_onnx(folder / "net.onnx")


def test_external_data_of_a_local_function_lie_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were read from the working directory, so that another file with that name changed the network."""
    folder, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    for place, value in ((folder, 2), (elsewhere, 7)):
        place.mkdir()
        np.full(3, value, np.float32).tofile(place / "w.bin")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.bin")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("Mul", ["a", "w"], ["b"]),
    ]
    net = Net(("N", 3))
    net.functions = [
        helper.make_function("local", "Scale", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])
    ]
    model = net.done(net.Scale("x", domain="local"))
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    monkeypatch.chdir(elsewhere)
    np.testing.assert_array_equal(load_onnx(folder / "net.onnx")[0](np.ones(3, np.float32)), [2, 2, 2])


def test_a_slice_of_constants_is_that_of_onnxruntime(tmp_path: Path) -> None:
    """Backwards from before the first entry there is one entry, where NumPy has none."""
    net = Net((1, 4))
    bounds = [net.const(np.array([n])) for n in (-10, -(2**63), 0, -1)]
    part = net.Slice(net.const(np.arange(1, 5, dtype=np.float32)), *bounds)
    path = saved(tmp_path, net.done(net.Add("x", net.ReduceSum(part)), (1, 4)))
    x = np.zeros((1, 4), np.float32)
    (expected,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert (expected == 1).all()
    np.testing.assert_array_equal(load_onnx(path)[0](x[0]), expected[0])


# --- what is told about the input and the output -------------------------------------------------------------------


def _flat(shape: tuple[int | str, ...], end: tuple[int | str, ...] = ("N", 3)) -> Any:
    net = Net(shape)
    return net.done(net.MatMul("x", net.w(5, 3)), end)


def test_spec(tmp_path: Path) -> None:
    _, spec = load_onnx(saved(tmp_path, channels_last()))
    assert (spec.name, spec.shape, spec.dtype, spec.outputs) == ("x", (8, 6, 3), np.dtype(np.float32), 5)
    assert spec.batch and spec.opset == 15
    assert spec.notes == (
        "the batch axis of the input 'x' (N, 8, 6, 3) is added and removed",
        "the input is transposed first, by (0, 3, 1, 2)",
    )
    _, spec = load_onnx(saved(tmp_path, unet()))
    assert spec.outputs == 64 and spec.notes[1].endswith("of shape (1, 8, 8) is flattened")
    _, spec = load_onnx(saved(tmp_path, vector()))
    assert spec.shape == (6,) and not spec.batch and spec.notes == ()


def test_free_axes(tmp_path: Path) -> None:
    for free in (
        _flat((1, "time", 5), (1, "time", 3)),
        _flat(("N", "", 5), ("N", "", 3)),
        _flat(("N", 0, 5)),
    ):
        path = saved(tmp_path, free)
        with pytest.raises(
            ValueError, match=r"axis 1 \('(time|unnamed)'\) of the input 'x' .* is free: pass shape=\("
        ):
            load_onnx(path)
        fn, spec = load_onnx(path, shape=(4, 5))
        assert spec.shape == (4, 5) and spec.batch and fn(np.ones((4, 5), np.float32)).shape == (12,)
    with pytest.raises(ValueError, match=r"shape=\(4, 6\) does not fit the input 'x'"):
        load_onnx(path, shape=(4, 6))
    with pytest.raises(ValueError, match=r"shape=\(4,\) does not fit the input 'x'"):
        load_onnx(path, shape=(4,))
    with pytest.raises(ValueError, match=r"shape must hold positive numbers, got \(0, 5\)"):
        load_onnx(path, shape=(0, 5))
    model = _flat(("N", 5))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    path = saved(tmp_path, model)
    with pytest.raises(ValueError, match="has no shape in the file: pass shape="):
        load_onnx(path)
    assert load_onnx(path, shape=(5,))[1].batch


def test_fixed_batch(tmp_path: Path) -> None:
    path = saved(tmp_path, _flat((16, 5), (16, 3)))
    with pytest.raises(
        ValueError, match=r"looks like a fixed batch of 16: pass shape=\(5,\) if it is one, shape=\(16, 5\)"
    ):
        load_onnx(path)
    assert load_onnx(path, shape=(5,))[1].outputs == 3
    assert load_onnx(path, shape=(16, 5))[1].outputs == 48


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    net = Net(("N", 5))
    first = net.Relu("x")
    second = net.NonZero(net.Neg(net.Add("x", "x2")))  # unread where it is not asked for
    model = net.done(first)
    model.graph.output.append(helper.make_tensor_value_info(second, TensorProto.INT64, (2, "n")))
    model.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, ("N", 5)))
    path = saved(tmp_path, model)
    with pytest.raises(ValueError, match="one input is needed, the graph has 'x', 'x2'"):
        load_onnx(path)
    del model.graph.input[1]
    path = saved(tmp_path, model)
    with pytest.raises(ValueError, match="several outputs: pass output= one of 'Relu_0', 'NonZero_3'"):
        load_onnx(path)
    with pytest.raises(ValueError, match="no output 'y': pass output= one of"):
        load_onnx(path, output="y")
    fn, _ = load_onnx(path, output=first)
    np.testing.assert_array_equal(fn(np.array([-1, 0, 1, 2, 3], np.float32)), [0, 0, 1, 2, 3])


def test_calls_are_checked(tmp_path: Path) -> None:
    fn, _ = load_onnx(saved(tmp_path, mlp()))
    with pytest.raises(
        ValueError, match=r"one example of shape \(12,\) and dtype float32, got \(2, 12\) and float32"
    ):
        fn(np.zeros((2, 12), np.float32))
    with pytest.raises(ValueError, match="got .* and int32"):
        fn(np.zeros(12, np.int32))
    batch = np.random.default_rng(0).standard_normal((4, 12)).astype(np.float32)
    np.testing.assert_allclose(jax.vmap(fn)(batch), [fn(x) for x in batch], rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda f: f(batch[0]).sum())(fn)  # a pytree: the weights are its leaves
    assert set(gradient.weights) == set(fn.weights) and all(np.any(g) for g in gradient.weights.values())
    fn, spec = load_onnx(saved(tmp_path, double()))
    with pytest.raises(
        ValueError, match=r"computes in float64: use it, and trace it, within `with jax.enable_x64"
    ):
        lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
