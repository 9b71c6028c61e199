"""The naive bound: the triangle recursion with centre 0."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from lipbounds._form.lure import LureForm, fingerprint
from lipbounds._gain import memory_budget
from lipbounds._text.device import Device
from lipbounds._text.progress import Progress
from lipbounds._triangle import recursion
from lipbounds._triangle.core import Core, run_core
from lipbounds._triangle.recursion import Request, Triangle
from lipbounds._triangle.verb import budget_of, check, with_core
from lipbounds.results import Estimate, Guarantee, Norm, UpperBound

_ESTIMATE_STEPS = 50


def estimate(
    form: LureForm,
    core: Core,
    norm: Any,
    pairwise: bool,
    seed: int,
    method: str,
    started: float,
    fallback: Any,
) -> Estimate:
    """The core's result as an Estimate; in norms 1 and inf, which are cheap to compute, the bound itself.

    Computed in float32 if the weights are moderate, else in float64; the bound itself if the result is 0 or not finite.
    """
    notes = ("norms 1 and inf are computed exactly even in estimate mode",)
    constants: list[Any] | None = None
    if norm == 2 and not pairwise and form.num_outputs > recursion.DENSE_LIMIT:
        notes = (
            f"an estimate needs Gram matrices of all {form.num_outputs} outputs: this is the bound itself",
        )
    elif norm == 2:
        dtype = np.float32 if _moderate(form) else np.float64
        wide = jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()
        with wide:
            found = run_core(core, form, jax.random.key(seed), _ESTIMATE_STEPS, pairwise, dtype)
            constants = [None if c is None else np.asarray(c, np.float64) for c in found]
        notes = (f"{_ESTIMATE_STEPS} power iterations per block: neither an upper nor a lower bound",)
        if not (constants[0] > 0 and all(c is None or np.isfinite(c).all() for c in constants)):
            notes = ("the power iteration vanishes or leaves the range of float64: this is the bound itself",)
            constants = None
    if constants is None:
        result = fallback()
        constants = [result.value, result.per_class, result.pairwise]
    value, classes, pairs = constants
    return Estimate(
        value=float(value),
        norm=norm,
        guarantee="estimate",
        method=method,
        seconds=time.perf_counter() - started,
        pairwise=pairs,
        per_class=classes,
        notes=(*notes, *form.notes),
    )


def _moderate(form: LureForm) -> bool:
    """Whether float32 holds every product of constants of the form, some of its digits included."""
    floats = [c for c in map(np.asarray, form.consts) if c.size and np.issubdtype(c.dtype, np.floating)]
    return sum(abs(float(np.log2(np.abs(c[c != 0]).max(initial=1.0)))) for c in floats) < 60


def finish(
    form: LureForm,
    result: Triangle,
    norm: Any,
    method: str,
    started: float,
    budget: memory_budget.Budget | None = None,
) -> UpperBound:
    return UpperBound(
        value=result.value,
        norm=norm,
        guarantee=result.guarantee,
        method=method,
        seconds=time.perf_counter() - started,
        pairwise=result.pairwise,
        per_class=result.per_class,
        parts=result.parts,
        failure_probability=result.failure,
        notes=(*(() if budget is None else budget.notes(recursion.host_form(form))), *form.notes),
        network=fingerprint(form),
    )


@with_core(Core(centred=False))
def naive(
    form: LureForm,
    *,
    norm: Norm = 2,
    pairwise: bool = False,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    memory: int | str | None = None,
    device: Device = "auto",
    progress: Progress = True,
) -> UpperBound | Estimate:
    """The naive Lipschitz bound: on a chain, the product of the layers' norms.

    m_k = sum_j ||G[k, j]|| m_j with centre 0 and radius max|slope|, so L <= m_out. On residual networks at most the
    textbook product of block bounds (CRM paper, eq. 13).

    Args:
        form: from `lb.trace` or `lb.from_weights`.
        norm: 2, 1 or inf; the constant is of the map from (R^n, norm) to (R^K, norm).
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
        TypeError: not a form, or a form that is being traced (use `lb.naive.core`).
        ValueError: an unknown norm or guarantee, an invalid or too small memory.

    Source: the product of the norms of the layers (Szegedy et al., Intriguing properties of neural networks, ICLR 2014,
    section 4.3), here over every path of a network.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> bound = lb.naive(form)
        >>> round(bound.value, 6), bound.guarantee
        (4.0, 'verified')
    """
    started = time.perf_counter()
    p: float = check(form, norm, guarantee, "naive")
    budget = budget_of(memory, p, guarantee)
    if pairwise:
        memory_budget.check_pairs(form.num_outputs, budget)
    request = Request(p, guarantee if guarantee != "estimate" else "auto", seed, budget=budget)

    def bound() -> Triangle:
        # LipLT gives the same share to these norms and takes the smaller bound, so it is never above this one.
        half = replace(request, failure=request.failure / 2)
        found = recursion.triangle(form, half, pairwise=pairwise, centred=False)
        return replace(found, failure=2 * found.failure)

    if guarantee == "estimate":
        return estimate(form, naive.core, p, pairwise, seed, "naive", started, bound)
    return finish(form, bound(), p, "naive", started, budget)
