"""The search for LipSDP's multipliers on vectors: gradients, batches, hard cases, and that nothing is compiled."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
from test_cache import compilations
from test_sdp import problem, weights
from zoo import NETS

import lipbounds as lb
from lipbounds._lipsdp import cvxpy_solver
from lipbounds._lipsdp.dense_form import dense_gain
from lipbounds._lipsdp.dense_search import Dense
from lipbounds._lipsdp.matrix_inequality import prepare
from lipbounds._lipsdp.search import pair
from lipbounds._lipsdp.task import Task
from lipbounds._lipsdp.vectors import TOLERANCE, Vectors, corrected, solve_all, solve_dense


def relus(widths: list[int], seed: int = 0) -> lb.LureForm:
    return lb.from_weights(weights(widths, seed), activation="relu")


def zoo(name: str) -> lb.LureForm:
    fn, x = NETS[name].make(0)
    return lb.trace(fn, x, batched=NETS[name].batched)


def outputs(k: int) -> list[np.ndarray]:
    return [np.eye(k), *(pair(k, i, j) for i, j in itertools.combinations(range(k), 2))]


@pytest.mark.parametrize("tied", [False, True], ids=["neuron", "layer"])
def test_slopes_are_derivatives_and_curvatures_see_the_spheres(tied: bool) -> None:
    form = relus([4, 6, 5, 3])
    Gy, Gz, n = problem(form)
    ready = prepare(Gy, Gz, n, dense_gain(form).labels if tied else None)
    found = Vectors(ready)
    rng = np.random.default_rng(0)
    U, along = rng.standard_normal((2, n + len(Gy), 2, 3))
    Q = np.stack([np.eye(3), np.diag([1.0, 4.0, 0.0])])
    point, step = found.at(U, Q), 1e-6
    ahead, behind = (np.log(found.at(U + s * along, Q).value) for s in (step, -step))
    expected = -np.einsum("ipr,ipr->p", point.slope, along)
    np.testing.assert_allclose((ahead - behind) / (2 * step), expected, rtol=1e-6)
    if not tied:  # moving along a vector changes its length alone
        np.testing.assert_allclose(np.einsum("ipr,ipr->ip", point.slope, U)[n:], 0, atol=1e-9)
    assert (point.curvature >= 0).all()


def test_every_value_is_a_lower_bound_and_the_last_one_is_attained() -> None:
    form = relus([5, 8, 6, 3])
    Gy, Gz, n = problem(form)
    ready = prepare(Gy, Gz, n)
    found, rng = Vectors(ready), np.random.default_rng(0)
    best = solve_dense(Gy, Gz, n)
    for _ in range(20):
        value = found.at(rng.standard_normal((n + len(Gy), 1, 4)), np.eye(3)[None]).value[0]
        assert 0 < value * ready.rho0 <= best.rho * (1 + 1e-9)
    assert best.gap <= TOLERANCE * best.rho * 1.01


@pytest.mark.parametrize("tied", [False, True], ids=["neuron", "layer"])
def test_a_batch_of_pairs_equals_single_pairs(tied: bool) -> None:
    form = relus([5, 12, 12, 12, 4])
    Gy, Gz, n = problem(form)
    layers = dense_gain(form).labels if tied else None
    for C, one in zip(outputs(4), solve_all(Gy, Gz, n, outputs(4), layers), strict=True):
        alone = solve_dense(Gy, C @ Gz, n, layers)
        assert one.rho == pytest.approx(alone.rho, rel=4 * TOLERANCE)
        assert one.gap <= 10.1 * TOLERANCE * one.rho


def test_a_pair_that_reads_fewer_neurons_than_the_network() -> None:
    first, second = weights([4, 6, 3])
    second[0, :3] = second[1, :3] = 0  # only output 2 reads the first three neurons
    Gy, Gz, n = problem(lb.from_weights([first, second], activation="relu"))
    found = solve_all(Gy, Gz, n, outputs(3))
    for C, one in zip(outputs(3), found, strict=True):
        assert one.rho == pytest.approx(solve_dense(Gy, C @ Gz, n).rho, rel=4 * TOLERANCE)
        assert np.isfinite(one.T).all() and (one.T > 0).all()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cvxpy") is None, reason="CVXPY is not installed")
def test_all_pairs_are_those_of_clarabel() -> None:
    form = relus([5, 10, 10, 3], 4)
    bound = lb.lipsdp(form, pairwise=True)
    Gy, Gz, n = problem(form)
    assert bound.pairwise is not None
    for i, j in itertools.combinations(range(3), 2):
        reference = cvxpy_solver.solve(Gy, pair(3, i, j) @ Gz, n).raw_value
        assert bound.pairwise[i, j] == pytest.approx(reference, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "scattered_extremes", marks=pytest.mark.slow
        ),  # neurons with y = 0 at the optimum: T_i is not the quotient there
        "homemade",  # more eigenvalues near 0 than multipliers that could lift them
    ],
)
def test_degenerate_optima(name: str) -> None:
    Gy, Gz, n = problem(zoo(name))
    k = len(Gz)
    for one in solve_all(Gy, Gz, n, outputs(k)):
        assert one.gap <= 1e-6 * one.rho and one.iterations <= 1500


@pytest.mark.parametrize("k", range(7))
def test_multipliers_far_outside_are_corrected_for_a_pair_too(k: int) -> None:
    Gy, Gz, n = problem(zoo("homemade"))
    C = outputs(len(Gz))[k]
    found = Vectors(prepare(Gy, Gz, n))
    T, value = np.full(len(Gy), 1e-3), 1.0
    V = np.random.default_rng(0).standard_normal((n + len(Gy), 8))
    assert corrected(found, C, T, value, V, TOLERANCE)[1] < np.inf


def test_a_proof_does_not_lose_what_the_search_found() -> None:
    """T of a pair lies at the edge of two sets: too little rho, and neurons that no input moves."""
    for form in (zoo("absolute"), zoo("squareplus_sparse_plus"), relus([5, 20, 20, 20, 3])):
        task = Task(form, 2, "auto", 0, False)
        dense = Dense(task.gain, False)
        k = form.num_outputs
        for C, (T, solved) in zip(outputs(k), dense.solve(outputs(k)), strict=True):
            found = dense.prove(task, C, T).constants
            i, j = int(C[0].argmax()), int(C[0].argmin())
            proved = found.value if len(C) > 1 else found.pairwise[i, j]
            assert solved.value * (1 - 1e-8) <= proved <= solved.value * (1 + 3e-6)


def test_nothing_is_compiled() -> None:
    """A network that this process has not seen: no program belongs to its shapes."""
    form = relus([7, 115, 116, 117, 3])
    with compilations() as compiled:
        bound = lb.lipsdp(form, pairwise=True)
    assert not compiled, compiled
    assert any(note.startswith("dense form: ") and "3 pairs" in note for note in bound.notes)
    assert bound.value < lb.liplt(form).value


@pytest.mark.slow
def test_a_wide_network_is_solved_to_the_optimum() -> None:
    form = relus([30, 300, 300, 10])
    bound = lb.lipsdp(form)
    rough = lb.lipsdp(form, solver=lb.Recursion(iterations=60))
    assert bound.value <= rough.value
    gap = next(float(note.split("relative gap ")[1].split(";")[0]) for note in bound.notes if "gap" in note)
    assert gap <= 10 * TOLERANCE
