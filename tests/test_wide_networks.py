"""Networks with wide layers: their parts on small cases, and the four kinds of benchmarks/wide.py."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gain import form_of, lowered
from jax import lax

import lipbounds as lb
from lipbounds._gain import step_matrices, wide_blocks
from lipbounds._gain.convolution import convolution
from lipbounds._gain.side_by_side import in_groups, side_by_side
from lipbounds._norms import banded_cholesky, cholesky, enclosures, matrices
from lipbounds._norms.starts import STARTS, Starts
from lipbounds._text.progress import alive, meter, reporting
from lipbounds._triangle import recursion, refinement

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "wide.py"
sys.path.insert(0, str(BENCHMARK.parent))

import wide  # noqa: E402

SECONDS, GIGABYTES = 30.0, 6.0


# --- convolutions applied to columns -------------------------------------------------------------------------------

LAYOUTS = (("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CNHW", "OHWI", "HWNC"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_is_its_matrix(layout: tuple[str, str, str], groups: int) -> None:
    rng = np.random.default_rng(0)
    sizes = dict(N=2, C=4, H=6, W=5)
    window = dict(O=8, I=4 // groups, H=3, W=2)
    shape, kernel_shape = (tuple(d[c] for c in spec) for d, spec in ((sizes, layout[0]), (window, layout[1])))
    numbers = lax.conv_dimension_numbers(shape, kernel_shape, layout)
    kernel = rng.standard_normal(kernel_shape)
    for strides, dilation, spread, padding in (
        ((1, 1), (1, 1), (1, 1), ((1, 1), (1, 0))),
        ((2, 3), (1, 1), (2, 1), ((0, 0), (2, 1))),
        ((1, 1), (2, 2), (1, 1), ((2, 2), (1, 1))),
        ((2, 3), (2, 3), (1, 2), ((-1, 2), (3, 0))),
        ((3, 2), (1, 2), (1, 1), ((0, 9), (9, 0))),
    ):
        params = dict(
            dimension_numbers=numbers, window_strides=strides, padding=padding, lhs_dilation=dilation
        )
        params |= dict(rhs_dilation=spread, feature_group_count=groups, batch_group_count=1)
        out = jax.eval_shape(
            lambda a, b, p=params: lax.conv_general_dilated(a, b, **p),
            *(jax.ShapeDtypeStruct(s, np.float32) for s in (shape, kernel_shape)),
        ).shape
        matrix = cholesky.dense_array(step_matrices._conv_matrix(params, shape, kernel, out))
        found = convolution(params, shape, kernel, out)
        for map_, true in ((found, matrix), (found.transposed, matrix.T)):
            x = rng.standard_normal((true.shape[1], 3))
            assert map_.shape == true.shape
            assert np.allclose(map_(x), true @ x, rtol=1e-12, atol=1e-12)
            assert np.allclose(map_(x[:, 0]), true @ x[:, 0], rtol=1e-12, atol=1e-12)
            assert map_.terms == int((true != 0).sum(axis=1).max(initial=0))


@pytest.mark.parametrize("name", ["cnn_batch_norm", pytest.param("u_net", marks=pytest.mark.slow)])
def test_applied_convolutions_give_the_same_bounds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of(name)
    before = lb.liplt(form, pairwise=True)
    monkeypatch.setattr(step_matrices, "_APPLIED", 0)
    recursion._HOSTS.clear()
    after = lb.liplt(form, pairwise=True)
    used = [m for each in recursion.host_form(form).built.values() for m in each if m.convolution is not None]
    recursion._HOSTS.clear()
    assert used and after.guarantee == "verified"
    assert after.value == pytest.approx(before.value, rel=1e-10)
    for m in used:
        exact = cholesky.dense_array(m.matrix)
        sizes = np.abs(exact)
        true = min(math.sqrt(sizes.sum(0).max() * sizes.sum(1).max()), float(np.linalg.norm(exact)))
        assert true <= m.absolute_norm <= true * (1 + 1e-9)
        assert np.linalg.norm(exact, 2) <= m.norm <= m.absolute_norm
        found = enclosures.multiply(m.factor, enclosures.Enclosure(np.eye(exact.shape[1]), 0.5), norm=m.norm)
        assert found.error >= 0.5 * np.linalg.norm(exact, 2)


# --- starts, and where they are refined ----------------------------------------------------------------------------


def test_starts_bound_the_norm_and_stop_anywhere() -> None:
    rng = np.random.default_rng(0)
    for m, n in ((60, 40), (40, 40), (300, 5), (50, 1)):
        a = rng.standard_normal((m, n))
        exact = float(np.linalg.norm(a, 2))
        starts = Starts(
            lambda x, a=a: a @ x,
            lambda y, a=a: a.T @ y,
            n,
            seed=1,
            failure=1e-9,
            rounding=1e-13,
            max_steps=99,
        )
        before = math.inf
        while not starts.ended:
            starts.advance(3)
            assert starts.lower <= exact * (1 + 1e-9) and exact <= starts.upper <= before
            before = starts.upper
        assert starts.upper <= exact * (1 + 1e-5)
        steps, upper = starts.steps, starts.upper
        starts.release()
        starts.advance(1)
        assert (starts.steps, starts.upper) == (steps, upper)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_starts_bound_matrices_of_low_rank(rank: int) -> None:
    """The recurrence breaks down after as many steps as the rank, and no vector of rounding may go on."""
    rng = np.random.default_rng(0)
    for seed in range(20):
        a = rng.standard_normal((50, rank)) @ rng.standard_normal((rank, 30))
        options: dict[str, Any] = dict(seed=seed, failure=1e-10, rounding=1e-14, max_steps=99)
        starts = Starts(lambda x, a=a: a @ x, lambda y, a=a: a.T @ y, 30, **options)
        starts.advance(20)
        exact = float(np.linalg.norm(a, 2))
        assert starts.ended and exact <= starts.upper <= exact * (1 + 1e-5)


def test_starts_fail_as_often_as_they_say() -> None:
    """Two steps on diag(1, .., 1, 2): a bound fails only if all starts miss the last direction."""
    n, failure, runs = 60, 0.2, 300
    values = np.ones(n)
    values[-1] = 2.0
    missed = 0
    for seed in range(runs):
        starts = Starts(
            lambda x: values[:, None] * x, lambda x: values[:, None] * x, n,
            seed=seed, failure=failure, rounding=0.0, max_steps=1,
        )  # fmt: skip
        starts.advance(1)
        missed += starts.upper < 2.0
    assert missed <= failure * runs
    assert STARTS == 4


def test_shares_are_the_derivative_of_the_bound() -> None:
    nodes = [(0,), (1,), (2,)]
    rng = np.random.default_rng(0)
    pairs = [((), k) for k in nodes] + [(nodes[i], nodes[j]) for i in range(3) for j in range(i + 1, 3)]
    norms, ends = {pair: float(rng.uniform(1, 2)) for pair in pairs}, {(): 0.3, (0,): 0.2, (2,): 1.5}

    def value(norms: dict[Any, float]) -> float:
        reach = {(): 1.0}
        for k in nodes:
            reach[k] = sum(norms.get((j, k), 0.0) * m for j, m in reach.items())
        return sum(end * reach[j] for j, end in ends.items())

    share = refinement.shares(norms, ends, nodes)
    for pair in pairs:
        slope = (value({**norms, pair: norms[pair] * (1 + 1e-7)}) / value(norms) - 1) / 1e-7
        assert share[pair] == pytest.approx(slope, rel=1e-5)


def test_refined_bounds_are_as_close_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """LipLT by Golub-Kahan alone lies above the verified one, by no more than `RTOL` along the longest path."""
    form = form_of("cnn_batch_norm")
    truth = {verb: verb(form).value for verb in (lb.naive, lb.liplt)}
    monkeypatch.setattr(recursion, "DENSE_LIMIT", 3)
    monkeypatch.setattr(wide_blocks, "_CHEAP", wide_blocks._Cost(0, 0))
    monkeypatch.setattr(wide_blocks, "_CHEAPER", wide_blocks._Cost(0, 0))
    recursion._HOSTS.clear()
    for verb, exact in truth.items():
        bound = verb(form)
        assert any(part.how.startswith("Golub-Kahan") for part in bound.parts)
        assert (
            exact <= bound.value * (1 + 1e-9) <= exact * (1 + 1.1 * wide_blocks.RTOL * (len(form.taps) + 1))
        )
    recursion._HOSTS.clear()


def test_searches_drop_their_vectors_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """They repeat their steps then, and the norm of every block is the same."""
    form, shares = form_of("cnn_batch_norm"), refinement.shares
    monkeypatch.setattr(recursion, "DENSE_LIMIT", 3)
    monkeypatch.setattr(wide_blocks, "_CHEAP", wide_blocks._Cost(0, 0))
    monkeypatch.setattr(wide_blocks, "_CHEAPER", wide_blocks._Cost(0, 0))
    found, kept = [], [0, 0]
    for place, limit in enumerate((2**32, 0)):
        monkeypatch.setattr(refinement, "_KEPT", limit)
        recursion._HOSTS.clear()
        host = recursion.host_form(form)

        def seen(*arguments: Any, place: int = place, host: Any = host) -> Any:
            kept[place] += sum(starts.nbytes for starts, _ in host.searches.values())
            return shares(*arguments)

        monkeypatch.setattr(refinement, "shares", seen)
        found.append(lb.naive(form))
    recursion._HOSTS.clear()
    assert kept[0] > 0 and kept[1] == 0
    assert found[0].parts == found[1].parts
    assert any(part.how.startswith("Golub-Kahan") for part in found[0].parts)


@pytest.mark.parametrize(("inner", "rank"), [(5, 5), (40, 3), (60, 59)])
def test_a_product_through_few_entries_is_bounded_closely(inner: int, rank: int) -> None:
    """Also where the thin Gram matrix has not full rank, so that its root has columns of zeros."""
    rng = np.random.default_rng(0)
    u = rng.standard_normal((90, inner))
    v = rng.standard_normal((inner, rank)) @ rng.standard_normal((rank, 80))
    exact = float(np.linalg.norm(u @ v, 2))
    bound, guess = wide_blocks.product_norm(enclosures.Enclosure(u), enclosures.Enclosure(v))
    assert exact * (1 - 1e-12) <= bound <= exact * (1 + 1e-9)
    assert guess == pytest.approx(exact, rel=1e-9)


def test_a_naive_bound_that_is_surely_larger_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    form = form_of("cnn_batch_norm")
    both, naive = lb.liplt(form), lb.naive(form)
    runs: list[bool] = []
    once = recursion.triangle
    monkeypatch.setattr(
        recursion,
        "triangle",
        lambda *a, **k: runs.append(k["centred"]) or once(*a, **k),  # type: ignore[func-returns-value]
    )
    monkeypatch.setattr(recursion, "_WORTH_A_LOOK", 0.0)
    assert lb.liplt(form).value == both.value < naive.value
    assert runs == [True]
    pairs = lb.liplt(form, pairwise=True).pairwise
    assert runs == [True, True]
    best = once(form, recursion.Request(), pairwise=True, centred=True)
    with_naive = np.minimum(best.pairwise, lb.naive(form, pairwise=True).pairwise)  # type: ignore[arg-type]
    np.testing.assert_array_equal(pairs, with_naive)
    request = recursion.Request()
    assert recursion.surely_above(form, request, best)
    assert not recursion.surely_above(form, request, replace(best, value=naive.value, pairwise=None))
    one = best.pairwise.copy()  # type: ignore[union-attr]
    one[1, 0] *= 1e3
    assert not recursion.surely_above(form, request, replace(best, pairwise=one))


def test_work_side_by_side_is_in_order_and_ends_when_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            drawn.append(i)
            yield i

    with side_by_side(lambda i: -i, items(), seconds=9.0) as results:
        assert list(results) == [(i, -i) for i in range(20)]
    drawn.clear()
    with side_by_side(lambda i: -i, items(), seconds=9.0, need=lambda i: 2.0**31) as results:
        assert next(results) == (0, 0) and len(drawn) <= 3

    def endless(i: int) -> None:
        while i:
            time.sleep(0.01)
            alive()

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), side_by_side(endless, items(), seconds=9.0) as results:
        next(results)
        raise KeyboardInterrupt
    assert time.monotonic() - began < 5.0


def test_groups_are_made_and_worked_on_by_all_threads_and_end_when_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    began: list[int] = []

    def make(group: int) -> list[int]:
        began.append(group)
        return [10 * group + i for i in range(group)]

    def groups(work: Any, need: float = 0.0) -> Any:
        return in_groups(
            make, work, [1, 4, 0, 3], seconds=lambda g: 9.0 * g, cost=lambda i: i, need=lambda g: need
        )

    everything = {(10 * g + i, -10 * g - i) for g in (1, 3, 4) for i in range(g)}
    meeting = threading.Barrier(2, timeout=30.0)
    with groups(lambda i: (meeting.wait(), -i)[1] if i >= 40 else -i) as results:
        assert sorted(results) == sorted(everything)
    assert began[0] == 4 and sorted(began) == [0, 1, 3, 4]
    began.clear()
    with groups(lambda i: -i, need=2.0**31) as results:  # two groups do not fit
        first = next(results)
        assert first[0] in (42, 43) and began == [4]
        assert {first, *results} == everything

    def endless(i: int) -> None:
        while i < 43:
            time.sleep(0.01)
            alive()

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), groups(endless) as results:
        next(results)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 5.0


@pytest.mark.slow
def test_the_norm_of_a_formed_block_is_estimated_by_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    w = [np.random.default_rng(0).standard_normal((3, 3, 4, 4)) / 6 for _ in range(2)]

    def network(x: Any) -> Any:
        for kernel in w:
            x = jax.nn.relu(
                lax.conv_general_dilated(
                    x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )[0]
            )
        return x.sum()

    form = lowered(network, (72, 4, 4))
    plain = lb.liplt(form)
    monkeypatch.setattr(wide_blocks, "_MANY", 0)
    monkeypatch.setattr(
        banded_cholesky.BandedCholesky, "estimate", lambda self: pytest.fail("estimated twice")
    )
    found = lb.liplt(lowered(network, (72, 4, 4)))
    assert found.guarantee == "verified"
    assert found.value == pytest.approx(plain.value, rel=1e-10)
    assert "banded Cholesky" in {part.how for part in found.parts}


# --- pairs and factorisations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 1e-200, 1e250])
def test_pairs_by_gram_matrices_are_those_by_differences(
    size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 40)) * size
    rows[5], rows[9], rows[20] = rows[7], rows[8] * (1 + 1e-9), 0.0
    exact = matrices.pairwise_row_norms(rows, 2)
    monkeypatch.setattr(matrices, "_MANY_DIFFERENCES", 0.0)
    found = matrices.pairwise_row_norms(rows, 2)
    assert found[5, 7] == found[7, 5] == 0.0 and np.array_equal(found == 0.0, exact == 0.0)
    apart = exact > 0.0
    assert np.abs(found[apart] / exact[apart] - 1).max() < 3e-9
    true = np.sqrt(np.square(rows[:, None] / size - rows[None] / size).sum(-1))
    assert (found / size >= np.where(true > 1e-3, true, 0.0) * (1 - 1e-13)).all()


def test_blocked_factorisations_prove_what_whole_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK", 16)
    monkeypatch.setattr(cholesky, "_CALL", 1e4)
    rng = np.random.default_rng(0)
    b = rng.standard_normal((150, 80))
    gram = cholesky.gram(b)
    assert np.allclose(gram, b @ b.T, rtol=1e-12, atol=1e-12)
    top = float(np.linalg.norm(b, 2)) ** 2
    proof = cholesky.ShiftedCholesky(gram.copy(), 80, 80, cholesky.absolute_gram_norm(b))
    for factor, holds in ((0.999, False), (1.0 + 1e-9, True), (0.9999, False), (2.0, True)):
        assert proof.proves(top * factor) is holds
    proof.restore()
    assert np.array_equal(proof.g, gram)


def test_lines_of_progress_say_what_is_left() -> None:
    said: list[str] = []
    with reporting(said.append), meter(2, 100.0) as advance:
        time.sleep(0.05)
        advance("first", 0.01)
        advance("second", 99.99)
    assert said[0].startswith("first, about ") and said[0].endswith(" left") and said[1] == "second"


# --- the networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) for n in ("cifar", "generator", "drone", "detector")],
)
def test_small_networks_of_each_kind(name: str) -> None:
    """Above the slopes attained, LipLT below naive, and pairs of all outputs."""
    form = wide.traced(name, wide.SMALL)
    naive, bound = lb.naive(form), lb.liplt(form, pairwise=name != "detector")
    assert bound.value <= naive.value and bound.guarantee in ("verified", "probabilistic")
    network, shape = wide.NETS[name](wide.SMALL)
    point = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    _, slope = jax.jvp(network, (point,), (np.ones_like(point),))
    assert 0 < np.linalg.norm(slope) <= bound.value * np.linalg.norm(np.ones(shape))
    if form.num_outputs > 1 and bound.pairwise is not None:
        assert (bound.pairwise <= math.sqrt(2) * bound.value * (1 + 1e-9)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(wide.NETS))
def test_networks_at_full_size(name: str) -> None:
    """LipLT within 30 seconds on two idle cores (60 of CPU time where others work beside) and 6 GB."""
    limited = f'ulimit -d {int(GIGABYTES * 1e9) // 1024} && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", limited, "sh", sys.executable, str(BENCHMARK), "--one", name, "liplt"],
        check=True, stdout=subprocess.PIPE, text=True, env=_plain(),
    )  # fmt: skip
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["value"] is not None and row["guarantee"] in ("verified", "probabilistic")
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert row["seconds"] <= SECONDS * busy or row["cpu"] <= 2 * SECONDS
    assert row["peak_gigabytes"] <= GIGABYTES


def test_pairs_of_too_many_outputs_are_refused_at_once() -> None:
    network, shape = wide.NETS["detector"](4)
    form = lb.trace(network, jax.ShapeDtypeStruct(shape, np.float32))
    with pytest.raises(ValueError, match="the pairs of 1125 outputs take about"):
        lb.liplt(form, pairwise=True, memory="20 MB")


INTERRUPTED = """
import sys, time
sys.path.insert(0, sys.argv[1])
import wide, lipbounds as lb
form = wide.traced(sys.argv[3])
print("begin", flush=True)
try:
    lb.liplt(form, guarantee=sys.argv[2], progress=False)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "guarantee"),
    [
        ("cifar", "auto"),
        ("cifar", "verified"),
        ("cifar", "probabilistic"),
        ("generator", "auto"),
        ("drone", "auto"),
    ],
)
@pytest.mark.parametrize("after", [2.0, 5.0, 9.0])
def test_an_interruption_is_answered_within_two_seconds(name: str, guarantee: str, after: float) -> None:
    words = [sys.executable, "-c", INTERRUPTED, str(BENCHMARK.parent), guarantee, name]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=_plain()) as child:
        assert child.stdout is not None and child.stdout.readline() == "begin\n"
        time.sleep(after)
        child.send_signal(signal.SIGINT)
        sent = time.monotonic()
        line = child.stdout.readline()
        waited = time.monotonic() - sent
        child.wait()
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert line == "stopped\n" and waited <= 2.0 * busy


def _plain() -> dict[str, str]:
    """The environment without the flags by which tests compile fast and run slowly."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
