"""What the commands of `lipbounds` take: words to choose from, arguments and options."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand


class Norm(enum.StrEnum):
    one = "1"
    two = "2"
    inf = "inf"


class Guarantee(enum.StrEnum):
    auto = "auto"
    verified = "verified"
    probabilistic = "probabilistic"
    estimate = "estimate"


class Proof(enum.StrEnum):
    """The guarantees that a radius can have."""

    auto = "auto"
    verified = "verified"
    probabilistic = "probabilistic"


class Verb(enum.StrEnum):
    naive = "naive"
    liplt = "liplt"
    lipsdp = "lipsdp"


class AnyVerb(enum.StrEnum):
    naive = "naive"
    liplt = "liplt"
    lipsdp = "lipsdp"
    all = "all"


class Solver(enum.StrEnum):
    recursion = "recursion"
    clarabel = "clarabel"
    scs = "scs"


class Multipliers(enum.StrEnum):
    neuron = "neuron"
    layer = "layer"


class Scaling(enum.StrEnum):
    none = "none"
    aol = "aol"
    sll = "sll"
    optimized = "optimized"


class Drop(enum.StrEnum):
    softmax = "softmax"
    argmax = "argmax"


class ManyNumbers(TyperCommand):
    """Lets `--eps 0.1 0.25` stand for `--eps 0.1 --eps 0.25`."""

    many = "--eps"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        numbers = False
        for arg in args:
            if numbers and _is_number(arg) and spread[-1] != self.many:
                spread.append(self.many)
            elif arg.startswith("-") and not _is_number(arg):
                numbers = arg == self.many or arg.startswith(f"{self.many}=")
            elif not _is_number(arg):
                numbers = False
            spread.append(arg)
        return super().parse_args(ctx, spread)


def number(text: str) -> float:
    """0.1, 8/255 or 2^-7 as a number; ValueError for anything else."""
    if "/" in text:
        above, below = text.split("/")
        return float(above) / float(below)
    base, power, exponent = text.replace("**", "^").partition("^")
    return float(base) ** float(exponent) if power else float(base)


def eps_of(text: str) -> float:
    """A radius as the commands read it."""
    try:
        value = number(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = -1.0
    if not (isinstance(value, float) and math.isfinite(value) and value >= 0):
        raise typer.BadParameter(f"{text!r} is no finite number >= 0, such as 0.1 or 8/255")
    return value


def memory_of(text: str) -> int:
    """A memory budget as the commands read it, in bytes."""
    from lipbounds._gain.memory_budget import parse

    try:
        size = parse(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    assert size is not None
    return size


def box_of(text: str | None) -> tuple[float, float] | None:
    """Two numbers, "0,1"."""
    if text is None:
        return None
    try:
        low, high = (number(part) for part in text.split(","))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not two numbers such as 0,1") from None
    return low, high


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Numbers with commas between them, "3,32,32"."""
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise typer.BadParameter(f"{text!r} is no shape such as 3,32,32", param_hint="--shape")
    return sizes


def _is_number(text: str) -> bool:
    try:
        number(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return False
    return True


ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        exists=True,
        dir_okay=False,
        show_default=False,
        help="A model file of ours (.safetensors), such as the demo writes, or an ONNX file (.onnx).",
    ),
]
NormOption = Annotated[Norm, typer.Option(help="Norm in which the input moves.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
ScalingOption = Annotated[
    Scaling,
    typer.Option(help="Diagonal scaling of LipLT: none is the paper's recursion, optimized the tightest."),
]
SolverOption = Annotated[
    Solver, typer.Option(help="How LipSDP is solved; clarabel and scs (CVXPY) are for small networks.")
]
MultipliersOption = Annotated[
    Multipliers, typer.Option(help="Multipliers of LipSDP: one per neuron (tighter), or one per layer.")
]
RefineOption = Annotated[
    int, typer.Option(metavar="N", min=0, help="LipSDP: optimise the N worst pairs once more, each alone.")
]
CertificateOption = Annotated[
    Path | None,
    typer.Option(
        "--certificate",
        metavar="FILE",
        dir_okay=False,
        help="Save what proves a LipSDP bound, for `lipbounds verify`.",
    ),
]
MemoryOption = Annotated[
    int | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=memory_of,
        help="Memory of the proofs, such as 2GB: larger operators are then verified where their proof fits.",
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Also write the result as JSON.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite files that lipbounds did not create.")]
RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        exists=True,
        show_default=False,
        help="A folder that `lipbounds train` wrote, or a model file (.safetensors) with --dataset.",
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        file_okay=False,
        show_default="the run's own",
        help="Folder of the data set's files.",
    ),
]
DatasetOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The data set of a model file; a run knows its own.")
]
BoxOption = Annotated[
    str | None,
    typer.Option(metavar="LOW,HIGH", help="With --local: only inputs between these count, 0,1 for pixels."),
]
MeanOption = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBERS", help="Subtracted from the input first: a number, or one per channel, a,b,c."
    ),
]
StdOption = Annotated[
    str | None, typer.Option(metavar="NUMBERS", help="Then divided by: a number, or one per channel, a,b,c.")
]
DropOption = Annotated[
    Drop | None, typer.Option(help="Leave out the last operation of an ONNX file, if it is this one.")
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZES",
        help="Shape of one example, without the batch, where an ONNX file leaves it free: 3,32,32.",
    ),
]
OutputOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The output to bound, where an ONNX file has several.")
]
ConstantOption = Annotated[
    list[str] | None,
    typer.Option(
        "--constant",
        metavar="NAME=VALUE",
        help="Value of a further input of an ONNX file: a number, or an .npy file with the array; may be repeated.",
    ),
]
