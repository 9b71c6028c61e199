"""Weights of any scale, NumPy and JAX states of the caller's, thousands of outputs: a bound or a plain error."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds._triangle import recursion

SHAPES = ((6, 5), (4, 6), (3, 4))


def network(scale: float = 1.0, place: int = 0) -> LureForm:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in SHAPES]
    weights[place] *= scale
    return lb.from_weights(weights)


def powers(exponents: tuple[int, int, int]) -> LureForm:
    """`network()` with its layers times these powers of two."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in SHAPES]
    return lb.from_weights([np.ldexp(w, e) for w, e in zip(weights, exponents, strict=True)])


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


@pytest.mark.slow
@pytest.mark.sampled(4)
@pytest.mark.parametrize("scale", [1e-160, 1e40, 1e160])
def test_a_scaled_network_has_the_scaled_bounds(scale: float) -> None:
    """Outside x64, where the device's floats end at 1e38."""
    plain = {i: results(network(), verb, **options) for i, (verb, options) in enumerate(CALLS)}
    for place in (0, 2):
        form = network(scale, place)
        for i, (verb, options) in enumerate(CALLS):
            found = results(form, verb, **options) / scale
            assert np.allclose(found, plain[i], rtol=2e-3), (verb, options, place)


@pytest.mark.slow
@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("norm", "scale"),
    [
        (2, 1e-160),
        (math.inf, 1e160),
        pytest.param(2, 1e160, marks=pytest.mark.slow),
        pytest.param(math.inf, 1e-160, marks=pytest.mark.slow),
    ],
)
def test_lipsdp_of_a_scaled_network(norm: float, scale: float) -> None:
    plain = lb.lipsdp(network(), norm=norm)
    for place in (0, 1, 2):
        bound = lb.lipsdp(network(scale, place), norm=norm)
        assert bound.value / scale == pytest.approx(plain.value, rel=1e-3) and bound.certificate is not None
        assert bound.value <= lb.liplt(network(scale, place), norm=norm).value
    estimate = lb.lipsdp(network(scale), norm=norm, guarantee="estimate")
    assert estimate.value / scale == pytest.approx(plain.value, rel=1e-2)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "exponents", [(664, -664, 0), (-664, 664, 0), (0, 664, -664), (996, 0, 0), (0, 0, -996)]
)
def test_powers_of_two_scale_every_bound_exactly(exponents: tuple[int, int, int]) -> None:
    """Also where the scales of layers cancel, and where squares of weights leave the range of float64."""
    form = powers(exponents)
    back = -sum(exponents)
    for verb in (lb.naive, lb.liplt):
        for norm in (1, 2, math.inf):
            for guarantee in ("auto", "estimate"):
                reference = verb(network(), norm=norm, pairwise=True)
                found = verb(form, norm=norm, guarantee=guarantee, pairwise=True)
                for name in ("value", "per_class", "pairwise"):
                    value = np.ldexp(getattr(found, name), back)
                    np.testing.assert_allclose(value, getattr(reference, name), rtol=1e-6, err_msg=guarantee)
    for scaling in ("aol", "sll"):
        scaled = math.ldexp(lb.liplt(form, scaling=scaling).value, back)
        assert lb.lipsdp(network()).value <= scaled <= lb.liplt(network()).value * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("exponents", [(664, -664, 0), (0, 664, -664)])
def test_lipsdp_where_scales_cancel(exponents: tuple[int, int, int]) -> None:
    form = powers(exponents)
    bound = lb.lipsdp(form)
    assert lb.lipsdp(network()).value * (1 - 1e-6) <= bound.value <= lb.liplt(network()).value * (1 + 1e-9)
    assert bound.value == pytest.approx(lb.lipsdp(network()).value, rel=1e-3)


def test_a_bound_below_the_range_of_float64_is_rounded_up_and_one_above_is_refused() -> None:
    form = powers((-500, -500, -500))
    for verb in (lb.naive, lb.liplt):
        assert verb(form).value == verb(form, guarantee="estimate").value == 5e-324
    with pytest.raises(ValueError, match="not finite"):
        powers((500, 500, 500))


# --- states of NumPy and JAX ---------------------------------------------------------------------------------------


def everything(tmp_path: Any) -> dict[str, float]:
    """A number from every public verb, on a network that compiles in no time."""
    rng = np.random.default_rng(1)
    form = lb.from_weights([rng.standard_normal((4, 3)), rng.standard_normal((2, 4))])
    X, y = rng.standard_normal((2, 3)), np.zeros(2, int)
    out = {f"{verb.__name__} {p}": verb(form, norm=p).value for verb in (lb.naive, lb.liplt) for p in (1, 2)}
    out["estimate"] = lb.liplt(form, guarantee="estimate").value
    bound = lb.lipsdp(form, pairwise=True)
    out["lipsdp"] = bound.value
    lb.save_certificate(bound, tmp_path / "bound.cert")
    out["verified"] = float(lb.verify_certificate(tmp_path / "bound.cert", form))
    out["local"] = float(lb.local(form, X, 0.1, bound=bound).value.max())
    made = lb.bracket(form, X, upper=bound)
    out |= {"bracket": made.ratio, "empirical": lb.empirical(form, X).value}
    out["radius"] = float(lb.certified_radius(form, X, y, bound).radius.max())
    rows = lb.compare(form, X, y, methods=["naive", "liplt", made.lower])
    out |= {row.method + " row": row.value for row in rows.rows if row.value is not None}
    traced = lb.trace(lambda x: jnp.tanh(x @ np.ones((5, 2), np.float32)), np.zeros(5, np.float32))
    return {**out, "traced": lb.naive(traced).value}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return everything(tmp_path_factory.mktemp("plain"))


def test_verbs_work_where_numpy_raises(tmp_path: Any, plain: dict[str, float]) -> None:
    with np.errstate(all="raise"):
        assert everything(tmp_path) == pytest.approx(plain, rel=1e-9)


def test_verbs_work_where_jax_looks_for_nan(tmp_path: Any, plain: dict[str, float]) -> None:
    with jax.debug_nans(True):
        assert everything(tmp_path) == pytest.approx(plain, rel=1e-9)


def test_verbs_work_where_products_are_rounded_to_bfloat16(tmp_path: Any, plain: dict[str, float]) -> None:
    with jax.default_matmul_precision("bfloat16"):
        found = everything(tmp_path)
    # Searches and estimates may find other points; what they prove may not change.
    assert found == pytest.approx(plain, rel=1e-5)


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


@pytest.mark.slow
def test_attained_slopes_of_thousands_of_outputs_take_no_square_of_them() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((21_125, 3)).astype(np.float32)
    form = lb.from_weights([matrix])
    tracemalloc.start()
    try:
        found = lb.bracket(form, rng.standard_normal((2, 3)).astype(np.float32))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.lower.value == pytest.approx(np.linalg.norm(matrix.astype(float), 2), rel=1e-5)
    assert found.ratio < 1 + 1e-4 and peak < 400e6 < 21_125**2


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
    monkeypatch.setattr(recursion, "DENSE_LIMIT", 20)
    for options in ({}, {"memory": "50 MB"}, {"guarantee": "probabilistic"}):
        bound = lb.liplt(form, **options)
        assert truth.value * (1 - 1e-9) <= bound.value <= 1.01 * truth.value
        assert bound.failure_probability <= 1e-9
    assert lb.liplt(form, guarantee="verified").guarantee == "verified"
