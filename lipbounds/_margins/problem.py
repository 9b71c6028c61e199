"""What is known about a network and its balls before multipliers are searched: kinks, ranges, local bounds.

A tap of the elementwise view with one kink has slope a up to t and b from there, so v = a y + (b - a) relu(y - t) up to
a constant, and only the relu is nonlinear; others are curves (`forms`). Ranges of pre-activations are those of the
local ellipsoids, or of lines where these are narrower (`narrow`), all proved.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lipbounds._activations.slopes_on_intervals import FAR
from lipbounds._form.inputs import Box
from lipbounds._form.lure import LureForm, proved_slopes
from lipbounds._gain.memory_budget import show
from lipbounds._gain.wide_blocks import LIMIT
from lipbounds._local import box as localbox
from lipbounds._local import ellipsoids
from lipbounds._local.engines import Around, NoEngineError, too_large, ways
from lipbounds._local.forward import logits, proved_gaps
from lipbounds._local.radius_search import row_roots
from lipbounds._local.stages import stages_of
from lipbounds._margins import forms, merged, proof, ranges, search
from lipbounds._margins.counterexamples import counterexamples
from lipbounds._margins.kinks import kinks_of
from lipbounds._norms.rounding import U, gamma
from lipbounds._text.device import sharing
from lipbounds._triangle import recursion

_CALLS = 2  # of the local ellipsoids; the second one knows the slopes of the first
_SMALL = 0.03  # root of a multiplier at the start, so that its gradient is not 0
_USUAL = 100  # open neurons above which it is smaller: each takes from the bound
_LEAST = 1e-3  # least start of M relative to its unit
_TINY = 1e-30
_NARROW = 1e-3  # least width of a sector at the start
_TOGETHER = 8  # margins that are searched together
_MANY = 2e10  # operations of an evaluation above which open neurons may be searched alone
_FILLING = {"cpu": 2**18}  # entries of the matrices that are searched together there; elsewhere `_MORE`
_MORE = 2**22
_KEPT = 8  # balls whose curves are kept
_FORMS = 8 * 12 * 6  # bytes of them, a neuron
_COPIES = 6  # matrices of one size that a search or a proof holds, at most


@dataclass(frozen=True, eq=False)
class Balls:
    """N images with what is proved of their balls, and of the margins there.

    Args:
        gaps: (N, K) margins at the centres, rounded down, inf for the own class (of one output (N, 1)).
        local: (N, K) lower bounds of the margins on the balls, by the anchored ellipsoids.
        h, lo, hi: per tap (N, n), pre-activations, less the kink if there is one: at the centre, and their range on the
            ball.
        wrong: per tap (N,), ||h - h_exact||_2 is at most that.
        noise: per tap (N, n), r D r of the ellipsoids, for the start of the search.
    """

    gaps: np.ndarray
    local: np.ndarray
    h: tuple[np.ndarray, ...]
    lo: tuple[np.ndarray, ...]
    hi: tuple[np.ndarray, ...]
    wrong: tuple[np.ndarray, ...]
    noise: tuple[np.ndarray, ...]


class Problem:
    """The network, prepared once, and the balls around examples x (N, *in_shape), of labels (N,).

    Raises:
        ValueError: taps that are no functions of one number, a network wider than local ellipsoids can take, norm 1.
    """

    def __init__(
        self,
        form: LureForm,
        x: np.ndarray,
        labels: np.ndarray,
        eps: np.ndarray,
        *,
        norm: float,
        box: Box | None,
        memory: int | None = None,
    ) -> None:
        if "ellipsoids" not in ways(form, norm, "verified", memory):  # it raises where there are none at all
            raise NoEngineError(f"margins begin with local ellipsoids, but {too_large(form, memory)}")
        self.memory = LIMIT if memory is None else memory
        self.around = Around(form, norm, x, box=box, way="ellipsoids", memory=memory)
        self.view, self.form, self.norm, self.box = self.around.view, form, norm, box
        self.kinks = kinks_of(self.view)
        self.labels, self.eps, self.x = labels, eps, x
        low, high = localbox.rooms(x, box)
        self.low, self.high = -np.minimum(low, eps[:, None]), np.minimum(high, eps[:, None])
        self.balls = self._balls()
        self.made: dict[int, tuple[forms.Curve | None, ...]] = {}
        self.lock = threading.Lock()  # of these
        self.narrowed: set[int] = set()
        self.too_large: dict[int, int] = {}  # examples whose proof does not fit, with the bytes that it takes

    @property
    def notes(self) -> tuple[str, ...]:
        return too_large_notes(self.too_large, len(self.x), self.memory)

    @functools.cached_property
    def net(self) -> search.Network:
        """The network with its layers as dense matrices."""
        return _network(self.view)

    @functools.cached_property
    def layered(self) -> tuple[int, float]:
        """(bytes, operations) of an evaluation for one margin by `search.Network`, with its layers."""
        sizes = [tap.size_in for tap in self.view.taps]
        need = 4 * (sum(n * n for n in sizes) + _COPIES * max(sizes, default=0) ** 2)
        work = 0.0
        for stage in self.around.ready.stages:
            n, d, after = stage.neurons, stage.T.shape(stage.neurons)[1], stage.G.shape(stage.neurons)[0]
            own = 6.0 * n**3 + 2.0 * after * after * n
            if stage.T.array is not None:
                own += 8.0 * n * d * max(n, d) + 2.0 * after * d * (n + after + d)
            work += 3 * own  # with the gradient
            need += 12 * n * (d * (stage.T.array is not None) + after * (stage.G.array is not None))
        return need, work

    def bounded(self, row: int) -> bool:
        """Whether all ranges of an example are far from the end of float64."""
        return all((np.abs(a[row]) < FAR).all() for a in (*self.balls.lo, *self.balls.hi))

    def live(self, row: int) -> int:
        """The neurons of an example that are not stable."""
        return sum(int(part.sum()) for part in self.open(row)[0])

    def apart(self, row: int) -> bool:
        """Whether the open neurons of an example are searched alone: where the network is wide and that is faster."""
        need, all_layers = self.layered
        return (
            all_layers > _MANY
            and self.bounded(row)
            and (2 * self.work(row) < all_layers or need > self.memory)
        )

    def work(self, row: int | None) -> float:
        """Operations of an evaluation for one margin; of one example whose open neurons are searched alone."""
        return self.layered[1] if row is None else merged.operations(self.live(row), self.low.shape[1])

    def together(self, row: int | None) -> int:
        """Margins that can be searched at the same time; of one example where its open neurons are searched alone."""
        if row is None:
            return max(1, min(_TOGETHER, self.memory // max(self.layered[0], 1)))
        n, d = self.live(row), self.low.shape[1]
        # larger ones fill a machine alone, and often one is enough
        few = _FILLING.get(sharing()[0].platform, _MORE) // merged.padded(n) ** 2
        return max(1, min(_TOGETHER, few, self.memory // merged.footprint(n, d)))

    def counterexamples(self, rows: np.ndarray) -> np.ndarray:
        """Which balls of these rows hold a point that is classified otherwise than labelled."""
        found = counterexamples(
            self.form,
            self.x[rows],
            self.labels[rows],
            self.eps[rows],
            self.low[rows],
            self.high[rows],
            self.norm,
        )
        return np.isfinite(found)

    @property
    def classes(self) -> int:
        return self.form.num_outputs

    def aim(self, row: int, other: int) -> np.ndarray:
        """The margin of class `other`: z_y - z_other; of one output z or -z, by the label."""
        aim = np.zeros(self.classes)
        if self.classes == 1:
            aim[0] = 1.0 if self.labels[row] == 1 else -1.0
        else:
            aim[self.labels[row]] += 1.0
            aim[other] -= 1.0
        return aim

    def others(self, row: int) -> list[int]:
        """The classes that have a margin."""
        return [k for k in range(self.classes) if self.classes == 1 or k != self.labels[row]]

    def _balls(self) -> Balls:
        gaps = proved_gaps(*logits(self.form, self.x), self.labels)
        scale = np.zeros_like(gaps)
        parts: list[tuple[slice, list[ellipsoids.Range], Any]] = []  # by threads, in any order

        def one(near: Around, rows: slice) -> None:
            for call in range(_CALLS):
                passed: list[ellipsoids.Range] = []
                labels = self.labels[rows]
                out = near.outputs(slice(None), self.eps[rows], labels=labels, call=call, ranges=passed)
            scale[rows] = row_roots(out, labels)
            parts.append((rows, passed, near.values))

        self.around.each(one, "local ellipsoids")
        with np.errstate(all="ignore"):
            moved = np.where(gaps == np.inf, 0.0, self.eps[:, None] * scale * (1 + 4 * U))
            local = np.where(np.isnan(moved), -np.inf, np.nextafter(gaps - moved, -np.inf))
        local[gaps == np.inf] = np.inf
        shapes = [(len(self.x), tap.size_in) for tap in self.view.taps]
        h, lo, hi, noise = (tuple(np.zeros(shape) for shape in shapes) for _ in range(4))
        wrong = tuple(np.zeros(len(self.x)) for _ in shapes)
        for rows, passed, at in parts:
            for k, (found, y, error, kinks) in enumerate(
                zip(passed, at.y, at.error, self.kinks, strict=True)
            ):
                at_kink = 0.0 if kinks is None else kinks.at
                h[k][rows] = y - at_kink
                shift = np.abs(h[k][rows]) * 2 * U * (at_kink != 0)
                wrong[k][rows] = error + np.sqrt(np.square(shift).sum(axis=1)) * (
                    1 + gamma(shift.shape[1] + 8)
                )
                own = wrong[k][rows][:, None] * (1 + 4 * U)
                lo[k][rows] = np.nextafter(np.nextafter(h[k][rows] - own, -np.inf) - found.down, -np.inf)
                hi[k][rows] = np.nextafter(np.nextafter(h[k][rows] + own, np.inf) + found.up, np.inf)
                noise[k][rows] = found.rd
        return Balls(gaps, local, h, lo, hi, wrong, noise)

    # -- one image, one margin ---------------------------------------------------------------------------------------

    def curves(self, row: int) -> tuple[forms.Curve | None, ...]:
        """What is known of the taps without a kink on a ball whose ranges are finite."""
        with self.lock:
            if row not in self.made:
                if len(self.made) >= _KEPT:
                    self.made.pop(next(iter(self.made)))
                self.made[row] = tuple(
                    self._curve(k, row) if one is None else None for k, one in enumerate(self.kinks)
                )
            return self.made[row]

    def _curve(self, k: int, row: int) -> forms.Curve:
        tap = self.view.taps[k]
        assert tap.expr is not None
        columns = tap.constants_by_entry(recursion.host_form(self.view).consts)
        h, lo, hi = (part[k][row] for part in (self.balls.h, self.balls.lo, self.balls.hi))
        return forms.of_curve(tap.expr, columns, h, lo, hi, proved_slopes(self.view, k))

    def open(self, row: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Per tap: which neurons are not stable, and the slope of w for those that are (0 or 1)."""
        opened, slopes = [], []
        for k, (kinks, curve) in enumerate(zip(self.kinks, self.curves(row), strict=True)):
            lo, hi = self.balls.lo[k][row], self.balls.hi[k][row]
            live = self.around.ready.stages[k].live  # the others are stable with any slope
            if kinks is not None:
                bent = (lo < 0) & (hi > 0) & (kinks.gain != 0)
                slopes.append((lo >= 0).astype(float))
            else:
                assert curve is not None
                bent = curve.gain > 0
                slopes.append(np.zeros(len(lo)))
            opened.append(bent & (True if live is None else live))
        return opened, slopes

    def narrow(self, row: int) -> None:
        """Replace the ranges of an example by those of lines where these are narrower; call it before `item`."""
        balls, taps = self.balls, range(len(self.kinks))
        if row in self.narrowed or not self.bounded(row):
            return
        self.narrowed.add(row)
        if self._footprint(row) > self.memory or not self.live(row):
            return
        gain, curves = self.gain(row), self.curves(row)
        facts = self.facts(row, gain)

        def lines_of(k: int, lo: np.ndarray, hi: np.ndarray) -> list[ranges.Lines]:
            at, curve = gain.at[k], curves[k]
            h = balls.h[k][row][at]
            if curve is None:
                return ranges.of_relu(lo, h, hi)
            balls.lo[k][row][at], balls.hi[k][row][at] = lo, hi
            reach = np.maximum(hi - h, h - lo) * (1 + 4 * U)
            new, old = (forms.Curve(*(part[..., at] for part in one)) for one in (self._curve(k, row), curve))
            return [
                ranges.converted(lines, new, old, reach)
                for lines in ranges.of_curve(new, (lo + hi) / 2 - h, reach)
            ]

        lo, h, hi = (
            np.concatenate([part[k][row][gain.at[k]] for k in taps]) for part in (balls.lo, balls.h, balls.hi)
        )
        ball = ranges.Ball(float(self.eps[row]), self.norm, -self.low[row], self.high[row])
        with np.errstate(all="ignore"):
            lo, hi = ranges.narrowed(gain, (lo, h, hi), lines_of, facts.wrong, ball)
        for k in taps:
            balls.lo[k][row][gain.at[k]], balls.hi[k][row][gain.at[k]] = (
                end[gain.tap == k] for end in (lo, hi)
            )
        with self.lock:
            self.made.pop(row, None)

    def _footprint(self, row: int) -> int:
        """Bytes of the proof of a margin, or of its search if that takes more."""
        n, d = self.live(row), self.low.shape[1]
        bends = sum(
            tap.size_in for tap, kinks in zip(self.view.taps, self.kinks, strict=True) if kinks is None
        )
        need = 8 * _COPIES * (n + d) * (2 * n + d) + _FORMS * _KEPT * bends
        return max(need, merged.footprint(n, d) if self.apart(row) else self.layered[0])

    def item(self, row: int, other: int) -> tuple[search.Item, search.Multipliers] | None:
        """The margin as an item of the search, and parameters that prove about what the ellipsoids do.

        None where the ellipsoids are not finite, the margin does not move, there are no inputs, eps^2 or a multiplier
        leaves the range of float64, or its proof does not fit the memory.
        """
        balls, eps = self.balls, float(self.eps[row])
        moved = float(balls.gaps[row, other] - balls.local[row, other])
        if not 0 < moved < np.inf or not self.bounded(row):
            return None
        if not (0 < eps * eps < np.inf and moved / (eps * eps) < np.inf and self.low.shape[1]):
            return None
        ball = moved / (2 * eps * eps)
        opened, slopes = self.open(row)
        need = self._footprint(row)
        if need > self.memory:
            self.too_large[row] = need
            return None
        small = _SMALL * min(1.0, (_USUAL / max(self.live(row), 1)) ** 0.5)
        neurons = [
            self._neurons(k, row, live, slope, ball)
            for k, (live, slope) in enumerate(zip(opened, slopes, strict=True))
        ]
        first = [
            _from_chords(self.balls.h[k][row], tap, small)
            if curve is None
            else _from_sector(tap, curve, small)
            for k, (tap, curve) in enumerate(zip(neurons, self.curves(row), strict=True))
        ]
        if self.norm == 2:
            boxed = np.full(self.low.shape[1], float(self.box is not None))
        else:
            boxed = self._shares(row, other)
        in_ball = 1.0 if self.norm == 2 else 0.0
        item = search.Item(
            aim=self.aim(row, other),
            eps=eps,
            round=in_ball,
            low=self.low[row],
            high=self.high[row],
            boxed=boxed,
            ball=ball,
            unit=max(moved, _TINY),
            taps=tuple(neurons),
        )
        start = np.full(boxed.shape, _SMALL if in_ball else 0.0)
        x = search.Multipliers(np.zeros(()), start, tuple(first))
        if self.apart(row):
            item, x = merged.merge(item, x)
        return _floats(item), _floats(x)

    def _shares(self, row: int, other: int) -> np.ndarray:
        """(d,) shares of the faces of an l-inf ball in the first multipliers, > 0, of sum at most 1.

        Half of them are those of the ellipsoid around the cube, the other half those of the best multipliers of an
        affine network, |gradient|.
        """
        assert self.around.ready.ball is not None
        shares = 1.0 / self.around.ready.ball
        with np.errstate(over="ignore"):
            x, aim = (a.astype(np.float32) for a in (self.x[row], self.aim(row, other)))
        size = np.abs(np.asarray(_gradient(self.form, x, aim), np.float64)).reshape(-1)
        total = float(size.sum())
        return (shares + size / total) / 2 if 0 < total < np.inf else shares

    def _neurons(self, k: int, row: int, live: np.ndarray, slope: np.ndarray, ball: float) -> search.Neurons:
        """Tap k; `live` neurons are not stable, ball is the unit of lambda."""
        h, lo, hi = self.balls.h[k][row], self.balls.lo[k][row], self.balls.hi[k][row]
        kinks, curve = self.kinks[k], self.curves(row)[k]
        if kinks is not None:
            p, q, base, gain = np.maximum(h, 0.0), np.maximum(-h, 0.0), kinks.base, kinks.gain
            own_forms = forms.of_relu(np.where(live, hi, 1.0), np.where(live, -lo, 1.0))
        else:
            assert curve is not None
            p, q, base, gain, own_forms = curve.p, curve.q, curve.base, curve.gain, curve.forms
        own = self.balls.noise[k][row]
        noise = np.where(live & (own > 0), own, 1.0)
        scale = np.where(live, ball * np.square(gain) / noise, 1.0)
        kink = np.full(len(h), float(curve is None))
        return search.Neurons(base, gain, p, q, live.astype(float), slope, scale, own_forms, kink)

    def gain(self, row: int) -> proof.Gain:
        opened, slopes = self.open(row)
        total, gains = [], []
        for kinks, curve, live, s in zip(self.kinks, self.curves(row), opened, slopes, strict=True):
            own = curve if kinks is None else kinks
            assert own is not None
            total.append(own.base + np.where(live, 0.0, s * own.gain))
            gains.append(own.gain)
        return proof.gain(self.view, opened, total, gains)

    def facts(self, row: int, gain: proof.Gain) -> proof.Facts:
        parts = list[tuple[np.ndarray, np.ndarray, np.ndarray]]()
        for k, (curve, at) in enumerate(zip(self.curves(row), gain.at, strict=True)):
            h, lo, hi = (part[k][row][at] for part in (self.balls.h, self.balls.lo, self.balls.hi))
            if curve is None:
                parts.append((np.maximum(h, 0.0), np.maximum(-h, 0.0), forms.of_relu(hi, -lo)))
            else:
                parts.append((curve.p[at], curve.q[at], curve.forms[..., at]))
        wrong = float(np.sqrt(sum(float(e[row]) ** 2 for e in self.balls.wrong)) * (1 + 2.0**-20)) + 2.0**-500
        eps = float(self.eps[row]) if self.norm == 2 else np.inf
        p, q = (np.concatenate([part[i] for part in parts] or [np.zeros(0)]) for i in range(2))
        all_forms = forms.joined([part[2] for part in parts] or [np.zeros((forms.FEWEST, 6, 0))])
        free = np.zeros((len(all_forms), len(p)), bool)
        return proof.Facts(p, q, wrong, all_forms, free, self.low[row], self.high[row], eps)

    def weights(self, row: int, gain: proof.Gain, found: search.Multipliers) -> proof.Weights:
        own = self.chosen(row, gain, found.taps)
        return proof.Weights(float(found.ball), np.asarray(found.box, np.float64), own)

    def chosen(self, row: int, gain: proof.Gain, parts: Sequence[Any]) -> np.ndarray:
        """(F, ..., n) what an item has for the forms of the open neurons, from one array per tap of the search."""
        if self.apart(row):
            return np.asarray(parts[0], np.float64)[..., : len(gain.tap)]
        rows = [np.asarray(part, np.float64)[..., at] for part, at in zip(parts, gain.at, strict=True)]
        return forms.joined(rows or [np.zeros((forms.FEWEST, 0))])


def too_large_notes(sizes: Mapping[int, int], count: int, memory: int) -> tuple[str, ...]:
    """A note about the examples whose proofs take so many bytes, of `count` examples."""
    if not sizes:
        return ()
    return (
        f"without the dual for {len(sizes)} of {count} examples: its proofs take up to "
        f"{show(max(sizes.values()))}, more than memory={show(memory)}",
    )


@jax.jit
def _gradient(form: LureForm, x: Any, aim: Any) -> Any:
    return jax.grad(lambda v: aim @ form.evaluate(v, x.dtype))(x)


def _from_chords(h: np.ndarray, n: search.Neurons, small: float) -> np.ndarray:
    """Parameters (F, n) of a tap: chord slopes from h are [a, 1] for h > 0, else [0, b]; tau_r = a, tau_v = 1 - b.

    small: the least root of a multiplier.
    """
    top, bottom = forms.ends(n.forms)
    a, b = n.p / (n.p + bottom), 1 - n.q / (n.q + top)
    tr, tv = np.where(h > 0, a, 0.0), np.where(h > 0, 0.0, 1 - b)
    roots = [np.sqrt(np.maximum(t, small**2)) for t in (tv, tr, np.zeros_like(tv))]
    M = np.maximum(1 - tr - tv - 2 * roots[0] * roots[1], _LEAST)
    return np.where(n.open > 0, [np.log(M), *roots], 0.0)


def _from_sector(n: search.Neurons, curve: forms.Curve, small: float) -> np.ndarray:
    """Parameters (F, n) of a tap without a kink: the sector around the centre, and little of what is wider."""
    width = np.maximum(curve.sector[1] - curve.sector[0], _NARROW)
    roots = np.repeat((small * width)[None], len(n.forms), axis=0)
    roots[0], roots[3] = 2 * np.log(small * width), 1.0
    return np.where(n.open > 0, roots, 0.0)


def _floats(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


def _network(view: LureForm) -> search.Network:
    start, stages = stages_of(view)
    layers = []
    for stage in stages:
        rows, n = stage.T.written_out, stage.neurons
        W, H = None if rows is None else rows[:n], None
        if stage.lives_on:
            size = stage.T.shape(stage.rows)[1]
            rows = stage.T.dense(size)
            W, H = rows[:n], np.zeros((stage.G.shape(n)[0], size))
            H[stage.to] = rows[stage.of]
        layers.append(search.Layer(W, H, stage.G.written_out))
    return search.Network(start.written_out, tuple(layers))
