"""Linear maps: every rule that moves, sums or multiplies entries, with random parameters."""

from __future__ import annotations

import math

from .entries import Context, op


@op(weight=6)
def dense(g: Context) -> str:
    n = math.prod(g.shape)
    m = g.integer(1, 6)
    bias = f" + {g.const((m,))}" if g.chance(60) else ""
    return f"{g.weights((m, n), n)} @ jnp.ravel({{0}}){bias}"


@op(weight=2)
def along_axis(g: Context) -> str | None:
    """A matrix along one axis, from the left or the right, or a batch of matrices."""
    if not g.rank:
        return None
    a = g.axis()
    letters = "abcd"[: g.rank]
    out = letters.replace(letters[a], "z")
    how = g.integer(0, 2)
    m = g.integer(1, 4)
    if how == 0:
        return (
            f'jnp.einsum("{letters[a]}z,{letters}->{out}", {g.weights((g.shape[a], m), g.shape[a])}, {{0}})'
        )
    if how == 1:
        order = "".join(sorted(out, reverse=g.chance(50)))
        return (
            f'jnp.einsum("{letters},z{letters[a]}->{order}", {{0}}, {g.weights((m, g.shape[a]), g.shape[a])})'
        )
    other = letters[g.axis()]
    if other == letters[a]:
        return f"jnp.tensordot({{0}}, {g.weights((g.shape[a], m), g.shape[a])}, axes=(({a},), (0,)))"
    b = letters.index(other)
    batch = g.weights((g.shape[b], g.shape[a], m), g.shape[a])
    return f'jnp.einsum("{letters},{other}{letters[a]}z->{out}", {{0}}, {batch})'


def _padding(g: Context) -> str:
    return g.pick(['"SAME"', '"VALID"', str([(g.integer(-1, 2), g.integer(0, 2))]), '"SAME_LOWER"'])


@op(weight=3)
def convolution_1d(g: Context) -> str | None:
    if g.rank < 2 or g.rank > 3:
        return None
    x = "{0}[None]" if g.rank == 2 else "{0}"
    batch, _, channels = (1, *g.shape) if g.rank == 2 else g.shape
    groups = g.pick([d for d in (1, 2, 3) if channels % d == 0])
    batches = g.pick([d for d in (1, 2) if batch % d == 0]) if groups == 1 else 1
    out = groups * batches * g.integer(1, 2)
    k = g.integer(1, 3)
    kernel = g.weights((k, channels // groups, out), k * channels // groups)
    padding = _padding(g)
    lhs = g.pick([1, 1, 1, 2]) if padding.startswith("[") else 1
    if g.chance(15):
        wide, names = g.weights((k, channels, out), k), '("NWC", "WIO", "NWC")'
        padding = g.pick(["SAME", "VALID"])
        return (
            f"lax.conv_transpose({x}, {wide}, ({g.integer(1, 2)},), {padding!r}, dimension_numbers={names})"
        )
    layout = g.pick(['("NWC", "WIO", "NWC")', '("NWC", "WIO", "NCW")', '("NWC", "WIO", "WNC")'])
    return (
        f"lax.conv_general_dilated({x}, {kernel}, ({g.integer(1, 2)},), {padding}, lhs_dilation=({lhs},), "
        f"rhs_dilation=({g.integer(1, 2)},), dimension_numbers={layout}, feature_group_count={groups}, "
        f"batch_group_count={batches})"
    )


@op(weight=2)
def convolution_2d(g: Context) -> str | None:
    if g.rank != 2 or min(g.shape) < 2:
        return None
    h, w = g.integer(1, 2), g.integer(1, 3)
    pad = [(g.integer(-1, 1), g.integer(0, 2)) for _ in range(2)]
    return (
        f"lax.conv_general_dilated({{0}}[None, None], {g.weights((g.integer(1, 2), 1, h, w), h * w)}, "
        f"({g.integer(1, 2)}, {g.integer(1, 2)}), {pad}, lhs_dilation=({g.integer(1, 2)}, 1), "
        f"rhs_dilation=(1, {g.integer(1, 2)}))[0]"
    )


@op()
def as_kernel(g: Context) -> str | None:
    """x is the kernel of a convolution of a constant."""
    if g.rank != 1:
        return None
    image = g.const((1, 1, g.shape[0] + g.integer(0, 3)))
    return f'lax.conv_general_dilated({image}, {{0}}[None, None], ({g.integer(1, 2)},), "VALID")[0, 0]'


@op()
def convolve(g: Context) -> str | None:
    if g.rank != 1:
        return None
    name, mode = g.pick(["convolve", "correlate"]), g.pick(["full", "same", "valid"])
    return f"jnp.{name}({{0}}, {g.const((g.integer(1, 3),))}, mode={mode!r})"


@op(weight=2)
def scale_and_shift(g: Context) -> str:
    c = g.const(g.shape if g.chance(60) else ())
    positive = g.const(g.shape, kind="positive")
    shift = g.const(g.shape)
    forms = [
        "{0} * C",
        "C * {0} + S",
        "{0} / P",
        "{0} - S",
        "S - {0}",
        "-{0}",
        "{0} + S",
        "({0} - S) / P",
        "0.5 * {0}",
    ]
    return g.pick(forms).replace("C", c, 1).replace("P", positive, 1).replace("S", shift, 1)


@op()
def reshape(g: Context) -> str:
    n = math.prod(g.shape)
    first = g.pick([d for d in range(1, n + 1) if n % d == 0]) if n else 0
    second = n // first if first else 0
    shape = g.pick([(first, second), (n,), (second, first), (1, first, second), (first, 1, second)])
    how = g.integer(0, 2)
    if how == 0 and g.rank > 1:
        return f"lax.reshape({{0}}, {shape}, dimensions={g.order()})"
    if how == 1 and g.rank > 1:
        return f'jnp.reshape({{0}}, {shape}, order="F")'
    return f"jnp.reshape({{0}}, {shape})"


@op()
def transpose(g: Context) -> str | None:
    if g.rank < 2:
        return None
    return g.pick(
        [f"jnp.transpose({{0}}, {g.order()})", "{0}.T", "jnp.moveaxis({0}, 0, -1)", "jnp.swapaxes({0}, 0, 1)"]
    )


@op()
def axes_of_one(g: Context) -> str:
    a = g.integer(0, g.rank)
    if 1 in g.shape and g.chance(50):
        return f"jnp.squeeze({{0}}, {g.shape.index(1)})"
    return f"jnp.expand_dims({{0}}, {a})"


@op()
def broadcast(g: Context) -> str:
    m = g.integer(1, 3)
    if g.chance(50):
        return f"lax.broadcast_in_dim({{0}}, {g.shape + (m,)}, {tuple(range(g.rank))})"
    return f"jnp.broadcast_to({{0}}, {(m, *g.shape)})"


@op()
def repeat(g: Context) -> str | None:
    if not g.rank:
        return None
    reps = tuple(g.integer(1, 2) for _ in g.shape)
    a = g.axis()
    uneven = [g.integer(0, 2) for _ in range(g.shape[a])]
    return g.pick(
        [f"jnp.tile({{0}}, {reps})", f"lax.tile({{0}}, {reps})", f"jnp.repeat({{0}}, 2, axis={a})"]
        + (
            [f"jnp.repeat({{0}}, np.array({uneven}), axis={a}, total_repeat_length={sum(uneven)})"]
            if sum(uneven)
            else []
        )
    )


@op()
def reverse(g: Context) -> str | None:
    if not g.rank:
        return None
    return g.pick(
        [
            f"lax.rev({{0}}, {g.axes()})",
            f"jnp.roll({{0}}, {g.integer(-2, 2)}, axis={g.axis()})",
            f"jnp.flip({{0}}, {g.axis()})",
        ]
    )


@op()
def cut(g: Context) -> str | None:
    if not g.rank or 0 in g.shape:
        return None
    start = [g.integer(0, n - 1) for n in g.shape]
    stop = [g.integer(s + 1, n) for s, n in zip(start, g.shape, strict=True)]
    strides = tuple(g.integer(1, 2) for _ in g.shape)
    return f"lax.slice({{0}}, {tuple(start)}, {tuple(stop)}, {g.pick([None, strides])})"


@op()
def pad(g: Context) -> str | None:
    if not g.rank:
        return None
    config = [(g.integer(-1, 2), g.integer(-1, 2), g.integer(0, 1)) for _ in g.shape]
    widths = [(g.integer(0, 2), g.integer(0, 2)) for _ in g.shape]
    value = g.const(())
    how = g.integer(0, 2)
    if how == 0:
        return f"lax.pad({{0}}, {value}, {config})"
    if how == 1:
        return f"jnp.pad({{0}}, {widths}, constant_values=0.5)"
    return f"jnp.pad({{0}}, {widths}, mode={g.pick(['edge', 'reflect', 'symmetric', 'wrap', 'mean', 'linear_ramp'])!r})"


@op()
def sums(g: Context) -> str:
    return g.pick(
        [
            f"jnp.sum({{0}}, axis={g.axes() if g.rank else None})",
            f"jnp.mean({{0}}, axis={g.axes() if g.rank else None}, keepdims=True)",
            "{0} - jnp.mean({0})",
            f"jnp.trace({{0}}, offset={g.integer(-1, 1)})" if g.rank == 2 else "jnp.sum({0})",
            f"jnp.diff({{0}}, axis={g.axis()})" if g.rank else "{0} + 1.0",
        ]
    )


@op(weight=2)
def running_sum(g: Context) -> str | None:
    if not g.rank:
        return None
    return g.pick(
        [
            f"lax.cumsum({{0}}, axis={g.axis()}, reverse={g.chance(60)})",
            f"lax.cumsum({{0}}, axis={g.axis()}, reverse=True)",
            f"jnp.cumsum({{0}}, axis={g.axis()})",
            "lax.associative_scan(jnp.add, {0})",
        ]
    )


def window(g: Context) -> tuple[str, int]:
    window = tuple(g.integer(1, min(3, max(n, 1))) for n in g.shape)
    strides = tuple(g.integer(1, 2) for _ in g.shape)
    dilation = tuple(g.integer(1, 2) for _ in g.shape)
    base = tuple(g.pick([1, 1, 2]) for _ in g.shape)
    padding = g.pick(['"SAME"', '"VALID"', str([(g.integer(0, 1), g.integer(0, 1)) for _ in g.shape])])
    more = g.pick(
        ["", f", window_dilation={dilation}", f", base_dilation={base}, window_dilation={dilation}"]
    )
    return f"{window}, {strides}, {padding}{more}", math.prod(window)


@op()
def window_sum(g: Context) -> str | None:
    if not g.rank:
        return None
    text, size = window(g)
    return f"lax.reduce_window({{0}}, 0.0, lax.add, {text}) / {float(size)}"


@op()
def gather(g: Context) -> str | None:
    if not g.rank or 0 in g.shape:
        return None
    a = g.axis()
    n = g.shape[a]
    idx = g.indices(g.integer(1, 4), n)
    out = idx[:-1] + [g.pick([-1, n, n + 1])]
    many = [[g.integer(0, n - 1) for _ in range(2)] for _ in range(2)]
    noise = f"np.random.default_rng({g.integer(0, 99)}).normal(size={g.shape})"
    return g.pick(
        [
            f"jnp.take({{0}}, np.array({idx}), axis={a})",
            f"jnp.take({{0}}, np.array({out}), axis={a}, mode={g.pick(['clip', 'wrap'])!r})",
            f"jnp.take({{0}}, np.array({out}), axis={a}, mode='fill', fill_value=0)",
            f"jnp.take({{0}}, np.array({many}), axis={a})",
            f"jnp.ravel({{0}})[np.array({g.indices(3, math.prod(g.shape))})]",
            f"{{0}}.at[np.array({out})].get(mode={g.pick(['clip', 'drop', 'promise_in_bounds'])!r})"
            if a == 0
            else f"jnp.take({{0}}, {idx[0]}, axis={a})",
            f"jnp.take_along_axis({{0}}, np.argsort({noise}, axis={a}), axis={a})",
        ]
    )


@op()
def moving_slice(g: Context) -> str | None:
    if not g.rank or 0 in g.shape:
        return None
    a = g.axis()
    size = g.integer(1, g.shape[a])
    start = g.integer(-1, g.shape[a])
    update = g.const(tuple(1 if d == a else n for d, n in enumerate(g.shape)))
    inner = f"2.0 * lax.slice_in_dim({{0}}, 0, {size}, axis={a})"
    return g.pick(
        [
            f"lax.dynamic_slice_in_dim({{0}}, {start}, {size}, axis={a})",
            f"lax.dynamic_update_slice_in_dim({{0}}, {update}, {start}, axis={a})",
            f"lax.dynamic_update_slice_in_dim({{0}}, {inner}, {start}, axis={a})",
            f"lax.dynamic_index_in_dim({{0}}, {max(start, 0)}, axis={a}, keepdims={g.chance(50)})",
        ]
    )


@op(weight=2)
def scatter_into(g: Context) -> str | None:
    """at[].set and at[].add of constants and of parts of x, with repeated and dropped indices."""
    if g.rank not in (1, 2) or 0 in g.shape:
        return None
    n = g.shape[0]
    idx = g.indices(g.integer(1, 3), n)
    method = g.pick(["set", "add", "add", "add"])
    if method == "set" or g.chance(30):
        idx = sorted(set(idx))
    rows = f"{{0}}[:{len(idx)}]" if len(idx) <= n and g.chance(60) else g.const((len(idx), *g.shape[1:]))
    mode = g.pick(["", ", mode='drop'", ", mode='clip'"])
    if mode:
        idx = [*idx[:-1], g.pick([n - 1, n])] if method != "set" or n - 1 not in idx[:-1] else idx
    flags = ", unique_indices=True" if len(set(idx)) == len(idx) and g.chance(30) and not mode else ""
    unit = ", indices_are_sorted=True" if idx == sorted(idx) and g.chance(30) else ""
    return f"{{0}}.at[np.array({idx})].{method}({rows}{mode}{flags}{unit})"


@op(weight=2, supported=False)
def scatter_other(g: Context) -> str | None:
    """at[].apply, multiply, max, min, divide, subtract: supported in parts, never wrong."""
    if g.rank not in (1, 2) or 0 in g.shape:
        return None
    n = g.shape[0]
    where = g.pick(
        [f"{g.integer(0, n - 1)}", f"np.array({sorted(set(g.indices(2, n)))})", f":{g.integer(1, n)}"]
    )
    row = g.const((1,) if g.rank == 2 else (), 2.0)
    call = g.pick(
        [
            "apply(nn.relu)",
            "apply(jnp.sin)",
            "apply(lambda a: 4.0 * a + 1.0)",
            "apply(lambda a: 50.0 * nn.relu(a - 128.0))",
            "apply(jnp.abs)",
            f"multiply({row})",
            f"multiply({row}, mode='drop')",
            f"divide({row})",
            f"max({row})",
            f"min({row})",
            f"subtract({row})",
            f"power({row})",
            "multiply({0}[0])",
            "max({0}[-1])",
        ]
    )
    return f"{{0}}.at[{where}].{call}"


@op(operands=2)
def masked(g: Context) -> str | None:
    if g.shapes[0] != g.shapes[1]:
        return None
    mask = f"np.random.default_rng({g.integer(0, 99)}).integers(0, 2, {g.shape}).astype(bool)"
    which = f"np.random.default_rng({g.integer(0, 99)}).integers(0, 3, {g.shape}).astype(np.int32)"
    c = g.const(g.shape)
    return g.pick(
        [
            f"jnp.where({mask}, {{0}}, {{1}})",
            f"jnp.where({mask}, {{0}}, {c})",
            f"lax.select({mask}, {c}, {{0}})",
            f"lax.select_n({which}, {{0}}, {c}, {{1}})",
            "jnp.where(True, {0}, {1})",
        ]
    )


@op()
def pieces(g: Context) -> str | None:
    if not g.rank or 0 in g.shape:
        return None
    a = g.axis()
    n = g.shape[a]
    if g.chance(40):
        return f"sum(2.0 ** -i * part for i, part in enumerate(jnp.unstack({{0}}, axis={a})))"
    if n < 2:
        return f"jnp.stack([{{0}}, 2.0 * {{0}}], axis={g.integer(0, g.rank)})"
    k = g.integer(1, n - 1)
    return f"jnp.concatenate(jnp.split({{0}}, [{k}], axis={a})[::-1], axis={a})"


@op(operands=2, weight=4)
def two(g: Context) -> str | None:
    """Skips and branches: sums, differences, stacks, concatenations of two earlier values."""
    same = g.shapes[0] == g.shapes[1]
    forms = ["jnp.concatenate([jnp.ravel({0}), jnp.ravel({1})])", "{0} + jnp.sum({1})", "{1} - jnp.mean({0})"]
    if same:
        a = g.integer(0, g.rank)
        forms = [
            "{0} + {1}",
            "{0} - {1}",
            "{0} + 0.5 * {1}",
            f"jnp.stack([{{0}}, {{1}}], axis={a})",
            *forms[:1],
        ] + ["{0} + {1}"] * 3
        if g.rank:
            forms.append(f"jnp.concatenate([{{0}}, -{{1}}], axis={g.axis()})")
    return g.pick(forms)


@op()
def same_value(g: Context) -> str:
    """Operations that are the identity on what is certified."""
    return g.pick(
        [
            "lax.stop_gradient({0})",
            "jnp.copy({0})",
            "lax.optimization_barrier({0})",
            "lax.optimization_barrier(({0}, 2.0 * {0}))[1]",
            "{0} ** 1",
            "jax.ad_checkpoint.checkpoint_name({0}, 'a')",
            "jax.device_put({0})",
            "jnp.nan_to_num({0})",
            "jnp.real({0})",
        ]
    )


@op(supported=False)
def narrow(g: Context) -> str | None:
    """Casts to and from narrow types: real arithmetic for float16 and bfloat16, refused below."""
    to = g.pick(["bfloat16", "float16", "float32", "float32"])
    if g.dtypes[0] == "float64":
        to = g.pick(["float64", "float32"])
    return (
        f"cast({{0}}, jnp.{to})" if g.chance(80) else f"cast(2.0 * cast({{0}}, jnp.{to}), jnp.{g.dtypes[0]})"
    )


@op()
def gradient_inside(g: Context) -> str | None:
    """The gradient of a quadratic form: linear, and made of add_any."""
    if g.rank != 1 or g.dtypes[0] in ("float16", "bfloat16"):
        return None
    n = g.shape[0]
    a = g.weights((n, n), n)
    return g.pick(
        [
            f"jax.grad(lambda a: 0.5 * a @ ({a} @ a))({{0}})",
            f"jax.vjp(lambda a: {a} @ a + a[::-1], {{0}})[1]({{0}})[0]",
            f"jax.jvp(lambda a: {a} @ a + a[::-1], ({{0}},), ({{0}},))[1]",
        ]
    )


@op(weight=8)
def cancelling(g: Context) -> str | None:
    """Large terms that cancel: what is left has the rounding errors of the large ones."""
    if g.rank != 1 or g.dtypes[0] in ("float16", "bfloat16") or g.extreme != 1.0:
        return None
    n = g.shape[0]
    large = g.pick([1e3, 1e4] if g.dtypes[0] == "float32" else [1e6, 1e7, 1e8])
    big, small = g.const((n, n), large), g.const((n, n), 1.0)
    return g.pick(
        [
            f"({big} @ {{0}} + {small} @ {{0}}) - {big} @ {{0}}",
            f"({large} * {{0}} + {small} @ {{0}}) - {large} * {{0}}",
            f"jnp.diff({big} @ jnp.cumsum({{0}})) / {large} + jnp.sum({{0}})",
        ]
    )
