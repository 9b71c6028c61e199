"""Types of the networks of training: weights are float32 whatever JAX is set to, and products follow the input."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lipbounds.training.activations import Householder
from lipbounds.training.models import ARCHITECTURES, build, spec_for
from lipbounds.training.store import load_model, save_model

NETWORKS = {
    "64-16-8-10": "mlp",
    "residual_cnn": "residual_cnn",
    "2C2F": "2C2F",
    "4C3F": "4C3F",
    "6C2F": "6C2F",
    "8C2F": "8C2F",
    "liresnet-L1W8": "liresnet",
    "lipnext-L1W8": "lipnext",
    "lipnext-L1W8-cayley": "lipnext",
    "lipnext-L1W8-symmetric": "lipnext",
    "lipconvnet-3": "lipconvnet",
    "4C3F-cholesky": "orthogonal_4C3F",
    "sll-mlp-L1W16": "residual_lipschitz",
    "sll-cnn-L1W8": "residual_lipschitz",
    "aol-cnn-L1W8": "residual_lipschitz",
    "resnet10-w0.125": "batch_norm",
}


def spec(name: str, activation: str = "clipped-relu") -> Any:
    shape = (32, 32, 3) if name in ("6C2F", "8C2F") or name.startswith("resnet") else (8, 8, 1)
    return spec_for(name, shape, 10, activation=activation)


def weights(model: nnx.Module) -> list[Any]:
    return [a for a in jax.tree.leaves(nnx.state(model)) if jnp.issubdtype(a.dtype, jnp.floating)]


def test_weights_are_float32_whatever_the_flag_says() -> None:
    assert set(NETWORKS.values()) == set(ARCHITECTURES)
    with jax.enable_x64(True):
        for name in NETWORKS:
            made = nnx.eval_shape(lambda name=name: build(spec(name)))
            assert {str(a.dtype) for a in weights(made)} == {"float32"}, name
        assert {str(a.dtype) for a in weights(Householder(4))} == {"float32"}


def test_a_seed_gives_the_same_weights_with_the_flag_and_they_can_be_read(tmp_path: pathlib.Path) -> None:
    small = spec("sll-mlp-L1W8")
    plain = build(small, seed=3)
    with jax.enable_x64(True):
        flagged = build(small, seed=3)
        path = save_model(tmp_path / "model.safetensors", flagged, small)
        found = [weights(flagged), weights(load_model(path)[0])]
    for other in (*found, weights(load_model(path)[0])):
        for one, two in zip(weights(plain), other, strict=True):
            np.testing.assert_array_equal(one, two)


def products(name: str, dtype: Any) -> list[str]:
    """The type of every product in a network on images of this type, in order."""
    graph, state = nnx.split(nnx.eval_shape(lambda: build(spec(name))))
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), dtype)
    with jax.numpy_dtype_promotion("standard"):
        made = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, images)
    assert made.out_avals[0].dtype == jnp.float32
    equations = [e for e in made.eqns if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert all(len({v.aval.dtype for v in e.invars}) == 1 for e in equations)
    return [str(e.invars[0].aval.dtype) for e in equations]


@pytest.mark.parametrize(("name", "count"), [("64-16-8-10", 3), ("residual_cnn", 6), ("2C2F", 4)])
def test_products_follow_the_images_and_the_last_one_the_weights(name: str, count: int) -> None:
    assert products(name, jnp.bfloat16) == ["bfloat16"] * (count - 1) + ["float32"]
    assert products(name, jnp.float32) == ["float32"] * count
