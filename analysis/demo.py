"""The demo: bound small networks of real digits, certify the test set, write a report.

One network is trained, by plain cross-entropy, and compared with the two of `lipbounds.examples`, which were trained by
certified radius maximisation (CRM): one of the same architecture, and a convolutional one.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import lipbounds as lb
from lipbounds import __version__
from lipbounds._text import is_special, parsed, read_text, write_atomically
from lipbounds.analysis.experiment import NORMS, Json, best_certified, measure, method_names, offered
from lipbounds.analysis.single_images import single_images
from lipbounds.examples import Example
from lipbounds.examples import digits as example
from lipbounds.training.config import Config
from lipbounds.training.data import Dataset
from lipbounds.training.loop import accuracy, fit
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import load_model, save_model

FORMAT = "lipbounds-results"
FORMAT_VERSION = 1
RESULTS = "results.json"

Progress = Callable[[str, float], None]  # what is being done, share of the whole in [0, 1]
Save = Callable[[pathlib.Path], Any]  # writes a model to a folder


PLAIN: Json = {"loss": "cross-entropy", "batch_size": 128, "learning_rate": 2e-3, "schedule": "constant"}
#: Methods that are shown on the small networks only: on the convolutional one they take long to compile.
SMALL = ("liplt-aol", "liplt-sll", "liplt-optimized", "liplt-estimate")
FILES = {"mlp": "mlp_crm", "cnn": "cnn_crm"}  # what the installed networks are called in the folder


def run_demo(
    folder: pathlib.Path,
    *,
    seed: int = 0,
    epochs: int = 40,
    methods: Sequence[str] | None = None,
    command: str = "lipbounds demo",
    progress: Progress | None = None,
) -> Json:
    """Run the demo: write models, figures, `results.json` and `report.html` to `folder`, return the results.

    A new folder is marked as written by lipbounds from the start, so that an interrupted demo can be repeated. In
    another one a finished report stays as it was until the new one is made.
    """
    from lipbounds.analysis.report import write_report

    start = time.perf_counter()
    report = progress or (lambda what, share: None)
    folder.mkdir(parents=True, exist_ok=True)
    results: Json = {"format": FORMAT, "version": FORMAT_VERSION, "status": "running"}
    if not finished(folder):
        write_json(folder / RESULTS, results)
    installed = [example(name) for name in FILES]
    data = installed[0].data
    methods = method_names() if methods is None else tuple(methods)
    records: list[Json] = []
    models: list[Save] = []

    def stage(title: str) -> Progress:
        number = len(records)
        return lambda what, share: report(f"{title}: {what}", (number + share) / (1 + len(installed)))

    _, spec = load_model(installed[0].weights)
    title = "MLP 64-64-64-10"
    config = Config(epochs=epochs, seed=seed, validate_every=0, warmup=min(1, epochs - 1), **PLAIN)
    records.append(_trained(title, spec, config, data, methods, stage(title), models))
    for one in installed:
        records.append(_installed(one, data, methods, seed, stage(one.title), models))
    done = results | {
        "status": "complete",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "program": {
            "lipbounds": __version__,
            "python": platform.python_version(),
            "jax": jax.__version__,
            "numpy": np.__version__,
            "device": str(jax.devices()[0].platform),
        },
        "data": {"name": data.name, "train": len(data.train_x), "test": len(data.test_x)},
        "unit": "pixel values in [0, 1]",
        "models": records,
    }
    report("writing the report", 1.0)
    with tempfile.TemporaryDirectory(prefix="new-", dir=folder) as name:
        new = pathlib.Path(name)
        for save in models:
            save(new)
        write_report(done, new)
        write_json(folder / RESULTS, results)  # from here on files of two reports may stand side by side
        for file in sorted(new.iterdir()):
            os.replace(file, folder / file.name)
    write_json(folder / RESULTS, done)
    return done


def _trained(
    title: str,
    spec: ModelSpec,
    config: Config,
    data: Dataset,
    methods: Sequence[str],
    stage: Progress,
    models: list[Save],
) -> Json:
    """Train the network and measure it; what saves it is appended to `models`."""
    share = 0.3

    def trained(record: Json) -> None:
        epoch, of = record["epoch"], config.epochs
        stage(f"training, epoch {epoch} of {of}, loss {record['loss']:.3f}", share * epoch / of)

    stage("training", 0.0)
    fitted = fit(config, data, model=build(spec, config.seed), progress=trained)
    file = "mlp.safetensors"
    models.append(lambda folder: save_model(folder / file, fitted.model, spec))
    training = {
        "epochs": config.epochs,
        "with": config.loss,
        "constants": config.constants if config.uses_constants else None,
        "seconds": fitted.seconds,
        "loss": fitted.log[-1]["loss"],
    }
    later: Progress = lambda what, part: stage(what, share + (1 - share) * part)  # noqa: E731
    return _measured(file, title, fitted.model, spec, training, data, methods, config.seed, later)


def _installed(
    one: Example,
    data: Dataset,
    methods: Sequence[str],
    seed: int,
    stage: Progress,
    models: list[Save],
) -> Json:
    """Measure an installed network; what copies it to the folder is appended to `models`."""
    file = f"{FILES[one.name]}.safetensors"
    models.append(lambda folder: write_atomically(folder / file, one.weights.read_bytes()))
    _, spec = load_model(one.weights)
    training = {
        "epochs": one.settings["epochs"],
        "with": one.settings["loss"],
        "constants": one.settings["constants"],
        "loss": one.measured["loss"],
        "installed": True,
    }
    stage("proving the bound of its certificate", 0.0)
    if spec.architecture != "mlp":
        methods = [name for name in methods if name not in SMALL]
    known = {"lipsdp": one.bound}
    return _measured(file, one.title, one.model, spec, training, data, methods, seed, stage, known)


def _measured(
    file: str,
    title: str,
    model: nnx.Module,
    spec: ModelSpec,
    training: Json,
    data: Dataset,
    methods: Sequence[str],
    seed: int,
    stage: Progress,
    known: Json | None = None,
) -> Json:
    """Bound and certify one network; `known` are results that are not computed again."""
    form = lb.trace(model, data.test_x[0])
    steps = 0
    total = sum(len(offered(methods, norm, quick=True)) + 1 for norm in NORMS) + 1

    def measured(what: str) -> None:
        nonlocal steps
        stage(what, min(steps / total, 1.0))
        steps += 1

    rows = measure(
        form, data.test_x, data.test_y, methods=methods, seed=seed, quick=True, known=known, progress=measured
    )
    stage("adversarial examples of the test images", 1.0)
    best = best_certified(rows)
    radii, local = (
        np.array([math.inf if r is None else r for r in best[which]["radius"]])
        for which in ("certified", "local")
    )
    images = single_images(model, data.test_x, data.test_y, radii, local=local)
    found = {
        "train_accuracy": accuracy(model, data.train_x, data.train_y),
        "test_accuracy": accuracy(model, data.test_x, data.test_y),
    }
    return {
        "name": pathlib.PurePath(file).stem,
        "title": title,
        "file": file,
        "architecture": spec.architecture,
        "arguments": dict(spec.arguments),
        "input_shape": list(spec.input_shape),
        "parameters": sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "taps": len(form.taps),
        "training": {**training, **found},
        "images": images,
        **rows,
    }


def write_json(path: pathlib.Path, record: Json) -> None:
    """Write strict JSON (no NaN, no infinity); a failed write leaves what was there untouched."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file holds; ValueError that names the file where it is none, a pipe or a device included."""
    if is_special(path):
        raise ValueError(f"{path} is no file")
    try:
        return parsed(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def finished(folder: pathlib.Path) -> bool:
    """Whether the folder holds the results of a demo that came to its end."""
    path = folder / RESULTS
    return is_ours(path) and read_json(path).get("status") == "complete"


def is_ours(path: pathlib.Path) -> bool:
    """Whether a JSON file was written by this program."""
    try:
        record = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("format") == FORMAT
