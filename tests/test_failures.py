"""A proof or a factorisation that fails: other methods bound the network, and the words say what happened."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lipbounds as lb
from lipbounds._comparison import compare
from lipbounds._empirical import empirical
from lipbounds._gain import memory_budget
from lipbounds._lipsdp import certificate, dense_search, ellipsoid, search, task
from lipbounds._lipsdp.proof import Infeasible
from lipbounds._local import engines
from lipbounds._triangle import recursion
from lipbounds.errors import GuaranteeError

FAILURES = (
    Infeasible(0, "they are too near the edge"),
    np.linalg.LinAlgError("Singular matrix"),
    ZeroDivisionError("division by zero"),
    MemoryError(),
)


def network() -> Any:
    rng = np.random.default_rng(0)
    return lb.from_weights([rng.standard_normal(shape) for shape in ((4, 3), (2, 4))])


def fail(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str, error: BaseException) -> None:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise error

    for name in names:
        monkeypatch.setattr(module, name, raises)


def fail_proofs(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """No engine of LipSDP can prove anything."""
    fail(monkeypatch, search, "repair", error=error)
    fail(monkeypatch, dense_search, "repair_dense", error=error)
    fail(monkeypatch, task, "proved_constants", error=error)


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_lipsdp_without_a_proof_is_liplt_with_a_note(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(ellipsoid, "optimize", lambda problem, starts, *rest: (starts[0], 1.0, 0))  # quick
    form = network()
    reference = lb.liplt(form, pairwise=True)
    fail_proofs(monkeypatch, error)
    bound = lb.lipsdp(form, pairwise=True)
    assert bound.value == reference.value and (bound.pairwise == reference.pairwise).all()
    assert (bound.per_class == reference.per_class).all()
    assert bound.method == "liplt" and bound.guarantee == "verified" and bound.certificate is None
    assert any("this is LipLT's bound" in note for note in bound.notes)
    assert any(" failed: " in note and str(error) in note for note in bound.notes)
    row = lb.compare(form, methods=["lipsdp"])["lipsdp"]
    assert row.kind == "upper" and row.value == reference.value


def test_lipsdp_without_a_proof_in_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    form = network()
    monkeypatch.setattr(ellipsoid, "optimize", lambda problem, starts, *rest: (starts[0], 1.0, 0))  # quick
    fail_proofs(monkeypatch, FAILURES[0])
    for norm in (2, math.inf):
        reference = lb.liplt(form, norm=norm, pairwise=True)
        for options in ({"solver": lb.Recursion(iterations=3)}, {"multipliers": "layer"}):
            bound = lb.lipsdp(form, norm=norm, pairwise=True, **options)
            assert bound.value == reference.value and (bound.pairwise == reference.pairwise).all()
            assert any("this is LipLT's bound" in note for note in bound.notes)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("solver", ["clarabel", "scs"])
def test_multipliers_of_a_solver_that_cannot_be_proved(monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    pytest.importorskip("cvxpy")
    form = network()
    fail(monkeypatch, dense_search.Dense, "prove", error=FAILURES[1])
    bound = lb.lipsdp(form, solver=solver)
    assert bound.value == lb.liplt(form).value and bound.certificate is None
    assert any("multipliers failed: Singular matrix" in note for note in bound.notes)


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_method_that_fails_is_a_row_that_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    form = network()
    X = np.ones((2, 3), np.float32)
    y = np.zeros(2, int)
    naive = lb.naive(form)
    usual = lb.liplt(form)
    fail_centred(monkeypatch, error)
    rows = lb.compare(form, X, y, methods=["empirical", "naive", "liplt", "lipsdp", "liplt-estimate"])
    assert rows["naive"].value == naive.value and rows["naive"].radii is not None
    assert rows["lipsdp"].value is not None and rows["lipsdp"].value < usual.value
    assert any(note.startswith("LipLT: LipLT failed") for note in rows["lipsdp"].result.notes)
    assert (
        rows["liplt"].kind == "none" and (str(error) or "out of memory: MemoryError") in rows["liplt"].reason
    )
    assert "liplt" in repr(rows) and "liplt" in rows.to_markdown()
    made = lb.bracket(form, X)
    assert made.upper.value == naive.value and "LipLT failed" in made.upper.notes[0]


def fail_centred(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """LipLT fails, the product of norms does not."""
    whole = recursion.triangle

    def some(*args: Any, centred: bool, **kwargs: Any) -> Any:
        if centred:
            raise error
        return whole(*args, centred=centred, **kwargs)

    monkeypatch.setattr(recursion, "triangle", some)


def test_radii_that_fail_leave_the_bound_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, compare, "certified_radius", error=np.linalg.LinAlgError("Singular matrix"))
    row = lb.compare(network(), np.ones((2, 3)), np.zeros(2, int), methods=["naive"])["naive"]
    assert row.value is not None and row.radii is None and row.reason == "no radii: Singular matrix"


def test_a_contradiction_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    form = network()
    false = replace(lb.naive(form), value=1e-3)
    with pytest.raises(GuaranteeError):
        lb.bracket(form, upper=false)
    with pytest.raises(GuaranteeError):
        lb.compare(form, methods=["empirical", false])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "error", FAILURES[:3] + (memory_budget.TooLarge("too large"),), ids=lambda e: type(e).__name__
)
def test_no_internal_error_leaves_a_public_verb(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    form = network()
    X, y = np.ones((2, 3), np.float32), np.zeros(2, int)
    words = re.escape(str(error))
    known = lb.naive(form)
    lb.save_certificate(lb.lipsdp(form), tmp_path / "bound.cert")
    with monkeypatch.context() as patch:
        fail(patch, certificate, "proved_constants", error=error)
        caught = isinstance(error, (ValueError, ArithmeticError))
        with pytest.raises(lb.CertificateError if caught else ValueError, match=words):
            lb.verify_certificate(tmp_path / "bound.cert", form)
    fail(monkeypatch, recursion, "triangle", error=error)
    fail(monkeypatch, empirical, "survey", error=error)
    fail(monkeypatch, engines, "Around", error=error)
    verbs: list[Any] = [lambda: lb.naive(form), lambda: lb.liplt(form), lambda: lb.lipsdp(form)]
    verbs += [lambda: lb.empirical(form, X), lambda: lb.local(form, X, 0.1, bound=known)]
    if error is FAILURES[1]:  # each starts a process
        verbs += [lambda: lb.lipsdp(form, solver="clarabel"), lambda: lb.lipsdp(form, solver="scs")]
    verbs += [lambda: lb.bracket(form), lambda: lb.certified_radius(form, X, y)]
    for verb in verbs:
        with pytest.raises(ValueError, match=words) as found:
            verb()
        assert type(found.value) is ValueError


def test_without_a_cpu_device_the_words_say_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX_PLATFORMS=cuda alone leaves none."""
    form = lb.trace(lambda x: jnp.pad(jnp.asarray([[1.0, 2.0], [3.0, 4.0]], x.dtype) @ x, 1), jnp.ones(2))

    def devices(backend: str | None = None) -> Any:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", devices)
    with pytest.raises(ValueError, match="JAX_PLATFORMS=cuda,cpu"):
        lb.liplt(form)
