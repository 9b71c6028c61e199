"""LipLT: the triangle recursion with the slopes' midpoints as centres, and its diagonal scalings."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lipbounds._form.lure import LureForm
from lipbounds._gain.memory_budget import check_pairs
from lipbounds._text.calls import FAILURES, reason
from lipbounds._text.device import Device
from lipbounds._text.progress import Progress
from lipbounds._triangle import recursion
from lipbounds._triangle import scaling as _scaling
from lipbounds._triangle.core import Core
from lipbounds._triangle.naive import estimate, finish, naive
from lipbounds._triangle.recursion import Request, Triangle
from lipbounds._triangle.verb import budget_of, check, with_core
from lipbounds.results import Estimate, Guarantee, Norm, UpperBound

SCALINGS = (None, "aol", "sll", "optimized")


@with_core(Core(centred=True))
def liplt(
    form: LureForm,
    *,
    scaling: Literal["aol", "sll", "optimized"] | None = None,
    norm: Norm = 2,
    pairwise: bool = False,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    memory: int | str | None = None,
    device: Device = "auto",
    progress: Progress = True,
) -> UpperBound | Estimate:
    """LipLT (CRM paper, Theorem 3.3): the loop transformation v = c y + r w, then the triangle recursion.

        m_k = ||G[k, x]|| + sum_j ||G[k, j]|| m_j,    L <= m_out

    Never more than `naive`: the smaller of the two is returned. Scalings replace G[k, j] by S_k G[k, j] S_j^-1 and
    return the smallest of the scaled and the unscaled bound.

    Args:
        form: from `lb.trace` or `lb.from_weights`.
        scaling: None, "aol", "sll" (Theorem 3.2, backward over the taps), or "optimized" (Adam on log S).
        norm: 2, 1 or inf; the constant is of the map from (R^n, norm) to (R^K, norm). Scalings need norm 2.
        pairwise: also L_ij of z_i - z_j for all pairs, and L_i per class.
        guarantee: "auto" (verified up to 4096, and above where that takes a second or two, else probabilistic at 1e-9),
            "verified", "probabilistic", "estimate".
        seed: for the random start vectors of probabilistic norms.
        memory: None, or a budget of the proofs in bytes ("2GB", "500 MB", "1.5GiB", an int), for norm 2. With "auto" a
            block of any size is verified if its proof fits (dense or banded Cholesky, at most 5e12 operations); if not,
            Golub-Kahan takes as many steps as fit. With "verified" a block without a fitting proof is an error, unless
            it is a single convolution, which gets a slightly larger Fourier bound. Parts and notes report the choices.
            The budget covers the arrays of one proof, but not Python, JAX, the network and its steps as matrices.
        device: where large proofs are computed: "auto" (on a GPU where JAX has one by default), "cpu" or "gpu".
        progress: True reports long computations on stderr, False is silent; a function receives each line of text.

    Raises:
        TypeError: not a form, or a form that is being traced (use `lb.liplt.core`).
        ValueError: an unknown option, a scaling in another norm than 2, with a memory budget or for a network that
            is too large (a scaling keeps all blocks), an invalid or too small memory.

    Source: Fazlyab et al., Certified robustness via dynamic margin maximization and improved Lipschitz regularization,
    NeurIPS 2023, arXiv 2310.00116, Theorems 3.2 and 3.3.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> round(lb.liplt(form).value, 6)
        3.0
    """
    started = time.perf_counter()
    p: float = check(form, norm, guarantee, "liplt")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling must be one of None, 'aol', 'sll', 'optimized', got {scaling!r}")
    if scaling is not None and p != 2:
        raise ValueError("scalings of LipLT apply to norm=2 only; use scaling=None in other norms")
    if scaling is not None and guarantee in ("estimate", "probabilistic"):
        raise ValueError(f"scaled blocks are stored and verified; guarantee={guarantee!r} needs scaling=None")
    method = "liplt" if scaling is None else f"liplt-{scaling}"
    budget = budget_of(memory, p, guarantee)
    if budget is not None and scaling is not None:
        raise ValueError("a scaling keeps all blocks in memory: leave memory out, or use scaling=None")
    if pairwise:
        check_pairs(form.num_outputs, budget)
    request = Request(p, guarantee if guarantee != "estimate" else "auto", seed, budget=budget)

    def bound() -> Triangle:
        half = replace(request, failure=request.failure / 2)
        centred = recursion.triangle(form, half, pairwise=pairwise, centred=True)
        if recursion.surely_above(form, half, centred):
            return replace(centred, failure=2 * centred.failure)
        return recursion.smaller(recursion.triangle(form, half, pairwise=pairwise, centred=False), centred)

    if guarantee == "estimate":
        return estimate(form, liplt.core, p, pairwise, seed, method, started, bound)
    best = bound()
    if scaling is not None:
        for result in _scaled_bounds(form, scaling, request, pairwise):
            best = recursion.smaller(best, result)
    return finish(form, best, p, method, started, budget)


def _scaled_bounds(form: LureForm, scaling: str, request: Request, pairwise: bool) -> list[Triangle]:
    scalings = recursion.loop_transform(form, 2, centred=True, live=True)
    results = []
    for nodes in recursion.partitions(form):
        blocks = _scaling.stored_blocks(form, nodes, scalings)
        rules = [scaling] if scaling != "optimized" else ["aol", "sll"]
        starts = [_scaling.factors(form, nodes, blocks, rule) for rule in rules]
        proved = [_scaling.run(form, nodes, scalings, blocks, f, request, pairwise=pairwise) for f in starts]
        results += proved
        if scaling == "optimized":
            ones = {n: np.ones(sum(form.taps[k].size_out for k in n)) for n in nodes}
            plain = _scaling.run(form, nodes, scalings, blocks, ones, request, pairwise=pairwise)
            starts, proved = [ones, *starts], [plain, *proved]
            start = starts[int(np.argmin([p.value for p in proved]))]
            f = _scaling.optimize(form, nodes, blocks, start)
            results.append(_scaling.run(form, nodes, scalings, blocks, f, request, pairwise=pairwise))
    return results


def or_naive(form: LureForm, **options: Any) -> UpperBound | Estimate:
    """LipLT's bound, or the product of norms with a note where LipLT fails; LipLT's error where both do."""
    try:
        return liplt(form, **options)
    except FAILURES as failure:
        try:
            made = naive(form, **options)
        except FAILURES:
            raise failure from None
        note = f"LipLT failed: {reason(failure)}; this is the product of norms"
        return replace(made, notes=(note, *made.notes))
