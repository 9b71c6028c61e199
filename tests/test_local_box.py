"""Local bounds over inputs of a box: ranges against exact ones, radii sound inside and larger near the faces."""

import json

import numpy as np
import pytest
from balls import in_ball, mlp, values
from typer.testing import CliRunner

import lipbounds as lb
from lipbounds._cli.main import app
from lipbounds._local import box as _localbox
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import save_model


def farthest(a, eps, low, high):
    """max a' d over the ball and the box, by bisection on the multiplier of the ball."""
    cap = np.where(a > 0, high, low)

    def step(tau):
        return np.minimum(np.abs(a) / tau, cap)

    if np.linalg.norm(np.where(a != 0, cap, 0)) <= eps:
        return float(np.abs(a) @ np.where(a != 0, cap, 0))
    down, up = 1e-12, 1e12
    for _ in range(200):
        middle = np.sqrt(down * up)
        down, up = (middle, up) if np.linalg.norm(step(middle)) > eps else (down, middle)
    return float(np.abs(a) @ step(up))


@pytest.mark.parametrize("norm", [2, np.inf])
def test_ranges_hold_and_are_nearly_exact(norm):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((20, 15))
    x = rng.choice([0.0, 0.02, 0.5, 1.0], (8, 15))
    eps = 10.0 ** rng.uniform(-2, 0.5, 8)
    low, high = _localbox.rooms(x, (np.zeros(15), np.ones(15)))
    down, up = _localbox.reach(a, 0.0, eps, norm, low, high)
    free = _localbox.reach(a, 0.0, eps, norm, *_localbox.rooms(x, None))
    size = np.linalg.norm(a, 2 if norm == 2 else 1, axis=1)
    for side in free:
        np.testing.assert_allclose(side, eps[:, None] * size, rtol=1e-12)
        assert (side >= eps[:, None] * size).all()
    for i in range(8):
        for j in range(20):
            for found, sign in ((up, 1), (down, -1)):
                if norm == 2:
                    exact = farthest(sign * a[j], eps[i], low[i], high[i])
                else:
                    room = np.minimum(np.where(sign * a[j] > 0, high[i], low[i]), eps[i])
                    exact = float(np.abs(a[j]) @ room)
                assert exact * (1 - 1e-9) <= found[i, j] <= (1.6 if norm == 2 else 1 + 1e-9) * exact + 1e-12
    assert (up < 0.9 * free[1]).mean() > 0.5
    worse = _localbox.reach(a, 0.1, eps, norm, low, high)
    assert (worse[1] - up >= 0.1 * eps[:, None] * (1 if norm == 2 else np.sqrt(15)) * (1 - 1e-9)).all()


@pytest.mark.parametrize("norm", [2, np.inf])
def test_constants_and_radii_inside_the_box(norm):
    form, rng = mlp(widths=(12, 40, 30, 5)), np.random.default_rng(1)
    x = rng.choice([0.0, 0.0, 0.0, 1.0, 0.6], (40, 12)).astype(np.float32)
    y = values(form, x).argmax(axis=1)
    bound = lb.local(form, x, 0.2, norm=norm, box=(0, 1))
    points = np.clip(in_ball(x, 0.2, norm, 60, rng), 0, 1)
    u, v = points[:30].reshape(-1, 12), points[30:].reshape(-1, 12)
    change = np.linalg.norm(values(form, u) - values(form, v), norm, axis=1)
    slopes = (change / np.maximum(np.linalg.norm(u - v, norm, axis=1), 1e-9)).reshape(30, -1).max(axis=0)
    assert (slopes <= bound.value * (1 + 1e-9)).all() and "box [0, 1]" in bound.notes[-1]
    free = lb.certified_radius(form, x, y, bound=lb.liplt(form, norm=norm, pairwise=True), local=True)
    near = lb.certified_radius(
        form, x, y, bound=lb.liplt(form, norm=norm, pairwise=True), local=lb.Local(box=(np.zeros(12), 1))
    )
    known = free.correct
    assert np.median(near.radius[known] / free.radius[known]) > 1.02
    moved = np.clip(x + (in_ball(x, 1.0, norm, 300, rng) - x) * near.radius[:, None] * (1 - 1e-9), 0, 1)
    answers = values(form, moved.reshape(-1, 12)).argmax(axis=1).reshape(300, -1)
    assert (answers[:, known] == y[known]).all()
    assert near.notes[-1].startswith("for inputs inside the box")


def test_a_neuron_that_no_point_of_the_box_switches_on():
    """relu(w x - 1) with x at a face: every way to switch it on leaves the box."""
    w = np.array([[0.6, 0.8]], np.float32)
    form = lb.from_weights(
        [w, np.ones((2, 1), np.float32)],
        [np.float32([-0.5]), np.zeros(2, np.float32)],
        activation="relu",
    )
    x = np.zeros((1, 2), np.float32)
    assert lb.local(form, x, 0.6).value[0] > 1
    assert lb.local(form, x, 0.6, box=(-1, 0)).value[0] == pytest.approx(0, abs=1e-6)
    assert lb.local(form, x, 0.6, box=(0, 1)).value[0] > 1


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ((0.5, 1), "2 of 2 examples lie outside"),
        ((1, 0), "lower <= upper"),
        ((0, np.nan), "lower <= upper"),
        (3, "must be"),
        ((0, 1, 2), "must be"),
        ((np.zeros(5), 1), "must be"),
    ],
)
def test_refusals(box, why):
    with pytest.raises(ValueError, match=why):
        lb.local(mlp(), np.zeros((2, 12), np.float32), 1.0, box=box)


@pytest.mark.parametrize("norm", [2, np.inf])
def test_a_box_is_no_harm_on_balls_whose_radius_has_no_inverse(norm):
    form, x = mlp(), np.full((1, 12), 0.5)
    alone, boxed = (lb.local(form, x, 1e-310, norm=norm, box=box).value[0] for box in (None, (0, 1)))
    assert boxed == alone < lb.liplt(form, norm=norm).value


def test_the_command(tmp_path):
    path, record = tmp_path / "mlp.safetensors", tmp_path / "radii.json"
    spec = ModelSpec("mlp", (8, 8, 1), {"widths": "64-16-10"})
    save_model(path, build(spec, seed=0), spec)
    radii = []
    for more in ([], ["--local"], ["--local", "--box", "0,1"]):
        command = ["certify", str(path), "--method", "liplt", "--json", str(record), "--force", *more]
        found = CliRunner().invoke(app, command)
        assert found.exit_code == 0, found.output
        radii.append(np.array(json.loads(record.read_text())["radius"]))
    known = radii[0] > 0
    assert (radii[1] >= radii[0]).all() and (radii[2][known] > radii[0][known]).all()
    assert np.median(radii[2][known] / radii[1][known]) > 1
    for box, why in (("0,1,2", "two numbers"), ("a,b", "two numbers"), ("0,1", "belongs to --local")):
        refused = CliRunner().invoke(app, ["certify", str(path), "--box", box])
        assert refused.exit_code == 2 and why in " ".join(refused.output.split())
