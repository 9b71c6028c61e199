"""The jit-able core of LipSDP for training: constants and multipliers improve together, step after step.

The recursion of `ellipsoid` on a form whose constants may be tracers, in float32 or float64. Estimates only: nothing is
proved, but no iteration has to converge either: every multiplier is feasible by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lipbounds import _cores, ellipsoid
from lipbounds._cores import Constants
from lipbounds._program import Program
from lipbounds._sequence import WIDEST, first_tap, split
from lipbounds._views import elementwise_view
from lipbounds.ellipsoid import Tap
from lipbounds.lure import LureForm, advance, flat_slopes, state_sequence

_RATE = 0.05
_POWER = 64.0  # of the smoothed objective that the multipliers descend on
_THINNEST = 1e-6  # radius relative to the centre below which a neuron counts as this wide


class LipSdpState(NamedTuple):
    """Multipliers and what they are improved with; a pytree of arrays.

    Args:
        multipliers: (q, s) per run of taps (`ellipsoid.multiplier`). Differentiable: with `steps=0` they may be trained
            like weights.
        moments: of Adam.
        front: state of LipLT's core, where the ellipsoid starts behind the input.
        last: the last constants that were finite.
        failed: whether the last call had to fall back: multipliers that were not feasible in this precision, or weights
            that are not finite.
    """

    multipliers: Any
    moments: Any
    front: Any
    last: Constants
    failed: jax.Array


@lru_cache(maxsize=256)
def _first_tap(program: Program, widest: int) -> int:
    return first_tap(LureForm(program, (), ((),) * len(program.taps)), widest)


def states(form: LureForm, dtype: Any) -> tuple[jax.Array, list[Tap]]:
    """(A_0, taps) of the elementwise view of a form, differentiable in its constants."""
    view = elementwise_view(form)
    shapes = view.program.shapes
    cuts = state_sequence(view.program)

    def parts(registers: tuple[int, ...], flat: jax.Array) -> list[jax.Array]:
        ends = np.cumsum([int(np.prod(shapes[r])) for r in registers])[:-1]
        return [piece.reshape(shapes[r]) for piece, r in zip(jnp.split(flat, ends), registers, strict=True)]

    def joined(registers: tuple[int, ...], values: list[Any]) -> jax.Array:
        return jnp.concatenate(
            [
                (jnp.zeros(shapes[r], dtype) if v is None else v).ravel()
                for v, r in zip(values, registers, strict=True)
            ]
        )

    def first(x: jax.Array) -> jax.Array:
        return joined(cuts[0].registers, advance(view, -1, parts((0,), x), None, dtype=dtype)[1])

    start = jax.vmap(first, out_axes=1)(jnp.eye(view.in_size, dtype=dtype))
    taps = []
    for k, tap in enumerate(view.taps):
        here, there = cuts[k].registers, cuts[k + 1].registers

        def from_state(s: jax.Array, k: int = k, here: Any = here, there: Any = there) -> Any:
            y, values = advance(view, k, parts(here, s), None, dtype=dtype)
            y = jnp.zeros(view.taps[k].size_in, dtype) if y is None else y
            return y, joined(there, values)

        def from_tap(v: jax.Array, k: int = k, there: Any = there) -> jax.Array:
            return joined(there, advance(view, k, None, v, dtype=dtype)[1])

        width = cuts[k].width
        w, h = jax.vmap(from_state, out_axes=1)(jnp.eye(width, dtype=dtype))
        g = jax.vmap(from_tap, out_axes=1)(jnp.eye(tap.size_out, dtype=dtype))
        lower, upper = (jnp.asarray(a).astype(dtype) for a in flat_slopes(view, k))
        c, r = (lower + upper) / 2, (upper - lower) / 2
        size = jax.lax.stop_gradient(jnp.abs(c))
        kappa = jnp.maximum(size / jnp.maximum(jax.lax.stop_gradient(r), _THINNEST * size + 1e-30), 1)
        taps.append(Tap(h + (g * c) @ w, g * r, w, kappa))
    return start, taps


def _grouped(taps: list[Tap]) -> list[Any]:
    return [
        group[0] if len(group) == 1 else Tap(*(jnp.stack(a) for a in zip(*group, strict=True)))
        for group in ellipsoid.group(taps)
    ]


@dataclass(frozen=True)
class LipSdpCore:
    """The jit-able core of `lipsdp`: `core(form, state) -> (Constants, state)`; `core.init(form, key) -> state`.

    Works on tracers, under jit, grad and vmap; l2 norm; computes in the dtype of the state (float32 or float64).
    """

    def init(self, form: LureForm, key: Any, dtype: Any = jnp.float32) -> LipSdpState:
        """Multipliers to start from: the closed form D = 2 mu (for ReLU). `key` seeds LipLT's part, if there is one."""
        place = _first_tap(form.program, WIDEST)
        front: Any = ()
        if place:
            before, form = split(form, place)
            front = _cores.Core(centred=True).init(before, key, dtype)
        view = elementwise_view(form)
        sizes = [Tap(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)) for shapes in _tap_shapes(view)]
        multipliers = tuple(
            tuple(jnp.zeros((*((len(g),) if len(g) > 1 else ()), g[0].kappa.shape[0]), dtype) for _ in "qs")
            for g in ellipsoid.group(sizes)
        )
        k = form.num_outputs
        last = Constants(jnp.zeros((), dtype), jnp.zeros(k, dtype), jnp.zeros((k, k), dtype))
        return LipSdpState(multipliers, _optimiser().init(multipliers), front, last, jnp.zeros((), bool))

    def __call__(
        self, form: LureForm, state: LipSdpState, *, steps: int = 1, pairwise: bool = False
    ) -> tuple[Constants, LipSdpState]:
        """Estimated constants, and the state for the next call.

        The multipliers first take `steps` steps of Adam, on the mean of log L_ij if `pairwise`, else on L; they are
        then constants for the gradient (Danskin). With steps=0 the gradient reaches `state.multipliers` too, so they
        can be trained with the weights in one backward pass. Where a number is not finite the last finite constants are
        returned without gradient, and `state.failed` says so.
        """
        dtype = state.last.value.dtype
        place = _first_tap(form.program, WIDEST)
        front_state = state.front
        reach = None
        if place:
            front, form = split(form, place)
            found, front_state = _cores.Core(centred=True)(front, state.front)
            reach = found.value
        start, taps = states(form, dtype)
        good = jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves((start, taps, reach))]).all()
        start, taps, reach = jax.tree.map(lambda a: jnp.where(good, a, 0), (start, taps, reach))
        sigma = start @ start.T if reach is None else jnp.square(reach) * (start @ start.T)
        runs = _grouped(taps)
        frozen = jax.lax.stop_gradient((sigma, runs))
        kind = "pairs" if pairwise and form.num_outputs > 1 else "value"
        weights = 1 - jnp.eye(form.num_outputs, dtype=dtype)

        def loss(multipliers: Any) -> jax.Array:
            passed = ellipsoid.run(*frozen, multipliers, None, guarded=True)
            return ellipsoid.objective(
                passed.sigma, passed.exponent, kind, weights, jnp.asarray(_POWER, dtype)
            )

        def improve(carry: Any, _: None) -> tuple[Any, None]:
            multipliers, moments = carry
            grads = jax.grad(loss)(multipliers)
            grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0), grads)
            with jax.numpy_dtype_promotion("standard"):
                updates, moments = _optimiser().update(grads, moments, multipliers)
            multipliers = jax.tree.map(lambda a, u: a + u.astype(a.dtype), multipliers, updates)
            return (multipliers, moments), None

        multipliers, moments = state.multipliers, state.moments
        if steps:
            begin = jax.lax.stop_gradient((multipliers, moments))
            (multipliers, moments), _ = jax.lax.scan(improve, begin, None, length=steps)
            multipliers = jax.lax.stop_gradient(multipliers)
        passed = ellipsoid.run(sigma, runs, multipliers, None, guarded=True)
        constants = _constants(passed, dtype)
        fine = good & jnp.isfinite(jax.lax.stop_gradient(constants.value))
        constants = jax.tree.map(lambda a, b: jnp.where(fine, a, b), constants, state.last)
        kept = jax.tree.map(
            lambda a, b: jnp.where(fine, a, b), (multipliers, moments), (state.multipliers, state.moments)
        )
        last = jax.lax.stop_gradient(constants)
        new = LipSdpState(*kept, front_state, last, ~(fine & passed.feasible))
        return constants if pairwise else constants._replace(per_class=None, pairwise=None), new


def _constants(passed: ellipsoid.Passed, dtype: Any) -> Constants:
    scale = jnp.exp(passed.exponent * jnp.asarray(np.log(2) / 2, dtype))
    value = _cores._root(ellipsoid.top(passed.sigma, jnp.asarray(1e12, dtype)))
    off = 1 - jnp.eye(passed.sigma.shape[0], dtype=dtype)
    pairs = _cores._root(ellipsoid.pair_squares(passed.sigma) * off)
    return Constants(scale * value, scale * _cores._root(jnp.diagonal(passed.sigma)), scale * pairs)


def _tap_shapes(view: LureForm) -> list[Any]:
    cuts = state_sequence(view.program)
    return [
        ((after.width, here.width), (after.width, tap.size_out), (tap.size_in, here.width), (tap.size_in,))
        for tap, here, after in zip(view.taps, cuts[:-1], cuts[1:], strict=True)
    ]


def _optimiser() -> Any:
    return optax.adam(_RATE)
