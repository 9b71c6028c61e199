"""LipSDP: value and time of the recursion, of Clarabel and SCS through CVXPY, and of eclipse-nn if installed.

    python benchmarks/lipsdp.py                       all nets, all methods (an hour: the peers are slow)
    python benchmarks/lipsdp.py --quick               four small nets, one minute at most for each cell
    python benchmarks/lipsdp.py --nets 20-40-40-10 "32-[64]x5-10" --solvers recursion clarabel
    python benchmarks/lipsdp.py --plot                time against width and against depth, and nothing else
    python benchmarks/lipsdp.py --cold                the first call of a fresh process, and a second net of its shapes

`20-40-10` has 20 inputs, one hidden layer of 40 relus and 10 outputs; `[20]x8` repeats a layer; a name that
ends in "leaky" has slopes 0.1 and 1. Entries of a weight matrix are N(0, 1) / sqrt(fan in), seed 0, no
biases: anyone can run this again.

Every cell (one net, one method) is a process of its own with a time limit, run one after another; imports and
tracing are not counted. "first" is the first call, compilation included, "second" the same call on a new
trace of the net, which compiles nothing and finds no cached result. Ratios are of second calls within one
run. "lipsdp" is `lb.lipsdp(form)` as a user calls it: nets of up to 2048 multipliers and inputs are solved to the
optimum on the dense form, larger ones by the ellipsoid recursion, and the remark says which; "recursion" is the
recursion alone.

Values of eclipse-nn (`pip install eclipse-nn`) are as reported: nothing proves them. Tables, figures and
numbers go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Json, command_line, environment, keep, peak_gigabytes, table
from rich.console import Console
from rich.table import Table

import lipbounds as lb

NETS = (
    "20-40-40-10",
    "20-40-40-40-40-10",
    "10-[20]x8-5",
    "64-32-32-10",
    "784-256-256-256-10",
    "784-[128]x20-10",
    "784-1024-1024-10",
    "64-[64]x64-64 leaky",
    "residual MLP, 8 blocks",
    "digits CNN",
)
QUICK = ("20-40-40-10", "10-[20]x8-5", "64-32-32-10", "digits CNN")
WIDTHS = tuple(f"64-[{width}]x3-10" for width in (16, 32, 64, 128, 256, 512))
DEPTHS = tuple(f"64-[64]x{depth}-10" for depth in (2, 4, 8, 16, 32, 64))
COLD = (("5-[50]x6-5", True), ("1-[128]x3-1", False), ("64-[128]x2-10", True), ("100-[400]x2-10", False))
LEAK = 0.1
ONCE = 30.0  # seconds after which a call is not repeated


# ------------------------------------------------------------------------------------------------------ nets
def matrix(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """(out, in...) with entries N(0, 1) / sqrt(fan in)."""
    return rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


def chain(name: str, seed: int = 0) -> tuple[list[np.ndarray], bool]:
    """Weights (out, in) of a chain by its name, and whether it is leaky. ValueError for other names."""
    text, leaky = name.removesuffix(" leaky"), name.endswith(" leaky")
    widths: list[int] = []
    for part in text.split("-"):
        found = re.fullmatch(r"\[(\d+)\]x(\d+)|(\d+)", part)
        if found is None:
            raise ValueError(f"no net {name!r}: a chain reads 20-[40]x2-10, others are {', '.join(SPECIAL)}")
        widths += [int(found[3])] if found[3] else [int(found[1])] * int(found[2])
    if len(widths) < 3 or min(widths) < 1:
        raise ValueError(f"a chain needs at least one hidden layer, got {name!r}")
    rng = np.random.default_rng(seed)
    return [matrix(rng, n, m) for m, n in itertools.pairwise(widths)], leaky


def residual() -> lb.LureForm:
    """Stem 32 -> 64, eight blocks h + B relu(A h) of width 64, head 64 -> 10."""
    rng = np.random.default_rng(0)
    stem, head = matrix(rng, 64, 32), matrix(rng, 10, 64)
    blocks = [(matrix(rng, 64, 64), matrix(rng, 64, 64)) for _ in range(8)]

    def network(x: jax.Array) -> jax.Array:
        h = jnp.float32(stem) @ x
        for a, b in blocks:
            h = h + jnp.float32(b) @ jax.nn.relu(jnp.float32(a) @ h)
        return jnp.float32(head) @ h

    return lb.trace(network, jax.ShapeDtypeStruct((32,), jnp.float32))


def digits_cnn() -> lb.LureForm:
    """8 x 8 x 1, two 3 x 3 convolutions of stride 2 with 8 and 16 channels and relus, dense to 10."""
    rng = np.random.default_rng(0)
    kernels = [matrix(rng, 8, 1, 3, 3), matrix(rng, 16, 8, 3, 3)]
    head = matrix(rng, 10, 64)

    def network(x: jax.Array) -> jax.Array:
        h = x[None]
        for kernel in kernels:
            h = jax.lax.conv_general_dilated(
                h, jnp.float32(kernel), (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "OIHW", "NHWC")
            )
            h = jax.nn.relu(h)
        return jnp.float32(head) @ h.ravel()

    return lb.trace(network, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))


SPECIAL: dict[str, Callable[[], lb.LureForm]] = {
    "residual MLP, 8 blocks": residual,
    "digits CNN": digits_cnn,
}


def build(name: str) -> lb.LureForm:
    if name in SPECIAL:
        return SPECIAL[name]()
    weights, leaky = chain(name)
    slopes = [(LEAK, 1.0)] * (len(weights) - 1) if leaky else None
    return lb.from_weights(weights, slopes=slopes)


# --------------------------------------------------------------------------------------------------- methods
def eclipse(name: str, method: str) -> Callable[[], Json]:
    """eclipse-nn on the same weights: chains only, all activations with slopes in [0, 1], its default."""
    if name in SPECIAL:
        raise ValueError("eclipse-nn reads chains of dense layers only")
    try:
        import torch
        from eclipse_nn.LipConstEstimator import LipConstEstimator  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError(f"eclipse-nn is not installed ({error}): pip install eclipse-nn") from error
    weights = [torch.from_numpy(w) for w in chain(name)[0]]

    def run() -> Json:
        talk = io.StringIO()
        with contextlib.redirect_stdout(talk):
            value = LipConstEstimator(weights=list(weights)).estimate(method)
        said = " ".join(talk.getvalue().split())
        if value is None or not np.isfinite(float(value)):
            raise ValueError(f"no number: {value} {said}")
        notes = ["fell back to ECLipsE-Fast"] if "Falling back" in said else [said] if said else []
        return dict(value=float(value), guarantee="as reported", notes=notes)

    return run


def ours(name: str, call: Callable[[lb.LureForm], Any]) -> Callable[[], Json]:
    forms = [build(name), build(name)]

    def run() -> Json:
        result = call(forms.pop())
        guarantee = getattr(result, "guarantee", "attained")
        record: Json = dict(value=result.value, guarantee=guarantee, notes=list(result.notes))
        if result.pairwise is not None:
            record |= dict(worst_pair=float(result.pairwise.max()), average_pair=result.average_pair())
        return record

    return run


def lipsdp(**options: Any) -> Callable[[str], Callable[[], Json]]:
    return lambda name: ours(name, lambda form: lb.lipsdp(form, **options))


SOLVERS: dict[str, Callable[[str], Callable[[], Json]]] = {
    "slope found": lambda name: ours(name, lambda form: lb.empirical(form)),
    "lipsdp": lipsdp(),
    "lipsdp, layer": lipsdp(multipliers="layer"),
    "lipsdp, pairs": lipsdp(pairwise=True),
    "recursion": lipsdp(solver=lb.Recursion(start_at=0)),
    "clarabel": lipsdp(solver="clarabel"),
    "scs": lipsdp(solver="scs"),
    "eclipse": lambda name: eclipse(name, "ECLipsE"),
    "eclipse-fast": lambda name: eclipse(name, "ECLipsE_Fast"),
    "liplt": lambda name: ours(name, lb.liplt),
    "naive": lambda name: ours(name, lb.naive),
}
SWEPT = ("lipsdp", "recursion", "clarabel", "scs", "eclipse", "eclipse-fast")


def cell(name: str, solver: str) -> Json:
    """One net, one method, in this process: its result and seconds, or the reason why there is none."""
    record: Json = dict(net=name, method=solver)
    try:
        run = SOLVERS[solver](name)
        begin = time.perf_counter()
        record |= run()
        record["first_seconds"] = time.perf_counter() - begin
        if record["first_seconds"] < ONCE or solver.startswith(("lipsdp", "recursion")):
            begin = time.perf_counter()
            again = run()
            record["second_seconds"] = time.perf_counter() - begin
            record["repeats"] = again["value"] == record["value"]
    except Exception as error:  # a peer may raise anything; a row says what
        text = " ".join(str(error).split()) or "no message"
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        record |= dict(value=None, reason=kind + text)
    return record | dict(peak_gigabytes=peak_gigabytes(children=True))


def cell_apart(name: str, solver: str, limit: float) -> Json:
    """`cell` in a process of its own, ended with all its children after `limit` seconds."""
    command = [sys.executable, __file__, "--cell", name, solver]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return dict(net=name, method=solver, value=None, reason=f"not done after {limit:g} s")
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    if child.returncode != 0 or not out.strip():
        last = (err.strip().splitlines() or ["no message"])[-1]
        return dict(net=name, method=solver, value=None, reason=f"ended with {child.returncode}: {last}")
    return json.loads(out.splitlines()[-1])


def measure(nets: Iterable[str], solvers: Iterable[str], limit: float, save: Callable[[list], None]) -> list:
    """All cells, one after another; `save` gets the rows after each net, so that a stopped run keeps them."""
    rows: list[Json] = []
    for name in nets:
        mine: list[Json] = []
        for solver in solvers:
            mine.append(cell_apart(name, solver, limit))
            row = mine[-1]
            said = row["reason"] if row["value"] is None else f"{row['value']:.6g}, {seconds(row):.3g} s"
            print(f"{name}: {solver}: {said}", file=sys.stderr, flush=True)
        rows += ratios(mine)
        save(rows)
    return rows


def seconds(row: Json) -> float:
    """Of the second call where there is one."""
    return float(row["second_seconds"] if "second_seconds" in row else row["first_seconds"])


def ratios(rows: list[Json]) -> list[Json]:
    """Rows of one net with value and time over those of `lipsdp`, and value over the slope found."""
    known = {row["method"]: row for row in rows if row["value"]}
    base, found = known.get("lipsdp"), known.get("slope found")
    out = []
    for row in rows:
        more: Json = {}
        if row["value"] and base:
            more |= dict(value_ratio=row["value"] / base["value"], time_ratio=seconds(row) / seconds(base))
        if row["value"] and found:
            more["over_slope"] = row["value"] / found["value"]
            more["below_slope"] = row["value"] < found["value"]
        out.append(row | more)
    return out


def sweep(nets: Iterable[str], limit: float) -> list[Json]:
    """The methods that solve something on growing nets; one that fails is not tried on larger ones."""
    rows, out = [], set()
    for name in nets:
        for solver in (s for s in SWEPT if s not in out):
            rows.append(cell_apart(name, solver, limit))
            out |= {solver} if rows[-1]["value"] is None else set()
            said = rows[-1].get("reason") or f"{seconds(rows[-1]):.3g} s"
            print(f"{name}: {solver}: {said}", file=sys.stderr, flush=True)
    return rows


# --------------------------------------------------------------------------------------------- cold and warm
def cold(name: str, pairwise: bool, started: float) -> Json:
    """In this process, begun at `started`: `lb.lipsdp` of a chain, then of one of its shapes with other weights."""
    found: Json = {}
    for seed, what in enumerate(("cold", "warm")):
        form = lb.from_weights(chain(name, seed)[0])
        wall, cpu = time.perf_counter(), time.process_time()
        bound = lb.lipsdp(form, pairwise=pairwise, progress=False)
        found |= {what: time.perf_counter() - wall, f"{what}_cpu": time.process_time() - cpu}
        found |= {f"{what}_value": bound.value}
        if seed == 0:
            found |= dict(value=bound.value, notes=list(bound.notes), process_cpu=time.process_time())
            found["process"] = time.time() - started
    return found


def cold_rows() -> list[Json]:
    """Each case of `COLD` in a process of its own, without compiled programs of earlier ones."""
    rows = []
    for name, pairwise in COLD:
        command = [
            sys.executable,
            __file__,
            "--cold-cell",
            name,
            "pairs" if pairwise else "",
            str(time.time()),
        ]
        free = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        load = os.getloadavg()[0]
        done = subprocess.run(command, capture_output=True, text=True, env=free, check=True)
        rows.append(dict(net=name, pairwise=pairwise, load=load) | json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {rows[-1]['cold']:.2f} s, then {rows[-1]['warm']:.2f} s", file=sys.stderr, flush=True)
    return rows


def cold_table(rows: list[Json]) -> Table:
    columns = ("net", "pairs", "value", "first call, s", "CPU s", "with imports, s", "CPU s", "second net, s",
               "CPU s", "load", "remark")  # fmt: skip
    keys = ("cold", "cold_cpu", "process", "process_cpu", "warm", "warm_cpu", "load")
    lines = [
        [r["net"], "all" if r["pairwise"] else "", f"{r['value']:.6g}", *(f"{r[k]:.2f}" for k in keys)]
        + ["; ".join(r["notes"])]
        for r in rows
    ]
    return table("lipsdp in a fresh process, and of a second net of the same shapes", columns, lines, LEFT)


# -------------------------------------------------------------------------------------------------- results
LEFT = ("net", "method", "guarantee", "remark")
COLUMNS = ("net", "method", "value", "/ slope found", "/ lipsdp", "guarantee", "first, s", "second, s") + (
    "time / lipsdp", "GB", "remark",
)  # fmt: skip


def cells(row: Json) -> list[str]:
    """A row of the table."""

    def number(key: str, form: str) -> str:
        return "" if row.get(key) is None else format(row[key], form)

    remark = row.get("reason") or said(row)
    if row.get("below_slope") and row["method"] != "slope found":
        remark = "BELOW a slope that is attained; " + remark
    if row.get("average_pair") is not None:
        remark += f"; worst pair {row['worst_pair']:.5g}, average {row['average_pair']:.5g}"
    return [
        row["net"], row["method"], number("value", ".6g"), number("over_slope", ".3f"),
        number("value_ratio", ".4f"), row.get("guarantee", ""), number("first_seconds", ".3g"),
        number("second_seconds", ".3g"), number("time_ratio", ".3g"), number("peak_gigabytes", ".2f"), remark[:400],
    ]  # fmt: skip


def said(row: Json) -> str:
    """What found the value: the engine and its steps for ours, the peer's own words, once each."""
    return "; ".join(row["notes"]) if row["method"] not in ("slope found", "liplt", "naive") else ""


def draw(sweeps: dict[str, list[Json]], path: Path) -> None:
    """Seconds of the second call (first call dotted) against width and depth, log scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"width": "64-[width]x3-10", "depth": "64-[64]xdepth-10"}
    for ax, (what, rows) in zip(axes, sweeps.items(), strict=True):
        for colour, solver in zip(
            ("#000000", "#228833", "#4477aa", "#66ccee", "#cc6677", "#ccbb44"), SWEPT, strict=True
        ):
            mine = [row for row in rows if row["method"] == solver and row["value"] is not None]
            found = [re.search(r"\[(\d+)\]x(\d+)", row["net"]) for row in mine]
            x = [int(f[1 if what == "width" else 2]) for f in found if f]
            ax.plot(x, [seconds(row) for row in mine], "o-", color=colour, label=solver)
            if solver == "recursion":
                first = [row["first_seconds"] for row in mine]
                ax.plot(x, first, ":", color=colour, label="recursion, with compilation")
        ax.set(xscale="log", yscale="log", xlabel=what, title=titles[what])
        ticks = sorted(
            {
                int(n)
                for row in rows
                for n in re.findall(r"\d+", row["net"])[1 if what == "width" else 2 :][:1]
            }
        )
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def shown(rows: list[Json]) -> Table:
    return table("bounds of L in l2: value and time", COLUMNS, [cells(row) for row in rows], LEFT)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--nets", nargs="+", metavar="NET", help="names as above (default: all of the table)")
    parser.add_argument(
        "--solvers", nargs="+", choices=SOLVERS, metavar="METHOD", help=f"of: {', '.join(SOLVERS)}"
    )
    parser.add_argument("--quick", action="store_true", help="four small nets, 60 seconds a cell")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of one cell (default 900, quick 60)")
    parser.add_argument(
        "--plot", action="store_true", help="only the sweeps over width and depth, and their figure"
    )
    parser.add_argument("--cell", nargs=2, metavar=("NET", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--cold", action="store_true", help="only first calls of fresh processes, and second nets"
    )
    parser.add_argument("--cold-cell", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cold_cell:
        print(json.dumps(cold(args.cold_cell[0], bool(args.cold_cell[1]), float(args.cold_cell[2]))))
        return
    if args.cell:
        print(json.dumps(cell(*args.cell)))
        return
    nets = tuple(args.nets or (QUICK if args.quick else NETS))
    for name in nets:
        if name not in SPECIAL:
            chain(name)
    limit = args.limit or (60.0 if args.quick else 900.0)
    where = environment("lipsdp.py", ("cvxpy", "clarabel", "scs", "eclipse-nn")) | dict(limit_seconds=limit)
    stem = "lipsdp-" + where["device"].split()[0] + ("-quick" if args.quick else "")
    if args.cold:
        rows = cold_rows()
        keep(
            args.out,
            f"{stem}-cold",
            where | dict(load_after=os.getloadavg()[0]),
            [cold_table(rows)],
            rows=rows,
        )
        Console(width=160).print(cold_table(rows))
        return
    if args.plot:
        few = 3 if args.quick else None
        sweeps = {"width": sweep(WIDTHS[:few], limit), "depth": sweep(DEPTHS[:few], limit)}
        keep(args.out, f"{stem}-sweeps", where | dict(load_after=os.getloadavg()[0]), sweeps=sweeps)
        draw(sweeps, args.out / f"{stem}-sweeps.png")
        return

    def save(rows: list[Json]) -> None:
        keep(args.out, stem, where | dict(load_after=os.getloadavg()[0]), [shown(rows)], rows=rows)

    Console(width=160).print(shown(measure(nets, args.solvers or SOLVERS, limit, save)))


if __name__ == "__main__":
    main()
