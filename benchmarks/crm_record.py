"""Train a preset, prove its constants, and write the table: clean and certified accuracy of all test images.

    python benchmarks/crm_record.py --preset cifar10-6C2F --epochs 150 --data-dir DATA --out OUT

The run is OUT/run; where it exists already it is resumed, so that a run may be made in pieces; a finished one is only
proved again. OUT/record.md and OUT/record.json have the table: before the proof with the estimates of the log, after it
with the proved bound. The pixel values are in [0, 1].
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Json, command_line, environment

import lipbounds as lb
from lipbounds.training import Config, Fitted, fit, loop, preset, resume
from lipbounds.training.data import load
from lipbounds.training.final_bound import proved_bound

LEVELS = {"mnist": (1.58,), "digits": (0.5,)}


def tell(record: Json) -> None:
    estimate = record["certified_estimate"]
    certified = "" if estimate is None else f", certified (estimate) {100 * estimate:.1f} %"
    line = f"epoch {record['epoch']}: {record['seconds']:.2f} s, loss {record['loss']:.3f}, "
    line += f"{100 * record['sample_accuracy']:.1f} % correct{certified}"
    if record["epoch"] % 10 == 0 or "warning" in record:
        print(f"{line} {record.get('warning', '')}", flush=True)


def training(fitted: Fitted) -> Json:
    """What the log says; estimates are named so."""
    log = fitted.log
    last = {name: value for name, value in log[-1].items() if name in loop.watch.FIGURES}
    epochs = np.sort([record["seconds"] for record in log])
    return {
        "epochs": len(log),
        "seconds": float(epochs.sum()),
        "seconds_per_epoch": float(np.median(epochs)),
        "last_epoch_on_training_images": last,
        "warnings": loop.watch.troubled(log),
        "best_epoch": loop.watch.best(log, fitted.config),
    }


def proof(fitted: Fitted, data: Any, levels: tuple[float, ...]) -> Json:
    """Clean and certified accuracy by the method of the loss, on all test images."""
    begin = time.perf_counter()
    form = lb.trace(fitted.model, jax.ShapeDtypeStruct(data.input_shape, jnp.float32))
    bound = proved_bound(form, fitted.config, fitted.state)
    bounded = time.perf_counter() - begin
    radii = lb.certified_radius(form, data.test_x, data.test_y, bound=bound)
    return {
        "images": len(data.test_y),
        "clean": float(radii.correct.mean()),
        "certified": {f"{eps:.6g}": float(radii.accuracy(eps)) for eps in levels},
        "method": bound.method,
        "guarantee": radii.guarantee,
        "average_pair": bound.average_pair(),
        "bound_seconds": bounded,
        "seconds": time.perf_counter() - begin,
    }


def written(out: Path, found: Json) -> None:
    (out / "record.json").write_text(json.dumps(found, indent=1) + "\n")
    train, here = found["training"], found["environment"]
    lines = [
        f"# {found['name']}, {train['epochs']} epochs",
        "",
        f"```bash\n{here['command']}\n```",
        "",
        f"- {here['device']}, jax {here['jax']}, Python {here['python']}; {train['seconds']:.1f} s of training, "
        f"{train['seconds_per_epoch']:.3f} s an epoch (median)",
        f"- warnings of the run: {train['warnings'] or 'none'}",
        "- last epoch, on training images, by the constants of the loss (estimates): "
        + ", ".join(
            f"{k} {v:.4g}" for k, v in train["last_epoch_on_training_images"].items() if v is not None
        ),
        "",
    ]
    if "proof" in found:
        p = found["proof"]
        lines += [
            f"All {p['images']} test images; radii are l2 distances of pixel values in [0, 1]. "
            f"{p['method']}, {p['guarantee']}, {p['seconds']:.0f} s.",
            "",
            "| accuracy | |",
            "|---|---:|",
            f"| clean | {100 * p['clean']:.2f} % |",
            *(f"| certified at {eps} | {100 * share:.2f} % |" for eps, share in p["certified"].items()),
        ]
    (out / "record.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = command_line(__doc__, out=False)
    parser.add_argument("--preset", default="cifar10-6C2F")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", default="{}", help="changes of the preset, as a JSON object")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = args.out / "run"
    changes = {"data_dir": args.data_dir, "validate_every": 0, "checkpoint_every": 25}
    settings = {**preset(args.preset, args.epochs), **changes, **json.loads(args.settings)}
    if (run / "config.json").exists():
        fitted = resume(run, data_dir=args.data_dir, progress=tell)
    else:
        fitted = fit(Config.from_json(settings), out=run, progress=tell)
    found: Json = {
        "name": args.preset,
        "environment": environment("crm_record.py", ("flax", "optax")),
        "settings": {k: v for k, v in fitted.config.to_json().items() if k != "data_dir"},
        "training": training(fitted),
    }
    written(args.out, found)  # so that nothing is lost if the proof takes too long
    print((args.out / "record.md").read_text(), flush=True)
    data = load(fitted.config.dataset, args.data_dir)
    levels = LEVELS.get(fitted.config.dataset, tuple(n / 255 for n in (18, 36, 72, 108)))
    found["proof"] = proof(fitted, data, levels)
    written(args.out, found)
    print((args.out / "record.md").read_text(), flush=True)


if __name__ == "__main__":
    main()
