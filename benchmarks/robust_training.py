"""Robust training: what a step of every loss costs beside plain training, and what the losses reach under AutoAttack.

    python benchmarks/robust_training.py ratios --arch resnet18-w0.125       time of a step of every loss
    python benchmarks/robust_training.py train --dataset digits --work DIR   networks of three seeds, measured
    python benchmarks/robust_training.py overfit --dataset mnist             Fast AT where it overfits its one step
    python benchmarks/robust_training.py report --work DIR                   tables and figures to benchmarks/results/

`ratios` trains all losses for a few steps on images of the shape of CIFAR-10 (with --data-dir on CIFAR-10 itself, else
on random ones, which cost the same), one loss after the other, round by round, so that a busy machine slows all of them
alike. It reports the median over the rounds of the time relative to plain training in the
same round. The papers' minutes are in the last column: they are of whole runs on another machine, so that only their
ratios can be compared. `train` and `overfit` train by `fit`, as `lipbounds train` does; `train` leaves out what DIR
holds already, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from common import Json, command_line, environment, keep, peak_gigabytes, table
from flax import nnx
from rich.console import Console

from lipbounds.analysis.figures import png
from lipbounds.analysis.robust_table import robust_figure, robust_record
from lipbounds.training.augment import Augmentation
from lipbounds.training.config import Config
from lipbounds.training.data import Dataset, load
from lipbounds.training.loop import fit
from lipbounds.training.losses import cross_entropy
from lipbounds.training.models import MLP, ConvNet, build, spec_for
from lipbounds.training.network import Network, split
from lipbounds.training.robust_losses import ROBUST, usual

# Minutes of ResNet-18 on CIFAR-10, Tables 6.2 and 6.11 of the thesis of J. Chen (UCLA, 2022)
PUBLISHED = {
    "at": 430,
    "fast-at": 82,
    "fast-at-2": 127,
    "gradalign": 402,
    "trades": 482,
    "fast-trades": 126,
    "fast-trades-2": 164,
    "backward-smoothing": 164,
}
RATIOS = ("cross-entropy", "fast-at", "fast-trades", "backward-smoothing", "at", "trades")
LOSSES = (
    "cross-entropy",
    "at",
    "trades",
    "backward-smoothing",
    "backward-smoothing-2x",
    "fast-at",
    "fast-at-clean",
    "consistency",
    "consistency-0",
)
# Networks (convolutions as (channels, kernel, stride, padding), dense layers) and settings of the small runs.
SMALL: dict[str, Json] = {
    "digits": {
        "convolutions": (),
        "dense": (128, 64),
        "eps": 0.1,
        "epochs": 60,
        "batch": 64,
        "images": 1437,
        "rate": 2e-3,
    },
    "mnist": {
        "convolutions": ((8, 4, 2, 1), (16, 4, 2, 1)),
        "dense": (64,),
        "eps": 0.2,
        "epochs": 10,
        "batch": 128,
        "images": 10_000,
        "rate": 4e-3,
    },
}
TESTED = {"digits": 360, "mnist": 300}
# Names of runs that are a loss with other settings than its usual ones.
CHANGED: dict[str, tuple[str, Json]] = {
    "fast-at-clean": ("fast-at", {"attack_start": "clean"}),
    "consistency-0": ("consistency", {"robust_weight": 1e-12}),  # 0 would be the usual weight
    "backward-smoothing-2x": ("backward-smoothing", {}),
}
LONGER = {"backward-smoothing-2x": 2}  # so many times the epochs
# Where one step goes wrong: from the image, with few images and a large rate that does not fall.
OVERFITTING_IMAGES, OVERFITTING_EPOCHS = 5000, 12
OVERFITTING: Json = {
    "attack_eps": 0.15,
    "attack_step": 0.15,
    "learning_rate": 4e-3,
    "schedule": "constant",
    "batch_size": 64,
    "holdout": 0.1,
    "robust_every": 1,
    "ramp": 0,
}


def step_of(network: Network, rule: Any, name: str, eps: float, unrolled: bool) -> Any:
    """step(state, x, y, key) -> (state, report), not compiled; state = (weights, moments, statistics of BatchNorm)."""
    settings = None if name == "cross-entropy" else usual(name, eps, unrolled=unrolled)

    def step(state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        weights, moments, statistics = state
        fixed, frozen = jax.lax.stop_gradient(weights), network.at(statistics)

        def value(weights: Any) -> Any:
            if settings is None:
                logits, after = network.trained(weights, statistics, x)
                return cross_entropy(logits, y), (after, {})
            views = (
                jax.numpy.stack([x, shifted(jax.random.fold_in(key, 1), x)]) if name == "consistency" else x
            )
            found, (after, _, report) = ROBUST[name](
                lambda p, s: network.trained(weights, s, p),
                lambda p: frozen.network(fixed, p),
                statistics,
                views,
                y,
                key,
                settings,
            )
            return found, (after, report)

        gradient, (after, report) = jax.grad(value, has_aux=True)(weights)
        updates, moments = rule.update(gradient, moments, weights)
        return (optax.apply_updates(weights, updates), moments, after), report

    return step


shifted = Augmentation(crop=1)  # the second view of "consistency": a shift by at most one pixel


def start(network: Network, weights: Any, rule: Any) -> Any:
    """The first state: copies, since steps are donated theirs."""
    weights, statistics = jax.tree.map(jax.numpy.array, (weights, network.statistics))
    return weights, rule.init(weights), statistics


# ------------------------------------------------------------------------------------------------------------ ratios
def ratios(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    if args.data_dir is None:
        pixels = rng.integers(0, 256, (args.batch, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, args.batch)
    else:
        data = load("cifar10", args.data_dir)
        pixels, labels = data.train_pixels[: args.batch], data.train_y[: args.batch]
    x, y, key = jax.numpy.asarray(pixels / np.float32(255)), jax.numpy.asarray(labels), jax.random.key(0)
    model = build(spec_for(args.arch, (32, 32, 3), 10), 0)
    model.train()
    parts, weights = split(model, (32, 32, 3))
    network, rule = Network(**parts), optax.sgd(0.1, momentum=0.9)
    made: dict[str, Any] = {}
    for name in args.losses:
        step = step_of(network, rule, name, 8 / 255, not args.loops)
        made[name] = jax.jit(step, donate_argnums=0), start(network, weights, rule)
    wall: dict[str, list[float]] = {name: [] for name in made}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    compiled: dict[str, float] = {}
    for name, (run, state) in made.items():
        begin = time.perf_counter()
        made[name] = run, jax.block_until_ready(run(state, x, y, key))[0]
        compiled[name] = time.perf_counter() - begin
        print(f"{name}: compiled and first step in {compiled[name]:.0f} s", flush=True)
    for number in range(args.rounds):
        for name, (run, state) in made.items():
            begin, used = time.perf_counter(), time.process_time()
            for _ in range(args.steps):
                state, _ = run(state, x, y, key)
            jax.block_until_ready(state)
            wall[name].append((time.perf_counter() - begin) / args.steps)
            cpu[name].append((time.process_time() - used) / args.steps)
            made[name] = run, state
        print(f"round {number + 1} of {args.rounds}", flush=True)
    if args.rounds:
        show_ratios(args, wall, cpu, compiled)


def show_ratios(args: argparse.Namespace, wall: Json, cpu: Json, compiled: Json) -> None:
    plain, first = args.losses[0], "fast-at"
    rows, figures = [], {}
    for name in args.losses:
        share = [a / b for a, b in zip(wall[name], wall[plain], strict=True)]
        used = [a / b for a, b in zip(cpu[name], cpu[plain], strict=True)]
        fast = [a / b for a, b in zip(wall[name], wall.get(first, wall[plain]), strict=True)]
        paper = PUBLISHED.get(name)
        figures[name] = {
            "wall_per_step": wall[name],
            "cpu_per_step": cpu[name],
            "compile_seconds": compiled[name],
        }
        rows.append(
            [
                name,
                f"{np.median(wall[name]):.3f}",
                f"{np.median(cpu[name]):.3f}",
                f"{np.median(share):.2f} ({min(share):.2f} to {max(share):.2f})",
                f"{np.median(used):.2f}",
                f"{np.median(fast):.2f}",
                "-" if paper is None else f"{paper / PUBLISHED[first]:.2f}",
                "-" if paper is None else str(paper),
            ]
        )
    title = (
        f"Time of a step, {args.arch}, batches of {args.batch}, {args.rounds} rounds of {args.steps} steps"
    )
    columns = ["loss", "s per step", "CPU s", "wall / plain", "CPU / plain", "/ Fast AT", "paper / Fast AT"]
    shown = table(title, [*columns, "paper, minutes"], rows, left=("loss",))
    Console(width=150).print(shown)
    where = environment("robust_training.py")
    keep(args.out, f"robust-ratios-{args.arch}-{where['device'].split()[0]}", where, [shown], losses=figures)


# ------------------------------------------------------------------------------------------------------------- train
def runs(args: argparse.Namespace) -> Iterator[tuple[str, int, Path]]:
    for seed in args.seeds:
        for name in args.losses:
            yield name, seed, args.work / f"{args.dataset}-{name}-{seed}.json"


def small_run(dataset: str, name: str, seed: int, epochs: int, **changes: Any) -> Config:
    """The settings of a small run: those of the loss, with Adam and a cosine."""
    small, epochs = SMALL[dataset], epochs * LONGER.get(name, 1)
    loss, more = CHANGED.get(name, (name, {}))
    fields: Json = {
        "dataset": dataset,
        "loss": loss,
        "attack_eps": small["eps"],
        "batch_size": small["batch"],
        "learning_rate": small["rate"],
        "final_learning_rate": 0.0,
        "schedule": "cosine",
        "epochs": epochs,
        "validate_every": 0,
        "warmup": 0,
        "ramp": epochs // 3,  # attacks on fresh weights leave some networks constant
        "robust_every": max(2, epochs // 5),
        "crop": 1 if loss == "consistency" else 0,  # its two views are shifted by at most one pixel
        "seed": seed,
    }
    return Config(**{**fields, **more, **changes})


def network_of(dataset: str, shape: tuple[int, ...], seed: int) -> nnx.Module:
    """A fresh network in training mode: its convolutions, if there are any, and its dense layers."""
    small, rngs = SMALL[dataset], nnx.Rngs(seed)
    if small["convolutions"]:
        model: nnx.Module = ConvNet(
            shape, convolutions=small["convolutions"], dense=small["dense"], rngs=rngs
        )
    else:
        widths = "-".join(map(str, (math.prod(shape), *small["dense"], 10)))
        model = MLP(shape, widths=widths, rngs=rngs)
    model.train()
    return model


def images_of(dataset: str, data_dir: str | None, count: int) -> Dataset:
    """The data set with its first training images only."""
    data = load(dataset, data_dir)
    return dataclasses.replace(data, train_pixels=data.train_pixels[:count], train_y=data.train_y[:count])


class Clock:
    """Progress of a run: the CPU seconds of its epochs, without the first one and those with PGD accuracies.

    A run that has no other epochs counts these.
    """

    def __init__(self) -> None:
        self.last, self.epochs, self.others = time.process_time(), list[float](), list[float]()

    def __call__(self, record: Json) -> None:
        now = time.process_time()
        counts = record["epoch"] > 1 and "pgd_accuracy" not in record
        (self.epochs if counts else self.others).append(now - self.last)
        self.last = now

    @property
    def median(self) -> float:
        return float(np.median(self.epochs or self.others))


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    small, tested = SMALL[args.dataset], args.images or TESTED[args.dataset]
    data = images_of(args.dataset, args.data_dir, small["images"])
    test = np.asarray(data.test_x[:tested], np.float32), data.test_y[:tested]
    e = str(small["eps"])
    for name, seed, path in runs(args):
        if path.exists():
            continue
        begin, used, clock = time.perf_counter(), time.process_time(), Clock()
        config = small_run(args.dataset, name, seed, args.epochs or small["epochs"])
        model = network_of(args.dataset, data.train_pixels.shape[1:], seed)
        fitted = fit(config, data, model=model, progress=clock)
        spent = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - used}
        spent["cpu_per_epoch"] = clock.median
        record = robust_record(fitted.model, *test, eps=[small["eps"]], local=args.local)
        shown = {
            "loss": name,
            "seed": seed,
            "spent": spent,
            "overfitted": any("catastrophic" in line.get("warning", "") for line in fitted.log),
            "log": fitted.log,
            **record,
        }
        path.write_text(json.dumps(shown) + "\n")
        print(
            f"{name}, seed {seed}: natural {record['natural']:.1%}, PGD {record['PGD'][e]:.1%}, AutoAttack "
            f"{record['AutoAttack'][e]:.1%}, certified {record['certified'][e]:.1%}, "
            f"{spent['cpu_per_epoch']:.2f} CPU s an epoch",
            flush=True,
        )


# ----------------------------------------------------------------------------------------------------------- overfit
def overfit(args: argparse.Namespace) -> None:
    """Fast AT with and without a random start where one step goes wrong, with the warnings of `fit`."""
    data = images_of(args.dataset, args.data_dir, OVERFITTING_IMAGES)
    rows, figures = [], {}
    for start in ("clean", "uniform"):
        for seed in args.seeds:
            changes = {**OVERFITTING, "attack_start": start}
            config = small_run(args.dataset, "fast-at", seed, args.epochs or OVERFITTING_EPOCHS, **changes)
            begin = time.process_time()
            model = network_of(args.dataset, data.train_pixels.shape[1:], seed)
            log = fit(config, data, model=model, progress=False).log
            used = time.process_time() - begin
            best = max(log, key=lambda line: line["pgd_accuracy"])
            warned = [str(line["epoch"]) for line in log if "catastrophic" in line.get("warning", "")]
            shown = [
                *(
                    f"{100 * line['attack_accuracy']:.1f} / {100 * line['pgd_accuracy']:.1f}"
                    for line in (best, log[-1])
                ),
                f"{best['delta_loss']:.2f} / {log[-1]['delta_loss']:.2f}",
                ", ".join(warned) or "none",
            ]
            rows.append([start, str(seed), str(best["epoch"]), *shown, f"{used:.0f}"])
            figures[f"{start}-{seed}"] = {"cpu_seconds": used, "log": log}
            print(*rows[-1], flush=True)
    title = (
        f"Fast AT on {OVERFITTING_IMAGES} images of {args.dataset}, l-inf {OVERFITTING['attack_eps']}, one step of "
        f"{OVERFITTING['attack_step']}: % correct under its own attack in training / under PGD-10, held out"
    )
    columns = [
        "start",
        "seed",
        "best epoch",
        "there",
        "last epoch",
        "delta-L, best / last",
        "warned in",
        "CPU s",
    ]
    shown_table = table(title, columns, rows, left=("start", "warned in"))
    Console(width=150).print(shown_table)
    where = environment("robust_training.py")
    keep(args.out, f"robust-overfitting-{where['device'].split()[0]}", where, [shown_table], runs=figures)


# ------------------------------------------------------------------------------------------------------------ report
def report(args: argparse.Namespace) -> None:
    """The table and the figure of a data set's records."""
    found: dict[str, list[Json]] = {}
    for path in sorted(args.work.glob(f"{args.dataset}-*.json")):
        record = json.loads(path.read_text())
        found.setdefault(record["loss"], []).append(record)
    rows, small = [], SMALL[args.dataset]
    eps = str(small["eps"])
    for name in (n for n in LOSSES if n in found):
        records = found[name]
        cells = [spread([r["natural"] for r in records])]
        cells += [spread([r[c][eps] for r in records]) for c in ("PGD", "AutoAttack", "certified")]
        each = {r["seed"]: used(r) for r in records}
        cells += [f"{share:.2f}" for share in (np.median(list(each.values())), *shares_of(each, found))]
        lost = sum(r["overfitted"] for r in records)
        lengths = (str(len(records)), str(len(records[0]["log"])))
        rows.append([name, *lengths, *cells, f"{lost} of {len(records)}"])
    sizes = [[n for n, *_ in small["convolutions"]], small["dense"]]
    kinds = ("convolutions of", "dense layers of")
    layers = " and ".join(
        f"{kind} {', '.join(map(str, n))}" for kind, n in zip(kinds, sizes, strict=True) if n
    )
    tested = max(r["images"] for records in found.values() for r in records)
    title = f"{args.dataset}, {small['images']} images, {layers}; l-inf {eps}, {tested} test images; %"
    columns = [
        "loss",
        "seeds",
        "epochs",
        "natural",
        "PGD-20",
        "AutoAttack",
        "certified",
        "CPU s",
        "/ plain",
        "/ TRADES",
    ]
    shown = table(title, [*columns, "overfitting warned"], rows, left=("loss",))
    Console(width=150).print(shown)
    where = environment("robust_training.py")
    stem = f"robust-training-{args.dataset}-{eps}-{where['device'].split()[0]}"
    plain = {name: [{k: v for k, v in r.items() if k != "log"} for r in rs] for name, rs in found.items()}
    keep(args.out, stem, where, [shown], peak_gigabytes=peak_gigabytes(), **plain)
    drawn = {name: records[0] for name, records in found.items()}
    (args.out / f"{stem}.png").write_bytes(png(robust_figure(drawn)))


def used(record: Json) -> float:
    """CPU seconds of all epochs, without compilation and PGD accuracies."""
    return float(record["spent"]["cpu_per_epoch"] * len(record["log"]))


def shares_of(each: dict[int, float], found: dict[str, list[Json]]) -> Iterator[float]:
    """The time by seed over that of plain training and of TRADES, the median over the seeds; NaN without them."""
    for other in ("cross-entropy", "trades"):
        theirs = {r["seed"]: used(r) for r in found.get(other, [])}
        both = [each[seed] / theirs[seed] for seed in each if seed in theirs]
        yield float(np.median(both)) if both else math.nan


def spread(shares: list[float]) -> str:
    """Mean and standard deviation (of a sample) in percent."""
    wide = f" ± {100 * np.std(shares, ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * math.fsum(shares) / len(shares):.1f}{wide}"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("what", choices=("ratios", "train", "overfit", "report"))
    parser.add_argument("--arch", default="resnet18-w0.125")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loops", action="store_true", help="attacks as loops, not written out step by step")
    parser.add_argument("--losses", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset", choices=tuple(SMALL), default="digits")
    parser.add_argument("--epochs", type=int)
    parser.add_argument(
        "--eps", type=float, help="radius of `train` and `report`, which need a folder for each"
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--images", type=int, help="test images that are attacked")
    parser.add_argument("--local", action="store_true", help="certify with the bounds near every image, too")
    parser.add_argument("--work", type=Path, help="folder of the records")
    args = parser.parse_args()
    args.losses = args.losses or list(RATIOS if args.what == "ratios" else LOSSES)
    if args.eps is not None:
        SMALL[args.dataset]["eps"] = args.eps
    if args.what in ("train", "report") and args.work is None:
        parser.error("--work is needed: the folder of the records")
    with contextlib.suppress(KeyboardInterrupt):
        {"ratios": ratios, "train": train, "overfit": overfit, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
