"""Plain training: cross-entropy and Adam, one jitted scan per epoch, the data on the device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

Progress = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """`losses` is the mean cross-entropy of each epoch, in nats; `seconds` includes compilation."""

    losses: tuple[float, ...]
    seconds: float


def fit(
    model: nnx.Module,
    x: np.ndarray,
    y: np.ndarray,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[nnx.Module, TrainingLog]:
    """Train a copy of `model` on images `x` (n, ...) and labels `y` (n,); the model given is not changed.

    Every epoch visits the data in a new random order and drops the last incomplete batch. `progress` is
    called with the number of finished epochs and the last loss. Raises ValueError for impossible arguments
    and FloatingPointError when the loss stops being finite.
    """
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"as many images as labels are needed, and at least one: got {len(x)} and {len(y)}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be positive, got {epochs} and {batch_size}")
    batch_size = min(batch_size, len(x))
    parts: Any = nnx.split(model, nnx.Param, ...)
    graph, params, rest = parts
    optimizer = optax.adam(learning_rate)
    images, labels = jnp.asarray(x), jnp.asarray(y, jnp.int32)

    def loss_of(params: Any, batch: jax.Array, targets: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @jax.jit
    def epoch(params: Any, moments: Any, key: jax.Array, images: jax.Array, labels: jax.Array) -> Any:
        order = jax.random.permutation(key, len(images))
        batches = order[: len(images) // batch_size * batch_size].reshape(-1, batch_size)

        def step(carry: Any, rows: jax.Array) -> Any:
            params, moments = carry
            loss, grads = jax.value_and_grad(loss_of)(params, images[rows], labels[rows])
            with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction is float ** int
                updates, moments = optimizer.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        (params, moments), losses = jax.lax.scan(step, (params, moments), batches)
        return params, moments, losses.mean()

    start = time.perf_counter()
    moments = optimizer.init(params)
    losses = []
    for number, key in enumerate(jax.random.split(jax.random.key(seed), epochs), start=1):
        params, moments, loss = epoch(params, moments, key, images, labels)
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} in epoch {number}: lower the learning rate")
        if progress is not None:
            progress(number, losses[-1])
    return nnx.merge(graph, params, rest), TrainingLog(tuple(losses), time.perf_counter() - start)


def accuracy(model: nnx.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Share of images whose largest logit is the label's, in [0, 1]."""
    if len(x) == 0:
        raise ValueError("the accuracy on no images is not defined")
    graph, state = nnx.split(model)
    logits = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))(state, jnp.asarray(x))
    return float(np.mean(np.asarray(logits).argmax(axis=-1) == np.asarray(y)))
