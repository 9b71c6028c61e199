"""Every preset in small, on digits: behind its warm-up it certifies more than plain training, and the old one warns.

The networks are small and the radii those of the preset in units of its eps, so that eps is 0.5 as digits have it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from flax import nnx

from lipbounds.training import Config, fit, preset
from lipbounds.training.initial import initialise
from lipbounds.training.lipschitz_nets import OrthogonalConvNet
from lipbounds.training.models import ConvNet
from lipbounds.training.presets import PRESETS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("presets")]
EPS = 0.5
DEEP = [(8, 3, 1, 1), (8, 4, 2, 1), (8, 3, 1, 1), (8, 3, 1, 1)]
SMALL = {"784-512-512-10": "64-32-32-10", "4C3F": "2C2F", "8C2F": "2C2F"}  # 6C2F: `deep`


def small(name: str, epochs: int, **changes: Any) -> Config:
    full = Config.from_json(preset(name))
    unit = EPS / full.eps
    fields: dict[str, Any] = {
        "dataset": "digits",
        "arch": SMALL.get(full.arch, full.arch),
        "epochs": epochs,
        "batch_size": 64,
        "learning_rate": 4e-3,
        "final_learning_rate": 4e-5,
        "decay_from": epochs // 2,
        "flip": False,
        "degrees": 0.0,
        "translate": 0.0,
        "validate_every": epochs,
        "lam": full.lam / unit,
        "r0": full.r0 * unit,
        "t": full.t / unit,
        "eps": EPS,
    }
    return dataclasses.replace(full, **{**fields, **changes})


def deep(config: Config) -> nnx.Module:
    model = ConvNet(
        (8, 8, 1), convolutions=DEEP, dense=[32], mean=config.mean, std=config.std, rngs=nnx.Rngs(config.seed)
    )
    return initialise(model, config.initialisation, config.seed)


def trained(config: Config) -> Any:
    return fit(config, model=deep(config) if config.arch == "6C2F" else None)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "name",
    [name for name, row in PRESETS.items() if "lam" in row and not name.endswith("-published")],
)
def test_a_preset_certifies_more_than_training_without_the_radius(name: str, seed: int) -> None:
    """By proved bounds, over its warm-up and its ramp; its term keeps its hold all the time."""
    config = small(name, 12, seed=seed)
    assert config.warmup + config.ramp < 12
    log = trained(config).log
    plain = trained(dataclasses.replace(config, lam=0.0)).log[-1]
    assert log[-1]["guarantee"] == plain["guarantee"] == "verified"
    assert log[-1]["certified"] > plain["certified"] + 0.1 and log[-1]["clean"] > 0.8, (log[-1], plain)
    assert not [record["warning"] for record in log if "warning" in record]
    assert log[-1]["certified_estimate"] == pytest.approx(log[-1]["certified"], abs=0.02)


def test_the_published_schedule_loses_its_hold_and_says_so() -> None:
    """Ten of 400 epochs of warm-up on CIFAR-10 are 970 steps; here they are fewer, with a larger rate."""
    config = small("cifar10-6C2F-published", 17, warmup=15, validate_every=0, stop_if_uncertified=2)
    log = trained(config).log
    assert ["warning" in record for record in log] == [False] * 15 + [True] * 2
    assert log[-1]["certified_estimate"] < 0.01 and log[-1]["sample_accuracy"] > 0.9
    steps = [record["largest_constant_estimate"] for record in log]
    assert steps[14] > 10 * steps[0] and np.all(np.isfinite(steps))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_orthogonal_layers_certify_more_than_plain_ones(seed: int) -> None:
    """The margin preset by proved bounds, after as many epochs of the same loss."""
    config = small("mnist-4C3F-cholesky", 6, seed=seed, decay_from=0, temperature=0.08)
    options: Any = {"convolutions": [layer[::2] for layer in DEEP], "dense": [32], "rngs": nnx.Rngs(seed)}
    log = fit(config, model=OrthogonalConvNet((8, 8, 1), **options)).log[-1]
    plain = trained(dataclasses.replace(config, arch="6C2F", activation="maxmin", initialisation="unit")).log[
        -1
    ]
    assert log["guarantee"] == plain["guarantee"] == "verified"
    assert log["certified"] > plain["certified"] + 0.1 and log["clean"] > 0.8, (log, plain)
    assert "warning" not in log
    assert log["certified_estimate"] == pytest.approx(log["certified"], abs=0.02)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_lipnext_certifies_more_than_plain_training(seed: int) -> None:
    config = small("cifar10-lipnext", 20, seed=seed, decay_from=0, arch="lipnext-L2W8", crop=0)
    log = trained(config).log[-1]
    plain = trained(dataclasses.replace(config, loss="cross-entropy", arch="6C2F", average="none")).log[-1]
    assert log["guarantee"] == plain["guarantee"] == "verified"
    assert log["certified"] > plain["certified"] + 0.1 and log["clean"] > 0.8, (log, plain)
    assert log["certified_estimate"] == pytest.approx(log["certified"], abs=0.03)
