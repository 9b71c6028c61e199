"""The options of LipSDP's solvers; strings are short for one with its defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lipbounds._gain.memory_budget import parse
from lipbounds._lipsdp.core import LipSdpState
from lipbounds._text.arguments import whole

SolverName = Literal["recursion", "clarabel", "scs"]
CVXPY = ("clarabel", "scs")


@dataclass(frozen=True, eq=False)
class Recursion:
    """The ellipsoid recursion, as the `solver` of `lb.lipsdp`.

    Args:
        iterations: None chooses by size, and networks of up to about 2000 neurons are then solved to the optimum on
            vectors instead (docs/lipsdp.md).
        start_at: the tap where the ellipsoid starts; None chooses by size, 0 is the input.
        objective: what the pass for the pairs minimises: "mean" of log L_ij, the "largest" L_ij, or the mean of log
            L_ij with the given weights (K, K), symmetric, >= 0.
        refine: the number of worst pairs that are optimised once more, each with multipliers of its own.
        initial: a state of `lb.lipsdp.core`, as training leaves it: its multipliers are proved as they are, then the
            recursion begins with them; with iterations=0 that proof is all (milliseconds to seconds). For
            multipliers="neuron" and norm=2.

    Raises:
        ValueError: an option out of its range, or `start_at` beside `initial`, which knows where the ellipsoid starts.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> bound = lb.lipsdp(form, pairwise=True, solver=lb.Recursion(objective="mean", refine=1))
        >>> round(bound.value, 3)
        2.0
    """

    iterations: int | None = None
    start_at: int | None = None
    objective: Literal["mean", "largest"] | np.ndarray = "mean"
    refine: int = 0
    initial: LipSdpState | None = None

    def __post_init__(self) -> None:
        for name in ("iterations", "start_at", "refine"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 0)
        if self.initial is not None and not isinstance(self.initial, LipSdpState):
            raise ValueError(f"initial is a state of lb.lipsdp.core, got {type(self.initial).__name__}")
        if self.initial is not None and self.start_at is not None:
            raise ValueError("initial decides where the ellipsoid starts: leave start_at out")
        if isinstance(self.objective, str):
            if self.objective not in ("mean", "largest"):
                raise ValueError(
                    f"objective must be 'mean', 'largest' or an array (K, K), got {self.objective!r}"
                )
            return
        weights = np.asarray(self.objective, np.float64)
        square = weights.ndim == 2 and weights.shape[0] == weights.shape[1]
        fine = square and np.isfinite(weights).all() and (weights >= 0).all()
        if not fine or not (weights * (1 - np.eye(len(weights)))).any() or (weights != weights.T).any():
            raise ValueError(
                "objective as weights must be a symmetric array (K, K) of finite numbers >= 0, not all 0 off the "
                "diagonal"
            )


@dataclass(frozen=True)
class Cvxpy:
    """A solver of semidefinite programs through CVXPY, as the `solver` of `lb.lipsdp`; in a process of its own.

    Args:
        name: "clarabel" or "scs".
        memory: limit of the solver's memory in bytes, or a text such as "4GB"; None is 80 % of what is available.
        time_limit: seconds, the start of the process included; None waits.

    Raises:
        ValueError: an unknown name, or a memory or time limit that is not positive.

    Example:
        >>> import lipbounds as lb
        >>> lb.Cvxpy("scs", memory="2GB", time_limit=60.0)
        Cvxpy(name='scs', memory=2000000000, time_limit=60.0)
    """

    name: Literal["clarabel", "scs"] = "clarabel"
    memory: int | str | None = None
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if self.name not in CVXPY:
            raise ValueError(f"the solvers through CVXPY are {', '.join(CVXPY)}, got {self.name!r}")
        object.__setattr__(self, "memory", parse(self.memory))
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise ValueError(f"time_limit must be a positive number of seconds, got {self.time_limit}")

    @property
    def limit(self) -> int | None:
        """`memory` in bytes."""
        return self.memory if isinstance(self.memory, int) else None


def solver_of(solver: SolverName | Recursion | Cvxpy) -> Recursion | Cvxpy:
    """The options that a name is short for; ValueError for what is no solver."""
    if isinstance(solver, Recursion | Cvxpy):
        return solver
    if not isinstance(solver, str) or solver not in get_args(SolverName):
        raise ValueError(
            f"solver must be one of {', '.join(get_args(SolverName))}, a lb.Recursion or a lb.Cvxpy, got {solver!r}"
        )
    return Recursion() if solver == "recursion" else Cvxpy(solver)
