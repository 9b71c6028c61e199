"""CIFAR-10 in minutes: a LipNeXt of constant 1, trained for a given time and certified by a proved bound.

    python benchmarks/record.py --data-dir DATA --out OUT --seconds 390

Everything is ready when the time is over: the number of epochs follows from the measured time of one, learning rates
follow the share of the training time that has passed, and the end of the time is kept for the proof. `--resume` goes on
from the files of an earlier piece in OUT, with fresh moments of the optimiser. Files: record.json (anew after every
test) and record-*.npz (averaged weights in float16, at most 15 MB each; the network that is proved has the orthonormal
matrices next to them, in float32).

One step: batch from the images on the device, crop, jitter and cutout; forward and backward in bfloat16 with float32
weights; orthonormal matrices turn (`lipbounds.training.manifold`), everything else has Adam. There is no
constant in the loss but the distances of the last layer's columns, as all other maps have norm 1. At the end the norm
of every matrix is proved, and their product multiplies the constants.

The network is symmetric (`lipbounds.training.mirrored`): its outputs are the same for an image and its mirror image, so
that training images are not mirrored at random and no mean over two images is taken at the test.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from record_proof import (
    BATCH,
    EPS,
    accuracies,
    distances,
    outputs,
    outputs_in_float64,
    proved_pairs,
    restore,
    save,
)

START = time.monotonic()


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=390, help="of this process, in all")
    parser.add_argument("--epochs", type=int, default=0, help="so many, in place of the time")
    parser.add_argument(
        "--reserve",
        type=float,
        default=15,
        help="seconds kept for the last test and the proof; a CPU needs more",
    )
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for the data set's files")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--dense", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument(
        "--angle", type=float, default=0.01, help="of a step of orthonormal matrices, in radians"
    )
    parser.add_argument(
        "--corrections", type=int, default=1, help="towards orthonormal matrices, after a step"
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam, for everything else")
    parser.add_argument("--fall", type=float, default=1, help="power of the linear fall of the rates")
    parser.add_argument("--rise", type=float, default=200, help="steps in which the rates rise")
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--margin", type=float, default=2.0, help="eps of the loss, in units of 36/255")
    parser.add_argument("--decay", type=float, default=0.999, help="of the weights' moving average, per step")
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.15,
        help="largest change of brightness and contrast; of saturation, twice it",
    )
    parser.add_argument("--cutout", type=int, default=0, help="side of the square that is blanked out")
    parser.add_argument("--images", type=int, default=50_000, help="train on fewer")
    parser.add_argument("--tests", type=int, default=10_000, help="test on fewer")
    parser.add_argument("--every", type=float, default=45, help="seconds between tests")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    return parser.parse_args(arguments)


def left(c: argparse.Namespace) -> float:
    return c.seconds - (time.monotonic() - START)


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


# --- the network ---------------------------------------------------------------------------------------------------


def network(c: argparse.Namespace) -> Any:
    from lipbounds.training.lipnext import LipNeXt

    return LipNeXt(
        (32, 32, 3),
        depths=c.depths,
        width=c.width,
        features=c.features,
        dense=c.dense,
        symmetric=True,
        mean=0.5,
        rngs=nnx.Rngs(0),
    )


class Parts(NamedTuple):
    """A network apart: its structure in evaluation and in training mode, weights, means of its channels."""

    graph: Any
    moving: Any
    weights: Any
    means: Any

    def model(self, weights: Any, means: Any) -> Any:
        """The network in evaluation mode."""
        return nnx.merge(self.graph, weights, means)

    def trained(self, weights: Any, x: Any) -> Any:
        """Logits with the channels of x centred by its own means."""
        return nnx.merge(self.moving, weights, self.means, copy=True)(x)


def apart(model: Any) -> Parts:
    """The network's parts; in training mode it keeps the means of the last batch alone."""
    graph, weights, means = nnx.split(model, nnx.Param, ...)
    moving = nnx.clone(model)
    moving.train()
    for _, layer in nnx.iter_modules(moving):
        if isinstance(layer, nnx.BatchNorm):
            layer.momentum = 0.0
    return Parts(graph, nnx.split(moving, nnx.Param, ...)[0], weights, means)


# --- training ------------------------------------------------------------------------------------------------------


def trainer(c: argparse.Namespace, parts: Parts) -> tuple[Any, Any]:
    """(start(weights), epoch(state, pixels, labels, key, begin, end)); begin and end are shares of the time."""
    from lipbounds.training import losses, manifold
    from lipbounds.training.augment import crop, cutout, jitter

    steps = c.images // c.batch
    kind = jnp.dtype(c.precision)
    turned = manifold.orthonormal(parts.weights)
    adam = optax.scale_by_adam(nesterov=True)

    def split(tree: Any) -> tuple[Any, Any]:
        """(orthonormal matrices, everything else)"""
        matrices = jax.tree.map(lambda a, mine: a if mine else None, tree, turned)
        return matrices, jax.tree.map(lambda a, mine: None if mine else a, tree, turned)

    def start(weights: Any) -> Any:
        matrices, others = split(weights)
        moments = jax.tree.map(jnp.zeros_like, matrices), adam.init(others)
        return weights, moments, jax.tree.map(jnp.copy, weights), jnp.zeros(())

    def step(state: Any, item: Any, pixels: Any, labels: Any) -> Any:
        weights, (mean, moments), average, count = state
        rows, key, share = item
        keys = jax.random.split(key, 3)
        x = crop(keys[0], pixels[rows].astype(jnp.float32) / 255, 4, mirrored=True)
        x = jitter(keys[1], x, c.jitter) if c.jitter else x
        x = cutout(keys[2], x, c.cutout, fill=0.5) if c.cutout else x
        y = labels[rows]

        def loss(weights: Any) -> Any:
            logits = parts.trained(weights, x.astype(kind))
            pairs = distances(parts.model(weights, parts.means).head.weights())
            value = losses.margin(logits, y, pairs, eps=c.margin * EPS, temperature=c.temperature)
            hard = losses.radius(logits, y, pairs)
            return value, (jnp.mean(hard > 0), jnp.mean(hard > EPS))

        (value, seen), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        fine = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
        gradient = jax.tree.map(lambda g: jnp.where(fine, g, 0), gradient)
        falling = jnp.minimum(1, 1.25 * (1 - share) + 1e-3) ** c.fall
        falling = falling * jnp.minimum(1, (count + 1) / c.rise)
        (matrices, others), (turning, gradient) = split(weights), split(gradient)
        mean = jax.tree.map(manifold.averaged, mean, turning)
        matrices = manifold.all_turned(
            matrices, mean, turning, c.angle * falling, corrections=c.corrections, kind=kind
        )
        updates, moments = adam.update(gradient, moments, others)
        others = jax.tree.map(lambda w, u: w - c.rate * falling * u, others, updates)
        weights = jax.tree.map(lambda mine, a, b: a if mine else b, turned, matrices, others)
        keep = jnp.minimum(c.decay, (count + 1) / (count + 10))
        average = jax.tree.map(lambda m, w: m + (1 - keep) * (w - m), average, weights)
        skipped = 1.0 - fine.astype(value.dtype)
        return (weights, (mean, moments), average, count + 1), jnp.stack([value, *seen, skipped])

    def plan(key: Any, begin: Any, end: Any) -> Any:
        order = jax.random.permutation(key, c.images)[: steps * c.batch].reshape(steps, c.batch)
        shares = begin + (end - begin) * jnp.arange(steps, dtype=jnp.float32) / steps
        return order, jax.random.split(jax.random.fold_in(key, 1), steps), shares

    def epoch(state: Any, pixels: Any, labels: Any, key: Any, begin: Any, end: Any) -> Any:
        visit = lambda state, item: step(state, item, pixels, labels)  # noqa: E731
        state, seen = jax.lax.scan(visit, state, plan(key, begin, end))
        return state, jnp.mean(seen, axis=0)

    return start, jax.jit(epoch, donate_argnums=0)


@partial(jax.jit, static_argnums=0)
def _means(moving: Any, weights: Any, means: Any, images: Any) -> Any:
    model = nnx.merge(moving, weights, means, copy=True)
    model(images.astype(jnp.float32) / 255)
    return nnx.state(model, nnx.BatchStat)


def finished(c: argparse.Namespace, parts: Parts, average: Any, pixels: Any) -> Any:
    """The network of the averaged weights, rounded to float16, then orthonormal again; means of training images."""
    from lipbounds.training import manifold

    rounded = jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.float32), average)
    weights = jax.jit(manifold.restored)(rounded)
    batch = min(1000, c.images)
    starts = range(0, min(8 * batch, c.images - batch + 1), batch)
    found = [_means(parts.moving, weights, parts.means, pixels[i : i + batch]) for i in starts]
    return parts.model(weights, jax.tree.map(lambda *a: jnp.mean(jnp.stack(a), axis=0), *found))


# --- the run -------------------------------------------------------------------------------------------------------


def data(c: argparse.Namespace) -> tuple[np.ndarray, ...]:
    from lipbounds.training.data import cifar10

    while True:
        try:
            found = cifar10(c.data_dir)
            break
        except (FileNotFoundError, ValueError):  # still being unpacked
            if time.monotonic() - START > c.wait:
                raise
            time.sleep(1)
    return (
        found.train_pixels[: c.images],
        found.train_y[: c.images],
        found.test_pixels[: c.tests],
        found.test_y[: c.tests],
    )


def main() -> None:
    c = options()
    from lipbounds.training import manifold

    c.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    say(f"{device.device_kind}, jax {jax.__version__}")
    parts = apart(network(c))
    weights = parts.weights
    facts: dict[str, Any] = {"pieces": 0, "trained seconds": 0.0, "epochs": 0, "log": []}
    if c.resume and (c.out / "record.json").exists():
        weights = manifold.restored(restore(c.out, weights))
        facts = json.loads((c.out / "record.json").read_text())
        say(f"going on after {facts['epochs']} epochs")
    facts |= {"device": device.device_kind, "pieces": facts["pieces"] + 1}
    facts["settings"] = {key: str(value) for key, value in vars(c).items() if key != "out"}
    count = sum(a.size for a in jax.tree.leaves(weights))
    start, epoch = trainer(c, parts)
    state = start(weights)
    pixels, labels, test_pixels, test_labels = data(c)
    say(f"{count} weights, {len(pixels)} images; compiling")
    pixels, labels = jnp.asarray(pixels), jnp.asarray(labels)

    def test(state: Any) -> Any:
        model = finished(c, parts, state[2], pixels)
        logits = outputs(model, test_pixels)
        found = accuracies(logits, test_labels, np.asarray(distances(model.head.weights())))
        facts["log"].append({"epoch": facts["epochs"], "seconds": time.monotonic() - START, **found})
        save(c.out, state[2], facts)
        shown = ", ".join(f"{key} {100 * value:.2f} %" for key, value in found.items())
        say(f"test (estimate, moving average): {shown}")
        return model

    def rehearse(weights: Any) -> None:
        """Compile what tests and the proof need, and see that it runs before anything has been trained."""
        model = finished(c, parts, weights, pixels)
        outputs(model, test_pixels[:BATCH])
        outputs_in_float64(model, test_pixels[:BATCH])
        proved_pairs(model)

    key = jax.random.key(1000 + facts["pieces"])
    with ThreadPoolExecutor(max_workers=1) as beside:
        ready = beside.submit(rehearse, jax.tree.map(jnp.copy, weights))
        state, _ = epoch(state, pixels, labels, key, 0.0, 0.002)  # compiles
        jax.block_until_ready(state)
        ready.result()
    began = time.monotonic()
    budget = max(left(c) - c.reserve, 1.0)
    say(f"compiled; {budget:.0f} s of training")
    number, took, tested = 1, 0.0, began
    while True:
        passed, ahead = (time.monotonic() - began) / budget, took / budget
        if c.epochs:
            passed, ahead = (number - 1) / c.epochs, 1 / c.epochs
        if passed + 0.5 * ahead >= 1:
            break
        begin = time.monotonic()
        share = min(passed + ahead, 1.0)
        state, seen = epoch(state, pixels, labels, jax.random.fold_in(key, number), passed, share)
        seen = np.asarray(seen)
        number, took = number + 1, time.monotonic() - begin
        facts["epochs"] += 1
        if number in (2, 3) or number % 10 == 0:
            say(
                f"epoch {number}: loss {seen[0]:.4f}, training {100 * seen[1]:.2f} % right, "
                f"{100 * seen[2]:.2f} % certified (estimate), skipped {seen[3]:.3f}; {took:.3f} s"
            )
        if time.monotonic() - tested > c.every:
            test(state)
            tested = time.monotonic()
    facts["trained seconds"] += time.monotonic() - began
    facts["seconds per epoch"] = took
    say("trained")
    report(c, facts, test(state), test_pixels, test_labels)


def report(c: argparse.Namespace, facts: Any, model: Any, images: Any, labels: Any) -> None:
    """Prove the constants, evaluate in float64, print the table and write everything."""
    pairs, norms = proved_pairs(model)
    say(f"norms of the matrices: {min(norms):.7f} to {max(norms):.7f}")
    found = accuracies(outputs_in_float64(model, images), labels, pairs, slack=1e-9)
    facts["proved"] = {**found, "largest L_ij": float(pairs.max()), "images": len(labels)}
    (c.out / "record.json").write_text(json.dumps(facts, indent=1) + "\n")
    say(f"PROVED on {len(labels)} test images: {json.dumps(facts['proved'])}")


if __name__ == "__main__":
    main()
