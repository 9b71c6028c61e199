"""Checks for gradient masking: whether a network only seems robust because its gradients mislead attacks.

The five checks of arXiv 2406.19622, section 4.2.4 (after Athalye, Carlini, Wagner, "Obfuscated gradients give a false
sense of security", ICML 2018, and Carlini et al., "On evaluating adversarial robustness", 2019):

1. an attack by gradients (PGD) breaks at least as many images as those by queries alone: Square, from logits, and in
   l-inf RayS, from labels;
2. an attack in many steps (PGD) breaks at least as many as one in a single step (FGSM), at every radius;
3. the accuracy under attack never rises with the radius, and falls to 0 at the whole box;
4. examples made on the original network break no more images than those made on the network itself;
5. the smoothed network is certified at no fewer images than the smoothed original (randomized smoothing).

With `auto`, a sixth: AutoAttack (several losses, targets, and Square at 5000 queries) breaks no more images than PGD
does. It fails where PGD is too weak for this network, whether or not its gradients are masked.

Every comparison is of two outcomes on the same images, decided by the exact McNemar test: of the images on which they
differ, b against the expectation and c for it, b is distributed as Binomial(b + c, 1/2) or lies below that where the
expectation holds. A check "passes" where b <= c in every comparison, "fails" where b > c and the one-sided p-value is
below the level, split evenly over the comparisons of the check, and is "inconclusive" in between and where there is
nothing to compare.

Accuracies under attack are upper bounds of robust accuracy. A check that passes shows no sign of masking, but is no
proof that there is none; none of the five checks proves robustness.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from lipbounds._text import (
    Html,
    element,
    html_table,
    markdown_table,
    markdown_text,
    printable,
    show,
    text_table,
    usual_settings,
    whole,
)
from lipbounds.analysis.attack_search import Attack
from lipbounds.analysis.attack_settings import LINF, AttackSettings
from lipbounds.analysis.attacks import fgsm, pgd
from lipbounds.analysis.autoattack import AutoAttack, autoattack
from lipbounds.analysis.experiment import norm_key
from lipbounds.analysis.rays import rays
from lipbounds.analysis.smoothing import Smoothed, clopper_pearson_lower, smooth
from lipbounds.analysis.square import square
from lipbounds.results import NORM_NAMES, check_norm

PASSES, FAILS, INCONCLUSIVE = "passes", "fails", "inconclusive"
_HEADER = ("check", "verdict", "images", "figures", "reason")
_RIGHT = (2,)
_LEFT_OVER = 0.01  # share of the images that may withstand the attack on the whole box
_FEWEST = 10  # images, below which nothing is concluded
_NO_ORIGINAL = "no original network was given: there is nothing to compare with"


@dataclasses.dataclass(frozen=True)
class Check:
    """One check: its verdict ("passes", "fails" or "inconclusive"), why, the figures behind it, the images they are of.

    `figures` is plain data: shares in [0, 1], counts of images, p-values, lists in the order of the grid of radii.
    `text` presents them as a sentence.
    """

    name: str
    verdict: str
    reason: str
    images: int
    text: str
    figures: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MaskingChecks:
    """The checks of `gradient_masking`; iterate, index by position or by name.

    settings   plain data: eps, norm, grid, steps, restarts, queries, loss, sigma, samples, alpha, level, auto, seed
    """

    checks: tuple[Check, ...]
    settings: Mapping[str, Any]

    def __iter__(self) -> Iterator[Check]:
        return iter(self.checks)

    def __len__(self) -> int:
        return len(self.checks)

    def __getitem__(self, which: int | str) -> Check:
        if not isinstance(which, str):
            return self.checks[which]
        for check in self.checks:
            if check.name == which:
                return check
        raise KeyError(f"no check {which!r}; there are {', '.join(check.name for check in self.checks)}")

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that fail."""
        return tuple(check.name for check in self.checks if check.verdict == FAILS)

    def _headline(self) -> str:
        count = {v: sum(c.verdict == v for c in self.checks) for v in (PASSES, FAILS, INCONCLUSIVE)}
        at = f"eps {show(self.settings['eps'])} in {NORM_NAMES[check_norm(self.settings['norm'])]}"
        return (
            f"{count[PASSES]} pass, {count[FAILS]} fail, {count[INCONCLUSIVE]} inconclusive "
            f"({at}, level {self.settings['level']:g})"
        )

    def _rows(self) -> list[list[str]]:
        return [[c.name, c.verdict, str(c.images), c.text, c.reason] for c in self.checks]

    def __repr__(self) -> str:
        table = text_table(_HEADER[:3], [row[:3] for row in self._rows()], _RIGHT)
        lines = [printable(f"{c.name}: {'; '.join(filter(None, (c.text, c.reason)))}") for c in self.checks]
        return "\n".join([f"MaskingChecks: {self._headline()}", table, *lines])

    def _repr_html_(self) -> Html:
        table = html_table(_HEADER, self._rows(), _RIGHT)
        return element("div", element("b", "MaskingChecks"), f": {self._headline()}", table)

    def _repr_markdown_(self) -> str:
        table = markdown_table(_HEADER, self._rows(), _RIGHT)
        return f"**MaskingChecks**: {markdown_text(self._headline())}\n\n{table}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return {
            "settings": dict(self.settings),
            "checks": [dataclasses.asdict(c) | {"figures": dict(c.figures)} for c in self.checks],
        }


@usual_settings()
def gradient_masking(
    model: Any,
    original: Any,
    x: Any,
    y: Any,
    *,
    eps: float,
    settings: AttackSettings = LINF,
    grid: Sequence[float] | None = None,
    steps: int = 40,
    restarts: int = 5,
    queries: int = 1000,
    loss: str = "margin",
    sigma: float = 0.12,
    samples: int = 1000,
    alpha: float = 0.001,
    level: float = 0.05,
    auto: bool = False,
    **changes: Any,
) -> MaskingChecks:
    """Run the five checks on a network, and on the one that it was made from.

    Args:
        model: batch (B, *shape) -> logits (B, K), an nnx module in evaluation mode or any other function.
        original: the same of the network before it was changed; None leaves checks 4 and 5 inconclusive.
        x: (N, *shape) floating point in the box [low, high]; images (N, H, W, C) or vectors (N, d).
        y: (N,) integer labels. Only images that are classified correctly are counted, except in check 5.
        eps: radius of checks 1 and 4, in the units of x.
        settings: of the attacks, in norm inf if nothing else is said. Smoothing is in norm 2 always.
        grid: radii of checks 2 and 3; None is eps/4, eps/2, eps, and so on. The whole box is added as the last one.
        steps, restarts, loss: of PGD; FGSM takes the same loss. With one restart, PGD from clipped or saturated pixels
            can get stuck where Square does not, without anything being masked.
        queries: of Square and of RayS, each.
        sigma, samples, alpha: of check 5: noise, deciding samples per image (100 choose the class), and the probability
            that the certificate of one image is false.
        level: of the tests, in (0, 1): a check fails by chance with at most this probability.
        auto: whether to run AutoAttack, too, for a sixth check: it needs 4 classes or more, and takes long.
        **changes: fields of `settings` by name.

    Raises:
        TypeError: a network is not callable.
        ValueError: as `pgd`, `square` and `smooth`; eps that is not a number > 0; a grid or level out of range.
    """
    settings = AttackSettings.changed(settings, changes)
    if not (isinstance(eps, int | float | np.number) and math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be one number > 0, got {eps!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    whole("queries", queries)
    eps = float(eps)
    radii = _grid(grid, eps, settings.diameter(np.shape(x)[1:]))
    ascent: dict[str, Any] = {"steps": steps, "restarts": restarts, "loss": loss}
    noise = {name: getattr(settings, name) for name in ("seed", "batch_size", "progress")}
    white = pgd(model, x, y, eps, settings, **ascent)
    strong = [autoattack(model, x, y, eps, settings)] if auto else []
    networks = [fn for fn in (model, original) if fn is not None]
    smoothed = [smooth(fn, x, sigma, n=samples, alpha=alpha, y=y, **noise) for fn in networks]
    black = {"Square": square(model, x, y, eps, settings, queries=queries)}
    if settings.norm == math.inf:
        black["RayS"] = rays(model, x, y, eps, settings, queries=queries)
    many = [white if r == eps else pgd(model, x, y, r, settings, **ascent) for r in radii]
    single = [fgsm(model, x, y, r, settings, loss=loss) for r in radii]
    transferred = None if original is None else pgd(original, x, y, eps, settings, **ascent)
    checks = (
        _white_and_black(white, black, level),
        _steps(many, single, radii, level),
        _falls(many, radii, level),
        _transfer(model, white, transferred, y, settings, level),
        _certificates(smoothed, sigma, level),
        *(_strength(white, attack, level) for attack in strong),
    )
    record = {
        "eps": eps,
        "norm": norm_key(settings.norm),
        "grid": radii,
        **ascent,
        "queries": queries,
        "sigma": float(sigma),
        "samples": samples,
        "alpha": alpha,
        "level": level,
        "auto": auto,
        "seed": settings.seed,
    }
    return MaskingChecks(checks, record)


# --------------------------------------------------------------------------------------------------- the five checks
def _white_and_black(white: Attack, black: Mapping[str, Attack], level: float) -> Check:
    pairs = {name: differ(attack.success, white.success) for name, attack in black.items()}
    figures: dict[str, Any] = {"pgd": white.accuracy}
    for name, attack in black.items():
        figures |= {name.lower(): attack.accuracy, f"only_{name.lower()}": [pairs[name][0]]}
    figures |= {
        "only_pgd": [c for _, c in pairs.values()],
        "p_value": [p_value(pair) for pair in pairs.values()],
    }
    under = "; ".join(
        f"under {name} {attack.accuracy:.1%} (only PGD breaks {pairs[name][1]}, only {name} {pairs[name][0]})"
        for name, attack in black.items()
    )
    worst = min(pairs, key=lambda name: p_value(pairs[name]) if pairs[name][0] > pairs[name][1] else 2.0)
    at, any_broken = int(white.correct.sum()), any(a.success.any() for a in (white, *black.values()))
    verdict, reason = _decide(
        list(pairs.values()), at, level / len(pairs), f"{worst} breaks what PGD does not", any_broken
    )
    text = f"accuracy under PGD {white.accuracy:.1%}; {under}"
    return Check("white-box beats black-box", verdict, reason, at, text, figures)


def _strength(white: Attack, strong: AutoAttack, level: float) -> Check:
    pair = differ(strong.success, white.success)
    figures = {"pgd": white.accuracy, "autoattack": strong.columns, **_tests([pair], "autoattack", "pgd")}
    text = (
        f"accuracy under PGD {white.accuracy:.1%}, under AutoAttack {strong.accuracy:.1%}; "
        f"only PGD breaks {pair[1]}, only AutoAttack {pair[0]}"
    )
    at, any_broken = int(white.correct.sum()), bool((white.success | strong.success).any())
    verdict, reason = _decide([pair], at, level, "AutoAttack breaks what PGD does not", any_broken)
    return Check("PGD as strong as AutoAttack", verdict, reason, at, text, figures)


def _steps(many: list[Attack], single: list[Attack], radii: list[float], level: float) -> Check:
    pairs = [differ(one.success, more.success) for one, more in zip(single, many, strict=True)]
    accuracy = {"pgd": [a.accuracy for a in many], "fgsm": [a.accuracy for a in single]}
    figures = {"eps": radii, **accuracy, **_tests(pairs, "fgsm", "pgd")}
    columns = zip(radii, accuracy["pgd"], accuracy["fgsm"], strict=True)
    shares = ", ".join(f"{show(r, digits=3)}: {a:.1%} / {b:.1%}" for r, a, b in columns)
    at, any_broken = int(many[0].correct.sum()), any(a.success.any() for a in [*many, *single])
    verdict, reason = _decide(pairs, at, level / len(pairs), "FGSM breaks what PGD does not", any_broken)
    text = f"accuracy under PGD / FGSM at {shares}"
    return Check("iterative beats one-step", verdict, reason, at, text, figures)


def _falls(many: list[Attack], radii: list[float], level: float) -> Check:
    # every point of a smaller ball lies in the larger one: what it broke, the larger should have broken too
    pairs = [differ(a.success, b.success) for a, b in itertools.pairwise(many)]
    at, left = int(many[0].correct.sum()), int((many[0].correct & ~many[-1].success).sum())
    share = level / (len(pairs) + 1)
    least = float(clopper_pearson_lower(np.asarray(left), max(at, 1), share))
    figures = {
        "eps": radii,
        "pgd": [a.accuracy for a in many],
        **_tests(pairs, "smaller_radius", "larger_radius"),
        "left_at_the_whole_box": left,
        "left_share_lower_bound": least,
    }
    text = f"accuracy under PGD at the whole box, {show(radii[-1], digits=3)}: {many[-1].accuracy:.1%}, {left} images"
    verdict, reason = _decide(pairs, at, share, "a larger radius does not break what a smaller one does")
    if at >= _FEWEST and left > _LEFT_OVER * at:
        why = f"{left} of {at} images withstand PGD on the whole box, where {_LEFT_OVER:.0%} may"
        if least > _LEFT_OVER:
            verdict, reason = FAILS, f"{why}; {reason}" if reason else why
        elif verdict == PASSES:
            verdict, reason = INCONCLUSIVE, f"{why}: too few to tell from chance"
    return Check("accuracy falls to 0", verdict, reason, at, text, figures)


def _transfer(
    model: Any, white: Attack, made: Attack | None, y: Any, settings: AttackSettings, level: float
) -> Check:
    name = "transfer from the original"
    if made is None:
        return Check(name, INCONCLUSIVE, _NO_ORIGINAL, 0, "", {})
    both = white.correct & made.correct
    own = both & white.success
    crossed = both & ~pgd(model, made.adversarial, y, 0.0, settings, steps=0).correct
    at, pair = int(both.sum()), differ(crossed, own)
    kept = {
        key: 1 - int((both & broken).sum()) / max(at, 1)
        for key, broken in (("white_box", own), ("transfer", crossed), ("original_white_box", made.success))
    }
    text = (
        f"of images that both classify: {kept['transfer']:.1%} withstand the original's examples, "
        f"{kept['white_box']:.1%} the network's own; the original keeps {kept['original_white_box']:.1%}"
    )
    what = "the original's examples break what the network's own do not"
    verdict, reason = _decide([pair], at, level, what, bool((crossed | own).any()))
    return Check(name, verdict, reason, at, text, kept | _tests([pair], "transfer", "white_box"))


def _certificates(smoothed: list[Smoothed], sigma: float, level: float) -> Check:
    name, at = "smoothed certificates", len(smoothed[0])
    radii = [0.0, float(sigma), 2 * float(sigma)]
    figures: dict[str, Any] = {"radius_l2": radii, "guarantee": smoothed[0].guarantee}
    parts = []
    for key, found in zip(("model", "original"), smoothed, strict=False):
        shares, abstained = [found.accuracy(r) for r in radii], int(found.abstained.sum())
        figures[key] = {"certified": shares, "abstained": abstained}
        parts.append(f"{key} {', '.join(f'{a:.1%}' for a in shares)} ({abstained} abstained)")
    text = (
        f"certified once smoothed, l2 radii {', '.join(show(r, digits=3) for r in radii)}: {'; '.join(parts)}"
    )
    if len(smoothed) == 1:
        return Check(name, INCONCLUSIVE, _NO_ORIGINAL, at, text, figures)
    ours, theirs = smoothed
    pairs = [differ(theirs.certified(r), ours.certified(r)) for r in radii]
    any_certified = bool((ours.certified(0.0) | theirs.certified(0.0)).any())
    what = "the smoothed original is certified where the smoothed network is not"
    verdict, reason = _decide(pairs, at, level / len(pairs), what, any_certified)
    return Check(name, verdict, reason, at, text, figures | _tests(pairs, "original", "model"))


# -------------------------------------------------------------------------------------------------------- statistics
def differ(against: np.ndarray, by: np.ndarray) -> tuple[int, int]:
    """(b, c): images where only the first happened, and where only the second did."""
    return int((against & ~by).sum()), int((by & ~against).sum())


def p_value(pair: tuple[int, int]) -> float:
    """Of the exact one-sided McNemar test of (b, c); 1 where the two outcomes never differ."""
    if not sum(pair):
        return 1.0
    return float(stats.binomtest(pair[0], sum(pair), 0.5, alternative="greater").pvalue)


def _tests(pairs: list[tuple[int, int]], against: str, by: str) -> dict[str, list[Any]]:
    """The figures behind comparisons, as plain data."""
    return {
        f"only_{against}": [b for b, _ in pairs],
        f"only_{by}": [c for _, c in pairs],
        "p_value": [p_value(pair) for pair in pairs],
    }


def _decide(
    pairs: list[tuple[int, int]], images: int, level: float, what: str, happened: bool = True
) -> tuple[str, str]:
    """Verdict and reason of comparisons (b against the expectation, c for it), each tested at `level`."""
    if images < _FEWEST:
        return INCONCLUSIVE, f"only {images} images: at least {_FEWEST} are needed"
    if not happened:
        return INCONCLUSIVE, "neither outcome occurs on any image: there is nothing to compare"
    worse = [pair for pair in pairs if pair[0] > pair[1]]
    if not worse:
        return PASSES, ""
    worst = min(worse, key=p_value)
    p = p_value(worst)
    said = f"{what} ({worst[0]} images, the reverse {worst[1]}, p = {p:.2g})"
    return (FAILS, said) if p < level else (INCONCLUSIVE, f"{said}: too few to tell from chance")


def _grid(grid: Sequence[float] | None, eps: float, whole_box: float) -> list[float]:
    """Increasing radii that end with the whole box."""
    if grid is None:
        radii = [eps * 2.0**k for k in range(-2, 64) if eps * 2.0**k < whole_box]
    else:
        radii = sorted({float(r) for r in grid if not float(r) >= whole_box})
        if not all(math.isfinite(r) and r > 0 for r in radii) or not len(grid):
            raise ValueError(f"grid must hold numbers > 0, at least one, got {list(grid)}")
    return [*radii, whole_box]
