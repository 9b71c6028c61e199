"""Neurons that are constant or that nothing reads do not count in the naive bound and in LipLT."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb
from lipbounds._triangle import recursion

NORMS = (1, 2, np.inf)


@pytest.mark.parametrize("dead", ["constant", "unread", "masked"])
def test_bounds_do_not_change_where_dead_neurons_are_added(dead: str) -> None:
    """Constant: zero rows. Unread: zero columns. Masked: their outputs are multiplied by zero."""
    rng = np.random.default_rng(0)
    first, second, last = (rng.standard_normal(shape) for shape in ((8, 5), (8, 8), (3, 8)))
    rows = np.full((3, 5), 0.0 if dead == "constant" else 5.0)
    columns = np.full((8, 3), 0.0 if dead == "unread" else 5.0)
    mask = np.r_[np.ones(8), np.full(3, 0.0 if dead == "masked" else 1.0)].astype(np.float32)

    def wide(x: Any) -> Any:
        y = np.vstack([first, rows]) @ x
        return last @ jax.nn.relu(np.hstack([second, columns]) @ (mask * jax.nn.relu(y)))

    x = jax.ShapeDtypeStruct((5,), jnp.float32)
    narrow = lb.trace(lambda x: last @ jax.nn.relu(second @ jax.nn.relu(first @ x)), x)
    form = lb.trace(wide, x)
    for verb, norm in itertools.product((lb.naive, lb.liplt), NORMS):
        assert verb(form, norm=norm).value == pytest.approx(verb(narrow, norm=norm).value, rel=1e-9)


def pooled(pruned: bool) -> Any:
    """11 x 11 images, 3 x 3 windows, relu, maxima over 3 x 3 windows with stride 2 that leave nothing out of 9 x 9."""
    rng = np.random.default_rng(1)
    kernel, last = rng.standard_normal((3, 3, 1, 3)), rng.standard_normal((3, 4, 4, 3))
    if pruned:
        kernel[..., 0] = 0.0  # a channel that is constant
        last[..., 2] = 0.0  # a channel that nothing reads
        last[:, 3] = 0.0  # the last row of windows

    def net(x: Any) -> Any:
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x[None], kernel.astype(np.float32), (1, 1), "VALID", None, None, layout)
        y = lax.reduce_window(jax.nn.relu(y), -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        return last.reshape(3, -1).astype(np.float32) @ y.ravel()

    return lb.trace(net, jax.ShapeDtypeStruct((11, 11, 1), jnp.float32)), jax.jacobian(net)


def test_masks_of_windows_and_channels() -> None:
    form, jacobian = pooled(pruned=True)
    read = np.zeros((9, 9, 3), bool)
    read[:7, :, 1] = True
    windows = np.zeros((4, 4, 3), bool)
    windows[:3, :, 1] = True
    masks = recursion.live_masks(form)
    assert masks[0] is not None and masks[1] is not None
    assert (masks[0] == read.ravel()).all() and (masks[1] == windows.ravel()).all()
    recursion.host_form(form).live = [np.ones_like(mask) for mask in masks]
    every = {key: key[0](form, norm=key[1]).value for key in itertools.product((lb.naive, lb.liplt), NORMS)}
    recursion._HOSTS.clear()
    points = np.random.default_rng(2).standard_normal((50, 11, 11, 1)).astype(np.float32)
    slopes = np.asarray(jax.vmap(jacobian)(points), np.float64).reshape(50, 3, -1)
    for (verb, norm), value in every.items():
        bound = verb(form, norm=norm).value
        assert np.linalg.norm(slopes, norm, axis=(1, 2)).max() <= bound < value * 0.999


def test_without_dead_neurons_nothing_is_masked() -> None:
    form, _ = pooled(pruned=False)
    assert recursion.live_masks(form) == [None, None]
    plain = recursion.loop_transform(form, 2, centred=True)
    for one, other in zip(plain, recursion.loop_transform(form, 2, centred=True, live=True), strict=True):
        assert (one.q == other.q).all() and (one.e == other.e).all()


def test_a_sort_reads_all_of_its_inputs_for_one_output() -> None:
    rng = np.random.default_rng(3)
    first, last = rng.standard_normal((6, 4)).astype(np.float32), np.eye(1, 6, 2, dtype=np.float32)
    form = lb.trace(lambda x: last @ jnp.sort(first @ x), jax.ShapeDtypeStruct((4,), jnp.float32))
    (mask,) = recursion.live_masks(form)
    assert mask is not None and mask.tolist() == [k == 2 for k in range(6)]
    norm = float(np.linalg.norm(first, 2))
    assert lb.naive(form).value == pytest.approx(norm, rel=1e-6)
