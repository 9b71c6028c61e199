"""Certificates of the zoo proved a second time, in rational and ball arithmetic (`exact_certificate`)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from exact_certificate import Unproved, exact_gain, recheck
from zoo import NETS

import lipbounds as lb
from lipbounds._form.elementwise import elementwise_view
from lipbounds._lipsdp.certificate import read_certificate
from lipbounds._lipsdp.dense_form import dense_gain

#: gather_scatter and custom_vjp have classes whose constant is LipLT's.
QUICK = ("linear", "two_branches", "custom_vjp")
EVERY = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in sorted(NETS)]


def _form(name: str) -> Any:
    net = NETS[name]
    fn, x = net.make(0)
    return lb.trace(fn, x, batched=net.batched)


def _stored(bound: lb.UpperBound, folder: Any) -> Any:
    """The certificate as its file holds it."""
    lb.save_certificate(bound, folder / "certificate")
    return read_certificate(folder / "certificate")


@pytest.mark.parametrize("name", EVERY)
def test_certificates_of_the_zoo_hold_in_exact_arithmetic(name: str, tmp_path: Any) -> None:
    form = _form(name)
    certificate = _stored(lb.lipsdp(form, pairwise=True), tmp_path)
    slack = recheck(certificate, form)
    assert max(slack.values()) < 1e-4, "a claim is far above what is proved"
    with pytest.raises(Unproved):
        recheck(certificate, form, lower=1 - (1e-6 if name in QUICK else 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [2, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_layer_after_layer(norm: float, tmp_path: Any) -> None:
    """Proofs by the state sequence, with multipliers relative to variances; and l-inf inputs with weights."""
    form = _form("relu")
    bound = lb.lipsdp(form, solver=lb.Recursion(iterations=20), norm=norm, pairwise=True)
    certificate = _stored(bound, tmp_path)
    assert {p.kind for p in certificate.proofs} == {"sequence"}
    recheck(certificate, form)
    with pytest.raises(Unproved):
        recheck(certificate, form, lower=1 - 1e-6)


def test_other_multipliers_or_weights_are_rejected(tmp_path: Any) -> None:
    form = _form("two_branches")
    certificate = _stored(lb.lipsdp(form, pairwise=True), tmp_path)

    def changed(factor: float) -> Any:
        proofs = []
        for proof in certificate.proofs:
            d = [np.array(v) for v in proof.D]
            d[0][0] *= factor
            proofs.append(replace(proof, D=tuple(d)))
        return replace(certificate, proofs=tuple(proofs))

    recheck(certificate, form)
    for factor in (0.5, 0.9, 1.1, 3.0):
        with pytest.raises(Unproved):
            recheck(changed(factor), form)
    heavier = replace(form, consts=tuple(np.asarray(c) * np.float32(1.001) for c in form.consts))
    with pytest.raises(Unproved):
        recheck(certificate, heavier)


@pytest.mark.parametrize("name", ["two_branches", "max_pool_overlapping"])
def test_exact_gain_agrees_with_that_of_the_library(name: str) -> None:
    form = _form(name)
    gain, dense = exact_gain(elementwise_view(form)), dense_gain(form)
    table = np.array([[float(e) for e in row] for row in gain.z.tolist()])
    columns = [*range(gain.n)]
    for start, mine, active in zip(gain.starts, gain.neurons, dense.active, strict=True):
        columns += [start + int(np.flatnonzero(mine == i)[0]) for i in active]
    assert np.allclose(table[:, columns], dense.Gz.with_error()[0], rtol=1e-9, atol=1e-12)
