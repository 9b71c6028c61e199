"""Range of the first pre-activations A x over the intersection of a ball and a box."""

from __future__ import annotations

import numpy as np

from lipbounds._norms.rounding import U, gamma


def reach(
    a: np.ndarray, error: float, eps: np.ndarray, norm: float, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(down, up), each (N, n): y - down <= A x' <= y + up for the inputs x' of the ball with x - low <= x' <= x + high.

    Args:
        a: (n, d), within `error` (Frobenius norm) of A.
        eps: (N,) radii; norm: 2 or inf.
        low, high: (N, d) >= 0, distances to the faces of the box; may be inf.

    norm inf is exact: sums of |a| times min(eps, room). norm 2 is the Lagrangian bound, for any tau > 0

        max a' d  <=  sum_i max_{d_i} (a_i d_i - tau d_i^2 / 2) + tau eps^2 / 2,

    with tau = ||a|| / eps over the entries that can move; without a box the bound is eps ||a||. Rounded up.
    """
    d = a.shape[1]
    grown = 1 + gamma(2 * d + 32)
    slack = error * eps * (1.0 if norm == 2 else float(np.sqrt(d))) * grown
    sides = []
    # room where a < 0 and where a > 0, as y falls and rises
    for against, along in ((high, low), (low, high)):
        if norm == 2:
            moved = np.stack([_lagrangian(a, e, n, p) for e, n, p in zip(eps, against, along, strict=True)])
        else:
            rooms = [np.minimum(r, eps[:, None]) for r in (against, along)]
            moved = rooms[0] @ np.maximum(-a, 0).T + rooms[1] @ np.maximum(a, 0).T
        sides.append(moved * grown + slack[:, None])
    return sides[0], sides[1]


def _lagrangian(a: np.ndarray, eps: float, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """(n,) for one input: an entry may move by `below` where a < 0 and by `above` where a > 0."""
    size = np.abs(a)
    room = np.where(a > 0, above, below)
    tau = np.sqrt(np.square(size * (room > 0)).sum(axis=1)) / eps
    tau = np.where(tau > 0, tau, 1.0)[:, None]
    # The bound holds for any step, and the rounding of an optimal step has only a second-order effect.
    step = np.minimum(size / tau, room)
    bound = (size * step - tau * np.square(step) / 2).sum(axis=1) + tau[:, 0] * eps * eps / 2
    alone = (size * np.where(size > 0, room, 0.0)).sum(axis=1)  # the bound by the box alone
    return np.asarray(np.minimum(bound, alone))


def rooms(x: np.ndarray, box: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """(x - lower, upper - x) of the flattened inputs (N, d), rounded up; inf without a box."""
    flat = x.reshape(len(x), int(np.prod(x.shape[1:])))
    if box is None:
        return np.full(flat.shape, np.inf), np.full(flat.shape, np.inf)
    low, high = (np.broadcast_to(end, x.shape[1:]).reshape(-1) for end in box)
    out = []
    for gap in (flat - low, high - flat):
        out.append(np.where(gap > 0, np.nextafter(gap * (1 + 2 * U), np.inf), 0.0))
    return out[0], out[1]
