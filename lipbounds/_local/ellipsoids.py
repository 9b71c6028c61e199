"""The ellipsoid recursion around single inputs, batched, every rounding included (NumPy and LAPACK, float64).

S (N, d, d) bounds every increment ds of the state between the input x and any x' in its ball: ds ds' <= eps^2 S. At a
tap, with T = [W; H] (pre-activations y = W s, and what of the state lives on),

    Q = T S T',    |dy_i| <= eps sqrt(Q_ii),    slopes [c - r, c + r] on that range,
    V = Q + Q[:, A] (D - Q[A, A])^-1 Q[A, :],   A the neurons with r > 0,  D > Q[A, A] diagonal,
    S+ = [G c, I] V [G c, I]' + G r D r G',

the recursion of `ellipsoid` with c and r of this input: a neuron whose slope is known is linear and has no multiplier.

Rounding is covered by adding e I, e a normwise bound: of a product with a map M, gamma || |M| || ||X||_F (`maps`); of
the inverse by `schur.schur_complement`. D - Q[A, A] and U[:, A] are scaled by D^-1/2 first, which makes the matrix
well conditioned; it is proved to be at least 0.03 I.

No matrix is formed that is larger than S, Q or D - Q[A, A], and of a sparse layer none at all: convolutions are applied
to the columns of S. Of one tap with n neurons, a of them active, and a state of d entries behind it, the operations are
2 a^3 / 3 (two Cholesky factorisations), a^2 d (a solution), a d^2 (F'F), and two products with the layer: 2 n d (n + d)
for a dense one, 2 (n + d) times its nonzeros for a sparse one. For n = a = d = 4096 and a convolution that is 2.7 n^3 =
1.8e11, about 4 seconds on one core. The first tap of a network with k < n / 2 inputs takes 2 k^3 / 3 + k^2 d + k d^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lipbounds._activations.slopes_on_intervals import anchored_slopes, pair_slopes
from lipbounds._form.lure import LureForm, proved_slopes
from lipbounds._form.steps import StaticArray
from lipbounds._gain.blocks import TapScaling
from lipbounds._local import multipliers
from lipbounds._local.maps import TINY, Matrix, column_norms, frobenius, matrix, stacked, symmetrise
from lipbounds._local.multipliers import Kept
from lipbounds._norms.rounding import U, gamma
from lipbounds._norms.schur import schur_complement
from lipbounds._triangle import recursion

_DEAD = 0.1  # least slope assumed of a neuron in a' dz/dv, as a dead neuron may become active in the ball


@dataclass(frozen=True, eq=False)
class Stage:
    """One tap between two states: y = W s, s+ = H s + G v, v = phi(y). T = [W; H], or W alone where H = 0."""

    tap: int
    neurons: int
    T: Matrix
    G: Matrix
    lives_on: bool


def stages(view: LureForm) -> tuple[Matrix, tuple[Stage, ...]]:
    """(A_0, stages) of an elementwise view; s_0 = A_0 x."""
    host = recursion.host_form(view)
    plain = [TapScaling(None, np.ones(tap.size_out), np.ones(tap.size_in)) for tap in view.taps]
    (start, _, _), *maps = host.state_maps(plain)
    made = []
    for k, (h, g, w) in enumerate(maps):
        assert g is not None and w is not None
        lives_on = bool(h.support(axis=0).any())
        both = stacked([w, h]) if lives_on else matrix(w)
        made.append(Stage(k, view.taps[k].size_in, both, matrix(g), lives_on))
    return matrix(start), tuple(made)


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

    @property
    def spread(self) -> np.ndarray:
        """(n,) upper bounds of the norms of the rows of B."""
        norms = column_norms(self.b.T[None])[0]
        return (norms * (1 + 2 * self.relerr) + self.error) * (1 + 4 * U)


class Passed(NamedTuple):
    """One recursion: S (N, K, K), and what another one can begin with.

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
            part of the state lives on.
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
            spread = np.sqrt(np.einsum("nii->ni", q)[:, :n])
        down = spread * eps[:, None] * (1 + 8 * U)
        down = up = np.where(np.isnan(down), np.inf, down)  # beyond the range of float64
        if place == 0 and first is not None:
            down, up = np.minimum(down, first[0]), np.minimum(up, first[1])
        c, r = centre_and_radius(view, stage.tap, values, down, up, anchored)
        slopes.append((c, r))
        known = values.relative[stage.tap] if values.relative else np.full_like(r, np.nan)
        if isinstance(s, Thin):
            s, own, rd = _through_thin(stage, s, c, r, aims[place], known)
        else:
            s, own, rd = _through(stage, q, c, r, aims[place], known)
        kept.append(own)
        if ranges is not None:
            ranges.append(Range(down, up, c, r, rd))
    assert not isinstance(s, Thin)
    middles = [c for c, _ in slopes]
    if not values.relative:
        return Passed(s, middles, [], np.zeros(len(eps)))
    squares = np.einsum("njk,njk->nj", directions @ s, directions)
    balance = multipliers.balance(steps, kept, slopes, directions, multipliers.weights(squares, gaps))
    compared = squares if gaps is None else squares / np.square(np.maximum(gaps, 1e-150))
    return Passed(s, middles, balance, compared.max(axis=1, initial=0.0))


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
    host = recursion.host_form(view)
    consts = [c.array if isinstance(c, StaticArray) else host.consts[c] for c in tap.consts]
    columns = [np.broadcast_to(c, tap.shapes[0]).reshape(-1) if np.ndim(c) else c for c in consts]
    if anchor is not None:
        return anchored_slopes(tap.expr, columns, anchor, lo, hi, known)
    return pair_slopes(tap.expr, columns, lo, hi, known)


Aim = tuple[np.ndarray, np.ndarray | None]


def _adjoints(steps: Sequence[Stage], values: Values, directions: np.ndarray) -> list[Aim]:
    """Per stage a' dz/dv (N, J, n) and, where the state lives on, a' dz/ds+ (N, J, d+), by `values.slope`."""
    found: list[Aim] = []
    for stage in reversed(steps):
        p = stage.G.behind(directions)
        found.append((p, directions if stage.lives_on else None))
        slope = values.slope[stage.tap]
        slope = np.where(np.abs(slope) < _DEAD, _DEAD, slope)
        back = slope[:, None] * p
        directions = stage.T.behind(np.concatenate([back, directions], axis=2) if stage.lives_on else back)
    return found[::-1]


def _through(
    stage: Stage, q: np.ndarray, c: np.ndarray, r: np.ndarray, aim: Aim, known: np.ndarray
) -> tuple[np.ndarray, list[Kept | None], np.ndarray]:
    """S+ (N, d+, d+) from Q (N, m, m), which may be overwritten.

    With P = [G c, I] and U = P Q, the recursion is S+ = (U c + G r D r) G' + U[:, rest] + F'F, where F'F bounds
    C' (D - Q[A, A])^-1 C, C' = U[:, A]. The error of column j of U is at most slip_j; G_real is within G.error of G.
    """
    g, n = stage.G, stage.neurons
    x = c[:, :, None] * q[:, :n]
    slip = (g.wrong + 2 * U * g.size) * column_norms(x) + TINY
    u = g.ahead(x)
    del x
    if stage.lives_on:
        u = u + q[:, n:]
        slip = slip + 2 * U * column_norms(u)
    linear = c[:, None] * aim[0]
    linear = linear if aim[1] is None else np.concatenate([linear, aim[1]], axis=2)
    rd, found, kept = np.zeros_like(r), list[Found](), list[Kept | None]()
    for i, (ellipsoid, own) in enumerate(zip(q, u, strict=True)):
        at = np.flatnonzero(r[i] > 0)
        if not at.size or not np.isfinite(ellipsoid).all():
            found.append((None, np.inf if at.size else 0.0))
            kept.append(None)
            continue
        block = ellipsoid[np.ix_(at, at)]
        variance = block.diagonal().copy()

        def made(i: int = i, at: np.ndarray = at, block: np.ndarray = block) -> np.ndarray:
            fixed = linear[i] @ q[i][:, at]
            return multipliers.guess(fixed, lambda a: a @ block, block.diagonal(), r[i, at], aim[0][i][:, at])

        scale, m = multipliers.feasible(block, *multipliers.chosen(known[i, at], variance, made))
        del block, made
        columns = np.ascontiguousarray((own[:, at] * scale).T)
        wrong = float(np.sqrt(np.square(scale * slip[i, at]).sum()) + 2 * U * frobenius(columns[None])[0])
        found.append(_schur(m, columns, 8 * U * (at.size + 1), wrong * (1 + gamma(at.size + 8))))
        kept.append(Kept(at, scale, m, columns, None, variance))
        rd[i, at] = (r[i, at] / scale) ** 2 * (1 + 16 * U)
    rest = None
    if stage.lives_on:
        rest = u[:, :, n:].transpose(0, 2, 1)
    x = u[:, :, :n]
    x *= c[:, None, :]
    wrong_x = np.sqrt(np.square(slip[:, :n] * c).sum(axis=1)) + 2 * U * frobenius(x)
    added = g.add_scaled(x, rd)
    wrong_x = wrong_x + 4 * U * (added + frobenius(x)) + g.error * rd.max(axis=1, initial=0.0)
    error = g.wrong * frobenius(x) + g.size * wrong_x
    s = g.ahead(np.ascontiguousarray(x.transpose(0, 2, 1)))
    if rest is not None:
        s += rest
        error = error + np.sqrt(np.square(slip[:, n:]).sum(axis=1)) + 4 * U * (frobenius(rest) + frobenius(s))
    return _sum(s, found, error), kept, rd


def _through_thin(
    stage: Stage, thin: Thin, c: np.ndarray, r: np.ndarray, aim: Aim, known: np.ndarray
) -> tuple[np.ndarray, list[Kept | None], np.ndarray]:
    """S+ (N, d+, d+) behind the first tap, whose Q = B B' is never formed.

    By the matrix inversion lemma Q + Q[:, A] (D - Q[A, A])^-1 Q[A, :] = B (I - B_A' D^-1 B_A)^-1 B'; so S+ is
    C' M^-1 C + G r D r G' with C' = G c B and M of the size of the input.
    """
    g, b = stage.G, thin.b
    x = c[:, :, None] * b
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
        rows, scale, m, wrong = b[at], np.zeros(0), np.eye(b.shape[1]), 0.0
        variance = np.square(rows).sum(axis=1)
        if at.size:

            def made(i: int = i, at: np.ndarray = at, rows: np.ndarray = rows) -> np.ndarray:
                fixed, variance = (linear[i] @ b) @ rows.T, np.square(rows).sum(axis=1)
                return multipliers.guess(
                    fixed, lambda a: (a @ rows) @ rows.T, variance, r[i, at], aim[0][i][:, at]
                )

            d = multipliers.chosen(known[i, at], variance, made)
            scale, m, wrong = multipliers.feasible_thin(rows, *d, thin.relerr, thin.error)
            rd[i, at] = (r[i, at] / scale) ** 2 * (1 + 16 * U)
        columns = np.ascontiguousarray(own.T)
        found.append(_schur(m, columns, wrong, float(slip[i])))
        kept.append(Kept(at, scale, m, columns, rows * scale[:, None], variance) if at.size else None)
    x = np.zeros((len(c), u.shape[1], len(b)))
    added = g.add_scaled(x, rd)
    error = g.wrong * added + g.size * (2 * U * added + g.error * rd.max(axis=1, initial=0.0))
    return _sum(g.ahead(np.ascontiguousarray(x.transpose(0, 2, 1))), found, error), kept, rd


Found = tuple[np.ndarray | None, float]  # Z and e, None for zero; e is inf where there is no bound


def _sum(s: np.ndarray, found: Sequence[Found], error: np.ndarray) -> np.ndarray:
    """The symmetric part of S, plus Z + e I of each example, plus the error, in place; every rounding added."""
    length = frobenius(s)
    symmetrise(s)
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
