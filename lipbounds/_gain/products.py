"""Products of blocks of the gain with vectors or columns on the host, without forming the blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from lipbounds._form.program import Op
from lipbounds._form.walk import Algebra, walk
from lipbounds._gain.blocks import HostForm, Node, TapScaling
from lipbounds._norms import cholesky

Product = Callable[[np.ndarray], np.ndarray]


class BlockProduct:
    """G[target, source] as a linear map in float64.

    `forward` maps (columns of the source, ...) to (rows of the target, ...), `backward` is its transpose; arrays are
    vectors or matrices of columns. Every step is a product with its matrix, or with its convolution.
    """

    def __init__(self, host: HostForm, source: Node, target: Node, scalings: Sequence[TapScaling]) -> None:
        self.host, self.source, self.target, self.scalings = host, source, target, scalings
        self.shape = host.block_shape((source, target))
        alive = host.coming_from([source], scalings) & host.leading_to([target], scalings)
        places = [host.program.written[r] for r in alive] + [host.program.last_read.get(r, 0) for r in alive]
        self.alive = alive
        self._ones: dict[int, bool] = {}
        self._places = range(
            max(min(places, default=0), 0), min(max(places, default=0) + 1, len(host.program.steps))
        )

    def is_one(self, factors: np.ndarray) -> bool:
        """Whether all these factors of a tap are 1, as those of targets usually are."""
        key = id(factors)  # the scalings keep the array
        if key not in self._ones:
            self._ones[key] = bool((factors == 1.0).all())
        return self._ones[key]

    @property
    def entries(self) -> int:
        """Entries of the steps, each of which a product with a vector reads once."""
        total = 0
        for place in self._places:
            op = self.host.program.steps[place]
            if isinstance(op, Op) and op.output in self.alive:
                for m in self.host.step(place):
                    if m.convolution is not None:
                        total += m.convolution.entries
                    elif m.rows is None:
                        total += m.matrix.nnz if sp.issparse(m.matrix) else m.matrix.size
        return total

    def norm_estimate(self) -> float:
        """An estimate of the norm, no bound."""
        there, back, n = self.from_smaller_side
        return math.sqrt(max(cholesky.top_eigenvalue(lambda v: back(there(v)), n), 0.0))

    @property
    def from_smaller_side(self) -> tuple[Product, Product, int]:
        """(product, its transpose, n): from the smaller side of the block, of n entries, to the other and back."""
        if self.shape[0] < self.shape[1]:
            return self.backward, self.forward, self.shape[0]
        return self.forward, self.backward, self.shape[1]

    def forward(self, u: np.ndarray) -> np.ndarray:
        walker = _Columns(self, self.source, u, out=False)
        held = {} if self.source else {0: u}
        walk(self.host.program, walker, held, places=self._places)
        if not self.target:
            return held.get(self.host.program.output, np.zeros((self.shape[0], *u.shape[1:])))
        return walker.collected(self.target)

    def backward(self, u: np.ndarray) -> np.ndarray:
        walker = _Columns(self, self.target, u, out=True)
        held = {} if self.target else {self.host.program.output: u}
        walk(self.host.program, walker, held, places=self._places, reverse=True)
        if not self.source:
            return held.get(0, np.zeros((self.shape[1], *u.shape[1:])))
        return walker.collected(self.source)


class _Columns(Algebra[np.ndarray]):
    """Registers as arrays (entries, ...); what starts at the taps of `begin` is u, in order."""

    def __init__(self, block: BlockProduct, begin: Node, u: np.ndarray, out: bool) -> None:
        self.block, self.program, self.out = block, block.host.program, out
        self.tail = u.shape[1:]
        self.starts: dict[int, np.ndarray] = {}
        place = 0
        for k in begin:
            size = self.program.taps[k].size_in if out else self.program.taps[k].size_out
            self.starts[k] = u[place : place + size]
            place += size
        self.ends = set(block.source if out else block.target)
        self.found: dict[int, np.ndarray] = {}

    def scaled(self, factors: np.ndarray, x: np.ndarray) -> np.ndarray:
        if self.block.is_one(factors):
            return x
        return factors.reshape(-1, *[1] * len(self.tail)) * x

    def tap(self, k: int, value: np.ndarray | None) -> np.ndarray | None:
        c, q, e = self.block.scalings[k].c, self.block.scalings[k].q, self.block.scalings[k].e
        begun, arrived = (e, q) if self.out else (q, e)
        if value is not None and k in self.ends:
            self.found[k] = self.scaled(arrived, value)
        tap = self.program.taps[k]
        if not any(r in self.block.alive for r in (tap.inputs if self.out else tap.outputs)):
            return None
        through = None if value is None or c is None else self.scaled(c, value)
        if k not in self.starts:
            return through
        start = self.scaled(begun, self.starts[k])
        return start if through is None else through + start

    def collected(self, node: Node) -> np.ndarray:
        taps = self.program.taps
        sizes = {k: taps[k].size_out if self.out else taps[k].size_in for k in node}
        return np.concatenate([self.found.get(k, np.zeros((sizes[k], *self.tail))) for k in node])

    def step(self, place: int, op: Op, held: Mapping[int, np.ndarray]) -> np.ndarray | None:
        if op.output not in self.block.alive:
            return None
        total = None
        for m in self.block.host.step(place):
            if m.register in held:
                part = m.product(held[m.register])
                total = part if total is None else total + part
        return total

    def back(self, place: int, op: Op, out: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for m in self.block.host.step(place):
            if m.register in self.block.alive:
                yield m.register, m.transposed.product(out)

    def join(self, registers: Sequence[int], held: Mapping[int, np.ndarray]) -> np.ndarray:
        sizes = self.program.sizes
        parts = [held[r] if r in held else np.zeros((sizes[r], *self.tail)) for r in registers]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def split(self, value: np.ndarray, registers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for r, place in self.program.places_of(registers):
            if r in self.block.alive:
                yield r, value[place]

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a + b
