"""Norms of blocks of the gain that are formed as matrices: proved, each once, several at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from lipbounds._gain.blocks import HostForm, Node, Pair, Sweep, TapScaling, by_smaller_side
from lipbounds._gain.side_by_side import in_groups
from lipbounds._gain.wide_blocks import content, norm_estimate, size_exponent
from lipbounds._norms import enclosures
from lipbounds._norms import matrices as norms
from lipbounds._norms.banded_cholesky import Plan
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.rounding import add_up, mul_up, unscale_up
from lipbounds._text.device import hearing, note, remembered
from lipbounds._text.progress import meter, proof_seconds, say, show_seconds
from lipbounds.results import weakest

LOOSE = 1e-6  # rounding error of a block, relative to its norm, above which shorter blocks are tried
_HASHED = 2**22  # entries up to which blocks are compared with those proved before


@dataclass(frozen=True)
class BlockNorm:
    value: float
    guarantee: str
    how: str
    shape: tuple[int, int]


def matrices(
    host: HostForm, pairs: Sequence[Pair], scalings: Sequence[TapScaling]
) -> Iterator[tuple[Pair, Enclosure]]:
    """The blocks of the gain one after another, or their transposes: swept from the smaller side."""
    for sweep in by_smaller_side(host, pairs):
        yield from _swept(host, sweep, scalings)


def _swept(host: HostForm, sweep: Sweep, scalings: Sequence[TapScaling]) -> Iterator[tuple[Pair, Enclosure]]:
    node, others, reverse = sweep
    if reverse:
        for source, block in host.backward(node, others, scalings).items():
            yield (source, node), block.T
    else:
        for target, block in host.forward(node, others, scalings).items():
            yield (node, target), block


def block_norm(
    host: HostForm,
    block: Enclosure,
    norm: float,
    plan: Plan | None = None,
    estimate: Callable[[], float] | None = None,
) -> float:
    """A proved bound of the norm; equal matrices up to a power of two are proved once.

    `estimate` is a cheaper one of the norm than the proof's own.
    """
    if norm != 2:
        return enclosures.enclosure_norm(block, norm)
    matrix, error = block.with_error()
    entries = matrix.data if sp.issparse(matrix) else matrix
    top = norms.largest(matrix)
    if top == 0.0:
        return error
    exponent = math.frexp(top)[1]
    if abs(exponent) > 500:
        return enclosures.enclosure_norm(block, norm)
    if entries.size > _HASHED:
        return norms.verified_norm(matrix, error, plan=plan, estimate=estimate)
    digest = hashlib.sha1()
    step = max(1, 2**20 * entries.shape[0] // entries.size)
    for lo in range(0, entries.shape[0], step):
        digest.update(np.ldexp(np.ascontiguousarray(entries[lo : lo + step]), -exponent).data)
    if sp.issparse(matrix):
        digest.update(matrix.indices.tobytes())
        digest.update(matrix.indptr.tobytes())
    key = (block.shape, digest.hexdigest())

    def prove() -> float:
        return math.ldexp(norms.verified_norm(matrix, plan=plan, estimate=estimate), -exponent)

    return add_up(math.ldexp(remembered(host.proved, key, prove), exponent), error)


def proved(
    host: HostForm,
    pairs: Sequence[Pair],
    scalings: Sequence[TapScaling],
    norm: float,
    name: Callable[[Pair], str],
) -> dict[Pair, tuple[BlockNorm, float]]:
    """{pair: (its norm, the error of the block)} of blocks that are formed; what both centres share is proved once.

    Sources are brought to one size by powers of two, so that a bound does not depend on what was proved before.
    """
    found: dict[Pair, tuple[BlockNorm, float]] = {}
    keys = {pair: content(host, *pair, scalings) for pair in pairs} if norm == 2 else {}
    if norm == 2:
        scalings = _of_one_size({source for source, _ in pairs}, scalings)
    for pair, (key, _) in keys.items():
        if key in host.formed:
            found[pair], heard = host.formed[key]
            for text in heard:
                note(text)
    left = [pair for pair in pairs if pair not in found]

    def prove(item: tuple[Pair, Enclosure]) -> tuple[BlockNorm, list[str]]:
        pair, block = item
        with hearing() as heard:
            if norm != 2:
                return BlockNorm(block_norm(host, block, norm), "verified", "exact sums", block.shape), heard
            plan = enclosures.enclosure_plan(block)
            value = block_norm(host, block, 2, plan, norm_estimate(host, pair, scalings, block, plan))
        return BlockNorm(value, "verified", plan.name, block.shape), heard

    costs = {pair: proof_seconds(*host.block_shape(pair)) if norm == 2 else 0.0 for pair in left}

    def through(sweep: Sweep) -> list[Pair]:
        node, others, reverse = sweep
        return [(other, node) if reverse else (node, other) for other in others]

    total = sum(costs.values())
    if left and total >= 1.0:
        say(f"forming {len(left)} blocks, about {show_seconds(total)} left")
    with (
        meter(len(left), total) as advance,
        in_groups(
            lambda sweep: _swept(host, sweep, scalings),
            prove,
            by_smaller_side(host, left),
            seconds=lambda sweep: sum(costs[pair] for pair in through(sweep)),
            cost=lambda item: costs[item[0]],
            need=lambda sweep: 8.0 * sum(math.prod(host.block_shape(pair)) for pair in through(sweep)),
        ) as results,
    ):
        for (pair, block), (bound, heard) in results:
            found[pair] = bound, block.error
            if pair in keys:
                host.formed[keys[pair][0]] = found[pair], heard
            advance(f"norm of {name(pair)}", costs[pair])
    for pair, (_, exponent) in keys.items():
        if exponent and pair in found:
            bound, error = found[pair]
            value, error = (float(unscale_up(x, exponent)) for x in (bound.value, error))
            found[pair] = replace(bound, value=value), error
    return found


def _of_one_size(sources: Collection[Node], scalings: Sequence[TapScaling]) -> list[TapScaling]:
    """The scalings with the largest factor of every source in [1, 2); no tap is in two of the sources."""
    made = list(scalings)
    assert len({k for node in sources for k in node}) == sum(map(len, sources))
    for node in sources:
        exponent = size_exponent(node, scalings)
        for k in node:
            made[k] = replace(scalings[k], q=np.ldexp(scalings[k].q, -exponent))
    return made


def shorten(
    host: HostForm,
    pairs: Sequence[Pair],
    scalings: Sequence[TapScaling],
    loose: Sequence[Pair],
    found: dict[Pair, BlockNorm],
    norm: float,
) -> None:
    """Bound blocks whose rounding error is not small relative to their norm by shorter blocks.

    Without rounding G[k, j] = D[k, j] q_j + sum_m D[k, m] c_m G[m, j] over the taps m between, D the direct linear
    maps, so ||G[k, j]|| <= ||D[k, j] q_j|| + sum_m ||D[k, m] c_m|| ||G[m, j]||. The smaller bound is kept.

    Args:
        pairs: all blocks between nodes, and
        found: the norms of all of them, so that no term is missing.
    """
    plain = [TapScaling(None, s.q, s.e) for s in scalings]
    through = [TapScaling(None, np.zeros_like(s.q) if s.c is None else s.c, s.e) for s in scalings]
    direct = {pair: block_norm(host, block, norm) for pair, block in matrices(host, loose, plain)}
    targets = {target for _, target in loose}
    between = [pair for pair in pairs if pair[0] and pair[1] in targets]
    steps = {pair: block_norm(host, block, norm) for pair, block in matrices(host, between, through)}
    every, nodes = set(pairs), list(dict.fromkeys(target for _, target in pairs))
    for source, target in sorted(loose, key=lambda pair: nodes.index(pair[1])):
        terms, used = [direct.get((source, target), 0.0)], []
        for (middle, end), value in steps.items():
            if end == target and (source, middle) in every:
                used.append(found[source, middle])
                terms.append(mul_up(value, used[-1].value))
        shorter = add_up(*terms)
        old = found[source, target]
        if shorter < old.value:
            how = weakest(one.guarantee for one in used)
            found[source, target] = BlockNorm(shorter, how, "shorter blocks", old.shape)
