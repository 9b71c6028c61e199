"""Lipschitz constants near single inputs: tighter than the global one, as most slopes are known there.

`local(form, X, eps)` bounds, for every example x of X and all u, v in the ball B(x, eps),

    ||f(u) - f(v)|| <= L ||u - v||,     |(f_i - f_j)(u) - (f_i - f_j)(v)| <= L_ij ||u - v||,

by the ellipsoid recursion (`ellipsoid`) with the slopes that the ranges of the pre-activations in that ball allow
(`ellipsoids`). As eps goes to 0 the constants tend to the norms of the Jacobian at x. For certified radii one of
the two points is x itself, and slopes anchored there are smaller still: `certified_radius(..., local=True)`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lipbounds._form.inputs import Box, check_box
from lipbounds._form.lure import LureForm, check_network, fingerprint
from lipbounds._form.units import Units
from lipbounds._gain.memory_budget import parse
from lipbounds._lipsdp import proof
from lipbounds._local import ellipsoids
from lipbounds._local.core import LocalCore
from lipbounds._local.engines import Around, bounded, ways
from lipbounds._local.forward import check_inputs
from lipbounds._norms.between import enlarged
from lipbounds._norms.rounding import add_up, gamma, sqrt_up
from lipbounds._text.device import Device
from lipbounds._text.html import Html, element
from lipbounds._text.progress import Progress
from lipbounds._text.tables import printable, seconds_text, show
from lipbounds._triangle.liplt import liplt
from lipbounds._triangle.verb import with_core
from lipbounds.results import NORM_NAMES, Guarantee, Norm, UpperBound, check_norm, weakest

_CALLS = 2  # of `local`


@dataclass(frozen=True, eq=False)
class LocalBounds:
    """Upper bounds of the Lipschitz constants on the balls around N examples.

    Args:
        value: (N,) of the network, l2 to l2 (norm inf: l-inf to l-inf).
        pairwise: (N, K, K), of the differences of two outputs; None unless asked for.
        eps: (N,) radii of the balls, in the units of the traced function's input.
        norm: 2 or inf, of the balls and of the constants.
        guarantee: "verified", "probabilistic" (a wide front) or "assumed".
        failure_probability: of all of them together.
        seconds: the time of all of them together.
        notes: about how they were found.
        network: a digest of the network, to tell bounds of one network from those of another.
        method: "local"; that of one example says its eps.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> bounds = lb.local(form, [[1.0, 1.0]], [0.1])
        >>> len(bounds), bounds[0].method
        (1, 'local, eps 0.1')
    """

    value: np.ndarray
    eps: np.ndarray
    norm: float
    guarantee: str
    seconds: float
    pairwise: np.ndarray | None = None
    failure_probability: float = 0.0
    notes: tuple[str, ...] = field(default=())
    network: str | None = None
    method: str = "local"

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, i: int) -> UpperBound:
        """The bound around one example, which holds in its ball only and not for the whole network."""
        return UpperBound(
            value=float(self.value[i]),
            norm=self.norm,
            guarantee=self.guarantee,
            method=f"local, eps {self.eps[i]:g}",
            seconds=self.seconds / len(self),
            pairwise=None if self.pairwise is None else self.pairwise[i],
            failure_probability=self.failure_probability,
            notes=(*self.notes, f"holds within {self.eps[i]:g} of example {i} only"),
            network=f"local to example {i}",
        )

    def __iter__(self) -> Iterator[UpperBound]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        head = f"LocalBounds: {len(self)} examples, {NORM_NAMES[self.norm]}, {self.guarantee}"
        if not len(self):
            return head
        low, middle, high = np.quantile(self.value, (0, 0.5, 1))
        radii = f"{self.eps.min():g}" if self.eps.min() == self.eps.max() else "one per example"
        lines = [
            head,
            f"  eps      {radii}",
            f"  L <=     {show(low, 'up')} to {show(high, 'up')}, median {show(middle, 'up')}",
            f"  time     {seconds_text(self.seconds)}",
        ]
        return "\n".join([*lines, *(f"  note     {printable(note)}" for note in self.notes)])

    def _repr_html_(self) -> Html:
        return element("pre", repr(self))


@with_core(LocalCore())
def local(
    form: LureForm,
    X: Any,
    eps: Any,
    *,
    norm: Norm = 2,
    pairwise: bool = False,
    bound: UpperBound | None = None,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    box: Any = None,
    input_range: tuple[float, float] | None = None,
    device: Device = "auto",
    memory: int | str | None = None,
    progress: Progress = True,
) -> LocalBounds:
    """Upper bounds of the Lipschitz constants of the network on the balls B(x, eps) around the examples of X.

    Args:
        form: from `lb.trace`, with concrete weights.
        X: (N, *in_shape), floating point, in the units of the traced function.
        eps: a number > 0, or (N,) of them.
        norm: 2 or inf, of the balls and of the constants.
        pairwise: also the constants of all differences of two outputs.
        bound: a bound of the whole network, which holds in every ball too, so no value exceeds it. None is `lb.liplt`.
        guarantee: "auto" or "verified". Networks nowhere wider than 1100 get ellipsoids, every rounding covered. Wider
            ones (norm 2) are treated as a whole up to there (LipLT) and locally behind, then by ellipsoids of the whole
            network where these fit (see `memory`), and also by local LipLT (`liplt`), probabilistic; every example gets
            the smallest bound. With "verified" the last is left out, and LipLT is verified, which can take minutes.
        seed: of the random start vectors of probabilistic norms.
        box: (lower, upper), numbers or arrays of the shape of an input: only points inside count, (0, 1) for pixels.
            It narrows the first layer's ranges where X is near its faces; only ellipsoids of the whole network use it.
        input_range: (low, high), the range of the entries of X, which are held to it then; None warns
            (`lb.UnitsWarning`) where X looks like images in other units than [0, 1].
        device: where large proofs are computed: "auto" (on a GPU where JAX has one by default), "cpu" or "gpu".
        memory: None, or a budget in bytes or as "4GB" for the ellipsoids of networks wider than 1100, which are run
            wherever they fit it: 0.7 GB for a width of 4096, where a ball takes 4 to 12 seconds of a core. None runs
            them up to widths of about 2000.
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Raises:
        TypeError: not a concrete form.
        ValueError: shapes, values that are not finite, eps not > 0, norm 1, an unknown guarantee, too many outputs.

    Source: LipSDP and LipLT (`lb.lipsdp`, `lb.liplt`) with the slopes that the activations can have on a ball.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> near = lb.local(form, [[-1.0, 0.2], [1.0, -9.0]], 0.1)
        >>> near.value.round(2).tolist()
        [2.0, 2.0]
    """
    begin = time.perf_counter()
    if not isinstance(form, LureForm):
        raise TypeError(f"local needs a LureForm from lb.trace, got {type(form).__name__}")
    x = check_inputs(form, X, Units(input_range))
    radii = check_eps(eps, len(x))
    p = check_norm(norm)
    inside = check_box(box, x)
    budget = parse(memory)
    ways(form, p, guarantee, budget)  # raises before any work is done
    whole = liplt(form, norm=p, pairwise=pairwise, guarantee=guarantee, seed=seed) if bound is None else bound
    if not isinstance(whole, UpperBound):
        raise TypeError(f"`bound` must be an UpperBound of the whole network, got {type(whole).__name__}")
    if whole.norm != p:
        raise ValueError(f"`bound` is in another norm than {NORM_NAMES[p]}")
    check_network(form, whole.network, "`bound`")
    classes = form.num_outputs
    value = np.full(len(x), whole.value)
    pairs = np.zeros((len(x), classes, classes) if pairwise else (0, 1, 1))
    if pairwise:
        pairs[:] = whole.any_pair() * (1 - np.eye(classes)) if whole.pairwise is None else whole.pairwise

    def one_chunk(near: Around, part: slice) -> None:
        # a second call reuses the slopes of the first, which does not help local LipLT
        for call in range(1 if near.ready.front is not None else _CALLS):
            out = near.outputs(slice(None), radii[part], call=call)
            for row, blocks in enumerate(out):
                if not np.isfinite(blocks).all():
                    continue  # the bound so far stays
                i = part.start + row
                if p == 2:
                    found = add_up(*(_largest_root(block) for block in blocks))
                else:
                    roots = np.sum([proof.class_roots(block, 0) for block in blocks], axis=0)
                    found = float(enlarged(roots.max(initial=0.0) * (1 + gamma(len(blocks))), near.stretch))
                near.used[row] |= found < value[i]
                value[i] = min(value[i], found)
                if pairwise:
                    between = np.sum([proof.pair_roots(block, 0) for block in blocks], axis=0)
                    between = enlarged(between * (1 + gamma(len(blocks))), near.stretch)
                    near.used[row] |= (between < pairs[i]).any()
                    pairs[i] = np.minimum(pairs[i], between)

    def use(around: Around) -> None:
        around.each(one_chunk, "local bounds")

    found = bounded(form, p, x, use, guarantee=guarantee, seed=seed, box=inside, memory=budget)
    return LocalBounds(
        value,
        radii,
        p,
        weakest([*found.guarantees, whole.guarantee]),
        time.perf_counter() - begin,
        pairs if pairwise else None,
        min(found.failure + whole.failure_probability, 1.0),
        (*found.notes, *form.notes, *box_notes(inside)),
        fingerprint(form),
    )


def box_notes(box: Box | None) -> tuple[str, ...]:
    if box is None:
        return ()
    low, high = (
        f"{float(end.flat[0]):g}" if end.size and (end == end.flat[0]).all() else "..." for end in box
    )
    return (f"for inputs inside the box [{low}, {high}] only",)


def _largest_root(matrix: np.ndarray) -> float:
    """An upper bound of the root of the largest eigenvalue.

    By the Frobenius norm where only the allowance for rounding is left.
    """
    size = float(ellipsoids.frobenius(matrix[None])[0])
    return sqrt_up(size) if size < 2.0**-450 else proof.largest_root(matrix, 0)


def check_eps(eps: Any, count: int) -> np.ndarray:
    """(N,) radii > 0, finite."""
    radii = np.asarray(eps, np.float64)
    if radii.shape not in ((), (count,)):
        raise ValueError(f"eps must be a number or hold {count} numbers, got shape {radii.shape}")
    if not (np.isfinite(radii).all() and (radii > 0).all()):
        raise ValueError("eps must be finite numbers > 0")
    return np.broadcast_to(radii, count).copy()
