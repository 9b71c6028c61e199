"""The largest balls that the dual of `lb.margins` certifies, between what is proved and what an attack finds.

The first ball ends a little before the nearest misclassified point that was found, or holds the whole box where none
was found. The others divide, on a logarithmic scale, what is left between the largest ball that is certified and the
smallest that is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lipbounds._form.inputs import check_box
from lipbounds._form.lure import LureForm
from lipbounds._local.radius_search import Search
from lipbounds._margins.counterexamples import extent, nearest
from lipbounds._margins.margins import OPEN, PROOFS, WORDS, decide, prepare
from lipbounds._margins.problem import too_large_notes
from lipbounds._text.calls import FAILURES, reason
from lipbounds._text.progress import about

_FIRST, _NEXT = 0.85, 0.5  # where a ball lies between the two, on that scale
_GROWN = 2.0  # the next ball is that much larger where nothing bounds it from above
_DONE = 1.01  # no ball is tried between radii that are nearer to each other
_FARTHEST = 1e100  # no larger ball is tried


def enlarge(
    form: LureForm, x: np.ndarray, search: Search, *, norm: float, box: Any, memory: Any, seconds: float
) -> tuple[str, ...]:
    """Raise the radii of a search, > 0, by balls that the dual certifies; notes.

    box, memory: as in `lb.margins`; seconds: of branching per example and ball. What is certified before an error or
    Ctrl-C stays. NoEngineError where the network has no dual.
    """
    at = np.flatnonzero((search.best > 0) & (search.best < _FARTHEST))
    if not at.size:
        return ()
    near, labels, low = x[at], search.labels[at], search.best[at]
    prepare(form, near[:0], labels[:0], low[:0], norm=norm, box=box, memory=memory)  # is there a dual?
    inside = check_box(box, near)
    whole = extent(near, norm, inside)
    high = nearest(form, near, labels, low, norm, inside)
    raised, notes, large, limit = np.zeros(at.size, bool), list[str](), dict[int, int](), 0
    for number in range(search.tries):
        rows = np.flatnonzero((high > _DONE * low) & (low < np.minimum(whole, _FARTHEST)))
        if not rows.size:
            break
        share = _NEXT if number else _FIRST
        within = low ** (1.0 - share) * np.minimum(high, np.finfo(np.float64).max) ** share
        beyond = np.where(np.isfinite(whole), whole, _GROWN * low)
        eps = np.where(np.isinf(high), beyond, within)[rows]
        verdict = np.full(rows.size, OPEN, WORDS)
        try:
            with about(f"balls {number + 1} of {search.tries}"):
                problem = prepare(form, near[rows], labels[rows], eps, norm=norm, box=box, memory=memory)
                decide(problem, verdict, seconds_per_image=seconds)
                large |= {int(rows[row]): size for row, size in problem.too_large.items()}
                limit = problem.memory
        except FAILURES as error:
            notes.append(
                f"the dual of lb.margins ended after {number} of {search.tries} balls: {reason(error)}"
            )
            break
        finally:
            proved = np.isin(verdict, PROOFS)
            raised[rows[proved]] = True
            low[rows[proved]] = eps[proved]
            search.best[at[rows[proved]]] = eps[proved]
            search.by[at[rows[proved]]] = verdict[proved]
        high[rows[~proved]] = eps[~proved]
    search.best[at[low >= whole]] = np.inf  # no input of the box has another class
    raised |= low >= whole
    search.limit(at, np.where(low < whole, high, low))
    search.leave(at, np.where(np.isinf(high) & (low < np.minimum(whole, _FARTHEST)), _GROWN * low, 0.0))
    said = f"the dual of lb.margins raises {int(raised.sum())} of {at.size} radii"
    return (said, *notes, *too_large_notes(large, at.size, limit))
