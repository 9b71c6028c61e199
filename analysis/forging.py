"""Forging: small activations in front of chosen layers are set to zero, in any flax nnx model, without editing it.

In front of a forged layer stands a gate with threshold c = c_r max |activation| over the data (arXiv 2406.19622,
section 3.3, equations 9 and 13, Algorithm 1):

    hard      0 where |x| <= c, x elsewhere
    smooth    x sigmoid((|x| - c) / t),  t = tau c

(The algorithm's b is the largest x, not |x|; the two differ where no ReLU stands before the layer.) `track` is its
tracking mode: one pass over the data, without gradients. Calling the network that `forge` returns is its inference
mode. What can be said of the result:

- The hard gate jumps at c, so a hard-forged network has no Lipschitz constant, and `lb.trace` refuses it.
- The smooth gate has slopes in [sigmoid(-c/t), s] with s > 1 (`Forged.slopes`), so `lb.trace` accepts it, and the bound
  holds for the smoothly forged network. It may well be larger than that of the original.
- Neither is a certificate: a smaller empirical constant is measured on data and says nothing about other inputs.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from lipbounds._text import (
    Progress,
    parsed,
    read_safetensors,
    say,
    show,
    text_table,
    usual_settings,
    whole,
    write_atomically,
)
from lipbounds.analysis.attack_settings import reports
from lipbounds.analysis.batches import Example, chunks, examples, padded
from lipbounds.analysis.gates import (
    Gated,
    Peak,
    Site,
    Threshold,
    Where,
    check_sites,
    choose,
    dotted,
    joined,
    maxima,
    modules,
    slope_range,
    survey,
    swap,
)
from lipbounds.analysis.programs import seen

__all__ = ["Forged", "Gated", "Peak", "Site", "Threshold", "Tracked", "forge", "load_forged", "track"]

KINDS = ("hard", "smooth")
FORMAT, FORMAT_VERSION = "lipbounds-forged", 1

Ratios = float | Mapping[str, float]

_TINY = float(np.finfo(np.float32).tiny)  # below it XLA flushes to zero


class Forged(nnx.Module):
    """A network with gates in front of some layers, made by `forge` or `load_forged`; callable as the network is.

    Thresholds are state: two of these that differ in their values only have equal `nnx.split(...)[0]`, so that what is
    compiled for one serves the other. A layer whose threshold is 0 (c_r = 0, or nothing but zeros was tracked) gets no
    gate.

    network    the copy of the model that holds the gates
    sites      the tracked layers, in the order of their first call
    example    (shape, dtype) of one example
    kind, tau  of the gates
    """

    def __init__(
        self,
        model: nnx.Module,
        sites: Sequence[Site],
        example: Example,
        peaks: Mapping[str, float],
        thresholds: Mapping[str, float],
        kind: str,
        tau: float,
        *,
        keep: bool = False,
    ) -> None:
        """`keep`: see `with_c_r`."""
        network = nnx.clone(model)
        layers = {dotted(path): layer for path, layer in modules(network)}
        gates, idle = {}, []
        for site in sites:
            path = site.path
            if keep or thresholds[path] > 0:
                gates[id(layers[path])] = Gated(layers[path], path, thresholds[path], peaks[path], kind, tau)
            else:
                idle.append(Peak(jnp.asarray(peaks[path], jnp.float32)))
        swap(network, gates)
        self.network = network
        self.idle = nnx.List(idle)
        self.sites, self.example, self.kind, self.tau = tuple(sites), example, kind, tau

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """The output of the forged network."""
        return self.network(*args, **keywords)  # type: ignore[operator]

    @property
    def gates(self) -> dict[str, Gated]:
        """Path -> gate, in the order in which the layers are called."""
        found = {module.path: module for _, module in modules(self.network) if isinstance(module, Gated)}
        return {site.path: found[site.path] for site in self.sites if site.path in found}

    @property
    def thresholds(self) -> dict[str, float]:
        """c of every gate, by path."""
        return {path: float(gated.threshold.get_value()) for path, gated in self.gates.items()}

    @property
    def peaks(self) -> dict[str, float]:
        """Largest |activation| (or their quantile) in front of every tracked layer, gated or not, by path."""
        gates, idle = self.gates, iter(self.idle)
        return {
            site.path: float((gates[site.path].peak if site.path in gates else next(idle)).get_value())
            for site in self.sites
        }

    @property
    def c_r(self) -> dict[str, float]:
        """Threshold / peak of every tracked layer, 0 where there is no gate."""
        peaks, thresholds = self.peaks, self.thresholds
        return {path: thresholds.get(path, 0.0) / peak if peak else 0.0 for path, peak in peaks.items()}

    def inputs(self, batch: Any) -> dict[str, jax.Array]:
        """What enters every gate, before it acts, by path: (n, ...) for a batch of n examples, in one compiled pass.

        The gates act, so a later one sees what the earlier ones let through. The inputs of a layer that is called
        several times follow each other along the first axis.
        """
        with jax.default_matmul_precision("highest"):
            graph, state = nnx.split(self)
            rows = examples(batch, self.example)
            found = _inputs(graph, _told(joined, graph, state, rows), state, rows)
        return {path: found[path] for path in self.gates}

    def original(self) -> Any:
        """A copy of the network without gates: the model that was forged."""
        network = nnx.clone(self.network)
        gates = [module for _, module in modules(network) if isinstance(module, Gated)]
        swap(network, {id(gated): gated.layer for gated in gates})
        return network

    def with_c_r(
        self, c_r: Ratios, *, kind: str | None = None, tau: float | None = None, keep: bool = False
    ) -> Forged:
        """The same network and tracked peaks with other thresholds: nothing is tracked again.

        `keep` leaves gates where the threshold is 0, the identity there, so that the graph is that of every other c_r.
        """
        kind, tau = self.kind if kind is None else kind, self.tau if tau is None else tau
        peaks = self.peaks
        thresholds = _thresholds(c_r, peaks, kind, tau)
        return Forged(
            self.original(), self.sites, self.example, peaks, thresholds, kind, float(tau), keep=keep
        )

    def slopes(self) -> dict[str, tuple[float, float]]:
        """(least, largest) slope of every gate, in one dimension, to float64 accuracy; smooth gates only.

        With s = x / t the slope is sigmoid(s - c/t) + s sigmoid'(s - c/t) for x >= 0. It grows from sigmoid(-c/t) at 0
        through 1/2 + c/(4t) at c to its maximum, where s (2 sigmoid(s - c/t) - 1) = 2, and falls to 1 beyond.

        Raises ValueError for hard gates, which jump.
        """
        if self.kind != "smooth":
            raise ValueError('a hard gate jumps at its threshold and has no slopes: forge with kind="smooth"')
        found = {}
        for path, c in self.thresholds.items():
            ratio = c / float(np.float32(c) * np.float32(self.tau)) if c else 0.0
            found[path] = slope_range(ratio) if c else (1.0, 1.0)
        return found

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write peaks and thresholds (not the model's weights) as safetensors, for `load_forged`."""
        path = pathlib.Path(path)
        peaks, thresholds = self.peaks, self.thresholds
        tensors = {
            "peaks": np.asarray([peaks[site.path] for site in self.sites], np.float32),
            "thresholds": np.asarray([thresholds.get(site.path, 0.0) for site in self.sites], np.float32),
        }
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "tau": self.tau,
            "c_r": self.c_r,
            "example": self.example,
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }
        write_atomically(path, save(tensors, metadata={FORMAT: json.dumps(header, allow_nan=False)}))
        return path

    def __repr__(self) -> str:
        peaks, ratios, thresholds = self.peaks, self.c_r, self.thresholds
        rows = [
            [site.path, site.layer, *(show(of.get(site.path, 0.0)) for of in (peaks, ratios, thresholds))]
            for site in self.sites
        ]
        name = type(self.network).__name__
        smooth = f", tau {show(self.tau)}" if self.kind == "smooth" else ""
        table = text_table(["layer", "class", "peak", "c_r", "threshold"], rows, right=(2, 3, 4))
        return f"Forged: {name}, {self.kind} gates in front of {len(thresholds)} layers{smooth}\n{table}"

    __str__ = __repr__


# ------------------------------------------------------------------------------------------------- tracking, forging
@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """What one pass over N examples saw in front of every chosen layer.

    sites    the layers, in the order of their first call
    example  (shape, dtype) of one example
    maxima   path -> (N,) float32, largest |activation| of every example
    """

    sites: tuple[Site, ...]
    example: Example
    maxima: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.maxima.values())))

    def peaks(self, quantile: float = 1.0) -> dict[str, float]:
        """By path, the least m such that a share `quantile` of the examples has no |activation| above m."""
        _check_quantile(quantile)
        return {
            path: float(np.quantile(values, quantile, method="inverted_cdf"))
            for path, values in self.maxima.items()
        }


@usual_settings()
@reports
def track(
    model: nnx.Module, data: Any, *, where: Where = None, batch_size: int = 256, progress: Progress = None
) -> Tracked:
    """The largest |activation| of every example in front of every chosen layer: Algorithm 1's tracking mode.

    Arguments and errors are those of `forge`. One pass, one compilation, no gradients; the model is not changed, and
    nothing but the current batch and (N,) numbers per layer is held.
    """
    _check_model(model)
    whole("batch_size", batch_size)
    sites: tuple[Site, ...] = ()
    tracked: list[dict[str, np.ndarray]] = []
    count, told = 0, b""
    for rows in chunks(data, batch_size):
        if not tracked:
            example = (rows.shape[1:], str(rows.dtype))
            sites = choose(model, example, where)
            nothing = dict.fromkeys((site.path for site in sites), 0.0)
            graph, state = nnx.split(Forged(model, sites, example, nothing, nothing, "hard", 1.0, keep=True))
            size = len(rows)
        batch = padded(rows, size)
        told = told or _told(maxima, graph, state, batch)
        tops = _maxima(graph, told, state, batch)
        found = {path: np.asarray(top)[: len(rows)] for path, top in tops.items()}
        for path, top in found.items():
            if not np.isfinite(top).all():
                bad = count + int(np.argmin(np.isfinite(top)))
                raise ValueError(f"the activations in front of {path} are not finite for example {bad}")
        tracked.append(found)
        count += len(rows)
        say(f"tracking: {count} examples")
    return Tracked(sites, example, {s.path: np.concatenate([one[s.path] for one in tracked]) for s in sites})


@usual_settings()
def forge(
    model: nnx.Module,
    data: Any,
    c_r: Ratios = 2**-7,
    *,
    kind: str = "hard",
    tau: float = 0.1,
    where: Where = None,
    quantile: float = 1.0,
    batch_size: int = 256,
    progress: Progress = None,
) -> Forged:
    """A copy of the model with a gate in front of every chosen layer, thresholds c_r times what the data reach.

    Args:
        model: an nnx module in evaluation mode, called on batches (n, ...). It is not changed.
        data: an array (N, ...), or an iterable of batches (n, ...) or pairs (x, y) of which x is taken, read once; or
            what `track` returned for this model.
        c_r: in [0, 1); 0 inserts nothing. Or a dict path -> c_r: only these layers are gated, and tracked unless
            `where` says otherwise.
        kind: "hard" or "smooth".
        tau: width of the smooth gate, t = tau c.
        where: which of the convolutional and linear layers, a callable (path, layer) -> bool, or glob patterns of paths
            such as "blocks.*.conv1". None chooses, out of the layers that are called and do not read the network's
            input (the first one called, and others called on the very same array):

            1. every one in modules below the root that hold a BatchNorm (the paper's residual blocks), else
            2. where there is attention or LayerNorm: the linear layers of modules below the root that hold two or more
               of them and no attention, or hold them beside attention (the paper's MLP blocks), else
            3. all of them.

            What wraps the whole network counts as the root.
        quantile: the peak is the quantile of the examples' maxima: 1 the maximum, as in the paper, less is robust
            against outliers.
        batch_size: examples at once.
        progress: True, False or a function of one text: a line after every batch.

    A layer that is shared or called several times has one gate. Layers with stacked kernels (nnx.vmap, nnx.scan) cannot
    be forged. Training must be over: a gate is not meant to be trained through.

    Raises:
        TypeError: not an nnx module, data that are neither an array nor iterable.
        ValueError: a model that is forged already or in training mode, no layer that can be forged, `where` or c_r that
            name none, c_r outside [0, 1), an unknown kind, tau <= 0, data that are empty, of differing shapes or not
            finite, activations that are not finite.
    """
    _check_model(model)
    _check_kind(kind, tau)
    _check_ratios(c_r.values() if isinstance(c_r, Mapping) else [c_r])
    _check_quantile(quantile)
    if isinstance(data, Tracked):
        if where is not None:
            raise ValueError("data were tracked already: pass `where` to track, or the data themselves")
        tracked = data
        check_sites(tracked.sites, survey(model, tracked.example).sites, "the tracked layers")
    else:
        if where is None and isinstance(c_r, Mapping):
            where = [glob.escape(path) for path in c_r]
        tracked = track(model, data, where=where, batch_size=batch_size, progress=progress)
    peaks = tracked.peaks(quantile)
    thresholds = _thresholds(c_r, peaks, kind, tau)
    return Forged(model, tracked.sites, tracked.example, peaks, thresholds, kind, float(tau))


def load_forged(model: nnx.Module, path: str | os.PathLike[str]) -> Forged:
    """Forge a model with the thresholds that `Forged.save` wrote; no data are needed.

    Raises ValueError where the file is not such a file, or where its layers (paths, classes, shapes of kernels and
    inputs) are not those of this model, naming the first that differs; FileNotFoundError for nothing.
    """
    _check_model(model)
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        tensors, metadata = read_safetensors(path)
        fields = parsed(metadata[FORMAT])
        if fields["version"] != FORMAT_VERSION:
            raise ValueError(f"it has version {fields['version']!r}, this program reads {FORMAT_VERSION}")
        shape, dtype = fields["example"]
        example = (tuple(int(n) for n in shape), str(dtype))
        sites = tuple(
            Site(
                str(site["path"]),
                str(site["layer"]),
                tuple(site["kernel"]),
                tuple(tuple(read) for read in site["reads"]),
            )
            for site in fields["sites"]
        )
        kind, tau = fields["kind"], float(fields["tau"])
        numbers = {name: np.asarray(tensors[name], np.float32) for name in ("peaks", "thresholds")}
        _check_kind(kind, tau)
        for name, values in numbers.items():
            if values.shape != (len(sites),) or not (np.isfinite(values) & (values >= 0)).all():
                raise ValueError(f"its {name} are not {len(sites)} finite numbers >= 0")
    except (OSError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path} holds no forged thresholds that can be read, as Forged.save writes them: {why}"
        ) from error
    check_sites(sites, survey(model, example).sites, str(path))
    peaks, thresholds = (
        {site.path: float(value) for site, value in zip(sites, numbers[name], strict=True)}
        for name in ("peaks", "thresholds")
    )
    return Forged(model, sites, example, peaks, thresholds, kind, tau)


# --------------------------------------------------------------------------------------------------- on the device
def _told(read: Callable[[Any, jax.Array], Any], graph: Any, state: Any, batch: np.ndarray) -> bytes:
    """What `seen` says of `read` on the network and a batch: functions that modules hold may close over anything."""
    traced = jax.make_jaxpr(lambda s, b: read(nnx.merge(graph, s, copy=True), b))(state, batch)
    return seen(traced)


@functools.partial(jax.jit, static_argnames=("graph", "told"))
def _maxima(graph: Any, told: bytes, state: Any, batch: jax.Array) -> dict[str, jax.Array]:
    return maxima(nnx.merge(graph, state, copy=True), batch)


@functools.partial(jax.jit, static_argnames=("graph", "told"))
def _inputs(graph: Any, told: bytes, state: Any, batch: jax.Array) -> dict[str, jax.Array]:
    return joined(nnx.merge(graph, state, copy=True), batch)


# ------------------------------------------------------------------------------------------------------ the checks
def _check_model(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise TypeError(f"forge takes a flax nnx.Module, got {type(model).__name__}")
    for path, module in [((), model), *modules(model)]:
        if isinstance(module, Forged | Gated):
            raise ValueError(
                "the model is forged already: use with_c_r for other thresholds, original() to start over"
            )
        random = getattr(module, "rate", getattr(module, "dropout_rate", 1))
        training = getattr(module, "use_running_average", None) is False
        if training or (getattr(module, "deterministic", None) is False and random):
            raise ValueError(
                f"{dotted(path) or 'the model'} ({type(module).__name__}) is in training mode: call model.eval(), or "
                "take the evaluation view of the model by nnx.view"
            )


def _check_kind(kind: Any, tau: Any) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if isinstance(tau, bool) or not isinstance(tau, int | float) or not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau must be a number > 0, got {tau!r}")


def _check_quantile(quantile: Any) -> None:
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile!r}")


def _check_ratios(ratios: Iterable[Any]) -> None:
    for ratio in ratios:
        number = isinstance(ratio, int | float | np.integer | np.floating) and not isinstance(ratio, bool)
        if not number or not 0 <= ratio < 1:
            raise ValueError(f"c_r must be a number in [0, 1), got {ratio!r}")


def _thresholds(c_r: Any, peaks: Mapping[str, float], kind: str, tau: float) -> dict[str, float]:
    """c of every tracked layer, the nearest float32 of c_r times the peak."""
    _check_kind(kind, tau)
    ratios = dict(c_r) if isinstance(c_r, Mapping) else dict.fromkeys(peaks, c_r)
    _check_ratios(ratios.values())
    unknown = [str(path) for path in ratios if path not in peaks]
    if unknown or not ratios:
        raise ValueError(
            f"c_r names {', '.join(unknown) or 'no layer'}; the tracked layers are {', '.join(peaks)}"
        )
    found = {path: float(np.float32(float(ratios.get(path, 0.0)) * peak)) for path, peak in peaks.items()}
    for path, c in found.items():
        if 0 < c * (tau if kind == "smooth" else 1) < _TINY:
            raise ValueError(f"the threshold of {path} is {c:g}, too small for float32: rescale the network")
    return found
