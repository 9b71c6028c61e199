"""Networks whose outputs do not change when an image is mirrored: features in two halves, which mirroring exchanges.

Features h (..., 2, c) have the halves u and v of c channels each, at every pixel. If x gives (u, v), its mirror image
gives (mirror(v), mirror(u)). Every map here commutes with that, so that `even`, at the end, gives the same features for
both images, and no mean over two images is needed, whose constant would be taken for larger than it is. All maps have
norm 1, mixers that of their matrices.
(For groups in general: Cohen and Welling, Group equivariant convolutional networks, ICML 2016.)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lipbounds.training.activations import maxmin
from lipbounds.training.layers import Centre, Dense


def mirror(x: jax.Array) -> jax.Array:
    """Images (..., height, width, channels) with the order of their columns reversed."""
    return x[..., ::-1, :]


def halves(x: jax.Array) -> jax.Array:
    """Images (..., h, w, c) as features (..., h/2, w/2, 2, 2 c): left and right columns of windows of 2 x 2 pixels."""
    *batch, height, width, channels = x.shape
    x = x.reshape(*batch, height // 2, 2, width // 2, 2, channels)  # row and column in the window
    x = jnp.moveaxis(x, -4, -2)
    return x.reshape(*batch, height // 2, width // 2, 2, 2 * channels)


def both(f: Callable[[jax.Array], jax.Array], h: jax.Array) -> jax.Array:
    """f, a map of images, on the first half, and its mirror image on the second one."""
    return jnp.stack([f(h[..., 0, :]), mirror(f(mirror(h[..., 1, :])))], axis=-2)


def flat(h: jax.Array) -> jax.Array:
    """Features (B, height, width, 2, c) as (B, 2, height width c)."""
    parts = h[..., 0, :], mirror(h[..., 1, :])
    return jnp.stack([part.reshape(len(h), -1) for part in parts], axis=1)


def even(h: jax.Array) -> jax.Array:
    """(u + v) / sqrt(2), which mirroring does not change."""
    return (h[..., 0, :] + h[..., 1, :]) * 0.5**0.5


class SymmetricMixer(nnx.Module):
    """maxmin(h M + b - mean) in each half, M = [[P + Q, P - Q], [P - Q, P + Q]] / 2: sums mix by P, differences by Q.

    P and Q (n_in / 2, n_out / 2) are of the given kind, and the norm of M is the larger one of theirs: the bases
    (u + v) / sqrt(2) and (u - v) / sqrt(2) make M block diagonal. Products with P and Q take half the operations of
    one with M.
    """

    def __init__(self, n_in: int, n_out: int, kind: str, *, rngs: nnx.Rngs):
        sizes = n_in // 2, n_out // 2
        self.sums = Dense(*sizes, kind=kind, use_bias=False, rngs=rngs)
        self.differences = Dense(*sizes, kind=kind, use_bias=False, rngs=rngs)
        self.centre = Centre(n_out // 2, rngs=rngs)

    def weights(self) -> jax.Array:
        """M (n_in, n_out)."""
        p, q = self.sums.weights(), self.differences.weights()
        return jnp.block([[p + q, p - q], [p - q, p + q]]) / 2

    def __call__(self, h: jax.Array) -> jax.Array:
        """The layer on h (..., 2, n_in / 2)."""
        u, v = h[..., 0, :], h[..., 1, :]
        s, d = self.sums(u + v), self.differences(u - v)
        return maxmin(self.centre(jnp.stack([s + d, s - d], axis=-2) / 2))
