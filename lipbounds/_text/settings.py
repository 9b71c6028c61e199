"""The settings of JAX under which this library computes, whatever the user has set to debug own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax


@contextmanager
def usual_jax() -> Iterator[None]:
    """Compute with JAX's default settings inside, in this thread: every thread has its own.

    Products in the precision of their operands: with a preset such as "BF16_BF16_F32" even float64 operands would be
    rounded to bfloat16. NaN and infinity, which searches leave out, are no errors; arrays of different ranks broadcast;
    functions are compiled, and arrays move between host and device. Arrays are computed at once, also while a function
    of the user is being traced.
    """
    with ExitStack() as stack:
        for setting in (
            jax.default_matmul_precision("highest"),
            jax.debug_nans(False),
            jax.debug_infs(False),
            jax.numpy_rank_promotion("allow"),
            jax.disable_jit(False),
            jax.transfer_guard("allow"),
            jax.ensure_compile_time_eval(),
        ):
            stack.enter_context(setting)
        yield
