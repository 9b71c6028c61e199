"""Coupled multipliers (LipSDP-Network) claim bounds below attained slopes: a script in examples shows it."""

import dataclasses
import importlib.util
import math
import pathlib
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parent.parent / "examples" / "coupled_multipliers.py"
SPEC = importlib.util.spec_from_file_location("coupled_multipliers", PATH)
assert SPEC is not None and SPEC.loader is not None
script = importlib.util.module_from_spec(SPEC)
sys.modules["coupled_multipliers"] = script  # dataclasses look their module up
SPEC.loader.exec_module(script)

BY_HAND, SEARCHED = script.EXAMPLES
ONE, NIL = Fraction(1), Fraction(0)


def test_the_coupled_bound_by_hand_lies_below_an_attained_slope():
    """With T = (e_1 - e_2)(e_1 - e_2)' and rho = 1 the form of A is dx_1^2 + (dv_1 - dv_2 + dx_2)^2."""
    T = script.multipliers([NIL, NIL], [ONE])
    verdict = script.judge(BY_HAND, T, ONE)
    assert verdict.slope_squared == 17 > verdict.coupled_squared == 1
    assert verdict.bound**2 >= 17


def test_less_is_not_proved_by_these_multipliers():
    T = script.multipliers([NIL, NIL], [ONE])
    with pytest.raises(ValueError, match="do not satisfy"):
        script.judge(BY_HAND, T, ONE - Fraction(1, 10**9))


def test_without_coupling_no_claim_lies_below_the_slope(rng):
    """Diagonal multipliers never prove less than the slope (17), and some prove a little more (33)."""
    for own in np.exp(rng.uniform(-3, 5, (200, 2))):
        T = script.multipliers([Fraction(float(v)) for v in own], [NIL])
        assert not script.is_positive_semidefinite(script.lmi(BY_HAND, T, Fraction(17) - Fraction(1, 10**9)))
    T = script.multipliers([Fraction(2), Fraction(2)], [NIL])
    assert script.judge(BY_HAND, T, Fraction(33)).slope_squared == 17


@pytest.mark.parametrize("example", script.EXAMPLES, ids=lambda e: e.name)
def test_the_solved_claim_lies_below_an_attained_slope(example):
    pytest.importorskip("cvxpy", reason="the coupled SDP is solved with CVXPY")
    T, rho = script.solve(example)
    verdict = script.judge(example, T, rho)
    assert verdict.coupled_squared < Fraction(1, 10) * verdict.slope_squared
    assert verdict.bound**2 >= verdict.slope_squared


@pytest.mark.parametrize("example", script.EXAMPLES, ids=lambda e: e.name)
def test_points_and_network_are_what_numpy_says(example):
    W, w = np.array(example.W, float), np.array(example.w, float)
    first, second = np.array(example.first, float), np.array(example.second, float)
    dz = w @ np.maximum(W @ second, 0) - w @ np.maximum(W @ first, 0)
    slope = abs(dz) / np.linalg.norm(second - first)
    assert slope == pytest.approx(math.sqrt(script.slope_squared(example)), rel=1e-14)


def test_the_coupled_inequality_fails_at_the_points():
    """The reason: (dv_1 - dv_2)((dy_1 - dy_2) - (dv_1 - dv_2)) < 0, and nowhere so for a single neuron."""
    W = np.array(BY_HAND.W)
    y, y2 = W @ BY_HAND.first, W @ BY_HAND.second
    dy, dv = y2 - y, np.maximum(y2, 0) - np.maximum(y, 0)
    assert (dv * (dy - dv) >= 0).all()
    assert (dv[0] - dv[1]) * ((dy[0] - dy[1]) - (dv[0] - dv[1])) < 0


def test_elimination_decides_like_eigenvalues(rng):
    seen = set()
    for _ in range(200):
        factor = rng.integers(-3, 4, (4, int(rng.integers(1, 6))))
        matrix = factor @ factor.T - int(rng.integers(0, 3)) * np.diag(rng.integers(0, 2, 4))
        low = np.linalg.eigvalsh(matrix).min()
        if -1e-9 < low < 1e-9 and not np.array_equal(matrix, factor @ factor.T):
            continue  # too close for float64 to be the judge
        answer = script.is_positive_semidefinite([[Fraction(int(v)) for v in row] for row in matrix])
        assert answer == (low > -1e-9)
        seen.add((answer, bool(low < 1e-9)))
    assert {(True, True), (True, False), (False, True)} <= seen


def test_a_harmless_example_is_no_contradiction(monkeypatch):
    pytest.importorskip("cvxpy", reason="the coupled SDP is solved with CVXPY")
    tame = dataclasses.replace(BY_HAND, second=(0, 18))
    monkeypatch.setattr(script, "EXAMPLES", (tame,))
    with pytest.raises(SystemExit, match="not a counterexample"):
        script.main()


@pytest.mark.slow
def test_the_script_runs():
    pytest.importorskip("cvxpy", reason="the coupled SDP is solved with CVXPY")
    done = subprocess.run([sys.executable, "-W", "error", PATH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "L <= 1.000001" in done.stdout and "4.123106" in done.stdout
