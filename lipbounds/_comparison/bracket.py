"""A lower and an upper bound of one constant, side by side and checked against each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipbounds._empirical.empirical import empirical
from lipbounds._form.lure import LureForm, check_network
from lipbounds._text.calls import public
from lipbounds._text.progress import Progress
from lipbounds._text.tables import new_axes, printable, show
from lipbounds._triangle.liplt import or_naive
from lipbounds.errors import GuaranteeError
from lipbounds.results import NORM_NAMES, Guarantee, LowerBound, Norm, UpperBound, check_norm


@dataclass(frozen=True)
class Bracket:
    """lower.value <= L <= upper.value; `ratio` = upper / lower (0 / 0 is 1)."""

    lower: LowerBound
    upper: UpperBound

    def __post_init__(self) -> None:
        if not isinstance(self.lower, LowerBound) or not isinstance(self.upper, UpperBound):
            raise TypeError(
                f"a bracket is a LowerBound and an UpperBound, "
                f"got {type(self.lower).__name__} and {type(self.upper).__name__}"
            )
        check_order(self.lower, self.upper)

    @property
    def ratio(self) -> float:
        if self.lower.value == 0.0:
            return 1.0 if self.upper.value == 0.0 else math.inf
        return self.upper.value / self.lower.value

    def __repr__(self) -> str:
        low, high = show(self.lower.value, "down"), show(self.upper.value, "up")
        norm, ratio = NORM_NAMES[self.upper.norm], show(self.ratio, "up", 4)
        return (
            f"Bracket: {low} <= L <= {high}  ({norm}, ratio {ratio})\n"
            f"  lower  {printable(self.lower.method)}\n"
            f"  upper  {printable(self.upper.method)}, {self.upper.guarantee}"
        )

    def plot(self, ax: Any = None) -> Any:
        """The interval as a bar; returns the matplotlib Axes."""
        ax = new_axes(height=2.0) if ax is None else ax
        ax.barh([0], [self.upper.value - self.lower.value], left=[self.lower.value], color="#4477aa")
        ax.set(yticks=[], xlabel=f"L ({NORM_NAMES[self.upper.norm]})", title=repr(self).splitlines()[0])
        return ax


def check_order(lower: LowerBound, upper: UpperBound) -> None:
    """GuaranteeError if an attained slope (or a pair's) exceeds the bound; ValueError if norms differ."""
    if lower.norm != upper.norm:
        a, b = NORM_NAMES[lower.norm], NORM_NAMES[upper.norm]
        raise ValueError(f"a lower bound in {a} and an upper bound in {b} cannot be compared")
    clash = ""
    if lower.value > upper.value:
        clash = f"L >= {lower.value!r} but {upper.method} says L <= {upper.value!r}"
    elif lower.pairwise is not None and upper.pairwise is not None:
        if lower.pairwise.shape != upper.pairwise.shape:
            outputs = f"{len(lower.pairwise)} and {len(upper.pairwise)}"
            raise ValueError(f"pairs of networks with {outputs} outputs cannot be compared")
        above = np.argwhere(lower.pairwise > upper.pairwise)
        if len(above):
            i, j = (int(c) for c in above[0])
            low, high = float(lower.pairwise[i, j]), float(upper.pairwise[i, j])
            clash = f"L_{i},{j} >= {low!r} but {upper.method} says L_{i},{j} <= {high!r}"
    if clash:
        cause = (
            "the slopes declared for a registered activation are false"
            if upper.guarantee == "assumed"
            else "this is a bug of lipbounds, please report it"
        )
        raise GuaranteeError(f"{clash} ({upper.guarantee}), and both cannot hold: {cause}")


@public
def bracket(
    form: Any,
    X: Any = None,
    *,
    norm: Norm = 2,
    pairwise: bool = False,
    guarantee: Guarantee = "auto",
    seed: int = 0,
    upper: UpperBound | None = None,
    progress: Progress = True,
) -> Bracket:
    """A lower and an upper bound of L together, and their ratio: lower.value <= L <= upper.value.

    Args:
        form: from `lb.trace` or `lb.from_weights`.
        X: points for the lower bound, which is `lb.empirical(form, X)`.
        norm, pairwise, guarantee, seed: as in `lb.liplt` (guarantee: "auto", "verified", "probabilistic", "estimate").
        upper: the upper bound, whose norm is used then; None is `lb.liplt(form)`, where that fails `lb.naive(form)`
            with a note.
        progress: True shows on stderr what takes long, False nothing; a function gets every line of text.

    Raises:
        TypeError: `upper` is no UpperBound.
        ValueError: guarantee="estimate", which bounds nothing, or an `upper` of another network; and as `lb.empirical`
            and `lb.liplt`.
        GuaranteeError: the lower bound exceeds the upper one.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> both = lb.bracket(form, upper=lb.lipsdp(form))
        >>> round(both.lower.value, 3), round(both.upper.value, 3), round(both.ratio, 3)
        (2.0, 2.0, 1.0)
    """
    if guarantee == "estimate":
        raise ValueError("a bracket needs a bound: guarantee='estimate' gives none")
    options: dict[str, Any] = {"pairwise": pairwise, "seed": seed}
    made = or_naive(form, norm=check_norm(norm), guarantee=guarantee, **options) if upper is None else upper
    if not isinstance(made, UpperBound):
        raise TypeError(f"a bracket needs an UpperBound, got {type(made).__name__}")
    if isinstance(form, LureForm):
        check_network(form, made.network, f"the result of {made.method}")
    return Bracket(empirical(form, X, norm=made.norm, **options), made)
