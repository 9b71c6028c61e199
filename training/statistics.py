"""Statistics of BatchNorm for averaged weights, which no step has used: gathered from training images.

The moments of a network's activations are not those of the average of its weights, so that they are taken anew, over
10 000 images at most: more hardly change them (Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

if TYPE_CHECKING:
    from lipbounds.training.step import Trainer, TrainState

_IMAGES = 10_000


def refreshed(trainer: Trainer, state: TrainState, pixels: Any, epoch: int) -> TrainState:
    """The state after an epoch, with statistics that fit the averaged weights.

    They are those of the first batches of the coming epoch, augmented as in training and without an attack. A state
    without averaged weights or without BatchNorm is returned as it is.
    """
    if not jax.tree.leaves(state.settled):
        return state
    config = trainer.config
    if epoch <= config.average_from:  # the average is the last weights
        own = nnx.filter_state(state.kept, nnx.BatchStat)
        return state._replace(settled=jax.tree.map(jnp.copy, own))
    with trainer.precision(), jax.numpy_dtype_promotion("standard"):
        batches, keys = trainer.planned(state.step)
        count = min(len(batches), -(-_IMAGES // config.batch_size))
        total, weights = state.settled, trainer.final_weights(state)
        for number, (rows, key) in enumerate(zip(batches[:count], keys[:count], strict=True)):
            n = np.float32(number)
            total = trainer.gathered(total, n, weights, state.kept, pixels, rows, key)
    return state._replace(settled=total)


def pooled(norms: frozenset[tuple[Any, ...]], total: Any, new: Any, count: jax.Array) -> Any:
    """The statistics of `count` batches in `total` joined with those of one more of the same size.

    norms: places of the BatchNorm layers; other statistics are those of the last batch. Means and variances are joined
    as Chan, Golub and LeVeque (1979) do it, by deviations from the mean so far. With count 0 `total` is not read.
    """
    before, after = (dict(nnx.to_flat_state(state)) for state in (total, new))
    found = dict(after)
    share = 1 / (count + 1)
    for place in norms:
        at, spread = (*place, "mean"), (*place, "var")
        old, mean = jnp.where(count > 0, before[at].get_value(), 0), after[at].get_value()
        variance = jnp.where(count > 0, before[spread].get_value(), 0)
        step = mean - old
        found[at] = after[at].replace(old + share * step)
        joined = (1 - share) * variance + share * after[spread].get_value() + share * (1 - share) * step**2
        found[spread] = after[spread].replace(joined)
    return nnx.from_flat_state(found)
