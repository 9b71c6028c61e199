"""What the benchmark scripts share: the command line, where they ran, processes of their own, tables, files."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

import lipbounds as lb

Json = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


def command_line(doc: str | None, *, out: bool = True) -> argparse.ArgumentParser:
    """A parser that shows the docstring of the script, with `--out`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if out:
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def environment(script: str, packages: Sequence[str] = ()) -> Json:
    """The command (files by their names alone, no `--out`), the versions, the device and how busy the machine was."""
    device = jax.devices()[0]
    given = sys.argv[1:]
    if "--out" in given:
        at = given.index("--out")
        given = [*given[:at], *given[at + 2 :]]
    words = [Path(word).name if Path(word).is_absolute() else word for word in given]
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return dict(
        command=shlex.join(["python", f"benchmarks/{script}", *words]),
        jax=jax.__version__,
        python=platform.python_version(),
        **versions,
        device=f"{device.platform} {device.device_kind}",
        cores=os.cpu_count(),
        load=os.getloadavg()[0],
        lipbounds=lb.__version__,
    )


def peak_gigabytes(children: bool = False) -> float:
    """The largest memory of this process (or of one of its children) so far; Linux counts kilobytes.

    `getrusage` counts the parent's memory at the start of a process as its own, which VmHWM does not.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    own = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss if children else 0) / 1e6


def in_a_process(script: str, *words: str) -> Json:
    """What the script prints last, as JSON, run in a process of its own, so that its peak memory is its own."""
    done = subprocess.run([sys.executable, script, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()
) -> Table:
    """Columns are set flush right, those in `left` flush left."""
    made = Table(title=title)
    for place, column in enumerate(columns):
        made.add_column(
            column, justify="left" if column in left else "right", overflow="fold", no_wrap=place == 0
        )
    for row in rows:
        made.add_row(*row)
    return made


def markdown(where: Json, tables: Sequence[Table]) -> str:
    lines = [f"# {where['command'].split()[1]}", ""]
    lines += [f"- {key}: `{value}`" for key, value in where.items()]
    for table in tables:
        cells = [[str(cell).replace("|", "\\|") for cell in column.cells] for column in table.columns]
        lines += ["", f"## {table.title}", ""]
        lines.append("| " + " | ".join(str(column.header) for column in table.columns) + " |")
        lines.append("|" + "|".join("---:" if c.justify == "right" else "---" for c in table.columns) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in zip(*cells, strict=True)]
    return "\n".join(lines) + "\n"


def write_json(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def keep(out: Path, stem: str, where: Json, tables: Sequence[Table] = (), **figures: Any) -> None:
    """Write out/<stem>.json with where it ran and the figures, and out/<stem>.md with the tables."""
    write_json(out / f"{stem}.json", {"where": where, **figures})
    if tables:
        (out / f"{stem}.md").write_text(markdown(where, tables))
