"""One step of the ellipsoid recursion: through a tap, with derivatives of largest eigenvalues and Schur complements."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._norms import factorised

MARGIN = 1e-9  # relative distance of D from the edge of feasibility, float64
LOG2 = float(np.log(2.0))


class Tap(NamedTuple):
    """Arrays of one segment: A (d+, d), B (d+, n), W (n, d), kappa (n,) = |c| / r."""

    A: Any
    B: Any
    W: Any
    kappa: Any


@jax.custom_vjp
def top(m: jax.Array, squarings: jax.Array) -> jax.Array:
    """(trace M^p)^(1/p) with p = 2^squarings for a symmetric positive semidefinite M, by products alone.

    At least lambda_max and at most n^(1/p) times it; smooth where eigenvalues meet. Its gradient (M / top)^(p - 1)
    comes from the same products, M^(2^(j+1) - 1) = M^(2^j - 1) M^(2^j), so nothing is stored for it. 0 for M = 0.
    """
    return _powers(m, squarings, False)[0]


def _powers(m: jax.Array, squarings: jax.Array, gradient: bool) -> tuple[jax.Array, jax.Array]:
    size = jnp.sqrt(jnp.sum(jnp.square(m)))
    size = jnp.where(size > 0, size, 1)
    eye = jnp.eye(m.shape[0], dtype=m.dtype)

    def double(_: Any, carry: Any) -> Any:
        a, b, log_a, log_b, power = carry
        if gradient:
            b = b @ a
            log_b = log_b + log_a
        a = a @ a
        a, shift = rescale(a)  # by powers of two: exact
        log_a = 2 * log_a + shift * LOG2
        if gradient:
            largest = jnp.max(jnp.abs(b))
            _, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1))
            b = b * jnp.ldexp(jnp.ones((), b.dtype), -exponent)
            log_b = log_b + exponent.astype(b.dtype) * LOG2
        return a, b, log_a, log_b, 2 * power

    zero, one = jnp.zeros((), m.dtype), jnp.ones((), m.dtype)
    carry = (m / size, eye if gradient else zero, zero, zero, one)
    a, b, log_a, log_b, power = jax.lax.fori_loop(0, squarings, double, carry)
    trace = jnp.trace(a)
    log_top = (jnp.log(jnp.where(trace > 0, trace, 1)) + log_a) / power  # of m / size
    value = jnp.where(trace > 0, size * jnp.exp(log_top), 0)
    weight = jnp.exp(log_b - (power - 1) * log_top) * b if gradient else b
    return value, weight


def _top_forward(m: jax.Array, squarings: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _powers(m, squarings, True)


def _top_back(weight: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return g * weight, None


top.defvjp(_top_forward, _top_back)


def multiplier(sy: jax.Array, kappa: jax.Array, q: jax.Array, s: jax.Array, squarings: Any) -> jax.Array:
    """D of one tap from its parameters: feasible for every (q, s)."""
    half = jnp.exp(-q / 2) * jnp.ones_like(kappa)
    mu = jnp.maximum(top(half[:, None] * sy * half, squarings), floor(sy.dtype))
    return mu * jnp.exp(q) * (1 + MARGIN + kappa * jnp.exp(s))


def floor(dtype: Any) -> Any:
    return np.sqrt(np.finfo(dtype).tiny).astype(dtype)


@jax.custom_vjp
def schur(m: jax.Array, c: jax.Array) -> jax.Array:
    """C' M^-1 C for a positive definite M (n, n) and C (n, d); NaN where M has no Cholesky factor in floats."""
    return _schur_forward(m, c)[0]


def _schur_forward(m: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    factor = factorised.cholesky(m)
    y = factorised.solve_lower_transposed(factor, factorised.solve_lower(factor, c))
    x = c.T @ y
    return (x + x.T) / 2, y


def _schur_back(y: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    along = y @ ((g + g.T) / 2)
    return -along @ y.T, 2 * along


schur.defvjp(_schur_forward, _schur_back)


def through(sigma: jax.Array, tap: Tap, d: jax.Array, sy: jax.Array, cross: jax.Array) -> jax.Array:
    """Sigma after one tap, for D given; NaN where D - Sy has no Cholesky factor in floats."""
    x = sigma + schur(jnp.diag(d) - sy, cross)
    new = tap.A @ x @ tap.A.T + (tap.B * d) @ tap.B.T
    return (new + new.T) / 2


def rescale(sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sigma / 2^e, e) with the largest diagonal entry near 1; the exponent carries no gradient."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.diagonal(sigma)))
    _, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1))
    factor = jnp.ldexp(jnp.ones((), sigma.dtype), -exponent)
    return sigma * factor, exponent.astype(sigma.dtype)
