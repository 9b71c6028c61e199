"""Forged networks: the gate, the layers that get one, the tracked peaks, and what a certificate makes of it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from forge_nets import Net, hidden, same
from test_cache import compilations
from zoo_flax import ConvBatchNorm, PreActivationResNet

import lipbounds as lb
from lipbounds.analysis import attacks
from lipbounds.analysis.forge_search import Candidate, search_c_r
from lipbounds.analysis.forging import Forged, Gated, forge, track
from lipbounds.analysis.gates import gate
from lipbounds.errors import UnsupportedError


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x(rng):
    return rng.normal(size=(37, 6)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------- the gate
def test_hard_gate_is_equation_9():
    x = jnp.asarray([-2.0, -1.0, -0.99, 0.0, 0.5, 1.0, np.nextafter(np.float32(1), np.float32(2)), np.nan])
    out = np.asarray(gate(x, jnp.float32(1), "hard", 0.1))
    np.testing.assert_array_equal(out, [-2, 0, 0, 0, 0, 0, x[6], np.nan])


def test_smooth_gate_values():
    x = np.linspace(-3, 3, 61)
    out = gate(jnp.asarray(x, jnp.float32), jnp.float32(0.5), "smooth", 0.2)
    np.testing.assert_allclose(out, x / (1 + np.exp(-(np.abs(x) - 0.5) / 0.1)), rtol=2e-5, atol=1e-7)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["hard", "smooth"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_at_threshold_zero_the_gate_is_the_identity_and_so_is_its_derivative(kind, dtype):
    x = jnp.asarray([-1.5, 0.0, 1e-3, 2.0], dtype)
    c = jnp.float32(0)
    out = gate(x, c, kind, 0.1)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, x)
    slopes = jax.grad(lambda v: gate(v, c, kind, 0.1).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(slopes[jnp.asarray([0, 2, 3])], jnp.ones(3, dtype))
    assert kind == "hard" or slopes[1] == 1


def test_a_float64_network_is_gated_in_float64():
    with jax.enable_x64(True):
        x = jnp.asarray([0.5 + 1e-12, 0.5 - 1e-12], jnp.float64)
        np.testing.assert_array_equal(gate(x, jnp.float32(0.5), "hard", 0.1), [0.5 + 1e-12, 0])


# -------------------------------------------------------------------------------------------------- the definition
def test_thresholds_and_outputs_are_those_of_the_definition(net, x):
    forged = forge(net, x, 2**-3)
    seen, _ = hidden(net, x)
    peaks = [np.abs(h).max() for h in seen[1:]]
    assert list(forged.gates) == ["layers.1", "layers.2"]
    np.testing.assert_allclose(list(forged.peaks.values()), peaks, rtol=1e-6)
    np.testing.assert_allclose(list(forged.thresholds.values()), [p / 8 for p in peaks], rtol=1e-6)
    assert list(forged.c_r.values()) == pytest.approx([1 / 8] * 2, rel=1e-7)
    inner, logits = hidden(net, x, list(forged.thresholds.values()))
    np.testing.assert_allclose(forged(x), logits, rtol=1e-5, atol=1e-5)
    assert np.abs(logits - hidden(net, x)[1]).max() > 1e-2
    for path, raw in zip(forged.gates, inner[1:], strict=True):
        np.testing.assert_allclose(forged.inputs(x)[path], raw, rtol=1e-5, atol=1e-5)


def test_the_model_is_not_changed_and_comes_back(net, x):
    graph, state = nnx.split(net)
    copy = nnx.clone(net)
    forged = forge(net, x, 0.1, kind="smooth")
    assert nnx.split(net)[0] == graph and not any(isinstance(m, Gated) for _, m in nnx.iter_modules(net))
    same(net, copy)
    same(forged.original(), net)
    forged.gates["layers.1"].layer.kernel[...] += 1
    same(net, copy)
    assert jax.tree.leaves(state)[0] is jax.tree.leaves(nnx.split(net)[1])[0]


def test_zero_inserts_nothing(net, x):
    forged = forge(net, x, 0)
    assert forged.gates == {} == forged.thresholds and set(forged.c_r.values()) == {0.0}
    same(forged.network, net)
    np.testing.assert_array_equal(forged(x), net(x))
    again = forged.with_c_r(0.1)
    same(again, forge(net, x, 0.1))
    same(again.with_c_r(0), forged)
    kept = forged.with_c_r(0, kind="smooth", keep=True)
    assert len(kept.gates) == 2
    np.testing.assert_array_equal(kept(x), net(x))
    assert kept.slopes() == {"layers.1": (1.0, 1.0), "layers.2": (1.0, 1.0)}


def test_a_layer_that_sees_only_zeros_gets_no_gate(x):
    net = Net()
    net.layers[0].kernel[...] *= 0
    net.layers[1].bias[...] += 1
    forged = forge(net, x, 0.1, kind="smooth")
    assert list(forged.gates) == ["layers.2"] and forged.peaks["layers.1"] == 0 == forged.c_r["layers.1"]
    assert np.isfinite(forged(x)).all()


def test_thresholds_per_layer(net, x):
    forged = forge(net, x, {"layers.0": 0.25, "layers.2": 0.125})
    assert list(forged.gates) == ["layers.0", "layers.2"]
    np.testing.assert_allclose(forged.thresholds["layers.0"], np.abs(x).max() / 4, rtol=1e-6)
    np.testing.assert_allclose(forged.c_r["layers.2"], 0.125, rtol=1e-6)
    part = forge(net, x, 0.1).with_c_r({"layers.2": 0.5})
    assert list(part.gates) == ["layers.2"] and list(part.peaks) == ["layers.1", "layers.2"]


# -------------------------------------------------------------------------------------------------------- tracking
def generator(x, sizes, pairs=False):
    start = 0
    for size in sizes:
        rows = x[start : start + size]
        yield (rows, np.zeros(len(rows))) if pairs else rows
        start += size
    assert start == len(x)


@pytest.mark.parametrize(
    ("sizes", "pairs"), [([1] * 37, False), ([5, 20, 0, 12], True), ([8, 8, 8, 8, 5], False)]
)
def test_batches_of_any_sizes_give_the_same_numbers_in_one_compilation(x, sizes, pairs):
    net = Net((6, 8, len(sizes), 3))  # not compiled by another test
    whole = track(net, x, batch_size=64)
    Net.traced = 0
    tracked = track(net, generator(x, sizes, pairs), batch_size=8)
    assert Net.traced == 3  # to find the layers, to tell what they close over, to compile
    assert len(tracked) == 37 and tracked.sites == whole.sites
    for path, values in whole.maxima.items():
        np.testing.assert_allclose(tracked.maxima[path], values, rtol=1e-6)
    seen, _ = hidden(net, x)
    np.testing.assert_allclose(whole.maxima["layers.1"], np.abs(seen[1]).max(1), rtol=1e-6)


def test_only_one_batch_is_held(net):
    alive = []

    def batches():
        for k in range(50):
            rows = np.full((16, 6), k, np.float32)
            alive.append(rows.nbytes)
            yield rows

    seen = []
    forged = forge(net, batches(), 0.1, batch_size=16, progress=lambda line: seen.append(len(alive)))
    assert seen == list(range(1, 51))  # every batch is done before the next is asked for
    np.testing.assert_allclose(
        forged.peaks["layers.1"], np.abs(hidden(net, np.full((1, 6), 49.0))[0][1]).max(), rtol=1e-6
    )


def test_quantile_resists_an_outlier(net, x):
    x = np.concatenate([x, 1000 * x[:1]])
    tracked = track(net, x)
    values = np.sort(tracked.maxima["layers.1"])
    assert tracked.peaks()["layers.1"] == values[-1] > 20 * values[-2]
    assert tracked.peaks(37 / 38)["layers.1"] == values[-2]
    assert tracked.peaks(0.5)["layers.1"] == values[18]
    low, high = forge(net, tracked, 0.1, quantile=0.9), forge(net, tracked, 0.1)
    assert low.thresholds["layers.1"] == pytest.approx(0.1 * tracked.peaks(0.9)["layers.1"], rel=1e-6)
    assert high.thresholds["layers.1"] > 20 * low.thresholds["layers.1"]


def test_batch_norm_statistics_do_not_move(rng):
    model = PreActivationResNet(rng)
    x = rng.normal(size=(9, 4, 4, 1)).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"blocks\.0\.norm1 \(BatchNorm\) is in training mode: call model\.eval\(\)"
    ):
        forge(model, x)
    model.eval()
    before = nnx.clone(model)
    forged = forge(model, x, 0.1)
    same(model, before)
    same(forged.original(), before)


def test_dropout_in_training_mode_is_refused(rng):
    model = ConvBatchNorm(rng)
    model.eval()
    model.dropout.deterministic = False
    with pytest.raises(ValueError, match=r"dropout \(Dropout\) is in training mode: call model\.eval\(\)"):
        forge(model, np.zeros((2, 5, 5, 1), np.float32))


# --------------------------------------------------------------------------------- compiled once, certificates
def test_thresholds_are_state(x):
    net = Net((6, 9, 7, 3))  # not compiled by another test
    a = forge(net, x, 2**-8)
    graphs = {nnx.split(a.with_c_r(c))[0] for c in (2**-7, 2**-4, 0.5)} | {nnx.split(a)[0]}
    graphs |= {nnx.split(a.with_c_r(0, keep=True))[0]}
    assert len(graphs) == 1
    a.inputs(x)
    with compilations() as names:
        a.with_c_r(0.1).inputs(x)
    assert names == []


def test_functions_that_modules_hold_are_those_of_now(x):
    """What they close over may have changed since a network of the same modules was tracked."""
    scale = [1.0]
    model = nnx.Sequential(
        nnx.Linear(6, 5, rngs=nnx.Rngs(0)), lambda h: scale[0] * h, nnx.Linear(5, 3, rngs=nnx.Rngs(1))
    )
    before, forged = track(model, x).maxima["layers.2"], forge(model, x, 2**-4)
    inputs = forged.inputs(x)["layers.2"]
    scale[0] = 3.0
    np.testing.assert_allclose(track(model, x).maxima["layers.2"], 3 * before, rtol=1e-5)
    np.testing.assert_allclose(forged.inputs(x)["layers.2"], 3 * inputs, rtol=1e-5)


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0, 10.0])
def test_slopes_are_the_exact_range(net, x, tau):
    forged = forge(net, x, 0.2, kind="smooth", tau=tau)
    c = forged.thresholds["layers.1"]
    low, high = forged.slopes()["layers.1"]
    s = np.linspace(0, 1 + 60 * tau, 2_000_001)  # x / c
    slope = 1 / (1 + np.exp(-(s - 1) / tau))
    slope = slope + s / tau * slope * (1 - slope)
    assert slope.max() <= high * (1 + 1e-6) and high == pytest.approx(slope.max(), rel=1e-6)
    assert low == pytest.approx(slope.min(), rel=1e-4, abs=1e-300)
    assert high > 1 and high > 0.5 + 1 / (4 * tau)
    with jax.enable_x64(True):
        grid = jnp.linspace(-3 * c, 3 * c, 10001, dtype=jnp.float64)
        slopes = np.asarray(jax.vmap(jax.grad(lambda v: gate(v, jnp.float32(c), "smooth", tau)))(grid))
    assert slopes.max() <= high * (1 + 1e-6) and slopes.min() >= low * (1 - 1e-4)


@pytest.mark.slow
def test_smooth_is_traced_with_its_exact_slopes_and_hard_is_refused(x):
    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 6, rngs=nnx.Rngs(0)))
    for layer in model.layers:
        layer.kernel[...] = jnp.eye(6)
    forged = forge(model, x, 0.2, kind="smooth")
    form = lb.trace(forged, x[:2], batched=True)
    (_, high) = forged.slopes()["layers.1"]
    assert high <= lb.naive(form).value <= high * 1.001
    c = forged.thresholds["layers.1"]
    pair = np.zeros((2, 6), np.float32)
    pair[:, 0] = 0.95 * c, 1.15 * c
    moved = forged(pair)  # farther apart than the identity moves them
    assert np.abs(moved[1] - moved[0]).max() > 2 * (pair[1, 0] - pair[0, 0])
    assert lb.naive(lb.trace(model, x[:2], batched=True)).value == pytest.approx(1, abs=1e-4)
    hard = forged.with_c_r(0.2, kind="hard")
    with pytest.raises(UnsupportedError, match="it jumps at"):
        lb.trace(hard, x[:2], batched=True)
    with pytest.raises(ValueError, match="a hard gate jumps at its threshold and has no slopes"):
        hard.slopes()
    lb.trace(hard.with_c_r(0), x[:2], batched=True)


# ------------------------------------------------------------------------------------------------------- search
@pytest.fixture
def labelled(net, rng):
    x = rng.random((48, 6), np.float32)
    return x, np.asarray(net(x)).argmax(1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["hard", "smooth"])
def test_search_compiles_once_and_zero_is_the_network(rng, caplog, kind):
    net = Net((6, 8, 7 + len(kind), 3))
    x = rng.random((48, 6), np.float32)
    y = np.asarray(net(x)).argmax(1)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        found = search_c_r(net, x, y, eps=0.05, steps=3, kind=kind)
    lines = [record.getMessage() for record in caplog.records]
    compiled = [line.split()[1] for line in lines if line.startswith("Compiling") and "float32[48,6]" in line]
    assert "jit(_maxima)" in compiled and len(compiled) == len(set(compiled)) >= 3
    zero = search_c_r(net, x, y, [0], eps=0.05, steps=3, kind=kind).rows[0]
    assert found.rows[0] == zero and zero.clean == 1.0
    assert [row.c_r for row in found.rows] == [0, 2**-8, 2**-7, 2**-6, 2**-5, 2**-4]
    for row in (found.rows[0], found.rows[-1]):
        attack = attacks.pgd(forge(net, x, row.c_r, kind=kind), x, y, 0.05, norm=math.inf, steps=3)
        assert (row.clean, row.attacked) == (attack.correct.mean(), attack.accuracy)
    assert found.best == max(found.rows, key=lambda row: (row.attacked, -row.c_r))
    assert list(found.forged.c_r.values()) == pytest.approx([found.best.c_r] * 2, rel=1e-6)
    assert isinstance(found.forged, Forged)


def test_search_without_eps_takes_the_smallest_of_equal_ones(net, labelled):
    x, y = labelled
    found = search_c_r(net, x, y, (0.9, 1e-7, 0), data=iter([x[:30], x[30:]]))
    assert found.rows[0] == Candidate(0.0, 1.0, None) and found.rows[1].clean == 1.0 > found.rows[2].clean
    assert found.best.c_r == 0 and found.forged.gates == {}
    text = repr(found)
    assert "hard gates, 48 examples" in text and "PGD" not in text and text.count("best") == 1
    assert "<table" in found._repr_html_() and "| c_r |" in found._repr_markdown_().replace("  ", " ")
    attacked = search_c_r(net, x, y, (2**-5,), eps=0.1, steps=1)
    assert "2^-5" in repr(attacked) and "accuracy under PGD (upper bound of robust)" in repr(attacked)


@pytest.mark.parametrize(
    ("candidates", "keywords", "message"),
    [
        ((), {}, "candidates must be different numbers"),
        ((0.1, 0.1), {}, "candidates must be different numbers"),
        ((math.nan,), {}, "candidates must be different numbers"),
        ((1.0,), {}, "candidates must be different numbers"),
        ((0.1,), {"eps": -1.0}, "eps must be a number > 0"),
        ((0.1,), {"norm": 1, "eps": 0.1}, "norm 2 or inf"),
        ((0.1,), {"kind": "x"}, "kind must be one of"),
    ],
)
def test_search_errors(net, labelled, candidates, keywords, message):
    with pytest.raises(ValueError, match=message):
        search_c_r(net, *labelled, candidates, **keywords)
