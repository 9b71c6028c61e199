"""Proved slope ranges of one scalar function: exact pieces, branch and bound on boxes, proved tails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from lipbounds._activations import intervals as I
from lipbounds._activations.expression import DECLARE, Expr, SlopeError
from lipbounds._activations.intervals import Interval
from lipbounds._activations.pieces import pieces
from lipbounds._activations.tails import TailError, tail_slopes
from lipbounds._activations.terms import DOMAIN_REMEDY, Domain, Terms

_BOUNDED = "clip its argument first (jnp.clip(x, -c, c)), or use a function of bounded slope such as jnp.sqrt(1 + x**2)"
_SMOOTH = "smooth it there (jnp.sqrt(x**2 + c) in place of jnp.sqrt(jnp.abs(x))), or use a function of bounded slope"
_STEEP = 1e6  # an attained slope beyond this cannot be declared
_TOLERANCE = 1e-8
_MAX_BOXES = 40_000
_MAX_BROKEN = 3_000
_MAX_LEVELS = 160
_TAILS = (6, 12, 18, 24, 36, 48, 60)


@dataclass(frozen=True)
class Jet:
    """Enclosures of f, f' and f'' on boxes; `bad` marks boxes where f may be undefined."""

    v: Interval
    d: Interval
    s: Interval
    bad: Any


_ZERO = I.point(0.0)


def _poly(c: Sequence[Fraction], x: Interval, bend: bool) -> Jet:
    def horner(q: Sequence[Fraction]) -> Interval:
        if not q:
            return _ZERO
        out: Interval = I.from_fraction(q[-1])
        for p in q[-2::-1]:
            out = I.mul(out, x)
            out = I.add(out, I.from_fraction(p)) if p else out
        return out

    first = [n * q for n, q in enumerate(c)][1:]
    second = [n * q for n, q in enumerate(first)][1:]
    return Jet(horner(c), horner(first), horner(second) if bend else I.WHOLE, False)


def _chain(u: Jet, v: Interval, g: Interval, h: Interval | None, bad: Any) -> Jet:
    """The jet of g(u) from g, g', g'' at u (where g'' is None, f'' is the whole line)."""
    s = I.WHOLE if h is None else I.add(I.mul(h, I.ipow(u.d, 2)), I.mul(g, u.s))
    return Jet(v, I.mul(g, u.d), s, u.bad | bad)


def _pow(u: Jet, q: Fraction) -> Jet:
    c = float(q)
    if c != q or float(q - 1) != q - 1:
        raise SlopeError(f"the exponent {c:g} is too small or large for the slope rule of pow", DECLARE)
    bad = np.logical_not(u.v[0] > 0 if c < 1 else u.v[0] >= 0)
    g = I.mul(I.point(c), I.power(u.v, c - 1))
    return _chain(u, I.power(u.v, c), g, None, bad)


def _pick(mask_a: Any, mask_b: Any, a: Jet, b: Jet, v: Interval) -> Jet:
    """`a` or `b` where decided; elsewhere (on the kink too) both slopes, f'' unknown."""
    mask_a, mask_b = mask_a & np.logical_not(mask_b), mask_b & np.logical_not(mask_a)
    d = I.where(mask_a, a.d, I.where(mask_b, b.d, I.hull(a.d, b.d)))
    return Jet(v, d, I.where(mask_a, a.s, I.where(mask_b, b.s, I.WHOLE)), a.bad | b.bad)


def _jet(op: str, a: list[Jet], param: Any, x: Interval, bend: bool) -> Jet:
    """The jet of one operation; without `bend` f'' is the whole line."""
    if op == "poly":
        return _poly(param, x, bend)
    u = a[0]
    s = I.WHOLE
    if op == "scale":
        c = I.from_fraction(param)
        return Jet(I.mul(c, u.v), I.mul(c, u.d), I.mul(c, u.s) if bend else s, u.bad)
    if op == "add":
        s = I.add(u.s, a[1].s) if bend else s
        return Jet(I.add(u.v, a[1].v), I.add(u.d, a[1].d), s, u.bad | a[1].bad)
    if op == "mul":
        w = a[1]
        if bend:
            cross = I.mul(I.point(2.0), I.mul(u.d, w.d))
            s = I.add(I.add(I.mul(u.s, w.v), cross), I.mul(u.v, w.s))
        return Jet(I.mul(u.v, w.v), I.add(I.mul(u.d, w.v), I.mul(u.v, w.d)), s, u.bad | w.bad)
    if op == "div":
        w = a[1]
        q = I.div(u.v, w.v)
        d = I.div(I.sub(u.d, I.mul(q, w.d)), w.v)
        if bend:
            s = I.div(I.sub(I.sub(u.s, I.mul(I.point(2.0), I.mul(d, w.d))), I.mul(q, w.s)), w.v)
        return Jet(q, d, s, u.bad | w.bad | ((w.v[0] <= 0) & (w.v[1] >= 0)))
    if op == "ipow":
        n = int(param)
        g = I.mul(I.point(float(n)), I.ipow(u.v, n - 1))
        h = I.mul(I.point(float(n) * (n - 1)), I.ipow(u.v, n - 2)) if bend else None
        return _chain(u, I.ipow(u.v, n), g, h, False)
    if op == "pow":
        return _pow(u, param)
    if op == "abs":
        minus = Jet(I.neg(u.v), I.neg(u.d), I.neg(u.s), u.bad)
        return _pick(u.v[0] >= 0, u.v[1] <= 0, u, minus, I.absolute(u.v))
    if op in ("max", "min"):
        w = a[1]
        above, below = u.v[0] >= w.v[1], u.v[1] <= w.v[0]
        fn = np.maximum if op == "max" else np.minimum
        v = fn(u.v[0], w.v[0]), fn(u.v[1], w.v[1])
        return _pick(above, below, u, w, v) if op == "max" else _pick(below, above, u, w, v)
    second = I.SECOND.get(op) if bend else None
    return _chain(u, I.VALUE[op](u.v), I.FIRST[op](u.v), second(u.v) if second else None, I.outside(op, u.v))


def jets(terms: Terms, term: int, x: Interval, *, bend: bool = True) -> dict[int, Jet]:
    """Jets of `term` and of everything below it on the boxes `x`; without `bend`, f'' is not computed."""
    done: dict[int, Jet] = {}
    for i in terms.reachable(term):
        t = terms.items[i]
        jet = _jet(t.op, [done[j] for j in t.args], t.param, x, bend)
        c = terms.coefficients(t.args[0]) if bend and t.op == "sqrt" else None
        # For the square root of a quadratic u, f'' = (4 c2 c0 - c1^2) / (4 u sqrt u) does not cancel.
        if c is not None and len(c) == 3:
            d = I.from_fraction(c[2] * c[0] - c[1] * c[1] / 4)
            jet = Jet(jet.v, jet.d, I.div(d, I.mul(done[t.args[0]].v, jet.v)), jet.bad)
        done[i] = jet
    return done


@dataclass
class Range:
    """Range of the slopes: `[lo, hi]` encloses those proved so far, `[inf, sup]` is attained."""

    lo: float = np.inf
    hi: float = -np.inf
    inf: float = np.inf
    sup: float = -np.inf

    def enclose(self, lo: float, hi: float) -> None:
        self.lo, self.hi = min(self.lo, lo), max(self.hi, hi)

    def attain(self, lo: float, hi: float) -> None:
        """Some slope of at least `lo` and some slope of at most `hi` are attained."""
        self.inf, self.sup = min(self.inf, hi), max(self.sup, lo)

    def slack(self) -> float:
        known = [abs(v) for v in (self.inf, self.sup) if np.isfinite(v)]
        return _TOLERANCE * max(known, default=0.0) + 1e-300


def _midpoint(a: Any, b: Any) -> Any:
    """Arithmetic, or geometric where a box spans several orders of magnitude (boxes around 0 split there)."""
    near, far = np.minimum(np.abs(a), np.abs(b)), np.maximum(np.abs(a), np.abs(b))
    wide = (a * b > 0) & (far > 8 * near)
    mid = np.where(wide, np.sign(a) * np.sqrt(near) * np.sqrt(far), 0.5 * a + 0.5 * b)
    return np.where((a < 0) & (b > 0), 0.0, mid)


def _undefined(op: str, done: list[Jet], ends: list[list[Jet]]) -> bool:
    """Whether an operation is certainly undefined: at the point of `done`, or between the points of `ends`."""
    (lo, hi) = (np.asarray(q) for q in done[-1].v)
    if op in ("div", "tan"):
        sides = [(I.cos(a[-1].v) if op == "tan" else a[-1].v) for a in ends]
        changes = (sides[0][1] < 0 < sides[1][0]) or (sides[1][1] < 0 < sides[0][0])
        return bool(changes or (op == "div" and lo == hi == 0))
    certain = {
        "sqrt": hi < 0, "log": hi <= 0, "rsqrt": hi <= 0, "log1p": hi <= -1, "pow": hi < 0, "acosh": hi < 1,
        "asin": lo > 1 or hi < -1, "acos": lo > 1 or hi < -1, "atanh": lo >= 1 or hi <= -1,
    }  # fmt: skip
    return bool(certain.get(op, False))


def _failure(terms: Terms, term: int, a: float, b: float) -> SlopeError:
    middle = 0.5 * a + 0.5 * b
    near = 1e-6 * max(1.0, abs(middle))
    box, here, *ends = (
        jets(terms, term, (np.float64(p), np.float64(q)))
        for p, q in ((a, b), (middle, middle), *((t, t) for t in (middle - near, middle + near)))
    )
    where = f"near x = {middle:.6g}"
    for i, jet in box.items():
        if np.any(jet.bad):
            t = terms.items[i]
            what = {"div": "a divisor that vanishes", "pow": "a power of a number that is not positive"}
            name = what.get(t.op, t.op + " outside its domain")
            if _undefined(t.op, [here[j] for j in t.args], [[e[j] for j in t.args] for e in ends]):
                return SlopeError(f"it is not defined on all reals: {name} {where}", DOMAIN_REMEDY)
            return SlopeError(f"it cannot be bounded here: perhaps {name} {where}", DECLARE)
    steepest = max((_size(terms, term, x), x) for x in (a, middle, b))
    return _steep(steepest, f"its slope is unbounded or too large {where}", _SMOOTH)


def _size(terms: Terms, term: int, x: float) -> float:
    """A lower bound of `|f'(x)|`."""
    jet = jets(terms, term, I.point(x))[term]
    low, high = float(jet.d[0]), float(jet.d[1])
    return max(low, -high, 0.0) if not np.any(jet.bad) and not np.isnan(low + high) else 0.0


def _steep(steepest: tuple[float, float], reason: str, remedy: str) -> SlopeError:
    """The refusal of a slope, given (lower bound, x) where it is large: only a bounded one can be declared."""
    slope, x = steepest
    if slope < _STEEP:
        return SlopeError(reason, DECLARE)
    return SlopeError(f"{reason}: it is at least {slope:.2g} at x = {x:.6g}", remedy)


def _branch(terms: Terms, term: int, left: Interval, right: Interval, found: Range) -> None:
    """Add to `found` an enclosure of all slopes of `term` on [left, right], within 1e-8 of attained ones.

    `left` and `right` enclose the ends (they need not be floats). Widths beyond the box budget stay
    sound.
    """
    start, stop = float(left[0]), float(right[1])
    inside = (float(left[1]), float(right[0]))
    cuts = [start, stop] + [s * 2.0**k for s in (-1, 1) for k in range(-4, 60, 2)] + [0.0]
    grid = np.array(sorted({c for c in cuts if start <= c <= stop}))
    if len(grid) < 2:
        return
    a, b = grid[:-1], grid[1:]
    used = 0
    for level in range(_MAX_LEVELS + 1):
        n, m = len(a), _midpoint(a, b)
        used += n
        pts = np.concatenate([a, b, m])
        if inside[0] <= inside[1]:
            pts = np.clip(pts, *inside)
        jet = jets(terms, term, (np.concatenate([a, pts]), np.concatenate([b, pts])))[term]
        size = 4 * n
        d_lo, d_hi, s_lo, s_hi = (np.broadcast_to(q, size) for q in (*jet.d, *jet.s))
        bad = np.broadcast_to(np.asarray(jet.bad, bool) | np.isnan(d_lo) | np.isnan(d_hi), size)
        good = ~bad[n:]
        if not good.all():
            j = int(np.argmin(good))
            raise _failure(terms, term, float(pts[j]), float(pts[j]))
        if inside[0] <= inside[1] and good.any():
            found.attain(float(d_lo[n:][good].max()), float(d_hi[n:][good].min()))
        lo, hi = _sharpen(a, b, pts, (d_lo, d_hi), (s_lo[:n], s_hi[:n]), n)
        broken = bad[:n] | ~np.isfinite(lo) | ~np.isfinite(hi)
        tol = found.slack()
        done = ~broken & (hi <= max(found.sup + tol, found.hi)) & (lo >= min(found.inf - tol, found.lo))
        stuck = (m <= a) | (m >= b)
        last = level == _MAX_LEVELS or used > _MAX_BOXES or int(broken.sum()) > _MAX_BROKEN
        if np.any(broken & (stuck | last)):
            j = int(np.argmax(broken & (stuck | last)))
            raise _failure(terms, term, float(a[j]), float(b[j]))
        keep = done | stuck | last
        if keep.any():
            found.enclose(float(lo[keep].min()), float(hi[keep].max()))
        if keep.all():
            return
        a, b, m = a[~keep], b[~keep], m[~keep]
        a, b = np.concatenate([a, m]), np.concatenate([m, b])


def _sharpen(a: Any, b: Any, pts: Any, d: Interval, s: Interval, n: int) -> Interval:
    """Slopes on boxes: the natural enclosure, cut by the mean value form and by monotonicity of f'.

    For a point t of a box B, f'(B) lies in `f'(t) + f''(B) (B - t)`; if f'' has one sign, between the
    ends' slopes. Points clipped out of their box are not used for monotonicity (they are ends only up to
    rounding).
    """
    lo, hi = d[0][:n], d[1][:n]
    pa, pb, pm = pts[:n], pts[n : 2 * n], pts[2 * n :]
    at = I.add((d[0][3 * n :], d[1][3 * n :]), I.mul(s, I.sub((a, b), (pm, pm))))
    usable = (pm >= a) & (pm <= b) & ~np.isnan(at[0]) & ~np.isnan(at[1])
    lo, hi = np.where(usable, np.maximum(lo, at[0]), lo), np.where(usable, np.minimum(hi, at[1]), hi)
    exact = (pa == a) & (pb == b)
    (l_lo, r_lo), (l_hi, r_hi) = ((e[n : 2 * n], e[2 * n : 3 * n]) for e in d)
    up, down = exact & (s[0] >= 0), exact & (s[1] <= 0)
    lo = np.where(up, np.maximum(lo, l_lo), np.where(down, np.maximum(lo, r_lo), lo))
    hi = np.where(up, np.minimum(hi, r_hi), np.where(down, np.minimum(hi, l_hi), hi))
    return lo, hi


def _exact(c: Sequence[Fraction], domain: Domain) -> tuple[Fraction, Fraction] | None:
    """The exact slope range of a polynomial of degree at most 3 on a piece; None if the degree is higher."""
    d = [n * q for n, q in enumerate(c)][1:]
    if len(d) <= 1:
        q = d[0] if d else Fraction(0)
        return q, q
    if domain.left is None or domain.right is None:
        raise SlopeError(f"its slope is unbounded: it grows like x**{len(c) - 1}", _BOUNDED)
    if len(d) > 3:
        return None
    spots = [domain.left, domain.right]
    if len(d) == 3 and domain.left < -d[1] / (2 * d[2]) < domain.right:
        spots.append(-d[1] / (2 * d[2]))
    slopes = [sum((q * s**n for n, q in enumerate(d)), Fraction(0)) for s in spots]
    return min(slopes), max(slopes)


def _value(terms: Terms, term: int) -> Interval:
    jet = jets(terms, term, I.point(0.0))[term]
    return float(np.asarray(jet.v[0])), float(np.asarray(jet.v[1]))


def _check_joint(terms: Terms, c: Fraction, values: tuple[int, int, int]) -> None:
    """Refuse a breakpoint at which f(c-0), f(c) and f(c+0) are not one and the same exact value."""
    if len(set(values)) == 1:
        return
    with I.quiet():
        ranges = [_value(terms, t) for t in values]
    exact = [terms.constant(t) for t in values]
    known = [q for q in exact if q is not None]
    least, most = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if len(known) == 3:
        gap = I.from_fraction(max(known) - min(known))[0]
    elif least > most:
        gap = least - most
    else:
        widest = max(r[1] for r in ranges) - min(r[0] for r in ranges)
        raise SlopeError(
            f"its branches at {float(c):.9g} cannot be proved equal in exact arithmetic; they differ by {widest:.3g} "
            "at most",
            "write it as one expression without the comparison; if the branches are equal, its slopes can be declared "
            "with register_activation",
        )
    a, h, b = ranges
    raise SlopeError(
        f"it jumps at {float(c):.7g}: the branches differ by {gap:.3g} at x = {float(c):.9g} (from {a[0]:.9g} over "
        f"{h[0]:.9g} to {b[0]:.9g}), so there is no Lipschitz constant",
        "make the branches of the comparison agree there, or use a continuous activation",
    )


def _tail(terms: Terms, term: int, first: int, reflect: bool, found: Range) -> None:
    """Add the half line beyond `2**first`: the nearest tail that adds nothing, and the boxes before it."""
    best: tuple[float, int, Interval] | None = None
    outside = ""
    for k in (k for k in _TAILS if k >= first):
        try:
            lo, hi = tail_slopes(terms, term, k, reflect)
        except TailError as error:
            outside = str(error)
            continue
        if not (np.isfinite(lo) and np.isfinite(hi)):
            continue
        excess = max(hi - found.sup, found.inf - lo, 0.0)
        if best is None or excess < best[0]:
            best = (excess, k, (lo, hi))
        if excess <= found.slack():
            break
    if best is None:
        side = "-infinity" if reflect else "+infinity"
        reason = f"its slope is unbounded, or cannot be bounded, as x tends to {side}"
        if outside:
            raise SlopeError(f"{reason} ({outside} may leave its domain)", DECLARE)
        spots = [-x if reflect else x for x in 2.0 ** np.arange(first, max(first, 26) + 1)]
        sizes = [(_size(terms, term, float(x)), float(x)) for x in spots]
        raise _steep(next((s for s in sizes if s[0] >= _STEEP), (0.0, 0.0)), reason, _BOUNDED)
    _, k, (lo, hi) = best
    found.enclose(lo, hi)
    if k > first:
        near, far = I.point(2.0**first), I.point(2.0**k)
        _branch(terms, term, *((I.neg(far), I.neg(near)) if reflect else (near, far)), found)


def scalar_slopes(expr: Expr, consts: tuple[Any, ...]) -> tuple[float, float]:
    """(a, b) with a <= (f(x) - f(y)) / (x - y) <= b for all real x != y.

    `consts` are Fraction, bool or inf. f is proved continuous and, between breakpoints, differentiable with slopes in
    [a, b] (locally Lipschitz with such generalised slopes at undecided kinks); the mean value theorem gives the
    inequality. Raises `SlopeError`.
    """
    terms = Terms()
    parts, joints = pieces(terms, expr, consts)
    exact: list[Fraction] = []
    found = Range()
    smooth = []
    for part in parts:
        c = terms.coefficients(part.term)
        slopes = None if c is None else _exact(c, part.domain)
        if slopes is None:
            smooth.append(part)
            continue
        exact += slopes
        for q in slopes:
            f = I.from_fraction(q)
            found.enclose(*f)
            found.attain(*f)
    for where, *values in joints:
        _check_joint(terms, where, (values[0], values[1], values[2]))
    largest = max(
        (abs(q) for part in parts for q in (part.domain.left, part.domain.right) if q is not None), default=0
    )
    first = next((k for k in _TAILS if largest < 2**k), None)
    if first is None and smooth:
        raise SlopeError(f"a breakpoint at {float(largest):.3g} is too far from 0", DECLARE)
    with I.quiet():
        for part in smooth:
            assert first is not None
            left, right = part.domain.left, part.domain.right
            near = I.point(-(2.0**first)) if left is None else I.from_fraction(left)
            far = I.point(2.0**first) if right is None else I.from_fraction(right)
            _branch(terms, part.term, near, far, found)
        for part in smooth:
            assert first is not None
            if part.domain.left is None:
                _tail(terms, part.term, first, True, found)
            if part.domain.right is None:
                _tail(terms, part.term, first, False, found)
    if not (np.isfinite(found.lo) and np.isfinite(found.hi) and found.lo <= found.hi):
        raise SlopeError("its slope range could not be bounded", DECLARE)
    return float(found.lo) + 0.0, float(found.hi) + 0.0
