"""Chains of layers for LipSDP of wide networks: the inequality as one block tridiagonal matrix, and its elimination.

A chain is y_k = W_{k-1} v_{k-1}, v_k = phi_k(y_k), v_0 = x, z = W_K v_K. Where every slope lies in [0, 1] increments
have v_i (y_i - v_i) >= 0, so for any diagonal T_k > 0 and any S

    q(x, v) = |x|^2 + sum_k v_k' T_k (v_k - W_{k-1} v_{k-1}) <= |x|^2,

    [[ Q, W_K' ], [ W_K, S ]] >= 0   =>   (u'z)^2 <= q(x, v) u'S u <= |x|^2 u'S u,   that is dz dz' <= |dx|^2 S,

with Q the matrix of q. Q is block tridiagonal, and its diagonal blocks I, T_1, ..., T_K are *diagonal matrices*: a
layer that is wider than its neighbours is eliminated before them by divisions alone, and of a convolution W the
products that this leaves, W' T W and W T^-1 W', are as local as W. Dense factorisations are needed for the other layers
only, the *cores*: no matrix has the width of a layer that is wider than both of its neighbours.

(Slopes in [0, b] or [b, 0] become [0, 1] by scaling the columns of the next map. This is LipSDP in other coordinates:
with w = 2 v - y, y^2 - w^2 = 4 v (y - v); Fazlyab et al., NeurIPS 2019.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lipbounds._form.elementwise import kept_with_form
from lipbounds._form.lure import LureForm, proved_slopes
from lipbounds._gain.blocks import TapScaling
from lipbounds._norms import enclosures
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.matrices import is_identity
from lipbounds._norms.rounding import add_up, mul_up
from lipbounds._triangle import recursion


@dataclass(frozen=True, eq=False)
class Chain:
    """The maps W_0, ..., W_K of a chain whose slopes lie in [0, 1].

    Args:
        maps: W_k (n_{k+1}, n_k) within their errors, reduced to the active neurons.
        active: per tap of the elementwise view the neurons that move and matter; only these have a multiplier.
        widened: slopes were widened to reach 0, so the bound is looser than LipSDP's.
    """

    maps: tuple[Enclosure, ...]
    active: tuple[np.ndarray, ...]
    widened: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """n_0, ..., n_K: of the input and of every tap."""
        return tuple(m.shape[1] for m in self.maps)

    @property
    def outputs(self) -> int:
        return self.maps[-1].shape[0]


@kept_with_form
def chain(view: LureForm) -> Chain:
    """The chain of a form; ValueError where it is none."""
    if not view.taps:
        raise ValueError("a linear network has no chain of activations")
    host = recursion.host_form(view)
    plain = [TapScaling(None, np.ones(tap.size_out), np.ones(tap.size_in)) for tap in view.taps]
    (left, _, _), *steps = host.state_maps(plain)
    maps, widened = [], False
    for k, (around, out, into) in enumerate(steps):
        assert out is not None and into is not None
        if around.support(axis=0).any():
            raise ValueError("part of the state passes by an activation, as in a residual network")
        maps.append(times(into, left))
        a, b = proved_slopes(view, k)
        wider = np.minimum(a, 0.0), np.maximum(b, 0.0)
        if ((wider[0] < 0.0) & (wider[1] > 0.0)).any():  # a product of tiny slopes is zero
            raise ValueError("an activation has slopes of both signs")
        widened |= bool((wider[0] != a).any() or (wider[1] != b).any())
        factor = np.where(wider[0] < 0.0, wider[0], wider[1])
        left = out if (factor == 1.0).all() else enclosures.scale(out, cols=factor)
    maps.append(left)
    active = []
    for k in range(len(maps) - 1):
        kept = np.flatnonzero(maps[k].support(axis=1) & maps[k + 1].support(axis=0))
        active.append(kept)
        if kept.size < maps[k].shape[0]:
            maps[k], maps[k + 1] = maps[k].select(rows=kept), maps[k + 1].select(cols=kept)
    return Chain(tuple(maps), tuple(active), widened)


def times(a: Enclosure, b: Enclosure) -> Enclosure:
    """A B; exact where one of them is an identity."""
    for one, other in ((a, b), (b, a)):
        known = one.exact_or_none()
        if known is not None and one.stored == one.shape[0] and is_identity(known):
            return other
    array, error = a.with_error()
    product = enclosures.multiply(array, b)
    if error == 0.0:
        return product
    midpoint, own = product.with_error()
    return Enclosure(midpoint, add_up(own, mul_up(error, enclosures.enclosure_cheap_norm(b))))


def operations(widths: tuple[int, ...], outputs: int, cores: tuple[int, ...]) -> tuple[float, int]:
    """(operations, bytes) of one factorisation with these cores in float64, without products with the layers."""
    work, held, largest = 0.0, 0, 0
    for place, j in enumerate(cores):
        n = widths[j]
        after = widths[cores[place + 1]] if place + 1 < len(cores) else outputs
        work += 2 * n**3 / 3 + 2.0 * n * n * after + 2.0 * n * after * after
        work += 2 * n**3 / 3 if j + 1 < len(widths) and j + 1 not in cores else 0.0
        held += 8 * (2 * n * n + n * after)
        largest = max(largest, 8 * (2 * n * n + after * after))
    return work, held + largest


def cores(widths: tuple[int, ...], outputs: int) -> tuple[int, ...]:
    """The layers (0 is the input) that are factorised, the others eliminated first: the choice of least work.

    No two neighbours are eliminated, and at least one layer is a core.
    """
    count = len(widths)
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}

    def work(n: int, before: int) -> float:
        return n**3 * 2 / 3 + 2.0 * before * n * (before + n)

    def rest(k: int, last: int) -> tuple[float, tuple[int, ...]]:
        """The least work of layers k and after, `last` (-1: none) being the last core so far."""
        if k >= count:
            before = widths[last]
            return 2.0 * before * outputs * (before + outputs), ()
        if (k, last) not in best:
            before = widths[last] if last >= 0 else 0
            found = rest(k + 1, k)
            choices = [(found[0] + work(widths[k], before), (k, *found[1]))]
            if k + 1 < count:
                found = rest(k + 2, k + 1)
                choices.append((found[0] + work(widths[k + 1], before), (k + 1, *found[1])))
            elif last >= 0:
                choices.append((2.0 * before * outputs * (before + outputs), ()))
            best[k, last] = min(choices)
        return best[k, last]

    return rest(0, -1)[1]
