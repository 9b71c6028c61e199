"""Lipschitz constants near single inputs: tighter than the global one, as most slopes are known there.

`local(form, X, eps)` bounds, for every example x of X and all u, v in the ball B(x, eps),

    ||f(u) - f(v)|| <= L ||u - v||,     |(f_i - f_j)(u) - (f_i - f_j)(v)| <= L_ij ||u - v||,

by the ellipsoid recursion (`ellipsoid`) with the slopes that the ranges of the pre-activations in that ball allow
(`_localrun`). As eps goes to 0 the constants tend to the norms of the Jacobian at x. For certified radii one of the two
points is x itself, and slopes anchored there are smaller still: `certified_radius(..., local=True)`.
"""

from __future__ import annotations

import copy
import functools
import os
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from threadpoolctl import threadpool_limits

from lipbounds import _localbox, _localrun, _localwide, _proof
from lipbounds._floats import exact_products, plain_errors
from lipbounds._html import Html, element
from lipbounds._localrun import Matrix, Stage, Values
from lipbounds._rounding import U, add_up, gamma, require_gradual_underflow, sqrt_up
from lipbounds._sequence import WIDEST, first_tap, hybrid_start, split
from lipbounds._tables import printable, seconds_text, show
from lipbounds._triangle import FAILURE, Request
from lipbounds._views import elementwise_view
from lipbounds.bound import NORM_NAMES, UpperBound, check_norm, weakest
from lipbounds.liplt import liplt
from lipbounds.lure import LureForm, fingerprint

_MOST_OUTPUTS = 4096  # of a local bound, which holds K x K blocks per example
_CHUNK = 2**23  # numbers in the ellipsoids of one chunk of examples
_DIRECTIONS = 12  # that D is chosen for
_CALLS = 2  # of `local`
_WIDE_CHUNK, _SIDE = 2**25, 64  # entries of the rows of a chunk, and its examples, in local LipLT
Progress = Callable[[str], None]
Box = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class LocalBounds:
    """Upper bounds of the Lipschitz constants on the balls around N examples.

    Args:
        value: (N,) of the network, l2 to l2 (norm inf: l-inf to l-inf).
        pairwise: (N, K, K), of the differences of two outputs; None unless asked for.
        eps: (N,) radii of the balls, in the units of the traced function's input.
        norm: 2 or inf, of the balls and of the constants.
        guarantee: "verified", "probabilistic" (a wide front) or "assumed".
        failure_probability: of all of them together.
    """

    value: np.ndarray
    eps: np.ndarray
    norm: float
    guarantee: str
    seconds: float
    pairwise: np.ndarray | None = None
    failure_probability: float = 0.0
    notes: tuple[str, ...] = field(default=())
    network: str | None = None
    method: str = "local"

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, i: int) -> UpperBound:
        """The bound around one example. It holds in its ball only, so it is of no network as a whole."""
        return UpperBound(
            value=float(self.value[i]),
            norm=self.norm,
            guarantee=self.guarantee,
            method=f"local, eps {self.eps[i]:g}",
            seconds=self.seconds / len(self),
            pairwise=None if self.pairwise is None else self.pairwise[i],
            failure_probability=self.failure_probability,
            notes=(*self.notes, f"holds within {self.eps[i]:g} of example {i} only"),
            network=f"local to example {i}",
        )

    def __iter__(self) -> Iterator[UpperBound]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        head = f"LocalBounds: {len(self)} examples, {NORM_NAMES[self.norm]}, {self.guarantee}"
        if not len(self):
            return head
        low, middle, high = np.quantile(self.value, (0, 0.5, 1))
        radii = f"{self.eps.min():g}" if self.eps.min() == self.eps.max() else "one per example"
        lines = [
            head,
            f"  eps      {radii}",
            f"  L <=     {show(low, 'up')} to {show(high, 'up')}, median {show(middle, 'up')}",
            f"  time     {seconds_text(self.seconds)}",
        ]
        return "\n".join([*lines, *(f"  note     {printable(note)}" for note in self.notes)])

    def _repr_html_(self) -> Html:
        return element("pre", repr(self))


@plain_errors
@exact_products
def local(
    form: LureForm,
    X: Any,
    eps: Any,
    *,
    norm: Any = 2,
    pairwise: bool = False,
    bound: UpperBound | None = None,
    guarantee: str = "auto",
    seed: int = 0,
    box: Any = None,
    progress: Progress | None = None,
) -> LocalBounds:
    """Upper bounds of the Lipschitz constants of the network on the balls B(x, eps) around the examples of X.

    Args:
        form: from `lb.trace`, with concrete weights.
        X: (N, *in_shape), floating point, in the units of the traced function.
        eps: a number > 0, or (N,) of them.
        norm: 2 or inf, of the balls and of the constants.
        pairwise: also the constants of all differences of two outputs.
        bound: a bound of the whole network, which holds in every ball, too: no value is above it. None is `lb.liplt`.
        guarantee: "auto" or "verified". Networks nowhere wider than 1100 get ellipsoids, every rounding covered. Wider
            ones get local LipLT (`_localwide`, norm 2), probabilistic; with "verified" they are treated as a whole up
            to there (verified LipLT, which can take minutes) and locally behind.
        seed: of the random start vectors of probabilistic norms.
        box: (lower, upper), numbers or arrays of the shape of an input: only points inside count, (0, 1) for pixels.
            The first layer's ranges become smaller where X is near its faces; networks wider than 1100 ignore it.
        progress: called with a line of text after every chunk.

    Raises:
        TypeError: not a concrete form.
        ValueError: shapes, values that are not finite, eps not > 0, norm 1, an unknown guarantee, too many outputs.
    """
    from lipbounds.radius import check_inputs

    begin = time.perf_counter()
    if not isinstance(form, LureForm):
        raise TypeError(f"local needs a LureForm from lb.trace, got {type(form).__name__}")
    x = check_inputs(form, X)
    radii = check_eps(eps, len(x))
    p = check_norm(norm)
    inside = check_box(box, x)
    around = Around(form, p, x, guarantee=guarantee, seed=seed, box=inside)
    whole = liplt(form, norm=p, pairwise=pairwise, guarantee=guarantee, seed=seed) if bound is None else bound
    if not isinstance(whole, UpperBound):
        raise TypeError(f"a bound of the whole network is an UpperBound, got {type(whole).__name__}")
    if whole.norm != p or (whole.network is not None and whole.network != fingerprint(form)):
        raise ValueError("`bound` is in another norm, or was computed from another network")
    classes = form.num_outputs
    value = np.full(len(x), np.inf)
    pairs = np.full((len(x), classes, classes) if pairwise else (0, 1, 1), np.inf)

    def one_chunk(near: Around, part: slice) -> None:
        # a second call knows the slopes of the first; local LipLT would learn nothing
        for call in range(1 if near.ready.front is not None else _CALLS):
            out = near.outputs(slice(None), radii[part], call=call)
            for i, blocks in zip(range(part.start, part.stop), out, strict=True):
                if not np.isfinite(blocks).all():
                    continue  # the bound of the whole network stands
                if p == 2:
                    found = add_up(*(_largest_root(block) for block in blocks))
                else:
                    roots = np.sum([_proof.class_roots(block, 0) for block in blocks], axis=0)
                    found = float(roots.max(initial=0.0))
                value[i] = min(value[i], found)
                if pairwise:
                    roots = sum(_proof.pair_roots(block, 0) for block in blocks) * (1 + gamma(len(blocks)))
                    pairs[i] = np.minimum(pairs[i], roots)

    around.each(one_chunk, "local bounds", progress)
    value = np.minimum(value, whole.value)
    if pairwise and whole.pairwise is not None:
        pairs = np.minimum(pairs, whole.pairwise)
    return LocalBounds(
        value,
        radii,
        p,
        weakest([around.guarantee, whole.guarantee]),
        time.perf_counter() - begin,
        pairs if pairwise else None,
        min(around.failure + whole.failure_probability, 1.0),
        (*around.notes, *form.notes, *box_notes(inside)),
        fingerprint(form),
    )


def box_notes(box: Box | None) -> tuple[str, ...]:
    if box is None:
        return ()
    low, high = (
        f"{float(end.flat[0]):g}" if end.size and (end == end.flat[0]).all() else "..." for end in box
    )
    return (f"for inputs inside the box [{low}, {high}] only",)


def _largest_root(matrix: np.ndarray) -> float:
    """An upper bound of the root of the largest eigenvalue; where only the allowance for rounding is left, by the
    Frobenius norm."""
    size = float(_localrun.frobenius(matrix[None])[0])
    return sqrt_up(size) if size < 2.0**-450 else _proof.largest_root(matrix, 0)


def check_eps(eps: Any, count: int) -> np.ndarray:
    """(N,) radii > 0, finite."""
    radii = np.asarray(eps, np.float64)
    if radii.shape not in ((), (count,)):
        raise ValueError(f"eps must be a number or hold {count} numbers, got shape {radii.shape}")
    if not (np.isfinite(radii).all() and (radii > 0).all()):
        raise ValueError("eps must be finite numbers > 0")
    return np.broadcast_to(radii, count).copy()


def check_box(box: Any, x: np.ndarray) -> Box | None:
    """(lower, upper) in float64, numbers or of the shape of an input, with every row of x inside."""
    if box is None:
        return None
    try:
        low, high = (np.broadcast_to(np.asarray(end, np.float64), x.shape[1:]) for end in box)
    except (TypeError, ValueError):
        raise ValueError(f"box must be (lower, upper), numbers or arrays of shape {x.shape[1:]}") from None
    if not (low <= high).all():
        raise ValueError("box must be (lower, upper) with lower <= upper, not NaN")
    outside = ((x < low) | (x > high)).any(axis=tuple(range(1, x.ndim)))
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} of {len(x)} examples lie outside the box (the first is {int(outside.argmax())})"
        )
    return low, high


@dataclass(frozen=True, eq=False)
class _Ready:
    """What of a form does not depend on the examples.

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
    front: _localwide.Front | None = None


_READY: weakref.WeakKeyDictionary[LureForm, dict[tuple[float, str], _Ready]] = weakref.WeakKeyDictionary()


class Around:
    """The recursion around given examples, for several eps.

    Args:
        box: (lower, upper) of the inputs that count, from `check_box`.
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
    ) -> None:
        require_gradual_underflow()
        if norm == 1:
            raise ValueError("local bounds are for norm 2 and inf, not 1")
        if guarantee not in ("auto", "verified"):
            raise ValueError(f"guarantee must be 'auto' or 'verified' for local bounds, got {guarantee!r}")
        if form.num_outputs > _MOST_OUTPUTS:
            raise ValueError(
                f"local bounds are for at most {_MOST_OUTPUTS} outputs, this network has {form.num_outputs}: keep the "
                "outputs that matter, or use the bound of the whole network (lb.liplt)"
            )
        kept = {} if form.assumed else _READY.setdefault(form, {})
        wanted = norm, guarantee
        if wanted not in kept:
            kept[wanted] = _ready(form, norm, guarantee)
        self.ready = ready = kept[wanted]
        self.guarantee, self.failure, self.notes = ready.guarantee, ready.failure, ready.notes
        self.seed = seed
        self.norm, self.x, self.box = norm, x, box
        #: Shared by all parts: an entry for every bound that left the range of float64.
        self.overflows: list[int] = []
        if ready.front is not None:
            self.failure = min(1.0, FAILURE * len(x))

    def part(self, rows: slice) -> Around:
        """These examples alone: pre-activations are kept for one chunk at a time."""
        some = copy.copy(self)
        some.x = self.x[rows]
        some.__dict__.pop("values", None)
        return some

    @functools.cached_property
    def values(self) -> Values:
        from lipbounds.radius import Seen, logits

        ready, seen = self.ready, Seen()
        logits(ready.whole, self.x, seen)
        seen = seen[len(ready.whole.taps) - len(ready.view.taps) :]
        y, error = tuple(y for y, _ in seen), tuple(e for _, e in seen)
        ends = [_localrun.slopes_between(ready.view, s.tap, y[s.tap], y[s.tap]) for s in ready.stages]
        # the slopes are those of the derivatives there, until a call knows better
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

    def each(self, work: Callable[[Around, slice], None], what: str, progress: Progress | None) -> None:
        """work(part, rows) for every chunk, side by side on all cores: small matrices gain nothing from threads."""
        count, done = len(self.x), 0
        parts = self.chunks(count)

        def one(rows: slice) -> None:
            with jax.default_matmul_precision(
                "highest"
            ):  # the setting of a thread does not reach another one
                work(self.part(rows), rows)

        with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
            for part, _ in zip(parts, pool.map(one, parts), strict=True):
                done += part.stop - part.start
                if progress is not None:
                    progress(f"{what}: {done} of {count} examples")

    def outputs(
        self, rows: Any, eps: np.ndarray, *, labels: np.ndarray | None = None, call: int = 0
    ) -> np.ndarray:
        """(N, J, K, K) for radius eps around these rows: the constant of a' z is at most sum_j sqrt(a' S_j a).

        labels: (N,) classes whose margins matter, against the example itself; None is all outputs and all pairs of
        points. call: which call about these examples it is, from 0.
        """
        with np.errstate(all="ignore"):  # what is not finite is no bound
            out = self._outputs(rows, eps, labels, call)
        self.overflows += list(np.flatnonzero(~np.isfinite(out).all(axis=(1, 2, 3))))
        return out

    def _outputs(self, rows: Any, eps: np.ndarray, labels: np.ndarray | None, call: int) -> np.ndarray:
        anchored = labels is not None
        ready, values = self.ready, self.values.rows(rows)
        if ready.front is not None:
            rng = np.random.default_rng([self.seed, call])
            share = FAILURE / ((call + 1) * (call + 2))  # the sum over all calls is FAILURE
            size = 1 << (len(eps) - 1).bit_length()  # few shapes to compile
            pad = np.minimum(np.arange(size), len(eps) - 1)
            out = _localwide.grams(
                ready.front, values.rows(pad), eps[pad], anchored=anchored, failure=share, rng=rng
            )[: len(eps)]
        else:
            one, middles = _localrun.ellipsoids(
                ready.view,
                ready.stages,
                ready.start,
                values,
                eps,
                anchored=anchored,
                directions=self._directions(labels, len(eps)),
                first=self._first(rows, eps),
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
        signs = np.eye(classes)
        if classes > _DIRECTIONS:
            signs = np.random.default_rng(0).choice([-1.0, 1.0], (_DIRECTIONS, classes))
        if labels is None:
            return np.broadcast_to(signs, (count, *signs.shape))
        if classes == 1:
            return np.ones((count, 1, 1))
        own = np.zeros((count, 1, classes))
        own[np.arange(count), 0, labels] = 1.0
        return signs.sum(axis=1, keepdims=True) * own - signs


def _ready(form: LureForm, norm: float, word: str) -> _Ready:
    wide = first_tap(form, WIDEST)
    if wide and norm == 2 and word == "auto":
        note = f"wider than {WIDEST}: local LipLT, each example with probability {FAILURE:g} of a failure"
        front = _localwide.Front(form)
        word = "assumed" if form.assumed else "probabilistic"
        return _Ready(form, form, (), np.zeros((1, 0, 0)), None, word, FAILURE, (note,), front)
    whole = elementwise_view(form)
    guarantee, failure = "assumed" if form.assumed else "verified", 0.0
    notes: tuple[str, ...] = ()
    first = None
    if wide and norm != 2:
        raise ValueError(f"local bounds in l-inf are for networks nowhere wider than {WIDEST}")
    if wide:
        _, s, scale, word, failure = hybrid_start(form, wide, Request(norm, "verified"))
        guarantee = word if guarantee == "verified" else guarantee
        # the ellipsoid is of the tail's input, in its order: the tail's own view reads it
        view = elementwise_view(split(form, wide)[1])
        begin, stages = _localrun.stages(view)
        start, e = begin.map(np.ldexp(np.array(s), scale)[None])
        ahead = len(whole.taps) - len(view.taps)
        if any(
            a.expr != b.expr or a.size_in != b.size_in
            for a, b in zip(whole.taps[ahead:], view.taps, strict=True)
        ):
            raise ValueError("the taps behind the wide front cannot be told apart: use the global bound")
        notes = (f"the first {ahead} taps are bounded as a whole, by LipLT ({word})",)
    else:
        view, n = whole, form.in_size
        begin, stages = _localrun.stages(view)
        ball = np.ones(n)
        first = _first_map(begin, stages[0], n) if stages else None
        if norm == np.inf:
            # of the ellipsoids sum dx_i^2 / p_i <= 1, sum 1 / p_i <= 1 around the cube, the least trace behind the map
            a = first[0] if first is not None else np.eye(n) if begin.array is None else begin.array
            columns = np.sqrt(np.square(a).sum(axis=0))
            columns = np.maximum(columns, 1e-3 * columns.max(initial=0.0) + 1e-300)
            ball = _proof.ball(n, np.minimum(columns.sum() / columns, 2.0**60))
        start, e = begin.map_diagonal(ball)
    start = start + (e[0] + 4 * U * float(_localrun.frobenius(start)[0])) * np.eye(start.shape[1])
    return _Ready(whole, view, stages, start, first, guarantee, failure, notes)


def _first_map(begin: Matrix, stage: Stage, size: int) -> tuple[np.ndarray, float]:
    """(A, error): x -> y of the first tap is within `error` (Frobenius norm) of A; x has `size` entries."""
    rows, n = stage.T.array, stage.neurons
    if rows is None or begin.array is None:
        one = begin if rows is None else stage.T
        return (np.eye(n, size) if one.array is None else one.array[:n]), one.error
    product = rows[:n] @ begin.array
    wrong = 2 * gamma(len(begin.array) + 4) * stage.T.size * begin.size
    return product, add_up(
        wrong,
        *(
            2 * e * size
            for e, size in ((stage.T.error, begin.size + begin.error), (begin.error, stage.T.size))
        ),
    )
