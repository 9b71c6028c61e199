"""Every attack inside certified radii, where none can succeed: five networks, l2 and l-inf, 200 images each.

    python benchmarks/attacks_inside.py --work DIR             everything that DIR does not hold yet, then the tables
    python benchmarks/attacks_inside.py --work DIR --net NET --norm NORM --quick       one piece, by weaker attacks

The networks are trained on digits. Radii are those of local bounds, LipLT with pairs among them; images are the first
that LipLT certifies at any radius. Every attack of lipbounds.analysis searches every ball of a radius just
below the certified one, per image. A success in float32, or a point that comes back and is misclassified in real
arithmetic (logits in float64 with a proved error), would contradict a certificate. Distances to misclassified points
that FAB and ADBD find without a limit must lie above the radii, and at every eps

    certified accuracy  <=  accuracy under attack  <=  clean accuracy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, Json, command_line, environment, keep, table, write_json
from rich.console import Console

import lipbounds as lb
from lipbounds import analysis
from lipbounds._local import logits
from lipbounds.analysis.autoattack import Stage
from lipbounds.training import Config, fit
from lipbounds.training.data import digits
from lipbounds.training.models import ModelSpec, build

UNDER = 1 - 1e-6  # of the certified radius
NORMS = {"2": 2.0, "inf": math.inf}
_PLAIN = Config(
    dataset="digits", loss="cross-entropy", epochs=20, batch_size=64, learning_rate=5e-3, validate_every=0
)
_CRM = dataclasses.replace(
    _PLAIN, loss="crm", constants="liplt", lam=3.0, r0=0.5, t=10.0, epochs=25, batch_size=128
)


def _residual() -> Any:
    model = build(ModelSpec("residual_cnn", (8, 8, 1), {"blocks": 1, "channels": 4}))
    return fit(_PLAIN, digits(), model=model).model


NETWORKS: dict[str, Callable[[], Any]] = {
    "MLP 64-48-10, relu": lambda: fit(dataclasses.replace(_PLAIN, arch="64-48-10")).model,
    "MLP 64-32-32-10, maxmin": lambda: (
        fit(dataclasses.replace(_PLAIN, arch="64-32-32-10", activation="maxmin")).model
    ),
    "MLP 64-40-40-40-10, CRM": lambda: fit(dataclasses.replace(_CRM, arch="64-40-40-40-10")).model,
    "residual CNN": _residual,
    "LiResNet L1W4": lambda: fit(dataclasses.replace(_PLAIN, arch="liresnet-L1W4")).model,
}


def attacks(norm: float, x: np.ndarray, quick: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, attack(fn, x, y, eps) -> Attack) of every attack at a radius in this norm."""
    queries, steps = (102, 10) if quick else (2040, 50)

    def of(attack: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return lambda fn, x, y, eps: attack(fn, x, y, eps, norm=norm, **options)

    yield "FGSM", of(analysis.fgsm)
    yield "PGD", of(analysis.pgd, steps=steps, restarts=2)
    yield "MI-FGSM", of(analysis.mi_fgsm)
    yield "ODI-PGD", of(analysis.odi_pgd, steps=steps // 2, restarts=2)
    yield "Frank-Wolfe", of(analysis.frank_wolfe, steps=steps)
    yield "Frank-Wolfe by queries", of(analysis.black_frank_wolfe, queries=queries)
    yield "NES-PGD", of(analysis.nes_pgd, queries=queries)
    if quick:
        yield "APGD-CE", of(analysis.apgd, steps=10)
        yield "APGD-T", of(analysis.apgd, steps=10, loss="dlr-t", targets=2)
        yield "FAB-T", of(analysis.fab, steps=5, targets=2)
        yield "Square", of(analysis.square, queries=queries)
    else:
        yield "AutoAttack", of(analysis.autoattack)
    if norm == math.inf:
        yield "RayS", of(analysis.rays, queries=queries)
    else:
        shape = x.shape[1:]
        identity = lambda z, y: z.reshape(-1, *shape)  # noqa: E731
        yield (
            "In-distribution attack",
            lambda fn, x, y, eps: analysis.in_distribution(
                fn, identity, x, y, eps, x.reshape(len(x), -1), steps=2 * steps, rounds=2
            ),
        )


def inside(name: str, norm: float, images: int, quick: bool = False) -> Json:
    """Run every attack inside the radii of a network, in a norm, as plain data."""
    begin = time.process_time()
    model, data = NETWORKS[name](), digits()
    form = lb.trace(model, data.test_x[0])
    bound = lb.liplt(form, norm=norm, pairwise=True)
    every = lb.certified_radius(form, data.test_x, data.test_y, bound=bound)
    some = np.flatnonzero((every.radius > 0) & np.isfinite(every.radius))[:images]
    x, y = data.test_x[some], data.test_y[some]
    radii = lb.certified_radius(form, x, y, bound=bound, local=True)
    eps = UNDER * radii.radius
    rows: list[Json] = []
    for title, attack in attacks(norm, x, quick):
        started = time.process_time()
        found = attack(model, x, y, eps)
        seconds = time.process_time() - started
        exact = _in_real_arithmetic(form, found.adversarial, y)
        # the stages of AutoAttack share the point of the smallest margin
        stages = getattr(found, "stages", ()) or (Stage(title, *_counts(found), found.accuracy, seconds),)
        for stage in stages:
            counts = {"images": stage.attacked, "successes": stage.broken}
            rows.append({"attack": stage.name, **counts, **exact, "seconds": seconds / len(stages)})
    free = [("FAB-T", analysis.fab(model, x, y, norm=norm, steps=5 if quick else 30, targets=2))]
    if norm == math.inf:
        free.append(("ADBD", analysis.adbd(model, x, y, queries=102 if quick else 1000).attack))
    distances = {title: float((f.distance / radii.radius).min()) for title, f in free}
    nearest = np.min([f.distance for _, f in free], axis=0)
    strong = analysis.pgd(model, x, y, 4 * radii.radius, norm=norm, steps=10 if quick else 50)
    nearest = np.minimum(nearest, strong.distance)
    grid = np.quantile(radii.radius, [0.1, 0.25, 0.5, 0.75, 0.9]).tolist()
    return {
        "net": name,
        "norm": "2" if norm == 2 else "inf",
        "accuracy": float(every.correct.mean()),
        "images": len(some),
        "quick": quick,
        "guarantee": radii.guarantee,
        "median_radius": float(np.median(radii.radius)),
        "attacks": rows,
        "broken_at_4_radii": float(strong.success.mean()),
        "least_distance_over_radius": distances,
        "bracket": [
            {
                "eps": e,
                "certified": radii.accuracy(e),
                "attacked": float((strong.correct & (nearest > e)).mean()),
                "clean": float(strong.correct.mean()),
            }
            for e in grid
        ],
        "cpu_seconds": time.process_time() - begin,
    }


def _counts(found: analysis.Attack) -> tuple[int, int]:
    """How many images were attacked and broken."""
    return int(found.correct.sum()), int(found.success.sum())


def _in_real_arithmetic(form: Any, points: np.ndarray, y: np.ndarray) -> Json:
    """How many points are not certainly classified as labelled by their logits in float64, and the least margin."""
    z, error = logits(form, points.astype(np.float64))
    own = z[np.arange(len(y)), y].copy()
    z[np.arange(len(y)), y] = -np.inf
    margin = own - z.max(axis=1)
    return {"misclassified_float64": int((margin <= 2 * error).sum()), "least_margin": float(margin.min())}


def check(record: Json) -> None:
    """AssertionError where a figure contradicts a certificate."""
    for row in record["attacks"]:
        assert row["images"] == record["images"], row
        assert row["successes"] == 0 and row["misclassified_float64"] == 0 and row["least_margin"] > 0, row
    assert min(record["least_distance_over_radius"].values()) >= 1, record["least_distance_over_radius"]
    for row in record["bracket"]:
        assert row["certified"] <= row["attacked"] <= row["clean"], row


def report(records: list[Json], out: Path) -> None:
    """Print both tables, and write them with the figures."""
    nets, totals = [], {}
    for record in records:
        attacked = [
            f"{100 * b['certified']:.1f} / {100 * b['attacked']:.1f} / {100 * b['clean']:.1f}"
            for b in record["bracket"][1:4]
        ]
        nets.append([
            record["net"] + (" (quick)" if record.get("quick") else ""), record["norm"],
            f"{100 * record['accuracy']:.1f}", str(record["images"]),
            f"{record['median_radius']:.4f}", record["guarantee"] + ", local",
            str(sum(row["successes"] for row in record["attacks"])), f"{100 * record['broken_at_4_radii']:.1f}",
            f"{min(record['least_distance_over_radius'].values()):.3f}", *attacked, f"{record['cpu_seconds']:.0f}",
        ])  # fmt: skip
        for row in record["attacks"]:
            total = totals.setdefault((row["attack"], record["norm"]), [0, 0, 0, math.inf])
            total[0] += row["images"]
            total[1] += row["successes"]
            total[2] += row["misclassified_float64"]
            total[3] = min(total[3], row["least_margin"])
    columns = ("net", "norm", "accuracy %", "images", "median radius", "radii", "successes inside",
               "broken by PGD at 4 radii %", "least distance / radius", "certified / attacked / clean % at quartile 1",
               "at the median radius", "at quartile 3", "CPU s")  # fmt: skip
    each = [
        [attack, norm, str(t[0]), str(t[1]), str(t[2]), f"{t[3]:.3g}"]
        for (attack, norm), t in sorted(totals.items())
    ]
    heads = (
        "attack",
        "norm",
        "images",
        "successes",
        "misclassified in float64",
        "least margin left (float64)",
    )
    tables = [
        table("Every attack just below the certified radius, all networks", heads, each, left=("attack",)),
        table("The networks, and how near attacks come", columns, nets, left=("net", "radii")),
    ]
    for one in tables:
        Console(width=220).print(one)
    where = environment("attacks_inside.py", ("numpy",))
    keep(out, "attacks-inside", where, tables, records=records)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of what is done, one file per piece")
    parser.add_argument("--net", choices=tuple(NETWORKS))
    parser.add_argument("--norm", choices=tuple(NORMS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps and queries, and no whole AutoAttack"
    )
    args: argparse.Namespace = parser.parse_args()
    records = []
    for place, name in enumerate(NETWORKS):
        for key, norm in NORMS.items():
            file = args.work / f"{place}-{key}-{args.images}.json"
            if not file.exists() and args.net in (None, name) and args.norm in (None, key):
                found = inside(name, norm, args.images, args.quick)
                write_json(file, found)
                print(f"{name}, {key}: {found['cpu_seconds']:.0f} s of CPU", flush=True)
            if file.exists():
                records.append(json.loads(file.read_text()))
                check(records[-1])
    if records:
        report(records, args.out)


if __name__ == "__main__":
    assert RESULTS.is_dir()
    main()
