"""Store every bound, radius and certificate of the zoo, to compare them after a change that must not move any.

    python benchmarks/freeze.py before.json               write the figures of the networks in tests/zoo.py
    python benchmarks/freeze.py after.json --against before.json

Floats are stored as hexadecimal numbers. What is computed on the host (bounds, radii, local constants, digests of
certificates) must be equal to the last bit; estimates and lower bounds, which a device computes, to 1e-6 relative. The
exit status is 1 where something differs; every difference is printed. Both files must come from one machine with the
same versions of jax, NumPy and SciPy: another BLAS rounds otherwise.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Programs run once here, so compiling them fast matters most; bounds of the host do not depend on it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import numpy as np
from common import Json, command_line, environment, write_json
from rich.progress import track

import lipbounds as lb

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from zoo import NETS, Net

DEVICE = ("estimate", "empirical")
"""Beginnings of the names of figures that a device computes."""
CLOSE = 1e-6
LIPSDP_NEURONS = 100
SKIP = ("parts", "seconds", "certificate", "witness", "network")


def hexadecimal(value: Any) -> Any:
    """The value with every float as a hexadecimal number: lists for arrays, None where there is nothing."""
    if isinstance(value, float | np.floating):
        return float(value).hex()
    if isinstance(value, np.ndarray | jax.Array):
        return [hexadecimal(entry) for entry in np.asarray(value).ravel().tolist()]
    if isinstance(value, list | tuple):
        return [hexadecimal(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def fields(result: Any) -> Json:
    """The fields of a bound or of radii, and the digest of its certificate where it has one."""
    if isinstance(result, lb.LocalBounds):
        return {"bounds": [fields(bound) for bound in result]}
    found = {k: hexadecimal(v) for k, v in vars(result).items() if k not in SKIP and not k.startswith("_")}
    if getattr(result, "certificate", None) is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "certificate"
            lb.save_certificate(result, path)
            raw = path.read_bytes()
        index = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        found["digest"] = index["__metadata__"]["digest"]
    return found


def figures(net: Net) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of all figures of a network, each with the call that computes it."""
    fn, x = net.make(0)
    form = lb.trace(fn, x, batched=net.batched)
    rng = np.random.default_rng(1)
    points = rng.standard_normal((3, *form.in_shape)).astype(np.float32)
    labels = np.asarray([int(np.argmax(np.asarray(form(point)))) for point in points])
    for norm in (2, 1, math.inf):
        yield f"naive {norm}", lambda norm=norm: lb.naive(form, norm=norm, pairwise=True)
        yield f"liplt {norm}", lambda norm=norm: lb.liplt(form, norm=norm, pairwise=True)
    for scaling in ("aol", "sll", "optimized"):
        yield f"liplt {scaling}", lambda scaling=scaling: lb.liplt(form, scaling=scaling)
    yield "estimate liplt", lambda: lb.liplt(form, guarantee="estimate")
    if net.neurons <= LIPSDP_NEURONS:
        for multipliers in ("neuron", "layer"):
            yield (
                f"lipsdp {multipliers}",
                lambda multipliers=multipliers: lb.lipsdp(
                    form, multipliers=multipliers, solver=lb.Recursion(iterations=60)
                ),
            )
    for norm in (2, math.inf):
        yield f"local {norm}", lambda norm=norm: lb.local(form, points, 0.05, norm=norm)
    yield "radii", lambda: lb.certified_radius(form, points, labels)
    yield "local radii", lambda: lb.certified_radius(form, points, labels, local=True)
    yield "empirical", lambda: lb.empirical(form, points)


def freeze(names: list[str]) -> Json:
    frozen: Json = {}
    for name in track(names, description="networks"):
        found = frozen[name] = {}
        for what, call in figures(NETS[name]):
            try:
                found[what] = fields(call())
            except ValueError as error:  # a refusal, which must stay the same
                found[what] = {"refused": f"{type(error).__name__}: {error}"}
        jax.clear_caches()  # every compiled program holds memory maps, of which a process may have 65 530
    return frozen


def number(value: Any) -> float | None:
    try:
        return float.fromhex(value)
    except (TypeError, ValueError):
        return None


def same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], tolerance) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    x, y = number(a), number(b)
    if tolerance and x is not None and y is not None:
        return math.isclose(x, y, rel_tol=tolerance, abs_tol=1e-12)
    return bool(a == b)


def differences(before: Json, after: Json) -> Iterator[str]:
    """One line for every figure that differs, or that only one of the files has."""
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, {}), after.get(name, {})
        for what in sorted(old.keys() | new.keys()):
            tolerance = CLOSE if what.startswith(DEVICE) else 0.0
            if what not in old or what not in new:
                yield f"{name}, {what}: only {'after' if what in new else 'before'}"
                continue
            for field in sorted(old[what].keys() | new[what].keys()):
                a, b = old[what].get(field), new[what].get(field)
                if not same(a, b, tolerance):
                    yield f"{name}, {what}, {field}: {str(a)[:200]} before, {str(b)[:200]} after"


def main() -> int:
    parser = command_line(__doc__, out=False)
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--against", type=Path, help="an earlier file to compare with")
    parser.add_argument("--nets", nargs="*", choices=sorted(NETS), help="only these networks")
    arguments = parser.parse_args()
    frozen = freeze(arguments.nets or sorted(NETS))
    record = {"where": environment("freeze.py", ["numpy", "scipy"]), "networks": frozen}
    write_json(arguments.out, record)
    print(f"{sum(map(len, frozen.values()))} figures of {len(frozen)} networks in {arguments.out}")
    if arguments.against is None:
        return 0
    before = json.loads(arguments.against.read_text())["networks"]
    if arguments.nets:
        before = {name: before[name] for name in arguments.nets if name in before}
    found = list(differences(before, frozen))
    print("\n".join(found) or "nothing differs")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
