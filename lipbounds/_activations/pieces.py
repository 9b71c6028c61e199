"""Exact resolution of an expression into smooth pieces, and the proof that they meet without a jump.

Arithmetic is rational. On an open interval where every comparison, `abs`, `max`, `min` and `sign`
of affine quantities is decided, an expression becomes a *term*: a hash-consed expression without
comparisons, with polynomials in x folded exactly. A comparison whose affine difference vanishes inside the
interval splits it there, so breakpoints are exact rationals and no grid decides anything.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from lipbounds._activations.expression import DECLARE, REPLACE, Expr, SlopeError
from lipbounds._activations.terms import UNARY, Domain, Split, Terms, Value

_MAX_PIECES = 256
_COMPARE = frozenset("lt le gt ge eq ne".split())
_UNBOUNDED = frozenset("lgamma digamma erf_inv rem nextafter".split())  # of x itself, or jumping
_STEP = (
    "use a continuous function in its place; if the whole is continuous, "
    "its slopes can be declared with register_activation"
)


@dataclass(frozen=True)
class Piece:
    domain: Domain
    term: int


def _compare(terms: Terms, op: str, a: Value, b: Value, domain: Domain) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        if op in ("eq", "ne"):
            return (bool(a) == bool(b)) == (op == "eq")
        raise SlopeError(f"{op} of booleans has no slope rule", DECLARE)
    sign: int | None
    if isinstance(a, float) or isinstance(b, float):
        fa, fb = (a if isinstance(a, float) else 0.0), (b if isinstance(b, float) else 0.0)
        sign = (fa > fb) - (fa < fb)
    else:
        sign = 0 if a == b else terms.sign(terms.add(a, terms.negative(b)), domain)
    if sign is None:
        raise SlopeError(
            f"the comparison {op!r} is of quantities that are not affine in x, so continuity is not proved",
            "compare x, scaled and shifted, with a constant, or declare slopes with register_activation",
        )
    return bool(getattr(operator, op)(sign, 0))


def _extreme(terms: Terms, op: str, a: Value, b: Value, domain: Domain) -> Value:
    for p, q in ((a, b), (b, a)):
        if isinstance(p, float):
            return p if (p > 0) == (op == "max") else q
    sign = 0 if a == b else terms.sign(terms.add(a, terms.negative(b)), domain)
    if sign is None:
        return terms.extreme(op, a, b)
    return a if (sign >= 0) == (op == "max") else b


def _steps(terms: Terms, op: str, a: int, params: tuple, domain: Domain) -> int:
    """sign, floor, ceil and round: constant where decided, refused where they jump."""
    if op == "sign":
        sign = terms.sign(a, domain)
        if sign is not None:
            return terms.poly([sign])
        raise SlopeError("it contains the sign of a quantity that is not affine in x, which may jump", _STEP)
    q = terms.constant(a)
    if q is None:
        raise SlopeError(
            f"it contains {op}, which jumps at every {'half-' if op == 'round' else ''}integer", _STEP
        )
    if op == "floor":
        return terms.poly([math.floor(q)])
    if op == "ceil":
        return terms.poly([math.ceil(q)])
    away = not params or int(params[0]) == 0
    half_up = math.floor(abs(q) + Fraction(1, 2)) * (1 if q > 0 else -1)
    return terms.poly([half_up if away else round(q)])


def slopes_between(xp: Sequence[float], fp: Sequence[float]) -> list[Fraction]:
    """The exact slopes of the piecewise linear function through the knots."""
    return [
        (Fraction(fp[k + 1]) - Fraction(fp[k])) / (Fraction(xp[k + 1]) - Fraction(xp[k]))
        for k in range(len(xp) - 1)
    ]


def _interpolate(terms: Terms, a: int, params: tuple, domain: Domain) -> int:
    """The line of a piecewise linear function on which the term `a` lies."""
    xp, fp, (left, right) = params
    low, high = 0, len(xp)  # the term lies right of `low` knots, left of the rest
    while low < high:
        k = (low + high) // 2
        sign = terms.sign(terms.add(a, terms.poly([-Fraction(xp[k])])), domain)
        if sign is None:
            raise SlopeError("it interpolates at a quantity that is not affine in x", DECLARE)
        low, high = (k + 1, high) if sign >= 0 else (low, k)
    first = min(max(low - 1, 0), len(xp) - 2)
    if (low == 0 and not left) or (low == len(xp) and not right):
        return terms.poly([Fraction(fp[0 if low == 0 else -1])])
    slope = slopes_between(xp[first : first + 2], fp[first : first + 2])[0]
    line = terms.scale(slope, terms.add(a, terms.poly([-Fraction(xp[first])])))
    return terms.add(line, terms.poly([Fraction(fp[first])]))


def resolve(terms: Terms, expr: Expr, consts: Sequence[Any], x: int, domain: Domain) -> int:
    """The term of `expr` with its variable replaced by term `x` on the open interval `domain`.

    Raises `Split` where a decision changes inside and `SlopeError` where one cannot be made
    exactly.
    """
    vals: list[Value] = []
    for node in expr.nodes:
        op, a = node.op, [vals[i] for i in node.args]
        if op in _COMPARE:
            v: Value = _compare(terms, op, a[0], a[1], domain)
        elif op == "x":
            v = x
        elif op == "const":
            c = consts[node.params[0]]
            v = terms.poly([c]) if isinstance(c, Fraction) else c
        elif op == "select_n":
            if len(a) != 3 or not isinstance(a[0], bool):
                raise SlopeError(
                    "a selection by something other than one comparison has no slope rule", DECLARE
                )
            v = a[2] if a[0] else a[1]
        elif op == "interp" and isinstance(a[0], int) and not isinstance(a[0], bool):
            v = _interpolate(terms, a[0], node.params, domain)
        elif op in ("and", "or", "xor", "not") and all(isinstance(p, bool) for p in a):
            v = {"not": not a[0], "and": a[0] and a[-1], "or": a[0] or a[-1], "xor": a[0] != a[-1]}[op]
        elif op == "to_float":
            v = terms.poly([int(a[0])]) if isinstance(a[0], bool) else a[0]
        elif op == "is_finite":
            v = not isinstance(a[0], float)
        elif op in ("max", "min") and not any(isinstance(p, bool) for p in a):
            v = _extreme(terms, op, a[0], a[1], domain)
        elif op == "clamp":
            v = _extreme(terms, "min", _extreme(terms, "max", a[1], a[0], domain), a[2], domain)
        elif op == "neg" and isinstance(a[0], float):
            v = -a[0]
        elif op == "abs" and isinstance(a[0], float):
            v = abs(a[0])
        elif any(isinstance(p, (bool, float)) for p in a):
            what = "a boolean" if any(isinstance(p, bool) for p in a) else "an infinite constant"
            raise SlopeError(f"{op} of {what} has no slope rule", DECLARE)
        else:
            v = _arithmetic(terms, op, a, node.params, domain)
        vals.append(v)
    if isinstance(vals[-1], (bool, float)):
        raise SlopeError("the result is a predicate or infinite, not a real number", DECLARE)
    return vals[-1]


def _arithmetic(terms: Terms, op: str, a: list[int], params: tuple, domain: Domain) -> int:
    if op == "add":
        return terms.add(a[0], a[1])
    if op == "sub":
        return terms.add(a[0], terms.negative(a[1]))
    if op == "mul":
        return terms.mul(a[0], a[1])
    if op == "div":
        return terms.div(a[0], a[1])
    if op == "neg":
        return terms.negative(a[0])
    if op == "abs":
        sign = terms.sign(a[0], domain)
        return terms.magnitude(a[0]) if sign is None else terms.scale(Fraction(sign), a[0]) if sign else a[0]
    if op in ("square", "integer_pow"):
        return terms.power(a[0], 2 if op == "square" else int(params[0]))
    if op == "pow":
        return terms.raised(a[0], a[1])
    if op in ("sign", "floor", "ceil", "round"):
        return _steps(terms, op, a[0], params, domain)
    if op in UNARY:
        return terms.unary(op, a[0])
    unbounded = op in _UNBOUNDED and any(terms.coefficients(i) is not None for i in a)
    raise SlopeError(f"the primitive {op!r} has no slope rule", REPLACE if unbounded else DECLARE)


def _limit(terms: Terms, term: int, c: Fraction) -> int:
    """The value of a piece at its end."""
    try:
        return terms.at(term, c)
    except SlopeError as error:
        reason = f"it cannot be bounded here: what a branch tends to at x = {float(c):.9g} is not known"
        raise SlopeError(f"{reason} ({error.reason})", DECLARE) from error


def pieces(
    terms: Terms, expr: Expr, consts: Sequence[Any]
) -> tuple[list[Piece], list[tuple[Fraction, int, int, int]]]:
    """The smooth pieces of an expression from left to right, and `(c, left, here, right)` at every breakpoint c.

    `left`, `here` and `right` are the constant terms f(c-0), f(c), f(c+0). Neighbours with the same
    term are joined.
    """
    identity = terms.poly([0, 1])
    work, out = [Domain(None, None)], []
    while work:
        domain = work.pop()
        try:
            out.append(Piece(domain, resolve(terms, expr, consts, identity, domain)))
        except Split as split:
            work += [Domain(split.at, domain.right), Domain(domain.left, split.at)]
        if len(work) + len(out) > _MAX_PIECES:
            raise SlopeError(f"it has more than {_MAX_PIECES} pieces", DECLARE)
    joints = []
    for left, right in pairwise(out):
        c = left.domain.right
        assert c is not None
        here = resolve(terms, expr, consts, terms.poly([c]), Domain(c, c))
        joints.append((c, _limit(terms, left.term, c), here, _limit(terms, right.term, c)))
    joined: list[Piece] = []
    for piece in out:
        if joined and joined[-1].term == piece.term:
            joined[-1] = Piece(Domain(joined[-1].domain.left, piece.domain.right), piece.term)
        else:
            joined.append(piece)
    return joined, joints
