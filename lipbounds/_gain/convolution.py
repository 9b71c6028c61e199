"""Convolutions applied to columns by dense products, without the matrix of the layer.

An output entry o (per axis) reads input entry i through window position a where o s + a d' - p = i d, with stride s,
dilations d (of the input) and d' (of the window), and padding p. For one a these pairs are two arithmetic progressions,
so a convolution is one product with all window positions side by side, and one copy of a strided slice per position.
The transposed map exchanges o and i.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lipbounds._text.progress import alive

_FEW = 8  # columns up to which a change of their order in memory costs little
_CHUNK = 2**23  # entries of the temporary array

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """How an array (shape) is read: its axes of batch, channels, and space."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def space(self) -> tuple[int, ...]:
        return tuple(self.shape[d] for d in self.axes[2:])

    @property
    def channels_last(self) -> bool:
        """Whether one image lies in memory as (*space, channels)."""
        batch, *order = self.axes
        return self.shape[batch] == 1 and order[0] == len(self.shape) - 1 and order[1:] == sorted(order[1:])

    def unfold(self, x: np.ndarray) -> np.ndarray:
        """(entries, columns) to (channels, *space, batch columns)."""
        batch, channel, *space = self.axes
        x = x.reshape(*self.shape, -1).transpose(channel, *space, batch, len(self.shape))
        return np.ascontiguousarray(x).reshape(*x.shape[:-2], -1)

    def fold(self, x: np.ndarray) -> np.ndarray:
        """Undo `unfold`."""
        batch, channel, *space = self.axes
        x = x.reshape(*x.shape[:-1], self.shape[batch], -1)
        order = np.argsort([channel, *space, batch, len(self.shape)])
        return np.ascontiguousarray(x.transpose(order)).reshape(math.prod(self.shape), -1)


@dataclass(frozen=True, eq=False)
class Convolution:
    """The linear map of a convolution between flat arrays.

    Args:
        weights: (groups, features, channels, window positions), features and channels of one group.
        moves: per window position the slices of the output and of the input that it joins; None where there are none.
        source, target: layouts of input and output.
    """

    weights: np.ndarray
    moves: tuple[tuple[Slices, Slices] | None, ...]
    source: Layout
    target: Layout

    @property
    def shape(self) -> tuple[int, int]:
        return math.prod(self.target.shape), math.prod(self.source.shape)

    @cached_property
    def transposed(self) -> Convolution:
        turned = tuple(move if move is None else (move[1], move[0]) for move in self.moves)
        return Convolution(
            np.ascontiguousarray(self.weights.transpose(0, 2, 1, 3)), turned, self.target, self.source
        )

    @cached_property
    def pattern(self) -> Convolution:
        """The map with ones where the weights are not zero."""
        return Convolution((self.weights != 0).astype(np.float64), self.moves, self.source, self.target)

    @cached_property
    def absolute(self) -> Convolution:
        """The map with the absolute values of the weights."""
        return Convolution(np.abs(self.weights), self.moves, self.source, self.target)

    @cached_property
    def terms(self) -> int:
        """The most products that are summed for one output entry."""
        counts = np.zeros(self.target.space, np.int64)
        for move in self.moves:
            if move is not None:
                counts[move[0]] += 1
        return int(counts.max(initial=0)) * self.weights.shape[2]

    @cached_property
    def entries(self) -> int:
        """The nonzero entries of its matrix, if no weight is zero."""
        pairs = sum(math.prod(len(range(*s.indices(2**62))) for s in move[0]) for move in self.moves if move)
        return pairs * math.prod(self.weights.shape[:3]) * self.source.shape[self.source.axes[0]]

    def by_rows(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(values, columns), both (outputs, t): the entries of every row of its matrix, then zeros where it has fewer.

        None where it is in groups, or on several images.
        """
        groups, features, channels, count = self.weights.shape
        if groups > 1 or self.source.shape[self.source.axes[0]] > 1:
            return None
        read, written = math.prod(self.source.space), self.target.space
        where = np.full((count, *written), -1)  # the place that an output reads through each window position
        for a, move in enumerate(self.moves):
            if move is not None:
                where[a][move[0]] = np.arange(read).reshape(self.source.space)[move[1]]
        where = where.reshape(count, -1)
        most = int((where >= 0).sum(axis=0).max(initial=0))
        through = np.argsort(where < 0, axis=0, kind="stable")[:most]
        where = np.take_along_axis(where, through, axis=0).T  # (places, most)
        index, place = (
            np.arange(math.prod(each.shape)).reshape(each.shape).transpose(each.axes)[0].reshape(size, -1)
            for each, size in ((self.source, channels), (self.target, features))
        )
        shape = (where.shape[0], features, most, channels)
        values = self.weights[0].transpose(2, 0, 1)[through.T].transpose(0, 2, 1, 3)
        values = np.where(where[:, None, :, None] >= 0, values, 0.0)
        columns = np.broadcast_to(index.T[np.maximum(where, 0)][:, None], shape)
        entries, size = most * channels, math.prod(self.target.shape)
        out = np.empty((size, entries)), np.empty((size, entries), np.int32)
        for each, found in zip(out, (values, columns), strict=True):
            each[place.T.ravel()] = found.reshape(-1, entries)
        return out

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The product with the columns of x (entries, columns), or with one vector; in the order of x in memory.

        Every output entry is a sum of at most `terms` products and of exact zeros, in some order.
        """
        if x.ndim == 1:
            return self(x[:, None])[:, 0]
        space = max(math.prod(self.source.space), math.prod(self.target.space))
        copies = self.source.shape[self.source.axes[0]] * len(self.moves) * space
        widest = max(self.weights.shape[1:3]) * self.weights.shape[0]
        step = max(1, _CHUNK // max(copies * widest, 1))
        if x.shape[1] <= step:
            return self._product(x)
        by_columns = x.flags.f_contiguous
        out = np.empty((self.shape[0], x.shape[1]), order="F" if by_columns else "C")
        for lo in range(0, x.shape[1], step):
            alive()
            part = x[:, lo : lo + step]
            out[:, lo : lo + step] = self._product(part if by_columns else np.ascontiguousarray(part))
        return out

    @cached_property
    def _by_rows(self) -> np.ndarray | None:
        """The weights as the right factor where `_rows_product` applies."""
        groups, features, channels, count = self.weights.shape
        if groups > 1 or not (self.source.channels_last and self.target.channels_last):
            return None
        if math.prod(self.target.space) <= math.prod(self.source.space):
            order = self.weights[0].transpose(2, 1, 0).reshape(count * channels, features)
        else:
            order = self.weights[0].transpose(1, 2, 0).reshape(channels, count * features)
        return np.ascontiguousarray(order)

    def _rows_product(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The products with the rows of x (images, entries), without a change of layout."""
        _, features, channels, count = self.weights.shape
        read, written, images = self.source.space, self.target.space, x.shape[0]
        x = x.reshape(images, *read, channels)
        if math.prod(written) <= math.prod(read):
            near = np.zeros((images, *written, count, channels))
            for a, move in enumerate(self.moves):
                if move is not None:
                    there: Any = (slice(None), *move[0], a)
                    near[there] = x[:, *move[1]]
            return (near.reshape(-1, count * channels) @ weights).reshape(images, -1)
        parts = (x.reshape(-1, channels) @ weights).reshape(images, *read, count, features)
        out = np.zeros((images, *written, features))
        for a, move in enumerate(self.moves):
            if move is not None:
                from_there: Any = (slice(None), *move[1], a)
                out[:, *move[0]] += parts[from_there]
        return out.reshape(images, -1)

    def _product(self, x: np.ndarray) -> np.ndarray:
        if self._by_rows is not None and (x.flags.f_contiguous or x.shape[1] <= _FEW):
            return self._rows_product(np.ascontiguousarray(x.T), self._by_rows).T
        groups, features, channels, count = self.weights.shape
        read, written = self.source.space, self.target.space
        x = self.source.unfold(x)
        width = x.shape[-1]
        x = x.reshape(groups, channels, *read, width)
        if math.prod(written) <= math.prod(read):  # copy what each output reads, then multiply
            near = np.zeros((groups, channels, count, *written, width))
            for a, move in enumerate(self.moves):
                if move is not None:
                    near[:, :, a][:, :, *move[0]] = x[:, :, *move[1]]
            flat = self.weights.reshape(groups, features, -1)
            out = flat @ near.reshape(groups, channels * count, -1)
        else:  # multiply, then add where each input goes
            flat = self.weights.transpose(0, 1, 3, 2).reshape(groups, features * count, channels)
            parts = (flat @ x.reshape(groups, channels, -1)).reshape(groups, features, count, *read, width)
            out = np.zeros((groups, features, *written, width))
            for a, move in enumerate(self.moves):
                if move is not None:
                    out[:, :, *move[0]] += parts[:, :, a][:, :, *move[1]]
        return self.target.fold(out.reshape(groups * features, *written, width))


def convolution(
    p: dict[str, Any], shape: tuple[int, ...], kernel: np.ndarray, out_shape: tuple[int, ...]
) -> Convolution:
    """lax.conv_general_dilated in its first operand, for batch_group_count 1."""
    numbers = p["dimension_numbers"]
    groups = p["feature_group_count"]
    weights = kernel.transpose(numbers.rhs_spec)  # (features, channels of a group, *window)
    features, channels, *window = weights.shape
    weights = weights.reshape(groups, features // groups, channels, -1)
    source, target = Layout(shape, tuple(numbers.lhs_spec)), Layout(out_shape, tuple(numbers.out_spec))
    per_axis = [
        [
            _progressions(a * p["rhs_dilation"][d] - p["padding"][d][0], p["window_strides"][d], p["lhs_dilation"][d],
                          target.space[d], source.space[d])
            for a in range(size)
        ]
        for d, size in enumerate(window)
    ]  # fmt: skip
    moves = []
    for each in itertools.product(*per_axis):
        ends = [pair for pair in each if pair is not None]
        complete = len(ends) == len(window)
        moves.append((tuple(o for o, _ in ends), tuple(i for _, i in ends)) if complete else None)
    return Convolution(np.ascontiguousarray(weights), tuple(moves), source, target)


def _progressions(shift: int, stride: int, dilation: int, out: int, into: int) -> tuple[slice, slice] | None:
    """Slices of all o < out and i < into with o stride + shift = i dilation; None if there are none."""
    o = np.arange(out)
    reach = o * stride + shift
    o = o[(reach >= 0) & (reach % dilation == 0) & (reach // dilation < into)]
    if o.size == 0:
        return None
    i = (o * stride + shift) // dilation
    return _slice(o), _slice(i)


def _slice(places: Sequence[int] | np.ndarray) -> slice:
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    return slice(int(places[0]), int(places[-1]) + 1, step)
