"""Results of a computation: an `UpperBound`, a `LowerBound` or an `Estimate`, three separate types.

With L the Lipschitz constant of the traced function in the norm p = `norm`,

    L    = sup ||f(x) - f(x')||_p / ||x - x'||_p ,
    L_ij = sup |(f_i - f_j)(x) - (f_i - f_j)(x')| / ||x - x'||_p ,

in units of output per unit of the *traced function's* input:

    UpperBound   L <= value,  L_ij <= pairwise[i, j],  L_i <= per_class[i]   (the guarantee says how sure)
    LowerBound   L >= value,  L_ij >= pairwise[i, j]                         (shown by explicit points)
    Estimate     neither: a number near a bound, for training and previews

The types are separate on purpose. `<`, `<=`, `>` and `>=` work between two results of one type in one
norm and raise TypeError otherwise. Only an UpperBound converts by `float(b)`, because a number that
is used as a Lipschitz constant has to be an upper bound. `.value` always reads the number.
`==` is identity: two computations are never the same object.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from lipbounds._text.html import Html, element
from lipbounds._text.records import class_array, draw_pairs, frozen_array, nonnegative, pair_array, put
from lipbounds._text.records import worst_pair as _worst
from lipbounds._text.tables import (
    Direction,
    entry,
    html_table,
    label_text,
    markdown_table,
    markdown_text,
    new_axes,
    printable,
    seconds_text,
    show,
    text_table,
)

Guarantee = Literal["auto", "verified", "probabilistic", "estimate"]  # what may be asked for
Norm = float | Literal["inf"]  # 1, 2 or math.inf

GUARANTEES = ("verified", "probabilistic", "assumed", "estimate")
"""From the strongest to the weakest; `weakest` is the later one.

verified       holds for the traced function, every rounding of the computation included
probabilistic  holds except with the stated probability over our own random start
assumed        rests on something the user declared (a registered activation)
estimate       neither an upper nor a lower bound
"""

GUARANTEE_COLOURS = {
    "verified": "#2f7d4f",
    "probabilistic": "#4477aa",
    "assumed": "#b8860b",
    "estimate": "#b9c0c9",
    "attained": "#c8553d",
}
"""Of bars and legends, in all figures; "attained" is a lower bound."""

NORM_NAMES: dict[float, str] = {1: "l1", 2: "l2", math.inf: "l-inf"}
_ROWS_IN_REPR = 12


def check_norm(norm: Any) -> int | float:
    """1, 2 or math.inf ("inf" is read too); ValueError for everything else."""
    if isinstance(norm, str):
        norm = {"1": 1, "2": 2, "inf": math.inf}.get(norm, norm)
    if not isinstance(norm, str) and not isinstance(norm, bool):
        for known in (1, 2, math.inf):
            if np.ndim(norm) == 0 and norm == known:
                return known
    raise ValueError(f"norm must be 1, 2 or inf, got {norm!r}")


def weakest(guarantees: Iterable[str]) -> str:
    """The weakest of some guarantees ("verified" of none), which a bound computed from them has."""
    ranks = [_rank(g) for g in guarantees]
    return GUARANTEES[max(ranks, default=0)]


def _rank(guarantee: str) -> int:
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee must be one of {', '.join(GUARANTEES)}, got {guarantee!r}")
    return GUARANTEES.index(guarantee)


@dataclass(frozen=True)
class Part:
    """One gain block of a bound: the norm of the linear map from `source` to `target`.

    shape  (rows, columns) of the block;  value  its norm, by the way described in `how`, with `guarantee`.
    """

    source: str
    target: str
    shape: tuple[int, int]
    value: float
    guarantee: str
    how: str

    def __post_init__(self) -> None:
        put(self, "value", nonnegative(self.value, "the value of a part"))
        put(self, "shape", tuple(int(n) for n in self.shape))
        _rank(self.guarantee)

    def _cells(self, direction: Direction) -> list[str]:
        shape = " x ".join(str(n) for n in self.shape)
        return [self.source, self.target, shape, entry(self.value, direction), self.guarantee, self.how]


@dataclass(frozen=True, eq=False)
class _Ordered:
    """Order within one type and one norm (TypeError otherwise), and display; private, not a common type."""

    value: float
    norm: float
    _part_header: ClassVar[tuple[str, ...]] = ("from", "to", "shape", "norm", "guarantee", "how")
    _direction: ClassVar[Direction] = "up"

    def _other(self, other: Any) -> float:
        mine = type(self).__name__
        if type(other) is not type(self):
            raise TypeError(
                f"{mine} and {type(other).__name__} cannot be compared: they bound L from different sides. "
                "Compare .value if you mean the numbers; lb.bracket sets a lower against an upper bound."
            )
        if other.norm != self.norm:
            a, b = NORM_NAMES[self.norm], NORM_NAMES[other.norm]
            raise TypeError(f"{mine}s in different norms ({a}, {b}) cannot be compared")
        return other.value

    # NumPy scalars and arrays then defer to the comparisons below, which raise TypeError
    __array_ufunc__ = None

    def __lt__(self, other: Any) -> bool:
        return self.value < self._other(other)

    def __le__(self, other: Any) -> bool:
        return self.value <= self._other(other)

    def __gt__(self, other: Any) -> bool:
        return self.value > self._other(other)

    def __ge__(self, other: Any) -> bool:
        return self.value >= self._other(other)

    @property
    def worst_pair(self: Any) -> tuple[int, int] | None:
        """The pair (i, j), i < j, whose `pairwise` is largest; None without `pairwise` or with one class."""
        return _worst(self.pairwise)

    def plot(self: Any, ax: Any = None) -> Any:
        """Plot the pair constants, or the gain blocks, or the value as one bar; return the matplotlib Axes.

        Without `ax` the plot gets its own figure (no pyplot state): `b.plot().figure.savefig(...)`.
        """
        ax = new_axes() if ax is None else ax
        if self.pairwise is not None and len(self.pairwise) > 1:
            draw_pairs(ax, self.pairwise, type(self).__name__)
        else:
            parts = getattr(self, "parts", ())
            names = [f"{p.source} → {p.target}" for p in parts] or [self.method]
            values = [p.value for p in parts] or [self.value]
            ax.barh(
                range(len(names)),
                values,
                color=GUARANTEE_COLOURS["attained"] if self._direction == "down" else "#4477aa",
            )
            ax.set(yticks=range(len(names)))
            ax.set_xlabel(f"{NORM_NAMES[self.norm]} norm of the block" if parts else "L")
            ax.set_yticklabels([label_text(name, 40) for name in names])
            ax.invert_yaxis()
        ax.set_title(f"{label_text(self.method)}: {label_text(self._headline())}")
        return ax

    # Display: `_facts` gives the rows, and the three formats lay them out.
    def _headline(self) -> str:
        raise NotImplementedError

    def _facts(self) -> list[tuple[str, str]]:
        raise NotImplementedError

    def _part_rows(self) -> list[list[str]]:
        return []

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__}: {printable(self._headline())}"]
        lines += [f"  {name:<9} {printable(text)}" for name, text in self._facts()]
        rows = self._part_rows()
        if rows:
            table = text_table(self._part_header, rows[:_ROWS_IN_REPR], right=(3,))
            lines += ["  parts", *("    " + line for line in table.splitlines())]
            if len(rows) > _ROWS_IN_REPR:
                lines.append(f"    ... and {len(rows) - _ROWS_IN_REPR} more: print(b.parts_table())")
        return "\n".join(lines)

    def _repr_html_(self) -> Html:
        rows = self._part_rows()
        facts = html_table(("", ""), self._facts())
        head = element("div", element("b", type(self).__name__), f": {self._headline()}")
        if not rows:
            return element("div", head, facts)
        parts = html_table(self._part_header, rows, right=(3,))
        details = element("details", element("summary", f"{len(rows)} parts"), parts)
        return element("div", head, facts, details)

    def to_markdown(self) -> str:
        """The whole result as Markdown: the statement, a table of facts, a table of parts."""
        facts = markdown_table(("", ""), self._facts())
        rows = self._part_rows()
        parts = ["", markdown_table(self._part_header, rows, right=(3,))] if rows else []
        return "\n".join([f"**{type(self).__name__}**: {markdown_text(self._headline())}", "", facts, *parts])


@dataclass(frozen=True, eq=False, repr=False)
class _Constants(_Ordered):
    """Fields and arithmetic that UpperBound and Estimate share (private; use the two types)."""

    guarantee: str
    method: str
    seconds: float
    pairwise: np.ndarray | None = None
    per_class: np.ndarray | None = None
    parts: tuple[Part, ...] = ()
    certificate: Any = None
    failure_probability: float = 0.0
    notes: tuple[str, ...] = ()
    network: str | None = None  # digest of the form, so that the bound is not used for another network

    def __post_init__(self) -> None:
        _check_common(self)
        put(self, "parts", tuple(self.parts))
        _rank(self.guarantee)
        if self.pairwise is not None:
            put(self, "pairwise", pair_array(self.pairwise))
        if self.per_class is not None:
            put(self, "per_class", class_array(self.per_class, self.pairwise))
        probability = float(self.failure_probability)
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"failure_probability must lie in [0, 1), got {probability}")
        put(self, "failure_probability", probability)

    def average_pair(self) -> float:
        """Mean of L_ij over the pairs i < j. ValueError without `pairwise`."""
        if self.pairwise is None or len(self.pairwise) < 2:
            raise ValueError(
                "average_pair needs pairwise constants of two or more classes: use pairwise=True"
            )
        return float(self.pairwise[np.triu_indices(len(self.pairwise), 1)].mean())

    def average_sum(self) -> float:
        """Mean of L_i + L_j over the pairs i < j (CRM paper, Table 2). ValueError without `per_class`."""
        if self.per_class is None or len(self.per_class) < 2:
            raise ValueError(
                "average_sum needs per-class constants of two or more classes: use pairwise=True"
            )
        return float(2.0 * self.per_class.mean())

    def sqrt2(self) -> float:
        """sqrt(2) L, rounded up: L_ij <= sqrt(2) L for every pair; l2 norm only, ValueError otherwise."""
        if self.norm != 2:
            raise ValueError(
                "sqrt(2) L bounds pairs in the l2 norm only; any_pair() has the factor of each norm"
            )
        return self.any_pair()

    def any_pair(self) -> float:
        """A constant that holds for every pair of classes without `pairwise`, rounded up.

        |z_i - z_j| <= ||e_i - e_j||_q ||z||_p with 1/p + 1/q = 1, so L_ij <= factor * L with
        factor 1 (p = 1), sqrt(2) (p = 2), 2 (p = inf).
        """
        # the double sqrt(2) lies above the real one
        factor = 1.0 if self.norm == 1 else math.sqrt(2.0) if self.norm == 2 else 2.0
        product = factor * self.value
        product = math.nextafter(product, math.inf) if self.norm == 2 and product > 0.0 else product
        return nonnegative(product, "the constant of a pair")

    def parts_table(self) -> str:
        """A table of every gain block with its norm, guarantee and method, as plain text."""
        rows = self._part_rows()
        return text_table(self._part_header, rows, right=(3,)) if rows else "(no parts)"

    def _part_rows(self) -> list[list[str]]:
        return [p._cells(self._direction if p.guarantee != "estimate" else "near") for p in self.parts]

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("method", f"{self.method}, {seconds_text(self.seconds)}")]
        pair = self.worst_pair
        if pair is not None and self.pairwise is not None:
            worst = show(float(self.pairwise[pair]), self._direction)
            facts.append(("pairs", f"worst {pair}: {worst}, average {show(self.average_pair())}"))
        if self.per_class is not None and len(self.per_class):
            facts.append(("classes", f"largest L_i {show(float(self.per_class.max()), self._direction)}"))
        return facts + [("note", note) for note in self.notes]


@dataclass(frozen=True, eq=False, repr=False)
class UpperBound(_Constants):
    """L <= value, by `method`, with `guarantee` "verified", "probabilistic" or "assumed".

    Args:
        value: the bound of the whole network.
        norm: 1, 2 or math.inf, of inputs and outputs.
        guarantee: as above; the weakest of the parts.
        method: the name of the method.
        seconds: how long it took.
        pairwise: (K, K) symmetric, zero diagonal: L_ij <= pairwise[i, j] (float64, read-only), or None.
        per_class: (K,): L_i <= per_class[i] for the single output z_i, or None.
        parts: the blocks that the bound is made of; the bound cannot claim more than the weakest of them.
        certificate: what proves the bound again, where the method has one.
        failure_probability: 0 where verified; the stated probability of a false bound where probabilistic.
        notes: about how the bound was found.
        network: a digest of the network, to tell bounds of one network from those of another.

    Raises:
        ValueError: a number is negative, NaN or infinite, a shape is wrong, or the guarantee claims too much.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> bound = lb.liplt(form)
        >>> float(bound) == bound.value, bound.guarantee, bound <= lb.naive(form)
        (True, 'verified', True)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guarantee == "estimate":
            raise ValueError("an estimate is not an upper bound: use Estimate")
        part = weakest(p.guarantee for p in self.parts)
        if _rank(part) > _rank(self.guarantee):
            raise ValueError(f"a bound with parts that are {part!r} cannot be {self.guarantee!r}")
        if self.guarantee == "verified" and self.failure_probability:
            raise ValueError("a verified bound has failure_probability 0")
        if self.guarantee == "probabilistic" and not self.failure_probability:
            raise ValueError("a probabilistic bound states its failure_probability")

    def __float__(self) -> float:
        return self.value

    def _headline(self) -> str:
        probability = self.failure_probability
        risk = f", fails with probability <= {show(probability, digits=3)}" if probability else ""
        return f"L <= {show(self.value, 'up')}  ({NORM_NAMES[self.norm]}, {self.guarantee}{risk})"


@dataclass(frozen=True, eq=False, repr=False)
class Estimate(_Constants):
    """A number near an upper bound, without proof; fields as in UpperBound.

    For training and previews (power iteration lies below a norm). `guarantee` is always "estimate";
    `float(e)` raises TypeError.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> guess = lb.liplt(form, guarantee="estimate")
        >>> type(guess).__name__, round(guess.value, 3)
        ('Estimate', 3.0)
    """

    guarantee: str = "estimate"
    method: str = ""
    seconds: float = 0.0
    _direction: ClassVar[Direction] = "near"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guarantee != "estimate":
            raise ValueError(f"the guarantee of an Estimate is 'estimate', got {self.guarantee!r}")
        if self.failure_probability:
            raise ValueError("an estimate has no failure_probability")

    def __float__(self) -> float:
        raise TypeError(
            "an Estimate is not a bound and does not convert to float; read .value for the number"
        )

    def _headline(self) -> str:
        return f"L ~ {show(self.value)}  ({NORM_NAMES[self.norm]}, estimate: not a bound)"


@dataclass(frozen=True)
class LayerBound:
    """||W||_p >= value for the linear map W between taps, by one data point: ||W u||_p / ||u||_p.

    It is the empirical Lipschitz constant of the layer (Definition 1 of arXiv 2406.19622).

    source, target  the taps (and the input x) that W reads, stacked to u, and the tap or output that it leads to
    shape           (rows, columns) of W;  example  the row of the data that attains it;  path  the target's call path
    """

    source: str
    target: str
    shape: tuple[int, int]
    value: float
    example: int
    path: str

    def __post_init__(self) -> None:
        put(self, "value", nonnegative(self.value, "the value of a layer"))

    def _cells(self) -> list[str]:
        shape = " x ".join(str(n) for n in self.shape)
        number = show(self.value, "down")
        return [self.source, self.target, shape, number, f"example {self.example}", self.path]


@dataclass(frozen=True, eq=False, repr=False)
class LowerBound(_Ordered):
    """L >= value, attained between two points.

    `float(l)` raises TypeError, so that a lower bound is never used as a Lipschitz constant.

    Args:
        value: the lower bound.
        norm: 1, 2 or math.inf, of inputs and outputs.
        method: the name of the method.
        seconds: how long it took.
        witness: (x, x'), float64 of the input's shape: ||f(x) - f(x')||_p >= value * ||x - x'||_p.
        notes: about how the bound was found.
        pairwise: (K, K) symmetric, zero diagonal: L_ij >= pairwise[i, j], or None.
        layers: lower bounds of the linear maps between the taps, attained at data points; see `LayerBound`.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> below = lb.empirical(form, [[1.0, 1.0]], steps=0)
        >>> below.value <= 2.0, len(below.witness)
        (True, 2)
    """

    method: str
    seconds: float
    witness: tuple[np.ndarray, np.ndarray] | None = None
    notes: tuple[str, ...] = ()
    pairwise: np.ndarray | None = None
    layers: tuple[LayerBound, ...] = ()
    _part_header: ClassVar[tuple[str, ...]] = ("from", "to", "shape", "norm >=", "shown by", "call path")
    _direction: ClassVar[Direction] = "down"

    def __post_init__(self) -> None:
        _check_common(self)
        put(self, "layers", tuple(self.layers))
        if self.pairwise is not None:
            put(self, "pairwise", pair_array(self.pairwise))
        if self.witness is None:
            return
        if len(self.witness) != 2:
            raise ValueError(f"a witness is two points, got {len(self.witness)}")
        first, second = (frozen_array(point) for point in self.witness)
        if first.shape != second.shape or not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError("the two points of a witness must be finite and have one shape")
        if np.array_equal(first, second):
            raise ValueError("the two points of a witness must differ")
        put(self, "witness", (first, second))

    def __float__(self) -> float:
        raise TypeError(
            "a LowerBound is no Lipschitz constant and does not convert to float; read .value for the number"
        )

    def _part_rows(self) -> list[list[str]]:
        return [layer._cells() for layer in self.layers]

    def _headline(self) -> str:
        shown = ", attained between two points" if self.witness is not None else ""
        return f"L >= {show(self.value, 'down')}  ({NORM_NAMES[self.norm]}{shown})"

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("method", f"{self.method}, {seconds_text(self.seconds)}")]
        pair = self.worst_pair
        if pair is not None and self.pairwise is not None:
            facts.append(("pairs", f"largest {pair}: {show(float(self.pairwise[pair]), 'down')}"))
        return facts + [("note", note) for note in self.notes]


def _check_common(record: Any) -> None:
    put(record, "value", nonnegative(record.value, f"{type(record).__name__}.value"))
    put(record, "norm", check_norm(record.norm))
    put(record, "seconds", nonnegative(record.seconds, "seconds"))
    if not isinstance(record.method, str) or not record.method:
        raise ValueError("method must name how the result was made")
    if isinstance(record.notes, str):
        raise ValueError("notes is a tuple of strings")
    put(record, "notes", tuple(str(note) for note in record.notes))
