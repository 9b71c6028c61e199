"""Floating-point formats that x may pass through, and what errors and notes say about them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def half_or_wider(dtype: Any) -> bool:
    """Whether a format has at least the exponent and mantissa bits of bfloat16 or those of float16."""
    info = jnp.finfo(dtype)
    return keeps_half(int(info.nexp), int(info.nmant))


def keeps_half(exponent_bits: int, mantissa_bits: int) -> bool:
    """At least as wide as bfloat16 (8, 7) or float16 (5, 10)."""
    return (exponent_bits >= 8 and mantissa_bits >= 7) or (exponent_bits >= 5 and mantissa_bits >= 10)


def below_single(dtype: Any) -> bool:
    """Whether a format is narrower than float32."""
    return int(jnp.finfo(dtype).bits) < 32


TOO_NARROW = (
    "x is rounded to {name}, which is coarser than float16 and bfloat16: the output moves in visible steps, "
    "and a bound for real arithmetic would not hold for this program",
    "keep everything that depends on x in bfloat16, float16 or wider (narrow weights are fine: they are constants)",
)


def half_note(formats: tuple[str, ...]) -> tuple[str, ...]:
    """The note on a bound of a network that computes in these formats."""
    if not formats:
        return ()
    return (
        f"x passes through {' and '.join(formats)}: the bound is for the network in real arithmetic, "
        "not for these roundings",
    )
