"""From a JAX function to a flat list of equations: the only file that knows jax internals.

Facts this file relies on, measured on jax 0.10.2 and 0.12.0.1 (tests/test_jaxpr_contract.py fails first when one of
them changes):

* from 0.11 `Jaxpr is ClosedJaxpr`, and `j.jaxpr is j`: unwrapping "while it has .jaxpr" never ends;
* two calls of one jitted function at one shape share the same sub-jaxpr and the same Var objects, so the environment
  is kept per call and a tensor is identified by its position in the flat list, never by its Var;
* `scan` carries `num_consts`, `num_carry` up to 0.11 and a tree `ft_in` from 0.12;
* binary primitives broadcast dimensions of size one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.core import eval_jaxpr
from jax.extend.core import Literal

from lipbounds._activations import piecewise
from lipbounds._form.concrete import at_once, is_concrete
from lipbounds._text.tables import printable
from lipbounds._tracing.flat import Eqn, Flat, Path, Value, opened, place_of, stack_of
from lipbounds._tracing.indices import UNSORTED, landings, outside, unsorted
from lipbounds._tracing.parameters import not_understood
from lipbounds._tracing.rewrites import rewrite
from lipbounds.errors import Unsupported

_CALLS = {
    "jit": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat2": "jaxpr",
}
_RANDOM = ("random_", "threefry", "rng_")
_COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")


def flatten(fn: Callable[..., Any], params: Any, x: jax.ShapeDtypeStruct) -> Flat:
    """Trace `fn(params, x)` and inline every call.

    Everything that does not depend on x is evaluated on the way, equation by equation, in the program's own dtypes.

    Args:
        fn: a function of two arguments.
        params: any pytree of arrays; may hold tracers, so that a bound can be differentiated.
        x: shape and dtype of one input.
    """
    leaves, tree = jax.tree.flatten(params)

    def flat_fn(*args: Any) -> Any:
        return jax.tree.leaves(fn(jax.tree.unflatten(tree, args[:-1]), args[-1]))

    closed = jax.make_jaxpr(flat_fn)(*leaves, x)
    return _Inliner().run(closed, leaves, x)


class _Inliner:
    """Walks a jaxpr with one environment per call."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.eqns: list[Eqn] = []
        self.refused: list[Unsupported] = []

    def run(self, closed: Any, leaves: Sequence[Any], x: jax.ShapeDtypeStruct) -> Flat:
        source = self.value(tuple(x.shape), np.dtype(x.dtype), depends=True)
        outputs = self.call(closed, [*map(self.const, leaves), source], ())
        return Flat(source, tuple(outputs), self.eqns, self.refused, self.values)

    def value(self, shape: tuple[int, ...], dtype: Any, **kwargs: Any) -> Value:
        value = Value(len(self.values), shape, dtype, **kwargs)
        self.values.append(value)
        return value

    def const(self, const: Any, randomness: int = 0) -> Value:
        dtype = getattr(const, "dtype", None)
        if dtype is None:
            const = np.asarray(const)
            dtype = const.dtype
        return self.value(tuple(np.shape(const)), dtype, const=const, randomness=randomness)

    def emit(
        self,
        primitive: str,
        params: dict[str, Any],
        inputs: Sequence[Value],
        shape: tuple[int, ...],
        path: Path,
    ) -> Value:
        """An equation of our own (slices and stacks of an unrolled scan)."""
        out = self.value(shape, inputs[0].dtype, depends=True)
        self.eqns.append(Eqn(primitive, params, tuple(inputs), (out,), printable("/".join(path))))
        out.producer = self.eqns[-1]
        return out

    def refuse(self, eqn: Any, path: Path, reason: str, remedy: str) -> list[Value]:
        """Note the refusal of an equation, and return its unknown outputs."""
        item = Unsupported(eqn.primitive.name, place_of(eqn, path), _shape(eqn), reason, remedy)
        self.refused.append(item)
        return [self.unknown(var) for var in eqn.outvars]

    def empty(self, variables: Sequence[Any]) -> list[Value]:
        """Constants in place of tensors without entries, or of an empty scan's outputs: nothing of x passes them."""
        return [self.const(np.zeros(v.aval.shape, v.aval.dtype)) for v in variables]

    def call(self, jaxpr: Any, args: Sequence[Value], path: Path) -> list[Value]:
        inner, consts = opened(jaxpr)
        env: dict[Any, Value] = {}
        env.update(zip(inner.constvars, map(self.const, consts), strict=False))
        env.update(zip(inner.invars, args, strict=True))

        def read(atom: Any) -> Value:
            if isinstance(atom, Literal):
                return self.const(_literal(atom))
            return env[atom]

        for eqn in inner.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            outputs = self.equation(eqn, inputs, path)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in inner.outvars]

    def equation(self, eqn: Any, inputs: list[Value], path: Path) -> list[Value]:
        name = eqn.primitive.name
        params = eqn.params
        dependent = any(value.depends for value in inputs)
        if name in _CALLS or name in ("scan", "cond"):
            why = not_understood(name, params)
            if why is not None:
                if not dependent and not _mutates(eqn):
                    return self.evaluate(eqn, inputs)
                return self.refuse(eqn, path, *why)
        if name == "jit" and params["name"] == "_interp" and dependent:
            found = self.interpolation(eqn, inputs, path)
            if found is not None:
                return found
        if dependent:
            simpler = rewrite(self, eqn, inputs, path)
            if simpler is not None:
                return simpler
        custom = name in ("custom_jvp_call", "custom_vjp_call")
        if custom and not dependent and not all(is_concrete(v.const) for v in inputs):
            # of weights that are trained: inlined, it would lose its derivative
            return self.evaluate(eqn, inputs)
        if name in _CALLS:
            return self.call(
                params[_CALLS[name]], inputs, (*path, *stack_of(eqn), str(params.get("name", name)))
            )
        if _mutates(eqn):
            reason = "it reads or writes mutable state, so what it returns is not a function of its operands"
            return self.refuse(eqn, path, reason, "pass the state in and out as values")
        if name == "cond" and not inputs[0].depends and is_concrete(inputs[0].const):
            branches = params["branches"]
            index = int(np.clip(int(inputs[0].const), 0, len(branches) - 1))
            return self.call(branches[index], inputs[1:], (*path, *stack_of(eqn), f"cond[{index}]"))
        if not dependent:
            return self.evaluate(eqn, inputs)
        if name == "scan":
            return self.scan(eqn, inputs, path)
        if name == "scatter" and params["update_jaxpr"] is not None:
            return self.apply_at(eqn, inputs, path)
        if name == "argmax" and tuple(params["axes"]) == (0,):
            rows = self.rows(inputs[0], path)
            if rows is not None:
                largest = partial(piecewise.first_largest, dtype=params["index_dtype"])
                return self.rewritten(largest, rows, eqn, path)
        if name == "select_n" and (span := inputs[0].bounds) is not None:
            if 0 <= span[0] and span[1] < len(inputs) - 1:
                return self.rewritten(piecewise.by_comparison, inputs, eqn, path)
        if name in ("while", "cond"):
            if name == "cond":
                traced = not inputs[0].depends
                reason = "the branch taken " + (
                    "is being traced" if traced else "depends on x, so the answer can jump"
                )
                remedy = "use a constant predicate, or jnp.where with branches that agree where it switches"
            else:
                reason = "a while loop has no static length"
                remedy = "use lax.scan or a fori_loop with constant bounds"
            return self.refuse(eqn, path, reason, remedy)
        if eqn.outvars and all(0 in v.aval.shape for v in eqn.outvars):
            return self.empty(eqn.outvars)
        return self.record(eqn, inputs, path)

    def record(self, eqn: Any, inputs: Sequence[Value], path: Path) -> list[Value]:
        """An equation of the program as it is."""
        name, params = eqn.primitive.name, eqn.params
        outputs = [self.value(tuple(v.aval.shape), v.aval.dtype, depends=True) for v in eqn.outvars]
        record = Eqn(name, params, tuple(inputs), tuple(outputs), place_of(eqn, path), eqn.primitive.bind)
        record.many = eqn.primitive.multiple_results
        for output in outputs:
            output.producer = record
            if jnp.issubdtype(output.dtype, jnp.integer):
                output.bounds = piecewise.integer_bounds(name, output.dtype, [_range(v) for v in inputs])
        if outputs:
            self.eqns.append(record)
        return outputs

    def rewritten(self, fn: Callable[..., Any], inputs: Sequence[Value], eqn: Any, path: Path) -> list[Value]:
        """Inline the program of `fn` in place of an equation."""
        specs, start = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in inputs], len(self.eqns)
        outputs = self.call(jax.make_jaxpr(fn)(*specs), inputs, path)
        for record in self.eqns[start:]:
            record.path = place_of(eqn, path)
        return outputs

    def rows(self, value: Value, path: Path) -> list[Value] | None:
        """The rows that were stacked to make a boolean or integer tensor, or None if they are not known."""
        if jnp.issubdtype(value.dtype, jnp.floating):
            return None
        if not value.depends:
            return [self.const(row) for row in np.asarray(value.const)] if is_concrete(value.const) else None
        made = value.producer
        if made is None:
            return None
        first = made.inputs[0]
        if made.primitive == "stack" and made.params["axis"] == 0:
            return list(made.inputs)
        if made.primitive == "concatenate" and made.params["dimension"] == 0:
            parts = [self.rows(part, path) for part in made.inputs]
            return None if None in parts else [row for part in parts for row in part or ()]
        if made.primitive in ("broadcast_in_dim", "reshape") and value.shape == (1, *first.shape):
            dims = made.params.get("broadcast_dimensions")
            return [first] if dims is None or tuple(dims) == tuple(range(1, len(value.shape))) else None
        summed = made.primitive == "cumsum" and made.params["axis"] == 0 and not made.params["reverse"]
        if not (summed or made.primitive == "convert_element_type"):
            return None
        rows = self.rows(first, path)
        if rows is None or not jnp.issubdtype(value.dtype, jnp.integer):
            return None
        out: list[Value] = []
        for row in rows:
            args = [out[-1], row] if summed and out else [row]
            cast = partial(lax.convert_element_type, new_dtype=value.dtype)
            specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in args]
            out += self.call(jax.make_jaxpr(lax.add if len(args) == 2 else cast)(*specs), args, path)
        return out

    def interpolation(self, eqn: Any, inputs: list[Value], path: Path) -> list[Value] | None:
        """`jnp.interp` of x with constant knots, as one equation `interp`; None for another function of that name."""
        (out,) = eqn.outvars
        form = piecewise.template(eqn.params["jaxpr"], [var.aval for var in eqn.invars])
        if form is None:
            return None
        x, *rest = inputs
        if any(v.depends or not is_concrete(v.const) for v in rest):
            why: Any = ("the knots of jnp.interp depend on x or are being traced", "make the knots constant")
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            return None
        else:
            xp, fp, *ends = (np.asarray(v.const) for v in rest)
            why = piecewise.knots(form, x.dtype, xp, fp, ends)
        if isinstance(why, tuple):
            self.refused.append(Unsupported("interp", place_of(eqn, path), _shape(eqn), *why))
            return [self.unknown(out)]
        result = self.value(tuple(out.aval.shape), out.aval.dtype, depends=True)
        bind = partial(piecewise.interp, dtype=out.aval.dtype)
        self.eqns.append(Eqn("interp", why, (x,), (result,), place_of(eqn, path), bind))
        result.producer = self.eqns[-1]
        return [result]

    def unknown(self, var: Any) -> Value:
        """The output of a refused equation: it depends on x, and is not refused again."""
        shape = tuple(getattr(var.aval, "shape", ()))
        value = self.value(shape, getattr(var.aval, "dtype", np.dtype(np.float32)), depends=True)
        value.producer = Eqn("refused", {}, (), (value,), "")
        return value

    def evaluate(self, eqn: Any, inputs: list[Value]) -> list[Value]:
        """Evaluate a constant equation once, as the program does."""
        name = eqn.primitive.name
        randomness = max((value.randomness for value in inputs), default=0)
        if name.startswith(_RANDOM):
            randomness = max(randomness, 1)
        if name in _COMPARE and randomness:
            randomness = 2
        constants = [value.const for value in inputs]
        with at_once(*constants):
            out = eqn.primitive.bind(*constants, **eqn.primitive.get_bind_params(eqn.params))
        outs = out if eqn.primitive.multiple_results else [out]
        return [self.const(value, randomness) for value in outs]

    def scan(self, eqn: Any, inputs: list[Value], path: Path) -> list[Value]:
        """Unroll a scan over values that depend on x: its length is static."""
        params = eqn.params
        if "ft_in" in params:
            num_consts, num_carry, _ = (len(part) for part in params["ft_in"].unpack())
        else:
            num_consts, num_carry = params["num_consts"], params["num_carry"]
        consts, carry = inputs[:num_consts], inputs[num_consts : num_consts + num_carry]
        xs = inputs[num_consts + num_carry :]
        length = int(params["length"])
        order = range(length - 1, -1, -1) if params["reverse"] else range(length)
        base = (*path, *stack_of(eqn))
        rows: list[list[Value]] = [[] for _ in range(length)]
        for step in order:
            where = (*base, f"scan[{step}]")
            slices = [self.row(value, step, where) for value in xs]
            outs = self.call(params["jaxpr"], [*consts, *carry, *slices], where)
            carry, rows[step] = outs[:num_carry], outs[num_carry:]
        count = len(eqn.outvars) - num_carry
        if not length:
            return [*carry, *self.empty(eqn.outvars[num_carry:])]
        return [*carry, *(self.stack([row[i] for row in rows], (*base, "scan")) for i in range(count))]

    def apply_at(self, eqn: Any, inputs: list[Value], path: Path) -> list[Value]:
        """`x.at[i].apply(f)`: read the entries, apply f, write them back; refused where it computes something else."""
        operand, indices, updates = inputs
        params = eqn.params
        function, consts = opened(params["update_jaxpr"])
        reason = remedy = ""
        target = np.zeros(0, np.int32)
        if indices.depends or not is_concrete(indices.const):
            reason = "it applies a function at indices that " + (
                "depend on x, so the output jumps" if indices.depends else "are being traced"
            )
            remedy = "make the indices constant"
        elif any(_uses(function, var) for var in function.invars[1:]) or not all(
            map(is_concrete, (*consts, *params["update_consts"]))
        ):
            reason = "the function it applies at the indices depends on more than the entry itself"
            remedy = "read the entries with x[i], compute, and write them back with x.at[i].set(...)"
        else:
            hits = landings(operand.shape, jnp.asarray(indices.const), updates.shape, params)
            if (hits > 1).any():
                reason = "an index occurs twice, so the function would be applied twice to one entry"
                remedy = "use each index once"
            elif outside(hits, updates.shape, params):
                reason, remedy = "an index is out of range", "use indices within the tensor"
            elif unsorted(indices.const, params):
                reason, remedy = UNSORTED
            target = np.flatnonzero(hits).astype(np.int32)
        why = not_understood("scatter", {**params, "update_jaxpr": None, "update_consts": ()})
        if why is not None:
            reason, remedy = why
        if reason:
            return self.refuse(eqn, path, reason, remedy)

        def entry(value: Any) -> Any:
            zero = jnp.zeros((), updates.dtype)
            (out,) = eval_jaxpr(function, (*consts, *params["update_consts"]), value, zero)
            return out

        def written(tensor: Any) -> Any:
            flat = jnp.ravel(tensor)
            return flat.at[target].set(jax.vmap(entry)(flat[target])).reshape(tensor.shape)

        spec = jax.ShapeDtypeStruct(operand.shape, operand.dtype)
        return self.call(jax.make_jaxpr(written)(spec), [operand], (*path, *stack_of(eqn), "apply"))

    def row(self, value: Value, step: int, path: Path) -> Value:
        if not value.depends:
            with at_once(value.const):
                return self.const(value.const[step], value.randomness)
        rest = value.shape[1:]
        start, limit = (step, *(0 for _ in rest)), (step + 1, *rest)
        window = {"start_indices": start, "limit_indices": limit, "strides": None}
        sliced = self.emit("slice", window, [value], (1, *rest), path)
        return self.emit("reshape", {"new_sizes": rest, "dimensions": None}, [sliced], rest, path)

    def stack(self, rows: list[Value], path: Path) -> Value:
        if not any(row.depends for row in rows):
            with at_once(*(row.const for row in rows)):
                stacked = jnp.stack([jnp.asarray(row.const) for row in rows])
            return self.const(stacked, max(row.randomness for row in rows))
        shape = (1, *rows[0].shape)
        lifted = [
            self.emit("reshape", {"new_sizes": shape, "dimensions": None}, [row], shape, path)
            if row.depends
            else self.const(lax.reshape(jnp.asarray(row.const), shape))
            for row in rows
        ]
        return self.emit("concatenate", {"dimension": 0}, lifted, (len(rows), *rows[0].shape), path)


def _range(value: Value) -> tuple[int, int] | None:
    """The range of a boolean or integer tensor."""
    if value.dtype == np.bool_:
        return 0, 1
    if value.depends or not is_concrete(value.const) or not jnp.issubdtype(value.dtype, jnp.integer):
        return value.bounds
    array = np.asarray(value.const)
    return (int(array.min()), int(array.max())) if array.size else None


def _uses(jaxpr: Any, var: Any) -> bool:
    read = itertools.chain(jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
    return any(var is atom for atom in read)


_HARMLESS = (*_CALLS, "debug_callback", "debug_print", "scan", "while", "cond")


def _mutates(eqn: Any) -> bool:
    """Whether it touches a mutable reference, or has another effect than printing."""
    if any("Ref" in type(v.aval).__name__ for v in (*eqn.invars, *eqn.outvars)):
        return True
    return bool(getattr(eqn, "effects", ())) and eqn.primitive.name not in _HARMLESS


def _shape(eqn: Any) -> tuple[int, ...]:
    return tuple(getattr(eqn.outvars[0].aval, "shape", ())) if eqn.outvars else ()


def _literal(atom: Any) -> Any:
    plain = is_concrete(atom.val) and not hasattr(atom.val, "dtype")
    return np.asarray(atom.val, atom.aval.dtype) if plain else atom.val
