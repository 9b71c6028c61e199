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
        """pgd_accuracy on the sample, and robust_gap: that on training images minus that on held-out ones, else None.

        Nothing in epochs without an attack (`Config.robust_every`).
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
        return {"pgd_accuracy": found["sample"], "robust_gap": gap}


def overfitting(log: Sequence[Mapping[str, Any]]) -> str | None:
    """What is wrong with the last epoch of a robust run: catastrophic overfitting; None where nothing is.

    PGD accuracy has fallen below half of its best in an earlier epoch, while the accuracy in training, under the attack
    of the loss, is at least that of the earlier epoch (Wong, Rice and Kolter, ICLR 2020; Andriushchenko and Flammarion,
    NeurIPS 2020).
    """
    seen = [record for record in log if record.get("pgd_accuracy") is not None]
    if len(seen) < 2 or seen[-1] is not log[-1]:
        return None
    top, last = max(seen[:-1], key=lambda record: record["pgd_accuracy"]), seen[-1]
    if (
        last["pgd_accuracy"] >= _COLLAPSED * top["pgd_accuracy"]
        or last["attack_accuracy"] < top["attack_accuracy"]
    ):
        return None
    return (
        f"catastrophic overfitting: PGD accuracy fell from {100 * top['pgd_accuracy']:.1f} % in epoch "
        f"{top['epoch']} to {100 * last['pgd_accuracy']:.1f} %, while training under its own attack stands at "
        f"{100 * last['attack_accuracy']:.1f} %; use a random start, a smaller attack_step, more attack_steps, "
        "or another loss"
    )


def stopped(log: Sequence[Mapping[str, Any]], config: Config) -> bool:
    """Whether a run ends here because it overfits its own attack."""
    return config.stop_if_overfitted and bool(log) and overfitting(log) is not None
