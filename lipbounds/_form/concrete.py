"""Whether a value is concrete, what is computed from such values, and the CPU device on which proofs are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax


def is_concrete(value: Any) -> bool:
    """Whether a value is concrete rather than a tracer of jax."""
    return not isinstance(value, jax.core.Tracer)


def at_once(*values: Any) -> AbstractContextManager[None]:
    """Compute at once what follows from concrete values, inside jit, grad and vmap too; nothing where one is a tracer.

    Otherwise an index or a mask that a function computes from constants would become a tracer there.
    """
    return jax.ensure_compile_time_eval() if all(map(is_concrete, values)) else nullcontext()


def on_host() -> AbstractContextManager[None]:
    """Make the CPU the default device, since proofs rely on its arithmetic; ValueError if JAX has no CPU device."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        raise ValueError(
            "proofs are computed on the host, and JAX was started without a CPU device: set JAX_PLATFORMS=cuda,cpu "
            "in place of cuda alone, or leave it unset"
        ) from None
