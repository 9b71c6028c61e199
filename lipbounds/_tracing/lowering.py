"""From the flat equations to the canonical program: linear steps and taps, in order, nothing else.

Walking backwards from the output, every equation that is needed becomes a linear step, a tap or a refusal. A nonlinear
elementwise equation becomes a tap by finding a *dominator*: a tensor through which all its dependence on x passes
elementwise, so that the equation is one function of one variable applied to that tensor. Farther dominators are tried
first when nothing else uses what lies between (relu after relu is one tap), nearer ones when their slopes cannot be
proved, and the output of another tap last. All refusals are collected; `lower` raises once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lipbounds._activations import activations
from lipbounds._activations.expression import DECLARE, Expr, Node, SlopeError
from lipbounds._form.concrete import at_once, is_concrete
from lipbounds._form.precision import TOO_NARROW, below_single, half_or_wider, keeps_half
from lipbounds._form.program import Program
from lipbounds._form.windows import pairs
from lipbounds._tracing import rules
from lipbounds._tracing.composites import fold
from lipbounds._tracing.decided import Elementwise
from lipbounds._tracing.emitter import Emitter, constant_key
from lipbounds._tracing.flat import Eqn, Flat, Value
from lipbounds._tracing.parameters import not_understood
from lipbounds._tracing.rules import Alias, Group, Linear, Refused
from lipbounds.errors import Unsupported, UnsupportedError

_MOST_EXPANDED = 400  # elementwise equations walked back through in search of a dominator


def lower(flat: Flat) -> tuple[Program, tuple[Any, ...], tuple[Any, ...], dict[int, int]]:
    """Program, leaves and slopes of a flat program with one output; and the register of each value that has one.

    Raises:
        UnsupportedError: everything that has no bound, at once.
    """
    return Lowering(flat).run()


class Lowering:
    def __init__(self, flat: Flat):
        self.flat = flat
        self.refused: dict[tuple[str, str, tuple[int, ...], str], Unsupported] = {}
        self.blamed: dict[tuple[str, str, tuple[int, ...], str], Eqn] = {}
        self.aliases: dict[int, Value] = {}
        self.linear: dict[int, Linear] = {}  # by index of the output value
        self.taps: dict[int, Elementwise | Group] = {}
        self.nested: dict[int, Elementwise | None] = {}  # what `composed` found
        self.consumers: dict[int, list[Eqn]] = {}
        self.rules: dict[int, Any] = {}  # what each equation is, by id
        self.misread: set[int] = set()  # those with parameters that are not understood
        self.live: set[int] = set()  # values that reach the output
        self._find_consumers()

    # -- reading the flat program -----------------------------------------------------------------------------------

    def _find_consumers(self) -> None:
        """Find the readers of each tensor among the equations that reach the output."""
        live = self.live
        live.update(v.index for v in self.flat.outputs)
        for eqn in reversed(self.flat.eqns):
            if any(out.index in live for out in eqn.outputs):
                for value in eqn.inputs:
                    if value.depends:
                        live.add(value.index)
                        self.consumers.setdefault(value.index, []).append(eqn)

    def rule(self, eqn: Eqn) -> Any:
        """The rule's verdict on an equation (None: no verdict), computed once, after a check of its parameters."""
        if id(eqn) not in self.rules:
            rule = rules.RULES.get(eqn.primitive)
            known = rule is not None or eqn.primitive in rules.ELEMENTWISE
            why = not_understood(eqn.primitive, eqn.params) if known else None
            if why is not None:
                self.misread.add(id(eqn))
                self.rules[id(eqn)] = Refused(*why)
            else:
                with at_once():  # rules know shapes and constants, no tracer
                    self.rules[id(eqn)] = rule(eqn) if rule is not None else None
        return self.rules[id(eqn)]

    def resolve(self, value: Value) -> Value:
        """Follow casts and other identities back to their operand."""
        while value.producer is not None:
            target = self._identity(value)
            if target is None:
                return value
            value = target
        return value

    def _identity(self, value: Value) -> Value | None:
        if value.index in self.aliases:
            return self.aliases[value.index]
        eqn = value.producer
        assert eqn is not None
        if eqn.primitive not in _IDENTITIES:
            return None
        result = self.rule(eqn)
        if isinstance(result, (list, tuple)):
            result = result[eqn.outputs.index(value)]
        if not isinstance(result, Alias):
            return None
        target = eqn.inputs[result.operand]
        if target.shape != value.shape:
            return None
        self.aliases[value.index] = target
        return target

    def expandable(self, value: Value) -> bool:
        """Whether it is computed elementwise from operands of its own shape."""
        eqn = value.producer
        if eqn is None or eqn.primitive not in rules.ELEMENTWISE or len(eqn.outputs) != 1:
            return False
        self.rule(eqn)
        if id(eqn) in self.misread:
            return False
        if not jnp.issubdtype(value.dtype, jnp.floating):
            if value.bounds is None and (value.dtype != np.bool_ or eqn.primitive == "convert_element_type"):
                return False
        return all(v.shape == value.shape for v in eqn.inputs if v.depends)

    def is_linear(self, value: Value) -> bool:
        """Whether a linear step can compute it (or it is x itself)."""
        eqn = value.producer
        if eqn is None:
            return True
        if self.rule(eqn) is not None or _is_pair(eqn):
            return True
        return eqn.primitive not in rules.RULES and eqn.primitive not in rules.ELEMENTWISE

    def dominators(self, value: Value, nested: bool = False) -> Iterator[tuple[Value, list[Value], bool]]:
        """(base, the values between, whether something nonlinear lies between this base and the nearer one).

        A base is x or what a linear step computes; with `nested` also what another nonlinearity does.
        """
        frontier = {value.index: value}
        region: list[Value] = []
        nonlinear = False
        while len(region) < _MOST_EXPANDED:
            last = frontier.pop(max(frontier))
            if not self.expandable(last):
                return
            region.append(last)
            nonlinear |= not self.is_linear(last)
            eqn = last.producer
            assert eqn is not None
            for operand in eqn.inputs:
                if operand.depends:
                    operand = self.resolve(operand)
                    frontier[operand.index] = operand
            if len(frontier) == 1:
                (base,) = frontier.values()
                floating = jnp.issubdtype(base.dtype, jnp.floating)
                if floating and (nested or self.is_linear(base)) and base.shape == value.shape:
                    yield base, list(region), nonlinear
                    nonlinear = False

    def expression(self, value: Value, base: Value, region: list[Value]) -> tuple[Expr, list[Value]]:
        """`value` as a function of `base`."""
        nodes: list[Node] = [Node("x")]
        consts: list[Value] = []
        places: dict[int, int] = {base.index: 0}
        known: dict[tuple[str, Any], int] = {}

        def constant(operand: Value) -> int:
            key = constant_key(operand)
            if key not in known:
                known[key] = len(nodes)
                nodes.append(Node("const", (), (len(consts),)))
                consts.append(operand)
            return known[key]

        for inner in sorted(region, key=lambda v: v.index):
            eqn = inner.producer
            assert eqn is not None
            args = tuple(places[self.resolve(v).index] if v.depends else constant(v) for v in eqn.inputs)
            name = eqn.primitive
            params: tuple[Any, ...] = ()
            if name == "convert_element_type":
                name = "to_float"
            elif name == "add_any":
                name = "add"
            elif name == "integer_pow":
                params = (int(eqn.params["y"]),)
            elif name == "round":
                params = (int(eqn.params["rounding_method"]),)
            elif name == "interp":
                params = tuple(eqn.params[key] for key in ("xp", "fp", "extrapolate"))
            elif not activations.knows(name):
                bind, keywords = eqn.bind, dict(eqn.params)
                assert bind is not None
                params = (repr(sorted(keywords.items())),)
                activations.register_primitive(name, lambda p, *a, b=bind, k=keywords: b(*a, **k))
            places[inner.index] = len(nodes)
            nodes.append(Node(name, args, params))
        return Expr(tuple(nodes)), consts

    # -- deciding ---------------------------------------------------------------------------------------------------

    def refuse(self, eqn: Eqn, why: Refused, needed: set[int], base: Value | None = None) -> None:
        """Record a refusal and continue with its inputs (with `base`, if it is a function of that)."""
        needed.update(
            self.resolve(v).index for v in ([base] if base is not None else eqn.inputs) if v.depends
        )
        shape = eqn.outputs[0].shape
        key = (eqn.primitive, eqn.path, shape, why.reason)
        self.refused[key] = Unsupported(eqn.primitive, eqn.path, shape, why.reason, why.remedy)
        self.blamed[key] = eqn

    def sums_nonlinearities(self, eqn: Eqn) -> bool:
        """Whether a sum is one tap, as in relu(x) + tanh(x): one is tighter than two.

        x + relu(x) is left to the linear part, which gives the same bound.
        """
        if eqn.primitive not in ("add", "sub", "add_any") or not all(v.depends for v in eqn.inputs):
            return False
        return all(self.ends_nonlinear(self.resolve(v)) for v in eqn.inputs)

    def ends_nonlinear(self, value: Value) -> bool:
        while self.expandable(value) and self.is_linear(value):
            assert value.producer is not None
            operands = [v for v in value.producer.inputs if v.depends]
            if len(operands) != 1:
                return False
            value = self.resolve(operands[0])
        return self.expandable(value) and not self.is_linear(value)

    def elementwise(self, value: Value, eqn: Eqn, closed_only: bool = False) -> Elementwise | Refused:
        """The tap that computes `value`, or the reason why there is none."""
        found = list(self.dominators(value))
        candidates = [(b, r) for i, (b, r, nonlinear) in enumerate(found) if nonlinear or i == 0]
        if not candidates:
            return _no_dominator(eqn)
        closed: list[tuple[Value, list[Value]]] = []
        open_: list[tuple[Value, list[Value]]] = []
        for base, region in candidates:
            inside = {id(v.producer) for v in region}
            between = [v for v in region if v is not value and not self.is_linear(v)]
            shared = any(id(c) not in inside for v in between for c in self.consumers.get(v.index, ()))
            (open_ if shared else closed).append((base, region))
        failure: SlopeError | None = None
        remedies = set()
        for base, region in [*reversed(closed), *([] if closed_only else open_)]:
            expr, consts = self.expression(value, base, region)
            try:
                return self.prove(base, expr, consts)
            except SlopeError as error:
                nearest = (base, region) == candidates[0]
                failure = error if failure is None or nearest else failure
                remedies.add(error.remedy)
        if failure is None:
            return rules.UNKNOWN
        if DECLARE in remedies:  # of the whole, where not of its last part
            return Refused(failure.reason, DECLARE)
        return Refused(failure.reason, failure.remedy or rules.REWRITE)

    def composed(self, value: Value) -> Elementwise | None:
        """The tap on the output of another tap that computes `value`, where only each of the two has slopes."""
        last, links = value.index, []
        while value.index not in self.nested:
            self.nested[value.index] = None
            link = self.on_a_tap(value)
            if link is None:
                break
            links.append((value.index, link))
            value, eqn = link.base, link.base.producer
            assert eqn is not None
            if isinstance(self.declared(eqn) or self.elementwise(value, eqn), Elementwise):
                self.nested.update(links)
                break
        else:
            if self.nested[value.index] is not None:
                self.nested.update(links)
        return self.nested[last]

    def on_a_tap(self, value: Value) -> Elementwise | None:
        """`value` as a function, with slopes, of the nearest nonlinearity where it has them."""
        for base, region, _ in self.dominators(value, nested=True):
            if base.producer is None or self.is_linear(base):
                continue
            try:
                return self.prove(base, *self.expression(value, base, region))
            except SlopeError:
                continue
        return None

    def declared(self, eqn: Eqn) -> Elementwise | None:
        """The tap of a declared activation that ends with this equation; of several that on the farthest tensor.

        Its first and its last operations may be linear, which the search for other taps leaves to the linear part.
        """
        found = None
        ends = eqn.primitive in activations.declared_ends()
        for base, region, _ in self.dominators(eqn.outputs[0], nested=True) if ends else ():
            if all(map(self.is_linear, region)):
                continue
            expr, consts = self.expression(eqn.outputs[0], base, region)
            random = any(v.randomness == 2 for v in consts)
            slopes = None if random else activations.registered(expr, [v.const for v in consts])
            found = found if slopes is None else Elementwise(base, expr, consts, slopes, True)
        return found

    def prove(self, base: Value, expr: Expr, consts: list[Value]) -> Elementwise:
        values = [v.const for v in consts]
        if any(v.randomness == 2 for v in consts):
            raise SlopeError(rules.RANDOM_MASK.reason, rules.RANDOM_MASK.remedy)
        if all(map(is_concrete, values)):
            slopes: tuple[Any, Any] = activations.slope_range(expr, [np.asarray(v) for v in values])
        else:
            slopes = activations.piecewise_linear_slopes(expr, values)
        return Elementwise(base, expr, consts, slopes, assumed=False)

    def decide(self, eqn: Eqn, needed: set[int]) -> None:
        """Settle one needed equation and mark what it needs."""
        for value in eqn.outputs:
            if not jnp.issubdtype(value.dtype, jnp.floating) and eqn.primitive not in rules.ELEMENTWISE:
                result = self.rule(eqn) or rules.UNKNOWN
                self.refuse(eqn, result if isinstance(result, Refused) else rules.NOT_FLOAT, needed)
                return
        result = self.rule(eqn)
        found = self.declared(eqn)
        if found is None and self.sums_nonlinearities(eqn):
            whole = self.elementwise(eqn.outputs[0], eqn, closed_only=True)
            found = whole if isinstance(whole, Elementwise) else None
        if found is not None:
            self.taps[eqn.outputs[0].index] = found
            needed.add(found.base.index)
            return
        if isinstance(result, Refused):
            self.refuse(eqn, result, needed)
        elif isinstance(result, Group):
            self.taps[eqn.outputs[0].index] = result
            needed.add(self.resolve(eqn.inputs[0]).index)
        elif result is not None:
            parts = result if isinstance(result, (list, tuple)) else [result]
            for i, part in enumerate(parts):
                if isinstance(part, Alias):
                    self.aliases[eqn.outputs[i].index] = eqn.inputs[part.operand]
                    operands: Sequence[int] = (part.operand,)
                else:
                    self.linear[eqn.outputs[part.output].index] = part
                    operands = part.operands
                for j in operands:
                    if eqn.inputs[j].depends:
                        needed.add(self.resolve(eqn.inputs[j]).index)
        elif eqn.primitive in rules.ELEMENTWISE:
            self.decide_elementwise(eqn, needed)
        else:
            self.refuse(eqn, rules.UNKNOWN, needed)

    def decide_elementwise(self, eqn: Eqn, needed: set[int]) -> None:
        value = eqn.outputs[0]
        if not jnp.issubdtype(value.dtype, jnp.floating):
            self.refuse(eqn, rules.JUMP, needed)
            return
        found = self.elementwise(value, eqn)
        if isinstance(found, Elementwise):
            self.taps[value.index] = found
            needed.add(found.base.index)
        elif _is_pair(eqn):
            self.taps[value.index] = Group(eqn.primitive, pairs(*(v.shape for v in eqn.inputs)))
            needed.update(self.resolve(v).index for v in eqn.inputs)
        elif self.unguard(eqn, needed):
            return
        elif (nested := self.composed(value)) is not None:
            self.taps[value.index] = nested
            needed.add(nested.base.index)
        else:
            nearest = next(self.dominators(value), None)
            self.refuse(eqn, found, needed, nearest[0] if nearest else None)

    def rounded(self) -> Iterator[tuple[Eqn, str, bool]]:
        """(equation, format, whether it is as wide as half precision) where x is narrower than float32."""
        for eqn in self.flat.eqns:
            if not any(v.index in self.live for v in eqn.outputs):
                continue
            dtype = eqn.outputs[0].dtype
            if eqn.primitive == "reduce_precision":
                bits = int(eqn.params["exponent_bits"]), int(eqn.params["mantissa_bits"])
                if bits[0] < 8 or bits[1] < 23:
                    yield eqn, "reduce_precision({}, {})".format(*bits), keeps_half(*bits)
            if jnp.issubdtype(dtype, jnp.floating) and below_single(dtype):
                yield eqn, jnp.dtype(dtype).name, half_or_wider(dtype)

    def refuse_narrow(self) -> None:
        reason, remedy = TOO_NARROW
        for eqn, name, kept in self.rounded():
            if not kept:
                self.refuse(eqn, Refused(reason.format(name=name), remedy), set())

    def half_formats(self) -> tuple[str, ...]:
        names = {name for _, name, _ in self.rounded()}
        if below_single(self.flat.input.dtype):
            names.add(jnp.dtype(self.flat.input.dtype).name)
        return tuple(sorted(names))

    def unguard(self, eqn: Eqn, needed: set[int]) -> bool:
        """Take the branch that a guard against NaN or inf selects in real arithmetic; False for another selection.

        The guarded tensor is marked as needed, so it must have a Lipschitz constant and is finite everywhere.
        """
        if eqn.primitive != "select_n" or len(eqn.inputs) != 3:
            return False
        guarded: list[Value] = []
        flag = self.settled(eqn.inputs[0], guarded)
        if flag is None or not eqn.inputs[1 + flag].depends:
            return False
        self.aliases[eqn.outputs[0].index] = eqn.inputs[1 + flag]
        needed.update(self.resolve(v).index for v in (*guarded, eqn.inputs[1 + flag]))
        return True

    def settled(self, value: Value, guarded: list[Value]) -> bool | None:
        """The constant value of a predicate about NaN and inf, or None; its operands are added to `guarded`."""
        eqn = value.producer
        if eqn is None or not value.depends:
            return None
        name, inputs = eqn.primitive, eqn.inputs
        if name in ("reduce_or", "reduce_and"):
            if set(eqn.params) - {"axes", "out_sharding"}:
                return None
        elif not_understood(name, eqn.params) is not None:
            return None
        if name in ("ne", "eq", "is_finite"):
            if len({self.resolve(v).index if v.depends else -1 - v.index for v in inputs}) != 1:
                return None
            if not jnp.issubdtype(inputs[0].dtype, jnp.floating):
                return None
            guarded.append(inputs[0])
            return name != "ne"
        if value.dtype != np.bool_ or inputs[0].dtype != np.bool_ or 0 in inputs[0].shape:
            return None
        if name == "not":
            inner = self.settled(inputs[0], guarded)
            return None if inner is None else not inner
        if name in ("and", "or"):
            both = [self.settled(v, guarded) for v in inputs]
            if None in both:
                return None
            return all(both) if name == "and" else any(both)
        if name in _KEEPS_FLAGS and len(inputs) == 1:
            return self.settled(inputs[0], guarded)
        return None

    def run(self) -> tuple[Program, tuple[Any, ...], tuple[Any, ...], dict[int, int]]:
        (output,) = self.flat.outputs
        needed = {self.resolve(output).index} if output.depends else set()
        for item in self.flat.refused:
            self.refused[(item.primitive, item.path, item.shape, item.reason)] = item
        for eqn in reversed(self.flat.eqns):
            if any(v.index in needed for v in eqn.outputs):
                self.decide(eqn, needed)
        self.refuse_narrow()
        if self.refused:
            found = [(item, self.blamed.get(key)) for key, item in reversed(self.refused.items())]
            raise UnsupportedError(fold(found))
        return Emitter(self, needed).run(output)


_IDENTITIES = frozenset(
    """convert_element_type copy stop_gradient optimization_barrier reduce_precision name sharding_constraint reshard
    device_put integer_pow""".split()
)


_KEEPS_FLAGS = frozenset(
    "reduce_or reduce_and reshape squeeze expand_dims broadcast_in_dim transpose copy convert_element_type".split()
)


def _is_pair(eqn: Eqn) -> bool:
    """Maximum or minimum of two tensors that depend on x."""
    return eqn.primitive in ("max", "min") and all(v.depends for v in eqn.inputs)


def _no_dominator(eqn: Eqn) -> Refused:
    """Why a nonlinear elementwise equation is not a function of one tensor."""
    both = sum(v.depends for v in eqn.inputs) > 1
    if eqn.primitive == "div":
        return rules.DIVISION
    if eqn.primitive == "mul":
        return rules.PRODUCT
    if both and eqn.primitive == "select_n":
        return Refused(
            "which branch is taken depends on x, and the branches are different tensors: it can jump",
            "use jnp.maximum, jnp.minimum or an activation of one tensor",
        )
    return Refused("it is not a function of one tensor that depends on x", rules.REWRITE)
