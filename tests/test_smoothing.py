"""Randomized smoothing: its certificates hold as often as it says, on classifiers whose answer is known."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from lipbounds.analysis import Oracle
from lipbounds.analysis.smoothing import ABSTAIN, clopper_pearson_lower, smooth

N, SIGMA, ALPHA, REPEATS = 200, 0.5, 0.05, 3000


def halfspace(x):
    """Class 0 where (3, 4) . x > 0: the distance of x to the other class is (3, 4) . x / 5."""
    z = (x @ jnp.asarray([[3.0], [4.0]], jnp.float32)).astype(jnp.float32)
    return jnp.concatenate([z, -z], axis=1)


def quadrant(x):
    """Class 0 in the positive quadrant, else 1 or 2: P[class 0] = Phi(x_0 / sigma) Phi(x_1 / sigma)."""
    return jnp.concatenate([jnp.zeros_like(x[:, :1]), -x], axis=1)


def repeated(point, count=REPEATS):
    return np.tile(np.float32(point), (count, 1))


def chance(successes, trials, p):
    """Of as extreme a number of successes, on the likelier side."""
    return 2 * min(stats.binom.cdf(successes, trials, p), stats.binom.sf(successes - 1, trials, p))


# ------------------------------------------------------------------------------------------------------- coverage
@pytest.mark.parametrize("distance", [0.25, 0.6])
def test_a_radius_exceeds_the_true_distance_as_often_as_the_bound_says(distance):
    """Every radius above the distance to the boundary is a false certificate: at most alpha of them, and no fewer than
    the exact one-sided bound gives, which also tells it from the two-sided one."""
    found = smooth(halfspace, repeated(np.array([0.6, 0.8]) * distance), SIGMA, 50, N, ALPHA, seed=3)
    p = stats.norm.cdf(distance / SIGMA)
    assert chance(int(found.counts[:, 0].sum()), REPEATS * N, p) > 1e-3
    assert (found.counts.sum(axis=1) == N).all()
    false = int((found.radius > distance).sum())
    allowed = np.flatnonzero(clopper_pearson_lower(np.arange(N + 1), N, ALPHA) > p)[0]
    exact = stats.binom.sf(allowed - 1, N, p)
    assert 0.6 * ALPHA < exact <= ALPHA
    assert stats.binom.sf(false - 1, REPEATS, ALPHA) > 1e-3
    assert chance(false, REPEATS, exact) > 1e-3
    assert (found.prediction[found.radius > 0] == 0).all() and found.radius.max() > 0.8 * distance


def test_several_classes():
    point = np.array([0.5, 0.9])
    p = float(np.prod(stats.norm.cdf(point / SIGMA)))
    found = smooth(quadrant, repeated(point), SIGMA, 50, N, ALPHA)
    assert found.counts.shape == (REPEATS, 3) and chance(int(found.counts[:, 0].sum()), REPEATS * N, p) > 1e-3
    false = int((found.radius > SIGMA * stats.norm.ppf(p)).sum())
    assert stats.binom.sf(false - 1, REPEATS, ALPHA) > 1e-3


def test_on_the_boundary_it_abstains():
    found = smooth(halfspace, repeated([0.8, -0.6]), SIGMA, N, N, ALPHA, y=np.zeros(REPEATS, int))
    answered = int((~found.abstained).sum())
    assert 0 < answered and stats.binom.sf(answered - 1, REPEATS, ALPHA) > 1e-3
    assert (found.prediction[found.abstained] == ABSTAIN).all() and (found.radius[found.abstained] == 0).all()
    assert (found.radius[~found.abstained] > 0).all() and found.accuracy() == np.mean(found.prediction == 0)
    assert f"abstained  {REPEATS - answered} of {REPEATS}" in repr(found)


@pytest.mark.parametrize(("k", "n", "alpha"), [(0, 10, 0.05), (1, 10, 0.05), (7, 10, 0.001), (10, 10, 0.001)])
def test_the_lower_bound_is_where_the_tail_is_alpha(k, n, alpha):
    bound = float(clopper_pearson_lower(np.asarray(k), n, alpha))
    expected = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert bound == pytest.approx(expected, abs=1e-8) and bound <= expected
    tail = math.fsum(math.comb(n, i) * bound**i * (1 - bound) ** (n - i) for i in range(k, n + 1))
    assert tail <= alpha if k else bound == 0
    assert not k or tail > 0.999 * alpha


def test_the_largest_radius_and_the_radius_of_a_count():
    far = smooth(halfspace, np.float32([[30.0, 40.0], [0.3, 0.4]]), SIGMA, 20, 1000, 0.001)
    assert far.counts[0].tolist() == [1000, 0]
    assert far.radius[0] == pytest.approx(SIGMA * stats.norm.ppf(0.001 ** (1 / 1000)))
    assert far.p_lower[1] == pytest.approx(stats.beta.ppf(0.001, far.counts[1, 0], 1001 - far.counts[1, 0]))
    assert far.radius[1] == pytest.approx(SIGMA * stats.norm.ppf(far.p_lower[1])) and (far.radius < 2).all()


# ------------------------------------------------------------------------------------------------ how it samples
def test_what_is_drawn_depends_on_seed_and_index_and_on_no_batch(rng):
    x = rng.normal(size=(7, 2)).astype(np.float32) * np.float32(0.3)
    options = {"n0": 20, "n": 300}
    whole = smooth(halfspace, x, SIGMA, **options)
    for size in (1, 64, 10**6):
        if size == 1:
            some = smooth(halfspace, x, SIGMA, n0=20, n=30, batch_size=1)
            np.testing.assert_array_equal(some.counts, smooth(halfspace, x, SIGMA, n0=20, n=30).counts)
        else:
            np.testing.assert_array_equal(
                smooth(halfspace, x, SIGMA, batch_size=size, **options).counts, whole.counts
            )
    assert not np.array_equal(smooth(halfspace, x, SIGMA, seed=1, **options).counts, whole.counts)
    twice = smooth(halfspace, x[[1, 1]], SIGMA, n0=20, n=10_000)
    assert twice.counts[0, 0] != twice.counts[1, 0]


def test_choosing_samples_are_not_used_to_decide():
    """With n0 = 1 the class is often the rarer one: then there is no radius, however many samples say otherwise."""
    found = smooth(halfspace, repeated([0.6 * 0.25, 0.8 * 0.25], 400), SIGMA, n0=1, n=N, alpha=ALPHA)
    p = stats.norm.cdf(0.25 / SIGMA)
    assert chance(int((found.p_lower > 0.5).sum()), 400, p * stats.binom.sf(112, N, p)) > 1e-4
    assert (found.counts[:, 0] > 112).mean() > 0.95


def test_weights_are_arguments_and_progress_is_told():
    class Net(nnx.Module):
        traced = 0

        def __init__(self):
            self.layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            Net.traced += 1
            return self.layer(x)

    net, lines = Net(), []
    smooth(net, repeated([0.1, 0.2], 5), 0.1, 10, 100, batch_size=32, progress=lines.append)
    assert len(lines) >= 8 and lines[-1] == "Smoothing, bounding their probabilities: 500 of 500 samples"
    Net.traced = 0
    net.layer.kernel[...] = -net.layer.kernel[...]
    smooth(net, repeated([0.1, 0.2], 5), 0.2, 10, 100, batch_size=32)
    assert Net.traced == 1  # for the shape of the logits; nothing is compiled


# ------------------------------------------------------------------------------------------------------ the record
def test_the_record_says_what_it_is_about():
    found = smooth(halfspace, np.float32([[0.3, 0.4], [3, 4]]), SIGMA, 20, 100, 0.01, y=np.array([0, 0]))
    assert found.guarantee == "probabilistic" and found.failure_probability == 0.01 and len(found) == 2
    text = repr(found)
    for part in (
        "smoothed classifier",
        "not the network",
        "each example fails with probability <= 0.01",
        "20 + 100",
    ):
        assert part in text
    assert text.replace("<", "&lt;") in found._repr_html_()
    shares = [found.accuracy(e) for e in (0.0, 0.3, float(found.radius[1]), 10.0)]
    assert shares[-1] == shares[-2] == 0.0 and all(a >= b for a, b in itertools.pairwise(shares))
    wrong = smooth(halfspace, np.float32([[3, 4]]), SIGMA, 20, 100, y=np.array([1]))
    assert wrong.radius[0] > 0 and wrong.accuracy() == 0.0


X = np.full((4, 2), 0.5, np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma must be a number > 0"),
        ({"sigma": math.nan}, "sigma must be a number > 0"),
        ({"sigma": 1e39}, "sigma must be a number > 0 that float32 holds"),
        ({"sigma": 1e-50}, "sigma must be a number > 0 that float32 holds"),
        ({"fn": Oracle(lambda x: np.zeros(len(x), int))}, "needs logits, which an Oracle does not have"),
        ({"sigma": np.array([0.1, 0.2])}, "sigma must be a number > 0"),
        ({"alpha": None}, r"alpha must be in \(0, 1\)"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\)"),
        ({"alpha": 1.0}, r"alpha must be in \(0, 1\)"),
        ({"n0": 0}, "n0 must be a whole number >= 1"),
        ({"n": 1.5}, "n must be a whole number >= 1"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"x": X[:0]}, "at least one"),
        ({"x": X * np.float32(np.nan)}, "NaN or infinite"),
        ({"x": X.astype(int)}, "floating point"),
        ({"y": np.full(4, 2)}, "labels must lie in 0..1, got 2..2"),
        ({"y": np.zeros(3, int)}, "4 integer labels"),
        ({"fn": lambda x: x[:, :1]}, "K >= 2"),
        ({"fn": lambda x: jnp.log(x - 10)}, "logits of example 0 are not finite under noise of sigma 0.1"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {"fn": halfspace, "x": X, "sigma": 0.1, "n0": 5, "n": 5} | change
    with pytest.raises(ValueError, match=message):
        smooth(given.pop("fn"), given.pop("x"), given.pop("sigma"), **given)


def test_a_network_that_mixes_the_examples_of_a_batch_is_refused():
    for mixed in (lambda x: halfspace(x - x.mean(axis=0)), lambda x: jnp.cumsum(halfspace(x), axis=0)):
        for points in (X, X[:1]):
            with pytest.raises(ValueError, match=r"rest of its batch changes: .*evaluation mode"):
                smooth(mixed, points, 0.1, 5, 5)


def test_accuracy_needs_labels_and_a_radius():
    found = smooth(halfspace, X, 0.1, 5, 5)
    with pytest.raises(ValueError, match="labels: call smooth"):
        found.accuracy(0.1)
    with pytest.raises(ValueError, match="eps must be a number >= 0"):
        smooth(halfspace, X, 0.1, 5, 5, y=np.zeros(4, int)).accuracy(math.nan)
    with pytest.raises(TypeError, match="from a batch to logits"):
        smooth(X, X, 0.1)
