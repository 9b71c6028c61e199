"""Proofs on an accelerator, with the CPU in its place: sound in exact arithmetic, equal to the proofs of the host, and
refused where products are not IEEE products."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import exceeds, fractions
from stand_in import stand_in
from test_norms import matrices as adversarial
from test_zoo import CORE, form_of

import lipbounds as lb
from lipbounds._gain import device_blocks
from lipbounds._lipsdp import tap_proof
from lipbounds._norms import device as proofs
from lipbounds._norms import matrices as norms
from lipbounds._text import device as places

KIND = jax.devices("cpu")[0].device_kind
SAID = f"large proofs by residual in float64 on {KIND}"


__all__ = ["stand_in"]  # a fixture of every test here


def on_device(a: Any) -> float:
    with places.proofs_on("gpu") as notes:
        value = norms.verified_norm(a)
    assert notes == [SAID] or not np.asarray(a).any()
    return value


# --- norms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [180, pytest.param(900, marks=pytest.mark.slow)])
def test_a_norm_is_never_below_the_exact_one(count: int) -> None:
    for a in adversarial(count, seed=3):
        value = Fraction(on_device(a))
        assert value == 0 if not a.any() else exceeds(value, fractions(a))


def test_the_error_terms_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them some of the same matrices get a bound below their norm."""
    monkeypatch.setattr(proofs, "gamma", lambda n: 0.0)
    monkeypatch.setattr(proofs, "U", 0.0)
    monkeypatch.setattr(proofs, "_shortfall", lambda *args: 0.0)
    values = [(Fraction(on_device(a)), a) for a in adversarial(180, seed=3) if a.any()]
    assert sum(not exceeds(value, fractions(a)) for value, a in values) >= 3


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((3, 2), 8),
        ((40, 17), 8),
        ((70, 50), 8),
        pytest.param((150, 150), 64, marks=pytest.mark.slow),
        pytest.param((700, 520), 256, marks=pytest.mark.slow),
    ],
)
def test_norms_agree_with_the_host(
    shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "TILE", tile)
    a = np.random.default_rng(0).standard_normal(shape)
    assert on_device(a) == pytest.approx(norms.verified_norm(a), rel=1e-9)


@pytest.mark.slow
def test_norms_agree_with_the_host_up_to_2000(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "TILE", 512)
    for shape in ((2000, 1000), (2000, 2000)):
        a = np.random.default_rng(0).standard_normal(shape)
        exact = float(np.linalg.norm(a, 2))
        assert exact < on_device(a) <= exact * (1 + 1e-9)


# --- positive semidefinite matrices --------------------------------------------------------------------------------


def test_semidefinite_proofs_are_never_false() -> None:
    """Gram matrices of integers less a diagonal, near the edge: a proof only where the exact matrix is definite."""
    rng = np.random.default_rng(1)
    proved = 0
    for trial in range(300):
        n = int(rng.integers(2, 6))
        b = rng.integers(-3, 4, (n, n)).astype(float)
        b[0] = b[1] * (trial % 3 == 0) + b[0] * (trial % 3 != 0)  # singular, every third one
        m = b @ b.T
        scale = np.ldexp(1.0, rng.integers(-30, 31, n))
        below = float(rng.choice([0.0, 1e-16, 1e-14, 1e-10, 1e-3]))
        m = (m + np.eye(n) * (below - 1e-13 * (trial % 2))) * scale[:, None] * scale[None, :]
        with places.proofs_on("gpu"):
            found = tap_proof.prove_psd(m)
        exact = fractions(np.tril(m) + np.tril(m, -1).T)
        proved += found
        assert not found or semidefinite(exact)
        assert not found or tap_proof.prove_psd(m)  # what a device proves a host can prove
    assert proved > 100


def test_a_wrong_factor_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual decides: here the factor is that of the matrix with its eigenvalues' absolute values."""

    def root(m: Any) -> Any:
        values, vectors = np.linalg.eigh(np.asarray(m))
        return np.linalg.qr(np.sqrt(np.abs(values))[:, None] * vectors.T)[1]

    monkeypatch.setattr(proofs, "_root", root)
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    for low, expected in ((1e-3, True), (1e-9, True), (-1e-13, False), (-1e-9, False), (-1e-3, False)):
        m = (q * np.linspace(low, 1.0, 6)) @ q.T
        with places.proofs_on("gpu"):
            assert tap_proof.prove_psd((m + m.T) / 2) == expected


def semidefinite(m: list[list[Fraction]]) -> bool:
    """Positive definite, by exact elimination."""
    rows = [list(row) for row in m]
    for k in range(len(rows)):
        if rows[k][k] <= 0:
            return False
        for i in range(k + 1, len(rows)):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    return True


# --- the self-test -------------------------------------------------------------------------------------------------


def _single(c: Any, a: Any, b: Any) -> Any:
    return c + (a.astype(np.float32).T @ b.astype(np.float32)).astype(np.float64)


def _three_halves(c: Any, a: Any, b: Any) -> Any:
    """Three times the 8 bits of bfloat16, as in XLA's BF16_BF16_F32_X9, without its limit to the exponent."""

    def parts(x: np.ndarray) -> list[np.ndarray]:
        out = []
        for _ in range(3):
            mantissa, exponent = np.frexp(x)
            out.append(np.ldexp(np.round(mantissa * 256) / 256, exponent))
            x = x - out[-1]
        return out

    return c + sum(x.T @ y for x in parts(np.asarray(a)) for y in parts(np.asarray(b)))


def _slices(c: Any, a: Any, b: Any) -> Any:
    """Integers of 60 bits below the largest entry of a column, as emulated float64."""

    def cut(x: np.ndarray) -> np.ndarray:
        unit = np.ldexp(1.0, np.frexp(np.abs(x).max(axis=0, initial=1e-300))[1] - 60)
        return np.round(x / unit) * unit

    return c + cut(np.asarray(a)).T @ cut(np.asarray(b))


def _strassen(c: Any, a: Any, b: Any) -> Any:
    h = len(a) // 2
    x, y = np.asarray(a).T, np.asarray(b)
    p, q, r, s = x[:h, :h], x[:h, h:], x[h:, :h], x[h:, h:]
    e, f, g, k = y[:h, :h], y[:h, h:], y[h:, :h], y[h:, h:]
    m1, m2, m3, m4 = (p + s) @ (e + k), (r + s) @ e, p @ (f - k), s @ (g - e)
    m5, m6, m7 = (p + q) @ k, (r - p) @ (e + f), (q - s) @ (g + k)
    return c + np.block([[m1 + m4 - m5 + m7, m3 + m5], [m2 + m4, m1 - m2 + m3 + m6]])


@pytest.mark.parametrize("product", [_single, _three_halves, _slices, _strassen])
def test_other_products_fail_the_self_test_and_the_host_does_the_proof(
    product: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = form_of("relu")
    host = lb.liplt(form, device="cpu")
    monkeypatch.setattr(proofs, "plus", product)
    bound = lb.liplt(form, device="gpu")
    assert bound.value == host.value
    assert f"{KIND} failed the self-test of float64 products: proofs were done on the host" in bound.notes


# --- whole networks ------------------------------------------------------------------------------------------------


QUICK = ("linear", "maxmin_mlp")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in CORE]
)
def test_bounds_agree_with_the_host(name: str) -> None:
    form = form_of(name)
    for verb in (lb.naive, lb.liplt):
        host = verb(form, pairwise=True, device="cpu")
        found = verb(form, pairwise=True)
        assert SAID not in host.notes
        assert found.guarantee == host.guarantee
        assert found.value == pytest.approx(host.value, rel=1e-9)
        assert found.pairwise == pytest.approx(host.pairwise, rel=1e-9)


def test_blocks_are_proved_on_the_device_from_either_side() -> None:
    form = form_of("cnn_batch_norm")
    bound = lb.liplt(form)
    ways = {(part.source, part.target): part.how for part in bound.parts if part.target != "output"}
    assert set(ways.values()) == {"residual on a GPU"}
    assert {part.shape[0] > part.shape[1] for part in bound.parts} == {True, False}
    assert SAID in bound.notes


@pytest.mark.parametrize("outputs", [6, 3])
def test_a_step_that_reads_a_register_twice(outputs: int) -> None:
    """From the input, and back from the relu, which has fewer entries."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape) for shape in ((outputs, 6), (outputs, 6), (2, outputs)))
    with jax.enable_x64(True):
        wide, head = jnp.asarray(np.concatenate([0.01 * a, b], axis=1)), jnp.asarray(c)
        form = lb.trace(lambda x: head @ jax.nn.relu(wide @ jnp.concatenate([x, x])), jnp.zeros(6))
    (part,) = (p for p in lb.naive(form).parts if p.how == "residual on a GPU" and p.source == "input")
    assert part.value == pytest.approx(np.linalg.norm(0.01 * a + b, 2), rel=1e-5)


def test_blocks_without_a_centre_are_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """LipLT takes the naive bound's norms of the maps from one layer to the next, with their factor."""
    calls = []
    original = device_blocks._norm
    monkeypatch.setattr(device_blocks, "_norm", lambda *args: calls.append(args) or original(*args))
    rng = np.random.default_rng(0)
    form = lb.from_weights([rng.standard_normal((m, n)) for n, m in itertools.pairwise((3, 4, 5, 6, 2))])
    naive = lb.naive(form)
    assert len(calls) == 3
    bound = lb.liplt(form)
    assert len(calls) == 3 + 3 + 3  # the naive bound's again, and those that pass over layers
    halves = {(part.source, part.target): part.value for part in bound.parts}
    for part in naive.parts:
        if part.source != "input" and part.target != "output":
            assert halves[part.source, part.target] == part.value / 2


@pytest.mark.parametrize("power", [30, 44])
def test_a_large_part_that_cancels_is_left_to_the_host(power: int) -> None:
    """(C y + a y) - C y: blocks are rounded to multiples of C 2**-52, and no bound may be below the norm of a."""
    rng = np.random.default_rng(0)
    for _ in range(6):
        a = rng.standard_normal((2, 2))

        def f(x: Any, a: Any = a) -> Any:
            y = jax.nn.relu(x)
            return jax.nn.relu((y * 2.0**power + jnp.asarray(a) @ y) - y * 2.0**power)

        with jax.enable_x64(True):
            form = lb.trace(f, np.zeros(2))
        value = lb.naive(form).value
        assert value >= np.linalg.norm(a, 2) * (1 - 1e-15)
        assert value <= lb.naive(form, device="cpu").value * (1 + 1e-9)


def test_lipsdp_agrees_and_its_certificate_holds_on_the_host(tmp_path: Any) -> None:
    form = form_of("relu")
    host = lb.lipsdp(form, pairwise=True, device="cpu")
    found = lb.lipsdp(form, pairwise=True)
    assert found.value == pytest.approx(host.value, rel=1e-7)
    assert SAID in found.notes
    lb.save_certificate(found, tmp_path / "net.certificate")
    with places.proofs_on("cpu"):
        assert lb.verify_certificate(tmp_path / "net.certificate", form)


@pytest.mark.parametrize("guarantee", ["auto", "verified"])
def test_norms_that_are_kept_name_the_device_that_proved_them(guarantee: Any) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((b, a)) for a, b in itertools.pairwise((6, 9, 8, 3))]
    form = lb.from_weights(weights, activation="relu")
    assert SAID in lb.liplt(form, guarantee=guarantee).notes
    assert SAID in lb.liplt(form, guarantee=guarantee).notes
    assert SAID in lb.liplt(form, guarantee=guarantee, device="cpu").notes  # proved before, on the device
    other = lb.from_weights(weights, activation="relu")
    assert SAID not in lb.liplt(other, guarantee=guarantee, device="cpu").notes


def test_little_memory_on_the_device_means_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of("relu")
    monkeypatch.setattr(proofs, "free_bytes", lambda device: 100)
    bound = lb.liplt(form)
    assert SAID not in bound.notes
    assert bound.value == lb.liplt(form, device="cpu").value


def test_a_budget_limits_the_device_too() -> None:
    form = form_of("cnn_batch_norm")
    host = device_blocks.HostForm(form)
    needs = {(part.source, part.target): part.how for part in lb.liplt(form, memory="200 kB").parts}
    for (source, target), how in needs.items():
        if target != "output":
            pair = tuple(() if end == "input" else (int(end.split("[")[1][:-1]),) for end in (source, target))
            assert ("GPU" in how) == (device_blocks._need(host, pair) <= 200_000)  # type: ignore[arg-type]
    assert len({"GPU" in how for how in needs.values()}) == 2


def test_an_error_of_the_device_means_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    form = form_of("relu")
    monkeypatch.setattr(proofs, "plus", fail)
    monkeypatch.setattr(proofs, "_passed", {jax.devices("cpu")[0]: True})
    bound = lb.liplt(form)
    assert bound.value == lb.liplt(form, device="cpu").value
    assert any("was done on the host (RESOURCE_EXHAUSTED" in note for note in bound.notes)


def test_the_choice_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of("relu")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or 'gpu', got 'tpu'"):
        lb.liplt(form, device="tpu")  # type: ignore[arg-type]
    monkeypatch.undo()
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="JAX has no GPU"):
            lb.liplt(form, device="gpu")
        assert not any("float64 on" in note for note in lb.liplt(form).notes)
