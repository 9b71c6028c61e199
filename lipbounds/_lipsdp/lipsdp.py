"""LipSDP: the tightest global l2 bounds known, by the ellipsoid recursion or through CVXPY, always proved afterwards.

    L is a Lipschitz constant if for some positive diagonal T      G' diag(T, I) G <= diag(L^2 I, T)

with G the gain of the network after the loop transformation (Fazlyab et al., NeurIPS 2019, in gain coordinates). How T
was found never matters: `certificate` proves the constants that it gives, every rounding included. Multipliers coupled
between neurons (LipSDP-Network) are invalid (Pauli et al., arXiv 2005.02929) and not offered.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Literal

import numpy as np

from lipbounds._form.lure import LureForm, fingerprint
from lipbounds._gain.memory_budget import check_pairs
from lipbounds._lipsdp.certificate import make_certificate
from lipbounds._lipsdp.core import LipSdpCore
from lipbounds._lipsdp.search import by_recursion, check_estimate, estimate, through_cvxpy
from lipbounds._lipsdp.solvers import Cvxpy, Recursion, SolverName, solver_of
from lipbounds._lipsdp.task import Answer, Task
from lipbounds._text.calls import FAILURES, moved, reason
from lipbounds._text.device import Device
from lipbounds._text.progress import Progress
from lipbounds._triangle.liplt import or_naive
from lipbounds._triangle.verb import budget_of, check, with_core
from lipbounds.results import Estimate, Guarantee, Norm, Part, UpperBound, weakest

#: Ellipsoids and proofs hold several matrices of outputs x outputs.
MOST_OUTPUTS = 2048
_METHODS = {"neuron": "lipsdp", "layer": "lipsdp-layer"}
_MOVED = {
    **{
        name: f"solver=lb.Recursion({name}=...)"
        for name in ("iterations", "start_at", "objective", "refine", "initial")
    },
    "memory_gb": "solver=lb.Cvxpy(name, memory=...), in bytes or as '4GB'",
    "time_limit": "solver=lb.Cvxpy(name, time_limit=...)",
}


@with_core(LipSdpCore())
@moved(**_MOVED)
def lipsdp(
    form: LureForm,
    *,
    solver: SolverName | Recursion | Cvxpy = "recursion",
    multipliers: Literal["neuron", "layer"] = "neuron",
    norm: Norm = 2,
    pairwise: bool = False,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    memory: int | str | None = None,
    device: Device = "auto",
    progress: Progress = True,
) -> UpperBound | Estimate:
    """LipSDP: the smallest L that multipliers T prove, never more than `liplt`, with a certificate.

        G' diag(T, I) G <= diag(L^2 I, T)      =>      |f(x) - f(x')|_2 <= L |x - x'|_2

    The bound holds whatever the solver did: the multipliers are repaired if need be and proved, layer by layer or as
    one matrix, with every rounding included. `bound.certificate` can be saved and checked again by others.

    Args:
        form: from `lb.trace` or `lb.from_weights`.
        solver: "recursion", the ellipsoid recursion (networks of any depth; wide chains of layers as a whole, other
            wide fronts bounded by LipLT up to the first narrow state: docs/lipsdp.md); "clarabel" or "scs",
            the same problem through CVXPY, for small networks (pip install "lipbounds[sdp]"). With options of its own:
            `lb.Recursion(...)`, `lb.Cvxpy(...)`.
        multipliers: "neuron" (LipSDP-Neuron) or "layer" (LipSDP-Layer, looser).
        norm: 2, or inf for inputs and outputs in the l-inf norm (recursion only). Networks that are wide, or solved on
            the dense form in l2, also have what the l2 constants prove: these times the root of the number of inputs.
        pairwise: also L_ij for all pairs and L_i per class. "recursion" gets all pairs from two passes, one for the
            whole network and one for the pairs; CVXPY solves one problem per pair.
        guarantee: "auto", "verified", "probabilistic" or "estimate", as in `lb.liplt`; probabilistic parts can only
            come from LipLT on operators above 4096.
        seed: of probabilistic norms.
        memory: None, or a budget of the proofs of LipLT's norms, as in `lb.liplt`, and of wide chains of layers; the
            arrays of narrow ellipsoids, and the norms in front of one that starts behind the input, are chosen by size.
        device: where large proofs, and the search on wide chains, are computed: "auto" (on a GPU where JAX has one by
            default), "cpu" or "gpu".
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Raises:
        TypeError: not a form, or one that is being traced (use `lb.lipsdp.core`).
        ValueError: an unknown option, norm=1, a network too large for the solver, CVXPY missing or without an answer.

    Source: Fazlyab et al., Efficient and accurate estimation of Lipschitz constants for deep neural networks, NeurIPS
    2019.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> bound = lb.lipsdp(form, pairwise=True)
        >>> round(bound.value, 3), bound.pairwise.round(3).tolist()
        (2.0, [[0.0, 2.828], [2.828, 0.0]])
    """
    started = time.perf_counter()
    p: float = check(form, norm, guarantee, "lipsdp")
    how = solver_of(solver)
    _check_options(form, how, multipliers, p, guarantee)
    budget = budget_of(memory, p, guarantee)
    if pairwise:
        check_pairs(form.num_outputs, budget)
    request = "auto" if guarantee == "estimate" else guarantee
    task = Task(form, p, request, seed, multipliers == "layer")
    method, limit = _METHODS[multipliers], None if budget is None else budget.limit
    if form.num_outputs > MOST_OUTPUTS:
        if guarantee == "estimate" or isinstance(how, Cvxpy):
            raise ValueError(
                f"{form.num_outputs} outputs are more than the {MOST_OUTPUTS} of this solver: use liplt"
            )
        many = f"{form.num_outputs} outputs are more than the {MOST_OUTPUTS} that ellipsoids take"
        answer = Answer(notes=(many,))
    elif isinstance(how, Cvxpy):
        answer = through_cvxpy(task, how, pairwise)
        method += f"-{how.name}"
    elif guarantee == "estimate":
        return _estimate(task, how, pairwise, method, started)
    else:
        answer = by_recursion(task, how, pairwise, limit)
    other = or_naive(form, norm=p, pairwise=pairwise, guarantee=request, seed=seed, memory=limit)
    assert isinstance(other, UpperBound)
    return _finish(task, answer, other, pairwise, method if answer.found else other.method, started)


def _check_options(
    form: LureForm, how: Recursion | Cvxpy, multipliers: str, norm: float, guarantee: str
) -> None:
    if multipliers not in ("neuron", "layer"):
        coupled = " (coupled multipliers are invalid: arXiv 2005.02929)" if multipliers == "network" else ""
        raise ValueError(f"multipliers must be 'neuron' or 'layer', got {multipliers!r}{coupled}")
    if norm == 1:
        raise ValueError(
            "LipSDP is for norm=2 and inf; in norm 1 use lb.liplt(form, norm=1), or what LipSDP proves by way of l2: "
            "lb.in_norm(form, lb.lipsdp(form, pairwise=True), norm=1)"
        )
    if isinstance(how, Cvxpy):
        if norm != 2:
            raise ValueError(f"solver={how.name!r} is for norm=2; solver='recursion' takes norm=inf")
        if guarantee == "estimate":
            raise ValueError(
                "the value of a solver is not offered as an estimate: use guarantee='auto', which proves what its "
                "multipliers give and notes the raw value"
            )
        return
    k = form.num_outputs
    if not isinstance(how.objective, str) and np.shape(how.objective) != (k, k):
        raise ValueError(f"objective as weights must be a symmetric array ({k}, {k})")
    if how.start_at is not None and how.start_at > len(form.taps):
        raise ValueError(f"start_at must lie in 0..{len(form.taps)}, got {how.start_at}")
    if how.start_at and norm != 2:
        raise ValueError("start_at > 0 is for norm=2")
    if how.initial is not None and (multipliers != "neuron" or norm != 2 or guarantee == "estimate"):
        raise ValueError("initial is for multipliers='neuron', norm=2 and guarantees that are no estimate")


def _finish(
    task: Task, answer: Answer, other: UpperBound, pairwise: bool, method: str, started: float
) -> UpperBound:
    """The least of what was proved and of LipLT, with its certificate."""
    form, found = task.form, [f.constants for f in answer.found]
    notes = [*answer.notes, *(f"LipLT: {note}" for note in other.notes if note not in form.notes)]
    value = min([c.value for c in found] + [other.value])
    classes = pairs = None
    helped = not found or other.value < min(c.value for c in found)
    if helped:
        notes.append(
            "LipLT is the smaller bound here"
            if found
            else f"no multipliers of LipSDP could be proved: this is {_whose(other)} bound"
        )
    if pairwise:
        assert other.pairwise is not None and other.per_class is not None
        classes = np.min([c.per_class for c in found] + [other.per_class], axis=0)
        pairs = np.min([c.pairwise for c in found] + [other.pairwise], axis=0)
        helped = helped or bool((classes < np.min([c.per_class for c in found], axis=0)).any())
        helped = helped or bool((pairs < np.min([c.pairwise for c in found], axis=0)).any())
    sources = [(c.guarantee, c.failure) for c in found]
    sources += [(other.guarantee, other.failure_probability)] if helped else []
    guarantee = weakest(how for how, _ in sources)
    failure = sum(f for _, f in sources) * (1 + 1e-12) if guarantee != "verified" else 0.0
    certificate = None
    if found:
        certificate = make_certificate(
            form,
            tuple(f.proof for f in answer.found),
            value=value,
            pairwise=pairs,
            per_class=classes,
            norm=task.norm,
            guarantee=guarantee,
            method=method,
            seed=task.seed,
            failure_probability=sum(f for _, f in sources) * (1 + 1e-12),
        )
    how = "LipLT" if value == other.value else "ellipsoid proved by Cholesky"
    shape = (form.num_outputs, form.in_size)
    return UpperBound(
        value=value,
        norm=task.norm,
        guarantee=guarantee,
        method=method,
        seconds=time.perf_counter() - started,
        pairwise=pairs,
        per_class=classes,
        parts=(Part("input", "output", shape, value, guarantee, how),),
        certificate=certificate,
        failure_probability=failure,
        notes=(*notes, *form.notes),
        network=fingerprint(form),
    )


def _whose(other: UpperBound | Estimate) -> str:
    return "LipLT's" if other.method == "liplt" else "the naive"


def _estimate(task: Task, how: Recursion, pairwise: bool, method: str, started: float) -> Estimate:
    """The recursion in float arithmetic; where that leaves the range of floats, LipLT's estimate with a note."""
    check_estimate(task, how)
    other: UpperBound | Estimate | None = None
    notes: tuple[str, ...] = ()
    try:
        value, classes, pairs, said = estimate(task, how, pairwise)
        arrays = [np.array(value)] + ([] if pairs is None or classes is None else [classes, pairs])
        fine = value > 0 and all(np.isfinite(a).all() for a in arrays)
        why = "" if fine else "the result is outside the range of floats"
    except FAILURES as error:
        why = reason(error)
    if why or task.norm != 2:
        other = or_naive(task.form, norm=task.norm, pairwise=pairwise, guarantee="estimate", seed=task.seed)
    if why:
        assert isinstance(other, Estimate)
        notes = (f"recursion failed: {why}; this is {_whose(other)} estimate", *other.notes)
        return replace(other, notes=notes, seconds=time.perf_counter() - started)
    if other is not None:  # in the l-inf norm one ellipsoid of all outputs may be worth less
        if other.value < value:
            value, notes = other.value, (f"{_whose(other)} estimate is the smaller one here",)
        if pairwise and classes is not None and pairs is not None:
            assert other.per_class is not None and other.pairwise is not None
            classes, pairs = np.minimum(classes, other.per_class), np.minimum(pairs, other.pairwise)
    return Estimate(
        value=value,
        norm=task.norm,
        guarantee="estimate",
        method=method,
        seconds=time.perf_counter() - started,
        pairwise=pairs,
        per_class=classes,
        notes=("the recursion in float arithmetic, nothing proved", said, *notes, *task.form.notes),
    )
