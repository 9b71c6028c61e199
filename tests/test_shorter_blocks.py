"""Where rounding error is not small beside a block's norm, the block is bounded by shorter ones: still a bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from zoo import NETS

import lipbounds as lb
from lipbounds._gain.memory_budget import Budget
from lipbounds._triangle import formed_blocks, recursion, refinement


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", ["relu", "preactivation_resnet", "max_pool_overlapping", "dense_net", "fori_loop"]
)
def test_shorter_blocks_are_above_the_blocks_they_replace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, x = NETS[name].make(0)
    form = lb.trace(fn, x)
    host = recursion.host_form(form)
    scalings = recursion.loop_transform(form, 2, centred=True)
    nodes = recursion.partitions(form)[0]
    pairs = recursion.structure(host, nodes, scalings)
    plain = recursion.block_norms(form, pairs, scalings, recursion.Request())
    huge = {p: formed_blocks.BlockNorm(1e300, "verified", "Cholesky", b.shape) for p, b in plain.items()}
    formed_blocks.shorten(host, pairs, scalings, pairs, huge, 2)
    assert all(huge[p].value >= plain[p].value * (1 - 1e-9) for p in pairs)
    assert all(huge[p].how == "shorter blocks" for p in pairs)
    # Blocks with nothing between source and target are not made larger.
    naive = lb.naive(form).value
    monkeypatch.setattr(recursion, "LOOSE", -1.0)
    again = lb.trace(fn, x)
    assert lb.liplt(again).value == pytest.approx(lb.liplt(form).value, rel=1e-9)
    assert lb.liplt(again).value <= naive


@pytest.mark.parametrize("where", ["other_size", "device", "device_and_budget"])
def test_no_term_of_a_shorter_block_is_missing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of blocks on the way may come from elsewhere: the size rule, or a device. Without them the norm was 0."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape).astype(np.float32) for shape in ((8, 8), (3, 8), (3, 3), (2, 3))]
    form = lb.from_weights(weights)
    scalings = recursion.loop_transform(form, 2, centred=True)
    pairs = recursion.structure(recursion.host_form(form), [(0,), (1,), (2,)], scalings)
    plain = recursion.block_norms(form, pairs, scalings, recursion.Request())
    monkeypatch.setattr(recursion, "LOOSE", -1.0)
    if where == "other_size":
        monkeypatch.setattr(recursion, "DENSE_LIMIT", 4)
        monkeypatch.setattr(refinement, "quick_norms", lambda *_: [])
    for pair in pairs[:1] if where == "other_size" else pairs:
        if where != "other_size":
            monkeypatch.setattr(recursion, "proved_on_device", lambda *_, p=pair: {p: plain[p].value})
        budget = Budget(2**20) if where == "device_and_budget" else None
        again = lb.from_weights(weights)
        found = recursion.block_norms(again, pairs, scalings, recursion.Request(budget=budget))
        assert all(found[p].value >= plain[p].value * (1 - 1e-9) for p in pairs), pair
        assert found.keys() == set(pairs)
        if where == "other_size":
            assert found[(), (0,)].guarantee == "probabilistic"
            shorter = {p for p in pairs if found[p].how == "shorter blocks"}
            assert all((found[p].guarantee == "probabilistic") == (p[0] == ()) for p in shorter)


def test_a_deep_network_keeps_its_digits() -> None:
    """Thirty layers: blocks far apart are products of thirty matrices, and LipLT is far below the product of norms."""
    rng = np.random.default_rng(0)
    weights = [(1.4 * rng.standard_normal((16, 16)) / 4).astype(np.float32) for _ in range(30)]
    form = lb.from_weights(weights, slopes=[(0.1, 1.0)] * 29)
    assert lb.liplt(form).value < 0.01 * lb.naive(form).value


@pytest.mark.parametrize("first", [lb.naive, partial(lb.liplt, scaling="aol")])
def test_bounds_do_not_depend_on_what_was_proved_before(first: Callable[..., lb.UpperBound]) -> None:
    """Blocks with centre 0 are those with another centre up to a power of two; terms of this network cancel."""
    rng = np.random.default_rng(0)
    inner, middle, last = (rng.standard_normal(shape) for shape in ((3, 4), (4, 4), (4, 2)))

    def net(x: jax.Array) -> jax.Array:
        hidden = jax.nn.relu(x @ inner)
        return jax.nn.relu((1e8 * hidden + hidden @ middle) - 1e8 * hidden) @ last

    with jax.enable_x64(True):
        used, fresh = (lb.trace(net, np.zeros(3)) for _ in range(2))
    first(used, pairwise=True)
    after, alone = (lb.liplt(form, pairwise=True) for form in (used, fresh))
    assert after.value == alone.value
    assert after.pairwise is not None and np.array_equal(after.pairwise, alone.pairwise)
