"""The command line: `lipbounds demo`, `bounds`, `certify`, `verify`, `attack` and those about trained networks.

Exit codes: 0 success, 1 error (one message on stderr), 2 wrong usage, 130 Ctrl-C. `training` and `analysis` are
imported inside the commands.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

import lipbounds as lb
from lipbounds._cli import common, programs, tables, train
from lipbounds._cli.attack import attack
from lipbounds._cli.certify import certify
from lipbounds._cli.common import Json, refusals
from lipbounds._cli.evaluate import evaluate
from lipbounds._cli.forge import forge
from lipbounds._cli.options import (
    DEFAULT_METHOD,
    Command,
    DeviceOption,
    ForceOption,
    MemoryOption,
    ModelPath,
    NormOption,
    Output,
    Reading,
    ScalingOption,
    Search,
    SeedOption,
    grouped,
    option,
)
from lipbounds._cli.reproduce import reproduce
from lipbounds._text import near, reporting
from lipbounds._text.files import check_folder, is_special
from lipbounds._text.version import __version__
from lipbounds.errors import CertificateError
from lipbounds.results import Guarantee

_INTERRUPTED = 130  # exit code after Ctrl-C


class Commands(TyperGroup):
    """Builds the options of `train` only when needed, as they come from `Config`, which takes a second to import.

    A word that is none of those of its option is answered with the nearest one.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, train.command() if name == "train" else command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            if found := re.fullmatch(
                r"(?:Value error, )?'(.*)' is not one of (.*?)\.?", error.message, re.DOTALL
            ):
                word, known = found.groups()
                words = [one.strip(" '\n") for one in known.split(",")]
                error.message = f"{word!r} is not one of {', '.join(words)}{near(word, words)}"
            raise


app = typer.Typer(
    name="lipbounds",
    cls=Commands,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lipbounds {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    ctx: typer.Context,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Keep compiled programs for the next run, in the folder `lipbounds` of the user's cache or in "
            f"{programs.VARIABLE} ('off': nowhere). A folder chosen for jax is used as it is.",
        ),
    ] = True,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Prove how far an input must move before the predicted class of a neural network can change.

    Start with the demo, which bounds small networks of real digits and saves them for the other commands:

    - `lipbounds demo` writes `report/report.html`

    - `lipbounds bounds report/mlp.safetensors --pairwise` bounds their Lipschitz constants

    - `lipbounds certify report/mlp.safetensors --eps 0.1 0.25` certifies the test images

    - `lipbounds attack report/mlp.safetensors --eps 0.25` searches for images that break it

    - `lipbounds verify mlp.certificate --model report/mlp.safetensors` proves a saved bound again

    - `lipbounds train crm --out runs/digits` trains a network for its certified radii

    - `lipbounds evaluate runs/digits` attacks and certifies it

    - `lipbounds forge runs/digits` zeroes small activations and measures the effect

    - `lipbounds reproduce table1 --data-dir data --out runs/table1` trains the rows of a paper's table

    Every result states its guarantee: **verified** holds with every rounding error included,
    **probabilistic** except with a stated probability, **assumed** if the slopes that you declared are correct;
    an **estimate** is not a bound.

    Exit codes: 0 success, 1 error, 2 wrong usage.
    """
    ctx.with_resource(programs.kept(cache))


@app.command()
def demo(
    out: Annotated[Path, option("Folder of the report.", "FOLDER", file_okay=False)] = Path("report"),
    seed: SeedOption = 0,
    epochs: Annotated[int, option("Passes over the training images.", "N", min=1)] = 40,
    force: ForceOption = False,
) -> None:
    """Bound and certify small networks of real digits by every method, and write a report.

    Trains one network and compares it with two that are installed. Takes about a minute and downloads nothing.
    Writes to the folder: `report.html` (one page with everything in it), the figures as PNG, `results.json`, and
    the models as `.safetensors`.

    Examples:
    - `lipbounds demo`

    - `lipbounds demo --out /tmp/digits --seed 1 --epochs 10`
    """
    from lipbounds.analysis.demo import RESULTS, finished, is_ours, run_demo

    def left() -> str:
        report = (
            f"the finished report in {out} is kept"
            if finished(out)
            else f"the report in {out} is not finished"
        )
        return f"{report}; give the same command again"

    with refusals(left):
        check_folder(out)
        if out.exists() and any(out.iterdir()) and not is_ours(out / RESULTS) and not force:
            raise ValueError(
                f"{out} holds files that lipbounds did not create (there is no {RESULTS} of ours): "
                "choose another folder with --out, or pass --force to write there anyway"
            )
        console = tables.console()
        with tables.progress(console) as tell:
            results = run_demo(
                out,
                seed=seed,
                epochs=epochs,
                command=f"lipbounds demo --out {shlex.quote(str(out))} --seed {seed} --epochs {epochs}",
                progress=tell,
            )
            tell("done", 1.0)
        for model in results["models"]:
            console.print()
            tables.show_table(console, tables.results_table(model, tables.model_title(model)))
        tables.say(console, f"report: {out / 'report.html'}")
        tables.say(
            console, f"next:   lipbounds certify {shlex.quote(str(out / 'mlp.safetensors'))} --eps 0.1 0.25"
        )


@app.command(cls=Command)
@grouped
def bounds(
    *,
    model: ModelPath,
    norm: NormOption = "2",
    pairwise: Annotated[bool, option("Also bound every pair of classes.", None, "--pairwise")] = False,
    guarantee: Annotated[Guarantee, option("Required guarantee.")] = "auto",
    method: Annotated[
        Literal["naive", "liplt", "lipsdp", "all"] | None,
        option("Bound to compute, or all of them side by side.", show_default=DEFAULT_METHOD),
    ] = None,
    scaling: ScalingOption = "none",
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    files: Output,
    search: Search,
    reading: Reading,
) -> None:
    """Bound the Lipschitz constants of a saved model, or of an ONNX file.

    A Lipschitz constant limits how much the outputs change per unit of change of the input, in the chosen norm
    and in the units of the model's own input. LipSDP is the tightest bound and takes seconds to a minute;
    LipLT takes milliseconds on small dense networks, and half a second to two minutes on large
    convolutional ones.

    Examples:
    - `lipbounds bounds report/mlp.safetensors`

    - `lipbounds bounds report/mlp.safetensors --pairwise --certificate mlp.certificate`

    - `lipbounds bounds report/mlp.safetensors --method liplt --scaling optimized`

    - `lipbounds bounds report/cnn_crm.safetensors --norm inf --method all --json bounds.json`

    - `lipbounds bounds net.onnx --method liplt`

    - `lipbounds bounds net.onnx --method liplt --guarantee verified --memory 4GB`

    - `lipbounds bounds net.onnx --shape 3,64,64 --output logits --constant temperature=2`
    """
    chosen = common.choose_method(method, norm, scaling, bool(search.given()))
    _check_search(search, chosen, pairwise, guarantee)
    outputs = {"--certificate": search.certificate, "--json": files.json}
    common.check_apart(outputs, common.files_read(model, reading))
    if memory is not None and chosen == "all":
        raise typer.BadParameter("applies to a single method, not to all", param_hint="--memory")
    with refusals() as stack:
        from lipbounds._lipsdp.certificate_file import is_certificate
        from lipbounds.analysis.experiment import result_kind, result_record

        common.check_json(files)
        common.check_free(search.certificate, files.force, is_certificate, "is not a certificate")
        form, _ = common.load_form(model, reading, stack)
        options: Json = {"norm": float(norm), "pairwise": pairwise, "guarantee": guarantee, "seed": seed}
        options["device"] = device
        if memory is not None:
            options["memory"] = memory
        record: Json = {"model": str(model), "upper": [], "lower": [], "estimate": [], "refused": []}
        if chosen == "all":
            result = _compare(form, norm, options, record)
        else:
            options |= search.options() if chosen == "lipsdp" else {}
            result = common.bound_of(form, chosen, scaling, options)
            record[result_kind(result)].append(result_record(chosen, result))
        with tables.afterwards(lambda: typer.echo(repr(result))) as lines:
            if search.certificate is not None:
                free = files.force or is_special(search.certificate)  # a pipe or a device holds nothing
                lb.save_certificate(result, search.certificate, overwrite=free)
                lines.append(f"certificate: {search.certificate}")
                again = shlex.join(["lipbounds", "verify", str(search.certificate), "--model", str(model)])
                lines.append(f"check it:    {again}")
            common.write_json(files.json, {**common.header(), **record})


def _check_search(search: Search, method: str, pairwise: bool, guarantee: str) -> None:
    """BadParameter for options of LipSDP that do not fit the others."""
    for name in search.given() if method != "lipsdp" else []:
        raise typer.BadParameter(f"belongs to --method lipsdp, not {method}", param_hint=name)
    if search.refine and not (pairwise and search.solver == "recursion"):
        raise typer.BadParameter(
            "refines pairs of the recursion: pass --pairwise, and leave out --solver", param_hint="--refine"
        )
    if search.certificate is not None and guarantee == "estimate":
        raise typer.BadParameter("an estimate has no certificate", param_hint="--certificate")


def _compare(form: Any, norm: str, options: Json, record: Json) -> Any:
    """Every bound, and added to the record."""
    from lipbounds.analysis.experiment import result_record

    with tables.working() as tell:
        comparison = lb.compare(form, **options, progress=tell)
    for row in comparison:
        if row.kind == "none":
            record["refused"].append({"label": row.method, "norm": norm, "reason": row.reason})
        else:
            record[row.kind].append(result_record(row.method, row.result))
    return comparison


@app.command()
@grouped
def verify(
    *,
    certificate: Annotated[
        Path,
        typer.Argument(
            metavar="CERT",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="Certificate, as `lipbounds bounds --certificate` writes it.",
        ),
    ],
    model: Annotated[
        Path, option("Model of the certificate.", "MODEL", "--model", exists=True, dir_okay=False)
    ],
    reading: Reading,
) -> None:
    """Prove a saved bound again, from the weights of the model.

    The file is not trusted: what its multipliers prove is computed again with every rounding error included,
    and compared with its claims. Exit code 0 and one line if all of them hold, otherwise 1 and the reason.

    Examples:
    - `lipbounds verify mlp.certificate --model report/mlp.safetensors`

    - `lipbounds verify mlp.certificate --model report/mlp.safetensors && echo proved`
    """
    with refusals() as stack:
        from lipbounds._lipsdp.certificate import check, read_certificate

        form, _ = common.load_form(model, reading, stack)
        begin = time.perf_counter()
        try:
            claims = read_certificate(certificate)
            with tables.working() as tell, reporting(tell):
                check(claims, form)
        except CertificateError as error:
            raise CertificateError(f"{certificate} is rejected: {error}") from error
        typer.echo(tables.proved(claims, time.perf_counter() - begin))


app.command(cls=Command)(certify)
app.command("train", help=train.train.__doc__)(lambda: None)
app.command(cls=Command)(evaluate)
app.command(cls=Command)(attack)
app.command(cls=Command)(forge)
app.command()(reproduce)


def keep_interrupts() -> None:
    """Raise every KeyboardInterrupt again that Python ignores.

    JAX has a callback at every collection of garbage, and Ctrl-C inside of it would be lost.
    """
    usual = sys.unraisablehook

    def hook(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            usual(ignored)
            return
        # once this hook is left, as inside of it the interrupt would be ignored again
        again = threading.Timer(0.05, _thread.interrupt_main)
        again.daemon = True
        with contextlib.suppress(RuntimeError):  # the interpreter ends
            again.start()

    sys.unraisablehook = hook


def main() -> None:
    """Entry point of the `lipbounds` script."""
    tables.print_anywhere()
    keep_interrupts()
    try:
        app()
    except SystemExit as end:
        # Threads of XLA may still compute, and the end of the interpreter would crash.
        if end.code == _INTERRUPTED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
