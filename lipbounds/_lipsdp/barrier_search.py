"""The barrier method on the dense form, as an engine of LipSDP's search."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from lipbounds._form.elementwise import elementwise_view
from lipbounds._lipsdp.barrier import DenseGain, dense_gain, reduce_input, solve_dense
from lipbounds._lipsdp.certificate import Proof
from lipbounds._lipsdp.matrix_inequality import feasible_start, smallest_rho
from lipbounds._lipsdp.proof import propagate_dense, repair_dense
from lipbounds._lipsdp.task import Task
from lipbounds._norms import matrices as norms
from lipbounds._norms.enclosures import Enclosure
from lipbounds._text.progress import say

_ONE_THREAD = 500  # multipliers up to which one BLAS thread is the fastest
_AS_GOOD = 1e-8  # relative excess of a proof over L^2 in float arithmetic that is not worth another try
_SHARES = (0.0, *np.logspace(-10, 0, 31).tolist())


class Solved(NamedTuple):
    """Steps of Newton's method, L in float arithmetic, and the relative gap of L^2."""

    steps: int
    value: float
    gap: float


class Dense:
    """Newton's method on the dense form, to the optimum."""

    def __init__(self, gain: DenseGain, layers: bool):
        self.gain, self.layers = gain, layers
        self.Gy, self.Gz = reduce_input(gain)
        self.n = self.Gy.shape[1] - gain.Gy.shape[0]
        self.ties = gain.labels if layers else None

    @property
    def size(self) -> int:
        """Multipliers and inputs after reduction."""
        return int(self.Gy.shape[1])

    @property
    def seconds(self) -> float:
        """About how long one solution takes."""
        return 0.03 + 0.07 * (self.size / 140) ** 3

    def solve(self, C: np.ndarray, what: str) -> tuple[Proof, Solved]:
        """Multipliers for the outputs C z: C = I for the network, e_i - e_j for a pair."""
        found = solve_dense(self.Gy, C @ self.Gz, self.n, self.ties)
        solved = Solved(found.iterations, math.sqrt(found.rho), found.gap / max(found.rho, 1e-300))
        say(f"{what}: {solved.value:.6g} in float arithmetic")
        return self.proof(C, found.T), solved

    def proof(self, C: np.ndarray, T: np.ndarray) -> Proof:
        """The proof that multipliers of the (LMI) for C z give, moved inside the feasible set where need be.

        With L^2 = rho the smallest for T, D = rho / T. The set of feasible (T, rho) is convex and T0, LipLT's, lies
        inside, so a T at the edge, or beyond it by a little, needs little of T0: (1 - t) T + t T0.
        """
        rows = C @ self.Gz
        try:
            T0, _ = feasible_start(self.Gy, rows, self.n, self.gain.labels, self.layers)
        except ValueError:
            T0 = T
        rho = smallest_rho(self.Gy, rows, self.n, T)
        best, least = self._proved(C, T, rho)
        if best is None or least > (1 + _AS_GOOD) * rho:
            tries = [
                (smallest_rho(self.Gy, rows, self.n, m), m) for m in ((1 - t) * T + t * T0 for t in _SHARES)
            ]
            for rho, mixed in sorted(tries, key=lambda one: one[0]):
                if rho >= least or not math.isfinite(rho):
                    break
                D, value = self._proved(C, mixed, rho)
                if value < least:
                    best, least = D, value
            if best is None:
                rho, mixed = min(tries, key=lambda one: one[0])
                best = repair_dense(self.gain, (rho if 0 < rho < math.inf else 1.0) / mixed)
        ends = np.cumsum([active.size for active in self.gain.active])
        D_taps = (best[e - a.size : e] for e, a in zip(ends, self.gain.active, strict=True))
        return Proof(tuple(D_taps), kind="dense")

    def _proved(self, C: np.ndarray, T: np.ndarray, rho: float) -> tuple[np.ndarray | None, float]:
        """(D, the L^2 of C z that it proves), or (None, inf)."""
        if not math.isfinite(rho):
            return None, math.inf
        D = (rho if rho > 0 else 1.0) / T
        try:
            matrix, scale = propagate_dense(self.gain, D)
        except (ValueError, ArithmeticError):  # no proof with these
            return None, math.inf
        with np.errstate(over="ignore"):
            return D, float(np.ldexp(np.linalg.eigvalsh(C @ matrix @ C.T)[-1], scale))


def small_dense(task: Task, limit: int) -> Dense | None:
    """The dense form, unless it has more multipliers and inputs than `limit`; ValueError if no floats hold it."""
    if sum(tap.size_out for tap in elementwise_view(task.form).taps) > limit:
        return None
    gain = dense_gain(task.form)
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
    """One BLAS thread for small matrices, which several threads only slow down."""
    if dense is None or dense.size > _ONE_THREAD:
        yield
    else:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
