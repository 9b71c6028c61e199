"""Operators with windows and spatial axes: convolutions, pooling, padding, resizing. Layout (N, C, spatial...)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lipbounds.interop import _onnx_sequences as _onnx_sequences  # puts its operators into the table
from lipbounds.interop._onnx_graph import Apply, Node, Refused, check_size
from lipbounds.interop._onnx_ops import OPERATORS as OPERATORS
from lipbounds.interop._onnx_ops import operator

_HIGHEST = lax.Precision.HIGHEST
_WIDEST = 2**16  # entries of a window or a padding along one axis: a damaged file must not take all memory
_AUTO = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")
_ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
_EXPLICIT = "export with explicit pads, without auto_pad"
Pads = list[tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """A window over the spatial axes, of sizes `spatial`; one entry per axis each."""

    spatial: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: Pads

    @property
    def reach(self) -> tuple[int, ...]:
        """How many entries a window spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def _halves(total: int, auto: str) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (small, large) if auto == "SAME_UPPER" else (large, small)


def _per_axis(node: Node, name: str, count: int, default: int) -> tuple[int, ...]:
    values = tuple(int(n) for n in node.attr(name, [default] * count))
    if len(values) != count or min(values, default=0) < (0 if name == "output_padding" else 1):
        raise ValueError(f"{name} is {list(values)} for {count} spatial axes")
    return values


def _explicit(node: Node, count: int) -> Pads:
    values = [int(n) for n in node.attr("pads", [0] * (2 * count))]
    if len(values) != 2 * count or min(values, default=0) < 0 or max(values, default=0) > _WIDEST:
        raise ValueError(f"pads are {values} for {count} spatial axes")
    return list(zip(values[:count], values[count:], strict=True))


def _window(node: Node, kernel: Sequence[int]) -> Window:
    spatial = node.shape()[2:]
    count = len(spatial)
    if not count or len(kernel) != count or max(kernel) > _WIDEST:
        raise ValueError(f"a window of shape {tuple(kernel)} over an input of shape {node.shape()}")
    strides, dilations = (_per_axis(node, name, count, 1) for name in ("strides", "dilations"))
    auto = node.choice("auto_pad", *_AUTO)
    pads = _explicit(node, count) if auto == "NOTSET" else [(0, 0)] * count
    window = Window(spatial, tuple(kernel), strides, dilations, pads)
    if not auto.startswith("SAME") and any(
        n + low + high < r for n, (low, high), r in zip(spatial, pads, window.reach, strict=True)
    ):
        raise ValueError(f"its window spans {window.reach} entries, more than the input and its padding hold")
    if auto.startswith("SAME"):
        if max(dilations) > 1:
            raise Refused(
                f"the standard and onnxruntime pad differently for auto_pad={auto} with dilations", _EXPLICIT
            )
        totals = [
            (-(-n // s) - 1) * s + r - n for n, s, r in zip(spatial, strides, window.reach, strict=True)
        ]
        since = {"Conv": 0, "AveragePool": 19}.get(node.proto.op_type, math.inf)  # where onnxruntime runs it
        if min(totals) < 0 and node.version < since:
            raise Refused(
                f"onnxruntime does not run auto_pad={auto} with strides that leave entries out", _EXPLICIT
            )
        return Window(spatial, window.kernel, strides, dilations, [_halves(max(t, 0), auto) for t in totals])
    return window


def _kernel(node: Node) -> tuple[int, ...]:
    kernel = node.shape(1)[2:]
    declared = tuple(node.attr("kernel_shape", kernel))
    if declared != kernel:
        raise ValueError(f"kernel_shape is {list(declared)}, the weight has shape {node.shape(1)}")
    return kernel


def _biased(out: Any, bias: Any) -> Any:
    return out if bias is None else out + bias.reshape((-1,) + (1,) * (out.ndim - 2))


@operator(22, "Conv")
def _conv(node: Node) -> Apply:
    window, groups = _window(node, _kernel(node)), int(node.attr("group", 1))

    def apply(x: Any, weight: Any, bias: Any = None) -> Any:
        out = lax.conv_general_dilated(
            x,
            weight,
            window.strides,
            window.pads,
            rhs_dilation=window.dilations,
            feature_group_count=groups,
            precision=_HIGHEST,
        )
        return _biased(out, bias)

    return apply


@operator(22, "ConvTranspose")
def _conv_transpose(node: Node) -> Apply:
    kernel, groups = _kernel(node), int(node.attr("group", 1))
    spatial = node.shape()[2:]
    count = len(spatial)
    strides, dilations = (_per_axis(node, name, count, 1) for name in ("strides", "dilations"))
    extra = _per_axis(node, "output_padding", count, 0)
    if any(e >= s for e, s in zip(extra, strides, strict=True)):
        raise Refused(
            f"its output_padding {list(extra)} is not below its strides {list(strides)}: onnxruntime does not run it",
            "export with output_padding below the strides",
        )
    reach = Window(spatial, kernel, strides, dilations, []).reach
    auto, wanted = node.choice("auto_pad", *_AUTO), node.attr("output_shape")
    full = [s * (n - 1) + e + r for n, s, e, r in zip(spatial, strides, extra, reach, strict=True)]
    check_size(full)
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [n * s for n, s in zip(spatial, strides, strict=True)]
    if wanted is not None:
        sizes = [int(w) for w in wanted[-count:]]
        if any(w > f for f, w in zip(full, sizes, strict=True)):
            raise Refused(
                f"its output_shape or auto_pad={auto} asks for sizes {sizes}, and the windows reach only {full}: the "
                "standard and onnxruntime differ",
                "export with explicit pads and output_padding, without auto_pad and output_shape",
            )
        pads = [_halves(f - w, auto) for f, w in zip(full, sizes, strict=True)]
    else:
        pads = _explicit(node, count) if auto == "NOTSET" else [(0, 0)] * count
    around = [(r - 1 - low, r - 1 - high + e) for r, (low, high), e in zip(reach, pads, extra, strict=True)]

    def apply(x: Any, weight: Any, bias: Any = None) -> Any:
        inputs, outputs = weight.shape[:2]
        weight = jnp.flip(weight, range(2, weight.ndim)).reshape(groups, inputs // groups, outputs, *kernel)
        weight = jnp.swapaxes(weight, 1, 2).reshape(groups * outputs, inputs // groups, *kernel)
        out = lax.conv_general_dilated(
            x,
            weight,
            (1,) * count,
            around,
            lhs_dilation=strides,
            rhs_dilation=dilations,
            feature_group_count=groups,
            precision=_HIGHEST,
        )
        return _biased(out, bias)

    return apply


# --- pooling -------------------------------------------------------------------------------------------------------


def _pooling(node: Node) -> tuple[Window, Pads]:
    """The window of a pool, and its pads with the end moved so that the output has the size that `ceil_mode` asks."""
    window = _window(node, tuple(int(k) for k in node.attr("kernel_shape")))
    auto = node.choice("auto_pad", *_AUTO)
    if not node.attr("ceil_mode", 0) or auto in ("SAME_UPPER", "SAME_LOWER"):
        return window, window.pads
    ends: Pads = []
    for n, s, r, (low, high) in zip(window.spatial, window.strides, window.reach, window.pads, strict=True):
        out = -(-(n + low + high - r) // s) + 1
        out -= (out - 1) * s >= n + low  # a window that begins in the padding at the end is left out
        ends.append((low, (out - 1) * s + r - n - low))
    if auto == "VALID" and any(high > 0 for _, high in ends):
        raise Refused("the standard and onnxruntime differ on ceil_mode with auto_pad=VALID", _EXPLICIT)
    return window, ends


def _reduce_window(x: Any, init: float, function: Any, window: Window, pads: Pads) -> Any:
    return lax.reduce_window(
        x,
        np.asarray(init, x.dtype),
        function,
        (1, 1, *window.kernel),
        (1, 1, *window.strides),
        [(0, 0), (0, 0), *pads],
        window_dilation=(1, 1, *window.dilations),
    )


@operator(22, "MaxPool")
def _max_pool(node: Node) -> Apply:
    window, pads = _pooling(node)
    if any(max(given) >= k for k, given in zip(window.kernel, window.pads, strict=True)):
        raise Refused(
            f"it pads by {window.pads} for a kernel {window.kernel}: onnxruntime does not run it, as a window over "
            "padding only has no maximum",
            "use less padding",
        )
    return lambda x: _reduce_window(x, -np.inf, lax.max, window, pads)


@operator(22, "AveragePool")
def _average_pool(node: Node) -> Apply:
    window, pads = _pooling(node)
    padded = bool(node.attr("count_include_pad", 0))
    counts = np.ones((1, 1), int)
    sizes = (window.spatial, window.kernel, window.strides, window.dilations, window.reach)
    for n, k, s, d, r, given, (low, high) in zip(*sizes, window.pads, pads, strict=True):
        first = np.arange((n + low + high - r) // s + 1) * s - low
        check_size((len(first), k))
        places = first[:, None] + np.arange(k) * d
        begin, end = (-low, n + given[1]) if padded else (0, n)
        counts = counts[..., None] * ((places >= begin) & (places < end)).sum(axis=1)
    if not counts.all():
        raise Refused("a window reads padding only, so its average is 0/0", "use less padding")
    uniform = (counts == counts.flat[0]).all()

    def apply(x: Any) -> Any:
        sums = _reduce_window(x, 0, lax.add, window, pads)
        return sums / (int(counts.flat[0]) if uniform else counts.astype(x.dtype))

    return apply


@operator(22, "GlobalAveragePool", "GlobalMaxPool")
def _global_pool(node: Node) -> Apply:
    function = jnp.max if node.proto.op_type == "GlobalMaxPool" else jnp.mean
    return functools.partial(function, axis=tuple(range(2, len(node.shape()))), keepdims=True)


# --- padding, blocks, resizing -------------------------------------------------------------------------------------


@operator(25, "Pad")
def _pad(node: Node) -> Apply:
    mode, rank = node.choice("mode", "constant", "reflect", "edge", "wrap"), len(node.shape())
    if node.version < 11:
        pads, value = [int(n) for n in node.attr("pads")], float(node.attr("value", 0.0))
    else:
        pads = list(node.ints(1, "pads"))
        value = node.scalar(2, "padding value") if node.has(2) else 0.0
    axes = [node.axis(a) for a in node.ints(3, "axes")] if node.has(3) else list(range(rank))
    if len(pads) != 2 * len(axes) or len(set(axes)) != len(axes):
        raise ValueError(f"pads are {pads} for the axes {axes}")
    widths = [(0, 0)] * rank
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        widths[axis] = (low, high)
    check_size([max(n + low + high, 0) for n, (low, high) in zip(node.shape(), widths, strict=True)])
    if mode == "constant":
        return lambda x: lax.pad(x, np.asarray(value, x.dtype), [(low, high, 0) for low, high in widths])
    if min(pads, default=0) < 0:
        raise Refused(
            f"padding by {pads} in mode {mode!r} is not supported", "pad with constants, or by numbers >= 0"
        )
    if mode == "reflect" and any(
        max(w) >= n > 0 for w, n in zip(widths, node.shape(), strict=True) if max(w)
    ):
        raise ValueError(f"padding by {pads} reflects more than the input holds")
    return lambda x: jnp.pad(x, widths, mode=mode)


@operator(28, "DepthToSpace")
def _depth_to_space(node: Node) -> Apply:
    n, c, h, w = node.shape()
    b = int(node.attr("blocksize"))
    if node.choice("mode", "DCR", "CRD") == "DCR":
        split, order = (n, b, b, c // (b * b), h, w), (0, 3, 4, 1, 5, 2)
    else:
        split, order = (n, c // (b * b), b, b, h, w), (0, 1, 4, 2, 5, 3)
    return lambda x: x.reshape(split).transpose(order).reshape(n, c // (b * b), h * b, w * b)


@operator(28, "SpaceToDepth")
def _space_to_depth(node: Node) -> Apply:
    n, c, h, w = node.shape()
    b = int(node.attr("blocksize"))
    split = (n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if node.choice("mode", "DCR", "CRD") == "DCR" else (0, 1, 3, 5, 2, 4)
    return lambda x: x.reshape(split).transpose(order).reshape(n, c * b * b, h // b, w // b)


def _coordinates(mode: str, size: int, out: int, scale: float) -> np.ndarray:
    """Where each entry of a resized axis lies on the axis before, in entries."""
    i = np.arange(out, dtype=np.float64)
    if mode == "asymmetric":
        return i / scale
    if mode == "align_corners":
        return i * (size - 1) / (out - 1) if out > 1 else i
    if mode == "pytorch_half_pixel" and out == 1:
        return i
    if mode in ("half_pixel", "pytorch_half_pixel"):
        return (i + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        return size / 2 * (1 - out / (scale * size)) + (i + 0.5) / scale - 0.5
    raise Refused(
        f"coordinate_transformation_mode={mode!r} is not supported", "resize with half_pixel or asymmetric"
    )


def _nearest(mode: str, coordinates: np.ndarray, size: int) -> np.ndarray:
    rounded = {
        "floor": np.floor(coordinates),
        "ceil": np.ceil(coordinates),
        "round_prefer_floor": np.ceil(coordinates - 0.5),
        "round_prefer_ceil": np.floor(coordinates + 0.5),
    }[mode]
    return np.clip(rounded, 0, size - 1).astype(np.int32)


def _linear(coordinates: np.ndarray, size: int) -> np.ndarray:
    """(out, in) matrix of the linear interpolation between the two neighbours, the edges repeated."""
    coordinates = np.clip(coordinates, 0, size - 1)
    low = np.minimum(np.floor(coordinates).astype(int), max(size - 2, 0))
    matrix = np.zeros((len(coordinates), size))
    rows = np.arange(len(coordinates))
    np.add.at(matrix, (rows, low), 1 - (coordinates - low))
    np.add.at(matrix, (rows, np.minimum(low + 1, size - 1)), coordinates - low)
    return matrix


def _resizing(
    node: Node, scales: dict[int, float], sizes: dict[int, int], coordinate: str, rounding: str
) -> Apply:
    """Resize axis by axis: `sizes` entries each, by `scales`."""
    mode = node.attr("mode", "nearest")
    steps: list[tuple[int, np.ndarray]] = []
    for axis, out in sizes.items():
        size, scale = node.shape()[axis], scales[axis]
        check_size((out, size))
        if out == size and scale == 1:
            continue
        places = _coordinates(coordinate, size, out, scale)
        if mode == "linear":
            steps.append((axis, _linear(places, size)))
        elif mode != "nearest":
            raise Refused(f"mode={mode!r} is not supported", "resize with mode nearest or linear")
        elif coordinate == "align_corners" or not (float(scale).is_integer() or (1 / scale).is_integer()):
            raise Refused(
                f"nearest by the factor {scale} ({coordinate}) depends on rounding",
                "resize by a whole number, in mode half_pixel or asymmetric",
            )
        else:
            steps.append((axis, _nearest(rounding, places, size)))

    def apply(x: Any) -> Any:
        for axis, table in steps:
            if table.ndim == 1:
                x = jnp.take(x, table, axis, mode="clip")
            else:
                moved = jnp.tensordot(x, table.astype(x.dtype), axes=(axis, 1), precision=_HIGHEST)
                x = jnp.moveaxis(moved, -1, axis)
        return x

    return apply


def _scaled(
    node: Node, axes: Sequence[int], factors: Sequence[float]
) -> tuple[dict[int, float], dict[int, int]]:
    if len(axes) != len(factors) or not all(f > 0 for f in factors):
        raise ValueError(f"scales are {list(factors)} for {len(axes)} axes")
    scales = dict(zip(axes, map(float, factors), strict=True))
    return scales, {a: int(np.floor(np.float32(node.shape()[a]) * np.float32(f))) for a, f in scales.items()}


@operator(9, "Upsample")
def _upsample(node: Node) -> Apply:
    factors = node.constant(1, "scales").ravel().tolist() if node.version >= 9 else list(node.attr("scales"))
    return _resizing(node, *_scaled(node, range(len(node.shape())), factors), "asymmetric", "floor")


@operator(19, "Resize")
def _resize(node: Node) -> Apply:
    if node.attr("antialias", 0) or node.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Refused(
            "resizing with antialias or a fixed aspect ratio is not supported", "resize without them"
        )
    given = node.attr("axes")
    axes = [node.axis(int(a)) for a in (range(len(node.shape())) if given is None else given)]
    if node.version < 11:
        return _resizing(
            node, *_scaled(node, axes, node.constant(1, "scales").ravel().tolist()), "asymmetric", "floor"
        )
    if node.has(1):
        node.static.add(1)  # the region of tf_crop_and_resize, which is refused
    factors = node.constant(2, "scales").ravel().tolist() if node.has(2) else []
    wanted = node.ints(3, "sizes") if node.has(3) else ()
    if wanted:
        sizes = dict(zip(axes, wanted, strict=True))
        scales = {a: n / node.shape()[a] for a, n in sizes.items()}
    else:
        scales, sizes = _scaled(node, axes, factors)
    coordinate = node.attr("coordinate_transformation_mode", "half_pixel")
    return _resizing(node, scales, sizes, coordinate, node.choice("nearest_mode", *_ROUNDINGS))
