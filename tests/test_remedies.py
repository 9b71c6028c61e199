"""What several operations are together has one entry with a remedy of its own, and remedies are true."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax, nn
from test_refusals import Fn, X, check_message

import lipbounds as lb
from lipbounds.errors import Unsupported


def manual_layer_norm(h: jax.Array) -> jax.Array:
    return (h - h.mean()) / jnp.sqrt(h.var() + 1e-5)


def batch_norm(x: jax.Array) -> jax.Array:
    model = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    model.train()
    return model(x)


def attention(x: jax.Array) -> jax.Array:
    heads = x.reshape(1, 3, 2, 2)
    return nn.dot_product_attention(heads, 2.0 * heads, heads).reshape(-1)


LAYER_NORM, GROUP_NORM, RMS_NORM = (
    nnx.LayerNorm(8, rngs=nnx.Rngs(0)),
    nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0)),
    nnx.RMSNorm(8, rngs=nnx.Rngs(0)),
)
COMPOSITES: dict[str, tuple[Fn, int, str, str]] = {
    "softmax": (nn.softmax, 8, "softmax", "certify the logits"),
    "softmax by hand": (lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x)), 8, "division", ""),
    "softmax of rows": (lambda x: nn.softmax(x.reshape(2, 4), axis=1).ravel(), 8, "softmax", "certify the logits"),
    "layer norm": (LAYER_NORM, 8, "LayerNorm", "affine layer"),
    "group norm": (lambda x: GROUP_NORM(x[None])[0], 8, "GroupNorm", "affine layer"),
    "rms norm": (RMS_NORM, 8, "root mean square", "constant scale"),
    "layer norm by hand": (manual_layer_norm, 8, "standard deviation", "affine layer"),
    "linen": (
        lambda x: linen.LayerNorm().apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x),  # type: ignore[arg-type,unused-ignore]
        8,
        "LayerNorm divides",
        "affine layer",
    ),
    "standardize": (nn.standardize, 8, "standard deviation", "affine layer"),
    "batch norm": (batch_norm, 8, "BatchNorm in training mode", r"model\.eval\(\)"),
    "norm": (lambda x: x / jnp.linalg.norm(x), 8, "norm of x", "constant"),
    "smoothed norm": (lambda x: x * lax.rsqrt(jnp.sum(x**2) + 1.0), 8, "norm of x", "constant"),
    "l1 norm": (lambda x: x / jnp.sum(jnp.abs(x)), 8, "norm of x", "constant"),
    "attention": (attention, 12, "attention", "before and after"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(COMPOSITES))
def test_a_composite_is_one_entry_with_its_own_remedy(name: str) -> None:
    """They used to be several entries, with remedies that invited the user to declare slopes that do not exist."""
    fn, size, reason, remedy = COMPOSITES[name]
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(fn, jnp.linspace(-1.0, 2.0, size))
    check_message(caught.value)
    assert "register_activation" not in str(caught.value)
    if name != "softmax by hand":
        (item,) = caught.value.items
        assert re.search(reason, item.reason) and re.search(remedy, item.remedy), str(item)


def test_other_refusals_stay_beside_a_composite() -> None:
    """What lies before a softmax or a normalisation is not swallowed by it."""

    def fn(x: jax.Array) -> jax.Array:
        return manual_layer_norm(nn.softmax(jnp.round(x) * jnp.flip(x)))

    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(fn, jnp.linspace(-1.0, 2.0, 8))
    reasons = [item.reason for item in caught.value.items]
    assert len(reasons) == 4, str(caught.value)
    for word, text in zip(("half-integer", "product", "softmax", "standard deviation"), reasons, strict=True):
        assert word in text


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * x, jnp.exp, jnp.sqrt, lax.rsqrt, jnp.sign, lambda x: x**3, jnp.log, jnp.reciprocal,
        lax.lgamma, lax.digamma, lax.erf_inv, lambda x: jnp.mod(x, 1.0), jnp.sinh, jnp.tan, lambda x: x**1.5,
        lambda x: jnp.where(x > 0.1, x, 0.0), lambda x: jnp.linalg.svd(x.reshape(2, 4), compute_uv=False),
        nn.glu, lambda x: x / (1.0 + jnp.flip(x) ** 2),
    ],
)  # fmt: skip
def test_nobody_is_invited_to_declare_slopes_that_do_not_exist(fn: Fn) -> None:
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(fn, jnp.linspace(0.5, 2.0, 8))
    check_message(caught.value)
    assert "register_activation" not in str(caught.value), str(caught.value)


@pytest.mark.parametrize("fn", [lax.bessel_i0e, lax.bessel_i1e])
def test_slopes_of_an_unknown_function_may_be_declared(fn: Fn) -> None:
    with pytest.raises(
        lb.UnsupportedError, match="if its slope is bounded declare it with register_activation"
    ):
        lb.trace(fn, X)


@pytest.mark.parametrize("fn", [lambda x: nn.sigmoid(x[:6]) * jnp.tanh(x[6:]), lambda x: x / jnp.sum(x**2)])
def test_that_there_is_no_constant_is_not_said_where_it_is_not_known(fn: Fn) -> None:
    """A gate of an LSTM is Lipschitz; only it cannot be bounded here."""
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(fn, X)
    (item,) = caught.value.items
    assert "cannot be bounded here" in item.reason
    assert "there is no Lipschitz constant" not in item.reason


def test_a_jump_on_the_way_does_not_prove_that_there_is_no_constant() -> None:
    """|x| by way of integers; the remedy works."""
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(lambda x: ((x > 0).astype(jnp.int32) * 2 - 1).astype(x.dtype) * x, X)
    check_message(caught.value)
    assert "there is no Lipschitz constant" not in str(caught.value)
    assert "(x > 0).astype(x.dtype)" in str(caught.value)
    form = lb.trace(lambda x: ((x > 0).astype(x.dtype) * 2 - 1) * x, X)
    assert lb.liplt(form).value == pytest.approx(1.0, rel=1e-6)


def test_masks_of_minus_infinity_have_a_remedy_that_works() -> None:
    mask = np.arange(X.size) % 2 == 0
    for reduce in (jnp.max, nn.logsumexp):

        def masked(x: jax.Array, low: float, reduce: Fn = reduce) -> jax.Array:
            return reduce(jnp.where(mask, x, low))[None]

        with pytest.raises(ValueError, match=r"np\.flatnonzero\(mask\).* such as -1e9"):
            lb.trace(lambda x, f=masked: f(x, -jnp.inf), X)
        taken = lb.trace(lambda x, f=reduce: f(x[..., np.flatnonzero(mask)])[None], X)
        finite = lb.trace(lambda x, f=masked: f(x, -1e9), X)
        assert lb.liplt(taken).value == pytest.approx(lb.liplt(finite).value, rel=1e-6)
    with pytest.raises(ValueError, match="NaN or infinite$"):
        lb.trace(lambda x: x * np.float32(np.nan), X)


def test_reason_and_remedy_are_sentences() -> None:
    item = Unsupported("mul", "a/b", (3,), "it is a product", "make it a sum.")
    assert str(item) == "mul at a/b, shape (3,): it is a product. Remedy: make it a sum."


def test_a_batch_without_batched_is_told_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"shape \(5, 2\): pass one example such as X\[0\], or a batch"):
        lb.trace(lambda X: X @ jnp.ones((3, 2)), jnp.ones((5, 3)))
