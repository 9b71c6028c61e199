"""Train the networks of `lipbounds.examples` and prove their constants: `python -m lipbounds.examples.make`.

Writes `digits_NAME.safetensors`, `.certificate` and `.json` (settings, and what was measured) to a folder, by default
the one of this file. The last digits of the weights depend on the machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import lipbounds as lb
from lipbounds._text import near
from lipbounds._text.files import check_folder
from lipbounds.examples import DIGITS
from lipbounds.training import Config, fit
from lipbounds.training.data import digits
from lipbounds.training.store import save_model

_CRM: dict[str, Any] = {
    **{"loss": "crm", "lam": 5.0, "r0": 1.0, "t": 10.0, "eps": 0.5, "batch_size": 64, "learning_rate": 4e-3},
    **{"validate_every": 0, "mean": 0.305, "std": 0.376},
}
SETTINGS = {
    "mlp": Config(arch="64-64-64-10", constants="recursion", epochs=40, **_CRM),
    "cnn": Config(arch="2C2F", constants="liplt", epochs=30, **_CRM),
}


def make(name: str, folder: Path) -> dict[str, Any]:
    """Train one network, prove its constants, and write its files; what was measured is returned."""
    config, data = SETTINGS[name], digits()
    fitted = fit(config, data, progress=lambda record: print(f"{name}: epoch {record['epoch']}", flush=True))
    assert fitted.spec is not None
    save_model(folder / f"digits_{name}.safetensors", fitted.model, fitted.spec)
    form = lb.trace(fitted.model, data.test_x[0])
    bound = lb.lipsdp(form, pairwise=True)
    assert isinstance(bound, lb.UpperBound)
    lb.save_certificate(bound, folder / f"digits_{name}.certificate", overwrite=True)
    radii = lb.certified_radius(form, data.test_x, data.test_y, bound=bound)
    found = {
        "title": DIGITS[name],
        "settings": config.to_json(),
        "lipbounds": lb.__version__,
        "loss": fitted.log[-1]["loss"],
        "bound": bound.value,
        "guarantee": radii.guarantee,
        "clean_accuracy": float(radii.correct.mean()),
        "certified_accuracy": {str(eps): radii.accuracy(eps) for eps in (0.1, 0.25, 0.5)},
    }
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    (folder / f"digits_{name}.json").write_text(text, encoding="utf-8")
    return found


def main() -> None:
    """Make the networks that are named, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m lipbounds.examples.make", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"networks to make, of {', '.join(DIGITS)}; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the files")
    given = parser.parse_args()
    for name in given.names:
        if name not in SETTINGS:
            parser.error(
                f"there is no network {name!r}{near(name, SETTINGS)}; there are {', '.join(SETTINGS)}"
            )
    try:
        check_folder(given.out)
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    for name in given.names or DIGITS:
        found = make(name, given.out)
        print(json.dumps({key: value for key, value in found.items() if key != "settings"}, indent=1))


if __name__ == "__main__":
    main()
