"""AutoAttack beside the reference in torch: robust accuracy and images a second of three networks, l2 and l-inf.

    python benchmarks/attacks.py train --data-dir DATA --work DIR          the networks and their test images, to DIR
    python benchmarks/attacks.py run --work DIR --net NET --norm NORM --images 100 --torch PYTHON
    python benchmarks/attacks.py report --work DIR                         tables and figures to benchmarks/results/

NET is digits (an MLP), mnist (a CNN) or mnist-at (the CNN, trained on PGD's examples). `run` gives the same weights and
images to both sides, one after the other: ours, and that of PYTHON, an interpreter with torch and torchattacks 3.5.1
(benchmarks/attacks_torch.py; its class AutoAttack makes 10 steps, so the attacks are called one by one with the
authors' 100). With --sides pgd, PGD with 50 starts tries what AutoAttack leaves. The first call of ours compiles; the
second, with the same result, is timed too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Json, command_line, environment, keep, table
from flax import nnx
from rich.console import Console

from lipbounds import analysis
from lipbounds.training.data import digits, mnist

EPS = {
    "digits": {"2": 0.5, "inf": 0.1},
    "mnist": {"2": 1.0, "inf": 0.1},
    "mnist-at": {"2": 1.5, "inf": 0.2},
}
STAGES = ("clean", "APGD-CE", "APGD-T", "FAB-T", "Square")


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.second = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 64, rngs=rngs)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.first(x.reshape(len(x), -1)))
        return self.last(nnx.relu(self.second(h)))


class CNN(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        pad = ((1, 1), (1, 1))
        self.first = nnx.Conv(1, 8, (4, 4), strides=2, padding=pad, rngs=rngs)
        self.second = nnx.Conv(8, 16, (4, 4), strides=2, padding=pad, rngs=rngs)
        self.dense, self.last = nnx.Linear(784, 50, rngs=rngs), nnx.Linear(50, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.last(nnx.relu(self.dense(h.reshape(len(h), -1))))


def network(name: str) -> nnx.Module:
    return MLP(nnx.Rngs(0)) if name == "digits" else CNN(nnx.Rngs(0))


# ------------------------------------------------------------------------------------------------------------ train
def trained(model: nnx.Module, x: np.ndarray, y: np.ndarray, epochs: int, radius: float) -> nnx.Module:
    """Adam on the cross-entropy, at examples that 5 steps of PGD find in l-inf balls, which grow to `radius`."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    def loss(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def ascent(model: nnx.Module, x: jax.Array, point: jax.Array, y: jax.Array, eps: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda p: loss(model, p, y))(point)
        moved = point + 0.4 * eps * jnp.sign(gradient)
        return jnp.clip(jnp.clip(moved, x - eps, x + eps), 0.0, 1.0)

    @nnx.jit
    def update(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        optimizer.update(model, nnx.grad(loss)(model, x, y))

    rng, size = np.random.default_rng(0), 128
    steps = epochs * (len(x) // size)
    for step in range(steps):
        rows = rng.integers(0, len(x), size)
        batch, labels = jnp.asarray(x[rows]), jnp.asarray(y[rows])
        if radius:
            eps = jnp.float32(radius * min(1.0, 2 * step / steps))
            noise = rng.uniform(-1, 1, batch.shape).astype(np.float32)
            point = jnp.clip(batch + eps * noise, 0.0, 1.0)
            for _ in range(5):
                point = ascent(model, batch, point, labels, eps)
            batch = point
        update(model, optimizer, batch, labels)
    return model


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    for name, radius in (("digits", 0.0), ("mnist", 0.0), ("mnist-at", 0.25)):
        if args.net not in (None, name):
            continue
        data = digits() if name == "digits" else mnist(args.data_dir)
        x, y = (np.asarray(data.train_x, np.float32), np.asarray(data.train_y))
        model = trained(
            network(name), x, y, {"digits": 60, "mnist": 3, "mnist-at": args.epochs}[name], radius
        )
        leaves = nnx.to_flat_state(nnx.state(model, nnx.Param))
        weights = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in leaves}
        test = np.asarray(data.test_x, np.float32)
        np.savez(args.work / f"{name}.npz", x=test, y=np.asarray(data.test_y, np.int64), **weights)
        share = np.mean(np.asarray(model(jnp.asarray(test[:1000]))).argmax(1) == data.test_y[:1000])
        print(f"{name}: {share:.1%} of 1000 test images")


# -------------------------------------------------------------------------------------------------------------- run
def loaded(path: Path, name: str) -> nnx.Module:
    arrays = np.load(path)
    model = network(name)
    graph, state = nnx.split(model)
    flat = [
        (k, leaf.replace(jnp.asarray(arrays[".".join(map(str, k))]))) for k, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def run(args: argparse.Namespace) -> None:
    path, eps = args.work / f"{args.net}.npz", EPS[args.net][args.norm]
    arrays, model = np.load(path), loaded(path, args.net)
    x, y = arrays["x"][: args.images], arrays["y"][: args.images]
    record: Json = {
        "net": args.net,
        "norm": args.norm,
        "eps": eps,
        "images": len(x),
        "load": os.getloadavg()[0],
    }
    if "ours" in args.sides:
        begin, cpu = time.perf_counter(), time.process_time()
        found = analysis.autoattack(model, x, y, eps, norm=args.norm)
        cold = time.perf_counter() - begin
        begin, cpu = time.perf_counter(), time.process_time()
        again = analysis.autoattack(model, x, y, eps, norm=args.norm)
        assert np.array_equal(found.adversarial, again.adversarial), "the same seed does not repeat"
        found = again
        record["ours"] = {
            "columns": found.columns,
            "first_seconds": cold,
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "stages": {stage.name: stage.seconds for stage in found.stages},
        }
        print(found)
    if "reference" in args.sides:
        words = [str(path), args.net, args.norm, repr(eps), str(args.images)]
        script = Path(__file__).parent / "attacks_torch.py"
        done = subprocess.run([args.torch, script, *words], check=True, stdout=subprocess.PIPE, text=True)
        record["reference"] = json.loads(done.stdout.splitlines()[-1])
    # on what AutoAttack leaves: nothing broken there means that PGD is nowhere better
    if "pgd" in args.sides:
        found = analysis.autoattack(model, x, y, eps, norm=args.norm)
        left = found.correct & ~found.success
        settings: dict[str, Any] = {"restarts": 50, "steps": 50, "norm": args.norm}
        record["pgd50"] = {"left": int(left.sum())} | {
            loss: int(analysis.pgd(model, x[left], y[left], eps, loss=loss, **settings).success.sum())
            for loss in ("margin", "ce")
        }
    with (args.work / "runs.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record))


# ----------------------------------------------------------------------------------------------------------- report
def report(args: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in (args.work / "runs.jsonl").read_text().splitlines()]
    merged: dict[tuple[str, str, int], Json] = {}
    for row in rows:  # parts of one comparison may come from several calls
        merged.setdefault((row["net"], row["norm"], row["images"]), {}).update(row)
    accuracy, speed, starts = [], [], []
    for (net, norm, images), row in sorted(merged.items()):
        head = [net, norm, f"{row['eps']:g}", str(images)]
        for side in ("ours", "reference"):
            if side in row:
                accuracy.append([*head, side, *(f"{100 * row[side]['columns'][s]:.1f}" for s in STAGES)])
        if "pgd50" in row:
            starts.append([*head, *(str(row["pgd50"][k]) for k in ("left", "margin", "ce"))])
        if "ours" in row and "reference" in row:
            wall, cpu = (row["reference"][k] / row["ours"][k] for k in ("seconds", "cpu_seconds"))
            first_time = images / row["ours"]["first_seconds"]
            rates = [first_time, *(images / row[side]["seconds"] for side in ("ours", "reference"))]
            ratios = [row["reference"]["seconds"] / row["ours"]["first_seconds"], wall, cpu]
            speed.append([*head, *(f"{each:.2f}" for each in (*rates, *ratios)), f"{row['load']:.1f}"])
    first = ("net", "norm", "eps", "images")
    tables = [
        table("Accuracy (%) after each attack", (*first, "side", *STAGES), accuracy, ("net", "side")),
        table(
            "Images a second, and how many times as fast as torch",
            (*first, "ours, first call", "ours", "torch", "first call", "times", "by CPU time", "load"),
            speed,
            ("net",),
        ),
        table(
            "Images that AutoAttack leaves, and how many of them PGD breaks with 50 starts of 50 steps",
            (*first, "left", "by the margin", "by cross-entropy"),
            starts,
            ("net",),
        ),
    ]
    for each in tables:
        Console(width=140).print(each)
    keep(args.out, "attacks-cpu", environment("attacks.py", ("numpy",)), tables, rows=list(merged.values()))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("what", choices=["train", "run", "report"])
    parser.add_argument("--work", type=Path, required=True, help="folder of networks and figures")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST")
    parser.add_argument("--net", choices=list(EPS))
    parser.add_argument("--norm", choices=["2", "inf"])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=2, help="of adversarial training")
    parser.add_argument("--torch", help="interpreter with torch and torchattacks")
    parser.add_argument(
        "--sides", nargs="+", default=["ours", "reference"], choices=["ours", "reference", "pgd"]
    )
    args = parser.parse_args()
    if args.what == "run" and None in (args.net, args.norm):
        parser.error("run needs --net and --norm")
    if args.what == "run" and "reference" in args.sides and args.torch is None:
        parser.error("the reference needs --torch; --sides ours leaves it out")
    {"train": train, "run": run, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
