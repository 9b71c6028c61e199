"""Plays a new user: a fresh environment, `pip install`, and every door of docs/doors.md. A script, not a test.

    python tests/new_user.py [DOOR ...]

Packages come from the package index that pip is set up for. Each door is copied into a file as it stands and run with
the environment's own Python, in an empty folder. Prints lines of code and CPU seconds (user and system) of every door,
and fails where one fails, has more than 20 lines, or takes more than five minutes of CPU. The door of PyTorch installs
torch, which is large, so it is left out unless it is named.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = {
    "Equinox": ["equinox"],
    "Haiku": ["dm-haiku"],
    "PyTorch": ["torch", "onnx>=1.19", "onnxscript"],
}
LARGE = ("PyTorch",)
LINES, SECONDS = 20, 300.0
NO_INDEX = 100  # the exit code where pip cannot install


def doors() -> dict[str, list[str]]:
    """{heading: blocks of Python} of docs/doors.md, in order."""
    page = (ROOT / "docs" / "doors.md").read_text(encoding="utf-8")
    parts = {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}
    found = {name: re.findall(r"^```python\n(.*?)^```", part, re.M | re.S) for name, part in parts.items()}
    return {name: blocks for name, blocks in found.items() if blocks}


def lines_of(blocks: list[str]) -> int:
    """Lines of code, without blank ones."""
    return sum(1 for block in blocks for line in block.splitlines() if line.strip())


def spent() -> float:
    """CPU seconds of all finished child processes."""
    times = os.times()
    return times.children_user + times.children_system


def install(python: pathlib.Path, *packages: str) -> None:
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
    subprocess.run(command, check=True)


def play(names: list[str], folder: pathlib.Path) -> int:
    """Go through the doors; the number of those that fail, or `NO_INDEX`."""
    begin = spent()
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    # from a copy, as pip writes to the folder that it installs
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "report", "runs")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    try:
        install(python, str(folder / "source"))
    except subprocess.CalledProcessError:
        return NO_INDEX
    print(f"pip install: {spent() - begin:.0f} CPU s", flush=True)
    failures, environment = 0, {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for name in names:
        blocks, place = doors()[name], folder / re.sub(r"\W+", "-", name)
        place.mkdir()
        if name in PACKAGES:
            install(python, *PACKAGES[name])
        begin, said = spent(), ""
        for number, block in enumerate(blocks):
            (place / f"{number}.py").write_text(block, encoding="utf-8")
            done = subprocess.run(
                [python, f"{number}.py"],
                cwd=place,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            said += done.stdout + done.stderr
        seconds, lines = spent() - begin, lines_of(blocks)
        fine = "Radii: " in said and done.returncode == 0 and lines <= LINES and seconds <= SECONDS
        failures += not fine
        print(f"{'ok  ' if fine else 'FAIL'} {name}: {lines} lines, {seconds:.1f} CPU s", flush=True)
        if not fine:
            print(said[-2000:], flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("doors", nargs="*", metavar="DOOR", help="headings of docs/doors.md")
    names = parser.parse_args().doors or [name for name in doors() if name not in LARGE]
    with tempfile.TemporaryDirectory() as folder:
        return play(names, pathlib.Path(folder))


if __name__ == "__main__":
    sys.exit(main())
