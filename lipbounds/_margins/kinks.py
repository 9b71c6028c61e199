"""Activations with one kink, which the margins know exactly but for their ranges; others are curves (`forms`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lipbounds._activations.slopes_on_intervals import kink
from lipbounds._form.lure import LureForm
from lipbounds._local.engines import NoEngineError
from lipbounds._text.tables import printable
from lipbounds._triangle import recursion


@dataclass(frozen=True, eq=False)
class Kinks:
    """One tap: the slopes base up to `at` and base + gain from there, exactly; (n,) each."""

    at: np.ndarray
    base: np.ndarray
    gain: np.ndarray


def kinks_of(view: LureForm) -> tuple[Kinks | None, ...]:
    """The kinks of every tap, None for another function of one number; NoEngineError names taps that are neither."""
    host, found, other = recursion.host_form(view), list[Kinks | None](), list[str]()
    for tap in view.taps:
        if tap.expr is None or tap.assumed:
            other.append(f"{printable(tap.name)} at {printable(tap.path) or 'the function itself'}")
            continue
        one = kink(tap.expr, tap.constants_by_entry(host.consts), (tap.size_in,))
        found.append(None if one is None else Kinks(one[0], one[1], one[2] - one[1]))
    if other:
        raise NoEngineError(
            "margins are for elementwise activations whose slopes are proved, and for max, min and sort; this network "
            f"also has {', '.join(dict.fromkeys(other))}: use lb.certified_radius(form, X, y, local=True)"
        )
    return tuple(found)
