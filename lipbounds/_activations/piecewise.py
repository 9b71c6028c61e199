"""Rewrite the piecewise functions of jax as elementwise functions of one tensor.

`jnp.interp` searches its knots and gathers at an index that depends on x; `jnp.select` and `jnp.piecewise` take the
argmax of stacked predicates and select by that integer. Both are recognised by their computation, not only by name, and
become an equation `interp`, or comparisons and two-way selections. Whether the result is
continuous is decided later, as for every elementwise function.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Knots = dict[str, Any]
_MOST = 256  # integers up to here are exact in every float type


def interp(
    x: Any, *, xp: tuple[float, ...], fp: tuple[float, ...], extrapolate: tuple[bool, bool], dtype: Any = None
) -> Any:
    """The piecewise linear function through the knots (xp, fp), constant or extrapolated beyond the ends.

    The knots are not rounded to half precision; the result has the given dtype, or that of x.
    """
    left, right = ("extrapolate" if e else None for e in extrapolate)
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.dtype(jnp.float32)
    knots = np.asarray(xp).astype(wide), np.asarray(fp).astype(wide)
    return jnp.interp(x.astype(wide), *knots, left=left, right=right).astype(dtype or x.dtype)


def template(jaxpr: Any, avals: Sequence[Any]) -> tuple[str | None, str | None, bool] | None:
    """(left, right, periodic) of the call of `jnp.interp` that the running jax turns into this jaxpr, else None.

    left and right are None, "extrapolate" or "value"; a value and the period are operands after x, xp and fp.
    """
    text = str(jaxpr)
    specs = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=bool(getattr(a, "weak_type", False))) for a in avals
    ]
    ends, mapped = (None, "extrapolate", "value"), range(len(avals[0].shape) + 1)
    for depth, left, right, periodic in itertools.product(mapped, ends, ends, (False, True)):
        if (left == "value") + (right == "value") + periodic != len(avals) - 3:
            continue

        def call(
            x: Any, xp: Any, fp: Any, *rest: Any, ends: Any = (left, right), periodic: bool = periodic
        ) -> Any:
            more = list(rest)
            low, high = (more.pop(0) if end == "value" else end for end in ends)
            return jnp.interp(x, xp, fp, low, high, more.pop(0) if periodic else None)

        fn = call
        for _ in range(depth):
            fn = jax.vmap(fn, in_axes=(0, *(None for _ in avals[1:])))
        try:
            traced = jax.make_jaxpr(fn)(*specs)
        except (TypeError, ValueError):  # arguments that jnp.interp does not take
            continue
        for eqn in traced.eqns:
            if eqn.params.get("name") == "_interp" and str(eqn.params["jaxpr"]) == text:
                return left, right, periodic
    return None


def knots(
    form: tuple[str | None, str | None, bool], dtype: Any, xp: np.ndarray, fp: np.ndarray, rest: Sequence[Any]
) -> Knots | tuple[str, str]:
    """The parameters of `interp`, or (reason, remedy) where it jumps or deviates from its knots."""
    left, right, periodic = form
    if periodic:
        return (
            "jnp.interp with a period has infinitely many pieces, which cannot be bounded here",
            "interpolate without a period over the range that is needed",
        )
    if len(xp) < 2:
        return "jnp.interp with fewer than two knots", "give two knots or more"
    wide = jnp.promote_types(dtype, xp.dtype) if jnp.issubdtype(xp.dtype, jnp.floating) else dtype
    exact = all(
        np.array_equal(a.astype(t).astype(np.float64), a) for a, t in ((xp, wide), (fp, fp.dtype))
    ) and (jnp.issubdtype(fp.dtype, jnp.floating) or np.array_equal(fp.astype(np.float32), fp))
    points, values = xp.astype(np.float64), fp.astype(np.float64)
    if not (exact and np.isfinite(points).all() and np.isfinite(values).all()):
        return (
            "the knots of jnp.interp are not finite numbers that their dtype holds exactly",
            "round them first",
        )
    gaps = np.diff(points)
    if (gaps <= 0).any():
        k = int(np.argmax(gaps <= 0))
        equal = gaps[k] == 0
        return (
            f"the knots of jnp.interp do not increase: xp[{k}] = {points[k]:.9g} and xp[{k + 1}] = {points[k + 1]:.9g}"
            + (", where the function jumps" if equal and values[k] != values[k + 1] else ""),
            "drop one of two equal knots" if equal else "sort the knots",
        )
    if (gaps <= 2 * float(jnp.finfo(wide).eps) ** 2).any():  # where jax takes the left knot's value
        return "two knots of jnp.interp are so close that it jumps between them", "move the knots apart"
    given = iter(rest)
    for side, end, value in (("left", left, values[0]), ("right", right, values[-1])):
        if end == "value" and (outer := float(np.asarray(next(given)))) != value:
            at = points[0] if side == "left" else points[-1]
            return (
                f"jnp.interp jumps by {abs(outer - value):.3g} at x = {at:.9g}: {side}={outer:.9g} differs from the "
                f"{'first' if side == 'left' else 'last'} value {value:.9g}, so there is no Lipschitz constant",
                f"leave out {side}, or make it the value of that knot",
            )
    return {
        "xp": tuple(points.tolist()),
        "fp": tuple(values.tolist()),
        "extrapolate": (left == "extrapolate", right == "extrapolate"),
    }


def first_largest(*rows: Any, dtype: Any) -> Any:
    """argmax over the first axis of stacked rows, by comparisons, as an integer of this dtype."""
    rows = tuple(lax.convert_element_type(row, np.int32) if row.dtype == np.bool_ else row for row in rows)
    best, at = rows[0], jnp.zeros(rows[0].shape, dtype)
    for i, row in enumerate(rows[1:], 1):
        larger = lax.gt(row, best)
        at = lax.select_n(larger, at, jnp.full(row.shape, i, dtype))
        best = lax.select_n(larger, best, row)
    return at


def by_comparison(which: Any, *cases: Any) -> Any:
    """select_n by an integer, by comparisons."""
    out = cases[0]
    for i, case in enumerate(cases[1:], 1):
        out = lax.select_n(lax.eq(which, jnp.full(which.shape, i, which.dtype)), out, case)
    return out


Bounds = tuple[int, int] | None


def integer_bounds(primitive: str, dtype: Any, bounds: Sequence[Bounds]) -> Bounds:
    """The range of an integer tensor computed from tensors of these ranges without overflow; None where not known."""
    if any(b is None for b in bounds):
        return None
    ends = [(b[0], b[1]) for b in bounds if b is not None]
    if primitive == "convert_element_type":
        low, high = ends[0]
    elif primitive == "add":
        low, high = ends[0][0] + ends[1][0], ends[0][1] + ends[1][1]
    elif primitive == "sub":
        low, high = ends[0][0] - ends[1][1], ends[0][1] - ends[1][0]
    elif primitive in ("max", "min", "clamp", "select_n"):
        parts = ends[1:] if primitive == "select_n" else ends
        low, high = min(e[0] for e in parts), max(e[1] for e in parts)
    else:
        return None
    info = jnp.iinfo(dtype)
    fits = max(abs(low), abs(high)) <= _MOST and info.min <= low and high <= info.max
    return (low, high) if fits else None
