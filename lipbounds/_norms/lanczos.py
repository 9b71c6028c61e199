"""Spectral norms of maps given by their products with vectors: Golub-Kahan, Lanczos."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal

from lipbounds._norms.rounding import U, sqrt_up, up
from lipbounds._text.threads import one_blas_thread

ALLOWANCE = 1e-10
_BLOCK = 16
_EXACT, _ROUGH = 1e-12, 1e-5  # relative accuracy of the root of K(t), which is approached from above
_HOPELESS = 1e-6  # what reorthogonalisation removes relative to the norm, above which one side is not enough
_DROPPED = 4096.0  # a coupling of so many times the noise is dropped where left vectors are not kept
_CLEAN = 1e-14  # and below which keeping the other side would change nothing
_KEPT = 0.7  # share of a vector that one orthogonalisation must leave (Daniel et al., Math. Comp. 30, 1976)


# ------------------------------------------------------------------------------------------------ Golub-Kahan


def golub_kahan(
    matvec: Callable[[np.ndarray], np.ndarray],
    rmatvec: Callable[[np.ndarray], np.ndarray],
    n: int,
    *,
    seed: int = 0,
    failure: float = 1e-9,
    rtol: float = 1e-3,
    max_steps: int = 300,
    noise: float = 2.0**-50,
    rounding: float = 0.0,
) -> tuple[float, float, int]:
    """(upper, lower, steps): bounds of ||A||_2; `upper` holds except with probability at most `failure`.

    `matvec` maps (n,) to (m,), `rmatvec` is its transpose; flat float64 NumPy vectors. Golub-Kahan
    bidiagonalisation with full reorthogonalisation from v_1 uniform on the unit sphere of R^n, after
    Hochstenbach (J. Sci. Comput. 57, 2013, 10.1007/s10915-013-9716-x; Kuczynski and Wozniakowski, SIMAX 13,
    1992).

    *The inequality.* The right vectors are v_{j+1} = p_j(A'A) v_1 with deg p_j = j, p_0 = 1 and the
    three-term recurrence of T = B'B. Let x be a unit top right singular vector, c = <x, v_1>. The v_j are
    orthonormal and <x, v_{j+1}> = c p_j(||A||^2), so Bessel's inequality for x gives
        c^2 sum_{j=0..k} p_j(||A||^2)^2 <= 1.
    (Hochstenbach keeps only the last term; the sum is never worse.) If |c| >= delta then K(||A||^2) <=
    delta^-2 with K(t) = sum p_j(t)^2. ||A||^2 is at least the largest Ritz value; right of it all p_j are
    positive and increase, so ||A||^2 <= t* with K(t*) = delta^-2. Nothing is assumed about gaps or
    multiplicities.

    *The probability.* c has density proportional to (1 - c^2)^((n-3)/2), at most
    Gamma(n/2)/(sqrt(pi) Gamma((n-1)/2)) for n >= 3, and Gamma(x + 1/2)/Gamma(x) <= sqrt(x): P(|c| < delta) <=
    delta sqrt(2 (n-1)/pi). For n = 2 it is (2/pi) arcsin(delta) <= delta. Both are <= delta sqrt(2n/pi); for
    n = 1 |c| = 1. So delta = failure sqrt(pi / (2n)). With a fixed `seed` the statement is about matrices
    chosen without looking at it.

    *Rounding.* Let the computed recurrence hold up to a residual of at most noise ||A||^2 per step. Then
        c_{j+1} = ((||A||^2 - T_jj) c_j - T_{j-1,j} c_{j-1} - eta) / T_{j,j+1},  |eta| <= noise ||A||^2,
    so with d_j = c_j/c and |c| >= delta each pivot of t I - T loses at most (noise/delta) t / d_j, which is
    subtracted. This matters: on an orthogonal A the second vector is rounding noise, and a larger singular
    value could hide behind a c of size delta. `noise` stands for the arithmetic of the recurrence, raised to twice
    the largest component that reorthogonalisation removed, relative to the largest
    Ritz value: a lower bound of ||A||, so what is divided by it is never taken for too small. (In the first
    steps it is far below ||A|| where A has few large singular values; no bound is then to be had yet, and
    the iteration goes on.) What is left, the loss of orthogonality and the rounding of p_j, is covered by
    1e-10 relative. That part is an allowance, not a proof: one reason why the guarantee is "probabilistic".

    *Rounding of the products.* If each product errs by at most r = `rounding` for unit vectors, A v_j = alpha_j u_j +
    beta_{j-1} u_{j-1} - f_j and A'u_j = alpha_j v_j + beta_j v_{j+1} - g_j, then eta contains <x, alpha_j g_j +
    beta_{j-1} g_{j-1} + A'f_j>, at most 3 r ||A|| (and ||A|| >= lower - sqrt(steps) r): noise grows by 4 r / lower.
    Where that hides a component of size delta, several starts share the probability: the largest of the bounds of m
    independent starts, each of failure probability p, fails with probability p^m only, so their delta is larger by
    orders of magnitude and they need fewer steps. The number of starts follows from the first run, which counts as one
    of them, so each of the numbers 1, 2, 4, 8 has a quarter of `failure` to itself. The starts after the first stop
    when they confirm its value, and the first goes on until its own rounding is covered below that.

    `lower` is the largest singular value of the bidiagonal matrix (a lower bound up to the same allowance).
    Stops when upper <= (1 + rtol) lower or after min(max_steps, n) steps; a step is one product with A and
    one with A'; `steps` is the number of the longest run.

    *One side.* The inequality asks only that A v_j = alpha_j u_j + beta_{j-1} u_{j-1} and A'u_j = alpha_j v_j +
    beta_j v_{j+1} hold, and that the v_j are orthonormal. So the left vectors are not kept at first (Simon and Zha,
    SISC 21, 2000), and n should be the smaller side. Where some alpha_j is nearly zero (A is close to a matrix of low
    rank) u_j is not orthogonal to the earlier ones, and reorthogonalisation removes much from A'u_j: the run is then
    repeated with both sides kept. Memory: steps n doubles, or steps (n + m).

    Raises:
        ValueError: products that are not finite or of the wrong length, bad arguments, a `failure` so small that
            rounding hides the component that it allows (noise/delta above 1/4) until the last step.
    """
    if n < 1 or not 0.0 < failure < 1.0 or not rtol > 0.0 or max_steps < 1 or not 0.0 <= rounding < math.inf:
        raise ValueError(
            "golub_kahan needs n >= 1, 0 < failure < 1, rtol > 0, max_steps >= 1 and a finite rounding >= 0"
        )

    for both in (False, True):
        start = partial(Run, matvec, rmatvec, noise=noise, most=min(max_steps, n), both=both)
        upper, first, steps = _from_several_starts(start, n, seed, failure, rtol, rounding)
        if upper <= (1.0 + rtol) * first.lower * first.unit or first.lost <= _CLEAN * first.size:
            break
    if upper == math.inf:
        raise ValueError(
            f"failure={failure} is too small for products accurate to "
            f"{first.relative + first.of_products(rounding):.1e} in dimension {n}"
        )
    if upper == 0.0:
        return 0.0, 0.0, steps
    return up(up(upper * (1.0 + ALLOWANCE))), first.lower * (1.0 - ALLOWANCE) * first.unit, steps


def _from_several_starts(
    run: Callable[[np.ndarray], Run], n: int, seed: int, failure: float, rtol: float, rounding: float
) -> tuple[float, Run, int]:
    """(bound or inf, the first run, steps of the longest) of `golub_kahan`."""
    # One thread: more gain little in products with vectors, and slow down a busy machine.
    with one_blas_thread():
        first = run(np.random.default_rng(seed).standard_normal(n))
        upper = first.upper(overlap(failure, n), 0.0, rtol)
        steps = len(first.alpha)
        if rounding > 0.0:
            goal = upper if math.isfinite(upper) else 0.0
            starts, delta = _starts(first, rounding, failure, n)
            patience = steps + 8
            upper = max(goal, first.upper(delta, rounding, rtol, goal, patience))
            for start in range(1, starts):
                if upper < math.inf:
                    again = run(np.random.default_rng([seed, start]).standard_normal(n))
                    upper = max(upper, again.upper(delta, rounding, rtol, goal, patience))
                    steps = max(steps, len(again.alpha))
    return upper, first, steps


_STARTS = (1, 2, 4, 8)
_SMALL_LOSS = 1e-3


def _starts(first: Run, rounding: float, failure: float, n: int) -> tuple[int, float]:
    """(starts, delta of each): the fewest that the rounding of the products leaves room for."""
    for starts in _STARTS:
        delta = overlap((failure / len(_STARTS)) ** (1.0 / starts), n)
        if first.loss(delta, rounding) <= _SMALL_LOSS:
            break
    return starts, delta


class Run:
    """The recurrence from v, its vectors, its bidiagonal matrix in units of `unit`, and its loss of orthogonality."""

    def __init__(
        self,
        matvec: Callable[[np.ndarray], np.ndarray],
        rmatvec: Callable[[np.ndarray], np.ndarray],
        v: np.ndarray,
        noise: float,
        most: int,
        both: bool,
    ) -> None:
        self.matvec, self.rmatvec, self.noise, self.most, self.both = matvec, rmatvec, noise, most, both
        self.v = v / np.linalg.norm(v)
        self.u = v[:0]
        self.right, self.left = _Basis(), _Basis()
        self.right.append(self.v)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.unit = 1.0  # a power of two near the norm: squares below neither overflow nor underflow
        self.lower, self.lost = 0.0, 0.0
        self.size = 0.0  # the largest entry so far, a lower bound of ||A||
        self.gone = self.ended = False

    def upper(
        self, delta: float, rounding: float, rtol: float, goal: float = 0.0, patience: int = 0
    ) -> float:
        """A bound of ||A||_2 where |c| >= delta, within rtol if the steps suffice.

        With a goal it is to be at most that; what is within rtol does after `patience` steps, since rounding sets a
        limit to how near to the norm a bound can come.
        """
        while True:
            count = len(self.alpha)
            if self.ended or (count and count % (2 if goal else 4) == 0):
                near = not goal or count >= patience
                found = self.bound(delta, rounding, 0.0 if near or self.ended else goal, rtol, goal)
                if self.ended or found <= max(goal, (1.0 + rtol) * self.lower * self.unit if near else 0.0):
                    return found
            self.step()

    def step(self) -> None:
        if self.forward(_product(self.matvec, self.v, None)):
            self.backward(_product(self.rmatvec, self.u, self.v.size))

    def forward(self, image: np.ndarray) -> bool:
        """Take A v: the next left vector `u`. False where the run has ended, so that A'u is not needed."""
        if not self.alpha:
            top = float(np.abs(image).max()) if image.size else 0.0
            if top == 0.0:
                self.alpha, self.ended = [0.0], True
                return False
            self.unit = math.ldexp(1.0, max(-1000, min(1000, math.frexp(top)[1])))
        image = image / self.unit
        # Without earlier left vectors the basis is empty, and nothing is removed.
        a, self.u, removed = self.left.orthogonalised(image - self.beta[-1] * self.u if self.beta else image)
        self.alpha.append(a)
        self.size, self.lost = max(self.size, a), max(self.lost, removed)
        self.gone = self.ended = a <= _noise(self.noise, removed, self.size)
        if not self.both and a <= _DROPPED * self.noise * self.size:
            # Of the next left vector only rounding would be left, which is not orthogonal to the earlier ones.
            self.gone = self.ended = True
            self.lost = max(self.lost, a)
        if self.gone:
            self.beta.append(0.0)
        elif self.both:
            self.left.append(self.u)
        return not self.gone

    def backward(self, image: np.ndarray) -> None:
        """Take A'u: the next right vector `v`."""
        a, step = self.alpha[-1], len(self.alpha)
        b, self.v, removed = self.right.orthogonalised(image / self.unit - a * self.v)
        self.lost, self.size = max(self.lost, removed), max(self.size, b)
        self.beta.append(b if step < self.v.size else 0.0)
        small = a * b <= _noise(self.noise, self.lost, self.size) * self.size**2
        useless = not self.both and self.lost > _HOPELESS * self.size
        self.ended = small or useless or step == self.most
        if not self.ended:
            self.right.append(self.v)

    @property
    def relative(self) -> float:
        """The residual of the recurrence relative to ||A||^2, products aside."""
        return _noise(self.noise, self.lost, max(self.size, self.lower))

    def of_products(self, rounding: float) -> float:
        """What products that err by `rounding` add to it; inf where they hide the norm itself."""
        if rounding == 0.0:
            return 0.0
        wrong = rounding / self.unit
        hidden = 8.0 * math.sqrt(len(self.alpha)) * wrong >= self.lower
        return math.inf if hidden else 4.0 * wrong / self.lower

    def loss(self, delta: float, rounding: float) -> float:
        # a coupling that was dropped is noise too
        return (2.0 if self.gone else 1.0) * (self.relative + self.of_products(rounding)) / delta

    def bound(
        self, delta: float, rounding: float, goal: float = 0.0, rtol: float = 0.0, least: float = 0.0
    ) -> float:
        """sqrt(t*) after the steps that were done; with a goal only whether it is below: goal, or inf.

        inf where rounding hides a component of size delta, and before the end also where the bound is above `least` and
        not within rtol.
        """
        if self.alpha == [0.0]:
            return 0.0 if rounding == 0.0 else math.inf
        self.lower = _largest_singular_value(self.alpha, self.beta[:-1])
        loss = self.loss(delta, rounding)
        if not loss <= 0.25:
            return math.inf
        limit = -2.0 * math.log(delta)
        diagonal, off = _tridiagonal(self.alpha, self.beta)
        if goal > 0.0:
            t = (goal / self.unit) ** 2 * (1.0 - 4.0 * U)
            confirmed = t > self.lower**2 and _log_christoffel(diagonal, off, t, loss) >= limit
            return goal if confirmed else math.inf
        if rtol and not self.ended:
            enough = max(((1.0 + rtol) * self.lower) ** 2, (least / self.unit) ** 2)
            if _log_christoffel(diagonal, off, enough, loss) < limit:
                return math.inf
        return self.unit * _largest_root(
            diagonal, off, limit, self.lower, loss, _EXACT if self.ended else _ROUGH
        )


def _noise(noise: float, lost: float, size: float) -> float:
    """The residual of one step relative to ||A|| >= size, where reorthogonalisation removed `lost`."""
    return max(noise, 2.0 * lost / size) if size > 0.0 else noise


def overlap(failure: float, n: int) -> float:
    """delta with P(|c| < delta) <= failure for one coordinate c of a uniform unit vector in R^n."""
    return failure * math.sqrt(math.pi / (2.0 * n)) if n > 1 else 1.0


def _product(apply: Callable[[np.ndarray], np.ndarray], v: np.ndarray, size: int | None) -> np.ndarray:
    result = np.asarray(apply(v), dtype=np.float64)
    if result.ndim != 1 or (size is not None and result.size != size):
        raise ValueError(
            f"a product has shape {result.shape}, expected a flat vector" + (f" of {size}" if size else "")
        )
    if not np.all(np.isfinite(result)):
        raise ValueError("a product has NaN or infinite entries")
    return result


class _Basis:
    """Orthonormal vectors, a few to a block: products with a block are faster than one vector at a time."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.size = 0

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    def append(self, v: np.ndarray) -> None:
        if self.size % _BLOCK == 0:
            self.blocks.append(np.zeros((_BLOCK, v.size)))
        self.blocks[-1][self.size % _BLOCK] = v
        self.size += 1

    def orthogonalised(self, w: np.ndarray) -> tuple[float, np.ndarray, float]:
        """(norm, unit vector, what was removed) of w made orthogonal to the basis, again where little of it is left."""
        before, norm = w, float(np.linalg.norm(w))
        if not self.blocks:
            return norm, w / norm if norm > 0.0 else w, 0.0
        for _ in range(2):
            least = norm
            for block in self.blocks:  # rows that are not filled yet are zero
                w = w - (block @ w) @ block
            norm = float(np.linalg.norm(w))
            if norm > _KEPT * least:
                break
        return norm, w / norm if norm > 0.0 else w, float(np.linalg.norm(before - w))


def _largest_singular_value(alpha: list[float], beta: list[float]) -> float:
    """Of the bidiagonal matrix, from the tridiagonal [0 B; B' 0] in the order that makes it one."""
    off = np.zeros(2 * len(alpha) - 1)
    off[::2], off[1::2] = alpha, beta
    top = len(off)
    return float(eigvalsh_tridiagonal(np.zeros(top + 1), off, select="i", select_range=(top, top))[0])


def _tridiagonal(alpha: list[float], beta: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """(diagonal, off-diagonal) of B'B for the bidiagonal B, off-diagonal with the step that would come next."""
    a, b = np.asarray(alpha), np.asarray(beta)
    diagonal = a**2
    diagonal[1:] += b[:-1] ** 2
    return diagonal, a * b


def _log_christoffel(diagonal: np.ndarray, off: np.ndarray, t: float, loss: float) -> float:
    """A lower bound of log K(t), or -inf where t is not right of the largest Ritz value by the rounding loss.

    p_{j+1}/p_j is pivot_j of t I - T over off_j. A lower bound of one ratio gives one of the next, so the loss
    t/p_j may be taken at each step.
    """
    log_p = log_sum = 0.0
    pivot = 0.0
    for j in range(len(diagonal)):
        pivot = t - diagonal[j] - (off[j - 1] ** 2 / pivot if j else 0.0)
        pivot -= loss * t * math.exp(min(700.0, -0.5 * log_p))
        if not pivot > 0.0:
            return -math.inf
        if off[j] == 0.0:
            return math.inf
        log_p += 2.0 * math.log(pivot / off[j])
        log_sum = float(np.logaddexp(log_sum, log_p))
    return log_sum


def _largest_root(
    diagonal: np.ndarray, off: np.ndarray, limit: float, lower: float, loss: float, rtol: float = _EXACT
) -> float:
    """sqrt(t*) rounded up, log K(t*) >= limit: bisection on t above the largest Ritz value lower^2."""
    lo = lower * lower
    hi = max(2.0 * lo, 1e-300)
    while _log_christoffel(diagonal, off, hi, loss) < limit:
        hi *= 2.0
    while hi - lo > rtol * hi:
        middle = 0.5 * (lo + hi)
        if _log_christoffel(diagonal, off, middle, loss) < limit:
            lo = middle
        else:
            hi = middle
    return sqrt_up(hi)


# ------------------------------------------------------------------------------ Lanczos, many maps side by side


def lanczos_columns(
    apply: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    *,
    failure: float,
    rtol: float,
    max_steps: int,
    noise: float = 2.0**-49,
) -> np.ndarray:
    """(N,) upper bounds of lambda_max(A_i)^(1/2), A_i positive semidefinite; each fails with probability <= `failure`.

    `apply` maps (N, n) to (N, n), row i by A_i; `start` (N, n) holds independent normal entries, or one such row
    repeated. The inequality, the probability and the rounding are those of `golub_kahan` with A'A = A_i and the
    tridiagonal matrix of the Lanczos recurrence. The rows stop together: when all are within `rtol`, or after
    max_steps. inf where rounding hides the component that `failure` allows.
    """
    count, n = start.shape
    delta = overlap(failure, n)
    limit = -2.0 * math.log(delta)
    v = start / np.maximum(np.linalg.norm(start, axis=1), 1e-300)[:, None]
    basis = np.zeros((count, min(max_steps, n), n))
    diagonal, off = np.zeros((count, 0)), np.zeros((count, 0))
    upper, lost = np.full(count, math.inf), np.zeros(count)
    unit, live = np.ones(count), np.ones(count, bool)
    last = basis.shape[1]
    for step in range(last):
        image = np.asarray(apply(v), np.float64)
        if not np.all(np.isfinite(image)):
            raise ValueError("a product has NaN or infinite entries")
        if step == 0:
            top = np.abs(image).max(axis=1, initial=0.0)
            upper[top == 0.0] = 0.0
            live &= top > 0.0
            unit = np.ldexp(1.0, np.clip(np.frexp(top)[1], -1000, 1000))
        if not live.any():
            break
        basis[:, step] = v
        image = image / unit[:, None]
        diagonal = np.column_stack([diagonal, np.einsum("ij,ij->i", v, image)])
        rest = image - diagonal[:, -1:] * v - (off[:, -1:] * basis[:, step - 1] if step else 0.0)
        known, before = basis[:, : step + 1], rest
        for _ in range(2):
            parts = np.matmul(known, rest[:, :, None])
            rest = rest - np.matmul(known.transpose(0, 2, 1), parts)[:, :, 0]
        removed = np.linalg.norm(before - rest, axis=1)
        length = np.linalg.norm(rest, axis=1)
        largest = diagonal.max(axis=1)
        lost = np.maximum(lost, removed)
        slip = np.maximum(noise, 2 * lost / np.where(largest > 0, largest, 1.0))
        ended = (length <= slip * largest) | (step + 1 == n)
        off = np.column_stack([off, np.where(ended, 0.0, length)])
        for i in np.flatnonzero(live & (ended | (step % 4 == 3) | (step + 1 == last))):
            found = math.sqrt(max(eigvalsh_tridiagonal(diagonal[i], off[i, :-1])[-1], 0.0))
            loss = max(noise, 2 * lost[i] / found**2 if found > 0 else 0.0) / delta
            if loss > 0.25:  # `found`, a lower bound, may still grow
                live[i] = not ended[i]
                continue
            root = _largest_root(diagonal[i], off[i], limit, found, loss)
            upper[i] = up(up(root * (1.0 + ALLOWANCE)) * sqrt_up(unit[i]))
            live[i] = not (ended[i] or root <= (1.0 + rtol) * found)
        v = rest / np.where(length > 0, length, 1.0)[:, None]
    return upper
