"""Entries of taps that matter: their inputs depend on x, and the output of the network depends on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lipbounds._form.program import Op, Tap
from lipbounds._form.walk import Algebra, walk
from lipbounds._gain.blocks import HostForm


def live_outputs(host: HostForm, still: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Per tap a mask of its outputs: False where they are constant, or where the network ignores them.

    Such neurons are common in pruned networks, and where strided windows leave a border out. Their slopes may be taken
    as 0. From the pattern of nonzero weights, with the dependence of a tap's outputs on its inputs entry by entry
    (elementwise), per group (max, min, logsumexp), or on all of them (sort).

    Args:
        host: the form.
        still: per tap a mask of the outputs with slope interval [0, 0].
    """
    moving, read = _Reach(host, still, back=False), _Reach(host, still, back=True)
    walk(host.program, moving, {0: np.ones(host.in_size, bool)})
    walk(host.program, read, {host.program.output: np.ones(host.num_outputs, bool)}, reverse=True)
    none = [np.zeros(tap.size_out, bool) for tap in host.program.taps]
    return [
        moving.outputs.get(k, none[k]) & read.outputs.get(k, none[k]) & ~quiet
        for k, quiet in enumerate(still)
    ]


class _Reach(Algebra[np.ndarray]):
    """Registers as masks of the entries that depend on x, or in reverse that the output depends on."""

    def __init__(self, host: HostForm, still: Sequence[np.ndarray], back: bool) -> None:
        self.host, self.program, self.still, self.backward = host, host.program, still, back
        self.outputs: dict[int, np.ndarray] = {}

    def step(self, place: int, op: Op, held: Mapping[int, np.ndarray]) -> np.ndarray | None:
        parts = [m.reached(held[m.register]) for m in self.host.step(place) if m.register in held]
        return np.logical_or.reduce(parts) if parts else None

    def back(self, place: int, op: Op, out: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for m in self.host.step(place):
            yield m.register, m.reached(out, back=True)

    def tap(self, k: int, value: np.ndarray | None) -> np.ndarray | None:
        if value is None:
            return None
        tap = self.program.taps[k]
        if self.backward:
            self.outputs[k] = value
            return value & ~self.still[k] if tap.groups is None else _of_groups(tap, value)
        self.outputs[k] = value & ~self.still[k] if tap.groups is None else _to_groups(tap, value)
        return self.outputs[k]

    def join(self, registers: Sequence[int], held: Mapping[int, np.ndarray]) -> np.ndarray:
        sizes = self.program.sizes
        return np.concatenate([held[r] if r in held else np.zeros(sizes[r], bool) for r in registers])

    def split(self, value: np.ndarray, registers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for r, place in self.program.places_of(registers):
            yield r, value[place]

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a | b


def _to_groups(tap: Tap, inputs: np.ndarray) -> np.ndarray:
    """The outputs of a group tap that depend on these inputs."""
    assert tap.groups is not None
    if tap.kind == "sort":
        return np.full(tap.size_out, bool(inputs.any()))
    return np.asarray(inputs[tap.groups.array].any(axis=1))


def _of_groups(tap: Tap, outputs: np.ndarray) -> np.ndarray:
    """The inputs of a group tap that these outputs depend on."""
    assert tap.groups is not None
    if tap.kind == "sort":
        return np.full(tap.size_in, bool(outputs.any()))
    found = np.zeros(tap.size_in, bool)
    found[tap.groups.array[outputs]] = True
    return found
