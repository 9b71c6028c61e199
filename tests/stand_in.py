"""The CPU in the place of an accelerator, for tests of proofs there."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from lipbounds._norms import device as proofs
from lipbounds._text import device as places


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU is the accelerator unless device="cpu"; every size counts as large; small tiles."""
    monkeypatch.setattr(
        places, "accelerator", lambda choice: jax.devices("cpu")[0] if choice != "cpu" else None
    )
    monkeypatch.setattr(proofs, "TILE", 8)
    monkeypatch.setattr(proofs, "SMALLEST", 1)
    monkeypatch.setattr(proofs, "_FASTER", np.inf)
    monkeypatch.setattr(proofs, "_passed", {})
    yield
