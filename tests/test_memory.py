"""The memory budget of `naive`, `liplt` and `lipsdp`: what it chooses, that it says so, and that it is kept."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax import lax
from typer.testing import CliRunner

import lipbounds as lb
from lipbounds._cli.main import app
from lipbounds._form.lure import LureForm
from lipbounds._gain import memory_budget
from lipbounds._norms import banded_cholesky, lanczos
from lipbounds._norms.starts import STARTS
from lipbounds._triangle import formed_blocks, recursion
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import save_model

RUNNER = CliRunner()


def kernel(rng: np.random.Generator, cin: int, cout: int) -> Any:
    return jnp.asarray(rng.standard_normal((3, 3, cin, cout)) / np.sqrt(9 * cin), jnp.float32)


def conv(x: Any, w: Any, stride: int = 1) -> Any:
    return lax.conv_general_dilated(
        x[None], w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


def resnet(size: int, channels: int, activation: Any = jax.nn.relu) -> LureForm:
    """Convolution, a residual block, a strided one, the mean: four taps."""
    rng = np.random.default_rng(0)
    w = [
        kernel(rng, *io)
        for io in ((3, channels), (channels, channels), (channels, channels), (channels, channels))
    ]
    last = jnp.asarray(rng.standard_normal((channels, 5)), jnp.float32)

    def fn(x: Any) -> Any:
        h = activation(conv(x, w[0]))
        h = activation(h + conv(activation(conv(h, w[1])), w[2]))
        return activation(conv(h, w[3], 2)).mean((0, 1)) @ last

    return lb.trace(fn, jax.ShapeDtypeStruct((size, size, 3), jnp.float32))


def residual(size: int, channels: int) -> LureForm:
    """relu(h + conv(h)) behind h = relu(conv(x)), the mean: two taps, and a block that is no single convolution."""
    rng = np.random.default_rng(0)
    w, v = kernel(rng, 3, channels), kernel(rng, channels, channels)

    def fn(x: Any) -> Any:
        h = jax.nn.relu(conv(x, w))
        return jax.nn.relu(h + conv(h, v)).mean((0, 1))[:4]

    return lb.trace(fn, jax.ShapeDtypeStruct((size, size, 3), jnp.float32))


def two_convolutions(activation: Any = jax.nn.relu) -> LureForm:
    rng = np.random.default_rng(1)
    w, v = kernel(rng, 2, 4), kernel(rng, 4, 4)
    return lb.trace(
        lambda x: activation(conv(activation(conv(x, w)), v)).mean((0, 1)),
        jax.ShapeDtypeStruct((18, 18, 2), jnp.float32),
    )


@pytest.fixture(scope="module")
def deep() -> LureForm:
    return resnet(12, 8)


@pytest.fixture(scope="module")
def form() -> LureForm:
    return residual(12, 8)


@pytest.fixture(scope="module")
def plain(form: LureForm) -> Any:
    return lb.liplt(form)


def fresh(form: LureForm) -> LureForm:
    """The same form without anything that is kept for it."""
    return dataclasses.replace(form)


# ------------------------------------------------------------------------------------------------------ reading


def test_budgets_are_read_and_shown() -> None:
    for text, size in (
        ("2GB", 2e9),
        ("500 MB", 5e8),
        ("1.5GiB", 1.5 * 2**30),
        ("64kib", 2**16),
        ("7 B", 7),
        (".5 tb", 5e11),
        (12345, 12345),
        (np.int64(9), 9),
    ):
        assert memory_budget.parse(text) == size
    assert memory_budget.parse(None) is None
    for bad in (
        "2",
        "GB",
        "-1GB",
        "2 XB",
        "1e9B",
        "iB",
        "3iB",
        "0MB",
        0,
        -5,
        1.5,
        True,
        "inf GB",
        b"2GB",
        [2],
    ):
        with pytest.raises(
            ValueError, match=r"bytes >= 1 or a text such as '2GB', '500 MB' or '1.5GiB', got"
        ):
            memory_budget.parse(bad)
    shown = {0: "0 B", 999: "999 B", 1001: "1.1 kB", 20_000_000: "20 MB", 129_000_001: "130 MB"}
    shown |= {1_100_000_000: "1.1 GB", 999_600_000: "1.0 GB", 10**13: "10 TB"}
    assert {n: memory_budget.show(n) for n in shown} == shown


def test_what_a_budget_cannot_limit_is_refused(form: LureForm) -> None:
    for verb in (lb.naive, lb.liplt, lb.lipsdp):
        with pytest.raises(ValueError, match="memory must be"):
            verb(form, memory="lots")
        with pytest.raises(ValueError, match="memory applies to norm=2"):
            verb(form, norm=np.inf, memory="1GB")
        with pytest.raises(ValueError, match="proves nothing"):
            verb(form, guarantee="estimate", memory="1GB")
    with pytest.raises(ValueError, match="a scaling keeps all blocks"):
        lb.liplt(form, scaling="aol", memory="1GB")


# ------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.sampled(2)
@pytest.mark.parametrize("net", ["resnet", "stacked", "groups"])
def test_blocks_formed_by_slices_are_the_blocks(net: str, deep: LureForm) -> None:
    """Every block within budgets that force slices of columns: the same matrix up to its stated error."""
    form = deep
    if net == "stacked":
        rng = np.random.default_rng(2)
        w, v, u = kernel(rng, 2, 3), kernel(rng, 2, 4), kernel(rng, 7, 2)
        form = lb.trace(
            lambda x: conv(jnp.concatenate([jax.nn.relu(conv(x, w)), jnp.abs(conv(x, v))], -1), u).ravel()[
                :4
            ],
            jax.ShapeDtypeStruct((7, 6, 2), jnp.float32),
        )
    if net == "groups":
        rng = np.random.default_rng(2)
        w, v = kernel(rng, 2, 4), kernel(rng, 4, 4)

        def fn(x: Any) -> Any:
            h = jnp.maximum(conv(x, w), conv(x, -0.5 * w))
            h = lax.reduce_window(h, -jnp.inf, lax.max, (3, 3, 1), (2, 2, 1), "VALID")
            return jax.nn.relu(conv(h, v)).mean((0, 1))

        form = lb.trace(fn, jax.ShapeDtypeStruct((9, 9, 2), jnp.float32))
    host = recursion.host_form(form)
    slices = 0
    for centred in (False, True):
        scalings = recursion.loop_transform(form, 2, centred=centred)
        for nodes in recursion.partitions(form):
            pairs = recursion.structure(host, nodes, scalings)
            for (source, target), known in formed_blocks.matrices(host, pairs, scalings):
                expected = known.dense().midpoint_for_search()
                limit = 3 * expected.nbytes + 75_000
                counted = []
                original = memory_budget._columns

                def count(*args: Any, original: Any = original, counted: list = counted) -> Any:
                    counted.append(args)
                    return original(*args)

                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(memory_budget, "_columns", count)
                    block, need = memory_budget.formed(host, source, target, scalings, limit)
                if block is None:
                    assert need
                    continue
                slices = max(slices, len(counted))
                dense = block.dense().midpoint_for_search()
                assert np.allclose(dense, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())
                assert np.linalg.norm(dense - expected) <= block.error + known.error + 1e-300
                assert block.error <= 1e-10 * np.linalg.norm(expected)
    assert slices >= 3, "some block took a pilot and two slices"


def test_a_block_too_large_is_left_before_it_is_whole(deep: LureForm) -> None:
    host = recursion.host_form(deep)
    scalings = recursion.loop_transform(deep, 2, centred=True)
    stored = next(iter(formed_blocks.matrices(host, [((0,), (2,))], scalings)))[1].midpoint_for_search()
    tracemalloc.start()
    block, need = memory_budget.formed(host, (0,), (2,), scalings, 600_000)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert block is None and re.search(r"(about|more than) [\d.]+ [kM]B", need)
    assert held < banded_cholesky.stored(stored), "less than the block itself was ever held"


# ------------------------------------------------------------------------------------------------------ choices


def test_without_a_budget_nothing_is_new(plain: Any) -> None:
    assert plain.guarantee == "verified" and plain.notes == ()
    assert {p.how for p in plain.parts} <= {"Cholesky", "banded Cholesky"}


@pytest.mark.parametrize("guarantee", ["auto", "verified"])
def test_a_budget_that_fits_changes_no_bound(form: LureForm, plain: Any, guarantee: str) -> None:
    bound = lb.liplt(form, guarantee=guarantee, memory="1GB", pairwise=True)
    assert bound.guarantee == "verified" and bound.failure_probability == 0
    assert np.isclose(bound.value, plain.value, rtol=1e-8)
    assert all(re.fullmatch(r"(banded )?Cholesky, [\d.]+ [kM]?B", p.how) for p in bound.parts)
    (note,) = bound.notes
    needs = [p.how.split(", ")[1] for p in bound.parts]
    assert (
        note.startswith("memory budget 1.0 GB, largest need ")
        and note.split("need ")[1].split(" (")[0] in needs
    )
    assert np.isclose(lb.naive(form, memory=10**9).value, lb.naive(form).value, rtol=1e-8)


def test_proofs_within_the_budget_only(form: LureForm) -> None:
    whole = [float(p.how.split()[-2]) for p in lb.naive(form, memory="7MB").parts if p.how.endswith("MB")]
    bound = lb.naive(form, memory=4_000_000)  # the block fits, its proof does not
    assert max(whole) > 4 and bound.guarantee == "probabilistic"
    assert all(float(p.how.split()[-2]) <= 4 for p in bound.parts if p.how.endswith("MB"))


@pytest.mark.slow
def test_what_does_not_fit_is_probabilistic_and_said(form: LureForm, plain: Any) -> None:
    bound = lb.liplt(form, memory="3MB")
    assert bound.guarantee == "probabilistic" and 0 < bound.failure_probability <= 1e-9
    assert plain.value <= bound.value <= 2 * plain.value
    mixed = {p.guarantee for p in bound.parts if p.target != "output"}
    assert mixed == {"verified", "probabilistic"}
    units = {"kB": 1e3, "MB": 1e6}
    assert all(float(p.how.split()[-2]) * units[p.how.split()[-1]] <= 3e6 for p in bound.parts)
    for part in bound.parts:
        if part.guarantee == "probabilistic":
            steps, size = re.fullmatch(r"Golub-Kahan, (\d+) steps, ([\d.]+ [kM]B)", part.how).groups()  # type: ignore
            need = memory_budget.Budget.vectors(sum(part.shape), STARTS * int(steps))
            assert size == memory_budget.show(need) and 0 < need <= 3e6
    assert (
        bound.notes[1].startswith("without a Cholesky proof (")
        and "relu[0] to relu[1] needs" in bound.notes[1]
    )
    forced = lb.liplt(form, memory="3MB", guarantee="probabilistic")
    assert all(p.how.startswith("Golub") for p in forced.parts if p.target != "output")


@pytest.mark.slow
def test_fewer_steps_where_fewer_vectors_fit(form: LureForm) -> None:
    vector = 2 * 12 * 12 * 8
    few = lb.liplt(form, memory=memory_budget.Budget.vectors(vector, 9), guarantee="probabilistic")
    steps = [int(p.how.split()[1]) for p in few.parts if p.shape == (1152, 1152)]
    assert steps and set(steps) == {9}
    assert few.value > lb.liplt(form, guarantee="probabilistic").value
    with pytest.raises(
        ValueError, match=r"memory=120 kB is too small for any bound of this network: 8 steps"
    ):
        lb.liplt(form, memory="120kB")
    with pytest.raises(
        ValueError, match=r"memory=100 kB is too small: the rows to the outputs take [\d.]+ [kM]B"
    ):
        lb.liplt(lb.from_weights([np.eye(300), np.eye(300)], activation="relu"), memory="100kB")


def test_a_budget_that_no_proof_fits_is_refused_by_name(deep: LureForm) -> None:
    with pytest.raises(ValueError) as refusal:
        lb.liplt(deep, memory="3MB", guarantee="verified")
    message = str(refusal.value)
    assert message.startswith("guarantee='verified' with memory=3.0 MB: no proof fits for ")
    assert re.search(r"relu\[0\] to relu\[2\] needs (about |more than )?[\d.]+ MB", message)
    assert "Give a larger memory, or ask for guarantee='probabilistic'" in message


def test_proofs_of_too_many_operations_are_left(
    form: LureForm, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "MOST_FLOPS", 1e3)
    bound = lb.liplt(form, memory="1GB")
    assert all(p.how.startswith("Golub-Kahan") for p in bound.parts if p.target != "output")
    assert "operations, more than 1e+03" in bound.notes[1]
    assert lb.liplt(form, memory="1GB", guarantee="verified").guarantee == "verified", (
        "not where proofs are forced"
    )


def test_results_repeat(form: LureForm) -> None:
    first, second = (lb.naive(fresh(form), memory="3MB", pairwise=True) for _ in range(2))
    assert first.value == second.value and np.array_equal(first.pairwise, second.pairwise)
    assert [p.how for p in first.parts] == [p.how for p in second.parts]


# --------------------------------------------------------------------------------------- the Fourier bound


def bounds_of(form: LureForm, source: Any, target: Any, *, centred: bool) -> tuple[Any, float]:
    """(the Fourier bound of a block, its norm by NumPy)."""
    host = recursion.host_form(form)
    scalings = recursion.loop_transform(form, 2, centred=centred)
    (block,) = (
        b.midpoint_for_search() for _, b in formed_blocks.matrices(host, [(source, target)], scalings)
    )
    dense = block.toarray() if sp.issparse(block) else block
    return memory_budget.convolution(host, source, target, scalings, 10**12), float(np.linalg.norm(dense, 2))


@pytest.mark.slow
def test_the_fourier_bound_of_a_block_holds_and_is_close() -> None:
    form = two_convolutions()
    for centred in (False, True):
        for pair in (((), (0,)), ((0,), (1,))):
            (bound, need), exact = bounds_of(form, *pair, centred=centred)
            assert exact <= bound <= 1.05 * exact and need > 0
    assert bounds_of(form, (), (1,), centred=True)[0] is None, "two convolutions"
    small = recursion.loop_transform(form, 2, centred=True)
    assert memory_budget.convolution(recursion.host_form(form), (0,), (1,), small, 1000) is None


@pytest.mark.slow
def test_the_fourier_bound_is_not_taken_for_other_blocks() -> None:
    slopes = jnp.linspace(0.1, 0.9, 4)
    leaky = two_convolutions(lambda y: jnp.where(y > 0, y, slopes * y))
    assert bounds_of(leaky, (), (0,), centred=True)[0] is not None
    assert bounds_of(leaky, (0,), (1,), centred=True)[0] is None, "the radii differ per channel"
    host = resnet(6, 3)
    assert bounds_of(host, (0,), (2,), centred=False)[0] is None, "x + conv(x)"
    assert bounds_of(host, (1,), (2,), centred=False)[0] is not None, "the branch alone"
    assert bounds_of(host, (2,), (3,), centred=False)[0] is not None, "stride 2"
    rng = np.random.default_rng(0)
    w = kernel(rng, 2, 4)

    for double in (
        lambda x: jnp.concatenate([x, x[::-1]]),  # every entry is used twice: sqrt(2) times the convolution
        lambda x: jnp.tile(x, (2, 1, 1)),
    ):
        twice = lb.trace(
            lambda x, double=double: jax.nn.relu(conv(double(x), w)).mean((0, 1)),
            jax.ShapeDtypeStruct((8, 8, 2), jnp.float32),
        )
        assert bounds_of(twice, (), (0,), centred=False)[0] is None


@pytest.mark.slow
def test_the_fourier_bound_keeps_a_bound_verified() -> None:
    form = two_convolutions()
    tight = lb.naive(form)
    limit = 2_500_000
    for guarantee in ("auto", "verified"):
        bound = lb.naive(form, memory=limit, guarantee=guarantee)
        how = {p.how.split(",")[0] for p in bound.parts if p.target != "output"}
        assert bound.guarantee == "verified" and "Fourier transform" in how
        assert tight.value <= bound.value <= 1.1 * tight.value
        assert all(re.search(r", [\d.]+ [kM]B$", p.how) for p in bound.parts)
    # LipLT also has the block of both, which has no such bound: then it buys nothing
    assert not any("Fourier" in p.how for p in lb.liplt(form, memory=limit).parts)


# ----------------------------------------------------------------------------------------------- what is held


@pytest.mark.sampled(2)
@pytest.mark.parametrize("limit", [20_000_000, 5_500_000])
def test_the_budget_is_kept(limit: int, form: LureForm) -> None:
    """Beside the network's own steps, arrays never take more than the budget."""
    lb.liplt(form, memory=limit)  # the steps as matrices are made, JAX is warm
    host = recursion.host_form(form)
    host.proved.clear()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    bound = lb.liplt(form, memory=limit)
    held = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert any("banded" in p.how for p in bound.parts)
    assert held <= limit


@pytest.mark.slow
def test_a_resnet_on_32_by_32_is_verified() -> None:
    """4096 hidden dimensions, beyond what fits densely: verified, above what Golub-Kahan attains for each block."""
    form = resnet(32, 6)
    bound = lb.liplt(form, memory="500MB", guarantee="verified")
    assert bound.guarantee == "verified" and bound.failure_probability == 0
    likely = lb.liplt(form, guarantee="probabilistic")
    assert bound.value <= likely.value * (1 + 1e-6)
    host = recursion.host_form(form)
    found = {(p.source, p.target): p for p in bound.parts}
    assert any(min(p.shape) > 6000 and "banded" in p.how for p in bound.parts)
    scalings = recursion.loop_transform(form, 2, centred=True)
    nodes = [(k,) for k in range(len(form.taps))]
    for pair, block in formed_blocks.matrices(host, recursion.structure(host, nodes, scalings), scalings):
        a = block.midpoint_for_search()
        lower = lanczos.golub_kahan(lambda v, a=a: a @ v, lambda v, a=a: a.T @ v, a.shape[1])[1]
        name = (
            recursion.node_name(form, pair[0], source=True),
            recursion.node_name(form, pair[1], source=False),
        )
        assert lower <= found[name].value <= lower * (1 + 2e-3)


# ------------------------------------------------------------------------------------------- lipsdp, commands


def test_lipsdp_hands_the_budget_to_liplt() -> None:
    rng = np.random.default_rng(0)
    form = lb.from_weights([rng.standard_normal(s) for s in ((9, 6), (8, 9), (3, 8))], activation="relu")
    bound = lb.lipsdp(form, memory="100MB")
    assert bound.value == lb.lipsdp(form).value
    assert any(note.startswith("LipLT: memory budget 100 MB") for note in bound.notes)
    with pytest.raises(ValueError, match="too small"):
        lb.lipsdp(form, memory=1000)


def test_the_commands_take_a_budget(tmp_path: Any) -> None:
    spec = ModelSpec("mlp", (8, 8, 1), {"widths": "64-12-10"})
    file = save_model(tmp_path / "tiny.safetensors", build(spec, seed=0), spec)
    done = RUNNER.invoke(app, ["bounds", str(file), "--method", "liplt", "--memory", "500MB"])
    assert done.exit_code == 0 and "memory budget 500 MB" in done.output and "Cholesky, " in done.output
    done = RUNNER.invoke(app, ["bounds", str(file), "--method", "naive", "--memory", "1000"])
    assert done.exit_code == 1 and "memory=1.0 kB is too small" in done.output
    done = RUNNER.invoke(app, ["certify", str(file), "--method", "liplt", "--memory", "500MB"])
    assert done.exit_code == 0
    for bad in (["--memory", "lots"], ["--memory", "0"], ["--memory", "1GB", "--method", "all"]):
        done = RUNNER.invoke(app, ["bounds", str(file), *bad])
        assert done.exit_code == 2 and "--memory" in done.output


def test_slices_of_stacked_taps_are_the_block() -> None:
    """Two taps of one level as one source: every slice of its columns, across both."""
    rng = np.random.default_rng(0)
    w = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((6, 9), (7, 9), (6, 5), (7, 5), (5, 3))]

    def fn(x: Any) -> Any:
        a, b = jax.nn.relu(w[0] @ x), jnp.abs(w[1] @ x)
        return jax.nn.relu(a @ w[2] + b @ w[3]) @ w[4]

    form = lb.trace(fn, jax.ShapeDtypeStruct((9,), jnp.float32))
    host, scalings = recursion.host_form(form), recursion.loop_transform(form, 2, centred=True)
    (source, target) = max(
        (node for nodes in recursion.partitions(form) for node in itertools.pairwise(nodes)),
        key=lambda pair: len(pair[0]),
    )
    assert len(source) == 2
    whole = host.forward(source, [target], scalings)[target].midpoint_for_search()
    whole = whole.toarray() if sp.issparse(whole) else whole
    for chosen in (np.arange(13), np.arange(2, 5), np.arange(4, 9), np.array([0, 7, 12]), np.arange(8, 13)):
        block, _ = memory_budget._columns(host, source, target, scalings, chosen, 1e9)
        found = block.dense().midpoint_for_search()
        np.testing.assert_allclose(found, whole[:, chosen], rtol=1e-13, atol=1e-13)


@pytest.mark.slow
def test_a_convolution_between_maxmin_layers_has_its_fourier_bound() -> None:
    """MaxMin reads and writes halves of the channels: slices before it and concatenations behind it are moves."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernels = [jax.random.normal(key, (3, 3, 8, 8)) for key in keys[:2]]
    head = jax.random.normal(keys[2], (1152, 3))

    def net(x: jax.Array) -> jax.Array:
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            a, b = jnp.split(x, 2, axis=-1)
            x = jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=-1)
        return x.reshape(x.shape[0], -1) @ head

    form = lb.trace(net, jax.ShapeDtypeStruct((1, 12, 12, 8), jnp.float32), batched=True)
    exact = lb.naive(form, progress=False)
    found = lb.naive(form, guarantee="verified", memory="3MB", progress=False)
    assert [part.how.startswith("Fourier") for part in found.parts] == [True, True, False]
    assert exact.value <= found.value <= 1.1 * exact.value
