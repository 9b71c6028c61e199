"""Local LipLT: constants around single inputs of networks too wide for ellipsoids (convolutions), matrix-free.

Around an input x every tap is v = C y + q for increments: C linear (the middle of the slopes on the range of y in the
ball; for a maximum the mean of the entries that can win), and q the rest, zero wherever the slope is known. With
G[k, j] the linear map from q_j to y_k for these C, and a_x + sum_j a_j = 1, every increment is

    dy_k = G[k, x] dx + sum_j G[k, j] q_j = B_k xi,    B_k = [a_x^-1/2 G[k, x], a_j^-1/2 G[k, j] diag(t_j), ...]

with ||xi|| <= ||dx|| if q_j = diag(t_j) xi_j, ||xi_j|| <= ||dx||. ||S_k B_k||, S_k the largest slopes, bounds what the
tap can pass on; Lanczos on S B B' S bounds it, many inputs side by side. Single entries, which give the ranges, obey

    |dy_ki| <= (||D[k, x]_i|| + sum_j min(||D[k, j]_i alive_j|| m_j, sum_l |D[k, j]_il| rho_jl)) ||dx||,

D the direct linear maps, m_j and rho_j bounds of ||dv_j|| and |dv_jl| per ||dx||. The rows to the outputs are few: the
Gram matrices of their blocks give all constants without a norm. With the slopes of the whole line this is LipLT (CRM
paper, Theorem 3.3). l2 norm; holds except with a stated probability. Of D the rounding error is known (`Enclosure`); of
the products on a device with B_k and with the rows it is bounded by `product_rounding`, and added.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse as sp
from jax import lax

from lipbounds._form.lure import LureForm, multiplicity, propagate
from lipbounds._form.program import Tap
from lipbounds._gain.blocks import Node, TapScaling
from lipbounds._local.ellipsoids import Values, centre_and_radius
from lipbounds._norms import enclosures
from lipbounds._norms.lanczos import lanczos_columns
from lipbounds._norms.rounding import UNDERFLOW, U, gamma
from lipbounds._triangle import product_rounding, recursion
from lipbounds._triangle.formed_blocks import matrices
from lipbounds._triangle.product_rounding import OUTPUT, Spread

_ROUNDING = 1e-10  # allowance, relative, of sums of numbers >= 0
_CANCELLED = 2.0**-40  # allowance, relative to the whole, of the squares of rows, beside that of their sums
_UNDERFLOW = 2.0**-900  # of the squares of rows
_LARGEST, _SMALLEST = 2.0**400, 2.0**-400  # of bounds of what a tap passes on: squares are in the range
_RTOL = 0.1  # of the norms of the maps to the taps
_STEPS = 32
# Products that err by d make the matrix of the Lanczos recurrence that of an operator within 2 sqrt(steps) of the error
# of S B B' S, which is 2 s d + d^2: its root s grows by less than that many times d.
# What underflow loses of S B (B' S u) is no share of it, however short B' S u is: an error d of s^2 itself.
_NOISE, _FLUSHED = 4 * _STEPS**0.5 + 2 * _STEPS**0.25, 2 * _STEPS**0.25

# Linearised tap around N inputs, each array with a leading axis of inputs: diagonal (elementwise), weights of a group's
# entries (max, min, logsumexp), or the order of each group of a sort and whether it is decided.
Linear = dict[str, Any]


class Front:
    """Data of local LipLT that is computed once per form and reused for all inputs; it does not keep the form alive."""

    def __init__(self, form: LureForm) -> None:
        self.taps = form.taps
        host = recursion.host_form(form)
        plain = [TapScaling(None, np.ones(t.size_out), np.ones(t.size_in)) for t in self.taps]
        nodes: list[Node] = [(k,) for k in range(len(self.taps))]
        self.direct: list[dict[int, tuple[Any, float]]] = [{} for _ in self.taps]  # |M|, e of D[k, j] = M + E
        self.first = [np.zeros(tap.size_in) for tap in self.taps]  # ||D[k, x]_i||
        pairs, inputs = recursion.structure(host, nodes, plain), {}
        for (source, target), block in matrices(host, pairs, plain):
            if source:
                middle, error = block.with_error()
                self.direct[target[0]][source[0]] = np.abs(middle), error
            else:
                self.first[target[0]] = enclosures.enclosure_row_norms(block, 2)
                inputs[target[0]] = enclosures.enclosure_cheap_norm(block)
        self.groups = {k: _Groups(tap) for k, tap in enumerate(self.taps) if tap.groups is not None}
        self.before: list[tuple[int, ...]] = []  # the taps that a tap depends on
        for k in range(len(self.taps)):
            sources = set(self.direct[k])
            self.before.append(tuple(sorted(sources.union(*(self.before[j] for j in sources)))))
        self.legs = product_rounding.legs(form, inputs)


# --- taps around N inputs ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Near:
    """One tap around N inputs, v = C y + q; every array has a row per input.

    Args:
        linear: C.
        passes: (N, size_in) largest |slope|; 0 where an entry has no effect. Below, m is any bound of ||passes * dy||.
        gain: ||dv|| <= gain m.
        reach: (N, size_out), |dv_l| <= reach_l ||dx||.
        weights: (N, size_out), ||q / weights|| <= m; q is 0 where weights are 0.
        entries: (N, size_out), |q_l| <= entries_l ||dx||.
    """

    linear: Linear
    passes: np.ndarray
    gain: float
    reach: np.ndarray
    weights: np.ndarray
    entries: np.ndarray


def _elementwise(c: np.ndarray, r: np.ndarray, rho: np.ndarray) -> Near:
    passes = (np.abs(c) + r) * (1 + 4 * U)
    weights = r / np.where(passes > 0, passes, 1.0) * (1 + 4 * U)
    return Near({"c": c}, passes, 1.0, passes * rho * (1 + 4 * U), weights, r * rho * (1 + 4 * U))


class _Groups:
    """Index tables of a group tap; repeated entries of a group count once."""

    def __init__(self, tap: Tap) -> None:
        assert tap.groups is not None
        table = tap.groups.array
        self.kind, self.table, self.size = tap.kind, table, tap.size_in
        order = np.argsort(table, axis=1, kind="stable")
        ranked = np.take_along_axis(table, order, axis=1)
        self.fresh = np.ones(table.shape, bool)
        np.put_along_axis(self.fresh, order[:, 1:], ranked[:, 1:] != ranked[:, :-1], axis=1)
        flat = table.reshape(-1)
        self.back = sp.csr_array((np.ones(flat.size), (flat, np.arange(flat.size))), (tap.size_in, flat.size))
        # multiplicity of an entry in its group, stored at its first place
        self.times = self.fresh.astype(float)
        if tap.kind == "logsumexp" and not self.fresh.all():
            self.times *= (table[:, :, None] == table[:, None, :]).sum(axis=2)
        self.root = float(np.sqrt(multiplicity(tap).max(initial=1.0))) * (1 + 4 * U)

    def near(self, y: np.ndarray, half: np.ndarray, rho: np.ndarray) -> Near:
        """y, half, rho (N, n): entries stay within `half` of y in the ball, and move by at most rho ||dx||."""
        low, high = y - half, y + half
        if self.kind == "sort":
            return self._sorted(*(a[:, self.table] for a in (y, low, high, rho)))
        if self.kind == "min":
            low, high = -high, -low
        low, high, moves = low[:, self.table], high[:, self.table], rho[:, self.table]  # (N, groups, width)
        if self.kind == "logsumexp":
            return self._soft(low, high, moves)
        can = self.fresh & (high >= np.where(self.fresh, low, -np.inf).max(axis=2, keepdims=True))
        rivals = can.sum(axis=2)
        # dv = lambda' dy with lambda in the simplex on `can`, and ||lambda - share|| <= sqrt(1 - 1 / rivals) there
        weights = np.where(rivals > 1, np.sqrt(1 - 1 / rivals), 0.0) * (1 + _ROUNDING)
        total = np.sqrt(np.square(moves * can).sum(axis=2)) * (1 + _ROUNDING)
        passes = np.minimum((self.back @ can.reshape(len(y), -1).T.astype(float)).T, 1.0)
        return Near(
            {"share": can / rivals[:, :, None]},
            passes,
            self.root,
            (moves * can).max(axis=2),
            weights * self.root,
            weights * total,
        )

    def _soft(self, low: np.ndarray, high: np.ndarray, moves: np.ndarray) -> Near:
        """logsumexp: dv = lambda' dy, lambda a mean of softmax weights in the ball, so in [a, b] entry by entry.

        With |lambda - c| <= r and any b >= lambda, (lambda' dy)^2 <= sum b dy^2 as lambda sums to 1, and
        ((lambda - c)' dy)^2 <= sum(r^2 / b) sum(b dy^2). Where the weights are known too badly b is 1, c the mean.
        """
        top = high.max(axis=2, keepdims=True)
        with np.errstate(under="ignore"):
            least, most = (self.times * np.exp(end - top) for end in (low, high))
        most = np.where(self.fresh, np.maximum(most, 1e-300), 0.0)  # entries must not vanish by underflow
        whole = most.sum(axis=2, keepdims=True)
        # sums over the other entries, from below and from above (with an allowance for cancellation)
        others = np.maximum(least.sum(axis=2, keepdims=True) - least, 0.0)
        rivals_most = np.maximum(whole - most, 0.0) + 8 * (low.shape[2] + 4) * U * whole
        b = np.where(self.fresh, most / np.where(self.fresh, most + others, 1.0), 0.0)
        b = np.minimum(b * (1 + _ROUNDING), 1.0)
        a = least / (least + rivals_most) * (1 - _ROUNDING)
        c, r = (a + b) / 2, (b - a) / 2 * (1 + _ROUNDING) + 1e-290
        ratios = np.where(self.fresh, r / np.sqrt(np.where(b > 0, b, 1.0)), 0.0)
        weights = np.sqrt(np.square(ratios).sum(axis=2)) + 1e-150  # squares may underflow
        rivals = self.fresh.sum(axis=1)
        mean = np.where(rivals > 1, np.sqrt(1 - 1 / rivals), 0.0)
        far = (weights > mean)[:, :, None]
        b = np.where(far, self.fresh, b)
        weights = np.minimum(weights, mean) * (1 + _ROUNDING)
        total = np.sqrt((b * np.square(moves)).sum(axis=2)) * (1 + _ROUNDING)
        reach = np.minimum((moves * self.fresh).max(axis=2), (moves * b).sum(axis=2)) * (1 + _ROUNDING)
        squares = (self.back @ b.reshape(len(b), -1).T).T
        share = np.where(far, self.fresh / rivals[:, None], c * self.fresh)
        return Near(
            {"share": share}, np.sqrt(squares) * (1 + _ROUNDING), 1.0, reach, weights, weights * total
        )

    def _sorted(self, y: np.ndarray, low: np.ndarray, high: np.ndarray, moves: np.ndarray) -> Near:
        order = np.argsort(y, axis=2, kind="stable")
        high, low, own = (np.take_along_axis(a, order, axis=2) for a in (high, low, moves))
        decided = np.all(np.maximum.accumulate(high, axis=2)[:, :, :-1] < low[:, :, 1:], axis=2)
        open_ = np.logical_not(decided)[:, :, None]
        total = np.sqrt(np.square(moves).sum(axis=2, keepdims=True)) * (1 + _ROUNDING)
        reach = np.where(open_, moves.max(axis=2, keepdims=True), own)
        # C is the mean of all orders: lambda - C has norm 1 at most for every doubly stochastic lambda
        weights, entries = np.broadcast_to(open_, y.shape) * 1.0, np.broadcast_to(open_ * total, y.shape)
        out = [np.zeros((len(y), self.size)) for _ in range(3)]
        for full, part in zip(out, (reach, weights, entries), strict=True):
            full[:, self.table] = part
        return Near({"order": order, "decided": decided}, np.ones((len(y), self.size)), 1.0, *out)


def _apply(tap: Tap, linear: Linear, y: jax.Array) -> jax.Array:
    """C y around one input."""
    if tap.groups is None:
        return linear["c"] * y
    rows = y[tap.groups.array]
    if tap.kind != "sort":
        return (linear["share"] * rows).sum(axis=1)
    ordered = jnp.take_along_axis(rows, linear["order"], axis=1)
    ordered = jnp.where(linear["decided"][:, None], ordered, rows.mean(axis=1, keepdims=True))
    return jnp.zeros(tap.size_out, y.dtype).at[tap.groups.array].add(ordered)


# --- the recursion -------------------------------------------------------------------------------------------------


def grams(
    form: LureForm,
    front: Front,
    values: Values,
    eps: np.ndarray,
    *,
    anchored: bool,
    failure: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """(N, J, K, K) blocks g: the constant of a' z at an example is at most sum_j sqrt(a' g_j a).

    inf where that is beyond the range of float64.

    Args:
        front: of the form.
        eps: (N,) radii; anchored: one of the two inputs is the centre.
        failure: the probability with which this may be wrong, of each example.
    """
    taps = front.taps
    near: list[Near] = []
    t: list[np.ndarray] = []  # of the module docstring
    m: list[np.ndarray] = []
    lost = np.zeros(len(eps), bool)  # beyond the range in which squares are safe: no bound

    def usable(a: np.ndarray) -> np.ndarray:
        beyond = ~(np.abs(a) < _LARGEST)
        lost[beyond.any(axis=1) if a.ndim > 1 else beyond] = True
        return np.where(beyond, 0.0, a)

    for k in range(len(taps)):
        rho = usable(_entries(front, k, near, m, len(eps)))
        reach = np.minimum(rho * eps[:, None] * (1 + 4 * U), _LARGEST**2)
        if k in front.groups:
            half = (reach + values.error[k][:, None]) * (1 + 4 * U)
            one = front.groups[k].near(values.y[k], half, rho)
        else:
            one = _elementwise(*centre_and_radius(form, k, values, reach, reach, anchored), rho)
        size = np.minimum(
            _norm(form, front, k, one, near, t, failure / len(taps), rng), _length(one.passes * rho)
        ) * (1 + _ROUNDING)
        near.append(one)
        m.append(usable(np.minimum(one.gain * size, _length(one.reach)) * (1 + _ROUNDING)))
        # q lies in a ball and in a box: of two ellipsoids the one with the shorter axes
        ball = one.weights * size[:, None]
        box = np.sqrt(one.entries * one.entries.sum(axis=1, keepdims=True)) * (1 + _ROUNDING)
        box += np.where(one.entries > 0, _SMALLEST, 0.0)
        t.append(usable(np.where((_length(box) < _length(ball))[:, None], box, ball)))
    with jax.enable_x64(True):
        out = np.array(_rows(form, tuple(n.linear for n in near), tuple(t), np.zeros(len(eps))))
    diagonal = np.einsum("njkk->njk", out)  # a view
    longest = max([form.in_size, *(tap.size_out for tap in taps)])
    diagonal += (_CANCELLED + 2 * gamma(longest)) * diagonal.sum(axis=2, keepdims=True)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        wrong = _spread(front, range(len(taps)), near, t).backward(front.legs, OUTPUT, np.ones(len(eps)))
        wrong = np.where(np.isfinite(wrong) & ~lost, wrong, np.inf)
        # sum_k |a_k| wrong <= sqrt(K) wrong ||a||
        rest = np.square(wrong)[:, None, None] * len(out[0, 0]) * (1 + _ROUNDING) + _UNDERFLOW
        last = np.where(np.eye(out.shape[2]) > 0, rest, 0.0)
    return np.concatenate([out, last[:, None]], axis=1)


def _spread(front: Front, sources: Iterable[int], near: list[Near], inject: Any) -> Spread:
    gain, largest, roundings = {}, {}, {}
    for j in sources:
        group = j in front.groups
        gain[j] = np.ones(len(inject[j])) if group else np.abs(near[j].linear["c"]).max(axis=1, initial=0.0)
        largest[j] = inject[j].max(axis=1, initial=0.0)
        roundings[j] = 4 + (front.groups[j].table.shape[1] if group else 0)
    return Spread(gain, largest, roundings)


def _length(a: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(np.einsum("ni,ni->n", a, a)) + np.sqrt(a.shape[1]) * 2.0**-510 * a.any(axis=1))


def _entries(front: Front, k: int, near: list[Near], m: list[np.ndarray], count: int) -> np.ndarray:
    """rho (N, n_k) of the module docstring."""
    rho = np.repeat(front.first[k][:, None], count, axis=1)
    for j, (block, error) in front.direct[k].items():
        squares = block.power(2) if sp.issparse(block) else np.square(block)
        reach = np.ascontiguousarray(near[j].reach.T)
        slack = error * np.minimum(m[j], _length(near[j].reach)) * (1 + _ROUNDING)
        # each square may lose half the least denormal number
        rows = np.sqrt(squares @ (reach > 0).astype(float) + block.shape[1] * 2.0**-1074)
        rho += np.minimum(rows * m[j], block @ reach) + slack
    rho = np.where(rho > 0, np.maximum(rho, _SMALLEST), 0.0)
    return np.ascontiguousarray(rho.T) * (1 + _ROUNDING)


def _norm(
    form: LureForm,
    front: Front,
    k: int,
    one: Near,
    near: list[Near],
    t: list[np.ndarray],
    failure: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """(N,) bounds of ||S_k B_k||; inf where rounding does not allow one."""
    # a_j in proportion to the undecided share of what passes tap j
    shares = {j: _length(t[j]) / np.maximum(_length(near[j].reach), 1e-300) for j in front.before[k]}
    total = 1.0 + sum(shares.values(), np.zeros(len(one.passes)))
    scaled = {
        j: t[j] * np.sqrt(total / np.where(share > 0, share, 1.0))[:, None] * (1 + _ROUNDING)
        for j, share in shares.items()
    }
    linear = {j: near[j].linear for j in front.before[k]}
    start = np.repeat(rng.standard_normal((1, front.taps[k].size_in)), len(total), axis=0)
    with jax.enable_x64(True):
        device = jax.tree.map(jnp.asarray, (linear, scaled, np.sqrt(total), one.passes))
        product = partial(_there_and_back, form, *device, target=k)

        def apply(u: np.ndarray) -> np.ndarray:
            image = np.asarray(product(jnp.asarray(u)))
            if not np.isfinite(image).all():
                raise OverflowError
            return image

        try:
            found = lanczos_columns(apply, start, failure=failure, rtol=_RTOL, max_steps=_STEPS)
        except OverflowError:
            return np.full(len(total), np.inf)
    spread, first = _spread(front, front.before[k], near, scaled), np.sqrt(total)
    top = one.passes.max(axis=1, initial=0.0)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        size, wrong = spread.forward(front.legs, k, first)
        wrong = np.maximum(wrong + 4 * U * size, spread.backward(front.legs, k, first)) * top
        still = replace(spread, inject={j: np.zeros_like(first) for j in scaled})
        _, flushed = still.forward(front.legs, k, np.zeros_like(first))
        flushed = flushed * top + UNDERFLOW * one.passes.shape[1]
        size = (found + _NOISE * wrong + _FLUSHED * np.sqrt(flushed)) * (1 + _ROUNDING)
        return np.asarray(np.where(np.isnan(size), np.inf, size))


@partial(jax.jit, static_argnames=("target",))
def _there_and_back(
    form: LureForm, linear: Any, scaled: Any, first: Any, passes: Any, u: jax.Array, *, target: int
) -> jax.Array:
    """S B B' S u of the target tap, one per input (N, n)."""
    sizes = {j: jax.ShapeDtypeStruct((form.taps[j].size_out,), u.dtype) for j in scaled}

    def one(linear: Any, scaled: Any, first: Any, passes: Any, u: jax.Array) -> jax.Array:
        def forward(x: jax.Array, xi: Any) -> jax.Array:
            seen = {}

            def tap(k: int, y: Any) -> Any:
                seen[k] = y
                return _apply(form.taps[k], linear[k], y) + scaled[k] * xi[k] if k in linear else None

            propagate(form, first * x, tap, dtype=u.dtype)
            return jnp.asarray(passes * seen[target])

        back = jax.linear_transpose(forward, jax.ShapeDtypeStruct((form.in_size,), u.dtype), sizes)
        return forward(*back(u))

    return jax.vmap(one)(linear, scaled, first, passes, u)


@jax.jit
def _rows(form: LureForm, linear: Any, t: Any, inputs: jax.Array) -> jax.Array:
    """(N, J, K, K) Gram matrices of the rows of [G[z, x], G[z, j] diag(t_j), ...], one per entry of `inputs`."""
    sizes = tuple(jax.ShapeDtypeStruct((tap.size_out,), inputs.dtype) for tap in form.taps)

    def one(linear: Any, t: Any, _: jax.Array) -> jax.Array:
        def forward(x: jax.Array, xi: Any) -> jax.Array:
            def tap(k: int, y: Any) -> Any:
                return _apply(form.taps[k], linear[k], y) + t[k] * xi[k]

            return jnp.asarray(propagate(form, x, tap, dtype=inputs.dtype))

        back = jax.linear_transpose(forward, jax.ShapeDtypeStruct((form.in_size,), inputs.dtype), sizes)
        x, xi = jax.vmap(back)(jnp.eye(form.num_outputs, dtype=inputs.dtype))
        return jnp.stack([jnp.matmul(rows, rows.T, precision=lax.Precision.HIGHEST) for rows in (x, *xi)])

    return jax.vmap(one)(linear, t, inputs)
