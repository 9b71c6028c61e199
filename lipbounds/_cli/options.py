"""Arguments and options that several commands of `lipbounds` take."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

import lipbounds as lb
from lipbounds._text.arguments import check_seed, near

Norm = Literal["1", "2", "inf"]
Verb = Literal["naive", "liplt", "lipsdp"]
Device = Literal["auto", "cpu", "gpu"]
VERBS = typing.get_args(Verb)
DEFAULT_METHOD = "lipsdp; liplt with --scaling or in norm 1"


def words(function: Callable[..., Any], option: str, *more: str) -> Any:
    """The Literal of `more` and the words that an option of a library function accepts."""

    def found(hint: Any) -> list[str]:
        if isinstance(hint, str):
            return [hint]
        return [word for part in typing.get_args(hint) for word in found(part)]

    return Literal[(*more, *found(typing.get_type_hints(function)[option]))]


if TYPE_CHECKING:
    Solver = str
    Multipliers = str
    Scaling = str
else:
    Solver, Multipliers = words(lb.lipsdp, "solver"), words(lb.lipsdp, "multipliers")
    Scaling = words(lb.liplt, "scaling", "none")


# ------------------------------------------------------------------------------------------- values from text
def number(text: str) -> float:
    """0.1, 8/255 or 2^-7 as a number; ValueError for anything else."""
    try:
        if "/" in text:
            above, below = text.split("/")
            return float(above) / float(below)
        base, power, exponent = text.replace("**", "^").partition("^")
        value = float(base) ** float(exponent) if power else float(base)
    except (ZeroDivisionError, OverflowError) as error:
        raise ValueError(str(error)) from error
    if isinstance(value, complex):
        raise ValueError(f"{text} is not a real number")
    return value


def digits(value: float) -> str:
    """A number as text that is read back as the same number, and is short where few digits do that."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def _is_number(text: str) -> bool:
    try:
        number(text)
    except ValueError:
        return False
    return True


def _is_bound(text: str) -> bool:
    """Whether a word is the name of a bound, right or misspelled."""
    return text in VERBS or bool(near(text, VERBS))


def _is_word(following: list[str]) -> bool:
    """Whether a value follows an option, right or wrong, and not another option, a file or nothing."""
    return bool(following) and not following[0].startswith("-") and not Path(following[0]).exists()


def eps_of(text: str) -> float:
    """Parse a radius."""
    value = number(text) if _is_number(text) else math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"{text!r} is not a finite number >= 0, such as 0.1 or 8/255")
    return value


def seed_of(text: Any) -> int:
    """Parse a seed."""
    try:
        return check_seed(int(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number >= 0 and below 2^63") from None


def memory_of(text: str) -> int | None:
    """Parse a memory budget, in bytes."""
    from lipbounds._gain.memory_budget import parse

    try:
        return parse(int(text) if text.isdecimal() else text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def box_of(text: str) -> tuple[float, float]:
    """Parse two numbers, such as "0,1"."""
    try:
        low, high = (number(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not two numbers such as 0,1") from None
    return low, high


def shape_of(text: str) -> tuple[int, ...]:
    """Sizes separated by commas, such as "3,32,32"."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise typer.BadParameter(f"{text!r} is not a shape such as 3,32,32")
    return sizes


# ------------------------------------------------------------------------------------------- how commands parse
class Command(TyperCommand):
    """Lets several values follow an option that may be repeated: `--eps 0.1 0.25` is `--eps 0.1 --eps 0.25`.

    `--attack` without a value is `--attack autoattack`.
    """

    values: typing.ClassVar = {"--eps": _is_number, "--c-r": _is_number, "--methods": _is_bound}
    bare: typing.ClassVar = {"--attack": "autoattack"}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for name in self.bare.keys() & {name for p in self.params for name in p.opts}:
            for at in reversed([at for at, arg in enumerate(args) if arg == name]):
                if not _is_word(args[at + 1 : at + 2]):
                    args = [*args[: at + 1], self.bare[name], *args[at + 1 :]]
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        spread: list[str] = []
        option = ""
        for arg in args:
            if option and self.values[option](arg):
                spread += [option] if spread[-1] != option else []
            else:
                name = arg.partition("=")[0]
                option = name if name in several and name in self.values else ""
            spread.append(arg)
        return super().parse_args(ctx, spread)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each dataclass parameter of a command by one option per field."""
    own = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        p.name: p.annotation for p in own.parameters.values() if dataclasses.is_dataclass(p.annotation)
    }
    parameters = []
    for p in own.parameters.values():
        if p.name in groups:
            hints = typing.get_type_hints(p.annotation, include_extras=True)
            fields = inspect.signature(p.annotation).parameters.values()
            parameters += [
                field.replace(kind=p.KEYWORD_ONLY, annotation=hints[field.name]) for field in fields
            ]
        else:
            parameters.append(p)

    @functools.wraps(command)
    def collect(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    collect.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return collect


# ------------------------------------------------------------------------------------------- single options
def option(help: str, metavar: str | None = None, *names: str, panel: str | None = None, **more: Any) -> Any:
    """A `typer.Option` with its help, metavar, names (unless derived from the parameter) and panel.

    Name it where the metavar is the parameter in capitals, which typer 0.27 would take for the name.
    """
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **more)


ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        exists=True,
        dir_okay=False,
        show_default=False,
        help="Model file written by lipbounds (.safetensors), or ONNX file (.onnx).",
    ),
]
NormOption = Annotated[Norm, option("Norm of inputs and outputs.")]
SeedOption = Annotated[int, option("Random seed.", "N", parser=seed_of)]
ScalingOption = Annotated[
    Scaling, option("Diagonal scaling of LipLT: none is the paper's recursion, optimized the tightest.")
]
MemoryOption = Annotated[
    int | None,
    option("Verify every block whose proof fits in this much memory, such as 2GB.", "SIZE", parser=memory_of),
]
DeviceOption = Annotated[
    Device, option("Where large proofs are computed: auto takes a GPU if JAX has one, cpu never does.")
]
ForceOption = Annotated[bool, option("Overwrite files that lipbounds did not create.", None, "--force")]

_shared = functools.partial(option, panel="Several processes")
CoordinatorOption = Annotated[str | None, _shared("Address of process 0.", "HOST:PORT")]
ProcessesOption = Annotated[int | None, _shared("Number of processes.", "N", min=1)]
ProcessOption = Annotated[int | None, _shared("Index of this process.", "N", min=0)]


# ------------------------------------------------------------------------------------------- groups of options
_model = functools.partial(option, panel="Reading the model")
_lipsdp = functools.partial(option, panel="LipSDP")


@dataclasses.dataclass(frozen=True)
class Reading:
    """Options for reading a model file; all but the first two are for ONNX files."""

    mean: Annotated[
        str | None,
        _model("Subtract this from the input first: a number, or one per channel (a,b,c).", "NUMBERS"),
    ] = None
    std: Annotated[
        str | None, _model("Then divide by this: a number, or one per channel (a,b,c).", "NUMBERS")
    ] = None
    drop: Annotated[
        Literal["softmax", "argmax"] | None, _model("Remove this last operation of an ONNX file.")
    ] = None
    shape: Annotated[
        Any,
        _model("Shape of one example where an ONNX file leaves it open: 3,32,32.", "SIZES", parser=shape_of),
    ] = None
    output: Annotated[str | None, _model("Output to bound, where an ONNX file has several.", "NAME")] = None
    constant: Annotated[
        list[str] | None,
        _model("Value of another input of an ONNX file: a number or an .npy file; repeatable.", "NAME=VALUE"),
    ] = None

    def words(self) -> list[str]:
        """The options that read the model in this way again."""
        shape = None if self.shape is None else ",".join(map(str, self.shape))
        given = {"mean": self.mean, "std": self.std, "drop": self.drop, "shape": shape, "output": self.output}
        found = [word for key, value in given.items() if value is not None for word in (f"--{key}", value)]
        return [*found, *(word for text in self.constant or [] for word in ("--constant", text))]


@dataclasses.dataclass(frozen=True)
class Search:
    """Options of LipSDP."""

    solver: Annotated[
        Solver, _lipsdp("Solver of LipSDP; clarabel and scs (through CVXPY) suit small networks.")
    ] = "recursion"
    multipliers: Annotated[Multipliers, _lipsdp("One multiplier per neuron (tighter) or one per layer.")] = (
        "neuron"
    )
    refine: Annotated[int, _lipsdp("Optimise the N worst pairs again, one at a time.", "N", min=0)] = 0
    certificate: Annotated[
        Path | None,
        _lipsdp("Save a certificate of the bound, for `lipbounds verify`.", "FILE", dir_okay=False),
    ] = None

    def options(self) -> dict[str, Any]:
        solver = lb.Recursion(refine=self.refine) if self.refine else self.solver
        return {"solver": solver, "multipliers": self.multipliers}

    def given(self) -> list[str]:
        """The options that differ from their defaults."""
        fields = dataclasses.fields(self)
        return [f"--{field.name}" for field in fields if getattr(self, field.name) != field.default]


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a result is written."""

    json: Annotated[Path | None, option("Also write the result as JSON.", "FILE", dir_okay=False)] = None
    force: ForceOption = False


@dataclasses.dataclass(frozen=True)
class Tables(Output):
    """Where a result is written, as a table, too."""

    csv: Annotated[Path | None, option("Also write a table, a row per image.", "FILE", dir_okay=False)] = None


@dataclasses.dataclass(frozen=True)
class Pages(Output):
    """Where the record and the page of a trained network are written."""

    out: Annotated[
        Path | None,
        option(
            "Folder for the record, the page and the figures.",
            "FOLDER",
            file_okay=False,
            show_default="the run; nothing for a model file",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained network and its data set."""

    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            exists=True,
            show_default=False,
            help="Run folder of `lipbounds train`, or a model file (.safetensors) with --dataset.",
        ),
    ]
    dataset: Annotated[str | None, option("Data set of a model file; a run records its own.", "NAME")] = None
    data_dir: Annotated[
        Path | None,
        option("Folder of the data set's files.", "DIR", file_okay=False, show_default="that of the run"),
    ] = None
