"""Activations, groups and control flow; and what has no bound, which must be refused in the library's own words."""

from __future__ import annotations

from .entries import HOSTILE, OPS, Context, op, ready
from .maps import window

EXACT = {
    "relu": "nn.relu({0})",
    "leaky": "nn.leaky_relu({0}, 0.125)",
    "abs": "jnp.abs({0})",
    "tanh": "jnp.tanh({0})",
    "sigmoid": "nn.sigmoid({0})",
    "softplus": "nn.softplus({0})",
    "silu": "nn.silu({0})",
    "elu": "nn.elu({0})",
    "celu": "nn.celu({0}, 2.0)",
    "soft_sign": "nn.soft_sign({0})",
    "relu6": "nn.relu6({0})",
    "hard_tanh": "nn.hard_tanh({0})",
    "squareplus": "nn.squareplus({0})",
    "sparse_plus": "nn.sparse_plus({0})",
    "sparse_sigmoid": "nn.sparse_sigmoid({0})",
    "log_sigmoid": "nn.log_sigmoid({0})",
    "mish": "nn.mish({0})",
    "clip": "jnp.clip({0}, -0.5, 1.0)",
    "clamp": "lax.clamp(-0.25, {0}, 2.0)",
    "sin": "jnp.sin({0})",
    "cos": "jnp.cos(2.0 * {0})",
    "arctan": "jnp.arctan({0})",
    "arcsinh": "jnp.arcsinh({0})",
    "erf": "lax.erf({0})",
    "erfc": "lax.erfc({0})",
    "bump": "jnp.exp(-{0} * {0})",
    "root": "jnp.sqrt(1.0 + {0} ** 2)",
    "root_of": "jnp.power(1.0 + {0} * {0}, 0.25)",
    "bent": "{0} * lax.rsqrt(1.0 + jnp.square({0}))",
    "log_square": "jnp.log(1.0 + {0} * {0})",
    "log_one": "jnp.log1p(jnp.abs({0}))",
    "negative_exp": "jnp.expm1(jnp.minimum({0}, 0.0))",
    "soft_shrink": "jnp.sign({0}) * jnp.maximum(jnp.abs({0}) - 0.25, 0.0)",
    "soft_shrink_where": "jnp.where({0} > 0.5, {0} - 0.5, jnp.where({0} < -0.5, {0} + 0.5, 0.0))",
    "interp": "jnp.interp({0}, jnp.array([-1, -0.25, 2], {0}.dtype), jnp.array([0.5, -2, 1], {0}.dtype))",
    "extrapolate": "jnp.interp({0}, jnp.array([0, 1], {0}.dtype), jnp.array([0, 3], {0}.dtype), left='extrapolate')",
    "select": "jnp.select([{0} < 0, {0} < 1], [0.25 * {0}, {0}], 1.5 * {0} - 0.5)",
    "piecewise": "jnp.piecewise({0}, [{0} < 0, {0} > 1], [lambda t: -t, lambda t: 2.0 - t, lambda t: t])",
    "by_count": "lax.select_n(({0} > 0).astype(int) + ({0} > 1).astype(int), 0 * {0}, {0}, 2 * {0} - 1)",
    "shrink": "{0} - jnp.clip({0}, -0.5, 0.5)",
    "prelu": "jnp.where({0} >= 0, {0}, 0.25 * {0})",
    "shifted_prelu": "jnp.where({0} > 0.5, 2.0 * {0} - 0.5, {0})",
    "gate": "{0} * ({0} > 0).astype({0}.dtype)",
    "sign_times": "jnp.sign({0}) * {0}",
    "reciprocal": "1.0 / (1.0 + jnp.abs({0}))",
    "sinh_tanh": "jnp.sinh(jnp.tanh({0}))",
    "cosh_tanh": "jnp.cosh(jnp.tanh({0}))",
    "arcsin": "jnp.arcsin(0.5 * jnp.tanh({0}))",
    "arccos": "jnp.arccos(0.5 * jnp.sin({0}))",
    "arctanh": "jnp.arctanh(0.5 * jnp.sin({0}))",
    "arccosh": "jnp.arccosh(2.0 + jnp.abs({0}))",
    "tan_tanh": "jnp.tan(jnp.tanh({0}))",
    "cbrt": "jnp.cbrt(1.0 + {0} * {0})",
    "sum_of_two": "nn.relu({0}) + jnp.tanh({0})",
    "difference": "nn.softplus({0}) - 0.5 * jnp.abs({0})",
    "finite": "jnp.where(jnp.isfinite({0}), jnp.tanh({0}), 0.0)",
    "inside": "jnp.where(({0} > -1) & ({0} < 1), {0}, jnp.sign({0}))",
    "logical": "jnp.where(~({0} < 0) | ({0} == 0), {0}, -0.5 * {0})",
    "not_equal": "jnp.where(({0} != 0) ^ ({0} <= 0), {0}, 0.5 * {0})",
    "liar": "nn.relu({0}) + lax.stop_gradient(jnp.abs({0}))",
}
for _name, _text in EXACT.items():
    ready(_name, _text, weight=4 if _name in ("relu", "tanh", "abs") else 1, kind="activation")

ROUNDED = {
    "gelu": "nn.gelu({0}, approximate=False)",
    "gelu_tanh": "nn.gelu({0})",
    "selu": "nn.selu({0})",
    "hard_sigmoid": "nn.hard_sigmoid({0})",
    "hard_silu": "nn.hard_silu({0})",
    "log_cosh": "nn.softplus({0}) + nn.softplus(-{0}) - np.log(2.0)",
}
for _name, _text in ROUNDED.items():
    ready(_name, _text, rounded=True, kind="activation")

OPEN = {
    "erf_inv": "lax.erf_inv(0.5 * jnp.tanh({0}))",
    "bessel": "lax.bessel_i0e({0}) + lax.bessel_i1e({0})",
    "bump2": "jnp.exp2(-jnp.square({0}))",
    "square": "{0} * {0}",
    "exp": "jnp.exp({0})",
    "log_of_cosh": "jnp.log(jnp.cosh(0.25 * {0}))",
    "exp_negative": "jnp.exp(-jnp.abs({0}))",
    "log": "jnp.log({0})",
    "log_abs": "jnp.log(jnp.abs({0}) + 1e-3)",
    "inverse": "1.0 / {0}",
    "root_jump": "jnp.sqrt(jnp.abs({0}))",
    "rsqrt": "lax.rsqrt(1e-3 + {0} * {0})",
    "sign": "jnp.sign({0})",
    "round": "jnp.round({0})",
    "floor": "jnp.floor({0})",
    "ceil": "jnp.ceil({0})",
    "remainder": "jnp.remainder({0}, 2.0)",
    "rem": "lax.rem({0}, 2.0)",
    "heaviside": "jnp.where({0} > 0, 1.0, 0.0)",
    "jump": "jnp.where({0} > 0.5, {0}, 2.0 * {0})",
    "jump_far": "jnp.where({0} > 100.0, {0} + 1.0, {0})",
    "spike": "nn.relu({0}) + 40.0 * nn.relu({0} - 120.0)",
    "cube": "{0} ** 3",
    "power": "jnp.power(jnp.abs({0}) + 1.0, 1.5)",
    "xlogx": "{0} * jnp.log(jnp.abs({0}) + 1.0)",
    "sinc": "jnp.sinc({0})",
    "atan2": "jnp.arctan2({0}, 2.0)",
    "hypot": "jnp.hypot({0}, 1.0)",
    "lgamma": "lax.lgamma(2.0 + nn.sigmoid({0}))",
    "digamma": "lax.digamma(2.0 + nn.sigmoid({0}))",
    "nextafter": "jnp.nextafter({0}, 1.0)",
    "logaddexp_const": "jnp.logaddexp({0}, 1.0)",
    "tan": "jnp.tan({0})",
    "sinh": "jnp.sinh({0})",
    "softmax": "nn.softmax({0})",
    "log_softmax": "nn.log_softmax({0})",
    "logsumexp": "nn.logsumexp({0})",
    "logsumexp_axis": "nn.logsumexp({0}, axis=0)",
    "normalised": "{0} / (1e-3 + jnp.linalg.norm({0}))",
    "norm": "jnp.linalg.norm({0})",
    "standardised": "nn.standardize({0})",
    "attention": "{0} @ nn.softmax({0}.T @ {0})",
    "outer": "jnp.outer({0}, {0})",
    "argmax": "jnp.argmax({0}).astype({0}.dtype) * {0}",
    "argmin": "{0}[jnp.argmin({0})]",
    "argsort": "{0}[jnp.argsort({0})]",
    "top_k": "lax.top_k({0}, 1)[0]",
    "top_k_index": "lax.top_k({0}, 1)[1].astype({0}.dtype)",
    "median": "jnp.median({0})",
    "quantile": "jnp.quantile({0}, 0.25)",
    "cummax": "lax.cummax({0}, axis=0)",
    "cummin": "lax.cummin({0}, axis=0, reverse=True)",
    "cumprod": "jnp.cumprod({0})",
    "cumlogsumexp": "lax.cumlogsumexp({0}, axis=0)",
    "product": "jnp.prod({0})",
    "log_of_sigmoid": "jnp.log(nn.sigmoid({0}))",
    "hard_shrink": "jnp.where(jnp.abs({0}) > 0.5, {0}, 0.0)",
    "piecewise_two": "jnp.piecewise({0}, [{0} < 0, {0} >= 0], [lambda a: -a, lambda a: 2.0 * a])",
    "int_cast": "{0}.astype(jnp.int32).astype({0}.dtype)",
    "bool_cast": "({0} > 0).astype({0}.dtype)",
    "reduce_precision": "lax.reduce_precision({0}, 8, 7)",
    "float8": "{0}.astype(jnp.float8_e4m3fn).astype({0}.dtype)",
    "fft": "jnp.real(jnp.fft.fft({0}))",
    "while": "lax.while_loop(lambda a: jnp.sum(a) < 1.0, lambda a: a + 1.0, {0})",
    "counted": "lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.abs(s[1]) - 0.5), (0, {0}))[1]",
    "cond": "lax.cond(jnp.sum({0}) > 0, jnp.sin, nn.relu, {0})",
    "python_if": "{0} if {0}[0] > 0 else -{0}",
    "solve": "jnp.linalg.solve(jnp.eye({0}.shape[0], dtype={0}.dtype) * 2.0, {0})",
    "infinite": "{0} * jnp.inf",
    "no_entries": "jnp.concatenate([{0}, nn.relu({0}[:0])])",
    "dropout": "jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, {0}.shape), {0}, 0.0)",
    "householder": "{0} - 2.0 * jnp.minimum(jnp.sum({0}) / {0}.size ** 0.5, 0.0) / {0}.size ** 0.5",
}
for _name, _text in OPEN.items():
    ready(_name, _text, supported=False, rounded=True, kind="open")


@op("activation", supported=False, rounded=True, weight=10)
def composite(g: Context) -> str:
    """Functions of one variable that nobody has a name for."""
    inner = [
        "{0}",
        "2.0 * {0} + 0.5",
        "-{0}",
        "jnp.tanh({0})",
        "jnp.abs({0})",
        "{0} * {0}",
        "jnp.maximum({0}, -0.5)",
    ]
    outer = [
        "jnp.sin(A)", "jnp.tanh(A)", "nn.relu(A - 0.25)", "jnp.sqrt(0.5 + jnp.abs(A))", "jnp.exp(-jnp.abs(A))",
        "A / (1.0 + jnp.abs(A))", "jnp.log1p(jnp.abs(A))", "jnp.minimum(A, 1.0)", "nn.softplus(A)", "jnp.arctan(A)",
        "A * nn.sigmoid(A)", "jnp.where({0} > 0, A, 0.5 * A)", "A + 0.5 * {0}", "jnp.maximum(A, 0.5 * {0})",
        "A - nn.relu({0})", "jnp.square(jnp.tanh(A))", "jnp.exp2(-A * A)", "jnp.cos(A) * 0.5",
    ]  # fmt: skip
    text = g.pick(inner)
    for _ in range(g.integer(1, 3)):
        text = g.pick(outer).replace("A", f"({text})")
    return text


@op("activation", weight=4)
def own_slopes(g: Context) -> str | None:
    """Slopes and clips that differ from neuron to neuron."""
    alpha, low = g.const(g.shape, 0.5), g.const(g.shape, 1.0)
    high = g.const(g.shape, 1.0, "uniform")  # a sum of constants would be rounded in the network's dtype
    return g.pick(
        [
            f"jnp.where({{0}} > 0, {{0}}, {alpha} * {{0}})",
            f"jnp.maximum({{0}}, {low})",
            f"jnp.tanh({alpha} * {{0}})",
            f"jnp.clip({{0}}, jnp.minimum({low}, {high}), {high})",
            f"nn.relu({{0}} - {low})",
        ]
    )


# --- groups --------------------------------------------------------------------------------------------------------


@op("group", weight=2)
def reduce_group(g: Context) -> str | None:
    if not g.rank or 0 in g.shape:
        return None
    return f"jnp.{g.pick(['max', 'min', 'max', 'ptp'])}({{0}}, axis={g.axes()}, keepdims={g.chance(50)})"


@op("group", weight=2)
def sort(g: Context) -> str | None:
    if not g.rank or 0 in g.shape:
        return None
    a = g.axis()
    return g.pick(
        [
            f"jnp.sort({{0}}, axis={a})",
            f"jnp.sort({{0}}, axis={a}, descending=True)",
            f"lax.sort({{0}}, dimension={a}, is_stable={g.chance(50)})",
        ]
    )


@op("group", operands=2, weight=3)
def two_groups(g: Context) -> str | None:
    if g.shapes[0] != g.shapes[1]:
        return None
    return g.pick(
        [
            "jnp.maximum({0}, {1})",
            "jnp.minimum({0}, {1})",
            "jnp.stack([jnp.maximum({0}, {1}), jnp.minimum({0}, {1})])",
        ]
    )


@op("group", weight=2)
def maxmin(g: Context) -> str | None:
    if g.rank != 1 or g.shape[0] % 2 or not g.shape[0]:
        return None
    return "jnp.concatenate([jnp.maximum(*jnp.split({0}, 2)), jnp.minimum(*jnp.split({0}, 2))])"


@op("group", weight=2)
def pooling(g: Context) -> str | None:
    if not g.rank:
        return None
    text, _ = window(g)
    how, start = g.pick([("max", "-jnp.inf"), ("min", "jnp.inf")])
    return f"lax.reduce_window({{0}}, {start}, lax.{how}, {text})"


# --- structure -----------------------------------------------------------------------------------------------------


@op("structure", weight=2)
def scan(g: Context) -> str | None:
    if g.rank != 1 or g.shape[0] > 6 or 0 in g.shape:
        return None
    n, k = g.shape[0], g.integer(1, 3)
    w, b = g.weights((k, n, n), n), g.const((k, n), 0.5)
    act = g.pick(["nn.relu", "jnp.tanh", "jnp.abs", "jnp.sin", "(lambda a: nn.leaky_relu(a, 0.125))"])
    reverse = g.chance(40)
    return g.pick(
        [
            f"lax.scan(lambda h, w: ({act}(w @ h), h), {{0}}, {w}, reverse={reverse})[0]",
            f"lax.scan(lambda h, w: ({act}(w @ h), h), {{0}}, {w}, reverse={reverse})[1]",
            f"lax.scan(lambda h, b: (h + 0.5 * {act}(h + b), 2.0 * h), {{0}}, {b}, unroll=2, reverse={reverse})[1]",
            f"lax.fori_loop(0, {k}, lambda i, h: {act}(lax.dynamic_index_in_dim({w}, i, keepdims=False) @ h), {{0}})",
            f"lax.scan(lambda h, a: (0.5 * h + {act}(a), h), {g.const(())}, {{0}}, reverse={reverse})[1]",
            f"lax.map(lambda a: {act}(2.0 * a), {{0}})",
        ]
    )


@op("structure", weight=2)
def control(g: Context) -> str:
    c = g.const(())
    return g.pick(
        [
            f"lax.cond({c} > 0, nn.relu, jnp.tanh, {{0}})",
            f"lax.switch({g.integer(0, 2)}, (nn.relu, jnp.sin, lambda a: 2.0 * a), {{0}})",
            "jax.checkpoint(lambda a: nn.relu(a) - 0.5 * a)({0})",
            "jax.jit(lambda a: jnp.tanh(a) + a)({0})",
            f"jax.jit(named(lambda a: nn.relu(a) - 0.25 * a, {HOSTILE!r}))({{0}})",
            f"jax.named_scope({HOSTILE!r})(jnp.tanh)({{0}})",
        ]
    )


@op("structure", supported=False, weight=2)
def wrapped(g: Context) -> str | None:
    """Another entry inside jit, checkpoint or vmap."""
    if not g.rank or 0 in g.shape:
        return None
    how = g.pick(["jax.jit", "jax.checkpoint", "jax.vmap"])
    inside = Context(g.rng, [g.shape[1:] if how == "jax.vmap" else g.shape], g.dtypes, g.extreme)
    entry = OPS[g.pick([n for n, e in OPS.items() if e.operands == 1 and e.supported])]
    text = entry.draw(inside)
    return None if text is None else f"{how}(lambda a: {text.replace('{0}', 'a')})({{0}})"
