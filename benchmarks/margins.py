"""Balls certified by the affine dual and by branching, beside local ellipsoids and an attack.

    python benchmarks/margins.py --data-dir DATA                a small-Lipschitz MLP 784-100-100-10 on MNIST, l2
    python benchmarks/margins.py --data-dir DATA --images 50 --seconds 0

The network is trained in the same run, by the GloRo loss. All methods see the same images, the same eps and the same
box [0, 1]; every certified ball is attacked by PGD, which must fail. Times are CPU and wall seconds of the whole phase,
compilation included. Tables and figures go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
from common import Json, command_line, environment, keep, table
from rich.console import Console

import lipbounds as lb
from lipbounds._margins import margins as engine
from lipbounds.analysis.attacks import pgd
from lipbounds.training import Config, fit
from lipbounds.training.data import load

BOX = (0.0, 1.0)


class Phase:
    """Wall and CPU seconds of a block."""

    def __enter__(self) -> Phase:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


def row(method: str, sure: np.ndarray, phase: Phase, images: int, attacked: np.ndarray) -> Json:
    assert not (sure & attacked).any(), f"an attack succeeded inside a ball that {method} certified"
    return {
        "method": method,
        "certified": float(sure.mean()),
        "seconds": phase.wall,
        "cpu_seconds": phase.cpu,
        "images": images,
        "load": os.getloadavg()[0],
    }


def measure(args: argparse.Namespace) -> list[Json]:
    data = load("mnist", args.data_dir)
    config = Config(
        dataset="mnist",
        data_dir=args.data_dir,
        arch="784-100-100-10",
        loss="gloro",
        constants="naive",
        eps=0.6,
        epochs=args.epochs,
        validate_every=0,
    )
    model = fit(config, data).model
    n, eps = args.images, args.eps
    x, y = data.test_x[:n], data.test_y[:n]
    form = lb.trace(model, x[0])
    with Phase() as phase:
        attack = pgd(model, x, y, eps, steps=200, restarts=5, low=BOX[0], high=BOX[1], progress=False)
    attacked = ~attack.correct | attack.success
    rows = [row("not attacked by PGD", ~attacked, phase, n, attacked)]
    with Phase() as phase:
        bound = lb.liplt(form, pairwise=True)
        radii = lb.certified_radius(form, x, y, bound=bound)
    rows.append(row("global LipLT", radii.certified(eps), phase, n, attacked))
    with Phase() as phase:
        problem = engine.prepare(form, x, y, eps, norm=2, box=BOX)
        correct = (problem.balls.gaps > 0).all(axis=1)
        local = correct & (problem.balls.local > 0).all(axis=1)
    rows.append(row("local ellipsoids", local, phase, n, attacked))
    with Phase() as phase:
        found = engine.decide(engine.prepare(form, x, y, eps, box=BOX))
        sure = np.isin(found, engine.PROOFS)
    rows.append(row("affine dual", sure, phase, n, attacked) | {"open": int((correct & ~local).sum())})
    seconds = args.seconds
    if seconds > 0:
        left = np.flatnonzero(correct & ~sure & ~attacked)
        with Phase() as phase:
            more = sure.copy()
            problem = engine.prepare(form, x[left], y[left], eps, box=BOX)
            more[left] = np.isin(engine.decide(problem, seconds_per_image=seconds), engine.PROOFS)
        rows.append(row(f"branching, {seconds:g} s", more, phase, len(left), attacked) | {"open": len(left)})
    return rows


def cells(one: Json) -> list[str]:
    return [
        one["method"],
        f"{100 * one['certified']:.1f} %",
        str(one["images"]),
        str(one.get("open", "")),
        f"{one['cpu_seconds']:.1f}",
        f"{one['seconds']:.1f}",
        f"{one['cpu_seconds'] / max(one.get('open', one['images']), 1):.2f}",
        f"{one['load']:.1f}",
    ]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--eps", type=float, default=1.25, help="l2, pixel values in [0, 1]")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="wall seconds of branching per open image"
    )
    given = parser.parse_args()
    rows = measure(given)
    where = environment("margins.py")
    where["command"] = where["command"].replace(str(given.data_dir), "DATA")
    title = f"784-100-100-10 on MNIST: certified at eps {given.eps:g} (l2, pixels in [0, 1], box given)"
    columns = ("method", "certified", "images", "open", "CPU s", "wall s", "CPU s / open image", "load")
    shown = table(title, columns, [cells(one) for one in rows], left=columns[:1])
    Console(width=150).print(shown)
    keep(given.out, "margins", where, [shown], rows=rows)


if __name__ == "__main__":
    main()
