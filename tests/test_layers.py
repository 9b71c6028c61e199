"""Layers with constants by construction: the proved norm of each is what it claims, and a broken one is caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipbounds as lb
from lipbounds.training import orthogonal
from lipbounds.training.activations import Householder, groupsort, maxmin
from lipbounds.training.blocks import Block
from lipbounds.training.layers import KINDS, ORTHOGONAL, Convolution, Dense, convolve, downsample, iterate

SIZES = ((6, 6), (8, 5), (5, 8))
IMAGES = ((2, 2, 1, (4, 4)), (2, 3, 2, (8, 6)), (3, 2, 1, (5, 4)))
ONE = 1 + 1e-6
pytestmark = pytest.mark.filterwarnings("error")


def proved(layer: Callable[[Any], Any], shape: tuple[int, ...]) -> float:
    """The proved norm of a layer without activation, on examples of this shape."""
    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = lb.naive(lb.trace(lambda x: layer(x[None]).reshape(-1), example), progress=False)
    assert isinstance(found, lb.UpperBound) and found.guarantee == "verified"
    return found.value


def dense(kind: str, n_in: int = 6, n_out: int = 6, **options: Any) -> Dense:
    layer = Dense(n_in, n_out, kind=kind, rngs=nnx.Rngs(1), **options)
    if kind == "cholesky":  # which begins with an orthogonal kernel
        layer.kernel.set_value(jax.random.normal(jax.random.key(3), layer.kernel.shape))
    return layer


def convolution(kind: str, a: int = 2, b: int = 2, stride: int = 1, image: Any = (4, 4), **more: Any) -> Any:
    return Convolution(a, b, image=image, kind=kind, stride=stride, rngs=nnx.Rngs(1), **more)


@pytest.mark.sampled(15)
@pytest.mark.parametrize("n_in, n_out", SIZES)
@pytest.mark.parametrize("kind", ["reflection", "cholesky", "spectral", "aol", "cayley", "exponential"])
def test_dense_layers_have_norm_one(kind: str, n_in: int, n_out: int) -> None:
    layer = dense(kind, n_in, n_out)
    if kind == "spectral":
        iterate(layer, 400)
    norm = proved(layer, (n_in,))
    assert norm <= ONE * (layer.constant or np.inf)
    if kind != "aol":
        assert norm >= 1 - (1e-4 if kind == "cholesky" else 1e-6)
    x = jax.random.normal(jax.random.key(1), (3, n_in))
    np.testing.assert_allclose(layer.export()(x), layer(x), atol=1e-6)


@pytest.mark.sampled(15)
@pytest.mark.parametrize("a, b, stride, image", IMAGES)
@pytest.mark.parametrize("kind", ["exponential", "cholesky", "spectral", "aol", "cayley", "reflection"])
def test_convolutions_have_norm_one(kind: str, a: int, b: int, stride: int, image: tuple[int, int]) -> None:
    layer = convolution(kind, a, b, stride, image)
    if kind == "spectral":
        iterate(layer, 1500)
    norm = proved(layer, (*image, a))
    assert norm <= ONE * (layer.constant or np.inf)
    if kind not in ("aol", "spectral"):
        assert norm >= 1 - (1e-4 if kind == "cholesky" else 1e-6)
    x = jax.random.normal(jax.random.key(1), (3, *image, a))
    if kind == "exponential":
        with pytest.raises(ValueError, match="no kernel"):
            layer.export()
    else:
        np.testing.assert_allclose(layer.export()(x), layer(x), atol=3e-6)


@pytest.mark.slow
def test_orthogonal_layers_keep_lengths() -> None:
    """Every one of them, as many outputs as inputs; the shift of cholesky shortens small singular values."""
    x = jax.random.normal(jax.random.key(2), (4, 4, 4, 3))
    for kind in ORTHOGONAL:
        layers = (convolution(kind, 3, 3), dense(kind, 48, 48))
        for layer, given in zip(layers, (x, x.reshape(4, -1)), strict=True):
            y = layer(given).reshape(4, -1)
            lengths = jnp.linalg.norm(x.reshape(4, -1), axis=1)
            np.testing.assert_allclose(
                jnp.linalg.norm(y, axis=1), lengths, rtol=2e-2 if kind == "cholesky" else 2e-6
            )


def test_columns_that_hardly_differ_keep_norm_one() -> None:
    """Singular values down to 1e-7 of the largest one, where the Gram matrix in float32 has no factor."""
    for decay in (1.0, 0.1, 1e-2):
        q = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (9, 4)))[0]
        a = (q * decay ** jnp.arange(4.0)) @ jnp.linalg.qr(jax.random.normal(jax.random.key(1), (4, 4)))[0]
        for matrix in (a, a.T):
            found = np.linalg.svd(np.asarray(orthogonal.orthonormal(matrix), np.float64), compute_uv=False)
            assert found.max() <= ONE
        if decay == 1:
            assert found.min() >= 1 - 1e-4


def test_matrices_whose_squares_underflow_have_norm_at_most_one() -> None:
    found = orthogonal.orthonormal(jnp.full((72, 3), 1e-20))
    assert 0 < np.linalg.norm(np.asarray(found, np.float64), 2) <= ONE


def test_reflections_at_columns_that_depend_on_each_other_keep_norm_one() -> None:
    """V of rank 1, of half rank, zero, and with singular values down to 1e-6 of the largest one."""
    one, two, other = (
        jax.random.normal(jax.random.key(k), s) for k, s in enumerate(((9, 1), (9, 2), (2, 4)))
    )
    steep = jnp.linalg.qr(jnp.hstack([one, two, two**2]))[0][:, :4] * 10.0 ** -jnp.arange(0.0, 8, 2)
    for v in (one @ other[:1], two @ other, 0 * (two @ other), steep):
        found = np.linalg.svd(np.asarray(orthogonal.reflection(v), np.float64), compute_uv=False)
        assert found.max() <= ONE


def test_the_power_iteration_converges_for_tiny_weights() -> None:
    layer = Dense(5, 1, kind="spectral", rngs=nnx.Rngs(1))
    layer.kernel.set_value(1e-6 * layer.kernel.get_value())
    iterate(layer, 20)
    assert np.linalg.norm(np.asarray(layer.weights(), np.float64)) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e25])
def test_the_power_iteration_goes_on_after_weights_for_which_it_has_no_direction(size: float) -> None:
    layer = Dense(3, 2, kind="spectral", rngs=nnx.Rngs(1))
    usual = layer.kernel.get_value()
    layer.kernel.set_value(size * usual)
    iterate(layer, 20)
    layer.kernel.set_value(2 * usual)
    iterate(layer, 20)
    assert np.linalg.norm(np.asarray(layer.weights(), np.float64), 2) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("terms", [2, 3])
def test_a_series_of_few_terms_promises_what_it_keeps(terms: int) -> None:
    layer = Dense(6, 6, kind="exponential", terms=terms, rngs=nnx.Rngs(1))
    layer.kernel.set_value(30 * layer.kernel.get_value())
    assert 1.05 < proved(layer, (6,)) <= layer.constant == 1 + 1 / (2 if terms == 2 else 6)
    with pytest.raises(ValueError, match="terms must be a whole number >= 1"):
        Dense(6, 6, kind="exponential", terms=0, rngs=nnx.Rngs(1))


# --- deliberate faults -----------------------------------------------------------------------------------------------


def _fault(name: str) -> tuple[Callable[[Any], Any], tuple[int, ...]]:
    """(a layer with one thing left out, shape of its input)."""
    if name == "spectral: an iteration that has not begun":
        return convolution("spectral"), (4, 4, 2)
    if name == "aol: row sums without absolute values":
        layer = dense("aol")
        kernel = layer.kernel.get_value() + 0.3
        sums = jnp.abs(jnp.sum(kernel @ kernel.T, axis=1))
        return lambda x: x @ (kernel / jnp.sqrt(jnp.max(sums) / 4)), (6,)
    if name == "cayley: a symmetric in place of a skew matrix":
        a = dense("cayley").kernel.get_value()
        one = jnp.eye(6)
        return lambda x: x @ jnp.linalg.solve(one + a + a.T, one - a - a.T), (6,)
    if name == "exponential: three terms":
        return convolution("exponential", terms=3), (4, 4, 2)
    if name == "reflection: a kernel cut to its window":
        kernel = convolution("reflection").export().kernel
        return lambda x: convolve(x, kernel[1:4, 1:4], "circular"), (4, 4, 2)
    if name == "reflection: without the inverse":
        v = dense("reflection").kernel.get_value()
        return lambda x: x @ (jnp.eye(6) - 2 * v @ v.T), (6,)
    if name == "cholesky: the factor is not transposed":
        w = dense("cholesky").kernel.get_value()
        return lambda x: x @ (w @ jnp.linalg.inv(jnp.linalg.cholesky(w.T @ w))), (6,)
    if name == "unit: columns as they are":
        layer = dense("unit", 6, 1)
        return lambda x: x @ (1.5 * layer.kernel.get_value()), (6,)
    raise AssertionError(name)


@pytest.mark.sampled(7)
@pytest.mark.parametrize(
    "name",
    [
        "exponential: three terms",
        "spectral: an iteration that has not begun",
        "aol: row sums without absolute values",
        "cayley: a symmetric in place of a skew matrix",
        "reflection: a kernel cut to its window",
        "reflection: without the inverse",
        "cholesky: the factor is not transposed",
        "unit: columns as they are",
    ],
)
def test_faults_are_caught(name: str) -> None:
    assert proved(*_fault(name)) > 1 + 1e-4


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(6)
@pytest.mark.parametrize("rho", [1.0, 0.49, 2.25])
@pytest.mark.parametrize("window, shape", [(0, (5,)), (3, (4, 4, 2))])
def test_blocks_are_as_lipschitz_as_their_rho(rho: float, window: int, shape: tuple[int, ...]) -> None:
    block = Block(shape[-1], 3, window=window, rho=rho, rngs=nnx.Rngs(0))
    block.scales.set_value(jnp.array([0.3, -0.2, 0.1]))
    example = jax.ShapeDtypeStruct(shape, jnp.float32)
    form = lb.trace(lambda x: block(x[None]).reshape(-1), example)
    found = lb.lipsdp(form, progress=False)
    assert isinstance(found, lb.UpperBound) and found.guarantee == "verified"
    assert found.value <= ONE * float(block.constant)
    # a direction that no hidden unit sees, or nearly
    assert found.value >= float(block.constant) * (1 - 1e-3)
    assert lb.naive(form, progress=False).value > 1.3 * float(block.constant)


@pytest.mark.slow
def test_a_block_with_twice_the_multipliers_is_caught() -> None:
    block = Block(4, 4, rngs=nnx.Rngs(0))

    def doubled(x: jax.Array) -> jax.Array:
        w = block.kernel.get_value()
        return x - 2 * (block.multipliers() * jax.nn.relu(x @ w)) @ w.T

    form = lb.trace(doubled, jax.ShapeDtypeStruct((4,), jnp.float32))
    assert lb.lipsdp(form, progress=False).value > 1 + 1e-3


@pytest.mark.slow
def test_blocks_without_weights_scale_by_the_root_of_rho() -> None:
    block = Block(3, 3, rho=0.25, learned=True, rngs=nnx.Rngs(0))
    block.kernel.set_value(jnp.zeros((3, 3)))
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_allclose(block(x), 0.5 * x, rtol=1e-6)
    gradient = nnx.grad(lambda b: jnp.sum(b(x) ** 2))(block)
    # d/d log rho of rho sum x^2
    assert np.isclose(float(gradient["log_rho"].get_value()), 0.25 * 55, rtol=1e-5)


# --- activations -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_activations_keep_lengths_and_are_traced_as_norm_one() -> None:
    turned = Householder(6)
    turned.angles.set_value(jnp.array([0.4, -1.0, 2.0]))
    x = jax.random.normal(jax.random.key(0), (50, 6))
    for activation in (maxmin, turned, lambda x: groupsort(x, 3)):
        y = activation(x)
        np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-6)
    form = lb.trace(turned, jax.ShapeDtypeStruct((6,), jnp.float32))
    assert lb.naive(form, progress=False).value <= ONE


def test_householder_reflects_at_its_normals() -> None:
    turned = Householder(4)
    turned.angles.set_value(jnp.array([0.7, -0.3]))
    z = np.random.default_rng(0).normal(size=(20, 2, 2)).astype(np.float32)  # (batch, pair, half)
    v = np.asarray(turned.normals)
    along = np.einsum("bph,ph->bp", z, v)[..., None]
    wanted = np.where(along > 0, z, z - 2 * along * v)
    found = turned(jnp.asarray(np.concatenate([z[..., 0], z[..., 1]], axis=1)))
    np.testing.assert_allclose(found, np.concatenate([wanted[..., 0], wanted[..., 1]], axis=1), atol=1e-6)


def test_orthonormal_columns_of_a_zero_matrix_are_zero() -> None:
    zero = jnp.zeros((2, 3, 2))
    for a in (zero, zero.astype(jnp.complex64), jnp.swapaxes(zero, 1, 2)):
        assert (np.asarray(orthogonal.orthonormal(a)) == 0).all()


# --- gradients, types, errors ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("unit", "stiefel")])
def test_layers_train(kind: str, dtype: str) -> None:
    """Gradient descent towards a target reduces the loss, parameters stay float32 and the claim still holds."""
    layer = convolution(kind)
    graph, weights, rest = nnx.split(layer, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 2)).astype(dtype)
    # a quarter turn of the channels, which exponentials reach, too; a reflection is none
    target = jnp.stack([-x[..., 1], x[..., 0]], axis=-1).astype(jnp.float32) * 0.7

    @jax.jit
    def loss(weights: Any) -> Any:
        y = nnx.merge(graph, weights, rest)(x)
        assert y.dtype == dtype
        return jnp.mean((y.astype(jnp.float32) - target) ** 2)

    first = loss(weights)
    for _ in range(30):
        gradient = jax.grad(loss)(weights)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
        weights = jax.tree.map(lambda w, g: w - 0.3 * g, weights, gradient)
    assert loss(weights) < 0.9 * first
    trained = nnx.merge(graph, weights, rest)
    if trained.constant is not None:
        iterate(trained, 500)
        excess = proved(trained, (4, 4, 2)) - 1
        assert excess <= (1e-3 if kind == "spectral" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cayley", "exponential", "reflection", "cholesky", "aol"])
def test_gradients_are_right(kind: str) -> None:
    """Against central differences in float64."""
    with jax.enable_x64(True):
        layer = convolution(kind)
        graph, weights = nnx.split(layer)
        weights = jax.tree.map(lambda a: a.astype(jnp.float64), weights)
        x = jax.random.normal(jax.random.key(0), (2, 4, 4, 2), jnp.float64)

        def loss(weights: Any) -> Any:
            return jnp.sum(jnp.sin(nnx.merge(graph, weights)(x)))

        gradient, step = jax.grad(loss)(weights), 1e-5
        direction = jax.tree.map(
            lambda a: jax.random.normal(jax.random.key(a.size), a.shape, a.dtype), weights
        )
        shifted = [
            loss(jax.tree.map(lambda a, d, s=s: a + s * step * d, weights, direction)) for s in (1, -1)
        ]
        along = sum(
            jnp.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose((shifted[0] - shifted[1]) / (2 * step), along, rtol=1e-6)


@pytest.mark.slow
def test_gram_bound_is_above_the_norm_and_close() -> None:
    a = jax.random.normal(jax.random.key(0), (5, 30, 20))
    norms = np.linalg.svd(np.asarray(a), compute_uv=False)[:, 0]
    found = np.asarray(orthogonal.gram_bound(a))
    assert (found >= norms * (1 - 1e-6)).all() and (found <= 1.06 * norms).all()


def test_downsampling_is_a_permutation() -> None:
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    y = downsample(x, 2)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(np.sort(np.ravel(y)), np.ravel(x))
    np.testing.assert_array_equal(y[1, 0, 2], x[1, 0:2, 4:6].reshape(-1))


def test_errors_say_what_does_not_fit() -> None:
    for make, words in (
        (lambda: dense("orthogonal"), "unknown kind"),
        (lambda: dense("residual", 3, 4), "keeps the number of features"),
        (lambda: convolution("unit"), "dense last layer"),
        (lambda: convolution("aol", window=2), "odd"),
        (lambda: convolution("aol", image=(5, 4), stride=2), "multiples of the stride"),
        (lambda: convolution("cayley", window=5), "does not fit images"),
        (lambda: convolution("aol")(jnp.zeros((1, 6, 6, 2))), "was built for images"),
        (lambda: Block(3, 3, rho=0.0, rngs=nnx.Rngs(0)), "rho > 0"),
        (lambda: Block(3, 3, window=2, rngs=nnx.Rngs(0)), "windows odd"),
        (lambda: maxmin(jnp.zeros(3)), "even number"),
        (lambda: groupsort(jnp.zeros(3), 2), "multiple of 2"),
        (lambda: Householder(3), "even number"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
