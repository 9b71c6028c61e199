"""Radii by the dual, `lb.Local(margins=True)`: larger than those of local bounds, below every misclassified point."""

import numpy as np
import pytest
from balls import in_ball, mlp, values
from test_decide import interrupting

import lipbounds as lb
from lipbounds._margins import counterexamples, largest
from lipbounds._margins.found import Found

PLANE = (2, 12, 10, 3)


def images(form, count, seed=2):
    x = np.random.default_rng(seed).random((count, *form.in_shape))
    return x, values(form, x).argmax(axis=1)


def radii_of(form, x, y, norm=2, bound=None, **options):
    bound = bound or lb.in_norm(form, lb.liplt(form, pairwise=True), norm=norm)
    return lb.certified_radius(form, x, y, bound=bound, local=lb.Local(**options), progress=False)


def distances(form, x, y, norm, box=None, rays=1000, far=4.0):
    """(N,) distances of misclassified points of the plane: the nearest one on many rays, by bisection."""
    angle = np.linspace(0, 2 * np.pi, rays, endpoint=False)
    way = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    way /= np.linalg.norm(way, norm, axis=1, keepdims=True)
    out = []
    for centre, label in zip(x, y, strict=True):
        steps = np.linspace(0, far, 200)[1:]
        points = centre + steps[:, None, None] * way
        wrong = (values(form, points.reshape(-1, 2)).argmax(axis=1) != label).reshape(points.shape[:2])
        if box is not None:
            wrong &= ((points >= box[0]) & (points <= box[1])).all(axis=2)
        low, high = np.zeros(rays), np.where(wrong.any(axis=0), steps[wrong.argmax(axis=0)], np.inf)
        low = np.where(np.isinf(high), 0.0, high - steps[0])
        for _ in range(20):
            middle = np.where(np.isinf(high), far, (low + high) / 2)
            lost = values(form, centre + middle[:, None] * way).argmax(axis=1) != label
            low, high = np.where(lost, low, middle), np.where(lost & np.isfinite(high), middle, high)
        out.append(high.min())
    return np.array(out)


@pytest.mark.parametrize(("norm", "box"), [(2, None), (2, (0.0, 1.0)), (np.inf, None)])
def test_radii_of_a_plane_lie_just_below_the_exact_ones(norm, box):
    form = mlp(PLANE, seed=3)
    x, y = images(form, 16)
    exact = distances(form, x, y, norm, box)
    before = radii_of(form, x, y, norm, box=box)
    found = radii_of(form, x, y, norm, box=box, margins=True, tries=7)
    met = np.isfinite(exact)
    assert met.sum() >= 6
    assert (found.radius <= exact * (1 + 1e-4)).all() and (found.radius >= before.radius).all()
    share, old = found.radius[met] / exact[met], before.radius[met] / exact[met]
    assert np.median(share) > 0.98 and np.median(old) < 0.93
    assert found.guarantee == "verified" and found.norm == norm
    raised = found.radius > before.radius
    assert set(found.outcome[raised]) <= {"dual", "ellipsoids"} and (found.outcome == "dual").sum() >= 8
    assert f"the dual of lb.margins raises {raised.sum()} of {(before.radius > 0).sum()} radii" in found.notes


def test_what_is_found_of_an_example_is_what_is_found_of_it_alone():
    form = mlp((6, 12, 10, 3), seed=3)
    x, y = images(form, 5)
    whole = radii_of(form, x, y, margins=True, tries=2)
    one = [radii_of(form, x[i : i + 1], y[i : i + 1], margins=True, tries=2).radius[0] for i in range(5)]
    np.testing.assert_allclose(whole.radius, one, rtol=1e-9)
    points = in_ball(x, whole.radius[:, None] * 0.999, 2, 2000, np.random.default_rng(0))
    assert (values(form, points.reshape(-1, 6)).argmax(axis=1).reshape(2000, 5) == y).all()


def flat():
    """z_0 - z_1 = 3 - relu(x_0 + 1/4) + relu(x_1 / 8 - 1/32) is at least 1.75 in the box [0, 1]^2."""
    weights = [[[1.0, 0.0], [0.0, 0.125]], [[0.0, 0.0], [1.0, -1.0]]]
    return lb.from_weights(weights, [np.array([0.25, -0.03125]), np.array([3.0, 0.0])])


@pytest.mark.parametrize("norm", [2, np.inf])
def test_a_ball_that_holds_the_box_is_a_radius_of_inf(norm):
    form, x = flat(), np.array([[0.5, 0.5], [0.1, 0.3]])
    bound = lb.in_norm(form, lb.naive(form), norm=norm)
    for box, count in (((0.0, 1.0), 2), ((np.zeros(2), np.ones(2)), 2), ((x[0], x[0]), 1)):
        found = radii_of(form, x[:count], [0] * count, norm, bound=bound, box=box, margins=True)
        assert np.isinf(found.radius).all() and not any("more tries" in note for note in found.notes)
    wide = radii_of(form, x, [0, 0], norm, bound=bound, box=(-1e200, 1e200), margins=True)
    assert np.isfinite(wide.radius).all()


def test_without_a_misclassified_point_and_without_a_box_balls_grow():
    """z_0 - z_1 = 3 + relu(x_0) + relu(-x_0): every ball is certified, and a note says so."""
    form = lb.from_weights([[[1.0], [-1.0]], [[1.0, 1.0], [0.0, 0.0]]], [np.zeros(2), np.array([3.0, 0.0])])
    x, bound = np.array([[0.5]]), lb.naive(form)
    found = radii_of(form, x, [0], bound=bound, margins=True, tries=5)
    assert found.radius[0] == 2**5 * radii_of(form, x, [0], bound=bound, tries=5).radius[0]
    assert any("their radii may be more than" in note for note in found.notes)


def test_a_budget_that_is_too_small_for_some_is_said_once():
    form = mlp((6, 12, 10, 3), seed=3)
    x, y = images(form, 6)
    found = radii_of(form, x, y, margins=True, memory=9000)
    assert sum("without the dual for" in note and "of 6 examples" in note for note in found.notes) == 1


def test_one_output_is_decided_by_its_sign():
    form = mlp((2, 12, 10, 1), seed=5)
    x = np.random.default_rng(0).random((8, 2))
    y = (values(form, x)[:, 0] > 0).astype(int)
    found, before = (radii_of(form, x, y, bound=lb.liplt(form), margins=margins) for margins in (True, False))
    assert (found.radius >= before.radius).all() and (found.outcome == "dual").any()
    points = in_ball(x, found.radius[:, None] * 0.999, 2, 4000, np.random.default_rng(0))
    assert ((values(form, points.reshape(-1, 2)).reshape(4000, 8) > 0) == (y == 1)).all()


def test_ctrl_c_keeps_the_balls_that_are_certified(monkeypatch):
    form = mlp((6, 12, 10, 3), seed=3)
    x, y = images(form, 12)
    before, whole = radii_of(form, x, y), radii_of(form, x, y, margins=True)
    interrupting(monkeypatch, 9)
    part = radii_of(form, x, y, margins=True)
    assert whole.complete and not part.complete and part.guarantee == "verified"
    assert (before.radius <= part.radius).all() and (part.radius <= whole.radius * (1 + 1e-9)).all()
    assert 0 < (part.radius > before.radius).sum() < (whole.radius > before.radius).sum()
    assert "interrupted: radii are as far as they were proved" in part.notes


def test_an_error_of_the_dual_keeps_the_balls_that_are_certified(monkeypatch):
    form = mlp((6, 12, 10, 3), seed=3)
    x, y = images(form, 6)
    before, calls, real = radii_of(form, x, y), [], largest.decide

    def second(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        return real(*args, **options)

    monkeypatch.setattr(largest, "decide", second)
    part = radii_of(form, x, y, margins=True)
    assert (part.radius > before.radius).any() and part.complete
    assert any(
        "the dual of lb.margins ended after 1 of 4 balls: no memory left" in note for note in part.notes
    )


def test_balls_are_only_tried_below_what_an_attack_finds(monkeypatch):
    form = mlp((6, 12, 10, 3), seed=3)
    x, y = images(form, 6)
    near, tried = [], []
    real, decide = largest.nearest, largest.decide
    monkeypatch.setattr(largest, "nearest", lambda *a: near.append(real(*a)) or near[0].copy())
    monkeypatch.setattr(largest, "decide", lambda p, *a, **o: tried.append(p.eps.max()) or decide(p, *a, **o))
    found = radii_of(form, x, y, margins=True)
    assert (found.radius <= near[0]).all() and len(tried) == 4 and max(tried) < near[0].max()
    start = radii_of(form, x, y).radius
    for count in (0, 1):  # more halvings find nearer points
        monkeypatch.setattr(counterexamples, "_HALVINGS", count)
        assert (near[0] <= counterexamples.nearest(form, x, y, start, 2, None)).all()


def test_options_that_cannot_be_are_refused():
    form = mlp((6, 12, 10, 3), seed=3)
    x, y = images(form, 2)
    for bad in (1, "yes", None):
        with pytest.raises(ValueError, match="margins must be True or False"):
            lb.Local(margins=bad)
    with pytest.raises(ValueError, match=r"needs eps= or lb.Local\(margins=True\)"):
        radii_of(form, x, y, seconds_per_image=1.0)


def test_branching_has_its_seconds(monkeypatch):
    form = mlp((6, 12, 10, 3), seed=3)
    x, y = images(form, 4)
    asked = []
    real = largest.decide
    monkeypatch.setattr(
        largest, "decide", lambda p, v, *, seconds_per_image: asked.append(seconds_per_image) or real(p, v)
    )
    radii_of(form, x, y, margins=True, seconds_per_image=0.25)
    assert set(asked) == {0.25}


def test_nothing_to_raise_is_no_error(monkeypatch):
    form = mlp((6, 12, 10, 3), seed=3)
    x, y = images(form, 3)
    monkeypatch.setattr(Found, "run", lambda *a, **o: pytest.fail("nothing is left to prove"))
    assert not radii_of(form, x, (y + 1) % 3, margins=True).radius.any()
    assert len(radii_of(form, x[:0], y[:0], margins=True)) == 0
