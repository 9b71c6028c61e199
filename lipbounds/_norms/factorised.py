"""LAPACK under `jax.vmap` and `jax.grad`, in programs that cannot deadlock.

On a CPU, XLA splits a batched LAPACK routine over the threads of its pool, and one of them waits for the others. Where
as many such routines run beside each other as there are threads (layers whose matrices are computed independently, the
triangular systems of a gradient), all threads wait and the program never ends: seen with five layers on two cores, jax
0.10 and 0.12. So a batch is a loop here on a CPU, which is no slower (measured, matrices of 50 to 1000), and remains
one batch on an accelerator. Derivatives consist of products, so that a gradient factorises nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.scipy import linalg

_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _one_by_one(routine: Callable[..., Any]) -> Callable[..., Any]:
    """The routine of plain matrices, whose batches under `vmap` are loops on a CPU."""
    call = custom_vmap(routine)

    @call.def_vmap
    def batched(size: int, given: list[bool], *args: Any) -> tuple[Any, Any]:
        whole = [
            a if own else jnp.broadcast_to(a, (size, *a.shape)) for a, own in zip(args, given, strict=True)
        ]
        found = lax.platform_dependent(
            *whole, cpu=lambda *rows: lax.map(lambda row: call(*row), rows), default=jax.vmap(routine)
        )
        return found, jax.tree.map(lambda _: True, found)

    return call


@_one_by_one
def cholesky(m: jax.Array) -> jax.Array:
    """The lower factor of M (n, n), of which the lower triangle is read; NaN where there is none. No derivative."""
    return jnp.linalg.cholesky(m, symmetrize_input=False)


@_one_by_one
def solve_lower(factor: jax.Array, b: jax.Array) -> jax.Array:
    """L^-1 B of a lower triangular L (n, n) and B (n, k). No derivative."""
    return linalg.solve_triangular(factor, b, lower=True)


@_one_by_one
def solve_lower_transposed(factor: jax.Array, b: jax.Array) -> jax.Array:
    """L^-T B of a lower triangular L (n, n) and B (n, k). No derivative."""
    return linalg.solve_triangular(factor, b, lower=True, trans=1)


@_one_by_one
def eigenvectors(m: jax.Array) -> jax.Array:
    """Those of a symmetric M (n, n), of which the lower triangle is read, by rising eigenvalue. No derivative."""
    return jnp.linalg.eigh(m, symmetrize_input=False)[1]


@_one_by_one
def _lu(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    found, pivots, _ = lax.linalg.lu(a)
    return found, pivots


@_one_by_one
def _solve_lu(lu: jax.Array, b: jax.Array) -> jax.Array:
    return linalg.solve_triangular(lu, linalg.solve_triangular(lu, b, lower=True, unit_diagonal=True))


@jax.custom_vjp
def inverse(a: jax.Array) -> jax.Array:
    """A^-1 of a stack (..., n, n), real or complex; infinite or NaN where A is singular."""
    n = a.shape[-1]
    lu, pivots = jax.vmap(_lu)(a.reshape(-1, n, n))
    rows = lax.linalg.lu_pivots_to_permutation(pivots, n)  # a loop of its own, outside that of `_lu`
    return jax.vmap(_solve_lu)(lu, jnp.eye(n, dtype=a.dtype)[rows]).reshape(a.shape)


def _inverse_forward(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = inverse(a)
    return found, found


def _inverse_back(found: jax.Array, to: jax.Array) -> tuple[jax.Array]:
    turned = jnp.swapaxes(found, -1, -2)
    return (-_product(turned, _product(to, turned)),)


inverse.defvjp(_inverse_forward, _inverse_back)


@jax.custom_vjp
def positive_inverse(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(M^-1, log det M) of a positive definite M (n, n), by one factorisation; NaN where it is not."""
    factor = cholesky(m)
    half = solve_lower(factor, jnp.eye(len(m), dtype=m.dtype))
    return half.T @ half, 2 * jnp.log(jnp.diagonal(factor)).sum()


def _positive_forward(m: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    found = positive_inverse(m)
    return found, found[0]


def _positive_back(found: jax.Array, to: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    return (to[1] * found - found @ to[0] @ found,)


positive_inverse.defvjp(_positive_forward, _positive_back)


@jax.custom_vjp
def inverse_factor(m: jax.Array) -> jax.Array:
    """L^-1 of a stack of Hermitian M = L L* (..., n, n), L lower triangular; NaN where M is not positive definite."""
    n = m.shape[-1]
    factors = jax.vmap(cholesky)(m.reshape(-1, n, n))
    one = jnp.broadcast_to(jnp.eye(n, dtype=m.dtype), factors.shape)
    return jax.vmap(solve_lower)(factors, one).reshape(m.shape)


def _factor_forward(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = inverse_factor(m)
    return found, found


def _factor_back(found: jax.Array, to: jax.Array) -> tuple[jax.Array]:
    # d L^-1 = -half(L^-1 dM L^-*) L^-1, where half keeps the lower triangle with half of the diagonal
    turned = jnp.swapaxes(found, -1, -2)
    half = jnp.tril(_product(to, turned))
    half = half - jnp.eye(half.shape[-1], dtype=half.dtype) * half / 2
    back = -_product(_product(turned, half), jnp.conj(found))
    return ((back + jnp.conj(jnp.swapaxes(back, -1, -2))) / 2,)


inverse_factor.defvjp(_factor_forward, _factor_back)
