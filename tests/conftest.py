"""Settings shared by every test: CPU, strict dtype promotion, and a check that nobody turned float64 on."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of small programs that run once: skip the optimiser.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import pathlib
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


_MAPS = pathlib.Path("/proc/self/maps")
_MANY = 30_000  # of the 65 530 memory maps that Linux allows a process; every compiled program holds some
_done = 0


def pytest_runtest_teardown() -> None:
    """Drop compiled programs before a worker has so many that XLA cannot map another one and aborts."""
    global _done
    _done += 1
    if _done % 20 == 0 and _MAPS.exists():
        with _MAPS.open("rb") as file:
            maps = sum(1 for _ in file)
        if maps > _MANY:
            jax.clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
