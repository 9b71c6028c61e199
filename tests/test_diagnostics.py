"""Layers as linear maps, matrix-free against their dense matrices, and `diagnose` on networks with known answers."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lipbounds.analysis import diagnostics, operators, spectra_figures
from lipbounds.analysis.diagnostics import Diagnosis, diagnose
from lipbounds.analysis.figures import png
from lipbounds.analysis.forging import forge
from lipbounds.analysis.operators import disc_bounds, discs, largest_eigenvalues, norm_bound, operator
from lipbounds.analysis.spectra import (
    forged_matrix,
    gershgorin_discs,
    interlacing,
    largest_eigenvalue,
    spectral_norm_forged,
)
from lipbounds.errors import GuaranteeError
from lipbounds.training.models import ModelSpec, build

CONVOLUTIONS: dict[str, tuple[tuple[int, int, Any], dict[str, Any], tuple[int, ...]]] = {
    "3x3": ((3, 4, (3, 3)), {}, (8, 7, 3)),
    "4x4 stride 2 valid": ((2, 3, (4, 4)), {"strides": 2, "padding": "VALID"}, (11, 10, 2)),
    "4x2 stride (2, 3)": ((2, 3, (4, 2)), {"strides": (2, 3), "padding": ((0, 3), (2, 1))}, (9, 8, 2)),
    "stride above kernel": ((2, 3, (2, 2)), {"strides": 3, "padding": 1}, (9, 8, 2)),
    "circular": ((2, 3, (3, 3)), {"padding": "CIRCULAR"}, (9, 8, 2)),
    "circular, divisor": ((2, 3, (3, 2)), {"padding": "CIRCULAR", "strides": 2}, (10, 6, 2)),
    "circular, kernel above ring": ((2, 3, (5, 3)), {"padding": "CIRCULAR"}, (4, 5, 2)),
    "reflect": ((2, 3, (3, 5)), {"padding": "REFLECT"}, (7, 8, 2)),
    "groups": ((4, 6, (3, 3)), {"feature_group_count": 2}, (6, 7, 4)),
    "depthwise stride 2": ((4, 8, (3, 3)), {"feature_group_count": 4, "strides": 2}, (7, 8, 4)),
    "dilation": ((2, 3, (3, 2)), {"kernel_dilation": (2, 3)}, (10, 8, 2)),
    "input dilation": ((2, 3, (3, 4)), {"input_dilation": (2, 1), "padding": ((1, 2), (0, 3))}, (6, 7, 2)),
    "1 axis, causal": ((2, 3, (4,)), {"padding": "CAUSAL", "strides": 2}, (15, 2)),
    "3 axes": ((2, 2, (2, 3, 2)), {}, (4, 5, 3, 2)),
    "kernel above image": ((2, 2, (5, 5)), {}, (3, 4, 2)),
}


def _layer(name: str) -> tuple[Any, tuple[int, ...]]:
    arguments, keywords, shape = CONVOLUTIONS[name]
    layer = nnx.Conv(*arguments, **keywords, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    return layer, shape


@pytest.mark.sampled(16)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_discs_of_a_convolution_equal_those_of_its_matrix(name: str, rng: np.random.Generator) -> None:
    layer, shape = _layer(name)
    op = operator(layer, shape, dense_entries=0)
    w = op.dense()
    x = rng.normal(size=(2, *shape)).astype(np.float32)
    bias = layer.bias[...]
    # the matrix is that of the layer
    np.testing.assert_allclose(
        w @ x.reshape(2, -1).T, np.asarray(layer(x) - bias).reshape(2, -1).T, atol=1e-4
    )
    masks = rng.random((3, *shape)) < np.array([0.2, 0.7, 1.0]).reshape(3, *[1] * len(shape))
    small = operator(layer, shape)
    assert op.matrix is None and small.matrix is not None
    whole, *found = disc_bounds(op, masks)
    assert whole == pytest.approx(gershgorin_discs(w.T @ w).bound)
    for axis, by in enumerate(("row", "column")):
        known = [gershgorin_discs(forged_matrix(w, mask.ravel()), by) for mask in masks]  # type: ignore[arg-type]
        np.testing.assert_allclose(found[axis], [one.bound for one in known], rtol=1e-10)
        for one in (discs(op, masks[1], by), discs(small, masks[1], by)):  # type: ignore[arg-type]
            np.testing.assert_allclose(one.centers, known[1].centers, rtol=1e-11, atol=1e-14)
            np.testing.assert_allclose(one.radii, known[1].radii, rtol=1e-10, atol=1e-11)
            assert (one.radii >= known[1].radii * (1 - 1e-14)).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["4x4 stride 2 valid", "groups"])
def test_eigenvalues_of_a_convolution_equal_those_of_its_matrix(name: str, rng: np.random.Generator) -> None:
    layer, shape = _layer(name)
    op = operator(layer, shape, dense_entries=0)
    w = op.dense()
    masks = rng.random((5, *shape)) < np.array([0.0, 0.1, 0.5, 0.9, 1.0]).reshape(5, *[1] * len(shape))
    for norm, measure in ((False, largest_eigenvalue), (True, spectral_norm_forged)):
        known = np.array([measure(w, mask.ravel()) for mask in masks])
        found = largest_eigenvalues(op, masks, norm=norm)
        assert not found.exact and (found.residual <= 2e-3).all()
        np.testing.assert_allclose(found.value, known, rtol=1e-4)
        assert (found.value <= known * (1 + 1e-12)).all()  # attained
        exact = largest_eigenvalues(operator(layer, shape), masks, norm=norm)
        assert exact.exact
        np.testing.assert_allclose(exact.value, known, rtol=1e-11)
    bound = norm_bound(op)
    top = math.sqrt(largest_eigenvalue(w))
    assert top * (1 - 1e-12) <= bound.value <= top * (1 + 1e-8) and bound.guarantee == "verified"


def test_few_rounds_are_reported_by_the_residual(rng: np.random.Generator) -> None:
    layer = nnx.Linear(300, 400, rngs=nnx.Rngs(0))
    op = dataclasses.replace(operator(layer, (300,)), matrix=None)
    found = largest_eigenvalues(op, np.ones((1, 300), bool), rounds=1)
    known = largest_eigenvalue(np.asarray(layer.kernel[...]).T)
    assert found.residual[0] > 1e-3 and found.value[0] < known * (1 - 1e-6)
    near = np.abs(np.linalg.svd(np.asarray(layer.kernel[...], np.float64))[1] ** 2 / found.value[0] - 1)
    assert near.min() <= found.residual[0]  # what the residual says


def test_products_are_adjoint_and_leave_out_the_bias(rng: np.random.Generator) -> None:
    layer, shape = _layer("4x2 stride (2, 3)")
    op = operator(layer, shape)
    x, y = rng.normal(size=(3, *shape)), rng.normal(size=(3, *op.out_shape))
    left = (op.matvec(x) * y).reshape(3, -1).sum(1)
    np.testing.assert_allclose(left, (x * op.rmatvec(y)).reshape(3, -1).sum(1), rtol=1e-12)
    assert not op.matvec(np.zeros((1, *shape))).any()
    assert op.size == op.dense().shape


def test_a_layer_is_read_with_the_weights_it_stores() -> None:
    """Half precision, a mask of the kernel and a dense layer."""
    half = nnx.Conv(2, 3, (3, 3), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    kernel = np.asarray(half.kernel[...].astype(jnp.float32), np.float64)
    op = operator(half, (4, 4, 2))
    np.testing.assert_array_equal(np.sort(np.unique(np.abs(op.dense())))[1:], np.unique(np.abs(kernel)))
    assert norm_bound(op).value ** 2 == pytest.approx(largest_eigenvalue(op.dense()))

    keep = np.zeros((3, 3, 2, 3), np.float32)
    keep[1, 1] = 1
    masked = nnx.Conv(2, 3, (3, 3), mask=jnp.asarray(keep), rngs=nnx.Rngs(0))
    assert (operator(masked, (4, 4, 2)).dense() != 0).sum() == 16 * 6

    linear = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(operator(linear, (3,)).dense(), np.asarray(linear.kernel[...]).T)


def test_operator_refuses() -> None:
    layer, shape = _layer("3x3")
    with pytest.raises(ValueError, match="not ConvTranspose"):
        operator(nnx.ConvTranspose(2, 2, (2,), rngs=nnx.Rngs(0)), (4, 2))
    with pytest.raises(ValueError, match="has 3 axes, the last of 3 entries; got shape"):
        operator(layer, (8, 7, 4))
    with pytest.raises(ValueError, match="too small for this layer"):
        operator(nnx.Conv(1, 1, (3,), padding="VALID", rngs=nnx.Rngs(0)), (2, 1))
    with pytest.raises(ValueError, match="own dot_general"):
        operator(
            nnx.Linear(2, 2, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=nnx.Rngs(0)), (2,)
        )
    layer.kernel[...] = layer.kernel[...].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="not finite"):
        operator(layer, shape)
    op = operator(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), (3,))
    for masks in (np.ones((2, 3)), np.ones(3, bool), np.ones((0, 3), bool), np.ones((1, 4), bool)):
        with pytest.raises(ValueError, match="masks must be booleans"):
            largest_eigenvalues(op, masks)
    with pytest.raises(ValueError, match="by must be"):
        discs(op, by="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a batch"):
        op.matvec(np.ones(3))
    with pytest.raises(ValueError, match="no upper bound"):
        norm_bound(op, guarantee="estimate")


class Two(nnx.Module):
    """The identity, then the matrix W; on any leading axes."""

    def __init__(self, w: np.ndarray):
        m, n = w.shape
        self.first = nnx.Linear(n, n, use_bias=False, rngs=nnx.Rngs(0))
        self.first.kernel[...] = jnp.eye(n)
        self.second = nnx.Linear(n, m, rngs=nnx.Rngs(0))
        self.second.kernel[...] = jnp.asarray(w.T, jnp.float32)
        self.second.bias[...] = jnp.ones(m)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x))


# A = [[9, 0, 12], [0, 4, 0], [12, 0, 16]], eigenvalues 25, 4, 0
W = np.array([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]])
X = np.array([[1.0, 0.4, 0.0], [0.4, 1.6, 0.0], [0.3, 0.3, 1.5]], np.float32)  # c = 0.8: masks 100, 010, 001


def test_known_answers() -> None:
    found = diagnose(forge(Two(W), X, c_r=0.5), X)
    layer = found["second"]
    assert (found.examples, found.sample, layer.inputs, len(found.layers)) == (3, 3, 3, 1)
    assert layer.threshold == pytest.approx(0.8) and layer.shape == ((3,), (2,))
    assert layer.zeroed == pytest.approx(6 / 9) and layer.zero == pytest.approx(2 / 9)
    lengths = np.linalg.norm(X, axis=1)
    images = np.array([np.hypot(3, 0.8), np.hypot(1.2, 3.2), np.hypot(6.9, 0.6)])
    assert layer.constant == pytest.approx((images / lengths).max(), rel=1e-6)
    assert layer.constant_forged == pytest.approx((np.array([3, 3.2, 6]) / lengths).max(), rel=1e-6)
    assert layer.constant_gated == pytest.approx(4, rel=1e-6)
    assert layer.exact and layer.eigenvalue == pytest.approx(25) and layer.residual == 0
    assert 25 <= layer.eigenvalue_bound <= 25 * (1 + 1e-9) and layer.guarantee == "verified"
    np.testing.assert_allclose(np.sort(layer.eigenvalues_forged), [4, 9, 16], rtol=1e-12)
    np.testing.assert_allclose(np.sort(layer.eigenvalues_support), [9, 9, 25], rtol=1e-12)
    assert layer.worst == pytest.approx(16) and layer.ratios.max() == pytest.approx(0.64)
    assert layer.support_ratios.max() == pytest.approx(1)
    assert layer.norm_forged == pytest.approx(20)  # the column (12, 0, 16)
    assert layer.disc == pytest.approx(28)
    np.testing.assert_allclose(np.sort(layer.rows_forged), [4, 12, 16], rtol=1e-12)
    np.testing.assert_allclose(np.sort(layer.columns_forged), [4, 21, 28], rtol=1e-12)


def _same(a: Diagnosis, b: Diagnosis) -> None:
    assert a.examples == b.examples
    for one, other in zip(a.layers, b.layers, strict=True):
        for name, value in one.to_json().items():
            if isinstance(value, str):
                assert value == getattr(other, name)
            else:
                expected = jax.tree.leaves(other.to_json()[name])
                np.testing.assert_allclose(jax.tree.leaves(value), expected, rtol=2e-5, err_msg=name)


@pytest.mark.slow
def test_a_network_of_convolutions(rng: np.random.Generator) -> None:
    """Against dense matrices, in odd batches out of an iterator of pairs, with one compilation."""
    model = build(ModelSpec("residual_cnn", (8, 8, 1), {"blocks": 1, "channels": 4}))
    x = rng.random((23, 8, 8, 1), dtype=np.float32)
    forged = forge(model, x, 2**-3)
    found = diagnose(forged, x, examples=5, batch_size=8)
    before = diagnostics._measure._cache_size()
    again = diagnose(forged, ((x[i : i + 3], None) for i in range(0, 23, 3)), examples=5, batch_size=8)
    assert diagnostics._measure._cache_size() == before
    _same(found, again)
    assert [one.path for one in found.layers] == list(forged.gates) and found.sample == 5
    inputs = forged.inputs(x)
    for one in found.layers:
        raw = np.asarray(inputs[one.path])
        masks = (np.abs(raw) > one.threshold).reshape(23, -1)
        w = operator(forged.gates[one.path].layer, raw.shape[1:]).dense()
        flat = raw.reshape(23, -1).astype(np.float64)
        length = np.linalg.norm(flat, axis=1)
        assert one.zeroed == pytest.approx(1 - masks.mean(), rel=1e-5)
        assert one.zero == pytest.approx((flat == 0).mean(), rel=1e-5)
        assert one.constant == pytest.approx((np.linalg.norm(flat @ w.T, axis=1) / length).max(), rel=1e-4)
        after = np.linalg.norm((flat * masks) @ w.T, axis=1)
        assert one.constant_forged == pytest.approx((after / length).max(), rel=1e-4)
        gated = after / np.linalg.norm(flat * masks, axis=1)
        assert one.constant_gated == pytest.approx(gated.max(), rel=1e-4)
        every = np.array([largest_eigenvalue(w, mask) for mask in masks])
        near = np.abs(every[:, None] / one.eigenvalues_forged - 1)
        assert (near.min(axis=0) < 1e-9).all()  # five of the 23
        worst = masks[int(np.argmin(np.abs(every / one.worst - 1)))]
        assert one.norm_forged == pytest.approx(spectral_norm_forged(w, worst))
        assert one.eigenvalue == pytest.approx(largest_eigenvalue(w))
        assert (one.eigenvalues_support >= one.eigenvalues_forged).all()


@pytest.mark.slow
def test_iterated_eigenvalues_agree_with_exact_ones(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    x = rng.normal(size=(6, 20)).astype(np.float32)
    forged = forge(Two(rng.normal(size=(30, 20))), x, 2**-3)
    exact = diagnose(forged, x)["second"]
    monkeypatch.setattr(operators, "EXACT_SIDE", 0)
    found = diagnose(forged, x)
    layer = found["second"]
    assert not layer.exact and ">= " in repr(found) and "~ " in repr(found) and "Ritz" in repr(found)
    np.testing.assert_allclose(layer.eigenvalues_forged, exact.eigenvalues_forged, rtol=1e-4)
    np.testing.assert_allclose(
        [layer.eigenvalue, layer.norm_forged], [exact.eigenvalue, exact.norm_forged], rtol=1e-4
    )


def test_every_token_is_an_input(rng: np.random.Generator) -> None:
    x = rng.normal(size=(7, 5, 3)).astype(np.float32)
    forged = forge(Two(W), x, 2**-2)
    layer = diagnose(forged, x, batch_size=4)["second"]
    flat = x.reshape(-1, 3).astype(np.float64)
    assert layer.inputs == 35 and len(layer.eigenvalues_forged) == 7
    assert layer.zeroed == pytest.approx((np.abs(flat) <= layer.threshold).mean(), rel=1e-5)
    length = np.linalg.norm(flat, axis=1)
    assert layer.constant == pytest.approx((np.linalg.norm(flat @ W.T, axis=1) / length).max(), rel=1e-5)


class Thrice(nnx.Module):
    """One layer called three times, and a transposed convolution."""

    def __init__(self) -> None:
        self.inner = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.up = nnx.ConvTranspose(1, 1, (2,), rngs=nnx.Rngs(1))

    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.tanh(self.inner(x))
        return self.up(x[..., None])[..., 0]


def test_layers_called_several_times_and_layers_that_are_left_out(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 3)).astype(np.float32)
    forged = forge(Thrice(), x, 2**-2, where="*")
    found = diagnose(forged, x, batch_size=3)
    assert [one.path for one in found.layers] == ["inner"] and found["inner"].inputs == 15
    raw = np.asarray(forged.inputs(x)["inner"])
    assert found["inner"].zeroed == pytest.approx((np.abs(raw) <= found["inner"].threshold).mean(), rel=1e-5)
    assert list(found.left_out) == ["up"] and "up is left out: diagnostics read nnx.Conv" in repr(found)
    with pytest.raises(ValueError, match="not ConvTranspose"):
        diagnose(forge(Thrice(), x, 2**-2, where="up"), x)


def test_smooth_gates_are_measured_as_they_are(rng: np.random.Generator) -> None:
    forged = forge(Two(W), X, c_r=0.5, kind="smooth", tau=0.3)
    found = diagnose(forged, X)
    layer = found["second"]
    c = 0.8
    after = X / (1 + np.exp(-(np.abs(X) - c) / (0.3 * c)))
    image = np.linalg.norm(after @ W.T, axis=1)
    assert layer.constant_forged == pytest.approx((image / np.linalg.norm(X, axis=1)).max(), rel=1e-5)
    assert layer.constant_gated == pytest.approx((image / np.linalg.norm(after, axis=1)).max(), rel=1e-5)
    assert layer.zeroed == pytest.approx(6 / 9) and "the gate is smooth" in repr(found)
    assert forged.slopes()["second"][1] > 1


@pytest.mark.parametrize(
    "change",
    [
        {"eigenvalues_forged": np.array([25.1])},
        {"eigenvalues_support": np.array([25.1])},
        {"eigenvalues_forged": np.array([10.0])},
        {"eigenvalue": 25.1},
        {"norm_forged": 25.1},
        {"norm_forged": 15.9},
        {"rows_forged": np.array([28.1])},
        {"columns_forged": np.array([28.1])},
        {"rows_forged": np.array([3.0])},
        {"columns_forged": np.array([3.0])},
        {"disc": 24.0},
        {"constant": 5.01},
        {"constant_gated": 5.01},
    ],
)
def test_every_violation_is_seen(change: dict[str, Any]) -> None:
    layer = diagnose(forge(Two(W), X, c_r=0.5), X, examples=1, seed=3)["second"]
    layer = dataclasses.replace(
        layer,
        **{"eigenvalues_forged": np.array([9.0]), "eigenvalues_support": np.array([9.0])},
        **{"rows_forged": np.array([12.0]), "columns_forged": np.array([21.0]), "norm_forged": 15.0},
    )
    op = operator(Two(W).second, (3,))
    diagnostics._check(layer, op)
    if change == {"norm_forged": 15.9}:  # allowed: only below the eigenvalue it is wrong
        change = {"norm_forged": 8.9}
    with pytest.raises(GuaranteeError, match="does not hold. This is a bug"):
        diagnostics._check(dataclasses.replace(layer, **change), op)


def test_records_tables_and_figures(rng: np.random.Generator) -> None:
    found = diagnose(forge(Two(W), X, c_r=0.5), X)
    record = json.loads(json.dumps(found.to_json()))
    assert record["layers"][0]["ratio_worst"] == pytest.approx(0.64) and record["seed"] == 0
    text = repr(found)
    assert "66.7 %" in text and "64.00 %" in text and "hard-forged" in text
    assert "<table" in found._repr_html_() and "| layer |" in found._repr_markdown_()
    for _, header, rows in found.tables():
        assert all(len(row) == len(header) for row in rows)
    with pytest.raises(KeyError):
        found["third"]

    a, forged = forged_matrix(W, np.ones(3, bool)), forged_matrix(W, np.array([False, True, True]))
    figure = spectra_figures.discs_figure(gershgorin_discs(a), gershgorin_discs(forged), "second")
    assert [ax.get_title(loc="left").split(":")[0] for ax in figure.axes] == ["A by row", "A' by row"]
    bars = spectra_figures.zeroed_figure(found).axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx([6 / 9, 2 / 9])
    for drawn in (
        figure,
        spectra_figures.discs_figure(gershgorin_discs(a + 1j), gershgorin_discs(forged)),
        spectra_figures.eigenvalues_figure(interlacing(W, np.array([False, True, True])), "second"),
        spectra_figures.eigenvalues_figure(interlacing(W, np.zeros(3, bool))),
        spectra_figures.ratios_figure(found),
        spectra_figures.zeroed_figure(found),
    ):
        assert png(drawn).startswith(b"\x89PNG")


def test_diagnose_refuses() -> None:
    forged = forge(Two(W), X, c_r=0.5)
    with pytest.raises(TypeError, match="what forge returned"):
        diagnose(Two(W), X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="forge with c_r > 0"):
        diagnose(forge(Two(W), X, c_r=0), X)
    with pytest.raises(ValueError, match="no examples"):
        diagnose(forged, iter([]))
    with pytest.raises(ValueError, match="must have shape"):
        diagnose(forged, X[:, :2])
    with pytest.raises(ValueError, match="NaN"):
        diagnose(forged, X * np.float32(np.nan))
    for keywords in ({"examples": 0}, {"batch_size": True}, {"examples": 1.5}):
        with pytest.raises(ValueError, match="whole number >= 1"):
            diagnose(forged, X, **keywords)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no upper bound"):
        diagnose(forged, X, guarantee="estimate")
