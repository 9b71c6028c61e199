"""`lipbounds certify`: radii of images, in blocks that can be resumed and shared by processes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import typer

import lipbounds as lb
from lipbounds._cli import common, tables
from lipbounds._cli.attack import ANY_NORM, METHODS, ONLY_LINF, AtRadius
from lipbounds._cli.common import Json, refusals
from lipbounds._cli.data import ExampleFiles, check_inside
from lipbounds._cli.options import (
    CoordinatorOption,
    DeviceOption,
    MemoryOption,
    ModelPath,
    Norm,
    ProcessesOption,
    ProcessOption,
    Reading,
    ScalingOption,
    SeedOption,
    Tables,
    Verb,
    box_of,
    eps_of,
    grouped,
    option,
)
from lipbounds._form.lure import fingerprint
from lipbounds._lipsdp.certificate_file import digest
from lipbounds._margins.blocks import Unfinished, blocks, joined, radii_of, record_of
from lipbounds._margins.table import COLUMNS as RADII
from lipbounds._margins.table import table_of
from lipbounds._text.files import is_special, write_atomically
from lipbounds._text.progress import about, clock, remaining
from lipbounds._text.version import __version__
from lipbounds.results import Guarantee

ANY = (-np.inf, np.inf)  # the range of examples whose units were checked when they were read


@dataclasses.dataclass(frozen=True)
class Certified(Tables):
    """What is kept of a certification, and the certificate that it begins with."""

    certificate: Annotated[
        Path | None,
        option(
            "Take the bound of this certificate, which is proved again, instead of computing one.",
            "FILE",
            exists=True,
            dir_okay=False,
        ),
    ] = None


@grouped
def certify(
    *,
    model: ModelPath,
    eps: Annotated[
        list[float] | None,
        option("Radii to certify, in input units.", "NUMBER...", parser=eps_of, show_default="0.05 0.1 0.25"),
    ] = None,
    norm: Annotated[Norm | None, option("Norm of inputs and outputs.", show_default="2")] = None,
    method: Annotated[
        Verb | None, option("Bound that proves the radii.", show_default=common.DEFAULT_OF_SIZE)
    ] = None,
    scaling: ScalingOption = "none",
    guarantee: Annotated[
        Literal["auto", "verified", "probabilistic"], option("Required guarantee.")
    ] = "auto",
    pairwise: Annotated[bool, option("Use one constant per pair of classes, or one for all.")] = True,
    local: Annotated[
        bool, option("Also bound the network locally around each image, for larger radii.", None, "--local")
    ] = False,
    box: Annotated[
        Any,
        option(
            "With --local: restrict inputs to this range, such as 0,1. With --attack: range of the inputs, 0,1 if not "
            "given.",
            "LOW,HIGH",
            parser=box_of,
        ),
    ] = None,
    at_eps: Annotated[
        bool,
        option(
            "With --local: only certify the largest --eps, by more engines, and find no radii beyond it.",
            None,
            "--at-eps",
        ),
    ] = False,
    margins: Annotated[
        bool,
        option(
            "With --local: also search the largest balls that the dual of lb.margins certifies, seconds per image; for "
            "networks of relu, max and the like.",
            None,
            "--margins",
        ),
    ] = False,
    seconds_per_image: Annotated[
        float,
        option(
            "With --at-eps or --margins: also branch on signs of neurons, so many seconds per open image (and ball).",
            min=0.0,
        ),
    ] = 0.0,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    attack: Annotated[
        AtRadius | None,
        option(
            "Also attack the images that are not certified, by autoattack if no METHOD follows: the robust accuracy "
            "lies between the two.",
            "[METHOD]",
            "--attack",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    processes: ProcessesOption = None,
    process: ProcessOption = None,
    examples: ExampleFiles,
    files: Certified,
    reading: Reading,
) -> None:
    """Certify images: no input within eps changes the predicted class.

    An image counts if it is classified correctly and its certified radius exceeds eps. Radii are in the
    units of the model's own input: for the demo's models pixel values in [0, 1]. The normalisation by --mean and
    --std is part of the network, so radii are those of the raw input. Values that look like other units than these
    are a warning; --input-range says what the network takes.

    With --attack the robust accuracy is bounded from both sides: certified <= robust <= under attack, at every eps.
    The attack runs with its own settings in the norm of the radii; `lipbounds attack` has options for them.

    With --json an interrupted certification goes on from the images that it has when the same command is given again.
    Several processes share the images and find the same radii as one; process 0 prints and writes them all.

    Examples:
    - `lipbounds certify report/mlp.safetensors --eps 0.1 0.25 0.5`

    - `lipbounds certify report/mlp.safetensors --data mine.npz --method liplt --json radii.json`

    - `lipbounds certify report/mlp.safetensors --certificate mlp.certificate --csv radii.csv`

    - `lipbounds certify net.onnx --data mine.npz --mean 0.5,0.5,0.5 --std 0.2,0.2,0.2 --local --eps 0.3`

    - `lipbounds certify net.onnx --images x.npy --labels y.npy --input-range 0 1 --norm inf --eps 8/255`

    - `lipbounds certify net.onnx --data mine.npz --local --margins --box 0,1`

    - `lipbounds certify net.onnx --data mine.npz --local --box 0,1 --eps 0.5 --at-eps`

    - `lipbounds certify report/mlp.safetensors --eps 0.1 0.25 --attack --json both.json --csv both.csv`

    - `lipbounds certify net.onnx --data mine.npz --local --coordinator node0:1234 --processes 4 --process 1`
    """
    examples.check()
    asked, norm = norm, norm or "2"
    _check(norm, local, box, at_eps, margins, max(eps or [0.0]), seconds_per_image, attack, coordinator)
    chosen = common.choose_method(method, "2", scaling, False)  # norm 1 has LipSDP's l2 bound
    read = common.files_read(model, reading, certificate=files.certificate, **examples.files())
    common.check_apart({"--json": files.json, "--csv": files.csv}, read)
    if files.certificate is not None:
        idle = {"--method": method, "--scaling": scaling != "none", "--no-pairwise": not pairwise}
        _check_none({**idle, "--memory": memory is not None and not local})
    with refusals() as stack:
        from lipbounds.training import parallel

        parallel.join(coordinator, processes, process)
        stack.callback(parallel.leave)
        common.check_json(files)
        common.check_free(files.csv, files.force, holds_radii, "holds no radii, and --csv would overwrite it")
        form, shape, fn = common.load_both(model, reading, stack, box if local else None)
        x, y = examples.read(shape, form.num_outputs)
        if not len(x):
            raise ValueError(f"{examples.name} holds no images")
        low, high = (0.0, 1.0) if box is None else box
        _check_attack(attack, form, x, low, high)
        if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
            x = x.astype(np.float64)
        options: Json = {"pairwise": pairwise, "guarantee": guarantee, "seed": seed, "memory": memory}
        options["device"] = device
        if files.certificate is None:
            if method is None:
                chosen = common.method_of_size(chosen, form)
            bound = common.best_in_norm(form, chosen, scaling, norm, options)
        else:
            bound, norm = bound_in(files.certificate, form, asked, guarantee)
        request: Guarantee = "verified" if guarantee == "verified" else "auto"
        settings: Json = {"guarantee": request, "seed": seed, "device": device}
        settings["eps"] = max(eps) if at_eps and eps else None
        around = lb.Local(box=box, memory=memory, seconds_per_image=seconds_per_image, margins=margins)
        near = around if local else False
        kept = _kept(form, x, y, bound, near, settings, files.json)
        radii = _all_blocks(form, x, y, bound, near, settings, kept)
        if jax.process_index() == 0:
            shares = {level: float(radii.accuracy(level)) for level in sorted({*(eps or (0.05, 0.1, 0.25))})}
            about = {"model": str(model), "data": examples.name, "norm": norm}
            record = {**_certified(bound, radii, shares), **about}
            assumed = asked is None and bool(eps)
            with tables.afterwards(lambda: tables.print_certified(bound, radii, shares, assumed=assumed)):
                common.write_json(files.json, {**common.header(), **record})
            _wonder(radii, form.num_outputs, reading)
            both = None
            if attack is not None:
                both = _attacked(attack, form, fn, radii, x, y, list(shares), low=low, high=high, seed=seed)
                record |= _bracket(attack, both, low, high, seed)
                with tables.afterwards(lambda: tables.print_bracket(both)):
                    common.write_json(files.json, {**common.header(), **record})
            if files.csv is not None:
                write_atomically(files.csv, _table(radii, both).encode())
        kept.remove()


def _check(
    norm: str,
    local: bool,
    box: Any,
    at_eps: bool,
    margins: bool,
    eps: float,
    seconds: float,
    attack: str | None,
    coordinator: str | None,
) -> None:
    """typer.BadParameter unless the options fit together."""
    if box is not None and not (local or attack):
        raise typer.BadParameter("belongs to --local and --attack", param_hint="--box")
    if at_eps and not (local and eps > 0):
        raise typer.BadParameter("needs --local and --eps above 0", param_hint="--at-eps")
    if margins and (at_eps or not local):
        raise typer.BadParameter("is part of --at-eps" if at_eps else "needs --local", param_hint="--margins")
    if seconds and not (at_eps or margins):
        raise typer.BadParameter("belongs to --at-eps and --margins", param_hint="--seconds-per-image")
    if not math.isfinite(seconds):
        raise typer.BadParameter(
            f"must be a number of seconds, got {seconds}", param_hint="--seconds-per-image"
        )
    if local and norm == "1":
        raise typer.BadParameter("bounds the network in norm 2 or inf, not 1", param_hint="--local")
    if attack is None:
        return
    if norm == "1" and attack not in ANY_NORM:
        raise typer.BadParameter(
            f"{attack} is in norm 2 or inf, not 1: take {' or '.join(ANY_NORM)}", param_hint="--attack"
        )
    if attack in ONLY_LINF and norm != "inf":
        raise typer.BadParameter(
            f"{attack} measures distances in l-inf: add --norm inf", param_hint="--attack"
        )
    if coordinator is not None:
        raise typer.BadParameter(
            "runs in one process: leave it out here, and run `lipbounds attack` with the same --eps",
            param_hint="--attack",
        )


def _check_none(given: Json) -> None:
    """BadParameter for options of a bound that is not computed."""
    for name, value in given.items():
        if value:
            raise typer.BadParameter("the bound is that of --certificate: leave it out", param_hint=name)


def holds_radii(path: Path) -> bool:
    """Whether a file is radii that lipbounds wrote."""
    try:
        return isinstance(lb.load(path), lb.Radii)
    except (ValueError, OSError):
        return False


def bound_in(path: Path, form: Any, norm: Norm | None, guarantee: str = "auto") -> tuple[lb.UpperBound, Norm]:
    """The bound of a certificate, proved again, and its norm; ValueError where it is not the one that was asked for."""
    with tables.working() as tell:
        try:
            bound = lb.load_certificate(path, form, progress=tell)
        except lb.CertificateError as error:
            raise ValueError(f"{path} is rejected: {error}") from error
    found: Norm = "inf" if bound.norm == np.inf else "2"
    if norm not in (None, found):
        raise ValueError(f"{path} bounds the network in norm {found}: leave out --norm {norm}")
    if guarantee == "verified" != bound.guarantee:
        raise ValueError(f"the bound of {path} is {bound.guarantee}: leave out --guarantee verified")
    return bound, found


def _wonder(radii: lb.Radii, outputs: int, reading: Reading) -> None:
    """Say on stderr what may be wrong where no more images are classified as labelled than by guessing."""
    count, classes = len(radii), max(outputs, 2)
    share, chance = float(radii.correct.mean()), 1 / classes
    if count < 10 or share > chance + 2 * (chance * (1 - chance) / count) ** 0.5:
        return
    mend = (
        "is the normalisation missing (--mean, --std), or are"
        if reading.mean is None and reading.std is None
        else "are --mean and --std right, and are"
    )
    typer.echo(
        f"warning: only {100 * share:.1f} % of the images are classified as labelled, no more than by guessing among "
        f"{classes} classes: {mend} the labels in another order than the outputs?",
        err=True,
    )


def _check_attack(attack: str | None, form: Any, x: Any, low: float, high: float) -> None:
    """ValueError, before any work is done, where the attack could not run."""
    if attack is None:
        return
    if attack in ("autoattack", "apgd-t") and form.num_outputs < 4:
        raise ValueError(
            f"--attack {attack} needs at least 4 classes, and the network has {form.num_outputs}: take apgd, fab, "
            "square or pgd"
        )
    check_inside(x, low, high)


def _attacked(
    attack: str, form: Any, fn: Any, radii: lb.Radii, x: Any, y: Any, eps: list[float], **settings: Any
) -> Any:
    """The robust accuracy from both sides. typer.Exit with code 130 where Ctrl-C ends the attack."""
    from lipbounds import analysis

    name, fixed, _ = METHODS[attack]
    run = functools.partial(getattr(analysis, name), **fixed)
    try:
        with tables.working() as tell:
            return analysis.robust_accuracy(
                form, radii, x, y, eps, attack=run, fn=fn, progress=tell, **settings
            )
    except KeyboardInterrupt:
        typer.echo("interrupted: the images are certified as above, and the attack is not finished", err=True)
        raise typer.Exit(130) from None


def _bracket(attack: str, both: Any, low: float, high: float, seed: int) -> Json:
    """Both sides of the robust accuracy as plain data; `attacked_distance` is None where nothing was found."""
    return {
        "clean": both.clean,
        "robust": both.rows(),
        "attack": {
            "method": attack,
            "name": both.attack,
            "guarantee": "attained",
            "box": [low, high],
            "seed": seed,
            "attacked": list(both.attacked),
            "rounding": both.rounding,
            "notes": list(both.notes),
        },
        "attacked_distance": [float(d) if np.isfinite(d) else None for d in both.distance],
    }


COLUMNS = (*RADII, "attacked_distance")


def _table(radii: lb.Radii, both: Any) -> str:
    """A row per image as CSV: nothing misclassified lies nearer than certified_radius, something at attacked_distance.

    The last is empty where nothing was found.
    """
    distances = [np.inf] * len(radii) if both is None else both.distance
    return table_of(radii, attacked_distance=[repr(float(d)) if np.isfinite(d) else "" for d in distances])


def _kept(
    form: Any, x: Any, y: Any, bound: lb.UpperBound, local: Any, settings: Json, file: Path | None
) -> Unfinished:
    """What an interrupted run of the same command has left."""
    from lipbounds.training import parallel

    data = hashlib.sha256(np.ascontiguousarray(x).tobytes() + np.ascontiguousarray(y).tobytes()).hexdigest()
    given: Json = {**settings, "local": repr(local), "data": data, "shape": [*x.shape]}
    given |= {"lipbounds": __version__, "network": fingerprint(form), "bound": _digest(bound)}
    kept = Unfinished(None if file is None or is_special(file) else file, jax.process_index(), given)
    # Nobody writes before all have read.
    parallel.agree(int(kept.key[:7], 16), "the model, the data, or the options")
    return kept


def _digest(bound: lb.UpperBound) -> str:
    """Digest of everything in a bound that radii depend on."""
    names = ("method", "value", "norm", "guarantee", "failure_probability")
    constants = {"pairwise": bound.pairwise, "per_class": bound.per_class}
    given = {name: array for name, array in constants.items() if array is not None}
    return digest(json.dumps([getattr(bound, name) for name in names]), given)


def _all_blocks(
    form: Any, x: Any, y: Any, bound: lb.UpperBound, local: Any, settings: Json, kept: Unfinished
) -> lb.Radii:
    """The radii of all images: of this process's blocks, and of the others' once all processes are done.

    typer.Exit with code 130 where Ctrl-C ends it, after a line about what is proved.
    """
    from lipbounds.training import parallel

    margins = isinstance(local, lb.Local) and local.margins
    parts, count = blocks(form, len(x), local is not False, margins), jax.process_count()
    if kept.done:
        typer.echo(f"{_size(parts, kept)} of {len(x)} images were certified before", err=True)
    try:
        with tables.working() as tell:
            began = clock()
            ahead = [b for b in range(jax.process_index(), len(parts), count) if b not in kept.done]
            for place, block in enumerate(ahead):
                part = parts[block]
                left = remaining(began, place, len(ahead))
                with about(f"images {part.start + 1} to {part.stop} of {len(x)}{left}"):
                    found = lb.certified_radius(
                        form,
                        x[part],
                        y[part],
                        bound=bound,
                        local=local,
                        progress=tell,
                        input_range=ANY,
                        **settings,
                    )
                if not found.complete:
                    raise KeyboardInterrupt
                kept.add(block, found)
    except KeyboardInterrupt:
        some = f", median radius {np.median(joined(kept.done.values()).radius):.4g}" if kept.done else ""
        again = "give the same command again to go on" if kept.path is not None else "--json FILE keeps them"
        said = f"{_size(parts, kept)} of {len(x)} images are certified{some}; {again}"
        typer.echo(f"interrupted: {said}", err=True)
        raise typer.Exit(130) from None
    every: dict[int, Any] = {}
    for record in parallel.everyone({str(block): record_of(radii) for block, radii in kept.done.items()}):
        every |= {int(block): each for block, each in record.items()}
    return joined(radii_of(every[block]) for block in range(len(parts)))


def _size(parts: list[slice], kept: Unfinished) -> int:
    return sum(parts[block].stop - parts[block].start for block in kept.done)


def _certified(bound: lb.UpperBound, radii: lb.Radii, shares: dict[float, float]) -> Json:
    """The radii and their bound as plain data."""
    proof = {name: getattr(bound, name) for name in ("method", "value", "guarantee")}
    return {
        "bound": {"kind": "upper", **proof},
        "images": len(radii.radius),
        "clean_accuracy": float(radii.correct.mean()),
        "quartiles": [q if np.isfinite(q) else None for q in tables.quartiles(radii)],
        "certified_accuracy": [{"eps": eps, "accuracy": share} for eps, share in shares.items()],
        "counts": radii.counts,
        **record_of(radii),
    }
