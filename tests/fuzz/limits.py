"""Sizes from which the library goes other ways, lowered, so that small programs go the ways of wide networks, too."""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from lipbounds._norms import device as proofs
from lipbounds._text import device as places

#: Module, name, and the values that stand in for the usual one.
LIMITS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("_lipsdp.state_matrices", "TAIL", (0, 1, 2, 4)),
    ("_lipsdp.search", "DENSE", (0, 3)),
    ("_lipsdp.search", "_MANY_BLOCKS", (0, 2)),
    ("_lipsdp.wide_arithmetic", "_COLUMNS", (1, 3)),
    ("_triangle.recursion", "DENSE_LIMIT", (1, 3)),
    ("_triangle.recursion", "_WORTH_A_LOOK", (0.0,)),
    ("_triangle.scaling", "_GRAM_LIMIT", (0, 3)),
    ("_triangle.formed_blocks", "LOOSE", (-1.0, 1e-15)),
    ("_triangle.formed_blocks", "_HASHED", (0, 6)),
    ("_triangle.output_rows", "_CHUNK", (1, 2)),
    ("_gain.step_matrices", "_APPLIED", (0,)),
    ("_gain.step_matrices", "_VERIFY_STEP", (0, 3)),
    ("_gain.step_matrices", "_FULL", (0.0, 1.0)),
    ("_gain.wide_blocks", "_MANY", (0,)),
    ("_gain.wide_blocks", "WIDEST_CUT", (0, 2)),
    ("_gain.convolution", "_CHUNK", (1, 8)),
    ("_gain.device_blocks", "_PADDED", (0.0, 1e9)),
    ("_gain.device_blocks", "_FEW", (1,)),
    ("_norms.cholesky", "BLOCK", (1, 2, 3)),
    ("_norms.cholesky", "_SMALL", (0,)),
    ("_norms.cholesky", "_EXACT_EIGENVALUES", (0,)),
    ("_norms.cholesky", "SPARSE_FLOPS", (1e30, 1e-30)),
    ("_norms.banded_cholesky", "LEAST", (0, 2)),
    ("_norms.banded_cholesky", "_MARGIN", (0.0,)),
    ("_norms.schur", "_ROWS", (1, 2)),
    ("_norms.schur", "_SQUARE", (2, 4)),
    ("_norms.matrices", "_CHUNK", (1, 8)),
    ("_norms.matrices", "_MANY_DIFFERENCES", (0.0,)),
    ("_norms.matrices", "_MOST_CLOSE", (0, 1)),
    ("_norms.fourier", "_CHUNK", (1, 8)),
    ("_norms.device_lanczos", "_SMALL", (16,)),
    ("_local.engines", "_CHUNK", (1, 40)),
    ("_local.engines", "_SINGLE", (0,)),
    ("_local.engines", "_WORK", (0,)),
    ("_local.maps", "_DENSE", (0,)),
    ("_local.maps", "_SPARE", (0.0, 1.0)),
    ("_local.maps", "_TILE", (1, 2)),
    ("_local.forward", "_CHUNK", (1, 20)),
    ("_local.multipliers", "_EXACT", (0,)),
    ("_margins.found", "_SMALL", (0,)),
    ("_margins.blocks", "_WORK", (1,)),
)


#: The CPU in the place of an accelerator.
ON_DEVICE: tuple[str, str, Any] = ("_text.device", "accelerator", "cpu")

Limits = tuple[tuple[str, str, Any], ...]


def drawn(rng: random.Random, share: float = 0.3) -> Limits:
    """Each of the limits with this chance, and with the same chance the CPU in the place of an accelerator."""
    chosen = [(room, name, rng.choice(values)) for room, name, values in LIMITS if rng.random() < share]
    return (*chosen, *([ON_DEVICE] if rng.random() < share else []))


@contextlib.contextmanager
def lowered(limits: Limits) -> Iterator[None]:
    """The library with these limits, in every module that holds them."""
    with contextlib.ExitStack() as stack:
        for room, name, value in limits:
            if (room, name, value) == ON_DEVICE:
                stack.enter_context(_on_device())
            else:
                stack.enter_context(_set(room, name, value))
        yield


@contextlib.contextmanager
def _set(room: str, name: str, value: Any) -> Iterator[None]:
    usual = getattr(importlib.import_module(f"lipbounds.{room}"), name)
    with contextlib.ExitStack() as stack:
        for module in [m for n, m in sys.modules.items() if n.startswith("lipbounds.")]:
            if vars(module).get(name) is usual:
                stack.enter_context(mock.patch.object(module, name, value))
        yield


@contextlib.contextmanager
def _on_device() -> Iterator[None]:
    def accelerator(choice: Any) -> Any:
        return jax.devices("cpu")[0] if choice != "cpu" else None

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(places, "accelerator", accelerator))
        for name, value in (("TILE", 4), ("SMALLEST", 1), ("_FASTER", np.inf), ("_passed", {})):
            stack.enter_context(mock.patch.object(proofs, name, value))
        yield
