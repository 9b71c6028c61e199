"""Verified norms, row norms and enclosures against rational arithmetic (`exact.py`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse as sp
from exact import encloses, exceeds, fractions, power_norm, product

from lipbounds._norms import cholesky, enclosures
from lipbounds._norms import matrices as norms

TOP = 6  # largest side in exact arithmetic


def hadamard(order: int) -> np.ndarray:
    h = np.ones((1, 1))
    while h.shape[0] < order:
        h = np.block([[h, h], [h, -h]])
    return h


def matrices(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Random and adversarial matrices, all kinds in turn; mostly with sides up to 6."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        m, n = (int(x) for x in rng.integers(1, TOP + 1, 2))
        a = rng.standard_normal((m, n))
        kind = index % 18
        if kind == 1:  # ill-conditioned
            a = a * 10.0 ** rng.uniform(-8, 0, n)
        elif kind == 2:  # top singular value repeated, up to rounding
            a = np.linalg.qr(rng.standard_normal((n, n)))[0] * rng.uniform(0.1, 3.0)
        elif kind == 3:  # repeated exactly
            a = hadamard(int(2 ** rng.integers(0, 3))) * rng.uniform(0.1, 3.0)
        elif kind == 4:
            a = np.eye(m, n) * rng.uniform(0.5, 2.0)
        elif kind == 5:  # a rotation with dyadic entries near cos, sin
            c = np.round(rng.uniform(-1, 1) * 2.0**26) / 2.0**26
            d = np.sqrt(1 - c * c)
            a = np.kron(np.eye(int(rng.integers(1, 4))), np.array([[c, -d], [d, c]]))
        elif kind == 6:
            a = a * 1e-310
        elif kind == 7:
            a = a * 1e-170
        elif kind == 8:
            a = a * 1e200
        elif kind == 9:
            a = rng.standard_normal((1, n)) if index % 2 else rng.standard_normal((n, 1))
        elif kind == 10:  # nearly rank one, all entries close: large Gram entries
            a = 1.0 + a * 2.0**-40
        elif kind == 11:  # entries of very different size
            a = a * 10.0 ** rng.uniform(-300, 0, (m, n))
        elif kind == 12:
            a = rng.integers(-3, 4, (m, n)).astype(float)
        elif kind == 13:  # clustered singular values
            u, v = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (m, n))
            a = u[:, : min(m, n)] @ np.diag(1 + 1e-15 * rng.integers(0, 9, min(m, n))) @ v[: min(m, n)]
        elif kind == 14:
            a = np.where(rng.random((m, n)) < 0.6, 0.0, a) * 2.0 ** rng.integers(-90, 90)
        elif kind == 15:
            a = np.zeros((m, n)) if index % 36 == 15 else np.hstack([a, a])[:, :TOP]
        elif kind == 16:  # long rows: 1, then entries whose squares are lost one by one beside it
            a = np.full((int(rng.integers(1, 4)), 1800), 2.0**-26.6)
            a[:, :: int(rng.integers(1, 4)) * 200] = rng.uniform(1.0, 1.2)
        elif kind == 17:  # larger orthogonal matrices: the Cholesky itself rounds
            k = int(rng.integers(12, 20))
            a = np.linalg.qr(rng.standard_normal((k, k)))[0] * rng.uniform(0.1, 3.0)
        yield a


def below_truth(count: int, starts: bool) -> list[int]:
    """Indices of matrices with a bound not above the exact norm; `starts` begins just below the truth too."""
    failures = []
    for index, a in enumerate(matrices(count)):
        exact = fractions(a)
        bounds = [norms.verified_norm(a)]
        top = float(np.linalg.norm(np.ldexp(a, -math.frexp(np.abs(a).max())[1]), 2)) if a.any() else 0.0
        if starts and top > 0:
            guess = math.ldexp(top, math.frexp(np.abs(a).max())[1])
            bounds += [norms.verified_norm(a, start=guess * (1 - 2.0**-k)) for k in (51, 49)]
        if not a.any():
            assert bounds == [0.0]
        elif not all(exceeds(Fraction(s), exact) for s in bounds):
            failures.append(index)
    return failures


@pytest.mark.parametrize("count", [540, pytest.param(2200, marks=pytest.mark.slow)])
def test_verified_norm_is_never_below_the_exact_norm(count: int) -> None:
    assert below_truth(count, starts=True) == []


def test_removing_the_rounding_term_breaks_the_property(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "rounding_shift", lambda *args: 0.0)
    assert len(below_truth(540, starts=True)) >= 10


def test_verified_norm_is_tight() -> None:
    for a in matrices(640, seed=5):
        s = Fraction(norms.verified_norm(a))
        slack = Fraction(1, 10**12) if np.abs(a).max() > 1e-290 else Fraction(1, 10**9)
        assert s == 0 or not exceeds(s * (1 - slack), fractions(a))


def test_error_is_added_and_start_is_only_a_hint() -> None:
    a = np.random.default_rng(1).standard_normal((300, 220))
    exact = float(np.linalg.norm(a, 2))
    for start in (None, exact, exact * (1 - 1e-9), exact / 7, 1e300, 1e-300):
        assert exact < norms.verified_norm(a, start=start) <= exact * (1 + 1e-9)
    assert exact + 0.5 < norms.verified_norm(a, error=0.5) <= (exact + 0.5) * (1 + 1e-9)
    assert norms.verified_norm(np.zeros((3, 0)), error=0.25) == 0.25
    assert norms.verified_norm(np.zeros((3, 2))) == 0.0
    assert not exceeds(
        Fraction(norms.verified_norm(np.eye(3), error=0.25)), fractions(np.eye(3) * 1.25 * (1 + 1e-12))
    )


@pytest.mark.parametrize("route", ["dense", "blocks", "sparse"])
def test_sparse_and_blocked_routes(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK", 7)
    if route != "dense":
        monkeypatch.setattr(cholesky, "_SMALL", 0)
        monkeypatch.setattr(cholesky, "SPARSE_FLOPS", 1e30 if route == "sparse" else 1e-30)
    rng = np.random.default_rng(2)
    for shape in ((30, 50), (50, 30), (20, 20), (1, 9), (250, 210)):
        dense = np.where(rng.random(shape) < 0.1, rng.standard_normal(shape), 0.0)
        dense[0, 0] = 1.0
        dense[3:5] = 0.0
        exact = float(np.linalg.norm(dense, 2))
        wide = dense if shape[0] <= shape[1] else dense.T
        assert np.allclose(cholesky.gram(sp.csr_array(wide)), wide @ wide.T, rtol=1e-13, atol=1e-13)
        for kind in (sp.csr_array, sp.csc_array, sp.coo_array, sp.csr_matrix):
            a = kind(dense)
            for start in (None, exact / 2):
                assert exact * (1 - 1e-14) <= norms.verified_norm(a, start=start) <= exact * (1 + 1e-10)
            assert np.array_equal(a.toarray(), dense)


def test_sparse_bounds_hold_exactly() -> None:
    for a in matrices(320, seed=3):
        if a.any():
            assert exceeds(Fraction(norms.verified_norm(sp.csr_array(a))), fractions(a))


def test_bad_input_is_refused() -> None:
    nan, inf = np.array([[1.0, math.nan]]), np.array([[1.0, math.inf]])
    for bad in (
        nan,
        inf,
        sp.csr_array(nan),
        np.ones(3),
        np.ones((2, 2, 2)),
        np.ones((2, 2)) * 1j,
        np.array([["a"]]),
    ):
        for call in (norms.verified_norm, norms.frobenius_norm, enclosures.Enclosure):
            with pytest.raises(ValueError):
                call(bad)
        with pytest.raises(ValueError):
            norms.induced_norm(bad, 1)
        with pytest.raises(ValueError):
            norms.pairwise_row_norms(bad, 2)
    huge = np.full((2, 2), 1.5e308)
    for call in (norms.verified_norm, norms.frobenius_norm, lambda a: norms.induced_norm(a, 1)):
        with pytest.raises(ValueError, match="range of float64"):
            call(huge)
    with pytest.raises(ValueError):
        norms.pairwise_row_norms(huge * [[1], [-1]], 2)
    with pytest.raises(ValueError):
        enclosures.multiply(huge, enclosures.Enclosure(huge))
    with pytest.raises(ValueError, match="2\\*\\*53"):
        norms.verified_norm(np.array([[2**53 + 1]]))
    for error in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError):
            norms.verified_norm(np.eye(2), error=error)
    with pytest.raises(ValueError, match="start"):
        norms.verified_norm(np.eye(2), start=math.nan)
    with pytest.raises(ValueError, match="norm 3"):
        norms.induced_norm(np.eye(2), 3)


# -------------------------------------------------------------------------------------------------- row norms


@pytest.mark.sampled(3)
@pytest.mark.parametrize("q", [1, 2, math.inf])
def test_row_induced_and_frobenius_norms_are_exact_upwards(q: float) -> None:
    for a in matrices(480, seed=7):
        exact = fractions(a)
        for form in (a, sp.csr_array(a)):
            assert all(encloses(b, row, q) for b, row in zip(norms.row_norms(form, q), exact, strict=True))
            if q == 2:
                assert encloses(norms.frobenius_norm(form), [x for row in exact for x in row], 2)
            else:
                rows = exact if q == math.inf else [list(c) for c in zip(*exact, strict=True)]
                worst = max(rows, key=lambda row: power_norm(row, 1))
                assert encloses(norms.induced_norm(form, q), worst, 1)


def test_induced_error_covers_the_worst_perturbation() -> None:
    a = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 0.25]])
    e = 0.125
    column = a + np.outer(np.sign(a[:, 0]) + (a[:, 0] == 0), [1, 0, 0]) * e / math.sqrt(2)
    row = a + np.outer([1, 0], np.sign(a[0])) * e / math.sqrt(3)
    for p, worst in ((1, column), (math.inf, row)):
        assert math.isclose(np.linalg.norm(worst - a), e)
        reached = np.abs(worst).sum(axis=0 if p == 1 else 1).max()
        assert reached <= norms.induced_norm(a, p, e) <= reached * (1 + 1e-12)
    assert norms.induced_norm(np.zeros((0, 4)), 1) == 0.0


@pytest.mark.parametrize("q", [1, 2, math.inf])
def test_pairwise_row_norms_hold_exactly(q: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [a for a in matrices(256, seed=11) if a.shape[0] > 1]
    base = np.random.default_rng(0).standard_normal((1, 6))
    cases += [np.vstack([base, base, base * (1 + 2.0**-50)])]  # the Gram form cancels here
    cases += [
        np.array([[1e200, 1e-310], [1e200, 3e-310], [-1e200, 0.0]]),
        np.array([[1.0, 1e-250], [1.0, 0.0]]),
    ]
    for a in cases:
        exact = fractions(a)
        bounds = norms.pairwise_row_norms(a, q)
        assert np.array_equal(bounds, bounds.T) and not bounds.diagonal().any()
        for i in range(len(a)):
            for j in range(i + 1, len(a)):
                gap = [x - y for x, y in zip(exact[i], exact[j], strict=True)]
                assert encloses(bounds[i, j], gap, q)
                if not any(gap):
                    assert bounds[i, j] == 0.0


def test_pairs_by_gram_matrices_hold_where_scaled_rows_underflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_MANY_DIFFERENCES", 0.0)
    rows = np.array([[3e-290, 0.0], [0.0, 0.0], [-1e36, 0.0], [5e-324, 0.0], [0.0, 0.0]])
    for scale in (1.0, 1e-36, 1e250):
        a = rows * scale
        found, exact = norms.pairwise_row_norms(a, 2), fractions(a)
        for i, j in itertools.combinations(range(len(a)), 2):
            gap = [x - y for x, y in zip(exact[i], exact[j], strict=True)]
            assert Fraction(float(found[i, j])) ** 2 >= power_norm(gap, 2)
            assert any(gap) or found[i, j] == 0.0


def test_pairwise_errors_and_chunks() -> None:
    rng = np.random.default_rng(4)
    r = rng.standard_normal((200, 5000))
    plain = norms.pairwise_row_norms(r, 2)
    expected = np.array([[np.linalg.norm(x - y) for y in r[::40]] for x in r])
    assert np.allclose(plain[:, ::40], expected, rtol=1e-11) and np.all(
        plain[:, ::40] >= expected * (1 - 1e-15)
    )
    each = rng.random(200)
    worst = plain + each[:, None] + each[None, :]
    np.fill_diagonal(worst, 0.0)
    found = norms.pairwise_row_norms(sp.csr_array(r), 2, each)
    assert np.all(found >= worst * (1 - 1e-15)) and np.allclose(found, worst, rtol=1e-12)
    off = ~np.eye(200, dtype=bool)
    assert np.allclose((norms.pairwise_row_norms(r, 2, 0.5) - plain)[off], math.sqrt(0.5), rtol=1e-9)
    assert np.allclose(
        (norms.pairwise_row_norms(r, 1, 0.5) - norms.pairwise_row_norms(r, 1))[off], 50.0, rtol=1e-9
    )
    with pytest.raises(ValueError, match="shape"):
        norms.pairwise_row_norms(r, 2, np.ones(3))


# ------------------------------------------------------------------------------------------------- enclosures


def distance_squared(a: list[list[Fraction]], m: enclosures.Enclosure) -> Fraction:
    dense = m.dense().midpoint_for_search()
    stored = fractions(dense)
    return sum(
        ((x - y) ** 2 for p, q in zip(a, stored, strict=True) for x, y in zip(p, q, strict=True)), Fraction(0)
    )


def chain(
    rng: np.random.Generator, depth: int, sparse: bool
) -> tuple[enclosures.Enclosure, list[list[Fraction]]]:
    sides = rng.integers(1, 5, depth + 1)
    enclosure, exact = None, None
    for i in range(depth):
        w = rng.standard_normal((sides[i + 1], sides[i])) * 10.0 ** rng.uniform(-3, 3)
        if sparse:
            w = np.where(rng.random(w.shape) < 0.4, 0.0, w)
        factors = rng.standard_normal(sides[i + 1])
        form = sp.csr_array(w) if sparse else w
        true = fractions(w)
        enclosure = enclosures.Enclosure(form) if enclosure is None else enclosures.multiply(form, enclosure)
        exact = true if exact is None else product(true, exact)
        if i % 2:
            enclosure = enclosures.scale(enclosure, rows=factors)
            exact = [[Fraction(float(f)) * x for x in row] for f, row in zip(factors, exact, strict=True)]
        if i % 3 == 1:
            other = rng.standard_normal((sides[i + 1], sides[0]))
            enclosure = enclosures.add(enclosure, enclosures.Enclosure(other))
            exact = [
                [x + y for x, y in zip(p, q, strict=True)]
                for p, q in zip(exact, fractions(other), strict=True)
            ]
    assert enclosure is not None and exact is not None
    return enclosure, exact


@pytest.mark.parametrize("sparse", [False, True])
def test_composite_enclosures_hold_exactly(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enclosures, "_tidy", (lambda a: a) if sparse else enclosures._tidy)
    rng = np.random.default_rng(6)
    for depth in [3, 4, 5, 6, 7, 8] * 12:
        enclosure, exact = chain(rng, depth, sparse)
        size = norms.frobenius_norm(enclosure.midpoint_for_search())
        assert distance_squared(exact, enclosure) <= Fraction(enclosure.error) ** 2
        assert enclosure.error <= 1e-9 * size or size < 1e-6
        bound = enclosures.enclosure_norm(enclosure)
        assert exceeds(Fraction(bound), exact) or not any(x for row in exact for x in row)
        assert (
            bound <= (1 + 1e-9) * np.linalg.norm(np.array([[float(x) for x in row] for row in exact]), 2)
            or size < 1e-6
        )
        for p, rows in ((math.inf, exact), (1, [list(c) for c in zip(*exact, strict=True)])):
            assert Fraction(enclosures.enclosure_norm(enclosure, p)) >= max(
                power_norm(row, 1) for row in rows
            )


def test_without_its_rounding_term_a_composite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enclosures, "gamma", lambda n: 0.0)
    monkeypatch.setattr(enclosures, "U", 0.0)
    rng = np.random.default_rng(6)
    misses = 0
    for _ in range(20):
        enclosure, exact = chain(rng, 4, False)
        misses += distance_squared(exact, enclosure) > Fraction(enclosure.error) ** 2
    assert misses > 10


def test_relative_and_inherited_errors_are_carried() -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        a, m, e = rng.standard_normal((3, 4)), rng.standard_normal((4, 2)), rng.standard_normal((4, 2))
        vt = np.linalg.svd(a)[2]
        e = np.outer(vt[0], e[0]) / np.linalg.norm(e[0])  # the direction that A stretches most
        true = a * (1 + 1e-3 * rng.choice([-1, 1], a.shape))
        got = enclosures.multiply(a, enclosures.Enclosure(m, 0.1), relerr=1.001e-3)
        assert np.linalg.norm(true @ (m + 0.1 * e) - got.midpoint_for_search()) <= got.error
        known = enclosures.multiply(a, enclosures.Enclosure(m, 0.1), norm=norms.verified_norm(a))
        reached = np.linalg.norm(a @ (m + 0.1 * e) - known.midpoint_for_search())
        assert reached * (1 - 1e-12) <= known.error <= reached * (1 + 1e-9)
        assert known.error < got.error
    both = enclosures.stack(
        [enclosures.Enclosure(m, 3.0), enclosures.Enclosure(sp.csr_array(m), 4.0)], axis=1
    )
    assert both.shape == (4, 4) and math.isclose(both.error, 5.0) and both.error >= 5.0
    assert both.T.shape == (4, 4) and np.array_equal(
        both.T.midpoint_for_search(), both.midpoint_for_search().T
    )
    with pytest.raises(ValueError, match="cannot multiply"):
        enclosures.multiply(a, enclosures.Enclosure(a))
    with pytest.raises(ValueError, match="cannot add"):
        enclosures.add(enclosures.Enclosure(a), enclosures.Enclosure(m))
