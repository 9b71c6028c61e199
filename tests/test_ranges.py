"""Ranges of pre-activations by lines: no point leaves them, roundings are covered, and they are narrower."""

import copy
from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from balls import in_ball, mlp, values
from test_curves import curve_of
from test_curves import ranges as intervals

from lipbounds._local.forward import logits
from lipbounds._margins import ranges
from lipbounds._margins.margins import prepare
from lipbounds._margins.proof import Gain

PHI = {"relu": "relu", "leaky_relu": lambda t: jax.nn.leaky_relu(t, 0.25), "tanh": "tanh", "gelu": "gelu"}


def problems(activation, norm, eps, seed=0, box=(0.0, 1.0), widths=(6, 14, 12, 10, 3)):
    """(form, x, problem before, problem after) with the ranges of ellipsoids, and narrowed ones."""
    form = mlp(widths, seed=seed, activation=activation)
    x = np.random.default_rng(seed).random((2, widths[0]))
    after = prepare(form, x, values(form, x).argmax(axis=1), eps, norm=norm, box=box)
    before = copy.deepcopy(after.balls)
    for row in range(len(x)):
        after.narrow(row)
    return form, x, before, after


@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize(("norm", "eps"), [(2, 0.3), (np.inf, 0.15)])
def test_pre_activations_stay_in_ranges_that_are_narrower(activation, norm, eps):
    """Points of the ball, most of them near its surface, and those that ascent of every pre-activation finds."""
    form, x, before, after = problems(PHI[activation], norm, eps)
    rng = np.random.default_rng(1)
    points = [np.clip(in_ball(x, eps, norm, 3000, rng), 0.0, 1.0)]
    for _ in range(4):  # the points that move a neuron the most, and points near them
        seen = []
        logits(form, points[-1].reshape(-1, 6), seen)
        at = np.concatenate([np.asarray(s[0]).reshape(len(points[-1]), 2, -1) for s in seen], axis=2)
        best = np.concatenate([at.argmax(axis=0), at.argmin(axis=0)], axis=1)
        top = np.take_along_axis(points[-1], best.T[:, :, None], axis=0)
        near = np.repeat(top, 12, axis=0)
        near = near + 0.3 * eps * rng.standard_normal(near.shape)
        move = near - x
        size = np.linalg.norm(move, norm, axis=2, keepdims=True)
        near = np.clip(x + move * np.minimum(1.0, eps / size), 0.0, 1.0)
        points.append(np.concatenate([top, near]))
    widths = []
    for part in points:
        seen = []
        logits(form, part.reshape(-1, 6), seen)
        for k, (y, _) in enumerate(seen):
            kinks = after.kinks[k]
            d = np.asarray(y).reshape(len(part), 2, -1) - (0.0 if kinks is None else kinks.at)
            assert (d <= after.balls.hi[k] + 1e-12).all() and (d >= after.balls.lo[k] - 1e-12).all()
    for k in range(3):
        old, new = (b.hi[k] - b.lo[k] for b in (before, after.balls))
        assert (new <= old).all()
        widths.append((old.sum(), new.sum()))
    assert widths[1][1] < 0.95 * widths[1][0] if norm == np.inf else widths[1][1] < widths[1][0]


@pytest.mark.parametrize("seed", range(3))
def test_lines_of_a_relu_hold_in_rationals(seed):
    h, lo, hi = intervals(80, np.random.default_rng(seed))
    for i, line in ((i, line) for line in ranges.of_relu(lo, h, hi) for i in range(len(h))):
        slope, shift = ([Fraction(float(v)) for v in part[:, i]] for part in line)
        centre, low, high = (Fraction(float(a[i])) for a in (h, lo, hi))
        for y in {low, high, min(max(Fraction(0), low), high), (low + high) / 2}:
            w, d = max(y, Fraction(0)) - max(centre, Fraction(0)), y - centre
            assert slope[1] * d + shift[1] <= w <= slope[0] * d + shift[0]
            assert float(slope[0] * d + shift[0] - w) <= 1.001 * float(max(high, -low))


@pytest.mark.parametrize(
    "activation", [jnp.tanh, jax.nn.silu, jax.nn.soft_sign], ids=["tanh", "silu", "soft_sign"]
)
def test_lines_of_curves_hold_after_their_range_has_shrunk(activation):
    h, lo, hi = intervals(200, np.random.default_rng(3))
    old = curve_of(activation, h, lo, hi)
    low, high = h + 0.6 * (lo - h), h + 0.7 * (hi - h)
    new, reach = curve_of(activation, h, low, high), np.maximum(high - h, h - low)
    y = low + (high - low) * np.linspace(0, 1, 101)[:, None]
    with jax.enable_x64(True):
        at, here = (np.asarray(activation(jnp.asarray(t))) for t in (y, h))
    use = (old.gain > 1e-6) & (reach > 1e-4)
    w = (at - here - old.base * (y - h)) / np.where(use, old.gain, 1.0)
    noise = 1e-14 * (1 + np.abs(h)) / np.where(use, old.gain, 1.0)
    found = ranges.of_curve(new, (low + high) / 2 - h, reach)
    first, best = (ranges.converted(one, new, old, reach) for one in found)
    for one in (first, best):
        above, below = one.slope[:, None] * (y - h) + one.shift[:, None]
        assert (w <= above + noise)[:, use].all() and (w >= below - noise)[:, use].all()
    middle = (low + high) / 2 - h
    gaps = [(one.slope * middle + one.shift)[:, use] for one in (first, best)]
    assert (gaps[1][0] <= gaps[0][0] + 1e-9).all() and (gaps[1][1] >= gaps[0][1] - 1e-9).all()


@pytest.mark.parametrize("seed", range(2))
def test_the_bound_is_just_above_that_of_rationals(seed):
    """The linear program over all u and w between the lines, solved by substitution in rationals, from the same G."""
    *_, problem = problems("tanh", np.inf, 0.2, seed=seed, widths=(5, 8, 7, 3))
    gain, rng = problem.gain(0), np.random.default_rng(seed)
    n, d = len(gain.tap), gain.inputs
    lines = ranges.Lines(rng.uniform(0, 1, (2, n)), np.sort(rng.uniform(-1, 1, (2, n)), axis=0)[::-1])
    rows = np.flatnonzero(gain.tap == gain.tap.max())
    ball = ranges.Ball(0.2, np.inf, -problem.low[0], problem.high[0])
    exact_gain = replace(gain, error=0.0)
    found = ranges.reached(exact_gain, rows, lines, 0.0, np.ones(n), ball)
    G = [[Fraction(float(a)) for a in row] for row in gain.G]
    assert gain.tap.max() == 1 and len(rows) > 2
    for place, i in enumerate(rows):
        for side, sign in enumerate((1, -1)):
            row, total = [sign * a for a in G[i]], Fraction(0)
            for j in range(n - 1, -1, -1):
                a = row[d + j]
                which = 0 if a > 0 else 1
                row = [
                    b + a * Fraction(float(lines.slope[which, j])) * c for b, c in zip(row, G[j], strict=True)
                ]
                total += a * Fraction(float(lines.shift[which, j]))
            for c in range(d):
                total += max(
                    row[c] * Fraction(float(problem.high[0][c])), row[c] * Fraction(float(problem.low[0][c]))
                )
            assert Fraction(0) <= Fraction(float(found[side, place])) - total < Fraction(1, 10**11)
    # what is not known of G and of the centre widens it
    wider = ranges.reached(replace(gain, error=1e-3), rows, lines, 0.0, np.ones(n), ball)
    assert (wider > found + 1e-3).all()
    assert (ranges.reached(exact_gain, rows, lines, 1e-3, np.ones(n), ball) > found + 1e-3).all()


def test_the_rounding_of_large_terms_that_cancel_is_covered():
    """Neurons that are nearly equal, with weights of both signs: what is left is far smaller than what is added up."""
    rng, d = np.random.default_rng(0), 4
    tap = np.repeat(np.arange(3), 4)
    n, close = len(tap), 0
    ball = ranges.Ball(0.2, np.inf, np.full(d, 0.2), np.full(d, 0.1))
    lines = ranges.Lines(np.ones((2, n)), np.zeros((2, n)))  # w = d
    for _ in range(40):
        G = np.zeros((n, d + n))
        G[:4, :d] = rng.standard_normal(d) + 1e-9 * rng.standard_normal((4, d))
        signs = np.array([1.0, -1.0, 1.0, -1.0]) * rng.uniform(1, 100, (2, 1))
        G[4:8, d : d + 4] = signs[0] + 1e-9 * rng.standard_normal((4, 4))
        G[8:, d + 4 : d + 8] = signs[1] + 1e-9 * rng.standard_normal((4, 4))
        gain = Gain(G, 0.0, np.zeros((1, d + n)), 0.0, (), tap)
        found = ranges.reached(gain, np.arange(8, 12), lines, 0.0, np.full(n, 2.0), ball)
        exact = [[Fraction(float(a)) for a in row] for row in G]
        for i in range(4, n):
            for j in range(i - 4 - i % 4, i - i % 4):
                a = exact[i][d + j]
                exact[i] = [b + a * c for b, c in zip(exact[i][:d], exact[j][:d], strict=True)] + exact[i][d:]
        for place, row in enumerate(exact[8:]):
            for side, sign in enumerate((1, -1)):
                total = sum(max(sign * a * Fraction(0.1), -sign * a * Fraction(0.2)) for a in row[:d])
                assert Fraction(float(found[side, place])) >= total
                close += float(Fraction(float(found[side, place])) - total) < 1e-8
    assert close == 40 * 8


def test_ranges_that_are_not_finite_or_do_not_fit_stay():
    form = mlp((6, 14, 12, 3))
    x = np.random.default_rng(0).random((1, 6))
    for problem in (prepare(form, x, [0], 0.2, memory=2000), prepare(form, x, [0], 1e300)):
        before = copy.deepcopy(problem.balls)
        problem.narrow(0)
        for k, (lo, h, hi) in enumerate(
            zip(problem.balls.lo, problem.balls.h, problem.balls.hi, strict=True)
        ):
            assert (lo <= h).all() and (h <= hi).all()
            assert (lo == before.lo[k]).all() or problem.eps[0] > 1
