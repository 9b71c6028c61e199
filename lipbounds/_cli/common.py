"""What the commands share: refusals as messages, and the files they read and write."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import typer

from lipbounds._cli import tables
from lipbounds._cli.options import Norm, Scaling, Verb, number
from lipbounds._text.version import __version__

Json = dict[str, Any]


@contextlib.contextmanager
def refusals() -> Iterator[contextlib.ExitStack]:
    """Turn refusals and failures of files into one message on stderr and exit code 1.

    What is entered into the stack is left at the end, such as the float64 mode that `load_form` needs for some files.
    """
    from lipbounds.errors import GuaranteeError

    try:
        with contextlib.ExitStack() as stack:
            yield stack
    except (
        ValueError,
        ArithmeticError,
        OSError,
        GuaranteeError,
    ) as error:  # the library's refusals are ValueErrors
        typer.echo(f"lipbounds: {error}", err=True)
        raise typer.Exit(1) from None
    except RuntimeError as error:  # out of memory on a device, a coordinator that does not answer
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        typer.echo(f"lipbounds: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(1) from None


def norm_of(norm: Norm) -> float:
    return math.inf if norm is Norm.inf else int(norm.value)


def choose_method(method: Any, norm: Norm, scaling: Scaling, lipsdp_only: bool) -> str:
    """The method asked for; by default LipSDP, or LipLT where only that fits what else was asked for."""
    scaled = scaling is not Scaling.none
    if method is None:
        simple = (scaled or norm is Norm.one) and not lipsdp_only
        method = Verb.liplt if simple else Verb.lipsdp
    if scaled and method.value != "liplt":
        raise typer.BadParameter(
            f"only --method liplt has a scaling, not {method.value}", param_hint="--scaling"
        )
    return str(method.value)


def bound_of(form: Any, method: str, scaling: Scaling, options: Json) -> Any:
    import lipbounds as lb

    if method == "naive":
        return lb.naive(form, **options)
    if method == "lipsdp":
        with tables.working() as tell:
            return lb.lipsdp(
                form, **options, progress=lambda what, value: tell(f"LipSDP, {what}: {value:.6g}")
            )
    return lb.liplt(form, **options, scaling=None if scaling is Scaling.none else cast(Any, scaling.value))


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a model file is read; all but the first two are for ONNX files."""

    mean: str | None = None
    std: str | None = None
    drop: Any = None
    shape: tuple[int, ...] | None = None
    output: str | None = None
    constants: tuple[str, ...] = ()


def load_form(
    path: Path, how: Reading, stack: contextlib.ExitStack, box: tuple[float, float] | None = None
) -> tuple[Any, tuple[int, ...]]:
    """(form, shape of one input) of a model file of ours or an ONNX file; x -> (x - mean) / std stands in front.

    `box` (lower, upper) of the inputs is for the check of values after tracing. JAX's float64 mode is entered into
    `stack` for a network that computes in float64.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    import lipbounds as lb

    fn: Any
    if path.suffix.lower() == ".onnx":
        from lipbounds.interop import load_onnx

        try:
            fn, spec = load_onnx(
                path, drop=how.drop, shape=how.shape, output=how.output, constants=_constants(how.constants)
            )
        except ImportError as error:
            raise ValueError(str(error)) from error
        shape, dtype = spec.shape, spec.dtype
        if fn.program.double:
            stack.enter_context(jax.enable_x64(True))
        for note in spec.notes:
            typer.echo(f"{path.name}: {note}", err=True)
    else:
        from lipbounds.training.store import load_model

        for name in ("drop", "shape", "output", "constants"):
            if getattr(how, name):
                raise ValueError(f"--{name.removesuffix('s')} belongs to ONNX files")
        fn, model = load_model(path)
        shape, dtype = tuple(model.input_shape), np.dtype(np.float32)
    shift, scale = (
        _per_channel(text, name, shape, dtype) for text, name in ((how.mean, "mean"), (how.std, "std"))
    )
    if scale is not None and not (scale > 0).all():
        raise ValueError("--std must be > 0")
    if shift is None and scale is None:
        return lb.trace(fn, jax.ShapeDtypeStruct(shape, dtype), box=box), shape
    zero, one = (
        np.zeros((), dtype) if shift is None else shift,
        np.ones((), dtype) if scale is None else scale,
    )
    return lb.trace(
        lambda x: fn((x - jnp.asarray(zero)) / jnp.asarray(one)), jax.ShapeDtypeStruct(shape, dtype), box=box
    ), shape


def _constants(given: tuple[str, ...]) -> dict[str, Any]:
    """Values of inputs by name, of name=number or name=file.npy."""
    from lipbounds._text.files import read_npy

    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.rpartition("=")
        if not sign or not name or name in found:
            raise ValueError(f"--constant must be name=number or name=file.npy, each name once; got {text!r}")
        try:
            found[name] = number(value)
        except (ValueError, ZeroDivisionError, OverflowError):
            found[name] = read_npy(Path(value))
    return found


def _per_channel(text: str | None, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    """A number, or one for each channel (the first axis of an image, or else the last), as an array that broadcasts."""
    import numpy as np

    if text is None:
        return None
    try:
        values = np.asarray([float(part) for part in text.split(",")], dtype)
    except ValueError:
        values = np.asarray([np.nan], dtype)
    if not np.isfinite(values).all():
        raise ValueError(f"--{name} must be a number, or numbers with commas between them, got {text!r}")
    if len(values) == 1:
        return values[0]
    if len(shape) == 3 and shape[0] == len(values) != shape[2]:
        return values.reshape(-1, 1, 1)
    if shape and shape[-1] == len(values):
        return values
    raise ValueError(f"--{name} has {len(values)} numbers, but no channel axis of {shape} has that many")


def read_data(data: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Images (n, *shape) and labels (n,) of `digits` or an .npz file; ValueError for anything else."""
    if data == "digits":
        from lipbounds.training.data import digits

        test = digits()
        x, y = test.test_x, test.test_y
    else:
        from lipbounds._text.files import read_npz

        wanted = "is not an .npz file with arrays x and y"
        try:
            arrays = read_npz(Path(data))
        except ValueError as error:
            raise ValueError(f"{data} {wanted}: {error}") from error
        if not {"x", "y"} <= arrays.keys():
            raise ValueError(f"{data} {wanted}: it holds {', '.join(arrays) or 'none'}")
        x, y = arrays["x"], arrays["y"]
    if x.shape[1:] != tuple(shape):
        raise ValueError(f"{data} holds images of shape {x.shape[1:]}, the model takes {tuple(shape)}")
    if x.dtype.kind != "f":
        raise ValueError(f"{data}: x must hold floats in the model's input units, got {x.dtype}")
    return x, y


def _free(path: Path, force: bool) -> bool:
    """Whether nothing stands where a file is to be written; ValueError where its folder does not exist."""
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} to")
    return force or not path.exists()


def check_target(path: Path | None, force: bool) -> None:
    """ValueError before any work is done if `path` holds something that we did not write."""
    from lipbounds.analysis.demo import is_ours

    if path is None or _free(path, force) or is_ours(path):
        return
    raise ValueError(f"{path} exists and was not written by lipbounds: choose another name, or pass --force")


def check_certificate(path: Path | None, force: bool) -> None:
    """ValueError before any work is done if `path` holds something that is no certificate."""
    from lipbounds._lipsdp.certificate_file import is_certificate

    if path is None or _free(path, force) or is_certificate(path):
        return
    raise ValueError(f"{path} exists and is no certificate: choose another name, or pass --force")


def write_record(path: Path | None, record: Json) -> None:
    if path is None:
        return
    from lipbounds.analysis.demo import FORMAT, FORMAT_VERSION, write_json

    write_json(path, {"format": FORMAT, "version": FORMAT_VERSION, "lipbounds": __version__, **record})
