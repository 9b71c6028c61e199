"""CIFAR-10 in minutes: a LiResNet with the EMMA loss, trained for a given time and certified by a proved bound.

    python benchmarks/record.py --data-dir DATA --out OUT --seconds 390

Everything is ready when the time is over: the number of epochs follows from the measured time of one, learning rate and
margin follow the share of the training time that has passed, and the end of the time is kept for the proof. `--resume`
goes on from the files of an earlier piece in OUT, with fresh moments of the optimiser. Files: record.json (anew after
every test) and record-*.npz (averaged weights in float16, at most 15 MB each: those of the network that is proved, and
with the means in record.json those from which a later piece goes on).

One step: batch from the images on the device, crop, flip and cutout; forward and backward in bfloat16 with float32
weights; constants in float32 from one warm-started power iteration per layer. Blocks are priced by their norm on the
torus of n + 2 points, which is at least the norm with zero padding, and equal to the bound that is proved at the end
by the Fourier transform (`lipbounds._norms.fourier`).

The classifier is the mean of the network's outputs on an image and its mirror image: mirroring keeps l2 distances, so
the network's constants hold for the mean.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from record_proof import EPS, accuracies, outputs, proved_pairs, restore, save

START = time.monotonic()


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--seconds", type=float, default=390, help="of this process, in all")
    parser.add_argument("--epochs", type=int, default=0, help="so many, in place of the time")
    parser.add_argument(
        "--reserve", type=float, default=75, help="seconds kept for the last test and the proof"
    )
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for the data set's files")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--dense", type=int, default=2)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rise", type=float, default=500, help="steps in which the rate rises")
    parser.add_argument("--fall", choices=("linear", "cosine"), default="linear", help="of the rate")
    parser.add_argument(
        "--margin", type=float, default=2.0, help="largest eps of the loss, in units of 36/255"
    )
    parser.add_argument("--ramp", type=float, default=0.5, help="share of the time in which eps rises")
    parser.add_argument("--decay", type=float, default=0.995, help="of the weights' moving average, per step")
    parser.add_argument("--cutout", type=int, default=0, help="side of the square that is blanked out")
    parser.add_argument("--images", type=int, default=50_000, help="train on fewer")
    parser.add_argument("--tests", type=int, default=10_000, help="test on fewer")
    parser.add_argument("--every", type=float, default=45, help="seconds between tests")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--centre", type=int, default=1)
    parser.add_argument(
        "--unrolled", action="store_true", help="steps one by one: XLA's loops are slow on a CPU"
    )
    return parser.parse_args(arguments)


def left(c: argparse.Namespace) -> float:
    return c.seconds - (time.monotonic() - START)


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


# --- the network and its constants ---------------------------------------------------------------------------------


def network(c: argparse.Namespace) -> Any:
    from lipbounds.training.liresnet import LiResNet

    return LiResNet(
        (32, 32, 3),
        depths=c.depths,
        width=c.width,
        features=c.features,
        dense=c.dense,
        mean=0.5,
        rngs=nnx.Rngs(0),
    )


def maps(model: Any) -> list[Any]:
    """(function, stacked weights, shape of its vectors) of every group of layers whose norms are multiplied."""
    from lipbounds.training.layers import downsample

    def torus(kernel: Any, v: Any) -> Any:  # one product per layer, with the nine shifts side by side
        moved = [jnp.roll(v, (1 - a, 1 - b), axis=(0, 1)) for a in range(3) for b in range(3)]
        return jnp.concatenate(moved, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])

    def stem(kernel: Any, v: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        sides = [(2, 2), (2, 2)]
        return jax.lax.conv_general_dilated(v[None], kernel, (2, 2), sides, dimension_numbers=numbers)[0]

    def neck(kernels: Any, v: Any) -> Any:
        return (downsample(v, 4) @ kernels[0]).reshape(-1) @ kernels[1]

    def dense(kernel: Any, v: Any) -> Any:
        return v @ kernel

    found = [(stem, model.stem.kernel.get_value()[None], (32, 32, 3))]
    for blocks in model.scales:
        if len(blocks):
            (height, width), channels = blocks[0].image, blocks[0].n_in
            weights = jnp.stack([block.weights() for block in blocks])
            found.append((torus, weights, (height + 2, width + 2, channels)))
    image = (*model.scales[-1][0].image, model.scales[-1][0].n_in)
    kernels = (model.windows.weights()[None], model.neck.weights()[None])
    found.append((neck, kernels, image))
    if len(model.dense):
        stacked = jnp.stack([layer.weights() for layer in model.dense])
        found.append((dense, stacked, (model.dense[0].n_in,)))
    return found


def start_vectors(model: Any) -> list[Any]:
    groups = maps(model)
    keys = jax.random.split(jax.random.key(7), len(groups))
    counts = [len(jax.tree.leaves(weights)[0]) for _, weights, _ in groups]
    return [
        jax.random.normal(key, (count, *shape))
        for key, count, (_, _, shape) in zip(keys, counts, groups, strict=True)
    ]


def constant(model: Any, vectors: list[Any], steps: int) -> tuple[Any, list[Any]]:
    """(product of the norms of all maps but the last, next vectors), by power iteration; the gradient is exact."""

    def unit(v: Any) -> Any:
        axes = tuple(range(1, v.ndim))
        return v / jnp.sqrt(jnp.maximum(jnp.sum(v * v, axis=axes, keepdims=True), 1e-30))

    total, after = jnp.zeros(()), []
    with jax.default_matmul_precision("highest"):
        for (function, weights, _), v in zip(maps(model), vectors, strict=True):
            batched, fixed = jax.vmap(function), jax.lax.stop_gradient(weights)

            def iterate(_: int, v: Any, batched: Any = batched, fixed: Any = fixed) -> Any:
                image, back = jax.vjp(lambda u: batched(fixed, u), v)
                return unit(back(image)[0])

            v = jax.lax.fori_loop(0, steps, iterate, unit(v)) if steps > 4 else _few(iterate, steps, unit(v))
            v = jax.lax.stop_gradient(v)
            image = batched(weights, v)
            squares = jnp.sum(image * image, axis=tuple(range(1, image.ndim)))
            total = total + 0.5 * jnp.sum(jnp.log(squares))
            after.append(v)
    return jnp.exp(total), after


def _few(iterate: Any, steps: int, v: Any) -> Any:
    for k in range(steps):
        v = iterate(k, v)
    return v


def pairs_of(model: Any, total: Any) -> Any:
    """(K, K) constants: the product times the distances of the last layer's columns."""
    head = model.head.weights()
    apart = head[:, :, None] - head[:, None, :]
    return total * jnp.sqrt(jnp.maximum(jnp.sum(apart * apart, axis=0), 1e-12))


# --- training ------------------------------------------------------------------------------------------------------


def trainer(c: argparse.Namespace, graph: Any) -> tuple[Any, Any]:
    """(optimiser, epoch(state, pixels, labels, key, begin, end)): begin and end are shares of the training time."""
    from lipbounds.training import losses
    from lipbounds.training.augment import crop, cutout, flip

    steps = c.images // c.batch
    kind = jnp.dtype(c.precision)
    optimiser = optax.chain(optax.clip_by_global_norm(3.0), optax.scale_by_adam(nesterov=True))

    def step(state: Any, item: Any, pixels: Any, labels: Any) -> Any:
        weights, moments, average, vectors, count, _ = state
        rows, key, share = item
        keys = jax.random.split(key, 3)
        x = pixels[rows].astype(jnp.float32) / 255
        x = crop(keys[0], flip(keys[1], x), 4)
        x = cutout(keys[2], x, c.cutout, fill=0.5) if c.cutout else x
        y = labels[rows]
        eps = EPS * (0.1 + (c.margin - 0.1) * jnp.minimum(share / c.ramp, 1))

        def loss(weights: Any) -> Any:
            model = nnx.merge(graph, weights)
            total, after = constant(model, vectors, 1)
            logits, _ = model.centred(x.astype(kind), centre=bool(c.centre))
            pairs = pairs_of(model, total)
            value = losses.emma(logits, y, pairs, eps=eps)
            hard = losses.radius(logits, y, pairs)
            return value, (after, total, jnp.mean(hard > 0), jnp.mean(hard > EPS))

        (value, (vectors, total, *seen)), gradient = jax.value_and_grad(loss, has_aux=True)(weights)
        fine = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
        gradient = jax.tree.map(lambda g: jnp.where(fine, g, 0), gradient)
        updates, moments = optimiser.update(gradient, moments, weights)
        falling = jnp.minimum(1, 1.25 * (1 - share) + 1e-3)
        if c.fall == "cosine":
            falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(share, 1))) + 1e-3
        rate = c.rate * jnp.minimum(1, (count + 1) / c.rise) * falling
        weights = jax.tree.map(lambda w, u: w - rate * u, weights, updates)
        keep = jnp.minimum(c.decay, (count + 1) / (count + 10))
        average = jax.tree.map(lambda m, w: m + (1 - keep) * (w - m), average, weights)
        seen = jnp.stack([value, total, *seen, 1.0 - fine])
        return (weights, moments, average, vectors, count + 1, state[5]), seen

    def plan(key: Any, begin: Any, end: Any) -> Any:
        order = jax.random.permutation(key, c.images)[: steps * c.batch].reshape(steps, c.batch)
        shares = begin + (end - begin) * jnp.arange(steps) / steps
        return order, jax.random.split(jax.random.fold_in(key, 1), steps), shares

    def epoch(state: Any, pixels: Any, labels: Any, key: Any, begin: Any, end: Any) -> Any:
        visit = lambda state, item: step(state, item, pixels, labels)  # noqa: E731
        state, seen = jax.lax.scan(visit, state, plan(key, begin, end))
        return state, jnp.mean(seen, axis=0)

    if not c.unrolled:
        return optimiser, jax.jit(epoch, donate_argnums=0)
    single, planned = jax.jit(step, donate_argnums=0), jax.jit(plan)

    def dispatched(state: Any, pixels: Any, labels: Any, key: Any, begin: Any, end: Any) -> Any:
        seen = []
        for item in zip(*planned(key, begin, end), strict=True):
            state, one = single(state, item, pixels, labels)
            seen.append(one)
        return state, jnp.mean(jnp.stack(seen), axis=0)

    return optimiser, dispatched


@partial(jax.jit, static_argnums=0)
def _means(graph: Any, weights: Any, images: Any) -> Any:
    return nnx.merge(graph, weights).centred(images.astype(jnp.float32) / 255)[1]


def population_means(c: argparse.Namespace, graph: Any, weights: Any, pixels: Any) -> Any:
    """The blocks' means over some thousand training images, in float32."""
    batch = min(1000, c.images)
    starts = range(0, min(8 * batch, c.images - batch + 1), batch)
    found = [_means(graph, weights, pixels[i : i + batch]) for i in starts]
    return jax.tree.map(lambda *a: jnp.mean(jnp.stack(a), axis=0), *found)


def finished(c: argparse.Namespace, graph: Any, weights: Any, pixels: Any) -> tuple[Any, Any]:
    """(the network with these weights, rounded to float16, and its means in the biases; the means)."""
    model, means = nnx.merge(graph, weights), []
    if c.centre:
        means = population_means(c, graph, weights, pixels)
        model = model.folded(means)  # a copy: merged modules share their variables
    graph, weights = nnx.split(model)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float16).astype(jnp.float32), weights)
    return nnx.merge(graph, rounded), means


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
    c.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    say(f"{device.device_kind}, jax {jax.__version__}")
    graph, _ = nnx.split(nnx.eval_shape(lambda: network(c)))
    weights = jax.jit(lambda: nnx.split(network(c))[1])()
    facts: dict[str, Any] = {"pieces": 0, "trained seconds": 0.0, "epochs": 0, "log": []}
    if c.resume and (c.out / "record.json").exists():
        weights, facts = restore(c.out, weights), json.loads((c.out / "record.json").read_text())
        if facts["means"]:
            model = nnx.merge(graph, weights)
            model = model.folded([-jnp.asarray(mean, jnp.float32) for mean in facts["means"]])
            weights = nnx.split(model)[1]
        say(f"going on after {facts['epochs']} epochs")
    facts |= {"device": device.device_kind, "pieces": facts["pieces"] + 1}
    facts["settings"] = {key: str(value) for key, value in vars(c).items() if key != "out"}
    count = sum(a.size for a in jax.tree.leaves(weights))
    optimiser, epoch = trainer(c, graph)
    vectors = start_vectors(nnx.merge(graph, weights))
    copy = jax.tree.map(jnp.copy, weights)
    state = (weights, optimiser.init(weights), copy, vectors, jnp.zeros(()), jnp.zeros(()))
    pixels, labels, test_pixels, test_labels = data(c)
    say(f"{count} weights, {len(pixels)} images; compiling")
    pixels, labels = jnp.asarray(pixels), jnp.asarray(labels)
    tried = jax.jit(lambda weights, vectors, steps=60: constant(nnx.merge(graph, weights), vectors, steps))

    def test(state: Any) -> Any:
        model, means = finished(c, graph, state[2], pixels)
        total, _ = tried(nnx.split(model)[1], state[3])
        found = accuracies(outputs(model, test_pixels), test_labels, np.asarray(pairs_of(model, total)))
        facts["log"].append({"epoch": facts["epochs"], "seconds": time.monotonic() - START, **found})
        facts["means"] = [np.asarray(mean).tolist() for mean in means]
        save(c.out, nnx.split(model)[1], facts)
        shown = ", ".join(f"{key} {100 * value:.2f} %" for key, value in found.items())
        say(f"test (estimate, moving average): {shown}; constant {float(total):.3f}")
        return model

    key = jax.random.key(1000 + facts["pieces"])
    state, _ = epoch(state, pixels, labels, key, 0.0, 0.002)  # compiles
    jax.block_until_ready(state)
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
                f"epoch {number}: loss {seen[0]:.4f}, constant {seen[1]:.2f}, training {100 * seen[2]:.2f} % right, "
                f"{100 * seen[3]:.2f} % certified (estimate), skipped {seen[4]:.3f}; {took:.3f} s"
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
    with ThreadPoolExecutor(max_workers=1) as beside:
        running = beside.submit(proved_pairs, model)
        with jax.default_matmul_precision("highest"):
            near = np.asarray(outputs(model, images), np.float64)
        say("outputs in float32 are there")
        pairs, norms = running.result()
    say("norms: " + ", ".join(f"{name} {value:.4f}" for name, value in norms))
    facts["float32"] = accuracies(near, labels, pairs)
    (c.out / "record.json").write_text(json.dumps(facts, indent=1) + "\n")
    say(f"constants proved, outputs in float32: {json.dumps(facts['float32'])}")
    graph, weights = nnx.split(model)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        exact = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), weights)
        logits = outputs(nnx.merge(graph, exact), images)
    found = accuracies(np.asarray(logits, np.float64), labels, pairs, slack=1e-9)
    facts["proved"] = {**found, "largest L_ij": float(pairs.max()), "images": len(labels)}
    (c.out / "record.json").write_text(json.dumps(facts, indent=1) + "\n")
    say(f"PROVED on {len(labels)} test images: {json.dumps(facts['proved'])}")


if __name__ == "__main__":
    main()
