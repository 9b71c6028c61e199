"""What has no Lipschitz bound here is refused, all of it at once, and the message helps.

Every case names the primitives that may be blamed, the shape of the blamed result and a word that the remedy
or the reason must hold. The operation sits inside a jitted function ``culprit``: the call path must show it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax, nn

import lipbounds as lb

Fn = Callable[[jax.Array], Any]
X = jnp.asarray(np.random.default_rng(0).normal(size=12), jnp.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(12, 12)) / 3, jnp.float32)
TABLE = jnp.asarray(np.random.default_rng(2).normal(size=(12, 4)), jnp.float32)


@dataclass(frozen=True)
class Refusal:
    """fn is refused for one of `primitives`, with a result of `shape`; the message holds `word` (a regex)."""

    fn: Fn
    primitives: frozenset[str]
    shape: tuple[int, ...]
    word: str


CASES: dict[str, Refusal] = {}


def refused(primitives: str, shape: tuple[int, ...], word: str = "") -> Callable[[Fn], Fn]:
    """Enter the decorated operation (h of shape (12,) -> anything) as a case, between two dense layers."""

    def enter(operation: Fn) -> Fn:
        @jax.jit
        def culprit(h: jax.Array) -> Any:
            return operation(h)

        def network(x: jax.Array) -> jax.Array:
            h = culprit(nn.relu(W @ x))
            return W[:4, : h.size] @ h.reshape(-1)

        CASES[operation.__name__] = Refusal(network, frozenset(primitives.split()), shape, word)
        return operation

    return enter


# ---------------------------------------------------------- products of two things that depend on x
@refused("dot_general", (3, 3), "product")
def attention_scores(h: jax.Array) -> jax.Array:
    q, k = h.reshape(3, 4), 2.0 * h.reshape(3, 4)
    return (q @ k.T).reshape(-1)


@refused("mul", (6,), "product")
def gated_linear_unit(h: jax.Array) -> jax.Array:
    return nn.glu(h)


@refused("mul", (6,), "product")
def lstm_gate(h: jax.Array) -> jax.Array:
    return nn.sigmoid(h[:6]) * jnp.tanh(h[6:])


@refused("conv_general_dilated", (1, 1, 7), "product")
def convolution_by_its_input(h: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(h[None, None, :9], h[None, None, 9:], (1,), "VALID").reshape(-1)


# -------------------------------------------------------------------- division by x-dependent terms
@refused("div", (12,), "divi|denominator|norm")
def divided_by_its_norm(h: jax.Array) -> jax.Array:
    return h / jnp.sqrt(jnp.sum(h * h) + 1.0)


@refused("exp div", (12,), "softmax|exp")
def softmax(h: jax.Array) -> jax.Array:
    return nn.softmax(h)


@refused("exp log", (2,), "log")
def weighted_log_sum_exp(h: jax.Array) -> jax.Array:
    return nn.logsumexp(h.reshape(2, 6), axis=1, b=jnp.arange(-2.0, 4.0))


@refused("cumlogsumexp", (12,), "prefix")
def running_log_sum_exp(h: jax.Array) -> jax.Array:
    return lax.cumlogsumexp(h)


# ------------------------------------------------------------------------- indices that depend on x
@refused("argmax dynamic_slice gather", (), "index|jump|argmax")
def argmax_index(h: jax.Array) -> jax.Array:
    return TABLE[jnp.argmax(h)]


@refused("sort gather", (12,), "index|sort")
def gather_at_sorted_index(h: jax.Array) -> jax.Array:
    return h[jnp.argsort(h)] * 2.0


@refused("gather dynamic_slice convert_element_type", (), "index|integer")
def table_lookup(h: jax.Array) -> jax.Array:
    return TABLE[jnp.clip(h[0] * 3.0, 0.0, 11.0).astype(jnp.int32)]


@refused("top_k", (3,), "")
def top_k(h: jax.Array) -> jax.Array:
    values, index = lax.top_k(h, 3)
    return values + index.astype(jnp.float32)


# -------------------------------------------------------------------------------------------- jumps
@refused("round", (12,), "jump")
def rounding(h: jax.Array) -> jax.Array:
    return jnp.round(h)


@refused("floor", (12,), "jump")
def flooring(h: jax.Array) -> jax.Array:
    return h - jnp.floor(h)


@refused("ceil", (12,), "jump")
def ceiling(h: jax.Array) -> jax.Array:
    return jnp.ceil(h)


@refused("sign", (12,), "jump")
def sign(h: jax.Array) -> jax.Array:
    return jnp.sign(h)


@refused("select_n", (12,), r"jumps at .*0\.25")
def hard_threshold(h: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(h) <= 0.25, 0.0, h)


@refused("select_n", (12,), "jumps at")
def tiny_hard_threshold(h: jax.Array) -> jax.Array:
    """No grid of points can see this jump: it has to be found by reasoning."""
    return jnp.where(jnp.abs(h) <= 1e-9, 0.0, h)


@refused("select_n", (12,), "jumps at")
def leaky_with_a_step(h: jax.Array) -> jax.Array:
    """Both branches agree at 0, the breakpoint is elsewhere."""
    return jnp.where(h > 1e-6, h, 0.5 * h)


@refused("convert_element_type gt", (12,), "jump|integer|bool")
def binarised(h: jax.Array) -> jax.Array:
    return (h > 0).astype(jnp.float32)


@refused("convert_element_type", (12,), "integer|int")
def quantised(h: jax.Array) -> jax.Array:
    return (8.0 * h).astype(jnp.int32).astype(jnp.float32)


@refused("select_n", (11,), "")
def chosen_by_another_variable(h: jax.Array) -> jax.Array:
    return jnp.where(h[0] > 0, h[1:], 0.0)


@refused("rem floor select_n", (12,), "")
def modulo(h: jax.Array) -> jax.Array:
    return jnp.mod(h, 1.0)


# --------------------------------------------------------------------------------- unbounded slopes
@refused("mul square integer_pow", (12,), "slope|product|unbounded")
def squared(h: jax.Array) -> jax.Array:
    return h * h


@refused("integer_pow mul square", (12,), "slope|unbounded")
def cubed(h: jax.Array) -> jax.Array:
    return h**3


@refused("exp", (12,), "slope|unbounded")
def exponential(h: jax.Array) -> jax.Array:
    return jnp.exp(h)


@refused("sqrt", (12,), "slope|defined|unbounded")
def square_root(h: jax.Array) -> jax.Array:
    return jnp.sqrt(h)


@refused("div", (12,), "slope|defined|unbounded|divi|finite")
def reciprocal(h: jax.Array) -> jax.Array:
    return 1.0 / (h - 2.0)


@refused("cumprod reduce_window mul", (12,), "")
def cumulative_product(h: jax.Array) -> jax.Array:
    return jnp.cumprod(h)


@refused("reduce_prod", (3,), "")
def product(h: jax.Array) -> jax.Array:
    return jnp.prod(h.reshape(3, 4), axis=1)


# ------------------------------------------------------------------------------------------ control
@refused("while", (), "length|scan|iterations|while")
def while_loop(h: jax.Array) -> jax.Array:
    return lax.while_loop(lambda c: jnp.sum(jnp.abs(c)) > 1.0, lambda c: 0.5 * c, h)


@refused("cond", (12,), "")
def condition_on_the_input(h: jax.Array) -> jax.Array:
    return lax.cond(h[0] > 0, lambda h: h, lambda h: 2.0 * h, h)


# ------------------------------------------------------------------------------- unknown primitives
@refused("svd", (3,), "")
def singular_values(h: jax.Array) -> jax.Array:
    return jnp.linalg.svd(h.reshape(3, 4), compute_uv=False)


@refused("fft real", (12,), "")
def fourier(h: jax.Array) -> jax.Array:
    return jnp.fft.fft(h).real


@refused("lgamma", (12,), "")
def log_gamma(h: jax.Array) -> jax.Array:
    return lax.lgamma(h + 3.0)


@refused("pure_callback", (12,), "")
def host_callback(h: jax.Array) -> jax.Array:
    return jax.pure_callback(lambda a: np.asarray(a), jax.ShapeDtypeStruct(h.shape, h.dtype), h)


# ----------------------------------------------------------------------------------- the assertions
def check_message(error: lb.UnsupportedError) -> None:
    """Every item is complete, and everything in it can be read in the message."""
    text = str(error)
    squeezed = text.replace(" ", "")
    assert error.items
    for item in error.items:
        assert item.primitive and item.primitive in text
        assert item.path in text
        assert isinstance(item.shape, tuple) and str(item.shape).replace(" ", "") in squeezed
        assert len(item.reason.split()) >= 2 and item.reason in text
        assert len(item.remedy.split()) >= 3 and item.remedy in text
    assert "Traceback" not in text and "jax._src" not in text


@pytest.mark.parametrize("name", sorted(CASES))
def test_refused(name: str) -> None:
    case = CASES[name]
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(case.fn, X)
    check_message(caught.value)
    blamed = [item for item in caught.value.items if item.primitive in case.primitives]
    assert blamed, f"blames {[i.primitive for i in caught.value.items]}, not {sorted(case.primitives)}"
    assert any("culprit" in item.path for item in blamed), [item.path for item in blamed]
    shapes = [item.shape for item in blamed]
    if case.shape not in [(), (12,)]:
        assert case.shape in shapes, f"{case.shape} is not among the shapes {shapes}"
    text = " ".join(f"{item.reason} {item.remedy}" for item in caught.value.items)
    assert re.search(case.word, text, re.IGNORECASE), f"{case.word!r} is not in: {text}"


# ------------------------------------------------------------------------------------- flax modules
class Wrapped(nnx.Module):
    """A dense layer, then the layer under test under the attribute name `inner`."""

    def __init__(self, inner: nnx.Module) -> None:
        self.first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.inner = inner

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(nn.relu(self.first(x)))  # type: ignore[operator,unused-ignore]


@pytest.mark.parametrize("layer", [nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm])
def test_normalisation_by_the_input_is_refused(layer: Callable[..., nnx.Module]) -> None:
    grouped = {"num_groups": 2} if layer is nnx.GroupNorm else {}
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(Wrapped(layer(8, **grouped, rngs=nnx.Rngs(0))), jnp.ones((4, 8)), batched=True)
    primitives = {"mul", "square", "integer_pow", "rsqrt", "div"}
    check_message(caught.value)
    assert primitives & {item.primitive for item in caught.value.items}
    assert any((8,) == item.shape or item.shape == () or 8 in item.shape for item in caught.value.items)
    text = str(caught.value)
    assert re.search("LayerNorm|normali[sz]|BatchNorm|divi", text), "no remedy for normalisation layers"


def test_self_attention_is_refused() -> None:
    layer = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(lambda x: layer(x.reshape(3, 8)).reshape(-1), jnp.ones(24))
    check_message(caught.value)
    (item,) = caught.value.items
    assert item.primitive == "dot_general" and "attention" in item.reason


def test_lstm_cell_is_refused() -> None:
    cell = linen.LSTMCell(features=4)
    carry = cell.initialize_carry(jax.random.key(0), (8,))
    variables = cell.init(jax.random.key(0), carry, jnp.ones(8))

    def fn(x: jax.Array) -> Any:
        return cell.apply(variables, carry, x)[1]  # type: ignore[index,unused-ignore]

    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(fn, jnp.ones(8))
    check_message(caught.value)
    assert "mul" in {item.primitive for item in caught.value.items}


@pytest.mark.parametrize("batched", [False, True])
def test_batch_norm_in_training_mode_is_refused(batched: bool) -> None:
    model = Wrapped(nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    model.train()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(model, jnp.ones((4, 8)) if batched else jnp.ones(8), batched=batched)
    check_message(caught.value)
    assert re.search(r"eval\(\)", str(caught.value)), "the remedy is model.eval() on a copy"
    after = nnx.state(model, nnx.BatchStat)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), before, after)), (
        "the module changed"
    )


def test_dropout_in_training_mode_is_refused() -> None:
    model = Wrapped(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    model.train()
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(model, jnp.ones(8))
    check_message(caught.value)
    assert re.search(r"eval\(\)", str(caught.value))
    model.eval()
    assert lb.trace(model, jnp.ones(8)).num_outputs == 8, "the remedy works"


def test_linen_training_mode_is_refused() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.BatchNorm(use_running_average=False)(linen.Dense(5)(x))

    model = Net()
    variables = model.init(jax.random.key(0), jnp.ones((4, 8)))
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(
            lambda x: model.apply(variables, x, mutable=["batch_stats"])[0], jnp.ones((4, 8)), batched=True
        )
    check_message(caught.value)


# ------------------------------------------------------------------------------- everything at once
def test_everything_unsupported_is_listed_at_once() -> None:
    @jax.jit
    def first(h: jax.Array) -> jax.Array:
        return jnp.round(h)

    @jax.jit
    def second(h: jax.Array) -> jax.Array:
        return h[:6] * jnp.tanh(h[6:])

    @jax.jit
    def third(h: jax.Array) -> jax.Array:
        return jnp.linalg.svd(h.reshape(2, 3), compute_uv=False)

    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(lambda x: W[:4, :2] @ third(second(first(W @ x))), X)
    check_message(caught.value)
    where = {item.primitive: item.path for item in caught.value.items}
    assert {"round", "mul", "svd"} <= set(where)
    assert "first" in where["round"] and "second" in where["mul"] and "third" in where["svd"]


def test_nested_call_path_is_shown() -> None:
    @jax.jit
    def inner(h: jax.Array) -> jax.Array:
        return jnp.round(h)

    @jax.jit
    def outer(h: jax.Array) -> jax.Array:
        return jax.checkpoint(inner)(h)

    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(lambda x: W @ outer(x), X)
    (item,) = caught.value.items
    assert item.path.index("outer") < item.path.index("inner") and item.shape == (12,)


def test_refused_inside_a_scan() -> None:
    def step(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.round(w @ h), None

    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(lambda x: lax.scan(step, x, jnp.stack([W, W, W]))[0], X)
    check_message(caught.value)
    assert all("scan" in item.path for item in caught.value.items if item.primitive == "round")
    assert "round" in {item.primitive for item in caught.value.items}


# ----------------------------------------------------------------------- inputs that are not floats
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "uint8"])
def test_inputs_that_are_not_real_are_refused(dtype: str) -> None:
    for x in (jnp.ones(12, dtype), jax.ShapeDtypeStruct((12,), jnp.dtype(dtype))):
        with pytest.raises(lb.UnsupportedError, match=dtype) as caught:
            lb.trace(lambda x: 2 * x, x)
        assert "float" in str(caught.value)


# ------------------------------------------------------------------------- not finite, not provable
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.log(x),
        lambda x: W @ x + jnp.log(jnp.float32(-1.0)),
        lambda x: W @ x / jnp.float32(0.0),
        lambda x: jnp.arcsin(x),
    ],
    ids=["log", "nan_bias", "infinite_weights", "arcsin"],
)
def test_functions_that_are_not_finite_are_refused(fn: Fn) -> None:
    with pytest.raises(ValueError) as caught:
        lb.trace(fn, X)
    assert re.search("finite|NaN|nan|inf|defined", str(caught.value)), str(caught.value)


def test_a_dead_unsupported_operation_does_not_matter() -> None:
    """What cannot reach the output is not part of the function; and constants may be computed in any way."""

    def fn(x: jax.Array) -> jax.Array:
        _ = jnp.round(x)
        scale = jnp.exp(jnp.linalg.svd(W, compute_uv=False)[0]) * jnp.argmax(W).astype(jnp.float32)
        return nn.relu(W @ x) * jax.nn.softmax(W[0] * scale)

    assert lb.trace(fn, X).num_outputs == 12


def test_the_remedy_for_softmax_is_to_leave_it_out() -> None:
    """Logits are what is certified: the same net without its last softmax is accepted."""
    with pytest.raises(lb.UnsupportedError) as caught:
        lb.trace(lambda x: nn.softmax(W @ x), X)
    check_message(caught.value)
    assert re.search("softmax", str(caught.value))
    assert lb.trace(lambda x: W @ x, X).num_outputs == 12


# ---------------------------------------------------------------- outputs that are not one array
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x: {"aux": x, "logits": x}, r"a dict with \['aux'\], \['logits'\].*fn\(x\)\['logits'\]"),
        (lambda x: {"logits": x}, r"a dict with \['logits'\].*fn\(x\)\['logits'\]"),
        (lambda x: (x, {"a": x}), r"a tuple with \[0\], \[1\]\['a'\].*fn\(x\)\[0\]"),
        (lambda x: None, "it returned None"),
        (lambda x: "logits", "it returned a string"),
    ],
    ids=["dict", "dict of one", "tuple", "None", "string"],
)
def test_an_output_that_is_not_one_array_is_named(fn: Fn, words: str, batched: bool) -> None:
    """A dict of one array used to end in a TypeError about float()."""
    with pytest.raises(ValueError, match=r"must return one array of shape \(K,\)") as caught:
        lb.trace(fn, jnp.ones((2, 3)) if batched else jnp.ones(3), batched=batched)
    assert re.search(words, str(caught.value)), str(caught.value)
