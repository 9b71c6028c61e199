"""Every linear step as a matrix against the Jacobian of the user's function.

Weights are small integers here: float64 Jacobians of the function are then exact, and so must the matrices be.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gain import dense, lowered
from jax import lax

import lipbounds as lb
from lipbounds._form.lure import LureForm
from lipbounds._form.program import Op
from lipbounds._form.steps import KINDS
from lipbounds._gain import blocks
from lipbounds._gain.blocks import HostForm
from lipbounds._norms.enclosures import Enclosure

Case = tuple[Callable[[Any], Any], tuple[int, ...], set[str]]
CASES: dict[str, Case] = {}


def case(shape: tuple[int, ...], *kinds: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Enter a linear function of one tensor of this shape, which must make steps of these kinds."""

    def enter(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CASES[fn.__name__] = (fn, shape, set(kinds))
        return fn

    return enter


def whole(x: Any, *shape: int) -> jax.Array:
    """Integers from -4 to 4 without zero, different for different shapes, in the dtype of x."""
    values = np.random.default_rng([len(shape), *shape]).integers(1, 5, shape)
    return jnp.asarray(values * (-1) ** np.arange(values.size).reshape(shape), x.dtype)


# ------------------------------------------------------------------------------------------ convolutions
# (image, kernel, strides, padding, lhs dilation, rhs dilation, dimension numbers, groups, batch groups)
CONVS: dict[str, tuple[Any, ...]] = {
    "1d": ((1, 2, 7), (3, 2, 3), (1,), "VALID", None, None, None, 1, 1),
    "1d_strided_same": ((1, 2, 8), (3, 2, 4), (3,), "SAME", None, None, ("NCH", "OIH", "NCH"), 1, 1),
    "asymmetric_padding": (
        (1, 2, 5, 4), (3, 2, 2, 3), (1, 2), ((0, 3), (2, 1)), None, None, None, 1, 1
    ),
    "negative_padding": ((1, 2, 6, 7), (2, 2, 3, 2), (2, 1), ((-1, 2), (1, -2)), None, None, None, 1, 1),
    "only_negative": ((1, 1, 7, 7), (2, 1, 2, 2), (1, 1), ((-2, -1), (-1, -2)), None, None, None, 1, 1),
    "lhs_dilation": ((1, 2, 4, 3), (3, 2, 3, 3), (1, 1), ((2, 1), (1, 3)), (2, 3), None, None, 1, 1),
    "lhs_dilation_negative_padding": (
        (1, 1, 4, 4), (2, 1, 2, 2), (1, 2), ((-1, 0), (0, -2)), (3, 2), None, None, 1, 1
    ),
    "rhs_dilation": ((1, 2, 8, 7), (2, 2, 3, 2), (2, 1), ((1, 1), (0, 2)), None, (2, 3), None, 1, 1),
    "both_dilations": ((1, 2, 5, 4), (2, 2, 2, 3), (2, 3), ((3, 1), (2, 4)), (3, 2), (2, 2), None, 1, 1),
    "groups": ((1, 6, 4, 4), (4, 3, 3, 2), (1, 1), "SAME", None, None, None, 2, 1),
    "depthwise": ((1, 3, 5, 4), (6, 1, 3, 3), (2, 1), ((1, 0), (0, 1)), None, None, None, 3, 1),
    "groups_and_dilation": (
        (1, 4, 5, 5), (6, 2, 2, 2), (1, 2), ((1, 1), (1, 0)), (1, 2), (3, 1), None, 2, 1
    ),
    "batch_of_two": ((2, 2, 4, 4), (3, 2, 2, 2), (1, 1), "VALID", None, None, None, 1, 1),
    "batch_groups": ((4, 2, 4, 5), (6, 2, 3, 2), (1, 1), ((1, 1), (0, 0)), None, None, None, 1, 2),
    "channels_last": (
        (1, 5, 4, 2), (3, 2, 2, 3), (2, 1), ((1, 2), (0, 1)), None, None, ("NHWC", "HWIO", "NHWC"), 1, 1
    ),
    "strange_numbers": (
        (4, 2, 1, 5), (2, 3, 3, 2), (1, 2), ((1, 0), (0, 1)), None, (1, 2), ("WCNH", "IHOW", "HNCW"), 1, 1
    ),
    "strange_numbers_grouped": (
        (5, 1, 4, 4), (2, 3, 6, 2), (1, 1), ((1, 1), (2, 0)), (1, 2), None, ("HNCW", "IWOH", "CWHN"), 2, 1
    ),
    "no_space": ((2, 3), (4, 3), (), (), None, None, ("NC", "OI", "NC"), 1, 1),
    "3d": ((1, 1, 3, 4, 3), (2, 1, 2, 2, 2), (1, 2, 1), "SAME", None, None, None, 1, 1),
}  # fmt: skip


def convolution(setting: tuple[Any, ...], image: Any, kernel: Any) -> Any:
    _, _, strides, padding, lhs, rhs, numbers, groups, batch_groups = setting
    if numbers is not None:
        numbers = lax.conv_dimension_numbers(image.shape, kernel.shape, numbers)
    return lax.conv_general_dilated(
        image, kernel, strides, padding, lhs, rhs, numbers, groups, batch_groups, precision="highest"
    )


for _name, _setting in CONVS.items():
    CASES[f"conv_{_name}"] = (
        lambda x, s=_setting: convolution(s, x, whole(x, *s[1])),
        _setting[0],
        {"conv"},
    )
for _name in (
    "1d_strided_same",
    "negative_padding",
    "both_dilations",
    "groups",
    "batch_groups",
    "strange_numbers",
):
    CASES[f"conv_kernel_{_name}"] = (
        lambda x, s=CONVS[_name]: convolution(s, whole(x, *s[0]), x),
        CONVS[_name][1],
        {"conv"},
    )


@case((1, 3, 4, 2), "conv")
def conv_transposed(x: Any) -> Any:
    return lax.conv_transpose(
        x, whole(x, 3, 2, 4, 2), (2, 3), "SAME", transpose_kernel=True, precision="highest"
    )


# -------------------------------------------------------------------------------------------- dot_general
# (shape of x, shape of the other, (contracting, batch)); x first or second
DOTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any, bool]] = {
    "matrix_vector": ((5,), (4, 5), (((1,), (0,)), ((), ())), False),
    "vector_matrix": ((5,), (5, 4), (((0,), (0,)), ((), ())), True),
    "outer_product": ((3,), (4,), (((), ()), ((), ())), True),
    "outer_product_second": ((3,), (4,), (((), ()), ((), ())), False),
    "inner_product": ((6,), (6,), (((0,), (0,)), ((), ())), True),
    "matrices": ((3, 4), (4, 5), (((1,), (0,)), ((), ())), True),
    "matrices_second": ((4, 5), (3, 4), (((1,), (0,)), ((), ())), False),
    "batched": ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,))), True),
    "batched_second": ((2, 4, 5), (2, 3, 4), (((2,), (1,)), ((0,), (0,))), False),
    "batch_inside": ((3, 2, 4), (4, 5, 2), (((2,), (0,)), ((1,), (2,))), True),
    "batch_inside_second": ((3, 2, 4), (4, 5, 2), (((0,), (2,)), ((2,), (1,))), False),
    "two_batch_dims": ((2, 3, 4, 2), (3, 5, 2, 4), (((2,), (3,)), ((1, 0), (0, 2))), True),
    "two_batch_dims_second": ((2, 3, 4, 2), (3, 5, 2, 4), (((3,), (2,)), ((0, 2), (1, 0))), False),
    "two_contractions": ((2, 3, 4), (4, 5, 2), (((2, 0), (0, 2)), ((), ())), True),
    "two_contractions_second": ((2, 3, 4), (4, 5, 2), (((0, 2), (2, 0)), ((), ())), False),
}
for _name, (_mine, _other, _numbers, _first) in DOTS.items():
    CASES[f"dot_{_name}"] = (
        lambda x, o=_other, n=_numbers, f=_first: lax.dot_general(
            *((x, whole(x, *o)) if f else (whole(x, *o), x)), n, precision="highest"
        ),
        _mine,
        {"dot_general"},
    )


# -------------------------------------------------------------------------------------------- arithmetic
@case((3, 4), "add", "sub", "neg")
def sums_of_one_tensor(x: Any) -> Any:
    return (x + x) - (-x) + (x[:, :1] - x)  # the last one broadcasts


@case((3, 1), "add")
def broadcasting_add(x: Any) -> Any:
    return lax.add(jnp.broadcast_to(x, (3, 3)), whole(x, 3, 3)) + jnp.transpose(x)


@case((2, 3), "sub")
def constant_minus_x(x: Any) -> Any:
    return whole(x, 2, 3) - x


@case((1, 3), "mul")
def mul_by_a_larger_constant(x: Any) -> Any:
    return whole(x, 4, 1) * x


@case((4, 3), "mul", "div")
def mul_and_div_by_vectors(x: Any) -> Any:
    return whole(x, 3) * x / jnp.asarray(np.array([[1.0], [2.0], [-4.0], [0.5]]), x.dtype)


@case((3, 4), "mul")
def masked(x: Any) -> Any:
    return x * jnp.asarray(np.tril(np.ones((3, 4))), x.dtype)


@case((3, 2, 4), "reduce_sum")
def sum_over_middle(x: Any) -> Any:
    return jnp.sum(x, axis=1)


@case((3, 2, 4), "reduce_sum")
def sum_over_two(x: Any) -> Any:
    return jnp.sum(x, axis=(2, 0))


@case((3, 2, 4), "reduce_sum", "div")
def mean_of_all(x: Any) -> Any:
    return jnp.mean(x[..., :2], axis=(0, 2), keepdims=True) * 6


@case((3, 5), "cumsum")
def cumulative(x: Any) -> Any:
    return lax.cumsum(x, axis=1)


@case((3, 5, 2), "cumsum")
def cumulative_reversed(x: Any) -> Any:
    return lax.cumsum(x, axis=1, reverse=True) + lax.cumsum(x, axis=0)


# ---------------------------------------------------------------------------------------- sums in windows
WINDOWS = {
    "plain": ((6, 5), (2, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1)),
    "padded": ((5, 4), (3, 2), (2, 1), ((1, 2), (0, 3)), (1, 1), (1, 1)),
    "dilated_window": ((7, 6), (2, 3), (1, 2), ((1, 0), (0, 2)), (1, 1), (3, 2)),
    "dilated_base": ((4, 3), (2, 3), (1, 2), ((1, 1), (2, 0)), (3, 2), (1, 1)),
    "both": ((4, 3), (3, 2), (1, 2), ((1, 4), (0, 3)), (2, 3), (2, 4)),
    "negative_padding": ((7, 6), (2, 2), (1, 1), ((-1, 1), (1, -2)), (1, 1), (1, 1)),
    "window_of_padding_only": ((3, 3), (2, 2), (2, 2), ((3, 0), (0, 0)), (1, 1), (1, 1)),
}


def window_sum(setting: Any, x: Any) -> Any:
    _, size, strides, padding, base, window = setting
    return lax.reduce_window(x, np.zeros((), x.dtype), lax.add, size, strides, padding, base, window)


for _name, _window in WINDOWS.items():
    CASES[f"window_{_name}"] = (lambda x, s=_window: window_sum(s, x), _window[0], {"reduce_window_sum"})


# ------------------------------------------------------------------------------------ scatter and gather
@case((4,), "scatter_add")
def scatter_add_duplicates(x: Any) -> Any:
    return x.at[jnp.array([1, 1, 3, 1])].add(2 * x)


@case((5,), "scatter_add")
def scatter_add_dropped(x: Any) -> Any:
    return x.at[jnp.array([7, 0, -9, 0, 4])].add(x, mode="drop")


@case((3, 4), "scatter_add")
def scatter_add_rows_to_a_constant(x: Any) -> Any:
    return whole(x, 2, 4).at[jnp.array([1, 0, 1])].add(x)


@case((3, 4), "scatter_add")
def scatter_add_constants(x: Any) -> Any:
    return x.at[jnp.array([2, 2])].add(whole(x, 2, 4))


@case((6,), "scatter_add")
def scatter_add_clipped(x: Any) -> Any:
    numbers = lax.ScatterDimensionNumbers((1,), (), (0,))
    index = jnp.array([[-3], [9], [2]])
    return lax.scatter_add(whole(x, 6), index, jnp.reshape(x, (3, 2)), numbers, mode="clip")


@case((4, 3), "take")
def scatter_set(x: Any) -> Any:
    return x.at[1:3, jnp.array([2, 0])].set(x[:2, :2]).at[3].set(jnp.ones((), x.dtype))


@case((6,), "take")
def gather_with_duplicates(x: Any) -> Any:
    return x[jnp.array([5, 0, 5, -1, 2])]


@case((6,), "take")
def gather_clipped(x: Any) -> Any:
    return x.at[jnp.array([4, 17, -20])].get(mode="clip")


@case((4, 5), "take")
def gather_blocks(x: Any) -> Any:
    numbers = lax.GatherDimensionNumbers((1, 2), (), (0, 1))
    starts = jnp.array([[0, 1], [3, 4], [-2, 2]])
    return lax.gather(x, starts, numbers, (2, 3), mode="clip")


@case((4, 5), "take")
def take_along_axis(x: Any) -> Any:
    return jnp.take_along_axis(x, jnp.asarray(np.arange(8).reshape(4, 2) % 5), axis=1, mode="clip")


@case((5, 4), "slice")
def dynamic_slices(x: Any) -> Any:
    return lax.dynamic_slice(x, (4, 1), (3, 2)) + lax.dynamic_slice(x, (-1, -9), (3, 2))


@case((3, 2), "take")
def dynamic_update(x: Any) -> Any:
    return lax.dynamic_update_slice(whole(x, 4, 3), x, (2, 1))


@case((3, 4), "take")
def select_between_x_and_constant(x: Any) -> Any:
    mask = jnp.asarray(np.arange(12).reshape(3, 4) % 3 == 0)
    return jnp.where(mask, x, whole(x, 3, 4)) + jnp.where(mask, x[::-1], x)


# ------------------------------------------------------------------------------------------------- shapes
@case((2, 3, 4), "reshape", "transpose")
def reshape_and_transpose(x: Any) -> Any:
    return jnp.transpose(x, (2, 0, 1)).reshape(4, 6)


@case((3, 1, 2), "broadcast_in_dim", "reshape")
def broadcasts(x: Any) -> Any:
    return lax.broadcast_in_dim(jnp.squeeze(x, 1), (4, 3, 5, 2), (1, 3))


@case((2, 3), "tile")
def tiled(x: Any) -> Any:
    return lax.tile(x, (2, 3)) if hasattr(lax, "tile") else jnp.tile(x, (2, 3))


@case((3, 4), "rev")
def reversed_(x: Any) -> Any:
    return lax.rev(x, (0, 1))


@case((7, 6), "slice")
def strided_slices(x: Any) -> Any:
    return lax.slice(x, (1, 0), (7, 5), (2, 3))


@case((4, 3), "pad")
def pad_negative_and_interior(x: Any) -> Any:
    return lax.pad(x, jnp.asarray(2, x.dtype), ((-1, 3, 1), (2, -1, 2)))


@case((), "pad")
def pad_with_x_itself(x: Any) -> Any:
    return lax.pad(whole(x, 2, 2), x, ((1, 0, 1), (0, 2, 0)))


@case((3, 2), "concatenate", "slice")
def concatenated(x: Any) -> Any:
    return jnp.concatenate([x, whole(x, 1, 2), x[1:], x], axis=0)


@case((3, 2), "concatenate")  # tensors without entries are constants when a program is lowered
def empty_pieces(x: Any) -> Any:
    return jnp.concatenate([x[3:], x, x[:0]], axis=0)


@case((3, 2))
def stacked(x: Any) -> Any:
    return jnp.stack([x[0], whole(x, 2), x[2]], axis=1)


@case((5, 2), "slice")
def split_and_swap(x: Any) -> Any:
    a, b = jnp.split(x, [2], axis=0)
    return jnp.concatenate([b, a], axis=0) * 3


@case((5, 2))
def unstacked(x: Any) -> Any:
    a, _, c, *_ = jnp.unstack(x, axis=0)
    return a - 2 * c


@case((4,))
def constant_output(x: Any) -> Any:
    return whole(x, 3)


# ---------------------------------------------------------------------------------------------- the tests
@functools.cache
def traced(name: str) -> LureForm:
    return lowered(*CASES[name][:2])


def jacobian(name: str) -> np.ndarray:
    """Of the user's function in float64, column by column: f(e_i) - f(0). Exact for small integers."""
    fn, shape, _ = CASES[name]
    n = int(np.prod(shape))
    with jax.enable_x64(True):
        f = jax.jit(jax.vmap(lambda u: jnp.ravel(fn(u.reshape(shape)))))
        values = np.asarray(f(np.concatenate([np.zeros((1, n)), np.eye(n)])))
    assert values.dtype == np.float64
    return (values[1:] - values[0]).T


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(CASES))
def test_matrices_are_the_jacobian(name: str) -> None:
    """The product of the step matrices, from either side, is the Jacobian: exactly, the entries being integers."""
    form, truth = traced(name), jacobian(name)
    ops = [step for step in form.program.steps if isinstance(step, Op)]
    assert not form.taps and CASES[name][2] <= {op.kind for op in ops}, "this case does not test what it says"
    host = HostForm(form)
    forward, backward = host.forward((), [()], ()), host.backward((), [()], ())
    if name == "constant_output":
        assert not forward and not backward and not truth.any()
        return
    up, down = forward[()], backward[()]
    assert np.abs(truth).max() > 0
    assert up.error <= 1e-10 and down.error <= 1e-10
    assert np.array_equal(dense(up.midpoint_for_search()), truth)
    assert np.array_equal(dense(down.midpoint_for_search()).T, truth)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", sorted(CASES))
def test_views_of_a_step_agree(name: str) -> None:
    """One step: the transpose, the selection in `rows` and the norm all belong to the one matrix."""
    form = traced(name)
    consts = [np.asarray(c) for c in form.consts]
    for op in form.program.steps:
        assert isinstance(op, Op)
        found = blocks.step_matrices(op, consts, form.program.shapes)
        assert [m.register for m in found] == [i for i in op.inputs if i >= 0]
        for matrix in found:
            got = dense(matrix.matrix)
            sizes = (int(np.prod(form.program.shapes[r])) for r in (op.output, matrix.register))
            assert got.shape == tuple(sizes)
            for view, m in ((matrix, got), (matrix.transposed, got.T)):
                assert np.array_equal(dense(view.matrix), m)
                if view.rows is not None:
                    said = np.zeros_like(m)
                    said[np.flatnonzero(view.rows >= 0), view.rows[view.rows >= 0]] = 1
                    assert np.array_equal(said, m)
                if m.size:
                    assert view.norm >= np.linalg.norm(m, 2) * (1 - 1e-14)
                given = Enclosure(np.random.default_rng(1).normal(size=(m.shape[1], 3)), 0.25)
                applied = view.apply(given)
                assert np.allclose(
                    dense(applied.midpoint_for_search()),
                    m @ given.midpoint_for_search(),
                    rtol=1e-13,
                    atol=1e-13,
                )
                if m.size:
                    assert applied.error >= 0.25 * np.linalg.norm(m, 2) * (1 - 1e-14)


def test_cases_use_every_kind_of_step() -> None:
    """A new kind in `KINDS` needs a case here."""
    used = {step.kind for name in CASES for step in traced(name).program.steps if isinstance(step, Op)}
    assert used | {"stack"} == set(KINDS)  # stack is a primitive from jax 0.12 on, and has a test below


def test_stack_step() -> None:
    for axis, count in itertools.product(range(3), (1, 3)):
        shapes = [(2, 3)] * count
        out = np.stack([np.zeros(s) for s in shapes], axis).shape
        op = Op("stack", (("axis", axis),), tuple(range(count)), count)
        found = blocks.step_matrices(op, [], [*shapes, out])
        values = [np.arange(6.0).reshape(2, 3) + 10 * i for i in range(count)]
        got = sum(dense(m.matrix) @ values[m.register].ravel() for m in found)
        assert np.array_equal(np.asarray(got), np.stack(values, axis).ravel())


def test_division_is_within_its_stated_error() -> None:
    """1/c is rounded once, and `relerr` covers it; exact rationals, the largest and smallest divisors included."""
    divisors = np.array([3.0, -7.0, 0.1, 1e-30, 1e30, 49.0], np.float32)
    extreme = np.array([3.0, 1.7e308, -1.1e308, 2.3e-308, 1e300])
    for c in (divisors, extreme):
        op = Op("div", (), (0, -1), 1)
        (step,) = blocks.step_matrices(op, [c], [c.shape, c.shape])
        entries = dense(step.matrix).diagonal()
        for got, by in zip(entries, c, strict=True):
            exact = 1 / Fraction(float(by))
            assert abs(Fraction(float(got)) - exact) <= Fraction(step.relerr) * abs(Fraction(float(got)))
        assert 0 < step.relerr < 1e-15


def test_division_by_zero_is_an_error() -> None:
    op = Op("div", (), (0, -1), 1)
    with pytest.raises(ValueError, match="divides by a constant that is zero"):
        blocks.step_matrices(op, [np.array([1.0, 0.0])], [(2,), (2,)])


def test_a_form_that_is_traced_has_no_matrices() -> None:
    def inside(w: jax.Array) -> jax.Array:
        with pytest.raises(TypeError, match="has no matrices"):
            HostForm(lb.trace(lambda x: w @ x, jnp.ones(3)))
        return w

    jax.jit(inside)(jnp.ones((2, 3)))
