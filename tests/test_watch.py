"""What a run tells: figures of every epoch, warning, early stopping, best checkpoint; initial weights and ramp."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_fit import CRM, config, few, same, steps, trainer_of

import lipbounds as lb
from lipbounds.training import losses, watch
from lipbounds.training.config import Config
from lipbounds.training.initial import INITIALISATIONS, fresh
from lipbounds.training.loop import fit, resume
from lipbounds.training.models import ModelSpec, build
from lipbounds.training.runs import open_run
from lipbounds.training.store import load_model
from lipbounds.training.watch import FIGURES, Watch

pytestmark = pytest.mark.xdist_group("fit")
SMALL = {**CRM, "arch": "64-10"}


def record(**fields: Any) -> dict[str, Any]:
    good = dict(zip(FIGURES, (0.8, 0.5, 0.4, 3.0, 0.7, 1.0, 2.0), strict=True))
    return {"epoch": 9, **good, **fields}


# ------------------------------------------------------------------------------------------------ the figures
@pytest.mark.slow
def test_the_figures_are_what_they_are_called() -> None:
    """Against a direct computation of each; fewer images than a batch, so it is filled up."""
    one = config(**SMALL, eps=0.02)  # linear: L_ij is the norm of a difference of columns
    made = trainer_of(one)
    x, labels = few(100)
    state, found = Watch(made, x, labels)(steps(made)[0])

    def constants(weights: Any) -> jax.Array:
        kernel = weights["layers"][0]["kernel"][...]
        squares = jnp.sum((kernel[:, :, None] - kernel[:, None, :]) ** 2, axis=0)
        return jnp.sqrt(squares + jnp.eye(10)) * (1 - jnp.eye(10))

    pairs = constants(made.weights)
    radii = np.asarray(losses.radius(made.network(made.weights, x), labels, pairs))
    right = radii > 0
    wanted = (right.mean(), (radii > 0.02).mean(), radii[right].mean(), float(pairs.max()))
    for name, value in zip(FIGURES, (*wanted, (right & (radii < one.r0)).mean()), strict=False):
        assert found[name] == pytest.approx(value, rel=1e-4), name
    rows = np.resize(np.arange(100), one.batch_size)

    def size(term: Any) -> float:
        slopes = jax.tree.leaves(jax.grad(term)(made.weights))
        return float(np.sqrt(sum(float(jnp.sum(slope**2)) for slope in slopes)))

    def penalty(weights: Any) -> jax.Array:
        z = made.network(weights, x[rows])
        return one.lam * losses.crm_penalty(z, labels[rows], constants(weights), t=one.t, r0=one.r0, g=one.g)

    assert found["force_radius"] == pytest.approx(size(penalty), rel=1e-3)
    plain = size(lambda w: losses.cross_entropy(made.network(w, x[rows]), labels[rows]))
    assert found["force_data"] == pytest.approx(plain, rel=1e-3)
    assert same(state.weights, made.weights)


def test_the_warning_speaks_of_measured_quantities() -> None:
    one = Config(warmup=2, ramp=3, eps=0.1)
    assert watch.warning(record(), one) is None
    lost = record(force_radius=0.05, certified_estimate=0.3)
    text = watch.warning(lost, one)
    assert text is not None and text.startswith(
        "the radius term has lost its hold: its gradient has 0.05 of the norm"
    )
    assert watch.warning({**lost, "epoch": 5}, one) is None  # the ramp has not ended
    assert watch.warning({**lost, "epoch": 6}, one) == text
    # most radii are where they should be
    assert watch.warning({**lost, "below_r0_estimate": 0.1}, one) is None
    few_certified = watch.warning(record(certified_estimate=0.01), one)
    assert few_certified is not None and "at most 1 % of the images are certified at eps 0.1" in few_certified
    other = watch.warning(record(certified_estimate=0.01), dataclasses.replace(one, loss="gloro"))
    assert few_certified.endswith("a ramp, or raise lam") and other is not None and other.endswith("a ramp")
    assert watch.warning(record(certified_estimate=0.0), dataclasses.replace(one, eps=0.0)) is None
    none = dict.fromkeys(FIGURES) | {"epoch": 9, "sample_accuracy": 0.9}
    assert watch.warning(none, one) is None and watch.warning(lost, dataclasses.replace(one, lam=0.0)) is None


def test_when_a_run_stops_and_which_epoch_is_the_best() -> None:
    one = Config(warmup=1, ramp=1, stop_if_uncertified=2, checkpoint_every=2)
    shares = [0.0, 0.0, 0.0, 0.6, 0.0, 0.5]
    log = [record(epoch=e, certified_estimate=share) for e, share in enumerate(shares, 1)]
    assert [watch.stopped(log[:n], one) for n in range(7)] == [False] * 7
    assert watch.best(log, one) == 4 and watch.best([], one) is None
    log[4]["certified_estimate"] = 0.7  # of an epoch whose weights are kept only if it is the last one
    assert watch.best(log, one) == 4 and watch.best(log[:5], one) == 5
    assert watch.best(log[:5], one, ended=False) == 4 and watch.best(log[:3], one, ended=False) == 2
    log[4]["certified_estimate"] = 0.0
    log[5]["certified_estimate"] = 0.0
    assert watch.stopped(log, one) and not watch.stopped(log, dataclasses.replace(one, stop_if_uncertified=0))
    assert watch.best(log[:3] + [record(epoch=8, certified_estimate=0.0)], one) == 8  # the last of equals
    assert watch.troubled(log) is None
    log[2]["warning"] = log[4]["warning"] = "the term."
    assert watch.troubled(log) == "warning in 2 epochs, the first of them 3; in epoch 5: the term."


STOPS: dict[str, Any] = {
    **SMALL,
    "eps": 5.0,
    "lam": 1e-6,
    "epochs": 9,
    "warmup": 1,
    "ramp": 1,
    "validate_every": 50,
    "stop_if_uncertified": 2,
    "initialisation": "unit",
}


@pytest.mark.slow
def test_a_run_that_certifies_nothing_says_so_and_stops(tmp_path: pathlib.Path) -> None:
    """Also when it is interrupted just before; and a stopped run is not trained further."""
    one = config(**STOPS)
    seen: list[Any] = []

    class Stop(Exception):
        pass

    def interrupt(record: Any) -> None:
        seen.append(record)
        if record["epoch"] == 3:
            raise Stop

    with pytest.raises(Stop):
        fit(one, few(256), out=tmp_path / "run", progress=interrupt)
    assert ["warning" in record for record in seen] == [False, False, True]
    assert "lost its hold" in seen[-1]["warning"]
    found = resume(tmp_path / "run", data=few(256))
    assert [record["epoch"] for record in found.log] == [1, 2, 3, 4]  # epochs 3 and 4 count
    assert found.log[-1]["certified"] == 0 and "clean" not in found.log[-2]  # validated, as the last one
    again = resume(tmp_path / "run", data=few(256))
    assert same(again.state, found.state) and len(again.log) == 4
    whole = fit(one, few(256))
    assert same(whole.state, found.state)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_beside_the_last_two(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.1, 0.4, 0.2, 0.3, 0.1])
    plain = Watch.__call__
    seen = []

    def told(self: Watch, state: Any) -> Any:
        state, figures = plain(self, state)
        seen.append([np.array(leaf) for leaf in jax.tree.leaves(state.weights)])
        return state, {**figures, "certified_estimate": next(shares)}

    monkeypatch.setattr(Watch, "__call__", told)
    folder = tmp_path / "run"
    found = fit(config(epochs=5), few(), out=folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4", "5"]
    model, _ = load_model(folder / "best.safetensors")
    for a, b in zip(jax.tree.leaves(nnx.state(model)), seen[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert [r["certified_estimate"] for r in open_run(folder).log] == [0.1, 0.4, 0.2, 0.3, 0.1]
    assert found.log == tuple(json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())


# ------------------------------------------------------------------------------------------- initial weights, ramp
@pytest.mark.slow
@pytest.mark.parametrize("name", INITIALISATIONS)
def test_initial_weights_have_the_distribution_of_their_name(name: str) -> None:
    spec = ModelSpec("2C2F", (8, 8, 1), {"classes": 10})
    model, again = fresh(spec, name, 3), fresh(spec, name, 3)
    layers = [layer for _, layer in nnx.iter_modules(model) if isinstance(layer, (nnx.Linear, nnx.Conv))]
    assert len(layers) == 4
    for layer in layers:
        kernel = np.asarray(layer.kernel[...], np.float64)
        fan_in = kernel.size // kernel.shape[-1]
        bias = np.asarray(layer.bias[...])
        if name == "published":
            assert np.abs(kernel).max() <= fan_in**-0.5 and bias.any()
            assert kernel.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
        else:
            assert not bias.any()
        if name == "lecun":
            assert kernel.std() == pytest.approx(fan_in**-0.5, rel=0.15)
    x = jnp.asarray(np.random.default_rng(0).random((2, 8, 8, 1)), jnp.float32)
    np.testing.assert_array_equal(model(x), again(x))
    assert not np.allclose(model(x), fresh(spec, name, 4)(x))
    if name == "lecun":
        np.testing.assert_array_equal(model(x), build(spec, 3)(x))
    if name == "unit":
        form = lb.trace(model, jax.ShapeDtypeStruct((8, 8, 1), jnp.float32))
        assert 0.7 < lb.naive(form).value < 1.1  # four layers, each of norm 1


def test_unknown_initial_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match="initialisation must be one of lecun, published, unit, got 'xavier'"
    ):
        fresh(ModelSpec("2C2F", (8, 8, 1)), "xavier")


@pytest.mark.slow
def test_the_ramp_raises_lam_step_by_step() -> None:
    """With two steps of ramp the first one has half of lam: it is the step of a run with half of lam."""
    x, _ = few()
    ramped = steps(trainer_of(config(**SMALL, ramp=2)), x, x)
    half = steps(trainer_of(config(**{**SMALL, "lam": 2.5})), x)
    whole = steps(trainer_of(config(**SMALL)), x, start=ramped[1])
    assert same(ramped[1].weights, half[1].weights) and same(ramped[2].weights, whole[1].weights)
    with pytest.raises(
        ValueError, match=r"warmup \(3\) and ramp \(3\) together must be at most epochs \(5\)"
    ):
        Config(warmup=3, ramp=3, epochs=5)
