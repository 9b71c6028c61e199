"""The memory that this process may still use."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory() -> float | None:
    """80 % of the memory that this process may still use, in GB; None if the system does not tell."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) / 2**20)
        most, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current")
        )
        if most != "max":
            found.append((int(most) - int(used)) / 2**30)
    except (OSError, ValueError):
        pass
    if not found:
        try:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
        except (AttributeError, OSError, ValueError):
            return None
    return 0.8 * max(min(found), 0.0)
