"""Which layers get a gate, and how it gets there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from forge_nets import Net, Wrapper
from zoo_flax import ConvBatchNorm, PreActivationResNet, Residual, Scanned, Wrapped

from lipbounds.analysis.forging import forge, track
from lipbounds.analysis.gates import Site, choose
from lipbounds.training.models import build, spec_for


# -------------------------------------------------------------------------------------- which layers, and how
class Containers(nnx.Module):
    """Layers in every kind of container, called in an order of their own; one stands in two places."""

    def __init__(self):
        rngs = nnx.Rngs(0)

        def layer():
            return nnx.Linear(4, 4, rngs=rngs)

        self.b = nnx.Sequential(layer(), nnx.relu, layer())
        self.a = nnx.Dict({"inner": layer()})
        self.pair = nnx.data((layer(), {"deep": [layer()]}))
        self.list = nnx.List([layer()])
        self.twin = self.list[0]
        self.me = self

    def __call__(self, x):
        x = self.b(x)
        x = self.pair[1]["deep"][0](self.pair[0](x))
        x = self.list[0](jnp.sin(self.a["inner"](x)))
        assert self.twin.kernel is self.list[0].kernel and self.twin.in_features == 4
        return self.twin(inputs=jnp.tanh(x))


def test_containers_shared_layers_and_the_order_of_calls(rng):
    model = Containers()
    x = rng.normal(size=(5, 4)).astype(np.float32)
    forged = forge(model, x, 0.2, where="*")
    assert list(forged.gates) == [
        "b.layers.0", "b.layers.2", "pair.0", "pair.1.deep.0", "a.inner", "list.0",
    ]  # fmt: skip
    assert forged.network.twin is forged.network.list[0] is forged.gates["list.0"]
    assert isinstance(forged.network.pair, tuple) and forged.network.me is forged.network
    assert forged.inputs(x)["list.0"].shape == (10, 4)  # two calls
    h = forged.gates["b.layers.2"]
    assert (
        h.in_features == 4
        and h.kernel is h.layer.kernel
        and not hasattr(h, "_own")
        and not hasattr(h, "nothing")
    )
    with pytest.raises(AttributeError, match="nothing"):
        h.nothing  # noqa: B018
    plain = np.asarray(model(x))
    np.testing.assert_array_equal(forged.with_c_r(0, keep=True)(x), plain)
    np.testing.assert_array_equal(forged.original()(x), plain)
    assert np.abs(forged(x) - plain).max() > 1e-3
    shared = [site for site in forged.sites if site.path == "list.0"]
    assert shared == [Site("list.0", "Linear", (4, 4), ((4,), (4,)))]


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.qkv, self.out = nnx.Linear(4, 12, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, h):
        q, k, v = jnp.split(self.qkv(h), 3, axis=-1)
        return self.out(jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.fc1, self.fc2 = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, h):
        return self.fc2(jax.nn.gelu(self.fc1(h)))


class Encoder(nnx.Module):
    """A transformer block, its MLP in a module of its own or not; its attention flax's or not."""

    def __init__(self, rngs, flat, own):
        self.flat, self.own = flat, own
        self.norm1, self.norm2 = nnx.LayerNorm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        self.attention = (
            Attention(rngs)
            if own
            else nnx.MultiHeadAttention(2, 4, decode=False, deterministic=True, rngs=rngs)
        )
        if flat:
            self.linear1, self.linear2 = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        else:
            self.mlp = Mlp(rngs)

    def __call__(self, h):
        h = h + self.attention(self.norm1(h))
        m = self.norm2(h)
        return h + (self.linear2(jax.nn.gelu(self.linear1(m))) if self.flat else self.mlp(m))


class Transformer(nnx.Module):
    def __init__(self, flat=False, own=False):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Linear(3, 4, rngs=rngs)
        self.blocks = nnx.List([Encoder(rngs, flat, own) for _ in range(2)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean(axis=-2))


DEFAULTS = {
    "residual blocks with BatchNorm": (
        PreActivationResNet, (4, 4, 1), ["blocks.0.conv1", "blocks.0.conv2"],
    ),
    "BatchNorm at the root": (ConvBatchNorm, (5, 5, 1), ["conv2", "head"]),
    "transformer": (lambda _: Transformer(), (5, 3), [f"blocks.{k}.mlp.fc{i}" for k in (0, 1) for i in (1, 2)]),
    "transformer, own attention": (
        lambda _: Transformer(own=True), (5, 3), [f"blocks.{k}.mlp.fc{i}" for k in (0, 1) for i in (1, 2)],
    ),
    "transformer, flat blocks": (
        lambda _: Transformer(flat=True), (5, 3), [f"blocks.{k}.linear{i}" for k in (0, 1) for i in (1, 2)],
    ),
    "transformer, flat blocks, own attention": (
        lambda _: Transformer(True, True), (5, 3), [f"blocks.{k}.linear{i}" for k in (0, 1) for i in (1, 2)],
    ),
    "multilayer perceptron": (lambda _: Net((6, 4, 4, 2)), (6,), ["layers.1", "layers.2"]),
    "no norm": (
        lambda _: build(spec_for("residual_cnn", (8, 8, 1), 10)), (8, 8, 1),
        ["blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", "head"],
    ),
}  # fmt: skip


@pytest.mark.sampled(8)
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", DEFAULTS)
def test_default_rule(rng, name, wrapped):
    make, shape, paths = DEFAULTS[name]
    model = make(rng)
    model = Wrapper(model) if wrapped else model
    model.eval()
    chosen = [site.path for site in choose(model, (shape, "float32"), None)]
    assert chosen == [f"network.{path}" if wrapped else path for path in paths]


class Shortcut(nnx.Module):
    """Two convolutions read the normalised input."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.block = nnx.Sequential(nnx.Conv(1, 2, (3, 3), rngs=rngs), nnx.BatchNorm(2, rngs=rngs))
        self.shortcut = nnx.Conv(1, 2, (1, 1), rngs=rngs)
        self.last = nnx.Conv(2, 2, (2,) * 2, feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        h = x * 2
        return self.last(self.block(h) + self.shortcut(h))


def test_layers_that_read_the_input_are_left_out_by_default_only(rng):
    model = Shortcut()
    model.eval()
    x = rng.normal(size=(4, 3, 3, 1)).astype(np.float32)
    assert list(forge(model, x).gates) == ["last"]
    assert list(forge(model, x, where=["block*", "shortcut"]).gates) == ["block.layers.0", "shortcut"]
    assert list(forge(model, x, where=lambda path, layer: layer.kernel.shape[0] == 1).gates) == ["shortcut"]


def test_transposed_convolutions_and_linear_general(rng):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.ConvTranspose(1, 2, (3,), rngs=rngs), nnx.LinearGeneral((4, 2), (3,), axis=(1, 2), rngs=rngs)
    )
    forged = forge(model, rng.normal(size=(5, 4, 1)).astype(np.float32), 0.3, where="layers.*")
    assert [site.layer for site in forged.sites] == ["ConvTranspose", "LinearGeneral"]
    assert [site.reads for site in forged.sites] == [((4, 1),), ((4, 2),)]


def test_inner_transformations(rng):
    model = Wrapped(rng)
    x = rng.normal(size=(7, 5)).astype(np.float32)
    first, again = forge(model, x, 0.2, where="*"), forge(model, x, 0.2, where="*")
    assert list(first.gates) == list(again.gates) == ["block.inner", "block.outer", "head"]
    assert first.thresholds == again.thresholds
    h, inputs = x, first.inputs(x)
    assert inputs["block.inner"].shape == (14, 5)
    np.testing.assert_array_equal(inputs["block.inner"][:7], h)
    assert np.abs(first(x) - model(x)).max() > 1e-3


def test_stacked_layers_cannot_be_forged(rng):
    model = Scanned(rng)
    x = rng.normal(size=(4, 5)).astype(np.float32)
    with pytest.raises(
        ValueError,
        match=r"reads the network's input, head \(blocks\.inner cannot be forged: its kernel is stacked",
    ):
        forge(model, x)
    with pytest.raises(ValueError, match=r"'blocks\.inner' matches none of the layers head"):
        forge(model, x, where="blocks.inner")


class Closure(nnx.Module):
    """jax.checkpoint closes over a block, so nothing can be recorded inside."""

    def __init__(self, rng):
        self.block, self.head = Residual(5, nnx.Rngs(0)), nnx.Linear(5, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(jax.checkpoint(lambda h: self.block(h))(x))


class TimeFirst(nnx.Module):
    """`first` reads (time, n, features), `windows` (2 n, time / 2, features)."""

    def __init__(self):
        self.first, self.windows, self.head = (nnx.Linear(6, 6, rngs=nnx.Rngs(k)) for k in range(3))

    def __call__(self, x):
        h = self.first(x.swapaxes(0, 1)).swapaxes(0, 1)
        h = self.windows(h.reshape(2 * len(h), -1, 6)).reshape(h.shape)
        return self.head(h.sum(1))


def test_the_first_axis_is_that_of_the_examples(rng):
    x = rng.normal(size=(5, 4, 6)).astype(np.float32)
    forged = forge(TimeFirst(), x, 0.1, where=["windows", "head"])
    assert forged.sites[0].reads == ((2, 2, 6),)
    np.testing.assert_allclose(
        track(TimeFirst(), x, where="windows").maxima["windows"],
        np.abs(forged.original().first(x)).max((1, 2)),
        rtol=1e-6,
    )
    with pytest.raises(
        ValueError, match=r"first cannot be forged: first reads shape \(4, 3, 6\), whose first axis"
    ):
        forge(TimeFirst(), x, where="first")


def test_a_closed_over_module_is_refused_with_the_reason(rng):
    model, x = Closure(rng), rng.normal(size=(4, 5)).astype(np.float32)
    with pytest.raises(ValueError, match=r"closes over its module: pass the module through nnx\.scan"):
        forge(model, x, where="*")
    assert list(forge(model, x, 0.1, where="head").gates) == ["head"]
