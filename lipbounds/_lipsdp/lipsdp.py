"""LipSDP: the tightest global l2 bounds known, by the ellipsoid recursion or through CVXPY, always proved afterwards.

    L is a Lipschitz constant if for some positive diagonal T      G' diag(T, I) G <= diag(L^2 I, T)

with G the gain of the network after the loop transformation (Fazlyab et al., NeurIPS 2019, in gain coordinates). How T
was found never matters: `certificate` proves the constants that it gives, every rounding included. Multipliers coupled
between neurons (LipSDP-Network) are invalid (Pauli et al., arXiv 2005.02929) and not offered.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lipbounds._form.lure import LureForm, fingerprint
from lipbounds._gain.memory_budget import check_pairs
from lipbounds._lipsdp.certificate import make_certificate
from lipbounds._lipsdp.core import LipSdpCore, LipSdpState
from lipbounds._lipsdp.search import Engines, through_cvxpy
from lipbounds._lipsdp.state_matrices import WIDEST, first_tap
from lipbounds._lipsdp.task import Progress, Search
from lipbounds._text.calls import FAILURES, reason
from lipbounds._triangle.liplt import or_naive
from lipbounds._triangle.verb import budget_of, check, with_core
from lipbounds.results import Estimate, Guarantee, Norm, Part, UpperBound, weakest

#: Ellipsoids and proofs hold several matrices of outputs x outputs.
MOST_OUTPUTS = 2048
SOLVERS = ("recursion", "clarabel", "scs")
_METHODS = {"neuron": "lipsdp", "layer": "lipsdp-layer"}


@with_core(LipSdpCore())
def lipsdp(
    form: LureForm,
    *,
    solver: Literal["recursion", "clarabel", "scs"] = "recursion",
    multipliers: Literal["neuron", "layer"] = "neuron",
    norm: Norm = 2,
    pairwise: bool = False,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    memory: int | str | None = None,
    objective: str | np.ndarray = "mean",
    refine: int = 0,
    start_at: int | None = None,
    iterations: int | None = None,
    initial: LipSdpState | None = None,
    memory_gb: float | None = None,
    time_limit: float | None = None,
    progress: Progress | None = None,
) -> UpperBound | Estimate:
    """LipSDP: the smallest L that multipliers T prove, never more than `liplt`, with a certificate.

        G' diag(T, I) G <= diag(L^2 I, T)      =>      |f(x) - f(x')|_2 <= L |x - x'|_2

    The bound holds whatever the solver did: the multipliers are repaired if need be and proved, layer by layer or as
    one matrix, with every rounding included. `bound.certificate` can be saved and checked again by others.

    Args:
        form: from `lb.trace` or `lb.from_weights`.
        solver: "recursion", the ellipsoid recursion (networks of any depth; wide convolutional fronts are bounded by
            LipLT up to the first state that is narrow enough); "clarabel" or "scs", the same problem through CVXPY,
            for small networks (pip install "lipbounds[sdp]").
        multipliers: "neuron" (LipSDP-Neuron) or "layer" (LipSDP-Layer, looser).
        norm: 2, or inf for inputs and outputs in the l-inf norm (recursion only).
        pairwise: also L_ij for all pairs and L_i per class. "recursion" gets all pairs from two passes, one for the
            whole network and one for `objective`; CVXPY solves one problem per pair.
        guarantee: as everywhere; probabilistic parts can only come from LipLT on operators above 4096.
        seed: of probabilistic norms.
        memory: None, or a budget of the proofs of LipLT's norms, as in `lb.liplt`; the ellipsoid's own arrays, and the
            norms in front of one that starts behind the input, are chosen by size.
        objective: what the pass for the pairs minimises: "mean" of log L_ij, the "largest" L_ij, or the mean of log
            L_ij with the given weights (K, K), symmetric, >= 0.
        refine: optimise the worst so many pairs once more, each with multipliers of its own.
        start_at: the tap where the ellipsoid starts; None chooses by size, 0 is the input.
        iterations: of the recursion; None chooses by size, and small networks are then solved by Newton's method on the
            dense form, to the optimum.
        initial: a state of `lb.lipsdp.core`, as training leaves it: its multipliers are proved as they are, then the
            recursion begins with them; with iterations=0 that proof is all (milliseconds to seconds).
        memory_gb, time_limit: of CVXPY's solver, which runs in a process of its own; seconds.
        progress: called with (what, L in float arithmetic) while the recursion runs.

    Raises:
        TypeError: not a form, or one that is being traced (use `lb.lipsdp.core`).
        ValueError: an unknown option, norm=1, a network too large for the solver, CVXPY missing or without an answer.
    """
    started = time.perf_counter()
    p: float = check(form, norm, guarantee, "lipsdp")
    _check_options(form, solver, multipliers, p, guarantee, objective, refine, start_at)
    budget = budget_of(memory, p, guarantee)
    if pairwise:
        check_pairs(form.num_outputs, budget)
    possible = solver == "recursion" and multipliers == "neuron" and p == 2 and guarantee != "estimate"
    _check_initial(form, initial, possible, start_at)
    request = "auto" if guarantee == "estimate" else guarantee
    search = Search(form, p, request, seed)
    if form.num_outputs > MOST_OUTPUTS:
        if guarantee == "estimate" or solver != "recursion":
            raise ValueError(
                f"{form.num_outputs} outputs are more than the {MOST_OUTPUTS} of this solver: use liplt"
            )
        search.notes.append(
            f"{form.num_outputs} outputs are more than the {MOST_OUTPUTS} that ellipsoids take"
        )
    elif solver == "recursion":
        engines = Engines(search, multipliers == "layer", start_at, iterations, progress, initial)
        if guarantee == "estimate":
            return _estimate(engines, p, pairwise, multipliers, started)
        engines.run(pairwise, objective, refine)
        engines.note()
    else:
        through_cvxpy(search, solver, multipliers == "layer", pairwise, memory_gb, time_limit)
    other = or_naive(form, norm=p, pairwise=pairwise, guarantee=request, seed=seed, memory=memory)
    assert isinstance(other, UpperBound)
    method = _METHODS[multipliers] + ("" if solver == "recursion" else f"-{solver}")
    method = method if search.constants else other.method
    return _finish(search, other, pairwise, method, started)


def _check_options(
    form: LureForm,
    solver: str,
    multipliers: str,
    norm: float,
    guarantee: str,
    objective: Any,
    refine: int,
    start_at: int | None,
) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if multipliers not in ("neuron", "layer"):
        coupled = " (coupled multipliers are invalid: arXiv 2005.02929)" if multipliers == "network" else ""
        raise ValueError(f"multipliers must be 'neuron' or 'layer', got {multipliers!r}{coupled}")
    if norm == 1:
        raise ValueError("LipSDP is for norm=2 and inf; in norm 1 use lb.liplt(form, norm=1)")
    if solver != "recursion" and norm != 2:
        raise ValueError(f"solver={solver!r} is for norm=2; solver='recursion' takes norm=inf")
    if solver != "recursion" and guarantee == "estimate":
        raise ValueError(
            "the value of a solver is not offered as an estimate: use guarantee='auto', which proves what its "
            "multipliers give and notes the raw value"
        )
    if isinstance(objective, str):
        if objective not in ("mean", "largest"):
            raise ValueError(f"objective must be 'mean', 'largest' or an array (K, K), got {objective!r}")
    else:
        weights, k = np.asarray(objective, np.float64), form.num_outputs
        fine = weights.shape == (k, k) and np.isfinite(weights).all() and (weights >= 0).all()
        if not fine or not (weights * (1 - np.eye(k))).any() or not np.array_equal(weights, weights.T):
            raise ValueError(
                f"objective as weights must be a symmetric array ({k}, {k}) of finite numbers >= 0, not all 0 off the "
                "diagonal"
            )
    if not isinstance(refine, int) or refine < 0:
        raise ValueError(f"refine is a number of pairs >= 0, got {refine!r}")
    if solver != "recursion" and (refine or not isinstance(objective, str) or objective != "mean"):
        raise ValueError(
            f"solver={solver!r} solves every pair on its own: refine and objective are of the recursion"
        )
    if start_at is not None and not 0 <= start_at <= len(form.taps):
        raise ValueError(f"start_at must lie in 0..{len(form.taps)}, got {start_at}")
    if start_at and norm != 2:
        raise ValueError("start_at > 0 is for norm=2")


def _check_initial(form: LureForm, initial: Any, possible: bool, start_at: int | None) -> None:
    if initial is None:
        return
    if not isinstance(initial, LipSdpState):
        raise ValueError(f"initial is a state of lb.lipsdp.core, got {type(initial).__name__}")
    if not possible:
        raise ValueError(
            "initial is for solver='recursion', multipliers='neuron', norm=2 and guarantees that are no estimate"
        )
    if start_at not in (None, first_tap(form, WIDEST)):
        raise ValueError("initial decides where the ellipsoid starts: leave start_at out")


def _finish(search: Search, other: UpperBound, pairwise: bool, method: str, started: float) -> UpperBound:
    """The least of what was proved and of LipLT, with its certificate."""
    form, found = search.form, search.constants
    notes = [*search.notes, *(f"LipLT: {note}" for note in other.notes if note not in form.notes)]
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
        helped = helped or bool((pairs < search.pairwise).any())
    sources = [(c.guarantee, c.failure) for c in found]
    sources += [(other.guarantee, other.failure_probability)] if helped else []
    guarantee = weakest(how for how, _ in sources)
    failure = sum(f for _, f in sources) * (1 + 1e-12) if guarantee != "verified" else 0.0
    certificate = None
    if found:
        certificate = make_certificate(
            form,
            tuple(search.proofs),
            value=value,
            pairwise=pairs,
            per_class=classes,
            norm=search.norm,
            guarantee=guarantee,
            method=method,
            seed=search.seed,
            failure_probability=sum(f for _, f in sources) * (1 + 1e-12),
        )
    how = "LipLT" if value == other.value else "ellipsoid proved by Cholesky"
    shape = (form.num_outputs, form.in_size)
    return UpperBound(
        value=value,
        norm=search.norm,
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


def _estimate(engines: Engines, norm: float, pairwise: bool, multipliers: str, started: float) -> Estimate:
    """The recursion in float arithmetic; where that leaves the range of floats, LipLT's estimate with a note."""
    search = engines.search
    engines.check_estimate()
    try:
        value, classes, pairs = engines.estimate(pairwise)
        arrays = [np.array(value)] + ([] if pairs is None or classes is None else [classes, pairs])
        fine = value > 0 and all(np.isfinite(a).all() for a in arrays)
        why = "" if fine else "the result is outside the range of floats"
    except FAILURES as error:
        why = reason(error)
    if why:
        other = or_naive(search.form, norm=norm, pairwise=pairwise, guarantee="estimate", seed=search.seed)
        assert isinstance(other, Estimate)
        notes = (f"recursion failed: {why}; this is {_whose(other)} estimate", *other.notes)
        return replace(other, notes=notes, seconds=time.perf_counter() - started)
    return Estimate(
        value=value,
        norm=norm,
        guarantee="estimate",
        method=_METHODS[multipliers],
        seconds=time.perf_counter() - started,
        pairwise=pairs,
        per_class=classes,
        notes=(
            "the recursion in float arithmetic, nothing proved",
            *engines.search.notes,
            *engines.search.form.notes,
        ),
    )
