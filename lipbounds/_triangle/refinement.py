"""Where the norms of wide blocks are refined: the bound of the network decides which of them matter.

Norms of blocks too large for a proof come from Golub-Kahan, whose bounds get closer with every step. To first order the
bound L of the network exceeds its value for the exact norms by

    L sum_i s_i e_i,    s_i = u_k ||G[k, j]|| m_j / L,

e_i the relative excess of block i = (j, k), m the recursion from the input and u the same from the output. Steps are
spent where they lower this sum most, until it is at most what the same excess `RTOL` in all blocks would give:
sum s_i e_i <= RTOL sum s_i. A block that contributes a hundredth of the bound needs a tenth of the steps.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

from lipbounds._gain.blocks import HostForm, Node, Pair, TapScaling
from lipbounds._gain.products import BlockProduct
from lipbounds._gain.side_by_side import side_by_side
from lipbounds._gain.wide_blocks import RTOL, Bound, Search, other_norm, quick_norms, search
from lipbounds._norms.starts import CHECKED, Starts
from lipbounds._text.memory import available_memory
from lipbounds._text.progress import alive, late, proof_seconds, say, show_seconds, stoppable
from lipbounds._text.threads import one_blas_thread

_ROUGH_STEPS = 5  # that tell whether a bound is worth its proofs
_FIRST, _MORE = 2 * CHECKED, CHECKED  # steps of all blocks, and of a block that is refined
_KEPT = 2**32  # bytes of vectors of searches, at most
_THREADS = 8  # searches that are advanced side by side


def wide_norms(
    host: HostForm,
    pairs: Sequence[Pair],
    scalings: Sequence[TapScaling],
    known: Mapping[Pair, float],
    ends: Mapping[Node, float],
    seed: int,
    failure: float,
    quick: bool,
    name: Callable[[Pair], str],
) -> dict[Pair, Bound]:
    """Bounds of blocks above the size rule: quick proofs, and Golub-Kahan as far as the bound of the network needs it.

    Args:
        host: the form.
        pairs: the blocks, (source, target).
        scalings: of the taps.
        known: the norms of all other blocks that do not end at the output.
        ends: norms of the blocks to the output, by source.
        seed: of the random starts.
        failure: the probability with which some of the bounds may fail.
        quick: whether quick proofs are tried first.
        name: of a block, for progress.
    """
    found: dict[Pair, Bound] = {}
    if quick:
        for pair, bound in quick_norms(host, pairs, scalings):
            say(f"norm of {name(pair)}")
            found[pair] = bound
    # Every block of the form has the same share of the failure and its own seed, so that both centres may use it.
    count = len(host.program.taps) + 1
    share = failure / (count * count)
    searches: dict[Pair, Search] = {}
    for pair in pairs:
        if pair not in found:
            place = sum(k + 1 for k in pair[0]) * count + sum(pair[1])
            with contextlib.suppress(ValueError):
                searches[pair] = search(host, pair, scalings, seed=seed + place, failure=share)
    norms = {**known, **{pair: bound.value for pair, bound in found.items()}}
    # A node begins with a tap on which none of the earlier nodes depends.
    nodes = sorted({node for pair in [*known, *pairs] for node in pair if node})
    refine(searches, norms, ends, nodes, name)
    for pair in pairs:
        if pair not in found:
            one = searches[pair].bound() if pair in searches else None
            found[pair] = one or other_norm(host, pair, scalings, seed=seed, failure=share)
    for each in searches.values():
        each.starts.release()
    return found


def shares(
    norms: Mapping[Pair, float], ends: Mapping[Node, float], nodes: Sequence[Node]
) -> dict[Pair, float]:
    """The parts s_i of the bound, from the norms of all blocks, and of those to the output."""
    reach = _reach(norms, nodes)
    back: dict[Node, float] = {}
    for source in [*reversed(nodes), ()]:
        ahead = sum(norms.get((source, k), 0.0) * u for k, u in back.items())
        back[source] = ends.get(source, 0.0) + ahead
    whole = back[()]
    if not 0.0 < whole < math.inf:
        return dict.fromkeys(norms, 1.0)
    return {(j, k): back[k] * (value / whole) * reach[j] for (j, k), value in norms.items()}


def _reach(norms: Mapping[Pair, float], nodes: Sequence[Node]) -> dict[Node, float]:
    """m of the recursion per node, 1 for the input."""
    reach: dict[Node, float] = {(): 1.0}
    for target in nodes:
        reach[target] = sum(norms.get((j, target), 0.0) * m for j, m in reach.items())
    return reach


def lower_estimate(
    host: HostForm, nodes: Sequence[Node], pairs: Sequence[Pair], scalings: Sequence[TapScaling]
) -> tuple[float, dict[Node, float]]:
    """What the recursion over these blocks, those to the output included, gives at least: its bound, and per node.

    From lower bounds of the norms after a few steps, and 0 where that does not tell; it proves nothing.
    """

    def lower(pair: Pair) -> float:
        block = BlockProduct(host, *pair, scalings)
        starts = Starts(*block.from_smaller_side, seed=0, failure=0.5, rounding=0.0, max_steps=_ROUGH_STEPS)
        with contextlib.suppress(ValueError):
            starts.advance(_ROUGH_STEPS)
        return starts.lower if math.isfinite(starts.lower) else 0.0

    seconds = sum(proof_seconds(*host.block_shape(pair)) for pair in pairs)
    with side_by_side(lower, pairs, seconds=seconds) as results:
        norms = dict(results)
    ends = {source: norm for (source, target), norm in norms.items() if not target}
    reach = _reach(norms, nodes)
    return sum(end * reach[source] for source, end in ends.items()), reach


def _kept(searches: Mapping[Pair, Search]) -> int:
    """Bytes of the vectors of all searches; blocks that are equal share theirs."""
    return sum(starts.nbytes for starts in {id(one.starts): one.starts for one in searches.values()}.values())


def _most_bytes() -> float:
    """Of the vectors that searches may keep side by side: half of what the process may still use, at most `_KEPT`."""
    free = available_memory()
    return _KEPT if free is None else min(_KEPT, free * 2**30 / 2)


def refine(
    searches: Mapping[Pair, Search],
    norms: Mapping[Pair, float],
    ends: Mapping[Node, float],
    nodes: Sequence[Node],
    name: Callable[[Pair], str],
) -> None:
    """Advance the searches until the bound of the network is close enough (module docstring), or all have ended.

    Or until it is `late`, once all of them have a bound. The vectors of a search are dropped where those of all take
    more memory than they may; it then repeats its steps, with the same results.
    """
    began, limit = time.monotonic(), _most_bytes()
    workers = max(1, min(os.cpu_count() or 1, _THREADS))
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool, stoppable():

        def one(pair: Pair, steps: int) -> None:
            alive()
            searches[pair].advance(steps)
            if _kept(searches) > limit:
                searches[pair].starts.release()

        def advance(steps: Mapping[Pair, int], told: str) -> None:
            tasks = {p: pool.submit(copy_context().run, one, p, count) for p, count in steps.items()}
            for pair, task in tasks.items():
                task.result()
                say(f"norm of {name(pair)}{told}")

        advance(dict.fromkeys(searches, _FIRST), "")
        while True:
            known = {**norms, **{pair: each.lower for pair, each in searches.items()}}
            share = shares(known, ends, nodes)
            goal = RTOL * sum(share[pair] for pair in searches)
            excess = sum(share[pair] * each.known.excess for pair, each in searches.items() if share[pair])
            gains = {
                pair: share[pair] * min(each.known.excess, 1e6) / (each.known.steps * each.cost)
                for pair, each in searches.items()
                if not each.known.ended
            }
            if excess <= goal or not gains or (late() and excess < math.inf):
                return
            # The excess falls like the square of the steps.
            left = (time.monotonic() - began) * (math.sqrt(min(excess, 1.0) / max(goal, 1e-12)) - 1.0)
            least = max(gains.values()) / 2
            chosen = {pair: _MORE for pair, gain in gains.items() if gain >= least}
            for pair in sorted(searches.keys() - chosen, key=lambda one: gains.get(one, 0.0)):
                if _kept(searches) > limit / 2:
                    searches[pair].starts.release()
            advance(chosen, f", about {show_seconds(left)} left" if left >= 1.0 else "")
