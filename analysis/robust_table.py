"""Networks trained to be robust, side by side: natural, under PGD, under AutoAttack and certified, in one norm.

    certified accuracy at eps  <=  robust accuracy at eps  <=  AutoAttack's  <=  PGD's  <=  natural accuracy

`evaluation` measures one network in the l2 balls that its certificates are about. Here the balls are those of the
training, l-inf mostly, and every certificate is the largest radius that `lb.certified_radius` proves, with the bounds
near every image where asked for. Networks with batch normalisation are certified as they evaluate: with their running
statistics, an affine map.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import lipbounds as lb
from lipbounds._text import Direction, Progress, label_text, percent, text_table
from lipbounds.analysis.attack_network import count_classes, split
from lipbounds.analysis.attack_search import first_images
from lipbounds.analysis.attack_settings import AttackSettings
from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.autoattack import autoattack, checked
from lipbounds.analysis.experiment import Json, triangle_bound
from lipbounds.analysis.figures import INK, NORM_NAMES, RADII_LINES, dress, new_figure
from lipbounds.analysis.robust_accuracy import really_broken

COLUMNS = ("PGD", "AutoAttack", "certified")


def robust_record(
    model: Any,
    x: np.ndarray,
    y: np.ndarray,
    *,
    eps: Sequence[float],
    norm: Any = math.inf,
    steps: int = 20,
    attack: str = "autoattack",
    local: bool | lb.Local = True,
    certify: bool = True,
    images: int | None = None,
    seed: int = 0,
    progress: Progress = None,
) -> Json:
    """Accuracies of one network by eps, as plain data.

    Args:
        model: an nnx module of one image or a batch, in evaluation mode, or any function from a batch to logits.
        x, y: (N, *shape) floating point in [0, 1] and (N,) integer labels.
        eps: radii in `norm`, 2 or inf, in the units of x.
        steps: of PGD, which starts once at the image.
        attack: "autoattack", or "pgd" to leave AutoAttack out.
        local: as of `lb.certified_radius`; False certifies by the constants of the whole network alone.
        certify: False leaves the certificates out.
        images: so many of the images, the first ones; None for all.
        seed: of everything random.
        progress: True, False or a function of one text.

    Returns a dict with the keys (accuracies in [0, 1]; `by eps` has str(eps) as keys)
        natural, images, eps, norm    accuracy, number of images, radii in ascending order
        PGD, AutoAttack, certified    accuracy by eps. The second is that under both attacks together
        guarantee                     of the certificates, or None where there are none
        rounding                      decisions of the float32 program that differ from the network in real arithmetic;
                                      they count as the latter says
        refused                       why there are none, or None
        seconds                       name of the column -> wall time

    Raises:
        ValueError: bad images, labels, eps or settings.
        GuaranteeError: an attack broke an image inside its certified radius, also in real arithmetic.
    """
    if attack not in ("pgd", "autoattack"):
        raise ValueError(f"attack must be one of pgd, autoattack, got {attack!r}")
    levels = sorted({float(e) for e in eps})
    if not levels or not all(math.isfinite(e) and e >= 0 for e in levels):
        raise ValueError(f"eps must hold finite numbers >= 0, at least one, got {levels}")
    settings = AttackSettings(norm, seed=seed, progress=progress)
    x, y = first_images(x, y, images)
    clean = pgd(
        model, x, y, 0.0, settings, steps=0
    ).correct  # bad images are refused before anything takes its time
    if attack == "autoattack":
        tuple(checked(model, x, settings))
    begin = time.perf_counter()
    unasked: tuple[Any, lb.Radii | None, str | None] = (None, None, "not asked for")
    form, radii, refused = _certify(model, x, y, levels, settings, local) if certify else unasked
    radius = np.zeros(len(x)) if radii is None else radii.radius
    seconds = {"certified": time.perf_counter() - begin}
    correct = clean | (radius > 0)
    record: Json = {
        "natural": float(correct.mean()),
        "images": len(x),
        "eps": levels,
        "norm": str(settings.norm),
    }
    runs: dict[str, Any] = {"PGD": functools.partial(pgd, steps=steps)}
    if attack == "autoattack":
        runs["AutoAttack"] = autoattack
    distance, rounding = np.full(len(x), np.inf), int((correct & ~clean).sum())
    for name, run in runs.items():
        begin = time.perf_counter()
        distance, more = _nearest(run, model, x, y, levels, settings, form, radii, distance)
        rounding += more
        record[name] = _shares(correct, distance, levels)
        seconds[name] = time.perf_counter() - begin
    return {
        **record,
        "certified": _shares(correct, radius, levels),
        "guarantee": None if radii is None else radii.guarantee,
        "refused": refused,
        "rounding": rounding,
        "seconds": seconds,
    }


def _nearest(
    run: Any,
    model: Any,
    x: np.ndarray,
    y: np.ndarray,
    levels: Sequence[float],
    settings: AttackSettings,
    form: Any,
    radii: lb.Radii | None,
    distance: np.ndarray,
) -> tuple[np.ndarray, int]:
    """(N,) distances of the nearest examples found so far, and how many only float32 rounding broke.

    The attack runs at every eps, in ascending order, on all images that are not broken there, certified ones, too.
    """
    network, weights = split(model)
    classes = count_classes(network, weights, x[:1].shape, y)
    rounding, method = 0, "" if radii is None else radii.method
    for e in (e for e in levels if e > 0):
        # Another label takes an example out, and the batches and random numbers of the others stay as they are.
        made = run(model, x, np.where(distance > e, y, (y + 1) % classes), e, settings)
        broken = made.success & (distance > e)
        if radii is not None:
            made = dataclasses.replace(made, success=broken)
            broken, more = really_broken(form, made, x, y, radii.radius, radii.norm, lambda _: method)
            rounding += more
        distance = np.minimum(distance, np.where(broken, made.distance, np.inf))
    return distance, rounding


def _shares(right: np.ndarray, distance: np.ndarray, levels: Sequence[float]) -> dict[str, float]:
    return {str(e): float(np.mean(right & (distance > e))) for e in levels}


def _certify(
    model: Any,
    x: np.ndarray,
    y: np.ndarray,
    levels: Sequence[float],
    settings: AttackSettings,
    local: bool | lb.Local,
) -> tuple[Any, lb.Radii | None, str | None]:
    """(form, radii, None), or (None, None, the reason) of a network that cannot be bounded."""
    options: Json = {"seed": settings.seed, "progress": settings.progress or False}
    try:
        form = (
            lb.trace(model, x[0]) if isinstance(model, nnx.Module) else lb.trace(model, x[:2], batched=True)
        )
        bound = triangle_bound(form, settings.norm, **options)
        near: list[Json] = [{"local": local, "eps": e} for e in levels if e > 0] if local else []
        made = [lb.certified_radius(form, x, y, bound, **one, **options) for one in near or [{}]]
    except ValueError as error:
        return None, None, str(error)
    # An engine that can certify eps may stop there, so the larger radii are those of the larger eps.
    return form, dataclasses.replace(made[-1], radius=np.max([one.radius for one in made], axis=0)), None


def robust_text(records: Mapping[str, Json]) -> str:
    """The table of several networks, by name: one row for each eps, accuracies in percent, "-" where none is known."""
    if not records:
        raise ValueError("a table needs at least one network")
    rows = []
    for name, record in records.items():
        for e in record["eps"]:
            ways: tuple[Direction, ...] = ("up", "up", "down")  # of COLUMNS
            cells = [_percent(record.get(c, {}).get(str(e)), w) for c, w in zip(COLUMNS, ways, strict=True)]
            if record["refused"] is not None:
                cells[-1] = "-"
            rows.append([label_text(name, 40), f"{e:.4g}", _percent(record["natural"]), *cells])
    return text_table(["network", "eps", "natural", *COLUMNS], rows, right=range(1, 6))


def _percent(share: float | None, way: Direction = "near") -> str:
    return "-" if share is None else percent(share, way)


def robust_figure(records: Mapping[str, Json]) -> Figure:
    """Accuracy against eps: attacked as a line and certified as a broken one; the robust accuracy lies in the band."""
    figure = new_figure(7.6, 4.2)
    ax = figure.subplots()
    dress(ax, "both")
    colours = list(RADII_LINES) * (1 + len(records) // len(RADII_LINES))
    for colour, (name, record) in zip(colours, records.items(), strict=False):
        upper = record["AutoAttack"] if "AutoAttack" in record else record["PGD"]
        at = [0.0, *(e for e in record["eps"] if e > 0)]
        top, low = (
            [record["natural"], *(part[str(e)] for e in at[1:])] for part in (upper, record["certified"])
        )
        ax.plot(at, top, color=colour, linewidth=1.9, marker=".", label=label_text(name, 40))
        if record["refused"] is None:
            ax.plot(at, low, color=colour, linewidth=1.4, linestyle=(0, (2, 1.2)))
            ax.fill_between(at, low, top, color=colour, alpha=0.08, linewidth=0)
    norm = next(iter(records.values()))["norm"] if records else "inf"
    ax.set_xlabel(f"ε, {NORM_NAMES[norm]} norm, units of the input", fontsize=9.5, color=INK)
    ax.set_ylabel("attacked (line), certified (broken)", fontsize=9.5, color=INK)
    ax.set_xlim(left=0)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(fontsize=8.5, frameon=False)
    return figure
