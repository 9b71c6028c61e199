"""Every linear operation, in the odd variants that code gets wrong: the bound must be the exact norm of the map.

Each entry is an affine function of a vector of 24 entries. Its matrix is known independently of the library (JAX's
Jacobian of the user's function, which is constant), so the bound is compared with its exact norm from both sides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lipbounds as lb

Fn = Callable[[jax.Array], jax.Array]
N = 24
_rng = np.random.default_rng(7)


def const(*shape: int) -> jax.Array:
    return jnp.asarray(_rng.normal(size=shape), jnp.float32)


def conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], padding: object, **kwargs: object
) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)  # type: ignore[arg-type]


NCW, NWC = ("NCH", "OIH", "NCH"), ("NHC", "HIO", "NHC")
K233, K323, K432, K211, K22 = (
    const(2, 3, 3),
    const(3, 2, 3),
    const(4, 3, 2),
    const(2, 1, 1),
    const(2, 2, 2, 2),
)
K_GROUPS, K_DEPTH, K_BATCH = const(6, 1, 2), const(3, 1, 6), const(2, 4, 3)
M, BAND, ROW, STACK = const(24, 24), jnp.tril(const(24, 24)), const(24), const(3, 4, 8)
IDS = jnp.array([0, 2, 2, 1, 0, 2])

LINEAR: dict[str, Fn] = {
    # ------------------------------------------------------------------------------------------- products
    "matrix left": lambda x: x @ M,
    "triangular matrix": lambda x: BAND @ x + ROW,
    "batched product": lambda x: lax.dot_general(x.reshape(3, 8), STACK, (((1,), (2,)), ((0,), (0,)))),
    "two contractions": lambda x: jnp.tensordot(STACK.reshape(4, 3, 8), x.reshape(3, 8), 2),
    "outer product": lambda x: jnp.outer(ROW[:3], x),
    "diagonal": lambda x: x * ROW / 3.0 - ROW * x[::-1],
    "dot with half precision weights": lambda x: M.astype(jnp.bfloat16).astype(jnp.float32) @ x,
    "einsum": lambda x: jnp.einsum("bij,bkj,k->ib", x.reshape(2, 3, 4), const_k(), ROW[:5]),
    # -------------------------------------------------------------------------------------- convolutions
    "conv valid": lambda x: conv(x.reshape(1, 3, 8), K233, (1,), "VALID"),
    "conv same stride 2": lambda x: conv(x.reshape(1, 3, 8), K233, (2,), "SAME"),
    "conv same lower": lambda x: conv(x.reshape(1, 3, 8), K432, (3,), "SAME_LOWER"),
    "conv asymmetric padding": lambda x: conv(x.reshape(1, 3, 8), K233, (2,), [(3, 0)]),
    "conv cropping": lambda x: conv(x.reshape(1, 3, 8), K233, (1,), [(-1, -2)]),
    "conv dilated kernel": lambda x: conv(x.reshape(1, 3, 8), K233, (1,), "SAME", rhs_dilation=(3,)),
    "conv dilated input": lambda x: conv(x.reshape(1, 3, 8), K233, (1,), [(2, 1)], lhs_dilation=(3,)),
    "conv everything": lambda x: conv(
        x.reshape(1, 3, 8), K233, (2,), [(1, 4)], lhs_dilation=(2,), rhs_dilation=(2,)
    ),
    "conv groups": lambda x: conv(x.reshape(1, 3, 8), K_GROUPS, (2,), "SAME", feature_group_count=3),
    "conv depthwise": lambda x: conv(
        x.reshape(1, 4, 6), K_DEPTH, (1,), "SAME", dimension_numbers=NWC, feature_group_count=6
    ),
    "conv batch groups": lambda x: conv(x.reshape(2, 4, 3), K_BATCH, (1,), [(1, 1)], batch_group_count=2),
    "conv channels last": lambda x: conv(x.reshape(1, 12, 2), K323, (1,), "SAME", dimension_numbers=NWC),
    "conv mixed layout": lambda x: conv(
        x.reshape(3, 8, 1), K233, (1,), "VALID", dimension_numbers=("CHN", "OIH", "HNC")
    ),
    "conv images": lambda x: conv(x.reshape(1, 2, 4, 3), K22, (2, 1), [(0, 1), (1, 1)]),
    "conv of a constant by the input": lambda x: conv(
        STACK.reshape(2, 3, 16), x.reshape(4, 3, 2), (2,), "SAME"
    ),
    "conv transposed": lambda x: lax.conv_transpose(
        x.reshape(1, 12, 2), K323, (3,), "SAME", dimension_numbers=NWC
    ),
    "conv 1 x 1": lambda x: conv(x.reshape(4, 1, 6), K211, (1,), "VALID"),
    "convolve": lambda x: jnp.convolve(x, ROW[:5], mode="full"),
    # -------------------------------------------------------------------------------------- shapes
    "transpose": lambda x: 2.0 * jnp.transpose(x.reshape(2, 3, 4), (2, 0, 1)),
    "broadcast": lambda x: jnp.broadcast_to(x.reshape(4, 1, 6), (4, 3, 6)),
    "broadcast in a sum": lambda x: x.reshape(4, 6)[:, None, :] + x.reshape(4, 6)[None, :, :],
    "scalar operand": lambda x: lax.add(x, jnp.broadcast_to(x[3], (N,))) + x[0],
    "concatenate": lambda x: jnp.concatenate([x[:5], ROW, -x[3:9], x[:5]]),
    "stack": lambda x: jnp.stack([x, 3.0 * x[::-1], ROW], axis=1),
    "split": lambda x: jnp.split(x, [5, 11])[1] - jnp.split(x, 4)[2],
    "tile and repeat": lambda x: jnp.concatenate([jnp.tile(x, 2), jnp.repeat(x[:3], 4)]),
    "pad": lambda x: lax.pad(x.reshape(4, 6), jnp.float32(2.0), ((1, 2, 1), (-1, 0, 3))),
    "pad with a value of the input": lambda x: lax.pad(x[1:9], x[0], ((2, 3, 1),)),
    "pad modes": lambda x: jnp.concatenate([jnp.pad(x, (3, 2), mode="edge"), jnp.pad(x, 2, mode="reflect")]),
    "roll and flip": lambda x: jnp.roll(x.reshape(4, 6), (1, -2), (0, 1)) + jnp.flip(x.reshape(4, 6), 1),
    "triangles": lambda x: jnp.triu(x.reshape(4, 6), 1) - 2.0 * jnp.tril(x.reshape(4, 6)),
    "diagonals": lambda x: jnp.concatenate([jnp.diagonal(x.reshape(4, 6)), jnp.diag(x[:3]).reshape(-1)]),
    "squeeze and expand": lambda x: jnp.expand_dims(x.reshape(1, 24, 1).squeeze(0), (0, 2)).squeeze((0, 2)),
    "rot90": lambda x: jnp.rot90(x.reshape(4, 6)) @ ROW[:4],
    # -------------------------------------------------------------------------------------- slices, indices
    "slice with strides": lambda x: lax.slice(x.reshape(4, 6), (1, 0), (4, 5), (2, 3)),
    "dynamic slice clamped": lambda x: lax.dynamic_slice(x, (jnp.int32(22),), (5,)),
    "dynamic update clamped": lambda x: lax.dynamic_update_slice(x, 3.0 * x[:4], (jnp.int32(23),)),
    "dynamic update of a constant": lambda x: lax.dynamic_update_slice(ROW, x[:4], (jnp.int32(3),)),
    "gather repeated": lambda x: x[jnp.array([3, 3, 3, -1, 0])],
    "gather rows": lambda x: x.reshape(4, 6)[jnp.array([[0, 3], [3, 3]]), 1:4],
    "gather clipped": lambda x: x.at[jnp.array([0, 77, -80])].get(mode="clip"),
    "gather with a fill mode": lambda x: x.at[jnp.array([0, 7, 5])].get(mode="fill", fill_value=2.0),
    "gather wrapped": lambda x: jnp.take(x, jnp.array([25, -3, 50]), mode="wrap"),
    "gather along an axis": lambda x: jnp.take_along_axis(
        x.reshape(4, 6), jnp.array([[5], [0], [0], [2]]), 1
    ),
    "gather batched": lambda x: jax.vmap(lambda r, i: r[i])(
        x.reshape(4, 6), jnp.array([[1, 1], [0, 5], [2, 3], [4, 4]])
    ),
    "boolean mask": lambda x: x[np.arange(N) % 3 == 1],
    "scatter add repeated": lambda x: x.at[jnp.array([1, 1, 1, 4])].add(2.0 * x[:4]),
    "scatter add dropped": lambda x: x.at[jnp.array([1, 99])].add(5.0 * x[2:4], mode="drop"),
    "scatter set": lambda x: x.at[jnp.array([5, 0])].set(2.0 * x[7:9]),
    "scatter set to a constant": lambda x: x.at[2:9:3].set(1.0),
    "scatter into a constant": lambda x: ROW.at[jnp.array([2, 9])].set(x[:2]).at[3].add(x[4]),
    "scatter rows": lambda x: jnp.zeros((5, 6)).at[jnp.array([4, 1, 4])].add(x.reshape(4, 6)[:3]),
    "segment sum": lambda x: jax.ops.segment_sum(x.reshape(6, 4), IDS, num_segments=3),
    # -------------------------------------------------------------------------------------- sums
    "sums and means": lambda x: jnp.concatenate(
        [x.reshape(4, 6).sum(0), x.reshape(4, 6).mean(1), x.sum()[None]]
    ),
    "sum where": lambda x: jnp.sum(x.reshape(4, 6), axis=0, where=np.arange(N).reshape(4, 6) % 5 != 0),
    "cumsum": lambda x: jnp.cumsum(x.reshape(4, 6), axis=0),
    "cumsum reversed": lambda x: lax.cumsum(x, reverse=True) - x,
    "differences": lambda x: jnp.diff(x, n=2),
    "average pooling": lambda x: lax.reduce_window(
        x.reshape(4, 6), 0.0, lax.add, (2, 3), (1, 2), ((1, 0), (0, 2)), window_dilation=(2, 1)
    ),
    "sum pooling on a dilated base": lambda x: lax.reduce_window(
        x.reshape(4, 6), 0.0, lax.add, (3, 2), (2, 1), "SAME", base_dilation=(1, 2)
    ),
    "running mean": lambda x: jnp.cumsum(x) / jnp.arange(1.0, 25.0),
    "trace of a product": lambda x: jnp.trace(M.reshape(4, 6, 24)[:, :4, :4].sum(2) @ x[:16].reshape(4, 4))[
        None
    ],
    # -------------------------------------------------------------------------------------- choices by constants
    "where": lambda x: jnp.where(jnp.arange(N) % 2 == 0, x, -2.0 * x[::-1]),
    "select among three": lambda x: lax.select_n(jnp.arange(N) % 3, x, 2.0 * x, jnp.zeros(N)),
    "select by a scalar": lambda x: lax.select_n(jnp.array(True), x, 3.0 * x),
    "cond": lambda x: lax.cond(jnp.sum(ROW) < 1e9, lambda x: 2.0 * x, lambda x: x, x),
    "masks from comparisons": lambda x: x * (ROW > 0).astype(jnp.float32) + jnp.maximum(ROW, 0.0) * x[::-1],
    # -------------------------------------------------------------------------------------- loops, wrappers
    "scan": lambda x: lax.scan(lambda h, w: (w @ h, h[:2]), x[:8], jnp.stack([M[:8, :8], M[8:16, 8:16]]))[1],
    "scan over the input": lambda x: lax.scan(
        lambda h, r: (0.5 * h + r, h - r), jnp.ones(6), x.reshape(4, 6)
    )[1],
    "scan in reverse": lambda x: lax.scan(
        lambda h, r: (h + r, 2.0 * h), jnp.zeros(6), x.reshape(4, 6), reverse=True
    )[1],
    "map": lambda x: lax.map(lambda r: r * ROW[:6] - r[0], x.reshape(4, 6)),
    "nested jit and checkpoint": lambda x: jax.jit(jax.checkpoint(lambda h: 2.0 * h + x))(M @ x),
    "derivative of a linear map": lambda x: jax.jvp(lambda h: M @ h, (ROW,), (x,))[1],
    "transpose of a linear map": lambda x: jax.linear_transpose(lambda h: M @ h, x)(x)[0],
    "gradient of a quadratic": lambda x: jax.grad(lambda h: 0.5 * jnp.vdot(h, M @ h))(x),
    "power one": lambda x: lax.integer_pow(x, 1) + x**1,
    "complex in constants only": lambda x: jnp.fft.fft(ROW).real * x,
    "resize": lambda x: jax.image.resize(x.reshape(4, 6), (7, 3), "bilinear", antialias=True),
    "resize nearest": lambda x: jax.image.resize(x.reshape(4, 6), (8, 9), "nearest"),
    "zero": lambda x: 0.0 * x,
    "constant": lambda x: ROW,
}
_K = const(2, 5, 4)


def const_k() -> jax.Array:
    return _K


def flat(name: str) -> Fn:
    return lambda x: LINEAR[name](x).reshape(-1)


@functools.cache
def matrix_of(name: str) -> np.ndarray:
    """The Jacobian of the user's function, after a check that it is the whole function."""
    fn, zero = flat(name), jnp.zeros(N)
    matrix = np.asarray(jax.jacfwd(fn)(zero), np.float64)
    change = np.asarray(fn(3.0 * ROW), np.float64) - np.asarray(fn(zero), np.float64)
    assert np.allclose(change, matrix @ np.asarray(3.0 * ROW, np.float64), atol=1e-4), "not affine"
    return matrix


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", list(LINEAR))
def test_linear_operation_has_its_exact_norm(name: str) -> None:
    form = lb.trace(flat(name), ROW)
    assert not form.taps, f"taps in a linear function: {form.taps}"
    for norm in (2, 1, math.inf):
        exact = float(np.linalg.norm(matrix_of(name), norm))
        value = lb.liplt(form, norm=norm).value
        assert exact * (1 - 1e-5) <= value <= exact * (1 + 1e-5), (norm, exact, value)


@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    "first",
    [pytest.param(i, marks=[pytest.mark.slow] if i % 72 else []) for i in range(0, len(LINEAR), 6)],
)
def test_linear_operations_between_activations(first: int) -> None:
    """Inner blocks are computed in another way than rows of the output. Six operations, stacked, at a time."""
    names = list(LINEAR)[first : first + 6]

    def fn(x: jax.Array) -> jax.Array:
        h = jnp.tanh(M @ x)
        return jnp.tanh(jnp.concatenate([flat(name)(h) for name in names]))

    stacked = np.concatenate([matrix_of(name) for name in names])
    exact = np.linalg.norm(stacked, 2) * np.linalg.norm(np.asarray(M, np.float64), 2)
    value = lb.naive(lb.trace(fn, ROW)).value
    assert exact * (1 - 1e-5) <= value <= exact * (1 + 1e-5), names
