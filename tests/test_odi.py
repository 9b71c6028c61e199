"""Starts that are diverse in the output, and attacks among the images of a generator."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lipbounds.analysis import in_distribution, odi_pgd, pgd
from lipbounds.analysis.attack_network import Model
from lipbounds.analysis.attack_search import Problem
from lipbounds.analysis.attacks import uniform_start
from lipbounds.analysis.in_distribution import nearest_latents
from lipbounds.analysis.odi import diverse


def net(rng, n=10, hidden=8, classes=4):
    w = rng.normal(size=(n, hidden)).astype(np.float32), rng.normal(size=(hidden, classes)).astype(np.float32)
    return lambda b: jnp.abs((b - np.float32(0.5)) @ w[0]) @ w[1]


@pytest.mark.slow
def test_starts_are_diverse_in_the_output_and_inside(rng):
    fn, x = net(rng), rng.random((1, 10), np.float32).repeat(40, axis=0)
    where = jnp.asarray(x), jnp.full(40, 0.2, jnp.float32), np.float32(0), np.float32(1)
    problem = Problem(Model(fn), None, math.inf, where, jnp.zeros(40, jnp.int32), jnp.arange(40))
    key = jax.random.key(3)
    odd = np.asarray(diverse(problem, key, where[1], 2))
    plain = np.asarray(uniform_start(key, problem.index, where, math.inf))
    assert odd.min() >= 0 and odd.max() <= 1 and np.abs(odd - x).max() <= 0.2 + 1e-6
    volumes = [np.linalg.slogdet(np.cov(np.asarray(fn(points), np.float64).T))[1] for points in (odd, plain)]
    assert volumes[0] > volumes[1] + 2
    again = Problem(
        Model(fn), None, math.inf, (where[0][:3], where[1][:3], *where[2:]), problem.labels[:3], problem.index[:3]
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(diverse(again, key, again.where[1], 2)), odd[:3], atol=1e-6)


def test_a_linear_network_is_broken_above_its_distance_and_never_below(rng):
    w = rng.normal(size=(9, 2)).astype(np.float32)
    x = rng.random((12, 9), np.float32)
    row = (w[:, 0] - w[:, 1]).astype(np.float64)
    exact, y = np.abs(x.astype(np.float64) @ row) / np.abs(row).sum(), (x @ w).argmax(1)
    options = {"norm": math.inf, "low": -9.0, "high": 9.0, "steps": 12, "restarts": 2}
    assert not odi_pgd(lambda b: b @ w, x, y, 0.999 * exact, **options).success.any()
    made = odi_pgd(lambda b: b @ w, x, y, 1.01 * exact, **options)
    assert made.success.all() and (made.distance <= made.eps).all()
    with pytest.raises(ValueError, match="start_steps must be a whole number >= 1"):
        odi_pgd(lambda b: b @ w, x, y, 0.1, start_steps=0)


def test_with_the_identity_as_generator_it_is_the_plain_attack(rng):
    w = rng.normal(size=(6, 2)).astype(np.float32)
    x = rng.uniform(0.3, 0.7, (24, 6)).astype(np.float32)
    fn = lambda b: (b - np.float32(0.5)) @ w  # noqa: E731
    y = np.asarray(fn(x)).argmax(1)
    row = (w[:, 0] - w[:, 1]).astype(np.float64)
    exact = np.abs((x - 0.5).astype(np.float64) @ row) / np.linalg.norm(row)
    eps = np.where(np.arange(24) % 2, 0.98 * exact, 1.1 * exact)
    made = in_distribution(fn, lambda z, y: z, x, y, eps, x, steps=250)
    np.testing.assert_array_equal(made.success, pgd(fn, x, y, eps, steps=30).success)
    np.testing.assert_array_equal(made.success, np.arange(24) % 2 == 0)
    assert (made.distance[made.success] <= eps[made.success]).all()
    np.testing.assert_array_equal(made.adversarial[~made.success], x[~made.success])


@pytest.mark.slow
def test_the_risk_among_images_of_a_generator_is_at_most_the_risk(rng):
    basis = np.linalg.qr(rng.normal(size=(12, 3)))[0].astype(np.float32)
    generator = lambda z, y: np.float32(0.5) + z @ basis.T  # noqa: E731
    z = rng.uniform(-0.2, 0.2, (30, 3)).astype(np.float32)
    fn = net(rng, 12)
    x = np.asarray(generator(z, None))
    y = np.asarray(fn(x)).argmax(1)
    made = in_distribution(fn, generator, x, y, 0.15, z, steps=150)
    plain = pgd(fn, x, y, 0.15, steps=60, restarts=3)
    assert 0 < made.success.sum() <= plain.success.sum() and plain.accuracy <= made.accuracy
    shift = (made.adversarial[made.success] - 0.5).astype(np.float64)
    np.testing.assert_allclose(shift @ basis @ basis.T, shift, atol=1e-5)  # in the generator's range
    back = nearest_latents(generator, x, y, np.zeros_like(z), steps=300, batch_size=7)
    np.testing.assert_allclose(back, z, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": math.inf}, "norm must be 2"),
        ({"latents": np.zeros((3, 6), np.float32)}, "latents must hold 4 rows"),
        ({"generator": lambda z, y: z[:, :2]}, "the generator must make images"),
        ({"generator": lambda z, y: z - z.mean(axis=0)}, "rest of its batch changes"),
        ({"step_size": 0.0}, "step_size must be a number > 0"),
        ({"latents": np.full((4, 6), np.nan, np.float32)}, "latents hold NaN"),
    ],
)
def test_bad_input_is_refused(rng, change, message):
    x = rng.random((4, 6), np.float32)
    given = {"generator": lambda z, y: z, "latents": x} | change
    with pytest.raises(ValueError, match=message):
        in_distribution(
            lambda b: b, given.pop("generator"), x, np.zeros(4, int), 0.1, given.pop("latents"), **given
        )
