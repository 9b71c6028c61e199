"""LipNeXt: shifts are permutations, the proved constant is 1, and channels are centred, by batches and afterwards."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipbounds as lb
from lipbounds.training import Config, fit
from lipbounds.training.activations import maxmin
from lipbounds.training.data import digits
from lipbounds.training.layers import Centre, downsample
from lipbounds.training.lipnext import LipNeXt, parse, shift
from lipbounds.training.mirrored import SymmetricMixer
from lipbounds.training.models import build, spec_for
from lipbounds.training.runs import open_run


@pytest.mark.parametrize("channels, share, moved", [(8, 1.0, 8), (8, 0.5, 0), (20, 0.8, 16), (32, 0.5, 16)])
def test_a_share_of_the_channels_moves_by_one_pixel_each_way(channels: int, share: float, moved: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 5, channels)).astype(np.float32)
    expected, size = x.copy(), moved // 4
    for number, (down, right) in enumerate([(0, 1), (0, -1), (1, 0), (-1, 0)]):
        for row in range(3):
            for column in range(5):
                part = slice(number * size, (number + 1) * size)
                expected[:, (row + down) % 3, (column + right) % 5, part] = x[:, row, column, part]
    np.testing.assert_array_equal(shift(x, share), expected)
    assert moved == 0 or not np.array_equal(expected, x)


def test_centring_uses_the_batch_in_training_and_the_running_mean_afterwards() -> None:
    centre = Centre(3, rngs=nnx.Rngs(0))
    centre.bias.set_value(jnp.array([1.0, 0.0, -2.0]))
    x = jnp.asarray(np.random.default_rng(1).normal(5, 1, (4, 2, 2, 3)), jnp.float32)
    np.testing.assert_array_equal(centre(x), x + centre.bias.get_value())  # nothing seen yet
    centre.train()
    np.testing.assert_allclose(centre(x).mean((0, 1, 2)), [1, 0, -2], atol=1e-6)
    np.testing.assert_allclose(centre.mean.get_value(), 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    centre.eval()
    np.testing.assert_allclose(centre(x), x - 0.1 * x.mean((0, 1, 2)) + centre.bias.get_value(), rtol=1e-5)
    assert centre(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "name, shape",
    [
        ("lipnext-L2W8", (4, 4, 1)),
        ("lipnext-L2W8-symmetric", (4, 4, 1)),
        pytest.param("lipnext-L1-2W8-reflection", (8, 12, 3), marks=pytest.mark.slow),
        pytest.param("lipnext-L1W8", (14, 14, 1), marks=pytest.mark.slow),
    ],
)
def test_the_proved_constant_is_one(name: str, shape: tuple[int, ...]) -> None:
    model: Any = build(spec_for(name, shape, 10))
    form = lb.trace(model, jax.ShapeDtypeStruct(shape, jnp.float32))
    found = lb.naive(form, pairwise=True, progress=False)
    apart = np.asarray(model.head.weights())
    np.testing.assert_allclose(found.pairwise[0, 1], np.linalg.norm(apart[:, 0] - apart[:, 1]), rtol=2e-4)
    assert found.guarantee == "verified"
    x = np.random.default_rng(0).random((3, *shape), np.float32)
    np.testing.assert_allclose(model(x)[1], model(x[1]), atol=1e-6)


def test_a_trained_network_is_centred_and_comes_back(tmp_path: Any) -> None:
    """The means of the averaged weights are those of the images, and are stored with the network."""
    config = Config(
        arch="lipnext-L1W8",
        loss="margin",
        constants="naive",
        eps=0.2,
        temperature=0.1,
        average="ema",
        ema_decay=0.9,
        warmup=0,
        epochs=2,
        batch_size=64,
        learning_rate=1e-2,
        angle=0.05,
        validate_every=0,
    )
    fitted = fit(config, out=tmp_path / "run")
    again: Any = open_run(tmp_path / "run").model
    x = digits().train_x
    np.testing.assert_array_equal(fitted.model(x), again(x))
    layer = again.scales[0][0]
    seen = layer.dense(downsample((x - again.mean) / again.std, 2)).mean((0, 1, 2))
    np.testing.assert_allclose(layer.centre.mean.get_value(), seen, atol=0.02)
    assert float(np.abs(seen).max()) > 0.1
    for part in (layer, again.windows, again.dense[0]):  # averages of turned matrices, orthonormal again
        values = np.linalg.svd(part.dense.kernel.get_value(), compute_uv=False)
        np.testing.assert_allclose(values, 1, atol=1e-5)
    begin: Any = build(fitted.spec, seed=0)
    assert np.abs(begin.windows.dense.kernel.get_value() - again.windows.dense.kernel.get_value()).max() > 0.1


@pytest.mark.parametrize("shape, depths", [((8, 8, 3), [2, 2]), ((8, 12, 1), [1, 2]), ((14, 14, 1), [3])])
@pytest.mark.parametrize("kind", ["stiefel", "cholesky"])
def test_mirroring_does_not_change_a_symmetric_network(
    shape: tuple[int, ...], depths: list[int], kind: str
) -> None:
    model = LipNeXt(shape, depths=depths, width=16, dense=2, kind=kind, symmetric=True, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(2)
    for layer in model.mixers:
        layer.centre.bias.set_value(jnp.asarray(rng.normal(size=layer.centre.bias.shape), jnp.float32))
    x = rng.random((5, *shape), np.float32)
    np.testing.assert_allclose(model(x), model(x[:, :, ::-1]), atol=1e-5)
    assert np.abs(model(x) - model(x[:, ::-1])).max() > 1e-3  # upside down


def test_sums_and_differences_of_the_halves_are_mixed_apart() -> None:
    rng = np.random.default_rng(3)
    mixer = SymmetricMixer(12, 8, "stiefel", rngs=nnx.Rngs(0))
    mixer.sums.kernel[...] *= 1.5
    mixer.centre.bias.set_value(jnp.asarray(rng.normal(size=4), jnp.float32))
    h = rng.normal(size=(7, 2, 6)).astype(np.float32)
    bias = np.tile(mixer.centre.bias.get_value(), 2)
    plain = maxmin(jnp.asarray((h.reshape(7, 12) @ mixer.weights() + bias).reshape(7, 2, 4)))
    np.testing.assert_allclose(mixer(h), plain, atol=1e-5)
    assert np.linalg.norm(mixer.weights(), 2) == pytest.approx(1.5, rel=1e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    assert parse("resnet18") is None
    assert parse("lipnext-L2-4W32-cayley") == {"depths": [2, 4], "width": 32, "kind": "cayley"}
    symmetric = {"depths": [6], "width": 64, "symmetric": True}
    assert parse("LipNeXt-L6W64-symmetric") == symmetric
    assert parse("lipnext-L6W64F96-aol-symmetric") == {**symmetric, "features": 96, "kind": "aol"}
    for name, words in (
        ("lipnext-6", "lipnext-L6W64"),
        ("lipnext-L0W8", "needs depths"),
        ("lipnext-L2W7", "even width"),
        ("lipnext-L2W8F9", "even features"),
        ("lipnext-L2W6-symmetric", "multiples of 4 if symmetric"),
        ("lipnext-L2W8-symmetric-cayley", "behind them may stand"),
        ("lipnext-L2W8F-cayley", "behind them may stand"),
        ("lipnext-L1-1-1W8", "multiples of 8"),
        ("lipnext-L2W8-residual", "kind must be"),
    ):
        with pytest.raises(ValueError, match=words):
            build(spec_for(name, (28, 28, 1), 10))
    with pytest.raises(ValueError, match="needs depths"):
        LipNeXt((8, 8, 1), depths=[], width=8, rngs=nnx.Rngs(0))
