"""Effect of forging on the layers of a network, measured on data (arXiv 2406.19622, section 3.3 and Appendix C).

Of every forged layer with weights W, gate f and A = W'W: how much is zeroed, the empirical constant before and after,
and the eigenvalues, norms and Gershgorin discs of A and of A' = A D(x), D(x) the entries of x above the threshold
(`spectra` says what these mean). Every number says whether it bounds from above, is attained, or estimates. None of
them certifies the network: x -> A' x is not the derivative of x -> A f(x).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipbounds._text import (
    Direction,
    Html,
    Progress,
    check_seed,
    element,
    html_table,
    markdown_table,
    markdown_text,
    printable,
    say,
    show,
    text_table,
    together,
    usual_settings,
    whole,
)
from lipbounds.analysis.attack_settings import reports
from lipbounds.analysis.batches import chunks, padded
from lipbounds.analysis.forging import Forged
from lipbounds.analysis.gates import gate as gate_function
from lipbounds.analysis.operators import (
    Operator,
    disc_bounds,
    input_rank,
    largest_eigenvalues,
    norm_bound,
    operator,
    plain_layer,
)
from lipbounds.errors import GuaranteeError
from lipbounds.results import Guarantee

Json = dict[str, Any]
_FLOAT32 = 1e-4  # relative rounding error of float32 measurements, with a safety margin
_FLOAT64 = 1e-9  # the same of float64 computations


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One forged layer. "Attained": a value that some vector reaches, so a lower bound; "bound": an upper one.

    path, layer, shape   where it is, "Conv" or "Linear", (input, output) shape of one input
    threshold            c of the gate
    inputs               inputs seen: examples, times the tokens or calls of an example
    zeroed               mean share of entries with |x| <= c (the paper's Figure 4); `zero` of them were 0 before
    constant             max ||W x|| / ||x||, x in front of the gate (Definition 1); attained, in float32
    constant_forged      max ||W f(x)|| / ||x||: what the paper compares with `constant`; attained, in float32
    constant_gated       max ||W f(x)|| / ||f(x)||, of the layer on its own inputs; attained, in float32
    eigenvalue           lambda_max(A) = ||W||_2^2; exact, else attained
    eigenvalue_bound     the same from above, with `guarantee`
    eigenvalues_forged   (S,) lambda_max(A'(x)) of the S inputs sampled; exact, else attained
    eigenvalues_support  (S,) the same for the mask x != 0: what zeros that were there before leave of lambda_max(A)
    norm_forged          ||A'(x)||_2 at the sampled x with the largest eigenvalue; exact, else attained
    exact, residual      how eigenvalues and norms were found (`operators.Top`), and the largest residual
    disc                 disc bound of A: eigenvalues are at most this; the same by row and by column, A being symmetric
    rows_forged, columns_forged   (S,) disc bounds of A'(x)
    """

    path: str
    layer: str
    shape: tuple[tuple[int, ...], tuple[int, ...]]
    threshold: float
    inputs: int
    zeroed: float
    zero: float
    constant: float
    constant_forged: float
    constant_gated: float
    eigenvalue: float
    eigenvalue_bound: float
    guarantee: str
    eigenvalues_forged: np.ndarray
    eigenvalues_support: np.ndarray
    norm_forged: float
    exact: bool
    residual: float
    disc: float
    rows_forged: np.ndarray
    columns_forged: np.ndarray

    @property
    def worst(self) -> float:
        """The largest of `eigenvalues_forged`."""
        return float(self.eigenvalues_forged.max())

    @property
    def ratios(self) -> np.ndarray:
        """(S,) lambda_max(A'(x)) / lambda_max(A); an estimate where `exact` is False. The paper: 95 % at the worst."""
        return self._ratios(self.eigenvalues_forged)

    @property
    def support_ratios(self) -> np.ndarray:
        """(S,) as `ratios`, for the mask x != 0: the part of the reduction that is not due to the gate."""
        return self._ratios(self.eigenvalues_support)

    def _ratios(self, values: np.ndarray) -> np.ndarray:
        return values / self.eigenvalue if self.eigenvalue else np.ones(len(values))

    def to_json(self) -> Json:
        """All numbers as plain data; arrays as lists, with worst and mean ratio."""
        record = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in dataclasses.asdict(self).items()
        }
        record["shape"] = [list(shape) for shape in self.shape]
        return record | {"ratio_worst": float(self.ratios.max()), "ratio_mean": float(self.ratios.mean())}


_ACTIVATIONS = (
    "layer", "input", "output", "threshold", "zeroed", "zero before", "max |Wx|/|x| >=", "max |Wf(x)|/|x| >=",
    "max |Wf(x)|/|f(x)| >=",
)  # fmt: skip
_EIGENVALUES = (
    "layer", "lambda_max(A)", "<=", "guarantee", "lambda_max(A') worst", "mean", "worst ratio", "mean ratio",
    "worst, x != 0", "||A'||_2", "discs A <=", "discs A' rows <=", "columns <=",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Diagnosis:
    """A `Layer` record for every forged layer, in the order of the calls.

    kind      of the gates
    examples  seen; sample: how many of them, drawn at random with `seed`, had their eigenvalues and discs computed,
              one input (token, call) of each
    left_out  path -> reason, of gated layers that `operators` does not read
    """

    layers: tuple[Layer, ...]
    kind: str
    examples: int
    sample: int
    seed: int
    left_out: Mapping[str, str]

    def __getitem__(self, path: str) -> Layer:
        """The layer at `path`; KeyError."""
        return {layer.path: layer for layer in self.layers}[path]

    def to_json(self) -> Json:
        """All records as plain data."""
        fields = {name: getattr(self, name) for name in ("kind", "examples", "sample", "seed")}
        return fields | {
            "left_out": dict(self.left_out),
            "layers": [layer.to_json() for layer in self.layers],
        }

    def tables(self) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
        """(title, header, rows): activations and empirical constants; eigenvalues and discs.

        ">=" columns are attained and rounded down, "<=" columns are bounds and rounded up. An eigenvalue or norm with
        ">=" in its cell is attained, one without is exact to rounding; a ratio with "~" is an estimate.
        """
        first, second = [], []
        for one in self.layers:
            shapes = ("x".join(map(str, shape)) for shape in one.shape)
            constants = (one.constant, one.constant_forged, one.constant_gated)
            shares = (f"{100 * share:.1f} %" for share in (one.zeroed, one.zero))
            low = tuple(show(c, "down") for c in constants)
            first.append((one.path, *shapes, show(one.threshold), *shares, *low))
            mark, way = ("", "near") if one.exact else (">= ", "down")
            near = "" if one.exact else "~ "
            ratios = (one.ratios.max(), one.ratios.mean(), one.support_ratios.max())
            second.append(
                (
                    one.path,
                    *_shown(mark, way, one.eigenvalue),
                    show(one.eigenvalue_bound, "up"),
                    one.guarantee,
                    *_shown(mark, way, one.worst, float(one.eigenvalues_forged.mean())),
                    *(f"{near}{100 * ratio:.2f} %" for ratio in ratios),
                    *_shown(mark, way, one.norm_forged),
                    *_shown("", "up", one.disc, one.rows_forged.max(), one.columns_forged.max()),
                )
            )
        measured = f"Activations and empirical constants, {self.examples} examples"
        sampled = f"A = W'W and the forged A'(x), {self.sample} examples (seed {self.seed})"
        return [(measured, _ACTIVATIONS, first), (sampled, _EIGENVALUES, second)]

    def _notes(self) -> list[str]:
        notes = [f"{path} is left out: {reason}" for path, reason in self.left_out.items()]
        if self.kind == "smooth":
            notes.append("the gate is smooth: A'(x) is that of the hard gate with the same threshold")
        loose = max((one.residual for one in self.layers), default=0.0)
        if loose > 0:
            notes.append(
                f"eigenvalues with >= are Ritz values, relative residual at most {show(loose, 'up', 2)}"
            )
        return notes

    def __repr__(self) -> str:
        head = f"Diagnosis: {len(self.layers)} {self.kind}-forged layers"
        parts = [
            f"{title}\n{text_table(header, rows, right=range(1, len(header)))}"
            for title, header, rows in self.tables()
        ]
        return "\n\n".join([head, *parts, *map(printable, self._notes())])

    def _repr_markdown_(self) -> str:
        parts = [
            f"**{title}**\n\n{markdown_table(header, rows, right=range(1, len(header)))}"
            for title, header, rows in self.tables()
        ]
        return "\n\n".join([*parts, *map(markdown_text, self._notes())])

    def _repr_html_(self) -> Html:
        parts = [
            together(element("p", element("b", title)), html_table(header, rows, right=range(1, len(header))))
            for title, header, rows in self.tables()
        ]
        return together(*parts, html_table((), [(note,) for note in self._notes()]))


def _shown(mark: str, way: Any, *values: float) -> tuple[str, ...]:
    direction: Direction = way
    return tuple(mark + show(value, direction) for value in values)


@usual_settings()
@reports
def diagnose(
    forged: Forged,
    data: Any,
    *,
    examples: int = 256,
    seed: int = 0,
    batch_size: int = 256,
    guarantee: Guarantee = "auto",
    progress: Progress = None,
) -> Diagnosis:
    """Measure every forged layer on data.

    Args:
        forged: what `forge` returned, with at least one gate.
        data: an array (N, ...), or an iterable of batches (n, ...) or pairs (x, y), read once.
        examples: how many of them are drawn for eigenvalues and discs (all where there are fewer).
        seed: of the draw, and of iterations that start at random.
        batch_size: examples at once.
        guarantee: of the upper bound of ||W||_2, as in `lb.naive`.
        progress: True, False or a function of one text.

    Inequalities of the theory are checked on every sampled input, up to rounding: lambda_max(A') <= lambda_max(A) and
    lambda_max(A') <= ||A'||_2 <= ||A||_2, eigenvalues below disc bounds, disc bounds of A' at most those of A, and on
    all data ||W f(x)|| <= ||W||_2 ||f(x)||.

    Raises:
        TypeError: not a `Forged`; data that are neither an array nor iterable.
        ValueError: no gate, data that are empty, not finite or of other shapes, bad settings.
        GuaranteeError: one of the checks failed, which is a bug.
    """
    if not isinstance(forged, Forged):
        raise TypeError(f"diagnose takes what forge returned, got {type(forged).__name__}")
    whole("examples", examples), whole("batch_size", batch_size), check_seed(seed)
    gates, plain, left_out = {}, {}, {}
    for path, gated in forged.gates.items():
        try:
            plain[path] = nnx.split(plain_layer(gated.layer))
            gates[path] = gated
        except ValueError as error:
            left_out[path] = str(error)
    if not gates:
        raise ValueError(
            "no convolution or linear layer is forged, so there is nothing to diagnose: forge with c_r > 0"
            if not left_out
            else "; ".join(f"{path}: {reason}" for path, reason in left_out.items())
        )
    seen: dict[str, list[dict[str, np.ndarray]]] = {path: [] for path in gates}
    draw, rng = _Draw(examples, seed), np.random.default_rng([seed, 1])
    size = count = 0
    for rows in chunks(data, batch_size):
        size = size or len(rows)
        for path, x in _inputs(forged, rows, size, gates):
            c = gates[path].threshold.get_value()
            found = _measure(*plain[path], x, c, forged.kind, forged.tau)
            seen[path].append({name: np.asarray(value)[: len(rows)] for name, value in found.items()})
        draw.add(rows)
        count += len(rows)
        say(f"diagnosis: {count} examples")
    chosen = draw.rows()
    layers = []
    for path, gated in gates.items():
        sizes = []
        for at in range(0, len(chosen), size):
            part = chosen[at : at + size]
            ((_, x),) = _inputs(forged, part, size, {path: gated})
            token = rng.integers(x.shape[1], size=size)
            sizes.append(np.asarray(jnp.abs(x[np.arange(size), token]).astype(jnp.float32))[: len(part)])
        layers.append(_layer(path, gated, np.concatenate(sizes), seen[path], guarantee, seed))
        say(f"diagnosis: {path}, worst lambda_max(A') / lambda_max(A) {layers[-1].ratios.max():.4f}")
    return Diagnosis(tuple(layers), forged.kind, count, len(chosen), seed, left_out)


def _layer(
    path: str,
    gated: Any,
    sizes: np.ndarray,
    seen: list[dict[str, np.ndarray]],
    guarantee: Guarantee,
    seed: int,
) -> Layer:
    """The record of one layer from |x| (S, *in_shape) of the sample and what `_measure` saw, after the checks."""
    op = operator(gated.layer, sizes.shape[1:])
    threshold = np.asarray(gated.threshold.get_value())
    masks = sizes > threshold
    every = {name: np.concatenate([one[name] for one in seen]) for name in seen[0]}
    if not all(np.isfinite(values).all() for values in every.values()):
        raise ValueError(f"the activations of {path} are not finite in float32: rescale the data")
    before = largest_eigenvalues(op, np.ones((1, *op.in_shape), bool), seed=seed)
    after = largest_eigenvalues(op, masks, seed=seed)
    support = after if np.array_equal(masks, sizes > 0) else largest_eigenvalues(op, sizes > 0, seed=seed)
    worst = int(np.argmax(after.value))
    norm = largest_eigenvalues(op, masks[worst : worst + 1], norm=True, seed=seed)
    bound = norm_bound(op, guarantee=guarantee, seed=seed)
    disc, rows, columns = disc_bounds(op, masks)
    record = Layer(
        path=path,
        layer=type(gated.layer).__name__,
        shape=(op.in_shape, op.out_shape),
        threshold=float(threshold),
        inputs=int(every["inputs"].sum()),
        zeroed=float(every["zeroed"].mean(dtype=np.float64)),
        zero=float(every["zero"].mean(dtype=np.float64)),
        constant=float(every["constant"].max()),
        constant_forged=float(every["constant_forged"].max()),
        constant_gated=float(every["constant_gated"].max()),
        # eigenvalues of principal submatrices are attained by A as well
        eigenvalue=float(
            before.value[0] if before.exact else max(before.value[0], after.value[worst], support.value.max())
        ),
        eigenvalue_bound=math.nextafter(bound.value * bound.value, math.inf),
        guarantee=bound.guarantee,
        eigenvalues_forged=after.value,
        eigenvalues_support=support.value,
        norm_forged=float(norm.value[0]),
        exact=before.exact,
        residual=float(
            max(before.residual.max(), after.residual.max(), support.residual.max(), norm.residual.max())
        ),
        disc=disc,
        rows_forged=rows,
        columns_forged=columns,
    )
    _check(record, op)
    return record


def _check(one: Layer, op: Operator) -> None:
    """GuaranteeError for the first inequality of the theory that the numbers of a layer break beyond rounding."""
    top = one.eigenvalue if one.exact else one.eigenvalue_bound
    root = math.sqrt(one.eigenvalue_bound)
    forged = one.eigenvalues_forged
    slack = _FLOAT64 + (0 if one.exact else one.residual)
    near = _FLOAT64 + one.residual  # two attained values can be out of order by what Lanczos has missed
    for what, low, high, rounding in (
        ("lambda_max(A) <= its bound", one.eigenvalue, one.eigenvalue_bound, _FLOAT64),
        ("lambda_max(A') <= lambda_max(A)", one.worst, top, _FLOAT64),
        ("lambda_max(A' at x != 0) <= lambda_max(A)", one.eigenvalues_support, top, _FLOAT64),
        ("lambda_max(A') <= lambda_max(A' at x != 0)", forged, one.eigenvalues_support, near),
        ("lambda_max(A') <= ||A'||_2", one.worst, one.norm_forged, slack),
        ("||A'||_2 <= ||A||_2", one.norm_forged, top, _FLOAT64),
        ("lambda_max(A) <= disc bound", one.eigenvalue, one.disc, _FLOAT64),
        ("lambda_max(A') <= disc bound by row", forged, one.rows_forged, _FLOAT64),
        ("lambda_max(A') <= disc bound by column", forged, one.columns_forged, _FLOAT64),
        ("disc bound of A' by row <= that of A", one.rows_forged, one.disc, _FLOAT64),
        ("disc bound of A' by column <= that of A", one.columns_forged, one.disc, _FLOAT64),
        ("||W x|| <= ||W|| ||x||", one.constant, root, _FLOAT32),
        ("||W f(x)|| <= ||W|| ||f(x)||", one.constant_gated, root, _FLOAT32),
    ):
        if not np.all(np.asarray(low) <= np.asarray(high) * (1 + rounding)):
            raise GuaranteeError(
                f"{one.path}, {op.size[1]} inputs to {op.size[0]} outputs: {what} does not hold. This is a bug of "
                "lipbounds, please report it"
            )


# -------------------------------------------------------------------------------------------------- the data
def _inputs(
    forged: Forged, rows: np.ndarray, size: int, gates: Mapping[str, Any]
) -> Iterator[tuple[str, jax.Array]]:
    """(path, x) with x (size, T, *in_shape): the T inputs that every example gives a layer, rows padded to `size`."""
    found = forged.inputs(padded(rows, size))
    calls = {site.path: len(site.reads) for site in forged.sites}
    for path, gated in gates.items():
        x = found[path]
        inner = x.shape[x.ndim - input_rank(gated.layer) :]
        by_call = x.reshape(calls[path], size, -1, *inner)
        yield path, jnp.moveaxis(by_call, 0, 1).reshape(size, -1, *inner)


@functools.partial(jax.jit, static_argnames=("graph", "kind", "tau"))
def _measure(
    graph: Any, state: Any, x: jax.Array, c: jax.Array, kind: str, tau: float
) -> dict[str, jax.Array]:
    """Per example of x (n, T, *in_shape) the shares zeroed and the largest quotients over its T inputs."""
    layer = nnx.merge(graph, state, copy=True)
    x = x.astype(layer.kernel[...].dtype)
    flat = x.reshape(-1, *x.shape[2:])

    def length(values: jax.Array) -> jax.Array:
        rows = values.astype(jnp.float32).reshape(len(flat), -1)
        top = jnp.maximum(jnp.abs(rows).max(axis=1), jnp.finfo(jnp.float32).tiny)
        return top * jnp.sqrt(jnp.square(rows / top[:, None]).sum(axis=1))

    def largest(image: jax.Array, source: jax.Array) -> jax.Array:
        below = length(source)
        quotient = jnp.where(below > 0, length(image) / jnp.where(below > 0, below, 1.0), 0.0)
        return quotient.reshape(len(x), -1).max(axis=1)

    after = gate_function(flat, c, kind, tau)
    plain, forged = layer(flat), layer(after)
    axes = tuple(range(1, x.ndim))
    return {
        "inputs": jnp.full(len(x), x.shape[1], jnp.int32),
        "zeroed": (jnp.abs(x).astype(jnp.float32) <= c).mean(axis=axes, dtype=jnp.float32),
        "zero": (x == 0).mean(axis=axes, dtype=jnp.float32),
        "constant": largest(plain, flat),
        "constant_forged": largest(forged, flat),
        "constant_gated": largest(forged, after),
    }


class _Draw:
    """`count` examples of a stream, every subset equally likely and whatever the batches are: the least random keys."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.rng = count, np.random.default_rng([seed, 0])
        self.keys = np.empty(0)
        self.held: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        keys = np.concatenate([self.keys, self.rng.random(len(rows))])
        held = rows if self.held is None else np.concatenate([self.held, rows])
        order = np.argsort(keys, kind="stable")[: self.count]
        self.keys, self.held = keys[order], held[order]

    def rows(self) -> np.ndarray:
        assert self.held is not None
        return self.held
