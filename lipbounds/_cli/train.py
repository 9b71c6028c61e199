"""`lipbounds train`: a run in a folder of its own, started or gone on with."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from lipbounds._cli import tables
from lipbounds._cli.common import Json, refusals


class Loss(enum.StrEnum):
    crm = "crm"
    cross_entropy = "cross-entropy"
    gloro = "gloro"
    lipschitz_margin = "lipschitz-margin"


class BoundInLoss(enum.StrEnum):
    naive = "naive"
    liplt = "liplt"
    recursion = "recursion"


class Pairs(enum.StrEnum):
    pairwise = "pairwise"
    per_class = "per-class"
    whole = "whole"


class Activation(enum.StrEnum):
    relu = "relu"
    maxmin = "maxmin"


class Transform(enum.StrEnum):
    negative = "negative"
    exponential = "exponential"
    hinge = "hinge"


class Schedule(enum.StrEnum):
    exponential = "exponential"
    cosine = "cosine"
    constant = "constant"


class Average(enum.StrEnum):
    none = "none"
    ema = "ema"
    swa = "swa"


class Precision(enum.StrEnum):
    float32 = "float32"
    float64 = "float64"


def _number(help: str, **limits: Any) -> Any:
    return typer.Option(metavar="NUMBER", show_default=False, help=help, **limits)


def _choice(help: str) -> Any:
    return typer.Option(show_default=False, help=help)


def train(
    loss: Annotated[
        Loss | None,
        typer.Argument(show_default=False, help="What to train with; not with --resume."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", show_default=False, help="Go on with an interrupted run, to the same weights."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="RUN", file_okay=False, show_default=False, help="A new folder for the run."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="Settings of a published run: mnist-4C3F, ..."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, show_default=False, help="Settings as JSON."
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", show_default="digits", help="digits, mnist, cifar10, cifar100 or tiny-imagenet."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir", metavar="DIR", file_okay=False, show_default="LIPBOUNDS_DATA", help="Its files."
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default="by data set",
            help='Widths such as "784-512-512-10", or 2C2F, 4C3F, ...',
        ),
    ] = None,
    activation: Annotated[Activation | None, _choice("relu unless given.")] = None,
    mean: Annotated[float | None, _number("Of the normalisation inside the model.")] = None,
    std: Annotated[float | None, _number("Of the normalisation inside the model.")] = None,
    constants: Annotated[BoundInLoss | None, _choice("The bound in the loss.")] = None,
    pairs: Annotated[Pairs | None, _choice("L_ij, L_i + L_j or sqrt(2) L.")] = None,
    lam: Annotated[float | None, _number("Weight of the radius in CRM.", min=0.0)] = None,
    r0: Annotated[float | None, _number("Radius up to which examples count, in pixel units.")] = None,
    t: Annotated[float | None, _number("Sharpness of the soft radius.")] = None,
    g: Annotated[Transform | None, _choice("What is minimised of the radius.")] = None,
    eps: Annotated[float | None, _number("l2 radius of the validation (and of GloRo), in pixels.")] = None,
    warmup: Annotated[int | None, _number("Epochs of cross-entropy alone.", min=0)] = None,
    power_iterations: Annotated[int | None, _number("Per step, of naive and liplt.", min=1)] = None,
    refresh: Annotated[int | None, _number("Recompute the constants every N steps.", min=1)] = None,
    precision: Annotated[Precision | None, _choice("Of the constants in the loss.")] = None,
    epochs: Annotated[int | None, _number("Passes over the training images.", min=1)] = None,
    batch_size: Annotated[int | None, _number("Images a step.", min=1)] = None,
    learning_rate: Annotated[float | None, _number("Adam learning rate.")] = None,
    final_learning_rate: Annotated[float | None, _number("Final learning rate.")] = None,
    multiplier_rate: Annotated[float | None, _number("Of the recursion's multipliers.")] = None,
    schedule: Annotated[Schedule | None, _choice("How the learning rate falls.")] = None,
    decay_from: Annotated[int | None, _number("Epochs done before it falls.", min=0)] = None,
    smoothing: Annotated[float | None, _number("Label smoothing.")] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip/--no-flip", show_default=False, help="Mirror images.")
    ] = None,
    degrees: Annotated[float | None, _number("Rotate images by up to so much.")] = None,
    translate: Annotated[float | None, _number("Shift images by up to this share.")] = None,
    average: Annotated[Average | None, _choice("Average the weights.")] = None,
    ema_decay: Annotated[float | None, _number("Of the moving average, per step.")] = None,
    average_from: Annotated[int | None, _number("Epochs done before the average begins.", min=0)] = None,
    holdout: Annotated[float | None, _number("Share of the training images kept for validation.")] = None,
    validate_every: Annotated[int | None, _number("Epochs between validations.", min=0)] = None,
    checkpoint_every: Annotated[int | None, _number("Epochs between checkpoints.", min=1)] = None,
    max_skipped: Annotated[int | None, _number("Skipped steps an epoch may have.", min=0)] = None,
    seed: Annotated[int | None, _number("Of everything random.", min=0)] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", show_default=False, help="Process 0, where several processes train."
        ),
    ] = None,
    processes: Annotated[int | None, _number("How many processes.", min=1)] = None,
    process: Annotated[int | None, _number("Which of them this is, from 0.", min=0)] = None,
) -> None:
    """Train a network, by certified radius maximisation (crm) or one of its baselines.

    Writes to the run's folder: config.json, log.jsonl (one line an epoch), checkpoints, and in the end
    model.safetensors and report.html. Resume an interrupted run with --resume; it ends with the
    same weights bit for bit. Progress figures are certified by a proved bound, on training images unless
    --holdout keeps some out.

    Examples:

    - `lipbounds train crm --out runs/digits`

    - `lipbounds train crm --dataset mnist --data-dir data --arch 784-512-512-10 --epochs 60 --out runs/mnist`

    - `lipbounds train crm --preset cifar10-6C2F --data-dir data --epochs 40 --out runs/cifar`

    - `lipbounds train --resume runs/mnist`
    """
    given = {key: _plain(value) for key, value in locals().items()}
    for key in ("resume", "out", "preset", "config", "coordinator", "processes", "process"):
        given.pop(key)
    given = {key: value for key, value in given.items() if value is not None}
    if resume is not None:
        others = [key for key in given if key != "data_dir"]
        others += [name for name, value in (("out", out), ("preset", preset), ("config", config)) if value]
        if others:
            raise typer.BadParameter(
                f"a run has its own settings; leave out {', '.join(sorted(others))}", param_hint="--resume"
            )
    elif out is None or (loss is None and preset is None and config is None):
        raise typer.BadParameter(
            "say what to train with and where to write, such as `lipbounds train crm --out RUN`",
            param_hint="train",
        )
    with refusals():
        from lipbounds.training import parallel

        parallel.join(coordinator, processes, process)
        from lipbounds.training import runs
        from lipbounds.training.loop import fit
        from lipbounds.training.loop import resume as go_on

        folder = out if resume is None else resume
        assert folder is not None
        settings = runs.read(folder) if resume is not None else _settings(given, preset, config)
        leads = parallel.devices().leads
        with tables.training(settings.epochs, quiet=not leads) as tell:

            def show(record: Json) -> None:
                tell(record, _line(record, settings))

            if resume is None:
                fitted = fit(settings, out=folder, progress=show)
            else:
                fitted = go_on(folder, data_dir=data_dir, progress=show)
        parallel.leave()
        if not leads:
            return
        from lipbounds.analysis.training_report import final_record, write_training_report

        with tables.working() as say:
            final = final_record(fitted, data_dir, say)
        page = write_training_report(folder, settings, list(fitted.log), final)
        clean, certified = 100 * final["clean"], 100 * final["certified"]
        for line in (
            f"{final['images']} test images: {clean:.2f} % clean, {certified:.2f} % certified at eps {settings.eps:g} "
            f"({final['method']}, {final['guarantee']})",
            f"report: {page}",
            f"next:   lipbounds evaluate {folder}",
        ):
            tables.say(tables.console(), line)


def _plain(value: Any) -> Any:
    """An option as configurations hold it."""
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _settings(given: Json, preset: str | None, file: Path | None) -> Any:
    """The configuration: what the data set suggests, then the preset, then the file, then the options."""
    from lipbounds.training.config import Config, defaults, from_text
    from lipbounds.training.config import preset as settings_of

    chosen = from_text(file.read_text(encoding="utf-8"), str(file)) if file is not None else {}
    chosen |= given
    begin = defaults(chosen.get("dataset", "digits"))
    if preset is not None:
        epochs = chosen.get("epochs")
        begin = settings_of(preset, epochs if isinstance(epochs, int) else None)
    settings = Config.from_json(begin | chosen, "the command")
    _check_used(given, settings)
    return settings


def _check_used(given: Json, settings: Any) -> None:
    """ValueError for options that these settings make no use of."""
    recursion = settings.uses_constants and settings.constants == "recursion"
    used = {
        ("lam", "r0", "t", "g"): (settings.loss == "crm", "crm"),
        ("constants", "pairs", "refresh", "warmup"): (
            settings.loss != "cross-entropy",
            "a loss with constants",
        ),
        ("multiplier_rate", "precision"): (
            recursion or settings.precision == "float64",
            "--constants recursion",
        ),
        ("power_iterations",): (settings.uses_constants and not recursion, "--constants naive or liplt"),
        ("final_learning_rate", "decay_from"): (settings.schedule != "constant", "a schedule that falls"),
        ("ema_decay",): (settings.average == "ema", "--average ema"),
        ("average_from",): (settings.average != "none", "--average ema or swa"),
        ("smoothing",): (settings.loss in ("crm", "cross-entropy"), "crm or cross-entropy"),
    }
    for names, (fine, what) in used.items():
        idle = [f"--{name.replace('_', '-')}" for name in names if name in given]
        if idle and not fine:
            raise ValueError(f"{', '.join(idle)} would do nothing: it belongs to {what}")


def _line(record: Json, settings: Any) -> str:
    """What an epoch did, in one line."""
    text = f"loss {record['loss']:.4g}, {100 * record['accuracy']:.1f} % right in training"
    if record["skipped"] or record["failed"]:
        text += f", {record['skipped']} steps skipped, {record['failed']} without constants"
    if "clean" in record:
        clean, certified = 100 * record["clean"], 100 * record["certified"]
        text += f"; {clean:.1f} % clean and {certified:.1f} % certified at eps {settings.eps:g}"
        text += f" ({record['guarantee']}, {record['images']} {record['part']} images)"
    return text
