"""What tells a program from one of the same function that closed over something else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def seen(traced: Any) -> bytes:
    """Digest of a traced program (a closed jaxpr) and of the arrays and numbers that it holds.

    `jax.jit` knows a function by its identity alone: where this digest is a static argument, too, what is compiled is
    not used again once the function closes over other values.
    """
    digest = hashlib.blake2b(re.sub("0x[0-9a-f]+", "", str(traced)).encode())  # without addresses
    for value in _constants(traced):
        key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        digest.update(np.asarray(jax.random.key_data(value) if key else value).tobytes())
    return digest.digest()


def _constants(jaxpr: Any) -> Iterator[Any]:
    """The arrays that a program and the programs inside it hold."""
    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns"):
                    yield from _constants(inner)
