"""Norms of convolutions and of maps known by their products: Fourier bound, Golub-Kahan, power iteration."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from exact import exceeds, fractions
from scipy.stats import beta as beta_distribution

from lipbounds._norms import fourier, lanczos

# ------------------------------------------------------------------------------------------------ convolution


def convolution_matrix(kernel: np.ndarray, n: tuple[int, ...]) -> np.ndarray:
    """The 'same' zero-padded convolution (cross-correlation) as a matrix, by plain loops."""
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
    bound = fourier.conv_fft_bound(kernel, (3,))
    assert true < bound and math.isclose(bound, 4 + 4 * math.cos(math.pi / 5), rel_tol=1e-10)


def test_conv_bound_is_above_the_norm_and_tight() -> None:
    rng = np.random.default_rng(9)
    for k, n, cin, cout in (
        ((3, 3), (5, 4), 2, 3),
        ((2, 5), (6, 3), 3, 1),
        ((1, 1), (3, 3), 4, 4),
        ((4,), (7,), 2, 2),
    ):
        kernel = rng.standard_normal((*k, cin, cout))
        bound = fourier.conv_fft_bound(kernel, n)
        assert bound >= np.linalg.norm(convolution_matrix(kernel, n), 2)
        grid = [x + y - 1 for x, y in zip(n, k, strict=True)]
        blocks = np.fft.fftn(kernel, grid, axes=range(len(k))).reshape(-1, cin, cout)
        exact = np.linalg.norm(blocks, 2, axis=(1, 2)).max()
        assert exact * (1 - 1e-14) <= bound <= exact * (1 + 1e-11)
        for factor in (1e-310, 1e200):
            assert math.isclose(fourier.conv_fft_bound(kernel * factor, n), bound * factor, rel_tol=1e-9)
    for taps in (2, 3, 5):  # few points: above every frequency, by no more than the factor of the grid
        kernel = rng.standard_normal((taps, taps, 3, 2))
        fine, coarse = (
            fourier.conv_fft_bound(kernel, (200, 200)),
            fourier.conv_fft_bound(kernel, (200, 200), 6),
        )
        grid = max(6, 3 * taps) + taps - 1
        assert fine <= coarse <= fine / math.cos((taps - 1) * math.pi / grid) * (1 + 1e-9)
    point = rng.standard_normal((1, 5, 4))  # one tap: the bound is the norm of a plain matrix
    assert exceeds(Fraction(fourier.conv_fft_bound(point, (2,))), fractions(point[0]))
    assert fourier.conv_fft_bound(np.zeros((3, 3, 1, 1)), (4, 4)) == 0.0
    for bad, shape in (
        (np.ones((3, 3, 1)), (4, 4)),
        (np.full((1, 1, 1), math.nan), (3,)),
        (np.ones((1, 1, 1)), (0,)),
    ):
        with pytest.raises(ValueError):
            fourier.conv_fft_bound(bad, shape)


# ----------------------------------------------------------------------------------------- Golub-Kahan, power


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


@pytest.mark.slow
def test_golub_kahan_never_fails_and_is_tight() -> None:
    rng = np.random.default_rng(10)
    for seed in range(40):
        m, n = (int(x) for x in rng.integers(1, 60, 2))
        u, v = (np.linalg.qr(rng.standard_normal((k, k)))[0] for k in (m, n))
        for values in spectra(rng, min(m, n)):
            a = (u[:, : min(m, n)] * values) @ v[:, : min(m, n)].T
            exact = float(np.linalg.norm(a, 2))
            for steps in (1, 3, 300):
                upper, lower, used = lanczos.golub_kahan(
                    partial(np.matmul, a), partial(np.matmul, a.T), n, seed=seed, max_steps=steps
                )
                assert lower <= exact <= upper
                assert used <= min(steps, n)
            assert upper <= 1.0011 * exact and lower >= exact / 1.0011


@pytest.mark.slow
def test_golub_kahan_failure_probability() -> None:
    """The start misses the top vector with at most the stated probability, and not much less."""
    for n in (2, 3, 4, 10, 1000, 10**6):
        for failure in (0.3, 1e-2, 1e-9):
            delta = lanczos.overlap(failure, n)
            probability = beta_distribution.cdf(delta**2, 0.5, (n - 1) / 2)
            assert 0.5 * failure < probability <= failure * (1 + 1e-9)
    values = np.r_[1.0, np.full(9, 0.9)]
    seeds = range(400)
    missed = sum(
        lanczos.golub_kahan(lambda x: values * x, lambda x: values * x, 10, seed=s, failure=0.5, max_steps=1)[
            0
        ]
        < 1
        for s in seeds
    )
    assert 0 < missed < 0.5 * len(seeds)


def test_golub_kahan_hidden_direction_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start with very little of the top vector, but inside the budget: the bound must still hold."""
    n, c = 1000, 5e-11
    start = np.random.default_rng(0).standard_normal(n)
    start /= np.linalg.norm(start)
    side = np.random.default_rng(1).standard_normal(n)
    side -= (side @ start) * start
    x = c * start + math.sqrt(1 - c * c) * side / np.linalg.norm(side)
    assert abs(x @ start) > lanczos.overlap(1e-9, n)
    root, missed = lanczos._largest_root, 0
    for extra in (1e-8, 1e-7, 1e-6, 1e-4):

        def apply(v: np.ndarray, extra: float = extra) -> np.ndarray:
            return v + extra * (x @ v) * x

        assert lanczos.golub_kahan(apply, apply, n, seed=0)[0] >= 1 + extra
        with monkeypatch.context() as patch:  # without the rounding loss the direction is overlooked
            patch.setattr(
                lanczos,
                "_largest_root",
                lambda a, b, limit, low, loss, rtol=1e-12: root(a, b, limit, low, 0.0),
            )
            missed += lanczos.golub_kahan(apply, apply, n, seed=0)[0] < 1 + extra
    assert missed > 0


def test_golub_kahan_edges() -> None:
    zero = lanczos.golub_kahan(lambda x: np.zeros(3), lambda y: np.zeros(4), 4)
    assert zero == (0.0, 0.0, 1)
    for size in (1e-160, 1e200):
        a = np.random.default_rng(0).standard_normal((5, 8)) * size
        exact = np.linalg.norm(a / size, 2) * size
        upper, lower, _ = lanczos.golub_kahan(partial(np.matmul, a), partial(np.matmul, a.T), 8)
        assert lower <= exact <= upper <= 1.001 * exact
    with pytest.raises(ValueError, match="NaN"):
        lanczos.golub_kahan(lambda x: x * math.nan, lambda x: x, 3)
    with pytest.raises(ValueError, match="too small"):
        lanczos.golub_kahan(lambda x: x, lambda x: x, 100, failure=1e-15)
    with pytest.raises(ValueError, match="failure"):
        lanczos.golub_kahan(lambda x: x, lambda x: x, 3, failure=0.0)
