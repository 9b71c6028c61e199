"""The gain of a form as one dense float64 matrix, by `jax.vmap` over unit vectors through `lure.propagate`.

Nothing of linmap is used here, so it can be an oracle for the blocks that linmap multiplies on the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from zoo import NETS

import lipbounds as lb
from lipbounds._form.lure import LureForm, propagate
from lipbounds._gain.blocks import Node, TapScaling
from lipbounds._tracing.jaxpr import flatten
from lipbounds._tracing.lowering import lower


@functools.cache
def form_of(name: str) -> LureForm:
    """The form of a zoo net (seed 0), traced once per test run."""
    net = NETS[name]
    fn, x = net.make(0)
    return lb.trace(fn, x, batched=net.batched)


def lowered(fn: Callable[[Any], Any], shape: tuple[int, ...], dtype: Any = jnp.float32) -> LureForm:
    """The form without the checks of `lb.trace` at random points, which take time and refuse what loses its digits."""
    flat = flatten(lambda _, x: jnp.ravel(fn(x)), (), jax.ShapeDtypeStruct(shape, dtype))
    return LureForm(*lower(flat)[:3])


def dense(matrix: Any) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def random_scalings(form: LureForm, seed: int, *, centred: bool = True) -> tuple[TapScaling, ...]:
    """Arbitrary centres, source and target factors: blocks are right for any of them, not only for slopes."""
    rng = np.random.default_rng(seed)
    return tuple(
        TapScaling(
            rng.normal(size=tap.size_out) if centred and tap.groups is None else None,
            rng.uniform(0.5, 2.0, tap.size_out),
            rng.uniform(0.5, 2.0, tap.size_in),
        )
        for tap in form.taps
    )


def dense_gain(form: LureForm, scalings: tuple[TapScaling, ...]) -> dict[tuple[Node, Node], np.ndarray]:
    """{(source, target): G[target, source]} for single taps, the input and the output, zero blocks included."""
    taps = form.taps
    sizes = [form.in_size, *(tap.size_out for tap in taps)]
    starts = np.cumsum([0, *sizes])

    def gain(u: jax.Array) -> tuple[jax.Array, ...]:
        seen = []

        def tap(k: int, y: Any) -> Any:
            y = jnp.zeros(taps[k].size_in, u.dtype) if y is None else y
            seen.append(jnp.asarray(scalings[k].e) * y)
            c = scalings[k].c
            w = jnp.asarray(scalings[k].q) * u[starts[k + 1] : starts[k + 2]]
            return w if c is None else jnp.asarray(c) * y + w

        z = propagate(form, u[: sizes[0]], tap, dtype=u.dtype)
        return (*seen, jnp.zeros(form.num_outputs, u.dtype) if z is None else z)

    with jax.enable_x64(True):
        columns = jax.jit(jax.vmap(gain))(jnp.eye(int(starts[-1])))
        whole = [np.asarray(c, np.float64).T for c in columns]
    sources: list[Node] = [(), *((k,) for k in range(len(taps)))]
    targets: list[Node] = [*((k,) for k in range(len(taps))), ()]
    return {
        (source, target): rows[:, starts[i] : starts[i + 1]]
        for target, rows in zip(targets, whole, strict=True)
        for i, source in enumerate(sources)
    }
