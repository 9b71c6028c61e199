"""Random programs over all rules of lipbounds/_tracing/rules.py, written with public functions of JAX.

Every entry of `OPS` (in `maps` and `nonlinear`) draws one expression for given shapes. `supported` entries have a bound
on their own (a test says so); others may be refused, but by the library's own errors, and are held to the same
properties if not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import jax
from hypothesis import strategies as st

from . import maps, nonlinear  # noqa: F401  (they fill the table)
from .entries import OPS, Context, Entry, Shape
from .program import Program, Step, result_of

LARGEST = 48  # entries of one value

SUPPORTED = [n for n, e in OPS.items() if e.supported]
KINDS = {
    kind: [n for n, e in OPS.items() if e.kind == kind for _ in range(e.weight)]
    for kind in ("linear", "activation", "group", "structure", "open")
}
MIX = ["linear"] * 9 + ["activation"] * 7 + ["group"] * 3 + ["structure"] * 2 + ["open"]


# --- programs ------------------------------------------------------------------------------------------------------

INPUTS: list[Shape] = [(1,), (2,), (3,), (4,), (5,), (6,), (2, 3), (4, 2), (3, 3), (1, 4, 2), (2, 3, 2)]


class Builder:
    """Values so far, and steps drawn over them."""

    def __init__(self, rng: random.Random, shape: Shape, dtype: str, extreme: float = 1.0):
        self.rng, self.shape, self.dtype, self.extreme = rng, shape, dtype, extreme
        self.steps: list[Step] = []
        self.values: list[tuple[Shape, str]] = [(shape, dtype)]

    def context(self, args: Sequence[int]) -> Context:
        known = [self.values[a] for a in args]
        return Context(self.rng, [s for s, _ in known], [d for _, d in known], self.extreme)

    def step(self, entry: Entry, args: tuple[int, ...]) -> bool:
        """Append one step of this entry, if it fits values of these shapes."""
        if len({self.values[a][1] for a in args}) > 1:
            return False
        text = entry.draw(self.context(args))
        return text is not None and self.add(entry.name, text, args, entry.rounded)

    def add(self, name: str, text: str, args: tuple[int, ...], rounded: bool = False) -> bool:
        with jax.enable_x64(self.dtype == "float64"):
            result = result_of(text, [self.values[a] for a in args])
        if result is None or not result[1].startswith(("float", "bfloat")):
            return False
        if not 0 < math.prod(result[0]) <= LARGEST or len(result[0]) > 4:
            return False
        self.steps.append(Step(name, text, args, *result, rounded))
        self.values.append(result)
        return True

    def finish(self, most: int = 8) -> Program:
        """A vector of a few outputs over the values that nothing reads yet."""
        used = {a for s in self.steps for a in s.args}
        ends = [i for i in range(len(self.values)) if i not in used][-6:]
        ends = [i for i in ends if self.values[i][1] == self.values[ends[-1]][1]]
        flat = "jnp.ravel({0})"
        if len(ends) > 1:
            flat = "jnp.concatenate([" + ", ".join(f"jnp.ravel({{{j}}})" for j in range(len(ends))) + "])"
        size = sum(math.prod(self.values[i][0]) for i in ends)
        g = self.context(ends)
        if size > most or g.chance(60):
            flat = f"{g.weights((g.integer(1, 4), size), size)} @ {flat}"
        self.add("output", flat, tuple(ends))
        return self.program()

    def program(self) -> Program:
        """The steps so far; the last one has to be a vector."""
        return Program(self.shape, self.dtype, tuple(self.steps)).pruned()


def program_of(seed: int) -> Program:
    """Small networks with branches; few have extreme scales, one step in twenty may be refused."""
    rng = random.Random(seed)
    g = Context(rng, [], [])
    extreme = g.pick([1.0] * 38 + [1e-30, 1e30])
    dtype = g.pick(["float32"] * 6 + ["float64"] * 3 + ["bfloat16", "float16"])
    if extreme != 1.0:
        dtype = g.pick(["float32", "float64"])
    builder = Builder(rng, g.pick(INPUTS), dtype, extreme)
    wanted, mix, deep = g.pick([1, 2, 2, 3, 3, 4, 5, 6, 8]), MIX, 80
    if g.chance(20):  # linear branches: quick to check, and many rules at once
        wanted, mix, deep = 9, ["linear"], 40
    for _ in range(4 * wanted):
        entry = OPS[g.pick(KINDS[g.pick(mix)])]
        last = len(builder.values) - 1
        first = last if g.chance(deep) else g.integer(0, last)
        args = (first,) if entry.operands == 1 else (first, g.integer(0, last))
        if entry.operands == 2 and g.chance(75):
            alike = [i for i, v in enumerate(builder.values) if v == builder.values[first] and i != first]
            args = (first, g.pick(alike)) if alike else args
        builder.step(entry, args)
        if len(builder.steps) >= wanted:
            break
    return builder.finish()


def programs() -> st.SearchStrategy[Program]:
    """Programs, each of one seed: hypothesis keeps the seeds apart, the grammar spreads evenly over its entries."""
    return st.integers(0, 2**62).map(program_of)
