"""Gates in front of layers of an nnx module: the gate itself, which layers can have one, and how it gets there.

`forging` is the interface; this module holds the parts that depend on the structure of flax modules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.errors import TraceContextError
from scipy.optimize import brentq

from lipbounds.analysis.batches import Example

LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)

Where = None | str | Iterable[str] | Callable[[str, Any], bool]

_PROBE = 3  # examples in the abstract pass that finds the layers


class Threshold(nnx.Variable):
    """c of a gate, () float32."""


class Peak(nnx.Variable):
    """Largest |activation| in front of a layer over the tracked data, or their quantile, () float32."""


class Entered(nnx.Variable):
    """What entered a gate, one array per call."""


class Calls:
    """Which layers are called, in order. Compared by identity, so that a model with an inner jit is traced anew."""

    def __init__(self) -> None:
        self.made: list[tuple[str, Any]] = []


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that can be forged: its place, its class, the shapes of its kernel and of what it reads, per call."""

    path: str
    layer: str
    kernel: tuple[int, ...]
    reads: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        read = " and ".join(f"({', '.join(map(str, shape))})" for shape in self.reads)
        return f"{self.path}: {self.layer} with kernel {self.kernel} on inputs {read}"


class Gated(nnx.Module):
    """A layer behind a gate. Attributes other than its own are those of the layer.

    layer      the layer, as it was
    threshold  Threshold, c >= 0; at c = 0 the gate is the identity
    peak       Peak
    kind, tau  of the gate
    path       of the layer in the model
    """

    def __init__(self, layer: Any, path: str, threshold: float, peak: float, kind: str, tau: float) -> None:
        self.layer = layer
        self.threshold = Threshold(jnp.asarray(threshold, jnp.float32))
        self.peak = Peak(jnp.asarray(peak, jnp.float32))
        self.kind, self.tau, self.path = kind, tau, path
        self.recording: bool | Calls = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "entered" or "layer" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.layer, name)

    def __call__(self, inputs: Any, *args: Any, **keywords: Any) -> Any:
        """The layer on its gated inputs."""
        if isinstance(self.recording, Calls):
            self.recording.made.append((self.path, inputs))
            return self.layer(inputs, *args, **keywords)
        if self.recording:
            before = vars(self).get("entered")
            self.entered = Entered((*(before.get_value() if before is not None else ()), inputs))
        return self.layer(gate(inputs, self.threshold.get_value(), self.kind, self.tau), *args, **keywords)


def gate(x: jax.Array, c: jax.Array, kind: str, tau: float) -> jax.Array:
    """The forged function at x (any shape, floating point), in x's dtype; c is a scalar, at c = 0 the result is x."""
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    c, size = c.astype(wide), jnp.abs(x).astype(wide)
    if kind == "hard":
        return jnp.where(size <= c, jnp.zeros_like(x), x)
    width = jnp.where(c > 0, c * tau, jnp.ones_like(c))
    return jnp.where(c > 0, (x.astype(wide) * jax.nn.sigmoid((size - c) / width)).astype(x.dtype), x)


def slope_range(ratio: float) -> tuple[float, float]:
    """Of x sigmoid((|x| - c) / t) with ratio = c / t."""

    def sigmoid(u: float) -> float:
        return 1 / (1 + math.exp(-u)) if u > -700 else 0.0

    # the derivative of the slope has the sign of 2 - (ratio + u) tanh(u / 2), u = (x - c) / t
    u = brentq(lambda u: (ratio + u) * math.tanh(u / 2) - 2, 0.0, 4.0, xtol=1e-15)
    return sigmoid(-ratio), sigmoid(u) + (ratio + u) * sigmoid(u) * sigmoid(-u)


# ---------------------------------------------------------------------------------------- modules inside of a module
def modules(root: nnx.Module) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, module) of every module below the root, each once, under the first of its paths."""
    for path, module in nnx.iter_modules(root):
        if path:
            yield path, module


def dotted(path: Iterable[Any]) -> str:
    """A path as text with dots."""
    return ".".join(map(str, path))


def swap(node: Any, new: Mapping[int, Any], seen: set[int] | None = None) -> None:
    """Replace every module m below `node` by new[id(m)], in place; m itself is not changed."""
    seen = set() if seen is None else seen
    seen.add(id(node))
    for name, value in list(vars(node).items()):
        if name.startswith("_pytree"):
            continue
        leaves, tree = jax.tree.flatten(value, is_leaf=lambda v: isinstance(v, nnx.Pytree | nnx.Variable))
        for leaf in leaves:
            if isinstance(leaf, nnx.Pytree) and id(leaf) not in seen and id(leaf) not in new:
                swap(leaf, new, seen)
        if any(id(leaf) in new for leaf in leaves):
            changed = jax.tree.unflatten(tree, [new.get(id(leaf), leaf) for leaf in leaves])
            setattr(node, name, changed if isinstance(changed, nnx.Module) else nnx.data(changed))


def rank(layer: Any) -> int:
    """Axes of the kernel of a layer that is not stacked by nnx.vmap."""
    if isinstance(layer, nnx.Linear):
        return 2
    if isinstance(layer, nnx.LinearGeneral):
        return len(layer.in_features) + len(layer.out_features) + len(layer.batch_axis)
    return len(layer.kernel_size) + 2


def forgeable(model: nnx.Module) -> dict[str, Any]:
    """Path -> layer that can have a gate, called or not."""
    return {
        dotted(path): layer
        for path, layer in modules(model)
        if isinstance(layer, LAYERS) and layer.kernel.ndim == rank(layer)
    }


# ----------------------------------------------------------------------------------------------- the layers there are
@dataclasses.dataclass(frozen=True)
class Survey:
    """The layers that a model calls.

    Those that can be forged, in the order of their first call; which of them read the network's input (the first, and
    others called on the same array); and why the others cannot be forged.
    """

    sites: Mapping[str, Site]
    early: frozenset[str]
    barred: Mapping[str, str]

    def __str__(self) -> str:
        why = "; ".join(f"{path} cannot be forged: {reason}" for path, reason in self.barred.items())
        return (", ".join(self.sites) or "none") + (f" ({why})" if why else "")


def survey(model: nnx.Module, example: Example) -> Survey:
    """What the model calls on examples (shape, dtype); nothing is computed."""
    network = nnx.clone(model)
    layers = forgeable(network)
    calls = Calls()
    gates = {path: Gated(layer, path, 0.0, 0.0, "hard", 1.0) for path, layer in layers.items()}
    for gated in gates.values():
        gated.recording = calls
    swap(network, {id(layers[path]): gated for path, gated in gates.items()})
    graph, state = nnx.split(network)
    early: set[str] = set()
    reads: dict[str, list[tuple[int, ...]]] = {}
    barred = {
        dotted(path): "its kernel is stacked by nnx.vmap"
        for path, layer in modules(model)
        if isinstance(layer, LAYERS) and dotted(path) not in layers
    }

    def run(state: Any, batch: jax.Array) -> None:
        try:
            nnx.merge(graph, state, copy=True)(batch)
            early.update(path for path, x in calls.made if x is calls.made[0][1])
            for path, x in calls.made:
                try:
                    reads.setdefault(path, []).append(per_example(path, x, len(batch)))
                except ValueError as error:
                    barred[path] = str(error)
        finally:
            calls.made.clear()  # no tracer outlives its trace

    try:
        batch = jax.ShapeDtypeStruct((_PROBE, *example[0]), jnp.dtype(example[1]))
        jax.eval_shape(run, state, batch)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"the model cannot be called on examples of shape {example[0]} and dtype {example[1]}: {error}"
        ) from error
    sites = {
        path: Site(path, type(layers[path]).__name__, tuple(layers[path].kernel.shape), tuple(shapes))
        for path, shapes in reads.items()
        if path not in barred
    }
    return Survey(sites, frozenset(early), barred)


def per_example(path: str, x: Any, count: int) -> tuple[int, ...]:
    """The shape that a layer reads for each of `count` examples, whose axis is the first."""
    if not jnp.ndim(x) or not x.shape[0] or x.shape[0] % count:
        raise ValueError(
            f"{path} reads shape {jnp.shape(x)}, whose first axis is not that of the {count} examples"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{path} reads {x.dtype}: scale the data to floating point first")
    each = x.shape[0] // count
    return tuple(x.shape[1:]) if each == 1 else (each, *x.shape[1:])


def check_sites(wanted: Sequence[Site], found: Mapping[str, Site], source: str) -> None:
    """ValueError with the first layer of `wanted` that the model does not have."""
    for site in wanted:
        if site.path not in found:
            raise ValueError(f"{source} belong to another network: this one does not call {site}")
        if found[site.path] != site:
            raise ValueError(
                f"{source} belong to another network, which has {site}; this one has {found[site.path]}"
            )


def choose(model: nnx.Module, example: Example, where: Where) -> tuple[Site, ...]:
    """The sites that `where` picks, in the order of the calls; `forging.forge` says what None stands for."""
    found = survey(model, example)
    sites = found.sites
    if not sites:
        raise ValueError(
            "the model calls no layer that can be forged, nnx.Conv, nnx.ConvTranspose, nnx.Linear or nnx.LinearGeneral "
            f"below its root: {found}"
        )
    layers = forgeable(model)
    if where is None:
        picked = _default(model, [path for path in sites if path not in found.early])
        if not picked:
            raise ValueError(
                f"every layer that can be forged reads the network's input, {found}: choose with `where`"
            )
    elif callable(where):
        picked = {path for path in sites if where(path, layers[path])}
        if not picked:
            raise ValueError(f"`where` picks none of the layers {found}")
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"`where` must be patterns of paths, at least one, got {patterns!r}")
        for pattern in patterns:
            if not any(fnmatchcase(path, pattern) for path in sites):
                raise ValueError(f"`where` pattern {pattern!r} matches none of the layers {found}")
        picked = {path for path in sites if any(fnmatchcase(path, pattern) for pattern in patterns)}
    return tuple(site for path, site in sites.items() if path in picked)


def _default(model: nnx.Module, candidates: Sequence[str]) -> set[str]:
    """The rule of `forging.forge` among layers that do not read the network's input."""
    found = {path: module for path, module in modules(model) if not isinstance(module, nnx.List | nnx.Dict)}
    layers = {path: layer for path, layer in found.items() if dotted(path) in candidates}
    root = _common([path[:-1] for path, module in found.items() if isinstance(module, LAYERS)])
    inner = [path for path in found if len(path) > len(root) and path[: len(root)] == root]

    def below(path: tuple[Any, ...], holder: tuple[Any, ...]) -> bool:
        return len(path) > len(holder) and path[: len(holder)] == holder

    norms = [path for path, module in found.items() if isinstance(module, nnx.BatchNorm)]
    blocks = [holder for holder in inner if any(below(path, holder) for path in norms)]
    picked = {path for path in layers if any(below(path, holder) for holder in blocks)}
    attention = [path for path, module in found.items() if _attends(module)]
    if not picked and (attention or any(isinstance(module, nnx.LayerNorm) for module in found.values())):
        for holder in inner:
            if any(path == holder or below(holder, path) for path in attention):
                continue
            linear = [
                path for path, layer in found.items() if isinstance(layer, nnx.Linear) and below(path, holder)
            ]
            if any(below(path, holder) for path in attention):
                linear = [path for path in linear if len(path) == len(holder) + 1]
            if len(linear) >= 2:
                picked |= set(linear) & set(layers)
    return {dotted(path) for path in (picked or layers)}


def _attends(module: Any) -> bool:
    name = type(module).__name__.lower()
    return isinstance(module, nnx.MultiHeadAttention) or "attention" in name or "attn" in name


def _common(paths: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The longest path that all of them start with."""
    common: list[Any] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return tuple(common)


# --------------------------------------------------------------------------------------------- what enters the gates
def entered(network: Any, batch: jax.Array) -> dict[str, list[jax.Array]]:
    """{path: what entered this gate, one array per call} when the network is called on a batch.

    For use inside jit, on a network that is not used afterwards.
    """
    gates = [module for _, module in modules(network) if isinstance(module, Gated)]
    for gated in gates:
        gated.recording = True
    try:
        network(batch)
    except TraceContextError as error:
        raise ValueError(
            "a gated layer is called inside a jax transformation that closes over its module: pass the module through "
            "nnx.scan, nnx.vmap or nnx.remat, or choose other layers with `where`"
        ) from error
    return {gated.path: list(gated.entered.get_value()) for gated in gates}


def maxima(network: Any, batch: jax.Array) -> dict[str, jax.Array]:
    """Path -> (n,) float32, largest |activation| of each of the n examples in front of this layer."""
    count = len(batch)
    found = {}
    for path, calls in entered(network, batch).items():
        for x in calls:
            per_example(path, x, count)
        tops = [jnp.abs(x).reshape(count, -1).max(axis=1).astype(jnp.float32) for x in calls]
        found[path] = jnp.stack(tops).max(axis=0)
    return found


def joined(network: Any, batch: jax.Array) -> dict[str, jax.Array]:
    """Path -> what entered this gate, the calls one after the other along the first axis."""
    found = {}
    for path, calls in entered(network, batch).items():
        if len({x.shape[1:] for x in calls}) > 1:
            shapes = " and ".join(str(x.shape) for x in calls)
            raise ValueError(
                f"{path} is called on inputs of several shapes, {shapes}: these cannot be one array"
            )
        found[path] = jnp.concatenate(calls) if len(calls) > 1 else calls[0]
    return found
