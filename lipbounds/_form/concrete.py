"""Whether a value is known, or a tracer of jax."""

from __future__ import annotations

from typing import Any

import jax


def is_concrete(value: Any) -> bool:
    """False for a tracer."""
    return not isinstance(value, jax.core.Tracer)
