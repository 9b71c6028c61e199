"""What rounding errors made between taps become behind them: norms of the linear maps there, and of their absolute
values.

A product with a linear map that is a sum of paths A_n ... A_1, computed step by step in floating point in any order,
errs by at most gamma_t |A_n| ... |A_1| |u| entrywise, t the roundings on a path (Higham, section 3.5), and by what
underflow loses. So a product with the map from the output of one tap to the input of the next errs by gamma_t a ||u||
in the 2-norm, a >= || |A_n| ... |A_1| ||_2, and behind further taps by that times the norms of the maps there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipbounds._form.lure import LureForm, multiplicity
from lipbounds._form.program import Op
from lipbounds._gain.blocks import HostForm, Node, TapScaling
from lipbounds._norms import enclosures
from lipbounds._norms.rounding import UNDERFLOW, U, gamma
from lipbounds._triangle import recursion

_CARRIED: weakref.WeakKeyDictionary[LureForm, dict[tuple[int, int], float]] = weakref.WeakKeyDictionary()
INPUT = OUTPUT = -1  # in place of the index of a tap


def carriers(form: LureForm) -> dict[tuple[int, int], float]:
    """||D[k, j]||_2 of the direct linear map from the output of tap j to y_k (k = OUTPUT: the output), proved. Rows of
    group taps are weighted: ||dv_k|| <= ||e dy_k||."""
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
    for (source, target), block in recursion.matrices(host, pairs, plain):
        found[target[0], source[0]] = _proved(host, block)
    for source, block in host.backward((), nodes, plain).items():
        found[OUTPUT, source[0]] = _proved(host, block)
    return found


def _proved(host: HostForm, block: enclosures.Enclosure) -> float:
    if min(block.shape) <= recursion.DENSE_LIMIT // 4:
        return recursion.block_norm(host, block, 2)
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
_Held = dict[int, tuple[np.ndarray, np.ndarray, int]]  # register: (|...| 1, lost to underflow, roundings)


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
            size = float(np.sqrt(column) * np.sqrt(row)) * weight * (1 + 1e-6)
            rounding = gamma(max(steps, steps_there) + 8) * size
            norm = found.get((target, source), np.inf)
            if source == INPUT:
                norm = inputs.get(target, np.inf) * weight
            norm = min(norm * (1 + 1e-6), size)
            out[target, source] = Leg(norm, rounding, max(lost, lost_there) * weight)
    return out


def _sweep(host: HostForm, start: list[int], target: int | None) -> dict[int, tuple[float, float, int]]:
    """Ones at the registers `start`, forward to the next taps (or, back from a target, to the taps before) through the
    absolute values of the linear steps: {where: (largest entry, 2-norm of what underflow may lose, roundings)}."""
    program, found = host.program, {}
    sizes = [int(np.prod(shape)) for shape in program.shapes]
    held: _Held = {r: (np.full(sizes[r], float(start.count(r))), np.zeros(sizes[r]), 0) for r in set(start)}

    def pour(into: int, matrix: Any, terms: int, value: tuple[np.ndarray, np.ndarray, int]) -> None:
        entries, lost = (np.asarray(abs(matrix) @ a) for a in value[:2])
        lost = lost * (1 + 1e-6) + terms * UNDERFLOW
        old = held.get(into, (np.zeros(sizes[into]), np.zeros(sizes[into]), 0))
        held[into] = old[0] + entries, old[1] + lost, max(old[2], value[2] + terms) + 2

    def arrive(where: int, registers: Sequence[int]) -> None:
        parts = [held[r] for r in registers if r in held]
        if parts:
            top = max(float(p[0].max(initial=0.0)) for p in parts)
            lost = float(np.sqrt(sum(np.square(p[1] * 2.0**500).sum() for p in parts))) * 2.0**-500
            found[where] = top * (1 + 1e-6), lost * (1 + 1e-6), max(p[2] for p in parts)

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if target is None:
            for place, step in enumerate(program.steps):
                if isinstance(step, int):
                    arrive(step, program.taps[step].inputs)
                else:
                    for m in host.step(place):
                        if m.register in held:
                            pour(step.output, m.matrix, m.terms, held[m.register])
            arrive(OUTPUT, [program.output])
            return found
        for place in range(len(program.steps) - 1, -1, -1):
            step = program.steps[place]
            if isinstance(step, Op):
                if step.output in held:
                    for m in host.step(place):
                        pour(m.register, m.matrix.T, m.terms, held[step.output])
            else:
                arrive(step, program.taps[step].outputs)
        arrive(INPUT, [0])
    return found


@dataclass(frozen=True, eq=False)
class Spread:
    """Taps replaced by v = C y + diag(s) xi around N inputs: per tap gain >= ||C y|| / ||e y||, (N,) largest s, and the
    roundings of the tap itself."""

    gain: dict[int, np.ndarray]
    inject: dict[int, np.ndarray]
    roundings: dict[int, int]

    def forward(self, form_legs: Legs, target: int, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(size, error) (N,): bounds of ||y|| of the target and of the rounding error of its computation, for inputs
        first x and xi with ||(x, xi)|| <= 1."""
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
                    dv = self.gain[source] * error[source] + gamma(self.roundings[source]) * (
                        v + self.gain[source] * error[source]
                    )
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
