"""Search for multipliers: the ellipsoid recursion with a centre, its gradient, batched L-BFGS.

Nothing here is trusted: `proof` bounds the minimum again for the multipliers that are found.

With the multipliers fixed, the Lagrangian is minimised tap by tap. After the terms of the input and of some taps,

    min {terms so far : state = s} = value + (s - mu)' Sigma^-1 (s - mu)

(Sigma may be singular). A tap adds phi(w, d) = A w^2 + 2 B w d + C d^2 + a w + b d, d = W s, per neuron. With
w = c d + e, c = -B / A, it is A e^2 + a e - N d^2 + g d, N = B^2 / A - C: e is independent of the state, and d is a
step of the ellipsoid recursion, Sigma' = Sigma + Sigma W' (D - W Sigma W')^-1 W Sigma with D = 1 / N, for N >= 0. A
backward pass gives the minimiser z. The gradient is that of the Lagrangian at z (Danskin), so that an evaluation costs
one recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lipbounds._norms.factorised import positive_inverse
from lipbounds._text.progress import alive

_MEMORY = 12  # pairs that L-BFGS keeps
_SHORTER = 0.35  # factor on a step that failed
_TRUSTED = 1e-3  # largest difference, relative to `Item.unit`, of two ways to compute the minimum
_TINY = 1e-30
_BARRIER, _FALL, _LAST = 1e-2, 0.65, 3e-4  # weight of the barrier: first, factor per round, least
_RAISE, _RAISES = 0.25, 6  # what is added to the logarithms of multipliers without a minimum, and how often
ROUND = 25  # evaluations between two looks


class Layer(NamedTuple):
    """One tap between two states: y = W s, s+ = H s + G (base d + gain w); None is the identity, for H zero."""

    W: Any
    H: Any
    G: Any


class Neurons(NamedTuple):
    """One tap of an item, (n,) each: p, q of `__init__`; stable neurons are w = slope d.

    base, gain: the output moves by base d + gain w. scale: the unit of the multipliers. forms (F, 6, n) of `forms`:
    f (v^2, v r, r^2, v, r, 1) <= 0. kink: 1 where they are those of a relu; the last one is an equation then where
    its constant is 0 (a branch), with a multiplier of any sign.
    """

    base: Any
    gain: Any
    p: Any
    q: Any
    open: Any
    slope: Any
    scale: Any
    forms: Any
    kink: Any


class Item(NamedTuple):
    """One margin: aim' dz over ||u|| <= eps (where `round` is 1) and low <= u <= high.

    ball is the unit of lambda, ball * boxed (d,) that of the box's multipliers, 0 without one; unit that of the margin.
    """

    aim: Any
    eps: Any
    round: Any
    low: Any
    high: Any
    boxed: Any
    ball: Any
    unit: Any
    taps: tuple[Neurons, ...]


class Multipliers(NamedTuple):
    """lambda (), beta (d,), and per tap those of its forms, (F, n)."""

    ball: Any
    box: Any
    taps: tuple[Any, ...]


def multipliers(item: Item, x: Multipliers) -> Multipliers:
    """From unconstrained parameters: exponentials where a multiplier must not be 0, squares elsewhere.

    The first form of every neuron has in addition what makes N >= 0.
    """
    taps = [n.scale * _weights(n, own) for n, own in zip(item.taps, x.taps, strict=True)]
    box = jnp.where(item.round > 0, jnp.square(x.box), jnp.exp(x.box))
    return Multipliers(item.ball * item.round * jnp.exp(x.ball), item.ball * item.boxed * box, tuple(taps))


def _weights(n: Neurons, x: Any) -> Any:
    """(F, n) multipliers of one tap, in their unit."""
    rest = jnp.square(x[1:])
    free = (n.kink > 0) & (n.forms[3, 5] == 0)
    rest = rest.at[2].set(jnp.where(free, x[3], rest[2]))
    A, B, C = _curvatures(n.forms[1:], rest)
    # of a relu sqrt(A C) is |v r|, with derivatives where it is 0
    bent, lack = B - C, A * C - jnp.square(B)
    lack = jnp.where((n.kink > 0) | (lack < 0), 0.0, lack)
    lift = 2 * (jnp.sqrt(jnp.square(bent) + lack + _TINY) - bent)
    first = jnp.exp(x[0]) + jnp.where(n.kink > 0, 2 * jnp.abs(x[1] * x[2]), jnp.where(lack > 0, lift, 0.0))
    return jnp.concatenate([first[None], rest])


def _curvatures(forms: Any, m: Any) -> tuple[Any, Any, Any]:
    """(A, B, C) of A w^2 - 2 B w d + C d^2."""
    vv, vr, rr = jnp.einsum("fcn,fn->cn", forms[:, :3], m)
    return vv + vr + rr, vr / 2 + rr, rr


class Steps(NamedTuple):
    """A w^2 - 2 B w d + tau_r d^2 + a w + b d of every neuron, with w = c d + e as in the docstring above."""

    over: Any  # 1 / A
    a: Any
    g: Any
    c: Any
    N: Any
    constant: Any


def steps_of(n: Neurons, m: Any) -> Steps:
    A, B, C = _curvatures(n.forms, m)
    vr, vv = 2 * (B - C), A - 2 * B + C
    v, r, one = jnp.einsum("fcn,fn->cn", n.forms[:, 3:], m)
    a = vr * (n.p + n.q) + 2 * (vv * n.p + C * n.q) + v + r
    b = -vr * n.p - 2 * C * n.q - r
    constant = (vr * n.q + vv * n.p + v) * n.p + (C * n.q + r) * n.q + one
    live = n.open > 0

    def kept(value: Any, other: Any = 0.0) -> Any:
        return jnp.where(live, value, other)

    c = B / A
    N = jnp.maximum(B * c - C, 0)
    return Steps(kept(1 / A), kept(a), kept(b + a * c), kept(c, n.slope), kept(N), n.open @ constant)


def _times(m: Any, x: Any) -> Any:
    return x if m is None else m @ x


class Network(NamedTuple):
    """s_0 = start x (None is the identity), then the layers; the last state is the output."""

    start: Any
    layers: tuple[Layer, ...]

    def minimum(self, item: Item, m: Multipliers) -> tuple[Any, tuple[Any, tuple[Any, ...]], Any]:
        """(minimum, (u, (w per tap)), barrier) of the Lagrangian without the margin at the centre; NaN without one.

        The barrier, the sum of log det (I - N^1/2 W Sigma W' N^1/2), goes to -inf where the minimum ceases to exist.
        """
        weight = m.ball + m.box
        centre = m.box * (item.low + item.high) / (2 * weight)
        start = jnp.eye(len(centre), dtype=centre.dtype) if self.start is None else self.start
        S, mu = (start / weight) @ start.T, start @ centre
        total = -m.ball * item.eps**2 + m.box @ (item.low * item.high) - weight @ jnp.square(centre)
        kept, barrier = [], jnp.zeros((), total.dtype)
        for layer, n, own in zip(self.layers, item.taps, m.taps, strict=True):
            step = steps_of(n, own)
            WS = _times(layer.W, S)
            Sy = WS if layer.W is None else WS @ layer.W.T
            y = _times(layer.W, mu)
            total = total + step.constant + step.g @ y - step.g @ (Sy @ step.g) / 4
            y, mu = y - Sy @ step.g / 2, mu - WS.T @ step.g / 2
            root = jnp.sqrt(step.N)
            P, log_det = positive_inverse(jnp.eye(len(root), dtype=S.dtype) - root[:, None] * Sy * root)
            barrier = barrier + log_det
            X, t = root[:, None] * WS, root * y
            PX, Pt = P @ X, P @ t
            S, mu = S + X.T @ PX, mu + X.T @ Pt
            total = total - t @ Pt - step.over @ jnp.square(step.a) / 4
            slopes = n.base + n.gain * step.c
            kept.append((S, mu, step, slopes))
            G = jnp.diag(n.gain) if layer.G is None else layer.G * n.gain
            T = jnp.diag(slopes) if layer.W is None else slopes[:, None] * layer.W
            T = _times(layer.G, T)
            T = T if layer.H is None else T + layer.H
            S, mu = T @ S @ T.T + (G * step.over) @ G.T, T @ mu - G @ (step.over * step.a) / 2
        total = total + item.aim @ mu - item.aim @ S @ item.aim / 4
        aim, ws = item.aim, []
        for layer, n, (S, mu, step, slopes) in zip(
            reversed(self.layers), reversed(item.taps), reversed(kept), strict=True
        ):
            back = _times(None if layer.G is None else layer.G.T, aim)
            behind = slopes * back
            behind = behind if layer.W is None else layer.W.T @ behind
            behind = behind if layer.H is None else behind + layer.H.T @ aim
            d = _times(layer.W, mu - S @ behind / 2)
            ws.append(step.c * d - step.over * (step.a + n.gain * back) / 2)
            bent = step.g - 2 * step.N * d
            aim = behind + (bent if layer.W is None else layer.W.T @ bent)
        u = centre - start.T @ aim / (2 * weight)
        return total, (u, tuple(ws[::-1])), barrier

    def moves(self, item: Item, u: Any, ws: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
        """(w per tap, that of stable neurons replaced by their own; d per tap; the change of the margin)."""
        s, found, ds = _times(self.start, u), [], []
        for layer, n, w in zip(self.layers, item.taps, ws, strict=True):
            d = _times(layer.W, s)
            w = jnp.where(n.open > 0, w, n.slope * d)
            ahead = _times(layer.G, n.base * d + n.gain * w)
            s = ahead if layer.H is None else layer.H @ s + ahead
            found.append(w)
            ds.append(d)
        return tuple(found), tuple(ds), item.aim @ s


def _products(n: Neurons, m: Any, w: Any, d: Any) -> Any:
    """(n,) the sum of a neuron's forms."""
    vv, vr, rr, own_v, own_r, one = jnp.einsum("fcn,fn->cn", n.forms, m)
    v, r = w + n.p, w - d + n.q
    return (vv * v + vr * r + own_v) * v + (rr * r + own_r) * r + one


def lagrangian(net: Any, item: Item, m: Multipliers, z: tuple[Any, tuple[Any, ...]]) -> Any:
    """The Lagrangian at z, without the margin at the centre."""
    u, ws = z
    total = m.ball * (u @ u - item.eps**2) + m.box @ ((u - item.low) * (u - item.high))
    ws, ds, moved = net.moves(item, u, ws)
    for n, own, w, d in zip(item.taps, m.taps, ws, ds, strict=True):
        total = total + n.open @ _products(n, own, w, d)
    return total + moved


def _loss(net: Any, item: Item, x: Multipliers, weight: Any) -> tuple[Any, Any]:
    """(loss, the part without the barrier): minus the minimum in units of the margin; differentiable.

    The barrier makes it smooth: the best multipliers are usually at the edge of those that have a minimum, where the
    minimum alone has a ridge. NaN where it is not to be trusted.
    """
    m = multipliers(item, x)
    least, z, barrier = net.minimum(item, m)
    least, z = jax.lax.stop_gradient((least, z))
    value = lagrangian(net, item, m, z)
    apart = jnp.abs(jax.lax.stop_gradient(value) - least) > _TRUSTED * item.unit
    plain = -jnp.where(apart, jnp.nan, value) / item.unit
    return plain - weight * barrier, plain


class State(NamedTuple):
    """L-BFGS of one item on flat parameters x, with loss f, its part without the barrier, and gradient g."""

    x: Any
    f: Any
    plain: Any
    g: Any
    moves: Any
    changes: Any
    rho: Any
    direction: Any
    slope: Any
    step: Any


def _newton(g: Any, moves: Any, changes: Any, rho: Any) -> Any:
    """The L-BFGS estimate of H^-1 g, newest pair first."""

    def down(q: Any, pair: Any) -> Any:
        s, y, r = pair
        alpha = r * (s @ q)
        return q - alpha * y, alpha

    q, alphas = jax.lax.scan(down, g, (moves, changes, rho))
    size = changes[0] @ changes[0]
    q = q * jnp.where(size > 0, (moves[0] @ changes[0]) / jnp.where(size > 0, size, 1), 1)

    def up(q: Any, pair: Any) -> Any:
        s, y, r, alpha = pair
        return q + s * (alpha - r * (y @ q)), None

    return jax.lax.scan(up, q, (moves, changes, rho, alphas), reverse=True)[0]


def begin(xs: Multipliers) -> State:
    """States of a batch of items before their first evaluation, which is at the given parameters."""

    def one(x: Multipliers) -> State:
        flat = ravel_pytree(x)[0]
        zero, none = jnp.zeros((_MEMORY, len(flat)), flat.dtype), jnp.zeros((), flat.dtype)
        return State(flat, none, none, zero[0], zero, zero, zero[:, 0], zero[0], none, none)

    return jax.vmap(one)(xs)


@partial(jax.jit, static_argnames=("count", "anew"))
def improve(
    net: Any,
    items: Item,
    like: Multipliers,
    states: State,
    weights: Any,
    count: int = ROUND,
    anew: bool = True,
) -> State:
    """The states after `count` evaluations each; `like` are parameters of the items, for their structure.

    net: `Network` or `Merged`. weights (N,) of the barrier. With `anew` the first evaluation is at the current
    parameters, as the weight may have changed.
    """

    def one(item: Item, x: Multipliers, state: State, weight: Any) -> State:
        _, unravel = ravel_pytree(x)
        evaluate = jax.value_and_grad(lambda v: _loss(net, item, unravel(v), weight), has_aux=True)

        def advance(s: State, _: None) -> tuple[State, None]:
            trial = s.x + s.step * s.direction
            (f, plain), g = evaluate(trial)
            good = jnp.isfinite(f) & jnp.isfinite(g).all() & (f <= s.f + 1e-4 * s.step * s.slope)
            move, change = trial - s.x, g - s.g
            bend = move @ change
            use = good & (bend > 1e-10 * jnp.sqrt((move @ move) * (change @ change)))

            def pushed(rows: Any, row: Any) -> Any:
                return jnp.where(use, jnp.concatenate([row[None], rows[:-1]]), rows)

            pairs = (
                pushed(s.moves, move),
                pushed(s.changes, change),
                pushed(s.rho, 1 / jnp.where(use, bend, 1)),
            )
            x, f, plain, g = (
                jnp.where(good, a, b) for a, b in ((trial, s.x), (f, s.f), (plain, s.plain), (g, s.g))
            )
            direction = -_newton(g, *pairs)
            direction = jnp.where(direction @ g < 0, direction, -g)
            direction = jnp.where(good, direction, s.direction)
            first = jnp.where(pairs[2][0] == 0, 0.3 / (jnp.sqrt(g @ g) + 1e-30), 1)
            step = jnp.where(good, jnp.minimum(first, 1), s.step * _SHORTER)
            return State(x, f, plain, g, *pairs, direction, direction @ g, step), None

        here = state
        if anew:
            here = state._replace(f=jnp.full_like(state.f, jnp.inf), step=jnp.zeros_like(state.step))
        return jax.lax.scan(advance, here, None, length=count)[0]

    return jax.vmap(one)(items, like, states, weights)


class Result(NamedTuple):
    """How a job ended: the multipliers, their parameters x, the minimum in float arithmetic, and scores (n,) per tap.

    A score is M |v r| at the minimiser, 0 for stable neurons and those without a kink: where it is large the minimiser
    is far from any network.
    """

    multipliers: Multipliers
    x: Multipliers
    scores: tuple[Any, ...]
    least: float


@jax.jit
def _read(net: Any, items: Item, like: Multipliers, flat: Any) -> Result:
    def one(item: Item, x: Multipliers, v: Any) -> Result:
        x = ravel_pytree(x)[1](v)
        m = multipliers(item, x)
        least, (u, ws), _ = net.minimum(item, m)
        ws, ds, _ = net.moves(item, u, ws)
        scores = [
            n.open * n.kink * own[0] * jnp.abs((w + n.p) * (w - d + n.q))
            for n, own, w, d in zip(item.taps, m.taps, ws, ds, strict=True)
        ]
        return Result(m, x, tuple(scores), least)

    return jax.vmap(one)(items, like, flat)


def _stacked(trees: Iterable[Any]) -> Any:
    """Items, or parameters, as a batch."""
    return jax.tree.map(lambda *a: np.stack(a), *trees)


def _where(rows: np.ndarray, a: State, b: State) -> State:
    """The states of a in these rows, else those of b."""
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)


class Job(NamedTuple):
    """One search: key names it; a minimum above `goal` is enough; at most `rounds` of `ROUND` evaluations.

    age: rounds that x has had before, which lower the weight of the barrier. raised: how often its input multipliers
    were raised, as it had no minimum.
    """

    key: Any
    item: Item
    x: Multipliers
    goal: float
    rounds: int
    age: int = 0
    raised: int = 0

    def higher(self) -> Job:
        """The same with larger multipliers of the input, with which the quadratic is more likely to have a minimum."""
        x = self.x._replace(ball=self.x.ball + _RAISE, box=self.x.box + _RAISE * (self.item.round == 0))
        return self._replace(x=x, raised=self.raised + 1)


def _round(
    net: Any, items: Item, xs: Multipliers, held: State, weights: Any, stride: int, after: Callable[[], None]
) -> State:
    """`ROUND` evaluations, `stride` in a call, and after() it; fewer where no job has a minimum."""
    for begun in range(0, ROUND, stride):
        alive()
        held = improve(net, items, xs, held, weights.astype(held.f.dtype), count=stride, anew=begun == 0)
        after()
        if stride < ROUND and not np.isfinite(held.f).any():
            break
    return held


def run(
    net: Any,
    jobs: Iterable[Job],
    done: Callable[[Job, Result], None],
    *,
    width: int,
    tolerance: float,
    filled: int,
    stride: int = ROUND,
    wanted: Callable[[Any], bool] = lambda key: True,
    after: Callable[[int], None] = lambda count: None,
) -> None:
    """done(job, result) for every job, as it ends: at its goal, out of rounds, or where it stalls.

    `width` jobs are advanced together, and a new one takes the place of one that has ended. A job stalls where a round
    gains less than `tolerance` units. Jobs whose key is not `wanted` any more are dropped. Where others take from the
    same jobs, at most `filled` places are used: the program, and so what is found, stays that of `width`. A round is
    cut into calls of `stride` evaluations, a divisor of `ROUND`, so that it can be interrupted; after(count) tells of
    the evaluations of each call, of all jobs together.
    """
    waiting = iter(jobs)
    places = range(min(filled, width))
    slots: list[Job | None] = [None] * width
    spent, last = np.zeros(width, int), np.zeros(width)
    held, again = None, list[int]()

    def fresh() -> Job | None:
        return next((job for job in waiting if wanted(job.key)), None)

    while True:
        alive()
        new = [i for i in places if (job := slots[i]) is None or not wanted(job.key)]
        for i in new:
            slots[i] = fresh()
        new += [i for i in again if i not in new]
        live = [i for i, job in enumerate(slots) if job is not None]
        if not live:
            return
        new = [i for i in new if slots[i] is not None]
        if held is None or new:
            rows = [slots[live[0]] if job is None else job for job in slots]
            items, xs = _stacked(job.item for job in rows if job), _stacked(job.x for job in rows if job)
            started = begin(xs)
            if held is None:
                held = started
            else:
                fill = np.zeros(width, bool)
                fill[new] = True
                held = _where(fill, started, held)
            spent[new], last[new] = 0, np.inf
        ages = spent + [0 if job is None else job.age for job in slots]
        weights = np.maximum(_BARRIER * _FALL**ages, _LAST)
        held = _round(net, items, xs, held, weights, stride, partial(after, stride * len(live)))
        f, finished = np.where(np.isfinite(held.f), held.plain, np.nan), weights <= _LAST
        ended, again = [], []
        for i in live:
            job = slots[i]
            assert job is not None
            if np.isnan(f[i]) and spent[i] == 0 and job.raised < _RAISES:
                slots[i] = job.higher()
                again.append(i)
                continue
            spent[i] += 1
            value = -float(f[i]) * float(job.item.unit)
            stalled = finished[i] and last[i] - f[i] < tolerance
            if not np.isfinite(f[i]) or value > job.goal or spent[i] >= job.rounds or stalled:
                ended.append((i, job, value))
        last = f.copy()
        if ended:
            found = jax.tree.map(np.asarray, _read(net, items, xs, held.x))
            for i, job, value in ended:
                slots[i] = None
                done(job, jax.tree.map(lambda a, i=i: a[i], found)._replace(least=value))
