"""What LipLT costs: as an estimate inside a training step, and as a proof.

    python benchmarks/liplt.py                    estimates against one training step, all sizes
    python benchmarks/liplt.py --verified         proofs of 2C2F and 6C2F as well (minutes, up to 6 GB)
    python benchmarks/liplt.py --quick            few sizes, few repetitions

The nets are those of the CRM paper: 4C3F on MNIST images, 6C2F on CIFAR-10 images, with initial weights. The peer of an
estimate is one training step of the same net in the same run: loss and gradient of the cross-entropy on a batch of 512,
and an Adam update. The estimate is taken as a training loop takes it, traced from the parameters inside the jitted
function. Times are medians; compilation is apart. Tables and figures go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from common import Json, command_line, environment, in_a_process, keep, peak_gigabytes, table
from flax import nnx
from rich.console import Console
from rich.table import Table

import lipbounds as lb
from lipbounds.training.models import ModelSpec, build

NETS = {"4C3F": (28, 28, 1), "6C2F": (32, 32, 3)}
PROVED = {"2C2F": (28, 28, 1), "6C2F": (32, 32, 3)}
BATCH = 512


def timed(calls: dict[str, tuple[Callable[..., Any], tuple]], repeat: int) -> dict[str, tuple[float, float]]:
    """{name: (compile seconds, median seconds)} of jitted functions, run in turns: other load slows all alike."""
    first: dict[str, float] = {}
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for name, (fn, args) in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        first[name] = time.perf_counter() - start
    for _ in range(repeat):
        for name, (fn, args) in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(*args))
            runs[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in runs.items()}
    return {name: (max(first[name] - medians[name], 0.0), medians[name]) for name in calls}


def training_step(
    graph: Any, state: Any, shape: tuple[int, ...], classes: int
) -> tuple[Callable[..., Any], tuple]:
    """One step on a batch of 512, and its arguments."""
    tool = optax.adam(1e-3)
    x = jax.random.uniform(jax.random.key(1), (BATCH, *shape))
    y = jax.random.randint(jax.random.key(2), (BATCH,), 0, classes)

    @jax.jit
    def step(params: Any, optimiser: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = nnx.merge(graph, params)(x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, optimiser = tool.update(grads, optimiser)
        return optax.apply_updates(params, updates), optimiser, value

    return step, (state, tool.init(state), x, y)


def estimates(name: str, sizes: list[tuple[int, int]], repeat: int) -> list[Json]:
    """Value, and value with gradient, of the pairwise LipLT estimate, against a training step."""
    shape = NETS[name]
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    calls: dict[str, tuple[Callable[..., Any], tuple]] = {}
    for classes, steps in sizes:
        graph, state = nnx.split(build(ModelSpec(name, shape, {"classes": classes})))
        vectors = lb.liplt.core.init(lb.trace(nnx.merge(graph, state), spec), jax.random.key(0))

        def constant(params: Any, vectors: Any, graph: Any = graph, steps: int = steps) -> Any:
            traced = lb.trace(lambda x: nnx.merge(graph, params)(x), spec)
            constants, vectors = lb.liplt.core(traced, vectors, steps=steps, pairwise=True)
            return constants.pairwise.mean(), vectors

        if f"train {classes}" not in calls:
            calls[f"train {classes}"] = training_step(graph, state, shape, classes)
        calls[f"value {classes} {steps}"] = jax.jit(constant), (state, vectors)
        calls[f"gradient {classes} {steps}"] = (
            jax.jit(jax.value_and_grad(constant, has_aux=True)),
            (state, vectors),
        )
    times = timed(calls, repeat)
    rows = []
    for classes, steps in sizes:
        plain = times[f"train {classes}"][1]
        for what, key in (("value", "value"), ("value and gradient", "gradient")):
            compiling, seconds = times[f"{key} {classes} {steps}"]
            few = times.get(f"{key} {sizes[0][0]} {steps}")
            rows.append(
                dict(net=name, classes=classes, iterations=steps, what=what, seconds=seconds)
                | dict(compile_seconds=compiling, training_step_seconds=plain, ratio=seconds / plain)
                | dict(times_fewest_classes=seconds / few[1] if few else None)
            )
    return rows


def proof(name: str, guarantee: str) -> Json:
    """One pairwise LipLT bound: seconds, memory, and what each block got."""
    form = lb.trace(build(ModelSpec(name, PROVED[name], {})), jax.ShapeDtypeStruct(PROVED[name], jnp.float32))
    estimate = lb.liplt(form, pairwise=True, guarantee="estimate")
    bound = lb.liplt(form, pairwise=True, guarantee=guarantee)
    blocks = [
        dict(source=p.source, target=p.target, shape=p.shape, norm=p.value, guarantee=p.guarantee, how=p.how)
        for p in bound.parts
    ]
    return dict(
        net=name,
        asked=guarantee,
        guarantee=bound.guarantee,
        value=bound.value,
        estimate=estimate.value,
        ratio=bound.value / estimate.value,
        seconds=bound.seconds,
        estimate_seconds=estimate.seconds,
        peak_gigabytes=peak_gigabytes(),
        blocks=blocks,
    )


COST = (
    "net",
    "classes",
    "iterations",
    "what",
    "ms",
    "training step, ms",
    "ratio",
    "x 10 classes",
    "compile, s",
)
PROOF = ("net", "asked", "guarantee", "bound", "estimate", "bound / estimate", "s", "estimate, s", "GB")
BLOCK = ("from", "to", "shape", "norm", "guarantee", "how")


def tables(estimated: list[Json], proved: list[Json]) -> list[Table]:
    cost = [
        [
            r["net"], str(r["classes"]), str(r["iterations"]), r["what"], f"{1e3 * r['seconds']:.1f}",
            f"{1e3 * r['training_step_seconds']:.1f}", f"{r['ratio']:.3f}",
            f"{r['times_fewest_classes']:.1f}" if r["times_fewest_classes"] else "", f"{r['compile_seconds']:.1f}",
        ]
        for r in estimated
    ]  # fmt: skip
    out = [
        table("pairwise LipLT estimate against one training step (batch 512)", COST, cost, ("net", "what"))
    ]
    if proved:
        rows = [
            [
                r["net"], r["asked"], r["guarantee"], f"{r['value']:.6g}", f"{r['estimate']:.6g}", f"{r['ratio']:.6f}",
                f"{r['seconds']:.1f}", f"{r['estimate_seconds']:.1f}", f"{r['peak_gigabytes']:.1f}",
            ]
            for r in proved
        ]  # fmt: skip
        out.append(table("pairwise LipLT proved (initial weights)", PROOF, rows, PROOF[:3]))
    for r in proved:
        rows = [
            [
                b["source"],
                b["target"],
                " x ".join(map(str, b["shape"])),
                f"{b['norm']:.6g}",
                b["guarantee"],
                b["how"],
            ]
            for b in r["blocks"]
        ]
        out.append(table(f"{r['net']}, {r['asked']}: what each block got", BLOCK, rows, BLOCK))
    return out


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="10 and 200 classes, 5 iterations, 3 repetitions"
    )
    parser.add_argument("--verified", action="store_true", help="also prove 2C2F and 6C2F")
    parser.add_argument("--no-estimates", action="store_true", help="only the proofs")
    parser.add_argument("--proof", nargs=2, metavar=("NET", "GUARANTEE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.proof:
        print(json.dumps(proof(*args.proof)))
        return
    sizes = (
        [(10, 5), (200, 5)] if args.quick else [(10, 5), (10, 10), (200, 5), (200, 10), (1000, 5), (1000, 10)]
    )
    where = environment("liplt.py")
    estimated, proved = [], []
    for name in NETS if not args.no_estimates else ():
        estimated += estimates(name, sizes, 3 if args.quick else 7)
        print(f"{name}: done", file=sys.stderr)
    if args.verified:
        asked = [(name, guarantee) for name in PROVED for guarantee in ("verified", "auto")]
        proved = [in_a_process(__file__, "--proof", *words) for words in asked]
    where["load_after"] = os.getloadavg()[0]
    shown = tables(estimated, proved)
    for one in shown:
        Console(width=130).print(one)
    stem = "liplt-" + where["device"].split()[0] + ("-proofs" if args.no_estimates else "")
    keep(args.out, stem + ("-quick" if args.quick else ""), where, shown, estimates=estimated, proofs=proved)


if __name__ == "__main__":
    main()
