"""Values that are known and not tracers of jax, and the device where they are computed on the host."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import jax


def is_concrete(value: Any) -> bool:
    """False for a tracer."""
    return not isinstance(value, jax.core.Tracer)


def on_host() -> AbstractContextManager[None]:
    """The CPU as the default device, on whose arithmetic proofs rest; ValueError where JAX was started without one."""
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:
        raise ValueError(
            "proofs are computed on the host, and JAX was started without a CPU device: set JAX_PLATFORMS=cuda,cpu "
            "in place of cuda alone, or leave it unset"
        ) from None
