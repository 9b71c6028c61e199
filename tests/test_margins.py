"""Margins on balls: exact where the answer is known, never above an attained margin, at least the local ellipsoids."""

import itertools
from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import mlp, values
from zoo import NETS

import lipbounds as lb
from lipbounds._margins import margins as verb
from lipbounds._margins import proof, search
from lipbounds._margins.found import Found

NAMES = (
    "leaky_relu preactivation_resnet relu maxmin_mlp linear cnn_batch_norm postactivation_resnet nnx_scan "
    "transposed_convolution prelu "
    "absolute reduce_max_head group_sort max_pool_overlapping order_statistics householder dense_net "
    "shared_block scan_stacked nan_guard masked normalised_input half_precision running_extremes "
    "grouped_convolution"
).split()


def gaps(z, y):
    """z_y - z_i, inf for the own class."""
    if z.shape[1] == 1:
        return np.where(y == 1, z[:, 0], -z[:, 0])[:, None]
    out = z[np.arange(len(y)), y][:, None] - z
    out[np.arange(len(y)), y] = np.inf
    return out


@jax.jit
def margin_and_gradient(form, points, labels, others):
    """Of the margin z_label - z_other, of one output z or -z, at every point."""

    def margin(p, label, other):
        z = form.evaluate(p, jnp.float64)
        return z[label] - z[other] if form.num_outputs > 1 else z[0] * jnp.where(label == 1, 1.0, -1.0)

    return jax.vmap(jax.value_and_grad(margin))(points, labels, others)


def attained(form, x, y, eps, norm, box=None, steps=40, count=24, seed=0):
    """(N, K) the smallest margin found by projected descent from several starts, in float64."""
    rng = np.random.default_rng(seed)
    n, k = len(x), form.num_outputs
    low, high = (-np.inf, np.inf) if box is None else box

    def project(p):
        p = np.clip(p, low, high)
        u = p - x[None, :, None]
        if norm == 2:
            flat = u.reshape(*u.shape[:3], -1)
            u = (
                flat * np.minimum(1, eps / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-30))
            ).reshape(u.shape)
        else:
            u = np.clip(u, -eps, eps)
        return x[None, :, None] + u  # between x and p, so in the box, too

    with jax.enable_x64(True):
        label = np.broadcast_to(y[None, :, None], (count, n, k)).reshape(-1)
        other = np.broadcast_to(np.arange(k), (count, n, k)).reshape(-1)
        p = project(x[None, :, None] + eps * rng.standard_normal((count, n, k, *x.shape[1:])))
        best = np.full((n, k), np.inf)
        for step in range(steps):
            m, g = margin_and_gradient(form, jnp.asarray(p.reshape(-1, *x.shape[1:])), label, other)
            best = np.minimum(best, np.asarray(m).reshape(count, n, k).min(axis=0))
            g = np.asarray(g).reshape(p.shape)
            flat = g.reshape(*g.shape[:3], -1)
            size = np.linalg.norm(flat, axis=-1, keepdims=True) if norm == 2 else 1.0
            move = flat / np.maximum(size, 1e-30) if norm == 2 else np.sign(flat)
            p = project(p - eps * 0.3 * 0.92**step * move.reshape(g.shape))
    if k > 1:
        best[np.arange(n), y] = np.inf
    return best


def certified(form, x, y, eps, seconds_per_image=0.0, **options):
    """(N,) whether `decide` has a proof for the ball."""
    problem = verb.prepare(form, x, y, eps, **options)
    return np.isin(verb.decide(problem, seconds_per_image=seconds_per_image), verb.PROOFS)


# --- known answers -------------------------------------------------------------------------------------------------


def test_a_linear_network_is_exact():
    form = lb.from_weights([[[1.0, 2.0], [0.5, -1.0]]])
    row, x = np.array([0.5, 3.0]), np.array([[1.0, 0.5]])
    centre = row @ x[0]
    for norm, dual in ((2, np.linalg.norm(row)), (np.inf, np.abs(row).sum())):
        found = lb.margins(form, x, [0], 0.1, norm=norm)
        assert found.value[0, 0] == np.inf
        assert centre - 0.1 * dual - 1e-9 < found.value[0, 1] <= centre - 0.1 * dual
        assert found.certified.tolist() == [True] and found.guarantee == "verified"
    inside = lb.margins(form, x, [0], 0.1, box=(0.5, 1.0))  # the second entry cannot fall
    assert 1.95 - 1e-6 < inside.value[0, 1] <= 1.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_one_hidden_layer_on_a_line_against_rationals(seed):
    """One input: the margin is piecewise linear, and its least value lies at a kink or an end, in rationals."""
    rng = np.random.default_rng(seed)
    w, b = rng.integers(-8, 9, (5, 1)) / 8, rng.integers(-8, 9, 5) / 8
    v = rng.integers(-8, 9, (2, 5)) / 8
    form = lb.from_weights([w, v], biases=[b, np.zeros(2)], activation="relu")
    x, eps = np.array([[0.25]]), 0.75

    def margin(t):
        hidden = [
            max(Fraction(float(a)) * t + Fraction(float(c)), Fraction(0))
            for a, c in zip(w[:, 0], b, strict=True)
        ]
        return sum((Fraction(float(q)) * h for q, h in zip(v[0] - v[1], hidden, strict=True)), Fraction(0))

    ends = Fraction(x[0, 0]) - Fraction(eps), Fraction(x[0, 0]) + Fraction(eps)
    kinks = [-Fraction(float(c)) / Fraction(float(a)) for a, c in zip(w[:, 0], b, strict=True) if a]
    exact = min(margin(t) for t in (*ends, *(t for t in kinks if ends[0] <= t <= ends[1])))
    for norm in (2, np.inf):
        found = lb.margins(form, x, [0], eps, norm=norm).value[0, 1]
        assert Fraction(float(found)) <= exact
        local = verb.prepare(form, x, [0], eps, norm=norm, box=None).balls.local[0, 1]
        assert float(exact) - found < 0.5 * (float(exact) - local) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("norm", [2, np.inf])
def test_one_relu_is_exact(norm):
    """min of c'u + g relu(a'u + b) over a ball, by a fine sweep of the plane that a and c span."""
    x, eps = np.array([[0.1, -0.2]]), 0.5
    turn = np.linspace(0, 2 * np.pi, 4001)
    edge = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    edge = edge / (1 if norm == 2 else np.abs(edge).max(axis=1, keepdims=True))
    points = x + eps * (np.linspace(0, 1, 201)[:, None, None] * edge).reshape(-1, 2)
    for a, b, g, c in (([1.0, 1.0], 0.2, -2.0, [0.5, 0.0]), ([1.0, -0.5], 0.1, 3.0, [-2.0, 0.25])):
        # the linear part through a second and a third relu that are always on
        weights = [np.array([a, [1.0, 0.0], [0.0, 1.0]]), np.array([[g, *c], [0.0, 0.0, 0.0]])]
        form = lb.from_weights(weights, biases=[np.array([b, 4.0, 4.0]), np.zeros(2)], activation="relu")
        z = values(form, points)
        least = (z[:, 0] - z[:, 1]).min()
        found = lb.margins(form, x, [0], eps, norm=norm).value[0, 1]
        assert found <= least and least - found < 2e-3 * eps


@pytest.mark.slow
def test_small_balls_give_the_margin_itself_and_larger_balls_less():
    form = mlp((6, 12, 10, 3))
    x = np.random.default_rng(1).random((3, 6))
    z = values(form, x)
    y = z.argmax(axis=1)
    past = gaps(z, y)
    for eps in (1e-9, 0.05, 0.2, 0.5):
        found = lb.margins(form, x, y, eps).value
        others = np.isfinite(past)
        assert (found[others] <= past[others] + 2e-2 * eps).all()
        if eps == 1e-9:
            np.testing.assert_allclose(found[others], past[others], atol=1e-6)
        past = found


@pytest.mark.slow
def test_a_box_helps():
    form = mlp((6, 12, 10, 3))
    x = np.random.default_rng(1).random((3, 6)).round(1)
    y = values(form, x).argmax(axis=1)
    free, inside = (lb.margins(form, x, y, 0.5, box=box) for box in (None, (0.0, 1.0)))
    assert (inside.least > free.least - 0.01).all() and (inside.least > free.least + 0.01).any()
    assert any("box" in note for note in inside.notes)


# --- soundness -----------------------------------------------------------------------------------------------------


# networks of one shape, which are compiled once
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "abs"])
def test_never_above_an_attained_margin_and_at_least_the_ellipsoids(activation):
    phi = {"relu": "relu", "leaky_relu": lambda t: jax.nn.leaky_relu(t, 0.25), "abs": jnp.abs}[activation]
    check(mlp((6, 12, 10, 3), activation=phi))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_zoo(name):
    fn, x = NETS[name].make(0)
    check(lb.trace(fn, x, batched=NETS[name].batched))


def check(form):
    """Bounds lie below every attained margin, and are clearly better than those of the ellipsoids."""
    rng = np.random.default_rng(5)
    points = 0.5 + 0.5 * rng.standard_normal((2, *form.in_shape))
    y = values(form, points).argmax(axis=1)
    y[1] = (y[1] + 1) % form.num_outputs  # margins of a wrong label are bounded, too
    for norm, eps in ((2, 0.5), (np.inf, 0.1)):
        problem = verb.prepare(form, points, y, eps, norm=norm, box=None)
        found = lb.margins(form, points, y, eps, norm=norm, iterations=100)
        worst = attained(form, points, y, eps, norm)
        others = np.isfinite(worst)
        assert np.isfinite(found.value[others]).all()
        assert (found.value[others] <= worst[others] + 1e-12 * np.abs(worst[others])).all()
        assert (found.value >= problem.balls.local).all()
        room = worst[others] - problem.balls.local[others]
        assert (worst[others] - found.value[others]).sum() < 0.9 * room.sum() + 0.01 * eps


def test_certify_at_is_what_margins_certify():
    form = mlp((6, 12, 10, 3), seed=3)
    x = np.random.default_rng(2).random((12, 6))
    y = values(form, x).argmax(axis=1)
    y[0] = (y[0] + 1) % 3
    kinds = []
    for eps in (0.15, 0.3):
        found = lb.margins(form, x, y, eps, box=(0.0, 1.0))
        ellipsoids = (verb.prepare(form, x, y, eps, norm=2, box=(0.0, 1.0)).balls.local > 0).all(axis=1)
        sure = certified(form, x, y, eps, box=(0.0, 1.0))
        assert not sure[0]
        assert (sure | ~ellipsoids).all() and (sure == found.certified).mean() > 0.9
        worst = attained(form, x, y, eps, 2, (0.0, 1.0))
        assert (worst[sure] > 0).all()
        kinds.append((sure.mean(), ellipsoids.mean()))
    assert any(sure > ellipsoids for sure, ellipsoids in kinds)  # the dual certifies more


# --- the proof alone -----------------------------------------------------------------------------------------------


def one_problem(seed=0, widths=(6, 12, 10, 3), eps=0.3):
    form = mlp(widths, seed=seed)
    x = np.random.default_rng(seed).random((1, widths[0]))
    y = values(form, x).argmax(axis=1)
    problem = verb.prepare(form, x, y, eps, norm=2, box=(0.0, 1.0))
    gain = problem.gain(0)
    return form, x, y, problem, gain, problem.facts(0, gain)


def exact_lagrangian(gain, facts, aim, m, z):
    """L(z) in rationals, for the midpoints of the gain and exact p and q."""
    F = [[Fraction(float(a)) for a in row] for row in gain.G]
    d = gain.inputs
    z = [Fraction(float(a)) for a in z]
    u, w = z[:d], z[d:]

    def f(a, i):
        return Fraction(float(a[i]))

    row = [
        sum(Fraction(float(a)) * Fraction(float(o)) for a, o in zip(aim, column, strict=True))
        for column in gain.O.T
    ]
    total = sum(a * b for a, b in zip(row, z, strict=True))
    total += Fraction(float(m.ball)) * (sum(a * a for a in u) - Fraction(facts.eps) ** 2)
    total += sum(f(m.box, i) * (a - f(facts.low, i)) * (a - f(facts.high, i)) for i, a in enumerate(u))
    for i, a in enumerate(w):
        v = a + f(facts.p, i)
        r = a - sum(g * b for g, b in zip(F[i], z, strict=True)) + f(facts.q, i)
        parts = v * v, v * r, r * r, v, r, Fraction(1)
        for own, form in zip(m.forms[:, i], facts.forms[..., i], strict=True):
            total += Fraction(float(own)) * sum(
                Fraction(float(c)) * t for c, t in zip(form, parts, strict=True)
            )
    return total


def times(m, k, factor, shift=0.0):
    """Multipliers with those of form k changed."""
    forms = m.forms.copy()
    forms[k] = forms[k] * factor + shift
    return replace(m, forms=forms)


def searched(problem, other):
    """(multipliers, minimum) of the search for one margin."""
    out = ended(problem, [search.Job((0, other), *problem.item(0, other), np.inf, 8)])
    return out[0][1].multipliers, out[0][1].least


def ended(problem, jobs):
    """[(job, result)] of the search, as a public call runs it: compiled once for all tests."""
    out = []
    with jax.default_matmul_precision("highest"):
        Found(problem, problem.balls.local.copy(), 1).searched(
            jobs, lambda *found: out.append(found), len(jobs)
        )
    return out


@pytest.mark.parametrize("seed", range(2))
def test_the_proof_is_the_minimum_of_the_lagrangian(seed):
    """Below it in rationals at points around the minimiser, and equal to the search's value."""
    _, _, y, problem, gain, facts = one_problem(seed)
    other = int((y[0] + 1) % 3)
    found, least = searched(problem, other)
    m = problem.weights(0, gain, found)
    aim = problem.aim(0, other)
    low = proof.prove(gain, facts, aim, m)
    assert abs(low - least) < 1e-6 * (1 + abs(least))
    R = -gain.G
    R[np.arange(len(R)), gain.inputs + np.arange(len(R))] += 1
    total = proof._total(facts.forms, m.forms)
    Q = proof._hessian(R, total, m, gain.inputs)
    z = proof._minimiser(R, Q, aim @ gain.O, facts, total, m, gain.inputs)
    rng = np.random.default_rng(0)
    for size in (0.0, 1e-9, 1e-6, 1e-3, 0.1):
        at = z + size * rng.standard_normal(len(z))
        assert Fraction(low) <= exact_lagrangian(gain, facts, aim, m, at)
    assert float(exact_lagrangian(gain, facts, aim, m, z)) - low < 1e-9


def test_the_proof_holds_for_any_point_in_place_of_the_minimiser(monkeypatch):
    _, _, y, problem, gain, facts = one_problem(0)
    other = int((y[0] + 1) % 3)
    found, _ = searched(problem, other)
    m, aim = problem.weights(0, gain, found), problem.aim(0, other)
    best = proof.prove(gain, facts, aim, m)
    usual, rng = proof._minimiser, np.random.default_rng(0)
    for size in (1e-6, 1e-2):
        monkeypatch.setattr(
            proof, "_minimiser", lambda *a, s=size: usual(*a) + s * rng.standard_normal(gain.G.shape[1])
        )
        low = proof.prove(gain, facts, aim, m)
        assert -np.inf < low < best + 1e-12
    # an indefinite Q is refused by its own proof, whatever the point
    monkeypatch.setattr(proof, "_minimiser", lambda *a: np.zeros(gain.G.shape[1]))
    assert proof.prove(gain, facts, aim, times(m, 0, 100.0)) == -np.inf


def test_no_multipliers_prove_more_than_is_true():
    """Random, scaled, negative and huge multipliers: -inf or a bound below every attained margin."""
    form, x, y, problem, gain, facts = one_problem(1)
    other = int((y[0] + 1) % 3)
    found, _ = searched(problem, other)
    good, aim = problem.weights(0, gain, found), problem.aim(0, other)
    worst = attained(form, x, y, 0.3, 2, (0.0, 1.0))[0, other] - problem.balls.gaps[0, other]
    rng, proved = np.random.default_rng(0), 0
    for trial in range(60):
        size = 10.0 ** rng.uniform(-3, 1)
        fields = {
            name: getattr(good, name) * np.exp(size * rng.standard_normal(np.shape(getattr(good, name))))
            for name in ("ball", "box", "forms")
        }
        m = proof.Weights(**{**fields, "ball": float(fields["ball"])})
        if trial % 3 == 1:
            m = times(m, 0, rng.choice([-1.0, 1.0], m.forms[0].shape))
        low = proof.prove(gain, facts, aim, m)
        proved += low > -np.inf
        assert low <= worst
    assert proved > 10
    for bad in (-1e-3 - good.box, np.where(np.arange(len(good.box)) == 0, np.nan, good.box)):
        assert proof.prove(gain, facts, aim, replace(good, box=bad)) == -np.inf
    for k in range(len(good.forms)):
        assert proof.prove(gain, facts, aim, times(good, k, -1.0, -1e-3)) == -np.inf
        assert proof.prove(gain, facts, aim, times(good, k, np.nan)) == -np.inf
    for bad in (np.nan, -np.inf):  # of a form without a multiplier, too
        broken = facts.forms.copy()
        broken[0, 5, 0] = bad
        assert proof.prove(gain, replace(facts, forms=broken), aim, times(good, 0, 0.0)) == -np.inf
        assert proof.prove(gain, replace(facts, forms=broken), aim, good) == -np.inf
    assert proof.prove(gain, facts, aim, replace(good, ball=-1.0)) == -np.inf
    assert proof.prove(gain, replace(facts, eps=np.inf), aim, good) == -np.inf


def test_errors_of_the_gain_and_the_centre_lower_the_bound():
    _, _, y, problem, gain, facts = one_problem(2)
    other = int((y[0] + 1) % 3)
    found, _ = searched(problem, other)
    m, aim = problem.weights(0, gain, found), problem.aim(0, other)
    best = proof.prove(gain, facts, aim, m)
    for change in ({"error": 1e-8}, {"error_out": 1e-6}):
        assert proof.prove(replace(gain, **change), facts, aim, m) < best
    assert proof.prove(gain, replace(facts, wrong=1e-6), aim, m) < best - 1e-8


def test_what_an_error_leaves_of_the_gradient_costs_little(monkeypatch):
    """Pre-activations known to 1e-5 only: the largest alpha that is proved makes its part of the bound small."""
    _, _, y, problem, gain, facts = one_problem(2)
    other = int((y[0] + 1) % 3)
    found, _ = searched(problem, other)
    m, aim = problem.weights(0, gain, found), problem.aim(0, other)
    best, rough = proof.prove(gain, facts, aim, m), replace(facts, wrong=1e-5)
    lost = best - proof.prove(gain, rough, aim, m)
    monkeypatch.setattr(proof, "_ALPHAS", proof._ALPHAS[:1])
    assert 0 < 5 * lost < best - proof.prove(gain, rough, aim, m)
    monkeypatch.setattr(proof, "_ALPHAS", (proof._ALPHAS[0], 0.9))  # not proved: the first one stands
    assert proof.prove(gain, rough, aim, m) > -np.inf


# --- refusals ------------------------------------------------------------------------------------------------------


def test_refusals():
    form = mlp((6, 12, 10, 3))
    x, y = np.full((2, 6), 0.5), [0, 1]
    with pytest.raises(ValueError, match="norm 2 and inf, not 1"):
        lb.margins(form, x, y, 0.1, norm=1)
    with pytest.raises(ValueError, match="eps must be finite numbers > 0"):
        lb.margins(form, x, y, 0.0)
    with pytest.raises(ValueError, match="outside the box"):
        lb.margins(form, x, y, 0.1, box=(0.6, 1.0))
    with pytest.raises(TypeError, match="needs a LureForm"):
        lb.margins(lambda t: t, x, y, 0.1)
    wide = lb.from_weights([np.ones((1200, 2)), np.ones((1200, 1200)), np.ones((2, 1200))])
    with pytest.raises(ValueError, match="begin with local ellipsoids, but .* more than memory=1.0 MB"):
        lb.margins(wide, x[:, :2], y, 0.1, memory="1MB")
    assert len(lb.margins(form, np.zeros((0, 6)), np.zeros(0, int), 0.1)) == 0


@pytest.mark.slow
def test_one_output_is_a_binary_classifier():
    form = mlp((5, 9, 1), seed=4)
    x = np.random.default_rng(0).random((4, 5))
    y = (values(form, x)[:, 0] > 0).astype(int)
    found = lb.margins(form, x, y, 0.2)
    worst = attained(form, x, y, 0.2, 2)
    assert found.value.shape == (4, 1) and (found.value <= worst).all()
    assert (worst - found.value < 0.3 * (gaps(values(form, x), y) - worst) + 1e-3).all()


def test_parts_of_margins_are_consistent():
    form = mlp((6, 12, 10, 3))
    found = lb.margins(form, np.full((2, 6), 0.5), [0, 1], [0.1, 0.2])
    assert found.eps.tolist() == [0.1, 0.2] and found.least.shape == (2,)
    assert (found.certified == (found.value > 0).all(axis=1)).all()
    assert "l2 balls, verified" in repr(found)
    assert [k for k in itertools.product(range(2), range(3)) if np.isinf(found.value[k])] == [(0, 0), (1, 1)]


@pytest.mark.parametrize(("norm", "eps"), [(2, 0.1), (2, 0.5), (np.inf, 0.01), (np.inf, 0.05)])
def test_the_search_begins_near_the_bound_of_the_ellipsoids(norm, eps):
    """In units of eps L_yi, of 300 inputs: equal multipliers of the faces of an l-inf ball begin 100 units below."""
    form, rng = mlp((300, 20, 16, 4), seed=1), np.random.default_rng(0)
    x = rng.random((3, 300))
    problem = verb.prepare(form, x, values(form, x).argmax(axis=1), eps, norm=norm)
    with jax.enable_x64(True):
        items = [problem.item(row, other) for row in range(3) for other in problem.others(row)]
        lost = [float(search._loss(problem.net, *item, 0.0)[1]) for item in items]
    assert 0 < min(lost) < 1.1 and max(lost) < 5
