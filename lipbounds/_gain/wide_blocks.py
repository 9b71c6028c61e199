"""Norms of blocks too large for one dense proof, by the first of several methods that succeeds.

    a narrow cut      G = U V through few entries: a proof from the Gram matrix of the thin side, verified
    Golub-Kahan       products alone, probabilistic
    a proof           of the block formed within a limit of memory, verified
    product of steps  of the norms of the linear steps on the way, verified and loose; it always exists

A method that fails (a failure probability below the rounding of the products, no cut, no memory) is followed by the
next one, so every block gets a bound.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp

from lipbounds._form.lure import LureForm, propagate
from lipbounds._form.program import Op
from lipbounds._form.walk import Algebra, walk
from lipbounds._gain import memory_budget
from lipbounds._gain.blocks import Forward, HostForm, Node, TapScaling
from lipbounds._gain.step_matrices import StepMatrix
from lipbounds._norms import enclosures
from lipbounds._norms import matrices as norms
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.lanczos import golub_kahan
from lipbounds._norms.rounding import UNDERFLOW, add_up, gamma, mul_up, sqrt_up

#: Bytes that the parts of a cut, and a block formed for its proof, may take where no budget is given.
LIMIT = 2**31
#: Entries of a cut up to which its Gram matrix is formed.
WIDEST_CUT = 2048
_STEPS_SHARE = 2.0**-30  # of the failure probability of a block, for the norms of the steps in its rounding
_TINY = 1e-100  # matrix-free norms below this may have lost parts to underflow
_TIGHT = 1.001  # a cut's proof is taken where it is within this factor of its own float estimate


class Bound(NamedTuple):
    """value >= ||G[target, source]||_2 with its guarantee, the way it was found, and the bytes that took."""

    value: float
    guarantee: str
    how: str
    need: int = 0


def wide_norm(
    form: LureForm,
    host: HostForm,
    pair: tuple[Node, Node],
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
    source, target = pair
    free = partial(_by_golub_kahan, form, host, source, target, scalings, seed, failure, max_steps)
    cut = partial(_by_cut, host, source, target, scalings, limit)
    ways: list[Callable[[], Bound | None]] = [free, cut] if matrix_free else [cut, free]
    ways.append(partial(_by_proof, host, source, target, scalings, limit))
    found = next((bound for bound in map(_attempt, ways) if bound is not None), None)
    return found or Bound(product_of_steps(host, source, target, scalings), "verified", "product of steps")


def cut_norm(
    host: HostForm, pair: tuple[Node, Node], scalings: Sequence[TapScaling], *, limit: int = LIMIT
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
    least = min(host.node_size(source, source=True), host.node_size(target, source=False)) // 2
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
    columns = host.node_size(source, source=True)
    need = 4 * 8 * width * (columns + host.node_size(target, source=False))
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
    guess = float(np.linalg.norm(other.T @ root, 2))
    return sqrt_up(add_up(mul_up(a, a), mul_up(e, whole, whole))), guess


def _root(gram: Enclosure) -> np.ndarray:
    """R with R R' close to the matrix; the caller bounds the difference."""
    values, vectors = np.linalg.eigh(gram.dense().midpoint_for_search())
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


# --- matrix-free ---------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("source", "target", "transposed"))
def _block_product(
    form: LureForm, scalings: Any, vector: jax.Array, source: Node, target: Node, transposed: bool
) -> jax.Array:
    """G[target, source] u, or its transpose, in the vector's dtype."""
    taps = form.taps
    in_size = sum(taps[k].size_out for k in source) if source else form.in_size

    def forward(u: jax.Array) -> jax.Array:
        seen: dict[int, Any] = {}

        def tap(k: int, y: Any) -> Any:
            c, q, _ = scalings[k]
            seen[k] = y
            v = None if y is None or c is None else c.astype(u.dtype) * y
            if k in source:
                start = sum(taps[j].size_out for j in source[: source.index(k)])
                w = q.astype(u.dtype) * u[start : start + taps[k].size_out]
                v = w if v is None else v + w
            return v

        z = propagate(form, None if source else u, tap, dtype=u.dtype)
        if not target:
            return jnp.ravel(z)
        ends = [jnp.zeros(taps[k].size_in, u.dtype) if seen[k] is None else seen[k] for k in target]
        return jnp.concatenate(
            [scalings[k][2].astype(u.dtype) * y for k, y in zip(target, ends, strict=True)]
        )

    if not transposed:
        return forward(vector)
    (out,) = jax.linear_transpose(forward, jax.ShapeDtypeStruct((in_size,), vector.dtype))(vector)
    return out


def _by_golub_kahan(
    form: LureForm,
    host: HostForm,
    source: Node,
    target: Node,
    scalings: Sequence[TapScaling],
    seed: int,
    failure: float,
    max_steps: int,
) -> Bound | None:
    rounding = product_rounding(host, source, target, scalings, failure * _STEPS_SHARE)
    arrays = tuple((s.c, s.q, s.e) for s in scalings)
    with jax.enable_x64(True):
        product = partial(_block_product, form, arrays, source=source, target=target)
        upper, _, steps = golub_kahan(
            lambda u: np.asarray(product(jnp.asarray(u), transposed=False)),
            lambda u: np.asarray(product(jnp.asarray(u), transposed=True)),
            host.node_size(source, source=True),
            seed=seed,
            failure=failure * (1.0 - _STEPS_SHARE),
            max_steps=max_steps,
            rounding=rounding,
        )
    if upper < _TINY:  # the device flushes underflow to zero, so a vanishing product proves nothing
        return None
    size = host.node_size(source, source=True) + host.node_size(target, source=False)
    need = memory_budget.Budget.vectors(size, steps)
    return Bound(upper, "probabilistic", f"Golub-Kahan, {steps} steps", need)


def product_rounding(
    host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling], failure: float
) -> float:
    """A bound of the error of a product of G[target, source], or its transpose, with a unit vector on a device.

    A step M errs by at most w ||u||, w = gamma_t || |M| ||, where t counts the roundings of one entry (Higham, section
    3.5), and passes errors on by N >= ||M||. Summed over all paths of steps, first and last the scalings of the taps,
        sum of paths of (product of (N + w) - product of N),
    which is the same from both ends. What underflow loses is below 2**-1022 an operation and is passed on likewise.

    Args:
        failure: of the norms N of large dense steps, which are found by Golub-Kahan.

    Raises:
        ValueError: weights that a device may flush to zero.
    """
    program = host.program
    # The transposed product sums what comes back to a register from all steps that read it.
    uses = 2 + max(collections.Counter(r for s in program.steps for r in s.reads).values(), default=1)
    arrived: list[_Path] = []

    def through(place: int, parts: list[StepMatrix], held: Mapping[int, _Path]) -> Iterator[_Path]:
        for m in parts:
            if _may_vanish(m.matrix):
                raise ValueError("the network has weights that the device may flush to zero")
            wrong = mul_up(add_up(gamma(m.terms + len(parts) + uses), 2.0 * m.relerr), m.absolute_norm)
            lost = UNDERFLOW * 8.0 * (m.terms + 1) * sum(m.matrix.shape)
            yield held[m.register].through(_norm_of_step(host, place, m, failure), wrong, lost)

    def tap(k: int, y: _Path | None) -> _Path | None:
        scaling = scalings[k]
        if y is not None and k in target:
            arrived.append(y.scaled(scaling.e, uses))
        terms = [_Path(1.0, 0.0, 0.0).scaled(scaling.q, uses)] if k in source else []
        if y is not None and scaling.c is not None:
            terms.append(y.scaled(scaling.c, uses))
        return _together(terms) if terms else None

    sizes = _Sizes(host, host.leading_to([target], scalings), _together, _together, through, tap)
    held = walk(program, sizes, {} if source else {0: _Path(1.0, 0.0, 0.0)})
    end = _together(arrived) if target else held.get(program.output, _Path(0.0, 0.0, 0.0))
    return add_up(end.error, end.back)


class _Sizes(Algebra[Any]):
    """A bound per register (the same for all outputs of a tap), from those of the steps, in the registers `alive`.

    Args:
        total: adds the parts of one step; joined: bounds registers side by side.
        through: the parts of the step at a place, given its matrices and the registers.
        tap: as in `Algebra`.
    """

    def __init__(
        self, host: HostForm, alive: set[int], total: Any, joined: Any, through: Any, tap: Any
    ) -> None:
        self.host, self.alive, self.total, self.joined, self.through = host, alive, total, joined, through
        self.of_tap = tap

    def tap(self, k: int, value: Any) -> Any:
        return self.of_tap(k, value)

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        if op.output not in self.alive:
            return None
        parts = [m for m in self.host.step(place) if m.register in held]
        return self.total(list(self.through(place, parts, held))) if parts else None

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> Any:
        return self.joined([held[r] for r in registers if r in held])

    def split(self, value: Any, registers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        return ((r, value) for r in registers)


class _Path(NamedTuple):
    """Sums over the paths from the source: norms, rounding errors, underflow losses of a transposed product."""

    size: float
    error: float
    back: float

    def through(self, norm: float, wrong: float, lost: float) -> _Path:
        return _Path(
            mul_up(norm, self.size),
            add_up(mul_up(norm, self.error), mul_up(wrong, add_up(self.size, self.error)), lost),
            add_up(self.back, mul_up(lost, add_up(self.size, self.error))),
        )

    def scaled(self, factors: np.ndarray, uses: int) -> _Path:
        top = float(np.abs(factors).max(initial=0.0))
        return self.through(top, mul_up(gamma(uses + 2), top), UNDERFLOW * 8.0 * factors.size)


def _together(paths: Sequence[_Path]) -> _Path:
    return _Path(*(add_up(*(path[i] for path in paths)) for i in range(3)))


def _may_vanish(matrix: Any) -> bool:
    """Whether it has entries that are subnormal numbers in float32, the dtype of the weights."""
    entries = np.abs(matrix.data if sp.issparse(matrix) else matrix)
    return bool(((entries > 0.0) & (entries < 2.0**-126)).any())


def _norm_of_step(host: HostForm, place: int, m: StepMatrix, failure: float) -> float:
    """N >= ||M||; of a large dense step by Golub-Kahan, within a factor of two."""
    if sp.issparse(m.matrix) or m.quick_norm < m.absolute_norm:
        return m.quick_norm
    share = failure / len(host.program.steps)
    key = ("step", place, m.register, share)
    if key not in host.proved:
        wrong = gamma(m.terms) * m.absolute_norm
        matrix = np.asarray(m.matrix, np.float64)
        options: dict[str, Any] = dict(seed=place, failure=share, rtol=1.0, rounding=wrong)
        found = golub_kahan(lambda v: matrix @ v, lambda v: matrix.T @ v, matrix.shape[1], **options)[0]
        host.proved[key] = min(add_up(found, mul_up(m.relerr, m.absolute_norm)), m.absolute_norm)
    return host.proved[key]


# --- the last two methods -----------------------------------------------------------------------------------------


def _by_proof(
    host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling], limit: int
) -> Bound | None:
    block, _ = memory_budget.formed(host, source, target, scalings, limit)
    if block is None:
        return None
    plan = enclosures.enclosure_plan(block, limit)
    if plan.memory > limit or plan.flops > memory_budget.MOST_FLOPS:
        return None
    value = norms.verified_norm(*block.with_error(), plan=plan)
    return Bound(value, "verified", plan.name, plan.memory)


def product_of_steps(host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling]) -> float:
    """||G[target, source]|| <= the product (and sum) of the norms of the steps between, a bound per register."""
    arrived: list[float] = []

    def tap(k: int, y: float | None) -> float | None:
        scaling = scalings[k]
        if y is not None and k in target:
            arrived.append(mul_up(float(scaling.e.max(initial=0.0)), y))
        terms = [float(scaling.q.max(initial=0.0))] if k in source else []
        if y is not None and scaling.c is not None:
            terms.append(mul_up(float(np.abs(scaling.c).max(initial=0.0)), y))
        return add_up(*terms) if terms else None

    def through(place: int, parts: list[StepMatrix], held: Mapping[int, float]) -> list[float]:
        return [mul_up(m.norm, held[m.register]) for m in parts]

    sizes = _Sizes(
        host, host.leading_to([target], scalings), lambda parts: add_up(*parts), _length, through, tap
    )
    held = walk(host.program, sizes, {} if source else {0: 1.0})
    return _length(arrived) if target else held.get(host.program.output, 0.0)


def _length(parts: list[float]) -> float:
    return norms.frobenius_norm(np.array([parts]))
