"""Elementwise expressions of one real variable, as small records hashable by value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One operation of an expression.

    `op` is "x" (the variable), "const" (`params = (index,)` into the constants kept beside the
    expression), "to_float" (bool to 0/1) or the name of a lax primitive; `args` are indices of earlier
    nodes.
    """

    op: str
    args: tuple[int, ...] = ()
    params: tuple = ()


@dataclass(frozen=True)
class Expr:
    """A function of one real variable: node `i` refers to nodes below `i`, the last is the result."""

    nodes: tuple[Node, ...]


#: Where the slope is unbounded, or the function jumps or is not defined everywhere: no slopes can be declared.
REPLACE = "use a function whose slope is bounded on all of R, or bound the part of the network before it"
#: Where a slope may well be bounded, but is not known.
DECLARE = "if its slope is bounded declare it with register_activation; otherwise use another activation"


class SlopeError(ValueError):
    """The slope range of an expression could not be proved; `reason` is the cause, `remedy` the suggested fix."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy
