"""`lb.empirical` over data: layers, streams, regions; every lower bound below every upper bound."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gain import form_of
from zoo import NETS

import lipbounds as lb
from lipbounds._empirical import survey
from lipbounds._empirical.empirical import _lowered_ratio
from lipbounds.results import LayerBound

RNG = np.random.default_rng(0)
W = [RNG.standard_normal(shape).astype(np.float32) for shape in ((12, 6), (9, 12), (4, 9))]
B = [RNG.standard_normal(len(w)).astype(np.float32) for w in W]
X = RNG.uniform(0, 1, (700, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def form():
    return lb.from_weights(W, B, activation="relu")


def activations(x):
    """What every layer reads, by NumPy in float64: (N, columns) each."""
    v, seen = np.asarray(x, np.float64), []
    for w, b in zip(W, B, strict=True):
        seen.append(v)
        v = np.maximum(v @ w.T.astype(np.float64) + b, 0)
    return seen


@pytest.mark.sampled(3)
@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_layers_are_definition_1_over_the_data(form, norm):
    found = lb.empirical(form, X, norm=norm, steps=0, layers=True)
    assert [layer.target for layer in found.layers] == ["tap 0 (relu)", "tap 1 (relu)", "output"]
    assert [layer.source for layer in found.layers] == ["x", "tap 0 (relu)", "tap 1 (relu)"]
    for layer, w, u in zip(found.layers, W, activations(X), strict=True):
        ratios = np.linalg.norm(u @ w.T.astype(np.float64), norm, axis=1) / np.linalg.norm(u, norm, axis=1)
        assert layer.shape == w.shape and ratios[layer.example] >= ratios.max() * (1 - 1e-6)
        assert (
            ratios.max() * (1 - 1e-6) <= layer.value <= ratios.max() <= np.linalg.norm(w.astype(float), norm)
        )
    assert "norm >=" in repr(found) and "tap 1 (relu)" in found._repr_html_()
    assert isinstance(found, lb.LowerBound) and all(type(layer) is LayerBound for layer in found.layers)


def test_a_layer_reads_all_that_reaches_it_without_a_tap_between():
    a, b, c = (jnp.asarray(RNG.standard_normal((6, 6)), jnp.float32) for _ in range(3))

    def residual(x):
        h = jax.nn.relu(a @ x + 1)
        return c @ jax.nn.tanh(b @ h + x) + h

    found = lb.empirical(lb.trace(residual, X[0]), X, steps=0, layers=True)
    assert [layer.source for layer in found.layers] == [
        "x",
        "x, tap 0 (relu)",
        "tap 0 (relu), tap 1 (tanh)",
    ]
    h = np.maximum(X.astype(np.float64) @ np.asarray(a, np.float64).T + 1, 0)
    top = np.linalg.norm(h @ np.asarray(b, np.float64).T + X, axis=1) / np.sqrt((h**2).sum(1) + (X**2).sum(1))
    assert found.layers[1].value == pytest.approx(top.max(), rel=1e-6) and found.layers[1].shape == (6, 12)


def parts(x, sizes):
    for begin, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        yield x[begin : begin + size]


def test_a_stream_of_any_batches_gives_what_the_array_gives(form):
    whole = lb.empirical(form, X, steps=0, layers=True)
    for sizes in ((256, 256, 188), (1, 300, 0, 399), (700,)):
        found = lb.empirical(form, parts(X, sizes), steps=0, layers=True)
        assert found.value == pytest.approx(whole.value, rel=1e-5)
        assert [layer.example for layer in found.layers] == [layer.example for layer in whole.layers]
    labelled = ((x, np.zeros(len(x), int)) for x in parts(X, (400, 300)))
    assert lb.empirical(form, labelled, steps=0).value == pytest.approx(whole.value, rel=1e-5)


def test_a_pass_over_a_stream_is_compiled_once_and_holds_a_batch(form):
    survey.look.clear_cache()
    alive = []

    def stream():
        for _ in range(20):
            alive.append(np.zeros((150, 6), np.float32) + RNG.uniform(0, 1, (150, 6)).astype(np.float32))
            yield alive[-1]

    lb.empirical(form, stream(), steps=0, layers=True)
    assert survey.look._cache_size() == 1
    pool = survey.survey(form, parts(np.concatenate(alive), [150] * 20), 2, 32, 8, True, RNG)
    assert pool.count == 3000 and len(pool.starts) == 32 and len(pool.pairs) <= 8


def test_the_steepest_pair_of_the_data_counts():
    """A cliff between two data points that no derivative at the data sees."""
    form = lb.trace(lambda x: jnp.clip(1000 * (x - 0.5), 0, 1), np.zeros(1, np.float32))
    points = np.array([[0.0], [0.2], [0.499], [0.502], [0.8], [1.0]], np.float32)
    found = lb.empirical(form, points, steps=0)
    assert found.value == pytest.approx(1 / 0.003, rel=1e-3) and sorted(np.concatenate(found.witness)) == [
        pytest.approx(0.499),
        pytest.approx(0.502),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_within_a_ball_and_within_the_range(norm):
    """f is steep at a distance from the data: outside the region it must not be used."""
    steep = lb.trace(lambda x: x + 50 * jax.nn.relu(x - 3) + 7 * jax.nn.relu(x - 1), np.zeros(3, np.float32))
    points = RNG.uniform(-1, 0.8, (20, 3)).astype(np.float32)
    free = lb.empirical(steep, points, norm=norm)
    ball = lb.empirical(steep, points, norm=norm, within=1.5)
    box = lb.empirical(steep, points, norm=norm, within="range", pairwise=True)
    assert (
        free.value > 57
        and ball.value == pytest.approx(8, rel=1e-6)
        and box.value == pytest.approx(1, rel=1e-6)
    )
    ends = np.stack(box.witness)
    assert (
        (ends >= points.min(0)).all() and (ends <= points.max(0)).all() and "range of the data" in repr(box)
    )
    gaps = np.linalg.norm(np.stack(ball.witness)[:, None] - points.astype(np.float64), norm, axis=2)
    assert (gaps.min(axis=1) <= 1.5).all()


@pytest.mark.parametrize(
    ("x", "options", "why"),
    [
        (None, {"layers": True}, "pass X"),
        (None, {"within": 1.0}, "pass X"),
        (X, {"within": 0.0}, "radius > 0"),
        (X, {"within": "ball"}, 'None, "range" or a radius'),
        (X, {"within": True}, 'None, "range" or a radius'),
        (iter([]), {}, "no points"),
        (iter([np.zeros((0, 6))]), {}, "no points"),
        (iter([X, X[:, :5]]), {}, "every batch of X"),
        (iter([X, np.full((2, 6), np.nan)]), {}, "not finite"),
    ],
)
def test_refusals(form, x, options, why):
    with pytest.raises(ValueError, match=why):
        lb.empirical(form, x, **options)


FEW = ("relu", "two_branches")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted(NETS)]
)
def test_every_lower_bound_is_below_every_upper_bound(name):
    """Layers against their dense norms, the whole against the bounds (the attained order is in test_zoo)."""
    form = form_of(name)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((8, *form.in_shape)).astype(np.float32)
    found = lb.empirical(form, x, steps=0, layers=True)
    assert found.value <= lb.liplt(form).value <= lb.naive(form).value
    sources = survey.direct_sources(form.program)
    assert len(found.layers) == len(form.taps) + 1
    for k, (layer, reads) in enumerate(zip(found.layers, sources, strict=True)):
        assert layer.value <= np.linalg.norm(dense(form, k, reads), 2) * (1 + 1e-12), layer


def dense(form, k, reads):
    """The linear map into tap k (or the output) as a matrix in float64."""
    sizes = [form.in_size if j < 0 else form.taps[j].size_out for j in reads]
    ends = np.cumsum([0, *sizes])

    def image(u):
        given = dict(zip(reads, (u[a:b] for a, b in itertools.pairwise(ends)), strict=True))
        seen = {}

        def tap(i, y):
            seen[i] = y
            return given.get(i)

        x = given.get(-1)
        seen[len(form.taps)] = survey.propagate(form, x, tap, dtype=jnp.float64)
        rows = form.num_outputs if k == len(form.taps) else form.taps[k].size_in
        return jnp.zeros(rows, jnp.float64) if seen[k] is None else seen[k]

    with jax.enable_x64(True):
        if not reads:
            return np.zeros((1, 1))
        return np.asarray(jax.jit(jax.jacfwd(image))(jnp.zeros(ends[-1], jnp.float64)))


def test_ratios_of_a_layer_whose_steps_cancel_are_lowered_by_their_rounding_errors():
    big = jnp.asarray(1e8 * RNG.standard_normal((6, 6)), jnp.float32)

    def identity_map(x):  # (B + I) x - B x, rounded, is up to 1e-8 longer than x
        return jax.nn.relu((big @ x + x) - big @ x)

    for norm in (1, 2, np.inf):
        layer = lb.empirical(lb.trace(identity_map, X[0]), X, norm=norm, steps=0, layers=True).layers[0]
        assert 0.9999 < layer.value <= 1.0


def test_a_layer_that_reads_constants_as_well(form):
    def partly_constant(x):
        h = jax.nn.relu(jnp.concatenate([x, jnp.ones(2)]))
        return jnp.max(h.reshape(2, 4), axis=0)

    found = lb.empirical(lb.trace(partly_constant, X[0]), X, steps=0, layers=True)
    assert [layer.value for layer in found.layers[:2]] == pytest.approx([1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_ratio_with_nan_says_nothing(place):
    parts = [np.ones(3), np.zeros(3), np.ones(3)]
    assert 0.999 < _lowered_ratio(*parts, 2) < 1
    parts[place] = np.full(3, np.nan)
    assert _lowered_ratio(*parts, 2) == 0
