"""Proved enclosures of f and f' on a whole half line `[M, inf)` by power envelopes.

A quantity g(x) has the envelope `(p, lo, hi)` if `g(x)` is in `x**p * [lo, hi]` for all `x >= M`.
Powers are multiples of 1/6, M is a power of 2**6, so `M**p` is exact. What decays like `exp(-c x**q)`
is put into `x**-8 * [0, M**8 exp(-c M**q)]` (the product decreases once `c q M**q >= 8`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lipbounds._activations import intervals as I
from lipbounds._activations.intervals import Interval
from lipbounds._activations.terms import Terms

_ZERO: Interval = (0.0, 0.0)
_FIXED_AT_ZERO = frozenset("expm1 log1p tanh erf sin tan atan asinh sinh asin atanh".split())


@dataclass(frozen=True)
class Envelope:
    p: Fraction
    a: Interval


class TailError(Exception):
    """The tail leaves the domain of an operation (`str` names it)."""


def _const(a: Interval) -> Envelope:
    return Envelope(Fraction(0), (float(a[0]), float(a[1])))


_ONE = _const((1.0, 1.0))


@dataclass(frozen=True)
class Tail:
    """Envelopes on `[2**k, inf)` of a term in `t`, where `x = t` or `x = -t` (`reflect`)."""

    k: int
    reflect: bool

    def power(self, p: Fraction) -> Interval:
        """`M ** p`."""
        e = self.k * p
        if e.denominator == 1 and abs(e) < 1000:
            return I.point(2.0 ** int(e))
        return (0.0, 1e-300) if e < 0 and abs(e) >= 1000 else I.VALUE["exp2"](I.from_fraction(e))

    def span(self, p: Fraction) -> Interval:
        """`x ** p` over the tail."""
        if p == 0:
            return I.point(1.0)
        m = self.power(p)
        return (m[0], np.inf) if p > 0 else (0.0, m[1])

    def range(self, e: Envelope) -> Interval:
        return I.mul(self.span(e.p), e.a)

    def add(self, e: Envelope, f: Envelope) -> Envelope:
        if e.a == _ZERO or f.a == _ZERO:
            return f if e.a == _ZERO else e
        if e.p < f.p:
            e, f = f, e
        return Envelope(e.p, _plain(I.add(e.a, I.mul(f.a, self.span(f.p - e.p)))))

    def mul(self, e: Envelope, f: Envelope) -> Envelope:
        return Envelope(e.p + f.p, _plain(I.mul(e.a, f.a)))

    def scale(self, c: Interval, e: Envelope) -> Envelope:
        return Envelope(e.p, _plain(I.mul(c, e.a)))

    def div(self, e: Envelope, f: Envelope) -> Envelope:
        return Envelope(e.p - f.p, _plain(I.div(e.a, f.a)))

    def decay(self, c: float, q: Fraction) -> Envelope | None:
        """Envelope of something in `[0, exp(-c x**q)]`, or None if the bound is not yet decreasing."""
        m = I.mul(I.point(c), self.power(q))
        if not (c > 0 and q > 0 and float(q) * m[0] >= 8.001):
            return None
        top = I.mul(self.power(Fraction(8)), I.exp(I.neg((m[0], m[0]))))[1]
        return Envelope(Fraction(-8), (0.0, float(top)))

    def unary(self, op: str, u: Envelope) -> tuple[Envelope, Envelope]:
        """Envelopes of `op(u)` and of its derivative at u."""
        span = self.range(u)
        if np.any(I.outside(op, span)):
            raise TailError(op)
        value, slope = _const(I.VALUE[op](span)), _const(I.FIRST[op](span))
        lo, hi = u.a
        if op in _FIXED_AT_ZERO and u.p <= 0:  # op(u) = u * op'(somewhere between 0 and u)
            value = Envelope(u.p, _plain(I.mul(u.a, I.FIRST[op](I.hull(span, I.point(0.0))))))
        if u.p <= 0 or (lo <= 0 <= hi):
            return self._algebraic(op, u, value, slope)
        size = min(abs(lo), abs(hi))
        e = self.decay(size, u.p)
        if op in ("exp", "expm1") and hi < 0 and e is not None:
            return (e, e) if op == "exp" else (self.add(_const((-1.0, -1.0)), e), e)
        if op in ("logistic", "softplus") and e is not None:
            near_one = self.add(_ONE, self.scale((-1.0, 0.0), e))
            if op == "logistic":
                return (e if hi < 0 else near_one), e
            return (e, e) if hi < 0 else (self.add(u, e), near_one)
        e2 = self.decay(2 * size, u.p)
        if op == "tanh" and e2 is not None:
            one = self.add(_ONE, self.scale((-2.0, 0.0), e2))
            return (one if lo > 0 else self.scale((-1.0, -1.0), one)), self.scale((0.0, 4.0), e2)
        square = float(I.mul(I.point(size), I.point(size))[0])
        g = self.decay(square, 2 * u.p)
        if op in ("erf", "erfc") and g is not None:
            rest = self.scale((0.0, 1.0), g)  # erfc(u) <= exp(-u^2) for u >= 0
            d = self.scale((0.0, 1.1283791670955130), g)
            if op == "erfc":
                two = self.add(_const((2.0, 2.0)), self.scale((-1.0, 0.0), g))
                return (rest if lo > 0 else two), self.scale((-1.0, -1.0), d)
            one = self.add(_ONE, self.scale((-1.0, 0.0), g))
            return (one if lo > 0 else self.scale((-1.0, -1.0), one)), d
        return self._algebraic(op, u, value, slope)

    def _algebraic(self, op: str, u: Envelope, value: Envelope, slope: Envelope) -> tuple[Envelope, Envelope]:
        lo, hi = u.a
        if op in ("sqrt", "rsqrt") and lo > 0:
            root = Envelope(u.p / 2, _plain(I.sqrt(u.a)))
            if op == "sqrt":
                return root, self.div(_const((0.5, 0.5)), root)
            return self.div(_ONE, root), self.div(_const((-0.5, -0.5)), self.mul(u, root))
        if op == "cbrt" and (lo > 0 or hi < 0):
            root = Envelope(u.p / 3, _plain(I.VALUE["cbrt"](u.a)))
            return root, self.div(_ONE, self.scale((3.0, 3.0), self.mul(root, root)))
        if op in ("atan", "asinh") and (lo > 0 or hi < 0):
            base = self.add(_ONE, self.mul(u, u))
            if op == "atan":
                return value, self.div(_ONE, base)
            root = Envelope(base.p / 2, _plain(I.sqrt(base.a)))
            return Envelope(u.p, _plain(I.mul(u.a, (0.0, 1.0)))), self.div(_ONE, root)
        if op in ("log", "log1p") and u.p > 0 and lo > 0:
            w = u if op == "log" else self.add(_ONE, u)
            m = self.power(Fraction(1))  # log x <= x * log(M) / M for x >= M >= e
            ratio = (0.0, float(I.div(I.VALUE["log"](m), m)[1]))
            logs = self.scale(_plain(I.from_fraction(w.p)), Envelope(Fraction(1), ratio))
            return self.add(_const(I.VALUE["log"](w.a)), logs), self.div(_ONE, w)
        return value, slope

    def poly(self, c: Sequence[Fraction]) -> tuple[Envelope, Envelope]:
        value = slope = Envelope(Fraction(0), _ZERO)
        for n, q in enumerate(c):
            s = -q if self.reflect and n % 2 else q
            value = self.add(value, Envelope(Fraction(n), I.from_fraction(s)))
            if n:
                slope = self.add(slope, Envelope(Fraction(n - 1), I.from_fraction(n * s)))
        return value, slope

    def power_of(self, u: Envelope, n: int) -> Envelope:
        return Envelope(u.p * n, _plain(I.ipow(u.a, n)))


def _plain(a: Interval) -> Interval:
    return float(a[0]), float(a[1])


def tail_slopes(terms: Terms, term: int, k: int, reflect: bool) -> Interval:
    """(lo, hi) with lo <= f'(x) <= hi for all x >= 2**k (x <= -2**k if `reflect`); they may be infinite.

    `k` is a multiple of 6. Raises `TailError` if f may not be defined there.
    """
    tail = Tail(k, reflect)
    done: dict[int, tuple[Envelope, Envelope]] = {}
    with I.quiet():
        for i in terms.reachable(term):
            t = terms.items[i]
            args = [done[j] for j in t.args]
            done[i] = _step(tail, t.op, args, t.param)
        lo, hi = tail.range(done[term][1])
        return (-float(hi), -float(lo)) if reflect else (float(lo), float(hi))


def _step(
    tail: Tail, op: str, args: list[tuple[Envelope, Envelope]], param: object
) -> tuple[Envelope, Envelope]:
    if op == "poly":
        return tail.poly(param)  # type: ignore[arg-type]
    u, du = args[0]
    if op == "scale":
        c = I.from_fraction(param)  # type: ignore[arg-type]
        return tail.scale(c, u), tail.scale(c, du)
    if op == "ipow":
        n: int = param  # type: ignore[assignment]
        return tail.power_of(u, n), tail.mul(tail.scale((float(n), float(n)), tail.power_of(u, n - 1)), du)
    if op == "abs":
        if u.a[0] >= 0:
            return u, du
        if u.a[1] <= 0:
            return tail.scale((-1.0, -1.0), u), tail.scale((-1.0, -1.0), du)
        return Envelope(u.p, _plain(I.absolute(u.a))), tail.scale((-1.0, 1.0), du)
    if op == "pow":
        q: Fraction = param  # type: ignore[assignment]
        if not (u.a[0] > 0 and float(q) == q and float(q - 1) == q - 1):
            raise TailError(op)
        value = Envelope(u.p * q, _plain(I.power(u.a, float(q))))
        slope = Envelope(u.p * (q - 1), _plain(I.power(u.a, float(q - 1))))
        return value, tail.mul(tail.scale(I.from_fraction(q), slope), du)
    if op in ("add", "mul", "div", "max", "min"):
        (v, dv) = args[1]
        if op == "add":
            return tail.add(u, v), tail.add(du, dv)
        if op == "mul":
            return tail.mul(u, v), tail.add(tail.mul(du, v), tail.mul(u, dv))
        if op == "div":
            if v.a[0] <= 0 <= v.a[1]:
                raise TailError(op)
            q2 = tail.div(u, v)
            return q2, tail.div(tail.add(du, tail.scale((-1.0, -1.0), tail.mul(q2, dv))), v)
        gap = tail.add(u, tail.scale((-1.0, -1.0), v)).a
        if gap[0] >= 0 or gap[1] <= 0:
            return args[0] if (gap[0] >= 0) == (op == "max") else args[1]
        return _const(I.hull(tail.range(u), tail.range(v))), _const(I.hull(tail.range(du), tail.range(dv)))
    value, slope = tail.unary(op, u)
    return value, tail.mul(slope, du)
