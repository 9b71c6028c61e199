"""Networks as people write them: what tracing and bounds cost on each, and how tight the bounds are.

    python benchmarks/gallery.py                               all, 32 x 32 x 3, minutes
    python benchmarks/gallery.py --size small --names u_net    8 x 8, seconds

The zoo of the tests has nets of a few neurons, one per primitive. The gallery adds what such nets cannot show: the
modules of published architectures (`gallery_nets`) at sizes where operators have thousands of rows, BatchNorm with the
running statistics of data, weights after a short training (scikit-learn's digits, resized; fixed seed), and times.

Per network: seconds to trace and for each bound; the largest slope that `lb.empirical` attains (a lower bound); naive,
LipLT and, where states are narrow enough for its ellipsoids, LipSDP as multiples of it; and around single images the
local constant on a ball against the norm of the Jacobian at its centre, which that ball attains. A network that
`lb.trace` refuses is listed with the reason. No column holds bounds of two kinds.

Images carry noise of standard deviation 0.02: on a flat background every max pooling stands on a tie, where the
constant of the smallest ball is above the norm of the Jacobian.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Json, command_line, environment, keep, peak_gigabytes, table
from flax import nnx
from gallery_nets import GALLERY, SIZES, Network, Size
from rich.console import Console
from rich.progress import track
from rich.table import Table

import lipbounds as lb
from lipbounds._comparison.bracket import Bracket
from lipbounds._lipsdp.state_matrices import TAIL, first_tap
from lipbounds._text.tables import show
from lipbounds.training.data import digits

RADII = (1e-6, 0.01, 0.1)
"""Of the balls of the local bounds, l2, pixels in [0, 1]."""


# ------------------------------------------------------------------------------------------- weights
@functools.cache
def images(size: Size, noise: float = 0.02) -> tuple[Any, Any, Any, Any]:
    """Training images and labels, test images and labels: digits in this size, grey in every colour, with noise."""
    data, rng = digits(), np.random.default_rng(0)

    def resized(x: np.ndarray) -> np.ndarray:
        large = jax.image.resize(jnp.asarray(x), (len(x), size.side, size.side, 1), "linear")
        grey = np.repeat(np.asarray(large), size.colours, axis=-1)
        return (grey + noise * rng.standard_normal(grey.shape)).astype(np.float32)

    return resized(data.train_x), data.train_y, resized(data.test_x), data.test_y


@nnx.jit
def step(model: Network, optimiser: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    def loss(model: Network) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimiser.update(model, nnx.grad(loss)(model))


def trained(name: str, size: Size, steps: int, seed: int = 0) -> Network:
    """A member after so many steps of Adam on batches of 64, in evaluation mode; BatchNorm's statistics are those of
    256 training images."""
    model = GALLERY[name](size, nnx.Rngs(seed))
    x, y, _, _ = images(size)
    rng = np.random.default_rng(seed)
    model.train()
    optimiser = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        for _ in range(steps):
            rows = rng.choice(len(x), 64, replace=False)
            step(model, optimiser, x[rows], y[rows])
    model(x[:256])
    model.eval()
    return model


# -------------------------------------------------------------------------------------------- figures
def jacobian_norms(form: lb.LureForm, x: np.ndarray) -> np.ndarray:
    """(N,) spectral norms of the Jacobians of the form at x (N, *in_shape), in float64."""
    with jax.enable_x64(True):
        rows = jax.jit(jax.vmap(jax.jacrev(lambda p: form.evaluate(p, jnp.float64))))(
            jnp.asarray(x, jnp.float64)
        )
        return np.linalg.norm(np.asarray(rows).reshape(len(x), form.num_outputs, -1), 2, axis=(1, 2))


def measure(name: str, size: Size, *, steps: int, climb: int, count: int, lipsdp: bool) -> Json:
    """All figures of one member; of one that is refused, the reason."""
    model = trained(name, size, steps)
    _, _, x, y = images(size)
    begin = time.perf_counter()
    try:
        form = lb.trace(model, x[0])
    except lb.UnsupportedError as error:
        return {
            "network": name,
            "refused": [{"operation": item.primitive, "why": item.reason} for item in error.items],
        }
    tracing = time.perf_counter() - begin
    naive = lb.naive(lb.trace(model, x[0]))  # a form of its own: LipLT shall find no norms ready
    liplt = lb.liplt(form)
    bounds = {"naive": naive, "liplt": liplt}
    if lipsdp and first_tap(form, TAIL) < len(form.taps):
        bounds["lipsdp"] = lb.lipsdp(form)
    found = lb.empirical(form, x[:256], steps=climb)
    tightness = {key: Bracket(found, bound).ratio for key, bound in bounds.items()}
    assert naive.value >= liplt.value >= bounds.get("lipsdp", liplt).value
    return {
        "network": name,
        "parameters": sum(a.size for a in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "taps": len(form.taps),
        "neurons": sum(tap.size_out for tap in form.taps),
        "clean": float((np.asarray(model(x)).argmax(axis=1) == y).mean()),
        "trace_seconds": tracing,
        "attained": found.value,
        "attained_seconds": found.seconds,
        "bounds": {
            key: {
                "value": b.value,
                "guarantee": b.guarantee,
                "seconds": b.seconds,
                "over_attained": tightness[key],
            }
            for key, b in bounds.items()
        },
        "local": near(form, x[:count], min(bounds.values(), key=value_of)),
    }


def value_of(bound: lb.UpperBound) -> float:
    return bound.value


def near(form: lb.LureForm, x: np.ndarray, bound: lb.UpperBound) -> Json:
    """Local bounds around x against the Jacobians there."""
    steepness = jacobian_norms(form, x)
    rows = []
    for eps in RADII:
        found = lb.local(form, x, eps, bound=bound)
        assert (found.value >= steepness * (1 - 1e-9)).all()
        ratio = float(np.median(found.value / steepness))
        rows.append({"eps": eps, "value": float(np.median(found.value)), "over_jacobian": ratio})
        rows[-1] |= {"guarantee": found.guarantee, "seconds_per_image": found.seconds / len(x)}
    return {"images": len(x), "jacobian": float(np.median(steepness)), "balls": rows}


# -------------------------------------------------------------------------------------------- tables
NAMES = {"lipsdp": "LipSDP", "liplt": "LipLT", "naive": "naive"}


def tables(rows: Sequence[Json]) -> list[Table]:
    """Costs, tightness of global bounds, of local ones, and what was refused; numbers are rounded the safe way."""
    bounded, refused = [r for r in rows if "bounds" in r], [r for r in rows if "refused" in r]
    costs, tight, local = [], [], []
    for r in bounded:
        of = {key: r["bounds"].get(key) for key in NAMES}
        costs.append(
            [r["network"], *(str(r[key]) for key in ("parameters", "taps", "neurons"))]
            + [f"{r['trace_seconds']:.2f}"]
            + [f"{b['seconds']:.2f}" if b else "" for b in of.values()]
            + [f"{r['attained_seconds']:.2f}", f"{r['local']['balls'][1]['seconds_per_image']:.2f}"]
        )
        tight.append(
            [r["network"], r["bounds"]["liplt"]["guarantee"], f"{100 * r['clean']:.0f} %"]
            + [show(r["attained"], "down", 4)]
            + [show(b["value"], "up", 4) if b else "" for b in of.values()]
            + [show(b["over_attained"], "up", 3) if b else "" for b in of.values()]
        )
        balls = r["local"]["balls"]
        local.append(
            [r["network"], balls[0]["guarantee"], show(r["local"]["jacobian"], "down", 4)]
            + [show(ball["value"], "up", 4) for ball in balls]
            + [show(ball["over_jacobian"], "up", 4) for ball in balls]
        )
    made = []
    if bounded:
        seconds = [
            *(f"{name}, s" for name in NAMES.values()),
            "attained, s",
            f"local at eps {RADII[1]:g}, s per image",
        ]
        columns = ["network", "parameters", "taps", "neurons", "trace, s", *seconds]
        made.append(table("cost", columns, costs, left=columns[:1]))
        upper = [f"{name}, bound <=" for name in NAMES.values()]
        over = [f"{name} / attained" for name in NAMES.values()]
        columns = ["network", "guarantee", "clean", "attained >=", *upper, *over]
        made.append(table("constants, l2", columns, tight, left=columns[:2]))
        upper = [f"eps {eps:g}, bound <=" for eps in RADII]
        over = [f"eps {eps:g} / Jacobian" for eps in RADII]
        columns = ["network", "guarantee", "Jacobian, attained >=", *upper, *over]
        title = f"around single images, medians of {bounded[0]['local']['images']}, l2"
        made.append(table(title, columns, local, left=columns[:2]))
    if refused:
        why = [[r["network"], item["operation"], item["why"]] for r in refused for item in r["refused"]]
        columns = ["network", "operation", "why"]
        made.append(table("refused by lb.trace", columns, why, left=columns))
    return made


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--names", nargs="+", choices=sorted(GALLERY), default=list(GALLERY), metavar="NAME")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="8 x 8 x 1 or 32 x 32 x 3")
    parser.add_argument("--steps", type=int, default=30, help="of training, on batches of 64")
    parser.add_argument("--climb", type=int, default=30, help="steps of the search for steep places")
    parser.add_argument("--images", type=int, default=4, help="with local bounds")
    parser.add_argument("--no-lipsdp", action="store_true")
    given = parser.parse_args()
    begin, rows = time.perf_counter(), []
    told = Console(stderr=True)
    for name in track(given.names, console=told, transient=True):
        how = {"steps": given.steps, "climb": given.climb, "count": given.images}
        rows.append(measure(name, SIZES[given.size], lipsdp=not given.no_lipsdp, **how))
        told.print(f"{name}: {time.perf_counter() - begin:.0f} s since the start")
    where = environment("gallery.py", ["flax"])
    where["seconds"] = round(time.perf_counter() - begin)
    where["peak_gigabytes"] = round(peak_gigabytes(), 1)
    made = tables(rows)
    for one in made:
        Console(width=190).print(one)
    stem = f"gallery-{where['device'].split()[0]}" + ("" if given.size == "full" else f"-{given.size}")
    keep(given.out, stem, where, made, rows=rows)


if __name__ == "__main__":
    main()
