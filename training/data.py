"""Data sets as arrays in raw pixel units, with a fixed split."""

from __future__ import annotations

import dataclasses

import numpy as np

FloatArray = np.ndarray
IntArray = np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images `(n, height, width, channels)` float32 in [0, 1], labels `(n,)` int32; two disjoint parts."""

    name: str
    train_x: FloatArray
    train_y: IntArray
    test_x: FloatArray
    test_y: IntArray

    @property
    def input_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.train_x.shape[1:]
        return int(height), int(width), int(channels)

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


def digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8x8 grey pixels divided by 16.

    One fifth, stratified, is the test set. The split does not depend on any seed of an experiment, so that no
    model is tested on what another one saw.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[..., None]
    y = bunch.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    return Dataset("digits", train_x, train_y, test_x, test_y)
