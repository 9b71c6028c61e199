"""The settings of JAX under which this library computes, whatever the user has set to debug own code."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_home: int | None = None  # the process in which this library first computed


def _refuse_forks() -> None:
    """RuntimeError in a process that was forked from one that had computed: JAX's threads are not there.

    Most computations would wait for them for ever.
    """
    global _home
    here = os.getpid()
    _home = _home or here
    if here != _home:
        raise RuntimeError(
            "this process was forked from one in which JAX had computed, so that JAX lacks its threads here and would "
            'wait for ever: start processes by multiprocessing.get_context("spawn"), or fork before the first call of '
            "lipbounds"
        )


@contextmanager
def debugging_off() -> Iterator[None]:
    """Without JAX's settings for debugging inside, in this thread: every thread has its own.

    NaN and infinity, which searches leave out, are no errors; arrays of different ranks broadcast, and arrays move
    between host and device. The precision of products is the user's, so that functions of the user can be traced.
    RuntimeError in a forked process, where JAX cannot compute.
    """
    _refuse_forks()
    with (
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.numpy_rank_promotion("allow"),
        jax.transfer_guard("allow"),
    ):
        yield


@contextmanager
def usual_programs() -> Iterator[None]:
    """`debugging_off`; functions are compiled inside, and a seed gives the same random numbers for every user."""
    with (
        debugging_off(),
        jax.disable_jit(False),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
    ):
        yield


@contextmanager
def usual_settings() -> Iterator[None]:
    """Compute with JAX's default settings inside: `usual_programs`, and products in the precision of their operands.

    With a preset such as "BF16_BF16_F32" even float64 operands would be rounded to bfloat16.
    """
    with usual_programs(), jax.default_matmul_precision("highest"):
        yield


@contextmanager
def usual_jax() -> Iterator[None]:
    """`usual_settings`, and arrays are computed at once, also while a function of the user is being traced."""
    with usual_settings(), jax.ensure_compile_time_eval():
        yield
