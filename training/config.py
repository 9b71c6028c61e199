"""Configuration of a training run: one frozen record, checked before anything is computed and saved as JSON."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from lipbounds._text import near, parsed
from lipbounds.training.data import DATASETS
from lipbounds.training.initial import INITIALISATIONS
from lipbounds.training.losses import TRANSFORMS
from lipbounds.training.models import ACTIVATIONS, NAMED, SIMPLE, ModelSpec, spec_for
from lipbounds.training.own_data import is_own
from lipbounds.training.robust_losses import ROBUST

_COUNTS = 1e9  # no setting that counts something is larger
_POSITIVE = 1e-12
_PATH = " (or a path: an .npz file, or a folder such as ./images)"


def _setting(
    default: Any,
    group: str,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """A field of `Config`: default, section and line of the help, and what it may be: low <= x <= high, or a choice."""
    most = _COUNTS if isinstance(default, int) else math.inf
    limits = None if low is None else (low, most if high is None else high)
    return dataclasses.field(
        default=default, metadata={"group": group, "help": help, "limits": limits, "choices": tuple(choices)}
    )


#: Names of `Config.loss`; of the first line all but the second contain a bound, those of the second attack the images.
LOSSES = ("crm", "cross-entropy", "gloro", "gloro-trades", "lipschitz-margin", "emma", "margin", *ROBUST)
# Robust losses with the divergence of TRADES, and those whose weight width-adjusted regularisation may move.
_REGULARISED = ("trades", "fast-trades", "fast-trades-2", "backward-smoothing")
_ADJUSTED = (*_REGULARISED, "generalised-at")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run; with the same data and machine a run repeats bit for bit.

    Pixels lie in [0, 1] and radii are in those units. `__post_init__` raises ValueError for a setting of the wrong
    type, outside its limits, or at odds with another one.
    """

    # fmt: off
    dataset: str = _setting("digits", "data", "Data set of images, or a path: an .npz file, or a folder with one "
                          "folder of images per class (./folder).", choices=DATASETS)
    data_dir: str | None = _setting(None, "data", "Folder of the data set's official files.")
    arch: str = _setting("64-64-64-10", "network", "Widths of an MLP such as 784-512-512-10, or an architecture: "
                         f"{', '.join(SIMPLE)}; with sizes {NAMED}.")
    activation: str = _setting("relu", "network", "Activation function.", choices=ACTIVATIONS)
    initialisation: str = _setting("lecun", "network", "Initial weights of plain layers: lecun, published (PyTorch's "
                                   "default) or unit (layers of norm 1).", choices=INITIALISATIONS)
    mean: float = _setting(0.0, "network", "Mean that the model subtracts from its input first.", -1e6, 1e6)
    std: float = _setting(1.0, "network", "Standard deviation by which it then divides.", _POSITIVE, 1e6)
    loss: str = _setting("crm", "loss", "Certified radius maximisation (crm), one of its baselines, or a robust "
                         "loss (at, trades, ...).",
                         choices=LOSSES)
    constants: str = _setting("recursion", "loss", "Bound in the loss; recursion is LipSDP's ellipsoid recursion, "
                              "local the naive product near every image.",
                              choices=("naive", "liplt", "recursion", "local"))
    pairs: str = _setting("pairwise", "loss", "Constant of a pair of classes in the loss: L_ij (pairwise), "
                          "L_i + L_j (per-class) or sqrt(2) L (whole).", choices=("pairwise", "per-class", "whole"))
    lam: float = _setting(15.0, "loss", "Weight of the certified radius (CRM).", 0)
    r0: float = _setting(2.2, "loss", "Only certified radii below this one are maximised (CRM).", _POSITIVE)
    t: float = _setting(5.0, "loss", "Sharpness of the smooth minimum over the classes (CRM).", _POSITIVE)
    g: str = _setting("negative", "loss", "Decreasing function of the radius that is minimised (CRM).",
                      choices=TRANSFORMS)
    temperature: float = _setting(0.25, "loss", "Radius over which a margin still counts (margin).", _POSITIVE)
    trades: float = _setting(1.0, "loss", "Weight of the extra class's divergence (gloro-trades).", 0)
    certificate: float = _setting(0.0, "loss", "Weight of the mean share of eps that radii of right answers lack, "
                                  "beside any loss with constants.", 0)
    eps: float = _setting(1.58, "loss", "Radius (l2) of validation, GloRo and Lipschitz-margin training.", 0)
    attack_eps: float = _setting(8 / 255, "loss", "Radius of the attack in a robust loss and of PGD accuracies.", 0)
    attack_norm: str = _setting("linf", "loss", "Norm of that radius.", choices=("linf", "l2"))
    attack_steps: int = _setting(0, "loss", "Steps of the attack in a robust loss; 0 for the usual number.", 0, 10000)
    attack_step: float = _setting(0.0, "loss", "Length of its steps; 0 for the usual share of attack_eps.", 0)
    attack_start: str = _setting("usual", "loss", "Where the attack begins: in the ball (uniform), near the image, or "
                                 "at it (clean).", choices=("usual", "uniform", "near", "clean"))
    robust_weight: float = _setting(0.0, "loss", "Weight of the second term of a robust loss (beta of TRADES); 0 for "
                                    "the usual one.", 0)
    gamma: float = _setting(1.0, "loss", "Noise on the logits (backward-smoothing).", 0)
    tau: float = _setting(0.5, "loss", "Temperature (consistency).", _POSITIVE)
    divergence: str = _setting("js", "loss", "Divergence of the two views (consistency).", choices=("js", "min"))
    awp: float = _setting(0.0, "loss", "Adversarial weight perturbation in a robust loss, a share of the weights.", 0)
    war: float = _setting(0.0, "loss", "Ratio of the two terms of a robust loss that its weight follows "
                          "(width-adjusted regularisation); 0 for a fixed weight.", 0)
    radius_weight: float = _setting(0.0, "loss", "Weight of CRM's radius term beside a robust loss.", 0)
    warmup: int = _setting(1, "loss", "Epochs of cross-entropy alone at the start.", 0)
    ramp: int = _setting(0, "loss", "Epochs after the warm-up in which lam (for margin losses eps, for robust ones "
                         "attack_eps, with warm-up only where there is a ramp) rises from 0 to its value.", 0)
    power_iterations: int = _setting(5, "loss", "Power iterations per step, for naive and liplt.", 1)
    refresh: int = _setting(1, "loss", "Recompute the constants every N steps, and reuse them in between.", 1)
    precision: str = _setting("float32", "loss", "Precision of the constants; the network itself is float32.",
                              choices=("float32", "float64"))
    forward: str = _setting("float32", "optimiser", "Precision of the network in training; weights, constants and "
                            "proofs keep theirs.", choices=("float32", "bfloat16"))
    optimiser: str = _setting("adam", "optimiser", "Optimiser of the weights.", choices=("adam", "nadam", "sgd"))
    momentum: float = _setting(0.9, "optimiser", "Momentum (sgd).", 0, 0.9999)
    nesterov: bool = _setting(True, "optimiser", "Whether the momentum is Nesterov's (sgd).")
    weight_decay: float = _setting(0.0, "optimiser", "Decay of kernels, in the gradient of sgd, beside the step of the "
                                   "others (AdamW); biases and BatchNorm have none.", 0)
    lookahead: int = _setting(0, "optimiser", "Go half the way back every N steps (Lookahead); 0 for never.", 0)
    clip: float = _setting(0.0, "optimiser", "Largest norm of a step's gradient; 0 for any.", 0)
    angle: float = _setting(0.03, "optimiser", "Angle in radians by which a step turns the matrices of orthogonal "
                            "layers that are trained as such (stiefel); it falls as the learning rate does.",
                            _POSITIVE, 0.2)
    multiplier_rate: float = _setting(5e-3, "optimiser", "Learning rate of the recursion's multipliers.", 0, 1)
    epochs: int = _setting(60, "optimiser", "Passes over the training images.", 1)
    batch_size: int = _setting(512, "optimiser", "Images per step; an incomplete last batch is left out.", 1)
    learning_rate: float = _setting(1e-3, "optimiser", "Learning rate.", _POSITIVE)
    final_learning_rate: float = _setting(1e-5, "optimiser", "Final learning rate.", 0)
    schedule: str = _setting("exponential", "optimiser", "Decay of the learning rate.",
                             choices=("exponential", "cosine", "multi-step", "halving", "cyclic", "constant"))
    decay_from: int = _setting(0, "optimiser", "Epochs before the decay begins.", 0)
    milestones: str = _setting("", "optimiser", "Epochs after which a multi-step rate falls to a tenth, such as 50,75; "
                               "without them one half and three quarters of the decay.")
    smoothing: float = _setting(0.0, "loss", "Label smoothing of the cross-entropy.", 0, 0.999)
    flip: bool = _setting(False, "data", "Mirror each training image with probability 1/2.")
    degrees: float = _setting(0.0, "data", "Rotate training images by at most this many degrees.", 0, 180)
    translate: float = _setting(0.0, "data", "Shift training images by at most this share of their size.", 0, 0.9)
    crop: int = _setting(0, "data", "Shift training images by at most this many pixels (random crop).", 0, 1000)
    border: str = _setting("black", "data", "What a crop shows outside the image: black, or the image mirrored at its "
                           "border.", choices=("black", "mirror"))
    autoaugment: bool = _setting(False, "data", "AutoAugment: two random operations of the policy of CIFAR-10 on every "
                                 "training image.")
    jitter: float = _setting(0.0, "data", "Change brightness and contrast of training images by at most this share, "
                             "and saturation by twice as much.", 0, 0.4)
    cutout: int = _setting(0, "data", "Side of a square that is blanked out in every training image.", 0, 1000)
    average: str = _setting("none", "optimiser", "Validate and save averaged weights: a moving average (ema), or "
                            "the mean over the steps (swa).", choices=("none", "ema", "swa"))
    ema_decay: float = _setting(0.999, "optimiser", "Decay of the moving average per step.", 0, 0.9999999)
    average_from: int = _setting(0, "optimiser", "Epochs before the average begins.", 0)
    holdout: float = _setting(0.0, "data", "Share of the training images kept out for validation; with 0, validation "
                              "uses training images.", 0, 0.9)
    validate_every: int = _setting(10, "run", "Epochs between validations by a proved bound; 0 for none.", 0)
    final_epochs: float = _setting(10.0, "run", "Epochs of the run that the final bound, or a validation's, may take, "
                                   "but at least 300 s (LipLT and naive on a GPU: 5 s); a cheaper bound then takes "
                                   "its place, and is reported as such. 0 for any time.", 0)
    checkpoint_every: int = _setting(1, "run", "Epochs between checkpoints; the last epoch is always saved.", 1)
    stop_if_uncertified: int = _setting(0, "run", "Stop after N epochs in a row, behind warm-up and ramp, in which at "
                                        "most 1 % are certified at eps by the constants of the loss; 0 for never.", 0)
    robust_every: int = _setting(1, "run", "Epochs between accuracies under a short PGD in runs with a robust loss; 0 "
                                 "for none.", 0)
    stop_if_overfitted: bool = _setting(False, "run", "Stop once PGD accuracy collapses under a robust loss "
                                        "(catastrophic overfitting).")
    max_skipped: int = _setting(100, "run", "Steps per epoch that may be skipped for a gradient that is not finite.", 0)
    seed: int = _setting(0, "run", "Random seed of weights, order, augmentation and power iteration.", 0, 2**32 - 1)
    # fmt: on

    def __post_init__(self) -> None:
        _check_types(self)
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            known, limits = field.metadata["choices"], field.metadata["limits"]
            if known and value not in known and not (name == "dataset" and is_own(value)):
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}{_PATH if name == 'dataset' else ''}, got {value!r}"
                    f"{near(value, known)}"
                )
            low, high = limits or (-math.inf, math.inf)
            if limits and not (low <= value <= high and value < math.inf):
                span = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
                raise ValueError(f"{name} must be {span}, got {value}")
        if self.ends_at_final_rate and self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate:g} is above learning_rate {self.learning_rate:g}"
            )
        if self.smoothing and self.loss not in ("crm", "cross-entropy"):
            raise ValueError(f"smoothing applies to cross-entropy and crm, not to {self.loss}: leave it at 0")
        if self.certificate and (not self.uses_constants or self.eps == 0):
            raise ValueError("certificate needs a loss with constants, and eps above 0")
        if self.uses_constants and self.constants == "local" and (self.eps == 0 or self.refresh > 1):
            raise ValueError(
                "constants=local needs eps above 0, and refresh=1: they are those of one batch's images"
            )
        if self.warmup > self.epochs or self.decay_from > self.epochs:
            raise ValueError(
                f"warmup ({self.warmup}) and decay_from ({self.decay_from}) must be at most epochs ({self.epochs})"
            )
        if self.warmup + self.ramp > self.epochs:
            raise ValueError(
                f"warmup ({self.warmup}) and ramp ({self.ramp}) together must be at most epochs ({self.epochs})"
            )
        if not all(a < b for a, b in itertools.pairwise((0, *self.edges, self.epochs))):
            raise ValueError(
                f"milestones must rise, from at least 1 to less than epochs ({self.epochs}), got {self.milestones!r}"
            )
        if self.milestones and self.schedule != "multi-step":
            raise ValueError(
                f"milestones belong to schedule=multi-step, not to {self.schedule}: leave them out, or set it"
            )
        self._check_robust()
        if self.average != "none" and self.average_from >= self.epochs:
            raise ValueError(f"average_from ({self.average_from}) must be below epochs ({self.epochs})")

    def _check_robust(self) -> None:
        if not self.robust:
            given = [name for name in ("awp", "war", "radius_weight") if getattr(self, name)]
            if given:
                other = "; crm has lam in the place of radius_weight" if "radius_weight" in given else ""
                raise ValueError(
                    f"{', '.join(given)} stands beside a robust loss, and {self.loss} is none{other}"
                )
            return
        if self.regularises and self.attack_start == "clean":
            raise ValueError(
                f"attack_start=clean does not go with {self.loss}: its divergence has no gradient at the image"
            )
        if self.war and self.loss not in _ADJUSTED:
            raise ValueError(
                f"war moves the weight of {', '.join(_ADJUSTED)}, and {self.loss} is none of them"
            )
        if self.war and self.robust_weight:
            raise ValueError("war moves the weight of the second term from 0 on: leave robust_weight at 0")

    @classmethod
    def usual(cls, dataset: str, **changes: Any) -> Config:
        """The usual settings of a data set, with changes; see also `unproved`."""
        return unproved(cls.from_json(defaults(dataset) | changes), changes)

    @property
    def uses_constants(self) -> bool:
        """Whether the loss contains a bound."""
        if self.robust:
            return self.radius_weight > 0 or self.certificate > 0
        return self.loss != "cross-entropy" and not (self.loss == "crm" and self.lam == 0)

    @property
    def ends_at_final_rate(self) -> bool:
        """Whether the learning rate goes to `final_learning_rate`."""
        return self.schedule in ("exponential", "cosine", "cyclic") and self.decay_from < self.epochs

    @property
    def edges(self) -> tuple[int, ...]:
        """The epochs of `milestones`."""
        try:
            return tuple(int(part) for part in self.milestones.split(",") if self.milestones)
        except ValueError:
            raise ValueError(
                f"milestones must be whole numbers with commas, such as 50,75, got {self.milestones!r}"
            ) from None

    @property
    def robust(self) -> bool:
        """Whether the loss attacks the images of every step."""
        return self.loss in ROBUST

    @property
    def attack_rises(self) -> int:
        """Epochs at the start in which the attack is weaker than later."""
        return self.warmup + self.ramp if self.robust and self.ramp else 0

    @property
    def regularises(self) -> bool:
        """Whether the loss has the divergence of TRADES between clean and attacked answers."""
        return self.loss in _REGULARISED

    @property
    def views(self) -> int:
        """Augmented views of every image that a step takes."""
        return 2 if self.loss == "consistency" else 1

    def spec(self, input_shape: tuple[int, int, int], classes: int) -> ModelSpec:
        """The model for images of this shape. ValueError where architecture and data do not fit."""
        return spec_for(
            self.arch, input_shape, classes, activation=self.activation, mean=self.mean, std=self.std
        )

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], origin: str = "this configuration") -> Config:
        """The configuration with these settings. ValueError names an unknown key or a wrong type."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"{origin} must be a JSON object of settings, got {type(fields).__name__}")
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in fields if key not in names]
        if unknown:
            listed = ", ".join(f"{key!r}{near(key, names)}" for key in unknown)
            raise ValueError(f"{origin} has unknown settings: {listed}. Known: {', '.join(names)}")
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error


def described(field: dataclasses.Field[Any]) -> str:
    """The help of a field of `Config`, with its choices."""
    known = ", ".join(field.metadata["choices"])
    return field.metadata["help"] + (f" One of {known}." if known else "")


Config.__doc__ = f"{inspect.getdoc(Config)}\n\nArgs:\n" + "\n".join(
    f"    {field.name}: {described(field)}" for field in dataclasses.fields(Config)
)


def unproved(config: Config, given: Iterable[str]) -> Config:
    """Without validations, unless they are given, where a robust loss stands alone: nothing aims at a certificate."""
    if not config.robust or config.uses_constants or "validate_every" in given:
        return config
    return dataclasses.replace(config, validate_every=0)


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
        fields = parsed(text)
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{origin} must be a JSON object of settings, got {type(fields).__name__}")
    return fields


def defaults(dataset: str) -> dict[str, Any]:
    """The usual settings of a data set."""
    return {"dataset": dataset, **(_DEFAULTS.get(dataset, {}) if isinstance(dataset, str) else {})}


_DIGITS = {
    "batch_size": 64,
    "learning_rate": 4e-3,
    "r0": 1.0,
    "t": 10.0,
    "lam": 5.0,
    "eps": 0.5,
    "attack_eps": 0.1,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "digits": {"arch": "64-64-64-10", **_DIGITS},
    "mnist": {
        "arch": "784-512-512-10",
        "t": 10.0,
        "learning_rate": 3e-3,
        "multiplier_rate": 1e-2,
        "attack_eps": 0.1,
    },
    "cifar10": {"arch": "6C2F", "eps": 36 / 255, "r0": 0.2, "t": 10.0, "mean": 0.5, "std": 0.5},
    "cifar100": {"arch": "6C2F", "eps": 36 / 255, "r0": 0.2, "t": 10.0, "mean": 0.5, "std": 0.5},
    "tiny-imagenet": {"arch": "8C2F", "eps": 36 / 255, "r0": 0.2, "t": 10.0},
}
