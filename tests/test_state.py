"""The state sequence: every network is y_k = W_k s_k, s_{k+1} = H_k s_k + G_k v_k between its taps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gain import form_of
from zoo_core import gauss

import lipbounds as lb
from lipbounds._form.lure import Arrays, LureForm, apply_tap, propagate, state_sequence
from lipbounds._form.program import Tap
from lipbounds._form.walk import walk

ZOO = [
    "linear", "relu", "two_branches", "dense_net", "shared_block", "u_net", "mlp_mixer", "max_min_of_branches",
    "maxmin_mlp", "group_sort", "max_pool_overlapping", "reshuffle", "homemade", "nan_guard",
    "scan_stacked", "preactivation_resnet",
]  # fmt: skip
Pair = tuple[jax.Array, jax.Array]


def advance(form: LureForm, k: int, state: Any, v: Any, *, dtype: Any) -> tuple[Any, list[Any]]:
    """(y_k, s_{k+1}) = (W_k s_k, H_k s_k + G_k v_k) on arrays, None for zero; k = -1 takes x to s_0."""
    cuts = state_sequence(form.program)
    first, names = (0, (0,)) if k < 0 else (cuts[k].step, cuts[k].registers)
    held = {} if state is None else {i: s for i, s in zip(names, state, strict=True) if s is not None}
    seen: list[Any] = [None]

    def tap(_: int, y: Any) -> Any:
        seen[0] = y
        return v

    walk(form.program, Arrays(form, tap, dtype), held, places=range(first, cuts[k + 1].step))
    return seen[0], [held.get(i) for i in cuts[k + 1].registers]


@functools.cache
def recorded(name: str) -> tuple[LureForm, list[Any], list[Any], Any, Any, Any]:
    """Differences of (pre-activations, tap outputs, input, output) between two points, in float64, and the run of the
    state recursion on the differences of the tap outputs."""
    form = form_of(name)

    def run(x: jax.Array) -> tuple[list[Any], list[Any], Any]:
        ys: list[Any] = []
        vs: list[Any] = []

        def tap(k: int, y: Any) -> Any:
            ys.append(y)
            vs.append(apply_tap(form.taps[k], form.consts, y))
            return vs[-1]

        z = propagate(form, x, tap, dtype=x.dtype, affine=True)
        return ys, vs, z

    def both(a: jax.Array, b: jax.Array) -> Any:
        ys, vs, dz = jax.tree.map(jnp.subtract, run(a), run(b))
        dx = (a - b).reshape(form.in_shape)
        _, state = advance(form, -1, [dx], None, dtype=a.dtype)
        states, outs = [state], []
        for k in range(len(form.taps)):
            y, state = advance(form, k, state, vs[k], dtype=a.dtype)
            outs.append(y)
            states.append(state)
        return ys, vs, dx, dz, (outs, states)

    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        a, b = (jnp.asarray(3 * rng.normal(size=form.in_size)) for _ in range(2))
        ys, vs, dx, dz, run_ = jax.jit(both)(a, b)
    return form, ys, vs, dx, dz, run_


def close(a: Any, b: Any) -> bool:
    a, b = np.asarray(a).ravel(), np.asarray(b).ravel()
    assert a.dtype == np.float64
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= 1e-12 * (1 + np.abs(b).max(initial=0)))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", ZOO)
def test_the_recursion_reproduces_the_differences_of_the_network(name: str) -> None:
    form, ys, _, _, dz, (outs, states) = recorded(name)
    cuts = state_sequence(form.program)
    assert len(cuts) == len(form.taps) + 1 == len(states)
    for k, y in enumerate(ys):
        assert np.abs(y).max() > 0
        assert close(outs[k], y), f"W_{k} s_{k} is not the difference of the pre-activations"
    for cut, state in zip(cuts, states, strict=True):
        assert [s.shape for s in state] == [form.program.shapes[r] for r in cut.registers]
    assert close(states[-1][0], dz) and len(states[-1]) == 1, "the last state is not the output"


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["dense_net", "max_min_of_branches", "u_net"])
def test_each_map_is_linear_and_uses_all_it_is_given(name: str) -> None:
    """advance(a s + b t, a v + b w) = a advance(s, v) + b advance(t, w); None is zero; y_k does not see v_k."""
    form = form_of(name)
    cuts, rng = state_sequence(form.program), np.random.default_rng(1)
    with jax.enable_x64(True):
        for k, tap in enumerate(form.taps):
            shapes = [form.program.shapes[r] for r in cuts[k].registers]
            s, t = ([jnp.asarray(rng.normal(size=n)) for n in shapes] for _ in range(2))
            v, w = (jnp.asarray(rng.normal(size=tap.size_out)) for _ in range(2))

            def step(s: Any, v: Any, k: int = k) -> list[Any]:
                y, state = advance(form, k, s, v, dtype=jnp.float64)
                return [None if a is None else np.asarray(a) for a in (y, *state)]

            whole = step([2 * a - b for a, b in zip(s, t, strict=True)], 2 * v - w)
            one, two = step(s, v), step(t, w)
            assert all(close(c, 2 * a - b) for a, b, c in zip(one, two, whole, strict=True))
            zeros = [jnp.zeros(n) for n in shapes]
            for with_none, with_zero in (
                (step(None, v), step(zeros, v)),
                (step(s, None), step(s, jnp.zeros(tap.size_out))),
            ):
                for a, b in zip(with_none, with_zero, strict=True):
                    assert not b.any() if a is None else close(a, b)
            assert close(step(s, v)[0], step(s, w)[0])
            assert any(not np.array_equal(a, b) for a, b in zip(step(s, v)[1:], step(s, w)[1:], strict=True))


def live(form: LureForm, place: int) -> set[int]:
    """Registers written before step `place` and read at or after it, by the definition."""
    program = form.program
    written, needed = {0}, {program.output}
    for i, step in enumerate(program.steps):
        if i < place:
            written.update(step.outputs)
        else:
            needed.update(j for j in step.inputs if j >= 0)
    return written & needed


@pytest.mark.parametrize("name", ZOO)
def test_cuts_lie_between_taps_and_are_the_narrowest_there(name: str) -> None:
    form = form_of(name)
    program, cuts = form.program, state_sequence(form.program)
    sizes = [int(np.prod(shape)) for shape in program.shapes]
    places = [i for i, step in enumerate(program.steps) if isinstance(step, Tap)]
    for cut, (low, high) in zip(cuts[:-1], itertools.pairwise([-1, *places]), strict=True):
        assert low < cut.step <= high
        assert set(cut.registers) == live(form, cut.step) and len(set(cut.registers)) == len(cut.registers)
        width = {p: sum(sizes[r] for r in live(form, p)) for p in range(low + 1, high + 1)}
        assert cut.width == width[cut.step] == min(width.values())
    assert cuts[-1].registers == (program.output,) and cuts[-1].width == form.num_outputs


def widths(fn: Callable[[Any], Any], n: int) -> list[int]:
    return [cut.width for cut in state_sequence(lb.trace(fn, jnp.ones(n)).program)]


@pytest.mark.slow
def test_widths_of_known_architectures(rng: np.random.Generator) -> None:
    """A chain's states are its layers (the narrower side of each matrix), a residual block adds its skip, parallel
    branches share what they read."""
    for sizes in ((9, 8, 7, 6, 5), (4, 5, 6, 7, 8), (6, 9, 3, 7, 4)):
        layers = [gauss(rng, b, a) for a, b in itertools.pairwise(sizes)]
        cuts = state_sequence(lb.from_weights([np.asarray(w) for w in layers], activation="relu").program)
        assert [cut.width for cut in cuts] == [*map(min, itertools.pairwise(sizes[:-1])), sizes[-1]]
    # 5 -> relu -> 8 -> back to 5, twice: while the tap of 8 is alive, so is the skip of 5
    a, b = gauss(rng, 8, 5), gauss(rng, 5, 8)
    assert widths(lambda x: functools.reduce(lambda h, _: h + b @ jax.nn.relu(a @ h), range(2), x), 5) == [
        5,
        5,
        5,
    ]
    # two branches of one input: between the taps the input and the first branch, narrowed to 2, are alive
    c, d = gauss(rng, 2, 8), gauss(rng, 2, 5)
    assert widths(lambda x: c @ jax.nn.relu(a @ x) + d @ jnp.tanh(x), 5) == [5, 7, 2]
    # DenseNet: everything before is read again
    e = gauss(rng, 3, 9)
    assert widths(lambda x: e @ jnp.concatenate([x, jax.nn.relu(c.T[:4] @ x[:2])]), 5) == [5, 3]
    # an encoder narrower than the input is a better cut than the input itself
    assert widths(lambda x: a @ jax.nn.relu(b @ x), 8) == [5, 8]


def test_a_bottleneck_between_taps_is_found(rng: np.random.Generator) -> None:
    down, up = gauss(rng, 2, 9), gauss(rng, 9, 2)
    assert widths(lambda x: jnp.tanh(up @ (down @ jnp.tanh(x))), 9) == [9, 2, 9]


def test_no_taps_and_a_constant() -> None:
    linear = lb.trace(lambda x: jnp.cumsum(x), jnp.ones(3))
    (cut,) = state_sequence(linear.program)
    assert cut.registers == (linear.program.output,)
    _, (out,) = advance(linear, -1, [jnp.array([1.0, 2.0, 4.0])], None, dtype=jnp.float32)
    assert np.array_equal(out, [1, 3, 7])
    constant = lb.trace(lambda x: jnp.ones(2), jnp.ones(3))
    _, (nothing,) = advance(constant, -1, [jnp.ones(3)], None, dtype=jnp.float32)
    assert nothing is None and state_sequence(constant.program)[-1].width == 2
