"""Ensembles: the mean of several networks' logits, as one network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx


class Ensemble(nnx.Module):
    """f(x) = mean over the members of f_k(x), logits (B, K).

    A norm of a mean is at most the mean of the norms, so L <= mean of L_k. Members that are equal are one of them.

    Raises:
        ValueError: no members.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        if not members:
            raise ValueError("an ensemble needs at least one network")
        self.members = nnx.List(members)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mean logits of a batch."""
        total = self.members[0](x)
        for member in self.members[1:]:
            total = total + member(x)
        return total / len(self.members)
