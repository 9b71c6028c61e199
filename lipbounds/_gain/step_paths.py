"""What is known of a block from its steps alone: the rounding of products with it, and a bound of its norm.

Both are sums over all paths of steps from the source to the target, found by one walk with numbers in the registers.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from lipbounds._form.program import Op
from lipbounds._form.walk import Algebra, walk
from lipbounds._gain.blocks import HostForm, Node, TapScaling
from lipbounds._gain.step_matrices import StepMatrix
from lipbounds._norms import matrices as norms
from lipbounds._norms.lanczos import golub_kahan
from lipbounds._norms.rounding import UNDERFLOW, add_up, gamma, mul_up
from lipbounds._text.device import remembered


def product_rounding(
    host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling], failure: float
) -> float:
    """A bound of the error of a product of G[target, source], or its transpose, with a unit vector (`BlockProduct`).

    A step M errs by at most w ||u||, w = gamma_t || |M| ||, where t counts the roundings of one entry (Higham, section
    3.5), and passes errors on by N >= ||M||. Summed over all paths of steps, first and last the scalings of the taps,
        sum of paths of (product of (N + w) - product of N),
    which is the same from both ends. What underflow loses is below 2**-1022 an operation and is passed on likewise.

    Args:
        failure: of the norms N of large dense steps, which are found by Golub-Kahan.

    """
    program = host.program
    # The transposed product sums what comes back to a register from all steps that read it.
    uses = 2 + max(collections.Counter(r for s in program.steps for r in s.reads).values(), default=1)
    arrived: list[_Path] = []

    def through(place: int, parts: list[StepMatrix], held: Mapping[int, _Path]) -> Iterator[_Path]:
        for m in parts:
            wrong = mul_up(add_up(gamma(m.terms + len(parts) + uses), 2.0 * m.relerr), m.absolute_norm)
            lost = UNDERFLOW * 8.0 * (m.terms + 1) * sum(m.shape)
            yield held[m.register].through(_norm_of_step(host, place, m, failure), wrong, lost)

    def tap(k: int, y: _Path | None) -> _Path | None:
        scaling = scalings[k]
        if y is not None and k in target:
            arrived.append(y.scaled(scaling.e, uses))
        terms = [_Path(1.0, 0.0, 0.0).scaled(scaling.q, uses)] if k in source else []
        if y is not None and scaling.c is not None:
            terms.append(y.scaled(scaling.c, uses))
        return _together(terms) if terms else None

    sizes = _Sizes(host, host.leading_to([target], scalings), _together, _together, through, tap)
    held = walk(program, sizes, {} if source else {0: _Path(1.0, 0.0, 0.0)})
    end = _together(arrived) if target else held.get(program.output, _Path(0.0, 0.0, 0.0))
    return add_up(end.error, end.back)


class _Sizes(Algebra[Any]):
    """A bound per register (the same for all outputs of a tap), from those of the steps, in the registers `alive`.

    Args:
        total: adds the parts of one step; joined: bounds registers side by side.
        through: the parts of the step at a place, given its matrices and the registers.
        tap: as in `Algebra`.
    """

    def __init__(
        self, host: HostForm, alive: set[int], total: Any, joined: Any, through: Any, tap: Any
    ) -> None:
        self.host, self.alive, self.total, self.joined, self.through = host, alive, total, joined, through
        self.of_tap = tap

    def tap(self, k: int, value: Any) -> Any:
        return self.of_tap(k, value)

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        if op.output not in self.alive:
            return None
        parts = [m for m in self.host.step(place) if m.register in held]
        return self.total(list(self.through(place, parts, held))) if parts else None

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> Any:
        return self.joined([held[r] for r in registers if r in held])

    def split(self, value: Any, registers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        return ((r, value) for r in registers)


class _Path(NamedTuple):
    """Sums over the paths from the source: norms, rounding errors, underflow losses of a transposed product."""

    size: float
    error: float
    back: float

    def through(self, norm: float, wrong: float, lost: float) -> _Path:
        return _Path(
            mul_up(norm, self.size),
            add_up(mul_up(norm, self.error), mul_up(wrong, add_up(self.size, self.error)), lost),
            add_up(self.back, mul_up(lost, add_up(self.size, self.error))),
        )

    def scaled(self, factors: np.ndarray, uses: int) -> _Path:
        top = float(np.abs(factors).max(initial=0.0))
        return self.through(top, mul_up(gamma(uses + 2), top), UNDERFLOW * 8.0 * factors.size)


def _together(paths: Sequence[_Path]) -> _Path:
    return _Path(*(add_up(*(path[i] for path in paths)) for i in range(3)))


def _norm_of_step(host: HostForm, place: int, m: StepMatrix, failure: float) -> float:
    """N >= ||M||; of a large dense step by Golub-Kahan, within a factor of two."""
    if m.convolution is not None or sp.issparse(m.matrix) or m.quick_norm < m.absolute_norm:
        return m.quick_norm
    share = failure / len(host.program.steps)

    def proof() -> float:
        wrong = gamma(m.terms) * m.absolute_norm
        matrix = np.asarray(m.matrix, np.float64)
        options: dict[str, Any] = dict(seed=place, failure=share, rtol=1.0, rounding=wrong)
        found = golub_kahan(lambda v: matrix @ v, lambda v: matrix.T @ v, matrix.shape[1], **options)[0]
        return min(add_up(found, mul_up(m.relerr, m.absolute_norm)), m.absolute_norm)

    return remembered(host.proved, ("step", place, m.register, share), proof)


def product_of_steps(host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling]) -> float:
    """||G[target, source]|| <= the product (and sum) of the norms of the steps between, a bound per register."""
    arrived: list[float] = []

    def tap(k: int, y: float | None) -> float | None:
        scaling = scalings[k]
        if y is not None and k in target:
            arrived.append(mul_up(float(scaling.e.max(initial=0.0)), y))
        terms = [float(scaling.q.max(initial=0.0))] if k in source else []
        if y is not None and scaling.c is not None:
            terms.append(mul_up(float(np.abs(scaling.c).max(initial=0.0)), y))
        return add_up(*terms) if terms else None

    def through(place: int, parts: list[StepMatrix], held: Mapping[int, float]) -> list[float]:
        return [mul_up(m.norm, held[m.register]) for m in parts]

    sizes = _Sizes(
        host, host.leading_to([target], scalings), lambda parts: add_up(*parts), _length, through, tap
    )
    held = walk(host.program, sizes, {} if source else {0: 1.0})
    return _length(arrived) if target else held.get(host.program.output, 0.0)


def _length(parts: list[float]) -> float:
    return norms.frobenius_norm(np.array([parts]))
