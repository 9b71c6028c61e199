"""Windows with auto_pad, ceil_mode and dilations: what onnxruntime computes, or refused.

`auto_pad` is deprecated, and in some combinations onnxruntime departs from the standard. A file is read for those who
run it, so such a combination must be refused.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

import jax  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import lipbounds as lb  # noqa: E402
from lipbounds.interop import load_onnx  # noqa: E402

ort.set_default_logger_severity(4)
OPS = ("MaxPool", "AveragePool", "Conv", "ConvTranspose")
SAMPLE = {"MaxPool": 23, "AveragePool": 23, "Conv": 17, "ConvTranspose": 101}
SHAPE = (1, 1, 7, 6)
KERNELS = ((1, 2), (3, 2), (2, 3))
STRIDES = ((1, 1), (2, 2), (1, 3), (3, 4))
DILATIONS = ((1, 1), (1, 2), (2, 1), (2, 3))
AUTO = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
Attributes = dict[str, Any]


def cases(op: str) -> Iterator[tuple[int, Attributes]]:
    """(opset, attributes) of every combination that the opset has."""
    dilated_since = {"MaxPool": 10, "AveragePool": 19}.get(op, 7)
    more: list[Attributes] = [{}]
    if op == "AveragePool":
        more = [{}, {"count_include_pad": 1}]
    elif op == "ConvTranspose":
        more = [{}, {"output_padding": [1, 0]}, {"output_padding": [0, 2]}, {"output_shape": [14, 13]},
                {"output_shape": [8, 9]}, {"output_shape": [25, 20], "output_padding": [1, 1]}]  # fmt: skip
    grid = itertools.product((7, 10, 11, 12, 19, 22), AUTO, (0, 1), KERNELS, STRIDES, DILATIONS, more)
    for opset, auto, ceil, kernel, strides, dilations, extra in grid:
        if ceil and (op not in ("MaxPool", "AveragePool") or opset < 10):
            continue
        if dilations != (1, 1) and opset < dilated_since:
            continue
        attributes = {"kernel_shape": kernel, "strides": strides, **extra}
        attributes |= {"auto_pad": auto} if auto != "NOTSET" else {}
        attributes |= {"ceil_mode": 1} if ceil else {}
        attributes |= {"dilations": dilations} if dilations != (1, 1) else {}
        yield opset, attributes


def compare(op: str, opset: int, attributes: Attributes, path: Path) -> str:
    """equal, refused, or refused by both; an AssertionError where the outputs differ."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(SHAPE).astype(np.float32)
    kernel = attributes["kernel_shape"]
    weights = {"Conv": [(2, 1, *kernel)], "ConvTranspose": [(1, 2, *kernel)]}.get(op, [])
    held = [numpy_helper.from_array(rng.standard_normal(w).astype(np.float32), "w") for w in weights]
    node = helper.make_node(op, ["x", "w"][: 1 + len(held)], ["y"], **attributes)
    y = helper.make_empty_tensor_value_info("y")
    y.type.tensor_type.elem_type = TensorProto.FLOAT
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)
    graph = helper.make_graph([node], "graph", [source], [y], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    try:
        (expected,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    except Exception:  # onnxruntime has many
        expected = None
    try:
        with jax.disable_jit():
            found = np.asarray(load_onnx(path)[0](x[0]))
    except lb.UnsupportedError as error:
        assert error.items[0].remedy.startswith("export with")
        return "refused" if expected is not None else "refused by both"
    except ValueError as error:
        assert "more than the input and its padding hold" in str(error), error
        return "empty"
    assert expected is not None, f"{op} {opset} {attributes}: onnxruntime does not run it"
    assert found.size == expected.size, f"{op} {opset} {attributes}: {found.size} of {expected.shape}"
    np.testing.assert_allclose(found, expected.ravel(), atol=1e-5, err_msg=f"{op} {opset} {attributes}")
    return "equal"


def plain(attributes: Attributes) -> bool:
    """Whether this is read as onnxruntime reads it, if onnxruntime runs it at all."""
    auto = attributes.get("auto_pad", "NOTSET")
    if "output_shape" in attributes or "output_padding" in attributes:
        return False
    return auto == "NOTSET" or not {"ceil_mode", "dilations"} & attributes.keys()


def sweep(op: str, some: list[tuple[int, Attributes]], path: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for opset, attributes in some:
        word = compare(op, opset, attributes, path)
        wide = op == "ConvTranspose" and "SAME" in attributes.get("auto_pad", "")
        assert word != "refused" or wide or not plain(attributes), f"{op} {opset} {attributes} is refused"
        found[word] += 1
    return found


@pytest.mark.sampled(4)
@pytest.mark.parametrize("op", OPS)
def test_a_sample_of_windows_is_equal_or_refused(op: str, tmp_path: Path) -> None:
    found = sweep(op, list(cases(op))[:: SAMPLE[op]], tmp_path / "net.onnx")
    assert found["equal"] >= 20 and found.total() - found["equal"] >= 8, found


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_every_window_is_equal_or_refused(op: str, tmp_path: Path) -> None:
    found = sweep(op, list(cases(op)), tmp_path / "net.onnx")
    assert found["equal"] >= 0.4 * found.total() or op == "ConvTranspose", found


PINNED: list[tuple[str, int, Attributes, str]] = [
    ("MaxPool", 11, {"kernel_shape": (1, 2), "strides": (2, 2), "dilations": (1, 2), "ceil_mode": 1,
                     "auto_pad": "SAME_LOWER"}, "refused"),  # the same shape, other values
    ("MaxPool", 12, {"kernel_shape": (1, 2), "dilations": (1, 2), "auto_pad": "SAME_UPPER"}, "refused"),
    ("AveragePool", 19, {"kernel_shape": (1, 2), "dilations": (1, 2), "auto_pad": "SAME_LOWER"}, "refused"),
    ("AveragePool", 10, {"kernel_shape": (3, 2), "strides": (3, 4), "ceil_mode": 1, "auto_pad": "VALID"}, "refused"),
    ("MaxPool", 12, {"kernel_shape": (3, 2), "strides": (3, 4), "ceil_mode": 1, "auto_pad": "VALID"}, "refused"),
    ("MaxPool", 12, {"kernel_shape": (3, 3), "strides": (1, 3), "ceil_mode": 1, "auto_pad": "VALID"}, "equal"),
    ("ConvTranspose", 11, {"kernel_shape": (1, 2), "strides": (2, 2), "auto_pad": "SAME_UPPER"}, "refused"),
    ("ConvTranspose", 11, {"kernel_shape": (3, 3), "strides": (2, 2), "auto_pad": "SAME_LOWER"}, "equal"),
    ("ConvTranspose", 11, {"kernel_shape": (3, 3), "strides": (2, 2), "output_padding": (2, 0)}, "refused by both"),
    ("Conv", 11, {"kernel_shape": (1, 2), "dilations": (1, 2), "auto_pad": "SAME_UPPER"}, "refused by both"),
    ("MaxPool", 12, {"kernel_shape": (1, 2), "strides": (1, 3), "auto_pad": "SAME_UPPER"}, "refused by both"),
    ("AveragePool", 19, {"kernel_shape": (2, 3), "dilations": (2, 3), "ceil_mode": 1}, "empty"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "opset", "attributes", "word"), PINNED)
def test_windows_that_were_read_otherwise(
    op: str, opset: int, attributes: Attributes, word: str, tmp_path: Path
) -> None:
    assert compare(op, opset, attributes, tmp_path / "net.onnx") == word
