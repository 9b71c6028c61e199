"""A zoo of small networks for the tests: every entry exists because it has primitives the others lack.

``NETS`` maps a name to a `Net`; ``net.make(seed)`` gives ``(fn, x)``. Filled by `zoo_plain` and `zoo_flax`.
"""

from __future__ import annotations

from typing import Any

import jax
import zoo_flax
import zoo_plain
from flax import nnx
from zoo_core import NETS, Fn, Net

__all__ = ["NETS", "Fn", "Net", "example", "primitive_set", "pure", "single", "zoo_flax", "zoo_plain"]


def pure(fn: Fn) -> Fn:
    """`fn` as a function that jax transformations accept (an nnx module is merged inside each trace)."""
    if not isinstance(fn, nnx.Module):
        return fn
    graph, state = nnx.split(fn)
    return lambda x: nnx.merge(graph, state, copy=True)(x)


def single(built: Net, fn: Fn) -> Fn:
    """`fn` as a pure function of one example, whether or not the net is batched."""
    plain = pure(fn)
    return (lambda x: plain(x[None])[0]) if built.batched else plain


def example(built: Net, x: Any) -> Any:
    """One example of the example input."""
    return x[0] if built.batched else x


def primitive_set(fn: Fn, x: Any) -> frozenset[str]:
    """Names of all primitives in the jaxpr of a net, sub-jaxprs included (public API only)."""
    found: set[str] = set()

    def visit(jaxpr: Any) -> None:
        for eqn in jaxpr.eqns:
            found.add(eqn.primitive.name)
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        visit(inner)

    visit(jax.make_jaxpr(pure(fn))(x).jaxpr)
    return frozenset(found)
