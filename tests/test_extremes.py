"""Weights of any scale, NumPy and JAX states of the caller's, thousands of outputs: a bound or a plain error."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds._triangle import product_rounding, recursion

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


def test_a_search_outside_the_range_of_float32_says_so() -> None:
    found = lb.empirical(lb.from_weights([np.full((3, 2), 1e60), np.full((2, 3), 1e60)]), steps=0)
    assert found.value == 0
    assert found.notes == (
        "no pair of points was tried: the search is in float32, whose range this network leaves",
    )


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


@pytest.mark.parametrize("verb", [lb.naive, lb.liplt])
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_pairs_whose_products_underflow_are_not_zero(verb: Any, norm: float) -> None:
    """Their exact constants are 2^-1667: the least denormal bounds them, and no tie is infinitely far."""
    weights = [np.ldexp(np.eye(2), e) for e in (-531, -996, -140)]
    form = lb.from_weights(weights, [np.zeros(2), np.zeros(2), np.array([2.0**-700, 0.0])])
    bound = verb(form, norm=norm, pairwise=True)
    assert 0 < bound.pairwise[0, 1] < 1e-300 and np.all(bound.per_class > 0)
    found = lb.certified_radius(form, np.ones((1, 2)), [0], bound=bound)
    assert 0 < found.radius[0] < 2.0**967


@pytest.mark.parametrize("scaling", ["aol", "sll"])
def test_a_neuron_whose_scaled_column_underflows_is_not_dropped(scaling: Any) -> None:
    """Weights of 1e-170 twice in a row: their product is zero in floats, and the network is not."""
    form = lb.from_weights([[[1e250]], [[1e-170]], [[1e-170]]], activation="abs")
    assert 1e-90 <= lb.liplt(form, scaling=scaling).value <= 1.001e-90


def test_a_block_that_is_known_at_another_scale_is_rounded_up_among_denormals() -> None:
    """The radius of the slopes is 2^-3 of their size, and the norm with centre 0 is the least denormal or so."""
    with jax.enable_x64(True):
        steps = [jnp.full((1, 1), w) for w in (2.0**1000, 2.0**-1073, 1.0)]

        def act(y: jax.Array) -> jax.Array:
            return jnp.where(y > 0, y, 0.75 * y)

        form = lb.trace(lambda x: steps[2] @ act(steps[1] @ act(steps[0] @ x)), jnp.ones(1))
    lb.naive(form)
    found = recursion.triangle(form, recursion.Request(), pairwise=False, centred=True)
    assert len(found.parts) == 6 and all(part.value > 0 for part in found.parts)


def test_the_norm_of_steps_whose_products_underflow_is_not_zero() -> None:
    """1e-170 twice, then 1e300: the sums of absolute values underflow on the way to 1e-40."""
    with jax.enable_x64(True):
        steps = [jnp.full((1, 1), w) for w in (1e-170, 1e-170, 1e300)]
        form = lb.trace(lambda x: jax.nn.relu(steps[2] @ (steps[1] @ (steps[0] @ jnp.abs(x)))), jnp.ones(1))
    found = product_rounding.legs(form, {0: 1.0})
    assert found[1, 0].norm >= 1e-40


def test_radii_among_denormals_are_rounded_down() -> None:
    weights = [
        [-4.226356249085322e271, -1.6905424996341288e271],
        [8.452712498170644e270, -3.3810849992682576e271],
        [-8.452712498170644e270, -1.6905424996341288e271],
    ]
    x = np.array([[1.69759663277e-313, -1.69759663277e-313]])
    form = lb.from_weights([weights])
    found = lb.certified_radius(form, x, [1], lb.liplt(form, norm=1, pairwise=True)).radius[0]
    w, point = [[Fraction(v) for v in row] for row in weights], [Fraction(float(v)) for v in x[0]]
    apart = [[a - b for a, b in zip(w[1], w[k], strict=True)] for k in (0, 2)]
    # l1: margins fall by at most the largest entry
    exact = min(sum(a * p for a, p in zip(row, point, strict=True)) / max(map(abs, row)) for row in apart)
    assert 0.9 * exact < Fraction(float(found)) <= exact


def test_a_radius_above_the_range_is_the_largest_float() -> None:
    form = lb.from_weights([[[1e-30], [-1e-30]]], [[1e300, 0.0]])
    found = lb.certified_radius(form, [[1.0]], [0], lb.naive(form))
    assert found.radius[0] == np.finfo(np.float64).max


def test_a_denormal_input_of_huge_weights_is_not_taken_for_correct() -> None:
    """Roundings of products with denormals, times weights of 1e300, are larger than the margin of -6.5e-30."""
    weights = [
        [-4.0962196209318906e300, -4.9324373078710344e300, 7.781728484641778e300],
        [-3.0747848270061515e300, -4.903757025763776e300, 6.893371185986634e300],
    ]
    x = [6.3186649437e-314, 8.3880894563e-314, 7.536018454e-314]
    rows = [[Fraction(v) for v in row] for row in weights]
    margin = sum((a - b) * Fraction(p) for a, b, p in zip(*rows, x, strict=True))
    assert -1e-29 < margin < 0
    assert not lb.certified_radius(lb.from_weights([weights]), [x], [0]).correct[0]


def test_inputs_with_more_digits_than_float64_are_refused() -> None:
    form = lb.trace(lambda x: x, jnp.ones(2))
    wide = np.array([[1, 1]], np.longdouble) + np.array([[2.0**-60, 0]], np.longdouble)
    with pytest.raises(ValueError, match=r"astype\('float64'\)"):
        lb.certified_radius(form, wide, [0], bound=lb.naive(form, pairwise=True))


@pytest.mark.parametrize("eps", [1e-310, 1e300])
def test_margins_on_radii_whose_squares_leave_the_range_have_the_bounds_of_the_ellipsoids(eps: float) -> None:
    form = lb.from_weights([np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 1.0]])])
    found = lb.margins(form, [[1.0, 0.5]], [0], eps)
    assert found.value[0, 1] == pytest.approx(1.0 if eps < 1 else -np.sqrt(8) * eps, rel=0.5)
    assert found.value[0, 1] <= (1.0 if eps < 1 else -2 * eps)


def test_margins_of_networks_without_inputs() -> None:
    for act in (jax.nn.relu, jnp.positive):
        form = lb.trace(lambda x, act=act: act(jnp.ones((2, 0)) @ x + jnp.array([2.0, 1.0])), jnp.zeros(0))
        assert lb.margins(form, np.zeros((1, 0)), [0], 0.1).value[0, 1] == pytest.approx(1.0)
