"""A program: steps over earlier values, from which both the JAX function and a source to paste into a test are made."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

PREAMBLE = """\
import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
from jax import lax, nn


def make(exact=False):
    def const(seed, shape, scale=1.0, dtype="float32", kind="normal"):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=shape) if kind == "normal" else 1.0 + rng.uniform(size=shape)
        a = np.asarray(scale * a).astype(jnp.dtype(dtype))
        return jnp.asarray(a, jnp.float64 if exact else a.dtype)

    def cast(a, dtype):
        return a if exact else a.astype(dtype)

    def named(f, name):
        f.__name__ = f.__qualname__ = name
        return f

    def fn(v0):
"""


@dataclass(frozen=True)
class Step:
    """One value: `text` is an expression in which {0}, {1}, ... stand for the values `args`.

    Args:
        op: the entry of the grammar that drew it.
        rounded: whether JAX's own constants in it are rounded to the dtype of the network (nn.gelu, nn.selu).
    """

    op: str
    text: str
    args: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    rounded: bool = False

    def expression(self) -> str:
        return self.text.format(*(f"v{i}" for i in self.args))


@dataclass(frozen=True)
class Program:
    """Value 0 is the input; step k makes value k + 1; the last step makes the output (K,).

    In the source `make()` is the network in its own dtypes; `make(exact=True)` is the same network in float64 (under
    jax.enable_x64), with constants rounded as in the network and casts of what depends on x left out: what is
    certified, written by the user's own function and not by the traced form.
    """

    shape: tuple[int, ...]
    dtype: str
    steps: tuple[Step, ...]

    def source(self) -> str:
        body = [f"        v{k + 1} = {s.expression()}" for k, s in enumerate(self.steps)]
        end = [f"        return v{len(self.steps)}", "", "    return fn", ""]
        note = f"# input: shape {self.shape}, {self.dtype}"
        return PREAMBLE + "\n".join([*body, *end, "", note, ""])

    @functools.cached_property
    def _make(self) -> Callable[..., Callable[[Any], Any]]:
        names: dict[str, Any] = {}
        exec(compile(self.source(), "<fuzz program>", "exec"), names)
        return names["make"]

    def function(self, exact: bool = False) -> Callable[[Any], Any]:
        return self._make(exact)

    @property
    def double(self) -> bool:
        return self.dtype == "float64"

    @property
    def tolerance(self) -> float:
        """Relative distance between `make(exact=True)` and what is certified: rounding, or that of JAX's constants."""
        eps = [float(jnp.finfo(s.dtype).eps) for s in self.steps if s.rounded]
        return max([1e-9, *(32.0 * e for e in eps)])

    @property
    def largest_constant(self) -> float:
        """About the size of the largest product of constants: those of two steps may follow each other and cancel."""
        number = r"\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+"
        sizes = [max([1.0, *map(float, re.findall(number, step.text))]) for step in self.steps]
        first, second, *_ = [*sorted(sizes, reverse=True), 1.0, 1.0]
        return 4.0 * first * second

    def ops(self) -> list[str]:
        return [s.op for s in self.steps]

    def without(self, k: int) -> Program | None:
        """Step k left out, where an argument of the same shape and dtype can stand in for it."""
        step = self.steps[k]
        known = [(self.shape, self.dtype), *((s.shape, s.dtype) for s in self.steps)]
        for i in range(k, -1, -1):
            if known[i] == (step.shape, step.dtype):
                place = {j: (i if j == k + 1 else j - (j > k + 1)) for j in range(len(known))}
                steps = [
                    replace(s, args=tuple(place[a] for a in s.args))
                    for j, s in enumerate(self.steps)
                    if j != k
                ]
                return replace(self, steps=tuple(steps)) if steps else None
        return None

    def upto(self, k: int) -> Program | None:
        """The program that ends with step k, flattened; unused steps dropped."""
        last = self.steps[k]
        steps = list(self.steps[: k + 1])
        if len(last.shape) != 1:
            size = functools.reduce(lambda a, b: a * b, last.shape, 1)
            steps.append(Step("ravel", "jnp.ravel({0})", (k + 1,), (size,), last.dtype))
        return replace(self, steps=tuple(steps)).pruned()

    def pruned(self) -> Program:
        """Without steps that do not reach the output."""
        alive = {len(self.steps)}
        for k in range(len(self.steps), 0, -1):
            if k in alive:
                alive.update(self.steps[k - 1].args)
        keep = [0] + sorted(a for a in alive if a)
        place = {old: new for new, old in enumerate(keep)}
        steps = [
            replace(self.steps[k - 1], args=tuple(place[a] for a in self.steps[k - 1].args)) for k in keep[1:]
        ]
        return replace(self, steps=tuple(steps))


def result_of(text: str, args: list[tuple[tuple[int, ...], str]]) -> tuple[tuple[int, ...], str] | None:
    """(shape, dtype) of an expression over values of these shapes and dtypes; None where JAX refuses it."""
    steps = (Step("", text, tuple(range(len(args))), (), "float32"),)
    names = ", ".join(f"v{i}" for i in range(len(args)))
    source = Program((), "float32", steps).source().replace("def fn(v0):", f"def fn({names}):")
    source = source.replace("        v1 = ", "        out = ").replace("return v1", "return out")
    found: dict[str, Any] = {}
    exec(compile(source, "<fuzz step>", "exec"), found)
    try:
        out = jax.eval_shape(found["make"](), *(jax.ShapeDtypeStruct(s, d) for s, d in args))
    except (
        jax.errors.ConcretizationTypeError
    ):  # Python asks for a value of x: left to `lb.trace`, which refuses it
        return args[0]
    except (TypeError, ValueError, IndexError, NotImplementedError, ZeroDivisionError):
        return None
    return (tuple(out.shape), str(out.dtype)) if hasattr(out, "shape") else None
