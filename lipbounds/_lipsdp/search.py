"""How LipSDP's multipliers are found: vectors on the dense form, the ellipsoid recursion, or CVXPY.

Each engine is a function that returns its proofs (`Answer`), `by_recursion` or `through_cvxpy`; what multipliers are
worth is computed by `certificate.proved_constants` alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from scipy.linalg import eigvalsh, solve

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm
from lipbounds._lipsdp import cvxpy_solver, ellipsoid, recursion_step
from lipbounds._lipsdp.certificate import Proof
from lipbounds._lipsdp.core import relative_multipliers
from lipbounds._lipsdp.dense_search import Dense, Solved, small_dense, threads
from lipbounds._lipsdp.proof import repair
from lipbounds._lipsdp.solvers import Cvxpy, Recursion
from lipbounds._lipsdp.state_matrices import TAIL, Segment, Sequence, first_tap, hybrid_start, sequence
from lipbounds._lipsdp.task import Answer, Found, Task
from lipbounds._lipsdp.wide import by_chain
from lipbounds._text.calls import FAILURES, reason
from lipbounds._text.progress import about, clock, remaining, say
from lipbounds._triangle import recursion
from lipbounds._triangle.recursion import Request

#: Networks with at most this many multipliers and inputs (after reduction) together are solved on the dense form.
DENSE = 2048
#: Every pair gets multipliers of its own where that takes about so many seconds.
EVERY_PAIR = 30.0
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


class _Ellipsoids:
    """The recursion on the states behind tap `start_at` - 1, warm-started from its own last optimum."""

    def __init__(self, task: Task, start_at: int, how: Recursion):
        self.start_at = start_at
        box = task.norm == math.inf
        request = Request(2, task.guarantee, task.seed)
        self.given: tuple[np.ndarray, int] | None = None
        if start_at:
            self.states, first, _, _ = hybrid_start(task.form, start_at, request)
            self.given = (first, 0)
            begin = self.states.start.midpoint_for_search()
            first = begin @ first @ begin.T
        else:
            self.states = sequence(task.form)
            first = self.states.start.midpoint_for_search()
            first = first if box else first @ first.T
        self.problem = ellipsoid.problem(self.states.segments, first, per_layer=task.layers, box=box)
        self.effort = ellipsoid.effort(self.problem, how.iterations)
        self.best: ellipsoid.Parameters | None = None
        self.trained: tuple[np.ndarray, ...] = ()
        if how.initial is not None:
            self.trained = self._trained(task.form, how.initial)
            self.starts = [self._from_trained(first)]
        else:
            self.starts = [ellipsoid.parameters_of(self.problem, s) for s in (0.0, -2.0, -6.0, -12.0)]
            if not (start_at or box or any(s.units.any() for s in self.states.segments)):
                with contextlib.suppress(ValueError, ArithmeticError):  # it is one of several
                    self.starts += self._from_liplt(task.form, request, first)

    def _trained(self, form: LureForm, state: Any) -> tuple[np.ndarray, ...]:
        """D_i / (Sy)_ii per segment, from a state of `lb.lipsdp.core`."""
        rows = relative_multipliers(form, state)
        if [row.size for row in rows] != list(self.states.sizes):
            raise ValueError("initial has multipliers of another network")
        return tuple(rows[s.tap][s.active] for s in self.states.segments)

    def _from_trained(self, first: np.ndarray) -> ellipsoid.Parameters:
        own = dict(zip((s.tap for s in self.states.segments), self.trained, strict=True))

        def wanted(segment: Segment, sy: np.ndarray) -> np.ndarray:
            return own[segment.tap] * np.diagonal(sy)

        with np.errstate(all="ignore"):
            return parameters_from(self.problem, self.states, first, wanted)

    def _from_liplt(self, form: LureForm, request: Request, first: np.ndarray) -> list[ellipsoid.Parameters]:
        """The start of `closed_form`, where there is one."""
        D = closed_form(elementwise_view(form), request)

        def one_each(segment: Segment, sy: np.ndarray) -> np.ndarray:
            assert D is not None
            return np.full(len(sy), D[segment.tap])

        with np.errstate(all="ignore"):
            return [] if D is None else [parameters_from(self.problem, self.states, first, one_each)]

    def initial(self) -> Proof:
        """What the multipliers to begin with prove as they are."""
        D = repair(self.states, self.trained, self.given, None, relative=True)
        return Proof(D, self.start_at, None, relative=True)

    def solve(self, kind: str, weights: np.ndarray | None = None) -> tuple[Proof, str]:
        """Multipliers for one objective of `ellipsoid.objective`, and what was done."""
        if kind == "value" and self.problem.box:
            kind = "entries"
        effort = self.effort
        if self.best is not None:  # begin where the last one ended
            effort = replace(effort, stages=effort.stages[-2:], iterations=max(effort.iterations // 2, 30))
        starts = self.starts if self.best is None or self.trained else [self.best]
        with jax.numpy_dtype_promotion("standard"):  # optax adds integers of different widths
            found, value, done = ellipsoid.optimize(self.problem, starts, kind, weights, effort)
        self.best = found if self.best is None else self.best
        D, box = ellipsoid.multipliers(self.problem, found)
        D = repair(self.states, D, self.given, box, relative=True)
        said = f"recursion ({kind}): {done} iterations, {value:.6g} in float arithmetic"
        return Proof(D, self.start_at, box, relative=True), said

    def ellipsoid(self) -> tuple[np.ndarray, int]:
        """(S, e): the last Sigma_out is 4^e S, in float arithmetic, for estimates."""
        assert self.best is not None
        return ellipsoid.last_ellipsoid(self.problem, self.best)


def _place(task: Task, how: Recursion) -> int:
    """The tap where the ellipsoid starts."""
    return first_tap(task.form, TAIL) if how.start_at is None else how.start_at


# --- the engines ---------------------------------------------------------------------------------------------------


class _Attempts:
    """What was found and is to be said so far. An attempt that fails is a note: others bound the network."""

    def __init__(self, task: Task, how: Recursion):
        self.task, self.found, self.notes = task, list[Found](), list[str]()
        self.solved, self.dense, place = dict[str, Solved](), None, _place(task, how)
        if task.norm == 2 and how.start_at is None and how.iterations is None:
            with self.noting("the dense form"):
                self.dense = small_dense(task, DENSE)
        free = how.start_at is None and how.initial is None and not task.layers
        self.wide = bool(place and free and task.norm == 2 and self.dense is None)
        self.possible = task.norm == 2 or not place

        @functools.cache
        def ellipsoids() -> _Ellipsoids:
            made = _Ellipsoids(task, place, how)
            if place:
                self.notes.append(f"the ellipsoid starts behind {place} taps, which LipLT bounds")
            return made

        self.ellipsoids = ellipsoids

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self.notes.append(f"{what} failed: {reason(error)}")

    def given(self) -> None:
        """The multipliers to begin with, as they are."""
        start = self.ellipsoids()  # those of another network are an error
        with self.noting("the proof of the multipliers given"):
            self.found.append(self.task.prove(start.initial()))
            self.notes.append("multipliers proved as they were given")

    def recursion(self, kind: str, weights: np.ndarray | None = None) -> None:
        """By the recursion, where the network has a state that it can start from."""
        if self.possible:
            with self.noting(f"recursion ({kind})"):
                proof, said = self.ellipsoids().solve(kind, weights)
                self.notes.append(said)
                self.found.append(self.task.prove(proof))

    def exact(self, outputs: dict[str, np.ndarray]) -> list[Found]:
        """On the dense form, if there is one, for each of the outputs C z."""
        before = len(self.found)
        if self.dense is not None:
            if len(outputs) > 1:
                say(f"the dense form of {len(outputs)} problems")
            with self.noting("the dense form"):
                solved = self.dense.solve(list(outputs.values()))
                for (what, C), (T, one) in zip(outputs.items(), solved, strict=True):
                    with self.noting(f"the proof ({what})"):
                        self.found.append(self.dense.prove(self.task, C, T))
                        self.solved[what] = one
                        say(f"{what}: {one.value:.6g} in float arithmetic")
        return self.found[before:]

    def network(self, more: dict[str, np.ndarray]) -> bool:
        """Prove the constant of the network, and those of pairs with it; True where the dense form is not enough.

        There is none, or its proof is far above the value in float arithmetic, as it can be where neurons hardly move,
        and the recursion may prove more.
        """
        found = self.exact({"network": np.eye(self.task.form.num_outputs), **more})
        solved = self.solved.get("network")
        loose = solved is None or found[0].constants.value > (1 + _LOST) * solved.value
        if loose:
            self.recursion("value")
        return loose

    def every_pair(self, how: Recursion) -> dict[str, np.ndarray]:
        """The rows C of all pairs, where each can have multipliers of its own."""
        k = self.task.form.num_outputs
        mean = isinstance(how.objective, str) and how.objective == "mean"
        if self.dense is None or not mean or self.dense.seconds(k * (k - 1) // 2) > EVERY_PAIR:
            return {}
        return {f"pair {a}, {b}": pair(k, a, b) for a, b in itertools.combinations(range(k), 2)}

    def pairs(self, how: Recursion, each: bool, loose: bool) -> None:
        """All pairs together where not `each` has been solved, and the worst of them once more."""
        k = self.task.form.num_outputs
        if loose or not each:
            self.recursion(*pair_objective(how.objective, k))
        if each or not how.refine or not self.found:
            return
        i, j = np.triu_indices(k, 1)
        worst = np.argsort(-np.min([f.constants.pairwise for f in self.found], axis=0)[i, j])[: how.refine]
        rows = {f"pair {a}, {b}": pair(k, a, b) for a, b in zip(i[worst], j[worst], strict=True)}
        if not self.exact(rows):
            for C in rows.values():
                self.recursion("pairs", np.abs(C.T @ C) * (1 - np.eye(k)))

    def answer(self) -> Answer:
        return Answer(tuple(self.found), (*self.notes, *_said(list(self.solved.values()))))


def by_recursion(task: Task, how: Recursion, pairwise: bool, limit: int | None = None) -> Answer:
    """Proofs for the whole network, and for the pairs.

    On the dense form where the network is small enough; as a chain where a state is too wide for the recursion (limit:
    bytes of memory); else by the recursion. In l-inf the constants of a search in l2 are converted, too, where
    the dense form can be solved, and alone where a state is too wide for the recursion in l-inf.
    """
    attempts = _Attempts(task, how)
    if task.norm == 2:
        return _searched(attempts, how, pairwise, limit)
    own = _searched(attempts, how, pairwise, limit) if attempts.possible else Answer()
    square = _Attempts(replace(task, norm=2), how)
    if attempts.possible and square.dense is None:
        return own
    other = _searched(square, how, pairwise, limit)
    size = task.form.in_size
    converted = [Found(f.proof, f.constants.in_norm(task.norm, size)) for f in other.found]
    return Answer((*own.found, *converted), (*own.notes, *(f"in l2: {note}" for note in other.notes)))


def _searched(attempts: _Attempts, how: Recursion, pairwise: bool, limit: int | None) -> Answer:
    task = attempts.task
    if attempts.wide:
        with attempts.noting("LipSDP of the whole network as a chain"):
            answer = by_chain(task, how, pairwise, limit)
            if answer.found:
                return replace(answer, notes=(*attempts.notes, *answer.notes))
            attempts.notes += answer.notes
    with threads(attempts.dense):
        if how.initial is not None:
            attempts.given()
        if how.initial is None or how.iterations != 0:
            pairwise = pairwise and task.form.num_outputs > 1
            each = attempts.every_pair(how) if pairwise else {}
            loose = attempts.network(each)
            if pairwise:
                attempts.pairs(how, bool(each), loose)
    return attempts.answer()


def _said(solved: list[Solved]) -> tuple[str, ...]:
    """What was done on the dense form, in words."""
    if not solved:
        return ()
    (steps, value, gap), rest = solved[0], solved[1:]
    text = f"dense form: {steps} steps, {value:.7g} in float arithmetic, relative gap {gap:.1g}"
    if rest:
        gaps = [one.gap for one in rest if one.gap < math.inf]
        most, widest = max(one.steps for one in rest), max(gaps, default=0.0)
        text += f"; {len(rest)} pairs, at most {most} steps, gap {widest:.1g}"
        text += f" ({len(rest) - len(gaps)} not solved)" if len(gaps) < len(rest) else ""
    return (text,)


def check_estimate(task: Task, how: Recursion) -> None:
    """ValueError where the network has no state that the recursion can start from."""
    if task.norm != 2 and _place(task, how):
        raise ValueError("guarantee='estimate' is for norm=2, and inf where no state is wide")


def estimate(
    task: Task, how: Recursion, pairwise: bool
) -> tuple[float, np.ndarray | None, np.ndarray | None, str]:
    """(value, per class, pairs, what was done) in float arithmetic, by the recursion."""
    place = _place(task, how)
    box = task.norm == math.inf
    ellipsoids = _Ellipsoids(task, place, how)
    _, said = ellipsoids.solve("value")
    sigma, exponent = ellipsoids.ellipsoid()
    diagonal = np.diagonal(sigma)
    value = math.sqrt(diagonal.max() if box else np.linalg.eigvalsh(sigma)[-1])
    unit = np.ldexp(1.0, exponent)
    if not pairwise:
        return value * unit, None, None, said
    pairs = np.sqrt(np.maximum(diagonal[:, None] + diagonal[None, :] - 2 * sigma, 0))
    np.fill_diagonal(pairs, 0)
    return value * unit, np.sqrt(diagonal) * unit, pairs * unit, said


def pair(k: int, i: int, j: int) -> np.ndarray:
    """The row C (1, k) of z_i - z_j = C z."""
    C = np.zeros((1, k))
    C[0, i], C[0, j] = 1.0, -1.0
    return C


def pair_objective(objective: str | np.ndarray, k: int) -> tuple[str, np.ndarray | None]:
    """(kind, weights) for `ellipsoid.objective`."""
    if isinstance(objective, str) and objective == "largest":
        return "largest", None
    weights = np.ones((k, k)) if isinstance(objective, str) else np.asarray(objective, np.float64)
    return "pairs", weights * (1 - np.eye(k))


def through_cvxpy(task: Task, how: Cvxpy, pairwise: bool) -> Answer:
    """LipSDP through CVXPY: one problem for the network, and one per pair."""
    dense = Dense(task.gain, task.layers)
    k = task.form.num_outputs
    found, notes, solved = list[Found](), list[str](), list[cvxpy_solver.SdpResult]()
    problems = [np.eye(k)]
    if pairwise:
        problems += [pair(k, i, j) for i in range(k) for j in range(i + 1, k)]
    began, count = clock(), len(problems)
    for number, C in enumerate(problems):
        say(f"{how.name}: problem {number + 1} of {count}{remaining(began, number, count)}")
        with about(f"{how.name}: problem {number + 1} of {count}"):
            result = cvxpy_solver.solve(
                dense.Gy,
                C @ dense.Gz,
                dense.n,
                dense.ties,
                solver=how.name,
                memory=how.limit,
                time_limit=how.time_limit,
            )
        solved.append(result)
        try:
            found.append(dense.prove(task, C, result.T))
        except FAILURES as error:
            notes.append(f"the proof of {how.name}'s multipliers failed: {reason(error)}")
    first, rest = solved[0], solved[1:]
    notes.append(
        f"{how.name}: {first.status} in {first.solver_seconds:.3g} s ({first.total_seconds:.3g} s with the model), raw "
        f"value {first.raw_value:.7g}, which is no bound"
    )
    if rest:
        words = ", ".join(sorted({one.status for one in rest}))
        notes.append(
            f"{len(rest)} pairs: {words}, {sum(one.total_seconds for one in rest):.3g} s, largest raw value "
            f"{max(one.raw_value for one in rest):.7g}"
        )
    return Answer(tuple(found), tuple(notes))
