"""All bounds of one network side by side: proved from above, attained from below, or only estimated.

    lower <= L <= upper      for every row of kind "lower" and every row of kind "upper"

`compare` checks this for all rows (also for every pair of classes) and raises GuaranteeError
if two rows contradict each other. Estimates have their own column
and never enter this check or a certified accuracy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lipbounds._comparison.bracket import check_order
from lipbounds._empirical.empirical import empirical, values64
from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import check_network
from lipbounds._form.units import Units, check_units, shape_error
from lipbounds._lipsdp.lipsdp import lipsdp
from lipbounds._margins.radius import certified_radius
from lipbounds._text.arguments import as_labels
from lipbounds._text.calls import FAILURES, public, reason
from lipbounds._text.device import Device
from lipbounds._text.html import Html, element, together
from lipbounds._text.progress import Progress, about, say
from lipbounds._text.tables import (
    Direction,
    entry,
    html_table,
    label_text,
    markdown_table,
    markdown_text,
    new_axes,
    percent,
    printable,
    seconds_text,
    show,
    text_table,
)
from lipbounds._triangle.liplt import liplt
from lipbounds._triangle.naive import naive
from lipbounds.results import (
    GUARANTEE_COLOURS,
    NORM_NAMES,
    Estimate,
    Guarantee,
    LowerBound,
    Norm,
    UpperBound,
    check_norm,
)

_KINDS: dict[type, str] = {UpperBound: "upper", LowerBound: "lower", Estimate: "estimate"}
_WAYS: dict[str, Direction] = {"upper": "up", "lower": "down", "estimate": "near", "none": "near"}


#: CVXPY solves larger problems (in neurons, or in pairs of classes) only if it is requested by name.
CVXPY_NEURONS = 60
CVXPY_PAIRS = 3
_CHECKED = (-math.inf, math.inf)  # the range of points whose units were checked before


@dataclass(frozen=True)
class Question:
    """The arguments of `compare` that a method may need.

    named   the method was requested by name, not as one of all, and then may take any time
    """

    form: Any
    X: Any
    norm: float
    pairwise: bool
    guarantee: str
    seed: int
    named: bool = True
    input_range: tuple[float, float] | None = None

    def options(self, **more: Any) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("norm", "pairwise", "guarantee", "seed")}
        return options | more


def _liplt(**more: Any) -> Callable[[Question], Any]:
    return lambda q: liplt(q.form, **q.options(**more))


def _lipsdp(name: str, solver: str = "recursion", multipliers: str = "neuron") -> Callable[[Question], Any]:
    def run(q: Question) -> Any:
        if solver != "recursion" and not q.named and q.norm == 2 and q.guarantee != "estimate":
            _keep_small(q, name)
        return lipsdp(q.form, **q.options(solver=solver, multipliers=multipliers))

    return run


def _keep_small(q: Question, name: str) -> None:
    """ValueError where CVXPY would take minutes; the limits depend on sizes alone."""
    neurons, k = sum(tap.size_out for tap in elementwise_view(q.form).taps), q.form.num_outputs
    pairs = k * (k - 1) // 2 if q.pairwise else 0
    if neurons > CVXPY_NEURONS:
        why = f"{neurons} neurons, more than {CVXPY_NEURONS}"
    elif pairs > CVXPY_PAIRS:
        why = f"{pairs} pairs of classes, more than {CVXPY_PAIRS}"
    else:
        return
    raise ValueError(f"{why}, can take minutes; to run it, name it: methods=[{name!r}]")


METHODS: dict[str, Callable[[Question], Any]] = {
    "empirical": lambda q: empirical(
        q.form, q.X, norm=q.norm, pairwise=q.pairwise, seed=q.seed, input_range=q.input_range
    ),
    "lipsdp": _lipsdp("lipsdp"),
    "lipsdp-clarabel": _lipsdp("lipsdp-clarabel", solver="clarabel"),
    "lipsdp-scs": _lipsdp("lipsdp-scs", solver="scs"),
    "lipsdp-layer": _lipsdp("lipsdp-layer", multipliers="layer"),
    "liplt-optimized": _liplt(scaling="optimized"),
    "liplt-sll": _liplt(scaling="sll"),
    "liplt-aol": _liplt(scaling="aol"),
    "liplt": _liplt(),
    "naive": lambda q: naive(q.form, **q.options()),
    "liplt-estimate": _liplt(guarantee="estimate"),
}
"""Every method, in the order of the table: name -> function of the Question, returning one of three types."""


@dataclass(frozen=True)
class Row:
    """One method: its result, or the reason why it has none.

    kind       "upper", "lower", "estimate", or "none" where the method refused; `reason` says why
    value      of the whole network (None where refused);  pair  the largest L_ij, with pairwise=True
    guarantee  as the result states it; "attained" for a lower bound
    certified  accuracies proved at each eps of the comparison; () without labels or a bound
    radii, result   the Radii and the bound themselves
    """

    method: str
    kind: str
    value: float | None = None
    guarantee: str = ""
    seconds: float = 0.0
    pair: float | None = None
    certified: tuple[float, ...] = ()
    median_radius: float | None = None
    radii: Any = None
    result: Any = None
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Rows of `compare`; iterate, index by position or by method name.

    clean   share of X that the network classifies correctly (None without labels)
    eps     the radii, in units of the traced function's input, at which accuracy is certified
    """

    rows: tuple[Row, ...]
    norm: float
    eps: tuple[float, ...] = ()
    clean: float | None = None
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: int | str) -> Row:
        if not isinstance(which, str):
            return self.rows[which]
        for row in self.rows:
            if row.method == which:
                return row
        raise KeyError(f"no row {which!r}; there are {', '.join(row.method for row in self.rows)}")

    @property
    def upper(self) -> UpperBound | None:
        """The smallest upper bound, None if no method gave one."""
        return min((r.result for r in self.rows if r.kind == "upper"), key=lambda b: b.value, default=None)

    @property
    def lower(self) -> LowerBound | None:
        """The largest lower bound, None if no method gave one."""
        return max((r.result for r in self.rows if r.kind == "lower"), key=lambda b: b.value, default=None)

    def _statement(self) -> str:
        low = show(self.lower.value, "down") + " <= " if self.lower is not None else ""
        high = " <= " + show(self.upper.value, "up") if self.upper is not None else ""
        if not low and not high:
            return f"no bound of L  ({NORM_NAMES[self.norm]})"
        return f"{low}L{high}  ({NORM_NAMES[self.norm]})"

    def _table(self) -> tuple[list[str], list[list[str]], list[int]]:
        """Header, rows and right-aligned columns; empty columns are left out."""
        header = ["method", "upper", "lower", "estimate", "guarantee", "worst pair", "median radius"]
        header += [f"certified at {eps:.4g}" for eps in self.eps] + ["time", ""]
        rows = []
        for row in self.rows:
            way = _WAYS[row.kind]
            values = [entry(row.value, way) if row.kind == kind else "" for kind in _KINDS.values()]
            shares = [f"{percent(a, 'down', 1)} %" for a in row.certified] or [""] * len(self.eps)
            radius = entry(row.median_radius, "down", 4)
            cells = [row.method, *values, row.guarantee or "-", entry(row.pair, way), radius, *shares]
            rows.append([*cells, seconds_text(row.seconds), row.reason])
        keep = [i for i in range(len(header)) if i < 4 or any(row[i] for row in rows)]
        right = [keep.index(i) for i in keep if i in (1, 2, 3) or 5 <= i < len(header) - 1]
        return [header[i] for i in keep], [[row[i] for i in keep] for row in rows], right

    def _footer(self) -> list[str]:
        if self.clean is None:
            return list(self.notes)
        return [f"clean accuracy {100 * self.clean:.1f} %; radii in units of the input", *self.notes]

    def __repr__(self) -> str:
        header, rows, right = self._table()
        rows = [[*row[:-1], " ".join(row[-1].split())[:100]] for row in rows] if header[-1] == "" else rows
        table = text_table(header, rows, right)
        head = f"Comparison: {printable(self._statement())}"
        return "\n".join([head, table, *map(printable, self._footer())])

    def _repr_html_(self) -> Html:
        footer = [element("div", line) for line in self._footer()]
        head = together(element("b", "Comparison"), f": {self._statement()}")
        return element("div", head, html_table(*self._table()), *footer)

    def to_markdown(self) -> str:
        """The table as Markdown, with the statement above it."""
        footer = ["", *(f"- {markdown_text(line)}" for line in self._footer())] if self._footer() else []
        head = f"**{markdown_text(self._statement())}**"
        return "\n".join([head, "", markdown_table(*self._table()), *footer])

    def plot(self, ax: Any = None) -> Any:
        """Bounds side by side (log scale), coloured by guarantee; returns the matplotlib Axes.

        Lower bounds are hollow, estimates grey and hatched; a method without a result is labelled as such.
        """
        from matplotlib.patches import Patch

        ax = new_axes(7.0, 1.2 + 0.45 * len(self.rows)) if ax is None else ax
        positive = [r.value for r in self.rows if r.value]
        floor = min(positive, default=1.0) / 2
        seen: dict[str, Any] = {}
        for place, row in enumerate(self.rows):
            if row.value is None:
                ax.text(floor, place, " no result", va="center", color="#888888", fontsize=8)
                continue
            colour = GUARANTEE_COLOURS[row.guarantee]
            look: dict[str, Any] = {
                "edgecolor": colour,
                "facecolor": colour if row.kind == "upper" else "none",
            }
            look |= {"hatch": "///"} if row.kind == "estimate" else {}
            ax.barh(place, max(row.value - floor, 0.0), left=floor, **look)
            number = entry(row.value, _WAYS[row.kind], 4)
            ax.text(max(row.value, floor), place, f" {number}", va="center", fontsize=8)
            seen.setdefault(row.guarantee, Patch(label=row.guarantee, **look))
        ax.set_xscale("log")
        ax.set_xlim(floor, 4 * max(positive, default=1.0))
        ax.set(
            yticks=range(len(self.rows)),
            xlabel=f"bound of L ({NORM_NAMES[self.norm]})",
            title=label_text(self._statement()),
        )
        ax.set_yticklabels([label_text(row.method, 40) for row in self.rows])
        ax.invert_yaxis()
        if seen:
            ax.legend(handles=list(seen.values()), fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return ax


def _run(name: str, question: Question) -> Row:
    begin = time.perf_counter()
    say(name)
    try:
        with about(name):
            result = METHODS[name](question)
    except FAILURES as failure:
        return Row(name, "none", seconds=time.perf_counter() - begin, reason=_words(failure))
    return _row(name, result)


def _words(failure: Exception) -> str:
    """The reason why a method has no result."""
    return f"out of memory: {reason(failure)}" if isinstance(failure, MemoryError) else reason(failure)


def _row(name: str, result: Any) -> Row:
    kind = _KINDS[type(result)]
    guarantee = "attained" if kind == "lower" else result.guarantee
    pair = float(result.pairwise.max()) if result.pairwise is not None and result.pairwise.size else None
    return Row(name, kind, result.value, guarantee, result.seconds, pair, result=result)


def _certify(form: Any, row: Row, X: Any, y: Any) -> Row:
    """The row with the radii that its upper bound proves."""
    try:
        radii = certified_radius(form, X, y, bound=row.result, input_range=_CHECKED)
    except FAILURES as failure:
        return replace(row, reason=f"no radii: {_words(failure)}")
    radius = np.asarray(radii.radius, dtype=np.float64)
    return replace(row, radii=radii, median_radius=float(np.median(radius)) if radius.size else None)


def _usual_eps(rows: Iterable[Row]) -> tuple[float, ...]:
    """One radius to compare at: the median positive radius of the best row, in two digits."""
    best: list[float] = []
    for row in rows:
        if row.radii is not None:
            radius = np.asarray(row.radii.radius, dtype=np.float64)
            positive = radius[(radius > 0) & np.isfinite(radius)]
            best += [float(np.median(positive))] if positive.size else []
    return (float(f"{max(best):.2g}"),) if best else ()


@public
def compare(
    form: Any,
    X: Any = None,
    y: Any = None,
    methods: Iterable[str | UpperBound | LowerBound | Estimate] | None = None,
    *,
    norm: Norm = 2,
    pairwise: bool = False,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    eps: float | Iterable[float] | None = None,
    input_range: tuple[float, float] | None = None,
    device: Device = "auto",
    progress: Progress = True,
) -> Comparison:
    """Compare methods on one network: a table of upper bounds, lower bounds and estimates.

    A method that fails (a ValueError, numbers out of range, no memory) becomes a row with the reason.

    Args:
        form: a traced form.
        X, y: (N, *form.in_shape) points for the lower bound, (N,) integer labels: with both, every upper bound also
            certifies X, and the table shows the certified accuracies.
        methods: names from `lb.METHODS`, or results computed before; None means all names, but leaves the solvers
            of CVXPY out beyond 60 neurons or 3 pairs of classes (their rows say so).
        norm, pairwise, guarantee, seed: as in `lb.liplt` (guarantee: "auto", "verified", "probabilistic", "estimate").
        eps: radii to certify at, in units of the traced function's input; None: the median of the positive radii that
            the best bound proves, in two digits, so that it certifies about half of the points.
        input_range: (low, high), the range of the entries of X, which are held to it then; None warns
            (`lb.UnitsWarning`) where X looks like images in other units than [0, 1].
        device: where large proofs are computed: "auto" (on a GPU where JAX has one by default), "cpu" or "gpu".
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Raises:
        ValueError: an unknown method or norm, results of another network, labels without points or out of range.
        GuaranteeError: a lower bound exceeds an upper one.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> table = lb.compare(form, methods=["naive", "liplt", "lipsdp"])
        >>> [(row.method, row.guarantee, round(row.value, 3)) for row in table]
        [('naive', 'verified', 4.0), ('liplt', 'verified', 3.0), ('lipsdp', 'verified', 2.0)]
    """
    p = check_norm(norm)
    if y is not None and X is None:
        raise ValueError("labels y need points X")
    if not isinstance(methods, str | Iterable | None):
        raise TypeError(f"methods holds names of methods, got {methods!r}; options such as norm are keywords")
    wanted = list(METHODS) if methods is None else [methods] if isinstance(methods, str) else list(methods)
    unknown = [m for m in wanted if (m not in METHODS if isinstance(m, str) else type(m) not in _KINDS)]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; there are {', '.join(METHODS)}")
    alien = [m.method for m in wanted if not isinstance(m, str) and m.norm != p]
    if alien:
        raise ValueError(f"these results are in another norm than {NORM_NAMES[p]}: {', '.join(alien)}")
    for result in (m for m in wanted if not isinstance(m, str)):
        check_network(form, getattr(result, "network", None), f"the result of {result.method}")
    levels = _eps(eps)
    points, labels = (None, None) if y is None else _labels(form, X, y)
    if points is not None:
        check_units(points, points.shape[1:], Units(input_range))
        input_range = _CHECKED
    question = Question(form, X, p, bool(pairwise), guarantee, seed, methods is not None, input_range)
    rows = [_run(m, question) if isinstance(m, str) else _row(m.method, m) for m in wanted]
    for low in rows:
        for high in rows:
            if low.kind == "lower" and high.kind == "upper":
                check_order(low.result, high.result)
    if points is None or labels is None:
        return Comparison(tuple(rows), p)

    rows = [_certify(form, row, points, labels) if row.kind == "upper" else row for row in rows]
    levels = _usual_eps(rows) if eps is None else levels
    rows = [
        replace(row, certified=tuple(float(row.radii.accuracy(e)) for e in levels if row.radii is not None))
        for row in rows
    ]
    notes = () if pairwise else ("radii use sqrt(2) L; pass pairwise=True for larger ones",)
    return Comparison(tuple(rows), p, levels, _clean(form, points, labels), notes)


def _eps(eps: float | Iterable[float] | None) -> tuple[float, ...]:
    if eps is None:
        return ()
    levels = tuple(float(e) for e in np.atleast_1d(np.asarray(eps, dtype=np.float64)))
    if any(not math.isfinite(e) or e < 0 for e in levels):
        raise ValueError(f"eps must hold finite numbers >= 0, got {eps!r}")
    return levels


def _labels(form: Any, X: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Points and labels of fitting shapes; ValueError otherwise."""
    points, shape = np.asarray(X), tuple(form.in_shape)
    if points.ndim != len(shape) + 1 or points.shape[1:] != shape:
        raise ValueError(shape_error("X", points.shape, shape))
    return points, as_labels(y, len(points), int(form.num_outputs))


def _clean(form: Any, points: np.ndarray, labels: np.ndarray) -> float | None:
    """Share of correctly classified points, a tie counting as wrong; None for no points."""
    if not len(points):
        return None
    z = values64(form, points)
    if z.shape[1] == 1:  # its sign decides
        return float(np.mean(np.where(labels == 1, z[:, 0], -z[:, 0]) > 0))
    own = z[np.arange(len(z)), labels]
    others = np.where(np.arange(z.shape[1]) == labels[:, None], -np.inf, z).max(1)
    return float(np.mean(own > others))
