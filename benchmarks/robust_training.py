"""Robust training: what a step of every loss costs beside plain training, and what the losses reach under AutoAttack.

    python benchmarks/robust_training.py ratios --arch resnet18-w0.125       time of a step of every loss
    python benchmarks/robust_training.py train --dataset digits --work DIR   networks of three seeds, measured
    python benchmarks/robust_training.py report --work DIR                   tables and figures to benchmarks/results/

`ratios` trains all losses for a few steps on images of the shape of CIFAR-10 (with --data-dir on CIFAR-10 itself, else
on random ones, which cost the same), one loss after the other, round by round, so that a busy machine slows all of them
alike. It reports the median over the rounds of the time relative to plain training in the
same round. The papers' minutes are in the last column: they are of whole runs on another machine, so that only their
ratios can be compared. `train` leaves out what DIR holds already, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
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

from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.figures import png
from lipbounds.analysis.robust_table import robust_figure, robust_record
from lipbounds.training.augment import Augmentation
from lipbounds.training.data import load
from lipbounds.training.inner_attacks import RobustSettings
from lipbounds.training.losses import cross_entropy
from lipbounds.training.models import build, spec_for
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
    "fast-at",
    "fast-at-clean",
    "consistency",
    "consistency-0",
)
# Settings of the small runs, the same for every loss: a network, its eps in l-inf, epochs and training images.
SMALL: dict[str, Json] = {
    "digits": {"arch": "64-128-64-10", "eps": 0.1, "epochs": 60, "batch": 64, "images": 1437, "rate": 2e-3},
    "mnist": {"arch": "2C2F", "eps": 0.2, "epochs": 8, "batch": 128, "images": 10_000, "rate": 2e-3},
}
TESTED = {"digits": 360, "mnist": 500}
WARMUP = 6  # one in so many epochs, the first ones, is plain
WATCHED = 200  # test images on which a short PGD follows the training


def settings_of(name: str, eps: float, unrolled: bool) -> tuple[str, RobustSettings]:
    """(loss, settings) by the name here: "fast-at-clean" starts at the image, "consistency-0" has weight 0."""
    if name == "fast-at-clean":
        return "fast-at", usual("fast-at", eps, start="clean", unrolled=unrolled)
    if name == "consistency-0":
        return "consistency", usual("consistency", eps, lam=0.0, unrolled=unrolled)
    return name, usual(name, eps, unrolled=unrolled)


def step_of(network: Network, rule: Any, name: str, eps: float, unrolled: bool) -> Any:
    """step(state, x, y, key) -> (state, report), not compiled; state = (weights, moments, statistics of BatchNorm)."""
    loss, settings = (name, None) if name == "cross-entropy" else settings_of(name, eps, unrolled)

    def step(state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> Any:
        weights, moments, statistics = state
        fixed, frozen = jax.lax.stop_gradient(weights), network.at(statistics)

        def value(weights: Any) -> Any:
            if settings is None:
                logits, after = network.trained(weights, statistics, x)
                return cross_entropy(logits, y), (after, {})
            views = (
                jax.numpy.stack([x, shifted(jax.random.fold_in(key, 1), x)]) if loss == "consistency" else x
            )
            found, (after, _, report) = ROBUST[loss](
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


def epoch_of(network: Network, rule: Any, name: str, eps: float, x: Any, y: Any, convolves: bool) -> Any:
    """run(state, rows (steps, batch), keys) -> (state, reports of the steps)."""
    step = step_of(network, rule, name, eps, convolves)
    if not convolves:
        body = lambda s, i: step(s, x[i[0]], y[i[0]], i[1])  # noqa: E731
        return jax.jit(lambda state, rows, keys: jax.lax.scan(body, state, (rows, keys)))
    single = jax.jit(lambda state, rows, key: step(state, x[rows], y[rows], key), donate_argnums=0)

    def steps(state: Any, rows: Any, keys: Any) -> Any:  # XLA runs convolutions in loops slowly on CPUs
        seen = []
        for some, key in zip(rows, keys, strict=True):
            state, report = single(state, some, key)
            seen.append(report)
        return state, jax.tree.map(lambda *a: jax.numpy.stack(a), *seen)

    return steps


def trained(
    dataset: str, name: str, seed: int, epochs: int, x: Any, y: Any, test: Any
) -> tuple[nnx.Module, Json]:
    """(the network in evaluation mode, its log): Adam with a cosine, the same batches for every loss.

    The first epochs are plain for every loss: attacks on fresh weights leave some networks constant.
    """
    small = SMALL[dataset]
    model = build(spec_for(small["arch"], x.shape[1:], 10), seed)
    model.train()
    parts, weights = split(model, x.shape[1:])
    network, steps = Network(**parts), len(x) // small["batch"]
    rule = optax.adam(optax.cosine_decay_schedule(small["rate"], epochs * steps))
    convolves = dataset != "digits"
    first, later = (
        epoch_of(network, rule, each, small["eps"], x, y, convolves) for each in ("cross-entropy", name)
    )
    state, log, rng = start(network, weights, rule), [], np.random.default_rng(seed)
    for epoch in range(epochs):
        rows = rng.permutation(len(x))[: steps * small["batch"]].reshape(steps, -1)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), epoch), steps)
        state, seen = (first if epoch < epochs // WARMUP else later)(state, rows, keys)
        line = {"epoch": epoch + 1, **jax.tree.map(lambda a: float(a.mean()), seen)}
        if (epoch + 1) % max(1, epochs // 10) == 0:
            net = nnx.merge(network.graph, state[0], network.at(state[2]).rest)
            found = pgd(net, *test, small["eps"], norm=math.inf, steps=10, progress=False)
            line["pgd"] = found.accuracy
        log.append(line)
    return nnx.merge(network.graph, state[0], network.at(state[2]).rest), log


def overfitted(log: list[Json]) -> bool:
    """Catastrophic overfitting: PGD's accuracy ends below half its best, while the training attack's ends higher."""
    known = [line for line in log if "pgd" in line and "attack_accuracy" in line]
    if not known:
        return False
    best = max(known, key=lambda line: line["pgd"])
    last = known[-1]
    return last["pgd"] < 0.5 * best["pgd"] and last["attack_accuracy"] > best["attack_accuracy"]


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    small, tested = SMALL[args.dataset], TESTED[args.dataset]
    data = load(args.dataset, args.data_dir)
    test = np.asarray(data.test_x[:tested], np.float32), data.test_y[:tested]
    x = jax.numpy.asarray(data.train_x[: small["images"]], jax.numpy.float32)
    y = jax.numpy.asarray(data.train_y[: small["images"]])
    e = str(small["eps"])
    for name, seed, path in runs(args):
        if path.exists():
            continue
        begin, used = time.perf_counter(), time.process_time()
        watched = test[0][:WATCHED], test[1][:WATCHED]
        model, log = trained(args.dataset, name, seed, args.epochs or small["epochs"], x, y, watched)
        spent = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - used}
        record = robust_record(model, *test, eps=[small["eps"]], local=args.local)
        shown = {
            "loss": name,
            "seed": seed,
            "spent": spent,
            "overfitted": overfitted(log),
            "log": log,
            **record,
        }
        path.write_text(json.dumps(shown) + "\n")
        print(
            f"{name}, seed {seed}: natural {record['natural']:.1%}, PGD {record['PGD'][e]:.1%}, AutoAttack "
            f"{record['AutoAttack'][e]:.1%}, certified {record['certified'][e]:.1%}, {spent['cpu']:.0f} CPU s",
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
            lost = sum(r["overfitted"] for r in records)
            rows.append([name, str(len(records)), *cells, seconds, f"{lost} of {len(records)}"])
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
    parser.add_argument("--loops", action="store_true", help="attacks as loops, not written out step by step")
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
