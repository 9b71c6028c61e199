"""The command line: `lipbounds demo`, `bounds`, `certify`, `verify`, `train`, `evaluate`, `forge`.

Exit codes: 0 done, 1 the computation refused or failed (one message on stderr), 2 wrong usage.
Everything heavy is imported inside the commands.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lipbounds._cli import tables, train
from lipbounds._cli.common import (
    Json,
    Reading,
    bound_of,
    check_certificate,
    check_target,
    choose_method,
    load_form,
    norm_of,
    read_data,
    refusals,
    write_record,
)
from lipbounds._cli.evaluate import ManyValues, evaluate
from lipbounds._cli.forge import ManyRatios, forge
from lipbounds._cli.options import (
    AnyVerb,
    BoxOption,
    CertificateOption,
    ConstantOption,
    DropOption,
    ForceOption,
    Guarantee,
    JsonOption,
    ManyNumbers,
    MeanOption,
    MemoryOption,
    ModelPath,
    Multipliers,
    MultipliersOption,
    Norm,
    NormOption,
    OutputOption,
    Proof,
    RefineOption,
    Scaling,
    ScalingOption,
    SeedOption,
    ShapeOption,
    Solver,
    SolverOption,
    StdOption,
    Verb,
    box_of,
    eps_of,
    shape_of,
)
from lipbounds._text.version import __version__

_DEFAULT = "lipsdp; liplt with --scaling or in norm 1"


class Commands(TyperGroup):
    """Gives `train` its options when it is called: they come from `Config`, which takes a second to import."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, train.command() if name == "train" else command, rest


app = typer.Typer(
    name="lipbounds",
    cls=Commands,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lipbounds {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop."),
    ] = False,
) -> None:
    """How far must an input move before a network's answer can change? With a proof.

    Start with the demo. It trains small networks on real digits and leaves their weights beside the
    report, where the other commands can take them up:

    - `lipbounds demo` writes `report/report.html`

    - `lipbounds bounds report/mlp.safetensors --pairwise` bounds the Lipschitz constants

    - `lipbounds certify report/mlp.safetensors --eps 0.1 0.25` certifies the test images

    - `lipbounds verify mlp.certificate --model report/mlp.safetensors` proves a saved bound again

    - `lipbounds train crm --out runs/digits` trains a network for its certified radii

    - `lipbounds evaluate runs/digits` attacks and certifies it

    - `lipbounds forge runs/digits` zeroes small activations and measures what that does

    What a result is worth is part of it. **verified** holds with every rounding error included,
    **probabilistic** except with a stated probability, **assumed** if what you declared is true; an
    **estimate** is no bound.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
    """


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", file_okay=False, help="Where to write.")
    ] = Path("report"),
    seed: SeedOption = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 40,
    force: ForceOption = False,
) -> None:
    """Train small networks on digits, one by CRM, bound them every way, certify them, write a report.

    Takes a few minutes at most and downloads nothing. Writes to the folder: `report.html` (one page with
    everything in it), the figures as PNG, `results.json`, and the models as `.safetensors`.

    Examples:

    - `lipbounds demo`

    - `lipbounds demo --out /tmp/digits --seed 1 --epochs 10`
    """
    with refusals():
        from lipbounds.analysis.demo import RESULTS, is_ours, run_demo

        if out.exists() and any(out.iterdir()) and not is_ours(out / RESULTS) and not force:
            raise ValueError(
                f"{out} holds files that are not ours (no {RESULTS} written by lipbounds): "
                "choose another folder with --out, or pass --force to write there anyway"
            )
        console = tables.console()
        command = f"lipbounds demo --out {out} --seed {seed} --epochs {epochs}"
        with tables.progress(console) as bar:
            task = bar.add_task("starting", total=1.0)
            results = run_demo(
                out,
                seed=seed,
                epochs=epochs,
                command=command,
                progress=lambda what, share: bar.update(task, description=what, completed=share),
            )
            bar.update(task, description="done", completed=1.0)
        for model in results["models"]:
            console.print()
            console.print(tables.results_table(model, tables.model_title(model)))
        tables.say(console, f"report: {out / 'report.html'}")
        tables.say(console, f"next:   lipbounds certify {out / 'mlp.safetensors'} --eps 0.1 0.25")


@app.command()
def bounds(
    model: ModelPath,
    norm: NormOption = Norm.two,
    pairwise: Annotated[
        bool, typer.Option("--pairwise", help="Also a constant for every pair of classes.")
    ] = False,
    guarantee: Annotated[Guarantee, typer.Option(help="Required guarantee.")] = Guarantee.auto,
    method: Annotated[
        AnyVerb | None,
        typer.Option(help="The bound, or every one side by side.", show_default=_DEFAULT),
    ] = None,
    scaling: ScalingOption = Scaling.none,
    solver: SolverOption = Solver.recursion,
    multipliers: MultipliersOption = Multipliers.neuron,
    refine: RefineOption = 0,
    certificate: CertificateOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    drop: DropOption = None,
    shape: ShapeOption = None,
    output: OutputOption = None,
    constant: ConstantOption = None,
    seed: SeedOption = 0,
    memory: MemoryOption = None,
    json: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Bound the Lipschitz constants of a saved model, or of an ONNX file.

    The constant says by how much the outputs can change for each unit that the input moves, in the norm
    chosen and in the model's own input units. LipSDP is the tightest bound and takes seconds to a minute;
    LipLT takes milliseconds on small dense networks, and half a second to two minutes on large
    convolutional ones.

    Examples:

    - `lipbounds bounds report/mlp.safetensors`

    - `lipbounds bounds report/mlp.safetensors --pairwise --certificate mlp.certificate`

    - `lipbounds bounds report/mlp.safetensors --method liplt --scaling optimized`

    - `lipbounds bounds report/residual_cnn.safetensors --norm inf --method all --json bounds.json`

    - `lipbounds bounds net.onnx --method liplt`

    - `lipbounds bounds net.onnx --method liplt --guarantee verified --memory 4GB`

    - `lipbounds bounds net.onnx --shape 3,64,64 --output logits --constant temperature=2`
    """
    lipsdp_only = {
        "--solver": solver is not Solver.recursion,
        "--multipliers": multipliers is not Multipliers.neuron,
        "--refine": refine > 0,
        "--certificate": certificate is not None,
    }
    chosen = choose_method(method, norm, scaling, any(lipsdp_only.values()))
    for name, given in lipsdp_only.items():
        if given and chosen != "lipsdp":
            raise typer.BadParameter(f"belongs to --method lipsdp, not {chosen}", param_hint=name)
    if refine and not (pairwise and solver is Solver.recursion):
        raise typer.BadParameter(
            "refines pairs of the recursion: it takes --pairwise and no other --solver", param_hint="--refine"
        )
    if certificate is not None and guarantee is Guarantee.estimate:
        raise typer.BadParameter("an estimate has no certificate", param_hint="--certificate")
    if memory is not None and chosen == "all":
        raise typer.BadParameter("belongs to one method, not to all", param_hint="--memory")
    how = Reading(mean, std, drop and drop.value, shape_of(shape), output, tuple(constant or ()))
    with refusals() as stack:
        check_target(json, force)
        check_certificate(certificate, force)
        import lipbounds as lb
        from lipbounds.analysis.experiment import result_kind, result_record

        form, _ = load_form(model, how, stack)
        options: Json = {
            "norm": norm_of(norm),
            "pairwise": pairwise,
            "guarantee": guarantee.value,
            "seed": seed,
        }
        if memory is not None:
            options["memory"] = memory
        record: Json = {"upper": [], "lower": [], "estimate": [], "refused": []}
        if chosen == "all":
            with tables.working() as tell:
                comparison = lb.compare(form, **options, progress=tell)
            typer.echo(repr(comparison))
            for row in comparison:
                if row.kind == "none":
                    record["refused"].append({"label": row.method, "norm": norm.value, "reason": row.reason})
                else:
                    record[row.kind].append(result_record(row.method, row.result))
        else:
            if chosen == "lipsdp":
                options |= {"solver": solver.value, "multipliers": multipliers.value, "refine": refine}
            result = bound_of(form, chosen, scaling, options)
            typer.echo(repr(result))
            record[result_kind(result)].append(result_record(chosen, result))
            if certificate is not None:
                lb.save_certificate(result, certificate, overwrite=force)
                typer.echo(f"certificate: {certificate}")
                typer.echo(f"check it:    lipbounds verify {certificate} --model {model}")
        write_record(json, {"model": str(model), **record})


@app.command(cls=ManyNumbers)
def certify(
    model: ModelPath,
    eps: Annotated[
        list[float] | None,
        typer.Option(
            "--eps",
            metavar="NUMBER...",
            parser=eps_of,
            help="Radii to certify at, in input units; several may follow.",
        ),
    ] = None,
    data: Annotated[
        str, typer.Option(help="`digits` (the demo's test images) or a .npz file with arrays x and y.")
    ] = "digits",
    norm: NormOption = Norm.two,
    method: Annotated[
        Verb | None, typer.Option(help="The bound that proves the radii.", show_default=_DEFAULT)
    ] = None,
    scaling: ScalingOption = Scaling.none,
    guarantee: Annotated[Proof, typer.Option(help="Required guarantee.")] = Proof.auto,
    pairwise: Annotated[
        bool,
        typer.Option("--pairwise/--no-pairwise", help="One constant per pair of classes, or one for all."),
    ] = True,
    local: Annotated[
        bool, typer.Option("--local", help="Also bound the network around every image: larger radii.")
    ] = False,
    box: BoxOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    drop: DropOption = None,
    shape: ShapeOption = None,
    output: OutputOption = None,
    constant: ConstantOption = None,
    seed: SeedOption = 0,
    memory: MemoryOption = None,
    json: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Certify images: no input closer than eps changes the answer.

    An image counts if it is classified correctly and its certified radius exceeds eps. Radii are in the
    units of the model's own input: for the demo's models pixel values in [0, 1]. What --mean and --std put in
    front of the network belongs to it, so radii are those of the raw input.

    Examples:

    - `lipbounds certify report/mlp.safetensors --eps 0.1 0.25 0.5`

    - `lipbounds certify report/mlp.safetensors --data mine.npz --method liplt --json radii.json`

    - `lipbounds certify net.onnx --data mine.npz --mean 0.5,0.5,0.5 --std 0.2,0.2,0.2 --local --eps 0.3`
    """
    inside = box_of(box)
    if inside is not None and not local:
        raise typer.BadParameter("belongs to --local", param_hint="--box")
    chosen = choose_method(method, norm, scaling, False)
    levels = sorted(set(eps or (0.05, 0.1, 0.25)))
    how = Reading(mean, std, drop and drop.value, shape_of(shape), output, tuple(constant or ()))
    with refusals() as stack:
        check_target(json, force)
        import jax
        import numpy as np

        import lipbounds as lb

        form, sizes = load_form(model, how, stack, inside)
        x, y = read_data(data, sizes)
        if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
            x = x.astype(np.float64)
        options: Json = {
            "norm": norm_of(norm),
            "pairwise": pairwise,
            "guarantee": guarantee.value,
            "seed": seed,
            "memory": memory,
        }
        bound = bound_of(form, chosen, scaling, options)
        with tables.working() as tell:
            radii = lb.certified_radius(
                form,
                x,
                y,
                bound=bound,
                local=local,
                guarantee="verified" if guarantee is Proof.verified else "auto",
                seed=seed,
                box=inside,
                progress=tell,
            )
        radius = np.asarray(radii.radius)
        if not len(radius):
            raise ValueError(f"{data} holds no images")
        shares = [float(radii.accuracy(level)) for level in levels]
        tables.print_certified(bound, radii, levels, shares)
        write_record(
            json,
            {
                "model": str(model),
                "data": data,
                "norm": norm.value,
                "bound": {
                    "kind": "upper",
                    "method": bound.method,
                    "value": bound.value,
                    "guarantee": bound.guarantee,
                },
                "guarantee": radii.guarantee,
                "notes": list(radii.notes),
                "images": len(radius),
                "certified_accuracy": [
                    {"eps": e, "accuracy": a} for e, a in zip(levels, shares, strict=True)
                ],
                "radius": [float(r) if math.isfinite(r) else "inf" for r in radius],
            },
        )


@app.command()
def verify(
    certificate: Annotated[
        Path,
        typer.Argument(
            metavar="CERT",
            exists=True,
            dir_okay=False,
            show_default=False,
            help="A certificate, such as `lipbounds bounds --certificate` writes.",
        ),
    ],
    model: Annotated[
        Path,
        typer.Option(
            "--model", metavar="MODEL", exists=True, dir_okay=False, help="The model that it is about."
        ),
    ],
    mean: MeanOption = None,
    std: StdOption = None,
    drop: DropOption = None,
    shape: ShapeOption = None,
    output: OutputOption = None,
    constant: ConstantOption = None,
) -> None:
    """Prove a saved bound again, from the weights of the model.

    Nothing in the file is trusted but the multipliers, and they are only candidates: what they prove is
    computed anew with every rounding error included, and compared with what the file claims. Exit code 0
    and one line if all of it holds, 1 and the reason otherwise.

    Examples:

    - `lipbounds verify mlp.certificate --model report/mlp.safetensors`

    - `lipbounds verify mlp.certificate --model report/mlp.safetensors && echo proved`
    """
    how = Reading(mean, std, drop and drop.value, shape_of(shape), output, tuple(constant or ()))
    with refusals() as stack:
        from lipbounds._lipsdp.certificate import check, load_certificate
        from lipbounds.errors import CertificateError

        form, _ = load_form(model, how, stack)
        begin = time.perf_counter()
        try:
            claims = load_certificate(certificate)
            check(claims, form)
        except CertificateError as error:
            raise CertificateError(f"{certificate} is refused: {error}") from error
        typer.echo(tables.proved(claims, time.perf_counter() - begin))


app.command("train", help=train.train.__doc__)(lambda: None)
app.command(cls=ManyValues)(evaluate)
app.command(cls=ManyRatios)(forge)


def main() -> None:
    """Entry point of the `lipbounds` script."""
    app()


if __name__ == "__main__":
    main()
