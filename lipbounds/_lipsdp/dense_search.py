"""The dense form, as an engine of LipSDP's search: optimal multipliers, and proofs of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from lipbounds._form.elementwise import elementwise_view
from lipbounds._lipsdp.certificate import Proof
from lipbounds._lipsdp.dense_form import DenseGain, reduce_input
from lipbounds._lipsdp.matrix_inequality import feasible_start, smallest_rho
from lipbounds._lipsdp.proof import repair_dense
from lipbounds._lipsdp.task import Found, Task
from lipbounds._lipsdp.vectors import solve_all
from lipbounds._norms import matrices as norms
from lipbounds._norms.enclosures import Enclosure
from lipbounds._text.calls import FAILURES
from lipbounds._text.threads import one_blas_thread

_AS_GOOD = 1e-8  # relative excess of a proof over L in float arithmetic that is not worth another try
_SHARES = (0.0, *np.logspace(-10, 0, 31).tolist())
_COARSE = range(3, 19, 3)
_WORTH = 1e-7  # the same for a look at `_COARSE`


class Solved(NamedTuple):
    """Steps of L-BFGS, L in float arithmetic, and the relative gap of L^2."""

    steps: int
    value: float
    gap: float


class Dense:
    """Multipliers of the dense form, to the optimum."""

    def __init__(self, gain: DenseGain, layers: bool):
        self.gain, self.layers = gain, layers
        self.Gy, self.Gz = reduce_input(gain)
        self.n = self.Gy.shape[1] - gain.Gy.shape[0]
        self.ties = gain.labels if layers else None
        self._last, self._usual = 0, 0.0  # place in _SHARES of the last proof, and what it lost

    @property
    def size(self) -> int:
        """Multipliers and inputs after reduction."""
        return int(self.Gy.shape[1])

    def seconds(self, problems: int) -> float:
        """About how long it takes to solve and prove so many problems."""
        return problems * (0.04 + 2e-4 * self.size + 1e-7 * self.size**2 + 1.2e-9 * self.size**3)

    def solve(self, outputs: Sequence[np.ndarray]) -> list[tuple[np.ndarray, Solved]]:
        """Multipliers (N,) for each of the outputs C z: C = I for the network, e_i - e_j for a pair."""
        found = solve_all(self.Gy, self.Gz, self.n, outputs, self.ties)
        return [
            (one.T, Solved(one.iterations, math.sqrt(one.rho), one.gap / max(one.rho, 1e-300)))
            for one in found
        ]

    def prove(self, task: Task, C: np.ndarray, T: np.ndarray) -> Found:
        """The best proof that multipliers of the (LMI) for C z give, moved inside the feasible set where need be.

        With L^2 = rho the smallest for T, D = rho / T. The set of feasible (T, rho) is convex and LipLT's T0 lies
        inside, so a T at the edge, or beyond it by a little, needs little of T0: (1 - t) T + t T0, and rho (1 + t).
        More than the least t that has a proof seldom pays; the search begins with the t of the proof before.
        """
        rows = C @ self.Gz
        inside = self._inside * float(np.linalg.norm(C, 2)) ** 2
        tried: dict[int, tuple[float, Found | None]] = {}

        def excess(place: int) -> float:
            """Of the constant proved over the value in float arithmetic of T itself."""
            if place not in tried:
                share = _SHARES[place]
                mixed = (1 - share) * T + share * inside if share else T
                rho = smallest_rho(self.Gy, rows, self.n, mixed) * (1 + share)
                found = self._attempt(task, (rho if rho > 0 else 1.0) / mixed) if rho < math.inf else None
                tried[place] = (math.inf if found is None else _proved_for(found, C), found)
            return tried[place][0]

        best = math.sqrt(max(smallest_rho(self.Gy, rows, self.n, T), 0.0))
        place, failed = self._last, -1
        while excess(place) == math.inf and place < len(_SHARES) - 1:
            failed, place = place, min(2 * place + 1, len(_SHARES) - 1)
        while failed >= 0 and place - failed > 1:
            middle = (place + failed) // 2
            failed, place = (middle, place) if excess(middle) == math.inf else (failed, middle)
        if place == 0 and excess(place) > (1 + _WORTH) * best:  # at the edge of what floats can prove
            place = min((place, *_COARSE), key=excess)
        enough = (1 + max(_AS_GOOD, 1.5 * self._usual if place == self._last else 0.0)) * best
        for step in (-1, 1):
            while 0 <= place + step < len(_SHARES) and excess(place) > enough:
                if excess(place + step) >= excess(place):
                    break
                place += step
        found = tried[place][1]
        if found is not None and excess(place) <= (1 + 1e3 * _WORTH) * best:
            self._last, self._usual = place, excess(place) / best - 1 if best else 0.0
            return found
        try:
            edge = (best**2 if 0 < best < math.inf else 1.0) / T
            D = repair_dense(self.gain, self.gain.outer(edge))
            other = task.prove(self._as_proof(D))
        except FAILURES:
            if found is None:
                raise
            return found
        return other if found is None or _proved_for(other, C) < _proved_for(found, C) else found

    @cached_property
    def _inside(self) -> np.ndarray:
        """LipLT's multipliers for all outputs, where they are found in float64."""
        try:
            return feasible_start(self.Gy, self.Gz, self.n, self.gain.labels, self.layers)[0]
        except ValueError:
            return np.ones(len(self.Gy))

    def _attempt(self, task: Task, D: np.ndarray) -> Found | None:
        try:
            return task.prove(self._as_proof(self.gain.outer(D)))
        except (ValueError, ArithmeticError):  # no proof with these
            return None

    def _as_proof(self, D: np.ndarray) -> Proof:
        ends = np.cumsum([active.size for active in self.gain.active])
        D_taps = (D[e - a.size : e] for e, a in zip(ends, self.gain.active, strict=True))
        return Proof(tuple(D_taps), kind="dense")


def _proved_for(found: Found, C: np.ndarray) -> float:
    """The constant of C z that a proof gives, C = I or the row of a pair."""
    if len(C) > 1 or C.shape[1] == 1:
        return found.constants.value
    return float(found.constants.pairwise[int(C[0].argmax()), int(C[0].argmin())])


def small_dense(task: Task, limit: int) -> Dense | None:
    """The dense form, unless it has more multipliers and inputs than `limit`; ValueError if no floats hold it."""
    if sum(tap.size_out for tap in elementwise_view(task.form).taps) > limit:
        return None
    gain = task.gain
    if not (_moderate(gain.Gy) and _moderate(gain.Gz)):
        raise ValueError("weights of this size have none in float64")
    dense = Dense(gain, task.layers)
    return dense if dense.size <= limit else None


def _moderate(block: Enclosure) -> bool:
    """Whether squares and quotients of squares of the entries stay within the range of floats."""
    size = norms.frobenius_norm(block.midpoint_for_search())
    return size == 0.0 or 2.0**-150 < size < 2.0**150


@contextlib.contextmanager
def threads(dense: Dense | None) -> Iterator[None]:
    """One BLAS thread for the many small products of the dense form: several would wait for each other."""
    if dense is None:
        yield
    else:
        with one_blas_thread():
            yield
