"""The ellipsoid recursion: LipSDP along the state sequence, in float arithmetic on the device.

Sigma_k holds every increment of the state over unit increments of the input, ds' Sigma_k^-1 ds <= 1. For any diagonal
D > Sy (D = T^-1, the inverse of LipSDP's multipliers)

    Sy = W Sigma W',   X = Sigma + Sigma W' (D - Sy)^-1 W Sigma,   Sigma+ = A X A' + B D B'

and L^2 = lambda_max(Sigma_out), L_ij^2 = (e_i - e_j)' Sigma_out (e_i - e_j). Minimised over D this is the optimum of
LipSDP (Fazlyab et al., NeurIPS 2019): eliminating one multiplier after another from its LMI is exactly this recursion.

D is feasible by construction: with M = exp(-q/2) Sy exp(-q/2) and mu >= lambda_max(M),

    D_i = mu exp(q_i) (1 + margin + (|c_i| / r_i) exp(s_i))

covers every feasible D up to the margin (neurons with c = 0 want D at the edge). Sigma is rescaled at every tap by a
power of two and the exponent carried along, so depth costs no digits. Nothing here is a proof: `certificate` proves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lipbounds._lipsdp.recursion_step import (
    LOG2,
    Tap,
    floor,
    multiplier,
    rescale,
    through,
    top,
)
from lipbounds._text.progress import Pace, say
from lipbounds._triangle.core import pair_squares

_WIDE, _SMOOTH = 200, 7
_SHARP = 40  # squarings after which `top` is lambda_max to the last digit
_MEMORY = 20
_CHUNK, _TOLERANCE = 15, 1e-3  # of `Effort`


class Passed(NamedTuple):
    """One pass: the last ellipsoid is 2^exponent sigma; per run D_i / (Sy)_ii."""

    sigma: jax.Array
    exponent: jax.Array
    multipliers: tuple[jax.Array, ...]


def run(
    start: jax.Array,
    runs: Sequence[Tap],
    parameters: Sequence[Any],
    squarings: Any,
) -> Passed:
    """The recursion over all `runs`: taps, or stacks of taps of one shape (one more axis), which are scanned."""

    def step(carry: Any, item: Any) -> tuple[Any, Any]:
        sigma, exponent = carry
        tap, (q, s) = item
        relative = jnp.ones_like(tap.kappa)
        if tap.kappa.shape[0]:
            cross = tap.W @ sigma
            sy = cross @ tap.W.T
            sy = (sy + sy.T) / 2
            d = multiplier(sy, tap.kappa, q, s, squarings)
            own = jnp.diagonal(sy)
            relative = d / jnp.maximum(own, jnp.maximum(jnp.max(own) * 1e-30, floor(sy.dtype)))
            sigma = through(sigma, tap, d, sy, cross)
        else:
            sigma = tap.A @ sigma @ tap.A.T
        sigma, shift = rescale(sigma)
        return (sigma, exponent + shift), relative

    carry: Any = rescale(start)
    multipliers = []
    for taps, given in zip(runs, parameters, strict=True):
        if taps.A.ndim == 3:
            carry, d = jax.lax.scan(step, carry, (taps, given))
        else:
            carry, d = step(carry, (taps, given))
        multipliers.append(d)
    return Passed(carry[0], carry[1], tuple(multipliers))


KINDS = ("value", "entries", "largest", "pairs")


def objective(sigma: jax.Array, exponent: jax.Array, kind: Any, weights: Any, squarings: Any) -> jax.Array:
    """log L of what `KINDS[kind]` says, as a smooth function that tends to it from above as `squarings` grows.

    "value": the network, l2 to l2; "entries": l-inf outputs; "largest": the largest L_ij; "pairs": the mean of log L_ij
    with `weights` (K, K). `kind` may be traced: one compiled optimisation serves all.
    """
    least = np.finfo(sigma.dtype).tiny
    power = jnp.exp2(jnp.asarray(squarings, sigma.dtype))

    def value() -> jax.Array:
        return jnp.log(jnp.maximum(top(sigma, squarings), least))

    def entries() -> jax.Array:
        logs = jnp.log(jnp.maximum(jnp.diagonal(sigma), least))
        return jax.nn.logsumexp(power * logs) / power

    def pair_logs() -> tuple[jax.Array, jax.Array]:
        off = ~jnp.eye(sigma.shape[0], dtype=bool)
        return jnp.log(jnp.where(off, jnp.maximum(pair_squares(sigma), least), 1)), off

    def largest() -> jax.Array:
        logs, off = pair_logs()
        return jax.nn.logsumexp(jnp.where(off, power * logs, -jnp.inf)) / power

    def pairs() -> jax.Array:
        logs, _ = pair_logs()
        return jnp.sum(weights * logs) / jnp.sum(weights)

    ways = (value, entries, largest, pairs)
    found = ways[kind]() if isinstance(kind, int) else jax.lax.switch(kind, ways)
    return (found + exponent * LOG2) / 2


class Parameters(NamedTuple):
    """Everything that is optimised.

    input: () in the l2 norm; in the l-inf norm (n_in,) logits of a, sum a = 1, for the ellipsoid
    {sum a_i dx_i^2 <= 1} around the unit box. taps: (q, s) per run.
    """

    input: Any
    taps: tuple[tuple[jax.Array, jax.Array], ...]


def first_ellipsoid(start: jax.Array, logits: Any) -> jax.Array:
    """Sigma_0: `start` itself in the l2 norm, start diag(1 / a) start' with a = softmax(logits) in the l-inf norm."""
    return start if isinstance(logits, tuple) else (start / jax.nn.softmax(logits)) @ start.T


Sharpness = tuple[Any, Any]  # squarings of mu at the taps, and of the objective


def _loss(
    start: Any, runs: Any, kind: Any, weights: Any, sharp: Sharpness, parameters: Parameters
) -> jax.Array:
    passed = run(first_ellipsoid(start, parameters.input), runs, parameters.taps, sharp[0])
    return objective(passed.sigma, passed.exponent, kind, weights, sharp[1])


@partial(jax.jit, static_argnames=("steps",))
def improve(
    start: jax.Array,
    runs: Any,
    parameters: Parameters,
    state: Any,
    weights: Any,
    sharp: Sharpness,
    kind: Any,
    steps: int,
) -> tuple[Parameters, Any, jax.Array]:
    """`steps` iterations of L-BFGS on the parameters in one scan: (parameters, optimiser state, losses)."""
    solver = _solver()
    loss = partial(_loss, start, runs, kind, weights, sharp)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        current, state = carry
        value, grad = value_and_grad(current, state=state)
        updates, state = solver.update(grad, state, current, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(current, updates), state), value

    (parameters, state), losses = jax.lax.scan(step, (parameters, state), None, length=steps)
    return parameters, state, losses


@jax.jit
def _evaluate(start: Any, runs: Any, parameters: Parameters, squarings: Any) -> Passed:
    return run(first_ellipsoid(start, parameters.input), runs, parameters.taps, squarings)


@jax.jit
def _exact(
    start: Any, runs: Any, parameters: Parameters, weights: Any, squarings: Any, kind: Any
) -> jax.Array:
    return _loss(start, runs, kind, weights, (squarings, _SHARP), parameters)


def _solver() -> Any:
    return optax.lbfgs(
        memory_size=_MEMORY, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=20)
    )


def _fresh(parameters: Parameters) -> Any:
    """L-BFGS without memory, strongly typed as it is after a step, so that `improve` compiles once."""
    return jax.tree.map(lambda a: jnp.asarray(a, a.dtype), _solver().init(parameters))


# --- the host's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """The arrays of one sequence, taps of one shape stacked.

    Args:
        start: Sigma_0 (d, d), or in the l-inf norm the map A_0 (d, n_in).
        runs: one Tap, or stack of taps, each.
        counts: number of taps in each run.
        per_layer: one multiplier per tap.
        box: the l-inf norm.
        exponent: the outputs of the network are 2^exponent times those of these arrays, which are scaled where their
            squares would leave the range of floats.
    """

    start: np.ndarray
    runs: tuple[Tap, ...]
    counts: tuple[int, ...]
    per_layer: bool
    box: bool
    exponent: int = 0

    @property
    def sharpest(self) -> int:
        """Squarings of mu in the end: wide taps stay smooth, at little loss where there is a linear way past them."""
        wide = all(run.W.shape[-2] >= _WIDE and run.A.any() for run in self.runs)
        return _SMOOTH if wide else _SHARP

    @property
    def cost(self) -> float:
        """About the seconds of one iteration on two cores."""
        return sum(
            n * (1e-3 + 1.5e-9 * max(run.W.shape[-2], 32) ** 3 + 5e-10 * run.A.shape[-1] ** 3)
            for run, n in zip(self.runs, self.counts, strict=True)
        )


def group(taps: Sequence[Tap]) -> list[list[Tap]]:
    """Consecutive taps of one shape that end in a state as wide as they begin with."""
    groups: list[list[Tap]] = []
    for tap in taps:
        same = groups and all(a.shape == b.shape for a, b in zip(groups[-1][0], tap, strict=True))
        if same and tap.A.shape[0] == tap.A.shape[1]:
            groups[-1].append(tap)
        else:
            groups.append([tap])
    return groups


def problem(
    segments: Sequence[Any],
    start: np.ndarray,
    *,
    per_layer: bool = False,
    box: bool = False,
) -> Problem:
    """Stacks consecutive taps of one shape, so that they are compiled once.

    Arrays with entries outside 2**+-100 are scaled by powers of two: y and w of a tap, and the state behind it. D in
    units of W S W' does not change.
    """
    taps = []
    start, exponent = _moderate(start)
    exponent = exponent if box else exponent // 2  # S, or the map whose square it is
    for segment in segments:
        # With A = 0 (no linear way past the tap) D may lie at the edge; otherwise the margin must not vanish.
        a, b, w = (m.midpoint_for_search() for m in (segment.A, segment.B, segment.W))
        kappa = np.maximum(segment.kappa, 1.0) if a.any() else np.zeros_like(segment.kappa)
        if per_layer:
            kappa = np.full_like(kappa, kappa.min(initial=1.0))  # D must be one number
        w, to_y = _moderate(w)
        b = np.ldexp(b, to_y) if to_y else b
        to_s = _moderate(np.concatenate([a.ravel(), b.ravel()]))[1]
        a, b = (np.ldexp(a, -to_s), np.ldexp(b, -to_s)) if to_s else (a, b)
        exponent += to_s
        taps.append(Tap(a, b, w, kappa))
    groups = group(taps)
    runs = tuple(g[0] if len(g) == 1 else Tap(*(np.stack(a) for a in zip(*g, strict=True))) for g in groups)
    return Problem(start, runs, tuple(len(g) for g in groups), per_layer, box, int(exponent))


def _moderate(a: np.ndarray) -> tuple[np.ndarray, int]:
    """(2**-e a, e): e = 0 where the entries are within 2**+-100, else even, and the largest entry is near 1."""
    exponent = int(np.frexp(np.abs(a).max(initial=0.0))[1])
    exponent = 0 if abs(exponent) <= 100 else exponent + exponent % 2
    return (np.ldexp(a, -exponent), exponent) if exponent else (a, 0)


def parameters_of(
    p: Problem, s: Sequence[float | np.ndarray] | float, q: Sequence[np.ndarray] | None = None
) -> Parameters:
    """s as given, per tap or for all; q as given per tap, else 0 (always with one multiplier per layer)."""
    taps: list[Any] = []
    place = 0
    for stack, count in zip(p.runs, p.counts, strict=True):
        width = min(stack.kappa.shape[-1], 1) if p.per_layer else stack.kappa.shape[-1]
        given = [s if isinstance(s, float) else s[place + i] for i in range(count)]
        rows = [np.broadcast_to(np.max(g, initial=-700.0) if p.per_layer else g, width) for g in given]
        shape = (count, width) if count > 1 else (width,)
        first = np.zeros(shape)
        if q is not None and not p.per_layer:
            first = np.array(q[place : place + count], np.float64).reshape(shape)
        taps.append((first, np.array(rows, np.float64).reshape(shape)))
        place += count
    return Parameters(np.zeros(p.start.shape[1]) if p.box else (), tuple(taps))


def multipliers(p: Problem, parameters: Parameters) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """(D_i / (Sy)_ii per tap, 1 / a of the l-inf norm or None)."""
    with jax.enable_x64(True):
        found = _evaluate(*_on_device(p), parameters, p.sharpest).multipliers
    out: list[np.ndarray] = []
    for d, count in zip(found, p.counts, strict=True):
        out += list(np.asarray(d).reshape(count, -1))
    weights = None
    if p.box:
        logits = np.asarray(parameters.input, np.float64)
        # An input without effect has a share that goes to 0; kept away from it, the others lose less than a rounding.
        share = np.maximum(np.exp(logits - logits.max()), 2.0**-60)
        weights = share.sum() * (1 + 1e-12) / share
    return tuple(out), weights


def last_ellipsoid(p: Problem, parameters: Parameters) -> tuple[np.ndarray, int]:
    """(S, e) with Sigma_out = 4^e S (K, K) in float arithmetic."""
    with jax.enable_x64(True):
        passed = _evaluate(*_on_device(p), parameters, p.sharpest)
        own = int(passed.exponent)
        return np.ldexp(np.asarray(passed.sigma), own % 2), own // 2 + p.exponent


def _on_device(p: Problem) -> tuple[Any, Any]:
    return jnp.asarray(p.start), jax.tree.map(jnp.asarray, p.runs)


def _constant(p: Problem, log: float) -> float:
    """exp of the log, in units of the network; infinite beyond the range of floats (it is only shown)."""
    with np.errstate(over="ignore", under="ignore"):
        return float(np.exp(log + p.exponent * LOG2))


@dataclass(frozen=True)
class Effort:
    """How long to optimise: L-BFGS with `stages` of rising sharpness (squarings), `_CHUNK` iterations between looks.

    A stage ends when a chunk lowers log L by less than `_TOLERANCE` times the stage's own smoothing error, all of it
    after `iterations`.
    """

    iterations: int
    stages: tuple[int, ...] = (4, 7, 10, 14)


def effort(p: Problem, iterations: int | None = None) -> Effort:
    """By size alone: what takes about 10 seconds on two cores, between 60 and 450 iterations."""
    return Effort(int(np.clip(10.0 / max(p.cost, 1e-3), 60, 450)) if iterations is None else iterations)


def optimize(
    p: Problem,
    starts: Sequence[Parameters],
    kind: str,
    weights: np.ndarray | None = None,
    how: Effort | None = None,
) -> tuple[Parameters, float, int]:
    """(parameters, L in float arithmetic, iterations): the best of the starts, improved until it stalls.

    Never worse than the best start.
    """
    how = effort(p) if how is None else how
    with jax.enable_x64(True):
        start, runs = _on_device(p)
        outputs = p.runs[-1].A.shape[-2] if p.runs else p.start.shape[0]
        given = jnp.asarray(np.ones((outputs, outputs)) if weights is None else weights, jnp.float64)
        which = jnp.asarray(KINDS.index(kind))
        scores = [
            float(_exact(start, runs, jax.tree.map(jnp.asarray, c), given, p.sharpest, which)) for c in starts
        ]
        scores = [score if np.isfinite(score) else np.inf for score in scores]
        best = int(np.argmin(scores))
        if not np.isfinite(scores[best]):
            raise ValueError("the ellipsoid recursion overflows or loses all digits on this network")
        value, current = scores[best], jax.tree.map(jnp.asarray, starts[best])
        done, pace = 0, Pace()
        size = max(outputs, 2)
        if not jax.tree.leaves(current):
            return current, _constant(p, value), 0
        best_yet = current
        for place, stage in enumerate(how.stages):
            current, state = best_yet, _fresh(best_yet)
            allowed = max((how.iterations - done) // (len(how.stages) - place), _CHUNK)
            blur = np.log(size) / 2.0**stage
            sharp = (min(stage, p.sharpest), stage)
            spent = failures = 0
            while spent < allowed and done < how.iterations and failures < 2:
                trial, state, losses = improve(start, runs, current, state, given, sharp, which, _CHUNK)
                done, spent = done + _CHUNK, spent + _CHUNK
                score = float(_exact(start, runs, trial, given, p.sharpest, which))
                curve = np.asarray(losses)
                if not (np.isfinite(score) and np.isfinite(curve).all()):
                    failures += 1  # a step out of the range of floats: begin again without memory
                    current, state = best_yet, _fresh(best_yet)
                    continue
                current = trial
                if score < value:
                    value, best_yet = score, trial
                most = max(done, how.iterations)
                left = pace(done, most)
                say(
                    f"{done} of at most {most} iterations{left}: {_constant(p, value):.6g} in float arithmetic"
                )
                if curve[0] - curve[-1] < _TOLERANCE * blur:
                    break
        current = best_yet
    return current, _constant(p, value), done
