"""The network of a run: its weights apart, what it keeps beside them, evaluation and training mode, its form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

import lipbounds as lb
from lipbounds.training import layers

_FLOAT = jnp.float32
#: What changes without a gradient: vectors of spectral layers, statistics of BatchNorm and `layers.Centre`.
_KEPT = (layers.Kept, nnx.BatchStat)


@dataclass(frozen=True, eq=False)
class Network:
    """A network without its weights.

    Args:
        graph: in evaluation mode: BatchNorm uses its running statistics.
        moving: in training mode: BatchNorm uses the moments of the batch.
        gathering: the same, with the moments of the last batch as statistics.
        rest: all state but the weights.
        input_shape: of one image.
        norms: places of the BatchNorm layers that are trained, `layers.Centre` among them.
    """

    graph: Any
    moving: Any
    gathering: Any
    rest: Any
    input_shape: tuple[int, ...]
    norms: frozenset[tuple[Any, ...]]

    def at(self, kept: Any) -> Self:
        """This network with what a state keeps for it: see `TrainState.kept`."""
        if not jax.tree.leaves(kept):
            return self
        return dataclasses.replace(self, rest=nnx.merge_state(self.rest, kept))

    @property
    def kept(self) -> Any:
        """The part of `rest` that moves in training."""
        return nnx.filter_state(self.rest, _KEPT)

    @property
    def statistics(self) -> Any:
        """The statistics of BatchNorm, a tree without leaves where there are none."""
        return nnx.filter_state(self.rest, nnx.BatchStat)

    def advanced(self, weights: Any, steps: int = 1) -> Any:
        """What is kept after so many steps of the power iterations of spectral layers."""
        if not jax.tree.leaves(nnx.filter_state(self.rest, layers.Kept)):
            return self.kept
        model = nnx.merge(self.graph, weights, self.rest, copy=True)  # inside jit only a copy may change
        layers.iterate(model, steps)
        return nnx.state(model, _KEPT)

    def network(self, weights: Any, x: jax.Array) -> jax.Array:
        """Logits (B, K) of images x in evaluation mode."""
        return nnx.merge(self.graph, weights, self.rest)(x)

    def trained(self, weights: Any, statistics: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """(logits (B, K) in training mode, the statistics of BatchNorm afterwards).

        Moments are those of the whole batch, on however many devices its rows lie. Without BatchNorm this is `network`.
        """
        return self._moved(self.moving, weights, statistics, x)

    def moments(self, weights: Any, x: jax.Array) -> Any:
        """The moments of a batch, as statistics of BatchNorm."""
        return self._moved(self.gathering, weights, self.statistics, x)[1]

    def _moved(self, graph: Any, weights: Any, statistics: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        if not jax.tree.leaves(statistics):
            return self.network(weights, x), statistics
        model = nnx.merge(graph, weights, nnx.merge_state(self.rest, statistics), copy=True)
        logits = model(x)
        return logits, nnx.state(model, nnx.BatchStat)

    def form(self, weights: Any) -> Any:
        """The Lur'e form in evaluation mode; weights may be tracers."""
        batch = jax.ShapeDtypeStruct((1, *self.input_shape), _FLOAT)
        return lb.trace(partial(self.network, weights), batch, batched=True)

    def classes(self, weights: Any) -> int:
        """Number of outputs of the network. ValueError where it does not map a batch of images to logits (B, K)."""
        x = jax.ShapeDtypeStruct((1, *self.input_shape), _FLOAT)
        try:
            found = getattr(jax.eval_shape(self.network, weights, x), "shape", None)
        except Exception as error:
            error.add_note(f"The network was called with a batch of images of shape {x.shape}.")
            raise
        if found is None or len(found) != 2 or found[0] != 1:
            raise ValueError(f"the network must map images {x.shape} to logits (1, K), got {found}")
        return int(found[1])


def split(model: nnx.Module, input_shape: tuple[int, ...]) -> tuple[dict[str, Any], Any]:
    """(the arguments of `Network`, the weights) of a model, which is not changed.

    BatchNorm layers in training mode are trained; those in evaluation mode keep their statistics. ValueError for
    dropout in training mode, of which no step draws anything new.
    """
    for at, part in nnx.iter_modules(model):
        rate = getattr(part, "rate", getattr(part, "dropout_rate", 1))
        if getattr(part, "deterministic", None) is False and rate:
            place = ".".join(map(str, at)) or "the model"
            raise ValueError(
                f"{place} ({type(part).__name__}) draws random numbers in training mode, and `fit` trains without "
                "dropout: set its rate to 0, or its `deterministic` to True"
            )
    moving, weights, rest = _parts(model)
    gathering = _parts(model, momentum=0.0)[0]
    graph = _parts(model, use_running_average=True)[0]
    parts = {"graph": graph, "moving": moving, "gathering": gathering, "rest": rest}
    return {**parts, "input_shape": input_shape, "norms": frozenset(_trained(model))}, weights


def _trained(model: nnx.Module) -> dict[Any, nnx.BatchNorm]:
    """The BatchNorm layers in training mode, by their places."""
    parts = nnx.iter_modules(model)
    return {
        at: part for at, part in parts if isinstance(part, nnx.BatchNorm) and not part.use_running_average
    }


def _parts(model: nnx.Module, **options: Any) -> Any:
    """Graph, weights and rest of a copy whose BatchNorm layers in training mode have these options."""
    copy = nnx.clone(model)
    for part in _trained(copy).values():
        for name, value in options.items():
            setattr(part, name, value)
    return nnx.split(copy, nnx.Param, ...)
