"""The report of benchmarks/gpu.sh, written after every section: `python benchmarks/gpu_report.py WORK OUT`.

OUT/gpu.md and OUT/gpu.json hold what is in WORK so far. Only the standard library: it must not slow what is timed.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def _table(title: str, rows: Iterable[Json]) -> list[str]:
    rows = list(rows)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["", f"## {title}", ""]
    if not rows:
        return [*lines, "nothing"]
    lines += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [row.get(key, "") for key in keys]
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append("| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |")
    return lines


def _checked(name: str, rows: list[Json]) -> list[Json]:
    """One line a method: the largest difference from the CPU and what did not hold."""
    lines = []
    for what in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == what]
        gaps = [gap for row in mine if math.isfinite(gap := row.get("relative_to_cpu", math.nan))]
        broken = [f"{row['net']} {row.get('error', row.get('slack', ''))}" for row in mine if not row["held"]]
        worst = max(gaps, default=float("nan"))
        shown = "; ".join(broken) or "none"
        lines.append(
            {"part": name, "method": what, "nets": len(mine), "max rel. diff": worst, "broken": shown}
        )
    return lines


def report(work: Path, out: Path) -> None:
    """gpu.md and gpu.json from the parts' files, logs and the table of sections, as far as they are."""
    parts: dict[str, Json] = {}
    for path in sorted(work.glob("*.json")):
        parts[path.stem] = json.loads(path.read_text())
    log = work / "run" / "log.jsonl"
    epochs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    sections = [
        dict(zip(("section", "exit code", "seconds", "limit"), line.split("\t"), strict=True))
        for line in (work / "sections.tsv").read_text().splitlines()
    ]
    rows = {name: part["rows"] for name, part in parts.items()}
    lines = ["# benchmarks/gpu.sh", ""]
    for name, part in parts.items():
        w = part["where"]
        lines.append(
            f"- {name}: {w['device']}, precision {w['precision']}, jax {w['jax']}, {w['cores']} cores"
        )
    lines += _table("Sections (exit code 124: out of time)", sections)
    checks = [line for n in rows if n.startswith("check") for line in _checked(n, rows[n])]
    lines += _table("Bounds on the device, against the CPU, attained slopes and attacks", checks)
    lines += _table(
        "Traces of rounded programs", [{"part": n, **r} for n in rows if n[:6] == "traces" for r in rows[n]]
    )
    lines += _table("LipSDP of the whole 6C2F", rows.get("lipsdp", []))
    lines += _table("Proofs of single matrices", rows.get("proofs", []))
    lines += _table("Training 6C2F in one process", _epochs(rows.get("steps", [])))
    lines += _table("`lipbounds train`, made-up images of CIFAR-10's shape", epochs)
    after = [{"process": name, **row} for name in ("final", "cold") for row in rows.get(name, [])]
    lines += _table("After the last epoch of that run, programs compiled ahead and not", after)
    lines += _table("Verbs", _ratios(rows))
    for path in sorted(work.glob("*.log")):
        end = path.read_text(errors="replace").splitlines()[-60:]
        lines += ["", f"## End of {path.name}", "", "```", *end, "```"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.md").write_text("\n".join(lines) + "\n")
    (out / "gpu.json").write_text(
        json.dumps({"sections": sections, "parts": parts, "epochs": epochs}, indent=1) + "\n"
    )


def _epochs(rows: list[Json]) -> list[Json]:
    """Medians of an epoch, beside the loss without a radius term."""
    times: dict[str, list[float]] = {}
    for row in rows:
        if row["what"] == "epoch":
            times.setdefault(row["loss"], []).append(row["value"])
    first = {row["loss"]: row for row in rows if row["what"] != "epoch"}
    plain = statistics.median(times.get("plain", [math.nan]))
    return [
        {
            "loss": loss,
            "seconds an epoch": statistics.median(times[loss]) if loss in times else "",
            "/ plain": statistics.median(times[loss]) / plain if loss in times else "",
            "compile and first": row["seconds"],
            "error": row.get("error", ""),
        }
        for loss, row in first.items()
    ]


def _ratios(rows: dict[str, list[Json]]) -> list[Json]:
    found = []
    cpu = {(r["what"], r["turn"]): r for r in rows.get("speed-cpu", [])}
    for row in rows.get("speed-gpu", []):
        other = cpu.get((row["what"], row["turn"]), {})
        host = other.get("seconds", float("nan"))
        found.append(
            {
                "verb": row["what"],
                "turn": row["turn"],
                "device, s": row["seconds"],
                "CPU, s": host,
                "CPU / device": host / max(row["seconds"], 1e-9),
                "value": row.get("value", row.get("error", "")),
                "value on CPU": other.get("value", other.get("error", "")),
                "guarantee": row.get("guarantee", ""),
            }
        )
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    report(Path(sys.argv[1]), Path(sys.argv[2]))
