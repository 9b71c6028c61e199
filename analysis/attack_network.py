"""The network under attack: what is compiled, what are its weights, and how its margins are computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from lipbounds import LureForm
from lipbounds._text import as_labels
from lipbounds.analysis.batches import padded
from lipbounds.analysis.programs import seen
from lipbounds.interop.onnx import OnnxNetwork

Needs = Literal["gradients", "logits", "labels"]

_TIE = 2.0**-100  # margin of a target that ties with another class: not reached
OTHER = 0.01  # share of the largest margin or logit; where an answer changes by more, it is not by rounding
MIXED = (
    "the network's answer to an example changes when the rest of its batch changes: pass the network in evaluation "
    "mode (model.eval(), for BatchNorm and dropout), or jax.vmap of a function of one example"
)


@dataclasses.dataclass(frozen=True)
class Model:
    """A network without its weights; equal ones share what is compiled.

    `graph` is what `kind` merges with weights: the definition of an nnx module, a linen module, the tree of a network
    of one example, or any function, which has no weights of its own. `seen` tells a function, or one that a
    module holds, from itself where what it closes over has changed (`outline`).
    """

    graph: Any
    kind: Literal["nnx", "linen", "single", "function"] = "function"
    seen: bytes = b""

    def __call__(self, weights: Any, batch: jax.Array) -> jax.Array:
        """Logits (B, K) of a batch."""
        if self.kind == "nnx":
            return nnx.merge(self.graph, weights, copy=True)(batch)
        if self.kind == "linen":
            return self.graph.apply(weights, batch)
        if self.kind == "single":
            one = jax.tree.unflatten(self.graph, weights)
            return jax.vmap(one)(batch.astype(one.spec.dtype) if isinstance(one, OnnxNetwork) else batch)
        return self.graph(batch)


def split(fn: Any, needs: Needs = "gradients") -> tuple[Any, Any]:
    """(model, its weights or None), so that weights are arguments of what is compiled.

    TypeError if it is no function, ValueError for an `Oracle` where more than labels are needed.
    """
    if isinstance(fn, Oracle):
        if needs != "labels":
            raise ValueError(
                f"this attack needs {needs}, which an Oracle does not have: use an attack that asks for labels only, "
                "or pass the network as a JAX function"
            )
        return fn, None
    if isinstance(fn, nnx.Module):
        graph, weights = nnx.split(fn)
        return Model(graph, "nnx"), weights
    if isinstance(fn, linen.Module):
        if fn.scope is None:
            raise ValueError("a linen module has no weights by itself: pass module.bind(variables)")
        module, variables = fn.unbind()
        return Model(module, "linen"), variables
    if isinstance(fn, LureForm | OnnxNetwork):
        leaves, tree = jax.tree.flatten(fn)
        return Model(tree, "single"), leaves
    if not callable(fn):
        raise TypeError(f"a network is a function from a batch to logits, got {type(fn).__name__}")
    named = fn if isinstance(fn, Hashable) else fn.__call__  # a method is told by its object alone
    return Model(named), None


def margin_of(z: jax.Array, y: jax.Array, targeted: bool = False) -> jax.Array:
    """(B,) z_y - max over i != y of z_i, positive as long as the label is y.

    Of a target the negative, positive as long as the label is not y; 0, a tie, counts as not reached.
    """
    own = jnp.take_along_axis(z, y[:, None], axis=1)[:, 0]
    others = jnp.where(np.arange(z.shape[1], dtype=np.int32) == y[:, None], -jnp.inf, z).max(axis=1)
    if not targeted:
        return own - others
    return jnp.where(own == others, jnp.float32(_TIE), others - own)


@functools.partial(jax.jit, static_argnames=("model",))
def logits_of(model: Model, weights: Any, points: jax.Array) -> jax.Array:
    """Logits (B, K) of a model at points, in float32."""
    return model(weights, points).astype(jnp.float32)


def check_rows(model: Model, weights: Any, batch: np.ndarray) -> None:
    """ValueError where the answer to one of the examples (B, *shape) depends on the others, or on chance.

    A batch of copies of the example with the most unusual logits must give these again.
    """

    def told(points: np.ndarray) -> np.ndarray:
        z = np.asarray(logits_of(model, weights, points))
        return z - z.mean(axis=1, keepdims=True)

    # logits that are not finite tell nothing here
    with jax.default_matmul_precision("highest"), np.errstate(invalid="ignore"):
        z = told(batch)
        place = int(np.abs(z - z.mean(axis=0)).max(axis=1).argmax())
        again = told(np.repeat(batch[place : place + 1], len(batch), axis=0))
        if np.abs(again - z[place]).max() > OTHER * np.abs(z).max():
            raise ValueError(MIXED)


def answers(fn: Any, points: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """(N,) the classes that a network gives to points (N, *shape)."""
    if not len(points):
        return np.zeros(0, np.int64)
    model, weights = split(fn)
    size, made = min(batch_size, len(points)), []
    model = outline(model, weights, (size, *points.shape[1:]), None).model
    for start in range(0, len(points), size):
        rows = padded(points[start : start + size], size)
        with jax.default_matmul_precision("highest"):
            made.append(np.asarray(logits_of(model, weights, rows)).argmax(axis=1))
    return np.concatenate(made)[: len(points)]


@functools.partial(jax.jit, static_argnames=("model", "targeted"))
def margins(
    model: Model, weights: Any, points: jax.Array, labels: jax.Array, targeted: bool = False
) -> jax.Array:
    """Margins (B,) of a model at points, as `margin_of`."""
    return margin_of(model(weights, points).astype(jnp.float32), labels, targeted)


def count_classes(model: Model, weights: Any, shape: tuple[int, ...], labels: np.ndarray | None) -> int:
    """K, if batches of this shape are mapped to logits (B, K) and the labels lie in 0..K-1; else ValueError."""
    return outline(model, weights, shape, labels).classes


class Outline(NamedTuple):
    """model: with what it is now; classes: K; convolves: whether it does, slowly in loops of XLA on CPUs."""

    model: Model
    classes: int
    convolves: bool


def outline(model: Model, weights: Any, shape: tuple[int, ...], labels: np.ndarray | None) -> Outline:
    """The outline of a network on batches of this shape; ValueError as `count_classes`.

    What is compiled holds the arrays and numbers that a function closed over then: they are part of its model.
    """
    try:
        traced, z = jax.make_jaxpr(lambda w, b: model(w, b), return_shape=True)(
            weights, jax.ShapeDtypeStruct(shape, jnp.float32)
        )
    except Exception as error:
        error.add_note(
            f"The network was called with a batch of shape {shape}, examples of shape {shape[1:]}."
        )
        if isinstance(error, jax.errors.TracerArrayConversionError):
            error.add_note(
                "A network is a function in JAX. An Oracle takes any other one, for `rays` and `adbd`."
            )
        raise
    found = getattr(z, "shape", None)
    if found is None or len(found) != 2 or found[0] != shape[0] or found[1] < 2:
        raise ValueError(f"fn must map {shape} to logits ({shape[0]}, K) with K >= 2, got {found}")
    if labels is not None:
        as_labels(labels, len(labels), found[1])
    model = dataclasses.replace(model, seen=seen(traced))
    return Outline(model, int(found[1]), "conv_general_dilated" in str(traced))


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A network of which only the answers can be asked: plain Python, never traced, compiled or differentiated.

    `fn` maps an array (B, *shape) of NumPy, float32, to labels (B,) or to logits (B, K). Examples are never repeated to
    fill a batch, so that what it counts is what was asked.
    """

    fn: Callable[[np.ndarray], Any]

    def margins(self, points: np.ndarray, labels: np.ndarray, targeted: bool) -> np.ndarray:
        """(B,) margins; of labels 1 or -1. ValueError for any other answer."""
        said = np.asarray(self.fn(points))
        if said.shape == (len(points),) and said.dtype.kind in "iu":
            return np.where((said == labels) != targeted, np.float32(1), np.float32(-1))
        if said.ndim == 2 and len(said) == len(points) and said.shape[1] > 1 and said.dtype.kind == "f":
            own = np.take_along_axis(said, labels[:, None], axis=1)[:, 0]
            others = np.where(np.arange(said.shape[1]) == labels[:, None], -np.inf, said).max(axis=1)
            if targeted:
                return np.where(own == others, _TIE, others - own).astype(np.float32)
            return (own - others).astype(np.float32)
        raise ValueError(
            f"an oracle must answer with {len(points)} integer labels or logits ({len(points)}, K), got an array "
            f"{said.shape} of {said.dtype}"
        )
