"""What certified radius maximisation costs beside plain training of the same net.

    python benchmarks/crm.py                      4C3F, 6C2F and two MLPs; LipLT and the recursion in the loss
    python benchmarks/crm.py --nets 4C3F --steps 4 --repeat 3

Every row is one epoch of so many steps of `lipbounds.training`, compiled as `fit` compiles it: batch of 512 from images
on the device, gradient, Adam. Plain cross-entropy of the same net in the same run is the baseline; the runs take turns,
so that other load slows all alike; times are medians, compilation is apart. Random images, initial weights; what is
computed in a step does not depend on them. `refresh n` computes constants and their gradient every n steps. Tables and
figures go to benchmarks/results/.
"""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np
from common import Json, command_line, environment, keep, table
from rich.console import Console
from rich.progress import track

from lipbounds.training import Config, parallel
from lipbounds.training.models import build
from lipbounds.training.step import trainer

BATCH = 512
NETS = {
    "4C3F": (28, 28, 1),
    "6C2F": (32, 32, 3),
    "784-256-256-10": (28, 28, 1),
    "784-512-512-10": (28, 28, 1),
}
LIPLT = {
    "LipLT, 5 iterations": dict(constants="liplt", power_iterations=5),
    "LipLT, 10 iterations": dict(constants="liplt", power_iterations=10),
    "naive, 5 iterations": dict(constants="naive", power_iterations=5),
}
RECURSION = {
    "recursion, float32": dict(constants="recursion"),
    "recursion, float64": dict(constants="recursion", precision="float64"),
    "recursion, float32, refresh 2": dict(constants="recursion", refresh=2),
    "recursion, float32, refresh 4": dict(constants="recursion", refresh=4),
    "recursion, float32, maxmin": dict(constants="recursion", activation="maxmin"),
}
MLP = {**LIPLT, **RECURSION}


class Job:
    """One configuration, compiled; calling it trains one epoch more."""

    def __init__(self, net: str, settings: Json, steps: int):
        shape = NETS[net]
        config = Config(
            dataset="mnist",
            arch=net,
            batch_size=BATCH,
            epochs=1000,
            **{"warmup": 0, "lam": 15.0, "r0": 2.2, "learning_rate": 1e-5, **settings},
        )
        self.steps = steps
        model = build(config.spec(shape, 10), 0)
        devices = parallel.devices()
        self.trainer = trainer(config, model, shape, 255, steps * BATCH, devices)
        rng = np.random.default_rng(0)
        self.pixels = devices.put(rng.integers(0, 256, (steps * BATCH, *shape), dtype=np.uint8))
        self.labels = devices.put(rng.integers(0, 10, steps * BATCH, dtype=np.int32))
        self.state = devices.put(self.trainer.init())
        start = time.perf_counter()
        self()
        self.first = time.perf_counter() - start

    @property
    def compilations(self) -> int:
        """Of the epoch, or of its step where steps are dispatched one by one."""
        t = self.trainer
        return int((t._single if t.one_by_one else t._scanned)._cache_size())

    def __call__(self) -> float:
        """Seconds of one epoch."""
        start = time.perf_counter()
        self.state, metrics = self.trainer.epoch(self.state, self.pixels, self.labels)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def measure(net: str, steps: int, repeat: int) -> list[Json]:
    """Rows of one net: the plain step first."""
    kinds = {"plain": dict(loss="cross-entropy"), **(MLP if net[0] == "7" else LIPLT)}
    if "recursion, float32, maxmin" in kinds:
        kinds["plain, maxmin"] = dict(loss="cross-entropy", activation="maxmin")
    jobs = {name: Job(net, settings, steps) for name, settings in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeat):
        for name, job in jobs.items():
            times[name].append(job())
    rows = []
    for name, job in jobs.items():
        seconds = statistics.median(times[name]) / steps
        base = "plain, maxmin" if name.endswith("maxmin") else "plain"
        plain = statistics.median(times[base]) / steps
        rows.append(
            {
                "net": net,
                "loss": name,
                "step_seconds": seconds,
                "ratio": seconds / plain,
                "images_per_second": BATCH / seconds,
                "compile_seconds": max(job.first - statistics.median(times[name]), 0.0),
                "compilations": job.compilations,
            }
        )
    return rows


COLUMNS = ("net", "loss", "step, ms", "/ plain", "images / s", "compile, s", "compilations")


def cells(row: Json) -> list[str]:
    """A row of the table."""
    times = f"{1e3 * row['step_seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['images_per_second']:.0f}"
    return [row["net"], row["loss"], *times, f"{row['compile_seconds']:.1f}", str(row["compilations"])]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), default=list(NETS), metavar="NET")
    parser.add_argument("--steps", type=int, default=6, help="steps of an epoch that is timed")
    parser.add_argument("--repeat", type=int, default=5, help="epochs that are timed")
    parser.add_argument("--name", help="stem of the files (default: crm-cpu, crm-gpu)")
    args = parser.parse_args()
    where = environment("crm.py", ("optax", "flax"))
    rows: list[Json] = []
    for net in track(args.nets, description="nets", transient=True):
        rows += measure(net, args.steps, args.repeat)
    shown = table("a training step at batch 512", COLUMNS, [cells(row) for row in rows], left=COLUMNS[:2])
    Console(width=140).print(shown)
    keep(args.out, args.name or f"crm-{jax.default_backend()}", where, [shown], rows=rows)


if __name__ == "__main__":
    main()
