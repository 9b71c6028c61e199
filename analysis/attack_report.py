"""The record, the table and the page of an attack."""

from __future__ import annotations

import csv
import io
import math
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from lipbounds._text import write_atomically
from lipbounds.analysis.attack_network import answers
from lipbounds.analysis.attack_search import Attack
from lipbounds.analysis.autoattack import AutoAttack
from lipbounds.analysis.experiment import Json, norm_key
from lipbounds.analysis.report import embedded, fill, write_page

SHOWN = 24  # images on a page
COLUMNS = (
    "image",
    "label",
    "target",
    "correct",
    "success",
    "class_found",
    "distance",
    "margin",
    "steps",
    "queries",
)
ATTAINED = (
    "Accuracy under attack is attained: the robust accuracy is at most this, and may be lower. It is no "
    "certificate."
)
ATTAINED_DISTANCE = (
    "Each distance is attained: the nearest misclassified point is at most this far, and may be nearer. It is no "
    "certificate."
)


def attack_record(attack: Attack, fn: Any, y: np.ndarray, batch_size: int = 256) -> Json:
    """The attack as plain data: accuracies, and one row of `COLUMNS` for each example; None where there is none."""
    labels = np.asarray(y)
    said = answers(fn, attack.adversarial, batch_size)
    rows: list[Json] = []
    for i in range(len(attack)):
        won = bool(attack.success[i])
        rows.append(
            {
                "image": i,
                "label": int(labels[i]),
                "target": None if attack.target is None else int(attack.target[i]),
                "correct": bool(attack.correct[i]),
                "success": won,
                "class_found": int(said[i]) if won else None,
                "distance": float(attack.distance[i]) if won else None,
                "margin": float(attack.margin[i]),
                "steps": None if attack.steps is None else int(attack.steps[i]),
                "queries": None if attack.queries is None else int(attack.queries[i]),
            }
        )
    broken = attack.success
    record: Json = {
        "attack": attack.name,
        "norm": norm_key(attack.norm),
        "eps": float(attack.eps[0]) if math.isfinite(attack.eps[0]) else None,
        "images": len(attack),
        "clean": float(attack.correct.mean()),
        "accuracy": attack.accuracy,
        "guarantee": "attained",
        "success_rate": attack.success_rate if attack.correct.any() else None,
        "adbd": float(np.where(attack.correct, attack.distance, 0.0).mean())
        if attack.name == "ADBD" and broken[attack.correct].all()
        else None,
        "mean_distance": float(attack.distance[broken].mean()) if broken.any() else None,
        "stages": [],
        "notes": [],
        "rows": rows,
    }
    if isinstance(attack, AutoAttack):
        record["stages"] = [
            {
                "name": s.name,
                "attacked": s.attacked,
                "broken": s.broken,
                "accuracy": s.accuracy,
                "seconds": s.seconds,
            }
            for s in attack.stages
        ]
        record["notes"] = list(attack.notes)
    return record


def write_attack_table(record: Json, file: pathlib.Path) -> pathlib.Path:
    """Write the rows of a record as CSV, with a header; empty where there is no value."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(record["rows"])
    write_atomically(file, text.getvalue().encode())
    return file


def write_attack_page(record: Json, x: np.ndarray, attack: Attack, file: pathlib.Path) -> pathlib.Path:
    """Write the page: accuracies, and the nearest examples that were found, where they are images."""
    order = np.argsort(attack.distance, kind="stable")[: min(SHOWN, int(attack.success.sum()))]
    shown = [
        {"row": record["rows"][i], **_pictures(np.asarray(x)[i], attack.adversarial[i])}
        for i in order
        if picture(np.asarray(x)[i]) is not None
    ]
    return write_page(file, fill("attack.html.j2", record=record, shown=shown, attained=ATTAINED))


def _pictures(clean: np.ndarray, found: np.ndarray) -> Json:
    """Both images, and their difference, grey where there is none, scaled so that the largest change is full."""
    shift = found.astype(np.float64) - clean
    largest = float(np.abs(shift).max())
    low, high = min(clean.min(), found.min(), 0.0), max(clean.max(), found.max(), 1.0)
    images = {"clean": (clean - low) / (high - low), "found": (found - low) / (high - low)}
    images["difference"] = 0.5 + shift / (2 * largest) if largest else np.full_like(shift, 0.5)
    return {name: picture(image) for name, image in images.items()}


def picture(image: np.ndarray) -> str | None:
    """An image with values in [0, 1] as PNG in base64; None for what is not (H, W), (H, W, C) or (C, H, W)."""
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim < 2 or (image.ndim == 3 and image.shape[2] != 3) or image.ndim > 3:
        return None
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return embedded(buffer.getvalue())
