"""Propagation of rounding errors through the linear maps between activation layers (taps).

A product with a linear map that is a sum of paths A_n ... A_1, computed step by step in floating point in any order,
errs by at most gamma_t |A_n| ... |A_1| |u| entrywise, t the roundings on a path (Higham, section 3.5), and by what
underflow loses. So a product with the map from the output of one tap to the input of the next errs by gamma_t a ||u||
in the 2-norm, a >= || |A_n| ... |A_1| ||_2; later taps see this error multiplied by the norms of the maps between.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipbounds._form.lure import LureForm, multiplicity
from lipbounds._form.program import Op
from lipbounds._form.walk import Algebra, walk
from lipbounds._gain.blocks import HostForm, Node, TapScaling
from lipbounds._norms import enclosures
from lipbounds._norms.rounding import UNDERFLOW, U, gamma
from lipbounds._triangle import recursion
from lipbounds._triangle.formed_blocks import block_norm, matrices

_CARRIED: weakref.WeakKeyDictionary[LureForm, dict[tuple[int, int], float]] = weakref.WeakKeyDictionary()
INPUT = OUTPUT = -1  # in place of the index of a tap


def carriers(form: LureForm) -> dict[tuple[int, int], float]:
    """||D[k, j]||_2 of the direct linear map from the output of tap j to y_k (k = OUTPUT: the output), proved.

    Rows of group taps are weighted: ||dv_k|| <= ||e dy_k||.
    """
    found = _CARRIED.get(form)
    if found is None:
        found = _CARRIED[form] = _carriers(form, recursion.host_form(form))
    return found


def _carriers(form: LureForm, host: HostForm) -> dict[tuple[int, int], float]:
    plain = [
        TapScaling(None, np.ones(t.size_out), s.e)
        for t, s in zip(form.taps, recursion.loop_transform(form, 2, centred=False), strict=True)
    ]
    nodes: list[Node] = [(k,) for k in range(len(form.taps))]
    pairs = [p for p in recursion.structure(host, nodes, plain) if p[0]]
    found = {}
    for (source, target), block in matrices(host, pairs, plain):
        found[target[0], source[0]] = _proved(host, block)
    for source, block in host.backward((), nodes, plain).items():
        found[OUTPUT, source[0]] = _proved(host, block)
    return found


def _proved(host: HostForm, block: enclosures.Enclosure) -> float:
    if min(block.shape) <= recursion.DENSE_LIMIT // 4:
        return block_norm(host, block, 2)
    return enclosures.enclosure_cheap_norm(block)


# --- products on a device ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leg:
    """The direct linear map from a source (a tap, or INPUT) to a target (a tap, or OUTPUT).

    norm >= its 2-norm; a product with it or its transpose errs by at most rounding ||u|| + lost.
    """

    norm: float
    rounding: float
    lost: float


Legs = dict[tuple[int, int], Leg]
#: Of a register: its product with |u|, what underflow may lose of each entry, and the number of roundings.
_Held = tuple[np.ndarray, np.ndarray, int]


def legs(form: LureForm, inputs: dict[int, float]) -> Legs:
    """{(target, source): Leg} of a concrete form; inputs: 2-norms of the maps from the input to the taps."""
    host, found = recursion.host_form(form), carriers(form)
    taps = form.taps
    reached: dict[tuple[int, int], tuple[float, float, int]] = {}
    for source in range(INPUT, len(taps)):
        start = [0] if source == INPUT else list(taps[source].outputs)
        for target, entries in _sweep(host, start, None).items():
            reached[target, source] = entries
    out = {}
    for target in range(OUTPUT, len(taps)):
        start = [form.program.output] if target == OUTPUT else list(taps[target].inputs)
        weight = 1.0 if target == OUTPUT else float(np.sqrt(multiplicity(taps[target]).max(initial=1.0)))
        for source, (column, lost, steps) in _sweep(host, start, target).items():
            if (target, source) not in reached:
                continue
            row, lost_there, steps_there = reached[target, source]
            # sums of absolute values underflow like products
            size = float(np.sqrt(column + lost) * np.sqrt(row + lost_there)) * weight * (1 + 1e-6)
            rounding = gamma(max(steps, steps_there) + 8) * size
            norm = found.get((target, source), np.inf)
            if source == INPUT:
                norm = inputs.get(target, np.inf) * weight
            norm = min(norm * (1 + 1e-6), size)
            out[target, source] = Leg(norm, rounding, max(lost, lost_there) * weight)
    return out


class _Sums(Algebra[_Held]):
    """Products with the absolute values of the linear steps. Nothing passes a tap; `found` is what arrives there."""

    def __init__(self, host: HostForm) -> None:
        self.host = host
        self.found: dict[int, tuple[float, float, int]] = {}

    def poured(self, matrix: Any, terms: int, value: _Held) -> _Held:
        entries, lost = (np.asarray(abs(matrix) @ a) for a in value[:2])
        return entries, lost * (1 + 1e-6) + terms * UNDERFLOW, value[2] + terms + 2

    def step(self, place: int, op: Op, held: Mapping[int, _Held]) -> _Held | None:
        arrived = [m for m in self.host.step(place) if m.register in held]
        parts = [self.poured(m.matrix, m.terms, held[m.register]) for m in arrived]
        return functools.reduce(self.add, parts) if parts else None

    def back(self, place: int, op: Op, out: _Held) -> Iterator[tuple[int, _Held]]:
        return ((m.register, self.poured(m.matrix.T, m.terms, out)) for m in self.host.step(place))

    def add(self, a: _Held, b: _Held) -> _Held:
        return a[0] + b[0], a[1] + b[1], max(a[2] + 2, b[2])

    def join(self, registers: Sequence[int], held: Mapping[int, _Held]) -> _Held:
        entries, lost, steps = zip(*(held[r] for r in registers if r in held), strict=True)
        return np.concatenate(entries), np.concatenate(lost), max(steps)

    def tap(self, k: int, value: _Held | None) -> None:
        if value is not None:
            entries, lost, steps = value
            size = float(np.sqrt(np.square(lost * 2.0**500).sum())) * 2.0**-500
            self.found[k] = float(entries.max(initial=0.0)) * (1 + 1e-6), size * (1 + 1e-6), steps


def _sweep(host: HostForm, start: list[int], target: int | None) -> dict[int, tuple[float, float, int]]:
    """Ones at the registers `start`, through the absolute values of the linear steps to the next taps.

    With a target: back to the taps before.

    Returns:
        {where: (largest entry, 2-norm of what underflow may lose, roundings)}.
    """
    program, sums = host.program, _Sums(host)
    sizes = {r: program.sizes[r] for r in start}
    held = {r: (np.full(n, float(start.count(r))), np.zeros(n), 0) for r, n in sizes.items()}
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        walk(program, sums, held, reverse=target is not None)
        sums.tap(OUTPUT if target is None else INPUT, held.get(program.output if target is None else 0))
    return sums.found


@dataclass(frozen=True, eq=False)
class Spread:
    """Taps replaced by v = C y + diag(s) xi around N inputs.

    Args:
        gain: per tap (N,), at least ||C y|| / ||e y||.
        inject: per tap (N,), the largest s.
        roundings: of the tap itself.
    """

    gain: dict[int, np.ndarray]
    inject: dict[int, np.ndarray]
    roundings: dict[int, int]

    def forward(self, form_legs: Legs, target: int, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(size, error) (N,): bounds of ||y|| of the target and of the rounding error of its computation.

        For inputs first x and xi with ||(x, xi)|| <= 1.
        """
        size: dict[int, np.ndarray] = {}
        error: dict[int, np.ndarray] = {}
        for k in [*self.gain, target]:
            if k in size:
                continue
            total, wrong = np.zeros_like(first), np.zeros_like(first)
            for (end, source), leg in form_legs.items():
                if end != k or (source != INPUT and source not in self.gain):
                    continue
                if source == INPUT:
                    v, dv = first, 2 * U * first
                else:
                    v = self.gain[source] * size[source] + self.inject[source]
                    passed = self.gain[source] * error[source]
                    dv = passed + gamma(self.roundings[source]) * (v + passed)
                total = total + leg.norm * v
                wrong = wrong + leg.norm * dv + leg.rounding * (v + dv) + leg.lost
            size[k], error[k] = total * (1 + 1e-9), wrong * (1 + 1e-9)
        return size[target], error[target]

    def backward(self, form_legs: Legs, target: int, first: np.ndarray) -> np.ndarray:
        """(N,) bounds of the rounding error of the transposed map, applied to a unit vector at the target."""
        one, none = np.ones_like(first), np.zeros_like(first)
        at, total = {target: (one, none)}, none
        for j in [*sorted((k for k in self.gain if k != target), reverse=True), INPUT]:
            w, dw = none, none
            for (end, source), leg in form_legs.items():
                if source != j or end not in at:
                    continue
                v, dv = at[end]
                w = w + leg.norm * v
                dw = dw + leg.norm * dv + leg.rounding * (v + dv) + leg.lost
            if j == INPUT:
                return np.asarray((total + first * (dw + 2 * U * w)) * (1 + 1e-9))
            total = total + self.inject[j] * (dw + 2 * U * w)
            at[j] = self.gain[j] * w, self.gain[j] * dw + gamma(self.roundings[j]) * self.gain[j] * (w + dw)
        raise AssertionError
