"""The engines behind local bounds: preparation once per form, and the recursion around the examples.

Three ways to bound a network on the balls around examples:

    ellipsoids   the whole network by `ellipsoids`, verified; for networks nowhere wider than `WIDEST`
    hybrid       everything up to the last wide tap as a whole, by LipLT (`hybrid_start`), and `ellipsoids` behind
    LipLT        local LipLT (`liplt`), probabilistic, of any width

On wide networks neither of the last two is better on all examples, so both run, the cheaper one
first, and every example keeps its better result (`bounded`).
"""

from __future__ import annotations

import copy
import functools
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.inputs import Box
from lipbounds._form.lure import LureForm
from lipbounds._gain.memory_budget import TooLarge
from lipbounds._gain.wide_blocks import LIMIT
from lipbounds._lipsdp import proof
from lipbounds._lipsdp.state_matrices import WIDEST, first_tap, hybrid_start, split
from lipbounds._local import box as _localbox
from lipbounds._local import ellipsoids, liplt
from lipbounds._local.ellipsoids import Matrix, Stage, Values
from lipbounds._local.forward import Seen, logits
from lipbounds._norms.rounding import U, add_up, gamma, require_gradual_underflow
from lipbounds._text.calls import FAILURES, reason
from lipbounds._text.progress import say
from lipbounds._triangle.recursion import FAILURE, Request

_MOST_OUTPUTS = 4096  # of a local bound, which holds K x K blocks per example
_CHUNK = 2**23  # numbers in the ellipsoids of one chunk of examples
_NAMES = {"ellipsoids": "ellipsoids", "hybrid": "ellipsoids behind the wide front", "LipLT": "local LipLT"}
_DIRECTIONS = 12  # that D is chosen for
_WIDE_CHUNK, _SIDE = 2**25, 64  # entries of the rows of a chunk, and its examples, in local LipLT


@dataclass(frozen=True, eq=False)
class _Ready:
    """Computed once per form and reused for all examples.

    whole: the elementwise view; view: of it what is behind a wide front, or all; stages: of view.
    start (1, d, d) of the first state over the unit ball; first (A, error): A x is the first y, where known.
    front: what local LipLT needs, in place of stages and start.
    """

    whole: LureForm
    view: LureForm
    stages: tuple[Stage, ...]
    start: np.ndarray
    first: tuple[np.ndarray, float] | None
    guarantee: str
    failure: float
    notes: tuple[str, ...]
    front: liplt.Front | None = None


_READY: weakref.WeakKeyDictionary[LureForm, dict[Any, _Ready]] = weakref.WeakKeyDictionary()


class NoEngineError(ValueError):
    """No engine can bound this network around examples; only the bound of the whole network applies."""


def ways(form: LureForm, norm: float, guarantee: str) -> tuple[str, ...]:
    """The engines that apply to a form, cheapest first.

    Raises:
        ValueError: norm 1, an unknown guarantee; NoEngineError where no engine applies.
    """
    if norm == 1:
        raise ValueError("local bounds are for norm 2 and inf, not 1")
    if guarantee not in ("auto", "verified"):
        raise ValueError(f"guarantee must be 'auto' or 'verified' for local bounds, got {guarantee!r}")
    if form.num_outputs > _MOST_OUTPUTS:
        raise NoEngineError(
            f"local bounds are for at most {_MOST_OUTPUTS} outputs, this network has {form.num_outputs}: keep the "
            "outputs that matter, or use the bound of the whole network (lb.liplt)"
        )
    cut = first_tap(form, WIDEST)
    if not cut:
        return ("ellipsoids",)
    if norm != 2:
        raise NoEngineError(f"local bounds in l-inf are for networks nowhere wider than {WIDEST}")
    if guarantee == "verified":
        return ("hybrid",)
    # behind the last tap nothing is left to be bounded locally
    return ("LipLT",) if cut == len(form.taps) else ("hybrid", "LipLT")


@dataclass(frozen=True)
class Bounded:
    """Guarantee and notes of the engines that were used.

    Guarantees and notes of the engines whose bounds are in the result, the probability that any of them fails, and why
    other engines are not in it.
    """

    guarantees: tuple[str, ...]
    failure: float
    notes: tuple[str, ...]


def bounded(
    form: LureForm,
    norm: float,
    x: np.ndarray,
    use: Callable[[Around], None],
    *,
    guarantee: str,
    seed: int,
    box: Box | None,
) -> Bounded:
    """use(around) with every engine that applies, cheapest first.

    `use` keeps the better result of every example and marks in `around.used` the rows that this engine gave. Results
    of one engine stay if another fails, which becomes a note. ValueError if all fail.
    """
    names, ran, failed = ways(form, norm, guarantee), [], []
    for name in names:
        try:
            around = Around(form, norm, x, guarantee=guarantee, seed=seed, box=box, way=name)
            ran.append(around)
            use(around)
        except (*FAILURES, TooLarge) as error:
            failed.append((name, error))
    if len(failed) == len(names):
        raise failed[0][1]
    # an engine that improved no example is not part of the result
    kept = [around for around in ran if around.used.any()] or [a for a in ran if len(names) == 1]
    notes = [note for around in kept for note in around.notes]
    if len(kept) > 1:
        better = int(kept[-1].used.sum())
        notes.append(f"every example uses the better engine: {_NAMES[kept[-1].way]} for {better} of {len(x)}")
    notes += [f"without {_NAMES[name]}, which failed: {reason(error)}" for name, error in failed]
    return Bounded(
        tuple(around.guarantee for around in kept),
        min(sum(around.failure for around in kept), 1.0),
        tuple(notes),
    )


class Around:
    """One engine applied around given examples, for several eps.

    Args:
        seed: of the random start vectors of probabilistic norms.
        box: (lower, upper) of the inputs that count, from `check_box`.
        way: one of `ways`, None for the first.

    used (N,) marks the examples whose result this engine gave; parts share it.
    """

    def __init__(
        self,
        form: LureForm,
        norm: float,
        x: np.ndarray,
        *,
        guarantee: str = "auto",
        seed: int = 0,
        box: Box | None = None,
        way: str | None = None,
    ) -> None:
        require_gradual_underflow()
        self.way = ways(form, norm, guarantee)[0] if way is None else way
        kept = {} if form.assumed else _READY.setdefault(form, {})
        # only the bound of the front depends on more than the form
        wanted = norm, self.way, *((guarantee, seed) if self.way == "hybrid" else ())
        if wanted not in kept:
            kept[wanted] = _ready(form, norm, self.way, guarantee, seed)
        self.ready = ready = kept[wanted]
        self.guarantee, self.failure, self.notes = ready.guarantee, ready.failure, ready.notes
        self.seed = seed
        self.norm, self.x, self.box = norm, x, box
        self.used = np.zeros(len(x), bool)
        if ready.front is not None:
            self.failure = min(1.0, FAILURE * len(x))

    def part(self, rows: slice) -> Around:
        """The same for these examples only; pre-activations are kept for one chunk at a time."""
        some = copy.copy(self)
        some.x, some.used = self.x[rows], self.used[rows]  # views, so marks in the part are marks here
        some.__dict__.pop("values", None)
        return some

    @functools.cached_property
    def values(self) -> Values:
        ready, seen = self.ready, Seen()
        logits(ready.whole, self.x, seen)
        seen = seen[len(ready.whole.taps) - len(ready.view.taps) :]
        y, error = tuple(y for y, _ in seen), tuple(e for _, e in seen)
        ends = [ellipsoids.slopes_between(ready.view, s.tap, y[s.tap], y[s.tap]) for s in ready.stages]
        # derivatives at the examples, until a call replaces them by the middles of the slope intervals
        return Values(y, error, tuple((a + b) / 2 for a, b in ends))

    def chunks(self, count: int) -> list[slice]:
        ready = self.ready
        if ready.front is not None:
            form = ready.view
            width = form.num_outputs * (form.in_size + sum(tap.size_out for tap in form.taps))
            size = 1 << (max(1, min(_SIDE, _WIDE_CHUNK // width)).bit_length() - 1)
        else:
            widest = max(
                (s.T.array.shape[0] if s.T.array is not None else s.neurons for s in ready.stages), default=1
            )
            size = max(1, _CHUNK // max(widest, ready.start.shape[1]) ** 2)
        return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]

    def each(self, work: Callable[[Around, slice], None], what: str) -> None:
        """work(part, rows) for every chunk, in parallel on all cores, as BLAS threads do not help small matrices."""
        count, done = len(self.x), 0
        parts = self.chunks(count)

        def one(rows: slice) -> None:
            with jax.default_matmul_precision("highest"):  # the setting is per thread
                work(self.part(rows), rows)

        with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
            for part, _ in zip(parts, pool.map(one, parts), strict=True):
                done += part.stop - part.start
                say(f"{what}: {done} of {count} examples")

    @np.errstate(all="ignore")  # entries that are not finite give no bound
    def outputs(
        self,
        rows: Any,
        eps: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        call: int = 0,
        ranges: list[ellipsoids.Range] | None = None,
    ) -> np.ndarray:
        """(N, J, K, K) for radius eps around these rows: the constant of a' z is at most sum_j sqrt(a' S_j a).

        labels: (N,) classes whose margins matter, against the example itself; None is all outputs and all pairs of
        points. call: which call about these examples it is, from 0. ranges: a list that receives those of the
        pre-activations, from ellipsoids.
        """
        anchored = labels is not None
        ready, values = self.ready, self.values.rows(rows)
        if ready.front is not None:
            rng = np.random.default_rng([self.seed, call])
            share = FAILURE / ((call + 1) * (call + 2))  # the sum over all calls is FAILURE
            size = 1 << (len(eps) - 1).bit_length()  # few shapes to compile
            pad = np.minimum(np.arange(size), len(eps) - 1)
            out = liplt.grams(
                ready.front, values.rows(pad), eps[pad], anchored=anchored, failure=share, rng=rng
            )[: len(eps)]
        else:
            one, middles = ellipsoids.ellipsoids(
                ready.view,
                ready.stages,
                ready.start,
                values,
                eps,
                anchored=anchored,
                directions=self._directions(labels, len(eps)),
                first=self._first(rows, eps),
                ranges=ranges,
            )
            for known, c in zip(self.values.slope, middles, strict=True):
                known[rows] = c
            out = (np.repeat(one, len(eps), axis=0) if len(one) < len(eps) else one)[:, None]
        return out

    def _first(self, rows: Any, eps: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """How far the first pre-activations can fall and rise; None where the ellipsoid is as good."""
        if self.ready.first is None or (self.norm == 2 and self.box is None):
            return None
        room = _localbox.rooms(self.x[rows], self.box)
        return _localbox.reach(*self.ready.first, eps, self.norm, *room)

    def _directions(self, labels: np.ndarray | None, count: int) -> np.ndarray:
        """(N, J, K): margins e_y - e_i, or all e_i; beyond a dozen, sums of them with random signs."""
        classes = self.ready.view.num_outputs
        signs: np.ndarray = np.eye(classes)
        if classes > _DIRECTIONS:
            signs = np.random.default_rng(0).choice([-1.0, 1.0], (_DIRECTIONS, classes))
        if labels is None:
            return np.broadcast_to(signs, (count, *signs.shape))
        if classes == 1:
            return np.ones((count, 1, 1))
        own = np.zeros((count, 1, classes))
        own[np.arange(count), 0, labels] = 1.0
        return signs.sum(axis=1, keepdims=True) * own - signs


def _ready(form: LureForm, norm: float, way: str, word: str, seed: int) -> _Ready:
    if way == "LipLT":
        note = f"wider than {WIDEST}: local LipLT, each example with probability {FAILURE:g} of a failure"
        front = liplt.Front(form)
        word = "assumed" if form.assumed else "probabilistic"
        return _Ready(form, form, (), np.zeros((1, 0, 0)), None, word, FAILURE, (note,), front)
    whole = elementwise_view(form)
    guarantee, failure = "assumed" if form.assumed else "verified", 0.0
    notes: tuple[str, ...] = ()
    first = None
    if way == "hybrid":
        wide = first_tap(form, WIDEST)
        _fits(form, wide, word)
        _, s, scale, word, failure = hybrid_start(form, wide, Request(norm, word, seed))
        guarantee = word if guarantee == "verified" else guarantee
        # the ellipsoid is that of the tail's input, in the order in which the tail's view reads it
        view = elementwise_view(split(form, wide)[1])
        begin, stages = ellipsoids.stages(view)
        start, e = begin.map(np.ldexp(np.array(s), scale)[None])
        ahead = len(whole.taps) - len(view.taps)
        if any(
            a.expr != b.expr or a.size_in != b.size_in
            for a, b in zip(whole.taps[ahead:], view.taps, strict=True)
        ):
            raise ValueError("the taps behind the wide front could not be matched: use the global bound")
        notes = (f"the first {wide} taps are bounded as a whole, by LipLT ({word})",)
    else:
        view, n = whole, form.in_size
        begin, stages = ellipsoids.stages(view)
        ball = np.ones(n)
        first = _first_map(begin, stages[0], n) if stages else None
        if norm == np.inf:
            # Among the ellipsoids sum dx_i^2 / p_i <= 1, sum 1 / p_i <= 1 around the cube, least trace after the map.
            a = first[0] if first is not None else np.eye(n) if begin.array is None else begin.array
            columns = np.sqrt(np.square(a).sum(axis=0))
            columns = np.maximum(columns, 1e-3 * columns.max(initial=0.0) + 1e-300)
            ball = proof.ball(n, np.minimum(columns.sum() / columns, 2.0**60))
        start, e = begin.map_diagonal(ball)
    start = start + (e[0] + 4 * U * float(ellipsoids.frobenius(start)[0])) * np.eye(start.shape[1])
    return _Ready(whole, view, stages, start, first, guarantee, failure, notes)


def _first_map(begin: Matrix, stage: Stage, size: int) -> tuple[np.ndarray, float]:
    """(A, error): x -> y of the first tap is within `error` (Frobenius norm) of A; x has `size` entries."""
    rows, n = stage.T.array, stage.neurons
    if rows is None or begin.array is None:
        one = begin if rows is None else stage.T
        return (np.eye(n, size) if one.array is None else one.array[:n]), one.error
    product = rows[:n] @ begin.array
    wrong = 2 * gamma(len(begin.array) + 4) * stage.T.size * begin.size
    behind, ahead = 2 * stage.T.error * (begin.size + begin.error), 2 * begin.error * stage.T.size
    return product, add_up(wrong, behind, ahead)


def _fits(form: LureForm, wide: int, word: str) -> None:
    """ValueError if the rows from all sources to the cut need more than `LIMIT`, unless guarantee="verified"."""
    cut = split(form, wide)[0]
    need = 2 * 8 * cut.num_outputs * (form.in_size + sum(tap.size_out for tap in cut.taps))
    if word == "auto" and need > LIMIT:
        raise ValueError(f"the bound of the wide front would take {need / 2**30:.1f} GiB")
