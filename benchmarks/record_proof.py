"""What `record.py` does at the end: outputs, proved constants, certified accuracies, files."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import pathlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EPS = 36 / 255
PIECE = 15_000_000  # bytes of a file of weights


@partial(jax.jit, static_argnums=0)
def _logits(graph: Any, weights: Any, images: Any) -> Any:
    model, x = nnx.merge(graph, weights), images.astype(jax.tree.leaves(weights)[0].dtype) / 255
    return (model(x) + model(x[:, :, ::-1])) / 2


def outputs(model: Any, images: np.ndarray, batch: int = 500) -> np.ndarray:
    """(n, K) means of the logits of images (bytes) and of their mirror images, in the type of the weights."""
    graph, weights = nnx.split(model)
    parts = [_logits(graph, weights, images[i : i + batch]) for i in range(0, len(images), batch)]
    return np.concatenate([np.asarray(part) for part in parts])


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


def _torus_norm(kernel: np.ndarray, image: tuple[int, int]) -> float:
    from lipbounds._norms.fourier import conv_fft_bound

    return conv_fft_bound(kernel, image)


def proved_pairs(model: Any) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """((K, K) proved constants, norms by layer): the product of verified norms, rounding included.

    Blocks by the Fourier transform; stem, neck and dense maps by a Cholesky factorisation of their Gram matrices. The
    matrix of the stem and the product of the two neck maps are formed in float64, whose rounding is far below the
    factor 1 + 1e-9 by which norms are raised.
    """
    from lipbounds.norms import verified_norm

    blocks = [(np.asarray(b.weights()), b.image) for scale in model.scales for b in scale]
    count = min(len(blocks), max(1, (os.cpu_count() or 2) - 2))
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork does not survive
    with _one_thread(), ProcessPoolExecutor(max_workers=count, mp_context=spawn) as pool:
        running = [pool.submit(_torus_norm, *block) for block in blocks]
        norms = [("stem", verified_norm(stem_matrix(np.asarray(model.stem.kernel.get_value(), np.float64))))]
        norms.append(("neck", verified_norm(neck_matrix(model))))
        for layer in model.dense:
            norms.append(("dense", verified_norm(np.asarray(layer.weights(), np.float64))))
        norms += [("block", future.result()) for future in running]
    total = math.prod(value for _, value in norms) * (1 + 1e-9)
    head = np.asarray(model.head.weights(), np.float64)
    apart = np.sqrt(((head[:, :, None] - head[:, None, :]) ** 2).sum(axis=0)) * (1 + 1e-9)
    return total * apart, norms


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that start inside use one thread of the linear algebra library each, and no accelerator."""
    changes = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def stem_matrix(kernel: np.ndarray, size: int = 32) -> np.ndarray:
    """(outputs, inputs) of the stem: window 5, stride 2, zero padding 2."""
    half, (*_, colours, width) = size // 2, kernel.shape
    matrix = np.zeros((half, half, width, size, size, colours))
    for i in range(half):
        for j in range(half):
            for a in range(5):
                for b in range(5):
                    row, column = 2 * i + a - 2, 2 * j + b - 2
                    if 0 <= row < size and 0 <= column < size:
                        matrix[i, j, :, row, column] = kernel[a, b].T
    return matrix.reshape(half * half * width, -1)


def neck_matrix(model: Any) -> np.ndarray:
    """(inputs, features) of the two maps of the neck, up to the order of the inputs."""
    windows = np.asarray(model.windows.weights(), np.float64)
    neck = np.asarray(model.neck.weights(), np.float64)
    parts = neck.reshape(-1, windows.shape[1], neck.shape[1])
    return np.concatenate([windows @ part for part in parts])


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
