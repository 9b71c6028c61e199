"""Blocks too large for one dense proof: every way gives a bound, and one that fails hands over to the next."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gain import dense_gain, form_of

import lipbounds as lb
from lipbounds import _krylov, _triangle, _wide, norms
from lipbounds.lure import LureForm
from lipbounds.norms import Enclosure


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
    roots = [np.linalg.qr(u * scale)[1].astype(float) @ np.linalg.qr((v * scale).T)[1].T for u, v in factors]
    return form, [float(np.linalg.norm(root, 2)) for root in roots]


def test_golub_kahan_waits_for_the_norm_to_show() -> None:
    """On a wide map of low rank the first alpha are far below the norm: noise is relative to what came since."""
    n, r = 20_000, 2
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((n, r)), rng.standard_normal((r, n))
    exact = float(np.linalg.norm(np.linalg.qr(u)[1] @ np.linalg.qr(v.T)[1].T, 2))
    upper, lower, steps = norms.golub_kahan(
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
    (upper,) = _krylov.lanczos_columns(lambda x: (x @ u.T) @ u, start, failure=1e-10, rtol=1e-3, max_steps=40)
    assert exact * (1 - 1e-9) <= upper <= exact * 1.001


@pytest.mark.parametrize(("n", "r", "layers"), [(20_000, 2, 3), (9_000, 16, 1)])
def test_low_rank_blocks_are_verified_through_their_thin_side(n: int, r: int, layers: int) -> None:
    form, sizes = low_rank(n, r, layers)
    bound = lb.naive(form)
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


def test_product_norm_holds_and_is_tight() -> None:
    rng = np.random.default_rng(0)
    for m, r, n in ((30, 3, 40), (8, 8, 8), (50, 1, 9), (7, 20, 6)):
        for size in (1.0, 1e-60, 1e60):
            u, v = rng.standard_normal((m, r)), size * rng.standard_normal((r, n))
            eu, ev = 1e-3 * rng.standard_normal((m, r)), 1e-3 * size * rng.standard_normal((r, n))
            value, guess = _wide.product_norm(Enclosure(u), Enclosure(v))
            exact = float(np.linalg.norm(u @ (v / size), 2)) * size
            assert exact * (1 - 1e-12) <= value <= exact * (1 + 1e-6)
            assert guess == pytest.approx(exact, rel=1e-6)
            errors = [float(np.linalg.norm(e)) * (1 + 1e-12) for e in (eu, ev)]
            value, _ = _wide.product_norm(Enclosure(u, errors[0]), Enclosure(v, errors[1]))
            assert value >= float(np.linalg.norm((u + eu) @ ((v + ev) / size), 2)) * size


@pytest.mark.parametrize("name", ["two_branches", "u_net", "relu"])
def test_every_way_bounds_every_block(name: str) -> None:
    """Each way on its own, on all blocks of the zoo, against the dense gain."""
    form = form_of(name)
    host = _triangle.host_form(form)
    scalings = _triangle.loop_transform(form, 2, centred=True)
    truth = dense_gain(form, scalings)
    ways = {
        "cut": partial(_wide._by_cut, host),
        "proof": partial(_wide._by_proof, host),
        "steps": lambda *pair, limit: _wide.Bound(_wide.product_of_steps(host, *pair), "verified", ""),
        "free": lambda *pair, limit: _wide._by_golub_kahan(form, host, *pair, 0, 1e-9, 300),
    }
    used = set()
    for nodes in _triangle.partitions(form):
        for source, target in _triangle.structure(host, nodes, scalings):
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
    monkeypatch.setattr(_triangle, "DENSE_LIMIT", 3)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("failure is too small for products")

    monkeypatch.setattr(norms, "golub_kahan", refuse)
    monkeypatch.setattr(_wide, "_by_cut", refuse)
    proved = lb.liplt(form, pairwise=True)
    assert proved.guarantee == "verified" and proved.value == pytest.approx(truth.value, rel=1e-9)
    monkeypatch.setattr(_wide, "_by_proof", refuse)
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
        host = _triangle.host_form(form)
        scalings = _triangle.loop_transform(form, 2, centred=True)
        cut = _wide.narrow_cut(host, (), (0,), scalings)
        assert (None if cut is None else sum(host._rows(i) for i in cut[1])) == width
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
