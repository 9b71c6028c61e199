"""benchmarks/record.py: its constants are upper bounds, its accuracies are counted, and a small run is proved."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lipbounds.training.lipnext import LipNeXt

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
proof = importlib.import_module("record_proof")

RNG = np.random.default_rng(0)


def network() -> Any:
    """A small LipNeXt whose matrices have lost their orthogonality."""
    model = LipNeXt((8, 8, 3), depths=[2, 1], width=8, features=16, symmetric=True, std=0.5, rngs=nnx.Rngs(0))
    model.scales[0][1].differences.kernel[...] *= 1.5
    model.dense[0].sums.kernel[...] += 0.01
    model.head.kernel[...] *= 3.0  # its columns are divided by their lengths
    return model


def matrix(layer: Any) -> np.ndarray:
    """The whole matrix of a layer, in float64."""
    p, q = (np.asarray(part.kernel[...], np.float64) for part in (layer.sums, layer.differences))
    return np.block([[p + q, p - q], [p - q, p + q]]) / 2


def test_the_pairs_constants_are_norms_times_distances() -> None:
    model = network()
    pairs, norms = proof.proved_pairs(model)
    layers = [*model.scales[0], *model.scales[1], model.windows, *model.dense]
    exact = [np.linalg.norm(matrix(one), 2) for one in layers]
    assert len(norms) == len(exact) == 5
    np.testing.assert_allclose(norms, exact, rtol=1e-6)
    assert all(a >= b for a, b in zip(norms, exact, strict=True)) and norms[1] > 1.49
    head = np.asarray(model.head.kernel[...], np.float64)
    head /= np.linalg.norm(head, axis=0)
    apart = np.linalg.norm(head[:, :, None] - head[:, None, :], axis=0)
    bound = np.prod(exact) / 0.5 * apart
    off = ~np.eye(10, dtype=bool)
    assert np.all(pairs[off] >= bound[off])
    np.testing.assert_allclose(pairs[off], bound[off], rtol=1e-5)


def test_outputs_move_by_at_most_the_constants() -> None:
    model = network()
    pairs, _ = proof.proved_pairs(model)
    x = RNG.integers(1, 255, size=(200, 8, 8, 3)).astype(np.uint8)
    y = (x + RNG.integers(-1, 2, size=x.shape)).astype(np.uint8)
    change = proof.outputs_in_float64(model, y) - proof.outputs_in_float64(model, x)
    length = np.linalg.norm((np.asarray(y, np.float64) - x).reshape(200, -1) / 255, axis=1)
    assert np.all(np.abs(change[:, :, None] - change[:, None, :]) <= pairs * length[:, None, None])


def test_margins_are_compared_with_every_pair() -> None:
    logits = np.array([[2.0, 0.0, 1.5], [0.0, 0.1, -1.0], [1.0, 0.0, 3.0]])
    pairs = np.array([[0.0, 8.0, 1.0], [8.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    labels = np.array([0, 1, 1])
    # radii in 255ths: the lesser of 255 * 2 / 8 and 255 * 0.5, so 63.75; 3.2; a wrong answer
    found = proof.accuracies(logits, labels, pairs)
    assert found == pytest.approx(
        {"clean": 2 / 3, "certified 36/255": 1 / 3, "certified 72/255": 0.0, "certified 108/255": 0.0}
    )
    assert proof.accuracies(logits, labels, 2 * pairs)["certified 36/255"] == 0
    assert proof.accuracies(logits, labels, pairs, slack=0.1)["clean"] == pytest.approx(1 / 3)


def test_weights_are_restored_from_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "PIECE", 600)
    weights = nnx.state(network(), nnx.Param)
    proof.save(tmp_path, weights, {"epochs": 3})
    places = sorted(tmp_path.glob("record-*.npz"))
    assert len(places) > 5 and json.loads((tmp_path / "record.json").read_text()) == {"epochs": 3}
    again = proof.restore(tmp_path, jax.tree.map(jnp.zeros_like, weights))
    for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a).astype(np.float16), b)


@pytest.mark.slow  # two programs of a training step and of its tests
def test_a_small_run_is_proved_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = importlib.import_module("record")
    folder, out = tmp_path / "cifar-10-batches-bin", tmp_path / "out"
    folder.mkdir()
    rng = np.random.default_rng(1)  # patterns of others are harder to tell apart
    patterns = rng.uniform(50, 200, size=(10, 3072))
    for name in [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]:
        labels = np.arange(100) % 10
        pixels = np.clip(patterns[labels] + rng.normal(scale=20, size=(100, 3072)), 0, 255)
        rows = np.concatenate([labels[:, None], pixels], axis=1).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(rows.tobytes())
    (folder / "batches.meta.txt").write_text("\n".join("abcdefghij") + "\n")
    command = ["record.py", "--data-dir", str(tmp_path), "--out", str(out), "--precision", "float32"]
    command += ["--epochs", "40", "--depths", "1", "1", "--width", "8", "--features", "16"]
    command += [
        "--angle",
        "0.05",
        "--images",
        "500",
        "--tests",
        "100",
        "--batch",
        "100",
        "--rise",
        "20",
        "--decay",
        "0.9",
    ]
    monkeypatch.setattr(sys, "argv", command)
    # optax mixes integers and floats in its Adam of Nesterov's form
    with jax.numpy_dtype_promotion("standard"):
        record.main()
    facts = json.loads((out / "record.json").read_text())
    assert facts["epochs"] == 40 and 1.0 < facts["proved"]["largest L_ij"] < 2.01
    assert facts["proved"]["clean"] > 0.9 and facts["proved"]["certified 36/255"] > 0.7
    monkeypatch.setattr(sys, "argv", [*command, "--resume"])
    with jax.numpy_dtype_promotion("standard"):
        record.main()
    again = json.loads((out / "record.json").read_text())
    assert again["pieces"] == 2 and again["epochs"] == 80 and again["log"][0] == facts["log"][0]
