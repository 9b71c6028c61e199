"""Logits with a proved rounding error, against exact rationals (relu) and 60-digit arithmetic (tanh, gelu).

The exact values are evaluated from formulas written here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from balls import chain
from gain import form_of

import lipbounds as lb
from lipbounds._gain import step_matrices
from lipbounds._gain.convolution import Convolution
from lipbounds._local import forward
from lipbounds._triangle import product_rounding, recursion


def rational_relu(weights: Any, biases: Any, x: np.ndarray) -> list[Fraction]:
    h = [Fraction(float(v)) for v in x]
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = [
            sum((Fraction(float(a)) * v for a, v in zip(row, h, strict=True)), Fraction(float(c)))
            for row, c in zip(w, b, strict=True)
        ]
        if k < len(weights) - 1:
            h = [max(v, Fraction(0)) for v in h]
    return h


def within(z: np.ndarray, error: float, exact: Sequence[Fraction]) -> bool:
    """||z - exact||_2 <= error, in rationals."""
    distance = sum(((Fraction(float(a)) - b) ** 2 for a, b in zip(z, exact, strict=True)), Fraction(0))
    return distance <= Fraction(float(error)) ** 2


NETS = [(4, 6, 3), (5, 8, 8, 4), (3, 7, 7, 7, 2), (9, 2)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("widths", NETS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_relu_logits_hold_in_exact_rationals(widths: tuple[int, ...], scale: float) -> None:
    rng = np.random.default_rng([len(widths), int(scale)])
    form, weights, biases = chain(rng, widths)
    x = scale * rng.normal(size=(20, widths[0]))
    z, error = forward.logits(form, x)
    for k in range(20):
        assert within(z[k], error[k], rational_relu(weights, biases, x[k]))
    assert (error <= 1e-12 * (1 + np.abs(z).max(axis=1))).all(), "the bound is so wide that it shows nothing"


def test_without_its_rounding_term_the_error_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with unit roundoff 0 the bound of the error is too small nearly everywhere."""
    form, weights, biases = chain(np.random.default_rng(0), (5, 8, 8, 4))
    x = np.random.default_rng(1).normal(size=(20, 5))
    exact = [rational_relu(weights, biases, v) for v in x]
    monkeypatch.setattr(forward, "U", 0.0)
    monkeypatch.setattr(forward, "gamma", lambda n: 0.0)
    z, error = forward.logits(form, x)
    assert sum(not within(z[k], error[k], exact[k]) for k in range(20)) >= 15


def test_an_error_made_early_is_carried_to_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 cancels (error about 1e-8 of a result near 1), the later ones are exact: only the carried part of the
    error covers that. Without it the same check fails."""
    first, second = np.array([[1e9 / 7, 1e9 / 3, 1.0], [1.0, 2.0, 0.0]]), np.eye(2)
    zero = [np.zeros(2), np.zeros(2)]
    form = lb.from_weights([first, second], biases=zero)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    x[:, 2] = rng.uniform(1, 2, 40) - x[:, :2] @ first[0, :2]
    exact = [rational_relu([first, second], zero, v) for v in x]
    z, error = forward.logits(form, x)
    assert all(within(z[k], error[k], exact[k]) for k in range(40))
    monkeypatch.setitem(product_rounding._CARRIED, form, {})
    z, error = forward.logits(form, x)
    assert not all(within(z[k], error[k], exact[k]) for k in range(40))


def test_sums_of_constants_are_part_of_the_error() -> None:
    """A scatter-add of constants on x: 2^60 + 1 - 2^60 is 1 in real arithmetic, not 0."""
    updates = np.array([2.0**60, 1.0, -(2.0**60), 0.25], np.float32)
    form = lb.trace(lambda x: x.at[jnp.array([0, 0, 0, 1])].add(updates), jnp.zeros(2))
    x = np.array([[0.0, 0.0], [0.5, 1.0]])
    z, error = forward.logits(form, x)
    for k in range(2):
        assert within(
            z[k], error[k], [Fraction(float(x[k, 0])) + 1, Fraction(float(x[k, 1])) + Fraction(1, 4)]
        )
    radii = lb.certified_radius(form, x, np.array([1, 1]), bound=lb.liplt(form))
    assert (radii.radius == 0).all(), "z is (1, 1/4) and (3/2, 5/4) in truth: class 1 never wins"


def test_an_answer_that_rounding_decides_is_not_certified() -> None:
    """x = (1e16, 3, -1e16) sums to 3, against a constant 3.5; floating point may say 4 or 2, by the order of terms."""
    form = lb.from_weights([np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])], biases=[np.array([0.0, 3.5])])
    x = np.array(list(itertools.permutations([1e16, 3.0, -1e16])))
    z, _ = forward.logits(form, x)
    assert (z[:, 0] != 3).any(), "rounding decides nothing here, so this test shows nothing"
    for label in (0, 1):
        radii = lb.certified_radius(form, x, np.full(len(x), label))
        assert (radii.radius == 0).all()


def transcendental(activation: Any, weights: Any, biases: Any, x: np.ndarray) -> list[Any]:
    h = [mpmath.mpf(float(v)) for v in x]
    for k, (w, b) in enumerate(zip(weights, biases, strict=True)):
        h = [
            mpmath.fsum([mpmath.mpf(float(a)) * v for a, v in zip(row, h, strict=True)])
            + mpmath.mpf(float(c))
            for row, c in zip(w, b, strict=True)
        ]
        if k < len(weights) - 1:
            h = [activation(v) for v in h]
    return h


def single(value: float) -> Any:
    """A constant of the program: float32."""
    return mpmath.mpf(float(np.float32(value)))


def gelu_tanh(v: Any) -> Any:
    inner = single(math.sqrt(2 / math.pi)) * (v + single(0.044715) * v**3)
    return v * (1 + mpmath.tanh(inner)) / 2


SMOOTH: dict[str, tuple[Any, Any]] = {
    "tanh": (jnp.tanh, mpmath.tanh),
    "gelu_exact": (
        lambda v: jax.nn.gelu(v, approximate=False),
        lambda v: v / 2 * mpmath.erfc(-v * single(math.sqrt(0.5))),
    ),
    "gelu_tanh": (lambda v: jax.nn.gelu(v, approximate=True), gelu_tanh),
    "silu": (jax.nn.silu, lambda v: v / (1 + mpmath.exp(-v))),
    "softplus": (jax.nn.softplus, lambda v: mpmath.log(1 + mpmath.exp(v))),
    "leaky_relu": (jax.nn.leaky_relu, lambda v: v if v >= 0 else single(0.01) * v),
    "elu": (jax.nn.elu, lambda v: v if v > 0 else mpmath.expm1(v)),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_smooth_logits_hold_in_60_digits(name: str) -> None:
    program, formula = SMOOTH[name]
    form, weights, biases = chain(np.random.default_rng(len(name)), (5, 7, 6, 3), program)
    x = np.random.default_rng(2).normal(size=(12, 5)) * np.array([1.0, 8.0])[np.arange(12) % 2, None]
    z, error = forward.logits(form, x)
    with mpmath.workdps(60):
        for k in range(12):
            exact = transcendental(formula, weights, biases, x[k])
            gap = mpmath.sqrt(
                mpmath.fsum([(mpmath.mpf(float(a)) - b) ** 2 for a, b in zip(z[k], exact, strict=True)])
            )
            assert gap <= mpmath.mpf(float(error[k]))
            assert gap > 0, "exact by chance: this point shows nothing"
    assert (error <= 1e-10 * (1 + np.abs(z).max(axis=1))).all(), "the bound is so wide that it shows nothing"


@pytest.mark.parametrize("name", ["group_sort", "max_pool_overlapping", "u_net", "dense_net", "reshuffle"])
def test_logits_of_the_zoo_agree_with_jax_in_float64(name: str) -> None:
    """Another evaluation in float64 lies within the error, up to its own rounding."""
    form = form_of(name)
    x = np.random.default_rng(0).normal(size=(8, *form.in_shape))
    z, error = forward.logits(form, x)
    with jax.enable_x64(True):
        other = np.asarray(jax.jit(jax.vmap(lambda v: form.evaluate(v, jnp.float64)))(jnp.asarray(x)))
    assert (np.linalg.norm(z - other, axis=1) <= 2 * error + 1e-15).all()
    assert (error > 0).all() and (error <= 1e-11 * (1 + np.abs(z).max(axis=1))).all()


def test_examples_in_chunks_and_together_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    form, *_ = chain(np.random.default_rng(0), (5, 8, 4))
    x = np.random.default_rng(1).normal(size=(11, 5))
    z, error = forward.logits(form, x)
    monkeypatch.setattr(forward, "_CHUNK", 16)  # two examples at a time
    chunked, errors = forward.logits(form, x)
    assert chunked == pytest.approx(z, rel=1e-14, abs=1e-14) and errors == pytest.approx(error, rel=1e-9)


def test_large_blocks_are_carried_by_a_cheaper_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    form, weights, biases = chain(np.random.default_rng(0), (5, 8, 8, 4))
    x = np.random.default_rng(1).normal(size=(5, 5))
    _, tight = forward.logits(form, x)
    monkeypatch.setattr(recursion, "DENSE_LIMIT", 4)
    product_rounding._CARRIED.clear()  # the norms of a form are kept
    z, error = forward.logits(form, x)
    assert (error >= tight).all() and (error > tight).any()
    assert all(within(z[k], error[k], rational_relu(weights, biases, x[k])) for k in range(5))


@pytest.mark.parametrize("name", ["grouped_convolution", "transposed_convolution", "u_net"])
def test_convolutions_without_their_matrix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with it, with the same bound of the error; chunks side by side."""
    form = form_of(name)
    x = np.random.default_rng(0).normal(size=(9, *form.in_shape))
    z, error = forward.logits(form, x)
    used = []
    once = Convolution.__call__
    monkeypatch.setattr(Convolution, "__call__", lambda self, x: used.append(x.shape) or once(self, x))  # type: ignore[func-returns-value]
    monkeypatch.setattr(step_matrices, "_APPLIED", 0)
    monkeypatch.setattr(forward, "_CHUNK", 4 * max(form.program.sizes))
    again = jax.tree.map(lambda a: a, form)  # without the steps that the form keeps
    other, errors = forward.logits(again, x)
    assert {shape[-1] for shape in used if len(shape) > 1} >= {4, 1}
    assert (np.linalg.norm(z - other, axis=1) <= error + errors).all()
    assert errors == pytest.approx(error, rel=1e-6)
