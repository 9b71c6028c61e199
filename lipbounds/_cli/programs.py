"""Compiled programs of the command line, kept from one run to the next in a folder of the user's cache.

Only where nobody has chosen another: a folder set by JAX_COMPILATION_CACHE_DIR or in jax's configuration stays. Several
processes may use one folder: jax writes every program to a file named by its content, and one that cannot be read is
compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

VARIABLE = "LIPBOUNDS_CACHE"
OFF = ("off", "no", "0", "false")
_MOST = 2**30  # bytes of programs, beyond which the oldest go
_SECONDS = 0.1  # programs that compile in less are not kept
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": _SECONDS,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


def user_folder() -> Path:
    """The folder for compiled programs: that of LIPBOUNDS_CACHE, else `lipbounds` in the user's cache folder."""
    given = os.environ.get(VARIABLE, "")
    if given:
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME", "")
        base = base if os.path.isabs(base) else str(Path.home() / ".cache")  # as the XDG rules say
    return Path(base) / "lipbounds"


def _processor() -> str:
    """What distinguishes processors, as XLA compiles for the one that it runs on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
        if wanted:
            return "\n".join(wanted)
    return platform.processor()


def _prune(folder: Path, most: int) -> None:
    """Remove the oldest files beyond `most` bytes in all."""
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may remove it, too
            if path.is_file():
                found = path.stat()
                files.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            total -= size


@contextlib.contextmanager
def kept(wanted: bool = True) -> Iterator[Path | None]:
    """Keep compiled programs inside the block; the folder, or None where none is used or it cannot be written."""
    off = not wanted or os.environ.get(VARIABLE, "").lower() in OFF
    mine, usual = (
        getattr(jax.config, name) for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    )
    if off or mine is not None or not usual:
        yield None
        return
    machine = hashlib.sha256(f"{platform.machine()}\n{_processor()}".encode()).hexdigest()[:12]
    try:
        whole = user_folder()
        folder = whole / f"jax-{jax.__version__}-{machine}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
        _prune(whole, _MOST)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        writable = False
    if not writable:
        yield None
        return
    before = {name: getattr(jax.config, name) for name in _SETTINGS}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
        try:
            for name, value in _SETTINGS.items():
                jax.config.update(name, value)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            compilation_cache.reset_cache()
            yield folder
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
