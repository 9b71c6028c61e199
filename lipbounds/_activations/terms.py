"""Exact terms in one variable, interned: terms with equal ids are equal functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lipbounds._activations.expression import DECLARE, SlopeError

_MAX_DEGREE = 6


UNARY = frozenset(
    "exp exp2 expm1 log log1p tanh logistic softplus erf erfc sqrt rsqrt cbrt sin cos tan atan asinh acosh "
    "atanh sinh cosh asin acos".split()
)


_PARTIAL = frozenset("log log1p sqrt rsqrt tan acosh atanh asin acos div pow".split())


_KNOWN: dict[tuple[str, Fraction | int], Fraction | int] = {
    ("exp", 0): 1, ("expm1", 0): 0, ("log", 1): 0, ("tanh", 0): 0, ("logistic", 0): Fraction(1, 2),
    ("erf", 0): 0, ("erfc", 0): 1, ("sin", 0): 0, ("cos", 0): 1, ("tan", 0): 0, ("atan", 0): 0,
    ("asinh", 0): 0, ("sinh", 0): 0, ("cosh", 0): 1, ("asin", 0): 0,
    ("acos", 1): 0, ("acosh", 1): 0, ("atanh", 0): 0,
}  # fmt: skip


DOMAIN_REMEDY = (
    "keep the argument inside the domain (1 + x**2, jnp.maximum(x, c), jnp.clip), or use another function"
)


Poly = tuple[Fraction, ...]


Value = Any  # a term id (int), a bool (decided predicate) or +-inf (float): what a node of an Expr becomes


class Split(Exception):
    """A comparison changes inside the interval, at the rational `at`."""

    def __init__(self, at: Fraction) -> None:
        super().__init__(at)
        self.at = at


@dataclass(frozen=True)
class Domain:
    """The open interval `(left, right)`; `None` is infinite."""

    left: Fraction | None
    right: Fraction | None


@dataclass(frozen=True)
class Term:
    op: str
    args: tuple[int, ...]
    param: Any = None


def _root(c: Fraction, n: int) -> Fraction | None:
    """The rational n-th root (n = 2 or 3) of `c` if there is one."""
    sign, c = (-1 if c < 0 else 1), abs(c)

    def integer(k: int) -> int | None:
        r = math.isqrt(k) if n == 2 else round(k ** (1 / 3)) if k < 2**150 else 0
        return r if r**n == k else None

    num, den = integer(c.numerator), integer(c.denominator)
    return None if num is None or den is None else sign * Fraction(num, den)


class Terms:
    """A table of interned terms: equal ids mean equal functions."""

    def __init__(self) -> None:
        self.items: list[Term] = []
        self._ids: dict[Term, int] = {}
        self._total: list[bool] = []

    def _intern(self, op: str, args: tuple[int, ...], param: Any = None) -> int:
        term = Term(op, args, param)
        i = self._ids.get(term)
        if i is None:
            i = self._ids[term] = len(self.items)
            self.items.append(term)
            self._total.append(op not in _PARTIAL and all(self._total[a] for a in args))
        return i

    def poly(self, coefficients: Sequence[Fraction | int]) -> int:
        c = [Fraction(q) for q in coefficients]
        while c and c[-1] == 0:
            c.pop()
        return self._intern("poly", (), tuple(c))

    def coefficients(self, i: int) -> Poly | None:
        t = self.items[i]
        return t.param if t.op == "poly" else None

    def constant(self, i: int) -> Fraction | None:
        """The rational value of a constant polynomial, else None."""
        c = self.coefficients(i)
        return None if c is None or len(c) > 1 else (c[0] if c else Fraction(0))

    def scale(self, q: Fraction, i: int) -> int:
        t = self.items[i]
        if t.op == "poly":
            return self.poly([q * c for c in t.param])
        if q == 1 or (q == 0 and not self._total[i]):
            return i if q == 1 else self._intern("scale", (i,), q)
        if q == 0:
            return self.poly([])
        return self.scale(q * t.param, t.args[0]) if t.op == "scale" else self._intern("scale", (i,), q)

    def add(self, i: int, j: int) -> int:
        a, b = self.coefficients(i), self.coefficients(j)
        if a is not None and b is not None:
            n = max(len(a), len(b))
            pad_a, pad_b = a + (Fraction(0),) * (n - len(a)), b + (Fraction(0),) * (n - len(b))
            return self.poly([p + q for p, q in zip(pad_a, pad_b, strict=True)])
        if a == () or b == ():
            return j if a == () else i
        if self._total[i] and self.negative(j) == i:
            return self.poly([])
        return self._intern("add", (min(i, j), max(i, j)))

    def mul(self, i: int, j: int) -> int:
        a, b = self.coefficients(i), self.coefficients(j)
        for p, other in ((a, j), (b, i)):
            if p is not None and len(p) <= 1:
                return self.scale(p[0] if p else Fraction(0), other)
        if a is not None and b is not None and len(a) + len(b) - 2 <= _MAX_DEGREE:
            out = [Fraction(0)] * (len(a) + len(b) - 1)
            for m, c in enumerate(a):
                for n, q in enumerate(b):
                    out[m + n] += c * q
            return self.poly(out)
        for s, other in ((i, j), (j, i)):
            if self.items[s].op == "scale" and self.items[s].param != 0:
                return self.scale(self.items[s].param, self.mul(self.items[s].args[0], other))
        return self.power(i, 2) if i == j else self._intern("mul", (min(i, j), max(i, j)))

    def power(self, i: int, n: int) -> int:
        """`term ** n` for an integer n."""
        if n < 0:
            return self.div(self.poly([1]), self.power(i, -n))
        if n <= 1:
            return i if n else self.poly([1])
        c = self.coefficients(i)
        if c is not None and (len(c) <= 1 or (len(c) - 1) * n <= _MAX_DEGREE):
            if n > 1024:
                raise SlopeError(f"a power of {n} is too large", DECLARE)
            if len(c) <= 1:
                return self.poly([self.constant(i) ** n])  # type: ignore[operator]
            out = i
            for _ in range(n - 1):
                out = self.mul(out, i)
            return out
        t = self.items[i]
        if t.op == "scale" and t.param != 0:
            return self.scale(t.param**n, self.power(t.args[0], n))
        if t.op == "sin" and n == 2:  # sin(u)^2 = (1 - cos 2u) / 2
            double = self.unary("cos", self.scale(Fraction(2), t.args[0]))
            return self.add(self.poly([Fraction(1, 2)]), self.scale(Fraction(-1, 2), double))
        return self._intern("ipow", (i,), n)

    def div(self, i: int, j: int) -> int:
        q = self.constant(j)
        if q == 0:
            raise SlopeError("it is not defined on all reals: a division by zero", DOMAIN_REMEDY)
        if q is not None:
            return self.scale(1 / q, i)
        u = self._one_plus_exp(j)
        if u is not None:  # a / (1 + exp u) = a * logistic(-u)
            return self.mul(i, self.unary("logistic", self.negative(u)))
        return self._intern("div", (i, j))

    def _one_plus_exp(self, i: int) -> int | None:
        t = self.items[i]
        if t.op == "add":
            for a, b in (t.args, t.args[::-1]):
                if self.constant(a) == 1 and self.items[b].op == "exp":
                    return self.items[b].args[0]
        return None

    def negative(self, i: int) -> int:
        return self.scale(Fraction(-1), i)

    def unary(self, op: str, i: int) -> int:
        q, t = self.constant(i), self.items[i]
        if op == "log1p" and t.op == "exp":
            return self.unary("softplus", t.args[0])
        if op == "log":
            u = self._one_plus_exp(i)
            if u is not None:
                return self.unary("softplus", u)
            if t.op == "logistic":  # log(1 / (1 + exp -u)) = -softplus(-u)
                return self.negative(self.unary("softplus", self.negative(t.args[0])))
            if t.op == "cosh":  # softplus(2u) - u - log 2
                both = self.unary("softplus", self.scale(Fraction(2), t.args[0]))
                less = self.add(t.args[0], self.unary("log", self.poly([2])))
                return self.add(both, self.negative(less))
        if q is None:
            return self._intern(op, (i,))
        if op == "softplus" and q == 0:
            return self.unary("log", self.poly([2]))
        if op == "log1p":
            return self.unary("log", self.poly([1 + q]))
        if (op in ("log", "rsqrt") and q <= 0) or (op == "sqrt" and q < 0):
            raise SlopeError(f"it is not defined on all reals: {op} of {float(q):g}", DOMAIN_REMEDY)
        exact = _KNOWN.get((op, q))
        if op == "exp2" and q.denominator == 1 and abs(q) < 1024:
            exact = Fraction(2) ** int(q)
        elif op in ("sqrt", "rsqrt"):
            root = _root(q, 2)
            exact = root if op == "sqrt" or root is None else 1 / root
        elif op == "cbrt":
            exact = _root(q, 3)
        return self._intern(op, (i,)) if exact is None else self.poly([Fraction(exact)])

    def raised(self, i: int, j: int) -> int:
        """`term_i ** term_j`: a constant exponent, or a positive constant base."""
        n, base = self.constant(j), self.constant(i)
        if n is not None and n.denominator == 1:
            return self.power(i, int(n))
        if n is not None:
            return self._intern("pow", (i,), n)
        if base is not None and base > 0:
            return self.unary("exp", self.mul(self.unary("log", i), j))
        raise SlopeError("pow with both base and exponent depending on x has no slope rule", DECLARE)

    def extreme(self, op: str, i: int, j: int) -> int:
        """`max` or `min` of two terms whose order is not decided (constants are)."""
        p, q = self.constant(i), self.constant(j)
        if p is not None and q is not None:
            return i if (p >= q) == (op == "max") else j
        return i if i == j else self._intern(op, (min(i, j), max(i, j)))

    def magnitude(self, i: int) -> int:
        q = self.constant(i)
        return self._intern("abs", (i,)) if q is None else self.poly([abs(q)])

    def at(self, i: int, c: Fraction) -> int:
        """The term at `x = c`, exactly (a constant polynomial where exact values are known)."""
        memo: dict[int, int] = {}
        for k in self.reachable(i):
            t = self.items[k]
            a = [memo[j] for j in t.args]
            if t.op == "poly":
                memo[k] = self.poly([sum((p * c**n for n, p in enumerate(t.param)), Fraction(0))])
            elif t.op == "scale":
                memo[k] = self.scale(t.param, a[0])
            elif t.op == "ipow":
                memo[k] = self.power(a[0], t.param)
            elif t.op == "pow":
                memo[k] = self.raised(a[0], self.poly([t.param]))
            elif t.op in ("max", "min"):
                memo[k] = self.extreme(t.op, a[0], a[1])
            elif t.op == "abs":
                memo[k] = self.magnitude(a[0])
            elif t.op in UNARY:
                memo[k] = self.unary(t.op, a[0])
            else:
                memo[k] = {"add": self.add, "mul": self.mul, "div": self.div}[t.op](a[0], a[1])
        return memo[i]

    def reachable(self, i: int) -> list[int]:
        """`i` and every term below it, arguments first."""
        seen, stack = {i}, [i]
        while stack:
            for a in self.items[stack.pop()].args:
                if a not in seen:
                    seen.add(a)
                    stack.append(a)
        return sorted(seen)

    def sign(self, i: int, domain: Domain) -> int | None:
        """The constant sign of an affine term on the interval, which splits at a root; None if not affine."""
        c = self.coefficients(i)
        if c is None or len(c) > 2:
            return None
        if len(c) < 2:
            return (c[0] > 0) - (c[0] < 0) if c else 0
        root, slope = -c[0] / c[1], (1 if c[1] > 0 else -1)
        if domain.right is not None and root >= domain.right:
            return -slope
        if domain.left is not None and root <= domain.left:
            return slope
        raise Split(root)
