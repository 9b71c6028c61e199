"""Rows of the tables of robust training as data: networks of one width trained by every loss, and what is printed.

The tables of Chen, Cheng, Gan, Gu and Liu, Efficient robust training via backward smoothing, AAAI 2022, with l-inf
0.031 (here 8/255): natural and robust accuracy in percent, minutes of training on a GPU. WRN-34-10 is in a table of
its own, under AutoAttack; the row with the adjusted weight is of Wu et al., NeurIPS 2021.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lipbounds.analysis.table1_rows import Row

PLAIN = "plain"  # the row whose training time the others are compared with


@dataclasses.dataclass(frozen=True)
class Printed:
    """Figures of a row as printed: accuracies in percent, minutes of training; None where there is none."""

    natural: float | None = None
    pgd: float | None = None
    autoattack: float | None = None
    minutes: float | None = None


#: By data set and loss, of ResNet-18 and, for Tiny-ImageNet, ResNet-50: natural, robust, minutes.
PRINTED: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "cifar10": {
        "at": (82.36, 51.14, 430),
        "fast-at": (84.79, 46.30, 82),
        "fast-at-2": (83.21, 49.91, 127),
        "gradalign": (84.37, 46.99, 402),
        "trades": (82.33, 52.74, 482),
        "fast-trades": (83.39, 46.98, 126),
        "fast-trades-2": (83.51, 48.78, 164),
        "backward-smoothing": (82.38, 52.50, 164),
    },
    "cifar100": {
        "at": (55.22, 28.53, 428),
        "fast-at": (60.35, 24.64, 83),
        "fast-at-2": (56.00, 27.84, 128),
        "gradalign": (58.38, 26.26, 402),
        "trades": (56.99, 29.41, 480),
        "fast-trades": (60.26, 21.33, 126),
        "fast-trades-2": (58.81, 25.47, 165),
        "backward-smoothing": (56.96, 30.50, 164),
    },
    "tiny-imagenet": {
        "at": (44.50, 21.34, 2666),
        "fast-at": (49.58, 18.56, 575),
        "fast-at-2": (45.74, 20.94, 817),
        "trades": (47.02, 21.04, 2928),
        "fast-trades": (50.36, 17.22, 805),
        "fast-trades-2": (46.92, 19.26, 1045),
        "backward-smoothing": (46.68, 22.32, 1035),
    },
}

#: WRN-34-10 on CIFAR-10 by loss, accuracy under AutoAttack.
WIDE: Mapping[str, float] = {
    "at": 49.10,
    "fast-at": 43.21,
    "trades": 53.08,
    "fast-trades": 43.84,
    "fast-trades-2": 48.20,
    "backward-smoothing": 51.13,
}

_BASES = {
    "cifar10": "cifar10-resnet18",
    "cifar100": "cifar100-resnet18",
    "tiny-imagenet": "tiny-imagenet-resnet50",
}
_SMALL = "resnet10-w0.0625"


def _rows() -> dict[str, Row]:
    rows = []
    for group, base in _BASES.items():
        rows.append(Row(f"{group}/{PLAIN}", "cross-entropy", {"loss": "cross-entropy"}, base=base))
        rows += [Row(f"{group}/{loss}", loss, {"loss": loss}, base=base) for loss in PRINTED[group]]
    base = "cifar10-wrn-34-10"
    rows.append(Row(f"cifar10/wrn-{PLAIN}", "cross-entropy", {"loss": "cross-entropy"}, base=base))
    rows += [Row(f"cifar10/wrn-{loss}", loss, {"loss": loss}, base=base) for loss in WIDE]
    rows.append(Row("cifar10/wrn-war", "trades, adjusted weight", {"loss": "trades", "war": 30.0}, base=base))
    rows = [dataclasses.replace(row, small=_SMALL) for row in rows]
    return {row.name: row for group in _BASES for row in rows if row.group == group}


ROBUST_ROWS: Mapping[str, Row] = _rows()


def plain_of(row: Row) -> str:
    """The name of the row of plain training with the same network."""
    wide = row.name.startswith(f"{row.group}/wrn-")
    return f"{row.group}/{'wrn-' if wide else ''}{PLAIN}"


def printed(row: Row) -> Printed:
    """What is printed for a row."""
    name = row.name.partition("/")[2]
    if name.startswith("wrn-"):
        found: Any = {**WIDE, "war": 54.73}.get(name.removeprefix("wrn-"))
        return Printed(autoattack=found)
    figures = PRINTED[row.group].get(name)
    return Printed() if figures is None else Printed(figures[0], figures[1], None, figures[2])
