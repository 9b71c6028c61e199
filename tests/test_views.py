"""The elementwise view of group taps is the same function, and its bounds are bounds of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import NETS

import lipbounds as lb
from lipbounds._form.elementwise import elementwise_view

GROUPED = [
    "max_pool_overlapping",
    "reduce_max_head",
    "max_min_of_branches",
    "maxmin_mlp",
    "group_sort",
    "orthogonal_maxmin",
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", GROUPED)
def test_the_rewritten_network_is_the_same_function(name: str) -> None:
    fn, x = NETS[name].make(0)
    form = lb.trace(fn, x)
    view = elementwise_view(form)
    assert any(t.groups is not None for t in form.taps) and all(t.groups is None for t in view.taps)
    with jax.enable_x64(True):
        for seed in range(5):
            point = 3 * np.random.default_rng(seed).standard_normal(form.in_shape)
            ours, theirs = view.evaluate(point, jnp.float64), form.evaluate(point, jnp.float64)
            np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n if n == "maxmin_mlp" else pytest.param(n, marks=pytest.mark.slow) for n in GROUPED],
)
def test_bounds_of_the_view_hold_and_groups_are_tighter_for_orthogonal_nets(name: str) -> None:
    fn, x = NETS[name].make(0)
    form = lb.trace(fn, x)
    low = lb.empirical(form, steps=30).value
    rewritten = lb.liplt(elementwise_view(form)).value
    assert low <= rewritten
    if name == "orthogonal_maxmin":
        assert lb.liplt(form).value < 1.000001 and rewritten > 2


def test_forms_without_groups_are_returned_as_they_are() -> None:
    fn, x = NETS["relu"].make(0)
    form = lb.trace(fn, x)
    assert elementwise_view(form) is form


def test_odd_windows_and_one_entry_windows() -> None:
    index = np.array([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    form = lb.trace(lambda x: jnp.max(x[index], axis=1) - jnp.min(x[index[:, :3]], axis=1), jnp.zeros(5))
    view = elementwise_view(form)
    for seed in range(5):
        point = jnp.asarray(np.random.default_rng(seed).standard_normal(5), jnp.float32)
        np.testing.assert_allclose(np.asarray(view(point)), np.asarray(form(point)), rtol=1e-5, atol=1e-6)
