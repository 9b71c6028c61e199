"""The taps of a network as maps between the states of the ellipsoid recursion (`ellipsoids`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp

from lipbounds._form.lure import LureForm
from lipbounds._gain.blocks import TapScaling
from lipbounds._local.maps import Matrix, matrix
from lipbounds._norms import enclosures
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.rounding import U
from lipbounds._triangle import recursion


@dataclass(frozen=True, eq=False)
class Stage:
    """One tap between two states: y = W s, s+ = H s + G v, v = phi(y).

    The rows of T are those of W, then those of H that are not zero and not among them already (a residual block reads
    what lives on): H s has the entries `of` of T s at `to`, both empty where H = 0, up to `gap` ||s||.
    effect (n,): how much a neuron moves the outputs, about, relative to the others (`_effects`).
    live (n,): False where the slope may be taken as 0 (`live_masks`), None where all neurons matter.
    """

    tap: int
    neurons: int
    T: Matrix
    G: Matrix
    of: np.ndarray
    to: np.ndarray
    effect: np.ndarray
    gap: float = 0.0
    live: np.ndarray | None = None

    @property
    def lives_on(self) -> bool:
        return bool(self.to.size)

    @property
    def rows(self) -> int:
        """The number of rows of T."""
        return max(self.neurons, int(self.of.max(initial=-1)) + 1)

    @cached_property
    def single(self) -> Stage:
        """The same in float32."""
        return replace(self, T=self.T.single, G=self.G.single)

    def joined(self, a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
        """(N, J, rows): a (N, J, neurons) on y plus b (N, J, d+) on what lives on, so that it is a'y + b'H s."""
        if b is None or not self.lives_on:
            return a
        out = np.concatenate([a, np.zeros((*a.shape[:2], self.rows - self.neurons))], axis=2)
        # an entry may be read twice
        np.add.at(out.transpose(2, 0, 1), self.of, b[:, :, self.to].transpose(2, 0, 1))
        return out


def stages_of(view: LureForm) -> tuple[Matrix, tuple[Stage, ...]]:
    """(A_0, stages) of an elementwise view; s_0 = A_0 x."""
    host = recursion.host_form(view)
    plain = [TapScaling(None, np.ones(tap.size_out), np.ones(tap.size_in)) for tap in view.taps]
    (start, _, _), *maps = host.state_maps(plain)
    made, effects = [], _effects(maps)
    for k, ((h, g, w), live) in enumerate(zip(maps, recursion.live_masks(view), strict=True)):
        assert g is not None and w is not None
        rows, of, to, gap = _distinct(w, h)
        made.append(Stage(k, view.taps[k].size_in, matrix(rows), matrix(g), of, to, effects[k], gap, live))
    return matrix(start), tuple(made)


def _distinct(w: Enclosure, h: Enclosure) -> tuple[Enclosure, np.ndarray, np.ndarray, float]:
    """(T, of, to, gap) of a `Stage` with the maps W and H.

    With H = E T for the floats, H_real - E T_real = (H_real - H) - E (T_real - T), in the Frobenius norm.
    """
    both = enclosures.stack([w, h])
    array, error = both.with_error()
    m = sp.csr_array(array, copy=True)
    m.eliminate_zeros()
    m.sort_indices()
    n, ends = w.shape[0], itertools.pairwise(m.indptr.tolist())
    keys = [(m.indices[lo:hi].tobytes(), m.data[lo:hi].tobytes()) for lo, hi in ends]
    kept, place = list(range(n)), {key: i for i, key in reversed(list(enumerate(keys[:n])))}
    to = np.flatnonzero(np.diff(m.indptr)[n:])
    for i in (n + to).tolist():
        if keys[i] not in place:
            place[keys[i]] = len(kept)
            kept.append(i)
    of = np.array([place[keys[n + i]] for i in to], int)
    gap = error * (1 + np.sqrt(np.bincount(of).max(initial=1))) * (1 + 8 * U)
    return both.select(rows=np.array(kept, int)), of, to, float(gap)


def _effects(maps: Sequence[tuple[Enclosure, Enclosure | None, Enclosure | None]]) -> list[np.ndarray]:
    """Per tap (n,) > 0, the root of the sum of the squared gains over all paths from a neuron to an output, slopes 1.

    Relative to the largest of the tap. In floats, for the search of multipliers alone: a neuron in another unit has it
    in that unit, too.
    """
    found, seen = [], np.ones(maps[-1][0].shape[0] if maps else 0)
    for h, g, w in reversed(maps):
        assert g is not None and w is not None
        (one, a), (two, b), (three, c) = (_squares(m.midpoint_for_search().T) for m in (h, g, w))
        with np.errstate(under="ignore"):
            own, on = two @ seen, one @ seen
            found.append(np.sqrt(np.maximum(own / (float(own.max(initial=0.0)) or 1.0), 1e-30)))
            most = max(a, b + c)
            seen = math.exp(2 * (a - most)) * on + math.exp(2 * (b + c - most)) * (three @ own)
            seen = seen / (float(seen.max(initial=0.0)) or 1.0)  # far from the ends of the range
    return found[::-1]


def _squares(m: Any) -> tuple[Any, float]:
    """(the squares of m relative to its largest entry, the logarithm of that)."""
    size = float(abs(m).max()) if min(m.shape) else 0.0
    size = max(size, float(np.finfo(np.float64).tiny))
    with np.errstate(under="ignore"):
        return (abs(m) / size) ** 2, math.log(size)
