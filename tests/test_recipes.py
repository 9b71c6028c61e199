"""Losses, optimisers, schedules and augmentation as the 1-Lipschitz papers train, and networks by name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lipbounds as lb
from lipbounds.training import Config, fit, losses, parallel, resume
from lipbounds.training.augment import crop, cutout, jitter
from lipbounds.training.data import digits
from lipbounds.training.lipschitz_nets import OrthogonalConvNet
from lipbounds.training.models import build, spec_for
from lipbounds.training.optimisers import lookahead, schedule
from lipbounds.training.step import trainer

Z = jnp.array([[2.0, 1.0, -1.0], [0.0, 1.5, 1.0], [0.2, 0.1, 0.0]])
Y = jnp.array([0, 2, 0])
PAIRS = jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, 0.5], [2.0, 0.5, 0.0]])


def test_emma_moves_every_wrong_class_to_a_tie_or_by_eps() -> None:
    """By hand: example 1 answers wrong by 0.5, so class 1 gets eps / 100; class 0 lies 1 behind and 2 L away."""
    eps, moved = 0.4, np.asarray(Z).copy()
    moved[0, 1] += 0.4 * 1.0  # radius 1 is beyond eps
    moved[0, 2] += 0.4 * 2.0
    moved[1, 0] += 0.4 * 2.0
    moved[1, 1] += 0.004 * 0.5
    moved[2, 1] += 0.1  # a tie
    moved[2, 2] += 0.2
    wanted = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(moved), Y).mean()
    np.testing.assert_allclose(losses.emma(Z, Y, PAIRS, eps=eps), wanted, rtol=1e-6)
    gradient = jax.grad(lambda p: losses.emma(Z, Y, p, eps=eps))(PAIRS)
    assert bool(jnp.isfinite(gradient).all()) and float(gradient[0, 1]) > 0


def test_margin_loss_reads_radii() -> None:
    """Logits and constants that grow alike change nothing; the force falls off a temperature beyond eps."""
    value = losses.margin(Z, Y, PAIRS, eps=0.3, temperature=0.1)
    np.testing.assert_allclose(losses.margin(7 * Z, Y, 7 * PAIRS, eps=0.3, temperature=0.1), value, rtol=1e-5)
    far = jnp.array([[9.0, 0.0, 0.0]])
    assert losses.margin(far, jnp.array([0]), PAIRS, eps=0.3, temperature=0.1) < 1e-6


def test_gloro_trades_is_the_divergence_from_the_network_with_its_extra_class() -> None:
    extra = np.array([max(1 + 0.3 * 1, -1 + 0.3 * 2), max(0 + 0.3 * 1, 1 + 0.3 * 0.5), max(0.1 + 0.3, 0.6)])
    s = np.asarray(jax.nn.softmax(Z))
    joined = np.asarray(jax.nn.softmax(jnp.concatenate([Z, jnp.asarray(extra, jnp.float32)[:, None]], 1)))
    divergence = (s * np.log(s / joined[:, :3])).sum(axis=1).mean()
    wanted = losses.cross_entropy(Z, Y) + 2 * divergence
    np.testing.assert_allclose(losses.gloro_trades(Z, Y, PAIRS, eps=0.3, weight=2.0), wanted, rtol=1e-5)


def test_the_certificate_penalty_counts_what_right_answers_lack() -> None:
    # radii 1 (enough), wrong, 0.1 of 0.4
    np.testing.assert_allclose(losses.certificate_penalty(Z, Y, PAIRS, eps=0.4), 0.75 / 3, rtol=1e-5)


@pytest.mark.parametrize("border, mode", [("black", "constant"), ("mirror", "reflect")])
def test_crops_are_shifts_and_cutouts_are_squares(border: str, mode: Any) -> None:
    x = jnp.arange(1.0, 2 * 6 * 5 + 1).reshape(2, 6, 5, 1)
    rim = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)), mode)
    seen = set()
    for k in range(8):
        for image, found in enumerate(np.asarray(crop(jax.random.key(k), x, 2, mirrored=border == "mirror"))):
            places = [
                (i, j)
                for i in range(5)
                for j in range(5)
                if np.array_equal(rim[image, i : i + 6, j : j + 5], found)
            ]
            assert len(places) == 1
            seen.add(places[0])
        blank = np.asarray(cutout(jax.random.key(k), x, 2, fill=-1.0))[..., 0]
        for one, before in zip(blank, np.asarray(x)[..., 0], strict=True):
            rows, columns = np.nonzero(one == -1)
            assert 1 <= rows.size <= 4 and np.ptp(rows) <= 1 and np.ptp(columns) <= 1
            assert np.array_equal(one[one != -1], before[one != -1])
    assert len(seen) > 8


def test_jitter_changes_brightness_contrast_and_saturation_alone() -> None:
    x = jax.random.uniform(jax.random.key(1), (64, 5, 4, 3), minval=0.4, maxval=0.6)
    shares = []
    for given, found in zip(np.asarray(x), np.asarray(jitter(jax.random.key(0), x, 0.2)), strict=True):
        inner, outer = given - given.mean(axis=2, keepdims=True), found - found.mean(axis=2, keepdims=True)
        colour = np.vdot(inner, outer) / np.vdot(inner, inner)
        np.testing.assert_allclose(outer, colour * inner, atol=1e-5)
        inner, outer = given.mean(axis=2) - given.mean(), found.mean(axis=2) - found.mean()
        contrast = np.vdot(inner, outer) / np.vdot(inner, inner)
        np.testing.assert_allclose(outer, contrast * inner, atol=1e-5)
        shares.append((found.mean() - given.mean(), contrast - 1, colour / contrast / 2 - 0.5))
    assert np.all(np.abs(shares) <= 0.2 + 1e-5)
    assert np.all(np.min(shares, axis=0) < -0.15) and np.all(np.max(shares, axis=0) > 0.15)
    np.testing.assert_allclose(jitter(jax.random.key(0), x, 0.0), x, atol=1e-6)
    wide = jitter(jax.random.key(0), jnp.round(x), 0.4)
    assert wide.min() == 0 and wide.max() == 1


@pytest.mark.parametrize("border", ["black", "mirror"])
def test_the_border_of_a_crop_is_a_setting(border: str) -> None:
    config = Config(arch="64-10", loss="cross-entropy", epochs=1, batch_size=4, crop=7, border=border)
    made = trainer(config, build(config.spec((8, 8, 1), 10)), (8, 8, 1), 255, 4, parallel.devices(1))
    x = made.batch(np.full((4, 8, 8, 1), 255, np.uint8), np.arange(4), jax.random.key(0))
    assert np.any(np.asarray(x) == 0) == (border == "black")
    with pytest.raises(ValueError, match="no 8 pixels to mirror"):
        crop(jax.random.key(0), x, 8, mirrored=True)


def test_lookahead_goes_half_the_way_back() -> None:
    inner = optax.sgd(0.5)
    rule, weights = lookahead(inner, 3), {"w": jnp.array([4.0, -2.0])}
    state = rule.init(weights)
    fast = slow = np.array([4.0, -2.0])
    for step in range(1, 8):
        updates, state = rule.update(weights, state, weights)  # the gradient of |w|^2 / 2
        weights = optax.apply_updates(weights, updates)
        fast = 0.5 * fast
        if step % 3 == 0:
            slow = fast = slow + 0.5 * (fast - slow)
        np.testing.assert_allclose(weights["w"], fast, rtol=1e-6)


def test_schedules_have_their_edges() -> None:
    config = Config(epochs=20, decay_from=4, learning_rate=1e-2, final_learning_rate=1e-4)
    steps = dataclasses.replace(config, schedule="multi-step")
    rates = [float(schedule(steps, 10, 1e-2, 1e-4)(t)) for t in (0, 119, 121, 159, 161)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-3, 1e-3, 1e-4], rtol=1e-5)
    named = dataclasses.replace(steps, milestones="5,6,18")
    rates = [float(schedule(named, 10, 1e-2, 1e-4)(t)) for t in (0, 49, 51, 59, 61, 179, 181)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5], rtol=1e-5)
    late = dataclasses.replace(named, decay_from=20)  # milestones count from the first epoch
    assert rates == [float(schedule(late, 10, 1e-2, 1e-4)(t)) for t in (0, 49, 51, 59, 61, 179, 181)]
    cyclic = dataclasses.replace(config, schedule="cyclic")
    rates = [float(schedule(cyclic, 10, 1e-2, 1e-4)(t)) for t in (0, 40, 104, 200)]
    np.testing.assert_allclose(rates, [1e-2, 1e-4, 1e-2, 1e-4], rtol=1e-5)


@pytest.mark.parametrize(
    "name, words",
    [
        ("liresnet-6", "liresnet-L6W64"),
        ("liresnet-LxW4", "liresnet-L6W64"),
        ("lipconvnet-", "lipconvnet-10"),
        ("lipconvnet-7", "multiple of 5"),
        ("lipconvnet-5-best", "kind must be"),
        ("4C3F-", "kind must be"),
        ("4C3F-cholesky-2", "4C3F-cholesky"),
        ("sll-rnn-L2W8", "sll-mlp-L4W256"),
        ("aol-mlp-L0W8", "needs blocks"),
        ("liresnet-L2W7", "even width"),
    ],
)
def test_names_that_are_none_say_what_names_are(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(spec_for(name, (32, 32, 3), 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, constant",
    [
        ("lipconvnet-3", 1.0),
        ("lipconvnet-6-exponential", 1.0),
        ("lipconvnet-3-cayley", 1.0),
        ("lipconvnet-3-aol", 1.0),
        ("4C3F-cholesky", 1.0),
        ("aol-mlp-L2W16", 1.0),
        ("aol-cnn-L1W4", 1.0),
    ],
)
def test_networks_of_constant_one_are_proved_so(name: str, constant: float) -> None:
    """Each output is 1-Lipschitz, so the pairs are sqrt(2)-Lipschitz at orthogonal columns, 2 at most."""
    spec = spec_for(name, (8, 8, 1), 10)
    form = lb.trace(build(spec, 3), jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
    found = lb.naive(form, pairwise=True, progress=False)
    assert found.per_class is not None and found.guarantee == "verified"
    assert found.per_class.max() <= constant * (1 + 5e-6)


def test_a_convnet_of_orthogonal_layers_is_proved_to_have_constant_one() -> None:
    """4C3F-cholesky in small: the constant of a pair of classes is the distance of their columns in the head."""
    model: Any = nnx.eval_shape(lambda: build(spec_for("4C3F-cholesky", (28, 28, 1), 10)))
    shapes = [layer.kernel.shape for layer in (*model.convolutions, *model.dense, model.head)]
    assert shapes[:4] == [(3, 3, 1, 32), (3, 3, 128, 32), (3, 3, 32, 64), (3, 3, 256, 64)]
    assert shapes[4:] == [(3136, 512), (512, 512), (512, 10)]
    # no convolution: tests/test_layers.py has them, and the test above this one the whole network
    model = OrthogonalConvNet((4, 4, 1), convolutions=[], dense=[4], classes=3, rngs=nnx.Rngs(0))
    kernel = model.dense[0].kernel
    kernel.set_value(jax.random.normal(jax.random.key(1), kernel.shape))  # orthogonal at first
    form = lb.trace(model, jax.ShapeDtypeStruct((4, 4, 1), jnp.float32))
    found = lb.naive(form, pairwise=True, progress=False)
    assert found.per_class is not None and found.guarantee == "verified"
    assert found.per_class.max() <= 1 + 1e-6
    head = np.asarray(model.head.weights())
    apart = np.linalg.norm(head[:, :, None] - head[:, None], axis=0)
    np.testing.assert_allclose(found.pairwise, apart, atol=1e-4)


@pytest.mark.slow
def test_sll_networks_need_lipsdp() -> None:
    form = lb.trace(
        build(spec_for("sll-mlp-L1W8", (8, 8, 1), 10), 3), jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)
    )
    proved = lb.lipsdp(form, pairwise=True, progress=False)
    assert proved.per_class is not None and proved.per_class.max() <= 1.05
    assert lb.naive(form, progress=False).value > 1.3 * proved.value


RECIPE = {
    "dataset": "digits",
    "arch": "liresnet-L2W8",
    "loss": "emma",
    "constants": "naive",
    "eps": 0.25,
    "ramp": 3,
    "warmup": 0,
    "epochs": 8,
    "batch_size": 32,
    "learning_rate": 1e-2,
    "schedule": "cosine",
    "optimiser": "nadam",
    "lookahead": 5,
    "clip": 3.0,
    "forward": "bfloat16",
    "average": "ema",
    "ema_decay": 0.95,
    "validate_every": 0,
}


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["liresnet-L2W8", "lipnext-L2W8"])
def test_a_named_network_trains_resumes_and_is_certified(tmp_path: Path, arch: str) -> None:
    """EMMA in bfloat16: certified by a proved bound, and the same weights after an interruption."""
    config, data = Config.usual(**(RECIPE | {"arch": arch})), digits()
    whole = fit(config, data, out=tmp_path / "whole")

    def dies(record: dict[str, Any]) -> None:
        if record["epoch"] == 3:
            raise Killed

    with pytest.raises(Killed):
        fit(config, data, out=tmp_path / "part", progress=dies)
    again = resume(tmp_path / "part", data=data)
    for a, b in zip(jax.tree.leaves(whole.state), jax.tree.leaves(again.state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(nnx.state(whole.model)))
    form = lb.trace(whole.model, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
    bound = lb.naive(form, pairwise=True, progress=False)
    radii = lb.certified_radius(form, data.test_x, data.test_y, bound=bound)
    assert bound.guarantee == "verified"
    assert radii.correct.mean() > 0.7 and radii.accuracy(0.25) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["margin", "gloro-trades", "lipschitz-margin"])
def test_losses_certify_more_than_cross_entropy(loss: str) -> None:
    shares = []
    for name in (loss, "cross-entropy"):
        config = Config.usual(
            **(RECIPE | {"loss": name, "arch": "64-32-10", "forward": "float32", "trades": 3.0, "epochs": 15})
        )
        data = digits()
        fitted = fit(config, data)
        form = lb.trace(fitted.model, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
        bound = lb.naive(form, pairwise=True, progress=False)
        shares.append(lb.certified_radius(form, data.test_x, data.test_y, bound=bound).accuracy(0.25))
    assert shares[0] > shares[1] + 0.05 and math.isfinite(shares[0])
