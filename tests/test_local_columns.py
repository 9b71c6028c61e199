"""Ellipsoids of wide networks around inputs: maps applied to columns, Schur complements in blocks, the memory."""

import dataclasses
import itertools
import threading
import weakref

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.sparse as sp
from balls import in_ball, largest_slopes, mlp, values

import lipbounds as lb
from lipbounds._gain.memory_budget import of_ellipsoids
from lipbounds._local import ellipsoids, engines, maps, multipliers
from lipbounds._local.stages import Stage
from lipbounds._norms import schur
from lipbounds._norms.enclosures import Enclosure
from lipbounds._text import progress
from lipbounds._triangle import recursion

U = 2.0**-53


def conv(x, kernel, stride, groups=1):
    return jax.lax.conv_general_dilated(
        x[None],
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )[0]


def conv_net(skip=False):
    """8 x 8 x 2 inputs, two convolutions of 128 and 64 neurons, a dense head; with a skip the state lives on."""
    rng = np.random.default_rng(0)
    shapes = ((3, 3, 2, 8), (2, 2, 8, 4), (64, 12), (12, 5))
    k1, k2, w1, w2 = (
        jnp.asarray(rng.standard_normal(s) / np.sqrt(np.prod(s[:-1])), jnp.float32) for s in shapes
    )

    def net(x):
        h = jax.nn.relu(conv(x, k1, 2) + 0.1)
        h = conv(h, k2, 1)
        h = h + jax.nn.relu(h - 0.1) if skip else jax.nn.relu(h - 0.1)
        return jax.nn.relu(h.ravel() @ w1) @ w2

    return lb.trace(net, jax.ShapeDtypeStruct((8, 8, 2), jnp.float32))


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(engines, "_READY", weakref.WeakKeyDictionary())


def bounds(form, x, eps, norm=2):
    """(value, pairs) by ellipsoids of the whole network."""
    around = engines.Around(form, norm, x, way="ellipsoids")
    return around, around.outputs(slice(None), np.full(len(x), eps), labels=np.zeros(len(x), int))[:, 0]


# --- proofs in exact arithmetic ------------------------------------------------------------------------------------


def exact(a):
    return mpmath.matrix(np.asarray(a, np.float64).tolist())


def least_eigenvalue(gap):
    return min(mpmath.eigsy((gap + gap.T) / 2, eigvals_only=True))


def schur_case(seed):
    """M >= 0.3 I of any scaling, C, and others within the errors stated."""
    rng = np.random.default_rng(seed)
    n, k = 9, 5
    root = rng.standard_normal((n, n)) / np.sqrt(n) * 10.0 ** rng.uniform(-4, 0, n)[:, None]
    m = np.eye(n) - 0.6 * root @ root.T / np.linalg.norm(root @ root.T, 2)
    m = np.tril(m) + np.tril(m, -1).T
    c = rng.standard_normal((n, k)) * 10.0 ** rng.uniform(-5, 2, k)
    return m, c


def gap_of(m, c, floor=0.35, wrong_m=0.0, wrong_c=0.0, seed=0):
    """(least eigenvalue of Z + e I - C' M^-1 C, e): M and C at the worst of some places within the errors."""
    rng = np.random.default_rng(seed)
    z, e = schur.schur_complement(m.copy(), c.copy(), floor=floor, wrong_m=wrong_m, wrong_c=wrong_c)
    found = []
    with mpmath.workdps(60):
        for _ in range(4):
            one, other = rng.standard_normal(m.shape), rng.standard_normal(c.shape)
            one = (one + one.T) / np.linalg.norm(one + one.T, 2) * wrong_m * 0.999
            other *= wrong_c / np.linalg.norm(other) * 0.999
            moved, columns = exact(m) + exact(one), exact(c) + exact(other)
            gap = exact(z) + mpmath.eye(len(z)) * e - columns.T * mpmath.inverse(moved) * columns
            found.append(least_eigenvalue(gap))
    return min(found), e, float(np.trace(z))


@pytest.mark.parametrize("wrong", [0.0, 1e-7])
@pytest.mark.parametrize("rows", [256, 4])
def test_a_schur_complement_is_an_upper_bound_in_exact_arithmetic(wrong, rows, monkeypatch):
    monkeypatch.setattr(schur, "_ROWS", rows)
    monkeypatch.setattr(schur, "_SQUARE", 2 * rows)
    for seed in range(6):
        m, c = schur_case(seed)
        least, e, trace = gap_of(m, c, wrong_m=wrong, wrong_c=wrong)
        assert least >= 0
        assert e < 1e-10 * trace + 1e3 * wrong * np.linalg.norm(c)


def test_without_its_rounding_terms_a_schur_complement_is_wrong(monkeypatch):
    monkeypatch.setattr(schur, "gamma", lambda n: 0.0)
    monkeypatch.setattr(schur, "U", 0.0)
    monkeypatch.setattr(schur, "TINY", 0.0)
    assert min(gap_of(*schur_case(seed))[0] for seed in range(6)) < 0


def test_errors_that_are_not_passed_on_are_seen():
    m, c = schur_case(1)
    z, e = schur.schur_complement(m.copy(), c.copy(), floor=0.35, wrong_m=0.0, wrong_c=0.0)
    with mpmath.workdps(60):
        for moved, columns in (
            (exact(m) - mpmath.eye(9) * 1e-9, exact(c)),
            (exact(m), exact(c * (1 + 1e-9))),
        ):
            gap = exact(z) + mpmath.eye(5) * e - columns.T * mpmath.inverse(moved) * columns
            assert least_eigenvalue(gap) < 0


def test_a_floor_is_proved_up_to_rounding_and_not_beyond():
    rng = np.random.default_rng(3)
    turn = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    m = turn @ np.diag(np.linspace(0.4, 1, 30)) @ turn.T
    m = np.tril(m) + np.tril(m, -1).T
    assert schur.proves_floor(m, 0.4 - 1e-10) and not schur.proves_floor(m, 0.4 + 1e-12)
    for bad in (np.nan, np.inf, -1.0):
        broken = m.copy()
        broken[3, 3] = bad
        assert not schur.proves_floor(broken, 0.1)
    assert schur.schur_complement(m.copy(), m.copy(), floor=0.4, wrong_m=0.2, wrong_c=0.0) is None
    assert schur.schur_complement(-m, m.copy(), floor=0.4, wrong_m=0.0, wrong_c=0.0) is None


def stage(rng, n, d, of, error):
    """A stage y = s, s+ = [H s +] G v, H s the entries `of` of s, with a G known within an error, and the real G."""
    g = rng.standard_normal((d, n)) * 10.0 ** rng.uniform(-2, 0, d)[:, None]
    off = rng.standard_normal((d, n))
    off *= 0.999 * error / np.linalg.norm(off)
    with mpmath.workdps(60):
        real = exact(g) + exact(off)
    to = d - 1 - np.arange(len(of))
    known, own = maps.Matrix(None, 0.0, 1.0, 1), maps.matrix(Enclosure(g, error))
    return Stage(0, n, known, own, np.array(of, int), to, np.ones(n)), real


def slopes(rng, n):
    c, r = rng.uniform(-1, 1, n), rng.uniform(0, 0.5, n)
    c[0], r[0], r[1] = 0.0, 0.0, 0.0  # dead, and linear
    return c, r


def unknown(n):
    return np.full((1, n), np.nan)


def capture(monkeypatch, name):
    """The scales D^-1/2 that were chosen."""
    found, real = [], getattr(multipliers, name)

    def look(*args):
        out = real(*args)
        found.append(out[0])
        return out

    monkeypatch.setattr(multipliers, name, look)
    return found


@pytest.mark.parametrize(
    ("d", "of"), [(4, []), (4, [7, 8, 9, 10]), (4, [5, 7, 5]), (12, []), (12, [1, 5, 5, 7])]
)
@pytest.mark.parametrize("error", [0.0, 1e-6])
def test_a_step_is_an_upper_bound_in_exact_arithmetic(d, of, error, monkeypatch):
    """S+ >= P Q P' + P Q[:, A] (D - Q[A, A])^-1 Q[A, :] P' + G r D r G', P = [G c, 0] + H; d large: Q is smaller."""
    scales = capture(monkeypatch, "feasible")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        n = 7
        one, real = stage(rng, n, d, of, error)
        m = one.rows
        root = rng.standard_normal((m, m)) * 10.0 ** rng.uniform(-3, 1, m)[:, None]
        q = root @ root.T
        q = (q + q.T) / 2
        (c, r), at = slopes(rng, n), np.arange(2, n)
        aim = rng.standard_normal((1, 2, n)), rng.standard_normal((1, 2, d)) if of else None
        s = ellipsoids._through(one, q[None].copy(), c[None], r[None], aim, unknown(n))[0][0]
        with mpmath.workdps(60):
            gc = real * mpmath.diag(c.tolist())
            p = mpmath.matrix(d, m)
            p[:, :n] = gc
            for i, j in zip(one.to.tolist(), of, strict=True):
                p[i, j] += 1
            D = [1 / mpmath.mpf(float(x)) ** 2 for x in scales[-1]]
            inner = mpmath.diag(D) - exact(q[np.ix_(at, at)])
            columns = exact(q[at]) * p.T
            grd = real[:, 2:] * mpmath.diag([D[j] * mpmath.mpf(float(r[i])) ** 2 for j, i in enumerate(at)])
            whole = p * exact(q) * p.T + columns.T * mpmath.inverse(inner) * columns + grd * real[:, 2:].T
            least = least_eigenvalue(exact(s) - whole)
            assert least >= 0
            assert mpmath.norm(exact(s) - whole) < (1e-8 + 300 * error) * mpmath.norm(whole)


@pytest.mark.parametrize("errors", [(0.0, 0.0), (1e-7, 1e-7)])
def test_a_step_from_a_factor_is_an_upper_bound_in_exact_arithmetic(errors, monkeypatch):
    scales = capture(monkeypatch, "feasible_thin")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        n, k, d = 9, 3, 4
        one, real = stage(rng, n, d, [], errors[0])
        b = rng.standard_normal((n, k)) * 10.0 ** rng.uniform(-1, 1, n)[:, None]
        off = rng.standard_normal((n, k))
        off *= 0.999 * errors[1] / np.linalg.norm(off)
        c, r = slopes(rng, n)
        at = np.arange(2, n)
        aim = rng.standard_normal((1, 2, n)), None
        thin = ellipsoids.Thin(b, 0.0, errors[1])
        s = ellipsoids._through_thin(one, thin, c[None], r[None], aim, unknown(n))[0][0]
        with mpmath.workdps(60):
            known = exact(b) + exact(off)
            q = known * known.T
            gc = real * mpmath.diag(c.tolist())
            D = [1 / mpmath.mpf(float(x)) ** 2 for x in scales[-1]]
            part = known[2:, :]
            inner = mpmath.diag(D) - part * part.T
            columns = part * known.T * gc.T
            grd = real[:, 2:] * mpmath.diag([D[j] * mpmath.mpf(float(r[i])) ** 2 for j, i in enumerate(at)])
            whole = gc * q * gc.T + columns.T * mpmath.inverse(inner) * columns + grd * real[:, 2:].T
            assert least_eigenvalue(exact(s) - whole) >= 0
            assert mpmath.norm(exact(s) - whole) < (1e-8 + 1e3 * sum(errors)) * mpmath.norm(whole)


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("part", ["all", "centre", "radius"])
@pytest.mark.parametrize("wrong", ["map", "factor"])
def test_no_error_of_a_single_neuron_can_be_left_out(thin, part, wrong, monkeypatch):
    """With one neuron the errors of G and of B are as bad as their bounds allow."""
    scales = capture(monkeypatch, "feasible_thin" if thin else "feasible")
    error, g, b = 1e-4, 0.7, 1.3
    of_g, of_b = (error, 0.0) if wrong == "map" else (0.0, error)
    if of_b and not thin:
        return
    c, r = {"all": (0.4, 0.3), "centre": (0.4, 1e-9), "radius": (0.0, 0.3)}[part]
    one, _ = stage(np.random.default_rng(0), 1, 1, [], 0.0)
    one = dataclasses.replace(one, G=maps.matrix(Enclosure(np.array([[g]]), of_g)))
    c, r, aim = np.array([[c]]), np.array([[r]]), (np.ones((1, 1, 1)), None)
    if thin:
        s = ellipsoids._through_thin(one, ellipsoids.Thin(np.array([[b]]), 0.0, of_b), c, r, aim, unknown(1))[
            0
        ]
    else:
        s = ellipsoids._through(one, np.array([[[b * b]]]), c, r, aim, unknown(1))[0]
    with mpmath.workdps(60):
        g, q = mpmath.mpf(g) + of_g, (mpmath.mpf(b) + of_b) ** 2 if thin else mpmath.mpf(b * b)
        c, r, D = mpmath.mpf(c[0, 0]), mpmath.mpf(r[0, 0]), 1 / mpmath.mpf(float(scales[-1][0])) ** 2
        want = (g * c) ** 2 * (q + q * q / (D - q)) + (g * r) ** 2 * D
        assert want <= float(s[0, 0, 0]) <= want * (1 + 30 * error)


def test_the_matrix_of_a_factor_covers_the_error_of_the_factor():
    thin = ellipsoids.Thin(np.array([[1.3]]), 0.0, 1e-4)
    scale, m, wrong = multipliers.feasible_thin(thin.b, np.array([5.0]), 1.3, thin.relerr, thin.error)
    with mpmath.workdps(60):
        real = 1 - (mpmath.mpf(1.3) + mpmath.mpf(1e-4)) ** 2 * mpmath.mpf(float(scale[0])) ** 2
        assert float(m[0, 0]) - wrong <= real and multipliers.ROOM <= real
    assert wrong < 1e-4


# --- maps on columns -----------------------------------------------------------------------------------------------


def layers():
    rng = np.random.default_rng(5)
    kernel = rng.standard_normal((3, 3, 4, 8))
    pool = sp.csr_array(np.kron(np.eye(20), np.full((1, 4), 0.25)))
    host = lb.trace(
        lambda x: conv(x, jnp.asarray(kernel, jnp.float32), 2).ravel(), jnp.zeros((8, 8, 4), jnp.float32)
    )
    steps = recursion.host_form(host)
    places = [i for i, op in enumerate(host.program.steps) if op.kind == "conv"]
    return {
        "conv": sp.csr_array(steps.step(places[0])[0].matrix),
        "pool": pool,
        "random": sp.random_array((30, 40), density=0.1, rng=1, format="csr"),
        "dense": rng.standard_normal((13, 40)),
        "selection": sp.csr_array(np.eye(40)[rng.permutation(40)]),
    }


@pytest.mark.parametrize("name", ["conv", "pool", "random", "dense", "selection"])
def test_products_with_columns(name, monkeypatch):
    """All products equal those with the dense matrix, within the stated errors of the exact ones."""
    monkeypatch.setattr(maps, "_DENSE", 0)
    array = layers()[name]
    m = maps.matrix(Enclosure(array))
    assert sp.issparse(m.array) == (name != "dense") and (name != "conv" or m._blocks is not None)
    whole = array.toarray() if sp.issparse(array) else array
    rng = np.random.default_rng(6)
    n, exactly = whole.shape[1], whole.astype(np.longdouble)
    x = rng.standard_normal((2, n, 9))
    off = np.linalg.norm((m.ahead(x) - exactly @ x).reshape(2, -1).astype(float), axis=1)
    assert (off <= m.wrong * maps.frobenius(x)).all() and m.wrong < 1e-12
    s = x @ x.transpose(0, 2, 1)
    s = (s + s.transpose(0, 2, 1)) / 2
    for got, want in ((m.both(s), exactly @ s @ exactly.T), (m.of_diagonal(s[0, 0] ** 2), None)):
        if want is None:
            want = (exactly * s[0, 0] ** 2 @ exactly.T)[None]
        off = np.linalg.norm((got[0] - want).reshape(len(want), -1).astype(float), axis=1)
        assert (off <= got[1]).all() and (got[1] < 1e-10 * (1 + maps.frobenius(s)[: len(want)])).all()
        np.testing.assert_array_equal(got[0], got[0].transpose(0, 2, 1))
    a = rng.standard_normal((2, 3, len(whole)))
    np.testing.assert_allclose(m.behind(a), a @ whole, atol=1e-12)
    base = rng.standard_normal((2, *whole.shape))
    d = rng.standard_normal((2, n))
    grown = base.copy()
    size = m.add_scaled(grown, d)
    np.testing.assert_allclose(grown, base + whole * d[:, None], atol=1e-12)
    np.testing.assert_allclose(size, np.linalg.norm((whole * d[:, None]).reshape(2, -1), axis=1))


def test_the_identity_is_known_however_it_is_stored(monkeypatch):
    for least in (2**20, 0):
        monkeypatch.setattr(maps, "_DENSE", least)
        for one in (np.eye(5), sp.eye_array(5, format="csr")):
            assert maps.matrix(Enclosure(one)).array is None
        assert maps.matrix(Enclosure(sp.csr_array(np.eye(5)[[1, 0, 2, 3, 4]]))).array is not None


def test_symmetrise_in_tiles(monkeypatch):
    monkeypatch.setattr(maps, "_TILE", 3)
    s = np.random.default_rng(0).standard_normal((2, 8, 8))
    want = (s + s.transpose(0, 2, 1)) / 2
    maps.symmetrise(s)
    np.testing.assert_array_equal(s, want)


# --- whole networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [2, pytest.param(np.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("skip", [False, True])
def test_columns_and_dense_matrices_give_the_same(norm, skip, fresh, monkeypatch):
    form = conv_net(skip)
    x = np.random.default_rng(1).standard_normal((3, 8, 8, 2)).astype(np.float32)
    around, want = bounds(form, x, 0.1, norm)
    assert not any(sp.issparse(s.G.array) or sp.issparse(s.T.array) for s in around.ready.stages)
    engines._READY.clear()
    monkeypatch.setattr(maps, "_DENSE", 0)
    monkeypatch.setattr(maps, "_SPARE", 1.0)
    monkeypatch.setattr(schur, "_ROWS", 16)
    monkeypatch.setattr(schur, "_SQUARE", 24)
    around, got = bounds(form, x, 0.1, norm)
    assert any(sp.issparse(s.G.array) for s in around.ready.stages)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12 * want.max())


@pytest.mark.parametrize("norm", [2, np.inf])
def test_few_inputs_as_a_factor_or_as_a_matrix(norm, fresh, monkeypatch):
    form = mlp(widths=(6, 40, 20, 4))
    x = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    around, got = bounds(form, x, 0.2, norm)
    assert isinstance(around.ready.start, ellipsoids.Thin)
    engines._READY.clear()
    monkeypatch.setattr(engines, "_thin", lambda *_: None)
    around, want = bounds(form, x, 0.2, norm)
    assert isinstance(around.ready.start, np.ndarray)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * want.max())


def test_a_stage_that_is_not_exactly_its_factor_is_a_matrix(fresh, monkeypatch):
    seen, thin = [], engines._thin
    monkeypatch.setattr(engines, "_thin", lambda *given: seen.append(given) or thin(*given))
    bounds(mlp(widths=(6, 40, 20, 4)), np.ones((1, 6), np.float32), 0.2, 2)
    ((begin, stage, ball),) = seen
    assert stage.gap == 0 and isinstance(thin(begin, stage, ball), ellipsoids.Thin)
    assert thin(begin, dataclasses.replace(stage, gap=1e-12), ball) is None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", [2, np.inf])
@pytest.mark.parametrize("skip", [False, True])
def test_slopes_in_the_ball_stay_below_ellipsoids_of_a_wide_network(norm, skip, fresh, monkeypatch):
    monkeypatch.setattr(engines, "TAIL", 20)
    monkeypatch.setattr(maps, "_DENSE", 0)
    monkeypatch.setattr(maps, "_SPARE", 1.0)
    form = conv_net(skip)
    assert engines.ways(form, norm, "verified")[-1] == "ellipsoids"
    x = np.random.default_rng(4).standard_normal((3, 8, 8, 2)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    bound = lb.liplt(form, norm=norm, pairwise=True)
    near = lb.local(form, x, 0.2, norm=norm, pairwise=True, bound=bound, guarantee="verified")
    whole, pairs = largest_slopes(form, x, 0.2, norm, np.random.default_rng(1))
    assert (whole <= near.value).all() and (pairs <= near.pairwise + 1e-12).all()
    assert (near.value < 0.9 * bound.value).all() and near.guarantee == "verified"
    radii = lb.certified_radius(form, x, y, bound=bound, local=True, guarantee="verified").radius
    step = in_ball(x, 1.0, norm, 200, np.random.default_rng(2)) - x
    moved = x + step * radii.reshape(-1, 1, 1, 1) * (1 - 1e-9)
    assert (values(form, moved.reshape(-1, 8, 8, 2)).argmax(axis=1).reshape(200, -1) == y).all()


@pytest.mark.parametrize(("widths", "within"), [((6, 12, 10, 1), 1.06), ((3, 20, 1), 1.002)])
def test_multipliers_converge_to_those_of_lipsdp(widths, within, fresh, monkeypatch):
    """In a huge ball every slope of a relu is possible, and the best multipliers give the optimum of LipSDP."""
    monkeypatch.setattr(engines, "TAIL", 0)
    monkeypatch.setattr(multipliers, "_SPARE", 1e-8)
    form = mlp(widths=widths, seed=3)
    x = np.zeros((1, widths[0]), np.float32)
    around = engines.Around(form, 2, x, way="ellipsoids")
    found = [around.outputs(slice(None), np.full(1, 1e9))[0, 0, 0, 0] ** 0.5 for _ in range(15)]
    best = lb.lipsdp(form).value
    assert found[0] > 1.02 * best  # a guess and a few steps
    assert best * (1 - 1e-5) < min(found) < within * best
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(found))


def test_the_memory_decides(fresh, monkeypatch):
    monkeypatch.setattr(engines, "TAIL", 20)
    form = conv_net()
    need, work = of_ellipsoids(form)
    assert 8 * 128 * 128 < need < 8 * 6 * 128 * 128 and work > 128**3 / 2
    assert engines.ways(form, 2, "auto") == ("hybrid", "ellipsoids", "LipLT")
    assert engines.ways(form, 2, "auto", need) == ("hybrid", "ellipsoids", "LipLT")
    assert engines.ways(form, 2, "verified", need - 1) == ("hybrid",)
    monkeypatch.setattr(engines, "_WORK", work / 2)
    assert engines.ways(form, 2, "auto") == ("hybrid", "LipLT")
    assert engines.ways(form, 2, "auto", need) == ("hybrid", "ellipsoids", "LipLT")
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 2)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    small = lb.certified_radius(form, x, y, local=lb.Local(memory="100kB"), guarantee="verified")
    large = lb.certified_radius(form, x, y, local=lb.Local(memory="10MB"), guarantee="verified")
    assert any(
        "ellipsoids of this network take about" in note and "memory=100 kB" in note for note in small.notes
    )
    assert not any("take about" in note for note in large.notes)
    assert (large.radius > small.radius).all()
    assert engines.ways(form, np.inf, "auto") == ("hybrid", "LipLT")
    assert engines.ways(form, np.inf, "auto", need) == ("ellipsoids",)
    found = lb.local(form, x, 0.1, norm=np.inf, memory=100_000)
    assert any("more than memory=100 kB" in note for note in found.notes)
    for bad in ("much", 0, True):
        with pytest.raises(ValueError, match="memory must be"):
            lb.Local(memory=bad)


def test_as_many_examples_at_once_as_the_memory_holds(fresh, monkeypatch):
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 8)
    form = conv_net()
    x = np.zeros((9, 8, 8, 2), np.float32)
    need = of_ellipsoids(form)[0]
    for memory, workers in ((3 * need, 3), (need // 2, 1), (100 * need, 8)):
        assert engines.Around(form, 2, x, way="ellipsoids", memory=memory).workers() == workers


def test_workers_end_when_the_call_is_interrupted(fresh, monkeypatch):
    """Long work in the other threads stops at its next look at the call that asked for it."""
    form = conv_net()
    x = np.zeros((4, 8, 8, 2), np.float32)
    around = engines.Around(form, 2, x, way="ellipsoids", memory=2**30)
    monkeypatch.setattr(engines, "_CHUNK", 1)
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 2)
    begun, ended = threading.Event(), []

    def work(part, rows):
        if rows.start == 0:
            assert begun.wait(20)
            raise KeyboardInterrupt
        begun.set()
        try:
            for _ in range(4000):
                progress.alive()
                threading.Event().wait(0.005)
        except progress.Stopped:
            ended.append(rows.start)
            raise

    with pytest.raises(KeyboardInterrupt):
        around.each(work, "local radii")
    assert 1 in ended and 3 not in ended
    progress.alive()  # nothing is left of it
