"""Norms against rational arithmetic. The exact tests: s >= ||A||_2 iff every pivot of s^2 I - A'A is positive (or 0)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import beta as beta_distribution

from lipbounds import _gram, _krylov, norms

TOP = 6  # largest side in exact arithmetic


def fractions(a: np.ndarray) -> list[list[Fraction]]:
    return [[Fraction(float(x)) for x in row] for row in np.asarray(a, dtype=np.float64)]


def product(a: list[list[Fraction]], b: list[list[Fraction]]) -> list[list[Fraction]]:
    return [[sum((x * y for x, y in zip(row, col, strict=True)), Fraction(0)) for col in zip(*b, strict=True)] for row in a]


def exceeds(s: Fraction, a: list[list[Fraction]]) -> bool:
    """s > ||A||_2, decided over the integers: all leading minors of s^2 I - A A' are positive (Bareiss, Sylvester)."""
    if len(a) > len(a[0]):
        a = [list(col) for col in zip(*a, strict=True)]
    shared = math.lcm(s.denominator, *(x.denominator for row in a for x in row))
    rows = [[int(x * shared) for x in row] for row in a]
    top = int(s * shared)
    n = len(rows)
    m = [[-sum(x * y for x, y in zip(rows[i], rows[j], strict=True)) for j in range(n)] for i in range(n)]
    for i in range(n):
        m[i][i] += top * top
    previous = 1
    for k in range(n):
        if m[k][k] <= 0:
            return False
        for i in range(k + 1, n):
            for j in range(k + 1, n):
                m[i][j] = (m[i][j] * m[k][k] - m[i][k] * m[k][j]) // previous
        previous = m[k][k]
    return True


def hadamard(order: int) -> np.ndarray:
    h = np.ones((1, 1))
    while h.shape[0] < order:
        h = np.block([[h, h], [h, -h]])
    return h


def matrices(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Random and adversarial matrices with sides up to 6, all kinds in turn."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        m, n = (int(x) for x in rng.integers(1, TOP + 1, 2))
        a = rng.standard_normal((m, n))
        kind = index % 16
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
            a = np.zeros((m, n)) if index % 64 == 15 else np.hstack([a, a])[:, :TOP]
        yield a


def below_truth(count: int, starts: bool) -> list[int]:
    """Indices of matrices whose bound is not above the exact norm; `starts` also begins just below the truth."""
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


def test_verified_norm_is_never_below_the_exact_norm() -> None:
    assert below_truth(2200, starts=True) == []


def test_removing_the_rounding_term_breaks_the_property(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gram, "_rounding_shift", lambda *args: 0.0)
    assert len(below_truth(400, starts=True)) > 20


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
    assert not exceeds(Fraction(norms.verified_norm(np.eye(3), error=0.25)), fractions(np.eye(3) * 1.25 * (1 + 1e-12)))


@pytest.mark.parametrize("route", ["dense", "blocks", "sparse"])
def test_sparse_and_blocked_routes(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gram, "_BLOCK", 7)
    if route != "dense":
        monkeypatch.setattr(_gram, "_SMALL", 0)
        monkeypatch.setattr(_gram, "_SPARSE_FLOPS", 1e30 if route == "sparse" else 1e-30)
    rng = np.random.default_rng(2)
    for shape in ((30, 50), (50, 30), (20, 20), (1, 9), (250, 210)):
        dense = np.where(rng.random(shape) < 0.1, rng.standard_normal(shape), 0.0)
        dense[0, 0] = 1.0
        dense[3:5] = 0.0
        exact = float(np.linalg.norm(dense, 2))
        wide = dense if shape[0] <= shape[1] else dense.T
        assert np.allclose(_gram.gram(sp.csr_array(wide)), wide @ wide.T, rtol=1e-13, atol=1e-13)
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
    for bad in (nan, inf, sp.csr_array(nan), np.ones(3), np.ones((2, 2, 2)), np.ones((2, 2)) * 1j, np.array([["a"]])):
        for call in (norms.verified_norm, norms.frobenius_norm, norms.Enclosure):
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
        norms.multiply(huge, norms.Enclosure(huge))
    with pytest.raises(ValueError, match="2\\*\\*53"):
        norms.verified_norm(np.array([[2**53 + 1]]))
    for error in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError):
            norms.verified_norm(np.eye(2), error=error)
    with pytest.raises(ValueError, match="start"):
        norms.verified_norm(np.eye(2), start=math.nan)
    with pytest.raises(ValueError, match="norm 3"):
        norms.induced_norm(np.eye(2), 3)


# --------------------------------------------------------------------------------------------------------- row norms


def power_norm(row: list[Fraction], q: float) -> Fraction:
    """The q-norm for q = 1, inf; its square for q = 2."""
    if not row:
        return Fraction(0)
    return sum((abs(x) for x in row), Fraction(0)) if q == 1 else max(map(abs, row)) if q == math.inf else sum(
        (x * x for x in row), Fraction(0)
    )


def encloses(bound: float, row: list[Fraction], q: float, slack: float = 1e-12) -> bool:
    """exact <= bound <= (1 + slack) exact, with a few denormal steps to spare."""
    value = Fraction(float(bound))
    low = max(Fraction(0), value * (1 - Fraction(slack)) - Fraction(2.0**-1070))
    exact = power_norm(row, q)
    return (low**2 <= exact <= value**2) if q == 2 else (low <= exact <= value)


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
    row = a + np.outer([0, 1], [1, 1, 1]) * e / math.sqrt(3)
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
    cases += [np.array([[1e200, 1e-310], [1e200, 3e-310], [-1e200, 0.0]]), np.array([[1.0, 1e-250], [1.0, 0.0]])]
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


def test_pairwise_errors_and_chunks() -> None:
    rng = np.random.default_rng(4)
    r = rng.standard_normal((200, 5000))
    plain = norms.pairwise_row_norms(r, 2)
    expected = np.array([[np.linalg.norm(x - y) for y in r[::40]] for x in r])
    assert np.allclose(plain[:, ::40], expected, rtol=1e-11) and np.all(plain[:, ::40] >= expected * (1 - 1e-15))
    each = rng.random(200)
    worst = plain + each[:, None] + each[None, :]
    np.fill_diagonal(worst, 0.0)
    found = norms.pairwise_row_norms(sp.csr_array(r), 2, each)
    assert np.all(found >= worst * (1 - 1e-15)) and np.allclose(found, worst, rtol=1e-12)
    off = ~np.eye(200, dtype=bool)
    assert np.allclose((norms.pairwise_row_norms(r, 2, 0.5) - plain)[off], math.sqrt(0.5), rtol=1e-9)
    assert np.allclose((norms.pairwise_row_norms(r, 1, 0.5) - norms.pairwise_row_norms(r, 1))[off], 50.0, rtol=1e-9)
    with pytest.raises(ValueError, match="shape"):
        norms.pairwise_row_norms(r, 2, np.ones(3))


# -------------------------------------------------------------------------------------------------------- enclosures


def distance_squared(a: list[list[Fraction]], m: norms.Enclosure) -> Fraction:
    dense = m.matrix.toarray() if sp.issparse(m.matrix) else m.matrix
    stored = fractions(dense)
    return sum(((x - y) ** 2 for p, q in zip(a, stored, strict=True) for x, y in zip(p, q, strict=True)), Fraction(0))


def chain(rng: np.random.Generator, depth: int, sparse: bool) -> tuple[norms.Enclosure, list[list[Fraction]]]:
    sides = rng.integers(1, 5, depth + 1)
    enclosure, exact = None, None
    for i in range(depth):
        w = rng.standard_normal((sides[i + 1], sides[i])) * 10.0 ** rng.uniform(-3, 3)
        if sparse:
            w = np.where(rng.random(w.shape) < 0.4, 0.0, w)
        factors = rng.standard_normal(sides[i + 1])
        form = sp.csr_array(w) if sparse else w
        true = fractions(w)
        enclosure = norms.Enclosure(form) if enclosure is None else norms.multiply(form, enclosure)
        exact = true if exact is None else product(true, exact)
        if i % 2:
            enclosure = norms.scale(enclosure, rows=factors)
            exact = [[Fraction(float(f)) * x for x in row] for f, row in zip(factors, exact, strict=True)]
        if i % 3 == 1:
            other = rng.standard_normal((sides[i + 1], sides[0]))
            enclosure = norms.add(enclosure, norms.Enclosure(other))
            exact = [[x + y for x, y in zip(p, q, strict=True)] for p, q in zip(exact, fractions(other), strict=True)]
    assert enclosure is not None and exact is not None
    return enclosure, exact


@pytest.mark.parametrize("sparse", [False, True])
def test_composite_enclosures_hold_exactly(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_tidy", (lambda a: a) if sparse else norms._tidy)
    rng = np.random.default_rng(6)
    for depth in [3, 4, 5, 6, 7, 8] * 12:
        enclosure, exact = chain(rng, depth, sparse)
        size = norms.frobenius_norm(enclosure.matrix)
        assert distance_squared(exact, enclosure) <= Fraction(enclosure.error) ** 2
        assert enclosure.error <= 1e-9 * size or size < 1e-6
        bound = norms.enclosure_norm(enclosure)
        assert exceeds(Fraction(bound), exact)
        assert bound <= (1 + 1e-9) * np.linalg.norm(np.array([[float(x) for x in row] for row in exact]), 2) or size < 1e-6
        for p, rows in ((math.inf, exact), (1, [list(c) for c in zip(*exact, strict=True)])):
            assert Fraction(norms.enclosure_norm(enclosure, p)) >= max(power_norm(row, 1) for row in rows)


def test_without_its_rounding_term_a_composite_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "gamma", lambda n: 0.0)
    monkeypatch.setattr(norms, "U", 0.0)
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
        u, _, vt = np.linalg.svd(a)
        e = np.outer(vt[0], e[0]) / np.linalg.norm(e[0])  # the direction that A stretches most
        true = a * (1 + 1e-3 * rng.choice([-1, 1], a.shape))
        got = norms.multiply(a, norms.Enclosure(m, 0.1), relerr=1.001e-3)
        assert np.linalg.norm(true @ (m + 0.1 * e) - got.matrix) <= got.error
        known = norms.multiply(a, norms.Enclosure(m, 0.1), norm=norms.verified_norm(a))
        reached = np.linalg.norm(a @ (m + 0.1 * e) - known.matrix)
        assert reached * (1 - 1e-12) <= known.error <= reached * (1 + 1e-9)
        assert known.error < got.error
    both = norms.stack([norms.Enclosure(m, 3.0), norms.Enclosure(sp.csr_array(m), 4.0)], axis=1)
    assert both.shape == (4, 4) and math.isclose(both.error, 5.0) and both.error >= 5.0
    assert both.T.shape == (4, 4) and np.array_equal(both.T.matrix, both.matrix.T)
    with pytest.raises(ValueError, match="cannot multiply"):
        norms.multiply(a, norms.Enclosure(a))
    with pytest.raises(ValueError, match="cannot add"):
        norms.add(norms.Enclosure(a), norms.Enclosure(m))


# -------------------------------------------------------------------------------------------------------- convolution


def convolution_matrix(kernel: np.ndarray, n: tuple[int, ...]) -> np.ndarray:
    """The 'same' zero-padded convolution (cross-correlation) as a matrix, from unit vectors, by plain loops."""
    *k, cin, cout = kernel.shape
    low = [(size - 1) // 2 for size in k]
    out = np.zeros((*n, cout, *n, cin))
    for p in np.ndindex(*n):
        for a in np.ndindex(*k):
            q = tuple(x + y - z for x, y, z in zip(p, a, low, strict=True))
            if all(0 <= x < size for x, size in zip(q, n, strict=True)):
                out[(*p, slice(None), *q, slice(None))] += kernel[a].T
    return out.reshape(int(np.prod(n)) * cout, int(np.prod(n)) * cin)


def test_the_input_grid_is_not_enough_for_zero_padding() -> None:
    kernel = np.array([-2.0, 4.0, -2.0]).reshape(3, 1, 1)
    true = 4 + 2 * math.sqrt(2)
    assert math.isclose(np.linalg.norm(convolution_matrix(kernel, (3,)), 2), true)
    on_input_grid = np.abs(np.fft.fft(kernel.ravel(), 3)).max()
    assert math.isclose(on_input_grid, 6.0) and on_input_grid < 6.83 > true - 0.01
    bound = norms.conv_fft_bound(kernel, (3,))
    assert true < bound and math.isclose(bound, 4 + 4 * math.cos(math.pi / 5), rel_tol=1e-10)


def test_conv_bound_is_above_the_norm_and_tight() -> None:
    rng = np.random.default_rng(9)
    for k, n, cin, cout in (((3, 3), (5, 4), 2, 3), ((2, 5), (6, 3), 3, 1), ((1, 1), (3, 3), 4, 4), ((4,), (7,), 2, 2)):
        kernel = rng.standard_normal((*k, cin, cout))
        bound = norms.conv_fft_bound(kernel, n)
        assert bound >= np.linalg.norm(convolution_matrix(kernel, n), 2)
        grid = [x + y - 1 for x, y in zip(n, k, strict=True)]
        blocks = np.fft.fftn(kernel, grid, axes=range(len(k))).reshape(-1, cin, cout)
        exact = np.linalg.norm(blocks, 2, axis=(1, 2)).max()
        assert exact * (1 - 1e-14) <= bound <= exact * (1 + 1e-11)
        for factor in (1e-310, 1e200):
            assert math.isclose(norms.conv_fft_bound(kernel * factor, n), bound * factor, rel_tol=1e-9)
    point = rng.standard_normal((1, 5, 4))  # one tap: the bound is the norm of a plain matrix
    assert exceeds(Fraction(norms.conv_fft_bound(point, (2,))), fractions(point[0]))
    assert norms.conv_fft_bound(np.zeros((3, 3, 1, 1)), (4, 4)) == 0.0
    for bad, shape in ((np.ones((3, 3, 1)), (4, 4)), (np.full((1, 1, 1), math.nan), (3,)), (np.ones((1, 1, 1)), (0,))):
        with pytest.raises(ValueError):
            norms.conv_fft_bound(bad, shape)


# -------------------------------------------------------------------------------------------------- Golub-Kahan, power


def spectra(rng: np.random.Generator, n: int) -> list[np.ndarray]:
    return [
        rng.random(n),
        np.ones(n),
        1 + 1e-12 * rng.random(n),
        1 + 1e-4 * (np.arange(n) == 0),
        1 + 1e-3 * rng.random(n),
        0.5 ** np.arange(n),
        np.r_[np.full(n - n // 2, 1e-6), np.linspace(0.9, 1, n // 2)],
        (np.arange(n) == 0) * 3.0,
    ]


def test_golub_kahan_never_fails_and_is_tight() -> None:
    rng = np.random.default_rng(10)
    for seed in range(40):
        m, n = (int(x) for x in rng.integers(1, 60, 2))
        u, v = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (m, n))
        for values in spectra(rng, min(m, n)):
            a = (u[:, : min(m, n)] * values) @ v[:, : min(m, n)].T
            exact = float(np.linalg.norm(a, 2))
            for steps in (1, 3, 300):
                upper, lower, used = norms.golub_kahan(lambda x: a @ x, lambda y: a.T @ y, n, seed=seed, max_steps=steps)
                assert lower <= exact <= upper
                assert used <= min(steps, n)
            assert upper <= 1.0011 * exact and lower >= exact / 1.0011


def test_golub_kahan_failure_probability() -> None:
    """The start is nearly orthogonal to the top vector with the stated probability at most, and it is not slack."""
    for n in (2, 3, 4, 10, 1000, 10**6):
        for failure in (0.3, 1e-2, 1e-9):
            delta = _krylov._overlap(failure, n)
            probability = beta_distribution.cdf(delta**2, 0.5, (n - 1) / 2)
            assert 0.5 * failure < probability <= failure * (1 + 1e-9)
    values = np.r_[1.0, np.full(9, 0.9)]
    seeds = range(400)
    missed = sum(norms.golub_kahan(lambda x: values * x, lambda x: values * x, 10, seed=s, failure=0.5, max_steps=1)[0] < 1 for s in seeds)
    assert 0 < missed < 0.5 * len(seeds)


def test_golub_kahan_hidden_direction_is_covered() -> None:
    """A start that misses the top vector by luck (1e-11 of it) is inside the budget: the bound must still hold."""
    n, c = 50, 2e-10
    start = np.random.default_rng(0).standard_normal(n)
    start /= np.linalg.norm(start)
    side = np.random.default_rng(1).standard_normal(n)
    side -= (side @ start) * start
    x = c * start + math.sqrt(1 - c * c) * side / np.linalg.norm(side)
    assert abs(x @ start) > _krylov._overlap(1e-9, n)
    for extra in (1e-8, 1e-6, 1e-4):
        def apply(v: np.ndarray, extra: float = extra) -> np.ndarray:
            return v + extra * (x @ v) * x

        upper, _, _ = norms.golub_kahan(apply, apply, n, seed=0)
        assert upper >= 1 + extra


def test_golub_kahan_edges() -> None:
    zero = norms.golub_kahan(lambda x: np.zeros(3), lambda y: np.zeros(4), 4)
    assert zero == (0.0, 0.0, 1)
    for size in (1e-160, 1e200):
        a = np.random.default_rng(0).standard_normal((5, 8)) * size
        exact = np.linalg.norm(a / size, 2) * size
        upper, lower, _ = norms.golub_kahan(lambda x: a @ x, lambda y: a.T @ y, 8)  # noqa: B023
        assert lower <= exact <= upper <= 1.001 * exact
    with pytest.raises(ValueError, match="NaN"):
        norms.golub_kahan(lambda x: x * math.nan, lambda x: x, 3)
    with pytest.raises(ValueError, match="too small"):
        norms.golub_kahan(lambda x: x, lambda x: x, 100, failure=1e-15)
    with pytest.raises(ValueError, match="failure"):
        norms.golub_kahan(lambda x: x, lambda x: x, 3, failure=0.0)


def test_power_iteration_value_gradient_and_warm_start() -> None:
    a = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), dtype=jnp.float32)
    v0 = jnp.asarray(np.random.default_rng(1).standard_normal(5), dtype=jnp.float32)

    def sigma(a: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return norms.power_iteration(lambda x: a @ x, v, 100)

    (value, v), gradient = jax.jit(jax.value_and_grad(sigma, has_aux=True))(a, v0)
    u, s, vt = np.linalg.svd(np.asarray(a, dtype=np.float64))
    assert math.isclose(float(value), s[0], rel_tol=1e-5)
    assert np.allclose(gradient, np.outer(u[:, 0], vt[0]), atol=1e-3)
    again, _ = norms.power_iteration(lambda x: a @ x, v, 0)
    assert math.isclose(float(again), s[0], rel_tol=1e-5)
    few = [float(norms.power_iteration(lambda x: a @ x, v0, k)[0]) for k in (0, 1, 2, 5)]
    assert few == sorted(few) and few[0] < s[0] * (1 + 1e-6)
    batch = jax.vmap(jax.grad(lambda a: sigma(a, v0)[0]))(jnp.stack([a, 2 * a]))
    assert np.allclose(batch[0], batch[1], atol=1e-5) and np.allclose(batch[0], gradient, atol=1e-5)


def test_power_iteration_zero_map_and_pytrees() -> None:
    zero = jnp.zeros((3, 2), dtype=jnp.float32)
    value, gradient = jax.value_and_grad(lambda a: norms.power_iteration(lambda x: a @ x, jnp.ones(2, jnp.float32), 3)[0])(zero)
    assert float(value) == 0.0 and not np.any(np.isnan(gradient)) and not np.any(gradient)
    value, v = norms.power_iteration(
        lambda t: {"x": t[0] * 3, "y": (t[1] * 2, t[1])}, (jnp.zeros(2, jnp.float32), jnp.zeros((2, 1), jnp.float32)), 60
    )
    assert math.isclose(float(value), 3.0, rel_tol=1e-5) and v[1].shape == (2, 1)
    big, _ = norms.power_iteration(lambda x: x * 1e30, jnp.ones(4, jnp.float32), 3)
    assert math.isclose(float(big), 1e30, rel_tol=1e-5)
