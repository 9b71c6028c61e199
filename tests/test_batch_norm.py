"""BatchNorm in training: statistics are state, averaged weights get their own, bounds see an affine map."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_parallel import finish, start

import lipbounds as lb
from lipbounds.training import parallel
from lipbounds.training.checkpoints import Checkpoints
from lipbounds.training.config import Config
from lipbounds.training.data import digits
from lipbounds.training.loop import fit, resume
from lipbounds.training.models import build, spec_for
from lipbounds.training.optimisers import optimiser, schedule
from lipbounds.training.runs import open_run
from lipbounds.training.step import Trainer, TrainState, trainer

ONE = 96  # images; a batch of all of them makes every epoch one step
PLAIN: dict[str, Any] = {"loss": "cross-entropy", "validate_every": 0, "warmup": 0, "schedule": "constant"}
SGD: dict[str, Any] = {**PLAIN, "optimiser": "sgd", "learning_rate": 0.1, "batch_size": ONE}


class Normed(nnx.Module):
    """64-8-10 with BatchNorm, in training mode as flax makes it."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(64, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.75, rngs=rngs)
        self.last = nnx.Linear(8, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jax.nn.relu(self.norm(self.first(x.reshape(*x.shape[:-3], -1)))))


def few() -> tuple[np.ndarray, np.ndarray]:
    data = digits()
    return data.train_x[:ONE].copy(), data.train_y[:ONE]


def made(config: Config, model: nnx.Module | None = None) -> Trainer:
    return trainer(config, model or Normed(), (8, 8, 1), 1, ONE, parallel.devices(1))


def ahead(one: Trainer, state: TrainState, epochs: int) -> TrainState:
    x, y = (one.devices.put(a) for a in few())
    for _ in range(epochs):
        state, _ = one.epoch(state, x, y)
    return state


def features(weights: Any, x: np.ndarray) -> np.ndarray:
    """Outputs of the first layer in float64."""
    kernel, bias = (np.asarray(weights["first"][name].get_value(), np.float64) for name in ("kernel", "bias"))
    return x.reshape(len(x), -1).astype(np.float64) @ kernel + bias


def test_a_step_is_taken_in_training_mode_and_moves_the_statistics() -> None:
    """One step of SGD with Nesterov momentum and decay of the kernels, against flax and optax by hand."""
    one = made(Config(**SGD, momentum=0.9, weight_decay=0.01))
    state = ahead(one, one.init(), 1)
    x, y = few()
    model = Normed()
    found = features(nnx.state(model, nnx.Param), x)

    def loss(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(jnp.asarray(x)), jnp.asarray(y)).mean()

    gradient = nnx.grad(loss)(model)

    def after(weight: Any, slope: Any) -> Any:
        whole = slope + (0.01 * weight if weight.ndim > 1 else 0)
        return weight - 0.1 * 1.9 * whole  # Nesterov: gradient + 0.9 of the momentum, which is the gradient

    # one.weights are those before the step
    wanted = jax.tree.map(after, one.weights, gradient)
    for a, b in zip(jax.tree.leaves(state.weights), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)
    norm = state.kept["norm"]
    np.testing.assert_allclose(norm["mean"].get_value(), 0.25 * found.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm["var"].get_value(), 0.75 + 0.25 * found.var(axis=0), rtol=1e-4)


def test_a_state_with_statistics_is_restored_bit_for_bit(tmp_path: pathlib.Path) -> None:
    one = made(Config(**SGD, average="swa"))
    half = parallel.host(ahead(one, one.init(), 2))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, half)
        _, back = checkpoints.load(parallel.host(one.init()))
    whole, again = (ahead(one, one.devices.put(state), 2) for state in (half, back))
    assert jax.tree.structure(whole) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    still = jax.tree.leaves(half.kept)
    assert any(np.any(np.asarray(a) != b) for a, b in zip(jax.tree.leaves(whole.kept), still, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [ONE, ONE // 4])
def test_averaged_weights_get_statistics_of_their_own(batch: int) -> None:
    """Those of the training images, of one batch or of four; the bound is of the network with them."""
    x, y = few()
    settings = {
        **SGD,
        "batch_size": batch,
        "average": "swa",
        "epochs": 3,
        "average_from": 1,
        "validate_every": 3,
    }
    fitted = fit(Config(**settings), (x, y), model=Normed())
    weights = fitted.state.average
    found, model = features(weights, x), fitted.model
    assert isinstance(model, Normed) and model.norm.use_running_average
    np.testing.assert_allclose(model.norm.mean.get_value(), found.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.norm.var.get_value(), found.var(axis=0), rtol=1e-4, atol=1e-5)
    running = fitted.state.kept["norm"]["mean"].get_value()
    assert np.abs(running - found.mean(axis=0)).max() > 0.01
    form = lb.trace(model, x[0])
    logits = np.asarray(model(x[:4]))
    np.testing.assert_allclose(np.stack([form(row) for row in x[:4]]), logits, rtol=1e-3, atol=1e-4)
    assert fitted.log[-1]["guarantee"] == "verified" and 0 < fitted.log[-1]["clean"] <= 1


def test_networks_without_batch_norm_keep_nothing_more() -> None:
    """Their states have the leaves of earlier versions, whose checkpoints are read as before."""
    config = Config(**{**SGD, "optimiser": "adam", "learning_rate": 1e-3}, average="ema", arch="64-10")
    one = made(config, build(config.spec((8, 8, 1), 10)))
    state = jax.eval_shape(one._init, one.weights)
    assert not jax.tree.leaves((state.kept, state.settled))
    # weights, moments and counts, average, step
    assert len(jax.tree.leaves(state)) == 2 + (2 * 2 + 4) + 2 + 1


# ---------------------------------------------------------------------------------------------- networks by name
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_173_962),
        pytest.param("resnet50", 23_520_842, marks=pytest.mark.slow),
        pytest.param("wrn-28-10", 36_479_194, marks=pytest.mark.slow),
        pytest.param("densenet-bc-40-12", 176_122, marks=pytest.mark.slow),
    ],
)
def test_networks_have_the_published_number_of_weights(name: str, count: int) -> None:
    model = nnx.eval_shape(lambda: build(spec_for(name, (32, 32, 3), 10)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet10-w0.05", "resnet50-w0.03", "wrn-10-0.25", "densenet-bc-10-2"])
def test_networks_are_traced_and_bounded_as_they_are_built(name: str) -> None:
    model = build(spec_for(name, (8, 8, 2), 3))
    x = np.random.default_rng(0).random((3, 8, 8, 2), np.float32)
    logits = np.asarray(model(x))
    np.testing.assert_allclose(logits[0], model(x[0]), rtol=1e-4, atol=1e-5)
    assert model(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    form = lb.trace(model, x[0])
    np.testing.assert_allclose(form(x[0]), logits[0], rtol=1e-3, atol=1e-4)
    naive, liplt = lb.naive(form), lb.liplt(form)
    slope = np.linalg.norm(logits[0] - logits[1]) / np.linalg.norm((x[0] - x[1]).ravel())
    assert slope <= liplt.value <= naive.value * (1 + 1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18-0.25", "unknown architecture 'resnet18-0.25'.*resnet18-w0.25"),
        ("wrn-28", "unknown architecture 'wrn-28'.*wrn-28-4"),
        ("densenet-40-12", "unknown architecture.*densenet-bc-40-12"),
        ("wrn-28-0", "unknown architecture"),
        ("wrn-27-2", "the depth of a Wide ResNet is 6 n \\+ 4"),
        ("resnet19", "a ResNet has depth 10, 18, 34, 50, 101, got 19"),
        ("densenet-bc-40-1.5", "growth of a DenseNet is a whole number"),
    ],
)
def test_names_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec_for(name, (32, 32, 3), 10))
    with pytest.raises(ValueError, match="multiples of 8"):
        build(spec_for("resnet18", (28, 28, 1), 10))


# ------------------------------------------------------------------------------------------------------ optimiser
def test_the_rate_is_halved_after_every_epoch_from_a_given_one() -> None:
    config = Config(**{**SGD, "schedule": "halving", "epochs": 8, "decay_from": 5})
    rate = schedule(config, 10, 0.1, 0.0)
    found = [float(rate(step)) for step in (0, 49, 50, 59, 60, 79)]
    np.testing.assert_allclose(found, [0.1, 0.1, 0.05, 0.05, 0.025, 0.0125], rtol=1e-6)


@pytest.mark.parametrize("name", ["adam", "nadam", "sgd"])
def test_only_kernels_decay(name: str) -> None:
    config = Config(**{**SGD, "optimiser": name, "weight_decay": 0.5, "momentum": 0.0})
    rule = optimiser(config, 1)
    weights = ({"kernel": jnp.full((2, 2), 3.0), "scale": jnp.full(2, 3.0)}, ())
    nothing = jax.tree.map(jnp.zeros_like, weights)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = rule.update(nothing, rule.init(weights), weights)
    np.testing.assert_allclose(updates[0]["kernel"], -0.1 * 0.5 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates[0]["scale"], 0.0)


# ---------------------------------------------------------------------------------------------------------- slow
NETWORK: dict[str, Any] = {
    **PLAIN,
    "arch": "wrn-10-0.25",
    "batch_size": 128,
    "epochs": 2,
    "optimiser": "sgd",
    "learning_rate": 0.1,
    "flip": True,
    "average": "swa",
}

FOUR = """
    import json, sys
    from lipbounds.training import parallel
    from lipbounds.training.config import Config
    from lipbounds.training.loop import fit

    assert parallel.devices().count == 4
    fit(Config(**json.loads(sys.argv[2])), out=sys.argv[1])
"""


@pytest.mark.slow
def test_four_devices_take_the_moments_of_the_whole_batch(tmp_path: pathlib.Path) -> None:
    finish(start(FOUR, tmp_path / "run", json.dumps(NETWORK), devices=4))
    alone = fit(Config(**NETWORK), devices=parallel.devices(1))
    run = open_run(tmp_path / "run")
    found, wanted = (nnx.to_flat_state(nnx.state(m)) for m in (run.model, alone.model))
    for (place, a), (_, b) in zip(found, wanted, strict=True):
        one, other = np.asarray(a.get_value()), np.asarray(b.get_value())
        assert np.abs(one - other).max() <= 2e-4 * np.abs(other).max() + 1e-6, place
    for a, b in zip(run.log, alone.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_run_with_batch_norm_ends_as_an_uninterrupted_one(tmp_path: pathlib.Path) -> None:
    class Stop(Exception):
        pass

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 1:
            raise Stop

    whole = fit(Config(**NETWORK))
    with pytest.raises(Stop):
        fit(Config(**NETWORK), out=tmp_path / "run", progress=stop)
    again = resume(tmp_path / "run")
    for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    saved = jax.tree.leaves(nnx.state(open_run(tmp_path / "run").model))
    for a, b in zip(saved, jax.tree.leaves(nnx.state(whole.model)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
