"""The dense form of LipSDP, the search on vectors, and the reference solvers through CVXPY."""

from __future__ import annotations

import importlib.util
import itertools
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gain as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb
from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm
from lipbounds._lipsdp import cvxpy_solver, dense_form, matrix_inequality, vectors
from lipbounds._lipsdp.dense_form import dense_gain, reduce_input
from lipbounds._lipsdp.matrix_inequality import prepare, smallest_rho
from lipbounds._lipsdp.search import pair
from lipbounds._lipsdp.vectors import TOLERANCE, solve_all, solve_dense
from lipbounds._text import progress
from lipbounds._triangle.recursion import loop_transform

needs_cvxpy = pytest.mark.skipif(
    importlib.util.find_spec("cvxpy") is None, reason="CVXPY is not installed (pip install lipbounds[sdp])"
)


def weights(widths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(b, a)) / math.sqrt(a) for a, b in itertools.pairwise(widths)]


def traced(widths: list[int], phi: Callable[[int, Any], Any], seed: int = 0) -> LureForm:
    layers = [jnp.asarray(w, jnp.float32) for w in weights(widths, seed)]

    def net(x: Any) -> Any:
        for k, w in enumerate(layers[:-1]):
            x = phi(k, w @ x)
        return layers[-1] @ x

    return lb.trace(net, jax.ShapeDtypeStruct((widths[0],), jnp.float32))


def residual() -> LureForm:
    rng = np.random.default_rng(5)
    parts = [jnp.asarray(rng.normal(size=(8, 8)) / 3, jnp.float32) for _ in range(6)]

    def net(x: Any) -> Any:
        for a, b in zip(parts[::2], parts[1::2], strict=True):
            x = x + b @ jax.nn.relu(a @ x)
        return x[:4]

    return lb.trace(net, jax.ShapeDtypeStruct((8,), jnp.float32))


def narrow(k: int, y: Any) -> Any:
    """Slopes in [s, 1], 1 - s from 1e-6 to 1 over the neurons of the layer."""
    low = jnp.asarray(1 - np.geomspace(1e-6, 1, y.size), jnp.float32)
    return jnp.where(y > 0, y, low * y)


def turned(k: int, y: Any) -> Any:
    """Slopes in [-2, -0.5]."""
    return jnp.where(y > 0, jnp.float32(-0.5) * y, jnp.float32(-2) * y)


FORMS: dict[str, Callable[[], LureForm]] = {
    "chain": lambda: lb.from_weights(weights([6, 10, 8, 3]), activation="relu"),
    "deep": lambda: lb.from_weights(weights([4, 5, 5, 5, 5, 2], 1), activation="relu"),
    "scalar output": lambda: lb.from_weights(weights([8, 12, 1], 2), activation="relu"),
    "leaky": lambda: traced([6, 9, 9, 3], lambda k, y: jax.nn.leaky_relu(y, 0.1), 3),
    "abs": lambda: traced([6, 9, 9, 3], lambda k, y: jnp.abs(y), 4),
    "negative slopes": lambda: traced([5, 8, 8, 3], turned, 6),
    "narrow slopes": lambda: traced([5, 8, 8, 3], narrow, 7),
    "residual": residual,
}


def problem(form: LureForm) -> tuple[np.ndarray, np.ndarray, int]:
    Gy, Gz = reduce_input(dense_gain(form))
    return Gy, Gz, Gy.shape[1] - len(Gy)


def least_eigenvalue(Gy: np.ndarray, Gz: np.ndarray, n: int, T: np.ndarray, rho: float) -> float:
    """Of the LMI, scaled to unit diagonal blocks diag(rho, T)."""
    d = 1 / np.sqrt(np.concatenate([np.full(n, rho), T]))
    A = np.diag(1 / d**2) - Gy.T @ (T[:, None] * Gy) - Gz.T @ Gz
    return float(np.linalg.eigvalsh(A * d[:, None] * d)[0])


# --- the gain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chain", "narrow slopes", "residual"])
def test_dense_gain_is_the_gain_of_unit_vectors(name: str) -> None:
    form = FORMS[name]()
    gain = dense_gain(form)
    view = elementwise_view(form)
    scalings = loop_transform(view, 2, centred=True)
    blocks = oracle.dense_gain(view, scalings)
    sources = [(), *((k,) for k in range(len(view.taps)))]
    pick = [np.arange(gain.n), *gain.active]

    def row(target: Any) -> np.ndarray:
        return np.hstack([blocks[s, target][:, at] for s, at in zip(sources, pick, strict=True)])

    expected = np.vstack([row((k,))[gain.active[k]] for k in range(len(view.taps))])
    np.testing.assert_allclose(gain.Gy.midpoint_for_search(), expected, atol=1e-13)
    np.testing.assert_allclose(gain.Gz.midpoint_for_search(), row(()), atol=1e-13)
    assert gain.Gy.error < 1e-12 and gain.Gz.error < 1e-12
    assert gain.labels.size == len(gain.Gy.midpoint_for_search())


def test_neurons_without_influence_are_left_out() -> None:
    first, second = np.ones((4, 3)), np.ones((2, 4))
    first[1] = 0  # never moved
    second[:, 2] = 0  # moves nothing
    gain = dense_gain(lb.from_weights([first, second], activation="relu"))
    np.testing.assert_array_equal(gain.active[0], [0, 3])


def test_linear_neurons_have_no_multiplier() -> None:
    low = jnp.asarray([1.0, 0.0, 1.0], jnp.float32)
    form = lb.trace(lambda x: jnp.where(x > 0, x, low * x), jax.ShapeDtypeStruct((3,), jnp.float32))
    gain = dense_gain(form)
    np.testing.assert_array_equal(gain.active[0], [1])
    assert solve_dense(*problem(form)).rho == pytest.approx(1, abs=1e-8)


def test_a_gain_beyond_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_form, "MAX_ENTRIES", 100)
    with pytest.raises(ValueError, match="18 neurons and 6 inputs.*solver='recursion'"):
        dense_gain(FORMS["chain"]())


def test_reduced_inputs_keep_the_gram_matrix() -> None:
    form = lb.from_weights(weights([50, 6, 5, 3]), activation="relu")
    gain = dense_gain(form)
    Gy, Gz = reduce_input(gain)
    N = len(Gy)
    assert Gy.shape[1] - N == 6  # the rank of the first matrix
    whole, short = (
        np.vstack(pair) for pair in ((gain.Gy.midpoint_for_search(), gain.Gz.midpoint_for_search()), (Gy, Gz))
    )
    np.testing.assert_array_equal(whole[:, 50:], short[:, 6:])
    np.testing.assert_allclose(whole[:, :50] @ whole[:, :50].T, short[:, :6] @ short[:, :6].T, atol=1e-13)


# --- vectors -------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(8)
@pytest.mark.parametrize("tied", [False, True], ids=["neuron", "layer"])
@pytest.mark.parametrize("name", FORMS)
def test_multipliers_are_feasible_and_between_the_bounds(name: str, tied: bool) -> None:
    form = FORMS[name]()
    gain = dense_gain(form)
    Gy, Gz, n = problem(form)
    found = solve_dense(Gy, Gz, n, gain.labels if tied else None)
    assert 0 <= found.gap <= 1.01 * TOLERANCE * found.rho
    assert least_eigenvalue(Gy, Gz, n, found.T, found.rho * (1 + 1e-9)) > -1e-12
    assert math.sqrt(found.rho) <= lb.liplt(form).value * (1 + 1e-8)
    x = np.random.default_rng(0).normal(size=(50, form.in_size)).astype(np.float32)
    slopes = np.linalg.norm(jax.vmap(jax.jacobian(form))(x), 2, axis=(1, 2))
    assert math.sqrt(found.rho) >= slopes.max() * (1 - 1e-6)
    if tied:
        assert all(np.ptp(found.T[gain.labels == k]) == 0 for k in np.unique(gain.labels))
        assert found.rho >= solve_dense(Gy, Gz, n).rho * (1 - 1e-8)


@pytest.mark.parametrize("tied", [False, True], ids=["neuron", "layer"])
@pytest.mark.parametrize(
    "scales", [(1e6, 1e6, 1e6), (1e-6, 1e6, 1e-6), (1e-6, 1e-6, 1e-6), (1e6, 1e-6, 1e-3)]
)
def test_scales_of_the_layers_only_multiply(scales: tuple[float, ...], tied: bool) -> None:
    layers = weights([6, 10, 8, 3])
    values = []
    for factors in ((1.0, 1.0, 1.0), scales):
        form = lb.from_weights([s * w for s, w in zip(factors, layers, strict=True)], activation="relu")
        labels = dense_gain(form).labels if tied else None
        values.append(math.sqrt(solve_dense(*problem(form), labels).rho))
    assert values[1] == pytest.approx(values[0] * math.prod(scales), rel=2e-8)


def test_neurons_of_very_different_scales() -> None:
    rng = np.random.default_rng(1)
    first, second, third = weights([6, 10, 8, 3])
    a, b = (10 ** rng.uniform(-6, 6, size) for size in (10, 8))
    # the same function: relu is homogeneous
    scaled = [
        a[:, None] * first,
        b[:, None] * second / a,
        third / b,
    ]
    found = [
        solve_dense(*problem(lb.from_weights(w, activation="relu"))) for w in ([first, second, third], scaled)
    ]
    assert found[1].rho == pytest.approx(found[0].rho, rel=1e-7)


def test_positive_weights_give_the_norm_of_the_product() -> None:
    """Where all relus are on, the network is the product; LipSDP is exact there."""
    layers = [np.abs(w) for w in weights([10, 15, 12, 4])]
    exact = np.linalg.norm(layers[2] @ layers[1] @ layers[0], 2)
    Gy, Gz, n = problem(lb.from_weights(layers, activation="relu"))
    assert math.sqrt(solve_dense(Gy, Gz, n).rho) == pytest.approx(exact, rel=1e-8)


@pytest.mark.slow
def test_an_orthogonal_maxmin_chain_has_constant_one() -> None:
    rng = np.random.default_rng(2)
    turns = [jnp.asarray(np.linalg.qr(rng.normal(size=(8, 8)))[0], jnp.float32) for _ in range(4)]

    def net(x: Any) -> Any:
        for w in turns:
            a, b = jnp.split(w @ x, 2)
            x = jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)])
        return x

    form = lb.trace(net, jax.ShapeDtypeStruct((8,), jnp.float32))
    assert math.sqrt(solve_dense(*problem(form)).rho) == pytest.approx(1, abs=1e-6)


def test_idle_neurons_get_multipliers_too() -> None:
    first, second, third = weights([5, 6, 6, 2])
    second[1] = 0  # nothing moves it
    third[:, 3] = 0  # moves nothing
    form = lb.from_weights([first, second, third], activation="relu")
    kept = np.array([0, 2, 4, 5])
    same = lb.from_weights([first, second[kept], third[:, kept]], activation="relu")
    Gy, Gz, _ = problem(form)
    for gain_y, gain_z in (
        (Gy, Gz),
        (dense_gain(form).Gy.midpoint_for_search(), dense_gain(form).Gz.midpoint_for_search()),
    ):
        columns = gain_y.shape[1] - len(gain_y)
        found = solve_dense(gain_y, gain_z, columns)
        assert np.isfinite(found.T).all() and (found.T > 0).all()
        assert least_eigenvalue(gain_y, gain_z, columns, found.T, found.rho * (1 + 1e-9)) > -1e-12
        assert found.rho == pytest.approx(solve_dense(*problem(same)).rho, rel=2e-8)


def test_a_network_whose_neurons_do_not_matter() -> None:
    Gz = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    found = solve_dense(np.array([[1.0, 1.0, 0.0]]), Gz, 2)
    assert found.rho == pytest.approx(25, rel=1e-8) and found.T[0] > 0 and found.iterations == 0
    assert solve_dense(np.zeros((0, 2)), Gz[:, :2], 2).rho == pytest.approx(25, rel=1e-12)
    assert solve_dense(np.array([[1.0, 1.0, 0.0]]), 0 * Gz, 2).rho == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda Gy, Gz: (Gy[:, :-1], Gz), "do not have"),
        (lambda Gy, Gz: (Gy * np.nan, Gz), "NaN"),
        (lambda Gy, Gz: (Gy + 1.0, Gz), "cycle"),
    ],
)
def test_bad_gains(change: Any, message: str) -> None:
    Gy, Gz, n = problem(FORMS["chain"]())
    with pytest.raises(ValueError, match=message):
        solve_dense(*change(Gy, Gz), n)


def test_layers_out_of_order_are_refused() -> None:
    form = FORMS["chain"]()
    with pytest.raises(ValueError, match="in the order of the layers"):
        solve_dense(*problem(form), 1 - dense_gain(form).labels)


def graded(seed: int) -> tuple[np.ndarray, np.ndarray, int, list[np.ndarray]]:
    """24 inputs and relus of sizes from exp(-5) to 1, 6 outputs: the network and its pairs."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(size=(b, 24)) * np.exp(-5 * rng.random((b, 1))) for b in (24, 6)]
    outputs = [np.eye(6), *(pair(6, a, b) for a, b in itertools.combinations(range(6), 2))]
    return *problem(lb.from_weights(layers, activation="relu")), outputs


def test_every_pair_is_climbed_where_neurons_hardly_matter() -> None:
    """A vector that starts on the wrong side of its sphere must turn round; some took all 500 steps, and T < 0."""
    Gy, Gz, n, outputs = graded(4)
    found = solve_all(Gy, Gz, n, outputs)
    assert max(one.gap / one.rho for one in found) <= TOLERANCE
    assert max(one.iterations for one in found) < 150


def test_one_pair_without_multipliers_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    Gy, Gz, n, outputs = graded(0)
    alone = solve_all(Gy, Gz, n, outputs)
    outputs[3] = outputs[3] * 1e160  # its square is not a float
    with np.errstate(all="ignore"):
        found = solve_all(Gy, Gz, n, outputs)
    assert all(np.isfinite(one.T).all() and (one.T > 0).all() for one in found)
    assert not found[3].gap < math.inf
    for k in {*range(len(outputs))} - {3}:
        assert found[k].rho == pytest.approx(alone[k].rho, rel=2 * TOLERANCE)
    monkeypatch.setattr(vectors, "_low_eigenvectors", lambda A, Z: None)  # no correction: T moves inside
    for one, best in zip(solve_all(Gy, Gz, n, outputs[:2]), alone, strict=False):
        assert best.rho * (1 - TOLERANCE) <= one.rho < 1.01 * best.rho


# --- through CVXPY -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.sampled(8)
@needs_cvxpy
@pytest.mark.parametrize("name", FORMS)
def test_vectors_agree_with_clarabel(name: str) -> None:
    form = FORMS[name]()
    labels = dense_gain(form).labels if name in ("deep", "residual") else None
    Gy, Gz, n = problem(form)
    found, reference = solve_dense(Gy, Gz, n, labels), cvxpy_solver.solve(Gy, Gz, n, labels)
    assert reference.status == "optimal"
    assert math.sqrt(found.rho) == pytest.approx(reference.raw_value, rel=2e-7)
    assert (reference.T > 0).all() and reference.T.shape == found.T.shape
    assert 0 < reference.solver_seconds < reference.total_seconds


@pytest.mark.slow
@needs_cvxpy
def test_pairs_and_scales_through_scs() -> None:
    layers = [1e5 * w for w in weights([6, 8, 3])]
    Gy, Gz, n = problem(lb.from_weights(layers, activation="relu"))
    row = Gz[[0]] - Gz[[2]]
    found, reference = solve_dense(Gy, row, n), cvxpy_solver.solve(Gy, row, n, solver="scs")
    assert reference.raw_value == pytest.approx(math.sqrt(found.rho), rel=1e-4)
    assert smallest_rho(Gy, row, n, reference.T) == pytest.approx(found.rho, rel=1e-3)


@pytest.mark.slow
@needs_cvxpy
@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_a_solver_says_which_iteration_it_is_at(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvxpy_solver, "_POLL", 0.001)
    seen: list[str] = []
    form = lb.from_weights(weights([20, 24, 24, 5]), activation="relu")
    lb.lipsdp(form, solver=solver, progress=seen.append)
    most = {"clarabel": "200", "scs": "50000"}[solver]
    lines = [line for line in seen if f"{solver}: problem 1 of 1, iteration " in line]
    assert lines and all(f"of at most {most}, at most about " in line for line in lines), seen


@pytest.mark.parametrize(
    ("solver", "printed", "line"),
    [  # as the solvers print it
        ("scs", [" iter | pri res\n----\n     0| 1.91e+01", "   500| 1e-2  1e-3\n"], "500 of at most 9000"),
        ("clarabel", ["iter    pcost\n----\n  0   0.0000e+00", " 12  -1.1e+00  2e-3\n"], "12 of at most 200"),
    ],
)
def test_the_iteration_of_a_solver_is_told(
    solver: str, printed: list[str], line: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cvxpy_solver, "_POLL", 0.02)
    seen: list[str] = []
    command = [sys.executable, "-u", "-c", f"import time\nfor s in {printed}: print(s); time.sleep(0.5)"]
    with progress.reporting(seen.append):
        done = cvxpy_solver._watched(
            command, tmp_path, {"solver": solver, "options": {"max_iters": 9000}}, None
        )
    assert done is not None and done.returncode == 0 and len(seen) == 1
    assert seen[0].startswith(f"iteration {line}, at most about ") and seen[0].endswith(" left")
    assert (
        cvxpy_solver._watched(
            [command[0], "-c", "import time; time.sleep(60)"],
            tmp_path,
            {"solver": solver, "options": {}},
            0.1,
        )
        is None
    )


@needs_cvxpy
def test_an_interrupted_solver_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    class Popen(subprocess.Popen[str]):
        def __init__(self, *given: Any, **more: Any) -> None:
            super().__init__(*given, **more)
            started.append(self)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cvxpy_solver.subprocess, "Popen", Popen)
    monkeypatch.setattr(cvxpy_solver, "alive", interrupted)
    Gy, Gz, n = problem(lb.from_weights(weights([8, 10, 8, 3], 3), activation="relu"))
    with pytest.raises(KeyboardInterrupt):
        cvxpy_solver.solve(Gy, Gz, n)
    assert len(started) == 1 and started[0].returncode not in (None, 0)


@needs_cvxpy
def test_the_value_of_scs_is_not_a_bound() -> None:
    """With a loose tolerance SCS calls a number below the exact constant optimal; its T does not."""
    layers = [np.abs(w) for w in weights([8, 10, 8, 3], 3)]
    exact = np.linalg.norm(layers[2] @ layers[1] @ layers[0], 2)
    Gy, Gz, n = problem(lb.from_weights(layers, activation="relu"))
    reference = cvxpy_solver.solve(Gy, Gz, n, solver="scs", options={"eps_abs": 1e-4, "eps_rel": 1e-4})
    assert reference.status == "optimal" and reference.raw_value < exact * (1 - 1e-6)
    assert math.sqrt(smallest_rho(Gy, Gz, n, reference.T)) >= exact * (1 - 1e-12)


@pytest.mark.slow
@needs_cvxpy
def test_limits_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    Gy, Gz, n = problem(lb.from_weights(weights([10, 20, 20, 5]), activation="relu"))
    with pytest.raises(ValueError, match="did not finish within time_limit=0.2 s"):
        cvxpy_solver.solve(Gy, Gz, n, time_limit=0.2)
    with pytest.raises(ValueError, match="status 'user_limit'.*solver='recursion'"):
        cvxpy_solver.solve(Gy, Gz, n, options={"max_iter": 2})
    with pytest.raises(ValueError, match="network too large for clarabel: 40 neurons.*0.05 GB allowed"):
        cvxpy_solver.solve(Gy, Gz, n, memory=int(0.05 * 2**30))
    if cvxpy_solver.available_memory() is None:
        pytest.skip("this platform does not tell its memory")
    monkeypatch.setattr(cvxpy_solver, "memory_estimate", lambda *_: 0.0)
    with pytest.raises(ValueError, match="network too large for clarabel: 40 neurons.*recursion"):
        cvxpy_solver.solve(Gy, Gz, n, memory=int(0.03 * 2**30))


def test_without_cvxpy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "lipbounds\[sdp\]"'):
        cvxpy_solver.solve(*problem(FORMS["chain"]()))


def test_the_memory_estimate_grows_with_the_fourth_power() -> None:
    small, large = (cvxpy_solver.memory_estimate(k * 80, k * 20, k * 80, "clarabel") for k in (1, 2))
    assert 1.0 < small < 2.0  # 1.25 GB measured
    assert 14 < large / small < 17
    assert cvxpy_solver.memory_estimate(160, 40, 160, "scs") < large / 20


def test_a_prepared_problem_is_feasible_at_one() -> None:
    for name in FORMS:
        Gy, Gz, n = problem(FORMS[name]())
        ready = prepare(Gy, Gz, n)
        assert least_eigenvalue(ready.Gy, ready.Gz, n, np.ones(len(Gy)), 1.0) > 0
        assert (
            ready.rho0
            <= (lb.liplt(FORMS[name]()).value * matrix_inequality._SLACK ** (len(FORMS[name]().taps) + 1))
            ** 2
        )
