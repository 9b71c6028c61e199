"""Images certified per second, by global and by local bounds, against the size of the network.

    python benchmarks/certify.py                      MLPs on digits
    python benchmarks/certify.py --data-dir DATA      MLPs on MNIST, all 10 000 test images with --images 10000

Networks are trained plainly in the same run. Global: LipLT for all pairs of classes, then the radii of all images.
Local: `certified_radius(..., local=True)` with the same global bound. The table shows the time of both, the ratio, and
what the local bound certifies beyond the global one.
"""

from __future__ import annotations

import time

import numpy as np
from common import Json, command_line, environment, keep, table
from rich.console import Console
from rich.progress import track

import lipbounds as lb
from lipbounds.training import Config, fit
from lipbounds.training.data import load


def measure(widths: str, dataset: str, data_dir: str | None, images: int, epochs: int, eps: float) -> Json:
    data = load(dataset, data_dir)
    config = Config.usual(dataset, arch=widths, loss="cross-entropy", epochs=epochs, validate_every=0)
    model = fit(config, data).model
    x, y = data.test_x[:images], data.test_y[:images]
    form = lb.trace(model, x[0])
    begin = time.perf_counter()
    bound = lb.liplt(form, pairwise=True)
    wide = lb.certified_radius(form, x, y, bound=bound)
    middle = time.perf_counter()
    near = lb.certified_radius(form, x, y, bound=bound, local=True)
    end = time.perf_counter()
    assert (near.radius >= wide.radius).all()
    gain = near.radius[wide.radius > 0] / wide.radius[wide.radius > 0]
    return {
        "network": widths,
        "images": len(y),
        "clean": float(near.correct.mean()),
        "global_seconds": middle - begin,
        "local_seconds": end - middle,
        "global_certified": wide.accuracy(eps),
        "local_certified": near.accuracy(eps),
        "median_gain": float(np.median(gain)) if gain.size else 1.0,
        "guarantee": near.guarantee,
    }


COLUMNS = ("network", "guarantee", "images", "clean", "global", "local", "gain") + (
    "global s", "local s", "local / global", "images/s",
)  # fmt: skip


def cells(row: Json) -> list[str]:
    """A row of the table."""
    first, second = row["global_seconds"], row["local_seconds"]
    shares = [f"{100 * row[key]:.2f} %" for key in ("clean", "global_certified", "local_certified")]
    times = [f"{first:.2f}", f"{second:.2f}", f"{second / first:.1f}", f"{row['images'] / second:.1f}"]
    return [
        row["network"],
        row["guarantee"],
        str(row["images"]),
        *shares,
        f"{row['median_gain']:.2f}",
        *times,
    ]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[32, 64, 128, 256], help="of two hidden layers"
    )
    parser.add_argument("--data-dir", help="folder with MNIST; digits without it")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--eps", type=float, default=0.25, help="l2, pixel values in [0, 1]")
    given = parser.parse_args()
    dataset, n = ("mnist", 784) if given.data_dir else ("digits", 64)
    rows = []
    for width in track(given.widths, console=Console(stderr=True), transient=True):
        row = measure(
            f"{n}-{width}-{width}-10", dataset, given.data_dir, given.images, given.epochs, given.eps
        )
        rows.append(row)
    where = environment("certify.py")
    where["command"] = where["command"].replace(str(given.data_dir), "DATA")
    title = f"{dataset}: certified at eps {given.eps:g} (l2, pixels in [0, 1])"
    shown = table(title, COLUMNS, [cells(row) for row in rows], left=COLUMNS[:2])
    Console(width=150).print(shown)
    keep(given.out, f"certify-{dataset}-{where['device'].split()[0]}", where, [shown], rows=rows)


if __name__ == "__main__":
    main()
