"""Elementwise nonlinearities: evaluation, rigorous enclosures and proved slope ranges.

An activation is an `Expr` (hashable, no arrays) and a sequence of constants beside it. The slope
range `[a, b]` of `slope_range` satisfies `a <= (f(x) - f(y)) / (x - y) <= b` for all real `x !=
y`, where f is the expression in exact real arithmetic and its constants are the exact values of their
floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipbounds._activations import intervals as I
from lipbounds._activations.enclosure import enclose
from lipbounds._activations.expression import Expr, SlopeError
from lipbounds._activations.piecewise import interp
from lipbounds._activations.slope_range import scalar_slopes

_LAX: dict[str, Callable[..., Any]] = {
    "add": lax.add, "sub": lax.sub, "mul": lax.mul, "div": lax.div, "neg": lax.neg, "abs": lax.abs,
    "max": lax.max, "min": lax.min, "sign": lax.sign, "floor": lax.floor, "ceil": lax.ceil, "exp": lax.exp,
    "exp2": lax.exp2, "expm1": lax.expm1, "log": lax.log, "log1p": lax.log1p, "tanh": lax.tanh,
    "logistic": lax.logistic, "erf": lax.erf, "erfc": lax.erfc, "sqrt": lax.sqrt, "rsqrt": lax.rsqrt,
    "cbrt": lax.cbrt, "square": lax.square, "pow": lax.pow, "sin": lax.sin, "cos": lax.cos, "tan": lax.tan,
    "atan": lax.atan, "asinh": lax.asinh, "acosh": lax.acosh, "atanh": lax.atanh, "sinh": lax.sinh,
    "cosh": lax.cosh, "asin": lax.asin, "acos": lax.acos, "select_n": lax.select_n, "lt": lax.lt,
    "le": lax.le,
    "gt": lax.gt, "ge": lax.ge, "eq": lax.eq, "ne": lax.ne, "and": lax.bitwise_and, "or": lax.bitwise_or,
    "xor": lax.bitwise_xor, "not": lax.bitwise_not, "clamp": lax.clamp, "is_finite": lax.is_finite,
}  # fmt: skip
_OPAQUE: dict[str, Callable[..., Any]] = {}


def knows(name: str) -> bool:
    """Whether `evaluate` has a rule of its own for this primitive."""
    return name in _LAX or name in ("x", "const", "to_float", "integer_pow", "round", "interp")


def register_primitive(name: str, fn: Callable[..., Any]) -> None:
    """Teach `evaluate` another elementwise primitive.

    It calls `fn(params, *args)` with `Node.params`. Nothing is assumed about its slopes: `slope_range` still
    refuses it.
    """
    _OPAQUE[name] = fn


def _as_const(c: Any, dtype: Any) -> jax.Array:
    """`c` as an array of `dtype`; booleans stay boolean."""
    if not isinstance(c, jax.Array):
        c = np.asarray(c)
        return jnp.asarray(c) if c.dtype == np.bool_ else jnp.asarray(c.astype(dtype))
    return c if c.dtype == jnp.bool_ else lax.convert_element_type(c, dtype)


def evaluate(expr: Expr, consts: Sequence[Any], x: Any) -> jax.Array:
    """The expression at `x`, elementwise, in `x`'s dtype (jit, vmap and grad work).

    Constants are cast to that dtype and broadcast; an unknown primitive raises `ValueError`.
    """
    x = jnp.asarray(x)
    dtype = x.dtype
    vals: list[Any] = []
    for node in expr.nodes:
        args = [vals[i] for i in node.args]
        if len({jnp.shape(a) for a in args}) > 1:
            args = list(jnp.broadcast_arrays(*args))
        if node.op == "x":
            val = x
        elif node.op == "const":
            val = _as_const(consts[node.params[0]], dtype)
        elif node.op == "to_float":
            val = lax.convert_element_type(args[0], dtype)
        elif node.op == "integer_pow":
            val = lax.integer_pow(args[0], int(node.params[0]))
        elif node.op == "round":
            val = lax.round(args[0], lax.RoundingMethod(int(node.params[0])))
        elif node.op == "interp":
            xp, fp, extrapolate = node.params
            val = interp(args[0], xp=xp, fp=fp, extrapolate=extrapolate)
        elif node.op in _LAX:
            val = _LAX[node.op](*args)
        elif node.op in _OPAQUE:
            val = _OPAQUE[node.op](node.params, *args)
        else:
            raise ValueError(f"no evaluation rule for the elementwise primitive {node.op!r}")
        vals.append(val)
    return vals[-1]


def _concrete(consts: Sequence[Any]) -> list[np.ndarray]:
    """The constants as host arrays: bool, or float64 holding their exact values."""
    out = []
    for c in consts:
        try:
            a = np.asarray(c)
        except jax.errors.TracerArrayConversionError:
            raise SlopeError(
                "constants are being traced, so the slope range cannot be proved",
                "close over concrete values, or use an activation max(x, a * x) or where(x > 0, x, a * x)",
            ) from None
        if a.dtype != np.bool_:
            if np.iscomplexobj(a):
                raise SlopeError("it has complex constants", "use real constants")
            exact = a.astype(np.float64)
            if not np.array_equal(exact.astype(a.dtype), a, equal_nan=True):
                raise SlopeError("a constant is not representable in float64", "use smaller constants")
            if np.isnan(exact).any():
                raise SlopeError("a constant is NaN", "give the activation finite constants")
            a = exact
        out.append(a)
    return out


@lru_cache(maxsize=16384)
def _cached(expr: Expr, consts: tuple[float | bool, ...]) -> tuple[float, float] | tuple[str, str]:
    """The slopes of one scalar function, or the reason and remedy of its refusal."""
    exact = tuple(c if isinstance(c, bool) or np.isinf(c) else Fraction(c) for c in consts)
    try:
        return scalar_slopes(expr, exact)
    except SlopeError as error:
        return error.reason, error.remedy


def _used(expr: Expr) -> list[int]:
    return sorted({n.params[0] for n in expr.nodes if n.op == "const"})


def constant_columns(
    expr: Expr, consts: Sequence[Any], shape: tuple[int, ...]
) -> tuple[list[tuple[float | bool, ...]], np.ndarray]:
    """(columns, which): the constants of the distinct scalar functions, and the index of the function of each entry.

    The constants are broadcast to `shape`; which is (size,).
    """
    used = _used(expr)
    arrays = _concrete([consts[i] for i in used])
    size = int(np.prod(shape))
    varying = [a for a in arrays if a.size > 1 and np.any(a != a.flat[0])]
    inverse = np.zeros(size, np.intp)
    first = np.zeros(1, np.intp)
    if varying:
        table = np.stack([np.broadcast_to(a, shape).ravel().astype(np.float64) for a in varying], axis=1)
        _, first, inverse = np.unique(table, axis=0, return_index=True, return_inverse=True)
    flat = [np.broadcast_to(a, shape).reshape(-1)[first] for a in arrays]
    columns = []
    for k in range(len(first)):
        values: list[float | bool] = [0.0] * (max(used, default=-1) + 1)
        for i, column in zip(used, flat, strict=True):
            values[i] = column[k].item()
        columns.append(tuple(values))
    return columns, inverse.reshape(-1)


def slope_range(expr: Expr, consts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Proved slopes: lower <= (f(x) - f(y)) / (x - y) <= upper for all real x != y, constant by constant.

    Returns two float64 arrays of the broadcast shape of the constants (0-d without constants).  f is the
    expression in exact real arithmetic with the exact values of the constants; comparisons are decided in
    rational arithmetic and both branches must agree at every breakpoint, slopes are enclosed with outward
    rounding, and both tails are proved. Slopes declared with `register` are not looked up here.
    Raises `SlopeError` where f jumps, is not defined on all reals, has unbounded slopes, or cannot be
    decided.
    """
    shape = np.broadcast_shapes(*(np.shape(consts[i]) for i in _used(expr)))
    if int(np.prod(shape)) == 0:
        return np.zeros(shape), np.zeros(shape)
    columns, inverse = constant_columns(expr, consts, shape)
    lower, upper = np.empty(len(columns)), np.empty(len(columns))
    for k, column in enumerate(columns):
        result = _cached(expr, column)
        if isinstance(result[0], str):
            raise SlopeError(result[0], str(result[1]))
        lower[k], upper[k] = result
    index = inverse.reshape(shape)
    return lower[index], upper[index]


def _is_zero(c: Any) -> bool:
    try:
        return bool(np.all(np.asarray(c) == 0))
    except jax.errors.TracerArrayConversionError:
        return False


def _homogeneous(expr: Expr, consts: Sequence[Any]) -> bool:
    """Whether f(t x) = t f(x) for t > 0 whatever the (finite) values of the constants that are traced.

    Node kinds: "h" homogeneous of degree 1 in x, "d" of degree 0 (also predicates), "c" without x, "0" the
    constant 0.
    """
    kinds: list[str] = []
    for node in expr.nodes:
        a, op = [kinds[i] for i in node.args], node.op
        kind = ""
        if op == "x":
            kind = "h"
        elif op == "const":
            kind = "0" if _is_zero(consts[node.params[0]]) else "c"
        elif op in ("lt", "le", "gt", "ge", "eq", "ne", "add", "sub", "max", "min") and set(a) <= {"h", "0"}:
            kind = "d" if op in ("lt", "le", "gt", "ge", "eq", "ne") else "h"
        elif op in ("and", "or", "not", "to_float", "xor") and set(a) <= {"d"}:
            kind = "d"
        elif op in ("neg", "abs") and a[0] in ("h", "c", "0"):
            kind = a[0]
        elif op == "select_n" and a[0] == "d" and set(a[1:]) <= {"h", "0"}:
            kind = "h"
        elif op == "select_n" and a[0] == "d" and set(a[1:]) <= {"d", "c", "0"}:
            kind = "d"
        elif op in ("mul", "div"):
            pair = a[0] + a[1]
            if pair in ("hc", "hd") or (op == "mul" and pair in ("ch", "dh")):
                kind = "h" if op == "mul" or pair == "hc" else ""
            elif set(a) <= {"c", "d", "0"} and (op == "mul" or a[1] == "c"):
                kind = "d" if "d" in a else "c"
            elif op == "mul" and "0" in a:
                kind = "0"
        if not kind:
            return False
        kinds.append(kind)
    return kinds[-1] == "h"


def _hull(expr: Expr) -> tuple[float, float] | None:
    """Slopes that hold whatever the constants are, as of min(max(x, 0), t): sums, maxima and minima of x and constants.

    Difference quotients of max(f, g) and min(f, g) lie between the smallest and the largest of those of f and g.
    """
    known: list[tuple[float, float]] = []
    for node in expr.nodes:
        a = [known[i] for i in node.args]
        if node.op == "x":
            known.append((1.0, 1.0))
        elif node.op == "const":
            known.append((0.0, 0.0))
        elif node.op in ("max", "min"):
            known.append((min(a[0][0], a[1][0]), max(a[0][1], a[1][1])))
        elif node.op == "add":
            known.append((a[0][0] + a[1][0], a[0][1] + a[1][1]))
        elif node.op == "sub":
            known.append((a[0][0] - a[1][1], a[0][1] - a[1][0]))
        elif node.op == "neg":
            known.append((-a[0][1], -a[0][0]))
        else:
            return None
    return known[-1]


def piecewise_linear_slopes(expr: Expr, consts: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """Slope ranges as traceable arrays, for constants that are being trained (PReLU, leaky slopes).

    Accepts what is homogeneous in x by its structure alone, such as `max(x, a * x)` or `where(x > 0, x, a
    * x)`: then f is linear on each side of 0 and its slopes are f(1) and -f(-1) exactly, between which all
    difference quotients lie. Shapes are the broadcast shape of the constants. So are sums, maxima and minima of x and
    constants, such as `min(max(x, 0), t)`. Raises `SlopeError` for anything else.
    """
    if not _homogeneous(expr, consts):
        ends = _hull(expr)
        if ends is not None:
            return np.float64(ends[0]), np.float64(ends[1])  # type: ignore[return-value]
        raise SlopeError(
            "constants are being traced, and the activation is not linear on both sides of 0",
            "close over concrete constants, or use max(x, a * x), where(x > 0, x, a * x) or min(max(x, 0), a)",
        )
    arrays = [jnp.asarray(consts[i]) for i in _used(expr)]
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    one = jnp.ones(shape, jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)
    right, left = evaluate(expr, consts, one), -evaluate(expr, consts, -one)
    return jnp.minimum(left, right), jnp.maximum(left, right)


_REGISTERED: dict[tuple[Expr, tuple], tuple[float, float]] = {}


def _key(expr: Expr, consts: Sequence[Any]) -> tuple[Expr, tuple]:
    """Expression and constants by value; a constant array that is uniform counts as its scalar."""
    out = []
    for i in _used(expr):
        a = np.ascontiguousarray(np.asarray(consts[i]))
        if a.size and np.all(a == a.flat[0]):
            a = a.reshape(-1)[:1].reshape(())
        out.append((i, str(a.dtype), a.shape, a.tobytes()))
    return expr, tuple(out)


def register(expr: Expr, consts: Sequence[Any], lower: float, upper: float) -> None:
    """Declare lower <= (f(x) - f(y)) / (x - y) <= upper for this expression; nothing is proved ("assumed")."""
    _REGISTERED[_key(expr, consts)] = (lower, upper)


def registered(expr: Expr, consts: Sequence[Any]) -> tuple[float, float] | None:
    """The slopes declared with `register` for this expression and these constants, or None."""
    try:
        return _REGISTERED.get(_key(expr, consts))
    except jax.errors.TracerArrayConversionError:
        return None


def declared_ends() -> frozenset[str]:
    """The last operations of the expressions that are declared."""
    return frozenset(expr.nodes[-1].op for expr, _ in _REGISTERED)


_SPOTS = np.array(
    [-30, -7.3, -3, -2.2, -1, -0.7, -0.3, -0.05, 0, 0.05, 0.4, 0.8, 1, 1.7, 2.5, 4, 5.9, 8, 30]
)  # fmt: skip


def _references(y: np.ndarray) -> dict[str, np.ndarray]:
    """Values at `_SPOTS` of the activations that have a name; one-parameter families are fitted to `y`."""
    x = _SPOTS
    v = {n: I.VALUE[n](I.point(x))[1] for n in ("tanh", "erf", "logistic", "softplus")}
    normal = 0.5 * (1 + I.VALUE["erf"](I.point(x / np.sqrt(2)))[1])
    negative = np.minimum(x, 0.0)
    alpha, beta = -y[0], -y[np.argmax(x == -1.0)]
    six = np.clip(x + 3, 0, 6) / 6
    return {
        "identity": x, "relu": np.maximum(x, 0), "abs": np.abs(x), "relu6": np.clip(x, 0, 6),
        "hard_tanh": np.clip(x, -1, 1), "hard_sigmoid": six, "hard_swish": x * six, "tanh": v["tanh"],
        "sigmoid": v["logistic"], "silu": x * v["logistic"], "gelu": x * normal,
        "gelu_tanh": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "softplus": v["softplus"],
        "log_sigmoid": x - v["softplus"], "soft_sign": x / (1 + np.abs(x)),
        "mish": x * np.tanh(v["softplus"]),
        "squareplus": (x + np.sqrt(x * x + 4)) / 2, "erf": v["erf"], "sin": np.sin(x), "cos": np.cos(x),
        "sparse_plus": np.where(x <= -1, 0, np.where(x >= 1, x, (x + 1) ** 2 / 4)),
        "selu": 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(negative)),
        "elu": np.where(x > 0, x, alpha * np.expm1(negative)),
        "celu": np.where(x > 0, x, alpha * np.expm1(negative / alpha if alpha > 1e-3 else negative)),
        "leaky_relu": np.where(x > 0, x, beta * x), "clip": np.clip(x, y[0], y[-1]),
    }  # fmt: skip


def known_name(expr: Expr, consts: Sequence[Any]) -> str:
    """A short display name ("relu", "gelu", "leaky_relu", ...) or "elementwise"; a hint, no proof."""
    try:
        arrays = _concrete(consts)
        scalars = [a.reshape(-1)[:1].reshape(()) for a in arrays]
        with I.quiet():
            lo, hi = enclose(expr, scalars, _SPOTS, _SPOTS)
            y = 0.5 * (lo + hi)
            names = _references(y)
    except ValueError:
        return "elementwise"
    for name, values in names.items():
        if np.all(np.abs(values - y) <= 3e-6 * (1 + np.abs(_SPOTS))):
            varies = any(a.size > 1 and np.any(a != a.flat[0]) for a in arrays)
            return {"gelu_tanh": "gelu", "leaky_relu": "prelu" if varies else "leaky_relu"}.get(name, name)
    return "elementwise"
