"""Margins of wide networks: the search on open neurons alone is that of all layers, and memory decides."""

import jax
import numpy as np
import pytest
from balls import mlp
from test_margins import attained, gaps, values

import lipbounds as lb
from lipbounds._margins import found, merged, problem, proof, search
from lipbounds._margins.margins import prepare


@pytest.mark.parametrize("norm", [2, pytest.param(np.inf, marks=pytest.mark.slow)])
def test_open_neurons_alone_have_the_minimum_of_all_layers(norm):
    """Minimum, minimiser, barrier and gradient, at multipliers that are not the best ones; some neurons are stable."""
    rng = np.random.default_rng(1)
    form, x = mlp((6, 12, 10, 3)), rng.uniform(size=(1, 6))
    y = np.asarray(values(form, x)).argmax(axis=1)
    one = prepare(form, x, y, 0.2, norm=norm, box=(0.0, 1.0))
    item, start = one.item(0, int((y[0] + 1) % 3))
    live = one.live(0)
    assert 4 < live < sum(n.open.size for n in item.taps)
    moved = [
        tap + 0.1 * rng.standard_normal(tap.shape) * n.open
        for n, tap in zip(item.taps, start.taps, strict=True)
    ]
    start = start._replace(taps=tuple(moved))

    @jax.jit
    def both(first, second):
        return [
            jax.value_and_grad(lambda v, net=net, item=item: search._loss(net, item, v, 0.1), has_aux=True)(x)
            for net, (item, x) in (first, second)
        ]

    with jax.enable_x64(True):
        alone = merged.network(one.gain(0), np.float64)
        two = both((one.net, (item, start)), (alone, merged.merge(item, start)))
        ((loss, plain), slope), ((other, bare), own) = jax.tree.map(np.asarray, two)
    assert np.isfinite(loss) and abs(loss - plain) > 1e-3  # the barrier counts
    np.testing.assert_allclose([other, bare], [loss, plain], rtol=1e-10)
    np.testing.assert_allclose(own.ball, slope.ball, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(own.box, slope.box, rtol=1e-8, atol=1e-10)
    wanted = np.concatenate([p[:, n.open > 0] for p, n in zip(slope.taps, item.taps, strict=True)], axis=1)
    np.testing.assert_allclose(own.taps[0][:, :live], wanted, rtol=1e-8, atol=1e-10)
    assert not own.taps[0][:, live:].any()


@pytest.mark.slow
def test_margins_by_open_neurons_alone(monkeypatch):
    form, x = mlp((6, 12, 10, 3)), np.random.default_rng(0).uniform(size=(2, 6))
    y = values(form, x).argmax(axis=1)
    usual = lb.margins(form, x, y, 0.2, iterations=100, progress=False)
    monkeypatch.setattr(problem.Problem, "apart", lambda self, row: True)
    monkeypatch.setattr("lipbounds._margins.found._CALL", 0.0)  # one evaluation in each call
    said = []
    monkeypatch.setattr("lipbounds._margins.found._PATIENCE", 0.0)
    alone = lb.margins(form, x, y, 0.2, iterations=100, progress=said.append)
    rest = np.isfinite(usual.value)
    np.testing.assert_allclose(alone.value[rest], usual.value[rest], rtol=0, atol=5e-3)
    assert (alone.value <= attained(form, x, y, 0.2, 2)).all()
    assert any("at most about" in line and line.endswith("left") for line in said)
    with jax.enable_x64(True):
        assert (alone.value[rest] <= gaps(values(form, x), y)[rest]).all()


@pytest.mark.slow
def test_a_float32_search_goes_on_in_float64_where_its_proof_fails(monkeypatch):
    form, x = mlp((6, 12, 10, 3)), np.random.default_rng(0).uniform(size=(2, 6))
    y = np.asarray(values(form, x)).argmax(axis=1)
    usual, precisions = proof.prove, []

    def prove(gain, facts, aim, m):
        return usual(gain, facts, aim, m) if precisions[-1] == np.float64 else -np.inf

    once = found.Found.proved

    def proved(self, row, other, m, item=None):
        precisions.append(np.asarray(m.ball).dtype)
        return once(self, row, other, m, item)

    monkeypatch.setattr(found, "_SMALL", 0)
    monkeypatch.setattr(proof, "prove", prove)
    monkeypatch.setattr(found.Found, "proved", proved)
    local = prepare(form, x, y, 0.2).balls.local
    margins = lb.margins(form, x, y, 0.2, iterations=50, progress=False)
    assert precisions == 4 * [np.float32] + 4 * [np.float64]
    rest = np.isfinite(local)
    assert (margins.value[rest] > local[rest]).all()


def test_a_search_that_begins_without_a_minimum(monkeypatch):
    """Multipliers of the input a third of what they must be: they are raised until the quadratic has a minimum."""
    form, x = mlp((6, 12, 10, 3)), np.random.default_rng(0).uniform(size=(1, 6))
    y = np.asarray(values(form, x)).argmax(axis=1)
    one = prepare(form, x, y, 0.2)
    item, start = one.item(0, int((y[0] + 1) % 3))
    low = search.Job((0, 0), item, start._replace(ball=np.float64(np.log(1 / 3))), np.inf, 2)
    out = []
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        options = {"width": 8, "filled": 1, "tolerance": 1e-3}
        search.run(one.net, [low], lambda job, result: out.append((job, result)), **options)
        monkeypatch.setattr(search, "_RAISES", 0)
        search.run(one.net, [low], lambda job, result: out.append((job, result)), **options)
    (job, found), (_, lost) = out
    assert job.raised >= 1 and np.isfinite(found.least) and np.isnan(lost.least)
