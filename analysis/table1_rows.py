"""Rows of Tables 1 and 2 of arXiv 2310.00116 (Fazlyab et al., NeurIPS 2023) as data, and rows of our own beside them.

A row is a configuration (a preset and changes of it) and what the paper prints for it, in percent. The paper states its
eps as 1.58 for MNIST and 36/255 for CIFAR-10 and Tiny-ImageNet; for the units see `evaluation.paper_units`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lipbounds._text import near
from lipbounds.training import Config, preset

PAPER = "arXiv 2310.00116"


@dataclasses.dataclass(frozen=True)
class Published:
    """Accuracies in percent as printed in Table 1; None where there is a dash."""

    method: str
    model: str
    clean: float
    pgd: float | None
    certified: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One row that can be trained.

    Args:
        name: data set and method, such as "mnist/crm".
        method: as the table calls it.
        settings: changes of the data set's preset.
        published: the paper's row, None for rows of our own.
        base: the preset that the settings change; by default the one of the data set in `BASES`.
        small: the network of a trial, where it is not the usual one (`reproduction.Plan`).
    """

    name: str
    method: str
    settings: Mapping[str, Any]
    published: Published | None = None
    base: str = ""
    small: str = ""

    @property
    def group(self) -> str:
        """The name of the data set."""
        return self.name.partition("/")[0]

    def config(self, epochs: int | None = None, **changes: Any) -> Config:
        """The configuration; another number of epochs keeps the shape of the schedule (`preset`)."""
        start = preset(self.base or BASES[self.group], epochs)
        return Config.from_json({**start, **self.settings, **changes}, self.name)


#: The preset that the rows of a data set start from.
BASES: Mapping[str, str] = {
    "mnist": "mnist-4C3F",
    "cifar10": "cifar10-6C2F",
    "tiny-imagenet": "tiny-imagenet-8C2F",
}

_MODELS = {group: base.rpartition("-")[2] for group, base in BASES.items()}

#: Table 1. (method, model, clean, PGD, certified)
PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "mnist": (
        Published("Standard", "4C3F", 99.0, 45.4, 0.0),
        Published("GloRo", "4C3F", 92.9, 68.9, 50.1),
        Published("Local-Lip", "4C3F", 96.3, 78.2, 55.8),
        Published("CRM", "4C3F", 96.27, 88.04, 63.37),
    ),
    "cifar10": (
        Published("Standard", "6C2F", 87.5, 32.5, 0.0),
        Published("GloRo", "6C2F", 77.0, 69.2, 58.4),
        Published("Local-Lip-G", "6C2F", 76.4, 69.2, 51.3),
        Published("Local-Lip-B", "6C2F", 70.7, 64.8, 54.3),
        Published("Local-Lip-B + MaxMin", "6C2F", 77.4, 70.4, 60.7),
        Published("LipConvnet", "5-CR", 75.31, None, 60.37),
        Published("LipConvnet", "10-CR", 76.23, None, 62.57),
        Published("LipConvnet", "15-CR", 76.39, None, 62.96),
        Published("SLL", "Small", 71.2, None, 62.6),
        Published("AOL", "Small", 69.8, None, 62.0),
        Published("AOL", "Medium", 71.1, None, 63.8),
        Published("CRM", "6C2F", 74.82, 72.31, 64.16),
    ),
    "tiny-imagenet": (
        Published("Standard", "8C2F", 35.9, 19.4, 0.0),
        Published("Local-Lip-G", "8C2F", 37.4, 34.2, 13.2),
        Published("Local-Lip-B", "8C2F", 30.8, 28.4, 20.7),
        Published("GloRo", "8C2F", 35.5, 32.3, 22.4),
        Published("Local-Lip-B + MaxMin", "8C2F", 36.9, 33.3, 23.4),
        Published("SLL", "Small", 26.6, None, 19.5),
        Published("CRM", "8C2F (other paddings)", 23.97, 23.04, 17.98),
    ),
}

#: Table 2: constants averaged over pairs of classes, of networks trained with CRM. (L_ij, L_i + L_j, sqrt(2) L)
CONSTANTS: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "mnist": {"naive": (266.08, 1285.18, 2759.63), "liplt": (64.10, 212.68, 419.83)},
    "cifar10": {"naive": (93.52, 131.98, 139.75), "liplt": (11.26, 18.30, 23.43)},
    "tiny-imagenet": {"naive": (313.62, 485.62, 2057.00), "liplt": (9.46, 14.77, 60.37)},
}

# Settings in which a method differs from certified radius maximisation of the same network, which the preset is. The
# baselines keep its schedule, augmentation and initial weights; they are not the settings of their own papers.
_NAIVE = {"constants": "naive"}
_METHODS: Mapping[str, tuple[str, Mapping[str, Any], str | None]] = {
    # name -> (as the table calls it, settings, the method's name in PUBLISHED)
    "standard": ("Standard", {"loss": "cross-entropy", "stop_if_uncertified": 0}, "Standard"),
    "gloro": ("GloRo (naive)", {"loss": "gloro-trades", **_NAIVE}, "GloRo"),
    "lmt": ("Lipschitz-margin training", {"loss": "lipschitz-margin", **_NAIVE, "pairs": "whole"}, None),
    "local-lip": (
        "Local-Lip (GloRo loss)",
        {"loss": "gloro", "constants": "local", "pairs": "whole", "activation": "clipped-relu"},
        "Local-Lip",
    ),
    "crm": ("CRM (LipLT)", {}, "CRM"),
    "crm-naive": ("CRM, naive constants", _NAIVE, None),
    "crm-recursion": ("ours: CRM, LipSDP of the dense layers", {"constants": "recursion"}, None),
}
_LIRESNET = {
    "loss": "emma",
    "constants": "naive",
    "arch": "liresnet-L6W64",
    "initialisation": "lecun",
    "optimiser": "nadam",
    "lookahead": 6,
    "schedule": "cosine",
    "decay_from": 0,
    "degrees": 0.0,
    "translate": 0.0,
    "crop": 4,
    "warmup": 0,
    "ramp": 0,
    "average": "ema",
}
_MLP = "mnist-784-512-512-10"


def _published(group: str, method: str | None, model: str | None = None) -> Published | None:
    # of the two Local-Lip baselines the one with the loss of GloRo ("-G")
    names = (method, f"{method}-G")
    found = [p for p in PUBLISHED[group] if p.method in names and model in (None, p.model)]
    return found[0] if found else None


def _rows() -> dict[str, Row]:
    rows = [
        Row(f"{group}/{name}", method, settings, _published(group, paper))
        for group in BASES
        for name, (method, settings, paper) in _METHODS.items()
    ]
    # A LipConvnet has constant 1: its loss is cross-entropy with certificate regularisation ("CR").
    one = {
        "loss": "gloro-trades",
        "trades": 0.0,
        "constants": "naive",
        "certificate": 0.5,
        "initialisation": "lecun",
    }
    rows += [
        Row(
            f"cifar10/lipconvnet-{depth}",
            f"LipConvnet-{depth}, CR",
            {**one, "arch": f"lipconvnet-{depth}"},
            _published("cifar10", "LipConvnet", f"{depth}-CR"),
        )
        for depth in (5, 10, 15)
    ]
    rows.append(Row("mnist/crm-mlp", "ours: CRM, LipSDP", {"arch": "784-512-512-10"}, None, _MLP))
    rows += [
        Row(f"{group}/liresnet", "ours: LiResNet, EMMA", _LIRESNET) for group in ("cifar10", "tiny-imagenet")
    ]
    return {row.name: row for group in BASES for row in rows if row.group == group}


ROWS: Mapping[str, Row] = _rows()


def chosen(names: list[str] | None, rows: Mapping[str, Any] | None = None) -> list[Any]:
    """Those of the rows, by default `ROWS`, that have these names; of a data set all its rows; all rows for None.

    ValueError for an unknown name.
    """
    rows = ROWS if rows is None else rows
    groups = list(dict.fromkeys(row.group for row in rows.values()))
    found: dict[str, Any] = {}
    for name in names or groups:
        some = {key: row for key, row in rows.items() if name in (key, row.group)}
        if not some:
            raise ValueError(
                f"unknown row {name!r}{near(name, (*groups, *rows))}; known: {', '.join((*groups, *rows))}"
            )
        found |= some
    return list(found.values())


def others(group: str, rows: list[Row]) -> list[Published]:
    """The paper's rows of a data set that none of these rows stands beside."""
    beside = [row.published for row in rows]
    return [published for published in PUBLISHED[group] if published not in beside]


def model_of(row: Row) -> str:
    """The network of a row."""
    return str(row.settings.get("arch", _MODELS[row.group]))
