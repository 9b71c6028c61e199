"""The dual of `lb.margins` evaluated again in rationals, from the weights alone: no code of the proof is used."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from balls import in_ball, mlp, values
from flint import fmpq
from test_margins import ended

from lipbounds._local.forward import logits
from lipbounds._margins import margins as verb
from lipbounds._margins import proof, search

WIDTHS, EPS = (6, 12, 10, 3), 0.3


def exact(a):
    """Entries of an array as rationals."""
    return [exact(row) for row in a] if np.ndim(a) else fmpq(*Fraction(float(a)).as_integer_ratio())


def times(rows, x):
    return [sum((a * b for a, b in zip(row, x, strict=True)), fmpq(0)) for row in rows]


def layers(seed):
    """(weights, biases) of `mlp(WIDTHS, seed)`, in rationals: those of tests/balls.py."""
    rng = np.random.default_rng(seed)
    sizes = list(itertools.pairwise(WIDTHS))
    w = [(1.5 * rng.standard_normal((m, n)) / np.sqrt(n)).astype(np.float32) for n, m in sizes]
    b = [0.3 * rng.standard_normal(len(a)).astype(np.float32) for a in w]
    return [exact(a) for a in w], [exact(a) for a in b]


class Quadratic:
    """z -> z' Q z + g' z + c in rationals."""

    def __init__(self, size):
        self.Q = [[fmpq(0)] * size for _ in range(size)]
        self.g, self.c = [fmpq(0)] * size, fmpq(0)

    def add(self, weight, first, second):
        """weight (a'z + s) (b'z + t) for pairs first = (a, s), second = (b, t)."""
        (a, s), (b, t) = first, second
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                if x and y:
                    self.Q[i][j] += weight * x * y / 2
                    self.Q[j][i] += weight * x * y / 2
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            self.g[i] += weight * (x * t + y * s)
        self.c += weight * s * t

    def minimum(self):
        """c - g' Q^-1 g / 4; None where Q is not positive definite."""
        rows = [[*row, g] for row, g in zip(self.Q, self.g, strict=True)]
        total = self.c
        for k in range(len(rows)):
            pivot = rows[k][k]
            if pivot <= 0:
                return None
            total -= rows[k][-1] * rows[k][-1] / pivot / 4
            for i in range(k + 1, len(rows)):
                factor = rows[i][k] / pivot
                if factor:
                    rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
        return total


def dual(problem, seed, x, aim, m):
    """The minimum of the Lagrangian of the multipliers m, from the weights; ranges of neurons are taken as given."""
    weights, biases = layers(seed)
    opened, slopes = problem.open(0)
    size, d = WIDTHS[0] + sum(int(a.sum()) for a in opened), WIDTHS[0]

    def unit(i):
        return [fmpq(int(i == j)) for j in range(size)]

    out, at, place, number = Quadratic(size), exact(x), d, 0
    moves = [unit(i) for i in range(d)]
    for k, (W, b) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
        h = [a + c for a, c in zip(times(W, at), b, strict=True)]
        columns = list(zip(*moves, strict=True))
        change = [list(row) for row in zip(*(times(W, column) for column in columns), strict=True)]
        at, moves = [max(a, fmpq(0)) for a in h], []
        for i, live in enumerate(opened[k]):
            if not live:
                moves.append([fmpq(int(slopes[k][i])) * a for a in change[i]])
                continue
            w, here = unit(place), h[i]
            place += 1
            top, bottom = exact(problem.balls.hi[k][0][i]), exact(-problem.balls.lo[k][0][i])
            v = w, max(here, fmpq(0))
            r = [a - b for a, b in zip(w, change[i], strict=True)], max(-here, fmpq(0))
            M, tv, tr, nu = (exact(own[number]) for own in m.forms)
            number += 1
            one = [fmpq(0)] * size, fmpq(1)
            out.add(M, v, r)
            out.add(tv, v, (v[0], v[1] - top))
            out.add(tr, r, (r[0], r[1] - bottom))
            out.add(nu * top, r, one)
            out.add(nu * bottom, v, one)
            out.c -= nu * top * bottom
            moves.append(w)
    columns = list(zip(*moves, strict=True))
    head = times(list(zip(*weights[-1], strict=True)), exact(aim))
    out.g = [a + b for a, b in zip(out.g, times(columns, head), strict=True)]
    for i in range(d):
        low, high = exact(problem.low[0][i]), exact(problem.high[0][i])
        out.add(exact(m.ball), (unit(i), fmpq(0)), (unit(i), fmpq(0)))
        out.add(exact(m.box[i]), (unit(i), -low), (unit(i), -high))
    if m.ball:
        out.c -= exact(m.ball) * exact(problem.eps[0]) ** 2
    return out.minimum()


def problem_of(seed, norm, box):
    form, x = mlp(WIDTHS, seed=seed), np.random.default_rng(seed).random((1, WIDTHS[0]))
    y = values(form, x).argmax(axis=1)
    return form, x, y, verb.prepare(form, x, y, EPS, norm=norm, box=box)


@pytest.mark.parametrize(("seed", "norm", "box"), [(0, 2, None), (3, 2, (0.0, 1.0)), (2, np.inf, (0.0, 1.0))])
def test_the_proof_is_just_below_the_exact_dual(seed, norm, box):
    """Multipliers of the search, and rough ones: the proof never claims more than rationals give."""
    _, x, y, problem = problem_of(seed, norm, box)
    other = int((y[0] + 1) % 3)
    gain = problem.gain(0)
    facts, aim = problem.facts(0, gain), problem.aim(0, other)
    ((_, found),) = ended(problem, [search.Job((0, other), *problem.item(0, other), np.inf, 8)])
    good, rng = problem.weights(0, gain, found.multipliers), np.random.default_rng(seed)
    assert good.forms.shape[1] >= 5
    for size in (0.0, 1e-3, 0.3):
        noisy = {
            name: getattr(good, name) * np.exp(size * rng.standard_normal(np.shape(getattr(good, name))))
            for name in ("box", "forms")
        }
        m = proof.Weights(good.ball * (1 + size), **noisy)
        low = proof._attempt(gain, facts, aim, m)
        least = dual(problem, seed, x[0], aim, m)
        if least is None:
            assert low == -np.inf
        elif low > -np.inf:
            assert 0 <= least - exact(low) < exact(1e-8)
        assert size or (low > -np.inf and least is not None)


def test_pre_activations_stay_in_their_ranges():
    """In float64, at points of the ball; those of the first layer reach their ends."""
    for seed, norm, box in ((0, 2, None), (1, 2, (0.0, 1.0)), (2, np.inf, None)):
        form, x, _, problem = problem_of(seed, norm, box)
        points = in_ball(x, EPS, norm, 4000, np.random.default_rng(0))[:, 0]
        W = np.array([[float(a) for a in row] for row in layers(seed)[0][0]])
        way = W / np.linalg.norm(W, axis=1, keepdims=True) if norm == 2 else np.sign(W)
        points = np.concatenate([points, x - EPS * way, x + EPS * way])
        if box is not None:
            points = np.clip(points, *box)
        seen = []
        logits(form, points, seen)
        for k, (h, _) in enumerate(seen):
            lo, hi = problem.balls.lo[k][0], problem.balls.hi[k][0]
            assert (h.min(axis=0) >= lo - 1e-12).all() and (h.max(axis=0) <= hi + 1e-12).all()
            if k == 0 and box is None:
                np.testing.assert_allclose(h.max(axis=0), hi, rtol=1e-6)
