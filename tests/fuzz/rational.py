"""The steps of a form, and Jacobians that it attains, as the rational numbers that their floats are."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flint import fmpq, fmpq_mat

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm, apply_op, apply_tap, propagate, proved_slopes
from lipbounds._form.program import Op
from lipbounds._form.steps import KINDS


def rational(x: Any) -> fmpq:
    """The rational number that a float is."""
    return fmpq(*float(x).as_integer_ratio())


def step_matrices(op: Any, form: LureForm) -> dict[int, fmpq_mat]:
    """{register: matrix} of one linear step.

    A step that moves or adds entries has small whole numbers, read off from what it does to unit vectors. In a bilinear
    step every entry of the matrix is one entry of its constant: the constant is replaced by its own indices 1, 2, ...
    """
    shapes, kind = form.program.shapes, op.kind
    size_out = math.prod(shapes[op.output])
    same = all(i < 0 or shapes[i] == shapes[op.output] for i in op.inputs)
    if kind in ("reshape", "take") or (kind in ("add", "sub", "neg") and same):
        return _plain(op, form)
    bilinear = not KINDS[kind].joint
    division = kind == "div"
    out: dict[int, fmpq_mat] = {}
    for register in {i for i in op.inputs if i >= 0}:
        size = math.prod(shapes[register])
        constants: list[np.ndarray] = []

        def run(v: Any, register: int = register, constants: list[np.ndarray] = constants) -> Any:
            args = []
            for i in op.inputs:
                if i >= 0:
                    args.append(v.reshape(shapes[i]) if i == register else jnp.zeros(shapes[i]))
                    continue
                const = np.asarray(form.consts[-1 - i], np.float64)
                if bilinear:
                    constants.append(const.ravel())
                    args.append(jnp.asarray(1.0 + np.arange(const.size).reshape(const.shape)))
                else:
                    args.append(jnp.zeros(const.shape))
            name = "mul" if division else kind  # x / c has the pattern of x * c
            return apply_op(type(op)(name, op.params, op.inputs, op.output), args).ravel()

        with jax.enable_x64(True):
            columns = np.asarray(jax.vmap(run)(jnp.eye(size))).T if size else np.zeros((size_out, 0))
        found = np.rint(columns).astype(int)
        assert np.array_equal(found, columns), f"{kind}: not whole numbers"
        matrix = fmpq_mat(size_out, size)
        for row, column in zip(*np.nonzero(found), strict=True):
            entry = int(found[row, column])
            if bilinear:
                value = rational(constants[0][entry - 1])
                matrix[int(row), int(column)] = 1 / value if division else value
            else:
                matrix[int(row), int(column)] = fmpq(entry)
        out[register] = matrix
    return out


def _plain(op: Any, form: LureForm) -> dict[int, fmpq_mat]:
    """Steps whose matrices need no evaluation."""
    shapes = form.program.shapes
    size_out = math.prod(shapes[op.output])
    out: dict[int, fmpq_mat] = {}
    begin = 0
    for place, register in enumerate(op.inputs):
        if register < 0:
            begin += np.size(form.consts[-1 - register])
            continue
        size = math.prod(shapes[register])
        matrix = out.setdefault(register, fmpq_mat(size_out, size))
        if op.kind == "take":
            index = dict(op.params)["index"].array.ravel()
            for row in np.flatnonzero((index >= begin) & (index < begin + size)).tolist():
                matrix[row, int(index[row]) - begin] += 1
        else:
            sign = -1 if op.kind == "neg" or (op.kind == "sub" and place == 1) else 1
            for row in range(size_out):
                matrix[row, row] += sign
        begin += size
    return out


def add_step(op: Any, form: LureForm, registers: dict[int, fmpq_mat], width: int) -> None:
    """Run one linear step on rows over some columns."""
    total = fmpq_mat(math.prod(form.program.shapes[op.output]), width)
    for register, matrix in step_matrices(op, form).items():
        total = total + matrix * registers[register]
    registers[op.output] = total


def taken(matrix: fmpq_mat, which: Any) -> fmpq_mat:
    """Some rows."""
    table = matrix.tolist()
    return fmpq_mat([table[int(i)] for i in which]) if len(which) else fmpq_mat(0, matrix.ncols())


def attained_jacobian(form: LureForm, x: np.ndarray) -> fmpq_mat | None:
    """The exact Jacobian at a flat point where every tap has one of its two extreme slopes; None elsewhere.

    The slopes are those of a float64 evaluation, taken only where no pre-activation is near a kink.
    """
    view = elementwise_view(form)
    taps, slopes = view.taps, {}

    def at(v: Any) -> dict[int, Any]:
        found = {}

        def seen(k: int, y: Any) -> Any:
            def slope(u: Any) -> Any:
                return jax.jvp(lambda w: apply_tap(taps[k], view.consts, w), (u,), (jnp.ones_like(u),))[1]

            found[k] = [slope(y + d * (1e-6 + 1e-3 * jnp.abs(y))) for d in (0.0, -1.0, 1.0)]
            return apply_tap(taps[k], view.consts, y)

        propagate(view, v, seen, dtype=jnp.float64, affine=True)
        return found

    with jax.enable_x64(True):
        everything = jax.jit(at)(jnp.asarray(x)) if taps else {}
    for k, triple in everything.items():
        chosen, left, right = (np.asarray(t) for t in triple)
        low, high = proved_slopes(view, k)
        steady = np.array_equal(chosen, left) and np.array_equal(chosen, right)
        if steady and ((chosen == low) | (chosen == high)).all():
            slopes[k] = chosen
    if len(slopes) < len(taps):
        return None
    n = view.in_size
    registers = {0: fmpq_mat(n, n)}
    for i in range(n):
        registers[0][i, i] = fmpq(1)
    factors = iter([slopes[k] for k in range(len(taps))])
    for tap in view.program.steps:
        if isinstance(tap, Op):
            add_step(tap, view, registers, n)
            continue
        rows = [row for r in tap.inputs for row in registers[r].tolist()]
        v = [[rational(c) * e for e in row] for c, row in zip(next(factors), rows, strict=True)]
        begin = 0
        for register, shape in zip(tap.outputs, tap.shapes, strict=True):
            end = begin + math.prod(shape)
            registers[register] = fmpq_mat(v[begin:end]) if end > begin else fmpq_mat(0, n)
            begin = end
    return registers[view.program.output]


def exceeds(jacobian: fmpq_mat, bound: Any) -> str:
    """What of a bound is below a Jacobian that is attained, decided on rational numbers; "" if nothing."""
    rows = jacobian.tolist()
    norm, limit = bound.norm, rational(bound.value)
    zero = fmpq(0)

    def too_steep(slope: fmpq, square: bool, most: fmpq) -> bool:
        return slope > (most * most if square else most)

    if norm == 2:
        float_rows = np.array([[float(e) for e in row] for row in rows])
        direction = [rational(e) for e in np.linalg.svd(float_rows)[2][0]]
        image = [sum((a * b for a, b in zip(row, direction, strict=True)), zero) for row in rows]
        slope = sum((e * e for e in image), zero) / sum((e * e for e in direction), zero)
    elif norm == 1:
        slope = max(sum((abs(row[c]) for row in rows), zero) for c in range(len(rows[0])))
    else:
        slope = max(sum((abs(e) for e in row), zero) for row in rows)
    if too_steep(slope, norm == 2, limit):
        return f"value {bound.value!r}, attained {float(slope) ** (0.5 if norm == 2 else 1)!r}"
    if bound.pairwise is None:
        return ""
    for i in range(len(rows)):
        for j in range(i):
            gap = [a - b for a, b in zip(rows[i], rows[j], strict=True)]
            most = rational(bound.pairwise[i, j])
            size = {2: sum((e * e for e in gap), zero), 1: max(abs(e) for e in gap)}.get(
                norm, sum((abs(e) for e in gap), zero)
            )
            if too_steep(size, norm == 2, most):
                shown = float(size) ** (0.5 if norm == 2 else 1)
                return f"pair ({i}, {j}) {bound.pairwise[i, j]!r}, attained {shown!r}"
    return ""
