"""Choice of the threshold: accuracy of a forged network for a range of c_r, on a validation set.

The network is tracked once and compiled once. Every candidate is the same program with other thresholds, and c_r = 0
is the network itself. (arXiv 2406.19622, appendix A.1, does this with AutoAttack; here the
attack is PGD.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from lipbounds._text import Html, html_table, markdown_table, reporting, say, show, text_table, usual_settings
from lipbounds.analysis.attack_settings import LINF, AttackSettings
from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.forging import Forged, Where, forge
from lipbounds.results import NORM_NAMES

CANDIDATES = (0.0, *(2.0**-k for k in range(8, 3, -1)))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Accuracies in [0, 1] at one c_r; `attacked` (under PGD, an upper bound of the robust one) is None without eps."""

    c_r: float
    clean: float
    attacked: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """Accuracies of a network forged with several c_r on the same examples.

    rows    one per candidate, c_r ascending
    forged  the network at `best.c_r`, with the tracked peaks of all layers
    kind    of the gates
    images  number of examples
    eps, norm, steps  of PGD; eps None: no attack
    """

    rows: tuple[Candidate, ...]
    forged: Forged
    kind: str
    images: int
    eps: float | None
    norm: float
    steps: int

    @property
    def best(self) -> Candidate:
        """The highest accuracy under PGD, without eps the highest clean one; of equal ones the smallest c_r.

        It was chosen on these examples, so its accuracy on them is biased upwards: report it on others.
        """
        return max(self.rows, key=lambda row: (row.clean if row.attacked is None else row.attacked, -row.c_r))

    def _table(self) -> tuple[list[str], list[list[str]], tuple[int, ...]]:
        header = ["c_r", "clean accuracy"]
        if self.eps is not None:
            header.append("accuracy under PGD (upper bound of robust)")
        best = self.best
        rows = []
        for row in self.rows:
            power = math.log2(row.c_r) if row.c_r else 0.0
            name = f"2^{power:.0f}" if power and power == round(power) else show(row.c_r)
            cells = [name, f"{row.clean:.2%}"]
            if row.attacked is not None:
                cells.append(f"{row.attacked:.2%}")
            rows.append([*cells, "best" if row is best else ""])
        return [*header, ""], rows, tuple(range(len(header)))

    def __repr__(self) -> str:
        attack = ""
        if self.eps is not None:
            attack = f", PGD {NORM_NAMES[self.norm]} eps {show(self.eps)}, {self.steps} steps"
        return f"Search: {self.kind} gates, {self.images} examples{attack}\n{text_table(*self._table())}"

    def _repr_markdown_(self) -> str:
        return markdown_table(*self._table())

    def _repr_html_(self) -> Html:
        return html_table(*self._table())


@usual_settings()
def search_c_r(
    model: nnx.Module,
    x: Any,
    y: Any,
    candidates: Sequence[float] = CANDIDATES,
    *,
    data: Any = None,
    eps: float | None = None,
    settings: AttackSettings = LINF,
    steps: int = 20,
    kind: str = "hard",
    tau: float = 0.1,
    where: Where = None,
    quantile: float = 1.0,
    **changes: Any,
) -> Search:
    """Clean accuracy, and with eps accuracy under PGD, of the forged network for every candidate c_r.

    Args:
        model: an nnx module in evaluation mode, batch -> logits. It is not changed.
        x, y: the validation set, (N, *shape) in [low, high] and (N,) integer labels.
        candidates: values of c_r in [0, 1), each once.
        data: what is tracked, as in `forge`; None for x.
        eps, settings, steps: of `attacks.pgd`, in norm inf if nothing else is said; eps None for clean accuracy only.
            A tie of two logits counts as misclassified.
        kind, tau, where, quantile: of `forge`.
        **changes: fields of `settings` by name.

    PGD through hard gates only sees the slopes between the jumps; `masking` checks how reliable its accuracy is.

    Raises ValueError and TypeError as `forge` and `pgd` do, and for candidates that are repeated or missing.
    """
    values = sorted(float(c) for c in np.atleast_1d(np.asarray(candidates, dtype=np.float64)))
    if not values or len(set(values)) < len(values) or not all(0 <= c < 1 for c in values):
        raise ValueError(f"candidates must be different numbers in [0, 1), at least one, got {candidates!r}")
    settings = AttackSettings.changed(settings, changes)
    quiet = dataclasses.replace(settings, progress=None)
    if eps is not None and not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a number > 0, or None for clean accuracy only, got {eps!r}")
    forged = forge(
        model,
        x if data is None else data,
        0.0,
        kind=kind,
        tau=tau,
        where=where,
        quantile=quantile,
        batch_size=settings.batch_size,
        progress=settings.progress,
    )
    ball, number = (0.0, 0) if eps is None else (float(eps), steps)
    rows = []
    with reporting(settings.progress):
        for c in values:
            network = forged.with_c_r(c, keep=True)
            attack = pgd(network, x, y, ball, quiet, steps=number)
            row = Candidate(c, float(attack.correct.mean()), None if eps is None else attack.accuracy)
            rows.append(row)
            under = "" if row.attacked is None else f", {row.attacked:.2%} under PGD"
            say(f"c_r {show(c)}: {row.clean:.2%} correct{under}")
    search = Search(tuple(rows), forged, kind, len(attack), eps, settings.norm, number)
    return dataclasses.replace(search, forged=forged.with_c_r(search.best.c_r))
