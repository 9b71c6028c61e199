"""Study of forging over a range of c_r: accuracy, diagnosis of every layer, and the claims of the paper.

The claims are those of arXiv 2406.19622 that can be checked on one network. Its tables are made with AutoAttack, which
runs here with `auto=True`: accuracies under PGD and Square bound robust accuracy from above too, but less tightly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lipbounds._text import (
    Html,
    element,
    html_table,
    markdown_table,
    markdown_text,
    reporting,
    say,
    show,
    text_table,
)
from lipbounds.analysis.attack_settings import LINF, AttackSettings
from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.autoattack import autoattack
from lipbounds.analysis.diagnostics import Diagnosis, diagnose
from lipbounds.analysis.experiment import norm_key
from lipbounds.analysis.forge_search import CANDIDATES
from lipbounds.analysis.forging import Forged, Where, forge
from lipbounds.analysis.masking import FAILS, INCONCLUSIVE, PASSES, MaskingChecks, differ, p_value
from lipbounds.analysis.square import square
from lipbounds.results import NORM_NAMES, check_norm

Json = dict[str, Any]
HOLDS, DOES_NOT, OPEN = "holds here", "does not", "open"
LEVEL = 0.05  # of the tests behind verdicts
_NEAR = 0.01  # distance of two inputs around a threshold, as a share of it
OF_A = 0.95  # the paper: the worst lambda_max(A') is about this share of lambda_max(A)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One c_r. Accuracies in [0, 1], those under attack are upper bounds of robust accuracy; `diagnosis` on the data.

    correct, withstood   (N,) classified correctly; and still so after PGD
    withstood_all        (N,) and still so after PGD and AutoAttack; None where that was not run
    zeroed    share of the entries in front of the gates with |x| <= c, mean over the layers; zero: were 0 before
    constant, constant_forged   largest over the layers of max ||W x|| / ||x|| and max ||W f(x)|| / ||x||; attained
    """

    c_r: float
    correct: np.ndarray
    withstood: np.ndarray
    square: float
    diagnosis: Diagnosis
    withstood_all: np.ndarray | None = None

    @property
    def clean(self) -> float:
        """Share of the images that are classified correctly."""
        return float(self.correct.mean())

    @property
    def pgd(self) -> float:
        """Share of the images that withstood PGD."""
        return float(self.withstood.mean())

    @property
    def autoattack(self) -> float | None:
        """Share of the images that withstood PGD and AutoAttack; None where AutoAttack was not run."""
        return None if self.withstood_all is None else float(self.withstood_all.mean())

    @property
    def zeroed(self) -> float:
        """Mean share of the entries that the gates set to zero, over the layers."""
        return float(np.mean([layer.zeroed for layer in self.diagnosis.layers]))

    @property
    def zero(self) -> float:
        """Mean share of the entries that were zero before the gates, over the layers."""
        return float(np.mean([layer.zero for layer in self.diagnosis.layers]))

    @property
    def constant(self) -> float:
        """Largest empirical Lipschitz constant of a layer before forging."""
        return max(layer.constant for layer in self.diagnosis.layers)

    @property
    def constant_forged(self) -> float:
        """Largest empirical Lipschitz constant of a layer after forging."""
        return max(layer.constant_forged for layer in self.diagnosis.layers)

    def to_json(self) -> Json:
        """The record as JSON values."""
        names = (
            "c_r",
            "clean",
            "pgd",
            "square",
            "autoattack",
            "zeroed",
            "zero",
            "constant",
            "constant_forged",
        )
        return {name: getattr(self, name) for name in names} | {"diagnosis": self.diagnosis.to_json()}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper: "holds here", "does not" or "open" (not tried, or within chance), and the figures."""

    claim: str
    verdict: str
    figures: str


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """rows: one per c_r, ascending; forged: the network with its tracked peaks; settings: plain data."""

    rows: tuple[Row, ...]
    forged: Forged
    settings: Json

    def _table(self) -> tuple[list[str], list[list[str]], tuple[int, ...]]:
        auto = [] if self.rows[0].autoattack is None else ["AutoAttack"]
        header = ["c_r", "clean", "PGD", "Square", *auto, "zeroed", "max |Wx|/|x| >=", "max |Wf(x)|/|x| >="]
        rows = []
        for row in self.rows:
            measured = (row.clean, row.pgd, row.square, row.autoattack)
            shares = [f"{100 * share:.2f} %" for share in measured if share is not None]
            constants = [show(value, "down") for value in (row.constant, row.constant_forged)]
            rows.append([power_of_two(row.c_r), *shares, f"{100 * row.zeroed:.1f} %", *constants])
        return header, rows, tuple(range(len(header)))

    def _headline(self) -> str:
        s = self.settings
        return (
            f"{s['kind']} gates in front of {len(self.forged.sites)} layers, {s['images']} images; under attack at eps "
            f"{show(s['eps'])} in {NORM_NAMES[check_norm(s['norm'])]}, upper bounds of robust accuracy"
        )

    def __repr__(self) -> str:
        return f"Study: {self._headline()}\n{text_table(*self._table())}"

    def _repr_html_(self) -> Html:
        return element("div", element("b", "Study"), f": {self._headline()}", html_table(*self._table()))

    def _repr_markdown_(self) -> str:
        return f"**Study**: {markdown_text(self._headline())}\n\n{markdown_table(*self._table())}"

    def to_json(self) -> Json:
        """The record as JSON values."""
        return {"settings": self.settings, "rows": [row.to_json() for row in self.rows]}


def power_of_two(c_r: float) -> str:
    """C_r as a power of two where it is one, else as a decimal."""
    power = math.log2(c_r) if c_r > 0 else 0.5
    return f"2^{power:.0f}" if power == round(power) else show(c_r)


def study(
    model: nnx.Module,
    x: Any,
    y: Any,
    *,
    data: Any,
    candidates: Sequence[float] = CANDIDATES,
    eps: float,
    settings: AttackSettings = LINF,
    steps: int = 40,
    restarts: int = 1,
    queries: int = 500,
    auto: bool = False,
    kind: str = "hard",
    tau: float = 0.1,
    where: Where = None,
    quantile: float = 1.0,
    examples: int = 256,
    **changes: Any,
) -> Study:
    """Forge with every candidate c_r (tracked once, compiled once), attack, and diagnose.

    Args:
        model: an nnx module in evaluation mode, batch -> logits; not changed.
        x, y: (N, *shape) images in [low, high] and (N,) labels, which are attacked and diagnosed.
        data: what the thresholds are tracked on, as in `forge`; the training images in the paper.
        candidates: values of c_r in [0, 1); 0, the network itself, is added.
        eps, settings, steps, restarts, queries: of `pgd` and `square`; `settings` are in norm inf if nothing else is
            said, and their batch size, seed and progress are those of the whole study.
        auto: whether to run AutoAttack, too, at every c_r: it needs 4 classes or more, and takes long.
        kind, tau, where, quantile: of `forge`.
        examples: of `diagnose`, for eigenvalues and discs.
        **changes: fields of `settings` by name.

    A c_r that is picked from this table was chosen on these images: `search_c_r` does that on others.
    Raises as `forge`, `pgd`, `square` and `diagnose` do.
    """
    settings = AttackSettings.changed(settings, changes)
    size, seed = settings.batch_size, settings.seed
    quiet = dataclasses.replace(settings, progress=None)
    gates: Json = {"kind": kind, "tau": tau, "quantile": quantile}
    forged = forge(model, data, 0.0, where=where, batch_size=size, progress=settings.progress, **gates)
    rows = []
    with reporting(settings.progress):
        for c in sorted({0.0, *(float(c) for c in candidates)}):
            network = forged.with_c_r(c, keep=True)
            white = pgd(network, x, y, eps, quiet, steps=steps, restarts=restarts)
            black = square(network, x, y, eps, quiet, queries=queries)
            found = diagnose(network, np.asarray(x), examples=examples, seed=seed, batch_size=size)
            left = white.correct & ~white.success
            all_left = left & ~autoattack(network, x, y, eps, quiet).success if auto else None
            rows.append(Row(c, white.correct, left, black.accuracy, found, all_left))
            say(f"c_r {power_of_two(c)}: {rows[-1].clean:.2%} clean, {rows[-1].pgd:.2%} under PGD")
    record = {
        "images": len(np.asarray(y)),
        "eps": float(eps),
        "norm": norm_key(settings.norm),
        "steps": steps,
        "restarts": restarts,
        "queries": queries,
        "auto": auto,
        **gates,
        "examples": examples,
        "seed": seed,
        "layers": [site.path for site in forged.sites],
        "peaks": forged.peaks,
    }
    return Study(tuple(rows), forged, record)


def claims(found: Study, checks: MaskingChecks | None = None) -> tuple[Claim, ...]:
    """The paper's claims against one study, and against the checks for gradient masking of one of its networks."""
    plain, *others = found.rows
    if not others:
        raise ValueError("the study holds c_r = 0 only: there is nothing to compare")
    return (
        Claim("forging raises robust accuracy (4.2.3; here under PGD)", *_rises(plain, others, "withstood")),
        Claim("forging raises standard accuracy (4.2.3)", *_rises(plain, others, "correct")),
        *_claims_on_layers(others, _across(found.forged.with_c_r(others[-1].c_r), others[-1].diagnosis)),
        *(() if checks is None else _claims_on_masking(checks)),
        Claim(
            "forging raises robust accuracy under AutoAttack (tables 1 to 5)",
            *_under_autoattack(plain, others),
        ),
    )


def _listed(rows: Sequence[Row], values: Sequence[str]) -> str:
    return ", ".join(f"{power_of_two(row.c_r)}: {v}" for row, v in zip(rows, values, strict=True))


def _rises(plain: Row, others: Sequence[Row], name: str) -> tuple[str, str]:
    """Whether more images are in `name` than without gates, by the exact McNemar test, split over the c_r."""
    pairs = [differ(getattr(row, name), getattr(plain, name)) for row in others]
    points = [100 * (won - lost) / len(plain.correct) for won, lost in pairs]
    least = min(p_value(pair) for pair in pairs)
    verdict = DOES_NOT if max(points) <= 0 else HOLDS if least < LEVEL / len(others) else OPEN
    why = ", within chance" if verdict == OPEN else ""
    return verdict, f"{_listed(others, [f'{p:+.2f}' for p in points])} points (smallest p {least:.2g}{why})"


def _under_autoattack(plain: Row, others: Sequence[Row]) -> tuple[str, str]:
    """As `_rises`, with what PGD leaves standing that AutoAttack breaks: if that grows, so does what PGD misses."""
    if plain.autoattack is None:
        return OPEN, "AutoAttack was not run: study(auto=True), lipbounds forge --attack"
    verdict, figures = _rises(plain, others, "withstood_all")
    missed = [f"{100 * (row.pgd - float(row.autoattack or 0.0)):.2f}" for row in (plain, *others)]
    return verdict, f"{figures}; PGD less AutoAttack {_listed((plain, *others), missed)} points"


def _claims_on_layers(others: Sequence[Row], across: tuple[str, float, float]) -> list[Claim]:
    """The paper's claims about eigenvalues, discs and constants; `across` as `_across` measures it."""
    layers = [layer for row in others for layer in row.diagnosis.layers]
    place, quotient, norm = across
    # a disc of A (columns): of a kept column it is the same in A', as no entry of that column changes
    kept = max((layer.columns_forged / layer.disc).max() for layer in layers if layer.disc)
    worst = [max(layer.ratios.max() for layer in row.diagnosis.layers) for row in others]
    support = max(layer.support_ratios.max() for layer in layers)
    fallen = sum(layer.constant_forged < layer.constant for layer in layers)
    smaller = all(layer.worst <= layer.eigenvalue * (1 + 1e-9 + layer.residual) for layer in layers)
    discs = all(max(one.rows_forged.max(), one.columns_forged.max()) <= one.disc for one in layers)
    shares = [f"{100 * row.zeroed:.0f} % ({100 * row.zero:.0f} % before)" for row in others]
    return [
        Claim(
            "lambda_max(A') <= lambda_max(A) (Lemma 2)",
            _verdict(smaller),
            f"on {sum(len(layer.ratios) for layer in layers)} inputs of layers, largest ratio {100 * max(worst):.2f} %",
        ),
        Claim(
            "the radii of all discs shrink (proof of Lemma 2)",
            _verdict(kept == 0.0),
            f"the discs of kept columns are those of A: largest disc bound of A' by column {100 * kept:.2f} % of A's",
        ),
        Claim(
            "the disc bound is no larger (proof of Lemma 2)", _verdict(discs), "by row and column, all inputs"
        ),
        Claim(
            f"the worst lambda_max(A') is about {100 * OF_A:.0f} % of lambda_max(A) (appendix C)",
            _verdict(any(abs(w - OF_A) <= 0.02 for w in worst)),
            f"{_listed(others, [f'{100 * w:.2f} %' for w in worst])}; zeros that were there before leave at most "
            f"{100 * support:.2f} %",
        ),
        Claim(
            "the empirical constant falls (3.3)",
            _verdict(fallen == len(layers)),
            f"max |Wf(x)|/|x| is below max |Wx|/|x| in {fallen} of {len(layers)} layers and c_r",
        ),
        Claim(
            "the gates themselves zero another fifth of the entries (appendix C)",
            _verdict(max(row.zeroed - row.zero for row in others) >= 0.2),
            _listed(others, shares),
        ),
        Claim(
            "the forged layer amplifies differences less (eq. 4 with the above)",
            _verdict(quotient <= norm),
            f"{place}: |W f(x) - W f(y)| / |x - y| of two inputs on either side of the threshold, {_NEAR:g} of it "
            f"apart, is {show(quotient, 'down')}, ||W||_2 at most {show(norm, 'up')}",
        ),
    ]


def _claims_on_masking(checks: MaskingChecks) -> list[Claim]:
    said = {PASSES: HOLDS, INCONCLUSIVE: OPEN, FAILS: DOES_NOT}
    verdicts = [c.verdict for c in checks]
    worst = next(v for v in (FAILS, INCONCLUSIVE, PASSES) if v in verdicts)
    across, smoothed = checks["transfer from the original"], checks["smoothed certificates"]
    more = across.figures.get("transfer", 0.0) > across.figures.get("original_white_box", 0.0)
    return [
        Claim(
            "gradients are not masked (4.2.4)",
            said[worst],
            "; ".join(f"{c.name}: {c.verdict}" for c in checks),
        ),
        Claim(
            "the original's adversarial examples are withstood more often than by the original (table 7)",
            _verdict(more) if across.figures else OPEN,
            across.text,
        ),
        Claim("smoothed certificates do not suffer (figure 3)", said[smoothed.verdict], smoothed.text),
    ]


def _across(forged: Forged, diagnosis: Diagnosis) -> tuple[str, float, float]:
    """(layer, |W f(x) - W f(y)| / |x - y|, bound of ||W||_2), attained in float32.

    x and y lie on either side of the first gate's threshold, along one input entry.
    """
    layer = diagnosis.layers[0]
    gated = forged.gates[layer.path]
    c, shape = layer.threshold, layer.shape[0]
    points = np.zeros((2, int(np.prod(shape))), np.float32)
    points[:, points.shape[1] // 2] = c * (1 - _NEAR / 2), c * (1 + _NEAR / 2)
    images = np.asarray(gated(jnp.asarray(points.reshape(2, *shape))), np.float64)
    distance = float(points[1].max()) - float(points[0].max())
    quotient = float(np.linalg.norm(images[1] - images[0])) / distance
    return layer.path, quotient, math.sqrt(layer.eigenvalue_bound)


def _verdict(holds: Any) -> str:
    return HOLDS if bool(holds) else DOES_NOT


def claims_table(rows: Sequence[Claim]) -> str:
    """The claims as text."""
    return text_table(("claim", "verdict", "figures"), [(c.claim, c.verdict, c.figures) for c in rows])
