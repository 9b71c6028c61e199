"""Certification on several devices of one process gives what one device gives."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from balls import mlp, values

import lipbounds as lb
from lipbounds._margins import found, search
from lipbounds._text import device, progress

SCRIPT = """
import sys

import jax
import numpy as np
from balls import mlp, values

import lipbounds as lb
from lipbounds._local import engines
from lipbounds._margins import search
from lipbounds._text import device

count = int(sys.argv[1])
assert len(jax.local_devices()) == 2 and len(device.sharing()) == 2
seen = {}


def noted(module, name):
    inner = getattr(module, name)

    def outer(*args, **kwargs):
        found = inner(*args, **kwargs)
        leaf = jax.tree.leaves(found)[0]
        seen.setdefault(name, set()).update(leaf.devices() if isinstance(leaf, jax.Array) else ())
        return found

    setattr(module, name, outer)


for module, name in ((search, "improve"), (engines.liplt, "_rows")):
    noted(module, name)

form = mlp((6, 12, 10, 3))
rng = np.random.default_rng(0)
x = rng.normal(size=(count, 6))
y = values(form, x).argmax(axis=1)


def all_of():
    engines.TAIL, engines._SIDE = 1100, 64
    margins = lb.margins(form, x[:4], y[:4], 0.3, iterations=50, progress=False)
    engines.TAIL, engines._SIDE = 0, 4  # every network is wide: hybrid and local LipLT, chunks of 4
    radii = lb.certified_radius(form, x, y, local=lb.Local(tries=1), progress=False)
    engines.TAIL = 1100
    near = lb.Local(seconds_per_image=0.3)
    at = lb.certified_radius(form, x[:4], y[:4], local=near, eps=0.5, progress=False)
    return margins, radii, at


many = all_of()
assert seen == {"improve": set(jax.local_devices()), "_rows": set(jax.local_devices())}, seen
seen.clear()
with jax.default_device(jax.local_devices()[1]):
    assert device.sharing() == (jax.local_devices()[1],)
    one = all_of()
assert seen == {"improve": {jax.local_devices()[1]}, "_rows": {jax.local_devices()[1]}}, seen
np.testing.assert_allclose(many[0].value, one[0].value, rtol=1e-9, atol=1e-9)
np.testing.assert_array_equal(many[1].radius, one[1].radius)
assert many[1].counts == one[1].counts and many[1].notes == one[1].notes
np.testing.assert_array_equal(many[2].radius, one[2].radius)
print("same", many[0].certified.tolist(), many[1].counts, many[2].counts)
"""


def test_work_on_each_device_has_the_settings_of_its_caller(monkeypatch):
    assert device.sharing() == tuple(jax.local_devices())
    with jax.default_device(jax.local_devices()[0]):
        assert device.sharing() == (jax.local_devices()[0],)
    monkeypatch.setattr(device, "sharing", lambda: tuple(2 * jax.local_devices()))
    waiting, seen = device.Shared(range(20)), []

    def work():
        for item in waiting:
            alone = jax.config.jax_default_device is jax.local_devices()[0]
            seen.append((item, alone, jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision))

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        device.on_each(work)
    assert sorted(seen) == [(item, True, True, "highest") for item in range(20)]


@pytest.mark.slow
def test_jobs_are_shared_by_threads(monkeypatch):
    """One device in place of two: two threads take the margins, and find what one finds."""
    form, x = mlp((6, 12, 10, 3)), np.random.default_rng(0).normal(size=(3, 6))
    y, seen = values(form, x).argmax(axis=1), set()
    inner = search.improve

    def improve(*args, **options):
        seen.add(threading.get_ident())
        return inner(*args, **options)

    monkeypatch.setattr(search, "improve", improve)
    one = lb.margins(form, x, y, 0.3, iterations=25, progress=False)
    assert seen == {threading.get_ident()}
    seen.clear()
    twice = tuple(2 * jax.local_devices())
    monkeypatch.setattr(device, "sharing", lambda: twice)
    monkeypatch.setattr(found, "sharing", lambda: twice)
    two = lb.margins(form, x, y, 0.3, iterations=25, progress=False)
    assert len(seen) == 2 and threading.get_ident() not in seen
    np.testing.assert_array_equal(one.value, two.value)


def test_an_error_on_one_device_ends_the_others(monkeypatch):
    monkeypatch.setattr(device, "sharing", lambda: tuple(2 * jax.local_devices()))
    waiting, long = device.Shared(range(2)), threading.Event()

    def work():
        if next(waiting):
            raise ValueError("the reason")
        for _ in range(3000):
            progress.alive()
            long.wait(0.01)

    with pytest.raises(ValueError, match="the reason"):
        device.on_each(work)


@pytest.mark.slow
def test_two_devices_certify_what_one_does():
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *sys.path])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "8"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("same"), done.stdout
