"""Interval arithmetic in float64 with outward rounding, vectorised over boxes (NumPy and SciPy on the host).

An interval is a pair `(lo, hi)` of arrays and stands for a set of finite reals inside `[lo, hi]` (so 0
times an unbounded interval is 0). Sums, products, quotients and roots are widened only when they round
(TwoSum, TwoProd); functions of NumPy and SciPy are widened by several times their documented error and
clamped to known ranges.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from scipy import special

Interval = tuple[Any, Any]
_EPS = 2.0**-52
_TINY = 1e-307
_MAX = np.finfo(np.float64).max
WHOLE: Interval = (np.float64(-np.inf), np.float64(np.inf))


def quiet() -> Any:
    """Context in which overflow, underflow and invalid operations are silent (they are handled here)."""
    return np.errstate(all="ignore")


def point(x: Any) -> Interval:
    x = np.asarray(x, np.float64)
    return x, x


def from_fraction(q: Fraction) -> Interval:
    """The tightest float64 pair around the rational `q`."""
    try:
        f = np.float64(float(q))
    except OverflowError:
        f = np.float64(np.inf if q > 0 else -np.inf)
    if np.isinf(f):
        return (_MAX, f) if q > 0 else (f, -_MAX)
    g = Fraction(float(f))
    return (_dn(f) if g > q else f), (_up(f) if g < q else f)


def _dn(x: Any) -> Any:
    return np.nextafter(x, -np.inf)


def _up(x: Any) -> Any:
    return np.nextafter(x, np.inf)


def hull(a: Interval, b: Interval) -> Interval:
    return np.minimum(a[0], b[0]), np.maximum(a[1], b[1])


def clip(a: Interval, lo: Any, hi: Any) -> Interval:
    """`a` cut to `[lo, hi]`, a range known to contain it."""
    return np.clip(a[0], lo, hi), np.clip(a[1], lo, hi)


def where(mask: Any, a: Interval, b: Interval) -> Interval:
    return np.where(mask, a[0], b[0]), np.where(mask, a[1], b[1])


def neg(a: Interval) -> Interval:
    return -a[1], -a[0]


def _sum_error(a: Any, b: Any, s: Any) -> Any:
    t = s - a
    return (a - (s - t)) + (b - t)


def add(a: Interval, b: Interval) -> Interval:
    lo, hi = a[0] + b[0], a[1] + b[1]
    e_lo, e_hi = _sum_error(a[0], b[0], lo), _sum_error(a[1], b[1], hi)
    lo, hi = np.where(e_lo >= 0, lo, _dn(lo)), np.where(e_hi <= 0, hi, _up(hi))
    return np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)


def sub(a: Interval, b: Interval) -> Interval:
    return add(a, neg(b))


def _split(a: Any) -> tuple[Any, Any]:
    t = 134217729.0 * a
    h = t - (t - a)
    return h, a - h


def _product_error(a: Any, b: Any, p: Any) -> Any:
    """`a * b - p` exactly where it is safe to say, NaN elsewhere (Dekker's product)."""
    (ah, al), (bh, bl) = _split(a), _split(b)
    e = al * bl - (((p - ah * bh) - al * bh) - ah * bl)
    safe = (np.abs(a) < 1e150) & (np.abs(b) < 1e150) & (np.abs(p) > 1e-280)
    return np.where((a == 0) | (b == 0), 0.0, np.where(safe, e, np.nan))


def _corners(a: Interval, b: Interval) -> tuple[Any, Any]:
    """The ends of a and of b that can meet, along a new first axis; of points there is one."""
    first, second = (c[:1] if c[0] is c[1] else c for c in (a, b))
    pairs = [np.broadcast_arrays(x, y) for x in first for y in second]
    return np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])


def mul(a: Interval, b: Interval) -> Interval:
    x, y = _corners(a, b)
    p = x * y
    e = _product_error(x, y, p)
    lo, hi = np.where(e >= 0, p, _dn(p)), np.where(e <= 0, p, _up(p))
    nan = np.isnan(p)
    return np.where(nan, 0.0, lo).min(axis=0), np.where(nan, 0.0, hi).max(axis=0)


def div(a: Interval, b: Interval) -> Interval:
    """Quotient; the whole line where the divisor contains 0."""
    x, y = _corners(a, b)
    q = x / y
    p = q * y
    exact = (p == x) & (_product_error(q, y, p) == 0)
    nan = np.isnan(q)
    lo = np.where(nan, 0.0, np.where(exact, q, _dn(q))).min(axis=0)
    hi = np.where(nan, 0.0, np.where(exact, q, _up(q))).max(axis=0)
    zero = (b[0] <= 0) & (b[1] >= 0)
    return np.where(zero, -np.inf, lo), np.where(zero, np.inf, hi)


def absolute(a: Interval) -> Interval:
    inside = (a[0] <= 0) & (a[1] >= 0)
    m, n = np.abs(a[0]), np.abs(a[1])
    return np.where(inside, 0.0, np.minimum(m, n)), np.maximum(m, n)


def ipow(a: Interval, n: int) -> Interval:
    """`a ** n` for any integer `n`; even powers are taken of `|a|`."""
    if n < 0:
        return div(point(1.0), ipow(a, -n))
    if n == 0:
        one = np.ones_like(np.asarray(a[0], np.float64))
        return one, one
    base = absolute(a) if n % 2 == 0 else a
    lo, hi = point(base[0]), point(base[1])  # x**n is increasing on the base: use its ends
    out_lo, out_hi = lo, hi
    for _ in range(n - 1):
        out_lo, out_hi = mul(out_lo, lo), mul(out_hi, hi)
    return out_lo[0], out_hi[1]


def widen(v: Any, w: Any = None, ulps: float = 8.0) -> Interval:
    """`[v, w]` widened by `ulps` relative roundings; an overflow stays a finite lower bound."""
    w = v if w is None else w
    r = (ulps + 2) * _EPS
    lo, hi = v - np.abs(v) * r - _TINY, w + np.abs(w) * r + _TINY
    lo = np.where(np.isinf(v), np.where(v > 0, _MAX, -np.inf), lo)
    hi = np.where(np.isinf(w), np.where(w < 0, -_MAX, np.inf), hi)
    return np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)


def sqrt(a: Interval) -> Interval:
    def root(x: Any) -> tuple[Any, Any]:
        s = np.sqrt(np.maximum(x, 0.0))
        exact = (s * s == x) & (_product_error(s, s, s * s) == 0)
        return np.where(exact, s, np.maximum(_dn(s), 0.0)), np.where(exact, s, _up(s))

    return root(a[0])[0], root(a[1])[1]


def exp(u: Interval) -> Interval:
    lo, hi = widen(np.exp(u[0]), np.exp(u[1]))
    lo = np.where(u[0] >= 0, np.maximum(lo, 1.0), np.maximum(lo, 0.0))
    return lo, np.where(u[1] <= 0, np.minimum(hi, 1.0), hi)


def _signed(fn: Callable[[Any], Any], u: Interval, ulps: float = 8.0, bound: float = np.inf) -> Interval:
    """An increasing odd-signed function (`fn(0) = 0`), clamped to its sign and to `[-bound, bound]`."""
    lo, hi = widen(fn(u[0]), fn(u[1]), ulps)
    lo = np.where(u[0] >= 0, np.maximum(lo, 0.0), lo)
    hi = np.where(u[1] <= 0, np.minimum(hi, 0.0), hi)
    return np.maximum(lo, -bound), np.minimum(hi, bound)


def _decay(e: Interval) -> Interval:
    """`t / (1 + t)^2` for t in `e` inside [0, 1], where it increases; at most 1/4."""

    def g(t: Any) -> Interval:
        return div(point(t), ipow(add(point(1.0), point(t)), 2))

    return clip((g(e[0])[0], g(e[1])[1]), 0.0, 0.25)


def logistic_d(u: Interval) -> Interval:
    return _decay(exp(neg(absolute(u))))


def sech2(u: Interval) -> Interval:
    return mul(point(4.0), logistic_d(mul(point(2.0), u)))


def logistic(u: Interval) -> Interval:
    def at(x: Any) -> Interval:
        e = exp(point(-np.abs(x)))
        d = add(point(1.0), e)
        return where(x >= 0, clip(div(point(1.0), d), 0.5, 1.0), clip(div(e, d), 0.0, 0.5))

    return at(u[0])[0], at(u[1])[1]


def softplus(u: Interval) -> Interval:
    lo, hi = widen(np.logaddexp(0.0, u[0]), np.logaddexp(0.0, u[1]), 16)
    return np.maximum(lo, np.maximum(u[0], 0.0)), hi


_TWO_OVER_SQRT_PI: Interval = (np.float64(1.1283791670955123), np.float64(1.1283791670955130))


def erf_d(u: Interval) -> Interval:
    return mul(_TWO_OVER_SQRT_PI, exp(neg(ipow(u, 2))))


def erfc(u: Interval) -> Interval:
    lo, hi = widen(special.erfc(u[1]), special.erfc(u[0]), 4096)  # Cephes states 6e-14 for large arguments
    lo = np.where(u[1] <= 0, np.maximum(lo, 1.0), lo)
    hi = np.where(u[0] >= 0, np.minimum(hi, 1.0), hi)
    return clip((lo, hi), 0.0, 2.0)


def _contains(u: Interval, phase: float) -> Any:
    """Whether `u` may contain a point `phase + 2 k pi` (errs towards yes)."""
    slack = 1e-9 + 1e-15 * np.maximum(np.abs(u[0]), np.abs(u[1]))
    lo, hi = (u[0] - phase) / (2 * np.pi) - slack, (u[1] - phase) / (2 * np.pi) + slack
    return np.logical_not(np.ceil(lo) > np.floor(hi))


def _wave(fn: Callable[[Any], Any], top: float, u: Interval) -> Interval:
    a, b = fn(u[0]), fn(u[1])
    lo, hi = widen(np.minimum(a, b), np.maximum(a, b), 16)
    hi = np.where(_contains(u, top), 1.0, hi)
    lo = np.where(_contains(u, top + np.pi), -1.0, lo)
    far = np.isnan(a) | np.isnan(b) | (np.maximum(np.abs(u[0]), np.abs(u[1])) > 1e8)
    return clip((np.where(far, -1.0, lo), np.where(far, 1.0, hi)), -1.0, 1.0)


def sin(u: Interval) -> Interval:
    out = _wave(np.sin, np.pi / 2, u)
    return where((u[0] == 0) & (u[1] == 0), point(0.0), out)


def cos(u: Interval) -> Interval:
    return _wave(np.cos, 0.0, u)


def cosh(u: Interval) -> Interval:
    a = absolute(u)
    lo, hi = widen(np.cosh(a[0]), np.cosh(a[1]))
    return np.maximum(lo, 1.0), np.maximum(hi, 1.0)


def log(u: Interval) -> Interval:
    lo, hi = widen(np.log(u[0]), np.log(u[1]))
    return np.where(u[0] >= 1, np.maximum(lo, 0.0), lo), np.where(u[1] <= 1, np.minimum(hi, 0.0), hi)


def power(u: Interval, c: float) -> Interval:
    """`u ** c` for non-negative `u` and an exact float exponent."""
    lo, hi = widen(np.power(u[0], c), np.power(u[1], c))
    lo2, hi2 = widen(np.power(u[1], c), np.power(u[0], c))
    return (np.maximum(lo, 0.0), hi) if c >= 0 else (np.maximum(lo2, 0.0), hi2)


def _one_minus_sq(u: Interval) -> Interval:
    return sub(point(1.0), ipow(u, 2))


def _one_plus_sq(u: Interval) -> Interval:
    return add(point(1.0), ipow(u, 2))


def _inv(u: Interval) -> Interval:
    return div(point(1.0), u)


_LN2: Interval = (np.float64(0.6931471805599453), np.float64(0.6931471805599454))


def _exp2(u: Interval) -> Interval:
    lo, hi = widen(np.exp2(u[0]), np.exp2(u[1]))
    return np.maximum(lo, 0.0), hi


def _acos(u: Interval) -> Interval:
    lo, hi = widen(np.arccos(u[1]), np.arccos(u[0]), 16)
    return np.maximum(lo, 0.0), hi


def _expm1(u: Interval) -> Interval:
    lo, hi = _signed(np.expm1, u)
    return np.maximum(lo, -1.0), hi


def _rsqrt(u: Interval) -> Interval:
    return _inv(sqrt(u))


Fn = Callable[[Interval], Interval]
VALUE: dict[str, Fn] = {
    "exp": exp, "exp2": _exp2, "expm1": _expm1, "log": log, "log1p": lambda u: _signed(np.log1p, u),
    "tanh": lambda u: _signed(np.tanh, u, bound=1.0), "logistic": logistic, "softplus": softplus,
    "erf": lambda u: _signed(special.erf, u, 16, bound=1.0), "erfc": erfc, "sqrt": sqrt, "rsqrt": _rsqrt,
    "cbrt": lambda u: _signed(np.cbrt, u), "sin": sin, "cos": cos, "tan": lambda u: div(sin(u), cos(u)),
    "atan": lambda u: _signed(np.arctan, u), "asinh": lambda u: _signed(np.arcsinh, u),
    "sinh": lambda u: _signed(np.sinh, u), "cosh": cosh, "acos": _acos,
    "asin": lambda u: _signed(np.arcsin, u),
    "acosh": lambda u: _signed(np.arccosh, u), "atanh": lambda u: _signed(np.arctanh, u),
}  # fmt: skip
FIRST: dict[str, Fn] = {
    "exp": exp, "exp2": lambda u: mul(_LN2, _exp2(u)), "expm1": exp, "log": _inv,
    "log1p": lambda u: _inv(add(point(1.0), u)), "tanh": sech2, "logistic": logistic_d, "softplus": logistic,
    "erf": erf_d, "erfc": lambda u: neg(erf_d(u)), "sqrt": lambda u: mul(point(0.5), _rsqrt(u)),
    "rsqrt": lambda u: mul(point(-0.5), _inv(mul(u, sqrt(u)))),
    "cbrt": lambda u: _inv(mul(point(3.0), ipow(VALUE["cbrt"](u), 2))),
    "sin": cos, "cos": lambda u: neg(sin(u)), "tan": lambda u: _inv(ipow(cos(u), 2)),
    "atan": lambda u: _inv(_one_plus_sq(u)), "asinh": lambda u: _rsqrt(_one_plus_sq(u)), "sinh": cosh,
    "cosh": VALUE["sinh"], "asin": lambda u: _rsqrt(_one_minus_sq(u)),
    "acos": lambda u: neg(_rsqrt(_one_minus_sq(u))),
    "acosh": lambda u: _rsqrt(sub(ipow(u, 2), point(1.0))), "atanh": lambda u: _inv(_one_minus_sq(u)),
}  # fmt: skip
SECOND: dict[str, Fn] = {
    "exp": exp, "exp2": lambda u: mul(mul(_LN2, _LN2), _exp2(u)), "expm1": exp,
    "log": lambda u: neg(_inv(ipow(u, 2))), "log1p": lambda u: neg(_inv(ipow(add(point(1.0), u), 2))),
    "tanh": lambda u: mul(point(-2.0), mul(VALUE["tanh"](u), sech2(u))),
    "logistic": lambda u: neg(mul(logistic_d(u), VALUE["tanh"](mul(point(0.5), u)))), "softplus": logistic_d,
    "erf": lambda u: mul(point(-2.0), mul(u, erf_d(u))), "erfc": lambda u: mul(point(2.0), mul(u, erf_d(u))),
    "sqrt": lambda u: mul(point(-0.25), _inv(mul(u, sqrt(u)))), "sin": lambda u: neg(sin(u)),
    "cos": lambda u: neg(cos(u)), "sinh": VALUE["sinh"], "cosh": cosh,
    "atan": lambda u: neg(div(mul(point(2.0), u), ipow(_one_plus_sq(u), 2))),
    "asinh": lambda u: neg(div(u, mul(_one_plus_sq(u), sqrt(_one_plus_sq(u))))),
}  # fmt: skip


def outside(op: str, u: Interval) -> Any:
    """Whether `u` may leave the domain of `op` (boolean array)."""
    lo, hi = u
    if op == "sqrt":
        return np.logical_not(lo >= 0)
    if op in ("log", "rsqrt"):
        return np.logical_not(lo > 0)
    if op == "log1p":
        return np.logical_not(lo > -1)
    if op in ("asin", "acos"):
        return np.logical_not((lo >= -1) & (hi <= 1))
    if op == "atanh":
        return np.logical_not((lo > -1) & (hi < 1))
    if op == "acosh":
        return np.logical_not(lo >= 1)
    if op == "tan":
        c = cos(u)
        return (c[0] <= 0) & (c[1] >= 0)
    return np.zeros(np.shape(lo), bool)
