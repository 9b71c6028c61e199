"""LipSDP of a whole wide network: 6C2F of the CRM paper, or the same with a part of its channels, all pairs.

    python benchmarks/lipsdp_wide.py                  a quarter of the channels (on two CPU cores: minutes)
    python benchmarks/lipsdp_wide.py --part 1         the full network (on a GPU: minutes; `SECTIONS=lipsdp gpu.sh`)
    python benchmarks/lipsdp_wide.py --counts         only operations and bytes of both networks

Six convolutions and two dense layers on a CIFAR image; random weights of variance 1 / fan in,
seed 0, as training begins. LipLT and LipSDP are of the same form in the same process, LipSDP with a few steps first,
then with as many as fit in the time. "largest_ratio" is over the 45 pairs. Operations are those of one step of the
search, multiplications and additions counted each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Json, command_line, environment, keep, peak_gigabytes, table
from jax import lax, nn
from rich.console import Console

import lipbounds as lb
from lipbounds._lipsdp.chain import cores, operations
from lipbounds._lipsdp.wide import layer_widths

CHANNELS = ((32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1))


def images(part: int, side: int = 32) -> lb.LureForm:
    """6C2F with 1 / part of its channels and dense neurons, for images of this side."""
    rng, channels, size, kernels = np.random.default_rng(0), 3, side, []

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32)

    for out, window, stride, padding in CHANNELS:
        kernels.append(weights(window, window, channels, out // part))
        channels, size = out // part, (size + 2 * padding - window) // stride + 1
    hidden, last = weights(size * size * channels, 512 // part), weights(512 // part, 10)

    def network(x: jax.Array) -> jax.Array:
        for kernel, (_, _, stride, padding) in zip(kernels, CHANNELS, strict=True):
            around = [(padding, padding)] * 2
            numbers = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(x[None], kernel, (stride,) * 2, around, dimension_numbers=numbers)[0]
            x = nn.relu(x)
        return nn.relu(x.ravel() @ hidden) @ last

    return lb.trace(network, jax.ShapeDtypeStruct((side, side, 3), jnp.float32))


def counts(part: int) -> Json:
    """Widths, the layers that are factorised, operations of a step and bytes, from the shapes alone."""
    form = images(part)
    widths = layer_widths(form)
    chosen = cores(widths, form.num_outputs)
    work, held = operations(widths, form.num_outputs, chosen)
    return dict(
        part=part,
        widths="-".join(map(str, widths)),
        factorised="-".join(str(widths[j]) for j in chosen),
        operations=work,
        gigabytes=held / 1e9,
        whole_matrix_gigabytes=8 * max(widths) ** 2 / 1e9,
    )


def attempt(work: Callable[[], Any]) -> Json:
    """The result or the error, with seconds of wall and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        found = {"value": work()}
    except Exception as error:  # recorded, so that the other rows are run
        found = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    return {
        **found,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
    }


def measure(add: Callable[..., None], part: int, side: int, seconds: float, most: int = 60) -> None:
    """Rows of LipLT, of LipSDP with two steps, and with as many as fit in `seconds` (at most `most`)."""
    begin = time.perf_counter()
    form = images(part, side)
    i, j = np.triu_indices(form.num_outputs, 1)

    steps_at: list[float] = []

    def passed(text: str) -> None:
        now = time.perf_counter()
        if text.startswith("pairs: step"):
            steps_at.append(now)
        print(f"{now - begin:7.1f} s  {text}", flush=True)

    def row(what: str, found: Json) -> Any:
        bound = found.pop("value", None)
        if bound is not None:
            pairs = bound.pairwise[i, j]
            found |= {"L": bound.value, "largest_pair": float(pairs.max()), "mean_pair": float(pairs.mean())}
            found |= {"guarantee": bound.guarantee, "notes": "; ".join(bound.notes)}
        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use", 0) / 1e9
        found |= {"device_gigabytes": round(peak, 2), "host_gigabytes": round(peak_gigabytes(), 2)}
        add(what=what, **found, so_far=round(time.perf_counter() - begin, 1))
        return bound

    other = row("liplt", attempt(lambda: lb.liplt(form, pairwise=True, progress=passed)))
    steps = 2
    while steps:
        began, how = time.perf_counter(), lb.Recursion(iterations=steps)
        steps_at.clear()
        found = attempt(lambda how=how: lb.lipsdp(form, pairwise=True, solver=how, progress=passed))
        bound = row(f"lipsdp, {steps} steps", found)
        if bound is not None and other is not None:
            ratio = float((bound.pairwise[i, j] / other.pairwise[i, j]).max())
            add(what=f"lipsdp, {steps} steps / liplt", L=bound.value / other.value, largest_ratio=ratio)
        if len(steps_at) < 2:
            break
        each = min(np.diff(steps_at))  # the first step compiles
        spent, left = time.perf_counter() - began, seconds - (time.perf_counter() - begin)
        # a third more for the network, and line searches
        more = int(min((0.9 * left - spent) / (2 * each), most))
        steps = 0 if bound is None or steps >= most or more < 2 * steps else more


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--part", type=int, default=4, help="of the channels, 1 / PART (default 4)")
    parser.add_argument("--side", type=int, default=32, help="of the images (default 32)")
    parser.add_argument("--seconds", type=float, default=900.0, help="about so long at most (default 900)")
    parser.add_argument("--steps", type=int, default=60, help="of the search at most (default 60)")
    parser.add_argument("--counts", action="store_true", help="only operations and bytes")
    args = parser.parse_args()
    sizes = [counts(part) for part in (1, 4)]
    columns = tuple(sizes[0])
    shown = [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in one.values()] for one in sizes]
    tables = [table("one step of the search, by the shapes", columns, shown, ("widths", "factorised"))]
    Console(width=160).print(tables[0])
    if args.counts:
        return
    where, rows = environment("lipsdp_wide.py"), list[Json]()

    def add(**row: Any) -> None:
        rows.append(row)
        print(row, flush=True)

    measure(add, args.part, args.side, args.seconds, args.steps)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        [f"{row[k]:.5g}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in keys]
        for row in rows
    ]
    tables.append(
        table(f"6C2F, 1 / {args.part} of the channels", keys, lines, ("what", "notes", "guarantee"))
    )
    keep(
        args.out,
        f"lipsdp-wide-{where['device'].split()[0]}-{args.part}",
        where,
        tables,
        rows=rows,
        counts=sizes,
    )


if __name__ == "__main__":
    main()
