"""The search for local radii: among the balls around an example, find the one that certifies the most.

With m(eps) = min_i gap_i / L_yi(eps), falling in eps, every ball of radius eps certifies min(eps, m(eps)), as L_yi(eps)
holds inside it; the best is the eps at which m(eps) = eps.
"""

from __future__ import annotations

import itertools

import numpy as np

from lipbounds._local.engines import Around
from lipbounds._norms.rounding import U, gamma, roots_up, squared_distances

_ROOM = 4.0  # a search continues while the last ball was certified and the radius may grow by a larger factor
_SAID = 1.5  # a note reports searches that ended although the radius may grow by a larger factor
_STEP, _PATIENCE = 16.0, 16  # the next ball is at most that much larger; after so many, its fourth power
_FARTHEST = 1e100  # no larger ball is tried


def ratios(gaps: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(N,) the least gap over its constant, rounded down; a constant of 0 never lets the margin vanish."""
    zero = scale == 0
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = gaps / np.where(zero, 1.0, scale) * (1 - 4 * U)
    return np.asarray(np.where(zero & (gaps > 0), np.inf, ratio).min(axis=1, initial=np.inf))


class Search:
    """Radii of N examples, raised by one engine after another.

    Args:
        labels: (N,); gaps: (N, K) proved margins, of one output (N, 1).
        start: (N,) the global radii, where the search of every engine begins.
        tries: balls per example and engine. A ball that is certified as a whole does not count while the radius may
            still grow much.
        goal: a radius that is enough. Only this ball is tried, twice at most, around examples below it.

    best (N,) are the radii so far, and by (N,) the engines that gave those above the global ones, "" elsewhere; results
    of an engine stay if it fails later. An engine takes the same steps as
    it would alone, every try narrowing an interval that holds its radius, and stops before them only where all the
    intervals of a chunk end below the best: so no engine alone finds more. (Examples cannot leave one by one: local
    LipLT takes as many Lanczos steps as the slowest example of a call needs.)
    """

    def __init__(
        self,
        labels: np.ndarray,
        gaps: np.ndarray,
        start: np.ndarray,
        tries: int,
        goal: float | None = None,
    ) -> None:
        self.labels, self.gaps, self.start, self.tries, self.goal = labels, gaps, start, tries, goal
        self.by = np.full(len(start), "", "<U14")
        self.best, self.todo = start.copy(), np.flatnonzero((start > 0) & np.isfinite(start))
        self.interrupted = False
        if goal is not None:
            self.todo = self.open()
        self._open = np.zeros(len(start))  # largest radius still possible where the last ball was certified

    def open(self) -> np.ndarray:
        """The examples that are classified as labelled and not certified at the goal."""
        assert self.goal is not None
        return np.flatnonzero((self.best > 0) & (self.best < self.goal))

    def run(self, around: Around) -> None:
        """Raise the radii by an engine, which is around the examples `todo`."""
        around.each(self._certify if self.goal is None else self._reach, "local radii")

    def _radii(
        self, near: Around, at: np.ndarray, rows: np.ndarray, eps: np.ndarray, call: int
    ) -> np.ndarray:
        """m(eps) for some rows of a chunk with the examples `at`; 0 without a bound."""
        labels, gaps = self.labels[at[rows]], self.gaps[at[rows]]
        scale = row_roots(near.outputs(rows, eps, labels=labels, call=call), labels)
        return np.where(np.isinf(scale).any(axis=1), 0.0, ratios(gaps, scale))

    def _reach(self, near: Around, part: slice) -> None:
        at, goal = self.todo[part], float(self.goal or 0.0)
        for call in range(min(self.tries, 2)):
            left = np.flatnonzero(self.best[at] < goal)
            if not left.size:
                return
            m = self._radii(near, at, left, np.full(left.size, goal), call)
            self._keep(near, at, left, np.minimum(m, goal))

    def _keep(self, near: Around, at: np.ndarray, rows: np.ndarray, found: np.ndarray) -> None:
        """Radii that an engine found for some rows of a chunk with the examples `at`."""
        better = found > self.best[at[rows]]
        near.used[rows] |= better
        self.by[at[rows][better]] = near.way
        self.best[at[rows]] = np.maximum(found, self.best[at[rows]])

    def _certify(self, near: Around, part: slice) -> None:
        at = self.todo[part]
        low, high = self.start[at].copy(), np.full(len(at), np.inf)
        used, whole = np.zeros(len(at), int), np.zeros(len(at), bool)
        eps = 1.5 * low
        for call in itertools.count():
            left = np.flatnonzero((high > 1.01 * low) & (used < self.tries) & (eps < _FARTHEST))
            if not (high > self.best[at])[left].any():
                break
            m = self._radii(near, at, left, eps[left], call)
            whole[left] = m >= eps[left]
            low[left] = np.maximum(low[left], np.minimum(eps[left], m))
            high[left] = np.minimum(high[left], np.maximum(eps[left], m))
            used[left] += ~(whole[left] & (high[left] > _ROOM * low[left]))
            step = _STEP if call < _PATIENCE else _STEP**4
            eps = low + 0.6 * (np.minimum(high, step * low) - low)
            self._keep(near, at, np.arange(len(at)), low)
        self._open[at] = np.maximum(self._open[at], np.where(whole, high, 0.0))

    def notes(self) -> tuple[str, ...]:
        """Notes about searches that ended early."""
        unfinished = int((self._open > _SAID * self.best).sum())
        if not unfinished:
            return ()
        return (
            f"for {unfinished} of {len(self.best)} examples the search ended while the whole ball was still certified: "
            f"their radii may be more than {_SAID:g} times larger; take more tries than {self.tries}: "
            "local=lb.Local(tries=...)",
        )


def row_roots(out: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N, K) upper bounds of the constants of z_y - z_i from blocks (N, J, K, K) (`Around.outputs`).

    Of one output (N, 1) its own constant; inf where the blocks are not finite.
    """
    rows = np.arange(len(out))
    diagonal = np.einsum("njii->nji", out)
    with np.errstate(over="ignore", invalid="ignore"):
        if out.shape[-1] == 1:
            square = diagonal * (1 + 4 * U)
        else:
            both = diagonal + diagonal[rows, :, labels][:, :, None]
            square = squared_distances(both, out[rows, :, labels])
        total = roots_up(square).sum(axis=1) * (1 + gamma(out.shape[1]))
    total[~np.isfinite(out).all(axis=(1, 2, 3))] = np.inf
    if out.shape[-1] > 1:
        own = total[rows, labels]
        total[rows, labels] = np.where(np.isinf(own), np.inf, 1.0)  # its gap is inf
    return total
