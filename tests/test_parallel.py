"""Training on several devices and in several processes gives what one device gives, to rounding."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from lipbounds.training import parallel
from lipbounds.training.config import Config
from lipbounds.training.loop import Fitted, fit
from lipbounds.training.runs import BEST, open_run
from lipbounds.training.watch import FIGURES

FIELDS: dict[str, Any] = {
    "loss": "crm",
    "constants": "liplt",
    "arch": "64-10",
    "batch_size": 128,
    "epochs": 4,
    "warmup": 1,
    "ramp": 2,
    "initialisation": "unit",
    "learning_rate": 5e-3,
    "validate_every": 2,
    "eps": 0.05,
    "flip": True,  # random numbers are drawn for the whole batch, so they do not depend on how it is spread
    "average": "ema",
}
CLOSE = 1e-4  # relative to the largest weight: Adam's first steps magnify rounding


def start(script: str, *arguments: Any, devices: int = 1) -> subprocess.Popen[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env={**env, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    said = []
    try:
        for process in processes:
            said.append(process.communicate(timeout=240)[0])
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return said


@pytest.fixture(scope="module")
def alone() -> Fitted:
    return fit(Config(**FIELDS), devices=parallel.devices(1))


def check_close(folder: pathlib.Path, alone: Fitted) -> None:
    run = open_run(folder)
    found, wanted = ([np.asarray(a) for a in jax.tree.leaves(nnx.state(m))] for m in (run.model, alone.model))
    for a, b in zip(found, wanted, strict=True):
        assert np.abs(a - b).max() <= CLOSE * np.abs(b).max()
    for a, b in zip(run.log, alone.log, strict=True):
        assert set(a) == set(b) and a["epoch"] == b["epoch"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("certified") == pytest.approx(b.get("certified"), abs=0.003)
        for name in FIGURES:
            assert a[name] == pytest.approx(b[name], rel=1e-2, abs=0.003), name


FOUR = """
    import json, sys
    import jax
    from lipbounds.training import parallel
    from lipbounds.training.config import Config
    from lipbounds.training.loop import fit

    fields = json.loads(sys.argv[2])
    assert len(jax.devices()) == 4
    try:
        fit(Config(**fields | {"batch_size": 126}))
    except ValueError as error:
        print(error)
    devices = parallel.devices()
    seen = []
    spread = parallel.Devices.spread
    parallel.Devices.spread = lambda self, rows: seen.append(rows.shape) or spread(self, rows)
    found = fit(Config(**fields), out=sys.argv[1])
    assert devices.count == 4 and seen
"""


@pytest.mark.slow
def test_four_devices_give_what_one_gives(tmp_path: pathlib.Path, alone: Fitted) -> None:
    (said,) = finish(start(FOUR, tmp_path / "run", json.dumps(FIELDS), devices=4))
    assert "batch_size 126 cannot be spread over 4 devices: choose a multiple of 4" in said
    check_close(tmp_path / "run", alone)


SHARES = """
    import jax, numpy as np
    from lipbounds.training import parallel

    devices = parallel.devices()
    rows = devices.put(np.arange(24.0).reshape(8, 3))
    assert rows.dtype == np.float64 and rows.sharding.is_fully_replicated
    assert devices.put(np.float32(1)).dtype == np.float32
    out = jax.jit(lambda a: devices.spread(a) * 2)(devices.put(np.arange(24, dtype=np.float32).reshape(8, 3)))
    assert [s.data.shape for s in out.addressable_shards] == [(2, 3)] * 4, out.sharding
    assert parallel.devices(2).count == 2
    print("fine")
"""


def test_rows_are_spread_and_the_rest_is_not() -> None:
    assert finish(start(SHARES, devices=4)) == ["fine\n"]


TWO = """
    import json, sys
    from lipbounds.training import parallel

    address, index, folder, fields, epoch = sys.argv[1:]
    parallel.join(address, 2, int(index))

    import jax
    from lipbounds.training.config import Config
    from lipbounds.training.loop import fit, resume

    assert jax.process_count() == len(jax.devices()) == 2 and parallel.devices().leads == (index == "0")

    class Stop(Exception):
        pass

    def stop(record):
        if record["epoch"] == int(epoch):
            raise Stop

    try:
        found = resume(folder) if fields == "resume" else fit(Config(**json.loads(fields)), out=folder, progress=stop)
        print("done", len(found.log), float(jax.tree.leaves(found.state.weights)[0].sum()))
    except Stop:
        print("stopped")
"""


def two(folder: pathlib.Path, fields: str, epoch: int) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # process 1 first: it must not spoil the folder that process 0 is about to make
    said = finish(*[start(TWO, address, index, folder, fields, epoch) for index in (1, 0)])
    return [text.strip().splitlines()[-1] for text in said]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: pathlib.Path, alone: Fitted) -> None:
    folder = tmp_path / "run"
    one, other = two(folder, json.dumps(FIELDS), 9)
    assert one == other and one.startswith("done 4 ")
    check_close(folder, alone)
    assert os.listdir(tmp_path) == ["run"]
    assert {*os.listdir(folder), BEST} == {
        "checkpoints",
        "config.json",
        "log.jsonl",
        "model.safetensors",
        BEST,
    }
    assert {"3", "4"} <= set(os.listdir(folder / "checkpoints"))  # and the best one


@pytest.mark.slow
@pytest.mark.parametrize("constants", ["liplt", "recursion"])
def test_two_processes_resume(tmp_path: pathlib.Path, constants: str) -> None:
    config = Config(**FIELDS | {"constants": constants, "arch": "64-8-10"})
    whole = fit(config)
    assert two(tmp_path / "run", json.dumps(config.to_json()), 2) == ["stopped", "stopped"]
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["1", "2"]
    one, other = two(tmp_path / "run", "resume", 0)
    assert one == other and one.startswith("done 4 ")
    check_close(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "given",
    [("h:1", 2, None), ("h:1", None, 0), (None, 2, 0), ("h:1", 2, 2), ("h:1", 2, -1), (None, None, 0)],
)
def test_joining_needs_all_three(given: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ValueError, match="need all of coordinator"):
        parallel.join(*given)


def test_no_coordinator_is_one_process() -> None:
    parallel.join(None, None, None)
    assert jax.process_count() == 1
