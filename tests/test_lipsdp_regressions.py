"""Mistakes that a review of the LipSDP proofs found, each kept here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb
from lipbounds._lipsdp.certificate import Proof, check, make_certificate, proved_constants
from lipbounds._lipsdp.state_matrices import hybrid_start
from lipbounds._triangle.recursion import Request


def test_a_corrected_declaration_reaches_the_bound_and_the_check() -> None:
    def act(y):
        return 3 * jnp.sin(y) * jnp.exp(-y * y)

    lb.register_activation(act, slopes=(-1.0, 1.0))  # false: the slope at 0 is 3
    a = jnp.ones((2, 2))
    form = lb.trace(lambda x: a @ act(a @ x), jnp.zeros(2))
    proof = Proof((np.full(2, 10.0),), relative=True)
    wrong = proved_constants(form, proof).value
    certificate = make_certificate(form, (proof,), value=wrong, guarantee="assumed")
    lb.register_activation(act, slopes=(-3.0, 3.0))
    assert proved_constants(form, proof).value >= 12.0 > wrong
    assert lb.lipsdp(form).value >= 12.0
    with pytest.raises(lb.CertificateError, match="claimed"):
        check(certificate, form)


def test_a_form_does_not_share_memory_with_the_users_arrays() -> None:
    def aligned(shape, value):
        size = int(np.prod(shape))
        memory = np.empty(4 * size + 64, np.uint8)
        start = (-memory.ctypes.data) % 64
        array = memory[start : start + 4 * size].view(np.float32).reshape(shape)
        array[...] = value
        return array

    weights = [aligned((4, 3), 1.0), aligned((3, 4), 1.0)]
    form = lb.from_weights(weights)
    before = np.asarray(form(jnp.ones(3)))
    bound = lb.lipsdp(form).value
    weights[1] *= 100
    np.testing.assert_array_equal(np.asarray(form(jnp.ones(3))), before)
    assert lb.lipsdp(dataclasses.replace(form)).value == pytest.approx(bound, rel=1e-9)


def test_a_row_that_underflows_beside_a_large_one_is_not_zero() -> None:
    form = lb.from_weights([np.array([[1e150, 0, 0], [1e-175, 0, 0]])])
    bound = lb.lipsdp(form, pairwise=True)
    assert isinstance(bound, lb.UpperBound) and bound.per_class is not None
    assert bound.per_class[1] >= 1e-175


def test_a_hybrid_start_keeps_sources_whose_product_underflows() -> None:
    weights = [
        np.array([[1e-200], [1e-200]]),
        np.array([[1e-150, 0.0]]),
        np.array([[1e150]]),
        np.array([[1e150]]),
    ]
    form = lb.from_weights(weights, activation="abs")
    tail = hybrid_start(form, 1, Request())[0]
    proof = Proof(tuple(np.full(s.active.size, 10.0) for s in tail.segments), 1, relative=True)
    assert proved_constants(form, proof).value >= 1e-50


def test_an_assumed_bound_states_the_probability_of_its_random_norms() -> None:
    def act(y):
        return jnp.sin(y) * jnp.exp(-y * y)

    lb.register_activation(act, slopes=(-1.0, 1.0))
    a = jnp.ones((2, 2))
    form = lb.trace(lambda x: a @ act(a @ act(a @ x)), jnp.zeros(2))
    bound = lb.liplt(form, guarantee="probabilistic")
    assert isinstance(bound, lb.UpperBound) and bound.guarantee == "assumed"
    assert 0 < bound.failure_probability <= 2e-9


def test_a_certificate_for_weights_that_are_not_finite_is_refused() -> None:
    form = lb.from_weights([np.ones((3, 2)), np.ones((2, 3))], biases=[np.zeros(3), np.zeros(2)])
    bound = lb.lipsdp(form)
    assert isinstance(bound, lb.UpperBound)
    spoiled = dataclasses.replace(
        form, consts=tuple(np.full_like(np.asarray(c), np.nan) for c in form.consts)
    )
    with pytest.raises(lb.CertificateError, match="not finite"):
        check(bound.certificate, spoiled)


@pytest.mark.slow
def test_a_neuron_that_hardly_moves_does_not_loosen_the_proof() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in ((6, 8), (6, 6), (3, 6))]
    weights[0][2] *= 1e-12
    form = lb.from_weights(weights, activation="relu")
    bound = lb.lipsdp(form)
    weights[0][2] = 0
    without = lb.lipsdp(lb.from_weights(weights, activation="relu"))
    assert bound.guarantee == "verified" and without.value < 0.95 * lb.liplt(form).value
    assert bound.value <= 1.001 * without.value


def test_an_ellipsoid_in_front_of_taps_that_vanish_passes_the_linear_map_behind_them() -> None:
    """A maximum of one entry is no tap of the elementwise view, so that the tail may begin with a linear map."""
    a = jnp.array([[3.0, 0.0], [0.0, 2.0]])
    form = lb.trace(lambda x: a @ jnp.max(jnp.maximum(x, 0)[None], axis=0), jnp.zeros(2))
    proof = Proof((), 1)
    assert 3.0 <= proved_constants(form, proof, guarantee="verified").value <= 3.0 + 1e-9
    wrong = make_certificate(form, (proof,), value=1.0)
    with pytest.raises(lb.CertificateError, match="claimed"):
        check(wrong, form)


def test_an_ellipsoid_in_front_of_entries_that_nothing_reads() -> None:
    """Windows of two leave out the last of five entries: the tail begins with the other four."""
    a = jnp.array([[3.0, 0.0], [0.0, 2.0]])

    def net(x):
        return a @ lax.reduce_window(jnp.maximum(x, 0), -jnp.inf, lax.max, (2,), (2,), "VALID")

    form = lb.trace(net, jnp.zeros(5))
    proof = Proof((np.full(2, 2.5),), 1)
    assert 3.0 <= proved_constants(form, proof, guarantee="verified").value <= 8.0


def test_an_estimate_in_the_max_norm_is_at_most_that_of_liplt() -> None:
    """One ellipsoid holds all outputs, so that LipSDP alone says sqrt(3) for the identity of three numbers."""
    form, few = lb.from_weights([np.eye(3)]), lb.Recursion(iterations=0)
    found = lb.lipsdp(form, norm=np.inf, guarantee="estimate", pairwise=True, solver=few)
    assert found.value == pytest.approx(1.0) == lb.liplt(form, norm=np.inf).value
    assert found.per_class is not None and found.per_class.max() < 1.0 + 1e-6
    assert found.pairwise is not None and found.pairwise.max() < 2.0 + 1e-6


def test_the_certificate_of_a_bound_among_denormals_is_saved(tmp_path: Path) -> None:
    """There the next number above a bound, which its certificate claims, is not within 1e-9 of it."""
    form = lb.from_weights([np.array([[3.0, 1.0], [2.0, 1.0]]) * 5e-324])
    bound = lb.liplt(form)
    made = make_certificate(form, (Proof(()),), value=bound.value)
    lb.save_certificate(dataclasses.replace(bound, certificate=made), tmp_path / "bound")
    assert bound.value <= lb.load_certificate(tmp_path / "bound", form).value <= bound.value + 1e-323
