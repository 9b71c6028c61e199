"""What training looks at after every epoch: how a sample of images stands, and whether the radius term still pulls.

Constants are those of the loss, which nothing proves: every name with `estimate` in it is one, and none of these
figures replaces a validation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lipbounds.training import losses, parallel
from lipbounds.training.config import Config
from lipbounds.training.step import Trainer, TrainState

Record = dict[str, Any]
#: The figures of `Watch`, None where there is none: share of the sample that is classified correctly; share with
#: R > eps; mean R of the correct ones; largest L_ij; for CRM the share with 0 < R < r0 and, on one batch, the norms of
#: the gradients by the weights of the cross-entropy and of lam times the radius term.
FIGURES = (
    "sample_accuracy",
    "certified_estimate",
    "mean_radius_estimate",
    "largest_constant_estimate",
    "below_r0_estimate",
    "force_data",
    "force_radius",
)
_HOLD = 0.1  # the radius term has lost its hold where its gradient is below this share of the cross-entropy's
_FEW = 0.01  # a network of which no more is certified counts as uncertified


class Watch:
    """Figures of a state on a sample of images, in the order of the sample; two compiled functions."""

    def __init__(self, trainer: Trainer, pixels: np.ndarray, labels: np.ndarray):
        self.trainer, self.pixels, self.labels = trainer, pixels, labels

    @cached_property
    def _batches(self) -> list[tuple[jax.Array, jax.Array]]:
        """Of the size of a training batch, so that memory suffices; the last one is filled up with repetitions."""
        size, count = self.trainer.config.batch_size, len(self.labels)
        rows = np.resize(np.arange(count), (-(-count // size), size))
        put = self.trainer.devices.put
        return [(put(self.pixels[some]), put(self.labels[some])) for some in rows]

    @cached_property
    def _logits(self) -> Any:
        def logits(weights: Any, kept: Any, pixels: jax.Array) -> jax.Array:
            return self.trainer.at(kept).network(weights, self._inputs(pixels))

        return jax.jit(logits, out_shardings=self.trainer.devices.replicated)

    @cached_property
    def _figures(self) -> Any:
        return jax.jit(self._look, out_shardings=self.trainer.devices.replicated)

    def _inputs(self, pixels: jax.Array) -> jax.Array:
        return self.trainer.devices.spread(pixels).astype(jnp.float32) / np.float32(self.trainer.levels)

    def __call__(self, state: TrainState) -> tuple[TrainState, Record]:
        """(state, whose power iteration went on so that it keeps up in the warm-up, too; figures by name).

        They are those of the weights that would be saved now. Without constants in the loss there are no figures but
        the accuracy.
        """
        made = self.trainer
        weights, kept = made.final_weights(state), made.final_kept(state)
        with made.precision(), jax.numpy_dtype_promotion("standard"):
            logits = [self._logits(weights, kept, pixels) for pixels, _ in self._batches]
            if made.config.uses_constants:
                answers = (logits, [labels for _, labels in self._batches])
                found, bound = self._figures(weights, state.multipliers, state.bound, kept, answers)
                state = state._replace(bound=bound)
        figures: Record = dict.fromkeys(FIGURES)
        if not made.config.uses_constants:
            answer = np.concatenate([np.argmax(parallel.host(z), axis=-1) for z in logits])
            right = answer[: len(self.labels)] == self.labels
            return state, {**figures, "sample_accuracy": float(np.mean(right))}
        numbers = [float(number) for number in parallel.host(found)]
        figures |= zip(FIGURES, numbers, strict=False)  # losses that are no sum have no forces
        return state, {k: v if v is None or np.isfinite(v) else None for k, v in figures.items()}

    def _look(self, weights: Any, multipliers: Any, bound: Any, kept: Any, answers: Any) -> Any:
        made, config = self.trainer.at(kept), self.trainer.config
        count = len(self.labels)
        inputs = [self._inputs(pixels) for pixels, _ in self._batches]
        pairs, back, after = jax.vjp(
            lambda w: made.constants((w, multipliers), bound, inputs[0]), weights, has_aux=True
        )
        first = pairs
        if config.constants == "local":
            near = [made.constants((weights, multipliers), bound, x)[0] for x in inputs[1:]]
            pairs = jnp.concatenate([first, *near])[:count]
        logits, labels = (jnp.concatenate(parts)[:count] for parts in answers)
        radii = losses.radius(logits, labels, pairs)
        right = radii > 0
        some = self._batches[0][1]
        batch, pull = jax.vjp(lambda w: made.network(w, inputs[0]), weights)
        some = made.devices.spread(some)

        def norm(term: Any) -> jax.Array:
            along, toward = jax.grad(term, argnums=(0, 1))(batch, first)
            return optax.tree.norm(jax.tree.map(jnp.add, pull(along)[0], back(toward)[0]))

        found = [
            jnp.mean(jnp.argmax(logits, axis=-1) == labels),
            jnp.mean(radii > config.eps),
            jnp.sum(jnp.where(right, radii, 0)) / jnp.maximum(jnp.sum(right), 1),
            jnp.max(pairs),
        ]
        if config.loss == "crm":
            found += [
                jnp.mean(right & (radii < config.r0)),
                norm(lambda z, c: losses.cross_entropy(z, some, config.smoothing)),
                norm(
                    lambda z, c: (
                        config.lam * losses.crm_penalty(z, some, c, t=config.t, r0=config.r0, g=config.g)
                    )
                ),
            ]
        failed = getattr(after, "failed", False)
        found = [jnp.where(failed & (place > 0), jnp.nan, value) for place, value in enumerate(found)]
        # its multipliers are trained, and stand in the state of their own
        if config.constants == "recursion":
            after = bound
        return found, after


def begins(config: Config) -> int:
    """The last epoch in which the terms of the loss are not all at full weight."""
    return config.warmup + config.ramp


def warning(record: Mapping[str, Any], config: Config) -> str | None:
    """What is wrong with an epoch behind warm-up and ramp, by its figures; None where nothing is.

    The radius term has lost its hold where most correct images lie below r0 and still its gradient has less than a
    tenth of the norm of the cross-entropy's. A network is uncertified where at most 1 % of the sample is certified at
    eps > 0 by the constants of the loss.
    """
    if not config.uses_constants or record["epoch"] <= begins(config):
        return None
    remedy = "use initialisation=unit with a short warmup and a ramp"
    remedy += ", or raise lam" if config.loss == "crm" else ""
    data, radius, below = (record.get(name) for name in ("force_data", "force_radius", "below_r0_estimate"))
    if (
        data is not None
        and radius is not None
        and below is not None
        and radius < _HOLD * data
        and below > record["sample_accuracy"] / 2
    ):
        return (
            f"the radius term has lost its hold: its gradient has {radius / data:.2g} of the norm of the "
            f"cross-entropy's, and {100 * below:.0f} % of the images have 0 < R < r0; {remedy}"
        )
    if _uncertified(record, config):
        return f"at most {100 * _FEW:g} % of the images are certified at eps {config.eps:.4g}; {remedy}"
    return None


def _uncertified(record: Mapping[str, Any], config: Config) -> bool:
    share = record.get("certified_estimate")
    return config.eps > 0 and share is not None and share <= _FEW


def stopped(log: Sequence[Mapping[str, Any]], config: Config) -> bool:
    """Whether training ends here: the last `stop_if_uncertified` epochs behind warm-up and ramp are uncertified."""
    count = config.stop_if_uncertified
    last = list(log[-count:]) if count else []
    return (
        bool(last)
        and len(last) == count
        and all(record["epoch"] > begins(config) and _uncertified(record, config) for record in last)
    )


def best(log: Sequence[Mapping[str, Any]], config: Config, ended: bool = True) -> int | None:
    """The epoch with the largest estimate of `judged` among those with a checkpoint; the last of equals.

    These are the multiples of `checkpoint_every` and, in a run that has ended, its last epoch.
    """
    figure = judged(config)
    kept = [
        (record[figure], record["epoch"])
        for record in log
        if record.get(figure) is not None
        and (record["epoch"] % config.checkpoint_every == 0 or (ended and record is log[-1]))
    ]
    return max(kept)[1] if kept else None


def judged(config: Config) -> str:
    """The figure of the log by which the best checkpoint is chosen."""
    return "pgd_accuracy" if config.robust else "certified_estimate"


def troubled(log: Sequence[Mapping[str, Any]]) -> str | None:
    """The warnings of a run in one line, None where there are none."""
    found = [record for record in log if "warning" in record]
    if not found:
        return None
    first, last = found[0]["epoch"], found[-1]
    where = f"epoch {first}" if len(found) == 1 else f"{len(found)} epochs, the first of them {first}"
    return f"warning in {where}; in epoch {last['epoch']}: {last['warning']}"
