"""The engines behind local bounds: preparation once per form, and the recursion around the examples.

Three ways to bound a network on the balls around examples:

    ellipsoids   the whole network by `ellipsoids`, verified; as wide as memory allows
    hybrid       everything up to the last wide tap as a whole, by LipLT (`hybrid_start`), and `ellipsoids` behind
    LipLT        local LipLT (`liplt`), probabilistic, of any width

On wide networks none of them is better on all examples, so all that apply run, the cheapest one first, and every
example keeps its better result (`bounded`).
"""

from __future__ import annotations

import contextvars
import copy
import functools
import math
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.inputs import Box
from lipbounds._form.lure import LureForm
from lipbounds._gain.memory_budget import TooLarge, of_ellipsoids, show
from lipbounds._gain.wide_blocks import LIMIT
from lipbounds._lipsdp import proof
from lipbounds._lipsdp.state_matrices import TAIL, first_tap, hybrid_start, split
from lipbounds._local import box as _localbox
from lipbounds._local import ellipsoids, liplt
from lipbounds._local.ellipsoids import Thin, Values
from lipbounds._local.forward import Seen, logits
from lipbounds._local.maps import Matrix
from lipbounds._local.passes import Passes
from lipbounds._local.stages import Stage, stages_of
from lipbounds._norms.between import enlarged, stretch
from lipbounds._norms.rounding import U, add_up, require_gradual_underflow
from lipbounds._text.calls import FAILURES, reason
from lipbounds._text.device import placed, remembered, sharing
from lipbounds._text.progress import Pace, say, stoppable
from lipbounds._text.settings import usual_jax
from lipbounds._text.threads import one_blas_thread
from lipbounds._triangle.recursion import FAILURE, Request
from lipbounds.results import NORM_NAMES

_MOST_OUTPUTS = 4096  # of a local bound, which holds K x K blocks per example
_WORK = 6e10  # operations of ellipsoids around one example, run without being asked for
_CHUNK = 2**23  # numbers in the ellipsoids of one chunk of examples
_NAMES = {"ellipsoids": "ellipsoids", "hybrid": "ellipsoids behind the wide front", "LipLT": "local LipLT"}
_SINGLE = 512  # width from which radii are searched in float32
_SMALL = 1e-9  # error of a factor, relative to its shortest row
_WIDE_CHUNK, _SIDE = 2**25, 64  # entries of the rows of a chunk, and its examples, in local LipLT


@dataclass(frozen=True, eq=False)
class _Ready:
    """Computed once per form and reused for all examples.

    whole: the elementwise view; view: that of what is behind a wide front (its taps are the last ones of whole), or
    whole; None in both for the form itself, with which this is kept: nothing here may keep it alive. stages: of view.
    start (1, d, d) of the first state over the unit ball; first (A, error): A x is the first y, where known.
    front: what local LipLT needs, in place of stages and start. ball (n,): the unit ball has sum x_i^2 / ball_i <= 1,
    where the ellipsoids are those of the whole network.
    """

    whole: LureForm | None
    view: LureForm | None
    stages: tuple[Stage, ...]
    start: np.ndarray | Thin
    first: tuple[np.ndarray, float] | None
    guarantee: str
    failure: float
    notes: tuple[str, ...]
    front: liplt.Front | None = None
    ball: np.ndarray | None = None

    @functools.cached_property
    def single(self) -> tuple[tuple[Stage, ...], np.ndarray | Thin]:
        """Stages and start in float32, for a search."""
        start = self.start.single if isinstance(self.start, Thin) else self.start.astype(np.float32)
        return tuple(stage.single for stage in self.stages), start

    @property
    def widest(self) -> int:
        """The number of rows of the largest ellipsoid."""
        start = self.start.b if isinstance(self.start, Thin) else self.start
        return max(start.shape[1], *(s.rows for s in self.stages)) if self.stages else start.shape[1]


_READY: weakref.WeakKeyDictionary[LureForm, dict[Any, tuple[_Ready, list[str]]]] = weakref.WeakKeyDictionary()


class NoEngineError(ValueError):
    """No engine can bound this network around examples; only the bound of the whole network applies."""


def ways(form: LureForm, norm: float, guarantee: str, memory: int | None = None) -> tuple[str, ...]:
    """The engines that apply to a form, cheapest first.

    Ellipsoids of a network that is wider than `TAIL` somewhere are among them where those of one example fit the
    memory, in bytes; without a budget, where they take at most `LIMIT` bytes and `_WORK` operations. In l-inf they are
    the only ones where they fit; elsewhere the others bound the network on the l2 balls around the l-inf balls.

    Raises:
        ValueError: norm 1, an unknown guarantee; NoEngineError where no engine applies.
    """
    if norm == 1:
        raise ValueError(
            "local bounds are for norm 2 and inf, not 1; a radius in norm 2 is one in norm 1, too"
        )
    if guarantee not in ("auto", "verified"):
        raise ValueError(f"guarantee must be 'auto' or 'verified' for local bounds, got {guarantee!r}")
    if form.num_outputs > _MOST_OUTPUTS:
        raise NoEngineError(
            f"local bounds are for at most {_MOST_OUTPUTS} outputs, this network has {form.num_outputs}: keep the "
            "outputs that matter, or use the bound of the whole network (lb.liplt)"
        )
    cut = first_tap(form, TAIL)
    if not cut:
        return ("ellipsoids",)
    refused = too_large(form, memory)
    found = () if refused else ("ellipsoids",)
    if norm != 2 and found:
        return found
    if guarantee == "verified":
        return ("hybrid", *found)
    # behind the last tap nothing is left to be bounded locally
    return (*(() if cut == len(form.taps) else ("hybrid",)), *found, "LipLT")


def too_large(form: LureForm, memory: int | None) -> str:
    """Why the ellipsoids of a wide network are left out; empty where they are not."""
    need, work = of_ellipsoids(elementwise_view(form))
    if need > (LIMIT if memory is None else memory):
        limit = (
            f"more than {show(LIMIT)}: give memory=..."
            if memory is None
            else f"more than memory={show(memory)}"
        )
        return f"ellipsoids of this network take about {show(need)} for each example, {limit}"
    if memory is None and work > _WORK:
        return (
            f"ellipsoids of this network take about {work:.1g} operations for each example and ball, and are run if "
            f"they are asked for by memory=..., at least {show(need)}"
        )
    return ""


@dataclass(frozen=True)
class Bounded:
    """Guarantee and notes of the engines that were used.

    Guarantees and notes of the engines whose bounds are in the result, the probability that any of them fails, and why
    other engines are not in it. broken: the engines that ended with an error.
    """

    guarantees: tuple[str, ...]
    failure: float
    notes: tuple[str, ...]
    broken: tuple[str, ...] = ()


def bounded(
    form: LureForm,
    norm: float,
    x: np.ndarray,
    use: Callable[[Around], None],
    *,
    guarantee: str,
    seed: int,
    box: Box | None,
    memory: int | None = None,
) -> Bounded:
    """use(around) with every engine that applies, cheapest first.

    `use` keeps the better result of every example and marks in `around.used` the rows that this engine gave. Results
    of one engine stay if another fails, which becomes a note.

    Raises:
        NoEngineError: all fail and none gave any example a result; MemoryError as it comes.
    """
    names, ran, failed = ways(form, norm, guarantee, memory), [], []
    for name in names:
        try:
            around = Around(form, norm, x, guarantee=guarantee, seed=seed, box=box, way=name, memory=memory)
            ran.append(around)
            use(around)
        except (*FAILURES, TooLarge) as error:
            failed.append((name, error))
    if len(failed) == len(names) and not any(around.used.any() for around in ran):
        first = failed[0][1]
        if isinstance(first, MemoryError):
            raise first
        raise NoEngineError(f"local bounds failed: {reason(first)}") from first
    # an engine that improved no example is not part of the result
    kept = [around for around in ran if around.used.any()]
    notes = list(dict.fromkeys(n for around in kept or ran[: len(names) == 1] for n in around.notes))
    if len(kept) > 1:
        better = int(kept[-1].used.sum())
        notes.append(f"every example uses the better engine: {_NAMES[kept[-1].way]} for {better} of {len(x)}")
    if memory is not None and "ellipsoids" not in names:
        notes.append(too_large(form, memory))
    notes += [f"without {_NAMES[name]}, which failed: {reason(error)}" for name, error in failed]
    return Bounded(
        tuple(around.guarantee for around in kept),
        min(sum(around.failure for around in kept), 1.0),
        tuple(notes),
        tuple(name for name, _ in failed),
    )


class Around:
    """One engine applied around given examples, for several eps.

    Args:
        seed: of the random start vectors of probabilistic norms.
        box: (lower, upper) of the inputs that count, from `check_box`.
        way: one of `ways`, None for the first.
        memory: bytes of the ellipsoids of all examples that are bounded at the same time, `LIMIT` if None.

    used (N,) marks the examples whose result this engine gave; parts share it. stretch: what constants of `outputs` and
    `estimates` have to be multiplied by (`enlarged`), as they are in l2 where the engine is, whatever the norm.
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
        memory: int | None = None,
    ) -> None:
        require_gradual_underflow()
        self.way = ways(form, norm, guarantee, memory)[0] if way is None else way
        # the others are in l2: B_inf(x, eps) lies in B_2(x, eps sqrt(n))
        own = norm if self.way == "ellipsoids" else 2.0
        self.stretch = stretch(form.in_size, own, norm)
        self.memory = LIMIT if memory is None else memory
        kept = {} if form.assumed else _READY.setdefault(form, {})
        # only the bound of the front depends on more than the form
        wanted = own, self.way, *((guarantee, seed) if self.way == "hybrid" else ())
        ready = remembered(kept, wanted, lambda: _ready(form, own, self.way, guarantee, seed))
        self.form, self.ready = form, ready
        self.whole = form if ready.whole is None else ready.whole
        self.view = form if ready.view is None else ready.view
        self.guarantee, self.failure, self.notes = ready.guarantee, ready.failure, ready.notes
        if own != norm:
            around = f"in l2, on balls larger by sqrt({form.in_size}), which hold those in {NORM_NAMES[norm]}"
            self.notes = (*self.notes, around)
        self.seed = seed
        self.norm, self.x, self.box = own, x, box
        self.used = np.zeros(len(x), bool)
        if ready.front is not None:
            self.failure = min(1.0, FAILURE * len(x))

    def part(self, rows: slice) -> Around:
        """The same for these examples only; pre-activations are kept for one chunk at a time."""
        some = copy.copy(self)
        some.x, some.used = self.x[rows], self.used[rows]  # views, so marks in the part are marks here
        for kept in ("values", "passes"):
            some.__dict__.pop(kept, None)
        return some

    z: np.ndarray  # (N, K) logits, approximate

    @functools.cached_property
    def values(self) -> Values:
        ready, seen = self.ready, Seen()
        self.z = logits(self.whole, self.x, seen)[0]
        seen = seen[len(self.whole.taps) - len(self.view.taps) :]
        y, error = tuple(y for y, _ in seen), tuple(e for _, e in seen)
        ends = [ellipsoids.slopes_between(self.view, s.tap, y[s.tap], y[s.tap]) for s in ready.stages]
        # derivatives at the examples, until a call replaces them by the middles of the slope intervals
        slope = tuple((a + b) / 2 for a, b in ends)
        if self.way != "ellipsoids" or not first_tap(self.form, TAIL):
            return Values(y, error, slope)
        return Values(y, error, slope, tuple(np.full_like(a, np.nan) for a in y))

    @functools.cached_property
    def passes(self) -> Passes:
        """The recursions, in place of a front."""
        ready, values = self.ready, self.values
        return Passes(self.view, (ready.stages, ready.start), ready.single, values, self.z, self._first)

    def chunks(self, count: int) -> list[slice]:
        ready = self.ready
        if ready.front is not None:
            form = self.view
            width = form.num_outputs * (form.in_size + sum(tap.size_out for tap in form.taps))
            size = 1 << (max(1, min(_SIDE, _WIDE_CHUNK // width)).bit_length() - 1)
        else:
            size = max(1, _CHUNK // ready.widest**2)
        return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]

    def workers(self) -> int:
        """Chunks of examples that are bounded at the same time."""
        cores = os.cpu_count() or 1
        if self.ready.front is not None:
            return cores
        return max(1, min(cores, self.memory // max(of_ellipsoids(self.view)[0], 1)))

    def each(self, work: Callable[[Around, slice], None], what: str) -> None:
        """work(part, rows) for every chunk, in parallel on all cores, as BLAS threads do not help small matrices.

        The devices of this process take chunks in turn. Neither their number nor their order changes a chunk.
        """
        count, done = len(self.x), 0
        parts, devices, pace = self.chunks(count), sharing(), Pace()

        def one(rows: slice, device: Any) -> None:
            with usual_jax(), placed(device):  # settings are per thread
                work(self.part(rows), rows)

        with one_blas_thread(), ThreadPoolExecutor(self.workers()) as pool, stoppable():
            contexts = [contextvars.copy_context() for _ in parts]
            try:
                running = [
                    pool.submit(here.run, one, rows, devices[i % len(devices)])
                    for i, (here, rows) in enumerate(zip(contexts, parts, strict=True))
                ]
                for rows, task in zip(parts, running, strict=True):
                    task.result()
                    done += rows.stop - rows.start
                    say(f"{what}: {done} of {count} examples{pace(done, count)}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    @np.errstate(all="ignore")  # entries that are not finite give no bound
    def outputs(
        self,
        rows: Any,
        eps: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        call: int = 0,
        **options: Any,
    ) -> np.ndarray:
        """(N, J, K, K) for radius eps around rows: the constant of a' z is at most `stretch` sum_j sqrt(a' S_j a).

        labels: (N,) classes whose margins matter, against the example itself; None is all outputs and all pairs of
        points. call: which call about these examples it is, from 0. options: of `Passes.proved`, from ellipsoids.
        """
        anchored = labels is not None
        ready, eps = self.ready, enlarged(eps, self.stretch)
        if ready.front is not None:
            values = self.values.rows(rows)
            rng = np.random.default_rng([self.seed, call])
            share = FAILURE / ((call + 1) * (call + 2))  # the sum over all calls is FAILURE
            size = 1 << (len(eps) - 1).bit_length()  # few shapes to compile
            pad = np.minimum(np.arange(size), len(eps) - 1)
            out = liplt.grams(
                self.form, ready.front, values.rows(pad), eps[pad], anchored=anchored, failure=share, rng=rng
            )[: len(eps)]
        else:
            out = self.passes.proved(self._places(rows), eps, labels, **options)[:, None]
        return out

    @np.errstate(all="ignore")
    def estimates(self, rows: Any, eps: np.ndarray, *, labels: np.ndarray | None = None) -> np.ndarray:
        """As `outputs`, about, from float32 recursions: nothing is proved. Not of local LipLT."""
        return self.passes.estimated(self._places(rows), enlarged(eps, self.stretch), labels)[:, None]

    def _places(self, rows: Any) -> np.ndarray:
        return np.arange(len(self.x))[rows]

    @property
    def improves(self) -> bool:
        """Whether a call looks for better multipliers: of wide networks, by ellipsoids."""
        return self.ready.front is None and self.passes.wide

    @property
    def in_single(self) -> bool:
        """Whether a search for radii is in float32: where that is faster and only the last ball needs a proof."""
        return self.ready.front is None and self.ready.widest >= _SINGLE

    def _first(self, rows: Any, eps: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """How far the first pre-activations can fall and rise; None where the ellipsoid is as good."""
        if self.ready.first is None or (self.norm == 2 and self.box is None):
            return None
        room = _localbox.rooms(self.x[rows], self.box)
        return _localbox.reach(*self.ready.first, eps, self.norm, *room)


def _ready(form: LureForm, norm: float, way: str, word: str, seed: int) -> _Ready:
    if way == "LipLT":
        note = f"wider than {TAIL}: local LipLT, each example with probability {FAILURE:g} of a failure"
        front = liplt.Front(form)
        word = "assumed" if form.assumed else "probabilistic"
        return _Ready(None, None, (), np.zeros((1, 0, 0)), None, word, FAILURE, (note,), front)
    return _behind_front(form, norm, word, seed) if way == "hybrid" else _of_whole(form, norm)


def _behind_front(form: LureForm, norm: float, word: str, seed: int) -> _Ready:
    """For the ellipsoids behind a wide front, which LipLT bounds as a whole."""
    wide = first_tap(form, TAIL)
    _fits(form, wide, word)
    _, s, word, failure = hybrid_start(form, wide, Request(norm, word, seed))
    # the ellipsoid is that of the tail's input, in the order in which the tail's view reads it
    whole, ahead, view = (elementwise_view(f, shared=False) for f in (form, *split(form, wide)))
    begin, stages = stages_of(view)
    start = _raised(*begin.both(s[None]))
    # slopes of the tail's taps are taken around their values in the whole network
    taps = [[(t.path, t.name, t.expr, t.size_in) for t in part.taps] for part in (whole, ahead, view)]
    if taps[0] != taps[1] + taps[2]:
        raise ValueError("the taps behind the wide front could not be matched: use the global bound")
    notes = (f"the first {wide} taps are bounded as a whole, by LipLT ({word})",)
    guarantee = "assumed" if form.assumed else word
    kept = None if whole is form else whole
    return _Ready(kept, None if view is form else view, stages, start, None, guarantee, failure, notes)


def _of_whole(form: LureForm, norm: float) -> _Ready:
    """For the ellipsoids of the whole network."""
    view, n = elementwise_view(form), form.in_size
    begin, stages = stages_of(view)
    first = _first_map(begin, stages[0], n) if stages else None
    if norm == np.inf:
        ball = _around_cube(begin.dense(n) if first is None else first[0], stages)
    else:
        ball = np.ones(n)
    thin = _thin(begin, stages[0], ball) if stages else None
    start = _raised(*begin.of_diagonal(ball)) if thin is None else thin
    kept = None if view is form else view
    word = "assumed" if form.assumed else "verified"
    return _Ready(kept, kept, stages, start, first, word, 0.0, (), ball=ball)


def _around_cube(rows: np.ndarray, stages: Sequence[Stage]) -> np.ndarray:
    """(n,) p of the ellipsoid sum dx_i^2 / p_i <= 1, sum 1 / p_i <= 1, around the cube, of least trace after a map.

    rows (m, n): the map, the first of the network; its neurons count by their effect.
    """
    if stages:
        live, effect = stages[0].live, stages[0].effect[:, None]
        rows = rows * (effect if live is None else np.where(live[:, None], effect, 0.0))
    rows = rows / (float(np.abs(rows).max(initial=0.0)) or 1.0)
    columns = np.sqrt(np.square(rows).sum(axis=0))
    columns = np.maximum(columns, 1e-3 * columns.max(initial=0.0) + 1e-300)
    return proof.ball(rows.shape[1], np.minimum(columns.sum() / columns, 2.0**60))


def _raised(s: np.ndarray, e: np.ndarray) -> np.ndarray:
    """S + e I (1, d, d), the sum on the diagonal rounded up."""
    s = np.array(s)
    diagonal = np.einsum("nii->ni", s)
    diagonal += (e[:, None] + 4 * U * np.abs(diagonal)) * (1 + 4 * U)
    return s


def _thin(begin: Matrix, stage: Stage, ball: np.ndarray) -> Thin | None:
    """The first pre-activations as a factor, where they come from few inputs and are known well; else None."""
    n, k = stage.neurons, ball.size
    if stage.lives_on or stage.gap or not 0 < 2 * k < n or not (begin.array is None or stage.T.array is None):
        return None
    known = stage.T if begin.array is None else begin
    b, error = known.dense(k) * np.sqrt(ball), known.error * math.sqrt(float(ball.max())) * (1 + 4 * U)
    lengths = ellipsoids.column_norms(b.T[None])[0]
    if error > _SMALL * lengths[lengths > 0].min(initial=np.inf):
        return None
    return Thin(b, 0.0 if (ball == 1.0).all() else 4 * U, error)


def _first_map(begin: Matrix, stage: Stage, size: int) -> tuple[np.ndarray, float]:
    """(A, error): x -> y of the first tap is within `error` (Frobenius norm) of A; x has `size` entries."""
    known = begin.dense(size)
    product = stage.T.ahead(known[None])[0][: stage.neurons]
    return product, add_up(
        stage.T.wrong * float(ellipsoids.frobenius(known[None])[0]), stage.T.size * begin.error
    )


def _fits(form: LureForm, wide: int, word: str) -> None:
    """ValueError if the rows from all sources to the cut need more than `LIMIT`, unless guarantee="verified"."""
    cut = split(form, wide)[0]
    need = 2 * 8 * cut.num_outputs * (form.in_size + sum(tap.size_out for tap in cut.taps))
    if word == "auto" and need > LIMIT:
        raise ValueError(f"the bound of the wide front would take {need / 2**30:.1f} GiB")
