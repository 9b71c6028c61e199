"""The settings of JAX under which this library computes, whatever the user has set to debug own code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax


@contextmanager
def debugging_off() -> Iterator[None]:
    """Without JAX's settings for debugging inside, in this thread: every thread has its own.

    NaN and infinity, which searches leave out, are no errors; arrays of different ranks broadcast, and arrays move
    between host and device. The precision of products is the user's, so that functions of the user can be traced.
    """
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield


@contextmanager
def usual_settings() -> Iterator[None]:
    """Compute with JAX's default settings inside: `debugging_off`, with products, programs and random numbers as usual.

    Products in the precision of their operands: with a preset such as "BF16_BF16_F32" even float64 operands would be
    rounded to bfloat16. Functions are compiled, and a seed gives the same random numbers for every user.
    """
    with ExitStack() as stack:
        for setting in (
            debugging_off(),
            jax.default_matmul_precision("highest"),
            jax.disable_jit(False),
            jax.default_prng_impl("threefry2x32"),
            jax.threefry_partitionable(True),
        ):
            stack.enter_context(setting)
        yield


@contextmanager
def usual_jax() -> Iterator[None]:
    """`usual_settings`, and arrays are computed at once, also while a function of the user is being traced."""
    with usual_settings(), jax.ensure_compile_time_eval():
        yield
