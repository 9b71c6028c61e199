"""The search for multipliers on a chain: one factorisation per step, with the exact gradient of all multipliers.

With D = 4 / T and S_k = W V W' the ellipsoid of the pre-activations of tap k, V of what is in front of it, Q > 0 is
D_k > S_k, tap after tap. So

    D_k = mu_k exp(q_k) (1 + exp(s_k)),      mu_k = lambda_max(exp(-q_k / 2) S_k exp(-q_k / 2))

is feasible for all q_k (n_k,) and s_k, and L-BFGS runs without constraints. S_k is dense at a core. At a layer that is
eliminated it is applied to vectors, which takes the factor of the core in front, without what this layer adds to it.

For S_out = W_K (Q^-1)_KK W_K' and a direction a, p = Q^-1 W_K' a and y = W p,

    d (a' S_out a) / d log T_i = T_i p_i (y_i - p_i),

and the same holds for z' S_k z with the matrix cut off in front of tap k, so that the derivative of mu_k, with its
eigenvector as z, is one more column in the same pass back. Floats of any precision: what is found is proved elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lipbounds._lipsdp.chain import Chain
from lipbounds._norms.enclosures import Factor
from lipbounds._text.progress import clock, remaining, say

_POWERS = 12  # steps of a power iteration from the last eigenvector; at first four times as many
_MEMORY = 20  # pairs of L-BFGS
_FARTHEST = 2.0  # of a step in the logarithm of a multiplier
_LEAST_STEP = 1e-3
_FLOOR = 1e-30

Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]


class Tap(NamedTuple):
    """Multipliers of one tap: T, mu and exp(s); z = exp(-q/2) times the unit eigenvector u of mu; share: u_i^2."""

    T: Any
    mu: float
    spare: float
    z: Any
    share: np.ndarray


class Core(NamedTuple):
    """Of one core: sqrt(T), the factor, the factor without what the next layer adds, and L^-1 of the coupling ahead."""

    r: Any
    factor: Any
    before: Any
    ahead: Any


class Passed(NamedTuple):
    """One factorisation: taps 1, 2, ... (0 is the input), cores, and S_out."""

    taps: list[Tap | None]
    cores: list[Core]
    sigma: np.ndarray


def _scaled(maps: list[Any]) -> tuple[list[Any], list[int]]:
    """(maps, e): W_k by powers of two, so that S_{k+1}, times 4^-e_k, is within the range of float32."""
    out, exponents, total = [], [], 0
    v = np.random.default_rng(0).standard_normal(maps[0].shape[1])
    for m in maps:
        moved = m @ v
        gain = float(np.linalg.norm(moved)) / max(float(np.linalg.norm(v)), 1e-300)
        exponent = math.frexp(gain)[1] if 0 < gain < math.inf else 0
        out.append(m * 2.0**-exponent)
        total += exponent
        exponents.append(total)
        v = moved * 2.0**-exponent
    return out, exponents


class Search:
    """A chain with its arithmetic. Parameters are one vector: q of every tap, then s of every tap."""

    def __init__(self, chain: Chain, cores: tuple[int, ...], arithmetic: Any) -> None:
        self.a, self.widths, self.outputs, self.cores = arithmetic, chain.widths, chain.outputs, cores
        self.count = len(self.widths)
        maps, self.exponents = _scaled([m.midpoint_for_search() for m in chain.maps])
        self.maps = [self.a.map(m) for m in maps]
        self.left, self.right, self.across = {}, {}, []
        for j in (*cores, self.count):
            if j - 1 >= 0 and j - 1 not in cores:
                self.left[j] = self.a.weighed(maps[j - 1], True)
            if j + 1 < self.count and j + 1 not in cores and j < self.count:
                self.right[j] = self.a.weighed(maps[j], False)
        for i, j in zip(cores, (*cores[1:], self.count), strict=True):
            if j == i + 1:
                self.across.append(self.a.dense(maps[i].T))
            else:
                self.across.append(self.a.dense(Factor(maps[i + 1]).times(maps[i]).T * 0.5))
        self.ends = np.cumsum(self.widths[1:])[:-1]
        self.eigenvectors: dict[int, Any] = {}

    @property
    def size(self) -> int:
        """Parameters."""
        return sum(self.widths[1:]) + self.count - 1

    def split(self, x: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """(q, s): q[k] of tap k + 1."""
        n = sum(self.widths[1:])
        return np.split(x[:n], self.ends), x[n:]

    def length(self, value: float) -> float:
        """L of the value of an objective."""
        return math.ldexp(math.exp(value), self.exponents[-1])

    def inverse_multipliers(self, passed: Passed) -> tuple[np.ndarray, ...]:
        """D = 4 / T per tap, in the units of the chain."""
        taps = zip(passed.taps[1:], self.exponents, strict=False)
        return tuple(np.ldexp(4.0 / tap.T.astype(np.float64), 2 * e) for tap, e in taps if tap is not None)

    # -- forward

    def _tap(self, k: int, q: np.ndarray, s: float, apply: Callable[[Any], Any]) -> Tap:
        """D of tap k from its parameters; apply(v) is S_k v."""
        half = np.exp(-q / 2).astype(self.a.dtype)[:, None]
        v, steps = self.eigenvectors.get(k), _POWERS
        if v is None:
            v = np.random.default_rng(k).standard_normal((len(q), 1)).astype(self.a.dtype)
            steps *= 4
        mu = 0.0
        for _ in range(steps):
            v = v / max(float((v * v).sum()) ** 0.5, _FLOOR)
            mapped = half * apply(half * v)
            mu = float((v * mapped).sum())
            v = mapped
        v = v / max(float((v * v).sum()) ** 0.5, _FLOOR)
        mu = max(float((v * (half * apply(half * v))).sum()), mu, _FLOOR)
        self.eigenvectors[k] = v
        spare = float(np.exp(s))
        share = v[:, 0].astype(np.float64) ** 2
        T = (4.0 / (mu * np.exp(q) * (1 + spare))).astype(self.a.dtype)
        return Tap(T, mu, spare, half * v, share / max(share.sum(), _FLOOR))

    def forward(self, x: np.ndarray) -> Passed | None:
        """The factorisation for parameters x; None where there is none in these floats."""
        a, (q, s) = self.a, self.split(x)
        taps: list[Tap | None] = [None] * self.count
        made: list[Core] = []
        ahead = None
        for place, j in enumerate(self.cores):
            sigma = self._sigma(j, taps, ahead)
            c, r = None, None
            if j > 0:
                assert sigma is not None
                taps[j] = own = self._tap(j, q[j - 1], s[j - 1], partial(a.times, sigma))
                r = own.T**0.5
                c = a.add_scaled(None, sigma, r / 2)
            factor = before = None if c is None else a.factor(c)
            if c is not None and factor is None:
                return None
            if j in self.right:
                taps[j + 1] = after = self._tap(j + 1, q[j], s[j], partial(self._through, j, before, r))
                scale = 0.5 / r if r is not None else np.full(self.widths[j], 0.5, a.dtype)
                factor = a.factor(a.add_scaled(c, self.right[j](after.T), scale))
                if factor is None:
                    return None
            coupling = self.across[place] if r is None else a.scaled(self.across[place], 1 / r)
            ahead = a.solve_wide(factor, coupling)
            made.append(Core(r, factor, before, ahead))
        out = self._sigma(self.count, taps, ahead)
        found = np.asarray(out, np.float64)
        return Passed(taps, made, (found + found.T) / 2) if np.isfinite(found).all() else None

    def _sigma(self, j: int, taps: list[Tap | None], ahead: Any) -> Any:
        """S_j dense, of a core or the output; None for the input."""
        if j == 0:
            return None
        whole = None if ahead is None else self.a.gram(ahead)
        if j in self.left:
            one = taps[j - 1]
            inverse = 1 / one.T if one is not None else np.ones(self.widths[0], self.a.dtype)
            part = self.left[j](inverse)
            whole = part if whole is None else whole + part
        return whole

    def _through(self, j: int, factor: Any, r: Any, v: Any) -> Any:
        """S v of the tap behind the core j, which is not a core."""
        return self.a.times(self.maps[j], self._inverse(j, factor, r, v))

    def _inverse(self, j: int, factor: Any, r: Any, v: Any) -> Any:
        """V_j W_j' v, V_j of the core j and what is in front of it alone."""
        x = self.a.times(self.maps[j], v, True)
        if r is None:
            return x
        x = self.a.solve(factor, x / r[:, None])
        return self.a.solve(factor, x, True) / r[:, None]

    # -- back

    def backward(self, passed: Passed, weight: np.ndarray) -> np.ndarray:
        """The gradient in the parameters of f(S_out), with df = tr(weight dS_out).

        t (n, m) holds columns behind a node, and `counts` (m,) how much each of them counts: what they ask of the node
        before is W't.
        """
        a, (q, s) = self.a, ([np.zeros(0)] * (self.count - 1), np.zeros(self.count - 1))
        counts, vectors = np.linalg.eigh(weight)
        t = vectors.astype(a.dtype)
        for place in reversed(range(len(self.cores))):
            j, core = self.cores[place], passed.cores[place]
            p, between = self._before(place, t, passed)
            if between is not None:
                y = a.times(self.maps[j], p)
                q[j], s[j], more = self._slope(passed, j + 1, between, y, counts)
                if j == 0:
                    break
                z = self._inverse(j, core.before, core.r, passed.taps[j + 1].z)  # type: ignore[union-attr]
                p, counts = np.concatenate([p, z], axis=1), np.append(counts, more)
            if j == 0:
                break
            own = passed.taps[j]
            assert own is not None
            t = p * own.T[:, None] / 2
            y = a.times(self.maps[j - 1], self._last(place, t, passed))
            q[j - 1], s[j - 1], more = self._slope(passed, j, p, y, counts)
            t, counts = np.concatenate([t, own.z], axis=1), np.append(counts, more)
        return np.concatenate([*q, s])

    def _before(self, place: int, t: Any, passed: Passed) -> tuple[Any, Any]:
        """(p of the core, p of the layer between it and t): Q^-1 W't; None where no layer is between."""
        a, j, core = self.a, self.cores[place], passed.cores[place]
        p = a.solve(core.factor, a.times(core.ahead, t), True)
        p = p if core.r is None else p / core.r[:, None]
        following = self.cores[place + 1] if place + 1 < len(self.cores) else self.count
        if following == j + 1:
            return p, None
        between = passed.taps[j + 1]
        assert between is not None
        asked = a.times(self.maps[j + 1], t, True)
        return p, asked / between.T[:, None] + a.times(self.maps[j], p) / 2

    def _last(self, place: int, t: Any, passed: Passed) -> Any:
        """p of the layer in front of the core at `place`, for the columns t of that core."""
        if place == 0:
            return self.a.times(self.maps[0], t, True)  # the input, eliminated: its block is the identity
        p, between = self._before(place - 1, t, passed)
        return p if between is None else between

    def _slope(
        self, passed: Passed, k: int, p: Any, y: Any, counts: np.ndarray
    ) -> tuple[np.ndarray, float, float]:
        """(derivative in q of tap k, in s, how much the column z of its S counts)."""
        tap = passed.taps[k]
        assert tap is not None
        each = -tap.T.astype(np.float64) * ((p * (y - p)).astype(np.float64) @ counts)  # in log D
        total = float(each.sum())
        return each - total * tap.share, total * tap.spare / (1 + tap.spare), total / tap.mu


# --- objectives, and their minimisation ------------------------------------------------------------------------------


def network(sigma: np.ndarray) -> tuple[float, np.ndarray]:
    """log L, smoothed from above where eigenvalues meet, and its derivative in S."""
    values, vectors = np.linalg.eigh(sigma)
    top, power = values[-1], 16.0
    ratio = np.maximum(values / top, 0.0)
    total = float((ratio**power).sum())
    weight = (vectors * (ratio ** (power - 1) / (2 * top * total))) @ vectors.T
    return 0.5 * float(np.log(top) + np.log(total) / power), weight


def pairs_of(objective: str | np.ndarray) -> Objective:
    """The mean of log L_ij over all pairs ("mean"), by weights (K, K), or the "largest" L_ij, smoothed from above."""

    def pairs(sigma: np.ndarray) -> tuple[float, np.ndarray]:
        i, j = np.triu_indices(len(sigma), 1)
        d = sigma.diagonal()
        squares = np.maximum(d[i] + d[j] - 2 * sigma[i, j], _FLOOR)
        if isinstance(objective, str) and objective == "largest":
            shares = (squares / squares.max()) ** 16.0
            value = 0.5 * float(np.log(squares.max()) + np.log(shares.sum()) / 16.0)
        else:
            shares = np.ones(len(i)) if isinstance(objective, str) else np.asarray(objective)[i, j]
            value = 0.5 * float((shares / shares.sum()) @ np.log(squares))
        each = 0.5 * shares / (shares.sum() * squares)
        weight = np.zeros_like(sigma)
        weight[i, j] = weight[j, i] = -each
        np.fill_diagonal(weight, -weight.sum(axis=1))
        return value, weight

    return pairs


class Minimum(NamedTuple):
    """Parameters, the value of the objective (log L) and S_out there, and steps done."""

    x: np.ndarray
    value: float
    passed: Passed
    steps: int


def minimise(search: Search, x: np.ndarray, objective: Objective, most: int, what: str) -> Minimum | None:
    """At most so many steps of L-BFGS from x; None where there is no factorisation there."""

    def at(x: np.ndarray) -> tuple[float, Passed | None]:
        passed = search.forward(x)
        if passed is None or not passed.sigma.diagonal().max() > 0:
            return np.inf, None
        return objective(passed.sigma)[0], passed

    value, passed = at(x)
    if passed is None:
        return None
    g = search.backward(passed, objective(passed.sigma)[1])
    past: list[tuple[np.ndarray, np.ndarray, float]] = []
    done, began = 0, clock()
    for done in range(most):
        direction = _direction(g, past)
        length, slope, before = 1.0, float(g @ direction), value
        while True:
            tried = x + length * direction
            found, there = at(tried)
            if there is not None and found <= value + 1e-4 * length * slope:
                break
            length *= 0.3
            if length < _LEAST_STEP:
                return Minimum(x, value, passed, done)
        new = search.backward(there, objective(there.sigma)[1])
        step, change = tried - x, new - g
        if step @ change > 1e-10 * np.sqrt((step @ step) * (change @ change)):
            past = [*past[1 - _MEMORY :], (step, change, 1 / float(step @ change))]
        x, value, passed, g = tried, found, there, new
        left = remaining(began, done + 1, most)
        say(
            f"{what}: step {done + 1} of at most {most}{left}, {search.length(value):.6g} in float arithmetic"
        )
        if before - value < 1e-6:
            done += 1
            break
    else:
        done = most
    return Minimum(x, value, passed, done)


def _direction(g: np.ndarray, past: list[tuple[np.ndarray, np.ndarray, float]]) -> np.ndarray:
    """The step of L-BFGS, at most `_FARTHEST` in any parameter."""
    d, used = -g, []
    for step, change, rho in reversed(past):
        used.append(rho * (step @ d))
        d = d - used[-1] * change
    if past:
        step, change, _ = past[-1]
        d = d * ((step @ change) / (change @ change))
    else:
        d = d / np.abs(d).max()
    for (step, change, rho), a in zip(past, reversed(used), strict=True):
        d = d + step * (a - rho * (change @ d))
    return d * min(1.0, _FARTHEST / max(float(np.abs(d).max()), _FLOOR))
