"""The gallery of benchmarks/gallery.py at its small size: every member is traced, bounded, and bounded tightly."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from attained import Search, attained
from flax import nnx

import lipbounds as lb

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gallery
from gallery_nets import GALLERY, SIZES, UNet

SMALL = SIZES["small"]
REFUSED = ["squeeze_excitation"]
EPS = 0.01

TIGHT = {
    "cnn_average_pooling": (14, 2.1, 1.015),
    "cnn_max_pooling": (30, 1.5, 1.138),
    "cnn_strided": (5.2, 1.8, 1.01),
    "decoder": (7.2, 2.2, 1.019),
    "densenet": (65, 7.4, 1.014),
    "gelu_convnext": (11, 2.2, 1.01),
    "lenet5": (13, 2.7, 1.01),
    "mlp_mixer": (49, 3.6, 1.012),
    "mobilenet_hard_swish": (7200, 2.9, 1.043),
    "mobilenet_relu6": (180, 5.7, 1.077),
    "resnet_postactivation": (63, 5.1, 1.067),
    "resnet_preactivation": (16, 4.6, 1.026),
    "resnext": (140, 5.4, 1.234),
    "silu_csp": (69, 4.1, 1.05),
    "squeezenet": (18, 2.4, 1.028),
    "u_net": (19, 3.3, 1.01),
}
"""Per member, limits measured with some room on untrained weights: LipLT over the attained slope, naive over LipLT at
least, and the local constant at eps 0.001 over the norm of the Jacobian."""

QUICK = ("squeezenet",)
MEMBERS = [
    pytest.param(
        name,
        marks=[] if name in QUICK else [pytest.mark.slow],
    )
    for name in GALLERY
    if name not in REFUSED
]


class Made(NamedTuple):
    """A member, its form, three images, and the global bounds and the attained slope, shared by all tests."""

    model: Any
    form: lb.LureForm
    x: Any
    search: Search
    naive: lb.UpperBound
    liplt: lb.UpperBound
    found: float


@functools.cache
def made(name: str) -> Made:
    model = gallery.trained(name, SMALL, 0)
    x = gallery.images(SMALL)[2]
    form = lb.trace(model, x[0])
    search = Search(form)
    return Made(model, form, x[:3], search, lb.naive(form), lb.liplt(form), attained(search).value)


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_the_form_is_the_function(name: str) -> None:
    one = made(name)
    assert tuple(one.form.in_shape) == SMALL.shape and one.form.num_outputs == 10
    rng = np.random.default_rng(1)
    fresh = np.concatenate([one.x, rng.normal(0, 3, (3, *SMALL.shape)), rng.uniform(0, 1, (3, *SMALL.shape))])
    wanted = np.asarray(one.model(fresh.astype(np.float32)))
    found = one.search.values(flat(fresh.astype(np.float32)))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(wanted - wanted[0]).max() > 1e-3, "a constant function shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_attained_liplt_naive_in_this_order_and_close(name: str) -> None:
    one = made(name)
    assert 0 < one.found <= one.liplt.value <= one.naive.value
    assert one.liplt.guarantee == one.naive.guarantee == "verified"
    over_attained, naive_over, _ = TIGHT[name]
    assert one.liplt.value <= over_attained * one.found
    assert one.naive.value >= naive_over * one.liplt.value, "the centred slopes gained less than they did"


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_local_bounds_hold_and_come_close_to_the_jacobian(name: str) -> None:
    one = made(name)
    bound = lb.local(one.form, one.x, EPS, bound=one.liplt)
    assert bound.guarantee == "verified" and (bound.value <= one.liplt.value).all()
    steepness = gallery.jacobian_norms(one.form, one.x)
    assert (slopes_in_balls(one, EPS) <= bound.value).all()
    closer = lb.local(one.form, one.x, EPS / 10, bound=one.liplt)
    assert (steepness * (1 - 1e-9) <= closer.value).all()
    assert (closer.value <= TIGHT[name][2] * steepness).all()
    tiny = lb.local(one.form, one.x, 1e-6, bound=one.liplt)
    assert (tiny.value >= steepness * (1 - 1e-9)).all()
    assert (tiny.value <= 1.01 * steepness).all()


def slopes_in_balls(one: Made, eps: float, count: int = 40) -> np.ndarray:
    """(N,) the largest slope between two points of each ball: random ones, and along the steepest direction there."""
    rng, x = np.random.default_rng(2), flat(one.x).astype(np.float64)
    v = rng.standard_normal((2, count, *x.shape))
    v /= np.linalg.norm(v, axis=-1, keepdims=True)
    v[0, 0] = np.linalg.svd(one.search.jacobians(x))[2][:, 0]
    v[1, 0] = -v[0, 0]
    points = x + eps * v * rng.choice([0.1, 0.999], (1, count, 1, 1))
    z = one.search.values(points.reshape(-1, x.shape[1])).reshape(2, count, len(x), -1)
    quotients = np.linalg.norm(z[0] - z[1], axis=-1) / np.linalg.norm(points[0] - points[1], axis=-1)
    return quotients.max(axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_batch_norms_carry_statistics_of_images(name: str) -> None:
    """Otherwise evaluation mode would be nothing but scales and shifts of 1 and 0."""
    seen: list[Any] = [m for _, m in nnx.iter_modules(made(name).model) if isinstance(m, nnx.BatchNorm)]
    assert len(seen) > 0 or name in ("lenet5", "cnn_average_pooling", "cnn_max_pooling", "cnn_strided",
                                     "squeezenet", "mlp_mixer")  # fmt: skip
    for norm in seen:
        mean, var, scale = (np.asarray(a[...]) for a in (norm.mean, norm.var, norm.scale))
        assert norm.use_running_average and (mean != 0).all() and (var > 0).all() and (var != 1).all()
        assert np.ptp(scale) > 0.01


@pytest.mark.slow
def test_a_u_net_per_pixel() -> None:
    """640 outputs; as the mean over P pixels has at most 1 / sqrt(P) of their constant, the slope attained by the mean
    is a lower bound for the maps."""
    one, model = made("u_net"), made("u_net").model
    assert isinstance(model, UNet)
    form = lb.trace(lambda x: model.maps((x - 0.3) / 0.4).reshape(-1), one.x[0])
    assert form.num_outputs == 640
    wanted = np.asarray(model.maps((one.x - 0.3) / 0.4)).reshape(3, -1)
    assert np.abs(Search(form).values(flat(one.x)) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.allclose(wanted.reshape(3, 64, 10).mean(axis=1), np.asarray(model(one.x)), rtol=1e-4, atol=1e-5)
    bound = lb.liplt(form)
    assert bound.guarantee == "verified"
    assert 8 * one.found <= bound.value <= lb.naive(form).value
    near = lb.local(form, one.x, EPS, bound=bound)
    steepness = gallery.jacobian_norms(form, one.x)
    assert (steepness * (1 - 1e-9) <= near.value).all() and (near.value <= 1.35 * steepness).all()


def test_a_refused_member_keeps_its_row() -> None:
    row = gallery.measure("squeeze_excitation", SMALL, steps=0, climb=0, count=1, lipsdp=False)
    assert set(row) == {"network", "refused"}
    (item,) = row["refused"]
    assert item["operation"] == "mul" and "both depend on x" in item["why"]
    (only,) = gallery.tables([row])
    assert only.title == "refused by lb.trace" and list(only.columns[0].cells) == ["squeeze_excitation"]


@pytest.mark.slow
def test_the_command_writes_a_table_whose_columns_never_mix_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["cnn_strided", *REFUSED]
    short = ["--steps", "2", "--climb", "2", "--images", "2", "--no-lipsdp", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gallery.py", "--size", "small", "--names", *names, *short])
    gallery.main()
    assert "cnn_strided" in capsys.readouterr().out
    stored = json.loads((tmp_path / "gallery-cpu-small.json").read_text())
    assert [row["network"] for row in stored["rows"]] == names and str(tmp_path) not in str(stored)
    (row, _), (_, tight, local, refused) = stored["rows"], gallery.tables(stored["rows"])
    cells = {str(c.header): str(next(iter(c.cells))) for t in (tight, local) for c in t.columns}
    assert float(cells["attained >="]) <= row["attained"]
    for header, key in (("LipLT, bound <=", "liplt"), ("naive, bound <=", "naive")):
        assert float(cells[header]) >= row["bounds"][key]["value"] > row["attained"]
    assert cells["LipSDP, bound <="] == "" and "lipsdp" not in row["bounds"]
    assert float(cells["LipLT / attained"]) >= row["bounds"]["liplt"]["value"] / row["attained"] > 1
    for ball in row["local"]["balls"]:
        assert float(cells[f"eps {ball['eps']:g}, bound <="]) >= ball["value"] >= row["local"]["jacobian"]
    text = (tmp_path / "gallery-cpu-small.md").read_text()
    assert "squeeze_excitation" in text.split("## refused")[1] and str(refused.title) in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn_average_pooling", "densenet"])
def test_training_learns_and_lipsdp_is_below_liplt(name: str) -> None:
    row = gallery.measure(name, SMALL, steps=100, climb=20, count=2, lipsdp=True)
    assert row["clean"] > 0.5 and made(name).found != row["attained"]
    bounds = row["bounds"]
    assert row["attained"] <= bounds["lipsdp"]["value"] < 0.9 * bounds["liplt"]["value"]
    assert {b["guarantee"] for b in bounds.values()} == {"verified"}
    assert math.isclose(bounds["lipsdp"]["over_attained"], bounds["lipsdp"]["value"] / row["attained"])


def test_the_gallery_has_what_people_write() -> None:
    assert {
        "resnet_preactivation", "resnet_postactivation", "cnn_average_pooling", "cnn_max_pooling", "cnn_strided",
        "decoder", "densenet", "u_net", "mlp_mixer", "gelu_convnext", "silu_csp", "mobilenet_relu6", "resnext",
        "mobilenet_hard_swish", "squeezenet", "lenet5",
    } <= set(GALLERY)  # fmt: skip
