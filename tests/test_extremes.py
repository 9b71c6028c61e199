"""Weights of any scale, NumPy and JAX states of the caller's, thousands of outputs: a bound or a plain error."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import jax
import numpy as np
import pytest

import lipbounds as lb
from lipbounds import _triangle
from lipbounds.lure import LureForm

SHAPES = ((6, 5), (4, 6), (3, 4))


def network(scale: float = 1.0, place: int = 0) -> LureForm:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in SHAPES]
    weights[place] *= scale
    return lb.from_weights(weights)


def results(form: LureForm, verb: Any, **options: Any) -> np.ndarray:
    bound = verb(form, pairwise=True, **options)
    assert np.isfinite(bound.value) and bound.value > 0
    return np.concatenate([[bound.value], bound.per_class, bound.pairwise.ravel()])


CALLS: list[tuple[Any, dict[str, Any]]] = [
    (verb, {"norm": norm, "guarantee": guarantee})
    for verb in (lb.naive, lb.liplt)
    for norm in (1, 2, math.inf)
    for guarantee in ("auto", "probabilistic", "estimate")
]


@pytest.mark.parametrize("scale", [1e-160, 1e40, 1e160])
def test_a_scaled_network_has_the_scaled_bounds(scale: float) -> None:
    """Outside x64, where the device's floats end at 1e38."""
    plain = {i: results(network(), verb, **options) for i, (verb, options) in enumerate(CALLS)}
    for place in (0, 2):
        form = network(scale, place)
        for i, (verb, options) in enumerate(CALLS):
            found = results(form, verb, **options) / scale
            assert np.allclose(found, plain[i], rtol=2e-3), (verb, options, place)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_lipsdp_of_a_scaled_network(norm: float, scale: float) -> None:
    plain = lb.lipsdp(network(), norm=norm)
    for place in (0, 1, 2):
        bound = lb.lipsdp(network(scale, place), norm=norm)
        assert bound.value / scale == pytest.approx(plain.value, rel=1e-3) and bound.certificate is not None
        assert bound.value <= lb.liplt(network(scale, place), norm=norm).value
    estimate = lb.lipsdp(network(scale), norm=norm, guarantee="estimate")
    assert estimate.value / scale == pytest.approx(plain.value, rel=1e-2)


# --- many outputs --------------------------------------------------------------------------------------------------


def many(count: int) -> LureForm:
    rng = np.random.default_rng(0)
    return lb.from_weights(
        [
            rng.standard_normal((20, 10)).astype(np.float32),
            rng.standard_normal((count, 20)).astype(np.float32),
        ]
    )


def test_thousands_of_outputs_without_pairs_take_no_square_of_them() -> None:
    form = many(21_125)
    x = np.random.default_rng(0).standard_normal((2, 10)).astype(np.float32)
    tracemalloc.start()
    try:
        for norm in (1, 2, math.inf):
            assert lb.liplt(form, norm=norm).guarantee == "verified"
        assert lb.liplt(form, memory="100 MB").value == lb.liplt(form).value == lb.lipsdp(form).value
        assert lb.liplt(form, guarantee="estimate").value <= lb.naive(form).value
        radii = lb.certified_radius(form, x, np.argmax(np.asarray(jax.vmap(form)(x)), axis=1))
        assert (radii.radius > 0).all() and any("without pairwise" in note for note in radii.notes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6 < 21_125**2


def test_pairs_of_many_outputs_fit_or_are_refused_with_their_size() -> None:
    for count in (200, 1000):
        bound = lb.liplt(many(count), pairwise=True)
        assert bound.pairwise is not None and bound.pairwise.max() <= bound.sqrt2()
    for verb in (lb.naive, lb.liplt, lb.lipsdp):
        with pytest.raises(ValueError, match=r"pairs of 1000 outputs take about 32 MB, more than 10 MB"):
            verb(many(1000), pairwise=True, memory="10 MB")
        with pytest.raises(ValueError, match=r"pairs of 21125 outputs take about 15 GB"):
            verb(many(21_125), pairwise=True)
    row = lb.compare(many(21_125), pairwise=True, methods=["liplt"])["liplt"]
    assert row.kind == "none" and "21125 outputs" in row.reason


def test_blocks_to_many_outputs_are_bounded_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    form = lb.from_weights([rng.standard_normal(s) for s in ((30, 25), (28, 30), (26, 28))], activation="abs")
    truth = lb.liplt(form)
    monkeypatch.setattr(_triangle, "DENSE_LIMIT", 20)
    for options in ({}, {"memory": "50 MB"}, {"guarantee": "probabilistic"}):
        bound = lb.liplt(form, **options)
        assert truth.value * (1 - 1e-9) <= bound.value <= 1.01 * truth.value
        assert bound.failure_probability <= 1e-9
    assert lb.liplt(form, guarantee="verified").guarantee == "verified"
