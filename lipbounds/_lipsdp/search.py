"""How LipSDP's multipliers are found: the ellipsoid recursion, Newton's method on the dense form, or CVXPY.

Each engine returns `Proof`s (multipliers); what they are worth is computed by `certificate.proved_constants` alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from scipy.linalg import eigvalsh, solve

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm
from lipbounds._lipsdp import ellipsoid, recursion_step
from lipbounds._lipsdp.barrier_search import _dense, threads
from lipbounds._lipsdp.certificate import Proof
from lipbounds._lipsdp.core import LipSdpState, relative_multipliers
from lipbounds._lipsdp.proof import repair
from lipbounds._lipsdp.state_matrices import WIDEST, Segment, Sequence, first_tap, hybrid_start, sequence
from lipbounds._lipsdp.task import Progress, Search
from lipbounds._text.calls import FAILURES, reason
from lipbounds._triangle import recursion
from lipbounds._triangle.recursion import Request

#: Networks with at most this many multipliers and inputs (after reduction) together are solved by Newton's method.
POLISHED = 330
#: All pairs are solved one by one where that takes about so many seconds.
EVERY_PAIR = 15.0
#: The same where states are too wide for the recursion to start at the input.
DENSE_ONLY = 1100
Wanted = Callable[[Segment, np.ndarray], np.ndarray]
_MANY_BLOCKS = 400
_LOST = 1e-2  # relative excess of a proof over L that calls for another one


# --- where to begin ------------------------------------------------------------------------------------------------


def closed_form(view: LureForm, request: Request) -> list[float] | None:
    """D_k = m_k m_out / u_k per tap: multipliers one per layer that prove no more than LipLT.

    With the block norms n_kj, m_k from the triangle recursion and u_out = 1, u_j = sum_k u_k n_kj from the output
    back, T_k = u_k / (m_k m_out) is Perron's scaling of the matrix of block norms. None where LipLT is 0, a D
    leaves the range of float64 or the blocks are many.
    """
    count = len(view.taps)
    if count * (count + 1) // 2 > _MANY_BLOCKS:
        return None
    scalings = recursion.loop_transform(view, 2, centred=True)
    nodes = [(k,) for k in range(count)]
    host = recursion.host_form(view)
    found = recursion.block_norms(view, recursion.structure(host, nodes, scalings), scalings, request)
    triangle = recursion.recursion(view, nodes, scalings, request, pairwise=False, found=found)
    below = np.zeros(count)
    for j in reversed(range(count)):
        below[j] = triangle.outputs.get((j,), 0.0) + sum(
            below[k] * found[(j,), (k,)].value for k in range(j + 1, count) if ((j,), (k,)) in found
        )
    if not triangle.value > 0:
        return None
    reach = np.array([triangle.reach[(k,)] for k in range(count)])
    with np.errstate(all="ignore"):
        D = np.where((below > 0) & (reach > 0), reach / below * triangle.value, 0.0)
    return D.tolist() if np.isfinite(D).all() else None


def parameters_from(
    problem: ellipsoid.Problem, seq: Sequence, start: np.ndarray, wanted: Wanted
) -> ellipsoid.Parameters:
    """Parameters whose D is `wanted(segment, Sy)` (n,), or its least multiple that is feasible."""
    sigma = start
    taps: list[Any] = []
    for segment in seq.segments:
        a, b, w = (m.midpoint_for_search() for m in (segment.A, segment.B, segment.W))
        n = segment.active.size
        if not n:
            taps.append((np.zeros(0), np.zeros(0)))
            sigma = a @ sigma @ a.T
            continue
        cross = w @ sigma
        sy = cross @ w.T
        d = np.maximum(wanted(segment, sy), max(float(np.trace(sy)), 1e-300) * 1e-12)
        edge = float(eigvalsh(sy / np.sqrt(d[:, None] * d), subset_by_index=[n - 1] * 2)[0])
        d = d * max(1.0, edge * (1 + 1e-8))
        edge = min(edge, 1 / (1 + 1e-8))
        kappa = np.maximum(segment.kappa, 1.0) if a.any() else np.ones(n)
        spare = max(1 / max(edge, 1e-300) - 1 - recursion_step.MARGIN, 1e-9)
        taps.append((np.log(d / d.max()), np.log(spare / kappa)))
        x = sigma + cross.T @ solve(np.diag(d) - sy, cross, assume_a="pos")
        sigma = a @ x @ a.T + (b * d) @ b.T
        sigma = (sigma + sigma.T) / 2
    return ellipsoid.parameters_of(problem, [s for _, s in taps], [q for q, _ in taps])


# --- the ellipsoid recursion ---------------------------------------------------------------------------------------


class Recursion:
    """The recursion on the states behind tap `start_at` - 1, warm-started from its own last optimum."""

    def __init__(
        self,
        search: Search,
        layers: bool,
        start_at: int,
        iterations: int | None,
        progress: Progress | None,
        initial: LipSdpState | None = None,
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
            first = self.states.start.midpoint_for_search()
            first = first if box else first @ first.T
        self.problem = ellipsoid.problem(self.states.segments, first, per_layer=layers, box=box)
        self.effort = ellipsoid.effort(self.problem, iterations)
        self.best: ellipsoid.Parameters | None = None
        self.trained: tuple[np.ndarray, ...] = ()
        if initial is not None:
            rows = relative_multipliers(search.form, initial)
            if [row.size for row in rows] != list(self.states.sizes):
                raise ValueError("initial has multipliers of another network")
            self.trained = tuple(rows[s.tap][s.active] for s in self.states.segments)
            own = dict(zip((s.tap for s in self.states.segments), self.trained, strict=True))

            def wanted(segment: Any, sy: np.ndarray) -> np.ndarray:
                return own[segment.tap] * np.diagonal(sy)

            with np.errstate(all="ignore"):
                self.starts = [parameters_from(self.problem, self.states, first, wanted)]
            return
        self.starts = [ellipsoid.parameters_of(self.problem, s) for s in (0.0, -2.0, -6.0, -12.0)]
        if not start_at and not box:
            D = None
            with contextlib.suppress(ValueError, ArithmeticError):
                D = closed_form(elementwise_view(search.form), request)
            if D is not None:

                def one_each(segment: Any, sy: np.ndarray) -> np.ndarray:
                    return np.full(len(sy), D[segment.tap])

                with (
                    np.errstate(all="ignore"),
                    contextlib.suppress(ValueError, ArithmeticError),
                ):  # one of several
                    self.starts.append(parameters_from(self.problem, self.states, first, one_each))

    def initial(self) -> Proof:
        """What the multipliers to begin with prove as they are."""
        D = repair(self.states, self.trained, self.given, None, relative=True)
        return Proof(D, self.start_at, None, relative=True)

    def solve(self, kind: str, weights: np.ndarray | None = None) -> Proof:
        """Multipliers for one objective of `ellipsoid.objective`."""
        if kind == "value" and self.problem.box:
            kind = "entries"
        effort = self.effort
        if self.best is not None and len(effort.stages) > 2:  # begin where the last one ended
            effort = replace(effort, stages=effort.stages[-2:], iterations=max(effort.iterations // 2, 30))
        starts = self.starts if self.best is None or self.trained else [self.best]
        with jax.numpy_dtype_promotion("standard"):  # optax adds integers of different widths
            found, value, done = ellipsoid.optimize(
                self.problem, starts, kind, weights, effort, self.progress
            )
        self.best = found if self.best is None else self.best
        D, box = ellipsoid.multipliers(self.problem, found)
        D = repair(self.states, D, self.given, box, relative=True)
        self.search.notes.append(f"recursion ({kind}): {done} iterations, {value:.6g} in float arithmetic")
        return Proof(D, self.start_at, box, relative=True)

    def ellipsoid(self) -> tuple[np.ndarray, int]:
        """(S, e): the last Sigma_out is 4^e S, in float arithmetic, for estimates."""
        assert self.best is not None
        return ellipsoid.last_ellipsoid(self.problem, self.best)


# --- the dense form ------------------------------------------------------------------------------------------------


# --- all of it -----------------------------------------------------------------------------------------------------


class Engines:
    """What works on one network, chosen by its sizes: the dense form where it is small, else the recursion."""

    def __init__(
        self,
        search: Search,
        layers: bool,
        start_at: int | None,
        iterations: int | None,
        progress: Progress | None,
        initial: LipSdpState | None = None,
    ):
        self.search, self.progress = search, progress
        self.initial = initial is not None
        self.iterate = initial is None or iterations != 0
        form = search.form
        place = first_tap(form, WIDEST) if start_at is None else start_at
        limit = DENSE_ONLY if place else POLISHED
        self.dense = None
        if search.norm == 2 and start_at is None and iterations is None:
            with self._noting("the dense form"):
                dense = _dense(search, layers, limit)
                self.dense = dense if dense is not None and dense.size <= limit else None
        self.recursion: Recursion | None = None
        self.make: Callable[[], Recursion] | None = None
        if search.norm == 2 or not place:
            self.make = lambda: Recursion(search, layers, place, iterations, progress, initial)
        else:
            search.notes.append("too wide for an ellipsoid in the l-inf norm")

    @contextlib.contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """An engine that finds nothing, or multipliers that prove nothing, are a note: others bound the network."""
        try:
            yield
        except FAILURES as error:
            self.search.notes.append(f"{what} failed: {reason(error)}")

    def by_recursion(self, kind: str, weights: np.ndarray | None = None) -> bool:
        """Add a proof by the recursion; False where it fails or the network has no state that it can start from."""
        if self.make is None:
            return False
        with self._noting(f"recursion ({kind})"):
            self.recursion = self.make() if self.recursion is None else self.recursion
            self.search.add(self.recursion.solve(kind, weights))
            return True
        return False

    def by_newton(self, C: np.ndarray, what: str) -> bool:
        """Add a proof by Newton's method for the outputs C z; False, with a note, where it fails."""
        if self.dense is None:
            return False
        with self._noting(f"Newton ({what})"):
            self.search.add(self.dense.solve(C, what, self.progress))
            return True
        return False

    def run(self, pairwise: bool, objective: str | np.ndarray, refine: int) -> None:
        """Add proofs to the search: for the whole network, then for the pairs, then for the worst of them."""
        with threads(self.dense):
            k = self.search.form.num_outputs
            if self.initial and self.make is not None:
                self.recursion = self.make()
                with self._noting("the proof of the multipliers given"):
                    self.search.add(self.recursion.initial())
                    self.search.notes.append("multipliers proved as they were given")
            if not self.iterate:
                return
            loose = not self.by_newton(np.eye(k), "network") or self._lost()
            if loose:
                self.by_recursion("value")
            if not pairwise or k < 2:
                return
            i, j = np.triu_indices(k, 1)
            exact = isinstance(objective, str) and objective == "mean"
            if exact and self.dense is not None and self.dense.seconds * len(i) <= EVERY_PAIR:
                for a, b in zip(i.tolist(), j.tolist(), strict=True):
                    self.by_newton(self.dense.pair(a, b), f"pair {a}, {b}")
                if loose:
                    self.by_recursion(*pair_objective(objective, k))
                return
            self.by_recursion(*pair_objective(objective, k))
            refine = refine if self.search.constants else 0
            for place in np.argsort(-self.search.pairwise[i, j])[:refine] if refine else ():
                self._refine(int(i[place]), int(j[place]))

    def _lost(self) -> bool:
        """Whether the proof of Newton's multipliers is far above their value in float arithmetic, as it can be where
        neurons hardly move: the recursion may prove more."""
        assert self.dense is not None
        return self.search.constants[-1].value > (1 + _LOST) * self.dense.solved[-1][1]

    def note(self) -> None:
        """Say what Newton's method did."""
        solved = [] if self.dense is None else self.dense.solved
        if solved:
            steps, value, gap = solved[0]
            text = f"Newton: {steps} steps, {value:.7g} in float arithmetic, relative gap {gap:.1g}"
            if len(solved) > 1:
                most, _, widest = (max(column) for column in zip(*solved[1:], strict=True))
                text += f"; {len(solved) - 1} pairs, at most {most} steps, gap {widest:.1g}"
            self.search.notes.append(text)

    def _refine(self, i: int, j: int) -> None:
        if self.dense is not None and self.by_newton(self.dense.pair(i, j), f"pair {i}, {j}"):
            return
        k = self.search.form.num_outputs
        weights = np.zeros((k, k))
        weights[i, j] = weights[j, i] = 1.0
        self.by_recursion("pairs", weights)

    def check_estimate(self) -> None:
        if self.make is None:
            raise ValueError("guarantee='estimate' is for norm=2, and inf where no state is wide")

    def estimate(self, pairwise: bool) -> tuple[float, np.ndarray | None, np.ndarray | None]:
        """(value, per class, pairs) in float arithmetic."""
        assert self.make is not None
        with threads(self.dense):
            self.recursion = self.make()
            self.recursion.solve("value")
            sigma, exponent = self.recursion.ellipsoid()
        diagonal = np.diagonal(sigma)
        box = self.search.norm == math.inf
        value = math.sqrt(diagonal.max() if box else np.linalg.eigvalsh(sigma)[-1])
        unit = np.ldexp(1.0, exponent)
        if not pairwise:
            return value * unit, None, None
        pairs = np.sqrt(np.maximum(diagonal[:, None] + diagonal[None, :] - 2 * sigma, 0))
        np.fill_diagonal(pairs, 0)
        return value * unit, np.sqrt(diagonal) * unit, pairs * unit


def pair_objective(objective: str | np.ndarray, k: int) -> tuple[str, np.ndarray | None]:
    """(kind, weights) for `ellipsoid.objective`."""
    if isinstance(objective, str) and objective == "largest":
        return "largest", None
    weights = np.ones((k, k)) if isinstance(objective, str) else np.asarray(objective, np.float64)
    return "pairs", weights * (1 - np.eye(k))


def through_cvxpy(
    search: Search,
    solver: str,
    layers: bool,
    pairwise: bool,
    memory_gb: float | None,
    time_limit: float | None,
) -> None:
    """LipSDP through CVXPY: one problem for the network, and one per pair."""
    from lipbounds._lipsdp import cvxpy_solver

    dense = _dense(search, layers, None)
    assert dense is not None
    k = search.form.num_outputs

    solved: list[cvxpy_solver.SdpResult] = []

    def one(C: np.ndarray) -> None:
        found = cvxpy_solver.solve(
            dense.Gy,
            C @ dense.Gz,
            dense.n,
            dense.ties,
            solver=solver,
            memory_gb=memory_gb,
            time_limit=time_limit,
        )
        solved.append(found)
        try:
            search.add(dense.proof(C, found.T))
        except FAILURES as error:
            search.notes.append(f"the proof of {solver}'s multipliers failed: {reason(error)}")

    one(np.eye(k))
    if pairwise:
        for i in range(k):
            for j in range(i + 1, k):
                one(dense.pair(i, j))
    first, rest = solved[0], solved[1:]
    search.notes.append(
        f"{solver}: {first.status} in {first.solver_seconds:.3g} s ({first.total_seconds:.3g} s with the model), raw "
        f"value {first.raw_value:.7g}, which is no bound"
    )
    if rest:
        words = ", ".join(sorted({one.status for one in rest}))
        search.notes.append(
            f"{len(rest)} pairs: {words}, {sum(one.total_seconds for one in rest):.3g} s, largest raw value "
            f"{max(one.raw_value for one in rest):.7g}"
        )
