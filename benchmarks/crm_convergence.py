"""Which CRM settings hold a certified radius: many candidates in one process, against each other.

    python benchmarks/crm_convergence.py --data-dir DATA --out OUT --seconds 330        CIFAR-10 6C2F on a GPU
    python benchmarks/crm_convergence.py --proxy digits-2C2F --out OUT                  a small network on a CPU

`--proxy` names a small network and a part of a data set (`PROXIES`); without it the network is 6C2F and all of CIFAR-10
is used, with the batch, augmentation, optimiser and learning rates of the preset cifar10-6C2F-published. A candidate
changes the initial weights, the warm-up, or the terms of the loss. All settings are arrays, so that one compiled epoch
serves every candidate.

A proxy trains every candidate for `--epochs` with every seed. Without `--proxy` the candidates run in the order of
`FULL` for `--epochs` of the first rung, the best of them (with a radius term, and without one) for the second, and so
on; every rung trains from the start with its schedule squeezed into its epochs, the warm-up keeping its number of
epochs. A rung takes its share of `--seconds`; what does not fit is left out and named.

OUT/log.jsonl has one line an epoch: cross-entropy (or the candidate's data term), clean accuracy, certified accuracy at
eps, mean radius of what is right, largest constant, share of images with 0 < R < r0, norms of the gradients of the data
term and of the radius term on one batch, skipped steps. Accuracy and radii are of test images. Constants are those of
the loss, which nothing proves: certified accuracies are estimates. Candidates are compared on test images, so the
winner's figures are a little optimistic. Without `--proxy`, OUT/rung1.safetensors is the network of the best last epoch
of the first rung, OUT/rung2-1.safetensors that of the first run of the second; `lb.liplt` can prove their constants.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import Json, command_line, environment
from crm_candidates import (
    FULL,
    LOGARITHM,
    PROXIES,
    PROXY_LIST,
    PUBLISHED,
    in_pixels,
    initial,
)
from flax import nnx

from lipbounds.training import Config, losses, parallel, preset
from lipbounds.training.augment import Augmentation
from lipbounds.training.data import load
from lipbounds.training.models import ConvNet, ModelSpec, build
from lipbounds.training.step import Trainer, trainer
from lipbounds.training.store import save_model


class Settings(NamedTuple):
    """A candidate as arrays (); epochs counted in steps."""

    warmup: Any
    ramp: Any
    lam: Any
    r0: Any
    t: Any
    penalty: Any
    margin: Any
    scale: Any
    bounding: Any
    eps: Any
    seed: Any
    steps: Any
    decay_from: Any
    final_rate: Any


class State(NamedTuple):
    weights: Any
    moments: Any
    bound: Any
    step: Any


def settings(
    candidate: Mapping[str, Any], epochs: int, steps: int, config: Config, rate: float, seed: int = 0
) -> Settings:
    """For a run of so many epochs of so many steps, down to the learning rate `rate`."""
    c = {**PUBLISHED, **candidate}
    decay = round(config.decay_from * epochs / config.epochs)
    numbers = [c["warmup"] * steps, c["ramp"] * steps]
    numbers += [c[name] for name in ("lam", "r0", "t", "penalty", "margin", "scale", "bounding")]
    numbers += [config.eps, seed]
    numbers += [epochs * steps, decay * steps, rate]
    return Settings(*(np.float32(number) for number in numbers))


def data_term(s: Settings, logits: jax.Array, labels: jax.Array, pairs: jax.Array) -> jax.Array:
    plain = losses.lipschitz_margin(logits, labels, pairs, eps=s.margin)  # cross-entropy if the margin is 0
    scaled, others = losses.scaled_margins(logits, labels, pairs)
    free = losses.cross_entropy(jnp.where(others, s.scale * (s.margin - scaled), 0), labels)
    return jnp.where(s.scale > 0, free, plain)


def radius_term(s: Settings, logits: jax.Array, labels: jax.Array, pairs: jax.Array) -> jax.Array:
    """Without lambda. R_soft + log(K - 1) / t is at least R, so the logarithm is of something positive."""
    hard = losses.radius(logits, labels, pairs)
    chosen = (hard > 0) & (hard < s.r0)
    soft = losses.soft_radius(logits, labels, pairs, s.t)
    above = jnp.where(chosen, soft + jnp.log(logits.shape[-1] - 1.0) / s.t, s.r0)
    value = jnp.where(s.penalty == LOGARITHM, -jnp.log(jnp.maximum(above, 1e-8) / s.r0), -soft)
    return jnp.sum(jnp.where(chosen, value, 0)) / len(labels)


class Experiment:
    """The compiled epoch and the compiled look at a state, for all candidates."""

    def __init__(self, base: Trainer, pixels: jax.Array, labels: jax.Array):
        self.base, self.config = base, base.config
        self.pixels, self.labels = pixels, labels
        self.adam = optax.scale_by_adam()
        self.first_bound = jax.device_get(base.init().bound)
        self._visit_one = jax.jit(self._visit, donate_argnums=0)
        self._plan_all = jax.jit(self._plan)
        self._scan_all = jax.jit(self._scan, donate_argnums=0)
        self._look_at = jax.jit(self._look)

    def start(self, weights: Any) -> State:
        host = jax.device_get(weights)
        moments = jax.eval_shape(self.adam.init, host)
        moments = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), moments)
        return jax.device_put(State(host, moments, self.first_bound, np.int32(0)))

    def compile(self, s: Settings, test: Sequence[jax.Array]) -> None:
        """Both programs at once, in two threads."""
        state = self.start(self.base.weights)
        jobs = [lambda: self._look_at.lower(s, state.weights, state.bound, *test).compile()]
        if not self.base.one_by_one:
            jobs.append(lambda: self._scan_all.lower(state, s, self.pixels, self.labels).compile())
        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(job) for job in jobs]
            programs = [job.result() for job in done]
        self._look_at = programs[0]
        if len(programs) > 1:
            self._scan_all = programs[1]

    # --- training --------------------------------------------------------------------------------------------------

    def epoch(self, state: State, s: Settings) -> tuple[State, Any]:
        """(state, (data term, accuracy on augmented images, skipped steps))."""
        if not self.base.one_by_one:
            return self._scan_all(state, s, self.pixels, self.labels)
        seen = []
        for rows, key in zip(*self._plan_all(state.step, s.seed), strict=True):
            state, one = self._visit_one(state, s, self.pixels, self.labels, rows, key)
            seen.append(one)
        return state, self._summary(jax.tree.map(lambda *a: jnp.stack(a), *seen))

    def _plan(self, step: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.base._plan(step + jnp.int32(seed) * 4096 * self.base.steps)

    def _scan(self, state: State, s: Settings, pixels: Any, labels: Any) -> tuple[State, Any]:
        def visit(state: State, item: Any) -> tuple[State, Any]:
            return self._visit(state, s, pixels, labels, *item)

        state, seen = jax.lax.scan(visit, state, self._plan(state.step, s.seed))
        return state, self._summary(seen)

    @staticmethod
    def _summary(seen: Any) -> Any:
        term, right, skipped = seen
        return jnp.mean(term), jnp.mean(right), jnp.sum(skipped)

    def _visit(self, state: State, s: Settings, pixels: Any, labels: Any, rows: Any, key: Any) -> Any:
        c = self.config
        augment = Augmentation(flip=c.flip, degrees=c.degrees, translate=c.translate)
        x = augment(key, pixels[rows].astype(jnp.float32) / np.float32(self.base.levels))
        y = labels[rows]
        logits, pull = jax.vjp(lambda weights: self.base.network(weights, x), state.weights)
        step = state.step.astype(jnp.float32)
        raised = jnp.where(s.ramp > 0, jnp.clip((step - s.warmup) / jnp.maximum(s.ramp, 1), 0, 1), 1)
        cold = step < s.warmup  # then lam is 0, and the margin bounds the constants
        early = s.bounding * jnp.clip(step / jnp.maximum(s.warmup / 2, 1), 0, 1)
        now = s._replace(
            lam=jnp.where(cold, 0, s.lam * raised), margin=jnp.where(cold, early, s.margin * raised)
        )

        def plain() -> tuple[Any, ...]:
            loss, along = jax.value_and_grad(losses.cross_entropy)(logits, y)
            return loss, loss, along, jax.tree.map(jnp.zeros_like, state.weights), state.bound

        def bounded() -> tuple[Any, ...]:
            pairs, back, bound = jax.vjp(partial(self._constants, state.bound), state.weights, has_aux=True)

            def loss(logits: Any, pairs: Any) -> tuple[Any, Any]:
                term = data_term(now, logits, y, pairs)
                return term + now.lam * radius_term(now, logits, y, pairs), term

            (total, term), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(logits, pairs)
            return total, term, grads[0], back(grads[1])[0], bound

        calm = (step < s.warmup) & (s.bounding == 0)
        total, term, along, through, bound = jax.lax.cond(calm, plain, bounded)
        gradient = jax.tree.map(jnp.add, pull(along)[0], through)
        fine = jnp.isfinite(total) & jnp.isfinite(optax.tree.norm(gradient))
        gradient = jax.tree.map(lambda a: jnp.where(fine, a, 0), gradient)
        updates, moments = self.adam.update(gradient, state.moments)
        share = jnp.clip((step - s.decay_from) / jnp.maximum(s.steps - s.decay_from, 1), 0, 1)
        rate = c.learning_rate * (s.final_rate / c.learning_rate) ** share
        weights = jax.tree.map(lambda w, u: w - rate * u, state.weights, updates)
        new = State(weights, moments, bound, state.step)
        new = jax.tree.map(lambda a, b: jnp.where(fine, a.astype(b.dtype), b), new, state)
        right = jnp.mean((jnp.argmax(logits, axis=-1) == y).astype(jnp.float32))
        return new._replace(step=state.step + 1), (term, right, ~fine)

    def _constants(self, bound: Any, weights: Any) -> tuple[jax.Array, Any]:
        return self.base.constants((weights, ()), bound)

    # --- looking ---------------------------------------------------------------------------------------------------

    def _look(self, s: Settings, weights: Any, bound: Any, pixels: Any, labels: Any) -> tuple[Json, Any]:
        """Figures of test images, and the gradients of both terms on one batch of training images as they are."""
        pairs, back, bound = jax.vjp(partial(self._constants, bound), weights, has_aux=True)
        level = np.float32(self.base.levels)
        y = self.labels[: self.config.batch_size]
        x = self.pixels[: self.config.batch_size].astype(jnp.float32) / level
        logits, pull = jax.vjp(lambda w: self.base.network(w, x), weights)

        def norm(term: Any) -> jax.Array:
            along, toward = jax.grad(term, argnums=(1, 3))(s, logits, y, pairs)
            return optax.tree.norm(jax.tree.map(jnp.add, pull(along)[0], back(toward)[0]))

        near = losses.radius(logits, y, pairs)
        radii = losses.radius(self.base.network(weights, pixels.astype(jnp.float32) / level), labels, pairs)
        right = radii > 0
        found = {
            "clean": jnp.mean(right),
            "certified": jnp.mean(radii > s.eps),
            "certified_half": jnp.mean(radii > s.eps / 2),
            "mean_radius": jnp.sum(jnp.where(right, radii, 0)) / jnp.maximum(jnp.sum(right), 1),
            "largest_constant": jnp.max(pairs),
            "below_r0": jnp.mean((near > 0) & (near < s.r0)),
            "force_data": norm(data_term),
            "force_radius": s.lam * norm(radius_term),
        }
        return found, bound

    def look(self, state: State, s: Settings, test: Sequence[jax.Array]) -> tuple[State, Json]:
        found, bound = self._look_at(s, state.weights, state.bound, *test)
        found = {name: float(value) for name, value in jax.device_get(found).items()}
        return state._replace(bound=bound), found  # so that the vectors keep up in the warm-up, too


# --- the runs ------------------------------------------------------------------------------------------------------


class Race:
    """Rungs of runs against the clock."""

    def __init__(
        self,
        experiment: Experiment,
        candidates: Mapping[str, Mapping[str, Any]],
        starts: Mapping[tuple[str, int], Any],
        test: Any,
        out: Path,
        spec: ModelSpec | None,
    ):
        self.experiment, self.candidates, self.starts = experiment, candidates, starts
        self.test, self.out, self.spec = test, out, spec
        self.log = out / "log.jsonl"
        self.slowest = 0.0  # seconds of an epoch with constants

    def note(self, record: Json) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rung(
        self, number: int, names: Sequence[str], epochs: int, until: float, rate: float, shrink: bool
    ) -> list[Json]:
        """Last records of the candidates, best first. What takes longer than until `until` is left out, or (shrink)
        gets fewer epochs, the same share of the time for each."""
        ends: list[Json] = []
        best = -1.0
        for place, name in enumerate(names):
            count = epochs
            if self.slowest:
                left = until - spent()
                fitting = int((left / (len(names) - place) if shrink else left) / self.slowest)
                count = min(epochs, fitting) if shrink else epochs
                if fitting < (5 if shrink else epochs):
                    print(f"rung {number}  {name}: left out, {left:.0f} s left", flush=True)
                    self.note({"rung": number, "candidate": name, "left_out": True})
                    continue
            record, weights = self.run(number, name, count, until, rate)
            ends.append(record)
            if self.spec is not None and (shrink or record["certified"] > best):
                base = self.experiment.base
                model = nnx.merge(base.graph, weights, base.rest)
                stem = f"rung{number}-{place + 1}" if shrink else f"rung{number}"
                save_model(self.out / f"{stem}.safetensors", model, self.spec)
            best = max(best, record["certified"])
        return sorted(ends, key=lambda record: -record["certified"])

    def run(
        self, number: int, name: str, epochs: int, until: float, rate: float, seed: int = 0
    ) -> tuple[Json, Any]:
        """Train one candidate; (its last record, its weights)."""
        e = self.experiment
        candidate = {**PUBLISHED, **self.candidates[name]}
        s = settings(candidate, epochs, e.base.steps, e.config, rate, seed)
        state = e.start(self.starts[candidate["init"], seed])
        record: Json = {}
        for epoch in range(epochs + 1):
            begin = time.perf_counter()
            seen: Json = {"skipped": 0}
            if epoch:
                state, (term, accuracy, skipped) = e.epoch(state, s)
                seen = {"skipped": int(skipped), "data_term": float(term), "train_accuracy": float(accuracy)}
            state, found = e.look(state, s, self.test)
            seconds = time.perf_counter() - begin
            if epoch > candidate["warmup"] + 1:  # the first one may compile
                self.slowest = max(seconds, 0.9 * self.slowest)
            record = {
                "rung": number,
                "candidate": name,
                "seed": seed,
                "epochs": epochs,
                "epoch": epoch,
                **seen,
                **found,
            }
            record |= {"seconds": round(seconds, 3), "spent": round(spent(), 1)}
            self.note(record)
            if seen["skipped"] > e.base.steps // 2 or spent() > until + 15:
                break
        print(
            f"rung {number}  {name:42s} seed {seed} {record['epoch']:4d} epochs  clean {100 * record['clean']:5.2f}  "
            f"certified {100 * record['certified']:5.2f}  at eps/2 {100 * record['certified_half']:5.2f}  "
            f"R {record['mean_radius']:.4f}  L {record['largest_constant']:.3g}  force radius / data "
            f"{record['force_radius']:.2g} / {record['force_data']:.2g}  {record['spent']:.0f} s",
            flush=True,
        )
        return record, state.weights


def kept(names: Sequence[str], count: int) -> list[str]:
    """The first `count` of the names, best first, but with the best of either kind: with a radius term and without."""
    kinds = [FULL[name].get("lam", PUBLISHED["lam"]) > 0 for name in names]
    first = [kinds.index(kind) for kind in (True, False) if kind in kinds]
    order = sorted(first) + [place for place in range(len(names)) if place not in first]
    return [names[place] for place in sorted(order[:count])]


_BEGIN = time.perf_counter()


def spent() -> float:
    """Seconds since the script was started, but for its imports."""
    return time.perf_counter() - _BEGIN


def proxies(args: Any) -> None:
    """Every candidate with every seed on a small network; a table of means at the end."""
    proxy = PROXIES[args.proxy]
    data = load(proxy.dataset, args.data_dir)
    shape = data.train_pixels.shape[1:]
    colour = {"mean": 0.5, "std": 0.5} if proxy.dataset == "cifar10" else {}
    more: Json = {"constants": "liplt", "eps": proxy.eps, "warmup": 0, "batch_size": proxy.batch, **colour}
    config = Config(dataset=proxy.dataset, learning_rate=proxy.rate, **more)
    part = slice(None, None, proxy.every)
    pixels, labels, *test = jax.device_put(
        (data.train_pixels[part], data.train_y[part], data.test_pixels[part], data.test_y[part])
    )
    model = ConvNet(shape, convolutions=proxy.convolutions, dense=proxy.dense, **colour, rngs=nnx.Rngs(0))
    _, shapes, _ = nnx.split(model, nnx.Param, ...)
    names = args.candidates or list(PROXY_LIST)
    chosen = {name: in_pixels(PROXY_LIST[name], proxy) for name in names}
    layers = [*model.convs, *model.dense]
    starts = {
        (kind, seed): initial(shapes, layers, kind, seed)
        for kind in sorted({candidate["init"] for candidate in chosen.values()})
        for seed in args.seeds
    }
    base = trainer(config, model, shape, data.levels, len(labels), parallel.devices(1))
    experiment = Experiment(base, pixels, labels)
    race = Race(experiment, chosen, starts, test, args.out, None)
    experiment.compile(settings(PUBLISHED, 1, base.steps, config, 1e-5), test)
    race.note({"environment": environment("crm_convergence.py", ("flax", "optax")), "compiled": spent()})
    epochs = args.epochs[0] if args.epochs else proxy.epochs
    for seed in args.seeds:
        for name in names:
            race.run(1, name, epochs, args.seconds, 0.01 * proxy.rate, seed)
            if spent() > args.seconds:
                print(f"seed {seed}: what follows {name} is left out, {spent():.0f} s spent", flush=True)
                break


def main() -> None:
    parser = command_line(__doc__, out=False)
    parser.add_argument("--data-dir", help="folder of CIFAR-10 in its official binary layout")
    parser.add_argument("--out", type=Path, required=True, help="folder of log and networks")
    parser.add_argument("--seconds", type=float, default=330.0, help="of everything, compilation included")
    parser.add_argument("--epochs", type=int, nargs="+", help="of every rung [20 400]; of a proxy, its own")
    parser.add_argument(
        "--keep", type=int, nargs="*", default=[2], help="candidates that enter the next rung"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.55, 1.0], help="of the time: end of rungs"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 1e-5], help="last learning rates")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--proxy", choices=list(PROXIES), help="a small network and a part of its data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of a proxy")
    args = parser.parse_args()
    known = PROXY_LIST if args.proxy else FULL
    if unknown := set(args.candidates or ()) - set(known):
        parser.error(f"unknown candidates {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.proxy:
        proxies(args)
        return
    args.epochs = args.epochs or [20, 400]
    if not len(args.epochs) == len(args.shares) == len(args.rates) == len(args.keep) + 1:
        parser.error("epochs, shares and rates need one number for each rung, keep one fewer")
    config = Config.from_json(preset("cifar10-6C2F-published") | {"data_dir": args.data_dir, "warmup": 0})
    data = load("cifar10", args.data_dir)
    pixels, labels, *test = jax.device_put((data.train_pixels, data.train_y, data.test_pixels, data.test_y))
    shape = (32, 32, 3)
    spec = config.spec(shape, 10)
    abstract = nnx.eval_shape(lambda: build(spec, config.seed))
    graph, shapes, rest = nnx.split(abstract, nnx.Param, ...)
    names = args.candidates or list(FULL)
    kinds = sorted({{**PUBLISHED, **FULL[name]}["init"] for name in names})
    layers = [*abstract.convs, *abstract.dense]
    starts = {(kind, 0): initial(shapes, layers, kind, config.seed) for kind in kinds}
    model = nnx.merge(graph, starts[kinds[0], 0], rest)
    base = trainer(config, model, shape, data.levels, len(labels), parallel.devices(1))
    experiment = Experiment(base, pixels, labels)
    race = Race(experiment, FULL, starts, test, args.out, spec)
    print(f"data and initial weights: {spent():.1f} s, {jax.devices()[0].device_kind}", flush=True)
    experiment.compile(settings(PUBLISHED, 1, base.steps, config, 1e-5), test)
    print(f"compiled: {spent():.1f} s", flush=True)
    race.note({"environment": environment("crm_convergence.py", ("flax", "optax")), "compiled": spent()})

    for number, epochs in enumerate(args.epochs, 1):
        until = args.shares[number - 1] * args.seconds
        ends = race.rung(number, names, epochs, until, args.rates[number - 1], shrink=number > 1)
        names = [record["candidate"] for record in ends]
        print(
            f"rung {number}, best first: "
            + "; ".join(f"{r['candidate']} {100 * r['certified']:.2f}" for r in ends)
        )
        if number < len(args.epochs):
            names = kept(names, args.keep[number - 1])


if __name__ == "__main__":
    main()
