"""The nets of the zoo that are plain JAX functions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from zoo_core import Build, Fn, bias, enter_many, gauss, mlp, net, point, twice

Made = tuple[Fn, jax.Array]
Rng = np.random.Generator


# ---------------------------------------------------------------------------------- linear networks
@net(0, 0, "linear")
def linear(rng: Rng) -> Made:
    w, b = gauss(rng, 4, 6), bias(rng, 4)
    return (lambda x: w @ x + b), point(rng, 6)


@net(0, 0, "linear")
def linear_pipeline(rng: Rng) -> Made:
    """Linear operations only: strided convolution, mean, cumulative sum, transposition, sum over an axis."""
    kernel, w = gauss(rng, 3, 1, 2, fan_in=3), gauss(rng, 4, 5)

    def fn(x: jax.Array) -> jax.Array:
        h = lax.conv_general_dilated(
            x[None, :, None], kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )[0]
        h = jnp.cumsum(h.T - jnp.mean(h), axis=1).sum(axis=0) / 3.0
        return w @ h

    return fn, point(rng, 10)


# ------------------------------------------------------------------- dense nets, one per activation
def _prelu(rng: Rng) -> Made:
    alpha = jnp.asarray(rng.uniform(-0.3, 0.6, size=12), jnp.float32)
    return mlp(rng, lambda h: jnp.where(h > 0, h, alpha * h), lambda h: jnp.where(h >= 0, h, h * alpha))


def _homemade(rng: Rng) -> Made:
    """A composition nobody has a name for: its slope range has to be proved."""

    def activation(h: jax.Array) -> jax.Array:
        return 0.4 * jnp.sqrt(1.0 + h * h) - jnp.arctan(h) / 5.0

    return mlp(rng, activation, activation)


_DENSE: dict[str, Build] = {
    "relu": twice(nn.relu),
    "leaky_relu": twice(functools.partial(nn.leaky_relu, negative_slope=0.1)),
    "prelu": _prelu,
    "tanh": twice(jnp.tanh),
    "sigmoid": twice(nn.sigmoid),
    "gelu_exact": twice(functools.partial(nn.gelu, approximate=False)),
    "gelu_tanh": twice(functools.partial(nn.gelu, approximate=True)),
    "silu": twice(nn.silu),
    "softplus": twice(nn.softplus),
    "elu_celu": lambda rng: mlp(rng, nn.elu, functools.partial(nn.celu, alpha=2.0)),
    "selu": twice(nn.selu),
    "absolute": twice(jnp.abs),
    "hard_swish": twice(nn.hard_swish),
    "relu6_clip": lambda rng: mlp(rng, nn.relu6, lambda h: jnp.clip(h, -0.5, 1.0)),
    "hard_tanh_hard_sigmoid": lambda rng: mlp(rng, nn.hard_tanh, lambda h: 4.0 * nn.hard_sigmoid(h)),
    "mish_softsign": lambda rng: mlp(rng, nn.mish, nn.soft_sign),
    "squareplus_sparse_plus": lambda rng: mlp(rng, nn.squareplus, nn.sparse_plus),
    "log_sigmoid": twice(nn.log_sigmoid),
    "homemade": _homemade,
    "relu_by_mask": twice(lambda h: h * (h > 0).astype(h.dtype)),
}
enter_many(24, 2, _DENSE)


def soft_shrink(h: jax.Array) -> jax.Array:
    return jnp.sign(h) * jnp.maximum(jnp.abs(h) - 0.25, 0.0)


def interpolated(h: jax.Array) -> jax.Array:
    knots = np.float32([-1.0, -0.3, 0.2, 1.1])
    return jnp.interp(h, knots, np.float32([0.4, -0.2, 0.7, 0.1]), left="extrapolate")


def cases(h: jax.Array) -> jax.Array:
    """Written with jnp.select and jnp.piecewise."""
    first = jnp.select([h < 0, h < 1], [0.25 * h, h], 1.5 * h - 0.5)
    return jnp.piecewise(first, [first < 0, first > 1], [lambda t: -t, lambda t: 2.0 - t, lambda t: t])


_SHAPED: dict[str, Build] = {
    "soft_shrink_interp": lambda rng: mlp(rng, soft_shrink, interpolated),
    "cases_log_sigmoid": lambda rng: mlp(rng, cases, lambda h: jnp.log(nn.sigmoid(h))),
    "arctan_arcsinh": lambda rng: mlp(rng, jnp.arctan, jnp.arcsinh),
}
enter_many(24, 2, _SHAPED)


# --------------------------------------------------------------------------------------- group taps
@net(4, 1, "group")
def reduce_max_head(rng: Rng) -> Made:
    w, b = gauss(rng, 12, 6), bias(rng, 12)
    return (lambda x: jnp.max((w @ x + b).reshape(4, 3), axis=1)), point(rng, 6)


@net(24, 2, "group")
def max_min_of_branches(rng: Rng) -> Made:
    wa, wb, w = gauss(rng, 12, 6), gauss(rng, 12, 6), gauss(rng, 4, 12)

    def fn(x: jax.Array) -> jax.Array:
        a, b = wa @ x, wb @ x + 0.2
        return w @ jnp.minimum(jnp.maximum(a, b), a[::-1] + 1.0)

    return fn, point(rng, 6)


def maxmin(h: jax.Array) -> jax.Array:
    """MaxMin as published networks write it: split, maximum and minimum, concatenate."""
    a, b = jnp.split(h, 2)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)])


@net(24, 2, "group")
def maxmin_mlp(rng: Rng) -> Made:
    return mlp(rng, maxmin, maxmin)


def exact_orthogonal(rng: Rng, n: int = 8) -> jax.Array:
    """An exactly orthogonal float32 matrix: blocks of Hadamard(4)/2 between signed permutations."""
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    h = np.kron(np.eye(n // 4), np.kron(two, two) / 2.0)
    signs = rng.choice([-1.0, 1.0], size=n)
    q = (signs[:, None] * h[rng.permutation(n)])[:, rng.permutation(n)]
    assert np.array_equal(q @ q.T, np.eye(n))
    return jnp.asarray(q, jnp.float32)


@net(64, 8, "group")
def orthogonal_maxmin(rng: Rng) -> Made:
    """Eight exactly orthogonal layers with MaxMin between them: the Lipschitz constant is 1."""
    weights = [exact_orthogonal(rng) for _ in range(9)]

    def fn(x: jax.Array) -> jax.Array:
        for w in weights[:-1]:
            x = maxmin(w @ x)
        return weights[-1] @ x

    return fn, point(rng, 8)


@net(24, 2, "group")
def group_sort(rng: Rng) -> Made:
    return mlp(
        rng,
        lambda h: jnp.sort(h.reshape(4, 3), axis=1).reshape(12),
        lambda h: jnp.sort(h.reshape(6, 2)).reshape(12),
    )


@net(22, 2, "group")
def max_pool_overlapping(rng: Rng) -> Made:
    """Windows of 3, stride 2, SAME padding (-inf outside): neighbouring windows share an input."""
    kernel, w = gauss(rng, 3, 1, 2, fan_in=3), gauss(rng, 3, 8)

    def fn(x: jax.Array) -> jax.Array:
        h = nn.relu(
            lax.conv_general_dilated(
                x[None, :, None], kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
            )
        )
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 1), (1, 2, 1), "SAME")
        return w @ h.reshape(-1)

    return fn, point(rng, 9)


@net(24, 2, "group")
def running_extremes(rng: Rng) -> Made:
    """Maxima of all prefixes, and minima of all suffixes along the first axis."""
    return mlp(
        rng,
        lambda h: lax.cummax(h.reshape(3, 4), axis=1).reshape(12),
        lambda h: lax.cummin(h.reshape(4, 3), axis=0, reverse=True).reshape(12),
    )


@net(16, 2, "group")
def log_sum_exp(rng: Rng) -> Made:
    """logaddexp of two branches, then logsumexp over an axis."""
    wa, wb, w1, w2 = gauss(rng, 12, 6), gauss(rng, 12, 6), gauss(rng, 12, 12), gauss(rng, 3, 4)

    def fn(x: jax.Array) -> jax.Array:
        h = jnp.logaddexp(wa @ x, wb @ x + 0.2)
        return w2 @ nn.logsumexp((w1 @ h).reshape(3, 4), axis=0)

    return fn, point(rng, 6)


@net(24, 2, "group")
def order_statistics(rng: Rng) -> Made:
    """The largest two of every group; quartiles and the median across groups."""
    w1, w2, w3 = gauss(rng, 12, 6), gauss(rng, 12, 8), gauss(rng, 4, 12)

    def fn(x: jax.Array) -> jax.Array:
        h = w2 @ lax.top_k((w1 @ x).reshape(4, 3), 2)[0].reshape(8)
        quartiles = jnp.quantile(h.reshape(4, 3), jnp.array([0.25, 0.75]), axis=0).reshape(6)
        return w3[:, :9] @ jnp.concatenate([quartiles, jnp.median(h.reshape(4, 3), axis=0)])

    return fn, point(rng, 6)


@net(12, 1, "group")
def scattered_extremes(rng: Rng) -> Made:
    """at[].max with an index that occurs twice and one out of range, at[].multiply twice at one entry."""
    wa, wb, w = gauss(rng, 12, 6), gauss(rng, 4, 6), gauss(rng, 3, 12)

    def fn(x: jax.Array) -> jax.Array:
        h = (wa @ x).at[jnp.array([1, 5, 5, 20])].max(wb @ x)
        h = h.at[jnp.array([0, 0, 3])].multiply(jnp.array([0.5, -3.0, 2.0]))
        return w @ h

    return fn, point(rng, 6)


@net(2, 2)
def householder(rng: Rng) -> Made:
    """z + 2 v relu(-v'z), |v| = 1, between orthogonal layers: 1-Lipschitz in l2, not in l1 and l-inf."""
    weights = [exact_orthogonal(rng) for _ in range(3)]
    v = jnp.asarray([[0.5, 0.5, 0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.5, -0.5, 0.5, 0, -0.5, 0]], jnp.float32)

    def fn(x: jax.Array) -> jax.Array:
        for w, one in zip(weights, v, strict=False):
            x = w @ x
            x = x + 2 * one * nn.relu(-(one @ x))
        return weights[-1] @ x

    return fn, point(rng, 8)


# ------------------------------------------------------------------------------------- graph shapes
@net(12, 1)
def two_branches(rng: Rng) -> Made:
    wa, wb, w, b = gauss(rng, 7, 12), gauss(rng, 5, 12), gauss(rng, 3, 12), bias(rng, 7)
    return (lambda x: w @ jnp.concatenate([nn.relu(wa @ x + b), jnp.tanh(wb @ x)])), point(rng, 12)


@net(18, 3)
def dense_net(rng: Rng) -> Made:
    """Each layer sees all earlier ones (DenseNet)."""
    weights = [gauss(rng, 6, 5 + 6 * i, gain=1.0) for i in range(3)]
    w = gauss(rng, 3, 23, gain=1.0)

    def fn(x: jax.Array) -> jax.Array:
        seen = x
        for wi in weights:
            seen = jnp.concatenate([seen, nn.relu(wi @ seen - 0.1)])
        return w @ seen

    return fn, point(rng, 5)


@net(16, 2)
def shared_block(rng: Rng) -> Made:
    """One jitted residual block called twice at one shape: both calls share a sub-jaxpr."""
    w1, w2, w = gauss(rng, 8, 6), gauss(rng, 6, 8, gain=0.7), gauss(rng, 4, 6)

    @jax.jit
    def block(h: jax.Array) -> jax.Array:
        return h + w2 @ nn.relu(w1 @ h + 0.1)

    return (lambda x: w @ block(block(x))), point(rng, 6)


@net(22, 2)
def u_net(rng: Rng) -> Made:
    """Down by a strided convolution, up by repetition, the skip concatenated."""
    dims = ("NWC", "WIO", "NWC")
    down, mid = gauss(rng, 2, 1, 2, fan_in=2), gauss(rng, 3, 3, 2, fan_in=9, gain=1.0)
    w = gauss(rng, 3, 12)

    def fn(x: jax.Array) -> jax.Array:
        full = x[None, :, None]
        low = nn.relu(lax.conv_general_dilated(full, down, (2,), "VALID", dimension_numbers=dims))
        up = jnp.concatenate([jnp.repeat(low, 2, axis=1), full], axis=2)
        return w @ nn.softplus(
            lax.conv_general_dilated(up, mid, (1,), "SAME", dimension_numbers=dims)
        ).reshape(-1)

    return fn, point(rng, 6)


@net(64, 2)
def mlp_mixer(rng: Rng) -> Made:
    """Token mixing, then channel mixing, without normalisation."""
    t1, t2 = gauss(rng, 8, 4), gauss(rng, 4, 8, gain=0.7)
    c1, c2, w = gauss(rng, 6, 5), gauss(rng, 5, 6, gain=0.7), gauss(rng, 3, 5, gain=1.0)

    def fn(x: jax.Array) -> jax.Array:
        x = x + jnp.swapaxes(nn.gelu(x.T @ t1.T, approximate=False) @ t2.T, 0, 1)
        x = x + nn.gelu(x @ c1.T, approximate=False) @ c2.T
        return w @ x.mean(axis=0)

    return fn, point(rng, 4, 5)


# ------------------------------------------------------------------ loops, casts, wrappers, control
@net(24, 3)
def scan_stacked(rng: Rng) -> Made:
    """lax.scan over stacked weights, length 3, and the outputs of every step used."""
    stack, w = gauss(rng, 3, 8, 8, gain=1.2), gauss(rng, 3, 24, gain=1.0)

    def fn(x: jax.Array) -> jax.Array:
        def step(h: jax.Array, wi: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = nn.relu(wi @ h)
            return h, h

        return w @ lax.scan(step, x, stack)[1].reshape(-1)

    return fn, point(rng, 8)


@net(18, 3)
def fori_loop(rng: Rng) -> Made:
    """lax.fori_loop with static limits, a dynamic slice by the (constant) counter inside."""
    stack, w = gauss(rng, 3, 6, 6, gain=1.2), gauss(rng, 3, 6)

    def fn(x: jax.Array) -> jax.Array:
        def body(i: jax.Array, h: jax.Array) -> jax.Array:
            return h + jnp.tanh(lax.dynamic_index_in_dim(stack, i, keepdims=False) @ h)

        return w @ lax.fori_loop(0, 3, body, x)

    return fn, point(rng, 6)


@net(24, 2)
def rematerialised(rng: Rng) -> Made:
    w1, w2, w3 = gauss(rng, 12, 6), gauss(rng, 12, 12), gauss(rng, 4, 12)
    block = jax.checkpoint(lambda h: jnp.tanh(w2 @ jnp.abs(w1 @ h)))
    return (lambda x: w3 @ jax.jit(block)(x)), point(rng, 6)


@net(24, 2, "half")
def half_precision(rng: Rng) -> Made:
    """Half-precision layers between casts: weights are what the cast makes of them, x is not rounded."""
    w1, w2, w3 = gauss(rng, 12, 6), gauss(rng, 12, 12), gauss(rng, 4, 12)

    def fn(x: jax.Array) -> jax.Array:
        h = nn.relu(w1.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16)).astype(jnp.float16)
        h = nn.relu(jnp.matmul(w2.astype(jnp.float16), h, preferred_element_type=jnp.float32))
        return w3 @ h

    return fn, point(rng, 6)


@jax.custom_jvp
def _liar(h: jax.Array) -> jax.Array:
    return jnp.maximum(3.0 * h, -h)


@_liar.defjvp
def _liar_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _liar(primals[0]), 1e-3 * tangents[0]


@net(24, 2, "lies")
def lying_custom_jvp(rng: Rng) -> Made:
    """Slopes are -1 and 3, autodiff says 0.001: a bound that asks autodiff is wrong."""
    return mlp(rng, _liar, _liar)


@jax.custom_vjp
def _clipped_gradient(h: jax.Array) -> jax.Array:
    return nn.relu(h) + 0.25 * h


def _clipped_fwd(h: jax.Array) -> tuple[jax.Array, None]:
    return _clipped_gradient(h), None


def _clipped_bwd(_: None, g: jax.Array) -> tuple[jax.Array]:
    return (jnp.clip(g, -1e-3, 1e-3),)


_clipped_gradient.defvjp(_clipped_fwd, _clipped_bwd)


@net(24, 2, "lies")
def custom_vjp(rng: Rng) -> Made:
    return mlp(rng, _clipped_gradient, _clipped_gradient)


@net(24, 2)
def constant_control(rng: Rng) -> Made:
    """cond and switch on constants, stop_gradient, optimization_barrier, reduce_precision."""
    w1, w2, w3 = gauss(rng, 12, 6), gauss(rng, 12, 12), gauss(rng, 4, 12)

    def fn(x: jax.Array) -> jax.Array:
        h = lax.cond(jnp.sum(w1) > 1e6, jnp.sin, nn.relu, w1 @ x)
        h = lax.optimization_barrier(lax.stop_gradient(h) + 0.5)
        h = lax.switch(jnp.argmax(jnp.array([0.0, 2.0, 1.0])), (jnp.cos, nn.relu, jnp.tanh), w2 @ h)
        return w3 @ lax.reduce_precision(h, 8, 23)

    return fn, point(rng, 6)


# --------------------------------------------------------------------------------- index gymnastics
@net(12, 1)
def reshuffle(rng: Rng) -> Made:
    """cumsum, reverse, pad, roll, tile, stack, split, squeeze, transpose around one relu."""
    w1, w2 = gauss(rng, 12, 15, gain=0.5), gauss(rng, 3, 12)

    def fn(x: jax.Array) -> jax.Array:
        a, b = jnp.split(jnp.tile(jnp.pad(x, (2, 1), constant_values=0.7), 2), 2)
        h = jnp.stack([jnp.cumsum(a)[::-1], jnp.roll(b, 2)])
        h = lax.cumsum(h, axis=1, reverse=True)[:, ::2]
        h = jnp.squeeze(jnp.transpose(h[None], (2, 0, 1)), 1).reshape(-1)[1:]
        return w2 @ nn.relu(w1 @ h - lax.slice(h, (0,), (1,)))

    return fn, point(rng, 12)


@net(12, 1)
def gather_scatter(rng: Rng) -> Made:
    """gather, take_along_axis, dynamic_(update_)slice, at[].set, at[].add: all at constant indices."""
    w1, w2 = gauss(rng, 12, 9), gauss(rng, 3, 12)
    index = jnp.asarray(rng.integers(0, 12, size=9))
    rows = jnp.asarray(rng.integers(0, 3, size=(3, 2)))

    def fn(x: jax.Array) -> jax.Array:
        h = x[index] + lax.dynamic_slice(x, (jnp.sum(index) * 0 + 1,), (1,))
        h = h.at[jnp.array([0, 0, 4])].add(x[:3]).at[2].set(x[7])
        h = lax.dynamic_update_slice(h, 2.0 * x[:2], (5,))
        h = jnp.take_along_axis(h.reshape(3, 3), rows, axis=1).sum() * 0.2 + h
        return w2 @ nn.relu(w1 @ h)

    return fn, point(rng, 12)


@net(12, 1)
def nan_guard(rng: Rng) -> Made:
    w1, w2 = gauss(rng, 12, 12), gauss(rng, 3, 12)

    def fn(x: jax.Array) -> jax.Array:
        h = jnp.where(jnp.isnan(x), 0.0, x)
        return w2 @ jnp.nan_to_num(nn.relu(w1 @ h))

    return fn, point(rng, 12)


@net(12, 1)
def masked(rng: Rng) -> Made:
    """where with a constant mask made of iota, floor and comparisons; a banded matrix; select among three."""
    w1, w2 = gauss(rng, 12, 12), gauss(rng, 3, 12)

    def fn(x: jax.Array) -> jax.Array:
        i = jnp.arange(12)
        mask = jnp.floor(i.astype(jnp.float32) / 4.0) % 2.0 == 0.0
        h = jnp.where(mask, 2.0 * x, 0.25)
        h = nn.relu(jnp.triu(jnp.tril(w1, 3), -3) @ h)
        return w2 @ lax.select_n(i % 3, h, -h, jnp.zeros_like(h))

    return fn, point(rng, 12)


@net(12, 1)
def einsum(rng: Rng) -> Made:
    a, b, w = gauss(rng, 4, 3, 2, fan_in=3), gauss(rng, 3, 3), gauss(rng, 3, 12)

    def fn(x: jax.Array) -> jax.Array:
        h = jnp.einsum("ij,ikb,jk->kib", x, a, b)[..., 0] + jnp.einsum("ij,ikb,jk->kib", x, a, b)[..., 1]
        return w @ nn.relu(h).reshape(-1)

    return fn, point(rng, 4, 3)


@net(12, 1)
def normalised_input(rng: Rng) -> Made:
    """Pixel units at the input, the normalisation inside: (x - mean) / std, then vmapped filters."""
    w1, w2 = gauss(rng, 3, 3), gauss(rng, 3, 12)
    mean, std = point(rng, 4, 3), jnp.asarray(rng.uniform(0.2, 0.5, size=(4, 3)), jnp.float32)

    def fn(x: jax.Array) -> jax.Array:
        return w2 @ nn.relu(jax.vmap(lambda row: w1 @ row)((x - mean) / std)).reshape(-1)

    return fn, point(rng, 4, 3)


@net(24, 2, "batched")
def batched_mlp(rng: Rng) -> Made:
    w1, w2, w3, b = gauss(rng, 6, 12, fan_in=6), gauss(rng, 12, 12), gauss(rng, 12, 4), bias(rng, 12)
    return (lambda x: nn.relu(nn.relu(x @ w1 + b) @ w2) @ w3), point(rng, 5, 6)
