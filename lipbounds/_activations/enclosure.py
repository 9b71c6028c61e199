"""Rigorous values of an expression at points and on boxes (float64 intervals, NumPy)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lipbounds._activations import intervals as I
from lipbounds._activations.expression import Expr, Node, SlopeError
from lipbounds._activations.intervals import Interval
from lipbounds._activations.pieces import slopes_between

_REMEDY = "use an elementwise primitive with an interval rule"
_MONOTONE = {"floor": np.floor, "ceil": np.ceil, "sign": np.sign}


def _compare(op: str, a: Interval, b: Interval, same: bool) -> Interval:
    """`(must, may)` as booleans."""
    if same:
        flag = np.full(np.shape(a[0]), op in ("le", "ge", "eq"))
        return flag, flag
    if op in ("gt", "ge"):
        op, a, b = {"gt": "lt", "ge": "le"}[op], b, a
    if op == "lt":
        return a[1] < b[0], a[0] < b[1]
    if op == "le":
        return a[1] <= b[0], a[0] <= b[1]
    must = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    may = (a[0] <= b[1]) & (b[0] <= a[1])
    return (must, may) if op == "eq" else (~may, ~must)


def _logic(op: str, args: list[Interval]) -> Interval:
    if op == "not":
        return ~args[0][1], ~args[0][0]
    (a, b), (c, d) = args
    if op == "and":
        return a & c, b & d
    if op == "or":
        return a | c, b | d
    return (a & ~d) | (~b & c), (b & ~c) | (~a & d)


def _round(x: Any, away: bool) -> Any:
    if not away:
        return np.round(x)
    whole = np.trunc(x)
    return np.where(np.abs(x - whole) >= 0.5, whole + np.sign(x), whole)


def _pow(a: Interval, b: Interval) -> tuple[Interval, Any]:
    n = np.asarray(b[0])
    uniform = n.size and np.all(b[0] == b[1]) and np.all(n == n.flat[0])
    if uniform and abs(n.flat[0]) <= 64 and n.flat[0] % 1 == 0:
        k = int(n.flat[0])
        return I.ipow(a, k), (a[0] <= 0) & (a[1] >= 0) & (k < 0)
    return I.exp(I.mul(b, I.log(a))), I.outside("log", a)


def _interp(params: tuple, a: Interval) -> Interval:
    """The range of a piecewise linear function: its values at the ends and at the knots between them."""
    xp, fp = (np.asarray(p, np.float64) for p in params[:2])
    slopes = [I.from_fraction(q) for q in slopes_between(params[0], params[1])]
    zero = (np.float64(0.0), np.float64(0.0))
    slopes = [slopes[0] if params[2][0] else zero, *slopes, slopes[-1] if params[2][1] else zero]
    low, high = (np.array([q[i] for q in slopes]) for i in (0, 1))

    def at(t: Any) -> Interval:
        place = np.searchsorted(xp, t, side="right")
        base = np.maximum(place - 1, 0)
        return I.add(
            I.point(fp[base]), I.mul((low[place], high[place]), I.sub(I.point(t), I.point(xp[base])))
        )

    lo, hi = I.hull(at(a[0]), at(a[1]))
    for knot, value in zip(xp, fp, strict=True):
        inside = (a[0] <= knot) & (knot <= a[1])
        lo, hi = np.where(inside, np.minimum(lo, value), lo), np.where(inside, np.maximum(hi, value), hi)
    return lo, hi


def _node(node: Node, args: list[Interval]) -> tuple[Interval, Any]:
    """The enclosure of one arithmetic operation and where it may be undefined."""
    op = node.op
    a = args[0]
    fine = np.False_
    if op in ("add", "sub", "div"):
        b = args[1]
        zero = (b[0] <= 0) & (b[1] >= 0) if op == "div" else fine
        return {"add": I.add, "sub": I.sub, "div": I.div}[op](a, b), zero
    if op == "mul":
        return (I.ipow(a, 2) if node.args[0] == node.args[1] else I.mul(a, args[1])), fine
    if op in ("max", "min"):
        fn = np.maximum if op == "max" else np.minimum
        return (fn(a[0], args[1][0]), fn(a[1], args[1][1])), fine
    if op == "clamp":
        lo, x, hi = args
        return (np.minimum(np.maximum(x[0], lo[0]), hi[0]), np.minimum(np.maximum(x[1], lo[1]), hi[1])), fine
    if op == "neg":
        return I.neg(a), fine
    if op == "abs":
        return I.absolute(a), fine
    if op in ("square", "integer_pow"):
        n = 2 if op == "square" else int(node.params[0])
        return I.ipow(a, n), (a[0] <= 0) & (a[1] >= 0) & (n < 0)
    if op == "pow":
        return _pow(a, args[1])
    if op in _MONOTONE:
        return (_MONOTONE[op](a[0]), _MONOTONE[op](a[1])), fine
    if op == "round":
        away = not node.params or int(node.params[0]) == 0
        return (_round(a[0], away), _round(a[1], away)), fine
    if op == "interp":
        return _interp(node.params, a), fine
    if op in I.VALUE:
        return I.VALUE[op](a), I.outside(op, a)
    raise SlopeError(f"the primitive {op!r} has no interval rule", _REMEDY)


def enclose(expr: Expr, consts: Sequence[Any], x_lo: Any, x_hi: Any) -> tuple[np.ndarray, np.ndarray]:
    """Float64 arrays with `lo <= f(x) <= hi` for every real x in `[x_lo, x_hi]`, elementwise.

    Shapes broadcast with the constants; constants count with the exact values of their floats, rounding is
    outward. Ends are infinite where f may be undefined or overflow on the box. Raises `ValueError` for
    NaN or reversed ends, `SlopeError` for a primitive without interval rule.
    """
    x = np.asarray(x_lo, np.float64), np.asarray(x_hi, np.float64)
    if not np.all(x[0] <= x[1]):
        raise ValueError("enclose needs x_lo <= x_hi without NaN")
    vals: list[tuple[Interval, Any]] = []
    with I.quiet():
        for node in expr.nodes:
            args, op = [vals[i][0] for i in node.args], node.op
            bad: Any = np.False_
            for i in node.args if op != "select_n" else node.args[:1]:
                bad = bad | vals[i][1]
            if op == "x":
                value: Interval = x
            elif op == "const":
                c = np.asarray(consts[node.params[0]])
                value = (c, c) if c.dtype == np.bool_ else I.point(c)
            elif op in ("lt", "le", "gt", "ge", "eq", "ne"):
                a, b = (I.point(p[0]) if p[0].dtype == np.bool_ and p[0] is p[1] else p for p in args)
                value = _compare(op, a, b, node.args[0] == node.args[1])
            elif op in ("and", "or", "xor", "not"):
                value = _logic(op, args)
            elif op == "to_float":
                value = np.asarray(args[0][0], np.float64), np.asarray(args[0][1], np.float64)
            elif op == "is_finite":
                value = np.isfinite(args[0][0]) & np.isfinite(args[0][1]), np.ones(np.shape(args[0][0]), bool)
            elif op == "select_n":
                (must, may), off, on = args
                value = I.where(must, on, I.where(~may, off, I.hull(off, on)))
                bad_off, bad_on = (vals[i][1] for i in node.args[1:])
                bad = bad | (may & bad_on) | (~must & bad_off)
            else:
                value, extra = _node(node, args)
                bad = bad | extra
            vals.append((value, bad))
    (lo, hi), bad = vals[-1]
    lo, hi, bad = np.broadcast_arrays(lo, hi, bad)
    undefined = bad | np.isnan(lo) | np.isnan(hi)
    return np.where(undefined, -np.inf, lo), np.where(undefined, np.inf, hi)
