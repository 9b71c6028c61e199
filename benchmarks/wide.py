"""Networks whose layers are too wide for one dense proof: time, memory and guarantee of naive and LipLT.

    python benchmarks/wide.py                     the networks at full size
    python benchmarks/wide.py --small             the same at about a sixteenth of the neurons
    python benchmarks/wide.py --nets drone        only these

Four kinds, after networks that people verify, with random weights of He's variance:

    cifar      7 convolutions and dense layers on a CIFAR image, 45 056 neurons
    generator  5 inputs, transposed convolutions to an image of 64 x 64 and a discriminator, 56 321 neurons
    drone      200 x 200 pixels, a max-pool and three residual blocks, 227 841 neurons
    detector   52 x 52 pixels, residual blocks, 13 x 13 x 125 = 21 125 outputs

Every row is a process of its own, so that its peak memory is its own. CPU time is that of all threads, user and system.
Tables and figures go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from common import Json, command_line, environment, in_a_process, keep, peak_gigabytes, table
from jax import lax, nn
from rich.console import Console

import lipbounds as lb

Network = Callable[[Any], Any]


class Weights:
    """Kernels of He's variance, one after another from one generator."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        """A kernel (*window, in, out), or a matrix (in, out)."""
        fan_in = int(np.prod(shape[:-1]))
        return (self.rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    def scales(self, channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Factors and offsets of a BatchNorm."""
        factors = 1 + 0.2 * self.rng.standard_normal(channels)
        return factors.astype(np.float32), (0.1 * self.rng.standard_normal(channels)).astype(np.float32)


def conv(x: Any, kernel: np.ndarray, stride: int = 1, padding: str = "SAME") -> Any:
    """A convolution of one image (height, width, channels)."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], kernel, (stride,) * 2, padding, dimension_numbers=numbers)[0]


def conv_transpose(x: Any, kernel: np.ndarray) -> Any:
    """A transposed convolution that doubles height and width."""
    return lax.conv_transpose(x[None], kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


def average(x: Any) -> Any:
    """Means over windows of 2 x 2."""
    window = (2, 2, 1)
    return lax.reduce_window(x, np.float32(0), lax.add, window, window, "VALID") * np.float32(0.25)


def cifar(part: int = 1) -> tuple[Network, tuple[int, ...]]:
    """Convolutions (stride): 16, 16, 32 (2), 32 (2), 16; dense: 1024, 10; or a part of the side and the dense width."""
    w, side = Weights(), 32 // part
    plan = ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 2), (32, 16, 1))
    kernels = [w(3, 3, a, b) for a, b, _ in plan]
    first, last = w(16 * (side // 4) ** 2, 1024 // part**2), w(1024 // part**2, 10)

    def network(x: Any) -> Any:
        for kernel, (_, _, stride) in zip(kernels, plan, strict=True):
            x = nn.relu(conv(x, kernel, stride))
        return nn.relu(x.ravel() @ first) @ last

    return network, (side, side, 3)


def generator(part: int = 1) -> tuple[Network, tuple[int, ...]]:
    """Dense 2048; transposed convolutions 64, 32, 16, 1 (tanh); convolutions 14, 16, 32, 64 of stride 2; one output."""
    w = Weights()
    start = 4 // part
    dense, up = w(5, start * start * 128), (128, 64, 32, 16, 1)
    kernels = [w(4, 4, a, b) for a, b in itertools.pairwise(up)]
    down = (1, 14, 16, 32, 64)
    back = [w(4, 4, a, b) for a, b in itertools.pairwise(down)]
    score = w(start * start * 64, 1)

    def network(z: Any) -> Any:
        x = nn.relu(z @ dense).reshape(start, start, 128)
        for kernel in kernels[:-1]:
            x = nn.relu(conv_transpose(x, kernel))
        x = jax.numpy.tanh(conv_transpose(x, kernels[-1]))
        for kernel in back:
            x = nn.relu(conv(x, kernel, 2))
        return nn.sigmoid(x.ravel() @ score)

    return network, (5,)


def drone(part: int = 1) -> tuple[Network, tuple[int, ...]]:
    """5 x 5 convolution, max-pool 3 x 3, residual blocks with BatchNorm: 32, 64, 128; an angle and a probability."""
    w, side = Weights(), 200 // part
    stem, widths = w(5, 5, 1, 32), (32, 32, 64, 128)
    blocks = [
        (w.scales(a), w(3, 3, a, b), w.scales(b), w(3, 3, b, b), w(1, 1, a, b))
        for a, b in itertools.pairwise(widths)
    ]
    pooled = (-(-side // 2) - 3) // 2 + 1
    for _ in blocks:
        pooled = -(-pooled // 2)
    angle, probability = w(pooled * pooled * 128, 1), w(pooled * pooled * 128, 1)

    def network(x: Any) -> Any:
        x = lax.reduce_window(conv(x, stem, 2), -np.inf, lax.max, (3, 3, 1), (2, 2, 1), "VALID")
        for (s, t), first, (u, v), second, skip in blocks:
            x = conv(nn.relu(conv(nn.relu(x * s + t), first, 2) * u + v), second) + conv(x, skip, 2)
        x = nn.relu(x).ravel()
        return jax.numpy.concatenate([x @ angle, nn.sigmoid(x @ probability)])

    return network, (side, side, 1)


def detector(part: int = 1) -> tuple[Network, tuple[int, ...]]:
    """3 x 3 convolution of 8, residual blocks of 16 with average pooling before them, 1 x 1 convolution of 125."""
    w, side = Weights(), 52 // part
    stem, head = w(3, 3, 3, 8), w(1, 1, 16, 125)
    blocks = [(w(3, 3, a, 16), w(3, 3, 16, 16), w(1, 1, a, 16)) for a in (8, 16)]

    def network(x: Any) -> Any:
        x = nn.relu(conv(x, stem))
        for first, second, skip in blocks:
            x = average(x)
            x = nn.relu(conv(nn.relu(conv(x, first)), second) + conv(x, skip))
        return conv(x, head).ravel()

    return network, (side, side, 3)


NETS: dict[str, Callable[..., tuple[Network, tuple[int, ...]]]] = {
    "cifar": cifar,
    "generator": generator,
    "drone": drone,
    "detector": detector,
}
SMALL = 4  #: `--small` divides every side by this.
BOUNDS: dict[str, Callable[..., Any]] = {
    "naive": lb.naive,
    "liplt": lb.liplt,
    "liplt, pairs": lambda form, **options: lb.liplt(form, pairwise=True, **options),
}


def traced(name: str, part: int = 1) -> lb.LureForm:
    network, shape = NETS[name](part)
    return lb.trace(network, jax.ShapeDtypeStruct(shape, np.float32))


def measure(name: str, what: str, small: bool) -> Json:
    """One row of the table: a bound of one network, in this process."""
    start, cpu = time.perf_counter(), time.process_time()
    form = traced(name, SMALL if small else 1)
    row: Json = dict(
        net=name,
        bound=what,
        neurons=sum(tap.size_out for tap in form.taps),
        outputs=form.num_outputs,
        trace_seconds=time.perf_counter() - start,
        trace_cpu=time.process_time() - cpu,
    )
    start, cpu = time.perf_counter(), time.process_time()
    try:
        bound = BOUNDS[what](form, progress=False)
        row |= dict(value=bound.value, guarantee=bound.guarantee)
        row |= dict(
            blocks=[[p.source, p.target, list(p.shape), p.value, p.guarantee, p.how] for p in bound.parts]
        )
    except ValueError as error:
        row |= dict(value=None, guarantee=f"{error}")
    row |= dict(seconds=time.perf_counter() - start, cpu=time.process_time() - cpu)
    return row | dict(peak_gigabytes=peak_gigabytes())


COLUMNS = ("net", "bound", "neurons", "outputs", "trace, s", "s", "CPU s", "GB", "value", "guarantee")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--small", action="store_true", help="a quarter of every side")
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS), help="only these networks")
    parser.add_argument("--bounds", nargs="*", choices=BOUNDS, default=list(BOUNDS), help="only these bounds")
    parser.add_argument("--one", nargs=2, metavar=("NET", "BOUND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.small)))
        return
    where = environment("wide.py", ["numpy", "scipy"])
    found = []
    for name in args.nets:
        for what in args.bounds:
            found.append(in_a_process(__file__, "--one", name, what, *["--small"] * args.small))
    where["load_after"] = os.getloadavg()[0]
    rows = [
        [
            r["net"], r["bound"], str(r["neurons"]), str(r["outputs"]), f"{r['trace_seconds']:.1f}",
            f"{r['seconds']:.1f}", f"{r['cpu']:.1f}", f"{r['peak_gigabytes']:.1f}",
            "" if r["value"] is None else f"{r['value']:.6g}", r["guarantee"],
        ]
        for r in found
    ]  # fmt: skip
    shown = table("bounds of wide networks", COLUMNS, rows, ("net", "bound", "guarantee"))
    Console(width=150).print(shown)
    keep(
        args.out,
        "wide-" + where["device"].split()[0] + ("-small" if args.small else ""),
        where,
        [shown],
        rows=found,
    )


if __name__ == "__main__":
    main()
