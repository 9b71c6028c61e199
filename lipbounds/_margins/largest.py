"""The largest balls that the dual of `lb.margins` certifies, between what is proved and what an attack finds.

The first ball ends a little before the nearest misclassified point that was found. The others divide, on a logarithmic
scale, what is left between the largest ball that is certified and the smallest that is not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lipbounds._form.inputs import check_box
from lipbounds._form.lure import LureForm
from lipbounds._local.radius_search import Search
from lipbounds._margins.counterexamples import nearest
from lipbounds._margins.margins import OPEN, PROOFS, WORDS, decide, prepare
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
    Ctrl-C stays.
    """
    at = np.flatnonzero((search.best > 0) & (search.best < _FARTHEST))
    if not at.size:
        return ()
    near, labels = x[at], search.labels[at]
    low, raised = search.best[at], np.zeros(at.size, bool)
    problem = prepare(
        form, near[:1], labels[:1], low[:1], norm=norm, box=box, memory=memory
    )  # or there is no dual
    high = nearest(form, near, labels, low, norm, check_box(box, near))
    notes = list[str]()
    for number in range(search.tries):
        rows = np.flatnonzero((high > _DONE * low) & (low < _FARTHEST))
        if not rows.size:
            break
        share = _NEXT if number else _FIRST
        within = low ** (1.0 - share) * np.minimum(high, np.finfo(np.float64).max) ** share
        eps = np.where(np.isinf(high), _GROWN * low, within)[rows]
        verdict = np.full(rows.size, OPEN, WORDS)
        try:
            with about(f"balls {number + 1} of {search.tries}"):
                problem = prepare(form, near[rows], labels[rows], eps, norm=norm, box=box, memory=memory)
                decide(problem, verdict, seconds_per_image=seconds)
        finally:
            proved = np.isin(verdict, PROOFS)
            low[rows[proved]] = eps[proved]
            raised[rows[proved]] = True
            search.best[at[rows[proved]]] = eps[proved]
            search.by[at[rows[proved]]] = verdict[proved]
        high[rows[~proved]] = eps[~proved]
        notes += problem.notes
    search.leave(at, np.where(np.isinf(high), _GROWN * low, 0.0))
    return (f"the dual of lb.margins raises {int(raised.sum())} of {at.size} radii", *dict.fromkeys(notes))
