"""Settings by name: those of the papers' networks and of ours, for `Config` and `lipbounds train --preset`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lipbounds._text import near

# mnist-784-512-512-10 is ours (benchmarks/results/crm-mnist-784-512-512-10.md). The presets that end in -published are
# rows of Table 1 of arXiv 2310.00116, with the values of the authors' published runs. Their CIFAR-10 radii are in units
# of inputs in [-1, 1]: r0 0.2, t 5 and lambda 15 there are 0.1, 10 and 30 in pixels. After their ten warm-up epochs the
# constants are so large that the radius term does not bring them back (benchmarks/results/crm-convergence-h200.md);
# the presets of the same networks start from layers of norm 1, and the radius term sets in after one epoch.
_PUBLISHED = {
    "batch_size": 512,
    "learning_rate": 1e-3,
    "final_learning_rate": 1e-6,
    "epochs": 400,
    "initialisation": "published",
    "warmup": 10,
    "lam": 30.0,
    "constants": "liplt",
}
_HELD = {"initialisation": "unit", "warmup": 1, "ramp": 5, "stop_if_uncertified": 20}
_MNIST = {"dataset": "mnist", "decay_from": 25, "power_iterations": 10, "r0": 2.2, "t": 5.0, "eps": 1.58}
_PIXELS = {"mean": 0.5, "std": 0.5, "r0": 0.1, "t": 10.0, "eps": 36 / 255}
_CHANGES = {"flip": True, "degrees": 10.0, "translate": 0.1}
_COLOUR = {**_PUBLISHED, **_PIXELS, **_CHANGES, "decay_from": 200, "power_iterations": 5}
_ROWS: Mapping[str, Mapping[str, Any]] = {
    "mnist-4C3F": {**_PUBLISHED, **_MNIST, "arch": "4C3F"},
    "cifar10-6C2F": {**_COLOUR, "dataset": "cifar10", "arch": "6C2F"},
    "tiny-imagenet-8C2F": {**_COLOUR, "dataset": "tiny-imagenet", "arch": "8C2F"},
}
_WIDER = {"r0": 0.2, "lam": 15.0, "final_learning_rate": 1e-5}
# The networks of the tables of Chen et al., AAAI 2022, and Wu et al., NeurIPS 2021; the loss is the first word of the
# command. The papers do not print the epochs, the weight decay and the momentum: these are those of the code of TRADES.
_ROBUST = {
    "loss": "at",
    "attack_eps": 8 / 255,
    "optimiser": "sgd",
    "nesterov": False,
    "learning_rate": 0.1,
    "weight_decay": 2e-4,
    "schedule": "multi-step",
    "milestones": "50,75",
    "epochs": 100,
    "batch_size": 128,
    "crop": 4,
    "flip": True,
    "warmup": 0,
    "validate_every": 0,
    "robust_every": 5,
}
_ATTACKED = {
    "cifar10-resnet18": {"dataset": "cifar10", "arch": "resnet18"},
    "cifar10-wrn-34-10": {"dataset": "cifar10", "arch": "wrn-34-10"},
    "cifar100-resnet18": {"dataset": "cifar100", "arch": "resnet18"},
    "tiny-imagenet-resnet50": {"dataset": "tiny-imagenet", "arch": "resnet50"},
}
_NORM_ONE = {
    "loss": "margin",
    "constants": "naive",
    "power_iterations": 1,
    "temperature": 0.25,
    "final_learning_rate": 1e-5,
    "schedule": "cosine",
    "warmup": 0,
    "validate_every": 0,
}
_TURNED = {"refresh": 20, "batch_size": 128, "average": "ema", "ema_decay": 0.995}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mnist-784-512-512-10": {
        "dataset": "mnist",
        "arch": "784-512-512-10",
        "activation": "maxmin",
        "constants": "recursion",
        "lam": 15.0,
        "r0": 2.2,
        "t": 10.0,
        "learning_rate": 3e-3,
        "final_learning_rate": 3e-5,
        "multiplier_rate": 1e-2,
        "warmup": 1,
        "decay_from": 30,
        "epochs": 160,
    },
    "mnist-4C3F": {**_ROWS["mnist-4C3F"], **_HELD, "warmup": 0},
    "mnist-4C3F-cholesky": {
        **_NORM_ONE,
        "dataset": "mnist",
        "arch": "4C3F-cholesky",
        "refresh": 5,
        "eps": 1.58,
        "batch_size": 256,
        "learning_rate": 1.5e-3,
        "epochs": 4,
    },
    "mnist-lipnext": {
        **_NORM_ONE,
        **_TURNED,
        "dataset": "mnist",
        "arch": "lipnext-L2-2W32",
        "eps": 1.58,
        "epochs": 8,
    },
    "cifar10-lipnext": {
        **_NORM_ONE,
        **_TURNED,
        "dataset": "cifar10",
        "arch": "lipnext-L1-2W16F256-symmetric",
        "eps": 36 / 255,
        "batch_size": 256,
        "angle": 0.015,
        "crop": 4,
        "border": "mirror",
        "epochs": 30,
    },
    "cifar10-6C2F": {**_ROWS["cifar10-6C2F"], **_HELD, **_WIDER},
    "tiny-imagenet-8C2F": {**_ROWS["tiny-imagenet-8C2F"], **_HELD, **_WIDER},
    **{f"{name}-published": settings for name, settings in _ROWS.items()},
    **{name: {**_ROBUST, **network} for name, network in _ATTACKED.items()},
}


def preset(name: str, epochs: int | None = None) -> dict[str, Any]:
    """The settings of a preset, to be changed and passed to `Config`. ValueError for an unknown name.

    With another number of epochs the start of the decay and the milestones keep their shares of them. So does a warm-up
    of several epochs; one of a single epoch and the ramp stay as they are, if there are so many epochs.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{near(name, PRESETS)}; known: {', '.join(PRESETS)}")
    settings = dict(PRESETS[name])
    if epochs is not None:
        share = epochs / settings["epochs"]
        known = [key for key in ("warmup", "decay_from") if key in settings]
        shrunk: dict[str, Any] = {key: round(settings[key] * share) for key in known}
        if settings["warmup"] <= 1:
            shrunk["warmup"] = settings["warmup"]
        ramp = min(settings.get("ramp", 0), epochs - shrunk["warmup"])
        settings |= {"epochs": epochs, **shrunk, **({"ramp": ramp} if "ramp" in settings else {})}
        if "milestones" in settings:
            settings["milestones"] = _scaled(settings["milestones"], share, epochs)
    return settings


def _scaled(milestones: str, share: float, epochs: int) -> str:
    """The milestones at the same share of the epochs; those that fall on one another or on an end are left out."""
    edges = {round(int(part) * share) for part in milestones.split(",")}
    return ",".join(str(edge) for edge in sorted(edges) if 0 < edge < epochs)
