"""`lb.register_activation`: slopes that the user declares, used and said to be assumed, never looked for further.

Every function here has its own constants: the register is global to the process, and other tests must not see these.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo_core import gauss

import lipbounds as lb
from lipbounds._activations import activations
from lipbounds._local.forward import logits


def digamma_like(shift: float) -> Any:
    """A smooth function with bounded slopes that cannot be proved here (lgamma); a new one for every shift."""
    return lambda h: jax.lax.lgamma(jnp.tanh(h) + shift)


def one_layer(activation: Any, n: int = 5) -> Any:
    return lb.trace(lambda x: activation(x), jnp.ones(n))


def test_unknown_until_registered() -> None:
    fn = digamma_like(2.125)
    with pytest.raises(lb.UnsupportedError, match="register_activation"):
        one_layer(fn)
    lb.register_activation(fn, slopes=(-3.0, 3.0))
    form = one_layer(fn)
    assert form.assumed and form.taps[0].assumed and "assumed" in repr(form)
    assert lb.liplt(form).value == pytest.approx(3.0, rel=1e-12)


def test_the_declared_slopes_are_used_as_they_are(rng: np.random.Generator) -> None:
    """The bound is that of the same network with slopes in [a, b], by the same recursion."""
    fn, (w0, w1) = digamma_like(2.25), (gauss(rng, 7, 4), gauss(rng, 3, 7))
    lb.register_activation(fn, slopes=(-0.5, 2.0))
    form = lb.trace(lambda x: w1 @ fn(w0 @ x), jnp.ones(4))
    known = lb.from_weights([np.asarray(w0), np.asarray(w1)], slopes=[(-0.5, 2.0)])
    for verb in (lb.naive, lb.liplt):
        mine, other = verb(form, pairwise=True), verb(known, pairwise=True)
        assert mine.value == pytest.approx(other.value, rel=1e-12)
        assert mine.pairwise == pytest.approx(other.pairwise, rel=1e-12)
        assert (mine.guarantee, other.guarantee) == ("assumed", "verified")


def test_the_word_reaches_radii_and_every_method(rng: np.random.Generator) -> None:
    fn, (w0, w1) = digamma_like(2.375), (gauss(rng, 7, 4), gauss(rng, 3, 7))
    lb.register_activation(fn, slopes=(-3.0, 3.0))
    form = lb.trace(lambda x: w1 @ fn(jnp.flip(jnp.tanh(w0 @ x))), jnp.ones(4))
    assert [tap.assumed for tap in form.taps] == [False, True]
    for bound in (
        lb.naive(form),
        lb.naive(form, norm=1),
        lb.liplt(form, norm=math.inf),
        lb.liplt(form, scaling="optimized"),
        lb.liplt(form, guarantee="probabilistic"),
        lb.liplt(form, guarantee="verified", pairwise=True),
    ):
        assert bound.guarantee == "assumed"
    assert lb.liplt(form, guarantee="estimate").guarantee == "estimate"
    radii = lb.certified_radius(form, np.ones((2, 4), np.float32), np.array([0, 1]))
    assert radii.guarantee == "assumed" and "assumed" in repr(radii)
    assert any("float64, assumed accurate to 1e-09" in note for note in radii.notes), (
        "lgamma has no interval rule"
    )
    z, error = logits(form, np.ones((2, 4)))
    with jax.enable_x64(True):
        exact = np.asarray(form.evaluate(jnp.ones(4), jnp.float64))
    assert np.allclose(z, exact, rtol=1e-12) and (1e-10 < error).all() and (error < 1e-7).all()


def test_a_network_without_it_is_verified(rng: np.random.Generator) -> None:
    lb.register_activation(digamma_like(2.5), slopes=(-3.0, 3.0))
    w = gauss(rng, 3, 4)
    form = lb.trace(lambda x: w @ jax.nn.relu(x), jnp.ones(4))
    assert not form.assumed and lb.liplt(form).guarantee == "verified"


def test_without_its_declaration_a_form_has_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that reads a pickled form; a lower bound of 0 was returned there."""
    fn = digamma_like(2.5625)
    lb.register_activation(fn, slopes=(-3.0, 3.0))
    form = one_layer(fn)
    monkeypatch.setattr(activations, "_REGISTERED", {})
    for verb in (lb.liplt, lambda form: lb.empirical(form, steps=0)):
        with pytest.raises(ValueError, match="in another process: declare them here, too"):
            verb(form)


def test_recognised_wherever_it_is_traced(rng: np.random.Generator) -> None:
    """Other shapes and dtypes, another function of the same structure, inside jit, vmap, remat and scan."""
    lb.register_activation(digamma_like(2.625), slopes=(-3.0, 3.0))
    fn, w = digamma_like(2.625), gauss(rng, 4, 4)
    uses = {
        "matrix": lambda x: fn(jnp.outer(x, jnp.ones(3))).ravel(),
        "jit": jax.jit(fn),
        "remat": jax.checkpoint(fn),
        "vmap": lambda x: jax.vmap(fn)(x.reshape(2, 2)).ravel(),
        "scan": lambda x: jax.lax.scan(lambda h, _: (fn(w @ h), None), x, None, length=2)[0],
        "half": lambda x: fn(x.astype(jnp.bfloat16)),
        "bigger": lambda x: 2.0 * fn(3.0 * x) - x,
    }
    for name, use in uses.items():
        form = lb.trace(use, jnp.ones(4))
        assert form.assumed, name
        assert len(form.taps) == (2 if name == "scan" else 1), name


def test_not_recognised_with_other_constants() -> None:
    lb.register_activation(digamma_like(2.75), slopes=(-3.0, 3.0))
    with pytest.raises(lb.UnsupportedError):
        one_layer(digamma_like(2.75 + 2**-20))
    with pytest.raises(lb.UnsupportedError):
        one_layer(lambda h: jax.lax.lgamma(2.75 + 2 * jnp.abs(h)))


def test_a_jump_may_be_declared_and_is_then_the_users_word() -> None:
    """The library cannot prove it, and says so: the declaration is not checked against the function."""

    def jump(h: jax.Array) -> jax.Array:
        return jnp.where(h > 0.40625, h, 0.0)

    with pytest.raises(lb.UnsupportedError):
        one_layer(jump)
    lb.register_activation(jump, slopes=(0.0, 1.0))
    assert lb.liplt(one_layer(jump)).guarantee == "assumed"


def test_the_last_declaration_counts() -> None:
    fn = digamma_like(2.875)
    lb.register_activation(fn, slopes=(-3.0, 3.0))
    lb.register_activation(fn, slopes=(-4.0, 4.0))
    assert lb.liplt(one_layer(fn)).value == pytest.approx(4.0, rel=1e-12)


def test_a_declared_function_may_end_with_a_linear_operation(rng: np.random.Generator) -> None:
    """Its last operation is linear in the network, too, but the slopes are those of the whole."""
    inner = digamma_like(2.9375)
    for name, fn in {
        "scaled": lambda h: 2.0 * inner(h),
        "shifted": lambda h: inner(h) - 0.5,
        "residual": lambda h: h + inner(h),
        "negative": lambda h: -inner(h),
    }.items():
        w = gauss(rng, 3, 4)
        with pytest.raises(lb.UnsupportedError):
            lb.trace(lambda x, fn=fn, w=w: 2.0 * fn(w @ x), jnp.ones(4))
        lb.register_activation(fn, slopes=(-3.0, 3.0))
        form = lb.trace(lambda x, fn=fn, w=w: 2.0 * fn(w @ x), jnp.ones(4))
        assert form.assumed and len(form.taps) == 1, name
        assert lb.naive(form).value == pytest.approx(6.0 * np.linalg.norm(w, 2), rel=1e-6), name


def test_bounds_of_other_declared_slopes_are_of_another_network() -> None:
    fn = digamma_like(2.96875)
    lb.register_activation(fn, slopes=(-3.0, 3.0))
    bound = lb.liplt(one_layer(fn))
    lb.register_activation(fn, slopes=(-4.0, 4.0))
    with pytest.raises(ValueError, match="another network"):
        lb.certified_radius(one_layer(fn), np.ones((1, 5), np.float32), [0], bound=bound)


def test_returns_the_function_so_that_it_decorates() -> None:
    @functools.partial(lb.register_activation, slopes=(-3.0, 3.0))
    def wobble(h: jax.Array) -> jax.Array:
        return jax.lax.lgamma(jnp.abs(h) + 3.125)

    assert float(wobble(jnp.float32(0.0))) == pytest.approx(math.lgamma(3.125), rel=1e-5)
    assert one_layer(wobble).assumed


def test_traces_of_declared_functions_are_one_architecture() -> None:
    fn = digamma_like(3.25)
    lb.register_activation(fn, slopes=(-3.0, 3.0))
    assert one_layer(fn).program == one_layer(digamma_like(3.25)).program


@pytest.mark.parametrize(
    "slopes", [(1.0, 0.0), (0.0, math.inf), (-math.inf, 1.0), (math.nan, 1.0), (0.0, math.nan)]
)
def test_slopes_that_are_no_interval(slopes: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="two finite numbers \\(a, b\\) with a <= b"):
        lb.register_activation(digamma_like(3.375), slopes=slopes)
    with pytest.raises(lb.UnsupportedError):
        one_layer(digamma_like(3.375))


@pytest.mark.parametrize("slopes", [(1.0,), (0.0, 1.0, 2.0), "ab", None, 1.0])
def test_slopes_of_the_wrong_form(slopes: Any) -> None:
    with pytest.raises(ValueError, match="two finite numbers"):
        lb.register_activation(digamma_like(3.5), slopes=slopes)


@pytest.mark.parametrize("fn", [None, 3.0, "relu"])
def test_not_a_function(fn: Any) -> None:
    with pytest.raises(TypeError, match="register_activation needs a function"):
        lb.register_activation(fn, slopes=(0.0, 1.0))


@pytest.mark.parametrize(
    "fn",
    [
        lambda h: jnp.cumsum(h),
        lambda h: h[::-1],
        lambda h: jnp.sort(h),
        lambda h: h[:2],
        lambda h: h / jnp.sum(h),
        lambda h: jnp.max(h),
        lambda h: (h, h),
        lambda h: jnp.ones(3),
        lambda h: h > 0.0,
        lambda h: h @ jnp.ones((3, 3), h.dtype),
        lambda h: (h > 0.0).astype(jnp.int32),
        lambda h: h if h[0] > 0 else -h,
        lambda h: "relu",
        lambda h: h * jnp.arange(8.0),
    ],
    ids="cumsum reverse sort slice normalise max tuple constant boolean matrix integer python text sizes".split(),
)
def test_functions_that_are_not_elementwise(fn: Any) -> None:
    with pytest.raises(ValueError, match="elementwise function of one tensor"):
        lb.register_activation(fn, slopes=(0.0, 1.0))


def test_functions_for_one_dtype_alone() -> None:
    """`lax` does not promote: in the other dtypes the function raises, and has nothing to declare."""

    def strict(h: jax.Array) -> jax.Array:
        return jax.lax.lgamma(jax.lax.add(jnp.tanh(h), jnp.full(h.shape, 3.6875, jnp.float32)))

    lb.register_activation(strict, slopes=(-3.0, 3.0))
    assert one_layer(strict).assumed


@pytest.mark.parametrize(
    "fn",
    [
        lambda h: -jax.lax.lgamma(jnp.tanh(3.0 * h - 1.0) + 3.75),
        lambda h: jnp.full(h.shape, 2.0, h.dtype) * jax.lax.lgamma(jnp.tanh(h) + 3.75),
    ],
    ids=["affine_inside", "array"],
)
def test_functions_that_begin_linearly_or_hold_arrays(fn: Any, rng: np.random.Generator) -> None:
    """They are recognised inside jit, too, where arrays of constants are made anew."""
    w0, w1 = gauss(rng, 5, 4), gauss(rng, 3, 5)
    lb.register_activation(fn, slopes=(-3.0, 3.0))
    for form in (one_layer(fn), one_layer(jax.jit(fn))):
        assert [tap.assumed for tap in form.taps] == [True]
        assert lb.liplt(form).value == pytest.approx(3.0, rel=1e-12)
    form = jax.jit(lambda w: lb.trace(lambda x: w1 @ fn(w @ x), jnp.ones(4)))(w0)
    assert form.assumed and lb.naive(form).value == pytest.approx(
        3.0 * np.linalg.norm(w0, 2) * np.linalg.norm(w1, 2), rel=1e-5
    )


def test_a_linear_function_needs_no_declaration() -> None:
    """It would be every multiplication by that number."""
    lb.register_activation(lambda h: 2.015625 * h, slopes=(0.0, 1.0))
    form = one_layer(lambda h: 2.015625 * h)
    assert not form.assumed and lb.liplt(form).value == pytest.approx(2.015625, rel=1e-12)
