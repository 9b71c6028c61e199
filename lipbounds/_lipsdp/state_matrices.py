"""The state sequence of a form as matrices: what the ellipsoid recursion runs on.

After the loop transformation v = c y + r w, |w_i| <= |y_i| in differences, every network is

    s_0 = A_0 x,    y_k = W_k s_k,    s_{k+1} = A_k s_k + B_k w_k,    z = the last state

Only neurons that move and matter (r > 0, a nonzero row of W_k and column of B_k) are active: they alone need a
multiplier, and the others are linear or without effect.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lipbounds._form.elementwise import elementwise_view, kept_with_form
from lipbounds._form.lure import LureForm, state_sequence
from lipbounds._form.program import Op, Program, Tap
from lipbounds._form.steps import StaticArray
from lipbounds._gain.blocks import TapScaling
from lipbounds._lipsdp.chain import times
from lipbounds._lipsdp.units import units
from lipbounds._norms import enclosures
from lipbounds._norms.cholesky import TINY, gram, nonzeros_per_row
from lipbounds._norms.enclosures import Enclosure
from lipbounds._norms.matrices import frobenius_norm
from lipbounds._norms.rounding import U, add_up, gamma, mul_up
from lipbounds._text.device import remembered
from lipbounds._triangle import recursion
from lipbounds._triangle.recursion import Request

#: Behind a front that LipLT bounds, ellipsoids start at the first state from which on nothing is wider than this.
TAIL = 1100


@dataclass(frozen=True, eq=False)
class Segment:
    """One tap between two states: y = W s, s+ = A s + B w, |w_i| <= |y_i| for the active neurons.

    Args:
        tap: index of the tap in the elementwise view.
        active: (n,) its neurons that have a multiplier.
        A, B, W: dense enclosures of shape (d+, d), (d+, n), (n, d).
        kappa: (n,) |c_i| / r_i, centre over radius of the slopes.
        units: (n,) integers u: y and w are 2^u times those of the network (`units`).
    """

    tap: int
    active: np.ndarray
    A: Enclosure
    B: Enclosure
    W: Enclosure
    kappa: np.ndarray
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class Sequence:
    """The whole sequence. start: (d_0, n_in); sizes: entries of every tap of the elementwise view."""

    start: Enclosure
    segments: tuple[Segment, ...]
    sizes: tuple[int, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the states, the output last."""
        return (self.start.shape[0], *(segment.A.shape[0] for segment in self.segments))


_HYBRID: weakref.WeakKeyDictionary[LureForm, dict[tuple[int, Request], Any]] = weakref.WeakKeyDictionary()


@kept_with_form
def sequence(view: LureForm) -> Sequence:
    """The sequence of a concrete form (of its elementwise view), kept as long as the form lives."""
    host = recursion.host_form(view)
    scalings = recursion.loop_transform(view, 2, centred=True)
    (start, _, _), *maps = host.state_maps(scalings)
    segments = []
    for k, found in enumerate(maps):
        a, b, w = (m.dense() for m in found if m is not None)
        radius, c = scalings[k].q, scalings[k].c
        active = np.flatnonzero((radius > 0) & w.support(axis=1) & b.support(axis=0))
        centre = np.zeros(active.size) if c is None else np.abs(c[active])
        segments.append(
            Segment(
                k,
                active,
                a,
                b.select(cols=active),
                w.select(rows=active),
                centre / radius[active],
                np.zeros(active.size, int),
            )
        )
    seq = Sequence(start.dense(), tuple(segments), tuple(tap.size_out for tap in view.taps))
    exponents = _units_of(seq, scalings)
    return seq if exponents is None else _in_units(view, scalings, seq, exponents)


def _units_of(seq: Sequence, scalings: Seq[TapScaling]) -> list[np.ndarray] | None:
    """`units` of the first state, the first tap, the second state, ...; None where they differ little."""
    if not seq.segments:
        return None
    # squares, about: how far a unit of x moves states and neurons, and they the outputs
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        maps = [[np.square(m.midpoint_for_search()) for m in (s.A, s.B, s.W)] for s in seq.segments]
        moved = [np.square(seq.start.midpoint_for_search()).sum(axis=1)]
        for a, b, w in maps:
            moved.append(w @ moved[-1])
            moved.append(a @ moved[-2] + b @ moved[-1])
        moves = [np.ones(len(moved.pop()))]
        for one, (a, b, w) in zip(reversed(seq.segments), reversed(maps), strict=True):
            own = moves[-1] @ b
            moves += [own / scalings[one.tap].q[one.active] ** 2, moves[-1] @ a + own @ w]
    return units(moved, moves[:0:-1])


def _in_units(view: LureForm, scalings: Seq[TapScaling], seq: Sequence, found: list[np.ndarray]) -> Sequence:
    """The sequence with states and neurons in other units: its maps are multiplied there, so that errors are small."""
    plain = [TapScaling(None, np.ones(tap.size_out), np.ones(tap.size_in)) for tap in view.taps]
    (start, _, _), *maps = recursion.host_form(view).state_maps(plain)
    states = [np.ldexp(1.0, u) for u in (*found[::2], np.zeros(seq.widths[-1], int))]
    made = []
    for k, (one, (h, g, w)) in enumerate(zip(seq.segments, maps, strict=True)):
        assert g is not None and w is not None
        u, here, there, c = np.zeros(w.shape[0], int), 1 / states[k], states[k + 1], scalings[k].c
        u[one.active] = found[2 * k + 1]
        h = enclosures.scale(h, rows=there, cols=here)
        g = enclosures.scale(g, rows=there, cols=np.ldexp(1.0, -u))
        w = enclosures.scale(w, rows=np.ldexp(1.0, u), cols=here)
        a = h if c is None else enclosures.add(h, times(enclosures.scale(g, cols=c), w))
        b = enclosures.scale(g, cols=scalings[k].q)
        parts = (a.dense(), b.dense().select(cols=one.active), w.dense().select(rows=one.active))
        made.append(Segment(one.tap, one.active, *parts, one.kappa, u[one.active]))
    return Sequence(enclosures.scale(start.dense(), rows=states[0]), tuple(made), seq.sizes)


# --- a form cut in two ---------------------------------------------------------------------------------------------


def split(form: LureForm, k: int) -> tuple[LureForm, LureForm]:
    """(front, tail): x -> s_k and s_k -> z, the state before tap k as one flat vector. Their composition is the form.

    k = 0 cuts before the first tap, k = len(form.taps) gives the whole form and the identity.
    """
    program = form.program
    cut = state_sequence(program)[k]
    sizes = [program.sizes[r] for r in cut.registers]
    width = sum(sizes)

    shapes = list(program.shapes)
    steps = list(program.steps[: cut.step])
    flat = []
    for register, size in zip(cut.registers, sizes, strict=True):
        shapes.append((size,))
        flat.append(len(shapes) - 1)
        steps.append(Op("reshape", (("shape", (size,)),), (register,), flat[-1]))
    shapes.append((width,))
    steps.append(Op("concatenate", (("dimension", 0),), tuple(flat), len(shapes) - 1))
    front = Program(tuple(steps), tuple(shapes), len(shapes) - 1, program.half)

    later: list[Op | Tap] = []
    begin = 0
    for register, size in zip(cut.registers, sizes, strict=True):  # register r of the form is r + 1 here
        index = np.arange(begin, begin + size, dtype=np.int32).reshape(program.shapes[register])
        later.append(Op("take", (("index", StaticArray(index)),), (0,), register + 1))
        begin += size
    for step in program.steps[cut.step :]:
        inputs = tuple(i + 1 if i >= 0 else i for i in step.inputs)
        if isinstance(step, Op):
            later.append(replace(step, inputs=inputs, output=step.output + 1))
        else:
            later.append(replace(step, inputs=inputs, outputs=tuple(i + 1 for i in step.outputs)))
    tail = Program(tuple(later), ((width,), *program.shapes), program.output + 1, program.half)
    return (
        LureForm(front, form.consts, form.slopes[:k]),
        LureForm(tail, form.consts, form.slopes[k:]),
    )


def first_tap(form: LureForm, widest: int) -> int:
    """The first tap k such that from its state on nothing is wider than `widest`; len(form.taps) if there is none."""
    for k in range(len(form.taps)):
        view = elementwise_view(split(form, k)[1] if k else form).program
        widths = [cut.width for cut in state_sequence(view)] + [tap.size_out for tap in view.taps]
        if max(widths) <= widest:
            return k
    return len(form.taps)


def hybrid_start(form: LureForm, k: int, request: Request) -> tuple[Sequence, np.ndarray, str, float]:
    """(tail, S, guarantee, failure): the sequence behind tap k - 1, and a proved ellipsoid of the state s there.

    Sequences begin with A_0 s: no identity where no tap is left behind, as a maximum of one entry is none.
    With s = sum_i B_i w_i and |w_i| <= m_i |dx| over the sources i (the input, and the taps in front, m_i from the
    triangle recursion), every s over unit dx has s s' <= sum_i (m_i^2 / a_i) B_i B_i' for any a_i > 0 with sum 1; here
    a_i is in proportion to m_i ||B_i||, so lambda_max is at most LipLT's square. l2 norm only.
    """
    kept = {} if form.assumed else _HYBRID.setdefault(form, {})
    return remembered(kept, (k, request), lambda: _hybrid_start(form, k, request))


def _hybrid_start(form: LureForm, k: int, request: Request) -> tuple[Sequence, np.ndarray, str, float]:
    if not 0 < k <= len(form.taps):
        raise ValueError(f"the ellipsoid can start behind 1 to {len(form.taps)} taps, not {k}")
    if request.norm != 2:
        raise ValueError("an ellipsoid that starts behind the input is for norm=2")
    front, tail = split(form, k)
    scalings = recursion.loop_transform(front, 2, centred=True)
    nodes = [(j,) for j in range(k)]
    host = recursion.host_form(front)
    # keyed by content: what a bound of the whole network proved is not proved again
    host.proved = recursion.host_form(form).proved
    rows = {source: block.T for source, block in host.backward((), [(), *nodes], scalings).items()}
    found = recursion.recursion(front, nodes, scalings, request, pairwise=False, rows=rows)
    shares = {
        i: mul_up(found.outputs[i], found.reach[i])  # never rounded to zero
        for i in rows
        if found.outputs[i] > 0 and found.reach[i] > 0
    }
    width = front.num_outputs
    if not shares:
        return sequence(tail), np.zeros((width, width)), found.guarantee, found.failure
    total = math.fsum(shares.values()) * (1 + 1e-12)
    s, error = np.zeros((width, width)), 0.0
    for i, share in shares.items():
        (matrix, wrong), norm = rows[i].with_error(), found.outputs[i]
        weight = mul_up(found.reach[i], found.reach[i], total / share * (1 + 1e-12))
        squares = weight * gram(matrix)
        s += squares
        entries = min(matrix.shape[1], nonzeros_per_row(matrix)) + len(shares) + 8
        lost = width * matrix.shape[1] * 2.0**-1022  # products below the range
        rounding = mul_up(2 * gamma(entries), frobenius_norm(matrix), frobenius_norm(matrix))
        of_square = add_up(rounding, mul_up(2.0, norm, wrong), mul_up(wrong, wrong), lost)
        error = add_up(error, mul_up(weight, of_square))
    s = (s + s.T) / 2
    error = add_up(error, mul_up(4 * (len(shares) + 4) * U, frobenius_norm(s)), TINY)
    s[np.diag_indices(width)] += 2 * error
    s.setflags(write=False)
    return sequence(tail), s, found.guarantee, found.failure
