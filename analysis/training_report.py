"""The report of a training run: its curves, its settings, and the test set certified in the end."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import lipbounds as lb
from lipbounds import __version__
from lipbounds.analysis.attacks import pgd
from lipbounds.analysis.figures import INK, RADII_LINES, dress, new_figure, png
from lipbounds.analysis.report import embedded, fill, write_page
from lipbounds.training.config import Config
from lipbounds.training.data import load
from lipbounds.training.final_bound import bound_within, seconds_for
from lipbounds.training.loop import Fitted, accuracy
from lipbounds.training.robust_watch import overfitting
from lipbounds.training.runs import BEST, CERTIFICATE
from lipbounds.training.watch import best, judged, troubled

Json = dict[str, Any]
PAGE = "report.html"


def final_record(
    fitted: Fitted, data_dir: pathlib.Path | None = None, tell: Callable[[str], None] = lambda text: None
) -> Json:
    """Clean and certified accuracy on all test images, by the bound that stood in the loss (else by LipLT).

    Radii are in pixel units, l2. A LipSDP bound leaves its certificate in the run's folder. A run with a robust loss
    has its accuracy under ten steps of PGD, and nothing certified where it had neither constants in its loss nor
    validations.
    """
    config = fitted.config
    begin = time.perf_counter()
    data = load(config.dataset, config.data_dir if data_dir is None else data_dir)
    record: Json = {"images": len(data.test_y), "eps": config.eps}
    if config.robust:
        tell("attacking the test images")
        record["pgd_accuracy"] = _attacked(fitted, data)
        if not config.uses_constants and not config.validate_every:
            clean = accuracy(fitted.model, data.test_x, data.test_y)
            return {**record, "clean": clean, "seconds": time.perf_counter() - begin}
    if fitted.ahead is not None:
        tell("compiling the bound of the network")
        fitted.ahead.wait()
    tell("bounding the network")
    if fitted.proved is None:
        form = lb.trace(fitted.model, jax.ShapeDtypeStruct(data.input_shape, jnp.float32))
        found = bound_within(form, config, fitted.state, seconds_for(config, fitted.log))
    else:
        form, found = fitted.proved
    bound = found.bound
    if bound.certificate is not None and fitted.folder is not None:
        lb.save_certificate(bound, fitted.folder / CERTIFICATE)
    tell("certifying the test images")
    radii = lb.certified_radius(form, data.test_x, data.test_y, bound=bound)
    return {
        **record,
        "clean": float(radii.correct.mean()),
        "certified": float(radii.accuracy(config.eps)),
        "method": bound.method,
        "guarantee": radii.guarantee,
        "constant": bound.value,
        "average_pair": bound.average_pair(),
        **found.record(),
        "seconds": time.perf_counter() - begin,
    }


def _attacked(fitted: Fitted, data: Any) -> float:
    """Accuracy on the test images under ten steps of PGD, an upper estimate of the robust accuracy."""
    config, eps = fitted.config, fitted.config.attack_eps
    norm = math.inf if config.attack_norm == "linf" else 2.0
    options: Json = {"norm": norm, "batch_size": config.batch_size, "step_size": eps / 4 or None}
    return pgd(fitted.model, data.test_x, data.test_y, eps, steps=10, loss="ce", **options).accuracy


def remarks(fitted: Fitted, final: Json | None = None) -> list[str]:
    """Sentences about a run that lost its radius term, stopped early, or certified more before its end.

    And about a bound in its final record that took the place of a better one.
    """
    log, config = fitted.log, fitted.config
    found = [text] if (text := troubled(log)) else []
    if final is not None and "remark" in final:
        found.append(final["remark"])
    if log[-1]["epoch"] < config.epochs:
        why = (
            "PGD accuracy had collapsed"
            if config.stop_if_overfitted and overfitting(log, config.attack_rises) is not None
            else f"hardly an image was certified in the last {config.stop_if_uncertified} epochs"
        )
        found.append(f"stopped after epoch {log[-1]['epoch']} of {config.epochs}: {why}")
    epoch = best(log, config)
    earlier = epoch is not None and epoch != log[-1]["epoch"]
    if earlier and fitted.folder is not None and (fitted.folder / BEST).exists():
        share = 100 * next(record[judged(config)] for record in log if record["epoch"] == epoch)
        what = "correct under PGD" if config.robust else "certified by an estimate"
        found.append(f"{BEST}: the weights of epoch {epoch}, {share:.1f} % {what}")
    return found


def write_training_report(
    folder: pathlib.Path, config: Config, log: list[Json], final: Json, lines: Sequence[str] = ()
) -> pathlib.Path:
    """Write `report.html` to the run's folder, with these remarks; return its path."""
    picture = png(curves(log, config))
    page = fill(
        "training.html.j2",
        title=f"{config.arch} on {config.dataset}",
        config=config.to_json(),
        log=log,
        final=final,
        lipbounds=__version__,
        figure=embedded(picture),
        skipped=sum(record["skipped"] for record in log),
        failed=sum(record["failed"] for record in log),
        seconds=sum(record["seconds"] for record in log),
        remarks=lines,
    )
    return write_page(folder / PAGE, page)


def curves(log: list[Json], config: Config) -> Figure:
    """Loss by epoch; accuracy in training, and clean and certified accuracy where validated."""
    figure = new_figure(8.4, 3.2)
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in log]
    left.plot(epochs, [record["loss"] for record in log], color=INK, linewidth=1.4)
    left.set_title("loss", loc="left", fontsize=9)
    seen = [record for record in log if "clean" in record]
    part = seen[0]["part"] if seen else "sampled"
    at = f"certified at {config.eps:.4g}"
    measured: Json = {"marker": "o", "markersize": 3}
    lines: list[tuple[str, str, str, Json]] = [
        ("accuracy", "training, as augmented", "#bbbbbb", {}),
        ("clean", f"clean, {part} images", RADII_LINES[0], measured),
        ("certified", f"{at}, {part} images", RADII_LINES[2], measured),
        (
            "certified_estimate",
            f"{at}, estimate, {part} images",
            RADII_LINES[2],
            {"linewidth": 0.8, "linestyle": "--"},
        ),
        (
            "pgd_accuracy",
            f"under PGD at {config.attack_norm} {config.attack_eps:.4g}",
            RADII_LINES[1],
            {"linewidth": 1.2},
        ),
    ]
    for key, label, colour, style in lines:
        known = [record for record in log if record.get(key) is not None]
        if known:
            shares = [100 * record[key] for record in known]
            right.plot([record["epoch"] for record in known], shares, color=colour, label=label, **style)
    right.set_title("accuracy (%)", loc="left", fontsize=9)
    right.legend(fontsize=7, frameon=False, loc="lower right")
    for ax in (left, right):
        dress(ax, "y")
        ax.set_xlabel("epoch", fontsize=8)
    return figure
