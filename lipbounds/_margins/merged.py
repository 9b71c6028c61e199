"""The search on the open neurons of one ball alone, for wide networks: most of their neurons are stable.

Stable neurons are linear there, so the moves d of the n others, of all taps together, are

    d = G_u u + G_w w,     G_w strictly lower triangular,

and `search` has one tap in place of all. With w = c d + e (see there) and P the diagonal of the weights of u and e,

    d = M (u, e),   M = K [G_u, G_w],   K = (I - G_w diag(c))^-1,   Sigma = M P^-1 M',

and the minimum over (u, e) of the quadratic with - N d^2 is one step of the recursion, with I - N^1/2 Sigma N^1/2 of
size n. An evaluation takes about 10 n^3 + 5 n^2 k operations, k the inputs, however wide the network is. The barrier
B = log det (I - N^1/2 Sigma N^1/2) is that of `search`. With F = N^1/2 (I - N^1/2 Sigma N^1/2)^-1 N^1/2,

    dB = - sum_i (Sigma + Sigma F Sigma)_ii dN_i + sum_j (M' F M)_jj dP_j / P_j^2 - 2 sum_i (Sigma F K G_w)_ii dc_i.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._margins import forms, proof
from lipbounds._margins.search import Item, Multipliers, Neurons, steps_of
from lipbounds._norms.factorised import positive_inverse, solve_lower

_CLASSES = 8  # numbers of neurons between two powers of 2 for which programs are compiled
_FEWEST = 32


class Merged(NamedTuple):
    """d = G_u u + G_w w of n neurons, and the change O_u u + O_w w of the outputs; items have one tap."""

    G_u: Any
    G_w: Any
    O_u: Any
    O_w: Any

    def minimum(self, item: Item, m: Multipliers) -> tuple[Any, tuple[Any, tuple[Any, ...]], Any]:
        """As `search.Network.minimum`; derivatives are those of the barrier alone."""
        step = steps_of(item.taps[0], m.taps[0])
        weight = m.ball + m.box
        stop = jax.lax.stop_gradient
        c, N, over, a, g, constant, fixed = stop(
            (step.c, step.N, step.over, step.a, step.g, step.constant, weight)
        )
        centre = stop(m.box) * (item.low + item.high) / (2 * fixed)
        lower = jnp.eye(len(c), dtype=c.dtype) - self.G_w * c
        M_u, M_w = solve_lower(lower, self.G_u), solve_lower(lower, self.G_w)
        sigma = (M_u / fixed) @ M_u.T + (M_w * over) @ M_w.T
        root = jnp.sqrt(N)
        P, log_det = positive_inverse(jnp.eye(len(c), dtype=c.dtype) - root[:, None] * sigma * root)
        # the minimum, first without -N d^2
        o_u, o_w = item.aim @ self.O_u, item.aim @ self.O_w
        bent, linear = g + c * o_w, o_w + a

        def at(k: Any) -> tuple[Any, Any]:
            """(u, e) where the quadratic of P with the linear terms and k' d is least."""
            u = centre - (o_u + M_u.T @ k) / (2 * fixed)
            return u, -over * (linear + M_w.T @ k) / 2

        u, e = at(bent)
        d = M_u @ u + M_w @ e
        total = -stop(m.ball) * item.eps**2 + stop(m.box) @ (item.low * item.high) + constant
        total = total - fixed @ jnp.square(centre) + o_u @ centre + bent @ (M_u @ centre)
        pulled = linear + M_w.T @ bent
        total = total - (jnp.square(o_u + M_u.T @ bent) @ (1 / fixed) + over @ jnp.square(pulled)) / 4
        t = root * d
        Pt = P @ t
        total = total - t @ Pt
        u, e = at(bent - 2 * root * Pt)
        w = c * (M_u @ u + M_w @ e) + e
        F = root[:, None] * P * root
        FM_u, FM_w, SF = F @ M_u, F @ M_w, sigma @ F
        barrier = log_det
        slopes = (
            (step.N, -(sigma.diagonal() + jnp.einsum("ij,ji->i", SF, sigma))),
            (weight, jnp.einsum("ij,ij->j", M_u, FM_u) / jnp.square(fixed)),
            # with 1 / P in the place of P, which is 0 where no neuron is
            (step.over, -jnp.einsum("ij,ij->j", M_w, FM_w)),
            (step.c, -2 * jnp.einsum("ij,ji->i", sigma, FM_w)),
        )
        for value, slope in slopes:
            barrier = barrier + stop(slope) @ (value - stop(value))  # 0, with this derivative
        return total, (u, (w,)), barrier

    def moves(self, item: Item, u: Any, ws: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
        """As `search.Network.moves`."""
        w = jnp.where(item.taps[0].open > 0, ws[0], 0.0)
        d = self.G_u @ u + self.G_w @ w
        return (w,), (d,), item.aim @ (self.O_u @ u + self.O_w @ w)


def padded(n: int) -> int:
    """The number of neurons, raised to one for which a program may exist."""
    step = max(_FEWEST, 2 ** max(n - 1, 1).bit_length() // (2 * _CLASSES))
    return -(-max(n, 1) // step) * step


def operations(n: int, inputs: int) -> float:
    """Of one evaluation for n neurons, about."""
    n = padded(n)
    return 10.0 * n**3 + 5.0 * n * n * inputs


def footprint(n: int, inputs: int) -> int:
    """Bytes of a search for one margin, in float32."""
    n = padded(n)
    return 4 * (10 * n * n + 4 * n * inputs)


def network(gain: proof.Gain, dtype: Any = np.float32) -> Merged:
    """The linear map of one ball, padded by neurons without any effect."""
    n, d = len(gain.tap), gain.inputs
    rows, columns = (0, padded(n) - n), (0, 0)
    return Merged(
        *(
            np.pad(part.astype(dtype), widths)
            for part, widths in (
                (gain.G[:, :d], (rows, columns)),
                (gain.G[:, d:], (rows, rows)),
                (gain.O[:, :d], (columns, columns)),
                (gain.O[:, d:], (columns, rows)),
            )
        )
    )


def merge(item: Item, x: Multipliers) -> tuple[Item, Multipliers]:
    """An item and its parameters with one tap: the open neurons of all, then padding."""
    at = [np.flatnonzero(n.open) for n in item.taps]
    count = sum(rows.size for rows in at)
    spare = padded(count) - count
    most = max((len(own) for own in x.taps), default=forms.FEWEST)
    ones = np.ones(spare)
    rest = np.zeros(spare)
    nothing = Neurons(
        rest, rest, rest, rest, rest, rest, ones, forms.padded(forms.of_relu(ones, ones), most), rest
    )

    def joined(parts: list[Any], last: np.ndarray) -> np.ndarray:
        some = [np.asarray(part)[..., rows] for part, rows in zip(parts, at, strict=True)]
        return np.concatenate([*some, last], axis=-1)

    taps = [n._replace(forms=forms.padded(n.forms, most)) for n in item.taps]
    one = Neurons(*(joined([n[i] for n in taps], last) for i, last in enumerate(nothing)))
    own = joined([forms.padded(own, most) for own in x.taps], np.zeros((most, spare)))
    return item._replace(taps=(one,)), x._replace(taps=(own,))
