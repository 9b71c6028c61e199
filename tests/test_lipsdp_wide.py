"""LipSDP of chains with wide layers: the search, its gradient, and its proof against exact arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from exact_certificate import PRECISION, positive
from flint import arb, ctx

import lipbounds as lb
from lipbounds._lipsdp import search as engines
from lipbounds._lipsdp import wide, wide_proof, wide_search
from lipbounds._lipsdp.certificate import check as check_certificate
from lipbounds._lipsdp.chain import Chain, chain, cores, operations
from lipbounds._lipsdp.proof import Infeasible
from lipbounds._lipsdp.solvers import Recursion
from lipbounds._lipsdp.task import Answer, Task
from lipbounds._lipsdp.wide_arithmetic import Accelerator, Host
from lipbounds._norms import bordered, schur
from lipbounds._norms import device as proofs
from lipbounds._norms.enclosures import Enclosure
from lipbounds._text import device as places

SHAPES = [(3, 5, 2, 6, 2), (5, 2, 4, 3, 3), (2, 3, 4, 5, 2), (6, 5, 4, 3, 2), (4, 3, 1)]


class Exact64(Host):
    """The host's arithmetic in float64."""

    dtype = np.float64


def dense_chain(widths: tuple[int, ...], seed: int, spread: float = 0.0) -> Chain:
    rng = np.random.default_rng(seed)
    maps = []
    for n, m in itertools.pairwise(widths):
        w = rng.standard_normal((m, n)) / math.sqrt(n)
        w *= np.exp(spread * rng.standard_normal((m, 1))) * np.exp(spread * rng.standard_normal(n))
        maps.append(Enclosure(w if seed % 2 else sp.csr_array(w)))
    return Chain(tuple(maps), tuple(np.arange(n) for n in widths[1:-1]), False)


def multipliers(own: Chain, seed: int) -> tuple[np.ndarray, ...]:
    """Feasible ones, near the edge where s is small."""
    search = wide_search.Search(own, cores(own.widths, own.outputs), Exact64())
    rng = np.random.default_rng(seed)
    x = 0.3 * rng.standard_normal(search.size)
    x[sum(search.widths[1:]) :] = rng.uniform(-3, 1, search.count - 1)
    for _ in range(30):  # the eigenvectors converge
        passed = search.forward(x)
    assert passed is not None
    return search.inverse_multipliers(passed)


def holds(
    own: Chain, maps: list[np.ndarray], D: tuple[np.ndarray, ...], matrix: np.ndarray, scale: int
) -> bool:
    """Whether [[Q, W'], [W, S]] >= 0 for T = 1 / fl(sqrt(D) / 2)^2 was decided in balls, for these W exactly."""
    ctx.prec = PRECISION
    s = [[arb(1)] * own.widths[0], *([arb(float(v)) for v in np.sqrt(d) / 2] for d in D)]
    starts = np.cumsum([0, *own.widths, own.outputs])
    rows = [[arb(0)] * int(starts[-1]) for _ in range(int(starts[-1]))]
    for k, each in enumerate(s):
        for i, v in enumerate(each):
            rows[starts[k] + i][starts[k] + i] = 1 / v**2
    for k, m in enumerate(maps):
        for i, row in enumerate(m):
            for j, w in enumerate(row):
                at, to = int(starts[k + 1] + i), int(starts[k] + j)
                entry = -arb(float(w)) if k + 1 == len(maps) else -arb(float(w)) / (2 * s[k + 1][i] ** 2)
                rows[at][to] = rows[to][at] = entry
    for i, j in itertools.product(range(own.outputs), repeat=2):
        rows[starts[-2] + i][starts[-2] + j] = arb(float(matrix[i, j])) * arb(2) ** scale
    return positive(rows)


def written(m: Enclosure) -> np.ndarray:
    array = m.with_error()[0]
    return array.toarray() if sp.issparse(array) else np.asarray(array)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is the accelerator unless device="cpu"; small tiles."""
    monkeypatch.setattr(
        places, "accelerator", lambda choice: None if choice == "cpu" else jax.devices("cpu")[0]
    )
    monkeypatch.setattr(proofs, "TILE", 8)
    monkeypatch.setattr(proofs, "SMALLEST", 1)
    monkeypatch.setattr(proofs, "_passed", {})


# --- the proof -------------------------------------------------------------------------------------------------------


def cases(count: int) -> Iterator[tuple[Chain, tuple[np.ndarray, ...]]]:
    for seed in range(count):
        own = dense_chain(SHAPES[seed % len(SHAPES)], seed, spread=[0.0, 2.0][seed // len(SHAPES) % 2])
        yield own, multipliers(own, seed)


def check(own: Chain, D: tuple[np.ndarray, ...]) -> bool:
    matrix, scale = wide_proof.propagate_chain(own, D)
    return holds(own, [written(m) for m in own.maps], D, matrix, scale)


def test_what_is_proved_holds_in_exact_arithmetic() -> None:
    assert all(check(own, D) for own, D in cases(20))


def test_what_a_device_proves_holds_in_exact_arithmetic(stand_in: None) -> None:
    with places.proofs_on("gpu") as notes:
        assert all(check(own, D) for own, D in cases(10))
    assert notes and "by residual" in notes[0]


def test_the_error_terms_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bordered, wide_proof):
        monkeypatch.setattr(module, "gamma", lambda n: 0.0)
        monkeypatch.setattr(module, "U", 0.0)
    monkeypatch.setattr(schur, "cholesky_shift", lambda n: 0.0)
    monkeypatch.setattr(bordered, "usual_error", lambda widths: 2.0**-60)
    broken = sum(not check(own, D) for own, D in cases(20))
    assert broken >= 3, "rounding does no harm here: the tests above show nothing"


def test_a_second_attempt_gives_away_what_the_errors_take_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = dense_chain((5, 9, 4, 8, 6, 3), seed=1)
    tried: list[tuple[float, float]] = []
    attempt = wide_proof._attempt

    def watched(*args: Any) -> Any:
        found = attempt(*args)
        tried.append((args[-1], math.inf if found is None else found[1]))
        return found

    monkeypatch.setattr(wide_proof, "_attempt", watched)
    monkeypatch.setattr(bordered, "usual_error", lambda widths: 1e-15)
    assert check(own, multipliers(own, 1))
    (first, missed), (second, need) = tried
    assert first < missed and need <= second <= 1.06 * missed
    assert (1.0 - second) + second == 1.0 and Fraction(1.0 - second) == 1 - Fraction(second)


def test_tiny_slopes_of_both_signs_are_no_chain() -> None:
    """The product of the two ends underflows; as slopes of one sign they prove 1.414e-170 for a slope of 2e-170."""
    with jax.enable_x64(True):
        into, out = jnp.ones((2, 1)), jnp.array([[1.0, -1.0]])

        def act(y: jax.Array) -> jax.Array:
            return jnp.where(y > 0, 1e-170 * y, -1e-170 * y)

        form = lb.trace(lambda x: out @ act(into @ x + jnp.array([3.0, -3.0])), jnp.zeros(1))
        slope = abs(float(jax.grad(lambda x: form.evaluate(x, jnp.float64)[0])(jnp.zeros(1))[0]))
    assert slope == pytest.approx(2e-170)
    with pytest.raises(ValueError, match="both signs"):
        chain(form)


@pytest.mark.parametrize("exponent", [500, 1020])
def test_weights_at_the_end_of_the_range_are_not_lost(exponent: int) -> None:
    """The power of two that brings N into range must not push small multipliers below the normal range."""
    maps = tuple(
        Enclosure(np.array(m)) for m in ([[2.0**-200], [2.0**-140]], [[2.0**exponent, 2.0**exponent]])
    )
    own, s = Chain(maps, (np.arange(2),), False), np.array([2.0**-200, 2.0**-140])
    slope = math.ldexp(2.0**-140 + 2.0**-200, exponent)
    first = Chain((maps[0], Enclosure(np.array([[2.0**exponent, 0.0]]))), (np.arange(2),), False)
    for each, least in ((own, slope), (first, math.ldexp(1.0, exponent - 200))):
        try:
            matrix, scale = wide_proof.propagate_chain(each, (4 * s * s,))
        except Infeasible:
            assert exponent > 1000
            continue
        assert math.ldexp(math.sqrt(matrix[0, 0]), scale // 2) >= least


def test_a_linear_network_has_no_proof_by_a_chain() -> None:
    form = lb.from_weights([np.eye(2)])
    made = lb.lipsdp(form).certificate
    claimed = replace(made, proofs=(replace(made.proofs[0], D=(), kind="chain"),))
    with pytest.raises(lb.CertificateError, match="linear network"):
        check_certificate(claimed, form)


@pytest.mark.parametrize("part", range(5))
def test_maps_that_are_not_known_exactly_are_covered(part: int) -> None:
    """S covers the worst of the maps within the error: E along the vectors that the others stretch most."""
    own = dense_chain((3, 5, 2, 6, 2), 4)
    D = multipliers(own, 1)
    part = min(part, len(own.maps) - 1)
    size, error = written(own.maps[part]), 1e-6
    maps = list(own.maps)
    maps[part] = Enclosure(size, error)
    matrix, scale = wide_proof.propagate_chain(Chain(tuple(maps), own.active, False), D)
    exact, base = wide_proof.propagate_chain(own, D)
    assert np.linalg.eigvalsh(np.ldexp(matrix, scale) - np.ldexp(exact, base))[0] > 0
    rng = np.random.default_rng(0)
    for _ in range(6):
        e = np.outer(rng.standard_normal(size.shape[0]), rng.standard_normal(size.shape[1]))
        for sign in (1, -1):
            real = [written(m) for m in own.maps]
            real[part] = size + sign * 0.999 * error * e / np.linalg.norm(e)
            assert holds(own, real, D, matrix, scale)


def test_multipliers_beyond_the_edge_prove_nothing() -> None:
    own = dense_chain((3, 5, 2, 6, 2), 4)
    D = multipliers(own, 1)
    for k in range(len(D)):
        less = [d * (1e-2 if k == place else 1.0) for place, d in enumerate(D)]
        with pytest.raises(Infeasible, match="positive definite|singular"):
            wide_proof.propagate_chain(own, less)
    with pytest.raises(Infeasible, match="range"):
        wide_proof.propagate_chain(own, [D[0] * 1e200, *D[1:]])


def test_a_border_of_tiles_that_stay_zero_is_proved_like_a_dense_one(stand_in: None) -> None:
    """Cores far apart share no tile: the factor of the device skips them, and agrees with the host's."""
    rng = np.random.default_rng(0)
    widths = (20, 3, 17, 9, 4)
    diagonal = [np.eye(n) for n in widths[:-1]]
    couplings = [0.25 * rng.standard_normal((m, n)) / math.sqrt(n) for n, m in itertools.pairwise(widths)]
    host = bordered._on_host(diagonal, couplings)
    there = bordered.on_accelerator(diagonal, couplings, jax.devices("cpu")[0])
    assert host is not None and there is not None
    np.testing.assert_allclose(host[0], there[0], rtol=1e-12)
    assert max(there[1]) < 1e-12 and max(host[1]) < 1e-11
    assert (
        bordered.on_accelerator([d - 2 * np.eye(len(d)) for d in diagonal], couplings, jax.devices("cpu")[0])
        is None
    )


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", SHAPES)
def test_the_gradient_is_that_of_differences(widths: tuple[int, ...]) -> None:
    own = dense_chain(widths, 3)
    search = wide_search.Search(own, cores(own.widths, own.outputs), Exact64())
    rng = np.random.default_rng(0)
    x, e = 0.3 * rng.standard_normal(search.size), 1e-5
    objectives = [wide_search.network]
    if own.outputs > 1:
        objectives += [wide_search.pairs_of(kind) for kind in ("mean", "largest")]

    def value(x: np.ndarray, objective: Any) -> float:
        for _ in range(4):
            passed = search.forward(x)
        assert passed is not None
        return objective(passed.sigma)[0]

    for _ in range(60):
        passed = search.forward(x)
    assert passed is not None
    for objective in objectives:
        g = search.backward(passed, objective(passed.sigma)[1])
        d = rng.standard_normal(search.size)
        slope = (value(x + e * d, objective) - value(x - e * d, objective)) / (2 * e)
        assert g @ d == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("widths", [(3, 9, 4, 8, 2, 2), (5, 4, 3, 2), (7, 7, 7, 3), (2, 8, 1)])
def test_the_cores_are_those_of_least_work(widths: tuple[int, ...]) -> None:
    inner, outputs, count = widths[:-1], widths[-1], len(widths) - 1

    def allowed(chosen: tuple[int, ...]) -> bool:
        left = [k for k in range(count) if k not in chosen]
        return bool(chosen) and all(b > a + 1 for a, b in itertools.pairwise(left))

    def work(chosen: tuple[int, ...]) -> float:
        total, before = 0.0, 0
        for n in [*(inner[j] for j in chosen), 0]:
            n = n or outputs
            total += (n**3 * 2 / 3 if n is not outputs else 0) + 2.0 * before * n * (before + n)
            before = n
        return total

    every = [c for r in range(1, count + 1) for c in itertools.combinations(range(count), r) if allowed(c)]
    assert allowed(cores(inner, outputs))
    assert work(cores(inner, outputs)) <= min(map(work, every)) * (1 + 1e-12)


# --- the engine ------------------------------------------------------------------------------------------------------


def network(activation: Any = jax.nn.relu, side: int = 6) -> lb.LureForm:
    """Convolutions with strides and padding, widths 72-180-27-54-12, three outputs."""
    rng = np.random.default_rng(0)
    shapes = ((3, 3, 2, 5), (3, 3, 5, 3), (3, 3, 3, 6))
    kernels = [(rng.standard_normal(s) / math.sqrt(np.prod(s[:-1]))).astype(np.float32) for s in shapes]
    plan = ((1, "SAME"), (2, "SAME"), (1, [(1, 1), (1, 1)]))
    dense = [(rng.standard_normal(s) / math.sqrt(s[0])).astype(np.float32) for s in ((54, 12), (12, 3))]

    def fn(x: Any) -> Any:
        for kernel, (stride, padding) in zip(kernels, plan, strict=True):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x[None], kernel, (stride,) * 2, padding, dimension_numbers=numbers
            )[0]
            x = activation(x)
        return activation(x.ravel() @ dense[0]) @ dense[1]

    return lb.trace(fn, jax.ShapeDtypeStruct((side, side, 2), jnp.float32))


def by_chain(form: lb.LureForm, steps: int, pairwise: bool = True) -> Answer:
    return wide.by_chain(Task(form, 2, "auto", 0, False), Recursion(iterations=steps), pairwise)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as wide."""
    monkeypatch.setattr(engines, "DENSE", 1)
    monkeypatch.setattr(engines, "TAIL", 1)


def test_a_convolutional_network_lies_between_the_optimum_and_liplt(forced: None, tmp_path: Path) -> None:
    form = network()
    assert chain(form).widths == (72, 180, 27, 54, 12)
    how = lb.Recursion(iterations=6)
    bound, other = lb.lipsdp(form, pairwise=True, solver=how), lb.liplt(form, pairwise=True)
    assert bound.guarantee == "verified" and any("of 5 layers" in note for note in bound.notes)
    assert bound.value < 0.7 * other.value and (bound.pairwise <= other.pairwise).all()
    lb.save_certificate(bound, tmp_path / "c")
    assert lb.verify_certificate(tmp_path / "c", form)
    assert {proof.kind for proof in bound.certificate.proofs} == {"chain"}


@pytest.mark.slow
def test_it_comes_near_the_optimum() -> None:
    form = network()
    exact = lb.lipsdp(form, pairwise=True, progress=False)
    found = by_chain(form, 60)
    assert lb.empirical(form, seed=0).value <= min(f.constants.value for f in found.found)
    assert exact.value * (1 - 1e-6) <= min(f.constants.value for f in found.found) <= 1.05 * exact.value
    i, j = np.triu_indices(3, 1)
    ratio = np.min([f.constants.pairwise for f in found.found], axis=0)[i, j] / exact.pairwise[i, j]
    # one search for all pairs, the exact ones have their own
    assert ratio.min() >= 1 - 1e-6 and ratio.max() <= 1.2


def test_a_device_proves_the_same(stand_in: None) -> None:
    form = lb.from_weights([written(m) for m in dense_chain((3, 20, 5, 12, 3), 1).maps])
    values = []
    for where in ("cpu", "gpu"):
        with places.proofs_on(where):
            found = by_chain(form, 1, pairwise=False).found
        assert [f.constants.guarantee for f in found] == ["verified"]
        values.append([f.constants.value for f in found])
    np.testing.assert_allclose(*values, rtol=1e-3)  # the host searches in float32


def test_weights_of_any_size_are_searched() -> None:
    layers = [written(m) for m in dense_chain((3, 20, 5, 12, 3), 1).maps]
    usual = by_chain(lb.from_weights(layers), 3).found[0].constants.value
    for scales in ((1e30, 1.0, 1.0, 1.0), (1e-20, 1e-20, 1.0, 1e-20)):
        form = lb.from_weights([w * s for w, s in zip(layers, scales, strict=True)])
        found = by_chain(form, 3).found[0].constants.value
        assert found == pytest.approx(usual * math.prod(scales), rel=1e-2)


def test_slopes_that_do_not_reach_0_are_widened_and_others_refused() -> None:
    layers = [written(m) for m in dense_chain((3, 20, 5, 12, 3), 1).maps]

    def of(activation: str) -> Answer:
        return by_chain(lb.from_weights(layers, activation=activation), 2, pairwise=False)

    relu, leaky, sigmoid = (of(name) for name in ("relu", "leaky_relu", "sigmoid"))
    assert "slopes were widened to reach 0" in leaky.notes
    assert "slopes were widened to reach 0" not in relu.notes + sigmoid.notes
    values = [answer.found[0].constants.value for answer in (relu, leaky, sigmoid)]
    assert values[1] == values[0] and values[2] == pytest.approx(values[0] / 4**3, rel=1e-3)
    with pytest.raises(ValueError, match="both signs"):
        of("gelu")


def test_a_residual_network_is_bounded_as_before(forced: None) -> None:
    w = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    form = lb.trace(lambda x: x + w @ jax.nn.relu(w @ x), jnp.zeros(4))
    with pytest.raises(ValueError, match="passes by an activation"):
        by_chain(form, 2)
    bound = lb.lipsdp(form, solver=lb.Recursion(iterations=2))
    assert bound.guarantee == "verified" and any("passes by an activation" in note for note in bound.notes)


def test_dead_neurons_have_no_multiplier() -> None:
    layers = [np.array(written(m)) for m in dense_chain((3, 6, 4, 5, 3), 1).maps]
    layers[0][2] = 0.0
    layers[2][:, 1] = 0.0
    form = lb.from_weights(layers)
    assert chain(form).widths == (3, 5, 3, 5) and by_chain(form, 2).found
    layers[1][:] = 0.0
    with pytest.raises(ValueError, match="no neuron"):
        by_chain(lb.from_weights(layers), 2)


def test_too_little_memory_or_time_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    form = network()
    task = Task(form, 2, "auto", 0, False)
    with pytest.raises(
        ValueError, match="layers of 72, 180, 27, 54, 12 neurons take .* and 1.0 kB are there"
    ):
        wide.by_chain(task, Recursion(), True, 1000)
    monkeypatch.setattr(wide, "_WORK_HOST", 1.0)
    with pytest.raises(ValueError, match="on two cores"):
        wide.by_chain(task, Recursion(), True)
    work, held = operations((3072, 32768, 8192, 16384, 4096, 4096, 1024, 512), 10, (0, 2, 4, 6))
    assert work < 3e12 and held < 4e9  # 6C2F of the CRM paper


def test_accelerator_and_host_search_alike() -> None:
    own = dense_chain((3, 20, 5, 12, 3), 1)
    there, values = jax.devices("cpu")[0], []
    with proofs.exactly():
        for arithmetic in (Exact64(), Accelerator(there)):
            search = wide_search.Search(own, cores(own.widths, own.outputs), arithmetic)
            passed = search.forward(np.zeros(search.size))
            assert passed is not None
            value, weight = wide_search.network(passed.sigma)
            values.append((value, search.backward(passed, weight)))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-9)
    np.testing.assert_allclose(values[0][1], values[1][1], rtol=1e-6, atol=1e-9)


def test_a_layer_that_hardly_moves_has_multipliers() -> None:
    """The vector of its power iteration becomes zero."""
    own = dense_chain((2, 3, 2), 0)
    search = wide_search.Search(own, cores(own.widths, own.outputs), Exact64())
    tap = search._tap(1, np.zeros(3), 0.0, lambda v: 1e-200 * v)
    assert np.isfinite(tap.T).all() and np.isfinite(tap.share).all()
