"""The banded proof of `banded_cholesky`: against dense proofs, against rational arithmetic, and in bounded memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import jax
import numpy as np
import pytest
import scipy.sparse as sp
from exact import exceeds, fractions
from jax import lax

from lipbounds._norms import banded_cholesky, cholesky
from lipbounds._norms import matrices as norms


def operator(fn: Any, shape: tuple[int, ...]) -> sp.csr_array:
    """The matrix of a linear JAX function of an array, column by column in float64."""
    n = math.prod(shape)
    with jax.enable_x64(True):
        columns = jax.vmap(lambda e: fn(e.reshape(shape)).ravel())(np.eye(n))
    return sp.csr_array(np.asarray(columns).T)


def narrow_taps() -> sp.csr_array:
    """A convolution and a pointwise one of the same image, one below the other: fewer rows than columns."""
    point = np.random.default_rng(0).standard_normal((2, 8))
    return sp.csr_array(sp.vstack([convolution((12, 12), 8, 2), sp.kron(sp.eye_array(144), point)]))


def convolution(
    size: tuple[int, ...], cin: int, cout: int, *, first: bool = False, stride: int = 1, seed: int = 0
) -> sp.csr_array:
    """A zero-padded convolution with windows of 3, channels last or first."""
    space = "DHW"[-len(size) :]
    layout = f"NC{space}" if first else f"N{space}C"
    kernel = np.random.default_rng(seed).standard_normal((*[3] * len(size), cin, cout))
    numbers = (layout, f"{space}IO", layout)

    def fn(x: Any) -> Any:
        return lax.conv_general_dilated(
            x[None], kernel, (stride,) * len(size), "SAME", dimension_numbers=numbers
        )

    return operator(fn, (cin, *size) if first else (*size, cin))


def random_sparse(rows: int, columns: int, density: float, seed: int = 0) -> sp.csr_array:
    rng = np.random.default_rng(seed)
    return sp.csr_array(
        np.where(rng.random((rows, columns)) < density, rng.standard_normal((rows, columns)), 0)
    )


def pooling() -> sp.csr_array:
    return operator(
        lambda x: lax.reduce_window(x, 0.0, lax.add, (3, 3, 1), (2, 2, 1), ((1, 1), (1, 1), (0, 0))) / 9,
        (16, 16, 3),
    )


def shuffled(a: sp.csr_array, seed: int = 3) -> sp.csr_array:
    rng = np.random.default_rng(seed)
    return sp.csr_array(a[rng.permutation(a.shape[0])][:, rng.permutation(a.shape[1])])


def cases() -> dict[str, sp.csr_array]:
    image = convolution((12, 12), 3, 4)
    return {
        "random": random_sparse(150, 220, 0.02),
        "random tall": random_sparse(220, 150, 0.02, 1),
        "random full band": random_sparse(60, 90, 0.5, 2),
        "channels last": image,
        "channels first": convolution((12, 12), 3, 4, first=True),
        "one axis": convolution((90,), 4, 4),
        "three axes": convolution((5, 5, 5), 2, 3, first=True),
        "stride": convolution((16, 16), 2, 5, stride=2),
        "stride, first": convolution((16, 16), 4, 2, stride=2, first=True),
        "product": sp.csr_array(convolution((12, 12), 4, 2, seed=5) @ image),
        "product with a diagonal": sp.csr_array(sp.diags_array(np.linspace(-1, 2, image.shape[0])) @ image),
        "pooling of a convolution": sp.csr_array(pooling() @ convolution((16, 16), 2, 3)),
        "two taps": sp.csr_array(sp.vstack([image, convolution((12, 12), 3, 2, seed=7)])),
        "two narrow taps": narrow_taps(),
        "shuffled": shuffled(image),
        "empty rows": sp.csr_array(sp.vstack([sp.csr_array((40, 432)), image[:200], sp.csr_array((9, 432))])),
        "scaled": sp.csr_array(image * 1e-180),
    }


CASES = cases()


def proof(a: Any, way: str = "banded", keep: bool = False) -> banded_cholesky.Plan:
    """The plan of one way, whatever the rule of sizes would choose."""
    (plan,) = (
        p for p in banded_cholesky.plans(norms.wide(norms.as_matrix(a))) if p.way == way and not p.keep
    )
    return dataclasses.replace(plan, keep=keep)


@pytest.fixture(autouse=True)
def small_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are planned, and in several block columns."""
    monkeypatch.setattr(banded_cholesky, "LEAST", 1)
    monkeypatch.setattr(banded_cholesky, "_height", lambda w: 7)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_banded_and_dense_proofs_agree(name: str) -> None:
    a = CASES[name]
    exact = float(np.linalg.norm(np.ldexp(a.toarray(), 600 if name == "scaled" else 0), 2))
    exact = math.ldexp(exact, -600 if name == "scaled" else 0)
    dense, banded = (norms.verified_norm(a, plan=proof(a, way)) for way in ("dense", "banded"))
    kept = norms.verified_norm(a, plan=proof(a, keep=True))
    for bound in (dense, banded, kept):
        assert exact * (1 - 1e-13) <= bound <= exact * (1 + 1e-9)
    assert math.isclose(banded, dense, rel_tol=1e-9)
    for start in (exact, exact * (1 - 1e-9), exact / 7):
        assert exact * (1 - 1e-13) <= norms.verified_norm(a, 0.0, start, proof(a)) <= exact * (1 + 1e-9)


@pytest.mark.parametrize("route", ["sparse", "dense"])
def test_block_rows_of_the_gram_matrix_are_its_own(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "SPARSE_FLOPS", 1e30 if route == "sparse" else 1e-30)
    for name in ("random", "channels first", "empty rows"):
        b = norms.wide(CASES[name])
        plan = proof(b)
        banded = banded_cholesky.BandedCholesky(b, 1, 1.0, plan)
        gram = (banded.b @ banded.b.T).toarray()
        for lo, hi in ((0, 7), (7, 14), (b.shape[0] - 3, b.shape[0])):
            top = min(hi + plan.width, b.shape[0])
            assert np.allclose(banded._gram_rows(lo, hi, top), gram[lo:top, lo:hi], rtol=1e-13, atol=1e-13)
            assert not gram[top:, lo:hi].any(), "entries outside the band would be left out"
        assert np.allclose(banded.diagonal, gram.diagonal(), rtol=1e-13)


def test_a_plan_of_another_matrix_proves_nothing() -> None:
    a = sp.csr_array(np.triu(np.ones((3, 4))))
    good = banded_cholesky.Plan("banded", 0, 0.0, None, 2)
    assert norms.verified_norm(a, plan=good) >= float(np.linalg.norm(a.toarray(), 2)) * (1 - 1e-15)
    for wrong in (replace(good, width=1), replace(good, order=np.array([0, 0, 1]))):
        with pytest.raises(ValueError, match="another matrix"):
            norms.verified_norm(a, plan=wrong)


def near_singular(count: int, seed: int = 0) -> Iterator[sp.csr_array]:
    """Small matrices in blocks, made so that rounding hides what is above the top; rows mostly shuffled."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        kind = index % 6
        size = int(rng.integers(5, 9))
        if kind == 0:  # rotations with dyadic entries side by side
            c = np.round(rng.uniform(-1, 1) * 2.0**26) / 2.0**26
            d = np.sqrt(1 - c * c)
            blocks = [np.array([[c, -d], [d, c]])] * size
        elif kind == 1:  # orthogonal: every direction is a top one
            blocks = [np.linalg.qr(rng.standard_normal((2 * size, 2 * size)))[0] * rng.uniform(0.1, 3.0)]
        elif kind == 2:  # nearly of rank one: large Gram entries
            blocks = [1.0 + rng.standard_normal((size, size)) * 2.0**-40 for _ in range(2)]
        elif kind == 3:  # long rows: 1, then entries whose squares are lost one by one beside it
            blocks = [np.full((2, 1800), 2.0**-26.6) for _ in range(2)]
            for block in blocks:
                block[:, :: int(rng.integers(1, 4)) * 200] = rng.uniform(1.0, 1.2)
        elif kind == 4:  # a band of different sizes
            diagonals = [np.ones(size), np.full(size - 1, 2.0**-30), np.full(size - 2, 2.0**-55)]
            blocks = [sp.diags_array(diagonals, offsets=[0, 1, -2])]
        else:
            blocks = [np.array([[1, 1, 1, 1], [1, -1, 1, -1]]) * rng.uniform(0.1, 3)] * (size // 2)
        a = sp.csr_array(sp.block_diag([sp.csr_array(block) for block in blocks], format="csr"))
        yield shuffled(a, index) if index % 2 else a


def root_above(t: float) -> Fraction:
    """The square root of t, above it by at most 2^-200."""
    return Fraction(math.isqrt(int(Fraction(t) * 4**200)) + 1, 2**200)


def wrong_proofs(count: int) -> int:
    """How many proofs of t succeed although t < ||B||^2, for t below and above what NumPy says."""
    wrong = 0
    for a in near_singular(count):
        b = norms.wide(a)
        banded = banded_cholesky.BandedCholesky(
            b, cholesky.nonzeros_per_row(b), cholesky.absolute_gram_norm(b), proof(b)
        )
        rows = b.toarray()
        gram = [[math.fsum(x * y) for y in rows] for x in rows]  # LAPACK loses small entries of long rows
        top = float(np.linalg.eigvalsh(np.array(gram))[-1])
        exact = fractions(rows)
        for change in (-(2.0**-44), -(2.0**-47), -(2.0**-49), -(2.0**-50), -(2.0**-51), -(2.0**-52), 0.0):
            t = top * (1 + change)
            wrong += banded.proves(t) and not exceeds(root_above(t), exact)
        bound = norms.verified_norm(a, plan=proof(a))
        assert bound <= math.sqrt(top) * (1 + 1e-10)
        wrong += not exceeds(Fraction(bound), exact)
    return wrong


@pytest.mark.sampled(4)
@pytest.mark.parametrize("height", [1, 3, 64])
def test_nothing_below_the_exact_norm_is_proved(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banded_cholesky, "_height", lambda w: height)
    assert wrong_proofs(72) == 0


@pytest.mark.slow
def test_without_the_shift_some_matrices_are_wrongly_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "rounding_shift", lambda *args: 0.0)
    assert wrong_proofs(72) >= 10


@pytest.mark.slow
def test_the_factor_is_the_cholesky_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each t is proved exactly where t I - G has positive pivots, far from rounding, in any block height."""
    for height, name in itertools.product((1, 5, 40), ("channels first", "random tall", "two taps")):
        monkeypatch.setattr(banded_cholesky, "_height", lambda w, height=height: height)
        b = norms.wide(CASES[name])
        banded = banded_cholesky.BandedCholesky(b, 100, 1.0, proof(b))
        top = float(np.linalg.norm(b.toarray(), 2)) ** 2
        assert banded.proves(top * (1 + 1e-8))
        assert not banded.proves(top * (1 - 1e-8)) and not banded.proves(top * 0.5)
        assert not banded.proves(0.0) and not banded.proves(math.nan)


def test_the_shift_is_taken_with_the_band() -> None:
    g = np.full(5000, 0.5)
    whole = cholesky.rounding_shift(5000, 9, 5000, 1.0, g, 3.0)
    assert cholesky.rounding_shift(5000, 9, 5000, 1.0, g, 3.0, 4999) == pytest.approx(whole, rel=1e-3)
    narrow = cholesky.rounding_shift(5000, 9, 5000, 1.0, g, 3.0, 40)
    rest = 2 * 12 * 2.0**-53 * 3 + 4 * 2.0**-53 * 1.5
    assert narrow - rest == pytest.approx(2 * 45 * 2.0**-53 * 81 * 1.5, rel=1e-6)


# ------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("name", CASES)
def test_orders_and_bandwidths(name: str) -> None:
    b = norms.wide(CASES[name])
    columns = sp.csr_array(b.T.tocsr())
    pattern = (b != 0).astype(float)
    gram = (pattern @ pattern.T).toarray() > 0
    i, j = np.nonzero(gram)
    assert banded_cholesky.bandwidth(columns) == np.abs(i - j).max(initial=0)
    order, width = banded_cholesky.row_order(b)
    order = np.arange(b.shape[0]) if order is None else order
    assert np.array_equal(np.sort(order), np.arange(b.shape[0]))
    i, j = np.nonzero(gram[order][:, order])
    assert width == np.abs(i - j).max(initial=0) <= banded_cholesky.bandwidth(columns)


def test_orders_find_narrow_bands() -> None:
    widths = {name: banded_cholesky.row_order(norms.wide(a))[1] for name, a in CASES.items()}
    assert widths["channels first"] == widths["channels last"] == 2 * 12 * 3 + 2 * 3 + 2
    assert widths["one axis"] == 2 * 4 + 3
    assert widths["stride"] <= 8 * 5 * 2 and widths["stride, first"] <= 2 * 8 * 2 * 2
    assert widths["shuffled"] <= 200 and banded_cholesky.bandwidth(CASES["shuffled"].T.tocsr()) > 350
    assert widths["two narrow taps"] <= 130, "315 tap after tap, 165 by Cuthill-McKee"


def test_the_cheaper_way_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    wide = sp.csr_array(sp.diags_array([np.ones(5000), np.full(4999, 0.5)], offsets=[0, 1]))
    assert norms.proof_plan(wide).way == "banded" and norms.proof_plan(wide).width == 1
    assert norms.proof_plan(random_sparse(1200, 1200, 0.02)).way == "dense"
    assert norms.proof_plan(CASES["channels last"]).way == "dense", "small ones need no search"
    assert norms.proof_plan(np.ones((3000, 3000))).way == "dense"
    # a budget takes the other way where only that one fits, and the smallest where none does
    b = norms.wide(convolution((20, 20), 3, 3))
    dense, banded = (proof(b, way) for way in ("dense", "banded"))
    assert banded.memory < dense.memory
    for limit in (None, dense.memory, banded.memory, 10):
        plan = banded_cholesky.choose(b, limit)
        assert plan.way == "banded" or plan.memory <= dense.memory
    exact = math.sqrt(1.25 + math.cos(math.pi / 5001))  # of the bidiagonal matrix, to 1e-7
    assert math.isclose(norms.verified_norm(wide), exact, rel_tol=1e-6)


# ------------------------------------------------------------------------------------------------------- memory


def peak_of(call: Any) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("first", [False, True])
def test_the_stated_memory_covers_what_is_held(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    a = convolution((24, 24), 2, 4, first=first)
    a = sp.csr_array(sp.block_diag([a, a, a], format="csr"))
    plan = norms.proof_plan(a)
    assert plan.way == "banded"
    held = peak_of(lambda: norms.verified_norm(a, plan=plan)) + banded_cholesky.stored(a)
    assert held <= plan.memory <= 4 * held
    assert held < 8 * a.shape[1] ** 2 / 2, "the Gram matrix is never held"
    small = convolution((14, 14), 5, 5, first=first)
    dense = proof(small, "dense")
    held = peak_of(lambda: norms.verified_norm(small, plan=dense)) + banded_cholesky.stored(small)
    assert held <= dense.memory <= 4 * held


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_a_large_convolution_is_verified_within_two_gigabytes() -> None:
    """32 x 32 x 32 channels, 3 x 3: 32 768 dimensions, whose Gram matrix alone takes 8.6 GB."""
    code = r"""
import pathlib, re
import jax, numpy as np
import lipbounds as lb
from lipbounds import norms
from lipbounds._norms import fourier, lanczos
from lipbounds._triangle.recursion import host_form
kernel = np.random.default_rng(0).standard_normal((3, 3, 32, 32)) / 17
def fn(x):
    return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
with jax.enable_x64(True):
    form = lb.trace(lambda x: fn(x).ravel(), np.zeros((32, 32, 32)))
a = host_form(form).forward((), [()], ())[()].midpoint_for_search()
upper, lower, _ = lanczos.golub_kahan(lambda v: a @ v, lambda v: a.T @ v, a.shape[1])
print(a.shape[0], norms.verified_norm(a), upper, lower, fourier.conv_fft_bound(kernel, (32, 32)),
      1024 * int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    n, verified, upper, lower, fourier, peak = (float(x) for x in done.stdout.split())
    assert n == 32768 and lower <= verified <= min(upper, lower * (1 + 1e-6), fourier)
    assert peak < 2e9


def test_the_band_is_kept_where_it_is_smaller_than_the_matrix() -> None:
    wide = norms.wide(CASES["channels last"])
    plans = [p for p in banded_cholesky.plans(wide) if p.way == "banded"]
    more = banded_cholesky.plans(sp.csr_array(sp.hstack([wide] * 40)))
    kept, not_kept = (p for p in more if p.way == "banded")
    assert [p.keep for p in plans] == [False] and kept.keep and not not_kept.keep
    assert kept.memory - not_kept.memory == 8 * wide.shape[0] * (
        kept.width + banded_cholesky._height(kept.width)
    )
    b = sp.csr_array(sp.hstack([wide] * 40))
    assert norms.verified_norm(b, plan=kept) == pytest.approx(
        norms.verified_norm(b, plan=not_kept), rel=1e-10
    )


def test_pairs_of_top_eigenvalues_are_both_found() -> None:
    """Two eigenvalues 1e-9 apart: one start of Lanczos finds a value between them, and proofs at it fail."""
    values = np.concatenate([[1.0, 1.0 - 1e-9], np.linspace(0.0, 0.99, 598)])
    found = cholesky.top_eigenvalue(lambda v: values * v, values.size)
    assert abs(found - 1.0) < 1e-11
    one = cholesky.top_eigenvalue(lambda v: values * v, values.size, steps=160, starts=1)
    assert one < 1.0 - 1e-10
