"""What a new user meets: a fresh environment and every door, and the first radius of a convolutional ONNX file."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import new_user
import numpy as np
import pytest


@pytest.mark.slow
def test_every_door_in_a_fresh_environment() -> None:
    done = subprocess.run([sys.executable, new_user.__file__], capture_output=True, text=True, check=False)
    if done.returncode == new_user.NO_INDEX:
        pytest.skip("pip cannot install the package and what it needs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == len(new_user.doors()) - len(new_user.LARGE)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
def test_first_radii_of_a_convolutional_onnx_file(stride: int, tmp_path: pathlib.Path) -> None:
    """Eight images in 60 CPU seconds, so in 30 seconds on two cores, with nothing compiled before."""
    onnx = pytest.importorskip("onnx")
    from onnx_nets import Net

    net, side = Net(("N", 3, 32, 32)), 32 // stride**2
    h = net.Relu(net.conv("x", 16, 3, strides=[stride] * 2))
    h = net.Relu(net.conv(h, 32, 16, strides=[stride] * 2))
    h = net.Relu(net.Gemm(net.Flatten(h), net.w(64, 32 * side**2), net.w(64), transB=1))
    onnx.save(net.done(net.Gemm(h, net.w(10, 64), net.w(10), transB=1)), tmp_path / "net.onnx")
    x = np.random.default_rng(0).random((8, 3, 32, 32), np.float32)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(8))
    command = [sys.executable, "-m", "lipbounds", "certify", "net.onnx", "--data", "mine.npz"]
    usual = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    before = new_user.spent()
    done = subprocess.run(
        [*command, "--eps", "0.01"],
        cwd=tmp_path,
        env={**usual, "LIPBOUNDS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--method lipsdp is tighter" in done.stderr and "by liplt, verified" in done.stdout
    assert "verified, 8 images, l2" in done.stdout
    assert new_user.spent() - before < 60
