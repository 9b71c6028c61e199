"""ONNX files on the command line: bounds, certificates and radii of networks with their normalisation in front."""

import json

import jax
import numpy as np
import pytest
from command import run

import lipbounds as lb
from lipbounds.interop import load_onnx

onnx = pytest.importorskip("onnx")
MEAN, STD = 0.3, 0.4


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(s) / np.sqrt(s[1])).astype(np.float32) for s in ((14, 12), (5, 14))]


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    """(2, 2, 3) -> flatten -> dense, relu, dense -> softmax."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Flatten", ["x"], ["f"], axis=1),
        helper.make_node("MatMul", ["f", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["z"]),
        helper.make_node("Softmax", ["z"], ["p"], axis=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["N", 2, 2, 3]), ("p", ["N", 5]))
    ]
    held = [numpy_helper.from_array(np.ascontiguousarray(w.T), f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], held)
    file = tmp_path_factory.mktemp("onnx") / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    return file


def test_bounds_are_those_of_the_network_in_the_units_of_the_raw_input(path, weights, tmp_path):
    plain = lb.lipsdp(lb.from_weights(weights, activation="relu")).value
    for words, factor in (((), 1.0), (("--mean", MEAN, "--std", STD), STD), (("--std", "0.4,0.4,0.4"), STD)):
        file = tmp_path / "b.json"
        run("bounds", path, "--drop", "softmax", *words, "--json", file)
        (row,) = json.loads(file.read_text())["upper"]
        assert row["value"] == pytest.approx(plain / factor, rel=1e-4)


def test_radii_and_certificates(path, weights, tmp_path):
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 1, (20, 2, 2, 3)).astype(np.float32)
    first, second = (w.astype(np.float64) for w in weights)
    logits = np.maximum((x.reshape(20, -1) - MEAN) / STD @ first.T, 0) @ second.T
    np.savez(tmp_path / "d.npz", x=x, y=logits.argmax(axis=1))
    words = (path, "--drop", "softmax", "--mean", MEAN, "--std", STD)
    radii = []
    for more in ((), ("--local",)):
        file = tmp_path / "r.json"
        run("certify", *words, "--data", tmp_path / "d.npz", "--eps", "0.01", "--json", file, *more)
        record = json.loads(file.read_text())
        assert record["guarantee"] == "verified"
        radii.append(np.array(record["radius"]))
    assert (radii[0] > 0).all() and (radii[1] >= radii[0]).all() and (radii[1] > 1.2 * radii[0]).any()
    certificate = tmp_path / "net.certificate"
    run("bounds", *words, "--certificate", certificate)
    tail = ("--drop", "softmax", "--mean", MEAN, "--std", STD)
    assert "proved again" in run("verify", certificate, "--model", path, *tail).stdout
    run("verify", certificate, "--model", path, "--drop", "softmax", code=1)  # another network


def test_refusals(path, tmp_path):
    assert "Softmax" in run("bounds", path, code=1).stderr
    for words, why in (
        (("--mean", "1,2,3,4"), "no channel axis"),
        (("--std", "0"), "must be > 0"),
        (("--std", "nan"), "must be a number"),
        (("--mean", "a"), "must be a number"),
    ):
        assert why in run("bounds", path, "--drop", "softmax", *words, code=1).stderr
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(path.read_bytes()[:200])
    assert "cut off" in run("bounds", cut, code=1).stderr


# --- what a remedy asks for, done by the command itself ------------------------------------------------------------


def value(path, *words, method="liplt", tmp):
    file = tmp / "b.json"
    run("bounds", path, "--method", method, *words, "--json", file, "--force")
    (row,) = json.loads(file.read_text())["upper"]
    return row["value"]


def test_a_file_in_float64_is_bounded_and_certified_in_float64(tmp_path):
    from onnx_nets import double, saved

    path = saved(tmp_path, double())
    fn, spec = load_onnx(path)
    with jax.enable_x64(True):
        form = lb.trace(fn, jax.ShapeDtypeStruct(spec.shape, spec.dtype))
        expected = lb.liplt(form).value
    assert value(path, tmp=tmp_path) == expected
    run("bounds", path, "--certificate", tmp_path / "c.certificate")
    run("verify", tmp_path / "c.certificate", "--model", path)
    x = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)  # promoted, exactly
    y = [int(np.argmax(form(v.astype(np.float64)))) for v in x]
    np.savez(tmp_path / "d.npz", x=x, y=y)
    file = tmp_path / "r.json"
    run("certify", path, "--data", tmp_path / "d.npz", "--method", "liplt", "--local", "--json", file)
    assert min(json.loads(file.read_text())["radius"]) > 0
    run("certify", path, "--data", tmp_path / "d.npz", "--mean", "0.1", "--std", "2", "--method", "liplt")


def test_free_height_and_width(tmp_path):
    from onnx_nets import Net, saved

    net = Net(("N", 3, "h", "w"))
    path = saved(tmp_path, net.done(net.Flatten(net.GlobalAveragePool(net.Relu(net.conv("x", 2, 3))))))
    assert "pass shape=(3, h, w) with numbers (--shape on" in run("bounds", path, code=1).stderr
    assert 0 < value(path, "--shape", "3,4,5", tmp=tmp_path) < 10
    assert "does not fit the input" in run("bounds", path, "--shape", "4,4,5", code=1).stderr
    for wrong in ("3,0,5", "3,a", ""):
        assert "not a shape such as 3,32,32" in run("bounds", path, "--shape", wrong, code=2).stderr


def test_one_of_several_outputs(tmp_path):
    from onnx import TensorProto, helper
    from onnx_nets import Net, saved

    net = Net(("N", 4))
    first, second = net.Relu("x"), net.Mul("x", net.const(np.float32(3)))
    model = net.done(first)
    model.graph.output.append(helper.make_tensor_value_info(second, TensorProto.FLOAT, ("N", 4)))
    path = saved(tmp_path, model)
    assert "(--output on the command line)" in run("bounds", path, code=1).stderr
    assert value(path, "--output", first, tmp=tmp_path) == pytest.approx(1)
    assert value(path, "--output", second, tmp=tmp_path) == pytest.approx(3)
    assert "no output 'z'" in run("bounds", path, "--output", "z", code=1).stderr


def test_further_inputs_as_constants(tmp_path):
    from onnx import TensorProto, helper
    from onnx_nets import Net, saved

    net = Net(("N", 4))
    model = net.done(net.Mul(net.Relu("x"), net.Add("a", "b")))
    for name, shape in (("a", ("N", 4)), ("b", ())):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    path, file = saved(tmp_path, model), tmp_path / "a.npy"
    np.save(file, np.array([[1, 2, 4, 3]], np.float32))
    assert "(--constant on the command line)" in run("bounds", path, code=1).stderr
    assert value(path, "--constant", f"a={file}", "--constant", "b=0.5", tmp=tmp_path) == pytest.approx(4.5)
    header = (
        b"\x93NUMPY\x01\x00\x46\x00{'descr': '<f4', 'fortran_order': False, 'shape': (100000000, 99999)}\n"
    )
    file.write_bytes(header.ljust(10 + 0x46) + bytes(9))
    for words, why in (
        ((f"a={file}",), "not an .npy file of numbers"),
        (("a",), "must be name=number or name=file.npy"),
        (("b=1", "b=2"), "each name once"),
        ((f"a={tmp_path / 'none.npy'}",), "none.npy"),
        (("c=1",), "the graph has no input 'c'"),
    ):
        given = [part for word in words for part in ("--constant", word)]
        assert why in run("bounds", path, *given, code=1).stderr
    model_file = tmp_path / "m.safetensors"
    model_file.write_bytes(b"")
    assert (
        "--constant applies to ONNX files only"
        in run("bounds", model_file, "--constant", "a=1", code=1).stderr
    )
    assert "--shape applies to ONNX files only" in run("bounds", model_file, "--shape", "3", code=1).stderr


def test_thousands_of_outputs_are_bounded_without_their_pairs(tmp_path, monkeypatch):
    from onnx_nets import Net, saved

    net = Net(("N", 8))
    path = saved(tmp_path, net.done(net.MatMul(net.Relu("x"), net.w(8, 3000))))
    asked = []
    liplt = lb.liplt
    monkeypatch.setattr(lb, "liplt", lambda *a, **k: asked.append(k["pairwise"]) or liplt(*a, **k))
    assert value(path, tmp=tmp_path) > 0
    assert asked == [False]


def test_help_is_honest_about_time():
    text = " ".join(run("bounds", "--help").stdout.replace("│", " ").split())
    assert "half a second to two minutes on large convolutional ones" in text
    for option in ("--shape", "--output", "--constant"):
        assert option in text
