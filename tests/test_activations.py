"""Slope ranges and enclosures against the truth: searches of f' in float64, exact rationals, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from lipbounds._activations import activations as act
from lipbounds._activations import intervals as I
from lipbounds._activations.activations import enclose, evaluate, slope_range
from lipbounds._activations.expression import Expr, Node, SlopeError
from lipbounds._activations.pieces import resolve
from lipbounds._activations.tails import tail_slopes
from lipbounds._activations.terms import Domain, Terms


def expr_of(fn: Callable[..., Any], shape: tuple[int, ...] = (3,)) -> tuple[Expr, tuple[Any, ...]]:
    """A tiny tracer for elementwise functions (the real one is tested elsewhere)."""
    closed = jax.make_jaxpr(fn)(jnp.ones(shape, jnp.float32))
    nodes, consts = [Node("x")], []

    def put(node: Node) -> int:
        nodes.append(node)
        return len(nodes) - 1

    def const(c: Any) -> int:
        consts.append(np.asarray(c))
        return put(Node("const", (), (len(consts) - 1,)))

    def run(jaxpr: Any, values: Any, args: list[int]) -> list[int]:
        env = dict(zip(jaxpr.constvars, [const(c) for c in values], strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(v: Any) -> int:
            return const(v.val) if isinstance(v, Literal) else env[v]

        for q in jaxpr.eqns:
            a, name = [read(v) for v in q.invars], q.primitive.name
            inner = q.params.get("jaxpr", q.params.get("call_jaxpr"))
            if inner is not None:
                out = run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), a)
            elif name == "convert_element_type" and q.invars[0].aval.dtype == jnp.bool_:
                out = [put(Node("to_float", (a[0],)))]
            elif name in ("convert_element_type", "broadcast_in_dim", "reshape", "stop_gradient", "copy"):
                out = [a[0]]
            else:
                rounding = (int(q.params["rounding_method"]),) if name == "round" else ()
                out = [put(Node(name, tuple(a), (q.params["y"],) if name == "integer_pow" else rounding))]
            env.update(zip(q.outvars, out, strict=True))
        return [read(v) for v in jaxpr.outvars]

    (last,) = run(closed.jaxpr, closed.consts, [0])
    if last != len(nodes) - 1:
        put(Node("max", (last, last)))
    return Expr(tuple(nodes)), tuple(consts)


def searched(expr: Expr, consts: tuple[Any, ...], limits: tuple[float, ...]) -> tuple[float, float]:
    """The extreme derivatives found by a dense search in float64, refined thrice, and ``limits``."""
    with jax.enable_x64(True):
        wide = tuple(c if c.dtype == np.bool_ else c.astype(np.float64) for c in consts)
        slope = jax.jit(jax.vmap(jax.grad(lambda x: evaluate(expr, wide, x))))
        found = list(limits)
        for pick in (np.argmin, np.argmax):
            a, b = -30.0, 30.0
            for _ in range(4):
                x = np.linspace(a, b, 40001) + 1e-12
                d = np.asarray(slope(x))
                k = int(pick(d))
                found.append(float(d[k]))
                a, b = x[max(k - 2, 0)], x[min(k + 2, len(x) - 1)]
    return min(found), max(found)


nn = jax.nn
# name, function, limits of f' at infinity or one-sided at kinks that a search cannot attain
ZOO: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "relu": (nn.relu, (0.0, 1.0)),
    "leaky_relu": (nn.leaky_relu, (1.0,)),
    "elu": (nn.elu, (0.0, 1.0)),
    "elu2": (lambda x: nn.elu(x, 2.0), (0.0, 2.0)),
    "celu": (nn.celu, (0.0, 1.0)),
    "celu_half": (lambda x: nn.celu(x, 0.5), (0.0, 1.0)),
    "selu": (nn.selu, (0.0, 1.0507009873554805 * 1.6732632423543772)),
    "gelu_exact": (lambda x: nn.gelu(x, approximate=False), ()),
    "gelu_tanh": (lambda x: nn.gelu(x, approximate=True), ()),
    "silu": (nn.silu, ()),
    "swish_1.7": (lambda x: x * nn.sigmoid(1.7 * x), ()),
    "softplus": (nn.softplus, (0.0, 1.0)),
    "tanh": (jnp.tanh, (0.0, 1.0)),
    "sigmoid": (nn.sigmoid, (0.0, 0.25)),
    "sigmoid_by_hand": (lambda x: 1.0 / (1.0 + jnp.exp(-x)), (0.0, 0.25)),
    "softplus_by_hand": (lambda x: jnp.log(1.0 + jnp.exp(x)), (0.0, 1.0)),
    "hard_tanh": (nn.hard_tanh, (0.0, 1.0)),
    "relu6": (nn.relu6, (0.0, 1.0)),
    "hard_sigmoid": (nn.hard_sigmoid, (0.0, 1 / 6)),
    "hard_swish": (nn.hard_swish, (-0.5, 1.5)),
    "soft_sign": (nn.soft_sign, (0.0, 1.0)),
    "mish": (nn.mish, ()),
    "squareplus": (nn.squareplus, (0.0, 1.0)),
    "sparse_plus": (nn.sparse_plus, (0.0, 1.0)),
    "log_sigmoid": (nn.log_sigmoid, (0.0, 1.0)),
    "log_of_sigmoid": (lambda x: jnp.log(nn.sigmoid(x)), (0.0, 1.0)),
    "log_of_1_over": (lambda x: jnp.log(1.0 / (1.0 + jnp.exp(3.0 * x))), (-3.0, 0.0)),
    "log_of_cosh": (lambda x: jnp.log(jnp.cosh(2.0 * x)), (-2.0, 2.0)),
    "sparse_sigmoid": (nn.sparse_sigmoid, (0.0, 0.5)),
    "hard_silu": (nn.hard_silu, (-0.5, 1.5)),
    "softshrink_where": (
        lambda x: jnp.where(x > 0.5, x - 0.5, jnp.where(x < -0.5, x + 0.5, 0.0)),
        (0.0, 1.0),
    ),
    "softshrink_of_abs": (lambda x: jnp.where(jnp.abs(x) > 0.5, x - 0.5 * jnp.sign(x), 0.0), (0.0, 1.0)),
    "softshrink_relus": (lambda x: nn.relu(x - 0.5) - nn.relu(-x - 0.5), (0.0, 1.0)),
    "abs": (jnp.abs, (-1.0, 1.0)),
    "clip": (lambda x: jnp.clip(x, -2.0, 0.5), (0.0, 1.0)),
    "identity": (lambda x: x + 0.0, (1.0,)),
    "affine": (lambda x: 3.0 - x / 4.0, (-0.25,)),
    "x_times_step": (lambda x: x * (x > 0).astype(x.dtype), (0.0, 1.0)),
    "where_shifted": (lambda x: jnp.where(x > 1, 2 * x - 1, x), (1.0, 2.0)),
    "sin": (jnp.sin, (-1.0, 1.0)),
    "snake": (lambda x: x + jnp.sin(x) ** 2, (0.0, 2.0)),
    "erf": (jax.scipy.special.erf, (0.0,)),
    "atan": (jnp.arctan, (0.0, 1.0)),
    "asinh": (jnp.arcsinh, (0.0, 1.0)),
    "gauss": (lambda x: jnp.exp(-x * x), ()),
    "cauchy": (lambda x: 1.0 / (1.0 + x * x), ()),
    "log_quadratic": (lambda x: jnp.log(1.0 + x * x), ()),
    "tanhshrink": (lambda x: x - jnp.tanh(x), (0.0, 1.0)),
    "log_cosh": (lambda x: jnp.logaddexp(x, -x), (-1.0, 1.0)),
    "charbonnier": (lambda x: jnp.sqrt(x * x + 0.25), (-1.0, 1.0)),
    "softshrink": (lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0.0), (0.0, 1.0)),
    "abs_of_tanh": (lambda x: jnp.abs(jnp.tanh(x)), (-1.0, 1.0)),
    "smooth_gate": (lambda x: x * nn.sigmoid((jnp.abs(x) - 0.5) / 0.05), ()),
    "nan_guard": (lambda x: jnp.where(jnp.isnan(x), 0, x), (1.0,)),
    "nan_to_num": (jnp.nan_to_num, (1.0,)),
    "constant_log_2": (lambda x: jnp.tanh(x + nn.softplus(0.0 * x)), (0.0, 1.0)),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ZOO)
def test_slopes_enclose_the_truth_within_1e_6(name: str) -> None:
    fn, limits = ZOO[name]
    expr, consts = expr_of(fn)
    lower, upper = slope_range(expr, consts)
    assert lower.shape == upper.shape == np.broadcast_shapes(*(c.shape for c in consts))
    lo, hi = searched(expr, consts, limits)
    rounding = 1e-12 * max(1.0, abs(lo), abs(hi))
    assert lower <= lo + rounding and upper >= hi - rounding
    assert lower >= lo - 1e-6 and upper <= hi + 1e-6


@pytest.mark.parametrize(
    "name", ["relu", "hard_tanh", "relu6", "clip", "sparse_plus", "x_times_step", "softplus"]
)
def test_piecewise_linear_and_saturating_ranges_are_exactly_0_1(name: str) -> None:
    lower, upper = slope_range(*expr_of(ZOO[name][0]))
    assert float(lower) == 0.0 and float(upper) == 1.0


def test_slopes_known_from_the_literature() -> None:
    # GELU (Hendrycks and Gimpel 2016): f'' vanishes at sqrt 2. SiLU and mish: maxima of f' by calculus.
    gelu = 0.5 * (1 + 0.8427007929497149) + np.exp(-1.0) / np.sqrt(np.pi)  # Phi(sqrt 2) + sqrt 2 phi(sqrt 2)
    assert slope_range(*expr_of(ZOO["gelu_exact"][0]))[1] == pytest.approx(gelu, abs=1e-6)
    assert slope_range(*expr_of(nn.silu))[1] == pytest.approx(1.0998393, abs=1e-6)
    assert slope_range(*expr_of(nn.mish))[1] == pytest.approx(1.0884982, abs=1e-6)
    # x / (1 + x^2) style extremum of exp(-x^2): sqrt(2 / e)
    assert slope_range(*expr_of(ZOO["gauss"][0]))[1] == pytest.approx(np.sqrt(2 / np.e), abs=1e-6)


def test_constants_count_channel_by_channel_with_their_float_values() -> None:
    alpha = np.array([0.1, 0.25, -0.3, 0.1], np.float32)
    expr, consts = expr_of(lambda x: jnp.where(x > 0, x, alpha * x), (4,))
    lower, upper = slope_range(expr, consts)
    assert np.array_equal(lower, alpha.astype(np.float64)) and np.array_equal(upper, np.ones(4))
    assert slope_range(*expr_of(nn.leaky_relu))[0] == float(np.float32(0.01))
    scale = Expr(
        (
            Node("x"),
            Node("const", (), (0,)),
            Node("mul", (0, 1)),
            Node("const", (), (1,)),
            Node("max", (2, 3)),
        )
    )
    lower, upper = slope_range(scale, (np.float32([[2.0], [-3.0]]), np.zeros(5, np.float32)))
    assert lower.shape == (2, 5)
    assert np.array_equal(lower, np.repeat([[0.0], [-3.0]], 5, 1))
    assert np.array_equal(upper, np.repeat([[2.0], [0.0]], 5, 1))


def test_narrow_and_distant_features_are_not_missed() -> None:
    steep = slope_range(*expr_of(lambda x: jnp.tanh(1e6 * (x - 0.1234567))))
    assert steep[1] == pytest.approx(1e6, rel=1e-6)
    bump = slope_range(*expr_of(lambda x: x + jnp.exp(-((x - 5000.0) ** 2))))
    assert bump[1] == pytest.approx(1 + np.sqrt(2 / np.e), rel=1e-6)
    flat = slope_range(*expr_of(lambda x: jnp.tanh(1e-5 * x)))
    assert flat[1] == float(np.float32(1e-5)) and 0 <= flat[0] + 1e-12


TAILS: dict[str, Callable[..., Any]] = {
    "tanh": lambda x: jnp.tanh(5 * x),
    "logistic": lambda x: nn.sigmoid(9 * x),
    "softplus": lambda x: jnp.log1p(jnp.exp(9 * x)),
    "erf": lambda x: jax.scipy.special.erf(3 * x),
    "erfc": lambda x: x * jax.scipy.special.erfc(-3 * x),
    "exp": lambda x: jnp.exp(-5 * x * x),
    "swish": lambda x: x * nn.sigmoid(9 * x),
    "quotient": lambda x: x / (1 + x * x),
    "root": lambda x: jnp.sqrt(2 + x * x) - 0.5 * x,
    "atan": lambda x: x * jnp.arctan(2 * x),
    "asinh": jnp.arcsinh,
    "cbrt": jnp.cbrt,
    "mixed": lambda x: jnp.maximum(jnp.tanh(5 * x), x) + jnp.abs(x) / (3 + x * x) + jnp.expm1(-9 * x * x),
}


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("reflect", [False, True])
def test_tails_bound_all_derivatives_beyond_1(name: str, reflect: bool) -> None:
    expr, consts = expr_of(TAILS[name])
    terms = Terms()
    side = Domain(None, Fraction(-1)) if reflect else Domain(Fraction(1), None)
    term = resolve(terms, expr, [Fraction(float(c)) for c in consts], terms.poly([0, 1]), side)
    lower, upper = tail_slopes(terms, term, 0, reflect)
    with jax.enable_x64(True):
        wide = tuple(c.astype(np.float64) for c in consts)
        x = np.geomspace(1.0, 70.0, 2000) * (-1 if reflect else 1)
        d = np.asarray(jax.vmap(jax.grad(lambda x: evaluate(expr, wide, x)))(x))
    assert np.all(lower <= d + 1e-13) and np.all(d <= upper + 1e-13)
    assert upper - lower < 6


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "hard_threshold_1e-9": (lambda x: jnp.where(jnp.abs(x) <= 1e-9, 0.0, x), "it jumps at -1e-09"),
    "threshold": (lambda x: jnp.where(x > 0.75, x, 0.0), "it jumps at 0.75"),
    "step": (lambda x: (x > 0).astype(x.dtype), "it jumps at 0"),
    "point_value": (lambda x: jnp.where(x == 2, 5.0, x), "it jumps at 2"),
    "tiny_jump": (lambda x: jnp.where(x > 0.1, jnp.tanh(x), jnp.tanh(x) + 1e-12), "it jumps at 0.1"),
    "sign": (jnp.sign, "it jumps at 0"),
    "floor": (jnp.floor, "jumps at every integer"),
    "round": (jnp.round, "jumps at every half-integer"),
    "square": (lambda x: x**2, "unbounded"),
    "product": (lambda x: x * x, "unbounded"),
    "cube": (lambda x: x**3, "unbounded"),
    "exp": (jnp.exp, "unbounded"),
    "sin_of_square": (lambda x: jnp.sin(x * x), "unbounded"),
    "sqrt": (jnp.sqrt, "not defined on all reals"),
    "sqrt_abs": (lambda x: jnp.sqrt(jnp.abs(x)), "unbounded or too large near x = "),
    "inverse": (lambda x: 1 / x, "not defined on all reals"),
    "log": (jnp.log, "not defined on all reals"),
    "tan": (jnp.tan, "not defined on all reals"),
    "curved_comparison": (lambda x: jnp.where(x * x > 1, x, x), "not affine in x"),
    "no_rule": (jax.lax.lgamma, "'lgamma' has no slope rule"),
    "nan_constant": (lambda x: x + jnp.float32(np.nan), "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why_and_what_to_do(name: str) -> None:
    fn, reason = REFUSED[name]
    with pytest.raises(SlopeError, match=reason) as caught:
        slope_range(*expr_of(fn))
    assert reason.strip() in caught.value.reason + " " and caught.value.remedy


def random_expr(rng: np.random.Generator) -> tuple[Expr, tuple[Any, ...]]:
    nodes, consts = [Node("x")], []
    unary = [
        "tanh",
        "logistic",
        "erf",
        "abs",
        "neg",
        "sin",
        "exp",
        "sqrt",
        "atan",
        "log1p",
        "asinh",
        "square",
        "expm1",
    ]
    for _ in range(int(rng.integers(2, 9))):
        i, j = (int(k) for k in rng.integers(0, len(nodes), 2))
        i = len(nodes) - 1 if rng.random() < 0.6 else i
        kind = rng.random()
        if kind < 0.35:
            nodes.append(Node(str(rng.choice(unary)), (i,)))
        elif kind < 0.65:
            nodes.append(Node(str(rng.choice(["add", "sub", "mul", "div", "max", "min"])), (i, j)))
        else:
            consts.append(np.float32(rng.choice([-2.0, -1.0, 0.0, 0.1, 0.5, 1.0, 3.0])))
            nodes.append(Node("const", (), (len(consts) - 1,)))
            if rng.random() < 0.3:
                nodes += [Node("gt", (i, len(nodes) - 1)), Node("select_n", (len(nodes), j, i))]
            else:
                nodes.append(Node(str(rng.choice(["add", "mul", "max", "min"])), (i, len(nodes) - 1)))
    return Expr(tuple(nodes)), tuple(consts)


def test_random_compositions_never_exceed_their_proved_slopes() -> None:
    """Difference quotients enclosed by interval values, so no tolerance: near and far pairs, tails."""
    rng = np.random.default_rng(7)
    x = np.concatenate([rng.normal(size=300) * s for s in (1e-3, 1.0, 10.0, 300.0, 1e5, 1e9)])
    y = np.concatenate([x + rng.normal(size=x.size) * 1e-4 * np.abs(x), rng.permutation(x)])
    x = np.concatenate([x, x])
    distinct = x != y
    x, y = x[distinct], y[distinct]
    accepted = curved = 0
    for _ in range(250):
        expr, consts = random_expr(rng)
        try:
            lower, upper = slope_range(expr, consts)
        except SlopeError:
            continue
        accepted += 1
        curved += lower < upper
        f, g = enclose(expr, consts, x, x), enclose(expr, consts, y, y)
        with np.errstate(all="ignore"):
            q = I.div(I.sub(f, g), I.sub(I.point(x), I.point(y)))
        assert np.all(q[0] <= upper) and np.all(q[1] >= lower), (expr, consts)
    assert accepted > 70 and curved > 40


def test_enclosures_contain_exact_rationals_and_float64_values() -> None:
    expr = Expr(
        (Node("x"), Node("const", (), (0,)), Node("mul", (0, 1)), Node("const", (), (1,)),
         Node("add", (2, 3)),
         Node("square", (4,)), Node("const", (), (2,)), Node("div", (5, 6)), Node("sub", (7, 0)))
    )  # fmt: skip
    rng = np.random.default_rng(0)
    a, b, c = np.float32([0.1, -3.7, 1e-20]), np.float32([1.3, 0.2, 5.0]), np.float32(3.0)
    x = rng.normal(size=(50, 3)) * 10.0 ** rng.integers(-8, 8, size=(50, 3))
    lo, hi = enclose(expr, (a, b, c), x, x)
    wide_lo, wide_hi = enclose(expr, (a, b, c), x - np.abs(x) * 1e-3, x + np.abs(x) * 1e-3)
    for i, j in np.ndindex(x.shape):
        t = Fraction(x[i, j])
        exact = (t * Fraction(float(a[j])) + Fraction(float(b[j]))) ** 2 / 3 - t
        assert Fraction(lo[i, j]) <= exact <= Fraction(hi[i, j])
        assert wide_lo[i, j] <= lo[i, j] and hi[i, j] <= wide_hi[i, j]
    for name in ("gelu_exact", "mish", "selu", "hard_swish", "snake", "smooth_gate"):
        expr, consts = expr_of(ZOO[name][0])
        with jax.enable_x64(True):
            z = np.linspace(-20, 20, 401)
            value = np.asarray(evaluate(expr, consts, jnp.asarray(z)))
        lo, hi = enclose(expr, consts, z, z)
        assert np.all(lo <= value + 1e-14) and np.all(hi >= value - 1e-14) and np.all(hi - lo < 1e-9)


def test_enclose_refuses_bad_boxes_and_marks_undefined_values() -> None:
    expr, consts = expr_of(jnp.log)
    lo, hi = enclose(expr, consts, [-1.0, 1.0], [2.0, 1.0])
    assert lo[0] == -np.inf and hi[0] == np.inf and lo[1] == hi[1] == 0.0
    for ends in ((np.nan, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="x_lo <= x_hi"):
            enclose(expr, consts, *ends)


@pytest.mark.parametrize("op", ["add", "mul", "div", "sqrt", "ipow"])
def test_interval_operations_contain_exact_results(op: str) -> None:
    rng = np.random.default_rng(3)
    special = [0.0, -1.0, 1e-310, 5e-324, -1e-170, 1e200, 0.1, 1 + 2.0**-52, -3.0]
    a = np.concatenate([special, rng.normal(size=200) * 10.0 ** rng.integers(-150, 150, 200)])
    b = rng.permutation(a)
    if op == "sqrt":
        a = np.abs(a)
    b = np.where(b == 0, 7.0, b)
    with I.quiet():
        lo, hi = {
            "add": lambda: I.add(I.point(a), I.point(b)), "mul": lambda: I.mul(I.point(a), I.point(b)),
            "div": lambda: I.div(I.point(a), I.point(b)), "sqrt": lambda: I.sqrt(I.point(a)),
            "ipow": lambda: I.ipow(I.point(a), 3),
        }[op]()  # fmt: skip
    for x, y, p, q in zip(a, b, lo, hi, strict=True):
        s, t = Fraction(float(x)), Fraction(float(y))
        low = -(Fraction(10) ** 400) if p == -np.inf else Fraction(float(p))
        high = Fraction(10) ** 1000 if q == np.inf else Fraction(float(q))
        if op == "sqrt":
            assert low >= 0 and low**2 <= s <= high**2
        else:
            exact = {"add": s + t, "mul": s * t, "div": s / t, "ipow": s**3}[op]
            assert (low <= exact or p == -np.inf) and (exact <= high or q == np.inf)
    one = I.add(I.mul(I.point(3.0), I.point(0.25)), I.point(0.25))
    assert one[0] == one[1] == 1.0  # nothing is widened that does not round


def test_evaluate_agrees_with_the_function_under_jit_vmap_and_grad() -> None:
    x = jnp.linspace(-3.0, 3.0, 31)
    for name in ("gelu_exact", "softshrink", "x_times_step"):
        fn = ZOO[name][0]
        expr, consts = expr_of(fn)

        def run(x: jax.Array, expr: Expr = expr, consts: Any = consts) -> jax.Array:
            return evaluate(expr, consts, x)

        assert np.allclose(run(x), fn(x), atol=1e-6)
        assert np.allclose(jax.jit(run)(x), jax.vmap(run)(x), atol=1e-6)
        assert np.all(np.isfinite(jax.vmap(jax.grad(run))(x)))
        assert run(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
        assert hash(expr) == hash(expr_of(fn)[0]) and expr == expr_of(fn)[0]
    act.register_primitive("test_scaled", lambda params, x: x * params[0])
    opaque = Expr((Node("x"), Node("test_scaled", (0,), (2,))))
    assert np.allclose(evaluate(opaque, (), x), 2 * x)
    with pytest.raises(SlopeError, match="no slope rule"):
        slope_range(opaque, ())
    with pytest.raises(ValueError, match="no evaluation rule"):
        evaluate(Expr((Node("x"), Node("unheard_of", (0,)))), (), x)


def test_traced_constants() -> None:
    expr, consts = expr_of(lambda x: jnp.where(x > 0, x, np.float32([0.1, 0.2, 3.0]) * x))
    where = next(k for k, c in enumerate(consts) if c.shape == (3,))

    def slopes(a: jax.Array) -> tuple[jax.Array, jax.Array]:
        return act.piecewise_linear_slopes(expr, tuple(a if k == where else c for k, c in enumerate(consts)))

    a = jnp.array([0.1, 0.2, 3.0])
    lower, upper = jax.jit(slopes)(a)
    exact = slope_range(expr, consts)
    assert np.array_equal(lower, exact[0].astype(np.float32)) and np.array_equal(
        upper, exact[1].astype(np.float32)
    )
    assert np.array_equal(jax.grad(lambda a: slopes(a)[1].sum())(a), [0.0, 0.0, 1.0])
    leak = Expr((Node("x"), Node("const", (), (0,)), Node("mul", (0, 1)), Node("max", (0, 2))))
    assert jax.jit(lambda a: act.piecewise_linear_slopes(leak, (a,)))(jnp.float32(0.3))[0] == jnp.float32(0.3)
    swish = Expr(
        (Node("x"), Node("const", (), (0,)), Node("mul", (0, 1)), Node("logistic", (2,)), Node("mul", (0, 3)))
    )
    shifted = Expr((Node("x"), Node("const", (), (0,)), Node("max", (0, 1))))
    with pytest.raises(SlopeError, match="being traced"):
        jax.jit(lambda a: act.piecewise_linear_slopes(swish, (a,)))(jnp.float32(1.0))
    assert jax.jit(lambda a: act.piecewise_linear_slopes(shifted, (a,)))(jnp.float32(1.0)) == (0.0, 1.0)
    for expr2 in (swish, shifted):
        with pytest.raises(SlopeError, match="being traced"):
            jax.jit(lambda a, e=expr2: slope_range(e, (a,))[0])(jnp.float32(1.0))


def test_register_is_by_value() -> None:
    expr, consts = expr_of(lambda x: jnp.where(x > 0.625, x, 0.0))
    assert act.registered(expr, consts) is None
    act.register(expr, consts, -1.0, 2.0)
    assert act.registered(expr, tuple(np.full((4,), c) for c in consts)) == (-1.0, 2.0)
    assert act.registered(expr, tuple(c + 1 for c in consts)) is None


def test_known_names() -> None:
    expected = {
        "relu": "relu", "leaky_relu": "leaky_relu", "gelu_exact": "gelu", "gelu_tanh": "gelu", "silu": "silu",
        "elu": "elu", "elu2": "elu", "selu": "selu", "celu_half": "celu", "softplus": "softplus",
        "mish": "mish",
        "hard_tanh": "hard_tanh", "relu6": "relu6", "sigmoid_by_hand": "sigmoid", "x_times_step": "relu",
        "clip": "clip", "identity": "identity", "snake": "elementwise", "soft_sign": "soft_sign",
    }  # fmt: skip
    assert {k: act.known_name(*expr_of(ZOO[k][0])) for k in expected} == expected
    alpha = np.float32([0.1, 0.2, 0.3])
    assert act.known_name(*expr_of(lambda x: jnp.maximum(x, alpha * x))) == "prelu"
