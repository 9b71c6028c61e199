"""Settings shared by every test: CPU, strict dtype promotion, and a check that nobody turned float64 on."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of small programs that run once: skip the optimiser.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from collections.abc import Iterator

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def _global_float64_stays_off() -> Iterator[None]:
    """No verb may leave ``jax_enable_x64`` on: the setting belongs to the user."""
    yield
    assert not jax.config.jax_enable_x64, "jax_enable_x64 was left on"


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
