"""Robust training: what a step of every loss costs beside plain training, and what the losses reach under AutoAttack.

    python benchmarks/robust_training.py ratios --arch resnet18-w0.125       time of a step of every loss
    python benchmarks/robust_training.py train --dataset digits --work DIR   networks of three seeds, measured
    python benchmarks/robust_training.py report --work DIR                   tables and figures to benchmarks/results/

`ratios` trains all losses for a few steps on images of the shape of CIFAR-10 (with --data-dir on CIFAR-10 itself, else
on random ones, which cost the same), an epoch of one loss after an epoch of the other, round by round, so that a busy
machine slows all of them alike. It reports the median over the rounds of the time relative to plain training in the
same round. The papers' minutes are in the last column: they are of whole runs on another machine, so that only their
ratios can be compared. `train` leaves out what DIR holds already, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Json, command_line, environment, keep, peak_gigabytes, table
from rich.console import Console

from lipbounds.analysis.figures import png
from lipbounds.analysis.robust_table import robust_figure, robust_record
from lipbounds.training import Config, fit
from lipbounds.training.data import load
from lipbounds.training.models import build, spec_for
from lipbounds.training.parallel import Devices
from lipbounds.training.step import trainer

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
LOSSES = ("cross-entropy", "at", "trades", "backward-smoothing", "fast-at", "fast-at-clean", "consistency")
# Settings of the small runs, the same for every loss: a network, its eps in l-inf, epochs and training images.
SMALL: dict[str, Json] = {
    "digits": {"arch": "64-128-64-10", "eps": 0.1, "epochs": 60, "batch_size": 64, "images": None},
    "mnist": {"arch": "2C2F", "eps": 0.2, "epochs": 12, "batch_size": 128, "images": 10_000},
}
TESTED = {"digits": 360, "mnist": 500}


def changes_of(name: str, eps: float) -> Json:
    """The settings of a loss by its name here: "fast-at-clean" is "fast-at" without its random start."""
    if name == "fast-at-clean":
        return {"loss": "fast-at", "attack_start": "clean", "attack_step": eps}
    return {"loss": name}


# ------------------------------------------------------------------------------------------------------------ ratios
def ratios(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    count = args.batch * args.steps
    if args.data_dir is None:
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, count).astype(np.int32)
    else:
        data = load("cifar10", args.data_dir)
        pixels, labels = data.train_x[:count], data.train_y[:count]
    spec = spec_for(args.arch, (32, 32, 3), 10)
    devices = Devices.of(1) if hasattr(Devices, "of") else Devices()
    made: dict[str, Any] = {}
    compiled: dict[str, float] = {}
    for name in args.losses:
        config = Config(
            dataset="cifar10",
            arch=args.arch,
            batch_size=args.batch,
            epochs=args.rounds + 2,
            eps=8 / 255,
            warmup=0,
            validate_every=0,
            **changes_of(name, 8 / 255),
        )
        run = trainer(config, build(spec, 0), (32, 32, 3), 255, count, devices)
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(run.epoch(run.init(), pixels, labels))
        compiled[name] = time.perf_counter() - begin
        made[name] = run, state
        print(f"{name}: compiled and first epoch in {compiled[name]:.0f} s", flush=True)
    wall: dict[str, list[float]] = {name: [] for name in made}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    for number in range(args.rounds):
        for name, (run, state) in made.items():
            begin, used = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(run.epoch(state, pixels, labels))
            wall[name].append((time.perf_counter() - begin) / args.steps)
            cpu[name].append((time.process_time() - used) / args.steps)
            made[name] = run, state
        print(f"round {number + 1} of {args.rounds}", flush=True)
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


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    small = dict(SMALL[args.dataset])
    images = small.pop("images")
    small |= {} if args.epochs is None else {"epochs": args.epochs}
    data = load(args.dataset, args.data_dir)
    x = data.test_x[: TESTED[args.dataset]].astype(np.float32) / np.float32(data.levels)
    y = data.test_y[: TESTED[args.dataset]]
    pair = None if images is None else (data.train_x[:images], data.train_y[:images])
    for name, seed, path in runs(args):
        if path.exists():
            continue
        config = Config(
            dataset=args.dataset,
            seed=seed,
            warmup=0,
            validate_every=0,
            learning_rate=2e-3,
            robust_every=5,
            **small,
            **changes_of(name, small["eps"]),
        )
        begin, used = time.perf_counter(), time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted = fit(config) if pair is None else fit(config, pair)
        spent = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - used}
        record = robust_record(fitted.model, x, y, eps=[small["eps"]], steps=20, local=args.local)
        said = [str(w.message) for w in caught] + [
            str(line["warning"]) for line in fitted.log if "warning" in line
        ]
        shown = {
            "loss": name,
            "seed": seed,
            "spent": spent,
            "warnings": said,
            "log": list(fitted.log),
            **record,
        }
        path.write_text(json.dumps(shown, default=float) + "\n")
        e = str(small["eps"])
        print(
            f"{name}, seed {seed}: natural {record['natural']:.1%}, PGD {record['PGD'][e]:.1%}, AutoAttack "
            f"{record['AutoAttack'][e]:.1%}, {spent['cpu']:.0f} CPU s",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------------------ report
def report(args: argparse.Namespace) -> None:
    shown, figures, drawn = [], {}, {}
    for dataset in SMALL:
        found: dict[str, list[Json]] = {}
        for path in sorted(args.work.glob(f"{dataset}-*.json")):
            record = json.loads(path.read_text())
            found.setdefault(record["loss"], []).append(record)
        if not found:
            continue
        eps = SMALL[dataset]["eps"]
        rows = []
        for name in (n for n in LOSSES if n in found):
            records = found[name]
            cells = [spread([r["natural"] for r in records])]
            cells += [spread([r[c][str(eps)] for r in records]) for c in ("PGD", "AutoAttack", "certified")]
            seconds = f"{np.median([r['spent']['cpu'] for r in records]):.0f}"
            alarms = sum(any("overfit" in w for w in r["warnings"]) for r in records)
            rows.append([name, str(len(records)), *cells, seconds, f"{alarms} of {len(records)}"])
            drawn[f"{dataset}: {name}"] = records[0]
        small = SMALL[dataset]
        title = f"{dataset}, {small['arch']}, l-inf {eps}, {TESTED[dataset]} test images; mean ± standard deviation, %"
        columns = [
            "loss",
            "seeds",
            "natural",
            "PGD-20",
            "AutoAttack",
            "certified",
            "CPU s",
            "overfitting warned",
        ]
        shown.append(table(title, columns, rows, left=("loss",)))
        figures[dataset] = {
            name: [{k: v for k, v in r.items() if k != "log"} for r in rs] for name, rs in found.items()
        }
    for one in shown:
        Console(width=150).print(one)
    where = environment("robust_training.py")
    stem = f"robust-training-{where['device'].split()[0]}"
    keep(args.out, stem, where, shown, peak_gigabytes=peak_gigabytes(), **figures)
    if drawn:
        (args.out / f"{stem}.png").write_bytes(png(robust_figure(drawn)))


def spread(shares: list[float]) -> str:
    """Mean and standard deviation (of a sample) in percent."""
    wide = f" ± {100 * np.std(shares, ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * math.fsum(shares) / len(shares):.1f}{wide}"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("what", choices=("ratios", "train", "report"))
    parser.add_argument("--arch", default="resnet18-w0.125")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--losses", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset", choices=tuple(SMALL), default="digits")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--data-dir")
    parser.add_argument("--local", action="store_true", help="certify with the bounds near every image, too")
    parser.add_argument("--work", type=Path, help="folder of the records")
    args = parser.parse_args()
    args.losses = args.losses or list(RATIOS if args.what == "ratios" else LOSSES)
    if args.what != "ratios" and args.work is None:
        parser.error("--work is needed: the folder of the records")
    with contextlib.suppress(KeyboardInterrupt):
        {"ratios": ratios, "train": train, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
