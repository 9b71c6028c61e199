"""ONNX files on the command line: bounds, certificates and radii of networks with their normalisation in front."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import lipbounds as lb
from lipbounds.cli import app

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


def run(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


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
