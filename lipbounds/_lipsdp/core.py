"""The jit-able core of LipSDP for training: constants and multipliers improve together, step after step.

The recursion of `ellipsoid` on a form whose constants may be tracers, in float32 or float64, written so that a layer
costs two Cholesky factors and a few products. Estimates only, nothing is proved; yet every D used is feasible in float
arithmetic, so up to rounding the constants are not below LipSDP's optimum.

Measured on digits (64-64-64-10, CRM loss, 800 steps of Adam, batch 256): mean radius proved by `lb.lipsdp` 0.605 with
LipLT's core in the loss, 0.639 with this one and steps=1, 0.637 with the multipliers trained with the weights
(steps=0), which needs one forward and backward pass less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lipbounds._form.batched_steps import einsum, product
from lipbounds._form.lure import LureForm
from lipbounds._form.program import Program
from lipbounds._lipsdp import ellipsoid, recursion_step
from lipbounds._lipsdp.core_states import Run, Stage, ratio, stages
from lipbounds._lipsdp.state_matrices import TAIL, first_tap, split
from lipbounds._norms import factorised
from lipbounds._text.settings import debugging_off
from lipbounds._triangle import core
from lipbounds._triangle.core import Constants
from lipbounds._triangle.output_rows import row_grams

_RATE = 0.05
_SHARPNESS = 6  # squarings of the smoothed objective that the multipliers descend on
_FURTHEST = 20.0  # |log| of a multiplier over the size of its ellipsoid
_MARGIN = 0.1  # relative distance from the edge of feasibility that multipliers keep,
_BESIDE = 0.25  # times this where something passes the tap
_TIGHT = 9  # squarings of that edge
_BLOCK = 64  # side of the blocks that LAPACK factorises
_LEAST = 0.02  # |c| / r of the closed-form start is at least this


class LipSdpState(NamedTuple):
    """Multipliers and what they are improved with; a pytree of arrays.

    Args:
        multipliers: per run of stages of one shape q = log(D / ||Sy||_F), (n,) or (stages, n). Differentiable: with
            `steps=0` they may be trained like weights.
        moments: of Adam.
        front: state of LipLT's core, where the ellipsoid starts behind the input.
        last: the last constants that were finite.
        failed: whether the last call met numbers that are not finite and returned `last`.
    """

    multipliers: Any
    moments: Any
    front: Any
    last: Constants
    failed: jax.Array


@dataclass(frozen=True)
class LipSdpCore:
    """The jit-able core of `lipsdp`: `core(form, state) -> (Constants, state)`; `core.init(form, key) -> state`.

    Works on tracers, under jit, grad and vmap; l2 norm; computes in the dtype of the state (float32 or float64).
    """

    @debugging_off()
    def init(self, form: LureForm, key: Any, dtype: Any = jnp.float32) -> LipSdpState:
        """Multipliers to start from: one D per tap in closed form, of LipLT's size. `key` seeds LipLT's part.

        The closed form is that of the given weights; where they are not finite D = 2 ||Sy||_F.
        """
        front: Any = ()
        place = _first_tap(form.program, TAIL)
        if place:
            front = _FRONT.init(split(form, place)[0], key, dtype)
        k = form.num_outputs
        sigma, exponent, runs, _, good = _prepare(form, front, place, dtype)
        passed = _recursion(sigma, exponent, runs, None)
        multipliers = jax.lax.stop_gradient(_or_default(good, passed.parameters))
        last = Constants(jnp.zeros((), dtype), jnp.zeros(k, dtype), jnp.zeros((k, k), dtype))
        return LipSdpState(multipliers, _optimiser().init(multipliers), front, last, jnp.zeros((), bool))

    @debugging_off()
    def __call__(
        self, form: LureForm, state: LipSdpState, *, steps: int = 1, pairwise: bool = False
    ) -> tuple[Constants, LipSdpState]:
        """Estimated constants, and the state for the next call.

        The multipliers first take `steps` steps of Adam, on the mean of log L_ij if `pairwise`, else on L; they are
        then constants for the gradient (Danskin). With steps=0 the gradient reaches `state.multipliers` too, so they
        can be trained with the weights in one backward pass. A D that is not feasible for the weights, or hardly, is
        enlarged. Where a number is not finite the last finite constants are returned without gradient, multipliers that
        fail on finite weights begin anew, and `state.failed` says so.
        """
        dtype = state.last.value.dtype
        place = _first_tap(form.program, TAIL)
        sigma, exponent, runs, front, good = _prepare(form, state.front, place, dtype)
        frozen = jax.lax.stop_gradient((sigma, [run.stage for run in runs]))
        kind = "pairs" if pairwise and form.num_outputs > 1 else "value"
        weights = 1 - jnp.eye(form.num_outputs, dtype=dtype)

        def loss(multipliers: Any) -> jax.Array:
            still = [Run(s, run.count, run.slopes) for s, run in zip(frozen[1], runs, strict=True)]
            passed = _recursion(frozen[0], jnp.zeros((), dtype), still, multipliers)
            return ellipsoid.objective(
                passed.sigma, passed.exponent, ellipsoid.KINDS.index(kind), weights, _SHARPNESS
            )

        def improve(carry: Any, _: None) -> tuple[Any, None]:
            multipliers, moments = carry
            grads = jax.grad(loss)(multipliers)
            grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
            with jax.numpy_dtype_promotion("standard"):
                updates, moments = _optimiser().update(grads, moments, multipliers)
            multipliers = jax.tree.map(
                lambda a, u: jnp.clip(a + u.astype(a.dtype), -_FURTHEST, _FURTHEST), multipliers, updates
            )
            return (multipliers, moments), None

        multipliers, moments = state.multipliers, state.moments
        if steps:
            begin = jax.lax.stop_gradient((multipliers, moments))
            (multipliers, moments), _ = jax.lax.scan(improve, begin, None, length=steps)
            multipliers = jax.lax.stop_gradient(multipliers)
        passed = _recursion(sigma, exponent, runs, multipliers)
        constants = _constants(passed)
        fine = good & _finite((passed.sigma, constants), dtype)
        constants = jax.tree.map(lambda a, b: jnp.where(fine, a, b), constants, state.last)
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), (multipliers, moments), state[:2])
        kept = (_or_default(fine | ~good, kept[0]), kept[1])
        new = jax.lax.stop_gradient(LipSdpState(*kept, front, constants, ~fine))
        return constants if pairwise else constants._replace(per_class=None, pairwise=None), new


@partial(jax.jit, static_argnames="dtype")
def _relative(form: LureForm, front: Any, multipliers: Any, dtype: Any) -> tuple[Any, ...]:
    sigma, exponent, runs, _, _ = _prepare(form, front, _first_tap(form.program, TAIL), dtype)
    return _recursion(sigma, exponent, runs, multipliers).relative


def relative_multipliers(form: LureForm, state: LipSdpState) -> list[np.ndarray]:
    """D_i / (Sy)_ii of every tap of the recursion, as the core uses them for concrete weights and this state.

    ValueError for multipliers of another network, or such that are not finite.
    """
    leaves = jax.tree.leaves(state.multipliers)
    dtype = jnp.result_type(*leaves) if leaves else jnp.dtype(jnp.float32)
    with jax.enable_x64(dtype == jnp.float64), jax.numpy_dtype_promotion("standard"):
        try:
            found = _relative(form, state.front, tuple(jnp.asarray(q) for q in state.multipliers), dtype)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                "these multipliers belong to another network: take the state of lb.lipsdp.core for this form"
            ) from error
    rows: list[np.ndarray] = []
    for d in found:
        d = np.asarray(d, np.float64)
        rows += [d] if d.ndim == 1 else list(d)
    if not all(np.isfinite(row).all() for row in rows):
        raise ValueError("the multipliers of this state are not finite, or not for these weights")
    return rows


# --- the beginning -------------------------------------------------------------------------------------------------


class _Front(core.Core):
    """LipLT's core with an ellipsoid of its outputs in the place of the pairs.

    With z = sum_i B_i w_i, |w_i| <= m_i |dx|:  z z' <= sum_i (m_i^2 / a_i) B_i B_i' for a_i > 0 with sum 1; here a_i is
    in proportion to m_i ||B_i||, so that lambda_max is LipLT's square.
    """

    @staticmethod
    def _outputs(form: Any, layout: Any, scalings: Any, reach: Any, state: Any, steps: int) -> Any:
        count, dtype = form.num_outputs, reach.dtype
        grams = row_grams(form, layout.sources, scalings, dtype)
        if not grams:
            return jnp.zeros((), dtype), None, jnp.zeros((count, count), dtype), ()
        whole = jnp.stack([gram.whole for gram in grams])
        weight = jnp.stack([gram.scale for gram in grams]) * reach[1 + np.array(layout.sources)]
        norms = jnp.sqrt(jnp.maximum(jax.vmap(lambda m: recursion_step.top(m, _SHARPNESS))(whole), 1e-30))
        norms = weight * norms
        total = jnp.sum(norms)
        share = jnp.where(norms > 0, norms, 1)
        sigma = einsum("s,sij->ij", jnp.where(norms > 0, jnp.square(weight) * total / share, 0), whole)
        return total, None, sigma, state.rows


_FRONT = _Front(centred=True)


@lru_cache(maxsize=256)
def _first_tap(program: Program, widest: int) -> int:
    return first_tap(LureForm(program, (), ((),) * len(program.taps)), widest)


def _prepare(
    form: LureForm, front_state: Any, place: int, dtype: Any
) -> tuple[jax.Array, jax.Array, list[Run], Any, jax.Array]:
    """(Sigma_0, exponent, runs, state of the front, whether all is finite); zeros where not all is finite."""
    read = form.program.coefficients
    weights = [form.consts[i] for i in sorted(read) if jnp.issubdtype(form.consts[i].dtype, jnp.inexact)]
    good = _finite((weights, form.slopes), dtype)
    consts = tuple(
        jnp.where(good, c, jnp.zeros_like(c)) if i in read else c for i, c in enumerate(form.consts)
    )
    form = LureForm(form.program, consts, form.slopes)
    reach = None
    if place:
        front, form = split(form, place)
        found, front_state = _FRONT(front, front_state, pairwise=True)
        reach = found.pairwise
    start, runs = stages(form, dtype)
    start, exponent = _near_one(start)
    if reach is None:
        sigma = _gram(start)
    else:
        reach, shift = recursion_step.rescale(reach)
        sigma, exponent = product(product(start, reach), start.T), exponent + shift / 2
    good = good & _finite((sigma, [run.stage for run in runs]), dtype)
    sigma = jnp.where(good, sigma, 0)
    runs = [
        Run(jax.tree.map(lambda a: jnp.where(good, a, 0), run.stage), run.count, run.slopes) for run in runs
    ]
    return sigma, 2 * exponent, runs, front_state, good


@jax.custom_vjp
def _gram(m: jax.Array) -> jax.Array:
    """m m', with one product for its gradient."""
    return product(m, m.T)


_gram.defvjp(lambda m: (_gram(m), m), lambda m, g: (product(g + g.T, m),))


def _finite(tree: Any, dtype: Any) -> jax.Array:
    """Whether all numbers are finite in `dtype`, that of the state: outside of x64 JAX warns where float64 is used."""
    # Infinity and NaN times 0 is NaN; sums of numbers are quicker on a CPU than conjunctions of booleans.
    numbers = (jax.lax.stop_gradient(jnp.asarray(leaf, dtype)) for leaf in jax.tree.leaves(tree))
    leaves = [jnp.sum(0 * number) for number in numbers]
    return jnp.stack([jnp.isfinite(leaf) for leaf in leaves]).all() if leaves else jnp.ones((), bool)


def _or_default(good: jax.Array, multipliers: Any) -> Any:
    """D = 2 ||Sy||_F, always feasible, where the multipliers are no good."""
    return jax.tree.map(
        lambda a: jnp.where(good & jnp.isfinite(a), a, math.log(2)).astype(a.dtype), multipliers
    )


# --- the recursion -------------------------------------------------------------------------------------------------


class _Passed(NamedTuple):
    sigma: jax.Array  # times 2^exponent
    exponent: jax.Array
    parameters: tuple[Any, ...]
    relative: tuple[Any, ...]  # D_i / (Sy)_ii


def _recursion(sigma: jax.Array, exponent: jax.Array, runs: list[Run], parameters: Any) -> _Passed:
    """All stages from Sigma_0, with the given multipliers or those of the closed form (None)."""
    shifted, shift = recursion_step.rescale(sigma)
    carry = (shifted, exponent + shift)
    used = []
    for place, run in enumerate(runs):

        def step(carry: Any, item: Any, slopes: str = run.slopes) -> tuple[Any, Any]:
            sigma, exponent = carry
            stage, q = item
            sigma, up, q, relative = _through(sigma, stage, q, slopes)
            sigma, shift = recursion_step.rescale(sigma)
            return (sigma, exponent + up + shift), (q, relative)

        q = None if parameters is None else parameters[place]
        if run.count > 1:
            carry, pair = jax.lax.scan(step, carry, (run.stage, q))
        else:
            carry, pair = step(carry, (run.stage, q))
        used.append(pair)
    return _Passed(carry[0], carry[1], tuple(q for q, _ in used), tuple(d for _, d in used))


def _through(sigma: jax.Array, stage: Stage, q: Any, slopes: str) -> tuple[jax.Array, ...]:
    """(Sigma+ / 2^e, e, q, D_i / (Sy)_ii) behind one tap.

    With H = 0: Sigma+ = G (c X c + r D r) G',   X = Sy + Sy (D - Sy)^-1 Sy = D (D - Sy)^-1 D - D
    """
    kappa = ratio(stage)
    sy, c, r = sigma, stage.c, stage.r
    G, up = _near_one(stage.G)
    y_state, wide = sigma, jnp.zeros((), sigma.dtype)
    if stage.W is not None:
        W, wide = _near_one(stage.W)
        y_state = product(W, sigma)
        sy = product(y_state, W.T)
    # A neuron that cannot move has w = 0, and so has every neuron where nothing moves.
    moves = jnp.diagonal(jax.lax.stop_gradient(sy)) > 0
    c, r = jnp.where(moves, c, 0), jnp.where(moves, r, 0)
    d, factor, q = _feasible(sy, q, kappa, stage.H is None)
    if stage.H is None:
        up = up + wide
        if slopes == "any":
            cross = product(sy * c, G.T)
            new = product(cross.T * c + G * (r * r * d), G.T)
        else:
            cross = (d * c)[:, None] * G.T
            new = jnp.zeros((len(G), len(G)), G.dtype)
            if slopes != "zero":
                new = product(G * ((r * r - c * c) * d), G.T)
    else:
        A = stage.H + (stage.G * c if stage.W is None else product(stage.G * c, stage.W))
        B = stage.G * (r * jnp.exp2(wide))  # y is counted in units of 2^wide, so w is too
        size = jax.lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(A)), jnp.max(jnp.abs(B))))
        shrink, up = _power_of_two(size)
        A, B = A * shrink, B * shrink
        cross = product(y_state, A.T)
        new = product(product(A, sigma), A.T) + product(B * d, B.T)
    new = _schur(factor, d, sy, cross) + new
    own = jax.lax.stop_gradient(jnp.diagonal(sy))
    relative = jax.lax.stop_gradient(d) / jnp.maximum(own, jnp.maximum(jnp.max(own) * 1e-20, 1e-30))
    return (new + new.T) / 2, 2 * up, q, relative


def _feasible(sy: jax.Array, q: Any, kappa: jax.Array, alone: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(D, L^-1, q) with D - Sy = L L' and D = ||Sy||_F exp(q), or its least multiple that is feasible.

    It stays inside the feasible set by a margin (continuous in q), as at the edge (D - Sy)^-1 and its gradient would
    ruin a training step. Without q the closed form D = lambda_max(Sy) (1 + |c| / r), the best for one neuron alone.
    `alone`: nothing passes the tap (H = 0).
    """
    still = jax.lax.stop_gradient(sy)
    square = jnp.sum(jnp.square(sy))
    size = jnp.sqrt(jnp.where(square > 0, square, 1))
    if q is None:
        mu = jnp.where(square > 0, recursion_step.top(still, _SHARPNESS), 1)
        q = jnp.log(mu / size * (1 + jnp.maximum(kappa, _LEAST)))
    q = jnp.clip(q, -_FURTHEST, _FURTHEST)
    d = size * jnp.exp(q)
    # Where (D - Sy)^-1 is hardly felt (c = 0 and nothing beside the tap) the best D lies at the edge.
    share = jnp.clip(kappa, 1e-3, 1) if alone else jnp.asarray(_BESIDE, d.dtype)
    nearest = d / (1 + _MARGIN * share)

    def moved() -> jax.Array:
        half = jax.lax.rsqrt(nearest)
        return d * recursion_step.top(half[:, None] * sy * half, _TIGHT)

    at_edge, _ = _inverse_factor(jnp.diag(jax.lax.stop_gradient(nearest)) - still)
    safe = jnp.isfinite(jnp.diagonal(at_edge)).all()
    d = jax.lax.cond(safe, lambda: d, moved)
    return d, _inverse_factor(jnp.diag(jax.lax.stop_gradient(d)) - still)[1], q


def _inverse_factor(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(L, L^-1) with m = L L', by blocks: almost all of it is products, which are quicker than LAPACK's solves."""
    n = m.shape[0]
    if n <= _BLOCK:
        factor = factorised.cholesky(m)
        return factor, factorised.solve_lower(factor, jnp.eye(n, dtype=m.dtype))
    half = n // 2
    first, inverse = _inverse_factor(m[:half, :half])
    below = product(m[half:, :half], inverse.T)
    last, after = _inverse_factor(m[half:, half:] - product(below, below.T))
    corner = -product(after, product(below, inverse))
    zero = jnp.zeros((half, n - half), m.dtype)
    return jnp.block([[first, zero], [below, last]]), jnp.block([[inverse, zero], [corner, after]])


@jax.custom_vjp
def _schur(inverse: jax.Array, d: jax.Array, sy: jax.Array, cross: jax.Array) -> jax.Array:
    """cross' (D - Sy)^-1 cross, given the inverse of the Cholesky factor of D - Sy."""
    return _schur_forward(inverse, d, sy, cross)[0]


def _schur_forward(
    inverse: Any, d: Any, sy: Any, cross: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    z = product(inverse, cross)
    return product(z.T, z), (inverse, z)


def _schur_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    inverse, z = saved
    v = product(inverse.T, z)  # (D - Sy)^-1 cross
    pulled = product(v, g + g.T)
    return jnp.zeros_like(inverse), -jnp.sum(pulled * v, axis=1) / 2, product(pulled, v.T) / 2, pulled


_schur.defvjp(_schur_forward, _schur_backward)


def _power_of_two(size: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(2^-e, e) with 2^-e size near 1."""
    _, exponent = jnp.frexp(jnp.where(jnp.isfinite(size) & (size > 0), size, 1))
    return jnp.ldexp(jnp.ones((), size.dtype), -exponent), exponent.astype(size.dtype)


def _near_one(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(m / 2^e, e), so that squares neither overflow nor vanish."""
    factor, exponent = _power_of_two(jnp.max(jnp.abs(jax.lax.stop_gradient(m)), initial=0.0))
    return m * factor, exponent


def _constants(passed: _Passed) -> Constants:
    sigma = passed.sigma
    scale = jnp.exp2(passed.exponent / 2)
    vector = factorised.eigenvectors(jax.lax.stop_gradient(sigma))[:, -1]
    value = core.root(product(vector, product(sigma, vector)))
    classes, pairs = core.root(jnp.diagonal(sigma)), core.symmetric(core.distances(sigma))
    return Constants(scale * value, scale * classes, scale * pairs)


def _optimiser() -> Any:
    return optax.adam(_RATE)
