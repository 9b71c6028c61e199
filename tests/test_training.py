"""Models, data and the store."""

import itertools
import json
import os
import struct

import jax
import numpy as np
import pytest
from flax import nnx

from lipbounds.training import store
from lipbounds.training.data import digits
from lipbounds.training.models import ARCHITECTURES, ModelSpec, build, maxmin
from lipbounds.training.store import StoreError, load_model, save_model

SMALL = {
    "mlp": ModelSpec("mlp", (4, 4, 1), {"widths": "16-6-3", "mean": 0.25, "std": 0.5}),
    "residual_cnn": ModelSpec("residual_cnn", (8, 4, 2), {"channels": 4, "blocks": 1, "classes": 3}),
    "2C2F": ModelSpec("2C2F", (8, 8, 1), {"classes": 5, "activation": "maxmin"}),
}


def weights_of(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


@pytest.mark.slow
@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(SMALL))
def test_one_image_and_a_batch_agree(name):
    model = build(SMALL[name])
    x = np.random.default_rng(0).random((3, *SMALL[name].input_shape), np.float32)
    batch = np.asarray(model(x))
    assert batch.shape[0] == 3 and batch.ndim == 2
    np.testing.assert_allclose(batch, np.stack([model(row) for row in x]), rtol=0, atol=1e-5)
    assert np.abs(batch[0] - batch[1]).max() > 1e-4


def test_normalisation_is_part_of_the_model():
    plain = ModelSpec("mlp", (4, 4, 1), {"widths": "16-6-3"})
    x = np.random.default_rng(0).random((4, 4, 1), np.float32)
    inside = build(SMALL["mlp"], seed=3)(x)
    outside = build(plain, seed=3)((x - np.float32(0.25)) / np.float32(0.5))
    np.testing.assert_allclose(inside, outside, rtol=1e-6)


# Parameters by the layer tables of arXiv 2310.00116 (convolutions 3x3 or 4x4, biases counted).
@pytest.mark.parametrize(
    ("name", "shape", "convolutions", "dense"),
    [
        ("2C2F", (28, 28, 1), [(1, 16, 4), (16, 32, 4)], [1568, 100, 10]),
        ("4C3F", (28, 28, 1), [(1, 32, 3), (32, 32, 4), (32, 64, 3), (64, 64, 4)], [3136, 512, 512, 10]),
        (
            "6C2F",
            (32, 32, 3),
            [(3, 32, 3), (32, 32, 4), (32, 64, 3), (64, 64, 4), (64, 64, 3), (64, 64, 4)],
            [1024, 512, 10],
        ),
    ],
)
def test_benchmark_architectures_have_the_published_layers(name, shape, convolutions, dense):
    model = nnx.eval_shape(lambda: build(ModelSpec(name, shape)))
    found = sorted(tuple(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model)))
    wanted = [(k, k, a, b) for a, b, k in convolutions] + [(b,) for _, b, _ in convolutions]
    wanted += [*itertools.pairwise(dense), *((b,) for b in dense[1:])]
    assert found == sorted(wanted)


def test_maxmin_permutes_pairs():
    x = np.float32([[3, -1, 2, 5]])
    np.testing.assert_array_equal(maxmin(x), [[3, 5, 2, -1]])
    with pytest.raises(ValueError, match="even number of channels, got 3"):
        maxmin(x[:, :3])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("vgg", (8, 8, 1)), "unknown architecture 'vgg'.*mlp"),
        (ModelSpec("mlp", (8, 8, 1), {"widths": "64-x-10"}), "at least two positive numbers"),
        (ModelSpec("mlp", (8, 8, 1), {"widths": "63-10"}), "start with 63, but an input has 64 pixels"),
        (ModelSpec("mlp", (8, 8, 1), {"widths": "64-10", "activation": "selu"}), "unknown activation 'selu'"),
        (ModelSpec("mlp", (8, 8, 1)), "cannot be built with"),
        (
            ModelSpec("2C2F", (8, 8, 1), {"depth": 3}),
            "2C2F has no argument depth; it has activation, classes",
        ),
        (ModelSpec("2C2F", (1, 1, 1)), "too small"),
        (ModelSpec("mlp", (8, 8), {"widths": "64-10"}), "height, width, channels"),
    ],
)
def test_impossible_models_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_every_architecture_is_documented_by_a_spec():
    # tests/test_layers.py, tests/test_recipes.py, tests/test_lipnext.py and tests/test_batch_norm.py
    elsewhere = {"liresnet", "lipnext", "lipconvnet", "orthogonal_4C3F", "residual_lipschitz", "batch_norm"}
    assert set(SMALL) | {"4C3F", "6C2F", "8C2F"} | elsewhere == set(ARCHITECTURES)


def test_digits_are_pixels_in_a_fixed_stratified_split():
    data, again = digits(), digits()
    assert data.input_shape == (8, 8, 1) and data.classes == 10
    assert len(data.train_x) == len(data.train_y) == 1437 and len(data.test_x) == len(data.test_y) == 360
    assert data.train_x.dtype == np.float32 and data.train_x.min() == 0 and data.train_x.max() == 1
    np.testing.assert_array_equal(data.test_x, again.test_x)
    shares = [np.bincount(y) / len(y) for y in (data.train_y, data.test_y)]
    np.testing.assert_allclose(*shares, atol=0.005)
    rows = np.concatenate([data.train_x, data.test_x]).reshape(1797, -1)
    assert len(np.unique(rows, axis=0)) == 1797  # no image stands in both parts


# ---------------------------------------------------------------------------------------------------- store
@pytest.fixture
def saved(tmp_path):
    model = build(SMALL["residual_cnn"], seed=5)
    return save_model(tmp_path / "model.safetensors", model, SMALL["residual_cnn"]), model


def test_a_model_comes_back_bit_for_bit(saved):
    path, model = saved
    loaded, spec = load_model(path)
    assert spec == SMALL["residual_cnn"]
    x = np.random.default_rng(0).random((2, 8, 4, 2), np.float32)
    np.testing.assert_array_equal(model(x), loaded(x))
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_one_plain_error(saved, keep):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match="not a complete .safetensors file"):
        load_model(path)


def rewrite(path, change):
    """Change the header of a .safetensors file (8 bytes of length, JSON, data)."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edited(**changes):
    def change(header):
        entry = json.loads(header["__metadata__"]["lipbounds-model"]) | changes
        header["__metadata__"]["lipbounds-model"] = json.dumps(entry)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("__metadata__"), "was not written by lipbounds"),
        (edited(format="pickle"), "is not a lipbounds-model file"),
        (edited(version=2), "version 2; this program reads 1"),
        (edited(architecture="os.system"), "unknown architecture 'os.system'"),
        (edited(architecture=None), "names no architecture"),
        (edited(arguments=[1]), "no arguments"),
        (edited(arguments={"channels": "4"}), "cannot be built with"),
        (edited(arguments={"rngs": 0}), "has no argument rngs"),
        (edited(arguments={"channels": 5, "blocks": 1, "classes": 3}), "the architecture needs float32"),
        (
            edited(arguments={"channels": 4, "blocks": 2, "classes": 3}),
            "do not fit the architecture: blocks.1",
        ),
        (edited(input_shape=[8, 8]), "no input shape of three numbers"),
        (edited(input_shape=["8", 4, 2]), "height, width, channels"),
        (lambda header: header["__metadata__"].update({"lipbounds-model": "{"}), "the header is not JSON"),
    ],
)
def test_a_wrong_header_is_one_plain_error(saved, change, message):
    path, _ = saved
    rewrite(path, change)
    with pytest.raises(StoreError, match=message):
        load_model(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        load_model(path)
    path.write_bytes(b"PK\x03\x04 certainly not safetensors")
    with pytest.raises(StoreError, match="not a complete"):
        load_model(path)


def test_a_model_that_is_not_its_spec_is_not_written(tmp_path):
    with pytest.raises(StoreError, match="do not fit"):
        save_model(tmp_path / "m.safetensors", build(SMALL["mlp"]), SMALL["residual_cnn"])
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(saved, monkeypatch):
    path, _ = saved
    old = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(store.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_model(path, build(SMALL["mlp"]), SMALL["mlp"])
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]
