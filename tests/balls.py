"""Sampled slopes of networks inside balls: what local bounds must not be below."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import lipbounds as lb


def chain(rng, widths, activation="relu"):
    """(form, weights, biases), float32."""
    weights = [
        (1.5 * rng.normal(size=(b, a)) / a**0.5).astype(np.float32) for a, b in itertools.pairwise(widths)
    ]
    biases = [rng.normal(size=b).astype(np.float32) for b in widths[1:]]
    return lb.from_weights(weights, biases=biases, activation=activation), weights, biases


def mlp(widths=(12, 30, 24, 6), seed=0, activation="relu"):
    rng = np.random.default_rng(seed)
    w = [
        (1.5 * rng.standard_normal((m, n)) / np.sqrt(n)).astype(np.float32)
        for n, m in itertools.pairwise(widths)
    ]
    b = [0.3 * rng.standard_normal(len(a)).astype(np.float32) for a in w]
    return lb.from_weights(w, b, activation=activation)


def values(form, x):
    with jax.enable_x64(True):
        return np.asarray(
            jax.jit(jax.vmap(lambda p: form.evaluate(p, jnp.float64)))(jnp.asarray(x, jnp.float64))
        )


def jacobians(form, x):
    with jax.enable_x64(True):
        f = jax.jit(jax.vmap(jax.jacrev(lambda p: form.evaluate(p, jnp.float64))))
        return np.asarray(f(jnp.asarray(x, jnp.float64))).reshape(len(x), form.num_outputs, -1)


def in_ball(x, eps, norm, count, rng):
    """(count, N, *shape) points of the balls, many near the surface."""
    v = rng.standard_normal((count, *x.shape))
    if norm == np.inf:
        v = rng.choice([-1.0, 1.0], v.shape) * rng.uniform(0.8, 1, v.shape)
    else:
        v /= np.sqrt(np.square(v).sum(axis=tuple(range(2, v.ndim)), keepdims=True))
    return x + eps * v * rng.choice([0.3, 1.0], (count, len(x), *[1] * (x.ndim - 1)))


def largest_slopes(form, x, eps, norm, rng, count=30):
    """(N,) of the network and (N, K, K) of pairs, over sampled pairs of points in the balls."""
    u, v = (in_ball(x, eps, norm, count, rng) for _ in range(2))
    change = values(form, u.reshape(-1, *x.shape[1:])) - values(form, v.reshape(-1, *x.shape[1:]))
    distance = np.linalg.norm((u - v).reshape(len(change), -1), norm, axis=1)
    whole = (np.linalg.norm(change, norm, axis=1) / distance).reshape(count, len(x)).max(axis=0)
    pairs = np.abs(change[:, :, None] - change[:, None]) / distance[:, None, None]
    return whole, pairs.reshape(count, len(x), *pairs.shape[1:]).max(axis=0)
