"""Group taps read what the function reads, and the blocks of the gain of whole networks, from either side."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gain import dense, dense_gain, form_of, lowered, random_scalings
from jax import lax
from zoo import NETS
from zoo_core import gauss

from lipbounds._form.lure import LureForm, multiplicity
from lipbounds._gain import blocks
from lipbounds._gain.blocks import HostForm, Node
from lipbounds._norms import enclosures


# ------------------------------------------------------------------------------------------------- groups
def minimum_and_maximum(a: Any, b: Any) -> Any:
    return jnp.concatenate([jnp.minimum(a, b), jnp.maximum(b, a)])


WINDOWS = {  # shape, window, strides, padding, base dilation, window dilation
    "plain": ((6, 5), (2, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
    "padded": ((5, 4), (3, 2), (2, 1), ((1, 2), (1, 0)), (1, 1), (1, 1)),
    "dilated_window": ((7, 6), (2, 3), (1, 2), ((1, 0), (0, 2)), (1, 1), (3, 2)),
    "dilated_base": ((4, 3), (3, 2), (2, 1), ((1, 1), (1, 0)), (2, 2), (1, 1)),
    "negative_padding": ((7, 6), (2, 2), (1, 1), ((-1, 1), (1, -2)), (1, 1), (1, 1)),
}
GROUPS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    **{
        f"max_pool_{name}": (
            lambda x, s=s: lax.reduce_window(x, np.asarray(-np.inf, x.dtype), lax.max, *s[1:]),
            s[0],
        )
        for name, s in WINDOWS.items()
    },
    "min_pool": (
        lambda x: lax.reduce_window(x, np.asarray(np.inf, x.dtype), lax.min, (2, 2), (1, 2), "SAME"),
        (5, 5),
    ),
    "reduce_max": (lambda x: jnp.max(x, axis=(0, 2)), (3, 2, 4)),
    "reduce_min": (lambda x: jnp.min(x, axis=1), (3, 4)),
    "sort": (lambda x: jnp.sort(x, axis=1), (2, 5, 3)),
    "maximum": (lambda x: jnp.maximum(x[:3], x[3:]), (6, 2)),
    "max_and_min": (lambda x: minimum_and_maximum(x[:2], x[2:]), (4,)),
}


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_groups_read_the_entries_that_the_function_reads(name: str) -> None:
    """The outputs are inputs: at random orders of distinct numbers each output shows which entry it read."""
    fn, shape = GROUPS[name]
    form, n = lowered(fn, shape), int(np.prod(shape))
    (tap,) = form.taps
    assert tap.groups is not None
    rng = np.random.default_rng(7)
    orders = np.stack([rng.permutation(n) for _ in range(1500)]).astype(np.float32)
    values = np.asarray(jax.jit(jax.vmap(lambda x: jnp.ravel(fn(x))))(orders.reshape(-1, *shape)))
    seen = set()
    for order, row in zip(orders, values, strict=True):
        seen |= set(enumerate(np.argsort(order)[row.astype(int)].tolist()))
    ones = (blocks.TapScaling(None, np.ones(tap.size_out), np.ones(tap.size_in)),)
    host = HostForm(form)
    into, out_of = host.forward((), [(0,)], ones)[0,], host.forward((0,), [()], ones)[()]
    through = np.zeros((tap.size_out, tap.size_in))
    for g, row in enumerate(tap.groups.array):
        through[np.ix_(row if tap.kind == "sort" else [g], row)] = 1
    reads = dense(out_of.midpoint_for_search()) @ through @ dense(into.midpoint_for_search())
    assert seen == {(int(i), int(j)) for i, j in np.argwhere(reads)}
    # and n_j, the number of groups an input belongs to, is what the constant sqrt(n_j) needs
    if tap.kind != "sort" and form.program.output == tap.outputs[0]:
        assert np.array_equal((reads > 0).sum(axis=0), multiplicity(tap) @ dense(into.midpoint_for_search()))


# ---------------------------------------------------------------------------------------- the gain of nets
def skips_around_taps(rng: np.random.Generator) -> LureForm:
    """Pre-activations that are also read by something else, before and after the tap that reads them."""
    a, b, c = gauss(rng, 6, 4), gauss(rng, 6, 6), gauss(rng, 3, 6)

    def fn(x: jax.Array) -> jax.Array:
        h = a @ x
        h = h + b @ jax.nn.relu(h) - jnp.tanh(h)
        return c @ (jnp.maximum(h, b @ h) + h[::-1] + jax.nn.relu(h))

    return lowered(fn, (4,))


ZOO = [
    "skips_around_taps", "two_branches", "dense_net", "shared_block", "u_net", "max_min_of_branches", "maxmin_mlp",
    "group_sort",
    "max_pool_overlapping", "reshuffle", "postactivation_resnet", "homemade", "normalised_input",
]  # fmt: skip


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("centred", [True, False])
def test_blocks_of_the_gain(name: str, centred: bool) -> None:
    """forward, backward and an independent dense gain agree for every source and target, within the stated error."""
    form = form_of(name) if name in NETS else skips_around_taps(np.random.default_rng(0))
    scalings = random_scalings(form, 3, centred=centred)
    truth, host = dense_gain(form, scalings), HostForm(form)
    sources: list[Node] = [(), *((k,) for k in range(len(form.taps)))]
    targets: list[Node] = [*sources[1:], ()]
    nonzero = 0
    up = {source: host.forward(source, targets, scalings) for source in sources}
    down = {target: host.backward(target, sources, scalings) for target in targets}
    for source, target in itertools.product(sources, targets):
        block = truth[source, target]
        size = np.linalg.norm(block)
        one, two = up[source].get(target), down[target].get(source)
        if one is None or two is None:
            assert not block.any(), f"the block from {source} to {target} is missing"
            continue
        nonzero += 1
        for got, error in (
            (dense(one.midpoint_for_search()), one.error),
            (dense(two.midpoint_for_search()).T, two.error),
        ):
            assert got.shape == block.shape
            assert np.linalg.norm(got - block) <= error + 1e-12 * size
            assert error <= 1e-11 * size
    assert nonzero > len(form.taps)


def test_stacked_nodes_are_stacked_blocks() -> None:
    """A node of several taps is their rows below, or columns beside, each other."""
    rng = np.random.default_rng(0)
    a, b, c, d = gauss(rng, 5, 4), gauss(rng, 6, 4), gauss(rng, 7, 11), gauss(rng, 3, 7)

    def fn(x: jax.Array) -> jax.Array:
        h = jnp.concatenate([jnp.tanh(a @ x), jax.nn.relu(b @ x)])
        return d @ jnp.concatenate([jax.nn.relu(c[:2] @ h), jnp.tanh(c[2:] @ h)])

    form = lowered(fn, (4,))
    assert [tap.level for tap in form.taps] == [0, 0, 1, 1]
    scalings = random_scalings(form, 5)
    truth, host = dense_gain(form, scalings), HostForm(form)
    first, second = (0, 1), (2, 3)
    columns = np.concatenate([truth[(), (0,)], truth[(), (1,)]])
    block = np.block([[truth[(j,), (k,)] for j in first] for k in second])
    out = np.concatenate([truth[(j,), ()] for j in second], axis=1)
    up = host.forward((), [first], scalings)[first]
    assert np.allclose(dense(up.midpoint_for_search()), columns, rtol=1e-13, atol=1e-13)
    assert np.allclose(
        dense(host.forward(first, [second], scalings)[second].midpoint_for_search()),
        block,
        rtol=1e-13,
        atol=1e-13,
    )
    assert np.allclose(
        dense(host.backward(second, [first], scalings)[first].midpoint_for_search()).T,
        block,
        rtol=1e-13,
        atol=1e-13,
    )
    assert np.allclose(
        dense(host.backward((), [second], scalings)[second].midpoint_for_search()).T,
        out,
        rtol=1e-13,
        atol=1e-13,
    )


def test_factors_that_are_powers_of_two_are_not_rounded() -> None:
    """`scale` by slopes of 1/2 keeps an exact block exact (so equal class rows stay equal, dead neurons dead); whatever
    underflows or is not a power of two has an error that holds in rationals."""
    rng = np.random.default_rng(0)
    for _ in range(150):
        m = rng.normal(size=(3, 4)) * 2.0 ** rng.integers(-540, 480, (3, 4))
        d = rng.choice([-1.0, 0.0, 1.0], 3) * 2.0 ** rng.integers(-540, 480, 3)
        d[rng.integers(3)] *= rng.choice([1.0, 1.5])
        scaled = enclosures.scale(enclosures.Enclosure(m), rows=d)
        gaps = (
            Fraction(float(scaled.midpoint_for_search()[i, j]))
            - Fraction(float(m[i, j])) * Fraction(float(d[i]))
            for i, j in np.ndindex(3, 4)
        )
        assert sum((gap**2 for gap in gaps), Fraction(0)) <= Fraction(scaled.error) ** 2
    ordinary = enclosures.Enclosure(rng.normal(size=(3, 4)))
    assert enclosures.scale(ordinary, rows=np.array([0.5, -2.0, 0.0])).error == 0.0
    assert enclosures.scale(ordinary, rows=np.array([0.5, 0.3, 0.0])).error > 0.0
    assert (
        enclosures.scale(
            enclosures.Enclosure(ordinary.midpoint_for_search(), 1.0), rows=np.array([0.5, -2.0, 0.0])
        ).error
        >= 2.0
    )
