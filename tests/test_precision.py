"""x may pass through bfloat16 and float16, and every bound says so; what is coarser is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb
from lipbounds._sequence import split
from lipbounds._views import elementwise_view

Fn = Callable[[jax.Array], Any]
W = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=4), jnp.float32)


def through(dtype: str) -> Fn:
    def fn(x: jax.Array) -> jax.Array:
        return W @ jax.nn.relu(x).astype(dtype).astype(jnp.float32)

    return fn


@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn"],
)
def test_narrow_casts_are_refused(dtype: str) -> None:
    """They were "verified", although the program flips in most balls: it moves in steps."""
    with pytest.raises(lb.UnsupportedError, match=f"rounded to {dtype}") as caught:
        lb.trace(through(dtype), X)
    (item,) = caught.value.items
    assert item.primitive == "convert_element_type" and "bfloat16" in item.remedy


@pytest.mark.parametrize(
    ("fn", "word"),
    [
        (lambda x: lax.reduce_precision(W @ x, 4, 3), r"reduce_precision\(4, 3\)"),
        (lambda x: lax.reduce_precision(W @ x, 8, 6), r"reduce_precision\(8, 6\)"),
        (lambda x: jnp.tanh(lax.reduce_precision(jnp.sin(x), 4, 23)), r"reduce_precision\(4, 23\)"),
        (lambda x: jax.nn.relu(x.astype(jnp.float8_e4m3fn).astype(jnp.float32)), "float8"),
        (
            lambda x: (W.astype(jnp.float8_e4m3fn) @ x.astype(jnp.float8_e4m3fn)).astype(jnp.float32),
            "float8",
        ),
    ],
    ids=["as float8", "one bit less", "exponent", "inside an activation", "float8 product"],
)
def test_other_ways_to_round_coarsely_are_refused(fn: Fn, word: str) -> None:
    with pytest.raises(lb.UnsupportedError, match=f"rounded to {word}"):
        lb.trace(fn, X)


def test_a_narrow_input_is_refused_and_narrow_weights_are_not() -> None:
    with pytest.raises(lb.UnsupportedError, match="rounded to float8"):
        lb.trace(lambda x: x, jax.ShapeDtypeStruct((4,), jnp.float8_e4m3fn))
    narrow = W.astype(jnp.float8_e4m3fn)
    form = lb.trace(lambda x: narrow.astype(jnp.float32) @ x, X)
    assert form.notes == () and lb.liplt(form).notes == ()


@pytest.mark.parametrize(
    ("fn", "dtype", "name"),
    [
        (through("bfloat16"), "float32", "bfloat16"),
        (through("float16"), "float32", "float16"),
        pytest.param(
            lambda x: W @ lax.reduce_precision(jax.nn.relu(x), 8, 7),
            "float32",
            "reduce_precision(8, 7)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda x: jnp.float16(2.0) * jax.nn.relu(x), "float16", "float16", marks=pytest.mark.slow
        ),
        pytest.param(
            lambda x: W @ jnp.sort(jax.nn.relu(x).astype(jnp.bfloat16)).astype(jnp.float32),
            "float32",
            "bfloat16",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bfloat16", "float16", "reduce_precision", "input", "group"],
)
def test_half_precision_is_real_arithmetic_and_every_bound_says_so(fn: Fn, dtype: str, name: str) -> None:
    form = lb.trace(fn, X.astype(dtype))
    (note,) = form.notes
    assert name in note and "real arithmetic" in note
    inputs = np.asarray(X, np.float32)[None]
    bounds: list[Any] = [
        lb.naive(form),
        lb.liplt(form),
        lb.liplt(form, guarantee="estimate"),
        lb.lipsdp(form),
        lb.lipsdp(form, norm=np.inf),
        lb.local(form, inputs, 0.1),
        lb.certified_radius(form, inputs, [0]),
        lb.certified_radius(form, inputs, [0], local=True),
    ]
    for bound in bounds:
        assert [note == text for text in bound.notes].count(True) == 1, bound
        assert not any(note in text for text in bound.notes if text != note), "said once"
    assert note in lb.local(form, inputs, 0.1)[0].notes


def test_the_note_survives_what_is_done_to_a_form() -> None:
    form = lb.trace(lambda x: W @ jnp.sort(through("bfloat16")(x)[:2].repeat(2)), X)
    leaves, tree = jax.tree.flatten(form)
    others = [elementwise_view(form), jax.tree.unflatten(tree, leaves), jax.tree.map(lambda a: a, form)]
    others += [pickle.loads(pickle.dumps(form)), *split(form, 1)]
    assert form.notes and all(other.notes == form.notes for other in others)
    plain = lb.trace(lambda x: W @ jnp.sort(through("float32")(x)[:2].repeat(2)), X)
    assert plain.notes == () and plain.program != form.program


def test_a_cast_that_does_not_reach_the_output_does_not_count() -> None:
    def fn(x: jax.Array) -> jax.Array:
        _ = x.astype(jnp.float8_e4m3fn), x.astype(jnp.bfloat16)
        return W @ x

    assert lb.trace(fn, X).notes == ()
