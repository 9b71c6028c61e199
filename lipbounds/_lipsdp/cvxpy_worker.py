"""One semidefinite program through CVXPY, in a process of its own: `python cvxpy_worker.py FOLDER`.

Run as a file, not as a module of the package: it needs neither JAX nor lipbounds, which saves seconds and
gigabytes of address space. Reads FOLDER/problem.npz and FOLDER/request.json, writes FOLDER/answer.npz and
FOLDER/answer.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp


def limit_memory(gigabytes: float | None) -> None:
    """Let the address space grow by at most `gigabytes` from now on, where the platform can limit it."""
    if gigabytes is None:
        return
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        used = pages * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = int(used + gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    except (ImportError, OSError, ValueError):  # Windows has no resource, macOS no /proc
        pass


def build(cp: Any, Gy: np.ndarray, Gz: np.ndarray, n: int, tie: np.ndarray) -> tuple[Any, Any, Any]:
    """(problem, tau, s): minimise s with S = diag(s I, E tau) - Gy' diag(E tau) Gy - Gz' Gz a PSD variable.

    One sparse equation per entry of the upper triangle: the model is built in milliseconds, and the
    multipliers are its own variables.
    """
    N, M = len(Gy), n + len(Gy)
    i, j = np.triu_indices(M)
    diagonal = i == j
    coefficients = -(Gy[:, i] * Gy[:, j]).T
    coefficients[diagonal & (i >= n)] += np.eye(N)
    ties = sp.csr_array((np.ones(N), (np.arange(N), tie)))
    coefficients = np.hstack([coefficients @ ties, (diagonal & (i < n))[:, None].astype(float)])
    upper = sp.csr_array((np.ones(i.size), (np.arange(i.size), i + M * j)), shape=(i.size, M * M))
    tau, s = cp.Variable(ties.shape[1]), cp.Variable()
    S = cp.Variable((M, M), PSD=True)
    constant = (Gz[:, i] * Gz[:, j]).sum(axis=0)
    equations = upper @ cp.vec(S, order="F") == coefficients @ cp.hstack([tau, s]) - constant
    return cp.Problem(cp.Minimize(s), [equations]), tau, s


def run(folder: Path) -> dict[str, Any]:
    with open(folder / "request.json", encoding="utf-8") as file:
        request = json.load(file)
    with np.load(folder / "problem.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    import cvxpy as cp

    solver = request["solver"].upper()
    if solver not in cp.installed_solvers():
        return {"error": "missing"}
    limit_memory(request["memory_gb"])
    problem, tau, s = build(cp, arrays["Gy"], arrays["Gz"], int(request["n"]), arrays["tie"])
    begun = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an inaccurate solution is a status here, not a warning
        problem.solve(solver=solver, **request["options"])
    answer = {
        "status": str(problem.status),
        "solve_seconds": time.perf_counter() - begun,
    }
    stats = problem.solver_stats
    if stats is not None and stats.solve_time is not None:
        answer["solver_seconds"] = float(stats.solve_time)
    if tau.value is not None and s.value is not None:
        np.savez(folder / "answer.npz", tau=np.asarray(tau.value, float), s=np.asarray(s.value, float))
    return answer


def main() -> None:
    folder = Path(sys.argv[1])
    try:
        answer = run(folder)
    except MemoryError:
        answer = {"error": "memory"}
    except ImportError as problem:
        answer = {"error": "missing", "detail": str(problem)}
    except Exception as problem:  # cvxpy's solver errors among them: the parent shows the words
        answer = {"error": "failed", "detail": f"{type(problem).__name__}: {problem}"}
    with open(folder / "answer.json", "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
