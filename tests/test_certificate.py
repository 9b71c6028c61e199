"""Certificates: saved, read in another process, proved again, and refused wherever they claim what does not hold."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from certificates import bound_of, multipliers, network, weights
from safetensors.numpy import load, load_file, save, save_file

import lipbounds as lb
from lipbounds._lipsdp import certificate, certificate_file
from lipbounds._lipsdp.certificate import Certificate, Proof
from lipbounds.errors import CertificateError
from lipbounds.results import UpperBound

Fields, Tensors = dict[str, Any], dict[str, np.ndarray]


@pytest.fixture(scope="module")
def form() -> lb.LureForm:
    return network()


@pytest.fixture(scope="module")
def bound(form: lb.LureForm) -> UpperBound:
    return bound_of(form, multipliers(form))


@pytest.fixture
def saved(bound: UpperBound, tmp_path: Path) -> Path:
    path = tmp_path / "net.cert"
    certificate.save_certificate(bound, path)
    return path


# --- what is proved ------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "norm, start_at, kind",
    [(2, 0, "sequence"), (math.inf, 0, "sequence"), (2, 1, "sequence"), (2, 2, "sequence"), (2, 0, "dense")],
)
def test_every_kind_of_proof_is_saved_and_proved_again(
    form: lb.LureForm, tmp_path: Path, norm: float, start_at: int, kind: str
) -> None:
    made = bound_of(form, multipliers(form, norm, start_at, kind), norm)
    path = tmp_path / "c"
    certificate.save_certificate(made, path)
    read = certificate.read_certificate(path)
    mine = made.certificate
    assert (read.value, read.norm, read.guarantee, read.sizes) == (mine.value, norm, "verified", (8, 7))
    assert np.array_equal(read.pairwise, mine.pairwise) and np.array_equal(read.per_class, mine.per_class)
    assert [p.start_at for p in read.proofs] == [start_at] and read.proofs[0].kind == kind
    assert certificate.verify_certificate(path, form) is True
    assert certificate.verify_certificate(path, network()) is True
    assert made.value <= read.value <= made.value * (1 + 2 * certificate.RESERVE)
    x = np.random.default_rng(0).standard_normal((2, 50, 5)).astype(np.float32)
    moved = np.array([np.asarray(form(a)) - np.asarray(form(b)) for a, b in zip(*x, strict=True)])
    reach = np.linalg.norm(moved, norm, axis=1) / np.linalg.norm(x[0] - x[1], norm, axis=1)
    assert 0.05 * made.value < reach.max() <= made.value
    assert repr(read).startswith("Certificate(L <= ") and "1 proof" in repr(read)


def test_claims_may_come_from_liplt_and_from_several_proofs(form: lb.LureForm, bound: UpperBound) -> None:
    other = lb.liplt(form, pairwise=True)
    assert other.pairwise is not None and other.per_class is not None
    slack = replace(bound.certificate.proofs[0], D=tuple(3.0 * d for d in bound.certificate.proofs[0].D))
    both = certificate.make_certificate(
        form,
        (slack, bound.certificate.proofs[0]),
        value=bound.value,
        pairwise=np.minimum(other.pairwise, bound.pairwise),
        per_class=np.minimum(other.per_class, bound.per_class),
    )
    certificate.check(both, form)
    alone = replace(both, proofs=(slack,))
    with pytest.raises(CertificateError, match="is claimed"):
        certificate.check(alone, form)
    least = certificate.make_certificate(form, (slack,), value=other.value, pairwise=other.pairwise)
    proved = certificate.proved_constants(form, slack)
    assert proved.value > other.value, "this test needs multipliers that prove less than LipLT"
    certificate.check(least, form)


def test_a_verified_claim_is_proved_by_a_process_of_its_own(saved: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", *weights())
    program = (
        "import sys, numpy as np, lipbounds as lb\n"
        "verify_certificate = lb.verify_certificate\n"
        "w = np.load(sys.argv[2]); form = lb.from_weights([w[k] for k in w.files], activation='relu')\n"
        "assert verify_certificate(sys.argv[1], form) is True; print('proved')\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(saved), str(tmp_path / "w.npz")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
        timeout=120,
    )
    assert run.stdout.strip() == "proved", run.stderr


def test_slopes_that_a_user_declared_make_a_certificate_assumed() -> None:
    w = weights()

    def declared(h: Any) -> Any:
        return jax.lax.lgamma(jnp.abs(h) + 2.8125)  # constants of its own: the register is global

    lb.register_activation(declared, slopes=(-1.0, 2.0))
    form = lb.trace(lambda x: w[2] @ declared(w[1] @ jnp.tanh(w[0] @ x)), np.zeros(5, np.float32))
    made = bound_of(form, multipliers(form))
    assert made.guarantee == "assumed"
    certificate.check(made.certificate, form)
    with pytest.raises(CertificateError, match="claims to be 'verified', what can be shown is 'assumed'"):
        certificate.check(replace(made.certificate, guarantee="verified"), form)


# --- tampering -----------------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[Fields, Tensors], None]) -> None:
    """The file with another header or other tensors and a digest that fits them: only the proof can refuse it."""
    fields, tensors = certificate_file.unpack(path.read_bytes())
    tensors = {name: array.copy() for name, array in tensors.items()}
    change(fields, tensors)
    path.write_bytes(certificate_file.pack(fields, tensors))


def lower(name: str, factor: float) -> Callable[[Fields, Tensors], None]:
    def change(fields: Fields, tensors: Tensors) -> None:
        if name == "value":
            fields["value"] = (factor * float.fromhex(fields["value"])).hex()
        else:
            tensors[name] *= factor

    return change


def entry(name: str, place: Any, value: float) -> Callable[[Fields, Tensors], None]:
    def change(fields: Fields, tensors: Tensors) -> None:
        tensors[name][place] = value

    return change


def pair(i: int, j: int, factor: float) -> Callable[[Fields, Tensors], None]:
    def change(fields: Fields, tensors: Tensors) -> None:
        for place in ((i, j), (j, i)):
            tensors["pairwise"][place] *= factor

    return change


def put(**new: Any) -> Callable[[Fields, Tensors], None]:
    return lambda fields, tensors: fields.update(new)


def without(name: str) -> Callable[[Fields, Tensors], None]:
    return lambda fields, tensors: fields.pop(name)


def tensor(name: str, new: Callable[[np.ndarray], Any]) -> Callable[[Fields, Tensors], None]:
    return lambda fields, tensors: tensors.update({name: new(tensors.get(name, np.zeros(2)))})


def dropped_tap(fields: Fields, tensors: Tensors) -> None:
    fields["proofs"][0]["taps"] = 1
    del tensors["proof0.D1"]


def proof_field(**new: Any) -> Callable[[Fields, Tensors], None]:
    return lambda fields, tensors: fields["proofs"][0].update(new)


def with_weights(fields: Fields, tensors: Tensors) -> None:
    fields["proofs"][0]["weights"] = True
    tensors["proof0.weights"] = np.full(5, 1e-3)


TAMPERED: dict[str, tuple[Callable[[Fields, Tensors], None], str]] = {
    "value lowered": (
        lower("value", 0.999),
        r"value <= .* is claimed, but its multipliers prove only .* LipLT",
    ),
    "value slightly lowered": (lower("value", 1 - 1e-7), "value <= .* is claimed"),
    "value zero": (put(value=(0.0).hex()), "value <= 0.0 is claimed"),
    "value negative": (put(value=(-1.0).hex()), "negative or not finite"),
    "value nan": (put(value="nan"), "negative or not finite"),
    "value no number": (put(value="x"), "no hexadecimal float"),
    "value a float": (put(value=1.5), "not of type str"),
    "a pair lowered": (pair(1, 3, 0.99), r"pairwise\[1\]\[3\] <= .* is claimed"),
    "one side of a pair": (entry("pairwise", (1, 3), 0.0), "not symmetric"),
    "a class lowered": (lower("per_class", 0.99), r"per_class\[\d\] <= .* is claimed"),
    "pairs nan": (entry("pairwise", (0, 0), math.nan), "negative or not finite"),
    "multiplier infeasible": (
        tensor("proof0.D1", lambda d: 0.5 * d),
        "proof 0 fails: the multipliers of tap 1 prove nothing",
    ),
    "multipliers larger": (lower("proof0.D1", 5.0), "is claimed"),
    "one multiplier larger": (entry("proof0.D1", 3, 1e6), "is claimed"),
    "multiplier zero": (entry("proof0.D1", 3, 0.0), "multipliers of tap 1 are not all finite and positive"),
    "multiplier negative": (entry("proof0.D1", 3, -1.0), "not all finite and positive"),
    "multiplier nan": (entry("proof0.D0", 0, math.nan), "not all finite and positive"),
    "multiplier infinite": (entry("proof0.D0", 0, math.inf), "not all finite and positive"),
    "a tap missing": (dropped_tap, "multipliers of 1 taps, the network has 2"),
    "a neuron missing": (tensor("proof0.D1", lambda d: d[:-1]), "tap 1 has 7 active neurons"),
    "single precision": (tensor("proof0.D1", np.float32), "not float64"),
    "an unknown tensor": (tensor("more", np.sqrt), "a tensor 'more' that its header does not name"),
    "a tensor missing": (lambda fields, tensors: tensors.pop("pairwise"), "lacks the tensor 'pairwise'"),
    "norm inf": (put(norm="inf"), "its multipliers prove only"),
    "norm 1": (put(norm="1"), "LipSDP bounds are for norm 2 and inf"),
    "norm 3": (put(norm="3"), "norm must be 1, 2 or inf"),
    "weights for l2": (with_weights, "weights belong to norm inf"),
    "guarantee unknown": (put(guarantee="certain"), "its guarantee is 'certain'"),
    "guarantee estimate": (put(guarantee="estimate"), "its guarantee is 'estimate'"),
    "start later": (proof_field(start_at=1), "multipliers of 2 taps, the network has 1"),
    "start nowhere": (proof_field(start_at=9), "proof 0 fails"),
    "start before": (proof_field(start_at=-1), "proof 0 fails"),
    "other kind": (proof_field(kind="magic"), "proof 0 fails: kind must be"),
    "no proofs": (
        lambda f, t: (f.update(proofs=[]), t.pop("proof0.D0"), t.pop("proof0.D1")),
        "holds no multipliers",
    ),
    "other sizes": (put(sizes=[8, 8]), "another architecture"),
    "other input": (put(in_shape=[6]), "another architecture"),
    "other outputs": (put(num_outputs=3), "expected|another architecture"),
    "other network": (put(network="0" * 64), "other weights"),
    "header without value": (without("value"), "lacks 'value'"),
    "header without norm": (without("norm"), "lacks 'norm'"),
    "header without proofs": (without("proofs"), "lacks 'proofs'"),
    "header without network": (without("network"), "lacks 'network'"),
    "sizes that are none": (put(sizes=["a"]), "something else than sizes"),
    "a bool for a number": (put(num_outputs=True), "not of type int"),
    "seed": (put(seed=-1), "its seed is -1"),
    "failure": (put(failure_probability=(2.0).hex()), "probability of failure"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_with_a_fitting_digest_is_refused_with_its_reason(
    saved: Path, form: lb.LureForm, name: str
) -> None:
    change, reason = TAMPERED[name]
    assert certificate.verify_certificate(saved, form)
    rewritten(saved, lambda fields, tensors: None)
    assert certificate.verify_certificate(saved, form)  # rewriting alone changes nothing
    rewritten(saved, change)
    with pytest.raises(CertificateError, match=reason):
        certificate.verify_certificate(saved, form)


def test_a_looser_claim_is_still_a_certificate(saved: Path, form: lb.LureForm) -> None:
    rewritten(saved, lower("value", 2.0))
    rewritten(saved, put(method="by hand"))
    assert certificate.verify_certificate(saved, form)


def test_a_guarantee_cannot_be_raised(form: lb.LureForm, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bound_of(form, multipliers(form, start_at=1)).certificate
    real = certificate.hybrid_start

    def uncertain(*args: Any) -> Any:
        return (*real(*args)[:2], "probabilistic", 1e-9)

    monkeypatch.setattr(certificate, "hybrid_start", uncertain)
    with pytest.raises(
        CertificateError, match="claims to be 'verified', what can be shown is 'probabilistic'"
    ):
        certificate.check(made, form)
    with pytest.raises(CertificateError, match="fail with probability 1e-12"):
        certificate.check(replace(made, guarantee="probabilistic", failure_probability=1e-12), form)
    certificate.check(replace(made, guarantee="probabilistic", failure_probability=2e-9), form)


def test_other_weights_and_other_networks_are_refused(saved: Path, form: lb.LureForm) -> None:
    one = weights()
    one[1][2, 3] = np.nextafter(one[1][2, 3], np.float32(9))
    with pytest.raises(CertificateError, match="other weights"):
        certificate.verify_certificate(saved, lb.from_weights(one, activation="relu"))
    with pytest.raises(CertificateError, match="another architecture.*taps of size"):
        certificate.verify_certificate(saved, network(0, (5, 8, 8, 4)))
    with pytest.raises(CertificateError, match="another architecture"):
        certificate.verify_certificate(saved, network(0, (6, 8, 7, 4)))
    larger = lb.from_weights([2 * w for w in weights()], activation="relu")
    rewritten(saved, put(network=certificate.parameter_digest(larger)))
    with pytest.raises(CertificateError, match="prove nothing|is claimed"):  # the digest is not what protects
        certificate.verify_certificate(saved, larger)
    with pytest.raises(TypeError, match="LureForm"):
        certificate.verify_certificate(saved, np.zeros(3))  # type: ignore[arg-type]


def test_other_activations_with_the_same_weights_are_refused(saved: Path, form: lb.LureForm) -> None:
    steep = lb.from_weights(weights(), slopes=[(-1.0, 1.0)] * 2)
    rewritten(saved, put(network=certificate.parameter_digest(steep)))
    with pytest.raises(CertificateError, match="prove nothing|is claimed"):
        certificate.verify_certificate(saved, steep)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"guarantee": "probabilistic"}, "a probabilistic bound states its failure_probability"),
        ({"failure_probability": (0.5).hex()}, "a verified bound has failure_probability 0"),
        ({"method": ""}, "method must name how the result was made"),
    ],
    ids=str,
)
def test_what_is_no_bound_is_refused_by_both(
    saved: Path, form: lb.LureForm, change: dict[str, Any], why: str
) -> None:
    rewritten(saved, put(**change))
    for read in (certificate.verify_certificate, lb.load_certificate):
        with pytest.raises(CertificateError, match=f"its claims are no bound: {why}"):
            read(saved, form)


def test_a_diagonal_of_pairs_is_refused_by_both(bound: UpperBound, saved: Path, form: lb.LureForm) -> None:
    pairs = np.array(bound.certificate.pairwise)
    np.fill_diagonal(pairs, 1.0)
    wrong = replace(bound, certificate=replace(bound.certificate, pairwise=pairs))
    certificate.save_certificate(wrong, saved)
    for read in (certificate.verify_certificate, lb.load_certificate):
        with pytest.raises(CertificateError, match="symmetric with a zero diagonal"):
            read(saved, form)


def test_files_that_are_none_of_ours(saved: Path, form: lb.LureForm, tmp_path: Path) -> None:
    raw = saved.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    flipped = bytearray(raw)
    flipped[-3] ^= 1
    cases = {
        "empty": (b"", "not a safetensors file"),
        "text": (b"L <= 3, promised", "not a safetensors file"),
        "pickle": (b"\x80\x04\x95" + bytes(40), "not a safetensors file"),
        "huge index": ((2**60).to_bytes(8, "little") + raw[8:], "not a safetensors file"),
        "no json": (raw[:8] + b"{" * length + raw[8 + length :], "index is no JSON"),
        "cut in the index": (raw[: length // 2], "cut off"),
        "cut in the tensors": (raw[:-8], "cut off"),
        "one bit": (bytes(flipped), "digest does not fit"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name.replace(" ", "_")
        path.write_bytes(content)
        with pytest.raises(CertificateError, match=reason):
            certificate.verify_certificate(path, form)
    with pytest.raises(FileNotFoundError):
        certificate.verify_certificate(tmp_path / "nowhere", form)


def test_metadata_that_do_not_fit(saved: Path, form: lb.LureForm) -> None:
    tensors = load_file(saved)
    index, _ = certificate_file._metadata(saved.read_bytes())
    good = index["__metadata__"]
    cases: list[tuple[dict[str, str] | None, str]] = [
        (None, "no certificate of lipbounds"),
        (good | {"format": "pt"}, "no certificate of lipbounds"),
        (good | {"version": "2"}, "version '2'; this library reads version 1"),
        ({k: v for k, v in good.items() if k != "version"}, "version None"),
        ({k: v for k, v in good.items() if k != "header"}, "metadata lack header"),
        ({k: v for k, v in good.items() if k != "digest"}, "metadata lack digest"),
        (good | {"header": good["header"].replace("verified", "assumed")}, "digest does not fit"),
        (good | {"header": "{", "digest": certificate_file.digest("{", tensors)}, "header is no JSON"),
        (good | {"header": "[]", "digest": certificate_file.digest("[]", tensors)}, "no JSON object"),
    ]
    for metadata, reason in cases:
        save_file(tensors, saved, metadata)
        with pytest.raises(CertificateError, match=reason):
            certificate.verify_certificate(saved, form)


def test_random_damage_never_passes_and_never_crashes(saved: Path, form: lb.LureForm) -> None:
    raw = saved.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(raw)
        for place in rng.integers(0, len(raw), int(rng.integers(1, 4))):
            damaged[place] ^= int(rng.integers(1, 256))
        saved.write_bytes(bytes(damaged))
        with pytest.raises(CertificateError):
            certificate.verify_certificate(saved, form)


# --- files ---------------------------------------------------------------------------------------------------------


def test_one_bound_is_always_the_same_file(saved: Path, bound: UpperBound, tmp_path: Path) -> None:
    for number in range(8):  # safetensors alone would write the metadata in 24 orders
        lb.save_certificate(bound, tmp_path / f"again{number}")
        assert (tmp_path / f"again{number}").read_bytes() == saved.read_bytes()


def test_the_file_is_documented_safetensors(saved: Path, bound: UpperBound) -> None:
    tensors = load(saved.read_bytes())
    assert set(tensors) == {"proof0.D0", "proof0.D1", "pairwise", "per_class"}
    assert all(a.dtype == np.float64 for a in tensors.values())
    index, _ = certificate_file._metadata(saved.read_bytes())
    metadata = index["__metadata__"]
    header = json.loads(metadata["header"])
    assert metadata["format"] == "lipbounds-certificate" and metadata["version"] == "1"
    assert float.fromhex(header["value"]) == bound.certificate.value
    assert header["norm"] == "2" and header["guarantee"] == "verified" and header["sizes"] == [8, 7]


def test_only_certificates_are_overwritten(
    saved: Path, bound: UpperBound, form: lb.LureForm, tmp_path: Path
) -> None:
    certificate.save_certificate(bound, saved)
    other = tmp_path / "thesis.txt"
    other.write_text("years of work")
    with pytest.raises(ValueError, match="exists and is no certificate; overwrite=True"):
        certificate.save_certificate(bound, other)
    model = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(3)}, model)
    with pytest.raises(ValueError, match="is no certificate"):
        certificate.save_certificate(bound, model)
    assert other.read_text() == "years of work" and list(load_file(model)) == ["w"]
    certificate.save_certificate(bound, other, overwrite=True)
    assert certificate.verify_certificate(other, form)
    with pytest.raises(ValueError, match="is a folder"):
        certificate.save_certificate(bound, tmp_path)
    with pytest.raises(OSError):
        certificate.save_certificate(bound, tmp_path / "nowhere" / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "net.cert", "thesis.txt"]


def test_a_failed_write_leaves_the_old_file(
    saved: Path, bound: UpperBound, form: lb.LureForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        certificate.save_certificate(bound, saved)
    assert [p.name for p in saved.parent.iterdir()] == ["net.cert"]
    assert certificate.verify_certificate(saved, form)


def test_only_bounds_with_a_certificate_are_saved(
    form: lb.LureForm, bound: UpperBound, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="by 'liplt' carries no certificate: use one by lb.lipsdp"):
        certificate.save_certificate(lb.liplt(form), tmp_path / "c")
    with pytest.raises(TypeError, match="UpperBound"):
        certificate.save_certificate(bound.certificate, tmp_path / "c")
    with pytest.raises(ValueError, match="do not belong together"):
        certificate.save_certificate(replace(bound, value=0.5 * bound.value), tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_arrays_of_a_certificate_are_copies_and_cannot_be_written(form: lb.LureForm) -> None:
    proof = multipliers(form)
    with pytest.raises(ValueError, match="read-only"):
        proof.D[0][0] = 1.0
    mine = np.ones(3)
    made = Proof((mine,))
    mine[0] = 7.0
    assert made.D[0][0] == 1.0


def test_digests_do_not_depend_on_the_process_or_the_order(form: lb.LureForm) -> None:
    assert certificate.parameter_digest(form) == certificate.parameter_digest(network())
    shuffled = replace(form, consts=form.consts[::-1])
    assert certificate.parameter_digest(form) == certificate.parameter_digest(shuffled)
    assert certificate.parameter_digest(form) != certificate.parameter_digest(network(1))


def test_networks_without_taps_or_with_zero_constant(tmp_path: Path) -> None:
    w = weights()
    linear = lb.trace(lambda x: w[0] @ x, np.zeros(5, np.float32))
    zero = lb.from_weights([w[0], 0 * w[1], w[2]], activation="relu")
    for name, net in (("linear", linear), ("zero", zero)):
        made = bound_of(net, multipliers(net))
        certificate.save_certificate(made, tmp_path / name)
        assert certificate.verify_certificate(tmp_path / name, net)
    assert made.value == 0.0 and made.certificate.value == 0.0
    assert isinstance(made.certificate, Certificate) and len(save({"x": np.zeros(0)})) > 0
