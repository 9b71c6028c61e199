"""A second proof of LipSDP certificates, in rational and ball arithmetic, that shares no arithmetic with the library.

From a form it takes the program, its constants and the slope intervals of its taps, all as the rational numbers that
their floats are. With v = c y + r w, |w_i| <= |y_i|, the gain

    y = Gy (x, w),    z = Gz (x, w)

is computed exactly, by running the steps on identity columns. Multipliers T > 0 prove L if

    L^2 Q - Gz' Gz >= 0,    Q = diag(P^-1, T) - Gy' T Gy > 0         (P = I, or the weights p of an l-inf input)

because then |z|^2 <= L^2 (x' P^-1 x + sum T_i (w_i^2 - y_i^2)) <= L^2 x' P^-1 x. Both are decided by elimination in
ball arithmetic, where a pivot counts as positive only if its whole ball is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flint import arb, ctx, fmpq, fmpq_mat
from fuzz.rational import add_step, rational, taken

from lipbounds._form.elementwise import elementwise_view
from lipbounds._form.lure import LureForm, proved_slopes
from lipbounds._form.program import Op
from lipbounds._triangle.recursion import partitions

PRECISION = 600  # bits: elimination of a few hundred rows loses far fewer than the 500 to spare


class Unproved(AssertionError):
    """A claim that the multipliers do not prove."""


# --- the gain, exactly -----------------------------------------------------------------------------------------------


@dataclass
class Gain:
    """Rows of y and z over the columns (x, w): w of the neurons with r > 0, tap after tap.

    neurons[k]: the indices of those neurons within tap k; starts[k]: the column of the first.
    """

    y: list[fmpq_mat]
    z: fmpq_mat
    n: int
    neurons: list[np.ndarray]
    starts: list[int]


def exact_gain(form: LureForm, centred: bool = True) -> Gain:
    """The gain for v = c y + r w, c the middle of the slopes or 0. Group taps have c = 0, r = 1 and all their y."""
    program, n = form.program, form.in_size
    centre: list[list[fmpq] | None] = []
    radius: list[list[fmpq]] = []
    for k, tap in enumerate(form.taps):
        if tap.groups is not None:
            centre.append(None)
            radius.append([fmpq(1)] * tap.size_out)
            continue
        low, high = ([rational(s) for s in side] for side in proved_slopes(form, k))
        middle = [(a + b) / 2 if centred else fmpq(0) for a, b in zip(low, high, strict=True)]
        centre.append(middle)
        radius.append([max(b - c, c - a) for a, b, c in zip(low, high, middle, strict=True)])
    neurons = [np.array([i for i, r in enumerate(rs) if r > 0], int) for rs in radius]
    starts = [n + sum(len(a) for a in neurons[:k]) for k in range(len(neurons))]
    width = n + sum(len(a) for a in neurons)
    first = fmpq_mat(n, width)
    for i in range(n):
        first[i, i] = fmpq(1)
    registers: dict[int, fmpq_mat] = {0: first}
    ys: list[fmpq_mat] = []
    for tap in program.steps:
        if isinstance(tap, Op):
            add_step(tap, form, registers, width)
            continue
        step = len(ys)
        rows = [row for r in tap.inputs for row in registers[r].tolist()]
        y = fmpq_mat(rows) if rows else fmpq_mat(0, width)
        middle = centre[step]
        ys.append(y if middle is None else taken(y, neurons[step]))
        v = fmpq_mat(tap.size_out, width)
        if middle is not None:
            v = fmpq_mat([[c * e for e in row] for c, row in zip(middle, rows, strict=True)])
        for place, i in enumerate(neurons[step]):
            v[int(i), starts[step] + place] += radius[step][int(i)]
        begin = 0
        for register, shape in zip(tap.outputs, tap.shapes, strict=True):
            registers[register] = taken(v, range(begin, begin + math.prod(shape)))
            begin += math.prod(shape)
    return Gain(ys, registers[program.output], n, neurons, starts)


# --- proofs in balls -------------------------------------------------------------------------------------------------


def eliminate(a: list[list[arb]], pivots: int) -> list[list[arb]]:
    """The Schur complement of the first `pivots` rows of a symmetric matrix; Unproved where a pivot may be <= 0."""
    rows = [list(row) for row in a]
    for k in range(pivots):
        head, top = rows[k][k], rows[k]
        if not head > 0:
            raise Unproved(f"pivot {k} of {pivots} is {head.str(8)}: not proved to be positive")
        for i in range(k + 1, len(rows)):
            if rows[i][k] != 0:
                factor = rows[i][k] / head
                rows[i][k + 1 :] = [
                    e - factor * t for e, t in zip(rows[i][k + 1 :], top[k + 1 :], strict=True)
                ]
    return [row[pivots:] for row in rows[pivots:]]


def positive(a: list[list[arb]]) -> bool:
    try:
        eliminate(a, len(a))
    except Unproved:
        return False
    return True


class Network:
    """The exact gain of a form over the neurons that have multipliers."""

    def __init__(self, form: LureForm) -> None:
        self.view = elementwise_view(form)
        self.gain = exact_gain(self.view)
        self.n, self.outputs = self.gain.n, form.num_outputs

    def reduced(self, active: list[np.ndarray]) -> tuple[list[list[arb]], list[list[arb]], list[int]]:
        """(Gy, Gz, the tap of each row) over (x, the w of the active neurons).

        Every other neuron is proved to have no part: nothing that counts moves it, or it moves nothing that counts.
        """
        gain = self.gain
        table = [row for y in gain.y for row in y.tolist()]
        labels = [k for k, chosen in enumerate(gain.neurons) for _ in chosen]
        wanted = [
            i in set(active[k].tolist()) for k, chosen in enumerate(gain.neurons) for i in chosen.tolist()
        ]
        z = gain.z.tolist()
        left = set(range(len(table)))
        dropped = {i for i in left if not wanted[i]}
        while dropped:
            columns = [*range(self.n), *(self.n + j for j in left)]
            idle = {i for i in dropped if not any(table[i][c] for c in columns)}
            unread = {
                i
                for i in dropped
                if not any(table[j][self.n + i] for j in left) and not any(row[self.n + i] for row in z)
            }
            if not idle | unread:
                raise Unproved(f"{len(dropped)} neurons without multipliers move the output")
            left -= idle | unread
            dropped -= idle | unread
        order = sorted(left)
        columns = [*range(self.n), *(self.n + j for j in order)]
        gy = [[arb(table[i][c]) for c in columns] for i in order]
        return gy, [[arb(row[c]) for c in columns] for row in z], [labels[i] for i in order]

    def multipliers(self, proof: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(active neurons, D) per tap, as the library pairs them."""
        from lipbounds._lipsdp.dense_form import dense_gain
        from lipbounds._lipsdp.state_matrices import sequence

        active = (
            dense_gain(self.view).active
            if proof.kind == "dense"
            else [s.active for s in sequence(self.view).segments]
        )
        assert proof.start_at == 0, "this checks proofs that start at the input"
        assert [len(a) for a in active] == [len(d) for d in proof.D]
        return list(active), list(proof.D)

    def sigma(self, proof: Any) -> list[list[arb]]:
        """Gz Q^-1 Gz' of the multipliers, Q proved positive; Unproved otherwise."""
        active, d = self.multipliers(proof)
        gy, gz, labels = self.reduced(active)
        flat = [arb(float(v)) for values in d for v in values]
        assert len(flat) == len(gy)
        p = [arb(1)] * self.n
        if proof.weights is not None:
            exact = [rational(v) for v in proof.weights]
            total = sum((1 / v for v in exact), fmpq(0))
            p = [arb(v if total <= 1 else v * total) for v in exact]
        if proof.relative:
            flat = self.absolute(gy, labels, flat, p)
        if not all(v > 0 for v in flat):
            raise Unproved("a multiplier is not positive")
        return [[-e for e in row] for row in eliminate(self.bordered(gy, gz, flat, p), self.n + len(gy))]

    def bordered(self, gy: Any, gz: Any, d: Any, p: Any) -> list[list[arb]]:
        """[[Q, Gz'], [Gz, 0]]."""
        m = self.n + len(gy)
        a = [[arb(0)] * (m + len(gz)) for _ in range(m + len(gz))]
        for i in range(m):
            a[i][i] = 1 / p[i] if i < self.n else 1 / d[i - self.n]
        for row, value in zip(gy, d, strict=True):
            used = [c for c in range(len(row)) if row[c] != 0]
            for i in used:
                factor = row[i] / value
                for j in used:
                    a[i][j] -= factor * row[j]
        for k, row in enumerate(gz):
            for c in range(len(row)):
                a[c][m + k] = a[m + k][c] = row[c]
        return a

    def absolute(self, gy: Any, labels: Any, d: Any, p: Any) -> list[arb]:
        """D_i in place of D_i / (variance of y_i under the multipliers of earlier taps). Any numbers > 0 will do."""
        out: list[arb] = []
        for k in sorted(set(labels)):
            before = sum(label < k for label in labels)
            mine = [i for i, label in enumerate(labels) if label == k]
            width = self.n + before
            earlier = [row[:width] for row in gy[:before]]
            targets = [gy[i][:width] for i in mine]
            matrix = Network.bordered(self, earlier, targets, out, p)
            schur = eliminate(matrix, width)
            for place, i in enumerate(mine):
                variance = -schur[place][place]
                # What never moves has w = 0 and may have any multiplier: a tiny D adds next to nothing to Sigma.
                out.append(arb((d[i] * variance).mid()) if variance > 0 else arb(2) ** -200)
        return out


# --- LipLT, which rules some of the claims ----------------------------------------------------------------------------


def norm_above(a: list[list[arb]], p: float) -> arb:
    """A number that is proved to be at least |A|_p, p in {2, inf}, and hardly larger."""
    if not a or not any(e != 0 for row in a for e in row):
        return arb(0)
    if p == math.inf:
        return max((sum((abs(e) for e in row), arb(0)) for row in a), key=lambda v: float(v.mid()))
    floats = np.array([[float(e.mid()) for e in row] for row in a])
    rows = a if len(a) <= len(a[0]) else [list(column) for column in zip(*a, strict=True)]
    gram = [[sum((x * y for x, y in zip(r, q, strict=True)), arb(0)) for q in rows] for r in rows]
    top = float(np.linalg.norm(floats, 2))
    for slack in (1e-13, 1e-11, 1e-9):
        s = arb(top) * arb(1 + slack)
        if positive([[s * s * (i == j) - e for j, e in enumerate(row)] for i, row in enumerate(gram)]):
            return s
    raise Unproved("no bound of a norm")


class Triangle:
    """LipLT in balls: (value, per_class, pairs) for one centre and one way to stack taps."""

    def __init__(self, form: LureForm, gain: Gain, nodes: Any, p: float) -> None:
        self.form, self.gain, self.p = form, gain, p
        self.factors = [self.multiplicity(k) for k in range(len(form.taps))]
        reach = {(): arb(1)}
        for target in nodes:
            rows = [[f * e for e in row] for k in target for f, row in self.scaled(k)]
            reach[target] = sum(
                (norm_above(self.columns(rows, source), p) * m for source, m in reach.items()), arb(0)
            )
        blocks = {
            source: self.columns([[arb(e) for e in r] for r in gain.z.tolist()], source) for source in reach
        }
        self.value = sum((norm_above(blocks[source], p) * m for source, m in reach.items()), arb(0))
        outputs = range(form.num_outputs)
        self.per_class = [
            sum((self.dual(blocks[s][i]) * m for s, m in reach.items()), arb(0)) for i in outputs
        ]
        self.pairs = {
            (i, j): sum(
                (self.dual([a - b for a, b in zip(blocks[s][i], blocks[s][j], strict=True)]) * m
                 for s, m in reach.items()),
                arb(0),
            )
            for i in outputs
            for j in range(i)
        }  # fmt: skip

    def multiplicity(self, k: int) -> list[arb] | None:
        """The factors of the pre-activations of a group tap: the root of how many groups an entry belongs to."""
        tap = self.form.taps[k]
        if tap.groups is None:
            return None
        counts = np.zeros(tap.size_in, int)
        for row in tap.groups.array:
            counts[sorted(set(row.tolist()))] += 1
        return [arb(int(c)).sqrt() if self.p == 2 else arb(1) for c in counts]

    def scaled(self, k: int) -> Any:
        rows = [[arb(e) for e in row] for row in self.gain.y[k].tolist()]
        return zip(self.factors[k] or [arb(1)] * len(rows), rows, strict=True)

    def columns(self, rows: list[list[arb]], source: Any) -> list[list[arb]]:
        gain = self.gain
        chosen = range(gain.n) if not source else [
            c for k in source for c in range(gain.starts[k], gain.starts[k] + len(gain.neurons[k]))
        ]  # fmt: skip
        return [[row[c] for c in chosen] for row in rows]

    def dual(self, row: list[arb]) -> arb:
        if self.p == 2:
            return sum((e * e for e in row), arb(0)).sqrt()
        return sum((abs(e) for e in row), arb(0))


def triangles(form: LureForm, p: float) -> list[Triangle]:
    gains = [exact_gain(form, centred) for centred in (True, False)]
    return [Triangle(form, gain, nodes, p) for gain in gains for nodes in partitions(form)]


def recheck(certificate: Any, form: LureForm, lower: float = 1.0) -> dict[str, float]:
    """Prove every claim of a certificate again; Unproved where one follows neither from its multipliers nor from LipLT.

    Args:
        lower: claims are multiplied by this first: a factor below 1 must make the proof fail.

    Returns:
        By how much (relative) some claim of each kind could be smaller: close to `RESERVE` where the proof is sharp.
    """
    ctx.prec = PRECISION
    network = Network(form)
    sigmas = [network.sigma(proof) for proof in certificate.proofs]
    outputs = range(certificate.num_outputs)
    others: list[Triangle] = []
    least: dict[str, float] = {}

    def liplt() -> list[Triangle]:
        if not others:
            others.extend(triangles(form, certificate.norm))
        return others

    def proved(kind: str, limit: arb, squares: list[arb], rest: Callable[[Triangle], arb]) -> None:
        if any(s <= limit * limit or (s == 0 and limit == 0) for s in squares):
            best = min(float(s.sqrt().mid()) if s > 0 else 0.0 for s in squares)
        else:
            found = [rest(t) for t in liplt()]
            if not any(v <= limit for v in found):
                shown = [squares[0].sqrt().str(12), found[0].str(12)]
                raise Unproved(
                    f"{kind} <= {limit.str(12)} is claimed, shown are {' and (LipLT) '.join(shown)}"
                )
            best = min(float(v.mid()) for v in found)
        top = float(limit.mid())
        least[kind] = min(least.get(kind, math.inf), 1 - best / top if top else 0.0)

    claim = arb(certificate.value) * arb(lower)
    if certificate.norm == 2:
        whole = any(
            positive([[claim * claim * (i == j) - s[i][j] for j in outputs] for i in outputs])
            or (claim == 0 and all(e == 0 for row in s for e in row))
            for s in sigmas
        )
        if not whole and not any(t.value <= claim for t in liplt()):
            raise Unproved(f"L <= {claim.str(15)} is claimed; neither the multipliers nor LipLT prove it")
    else:
        for i in outputs:
            proved("value", claim, [s[i][i] for s in sigmas], lambda t, i=i: t.value)
    if certificate.per_class is not None:
        for i in outputs:
            limit = arb(float(certificate.per_class[i])) * arb(lower)
            proved("per_class", limit, [s[i][i] for s in sigmas], lambda t, i=i: t.per_class[i])
    if certificate.pairwise is not None:
        for i in outputs:
            for j in range(i):
                limit = arb(float(certificate.pairwise[i, j])) * arb(lower)
                squares = [s[i][i] + s[j][j] - s[i][j] - s[j][i] for s in sigmas]
                proved("pairwise", limit, squares, lambda t, i=i, j=j: t.pairs[i, j])
    return least
