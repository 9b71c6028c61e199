"""Local LipLT of wide networks: sound on sampled pairs, the Jacobian for small balls, far below the global constant."""

import itertools
import sys
import weakref
from fractions import Fraction
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import in_ball, jacobians, largest_slopes, mlp, values
from gain import form_of, lowered
from zoo import NETS

import lipbounds as lb
from lipbounds._form.lure import propagate
from lipbounds._local import liplt
from lipbounds._norms import lanczos
from lipbounds._triangle import product_rounding

FEW = ("max_pool_images", "maxmin_mlp", "gelu_exact", "postactivation_resnet", "linear")


@pytest.fixture
def wide(monkeypatch):
    """Every network counts as wide."""
    module = sys.modules["lipbounds._local.engines"]
    monkeypatch.setattr(module, "TAIL", 0)
    monkeypatch.setattr(module, "_WORK", 0)  # without ellipsoids of the whole
    monkeypatch.setattr(module, "_READY", weakref.WeakKeyDictionary())


def conv_net(seed=0, size=24):
    """Wider than 1100 by itself: two convolutions with overlapping max pooling between, and a head."""
    rng = np.random.default_rng(seed)
    kernels = [
        jnp.asarray(rng.standard_normal(s) / np.sqrt(np.prod(s[:3])), jnp.float32)
        for s in ((3, 3, 2, 4), (3, 3, 4, 6))
    ]
    head = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    conv = partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), padding="SAME")

    def net(x):
        h = jax.nn.relu(conv(x[None], kernels[0], (1, 1)) + 0.1)
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        return jax.nn.relu(conv(h, kernels[1], (1, 1)))[0].mean(axis=(0, 1)) @ head * 5

    return lb.trace(net, jax.ShapeDtypeStruct((size, size, 2), jnp.float32))


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_a_convolutional_network(eps, monkeypatch):
    monkeypatch.setattr(sys.modules["lipbounds._local.engines"], "ways", lambda *_: ("LipLT",))
    form, rng = conv_net(), np.random.default_rng(1)
    x = rng.standard_normal((3, 24, 24, 2)).astype(np.float32)
    bound = lb.local(form, x, eps, pairwise=True)
    whole, pairs = largest_slopes(form, x, eps, 2, rng)
    assert bound.guarantee == "probabilistic" and bound.failure_probability == pytest.approx(3e-9)
    assert any("local LipLT" in note for note in bound.notes)
    assert (whole <= bound.value).all() and (pairs <= bound.pairwise + 1e-12).all()
    slope = np.linalg.norm(jacobians(form, x), 2, axis=(1, 2))
    assert (slope <= bound.value * (1 + 1e-9)).all()
    if eps == 0.01:
        assert (bound.value < 0.5 * lb.liplt(form).value).all() and (bound.value < 3 * slope).all()


@pytest.mark.slow
def test_radii_of_a_convolutional_network():
    form, rng = conv_net(), np.random.default_rng(2)
    x = rng.standard_normal((6, 24, 24, 2)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    bound = lb.liplt(form, pairwise=True)
    seen = []
    near = lb.certified_radius(form, x, y, bound=bound, local=True, progress=seen.append)
    far = lb.certified_radius(form, x, y, bound=bound)
    assert seen[-1].endswith("6 of 6 examples")
    assert (near.radius >= far.radius).all() and np.median(near.radius / far.radius) > 1.5
    assert near.guarantee == far.guarantee == "verified"  # local LipLT is better nowhere, so it is not used
    step = in_ball(x, 1.0, 2, 60, rng) - x
    moved = (x + step * near.radius.reshape(-1, 1, 1, 1) * (1 - 1e-9)).reshape(-1, 24, 24, 2)
    assert (values(form, moved).argmax(axis=1).reshape(60, -1) == y).all()
    whole = lb.certified_radius(form, x, y, bound=bound, local=True, guarantee="verified")
    assert whole.guarantee == "verified" and (whole.radius >= far.radius).all()


@pytest.mark.slow
def test_small_balls_give_the_jacobian(wide):
    for activation in ("relu", "silu"):
        form = mlp(activation=activation, seed=3)
        x = np.random.default_rng(4).standard_normal((20, 12)).astype(np.float32)
        exact = jacobians(form, x)
        bound = lb.local(form, x, 1e-6, pairwise=True)
        ratio = bound.value / np.linalg.norm(exact, 2, axis=(1, 2))
        assert (ratio >= 1 - 1e-9).all() and (ratio <= 1.01).all()
        rows = np.linalg.norm(exact[:, :, None] - exact[:, None], axis=3)
        assert (bound.pairwise <= 1.01 * rows + 1e-6 * rows.max()).all()


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in sorted(NETS)]
)
def test_every_net_of_the_zoo(name, wide):
    form, rng = form_of(name), np.random.default_rng(6)
    x = rng.standard_normal((4, *form.in_shape)).astype(np.float32)
    around = sys.modules["lipbounds._local.engines"].Around(form, 2, x.astype(np.float64))
    word = "probabilistic" if form.taps else "verified"
    assert around.guarantee == ("assumed" if form.assumed else word)
    for call, eps in enumerate((0.02, 0.7)):
        out = around.outputs(np.arange(4), np.full(4, eps), call=call)
        value = np.sqrt(np.linalg.eigvalsh(out)[:, :, -1]).sum(axis=1)  # before the global bound is taken in
        whole, _ = largest_slopes(form, x, eps, 2, rng)
        slope = np.linalg.norm(jacobians(form, x), 2, axis=(1, 2)) if not form.assumed else whole
        assert (np.maximum(whole, slope) <= value * (1 + 1e-9)).all()


# --- rounding ------------------------------------------------------------------------------------------------------


def cancelling(c, depth):
    """An exact Lipschitz constant sqrt(8) 0.1^depth around 3; every layer computes 0.1 x from terms of size c.

    Programs that lose all digits of their values are refused by `lb.trace`, so that this looks away: bounds hold for
    the form in real arithmetic.
    """

    def layer(x):
        return jax.nn.relu((c * x + 0.1 * x) - c * x)

    def net(x):
        for _ in range(depth):
            x = layer(x)
        return jnp.ones((2, 4), x.dtype) @ x

    unchecked = mock.patch.object(sys.modules["lipbounds._tracing.trace"], "check_values")
    with jax.enable_x64(True), unchecked:
        return lb.trace(net, jax.ShapeDtypeStruct((4,), jnp.float64))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("c", [1.0, 1e6, 1e12, 1e16, 1e60])
def test_linear_steps_that_cancel(c, depth, wide):
    form, exact = cancelling(c, depth), np.sqrt(8) * 0.1**depth
    x = np.full((2, 4), 3.0)
    around = sys.modules["lipbounds._local.engines"].Around(form, 2, x)
    assert around.ready.front is not None
    out = around.outputs(slice(None), np.full(2, 0.5))
    value = np.sqrt(np.linalg.eigvalsh(out)[:, :, -1]).sum(axis=1)
    assert (value >= exact * (1 - 1e-13)).all()
    if c <= 1e6:
        assert (value <= exact * (1 + 1e-6)).all()
    bound = lb.local(form, x, 0.5, pairwise=True)
    assert (bound.value >= exact * (1 - 1e-13)).all() and (bound.value <= lb.liplt(form).value).all()
    anchored = around.outputs(slice(None), np.full(2, 0.5), labels=np.zeros(2, int))
    rows = np.sqrt(np.einsum("njkk->njk", anchored))
    assert (rows.sum(axis=1) >= exact / np.sqrt(2) * (1 - 1e-13)).all()


def test_scales_whose_squares_underflow(wide):
    """One network, its layers times powers of two that cancel: no bound is below the slopes that it attains."""
    layers = [np.eye(3), np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]])]
    layers.append(np.array([[1.0, 1.0, 1.0], [-0.5, -0.5, -0.5]]))
    x, rng = np.array([0.3, 0.2, 0.1]), np.random.default_rng(1)
    a, b = (x + 0.14 * rng.uniform(-1, 1, (2000, 3)) for _ in range(2))  # in the ball of radius 0.25

    def net(x):
        return np.maximum(np.maximum(x @ layers[0].T, 0) @ layers[1].T, 0) @ layers[2].T

    attained = (np.linalg.norm(net(a) - net(b), axis=1) / np.linalg.norm(a - b, axis=1)).max()
    for exponents in ((0, 0, 0), (-560, 0, 560), (332, -564, 232), (0, -564, 564), (-200, -332, 532)):
        with jax.enable_x64(True):
            form = lb.from_weights([np.ldexp(w, e) for w, e in zip(layers, exponents, strict=True)])
        around = sys.modules["lipbounds._local.engines"].Around(form, 2, x[None], way="LipLT")
        out = around.outputs(slice(None), np.array([0.25]))[0]
        value = np.sqrt(np.linalg.eigvalsh(out)[:, -1]).sum()
        assert value >= attained, exponents
        assert lb.local(form, x[None], 0.25).value[0] >= attained, exponents


@pytest.mark.sampled(2)
@pytest.mark.parametrize("seed", range(4))
def test_the_rounding_of_products_on_a_device(seed):
    """Errors of a cascade with cancelling steps, forward and back, against the same in rationals."""
    rng = np.random.default_rng(seed)
    sizes = (5, 7, 6, 3)
    w = [rng.standard_normal((m, n)) for n, m in itertools.pairwise(sizes)]
    big = [10.0 ** rng.integers(0, 14) for _ in w]

    def net(x):
        for k, (a, c) in enumerate(zip(w, big, strict=True)):
            x = jnp.asarray(a) @ x
            x = (x + c * x) - c * x
            x = jax.nn.relu(x) if k < len(w) - 1 else x
        return x

    with jax.enable_x64(True):
        form = lowered(net, (5,), jnp.float64)
    front = liplt.Front(form)
    gains = [rng.standard_normal(n) for n in sizes[1:-1]]
    inject = [rng.uniform(0, 2, n) for n in sizes[1:-1]]
    spread = product_rounding.Spread(
        {k: np.abs(c).max(keepdims=True) for k, c in enumerate(gains)},
        {k: s.max(keepdims=True) for k, s in enumerate(inject)},
        dict.fromkeys(range(2), 4),
    )
    size, error = spread.forward(front.legs, product_rounding.OUTPUT, np.ones(1))
    behind = spread.backward(front.legs, product_rounding.OUTPUT, np.ones(1))

    def forward(u):
        def tap(k, y):
            return gains[k] * y + inject[k] * u[1][k]

        return propagate(form, u[0], tap, dtype=jnp.float64)

    def exact(u):
        y = [Fraction(v) for v in u[0].tolist()]
        for k, a in enumerate(w):
            y = [sum(Fraction(float(x)) * v for x, v in zip(row, y, strict=True)) for row in a]
            if k < len(gains):
                y = [
                    Fraction(float(c)) * v + Fraction(float(s)) * Fraction(float(xi))
                    for c, s, v, xi in zip(gains[k], inject[k], y, u[1][k], strict=True)
                ]
        return y

    worst = 0.0
    units = []
    with jax.enable_x64(True):
        for i in range(sum(sizes[:-1])):
            e = np.eye(sum(sizes[:-1]))[i]
            units.append((e[: sizes[0]], np.split(e[sizes[0] :], np.cumsum(sizes[1:-2]))))
            got = np.asarray(forward(units[-1]))
            gap = [Fraction(float(g)) - v for g, v in zip(got, exact(units[-1]), strict=True)]
            worst = max(worst, float(sum(g * g for g in gap)) ** 0.5)
            assert worst <= error[0] and np.linalg.norm(got) <= size[0]
        back = jax.linear_transpose(forward, units[0])
        rows = [back(jnp.asarray(e))[0] for e in np.eye(sizes[-1])]
    truth = np.array([[float(v) for v in exact(u)] for u in units])  # columns of the map
    for k, (x, xi) in enumerate(rows):
        gap = np.concatenate([x, *xi]) - truth[:, k]
        assert np.linalg.norm(gap) <= behind[0] + 1e-15 * np.linalg.norm(truth[:, k])
    if max(big) > 1e4:
        assert worst > 1e-16 * size[0] and worst > error[0] * 1e-4  # there is something to see


# --- groups --------------------------------------------------------------------------------------------------------


GROUPS = {
    "max": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (3,), (2,), "VALID"),
    "padded": lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (3,), (2,), "SAME"),
    "min": lambda x: x.reshape(4, 3).min(axis=1),
    "sort": lambda x: jnp.sort(x.reshape(4, 3), axis=1).ravel(),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", sorted(GROUPS))
@pytest.mark.parametrize("reach", [0.05, 0.4, 3.0])
def test_what_a_group_leaves_undecided(name, reach):
    """q = dv - C dy of pairs in the box obeys both of its bounds, and dv its own."""
    form = lb.trace(GROUPS[name], jax.ShapeDtypeStruct((12,), jnp.float32))
    (tap,), rng = form.taps, np.random.default_rng(5)
    y = rng.standard_normal((6, 12))
    rho = rng.uniform(0.1, 1, (6, 12))
    half = reach * rho
    near = liplt._Groups(tap).near(y, half, rho)
    with jax.enable_x64(True):
        linear = jax.tree.map(jnp.asarray, near.linear)

        @jax.jit
        @jax.vmap
        def change(u, v):
            dv = jax.vmap(lambda p: form.evaluate(p, jnp.float64))
            dv = dv(u) - dv(v)
            return dv, dv - jax.vmap(partial(liplt._apply, tap))(linear, u - v)

        u, v = (y + half * rng.uniform(-1, 1, (300, *y.shape)) for _ in range(2))
        dv, q = (np.asarray(a) for a in change(u, v))
    scale = np.abs((u - v) / rho).max(axis=2)[:, :, None]  # ||dx|| may be that small
    m = np.linalg.norm(near.passes * (u - v), axis=2)
    assert (np.abs(dv) <= near.reach * scale + 1e-12).all()
    assert (np.abs(q) <= near.entries * scale + 1e-12).all()
    assert (np.linalg.norm(dv, axis=2) <= near.gain * m + 1e-12).all()
    moved = near.weights > 0
    assert (np.abs(q[:, ~moved]) < 1e-12).all()
    total = np.linalg.norm(np.where(moved, q / np.where(moved, near.weights, 1), 0), axis=2)
    assert (total <= m + 1e-12).all()
    if reach == 0.05:
        assert (near.weights == 0).mean() > 0.5


# --- the norms -----------------------------------------------------------------------------------------------------


def squares(a):
    return lambda v: np.einsum("nij,nj->ni", a, np.einsum("nji,nj->ni", a, v))


def test_lanczos_is_never_below_the_norm_and_tight():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((6, 40, 30)) * 10.0 ** rng.uniform(-150, 140, (6, 1, 1))
    a[1] *= np.linspace(0, 1, 30) ** 8
    a[2], _ = np.linalg.qr(rng.standard_normal((40, 30)))
    a[3] = 0
    exact = np.linalg.norm(a, 2, axis=(1, 2))
    for seed in range(20):
        start = np.repeat(np.random.default_rng(seed).standard_normal((1, 40)), 6, axis=0)
        upper = lanczos.lanczos_columns(squares(a), start, failure=1e-9, rtol=0.01, max_steps=40)
        assert (upper >= exact).all() and (upper <= 1.01 * exact).all() and upper[3] == 0
        rough = lanczos.lanczos_columns(squares(a), start, failure=1e-9, rtol=0.01, max_steps=5)
        assert (rough >= exact).all()


def test_lanczos_fails_as_often_as_allowed_and_no_more():
    """One step and failure 0.3: the bound is an honest one only because the start is random."""
    values = np.zeros(10)
    values[0] = 1.0
    a = np.repeat(np.diag(values + 1e-3)[None], 4000, axis=0)
    start = np.random.default_rng(1).standard_normal((4000, 10))
    upper = lanczos.lanczos_columns(squares(a), start, failure=0.3, rtol=1e-3, max_steps=1)
    missed = (upper < a[0, 0, 0]).mean()
    assert 0.02 < missed <= 0.3


def test_lanczos_covers_a_direction_that_rounding_hides(monkeypatch):
    n, c = 50, 2e-10
    start = np.random.default_rng(0).standard_normal(n)
    start /= np.linalg.norm(start)
    side = np.random.default_rng(1).standard_normal(n)
    side -= (side @ start) * start
    x = c * start + np.sqrt(1 - c * c) * side / np.linalg.norm(side)
    missed, root = 0, lanczos._largest_root
    for extra in (1e-8, 1e-6, 1e-4):

        def apply(v, extra=extra):
            return v + extra * (v @ x)[:, None] * x

        exact, settings = np.sqrt(1 + extra), {"failure": 1e-9, "rtol": 1e-3, "max_steps": 50}
        assert lanczos.lanczos_columns(apply, start[None], **settings)[0] >= exact
        with monkeypatch.context() as patch:
            patch.setattr(
                lanczos, "_largest_root", lambda d, o, limit, low, loss: root(d, o, limit, low, 0.0)
            )
            missed += lanczos.lanczos_columns(apply, start[None], **settings)[0] < exact
    assert missed > 0


def test_lanczos_says_so_where_it_cannot():
    a = np.eye(4)[None]
    start = np.ones((1, 4))
    assert np.isinf(lanczos.lanczos_columns(squares(a), start, failure=1e-16, rtol=0.1, max_steps=4)[0])
    with pytest.raises(ValueError, match="NaN"):
        lanczos.lanczos_columns(lambda v: v * np.nan, start, failure=1e-9, rtol=0.1, max_steps=4)
