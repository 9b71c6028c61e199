"""LipSDP of a wide chain, as an engine: multipliers by `wide_search`, on the host or an accelerator, then proved.

Layers wider than both neighbours are never written out (`chain`), so that memory and time follow the others, the cores.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm
from lipbounds._gain.memory_budget import show
from lipbounds._lipsdp import wide_search
from lipbounds._lipsdp.certificate import Proof
from lipbounds._lipsdp.chain import Chain, chain, cores, operations
from lipbounds._lipsdp.solvers import Recursion
from lipbounds._lipsdp.task import Answer, Found, Task
from lipbounds._lipsdp.wide_arithmetic import Accelerator, Host
from lipbounds._lipsdp.wide_search import Minimum, Objective, Search
from lipbounds._norms import device
from lipbounds._text import device as places
from lipbounds._text.calls import FAILURES, reason
from lipbounds._text.memory import available_memory
from lipbounds._text.progress import say, show_seconds

#: Operations that a search may take unless it is told its steps: on the host about three minutes on two cores, on an
#: accelerator one or two.
_WORK_HOST, _WORK_DEVICE = 1e13, 1e15
_FEWEST, _MOST = 4, 60  # steps
_RATE = 6e10  # operations a second on two cores


def layer_widths(form: LureForm) -> tuple[int, ...]:
    """Of the input and of every tap, before anything is reduced."""
    return (form.in_size, *(tap.size_in for tap in elementwise_view(form).taps))


def memory(own: Chain, accelerated: bool) -> int:
    """Bytes that the search and the proof of a chain hold; on an accelerator with every map dense."""
    _, held = operations(own.widths, own.outputs, cores(own.widths, own.outputs))
    maps = sum(8 * m.shape[0] * m.shape[1] for m in own.maps)
    return held + 3 * maps if accelerated else held


@contextlib.contextmanager
def _arithmetic(own: Chain) -> Iterator[Any]:
    """The arithmetic of the device of the public call around this; the host's where memory there does not suffice."""
    place = places.chosen()
    if place is not None:
        need, free = memory(own, True), device.free_bytes(place)
        if need <= free:
            with device.exactly():
                yield Accelerator(place)
            return
        places.note(
            f"the search takes {show(need)} on the device, which has {show(free)} left: done on the host"
        )
    yield Host()


def by_chain(task: Task, how: Recursion, pairwise: bool, limit: int | None = None) -> Answer:
    """Proofs for the network and for the pairs, with multipliers of one search each; ValueError where there is none."""
    if places.chosen() is None:
        _check(task.form, how, limit)
    own = chain(task.form)
    if not min(own.widths):
        raise ValueError("a layer has no neuron that moves and matters")
    chosen = cores(own.widths, own.outputs)
    found, notes = list[Found](), list[str]()
    if own.widened:
        notes.append("slopes were widened to reach 0")
    with _arithmetic(own) as arithmetic:
        if isinstance(arithmetic, Host):
            _check(task.form, how, limit)
        search = Search(own, chosen, arithmetic)
        work, _ = operations(own.widths, own.outputs, chosen)
        budget = _WORK_DEVICE if isinstance(arithmetic, Accelerator) else _WORK_HOST
        steps = (
            int(np.clip(budget / max(work, 1.0), _FEWEST, _MOST))
            if how.iterations is None
            else how.iterations
        )
        say(
            f"LipSDP of {sum(own.widths[1:])} neurons: {len(chosen)} factorisations of at most "
            f"{max(own.widths[j] for j in chosen)} a step, {work:.2g} operations"
        )
        minima = _search(search, how, pairwise and own.outputs > 1, steps)
    for what, one in minima:
        value = one.value
        if what == "network":  # the objective is smoothed, which adds about 2 % with ten outputs
            value = 0.5 * math.log(float(np.linalg.eigvalsh(one.passed.sigma)[-1]))
        notes.append(
            f"{what}: {one.steps} steps on {len(chosen)} of {len(own.widths)} layers, "
            f"{search.length(value):.6g} in float arithmetic"
        )
        D = search.inverse_multipliers(one.passed)
        try:
            found.append(task.prove(Proof(D, kind="chain")))
        except FAILURES as error:
            notes.append(f"the proof ({what}) failed: {reason(error)}")
    return Answer(tuple(found), tuple(notes))


def _check(form: LureForm, how: Recursion, limit: int | None) -> None:
    """ValueError, before anything is computed, where a chain of these widths would take too much memory or time."""
    widths = layer_widths(form)
    work, need = operations(widths, form.num_outputs, cores(widths, form.num_outputs))
    free = available_memory()
    most = limit if limit is not None else math.inf if free is None else free * 2**30
    layers = f"layers of {', '.join(map(str, widths))} neurons"
    if need > most:
        raise ValueError(f"{layers} take {show(need)}, and {show(int(most))} are there")
    if how.iterations is None and work * _FEWEST > _WORK_HOST:
        raise ValueError(
            f"{layers} take about {show_seconds(work * _FEWEST / _RATE)} on two cores: a GPU is faster, and "
            f"solver=lb.Recursion(iterations={_FEWEST}) waits"
        )


def _search(search: Search, how: Recursion, pairwise: bool, steps: int) -> list[tuple[str, Minimum]]:
    """Minima, with what they are for: the pairs, then the network from there, then the worst pairs one by one."""
    x = start(search)
    out: list[tuple[str, Minimum]] = []
    jobs: list[tuple[str, Objective, int]] = [("network", wide_search.network, steps)]
    if pairwise:
        jobs = [
            ("pairs", wide_search.pairs_of(how.objective), steps),
            ("network", wide_search.network, steps // 3),
        ]
    for what, objective, count in jobs:
        one = wide_search.minimise(search, x, objective, count, what)
        if one is not None:
            out.append((what, one))
            x = one.x
    if pairwise and how.refine and out:
        sigma, k = out[0][1].passed.sigma, search.outputs
        i, j = np.triu_indices(k, 1)
        squares = sigma.diagonal()[i] + sigma.diagonal()[j] - 2 * sigma[i, j]
        for place in np.argsort(-squares)[: how.refine]:
            weights = np.zeros((k, k))
            weights[i[place], j[place]] = weights[j[place], i[place]] = 1.0
            what, objective = f"pair {i[place]}, {j[place]}", wide_search.pairs_of(weights)
            one = wide_search.minimise(search, out[0][1].x, objective, steps // 2, what)
            out += [] if one is None else [(what, one)]
    return out


def start(search: Search) -> np.ndarray:
    """Parameters that have a factorisation: all multipliers of a layer equal, D = 2 lambda_max(S) or more."""
    x = np.zeros(search.size)
    for s in (0.0, 1.0, 3.0, 6.0):
        x[sum(search.widths[1:]) :] = s
        if search.forward(x) is not None:
            return x
    raise ValueError("no multipliers have a factorisation in these floats")
