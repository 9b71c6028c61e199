"""How LipSDP's multipliers are found: the ellipsoid recursion, Newton's method on the dense form, or CVXPY.

Each engine returns `Proof`s (multipliers); what they are worth is computed by `certificate.proved_constants` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.linalg import eigvalsh, solve

from lipbounds import _triangle, ellipsoid
from lipbounds._dense import DenseGain, dense_gain, reduce_input, solve_dense
from lipbounds._proof import repair, repair_dense
from lipbounds._sequence import WIDEST, Sequence, first_tap, hybrid_start, sequence
from lipbounds._triangle import Request
from lipbounds._views import elementwise_view
from lipbounds.certificate import Constants, Proof, proved_constants
from lipbounds.lure import LureForm

#: Networks with at most this many multipliers and inputs (after reduction) together are solved by Newton's method.
POLISHED = 330
#: The same where states are too wide for the recursion to start at the input.
DENSE_ONLY = 1100
Progress = Callable[[str, float], None]
_MANY_BLOCKS = 400


@dataclass(eq=False)
class Search:
    """One call of the verb: what it asks, the proofs found so far and their constants, and what there is to say."""

    form: LureForm
    norm: float
    guarantee: str
    seed: int
    proofs: list[Proof] = field(default_factory=list)
    constants: list[Constants] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, proof: Proof) -> Constants:
        """Prove, and keep."""
        found = proved_constants(self.form, proof, norm=self.norm, guarantee=self.guarantee, seed=self.seed)
        self.proofs.append(proof)
        self.constants.append(found)
        return found

    @property
    def pairwise(self) -> np.ndarray:
        return np.min([c.pairwise for c in self.constants], axis=0)


# --- where to begin ------------------------------------------------------------------------------------------------


def closed_form(view: LureForm, request: Request) -> list[float] | None:
    """D_k = m_k m_out / u_k per tap: multipliers one per layer that prove no more than LipLT.

    With the block norms n_kj, m_k from the triangle recursion and u_out = 1, u_j = sum_k u_k n_kj from the output
    back, T_k = u_k / (m_k m_out) is Perron's scaling of the matrix of block norms. None where LipLT is 0 or the blocks
    are many.
    """
    count = len(view.taps)
    if count * (count + 1) // 2 > _MANY_BLOCKS:
        return None
    scalings = _triangle.loop_transform(view, 2, centred=True)
    nodes = [(k,) for k in range(count)]
    host = _triangle.host_form(view)
    found = _triangle.block_norms(view, _triangle.structure(host, nodes, scalings), scalings, request)
    triangle = _triangle.recursion(view, nodes, scalings, request, pairwise=False, found=found)
    below = np.zeros(count)
    for j in reversed(range(count)):
        below[j] = triangle.outputs.get((j,), 0.0) + sum(
            below[k] * found[(j,), (k,)].value for k in range(j + 1, count) if ((j,), (k,)) in found
        )
    if not triangle.value > 0:
        return None
    return [
        triangle.reach[(k,)] * triangle.value / below[k] if below[k] > 0 and triangle.reach[(k,)] > 0 else 0.0
        for k in range(count)
    ]


def parameters_from(
    problem: ellipsoid.Problem, seq: Sequence, start: np.ndarray, D: list[float]
) -> ellipsoid.Parameters:
    """Parameters (q = 0) whose D is the given one per tap, where that is feasible; the nearest feasible one else."""
    sigma = start
    out: list[Any] = []
    for segment in seq.segments:
        a, b, w = (m.matrix for m in (segment.A, segment.B, segment.W))
        if not segment.active.size:
            out.append(np.zeros(0))
            sigma = a @ sigma @ a.T
            continue
        cross = w @ sigma
        sy = cross @ w.T
        largest = float(eigvalsh(sy, subset_by_index=[len(sy) - 1] * 2)[0])
        kappa = np.maximum(segment.kappa, 1.0) if a.any() else np.ones(len(sy))
        spare = np.maximum(D[segment.tap] / max(largest, 1e-300) - 1 - ellipsoid.MARGIN, 1e-9)
        out.append(np.log(spare / kappa))
        d = np.full(len(sy), max(D[segment.tap], largest * (1 + 1e-8)))
        x = sigma + cross.T @ solve(np.diag(d) - sy, cross, assume_a="pos")
        sigma = a @ x @ a.T + (b * d) @ b.T
        sigma = (sigma + sigma.T) / 2
    return ellipsoid.parameters_of(problem, out)


# --- the ellipsoid recursion ---------------------------------------------------------------------------------------


class Recursion:
    """The recursion on the states behind tap `start_at` - 1, warm-started from its own last optimum."""

    def __init__(
        self, search: Search, layers: bool, start_at: int, iterations: int | None, progress: Progress | None
    ):
        self.search, self.start_at, self.progress = search, start_at, progress
        box = search.norm == math.inf
        request = Request(2, search.guarantee, search.seed)
        self.given: tuple[np.ndarray, int] | None = None
        if start_at:
            self.states, first, scale, _, _ = hybrid_start(search.form, start_at, request)
            self.given = (first, scale)
            search.notes.append(f"the ellipsoid starts behind {start_at} taps, which LipLT bounds")
        else:
            self.states = sequence(search.form)
            first = self.states.start.matrix
            first = first if box else first @ first.T
        self.problem = ellipsoid.problem(self.states.segments, first, per_layer=layers, box=box)
        self.effort = ellipsoid.effort(self.problem, iterations)
        self.starts = [ellipsoid.parameters_of(self.problem, s) for s in (0.0, -2.0, -6.0, -12.0)]
        if not start_at and not box:
            D = closed_form(elementwise_view(search.form), request)
            if D is not None:
                self.starts.append(parameters_from(self.problem, self.states, first, D))
        self.best: ellipsoid.Parameters | None = None

    def solve(self, kind: str, weights: np.ndarray | None = None) -> tuple[Proof, float]:
        """(proof, constant in float arithmetic) for one objective of `ellipsoid.objective`."""
        if kind == "value" and self.problem.box:
            kind = "entries"
        effort = self.effort
        if self.best is not None and len(effort.stages) > 2:  # begin where the last one ended
            effort = replace(effort, stages=effort.stages[-3:], iterations=max(effort.iterations // 2, 45))
        starts = self.starts if self.best is None else [self.best]
        found, value, done = ellipsoid.optimize(self.problem, starts, kind, weights, effort, self.progress)
        self.best = found if self.best is None else self.best
        D, box = ellipsoid.multipliers(self.problem, found)
        self.search.notes.append(f"recursion ({kind}): {done} iterations, {value:.6g} in float arithmetic")
        return Proof(repair(self.states, D, self.given, box), start_at=self.start_at, weights=box), value

    def ellipsoid(self) -> np.ndarray:
        """The last Sigma_out in float arithmetic, for estimates."""
        assert self.best is not None
        return ellipsoid.last_ellipsoid(self.problem, self.best)


# --- the dense form ------------------------------------------------------------------------------------------------


class Dense:
    """Newton's method on the dense form, to the optimum."""

    def __init__(self, search: Search, gain: DenseGain, layers: bool):
        self.search, self.gain, self.layers = search, gain, layers
        self.Gy, self.Gz = reduce_input(gain)
        self.n = self.Gy.shape[1] - gain.Gy.shape[0]

    @property
    def size(self) -> int:
        return int(self.Gy.shape[1])

    def solve(self, rows: np.ndarray, near: Proof | None = None) -> Proof:
        """Multipliers for the output `rows` (the whole of Gz, or a difference of rows), from those of `near`."""
        start = None if near is None else self.from_states(near)
        labels = self.gain.labels if self.layers else None
        found = solve_dense(self.Gy, rows, self.n, labels, start=start)
        self.search.notes.append(
            f"Newton: {found.iterations} steps, {math.sqrt(found.rho):.6g} in float arithmetic"
        )
        return self.proof(1 / found.T)

    def proof(self, D: np.ndarray) -> Proof:
        D = repair_dense(self.gain, D)
        return Proof(tuple(np.split(D, np.cumsum([a.size for a in self.gain.active])[:-1])), kind="dense")

    def from_states(self, proof: Proof) -> np.ndarray | None:
        """T of this form from the multipliers of the state sequence, None where neurons are missing there."""
        out = []
        for segment, d, active in zip(
            sequence(self.search.form).segments, proof.D, self.gain.active, strict=True
        ):
            place = np.searchsorted(segment.active, active)
            if (place >= segment.active.size).any() or not np.array_equal(segment.active[place], active):
                return None
            out.append(1 / d[place])
        return np.concatenate([np.zeros(0), *out])

    def difference(self, i: int, j: int) -> np.ndarray:
        return self.Gz[i : i + 1] - self.Gz[j : j + 1]


def _small_gain(form: LureForm, limit: int) -> DenseGain | None:
    view = elementwise_view(form)
    neurons = sum(tap.size_out for tap in view.taps)
    return dense_gain(form) if neurons <= limit else None


# --- all of it -----------------------------------------------------------------------------------------------------


@dataclass
class Engines:
    search: Search
    recursion: Recursion | None
    dense: Dense | None

    def run(self, pairwise: bool, objective: str | np.ndarray, refine: int) -> None:
        """Add proofs to the search: for the whole network, then for the pairs, then for the worst of them."""
        search = self.search
        near = None
        if self.recursion is not None:
            near, _ = self.recursion.solve("value")
            search.add(near)
        if self.dense is not None:
            self._attempt(lambda: self.dense.solve(self.dense.Gz, near))  # type: ignore[union-attr]
        k = search.form.num_outputs
        if not pairwise or k < 2:
            return
        if self.recursion is not None:
            if isinstance(objective, str):
                kind, weights = ("largest", None) if objective == "largest" else ("pairs", np.ones((k, k)))
            else:
                kind, weights = "pairs", np.asarray(objective, np.float64)
            if weights is not None:
                weights = weights * (1 - np.eye(k))
            search.add(self.recursion.solve(kind, weights)[0])
        table = search.pairwise
        i, j = np.triu_indices(k, 1)
        for place in np.argsort(-table[i, j])[:refine]:
            self._refine(int(i[place]), int(j[place]))

    def _refine(self, i: int, j: int) -> None:
        if self.dense is not None:
            rows = self.dense.difference(i, j)
            self._attempt(lambda: self.dense.solve(rows))  # type: ignore[union-attr]
        elif self.recursion is not None:
            k = self.search.form.num_outputs
            weights = np.zeros((k, k))
            weights[i, j] = weights[j, i] = 1.0
            self.search.add(self.recursion.solve("pairs", weights)[0])

    def _attempt(self, solve: Callable[[], Proof]) -> None:
        """A proof that the recursion's stands behind: if Newton or the dense proof fails, say so and go on."""
        try:
            self.search.add(solve())
        except ValueError as error:
            if self.recursion is None:
                raise
            self.search.notes.append(f"the dense form was left out: {error}")

    def estimate(self, pairwise: bool) -> tuple[float, np.ndarray | None, np.ndarray | None]:
        if self.recursion is None:
            raise ValueError(
                "guarantee='estimate' needs the recursion, and this network's states are too wide"
            )
        _, value = self.recursion.solve("value")
        if not pairwise:
            return value, None, None
        sigma = self.recursion.ellipsoid()
        diagonal = np.diagonal(sigma)
        pairs = np.sqrt(np.maximum(diagonal[:, None] + diagonal[None, :] - 2 * sigma, 0))
        np.fill_diagonal(pairs, 0)
        return value, np.sqrt(diagonal), pairs


def choose(
    search: Search, layers: bool, start_at: int | None, iterations: int | None, progress: Progress | None
) -> Engines:
    """The engines for one network, by its sizes alone."""
    form = search.form
    place = first_tap(form, WIDEST) if start_at is None else start_at
    dense = None
    if search.norm == 2 and not start_at:
        gain = _small_gain(form, DENSE_ONLY if place else POLISHED)
        dense = None if gain is None else Dense(search, gain, layers)
        if dense is not None and dense.size > (DENSE_ONLY if place else POLISHED):
            dense = None
    if place and (dense is not None or search.norm != 2):
        if dense is None:
            search.notes.append("too wide for an ellipsoid in the l-inf norm")
        return Engines(search, None, dense)
    return Engines(search, Recursion(search, layers, place, iterations, progress), dense)


def through_cvxpy(
    search: Search,
    solver: str,
    layers: bool,
    pairwise: bool,
    memory_gb: float | None,
    time_limit: float | None,
) -> None:
    """LipSDP through CVXPY: one problem for the network, and one per pair."""
    from lipbounds import _sdp

    dense = Dense(search, dense_gain(search.form), layers)
    labels = dense.gain.labels if layers else None
    k = search.form.num_outputs

    def one(rows: np.ndarray, what: str) -> None:
        found = _sdp.solve(
            dense.Gy, rows, dense.n, labels, solver=solver, memory_gb=memory_gb, time_limit=time_limit
        )
        search.notes.append(
            f"{solver} ({what}): {found.status} in {found.solver_seconds:.3g} s ({found.total_seconds:.3g} s with "
            f"the model), raw value {found.raw_value:.7g}, which is no bound"
        )
        search.add(dense.proof(1 / found.T))

    one(dense.Gz, "network")
    if pairwise:
        for i in range(k):
            for j in range(i + 1, k):
                one(dense.difference(i, j), f"pair {i}, {j}")
