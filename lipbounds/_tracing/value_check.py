"""The value check after tracing: form and program agree in every register.

Every linear step and every tap is compared on its own, so that no difference is hidden by a dead neuron or a larger
output. No certificate depends on this check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lipbounds._form.concrete import is_concrete
from lipbounds._form.inputs import Box
from lipbounds._form.lure import LureForm, apply_tap, propagate
from lipbounds._tracing.execution import run
from lipbounds._tracing.flat import Flat, Value
from lipbounds.errors import Unsupported, UnsupportedError

FINITE_REMEDY = "check the weights and the domain of the functions used; all of R^n must be allowed as input"
_SIZES = (1e2, 1e4)  # of distant points, where a function may behave differently
_WHOLE = (None, lax.Precision.HIGHEST, (lax.Precision.HIGHEST, lax.Precision.HIGHEST))
_ROUNDED = 0.05  # tolerance where products in `fn` may be rounded to 8 bits


class Traced(NamedTuple):
    """The flat program behind a form, and the register of each of its values that has one."""

    flat: Flat
    registers: dict[int, int]


class _Point(NamedTuple):
    x: np.ndarray
    where: str
    near: bool  # values must be finite, and rounding small


def _points(spec: jax.ShapeDtypeStruct, box: Box | None) -> Iterator[_Point]:
    rng = np.random.default_rng(0)
    yield _Point(rng.standard_normal(spec.shape), "a random point", True)
    yield _Point(rng.uniform(size=spec.shape), "a random point", True)
    yield _Point(10 * rng.standard_normal(spec.shape), "a random point of size 10", True)
    for size in _SIZES:
        if size < float(jnp.finfo(spec.dtype).max) / 100:
            draw = size * rng.standard_normal(spec.shape)
            for point in (draw, -draw):
                yield _Point(point, f"a random point of size {size:g}", False)
    if box is not None and all(np.isfinite(end).all() for end in box):
        low, high = box
        mixed = np.where(rng.uniform(size=spec.shape) < 0.5, low, high)
        for corner in (low, high, mixed):
            yield _Point(np.broadcast_to(corner, spec.shape), "a corner of the box", False)


def _one_by_one(form: LureForm, x: Any, dtype: Any) -> dict[int, Any]:
    """Every register of the form at x."""
    found: dict[int, Any] = {}
    taps = form.taps
    propagate(
        form, x, lambda k, y: apply_tap(taps[k], form.consts, y), dtype=dtype, affine=True, registers=found
    )
    return found


_registers = partial(jax.jit, static_argnames="dtype")(_one_by_one)


def check_values(
    form: LureForm,
    traced: Traced,
    fn: Callable[[Any], Any],
    spec: jax.ShapeDtypeStruct,
    box: Box | None = None,
) -> None:
    """The form agrees with the program at points other than the traced one, in every register, and both are finite.

    The points have sizes from 1 to 1e4; the corners of `box` are among them where one is given. The tolerance
    covers rounding; both compute products in full precision, so TF32 on a GPU makes no difference.
    Far from the origin a program may lose all its digits or overflow, so only what disagrees with the form in float64
    too counts there.

    Raises:
        UnsupportedError: a value is not finite, or the rounding errors of the program are as large as its values.
        RuntimeError: the form and the program are different functions.
    """
    if form.is_traced or not is_concrete(jnp.zeros(())):
        return
    floats = [v.dtype for v in traced.flat.values if jnp.issubdtype(v.dtype, jnp.floating)]
    tolerance = min(10 * max(float(jnp.finfo(d).eps) for d in floats) ** 0.5, 0.25)
    output = traced.flat.outputs[0]
    rounds = jax.default_backend() != "cpu" or any(
        e.params.get("precision") not in _WHOLE for e in traced.flat.eqns
    )
    for turn, point in enumerate(_points(spec, box)):
        x = jnp.asarray(point.x, spec.dtype)
        ours = _registers(form, x, spec.dtype)
        theirs = run(traced.flat, x)
        pairs = [(v, theirs[v], ours[r]) for v, r in traced.registers.items() if v in theirs]
        called = None
        if turn == 0:
            with jax.default_matmul_precision("highest"):
                called = fn(x)
            if is_concrete(called):
                pairs.append((output.index, called, ours[form.program.output]))
        for place, theirs_, ours_ in pairs:
            a, b = _flat(theirs_), _flat(ours_)
            finite = np.isfinite(a) & np.isfinite(b)
            if not finite.all():
                if point.near:
                    reason = f"the function is not finite at {point.where}"
                    raise UnsupportedError((Unsupported("output", "", a.shape, reason, FINITE_REMEDY),))
                a, b = a[finite], b[finite]
            # The code of `fn` may ask for a precision, and a GPU computes products of constants in TF32.
            loose = rounds and theirs_ is called
            if not _close(a, b, max(tolerance, _ROUNDED) if loose else tolerance):
                value = traced.flat.values[place]
                _explain(form, traced, value, point, spec, a, b)


def _flat(value: Any) -> np.ndarray:
    return np.asarray(value, np.float64).ravel()


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    scale = float(np.abs(a).max(initial=0.0)) + float(np.abs(b).max(initial=0.0)) + 1e-3
    return float(np.abs(a - b).max(initial=0.0)) <= tolerance * scale


def _explain(
    form: LureForm,
    traced: Traced,
    value: Value,
    point: _Point,
    spec: jax.ShapeDtypeStruct,
    a: np.ndarray,
    b: np.ndarray,
) -> None:
    """Raise for a difference between the program's values a and the form's b, unless it is rounding far out.

    It is rounding where the form and the program agree as soon as both are computed in float64, one operation after the
    other, and where the digits that are lost explain its size.
    """
    difference = float(np.abs(a - b).max())
    error = _rounding(form, traced, value, np.asarray(jnp.asarray(point.x, spec.dtype)))
    if error is None or difference > 100 * error:
        raise RuntimeError(
            f"the traced form does not agree with the function at {point.where}: either the function is not "
            f"a pure function of x, or this is a bug of lipbounds (difference {difference:.3g})"
        )
    if not point.near:
        return
    dtype = np.dtype(spec.dtype).name
    size = float(np.abs(np.concatenate([a, b])).max(initial=0.0))
    eqn = value.producer
    reason = (
        f"the program loses its digits in {dtype}: at {point.where} its rounding errors reach {difference:.3g} where "
        f"its values reach {size:.3g}. A bound is for real arithmetic, and would say little about this program"
    )
    rescale = "rescale it so that large terms do not cancel"
    wide = "trace it in float64 (inside `with jax.enable_x64():`, with weights and input in float64)"
    remedy = rescale if dtype == "float64" else f"{wide}, or {rescale}"
    name, path = (eqn.primitive, eqn.path) if eqn is not None else ("output", "")
    raise UnsupportedError((Unsupported(name, path, value.shape, reason, remedy),))


def _rounding(form: LureForm, traced: Traced, value: Value, x: np.ndarray) -> float | None:
    """The size of the rounding errors of a value at x in the program's dtype; None: something else differs."""
    register = traced.registers.get(value.index, form.program.output)
    mine = _flat(_one_by_one(form, jnp.asarray(x), x.dtype)[register])
    theirs = _flat(_of(run(traced.flat, jnp.asarray(x)), value))
    already = x.dtype == np.float64
    with nullcontext() if already else jax.enable_x64(True):
        wide = jnp.asarray(x, jnp.float64)
        exact = _flat(_one_by_one(form, wide, wide.dtype)[register])
        try:
            same = _flat(_of(run(traced.flat, wide, double=True), value))
        except Exception:  # an operation that cannot be computed in float64 in this way
            same = None
    jitted = _flat(_registers(form, jnp.asarray(x), x.dtype)[register])
    if not (_equal(mine, theirs, 1e-4) if same is None else _equal(exact, same, 1e-6)):
        return None
    errors = np.abs(np.stack([mine, theirs, jitted]) - exact)
    return float(errors[np.isfinite(errors)].max(initial=0.0))


def _equal(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    finite = np.isfinite(a) & np.isfinite(b)
    return _close(a[finite], b[finite], tolerance)


def _of(found: dict[int, Any], value: Value) -> Any:
    return found[value.index] if value.depends else value.const
