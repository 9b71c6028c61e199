"""LAPACK under vmap and grad: no batched routine on a CPU, where several at once can wait for each other forever."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb
from lipbounds._norms import factorised
from lipbounds.training import orthogonal


def routines(fn, *args) -> list[str]:
    """The types of the calls of LAPACK in the program that a CPU runs."""
    text = jax.jit(fn).lower(*args).as_text()
    return [line.rsplit(" : ", 1)[1] for line in text.splitlines() if "@lapack_" in line]


def batched(types: list[str]) -> list[str]:
    """Those whose matrices have an axis of a batch that is not 1."""
    return [t for t in types if re.search(r"tensor<(?!1x)\d+x\d+x\d+x[fc]", t)]


def layers(count: int, *shape: int) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    parts = (rng.standard_normal((count, *shape)) + 1j * rng.standard_normal((count, *shape))).astype("c8")
    return [jnp.asarray(part) for part in parts]


@pytest.mark.parametrize("construct", [orthogonal.cayley, orthogonal.reflection, orthogonal.orthonormal])
def test_layers_whose_matrices_are_computed_side_by_side(construct) -> None:
    """Five of them hung on two cores, as batches of `jnp.linalg.solve`."""

    def loss(stacks):
        return sum(jnp.sum(jnp.abs(construct(stack)) ** 3) for stack in stacks)

    found = routines(jax.grad(loss), layers(3, 6, 5, 5 if construct is orthogonal.cayley else 4))
    assert found and not batched(found)


@pytest.mark.slow
def test_the_core_of_lipsdp_under_vmap() -> None:
    rng = np.random.default_rng(0)
    stacks = [
        jnp.asarray(rng.standard_normal((3, b, a)) / 2, jnp.float32) for a, b in ((4, 5), (5, 6), (6, 3))
    ]

    def form(weights):
        return lb.from_weights(weights, activation="relu")

    state = lb.lipsdp.core.init(form([w[0] for w in stacks]), jax.random.key(0))

    def loss(weights):
        return lb.lipsdp.core(form(weights), state)[0].value

    found = routines(jax.vmap(jax.grad(loss)), stacks)
    assert found and not batched(found)


def test_this_test_sees_batches() -> None:
    assert batched(routines(jax.vmap(jnp.linalg.cholesky), jnp.ones((3, 4, 4))))
    assert not batched(routines(jnp.linalg.cholesky, jnp.ones((4, 4))))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_the_inverse_and_its_derivative(dtype) -> None:
    with jax.enable_x64():
        a = jnp.stack(layers(2, 4, 4)).astype(jnp.complex128)
        a = a if dtype == jnp.complex128 else a.real

        def loss(inverse):
            return lambda m: jnp.sum(jnp.abs(inverse(m)[:, 0]) ** 2 * np.arange(4.0))

        np.testing.assert_allclose(factorised.inverse(a), jnp.linalg.inv(a), rtol=1e-10)
        np.testing.assert_allclose(
            jax.grad(loss(factorised.inverse))(a), jax.grad(loss(jnp.linalg.inv))(a), rtol=1e-9
        )


def test_the_inverse_factor_and_its_derivative() -> None:
    with jax.enable_x64():
        a = jnp.stack(layers(2, 5, 4)).astype(jnp.complex128)

        def loss(factor):
            return lambda m: jnp.sum(jnp.abs(factor(orthogonal.adjoint(m) @ m)) ** 3 * np.arange(4.0))

        def plain(m):
            return jnp.linalg.inv(jnp.linalg.cholesky(m))

        gram = orthogonal.adjoint(a) @ a
        np.testing.assert_allclose(factorised.inverse_factor(gram), plain(gram), atol=1e-10)
        found, wanted = jax.grad(loss(factorised.inverse_factor))(a), jax.grad(loss(plain))(a)
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-10)
