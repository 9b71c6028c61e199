"""Bounds in one norm from bounds in others, as the norms of a vector bound each other.

    L_ij^q <= n^max(0, 1/p - 1/q) L_ij^p          n inputs; the same for the constants L_i of single outputs
    L^q    <= n^max(0, 1/p - 1/q) K^max(0, 1/q - 1/p) L^p          K outputs

So a certified radius in l2 is one in l1, and one in l-inf after division by sqrt(n).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lipbounds._form.lure import LureForm, check_network, fingerprint
from lipbounds._margins.radius import MOST_PAIRED
from lipbounds._norms.between import enlarged, stretch, value_from
from lipbounds._norms.rounding import add_up
from lipbounds._text.calls import public
from lipbounds.results import NORM_NAMES, Norm, UpperBound, check_norm, weakest


@public
def in_norm(form: LureForm, *bounds: UpperBound, norm: Norm) -> UpperBound:
    """The least constants in one norm that some bounds of a network prove, in whatever norms these are.

    In the norms 1 and inf the bounds `naive` and `liplt` multiply norms of matrices that say little about their
    product, and the converted l2 bound is often an order of magnitude smaller.

    Args:
        form: the network of the bounds.
        bounds: one or more UpperBounds of it, best with `pairwise=True`.
        norm: 1, 2 or inf, of inputs and outputs.

    Returns:
        An UpperBound with the least of the constants, entry by entry. It has pairs if any of the bounds has, or if all
        have to be converted and the outputs are at most 2048. A single bound in this norm is returned as it is.

    Raises:
        TypeError: not a form, or not UpperBounds. ValueError: no bound, one of another network, an unknown norm.

    Source: Hoelder's inequality, on differences of inputs and of outputs.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> bound = lb.in_norm(form, lb.lipsdp(form, pairwise=True), norm="inf")
        >>> round(bound.value, 3), bound.method
        (2.828, 'lipsdp, from l2')
    """
    if not isinstance(form, LureForm):
        raise TypeError(f"in_norm needs a LureForm from lb.trace, got {type(form).__name__}")
    p = check_norm(norm)
    if not bounds:
        raise ValueError("in_norm needs at least one bound: lb.in_norm(form, lb.lipsdp(form), norm='inf')")
    for bound in bounds:
        if not isinstance(bound, UpperBound):
            raise TypeError(f"in_norm takes upper bounds, got {type(bound).__name__}")
        check_network(form, bound.network, f"the bound of {bound.method}")
        if bound.pairwise is not None and len(bound.pairwise) != form.num_outputs:
            raise ValueError(
                f"the bound of {bound.method} is of a network with {len(bound.pairwise)} outputs, this one has "
                f"{form.num_outputs}"
            )
    first, *others = (_converted(form, bound, p) for bound in bounds)
    for other in others:
        first = _least(first, other)
    return first


def _converted(form: LureForm, bound: UpperBound, norm: float) -> UpperBound:
    if bound.norm == norm:
        return bound
    k, factor = form.num_outputs, stretch(form.in_size, bound.norm, norm)
    classes, pairs = bound.per_class, bound.pairwise
    if pairs is None and 1 < k <= MOST_PAIRED:
        pairs = bound.any_pair() * (1 - np.eye(k))
        # no output is longer than all of them
        classes = np.full(k, bound.value) if classes is None else classes
    value = float(enlarged(value_from(bound.value, classes, k, bound.norm, norm), factor))
    how = f"from {NORM_NAMES[bound.norm]}: with {form.in_size} inputs L_ij is at most {factor:.6g} times that"
    return replace(
        bound,
        value=value,
        norm=norm,
        method=f"{bound.method}, from {NORM_NAMES[bound.norm]}",
        pairwise=None if pairs is None else enlarged(pairs, factor),
        per_class=None if classes is None else enlarged(classes, factor),
        parts=(),
        certificate=None,
        notes=(how, *bound.notes),
        network=fingerprint(form),
    )


def _least(a: UpperBound, b: UpperBound) -> UpperBound:
    """Entry by entry; a bound that gives nothing leaves no trace."""
    value = min(a.value, b.value)
    arrays, used = {}, [a.value == value, b.value == value and a.value > value]
    for name in ("pairwise", "per_class"):
        mine, other = getattr(a, name), getattr(b, name)
        if mine is None or other is None:
            arrays[name] = other if mine is None else mine
            used = [used[0] or mine is not None, used[1] or (mine is None and other is not None)]
            continue
        arrays[name] = np.minimum(mine, other)
        used = [used[0] or bool((mine < other).any()), used[1] or bool((other < mine).any())]
    if not used[1]:
        return a
    if not used[0]:
        return b
    return replace(
        a,
        value=value,
        guarantee=weakest((a.guarantee, b.guarantee)),
        method=f"{a.method}; {b.method}",
        seconds=a.seconds + b.seconds,
        **arrays,
        parts=(),
        certificate=None,
        failure_probability=add_up(a.failure_probability, b.failure_probability),
        notes=tuple(dict.fromkeys((*a.notes, *b.notes))),
        network=a.network or b.network,
    )
