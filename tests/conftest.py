"""Settings shared by every test: CPU, strict dtype promotion, and a check that nobody turned float64 on."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of small programs that run once: skip the optimiser.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


_CACHE = "JAX_COMPILATION_CACHE_DIR"
_own_cache: str | None = None


def pytest_configure() -> None:
    """Share compiled programs between tests, workers and commands: many compile the same small ones.

    Set JAX_COMPILATION_CACHE_DIR to keep them from one run to the next, which takes less than half the time.
    """
    global _own_cache
    if _CACHE not in os.environ:
        _own_cache = os.environ[_CACHE] = tempfile.mkdtemp(prefix="lipbounds-tests-")
    for name, value in (("MIN_COMPILE_TIME_SECS", 0), ("MIN_ENTRY_SIZE_BYTES", -1)):
        os.environ[f"JAX_PERSISTENT_CACHE_{name}"] = str(value)
        jax.config.update(f"jax_persistent_cache_{name.lower()}", value)
    jax.config.update(_CACHE.lower(), os.environ[_CACHE])


def pytest_unconfigure() -> None:
    if _own_cache is not None:  # not in a worker, which inherits the variable
        shutil.rmtree(_own_cache, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # before pytest drops the slow tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``sampled(k)``: every k-th set of parameters of a test runs by default, the others are slow tests."""
    turns: dict[str, int] = {}
    for item in items:
        for mark in item.iter_markers("sampled"):
            test = item.nodeid.partition("[")[0]
            turn = turns[test] = turns.get(test, -1) + 1
            if turn % mark.args[0]:
                item.add_marker(pytest.mark.slow)


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


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small network trained on digits, as a file that the commands take."""
    from command import SPEC

    from lipbounds.training import Config, fit
    from lipbounds.training.data import digits
    from lipbounds.training.models import build
    from lipbounds.training.store import save_model

    settings = {"batch_size": 128, "learning_rate": 5e-3, "schedule": "constant", "validate_every": 0}
    plain = Config.from_json({"loss": "cross-entropy", "epochs": 6, **settings})
    model = fit(plain, digits(), model=build(SPEC)).model
    return save_model(tmp_path_factory.mktemp("model") / "tiny.safetensors", model, SPEC)


@pytest.fixture(scope="session")
def form(model_file: pathlib.Path) -> Any:
    """The form of `model_file`."""
    import lipbounds as lb
    from lipbounds.training.store import load_model

    model, spec = load_model(model_file)
    return lb.trace(model, np.zeros(spec.input_shape, np.float32))


@pytest.fixture
def official() -> Callable[[Callable[[], Any]], Any]:
    """Read a data set from its official files; the test is skipped where they are not."""

    def read(reader: Callable[[], Any]) -> Any:
        try:
            return reader()
        except FileNotFoundError as reason:
            pytest.skip(f"needs the files of {reader.__name__}: {reason}")

    return read
