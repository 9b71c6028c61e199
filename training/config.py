"""What a training run is: one frozen record, checked before anything is computed, stored as JSON beside the run."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

from lipbounds.training.data import DATASETS
from lipbounds.training.losses import TRANSFORMS
from lipbounds.training.models import ACTIVATIONS, ModelSpec, spec_for

LOSSES = ("crm", "cross-entropy", "gloro", "lipschitz-margin")
CONSTANTS = ("naive", "liplt", "recursion")
PAIRS = ("pairwise", "per-class", "whole")
SCHEDULES = ("exponential", "cosine", "constant")
AVERAGES = ("none", "ema", "swa")
PRECISIONS = ("float32", "float64")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on; with the data and the seed it repeats bit for bit on the same machine.

    Args:
        dataset: a key of `data.DATASETS`.
        data_dir: folder of its official files; None is the environment's LIPBOUNDS_DATA.
        arch: widths such as "784-512-512-10", or a key of `models.ARCHITECTURES`.
        activation: "relu" or "maxmin".
        mean, std: of the normalisation (x - mean) / std inside the model; x are pixels in [0, 1].
        loss: "crm", "cross-entropy", "gloro" or "lipschitz-margin".
        constants: the bound in the loss: "naive", "liplt" or "recursion" (LipSDP's ellipsoid recursion).
        pairs: what stands for L_ij in the loss: "pairwise" L_ij, "per-class" L_i + L_j, "whole" sqrt(2) L.
        lam, r0, t, g: of CRM (`losses`); r0 in pixel units, t in their inverse.
        eps: of GloRo and Lipschitz-margin training, and of the validation's certified accuracy; pixel units, l2.
        warmup: epochs of plain cross-entropy before the constants enter.
        power_iterations: per step, of naive and liplt.
        refresh: recompute the constants and their gradient every so many steps; they are reused in between.
        precision: in which the constants are computed. The network itself is float32.
        multiplier_rate: learning rate of the recursion's multipliers, which are trained with the weights.
        epochs, batch_size: every epoch visits the images in a new order and leaves out the last incomplete batch.
        learning_rate, final_learning_rate: of Adam at the start and at the end.
        schedule: "exponential" or "cosine" from epoch `decay_from` on, or "constant".
        smoothing: label smoothing of the cross-entropy.
        flip, degrees, translate: augmentation: mirror, rotation, shift as a share of the size.
        average: "ema" (with `ema_decay` per step) or "swa" (mean over the steps from epoch `average_from` on) of the
            weights; the averaged weights are those validated and saved. decay_from and average_from count epochs done.
        holdout: share of the training images that is kept out of training for validation. With 0 the progress figures
            are of training images, and called so.
        validate_every: epochs between validations by a proved bound; 0 for none.
        checkpoint_every: epochs between checkpoints; the last epoch is always saved.
        max_skipped: steps in one epoch that may be skipped for a gradient that is not finite before training stops.
        seed: of weights, order, augmentation and power iteration.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    arch: str = "64-64-64-10"
    activation: str = "relu"
    mean: float = 0.0
    std: float = 1.0
    loss: str = "crm"
    constants: str = "recursion"
    pairs: str = "pairwise"
    lam: float = 15.0
    r0: float = 2.2
    t: float = 5.0
    g: str = "negative"
    eps: float = 1.58
    warmup: int = 1
    power_iterations: int = 5
    refresh: int = 1
    precision: str = "float32"
    multiplier_rate: float = 5e-3
    epochs: int = 60
    batch_size: int = 512
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    schedule: str = "exponential"
    decay_from: int = 0
    smoothing: float = 0.0
    flip: bool = False
    degrees: float = 0.0
    translate: float = 0.0
    average: str = "none"
    ema_decay: float = 0.999
    average_from: int = 0
    holdout: float = 0.0
    validate_every: int = 10
    checkpoint_every: int = 1
    max_skipped: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {value!r}{_near(value, known)}"
                )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not (low <= value <= high and value < math.inf):
                span = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
                raise ValueError(f"{name} must be {span}, got {value}")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate:g} is above learning_rate {self.learning_rate:g}"
            )
        if self.smoothing and self.loss not in ("crm", "cross-entropy"):
            raise ValueError(f"smoothing is of cross-entropy and CRM, not of {self.loss}: leave it 0")
        if self.warmup > self.epochs or self.decay_from > self.epochs:
            raise ValueError(
                f"warmup ({self.warmup}) and decay_from ({self.decay_from}) are epochs of the {self.epochs} trained"
            )
        if self.average != "none" and self.average_from >= self.epochs:
            raise ValueError(f"average_from ({self.average_from}) must lie below epochs ({self.epochs})")

    @classmethod
    def usual(cls, dataset: str, **changes: Any) -> Config:
        """What suits a data set, with changes."""
        return cls.from_json(defaults(dataset) | changes)

    @property
    def uses_constants(self) -> bool:
        """Whether a bound stands in the loss."""
        return self.loss != "cross-entropy" and not (self.loss == "crm" and self.lam == 0)

    def spec(self, input_shape: tuple[int, int, int], classes: int) -> ModelSpec:
        """The model for images of this shape. ValueError where architecture and data do not fit."""
        return spec_for(
            self.arch, input_shape, classes, activation=self.activation, mean=self.mean, std=self.std
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], origin: str = "this configuration") -> Config:
        """Strict: an unknown key or a wrong type is a ValueError that names it."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"{origin} is no table of settings, but {type(fields).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in fields if key not in names]
        if unknown:
            listed = ", ".join(f"{key!r}{_near(key, names)}" for key in unknown)
            raise ValueError(f"{origin} has unknown settings: {listed}. Known: {', '.join(names)}")
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "dataset": tuple(DATASETS),
    "activation": tuple(ACTIVATIONS),
    "loss": LOSSES,
    "constants": CONSTANTS,
    "pairs": PAIRS,
    "g": tuple(TRANSFORMS),
    "schedule": SCHEDULES,
    "average": AVERAGES,
    "precision": PRECISIONS,
}
_POSITIVE = 1e-12
_MOST = 1e9  # of what is counted
_RANGES: Mapping[str, tuple[float, float]] = {
    "mean": (-1e6, 1e6),
    "std": (_POSITIVE, 1e6),
    "lam": (0, math.inf),
    "r0": (_POSITIVE, math.inf),
    "t": (_POSITIVE, math.inf),
    "eps": (0, math.inf),
    "warmup": (0, _MOST),
    "power_iterations": (1, _MOST),
    "refresh": (1, _MOST),
    "multiplier_rate": (0, 1),
    "epochs": (1, _MOST),
    "batch_size": (1, _MOST),
    "learning_rate": (_POSITIVE, math.inf),
    "final_learning_rate": (0, math.inf),
    "decay_from": (0, _MOST),
    "smoothing": (0, 0.999),
    "degrees": (0, 180),
    "translate": (0, 0.9),
    "ema_decay": (0, 0.9999999),
    "average_from": (0, _MOST),
    "holdout": (0, 0.9),
    "validate_every": (0, _MOST),
    "checkpoint_every": (1, _MOST),
    "max_skipped": (0, _MOST),
    "seed": (0, 2**32 - 1),
}

# The first preset is ours (benchmarks/results/crm-mnist-784-512-512-10.md). The others are rows of Table 1 of arXiv
# 2310.00116, with the values of the authors' published runs. Their CIFAR-10 radii are in units of inputs in [-1, 1]:
# r0 0.2, t 5 and lambda 15 there are 0.1, 10 and 30 in pixels.
_ADAM = {"batch_size": 512, "learning_rate": 1e-3, "final_learning_rate": 1e-6}
_MNIST = {
    **_ADAM,
    "dataset": "mnist",
    "epochs": 400,
    "decay_from": 25,
    "final_learning_rate": 1e-6,
    "warmup": 10,
    "power_iterations": 10,
    "lam": 30.0,
    "r0": 2.2,
    "t": 5.0,
    "eps": 1.58,
}
_COLOUR = {
    **_ADAM,
    "mean": 0.5,
    "std": 0.5,
    "epochs": 400,
    "decay_from": 200,
    "final_learning_rate": 1e-6,
    "warmup": 10,
    "power_iterations": 5,
    "lam": 30.0,
    "r0": 0.1,
    "t": 10.0,
    "eps": 36 / 255,
    "flip": True,
    "degrees": 10.0,
    "translate": 0.1,
}
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
    "mnist-4C3F": {**_MNIST, "arch": "4C3F", "constants": "liplt"},
    "cifar10-6C2F": {**_COLOUR, "dataset": "cifar10", "arch": "6C2F", "constants": "liplt"},
    "tiny-imagenet-8C2F": {**_COLOUR, "dataset": "tiny-imagenet", "arch": "8C2F", "constants": "liplt"},
}


def preset(name: str, epochs: int | None = None) -> dict[str, Any]:
    """The settings of a preset, to be changed and passed to `Config`. ValueError for an unknown name.

    With another number of epochs, warm-up and the begin of the decay keep their share of them.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{_near(name, PRESETS)}; known: {', '.join(PRESETS)}")
    settings = dict(PRESETS[name])
    if epochs is not None:
        parts = {key: round(settings[key] * epochs / settings["epochs"]) for key in ("warmup", "decay_from")}
        settings |= {"epochs": epochs, **parts}
    return settings


def _near(word: Any, known: Any) -> str:
    found = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _check_types(config: Config) -> None:
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if hint is float and type(value) is int:
            number = float(value) if abs(value) < 1e308 else math.inf
            object.__setattr__(config, field.name, number)  # 15 in a JSON file means 15.0
        elif not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
            name = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ValueError(f"{field.name} must be {name}, got {value!r}")


def from_text(text: str, origin: str) -> dict[str, Any]:
    """Settings from JSON text, not checked yet."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{origin} is no table of settings, but {type(fields).__name__}")
    return fields


def defaults(dataset: str) -> dict[str, Any]:
    """What suits a data set where nothing else is asked for."""
    return {"dataset": dataset, **(_DEFAULTS.get(dataset, {}) if isinstance(dataset, str) else {})}


_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "digits": {
        "arch": "64-64-64-10",
        "batch_size": 64,
        "learning_rate": 4e-3,
        "r0": 1.0,
        "t": 10.0,
        "lam": 5.0,
        "eps": 0.5,
    },
    "mnist": {"arch": "784-512-512-10", "t": 10.0, "learning_rate": 3e-3, "multiplier_rate": 1e-2},
    "cifar10": {"arch": "6C2F", "eps": 36 / 255, "r0": 0.2, "t": 10.0, "mean": 0.5, "std": 0.5},
    "cifar100": {"arch": "6C2F", "eps": 36 / 255, "r0": 0.2, "t": 10.0, "mean": 0.5, "std": 0.5},
    "tiny-imagenet": {"arch": "8C2F", "eps": 36 / 255, "r0": 0.2, "t": 10.0},
}
