"""Units of neurons for LipSDP: a change of coordinates by powers of two, exact in floating point.

With y_i and w_i of a neuron counted in units of 2^-u_i its inequality |w_i| <= |y_i| stays what it is, whatever the
activation, and a multiplier D_i becomes 4^u_i D_i. LipSDP's optimum does not depend on units; the search for it and
the errors of its proof, which are relative to whole matrices, do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Logarithms of units in a layer that lie within this range are left as they are: search and proof take them well.
_SPREAD = 8.0


def units(reach: Sequence[np.ndarray], effect: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """Per group (n,) integers u with which 2^u reach and 2^-u effect are about equal; None where they differ little.

    One number for the whole group where its members differ little: a scale of a whole layer does no harm.

    Args:
        reach: per group (n,) the squares of how far a unit input moves its members, about.
        effect: per group (n,) the squares of how far a unit of a member moves the outputs, about.
    """
    found, far = [], False
    for moved, moves in zip(reach, effect, strict=True):
        known = (moved > 0) & (moves > 0) & np.isfinite(moved) & np.isfinite(moves)
        logs = (np.log2(moves[known]) - np.log2(moved[known])) / 4
        each = logs.size > 0 and float(np.ptp(logs)) > _SPREAD
        far = far or each
        u = np.full(known.size, np.rint(np.mean(logs)) if logs.size else 0.0)
        if each:
            u[known] = np.rint(logs)
        found.append(u.astype(int))
    return found if far else None
