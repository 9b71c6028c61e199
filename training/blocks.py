"""Residual blocks whose constant follows from a matrix inequality, with its multipliers by construction.

    h = sqrt(rho) x - ((a + b) / sqrt(rho)) W' T phi(W x + c),      phi slope-restricted to [a, b], a >= 0,
    T_i = 2 rho / ((a + b)^2 sum_j |W W'|_ij q_j / q_i)

is sqrt(rho)-Lipschitz for l2 (Proposition 3.1 of `003_crm_liplt`; for relu, rho = 1 it is the SLL layer of Araujo et
al., ICLR 2023). Triangle inequalities do not see this: `lb.naive` and `lb.liplt` of a block may reach 3 and 2 times
sqrt(rho), `lb.lipsdp` proves it.

For convolutions with zero padding the sums run over all shifts of the kernel against itself: W'h is a part of the full
convolution of h, so W W' is at most the Gram matrix of that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lipbounds.training.layers import convolve, rescaled, transposed


class Block(nnx.Module):
    """The block above: dense, or with an image a convolution.

    Args:
        features: of input and output (channels, for images).
        hidden: rows of W (channels of W x); `features` if 0.
        window: odd size of the kernel of a convolution; 0 for a dense block.
        rho: the square of the constant. `learned` trains it, as exp of a parameter.
        slopes: (a, b), 0 <= a <= b, of `activation`.

    Raises:
        ValueError: sizes below 1, an even window, slopes or rho out of range.
    """

    def __init__(
        self,
        features: int,
        hidden: int = 0,
        *,
        window: int = 0,
        rho: float = 1.0,
        learned: bool = False,
        slopes: tuple[float, float] = (0.0, 1.0),
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        rngs: nnx.Rngs,
    ):
        hidden = hidden or features
        if min(features, hidden) < 1 or window < 0 or (window and window % 2 == 0):
            raise ValueError(f"sizes are at least 1 and windows odd, got {features}, {hidden} and {window}")
        if not 0 <= slopes[0] <= slopes[1] < math.inf or slopes[1] == 0 or not 0 < rho < math.inf:
            raise ValueError(
                f"slopes (a, b) need 0 <= a <= b, b > 0, and rho > 0, got {slopes} and rho {rho}"
            )
        self.activation, self.slope = activation, slopes[0] + slopes[1]
        sides = (window, window) if window else ()
        fan = math.prod(sides) * features
        drawn = jax.random.normal(rngs.params(), (*sides, features, hidden), jnp.float32)
        self.kernel = nnx.Param(drawn / math.sqrt(fan))
        self.bias = nnx.Param(jnp.zeros(hidden, jnp.float32))
        self.scales = nnx.Param(jnp.zeros(hidden, jnp.float32))  # log q
        self.learned, self.rho_given = learned, rho
        self.log_rho = nnx.data(nnx.Param(jnp.asarray(math.log(rho), jnp.float32)) if learned else None)

    @property
    def rho(self) -> jax.Array:
        """rho, as float32."""
        if self.log_rho is None:
            return jnp.asarray(self.rho_given, jnp.float32)
        return jnp.exp(self.log_rho.get_value())

    @property
    def constant(self) -> jax.Array:
        """sqrt(rho), what the construction promises in real arithmetic."""
        return jnp.sqrt(self.rho)

    def multipliers(self) -> jax.Array:
        """T_i for every hidden unit (or channel)."""
        kernel = self.kernel.get_value()
        turned = kernel.T if kernel.ndim == 2 else transposed(kernel)
        return 2 * self.rho / self.slope**2 * rescaled(turned, jnp.exp(self.scales.get_value())) ** 2

    def __call__(self, x: jax.Array) -> jax.Array:
        """The block on x (..., features), or on images (B, height, width, features)."""
        kernel, root = self.kernel.get_value(), jnp.sqrt(self.rho)
        bias = self.bias.get_value().astype(x.dtype)
        factors = (self.slope / root * self.multipliers()).astype(x.dtype)
        if kernel.ndim == 2:
            w = kernel.astype(x.dtype)
            back = (factors * self.activation(x @ w + bias)) @ w.T
        else:
            w = kernel.astype(x.dtype)
            back = convolve(factors * self.activation(convolve(x, w) + bias), transposed(w))
        return root.astype(x.dtype) * x - back
