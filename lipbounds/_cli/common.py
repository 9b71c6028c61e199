"""Shared by the commands: error messages, reading of models and data, writing of results."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

import lipbounds as lb
from lipbounds._cli import tables
from lipbounds._cli.options import Norm, Output, Reading, number
from lipbounds._text.files import check_writable, how_to_export
from lipbounds._text.version import __version__
from lipbounds.errors import GuaranteeError

Json = dict[str, Any]
QUICK_LIPSDP = 2048  # neurons above which LipSDP takes minutes on a CPU
DEFAULT_OF_SIZE = f"lipsdp up to {QUICK_LIPSDP} neurons; liplt above, or with --scaling"


@contextlib.contextmanager
def refusals(left: str | Callable[[], str] = "nothing was written") -> Iterator[contextlib.ExitStack]:
    """Report errors of the library and of files as one message on stderr, with exit code 1.

    Ctrl-C is one with exit code 130; `left` says what it leaves. Contexts entered into the stack, such as the float64
    mode of `load_form`, are left at the end.
    """
    try:
        with contextlib.ExitStack() as stack:
            yield stack
        return
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {left() if callable(left) else left}", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise  # whoever read the output has seen enough: typer ends the command without a message
    except (ValueError, ArithmeticError, OSError, GuaranteeError) as error:
        message = str(error)
    except jax.errors.JaxRuntimeError as error:  # no memory on a device, or no answer from a coordinator
        message = str(error).splitlines()[0]
    typer.echo(f"lipbounds: {message}", err=True)
    raise typer.Exit(1)


def choose_method(method: str | None, norm: Norm, scaling: str, lipsdp_only: bool) -> str:
    """The requested method; by default LipSDP, or LipLT where the other options require it."""
    scaled = scaling != "none"
    if method is None:
        method = "liplt" if (scaled or norm == "1") and not lipsdp_only else "lipsdp"
    if scaled and method != "liplt":
        raise typer.BadParameter(f"only --method liplt has a scaling, not {method}", param_hint="--scaling")
    return method


def method_of_size(method: str, form: Any) -> str:
    """The default of a command that should answer in seconds: LipLT where LipSDP would take minutes, and says so."""
    neurons = sum(tap.size_in for tap in form.taps)
    if method != "lipsdp" or neurons <= QUICK_LIPSDP:
        return method
    typer.echo(
        f"bound: LipLT, as the network has {neurons} neurons; --method lipsdp is tighter and takes minutes",
        err=True,
    )
    return "liplt"


def bound_of(form: Any, method: str, scaling: Any, options: Json) -> Any:
    if method == "naive":
        return lb.naive(form, **options)
    if method == "liplt":
        return lb.liplt(form, **options, scaling=None if scaling == "none" else scaling)
    with tables.working() as tell:
        return lb.lipsdp(form, **options, progress=tell)


def best_in_norm(form: Any, method: str, scaling: Any, norm: Norm, options: Json) -> Any:
    """The bound in any norm, where that is not l2 with the constants that the bound in l2 proves in this norm."""
    p = float(norm)
    if p == 2 or (p == math.inf and method == "lipsdp"):  # LipSDP in l-inf is the least of both by itself
        return bound_of(form, method, scaling, {"norm": p, **options})
    own = bound_of(form, "liplt" if method == "lipsdp" else method, scaling, {"norm": p, **options})
    return lb.in_norm(form, own, bound_of(form, method, scaling, {"norm": 2, **options}), norm=p)


def load_batched(path: Path, how: Reading, stack: contextlib.ExitStack) -> tuple[Any, tuple[int, ...], int]:
    """(network of a batch, shape of one input, number of classes) of a file, with (x - mean) / std in front."""
    return _batched(path, how, *_load(path, how, stack))


def _batched(
    path: Path, how: Reading, fn: Any, shape: tuple[int, ...], dtype: Any
) -> tuple[Any, tuple[int, ...], int]:
    if how.mean is not None or how.std is not None:
        mean, std = _units(how, shape, dtype)
        inner = jax.vmap(fn) if path.suffix.lower() == ".onnx" else fn
        fn = lambda x: inner((x.astype(dtype) - mean) / std)  # noqa: E731
        z = jax.eval_shape(fn, jax.ShapeDtypeStruct((2, *shape), dtype))
    else:
        z = jax.eval_shape(jax.vmap(fn), jax.ShapeDtypeStruct((2, *shape), dtype))
    return fn, shape, z.shape[-1]


def load_form(path: Path, how: Reading, stack: contextlib.ExitStack) -> tuple[Any, tuple[int, ...]]:
    """(form, shape of one input) of a model or ONNX file, with x -> (x - mean) / std in front."""
    return _form(how, None, *_load(path, how, stack))


def load_both(
    path: Path, how: Reading, stack: contextlib.ExitStack, box: tuple[float, float] | None = None
) -> tuple[Any, tuple[int, ...], Any]:
    """(form, shape of one input, network of a batch): `load_form` and `load_batched`, reading the file once.

    `box` (lower, upper) of the inputs serves to check values after tracing.
    """
    read = _load(path, how, stack)
    return *_form(how, box, *read), _batched(path, how, *read)[0]


def _form(
    how: Reading, box: tuple[float, float] | None, fn: Any, shape: tuple[int, ...], dtype: Any
) -> tuple[Any, tuple[int, ...]]:
    example = jax.ShapeDtypeStruct(shape, dtype)
    if how.mean is None and how.std is None:
        return lb.trace(fn, example, box=box), shape
    mean, std = _units(how, shape, dtype)
    return lb.trace(lambda x: fn((x - mean) / std), example, box=box), shape


def _units(how: Reading, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """Mean and standard deviation, as arrays that broadcast."""
    mean = _per_channel("0" if how.mean is None else how.mean, "mean", shape, dtype)
    std = _per_channel("1" if how.std is None else how.std, "std", shape, dtype)
    if not (std > 0).all():
        raise ValueError("--std must be > 0")
    return jnp.asarray(mean), jnp.asarray(std)


def _load(path: Path, how: Reading, stack: contextlib.ExitStack) -> tuple[Any, tuple[int, ...], Any]:
    """(network, shape and dtype of one input) of a model or ONNX file.

    JAX's float64 mode is entered into `stack` for a network that computes in float64.
    """
    fn: Any
    if (export := how_to_export(path)) is not None:
        raise ValueError(f"{path} {export}")
    if path.suffix.lower() == ".onnx":
        from lipbounds.interop import load_onnx

        constants = _constants(how.constant or [])
        try:
            fn, spec = load_onnx(path, drop=how.drop, shape=how.shape, output=how.output, constants=constants)
        except ImportError as error:
            raise ValueError(str(error)) from error
        shape, dtype = spec.shape, spec.dtype
        if fn.program.double:
            stack.enter_context(jax.enable_x64(True))
        for note in spec.notes:
            typer.echo(f"{path.name}: {note}", err=True)
    else:
        from lipbounds.training.store import load_model

        for name in ("drop", "shape", "output", "constant"):
            if getattr(how, name):
                raise ValueError(f"--{name} applies to ONNX files only")
        fn, model = load_model(path)
        shape, dtype = tuple(model.input_shape), np.dtype(np.float32)
    return fn, shape, dtype


def _constants(given: list[str]) -> dict[str, Any]:
    """Parse name=number or name=file.npy into values by input name."""
    from lipbounds._text.files import read_npy

    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.rpartition("=")
        if not sign or not name or name in found:
            raise ValueError(f"--constant must be name=number or name=file.npy, each name once; got {text!r}")
        try:
            found[name] = number(value)
        except ValueError:
            found[name] = read_npy(Path(value))
    return found


def _per_channel(text: str, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """One number, or one per channel (the first axis of an image, else the last), as an array that broadcasts."""
    try:
        values = np.asarray([float(part) for part in text.split(",")], dtype)
    except ValueError:
        values = np.asarray([np.nan], dtype)
    if not np.isfinite(values).all():
        raise ValueError(f"--{name} must be a number, or numbers separated by commas, got {text!r}")
    if len(values) == 1:
        return values[0]
    if len(shape) == 3 and shape[0] == len(values) != shape[2]:
        return values.reshape(-1, 1, 1)
    if shape and shape[-1] == len(values):
        return values
    raise ValueError(f"--{name} has {len(values)} numbers, but no channel axis of {shape} has that many")


def check_free(path: Path | None, force: bool, ours: Callable[[Path], bool], what: str) -> None:
    """ValueError, before any work is done, if the file would overwrite one that lipbounds did not write.

    OSError where nothing can be written there.
    """
    if path is None:
        return
    check_writable(path)
    if path.is_file() and not force and not ours(path):
        raise ValueError(f"{path} exists and {what}: choose another name, or pass --force")


def check_apart(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]) -> None:
    """typer.BadParameter, before any work is done, where two outputs are one file, or one is a file that is read.

    Outputs are given by option, inputs by what they are called; links are followed.
    """

    def place(path: Path) -> str:
        return os.path.normcase(os.path.realpath(path))

    read = {place(path): name for name, path in inputs.items() if path is not None}
    written: dict[str, str] = {}
    for option, path in outputs.items():
        if path is None:
            continue
        if place(path) in read:
            what = f"would overwrite {read[place(path)]}, which this command reads: choose another name"
            raise typer.BadParameter(what, param_hint=option)
        if place(path) in written:
            what = f"would overwrite {written[place(path)]}, which is the same file: choose another name"
            raise typer.BadParameter(what, param_hint=option)
        written[place(path)] = option


def files_read(model: Path, how: Reading, **more: Path | None) -> dict[str, Path | None]:
    """The files that a command reads, by what `check_apart` calls them: the model, its constants, and others."""
    found: dict[str, Path | None] = {"the model": model}
    found |= {f"--constant {text}": Path(text.rpartition("=")[2]) for text in how.constant or []}
    return found | {f"the {name}": path for name, path in more.items()}


def check_json(files: Output) -> None:
    """ValueError if --json would overwrite a file that lipbounds did not write."""
    from lipbounds.analysis.demo import is_ours

    check_free(files.json, files.force, is_ours, "was not written by lipbounds")


def header() -> Json:
    """The common header of all records."""
    from lipbounds.analysis.demo import FORMAT, FORMAT_VERSION

    return {"format": FORMAT, "version": FORMAT_VERSION, "lipbounds": __version__}


def write_json(path: Path | None, record: Json) -> None:
    from lipbounds.analysis import demo

    if path is not None:
        demo.write_json(path, record)
