"""The training loop: `fit(config)`, `resume(folder)`, and the parts of a run between two epochs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lipbounds as lb
from lipbounds._text import Pace, reporting, say, usual_programs
from lipbounds.training import parallel, robust_watch, runs, watch
from lipbounds.training.callbacks import Callback
from lipbounds.training.checkpoints import CheckpointError, Checkpoints
from lipbounds.training.config import Config
from lipbounds.training.data import Dataset, load
from lipbounds.training.final_bound import Ahead, Found, bound_within, compiled_ahead, method, seconds_for
from lipbounds.training.initial import fresh
from lipbounds.training.models import ModelSpec
from lipbounds.training.optimisers import schedule
from lipbounds.training.parallel import Devices
from lipbounds.training.statistics import refreshed
from lipbounds.training.step import TrainState, trainer

Record = dict[str, Any]
Progress = bool | Callable[[Record], None] | None
VALIDATED = 1000  # images at most in a validation


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained network.

    Args:
        model: with the weights to use (averaged ones where the configuration says so).
        spec: how to build it again; None for a model that was passed in.
        log: one record per epoch, see `fit`.
        state: the final training state.
        seconds: of this call, compilation included.
        folder: the run folder, if there is one.
        proved: the form of the final weights and its bound, where the last validation proved the one that the final
            figures use (`final_bound`).
        ahead: what compiles the programs of the final bound, where there is an accelerator.
    """

    model: nnx.Module
    spec: ModelSpec | None
    config: Config
    log: tuple[Record, ...]
    state: TrainState = dataclasses.field(repr=False)
    seconds: float
    folder: pathlib.Path | None = None
    proved: tuple[Any, Found] | None = dataclasses.field(default=None, repr=False)
    ahead: Ahead | None = dataclasses.field(default=None, repr=False)


@usual_programs()
def fit(
    config: Config,
    data: Dataset | tuple[np.ndarray, np.ndarray] | None = None,
    *,
    model: nnx.Module | None = None,
    out: str | os.PathLike[str] | None = None,
    devices: Devices | None = None,
    progress: Progress = True,
    callbacks: Sequence[Callback] = (),
) -> Fitted:
    """Train a network as `config` says.

    Args:
        data: instead of `config.dataset`, a data set, or a pair of images (n, height, width, channels), floats in
            the model's input units, and labels (n,).
        model: a flax nnx module, batch of images -> logits, instead of `config.arch`; a copy of it is trained, and
            returned in evaluation mode. BatchNorm layers in evaluation mode keep their statistics. It cannot be rebuilt
            from a name, so it cannot be combined with `out`; `config.initialisation` is not for it.
        out: a new folder for the run: config.json, log.jsonl, checkpoints/ (the last two, and the one with the largest
            certified_estimate) and, in the end, model.safetensors, the last weights, and best.safetensors where an
            earlier checkpoint has a larger certified_estimate.
        devices: to spread the batches over; all by default.
        progress: True shows epochs and the time left on stderr, False and None nothing; a function is called after
            every epoch with its record: epoch, loss and accuracy (means over the training images as augmented), skipped
            (steps with a gradient that is not finite), failed (steps whose recursion was not finite), learning_rate,
            seconds; with a bound in the loss also the figures of `watch.FIGURES` (on at most 1000 images as they are,
            by the constants of the loss, which are not proved), and warning where the radius term has lost its hold
            (`watch.warning`); after validations, by a proved bound, also clean, certified, guarantee, method, part
            ("held-out" or "training") and images, and remark where a better bound did not end in time.
        callbacks: objects that are told about the run, such as `TensorBoard` and `Trackio` (`Callback`). Where one of
            them, or `progress`, raises an exception, the run ends with it, behind a checkpoint of that epoch.

    Raises:
        TypeError: model is no nnx module.
        ValueError: configuration, data and model do not fit together.
        FileNotFoundError: the files of the data set are not found.
        FileExistsError: `out` is not empty.
        FloatingPointError: more than `config.max_skipped` steps of an epoch, or all, had gradients that are not finite.
        CheckpointError: a checkpoint cannot be written (full disk); the last complete one stays.
    """
    if model is not None and out is not None:
        raise ValueError(
            "a run folder needs an architecture by name: pass out without model, or save it yourself"
        )
    if model is not None and not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax nnx module, got {type(model).__name__}")
    images = _images(load(config.dataset, config.data_dir) if data is None else data)
    spec = None
    if model is None:
        spec, model = _built(config, images)
    run = _Run(config, images, model, spec, devices or parallel.devices(), progress, callbacks)
    if out is None:
        return run.go(None, None, [])
    folder = pathlib.Path(out)
    if not run.devices.leads:
        return run.go(folder, None, [])
    runs.create(folder, config, images.record())
    with Checkpoints(folder / runs.CHECKPOINTS) as checkpoints:
        return run.go(folder, checkpoints, [])


@usual_programs()
def resume(
    folder: str | os.PathLike[str],
    *,
    data: Dataset | tuple[np.ndarray, np.ndarray] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    devices: Devices | None = None,
    progress: Progress = True,
    callbacks: Sequence[Callback] = (),
) -> Fitted:
    """Resume a run from its newest checkpoint; the final weights are those of an uninterrupted run, bit for bit.

    A finished run is not trained further. `data_dir` is the folder of the data, if they have moved. Raises as `fit`
    does, and RunError where the folder is not a run folder, or a run on other data, or where log or settings do not fit
    the checkpoint.
    """
    folder = pathlib.Path(folder)
    config = runs.read(folder)
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=os.fspath(data_dir))
    images = _images(load(config.dataset, config.data_dir) if data is None else data)
    runs.check_data(folder, images.record())
    spec, model = _built(config, images)
    run = _Run(config, images, model, spec, devices or parallel.devices(), progress, callbacks)
    with Checkpoints(folder / runs.CHECKPOINTS) as checkpoints:
        return run.go(folder, checkpoints, runs.read_log(folder))


@dataclasses.dataclass(frozen=True, eq=False)
class _Images:
    """Training images as stored on the device; the model reads pixels / levels."""

    name: str
    pixels: np.ndarray
    labels: np.ndarray
    levels: int
    classes: int

    def record(self) -> Record:
        """The identity of these images: name, number, digest, shape and levels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        found = {"name": self.name, "images": len(self.labels), "sha256": digest.hexdigest()}
        return {**found, "shape": list(self.shape), "levels": self.levels}

    @property
    def shape(self) -> tuple[int, int, int]:
        height, width, channels = self.pixels.shape[1:]
        return int(height), int(width), int(channels)


def _built(config: Config, images: _Images) -> tuple[ModelSpec, nnx.Module]:
    """The network that a configuration names, with fresh weights, in training mode."""
    spec = config.spec(images.shape, images.classes)
    model = fresh(spec, config.initialisation, config.seed)
    model.train()
    return spec, model


def _images(data: Dataset | tuple[np.ndarray, np.ndarray]) -> _Images:
    if isinstance(data, Dataset):
        return _Images(data.name, data.train_pixels, data.train_y, data.levels, data.classes)
    x, y = (np.asarray(a) for a in data)
    if x.ndim != 4 or x.size == 0 or x.dtype.kind != "f" or not np.isfinite(x).all():
        raise ValueError(
            f"images must be finite floats (n, height, width, channels), at least one; got {x.dtype} {x.shape}"
        )
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0:
        raise ValueError(f"labels must be integers ({len(x)},) from 0 on, got {y.dtype} {y.shape}")
    return _Images("the data given", x.astype(np.float32), y.astype(np.int32), 1, int(y.max()) + 1)


class _Run:
    """One call of `fit` or `resume`."""

    def __init__(
        self,
        config: Config,
        images: _Images,
        model: nnx.Module,
        spec: ModelSpec | None,
        devices: Devices,
        progress: Progress,
        callbacks: Sequence[Callback],
    ):
        self.config, self.images, self.spec, self.devices = config, images, spec, devices
        self.progress = progress
        self.ahead: Ahead | None = None
        self.pace = Pace()
        self.callbacks = tuple(callbacks) if devices.leads else ()
        self.started = time.perf_counter()
        self.rows, self.held_out = split(len(images.pixels), config.holdout)
        self.trainer = trainer(config, model, images.shape, images.levels, len(self.rows), devices)
        self.trainer.check_images(images.pixels)
        outputs = self.trainer.classes(self.trainer.weights)
        if images.classes > outputs:
            raise ValueError(f"{images.name} has {images.classes} classes, and the network {outputs} outputs")
        part = self.held_out if config.holdout else self.rows
        self.sample = np.sort(np.random.default_rng(1).permutation(part)[:VALIDATED])
        chosen = (images.pixels[self.sample], images.labels[self.sample])
        self.watch = watch.Watch(self.trainer, *chosen)
        samples = {"sample": chosen}
        if config.holdout:
            rows = np.sort(np.random.default_rng(2).permutation(self.rows)[: len(self.sample)])
            samples["training"] = (images.pixels[rows], images.labels[rows])
        self.attacks = robust_watch.RobustWatch(self.trainer, samples)
        low, high = (float(f(images.pixels)) / images.levels for f in (np.min, np.max))
        boxed = {
            f"{config.loss} attacks": config.robust,
            "AutoAugment changes": config.autoaugment,
            "jitter changes": config.jitter > 0,
        }
        who = next((word for word, used in boxed.items() if used), "")
        if who and (low < 0 or high > 1):
            raise ValueError(
                f"{who} images in the box [0, 1], and these reach from {low:g} to {high:g}: "
                "rescale them, and put the normalisation into the model"
            )
        if config.validate_every:  # raises now, not after hours of training, if the network has no bound
            self.trainer.form(self.trainer.weights)

    def go(self, folder: pathlib.Path | None, checkpoints: Checkpoints | None, log: list[Record]) -> Fitted:
        """Train from the newest checkpoint, or from the start where there is none."""
        config, devices = self.config, self.devices
        state, done = self.trainer.init(), 0
        if checkpoints is not None and folder is not None and checkpoints.epochs():
            done, state = checkpoints.load(state)
            runs.check_progress(folder, log, done, int(state.step), self.trainer.steps)
        parallel.agree(done, "the epoch to resume from")
        state = devices.put(state)
        log = [record for record in log if record["epoch"] <= done]
        if folder is not None and devices.leads:
            runs.write_log(folder, log)
        with reporting(self.progress is True), contextlib.ExitStack() as ends:
            for callback in self.callbacks:
                callback.on_start(config, tuple(log))
                ends.callback(callback.on_end)
            bounded = config.uses_constants or config.validate_every or not config.robust
            if bounded and devices.leads and done < config.epochs:
                self.ahead = compiled_ahead(self.trainer, state, self.images.shape)
            if self.ahead is not None:
                ends.push(self.ahead.interrupted)
            state, proved = self._train(state, done, folder, checkpoints, log)
            ended = parallel.local(state)
            model = self.trainer.model(ended)
            if folder is not None and devices.leads and self.spec is not None:
                runs.write_model(folder, model, self.spec)
                if checkpoints is not None:
                    self._write_best(folder, checkpoints, log, ended)
        seconds = time.perf_counter() - self.started
        return Fitted(model, self.spec, config, tuple(log), ended, seconds, folder, proved, self.ahead)

    def _train(
        self,
        state: TrainState,
        done: int,
        folder: pathlib.Path | None,
        checkpoints: Checkpoints | None,
        log: list[Record],
    ) -> tuple[TrainState, tuple[Any, Found] | None]:
        """The state after the last epoch, and the last `Fitted.proved`; records are appended to the log."""
        config, devices, proved = self.config, self.devices, None
        pixels = devices.put(self.images.pixels[self.rows])
        labels = devices.put(self.images.labels[self.rows])
        for epoch in range(done + 1, config.epochs + 1):
            if self._stopped(log):
                break
            begin, proved = time.perf_counter(), None
            state, metrics = self.trainer.epoch(state, pixels, labels)
            state = refreshed(self.trainer, state, pixels, epoch)
            state, figures = self.watch(state)
            figures |= self.attacks(state, epoch)
            record = self._record(epoch, metrics, figures, begin)
            if overfitted := robust_watch.overfitting([*log, record], config.attack_rises):
                record["warning"] = overfitted
            if record["skipped"] > config.max_skipped or record["skipped"] == self.trainer.steps:
                raise FloatingPointError(
                    f"{record['skipped']} of {self.trainer.steps} steps of epoch {epoch} had a loss or gradient that "
                    "is not finite and were skipped: lower learning_rate or lam, or set precision=float64"
                )
            log.append(record)
            ends = epoch == config.epochs or self._stopped(log)
            every = config.validate_every
            if every and (epoch % every == 0 or ends) and devices.leads:
                validated, proved = self.validate(state, log)
                record |= validated
            due = epoch % config.checkpoint_every == 0 or ends
            kept = checkpoints if devices.leads else None
            if kept is not None and folder is not None:
                runs.append_log(folder, record)  # first: a resumed run drops records behind its checkpoint
                if due:
                    kept.save(epoch, parallel.host(state), watch.best(log, config, ended=False))
            try:
                self._tell(record)
            except BaseException as error:
                if kept is not None:
                    if not due:
                        kept.save(epoch, parallel.host(state), watch.best(log, config, ended=False))
                    error.add_note(
                        f"epoch {epoch} is saved: lipbounds train --resume {folder} goes on behind it"
                    )
                raise
        return state, proved

    def _tell(self, record: Record) -> None:
        """Report an epoch."""
        epoch, epochs = record["epoch"], self.config.epochs
        said = f"epoch {epoch} of {epochs}{self.pace(epoch, epochs)}"
        say(f"{said}: loss {record['loss']:.4g}, {100 * record['accuracy']:.1f} % correct in training")
        if callable(self.progress):
            self.progress(record)
        for callback in self.callbacks:
            callback.on_epoch(record)

    def _stopped(self, log: list[Record]) -> bool:
        """Whether the run ends here, before its last epoch."""
        return watch.stopped(log, self.config) or robust_watch.stopped(log, self.config)

    def _write_best(
        self, folder: pathlib.Path, checkpoints: Checkpoints, log: list[Record], ended: TrainState
    ) -> None:
        """The weights of the best checkpoint (`watch.judged`), unless they are the last ones or unreadable."""
        epoch = watch.best(log, self.config)
        if self.spec is None or epoch not in checkpoints.epochs() or epoch == log[-1]["epoch"]:
            return
        with contextlib.suppress(CheckpointError):  # the last weights are safe
            _, state = checkpoints.load(parallel.host(ended), epoch)
            model = self.trainer.model(parallel.local(self.devices.put(state)))
            runs.write_model(folder, model, self.spec, runs.BEST)

    def _record(self, epoch: int, metrics: Any, figures: Record, begin: float) -> Record:
        """The record of an epoch; waits until the epoch is finished."""
        config = self.config
        found = parallel.host(metrics)
        rate = schedule(config, self.trainer.steps, config.learning_rate, config.final_learning_rate)(
            epoch * self.trainer.steps - 1
        )
        record: Record = {
            "epoch": epoch,
            "loss": float(found.loss),
            "accuracy": float(found.accuracy),
            "skipped": int(found.skipped),
            "failed": int(found.failed),
            "learning_rate": float(rate),
            "seconds": time.perf_counter() - begin,
            **{name: float(value) if np.isfinite(value) else None for name, value in found.report.items()},
            **figures,
        }
        trouble = watch.warning(record, config)
        return record if trouble is None else {**record, "warning": trouble}

    def validate(
        self, state: TrainState, log: Sequence[Record] = ()
    ) -> tuple[Record, tuple[Any, Found] | None]:
        """Clean and certified accuracy by a proved bound, of the weights that would be saved now.

        And the form with its bound, unless that of the final figures would be searched for longer (`final_bound`).
        """
        begin = time.perf_counter()
        if self.ahead is not None:
            self.ahead.wait()
        config, state = self.config, parallel.local(state)
        rows, given = self.sample, seconds_for(config, log)
        x = self.images.pixels[rows] / np.float32(self.images.levels)
        made, weights = self.trainer.final(state)
        form = made.form(weights)
        try:
            found = bound_within(form, config, state, given, iterations=0)
        except ValueError:  # multipliers that prove nothing yet must not end the run
            found = bound_within(form, dataclasses.replace(config, constants="liplt"), state, given)
        radii = lb.certified_radius(form, x, self.images.labels[rows], bound=found.bound)
        record = {
            "clean": float(np.mean(radii.correct)),
            "certified": float(radii.accuracy(config.eps)),
            "guarantee": radii.guarantee,
            "method": found.bound.method,
            "part": "held-out" if config.holdout else "training",
            "images": len(rows),
            "validation_seconds": time.perf_counter() - begin,
        }
        if found.instead is not None:
            record["remark"] = found.record()["remark"]
        return record, None if method(config) == "recursion" else (form, found)


def split(count: int, holdout: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out: the same for every seed, so that runs can be compared."""
    held = round(count * holdout)
    if holdout > 0 and held == 0:
        raise ValueError(
            f"holdout {holdout} of {count} images holds out no image: increase it, or set it to 0"
        )
    if held >= count:
        raise ValueError(f"holdout {holdout} leaves none of {count} images to train on")
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def accuracy(model: nnx.Module, x: np.ndarray, y: np.ndarray) -> float:
    """Share of images whose largest logit is the label's, in [0, 1]."""
    if len(x) == 0:
        raise ValueError("the accuracy on no images is not defined")
    graph, state = nnx.split(model)
    logits = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))(state, jnp.asarray(x))
    return float(np.mean(np.asarray(logits).argmax(axis=-1) == np.asarray(y)))
