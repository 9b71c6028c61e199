"""Discs and eigenvalues of A = W'W and of the forged A', against numpy.linalg and against what the paper says."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from lipbounds.analysis.spectra import (
    DISCS_STAY,
    SLOPE_RISES,
    Interlacing,
    amplification,
    forged_matrix,
    gershgorin_discs,
    interlacing,
    largest_eigenvalue,
    spectral_norm_forged,
)

SHAPES = [(1, 1), (3, 7), (7, 3), (40, 40), (200, 60), (60, 200)]
DENSITIES = [0.0, 0.1, 0.5, 0.9, 1.0]
CASES = [(shape, density) for shape in SHAPES for density in DENSITIES]
BIG = [*(((2000, 2000), density) for density in DENSITIES), ((500, 2000), 0.5), ((2000, 500), 0.5)]


def _case(shape: tuple[int, int], density: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, *shape, round(100 * density)])
    return rng.normal(size=shape) + 0.3, rng.random(shape[1]) < density


@pytest.mark.parametrize(
    ("shape", "density"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in BIG)]
)
def test_what_the_forged_matrix_keeps(shape: tuple[int, int], density: float) -> None:
    """Eigenvalues against LAPACK on the whole matrices, discs, interlacing, disc bounds and norms for A and A'."""
    w, mask = _case(shape, density)
    a, forged = forged_matrix(w, np.ones(shape[1], bool)), forged_matrix(w, mask)
    np.testing.assert_array_equal(forged, a @ np.diag(mask))
    size = np.linalg.norm(a, 2)
    if len(a) <= 500 or (density == 0.5 and shape[0] == 2000):
        spectrum = np.linalg.eigvals(forged)  # knows nothing of symmetry, and takes a minute at 2000
    else:
        inner = np.linalg.eigvalsh(a[np.ix_(mask, mask)])
        spectrum = np.concatenate([inner, np.zeros(shape[1] - mask.sum())])
    found = interlacing(w, mask)
    assert found.holds and found.allowance < 1e-8 * size
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(a).clip(0), atol=1e-11 * size)
    padded = np.concatenate([np.zeros(shape[1] - mask.sum()), found.kept])
    np.testing.assert_allclose(padded, np.sort(spectrum.real), atol=1e-9 * size)
    assert np.abs(spectrum.imag).max() < 1e-9 * size

    top = largest_eigenvalue(w, mask)
    np.testing.assert_allclose(top, np.linalg.norm(w * mask, 2) ** 2, rtol=1e-11)
    np.testing.assert_allclose(top, found.kept.max(initial=0.0), rtol=1e-11)
    np.testing.assert_allclose(largest_eigenvalue(w), size, rtol=1e-11)
    norm = spectral_norm_forged(w, mask)
    np.testing.assert_allclose(norm, np.linalg.norm(forged, 2), rtol=1e-11)
    assert top <= norm * (1 + 1e-11) and norm <= size * (1 + 1e-11)

    for by in ("row", "column"):
        before, after = gershgorin_discs(a, by), gershgorin_discs(forged, by)
        assert before.contains(found.eigenvalues, slack=1e-11 * size).all()
        assert after.contains(spectrum, slack=1e-9 * size).all()
        assert after.bound <= before.bound and (after.radii <= before.radii * (1 + 1e-12)).all()
        assert size <= before.bound * (1 + 1e-11) and top <= after.bound * (1 + 1e-11)


def test_discs_of_a_known_matrix() -> None:
    a = np.array([[10.0, 1.0, -2.0], [0.5, -20.0, 0.0], [3.0, 4.0, 0.0]])
    row, column = gershgorin_discs(a), gershgorin_discs(a, by="column")
    np.testing.assert_array_equal(row.centers, [10, -20, 0])
    np.testing.assert_allclose(row.radii, [3, 0.5, 7], rtol=1e-14)
    np.testing.assert_allclose(column.radii, [3.5, 5, 2], rtol=1e-14)
    assert row.bound == pytest.approx(20.5) and column.bound == pytest.approx(25)
    np.testing.assert_array_equal(row.contains([13, 13.1, -20.6, 6j]), [True, False, False, True])
    np.testing.assert_array_equal(row.contains([13.1], slack=0.2), [True])
    assert not row.contains([40.0])[0]


@pytest.mark.parametrize("by", ["row", "column"])
def test_discs_of_complex_matrices_contain_every_eigenvalue(by: str, rng: np.random.Generator) -> None:
    a = rng.normal(size=(50, 50)) + 1j * rng.normal(size=(50, 50))
    a += np.diag(np.exp(1j * np.arange(50)) * 40)
    discs = gershgorin_discs(a, by)  # type: ignore[arg-type]
    assert discs.contains(np.linalg.eigvals(a), slack=1e-10).all()
    assert np.abs(np.linalg.eigvals(a)).max() <= discs.bound
    off = np.abs(a - np.diag(np.diag(a)))
    np.testing.assert_allclose(discs.radii, off.sum(axis=1 if by == "row" else 0), rtol=1e-12)


def test_radii_and_bound_are_rounded_upwards(rng: np.random.Generator) -> None:
    """Against exact rationals, where sums in float64 fall below the truth about every other time."""
    a = rng.normal(size=(30, 30))
    discs = gershgorin_discs(a)
    for i in range(30):
        exact = sum((abs(Fraction(a[i, j])) for j in range(30) if j != i), Fraction(0))
        assert Fraction(discs.radii[i]) >= exact
        assert Fraction(discs.reach[i]) >= exact + abs(Fraction(a[i, i]))
    assert gershgorin_discs(np.diag([1.0, -3.0])).bound == 3.0
    assert gershgorin_discs([[1.0, 1e-30], [0.0, 0.0]]).bound > 1.0


def test_not_all_radii_shrink() -> None:
    w, mask = DISCS_STAY
    before, after = forged_matrix(w, np.ones(3, bool)), forged_matrix(w, mask)
    for by in ("row", "column"):
        np.testing.assert_array_equal(gershgorin_discs(after, by).radii, gershgorin_discs(before, by).radii)
        assert gershgorin_discs(before, by).radii.max() >= 4
    assert largest_eigenvalue(w, mask) == pytest.approx(9) == largest_eigenvalue(w)


@pytest.mark.parametrize("density", DENSITIES)
def test_kept_columns_and_centres_of_kept_rows_do_not_change(density: float) -> None:
    w, mask = _case((30, 40), density)
    a, forged = forged_matrix(w, np.ones(40, bool)), forged_matrix(w, mask)
    before, after = gershgorin_discs(a, "column"), gershgorin_discs(forged, "column")
    np.testing.assert_array_equal(after.radii[mask], before.radii[mask])
    np.testing.assert_array_equal(after.centers[mask], before.centers[mask])
    assert not after.radii[~mask].any() and not after.centers[~mask].any()
    rows = gershgorin_discs(forged, "row")
    np.testing.assert_array_equal(rows.centers[mask], np.diag(a)[mask])
    if 0 < mask.sum() < 40:
        assert (rows.radii[~mask] > 0).all()  # rows of zeroed entries keep a disc, around 0


def test_the_slope_at_the_threshold_has_no_bound() -> None:
    w, c = np.array([[1.0, 2.0], [0.0, 1.0]]), 0.5
    slopes = [amplification(w, [[0.0, c], [0.0, c + h]], c) for h in (1e-1, 1e-3, 1e-6)]
    for h, slope in zip((1e-1, 1e-3, 1e-6), slopes, strict=True):
        assert slope.slope_forged == pytest.approx(math.sqrt(5) * (c + h) / h, rel=1e-6)
        assert slope.slope == pytest.approx(math.sqrt(5), rel=1e-6)
        assert slope.constant_forged <= slope.constant * (1 + 1e-12)
    assert slopes[-1].slope_forged > 1e6


def test_a_smooth_gate_has_slopes_above_one() -> None:
    c, h = 0.5, 1e-6
    for tau in (0.1, 0.3, 1.0):
        x = c + h * np.array([-1, 1])
        below, above = x / (1 + np.exp(-(np.abs(x) - c) / (tau * c)))
        assert (above - below) / (2 * h) == pytest.approx(0.5 + 1 / (4 * tau), rel=1e-6)
    assert 0.5 + 1 / (4 * 0.1) == 3.0


def test_the_constant_over_data_falls_while_the_slope_rises() -> None:
    found = amplification(*SLOPE_RISES)
    assert found.constant == pytest.approx(2.4 / math.hypot(2, 0.4))
    assert found.constant_forged == pytest.approx(1.0)
    assert found.slope == pytest.approx(1.0)
    assert found.slope_forged == pytest.approx(3.0)


def test_interlacing_sees_a_violation() -> None:
    values = np.array([1.0, 2.0, 5.0])
    assert Interlacing(values, np.array([1.5, 4.0]), 1e-9).holds
    assert Interlacing(values, np.array([1.5, 5.1]), 1e-9).violation == pytest.approx(0.1)
    wrong = Interlacing(values, np.array([2.5, 4.0]), 1e-9)  # above the second eigenvalue of A
    assert not wrong.holds and "VIOLATED" in repr(wrong)
    assert not Interlacing(values, np.array([0.5, 4.0]), 1e-9).holds


@pytest.mark.parametrize("exponent", [-500, 500])
def test_extreme_scales(exponent: int) -> None:
    w, mask = _case((20, 30), 0.5)
    w = np.ldexp(w, exponent)
    tops = largest_eigenvalue(w, mask), np.linalg.norm(np.ldexp(w, -exponent) * mask, 2) ** 2
    np.testing.assert_allclose(np.ldexp(tops[0], -2 * exponent), tops[1], rtol=1e-11)


def test_tables_and_plot(rng: np.random.Generator) -> None:
    a = rng.normal(size=(30, 30))
    discs = gershgorin_discs(a)
    assert len(discs) == 30 and len(repr(discs).splitlines()) == 13
    assert "30, |eigenvalues| <=" in repr(discs) and "the 10 that reach farthest" in repr(discs)
    assert "<table" in discs._repr_html_() and discs._repr_markdown_().startswith("| row |")
    assert "+" in repr(gershgorin_discs(a + 1j))
    ax = discs.plot(eigenvalues=np.linalg.eigvals(a))
    ax.figure.canvas.draw()
    assert len(ax.collections) == 1 and len(ax.collections[0].get_offsets()) == 30
    low, high = ax.get_xlim()
    assert low <= (discs.centers - discs.radii).min() and high >= (discs.centers + discs.radii).max()


@pytest.mark.parametrize(
    "bad", [np.ones((2, 3)), np.ones(3), np.zeros((0, 0)), [[np.nan, 0], [0, 1]], [[np.inf]], "a"]
)
def test_discs_refuse(bad: object) -> None:
    with pytest.raises(ValueError):
        gershgorin_discs(bad)


def test_refusals() -> None:
    w = np.ones((2, 3))
    with pytest.raises(ValueError, match="by must be"):
        gershgorin_discs(np.eye(2), by="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinite"):
        gershgorin_discs(np.array([[1, 1j * np.inf], [0, 1]]))
    for mask in (np.ones(3), np.ones(2, bool), np.ones((1, 3), bool)):
        for verb in (forged_matrix, largest_eigenvalue, spectral_norm_forged, interlacing):
            with pytest.raises(ValueError, match="mask must hold 3 booleans"):
                verb(w, mask)
    for bad in (np.ones(3), np.zeros((0, 3)), w * np.nan, w * 1j):
        with pytest.raises(ValueError):
            largest_eigenvalue(bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        forged_matrix(np.full((1, 1), 1e200), np.ones(1, bool))
    with pytest.raises(ValueError, match="above the range"):
        largest_eigenvalue(np.full((1, 1), 1e200))
    with pytest.raises(ValueError, match="shape"):
        gershgorin_discs(np.eye(2)).contains([[1.0]])
    with pytest.raises(ValueError, match="slack"):
        gershgorin_discs(np.eye(2)).contains([1.0], slack=-1.0)
    with pytest.raises(ValueError, match="X must have shape"):
        amplification(w, np.ones((2, 2)), 0.1)
