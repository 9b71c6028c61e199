"""What training holds out, validates and computes in double precision; its multipliers, proved; its learning rate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_fit import CRM, HUGE, config, few

import lipbounds as lb
from lipbounds.training import parallel
from lipbounds.training.data import digits
from lipbounds.training.loop import fit, split
from lipbounds.training.optimisers import schedule


# ----------------------------------------------------------------------------------------------- validation
def test_held_out_rows_are_fixed_and_disjoint() -> None:
    rows, held = split(1437, 0.2)
    assert len(held) == 287 and np.array_equal(np.sort(np.concatenate([rows, held])), np.arange(1437))
    again = split(1437, 0.2)
    assert np.array_equal(rows, again[0]) and np.array_equal(held, again[1])
    assert len(split(10, 0.0)[1]) == 0 and np.abs(np.diff(held)).max() > 1  # not one block of the file
    with pytest.raises(ValueError, match="leaves none of 1 images"):
        split(1, 0.9)


def test_held_out_rows_are_never_trained_on() -> None:
    x, y = few(512)
    _, held = split(512, 0.25)
    x[held] = HUGE
    for seed in (0, 1):
        found = fit(config(epochs=2, holdout=0.25, seed=seed), (x, y))
        assert [record["skipped"] for record in found.log] == [0, 0]


@pytest.fixture(scope="module")
def recursion() -> Any:
    return fit(
        config(**{**CRM, "arch": "64-16-10"}, constants="recursion", epochs=25, validate_every=25, eps=0.3)
    )


@pytest.mark.slow
def test_the_trained_multipliers_are_proved_as_they_are(recursion: Any) -> None:
    last = recursion.log[-1]
    assert (last["part"], last["guarantee"], last["images"]) == ("training", "verified", 1000)
    assert last["method"] == "lipsdp" and 0.1 < last["certified"] <= last["clean"]
    assert "clean" not in recursion.log[0]
    form = lb.trace(recursion.model, jnp.zeros((8, 8, 1)))
    state = recursion.state.bound._replace(multipliers=recursion.state.multipliers)
    quick = lb.lipsdp(form, solver=lb.Recursion(initial=state, iterations=0), pairwise=True)
    best = lb.lipsdp(form, pairwise=True)
    assert quick.guarantee == best.guarantee == "verified"
    off = ~np.eye(10, dtype=bool)
    ratios = quick.pairwise[off] / best.pairwise[off]  # type: ignore[index]
    assert ratios.min() >= 1 - 1e-9 and ratios.mean() < 1.1
    assert best.value * (1 - 1e-9) <= quick.value <= 1.1 * lb.liplt(form).value
    data = digits()
    rows = split(1437, 0.0)[0][:1000]
    radii = lb.certified_radius(form, data.train_x[rows], data.train_y[rows], bound=quick)
    assert last["certified"] == pytest.approx(float(radii.accuracy(0.3)))
    more = lb.lipsdp(form, solver=lb.Recursion(initial=state, iterations=40), pairwise=True)
    assert (more.pairwise <= quick.pairwise * (1 + 1e-12)).all() and more.value < quick.value  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"initial is a state of lb.lipsdp.core, got tuple"):
        lb.Recursion(initial=())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="another network"):
        lb.lipsdp(form, solver=lb.Recursion(initial=state._replace(multipliers=()), iterations=0))
    with pytest.raises(ValueError, match="not finite"):
        spoilt = jax.tree.map(lambda a: a * np.nan, state.multipliers)
        lb.lipsdp(form, solver=lb.Recursion(initial=state._replace(multipliers=spoilt), iterations=0))
    for options in ({"multipliers": "layer"}, {"norm": np.inf}, {"guarantee": "estimate"}):
        with pytest.raises(ValueError, match="initial is for multipliers='neuron'"):
            lb.lipsdp(form, solver=lb.Recursion(initial=state, iterations=0), **options)


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        pytest.param({"loss": "cross-entropy"}, "liplt", marks=pytest.mark.slow),
        pytest.param({"loss": "crm", "constants": "naive"}, "naive", marks=pytest.mark.slow),
        pytest.param({"loss": "gloro", "constants": "liplt"}, "liplt", marks=pytest.mark.slow),
    ],
)
def test_the_bound_of_a_validation_is_that_of_the_loss(fields: dict[str, Any], method: str) -> None:
    found = fit(config(arch="64-8-10", epochs=2, validate_every=1, eps=0.1, **fields), few(256))
    for record in found.log:
        assert (record["method"], record["guarantee"]) == (method, "verified")
        assert record["part"] == "training" and record["images"] == 256
        assert 0 <= record["certified"] <= record["clean"] <= 1


# ------------------------------------------------------------------------------------------------- precision
@pytest.mark.slow
@pytest.mark.parametrize("constants", ["naive", pytest.param("recursion", marks=pytest.mark.slow)])
def test_double_precision_is_for_the_constants_only(constants: str) -> None:
    slow: dict[str, Any] = {"arch": "64-8-10", "validate_every": 2} if constants == "recursion" else {}
    found = fit(config(loss="crm", precision="float64", constants=constants, epochs=2, **slow), few(256))
    assert not jax.config.jax_enable_x64
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(found.state.bound)}
    assert kinds - {"bool"} == {"float64"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found.state.multipliers)} <= {"float64"}
    for part in (found.state.weights, nnx.state(found.model)):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(part)} == {"float32"}
    last = parallel.host(getattr(found.state.bound, "last", found.state.bound))
    assert any(leaf.size and (leaf != leaf.astype(np.float32)).any() for leaf in jax.tree.leaves(last))


# ------------------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("kind", ["exponential", "cosine", "constant"])
def test_the_learning_rate_falls_from_the_epoch_named(kind: str) -> None:
    one = config(schedule=kind, decay_from=4, epochs=10, final_learning_rate=5e-5)
    rate = [float(schedule(one, 7, 5e-3, 5e-5)(step)) for step in range(71)]
    np.testing.assert_allclose(rate[:29], 5e-3, rtol=1e-5)
    np.testing.assert_allclose(rate[70], {"constant": 5e-3}.get(kind, 5e-5), rtol=1e-3)
    middle = {"exponential": 5e-4, "cosine": (5e-3 + 5e-5) / 2, "constant": 5e-3}[kind]
    np.testing.assert_allclose(rate[49], middle, rtol=1e-3)
