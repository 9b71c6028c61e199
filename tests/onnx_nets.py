"""ONNX graphs as exporters write them, built node by node. Needs the package onnx."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper


class Net:
    """An ONNX graph under construction: methods named after operators add a node and return its output's name."""

    def __init__(self, shape: tuple[int | str, ...], opset: int = 17, dtype: Any = np.float32):
        self.rng = np.random.default_rng(len(shape) + opset)
        self.opset, self.dtype, self.kind = opset, dtype, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs = [helper.make_tensor_value_info("x", self.kind, shape)]
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.functions: list[Any] = []

    def const(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def w(self, *shape: int) -> str:
        """Random weights of about unit gain."""
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        return self.const((self.rng.standard_normal(shape) / np.sqrt(fan)).astype(self.dtype))

    def __getattr__(self, op: str) -> Callable[..., str]:
        def add(*inputs: str, domain: str = "", **attributes: Any) -> str:
            name = f"{op}_{len(self.nodes)}"
            self.nodes.append(
                helper.make_node(op, inputs, [name], name=f"/{name}", domain=domain, **attributes)
            )
            return name

        return add

    def norm(self, x: str, channels: int) -> str:
        scale, var = (self.const(self.rng.uniform(0.5, 1.5, channels).astype(np.float32)) for _ in range(2))
        return self.BatchNormalization(x, scale, self.w(channels), self.w(channels), var)

    def conv(self, x: str, out: int, into: int, size: int = 3, **attributes: Any) -> str:
        pads = attributes.pop("pads", [size // 2] * 4)
        return self.Conv(x, self.w(out, into, size, size), self.w(out), pads=pads, **attributes)

    def done(self, output: str, shape: tuple[int | str, ...] | None = None) -> Any:
        y = helper.make_tensor_value_info(output, self.kind, shape or ["N", "K"])
        graph = helper.make_graph(self.nodes, "graph", self.inputs, [y], self.constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("local", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=self.functions)


def mlp() -> Any:
    net = Net(("batch", 12))
    h = net.Relu(net.Gemm("x", net.w(16, 12), net.w(16), transB=1))
    h = net.Tanh(net.Gemm(h, net.w(8, 16), net.w(8), transB=1))
    return net.done(net.Gemm(h, net.w(3, 8), net.w(3), transB=1))


def lenet() -> Any:
    """Flattened by Shape, Gather, Concat and Reshape, as PyTorch writes x.view(x.size(0), -1)."""
    net = Net(("N", 1, 12, 12), opset=11)
    h = net.AveragePool(net.Tanh(net.conv("x", 4, 1, 5)), kernel_shape=[2, 2], strides=[2, 2])
    h = net.AveragePool(net.Tanh(net.conv(h, 6, 4, 3, pads=[0] * 4)), kernel_shape=[2, 2], strides=[2, 2])
    rows = net.Unsqueeze(net.Gather(net.Shape(h), net.const(0), axis=0), axes=[0])
    h = net.Reshape(h, net.Concat(rows, net.const(np.array([-1])), axis=0))
    return net.done(net.Gemm(net.Sigmoid(net.Gemm(h, net.w(24, 10))), net.w(10, 5)))


def resnet() -> Any:
    net = Net(("N", 3, 8, 8))
    h = net.Relu(net.norm(net.conv("x", 4, 3), 4))
    for width, into, stride in ((4, 4, 1), (8, 4, 2)):
        branch = net.Relu(net.norm(net.conv(h, width, into, strides=[stride] * 2), width))
        branch = net.norm(net.conv(branch, width, width), width)
        short = h if stride == 1 else net.norm(net.conv(h, width, into, 1, strides=[stride] * 2), width)
        h = net.Relu(net.Add(branch, short))
    return net.done(net.Gemm(net.Flatten(net.GlobalAveragePool(h)), net.w(10, 8), net.w(10), transB=1))


def preactivation() -> Any:
    net = Net((1, 3, 8, 8), opset=13)
    h = net.conv("x", 4, 3)
    for _ in range(2):
        h = net.Add(h, net.conv(net.Relu(net.norm(h, 4)), 4, 4))
    h = net.ReduceMean(net.Relu(net.norm(h, 4)), axes=[2, 3], keepdims=0)
    return net.done(net.Add(net.MatMul(h, net.w(4, 5)), net.w(5)))


def densenet() -> Any:
    net = Net(("N", 3, 8, 8), opset=9)
    h, channels = "x", 3
    for _ in range(2):
        h = net.Concat(h, net.conv(net.Relu(net.norm(h, channels)), 3, channels), axis=1)
        channels += 3
    h = net.AveragePool(net.conv(h, 4, channels, 1), kernel_shape=[2, 2], strides=[2, 2])
    return net.done(net.Gemm(net.Flatten(h), net.w(64, 4), net.w(4)))


def unet() -> Any:
    net = Net(("N", 2, 8, 8))
    top = net.Relu(net.conv("x", 4, 2))
    low = net.Relu(net.conv(net.MaxPool(top, kernel_shape=[2, 2], strides=[2, 2]), 6, 4))
    deep = net.Relu(net.conv(low, 6, 6, strides=[2, 2]))
    scales = net.const(np.array([1, 1, 2, 2], np.float32))
    deep = net.Resize(deep, "", scales, mode="nearest", coordinate_transformation_mode="asymmetric",
                      nearest_mode="floor")  # fmt: skip
    low = net.Concat(low, deep, axis=1)
    up = net.Relu(net.ConvTranspose(low, net.w(12, 4, 2, 2), net.w(4), strides=[2, 2]))
    out = net.conv(net.Concat(top, up, axis=1), 1, 8, 1)
    return net.done(out, ("N", 1, 8, 8))


def channels_last() -> Any:
    """As tf2onnx writes it: transposes around every convolution."""
    net = Net(("N", 8, 6, 3), opset=15)
    h = net.Relu(net.conv(net.Transpose("x", perm=[0, 3, 1, 2]), 4, 3, strides=[2, 2]))
    h = net.Transpose(h, perm=[0, 2, 3, 1])
    h = net.MaxPool(net.Transpose(h, perm=[0, 3, 1, 2]), kernel_shape=[2, 2], strides=[1, 1])
    h = net.Reshape(net.Transpose(h, perm=[0, 2, 3, 1]), net.const(np.array([-1, 24])))
    return net.done(net.Add(net.MatMul(h, net.w(24, 5)), net.w(5)))


def mobilenet() -> Any:
    net = Net(("N", 3, 8, 8), opset=14)
    zero, six = net.const(np.float32(0)), net.const(np.float32(6))
    h = net.Clip(net.norm(net.conv("x", 6, 3, strides=[2, 2]), 6), zero, six)
    deep = net.HardSwish(net.norm(net.conv(h, 6, 1, group=6), 6))
    h = net.Add(h, net.norm(net.conv(deep, 6, 6, 1), 6))
    h = net.Squeeze(net.GlobalAveragePool(h), net.const(np.array([2, 3])))
    return net.done(net.Gemm(net.Dropout(h), net.w(5, 6), net.w(5), transB=1))


def vgg() -> Any:
    net = Net((1, 3, 8, 8), opset=7)
    h = net.MaxPool(net.Relu(net.conv("x", 4, 3)), kernel_shape=[2, 2], strides=[2, 2])
    h = net.MaxPool(net.Relu(net.conv(h, 6, 4)), kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    h = net.Dropout(net.Relu(net.Gemm(net.Flatten(h), net.w(96, 8), net.w(8))), ratio=0.5)
    return net.done(net.Gemm(h, net.w(8, 5), net.w(5)))


def mixer() -> Any:
    """Without LayerNorm; GELU as PyTorch writes it before opset 20."""
    net = Net(("N", 1, 8, 8))

    def gelu(v: str) -> str:
        erf = net.Erf(net.Div(v, net.const(np.float32(np.sqrt(2)))))
        return net.Mul(net.Mul(v, net.Add(erf, net.const(np.float32(1)))), net.const(np.float32(0.5)))

    h = net.Conv("x", net.w(6, 1, 4, 4), net.w(6), strides=[4, 4])
    h = net.Transpose(net.Reshape(h, net.const(np.array([0, 6, -1]))), perm=[0, 2, 1])  # (N, 4, 6)
    tokens = net.Transpose(h, perm=[0, 2, 1])
    tokens = net.MatMul(gelu(net.MatMul(tokens, net.w(4, 8))), net.w(8, 4))
    h = net.Add(h, net.Transpose(tokens, perm=[0, 2, 1]))
    h = net.Add(h, net.MatMul(gelu(net.Add(net.MatMul(h, net.w(6, 8)), net.w(8))), net.w(8, 6)))
    return net.done(net.MatMul(net.ReduceMean(h, axes=[1], keepdims=0), net.w(6, 5)))


def acas() -> Any:
    """ACAS Xu: input (1, 1, 1, 5), normalised inside the graph, outputs scaled back."""
    net = Net((1, 1, 1, 5), opset=9)
    mean, scale = net.const(np.arange(5, dtype=np.float32)), net.const(np.array([3, 1, 1, 2, 2], np.float32))
    h = net.Flatten(net.Div(net.Sub("x", mean), scale), axis=1)
    for into, out in ((5, 12), (12, 12), (12, 12), (12, 5)):
        h = net.Add(net.MatMul(h, net.w(into, out)), net.w(out))
        h = net.Relu(h) if into != 12 or out != 5 else h
    return net.done(net.Add(net.Mul(h, net.const(np.float32(3.7))), net.const(np.float32(7.5))), (1, 5))


def vector() -> Any:
    """Without a batch axis, weights (out, in) from the left."""
    net = Net((6,))
    h = net.LeakyRelu(net.Add(net.MatMul(net.w(8, 6), "x"), net.w(8)), alpha=0.1)
    return net.done(net.Add(net.MatMul(net.w(3, 8), h), net.w(3)), (3,))


def sequence() -> Any:
    """One-dimensional convolutions, SiLU as a product, a Split, a Slice and a Where with a constant mask."""
    net = Net(("N", 2, 12), opset=13)
    h = net.Conv("x", net.w(4, 2, 3), net.w(4), pads=[2, 0], dilations=[1])
    h = net.Mul(h, net.Sigmoid(h))
    net.nodes.append(helper.make_node("Split", [h], ["left", "right"], axis=1))
    h = net.Max("left", net.Neg("right"))
    h = net.Slice(h, net.const(np.array([0])), net.const(np.array([12])), net.const(np.array([2])),
                  net.const(np.array([2])))  # fmt: skip
    mask = net.Equal(net.Mod(net.const(np.arange(6)), net.const(np.int64(2))), net.const(np.int64(0)))
    h = net.Where(mask, h, net.Softplus(h))
    return net.done(net.Gemm(net.Flatten(h), net.w(12, 3)))


def functions() -> Any:
    """A local function, as torch's newer exporter writes them; weights with default values among the inputs."""
    net = Net(("N", 6), opset=18)
    body = [helper.make_node("MatMul", ["a", "w"], ["p"]), helper.make_node("Elu", ["p"], ["q"])]
    net.functions = [
        helper.make_function("local", "Layer", ["a", "w"], ["q"], body, [helper.make_opsetid("", 18)])
    ]
    weight = net.w(6, 5)
    net.inputs.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, (6, 5)))
    h = net.Layer(net.Layer("x", weight, domain="local"), net.w(5, 4), domain="local")
    return net.done(net.Identity(h))


def half() -> Any:
    """Weights stored as float16 and cast in the graph, a shape made by ConstantOfShape and Range."""
    net = Net(("N", 4, 4))
    w = net.Cast(net.const(net.rng.standard_normal((16, 3)).astype(np.float16)), to=TensorProto.FLOAT)
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.5])
    ones = net.ConstantOfShape(net.const(np.array([16])), value=value)
    order = net.Range(net.const(np.int64(3)), net.const(np.int64(-1)), net.const(np.int64(-1)))
    shape = net.Concat(net.Shape("x", start=0, end=-2), net.const(np.array([16])), axis=0)
    h = net.Reshape(net.Gather("x", order, axis=1), shape)
    return net.done(net.HardSigmoid(net.MatMul(net.Mul(h, ones), w)))


def double() -> Any:
    net = Net(("N", 5), dtype=np.float64)
    return net.done(net.MatMul(net.Relu(net.MatMul("x", net.w(5, 7))), net.w(7, 3)))


NETS = [mlp, lenet, resnet, preactivation, densenet, unet, channels_last, mobilenet, vgg, mixer, acas, vector,
        sequence, functions, half, double]  # fmt: skip


def saved(folder: Path, model: Any) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path
