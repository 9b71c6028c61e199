"""Units and layout of examples: mistakes that shapes and values show, each named with what mends it.

A form knows the shape of its input and nothing of its units, and a plain function may take any numbers. So only what
looks like images is held to [0, 1], the units of an eps in pixels:

- an image is an array (H, W, C) or (C, H, W) with 1, 3 or 4 channels, or (H, W) with H = W, of at least 8 pixels a
  side, or a vector of as many entries;
- images without negative values that exceed 2 are taken for pixels 0..255 (a vector only where all its values are
  whole numbers, as features may have any scale);
- images with negative values are taken for normalised pixels only where they have as few different values as 8-bit
  pixels leave.

Whatever else the values are, nothing is said about them.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipbounds.errors import UnitsWarning

Range = tuple[float, float]


@dataclass(frozen=True)
class Units:
    """What a caller says about the range of the examples: (low, high), or None for nothing.

    `in_units` is False where the result has no length in units of the input.
    """

    input_range: Any = None
    in_units: bool = True


_SIDE = 8  # pixels: nothing smaller is taken for an image
_CHANNELS = (1, 3, 4)
_TOP = 2.0  # augmented or interpolated images in [0, 1] stay below
_LEVELS = 256  # of a channel of 8-bit images
_LOOKED_AT = 256  # examples of which the different values are counted
_LEAST_LEVELS = 12  # fewer different values are one-hot features or a board game rather than an image


def image_layout(shape: Sequence[int]) -> str | None:
    """How an input of this shape holds an image: "HWC", "CHW", "HW" or "flat"; None where it cannot."""
    if len(shape) == 3:
        for layout, channels, sides in (("HWC", shape[2], shape[:2]), ("CHW", shape[0], shape[1:])):
            if channels in _CHANNELS and min(sides) >= _SIDE:
                return layout
    if len(shape) == 2 and shape[0] == shape[1] >= _SIDE:
        return "HW"
    if len(shape) == 1:
        for channels in _CHANNELS[:2]:
            side = math.isqrt(shape[0] // channels)
            if side >= _SIDE and channels * side * side == shape[0]:
                return "flat"
    return None


def shape_error(name: str, got: Sequence[int], shape: Sequence[int]) -> str:
    """The message for examples of shape `got`, where (N, *shape) is needed, with the mend that the shapes suggest."""
    wanted = f"({', '.join(map(str, ('N', *shape)))}{',' if not shape else ''})"
    return f"{name} must have shape {wanted}, got {tuple(got)}{shape_mend(name, got, shape)}"


def shape_mend(name: str, got: Sequence[int], shape: Sequence[int]) -> str:
    """What makes examples of shape `got` fit (N, *shape), after a semicolon; "" where the shapes suggest nothing."""
    got, shape = tuple(got), tuple(shape)
    one = got[1:]
    if got == shape:
        return f"; one example is a batch of one: {name}[None]"
    if len(shape) == 3 and len(one) == 3 and one != shape:
        for axes in ((1, 2, 0), (2, 0, 1)):  # channels from the first axis to the last, or back
            if tuple(one[a] for a in axes) == shape and image_layout(one) is not None:
                order = ", ".join(str(a + 1) for a in axes)
                first = "first" if axes == (1, 2, 0) else "last"
                return f"; the channels come {first} in {name}: {name}.transpose(0, {order})"
    if len(one) == 2 and shape in ((*one, 1), (1, *one)):
        axis = "..., None" if shape[-1] == 1 else ":, None"
        return f"; the channel axis is missing: {name}[{axis}]"
    if len(shape) == 2 and one in ((*shape, 1), (1, *shape)):
        return f"; there is a channel axis too many: {name}.reshape(-1, {shape[0]}, {shape[1]})"
    if one and math.prod(one) == math.prod(shape) and 1 in (len(one), len(shape)):
        sizes = ", ".join(map(str, ("-1", *shape)))
        return f"; where the entries are in the same order: {name}.reshape({sizes})"
    return ""


def dtype_error(dtype: Any, shape: Sequence[int]) -> str:
    """The message for examples that are not floating point, with the mend."""
    text = f"X must be floating point in the units of the traced function, got {np.dtype(dtype)}: "
    if np.dtype(dtype) == np.uint8 and image_layout(shape) is not None:
        return (
            f"{text}cast it first: X.astype('float32') / 255 where the function takes pixels in [0, 1], "
            "X.astype('float32') where it takes 0..255"
        )
    return f"{text}cast it first: X.astype('float32')"


def as_range(input_range: Any) -> Range | None:
    """The pair of numbers low < high (infinite ones are allowed), or None; ValueError for anything else."""
    if input_range is None:
        return None
    try:
        low, high = (float(end) for end in input_range)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not low < high:
        raise ValueError(f"input_range must be two numbers low < high, such as (0, 1), got {input_range!r}")
    return low, high


def doubts(x: np.ndarray, shape: Sequence[int], in_units: bool = True, mend: str = "X / 255") -> str | None:
    """What the units of these images (N, *shape) seem to be, if not [0, 1], and the mend; None where nothing is odd.

    Normalised images count only where a result is `in_units` of the input; `mend` is how the pixels are divided.
    """
    layout = image_layout(shape)
    if layout is None or not x.size:
        return None
    low, high = float(x.min()), float(x.max())
    if not math.isfinite(high - low):
        return None  # NaN or infinite values are an error, which says more
    few = np.asarray(x[:_LOOKED_AT])
    if low >= 0.0:
        whole = bool((few == np.round(few)).all())
        if high <= _TOP or high > 65535.0 or (layout == "flat" and not (whole and high >= 16.0)):
            return None
        if whole and high <= 16.0:
            mend = mend.replace("255", "16")
        return (
            f"X looks like pixels that were not scaled: its values reach {high:.4g}, and an eps in pixels is meant for "
            f"[0, 1]. If the function takes [0, 1], pass {mend}"
        )
    if not in_units:
        return None
    levels = len(np.unique(few))
    channels = {"HWC": shape[-1], "CHW": shape[0]}.get(layout, 3 if layout == "flat" else 1)
    most = _LEVELS * channels
    if not (_LEAST_LEVELS <= levels <= most and few.size >= 4 * levels) or bool((few == np.round(few)).all()):
        return None
    return (
        f"X looks like images that were normalised already: its values reach from {low:.4g} to {high:.4g}. Radii are "
        "then in these units, not in pixels. Put the normalisation into the function, "
        "lb.trace(lambda x: model((x - mean) / std), ...), and pass pixels in [0, 1]"
    )


def check_range(x: np.ndarray, input_range: Any, name: str = "X") -> None:
    """ValueError where a value lies outside the range."""
    bounds = as_range(input_range)
    if bounds is None or not x.size:
        return
    low, high = float(x.min()), float(x.max())
    if low < bounds[0] or high > bounds[1]:
        raise ValueError(
            f"{name} reaches from {low:.6g} to {high:.6g}, outside input_range=({bounds[0]:g}, {bounds[1]:g})"
        )


def check_units(x: np.ndarray, shape: Sequence[int], units: Units) -> None:
    """Hold examples (N, *shape) to their declared range; where none is declared, warn of units that look wrong.

    ValueError for values outside `input_range` = (low, high); `UnitsWarning`, at the line outside this library, where
    `doubts` has any.
    """
    check_range(x, units.input_range)
    said = doubts(x, shape, units.in_units) if units.input_range is None else None
    if said is None:
        return
    text = f"{said}; pass input_range=(low, high) if these units are meant."
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("lipbounds"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UnitsWarning, stacklevel=level)
