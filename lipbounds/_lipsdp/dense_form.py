"""The dense form of LipSDP: the gain of any form as one matrix.

With the loop transformation v = c y + r w, |w_i| <= |y_i|, a form is a gain from (x, w) to (y, z),

    y = Gy (x, w),    z = Gz (x, w)          (the w-columns of Gy are strictly lower triangular)

and L is a Lipschitz constant if some diagonal T > 0 satisfies

    A(T, rho) = diag(rho I, T) - Gy' diag(T) Gy - Gz' Gz >= 0,      rho = L^2                          (LMI)

because then |z|^2 <= rho |x|^2 - sum T_i (y_i^2 - w_i^2). (LMI) forces T > 0 by itself: its diagonal reads
T_i >= |Gz e_i|^2 + sum over later j of T_j Gy_ji^2.

`vectors.solve_dense` minimises rho over (LMI).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm
from lipbounds._gain.blocks import TapScaling
from lipbounds._lipsdp.matrix_inequality import closure
from lipbounds._lipsdp.units import units
from lipbounds._norms import matrices as norms
from lipbounds._norms.enclosures import Enclosure
from lipbounds._triangle.formed_blocks import matrices
from lipbounds._triangle.recursion import host_form, loop_transform, structure

#: Entries of (Gy; Gz) above which the dense form is refused: 1 GB.
MAX_ENTRIES = 2**27


@dataclass(frozen=True, eq=False)
class DenseGain:
    """y = Gy (x, w) over the active neurons of all taps, z = Gz (x, w), as matrices with a normwise error.

    Args:
        Gy: (N, n + N), the first n columns belong to x. Gz: (K, n + N).
        active: per tap of the elementwise view the neurons that have a multiplier, sorted.
        n: entries of x.
        block_errors: (taps + 1, taps + 1), Frobenius errors of the single blocks: row k is tap k, the last
            one the output; column 0 is x, column j + 1 tap j. Together they give the errors of Gy and Gz.
    """

    Gy: Enclosure
    Gz: Enclosure
    active: tuple[np.ndarray, ...]
    n: int
    block_errors: np.ndarray
    units: np.ndarray

    def inner(self, D: np.ndarray) -> np.ndarray:
        """Inverse multipliers of the network in the units of these matrices."""
        with np.errstate(over="ignore", under="ignore"):
            return np.ldexp(D, 2 * self.units) if self.units.any() else D

    def outer(self, D: np.ndarray) -> np.ndarray:
        """Inverse multipliers of these matrices in the units of the network."""
        with np.errstate(over="ignore", under="ignore"):
            return np.ldexp(D, -2 * self.units) if self.units.any() else D

    @property
    def labels(self) -> np.ndarray:
        """(N,), the tap of each active neuron: the `layers` of one multiplier per layer."""
        return np.repeat(np.arange(len(self.active)), [a.size for a in self.active])


def dense_gain(form: LureForm) -> DenseGain:
    """The gain of the elementwise view of a concrete form: blocks multiplied on the host, with their errors.

    Left out are neurons with radius r = 0 (they have no w), those that the zeros of the layers leave without
    effect (`live_masks`) and, repeatedly, those that are proved to be never moved (a row of zeros, no error) or to move
    nothing (a column of zeros, no error). Where neurons have very different units they are formed in others (`units`).
    ValueError where the matrices would need more than 1 GB.
    """
    view = elementwise_view(form)
    scalings = loop_transform(view, 2, centred=True, live=True)
    gain = _formed(view, scalings, scalings)
    ends = np.cumsum([a.size for a in gain.active])[:-1]
    reach, effect = (np.split(each, ends) for each in _sizes(gain))
    with np.errstate(over="ignore", under="ignore"):  # of v, not of r w: narrow slopes are no unit
        effect = [e / one.q[a] ** 2 for e, one, a in zip(effect, scalings, gain.active, strict=True)]
    found = units(reach, effect)
    if found is None:
        return gain
    scaled = []
    for k, one in enumerate(scalings):
        u = np.zeros(one.q.size, int)
        u[gain.active[k]] = found[k]
        with np.errstate(over="ignore", under="ignore"):
            q, e = np.ldexp(one.q, -u), np.ldexp(one.e, u)
            exact = (np.ldexp(q, u) == one.q).all() and (np.ldexp(e, -u) == one.e).all()
        if not exact:  # at the ends of the range of float64 a power of two rounds, too
            return gain
        scaled.append(TapScaling(one.c, q, e))
    return _formed(view, scalings, scaled)


def _sizes(gain: DenseGain) -> tuple[np.ndarray, np.ndarray]:
    """(N,), (N,) the squares of how far x moves every y_i, and w_i the outputs, about: sums over all paths."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares, last = np.square(gain.Gy.midpoint_for_search()), np.square(gain.Gz.midpoint_for_search())
        reach, between = squares[:, : gain.n].sum(axis=1), squares[:, gain.n :]
        effect, taps = last[:, gain.n :].sum(axis=0), np.unique(gain.labels)
        for k in taps:
            mine = gain.labels == k
            reach += between[:, mine] @ reach[mine]
        for k in taps[::-1]:
            mine = gain.labels == k
            effect += effect[mine] @ between[mine]
    return reach, effect


def _formed(view: LureForm, scalings: Sequence[TapScaling], scaled: Sequence[TapScaling]) -> DenseGain:
    """The gain with the scalings `scaled`, which are `scalings` in other units."""
    host = host_form(view)
    nodes = tuple((k,) for k in range(len(view.taps)))
    wide = [np.flatnonzero(s.q > 0) for s in scalings]
    n, rows, outputs = view.in_size, sum(a.size for a in wide), view.num_outputs
    if (rows + outputs) * (n + rows) > MAX_ENTRIES:
        raise ValueError(
            f"the dense form of this network has {rows} neurons and {n} inputs, a matrix of "
            f"{(rows + outputs) * (n + rows) * 8 / 1e9:.1f} GB; at most {MAX_ENTRIES * 8 / 1e9:.1f} GB are "
            "formed: "
            "use solver='recursion'"
        )
    starts = np.cumsum([0, *(a.size for a in wide)])
    whole = np.zeros((rows + outputs, n + rows))
    errors = np.zeros((len(nodes) + 1, len(nodes) + 1))

    def place(target: int | None, source: int | None, block: Enclosure) -> None:
        dense, error = block.dense().with_error()
        into = slice(rows, rows + outputs) if target is None else slice(starts[target], starts[target + 1])
        out_of = slice(0, n) if source is None else slice(n + starts[source], n + starts[source + 1])
        dense = dense if target is None else dense[wide[target]]
        whole[into, out_of] = dense if source is None else dense[:, wide[source]]
        errors[-1 if target is None else target, 0 if source is None else source + 1] = error

    for (source, target), block in matrices(host, structure(host, nodes, scaled), scaled):
        place(target[0], source[0] if source else None, block)
    for source, block in host.backward((), [(), *nodes], scaled).items():
        place(None, source[0] if source else None, block.T)
    taps = np.repeat(np.arange(len(nodes)), [a.size for a in wide])
    keep = _moving(whole, rows, n, errors, taps)
    columns = np.concatenate([np.arange(n), n + np.flatnonzero(keep)])
    chosen = [a[keep[starts[k] : starts[k + 1]]] for k, a in enumerate(wide)]
    units_of = [
        np.frexp(o.q[a])[1] - np.frexp(s.q[a])[1] for o, s, a in zip(scalings, scaled, chosen, strict=True)
    ]
    return DenseGain(
        Enclosure(whole[:rows][np.ix_(keep, columns)], norms.frobenius_norm(errors[:-1])),
        Enclosure(whole[rows:][:, columns], norms.frobenius_norm(errors[-1:])),
        tuple(chosen),
        n,
        errors,
        np.concatenate([np.zeros(0, int), *units_of]),
    )


def _moving(whole: np.ndarray, rows: int, n: int, errors: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Neurons that x may move and that may move the output; blocks with an error count as full."""
    pattern = whole != 0
    blurred = errors > 0
    into = np.concatenate([taps, np.full(len(whole) - rows, len(errors) - 1)])
    out_of = np.concatenate([np.zeros(n, int), taps + 1])
    pattern |= blurred[np.ix_(into, out_of)]
    between = pattern[:rows, n:]
    return closure(pattern[:rows, :n].any(axis=1), between) & closure(
        pattern[rows:, n:].any(axis=0), between.T
    )


def reduce_input(gain: DenseGain) -> tuple[np.ndarray, np.ndarray]:
    """(Gy, Gz) in plain float64 with the x-columns Gx replaced by as many columns as their rank.

    Gx Gx' does not change (up to rounding, relative to each row), so neither do rho and T of (LMI). For solvers: what
    they find is proved with the gain itself.
    """
    Gy, Gz, n = gain.Gy.midpoint_for_search(), gain.Gz.midpoint_for_search(), gain.n
    Gx = np.concatenate([Gy[:, :n], Gz[:, :n]])
    size = np.sqrt(np.einsum("ij,ij->i", Gx, Gx))
    size[size == 0] = 1.0
    unit = Gx / size[:, None]
    if n > len(unit):  # L of unit = L Q: the singular values of a square matrix are quicker
        unit = np.asarray(np.linalg.qr(unit.T, mode="r")).T
    u, s, _ = np.linalg.svd(unit, full_matrices=False)
    rank = int(np.sum(s > 1e-14 * s.max(initial=0.0) * math.sqrt(len(unit))))
    short = size[:, None] * (u[:, :rank] * s[:rank])
    split = len(Gy)
    return np.hstack([short[:split], Gy[:, n:]]), np.hstack([short[split:], Gz[:, n:]])
