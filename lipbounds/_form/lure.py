"""The Lur'e form of a network: a linear map in feedback with its activation layers, called taps.

    y = C x + D v,   z = E x + F v,   v = phi(y)          (D strictly block lower triangular)

with input x, pre-activations y, tap outputs v and network output z; biases cancel in differences. `trace` derives the
form from the jaxpr of a JAX function, so no method depends on types of layers. Elementwise taps are slope-restricted,
with a proved interval [a, b] per entry; group taps (max, min, sort, logsumexp) are 1-Lipschitz per group.

**What is certified** is the program in the user's own dtype: everything that does not depend on x is evaluated once, as
the program evaluates it, and taken as exact; every operation on x is exact real arithmetic (float casts of x are the
identity). The interpreter below evaluates it in any dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipbounds._activations import activations
from lipbounds._form.concrete import is_concrete
from lipbounds._form.precision import half_note
from lipbounds._form.program import Op, Program, Tap, described
from lipbounds._form.steps import KINDS
from lipbounds._form.walk import Algebra, walk
from lipbounds._text.html import Html, element, together
from lipbounds._text.tables import counted, html_table, printable

Slopes = tuple[Any, Any] | tuple[()]


def _fixed(leaf: Any) -> Any:
    """An array that nobody else can write to, in place of one of NumPy; anything else as it is."""
    if not isinstance(leaf, np.ndarray) or (leaf.base is None and not leaf.flags.writeable):
        return leaf
    leaf = leaf.copy()
    leaf.setflags(write=False)
    return leaf


def _unpickled(program: Program, arrays: list[tuple[np.ndarray, bool]], places: Any) -> LureForm:
    """The form of these arrays and whether each was one of JAX, in which float64 is kept whatever the settings."""
    with jax.enable_x64(True):
        leaves = [jnp.asarray(array) if on_device else array for array, on_device in arrays]
    return LureForm(program, *jax.tree.map(leaves.__getitem__, places))


@partial(jax.tree_util.register_dataclass, data_fields=["consts", "slopes"], meta_fields=["program"])
@dataclass(frozen=True, eq=False)
class LureForm:
    """A network as linear steps and taps. A pytree: the constants and slopes are leaves, the program is static.

    Args:
        program: the canonical list of steps, hashable by value: a new trace of the same architecture is equal.
        consts: coefficients and offsets, as the program computed them.
        slopes: per tap (lower, upper), arrays that broadcast to the tap's shape; () for groups.

    Example:
        >>> import lipbounds as lb
        >>> form = lb.from_weights([[[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.0]]])
        >>> form.in_shape, form.num_outputs, form.num_neurons
        ((2,), 2, 2)
        >>> form([1.0, 3.0]).tolist()
        [2.0, 6.0]
    """

    program: Program
    consts: tuple[Any, ...]
    slopes: tuple[Slopes, ...]

    def __post_init__(self) -> None:
        # Blocks and norms are kept with the form, so that its arrays must not change.
        for name in ("consts", "slopes"):
            object.__setattr__(self, name, jax.tree.map(_fixed, getattr(self, name)))

    def __reduce__(self) -> tuple[Any, ...]:
        leaves, tree = jax.tree.flatten((self.consts, self.slopes))
        arrays = [(np.asarray(leaf), isinstance(leaf, jax.Array)) for leaf in leaves]
        return _unpickled, (self.program, arrays, jax.tree.unflatten(tree, range(len(leaves))))

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.program.shapes[0]

    @property
    def in_size(self) -> int:
        """Number of entries of one input."""
        return int(np.prod(self.in_shape))

    @property
    def num_outputs(self) -> int:
        """K, the number of outputs (classes)."""
        return int(np.prod(self.program.shapes[self.program.output]))

    @property
    def taps(self) -> tuple[Tap, ...]:
        return self.program.taps

    @property
    def num_neurons(self) -> int:
        """Number of entries of all tap outputs."""
        return sum(tap.size_out for tap in self.taps)

    @property
    def assumed(self) -> bool:
        """Whether slopes were declared by the user (`register_activation`) rather than proved."""
        return any(tap.assumed for tap in self.taps)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that every bound and radius of this network carries."""
        return half_note(self.program.half)

    @property
    def is_traced(self) -> bool:
        """Whether constants are tracers (inside jit, grad or vmap)."""
        return not all(is_concrete(leaf) for leaf in jax.tree.leaves((self.consts, self.slopes)))

    def __call__(self, x: Any) -> jax.Array:
        """The network at one example, in the example's dtype."""
        x = jnp.asarray(x)
        return self.evaluate(x, x.dtype)

    def evaluate(self, x: Any, dtype: Any = None) -> jax.Array:
        """The network at one example x (shape `in_shape`), every step in `dtype`; jit, grad and vmap work.

        Its derivative is that of the traced form: custom derivative rules and stop_gradient of the user's function are
        ignored. Returns shape (K,).
        """
        dtype = jnp.result_type(float) if dtype is None else dtype
        x = jnp.asarray(x, dtype)
        if x.shape != self.in_shape:
            raise ValueError(
                f"one example has shape {self.in_shape}, got {x.shape}; use jax.vmap for a batch"
            )
        taps = self.taps
        return propagate(
            self, x.ravel(), lambda k, y: apply_tap(taps[k], self.consts, y), dtype=dtype, affine=True
        )

    def __repr__(self) -> str:
        taps = ", ".join(f"{printable(t.name)}[{t.size_out}]" for t in self.taps) or "none (linear)"
        return (
            f"LureForm({self.in_shape} -> ({self.num_outputs},), {counted(len(self.taps), 'tap')}: {taps}, "
            f"{counted(self.num_neurons, 'neuron')}{', assumed slopes' if self.assumed else ''})"
        )

    def _repr_html_(self) -> Html:
        rows = [[str(k), t.name, str(t.size_in), str(t.size_out), t.path] for k, t in enumerate(self.taps)]
        table = html_table(("tap", "function", "inputs", "outputs", "call path"), rows, right=(0, 2, 3))
        return together(element("b", "LureForm"), f" {self.in_shape} → ({self.num_outputs},)", table)


# --- the interpreter -----------------------------------------------------------------------------------------------


def apply_tap(tap: Tap, consts: Sequence[Any], y: jax.Array) -> jax.Array:
    """Evaluate v = phi(y) for one tap, on flat vectors."""
    if tap.expr is not None:
        shape = tap.shapes[0]
        out = activations.evaluate(tap.expr, tap.constants(consts), y.reshape(shape))
        return jnp.broadcast_to(out, shape).ravel()
    assert tap.groups is not None
    rows = y[tap.groups.array]
    if tap.kind == "sort":
        return jnp.zeros(tap.size_out, y.dtype).at[tap.groups.array].set(jnp.sort(rows, axis=1))
    return _OF_ROWS[tap.kind](rows, axis=1)


_OF_ROWS: dict[str, Callable[..., jax.Array]] = {
    "max": jnp.max,
    "min": jnp.min,
    "logsumexp": jax.nn.logsumexp,
}


def apply_op(op: Op, args: Sequence[Any]) -> Any:
    """Apply one linear step to arrays."""
    return KINDS[op.kind].apply(dict(op.params), *args)


def fixed_operands(consts: Sequence[Any], op: Op, dtype: Any, affine: bool = False) -> list[Any]:
    """The constant operands of a step in their places, None where a register stands; offsets are zero unless affine."""
    offset = KINDS[op.kind].joint and not affine
    args = [None if i >= 0 else jnp.asarray(consts[-1 - i]) for i in op.inputs]
    return [a if a is None else jnp.zeros(a.shape, dtype) if offset else a.astype(dtype) for a in args]


class Arrays(Algebra[Any]):
    """One example as arrays of the registers' shapes; taps are a function on flat vectors.

    Args:
        tap: (k, y or None) -> v or None.
        affine: whether offsets (biases) are kept; otherwise they are zero.
    """

    def __init__(
        self, form: LureForm, tap: Callable[[int, Any], Any], dtype: Any, affine: bool = False
    ) -> None:
        self.consts, self.program = form.consts, form.program
        self.of_tap, self.dtype, self.affine = tap, dtype, affine

    def tap(self, k: int, value: Any) -> Any:
        return self.of_tap(k, value)

    def step(self, place: int, op: Op, held: Mapping[int, Any]) -> Any:
        args = fixed_operands(self.consts, op, self.dtype, self.affine)
        for place, i in enumerate(op.inputs):
            if i >= 0:
                args[place] = held[i] if i in held else jnp.zeros(self.program.shapes[i], self.dtype)
        return apply_op(op, args)

    def join(self, registers: Sequence[int], held: Mapping[int, Any]) -> Any:
        zeros = ((i, self.program.sizes[i]) for i in registers)
        return jnp.concatenate([held[i].ravel() if i in held else jnp.zeros(n, self.dtype) for i, n in zeros])

    def split(self, value: Any, registers: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for i, place in self.program.places_of(registers):
            yield i, value[place].reshape(self.program.shapes[i])


def propagate(
    form: LureForm,
    x: jax.Array | None,
    tap: Callable[[int, Any], Any],
    *,
    dtype: Any,
    affine: bool = False,
    registers: dict[int, Any] | None = None,
) -> Any:
    """Run the program with the callback `tap(k, y) -> v` on flat vectors in place of the taps.

    Unless `affine`, offsets are dropped and None stands for zero, so that only what depends on a nonzero source is
    computed. Returns the flat output, or None; a dict passed as `registers` holds all registers afterwards.
    """
    held = {} if registers is None else registers
    if x is not None:
        held[0] = x.reshape(form.program.shapes[0])
    walk(form.program, Arrays(form, tap, dtype, affine), held, keep=registers is not None)
    out = held.get(form.program.output)
    return None if out is None else out.ravel()


def flat_slopes(form: LureForm, k: int) -> tuple[Any, Any]:
    """(lower, upper) slopes of tap k as vectors of its size (elementwise taps)."""
    lower, upper = form.slopes[k]  # type: ignore[misc]  # () only for groups
    shape = form.taps[k].shapes[0]
    module = np if is_concrete(lower) and is_concrete(upper) else jnp

    def flat(a: Any) -> Any:
        return module.broadcast_to(module.asarray(a), shape).reshape(-1)

    return flat(lower), flat(upper)


def proved_slopes(form: LureForm, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Prove the (lower, upper) slopes of an elementwise tap again from its concrete constants, as flat vectors.

    Public functions use these, since a gradient step or float32 arithmetic under jit may have changed the slopes that
    the form stores. Slopes that the user declared are looked up again.
    """
    tap = form.taps[k]
    assert tap.expr is not None
    values = [np.asarray(c) for c in tap.constants(form.consts)]
    if tap.assumed:
        declared = activations.registered(tap.expr, values)
        if declared is None:
            raise ValueError(
                f"the slopes of {tap.name} at {tap.path} were declared for other constants, or in another process: "
                "declare them here, too (lb.register_activation)"
            )
        lower, upper = (np.asarray(s, np.float64) for s in declared)
    else:
        lower, upper = activations.slope_range(tap.expr, values)
    return tuple(np.broadcast_to(s, tap.shapes[0]).reshape(-1) for s in (lower, upper))  # type: ignore[return-value]


_MASKED = (
    "; if a constant mask writes -inf before a maximum or a logsumexp, select the other entries by index, "
    "x[..., np.flatnonzero(mask)], or mask with a finite number such as -1e9"
)


def check_weights(form: LureForm) -> None:
    """Raises ValueError where a weight or a constant of a linear step is not finite, or a guard is NaN."""
    for place, leaf in enumerate(form.consts):
        if is_concrete(leaf):
            values = np.asarray(leaf, np.float64)
            # An activation may compare with infinity, but never with NaN.
            bad = ~np.isfinite(values) if place in form.program.coefficients else np.isnan(values)
            if bad.any():
                masked = "" if np.isnan(values).any() else _MASKED
                raise ValueError(
                    f"the network has weights or constants that are not finite: {int(bad.sum())} of {bad.size} entries "
                    f"of an array of shape {bad.shape} are NaN or infinite{masked}"
                )


def fingerprint(form: LureForm) -> str:
    """Digest of a concrete form, equal for equal networks in every process; no proof depends on it.

    Declared slopes are a part of it, as a bound rests on them; all others follow from the program.
    """
    digest = hashlib.sha256()
    for part in described(form.program):
        digest.update(part)
    declared = [end for tap, ends in zip(form.taps, form.slopes, strict=True) if tap.assumed for end in ends]
    for leaf in (*form.consts, *declared):
        array = np.asarray(leaf)
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_network(form: LureForm, network: str | None, what: str) -> None:
    """ValueError where `network`, of a bound, is not the fingerprint of this form; None is not known."""
    if network is None or network == fingerprint(form):
        return
    if network.startswith("local"):
        raise ValueError(f"{what} holds around one example only: use a bound of the whole network (lb.liplt)")
    raise ValueError(f"{what} was computed from another network: bound this form, or leave it out")


def multiplicity(tap: Tap) -> np.ndarray:
    """How many groups each entry of y belongs to (1 for elementwise taps)."""
    if tap.groups is None:
        return np.ones(tap.size_in)
    table = np.sort(tap.groups.array, axis=1)
    fresh = np.ones(table.shape, bool)
    fresh[:, 1:] = table[:, 1:] != table[:, :-1]  # padding repeats an entry within its group
    return np.bincount(table[fresh], minlength=tap.size_in).astype(float)


# --- the state sequence --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A place in the program where everything computed so far is held by a few registers.

    Args:
        registers: alive here; together they are the state s_k.
        step: the number of steps done before this cut.
        width: entries of the state.
    """

    registers: tuple[int, ...]
    step: int
    width: int


def state_sequence(program: Program, *, late: bool = False) -> tuple[Cut, ...]:
    """The state s_k before each tap k, and after the last one: the narrowest cut between two taps.

    Of equally narrow ones the first, or the last with `late`, where more of the linear map lies in front of the cut.

    Between cuts everything is one linear map, y_k = W_k s_k and s_{k+1} = H_k s_k + G_k v_k, so every DAG is a sequence
    of residual blocks. Cut 0 is the input or what is left of it before tap 0; the last cut is the output.
    """

    def at(place: int) -> Cut:
        registers = program.alive(place)
        return Cut(registers, place, sum(program.sizes[r] for r in registers))

    cuts, start = [], 0
    for place in program.tap_places:
        places = range(start, place + 1)
        cuts.append(min((at(p) for p in (reversed(places) if late else places)), key=lambda cut: cut.width))
        start = place + 1
    cuts.append(at(len(program.steps)))
    return tuple(cuts)
