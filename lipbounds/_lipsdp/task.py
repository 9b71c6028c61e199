"""What an engine of LipSDP is asked, and what it returns: proofs with the constants that they prove."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lipbounds._form.lure import LureForm
from lipbounds._lipsdp.certificate import Constants, Proof, proved_constants
from lipbounds._lipsdp.dense_form import DenseGain, dense_gain


@dataclass(frozen=True, eq=False)
class Found:
    """A proof and what it proves."""

    proof: Proof
    constants: Constants


@dataclass(frozen=True, eq=False)
class Task:
    """One network, and how its constants are asked for; layers: one multiplier per layer."""

    form: LureForm
    norm: float
    guarantee: str
    seed: int
    layers: bool

    @cached_property
    def gain(self) -> DenseGain:
        """The dense form, for all proofs of one request."""
        return dense_gain(self.form)

    def prove(self, proof: Proof) -> Found:
        gain = self.gain if proof.kind == "dense" else None
        found = proved_constants(
            self.form, proof, norm=self.norm, guarantee=self.guarantee, seed=self.seed, gain=gain
        )
        return Found(proof, found)


@dataclass(frozen=True, eq=False)
class Answer:
    """What an engine found, and what there is to say."""

    found: tuple[Found, ...] = ()
    notes: tuple[str, ...] = ()
