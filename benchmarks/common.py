"""What the benchmark scripts share: where they ran, and their tables as Markdown."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

import lipbounds as lb

Json = dict[str, Any]


def environment(script: str, packages: Sequence[str] = ()) -> Json:
    """The command (files by their names alone), the versions, the device and how busy the machine was."""
    device = jax.devices()[0]
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return dict(
        command=" ".join([f"python benchmarks/{script}", *words]),
        jax=jax.__version__,
        python=platform.python_version(),
        **versions,
        device=f"{device.platform} {device.device_kind}",
        cores=os.cpu_count(),
        load=os.getloadavg()[0],
        lipbounds=lb.__version__,
    )


def markdown(script: str, where: Json, tables: Sequence[Table]) -> str:
    lines = [f"# benchmarks/{script}", ""]
    lines += [f"- {key}: `{value}`" for key, value in where.items()]
    for table in tables:
        cells = [[str(cell).replace("|", "\\|") for cell in column.cells] for column in table.columns]
        lines += ["", f"## {table.title}", ""]
        lines.append("| " + " | ".join(str(column.header) for column in table.columns) + " |")
        lines.append("|" + "|".join("---:" if c.justify == "right" else "---" for c in table.columns) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in zip(*cells, strict=True)]
    return "\n".join(lines) + "\n"


def keep(
    out: Path, stem: str, script: str, where: Json, rows: Sequence[Json], tables: Sequence[Table]
) -> None:
    """Write out/<stem>.json with the rows and out/<stem>.md with the tables."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps({"where": where, "rows": rows}, indent=1) + "\n")
    (out / f"{stem}.md").write_text(markdown(script, where, tables))
