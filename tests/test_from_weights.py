"""`from_weights` certifies the network that was asked for: no number is rounded on the way in."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb

TINY = 2.0**-30


def exact(weights: Any, biases: Any, slopes: Any, x: Any) -> list[Fraction]:
    """The network in rational arithmetic."""
    v = [Fraction(float(t)) for t in np.asarray(x, np.float64)]
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        rows = [[Fraction(float(t)) for t in row] for row in np.asarray(w, np.float64)]
        v = [
            sum((p * q for p, q in zip(row, v, strict=True)), Fraction(t))
            for row, t in zip(rows, b, strict=True)
        ]
        if k < len(weights) - 1:
            v = [Fraction(slopes[k][int(t >= 0)]) * t for t in v]
    return v


def test_no_radius_for_a_point_that_the_network_of_the_exact_bias_misclassifies() -> None:
    weights = [np.ones((1, 1), np.float32), np.array([[1], [0]], np.float32)]
    biases = [[1.0 + TINY], [0.0, 1.0 + TINY / 2]]
    x = np.zeros(1, np.float32)
    z = exact(weights, biases, [(0.0, 1.0)], x)
    assert z[0] > z[1]
    form = lb.from_weights(weights, biases)
    assert form.consts[0].dtype == np.float64
    radii = lb.certified_radius(form, x[None], np.array([1]))
    assert float(radii.radius[0]) == 0.0
    margin = float(z[0] - z[1])
    right = lb.certified_radius(form, x[None], np.array([0])).radius[0]
    assert margin * 0.99 <= right <= margin


def test_slopes_are_those_of_the_given_floats() -> None:
    weights = [np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)]
    form = lb.from_weights(weights, slopes=[(0.1, 0.1)])
    assert lb.liplt(form).value == pytest.approx(0.1, rel=1e-12) and lb.liplt(form).value >= 0.1
    low, high = form.slopes[0]
    assert np.all(np.asarray(low) <= 0.1) and np.all(np.asarray(high) >= 0.1)
    assert np.all(Fraction(float(np.max(high))) == Fraction(0.1))


ARRAYS: dict[str, tuple[Any, Any, str]] = {
    "exact Python floats": (np.float32, [0.5, 3.0], "float32"),
    "integers": (np.float32, [1, -7], "float32"),
    "an integer beyond 24 bits": (np.float32, [2**24 + 1, 0], "float64"),
    "int64": (np.float32, np.array([2**40 + 1, 0]), "float64"),
    "booleans": (np.float32, np.array([True, False]), "float32"),
    "a fraction of binary digits": (np.float32, [Fraction(1, 8), 0], "float32"),
    "float16 in float32": (np.float32, np.array([0.1, 2.0], np.float16), "float32"),
    "float32 in float16": (np.float16, np.array([0.1, 2.0], np.float32), "float64"),
    "beyond the range of float16": (np.float16, [1e5, 0.0], "float64"),
    "exact in float16": (np.float16, [0.25, 0.0], "float16"),
    "bfloat16 in bfloat16": (jnp.bfloat16, jnp.asarray([0.1, 2.0], jnp.bfloat16), "bfloat16"),
    "nine bits in bfloat16": (jnp.bfloat16, [257.0, 0.0], "float64"),
    "longdouble that is a float": (
        np.float64,
        np.array([0.1, 0.2], np.float64).astype(np.longdouble),
        "float64",
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_the_narrowest_type_that_is_exact(name: str) -> None:
    kind, bias, dtype = ARRAYS[name]
    w = np.asarray(jnp.asarray([[1.0], [2.0]], kind)) if kind != np.float64 else np.array([[1.0], [2.0]])
    form = lb.from_weights([w], [bias])
    assert {np.dtype(c.dtype).name for c in form.consts} == {dtype}
    got = [Fraction(float(t)) for c in form.consts if np.shape(c) == (2,) for t in np.asarray(c, np.float64)]
    assert got == [
        Fraction(t if isinstance(t, Fraction) else int(t) if float(t) == int(t) else float(t)) for t in bias
    ]


def test_mixed_weights_take_the_widest_type() -> None:
    wide = lb.from_weights([np.ones((2, 2), np.float32), np.full((1, 2), 0.1)])
    assert all(c.dtype == np.float64 for c in wide.consts if np.ndim(c) == 2)
    assert any(np.array_equal(np.asarray(c), [[0.1, 0.1]]) for c in wide.consts)
    mixed = lb.from_weights([np.ones((2, 2), np.float16), np.asarray(jnp.full((1, 2), 0.1, jnp.bfloat16))])
    assert all(c.dtype == np.float32 for c in mixed.consts if np.ndim(c) == 2)


@pytest.mark.parametrize(
    "number",
    [2**53 + 1, 2**2000, Fraction(1, 3), np.longdouble(1) + np.finfo(np.longdouble).eps, 1j],
    ids=["2**53 + 1", "2**2000", "1/3", "longdouble", "complex"],
)
def test_what_float64_does_not_hold_is_refused(number: Any) -> None:
    if isinstance(number, np.longdouble) and np.finfo(np.longdouble).eps == np.finfo(np.float64).eps:
        pytest.skip("longdouble is float64 here")
    with pytest.raises(ValueError, match=r"biases\[0\] holds a number that float64 cannot represent"):
        lb.from_weights([np.ones((1, 1), np.float32)], [np.array([number])])
    with pytest.raises(ValueError, match=r"slopes\[0\]\[1\] holds a number that float64 cannot represent"):
        lb.from_weights([np.ones((1, 1), np.float32)] * 2, slopes=[(0, number)])


def test_a_layer_may_have_no_bias() -> None:
    first, last, b = np.eye(2, dtype=np.float32), np.ones((1, 2), np.float32), np.ones(1, np.float32)
    form = lb.from_weights([first, last], [None, b])
    zeros = lb.from_weights([first, last], [np.zeros(2, np.float32), b])
    x = np.array([0.5, -2.0], np.float32)
    assert float(form.evaluate(x)[0]) == float(zeros.evaluate(x)[0]) == 1.5
    with pytest.raises(ValueError, match=r"biases\[1\] must have shape \(1,\), got \(2,\)"):
        lb.from_weights([first, last], [None, np.ones(2, np.float32)])


def test_traced_biases_count_with_their_dtype() -> None:
    w = np.ones((2, 2), np.float32)
    seen = []

    @jax.jit
    def traced(b: jax.Array) -> jax.Array:
        form = lb.from_weights([w, w], [b, b])
        seen.extend(np.dtype(c.dtype).name for c in form.consts if np.ndim(c) == 2)
        return form.evaluate(jnp.ones(2)).astype(jnp.float32)

    assert np.array_equal(traced(jnp.ones(2)), [7.0, 7.0])
    traced(jnp.ones(2, jnp.int8))
    traced(jnp.ones(2, jnp.int32))
    assert seen == ["float32"] * 4 + ["float64"] * 2
