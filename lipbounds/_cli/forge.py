"""`lipbounds forge`: zero small activations of a trained network, and measure the effect."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from lipbounds._cli import tables
from lipbounds._cli.common import Json, refusals
from lipbounds._cli.options import Pages, SeedOption, Source, eps_of, grouped, number, option
from lipbounds._cli.trained import Subject, check_source, folder_of, open_subject, record_of, write_files

TAU = 0.1
SEARCHED = 500  # training images that c_r is chosen on


def _ratio(text: str) -> float:
    """A number in [0, 1) such as 0.01, 2^-7 or 2**-7."""
    try:
        value = number(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text} is not a number in [0, 1), such as 0.01 or 2^-7")
    return value


def _radius(text: str) -> float:
    """A radius of attacks on pixels."""
    value = eps_of(text)
    if not 0 < value <= 1:
        raise typer.BadParameter(
            f"eps must be > 0 and at most 1, as pixel values lie in [0, 1], got {value:g}: such as 8/255"
        )
    return value


@grouped
def forge(
    *,
    source: Source,
    c_r: Annotated[
        list[float] | None,
        option(
            "Thresholds as fractions of the largest activation: 0.01, 2^-7.",
            "NUMBER...",
            parser=_ratio,
            show_default="2^-8 to 2^-4",
        ),
    ] = None,
    kind: Annotated[Literal["hard", "smooth"], option("Gate: discontinuous (hard) or smooth.")] = "hard",
    tau: Annotated[float | None, option("Width of the smooth gate.", "NUMBER", show_default=str(TAU))] = None,
    quantile: Annotated[
        float, option("Quantile of the largest activations of the images; 1 is the maximum.", "NUMBER")
    ] = 1.0,
    eps: Annotated[
        float | None,
        option(
            "Radius of attacks in the l-inf norm, in pixel values in [0, 1].",
            "NUMBER",
            parser=_radius,
            show_default="8/255; 0.1 for MNIST",
        ),
    ] = None,
    images: Annotated[int, option("Use the first N test images.", "N", min=1)] = 500,
    pgd_steps: Annotated[int, option("Gradient steps of an attack.", "N", min=1)] = 20,
    queries: Annotated[int, option("Queries of the Square attack.", "N", min=1)] = 300,
    attack: Annotated[
        Literal["pgd", "autoattack"],
        option(
            "Attack to run; `autoattack` runs beside PGD and Square, takes far longer, and needs 4 classes."
        ),
    ] = "pgd",
    checks: Annotated[bool, option("Look for signs of gradient masking.")] = True,
    seed: SeedOption = 0,
    files: Pages,
) -> None:
    """Zero small activations of a trained network (forged layers), and measure the effect.

    In front of convolutional and linear layers everything below c_r times the largest activation becomes zero
    (arXiv 2406.19622). Reports accuracy, clean and under attack, and for every layer empirical constants, eigenvalues
    and Gershgorin discs; none of these is a certificate. Of several c_r, the best under PGD on training images is
    saved. Writes forged.safetensors, forged.json and forged.html to the folder.

    Examples:
    - `lipbounds forge runs/digits`

    - `lipbounds forge runs/mnist --data-dir data --c-r 0 2^-7 2^-5 --eps 0.1`

    - `lipbounds forge report/cnn_crm.safetensors --dataset digits --c-r 2^-6 --out forged`
    """
    check_source(source)
    if tau is not None and kind != "smooth":
        raise typer.BadParameter("belongs to --kind smooth", param_hint="--tau")
    if c_r and not any(c_r):
        raise typer.BadParameter("0 alone changes nothing: add one above 0, such as 2^-7", param_hint="--c-r")
    with refusals():
        from lipbounds.analysis import forging_report as report

        names = (report.RECORD, report.PAGE, report.THRESHOLDS)
        folder = folder_of(source, files, names, "forge")
        subject = open_subject(source.run, source.dataset)
        settings: Json = {
            "c_r": c_r or [2.0**-k for k in range(8, 3, -1)],
            "eps": eps or (0.1 if subject.dataset == "mnist" else 8 / 255),
            "tau": TAU if tau is None else tau,
            "quantile": quantile,
            "images": images,
            "pgd_steps": pgd_steps,
            "queries": queries,
            "attack": attack,
            "seed": seed,
            "kind": kind,
        }
        found, chosen, on, signs, rows = _measure(subject, source, checks, **settings)
        used = {name: value for name, value in settings.items() if name != "tau" or kind == "smooth"}
        spelled = {**used, "checks" if checks else "no_checks": True}
        record = record_of("forge", subject, source, spelled)
        record |= report.forging_record(found, chosen, on, rows, signs)

        def write(place: Any) -> Any:
            found.forged.with_c_r(chosen).save(place / report.THRESHOLDS)
            return report.write_forging_report(record, found, signs, place)

        with tables.afterwards(lambda: _print(found, chosen, signs, rows)) as lines:
            lines += write_files(files, folder, report.RECORD, record, write)


def _measure(
    subject: Subject,
    source: Source,
    checks: bool,
    *,
    c_r: list[float],
    images: int,
    pgd_steps: int,
    queries: int,
    attack: str,
    eps: float,
    seed: int,
    **gates: Any,
) -> tuple[Any, float, str, Any, Any]:
    """(the study, the c_r chosen, how, signs of gradient masking or None, the claims of the paper)."""
    from lipbounds.analysis.forge_search import search_c_r
    from lipbounds.analysis.forging_study import claims, study
    from lipbounds.analysis.masking import gradient_masking

    with tables.working() as tell:
        test = subject.data(source.data_dir, tell)
        x, y = test.test_x[:images], test.test_y[:images]
        given: Json = {"eps": eps, "seed": seed, "progress": tell, "steps": pgd_steps}
        chosen, on = max(c_r), "the one asked for"
        if len({*c_r} - {0.0}) > 1:
            few, labels = test.train_x[:SEARCHED], test.train_y[:SEARCHED]
            ratios = sorted({*c_r})
            picked = search_c_r(subject.model, few, labels, ratios, data=test.train_x, **given, **gates)
            chosen, on = picked.best.c_r, f"the best under PGD on {len(labels)} training images"
        given["queries"], auto = queries, attack == "autoattack"
        found = study(subject.model, x, y, data=test.train_x, candidates=c_r, auto=auto, **given, **gates)
        signs = None
        if checks and chosen > 0:
            signs = gradient_masking(found.forged.with_c_r(chosen), subject.model, x, y, **given)
        return found, chosen, on, signs, claims(found, signs)


def _print(found: Any, chosen: float, signs: Any, rows: Any) -> None:
    from lipbounds.analysis.forging_study import claims_table

    shown = [repr(found), repr(next(row for row in found.rows if row.c_r == chosen).diagnosis)]
    shown += [] if signs is None else [repr(signs)]
    for text in [*shown, f"The claims of arXiv 2406.19622, on these images\n{claims_table(rows)}"]:
        tables.say(tables.console(), f"\n{text}")
