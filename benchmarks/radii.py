"""Certified radii of plainly trained networks: by global and local constants, by the dual, beside the nearest attack.

    python benchmarks/radii.py                    MLPs and a CNN on digits, minutes
    python benchmarks/radii.py --data-dir DATA    and MLPs 784-100-100-10 on MNIST
    python benchmarks/radii.py --images 20 --norms 2 --nets digits-mlp

Networks are trained in the same run by cross-entropy alone. Images are the first that are classified correctly; radii
are about the inputs in [0, 1], in pixels. All of them are verified, from `certified_radius`: with LipSDP for all pairs
of classes; with local bounds; with the dual of `lb.margins`, too (`lb.Local(margins=True)`). FAB-T finds misclassified
points; its distance bounds from above what any radius can be, and the run fails if one is below a radius. Ratios are
medians over the images of one radius to another.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
from common import Json, command_line, environment, keep, table
from rich.console import Console
from rich.progress import track

import lipbounds as lb
from lipbounds import analysis
from lipbounds.training import Config, fit
from lipbounds.training.data import load

NETS = {
    "digits-mlp": {"dataset": "digits", "arch": "64-64-64-10", "epochs": 40},
    "digits-tanh": {"dataset": "digits", "arch": "64-64-64-10", "activation": "tanh", "epochs": 40},
    "digits-gelu": {"dataset": "digits", "arch": "64-64-64-10", "activation": "gelu", "epochs": 40},
    "digits-cnn": {"dataset": "digits", "arch": "2C2F", "epochs": 40},
    "mnist-mlp": {"dataset": "mnist", "arch": "784-100-100-10", "epochs": 2},
    "mnist-gelu": {"dataset": "mnist", "arch": "784-100-100-10", "activation": "gelu", "epochs": 2},
}
ENGINES: dict[str, bool | lb.Local] = {
    "LipSDP": False,
    "local": lb.Local(box=(0.0, 1.0)),
    "dual": lb.Local(box=(0.0, 1.0), margins=True),
}


def trained(settings: Json, data_dir: str | None, images: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """(model, images, labels): the first test images that are classified correctly."""
    data = load(settings["dataset"], data_dir)
    rest = {name: value for name, value in settings.items() if name != "dataset"}
    config = Config.usual(settings["dataset"], loss="cross-entropy", validate_every=0, **rest)
    model = fit(config, data).model
    right = np.flatnonzero(
        np.asarray(model(data.test_x[: 2 * images + 20])).argmax(axis=1) == data.test_y[: 2 * images + 20]
    )
    return model, data.test_x[right[:images]], data.test_y[right[:images]]


def measure(name: str, norm: float, data_dir: str | None, images: int) -> list[Json]:
    model, x, y = trained(NETS[name], data_dir, images)
    form = lb.trace(model, x[0])
    attack = analysis.fab(model, x, y, norm=norm, steps=100, targets=9, low=0.0, high=1.0, progress=False)
    bound = lb.in_norm(form, lb.lipsdp(form, pairwise=True), norm=norm)
    rows, before = list[Json](), None
    for engine, local in ENGINES.items():
        begin = time.perf_counter(), time.process_time()
        radii = lb.certified_radius(form, x, y, bound=bound, local=local)
        wall, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
        assert (radii.radius <= attack.distance).all(), f"an attack succeeded inside a radius of {engine}"
        assert before is None or (radii.radius >= before).all(), f"{engine} found less than the engine before"
        rows.append(
            {
                "net": name,
                "norm": "inf" if norm == math.inf else "2",
                "engine": engine,
                "guarantee": radii.guarantee,
                "images": len(x),
                "radius": float(np.median(radii.radius)),
                "gain": 1.0 if before is None else float(np.median(radii.radius / before)),
                "attacked": float(np.median(attack.distance)),
                "share": float(np.median(radii.radius / attack.distance)),
                "seconds": wall,
                "cpu_seconds": cpu,
            }
        )
        before = radii.radius
    return rows


COLUMNS = (
    "network", "norm", "engine", "guarantee", "images", "radius >=", "gain", "attacked at <=", "radius / attack",
    "s / image", "CPU s / image",
)  # fmt: skip


def cells(one: Json) -> list[str]:
    first = [one[key] for key in ("net", "norm", "engine", "guarantee")]
    figures = [f"{one['radius']:.4g}", f"{one['gain']:.2f}", f"{one['attacked']:.4g}", f"{one['share']:.3f}"]
    each = [f"{one[key] / one['images']:.3f}" for key in ("seconds", "cpu_seconds")]
    return [*first, str(one["images"]), *figures, *each]


def arguments() -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--data-dir", help="folder with MNIST; without it networks on digits only")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--norms", nargs="+", choices=("2", "inf"), default=["2", "inf"])
    parser.add_argument("--nets", nargs="+", choices=tuple(NETS), help="default: all that the data allow")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    nets = given.nets or [n for n, s in NETS.items() if given.data_dir or s["dataset"] == "digits"]
    pairs = [(net, float(norm)) for net in nets for norm in given.norms]
    rows: list[Json] = []
    for net, norm in track(pairs, "networks", console=Console(stderr=True)):
        rows += measure(net, norm, given.data_dir, given.images)
    where = environment("radii.py")
    title = "Median certified radii inside [0, 1], and what an attack finds"
    shown = table(title, COLUMNS, [cells(one) for one in rows], left=COLUMNS[:4])
    Console(width=170).print(shown)
    keep(given.out, "radii", where, [shown], rows=rows)


if __name__ == "__main__":
    main()
