"""What LipLT with pairs costs on an accelerator, with the CPU in its place: programs compiled, and CPU seconds.

    python benchmarks/device_programs.py                     a quarter of the channels of 6C2F and 4C3F, tiles of 512
    python benchmarks/device_programs.py --part 8 --tile 256 an eighth of them

Each net first on new shapes, then with other weights; with `--ahead` the programs are compiled from the shapes before,
as `lipbounds train` does beside its epochs. A tile has 2048 rows on a GPU; with a part of the channels and that part of
a tile, a network has the blocks of the full one in as many tiles, its input aside. "programs" leaves out those of the
trace. CPU seconds are of the whole process, the trace included; run it on one core (`taskset -c 0`).
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
from common import Json, command_line, environment, keep, table
from jax import lax, nn
from lipsdp_wide import CHANNELS
from rich.console import Console

import lipbounds as lb
from lipbounds._norms import device as proofs
from lipbounds._text import device

#: (convolutions, dense widths, input shape) of the paper's networks.
NETS = {"6C2F": (CHANNELS, (512,), (32, 32, 3)), "4C3F": (CHANNELS[:4], (512, 512), (28, 28, 1))}


def network(name: str, part: int, seed: int) -> lb.LureForm:
    """The network with 1 / part of its channels and dense neurons, weights of variance 1 / fan in."""
    convolutions, widths, shape = NETS[name]
    rng, kernels, matrices, (size, _, channels) = np.random.default_rng(seed), [], [], shape

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    for out, window, stride, padding in convolutions:
        kernels.append(weights(window, window, channels, out // part))
        channels, size = out // part, (size + 2 * padding - window) // stride + 1
    last = size * size * channels
    for width in (*(w // part for w in widths), 10):
        matrices.append(weights(last, width))
        last = width

    def model(x: jax.Array) -> jax.Array:
        for kernel, (_, _, stride, padding) in zip(kernels, convolutions, strict=True):
            around = [(padding, padding)] * 2
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x[None], kernel, (stride,) * 2, around, dimension_numbers=numbers)[0]
            x = nn.relu(x)
        x = x.ravel()
        for matrix in matrices[:-1]:
            x = nn.relu(x @ matrix)
        return x @ matrices[-1]

    return lb.trace(model, jax.ShapeDtypeStruct(shape, jnp.float32))


def measure(name: str, part: int, ahead: bool) -> list[Json]:
    """A row for each turn."""
    compiled: list[float] = []

    def heard(event: str, seconds: float, **more: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    rows: list[Json] = []
    for turn in [*["compiled ahead"] * ahead, "first", "other weights"]:
        begin = time.process_time()
        form = network(name, part, len(rows))
        compiled.clear()
        row: Json = {"net": name, "part": part, "turn": turn}
        if turn == "compiled ahead":
            from lipbounds._triangle import compile_ahead

            compile_ahead(form)
        else:
            bound = lb.liplt(form, pairwise=True, progress=False)
            row |= {"value": bound.value, "guarantee": bound.guarantee}
        seconds = time.process_time() - begin
        rows.append({**row, "programs": len(compiled), "compiling": sum(compiled), "cpu_seconds": seconds})
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--part", type=int, default=4, help="one over the share of the channels")
    parser.add_argument("--tile", type=int, default=512, help="rows of a tile")
    parser.add_argument("--ahead", action="store_true", help="compile the programs from the shapes before")
    args = parser.parse_args()
    cpu = jax.devices("cpu")[0]
    device.accelerator = lambda choice: cpu if choice != "cpu" else None
    proofs.SMALLEST = proofs.SMALLEST * args.tile // proofs.TILE
    proofs.TILE = args.tile
    rows = [row for name in NETS for row in measure(name, args.part, args.ahead)]
    keys = ("net", "turn", "programs", "compiling", "cpu_seconds", "value", "guarantee")
    lines = [[f"{v:.5g}" if isinstance(v := row.get(k, ""), float) else str(v) for k in keys] for row in rows]
    shown = table(
        f"LipLT with pairs, 1/{args.part} of the channels, tiles of {args.tile}", keys, lines, keys[:2]
    )
    Console(width=120).print(shown)
    stem = f"device-programs-{args.part}{'-ahead' * args.ahead}"
    keep(args.out, stem, environment("device_programs.py"), [shown], rows=rows)


if __name__ == "__main__":
    main()
