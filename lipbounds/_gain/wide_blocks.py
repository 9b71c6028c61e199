"""Norms of blocks too large for one dense proof, by the first of several methods that succeeds.

    a narrow cut      G = U V through few entries: a proof from the Gram matrix of the thin side, verified
    a banded proof    of a block of few entries near a diagonal, such as one or two convolutions, verified
    Golub-Kahan       products alone, probabilistic
    a proof           of the block formed within a limit of memory, verified
    product of steps  of the norms of the linear steps on the way, verified and loose; it always exists

A method that fails (a failure probability below the rounding of the products, no cut, no memory) is followed by the
next one, so every block gets a bound.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.linalg.lapack import dpstrf

from lipbounds._form.walk import walk
from lipbounds._gain import memory_budget
from lipbounds._gain.blocks import Forward, HostForm, Node, Pair, TapScaling
from lipbounds._gain.products import BlockProduct
from lipbounds._gain.side_by_side import side_by_side
from lipbounds._gain.step_paths import product_of_steps, product_rounding
from lipbounds._norms import banded_cholesky, cholesky, enclosures
from lipbounds._norms import matrices as norms
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.lanczos import golub_kahan
from lipbounds._norms.rounding import U, add_up, mul_up, sqrt_up, unscale_up
from lipbounds._norms.starts import CHECKED, STARTS, Known, SharedStarts, Starts
from lipbounds._text.device import remembered
from lipbounds._text.threads import one_blas_thread

#: Relative distance of upper and lower bound at which Golub-Kahan ends.
RTOL = 1e-3
#: Bytes that the parts of a cut, and a block formed for its proof, may take where no budget is given.
LIMIT = 2**31
#: Entries of a cut up to which its Gram matrix is formed.
WIDEST_CUT = 2048
_STEPS_SHARE = 2.0**-30  # of the failure probability of a block, for the norms of the steps in its rounding
_TINY = 1e-100  # matrix-free norms below this may have lost parts to underflow
_FEW = 8  # columns that tell how many entries a block has
_MANY = 2**19  # entries of a block above which its steps may be the cheaper way to multiply by it
_MARGIN = 2.0  # the operations may be more than was estimated
_TIGHT = 1.001  # a cut's proof is taken where it is within this factor of its own float estimate


class Bound(NamedTuple):
    """value >= ||G[target, source]||_2 with its guarantee, the way it was found, and the bytes that took."""

    value: float
    guarantee: str
    how: str
    need: int = 0


def wide_norm(
    host: HostForm,
    pair: Pair,
    scalings: Sequence[TapScaling],
    *,
    seed: int,
    failure: float,
    matrix_free: bool = False,
    max_steps: int = memory_budget.MOST_STEPS,
    limit: int = LIMIT,
) -> Bound:
    """An upper bound of ||G[target, source]||_2 with its guarantee and the way it was found.

    Args:
        matrix_free: Golub-Kahan before everything else.
        limit: bytes of what may be formed.
    """
    found = None if matrix_free else dict(quick_norms(host, [pair], scalings, limit=limit)).get(pair)
    if found is None:
        found = _attempt(partial(_by_search, host, pair, scalings, seed, failure, max_steps))
    return found or other_norm(
        host, pair, scalings, seed=seed, failure=failure, max_steps=max_steps, limit=limit
    )


def other_norm(
    host: HostForm,
    pair: Pair,
    scalings: Sequence[TapScaling],
    *,
    seed: int,
    failure: float,
    max_steps: int = memory_budget.MOST_STEPS,
    limit: int = LIMIT,
) -> Bound:
    """`wide_norm` where no `Search` succeeds: Golub-Kahan with all vectors kept, and what always gives a bound."""
    ways: list[Callable[[], Bound | None]] = [
        partial(_by_golub_kahan, host, *pair, scalings, seed, failure, max_steps),
        partial(_by_cut, host, *pair, scalings, limit),
        partial(_by_proof, host, *pair, scalings, limit),
    ]
    found = next((bound for bound in map(_attempt, ways) if bound is not None), None)
    return found or Bound(product_of_steps(host, *pair, scalings), "verified", "product of steps")


def quick_norms(
    host: HostForm, pairs: Sequence[Pair], scalings: Sequence[TapScaling], *, limit: int = LIMIT
) -> Iterator[tuple[Pair, Bound]]:
    """Verified bounds that cost little, of the pairs that have one: through a narrow cut, or by a banded proof.

    Where some pair has none, so that the bound of the network is probabilistic anyway, a banded proof must cost less
    than Golub-Kahan does.
    """
    left: list[Pair] = []
    for pair in pairs:
        cut = _remembered(
            host, pair, scalings, ("cut", limit), partial(cut_norm, host, pair, scalings, limit=limit)
        )
        if cut is not None:
            yield pair, cut
            continue
        left.append(pair)
    costs = [_band_cost(host, *pair, scalings) for pair in left]
    most = _CHEAP if all(cost <= _CHEAP for cost in costs) else _CHEAPER
    cheap = {pair: cost for pair, cost in zip(left, costs, strict=True) if cost <= most}

    def band(pair: Pair) -> Bound | None:
        way = partial(_by_proof, host, *pair, scalings, limit, _MARGIN * most.operations)
        return _remembered(host, pair, scalings, ("band", limit), partial(_attempt, way))

    seconds = sum(2e-7 * cost.entries + cost.operations / cholesky.DENSE_FLOPS for cost in cheap.values())
    with side_by_side(
        band, cheap, seconds=seconds, need=lambda pair: 6.0 * 16.0 * cheap[pair].entries
    ) as results:
        yield from ((pair, found) for pair, found in results if found is not None)


class _Cost(NamedTuple):
    entries: float
    operations: float

    def __le__(self, most: tuple[float, ...]) -> bool:
        return self.entries <= most[0] and self.operations <= most[1]


# What is a second or two where it makes all of a bound verified, and what is less than Golub-Kahan takes.
_CHEAP, _CHEAPER = _Cost(1e7, 6e10), _Cost(1e6, 5e9)


def _remembered(
    host: HostForm,
    pair: Pair,
    scalings: Sequence[TapScaling],
    how: tuple[str, int],
    way: Callable[[], Bound | None],
) -> Bound | None:
    """The bound of one way, or that it has none, kept with the form."""
    what, exponent = content(host, *pair, scalings)
    found, before = remembered(host.quick, (what, how), lambda: (way(), exponent))
    return None if found is None else found._replace(value=float(unscale_up(found.value, exponent - before)))


def _band_cost(host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling]) -> _Cost:
    """About how many entries a block has and how many operations a banded proof takes, from a few of its columns.

    If a share f of the entries is not zero because each output reads a window of an image, the band is about as wide as
    the share sqrt(f / 2) of the smaller side r, which makes f r^3 operations; a diagonal has none.
    """
    block = BlockProduct(host, source, target, scalings)
    m, n = block.shape
    few = np.linspace(0, n - 1, min(n, _FEW)).astype(np.int64)
    units = np.zeros((n, few.size))
    units[few, np.arange(few.size)] = 1.0
    count = np.count_nonzero(block.forward(units)) * (n / few.size)
    beside = max(count - max(m, n), 0.0)
    return _Cost(count, beside / (float(m) * n) * float(min(m, n)) ** 3)


def cut_norm(
    host: HostForm, pair: Pair, scalings: Sequence[TapScaling], *, limit: int = LIMIT
) -> Bound | None:
    """A verified bound through a narrow cut; None where there is no such cut, no memory for it, or no tight proof."""
    return _attempt(partial(_by_cut, host, *pair, scalings, limit))


def _attempt(way: Callable[[], Bound | None]) -> Bound | None:
    try:
        return way()
    except (ValueError, memory_budget.TooLarge, MemoryError):
        return None


# --- a narrow cut --------------------------------------------------------------------------------------------------


def narrow_cut(
    host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling]
) -> tuple[int, list[int]] | None:
    """(place, registers): everything from source to target passes these few registers before step `place`.

    The narrowest set that halves the smaller side of the block, of at most `WIDEST_CUT` entries; else None.
    """
    program = host.program
    reached = host.coming_from([source], scalings) & host.leading_to([target], scalings)
    first = max((program.tap_places[k] + 1 for k in source), default=0)
    last = min((program.tap_places[k] for k in target), default=len(program.steps))
    least = min(host.block_shape((source, target))) // 2
    best: tuple[int, list[int]] | None = None
    smallest = min(least, WIDEST_CUT) + 1
    for place in range(first, last + 1):
        across = [r for r in program.alive(place) if r in reached]
        width = sum(program.sizes[r] for r in across)
        if across and width < smallest:
            smallest, best = width, (place, across)
    return best


def _by_cut(
    host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling], limit: int
) -> Bound | None:
    """||U V|| <= sqrt(||U C||^2 + e ||U||^2) with C C' + e I >= V V', C the float square root of the Gram matrix."""
    cut = narrow_cut(host, source, target, scalings)
    if cut is None:
        return None
    place, registers = cut
    width = sum(host.program.sizes[r] for r in registers)
    rows, columns = host.block_shape((source, target))
    need = 4 * 8 * width * (rows + columns)
    if need > limit:
        return None
    alive, held = host.leading_to([target], scalings), memory_budget.Watched(limit)
    if not source:
        held[0] = Enclosure(sp.eye_array(columns, format="csr"))
    front = Forward(host, columns, scalings, alive, host.starts(source, True))
    walk(host.program, front, held, places=range(place))
    v = front.join(registers, held) if any(r in held for r in registers) else None
    back = Forward(host, width, scalings, alive, {})
    held = memory_budget.Watched(limit)
    for r, part in back.split(Enclosure(sp.eye_array(width, format="csr")), registers):
        held[r] = part
    walk(host.program, back, held, places=range(place, len(host.program.steps)))
    u = back.at(target, held)
    if u is None or v is None:
        return Bound(0.0, "verified", "no path")
    value, guess = product_norm(u, v)
    if value > _TIGHT * guess:
        return None
    return Bound(value, "verified", f"Cholesky through {width} entries", need)


def product_norm(u: Enclosure, v: Enclosure) -> tuple[float, float]:
    """(upper bound of ||U V||_2, its float estimate) for U (m, r) and V (r, n) by r x r matrices."""
    vs, wrong = v.dense().with_error()
    gram = enclosures.multiply(vs, Enclosure(np.ascontiguousarray(vs.T)))
    root = _root(gram)
    square = enclosures.multiply(root, Enclosure(np.ascontiguousarray(root.T)))
    missing = enclosures.add(gram, enclosures.scale(square, rows=-np.ones(len(root))))
    known = norms.verified_norm(vs)
    e = add_up(enclosures.enclosure_norm(missing), mul_up(2.0, wrong, known), mul_up(wrong, wrong))
    small = enclosures.multiply(np.ascontiguousarray(root.T), u.T)
    a, whole = enclosures.enclosure_norm(small), enclosures.enclosure_norm(u)
    other = _root(enclosures.multiply(u.T.dense().midpoint_for_search(), u))
    joined = other.T @ root
    guess = math.sqrt(cholesky.top_eigenvalue(lambda x: joined.T @ (joined @ x), joined.shape[1]))
    return sqrt_up(add_up(mul_up(a, a), mul_up(e, whole, whole))), guess


def _root(gram: Enclosure) -> np.ndarray:
    """R with R R' close to the matrix, by Cholesky with pivots; the caller bounds the difference."""
    matrix = gram.dense().midpoint_for_search()
    least = 4.0 * U * float(matrix.diagonal().max(initial=0.0))
    factor, order, rank, _ = dpstrf(matrix, tol=least, lower=1)
    root = np.zeros_like(matrix)
    root[order - 1, :rank] = np.tril(factor)[:, :rank]
    return root


# --- matrix-free ---------------------------------------------------------------------------------------------------


@dataclass
class Search:
    """Bounds of ||G[target, source]||_2 from several starts of Golub-Kahan, probabilistic, better with every step.

    Blocks that differ by a power of two share their starts: `scale` takes those of `starts` to this block. Each search
    begins at the first step, so that its bounds do not depend on what other calls have asked for.
    """

    starts: SharedStarts
    scale: float
    cost: float  # entries of the vectors of a step
    place: int = 0
    known: Known = field(default_factory=Known)

    @property
    def lower(self) -> float:
        return self.known.lower * self.scale

    @property
    def upper(self) -> float:
        return self.known.upper * self.scale

    def advance(self, steps: int) -> None:
        """Do so many more steps, rounded up to a multiple of `CHECKED`."""
        self.place += -(-steps // CHECKED)
        self.known = self.starts.at(self.place)

    def bound(self) -> Bound | None:
        """What is known now; None where it proves nothing."""
        if not _TINY <= self.upper < math.inf:
            return None
        need = memory_budget.Budget.vectors(int(self.cost), STARTS * self.known.steps)
        return Bound(self.upper, "probabilistic", f"Golub-Kahan, {self.known.steps} steps", need)


def search(
    host: HostForm,
    pair: Pair,
    scalings: Sequence[TapScaling],
    *,
    seed: int,
    failure: float,
    max_steps: int = memory_budget.MOST_STEPS,
) -> Search:
    """The search of a block, kept with the form."""
    what, exponent = content(host, *pair, scalings)
    key = (what, seed, failure, max_steps)
    block = BlockProduct(host, *pair, scalings)
    if key not in host.searches:
        rounding = product_rounding(host, *pair, scalings, failure * _STEPS_SHARE)
        share = failure * (1.0 - _STEPS_SHARE)
        starts = Starts(
            *block.from_smaller_side, seed=seed, failure=share, rounding=rounding, max_steps=max_steps
        )
        host.searches.setdefault(key, (SharedStarts(starts), exponent))
    shared, before = host.searches[key]
    return Search(shared, math.ldexp(1.0, exponent - before), float(sum(block.shape)))


def size_exponent(source: Node, scalings: Sequence[TapScaling]) -> int:
    """n where the largest factor q of a source is in [2**n, 2**(n + 1)); 0 where q * 2**-n would lose digits."""
    sizes = [np.abs(scalings[k].q) for k in source]
    largest = max((float(q.max(initial=0.0)) for q in sizes), default=1.0)
    exponent = math.frexp(largest)[1] - 1 if largest > 0.0 else 0
    with np.errstate(under="ignore"):
        kept = all(np.array_equal(np.ldexp(np.ldexp(q, -exponent), exponent), q) for q in sizes)
    return exponent if kept else 0


def content(host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling]) -> tuple[Any, int]:
    """(key, exponent): blocks of one form with equal keys are equal up to the power of two of their exponents."""
    alive = host.coming_from([source], scalings) & host.leading_to([target], scalings)
    exponent = size_exponent(source, scalings)
    digest = hashlib.sha1()
    for k, tap in enumerate(host.program.taps):
        c, q, e = scalings[k].c, scalings[k].q, scalings[k].e
        passed = c is not None and alive & set(tap.inputs) and alive & set(tap.outputs)
        roles = {"q": (k in source, np.ldexp(q, -exponent)), "e": (k in target, e), "c": (passed, c)}
        for role, (here, factors) in roles.items():
            if here:
                digest.update(f"{role}{k}:{np.shape(factors)};".encode())
                digest.update(np.ascontiguousarray(factors).tobytes())
    return (source, target, digest.hexdigest()), exponent


def _by_search(
    host: HostForm,
    pair: Pair,
    scalings: Sequence[TapScaling],
    seed: int,
    failure: float,
    max_steps: int,
) -> Bound | None:
    steps = max_steps // STARTS  # each keeps STARTS vectors
    if steps < CHECKED:
        return None
    found = search(host, pair, scalings, seed=seed, failure=failure, max_steps=steps)
    with one_blas_thread():
        while not found.known.ended and found.known.excess > RTOL:
            found.advance(CHECKED)
    found.starts.release()
    return found.bound()


def _by_golub_kahan(
    host: HostForm,
    source: Node,
    target: Node,
    scalings: Sequence[TapScaling],
    seed: int,
    failure: float,
    max_steps: int,
) -> Bound | None:
    rounding = product_rounding(host, source, target, scalings, failure * _STEPS_SHARE)
    block = BlockProduct(host, source, target, scalings)
    upper, _, steps = golub_kahan(
        *block.from_smaller_side,
        seed=seed,
        failure=failure * (1.0 - _STEPS_SHARE),
        max_steps=max_steps,
        rounding=rounding,
    )
    if upper < _TINY:
        return None
    need = memory_budget.Budget.vectors(sum(block.shape), steps)
    return Bound(upper, "probabilistic", f"Golub-Kahan, {steps} steps", need)


# --- a proof of the block itself ------------------------------------------------------------------------------------


def _by_proof(
    host: HostForm,
    source: Node,
    target: Node,
    scalings: Sequence[TapScaling],
    limit: int,
    most: float = math.inf,
) -> Bound | None:
    block, _ = memory_budget.formed(host, source, target, scalings, limit)
    if block is None:
        return None
    plan = enclosures.enclosure_plan(block, limit)
    if plan.memory > limit or plan.flops > min(most, memory_budget.MOST_FLOPS):
        return None
    estimate = norm_estimate(host, (source, target), scalings, block, plan)
    value = norms.verified_norm(*block.with_error(), plan=plan, estimate=estimate)
    return Bound(value, "verified", plan.name, plan.memory)


def norm_estimate(
    host: HostForm,
    pair: Pair,
    scalings: Sequence[TapScaling],
    block: Enclosure,
    plan: banded_cholesky.Plan,
) -> Callable[[], float] | None:
    """The estimate of a block's norm for its proof, where the steps' products cost less than those with the block.

    A dense proof has its Gram matrix at hand. None leaves the estimate to the proof.
    """
    if plan.way == "dense" or block.stored < _MANY:
        return None
    product = BlockProduct(host, *pair, scalings)
    return product.norm_estimate if product.entries <= block.stored else None
