"""What `record.py` does at the end: outputs, proved constants, certified accuracies, files."""

from __future__ import annotations

import json
import math
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EPS = 36 / 255
BATCH = 500  # images at a time
PIECE = 15_000_000  # bytes of a file of weights


@partial(jax.jit, static_argnums=0)
def _logits(graph: Any, weights: Any, images: Any) -> Any:
    return nnx.merge(graph, weights)(images.astype(jax.tree.leaves(weights)[0].dtype) / 255)


def outputs(model: Any, images: np.ndarray, batch: int = BATCH) -> np.ndarray:
    """(n, K) logits of images (bytes), in the type of the weights."""
    graph, weights = nnx.split(model)
    parts = [_logits(graph, weights, images[i : i + batch]) for i in range(0, len(images), batch)]
    return np.concatenate([np.asarray(part) for part in parts])


def outputs_in_float64(model: Any, images: np.ndarray) -> np.ndarray:
    """`outputs` of the same weights in float64."""
    graph, weights = nnx.split(model)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        exact = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), weights)
        return outputs(nnx.merge(graph, exact), images)


def accuracies(
    logits: np.ndarray, labels: np.ndarray, pairs: np.ndarray, slack: float = 0.0
) -> dict[str, float]:
    """Shares of right answers, and of those whose margins exceed L_yi eps + slack for all i."""
    rows = np.arange(len(labels))
    margins = logits[rows, labels][:, None] - logits
    margins[rows, labels] = np.inf
    reach = pairs[labels]
    found = {"clean": float(np.mean(margins.min(axis=1) > slack))}
    for k in (36, 72, 108):
        found[f"certified {k}/255"] = float(np.mean((margins - reach * (k / 255) > slack).all(axis=1)))
    return found


def distances(head: Any) -> Any:
    """(K, K) distances of the columns of the last layer, constants of pairs behind maps of norm 1."""
    apart = head[:, :, None] - head[:, None, :]
    return jnp.sqrt(jnp.maximum(jnp.sum(apart * apart, axis=0), 1e-12))


def proved_pairs(model: Any) -> tuple[np.ndarray, list[float]]:
    """((K, K) proved constants, norms of the layers): the product of verified norms, rounding included.

    Shifts, permutations of pixels, MaxMin and `mirrored.even` have norm 1, and centring adds constants. The norm of a
    layer is the larger one of those of its two matrices. The columns of the last layer are divided by their lengths in
    float64 here; the factor 1 + 1e-6 covers the rounding of the product and of the distances, for the network in
    float32, too.
    """
    from lipbounds.norms import verified_norm
    from lipbounds.training.layers import unit

    parts = [(layer.sums, layer.differences) for layer in model.mixers]
    norms = [max(verified_norm(np.asarray(p.weights(), np.float64)) for p in pair) for pair in parts]
    with jax.enable_x64(True):
        kernel = jnp.asarray(np.asarray(model.head.kernel.get_value(), np.float64))
        apart = np.asarray(distances(unit(kernel, axis=0)))
    return math.prod(norms) / model.std * apart * (1 + 1e-6), norms


def save(out: pathlib.Path, weights: Any, facts: dict[str, Any]) -> None:
    """Weights in float16 in files record-*.npz of at most `PIECE` bytes, and the facts in record.json."""
    leaves = [np.asarray(a).astype(np.float16) for a in jax.tree.leaves(weights)]
    files: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for number, leaf in enumerate(leaves):
        flat = leaf.ravel()
        for begin in range(0, max(flat.size, 1), PIECE // 4):
            part = flat[begin : begin + PIECE // 4]
            if size + part.nbytes > PIECE:
                files.append({})
                size = 0
            files[-1][f"{number}_{begin}"] = part
            size += part.nbytes
    for number, arrays in enumerate(files):
        place = out / f"record-{number}.npz"
        with place.with_suffix(".part").open("wb") as file:
            np.savez(file, **arrays)
        place.with_suffix(".part").rename(place)
    (out / "record.json").write_text(json.dumps(facts, indent=1) + "\n")


def restore(out: pathlib.Path, weights: Any) -> Any:
    """The weights that `save` wrote, in the structure of `weights`."""
    leaves, tree = jax.tree.flatten(weights)
    parts: dict[int, list[tuple[int, np.ndarray]]] = {}
    for place in sorted(out.glob("record-*.npz")):
        with np.load(place) as arrays:
            for name in arrays.files:
                number, begin = map(int, name.split("_"))
                parts.setdefault(number, []).append((begin, arrays[name]))
    joined = [
        np.concatenate([a for _, a in sorted(parts[n], key=lambda p: p[0])]) for n in range(len(leaves))
    ]
    fresh = [jnp.asarray(a.reshape(leaf.shape), leaf.dtype) for a, leaf in zip(joined, leaves, strict=True)]
    return jax.tree.unflatten(tree, fresh)
