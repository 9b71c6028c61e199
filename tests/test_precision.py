"""x may pass through bfloat16 and float16, and every bound says so; what is coarser is refused."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb
from lipbounds._form.elementwise import elementwise_view
from lipbounds._lipsdp.state_matrices import split

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


@pytest.mark.slow
@pytest.mark.sampled(2)
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


@pytest.fixture
def rounded_products() -> Iterator[None]:
    """Products of JAX arrays are rounded to bfloat16 unless they ask for more (on a CPU: those of float64)."""
    before = jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "BF16_BF16_F32")
    yield
    jax.config.update("jax_default_matmul_precision", before)


def test_local_bounds_do_not_depend_on_the_precision_of_products(
    rounded_products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local LipLT fell below its value by 2e-4: the products of its rows were rounded to bfloat16."""
    monkeypatch.setattr(sys.modules["lipbounds._local.engines"], "TAIL", 0)
    rng = np.random.default_rng(4)
    w, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((9, 4), (3, 9)))
    seen = []

    def found() -> np.ndarray:
        form = lb.trace(lambda x: v @ jax.nn.relu(w @ x), X)  # a form keeps what was computed from it
        look = lambda _: seen.append(jax.config.jax_default_matmul_precision)  # noqa: E731
        return lb.local(form, X[None], 0.1, progress=look).value

    rounded = found()
    jax.config.update("jax_default_matmul_precision", None)
    np.testing.assert_array_equal(rounded, found())
    assert set(seen) == {"highest"}  # of the other products in a verb


def test_a_program_with_rounded_products_is_traced(rounded_products: None) -> None:
    """It was "a bug of lipbounds": the program's products differed from the form's by what a GPU loses in TF32."""
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        w, v, kernel = (jnp.asarray(rng.normal(size=s)) for s in ((12, 40), (40, 5), (3, 3, 1, 1)))

        def fn(x: jax.Array) -> jax.Array:
            image = lax.conv_general_dilated(x.reshape(1, 1, 3, 4), kernel, (1, 1), "SAME")
            return jax.nn.relu(image.reshape(-1) @ w) @ v

        kernel = kernel.reshape(1, 1, 3, 3)
        x = jnp.ones(12)
        assert np.abs(fn(x) - lb.trace(fn, x).evaluate(x)).max() > 1e-4  # there is something to see
        assert lb.trace(jax.vmap(fn), x[None], batched=True).num_outputs == 5
        asked = partial(jnp.matmul, precision="BF16_BF16_F32")
        assert lb.trace(lambda x: asked(jax.nn.relu(asked(x, w)), v), x).num_outputs == 5
