"""Floating point formats: which of them a cast of x may pass through, taken as real arithmetic."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np


def half_or_wider(dtype: np.dtype) -> bool:
    """Whether a format has at least the exponent and mantissa bits of bfloat16 or those of float16."""
    info = jnp.finfo(dtype)
    return keeps_half(int(info.nexp), int(info.nmant))


def keeps_half(exponent_bits: int, mantissa_bits: int) -> bool:
    """At least as wide as bfloat16 (8, 7) or float16 (5, 10)."""
    return (exponent_bits >= 8 and mantissa_bits >= 7) or (exponent_bits >= 5 and mantissa_bits >= 10)
