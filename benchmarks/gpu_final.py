"""What `lipbounds train` does after its last epoch: LipLT, on fresh forms, and the radii of all test images.

    python benchmarks/gpu_final.py OUT.json RUN            first the programs of the bound, as beside the epochs
    python benchmarks/gpu_final.py OUT.json RUN --cold     without them

"epochs" is the time in epochs of the run, "programs" how many were compiled in it, "compiling" their seconds. The last
bound keeps to the time that `lipbounds train` gives it (`final_epochs`). A part of benchmarks/gpu.sh.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import command_line
from gpu import Rows, attempt

import lipbounds as lb
from lipbounds._triangle import compile_ahead
from lipbounds.training.data import load
from lipbounds.training.final_bound import Found, bound_within, seconds_for
from lipbounds.training.runs import open_run


def measure(out: Path, run: Path, ahead: bool, small: bool) -> None:
    """Write a row for each step, in a process that has compiled nothing but, with `ahead`, the bound's programs."""
    rows, trained = Rows(out), open_run(run)
    config = dataclasses.replace(trained.config, constants="liplt")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    epoch = float(np.median([record["seconds"] for record in log[1:] or log]))
    data = load(config.dataset, config.data_dir)
    image = jax.ShapeDtypeStruct(data.input_shape, jnp.float32)
    count = 50 if small else len(data.test_y)
    kept: dict[str, Any] = {}
    compiled: list[float] = []

    def heard(event: str, seconds: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)

    def programs() -> None:
        compile_ahead(lb.trace(trained.model, image))

    def bound(seconds: float) -> Found:
        kept["form"] = lb.trace(trained.model, image)
        kept["bound"] = bound_within(kept["form"], config, None, seconds)  # type: ignore[arg-type]
        return kept["bound"]

    def radii() -> float:
        images, labels = data.test_x[:count], data.test_y[:count]
        found = lb.certified_radius(kept["form"], images, labels, bound=kept["bound"].bound)
        return float(np.median(found.radius))

    given = seconds_for(config, log)
    turns: list[tuple[str, Callable[[], Any]]] = [
        *[("programs", programs)] * ahead,
        ("bound", lambda: bound(math.inf)),
        ("radii", radii),
        ("bound, again", lambda: bound(math.inf)),
        ("radii, again", radii),
        (f"bound in {given:.3g} s", lambda: bound(given)),
    ]
    for what, work in turns:
        compiled.clear()
        found = attempt(work)
        if isinstance(made := found.get("value"), Found):
            found |= {"value": float(made.bound.value), "guarantee": made.bound.guarantee}
        seconds = {"epochs": found["seconds"] / epoch, "programs": len(compiled), "compiling": sum(compiled)}
        rows.add(what=what, **found, epoch=epoch, **seconds)


def main() -> None:
    parser = command_line(__doc__, out=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--cold", action="store_true", help="compile nothing ahead")
    parser.add_argument("--small", action="store_true", help="fewer images")
    args = parser.parse_args()
    measure(args.out, args.run, not args.cold, args.small)


if __name__ == "__main__":
    main()
