"""Blocks too large for one dense proof: every way gives a bound, and one that fails hands over to the next."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gain import dense_gain, form_of

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds._gain import step_paths, wide_blocks
from lipbounds._gain.products import BlockProduct
from lipbounds._norms import lanczos
from lipbounds._norms.enclosures import Enclosure
from lipbounds._triangle import recursion


def low_rank(n: int, r: int, layers: int = 1, outputs: int = 2) -> tuple[LureForm, list[np.ndarray]]:
    """relu(U V relu(U V ... x)) with its last entries as outputs, and the matrices as r x r cores' factors."""
    rng = np.random.default_rng(0)
    factors = [
        (rng.standard_normal((n, r)).astype(np.float32), rng.standard_normal((r, n)).astype(np.float32))
        for _ in range(layers)
    ]
    scale = np.float32(1 / np.sqrt(n))

    def f(x: Any) -> Any:
        for u, v in factors:
            x = jax.nn.relu((u * scale) @ ((v * scale) @ x))
        return x[:outputs]

    form = lb.trace(f, jax.ShapeDtypeStruct((n,), np.float32))
    # the other neurons of the last layer are not read
    factors[-1] = (
        factors[-1][0][:outputs],
        factors[-1][1],
    )
    roots = [np.linalg.qr(u * scale)[1].astype(float) @ np.linalg.qr((v * scale).T)[1].T for u, v in factors]
    return form, [float(np.linalg.norm(root, 2)) for root in roots]


def test_golub_kahan_waits_for_the_norm_to_show() -> None:
    """On a wide map of low rank the first alpha are far below the norm: noise is relative to what came since."""
    n, r = 20_000, 2
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((n, r)), rng.standard_normal((r, n))
    exact = float(np.linalg.norm(np.linalg.qr(u)[1] @ np.linalg.qr(v.T)[1].T, 2))
    upper, lower, steps = lanczos.golub_kahan(
        lambda x: u @ (v @ x), lambda y: v.T @ (u.T @ y), n, failure=1e-10
    )
    assert exact * (1 - 1e-9) <= upper <= exact * 1.001
    assert lower <= exact * (1 + 1e-9) and steps < 10


def test_lanczos_waits_for_the_norm_to_show() -> None:
    n, r = 20_000, 2
    rng = np.random.default_rng(1)
    u = rng.standard_normal((r, n))
    exact = float(np.linalg.norm(u, 2))
    start = rng.standard_normal((1, n))
    (upper,) = lanczos.lanczos_columns(lambda x: (x @ u.T) @ u, start, failure=1e-10, rtol=1e-3, max_steps=40)
    assert exact * (1 - 1e-9) <= upper <= exact * 1.001


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("n", "r", "layers"), [(20_000, 2, 3), (9_000, 16, 1)])
def test_low_rank_blocks_are_verified_through_their_thin_side(n: int, r: int, layers: int) -> None:
    form, sizes = low_rank(n, r, layers)
    bound = lb.naive(form, device="cpu")
    assert bound.guarantee == "verified" and bound.failure_probability == 0.0
    inner = [part for part in bound.parts if part.target != "output"]
    assert len(inner) == layers
    for part, exact in zip(inner, sizes, strict=True):
        assert part.how == f"Cholesky through {r} entries"
        assert exact * (1 - 1e-5) <= part.value <= exact * (1 + 1e-5)
    free = lb.naive(form, guarantee="probabilistic")
    assert free.guarantee == "probabilistic" and bound.value <= free.value * (1 + 1e-6)
    assert free.value <= bound.value * 1.004
    assert lb.liplt(form).value <= bound.value


def test_proofs_that_are_asked_for_take_a_narrow_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    form, _ = low_rank(60, 4)
    dense = lb.naive(form, guarantee="verified")
    monkeypatch.setattr(recursion, "DENSE_LIMIT", 20)
    cut = lb.naive(form, guarantee="verified")
    assert [part.how for part in (*dense.parts, *cut.parts)].count("Cholesky through 4 entries") == 1
    assert cut.parts[0].how == "Cholesky through 4 entries" and cut.guarantee == "verified"
    assert cut.value == pytest.approx(dense.value, rel=1e-6)
    for norm in (1, np.inf):
        assert lb.naive(form, norm=norm, guarantee="verified").guarantee == "verified"


def test_product_norm_holds_and_is_tight() -> None:
    rng = np.random.default_rng(0)
    for m, r, n in ((30, 3, 40), (8, 8, 8), (50, 1, 9), (7, 20, 6)):
        for size in (1.0, 1e-60, 1e60):
            u, v = rng.standard_normal((m, r)), size * rng.standard_normal((r, n))
            eu, ev = 1e-3 * rng.standard_normal((m, r)), 1e-3 * size * rng.standard_normal((r, n))
            value, guess = wide_blocks.product_norm(Enclosure(u), Enclosure(v))
            exact = float(np.linalg.norm(u @ (v / size), 2)) * size
            assert exact * (1 - 1e-12) <= value <= exact * (1 + 1e-6)
            assert guess == pytest.approx(exact, rel=1e-6)
            errors = [float(np.linalg.norm(e)) * (1 + 1e-12) for e in (eu, ev)]
            value, _ = wide_blocks.product_norm(Enclosure(u, errors[0]), Enclosure(v, errors[1]))
            assert value >= float(np.linalg.norm((u + eu) @ ((v + ev) / size), 2)) * size


@pytest.mark.parametrize("name", ["two_branches", "u_net", "relu"])
def test_every_way_bounds_every_block(name: str) -> None:
    """Each way on its own, on all blocks of the zoo, against the dense gain."""
    form = form_of(name)
    host = recursion.host_form(form)
    scalings = recursion.loop_transform(form, 2, centred=True)
    truth = dense_gain(form, scalings)
    ways = {
        "cut": partial(wide_blocks._by_cut, host),
        "proof": partial(wide_blocks._by_proof, host),
        "steps": lambda *pair, limit: wide_blocks.Bound(
            step_paths.product_of_steps(host, *pair), "verified", ""
        ),
        "free": lambda *pair, limit: wide_blocks._by_golub_kahan(host, *pair, 0, 1e-9, 300),
    }
    used = set()
    for nodes in recursion.partitions(form):
        for source, target in recursion.structure(host, nodes, scalings):
            parts: list[Any] = [(j,) for j in source] if source else [()]
            block = np.block([[truth.get((p, (k,)), 0) for p in parts] for k in target])
            exact = float(np.linalg.norm(block, 2))
            for way, bound in ways.items():
                found = bound(source, target, scalings, limit=2**30)
                if found is not None:
                    used.add(way)
                    assert found.value >= exact * (1 - 1e-9), (way, source, target)
                    assert way == "steps" or found.value <= exact * 1.002 + 1e-12
    assert used >= {"proof", "steps", "free"}


def test_a_way_that_fails_hands_over(monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of("cnn_batch_norm")
    truth = lb.liplt(form, pairwise=True)
    monkeypatch.setattr(recursion, "DENSE_LIMIT", 3)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("failure is too small for products")

    monkeypatch.setattr(wide_blocks, "golub_kahan", refuse)
    monkeypatch.setattr(wide_blocks, "Starts", refuse)
    monkeypatch.setattr(wide_blocks, "_by_cut", refuse)
    proved = lb.liplt(form, pairwise=True)
    assert proved.guarantee == "verified" and proved.value == pytest.approx(truth.value, rel=1e-9)
    monkeypatch.setattr(wide_blocks, "_by_proof", refuse)
    recursion._HOSTS.clear()  # what was found of the form
    product = lb.liplt(form, pairwise=True)
    assert product.guarantee == "verified" and product.value >= truth.value * (1 - 1e-12)
    assert "product of steps" in {part.how for part in product.parts}
    limited = lb.naive(form, memory="100 MB", guarantee="probabilistic")
    assert limited.guarantee == "verified" and limited.value >= lb.naive(form).value * (1 - 1e-12)


def test_a_cut_is_found_only_where_everything_passes_it() -> None:
    n, r = 200, 5
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((n, r)), rng.standard_normal((r, n))
    plain = lb.trace(lambda x: jax.nn.relu(u @ (v @ x)), np.zeros(n, np.float32))
    past = lb.trace(lambda x: jax.nn.relu(u @ (v @ x) + x), np.zeros(n, np.float32))
    for form, width in ((plain, r), (past, None)):
        host = recursion.host_form(form)
        scalings = recursion.loop_transform(form, 2, centred=True)
        cut = wide_blocks.narrow_cut(host, (), (0,), scalings)
        assert (None if cut is None else sum(host.program.sizes[i] for i in cut[1])) == width
    assert lb.naive(plain).value == pytest.approx(np.linalg.norm(u @ v, 2), rel=1e-5)
    assert jnp.allclose(plain(np.ones(n, np.float32)), jax.nn.relu(u @ v.sum(1)), rtol=1e-3)


@pytest.mark.parametrize("seed", [0, 2])
def test_random_norms_keep_the_order_of_naive_and_liplt(seed: int) -> None:
    """Sorts have centre 0, so that both are the same sum of the same norms; these seeds broke the order."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape).astype(np.float32) for shape in ((30, 20), (30, 30), (5, 30))]

    def network(x: jax.Array) -> jax.Array:
        for w in weights[:-1]:
            x = jnp.sort((w @ x).reshape(-1, 2), axis=1).ravel()
        return weights[-1] @ x

    form = lb.trace(network, jnp.ones(20))
    naive, liplt = (verb(form, guarantee="probabilistic", seed=seed) for verb in (lb.naive, lb.liplt))
    assert liplt.value <= naive.value and naive.failure_probability <= liplt.failure_probability <= 1e-9


# --- the rounding of matrix-free products --------------------------------------------------------------------------


def cancelling(c: np.ndarray, a: np.ndarray) -> LureForm:
    """relu((C x + a x) - C x), its constants put in after tracing, where the check of values would refuse them."""
    ones = np.ones(c.size)
    with jax.enable_x64(True):
        form = lb.trace(lambda x: jax.nn.relu((2 * ones * x + 3 * ones * x) - 4 * ones * x), ones)
    values = {2.0: c, 3.0: a, 4.0: c}
    return replace(form, consts=tuple(values.get(float(np.ravel(k)[0]), k) for k in form.consts))


def _by_products(form: LureForm, seed: int = 0) -> wide_blocks.Bound | None:
    host, scalings = recursion.host_form(form), recursion.loop_transform(form, 2, centred=True)
    return wide_blocks._by_golub_kahan(host, (), (0,), scalings, seed, 1e-9, 300)


@pytest.mark.parametrize("power", [20, 26, 32, 44, 56])
def test_products_that_cancel_are_no_bound_without_their_rounding(power: int) -> None:
    """||diag(a)|| = 1 in exact arithmetic; at C = 2^56 all but the first entry vanishes in every float64 product."""
    n = 40
    c, a = np.full(n, 2.0**power), np.linspace(0.5, 1.0, n)
    c[0], a[0] = 0.0, 1e-3
    form = cancelling(c, a)
    found = None
    try:
        found = _by_products(form)
    except ValueError as error:
        assert "too small for products accurate to" in str(error)
    assert found is None or 1.0 <= found.value <= 1.02
    assert (found is None) == (power > 32)
    limited = lb.naive(form, guarantee="probabilistic")  # the next way takes over
    assert limited.value >= 1.0


def test_the_rounding_of_products_is_covered() -> None:
    """Errors of the products against rational arithmetic, forward and transposed."""
    rng = np.random.default_rng(0)
    c, a = 2.0**40 * rng.uniform(1, 2, 40), rng.uniform(-1, 1, 40)
    form = cancelling(c, a)
    host, scalings = recursion.host_form(form), recursion.loop_transform(form, 2, centred=True)
    limit = step_paths.product_rounding(host, (), (0,), scalings, 1e-12)
    product = BlockProduct(host, (), (0,), scalings)
    for transposed in (False, True):
        u = rng.standard_normal(40)
        u /= np.linalg.norm(u)
        found = product.backward(u) if transposed else product.forward(u)
        errors = [
            Fraction(f) - Fraction(b) * Fraction(v) for f, b, v in zip(found.tolist(), a, u, strict=True)
        ]
        wrong = float(sum(e * e for e in errors)) ** 0.5
        assert 1e-5 < wrong <= limit < 1e4 * wrong


def test_more_starts_cover_what_rounding_hides() -> None:
    """Products that do not show the top direction of diag(1, 1, 1, 1.9) where that is within their rounding."""
    n, wrong, values = 4, 2e-3, np.array([1.0, 1.0, 1.0, 1.9])

    def apply(v: np.ndarray) -> np.ndarray:
        return v if 0.9 * abs(v[-1]) <= wrong else values * v

    unlucky = [
        seed
        for seed in range(3000)
        if abs((v := np.random.default_rng(seed).standard_normal(n))[-1]) < wrong / 2 * np.linalg.norm(v)
    ]
    assert len(unlucky) >= 3
    for seed in unlucky:
        assert lanczos.golub_kahan(apply, apply, n, seed=seed, failure=1e-4)[0] < 1.9
        assert lanczos.golub_kahan(apply, apply, n, seed=seed, failure=1e-4, rounding=wrong)[0] >= 1.9
    with pytest.raises(ValueError, match="too small for products"):
        lanczos.golub_kahan(apply, apply, n, failure=1e-4, rounding=1.0)


def test_the_rounding_of_ordinary_products_changes_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep and wide networks without cancellation: the same numbers as for exact products."""
    rng = np.random.default_rng(0)
    kernels = [(rng.normal(size=(6, 6, 3, 3)) / 5).astype(np.float32) for _ in range(12)]

    def network(x: jax.Array) -> jax.Array:
        for k in kernels:
            x = jax.nn.relu(jax.lax.conv(x[None], k, (1, 1), "SAME")[0])
        return x.sum((1, 2))

    form = lb.trace(network, jax.ShapeDtypeStruct((6, 6, 6), np.float32))
    host, scalings = recursion.host_form(form), recursion.loop_transform(form, 2, centred=True)
    for source, target in (((), (0,)), ((), (11,))):
        found = wide_blocks._by_golub_kahan(host, source, target, scalings, 0, 1e-9, 300)
        with monkeypatch.context() as patch:
            patch.setattr(wide_blocks, "product_rounding", lambda *args: 0.0)
            exact = wide_blocks._by_golub_kahan(host, source, target, scalings, 0, 1e-9, 300)
        assert found is not None and exact is not None
        assert found.value == pytest.approx(exact.value, rel=1e-6)


def test_weights_below_the_normal_range_of_float32_are_products_like_any() -> None:
    tiny = np.full(40, 1e-40, np.float32)
    form = lb.trace(lambda x: jax.nn.relu(tiny * x * np.float32(1e30)), np.zeros(40, np.float32))
    exact = float(tiny[0]) * float(np.float32(1e30))
    for guarantee in ("auto", "probabilistic"):
        assert exact * (1 - 1e-6) <= lb.naive(form, guarantee=guarantee).value <= exact * 1.01
