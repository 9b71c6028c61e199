"""Norms of convolution operators of 3 000 to 32 768 dimensions: verified, probabilistic, and by Fourier transform.

    python benchmarks/operators.py                    all operators, minutes
    python benchmarks/operators.py --only 32x32       those whose name holds the text

Each operator is a random zero-padded convolution, or two of them one after the other. Every figure comes from a process
of its own, whose peak memory is that of the operating system (`resource`), Python, JAX and the making of the matrix
included. Golub-Kahan fails with probability 1e-9, its lower bound is attained by a vector; ratios are to that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from common import Json, command_line, environment, in_a_process, keep, peak_gigabytes, table
from rich.console import Console
from rich.progress import track

import lipbounds as lb
from lipbounds._norms import fourier, lanczos
from lipbounds._norms import matrices as norms
from lipbounds._triangle.recursion import host_form

WAYS = ("matrix", "verified", "Golub-Kahan", "Fourier")


class Operator(NamedTuple):
    """`depth` convolutions from `cin` to `cout` channels (cout to cout after the first), 3 wide on each axis."""

    name: str
    space: tuple[int, ...]
    cin: int
    cout: int
    first: bool = False
    stride: int = 1
    depth: int = 1


OPERATORS = (
    Operator("32x32x3 to 16", (32, 32), 3, 16),
    Operator("32x32x3 to 16, channels first", (32, 32), 3, 16, first=True),
    Operator("8x8x64 to 64", (8, 8), 64, 64),
    Operator("16x16x32 to 32", (16, 16), 32, 32),
    Operator("16x16x32 to 32, twice", (16, 16), 32, 32, depth=2),
    Operator("32x32x16 to 32, stride 2", (32, 32), 16, 32, stride=2),
    Operator("32x32x16 to 16", (32, 32), 16, 16),
    Operator("32x32x16 to 16, twice", (32, 32), 16, 16, depth=2),
    Operator("32x32x32 to 32", (32, 32), 32, 32),
    Operator("32x32x32 to 32, channels first", (32, 32), 32, 32, first=True),
)


def kernels(operator: Operator) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = [operator.cin] + [operator.cout] * operator.depth
    window = [3] * len(operator.space)
    return [
        rng.standard_normal((*window, a, b)) / math.sqrt(math.prod(window) * a)
        for a, b in itertools.pairwise(sizes)
    ]


def matrix(operator: Operator) -> Any:
    """The sparse matrix as the library makes it from a traced function."""
    axes = "DHW"[-len(operator.space) :]
    layout = f"NC{axes}" if operator.first else f"N{axes}C"
    shape = (operator.cin, *operator.space) if operator.first else (*operator.space, operator.cin)
    weights = kernels(operator)

    def fn(x: Any) -> Any:
        y = x[None]
        for w in weights:
            y = jax.lax.conv_general_dilated(
                y,
                w,
                (operator.stride,) * len(operator.space),
                "SAME",
                dimension_numbers=(layout, f"{axes}IO", layout),
            )
        return y.ravel()

    with jax.enable_x64(True):
        form = lb.trace(fn, jax.ShapeDtypeStruct(shape, np.float64))
    return host_form(form).forward((), [()], ())[()].midpoint_for_search()


def measure(operator: Operator, way: str) -> Json:
    """One figure of one operator, in this process."""
    a = matrix(operator) if way != "Fourier" else None
    begin = time.perf_counter()
    found: Json = {}
    if way == "verified":
        plan = norms.proof_plan(a)
        found = {"value": norms.verified_norm(a, plan=plan), "proof": plan.name, "width": plan.width}
        found["stated"] = plan.memory
    elif way == "Golub-Kahan":
        upper, lower, steps = lanczos.golub_kahan(lambda v: a @ v, lambda v: a.T @ v, a.shape[1])
        found = {"value": upper, "lower": lower, "steps": steps}
    elif way == "Fourier":
        # the product of the bounds where there are two; strides drop rows and are left out
        found = {"value": math.prod(fourier.conv_fft_bound(w, operator.space) for w in kernels(operator))}
    else:
        found = {"shape": a.shape, "stored": a.nnz if hasattr(a, "nnz") else a.size}
    found["seconds"] = time.perf_counter() - begin
    return found | {"peak_gigabytes": peak_gigabytes()}


COLUMNS = ["operator", "proof", "smaller side", "band", "verified", "s", "stated GB", "peak GB"]
COLUMNS += ["Golub-Kahan", "s", "peak GB", "Fourier", "s", "matrix GB"]


def cells(row: Json) -> list[str]:
    """A row of the table."""
    verified, likely, fourier = (row[way] for way in WAYS[1:])
    lower = likely["lower"]
    assert lower <= verified["value"]
    found = [row["operator"], verified["proof"], str(min(row["matrix"]["shape"])), str(verified["width"])]
    found += [f"1 + {verified['value'] / lower - 1:.1e}", f"{verified['seconds']:.1f}"]
    found += [f"{verified['stated'] / 1e9:.2f}", f"{verified['peak_gigabytes']:.2f}"]
    found += [f"{likely['value'] / lower:.5f}", f"{likely['seconds']:.1f}", f"{likely['peak_gigabytes']:.2f}"]
    found += [f"{fourier['value'] / lower:.4f}", f"{fourier['seconds']:.1f}"]
    return [*found, f"{row['matrix']['peak_gigabytes']:.2f}"]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--only", default="", help="operators whose name holds this text")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(OPERATORS[given.one], given.way)))
        return
    rows = []
    wanted = [i for i, operator in enumerate(OPERATORS) if given.only in operator.name]
    for place in track(wanted, console=Console(stderr=True), transient=True):
        row = {way: in_a_process(__file__, "--one", str(place), "--way", way) for way in WAYS}
        rows.append({"operator": OPERATORS[place].name, **row})
    title = "norms of convolutions (3 wide), ratios to Golub-Kahan's lower bound"
    shown = table(title, COLUMNS, [cells(row) for row in rows], left=COLUMNS[:2])
    Console(width=190).print(shown)
    where = environment("operators.py", ["numpy", "scipy"])
    keep(given.out, f"operators-{where['device'].split()[0]}", where, [shown], rows=rows)


if __name__ == "__main__":
    main()
