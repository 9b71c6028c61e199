"""Group refused equations into softmax, attention and normalisations, so that each is one entry of the error.

A composite is recognised by its shape in the flat program: a quotient of exponentials and their sum, two products
around a softmax, a quotient by a root of squares. This affects only the text of the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lipbounds._tracing.flat import Eqn, Value
from lipbounds._tracing.rules import Refused
from lipbounds.errors import Unsupported

_MOVES = frozenset(
    """reshape squeeze broadcast_in_dim transpose convert_element_type stop_gradient copy name optimization_barrier
    reduce_precision""".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_window_sum dot_general conv_general_dilated".split())
_ARITHMETIC = frozenset("add sub mul div max min sqrt rsqrt pow integer_pow select_n neg add_any".split())
_MOST = 60  # equations walked back through
_LAYERS = ("BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm", "InstanceNorm")


SOFTMAX = Refused(
    "softmax cannot be bounded here",
    "drop a final softmax and certify the logits: the order of the classes stays the same; "
    "inside a network use another function in its place",
)
LOG_SOFTMAX = Refused(
    "the logarithm of a weighted or masked sum of exponentials cannot be bounded here in this form",
    "use constant weights b >= 0, not all 0: with negative weights, or weights that depend on x, there is no bound in "
    "general",
)
ATTENTION = Refused(
    "attention (a product of two tensors that both depend on x, softmax, and another product) cannot be bounded here: "
    "over the whole space dot-product attention has no Lipschitz constant in general",
    "bound the parts of the network before and after it, or mix positions by a constant matrix",
)
BATCH = Refused(
    "BatchNorm in training mode divides by the variance of the batch",
    "call model.eval() on a copy, so that it uses its running statistics",
)
STATISTICS = Refused(
    "{layer} divides by a standard deviation of x, which cannot be bounded here",
    "call model.eval() on a copy if this is BatchNorm in training mode; "
    "otherwise put an affine layer (a constant scale and shift) in its place",
)
ROOT_MEAN_SQUARE = Refused(
    "{layer} divides by the root mean square of x, which cannot be bounded here",
    "put a constant scale in its place, or bound the part of the network before it",
)
LENGTH = Refused(
    "division by a norm of x cannot be bounded here",
    "leave a final normalisation out, or divide by a constant",
)


@dataclass(frozen=True)
class _Composite:
    head: Eqn
    members: frozenset[int]  # ids of equations that are explained by it
    words: Refused


def fold(found: list[tuple[Unsupported, Eqn | None]]) -> list[Unsupported]:
    """The refusals in order; those of one composite become one entry in place of the first."""
    composites = list(_composites([eqn for _, eqn in found if eqn is not None]))
    out: list[Unsupported] = []
    told: set[int] = set()
    for item, eqn in found:
        whole = next((c for c in composites if id(eqn) in c.members), None)
        if whole is None:
            out.append(item)
        elif id(whole) not in told:
            told.add(id(whole))
            head, words = whole.head, whole.words
            out.append(
                Unsupported(head.primitive, head.path, head.outputs[0].shape, words.reason, words.remedy)
            )
    return out


def _composites(refused: list[Eqn]) -> Iterator[_Composite]:
    taken: set[int] = set()
    products = [e for e in refused if e.primitive == "dot_general"]
    for eqn in refused:
        for parts in _softmax(eqn):
            last = [p for p in products if any(_back(v).producer is eqn for v in p.inputs)]
            first = [p for p in products if p in _sources(parts[-1])]
            if last and first:
                found = _Composite(last[0], _ids(*parts, *last, *first), ATTENTION)
            else:
                log = eqn.primitive == "log"
                around = _around(refused, parts[-1]) if log else []
                found = _Composite(eqn, _ids(*parts, *around), LOG_SOFTMAX if log else SOFTMAX)
            yield found
            taken |= found.members
    for eqn in refused:
        if id(eqn) not in taken:
            for top, below in _quotients(eqn):
                whole = _normalisation(eqn, top, below)
                if whole is not None:
                    yield whole
                    break


def _around(refused: list[Eqn], exp: Eqn) -> list[Eqn]:
    """The other equations of jax.nn.logsumexp: it masks entries of weight 0 and turns a sum below 0 into NaN."""
    found, masks = [], [exp]
    for eqn in reversed(refused):
        if eqn.primitive in ("select_n", "ne") and any(
            eqn in _producers(v) for mask in masks for v in mask.inputs
        ):
            found.append(eqn)
            masks.append(eqn)
    made = [exp]
    for eqn in refused:
        if eqn.primitive in ("mul", "reduce_sum", "sign", "lt", "select_n") and any(
            before in _producers(v) for v in eqn.inputs for before in made
        ):
            found.append(eqn)
            made.append(eqn)
    return found


def _producers(value: Value) -> list[Eqn]:
    """The producers of a value, through moves, sums and differences."""
    found: list[Eqn] = []
    stack = [value]
    while stack and len(found) < _MOST:
        eqn = _back(stack.pop()).producer
        if eqn is not None and eqn not in found:
            found.append(eqn)
            if eqn.primitive in ("sub", "add", "mul", "reduce_sum"):
                stack.extend(v for v in eqn.inputs if v.depends)
    return found


def _ids(*eqns: Eqn) -> frozenset[int]:
    return frozenset(map(id, eqns))


def _back(value: Value) -> Value:
    """Go back through equations that only move entries."""
    while value.producer is not None and value.producer.primitive in _MOVES:
        value = value.producer.inputs[0]
    return value


def _past_constants(value: Value) -> Value:
    """Go back through moves, and through sums, products and maxima with constants."""
    while True:
        value = _back(value)
        eqn = value.producer
        depending = [v for v in eqn.inputs if v.depends] if eqn is not None else []
        if eqn is None or eqn.primitive not in _ARITHMETIC or len(depending) != 1:
            return value
        value = depending[0]


def _quotients(eqn: Eqn) -> Iterator[tuple[Value, Value]]:
    """(numerator, denominator), or (factor, a reciprocal)."""
    if eqn.primitive in ("div", "mul") and len(eqn.inputs) == 2:
        first, second = eqn.inputs
        if second.depends:
            yield first, second
        if eqn.primitive == "mul" and first.depends:
            yield second, first


def _softmax(eqn: Eqn) -> Iterator[tuple[Eqn, ...]]:
    """The equations of exp(u) / sum(exp(u)), or of log(sum(exp(u))); exp is the last."""
    if eqn.primitive == "log":
        pairs: list[tuple[Value | None, Value]] = [(None, eqn.inputs[0])]
    else:
        pairs = [(_past_constants(a), b) for a, b in _quotients(eqn)]
    for top, below in pairs:
        total = _past_constants(below).producer
        if total is not None and total.primitive == "abs":  # as jax writes logsumexp
            total = _past_constants(total.inputs[0]).producer
        if total is None or total.primitive != "reduce_sum":
            continue
        summand = _past_constants(total.inputs[0])
        if top is None and summand.producer is not None and summand.producer.primitive == "mul":
            factors = map(_past_constants, summand.producer.inputs)  # a weight that depends on x
            summand = next(
                (v for v in factors if v.producer is not None and v.producer.primitive == "exp"), summand
            )
        exp = summand.producer
        if exp is not None and exp.primitive in ("exp", "exp2") and top in (None, summand):
            yield eqn, exp
            return


def _sources(eqn: Eqn) -> list[Eqn]:
    """Products of two tensors from which the argument of exp comes, by arithmetic and moves."""
    found, stack = [], list(eqn.inputs)
    seen: set[int] = set()
    while stack and len(seen) < _MOST:
        value = _back(stack.pop())
        inner = value.producer
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        if inner.primitive == "dot_general" and all(v.depends for v in inner.inputs):
            found.append(inner)
        elif inner.primitive in _ARITHMETIC | _REDUCTIONS:
            stack.extend(v for v in inner.inputs if v.depends)
    return found


def _is_square(eqn: Eqn) -> bool:
    if eqn.primitive == "mul":
        return _back(eqn.inputs[0]) is _back(eqn.inputs[1])
    return eqn.primitive in ("square", "abs") or (
        eqn.primitive == "integer_pow" and int(eqn.params["y"]) == 2
    )


def _normalisation(head: Eqn, top: Value, below: Value) -> _Composite | None:
    """A quotient by something made of squares of x, summed."""
    members, squares, sums, stack = [head], [], [], [below]
    mean = False
    while stack:
        eqn = _back(stack.pop()).producer
        if eqn is None or len(members) > _MOST:
            return None
        members.append(eqn)
        if _is_square(eqn):
            squares.append(eqn)
            continue
        depending = [v for v in eqn.inputs if v.depends]
        if eqn.primitive in _REDUCTIONS and len(depending) == 1:
            sums.append(eqn)
        elif eqn.primitive not in _ARITHMETIC:
            return None
        mean |= eqn.primitive in ("div", "mul") and len(depending) == 1 and not sums
        stack.extend(depending)
    if not squares or not sums:
        return None
    return _Composite(head, _ids(*members), _normalisation_words(head, top, squares, sums, mean))


def _normalisation_words(head: Eqn, top: Value, squares: list[Eqn], sums: list[Eqn], mean: bool) -> Refused:
    named = next((layer for layer in _LAYERS if layer in head.path), None)
    alone = all(_count(eqn) == 1 for eqn in sums)
    centred = len(squares) > 1 or any(_difference(v) for v in (top, *(s.inputs[0] for s in squares)))
    if named == "BatchNorm" or (named is None and centred and alone):
        return BATCH
    if centred:
        words, layer = (
            STATISTICS,
            named or "a normalisation (LayerNorm, GroupNorm, BatchNorm in training mode)",
        )
    elif named is not None or mean:
        words, layer = ROOT_MEAN_SQUARE, named or "a normalisation (RMSNorm)"
    else:
        return LENGTH
    return Refused(words.reason.format(layer=layer), words.remedy)


def _count(eqn: Eqn) -> int:
    """How many entries are summed for one entry of the result."""
    sizes = [1, 1]
    for i, value in enumerate((next(v for v in eqn.inputs if v.depends), eqn.outputs[0])):
        for n in value.shape:
            sizes[i] *= n
    return sizes[0] // max(sizes[1], 1)


def _difference(value: Value) -> bool:
    """Whether it is u - v with both depending on x."""
    eqn = _past_constants(value).producer
    return eqn is not None and eqn.primitive == "sub" and all(v.depends for v in eqn.inputs)
