"""Mistakes that were found once: each of these gave a bound too small, or would have been silent."""

from __future__ import annotations

import math
import os
import pickle
import threading
import time
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb
from lipbounds._form.lure import multiplicity
from lipbounds._form.steps import StaticArray
from lipbounds._local import engines
from lipbounds._triangle import recursion

S = jax.ShapeDtypeStruct
VECTOR = S((2,), jnp.float32)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this jax has no mutable references")
def test_mutable_references_are_refused() -> None:
    def fn(x: jax.Array) -> jax.Array:
        ref = jax.new_ref(jnp.zeros(1))
        ref[...] = 100 * jax.nn.relu(x[:1] - 50)
        return jnp.concatenate([jnp.ones(1) + 0 * x[:1], ref[...]])

    with pytest.raises(lb.UnsupportedError, match="mutable state"):
        lb.trace(fn, VECTOR)


@pytest.mark.parametrize("scaling", ["aol", "sll", "optimized"])
def test_a_column_that_cancels_in_floating_point_is_not_dropped(scaling: str) -> None:
    a, b = jnp.float32(1 - 2.0**-14), jnp.float32(1 + 2.0**-14)
    c, e = jnp.float32(511 * 2.0**-9), jnp.float32(262657 * 2.0**-18)
    eye, large = jnp.eye(2, dtype=jnp.float32), jnp.float32(2.0**56)

    def fn(x: jax.Array) -> jax.Array:  # its exact slopes are +-1
        h = jnp.abs(x - 1e6) - 1e6
        return large * ((b * eye) @ ((a * eye) @ ((b * eye) @ ((a * eye) @ h))) - (e * eye) @ ((c * eye) @ h))

    assert lb.liplt(lb.trace(fn, VECTOR), scaling=scaling).value >= 1


@pytest.mark.parametrize("scaling", ["aol", "sll", "optimized"])
def test_scalings_of_huge_weights(scaling: str) -> None:
    with jax.enable_x64(True):
        form = lb.trace(lambda x: jax.nn.relu(x) * 1e160, S((2,), jnp.float64))
    assert lb.liplt(form, scaling=scaling).value >= 1e160


def test_reshape_with_an_order_of_dimensions() -> None:
    def fn(x: jax.Array) -> jax.Array:
        y = lax.reshape(x, (6,), dimensions=(1, 0))
        return jnp.stack([1e4 * jnp.sum(x), y[1] - x[0, 1]])

    classes = lb.liplt(lb.trace(fn, S((2, 3), jnp.float32)), pairwise=True).per_class
    assert classes[1] == pytest.approx(math.sqrt(2), rel=1e-6)


def test_updates_and_selections_clamp_as_the_program_does() -> None:
    form = lb.trace(
        lambda x: jax.nn.relu(lax.dynamic_update_slice(jnp.zeros(5), x, (-8,))[:2] - 1000), VECTOR
    )
    assert lb.liplt(form).value == pytest.approx(1, rel=1e-6)
    which = jnp.full((2,), -2, jnp.int32)
    form = lb.trace(lambda x: lax.select_n(which, 5 * x, 2 * x, x), VECTOR)
    assert lb.liplt(form).value == pytest.approx(5, rel=1e-6)


def test_failure_probabilities_add_up() -> None:
    w, v = jnp.ones((8, 6)), jnp.ones((3, 8))

    def fn(x: jax.Array) -> jax.Array:
        y = w @ x
        return v @ jnp.concatenate([jax.nn.relu(y[:4]), jnp.tanh(y[4:])])

    form = lb.trace(fn, S((6,), jnp.float32))
    bound = lb.liplt(form, guarantee="probabilistic")
    assert 0 < bound.failure_probability <= 1.0000001e-9
    request = recursion.Request(guarantee="probabilistic")
    once = recursion.triangle(form, request, pairwise=True, centred=True)
    assert recursion.smaller(once, once).failure == pytest.approx(2 * once.failure)


def test_slopes_are_proved_again_from_the_constants() -> None:
    w, alpha = jnp.ones((2, 2)), jnp.float32(0.5)
    form = lb.trace(lambda x: w @ jnp.where(x > 0, x, alpha * x), VECTOR)
    # a weight decay step on the form
    halved = jax.tree.map(lambda leaf: leaf * np.asarray(0.5, leaf.dtype), form)
    assert lb.liplt(halved).value >= 1  # the branch of slope one is not a constant
    rounded = jax.jit(lambda a, b: lb.trace(lambda x: jnp.where(x > 0, x * a * b, 0 * x), VECTOR))
    exact = float(np.float32(0.1)) * float(np.float32(0.3))
    assert lb.liplt(rounded(np.float32(0.1), np.float32(0.3))).value >= exact


def test_products_that_underflow_on_the_device_are_not_zero() -> None:
    factors = [jnp.float32(1e-30)] * 11 + [jnp.float32(1e30)] * 11

    def fn(x: jax.Array) -> jax.Array:
        h = x.reshape(1, 2)
        for factor in factors:
            h = h * jnp.full((1, 2), factor)
        return jax.nn.relu(h.reshape(2))

    assert lb.naive(lb.trace(fn, VECTOR), guarantee="probabilistic").value >= 0.99


def test_batches_are_checked_at_their_own_size() -> None:
    with pytest.raises(lb.UnsupportedError, match="row"):
        lb.trace(
            lambda x: x + jnp.roll(x, 1, axis=0) if x.shape[0] % 4 == 0 else x,
            jnp.zeros((8, 2)),
            batched=True,
        )
    with pytest.raises(lb.UnsupportedError, match="row"):
        lb.trace(
            lambda x: jnp.stack([1000 * x[:, 0], x[:, 1] * x.shape[0]], 1), jnp.zeros((10, 2)), batched=True
        )


def test_the_form_keeps_its_own_copy_of_the_weights() -> None:
    weights = np.ones((4, 4), np.float32)
    form = lb.trace(lambda x: weights @ jax.nn.relu(x), S((4,), jnp.float32))
    before = lb.liplt(form).value
    weights *= 100
    assert lb.liplt(form).value == before and float(form(jnp.ones(4))[0]) == 4


def test_a_bound_of_another_network_is_refused() -> None:
    small, large = (lb.trace(lambda x, k=k: k * x, VECTOR) for k in (1e-3, 1e3))
    with pytest.raises(ValueError, match="another network"):
        lb.certified_radius(large, np.ones((1, 2), np.float32), [0], bound=lb.liplt(small))
    again = lb.trace(lambda x: 1e3 * x, VECTOR)
    assert len(lb.certified_radius(large, np.eye(2, dtype=np.float32), [0, 1], bound=lb.liplt(again))) == 2


def test_group_factors_are_rounded_up() -> None:
    (tap,) = lb.trace(lambda x: jnp.max(x, keepdims=True), S((3,), jnp.float32)).taps
    for n in range(1, 100):
        shared = replace(tap, groups=StaticArray(np.tile(np.arange(3), (n, 1))), size_out=n)
        assert (multiplicity(shared) == n).all()
        factor = recursion._multiplicity_factor(shared, 2)[0]
        numerator, denominator = float(factor).as_integer_ratio()
        assert numerator**2 >= n * denominator**2
        assert factor == pytest.approx(math.sqrt(n), rel=1e-15)


def test_weights_whose_squares_leave_the_range_of_float64_keep_their_bounds() -> None:
    """The ellipsoids of `local` and a Gram matrix of `empirical` overflowed: "Eigenvalues did not converge"."""
    rng = np.random.default_rng(5)
    w, v = rng.standard_normal((5, 4)) * 1e160, rng.standard_normal((3, 5))
    with jax.enable_x64():
        form = lb.trace(lambda x: v @ jax.nn.relu(w @ x), jax.ShapeDtypeStruct((4,), np.float64))
        whole = lb.liplt(form).value
        near = lb.local(form, rng.standard_normal((2, 4)) * 1e-160, 1e-170)
        assert np.all((near.value > 0) & (near.value <= whole))
        assert 0.0 <= lb.empirical(form, pairwise=True, seed=0).value <= whole


def test_local_bounds_of_outputs_by_the_thousand_are_refused_before_anything_is_allocated() -> None:
    """30 000 of them ended the process in an allocation of K x K numbers."""
    v = np.ones((30_000, 2), np.float32)
    form = lb.trace(lambda x: v @ jax.nn.relu(x), jax.ShapeDtypeStruct((2,), np.float32))
    x = np.ones((1, 2), np.float32)
    refusal = "at most 4096 outputs, this network has 30000: keep"
    with pytest.raises(ValueError, match=refusal):
        lb.local(form, x, 0.1)
    found = lb.certified_radius(form, x, np.zeros(1, int), local=True)
    assert refusal in found.notes[-1]
    assert found.radius == lb.certified_radius(form, x, np.zeros(1, int)).radius


def test_margins_keep_examples_together_whatever_order_their_threads_end_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The threads of chunks of one example pause at every line of the function that collects their values."""
    rng = np.random.default_rng(0)
    form = lb.from_weights([rng.normal(size=s) for s in ((8, 3), (8, 8), (3, 8))])
    x = rng.normal(size=(12, 3))
    y = np.asarray(jax.vmap(form)(x)).argmax(axis=1)
    monkeypatch.setattr(engines, "_CHUNK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    expected = lb.margins(form, x, y, 0.3, progress=False).value
    pauses = iter(rng.random(100_000) * 0.004)

    def paused(frame: Any, event: str, arg: Any) -> Any:
        def line(frame: Any, event: str, arg: Any) -> Any:
            if event == "line":
                time.sleep(next(pauses))
            return line

        of_margins = frame.f_code.co_filename.endswith("problem.py")
        return line if frame.f_code.co_name == "one" and of_margins else None

    before = threading.gettrace()
    threading.settrace(paused)
    try:
        found = lb.margins(form, x, y, 0.3, progress=False).value
    finally:
        threading.settrace(before)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_a_pickled_form_keeps_float64() -> None:
    weight = 1 + 2.0**-26
    form = lb.from_weights([np.array([[weight, 0.0], [0.0, 0.5]])])
    again = pickle.loads(pickle.dumps(form))
    assert [c.dtype for c in again.consts] == [c.dtype for c in form.consts]
    assert [isinstance(c, jax.Array) for c in again.consts] == [isinstance(c, jax.Array) for c in form.consts]
    assert again.program == form.program and lb.liplt(again).value >= weight
    table = StaticArray(np.arange(3))
    assert pickle.loads(pickle.dumps(table)) == table
    assert not pickle.loads(pickle.dumps(table)).array.flags.writeable


def test_arrays_of_a_form_cannot_change_under_what_is_kept_with_it() -> None:
    rng = np.random.default_rng(0)
    given = lb.from_weights([rng.normal(size=s) for s in ((4, 3), (4, 4), (3, 4))])
    arrays = tuple(np.array(c) for c in given.consts)
    form = lb.LureForm(given.program, arrays, given.slopes)
    before = lb.liplt(form).value
    for array in arrays:
        array *= 100.0
    assert lb.liplt(form).value == before
    np.testing.assert_allclose(form(np.ones(3)), given(np.ones(3)), rtol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        form.consts[0][...] = 0.0
    for leaf in jax.tree.leaves(jax.tree.map(np.array, form)):
        assert not leaf.flags.writeable


def test_slopes_that_are_declared_anew_are_those_of_their_own_taps() -> None:
    """Both declarations are true; the blocks of the first were taken for those of the second."""

    def a(x: jax.Array) -> jax.Array:
        return jnp.sinh(jnp.clip(x, -1, 1))  # slopes in [0, 1.544]

    def b(x: jax.Array) -> jax.Array:
        return jnp.sinh(jnp.clip(x, -2, 2))  # slopes in [0, 3.763]

    def net(x: jax.Array) -> jax.Array:
        return jax.nn.relu(jnp.float32([[1e-3]]) @ a(x) + jnp.float32([[1.0]]) @ b(x))

    lb.register_activation(a, slopes=(0.0, 4.0))
    lb.register_activation(b, slopes=(-4.0, 4.0))
    form = lb.trace(net, jnp.zeros(1))
    lb.liplt(form)
    lb.register_activation(a, slopes=(-4.0, 4.0))
    lb.register_activation(b, slopes=(0.0, 4.0))
    assert lb.liplt(form).value >= math.cosh(1.99)


@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_slopes_of_a_network_that_cancels_are_not_above_its_constant(offset: float) -> None:
    """Rounding of float64 at the offset, over short distances, is larger than any multiple of that of the outputs."""
    one = np.ones((1, 1))
    form = lb.from_weights([one, one], [np.array([offset]), np.array([-offset])])
    close = np.array([[0.008347571059302986], [0.008347499952478707]])
    found = lb.empirical(form, close, pairwise=True, progress=False)
    assert 0.999 < found.value <= 1
    both = lb.from_weights([one, [[1.0], [-1.0]]], [np.array([offset]), np.array([-offset, offset])])
    pairs = lb.empirical(both, close, pairwise=True, progress=False).pairwise
    assert pairs is not None and 1.99 < pairs[0, 1] <= 2
