"""The ellipsoid recursion around single inputs, batched (NumPy and LAPACK): float64 with every rounding, or float32.

S (N, d, d) bounds every increment ds of the state between the input x and any x' in its ball: ds ds' <= eps^2 S. At a
tap, with T = [W; H] (pre-activations y = W s, and what of the state lives on),

    Q = T S T',    |dy_i| <= eps sqrt(Q_ii),    slopes [c - r, c + r] on that range,
    V = Q + Q[:, A] (D - Q[A, A])^-1 Q[A, :],   A the neurons with r > 0,  D > Q[A, A] diagonal,
    S+ = [G c, I] V [G c, I]' + G r D r G',

the recursion of `ellipsoid` with c and r of this input: a neuron whose slope is known is linear and has no multiplier.

Rounding is covered by adding e I, e a normwise bound: of a product with a map M, gamma || |M| || ||X||_F (`maps`); of
the inverse by `schur.schur_complement`. D - Q[A, A] and the columns are scaled by D^-1/2 first, which makes the matrix
well conditioned; it is proved to be at least 0.03 I.

What starts from a float32 matrix stays in float32, takes half the memory and half the time, and proves nothing: it is
the search for multipliers and radii (`passes`). The same steps are taken, with no allowance for rounding.

No matrix is formed that is larger than S, Q or D - Q[A, A], and of a sparse layer none at all: convolutions are applied
to the columns of S. Of one tap with n neurons, a of them active, and a state of d entries behind it, the operations are
2 a^3 / 3 (two Cholesky factorisations), a^2 k (a solution), a k^2 (F'F; k is d, or the size of Q if that is smaller),
and two products with the layer: 2 n d (n + d) for a dense one, 2 (n + d) times its nonzeros for a sparse one. For n = a
= d = 4096 and a convolution that is 2.7 n^3 = 1.8e11, about 4 seconds on one core. The first tap of a network with k <
n / 2 inputs takes 2 k^3 / 3 + k^2 d + k d^2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lipbounds._activations.slopes_on_intervals import anchored_slopes, pair_slopes
from lipbounds._form.lure import LureForm, proved_slopes
from lipbounds._local import multipliers
from lipbounds._local.maps import TINY, column_norms, frobenius, symmetrise
from lipbounds._local.multipliers import Kept
from lipbounds._local.stages import Stage
from lipbounds._norms.rounding import U, gamma
from lipbounds._norms.schur import schur_complement
from lipbounds._triangle import recursion

_DEAD = 0.1  # least slope assumed of a neuron in a' dz/dv, as a dead neuron may become active in the ball


@dataclass(frozen=True, eq=False)
class Values:
    """Pre-activations of the network at N inputs.

    Args:
        y: (N, n) per tap; error (N,): ||y - y_exact||_2 is at most that.
        slope: (N, n) per tap of the elementwise view, approximate slopes in the ball; they do not affect soundness.
        relative: (N, n) per tap, D_i / Q_ii of an earlier recursion, NaN where unknown; () to guess D alone.
    """

    y: tuple[np.ndarray, ...]
    error: tuple[np.ndarray, ...]
    slope: tuple[np.ndarray, ...] = ()
    relative: tuple[np.ndarray, ...] = ()

    def rows(self, at: Any) -> Values:
        parts = self.y, self.error, self.slope, self.relative
        return Values(*(tuple(a[at] for a in part) for part in parts))


@dataclass(frozen=True, eq=False)
class Thin:
    """The ellipsoid B B' of the first pre-activations over the unit ball, of fewer inputs than neurons: y = B x.

    b (n, k): the real B is within `relerr` |b| entrywise, and `error` in the Frobenius norm beyond that.
    """

    b: np.ndarray
    relerr: float
    error: float

    @cached_property
    def single(self) -> Thin:
        """The same in float32."""
        return replace(self, b=self.b.astype(np.float32))

    @property
    def spread(self) -> np.ndarray:
        """(n,) upper bounds of the norms of the rows of B."""
        norms = column_norms(np.asarray(self.b.T[None], np.float64))[0]
        return (norms * (1 + 2 * self.relerr) + self.error) * (1 + 4 * U)


class Passed(NamedTuple):
    """One recursion: S (N, K, K), in float32 an estimate, and what another one can begin with.

    middles: of the slopes, (N, n) per stage. Where `Values.relative` asks for it, balance: `multipliers.balance`,
    and score (N,): the largest a' S a / gap^2 of the directions.
    """

    s: np.ndarray
    middles: list[np.ndarray]
    balance: list[tuple[np.ndarray, np.ndarray]]
    score: np.ndarray


class Range(NamedTuple):
    """What the recursion found at one stage, (N, n) each.

    The pre-activations stay in [y - down, y + up] up to `Values.error`, with slopes [c - r, c + r]; rd is r D r.
    """

    down: np.ndarray
    up: np.ndarray
    c: np.ndarray
    r: np.ndarray
    rd: np.ndarray


def ellipsoids(
    view: LureForm,
    steps: Sequence[Stage],
    start: np.ndarray | Thin,
    values: Values,
    eps: np.ndarray,
    *,
    anchored: bool,
    directions: np.ndarray,
    gaps: np.ndarray | None = None,
    first: tuple[np.ndarray, np.ndarray] | None = None,
    ranges: list[Range] | None = None,
) -> Passed:
    """dz dz' <= eps^2 S for all pairs of inputs in the ball, or all pairs with its centre; and what to begin with next.

    Args:
        start: (N or 1, d, d) of the first state, for the unit ball of the input; or the first pre-activations, where no
            part of the state lives on. With a float32 array, and `steps` in float32, S is an estimate, not finite where
            float32 is not enough.
        eps: (N,) radii > 0.
        anchored: the centre is one of the two inputs.
        directions: (N, J, K), the outputs a' z whose constants D is chosen for; any are sound.
        gaps: (N, J), what these constants are compared with; the largest ratio counts. None: all count the same.
        first: (N, n) twice, how far the first pre-activations can fall and rise, where better than the ellipsoid.
        ranges: a list that receives the `Range` of every stage.
    """
    aims = _adjoints(steps, values, directions)
    s, kept, slopes = start, list[list[Kept | None]](), list[tuple[np.ndarray, np.ndarray]]()
    for place, stage in enumerate(steps):
        n = stage.neurons
        if isinstance(s, Thin):
            spread = np.broadcast_to(s.spread, (len(eps), n))
            q = s.b[None]
        else:
            q = _pre_activations(stage, s, len(eps), fresh=place > 0)
            spread = np.sqrt(np.einsum("nii->ni", q)[:, :n].astype(np.float64))
        down = spread * eps[:, None] * (1 + 8 * U)
        down = up = np.where(np.isnan(down), np.inf, down)  # beyond the range of float64
        if place == 0 and first is not None:
            down, up = np.fmin(down, first[0]), np.fmin(up, first[1])  # NaN beyond the range says nothing
        size = frobenius(s) if stage.gap and not isinstance(s, Thin) else None
        c, r = centre_and_radius(view, stage.tap, values, down, up, anchored)
        if stage.live is not None:
            c, r = np.where(stage.live, c, 0.0), np.where(stage.live, r, 0.0)
        slopes.append((c, r))
        known = values.relative[stage.tap] if values.relative else np.full_like(r, np.nan)
        if isinstance(s, Thin):
            s, own, rd = _through_thin(stage, s, c, r, aims[place], known)
        else:
            s, own, rd = _through(stage, q, c, r, aims[place], known)
            if size is not None:
                _widen(s, stage.gap, size)
        kept.append(own)
        if ranges is not None:
            ranges.append(Range(down, up, c, r, rd))
    assert not isinstance(s, Thin)
    middles = [c for c, _ in slopes]
    if not values.relative:
        return Passed(s, middles, [], np.zeros(len(eps)))
    squares = np.einsum("njk,njk->nj", directions @ s.astype(np.float64), directions)
    balance = multipliers.balance(steps, kept, slopes, directions, multipliers.weights(squares, gaps))
    compared = squares if gaps is None else squares / np.square(np.maximum(gaps, 1e-150))
    return Passed(s, middles, balance, compared.max(axis=1, initial=0.0))


def _widen(s: np.ndarray, gap: float, size: np.ndarray) -> None:
    """Replace S by a bound of the increments ds + d, ds ds' <= S and ||d|| <= gap ||ds_before||, S_before <= size I.

    (ds + d)(ds + d)' <= (1 + t) ds ds' + (1 + 1/t) d d' for any t > 0.
    """
    length = frobenius(s)
    t = gap * np.sqrt(size / np.maximum(length, TINY)) + U
    s *= (1 + t).astype(s.dtype)[:, None, None]
    added = (1 + 1 / t) * gap**2 * size + 4 * U * (1 + t) * length
    diagonal = np.einsum("nii->ni", s)
    diagonal += added[:, None] * (1 + 32 * U) + np.abs(diagonal) * 4 * U


def _pre_activations(stage: Stage, s: np.ndarray, count: int, *, fresh: bool) -> np.ndarray:
    """Q = T S T' (N, m, m) of the pre-activations and what of the state lives on; in the place of S if `fresh`."""
    q, e = stage.T.both(s)
    if len(q) < count:
        q, e = np.repeat(q, count, axis=0), np.repeat(e, count)
    elif q is s and not fresh:
        q = q.copy()
    diagonal = np.einsum("nii->ni", q)
    diagonal += e[:, None] * (1 + 4 * U)  # a view: q + e I
    diagonal[:] = np.maximum(diagonal, 0) * (1 + 4 * U)
    return q


def centre_and_radius(
    view: LureForm, k: int, values: Values, down: np.ndarray, up: np.ndarray, anchored: bool
) -> tuple[np.ndarray, np.ndarray]:
    """c and r (N, n) with every slope on [y - down, y + up] in [c - r, c + r]; r = 0 only where it is exact."""
    y, wrong = values.y[k], values.error[k][:, None]
    low, high = np.nextafter(y - wrong, -np.inf), np.nextafter(y + wrong, np.inf)
    lo, hi = np.nextafter(low - down, -np.inf), np.nextafter(high + up, np.inf)
    a, b = slopes_between(view, k, lo, hi, (low, high) if anchored else None)
    c = (a + b) / 2
    r = np.maximum(b - c, c - a)
    return c, np.where(a == b, 0.0, np.nextafter(r, np.inf))


def slopes_between(
    view: LureForm,
    k: int,
    lo: np.ndarray,
    hi: np.ndarray,
    anchor: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(a, b) (N, n) of tap k on [lo, hi], between all pairs or with a point of the `anchor` intervals."""
    tap, known = view.taps[k], proved_slopes(view, k)
    if tap.assumed or tap.expr is None:
        return np.broadcast_to(known[0], lo.shape), np.broadcast_to(known[1], lo.shape)
    columns = tap.constants_by_entry(recursion.host_form(view).consts)
    if anchor is not None:
        return anchored_slopes(tap.expr, columns, anchor, lo, hi, known)
    return pair_slopes(tap.expr, columns, lo, hi, known)


Aim = tuple[np.ndarray, np.ndarray | None]
Found = tuple[np.ndarray | None, float]  # Z and e, None for zero; e is inf where there is no bound


def _adjoints(steps: Sequence[Stage], values: Values, directions: np.ndarray) -> list[Aim]:
    """Per stage a' dz/dv (N, J, n) and, where the state lives on, a' dz/ds+ (N, J, d+), by `values.slope`."""
    found: list[Aim] = []
    for stage in reversed(steps):
        p = stage.G.behind(directions)
        found.append((p, directions if stage.lives_on else None))
        slope = values.slope[stage.tap]
        slope = np.where(np.abs(slope) < _DEAD, _DEAD, slope)
        directions = stage.T.behind(stage.joined(slope[:, None] * p, directions))
    return found[::-1]


def _through(
    stage: Stage, q: np.ndarray, c: np.ndarray, r: np.ndarray, aim: Aim, known: np.ndarray
) -> tuple[np.ndarray, list[Kept | None], np.ndarray]:
    """S+ (N, d+, d+) from Q (N, m, m), which may be overwritten.

    With P = [G c, 0] + H on the rows of T, and U = P Q, the recursion is S+ = U P' + G r D r G' + F'F, where F'F bounds
    C' (D - Q[A, A])^-1 C, C' = U[:, A]. The error of column j of U is at most slip_j; G_real is within G.error of G.
    Where P Q is the larger matrix, Q is replaced by V = Q + F'F first, with C' = Q[:, A].
    """
    g, n, slopes = stage.G, stage.neurons, c
    of, to = _run(stage.of), _run(stage.to)
    aimed = stage.joined(c[:, None] * aim[0], aim[1])
    c = c.astype(q.dtype)
    early = q.shape[1] < g.shape(n)[0]
    if early:

        def rows(i: int, at: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, float]:
            made = q[i][at] * scale[:, None]
            return made, float(2 * U * frobenius(made[None])[0])

        found, kept, rd = _solved(stage, q, r, rows, aimed, aim[0], known, early)
        q = _sum(q, found, np.zeros(len(q)))
    x = c[:, :, None] * q[:, :n]
    slip = (g.wrong + 2 * U * g.size) * column_norms(x) + TINY
    u = g.ahead(x)
    del x
    if stage.lives_on:
        u[:, to] += q[:, of]
        slip = slip + 2 * U * column_norms(u)
    if not early:

        def columns(i: int, at: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, float]:
            made = np.ascontiguousarray((u[i][:, at] * scale).T)
            length = float(frobenius(made[None])[0])
            return made, float(np.sqrt(np.square(scale * slip[i, at]).sum()) + 2 * U * length)

        found, kept, rd = _solved(stage, q, r, columns, aimed, aim[0], known, early)
    error, rest = np.zeros(len(c)), None
    if stage.lives_on:
        rest = np.array(u[:, :, of]).transpose(0, 2, 1)  # what follows is in the place of U
        error = np.sqrt(np.square(slip[:, of]).sum(axis=1)) + 4 * U * frobenius(rest)
    x = u[:, :, :n]
    x *= c[:, None, :]
    wrong_x = np.sqrt(np.square(slip[:, :n] * slopes).sum(axis=1)) + 2 * U * frobenius(x)
    added = g.add_scaled(x, rd)
    wrong_x = wrong_x + 4 * U * (added + frobenius(x)) + g.error * rd.max(axis=1, initial=0.0)
    error = error + g.wrong * frobenius(x) + g.size * wrong_x
    s = g.ahead(np.ascontiguousarray(x.transpose(0, 2, 1)))
    if rest is not None:
        s[:, to] += rest
        error = error + 4 * U * frobenius(s)
    symmetrise(s)
    if early:  # it is in V already, but inf stays inf
        found = [(None, e) for _, e in found]
    return _sum(s, found, error), kept, rd


def _run(at: np.ndarray) -> slice | np.ndarray:
    """The places as a slice, where they follow each other: a view in place of a copy."""
    if at.size and (np.diff(at) == 1).all():
        return slice(int(at[0]), int(at[-1]) + 1)
    return at


def _solved(
    stage: Stage,
    q: np.ndarray,
    r: np.ndarray,
    columns: Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, float]],
    aimed: np.ndarray,
    p: np.ndarray,
    known: np.ndarray,
    early: bool,
) -> tuple[list[Found], list[Kept | None], np.ndarray]:
    """(bounds of C' (D - Q[A, A])^-1 C, what is kept, r D r) of every example.

    columns: (example, A, D^-1/2) -> D^-1/2 C (a, k) and the Frobenius norm of its error, in that scaling.
    """
    rd, found, kept = np.zeros_like(r), list[Found](), list[Kept | None]()
    for i, ellipsoid in enumerate(q):
        at = np.flatnonzero(r[i] > 0)
        if not at.size or not np.isfinite(ellipsoid).all():
            found.append((None, np.inf if at.size else 0.0))
            kept.append(None)
            continue
        block = ellipsoid[np.ix_(at, at)]
        variance = block.diagonal().astype(np.float64)

        def guessed(
            i: int = i, at: np.ndarray = at, block: np.ndarray = block, variance: np.ndarray = variance
        ) -> np.ndarray:
            fixed = (aimed[i].astype(q.dtype) @ q[i])[:, at].astype(np.float64)

            def times(a: np.ndarray) -> np.ndarray:
                return a.astype(q.dtype) @ block

            return multipliers.guess(fixed, times, variance, r[i, at], p[i][:, at], stage.effect[at])

        try:
            scale, m = multipliers.feasible(block, *multipliers.chosen(known[i, at], variance, guessed))
            own, wrong = columns(i, at, scale)
            found.append(_schur(m, own, 8 * U * (at.size + 1), wrong * (1 + gamma(at.size + 8))))
        except ValueError:
            if q.dtype == np.float64:
                raise
            found.append((None, np.inf))
            kept.append(None)
            continue
        kept.append(Kept(at, scale, m, own, None, variance, early))
        rd[i, at] = (r[i, at] / scale) ** 2 * (1 + 16 * U)
    return found, kept, rd


def _through_thin(
    stage: Stage, thin: Thin, c: np.ndarray, r: np.ndarray, aim: Aim, known: np.ndarray
) -> tuple[np.ndarray, list[Kept | None], np.ndarray]:
    """S+ (N, d+, d+) behind the first tap, whose Q = B B' is never formed.

    By the matrix inversion lemma Q + Q[:, A] (D - Q[A, A])^-1 Q[A, :] = B (I - B_A' D^-1 B_A)^-1 B'; so S+ is
    C' M^-1 C + G r D r G' with C' = G c B and M of the size of the input.
    """
    g, b = stage.G, thin.b
    x = c.astype(b.dtype)[:, :, None] * b
    u = g.ahead(x)
    largest = np.abs(c).max(axis=1, initial=0.0)
    slip = (
        (g.wrong + (2 * thin.relerr + 2 * U) * g.size) * frobenius(x)
        + g.size * largest * thin.error * 2
        + TINY
    )
    del x
    linear = c[:, None] * aim[0]
    rd, found, kept = np.zeros_like(r), list[Found](), list[Kept | None]()
    for i, own in enumerate(u):
        at = np.flatnonzero(r[i] > 0)
        if not np.isfinite(own).all():
            found.append((None, np.inf))
            kept.append(None)
            continue
        rows, scale, m, wrong = b[at], np.zeros(0), np.eye(b.shape[1], dtype=b.dtype), 0.0
        variance = np.square(rows, dtype=np.float64).sum(axis=1)
        columns = np.ascontiguousarray(own.T)
        try:
            if at.size:

                def guessed(
                    i: int = i, at: np.ndarray = at, rows: np.ndarray = rows, variance: np.ndarray = variance
                ) -> np.ndarray:
                    fixed = np.asarray((linear[i].astype(b.dtype) @ b) @ rows.T, np.float64)

                    def times(a: np.ndarray) -> np.ndarray:
                        return np.asarray((a.astype(b.dtype) @ rows) @ rows.T, np.float64)

                    effect = stage.effect[at]
                    return multipliers.guess(fixed, times, variance, r[i, at], aim[0][i][:, at], effect)

                d = multipliers.chosen(known[i, at], variance, guessed)
                scale, m, wrong = multipliers.feasible_thin(rows, *d, thin.relerr, thin.error)
            found.append(_schur(m, columns, wrong, float(slip[i])))
        except ValueError:
            if b.dtype == np.float64:
                raise
            found.append((None, np.inf))
            kept.append(None)
            continue
        rd[i, at] = (r[i, at] / scale) ** 2 * (1 + 16 * U)
        scaled = rows * scale[:, None]
        kept.append(Kept(at, scale, m, columns, scaled, variance, False) if at.size else None)
    x = np.zeros((len(c), u.shape[1], len(b)), b.dtype)
    added = g.add_scaled(x, rd)
    error = g.wrong * added + g.size * (2 * U * added + g.error * rd.max(axis=1, initial=0.0))
    s = g.ahead(np.ascontiguousarray(x.transpose(0, 2, 1)))
    symmetrise(s)
    return _sum(s, found, error), kept, rd


def _sum(s: np.ndarray, found: Sequence[Found], error: np.ndarray) -> np.ndarray:
    """S plus Z + e I of each example, plus the error, in place; every rounding added, that of `symmetrise` too."""
    length = frobenius(s)
    for i, (z, e) in enumerate(found):
        error[i] += e
        if z is not None:
            length[i] += 2 * frobenius(z[None])[0]
            s[i] += z
    diagonal = np.einsum("nii->ni", s)
    diagonal += (error + 4 * U * length + TINY)[:, None] * (1 + 32 * U)
    diagonal += np.abs(diagonal) * 4 * U  # the sum on the diagonal is rounded once more
    return s


def _schur(m: np.ndarray, columns: np.ndarray, wrong_m: float, wrong_c: float) -> Found:
    found = schur_complement(m, columns, floor=multipliers.ROOM, wrong_m=wrong_m, wrong_c=wrong_c)
    if found is None:
        raise ValueError("rounding left no bound at one of the inputs; use the global bound there")
    return found
