"""`lipbounds attack`: adversarial examples for a saved model or an ONNX file."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lipbounds._cli import common, tables
from lipbounds._cli.common import Json, refusals
from lipbounds._cli.data import Examples, check_inside
from lipbounds._cli.options import (
    ModelPath,
    Norm,
    Reading,
    SeedOption,
    Tables,
    box_of,
    digits,
    eps_of,
    grouped,
    option,
)

#: Name on the command line -> (function of lipbounds.analysis, settings that it fixes, options that it takes).
METHODS: Mapping[str, tuple[str, Json, tuple[str, ...]]] = {
    "autoattack": ("autoattack", {}, ()),
    "apgd": ("apgd", {"loss": "ce"}, ("steps", "restarts")),
    "apgd-t": ("apgd", {"loss": "dlr-t"}, ("steps", "restarts")),
    "fab": ("fab", {}, ("steps",)),
    "square": ("square", {}, ("queries",)),
    "pgd": ("pgd", {}, ("steps", "restarts")),
    "fgsm": ("fgsm", {}, ()),
    "odi-pgd": ("odi_pgd", {}, ("steps", "restarts")),
    "mi-fgsm": ("mi_fgsm", {}, ("steps",)),
    "frank-wolfe": ("frank_wolfe", {}, ("steps",)),
    "black-frank-wolfe": ("black_frank_wolfe", {}, ("queries",)),
    "nes-pgd": ("nes_pgd", {}, ("queries",)),
    "rays": ("rays", {}, ("queries",)),
    "adbd": ("adbd", {}, ("queries",)),
}
#: Attacks at a radius: what they leave bounds the robust accuracy from above.
AtRadius = Literal[
    "autoattack",
    "apgd",
    "apgd-t",
    "fab",
    "square",
    "pgd",
    "fgsm",
    "odi-pgd",
    "mi-fgsm",
    "frank-wolfe",
    "black-frank-wolfe",
    "nes-pgd",
    "rays",
]
Method = Literal[AtRadius, "adbd"]
NO_TARGETS = ("autoattack", "adbd")
NO_RADIUS = ("adbd",)
ONLY_LINF = ("rays", "adbd")
ANY_NORM = ("frank-wolfe", "black-frank-wolfe")


@dataclasses.dataclass(frozen=True)
class Written(Tables):
    """Where the result of an attack is written."""

    page: Annotated[
        Path | None, option("Also write a page (HTML) with the images found.", "FILE", dir_okay=False)
    ] = None


@grouped
def attack(
    *,
    model: ModelPath,
    eps: Annotated[
        float | None,
        option(
            "Radius, in the units of the model's input, such as 8/255; adbd needs none.",
            "NUMBER",
            parser=eps_of,
        ),
    ] = None,
    method: Annotated[Method, option("Attack to run.")] = "autoattack",
    norm: Annotated[
        Norm | None,
        option(
            "Norm of the change; 1 is for the Frank-Wolfe attacks.", show_default="2; inf for rays and adbd"
        ),
    ] = None,
    images: Annotated[int | None, option("Use the first N images.", "N", min=1, show_default="all")] = None,
    box: Annotated[Any, option("Range of the inputs.", "LOW,HIGH", parser=box_of, show_default="0,1")] = None,
    targeted: Annotated[
        bool,
        option("Try to reach a random wrong class of every image, drawn by the seed.", None, "--targeted"),
    ] = False,
    steps: Annotated[
        int | None, option("Gradient steps.", "N", min=1, show_default="as in the method's paper")
    ] = None,
    restarts: Annotated[
        int | None, option("Starts of every image.", "N", min=1, show_default="1; 10 for odi-pgd")
    ] = None,
    queries: Annotated[
        int | None,
        option(
            "Queries of every image.",
            "N",
            min=1,
            show_default="1000 for square, 10000 for rays, 40000 for adbd, 50000 else",
        ),
    ] = None,
    batch_size: Annotated[int, option("Images at once.", "N", min=1)] = 256,
    seed: SeedOption = 0,
    examples: Examples,
    files: Written,
    reading: Reading,
) -> None:
    """Attack a model: search within eps of every image for one that is classified differently.

    Accuracy under attack is an upper bound of the robust accuracy; `lipbounds certify` proves the lower one. Every
    example that is reported was checked to lie within eps and the box. AutoAttack runs APGD-CE, APGD-T, FAB-T and
    Square, each on the images that the ones before it left. square, black-frank-wolfe and nes-pgd ask for logits only,
    rays and adbd for labels only. adbd has no radius: it measures how near the nearest misclassified point is at most.

    Examples:
    - `lipbounds attack report/mlp.safetensors --eps 0.3`

    - `lipbounds attack net.onnx --method autoattack --eps 8/255 --norm inf --data mine.npz --page found.html`

    - `lipbounds attack report/mlp.safetensors --method pgd --restarts 50 --eps 0.3 --csv pgd.csv`

    - `lipbounds attack report/mlp.safetensors --method adbd --queries 2000 --csv distances.csv`
    """
    given: Json = {"steps": steps, "restarts": restarts, "queries": queries}
    given = {key: value for key, value in given.items() if value}
    examples.check()
    _check(method, eps, norm, targeted, given)
    outputs = {"--json": files.json, "--csv": files.csv, "--page": files.page}
    common.check_apart(outputs, common.files_read(model, reading, **examples.files()))
    name, fixed, _ = METHODS[method]
    norm = norm or ("inf" if method in ONLY_LINF else "2")
    with refusals() as stack:
        from lipbounds import analysis
        from lipbounds.analysis import attack_report

        common.check_json(files)
        for path, what in ((files.csv, "--csv"), (files.page, "--page")):
            common.check_free(path, files.force, lambda _: False, f"{what} would overwrite it")
        fn, shape, classes = common.load_batched(model, reading, stack)
        x, y = examples.read(shape, classes)
        x, y = x[:images], y[:images]
        low, high = (0.0, 1.0) if box is None else box
        check_inside(x, low, high)
        options: Json = {**fixed, **given, "norm": norm, "low": low, "high": high, "seed": seed}
        if targeted:
            options["target"] = analysis.random_targets(y, classes, seed)
        with tables.working() as tell:
            attacks = functools.partial(getattr(analysis, name), fn, x, y)
            options |= {"batch_size": batch_size, "progress": tell}
            said = attacks(**options) if eps is None else attacks(eps, **options)
        found = said.attack if isinstance(said, analysis.BoundaryDistances) else said
        record = attack_report.attack_record(found, fn, y, batch_size)
        words = ["lipbounds", "attack", str(model), "--method", method, "--norm", norm, *examples.words()]
        words += [] if eps is None else ["--eps", digits(eps)]
        words += [] if images is None else ["--images", str(images)]
        words += [] if box is None else ["--box", ",".join(map(digits, box))]
        words += [word for key, value in given.items() for word in (f"--{key}", str(value))]
        words += [*(["--targeted"] if targeted else []), "--batch-size", str(batch_size), "--seed", str(seed)]
        words += reading.words()
        about: Json = {
            "command": shlex.join(words),
            "model": str(model),
            "data": examples.name,
            "method": method,
        }
        record = {**common.header(), **about, "seed": seed, "box": [low, high], **record}
        attained = attack_report.ATTAINED if said is found else attack_report.ATTAINED_DISTANCE
        with tables.afterwards(lambda: typer.echo(f"{said!r}\n{attained}")) as lines:
            common.write_json(files.json, record)
            if files.csv is not None:
                lines.append(f"table: {attack_report.write_attack_table(record, files.csv)}")
            if files.page is not None:
                lines.append(f"page: {attack_report.write_attack_page(record, x, found, files.page)}")


def _check(method: str, eps: float | None, norm: str | None, targeted: bool, given: Json) -> None:
    """typer.BadParameter unless the method takes these options."""
    for key in given:
        if key not in METHODS[method][2]:
            raise typer.BadParameter(f"does not belong to --method {method}", param_hint=f"--{key}")
    if targeted and method in NO_TARGETS:
        raise typer.BadParameter(f"{method} has no targets", param_hint="--targeted")
    if norm not in (None, "inf") and method in ONLY_LINF:
        raise typer.BadParameter(f"{method} measures distances in l-inf: leave it out", param_hint="--norm")
    if norm == "1" and method not in ANY_NORM:
        raise typer.BadParameter(f"{method} is in norm 2 or inf, not 1", param_hint="--norm")
    if eps is None and method not in NO_RADIUS:
        raise typer.BadParameter(f"{method} needs a radius", param_hint="--eps")
    if eps is not None and method in NO_RADIUS:
        raise typer.BadParameter(f"{method} measures distances and has no radius", param_hint="--eps")
