"""LipSDP through CVXPY: the reference for small networks.

    minimise rho   subject to   diag(rho I, T) - Gy' diag(T) Gy - Gz' Gz >= 0,   T diagonal              (LMI)

(see `barrier`) solved by Clarabel (interior point, accurate, memory of order (n + N)^4) or SCS (first
order, light, values a little off to either side). The problem is scaled around a feasible point first. The
solver runs in a process of its own with a memory limit, because Clarabel aborts its process where memory
ends. Its value proves nothing: callers take T, repair it, and prove a bound from it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lipbounds._lipsdp.matrix_inequality import prepare
from lipbounds._text.memory import available_memory
from lipbounds._text.progress import alive, clock, say, show_seconds

_OPTIONS: dict[str, dict[str, Any]] = {
    "clarabel": {},
    "scs": {"eps_abs": 1e-7, "eps_rel": 1e-7, "max_iters": 50_000},
}
_ITERATIONS = {"clarabel": ("max_iter", 200), "scs": ("max_iters", 100_000)}  # the option, and its default
_POLL = 0.2  # seconds between two looks at a running solver
_WORKER = Path(__file__).with_name("cvxpy_worker.py")
_FLOOR = 1e-12  # of a multiplier, relative to the feasible start: solvers return -1e-15


@dataclass(frozen=True, eq=False)
class SdpResult:
    """What a solver said; not a bound.

    Args:
        T: (N,) multipliers, finite and > 0, perhaps not feasible.
        raw_value: the Lipschitz constant as the solver reports it, sqrt of its rho; may lie below the truth.
        status: "optimal" or "optimal_inaccurate".
        solver_seconds: inside the solver; total_seconds with building the model and starting the process.
    """

    T: np.ndarray
    raw_value: float
    status: str
    solver_seconds: float
    total_seconds: float


def solve(
    Gy: np.ndarray,
    Gz: np.ndarray,
    n: int,
    layers: np.ndarray | None = None,
    *,
    solver: str = "clarabel",
    memory: int | None = None,
    time_limit: float | None = None,
    options: dict[str, Any] | None = None,
) -> SdpResult:
    """Solve (LMI) by CVXPY in a subprocess.

    Args:
        Gy, Gz, n: plain matrices, best from `reduce_input`; for a pair of classes Gz is one row, the
        difference. layers: (N,) ints, neurons of one label share a multiplier (LipSDP-Layer); None gives each
        its own. solver: "clarabel" or "scs".
        memory: bytes, the limit of the solver's memory; by default 80 % of what is available now. On platforms
            without resource limits (Windows, macOS) only the estimate below is held against it.
        time_limit: seconds, process start included; None waits.
        options: passed to the solver, over the defaults (SCS: tolerance 1e-7).

    ValueError where CVXPY or the solver is missing, the problem needs more memory (by an estimate, or in the
    attempt) or time than allowed, or the solver does not call its answer optimal.
    """
    if importlib.util.find_spec("cvxpy") is None:
        raise ValueError(_missing("cvxpy", solver))
    started = time.perf_counter()
    problem = prepare(Gy, Gz, n, layers)
    if not problem.size:
        T, rho = problem.multipliers(np.ones(0))
        return SdpResult(T, math.sqrt(rho), "optimal", 0.0, 0.0)
    neurons = len(problem.T0)
    allowed = available_memory() if memory is None else memory / 2**30
    needed = memory_estimate(neurons, n, problem.size, solver)
    if allowed is not None and needed > allowed:
        raise ValueError(
            _too_large(solver, neurons, f"needs about {needed:.3g} GB of {allowed:.3g} GB allowed")
        )
    tie = np.arange(neurons) if problem.tie is None else problem.tie
    request = {
        "solver": solver,
        "n": n,
        "memory_gb": allowed,
        "options": {"verbose": True} | _OPTIONS[solver] | (options or {}),
    }
    answer, values = _in_subprocess(
        request, {"Gy": problem.Gy, "Gz": problem.Gz, "tie": tie}, time_limit, neurons
    )
    status = answer["status"]
    if status not in ("optimal", "optimal_inaccurate") or values is None:
        raise ValueError(f"{solver} did not solve the problem: status {status!r}; use solver='recursion'")
    tau, s = values["tau"], float(values["s"])
    if not (np.isfinite(tau).all() and math.isfinite(s)):
        raise ValueError(f"{solver} returned numbers that are not finite; use solver='recursion'")
    T, _ = problem.multipliers(np.maximum(tau, _FLOOR))
    raw = math.sqrt(max(s, 0.0) * problem.rho0)
    seconds = float(answer.get("solver_seconds", answer["solve_seconds"]))
    return SdpResult(T, raw, status, seconds, time.perf_counter() - started)


def memory_estimate(neurons: int, n: int, multipliers: int, solver: str) -> float:
    """Gigabytes that the solver needs, as measured: Clarabel factorises a dense matrix of the cone's size."""
    triangle = (n + neurons) * (n + neurons + 1) / 2
    model = 64.0 * triangle * (multipliers + 1)
    return (model + (7 * 8.0 * triangle**2 if solver == "clarabel" else 0.0)) / 2**30


def _in_subprocess(
    request: dict[str, Any], arrays: dict[str, np.ndarray], time_limit: float | None, neurons: int
) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    solver = request["solver"]
    with tempfile.TemporaryDirectory(prefix="lipbounds-") as name:
        folder = Path(name)
        np.savez(folder / "problem.npz", **arrays)  # type: ignore[arg-type]
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # -P keeps the package's own folder off the import path of the worker; with -u what it prints is seen at once.
        command = [sys.executable, "-P", "-u", str(_WORKER), name]
        done = _watched(command, folder, request, time_limit)
        if done is None:
            raise ValueError(
                f"{solver} did not finish within time_limit={time_limit:g} s ({neurons} neurons); "
                "use solver='recursion'"
            )
        try:
            answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            why = _reason(done, request["memory_gb"])
            raise ValueError(
                _too_large(solver, neurons, why) if _killed(done) else f"{solver} {why}"
            ) from None
        error = answer.get("error")
        if error == "memory":
            raise ValueError(_too_large(solver, neurons, f"needs more than {request['memory_gb']:.3g} GB"))
        if error == "missing":
            raise ValueError(_missing(answer.get("detail", solver), solver))
        if error is not None:
            raise ValueError(f"{solver} failed: {answer['detail']}; use solver='recursion'")
        stored = folder / "answer.npz"
        if not stored.exists():
            return answer, None
        with np.load(stored, allow_pickle=False) as file:
            return answer, {key: file[key] for key in file.files}


def _watched(
    command: list[str], folder: Path, request: dict[str, Any], time_limit: float | None
) -> subprocess.CompletedProcess[str] | None:
    """Run the worker and report its iterations; None where the time ends, with which it ends, as with any exception."""
    option, most = _ITERATIONS[request["solver"]]
    most = request["options"].get(option, most)
    began, first, known = clock(), None, 0
    with open(folder / "out", "w+", encoding="utf-8") as out, open(folder / "errors", "w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        try:
            while process.poll() is None:
                spent = clock() - began
                if time_limit is not None and spent >= time_limit:
                    return None
                done = _iteration((folder / "out").read_text(encoding="utf-8", errors="replace"))
                if first is None and done >= 0:  # before it Python starts and the model is built
                    first, known = spent, done
                if first is not None and done > known:
                    known, left = done, (spent - first) * (most / done - 1.0)
                    left = left if time_limit is None else min(left, time_limit - spent)
                    say(f"iteration {done} of at most {most}, at most about {show_seconds(left)} left")
                alive()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL if time_limit is None else min(_POLL, time_limit - spent))
            errors.seek(0)
            return subprocess.CompletedProcess(command, process.returncode, "", errors.read())
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _iteration(text: str) -> int:
    """The last iteration in what a solver prints, one in a line with the number in front; -1 where none is printed."""
    head = re.search(r"^ *iter\b", text, re.MULTILINE)
    lines = re.findall(r"^ *(\d+)[| ] *[-+\d]", text[head.end() :], re.MULTILINE) if head else []
    return int(lines[-1]) if lines else -1


def _killed(done: subprocess.CompletedProcess[str]) -> bool:
    return done.returncode < 0 or "memory" in done.stderr.lower()


def _reason(done: subprocess.CompletedProcess[str], memory_gb: float | None) -> str:
    limit = "" if memory_gb is None else f" with a limit of {memory_gb:.3g} GB"
    lines = done.stderr.strip().splitlines()
    said = f": {lines[-1]}" if lines else ""
    if done.returncode < 0:
        return f"was stopped by signal {-done.returncode}{limit}{said}"
    return f"ended with exit code {done.returncode}{limit}{said}"


def _too_large(solver: str, neurons: int, why: str) -> str:
    remedy = "use solver='recursion' or a larger memory"
    return f"network too large for {solver}: {neurons} neurons, it {why}; {remedy}"


def _missing(what: str, solver: str) -> str:
    return f'solver={solver!r} needs CVXPY and its solvers ({what}): pip install "lipbounds[sdp]"'
