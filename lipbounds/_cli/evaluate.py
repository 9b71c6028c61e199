"""`lipbounds evaluate`: accuracy of a trained network, clean, attacked and certified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lipbounds._cli import tables
from lipbounds._cli.common import Json, refusals
from lipbounds._cli.options import VERBS, Pages, SeedOption, Source, eps_of, grouped, option
from lipbounds._cli.trained import Subject, check_source, folder_of, open_subject, record_of, write_files
from lipbounds._text.tables import Direction, percent

if TYPE_CHECKING:
    from rich.table import Table

RECORD = "evaluation.json"


def _verb(text: str) -> str:
    """The name of a bound, checked."""
    if text not in VERBS:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(VERBS)}")
    return text


@grouped
def evaluate(
    *,
    source: Source,
    eps: Annotated[
        list[float] | None,
        option(
            "Radii in the l2 norm, in pixel values in [0, 1].",
            "NUMBER...",
            parser=eps_of,
            show_default="1.58 for MNIST, 36/255 for CIFAR and Tiny-ImageNet, 0.5 for digits, else that of the run",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        option("Bounds that certify.", "NAME...", parser=_verb, show_default=" ".join(VERBS)),
    ] = None,
    images: Annotated[
        int | None, option("Use the first N test images.", "N", min=1, show_default="all")
    ] = None,
    pgd_steps: Annotated[int, option("Gradient steps of an attack.", "N", min=1)] = 100,
    pgd_restarts: Annotated[int, option("Attacks per image; the first starts at the image.", "N", min=1)] = 1,
    attack: Annotated[
        Literal["pgd", "autoattack"],
        option("Attack to run; `autoattack` runs beside PGD, takes far longer, and needs 4 classes."),
    ] = "pgd",
    paper_units: Annotated[
        bool, option("Take eps in the units of the published code, and explain them.", None, "--paper-units")
    ] = False,
    against: Annotated[
        Path | None, option("Another run on the same data, to compare with.", "RUN", exists=True)
    ] = None,
    seed: SeedOption = 0,
    files: Pages,
) -> None:
    """Evaluate a trained network: clean accuracy, accuracy under attack, certified accuracy.

    Certified accuracy is proved and accuracy under attack is attained, both in the l2 norm and in pixel values;
    the robust accuracy lies between the two, in the band of the figure. A second table shows the bounds for pairs
    of classes. Writes evaluation.json, evaluation.html, radii.png and radii.svg to the folder.

    Examples:
    - `lipbounds evaluate runs/mnist --data-dir data --eps 1.58`

    - `lipbounds evaluate runs/crm --against runs/plain --pgd-steps 200 --pgd-restarts 5`

    - `lipbounds evaluate runs/mnist --data-dir data --attack autoattack --images 500`

    - `lipbounds evaluate report/mlp.safetensors --dataset digits --methods liplt lipsdp --json mlp.json`
    """
    check_source(source)
    with refusals():
        from lipbounds.analysis.evaluation_report import FIGURES, PAGE, write_evaluation_report

        folder = folder_of(source, files, (RECORD, PAGE, *FIGURES), "evaluate", against)
        subject = open_subject(source.run, source.dataset)
        other = None if against is None else open_subject(against, subject.dataset)
        settings: Json = {
            "eps": list(eps or [_usual_eps(subject)]),
            "methods": list(methods or VERBS),
            "pgd_steps": pgd_steps,
            "pgd_restarts": pgd_restarts,
            "attack": attack,
            "seed": seed,
            "images": images,
            "paper_units": paper_units,
        }
        record = record_of("evaluate", subject, source, {**settings, "against": against})
        record |= _measure(subject, other, source.data_dir, settings)
        with tables.afterwards(lambda: _print(record)) as lines:
            lines += write_files(
                files, folder, RECORD, record, lambda place: write_evaluation_report(record, place)
            )


def _usual_eps(subject: Subject) -> float:
    """The radius where none is given: that of published figures, for own images that of the run."""
    from lipbounds.analysis.evaluation import USUAL_EPS

    usual = USUAL_EPS.get(subject.dataset, subject.eps)
    if usual is None:
        raise ValueError(f"{subject.dataset} has no usual radius: add --eps, in pixel values in [0, 1]")
    return usual


def _measure(subject: Subject, other: Subject | None, data_dir: Path | None, settings: Json) -> Json:
    """Accuracies and constants of the subject, and the constants of the other run."""
    from lipbounds.analysis import evaluation

    if other is not None and other.dataset != subject.dataset:
        raise ValueError(
            f"{other.path} was trained on {other.dataset}, and {subject.path} on {subject.dataset}"
        )
    factor, explanation = evaluation.paper_units(subject.dataset)
    with tables.working() as tell:
        test = subject.data(data_dir, tell)
        if other is not None:
            other.check(test)
        options = settings | {
            "paper_units": factor if settings["paper_units"] else None,
            "methods": _bounds(subject, settings["methods"], test, tell),
            "progress": tell,
        }
        found = evaluation.evaluate(subject.model, test.test_x, test.test_y, **options)
        if found["paper_units"] is not None:
            found["paper_units"]["text"] = explanation
        if other is not None:
            methods = _bounds(other, settings["methods"], test, tell)
            options = {"images": settings["images"], "seed": settings["seed"], "progress": tell}
            against = evaluation.certificates(
                other.model, test.test_x, test.test_y, eps=found["eps"], methods=methods, **options
            )
            found["against"] = {"model": other.record(), **against}
    return found


def _bounds(subject: Subject, names: list[str], test: Any, tell: Any) -> list[Any]:
    """The methods, with "lipsdp" replaced by the bound of the run's certificate, if there is one."""
    from lipbounds.analysis.evaluation import certified_bound
    from lipbounds.errors import CertificateError
    from lipbounds.training.runs import CERTIFICATE

    path = subject.path / CERTIFICATE
    if not path.is_file() or "lipsdp" not in names:
        return list(names)
    tell("proving the run's certificate again")
    try:
        bound = certified_bound(path, subject.model, test.test_x)
    except CertificateError as error:
        raise CertificateError(
            f"{path} is rejected: {error} (delete the file to compute LipSDP again)"
        ) from error
    return [bound if name == "lipsdp" else name for name in names]


def _print(record: Json) -> None:
    console = tables.console()
    console.print()
    tables.show_table(console, accuracy_table(record))
    tables.show_table(console, constants_table(record))
    if "against" in record:
        tables.show_table(console, constants_table(record["against"]))
    inside = record["inside"]
    settings = record["pgd_settings"]
    starts = "1 start" if settings["restarts"] == 1 else f"{settings['restarts']} starts"
    lines = [
        f"PGD: {settings['steps']} steps, {starts}; l-inf within the ball that the l2 ball contains",
        f"attacked inside their radius: {inside['images']} images, {inside['broken']} broken",
    ]
    if record["rounding"]:
        lines.append(
            f"{record['rounding']} decisions within float32 rounding of a tie were settled in real arithmetic"
        )
    from lipbounds.analysis.evaluation import FROM_CERTIFICATE

    lines += [
        f"{name}: {FROM_CERTIFICATE}" for name, notes in record["notes"].items() if FROM_CERTIFICATE in notes
    ]
    lines += [f"{name} is missing: {reason}" for name, reason in record["refused"].items()]
    if record["paper_units"] is not None:
        lines.append(record["paper_units"]["text"])
        for pixel, given in record["paper_units"]["given"].items():
            lines.append(f"eps {given:.6g} as asked is {float(pixel):.6g} in pixel values")
    for line in lines:
        tables.say(console, line)


def accuracy_table(record: Json) -> Table:
    """Clean, attacked and certified accuracy (rows) at every eps (columns)."""
    from lipbounds.analysis.experiment import LABELS
    from lipbounds.results import NORM_NAMES, check_norm

    keys = [str(e) for e in record["eps"]]
    table = tables.titled(
        f"{record['model']['title']}: {record['images']} test images of {record['model']['dataset']}"
    )
    table.add_column("accuracy")
    table.add_column("guarantee", no_wrap=True)
    for e in record["eps"]:
        table.add_column(f"eps {e:.4g}", justify="right", no_wrap=True)
    table.add_row("clean", "", *(_percent(record["clean"]) for _ in keys))
    attacked = {"PGD": record["pgd"]}
    if len(record["attacked"]["by"]) > 1:
        attacked[" and ".join(record["attacked"]["by"])] = record["attacked"]
    for name, rows in attacked.items():
        for norm in record["pgd"]:
            cells = (_percent(rows[norm][key], "up") for key in keys)
            table.add_row(f"{name} {NORM_NAMES[check_norm(norm)]}", "attained", *cells)
    for method, row in record["certified"].items():
        word = record["guarantee"][method]
        table.add_row(
            f"certified {LABELS.get(method, method)}", word, *(_percent(row[key], "down") for key in keys)
        )
    if record["robust"]:
        between = [
            f"{percent(e['certified'], 'down')} to {_percent(e['attacked'], 'up')}"
            for e in record["robust"].values()
        ]
        table.add_row("robust l2 lies in", "both", *between)
    return table


def constants_table(record: Json) -> Table:
    """Table 2 of arXiv 2310.00116: upper bounds of the constants of z_i - z_j, averaged over pairs of classes."""
    from lipbounds._text.tables import entry, seconds_text
    from lipbounds.analysis.experiment import LABELS

    table = tables.titled(f"{record['model']['title']}: l2 constants, averaged over pairs of classes")
    table.add_column("method", no_wrap=True)
    for column in ("L_ij", "L_i + L_j", "sqrt(2) L", "median radius"):
        table.add_column(column, justify="right")
    table.add_column("guarantee")
    table.add_column("time", justify="right")
    for method, row in record["constants"].items():
        bounds = [f"≤ {entry(row[key], 'up', 5)}" for key in ("average_pair", "average_sum", "average_sqrt2")]
        radius = tables.median_radius(record["radii"].get(method, {}), 4)
        time = seconds_text(record["seconds"][method])
        table.add_row(LABELS.get(method, method), *bounds, radius, record["guarantee"][method], time)
    return table


def _percent(share: float, way: Direction = "near") -> str:
    return f"{percent(share, way)} %"
