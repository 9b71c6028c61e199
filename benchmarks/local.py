"""Images certified at eps around each image, by global and by local bounds, on wide networks trained here.

    python benchmarks/local.py --small                      three small networks on digits, a minute
    python benchmarks/local.py --data-dir DATA              MLP, CNNs, ResNet with 1000 to 8000 neurons a layer, MNIST
    python benchmarks/local.py --data-dir DATA --dataset cifar10 --nets cnn2

Networks are trained by CRM with LipLT in the loss, so their constants are small. At eps (l2, pixels in [0, 1]) an image
is certified where min_i (z_y - z_i) / L_yi > eps with

    global      L of the whole network, LipLT
    LipLT       local LipLT (probabilistic), with --liplt
    hybrid      LipLT up to the last layer wider than 1100, and ellipsoids around the image behind
    ellipsoids  ellipsoids around the image through the whole network

Everything but local LipLT is verified. Every local bound gets `--calls` tries on the ball of radius eps, a later one
with multipliers chosen by what the one before found; ellipsoids of the whole network take one to four recursions in
float32 and one in float64 a try. The last columns are the seconds of one image that the global bound leaves open (wall
time and CPU time, all cores together) and the peak memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from common import Json, command_line, environment, keep, peak_gigabytes, table
from flax import nnx
from rich.console import Console

import lipbounds as lb
from lipbounds._gain.memory_budget import parse
from lipbounds._local.engines import Around
from lipbounds._local.forward import logits, proved_gaps
from lipbounds._local.radius_search import ratios, row_roots
from lipbounds.training import Config, fit
from lipbounds.training.data import load
from lipbounds.training.dataset import Dataset
from lipbounds.training.initial import initialise
from lipbounds.training.models import ConvNet, ResidualCNN

Layers = tuple[Sequence[Sequence[int]], Sequence[int]]
#: Name -> (convolutions (channels, kernel, stride, padding), dense layers); "resnet" is one with residual blocks.
NETS: dict[str, Layers] = {
    "mlp": ([], [1024, 1024]),
    "cnn2": ([(16, 4, 2, 3), (32, 4, 2, 1)], [256]),
    "cnn3": ([(8, 3, 1, 1), (16, 4, 2, 1), (32, 4, 2, 1)], [128]),
    "cnn4": ([(4, 3, 1, 1), (16, 4, 2, 1), (16, 3, 1, 1), (32, 4, 2, 1)], [128]),
}
CIFAR = {"cnn2": ([(16, 4, 2, 1), (32, 4, 2, 1)], [256])}
SMALL = {"mlp": ([], [64, 64]), "cnn2": ([(8, 3, 1, 1), (8, 4, 2, 1)], [32])}
_BRANCH = 0.1  # norm of a residual branch's second layer at the start of the training
RESNET = {"small": {"channels": 4, "blocks": 1}, "full": {"channels": 12, "blocks": 2}}


def widths(form: lb.LureForm) -> list[int]:
    return [tap.size_in for tap in form.taps]


def residual(shape: Sequence[int], options: Json) -> nnx.Module:
    """A ResNet without normalisation that begins near a linear network of norm 1.

    Layers have norm 1 to a few per cent, and the branches begin at a tenth of that: with the usual weights the
    constants of two blocks are so large that the radius term holds the network at constant outputs.
    """
    model = ResidualCNN(shape, **RESNET["small" if options["small"] else "full"], rngs=nnx.Rngs(0))
    initialise(model, "unit")
    for block in model.blocks:
        block.second.kernel[...] = _BRANCH * block.second.kernel[...]
    return model


def trained(name: str, data: Dataset, options: Json) -> lb.LureForm:
    nets = SMALL if options["small"] else CIFAR if data.name == "cifar10" else NETS
    shape = data.train_pixels.shape[1:]
    model: nnx.Module
    if name == "resnet":
        model = residual(shape, options)
    else:
        convolutions, dense = nets[name]
        model = ConvNet(shape, convolutions=convolutions, dense=dense, rngs=nnx.Rngs(0))
    config = Config.usual(
        data.name,
        loss="crm",
        constants="liplt",
        warmup=0,
        ramp=options["epochs"] // 4 if name == "resnet" else 0,
        epochs=options["epochs"],
        batch_size=options["batch"],
        learning_rate=options["rate"],
        final_learning_rate=options["rate"] / 30,
        lam=options["lam"],
        r0=options["r0"],
        t=options["t"],
        validate_every=0,
    )
    some = slice(0, options["train"])
    part = dataclasses.replace(data, train_pixels=data.train_pixels[some], train_y=data.train_y[some])
    done = fit(
        config, part, model=model, progress=lambda line: print(line, flush=True) if options["talk"] else None
    )
    return lb.trace(done.model, data.test_x[0])


def at_eps(around: Around, gaps: np.ndarray, labels: np.ndarray, eps: float, calls: int) -> np.ndarray:
    """Which examples one engine certifies at eps."""
    found = np.zeros(len(labels), bool)

    def work(near: Around, part: slice) -> None:
        own, room = labels[part], gaps[part]
        for call in range(calls):
            left = np.flatnonzero(~found[part])
            radii = np.full(left.size, eps)
            if left.size:
                options = {"enough": True} if near.improves else {}  # no more than is needed at this eps
                out = near.outputs(left, radii, labels=own[left], call=call, **options)
                scale = row_roots(out, own[left])
                m = np.where(np.isinf(scale).any(axis=1), 0.0, ratios(room[left], scale))
                found[part.start + left] |= m > eps

    around.each(work, "at eps")
    return found


def measure(name: str, form: lb.LureForm, data: Dataset, options: Json) -> Json:
    x, y = data.test_x[: options["images"]], data.test_y[: options["images"]]
    eps = options["eps"]
    begin = time.perf_counter()
    bound = lb.liplt(form, pairwise=True)
    whole = lb.certified_radius(form, x, y, bound=bound)
    row: Json = {
        "network": name,
        "widths": widths(form),
        "images": len(y),
        "eps": eps,
        "clean": float(whole.correct.mean()),
        "open": int((whole.correct & ~whole.certified(eps)).sum()),
        "global": {"certified": int(whole.certified(eps).sum()), "seconds": time.perf_counter() - begin},
    }
    assert bound.guarantee == "verified"
    sure = set(np.flatnonzero(whole.certified(eps)).tolist())
    right = np.flatnonzero(whole.correct & ~whole.certified(eps))  # those still open
    gaps = proved_gaps(*logits(form, x[right].astype(np.float64)), y[right])
    sets = {"global": sure}
    for way in ("hybrid", "ellipsoids", *(("LipLT",) if options["liplt"] else ())):
        begin = time.perf_counter()
        cpu = time.process_time()
        try:
            around = Around(form, 2, x[right].astype(np.float64), way=way, memory=parse(options["memory"]))
            ready = time.perf_counter() - begin
            found = at_eps(around, gaps, y[right], eps, 1 if way == "LipLT" else options["calls"])
        except ValueError as error:
            row[way] = {"failed": str(error)}
            continue
        sets[way] = sure | set(right[found].tolist())
        row[way] = {
            "certified": len(sets[way]),
            "guarantee": around.guarantee,
            "ready": ready,
            "seconds": (time.perf_counter() - begin - ready) / max(len(right), 1),
            "cpu": (time.process_time() - cpu) / max(len(right), 1),
        }
        Console().print(name, way, row[way])
    if {"ellipsoids", "hybrid"} <= set(sets):
        row["only_ellipsoids"] = len(sets["ellipsoids"] - sets["hybrid"])
        row["only_hybrid"] = len(sets["hybrid"] - sets["ellipsoids"])
    row["gigabytes"] = peak_gigabytes()
    return row


COLUMNS = ("network", "widths", "images", "open", "eps", "clean") + (
    "global", "LipLT", "hybrid", "ellipsoids", "only ellipsoids", "only hybrid",
    "hybrid s", "ellipsoids s", "CPU s", "GB",
)  # fmt: skip


def cells(row: Json) -> list[str]:
    """A row of the table."""

    def share(way: str) -> str:
        return (
            f"{100 * row[way]['certified'] / row['images']:.1f} %" if "certified" in row.get(way, {}) else "-"
        )

    def figure(way: str, key: str) -> str:
        return f"{row[way][key]:.2f}" if key in row.get(way, {}) else "-"

    return [
        row["network"],
        "-".join(map(str, row["widths"])),
        str(row["images"]),
        str(row["open"]),
        f"{row['eps']:g}",
        f"{100 * row['clean']:.1f} %",
        *(share(way) for way in ("global", "LipLT", "hybrid", "ellipsoids")),
        str(row.get("only_ellipsoids", "-")),
        str(row.get("only_hybrid", "-")),
        figure("hybrid", "seconds"),
        figure("ellipsoids", "seconds"),
        figure("ellipsoids", "cpu"),
        f"{row['gigabytes']:.1f}",
    ]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--small", action="store_true", help="small networks on digits, for a trial")
    parser.add_argument("--dataset", default="mnist", choices=("mnist", "cifar10"))
    parser.add_argument("--data-dir", help="folder with the data set")
    parser.add_argument("--nets", nargs="+", default=[*NETS, "resnet"], choices=[*NETS, "resnet"])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--eps", type=float, default=0.8)
    parser.add_argument("--calls", type=int, default=1, help="tries on the ball of each image")
    parser.add_argument("--memory", default="4GB", help="of the ellipsoids")
    parser.add_argument("--liplt", action="store_true", help="local LipLT, too")
    parser.add_argument("--train", type=int, default=10000, help="training images")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--lam", type=float, default=10.0)
    parser.add_argument("--r0", type=float, default=1.5)
    parser.add_argument("--t", type=float, default=10.0)
    parser.add_argument("--name", help="of the files of the results")
    parser.add_argument("--talk", action="store_true", help="print every epoch")
    options = vars(parser.parse_args())
    name = options["name"] or ("local-small" if options["small"] else f"local-{options['dataset']}-cpu")
    data = load("digits" if options["small"] else options["dataset"], options["data_dir"])
    nets = [net for net in options["nets"] if not options["small"] or net in (*SMALL, "resnet")]
    rows = []
    for net in nets:
        begin = time.perf_counter()
        form = trained(net, data, options)
        seconds = time.perf_counter() - begin
        rows.append(measure(net, form, data, options) | {"training_seconds": seconds})
    where = environment("local.py")
    if options["data_dir"]:
        where["command"] = where["command"].replace(str(options["data_dir"]), "DATA")
    shown = table(
        "Certified at eps (l2, pixels in [0, 1])", COLUMNS, [cells(row) for row in rows], left=COLUMNS[:2]
    )
    Console(width=190).print(shown)
    keep(options["out"], name, where, [shown], rows=rows)


if __name__ == "__main__":
    main()
