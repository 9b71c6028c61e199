"""One compiled epoch of training: network, bound in the loss, optimiser, weight averages and guards.

The gradient of a step is split where the loss meets the network and the bound: with logits z and constants C,

    d loss / d weights = (dz / dw)' (dl / dz) + (dC / dw)' (dl / dC)

so the network appears once, and the second term can be kept for some steps (`Config.refresh`): the constants and the
direction of the second term are those of the last refresh, its length is such that its derivative along C is that of
the current batch, and everything else is of the current step. With refresh = 1 the gradient is exact. The multipliers
of the recursion are trained with the weights through the same term.

The weights, the network, losses and optimiser are float32; the constants are computed in `Config.precision`, with their
multipliers. All random numbers derive from the seed and the epoch, so a state and a configuration determine what
follows bit for bit on one machine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lipbounds as lb
from lipbounds.training import losses, manifold, network, robust_step, statistics
from lipbounds.training.augment import Augmentation
from lipbounds.training.config import Config
from lipbounds.training.network import Network
from lipbounds.training.optimisers import optimiser
from lipbounds.training.parallel import Devices
from lipbounds.training.robust_step import Passed

_FLOAT = jnp.float32
_FIRST_ITERATIONS, _LAST_ITERATIONS = 10, 100  # of spectral layers, before training and behind it
# largest scale of the kept gradient, as a batch with few examples below r0 is a poor reference
_LONGEST = 4.0


class Held(NamedTuple):
    """Constants and gradient that the steps after a refresh reuse.

    Args:
        pairs: (K, K) constants C.
        gradient: (dC/dw)' (dl/dC), and the same for the multipliers.
        pressure: sum of C dl/dC, the derivative of the loss along C.
    """

    pairs: jax.Array
    gradient: Any
    pressure: Any


class TrainState(NamedTuple):
    """Training state: a pytree of arrays.

    Args:
        weights: the network's parameters.
        multipliers: of the recursion in the loss, else ().
        moments: of the optimiser.
        bound: state of the core of `naive`, `liplt` or `lipsdp` (vectors of the power iteration, last constants).
        held: see `Held`.
        average: averaged weights, else ().
        step: number of finished steps, skipped ones included.
        kept: what moves on with every step without a gradient: vectors of the power iterations of spectral layers,
            running statistics of BatchNorm.
        settled: statistics of BatchNorm for the averaged weights, gathered after every epoch; () where there are none.
        factor: weight of the second term of a robust loss where it moves (`Config.war`), else ().
    """

    weights: Any
    multipliers: Any
    moments: Any
    bound: Any
    held: Any
    average: Any
    step: jax.Array
    kept: Any = ()
    settled: Any = ()
    factor: Any = ()


class Metrics(NamedTuple):
    """Metrics of one epoch on the augmented training images: means over the steps, and two counts.

    `report` holds means of what a robust loss says beside, by the names of the log.
    """

    loss: jax.Array
    accuracy: jax.Array
    skipped: jax.Array
    failed: jax.Array
    report: dict[str, jax.Array]


@dataclass(frozen=True, eq=False)
class Trainer(Network):
    """The compiled parts of one run. `init()` gives the first state, `epoch(state, pixels, labels)` the next one."""

    config: Config
    weights: Any
    levels: int
    images: int
    devices: Devices

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return self.images // self.config.batch_size

    # --- the bound -------------------------------------------------------------------------------------------------

    @property
    def core(self) -> Any:
        """The jit-able core of the bound in the loss."""
        cores: dict[str, Any] = {
            "naive": lb.naive,
            "liplt": lb.liplt,
            "recursion": lb.lipsdp,
            "local": lb.local,
        }
        return cores[self.config.constants].core

    def constants(self, trained: Any, bound: Any, x: jax.Array | None = None) -> tuple[jax.Array, Any]:
        """((K, K) constants that the loss divides by, next state of the bound); trained = (weights, multipliers).

        Local constants are those of every image of x, (B, K, K); the others do not depend on x.
        """
        weights, multipliers = trained
        options: dict[str, Any] = {"steps": self.config.power_iterations}
        if self.config.constants == "local":
            found, bound = self.core(
                self.form(weights), bound, x, eps=self.config.eps, pairwise=True, **options
            )
            return pair_constants(found, self.config.pairs).astype(_FLOAT), jax.lax.stop_gradient(bound)
        if self.config.constants == "recursion":
            bound, options = bound._replace(multipliers=multipliers), {"steps": 0}
        found, bound = self.core(self.form(weights), bound, pairwise=True, **options)
        return pair_constants(found, self.config.pairs).astype(_FLOAT), jax.lax.stop_gradient(bound)

    def loss(
        self, logits: jax.Array, labels: jax.Array, pairs: jax.Array, share: float | jax.Array = 1.0
    ) -> jax.Array:
        """The loss of a batch, given the constants of all pairs of classes and the share of lam, or eps, in force."""
        return losses.by_name(self.config, logits, labels, pairs, share)

    # --- the state -------------------------------------------------------------------------------------------------

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which all functions of this run must be traced."""
        return jax.enable_x64(self.config.uses_constants and self.config.precision == "float64")

    def init(self) -> TrainState:
        """The state before the first step."""
        with self.precision(), jax.numpy_dtype_promotion("standard"):
            return jax.jit(self._init)(self.weights)

    def _init(self, weights: Any) -> TrainState:
        c = self.config
        bound: Any = ()
        multipliers: Any = ()
        held: Any = ()
        if c.uses_constants:
            key = jax.random.fold_in(jax.random.key(c.seed), 2**31)
            bound = self.core.init(self.form(weights), key, jnp.dtype(c.precision))
            if c.constants == "recursion":
                multipliers = bound.multipliers
                bound = bound._replace(multipliers=(), moments=())
            # 0 until the first step that is not skipped
            pairs = jnp.zeros((self.classes(weights),) * 2, _FLOAT)
            held = Held(pairs, (), ())
            if c.refresh > 1:
                zeros = jax.tree.map(jnp.zeros_like, (weights, multipliers))
                held = Held(pairs, zeros, jnp.zeros((), _FLOAT))
        trained = (weights, multipliers)
        average = weights if c.average != "none" else ()
        state = TrainState(
            weights, multipliers, self.optimiser.init(trained), bound, held, average, jnp.zeros((), jnp.int32)
        )
        # spectral layers start near their constant, and keep up from then on
        settled = self.statistics if c.average != "none" and self.norms else ()
        factor = jnp.zeros((), _FLOAT) if c.war else ()
        kept = self.advanced(weights, _FIRST_ITERATIONS)
        state = state._replace(kept=kept, settled=settled, factor=factor)
        # strongly typed, as every later state is, so that the epoch is compiled once
        return jax.tree.map(lambda a: jnp.asarray(a, a.dtype), state)

    @cached_property
    def optimiser(self) -> Any:
        """The optimiser of (weights, multipliers)."""
        return optimiser(self.config, self.steps, self.turned)

    @cached_property
    def turned(self) -> bool:
        """Whether some matrices are orthonormal and trained as such."""
        return any(jax.tree.leaves(manifold.orthonormal(self.weights)))

    # --- one epoch -------------------------------------------------------------------------------------------------

    def epoch(self, state: TrainState, pixels: Any, labels: Any) -> tuple[TrainState, Metrics]:
        """All steps of the epoch that `state.step` begins, as one compiled scan.

        On a CPU the steps of a network with convolutions are dispatched one by one instead, as XLA runs convolutions
        inside a loop there up to 20 times slower.
        """
        with self.precision(), jax.numpy_dtype_promotion("standard"):
            if not self.one_by_one:
                return self._scanned(state, pixels, labels)
            batches, keys = self.planned(state.step)
            seen = []
            for rows, key in zip(batches, keys, strict=True):
                state, one = self._single(state, pixels, labels, rows, key)
                seen.append(one)
            return state, self._summed(seen)

    @cached_property
    def one_by_one(self) -> bool:
        """Whether an epoch is a sequence of dispatched steps, not one scan."""
        x = jax.ShapeDtypeStruct((1, *self.input_shape), _FLOAT)
        convolves = "conv_general_dilated" in str(jax.make_jaxpr(self.network)(self.weights, x))
        return convolves and self.devices.platform == "cpu"

    @cached_property
    def _scanned(self) -> Any:
        return jax.jit(self._epoch, donate_argnums=0, out_shardings=(self.devices.replicated,) * 2)

    @cached_property
    def _single(self) -> Any:
        return jax.jit(self._visit, donate_argnums=0, out_shardings=(self.devices.replicated,) * 2)

    @cached_property
    def planned(self) -> Any:
        """The compiled rows of every batch, and keys of its augmentation, of the epoch that a step lies in."""

        def plan(step: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            batches, keys = self._plan(step)
            return list(batches), list(keys)

        return jax.jit(plan, out_shardings=self.devices.replicated)

    @cached_property
    def _summed(self) -> Any:
        def total(seen: list[Any]) -> Metrics:
            return _metrics(jax.tree.map(lambda *a: jnp.stack(a), *seen))

        return jax.jit(total, out_shardings=self.devices.replicated)

    def _plan(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(rows of every batch, keys of the augmentation) of the epoch that `step` lies in."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), step // self.steps)
        shuffling, augmenting = jax.random.split(key)
        order = jax.random.permutation(shuffling, np.arange(self.images, dtype=np.int32))
        batches = order[: self.steps * self.config.batch_size].reshape(self.steps, -1)
        return batches, jax.random.split(augmenting, self.steps)

    def _epoch(self, state: TrainState, pixels: Any, labels: Any) -> tuple[TrainState, Metrics]:
        def visit(state: TrainState, item: Any) -> tuple[TrainState, Any]:
            return self._visit(state, pixels, labels, *item)

        state, seen = jax.lax.scan(visit, state, self._plan(state.step))
        return state, _metrics(seen)

    def batch(self, pixels: Any, rows: Any, key: Any) -> jax.Array:
        """The augmented images of these rows."""
        c = self.config
        augment = Augmentation(
            c.flip,
            c.degrees,
            c.translate,
            crop=c.crop,
            cutout=c.cutout,
            autoaugment=c.autoaugment,
            mirrored=c.border == "mirror",
            jitter=c.jitter,
        )
        return augment(key, self.devices.spread(pixels[rows]).astype(_FLOAT) / np.float32(self.levels))

    def check_images(self, pixels: np.ndarray) -> None:
        """ValueError where the augmentation does not fit these images; nothing is computed."""
        rows = jax.ShapeDtypeStruct((self.config.batch_size,), np.int32)
        images = jax.ShapeDtypeStruct(pixels.shape, pixels.dtype)
        with self.precision(), jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(self.batch, images, rows, jax.random.key(0))

    def _visit(self, state: TrainState, pixels: Any, labels: Any, rows: Any, key: Any) -> Any:
        x = self.batch(pixels, rows, key)
        attack = jax.random.fold_in(key, 1) if self.config.robust else None
        if self.config.views == 2:
            # the augmentation splits the key in three, which are also what 0, 1 and 2 folded in would give
            x = jnp.stack([x, self.batch(pixels, rows, jax.random.fold_in(key, 3))])
        return self._step(state, x, self.devices.spread(labels[rows]), attack)

    @cached_property
    def gathered(self) -> Any:
        """The compiled sum of statistics.pooled: (statistics so far, of so many batches, weights, kept, ...)."""

        def gather(total: Any, count: Any, weights: Any, kept: Any, pixels: Any, rows: Any, key: Any) -> Any:
            new = self.at(kept).moments(weights, self.batch(pixels, rows, key))
            return statistics.pooled(self.norms, total, new, count)

        return jax.jit(gather, out_shardings=self.devices.replicated)

    def _step(self, state: TrainState, x: Any, labels: Any, key: Any = None) -> tuple[TrainState, Any]:
        return self.at(state.kept)._stepped(state, x, labels, key)

    def _passed(self, state: TrainState, x: jax.Array) -> Passed:
        def forward(weights: Any) -> tuple[jax.Array, Any]:
            logits, after = self.trained(weights, self.statistics, x)
            return logits.astype(_FLOAT), after

        logits, pull, after = jax.vjp(forward, state.weights, has_aux=True)
        return Passed(None, logits, pull, after, {}, state.factor)

    def _stepped(self, state: TrainState, x: Any, labels: Any, key: Any) -> tuple[TrainState, Any]:
        trained = (state.weights, state.multipliers)
        if self.config.robust:
            passed = robust_step.passed(self, state, x, labels, key)
            x = x[0] if self.config.views == 2 else x
        else:
            x = x.astype(self.config.forward)
            passed = self._passed(state, x)
        logits = passed.logits
        loss, along, through, multipliers, bound, held = self._loss(state, trained, x, logits, labels)
        loss = loss if passed.value is None else loss + passed.value
        (direct,) = passed.pull(along)
        gradient = (jax.tree.map(jnp.add, direct, through[0]), through[1])
        fine = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        gradient = jax.tree.map(lambda a: jnp.where(fine, a, 0), gradient)
        trained = (state.weights, multipliers)
        updates, moments = self.optimiser.update(gradient, state.moments, trained)
        weights, multipliers = optax.apply_updates(trained, updates)
        average = self._average(state, weights)
        kept = self.at(passed.statistics).advanced(weights)
        beside = (state.step, kept, state.settled, passed.factor)
        new = TrainState(weights, multipliers, moments, bound, held, average, *beside)
        new = jax.tree.map(lambda a, b: jnp.where(fine, a.astype(b.dtype), b), new, state)
        seen = (
            loss,
            jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(_FLOAT)),
            ~fine,
            getattr(bound, "failed", jnp.zeros((), bool)),
            passed.report,
        )
        return new._replace(step=state.step + 1), seen

    def ramp(self, step: Any) -> jax.Array:
        """The share of lam, or of a radius, that is in force in this step: 0 in the warm-up, 1 behind the ramp."""
        c = self.config
        return jnp.clip((step - c.warmup * self.steps + 1).astype(_FLOAT) / (c.ramp * self.steps), 0, 1)

    def _loss(self, state: TrainState, trained: Any, x: Any, logits: Any, labels: Any) -> tuple[Any, ...]:
        """(loss, dl/dz, (dC/d trained)' dl/dC, multipliers, state of the bound, held)."""
        c = self.config
        nothing = jax.tree.map(jnp.zeros_like, trained)
        alone = losses.nothing if c.robust else losses.cross_entropy
        if not c.uses_constants:
            loss, along = jax.value_and_grad(alone)(logits, labels, c.smoothing)
            return loss, along, nothing, state.multipliers, state.bound, state.held
        begin = c.warmup * self.steps
        share: float | jax.Array = self.ramp(state.step) if c.ramp else 1.0
        whole = partial(self.loss, share=share)

        def plain() -> tuple[Any, ...]:
            loss, along = jax.value_and_grad(alone)(logits, labels, c.smoothing)
            return loss, along, nothing, state.multipliers, _calm(state.bound), state.held

        def fresh() -> tuple[Any, ...]:
            pairs, back, bound = jax.vjp(lambda t: self.constants(t, state.bound, x), trained, has_aux=True)
            loss, (along, toward) = jax.value_and_grad(whole, argnums=(0, 2))(logits, labels, pairs)
            (through,) = back(toward)
            multipliers = state.multipliers
            if c.constants == "recursion":  # multipliers that fail on finite weights are reset
                multipliers = jax.tree.map(
                    lambda new, old: jnp.where(bound.failed, new, old), bound.multipliers, multipliers
                )
                bound = bound._replace(multipliers=(), moments=())
            held = Held(pairs, through, jnp.sum(toward * pairs)) if c.refresh > 1 else Held(pairs, (), ())
            held = state.held if c.constants == "local" else held  # those of other images are of no use
            return loss, along, through, multipliers, bound, held

        def kept() -> tuple[Any, ...]:
            held = state.held
            loss, (along, toward) = jax.value_and_grad(whole, argnums=(0, 2))(logits, labels, held.pairs)
            # A radius does not change when logits and constants grow alike, so dl/dz and dl/dC nearly cancel along
            # that direction. They must do so for this batch, too.
            share = jnp.sum(toward * held.pairs) / jnp.where(held.pressure != 0, held.pressure, 1)
            share = jnp.clip(share, 0, _LONGEST)
            through = jax.tree.map(lambda a: a * share.astype(a.dtype), held.gradient)
            return loss, along, through, state.multipliers, _calm(state.bound), held

        branches: list[Callable[[], tuple[Any, ...]]] = [fresh]
        choice = jnp.zeros((), jnp.int32)
        if c.refresh > 1:
            due = (state.step - begin) % c.refresh == 0
            # There are none yet where the steps of all refreshes were skipped.
            due |= ~jnp.any(state.held.pairs)
            choice = jnp.where(due, 0, len(branches)).astype(jnp.int32)
            branches.append(kept)
        if begin:
            choice = jnp.where(state.step < begin, len(branches), choice).astype(jnp.int32)
            branches.append(plain)
        if len(branches) == 1:
            return fresh()
        return jax.lax.switch(choice, branches)

    def _average(self, state: TrainState, weights: Any) -> Any:
        c = self.config
        if c.average == "none":
            return ()
        seen = state.step - c.average_from * self.steps
        # a shorter memory at the start, so that the initial weights have little influence
        if c.average == "ema":
            share = jnp.maximum(1 - c.ema_decay, 1 / (1 + jnp.maximum(seen, 0)).astype(_FLOAT))
        else:
            share = 1 / (1 + jnp.maximum(seen, 0)).astype(_FLOAT)
        share = jnp.where(seen < 0, 1, share)
        return jax.tree.map(lambda mean, new: mean + share * (new - mean), state.average, weights)

    def final_weights(self, state: TrainState) -> Any:
        """The weights to validate and save: the last ones, or their average with its matrices orthonormal again."""
        if self.config.average == "none":
            return state.weights
        return self._restored(state.average) if self.turned else state.average

    @cached_property
    def _restored(self) -> Any:
        return jax.jit(manifold.restored)

    def final_kept(self, state: TrainState) -> Any:
        """What belongs to `final_weights`: statistics of BatchNorm are those of the averaged weights, if there are."""
        return nnx.merge_state(state.kept, state.settled) if jax.tree.leaves(state.settled) else state.kept

    def final(self, state: TrainState) -> tuple[Trainer, Any]:
        """(this with what belongs to the final weights of a state, these weights); spectral layers have converged."""
        weights, made = self.final_weights(state), self.at(self.final_kept(state))
        return made.at(made.advanced(weights, _LAST_ITERATIONS)), weights

    def model(self, state: TrainState) -> nnx.Module:
        """The network with the final weights of a state, in evaluation mode."""
        made, weights = self.final(state)
        return nnx.merge(self.graph, weights, made.rest)


def _calm(bound: Any) -> Any:
    """The state of a bound that was not computed in this step, so it did not fail in it either."""
    return bound._replace(failed=jnp.zeros((), bool)) if hasattr(bound, "failed") else bound


def _metrics(seen: Any) -> Metrics:
    """Metrics of an epoch from the values of its steps."""
    loss, accuracy, skipped, failed, report = seen
    kept = jnp.maximum(jnp.sum(~skipped), 1)

    def mean(a: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(skipped, 0, a)) / kept.astype(_FLOAT)

    def count(a: jax.Array) -> jax.Array:
        return jnp.sum(a.astype(jnp.int32))

    return Metrics(
        mean(loss), mean(accuracy), count(skipped), count(failed), {k: mean(a) for k, a in report.items()}
    )


def pair_constants(found: Any, pairs: str) -> jax.Array:
    """(..., K, K) constants that stand for L_ij: L_ij itself, L_i + L_j, or sqrt(2) L; each bounds L_ij."""
    if pairs == "pairwise":
        return found.pairwise
    if pairs == "whole":
        root = jnp.full(found.pairwise.shape, np.sqrt(2), found.value.dtype)
        return root * found.value[..., None, None]
    return found.per_class[..., :, None] + found.per_class[..., None, :]


def trainer(
    config: Config,
    model: nnx.Module,
    input_shape: tuple[int, ...],
    levels: int,
    images: int,
    devices: Devices,
) -> Trainer:
    """A trainer for `model` (not changed) on so many training images, whose pixels / levels the model reads."""
    if config.batch_size > images:
        raise ValueError(
            f"batch_size {config.batch_size} is more than the {images} images to train on: choose a smaller one"
        )
    devices.check_batch(config.batch_size)
    parts, weights = network.split(model, input_shape)
    rest = {"weights": weights, "levels": levels, "images": images, "devices": devices}
    return Trainer(**parts, **rest, config=config)
