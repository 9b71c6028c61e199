"""The demo: train small networks on real digits, bound them, certify the test set, write a report.

One network is trained twice, by plain cross-entropy and by certified radius maximisation (CRM).
"""

from __future__ import annotations

import datetime
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

import lipbounds as lb
from lipbounds import __version__
from lipbounds._text import write_atomically
from lipbounds.analysis.experiment import NORMS, Json, measure, method_names, offered
from lipbounds.training.config import Config
from lipbounds.training.data import Dataset, digits
from lipbounds.training.loop import accuracy, fit
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.store import save_model

FORMAT = "lipbounds-results"
FORMAT_VERSION = 1
RESULTS = "results.json"

Progress = Callable[[str, float], None]  # what is being done, share of the whole in [0, 1]


PLAIN: Json = {"loss": "cross-entropy", "batch_size": 128, "learning_rate": 2e-3, "schedule": "constant"}
CRM: Json = {"loss": "crm", "constants": "recursion", "lam": 5.0, "r0": 1.0, "t": 10.0, "eps": 0.5}


def demo_models(data: Dataset) -> dict[str, tuple[str, ModelSpec, Json]]:
    """File name -> (title, spec, settings). Mean and deviation of the training pixels are part of the models."""
    scale = {"mean": round(float(data.train_x.mean()), 3), "std": round(float(data.train_x.std()), 3)}
    mlp = ModelSpec("mlp", data.input_shape, {"widths": "64-64-64-10", **scale})
    residual = ModelSpec("residual_cnn", data.input_shape, {"channels": 12, "blocks": 2, **scale})
    return {
        "mlp": ("MLP 64-64-64-10", mlp, PLAIN),
        "mlp_crm": ("The same MLP, trained with CRM", mlp, {"batch_size": 64, "learning_rate": 4e-3, **CRM}),
        "residual_cnn": ("Residual CNN, 2 blocks of 12 channels", residual, PLAIN),
    }


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

    The folder is marked as written by lipbounds from the start, so that an interrupted demo can be repeated.
    """
    from lipbounds.analysis.report import write_report

    start = time.perf_counter()
    report = progress or (lambda what, share: None)
    folder.mkdir(parents=True, exist_ok=True)
    results: Json = {"format": FORMAT, "version": FORMAT_VERSION, "status": "running"}
    write_json(folder / RESULTS, results)
    data = digits()
    methods = method_names() if methods is None else tuple(methods)
    models = demo_models(data)
    records = []
    for number, (name, (title, spec, settings)) in enumerate(models.items()):

        def stage(what: str, share: float, title: str = title, number: int = number) -> None:
            report(f"{title}: {what}", (number + share) / len(models))

        config = Config(epochs=epochs, seed=seed, validate_every=0, warmup=min(1, epochs - 1), **settings)
        records.append(_one_model(folder, name, title, spec, config, data, methods, stage))
    results |= {
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
    write_report(results, folder)
    write_json(folder / RESULTS, results)
    return results


def _one_model(
    folder: pathlib.Path,
    name: str,
    title: str,
    spec: ModelSpec,
    config: Config,
    data: Dataset,
    methods: Sequence[str],
    stage: Progress,
) -> Json:
    training_share = 0.3

    def trained(record: Json) -> None:
        epoch, of = record["epoch"], config.epochs
        stage(f"training, epoch {epoch} of {of}, loss {record['loss']:.3f}", training_share * epoch / of)

    stage("training", 0.0)
    fitted = fit(config, data, model=build(spec, config.seed), progress=trained)
    model = fitted.model
    file = save_model(folder / f"{name}.safetensors", model, spec)
    form = lb.trace(model, data.test_x[0])
    steps = 0
    total = sum(len(offered(methods, norm, quick=True)) + 1 for norm in NORMS)

    def measured(what: str) -> None:
        nonlocal steps
        stage(what, training_share + (1 - training_share) * min(steps / total, 1.0))
        steps += 1

    rows = measure(
        form, data.test_x, data.test_y, methods=methods, seed=config.seed, quick=True, progress=measured
    )
    return {
        "name": name,
        "title": title,
        "file": file.name,
        "architecture": spec.architecture,
        "arguments": dict(spec.arguments),
        "input_shape": list(spec.input_shape),
        "parameters": sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "taps": len(form.taps),
        "training": {
            "epochs": config.epochs,
            "with": config.loss,
            "constants": config.constants if config.uses_constants else None,
            "seconds": fitted.seconds,
            "loss": fitted.log[-1]["loss"],
            "train_accuracy": accuracy(model, data.train_x, data.train_y),
            "test_accuracy": accuracy(model, data.test_x, data.test_y),
        },
        **rows,
    }


def write_json(path: pathlib.Path, record: Json) -> None:
    """Write strict JSON (no NaN, no infinity); a failed write leaves what was there untouched."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def is_ours(path: pathlib.Path) -> bool:
    """Whether a JSON file was written by this program."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("format") == FORMAT
