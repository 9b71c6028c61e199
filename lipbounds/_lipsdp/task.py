"""What an engine of LipSDP is asked, and the proofs found so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lipbounds._form.lure import LureForm
from lipbounds._lipsdp.certificate import Constants, Proof, proved_constants

Progress = Callable[[str, float], None]


_ONE_THREAD = 500


_AS_GOOD = 1e-8  # relative excess of a proof over L^2 in float arithmetic that is not worth another try


_SHARES = (0.0, *np.logspace(-10, 0, 31).tolist())


@dataclass(eq=False)
class Search:
    """One call of the verb: what it asks, the proofs found so far and their constants, and what there is to say."""

    form: LureForm
    norm: float
    guarantee: str
    seed: int
    proofs: list[Proof] = field(default_factory=list)
    constants: list[Constants] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, proof: Proof) -> Constants:
        """Prove, and keep."""
        found = proved_constants(self.form, proof, norm=self.norm, guarantee=self.guarantee, seed=self.seed)
        self.proofs.append(proof)
        self.constants.append(found)
        return found

    @property
    def pairwise(self) -> np.ndarray:
        return np.min([c.pairwise for c in self.constants], axis=0)
