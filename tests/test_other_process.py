"""Bounds that are pickled in one process and used in another."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lipbounds as lb

USE = """
import pickle, sys
import numpy as np
import lipbounds as lb

weights, x, y, bound = pickle.load(open(sys.argv[1], "rb"))
form = lb.from_weights(weights, activation="relu")
print(lb.certified_radius(form, x, y, bound=bound).radius.tolist())
weights[0] = weights[0] + 1
try:
    lb.certified_radius(lb.from_weights(weights, activation="relu"), x, y, bound=bound)
except ValueError:
    print("refused")
"""


def test_a_pickled_bound_serves_in_another_process(tmp_path: Path) -> None:
    """Its network is known by a digest that does not depend on how this process hashes strings."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((b, a)) for a, b in ((4, 5), (5, 3))]
    form = lb.from_weights(weights, activation="relu")
    x, y, bound = rng.standard_normal((2, 4)), np.array([0, 1]), lb.naive(form, pairwise=True)
    (tmp_path / "bound").write_bytes(pickle.dumps((weights, x, y, bound)))
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    found = subprocess.run(
        [sys.executable, "-c", USE, tmp_path / "bound"],
        env=os.environ | {"PYTHONHASHSEED": seed},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = found.stdout.splitlines()
    assert found.returncode == 0, found.stderr
    expected = lb.certified_radius(form, x, y, bound=bound).radius
    assert eval(lines[0]) == pytest.approx(expected.tolist()) and lines[1] == "refused"


FORK = """
import multiprocessing, sys
import numpy as np
import lipbounds as lb

def value():
    return lb.liplt(lb.from_weights([np.eye(30), np.eye(30)])).value

def child(answers):
    try:
        answers.put(value())
    except RuntimeError as error:
        answers.put(str(error))

def forked():
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    context.Process(target=child, args=(answers,)).start()
    print(answers.get())

forked()
value()
forked()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forks_of_a_process_that_has_computed_are_refused_in_words() -> None:
    """They would wait for ever; those of a process that has not computed yet are as good as any."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK], capture_output=True, text=True, timeout=120
    )
    before, after = found.stdout.splitlines()
    assert float(before) == pytest.approx(1) and 'get_context("spawn")' in after
