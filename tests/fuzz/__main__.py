"""`python -m tests.fuzz --minutes 30`: random programs for as long as asked; exit code 1 where something breaks."""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import argparse
import multiprocessing as mp
import queue
import sys
import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .worker import work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to run")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="the same seed draws the same programs"
    )
    parser.add_argument(
        "--limits", type=float, default=0.5, help="share of programs that go the ways of wide networks"
    )
    parser.add_argument("--stop", action="store_true", help="stop at the first finding")
    options = parser.parse_args()
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    started, seconds = time.monotonic(), 60.0 * options.minutes
    workers = [
        context.Process(target=work, args=(i, options.seed, seconds, options.limits, results), daemon=True)
        for i in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    console = Console(soft_wrap=True)
    counts, families, refusals, ops = Counter(), Counter(), Counter(), Counter()
    slowest, told = 0.0, started
    console.print(f"seed {options.seed}, {options.processes} processes, {options.minutes:g} minutes")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task, running = progress.add_task("0 programs", total=seconds), len(workers)
        while running and any(w.is_alive() for w in workers):
            try:
                item = results.get(timeout=2.0)
            except queue.Empty:
                item = ()
            if item is None:
                running -= 1
            elif item:
                report, names, sources, took = item
                counts.update(programs=1, checks=report.checks, refused=bool(report.refused))
                counts.update(f.kind for f in report.findings)
                refusals.update([report.refused] if report.refused else [])
                ops.update(names)
                slowest = max(slowest, took)
                families.update({f.family for f in report.findings})
                for family, source in sources.items():
                    if families[family] == 1 or options.processes == 1:
                        at = f"after {time.monotonic() - started:.0f} s"
                        what = next(f.what for f in report.findings if f.family == family)
                        console.print(f"\n[bold red]{family.split(':')[0]}[/] {at}:", highlight=False)
                        console.print(f"{what}\n\n{source}", markup=False, highlight=False)
                if options.stop and report.findings:
                    break
            text = "{programs} programs, {checks} checks, {break} breaks, {foreign} foreign errors"
            shown = {k: counts[k] for k in ("programs", "checks", "break", "foreign")}
            if not console.is_terminal and time.monotonic() > told + 60.0:
                told = time.monotonic()
                console.print(text.format(**shown))
            progress.update(task, completed=time.monotonic() - started, description=text.format(**shown))
    died = [w.exitcode for w in workers if w.exitcode not in (0, None)]
    for worker in workers:
        worker.terminate()
    console.print(
        f"{counts['programs']} programs ({counts['refused']} refused), {counts['checks']} checks, "
        f"{counts['break']} breaks, {counts['foreign']} foreign errors, slowest {slowest:.1f} s"
    )
    for family, count in families.most_common():
        console.print(f"  {count:4d}  {family}", markup=False, highlight=False)
    if refusals:
        console.print(
            "refused for: " + ", ".join(f"{k} {n}" for k, n in refusals.most_common(12)), markup=False
        )
    if died:
        console.print(f"a process died with exit code {died[0]}")
    return 1 if families or died else 0


if __name__ == "__main__":
    sys.exit(main())
