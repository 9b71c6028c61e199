"""How LipSDP's multipliers are found: the ellipsoid recursion, Newton's method on the dense form, or CVXPY.

Each engine returns `Proof`s (multipliers); what they are worth is computed by `certificate.proved_constants` alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from scipy.linalg import eigvalsh, solve
from threadpoolctl import threadpool_limits

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm
from lipbounds._lipsdp import ellipsoid
from lipbounds._lipsdp.barrier import DenseGain, dense_gain, reduce_input, solve_dense
from lipbounds._lipsdp.certificate import Constants, Proof, proved_constants
from lipbounds._lipsdp.core import LipSdpState, relative_multipliers
from lipbounds._lipsdp.matrix_inequality import feasible_start, smallest_rho
from lipbounds._lipsdp.proof import propagate_dense, repair, repair_dense
from lipbounds._lipsdp.state_matrices import WIDEST, Segment, Sequence, first_tap, hybrid_start, sequence
from lipbounds._norms import matrices as norms
from lipbounds._norms.enclosures import Enclosure
from lipbounds._text.calls import FAILURES, reason
from lipbounds._triangle import recursion
from lipbounds._triangle.recursion import Request

#: Networks with at most this many multipliers and inputs (after reduction) together are solved by Newton's method.
POLISHED = 330
#: All pairs are solved one by one where that takes about so many seconds.
EVERY_PAIR = 15.0
#: The same where states are too wide for the recursion to start at the input.
DENSE_ONLY = 1100
Progress = Callable[[str, float], None]
Wanted = Callable[[Segment, np.ndarray], np.ndarray]
_MANY_BLOCKS = 400
_ONE_THREAD = 500
_LOST = 1e-2  # relative excess of a proof over L that calls for another one
_AS_GOOD = 1e-8  # relative excess of a proof over L^2 in float arithmetic that is not worth another try
_SHARES = (0.0, *np.logspace(-10, 0, 31).tolist())


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
        spare = max(1 / max(edge, 1e-300) - 1 - ellipsoid.MARGIN, 1e-9)
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


class Dense:
    """Newton's method on the dense form, to the optimum."""

    def __init__(self, search: Search, gain: DenseGain, layers: bool):
        self.search, self.gain, self.layers = search, gain, layers
        self.Gy, self.Gz = reduce_input(gain)
        self.n = self.Gy.shape[1] - gain.Gy.shape[0]
        self.ties = gain.labels if layers else None
        self.solved: list[tuple[int, float, float]] = []  # steps, L in float arithmetic, relative gap of L^2

    @property
    def size(self) -> int:
        """Multipliers and inputs after reduction."""
        return int(self.Gy.shape[1])

    @property
    def seconds(self) -> float:
        """About how long one solution takes."""
        return 0.03 + 0.07 * (self.size / 140) ** 3

    def solve(self, C: np.ndarray, what: str, progress: Progress | None = None) -> Proof:
        """Multipliers for the outputs C z: C = I for the network, e_i - e_j for a pair."""
        found = solve_dense(self.Gy, C @ self.Gz, self.n, self.ties)
        value = math.sqrt(found.rho)
        self.solved.append((found.iterations, value, found.gap / max(found.rho, 1e-300)))
        if progress is not None:
            progress(what, value)
        return self.proof(C, found.T)

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

    def pair(self, i: int, j: int) -> np.ndarray:
        """C of z_i - z_j."""
        C = np.zeros((1, len(self.Gz)))
        C[0, i], C[0, j] = 1.0, -1.0
        return C


def _dense(search: Search, layers: bool, limit: int | None) -> Dense | None:
    """The dense form, unless it has more neurons than `limit`."""
    neurons = sum(tap.size_out for tap in elementwise_view(search.form).taps)
    if limit is not None and neurons > limit:
        return None
    gain = dense_gain(search.form)
    if limit is not None and not (_moderate(gain.Gy) and _moderate(gain.Gz)):
        search.notes.append("weights of this size have no dense form in float64")
        return None
    return Dense(search, gain, layers)


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
