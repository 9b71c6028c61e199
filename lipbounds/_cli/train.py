"""`lipbounds train`: start or resume a run in a folder of its own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shlex
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lipbounds._cli import tables
from lipbounds._cli.common import Json, refusals
from lipbounds._cli.options import CoordinatorOption, ProcessesOption, ProcessOption
from lipbounds._text.files import read_text
from lipbounds._text.tables import percent

LogName = Literal["tensorboard", "trackio"]
_Uses = dict[tuple[str, ...], tuple[bool, str]]
_AT_EPS = ("gloro", "gloro-trades", "emma", "lipschitz-margin")  # constants count for nothing where eps is 0


def train(
    *,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Resume an interrupted run, to the same weights.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", file_okay=False, help="New folder for the run.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="Settings of a published run, such as mnist-4C3F.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Read settings from a JSON file."),
    ] = None,
    log: Annotated[
        LogName | None, typer.Option(help="Also write the log for this program, which shows its curves.")
    ] = None,
    coordinator: CoordinatorOption = None,
    processes: ProcessesOption = None,
    process: ProcessOption = None,
    **settings: Any,
) -> None:
    """Train a network, by certified radius maximisation (crm), one of its baselines, or against attacks (at, trades).

    Writes config.json, log.jsonl (one line per epoch), checkpoints, model.safetensors and report.html to the
    folder of the run. Resume an interrupted run with --resume; it ends with the same weights bit for bit.
    Validation is certified by a proved bound, on training images unless --holdout keeps some out. Runs with a robust
    loss (at, trades and so on) tell their accuracy under a short attack instead, an upper estimate.

    Examples:
    - `lipbounds train crm --out runs/digits`

    - `lipbounds train crm --dataset mnist --data-dir data --arch 784-512-512-10 --epochs 60 --out runs/mnist`

    - `lipbounds train crm --dataset mine.npz --arch 784-256-10 --out runs/mine`

    - `lipbounds train crm --preset cifar10-6C2F --data-dir data --epochs 40 --out runs/cifar`

    - `lipbounds train emma --constants naive --dataset cifar10 --data-dir data --arch liresnet-L6W64 --optimiser nadam
      --lookahead 6 --schedule cosine --crop 4 --flip --ramp 30 --warmup 0 --average ema --out runs/liresnet`

    - `lipbounds train --preset cifar10-lipnext --data-dir data --out runs/lipnext`

    - `lipbounds train trades --preset cifar10-resnet18 --data-dir data --out runs/trades`

    - `lipbounds train --resume runs/mnist`

    - `lipbounds train crm --out runs/digits --log tensorboard`, then `tensorboard --logdir runs/digits/tensorboard`
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if resume is not None:
        begin: Json = {"out": out, "preset": preset, "config": config}
        others = [key for key in given if key != "data_dir"] + [key for key, value in begin.items() if value]
        if others:
            raise typer.BadParameter(
                f"a run has its own settings; leave out {', '.join(sorted(others))}", param_hint="--resume"
            )
    elif out is None or ("loss" not in given and preset is None and config is None):
        raise typer.BadParameter(
            "give a loss and an output folder, such as `lipbounds train crm --out RUN`",
            param_hint="train",
        )
    again = shlex.join(["lipbounds", "train", "--resume", str(resume or out)])
    with refusals(f"{again} goes on from the last checkpoint, if the run has begun"):
        from lipbounds.training import parallel

        parallel.join(coordinator, processes, process)
        settings_of_run = None if resume else _settings(given, preset, config)
        _run(resume or out, settings_of_run, given.get("data_dir"), log)


def command() -> Any:
    """`train` with an option for every field of `Config`, which is imported here because that takes a second."""
    from lipbounds.training.config import Config

    own = inspect.signature(train, eval_str=True)
    parameters, hints = list(own.parameters.values()), typing.get_type_hints(Config)
    parameters[5:] = [
        *(
            parameters[0].replace(name=field.name, annotation=_annotation(field, hints[field.name]))
            for field in dataclasses.fields(Config)
        ),
        *parameters[5:-1],  # how several processes find each other stands last
    ]
    function: Any = functools.wraps(train)(lambda **given: train(**given))
    function.__signature__ = own.replace(parameters=parameters)
    app = typer.Typer(rich_markup_mode="markdown", add_completion=False)
    app.command()(function)
    return typer.main.get_command(app)


def _annotation(field: dataclasses.Field[Any], hint: Any) -> Any:
    """The command line option of a setting, None if not given."""
    from lipbounds.training.config import defaults, described
    from lipbounds.training.data import DATASETS

    words, limits, help = field.metadata["choices"], field.metadata["limits"], field.metadata["help"]
    panel = field.metadata["group"].capitalize()
    if field.name == "loss":
        return Annotated[Literal[words] | None, typer.Argument(help=help, show_default=False)]
    if any(field.name in defaults(dataset) for dataset in DATASETS) and field.name != "dataset":
        default = "by data set"
    else:
        default = {"data_dir": "LIPBOUNDS_DATA", True: "yes", False: "no"}.get(
            field.default if hint is bool else field.name, str(field.default)
        )
    more: Json = {"rich_help_panel": panel, "show_default": default, "help": help}
    if field.name == "dataset":  # Config suggests a near name
        more |= {"metavar": "NAME", "help": described(field)}
    elif words:
        hint = Literal[words]
    elif hint in (int, float):
        more |= {"metavar": "N" if hint is int else "NUMBER", "min": limits[0] if hint is int else None}
    else:
        more["metavar"] = None if hint is bool else "DIR" if field.name == "data_dir" else "NAME"
    return Annotated[hint | None, typer.Option(**more)]


def _settings(given: Json, preset: str | None, file: Path | None) -> Any:
    """The configuration: defaults of the data set, overridden by preset, file and options, in this order."""
    from lipbounds.training.config import Config, defaults, from_text, unproved
    from lipbounds.training.presets import preset as settings_of

    chosen = from_text(read_text(file, "utf-8-sig"), str(file)) if file is not None else {}
    places = {name: f"{name} of {file}" for name in chosen} | {name: _option(name) for name in given}
    chosen |= given
    begin = defaults(chosen.get("dataset", "digits"))
    if preset is not None:
        epochs = chosen.get("epochs")
        begin = settings_of(preset, epochs if isinstance(epochs, int) else None)
    if chosen.get("schedule", "multi-step") != "multi-step":
        begin.pop("milestones", None)  # a preset's own schedule has gone
    settings = unproved(Config.from_json(begin | chosen, "the command"), chosen)
    usual = {field.name: field.default for field in dataclasses.fields(Config)} | begin
    asked = {key: place for key, place in places.items() if key in given or chosen[key] != usual[key]}
    _check_used(asked, settings)
    return settings


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_used(asked: dict[str, str], c: Any) -> None:
    """ValueError for settings that have no effect beside the others; asked: where each was given, by its name."""
    from lipbounds.training.robust_losses import ROBUST

    for names, (fine, what) in (_uses_of_loss(c) | _other_uses(c)).items():
        idle = [asked[name] for name in names if name in asked]
        if idle and not fine:
            raise ValueError(f"{', '.join(idle)} has no effect without {what}")
    for name, losses, what in (
        ("eps", _AT_EPS, "the constants count for nothing"),
        ("attack_eps", ROBUST, "nothing is attacked"),
    ):
        if name in asked and getattr(c, name) == 0 and c.loss in losses:
            raise ValueError(f"{asked[name]} is 0, so that {what} in the loss {c.loss}")
    if "warmup" in asked and c.uses_constants and c.warmup >= c.epochs:
        raise ValueError(
            f"{asked['warmup']} is as long as the run of {c.epochs} epochs, so that the constants never count in the "
            f"loss {c.loss}: choose a shorter one"
        )


def _uses_of_loss(c: Any) -> _Uses:
    """Settings of the loss, whether they have an effect, and what they need."""
    recursion = c.uses_constants and c.constants == "recursion"
    radii = (c.loss == "crm" and c.lam > 0) or c.radius_weight > 0
    return {
        ("lam",): (c.loss == "crm", "the loss crm"),
        ("r0", "t", "g"): (radii, "the loss crm with --lam above 0, or --radius-weight"),
        ("constants", "pairs", "refresh", "stop_if_uncertified"): (c.uses_constants, "a loss with constants"),
        ("warmup",): (
            c.uses_constants or (c.robust and c.ramp > 0),
            "a loss with constants, or a robust loss with --ramp",
        ),
        ("ramp",): (c.uses_constants or c.robust, "a loss with constants, or a robust loss"),
        ("attack_eps", "attack_norm", "robust_every"): (c.robust, "a robust loss"),
        ("stop_if_overfitted",): (
            c.robust and c.robust_every > 0,
            "a robust loss, and --robust-every above 0",
        ),
        ("attack_steps", "attack_start"): (
            c.robust and c.loss != "backward-smoothing",
            "a robust loss other than backward-smoothing",
        ),
        ("attack_step",): (c.robust, "a robust loss"),
        ("robust_weight",): (
            c.regularises or c.loss in ("generalised-at", "gradalign", "consistency"),
            "a robust loss of two terms",
        ),
        ("gamma",): (c.loss == "backward-smoothing", "the loss backward-smoothing"),
        ("tau", "divergence"): (c.loss == "consistency", "the loss consistency"),
        ("eps", "final_epochs"): (
            c.uses_constants or c.validate_every > 0 or not c.robust,
            "a proof: a loss with constants, or --validate-every",
        ),
        ("multiplier_rate",): (recursion, "a loss with the constants of --constants recursion"),
        ("precision",): (c.uses_constants, "a loss with constants"),
        ("power_iterations",): (c.uses_constants and not recursion, "--constants naive or liplt"),
        ("temperature",): (c.loss == "margin", "the loss margin"),
        ("trades",): (c.loss == "gloro-trades", "the loss gloro-trades"),
        ("smoothing",): (c.loss in ("crm", "cross-entropy"), "the loss crm or cross-entropy"),
    }


def _other_uses(c: Any) -> _Uses:
    """The same for settings of network, optimiser and data."""
    from lipbounds.training.models import prescribed
    from lipbounds.training.own_data import is_own

    named = prescribed(c.arch)
    watched = c.warmup + c.ramp + c.stop_if_uncertified
    return {
        ("stop_if_uncertified",): (
            watched <= c.epochs,
            f"more than {c.epochs} epochs, as warm-up, ramp and those that it waits for take {watched}",
        ),
        ("decay_from",): (
            c.schedule != "constant" and not c.milestones,
            "a schedule that decays, and no milestones",
        ),
        ("final_learning_rate",): (
            c.ends_at_final_rate,
            "a schedule that ends at a given rate (exponential, cosine or cyclic, begun before the last epoch)",
        ),
        ("angle",): (
            named is not None and named[0] == "lipnext" and named[1].get("kind", "stiefel") == "stiefel",
            "a network of stiefel layers, such as --arch lipnext-L2-4W32",
        ),
        ("activation",): (
            named is None,
            "a network with activations to choose, such as --arch 6C2F or widths",
        ),
        ("initialisation",): (
            named is None or named[0] == "batch_norm",
            "a network with plain layers, such as --arch 6C2F, resnet18 or widths",
        ),
        ("data_dir",): (
            c.dataset != "digits" and not is_own(c.dataset),
            "a data set with official files, such as --dataset mnist",
        ),
        ("border",): (c.crop > 0, "--crop"),
        ("momentum",): (c.optimiser == "sgd", "--optimiser sgd"),
        ("nesterov",): (c.optimiser == "sgd" and c.momentum > 0, "--optimiser sgd, and --momentum above 0"),
        ("ema_decay",): (c.average == "ema", "--average ema"),
        ("average_from",): (c.average != "none", "--average ema or swa"),
    }


def _run(folder: Any, settings: Any, data_dir: str | None, log: LogName | None) -> None:
    """Train, or resume where settings is None, with a progress bar; certify the test images and write the report."""
    from lipbounds.analysis.training_report import final_record, remarks, write_training_report
    from lipbounds.training import callbacks, loop, parallel, runs

    resumed = settings is None
    try:
        writers = [] if log is None else [callbacks.writer(log, Path(folder))]
    except ImportError as error:
        raise ValueError(str(error)) from error
    settings = runs.read(folder) if resumed else settings
    leads = parallel.devices().leads
    with tables.training(settings.epochs, quiet=not leads) as tell:

        def show(record: Json) -> None:
            tell(record, _line(record, settings))

        if resumed:
            fitted = loop.resume(folder, data_dir=data_dir, progress=show, callbacks=writers)
        else:
            fitted = loop.fit(settings, out=folder, progress=show, callbacks=writers)
    parallel.leave()
    if not leads:
        return
    with tables.working() as say:
        final = final_record(fitted, None if data_dir is None else Path(data_dir), say)
    said = remarks(fitted, final)
    page = write_training_report(folder, settings, list(fitted.log), final, said)
    for line in (
        f"{final['images']} test images: {', '.join(_shares(final, settings))}",
        *said,
        f"report: {page}",
        f"next:   lipbounds evaluate {shlex.quote(str(folder))}",
    ):
        tables.say(tables.console(), line)


def _shares(final: Json, settings: Any) -> list[str]:
    """What is known about the test images."""
    found = [f"{100 * final['clean']:.2f} % clean"]
    if "pgd_accuracy" in final:
        found.append(
            f"{100 * final['pgd_accuracy']:.2f} % under PGD at {settings.attack_norm} {settings.attack_eps:.4g} "
            "(an upper estimate of the robust accuracy)"
        )
    if "certified" in final:
        proof = f"({final['method']}, {final['guarantee']})"
        found.append(f"{percent(final['certified'], 'down')} % certified at eps {settings.eps:g} {proof}")
    return found


def _line(record: Json, settings: Any) -> str:
    """An epoch in one line."""
    text = f"loss {record['loss']:.4g}, {100 * record['accuracy']:.1f} % correct in training"
    if record["skipped"] or record["failed"]:
        text += f", {record['skipped']} steps skipped, {record['failed']} without constants"
    if record.get("certified_estimate") is not None and "clean" not in record:
        text += f", {100 * record['certified_estimate']:.1f} % certified (estimate)"
    if record.get("pgd_accuracy") is not None:
        text += f", {100 * record['pgd_accuracy']:.1f} % under PGD"
    if "clean" in record:
        clean, certified = 100 * record["clean"], percent(record["certified"], "down", 1)
        text += f"; {clean:.1f} % clean and {certified} % certified at eps {settings.eps:g}"
        text += f" ({record['guarantee']}, {record['images']} {record['part']} images)"
    return f"{text}; WARNING: {record['warning']}" if "warning" in record else text
