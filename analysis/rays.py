"""RayS and ADBD: the distance to the decision boundary along rays x + r d, d in {-1, 1}^n, from labels alone.

Chen, Gu, "RayS: a ray searching method for hard-label adversarial attack", KDD 2020, arXiv 2006.12792, with the errors
of the printed algorithms corrected. The search begins at d = (1, ..., 1), and no ray is known to leave the class. At
stage s the entries are cut into min(2^s, n) blocks. For one block after the other, the block's signs are flipped:

1. if x + r d is still classified as labelled at the smallest r known, the flip is dropped, after one query;
2. else bisection finds where the class changes on that ray, and the flip is kept where that is nearer.

Every point is clipped to the box, and its distance is that of the clipped point. All images go through the search at
once, each at its own stage, block and interval, so that every evaluation of the network is a query of every image.

Only the answer "labelled so, or not" is used, so an `Oracle` will do: any Python function from a batch to labels.

What is found are misclassified points, so every distance is an upper bound of the distance to the nearest one. On a
ray that enters and leaves another class more than once, the crossing that bisection finds need not be the first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._text import reporting, show, usual_settings, whole
from lipbounds.analysis.attack_network import Model, Oracle, margin_of
from lipbounds.analysis.attack_search import Attack, Found, Problem, per_example, search, stride
from lipbounds.analysis.attack_settings import LINF, AttackSettings

_AT_ONCE = 32  # queries between two looks at which images are done
_LEAST = 8  # images, below which a chunk is not halved


@usual_settings()
def rays(
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings = LINF,
    *,
    queries: int = 10_000,
    tol: float | None = None,
    target: Any = None,
    **changes: Any,
) -> Attack:
    """Search every l-inf ball ||x' - x|| <= eps by RayS for an x' in the box that is not classified as labelled.

    Args:
        fn: a network, as in `attacks.pgd`, or an `Oracle`: any Python function from a batch to labels.
        x, y, eps, settings, target, **changes: as those of `attacks.pgd`; the norm is inf. Nothing is random.
        queries: of every image at most, besides those of x itself and of what is returned.
        tol: length, in the units of x, of the interval at which bisection ends; None is 1e-3 (high - low) / sqrt(n) for
            n entries: 1e-3 in the l2 length of the ray, as in the authors' code.

    The search for an image ends with the first point within eps. `queries` of the result counts those of every image.

    Raises:
        TypeError: fn is not callable.
        ValueError: as `pgd`, a norm other than inf, or a tol that is not a number > 0.
    """
    settings = AttackSettings.changed(settings, changes)
    return _run("RayS", fn, x, y, eps, settings, queries, tol, target, True)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class BoundaryDistances:
    """l-inf distances from N images to misclassified points, each an upper bound of the distance to the nearest one.

    correct      (N,) whether the image itself is classified as labelled
    distance     (N,) float64, ||adversarial - x||_inf, rounded up; 0 where x is misclassified, inf where no
                 misclassified point was found
    adversarial  (N, *shape) float32
    queries      (N,) how many were asked
    grid         (M,) numbers of queries;  history  (N, M) the distances found by then
    """

    correct: np.ndarray
    distance: np.ndarray
    adversarial: np.ndarray
    queries: np.ndarray
    grid: np.ndarray
    history: np.ndarray

    def __len__(self) -> int:
        return len(self.distance)

    @property
    def adbd(self) -> float:
        """Average decision boundary distance, misclassified images at 0: at least that of the true distances."""
        return float(self.distance.mean())

    @property
    def attack(self) -> Attack:
        """The same as an attack on the whole box: a success is a misclassified point, at whatever distance."""
        won = self.correct & np.isfinite(self.distance)
        return Attack(
            correct=self.correct,
            success=won,
            distance=np.where(won, self.distance, np.inf),
            adversarial=self.adversarial,
            margin=np.where(won | ~self.correct, -1.0, 1.0),
            eps=np.full(len(self), np.inf),
            norm=math.inf,
            loss="labels",
            queries=self.queries,
            name="ADBD",
        )

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """(queries (M,), mean distance (M,) found by then); the mean is inf until every image has been broken."""
        return self.grid, self.history.mean(axis=0)

    def accuracy(self, eps: float) -> float:
        """Share of the images not broken within eps: an upper bound of the robust accuracy in l-inf."""
        if not eps >= 0:
            raise ValueError(f"eps must be a number >= 0, got {eps!r}")
        return float(np.mean(self.correct & (self.distance > eps)))

    def __repr__(self) -> str:
        found = int(np.isfinite(self.distance).sum())
        return (
            f"BoundaryDistances: {len(self)} images, l-inf, ADBD <= {show(self.adbd, 'up')}, median "
            f"{show(float(np.median(self.distance)), 'up')}, {self.correct.mean():.2%} correct, a misclassified "
            f"point known for {found}"
        )


@usual_settings()
def adbd(
    fn: Any,
    x: Any,
    y: Any,
    settings: AttackSettings = LINF,
    *,
    queries: int = 40_000,
    tol: float | None = None,
    **changes: Any,
) -> BoundaryDistances:
    """Average decision boundary distance: RayS on every image with all its queries, whatever the radius.

    Arguments and errors are those of `rays`, without eps. Each distance bounds the true one from above, and hence so
    does their average; a certified l-inf radius bounds it from below.
    """
    settings = AttackSettings.changed(settings, changes)
    attack, told = _run("ADBD", fn, x, y, math.inf, settings, queries, tol, None, False)
    assert attack.queries is not None  # RayS counts them
    distance = np.where(attack.correct, attack.distance, 0.0)
    grid = np.array(sorted(told), int)
    history = np.array([np.where(attack.correct, told[n], 0.0) for n in grid]).reshape(len(grid), -1).T
    return BoundaryDistances(attack.correct, distance, attack.adversarial, attack.queries, grid, history)


@dataclasses.dataclass(frozen=True)
class _Rules:
    """limit: queries of an image; tol: where bisection ends; span: the longest step; low, high: the box."""

    limit: int
    tol: np.float32
    span: np.float32
    low: np.float32
    high: np.float32


def _run(
    name: str,
    fn: Any,
    x: Any,
    y: Any,
    eps: Any,
    settings: AttackSettings,
    limit: int,
    tol: float | None,
    target: Any,
    stops: bool,
) -> tuple[Attack, dict[int, np.ndarray]]:
    """The attack, and {number of queries: (N,) l-inf distances found by then}."""
    if settings.norm != math.inf:
        raise ValueError(f"the distances of RayS are in l-inf: norm must be inf, got {settings.norm!r}")
    if tol is not None and not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol must be a number > 0, got {tol!r}")
    span = settings.high - settings.low
    width = tol or 1e-3 * span / math.sqrt(math.prod(np.shape(x)[1:]) or 1)
    rules = _Rules(whole("queries", limit), np.float32(width), np.float32(span), *settings.box)
    told = {n: np.full(len(x), np.inf) for n in _grid(limit)}

    def find(problem: Problem) -> Found:
        index = np.asarray(problem.index)

        def note(asked: int, reached: np.ndarray) -> None:
            if asked in told:
                told[asked][index] = reached

        return _search(problem, rules, stops, note)

    with reporting(settings.progress):
        made = search(name, find, fn, x, y, eps, settings, "labels", target=target, needs="labels")
    return made, told


# ------------------------------------------------------------------------------------------------ the search
class _State(NamedTuple):
    """Where the search for B images stands. Steps are l-inf lengths: r / sqrt(n).

    signs (B, n) int8: d;  best (B,): the step at which d leaves the class, inf where none is known;  low, high (B,):
    the interval of bisection;  stage, block (B,);  bisecting (B,);  queries (B,);  point (B, *shape): the nearest
    misclassified point and  reached (B,)  its distance, inf where there is none;  enough (B,): the distance that ends
    the search;  active (B,): whether the search goes on
    """

    signs: jax.Array
    best: jax.Array
    low: jax.Array
    high: jax.Array
    stage: jax.Array
    block: jax.Array
    bisecting: jax.Array
    queries: jax.Array
    point: jax.Array
    reached: jax.Array
    enough: jax.Array
    active: jax.Array


def _search(problem: Problem, rules: _Rules, stops: bool, note: Callable[[int, np.ndarray], None]) -> Found:
    """The nearest misclassified points found, x where there is none.

    Once half of a chunk is done, the rest goes on as a chunk of half the size.
    """
    x, enough = problem.where[:2]
    state = _begin(x, enough if stops else jnp.full_like(enough, -1.0))
    rows, points = np.arange(len(x)), np.array(x)
    asked, reached = np.zeros(len(x), np.int64), np.full(len(x), np.inf)
    done = 0
    while done < rules.limit:
        active = np.asarray(state.active)
        if 2 * active.sum() <= len(rows) and (len(rows) > _LEAST or not active.any()):
            points[rows], asked[rows] = np.asarray(state.point), np.asarray(state.queries)
            if not active.any():
                break
            chosen = np.argsort(~active, kind="stable")[: -(-len(rows) // 2)]
            rows, state = rows[chosen], jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], state)
            problem = problem.of(chosen)
        count = min(_AT_ONCE, rules.limit - done)
        state = _asked(problem, state, rules, count)
        done += count
        reached[rows] = np.asarray(state.reached)
        note(done, reached)
    points[rows], asked[rows] = np.asarray(state.point), np.asarray(state.queries)
    for later in _grid(rules.limit):
        if later > done:
            note(later, reached)
    return Found(points, queries=asked)


def _asked(problem: Problem, state: _State, rules: _Rules, count: int) -> _State:
    """`count` queries of every image that is active; an oracle is asked for those only."""
    x, once = problem.where[0], 1 if isinstance(problem.model, Oracle) else stride(count)
    for _ in range(count // once):
        if not isinstance(problem.model, Oracle):
            state = _ask_network(
                problem.model,
                problem.weights,
                state,
                x,
                problem.labels,
                rules=rules,
                count=once,
                targeted=problem.targeted,
            )
            continue
        active = np.asarray(state.active)
        if not active.any():
            break
        proposal = _propose(state, x, rules=rules)
        margin = problem.margins(proposal, active)
        state = _answer(state, x, proposal, jnp.asarray(margin <= 0), rules=rules)
    return state


def _grid(limit: int) -> list[int]:
    """Numbers of queries at which distances are noted: four to an octave, and the limit."""
    steps = {round(2 ** (k / 4)) * _AT_ONCE for k in range(64)}
    return sorted({n for n in steps if n < limit} | {limit})


def _begin(x: jax.Array, enough: jax.Array) -> _State:
    count, size = len(x), math.prod(x.shape[1:])
    zeros, far = jnp.zeros(count, jnp.float32), jnp.full(count, jnp.inf, jnp.float32)
    none = jnp.zeros(count, jnp.int32)
    return _State(
        signs=jnp.ones((count, size), jnp.int8),
        best=far,
        low=zeros,
        high=far,
        stage=none,
        block=none,
        bisecting=jnp.zeros(count, bool),
        queries=none,
        point=x,
        reached=far,
        enough=enough,
        active=jnp.ones(count, bool),
    )


@functools.partial(jax.jit, static_argnames=("model", "rules", "count", "targeted"))
def _ask_network(
    model: Model,
    weights: Any,
    state: _State,
    x: jax.Array,
    labels: jax.Array,
    *,
    rules: _Rules,
    count: int,
    targeted: bool,
) -> _State:
    """`count` queries of every image that is active."""

    def query(state: _State, _: None) -> tuple[_State, None]:
        proposal = _propose(state, x, rules=rules)
        margin = margin_of(model(weights, proposal).astype(jnp.float32), labels, targeted)
        return _answer(state, x, proposal, margin <= 0, rules=rules), None

    return jax.lax.scan(query, state, None, length=count)[0]


@functools.partial(jax.jit, static_argnames=("rules",))
def _propose(state: _State, x: jax.Array, *, rules: _Rules) -> jax.Array:
    """The points (B, *shape) to be asked next."""
    middle = (state.low + state.high) / 2
    step = jnp.where(state.bisecting, middle, jnp.minimum(state.best, rules.span))
    shift = step[:, None] * _flipped(state).astype(jnp.float32)
    return jnp.clip(x + shift.reshape(x.shape), rules.low, rules.high)


def _blocks(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Length and number of blocks by stage: min(2^s, n) blocks as far as their rounded-up length leaves so many."""
    counts = np.minimum(2 ** np.arange((size - 1).bit_length() + 1), size)
    lengths = -(-size // counts)
    return lengths.astype(np.int32), (-(-size // lengths)).astype(np.int32)


def _flipped(state: _State) -> jax.Array:
    """The signs (B, n) with those of the current block flipped."""
    size = state.signs.shape[1]
    lengths = jnp.asarray(_blocks(size)[0])[state.stage]
    inside = jnp.arange(size, dtype=jnp.int32)[None] // lengths[:, None] == state.block[:, None]
    return jnp.where(inside, -state.signs, state.signs)


@functools.partial(jax.jit, static_argnames=("rules",))
def _answer(state: _State, x: jax.Array, proposal: jax.Array, wrong: jax.Array, *, rules: _Rules) -> _State:
    """The state after the network has said which proposals are misclassified; images that are not active stay."""
    axes = tuple(range(1, x.ndim))
    distance = jnp.abs(proposal - x).max(axis=axes)
    nearer = state.active & wrong & (distance < state.reached)
    point = jnp.where(per_example(nearer, x), proposal, state.point)
    reached = jnp.where(nearer, distance, state.reached)

    start = jnp.minimum(state.best, rules.span)
    step = jnp.where(state.bisecting, (state.low + state.high) / 2, start)
    low = jnp.where(state.bisecting, jnp.where(wrong, state.low, step), 0.0)
    high = jnp.where(state.bisecting & ~wrong, state.high, step)
    middle = (low + high) / 2
    # in float32 an interval may have no number inside before it is shorter than tol
    narrow = (high - low <= rules.tol) | (middle <= low) | (middle >= high)
    over = jnp.where(state.bisecting | wrong, narrow, True)
    kept = over & (state.bisecting | wrong) & (high < state.best)
    signs = jnp.where(kept[:, None], _flipped(state), state.signs)

    counts = jnp.asarray(_blocks(state.signs.shape[1])[1])
    last = state.block + 1 >= counts[state.stage]
    block = jnp.where(over, jnp.where(last, 0, state.block + 1), state.block)
    stage = jnp.where(over & last, jnp.minimum(state.stage + 1, len(counts) - 1), state.stage)
    queries = state.queries + 1
    goes_on = (queries < rules.limit) & (reached > state.enough)
    moved = _State(
        signs=signs,
        best=jnp.where(kept, high, state.best),
        low=low,
        high=high,
        stage=stage,
        block=block,
        bisecting=~over,
        queries=queries,
        point=point,
        reached=reached,
        enough=state.enough,
        active=state.active & goes_on,
    )
    return jax.tree.map(lambda new, old: jnp.where(per_example(state.active, new), new, old), moved, state)
