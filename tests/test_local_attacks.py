"""Local radii and constants under attack, on trained networks: nothing inside, and an attack that would find it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds.analysis.attacks import pgd
from lipbounds.training import Config, fit
from lipbounds.training.data import digits
from lipbounds.training.models import maxmin

NORMS = [2, math.inf]
NEAR, SLACK = 0.999, 1e-8  # SLACK: rounding of float64 difference quotients


# ------------------------------------------------------------------------------------------------- networks
class Dense(nnx.Module):
    def __init__(self, activations: Any, widths: int | tuple[int, ...], rngs: nnx.Rngs) -> None:
        self.activations = activations
        sizes = [64, *([widths] * len(activations) if isinstance(widths, int) else widths)]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.head = nnx.Linear(sizes[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = (x.reshape(len(x), -1) - 0.3) / 0.4
        for layer, activation in zip(self.layers, self.activations, strict=True):
            h = activation(layer(h))
        return self.head(h)


class Pooled(nnx.Module):
    """Convolution, overlapping max pooling, strided convolution."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.second = nnx.Conv(width, 8, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(self.first((x - 0.3) / 0.4))
        h = nnx.max_pool(h, (3, 3), strides=(2, 2), padding="SAME")
        return self.head(jax.nn.relu(self.second(h)).reshape(len(x), -1))


class Residual(nnx.Module):
    """Strided convolution and a block with BatchNorm, average pooling; `hidden` neurons behind, if any."""

    def __init__(self, rngs: nnx.Rngs, hidden: int = 0) -> None:
        self.stem = nnx.Conv(1, 6, (3, 3), strides=2, rngs=rngs)
        # momentum 0: the statistics are those of the last batch seen in training mode
        self.norms = nnx.List([nnx.BatchNorm(6, momentum=0.0, rngs=rngs) for _ in range(3)])
        self.convs = nnx.List([nnx.Conv(6, 6, (3, 3), use_bias=False, rngs=rngs) for _ in range(2)])
        self.hidden = nnx.Linear(24, hidden, rngs=rngs) if hidden else None
        self.head = nnx.Linear(hidden or 24, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jax.nn.relu(self.norms[0](self.stem((x - 0.3) / 0.4)))
        branch = jax.nn.relu(self.norms[1](self.convs[0](h)))
        h = jax.nn.relu(h + self.norms[2](self.convs[1](branch)))
        h = h.reshape(-1, 2, 2, 2, 2, 6).mean(axis=(2, 4)).reshape(len(x), -1)
        return self.head(h if self.hidden is None else jax.nn.relu(self.hidden(h)))


def leaky(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.1)


MAKERS = {
    "relu": lambda rngs: Dense((jax.nn.relu,) * 3, 40, rngs),
    "smooth": lambda rngs: Dense((jax.nn.gelu, jax.nn.silu), 40, rngs),
    "pooled": lambda rngs: Pooled(4, rngs),
    "residual": Residual,
    "maxmin": lambda rngs: Dense((maxmin, leaky, maxmin), 32, rngs),
    "wide": lambda rngs: Pooled(20, rngs),  # 1280 neurons: no ellipsoid, but local LipLT
}
#: Narrower towards the outputs, so that every engine can be forced (test_engines_attacked.py).
TAPERED = {
    "mlp": lambda rngs: Dense((jax.nn.relu,) * 3, (60, 40, 20), rngs),
    "cnn": lambda rngs: Pooled(4, rngs),
    "resnet": lambda rngs: Residual(rngs, hidden=16),
    "gelu": lambda rngs: Dense((jax.nn.gelu, jax.nn.silu), (50, 20), rngs),
    "groupsort": lambda rngs: Dense((maxmin, leaky, maxmin), (48, 32, 16), rngs),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A trained network and test images that it classifies correctly."""

    model: nnx.Module
    form: LureForm
    x: np.ndarray
    y: np.ndarray
    climber: Climber


@functools.cache
def trained(name: str) -> nnx.Module:
    data, model = digits(), (MAKERS | TAPERED)[name](nnx.Rngs(0))
    model.train()
    model(data.train_x)  # the statistics of BatchNorm, which stay while the rest is trained
    model.eval()
    config = Config(
        loss="cross-entropy",
        batch_size=128,
        learning_rate=5e-3,
        schedule="constant",
        epochs=15,
        validate_every=0,
    )
    return fit(config, data, model=model).model


@functools.cache
def case(name: str, count: int) -> Case:
    model, data = trained(name), digits()
    right = np.flatnonzero(np.asarray(model(data.test_x)).argmax(1) == data.test_y)[:count]
    assert len(right) == count
    x = data.test_x[right]
    form = lb.trace(model, x[:3], batched=True)
    return Case(model, form, x, data.test_y[right], Climber(form))


@functools.cache
def radii(name: str, count: int, norm: float) -> tuple[np.ndarray, np.ndarray]:
    """(N,) global and local ones of `case(name, count)`."""
    given = case(name, count)
    bound = lb.liplt(given.form, norm=norm, pairwise=True)
    wide, near = (
        lb.certified_radius(given.form, given.x, given.y, bound=bound, local=local) for local in (False, True)
    )
    assert near.norm == norm and near.correct.all() and near.guarantee == "verified"
    return wide.radius, near.radius


# ------------------------------------------------------------------------------------------------- the attack
def lengths(d: np.ndarray, norm: float) -> np.ndarray:
    return np.linalg.norm(d, ord=norm, axis=-1)


class Climber:
    """Ascent on differences of the outputs of one form, at flat points: searched in float32, measured in float64."""

    def __init__(self, form: LureForm) -> None:
        def value(point: jax.Array) -> jax.Array:
            return form.evaluate(point.reshape(form.in_shape), point.dtype)

        def rise(d: jax.Array, base: jax.Array, row: jax.Array, back: jax.Array) -> jax.Array:
            return row @ (value(base + d) - value(base - back * d))

        self._values = jax.jit(jax.vmap(value))
        self._jacobians = jax.jit(jax.vmap(jax.jacrev(value)))
        self._rise = jax.jit(jax.vmap(jax.value_and_grad(rise), in_axes=(0, 0, 0, None)))

    def values(self, x: np.ndarray) -> np.ndarray:
        """(N, K) in float64."""
        with jax.enable_x64(True):
            return np.array(self._values(jnp.asarray(x.reshape(len(x), -1), jnp.float64)))

    def jacobians(self, x: np.ndarray) -> np.ndarray:
        """(N, K, n)."""
        return np.asarray(self._jacobians(jnp.asarray(x.reshape(len(x), -1), jnp.float32)), np.float64)

    def steepest(
        self,
        base: np.ndarray,
        rows: np.ndarray,
        reach: np.ndarray,
        norm: float,
        rng: np.random.Generator,
        *,
        steps: int,
        back: float,
    ) -> np.ndarray:
        """(B,) the largest quotient <row, f(base + d) - f(base - back d)> / ||d + back d|| found with ||d|| <= reach.

        base (B, n), rows (B, K), reach (B,). Steepest ascent with projections from a random start.
        """
        d = rng.standard_normal(base.shape)
        d *= (rng.uniform(0.1, 1, len(d)) * reach / lengths(d, norm))[:, None]
        best, most = d, np.full(len(d), -np.inf)
        given = [jnp.asarray(a, jnp.float32) for a in (base, rows, back)]
        for step in range(steps + 1):
            gain, gradient = map(np.asarray, self._rise(jnp.asarray(d, jnp.float32), *given))
            quotient = gain / lengths(d, norm)
            best, most = np.where((quotient > most)[:, None], d, best), np.maximum(quotient, most)
            size = lengths(gradient, 2)[:, None]
            way = np.sign(gradient) if norm == math.inf else gradient / np.where(size > 0, size, 1.0)
            d = d + (reach * (1 - step / (steps + 1)))[:, None] * way
            d *= np.minimum(1.0, reach / np.maximum(lengths(d, norm), 1e-300))[:, None]
        ends = base + best, base - back * best
        change = self.values(ends[0]) - self.values(ends[1])
        return (rows * change).sum(axis=1) / lengths(ends[0] - ends[1], norm)


def others(y: np.ndarray, classes: int = 10) -> np.ndarray:
    """(N, K - 1) the classes that are not y."""
    return np.array([np.delete(np.arange(classes), k) for k in y])


def used(given: Case, radius: np.ndarray, norm: float, *, steps: int = 30, seed: int = 0) -> np.ndarray:
    """(N,) the largest share of the certificate that an attack uses up; a sound radius allows at most 1.

    With a constant L_yi that holds around x up to r, and r <= (z_y - z_i)(x) / L_yi, all x' with ||x' - x|| <= r have
        (z_y - z_i)(x) - (z_y - z_i)(x') <= ||x' - x|| (z_y - z_i)(x) / r.
    Every class is aimed at, within r, r/10 and r/100.
    """
    rng, classes = np.random.default_rng(seed), others(given.y)
    z, one = given.climber.values(given.x), np.eye(10)
    n, k = classes.shape
    gaps = z[np.arange(n), given.y][:, None] - z[np.arange(n)[:, None], classes]
    rows = (one[classes] - one[given.y][:, None]).reshape(n * k, 10)
    base = np.repeat(given.x.reshape(n, -1).astype(np.float64), k, axis=0)
    best = np.zeros((n, k))
    for share in (1.0, 0.1, 0.01):
        reach = np.repeat(NEAR * share * radius, k)
        found = given.climber.steepest(base, rows, reach, norm, rng, steps=steps, back=0.0)
        best = np.maximum(best, found.reshape(n, k))
    return (best * radius[:, None] / gaps).max(axis=1)


def filled(
    given: Case, eps: np.ndarray, norm: float, *, steps: int = 30, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(N,), (N, K - 1): slopes between two points of the ball as shares of `lb.local`: network, pairs with y."""
    rng, classes = np.random.default_rng(seed), others(given.y)
    n, k = classes.shape
    bound = lb.local(given.form, given.x, eps, norm=norm, pairwise=True)
    assert bound.pairwise is not None
    one, jacobians = np.eye(10), given.climber.jacobians(given.x)
    if norm == 2:
        whole = np.linalg.svd(jacobians)[0][:, :, 0]
    else:
        whole = one[np.abs(jacobians).sum(axis=2).argmax(axis=1)]
    rows = np.concatenate([one[classes] - one[given.y][:, None], whole[:, None]], axis=1).reshape(-1, 10)
    proved = np.concatenate(
        [bound.pairwise[np.arange(n)[:, None], given.y[:, None], classes], bound.value[:, None]], axis=1
    )
    flat, reach = given.x.reshape(n, -1).astype(np.float64), np.repeat(eps, k + 1)
    best = np.zeros(proved.shape)
    for share in (1.0, 0.3, 0.03):
        away = rng.standard_normal((n * (k + 1), flat.shape[1]))
        away *= (NEAR * (1 - share) * reach / lengths(away, norm))[:, None]
        base = np.repeat(flat, k + 1, axis=0) + away
        found = given.climber.steepest(base, rows, NEAR * share * reach, norm, rng, steps=steps, back=1.0)
        best = np.maximum(best, found.reshape(best.shape))
    shares = best / proved
    return shares[:, -1], shares[:, :-1]


def broken(
    given: Case, eps: np.ndarray, norm: float, *, steps: int = 30, restarts: int = 2, loss: str = "margin"
) -> np.ndarray:
    """(N,) whether PGD, given the float32 network, finds a point within eps that the network in float64 misreads."""
    attack = pgd(
        given.model,
        given.x,
        given.y,
        eps,
        norm=norm,
        steps=steps,
        restarts=restarts,
        loss=loss,
        low=-9.0,
        high=10.0,
    )
    z = given.climber.values(attack.adversarial)
    rows = np.arange(len(z))
    own = z[rows, given.y]
    z[rows, given.y] = -np.inf
    return own <= z.max(axis=1)


# ------------------------------------------------------------------------------------------------- what is claimed
FEW, MANY = 40, 200
QUICK = [("relu", FEW, norm) for norm in NORMS]
SLOW = [(name, norm) for name in MAKERS for norm in NORMS if (name, norm) != ("wide", math.inf)]  # refused
RUNS = QUICK + [
    pytest.param(name, FEW if name == "wide" else MANY, norm, marks=pytest.mark.slow) for name, norm in SLOW
]
CONTROLS = QUICK + [
    pytest.param(name, FEW, norm, marks=pytest.mark.slow) for name, norm in SLOW if name != "relu"
]


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "count", "norm"), RUNS)
def test_no_attack_succeeds_inside_a_local_radius(name, count, norm):
    given, (wide, near) = case(name, count), radii(name, count, norm)
    assert (wide > 0).all() and (near >= wide).all() and (near > 1.05 * wide).mean() > 0.9
    for loss in ("margin", "ce"):
        assert not broken(given, NEAR * near, norm, steps=60, restarts=3, loss=loss).any()
    assert used(given, near, norm).max() <= 1 + SLACK


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "norm"), RUNS)
def test_no_slope_in_a_ball_exceeds_its_local_constant(name, count, norm):
    given, (_, near) = case(name, count), radii(name, count, norm)
    for share in (0.01, 1.0, 3.0):
        whole, pairs = filled(given, share * near, norm)
        assert whole.max() <= 1 + SLACK and pairs.max() <= 1 + SLACK


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "norm"), CONTROLS)
def test_the_attacks_would_find_radii_and_constants_that_are_wrong(name, count, norm):
    given, (_, near) = case(name, count), radii(name, count, norm)
    loose = 3 if name == "wide" else 1  # local LipLT leaves more between the proof and the nearest flip
    assert broken(given, 5 * loose * near, norm).mean() > 0.8
    assert (used(given, 3 * loose * near, norm) > 1).mean() > 0.5
    whole, pairs = filled(given, 0.01 * near, norm)  # of the Jacobian there
    least = 0.9 if norm == 2 and name != "wide" else 0.6
    assert np.median(whole) > least and np.median(pairs) > least


@pytest.mark.parametrize("norm", NORMS)
def test_a_cliff_behind_a_plain_is_found_at_its_distance(norm):
    """The margin 3 - 40 relu(w'x - 1) is constant up to a hyperplane and then falls: everything is known exactly.

    The attacks above use up 80 % of a certificate, so they do not see an error of a tenth. Here nothing is lost.
    """
    rng = np.random.default_rng(3)
    w = rng.standard_normal((1, 8))
    steep = 40 * (np.linalg.norm(w) if norm == 2 else np.abs(w).sum())  # of the margin
    edge = [-np.ones(1), np.array([3.0, 0.0])]
    form = lb.from_weights([w, np.array([[0.0], [40.0]])], edge, activation="relu")
    x = 0.3 * rng.standard_normal((30, 8))
    x = x[(x @ w[0] < 0.9)]
    assert len(x) > 20
    plain = 40 * (1 - x @ w[0]) / steep  # how far away the margin begins to fall
    true = plain + 3 / steep
    near = lb.certified_radius(
        form,
        x,
        np.zeros(len(x), int),
        bound=lb.liplt(form, norm=norm, pairwise=True),
        local=lb.Local(tries=12),
    ).radius
    assert (near <= true).all() and (near > 0.97 * true).all()
    for share, proved in ((0.999, 0.0), (1.001, steep)):
        bound = lb.local(form, x, share * plain, norm=norm, pairwise=True)
        assert bound.pairwise is not None
        np.testing.assert_allclose(bound.pairwise[:, 0, 1], proved, rtol=1e-6, atol=1e-5)
        assert (bound.pairwise[:, 0, 1] >= proved).all()
