"""Local bounds of wide networks by two engines: the better one of every example, and what is left where one fails."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import in_ball, largest_slopes, mlp, values
from test_local_wide import conv_net

import lipbounds as lb
from lipbounds._gain.memory_budget import TooLarge
from lipbounds._lipsdp import state_matrices
from lipbounds._local import ellipsoids, engines, liplt
from lipbounds._triangle import formed_blocks
from lipbounds._triangle.recursion import Request

ENGINES = ("hybrid", "LipLT")
WIDE = {"mlp": 26, "conv": 200}  # wider than that is wide
EPS = (0.3, 0.05)


def small_conv_net():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 2, 4)) / 4, jnp.float32)
    w = [jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), jnp.float32) for s in ((256, 30), (30, 5))]

    def net(x):
        h = jax.lax.conv_general_dilated(
            x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return 3 * (jax.nn.relu(jax.nn.relu(h + 0.1).ravel() @ w[0] + 0.1) @ w[1])

    return lb.trace(net, jax.ShapeDtypeStruct((8, 8, 2), jnp.float32))


@functools.cache
def known(name):
    """(form, x, y, bound): a wide front and a narrow tail, and two examples; each engine is better at one of them."""
    rng = np.random.default_rng(3)
    if name == "mlp":
        form = mlp(widths=(12, 40, 24, 20, 6), seed=2)
        x = rng.standard_normal((4, 12)).astype(np.float32)[2:]
    else:
        form = small_conv_net()
        x = rng.standard_normal((3, 8, 8, 2)).astype(np.float32)[[2, 1]]
    return form, x, values(form, x).argmax(axis=1), lb.liplt(form, pairwise=True)


@pytest.fixture
def net(request, monkeypatch):
    name = getattr(request, "param", "mlp")
    monkeypatch.setattr(engines, "_READY", weakref.WeakKeyDictionary())
    monkeypatch.setattr(engines, "TAIL", WIDE[name])
    monkeypatch.setattr(engines, "_WORK", 0)  # without ellipsoids of the whole
    return known(name)


def results(net, tries=2, **options):
    form, x, y, bound = net
    radii = lb.certified_radius(form, x, y, bound=bound, local=lb.Local(tries=tries), **options)
    return radii, lb.local(form, x, EPS, bound=bound, pairwise=True, **options)


def alone(net, monkeypatch, engine, **options):
    with monkeypatch.context() as patch:
        patch.setattr(engines, "ways", lambda *_: (engine,))
        return results(net, **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("net", WIDE, indirect=True)
def test_no_engine_alone_does_better(net, monkeypatch):
    form, x, y, _ = net
    assert engines.ways(form, 2, "auto") == ENGINES
    radii, near = results(net)
    first, second = (alone(net, monkeypatch, engine) for engine in ENGINES)
    assert first[0].guarantee == first[1].guarantee == "verified"
    np.testing.assert_array_equal(radii.radius, np.maximum(first[0].radius, second[0].radius))
    np.testing.assert_array_equal(near.value, np.minimum(first[1].value, second[1].value))
    np.testing.assert_array_equal(near.pairwise, np.minimum(first[1].pairwise, second[1].pairwise))
    for engine in (first, second):
        assert (radii.radius > engine[0].radius).sum() == (near.value < engine[1].value).sum() == 1
    for found in (radii, near):
        assert found.guarantee == "probabilistic"
        assert any("bounded as a whole" in note for note in found.notes)
        assert any("local LipLT, each example" in note for note in found.notes)
    assert "every example uses the better engine: local LipLT for 1 of 2" in radii.notes
    assert near.failure_probability == pytest.approx(2e-9)
    shape = (-1, *[1] * (x.ndim - 1))
    whole, pairs = largest_slopes(form, x, np.reshape(EPS, shape), 2, np.random.default_rng(1))
    assert (whole <= near.value).all() and (pairs <= near.pairwise + 1e-12).all()
    step = in_ball(x, 1.0, 2, 200, np.random.default_rng(2)) - x
    moved = x + step * radii.radius.reshape(shape) * (1 - 1e-9)
    assert (values(form, moved.reshape(-1, *x.shape[1:])).argmax(axis=1).reshape(200, -1) == y).all()


def test_what_is_verified_stays_so_where_the_other_engine_adds_nothing(net, monkeypatch):
    form, x, y, bound = net
    first, second = (alone(net, monkeypatch, engine)[0].radius for engine in ENGINES)
    for i, word in enumerate(np.where(first >= second, "verified", "probabilistic")):
        one = lb.certified_radius(form, x[i : i + 1], y[i : i + 1], bound=bound, local=lb.Local(tries=2))
        assert one.guarantee == word
        assert any("LipLT, each example" in note for note in one.notes) == (word == "probabilistic")


def broken(monkeypatch, module, name, error, calls=0):
    """module.name raises from call number `calls` on."""
    real, done = getattr(module, name), []

    def fails(*args, **kwargs):
        done.append(name)
        if len(done) > calls:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, fails)


@pytest.mark.parametrize(
    ("module", "name", "error", "left"),
    [
        (engines, "hybrid_start", TooLarge("no way"), "LipLT"),
        (ellipsoids, "ellipsoids", ValueError("no way"), "LipLT"),
        (liplt, "Front", MemoryError("no way"), "hybrid"),
        (liplt, "grams", ZeroDivisionError("no way"), "hybrid"),
    ],
)
def test_an_engine_that_fails_takes_nothing_away(net, monkeypatch, module, name, error, left):
    expected = alone(net, monkeypatch, left)
    engines._READY.clear()
    broken(monkeypatch, module, name, error)
    radii, near = results(net)
    np.testing.assert_array_equal(radii.radius, expected[0].radius)
    np.testing.assert_array_equal(near.value, expected[1].value)
    np.testing.assert_array_equal(near.pairwise, expected[1].pairwise)
    lost = "local LipLT" if left == "hybrid" else "ellipsoids behind the wide front"
    for found, reference in zip((radii, near), expected, strict=True):
        assert f"without {lost}, which failed: no way" in found.notes
        assert found.guarantee == reference.guarantee


def test_an_engine_that_fails_on_the_way_leaves_what_it_found(net, monkeypatch):
    first = alone(net, monkeypatch, "hybrid", tries=4)[0].radius
    whole = results(net, tries=4)[0].radius
    broken(monkeypatch, liplt, "grams", MemoryError("full"), calls=3)
    found = lb.certified_radius(*net, local=lb.Local(tries=4))
    assert (found.radius >= first).all() and (found.radius > first).any()
    assert (found.radius <= whole).all() and found.guarantee == "probabilistic"
    assert any("failed: full" in note for note in found.notes)


def test_radii_of_the_only_engine_keep_its_guarantee_where_it_fails_on_the_way(net, monkeypatch):
    form, x, y, bound = net
    monkeypatch.setattr(engines, "ways", lambda *_: ("LipLT",))
    broken(monkeypatch, liplt, "grams", jax.errors.JaxRuntimeError("full"), calls=3)
    found = lb.certified_radius(form, x, y, bound=bound, local=lb.Local(tries=4))
    assert (found.radius > lb.certified_radius(form, x, y, bound=bound).radius).any()
    assert found.guarantee == "probabilistic" and any("failed: full" in note for note in found.notes)


def test_global_radii_and_no_constants_where_both_engines_fail(net, monkeypatch):
    for name in ("ellipsoids", "grams"):
        broken(monkeypatch, ellipsoids if name == "ellipsoids" else liplt, name, ValueError(f"no {name}"))
    form, x, y, bound = net
    radii = lb.certified_radius(form, x, y, bound=bound, local=True)
    np.testing.assert_array_equal(radii.radius, lb.certified_radius(form, x, y, bound=bound).radius)
    assert radii.guarantee == "verified" and "global radii: local bounds failed: no ellipsoids" in radii.notes
    with pytest.raises(ValueError, match="no ellipsoids"):
        lb.local(form, x, EPS, bound=bound)


def test_the_front_is_bounded_as_asked_for(net, monkeypatch):
    """Seed and guarantee reach the bound of the front; what is kept of a form is of the same question."""
    form, x, _, bound = net
    asked, real = [], state_matrices.hybrid_start

    def uncertain(form, k, request):
        asked.append(request)
        word, failure = (
            ("probabilistic", request.failure) if request.guarantee == "auto" else ("verified", 0.0)
        )
        return *real(form, k, request)[:2], word, failure

    monkeypatch.setattr(engines, "hybrid_start", uncertain)
    monkeypatch.setattr(engines, "ways", lambda *_: ("hybrid",))
    for guarantee, seed in (("auto", 3), ("auto", 4), ("verified", 4), ("auto", 3)):
        near = lb.local(form, x, EPS, bound=bound, guarantee=guarantee, seed=seed)
        assert near.guarantee == ("verified" if guarantee == "verified" else "probabilistic")
        assert near.failure_probability == (0 if guarantee == "verified" else 1e-9)
    assert asked == [Request(2, "auto", 3), Request(2, "auto", 4), Request(2, "verified", 4)]


def test_verified_is_the_verified_engine_alone(net, monkeypatch):
    broken(monkeypatch, liplt, "grams", AssertionError("probabilistic"))
    radii, near = results(net, guarantee="verified")
    assert radii.guarantee == near.guarantee == "verified" and near.failure_probability == 0


def test_blocks_of_the_front_are_proved_once(monkeypatch):
    form = mlp(widths=(12, 40, 24, 20, 6), seed=2)
    proved, real = [], formed_blocks.norms.verified_norm
    monkeypatch.setattr(
        formed_blocks.norms, "verified_norm", lambda m, *a, **k: proved.append(m.shape) or real(m, *a, **k)
    )
    lb.liplt(form)
    before = len(proved)
    state_matrices._hybrid_start(form, 1, Request(2, "auto", 77))
    assert (40, 12) in proved[:before] and (40, 12) not in proved[before:]


def test_the_only_engine_that_applies(net, monkeypatch):
    form, x, _, bound = net
    monkeypatch.setattr(engines, "TAIL", 5)  # the outputs are wider: nothing is left behind a cut
    assert engines.ways(form, 2, "auto") == ("LipLT",) and engines.ways(form, 2, "verified") == ("hybrid",)
    near = lb.local(form, x, EPS, bound=bound)
    assert near.guarantee == "probabilistic" and (near.value < bound.value).all()
    assert (lb.local(form, x, EPS, bound=bound, guarantee="verified").value <= bound.value).all()
    monkeypatch.setattr(engines, "LIMIT", 100)
    monkeypatch.setattr(engines, "TAIL", WIDE["mlp"])
    near = lb.local(form, x, EPS, bound=bound)
    assert any("wide front would take" in note for note in near.notes)


def test_an_engine_that_gives_nothing_does_not_weaken_the_guarantee(monkeypatch):
    form, x, _, _ = known("mlp")
    bound = lb.lipsdp(form, pairwise=True, progress=False)
    monkeypatch.setattr(engines, "TAIL", 5)
    monkeypatch.setattr(engines, "_WORK", 0)
    assert engines.ways(form, 2, "auto") == ("LipLT",)
    found = lb.local(form, x, 1e3, bound=bound)  # in so large a ball local LipLT is no better than LipLT
    assert (found.value == bound.value).all()
    assert found.guarantee == "verified" and found.failure_probability == 0


@pytest.mark.parametrize("norm", [2, np.inf])
def test_global_radii_stand_where_no_engine_applies(norm, monkeypatch):
    form, x, y, _ = known("mlp")
    bound = lb.liplt(form, norm=norm, pairwise=True)
    monkeypatch.setattr(engines, "_MOST_OUTPUTS", 5)
    monkeypatch.setattr(engines, "_WORK", 0)
    found = lb.certified_radius(form, x, y, bound=bound, local=True)
    reference = lb.certified_radius(form, x, y, bound=bound)
    np.testing.assert_array_equal(found.radius, reference.radius)
    assert found.guarantee == "verified" and found.method == "liplt"
    assert found.notes[-1].startswith("global radii: local bounds")
    with pytest.raises(ValueError, match="local bounds") as refusal:
        lb.local(form, x, 0.1, norm=norm, bound=bound)
    assert type(refusal.value) is ValueError


def _repeated(kind):
    """A network that takes one maximum (or log-sum-exp) in its wide front and again, or its minimum, behind it."""
    rng = np.random.default_rng(0)
    a, b, p = (jnp.asarray(rng.normal(size=(k, 40)) / 40**0.5, jnp.float32) for k in (6, 1, 3))
    off = jnp.asarray([-50.0, 0, -50, 0, -50, 0], jnp.float32)

    def first(h, low):
        pairs = h.reshape(3, 2)
        if kind == "pool":
            return pairs.max(axis=1)
        return jax.nn.logsumexp(pairs, axis=1) if kind == "logsumexp" else jnp.maximum(pairs[:, 0], low)

    def net(x):
        h, low = a @ x + off, (b @ x)[0]
        begin = first(h, low)
        on = jax.nn.relu(p @ x + 50.0)
        again = jnp.minimum(h.reshape(3, 2)[:, 0], low) if kind == "min" else first(h, low)
        return jax.nn.relu(on + 0.1 * begin + 0.1 * again) + jnp.asarray([1.0, 0.0, 0.0])

    return net


@pytest.mark.parametrize("kind", ["pool", "min", "logsumexp"])
def test_what_the_front_and_the_tail_have_in_common_is_not_taken_for_another_tap(kind, monkeypatch):
    """Every neuron behind the front is clearly on or off, so that the bound is close to the slope at the example."""
    monkeypatch.setattr(engines, "_READY", weakref.WeakKeyDictionary())
    monkeypatch.setattr(engines, "TAIL", 20)
    monkeypatch.setattr(engines, "ways", lambda *_: ("hybrid",))
    net, x = _repeated(kind), jnp.zeros((1, 40))
    form = lb.trace(net, x[0])
    slope = np.linalg.norm(np.asarray(jax.jacobian(net)(x[0]), np.float64), 2)
    found = lb.local(form, np.asarray(x), 0.01, guarantee="verified", progress=False)
    assert (
        slope <= found.value[0] < 1.5 * slope and "the first 1 taps are bounded as a whole" in found.notes[0]
    )


@pytest.mark.parametrize("engine", [*ENGINES, "ellipsoids"])
def test_what_is_kept_with_a_form_does_not_keep_it(engine, monkeypatch):
    """A process that bounds one network after the other would otherwise hold the matrices of all of them."""
    monkeypatch.setattr(engines, "TAIL", WIDE["mlp"])
    monkeypatch.setattr(engines, "ways", lambda *_: (engine,))
    form, x = mlp(widths=(12, 40, 24, 20, 6), seed=2), np.zeros((1, 12))
    lb.local(form, x, 0.1, progress=False)
    kept = weakref.ref(form)
    del form
    gc.collect()
    assert kept() is None


@pytest.mark.slow
def test_a_network_that_is_wide_by_itself(monkeypatch):
    form = conv_net()
    x = np.random.default_rng(2).standard_normal((4, 24, 24, 2)).astype(np.float32)
    net = form, x, values(form, x).argmax(axis=1), lb.liplt(form, pairwise=True)
    found = lb.certified_radius(*net, local=True).radius
    for engine in ENGINES:
        with monkeypatch.context() as patch:
            patch.setattr(engines, "ways", lambda *_, engine=engine: (engine,))
            assert (found >= lb.certified_radius(*net, local=True).radius).all()
    assert engines.ways(form, 2, "auto") == ENGINES
