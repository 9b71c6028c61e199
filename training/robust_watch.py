"""What a robust run looks at after an epoch: accuracy under a short attack, and whether it overfits its own attack.

An attack proves nothing: accuracy under it is an upper estimate of the robust accuracy, and a short one a rough one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds.training import parallel, robust_step
from lipbounds.training.config import Config
from lipbounds.training.step import Trainer, TrainState

Record = dict[str, Any]
_COLLAPSED = 0.5  # share of the best PGD accuracy so far, below which it has collapsed
_FAR = 0.25  # share of the accuracy in training, below which PGD accuracy has nothing to do with it
_LEARNED = 0.1  # part of the way from the accuracy of a constant network to 1


class RobustWatch:
    """Accuracy under PGD on a sample of images, and on as many training images where the sample is held out.

    Args:
        trainer: of the run.
        samples: (pixels, labels) by name: "sample", and "training" where the sample is held out.
    """

    def __init__(self, trainer: Trainer, samples: Mapping[str, tuple[np.ndarray, np.ndarray]]):
        self.trainer, self.samples = trainer, samples

    @cached_property
    def _batches(self) -> dict[str, list[tuple[jax.Array, jax.Array]]]:
        """Of the size of a training batch; the last one is filled up with repetitions."""
        found, put = {}, self.trainer.devices.put
        for name, (pixels, labels) in self.samples.items():
            size, count = self.trainer.config.batch_size, len(labels)
            rows = np.resize(np.arange(count), (-(-count // size), size))
            found[name] = [(put(pixels[some]), put(labels[some])) for some in rows]
        return found

    @cached_property
    def _attacked(self) -> Any:
        made = self.trainer

        def attacked(weights: Any, kept: Any, pixels: Any, labels: Any, number: Any) -> jax.Array:
            x = made.devices.spread(pixels).astype(jnp.float32) / np.float32(made.levels)
            own, labels = made.at(kept), made.devices.spread(labels)
            key = jax.random.fold_in(jax.random.key(made.config.seed), number)
            found = robust_step.pgd(own, weights, x, labels, key)
            return jnp.argmax(own.network(weights, found), axis=-1) == labels

        return jax.jit(attacked, out_shardings=made.devices.replicated)

    def __call__(self, state: TrainState, epoch: int) -> Record:
        """pgd_accuracy and majority on the sample, and robust_gap.

        The latter are the share of the most frequent class, which a constant network reaches, and PGD accuracy on
        training images minus that on held-out ones, None where there are none. Nothing in epochs without an attack
        (`Config.robust_every`).
        """
        config = self.trainer.config
        every = config.robust_every
        if not config.robust or not every or (epoch % every and epoch != config.epochs):
            return {}
        made = self.trainer
        weights, kept = made.final_weights(state), made.final_kept(state)
        found = {}
        with made.precision(), jax.numpy_dtype_promotion("standard"):
            for name, batches in self._batches.items():
                right = [
                    parallel.host(self._attacked(weights, kept, x, y, np.int32(number)))
                    for number, (x, y) in enumerate(batches)
                ]
                found[name] = float(np.mean(np.concatenate(right)[: len(self.samples[name][1])]))
        gap = found["training"] - found["sample"] if "training" in found else None
        majority = float(np.bincount(self.samples["sample"][1]).max() / len(self.samples["sample"][1]))
        return {"pgd_accuracy": found["sample"], "majority": majority, "robust_gap": gap}


def overfitting(log: Sequence[Mapping[str, Any]], begin: int = 0) -> str | None:
    """What is wrong with the last epoch of a robust run: catastrophic overfitting; None where nothing is.

    Either PGD accuracy has fallen below half of its best in an earlier epoch, while the accuracy in training, under
    the attack of the loss, is at least that of the earlier epoch; or it is less than a quarter of that in training
    (Wong, Rice and Kolter, ICLR 2020; Andriushchenko and Flammarion, NeurIPS 2020). The accuracy that fell, or that
    in training, has to be that of a network that has learned something: a tenth of the way from `majority` to 1.
    Epochs up to `begin` (`Config.attack_rises`) do not count: their own attack is weaker than PGD.
    """
    if not log or log[-1].get("pgd_accuracy") is None or log[-1]["epoch"] <= begin:
        return None
    last = log[-1]
    earlier = [each for each in log[:-1] if each.get("pgd_accuracy") is not None and each["epoch"] > begin]
    chance = last.get("majority") or 0.0
    learned = chance + _LEARNED * (1 - chance)
    own, left = last["attack_accuracy"], last["pgd_accuracy"]
    top = max(earlier, key=lambda record: record["pgd_accuracy"], default=last)
    best = top["pgd_accuracy"]
    if best > learned and left < _COLLAPSED * best and own >= top["attack_accuracy"]:
        text = f"PGD accuracy fell from {100 * best:.1f} % in epoch {top['epoch']} to {100 * left:.1f} %"
    elif own > learned and left < _FAR * own:
        text = f"PGD accuracy is {100 * left:.1f} %"
    else:
        return None
    return (
        f"catastrophic overfitting: {text}, while training under its own attack stands at {100 * own:.1f} %; "
        "use a random start, a smaller attack_step, more attack_steps, or another loss"
    )


def stopped(log: Sequence[Mapping[str, Any]], config: Config) -> bool:
    """Whether a run ends here because it overfits its own attack."""
    return config.stop_if_overfitted and bool(log) and overfitting(log, config.attack_rises) is not None
