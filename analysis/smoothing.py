"""Randomized smoothing: certificates, by sampling, for the smoothed version of a classifier.

Of a base classifier f (here: the class of the largest logit) the smoothed classifier is

    g(x) = the class c that maximises  P[ f(x + d) = c ],   d normal with mean 0 and covariance sigma^2 I

(Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing", ICML 2019, arXiv 1902.02918). By
its Theorem 1, with the runner-up's probability bounded by 1 - p,

    P[ f(x + d) = c ] >= p > 1/2    implies    g(x + e) = c  for all  ||e||_2 < sigma * Phi^-1(p)

`smooth` is its algorithm CERTIFY: p is the one-sided Clopper-Pearson lower bound of the probability of class c, where c
was chosen by separate samples. What is certified is g, evaluated exactly, and not the network f: of f's own answer at x
or nearby it says nothing. The statement about one example is false with probability at most alpha.

Not covered: noise is drawn and added in float32 by a pseudorandom generator, and f is the float32 program.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from lipbounds._text import (
    Html,
    Pace,
    Progress,
    as_labels,
    check_seed,
    element,
    say,
    usual_settings,
    whole,
)
from lipbounds.analysis.attack_network import Model, check_rows, outline, split
from lipbounds.analysis.attack_search import as_points
from lipbounds.analysis.attack_settings import reports

ABSTAIN = -1
_ABOUT = "certifies the smoothed classifier (majority under noise), not the network itself"
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_ROUNDING = 1 - 1e-9  # SciPy's quantiles are right to many more digits, but not rounded downwards


@dataclasses.dataclass(frozen=True, eq=False)
class Smoothed:
    """Certificates of the smoothed classifier for N examples.

    prediction           (N,) the smoothed classifier's class, -1 where it abstains
    radius               (N,) l2 radius, in the units of x, within which that class does not change; 0 for abstention
    counts               (N, K) classes of the n samples that decide; the ones that chose the class are not among them
    p_lower              (N,) lower confidence bound of the probability of the class that was chosen, above 1/2 or not
    sigma, n0, n         standard deviation of the noise; samples that choose the class, and that decide
    failure_probability  alpha, of the statement about each example, on its own
    labels               (N,) or None
    """

    prediction: np.ndarray
    radius: np.ndarray
    counts: np.ndarray
    p_lower: np.ndarray
    sigma: float
    n0: int
    n: int
    failure_probability: float
    labels: np.ndarray | None = None
    guarantee: str = "probabilistic"
    norm: float = 2.0

    def __len__(self) -> int:
        return len(self.radius)

    @property
    def abstained(self) -> np.ndarray:
        """(N,) where no class has, with confidence 1 - alpha, more than half of the probability."""
        return self.prediction == ABSTAIN

    def certified(self, eps: float) -> np.ndarray:
        """(N,) whether the smoothed classifier is certified to answer as labelled on the whole l2 ball of radius eps.

        ValueError without labels, or if eps is not a number >= 0.
        """
        if self.labels is None:
            raise ValueError("certified accuracy needs labels: call smooth(..., y=labels)")
        if not float(eps) >= 0:
            raise ValueError(f"eps must be a number >= 0, got {eps}")
        return (self.prediction == self.labels) & (self.radius > float(eps))

    def accuracy(self, eps: float = 0.0) -> float:
        """Share of the examples that are `certified` at eps; abstentions count as wrong."""
        return float(self.certified(eps).mean())

    def __repr__(self) -> str:
        answered = self.radius[~self.abstained]
        middle = f"{np.median(answered):.4g}" if answered.size else "none"
        lines = [
            f"Smoothed: {len(self)} examples, l2, sigma {self.sigma:g}, {self.n0} + {self.n} samples each",
            f"  guarantee  {self.guarantee}: each example fails with probability <= {self.failure_probability:g}",
            f"  about      {_ABOUT}",
            f"  abstained  {int(self.abstained.sum())} of {len(self)}",
            f"  median radius where it answers: {middle}",
        ]
        if self.labels is not None:
            lines.append(f"  certified accuracy at radius 0: {self.accuracy():.2%}")
        return "\n".join(lines)

    def _repr_html_(self) -> Html:
        return element("pre", repr(self))


@usual_settings()
@reports
def smooth(
    fn: Any,
    x: Any,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    *,
    batch_size: int = 1024,
    seed: int = 0,
    y: Any = None,
    progress: Progress = None,
) -> Smoothed:
    """Certify the smoothed version of a classifier at every example, or abstain (CERTIFY, arXiv 1902.02918).

    Args:
        fn: batch (B, *shape) -> logits (B, K), each row on its own and without randomness. The weights of an nnx module
            (in evaluation mode) are arguments of what is compiled.
        x: (N, *shape) floating point, taken in float32. The noise leaves any box around x: fn must take it.
        sigma: standard deviation of the noise in the units of x. No radius is larger than sigma * Phi^-1(alpha^(1/n)).
        n0, n: samples per example that choose the class, and that bound its probability.
        alpha: probability that the statement about one example is false.
        batch_size: noisy examples at once.
        seed: the noise depends on it, on the example's index and on the sample's number, and on no batch.
        y: (N,) labels, for `Smoothed.accuracy`.
        progress: True, False or a function of one text: a line after every tenth of the samples.

    Raises:
        TypeError: fn is not callable.
        ValueError: shapes, labels, sigma, alpha or numbers of samples out of range; x or logits that are not finite;
            answers to an example that depend on the others in its batch.
    """
    if not (_is_number(sigma) and _SMALLEST <= sigma <= _LARGEST):  # NaN is not
        raise ValueError(f"sigma must be a number > 0 that float32 holds, got {sigma!r}")
    if not (_is_number(alpha) and 0 < alpha < 1):
        raise ValueError(f"alpha must be in (0, 1), got {alpha!r}")
    whole("n0", n0), whole("n", n), check_seed(seed)
    model, weights = split(fn, "logits")
    points = as_points(x)
    labels = None if y is None else as_labels(y, len(points))
    size = min(whole("batch_size", batch_size), len(points) * n)
    model, classes, _ = outline(model, weights, (size, *points.shape[1:]), labels)
    noise = np.random.default_rng(seed).standard_normal((size, *points.shape[1:]))
    check_rows(model, weights, (np.resize(points, noise.shape) + sigma * noise).astype(np.float32))
    choosing, deciding = jax.random.split(jax.random.key(seed))

    def sample(key: jax.Array, count: int, what: str) -> np.ndarray:
        return _counts(model, weights, points, np.float32(sigma), key, count, size, classes, what)

    rows = np.arange(len(points))
    chosen = sample(choosing, n0, "choosing the classes").argmax(axis=1)
    counts = sample(deciding, n, "bounding their probabilities")
    lower = clopper_pearson_lower(counts[rows, chosen], n, alpha)
    answers = lower > 0.5
    radius = np.where(
        answers, float(np.float32(sigma)) * stats.norm.ppf(np.maximum(lower, 0.5)) * _ROUNDING, 0.0
    )
    prediction = np.where(answers, chosen, ABSTAIN)
    return Smoothed(prediction, radius, counts, lower, float(sigma), n0, n, float(alpha), labels)


def clopper_pearson_lower(successes: np.ndarray, trials: int, alpha: float) -> np.ndarray:
    """One-sided lower confidence bound of a binomial probability: above it with probability at most alpha.

    The p at which `successes` or more out of `trials` have probability alpha (Clopper and Pearson, "The use of
    confidence or fiducial limits illustrated in the case of the binomial", 1934); 0 for no success.
    """
    k = np.asarray(successes)
    bound = stats.beta.ppf(alpha, np.maximum(k, 1), trials - k + 1)
    return np.where(k > 0, bound * _ROUNDING, 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _counts(
    model: Model,
    weights: Any,
    points: np.ndarray,
    sigma: np.float32,
    key: jax.Array,
    count: int,
    size: int,
    classes: int,
    what: str,
) -> np.ndarray:
    """(N, K) how often each class has the largest logit at `count` noisy copies of every example."""
    total = len(points) * count
    tally = jnp.zeros((len(points), classes + 1), jnp.int32)  # the last column: logits that are not finite
    inputs, tenth, pace = jnp.asarray(points), max(total // 10, 1), Pace()
    for start in range(0, total, size):
        # all copies of all examples in one row, cut into batches; what lies beyond the end is not counted
        number = np.arange(start, start + size)
        example, copy = np.divmod(np.minimum(number, total - 1), count)
        drawn = (jnp.asarray(a, jnp.int32) for a in (example, copy))
        tally = _tally(model, weights, inputs, sigma, key, *drawn, jnp.asarray(number < total), tally)
        if (start + size) // tenth > start // tenth:
            done = min(start + size, total)
            say(f"Smoothing, {what}: {done} of {total} samples{pace(done, total)}")
    found = np.asarray(tally, np.int64)
    if found[:, -1].any():
        place = int(np.argmax(found[:, -1] > 0))
        raise ValueError(
            f"the logits of example {place} are not finite under noise of sigma {float(sigma):g}"
        )
    return found[:, :-1]


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("tally",))
def _tally(
    model: Model,
    weights: Any,
    points: jax.Array,
    sigma: jax.Array,
    key: jax.Array,
    example: jax.Array,
    copy: jax.Array,
    counted: jax.Array,
    tally: jax.Array,
) -> jax.Array:
    """The tally with one more noisy copy of every example in `example`, where `counted`."""

    def draw(example: jax.Array, copy: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, example), copy)
        return jax.random.normal(own, points.shape[1:], jnp.float32)

    z = model(weights, points[example] + sigma * jax.vmap(draw)(example, copy))
    found = jnp.where(jnp.isfinite(z).all(axis=1), z.argmax(axis=1).astype(jnp.int32), tally.shape[1] - 1)
    return tally.at[example, found].add(counted.astype(jnp.int32))
