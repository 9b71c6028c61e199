"""Trained networks that are installed with lipbounds, each with its test images and a certificate."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds.results import UpperBound
from lipbounds.training import data as _data
from lipbounds.training.store import load_model

__all__ = ["DIGITS", "Example", "digits"]

#: Names of the networks of `digits`, and what they are.
DIGITS = {
    "mlp": "MLP 64-64-64-10, trained with CRM",
    "cnn": "CNN 2C2F (16 and 32 channels, 100 neurons), trained with CRM",
}
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, eq=False)
class Example:
    """A trained network, the images to certify, and the certificate of its Lipschitz constants.

    Args:
        name: "mlp" or "cnn".
        title: what the network is.
        model: a flax nnx module: a batch of pixels in [0, 1], (N, 8, 8, 1), to logits (N, 10); one image works, too.
        data: the data set that it was trained on; `x` and `y` are its test images and labels.
        weights: the file of the network, for the commands.
        certificate: the file that proves its constants (l2, all pairs of classes), for `lb.load_certificate`.
        settings: the configuration of its training (`lipbounds.training.Config.from_json` takes it).
        measured: what was found when it was made: bound and accuracies.

    Example:
        >>> import lipbounds as lb
        >>> example = lb.examples.digits()
        >>> example.x.shape, example.y.shape, example.form.num_outputs
        ((360, 8, 8, 1), (360,), 10)
    """

    name: str
    title: str
    model: Any
    data: _data.Dataset
    weights: Path
    certificate: Path
    settings: dict[str, Any]
    measured: dict[str, Any]

    @property
    def x(self) -> np.ndarray:
        """The test images, (360, 8, 8, 1), pixels in [0, 1]."""
        return self.data.test_x

    @property
    def y(self) -> np.ndarray:
        """Their labels, 0 to 9."""
        return self.data.test_y

    @functools.cached_property
    def form(self) -> LureForm:
        """The traced network of one image."""
        return lb.trace(self.model, self.x[0])

    @functools.cached_property
    def bound(self) -> UpperBound:
        """The bound of the certificate, proved again when it is first asked for, in about a second."""
        return lb.load_certificate(self.certificate, self.form)

    def __repr__(self) -> str:
        return f"Example({self.name!r}: {self.title}, {len(self.x)} test images)"


def digits(name: str = "mlp") -> Example:
    """A network that was trained on scikit-learn's handwritten digits for its certified radii.

    Args:
        name: "mlp" or "cnn", as in `DIGITS`.

    Raises:
        ValueError: another name.

    Example:
        >>> import lipbounds as lb
        >>> example = lb.examples.digits()
        >>> radii = lb.certified_radius(example.form, example.x[:9], example.y[:9], bound=example.bound)
        >>> radii.guarantee, bool(radii.certified(0.1).all())
        ('verified', True)
    """
    if name not in DIGITS:
        raise ValueError(f"there is no example {name!r}; there are {', '.join(DIGITS)}")
    weights, certificate = (_FOLDER / f"digits_{name}.{end}" for end in ("safetensors", "certificate"))
    found = json.loads((_FOLDER / f"digits_{name}.json").read_text(encoding="utf-8"))
    model, _ = load_model(weights)
    return Example(
        name, DIGITS[name], model, _data.digits(), weights, certificate, found.pop("settings"), found
    )
