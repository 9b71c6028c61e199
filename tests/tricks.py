"""Functions that a careless tracer gets wrong, for `test_sound_or_silent`.

`trick` enters one that may be refused or bounded, `fair` one that must be accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, nn
from jax.ad_checkpoint import checkpoint_name

Fn = Callable[[jax.Array], Any]
N = 8
W = jnp.asarray(np.random.default_rng(1).normal(size=(N, N)) / 2, jnp.float32)
C = jnp.asarray(np.random.default_rng(2).normal(size=N), jnp.float32)


@dataclass(frozen=True)
class Trick:
    fn: Fn
    accept: bool


TRICKS: dict[str, Trick] = {}


def trick(fn: Fn) -> Fn:
    """May be refused or bounded, as long as it is sound."""
    TRICKS[fn.__name__] = Trick(fn, False)
    return fn


def fair(fn: Fn) -> Fn:
    """Lipschitz in a way that the library promises to read: must be accepted."""
    TRICKS[fn.__name__] = Trick(fn, True)
    return fn


# ----------------------------------------------------------------------------------- casts and bits
@trick
def through_integers(x: jax.Array) -> jax.Array:
    return x.astype(jnp.int32).astype(jnp.float32)


@trick
def through_integers_after_an_activation(x: jax.Array) -> jax.Array:
    return nn.relu(W @ x).astype(jnp.int32).astype(jnp.float32)


@trick
def through_bool_after_an_activation(x: jax.Array) -> jax.Array:
    return jnp.tanh(nn.relu(x).astype(bool).astype(jnp.float32))


@trick
def integer_arithmetic_between_activations(x: jax.Array) -> jax.Array:
    return jnp.tanh((4.0 * jnp.tanh(x)).astype(jnp.int32).astype(jnp.float32) / 2.0)


@trick
def through_bool(x: jax.Array) -> jax.Array:
    return x.astype(bool).astype(jnp.float32)


@trick
def through_small_integers(x: jax.Array) -> jax.Array:
    return W @ (10.0 * x).astype(jnp.int8).astype(jnp.float32)


@trick
def bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & 0x7FF00000, jnp.float32)


@trick
def parts_of_a_complex_number(x: jax.Array) -> jax.Array:
    return jnp.abs(lax.complex(x, 2.0 * x))


# --------------------------------------------------------------------------------- groups and pairs
@fair
def maximum_taken_twice(x: jax.Array) -> jax.Array:
    """Looks like MaxMin, is not: sqrt(2), not 1."""
    a, b = jnp.split(x, 2)
    return jnp.concatenate([jnp.maximum(a, b), jnp.maximum(a, b)])


@fair
def maximum_and_minimum_of_different_pairs(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b[::-1])])


@fair
def minimum_used_twice_beside_the_maximum(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2)
    return jnp.concatenate([jnp.minimum(a, b), jnp.maximum(b, a), jnp.minimum(b, a)])


@fair
def maxmin_with_one_half_scaled(x: jax.Array) -> jax.Array:
    a, b = jnp.split(x, 2)
    return jnp.concatenate([jnp.maximum(a, b), 3.0 * jnp.minimum(a, b)])


@fair
def maximum_with_its_own_reverse(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, x[::-1])


@fair
def maximum_with_a_multiple_of_itself(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, -3.0 * x)


@fair
def maximum_of_maxima(x: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.maximum(x, 2.0 * jnp.roll(x, 1)), jnp.roll(x, 3) - 1.0)


@fair
def maximum_with_the_same_scalar(x: jax.Array) -> jax.Array:
    """One entry is in all groups: the constant grows with their number."""
    return jnp.maximum(x[1:], x[0])


@trick
def running_maximum(x: jax.Array) -> jax.Array:
    return lax.cummax(x)


@fair
def reduce_min_of_overlaps(x: jax.Array) -> jax.Array:
    return jnp.stack([jnp.min(x[:6]), jnp.min(x[2:]), jnp.max(x[1:7])])


@fair
def sort_everything(x: jax.Array) -> jax.Array:
    return W @ jnp.sort(jnp.concatenate([x, x[:2]]))[2:]


@fair
def sort_columns_downwards(x: jax.Array) -> jax.Array:
    return jnp.sort(x.reshape(4, 2), axis=0, descending=True).reshape(-1) * jnp.arange(1.0, 9.0)


@trick
def max_pool_that_starts_at_zero(x: jax.Array) -> jax.Array:
    """lax.reduce_window with 0 in place of -inf: a common way to write it, and another function."""
    return lax.reduce_window(x, 0.0, lax.max, (3,), (1,), "SAME")


@trick
def max_pool_with_holes(x: jax.Array) -> jax.Array:
    return lax.reduce_window(
        x.reshape(2, 4), -jnp.inf, lax.max, (2, 2), (1, 1), ((0, 0), (1, 1)), (2, 1), (1, 2)
    ).reshape(-1)


@trick
def running_minimum(x: jax.Array) -> jax.Array:
    return lax.cummin(x, reverse=True)


@trick
def top_values(x: jax.Array) -> jax.Array:
    return lax.top_k(x, 3)[0] * 2.0


@trick
def sort_constants_by_the_input(x: jax.Array) -> jax.Array:
    return lax.sort_key_val(x, C)[1]


@trick
def sort_another_tensor_by_the_input(x: jax.Array) -> jax.Array:
    return lax.sort((x, 5.0 * x[::-1]), num_keys=1)[1]


@trick
def median(x: jax.Array) -> jax.Array:
    return jnp.median(x.reshape(2, 4), axis=1)


# -------------------------------------------------------------------------------------- comparisons
@fair
def relu_by_where_and_zeros(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, jnp.zeros_like(x))


@trick
def where_between_two_variables(x: jax.Array) -> jax.Array:
    y = W @ x
    return jnp.where(x > y, x, y)


@trick
def where_by_another_variable(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, W @ x, 0.0)


@trick
def where_with_shifted_predicate(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.roll(x, 1) > 0, x, 0.0)


@trick
def relu_that_reads_its_neighbour_by_broadcasting(x: jax.Array) -> jax.Array:
    return jnp.where(x[:1] > 0, x, 0.0)


@trick
def jump_far_away(x: jax.Array) -> jax.Array:
    return jnp.where(x > 3.0, x + 1.0, x)


@trick
def jump_at_one_point(x: jax.Array) -> jax.Array:
    """Both sides agree, the point between them does not."""
    return jnp.where(x == 1.0, 7.0, x)


@fair
def three_branches(x: jax.Array) -> jax.Array:
    return jnp.where(x > 1.0, 2.0 * x - 1.0, jnp.where(x < -1.0, 0.5 * x - 0.5, x))


@trick
def guard_that_is_no_guard(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(jnp.roll(x, 1) * 0.0 / jnp.abs(x)), 0.0, x)


@trick
def comparison_as_a_number(x: jax.Array) -> jax.Array:
    return W @ (x > C).astype(jnp.float32)


@trick
def logic(x: jax.Array) -> jax.Array:
    return jnp.where((x > 0) & (jnp.roll(x, 1) > 0), x, 0.0)


@trick
def sign_times_something(x: jax.Array) -> jax.Array:
    return jnp.sign(x) * (W @ x)


@fair
def absolute_by_sign(x: jax.Array) -> jax.Array:
    return jnp.sign(x) * x


@trick
def clamp_between_variables(x: jax.Array) -> jax.Array:
    return lax.clamp(jnp.minimum(x[::-1], 0.0), 4.0 * x, jnp.maximum(2.0 * x[::-1], 0.0))


# --------------------------------------------------------------------- products and their disguises
@trick
def product_through_logarithms(x: jax.Array) -> jax.Array:
    return jnp.exp(jnp.log(jnp.abs(x) + 1.0) + jnp.log(jnp.abs(x[::-1]) + 1.0))


@trick
def product_of_bounded_things(x: jax.Array) -> jax.Array:
    return jnp.tanh(4.0 * x) * jnp.tanh(4.0 * x[::-1])


@trick
def square_as_einsum(x: jax.Array) -> jax.Array:
    return jnp.einsum("i,i->i", x, x)


@trick
def power_of_two_variables(x: jax.Array) -> jax.Array:
    return jnp.power(jnp.abs(x) + 1.0, jnp.tanh(x[::-1]))


@trick
def angle(x: jax.Array) -> jax.Array:
    return jnp.arctan2(x, x[::-1])


@trick
def log_add_exp(x: jax.Array) -> jax.Array:
    return jnp.logaddexp(x, 2.0 * x[::-1])


@trick
def steep_but_bounded(x: jax.Array) -> jax.Array:
    return jnp.tanh(1e4 * x) + jnp.sin(50.0 * x) / 5.0


@trick
def slope_grows_late(x: jax.Array) -> jax.Array:
    """Flat on any grid near zero, steep beyond 30."""
    return nn.softplus(x - 30.0) * 100.0 + x


@trick
def chirp(x: jax.Array) -> jax.Array:
    return jnp.sin(x * x)


@trick
def square_root_of_absolute_value(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.abs(x) + 1e-12)


@trick
def gradient_of_a_network(x: jax.Array) -> jax.Array:
    """The input gradient of a relu network jumps."""
    return jax.grad(lambda x: jnp.sum(nn.relu(W @ x)))(x)


@fair
def gradient_of_a_quadratic(x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: 0.5 * jnp.vdot(W @ x, W @ x))(x)


@trick
def gradient_of_a_smooth_network(x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sum(nn.softplus(W @ x)))(x)


@trick
def softplus_by_hand(x: jax.Array) -> jax.Array:
    return jnp.log(1.0 + jnp.exp(x))


@trick
def bell_curves(x: jax.Array) -> jax.Array:
    return jnp.exp(-4.0 * x * x) + 1.0 / (1.0 + x * x) - x * jnp.exp(-jnp.abs(x))


@trick
def squares_of_bounded_functions(x: jax.Array) -> jax.Array:
    return jnp.tanh(3.0 * x) ** 2 - nn.sigmoid(x) * nn.sigmoid(-5.0 * x)


@trick
def sine_with_growing_amplitude(x: jax.Array) -> jax.Array:
    return jnp.sin(x) * x


@trick
def triangle_wave(x: jax.Array) -> jax.Array:
    return jnp.abs(x - jnp.round(x))


@trick
def swish_with_a_steep_gate(x: jax.Array) -> jax.Array:
    return x * nn.sigmoid(100.0 * x - 30.0)


@fair
def difference_of_relus(x: jax.Array) -> jax.Array:
    return nn.relu(x) - 2.0 * nn.relu(-x) + 0.5 * nn.relu(x - 1.0)


@fair
def thresholds_per_channel(x: jax.Array) -> jax.Array:
    return jnp.where(x > C, 3.0 * (x - C), jnp.maximum(0.1 * (x - C), -5.0))


@trick
def one_channel_jumps(x: jax.Array) -> jax.Array:
    """Continuous in every entry but one."""
    return jnp.where(x > 0, x + jnp.zeros(N).at[5].set(0.1), x)


@trick
def slopes_per_channel_of_any_size(x: jax.Array) -> jax.Array:
    return jnp.where(x < 0, x * jnp.linspace(-40.0, 7.0, N), x)


@trick
def branch_that_overflows(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 0.5 * x, 1.7 * jnp.expm1(x))


@trick
def length_of_pairs(x: jax.Array) -> jax.Array:
    return jnp.hypot(x, 2.0 * x[::-1])


# --------------------------------------------------------------------------------- indices, scatter
@trick
def scatter_overwrites_some(x: jax.Array) -> jax.Array:
    return jnp.zeros(5).at[jnp.array([0, 2, 4])].set(x[:3]).at[jnp.array([1, 1])].add(x[3:5])


@trick
def scatter_sets_one_place_twice(x: jax.Array) -> jax.Array:
    return x.at[jnp.array([0, 0])].set(5.0 * x[3:5])


@trick
def scatter_maximum(x: jax.Array) -> jax.Array:
    return x.at[jnp.array([0, 1, 1])].max(3.0 * x[5:])


@trick
def scatter_product(x: jax.Array) -> jax.Array:
    return x.at[jnp.array([0, 1])].multiply(x[5:7])


@fair
def scatter_scaling(x: jax.Array) -> jax.Array:
    return x.at[jnp.array([0, 1])].add(10.0 * x[5:7])


@trick
def indices_out_of_range(x: jax.Array) -> jax.Array:
    return x[jnp.array([0, 20, -3])] + x.at[jnp.array([1, 99])].get(mode="fill", fill_value=2.0).sum()


@trick
def interpolation_in_a_table(x: jax.Array) -> jax.Array:
    return jnp.interp(x, jnp.array([-1.0, 0.0, 2.0]), jnp.array([0.0, 9.0, 1.0]))


# -------------------------------------------------------------------------------- loops and control
@fair
def recurrent_network(x: jax.Array) -> jax.Array:
    """The input itself is scanned over, in reverse, and the carry starts at zero."""

    def cell(h: jax.Array, xi: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(W[:3, :3] @ h + W[:3, 3] * xi)
        return h, h[0]

    h, trace = lax.scan(cell, jnp.zeros(3), x, reverse=True)
    return jnp.concatenate([h, trace])


@fair
def scan_with_a_constant_switch(x: jax.Array) -> jax.Array:
    """Which branch a step takes depends on the counter only."""

    def step(h: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        return lax.cond(i % 2 == 0, lambda h: nn.relu(W @ h), lambda h: 2.0 * h[::-1], h), None

    return lax.scan(step, x, jnp.arange(4))[0]


@trick
def gated_by_a_carry(x: jax.Array) -> jax.Array:
    def step(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return h * jnp.tanh(w @ h), None

    return lax.scan(step, x, jnp.stack([W, W]))[0]


@trick
def switch_by_the_input(x: jax.Array) -> jax.Array:
    return lax.switch(jnp.argmax(x[:2]), (jnp.tanh, nn.relu), x)


@trick
def loop_count_from_the_input(x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, jnp.clip(x[0], 0.0, 3.0).astype(jnp.int32), lambda i, h: 1.5 * h, x)


@fair
def names_barriers_and_checkpoints(x: jax.Array) -> jax.Array:
    h = checkpoint_name(W @ x, "hidden")
    return jax.checkpoint(lambda h: checkpoint_name(nn.relu(h), "after"), policy=None)(h)


@fair
def resized_image(x: jax.Array) -> jax.Array:
    return jax.image.resize(x.reshape(2, 4), (3, 5), "bilinear").reshape(-1)


@fair
def device_put_is_the_identity(x: jax.Array) -> jax.Array:
    return nn.relu(jax.device_put(W @ x))


@fair
def convolution_by_name(x: jax.Array) -> jax.Array:
    return jnp.convolve(x, jnp.array([1.0, -2.0, 0.5]), mode="same")


@trick
def randomness_with_a_constant_key(x: jax.Array) -> jax.Array:
    return nn.relu(W @ x + jax.random.normal(jax.random.key(0), (N,)))
