"""Both sides of single images: certified radii below, adversarial examples above, and their figures."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lipbounds.analysis.experiment import best_certified
from lipbounds.analysis.figures import png
from lipbounds.analysis.image_figures import (
    both_sides_figure,
    examples_figure,
    pairs_figure,
    radius_histogram,
)
from lipbounds.analysis.report import fill, shares
from lipbounds.analysis.single_images import single_images

RNG = np.random.default_rng(0)
W = RNG.normal(size=(3, 9)).astype(np.float32)
GRID = [0.0, 0.02, 0.05, 0.1, 0.4]


@pytest.fixture(scope="module")
def case():
    x = RNG.uniform(0.3, 0.7, size=(12, 3, 3, 1)).astype(np.float32)
    z = x.reshape(12, 9) @ W.T
    y = z.argmax(axis=1)
    y[0] = (y[0] + 1) % 3
    top = z[np.arange(12), y][:, None]
    gaps = np.linalg.norm(W[y][:, None] - W[None], axis=2)
    exact = np.where(gaps > 0, (top - z) / np.where(gaps > 0, gaps, 1), np.inf).min(axis=1)
    radii = np.where(z.argmax(axis=1) == y, 0.9 * exact, 0.0)
    images = single_images(lambda b: b.reshape(len(b), 9) @ jnp.asarray(W).T, x, y, radii, GRID, shown=4)
    return x, y, exact, radii, images


def test_examples_lie_beyond_the_radii_and_are_near_the_exact_distance(case):
    _, y, exact, radii, images = case
    right = np.asarray(images["correct"])
    assert right.tolist() == [False] + [True] * 11
    distance = np.asarray([np.inf if d is None else d for d in images["distance"]])
    assert (distance[1:] >= radii[1:]).all()
    np.testing.assert_allclose(distance[1:], exact[1:], rtol=0.05)  # of a linear network, inside the box
    accuracy = images["attacked"]["accuracy"]
    assert accuracy[0] == 11 / 12 and accuracy == sorted(accuracy, reverse=True)
    assert accuracy == [float((right & (distance > eps)).mean()) for eps in GRID]
    for row in images["classes"]:
        of = (y == row["label"]) & right
        assert (row["images"], row["correct"]) == ((y == row["label"]).sum(), of.sum())
        if of.any():
            assert row["radius"] in radii[of] and row["radius"] <= row["distance"]
    json.dumps(images, allow_nan=False)


def test_the_images_shown_go_from_the_least_to_the_largest_radius(case):
    x, y, _, radii, images = case
    shown = images["shown"]
    order = [one["radius"] for one in shown]
    assert len(shown) == 4 and order == sorted(order)
    assert order[0] == radii[1:].min() and order[-1] == radii[1:].max()
    for one in shown:
        i = one["index"]
        z = np.asarray(one["adversarial"]).ravel() @ W.T
        assert one["becomes"] != one["label"] == y[i] and z.argmax() == one["becomes"]
        assert np.abs(np.asarray(one["pixels"]) - x[i]).max() < 1e-4
        moved = np.linalg.norm(np.asarray(one["adversarial"]) - x[i])
        assert moved == pytest.approx(one["distance"], abs=1e-3)


def test_figures_and_the_part_of_the_page(case):
    images = case[-1]
    certified = {"eps": GRID, "accuracy": [11 / 12, 0.5, 0.1, 0.0, 0.0], "quartiles": [0.0, 0.1, 0.2]}
    certified |= {"guarantee": "verified", "radius": images["radius"]}
    pairs = [[0, 1.011, 2], [1.011, 0, 30], [2, 30, 0]]
    row = {"norm": "2", "label": "LipLT", "certified": certified, "pairs": {"values": pairs}}
    worse = row | {"label": "naive", "certified": certified | {"quartiles": [0, 0.01, 0.1]}}
    assert best_certified({"upper": [worse, row]})["label"] == "LipLT"
    drawn = {
        "both-sides": both_sides_figure(certified, images, "LipLT"),
        "radii": radius_histogram(images),
        "pairs": pairs_figure(pairs),
        "examples": examples_figure(images["shown"]),
    }
    assert all(png(figure).startswith(b"\x89PNG") for figure in drawn.values())
    numbers = [text.get_text() for text in drawn["pairs"].axes[0].texts]
    assert numbers == ["1.1", "2.0", "1.1", "30.0", "2.0", "30.0"]  # equal digits, rounded up
    model = {"name": "net", "images": images, "upper": [worse, row]}
    figures = {"net": dict.fromkeys(drawn, "")}
    text = fill("single_images.html.j2", model=model, figures=figures, shares={"net": shares(model)})
    assert "local" not in text and text.count("<img") == 4 and f"({images['attack']})" in text
    (band,) = drawn["both-sides"].axes[0].collections
    assert band.get_paths()[0].vertices[:, 1].min() == 0.0


def test_local_radii_stand_beside_the_others(case):
    x, y, exact, radii, _ = case
    near = np.where(radii > 0, 0.97 * exact, 0.0)
    images = single_images(
        lambda b: b.reshape(len(b), 9) @ jnp.asarray(W).T, x, y, radii, GRID, local=near, shown=2
    )
    levels = (float(np.sort(radii)[6]), 0.5)
    halves = [
        {"eps": GRID, "guarantee": word, "notes": [], "radius": values.tolist(), "quartiles": [0, 0.1, 0.2]}
        | {"accuracy": [float((values > eps).mean()) for eps in GRID]}
        for word, values in (("verified", radii), ("probabilistic", near))
    ]
    row = {"norm": "2", "label": "LipLT", "certified": halves[0], "local": halves[1]}
    model = {"name": "net", "images": images, "upper": [row]}
    side = shares(model, levels)
    for one in side["rows"]:
        assert one["certified"] == (radii > one["eps"]).mean() and one["local"] == (near > one["eps"]).mean()
        assert one["certified"] <= one["local"] <= one["attacked"]
    assert side["rows"][0]["certified"] < side["rows"][0]["local"]
    for one in images["classes"]:
        of = (y == one["label"]) & (radii > 0)
        assert not of.any() or one["local"] in near[of]
    figure = both_sides_figure(halves[0], images, "LipLT", local=halves[1])
    lines = [line.get_ydata() for line in figure.axes[0].lines]
    assert len(lines) == 3 and (lines[2] >= lines[1]).all() and (lines[0] >= lines[2]).all()
    (band,) = figure.axes[0].collections
    assert band.get_paths()[0].vertices[1:-1, 1].max() <= lines[0].max()
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words == ["no adversarial example found", "certified by LipLT", "certified by local bounds"]
    figures = {"net": {"both-sides": "", "radii": "", "examples": ""}}
    text = fill("single_images.html.j2", model=model, figures=figures, shares={"net": side})
    rows = re.findall("<tr>.*?</tr>", text, re.DOTALL)[:2]
    head, tags = (re.findall("<t[hd][^>]*>(?:<span[^>]*>)?([^<]*)", each) for each in rows)
    assert head == ["ε", "certified by LipLT", "certified by local bounds", "no adversarial example found"]
    assert tags == ["", "verified", "probabilistic", "attained"]
